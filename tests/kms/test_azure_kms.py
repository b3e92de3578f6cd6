"""AzureKeyVault: the real Azure SDK over TLS to the double of sqla_byok.testing.azure."""

from __future__ import annotations

import base64
import itertools
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError
from azure.identity import ClientSecretCredential
from azure.keyvault.keys import KeyClient
from azure.keyvault.keys.crypto import CryptographyClient, EncryptionAlgorithm
from azure_fixtures import CLIENT_ID, REFERENCE, SECRET, VENDOR_ID, VENDOR_SECRET, Vault

import sqla_byok.kms.azure as module
from sqla_byok import Byok, errors
from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    CredentialInvalidError,
    KeyDeletedError,
    KeyDisabledError,
    KmsBlockedError,
    KmsError,
    KmsRefusedError,
    KmsUnavailableError,
    MissingExtraError,
    ThrottledError,
    WrongKeyError,
)
from sqla_byok.kms import AzureKeyVault, KmsClient, Operator, Wrapped, describe
from sqla_byok.kms.base import request_id
from sqla_byok.testing.azure import AzureServer

TENANT = "org-42"
PAYLOAD = bytes(range(100, 165))
DIRECTORY = "72f988bf-86f1-41af-91ab-2d7cd011db47"
URL = "https://contoso.vault.azure.net/keys/byok"
VERSION = "0123456789abcdef0123456789abcdef"
SOME_BLOB = Wrapped(b"b" * 256, VERSION)
CUSTOMER, OPERATOR = "customer", "operator"
OWN = {"tenant_id": DIRECTORY, "client_id": CLIENT_ID, "client_secret": REFERENCE}
PERMISSIONS = {"encrypt": ("encrypt", "decrypt"), "wrap": ("wrapKey", "unwrapKey")}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between attempts; nothing waits in these tests."""
    waited: list[float] = []
    monkeypatch.setattr(module, "_wait", waited.append)
    return waited


@pytest.fixture
def url(vault: Vault) -> str:
    """A new key of the double."""
    return vault.server.create_key()


@pytest.fixture
def wrapped(vault: Vault, url: str) -> Wrapped:
    """The payload under that key; the calls that it took are forgotten."""
    made = vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    vault.server.calls.clear()
    return made


def failure(client: KmsClient, wrapped: Wrapped = SOME_BLOB) -> KmsError:
    """The error of one unwrap, after checking what all of them have in common."""
    with pytest.raises(KmsError) as raised:
        client.unwrap(wrapped, tenant=TENANT)
    error = raised.value
    assert error.tenant == TENANT
    assert repr(TENANT) in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert error.retryable is (isinstance(error, errors.KmsNoAnswerError) and "retryable" not in vars(error))
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is type(error)
    assert (str(copy), vars(copy), copy.retryable) == (str(error), vars(error), error.retryable)
    return error


# The calls


@pytest.mark.parametrize("operations", ["encrypt", "wrap"])
@pytest.mark.parametrize("get", [True, False], ids=["with get", "without get"])
@pytest.mark.parametrize("size", [2048, 3072, 4096])
def test_each_pair_of_permissions_is_enough(vault: Vault, size: int, get: bool, operations: Any) -> None:
    """Protects least permission: two of them do, with every key size, up to the last byte that fits."""
    url = vault.server.create_key(size=size)
    vault.server.deny(url)
    vault.server.allow(url, *PERMISSIONS[operations], *(["get"] if get else []))
    client = vault.connect(url, operations=operations)
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert client.room(wrapped) == {2048: 190, 3072: 318, 4096: 446}[size]
    full = client.wrap(b"x" * client.room(wrapped), tenant=TENANT)
    assert client.unwrap(full, tenant=TENANT) == b"x" * client.room(wrapped)
    with pytest.raises(KmsRefusedError, match="payload"):
        client.wrap(b"x" * (client.room(wrapped) + 1), tenant=TENANT)
    assert vault.server.calls["get"] == 0


@pytest.mark.parametrize("operations", ["encrypt", "wrap"])
def test_the_other_pair_is_not_used(vault: Vault, url: str, operations: Any) -> None:
    """Protects a customer's choice: with one pair granted, the other setting is refused."""
    vault.server.deny(url, *PERMISSIONS[operations])
    with pytest.raises(AccessDeniedError):
        vault.connect(url, operations=operations).wrap(PAYLOAD, tenant=TENANT)


def test_requests_on_the_wire(vault: Vault, url: str) -> None:
    """Protects the format: RSA-OAEP-256, under the newest version, opened with the version that wrapped."""
    wrapped = vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    vault.connect(url, reason="probe").unwrap(wrapped, tenant=TENANT)
    calls = [each for each in vault.server.requests if each[0] in ("encrypt", "decrypt")]
    encoded = [base64.urlsafe_b64encode(each).decode().rstrip("=") for each in (PAYLOAD, wrapped.blob)]
    assert calls == [
        ("encrypt", {"alg": "RSA-OAEP-256", "value": encoded[0]}),
        ("decrypt", {"alg": "RSA-OAEP-256", "value": encoded[1], "key_version": wrapped.key_version}),
    ]
    assert re.fullmatch(r"[0-9a-f]{32}", wrapped.key_version)


def test_the_customers_log_shows_why(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects the customer's audit: the user agent, which its log has, names us and the reason."""
    vault.connect(url, reason="refresh").unwrap(wrapped, tenant=TENANT)
    assert vault.server.headers[-1]["User-Agent"].startswith("sqla-byok/refresh ")


def test_calls_are_counted(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects the quota: a new client takes a token and one call, a used one the call alone."""
    client = vault.connect(url)
    client.unwrap(wrapped, tenant=TENANT)
    assert vault.server.calls == {"discovery": 1, "token": 1, "decrypt": 1}
    client.unwrap(wrapped, tenant=TENANT)
    assert vault.server.calls == {"discovery": 1, "token": 1, "decrypt": 2}


def test_the_request_id_is_passed_on(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects the audit: an event can be found in the customer's log, whether it went well or not."""
    client = vault.connect(url)
    client.unwrap(wrapped, tenant=TENANT)
    first = request_id.get()
    assert first is not None
    vault.server.fail("decrypt", "KeyDisabled", headers={"x-ms-request-id": "the-second"})
    assert failure(client, wrapped).request_id == "the-second"
    assert request_id.get() == "the-second"
    vault.server.expire_secret(CLIENT_ID)
    failure(vault.connect(url), wrapped)
    assert request_id.get() is None


def test_rotation(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects against the customer's next key rotation: old blobs open with the old version, new ones are new."""
    vault.server.rotate(url)
    client = vault.connect(url)
    renewed = client.wrap(PAYLOAD, tenant=TENANT)
    assert renewed.key_version != wrapped.key_version
    assert {client.unwrap(each, tenant=TENANT) for each in (wrapped, renewed)} == {PAYLOAD}
    vault.server.disable(url, wrapped.key_version)
    assert type(failure(client, wrapped)) is KeyDisabledError
    assert client.unwrap(renewed, tenant=TENANT) == PAYLOAD


def test_a_version_in_the_url_is_dropped(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects rotation from the portal's "Key Identifier", which names a version."""
    newest = vault.server.rotate(url)
    client = vault.connect(f"{url}/{wrapped.key_version}")
    assert client.wrap(PAYLOAD, tenant=TENANT).key_version == newest


def test_other_key_is_the_wrong_key(vault: Vault, wrapped: Wrapped) -> None:
    """Protects isolation: a row copied to another tenant does not open under that tenant's key."""
    other = vault.server.create_key()
    newest = vault.connect(other).wrap(PAYLOAD, tenant=TENANT).key_version
    assert type(failure(vault.connect(other), Wrapped(wrapped.blob, newest))) is WrongKeyError
    assert type(failure(vault.connect(other), wrapped)) is KeyDeletedError  # no such version


def test_damaged_blob_is_the_wrong_key(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects integrity: a changed blob is refused."""
    damaged = wrapped._replace(blob=wrapped.blob[:-1] + bytes([wrapped.blob[-1] ^ 1]))
    assert type(failure(vault.connect(url), damaged)) is WrongKeyError


@pytest.mark.parametrize("version", ["", "../../secrets/other", "a/b", "a?b", "a" * 65, "a\n"])
def test_a_strange_version_goes_nowhere(vault: Vault, url: str, version: str) -> None:
    """Protects the URL: what a keystore row says of the version cannot name another place in the vault."""
    assert type(failure(vault.connect(url), Wrapped(b"b" * 256, version))) is WrongKeyError
    assert vault.server.calls == {}


def test_an_empty_payload_goes_nowhere(vault: Vault, url: str) -> None:
    """Protects the contract: every provider takes 1 byte or more."""
    with pytest.raises(KmsRefusedError, match="payload"):
        vault.connect(url).wrap(b"", tenant=TENANT)
    assert vault.server.calls == {}


# Revocation

Say = Callable[[Vault, str], None]
WAYS: dict[str, tuple[Say, Say, str]] = {
    "disable": (lambda v, u: v.server.disable(u), lambda v, u: v.server.enable(u), "KeyDisabledError"),
    "delete": (lambda v, u: v.server.delete(u), lambda v, u: v.server.recover(u), "KeyDeletedError"),
    "policy": (lambda v, u: v.server.deny(u), lambda v, u: v.server.allow(u), "AccessDeniedError"),
    "role": (lambda v, u: v.server.deny(u, by="rbac"), lambda v, u: v.server.allow(u), "AccessDeniedError"),
    "secret deleted": (
        lambda v, u: v.server.delete_secret(CLIENT_ID),
        lambda v, u: v.server.add_application(CLIENT_ID, SECRET),
        "CredentialInvalidError",
    ),
    "secret expired": (
        lambda v, u: v.server.expire_secret(CLIENT_ID),
        lambda v, u: v.server.add_application(CLIENT_ID, SECRET),
        "CredentialExpiredError",
    ),
    "application deleted": (
        lambda v, u: v.server.delete_application(CLIENT_ID),
        lambda v, u: v.server.add_application(CLIENT_ID, SECRET),
        "CredentialInvalidError",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operations", ["encrypt", "wrap"])
def test_revocation(vault: Vault, url: str, way: str, operations: Any) -> None:
    """Protects the promise: each way to say no is noticed by the next client, and taking it back is enough."""
    say, unsay, expected = WAYS[way]
    wrapped = vault.connect(url, operations=operations).wrap(PAYLOAD, tenant=TENANT)
    say(vault, url)
    error = failure(vault.connect(url, operations=operations), wrapped)
    assert type(error) is getattr(errors, expected)
    assert error.action_by == CUSTOMER
    with pytest.raises(type(error)):
        vault.connect(url, operations=operations).wrap(PAYLOAD, tenant=TENANT)
    unsay(vault, url)
    assert vault.connect(url, operations=operations).unwrap(wrapped, tenant=TENANT) == PAYLOAD


def test_consent_withdrawn(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects revocation with the vendor's application: the customer removes it from its directory."""
    vault.server.delete_application(VENDOR_ID)
    error = failure(vault.connect(url, credential="vendor-app"), wrapped)
    assert type(error) is CredentialInvalidError
    assert error.action_by == CUSTOMER
    assert "consent" in str(error)


@pytest.mark.parametrize(
    ("by", "operations", "words"),
    [
        ("policy", "encrypt", ["key permission Decrypt", "Access policies"]),
        ("policy", "wrap", ["key permission Unwrap Key", "Access policies"]),
        ("rbac", "encrypt", ["keys/decrypt/action", "Access control (IAM)"]),
        ("rbac", "wrap", ["keys/unwrap/action", "Access control (IAM)"]),
    ],
)
def test_a_denial_names_the_permission(
    vault: Vault, url: str, by: Any, operations: Any, words: list[str]
) -> None:
    """Protects onboarding: the message is what the customer's administrator has to do, and on which page."""
    vault.server.deny(url, *PERMISSIONS[operations], by=by)
    error = failure(vault.connect(url, operations=operations))
    assert type(error) is AccessDeniedError
    assert [word for word in (*words, url) if word not in str(error)] == []


def test_firewall(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects against taking an address that was never allowed for a "no" of the customer's."""
    vault.server.firewall = True
    error = failure(vault.connect(url, settings={"attempts": 3}), wrapped)
    assert type(error) is KmsBlockedError
    assert error.action_by == OPERATOR
    assert vault.server.calls["decrypt"] == 1


def test_key_operations(vault: Vault) -> None:
    """Protects the difference between a permission and the key's own permitted operations."""
    url = vault.server.create_key(key_ops=["encrypt", "wrapKey"])
    wrapped = vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    error = failure(vault.connect(url), wrapped)
    assert type(error) is AccessDeniedError
    assert "permitted operations" in str(error)


# The error tables

RESPONSES = [
    # code, status, class, who must act
    ("KeyDisabled", 403, "KeyDisabledError", CUSTOMER),
    ("KeyNotYetValid", 403, "KeyDisabledError", CUSTOMER),
    ("KeyExpired", 403, "KeyDisabledError", CUSTOMER),
    ("KeyOperationForbidden", 403, "AccessDeniedError", CUSTOMER),
    ("ForbiddenByPolicy", 403, "AccessDeniedError", CUSTOMER),
    ("ForbiddenByRbac", 403, "AccessDeniedError", CUSTOMER),
    ("AccessDenied", 403, "AccessDeniedError", CUSTOMER),
    ("", 403, "AccessDeniedError", CUSTOMER),
    ("ForbiddenByFirewall", 403, "KmsBlockedError", OPERATOR),
    ("ForbiddenByConnection", 403, "KmsBlockedError", OPERATOR),
    ("SomethingNew", 403, "KmsRefusedError", OPERATOR),
    ("KeyNotFound", 404, "KeyDeletedError", CUSTOMER),
    ("NotFound", 404, "KeyDeletedError", CUSTOMER),
    ("ObjectIsDeletedButRecoverable", 409, "KeyDeletedError", CUSTOMER),
    ("ObjectIsBeingDeleted", 409, "KeyDeletedError", CUSTOMER),
    ("ObjectIsBeingRecovered", 409, "KmsUnavailableError", OPERATOR),
    ("Conflict", 409, "KmsUnavailableError", OPERATOR),
    ("BadParameter", 400, "WrongKeyError", OPERATOR),
    ("SomethingNew", 400, "KmsRefusedError", OPERATOR),
    ("Unauthorized", 401, "CredentialInvalidError", OPERATOR),
    ("RequestTimeout", 408, "KmsUnavailableError", OPERATOR),
    ("Throttled", 429, "ThrottledError", OPERATOR),
    ("SomethingNew", 429, "ThrottledError", OPERATOR),
    ("InternalServerError", 500, "KmsUnavailableError", OPERATOR),
    ("BadGateway", 502, "KmsUnavailableError", OPERATOR),
    ("ServiceUnavailable", 503, "KmsUnavailableError", OPERATOR),
    ("GatewayTimeout", 504, "KmsUnavailableError", OPERATOR),
    ("SomethingNew", 418, "KmsRefusedError", OPERATOR),
    ("Moved", 307, "KmsRefusedError", OPERATOR),
]


@pytest.mark.parametrize(("code", "status", "expected", "action_by"), RESPONSES)
def test_every_error_code(
    vault: Vault, url: str, code: str, status: int, expected: str, action_by: str
) -> None:
    """Protects the line between "no" and "no answer", and who must act, for each code of a vault."""
    vault.server.fail("decrypt", code, status)
    error = failure(vault.connect(url))
    assert type(error) is getattr(errors, expected)
    assert error.action_by == action_by
    assert (code or "Forbidden") in str(error) or "HTTP 401" in str(error)
    assert vault.server.calls["decrypt"] == 1


def test_wrap_translates_as_well(vault: Vault, url: str) -> None:
    """Protects onboarding and rewrapping: the errors of encrypting are ours too, and its 400 is not a wrong key."""
    vault.server.fail("encrypt", "Throttled", 429)
    with pytest.raises(ThrottledError, match="encrypt") as raised:
        vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    assert raised.value.__context__ is None
    vault.server.fail("encrypt", "BadParameter", 400)
    with pytest.raises(KmsRefusedError, match="RSA key") as refused:
        vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    assert type(refused.value) is KmsRefusedError


TOKEN_RESPONSES = [
    # code, status, class, who must act with the customer's application, and with ours
    ("AADSTS7000222", 401, "CredentialExpiredError", CUSTOMER, OPERATOR),
    ("AADSTS7000215", 401, "CredentialInvalidError", CUSTOMER, OPERATOR),
    ("AADSTS700016", 400, "CredentialInvalidError", CUSTOMER, CUSTOMER),
    ("AADSTS7000112", 400, "CredentialInvalidError", CUSTOMER, CUSTOMER),
    ("AADSTS7000229", 400, "CredentialInvalidError", CUSTOMER, CUSTOMER),
    ("AADSTS90002", 400, "CredentialInvalidError", CUSTOMER, CUSTOMER),
    ("AADSTS900023", 400, "CredentialInvalidError", CUSTOMER, CUSTOMER),
    ("AADSTS53003", 400, "AccessDeniedError", CUSTOMER, CUSTOMER),
    ("AADSTS700024", 401, "CredentialInvalidError", OPERATOR, OPERATOR),
    ("AADSTS700027", 401, "CredentialInvalidError", OPERATOR, OPERATOR),
    ("AADSTS70021", 400, "CredentialInvalidError", OPERATOR, OPERATOR),
    ("AADSTS700213", 400, "CredentialInvalidError", OPERATOR, OPERATOR),
    ("AADSTS1234567", 400, "CredentialInvalidError", OPERATOR, OPERATOR),
    ("AADSTS50196", 400, "ThrottledError", OPERATOR, OPERATOR),
    ("AADSTS90055", 400, "ThrottledError", OPERATOR, OPERATOR),
    ("AADSTS50000", 400, "KmsUnavailableError", OPERATOR, OPERATOR),
    ("AADSTS90033", 400, "KmsUnavailableError", OPERATOR, OPERATOR),
]


@pytest.mark.parametrize("vendor", [False, True], ids=["own", "vendor"])
@pytest.mark.parametrize(("code", "status", "expected", "own_acts", "vendor_acts"), TOKEN_RESPONSES)
def test_every_token_error(
    vault: Vault,
    url: str,
    code: str,
    status: int,
    expected: str,
    own_acts: str,
    vendor_acts: str,
    vendor: bool,
) -> None:
    """Protects from blaming the wrong one: an expired secret of our own application is ours to renew."""
    vault.server.fail("token", code, status)
    options = {"credential": "vendor-app"} if vendor else {}
    error = failure(vault.connect(url, **options))
    assert type(error) is getattr(errors, expected)
    assert error.action_by == (vendor_acts if vendor else own_acts)
    assert code in str(error)
    assert vault.server.calls["decrypt"] == 0


@pytest.mark.parametrize("vendor", [False, True], ids=["own", "vendor"])
@pytest.mark.parametrize("operation", ["discovery", "token"])
@pytest.mark.parametrize("status", [500, 503])
def test_token_endpoint_in_trouble(
    vault: Vault, url: str, wrapped: Wrapped, operation: str, status: int, vendor: bool
) -> None:
    """Protects the outage grace: a directory in trouble is "no answer", and is asked again in earnest."""
    options = {"credential": "vendor-app"} if vendor else {}
    vault.server.fail(operation, "trouble", status, headers={"Retry-After": "2"})
    error = failure(vault.connect(url, **options), wrapped)
    assert type(error) is KmsUnavailableError
    assert error.retry_after == (None if vendor else 2.0)  # of our own application's answers we see less
    vault.server.fail(operation, "trouble", status, times=2)
    vault.server.calls.clear()
    client = vault.connect(url, settings={"attempts": 3}, **options)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert vault.server.calls[operation] == 3


@pytest.mark.parametrize("operation", ["discovery", "token"])
def test_token_endpoint_throttles(vault: Vault, url: str, wrapped: Wrapped, operation: str) -> None:
    """Protects the same for 429, which the SDK reads as any other refusal."""
    vault.server.fail(operation, "trouble", 429, headers={"Retry-After": "2"})
    error = failure(vault.connect(url), wrapped)
    assert type(error) is ThrottledError
    assert error.retry_after == 2.0


BODIES = [
    "",
    "<html>",
    "[]",
    "null",
    "{}",
    '{"kid": 3, "value": "AAAA"}',
    '{"kid": "https://x/keys/KEY/0123", "value": 3}',
    '{"kid": "https://x/keys/KEY/0123", "value": "A A"}',
    '{"kid": "https://x/keys/KEY/0123", "value": ""}',
    '{"kid": "https://x/keys/KEY/0123", "value": "AAAAA"}',
    '{"kid": "https://x/keys/KEY", "value": "AAAA"}',
    '{"kid": "https://x/keys/other/0123", "value": "AAAA"}',
]


@pytest.mark.parametrize("body", BODIES)
def test_a_200_that_is_no_answer(vault: Vault, body: str) -> None:
    """Protects fail-closed: an answer that cannot be read is never a key or a blob, and nothing of it is shown."""
    url = vault.server.create_key("KEY")
    vault.server.fail("decrypt", body, 200)
    assert type(failure(vault.connect(url))) is KmsRefusedError
    vault.server.fail("encrypt", body, 200)
    with pytest.raises(KmsRefusedError):
        vault.connect(url).wrap(PAYLOAD, tenant=TENANT)


def test_what_a_200_looks_like(vault: Vault) -> None:
    """Shows that the bodies above are refused for what is wrong with them, and nothing else."""
    url = vault.server.create_key("KEY")
    vault.server.fail("decrypt", '{"kid": "https://x/keys/key/0123", "value": "AAAA"}', 200)
    assert vault.connect(url).unwrap(SOME_BLOB, tenant=TENANT) == b"\0\0\0"


# Trying again


@pytest.mark.parametrize(("status", "code"), [(429, "Throttled"), (503, "ServiceUnavailable"), (500, "x")])
def test_no_answer_is_tried_again(
    vault: Vault, url: str, wrapped: Wrapped, waits: list[float], status: int, code: str
) -> None:
    """Protects both sides: a passing fault is ridden out, 429 without Retry-After too, and three tries are all."""
    client = vault.connect(url, settings={"attempts": 3})
    vault.server.fail("decrypt", code, status, times=2)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert vault.server.calls["decrypt"] == 3
    assert 0.5 <= waits[0] <= 1.0 <= waits[1] <= 2.0
    vault.server.fail("decrypt", code, status, times=3)
    failure(client, wrapped)
    assert vault.server.calls["decrypt"] == 6
    assert len(waits) == 4


def test_defaults(vault: Vault, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the time to deny: short timeouts, and three attempts in all, unless the profile says otherwise."""
    timeouts = []
    original = socket.create_connection
    monkeypatch.setattr(
        "urllib3.util.connection.create_connection",
        lambda address, timeout=None, *args, **options: (
            timeouts.append(timeout),
            original(address, timeout),
        )[1],
    )
    client = vault.key(url).connect({**vault.server.profile(), "proxies": {}}, vault.operator)
    vault.server.fail("decrypt", "x", 500, times=9)
    failure(client)
    assert vault.server.calls["decrypt"] == 3
    assert set(timeouts) == {1.0}


def test_waits_differ(vault: Vault, url: str, waits: list[float]) -> None:
    """Protects the vault from many processes that come back in step."""
    client = vault.connect(url, settings={"attempts": 2})
    for _ in range(5):
        vault.server.fail("decrypt", "x", 500, times=2)
        failure(client)
    assert len(set(waits)) == 5


@pytest.mark.parametrize(
    ("value", "seconds", "waited"),
    [("2", 2.0, [2.0]), ("0", 0.0, [0.0]), ("5", 5.0, [5.0]), ("60", 60.0, []), ("soon", None, None)],
)
def test_retry_after(
    vault: Vault, url: str, waits: list[float], value: str, seconds: float | None, waited: list[float] | None
) -> None:
    """Protects back-off: the vault's own wish is honoured if it is short, and passed on where it is a number."""
    client = vault.connect(url, settings={"attempts": 2})
    vault.server.fail("decrypt", "Throttled", 429, times=2, headers={"Retry-After": value})
    error = failure(client)
    assert type(error) is ThrottledError
    assert error.retry_after == seconds
    assert waits == waited or (waited is None and 0.5 <= waits[0] <= 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_no_is_not_tried_again(
    vault: Vault, url: str, wrapped: Wrapped, waits: list[float], way: str
) -> None:
    """Protects the time to deny: a "no" is believed at once."""
    WAYS[way][0](vault, url)
    failure(vault.connect(url, settings={"attempts": 3}), wrapped)
    assert waits == []
    assert vault.server.calls["decrypt"] + vault.server.calls["token"] <= 2


# Tokens


def test_a_token_lives_no_longer_than_its_client(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects revocation: Azure's tokens outlive their secret by an hour, so each client has to get its own."""
    used = vault.connect(url)
    used.unwrap(wrapped, tenant=TENANT)
    vault.server.delete_secret(CLIENT_ID)
    assert used.unwrap(wrapped, tenant=TENANT) == PAYLOAD  # this is what a kept token would do
    assert type(failure(vault.connect(url), wrapped)) is CredentialInvalidError


def test_a_refused_token_is_not_kept(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects against a 401 that lasts for ever: the next call of the same client gets a new token."""
    client = vault.connect(url)
    client.unwrap(wrapped, tenant=TENANT)
    vault.server.revoke_tokens()
    error = failure(client, wrapped)
    assert type(error) is CredentialInvalidError
    assert "AKV10000" in str(error)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD


def test_a_renewed_secret_is_taken_up(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects a swap without restart: the secret is looked up by each client, for its tenant."""
    vault.server.add_application(CLIENT_ID, "another")
    assert type(failure(vault.connect(url), wrapped)) is CredentialInvalidError
    vault.secrets.known["BYOK_ORG42_SECRET"] = "another"
    assert vault.connect(url).unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert set(vault.secrets.asked) == {(REFERENCE, TENANT)}


def test_a_missing_secret(vault: Vault, url: str) -> None:
    """Protects the order: a secret that is not there is told before anything is sent."""
    vault.secrets.known.clear()
    error = failure(vault.connect(url))
    assert type(error) is CredentialInvalidError
    assert error.action_by == OPERATOR
    assert vault.server.calls == {}


def test_other_directories(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects onboarding from a mistyped directory: a wrong one and one of another vault are told apart."""
    unknown = "00000000-1111-2222-3333-444444444444"
    error = failure(vault.connect(url, tenant_id=unknown), wrapped)
    assert type(error) is CredentialInvalidError
    assert "AADSTS90002" in str(error)
    assert error.action_by == CUSTOMER
    vault.server.add_directory(unknown)
    error = failure(vault.connect(url, tenant_id=unknown), wrapped)
    assert type(error) is CredentialInvalidError
    assert "another directory" in str(error)
    assert error.action_by == CUSTOMER


def test_a_directory_by_its_domain(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects customers who know their directory by name, which the SDK takes for another than the vault's."""
    client = vault.connect(url, tenant_id=vault.server.domain)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD


def test_the_vendors_application(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects the way without a customer's secret; the factory is asked anew by each client."""
    asked: list[str] = []

    def factory(directory: str) -> Any:
        asked.append(directory)
        return vault.vendor_credential(directory)

    vault.operator = Operator(vault.secrets, {"vendor-app": factory})
    for _ in range(2):
        assert vault.connect(url, credential="vendor-app").unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert asked == [vault.server.directory] * 2
    assert vault.secrets.asked == [(REFERENCE, TENANT)]  # when it was wrapped
    assert {form["client_id"] for name, form in vault.server.requests[-4:] if name == "token"} == {VENDOR_ID}


def test_a_credential_of_the_older_kind(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects credentials that have get_token alone, as they were before azure-core 1.31."""

    class Older:
        def __init__(self, directory: str) -> None:
            self._newer = vault.vendor_credential(directory)

        def get_token(self, *scopes: str, **options: Any) -> AccessToken:
            token: AccessToken = self._newer.get_token(*scopes, **options)
            return token

    vault.operator = Operator(vault.secrets, {"vendor-app": Older})
    assert vault.connect(url, credential="vendor-app").unwrap(wrapped, tenant=TENANT) == PAYLOAD


class _Broken:
    def __init__(self, directory: str = "") -> None:
        pass

    def get_token_info(self, *scopes: str, options: Any = None) -> Any:
        raise KeyError(VENDOR_SECRET)


def _fails(directory: str) -> Any:
    raise KeyError(VENDOR_SECRET)


@pytest.mark.parametrize("factory", [_fails, _Broken])
def test_a_broken_factory(vault: Vault, url: str, factory: Any) -> None:
    """Protects the contract: what the operator's own code raises is typed and shows nothing."""
    vault.operator = Operator(vault.secrets, {"vendor-app": factory})
    error = failure(vault.connect(url, credential="vendor-app"))
    assert type(error) is CredentialInvalidError
    assert error.action_by == OPERATOR
    assert VENDOR_SECRET not in "".join(traceback.format_exception(error))


# The network


def no_answer(client: KmsClient, *, retryable: bool = True) -> KmsUnavailableError:
    """The error of a call that got no answer."""
    error = failure(client)
    assert type(error) is KmsUnavailableError
    assert error.action_by == OPERATOR
    assert error.retryable is retryable
    return error


def reach(port: int, **settings: Any) -> KmsClient:
    """A client whose vault and authority are both at this port."""
    at = f"localhost:{port}"
    given = {"attempts": 1, "authority": at, "disable_instance_discovery": True, "hosts": [at], **settings}
    operator = Operator(credentials={"any": lambda _: _Token()})
    return AzureKeyVault(f"https://{at}/keys/byok", tenant_id=DIRECTORY, credential="any").connect(
        given, operator
    )


class _Token:
    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        return AccessToken("any", 4102444800)


def test_read_timeout(vault: Vault, url: str) -> None:
    """Protects against a vault that hangs: a timeout is "no answer"."""
    client = vault.connect(url, settings={"read_timeout": 0.1})
    vault.server.delay = 0.4
    assert "ServiceResponse" in str(no_answer(client))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fills the listen queue as Linux has it")
def test_connect_timeout(azure_environment: None) -> None:
    """Protects against a network that swallows packets: connecting has its own short timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        client = reach(listener.getsockname()[1], connect_timeout=0.1)
        assert "ServiceRequest" in str(no_answer(client))
        for filler in fillers:
            filler.close()


def test_connection_refused(azure_environment: None, waits: list[float]) -> None:
    """Protects against an endpoint that is down; it is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    no_answer(reach(port, attempts=3))
    assert len(waits) == 2


@pytest.mark.parametrize("heard", [1, 65536], ids=["reset", "closed"])
def test_connection_broken_off(azure_environment: None, heard: int) -> None:
    """Protects against a load balancer that drops the connection: that is no failed handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(heard)
            connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        no_answer(reach(listener.getsockname()[1]))
        thread.join()


def test_the_authority_is_down(vault: Vault, url: str) -> None:
    """Protects the outage grace: a token endpoint that is down is "no answer", whatever the SDK makes of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = no_answer(vault.connect(url, settings={"authority": f"localhost:{port}"}))
    assert "token" in str(error)


@pytest.mark.parametrize(
    ("number", "retryable"),
    [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)],
    ids=["unknown", "no resolver"],
)
@pytest.mark.parametrize("authority", [True, False], ids=["authority", "vault"])
def test_dns(
    vault: Vault,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    number: int,
    retryable: bool,
    authority: bool,
) -> None:
    """Protects the outage grace: an unknown host is nothing that time mends, a silent resolver is."""
    original = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        if host == "gone.invalid":
            raise socket.gaierror(number, "resolver says so")
        return original(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    host = f"localhost:{vault.server.port}" if authority else "gone.invalid"
    settings = {"hosts": [host], "attempts": 2, **({"authority": "gone.invalid"} if authority else {})}
    no_answer(vault.connect(f"https://{host}/keys/byok", settings=settings), retryable=retryable)
    assert len(waits) == int(retryable)


def test_proxy_that_refuses(vault: Vault, url: str) -> None:
    """Protects the vendor's own firewall from being taken for a "no", and its password from the message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = vault.connect(url, settings={"proxies": {"https": f"http://user:s3cret@127.0.0.1:{port}"}})
    error = failure(client)
    assert type(error) is KmsBlockedError
    assert "s3cret" not in str(error)
    assert vault.server.calls == {}


@pytest.mark.parametrize("doubted", ["authority", "vault"])
def test_tls_certificate_is_checked(vault: Vault, url: str, waits: list[float], doubted: str) -> None:
    """Protects tenant keys and secrets on the wire: an unknown authority is refused unless ca_file names it."""
    settings = {"ca_file": None, "attempts": 3}
    options = {"credential": "vendor-app"} if doubted == "vault" else {}  # which knows the authority's
    error = no_answer(vault.connect(url, settings=settings, **options), retryable=False)
    assert "SSLError" in str(error)
    assert waits == []
    assert [name for name, _ in vault.server.requests] == (["discovery", "token"] if options else [])
    assert vault.server.headers == []


def test_redirects_are_not_followed(vault: Vault, url: str) -> None:
    """Protects the payload: the vault cannot send it on to another host."""
    vault.server.fail("encrypt", "Moved", 307, headers={"Location": f"{vault.server.url}/keys/other/encrypt"})
    with pytest.raises(KmsRefusedError):
        vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    assert vault.server.calls["encrypt"] == 1


def test_cookies_are_not_kept(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects tenants from each other on connections that they share."""
    for operation in ("decrypt", "token"):
        vault.server.fail(operation, "x", 503, headers={"Set-Cookie": "who=org-42; Path=/"})
    failure(vault.connect(url), wrapped)
    failure(vault.connect(url), wrapped)
    assert vault.connect(url).unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert not [headers for headers in vault.server.headers if "Cookie" in headers]


def test_threads_share_a_client(vault: Vault, url: str, wrapped: Wrapped) -> None:
    """Protects the direct mode, which unwraps many values at once."""
    client = vault.connect(url)
    start = threading.Barrier(8)

    def work(_: int) -> bytes:
        start.wait()
        return client.unwrap(wrapped, tenant=TENANT)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(8))) == {PAYLOAD}
    assert vault.server.calls["decrypt"] == 8
    assert len(vault.secrets.asked) == 2  # by the client that wrapped, and by this one


def test_connections_are_shared(
    vault: Vault, url: str, wrapped: Wrapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the CPU: a TLS connection takes 20 ms, so clients share them; a forked process makes its own."""
    made = []
    original = module._make_transport
    monkeypatch.setattr(module, "_make_transport", lambda profile: made.append(profile) or original(profile))
    settings = {"read_timeout": 2 + next(_unique) / 1024}
    for _ in range(3):
        vault.connect(url, settings=settings).unwrap(wrapped, tenant=TENANT)
    assert len(made) == 1
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert vault.connect(url, settings=settings).unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert len(made) == 2


_unique = itertools.count(1)


# Azure's own names


@pytest.mark.parametrize(
    ("host", "authority"),
    [
        ("contoso.vault.azure.net", "login.microsoftonline.com"),
        ("contoso.managedhsm.azure.net", "login.microsoftonline.com"),
        ("contoso.vault.usgovcloudapi.net", "login.microsoftonline.us"),
        ("contoso.vault.azure.cn", "login.chinacloudapi.cn"),
    ],
)
def test_azures_hosts(vault: Vault, azure_names: list[str], host: str, authority: str) -> None:
    """Protects customers of Managed HSM and the sovereign clouds: right host, right token, by the default profile."""
    vault.server.create_key("byok")
    settings = {
        "ca_file": vault.server.ca_file,
        "disable_instance_discovery": True,
        "read_timeout": 2 + next(_unique) / 1024,  # for connections of its own
    }
    client = vault.key(f"https://{host}/keys/byok").connect(settings, vault.operator)
    assert client.unwrap(client.wrap(PAYLOAD, tenant=TENANT), tenant=TENANT) == PAYLOAD
    assert set(azure_names) == {host, authority}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "contoso.vault.azure.net.evil.example",
        "vault.azure.net",
        "xvault.azure.net",
        "127.0.0.1:8443",
    ],
)
def test_other_hosts_are_refused(vault: Vault, azure_names: list[str], host: str) -> None:
    """Protects the secret and the tenant key from a host of somebody's choice: refused before any call."""
    kms = AzureKeyVault(f"https://{host}/keys/byok", **OWN)
    with pytest.raises(ConfigurationError, match=re.escape(repr(host))):
        kms.connect({}, vault.operator)
    assert azure_names == []
    assert vault.secrets.asked == []
    assert vault.server.calls == {}


@pytest.mark.parametrize("host", ["contoso.vault.azure.net", "localhost"])
def test_a_token_is_for_its_vault_only(vault: Vault, azure_names: list[str], host: str) -> None:
    """Protects tokens: a vault that asks for a token of another service does not get one, whoever runs it."""
    url = vault.server.create_key("byok")
    challenge = (
        f'Bearer authorization="https://x/{vault.server.directory}", resource="https://graph.microsoft.com"'
    )
    vault.connect(url).wrap(b"x", tenant="org-42")  # the process knows the vault's own challenge from here on
    vault.server.calls.clear()
    vault.server.requests.clear()
    vault.server.fail("decrypt", "Unauthorized", 401, headers={"WWW-Authenticate": challenge})
    client = vault.connect(url)
    if host != "localhost":
        settings = {"ca_file": vault.server.ca_file, "attempts": 1, "disable_instance_discovery": True}
        client = vault.key(URL).connect(settings, vault.operator)
    # Refused, whether or not the process knew the vault's own challenge before; or asked again with the right token.
    assert isinstance(failure(client), KeyDeletedError if host == "localhost" else KmsRefusedError)
    assert vault.server.calls["decrypt"] == (2 if host == "localhost" else 1)
    scopes = {form["scope"].split(" ")[0] for name, form in vault.server.requests if name == "token"}
    assert scopes == {"https://vault.azure.net/.default"}


# Secrets


def traces(secret: bytes) -> list[str]:
    """What a log would show of a secret, whichever way it was printed."""
    encoded = [base64.b64encode(secret).decode(), base64.urlsafe_b64encode(secret).decode()]
    return [*encoded, *(each[8:40] for each in encoded), secret.hex(), repr(secret)[2:-1], str(list(secret))]


def test_nothing_secret_is_shown(vault: Vault, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Protects key, secret and token from logs at DEBUG, messages, tracebacks and pickles."""
    caplog.set_level(logging.DEBUG)
    payload = os.urandom(65)
    shown = []
    for options in ({}, {"credential": "vendor-app"}):
        client = vault.connect(url, **options)
        wrapped = client.wrap(payload, tenant=TENANT)
        client.unwrap(wrapped, tenant=TENANT)
        vault.server.disable(url)
        shown.append(failure(client, wrapped))
        vault.server.fail("token", "AADSTS7000215", 401)
        shown.append(failure(vault.connect(url, **options), wrapped))
        vault.server.enable(url)
        shown.append(vault.key(url, **options))
    tokens = list(vault.server._tokens)
    vault.server.revoke_tokens()
    shown.append(failure(client, wrapped))
    logged = [f"{r.getMessage()} {r.msg!r} {r.args!r} {r.exc_text}" for r in caplog.records]
    text = "\n".join(
        [*logged, *(f"{each!r} {each} {vars(each)} {pickle.dumps(each)!r}" for each in shown)]
        + ["".join(traceback.format_exception(each)) for each in shown if isinstance(each, Exception)]
    )
    assert tokens
    for secret in (SECRET, VENDOR_SECRET, *tokens, *traces(payload)):
        assert secret not in text
    assert "POST https" not in "".join(logged)


def test_an_answer_that_echoes_is_not_shown(vault: Vault, url: str) -> None:
    """Protects the tenant key from an error report, even if the vault's answer repeats it."""
    echo = base64.urlsafe_b64encode(PAYLOAD).decode()
    for code, status in ((echo, 400), ("SomethingNew", 400), ("KeyDisabled", 403), (echo, 200), (echo, 401)):
        vault.server.fail("encrypt", code, status, message=echo)
        with pytest.raises(KmsRefusedError) as raised:
            vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
        shown = "".join(traceback.format_exception(raised.value)) + repr(vars(raised.value))
        assert not [trace for trace in traces(PAYLOAD) if trace in shown]


def test_other_callers_log_as_before(vault: Vault, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Protects the application's own debugging, and shows that the test above would hear something."""
    caplog.set_level(logging.DEBUG)
    vault.connect(url).wrap(PAYLOAD, tenant=TENANT)
    before = len(caplog.records)
    plain_client(vault).get_key(url.rpartition("/")[2])
    assert any(r.name.startswith("azure") for r in caplog.records[before:])
    assert not [
        r for r in caplog.records[:before] if r.name.partition(".")[0] in ("azure", "msal", "urllib3")
    ]


# With all of the library


@pytest.mark.parametrize("vendor", [False, True], ids=["own", "vendor"])
def test_a_tenant_under_its_own_key(
    vault: Vault, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: bool
) -> None:
    """Protects the wiring: profile, secrets and credentials of a Byok reach the vault; its log shows why; no is no."""
    monkeypatch.setenv("BYOK_ORG42_SECRET", SECRET)
    monkeypatch.setenv("BYOK_KEYSTORE_KEY", base64.b64encode(bytes(32)).decode())
    byok = Byok(
        f"sqlite:///{tmp_path / 'keystore.db'}",
        keystore_key="env:BYOK_KEYSTORE_KEY",
        kms_profiles={"default": vault.server.profile()},
        secret_prefixes=("env:BYOK_ORG42_",),
        credentials={"vendor-app": vault.vendor_credential},
    )
    byok.create_keystore()
    byok.onboard(TENANT, vault.key(url, **({"credential": "vendor-app"} if vendor else {})))
    byok.forget_keys()
    with byok.tenant(TENANT):
        pass
    agents = [headers["User-Agent"].partition(" ")[0] for headers in vault.server.headers]
    assert {"sqla-byok/onboard", "sqla-byok/open"} <= set(agents)
    vault.server.disable(url)
    byok.forget_keys()
    with pytest.raises(KeyDisabledError), byok.tenant(TENANT):
        pass
    byok.close()


def test_a_secret_that_is_not_the_tenants(
    vault: Vault, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the vendor's own secrets: a customer cannot name one and have it sent to its directory."""
    monkeypatch.setenv("DATABASE_URL", SECRET)
    monkeypatch.setenv("BYOK_KEYSTORE_KEY", base64.b64encode(bytes(32)).decode())
    byok = Byok(
        f"sqlite:///{tmp_path / 'keystore.db'}",
        keystore_key="env:BYOK_KEYSTORE_KEY",
        kms_profiles={"default": vault.server.profile()},
        secret_prefixes=("env:BYOK_",),
    )
    byok.create_keystore()
    with pytest.raises(ConfigurationError, match="prefixes"):
        byok.onboard(TENANT, vault.key(url, client_id=CLIENT_ID, client_secret="env:DATABASE_URL"))
    assert vault.server.calls == {}
    byok.close()


# The double, with the SDK as it comes


def plain_credential(vault: Vault, secret: str = SECRET) -> ClientSecretCredential:
    return ClientSecretCredential(
        vault.server.directory,
        CLIENT_ID,
        secret,
        authority=f"https://{vault.server.authority}",
        disable_instance_discovery=True,
        connection_verify=vault.server.ca_file,
    )


def plain_client(vault: Vault) -> KeyClient:
    return KeyClient(
        vault.server.url,
        plain_credential(vault),
        connection_verify=vault.server.ca_file,
        verify_challenge_resource=False,
    )


@pytest.mark.parametrize("get", [True, False], ids=["with get", "without get"])
def test_the_double_speaks_to_the_sdk(vault: Vault, get: bool) -> None:
    """Protects users' tests: the SDK's own clients work with the double, and meet its refusals."""
    url = vault.server.create_key("plain", 3072)
    if not get:
        vault.server.deny(url, "get")
    client = CryptographyClient(
        url,
        plain_credential(vault),
        connection_verify=vault.server.ca_file,
        verify_challenge_resource=False,
    )
    encrypted = client.encrypt(EncryptionAlgorithm.rsa_oaep_256, PAYLOAD)
    assert client.decrypt(EncryptionAlgorithm.rsa_oaep_256, encrypted.ciphertext).plaintext == PAYLOAD
    assert vault.server.calls["encrypt"] == (0 if get else 1)
    vault.server.disable(url)
    with pytest.raises(HttpResponseError) as raised:
        client.decrypt(EncryptionAlgorithm.rsa_oaep_256, encrypted.ciphertext)
    assert raised.value.status_code == 403
    if get:
        with client:
            key = plain_client(vault).get_key("plain")
        assert (key.name, key.key_type, key.properties.enabled) == ("plain", "RSA", False)


def test_the_double_refuses_what_the_vault_would(vault: Vault) -> None:
    """Protects users' tests from a double that is kinder than Azure: names, pages, deleted keys, other tokens."""
    client = plain_client(vault)
    vault.server.create_key("decrypt")
    assert client.get_key("Decrypt").name == "decrypt"
    vault.server.delete("decrypt")
    for name in ("decrypt", "other"):
        with pytest.raises(ResourceNotFoundError):
            client.get_key(name)
    with pytest.raises(HttpResponseError, match="MethodNotAllowed"):
        client.create_rsa_key("new")
    with pytest.raises(ClientAuthenticationError, match="AADSTS7000215"):
        plain_credential(vault, "wrong").get_token("https://vault.azure.net/.default")
    vault.server.revoke_tokens()
    with pytest.raises(ClientAuthenticationError):
        client.get_key("other")


# The description


def test_describe_restores_an_equal_value() -> None:
    """Protects the keystore round trip: an equal, hashable, frozen value that holds no secret."""
    kms = AzureKeyVault(URL, **OWN, expires=date(2027, 6, 30), operations="wrap", profile="europe")
    config = {
        "key_url": URL,
        "tenant_id": DIRECTORY,
        "client_id": CLIENT_ID,
        "client_secret": REFERENCE,
        "expires": "2027-06-30",
        "operations": "wrap",
        "profile": "europe",
    }
    assert kms.config() == config
    assert describe("azure", config) == kms
    assert hash(describe(kms.provider, kms.config())) == hash(kms)
    assert kms.expires() == date(2027, 6, 30)
    assert (kms.vault_url, kms.key_name) == ("https://contoso.vault.azure.net", "byok")
    assert pickle.loads(pickle.dumps(kms)) == kms  # noqa: S301 - our own
    with pytest.raises(AttributeError):
        kms.profile = "other"  # type: ignore[misc]


def test_describe_the_vendors_application() -> None:
    """Protects the same for the way without a customer's secret."""
    kms = AzureKeyVault(URL, tenant_id="contoso.example", credential="vendor-app")
    assert kms.config() == {
        "key_url": URL,
        "tenant_id": "contoso.example",
        "credential": "vendor-app",
        "operations": "encrypt",
        "profile": "default",
    }
    assert describe("azure", kms.config()) == kms
    assert kms.expires() is None


def test_claims() -> None:
    """Protects "one key, one tenant": key and secret are claimed, however the key's name is written; ours is not."""
    ours = AzureKeyVault(URL.replace("byok", "Byok"), tenant_id=DIRECTORY, credential="vendor-app")
    assert ours.claims() == ("azure:contoso.vault.azure.net/keys/byok",)
    assert AzureKeyVault(URL, **OWN).claims() == (*ours.claims(), f"secret:{REFERENCE}")


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ({"key_url": URL}, URL),
        ({"key_url": f"{URL}/{VERSION}"}, URL),
        ({"key_url": f"{URL}/"}, URL),
        ({"key_url": "HTTPS://Contoso.Vault.Azure.Net:443/keys/Byok-1"}, URL.replace("byok", "Byok-1")),
        ({"key_url": "https://hsm.managedhsm.azure.net/keys/k"}, "https://hsm.managedhsm.azure.net/keys/k"),
        ({"key_url": "https://localhost:8443/keys/k"}, "https://localhost:8443/keys/k"),
        ({"vault_url": "Contoso", "key_name": "byok"}, URL),
        ({"vault_url": "https://contoso.vault.azure.net/", "key_name": "byok"}, URL),
        ({"vault_url": "https://Contoso.vault.azure.net", "key_name": "byok"}, URL),
    ],
)
def test_keys_are_named_in_one_way(arguments: dict[str, str], url: str) -> None:
    """Protects "onboarded twice with the same key is fine": all ways to write a key make one value."""
    kms = AzureKeyVault(**arguments, **OWN)
    assert kms.key_url == url
    assert kms == AzureKeyVault(
        url, tenant_id=DIRECTORY.upper(), client_id=CLIENT_ID.upper(), client_secret=REFERENCE
    )


BAD = [
    # what is different, and what the message must name
    ({"key_url": None}, "key_name"),
    ({"key_url": "http://contoso.vault.azure.net/keys/byok"}, "key_url"),
    ({"key_url": "https://user@contoso.vault.azure.net/keys/byok"}, "key_url"),
    ({"key_url": "https://contoso.vault.azure.net\\@evil.example/keys/byok"}, "key_url"),
    ({"key_url": "https://contoso.vault.azure.net/secrets/byok"}, "key_url"),
    ({"key_url": "https://contoso.vault.azure.net/keys/by_ok"}, "key_url"),
    ({"key_url": "https://contoso.vault.azure.net/keys/byok/../x"}, "key_url"),
    ({"key_url": f"{URL}?a=b"}, "key_url"),
    ({"key_url": f"{URL}\n"}, "key_url"),
    ({"key_url": 3}, "key_url"),
    ({"key_url": "https://contöso.vault.azure.net/keys/byok"}, "key_url"),
    ({"vault_url": "contoso"}, "not both"),
    ({"key_name": "byok"}, "not both"),
    ({"key_url": None, "vault_url": "contoso"}, "key_name"),
    ({"key_url": None, "vault_url": "contoso", "key_name": "a/b"}, "key_name"),
    ({"key_url": None, "vault_url": None, "key_name": "byok"}, "vault_url"),
    ({"key_url": None, "vault_url": "con.toso", "key_name": "byok"}, "vault_url"),
    ({"key_url": None, "vault_url": "https://contoso.vault.azure.net/keys", "key_name": "byok"}, "vault_url"),
    ({"tenant_id": "contoso"}, "tenant_id"),
    ({"tenant_id": "contoso.example/x"}, "tenant_id"),
    ({"tenant_id": None}, "tenant_id"),
    ({"client_id": "byok"}, "client_id"),
    ({"client_id": None}, "client_id"),
    ({"client_secret": None}, "client_secret"),
    ({"client_secret": SECRET}, "client_secret"),
    ({"client_secret": "Env:BYOK"}, "client_secret"),
    ({"client_secret": "env:"}, "client_secret"),
    ({"client_secret": f"env:{SECRET}\n"}, "client_secret"),
    ({"credential": "vendor-app"}, "not both"),
    ({"client_id": None, "client_secret": None}, "credential"),
    ({"client_id": None, "client_secret": None, "credential": ""}, "credential"),
    ({"client_id": None, "client_secret": None, "credential": "a", "expires": date(2027, 1, 1)}, "expires"),
    ({"expires": "2027-01-01"}, "expires"),
    ({"operations": "sign"}, "operations"),
    ({"profile": ""}, "profile"),
]


@pytest.mark.parametrize(("arguments", "name"), BAD)
def test_bad_arguments_are_refused(arguments: dict[str, Any], name: str) -> None:
    """Protects against hosts and paths of somebody's choice, and a secret given in the place of its reference."""
    with pytest.raises(ConfigurationError, match=name) as raised:
        AzureKeyVault(**{"key_url": URL, **OWN, **arguments})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"key_url": None},
        {"tenant_id": None},
        {"operations": None},
        {"profile": None},
        {"authority": "login.evil.example"},
        {"key_url": f"{URL}/{VERSION}"},
        {"key_url": URL.upper()},
        {"tenant_id": DIRECTORY.upper()},
        {"expires": "soon"},
        {"expires": "20270630"},
        {"credential": "vendor-app"},
        {"client_secret": SECRET},
        {"vault_url": "contoso"},
    ],
)
def test_bad_configurations(change: dict[str, str | None]) -> None:
    """Protects against a keystore row that brings its own authority, or is not an AzureKeyVault's."""
    config = {**AzureKeyVault(URL, **OWN).config(), **change}
    with pytest.raises(ConfigurationError):
        describe("azure", {name: value for name, value in config.items() if value is not None})


def test_an_unknown_credential_is_refused(vault: Vault) -> None:
    """Protects the operator from a row that names a credential which this process does not have."""
    kms = AzureKeyVault(URL, tenant_id=DIRECTORY, credential="other-app")
    for operator in (vault.operator, None):
        with pytest.raises(ConfigurationError, match="other-app"):
            kms.connect({}, operator)


def test_an_unknown_setting_is_refused() -> None:
    """Protects the operator from a typo that would silently leave a default in force."""
    with pytest.raises(ConfigurationError, match="authorty"):
        AzureKeyVault(URL, **OWN).connect({"authorty": "login.microsoftonline.us"})


@pytest.mark.parametrize("missing", ["azure.identity", "azure.keyvault.keys"])
def test_a_missing_sdk_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Protects the first-time user: the message is the command to run."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r'pip install "sqla-byok\[azure\]"'):
        AzureKeyVault(URL, **OWN).connect({})


def test_sdks_are_imported_lazily() -> None:
    """Protects import time and installations without the extra: neither a key nor the double needs the SDK."""
    code = (
        "import sys; import sqla_byok.testing.azure; from sqla_byok.kms import AzureKeyVault; "
        f"AzureKeyVault({URL!r}, **{OWN!r}); assert not {{'azure', 'msal', 'requests'}} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )


def test_the_double_leaves_nothing_behind(azure_environment: None) -> None:
    """Protects users' machines: the authority that the double makes is gone with it, and its key is never stored."""
    with AzureServer() as server:
        folder = Path(server.ca_file).parent
        assert [each.name for each in folder.iterdir()] == ["ca.pem"]
        assert "PRIVATE" not in Path(server.ca_file).read_text()
    assert not folder.exists()
