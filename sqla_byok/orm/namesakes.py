"""Which tables have encrypted columns, by name: for whatever names a table without saying that it is encrypted.

Text does, ``table()``, and another :class:`~sqlalchemy.Table` of the same name: reflected, automapped, of another
MetaData, or made by pandas. Tables are known for as long as they live, in the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import Column, Table, event
from sqlalchemy.sql.selectable import TableClause

from sqla_byok.orm import upstream
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["Naming", "Stored", "declared_tables", "protected_in"]

_OURS = (Encrypted, SearchHash)
_tables: dict[str, WeakSet[Table]] = {}
_NO_SCHEMAS: Mapping[str | None, str | None] = MappingProxyType({})


@event.listens_for(Encrypted, "after_parent_attach")
def _declared(type_: Encrypted[Any], column: Any) -> None:
    if isinstance(column, Column):
        event.listen(column, "after_parent_attach", _protect)


def _protect(_: Any, table: Any) -> None:
    if isinstance(table, Table):
        _tables.setdefault(str.lower(table.name), WeakSet()).add(table)


class Stored(TableClause):
    """A table with encrypted columns as the database has it, for jobs: ciphertext and hashes are bytes in it.

    Statements over it are neither judged nor filled nor held to a tenant.
    """

    inherit_cache = True


def declared_tables() -> list[Table]:
    """The tables with encrypted columns that this process has declared, by name."""
    return sorted(
        {table for tables in _tables.values() for table in tables}, key=lambda table: table.fullname
    )


def protected_in(table: Any) -> list[Any]:
    """The encrypted columns and hash columns of a table that says so itself."""
    return [column for column in table.c if isinstance(column.type, _OURS)]


class Naming(NamedTuple):
    """When two names are one, in a database.

    :param tables: whether upper and lower case make two names of a table.
    :param columns: the same of a column.
    :param schema: where a table is whose schema is not given; None where nobody knows.
    :param translated: by what schemas are replaced when a statement is executed; None where nobody knows.
    """

    tables: bool = False
    columns: bool = False
    schema: str | None = None
    translated: Mapping[str | None, str | None] | None = _NO_SCHEMAS

    @classmethod
    def of(cls, dialect: Any, translated: Mapping[str | None, str | None] | None = None) -> Naming:
        """That of a dialect.

        :param translated: the ``schema_translate_map`` of the statement, if it is executed with one.
        """
        tables, columns = upstream.case_counts(dialect)
        schema = getattr(dialect, "default_schema_name", None)
        return cls(tables, columns, schema, translated or _NO_SCHEMAS)

    @classmethod
    def of_compiled(cls, compiled: Any) -> Naming:
        """That of a compiled statement. SQLAlchemy keeps one for all executions with a ``schema_translate_map``."""
        naming = cls.of(compiled.dialect)
        return naming._replace(translated=None) if compiled.schema_translate_map else naming

    def column(self, name: str) -> str:
        """What is equal for two names of one column."""
        return self._spelled(name, self.columns)

    def same_table(self, table: Table, name: str, schema: str | None) -> bool:
        """Whether a table is the one of this name and schema."""
        if self._spelled(table.name, self.tables) != self._spelled(name, self.tables):
            return False
        mine, theirs = self._real(table.schema), self._real(schema)
        return mine is None or theirs is None or mine == theirs

    def _real(self, schema: str | None) -> str | None:
        """What is equal for two names of one schema; None where it may be any."""
        if self.translated is None:
            return None
        real = self.translated.get(schema, schema) or self.schema
        return None if real is None else self._spelled(real, self.tables)

    def protected(self, name: str, schema: str | None, loosely: bool = False) -> dict[str, Any]:
        """The types of the encrypted columns and hash columns of a table, by name.

        :param loosely: as it stands in text: in upper or lower case, and of any schema where none is given.
        """
        tables = _tables.get(str.lower(name))
        if not tables:
            return {}
        naming = self._replace(tables=False) if loosely else self
        return {
            self.column(column.name): column.type
            for table in tables
            if naming.same_table(table, name, table.schema if loosely and schema is None else schema)
            for column in protected_in(table)
        }

    def _spelled(self, name: str, case_counts: bool) -> str:
        # PostgreSQL, where case counts in all names, folds those that SQLAlchemy is told not to quote.
        folded = self.columns and getattr(name, "quote", None) is False
        return (
            name if case_counts and not folded else str.lower(name)
        )  # a quoted_name's own leaves it as it is
