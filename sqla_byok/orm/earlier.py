"""Rows from before: of a tenant, in a table that the keystore does not know for it.

A table or schema that was renamed without ``column_id``, and plaintext from before a migration, leave rows behind that
have no hash, or one that nobody looks for: a search would find nothing, and say nothing. So the first statement of a
tenant in a table that is new to it looks whether any are there. A new tenant, which has written to no table, is not
looked after; nor is one whose tables are all there still, unless a column says whose a row is: then an index answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Table, func, inspect, or_, select
from sqlalchemy.sql.elements import ColumnElement

from sqla_byok.crypto.formats import HEADER_SIZE, VALUE_MAGIC
from sqla_byok.errors import NotEncryptedError
from sqla_byok.keys.keyring import Keyring
from sqla_byok.orm.namesakes import declared_tables
from sqla_byok.orm.stored import StoredTable
from sqla_byok.orm.tenant_column import tenant_key

__all__ = ["EarlierRows"]

# Plaintext from before a migration stands in the oldest rows.
_OLDEST = 1_000


class EarlierRows:
    """Looks for them, once for each tenant and table, and for plaintext once for each table."""

    def __init__(self) -> None:
        self._asked: set[tuple[str, str]] = set()
        self._plain: dict[str, bool] = {}
        self._gone: dict[str, bool] = {}

    def are_in(self, conn: Connection, ring: Keyring, name: str, owner: str | None) -> bool:
        """Whether a tenant has rows in a table that the keystore does not know for it.

        :param ring: the tenant's, or that of the owner of single columns.
        :param name: of the table, with its schema.
        :param owner: the owner, in the second case.
        """
        known = ring.searchable.tables
        if not known or name in known or (ring.tenant, name) in self._asked:
            return False
        table = next((each for each in declared_tables() if each.fullname == name), None)
        if table is None or not table.primary_key.columns:
            return False
        stored = StoredTable(table, tenant_key(table) if owner is None else None)
        cells = [stored.cell(key) for key, whose in stored.owners.items() if whose == owner]
        found = False
        if stored.tenant is not None or any(self._is_gone(conn, each) for each in known):
            found = conn.scalar(_mine(stored, cells, ring)) is not None
        if not found:
            self._asked.add((ring.tenant, name))
        return found

    def refuse_plaintext(self, conn: Connection, name: str) -> None:
        """Refuse to search a table in which values stand that were never encrypted.

        :raises NotEncryptedError: there are some among its oldest rows.
        """
        plain = self._plain.get(name)
        if plain is None:
            table = next((each for each in declared_tables() if each.fullname == name), None)
            plain = self._plain[name] = table is not None and _has_plaintext(conn, table)
        if plain:
            raise NotEncryptedError(
                f"{name}: values stand in its encrypted columns that sqla_byok has not written, such as plaintext from "
                "before a migration, and no search finds them; encrypt them into a new column, or remove them, and "
                "restart"
            )

    def _is_gone(self, conn: Connection, name: str) -> bool:
        """Whether a table that was written to is there no more: its rows may be under another name now."""
        if name not in self._gone:
            schema, _, table = name.rpartition(".")
            self._gone[name] = not inspect(conn).has_table(table, schema=schema or None)
        return self._gone[name]


def _mine(table: StoredTable, cells: list[ColumnElement[Any]], ring: Keyring) -> Any:
    """The SELECT that finds one row of a tenant: by its column, or by the data keys in the values' headers."""
    if table.tenant is not None:
        where = [*table.of_tenant(ring.tenant), or_(*(cell.is_not(None) for cell in cells))]
    else:
        ids = [table.bound(header[2:HEADER_SIZE]) for header in ring.openers]
        where = [or_(*(func.substr(cell, 3, 16).in_(ids) for cell in cells))]
    return select(table.key[0]).where(*where).limit(1)


def _has_plaintext(conn: Connection, table: Table) -> bool:
    if not table.primary_key.columns:
        return False
    stored = StoredTable(table)
    with_values = list(_labelled(stored))
    oldest = select(*with_values).order_by(*stored.key).limit(_OLDEST).subquery()
    magic = stored.bound(bytes([VALUE_MAGIC]))
    others = (cell.is_not(None) & (func.substr(cell, 1, 1) != magic) for cell in oldest.c)
    return conn.scalar(select(func.count()).select_from(oldest).where(or_(*others))) != 0


def _labelled(table: StoredTable) -> Iterator[ColumnElement[Any]]:
    for number, key in enumerate(table.values):
        yield table.cell(key).label(f"v{number}")
