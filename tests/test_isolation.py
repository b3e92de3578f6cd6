"""Ways in which one tenant's work could meet another's, or a key outlive its time, and that must stay shut."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, TurnableClock
from sqlalchemy import Engine, LargeBinary, String, create_engine, event, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sqla_byok.keys.database
from sqla_byok import (
    Byok,
    ByokError,
    ConfigurationError,
    Digest,
    Encrypted,
    KeyDisabledError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    KmsUnavailableError,
    LocalKms,
    NotAttachedError,
    NotEncryptedError,
    TamperedError,
    TenantMismatchError,
)
from sqla_byok.keys.rows import State
from sqla_byok.kms import providers
from sqla_byok.orm.fetches import Columns


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(40), searchable=True))
    scan: Mapped[bytes | None] = mapped_column(Encrypted(LargeBinary, searchable=True))


@pytest.fixture
def clock() -> TurnableClock:
    return TurnableClock()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'data.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def kms(customer_key: Path, monkeypatch: pytest.MonkeyPatch) -> CountingKms:
    """A customer key that passes for LocalKms, which needs no keystore key, and can be made to wait or refuse."""
    monkeypatch.setattr(CountingKms, "provider", "local")
    monkeypatch.setattr(CountingKms, "outbound", False)
    monkeypatch.setitem(providers, "local", CountingKms)
    monkeypatch.setattr(CountingKms, "unwraps", [])
    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(lambda: None))
    return CountingKms(str(customer_key))


@pytest.fixture
def local(tmp_path: Path, sqlite: Engine, kms: CountingKms, clock: TurnableClock) -> Iterator[Byok]:
    """A Byok on SQLite with a clock to turn."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", clock=clock)
    byok.create_keystore()
    byok.attach(sqlite)
    for tenant in ("t1", "t2"):
        byok.onboard(tenant, kms, revoke_within=5)
        with byok.session(tenant, sqlite) as session:
            session.add(Patient(id=1 if tenant == "t1" else 2, mrn=f"{tenant} secret"))
            session.commit()
    yield byok
    byok.close()


MINE, THEIRS = select(Patient.mrn).where(Patient.id == 1), select(Patient.mrn).where(Patient.id == 2)


# -- one tenant's rows -----------------------------------------------------------------------------------------------


def test_a_listener_that_fails_for_another_tenant_lends_no_keys(local: Byok, sqlite: Engine) -> None:
    """A result is read under its statement's tenant, whatever a statement of another one left behind meanwhile."""

    def audit(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "patient" in statement:
            with pytest.raises(Exception, match="nowhere"), sqlite.connect() as other:
                other.execution_options(byok_tenant="t2").execute(text("INSERT INTO nowhere VALUES (1)"))

    event.listen(sqlite, "after_cursor_execute", audit)
    with local.session("t1", sqlite) as session:
        assert session.scalar(MINE) == "t1 secret"
        with pytest.raises(TenantMismatchError):
            session.scalar(THEIRS)


async def test_tasks_that_share_a_context_read_no_foreign_row(abyok: Byok, async_engine: AsyncEngine) -> None:
    """Two tasks in one context step on each other's variables: each gets its own tenant's rows or an error."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    for id_, tenant in ((1, "t1"), (2, "t2")):
        async with abyok.asession(tenant, async_engine) as session:
            session.add(Patient(id=id_, mrn=f"{tenant} secret"))
            await session.commit()
    seen: list[tuple[str, str | None]] = []

    async def read(tenant: str) -> None:
        for id_ in (1, 2) * 15:
            try:
                async with abyok.asession(tenant, async_engine) as session:
                    seen.append((tenant, await session.scalar(select(Patient.mrn).where(Patient.id == id_))))
            except TenantMismatchError:
                continue

    shared = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(shared.run(loop.create_task, read(tenant)) for tenant in ("t1", "t2")))
    assert [found for found in seen if found[1] != f"{found[0]} secret"] == []


def test_a_session_taken_to_another_tenant_does_not_rewrite_its_rows(local: Byok, sqlite: Engine) -> None:
    """Objects that a session loaded for one tenant are not written under the keys of the next one's block."""
    with Session(sqlite) as session:
        with local.tenant("t1"):
            patient = session.scalars(select(Patient).where(Patient.id == 1)).one()
        with local.tenant("t2"):
            patient.mrn = "changed"
            with pytest.raises(TenantMismatchError, match=r"byok\.session"):
                session.flush()
            session.rollback()
    with local.session("t1", sqlite) as session:
        assert session.scalar(MINE) == "t1 secret"


def test_one_transaction_may_serve_tenants_that_are_named(local: Byok, sqlite: Engine) -> None:
    """A job that names each statement's tenant itself, or that only inserts, may work for several at once."""
    with sqlite.begin() as connection:
        for id_, tenant in ((1, "t1"), (2, "t2")):
            own = {"byok_tenant": tenant}
            connection.execute(
                update(Patient).where(Patient.id == id_).values(mrn="new"), execution_options=own
            )
            with local.tenant(tenant):
                connection.execute(insert(Patient), [{"id": id_ + 10, "mrn": f"also {tenant}"}])
    for id_, tenant in ((1, "t1"), (2, "t2")):
        with local.session(tenant, sqlite) as session:
            found = session.scalars(select(Patient.mrn).where(Patient.id.in_([id_, id_ + 10]))).all()
            assert found == ["new", f"also {tenant}"]


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_slow_keystore_does_not_prolong_keys(
    local: Byok, sqlite: Engine, clock: TurnableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys whose deadline passes while the keystore is asked about them are used no more."""
    keystore = local._keystore
    real = keystore.states

    def slowly(tenants: Sequence[str]) -> dict[str, State]:
        clock.turn(8)
        return real(tenants)

    def refuse() -> None:
        raise KeyDisabledError("disabled", tenant="t1")

    with local.tenant("t1"):
        pass
    clock.turn(3)
    monkeypatch.setattr(keystore, "states", slowly)
    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(refuse))
    with pytest.raises(KeyDisabledError), sqlite.begin() as connection:
        connection.execute(insert(Patient), {"mrn": "late"}, execution_options={"byok_tenant": "t1"})
    with sqlite.connect() as connection:
        assert len(connection.execute(select(Patient.id)).all()) == 2


def test_an_answer_older_than_the_deadline_opens_nothing(
    local: Byok, clock: TurnableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the KMS said longer ago than keys may be used is no answer."""
    local.forget_keys()
    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(lambda: clock.turn(6)))
    with pytest.raises(KmsUnavailableError, match="took longer"), local.tenant("t1"):
        pass


def test_an_idle_tenants_keys_go_when_their_time_is_up(local: Byok, clock: TurnableClock) -> None:
    """Any tenant's next opening clears what others left behind."""
    local.forget_keys()
    with local.tenant("t1"):
        ring = local._keyrings.get("t1")
    clock.turn(6)
    with local.tenant("t2"):
        pass
    assert ring.cleared
    assert ring.openers == {}


def test_a_locked_keystore_is_one_that_does_not_answer(
    databases: Any, request: pytest.FixtureRequest, customer_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that holds the keystore's tables does not hang every statement that has to look there."""
    monkeypatch.setattr(sqla_byok.keys.database, "_PATIENCE", 1)
    from conftest import _url  # the run's PostgreSQL, emptied afterwards

    url = _url("postgresql", {"postgresql": "postgresql+psycopg"}, request)
    byok, other = Byok(keystore=url), create_engine(url)
    byok.create_keystore()
    byok.onboard("t1", LocalKms(customer_key))
    with other.begin() as connection:
        connection.execute(text("LOCK TABLE byok_tenant IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(KeystoreUnavailableError, match="timeout"), byok.tenant("t1"):
            pass
    with byok.tenant("t1"):
        pass
    byok.close()
    other.dispose()


# -- what is told ----------------------------------------------------------------------------------------------------


def test_those_who_wait_get_an_exception_each(local: Byok, monkeypatch: pytest.MonkeyPatch) -> None:
    """One exception object raised in several threads would show one request's frames in another's report."""
    local.forget_keys()
    all_there, raised = threading.Barrier(3), []

    def wait_and_refuse() -> None:
        all_there.wait(10)
        raise KeyDisabledError("disabled", tenant="t1")

    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(wait_and_refuse))
    joined = local._keyrings._join

    def join(tenant: str) -> Any:
        opening, leads = joined(tenant)
        if not leads:
            all_there.wait(10)
        return opening, leads

    monkeypatch.setattr(local._keyrings, "_join", join)

    def enter() -> None:
        try:
            with local.tenant("t1"):
                pass
        except ByokError as error:
            raised.append(error)

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in raised] == [KeyDisabledError] * 3
    assert len({id(error) for error in raised}) == 3


def test_a_crash_report_of_a_damaged_keystore_shows_no_key(tmp_path: Path, local: Byok) -> None:
    """Reports show the variables of each frame: none may hold what was opened before the damage was met."""
    keystore = create_engine(f"sqlite:///{tmp_path / 'keystore.db'}")
    with keystore.begin() as connection:
        connection.execute(
            text("UPDATE byok_generation SET sealed = zeroblob(62) WHERE kind = 'search-salt'")
        )
    keystore.dispose()
    local.forget_keys()
    with pytest.raises(KeystoreTamperedError) as refusal, local.tenant("t1"):
        pass
    frame, loose = refusal.value.__traceback__, []
    while frame is not None:
        loose += [
            (frame.tb_frame.f_code.co_name, name)
            for name, value in frame.tb_frame.f_locals.items()
            if isinstance(value, bytes) and len(value) == 32 and name != "seal_key"
        ]
        frame = frame.tb_next
    assert loose == []


@pytest.mark.parametrize("stored", ["'plaintext'", "3.5", "100000000000"])
def test_a_stored_value_that_is_no_bytes_is_refused(local: Byok, sqlite: Engine, stored: str) -> None:
    """Plaintext from before a migration, or a number, is told apart; it is not turned into bytes."""
    with sqlite.begin() as connection:
        connection.execute(text(f"UPDATE patient SET mrn = {stored}, mrn_hash = {stored} WHERE id = 1"))
    with local.session("t1", sqlite) as session:
        with pytest.raises(NotEncryptedError):
            session.scalar(MINE)
        with pytest.raises(TamperedError):
            session.scalar(select(Patient.__table__.c.mrn_hash).where(Patient.id == 1))


def test_a_digest_in_a_column_of_bytes_is_found_by_its_value(local: Byok, sqlite: Engine) -> None:
    """A hash that is itself stored as a value is hashed like any other value."""
    with local.session("t1", sqlite) as session:
        digest = session.scalars(select(Patient.__table__.c.mrn_hash).where(Patient.id == 1)).one()
        assert isinstance(digest, Digest)
        session.add(Patient(id=3, scan=digest))
        session.flush()
        assert session.scalar(select(Patient.id).where(Patient.scan == bytes(digest))) == 3


async def test_the_wrong_kind_of_engine_is_told(tmp_path: Path, local: Byok, sqlite: Engine) -> None:
    """A sync session over an async engine, and the reverse, say which method to use."""
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'data.db'}")
    wrong: Any = engine
    with pytest.raises(ConfigurationError, match="asession"), local.session("t1", wrong):
        pass
    wrong = sqlite
    with pytest.raises(ConfigurationError, match="AsyncEngine"):
        async with local.asession("t1", wrong):
            pass
    await engine.dispose()


# -- what is kept with a compiled statement ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["another", "an interrupt"])
def test_a_statement_that_is_executed_first_by_two_at_once_is_read_by_both(
    local: Byok, sqlite: Engine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """SQLAlchemy keeps how a result is read before we have kept ours; who came in between was given ciphertext."""
    statement, met = select(Patient.id, Patient.mrn).order_by(Patient.mrn.is_(None), Patient.id).limit(1), []
    make = Columns.of

    def interrupted(readers: Any) -> Columns | None:
        if not met:
            met.append(how)
            if how == "an interrupt":
                raise SystemExit
            with local.session("t1", sqlite) as other:
                met.append(other.execute(statement).one().mrn)
        return make(readers)

    monkeypatch.setattr(Columns, "of", interrupted)
    with local.session("t1", sqlite) as session, suppress(SystemExit):
        met.append(session.execute(statement).one().mrn)
    with local.session("t1", sqlite) as session:
        met.append(session.execute(statement).one().mrn)
    assert met == [how, *["t1 secret"] * (3 if how == "another" else 1)]


def test_a_cache_of_the_applications_own_from_before_attaching_is_of_use_afterwards(
    local: Byok, sqlite: Engine
) -> None:
    """What was compiled and refused before the engine was attached is read as anything else then."""
    engine, cache = create_engine(sqlite.url), dict[Any, Any]()
    statement = select(Patient.mrn).where(Patient.id == 1)
    with engine.execution_options(compiled_cache=cache, byok_tenant="t1").connect() as connection:
        with pytest.raises(NotAttachedError):
            connection.execute(statement).all()
        local.attach(engine)
        assert connection.scalar(statement) == "t1 secret"
    assert len(cache) == 1
    engine.dispose()
