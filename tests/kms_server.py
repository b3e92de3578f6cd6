"""A loopback double of AWS KMS: moto over HTTP, behind a middleware that enforces what moto does not.

moto lets disabled keys and keys pending deletion encrypt and decrypt, knows no key policies and never
throttles; a revocation test on moto alone passes falsely.
"""

from __future__ import annotations

import base64
import io
import json
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.kms.models import KmsBackend, kms_backends
from moto.kms.utils import _deserialize_ciphertext_blob
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

REGION = "eu-central-1"

_Environ = dict[str, Any]
_StartResponse = Callable[..., Any]


class _Fault(NamedTuple):
    code: str
    status: int
    message: str
    headers: dict[str, str]


class _Handler(MotoRequestHandler):
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle would hold the second for 40 ms

    def log(
        self,
        type: str,  # noqa: A002 - the base's name
        message: str,
        *args: Any,
    ) -> None:
        """Say nothing: the tests capture logs."""


class KmsServer:
    """AWS KMS on 127.0.0.1, for use as a context manager.

    :param ssl_context: serve HTTPS with it; plain HTTP without.
    :ivar calls: how often each operation was asked for, retries included, such as ``calls["Decrypt"]``.
    :ivar requests: each request's operation and decoded JSON body, in order.
    :ivar delay: seconds to wait before each answer.

    Example::

        with KmsServer() as server:
            key = AwsKms(server.create_key())
            client = key.connect({"endpoint_url": server.url})
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._scheme = "https" if ssl_context else "http"
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._app, threaded=True, request_handler=_Handler, ssl_context=ssl_context
        )
        self._thread = threading.Thread(target=self._server.serve_forever, name="kms-server", daemon=True)
        self._lock = threading.Lock()
        self._clear()

    @property
    def url(self) -> str:
        """The endpoint to give to clients."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> KmsServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def create_key(self, *, region: str = REGION, key_spec: str = "SYMMETRIC_DEFAULT") -> str:
        """Make an enabled key and return its ARN."""
        key = _backend(region).create_key(None, "ENCRYPT_DECRYPT", key_spec, "", None)
        arn: str = key.arn
        return arn

    def disable(self, arn: str) -> None:
        """Disable the key, as the customer would."""
        _of(arn).disable_key(_key_id(arn))

    def enable(self, arn: str) -> None:
        """Enable the key, also after :meth:`schedule_deletion` (which AWS does in two steps)."""
        _of(arn).cancel_key_deletion(_key_id(arn))
        _of(arn).enable_key(_key_id(arn))

    def schedule_deletion(self, arn: str) -> None:
        """Put the key into the state PendingDeletion."""
        _of(arn).schedule_key_deletion(_key_id(arn), 7)

    def delete(self, arn: str) -> None:
        """Delete the key for good, as AWS does when the waiting period is over."""
        del _of(arn).keys[_key_id(arn)]

    def deny(self, arn: str, message: str = "") -> None:
        """Answer AccessDeniedException for this key until :meth:`allow` or :meth:`reset`."""
        self._denied[arn] = message or (
            f"User: arn:aws:sts::{DEFAULT_ACCOUNT_ID}:assumed-role/app/1 is not authorized to perform this "
            f"operation on resource: {arn} because no resource-based policy allows it"
        )

    def allow(self, arn: str) -> None:
        """Undo :meth:`deny`."""
        self._denied.pop(arn, None)

    def fail(
        self,
        operation: str,
        code: str,
        status: int = 400,
        message: str = "",
        times: int = 1,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next *times* calls of *operation* with this error, after those already waiting."""
        fault = _Fault(code, status, message, headers or {})
        with self._lock:
            self._faults.setdefault(operation, deque()).extend([fault] * times)

    def reset(self) -> None:
        """Forget all keys, counts, faults and delays."""
        kms_backends.reset()
        self._clear()

    def _clear(self) -> None:
        self.calls: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.delay = 0.0
        self._denied: dict[str, str] = {}
        self._faults: dict[str, deque[_Fault]] = {}

    def _app(self, environ: _Environ, start_response: _StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        request = json.loads(body) if operation else {}
        fault = self._arrive(operation, request)
        if self.delay:
            time.sleep(self.delay)
        fault = fault or self._refusal(operation, request)
        if fault is None:
            return self._moto(environ, start_response)  # type: ignore[no-any-return]
        return _answer(fault, start_response)

    def _arrive(self, operation: str, request: dict[str, Any]) -> _Fault | None:
        with self._lock:
            self.calls[operation] += 1
            self.requests.append((operation, request))
            waiting = self._faults.get(operation)
            return waiting.popleft() if waiting else None

    def _refusal(self, operation: str, request: dict[str, Any]) -> _Fault | None:
        arn = request.get("KeyId", "")
        if operation not in ("Encrypt", "Decrypt") or not arn.startswith("arn:"):
            return None
        if arn in self._denied:
            return _Fault("AccessDeniedException", 400, self._denied[arn], {})
        key = _of(arn).keys.get(_key_id(arn))
        if key is None:
            return None
        if key.key_state == "Disabled":
            return _Fault("DisabledException", 400, f"{arn} is disabled.", {})
        if key.key_state == "PendingDeletion":
            return _Fault("KMSInvalidStateException", 400, f"{arn} is pending deletion.", {})
        if operation == "Decrypt" and not _is_blob_of(_key_id(arn), request["CiphertextBlob"]):
            return _Fault("IncorrectKeyException", 400, "The key ID in the request is not the blob's.", {})
        return None


def _backend(region: str) -> KmsBackend:
    return kms_backends[DEFAULT_ACCOUNT_ID][region]


def _of(arn: str) -> KmsBackend:
    return _backend(arn.split(":")[3])


def _key_id(arn: str) -> str:
    return arn.rpartition("/")[2]


def _is_blob_of(key_id: str, blob: str) -> bool:
    """Whether the key wrapped the blob; a blob that cannot be parsed is left to moto."""
    try:
        return bool(_deserialize_ciphertext_blob(base64.b64decode(blob)).key_id == key_id)
    except Exception:
        return True


def _answer(fault: _Fault, start_response: _StartResponse) -> Iterable[bytes]:
    body = json.dumps({"__type": fault.code, "message": fault.message}).encode()
    headers = {
        "Content-Type": "application/x-amz-json-1.1",
        "Content-Length": str(len(body)),
        "x-amzn-RequestId": "00000000-0000-0000-0000-000000000000",
        **fault.headers,
    }
    start_response(f"{fault.status} Fault", list(headers.items()))
    return [body]


@pytest.fixture(scope="session")
def kms_server_process() -> Iterator[KmsServer]:
    """The one server of a test run; tests use :func:`kms_server`."""
    with KmsServer() as server:
        yield server


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dummy AWS credentials, and nothing of the machine's own AWS set-up or proxies."""
    for name in (
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_KMS",
        "AWS_CA_BUNDLE",
        "AWS_ROLE_ARN",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def kms_server(kms_server_process: KmsServer, aws_environment: None) -> Iterator[KmsServer]:
    """An empty :class:`KmsServer`, with dummy credentials in the environment."""
    kms_server_process.reset()
    yield kms_server_process
    kms_server_process.reset()
