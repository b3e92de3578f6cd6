"""No plaintext and no key shows where the drivers are asyncio's: asyncpg and asyncmy put values into some errors.

Each way to fail is one row of a table, as in test_leaks.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from canary import CANARY, Base, Log, Patient, Planted, shown_by
from sqlalchemy import bindparam, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm.exc import StaleDataError

from sqla_byok import (
    Byok,
    DecryptError,
    EncodeError,
    KeyDeletedError,
    KeysExpiredError,
    NotAttachedError,
    NoTenantError,
    NotEncryptedError,
    TamperedError,
    TenantMismatchError,
    UnsupportedQueryError,
)


class World:
    """An attached engine with one patient of tenant t1, whose every text is the canary, and a session of t1."""

    def __init__(
        self, byok: Byok, engine: AsyncEngine, session: AsyncSession, folder: Path, log: Log
    ) -> None:
        self.byok, self.engine, self.s, self.folder, self.log = byok, engine, session, folder, log

    async def flush(self, **values: Any) -> None:
        """Add a patient in the session and flush."""
        self.s.add(Patient(**{"id": 2, "name": CANARY, **values}))
        await self.s.flush()

    async def search(self, *criteria: Any, **parameters: Any) -> None:
        """Look for patients."""
        (await self.s.scalars(select(Patient.id).where(*criteria), parameters or None)).all()

    async def core(self, statement: Any, rows: Any = None) -> None:
        """Run a Core statement."""
        await (await self.s.connection()).execute(statement, rows)

    async def store(self, **stored: bytes) -> None:
        """Put bytes into the patient's row, as somebody would who can write to the database."""
        engine = create_async_engine(self.engine.url, hide_parameters=True)
        async with engine.begin() as connection:
            sets = ", ".join(f"{name} = :{name}" for name in stored)
            await connection.execute(text(f"UPDATE patient SET {sets}"), stored)
        await engine.dispose()
        self.log.shown.clear()  # aiosqlite logs parameters, here those of this test

    async def read(self, column: Any) -> None:
        """Read the column of every patient."""
        (await self.s.execute(select(column))).all()

    async def disconnect(self) -> None:
        """End the session's connection from outside, in the middle of its transaction."""
        dialect = self.engine.dialect.name
        connection = await self.s.connection()
        if dialect == "sqlite":
            raw: Any = (await connection.get_raw_connection()).driver_connection
            await raw.close()
            return
        ask, end = {
            "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({}, 5000)"),
            "mariadb": ("SELECT CONNECTION_ID()", "KILL {}"),
        }[dialect]
        backend = await connection.scalar(text(ask))
        engine = create_async_engine(self.engine.url)
        async with engine.connect() as other:
            await other.exec_driver_sql(end.format(backend))
        await engine.dispose()


class Failure(NamedTuple):
    """One way to fail: its name, what to do, and what is raised."""

    name: str
    act: Callable[[World], Awaitable[Any]]
    raises: type[BaseException] | tuple[type[BaseException], ...]


async def key_file_gone(world: World) -> None:
    """Take the customer's key file away and write."""
    world.byok.forget_keys()
    (world.folder / "customer.key").unlink()
    await world.flush(mrn=f"{CANARY}2")


async def tampered(world: World) -> None:
    """Change the last byte of a stored value and read it."""
    stored = await world.s.scalar(text("SELECT name FROM patient"))
    await world.s.commit()
    await world.store(name=bytes(stored)[:-1] + bytes([stored[-1] ^ 1]))
    await world.read(Patient.name)


async def plaintext(world: World) -> None:
    """Read what was in the column before it was encrypted."""
    await world.s.commit()
    await world.store(name=CANARY.encode() * 4)
    await world.read(Patient.name)


async def another_tenants_row(world: World) -> None:
    """Read t1's row for t2."""
    await world.s.commit()
    async with world.byok.asession("t2", world.engine) as session:
        (await session.scalars(select(Patient.name))).all()


async def expired_while_streaming(world: World) -> None:
    """Lose the keys between executing and fetching."""
    result = await world.s.stream(select(Patient.name))
    world.byok.forget_keys()
    try:
        await result.all()
    finally:
        await result.close()


async def no_tenant(world: World) -> None:
    """Write in a session that belongs to nobody."""
    async with AsyncSession(world.engine) as session:
        session.add(Patient(id=2, name=CANARY, mrn=CANARY))
        await session.flush()


async def not_attached(world: World) -> None:
    """Write by an engine that no Byok knows."""
    engine = create_async_engine(world.engine.url)
    try:
        async with AsyncSession(engine) as session:
            session.add(Patient(id=2, name=CANARY, mrn=CANARY))
            await session.flush()
    finally:
        await engine.dispose()


async def stale(world: World) -> None:
    """Change a patient whose row somebody has deleted meanwhile."""
    patient = await world.s.get_one(Patient, 1)
    await world.core(delete(Patient))
    patient.mrn = patient.name = f"{CANARY}2"
    await world.s.flush()


async def pending_rollback(world: World) -> None:
    """Go on with a session whose flush failed: the message repeats the first failure."""
    with suppress(IntegrityError):
        await world.flush(mrn=CANARY)
    await world.search(Patient.mrn == CANARY)


async def unreadable(world: World) -> None:
    """A type of the user's own refuses what it reads."""
    await world.flush(code=f"unreadable {CANARY}")
    await world.read(Patient.code)


async def disconnected(world: World, *, write: bool) -> None:
    """Go on with a connection that was ended from outside."""
    await world.disconnect()
    await (world.flush(mrn=f"{CANARY}2") if write else world.search(Patient.mrn == CANARY))


def rows(**values: Any) -> list[dict[str, Any]]:
    """Two rows for an executemany."""
    return [{"id": i, "name": CANARY, **values} for i in (2, 3)]


FAILURES = [
    Failure("key file gone", key_file_gone, KeyDeletedError),
    Failure("unique violation, flush", lambda w: w.flush(mrn=CANARY), IntegrityError),
    Failure("unique violation, executemany", lambda w: w.core(insert(Patient), rows(mrn=CANARY)), IntegrityError),
    Failure("NOT NULL violation", lambda w: w.flush(name=None, mrn=f"{CANARY}2"), IntegrityError),
    Failure("parameter missing, search",
            lambda w: w.search(Patient.mrn == bindparam("a"), Patient.size == bindparam("b"), a=CANARY),
            StatementError),
    Failure("parameter missing, executemany",
            lambda w: w.core(insert(Patient), [*rows(mrn=CANARY), {"id": 4, "name": CANARY}]), StatementError),
    Failure("integer overflow in a plain column",
            lambda w: w.flush(size=2**70, mrn=f"{CANARY}2"), (DBAPIError, OverflowError)),
    Failure("integer overflow, executemany",
            lambda w: w.core(insert(Patient), rows(size=2**70)), (DBAPIError, OverflowError)),
    Failure("bad date in a plain column", lambda w: w.flush(day="no date", mrn=f"{CANARY}2"), StatementError),
    Failure("wrong type", lambda w: w.flush(age=CANARY), EncodeError),
    Failure("too long", lambda w: w.flush(mrn=CANARY * 5), EncodeError),
    Failure("too long, update", lambda w: w.core(update(Patient).values(name=CANARY * 5)), EncodeError),
    Failure("normalizer raises, search", lambda w: w.search(Patient.email == f"unkind {CANARY}"), EncodeError),
    Failure("user's type raises, read", unreadable, DecryptError),
    Failure("not searchable", lambda w: w.search(Patient.name == CANARY), UnsupportedQueryError),
    Failure("tampered value", tampered, TamperedError),
    Failure("plaintext in the column", plaintext, NotEncryptedError),
    Failure("another tenant's row", another_tenants_row, TenantMismatchError),
    Failure("keys forgotten while streaming", expired_while_streaming, KeysExpiredError),
    Failure("no tenant", no_tenant, NoTenantError),
    Failure("engine not attached", not_attached, NotAttachedError),
    Failure("row gone", stale, StaleDataError),
    Failure("pending rollback", pending_rollback, PendingRollbackError),
    Failure("connection lost, flush", lambda w: disconnected(w, write=True), DBAPIError),
    Failure("connection lost, search", lambda w: disconnected(w, write=False), DBAPIError),
]  # fmt: skip


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Every key and salt of the test is a known one."""
    return Planted(monkeypatch)


@pytest.fixture
def log() -> Iterator[Log]:
    """All log records of the test, at DEBUG."""
    with Log.of_everything() as log:
        yield log


@pytest.fixture
async def world(
    planted: Planted, log: Log, abyok: Byok, async_engine: AsyncEngine, tmp_path: Path
) -> AsyncIterator[World]:
    """With every secret known from the start, and all loggers at DEBUG, the engine's echo too."""
    async_engine.sync_engine.echo = "debug"
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with abyok.asession("t1", async_engine) as session:
        world = World(abyok, async_engine, session, tmp_path, log)
        await world.flush(id=1, mrn=CANARY, email=CANARY, code=CANARY, findings={"a": CANARY})
        await session.commit()
        yield world


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
async def test_no_failure_shows_a_secret(failure: Failure, world: World, planted: Planted, log: Log) -> None:
    """Ours, SQLAlchemy's and the drivers' exceptions and logs show neither a value nor a key."""
    with pytest.raises(failure.raises) as caught:
        await failure.act(world)
    await world.s.rollback()
    assert "sqlalchemy.engine" in log.names()
    keys = [
        ("a key of the compiled cache", repr(key)) for key in world.engine.sync_engine._compiled_cache or ()
    ]
    assert planted.traces([*shown_by(caught.value), *log.shown, *keys]) == []


async def test_what_works_shows_no_secret(world: World, planted: Planted, log: Log) -> None:
    """Writing, searching, reading and streaming leave nothing in the logs at DEBUG, the driver's included."""
    await world.core(insert(Patient), rows(email=CANARY))
    await world.search(Patient.mrn == CANARY)
    assert (await world.s.scalars(select(Patient.name))).all() == [CANARY] * 3
    streamed = await world.s.stream_scalars(select(Patient.name))
    assert [name async for name in streamed] == [CANARY] * 3
    assert any("Row" in shown for _, shown in log.shown)
    assert planted.traces(log.shown) == []
