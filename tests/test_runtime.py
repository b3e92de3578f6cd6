"""Byok itself: what it takes, what it says when something is wrong, and that it tells no secret."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from keys_tools import TurnableClock
from sqlalchemy import Engine, StaticPool, String, create_engine, event, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import (
    AwsKms,
    Byok,
    ByokError,
    ConfigurationError,
    Encrypted,
    KeyDeletedError,
    KeystoreUnavailableError,
    LocalKms,
    NotAttachedError,
    UnknownTenantError,
    WrongKeyError,
)
from sqla_byok.kms import Kms, Wrapped

ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))


@pytest.fixture
def memory() -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def ready(memory: Engine, customer_key: Path) -> Iterator[Byok]:
    """A Byok whose keystore is in the data engine's own in-memory database, with the tenant t1."""
    byok = Byok(keystore=memory, clock=TurnableClock())
    byok.create_keystore()
    byok.attach(memory)
    byok.onboard("t1", LocalKms(customer_key))
    yield byok
    byok.close()


def test_the_quickstart_in_memory(ready: Byok, memory: Engine) -> None:
    """Create, attach, onboard, write, search and read, with keystore and data in one in-memory database."""
    with ready.session("t1", memory) as session:
        session.add(Patient(mrn="A-1"))
        session.commit()
        assert session.scalars(select(Patient.mrn).where(Patient.mrn == "A-1")).one() == "A-1"


@pytest.mark.parametrize("seconds", [0.999, 86_400.1, -1, math.nan, math.inf])
def test_deadlines_that_cannot_be_had(ready: Byok, customer_key: Path, seconds: float) -> None:
    """There is no "forever", and no deadline that a call alone would exceed; nothing is onboarded with one."""
    with pytest.raises(ConfigurationError, match="1 to 86,400 seconds"):
        Byok(keystore="sqlite://", revoke_within=seconds)
    with pytest.raises(ConfigurationError, match="1 to 86,400 seconds"):
        ready.onboard("t2", LocalKms(customer_key), revoke_within=seconds)
    assert ready.tenants() == ["t1"]


def test_parameters_that_cannot_be_used() -> None:
    """Said when Byok is made, not when the first request comes."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        Byok(keystore="sqlite://", max_tenants=0)
    for name in ("", "x" * 256, "e\u0301"):
        with pytest.raises(ConfigurationError, match="name of a tenant"):
            Byok(keystore="sqlite://", single_tenant=name)


@pytest.mark.parametrize(
    "name", ["", "o" * 256, "ü" * 128, "a\x00b", "a\n", "e\u0301", "\ud800", None, 7, b"t1"]
)
def test_names_that_no_tenant_has(ready: Byok, memory: Engine, customer_key: Path, name: Any) -> None:
    """The same refusal wherever a tenant is named; never another tenant, never a driver's error."""
    with pytest.raises(ConfigurationError, match="name of a tenant"):
        ready.onboard(name, LocalKms(customer_key))
    with pytest.raises(ConfigurationError, match="name of a tenant"), ready.tenant(name):
        pass
    with pytest.raises(ConfigurationError, match="name of a tenant"), ready.session(name, memory):
        pass
    assert ready.tenants() == ["t1"]


def test_an_unknown_profile(tmp_path: Path, keystore_reference: str) -> None:
    """A profile that code does not define is named, and nothing is called."""
    byok = Byok(keystore="sqlite://", keystore_key=keystore_reference, kms_profiles={"eu": {}})
    byok.create_keystore()
    with pytest.raises(ConfigurationError, match=r"no KMS profile 'us'; name it in Byok\(kms_profiles=…\)"):
        byok.onboard("t1", AwsKms(ARN, profile="us"))
    assert byok.tenants() == []
    byok.close()


@pytest.fixture
def keystore_reference(tmp_path: Path) -> str:
    (tmp_path / "ks.key").write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
    return f"file:{tmp_path / 'ks.key'}"


class _ForgetfulKms(Kms):
    """A KMS that gives something else back."""

    provider, profile = "local", "default"

    def config(self) -> dict[str, str]:
        return {"path": "/nowhere"}

    def connect(self, settings: Any, operator: Any = None, *, reason: str = "open") -> Any:
        return self

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        return Wrapped(b"wrapped")

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        return bytes(65)


def test_a_key_is_proved_before_anything_is_stored(ready: Byok, tmp_path: Path) -> None:
    """A KMS that does not give back what it was given, or is not there, leaves no tenant."""
    with pytest.raises(WrongKeyError, match="another key than it was given"):
        ready.onboard("t2", _ForgetfulKms())  # type: ignore[abstract]
    with pytest.raises(KeyDeletedError, match="missing"):
        ready.onboard("t2", LocalKms(tmp_path / "nowhere.key"))
    assert ready.tenants() == ["t1"]
    with pytest.raises(UnknownTenantError), ready.tenant("t2"):
        pass


def test_a_keystore_that_was_not_created(customer_key: Path) -> None:
    """The message says what to run."""
    byok = Byok(keystore="sqlite://")
    for work in (
        byok.tenants,
        lambda: byok.onboard("t1", LocalKms(customer_key)),
        byok.tenant("t1").__enter__,
    ):
        with pytest.raises(KeystoreUnavailableError, match=r"create_keystore\(\)"):
            work()
    byok.close()


def test_a_session_needs_an_attached_engine(ready: Byok) -> None:
    """Said before a connection is made or a key opened."""
    engine = create_engine("postgresql+psycopg://nowhere.invalid/x")
    refusal = pytest.raises(NotAttachedError, match=r"Byok\.attach\(\) before you open a session")
    with refusal, ready.session("t1", engine):
        pass
    ready.attach(engine)
    with ready.session("t1", engine):
        pass  # makes no connection either
    engine.dispose()


def test_a_session_takes_what_sessions_take(ready: Byok, memory: Engine) -> None:
    """Options reach Session, the tenant is opened before a connection is taken, and the end closes it."""
    checkouts: list[str] = []
    event.listen(memory, "checkout", lambda *_: checkouts.append("checkout"))
    with ready.session("t1", memory, expire_on_commit=False, autoflush=False) as session:
        assert (session.expire_on_commit, session.autoflush, checkouts) == (False, False, [])
        session.add(Patient(mrn="A"))
        session.commit()
    assert len(checkouts) == 1
    with suppress(ZeroDivisionError), ready.session("t1", memory) as session:
        session.add(Patient(mrn="B"))
        session.flush()
        raise ZeroDivisionError
    with ready.session("t1", memory) as session:
        assert session.scalars(select(Patient.mrn)).all() == ["A"]


def test_the_only_tenant(memory: Engine, customer_key: Path) -> None:
    """single_tenant serves plain sessions, in every thread."""
    byok = Byok(keystore=memory, single_tenant="only")
    byok.create_keystore()
    byok.onboard("only", LocalKms(customer_key))
    byok.attach(memory)
    found: list[str] = []

    def work() -> None:
        with Session(memory) as session:
            session.add(Patient(mrn="A"))
            session.commit()
            found.extend(session.scalars(select(Patient.mrn).where(Patient.mrn == "A")))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == ["A"]
    byok.close()


def test_closing_is_the_end(ready: Byok, memory: Engine) -> None:
    """close() takes the keys away, also within a block; what uses them afterwards is refused."""
    with ready.tenant("t1"):
        ring = ready._keyrings.get("t1")
        ready.close()
        assert (ring.cleared, dict(ring.openers)) == (True, {})
        with pytest.raises(ConfigurationError, match="closed"), memory.begin() as connection:
            connection.execute(insert(Patient).values(mrn="A"))
    with pytest.raises(ConfigurationError, match="closed"), ready.session("t1", memory):
        pass
    with memory.connect() as connection:
        assert connection.execute(select(Patient.id)).all() == []


def test_byok_tells_no_secret(ready: Byok) -> None:
    """Its repr shows no keys, and it does not leave the process."""
    with ready.tenant("t1"):
        assert repr(ready) == "<Byok>"
        for leave in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="Byok holds key material"):
                leave(ready)


def test_errors_of_byok_keep_their_tenant_in_a_task_queue(ready: Byok, customer_key: Path) -> None:
    """What is raised survives pickling, with the tenant it concerns."""
    with pytest.raises(ByokError) as raised:
        ready.onboard("t1", LocalKms(customer_key), revoke_within=5)
    again = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 - made here
    assert (type(again), str(again), again.tenant) == (type(raised.value), str(raised.value), "t1")
