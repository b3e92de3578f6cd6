"""What search hashes show to whoever reads the database: how often each value occurs, though not which it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.sql.elements import ColumnElement

from sqla_byok.jobs.plans import engine_of
from sqla_byok.orm.chosen import chosen
from sqla_byok.orm.stored import StoredTable
from sqla_byok.orm.tenant_column import tenant_key
from sqla_byok.runtime import Byok

__all__ = ["Leakage", "leakage"]

_SHOWN = 5


class Leakage(NamedTuple):
    """What the hashes of one column show of one tenant's rows.

    :ivar tenant: whose rows; empty where no keystore row says whose.
    :ivar column: the column id.
    :ivar rows: how many have a hash.
    :ivar distinct: how many different hashes there are.
    :ivar largest: the shares of the most frequent values, at most five, between 0 and 1.
    :ivar entropy: of the distribution, in bits; log2 of ``distinct`` where all are equally frequent.
    :ivar guessed: of how many of the rows, as a share, somebody guesses the value who knows how frequent each value is:
        values whose frequency no other has are known, of those of one frequency one is right by chance.
    """

    tenant: str
    column: str
    rows: int
    distinct: int
    largest: tuple[float, ...]
    entropy: float
    guessed: float


def leakage(
    byok: Byok, engine: Engine | None, /, *what: Any, tenants: Sequence[str] | None = None
) -> list[Leakage]:
    """Count how the hashes of searchable columns are distributed. The database counts; no value and no key is opened.

    ::

        worst = max(leakage(byok, engine, Patient), key=lambda each: each.guessed)

    While a search salt is rotated a value has several hashes and counts for each of them.

    :param engine: of the database with the rows; None: the only one that was attached.
    :param what: models, tables or attributes; all models unless given.
    :param tenants: only these.
    :returns: for each column and tenant with rows, the columns in the order of their tables.
    """
    engine, found = engine_of(byok, engine), list[Leakage]()
    tenant_of: dict[str, str | None] = {}
    for table, keys in chosen(what).items():
        stored = StoredTable(table, tenant_key(table))
        for key in stored.hashes:
            if key not in keys:
                continue
            counts: dict[str, dict[int, int]] = {}
            with engine.connect() as conn:
                for whose, rows, values in _counted(conn, stored, key):
                    tenant = whose if stored.tenant is not None else _tenant(byok, whose, tenant_of)
                    of = counts.setdefault(tenant, {})
                    of[rows] = of.get(rows, 0) + values
            column = stored.hashes[key].column_id or ""
            found += [
                _made(tenant, column, of)
                for tenant, of in sorted(counts.items())
                if tenants is None or tenant in tenants
            ]
    return found


def _counted(conn: Connection, table: StoredTable, key: str) -> Iterator[tuple[str, int, int]]:
    """Whose, and how many values have so many rows: by the tenant column, or by the id of a data key."""
    hash_ = table.cell(key)
    if table.tenant is not None:
        whose: ColumnElement[Any] = table.tenant
        each = select(whose.label("whose"), func.count().label("n")).group_by(whose, hash_)
    else:
        source = func.substr(table.cell(table.sources[key][0]), 3, 16)
        whose = func.encode(source, "hex") if conn.dialect.name == "postgresql" else func.hex(source)
        # A hash is one tenant's, whichever of its data keys the rows are under.
        each = select(func.min(whose).label("whose"), func.count().label("n")).group_by(hash_)
    inner = each.select_from(table.stored).where(hash_.is_not(None)).subquery()
    for row in conn.execute(
        select(inner.c.whose, inner.c.n, func.count()).group_by(inner.c.whose, inner.c.n)
    ):
        yield str(row[0]), row[1], row[2]


def _tenant(byok: Byok, key_id: str, known: dict[str, str | None]) -> str:
    if key_id not in known:
        known[key_id] = byok._keystore.tenant_of(bytes.fromhex(key_id))
    return known[key_id] or ""


def _made(tenant: str, column: str, values: Mapping[int, int]) -> Leakage:
    """The figures of one column.

    :param values: how many values have so many rows.
    """
    rows = sum(n * many for n, many in values.items())
    largest: list[float] = []
    for n in sorted(values, reverse=True):
        largest += [n / rows] * min(values[n], _SHOWN - len(largest))
    entropy = -sum(many * n / rows * math.log2(n / rows) for n, many in values.items())
    return Leakage(
        tenant, column, rows, sum(values.values()), tuple(largest), max(entropy, 0.0), sum(values) / rows
    )
