"""What we keep on SQLAlchemy's objects, all of it. Each thing lives as long as the object that it is kept on.

==================  ===================  =============================================================================
host                under                what
==================  ===================  =============================================================================
``Dialect``         ``ATTACHMENT``       what its engine is attached to
``Compiled``        ``NEEDS``            what the statement needs; None where nothing of it concerns us
``Compiled``        ``READERS``          what opens the columns of its result, once for each time that SQLAlchemy asked
``Compiled``        ``COLUMNS``          the columns of its result that are opened at the fetch
``Compiled``        ``BINARY``           whether its result comes out of PostgreSQL's binary format the same
``Compiled``        ``WITH_ROWS``        an INSERT or UPDATE compiled for rows with their hashes, by the rows' keys
``Compiled``        ``SALTS``            by how many search salts it compares hashes, and by which specifications
``Connection``      ``TURN``             the tenant of the session that it works for, where that has its own
``Connection``      ``UNIT``             the keyring of a tenant that wants a KMS call for each transaction
``Connection``      ``MET``              for whom its transaction has worked so far
``Session.info``    ``SESSION_TURN``     its tenant, where it has one of its own
``Session.info``    ``SESSION_MET``      the same of the session's transactions, by engine
``Column.info``     ``SOURCE``, …        what a hash column follows: see :mod:`sqla_byok.orm.schema`
==================  ===================  =============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "ATTACHMENT",
    "BINARY",
    "COLUMNS",
    "MET",
    "NEEDS",
    "READERS",
    "SESSION_MET",
    "SESSION_TURN",
    "TURN",
    "UNASKED",
    "WITH_ROWS",
    "compared",
    "gather",
    "held",
    "hold",
    "note_compared",
    "searched",
]

ATTACHMENT = "_sqla_byok_attachment"
NEEDS = "_sqla_byok_needs"
READERS = "_sqla_byok_readers"
COLUMNS = "_sqla_byok_columns"
BINARY = "_sqla_byok_binary"
WITH_ROWS = "_sqla_byok_with_rows"
SALTS = "_sqla_byok_salts"
TURN = "_sqla_byok_turn"
UNIT = "_sqla_byok_unit"
MET = "_sqla_byok_met"
SESSION_TURN = "byok_turn"
SESSION_MET = "byok_met"

UNASKED: Any = object()
"""In the place of a compiled statement's needs, until they were asked for."""


# -- compiled statements -----------------------------------------------------------------------------------------------


def note_compared(compiler: Any, live: int, owner: str | None, specs: Iterable[Any]) -> None:
    """Note of a statement, while it is compiled, that it compares search hashes.

    :param live: by how many search salts.
    :param owner: whose they are, where they are not the statement's tenant's.
    :param specs: how the hashes are made that it compares.
    """
    noted = compiler.__dict__.setdefault(SALTS, {})
    _, known = noted.get(owner, (live, frozenset()))
    noted[owner] = live, known.union(specs)


def compared(compiled: Any) -> Mapping[str | None, int]:
    """By how many search salts a compiled statement compares hashes, by whose they are."""
    return {owner: live for owner, (live, _) in compiled.__dict__.get(SALTS, {}).items()}


def searched(compiled: Any) -> dict[str | None, frozenset[Any]]:
    """How the search hashes are made that a compiled statement compares, by whose they are."""
    return {owner: specs for owner, (_, specs) in compiled.__dict__.get(SALTS, {}).items()}


def gather(compiled: Any) -> list[Any]:
    """A list for what opens the columns of a statement's result; until those are known, it is kept from the first on.

    Several threads may ask at once: each gathers a list of its own, and the longest is complete where any is.
    """
    readers: list[Any] = []
    if COLUMNS not in compiled.__dict__:
        compiled.__dict__.setdefault(READERS, []).append(readers)
    return readers


# -- connections -------------------------------------------------------------------------------------------------------


def hold(connection: Any, ring: Any) -> None:
    """Keep a keyring for as long as the connection's transaction lasts."""
    connection.__dict__[UNIT] = connection.get_transaction(), ring


def held(connection: Any) -> Any:
    """The keyring that :func:`hold` kept in this transaction; None after its end."""
    transaction, ring = connection.__dict__.get(UNIT) or (None, None)
    return ring if transaction is not None and transaction is connection.get_transaction() else None
