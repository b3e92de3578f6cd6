"""FakeKms: that it refuses, counts and waits as it is told, and stays out of production."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from sqla_byok import Byok
from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    CredentialExpiredError,
    KeyDeletedError,
    KeyDisabledError,
    KmsBlockedError,
    KmsError,
    KmsUnavailableError,
    ThrottledError,
    WrongKeyError,
)
from sqla_byok.kms import describe
from sqla_byok.testing import FakeKms


@pytest.fixture
def kms(byok_fake_kms: FakeKms) -> FakeKms:
    """A key of this test's own."""
    return byok_fake_kms


TROUBLES: dict[str, tuple[Callable[[FakeKms], None], Callable[[FakeKms], None], type[KmsError], str]] = {
    "disable": (FakeKms.disable, FakeKms.enable, KeyDisabledError, "customer"),
    "delete": (FakeKms.delete, FakeKms.enable, KeyDeletedError, "customer"),
    "deny": (FakeKms.deny, FakeKms.allow, AccessDeniedError, "customer"),
    "outage": (FakeKms.outage, FakeKms.recover, KmsUnavailableError, "operator"),
    "throttle": (FakeKms.throttle, FakeKms.recover, ThrottledError, "operator"),
    "reset": (FakeKms.disable, FakeKms.reset, KeyDisabledError, "customer"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_control_has_its_error_and_its_end(kms: FakeKms, trouble: str) -> None:
    """A user's test of a bad day meets what production would raise, and the day can end."""
    start, end, kind, action_by = TROUBLES[trouble]
    client = kms.connect({})
    wrapped = client.wrap(b"payload", tenant="t1")
    start(kms)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            client.unwrap(wrapped, tenant="t1")
        with pytest.raises(kind):
            client.wrap(b"payload", tenant="t1")
    assert (caught.value.tenant, caught.value.action_by) == ("t1", action_by)
    end(kms)
    assert client.unwrap(wrapped, tenant="t1") == b"payload"


def test_throttling_tells_when_to_come_back(kms: FakeKms) -> None:
    """A caller that honours retry_after can be tested."""
    kms.throttle(retry_after=7.0)
    with pytest.raises(ThrottledError) as caught:
        kms.connect({}).wrap(b"x", tenant="t1")
    assert caught.value.retry_after == 7.0


def test_the_next_calls_fail_in_their_order(kms: FakeKms) -> None:
    """A test can say which call fails how; afterwards the key answers."""
    kms.fail_next(KmsBlockedError, times=2)
    kms.fail_next(CredentialExpiredError)
    client, seen = kms.connect({}), []
    for _ in range(4):
        try:
            client.wrap(b"x", tenant="t1")
            seen.append(None)
        except KmsError as error:
            seen.append(type(error))
    assert seen == [KmsBlockedError, KmsBlockedError, CredentialExpiredError, None]


@pytest.mark.parametrize("end", [FakeKms.recover, FakeKms.reset])
def test_failures_left_over_are_forgotten(kms: FakeKms, end: Callable[[FakeKms], None]) -> None:
    """A call that never came does not fail the next test's."""
    kms.fail_next(KmsBlockedError, times=2)
    end(kms)
    kms.connect({}).wrap(b"x", tenant="t1")


def test_reset_undoes_everything(kms: FakeKms) -> None:
    """A test that did its worst leaves the key usable, and what it wrapped readable."""
    client = kms.connect({})
    wrapped = client.wrap(b"x", tenant="t1")
    for worst in (FakeKms.delete, FakeKms.deny, FakeKms.outage, FakeKms.rotate):
        worst(kms)
    kms.latency(lambda: pytest.fail("it still waits"))
    kms.reset()
    assert client.unwrap(wrapped, tenant="t1") == b"x"
    assert kms.calls == {"unwrap": 1}


def test_calls_are_counted_by_tenant(kms: FakeKms) -> None:
    """A promise such as "one call to open a tenant" can be counted, refused calls included."""
    client = kms.connect({})
    wrapped = client.wrap(b"x", tenant="t1")
    client.unwrap(wrapped, tenant="t1")
    kms.disable()
    with pytest.raises(KeyDisabledError):
        client.unwrap(wrapped, tenant="t2")
    assert kms.calls == {"wrap": 1, "unwrap": 2}
    assert kms.calls_for("t1") == {"wrap": 1, "unwrap": 1}
    assert kms.calls_for("t2") == {"unwrap": 1}
    kms.reset()
    assert kms.calls == {}


def test_a_call_can_be_held(kms: FakeKms) -> None:
    """What happens while the KMS is slow is tested without sleeping: the call is counted, then waits, then meets
    the state of that moment."""
    arrived, go_on, outcome = threading.Event(), threading.Event(), []

    def hold() -> None:
        arrived.set()
        assert go_on.wait(30)

    def call() -> None:
        try:
            kms.connect({}).wrap(b"x", tenant="t1")
        except KmsError as error:
            outcome.append(type(error))

    kms.latency(hold)
    thread = threading.Thread(target=call)
    thread.start()
    assert arrived.wait(30)
    assert (kms.calls["wrap"], outcome) == (1, [])
    kms.disable()
    go_on.set()
    thread.join(30)
    assert outcome == [KeyDisabledError]


def test_rotation_keeps_earlier_versions(kms: FakeKms) -> None:
    """A customer that rotates its key loses nothing, and the version in the keystore row is what opens."""
    client = kms.connect({})
    first = client.wrap(b"x", tenant="t1")
    kms.rotate()
    second = client.wrap(b"x", tenant="t1")
    assert (first.key_version, second.key_version) == ("1", "2")
    assert client.unwrap(first, tenant="t1") == client.unwrap(second, tenant="t1") == b"x"
    with pytest.raises(WrongKeyError):
        client.unwrap(first._replace(key_version="2"), tenant="t1")


def test_the_name_is_the_key(kms: FakeKms) -> None:
    """The test's value and the one made from the keystore row are controlled and counted as one."""
    twin = describe("fake", kms.config())
    wrapped = twin.connect({}).wrap(b"x", tenant="t1")
    kms.disable()
    with pytest.raises(KeyDisabledError):
        twin.connect({}).unwrap(wrapped, tenant="t1")
    assert kms.calls == {"wrap": 1, "unwrap": 1}


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_text(name: str) -> None:
    """Two tests do not share a key by a name that is none."""
    with pytest.raises(ConfigurationError, match="name"):
        FakeKms(name)


def test_a_byok_needs_no_keystore_key_for_it(kms: FakeKms, monkeypatch: pytest.MonkeyPatch) -> None:
    """An in-process key cannot be redirected; a third party's provider that calls out is refused as AwsKms is."""
    byok = Byok("sqlite://")
    byok.create_keystore()
    byok.onboard("t1", kms)
    monkeypatch.setattr(FakeKms, "outbound", True)
    with pytest.raises(ConfigurationError, match="keystore_key"):
        byok.onboard("t2", kms)
    byok.close()


UNKNOWN = """
import sqla_byok, sys
from sqla_byok.kms import describe, providers
assert "fake" not in providers and "sqla_byok.testing" not in sys.modules
try:
    describe("fake", {"name": "fake"})
except sqla_byok.ConfigurationError as error:
    print(error)
import sqla_byok.testing
print(describe("fake", {"name": "fake"}))
"""


def test_production_does_not_know_it() -> None:
    """A row that names the fake provider opens nothing in a program that does not import sqla_byok.testing."""
    child = subprocess.run([sys.executable, "-c", UNKNOWN], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    refused, known = child.stdout.splitlines()
    assert "Unknown KMS provider 'fake'" in refused
    assert known == "FakeKms(name='fake')"
