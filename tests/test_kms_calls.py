"""How many calls each operation makes to the customer's KMS, over HTTP, and how soon a "no" bites."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from keys_tools import KEYSTORE_KEY, TurnableClock, hand_in, publish_data_key
from kms_server import KmsServer
from sqlalchemy import Engine, String, create_engine, func, insert, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import (
    AccessDeniedError,
    AwsKms,
    Byok,
    Encrypted,
    KeyDisabledError,
    KeysExpiredError,
    KmsUnavailableError,
)

MANY = 100


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))
    name: Mapped[str | None] = mapped_column(Encrypted(String(50)))


class Customers:
    """Tenants t1 and t2 with an AWS key each, a keystore and a data engine."""

    def __init__(self, server: KmsServer, folder: Path) -> None:
        self.server, self.clock = server, TurnableClock()
        self.keystore = f"sqlite:///{folder / 'keystore.db'}"
        self.profiles = {"default": {"endpoint_url": server.url, "attempts": 1}}
        self.byok = Byok(
            self.keystore,
            keystore_key="env:BYOK_TEST_KEYSTORE_KEY",
            kms_profiles=self.profiles,
            clock=self.clock,
        )
        self.byok.create_keystore()
        self.keys = {tenant: server.create_key() for tenant in ("t1", "t2")}
        self.engine: Engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        Base.metadata.create_all(self.engine)
        self.byok.attach(self.engine)
        for tenant, arn in self.keys.items():
            self.byok.onboard(tenant, AwsKms(arn))

    @property
    def calls(self) -> dict[str, int]:
        return dict(self.server.calls)

    def reset(self) -> None:
        self.server.calls.clear()

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


@pytest.fixture
def customers(kms_server: KmsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Customers]:
    monkeypatch.setenv("BYOK_TEST_KEYSTORE_KEY", base64.b64encode(KEYSTORE_KEY).decode())
    customers = Customers(kms_server, tmp_path)
    yield customers
    customers.close()


def test_onboarding_proves_the_key_and_opens_nothing(customers: Customers) -> None:
    """One Encrypt and one Decrypt a tenant; again, with the same key, none."""
    assert customers.calls == {"Encrypt": 2, "Decrypt": 2}
    customers.byok.onboard("t1", AwsKms(customers.keys["t1"]))
    assert customers.byok.tenants() == ["t1", "t2"]
    assert customers.calls == {"Encrypt": 2, "Decrypt": 2}
    assert {request["EncryptionContext"]["sqla-byok:tenant"] for _, request in customers.server.requests} == {
        "t1",
        "t2",
    }


def test_onboarding_with_a_key_that_says_no_stores_nothing(customers: Customers) -> None:
    """A refused or unanswered proof leaves no tenant behind, and the next try starts afresh."""
    arn = customers.server.create_key()
    customers.server.deny(arn)
    with pytest.raises(AccessDeniedError):
        customers.byok.onboard("t3", AwsKms(arn))
    customers.server.allow(arn)
    customers.server.fail("Decrypt", "KMSInternalException", 500)
    with pytest.raises(KmsUnavailableError):
        customers.byok.onboard("t3", AwsKms(arn))
    assert customers.byok.tenants() == ["t1", "t2"]
    customers.byok.onboard("t3", AwsKms(arn))
    assert customers.byok.tenants() == ["t1", "t2", "t3"]


def test_ten_thousand_rows_cost_one_call(customers: Customers) -> None:
    """Cold exactly one Decrypt; writing, reading, searching, refreshing and flushing any number of rows none more."""
    customers.reset()
    rows = [{"mrn": f"A-{n}", "name": f"Ada {n}"} for n in range(10_000)]
    with customers.byok.session("t1", customers.engine) as session:
        assert customers.calls == {"Decrypt": 1}
        session.execute(insert(Patient), rows)
        session.add(Patient(mrn="B-1", name=None))
        session.commit()
    with customers.byok.session("t1", customers.engine) as session:
        found = session.scalars(select(Patient)).all()
        assert len(found) == 10_001
        assert {(p.mrn, p.name) for p in found} == {("B-1", None)} | {(r["mrn"], r["name"]) for r in rows}
        assert session.scalars(select(Patient.name).where(Patient.mrn == "A-77")).all() == ["Ada 77"]
        assert session.scalars(select(Patient.id).where(Patient.mrn.in_(["A-1", "B-1", "C"]))).all() != []
        session.refresh(found[0])
        found[1].mrn = "C-1"
        session.flush()
    assert customers.calls == {"Decrypt": 1}
    customers.clock.turn(299)
    with customers.byok.tenant("t1"):
        pass
    assert customers.calls == {"Decrypt": 1}


def test_statements_without_encrypted_values_call_nobody(customers: Customers) -> None:
    """Without a tenant no KMS is asked, whatever is counted or deleted."""
    customers.reset()
    with Session(customers.engine) as session:
        assert session.scalar(select(func.count(Patient.id))) == 0
    assert customers.calls == {}


@pytest.mark.parametrize("tenants", [["t1"], ["t1", "t2"]])
def test_a_hundred_threads_share_one_call(customers: Customers, tenants: list[str]) -> None:
    """Threads that meet a cold tenant at once ask the KMS once a tenant."""
    customers.reset()
    customers.server.delay = 0.3
    meeting = threading.Barrier(MANY)

    def work(number: int) -> int | None:
        meeting.wait(20)
        tenant = tenants[number % len(tenants)]
        with customers.byok.tenant(tenant), Session(customers.engine) as session:
            return session.scalar(select(func.count()).where(Patient.mrn == "A"))

    with ThreadPoolExecutor(MANY) as pool:
        assert list(pool.map(work, range(MANY))) == [0] * MANY
    assert customers.calls == {"Decrypt": len(tenants)}


async def test_a_hundred_tasks_share_one_call(customers: Customers) -> None:
    """The same for asyncio tasks, with no blocking call in the event loop (blockbuster watches)."""
    customers.reset()
    customers.server.delay = 0.3

    async def work() -> None:
        async with customers.byok.tenant("t1"):
            pass

    await asyncio.gather(*(work() for _ in range(MANY)))
    assert customers.calls == {"Decrypt": 1}


async def test_threads_and_tasks_share_one_call(customers: Customers) -> None:
    """A thread and a task that meet wait for the same answer."""
    customers.reset()
    customers.server.delay = 0.3

    def in_thread() -> None:
        with customers.byok.tenant("t1"):
            pass

    async def in_task() -> None:
        async with customers.byok.tenant("t1"):
            pass

    await asyncio.gather(*(asyncio.to_thread(in_thread) for _ in range(3)), *(in_task() for _ in range(3)))
    assert customers.calls == {"Decrypt": 1}


async def test_an_asyncio_statement_opens_its_tenant_once(customers: Customers, tmp_path: Path) -> None:
    """A statement that meets a cold tenant inside the driver's greenlet opens it, with one call."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'data.db'}")
    customers.byok.attach(engine)
    customers.reset()
    async with engine.execution_options(byok_tenant="t1").connect() as connection:
        await connection.execute(insert(Patient).values(mrn="A", name="Ada"))
        assert (await connection.scalars(select(Patient.name).where(Patient.mrn == "A"))).all() == ["Ada"]
    assert customers.calls == {"Decrypt": 1}
    await engine.dispose()


def test_a_disabled_key_bites_at_the_deadline(customers: Customers) -> None:
    """At it, at the latest, every statement is refused and rows that are still read stop."""
    with customers.byok.session("t1", customers.engine) as session:
        session.add_all([Patient(mrn=f"A-{n}", name="Ada") for n in range(10)])
        session.commit()
    customers.server.disable(customers.keys["t1"])
    customers.reset()
    with customers.byok.session("t1", customers.engine) as session:
        partitions = session.scalars(select(Patient.name).execution_options(yield_per=2)).partitions()
        assert next(partitions) == ["Ada"] * 2
        customers.clock.turn(299)
        assert next(partitions) == ["Ada"] * 2
        # It was asked for in the background, from half of the time on; that is a refusal already.
        customers.byok._keyrings.drain()
        assert customers.calls == {"Decrypt": 1}
        with pytest.raises(KeysExpiredError):
            next(partitions)
    for _ in range(2):
        with pytest.raises(KeyDisabledError) as raised, customers.byok.session("t1", customers.engine):
            pass
        assert (raised.value.tenant, raised.value.action_by, raised.value.retryable) == (
            "t1",
            "customer",
            False,
        )
    with customers.byok.session("t2", customers.engine) as session:
        assert session.scalars(select(Patient.name).where(Patient.mrn == "A-1")).all() == []
    customers.server.enable(customers.keys["t1"])
    customers.clock.turn(1)  # after three refusals in a row the KMS is left alone for a second
    with customers.byok.session("t1", customers.engine) as session:
        assert len(session.scalars(select(Patient.name)).all()) == 10


def test_a_session_that_lives_past_the_deadline_asks_again(customers: Customers) -> None:
    """It is the statement that is checked, not only the entering of a block."""
    with customers.byok.session("t1", customers.engine) as session:
        session.add(Patient(mrn="A", name="Ada"))
        session.commit()
        customers.reset()
        customers.clock.turn(300)
        assert session.scalars(select(Patient.name)).all() == ["Ada"]
        assert customers.calls == {"Decrypt": 1}
        customers.server.disable(customers.keys["t1"])
        customers.clock.turn(300)
        with pytest.raises(KeyDisabledError):
            session.scalars(select(Patient.name)).all()
        session.add(Patient(mrn="B", name="Bob"))
        with pytest.raises(KeyDisabledError):
            session.flush()
        session.rollback()
    with customers.engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Patient)) == 1


def test_a_new_generation_costs_no_call(customers: Customers) -> None:
    """Data keys are sealed under the tenant key: a change in the keystore needs no KMS."""
    with customers.byok.session("t1", customers.engine) as session:
        session.add(Patient(mrn="A", name="Ada"))
        session.commit()
    hand = hand_in(customers.keystore)
    publish_data_key(hand, "t1", KEYSTORE_KEY, customers.profiles["default"])
    hand.dispose()
    customers.reset()
    customers.clock.turn(3)
    with customers.byok.session("t1", customers.engine) as session:
        session.add(Patient(mrn="B", name="Bob"))
        session.commit()
        assert sorted(session.scalars(select(Patient.name))) == ["Ada", "Bob"]
    assert customers.calls == {}


def test_tenants_of_one_region_share_one_client(
    customers: Customers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A boto3 client takes megabytes: a thousand tenants must not hold a thousand of them."""
    from boto3.session import Session as Boto3Session

    made: list[str] = []
    original = Boto3Session.client

    def client(self: Boto3Session, *args: object, **kwargs: object) -> object:
        made.append("client")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Boto3Session, "client", client)
    other = Byok("sqlite://", keystore_key="env:BYOK_TEST_KEYSTORE_KEY", kms_profiles=customers.profiles)
    other.create_keystore()
    for number in range(20):
        other.onboard(f"org-{number}", AwsKms(customers.server.create_key()))
    other.close()
    assert len(made) <= 1
