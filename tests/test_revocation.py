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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import pytest
from azure.identity import ClientSecretCredential
from keys_tools import TurnableClock, in_child, insert_patient, names, patient, until
from relay import Relay
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_byok import (
    AccessDeniedError,
    AwsKms,
    AzureKeyVault,
    Byok,
    CredentialExpiredError,
    CredentialInvalidError,
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
from sqla_byok.keys.keyring import Keyring
from sqla_byok.kms import Kms
from sqla_byok.testing import KmsServers
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
