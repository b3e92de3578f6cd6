"""kms_server(): both clouds on loopback, and customers who say no in each way there is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine

from sqla_byok import AwsKms
from sqla_byok.errors import ConfigurationError, KmsRefusedError
from sqla_byok.kms import Kms
from sqla_byok.testing import KmsServers, byok_for_tests, kms_server

KINDS = tuple(KmsServers.ways)
WAYS = [(kind, how) for kind, ways in KmsServers.ways.items() for how in ways]


@pytest.fixture(scope="module")
def running() -> Iterator[KmsServers]:
    """Servers for this module; the environment is patched as a user's would be."""
    with kms_server() as servers:
        yield servers


def use(servers: KmsServers, kms: Kms, tenant: str = "t1") -> None:
    """Wrap and unwrap in a new client, as an opening does."""
    client = kms.for_tenant("an-external-id").connect(servers.profiles["default"], servers.operator)
    assert client.unwrap(client.wrap(b"payload", tenant=tenant), tenant=tenant) == b"payload"


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_each_way_to_say_no_bites_and_can_be_undone(running: KmsServers, kind: str, how: str) -> None:
    """A test that is written once holds for each cloud and way; another customer's key is left alone."""
    kms, other = running.key(kind), running.key(kind)
    use(running, kms)
    running.revoke(kms, how)
    with pytest.raises(KmsRefusedError):
        use(running, kms)
    use(running, other)
    running.restore(kms)
    use(running, kms)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byok_goes_through(running: KmsServers, kind: str) -> None:
    """One line gives an application's tests a real cloud's wire: onboarding, opening, and the customer's no."""
    engine, kms = create_engine("sqlite://"), running.key(kind)
    with contextlib.closing(byok_for_tests(engine, kms=kms, **running.options)) as byok:
        with byok.tenant("t"):
            pass
        running.revoke(kms)
        byok.forget_keys()
        with pytest.raises(KmsRefusedError), byok.tenant("t"):
            pass
    engine.dispose()


def test_what_is_not_from_here_is_refused(running: KmsServers) -> None:
    """A typing error in a test does not make it pass for nothing."""
    foreign = AwsKms("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
    for call in (
        lambda: running.revoke(foreign),
        lambda: running.restore(foreign),
        lambda: running.revoke(running.aws_key(), "delete-secret"),
        lambda: running.key("gcp"),
    ):
        with pytest.raises(ConfigurationError):
            call()


def test_the_environment_is_there_only_inside() -> None:
    """No test runs with dummy credentials by accident, and none of the machine's own reach the double."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_PROFILE", "production")
        before = dict(os.environ)
        with kms_server() as servers:
            servers.azure_key()
            assert os.environ["AWS_ACCESS_KEY_ID"] == "testing"
            assert "AWS_PROFILE" not in os.environ
        assert dict(os.environ) == before


def test_reset_forgets_keys_and_counts(running: KmsServers) -> None:
    """A test of a later one's begins with nothing."""
    kms = running.aws_key()
    use(running, kms)
    running.reset()
    assert (running.aws.calls, running.azure.calls) == ({}, {})
    with pytest.raises(ConfigurationError):
        running.revoke(kms)
    with pytest.raises(KmsRefusedError):
        use(running, kms)
