"""Two processes on one keystore, and processes that fork."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import TurnableClock, hand_in, in_child, publish_data_key
from sqlalchemy import URL, LargeBinary, String, create_engine, insert, select, text, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from told_process import ToldProcess

from sqla_byok import Byok, Encrypted, LocalKms, TenantExistsError, UnknownTenantError
from sqla_byok.keys.keyrings import POLL_EVERY
from sqla_byok.kms import Kms, providers


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))


def _url(url: URL) -> str:
    return url.render_as_string(hide_password=False)


# -- what the other process runs -------------------------------------------------------------------------------------


def _other_process(url: str, key: str, pipe: Any) -> None:
    """Serve commands until None comes: each is answered with what it returned, or the name of what it raised."""
    clock = TurnableClock()
    engine, byok = create_engine(url), Byok(keystore=url, clock=clock)
    byok.attach(engine)

    def write(tenant: str, mrn: str) -> None:
        with engine.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert(Patient).values(mrn=mrn))

    def find(tenant: str, mrn: str) -> list[str]:
        with engine.execution_options(byok_tenant=tenant).connect() as connection:
            return list(connection.scalars(select(Patient.mrn).where(Patient.mrn == mrn)))

    commands: dict[str, Callable[..., Any]] = {
        "write": write,
        "find": find,
        "onboard": lambda tenant, path: byok.onboard(tenant, LocalKms(path)),
        "turn": clock.turn,
        "create": byok.create_keystore,
    }
    for name, *arguments in iter(pipe.recv, None):
        try:
            answer = commands[name](*arguments)
        except Exception as error:
            answer = type(error).__name__
        pipe.send(answer)
    byok.close()
    engine.dispose()


class Other(ToldProcess):
    """Another process with a Byok on the same database."""

    def __init__(self, url: URL, key: Path) -> None:
        super().__init__(_other_process, _url(url), str(key))


@pytest.fixture
def other(sync_url: URL, customer_key: Path) -> Iterator[Other]:
    other = Other(sync_url, customer_key)
    yield other
    other.close()


def test_two_processes_share_tenants_and_generations(sync_url: URL, customer_key: Path, other: Other) -> None:
    """What one onboards and writes the other finds; a new generation reaches it at its next look, without a KMS."""
    clock, engine = TurnableClock(), create_engine(sync_url)
    byok = Byok(keystore=sync_url, clock=clock)
    byok.create_keystore()
    byok.attach(engine)
    Base.metadata.create_all(engine)
    assert other.do("find", "t1", "A") == UnknownTenantError.__name__
    byok.onboard("t1", LocalKms(customer_key))
    assert other.do("onboard", "t1", str(customer_key)) is None
    LocalKms.create(customer_key.with_name("other.key"))
    assert other.do("onboard", "t1", str(customer_key.with_name("other.key"))) == TenantExistsError.__name__
    with byok.session("t1", engine) as session:
        session.add(Patient(mrn="A"))
        session.commit()
    assert other.do("find", "t1", "A") == ["A"]
    other.do("write", "t1", "B")

    hand = hand_in(sync_url)
    key_id = publish_data_key(hand, "t1")
    customer_key.rename(customer_key.with_name("away"))  # nobody may need it for what follows
    other.do("turn", POLL_EVERY)
    assert other.do("write", "t1", "C") is None  # under the new generation
    stored = select(type_coerce(Patient.mrn, LargeBinary)).order_by(Patient.id)
    with hand.connect() as connection:
        assert [blob[2:18] == key_id for blob in connection.scalars(stored)] == [False, False, True]
    clock.turn(POLL_EVERY)
    with byok.session("t1", engine) as session:
        assert session.scalars(select(Patient.mrn).order_by(Patient.id)).all() == ["A", "B", "C"]
        assert session.scalars(select(Patient.mrn).where(Patient.mrn == "C")).all() == ["C"]
    hand.dispose()
    engine.dispose()
    byok.close()


@pytest.mark.parametrize("same", [True, False], ids=["same key", "other keys"])
def test_two_processes_onboard_at_once(sync_url: URL, customer_key: Path, other: Other, same: bool) -> None:
    """They create the keystore and onboard one tenant at the same time: one whole tenant comes of it."""
    byok = Byok(keystore=sync_url)
    path = customer_key if same else customer_key.with_name("other.key")
    if not same:
        LocalKms.create(path)
    other.start("create")
    byok.create_keystore()
    assert other.answer() is None
    for n in range(5):
        tenant, mine = f"t{n}", "onboarded"
        other.start("onboard", tenant, str(path))
        try:
            byok.onboard(tenant, LocalKms(customer_key))
        except TenantExistsError:
            mine = "TenantExistsError"
        theirs = other.answer() or "onboarded"
        assert sorted([mine, theirs]) == (["onboarded"] * 2 if same else ["TenantExistsError", "onboarded"])
        with byok.tenant(tenant):
            pass
    assert byok.tenants() == [f"t{n}" for n in range(5)]
    byok.close()


# -- fork ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # threads are running, which is the point
@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_forked_process_uses_and_opens_tenants(
    request: pytest.FixtureRequest, customer_key: Path, tmp_path: Path, driver: str, sync_url: URL
) -> None:
    """The child reads with the keys it inherits, opens others over connections of its own, and harms its parent's."""
    kinds = {"sqlite": "aiosqlite", "postgresql": "asyncpg", "mariadb": "asyncmy"}
    backend = sync_url.get_backend_name()
    keystore = sync_url if driver == "sync" else sync_url.set(drivername=f"{backend}+{kinds[backend]}")
    byok = Byok(keystore=keystore)
    byok.create_keystore()
    data = f"sqlite:///{tmp_path / 'data.db'}"
    engine = create_engine(data)
    byok.attach(engine)
    Base.metadata.create_all(engine)
    for tenant in ("t1", "t2", "t3"):
        byok.onboard(tenant, LocalKms(customer_key))
    with byok.session("t1", engine) as session:
        session.add(Patient(mrn="A"))
        session.commit()
    engine.dispose()
    numbers = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT connection_id()"}

    def number_of_connection() -> int | None:
        if backend not in numbers:
            return None  # a file has no sessions to tell apart
        return byok._database.read(lambda connection: connection.scalar(text(numbers[backend])))

    parents = number_of_connection()

    def work() -> None:
        gc.collect()  # whatever the child no longer needs goes now
        engine.dispose(close=False)
        mine = number_of_connection()
        assert mine is None or mine != parents
        with byok.session("t1", engine) as session:
            assert session.scalars(select(Patient.mrn)).all() == ["A"]
        with byok.session("t2", engine) as session:
            assert session.scalars(select(Patient.mrn).where(Patient.mrn == "A")).all() == []
        byok.forget_keys()
        with byok.session("t1", engine) as session:
            assert session.scalars(select(Patient.mrn)).all() == ["A"]
        assert byok.tenants() == ["t1", "t2", "t3"]
        byok.close()

    assert in_child(work) == 0
    assert number_of_connection() == parents  # its connection is as good as before
    byok.forget_keys()
    with byok.session("t1", engine) as session, byok.tenant("t3"):
        assert session.scalars(select(Patient.mrn)).all() == ["A"]
    byok.close()
    engine.dispose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_an_opening(
    tmp_path: Path, customer_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child does not wait for an answer that only its parent's thread would get, nor for a lock it held."""
    asked, release = threading.Event(), threading.Event()
    real, parent = LocalKms(customer_key), os.getpid()

    class SlowKms(Kms):
        provider, profile, outbound = "local", "default", False

        def config(self) -> dict[str, str]:
            return real.config()

        @classmethod
        def from_config(cls, config: Any) -> Any:
            return cls()

        def connect(self, settings: Any, operator: Any = None, *, reason: str = "open") -> Any:
            return self

        def wrap(self, payload: bytes, *, tenant: str) -> Any:
            return real.connect({}).wrap(payload, tenant=tenant)

        def unwrap(self, wrapped: Any, *, tenant: str) -> bytes:
            if os.getpid() == parent:
                asked.set()
                assert release.wait(30)
            return real.connect({}).unwrap(wrapped, tenant=tenant)

    byok = Byok(keystore=f"sqlite:///{tmp_path / 'k.db'}")
    byok.create_keystore()
    byok.onboard("t1", real)
    monkeypatch.setitem(providers, "local", SlowKms)

    def enter() -> None:
        with byok.tenant("t1"):
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    assert asked.wait(30)
    assert in_child(enter) == 0
    release.set()
    thread.join(30)
    enter()
    byok.close()
