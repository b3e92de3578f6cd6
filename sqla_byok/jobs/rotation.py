"""Rotations to their end: retiring what no row needs any more, and destroying it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

from sqlalchemy import Engine, Table, func, inspect, select
from typing_extensions import Unpack

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, KINDS, READABLE, RETIRED, SEARCH_SALT
from sqla_byok.errors import ConfigurationError
from sqla_byok.jobs.kinds import How, reencrypt, rehash
from sqla_byok.jobs.plans import databases_of, engine_of, tables_there
from sqla_byok.jobs.runner import Report
from sqla_byok.jobs.searching import hashed_note
from sqla_byok.keys.rows import SealedRecord
from sqla_byok.keys.searchable import NOTHING, OFF
from sqla_byok.orm.chosen import chosen, hashes_in
from sqla_byok.orm.namesakes import protected_in
from sqla_byok.orm.stored import StoredTable
from sqla_byok.runtime import Byok

__all__ = ["Kind", "Rotation", "destroy", "restore", "retire", "rotate"]

Kind = Literal["data-key", "search-salt"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a whole rotation did.

    :ivar reencrypted, rehashed: the reports of its jobs.
    :ivar retired: the generations that were retired, each as kind and number; what is left to destroy.
    """

    reencrypted: Report
    rehashed: Report | None
    retired: tuple[tuple[str, int], ...]


def rotate(
    byok: Byok,
    engine: Engine | None,
    tenant: str,
    /,
    *what: Any,
    gone: Collection[str] = (),
    **how: Unpack[How],
) -> Rotation:
    """Give a tenant a new data key and search salt, move all rows to them, and retire the old ones.

    ::

        rotation = rotate(byok, engine, "org-42")
        for kind, generation in rotation.retired:
            destroy(byok, "org-42", kind, generation, backups_kept=90)   # 90 days later

    Called again after it was interrupted it goes on: what was rotated already is not rotated again. Nothing is
    destroyed. Takes some minutes beside the jobs themselves, in which changes become known to every process.

    :param what: models; all models unless given. Where they are not all that the tenant has rows in, retiring refuses.
    :param gone: as for :func:`retire`.
    :raises ConfigurationError: rows are left that could not be moved; the reports of the jobs tell which.
    """
    wanted, over = _wanted(byok, tenant), chosen(what)
    for kind in KINDS:
        if _active(byok, tenant, kind) < wanted[kind]:
            (byok.rotate_data_key if kind == DATA_KEY else byok.rotate_salt)(tenant)
    how = {**how, "tenants": [tenant]}
    if any(column.type.owner == tenant for table in over for column in protected_in(table)):
        del how["tenants"]  # an owner's columns are in the rows of all
    reencrypted = reencrypt(byok, engine, *what, **how)
    has_hashes = any(hashes_in(table, keys) for table, keys in over.items())
    rehashed = rehash(byok, engine, *what, **how) if has_hashes else None
    retired = []
    for kind in KINDS:
        for generation in _old(byok, tenant, kind):
            retire(byok, engine, tenant, kind, generation, *what, gone=gone)
            retired.append((kind, generation))
    byok._jobs.note(tenant, _ROTATION, {**wanted, "done": True})
    return Rotation(reencrypted, rehashed, tuple(retired))


_ROTATION = "rotation"


def _wanted(byok: Byok, tenant: str) -> dict[str, int]:
    """Which generations a rotation is to end with; those of the one that was interrupted, if any."""
    noted = byok._jobs.noted(tenant, _ROTATION)
    old = {kind: _old(byok, tenant, kind) for kind in KINDS}
    active = {kind: _active(byok, tenant, kind) for kind in KINDS}
    if (
        noted is not None
        and not noted["done"]
        and any(old[kind] or active[kind] < noted[kind] for kind in KINDS)
    ):
        return {kind: noted[kind] for kind in KINDS}
    wanted = {kind: active[kind] + (0 if old[kind] else 1) for kind in KINDS}
    byok._jobs.note(tenant, _ROTATION, {**wanted, "done": False})
    return wanted


def retire(
    byok: Byok,
    engine: Engine | None,
    tenant: str,
    kind: str,
    generation: int,
    /,
    *what: Any,
    gone: Collection[str] = (),
) -> None:
    """Stop reading with a generation that no row needs any more. It is kept, and can be made readable again.

    A data key: the rows that are under it are counted, in every table that the keystore has noted for the tenant, in
    ``engine``'s database and in all others that are attached by a sync engine. A search salt, of which nothing in a
    hash tells: every column that the tenant can be searched by has to have been hashed by a newer one, by a
    :func:`~sqla_byok.jobs.rehash` that began after that was in use.

    What nobody can ask: what :meth:`~sqla_byok.Byok.seal` made, what backups hold, and transactions that began before
    the rotation and have not ended.

    :param engine: of the database with the tenant's rows; None: the only one that was attached.
    :param kind: ``"data-key"`` or ``"search-salt"``.
    :param what: the models; all models unless given.
    :param gone: tables that the tenant has written to and that are not there any more, under that name: they were
        dropped or renamed. Also the ids of columns of theirs that begin otherwise than with the table's name.
    :raises ConfigurationError: rows need it still; a table was noted that no model declares, and is not said to be
        gone; one that is said to be gone is there; it is not readable.
    """
    _check_kind(kind)
    engine = engine_of(byok, engine)

    def check() -> None:
        _refuse_there(byok, engine, gone)
        if kind == DATA_KEY:
            _refuse_rows(byok, engine, tenant, generation, what, gone)
        else:
            _refuse_hashes(byok, tenant, generation, what, gone)
        # Before it is retired: a date that is too late destroys nothing too early.
        _note_retired(byok, tenant, kind, generation, datetime.now(timezone.utc))

    byok._generations.retire(tenant, kind, generation, check)


def restore(byok: Byok, tenant: str, kind: str, generation: int, /) -> None:
    """Make a retired generation readable again. Takes 21 seconds, in which every process learns of it.

    :raises ConfigurationError: it was destroyed, or never was.
    """
    _check_kind(kind)
    _note_retired(byok, tenant, kind, generation, None)
    byok._generations.restore(tenant, kind, generation)
    byok._keyrings.look_again(tenant)


def destroy(byok: Byok, tenant: str, kind: str, generation: int, /, *, backups_kept: float) -> None:
    """Delete a retired generation for good. Whatever is still under it, in backups too, is lost.

    :param backups_kept: for how many days backups of the rows are kept; it is refused before it was retired for so
        long. 0 means that there are none, or none that anybody wants to read.
    :raises ConfigurationError: it is not retired, or not for so long.
    """
    _check_kind(kind)
    if not 0 <= backups_kept <= _LONGEST:
        raise ConfigurationError(
            f"backups_kept is a number of days from 0 to {_LONGEST:,}, not {backups_kept!r}"
        )
    if backups_kept and generation in _generations(byok, tenant, kind, RETIRED):
        now, retired = datetime.now(timezone.utc), _retired_at(byok, tenant, kind, generation)
        due = (retired or now) + timedelta(days=backups_kept)
        if retired is None:
            _note_retired(byok, tenant, kind, generation, now)
        if due > now:
            raise ConfigurationError(
                f"{kind} {generation} of tenant {tenant!r}: backups that are kept for {backups_kept:g} days may have "
                f"rows under it until {due.date().isoformat()}; destroy it then",
                tenant=tenant,
            )
    byok._generations.destroy(tenant, kind, generation)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigurationError(f"a generation is of one of {', '.join(KINDS)}")


_LONGEST = 36_525  # days: a hundred years


def _note_retired(byok: Byok, tenant: str, kind: str, generation: int, at: datetime | None) -> None:
    """Keep when a generation was retired; None: it is not."""
    content = {"at": None if at is None else at.isoformat()}
    byok._jobs.note(tenant, f"retired {kind} {generation}", content)


def _retired_at(byok: Byok, tenant: str, kind: str, generation: int) -> datetime | None:
    noted = byok._jobs.noted(tenant, f"retired {kind} {generation}")
    return None if noted is None or noted["at"] is None else datetime.fromisoformat(noted["at"])


def _old(byok: Byok, tenant: str, kind: str) -> list[int]:
    """The generations that are read beside the active one."""
    return sorted(_generations(byok, tenant, kind, READABLE))


def _active(byok: Byok, tenant: str, kind: str) -> int:
    """The generation that is written with."""
    return next(iter(_generations(byok, tenant, kind, ACTIVE)))


def _generations(byok: Byok, tenant: str, kind: str, state: str) -> dict[int, SealedRecord]:
    """The generations of a state, by their numbers."""
    row = byok._keystore.row(tenant)
    found = (*row.generations, *row.retired)
    return {each.generation: each for each in found if (each.kind, each.state) == (kind, state)}


def _refuse_there(byok: Byok, engine: Engine, gone: Collection[str]) -> None:
    """Refuse what is said to be gone, and is there."""
    for database in databases_of(byok, engine):
        look = inspect(database)
        for name in gone:
            schema, _, table = name.rpartition(".")
            if look.has_table(name) or look.has_table(table, schema=schema or None):
                raise ConfigurationError(
                    f"{name} is said to be gone, and is there: give the model that declares it"
                )


def _refuse_rows(
    byok: Byok,
    engine: Engine,
    tenant: str,
    generation: int,
    what: tuple[Any, ...],
    gone: Collection[str],
) -> None:
    """Refuse where rows are under a data key, or nobody can say."""
    record = _generations(byok, tenant, DATA_KEY, READABLE).get(generation)
    if record is None:
        return  # Generations says what it is
    tables = list(chosen(what))  # several may declare one, each with columns of its own
    noted = byok._keyrings.note(byok._keyrings.get(tenant, "job"), NOTHING).searchable.tables
    unknown = sorted(noted - {table.fullname for table in tables} - {*gone})
    if unknown:
        raise ConfigurationError(
            f"tenant {tenant!r} has written to tables that no model here declares: {', '.join(unknown)}. Rows in them "
            f"may be under the data key: give the models; where a table was dropped or renamed, say that it is gone "
            f"(gone={unknown!r}, or --gone {' --gone '.join(unknown)})",
            tenant=tenant,
        )
    left = {
        f"{table.fullname}.{key}": rows
        for database in databases_of(byok, engine)
        for table in tables_there(database, tables)
        for key, rows in _rows_under(database, table, record.id)
        if rows
    }
    if left:
        told = ", ".join(f"{rows} in {column}" for column, rows in left.items())
        raise ConfigurationError(
            f"data key {generation} of tenant {tenant!r}: values are under it still ({told}); run 'byok reencrypt' "
            "(sqla_byok.jobs.reencrypt) first",
            tenant=tenant,
        )


def _rows_under(engine: Engine, table: Table, key_id: bytes) -> Iterator[tuple[str, int]]:
    stored = StoredTable(table)
    with engine.connect() as conn:
        for key in stored.values:
            cell = stored.cell(key)
            yield (
                key,
                conn.scalar(
                    select(func.count())
                    .select_from(stored.stored)
                    .where(func.substr(cell, 3, 16) == stored.bound(key_id))
                )
                or 0,
            )


def _refuse_hashes(
    byok: Byok, tenant: str, generation: int, what: tuple[Any, ...], gone: Collection[str]
) -> None:
    """Refuse where hashes may be by a search salt."""
    ring = byok._keyrings.note(byok._keyrings.get(tenant, "job"), NOTHING)
    active = _active(byok, tenant, SEARCH_SALT)
    declared = {each.type.column_id for table in chosen(what) for each in protected_in(table)}
    left = []
    for column in sorted(ring.searchable.specs):
        is_gone = column not in declared and any(
            column == each or column.startswith(f"{each}.") for each in gone
        )
        if is_gone or ring.searchable.state(column) == OFF:
            continue
        noted = byok._jobs.noted(tenant, hashed_note(column))
        if noted is None or noted["salt"] <= generation or noted["salt"] > active:
            left.append(column)
    if left:
        raise ConfigurationError(
            f"search salt {generation} of tenant {tenant!r}: nothing shows that no hash is by it in {', '.join(left)}; "
            "run 'byok rehash' (sqla_byok.jobs.rehash) over them first",
            tenant=tenant,
        )
