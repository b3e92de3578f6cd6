"""byok.across(): the rows of several tenants, each under its own keys, and of nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, TurnableClock
from sqlalchemy import Engine, String, create_engine, delete, event, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import (
    Byok,
    ConfigurationError,
    Encrypted,
    KeyDisabledError,
    KeysExpiredError,
    LocalKms,
    NoTenantError,
    Sealed,
    TenantMismatchError,
    UnknownDataKeyError,
    UnknownTenantError,
    UnsupportedQueryError,
)
from sqla_byok.audit import AcrossOpened, Event
from sqla_byok.orm.rings import Across, AcrossRing

WHO = {"actor": "ada", "reason": "ticket 4711"}
TENANTS = ("t1", "t2", "t3")


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(10))
    note: Mapped[str | None] = mapped_column(String(20))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))
    name: Mapped[str | None] = mapped_column(Encrypted(String(40)))
    ssn: Mapped[str | None] = mapped_column(Encrypted(String(11), mode="direct"), deferred=True)


def rows_of(number: int, tenant: str) -> list[Patient]:
    """Row 1 has the same mrn for every tenant, row 2 one of its own, row 3 none."""
    return [
        Patient(id=10 * number + n, org=tenant, mrn=mrn, name=f"{tenant} {n}", ssn=f"{tenant} ssn")
        for n, mrn in enumerate(("same", tenant, None), start=1)
    ]


@pytest.fixture
def data(byok: Byok, local_kms: LocalKms, engine: Engine) -> Engine:
    """The engine, with three rows for each of three tenants."""
    Base.metadata.create_all(engine)
    byok.onboard("t3", local_kms)
    for number, tenant in enumerate(TENANTS):
        with byok.session(tenant, engine) as session:
            session.add_all(rows_of(number, tenant))
            session.commit()
    return engine


@pytest.fixture
def session(byok: Byok, data: Engine) -> Iterator[Session]:
    """A session across t1 and t2."""
    with byok.across(["t2", "t1"], **WHO), Session(data) as session:
        yield session


NAMED = Patient.org.in_(["t1", "t2"])


# -- reading ---------------------------------------------------------------------------------------------------------


def test_rows_of_the_named_tenants_are_read(session: Session) -> None:
    """Each under its own tenant's keys, in one result."""
    found = session.execute(select(Patient.org, Patient.name).where(NAMED).order_by(Patient.id)).all()
    assert [tuple(row) for row in found] == [(t, f"{t} {n}") for t in ("t1", "t2") for n in (1, 2, 3)]
    assert [one.name for one in session.scalars(select(Patient).where(NAMED).order_by(Patient.id))] == [
        name for _, name in found
    ]
    session.expire_all()
    assert session.get_one(Patient, 11).name == "t2 1"


def test_a_row_of_another_tenant_is_refused(byok: Byok, data: Engine, session: Session) -> None:
    """Also where it is open in this process; the message names all, and no value."""
    for query in (select(Patient.name).where(Patient.id == 21), select(Patient).where(Patient.id == 21)):
        with pytest.raises(TenantMismatchError, match=r"'t3'.*'t1', 't2'") as raised:
            session.scalars(query).all()
        assert (raised.value.owner, raised.value.tenant) == ("t3", "across 't1', 't2'")
        assert "t3 1" not in str(raised.value)
    byok.forget_keys("t3")
    with pytest.raises(UnknownDataKeyError, match="another tenant's"):
        session.scalars(query).all()


def test_direct_values_stay_sealed(byok: Byok, session: Session) -> None:
    """Each would be a call to another customer's KMS; in its tenant's block one is revealed."""
    found = session.get_one(Patient, 11)
    assert type(found.ssn) is Sealed
    with pytest.raises(NoTenantError, match=r"t1.*t2"):
        byok.reveal(found, "ssn")
    with byok.tenant("t2"):
        assert byok.reveal(found, "ssn") == "t2 ssn"
    with pytest.raises(TenantMismatchError):
        session.scalars(select(Patient.ssn).where(Patient.id == 21)).all()


# -- searching -------------------------------------------------------------------------------------------------------

SEARCHES: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "==": (lambda: Patient.mrn == "same", [1, 11]),
    "== one's": (lambda: Patient.mrn == "t2", [12]),
    "in": (lambda: Patient.mrn.in_(["same", "t1"]), [1, 2, 11]),
    "!=": (lambda: Patient.mrn != "same", [2, 12]),
    "not in": (lambda: Patient.mrn.not_in(["same", "t1"]), [12]),
    "is null": (lambda: Patient.mrn.is_(None), [3, 13]),
    "== none of theirs": (lambda: Patient.mrn == "t3", []),
}


@pytest.mark.parametrize("form", SEARCHES)
def test_a_search_finds_the_rows_of_all_named_tenants(byok: Byok, data: Engine, form: str) -> None:
    """By each one's hashes; one tenant's session before and after, from the same statement cache, is as ever."""
    criterion, ids = SEARCHES[form]
    query = select(Patient.id).where(criterion(), NAMED).order_by(Patient.id)
    for _ in range(2):
        for tenant, mine in (("t1", [1, 2, 3]), ("t2", [11, 12, 13])):
            with byok.session(tenant, data) as session:
                own = [id_ for id_ in ids if id_ in mine]
                assert session.scalars(query.where(Patient.org == tenant)).all() == own
        with byok.across(["t1", "t2"], **WHO), Session(data) as session:
            assert session.scalars(query).all() == ids
        with byok.across(["t2"], **WHO), Session(data) as session:
            assert session.scalars(query.where(Patient.org == "t2")).all() == [one for one in ids if one > 10]


def test_comparing_columns_is_refused(session: Session) -> None:
    """Equal values of two tenants have unequal hashes."""
    other = Patient.__table__.alias()
    with pytest.raises(UnsupportedQueryError, match=r"patient\.mrn"):
        session.execute(select(Patient.id).join(other, other.c.mrn == Patient.mrn)).all()


def test_a_search_by_too_many_salts_is_refused(tmp_path: Path, customer_key: Path) -> None:
    """Twenty are searched; beyond it a statement would grow without bound. Reading is not limited."""
    engine = create_engine(f"sqlite:///{tmp_path / 'many.db'}")
    Base.metadata.create_all(engine)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
    byok.create_keystore()
    byok.attach(engine)
    names = [f"org-{n:02}" for n in range(21)]
    for number, name in enumerate(names):
        byok.onboard(name, LocalKms(customer_key))
        with byok.session(name, engine) as session:
            session.add(Patient(id=number, org=name, mrn="same", name=name))
            session.commit()
    query = select(Patient.name).where(Patient.mrn == "same").order_by(Patient.id)
    with byok.across(names[:20], **WHO), Session(engine) as session:
        assert session.scalars(query).all() == names[:20]
    with byok.across(names, **WHO), Session(engine) as session:
        for _ in range(2):
            with pytest.raises(UnsupportedQueryError, match="at most 20 search salts, not 21"):
                session.scalars(query).all()
        assert session.scalars(select(Patient.name).order_by(Patient.id)).all() == names
    byok.close()
    engine.dispose()


# -- writing ---------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Session], object]] = {
    "add": lambda s: (s.add(Patient(id=99, org="t1", name="x")), s.flush()),
    "change": lambda s: (setattr(s.get_one(Patient, 1), "name", "x"), s.flush()),
    "searchable": lambda s: (setattr(s.get_one(Patient, 1), "mrn", "x"), s.flush()),
    "direct": lambda s: (setattr(s.get_one(Patient, 1), "ssn", "x"), s.flush()),
    "sealed": lambda s: (s.add(Patient(id=99, org="t1", ssn=s.get_one(Patient, 1).ssn)), s.flush()),
    "insert": lambda s: s.execute(insert(Patient), [{"id": 99, "org": "t1", "mrn": "x"}]),
    "update": lambda s: s.execute(update(Patient).where(Patient.id == 1).values(name="x")),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_new_value_is_refused(byok: Byok, data: Engine, session: Session, way: str) -> None:
    """Nobody said whose it would be."""
    with pytest.raises(NoTenantError, match=r"'t1', 't2'.*Name one tenant"):
        WRITES[way](session)
    session.rollback()
    assert session.scalar(select(Patient.name).where(Patient.id == 1)) == "t1 1"
    assert session.scalar(select(func.count(Patient.id))) == 9


def test_one_of_them_is_named_for_a_write(byok: Byok, data: Engine, session: Session) -> None:
    """By a block within or by an option, for a session of its own; plain columns need no tenant."""
    session.get_one(Patient, 11).note = "flushed"
    session.execute(update(Patient).where(Patient.mrn == "same").values(note="found"))
    session.execute(delete(Patient).where(Patient.mrn == "t1"))
    session.commit()
    notes = session.execute(select(Patient.id, Patient.note).order_by(Patient.id)).all()
    assert [tuple(row) for row in notes if row.note] == [(1, "found"), (11, "found")]
    assert 2 not in [row.id for row in notes]
    session.commit()
    with byok.tenant("t2"), Session(data) as inner:
        inner.get_one(Patient, 12).name = "block"
        inner.commit()
    with byok.session("t1", data) as own:
        own.get_one(Patient, 1).name = "option"
        own.commit()
    query = select(Patient.name).where(Patient.id.in_([1, 12])).order_by(Patient.id)
    assert session.scalars(query).all() == ["option", "block"]


def test_objects_read_across_are_not_written_under_one_tenants_keys(
    byok: Byok, data: Engine, session: Session
) -> None:
    """A block within serves another session: t2's object would be encrypted for t1."""
    found = session.get_one(Patient, 11)
    found.name = "x"
    with byok.tenant("t1"), pytest.raises(TenantMismatchError, match="began with"):
        session.flush()


# -- entering --------------------------------------------------------------------------------------------------------


def test_entering_is_told_to_the_audit(byok: Byok, data: Engine) -> None:
    """Who read whose rows, and what for; nobody enters without saying so."""
    told: list[Event] = []
    byok.forget_keys()
    byok._audit.listeners.append(told.append)
    with byok.across(["t2", "t1", "t2"], actor="ada", reason="ticket 4711"):
        assert told[-1] == AcrossOpened(("t1", "t2"), "ada", "ticket 4711")
    assert {
        (each.tenant, each.actor) for each in told if hasattr(each, "request_id") and hasattr(each, "actor")
    } == {
        ("t1", "ada"),
        ("t2", "ada"),
    }
    for wrong in (
        lambda: byok.across([], **WHO),
        lambda: byok.across("t1", **WHO),
        lambda: byok.across(["t1"], actor="", reason="x"),
        lambda: byok.across(["t1"], actor="x", reason=""),
    ):
        with pytest.raises(ConfigurationError):
            wrong()
    with pytest.raises(UnknownTenantError, match="t9"), byok.across(["t1", "t9"], **WHO):
        pass
    assert byok._blocks.current() is None


@pytest.fixture
def counted(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str
) -> Iterator[tuple[Byok, Engine, TurnableClock]]:
    """A Byok on SQLite whose KMS counts, and a clock to turn; t2 asks for each unit of work."""
    clock = TurnableClock()
    engine = create_engine(f"sqlite:///{tmp_path / 'data.db'}")
    Base.metadata.create_all(engine)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", keystore_key=keystore_key, clock=clock)
    byok.create_keystore()
    byok.attach(engine)
    for number, (tenant, revoke_within) in enumerate((("t1", 300.0), ("t2", 0.0))):
        byok.onboard(tenant, counting_kms, revoke_within=revoke_within)
        with byok.session(tenant, engine) as session:
            session.add_all([Patient(id=10 * number + 1, org=tenant, mrn="same", name=f"{tenant} 1")])
            session.commit()
    yield byok, engine, clock
    byok.close()
    engine.dispose()


def test_kms_calls(counted: tuple[Byok, Engine, TurnableClock], counting_kms: CountingKms) -> None:
    """One for each tenant that is not open, none for one that is; one a transaction for a tenant that wants it."""
    byok, engine, _ = counted
    byok.forget_keys()
    counting_kms.unwraps.clear()
    query = select(Patient.name).where(Patient.mrn == "same").order_by(Patient.id)
    with byok.across(["t1", "t2"], **WHO), Session(engine) as session:
        assert len(counting_kms.unwraps) == 2
        for _ in range(3):
            assert session.scalars(query).all() == ["t1 1", "t2 1"]
        assert len(counting_kms.unwraps) == 2
        session.commit()
        for _ in range(3):
            assert session.scalars(query).all() == ["t1 1", "t2 1"]
        assert len(counting_kms.unwraps) == 3


def test_a_tenant_under_rotation_is_searched_by_both_its_salts(
    counted: tuple[Byok, Engine, TurnableClock],
) -> None:
    """Its rows are found before they were moved; the number of salts is that of all tenants together."""
    byok, engine, _ = counted
    byok.rotate_salt("t1")
    with byok.session("t1", engine) as session:
        session.add(Patient(id=2, org="t1", mrn="same"))
        session.commit()
    query = select(Patient.id).where(Patient.mrn == "same").order_by(Patient.id)
    with byok.across(["t1", "t2"], **WHO), Session(engine) as session:
        assert session.scalars(query).all() == [1, 2, 11]
        assert session.scalars(query.where(Patient.mrn.in_(["x", "same"]))).all() == [1, 2, 11]
        assert session.scalars(select(Patient.id).where(Patient.mrn != "same")).all() == []


def test_a_tenant_that_goes_dark_stops_what_is_read(counted: tuple[Byok, Engine, TurnableClock]) -> None:
    """Its deadline and its forgetting hold for an open result, although another tenant's keys are still good."""
    byok, engine, clock = counted
    with byok.across(["t1", "t2"], **WHO), engine.connect() as connection:
        for stop, error in (
            (lambda: byok.forget_keys("t1"), KeysExpiredError),
            (lambda: clock.turn(301), KeysExpiredError),
        ):
            result = connection.execute(select(Patient.name).order_by(Patient.id))
            stop()
            with pytest.raises(error):
                result.all()
            result.close()
            connection.rollback()


def test_keys_that_are_taken_away_are_gone_here_too(counted: tuple[Byok, Engine, TurnableClock]) -> None:
    """The keyring of several tenants holds no key of its own: a batch that is being decrypted stops as well."""
    byok, _, _ = counted
    rings = [byok._keyrings.get(name) for name in ("t1", "t2")]
    ring = AcrossRing(Across(("t1", "t2")), rings)
    mine, theirs = (list(each.openers) for each in rings)
    rings[0].clear()
    assert [header in ring.openers for header in (*mine, *theirs)] == [False] * len(mine) + [True] * len(
        theirs
    )
    assert ring.cleared


def test_one_dark_tenant_keeps_the_block_shut(
    counted: tuple[Byok, Engine, TurnableClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that could not be read are not left out silently."""
    byok, _, _ = counted
    byok.forget_keys()

    def refuse() -> None:
        raise KeyDisabledError("disabled")

    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(refuse))
    with pytest.raises(KeyDisabledError), byok.across(["t1", "t2"], **WHO):
        pass
    assert byok._blocks.current() is None


# -- whose turn it is ------------------------------------------------------------------------------------------------


def test_streams_and_blocks_do_not_meet(byok: Byok, data: Engine) -> None:
    """A result keeps the tenants of its statement, wherever it is fetched."""
    query = select(Patient.name).where(NAMED).order_by(Patient.id)
    with data.connect() as one, data.connect() as two, data.connect() as three:
        with byok.across(["t1", "t2"], **WHO):
            across = one.execute(query)
        with byok.tenant("t1"):
            mine = two.execute(query.where(Patient.org == "t1"))
            wrong = three.execute(query)
        with byok.tenant("t3"):
            assert [next(across)[0] for _ in range(3)] == ["t1 1", "t1 2", "t1 3"]
            assert mine.scalars().all() == ["t1 1", "t1 2", "t1 3"]
            assert across.scalars().all() == ["t2 1", "t2 2", "t2 3"]
        with byok.across(TENANTS, **WHO), pytest.raises(TenantMismatchError):
            wrong.scalars().all()


def test_threads_do_not_meet(byok: Byok, data: Engine) -> None:
    """One block object in many threads, beside threads of one tenant."""
    block, wrong = byok.across(["t1", "t2"], **WHO), []
    query = select(Patient.name).where(Patient.mrn == "same").order_by(Patient.id)

    def work(several: bool) -> None:
        for _ in range(20):
            with block if several else byok.tenant("t2"), Session(data) as session:
                found = session.scalars(query).all()
                if found != (["t1 1", "t2 1"] if several else ["t2 1"]):
                    wrong.append(found)

    threads = [threading.Thread(target=work, args=(several,)) for several in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert byok._blocks.current() is None


def test_steady_sql_is_as_it_was(byok: Byok, data: Engine) -> None:
    """One tenant's look-up is one comparison, also after one across several was compiled."""
    sent: list[str] = []
    event.listen(data, "before_cursor_execute", lambda *args: sent.append(args[2]))
    query = select(Patient.id).where(Patient.mrn == "same")
    with byok.across(["t1", "t2"], **WHO), Session(data) as session:
        session.scalars(query).all()
    with byok.session("t1", data) as session:
        session.scalars(query).all()
    many, one = sent
    assert " IN (" in many
    assert " IN (" not in one


async def test_under_asyncio(abyok: Byok, async_engine: AsyncEngine) -> None:
    """async with, tasks side by side, searches, streams and the refused write."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    for number, tenant in enumerate(("t1", "t2")):
        async with abyok.asession(tenant, async_engine) as session:
            session.add_all(rows_of(number, tenant))
            await session.commit()
    abyok.forget_keys()
    query = select(Patient.name).where(Patient.mrn == "same").order_by(Patient.id)

    async def across() -> None:
        async with abyok.across(["t1", "t2"], **WHO), AsyncSession(async_engine) as session:
            assert (await session.scalars(query)).all() == ["t1 1", "t2 1"]
            names = [
                row async for row in await session.stream_scalars(select(Patient.name).order_by(Patient.id))
            ]
            assert names == [f"{t} {n}" for t in ("t1", "t2") for n in (1, 2, 3)]
            found = await session.get_one(Patient, 11)
            await session.refresh(found, ["ssn"])
            assert type(found.ssn) is Sealed
            session.add(Patient(id=99, org="t1", name="x"))
            with pytest.raises(NoTenantError, match="Name one tenant"):
                await session.flush()

    async def single() -> None:
        for _ in range(3):
            async with abyok.tenant("t2"), AsyncSession(async_engine) as session:
                assert (await session.scalars(query)).all() == ["t2 1"]

    await asyncio.gather(across(), single(), across())
    assert abyok._blocks.current() is None
