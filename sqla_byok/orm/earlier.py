"""Rows from before: of a tenant, in a table that the keystore does not know for it.

A table or schema that was renamed without ``column_id``, rows that were copied by SQL, and plaintext from before a
migration leave rows behind that have no hash, or one that nobody looks for: a search would find nothing, and say
nothing. So the first statement of a tenant in a table that is new to it looks whether any are there: by the column
that says whose a row is, or else by the headers of the values, for which the table is read once to its end. A new
tenant, which has written to no table, is not looked after.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Table, func, or_, select

from sqla_byok.crypto.formats import HEADER_SIZE, VALUE_MAGIC
from sqla_byok.errors import NotEncryptedError
from sqla_byok.keys.keyring import Keyring
from sqla_byok.orm.stored import StoredTable
from sqla_byok.orm.tenant_column import tenant_key

__all__ = ["EarlierRows"]

# Plaintext from before a migration stands in the oldest rows.
_OLDEST = 1_000


class EarlierRows:
    """Looks for them, once for each tenant and table, and for plaintext once for each table."""

    def __init__(self) -> None:
        self._asked: set[tuple[str, str]] = set()
        self._plain: dict[tuple[str, frozenset[str]], bool] = {}

    def are_in(self, conn: Connection, ring: Keyring, table: Table, keys: Collection[str]) -> bool:
        """Whether a tenant has rows in a table that the keystore does not know for it.

        :param ring: the tenant's, or that of the owner of the columns.
        :param keys: of the columns that are written or searched.
        """
        name, known = table.fullname, ring.searchable.tables
        if not keys or name in known or (ring.tenant, name) in self._asked:
            return False
        if not table.primary_key.columns or (not known and not _has_owner(table, keys)):
            return False
        found = conn.scalar(_earlier(table, ring, keys)) is not None
        if not found:
            self._asked.add((ring.tenant, name))
        return found

    def refuse_plaintext(self, conn: Connection, table: Table, keys: Collection[str]) -> None:
        """Refuse to search columns in which values stand that were never encrypted.

        :param keys: of the encrypted columns.
        :raises NotEncryptedError: there are some in the table's oldest rows.
        """
        place = table.fullname, frozenset(keys)
        if place not in self._plain:
            self._plain[place] = _has_plaintext(conn, table, keys)
        if self._plain[place]:
            raise NotEncryptedError(
                f"{table.fullname}: values stand in its encrypted columns that sqla_byok has not written, such as "
                "plaintext from before a migration, and no search finds them; encrypt them into a new column, or "
                "remove them, and restart"
            )


def _has_owner(table: Table, keys: Collection[str]) -> bool:
    """Whether columns take the keys of an owner, whose tenants need not have written anything."""
    return any(table.c[key].type.owner is not None for key in keys)  # type: ignore[attr-defined] # encrypted ones


def _earlier(table: Table, ring: Keyring, keys: Collection[str]) -> Any:
    """The SELECT that finds one row of a tenant: by its column, or by the data keys in the values' headers.

    In columns of an owner, any value: before the first was noted there can be none, or the column had another owner.
    """
    if _has_owner(table, keys):
        stored = StoredTable(table, None, list(keys))
        where = [or_(*(stored.cell(key).is_not(None) for key in stored.values))]
        return select(stored.key[0]).where(*where).limit(1)
    stored = StoredTable(table, tenant_key(table), list(keys))
    where = list(stored.of_tenant(ring.tenant))
    if not where:
        ids = [stored.bound(header[2:HEADER_SIZE]) for header in ring.openers]
        where = [or_(*(func.substr(stored.cell(key), 3, 16).in_(ids) for key in stored.values))]
    return select(stored.key[0]).where(*where).limit(1)


def _has_plaintext(conn: Connection, table: Table, keys: Collection[str]) -> bool:
    if not table.primary_key.columns:
        return False
    stored = StoredTable(table, keys=list(keys))
    cells = [stored.cell(key).label(f"v{number}") for number, key in enumerate(stored.values)]
    oldest = select(*cells).order_by(*stored.key).limit(_OLDEST).subquery()
    magic = stored.bound(bytes([VALUE_MAGIC]))
    others = (cell.is_not(None) & (func.substr(cell, 1, 1) != magic) for cell in oldest.c)
    return conn.scalar(select(func.count()).select_from(oldest).where(or_(*others))) != 0
