"""The promise to customers: after a "no" nothing is readable beyond revoke_within, in each way to say it.

docs/revocation.md shows the tables below; the last tests hold the page to them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import pytest
from azure.identity import ClientSecretCredential
from keys_tools import TurnableClock, in_child, insert_patient, names, patient, until
from relay import Relay
from sqlalchemy import Engine, String, Text, TypeDecorator, create_engine, insert, select, update
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import (
    AccessDeniedError,
    AwsKms,
    AzureKeyVault,
    Byok,
    CredentialExpiredError,
    CredentialInvalidError,
    Encrypted,
    KeyDeletedError,
    KeyDisabledError,
    KeysExpiredError,
    KmsBlockedError,
    KmsError,
    KmsUnavailableError,
    ThrottledError,
)
from sqla_byok.audit import Event, KeyStateChanged, KmsCalled
from sqla_byok.keys.clock import SystemClock
from sqla_byok.keys.direct import AT_ONCE
from sqla_byok.keys.keyring import Keyring
from sqla_byok.kms import Kms
from sqla_byok.testing import FakeKms, KmsServers
from sqla_byok.testing.aws import AwsServer
from sqla_byok.testing.azure import _make_tls

REVOKE_WITHIN, GRACE = 60, 40
LONGEST_BACK_OFF = 15
PAGE = (Path(__file__).parent.parent / "docs" / "revocation.md").read_text(encoding="utf-8")

VENDOR_ID, VENDOR_SECRET = "0a0a0a0a-0000-4000-8000-0b0b0b0b0b0b", "Ven8Q~made-up-vendor-secret"


class No(NamedTuple):
    """A way to say no: whose key, how, what is raised first, and who has to act."""

    kind: str
    how: str
    error: type[KmsError]
    action_by: str


NOES = [
    No("aws", "disable", KeyDisabledError, "customer"),
    No("aws", "delete", KeyDeletedError, "customer"),
    No("aws", "deny", AccessDeniedError, "customer"),
    No("aws-role", "disable", KeyDisabledError, "customer"),
    No("aws-role", "delete", KeyDeletedError, "customer"),
    No("aws-role", "deny", AccessDeniedError, "customer"),
    No("aws-role", "deny-role", AccessDeniedError, "customer"),
    No("aws-role", "distrust-role", AccessDeniedError, "customer"),
    No("aws-role", "delete-role", AccessDeniedError, "customer"),
    No("azure", "disable", KeyDisabledError, "customer"),
    No("azure", "delete", KeyDeletedError, "customer"),
    No("azure", "deny", AccessDeniedError, "customer"),
    No("azure", "delete-secret", CredentialInvalidError, "customer"),
    No("azure", "expire-secret", CredentialExpiredError, "customer"),
    No("azure", "delete-application", CredentialInvalidError, "customer"),
    No("azure-vendor", "disable", KeyDisabledError, "customer"),
    No("azure-vendor", "delete", KeyDeletedError, "customer"),
    No("azure-vendor", "deny", AccessDeniedError, "customer"),
    No("azure-vendor", "withdraw-consent", CredentialInvalidError, "customer"),
    No("azure-vendor", "vendor-secret", CredentialExpiredError, "operator"),
]


class Silence(NamedTuple):
    """A way not to answer: of which cloud, how, what is raised when the time is up, and whether grace is given."""

    cloud: str
    how: str
    error: type[KmsError]
    graced: bool


SILENCES = [
    Silence("aws", "refused", KmsUnavailableError, True),
    Silence("aws", "hanging", KmsUnavailableError, True),
    Silence("aws", "fault", KmsUnavailableError, True),
    Silence("aws", "throttled", ThrottledError, True),
    Silence("aws", "unknown-host", KmsUnavailableError, False),
    Silence("aws", "tls", KmsUnavailableError, False),
    Silence("azure", "refused", KmsUnavailableError, True),
    Silence("azure", "hanging", KmsUnavailableError, True),
    Silence("azure", "fault", KmsUnavailableError, True),
    Silence("azure", "throttled", ThrottledError, True),
    Silence("azure", "firewall", KmsBlockedError, True),
    Silence("azure", "unknown-host", KmsUnavailableError, False),
    Silence("azure", "tls", KmsUnavailableError, False),
]

each_no = pytest.mark.parametrize("no", NOES, ids=[f"{each.kind}/{each.how}" for each in NOES])
each_silence = pytest.mark.parametrize(
    "silence", SILENCES, ids=[f"{each.cloud}/{each.how}" for each in SILENCES]
)


class Customer:
    """A customer with a key of one of the kinds."""

    def __init__(self, servers: KmsServers, kind: str) -> None:
        self.servers, self.kind = servers, kind
        self.kms: Kms
        if kind != "azure-vendor":
            self.kms = servers.key(kind)
            return
        servers.azure.add_application(VENDOR_ID, VENDOR_SECRET)
        self.url = servers.azure.create_key()
        self.kms = AzureKeyVault(self.url, tenant_id=servers.azure.directory, credential="vendor-app")

    def say_no(self, how: str) -> None:
        if self.kind != "azure-vendor":
            self.servers.revoke(self.kms, how)
            return
        azure = self.servers.azure
        {
            "disable": lambda: azure.disable(self.url),
            "delete": lambda: azure.delete(self.url),
            "deny": lambda: azure.deny(self.url, by="rbac"),
            "withdraw-consent": lambda: azure.delete_application(VENDOR_ID),
            "vendor-secret": lambda: azure.expire_secret(VENDOR_ID),
        }[how]()

    def take_it_back(self) -> None:
        if self.kind != "azure-vendor":
            self.servers.restore(self.kms)
            return
        azure = self.servers.azure
        azure.enable(self.url)
        azure.recover(self.url)
        azure.allow(self.url)
        azure.add_application(VENDOR_ID, VENDOR_SECRET)


class Service:
    """An application on SQLite; another one over the same files is another process."""

    def __init__(self, folder: Path, clock: Any, options: dict[str, Any], engine: Any = None) -> None:
        self.clock, self.events = clock, list[Event]()
        self.byok = Byok(
            f"sqlite:///{folder / 'keystore.db'}", clock=clock, on_event=self.events.append, **options
        )
        self.byok.create_keystore()
        self.engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        patient.metadata.create_all(self.engine)
        self.byok.attach(self.engine if engine is None else engine)

    def onboard(self, tenant: str, kms: Kms, rows: int = 1, **options: Any) -> None:
        self.byok.onboard(tenant, kms, **{"revoke_within": REVOKE_WITHIN, **options})
        with self.engine.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert_patient, [{"name": f"{tenant} {n}"} for n in range(rows)])
        self.byok.forget_keys()

    def read(self, tenant: str = "t1") -> str:
        try:
            return self._read(tenant)
        except (
            KeysExpiredError
        ):  # the refusal came while this statement was under way; run again, it is named
            return self._read(tenant)

    def _read(self, tenant: str) -> str:
        with self.engine.execution_options(byok_tenant=tenant).connect() as connection:
            found: str = connection.scalars(names.where(patient.c.id == self.id_of(tenant))).one()
            return found

    @staticmethod
    def id_of(tenant: str) -> int:
        return int(tenant.removeprefix("t"))

    def use(self, seconds: float, *tenants: str) -> None:
        """Read each second."""
        for _ in range(int(seconds)):
            for tenant in tenants or ("t1",):
                self.read(tenant)
            self.byok._keyrings.drain()
            self.clock.turn(1)

    def use_until_refused(self, tenant: str = "t1", limit: float = 1_000) -> tuple[float, KmsError]:
        """Read each second until it is refused; gives when it was read last, and the refusal."""
        last, end = 0.0, self.clock.boot_now + limit
        while self.clock.boot_now < end:
            try:
                self.read(tenant)
            except KmsError as error:
                return last, error
            last = self.clock.boot_now
            self.byok._keyrings.drain()
            self.clock.turn(1)
        pytest.fail(f"read for {limit} seconds")

    def refuses(self, seconds: float, error: type[KmsError], tenant: str = "t1") -> None:
        """Try each second, in vain."""
        for _ in range(int(seconds)):
            with pytest.raises(error):
                self.read(tenant)
            self.clock.turn(1)

    def comes_back(self, tenant: str = "t1") -> None:
        """It is read again once the breaker lets a call through."""
        for _ in range(LONGEST_BACK_OFF + 1):
            try:
                assert self.read(tenant) == f"{tenant} 0"
            except KmsError:
                self.clock.turn(1)
            else:
                return
        pytest.fail("not read again")

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


@pytest.fixture
def clock() -> TurnableClock:
    return TurnableClock()


@pytest.fixture
def options(byok_kms_server: KmsServers) -> dict[str, Any]:
    servers = byok_kms_server

    def vendor_credential(directory: str) -> Any:
        return ClientSecretCredential(
            directory,
            VENDOR_ID,
            VENDOR_SECRET,
            authority=f"https://{servers.azure.authority}",
            disable_instance_discovery=True,
            connection_verify=servers.azure.ca_file,
            retry_total=0,
        )

    return {**servers.options, "credentials": {"vendor-app": vendor_credential}}


@pytest.fixture
def service(tmp_path: Path, clock: TurnableClock, options: dict[str, Any]) -> Iterator[Service]:
    service = Service(tmp_path, clock, options)
    yield service
    service.close()


def check(no: No, refusal: KmsError) -> None:
    assert (type(refusal), refusal.tenant, refusal.action_by) == (no.error, "t1", no.action_by)
    assert not refusal.retryable


# -- "no" ------------------------------------------------------------------------------------------------------------


def test_every_way_of_the_servers_is_here() -> None:
    """A way to say no that the servers learn is not left out of the proof."""
    ways = {(kind, how) for kind, ways in KmsServers.ways.items() for how in ways}
    assert ways == {(no.kind, no.how) for no in NOES if no.kind != "azure-vendor"}


@pytest.mark.parametrize("used_for", [0, 50])
@each_no
def test_a_tenant_in_use(service: Service, byok_kms_server: KmsServers, no: No, used_for: int) -> None:
    """Denied at t: read no later than t + revoke_within, then refused by name, and back when the customer says yes."""
    customer = Customer(byok_kms_server, no.kind)
    service.onboard("t1", customer.kms)
    service.use(used_for)
    service.read()
    denied = service.clock.boot_now
    customer.say_no(no.how)
    last, refusal = service.use_until_refused()
    assert last <= denied + REVOKE_WITHIN
    check(no, refusal)
    service.refuses(REVOKE_WITHIN, no.error)
    customer.take_it_back()
    service.comes_back()


@each_no
def test_an_idle_tenant_that_returns(service: Service, byok_kms_server: KmsServers, no: No) -> None:
    """Keys that nobody used are as dead: at t + revoke_within the first statement is refused, by name."""
    customer = Customer(byok_kms_server, no.kind)
    service.onboard("t1", customer.kms)
    service.read()
    ring = service.byok._keyrings.get("t1")
    customer.say_no(no.how)
    service.clock.turn(REVOKE_WITHIN)
    with pytest.raises(KmsError) as raised:
        service.read()
    check(no, raised.value)
    assert ring.cleared
    service.refuses(REVOKE_WITHIN, no.error)


@each_no
def test_a_long_result(service: Service, byok_kms_server: KmsServers, no: No) -> None:
    """Rows that are still being read stop by then, too; what was not decrypted stays dark."""
    customer = Customer(byok_kms_server, no.kind)
    service.onboard("t1", customer.kms, rows=200)
    with service.engine.execution_options(byok_tenant="t1", yield_per=1).connect() as connection:
        rows = iter(connection.execute(names))
        next(rows)
        denied = last = service.clock.boot_now
        customer.say_no(no.how)
        with pytest.raises(KeysExpiredError):  # noqa: PT012 - whichever row it is
            for _ in rows:
                last = service.clock.boot_now
                service.byok._keyrings.drain()
                service.clock.turn(1)
        assert denied < last <= denied + REVOKE_WITHIN
    with pytest.raises(KmsError) as raised:
        service.read()
    check(no, raised.value)


@each_no
def test_several_processes(
    tmp_path: Path, service: Service, options: dict[str, Any], byok_kms_server: KmsServers, no: No
) -> None:
    """Each process hears it for itself, whenever it opened the tenant; the last within revoke_within."""
    customer = Customer(byok_kms_server, no.kind)
    service.onboard("t1", customer.kms)
    service.use(25)
    other = Service(tmp_path, service.clock, options)
    other.read()
    denied = service.clock.boot_now
    customer.say_no(no.how)
    last: dict[Service, float] = {}
    refused: dict[Service, KmsError] = {}
    for _ in range(2 * REVOKE_WITHIN):
        for each in (service, other):
            try:
                each.read()
                assert each not in refused
                last[each] = service.clock.boot_now
            except KmsError as error:
                refused.setdefault(each, error)
        for each in (service, other):
            each.byok._keyrings.drain()
        service.clock.turn(1)
    assert max(last.values()) <= denied + REVOKE_WITHIN
    for each in (service, other):
        check(no, refused[each])
    other.close()


@each_no
def test_each_unit_of_work_asks(service: Service, byok_kms_server: KmsServers, no: No) -> None:
    """With revoke_within=0 the next transaction is refused already."""
    customer = Customer(byok_kms_server, no.kind)
    service.onboard("t1", customer.kms, revoke_within=0)
    assert service.read() == "t1 0"
    customer.say_no(no.how)
    with pytest.raises(KmsError) as raised:
        service.read()
    check(no, raised.value)


@pytest.mark.parametrize(
    "no", [no for no in NOES if no[:2] in {("aws-role", "delete-role"), ("azure", "delete-secret")}]
)
async def test_asyncio(
    tmp_path: Path, clock: TurnableClock, options: dict[str, Any], byok_kms_server: KmsServers, no: No
) -> None:
    """The same over an async engine, and nothing blocks the event loop meanwhile."""
    customer = Customer(byok_kms_server, no.kind)
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'data.db'}")
    service = await asyncio.to_thread(Service, tmp_path, clock, options)
    service.byok.attach(engine)
    await asyncio.to_thread(service.onboard, "t1", customer.kms)

    async def read() -> Any:
        async with engine.execution_options(byok_tenant="t1").connect() as connection:
            return (await connection.scalars(names)).all()

    assert await read() == ["t1 0"]
    denied = last = clock.boot_now
    customer.say_no(no.how)
    with pytest.raises(KmsError) as raised:  # noqa: PT012 - whichever read it is
        for _ in range(2 * REVOKE_WITHIN):
            with suppress(KeysExpiredError):  # the refusal came while this statement was under way
                await read()
                last = clock.boot_now
            await asyncio.to_thread(service.byok._keyrings.drain)
            clock.turn(1)
    check(no, raised.value)
    assert denied < last <= denied + REVOKE_WITHIN
    for _ in range(REVOKE_WITHIN):
        clock.turn(1)
        with pytest.raises(no.error):
            await read()
    await engine.dispose()
    await service.byok.aclose()
    service.close()


# -- no answer -------------------------------------------------------------------------------------------------------


class Wire:
    """A wire to one of the clouds that can be cut, and a key behind it."""

    def __init__(self, servers: KmsServers, aws: AwsServer, ca_file: str, cloud: str) -> None:
        self.servers, self.aws, self.cloud = servers, aws, cloud
        self.target = int(aws.url.rpartition(":")[2]) if cloud == "aws" else servers.azure.port
        self.relay = Relay(self.target)
        address = f"localhost:{self.relay.port}"
        self.kms: Kms
        self.profile: dict[str, Any]
        if cloud == "aws":
            self.profile = {"endpoint_url": f"https://{address}", "ca_file": ca_file}
            self.kms = AwsKms(servers.aws.create_key(), profile="cut")
        else:
            key = servers.azure_key()
            self.profile = {**servers.azure.profile(), "hosts": [address], "authority": address}
            self.kms = AzureKeyVault(
                key.key_url.replace(f":{self.target}/", f":{self.relay.port}/"),
                tenant_id=key.tenant_id,
                client_id=key.client_id,
                client_secret=key.client_secret,
                profile="cut",
            )

    def fail(self, code: str, status: int) -> None:
        if self.cloud == "aws":
            self.aws.fail("Decrypt", code, status, times=1_000)
        else:
            self.servers.azure.fail("decrypt", code, status, times=1_000)

    def silence(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        azure = self.servers.azure
        {
            "refused": self.relay.refuse,
            "hanging": self.relay.hang,
            "fault": lambda: self.fail("InternalFailure", 503),
            "throttled": lambda: self.fail("ThrottlingException", 429),
            "firewall": lambda: setattr(azure, "firewall", True),
            "unknown-host": lambda: self.forget_the_name(monkeypatch),
            "tls": lambda: self.relay.lead_to(int(self.servers.aws.url.rpartition(":")[2])),  # no TLS there
        }[how]()

    def forget_the_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = socket.getaddrinfo

        def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if port == self.relay.port:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return original(host, port, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        self.relay.cut()

    def mend(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        self.servers.azure.firewall = False
        for server in (self.aws, self.servers.azure):
            server._faults.clear()
        if how == "refused":
            self.relay.accept()
        self.relay.go_on()
        self.relay.lead_to(self.target)


@pytest.fixture(scope="module")
def aws_by_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AwsServer, str]]:
    folder = tmp_path_factory.mktemp("aws-tls")
    with AwsServer(_make_tls(folder)) as server:
        yield server, str(folder / "ca.pem")


@pytest.fixture
def wire_to(
    byok_kms_server: KmsServers, aws_by_tls: tuple[AwsServer, str]
) -> Iterator[Callable[[str], Wire]]:
    wires: list[Wire] = []

    def make(cloud: str) -> Wire:
        wire = Wire(byok_kms_server, *aws_by_tls, cloud)
        wire.relay.__enter__()
        wires.append(wire)
        return wire

    yield make
    for wire in wires:
        wire.relay.__exit__(None, None, None)


def profiles(options: dict[str, Any], wire: Wire, **settings: Any) -> dict[str, Any]:
    """The options, with a profile that leads through the wire."""
    return {
        **options,
        "kms_profiles": {**options["kms_profiles"], "cut": {**wire.profile, "attempts": 1, **settings}},
    }


@pytest.mark.parametrize("used", ["throughout", "until it was asked", "before"])
@each_silence
def test_silence(
    tmp_path: Path,
    clock: TurnableClock,
    options: dict[str, Any],
    wire_to: Callable[[str], Wire],
    monkeypatch: pytest.MonkeyPatch,
    silence: Silence,
    used: str,
) -> None:
    """A KMS that was asked in vain is trusted until the deadline, and outage_grace more; not a second longer."""
    wire = wire_to(silence.cloud)
    timeout = 0.5 if silence.how == "hanging" else 10
    service = Service(tmp_path, clock, profiles(options, wire, read_timeout=timeout, connect_timeout=timeout))
    service.onboard("t1", wire.kms, outage_grace=GRACE)
    opened = clock.boot_now
    service.read()
    service.use(10)
    wire.silence(silence.how, monkeypatch)
    graced = silence.graced and used != "before"
    end = opened + REVOKE_WITHIN + (GRACE if graced else 0)
    if used == "until it was asked":
        service.use(40)
        clock.turn(end - 1 - clock.boot_now)
        assert service.read() == "t1 0"
        service.byok._keyrings.drain()
    if used != "throughout":
        clock.turn(end - clock.boot_now)
    last, refusal = service.use_until_refused()
    assert last == (end - 1 if used == "throughout" else 0)
    assert clock.boot_now == end
    assert (type(refusal), refusal.tenant, refusal.action_by) == (silence.error, "t1", "operator")
    assert refusal.retryable == silence.graced
    service.refuses(5, silence.error)
    wire.mend(silence.how, monkeypatch)
    service.comes_back()
    service.close()


@pytest.mark.parametrize("cloud", ["aws", "azure"])
def test_neighbours_of_a_dead_vault(
    tmp_path: Path,
    clock: TurnableClock,
    options: dict[str, Any],
    wire_to: Callable[[str], Wire],
    byok_kms_server: KmsServers,
    cloud: str,
) -> None:
    """While one vault holds its answers back, the others' statements wait for nothing and ask no more than they would.

    Counted, not timed: all that the neighbours do is done while the answer is held, and then it is let go.
    """
    wire = wire_to(cloud)
    service = Service(tmp_path, clock, profiles(options, wire, read_timeout=300, connect_timeout=300))
    service.onboard("t1", wire.kms, outage_grace=GRACE)
    service.onboard("t2", byok_kms_server.key("aws"))
    service.onboard("t3", byok_kms_server.key("azure"))
    for tenant in ("t1", "t2", "t3"):
        service.read(tenant)
    rings = service.byok._keyrings
    service.use(10, "t1", "t2", "t3")
    wire.relay.hang()
    clock.turn(36)  # t1's refresh is due
    service.events.clear()

    def neighbours() -> int:
        read = 0
        for _ in range(5 * REVOKE_WITHIN):
            for tenant in ("t2", "t3"):
                assert service.read(tenant) == f"{tenant} 0"
                read += 1
            while any(ring.lease.refreshing for ring in list(rings._rings.values()) if ring.tenant != "t1"):
                pass
            clock.turn(1)
        return read

    with ThreadPoolExecutor(20) as pool:
        try:
            service.read("t1")
            assert wire.relay.held.wait(30)
            rings.forget("t1")
            stuck = [pool.submit(service.read, "t1") for _ in range(10)]
            while service.byok.status().waiting < 9:
                pass
            assert pool.submit(neighbours).result(60) == 2 * 5 * REVOKE_WITHIN
            assert not any(each.done() for each in stuck)
        finally:
            wire.relay.go_on()
        assert [type(each.exception()) for each in stuck] == [
            KmsUnavailableError
        ] * 10  # older than the keys may be
    calls = Counter(
        event.tenant for event in service.events if isinstance(event, KmsCalled) and event.tenant != "t1"
    )
    assert set(calls) == {"t2", "t3"}
    assert max(calls.values()) <= 5 / 0.5 + 1
    service.close()


# -- wherever the process is -----------------------------------------------------------------------------------------

PLACES: list[str] = []
Test = TypeVar("Test", bound=Callable[..., object])


def place(name: str) -> Callable[[Test], Test]:
    """A row of the page's table, which the test proves."""
    PLACES.append(name)
    return lambda test: test


def with_forks(test: Test) -> Test:
    """For a test that forks."""
    # Threads are running, which is the point.
    test = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")(test)
    return cast(
        "Test", pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no os.fork")(test)
    )


@pytest.fixture
def idle(service: Service, byok_kms_server: KmsServers) -> Keyring:
    """The keys of a tenant that was used once; its customer has disabled its key since. They have a grace, which is
    not for that."""
    customer = Customer(byok_kms_server, "aws")
    service.onboard("t1", customer.kms, rows=3, outage_grace=1_800)
    service.read()
    customer.say_no("disable")
    return service.byok._keyrings.get("t1")


def go(service: Service, idle: Keyring) -> None:
    """At the deadline the keys go, though nobody asks for the tenant; and who asks then is refused."""
    assert not idle.cleared
    service.clock.turn(REVOKE_WITHIN)
    until(lambda: idle.cleared)
    with pytest.raises(KeyDisabledError):
        service.read()


@place("idle, with outage_grace")
def test_the_grace_prolongs_nothing_by_itself(service: Service, idle: Keyring) -> None:
    """An agreed grace is for outages: with a KMS that would answer, idle keys go at the deadline."""
    go(service, idle)


@place("forked")
@with_forks
@pytest.mark.parametrize("how", ["a child", "a child's child", "from a thread", "parent and child"])
def test_a_forked_process(service: Service, idle: Keyring, how: str) -> None:
    """A fork takes the threads from the child, and leaves it the keys: they go there as they do in its parent."""

    def child() -> None:
        go(service, idle)

    def grandchild() -> None:
        assert in_child(child) == 0
        assert not idle.cleared
        child()

    if how == "from a thread":
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(in_child, child).result() == 0
    else:
        assert in_child(grandchild if how == "a child's child" else child) == 0
    assert not idle.cleared
    if how == "parent and child":
        go(service, idle)


@with_forks
def test_a_forked_process_without_keys(service: Service) -> None:
    """No thread is begun in children that have no keys to take away; the first keys that they open begin it."""

    def child() -> None:
        # its own: whatever another test has left open may have keys to take away
        assert service.byok._keyrings._sweeper is None

    assert in_child(child) == 0


@place("stopped and continued")
@with_forks
@pytest.mark.parametrize("reading", [True, False], ids=["in the middle of a result", "idle"])
def test_a_stopped_process(
    tmp_path: Path, options: dict[str, Any], byok_kms_server: KmsServers, service: Service, reading: bool
) -> None:
    """Time goes on while a process is stopped: what it was reading ends when it goes on, and idle keys go."""
    customer = Customer(byok_kms_server, "aws")
    service.onboard("t1", customer.kms, rows=3, revoke_within=3, outage_grace=60)
    began, go_on = os.pipe(), os.pipe()

    def stopped_here() -> None:
        os.write(began[1], b".")
        os.read(go_on[0], 1)

    def child() -> None:
        own = Service(tmp_path, SystemClock(), options)
        if reading:
            with own.engine.execution_options(byok_tenant="t1", yield_per=1).connect() as connection:
                rows = iter(connection.execute(names))
                next(rows)
                stopped_here()
                with pytest.raises(KeysExpiredError):
                    next(rows)
        else:
            own.read()
            ring = own.byok._keyrings.get("t1")
            stopped_here()
            until(lambda: ring.cleared)
        with pytest.raises(KeyDisabledError):
            own.read()

    def stop_and_continue() -> None:
        assert os.read(began[0], 1), "the child has ended"
        os.kill(children[0], signal.SIGSTOP)
        customer.say_no("disable")
        deadline = SystemClock.boot() + 3
        until(lambda: SystemClock.boot() > deadline)
        os.write(go_on[1], b".")
        os.kill(children[0], signal.SIGCONT)

    children: list[int] = []

    def started(pid: int) -> None:
        os.close(began[1])
        children.append(pid)

    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop_and_continue)
        assert in_child(child, started) == 0
        stopped.result(30)
    for end in (began[0], *go_on):
        os.close(end)


@place("suspended")
@pytest.mark.parametrize("counted_by", ["boot_now", "wall_now"])
def test_a_suspended_machine(service: Service, idle: Keyring, counted_by: str) -> None:
    """Time goes on while a machine sleeps or a virtual one stands still, though only one of the clocks may tell."""
    with service.engine.execution_options(byok_tenant="t1", yield_per=1).connect() as connection:
        rows = iter(connection.execute(names))
        next(rows)
        setattr(service.clock, counted_by, getattr(service.clock, counted_by) + REVOKE_WITHIN)
        with pytest.raises(KeysExpiredError):
            next(rows)
    until(lambda: idle.cleared)
    with pytest.raises(KeyDisabledError):
        service.read()


@place("a listener raises")
@pytest.mark.parametrize(
    "error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
@pytest.mark.parametrize("where", ["on_event", "log"])
def test_a_listener_that_raises(
    service: Service, byok_kms_server: KmsServers, error: type[BaseException], where: str
) -> None:
    """Whatever an application's listener or its log raises when keys go: the others go too, and those of later."""
    for tenant in ("t1", "t2", "t3"):
        service.onboard(tenant, byok_kms_server.key("aws"))
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, KeyStateChanged) and event.after == "closed":
            told.append(event.tenant)
            raise error

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if event := getattr(record, "event", None):
                listen(event)
            elif "listener" in record.msg or "out of memory" in record.msg:
                raise error

    log, handler = logging.getLogger("sqla_byok.audit"), Log()
    if where == "on_event":
        service.byok._audit.listeners.append(listen)
    else:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        for tenants in (["t1", "t2"], ["t1", "t2", "t3"]):
            told.clear()
            rings = [(service.read(tenant), service.byok._keyrings.get(tenant))[1] for tenant in tenants]
            service.clock.turn(REVOKE_WITHIN)
            until(lambda rings=rings: all(ring.cleared for ring in rings))
            until(lambda tenants=tenants: sorted(told) == tenants)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


# -- in the middle of a result ---------------------------------------------------------------------------------------


class Slow(TypeDecorator[str]):
    """Text that the application makes something of, which may take any time."""

    impl = String
    cache_ok = True
    meanwhile: ClassVar[Callable[[], object]] = staticmethod(lambda: None)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        type(self).meanwhile()
        return value


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(Encrypted(String(40)))
    scan: Mapped[str | None] = mapped_column(Encrypted(Slow(40)))
    draft: Mapped[str | None] = mapped_column(Encrypted(Text))
    ssn: Mapped[str | None] = mapped_column(Encrypted(String(20), mode="direct"), deferred=True)


letter: Any = Letter.__table__


class Reading:
    """A tenant's letters, and when each value of them is opened.

    The customer says no after the last "yes". The call that would tell it is under way and hangs, so that nothing but
    the clocks ends what is being read; a grace was agreed, which is not for that.
    """

    def __init__(self, service: Service, engine: Any, takes: float = 0.0) -> None:
        self.service, self.clock, self.engine, self.takes = service, service.clock, engine, takes
        self.kms, self.opened, self._go_on = FakeKms("letters"), list[float](), threading.Event()
        self.kms.reset()
        service.byok.onboard("t1", self.kms, revoke_within=REVOKE_WITHIN, outage_grace=1_800)
        ring = service.byok._keyrings.get("t1")
        ring.openers = {
            header: (self._noting(decrypt), aad) for header, (decrypt, aad) in ring.openers.items()
        }
        self.ends = self.clock.boot_now + REVOKE_WITHIN

    def _noting(self, decrypt: Callable[..., bytes]) -> Callable[..., bytes]:
        def noted(*args: Any) -> bytes:
            self.opened.append(self.clock.boot_now)
            self.clock.turn(self.takes)
            return decrypt(*args)

        return noted

    def say_no(self) -> None:
        """From now on; and nobody hears of it."""
        self.kms.disable()
        self.kms.latency(lambda: self._go_on.wait(30))

    def check(self, at_least: int, at_most: int) -> None:
        """Of the values some were opened, none of them too late; and what is asked for anew is refused."""
        assert at_least <= len(self.opened) <= at_most
        assert max(self.opened) <= self.ends + 1
        self._go_on.set()
        self.clock.turn(REVOKE_WITHIN)

    def refused(self) -> None:
        with self.options().connect() as connection, pytest.raises(KeyDisabledError):
            connection.execute(select(letter.c.body)).all()

    def options(self, **options: Any) -> Any:
        return self.engine.execution_options(byok_tenant="t1", **options)

    def write(self, count: int) -> None:
        rows = [
            {
                "body": f"body {n}",
                "scan": f"scan {n}",
                "draft": f"draft {n}",
                "ssn": str(n) if n < 50 else None,
            }
            for n in range(count)
        ]
        with self.options().begin() as connection:
            connection.execute(insert(letter), rows)


@pytest.fixture
def reading(service: Service) -> Iterator[Reading]:
    """On SQLite."""
    Base.metadata.create_all(service.engine)
    reading = Reading(service, service.engine)
    yield reading
    reading._go_on.set()


@pytest.fixture
def slowly(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Has the application's code take so many seconds for each value."""

    def take(seconds: float) -> None:
        monkeypatch.setattr(Slow, "meanwhile", lambda: reading.clock.turn(seconds))

    return take


FETCHES: dict[str, Callable[[Any], object]] = {
    "all": lambda result: result.all(),
    "fetchmany": lambda result: result.fetchmany(5_000),
    "mappings": lambda result: result.mappings().all(),
    "scalars": lambda result: result.scalars().all(),
    "freeze": lambda result: result.freeze(),
    "columns": lambda result: result.columns(1, 0).unique().all(),
}


@place("one long batch")
@pytest.mark.parametrize("fetch", FETCHES)
def test_one_long_batch(reading: Reading, fetch: str) -> None:
    """Thousands of rows fetched at once: opening them stops in the middle, when the keys' time is up."""
    reading.write(3_000)
    reading.takes = 0.001
    with reading.options().connect() as connection:
        result = connection.execute(select(letter.c.body, letter.c.draft))
        reading.say_no()
        reading.clock.turn(REVOKE_WITHIN - 0.5)
        with pytest.raises(KeysExpiredError):
            FETCHES[fetch](result)
        with pytest.raises(ResourceClosedError):  # not with rows left out
            result.all()
    reading.check(500, 1_000)
    reading.refused()


@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("fetch", FETCHES)
def test_one_batch_of_long_values(reading: Reading, fetch: str, count: int) -> None:
    """Few rows of long texts take as long as many short ones, and end as soon."""
    with reading.options().begin() as connection:
        connection.execute(insert(letter), [{"body": "b", "draft": "x" * 100_000} for _ in range(count)])
    reading.takes = 0.5
    with reading.options().connect() as connection:
        result = connection.execute(select(letter.c.draft, letter.c.id))
        reading.say_no()
        reading.clock.turn(REVOKE_WITHIN - 0.5)
        with pytest.raises(KeysExpiredError):
            FETCHES[fetch](result)
    reading.check(1, 2)
    reading.refused()


@place("slow code of the application")
@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("orm", [False, True], ids=["core", "orm"])
def test_slow_code_in_a_type(
    reading: Reading, slowly: Callable[[float], None], fetch: str, orm: bool
) -> None:
    """A type's own code takes its time for each value; no further value is opened once time is up, of no column."""
    reading.write(20)
    slowly(40)
    columns = (Letter.scan, Letter.body) if orm else (letter.c.scan, letter.c.body)
    with Session(reading.options()) if orm else reading.options().connect() as source:
        result = source.execute(select(*columns))
        reading.say_no()
        with pytest.raises(KeysExpiredError):
            FETCHES[fetch](result)
    reading.check(3, 3)  # a scan and a body, and a scan, in which the time ran out
    reading.refused()


def ten_at_a_time(result: Any) -> Iterator[Any]:
    for rows in result.partitions(10):
        yield from rows


def one_at_a_time(result: Any) -> Iterator[Any]:
    while (row := result.fetchone()) is not None:
        yield row


STREAMS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "rows": iter,
    "partitions": ten_at_a_time,
    "fetchone": one_at_a_time,
    "scalars": lambda result: iter(result.scalars()),
}


def read_on(reading: Reading, rows: Iterator[Any]) -> list[Any]:
    """Take a row each second, and say no after the first."""
    taken: list[Any] = []
    with pytest.raises(KeysExpiredError):  # noqa: PT012 - whichever row it is
        for row in rows:
            if not taken:
                reading.say_no()
            taken.append(row)
            reading.clock.turn(1)
    return taken


@place("yield_per")
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("how", ["core", "orm", "query"])
def test_yield_per(reading: Reading, stream: str, how: str) -> None:
    """Rows that are taken one after the other end in time, though the driver has fetched more of them already."""
    reading.write(200)
    with Session(reading.options()) as session:
        if how == "query":
            rows = iter(session.query(Letter.body).yield_per(20))
        else:
            wanted = select(letter.c.body if how == "core" else Letter)
            rows = STREAMS[stream](session.execute(wanted, execution_options={"yield_per": 20}))
        taken = read_on(reading, rows)
    assert (
        REVOKE_WITHIN - 20 <= len(taken) <= REVOKE_WITHIN + 20
    )  # 20 were opened at once, and are the application's
    reading.check(len(taken), 3 * (REVOKE_WITHIN + 20))
    reading.refused()


@place("a server-side stream")
@pytest.mark.parametrize("stream", STREAMS)
def test_a_server_side_stream(service: Service, engine: Engine, stream: str) -> None:
    """A cursor in the database goes on giving rows; they are opened no longer."""
    service.byok.attach(engine)
    Base.metadata.create_all(engine)
    reading = Reading(service, engine)
    reading.write(200)
    with reading.options(stream_results=True, max_row_buffer=10).connect() as connection:
        taken = read_on(reading, STREAMS[stream](connection.execute(select(letter.c.body))))
    assert REVOKE_WITHIN - 10 <= len(taken) <= REVOKE_WITHIN + 10
    reading.check(len(taken), len(taken) + 10)
    reading.refused()


@place("an async stream")
@pytest.mark.parametrize("how", ["rows", "partitions", "scalars"])
async def test_an_async_stream(service: Service, async_engine: AsyncEngine, how: str) -> None:
    """The same over asyncio, where other tasks may run for any time between two rows."""
    service.byok.attach(async_engine)
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    reading = await asyncio.to_thread(Reading, service, async_engine)
    async with reading.options().begin() as connection:
        await connection.execute(insert(letter), [{"body": f"body {n}"} for n in range(200)])
    taken = 0
    async with AsyncSession(reading.options()) as session:
        result = await session.stream(select(Letter), execution_options={"yield_per": 10})
        source = {"rows": lambda: result, "partitions": result.partitions, "scalars": result.scalars}[how]()
        with pytest.raises(KeysExpiredError):  # noqa: PT012 - whichever row it is
            async for _ in source:
                if not taken:
                    reading.say_no()
                taken += 10 if how == "partitions" else 1
                reading.clock.turn(10 if how == "partitions" else 1)
    assert REVOKE_WITHIN - 10 <= taken <= REVOKE_WITHIN + 10
    reading.check(taken, REVOKE_WITHIN + 20)
    async with reading.options().connect() as connection:
        with pytest.raises(KeyDisabledError):
            await connection.execute(select(letter.c.body))


@place("direct mode's batch")
@pytest.mark.parametrize("fetch", FETCHES)
def test_a_batch_of_direct_values(reading: Reading, fetch: str) -> None:
    """Of direct columns the customer's KMS opens each value, and the "no" ends the batch that is being opened."""
    reading.write(50)
    asked: list[str] = []

    def ask() -> None:
        asked.append("the KMS")
        if len(asked) == 20:
            reading.kms.disable()

    with reading.options().connect() as connection:
        result = connection.execute(select(letter.c.ssn, letter.c.id))
        assert result.fetchone() == ("0", 1)
        reading.kms.latency(ask)
        with pytest.raises(KeyDisabledError):
            FETCHES[fetch](result)
    assert 20 <= len(asked) < 20 + 2 * AT_ONCE  # those that were under way
    assert len(reading.opened) == 1
    reading.refused()


@pytest.mark.parametrize("count", [3, 50])
@pytest.mark.parametrize("fetch", FETCHES)
def test_a_slow_batch_of_direct_values(reading: Reading, fetch: str, count: int) -> None:
    """What the KMS gave before the time was up is not opened after it by the tenant's other keys."""
    reading.write(count)
    with reading.options().connect() as connection:
        result = connection.execute(select(letter.c.ssn, letter.c.body))
        assert result.fetchone() == ("0", "body 0")
        ring = reading.service.byok._keyrings.get("t1")
        reading.kms.latency(lambda: reading.clock.turn(40))
        with pytest.raises(KeysExpiredError):
            FETCHES[fetch](result)
    assert len(reading.opened) == 2
    assert ring.cleared


READ_EARLY: dict[str, Any] = {
    "INSERT": insert(letter).return_defaults(supplemental_cols=[letter.c.scan], sort_by_parameter_order=True),
    "UPDATE": update(letter).values(body="new").return_defaults(letter.c.scan),
}


@place("RETURNING, read early")
@pytest.mark.parametrize("kind", READ_EARLY)
def test_returning_that_is_read_early(reading: Reading, slowly: Callable[[float], None], kind: str) -> None:
    """What SQLAlchemy reads of many rows before it gives a result away, as eager defaults do, is opened no later."""
    reading.write(100)
    rows = [{"body": "b", "scan": f"scan {n}"} for n in range(100)] if kind == "INSERT" else None
    slowly(1)
    with reading.options().begin() as connection:
        reading.say_no()
        with pytest.raises(KeysExpiredError):
            connection.execute(READ_EARLY[kind], rows)
    reading.check(REVOKE_WITHIN, 2 * (REVOKE_WITHIN + 1))
    reading.refused()


@pytest.mark.parametrize("entity", [letter, Letter], ids=["core", "orm"])
@pytest.mark.parametrize("fetch", FETCHES)
def test_returning_of_many_rows(
    reading: Reading, slowly: Callable[[float], None], entity: Any, fetch: str
) -> None:
    """What an INSERT in several batches gives back is opened as any other result."""
    rows = [{"body": f"body {n}", "scan": f"scan {n}"} for n in range(1_500)]
    slowly(1)
    with Session(reading.options()) as session:
        statement = insert(entity).returning(letter.c.scan, letter.c.id)
        reading.say_no()
        with pytest.raises(KeysExpiredError):
            FETCHES[fetch](session.execute(statement, rows))
    reading.check(REVOKE_WITHIN, REVOKE_WITHIN + 1)
    reading.refused()


# -- the page --------------------------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_page_tells_each_no() -> None:
    """The table that customers are shown says what the tests above prove, for each way and no other."""
    told = [tuple(row[1:]) for row in rows("Ways to say no, and the bound")]
    who = {"customer": "customer", "operator": "vendor"}
    assert sorted(told) == sorted(
        (
            f"{no.kind}/{no.how}",
            "revoke_within",
            no.error.__name__,
            who[no.action_by],
        )
        for no in NOES
    )


def test_the_page_tells_each_silence() -> None:
    """Likewise for a KMS that does not answer."""
    told = [tuple(row[1:]) for row in rows("No answer, and the bound")]
    assert sorted(told) == sorted(
        (
            f"{each.cloud}/{each.how}",
            "revoke_within + outage_grace" if each.graced else "revoke_within",
            each.error.__name__,
        )
        for each in SILENCES
    )


def test_the_page_tells_each_place() -> None:
    """Likewise for where a process may be when the time is up."""
    assert [row[1] for row in rows("Wherever the process is")] == PLACES


def test_the_page_tells_the_numbers_of_the_code() -> None:
    """When a refresh is due, and how long the breaker leaves a KMS alone."""
    from sqla_byok.keys import clock, health, keyrings

    (share,) = re.findall(r"between ([0-9.]+) and ([0-9.]+) of `revoke_within`", PAGE)
    assert tuple(map(float, share)) == (clock.REFRESH_FROM, clock.REFRESH_TO)
    assert health._LONGEST == LONGEST_BACK_OFF
    assert f"at most {LONGEST_BACK_OFF} seconds" in PAGE
    assert f"for {clock._UNANSWERED_FOR:.0f} seconds more" in PAGE
    assert keyrings._SWEEP_EVERY * 2 <= 1  # "for more than a second"
    assert f"{keyrings.UNIT_WITHIN:.0f} seconds at most" in PAGE
