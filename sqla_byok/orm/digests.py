"""The search hash of a value by itself, for handwritten SQL: what :meth:`sqla_byok.Byok.hash` gives."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect

from sqla_byok.errors import UnsupportedQueryError
from sqla_byok.keys.clock import Clock
from sqla_byok.keys.keyring import Keyring
from sqla_byok.orm.current import Turn, attachment_of, running
from sqla_byok.orm.guard import search_hash
from sqla_byok.orm.types import Digest

__all__ = ["hashes", "is_known"]


def is_known(column: Any, ring: Keyring) -> bool:
    """Whether a column was ever hashed, as far as the process knows. Where not, it has to look again to say so."""
    hash_column: Any = search_hash(column)
    return ring.searchable.knows_all([hash_column.type.source.hash_type.spec])


def hashes(column: Any, value: Any, ring: Keyring, clock: Clock, dialect: Dialect) -> list[Digest]:
    """What a value may be hashed to by each of a tenant's live search salts, the active one first.

    :param column: an attribute or column that is encrypted and searchable.
    :param dialect: one of the kind that the column is used with, attached to nothing.
    :param ring: the tenant's, or that of the column's owner.
    :raises UnsupportedQueryError: if the column has no hashes, or the value is NULL.
    :raises NotSearchableError: if the tenant has not enabled the search of the column.
    :raises KeystoreUnavailableError: if the salts may have changed since the process looked.
    """
    if clock.boot() >= ring.write_until:
        ring.outdated()
    hash_column: Any = search_hash(column)
    type_ = hash_column.type.source.hash_type
    ring.searchable.check(ring.tenant, (), [type_.spec])
    with running(Turn(attachment_of(dialect), ring.tenant, {type_.owner: ring})):
        found = [type_.at(nth).bind_processor(dialect)(value) for nth in range(len(ring.live_salts))]
    if None in found:
        name = type_.column_id
        raise UnsupportedQueryError(f"{name}: NULL has no hash; test the column with IS NULL", column=name)
    return [Digest(one) for one in found]
