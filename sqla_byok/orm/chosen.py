"""Which columns a job is over: those of all models, of classes and tables, or single ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.orm import Mapper

from sqla_byok.errors import ConfigurationError
from sqla_byok.orm.hash_index import IndexComparator
from sqla_byok.orm.namesakes import declared_tables, protected_in
from sqla_byok.orm.schema import sources_of
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["Chosen", "chosen", "hashes_in", "values_in"]

Chosen = dict[Table, set[str]]
"""The keys of encrypted and hash columns, by their tables."""


def chosen(what: Sequence[Any]) -> Chosen:
    """The columns that are meant.

    :param what: declarative bases, MetaData, mapped classes, tables, encrypted attributes or columns, hash_index
        attributes; names of tables and column ids; with nothing in it all models of this process are meant.
    :raises ConfigurationError: something has no encrypted columns.
    """
    found: Chosen = {}
    if not what:
        for table in declared_tables():
            _add(found, table, protected_in(table))
    for each in what:
        if isinstance(each, str):
            for table, columns in _named(each):
                _add(found, table, columns)
            continue
        tables = _tables(each)
        for table in tables:
            _add(found, table, protected_in(table))
        if not tables:
            table, columns = _single(each)
            _add(found, table, columns)
    if not found:
        raise ConfigurationError("no model with encrypted columns was imported; import your models first")
    return found


def values_in(table: Table, keys: Iterable[str]) -> list[str]:
    """The encrypted columns among them, in the order of the table."""
    return [each.key for each in table.c if each.key in keys and isinstance(each.type, Encrypted)]


def hashes_in(table: Table, keys: Iterable[str]) -> list[str]:
    """The hash columns among them, in the order of the table."""
    return [each.key for each in table.c if each.key in keys and isinstance(each.type, SearchHash)]


def _add(found: Chosen, table: Table, columns: Iterable[Any]) -> None:
    found.setdefault(table, set()).update(column.key for column in columns)


def _tables(what: Any) -> list[Table]:
    """The tables with encrypted columns that a base, a MetaData, a class or a table stands for."""
    tables: Iterable[Any] = ()
    if isinstance(what, Table):
        tables = [what]
    elif isinstance(what, type):
        mapper: Any = inspect(what, raiseerr=False)
        metadata = getattr(what, "metadata", None)
        if isinstance(mapper, Mapper):
            tables = mapper.tables
        elif isinstance(metadata, MetaData):
            tables = metadata.sorted_tables
    elif isinstance(what, MetaData):
        tables = what.sorted_tables
    return [table for table in tables if isinstance(table, Table) and protected_in(table)]


def _named(name: str) -> list[tuple[Table, list[Any]]]:
    """What a table's name or a column id stands for."""
    found: list[tuple[Table, list[Any]]] = []
    for table in declared_tables():
        ours = protected_in(table)
        if table.fullname == name:
            found.append((table, ours))
        found += [_single(column) for column in ours if column.type.column_id == name]
    if not found:
        raise ConfigurationError(f"no model declares a table or an encrypted column {name!r}")
    return found


def _single(what: Any) -> tuple[Table, list[Any]]:
    """An encrypted column with the hash columns that follow it, or the hash column of an index."""
    comparator = getattr(what, "comparator", None)
    if isinstance(comparator, IndexComparator):
        what = comparator.hash_column()
    element = what.__clause_element__() if hasattr(what, "__clause_element__") else what
    known = {table: table for table in declared_tables()}
    of: Any = getattr(element, "table", None)
    table = known.get(of)  # of an attribute it is annotated, and equal
    column = None if table is None else table.c.get(str(element.key))
    if table is None or column is None or not isinstance(column.type, Encrypted | SearchHash):
        raise ConfigurationError(f"{what}: a job is over models, tables, and encrypted columns or attributes")
    if isinstance(column.type, SearchHash):
        return table, [column]
    following = [
        each for each in table.c if isinstance(each.type, SearchHash) and column.key in sources_of(each)
    ]
    return table, [column, *following]
