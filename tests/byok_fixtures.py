"""Fixtures for what almost every test needs: a Byok over a keystore of its own, and two tenants."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from keys_tools import KEYSTORE_KEY, CountingKms
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from sqla_byok import Byok, LocalKms
from sqla_byok.kms import providers

TENANTS = ("t1", "t2")


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
def byok(tmp_path: Path, local_kms: LocalKms, engine: Engine) -> Iterator[Byok]:
    """A Byok attached to ``engine``, with the tenants t1 and t2; its keystore is an SQLite file."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
    byok.create_keystore()
    byok.attach(engine)
    for tenant in TENANTS:
        byok.onboard(tenant, local_kms)
    yield byok
    byok.close()


@pytest.fixture
async def abyok(tmp_path: Path, local_kms: LocalKms, async_engine: AsyncEngine) -> AsyncIterator[Byok]:
    """The same, attached to ``async_engine``."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
    await byok.acreate_keystore()
    byok.attach(async_engine)
    for tenant in TENANTS:
        await byok.aonboard(tenant, local_kms)
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
