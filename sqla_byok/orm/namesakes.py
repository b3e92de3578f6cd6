"""Which tables have encrypted columns, by name: for whatever names a table without saying that it is encrypted.

Text does, ``table()``, and another :class:`~sqlalchemy.Table` of the same name: reflected, automapped, of another
MetaData, or made by pandas. Tables are known for as long as they live, in the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import Column, Table, event, quoted_name
from sqlalchemy.sql.selectable import TableClause

from sqla_byok.errors import DeclarationError, UnsupportedQueryError
from sqla_byok.orm import upstream
from sqla_byok.orm.sql_text import Syntax, columns_in, tables_in
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["Naming", "Stored", "declared_tables", "is_rendered", "protected_in", "refuse_rendered"]

_OURS = (Encrypted, SearchHash)
_tables: dict[str, WeakSet[Table]] = {}
_NO_SCHEMAS: Mapping[str | None, str | None] = MappingProxyType({})


@event.listens_for(Encrypted, "after_parent_attach")
def _declared(type_: Encrypted[Any], column: Any) -> None:
    if isinstance(column, Column):
        event.listen(column, "after_parent_attach", _protect)


def _protect(_: Any, table: Any) -> None:
    if isinstance(table, Table):
        refuse_rendered(table)
        _tables.setdefault(str.lower(table.name), WeakSet()).add(table)


def refuse_rendered(table: Table) -> None:
    """Refuse a declaration by a name that only a database can read."""
    if is_rendered(table.name):
        raise DeclarationError(
            f"{table.name}: a name with quote=False is rendered as it stands, and has to be one without a schema or "
            "quotes; give schema=, and the name alone"
        )


def is_rendered(name: Any) -> bool:
    """Whether a name is rendered as it stands, and is more than a name: ``quoted_name("public.patient", False)``."""
    return getattr(name, "quote", None) is False and not str.isidentifier(name)


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
    :param syntax: how it reads a name that is rendered as it stands.
    """

    tables: bool = False
    columns: bool = False
    schema: str | None = None
    translated: Mapping[str | None, str | None] | None = _NO_SCHEMAS
    syntax: Syntax = Syntax()

    @classmethod
    def of(cls, dialect: Any, translated: Mapping[str | None, str | None] | None = None) -> Naming:
        """That of a dialect.

        :param translated: the ``schema_translate_map`` of the statement, if it is executed with one.
        """
        tables, columns = upstream.case_counts(dialect)
        schema = getattr(dialect, "default_schema_name", None)
        return cls(tables, columns, schema, translated or _NO_SCHEMAS, Syntax.of(dialect))

    @classmethod
    def of_compiled(cls, compiled: Any) -> Naming:
        """That of a compiled statement. SQLAlchemy keeps one for all executions with a ``schema_translate_map``."""
        naming = cls.of(compiled.dialect)
        return naming._replace(translated=None) if compiled.schema_translate_map else naming

    def column(self, name: str) -> str:
        """What is equal for two names of one column.

        :raises UnsupportedQueryError: it is rendered as it stands, and names several.
        """
        if is_rendered(name):
            names = {each.name for each in columns_in(name, self.syntax)}
            names |= {each.name for each in tables_in(name, self.syntax, fragment=True, in_from=True)}
            if len(names) > 1:
                raise _unclear("a column")
            name = next(iter(names), name)
        return self._spelled(name, self.columns)

    def column_of(self, column: Any) -> str:
        """The same of a table's column; one that is text is rendered as it stands."""
        is_text = getattr(column, "is_literal", False)
        return self.column(quoted_name(column.name, quote=False) if is_text else column.name)

    def known(self, tables: Mapping[str, WeakSet[Table]], name: str, schema: str | None) -> list[Table]:
        """Which of some tables a name and a schema are those of.

        :param tables: by their names in lower case.
        :raises UnsupportedQueryError: the name is rendered as it stands, and names one of them beside others.
        """
        meant = self._read(name, schema)
        found = [
            table
            for each, theirs in meant
            for table in tuple(tables.get(str.lower(each), ()))
            if self._spelled(table.name, self.tables) == self._spelled(each, self.tables)
            and ((mine := self._real(table.schema)) is None or theirs is None or mine == theirs)
        ]
        if found and len(meant) > 1:
            raise _unclear(found[0].fullname)
        return found

    def _read(self, name: str, schema: str | None) -> list[tuple[str, str | None]]:
        """What a database takes for the name of a table, each with what is equal for two names of its schema."""
        if not is_rendered(name):
            return [(name, self._real(schema))]
        return [
            (
                each.name,
                self._real(schema) if each.before is None else self._spelled(each.before, self.tables),
            )
            for each in tables_in(name, self.syntax, fragment=True, in_from=True)
        ]

    def _real(self, schema: str | None) -> str | None:
        """What is equal for two names of one schema; None where it may be any."""
        if self.translated is None:
            return None
        real = self.translated.get(schema, schema) or self.schema
        if is_rendered(real):
            names = [each.name for each in tables_in(str(real), self.syntax, fragment=True, in_from=True)]
            real = names[0] if len(names) == 1 else None
        return None if real is None else self._spelled(real, self.tables)

    def protected(self, name: str, schema: str | None, loosely: bool = False) -> dict[str, Any]:
        """The types of the encrypted columns and hash columns of a table, by name.

        :param loosely: as it stands in text: in upper or lower case, and of any schema where none is given.
        """
        naming = self
        if loosely:
            naming = self._replace(tables=False, translated=self.translated if schema else None)
        return {
            self.column(column.name): column.type
            for table in naming.known(_tables, name, schema)
            for column in protected_in(table)
        }

    def _spelled(self, name: str, case_counts: bool) -> str:
        # PostgreSQL, where case counts in all names, folds those that SQLAlchemy is told not to quote.
        folded = self.columns and getattr(name, "quote", None) is False
        return (
            name if case_counts and not folded else str.lower(name)
        )  # a quoted_name's own leaves it as it is


def _unclear(what: str) -> UnsupportedQueryError:
    return UnsupportedQueryError(
        f"{what}: it is named by text with quote=False that names others too, so that nobody can tell what is "
        "written or read; give the name alone"
    )
