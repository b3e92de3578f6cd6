"""Fixtures for the tests of keys and time."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from keys_tools import KEYSTORE_KEY, CountingKms

from sqla_byok import LocalKms
from sqla_byok.kms import providers


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


@pytest.fixture
def local_kms(customer_key: Path) -> LocalKms:
    """The customer's key file, described outside the event loop: making a path absolute may ask the disk."""
    return LocalKms(customer_key)
