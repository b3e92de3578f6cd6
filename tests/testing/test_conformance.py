"""Every provider of ours passes the suite that we give to others, and the suite finds providers that are wrong."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from _pytest.outcomes import Failed

from sqla_byok.errors import ByokError, KmsError
from sqla_byok.kms import Kms, LocalKms, Operator, Wrapped
from sqla_byok.kms.base import request_id
from sqla_byok.testing import FakeKms, KmsConformance, KmsServers


class TestLocalKms(KmsConformance):
    """A key file."""

    takes_settings = False

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder, self.made = tmp_path, 0

    def make_key(self) -> Kms:
        self.made += 1
        return LocalKms.create(self.folder / f"{self.made}.key")

    def disable(self, kms: Any) -> None:
        os.unlink(kms.path)


class TestFakeKms(KmsConformance):
    """A key in memory."""

    def make_key(self) -> Kms:
        return FakeKms(os.urandom(8).hex())

    def disable(self, kms: Any) -> None:
        kms.disable()


class _OverTheWire(KmsConformance):
    """A key of a cloud, over HTTP."""

    @pytest.fixture(autouse=True)
    def _servers(self, byok_kms_server: KmsServers) -> None:
        self.servers = byok_kms_server
        self.settings, self.operator = byok_kms_server.profiles["default"], byok_kms_server.operator

    def disable(self, kms: Kms) -> None:
        self.servers.revoke(kms)


class TestAwsKms(_OverTheWire):
    """A key in AWS KMS."""

    def make_key(self) -> Kms:
        return self.servers.aws_key()


class TestAwsKmsWithRole(_OverTheWire):
    """A key in AWS KMS through a role in the customer's account."""

    def make_key(self) -> Kms:
        return self.servers.aws_key(role=True, external_id="an-external-id")


class _Azure(_OverTheWire):
    binds_tenant = False  # RSA-OAEP of a vault takes no label
    operations = "encrypt"

    def make_key(self) -> Kms:
        return self.servers.azure_key(operations=self.operations)

    def secrets(self, kms: Any) -> list[str]:
        return [os.environ[kms.client_secret.removeprefix("env:")]]


class TestAzureKeyVaultEncrypt(_Azure):
    """A key in Azure Key Vault that may encrypt and decrypt."""


class TestAzureKeyVaultWrap(_Azure):
    """A key in Azure Key Vault that may wrap and unwrap."""

    operations = "wrap"


# Providers that are wrong, each in one way, and the test that must find it.


class Client:
    """A client like FakeKms's, for a defect to override."""

    def __init__(self, kms: FakeKms, settings: Mapping[str, Any], reason: str) -> None:
        self.kms, self.inner = kms, FakeKms.connect(kms, settings, reason=reason)

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        return self.inner.wrap(payload, tenant=tenant)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        return self.inner.unwrap(wrapped, tenant=tenant)

    def room(self, wrapped: Wrapped) -> int:
        return self.inner.room(wrapped)


class Sound(FakeKms):
    """A provider like FakeKms, for a defect to override."""

    client = Client

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> Any:
        return self.client(self, settings, reason)


class ShowsPayload(Client):
    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        blob, version = super().wrap(payload, tenant=tenant)
        return Wrapped(blob + payload.hex().encode(), version)


class KeepsNoVersion(Client):
    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        return super().unwrap(wrapped._replace(key_version="2"), tenant=tenant)


class CutsNames(Client):
    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        return super().wrap(payload, tenant=tenant[:100])


class PromisesRoom(Client):
    def room(self, wrapped: Wrapped) -> int:
        return super().room(wrapped) + 1


class TakesMoreThanItSays(Client):
    def room(self, wrapped: Wrapped) -> int:
        return super().room(wrapped) - 1


class MixesThreads(Client):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.barrier = threading.Barrier(2)

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        self.payload = payload
        self.barrier.wait(30)
        return super().wrap(self.payload, tenant=tenant)


class IgnoresTenant(Client):
    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        return super().wrap(payload, tenant="all")

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        return super().unwrap(wrapped, tenant="all")


class OpensAnyKeys(Client):
    blobs: dict[bytes, bytes] = {}  # noqa: RUF012 - shared is what is wrong with it

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        wrapped = super().wrap(payload, tenant=tenant)
        self.blobs[wrapped.blob] = payload
        return wrapped

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        return self.blobs.get(wrapped.blob) or super().unwrap(wrapped, tenant=tenant)


class RemembersYes(Client):
    yes: dict[bytes, bytes] = {}  # noqa: RUF012 - shared is what is wrong with it

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        wrapped = super().wrap(payload, tenant=tenant)
        self.yes[wrapped.blob + self.kms.name.encode()] = payload
        return wrapped

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        known = self.yes.get(wrapped.blob + self.kms.name.encode())
        return known or super().unwrap(wrapped, tenant=tenant)


class WrapsLocally(Client):
    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        return FakeKms("aside").connect({}).wrap(payload, tenant=tenant)


class RaisesItsOwn(Client):
    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        try:
            return super().unwrap(wrapped, tenant=tenant)
        except ByokError as error:
            failure = OSError(str(error))
        raise failure


class Chains(Client):
    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        try:
            return super().unwrap(wrapped, tenant=tenant)
        except KmsError as error:
            raise type(error)("no", tenant=tenant) from None


class ForgetsTenant(Client):
    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        try:
            return super().unwrap(wrapped, tenant=tenant)
        except KmsError as error:
            failure = type(error)("no", request_id=error.request_id)
        raise failure


class CannotBePickled(Client):
    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        try:
            return super().unwrap(wrapped, tenant=tenant)
        except KmsError as error:
            failure = error
        failure.response = threading.Lock()  # type: ignore[attr-defined]
        raise failure.with_traceback(None)


class ShowsPayloadInErrors(Client):
    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        try:
            return super().wrap(payload, tenant=tenant)
        except KmsError as error:
            failure = type(error)(f"cannot wrap {payload!r}", tenant=tenant, request_id=error.request_id)
        raise failure


class KeepsRequestId(Client):
    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        before = request_id.get()
        try:
            return super().unwrap(wrapped, tenant=tenant)
        finally:
            request_id.set(before)


class Logs(Client):
    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        logging.getLogger("vendor.sdk").debug("request %s", {"plaintext": payload.hex()})
        return super().wrap(payload, tenant=tenant)


class CallsOnConnect(Client):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with socket.socket() as connection:
            connection.connect_ex(("127.0.0.1", 9))


class ShowsSecret(Client):
    def __repr__(self) -> str:
        return "Client(secret='hunter2')"


class NoText(Sound):
    def config(self) -> Any:
        return {"name": self.name, "version": 1}


class Unequal(Sound):
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class TakesAnyConfig(Sound):
    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Any:
        return cls(str(config.get("name", "none")))


class Mutable(Sound):
    __setattr__ = object.__setattr__


class TakesAnySettings(Client):
    def __init__(self, kms: FakeKms, settings: Mapping[str, Any], reason: str) -> None:
        super().__init__(kms, {}, reason)


DEFECTS: dict[type, str] = {
    CutsNames: "test_round_trip",
    KeepsNoVersion: "test_round_trip",
    ShowsPayload: "test_the_blob_does_not_show_the_payload",
    PromisesRoom: "test_room_is_true",
    TakesMoreThanItSays: "test_room_is_true",
    ShowsPayloadInErrors: "test_room_is_true",
    MixesThreads: "test_threads_share_a_client",
    IgnoresTenant: "test_another_tenants_blob_is_refused",
    OpensAnyKeys: "test_another_keys_blob_is_refused",
    RaisesItsOwn: "test_a_damaged_blob_is_refused",
    RemembersYes: "test_a_disabled_key_refuses",
    WrapsLocally: "test_a_disabled_key_refuses",
    Chains: "test_a_disabled_key_refuses",
    ForgetsTenant: "test_a_disabled_key_refuses",
    CannotBePickled: "test_a_disabled_key_refuses",
    KeepsRequestId: "test_request_id_is_this_calls",
    NoText: "test_config_restores_an_equal_value",
    Unequal: "test_config_restores_an_equal_value",
    TakesAnyConfig: "test_a_foreign_config_is_refused",
    Mutable: "test_the_description_is_frozen",
    ShowsSecret: "test_the_description_shows_no_secret",
    CallsOnConnect: "test_connecting_makes_no_call",
    TakesAnySettings: "test_an_unknown_setting_is_refused",
    Logs: "test_logs_show_no_payload",
}
ARGUMENTS = {"size": 65, "tenant": "t" * 255, "damage": "flipped"}


def run(provider: type[Sound], name: str, request: pytest.FixtureRequest) -> None:
    """Run one test of the suite for a provider."""

    class Suite(KmsConformance):
        def make_key(self) -> Kms:
            return provider(os.urandom(8).hex())

        def disable(self, kms: Any) -> None:
            kms.disable()

        def secrets(self, kms: Kms) -> list[str]:
            return ["hunter2"]

    test = getattr(Suite(), name)
    test(
        **{
            each: ARGUMENTS.get(each) or request.getfixturevalue(each)
            for each in inspect.signature(test).parameters
        }
    )


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_suite_finds_a_defect(defect: Any, request: pytest.FixtureRequest) -> None:
    """Each test of the suite fails a provider that is wrong in what it is about, and passes one that is not."""
    provider = defect if issubclass(defect, Sound) else type("Wrong", (Sound,), {"client": defect})
    run(Sound, DEFECTS[defect], request)
    with pytest.raises((AssertionError, Failed, ByokError, OSError, TypeError, pickle.PicklingError)):
        run(provider, DEFECTS[defect], request)


def test_every_test_of_the_suite_can_fail() -> None:
    """A test that is added to the suite comes with a provider that fails it."""
    assert {name for name in vars(KmsConformance) if name.startswith("test_")} == set(DEFECTS.values())


WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None
import sqla_byok.testing
try:
    sqla_byok.testing.KmsConformance
except sqla_byok.MissingExtraError as error:
    print(error)
"""


def test_missing_pytest_names_the_extra() -> None:
    """The rest of sqla_byok.testing needs no pytest, and the suite says how to get it."""
    child = subprocess.run([sys.executable, "-c", WITHOUT_PYTEST], capture_output=True, text=True)
    assert "sqla-byok[testing]" in child.stdout, child.stderr
