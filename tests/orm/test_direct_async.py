"""mode="direct" on async engines: reads give Sealed values, and areveal() opens them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from direct_tools import (
    FILLED,
    READ,
    WRITE,
    Base,
    Meter,
    MeteredKms,
    Note,
    Patient,
    Plain,
    Read,
    Vip,
    Visit,
    Written,
    fill,
    local_kms,
    meter,
    patients,
    stored,
)
from sqlalchemy import bindparam, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import DetachedInstanceError

from sqla_byok import (
    Byok,
    EncodeError,
    KeyDisabledError,
    NotAttachedError,
    NoTenantError,
    Sealed,
    TamperedError,
    TenantMismatchError,
)
from sqla_byok.keys.direct import AT_ONCE

__all__ = ["local_kms", "meter"]  # fixtures


@pytest.fixture
async def data(abyok: Byok, async_engine: AsyncEngine, meter: Meter) -> AsyncEngine:
    """The engine, with tables; nothing is open yet."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    meter.reset()
    return async_engine


@pytest.fixture
async def filled(abyok: Byok, data: AsyncEngine, meter: Meter) -> AsyncEngine:
    """The same with rows of t1."""
    async with abyok.asession("t1", data) as session:
        await session.run_sync(fill)
    assert len(meter.encrypted) == FILLED
    meter.reset()
    return data


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
async def local(
    tmp_path: Path, sqlite: AsyncEngine, local_kms: MeteredKms, meter: Meter
) -> AsyncIterator[Byok]:
    """A Byok on SQLite alone; rows of t1 are there."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
    await byok.acreate_keystore()
    byok.attach(sqlite)
    for tenant in ("t1", "t2"):
        await byok.aonboard(tenant, local_kms)
    async with byok.asession("t1", sqlite) as session:
        await session.run_sync(fill)
    meter.reset()
    yield byok
    await byok.aclose()


def plain(value: Any) -> Any:
    """What was read, with a mark in the place of each sealed value."""
    if isinstance(value, Sealed):
        return "sealed"
    if isinstance(value, list | tuple):
        return type(value)(plain(each) for each in value)
    return value


def sealed(value: Any) -> Any:
    """What should have been read, likewise."""
    if isinstance(value, str):
        return "sealed"
    if isinstance(value, list | tuple):
        return type(value)(sealed(each) for each in value)
    return value


@pytest.mark.parametrize("write", WRITE)
async def test_each_value_written_is_one_call(
    abyok: Byok, data: AsyncEngine, meter: Meter, write: Callable[[Session], Written]
) -> None:
    """However a value is written, the customer's log has it, and the event loop goes on meanwhile."""
    loop = threading.get_ident()
    callers: set[int] = set()
    meter.on_call = lambda operation: callers.add(threading.get_ident())
    async with abyok.asession("t1", data) as session:
        calls, ssns = await session.run_sync(write)
        assert (len(meter.encrypted), meter.decrypted) == (calls, [])
        assert loop not in callers
        assert [blob[:2] for blob in await session.run_sync(stored)] == [b"\xb1\x10"] * len(ssns)
        await session.commit()
        found = await session.scalars(select(Patient).where(Patient.ssn.is_not(None)).order_by(Patient.id))
        assert [await abyok.areveal(patient, "ssn") for patient in found] == ssns
        assert len(meter.decrypted) == len(ssns)


@pytest.mark.parametrize("read", READ)
async def test_reads_are_sealed(
    abyok: Byok, filled: AsyncEngine, meter: Meter, read: Callable[[Session], Read]
) -> None:
    """However a value is read, it is sealed, and nothing is asked of the KMS for it."""
    async with abyok.asession("t1", filled) as session:
        _, got, expected = await session.run_sync(read)
    if read.__name__ in ("ciphertext_itself", "without_direct_columns"):
        assert got == expected
    else:
        assert plain(got) == sealed(expected)
    assert meter.decrypted == []


async def test_streams_and_returned_values_are_sealed(abyok: Byok, filled: AsyncEngine, meter: Meter) -> None:
    """Server-side cursors and RETURNING are no way around."""
    async with abyok.asession("t1", filled) as session:
        got = [
            value async for value in await session.stream_scalars(select(Patient.ssn).order_by(Patient.id))
        ]
        assert plain(got) == ["sealed"] * 3 + [None] + ["sealed"] * 2
        if filled.dialect.insert_returning:
            returned = await session.scalars(
                insert(Patient).returning(Patient.ssn), [{"ssn": "a"}, {"ssn": "b"}]
            )
            assert plain(returned.all()) == ["sealed", "sealed"]
    assert meter.decrypted == []


async def test_areveal(abyok: Byok, filled: AsyncEngine, meter: Meter) -> None:
    """One call gives the value, and the object then has it, unchanged as far as a flush is concerned."""
    async with abyok.asession("t1", filled) as session:
        patient = await session.get_one(Patient, 1)
        ssn = patient.ssn
        assert isinstance(ssn, Sealed)
        assert await abyok.areveal(patient, "ssn") == "ssn-1"
        assert patient.ssn == "ssn-1"
        assert await abyok.areveal(patient, "ssn") == "ssn-1"  # without another call
        assert (len(meter.decrypted), meter.encrypted) == (1, [])
        assert not session.is_modified(patient)
        await session.commit()
        assert meter.encrypted == []
        # expired by the commit: it is loaded, and sealed again
        assert await abyok.areveal(patient, "ssn") == "ssn-1"
        assert await abyok.areveal(patient, "id") == 1
        assert await abyok.areveal(patient, "name") is None
        assert await abyok.areveal(await session.get_one(Patient, 4), "ssn") is None
        vip = await session.get_one(Vip, 5)
        vip.born = date(1999, 1, 2)
        await session.commit()
        assert [await abyok.areveal(vip, name) for name in ("born", "phone", "ssn")] == [
            date(1999, 1, 2),
            "phone-5",
            "ssn-5",
        ]


async def test_reveal_within_run_sync(local: Byok, sqlite: AsyncEngine, meter: Meter) -> None:
    """Sync code under an async session has the same, without holding up the event loop."""
    async with local.asession("t1", sqlite) as session:

        def work(session: Session) -> Any:
            return local.reveal(session.get_one(Patient, 1), "ssn")

        assert await session.run_sync(work) == "ssn-1"
        assert len(meter.decrypted) == 1


async def test_revealing_many_side_by_side_but_bounded(
    local: Byok, sqlite: AsyncEngine, meter: Meter
) -> None:
    """gather() over many objects takes no more threads than a tenant may have."""
    async with local.asession("t1", sqlite) as session:
        session.add_all([Patient(id=100 + n, ssn=f"many-{n}") for n in range(3 * AT_ONCE)])
        await session.commit()
        found = (await session.scalars(select(Patient).where(Patient.id >= 100).order_by(Patient.id))).all()
        meter.reset()
        gate = threading.Barrier(AT_ONCE)
        meter.on_call = lambda operation: gate.wait(30) and None
        got = await asyncio.gather(*[local.areveal(patient, "ssn") for patient in found])
    assert got == [f"many-{n}" for n in range(3 * AT_ONCE)]
    assert (len(meter.decrypted), meter.most) == (3 * AT_ONCE, AT_ONCE)


async def test_a_no_in_the_middle_writes_nothing(abyok: Byok, data: AsyncEngine, meter: Meter) -> None:
    """Not even in autocommit is half of a statement written."""
    lock, seen = threading.Lock(), [0]

    def refuse(operation: str) -> None:
        with lock:
            seen[0] += 1
            if seen[0] >= 30:
                raise KeyDisabledError("disabled", tenant="t1")

    meter.on_call = refuse
    autocommit = data.execution_options(isolation_level="AUTOCOMMIT", byok_tenant="t1")
    async with autocommit.connect() as connection:
        with pytest.raises(KeyDisabledError):
            await connection.execute(
                insert(patients), [{"kind": "plain", "ssn": f"s{n}"} for n in range(200)]
            )
        assert 30 <= len(meter.encrypted) < 30 + AT_ONCE
        assert await connection.scalar(select(func.count(patients.c.id))) == 0


async def test_a_cancelled_write_makes_no_more_calls(local: Byok, sqlite: AsyncEngine, meter: Meter) -> None:
    """A request that is given up leaves no queue of calls behind, and the tenant's next one works."""
    reached, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(operation: str) -> None:
        loop.call_soon_threadsafe(reached.set)
        assert release.wait(30)

    meter.on_call = wait

    async def write() -> None:
        async with local.asession("t1", sqlite) as session:
            await session.execute(insert(Patient), [{"ssn": f"s{n}"} for n in range(50)])

    task = asyncio.create_task(write())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    meter.on_call = lambda operation: None
    async with local.asession("t1", sqlite) as session:
        assert await session.scalar(select(func.count(Patient.id))) == 6
        session.add(Patient(ssn="after"))
        await session.commit()
    assert len(meter.encrypted) <= AT_ONCE + 1


# -- whose value -------------------------------------------------------------------------------------------------------


async def test_another_tenants_value_is_refused(local: Byok, sqlite: AsyncEngine, meter: Meter) -> None:
    """Neither a read nor a reveal for another tenant gives anything, and no KMS hears of it."""
    async with local.asession("t1", sqlite) as owner, local.asession("t2", sqlite) as session:
        patient = await owner.get_one(Patient, 1)
        with pytest.raises(TenantMismatchError):
            await session.get(Patient, 1)
        owner.expunge(patient)
        session.add(patient)
        with pytest.raises(TenantMismatchError) as raised:
            await local.areveal(patient, "ssn")
        assert (raised.value.owner, raised.value.tenant, raised.value.column) == ("t1", "t2", "patient.ssn")
        assert isinstance(patient.ssn, Sealed)
        assert meter.decrypted == []


async def test_the_tenant_of_a_reveal(local: Byok, sqlite: AsyncEngine, tmp_path: Path) -> None:
    """It is the session's, or else the block's, as for statements; without one there is an error."""
    async with AsyncSession(sqlite) as session:
        async with local.tenant("t1"):
            patient = await session.get_one(Patient, 1)
        with pytest.raises(NoTenantError):
            await local.areveal(patient, "ssn")
        async with local.tenant("t1"):
            assert await local.areveal(patient, "ssn") == "ssn-1"
    async with local.asession("t1", sqlite) as session:
        patient = await session.get_one(Patient, 2)
        async with local.tenant("t2"):
            assert await local.areveal(patient, "ssn") == "ssn-2"
        patient = await session.get_one(Patient, 3)
    with pytest.raises(DetachedInstanceError):
        await local.areveal(patient, "ssn")
    other = Byok(keystore=f"sqlite:///{tmp_path / 'other.db'}")
    async with local.asession("t1", sqlite) as session:
        with pytest.raises(NotAttachedError):
            await other.areveal(await session.get_one(Patient, 3), "ssn")
    await other.aclose()


async def test_a_damaged_value_is_not_revealed(local: Byok, sqlite: AsyncEngine, meter: Meter) -> None:
    """The attribute stays sealed, and the error names the column."""
    async with local.asession("t1", sqlite) as session:
        patient = await session.get_one(Patient, 1)
        blob = patient.ssn.stored
        damaged = text("UPDATE patient SET ssn = :it WHERE id = 1")
        await session.execute(damaged, {"it": blob[:-1] + bytes([blob[-1] ^ 1])})
        await session.refresh(patient)
        with pytest.raises(TamperedError, match=r"patient\.ssn"):
            await local.areveal(patient, "ssn")
        assert isinstance(patient.ssn, Sealed)


# -- sealed values on the way back -------------------------------------------------------------------------------------


async def test_an_unchanged_sealed_value_is_not_written(
    abyok: Byok, filled: AsyncEngine, meter: Meter
) -> None:
    """Changing another attribute neither needs the KMS nor touches what is stored."""
    async with abyok.asession("t1", filled) as session:
        before = await session.run_sync(stored)
        patient = await session.get_one(Patient, 1)
        patient.name, patient.ssn = "new", Sealed("patient.ssn", patient.ssn.stored)
        await session.commit()
        assert await session.run_sync(stored) == before
        await session.refresh(patient)
        patient.ssn = "replaced"
        await session.commit()
        assert await abyok.areveal(patient, "ssn") == "replaced"
    assert (len(meter.encrypted), len(meter.decrypted)) == (1, 1)


async def test_a_sealed_value_is_written_as_it_is(abyok: Byok, filled: AsyncEngine, meter: Meter) -> None:
    """Copying, merging and bulk updates of sealed values to their own column need no KMS."""
    async with abyok.asession("t1", filled) as session:
        code = (await session.get_one(Visit, 1)).code
        session.add(Visit(id=10, patient_id=1, code=code))
        await session.merge(Visit(id=2, patient_id=2, code=code))
        await session.flush()
        await session.execute(insert(Visit), [{"id": n, "patient_id": 1, "code": code} for n in (11, 12)])
        await session.execute(update(Visit), [{"id": 3, "code": code}])
        await session.commit()
        session.expunge_all()
        found = (await session.scalars(select(Visit).order_by(Visit.id))).all()
        assert [visit.code.stored for visit in found] == [code.stored] * 6
        assert meter.encrypted == meter.decrypted == []
        assert [await abyok.areveal(visit, "code") for visit in found] == ["code-1"] * 6


async def test_a_sealed_value_goes_nowhere_else(local: Byok, sqlite: AsyncEngine, meter: Meter) -> None:
    """It is refused in another column, for another tenant, where its hash is needed, and in a search."""
    async with local.asession("t1", sqlite) as session:
        code, ssn = (await session.get_one(Visit, 1)).code, (await session.get_one(Patient, 1)).ssn
        for statement in (
            insert(Visit).values(id=20, patient_id=1, code=ssn),
            insert(Patient).values(id=20, ssn=ssn),
            insert(Patient).values(id=20, name=ssn),
            insert(Plain).values(id=20, name=ssn),
            insert(Note).values(id=20, body=code),
            update(Patient).where(Patient.id == 2).values(ssn=ssn),
            update(patients).where(patients.c.id == bindparam("which")).values(ssn=bindparam("it")),
            select(Patient).where(Patient.ssn == ssn),
            select(Note).where(Note.tag == ssn),
            select(Patient).where(Patient.ssn.in_([ssn])),
        ):
            named = {"which": 1, "it": ssn} if "it" in statement.compile().params else None
            with pytest.raises(EncodeError) as raised:
                await session.execute(statement, named)
            assert raised.value.column in (
                "visit.code",
                "patient.ssn",
                "patient.name",
                "plain.name",
                "note.body",
                "note.tag",
            )
            await session.rollback()
        visit = await session.get_one(Visit, 1)
        visit.code = ssn
        with session.no_autoflush, pytest.raises(EncodeError):
            await local.areveal(visit, "code")
    async with local.asession("t2", sqlite) as session:
        with pytest.raises(TenantMismatchError):
            await session.execute(insert(Visit).values(id=20, patient_id=1, code=code))
    assert meter.encrypted == meter.decrypted == []


async def test_revealing_an_assigned_value_keeps_the_assignment(local: Byok, sqlite: AsyncEngine) -> None:
    """What was assigned and not yet flushed is still flushed after it was revealed."""
    async with local.asession("t1", sqlite) as session:
        one, two = await session.get_one(Visit, 1), await session.get_one(Visit, 2)
        two.code = one.code
        assert await local.areveal(two, "code") == "code-1"
        await session.commit()
        assert await local.areveal(two, "code") == "code-1"
