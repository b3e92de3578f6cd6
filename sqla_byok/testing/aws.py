"""A loopback double of AWS KMS, STS and Secrets Manager: moto over HTTP, behind what moto does not enforce.

moto lets disabled keys and keys pending deletion encrypt and decrypt, gives sessions of roles that do not exist, knows
no policies and never throttles; a test of revocation on moto alone passes falsely.
"""

from __future__ import annotations

import base64
import io
import json
import re
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

from sqla_byok.errors import MissingExtraError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["REGION", "AwsServer"]

REGION = "eu-central-1"
"""Where the double's keys and secrets are unless a test says otherwise."""

_Environ = dict[str, Any]
_StartResponse = Callable[..., Any]

_KMS_OPERATIONS = ("Encrypt", "Decrypt")
_REQUEST_ID = "00000000-0000-0000-0000-000000000000"


class _Fault(NamedTuple):
    code: str
    status: int
    message: str
    headers: dict[str, str]


class AwsServer:
    """AWS KMS, STS and Secrets Manager on 127.0.0.1, for boto3 as it is; for use as a context manager.

    All servers of a process share their keys, roles and secrets, as moto keeps them. boto3 wants credentials, whatever
    they are: :meth:`environment` has some.

    :param ssl_context: serve HTTPS with it; plain HTTP without.
    :ivar calls: how often each operation was asked for, retries included, such as ``calls["Decrypt"]``.
    :ivar requests: each request's operation and decoded body, in order.
    :ivar delay: seconds to wait before each answer.
    :raises MissingExtraError: moto is not installed; it comes with the extra ``testing``.

    Example::

        with AwsServer() as server:
            byok = Byok(keystore=url, keystore_key=key, kms_profiles={"default": server.profile()})
            byok.onboard("org-42", AwsKms(arn := server.create_key()))
            server.disable(arn)  # as the customer would
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._scheme = "https" if ssl_context else "http"
        self._moto = _moto()
        self._app = self._moto.make_app()
        self._server = self._moto.make_server("127.0.0.1", self._answer, ssl_context)
        self._thread = threading.Thread(target=self._server.serve_forever, name="aws-server", daemon=True)
        self._lock = threading.Lock()
        self._creating = threading.Lock()
        self._clear()

    @property
    def url(self) -> str:
        """The endpoint to give to clients."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    def profile(self) -> dict[str, Any]:
        """The settings that reach this server: ``Byok(kms_profiles={"default": server.profile()})``."""
        return {"endpoint_url": self.url}

    @staticmethod
    def environment() -> dict[str, str]:
        """Environment variables with credentials that this server takes, and that keep boto3 from looking elsewhere."""
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # Keys

    def create_key(
        self,
        *,
        region: str = REGION,
        key_spec: str = "SYMMETRIC_DEFAULT",
        principal: str | None = None,
    ) -> str:
        """Make an enabled key and return its ARN.

        :param principal: the ARN of the role that alone may use it; everybody may, unless given.
        """
        with self._creating:
            key = self._moto.create_key(region, key_spec)
        arn: str = key.arn
        if principal is not None:
            self._principals[arn] = principal
        return arn

    def disable(self, arn: str) -> None:
        """Disable the key, as the customer would."""
        self._keys_of(arn).disable_key(_key_id(arn))

    def enable(self, arn: str) -> None:
        """Enable the key, also after :meth:`schedule_deletion` (which AWS does in two steps)."""
        self._keys_of(arn).cancel_key_deletion(_key_id(arn))
        self._keys_of(arn).enable_key(_key_id(arn))

    def schedule_deletion(self, arn: str) -> None:
        """Put the key into the state PendingDeletion."""
        self._keys_of(arn).schedule_key_deletion(_key_id(arn), 7)

    def delete(self, arn: str) -> None:
        """Delete the key for good, as AWS does when the waiting period is over."""
        del self._keys_of(arn).keys[_key_id(arn)]

    # Roles

    def create_role(self, name: str, external_id: str | None = None) -> str:
        """Make a role that trusts everybody, or everybody with this external id, and return its ARN.

        A role of that name that is there already gets the external id.
        """
        arn = f"arn:aws:iam::{self._moto.account}:role/{name}"
        self._roles[arn] = external_id
        return arn

    def delete_role(self, arn: str) -> None:
        """Delete the role; its sessions end with it."""
        del self._roles[arn]
        sessions = self._moto.sessions()
        sessions[:] = [each for each in sessions if each.role_arn != arn]

    def deny_role(self, arn: str) -> None:
        """Take the permission to use keys from the role, which can still be assumed, until :meth:`allow`."""
        self._denied[arn] = "because no identity-based policy allows it"

    def distrust_role(self, arn: str) -> None:
        """Let the role trust us no longer; the sessions that it has go on. :meth:`create_role` undoes it."""
        self._roles[arn] = "another-external-id"

    def revoke_sessions(self, arn: str) -> None:
        """Deny everything to the sessions that the role has now, as the console's button does."""
        with self._lock:
            self._revoked |= {each.access_key_id for each in self._moto.sessions() if each.role_arn == arn}

    # Secrets

    def create_secret(self, name: str, text: str, *, region: str = REGION) -> None:
        """Store a secret, in place of one that is there."""
        secrets = self._moto.secrets(region)
        if name in secrets.secrets:
            secrets.delete_secret(name, None, True)
        secrets.create_secret(name, text, None, None, None, None, None, [], False)

    def secret(self, name: str, *, region: str = REGION) -> str:
        """The text of a secret.

        :raises KeyError: there is none.
        """
        version = self._moto.secrets(region).get_secret_value(name, None, "AWSCURRENT")
        text: str = version["SecretString"]
        return text

    def delete_secret(self, name: str, *, region: str = REGION, at_once: bool = False) -> None:
        """Schedule the secret's deletion, as AWS does; or delete it *at_once*."""
        self._moto.secrets(region).delete_secret(name, None, at_once)

    # Refusals and faults

    def deny(self, name: str, message: str = "") -> None:
        """Answer AccessDeniedException for this key or secret until :meth:`allow` or :meth:`reset`.

        :param name: a key's ARN or a secret's name.
        :param message: what AWS says; that no policy of the resource allows it, unless given.
        """
        self._denied[name] = message or f"on resource: {name} because no resource-based policy allows it"

    def allow(self, name: str) -> None:
        """Undo :meth:`deny` and :meth:`deny_role`."""
        self._denied.pop(name, None)

    def fail(
        self,
        operation: str,
        code: str,
        status: int = 400,
        message: str = "",
        times: int = 1,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next *times* calls of *operation* with this error, after those already waiting.

        :param operation: such as ``"Decrypt"``, ``"AssumeRole"`` or ``"GetSecretValue"``.
        """
        fault = _Fault(code, status, message, headers or {})
        with self._lock:
            self._faults.setdefault(operation, deque()).extend([fault] * times)

    def reset(self) -> None:
        """Forget all keys, roles, secrets, counts, faults and delays."""
        self._moto.reset()
        self._clear()

    def _clear(self) -> None:
        self.calls: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.delay = 0.0
        self._roles: dict[str, str | None] = {}  # with the external id that each wants
        self._principals: dict[str, str] = {}
        self._revoked: set[str] = set()
        self._denied: dict[str, str] = {}
        self._faults: dict[str, deque[_Fault]] = {}

    # The middleware

    def _answer(self, environ: _Environ, start_response: _StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        operation, request = _parse(environ, body)
        fault = self._arrive(operation, request)
        if self.delay:
            time.sleep(self.delay)
        fault = fault or self._refusal(operation, request, _access_key(environ))
        if fault is not None:
            return _send(fault, start_response, as_xml=operation == "AssumeRole")
        if operation == "CreateSecret":
            with self._creating:  # moto looks whether there is one and makes it in two steps
                return self._app(environ, start_response)  # type: ignore[no-any-return]
        return self._app(environ, start_response)  # type: ignore[no-any-return]

    def _arrive(self, operation: str, request: dict[str, Any]) -> _Fault | None:
        with self._lock:
            self.calls[operation] += 1
            self.requests.append((operation, request))
            waiting = self._faults.get(operation)
            return waiting.popleft() if waiting else None

    def _refusal(self, operation: str, request: dict[str, Any], access_key: str) -> _Fault | None:
        if operation == "AssumeRole":
            return self._role_refusal(request)
        if operation in _KMS_OPERATIONS and request.get("KeyId", "").startswith("arn:"):
            arn = request["KeyId"]
            return self._signer_refusal(operation, arn, access_key) or self._key_refusal(
                operation, arn, request
            )
        name = request.get("SecretId") or request.get("Name")
        return self._denial("", f"secretsmanager:{operation}", self._denied.get(name)) if name else None

    def _role_refusal(self, request: dict[str, Any]) -> _Fault | None:
        arn = request.get("RoleArn", "")
        if arn in self._roles and self._roles[arn] in (None, request.get("ExternalId")):
            return None
        message = f"User: {self._user('')} is not authorized to perform: sts:AssumeRole on resource: {arn}"
        return _Fault("AccessDenied", 403, message, {})

    def _signer_refusal(self, operation: str, arn: str, access_key: str) -> _Fault | None:
        role = self._role_of(access_key)
        if role is None and access_key.startswith("ASIA"):
            message = "The security token included in the request is invalid."
            return _Fault("UnrecognizedClientException", 400, message, {})
        reason = self._denied.get(arn) or (self._denied.get(role) if role else None)
        if access_key in self._revoked:
            reason = "with an explicit deny in an identity-based policy"
        if reason is None and self._principals.get(arn, role) != role:
            reason = f"on resource: {arn} because no resource-based policy allows it"
        return self._denial(role or "", f"kms:{operation}", reason)

    def _denial(self, role: str, action: str, reason: str | None) -> _Fault | None:
        if reason is None:
            return None
        message = f"User: {self._user(role)} is not authorized to perform: {action} {reason}"
        return _Fault("AccessDeniedException", 400, message, {})

    def _user(self, role: str) -> str:
        return f"arn:aws:sts::{self._moto.account}:assumed-role/{role.rpartition('/')[2] or 'app'}/1"

    def _role_of(self, access_key: str) -> str | None:
        # A copy, since other threads assume roles meanwhile.
        sessions = {each.access_key_id: each.role_arn for each in list(self._moto.sessions())}
        return sessions.get(access_key)

    def _key_refusal(self, operation: str, arn: str, request: dict[str, Any]) -> _Fault | None:
        key = self._keys_of(arn).keys.get(_key_id(arn))
        if key is None:
            return None
        if key.key_state == "Disabled":
            return _Fault("DisabledException", 400, f"{arn} is disabled.", {})
        if key.key_state == "PendingDeletion":
            return _Fault("KMSInvalidStateException", 400, f"{arn} is pending deletion.", {})
        if operation == "Decrypt" and not self._moto.is_blob_of(_key_id(arn), request["CiphertextBlob"]):
            return _Fault("IncorrectKeyException", 400, "The key ID in the request is not the blob's.", {})
        return None

    def _keys_of(self, arn: str) -> Any:
        return self._moto.kms(arn.split(":")[3])


class _Moto(NamedTuple):
    """What is used of moto, and of its server's parts."""

    account: str
    make_app: Callable[[], Any]
    make_server: Callable[..., Any]
    kms: Callable[[str], Any]
    create_key: Callable[[str, str], Any]
    secrets: Callable[[str], Any]
    sessions: Callable[[], list[Any]]
    is_blob_of: Callable[[str, str], bool]
    reset: Callable[[], None]


@lru_cache(maxsize=1)
def _moto() -> _Moto:
    try:
        from moto.core.models import DEFAULT_ACCOUNT_ID as account  # noqa: N811
        from moto.iam.models import iam_backends
        from moto.kms import models as kms_models
        from moto.kms.models import kms_backends
        from moto.kms.utils import _deserialize_ciphertext_blob, generate_private_key
        from moto.moto_server import werkzeug_app
        from moto.secretsmanager.models import secretsmanager_backends
        from moto.sts.models import sts_backends
        from werkzeug.serving import make_server
    except ImportError as error:
        raise MissingExtraError('AwsServer needs moto: pip install "sqla-byok[testing]"') from error

    class Handler(werkzeug_app.MotoRequestHandler):
        disable_nagle_algorithm = (
            True  # headers and body are two writes; Nagle would hold the second for 40 ms
        )

        def log(
            self,
            type: str,  # noqa: A002 - the base's name
            message: str,
            *args: Any,
        ) -> None:
            """Say nothing: tests capture logs."""

    def is_blob_of(key_id: str, blob: str) -> bool:
        """Whether the key wrapped the blob; a blob that cannot be parsed is left to moto."""
        try:
            return bool(_deserialize_ciphertext_blob(base64.b64decode(blob)).key_id == key_id)
        except Exception:  # noqa: BLE001 - whatever moto finds wrong with it
            return True

    def create_key(region: str, key_spec: str) -> Any:
        # moto makes an RSA key, in some 50 ms, also for a key that has none.
        make = (lambda spec: None) if key_spec == "SYMMETRIC_DEFAULT" else generate_private_key
        with mock.patch.object(kms_models, "generate_private_key", make):
            return kms_backends[account][region].create_key(None, "ENCRYPT_DECRYPT", key_spec, "", None)

    def reset() -> None:
        for backends in (kms_backends, secretsmanager_backends, sts_backends, iam_backends):
            backends.reset()

    return _Moto(
        account,
        lambda: werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app),
        lambda host, app, tls: make_server(
            host, 0, app, threaded=True, request_handler=Handler, ssl_context=tls
        ),
        lambda region: kms_backends[account][region],
        create_key,
        lambda region: secretsmanager_backends[account][region],
        lambda: sts_backends[account]["aws"].assumed_roles,
        is_blob_of,
        reset,
    )


def _parse(environ: _Environ, body: bytes) -> tuple[str, dict[str, Any]]:
    operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
    if operation:
        return operation, json.loads(body)
    form = dict(parse_qsl(body.decode("latin-1")))
    return form.get("Action", ""), form


def _access_key(environ: _Environ) -> str:
    found = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    return found[1] if found else ""


def _key_id(arn: str) -> str:
    return arn.rpartition("/")[2]


def _send(fault: _Fault, start_response: _StartResponse, *, as_xml: bool) -> Iterable[bytes]:
    if as_xml:
        kind, text = (
            "text/xml",
            f"<ErrorResponse><Error><Code>{escape(fault.code)}</Code><Message>{escape(fault.message)}</Message>"
            f"</Error><RequestId>{_REQUEST_ID}</RequestId></ErrorResponse>",
        )
    else:
        kind, text = (
            "application/x-amz-json-1.1",
            json.dumps({"__type": fault.code, "message": fault.message}),
        )
    body = text.encode()
    headers = {
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "x-amzn-RequestId": _REQUEST_ID,
        **fault.headers,
    }
    start_response(f"{fault.status} Fault", list(headers.items()))
    return [body]
