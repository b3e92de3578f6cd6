"""AwsSecretsManagerSalts: real boto3 over HTTP to the double of AWS."""

from __future__ import annotations

import base64
import logging
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kms_server import KmsServer

from sqla_byok import AwsSecretsManagerSalts, errors
from sqla_byok.errors import (
    AccessDeniedError,
    ByokError,
    ConfigurationError,
    CredentialExpiredError,
    CredentialInvalidError,
    KmsError,
    KmsUnavailableError,
    SaltChangedError,
    ThrottledError,
)
from sqla_byok.kms import SaltsClient

NAME = "byok/org-42/salt"
SEALED = base64.b64encode(bytes(range(62))).decode()
OTHER = base64.b64encode(bytes(62)).decode()
RAW = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcde0"


def connect(server: KmsServer, **options: Any) -> SaltsClient:
    """A client of the double; one attempt."""
    salts = AwsSecretsManagerSalts(NAME, region="eu-central-1", **options)
    return salts.connect({**server.profile(), "attempts": 1})


def failure(client: SaltsClient, name: str = NAME) -> ByokError:
    """The error of one reading, after checking what all of them have in common."""
    with pytest.raises(ByokError) as raised:
        client.read(name)
    assert name in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    return raised.value


@pytest.mark.parametrize(("form", "text"), [("sealed", SEALED), ("raw", RAW)])
def test_create_and_read(kms_server: KmsServer, form: str, text: str) -> None:
    """Protects the purpose of it all: what was created is read, by other programs too, at one call each."""
    client = connect(kms_server, format=form)
    assert client.create(NAME, text) == text
    assert client.read(NAME) == text
    assert kms_server.secret(NAME) == text
    assert kms_server.calls == {"CreateSecret": 1, "GetSecretValue": 1}


def test_create_keeps_what_is_there(kms_server: KmsServer) -> None:
    """Protects the hashes that exist: a second onboarding gets the first one's salt, and changes nothing."""
    connect(kms_server).create(NAME, SEALED)
    assert connect(kms_server).create(NAME, OTHER) == SEALED
    assert kms_server.secret(NAME) == SEALED


def test_a_race_has_one_winner(kms_server: KmsServer) -> None:
    """Protects two processes that onboard at once from hashing with two salts."""
    texts = [base64.b64encode(bytes([n]) * 62).decode() for n in range(8)]
    start = threading.Barrier(len(texts))

    def create(text: str) -> str:
        client = connect(kms_server)
        start.wait()
        return client.create(NAME, text)

    with ThreadPoolExecutor(len(texts)) as pool:
        results = set(pool.map(create, texts))
    assert results == {kms_server.secret(NAME)}
    assert kms_server.calls == {"CreateSecret": 8, "GetSecretValue": 7}


def test_generations_have_names_of_their_own() -> None:
    """Protects the salt in use from being overwritten by the next one."""
    salts = AwsSecretsManagerSalts(NAME, region="eu-central-1")
    assert [salts.name(n) for n in (1, 2, 10)] == [NAME, f"{NAME}-g2", f"{NAME}-g10"]


def test_gone(kms_server: KmsServer) -> None:
    """Protects searches from missing rows in silence: a salt that is gone, or will be, is an error that says so."""
    client = connect(kms_server)
    error = failure(client)
    assert type(error) is SaltChangedError
    assert "is gone" in str(error)
    client.create(NAME, SEALED)
    kms_server.delete_secret(NAME)
    error = failure(client)
    assert type(error) is SaltChangedError
    assert "marked for deletion" in str(error)
    kms_server.delete_secret(NAME, at_once=True)
    assert type(failure(client)) is SaltChangedError


def test_create_beside_one_marked_for_deletion(kms_server: KmsServer) -> None:
    """Protects against a new salt in place of one that can still be restored."""
    kms_server.fail("CreateSecret", "InvalidRequestException", message="is already scheduled for deletion.")
    with pytest.raises(SaltChangedError, match="restore"):
        connect(kms_server).create(NAME, SEALED)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("raw", RAW + "\n"),
        ("raw", RAW[:-1]),
        ("raw", RAW + "A"),
        ("raw", RAW[:-1] + "-"),
        ("raw", RAW[:-1] + "é"),
        ("raw", SEALED),
        ("sealed", RAW),
        ("sealed", SEALED[:-4]),
        ("sealed", base64.b64encode(bytes(63)).decode()),
        ("sealed", '{"salt": "x"}'),
    ],
)
def test_what_is_no_salt_is_refused_and_not_shown(kms_server: KmsServer, form: str, text: str) -> None:
    """Protects hashes from a secret that somebody edited: it is never trimmed or guessed, and never printed."""
    kms_server.create_secret(NAME, text)
    error = failure(connect(kms_server, format=form))
    assert type(error) is SaltChangedError
    assert text[:20] not in "".join(traceback.format_exception(error))


RESPONSES = [
    ("ResourceNotFoundException", 400, "", SaltChangedError, None),
    ("InvalidRequestException", 400, "because it was marked for deletion.", SaltChangedError, None),
    ("InvalidRequestException", 400, "something else", errors.KmsRefusedError, "operator"),
    ("InvalidParameterException", 400, "", errors.KmsRefusedError, "operator"),
    ("AccessDeniedException", 400, "", AccessDeniedError, "operator"),
    ("AccessDenied", 403, "", AccessDeniedError, "operator"),
    ("DecryptionFailure", 400, "", AccessDeniedError, "operator"),
    ("PreconditionNotMetException", 400, "", KmsUnavailableError, "operator"),
    ("ThrottlingException", 400, "", ThrottledError, "operator"),
    ("InternalServiceError", 500, "", KmsUnavailableError, "operator"),
    ("ServiceUnavailable", 503, "", KmsUnavailableError, "operator"),
    ("ExpiredTokenException", 400, "", CredentialExpiredError, "operator"),
    ("UnrecognizedClientException", 400, "", CredentialInvalidError, "operator"),
    ("SomethingNew", 400, "", errors.KmsRefusedError, "operator"),
]


@pytest.mark.parametrize(("code", "status", "message", "expected", "action_by"), RESPONSES)
def test_every_error_code(
    kms_server: KmsServer, code: str, status: int, message: str, expected: type, action_by: str | None
) -> None:
    """Protects the line between "no" and "no answer": the salts are ours, so it is always our turn."""
    kms_server.fail("GetSecretValue", code, status, message)
    error = failure(connect(kms_server))
    assert type(error) is expected
    assert code in str(error)
    if isinstance(error, KmsError):
        assert error.action_by == action_by
        assert error.retryable is isinstance(error, errors.KmsNoAnswerError)
    kms_server.fail("CreateSecret", code, status, message)
    with pytest.raises(expected):
        connect(kms_server).create(NAME, SEALED)


def test_a_denied_secret(kms_server: KmsServer) -> None:
    """Protects the operator's way to take a salt away."""
    client = connect(kms_server)
    client.create(NAME, SEALED)
    kms_server.deny(NAME)
    assert type(failure(client)) is AccessDeniedError
    kms_server.allow(NAME)
    assert client.read(NAME) == SEALED


def test_logs_show_no_salt(kms_server: KmsServer, caplog: pytest.LogCaptureFixture) -> None:
    """Protects raw salts: SDKs log request and response bodies at DEBUG, ours do not."""
    caplog.set_level(logging.DEBUG)
    client = connect(kms_server, format="raw")
    client.create(NAME, RAW)
    client.read(NAME)
    assert RAW not in caplog.text


# The description


def test_from_config_restores_an_equal_value() -> None:
    """Protects the keystore round trip: an equal, hashable, frozen value, and its claim on the secret."""
    salts = AwsSecretsManagerSalts(NAME, region="eu-west-3", format="raw", profile="paris")
    assert salts.config() == {"secret": NAME, "region": "eu-west-3", "format": "raw", "profile": "paris"}
    assert AwsSecretsManagerSalts.from_config(salts.config()) == salts
    assert hash(AwsSecretsManagerSalts.from_config(salts.config())) == hash(salts)
    assert salts.claims() == (f"aws-salt:eu-west-3:{NAME}",)
    assert AwsSecretsManagerSalts(NAME, region="eu-west-3").format == "sealed"


@pytest.mark.parametrize(
    "change",
    [
        {"secret": "arn:aws:secretsmanager:eu-west-3:111122223333:secret:byok-AbCdEf"},
        {"secret": ""},
        {"secret": "x" * 501},
        {"secret": None},
        {"region": "evil.example"},
        {"region": ""},
        {"region": None},
        {"format": "hex"},
        {"profile": ""},
        {"profile": None},
        {"endpoint_url": "http://evil.example"},
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any]) -> None:
    """Protects against a keystore row that was written by somebody else."""
    config = {"secret": NAME, "region": "eu-west-3", "format": "raw", "profile": "default", **change}
    with pytest.raises(ConfigurationError):
        AwsSecretsManagerSalts.from_config(config)
