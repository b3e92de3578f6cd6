"""The pytest plugin: fixtures for an application's own tests.

It stands beside the package, since importing a module of the package imports SQLAlchemy, and pytest loads this one in
every run of every project in the same environment. Nothing else of ours is imported until a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqla_byok import Byok
    from sqla_byok.testing import FakeKms, KmsServers


@pytest.fixture
def byok_fake_kms() -> Iterator[FakeKms]:
    """A customer key in memory of this test's own; see :class:`sqla_byok.testing.FakeKms`."""
    import secrets

    from sqla_byok.testing import FakeKms

    kms = FakeKms(f"fake-{secrets.token_hex(4)}")
    yield kms
    kms.reset()  # lets go of what a test made it wait for


@pytest.fixture
def byok_for_tests() -> Iterator[Callable[..., Byok]]:
    """:func:`sqla_byok.testing.byok_for_tests`, which closes what it made when the test is over."""
    import contextlib

    from sqla_byok.testing import byok_for_tests

    with contextlib.ExitStack() as made:

        def make(engine: Any, tenant: str = "t", **options: Any) -> Byok:
            byok = byok_for_tests(engine, tenant, **options)
            made.callback(byok.close)
            return byok

        yield make


@pytest.fixture(scope="session")
def _byok_kms_servers() -> Iterator[KmsServers]:
    from sqla_byok.testing import KmsServers

    with KmsServers() as servers:
        yield servers


@pytest.fixture
def byok_kms_server(_byok_kms_servers: KmsServers) -> Iterator[KmsServers]:
    """AWS KMS and Azure Key Vault on loopback, without keys; see :func:`sqla_byok.testing.kms_server`.

    The servers are started once in a test run. Dummy AWS credentials are in the environment while a test has them.
    """
    with _byok_kms_servers.environment():
        _byok_kms_servers.reset()
        yield _byok_kms_servers
        _byok_kms_servers.reset()
