"""AwsKms: real boto3 over HTTP to the double of tests/kms_server.py."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import itertools
import logging
import os
import pickle
import re
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kms_server import KmsServer

from sqla_byok import errors
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
from sqla_byok.kms import AwsKms, KmsClient, Wrapped, describe

TENANT = "org-42"
PAYLOAD = bytes(range(100, 165))
SOME_BLOB = Wrapped(b"blob")
ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def connect(server: KmsServer, arn: str, **settings: Any) -> KmsClient:
    """A client of the double; one attempt unless the test is about more."""
    return AwsKms(arn).connect({"endpoint_url": server.url, "attempts": 1, **settings})


@pytest.fixture
def arn(kms_server: KmsServer) -> str:
    """A new key of the double."""
    return kms_server.create_key()


@pytest.fixture
def client(kms_server: KmsServer, arn: str) -> KmsClient:
    """A client of that key."""
    return connect(kms_server, arn)


@pytest.fixture
def fresh_client(kms_server: KmsServer, arn: str) -> KmsClient:
    """A client with settings that no other test has, so that its boto3 client is made in this test."""
    return connect(kms_server, arn, read_timeout=2 + next(_unique) / 1024)


_unique = itertools.count(1)


def failure(client: KmsClient, wrapped: Wrapped = SOME_BLOB) -> KmsError:
    """The error of one unwrap, after checking what all of them have in common."""
    with pytest.raises(KmsError) as raised:
        client.unwrap(wrapped, tenant=TENANT)
    error = raised.value
    assert error.tenant == TENANT
    assert repr(TENANT) in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


# The calls


@pytest.mark.parametrize("tenant", [TENANT, "Zoë & Söhne / 東京", "x" * 255])
def test_round_trip(client: KmsClient, kms_server: KmsServer, tenant: str) -> None:
    """Protects the purpose of it all, at one call each."""
    wrapped = client.wrap(PAYLOAD, tenant=tenant)
    assert client.unwrap(wrapped, tenant=tenant) == PAYLOAD
    assert wrapped.key_version == ""
    assert PAYLOAD not in wrapped.blob
    assert kms_server.calls == {"Encrypt": 1, "Decrypt": 1}


def test_requests_on_the_wire(client: KmsClient, kms_server: KmsServer, arn: str) -> None:
    """Protects the format: exactly this encryption context, and the key pinned for decrypt as well."""
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    client.unwrap(wrapped, tenant=TENANT)
    common = {
        "KeyId": arn,
        "EncryptionContext": {
            "sqla-byok:format": "1",
            "sqla-byok:purpose": "tenant-key",
            "sqla-byok:tenant": TENANT,
        },
    }
    assert kms_server.requests == [
        ("Encrypt", {**common, "Plaintext": base64.b64encode(PAYLOAD).decode()}),
        ("Decrypt", {**common, "CiphertextBlob": base64.b64encode(wrapped.blob).decode()}),
    ]


def test_other_tenant_is_the_wrong_key(client: KmsClient) -> None:
    """Protects isolation: a row copied to another tenant under the same key does not open."""
    wrapped = client.wrap(PAYLOAD, tenant="org-43")
    assert type(failure(client, wrapped)) is WrongKeyError


def test_other_key_is_the_wrong_key(client: KmsClient, kms_server: KmsServer) -> None:
    """Protects the pin: a blob under another key that we may use does not open."""
    wrapped = connect(kms_server, kms_server.create_key()).wrap(PAYLOAD, tenant=TENANT)
    error = failure(client, wrapped)
    assert type(error) is WrongKeyError
    assert "IncorrectKeyException" in str(error)


def test_damaged_blob_is_the_wrong_key(client: KmsClient) -> None:
    """Protects integrity: a changed blob is refused."""
    blob = client.wrap(PAYLOAD, tenant=TENANT).blob
    assert type(failure(client, Wrapped(blob[:-1] + bytes([blob[-1] ^ 1])))) is WrongKeyError


# Revocation


def test_disabled_key(client: KmsClient, kms_server: KmsServer, arn: str) -> None:
    """Protects revocation, and that enabling the key again is enough."""
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    kms_server.disable(arn)
    error = failure(client, wrapped)
    assert type(error) is KeyDisabledError
    assert error.action_by == "customer"
    with pytest.raises(KeyDisabledError):
        client.wrap(PAYLOAD, tenant=TENANT)
    kms_server.enable(arn)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD


def test_key_pending_deletion_and_deleted(client: KmsClient, kms_server: KmsServer, arn: str) -> None:
    """Protects the difference between a disabled key and one that is about to be lost."""
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    kms_server.schedule_deletion(arn)
    error = failure(client, wrapped)
    assert type(error) is KeyDeletedError
    assert "pending deletion" in str(error)
    kms_server.delete(arn)
    error = failure(client, wrapped)
    assert type(error) is KeyDeletedError
    assert "NotFoundException" in str(error)


def test_denied(client: KmsClient, kms_server: KmsServer, arn: str) -> None:
    """Protects revocation by key policy, and that allowing it again is enough."""
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    kms_server.deny(arn)
    error = failure(client, wrapped)
    assert type(error) is AccessDeniedError
    assert error.action_by == "customer"
    assert arn in str(error)
    kms_server.allow(arn)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD


# The error table

CUSTOMER, OPERATOR = "customer", "operator"
RESPONSES = [
    ("DisabledException", 400, "is disabled.", "KeyDisabledError", CUSTOMER),
    ("DisabledException", 400, "is pending deletion.", "KeyDeletedError", CUSTOMER),
    ("KMSInvalidStateException", 400, "is pending deletion.", "KeyDeletedError", CUSTOMER),
    ("KMSInvalidStateException", 400, "is pending replica deletion.", "KeyDeletedError", CUSTOMER),
    ("KMSInvalidStateException", 400, "is pending import.", "KeyDisabledError", CUSTOMER),
    ("KMSInvalidStateException", 400, "is unavailable.", "KeyDisabledError", CUSTOMER),
    ("NotFoundException", 400, "", "KeyDeletedError", CUSTOMER),
    ("AccessDeniedException", 400, "", "AccessDeniedError", CUSTOMER),
    ("AccessDenied", 403, "", "AccessDeniedError", CUSTOMER),
    ("AccessDeniedException", 400, "no resource-based policy allows it", "AccessDeniedError", CUSTOMER),
    ("AccessDeniedException", 400, "no identity-based policy allows it", "AccessDeniedError", OPERATOR),
    ("AccessDeniedException", 400, "no permissions boundary allows it", "AccessDeniedError", OPERATOR),
    ("AccessDeniedException", 400, "no session policy allows it", "AccessDeniedError", OPERATOR),
    (
        "AccessDeniedException",
        400,
        "explicit deny in a service control policy",
        "AccessDeniedError",
        OPERATOR,
    ),
    ("AccessDeniedException", 400, "no VPC endpoint policy allows it", "AccessDeniedError", OPERATOR),
    ("InvalidCiphertextException", 400, "", "WrongKeyError", OPERATOR),
    ("IncorrectKeyException", 400, "", "WrongKeyError", OPERATOR),
    ("InvalidKeyUsageException", 400, "", "KmsRefusedError", CUSTOMER),
    ("ValidationException", 400, "", "KmsRefusedError", OPERATOR),
    ("ExpiredToken", 400, "", "CredentialExpiredError", OPERATOR),
    ("ExpiredTokenException", 400, "", "CredentialExpiredError", OPERATOR),
    ("RequestExpired", 400, "", "CredentialExpiredError", OPERATOR),
    ("AuthFailure", 401, "", "CredentialInvalidError", OPERATOR),
    ("IncompleteSignature", 400, "", "CredentialInvalidError", OPERATOR),
    ("IncompleteSignatureException", 400, "", "CredentialInvalidError", OPERATOR),
    ("InvalidAccessKeyId", 403, "", "CredentialInvalidError", OPERATOR),
    ("InvalidClientTokenId", 403, "", "CredentialInvalidError", OPERATOR),
    ("InvalidIdentityToken", 400, "", "CredentialInvalidError", OPERATOR),
    ("InvalidSignatureException", 400, "", "CredentialInvalidError", OPERATOR),
    ("MissingAuthenticationToken", 403, "", "CredentialInvalidError", OPERATOR),
    ("MissingAuthenticationTokenException", 400, "", "CredentialInvalidError", OPERATOR),
    ("NotAuthorized", 400, "", "CredentialInvalidError", OPERATOR),
    ("OptInRequired", 403, "", "CredentialInvalidError", OPERATOR),
    ("SignatureDoesNotMatch", 403, "", "CredentialInvalidError", OPERATOR),
    ("UnrecognizedClientException", 400, "", "CredentialInvalidError", OPERATOR),
    ("LimitExceeded", 400, "", "ThrottledError", OPERATOR),
    ("LimitExceededException", 400, "", "ThrottledError", OPERATOR),
    ("RequestLimitExceeded", 400, "", "ThrottledError", OPERATOR),
    ("RequestThrottledException", 400, "", "ThrottledError", OPERATOR),
    ("SlowDown", 503, "", "ThrottledError", OPERATOR),
    ("Throttling", 400, "", "ThrottledError", OPERATOR),
    ("ThrottledException", 400, "", "ThrottledError", OPERATOR),
    ("ThrottlingException", 400, "", "ThrottledError", OPERATOR),
    ("TooManyRequests", 429, "", "ThrottledError", OPERATOR),
    ("TooManyRequestsException", 429, "", "ThrottledError", OPERATOR),
    ("SomethingNew", 429, "", "ThrottledError", OPERATOR),
    ("DependencyTimeoutException", 500, "", "KmsUnavailableError", OPERATOR),
    ("InternalFailure", 500, "", "KmsUnavailableError", OPERATOR),
    ("KMSInternalException", 500, "", "KmsUnavailableError", OPERATOR),
    ("KeyUnavailableException", 500, "", "KmsUnavailableError", OPERATOR),
    ("RequestTimeout", 400, "", "KmsUnavailableError", OPERATOR),
    ("RequestTimeoutException", 400, "", "KmsUnavailableError", OPERATOR),
    ("ServiceUnavailable", 503, "", "KmsUnavailableError", OPERATOR),
    ("ServiceUnavailableException", 503, "", "KmsUnavailableError", OPERATOR),
    ("SomethingNew", 502, "", "KmsUnavailableError", OPERATOR),
    ("SomethingNew", 400, "", "KmsRefusedError", OPERATOR),
    ("SomethingNew", 403, "", "KmsRefusedError", OPERATOR),
]


@pytest.mark.parametrize(("code", "status", "message", "expected", "action_by"), RESPONSES)
def test_every_error_code(
    client: KmsClient,
    kms_server: KmsServer,
    code: str,
    status: int,
    message: str,
    expected: str,
    action_by: str,
) -> None:
    """Protects the line between "no" and "no answer", who must act, and pickling, for each code of AWS."""
    kms_server.fail("Decrypt", code, status, message)
    error = failure(client)
    assert type(error) is getattr(errors, expected)
    assert error.action_by == action_by
    assert error.retryable is isinstance(error, errors.KmsNoAnswerError)
    assert code in str(error)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is type(error)
    assert (str(copy), vars(copy), copy.retryable) == (str(error), vars(error), error.retryable)


def test_wrap_translates_as_well(client: KmsClient, kms_server: KmsServer) -> None:
    """Protects onboarding and rewrapping: Encrypt's errors are ours too."""
    kms_server.fail("Encrypt", "ThrottlingException")
    with pytest.raises(ThrottledError, match="encrypt") as raised:
        client.wrap(PAYLOAD, tenant=TENANT)
    assert raised.value.__context__ is None


@pytest.mark.parametrize(
    ("header", "value", "seconds"),
    [
        ("Retry-After", "7", 7.0),
        ("x-amz-retry-after", "1500", 1.5),
        ("Retry-After", "soon", None),
        ("Date", "7", None),
    ],
)
def test_retry_after(
    client: KmsClient, kms_server: KmsServer, header: str, value: str, seconds: float | None
) -> None:
    """Protects back-off: the provider's own wish is passed on, in seconds, where it is a number."""
    kms_server.fail("Decrypt", "SlowDown", 503, headers={header: value})
    assert failure(client).retry_after == seconds


@pytest.mark.parametrize(
    "body", [b"", b"<html>bad gateway</html>", b"[]", b"\xff\xfe", b'{"Plaintext": 3}', b"{}"]
)
def test_a_200_that_is_no_answer(body: bytes, raw_server: Any) -> None:
    """Protects fail-closed: an answer that cannot be read is never a key, and nothing of it is shown."""
    error = failure(AwsKms(ARN).connect({"endpoint_url": raw_server(body), "attempts": 1}))
    assert type(error) is KmsRefusedError


@pytest.fixture
def raw_server(aws_environment: None) -> Iterator[Any]:
    """Starts servers that answer one connection with the given bytes, or break it off when there are none."""
    listeners = []

    def start(body: bytes | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                if body is not None:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


# The network


def no_answer(client: KmsClient, *, retryable: bool = True) -> KmsUnavailableError:
    """The error of a call that got no answer."""
    error = failure(client)
    assert type(error) is KmsUnavailableError
    assert error.action_by == OPERATOR
    assert error.retryable is retryable
    assert pickle.loads(pickle.dumps(error)).retryable is retryable  # noqa: S301 - our own
    return error


def test_read_timeout(kms_server: KmsServer, arn: str) -> None:
    """Protects against a KMS that hangs: a timeout is "no answer"."""
    client = connect(kms_server, arn, read_timeout=0.1)
    kms_server.delay = 0.4
    assert "ReadTimeoutError" in str(no_answer(client))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fills the listen queue as Linux has it")
def test_connect_timeout(aws_environment: None) -> None:
    """Protects against a network that swallows packets: connecting has its own short timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = AwsKms(ARN).connect({"endpoint_url": url, "attempts": 1, "connect_timeout": 0.1})
        assert "ConnectTimeoutError" in str(no_answer(client))
        for filler in fillers:
            filler.close()


def test_connection_refused(aws_environment: None) -> None:
    """Protects against an endpoint that is down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = AwsKms(ARN).connect({"endpoint_url": f"http://127.0.0.1:{port}", "attempts": 1})
    no_answer(client)


def test_connection_broken_off(raw_server: Any) -> None:
    """Protects against a load balancer that drops the connection."""
    client = AwsKms(ARN).connect({"endpoint_url": raw_server(None), "attempts": 1})
    assert "ConnectionClosedError" in str(no_answer(client))


@pytest.mark.parametrize(
    ("number", "retryable"),
    [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)],
    ids=["unknown", "no resolver"],
)
def test_dns(aws_environment: None, monkeypatch: pytest.MonkeyPatch, number: int, retryable: bool) -> None:
    """Protects the outage grace: an unknown host is nothing that time mends, a silent resolver is."""

    def resolve(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(number, "resolver says so")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    client = AwsKms(ARN).connect({"endpoint_url": "http://kms.invalid", "attempts": 1})
    no_answer(client, retryable=retryable)


def test_proxy_that_refuses(kms_server: KmsServer, arn: str) -> None:
    """Protects the vendor's own firewall from being taken for a "no", and its password from the message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = connect(kms_server, arn, proxies={"http": f"http://user:s3cret@127.0.0.1:{port}"})
    error = failure(client)
    assert type(error) is KmsBlockedError
    assert "s3cret" not in str(error)
    assert kms_server.calls == {}


def test_tls_certificate_is_checked(aws_environment: None, tmp_path: Path) -> None:
    """Protects tenant keys on the wire: an unknown authority is refused unless ca_file names it."""
    context, ca_file = make_tls(tmp_path)
    with KmsServer(context) as server:
        key = server.create_key()
        assert "SSLError" in str(no_answer(connect(server, key), retryable=False))
        trusting = connect(server, key, ca_file=str(ca_file))
        assert trusting.unwrap(trusting.wrap(PAYLOAD, tenant=TENANT), tenant=TENANT) == PAYLOAD


def make_tls(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server context with a fresh self-signed certificate for 127.0.0.1, and that certificate's file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kms double")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    ca_file, key_file = folder / "ca.pem", folder / "key.pem"
    ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    return context, ca_file


def test_retries_are_bounded(kms_server: KmsServer, arn: str) -> None:
    """Protects both sides: a passing fault is ridden out, and never more than `attempts` calls are made."""
    client = connect(kms_server, arn, attempts=3)
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    kms_server.fail("Decrypt", "KMSInternalException", 500, times=2)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert kms_server.calls["Decrypt"] == 3
    kms_server.fail("Decrypt", "KMSInternalException", 500, times=9)
    no_answer(client)
    assert kms_server.calls["Decrypt"] == 6


def test_a_no_is_not_retried(kms_server: KmsServer, arn: str) -> None:
    """Protects the time to deny: a "no" is believed at once."""
    client = connect(kms_server, arn, attempts=3)
    kms_server.disable(arn)
    failure(client)
    assert kms_server.calls == {"Decrypt": 1}


# Credentials


def test_missing_credentials_are_found_later(
    kms_server: KmsServer, fresh_client: KmsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against a start-up without credentials that lasts for ever."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = failure(fresh_client)
    assert type(error) is CredentialInvalidError
    assert error.action_by == OPERATOR
    assert kms_server.calls == {}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    fresh_client.wrap(PAYLOAD, tenant=TENANT)


def test_unknown_aws_profile(fresh_client: KmsClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the contract: an error while the client is made is translated as well."""
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    assert type(failure(fresh_client)) is CredentialInvalidError


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDenied", 403, "CredentialInvalidError"),
        ("InvalidIdentityToken", 400, "CredentialInvalidError"),
        ("ExpiredTokenException", 400, "CredentialExpiredError"),
        ("Throttling", 400, "ThrottledError"),
        ("InternalFailure", 500, "KmsUnavailableError"),
    ],
)
def test_sts_errors_are_the_operators(
    kms_server: KmsServer,
    fresh_client: KmsClient,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    raw_sts: Any,
    code: str,
    status: int,
    expected: str,
) -> None:
    """Protects the customer from blame: a denied call for our own credential is our fault."""
    (tmp_path / "token").write_text("token")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/app")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", raw_sts(code, status))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    error = failure(fresh_client)
    assert type(error) is getattr(errors, expected)
    assert error.action_by == OPERATOR
    assert kms_server.calls == {}


@pytest.fixture
def raw_sts() -> Iterator[Any]:
    """Starts a server that answers every request with an STS error."""
    listeners = []

    def start(code: str, status: int) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        body = f"<ErrorResponse><Error><Code>{code}</Code></Error></ErrorResponse>".encode()
        head = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(head + body)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


# Secrets


def traces(secret: bytes) -> list[str]:
    """What a log would show of a secret, whichever way it was printed."""
    text = base64.b64encode(secret).decode()
    return [text, text[8:40], secret.hex(), repr(secret)[2:-1], secret.decode("latin-1"), str(list(secret))]


def test_logs_show_no_payload(
    kms_server: KmsServer, fresh_client: KmsClient, arn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects the tenant key: SDKs log request and response bodies at DEBUG, ours do not."""
    caplog.set_level(logging.DEBUG)
    payload = os.urandom(65)
    wrapped = fresh_client.wrap(payload, tenant=TENANT)
    fresh_client.unwrap(wrapped, tenant=TENANT)
    kms_server.disable(arn)
    failure(fresh_client, wrapped)
    logged = [f"{r.getMessage()} {r.msg!r} {r.args!r} {r.exc_text}" for r in caplog.records]
    leaks = [line for line in logged for trace in traces(payload) if trace in line]
    assert not leaks
    assert not any(base64.b64encode(wrapped.blob).decode() in line for line in logged)


@pytest.mark.parametrize("moment", ["while the client is made", "between two calls"])
def test_late_loggers_show_no_payload(
    fresh_client: KmsClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    """Protects the tenant key from SDK modules that are imported, and get their loggers, after ours."""
    caplog.set_level(logging.DEBUG)
    original = boto3.session.Session.client
    made: list[Any] = []

    def log_requests() -> None:
        logger = logging.getLogger(f"botocore.made.{moment}")
        made[0].meta.events.register("before-call", lambda params, **_: logger.debug("%r", params["body"]))

    def make(self: Any, *args: Any, **options: Any) -> Any:
        made.append(original(self, *args, **options))
        if moment == "while the client is made":
            log_requests()
        return made[0]

    monkeypatch.setattr(boto3.session.Session, "client", make)
    fresh_client.wrap(PAYLOAD, tenant=TENANT)
    if moment == "between two calls":
        log_requests()
        fresh_client.wrap(PAYLOAD, tenant=TENANT)
    logging.getLogger(f"botocore.made.{moment}").debug("heard")
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("botocore.made")]
    assert messages == ["heard"]


def test_other_callers_log_as_before(
    kms_server: KmsServer, client: KmsClient, arn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects the application's own debugging, and shows that the test above would see a leak."""
    caplog.set_level(logging.DEBUG)
    client.wrap(PAYLOAD, tenant=TENANT)
    before = len(caplog.records)
    own = boto3.session.Session().client("kms", region_name="eu-central-1", endpoint_url=kms_server.url)
    own.encrypt(KeyId=arn, Plaintext=PAYLOAD)
    text = base64.b64encode(PAYLOAD).decode()
    assert any(text in record.getMessage() for record in caplog.records[before:])


def test_errors_show_no_payload(client: KmsClient, kms_server: KmsServer) -> None:
    """Protects the tenant key from an error report, even if the provider's answer repeats it."""
    echo = base64.b64encode(PAYLOAD).decode()
    for code in (echo, "SomethingNew", "AccessDeniedException"):
        kms_server.fail("Encrypt", code, message=echo)
        with pytest.raises(KmsRefusedError) as raised:
            client.wrap(PAYLOAD, tenant=TENANT)
        shown = "".join(traceback.format_exception(raised.value)) + repr(vars(raised.value))
        assert not [trace for trace in traces(PAYLOAD) if trace in shown]


@pytest.mark.parametrize("size", [0, 4097])
def test_bad_payload_sizes_are_refused_silently(client: KmsClient, size: int) -> None:
    """Protects against botocore's validation errors, which print the value."""
    with pytest.raises(KmsRefusedError, match="payload") as raised:
        client.wrap(b"s" * size, tenant=TENANT)
    assert "sss" not in "".join(traceback.format_exception(raised.value))


# The boto3 client


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The boto3 clients that are made during the test."""
    made: list[Any] = []
    original = boto3.session.Session.client

    def client(self: Any, service: str, *args: Any, **options: Any) -> Any:
        made.append(original(self, service, *args, **options))
        return made[-1]

    monkeypatch.setattr(boto3.session.Session, "client", client)
    return made


def test_one_boto3_client_for_all_keys_and_threads(kms_server: KmsServer, made: list[Any]) -> None:
    """Protects memory: at 9 MB a client, thousands of tenants must share it; and connect() makes none."""
    own = 1 + next(_unique) / 1024
    clients = [connect(kms_server, kms_server.create_key(), read_timeout=own) for _ in range(8)]
    assert made == []
    start = threading.Barrier(8)

    def work(client: KmsClient) -> bytes:
        start.wait()
        return client.unwrap(client.wrap(PAYLOAD, tenant=TENANT), tenant=TENANT)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, clients)) == {PAYLOAD}
    assert len(made) == 1


def test_defaults(kms_server: KmsServer, arn: str, made: list[Any]) -> None:
    """Protects the time to deny: short timeouts, and three attempts in all."""
    client = AwsKms(arn).connect({"endpoint_url": kms_server.url + "/"})
    kms_server.fail("Decrypt", "KMSInternalException", 500, times=9)
    no_answer(client)
    assert kms_server.calls == {"Decrypt": 3}
    config = made[0].meta.config
    assert (config.connect_timeout, config.read_timeout) == (1.0, 3.0)
    assert "sqla-byok" in config.user_agent_extra


def test_profiles_and_regions_do_not_share(kms_server: KmsServer, made: list[Any]) -> None:
    """Protects settings and regions from leaking into each other."""
    paris = kms_server.create_key(region="eu-west-3")
    clients = [
        connect(kms_server, paris, read_timeout=2.125),
        connect(kms_server, paris, read_timeout=2.0625),
        connect(kms_server, kms_server.create_key(), read_timeout=2.125),
    ]
    for client in clients:
        client.wrap(PAYLOAD, tenant=TENANT)
    assert len(made) == 3


def test_forked_process_makes_its_own(
    client: KmsClient, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a forked worker from writing into its parent's TLS connection."""
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    before = len(made)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD
    assert len(made) == before + 1


# The description


def test_describe_restores_an_equal_value() -> None:
    """Protects the keystore round trip: an equal, hashable, frozen value."""
    kms = AwsKms(ARN, profile="europe")
    assert kms.config() == {"key": ARN, "profile": "europe"}
    assert describe("aws", kms.config()) == kms
    assert hash(describe(kms.provider, kms.config())) == hash(kms)
    assert kms.region == "eu-central-1"
    assert AwsKms(ARN).profile == "default"
    with pytest.raises(AttributeError):
        kms.profile = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "arn",
    [
        ARN,
        "arn:aws:kms:us-east-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab",
        "arn:aws-cn:kms:cn-north-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws-iso-b:kms:us-isob-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws-eusc:kms:eusc-de-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
    ],
)
def test_key_arns_are_accepted(arn: str) -> None:
    """Protects customers in every AWS partition."""
    assert AwsKms(arn).key_arn == arn


@pytest.mark.parametrize(
    "arn",
    [
        "",
        None,
        "alias/byok",
        "1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws:kms:eu-central-1:111122223333:alias/byok",
        "arn:aws:s3:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws:kms::111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws:kms:evil.example#-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws:kms:eu-central-1:1111:key/1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws:kms:eu-central-1:111122223333:key/*",
        ARN + "\n",
        " " + ARN,
    ],
)
def test_anything_but_a_key_arn_is_refused(arn: Any) -> None:
    """Protects against aliases that move, bare ids in our own account, and hosts of the customer's choice."""
    with pytest.raises(ConfigurationError, match="full ARN"):
        AwsKms(arn)


def test_profile_must_be_a_name() -> None:
    """Protects the look-up of the operator's settings."""
    with pytest.raises(ConfigurationError, match="profile"):
        AwsKms(ARN, profile="")


@pytest.mark.parametrize(
    "config",
    [{}, {"key": ARN}, {"key": "x", "profile": "default"}, {"key": ARN, "profile": "a", "endpoint_url": "b"}],
)
def test_bad_configurations(config: dict[str, str]) -> None:
    """Protects against a keystore row that brings its own endpoint, or is not an AwsKms's."""
    with pytest.raises(ConfigurationError):
        describe("aws", config)


def test_unknown_provider() -> None:
    """Protects against a row of a provider that this process does not know; it names those it does."""
    with pytest.raises(ConfigurationError, match=r"'vault'.*aws, .*local"):
        describe("vault", {})


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint": "https://kms.example"},
        {"endpoint_url": "kms.example"},
        {"connect_timeout": 0},
        {"read_timeout": "3"},
        {"read_timeout": True},
        {"attempts": 0},
        {"attempts": 1.5},
        {"ca_file": "/no/such/file.pem"},
        {"proxies": "http://user:s3cret@proxy"},
        {"proxies": {"https": 3128}},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    """Protects the operator from a typo that would silently leave a default in force; no value is shown."""
    with pytest.raises(ConfigurationError, match=re.escape(repr(next(iter(settings))))) as raised:
        AwsKms(ARN).connect(settings)
    assert "s3cret" not in str(raised.value)


def test_missing_boto3_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the first-time user: the message is the command to run."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sqla-byok\[aws\]"'):
        AwsKms(ARN).connect({})


def test_sdks_are_imported_lazily() -> None:
    """Protects import time and installations without the extra: describing a key needs no boto3."""
    code = (
        "import sys; from sqla_byok.kms import AwsKms; "
        f"AwsKms({ARN!r}); assert not {{'boto3', 'botocore'}} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
