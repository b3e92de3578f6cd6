"""Rotations to their end: retiring what no row needs any more, and destroying it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

from sqlalchemy import Engine, Table, func, select
from typing_extensions import Unpack

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, KINDS, READABLE, SEARCH_SALT
from sqla_byok.errors import ConfigurationError
from sqla_byok.jobs.kinds import How, engine_of, reencrypt, rehash
from sqla_byok.jobs.runner import Report
from sqla_byok.jobs.searching import hashed_note
from sqla_byok.keys.rows import SealedRecord
from sqla_byok.keys.searchable import NOTHING, OFF
from sqla_byok.orm.chosen import chosen, hashes_in
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


def rotate(byok: Byok, engine: Engine | None, tenant: str, /, *what: Any, **how: Unpack[How]) -> Rotation:
    """Give a tenant a new data key and search salt, move all rows to them, and retire the old ones.

    ::

        rotation = rotate(byok, engine, "org-42")
        for kind, generation in rotation.retired:
            destroy(byok, "org-42", kind, generation, backups_kept=90)   # 90 days later

    Called again after it was interrupted it goes on: what was rotated already is not rotated again. Nothing is
    destroyed. Takes some minutes beside the jobs themselves, in which changes become known to every process.

    :param what: models; all models unless given. Where they are not all that the tenant has rows in, retiring refuses.
    :raises ConfigurationError: rows are left that could not be moved; the reports of the jobs tell which.
    """
    for kind in KINDS:
        if not _old(byok, tenant, kind):
            (byok.rotate_data_key if kind == DATA_KEY else byok.rotate_salt)(tenant)
    how = {**how, "tenants": [tenant]}
    reencrypted = reencrypt(byok, engine, *what, **how)
    has_hashes = any(hashes_in(table, keys) for table, keys in chosen(what).items())
    rehashed = rehash(byok, engine, *what, **how) if has_hashes else None
    retired = []
    for kind in KINDS:
        for generation in _old(byok, tenant, kind):
            retire(byok, engine, tenant, kind, generation, *what)
            retired.append((kind, generation))
    return Rotation(reencrypted, rehashed, tuple(retired))


def retire(byok: Byok, engine: Engine | None, tenant: str, kind: str, generation: int, /, *what: Any) -> None:
    """Stop reading with a generation that no row needs any more. It is kept, and can be made readable again.

    A data key: the rows that are under it are counted, in every table that the keystore has noted for the tenant. A
    search salt, of which nothing in a hash tells: every column that the tenant can be searched by has to have been
    hashed by a newer one, by a :func:`~sqla_byok.jobs.rehash` that began after that was in use.

    What nobody can ask: what :meth:`~sqla_byok.Byok.seal` made, what backups hold, and transactions that began before
    the rotation and have not ended.

    :param engine: of the database with the tenant's rows; None: the only one that was attached.
    :param kind: ``"data-key"`` or ``"search-salt"``.
    :param what: the models; all models unless given.
    :raises ConfigurationError: rows need it still; a table was noted that no model declares; it is not readable.
    """
    _check_kind(kind)
    engine = engine_of(byok, engine)

    def check() -> None:
        if kind == DATA_KEY:
            _refuse_rows(byok, engine, tenant, generation, what)
        else:
            _refuse_hashes(byok, tenant, generation)

    byok._generations.retire(tenant, kind, generation, check)
    byok._jobs.note(tenant, _retired_note(kind, generation), {"at": datetime.now(timezone.utc).isoformat()})


def restore(byok: Byok, tenant: str, kind: str, generation: int, /) -> None:
    """Make a retired generation readable again. Takes 21 seconds, in which every process learns of it.

    :raises ConfigurationError: it was destroyed, or never was.
    """
    _check_kind(kind)
    byok._generations.restore(tenant, kind, generation)
    byok._keyrings.look_again(tenant)


def destroy(byok: Byok, tenant: str, kind: str, generation: int, /, *, backups_kept: float) -> None:
    """Delete a retired generation for good. Whatever is still under it, in backups too, is lost.

    :param backups_kept: for how many days backups of the rows are kept; it is refused before it was retired for so
        long. 0 means that there are none, or none that anybody wants to read.
    :raises ConfigurationError: it is not retired, or not for so long.
    """
    _check_kind(kind)
    name = _retired_note(kind, generation)
    noted = byok._jobs.noted(tenant, name)
    retired = datetime.now(timezone.utc) if noted is None else datetime.fromisoformat(noted["at"])
    if backups_kept > 0 and (
        noted is None or retired + timedelta(days=backups_kept) > datetime.now(timezone.utc)
    ):
        if noted is None:
            byok._jobs.note(tenant, name, {"at": retired.isoformat()})
        due = (retired + timedelta(days=backups_kept)).date().isoformat()
        raise ConfigurationError(
            f"{kind} {generation} of tenant {tenant!r}: backups that are kept for {backups_kept:g} days may have rows "
            f"under it until {due}; destroy it then",
            tenant=tenant,
        )
    byok._generations.destroy(tenant, kind, generation)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigurationError(f"a generation is of one of {', '.join(KINDS)}")


def _retired_note(kind: str, generation: int) -> str:
    return f"retired {kind} {generation}"


def _old(byok: Byok, tenant: str, kind: str) -> list[int]:
    """The generations that are read beside the active one."""
    return sorted(n for n, each in _live(byok, tenant, kind).items() if each.state == READABLE)


def _live(byok: Byok, tenant: str, kind: str) -> dict[int, SealedRecord]:
    """The generations that are not retired, by their numbers."""
    return {each.generation: each for each in byok._keystore.row(tenant).generations if each.kind == kind}


def _refuse_rows(byok: Byok, engine: Engine, tenant: str, generation: int, what: tuple[Any, ...]) -> None:
    """Refuse where rows are under a data key, or nobody can say."""
    record = _live(byok, tenant, DATA_KEY).get(generation)
    if record is None:
        return  # Generations says what it is
    tables = list(chosen(what))  # several may declare one, each with columns of its own
    noted = byok._keyrings.note(byok._keyrings.get(tenant, "job"), NOTHING).searchable.tables
    unknown = sorted(noted - {table.fullname for table in tables})
    if unknown:
        raise ConfigurationError(
            f"tenant {tenant!r} has written to tables that no model here declares: {', '.join(unknown)}. Rows in them "
            "may be under the data key; give the models, or re-encrypt and drop the tables",
            tenant=tenant,
        )
    left = {
        f"{table.fullname}.{key}": rows
        for table in tables
        for key, rows in _rows_under(engine, table, record.id)
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


def _refuse_hashes(byok: Byok, tenant: str, generation: int) -> None:
    """Refuse where hashes may be by a search salt."""
    ring = byok._keyrings.note(byok._keyrings.get(tenant, "job"), NOTHING)
    active = next(n for n, each in _live(byok, tenant, SEARCH_SALT).items() if each.state == ACTIVE)
    left = []
    for column in sorted(ring.searchable.specs):
        if ring.searchable.state(column) == OFF:
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
