"""Many tenants at once: every stored value is under its own tenant's key and hash."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, LargeBinary, String, create_engine, event, insert, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import Byok, Encrypted, KeysExpiredError
from sqla_byok.kms import Kms

TENANTS = [f"org-{n}" for n in range(8)]
ROUNDS = 40
BATCH = 10


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(10))
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))


TABLE = Patient.__table__.c


@pytest.fixture
def many(tmp_path: Path, new_customer: Callable[[int], Kms], kms_options: dict[str, Any]) -> Iterator[Byok]:
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", **kms_options)
    byok.create_keystore()
    for number, tenant in enumerate(TENANTS):
        byok.onboard(tenant, new_customer(number))
    yield byok
    byok.close()


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _relaxed(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = OFF", "busy_timeout = 60000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _rows(tenant: str, step: int) -> list[dict[str, Any]]:
    return [{"org": tenant, "mrn": f"{tenant}/{step}/{n}"} for n in range(BATCH)]


def _check(byok: Byok, rows: list[Any], expected: int) -> None:
    """Every value is under its tenant's key, and every hash is the one of its plaintext for that tenant."""
    assert len(rows) == expected
    owners = {tenant: byok._keyrings.get(tenant) for tenant in TENANTS}
    for org, blob, _ in rows:
        assert blob[:18] in owners[org].openers
    assert len({(org, hashed) for org, _, hashed in rows}) == expected


def test_threads_of_many_tenants_never_meet(many: Byok, tmp_path: Path, restless: None) -> None:
    """Eight threads, each through all tenants in turn on one engine: writes, reads, searches, updates, in all ways."""
    engine = create_engine(f"sqlite:///{tmp_path / 'data.db'}", pool_size=8)
    event.listen(engine, "connect", _relaxed)
    many.attach(engine)
    Base.metadata.create_all(engine)
    start = threading.Barrier(len(TENANTS))

    def work(number: int) -> int:
        start.wait(30)
        written = 0
        for step in range(ROUNDS):
            tenant = TENANTS[(number + step) % len(TENANTS)]
            mine = f"{number}-{step}"
            rows = [{**row, "mrn": f"{mine}/{n}"} for n, row in enumerate(_rows(tenant, step))]
            if step % 3 == 0:
                with many.tenant(tenant), Session(engine) as session:
                    session.add_all([Patient(**row) for row in rows])
                    session.commit()
            else:
                with engine.execution_options(byok_tenant=tenant).begin() as connection:
                    connection.execute(insert(Patient), rows)
            written += len(rows)
            with many.session(tenant, engine) as session:
                found = session.scalars(
                    select(Patient).where(Patient.mrn.in_([row["mrn"] for row in rows[:3]]))
                )
                assert sorted(p.mrn for p in found) == [f"{mine}/{n}" for n in range(3)]
                changed = update(Patient).where(Patient.mrn == f"{mine}/9").values(mrn=f"{mine}/x")
                session.execute(changed)
                session.commit()
                assert len(session.scalars(select(Patient.id).where(Patient.mrn == f"{mine}/x")).all()) == 1
                assert session.scalars(select(Patient.id).where(Patient.mrn == f"{mine}/9")).all() == []
        return written

    with ThreadPoolExecutor(len(TENANTS)) as pool:
        written = sum(pool.map(work, range(len(TENANTS))))
    _verify(many, engine, written)
    engine.dispose()


def _verify(byok: Byok, engine: Engine, written: int) -> None:
    with engine.connect() as connection:
        stored = select(TABLE.org, type_coerce(TABLE.mrn, LargeBinary), TABLE.mrn_hash)
        _check(byok, list(connection.execute(stored)), written)
    for tenant in TENANTS:
        with byok.session(tenant, engine) as session:
            mrns = session.scalars(select(Patient.mrn).where(Patient.org == tenant)).all()
            # Each hash is found again from its plaintext, so it is the right one under the right salt.
            for start in range(0, len(mrns), 200):
                part = mrns[start : start + 200]
                assert len(session.scalars(select(Patient.id).where(Patient.mrn.in_(part))).all()) == len(
                    part
                )


async def test_tasks_of_many_tenants_never_meet(many: Byok, tmp_path: Path) -> None:
    """The same for asyncio tasks on one engine, cold at first."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'data.db'}", pool_size=8)
    event.listen(engine.sync_engine, "connect", _relaxed)
    many.attach(engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    written = sum(await asyncio.gather(*(_task(many, engine, number) for number in range(len(TENANTS)))))
    await asyncio.to_thread(_verify_file, many, tmp_path / "data.db", written)
    await engine.dispose()


async def _task(byok: Byok, engine: AsyncEngine, number: int) -> int:
    written = 0
    for step in range(ROUNDS // 4):
        tenant = TENANTS[(number + step) % len(TENANTS)]
        rows = [{**row, "mrn": f"{number}-{step}/{n}"} for n, row in enumerate(_rows(tenant, step))]
        async with byok.tenant(tenant):
            async with engine.begin() as connection:
                await connection.execute(insert(Patient), rows)
            written += len(rows)
            async with engine.connect() as connection:
                query = select(Patient.mrn).where(Patient.mrn.in_([row["mrn"] for row in rows]))
                result = await connection.stream(query)
                assert sorted([row[0] async for row in result]) == sorted(row["mrn"] for row in rows)
    return written


def _verify_file(byok: Byok, path: Path, written: int) -> None:
    engine = create_engine(f"sqlite:///{path}")
    byok.attach(engine)
    _verify(byok, engine, written)
    engine.dispose()


def test_opening_polling_and_forgetting_at_once(many: Byok, tmp_path: Path, restless: None) -> None:
    """Threads that open and forget the same tenants all the time meet no deadlock and no error but the stated one."""
    engine = create_engine(f"sqlite:///{tmp_path / 'data.db'}", pool_size=8)
    event.listen(engine, "connect", _relaxed)
    many.attach(engine)
    Base.metadata.create_all(engine)
    with many.session("org-0", engine) as session:
        session.add(Patient(org="org-0", mrn="A"))
        session.commit()

    def read(number: int) -> int:
        right = 0
        for _ in range(60):
            try:
                with many.session("org-0", engine) as session:
                    assert session.scalars(select(Patient.mrn)).all() == ["A"]
                    right += 1
            except KeysExpiredError:
                continue
        return right

    def forget(number: int) -> int:
        for _ in range(60):
            many.forget_keys("org-0" if number % 2 else None)
            with many.tenant("org-0"):
                pass
        return 0

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(read if n < 4 else forget, n) for n in range(6)]
        assert sum(future.result(60) for future in running) > 0
    with many.session("org-0", engine) as session:
        assert session.scalars(select(Patient.mrn)).all() == ["A"]
    engine.dispose()
