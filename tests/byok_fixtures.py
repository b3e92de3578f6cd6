"""Fixtures for what almost every test needs: a Byok over a keystore of its own, and two tenants.

With ``--kms=clouds`` the tenants are customers of both clouds, in one keystore and one database.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import KEYSTORE_KEY, CountingKms
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from sqla_byok import Byok, LocalKms
from sqla_byok.kms import Kms, providers
from sqla_byok.testing import KmsServers


@pytest.fixture
def customer_key(tmp_path: Path) -> Path:
    """The file of a LocalKms key."""
    path = tmp_path / "customer.key"
    LocalKms.create(path)
    return path


@pytest.fixture
def local_kms(customer_key: Path) -> LocalKms:
    """The key itself. Made here, since making its path absolute is not for the event loop."""
    return LocalKms(customer_key)


@pytest.fixture
def clouds(request: pytest.FixtureRequest) -> KmsServers | None:
    """Both clouds on loopback, where the run is to use them."""
    if request.config.getoption("--kms") == "local":
        return None
    servers: KmsServers = request.getfixturevalue("byok_kms_server")
    return servers


@pytest.fixture
def kms_options(clouds: KmsServers | None) -> dict[str, Any]:
    """What a Byok has to be given for the tenants' keys."""
    return clouds.options if clouds else {}


@pytest.fixture
def new_customer(clouds: KmsServers | None, request: pytest.FixtureRequest) -> Callable[[int], Kms]:
    """Makes a tenant's customer key: in turn AWS's, through a role of the customer's, and Azure's."""
    if clouds is None:
        local: Kms = request.getfixturevalue("local_kms")
        return lambda number: local
    return lambda number: clouds.key("azure" if number % 2 else "aws-role")


@pytest.fixture
def customers(new_customer: Callable[[int], Kms]) -> dict[str, Kms]:
    """The tenants, each with its customer key."""
    return {tenant: new_customer(number) for number, tenant in enumerate(("t1", "t2"))}


@pytest.fixture
def byok(
    tmp_path: Path, customers: dict[str, Kms], kms_options: dict[str, Any], engine: Engine
) -> Iterator[Byok]:
    """A Byok attached to ``engine``, with the tenants t1 and t2; its keystore is an SQLite file."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", **kms_options)
    byok.create_keystore()
    byok.attach(engine)
    for tenant, kms in customers.items():
        byok.onboard(tenant, kms)
    yield byok
    byok.close()


@pytest.fixture
async def abyok(
    tmp_path: Path, customers: dict[str, Kms], kms_options: dict[str, Any], async_engine: AsyncEngine
) -> AsyncIterator[Byok]:
    """The same, attached to ``async_engine``."""
    # in a thread, since it looks whether the profile's ca_file is there
    byok = await asyncio.to_thread(Byok, f"sqlite:///{tmp_path / 'keystore.db'}", **kms_options)
    await byok.acreate_keystore()
    byok.attach(async_engine)
    for tenant, kms in customers.items():
        await byok.aonboard(tenant, kms)
    yield byok
    await byok.aclose()


@pytest.fixture
def counting_kms(customer_key: Path, monkeypatch: pytest.MonkeyPatch) -> CountingKms:
    """A CountingKms over the customer's key file, known to Byok for this test."""
    monkeypatch.setitem(providers, CountingKms.provider, CountingKms)
    monkeypatch.setattr(CountingKms, "unwraps", [])
    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(lambda: None))
    return CountingKms(str(customer_key))


@pytest.fixture
def keystore_key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference of a keystore key."""
    monkeypatch.setenv("BYOK_TEST_KEYSTORE_KEY", base64.b64encode(KEYSTORE_KEY).decode())
    return "env:BYOK_TEST_KEYSTORE_KEY"
