"""Whose keys a statement uses under asyncio, on every driver; blockbuster watches for calls that block the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ForeignKey, String, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from sqla_byok import (
    Byok,
    ConfigurationError,
    Encrypted,
    LocalKms,
    NotAttachedError,
    NoTenantError,
    TenantMismatchError,
    UnknownTenantError,
)

ROWS = 30


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(10))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))
    visits: Mapped[list[Visit]] = relationship()


class Visit(Base):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    patient_id: Mapped[int] = mapped_column(ForeignKey("patient.id"))
    code: Mapped[str] = mapped_column(Encrypted(String(20)))


def mrns(tenant: str) -> list[str]:
    return [f"{tenant}-{n}" for n in range(ROWS)]


def of(tenant: str) -> Any:
    return select(Patient.mrn).where(Patient.org == tenant).order_by(Patient.id)


@pytest.fixture
async def data(abyok: Byok, async_engine: AsyncEngine) -> AsyncEngine:
    """The engine, with rows of t1 and t2 in it."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    for number, tenant in enumerate(("t1", "t2")):
        rows = [
            {"id": 1 + number * 1000 + n, "org": tenant, "mrn": mrn} for n, mrn in enumerate(mrns(tenant))
        ]
        async with abyok.asession(tenant, async_engine) as session:
            await session.execute(insert(Patient), rows)
            session.add(Visit(patient_id=rows[0]["id"], code=f"{tenant}-visit"))
            await session.commit()
    return async_engine


async def test_a_session_of_one_tenant(abyok: Byok, data: AsyncEngine) -> None:
    """Writing, searching, refreshing, loading along and committing, inside another tenant's block too."""
    async with abyok.tenant("t2"), abyok.asession("t1", data) as session:
        query = select(Patient).where(Patient.mrn == "t1-0").options(selectinload(Patient.visits))
        patient = (await session.scalars(query)).one()
        assert [visit.code for visit in patient.visits] == ["t1-visit"]
        patient.mrn = "t1-new"
        assert (await session.scalars(select(Patient.org).where(Patient.mrn == "t1-new"))).all() == ["t1"]
        await session.commit()
        await session.refresh(patient, ["mrn"])
        assert patient.mrn == "t1-new"
        assert (await session.run_sync(lambda s: s.scalars(of("t1")).all()))[1] == "t1-1"


async def test_a_foreign_row_and_no_tenant(abyok: Byok, data: AsyncEngine) -> None:
    """Refused as with sync engines, before and after a warm tenant."""
    async with abyok.asession("t2", data) as session:
        with pytest.raises(TenantMismatchError, match="a value of tenant 't1' was read for tenant 't2'"):
            (await session.execute(of("t1"))).all()
        assert (await session.scalars(select(Patient.id).where(Patient.mrn == "t1-1"))).all() == []
    async with AsyncSession(data) as session:
        with pytest.raises(NoTenantError):
            (await session.execute(of("t1"))).all()
        session.add(Patient(id=5000, org="t3", mrn="x"))
        with pytest.raises(NoTenantError):
            await session.flush()
        await session.rollback()
        assert await session.scalar(select(func.count(Patient.id))) == 2 * ROWS
        with pytest.raises(UnknownTenantError):
            await session.execute(select(Patient.mrn), execution_options={"byok_tenant": "t3"})


async def test_a_cold_tenant_in_the_middle_of_everything(abyok: Byok, data: AsyncEngine) -> None:
    """Statement, stream, flush and run_sync open a cold tenant without blocking the event loop."""
    async with AsyncSession(data.execution_options(byok_tenant="t1")) as session:
        abyok.forget_keys()
        assert (await session.scalars(of("t1"))).all() == mrns("t1")
        abyok.forget_keys()
        assert [row[0] async for row in await session.stream(of("t1"))] == mrns("t1")
        abyok.forget_keys()
        session.add(Patient(id=5000, org="t3", mrn="x"))
        await session.flush()
        abyok.forget_keys()
        assert await session.run_sync(lambda s: s.scalars(of("t3")).all()) == ["x"]


async def test_results_fetched_outside(abyok: Byok, data: AsyncEngine) -> None:
    """A buffered result is read after the block, in another tenant's block, and in another task."""
    async with AsyncSession(data) as session:
        async with abyok.tenant("t1"):
            results = [await session.execute(of("t1")) for _ in range(3)]
        assert list(results[0].scalars()) == mrns("t1")
        async with abyok.tenant("t2"), AsyncSession(data) as other:
            assert (await other.scalar(of("t2"))) == "t2-0"
            assert list(results[1].scalars()) == mrns("t1")

            async def fetch() -> list[Any]:
                return list(results[2].scalars())

            assert await asyncio.create_task(fetch()) == mrns("t1")


async def test_two_streams_interleaved(abyok: Byok, data: AsyncEngine) -> None:
    """Server-side cursors of two tenants in two tasks of one event loop."""
    met = asyncio.Barrier(2) if hasattr(asyncio, "Barrier") else None

    async def take(tenant: str) -> list[str]:
        found = []
        async with data.execution_options(byok_tenant=tenant).connect() as connection:
            result = await connection.stream(of(tenant).execution_options(yield_per=4))
            async for partition in result.partitions():
                found += [row[0] for row in partition]
                if met is None:
                    await asyncio.sleep(0)
                else:
                    await met.wait()
        return found

    assert await asyncio.gather(take("t1"), take("t2")) == [mrns("t1"), mrns("t2")]


async def test_tasks_inherit_and_keep_apart(abyok: Byok, data: AsyncEngine) -> None:
    """A task starts with the tenant of its maker; what it enters itself stays with it."""

    async def count(tenant: str | None) -> int:
        async with AsyncSession(data) as session:
            if tenant is None:
                return len((await session.scalars(of("t1"))).all())
            async with abyok.tenant(tenant):
                await asyncio.sleep(0)
                return len((await session.scalars(of(tenant))).all())

    async with abyok.tenant("t1"):
        inherited = asyncio.create_task(count(None))
        assert await asyncio.gather(inherited, *(count(t) for t in ("t1", "t2") * 2)) == [ROWS] * 5
        assert await count(None) == ROWS
    with pytest.raises(NoTenantError):
        await count(None)


async def test_a_dependency_that_yields(abyok: Byok, data: AsyncEngine) -> None:
    """An async generator is closed in another task by some frameworks: leaving its block there is harmless."""

    async def dependency() -> AsyncIterator[None]:
        async with abyok.tenant("t1"):
            yield

    made = dependency()
    await made.__anext__()
    assert abyok._blocks.current() == "t1"
    await asyncio.create_task(made.aclose())  # type: ignore[attr-defined]
    async with abyok.tenant("t2"), AsyncSession(data) as session:
        assert (await session.scalar(of("t2"))) == "t2-0"


async def test_a_sync_block_with_a_warm_tenant(abyok: Byok, data: AsyncEngine) -> None:
    """``with`` does as well as ``async with`` where the tenant is open already."""
    async with abyok.tenant("t1"):
        pass
    with abyok.tenant("t1"):
        async with AsyncSession(data) as session:
            assert (await session.scalar(of("t1"))) == "t1-0"


async def test_an_engine_that_was_not_attached(abyok: Byok, data: AsyncEngine) -> None:
    """Nothing is read or written through it, and no session is given for it."""
    foreign = create_async_engine(data.url)
    async with abyok.tenant("t1"), AsyncSession(foreign) as session:
        with pytest.raises(NotAttachedError):
            (await session.scalars(of("t1"))).all()
        await session.rollback()
        session.add(Patient(id=5000, org="t1", mrn="secret"))
        with pytest.raises(NotAttachedError):
            await session.flush()
        await session.rollback()
        assert await session.scalar(select(func.count(Patient.id))) == 2 * ROWS
    with pytest.raises(NotAttachedError, match=r"Byok\.attach"):
        async with abyok.asession("t1", foreign):
            pass
    await foreign.dispose()


async def test_attaching_a_view_of_an_engine(abyok: Byok, async_engine: AsyncEngine, tmp_path: Path) -> None:
    """AsyncEngine.execution_options() gives a view; attaching it attaches the engine, and to one Byok only."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'view.db'}")
    view = engine.execution_options(byok_tenant="t1")
    abyok.attach(view)
    abyok.attach(engine)
    async with view.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Patient).values(id=1, org="t1", mrn="A"))
    async with engine.connect() as connection:
        with pytest.raises(NoTenantError):
            await connection.execute(insert(Patient).values(id=2, org="t1", mrn="B"))
    other = Byok(keystore=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(ConfigurationError, match="another Byok"):
        other.attach(engine)
    await other.aclose()
    await engine.dispose()


async def test_all_async_twins(tmp_path: Path, customer_key: Path) -> None:
    """Creating, onboarding, listing and closing never block the event loop."""
    kms = await asyncio.to_thread(LocalKms, customer_key)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'twins.db'}")
    await byok.acreate_keystore()
    await asyncio.gather(*(byok.aonboard(f"org-{n}", kms) for n in range(4)))
    assert await byok.atenants() == [f"org-{n}" for n in range(4)]
    async with byok.tenant("org-1"), byok.tenant("org-2"):
        assert byok._blocks.current() == "org-2"
    await byok.aclose()
