"""A loopback double of Azure Key Vault and of the directory that issues its tokens, for tests.

The unchanged Azure SDK talks to it over TLS. It keeps the state that a customer would change: keys with versions,
permissions for each operation, disabled and deleted keys, a firewall, applications with secrets that expire.
It follows https://learn.microsoft.com/rest/api/keyvault/ and
https://learn.microsoft.com/azure/key-vault/general/rest-error-codes; it is a double for tests, never a vault.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
import secrets
import socket
import ssl
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AzureServer"]

_OPERATIONS = ("get", "encrypt", "decrypt", "wrapKey", "unwrapKey")
_POSTED = {operation.lower(): operation for operation in _OPERATIONS[1:]}  # as it stands at the end of a URL
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
_RESOURCE = "https://vault.azure.net"

# Names under which a test may reach the server when it sends Azure's own names to the loopback address.
_NAMES = (
    "localhost",
    "*.vault.azure.net",
    "*.vault.azure.cn",
    "*.vault.usgovcloudapi.net",
    "*.managedhsm.azure.net",
    "login.microsoftonline.com",
    "login.microsoftonline.us",
    "login.chinacloudapi.cn",
)

# Making a key of 4,096 bits takes seconds: the n-th key of a size is made once in a process, whichever server asks.
_rsa_keys: dict[tuple[int, int], rsa.RSAPrivateKey] = {}
_rsa_lock = threading.Lock()


def _rsa_key(size: int, number: int) -> rsa.RSAPrivateKey:
    with _rsa_lock:
        key = _rsa_keys.get((size, number))
        if key is None:
            key = _rsa_keys[size, number] = rsa.generate_private_key(public_exponent=65537, key_size=size)
        return key


@dataclass
class _Version:
    name: str
    private: rsa.RSAPrivateKey
    enabled: bool = True


@dataclass
class _Key:
    name: str
    size: int
    key_ops: tuple[str, ...]
    versions: list[_Version] = field(default_factory=list)
    denied: dict[str, str] = field(default_factory=dict)
    deleted: bool = False


@dataclass
class _Application:
    secret: str | None
    expires: datetime | None


class _Token(NamedTuple):
    client_id: str
    directory: str
    resource: str


class _Fault(NamedTuple):
    code: str
    status: int
    message: str
    headers: dict[str, str]


class _Answer(NamedTuple):
    status: int
    body: dict[str, Any] | bytes
    headers: Mapping[str, str] = MappingProxyType({})


class _RefusedError(Exception):
    def __init__(self, answer: _Answer) -> None:
        super().__init__()
        self.answer = answer


def _refusal(status: int, code: str, inner: str | None = None, message: str = "") -> _RefusedError:
    error: dict[str, Any] = {"code": code, "message": message or f"The double says {inner or code}."}
    if inner is not None:
        error["innererror"] = {"code": inner}
    return _RefusedError(_Answer(status, {"error": error}))


def _token_refusal(code: str, status: int, message: str = "", error: str = "invalid_client") -> _RefusedError:
    number = re.sub(r"\D", "", code)
    body = {
        "error": error,
        "error_description": f"{code}: {message or 'the double says so.'}",
        "error_codes": [int(number)] if number else [],
    }
    return _RefusedError(_Answer(status, body))


class AzureServer:
    """Azure Key Vault, Managed HSM and the token endpoint on one port of 127.0.0.1, for use as a context manager.

    Every vault host name that reaches it shows the same keys. A key's permissions hold for every application, since a
    test has one. Without :meth:`deny` all of get, encrypt, decrypt, wrapKey and unwrapKey are allowed.

    :ivar ca_file: the path of the certificate authority to trust, made for this server and gone with it.
    :ivar calls: how often each operation was asked for, retries included: ``encrypt``, ``decrypt``, ``wrapKey``,
        ``unwrapKey``, ``get``, ``challenge`` (a request without a token), ``rejected`` (one with a token that is
        not good here), ``discovery`` and ``token``.
    :ivar requests: each request's operation and decoded body, in order; ``key_version`` is added where the URL has one.
    :ivar headers: the headers of each request to a vault, in order.
    :ivar delay: seconds to wait before each answer.
    :ivar firewall: whether the vault refuses our address.
    :ivar directory: the id of the directory (the "tenant id") in which the vault is.
    :ivar domain: the directory's domain name, good in the place of its id.

    Example::

        with AzureServer() as server:
            server.add_application("11111111-2222-3333-4444-555555555555", "the secret")
            key = AzureKeyVault(
                server.create_key("byok"),
                tenant_id=server.directory,
                client_id="11111111-2222-3333-4444-555555555555",
                client_secret="env:BYOK_ORG42_SECRET",
            )
            byok = Byok(…, kms_profiles={"default": server.profile()}, secret_prefixes=("env:BYOK_",))

    Source: https://learn.microsoft.com/rest/api/keyvault/keys/operation-groups
    """

    def __init__(self) -> None:
        self.directory = "72f988bf-0000-4000-8000-2d7cd011db47"
        self.domain = "contoso.onmicrosoft.com"
        self._folder = tempfile.TemporaryDirectory(prefix="byok-azure-")
        folder = Path(self._folder.name)
        self.ca_file = str(folder / "ca.pem")
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.azure = self
        self._server.socket = _make_tls(folder).wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="azure-server", daemon=True
        )
        self._lock = threading.RLock()
        self.reset()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.hang_up()
        self._folder.cleanup()

    @property
    def port(self) -> int:
        """The port on 127.0.0.1."""
        return self._server.server_port

    @property
    def authority(self) -> str:
        """The host and port that issue tokens."""
        return f"localhost:{self.port}"

    @property
    def url(self) -> str:
        """The vault's URL."""
        return f"https://localhost:{self.port}"

    def profile(self) -> dict[str, Any]:
        """The settings to give as ``Byok(kms_profiles={"default": server.profile()})``."""
        return {
            "ca_file": self.ca_file,
            "authority": self.authority,
            "disable_instance_discovery": True,
            "hosts": [f"localhost:{self.port}"],
        }

    # Keys

    def create_key(
        self, name: str | None = None, size: int = 2048, *, key_ops: Sequence[str] = _OPERATIONS[1:]
    ) -> str:
        """Make an enabled RSA key with one version.

        :param name: its name in the vault; made up unless given.
        :param size: 2048, 3072 or 4096 bits.
        :param key_ops: the permitted operations of the key itself.
        :return: the key's URL, without a version.
        """
        name = name or f"key-{secrets.token_hex(4)}"
        with self._lock:
            self._keys[name.lower()] = _Key(name, size, tuple(key_ops))
            self.rotate(name)
        return f"{self.url}/keys/{name}"

    def rotate(self, key: str) -> str:
        """Make a new version of the key and return its name; the old ones go on to decrypt."""
        with self._lock:
            found = self._keys[_name(key)]
            private = _rsa_key(found.size, self._made[found.size])  # now: a client would not wait for it
            self._made[found.size] += 1
            found.versions.append(_Version(secrets.token_hex(16), private))
            return found.versions[-1].name

    def disable(self, key: str, version: str | None = None) -> None:
        """Disable all of the key's versions, or one."""
        self._set_enabled(key, version, enabled=False)

    def enable(self, key: str, version: str | None = None) -> None:
        """Undo :meth:`disable`."""
        self._set_enabled(key, version, enabled=True)

    def _set_enabled(self, key: str, version: str | None, *, enabled: bool) -> None:
        with self._lock:
            for each in self._keys[_name(key)].versions:
                if version in (None, each.name):
                    each.enabled = enabled

    def delete(self, key: str) -> None:
        """Delete the key; soft delete keeps it for :meth:`recover`."""
        self._keys[_name(key)].deleted = True

    def recover(self, key: str) -> None:
        """Undo :meth:`delete`."""
        self._keys[_name(key)].deleted = False

    def deny(self, key: str, *operations: str, by: Literal["policy", "rbac"] = "policy") -> None:
        """Take permissions away.

        :param key: the key's URL or name.
        :param operations: of ``get``, ``encrypt``, ``decrypt``, ``wrapKey``, ``unwrapKey``; all unless given.
        :param by: which kind of permission the vault has, access policies or roles; its refusals differ.
        """
        code = "ForbiddenByPolicy" if by == "policy" else "ForbiddenByRbac"
        with self._lock:
            self._keys[_name(key)].denied.update(dict.fromkeys(operations or _OPERATIONS, code))

    def allow(self, key: str, *operations: str) -> None:
        """Undo :meth:`deny`."""
        with self._lock:
            for operation in operations or _OPERATIONS:
                self._keys[_name(key)].denied.pop(operation, None)

    # Applications

    def add_application(self, client_id: str, secret: str, expires: date | datetime | None = None) -> None:
        """Register an application, or give it another secret.

        :param client_id: the application's id.
        :param secret: its one client secret.
        :param expires: when the secret expires; never unless given.
        """
        if expires is not None and not isinstance(expires, datetime):
            expires = datetime(expires.year, expires.month, expires.day, tzinfo=timezone.utc)
        with self._lock:
            self._applications[client_id.lower()] = _Application(secret, expires)

    def delete_secret(self, client_id: str) -> None:
        """Delete the application's secret. As at Azure, tokens that were issued go on to be good."""
        self._applications[client_id.lower()].secret = None

    def expire_secret(self, client_id: str) -> None:
        """Let the application's secret expire now. Tokens that were issued go on to be good."""
        self._applications[client_id.lower()].expires = datetime.now(timezone.utc)

    def delete_application(self, client_id: str) -> None:
        """Delete the application. Tokens that were issued go on to be good."""
        del self._applications[client_id.lower()]

    def revoke_tokens(self) -> None:
        """Let the vault refuse every token that was issued so far."""
        self._tokens.clear()

    def add_directory(self, directory: str) -> None:
        """Let the token endpoint know another directory, whose tokens this vault refuses."""
        self._directories.add(directory.lower())

    # Faults

    def fail(
        self,
        operation: str,
        code: str,
        status: int = 403,
        times: int = 1,
        headers: dict[str, str] | None = None,
        message: str = "",
    ) -> None:
        """Answer the next *times* calls of *operation* with this error, after those already waiting.

        :param operation: as in :attr:`calls`; a vault's, ``discovery`` or ``token``.
        :param code: the vault's error code, which stands inside of "Forbidden" with status 403; for the token
            endpoint a code such as ``AADSTS7000222``. With status 200 it is the body itself.
        :param status: the HTTP status.
        :param times: how often.
        :param headers: more headers, such as ``Retry-After``.
        :param message: the text beside the code.
        """
        fault = _Fault(code, status, message, headers or {})
        with self._lock:
            self._faults.setdefault(operation, deque()).extend([fault] * times)

    def reset(self) -> None:
        """Forget all keys, applications, tokens, counts, faults and delays."""
        with self._lock:
            self.calls: Counter[str] = Counter()
            self.requests: list[tuple[str, dict[str, Any]]] = []
            self.headers: list[dict[str, str]] = []
            self.delay = 0.0
            self.firewall = False
            self._keys: dict[str, _Key] = {}
            self._made: Counter[int] = Counter()
            self._applications: dict[str, _Application] = {}
            self._directories = {self.directory, self.domain}
            self._tokens: dict[str, _Token] = {}
            self._faults: dict[str, deque[_Fault]] = {}

    # Answers

    def _answer(self, method: str, target: str, headers: Any, body: bytes) -> _Answer:
        """What to say to one request."""
        path = urlsplit(target).path
        parts = [part for part in path.split("/") if part]
        try:
            if parts[:1] == ["keys"] and len(parts) > (2 if method == "POST" else 1):
                return self._vault(method, parts[1:], headers, body)
            if path.endswith("/v2.0/.well-known/openid-configuration"):
                return self._discovery(parts[0], headers["Host"])
            if path.endswith("/oauth2/v2.0/token"):
                return self._token(parts[0], dict(parse_qsl(body.decode())))
        except _RefusedError as refused:
            return refused.answer
        return _Answer(404, {"error": {"code": "NotFound", "message": "The double has no such page."}})

    def _arrive(self, operation: str, request: dict[str, Any]) -> None:
        with self._lock:
            self.calls[operation] += 1
            self.requests.append((operation, request))
            waiting = self._faults.get(operation)
            fault = waiting.popleft() if waiting else None
        if self.delay:
            time.sleep(self.delay)
        if fault is None:
            return
        if fault.status == 200:
            raise _RefusedError(_Answer(200, fault.code.encode(), fault.headers))
        if operation in ("discovery", "token"):
            refused = _token_refusal(fault.code, fault.status, fault.message)
        elif fault.status == 403:
            refused = _refusal(403, "Forbidden", fault.code or None, fault.message)
        else:
            refused = _refusal(fault.status, fault.code, None, fault.message)
        raise _RefusedError(refused.answer._replace(headers=fault.headers))

    def _discovery(self, directory: str, host: str) -> _Answer:
        self._arrive("discovery", {"directory": directory})
        self._check_directory(directory)
        base = f"https://{host}/{directory}"
        return _Answer(
            200,
            {
                "issuer": f"{base}/v2.0",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
            },
        )

    def _check_directory(self, directory: str) -> None:
        if directory.lower() not in self._directories:
            raise _token_refusal("AADSTS90002", 400, "The directory was not found.", "invalid_tenant")

    def _token(self, directory: str, form: dict[str, str]) -> _Answer:
        self._arrive("token", form)
        self._check_directory(directory)
        application = self._applications.get(form.get("client_id", "").lower())
        if application is None:
            raise _token_refusal("AADSTS700016", 400, "Application was not found.", "unauthorized_client")
        if application.secret is None or form.get("client_secret") != application.secret:
            raise _token_refusal("AADSTS7000215", 401, "Invalid client secret provided.")
        if application.expires is not None and application.expires <= datetime.now(timezone.utc):
            raise _token_refusal("AADSTS7000222", 401, "The provided client secret keys are expired.")
        token = f"token-{secrets.token_urlsafe(24)}"
        own = directory.lower() in (self.directory, self.domain)
        issuer = self.directory if own else directory.lower()
        resource = form.get("scope", "").split(" ")[0].removesuffix("/.default")
        with self._lock:
            self._tokens[token] = _Token(form["client_id"], issuer, resource)
        return _Answer(200, {"token_type": "Bearer", "expires_in": 3599, "access_token": token})

    def _vault(self, method: str, parts: list[str], headers: Any, body: bytes) -> _Answer:
        host = headers["Host"]
        with self._lock:
            self.headers.append(dict(headers.items()))
        operation = _POSTED.get(parts[-1].lower()) if method == "POST" else "get"
        if operation is None:
            raise _refusal(405, "MethodNotAllowed")
        if operation != "get":
            parts = parts[:-1]
        name, version = parts[0], parts[1] if len(parts) > 1 else ""
        self._authenticate(host, headers.get("Authorization", ""))
        request = json.loads(body) if body else {}
        self._arrive(operation, {**request, "key_version": version} if version else request)
        if self.firewall:
            raise _refusal(403, "Forbidden", "ForbiddenByFirewall")
        key = self._keys.get(name.lower())
        if key is not None and operation in key.denied:
            raise _refusal(403, "Forbidden", key.denied[operation])
        found = _find(key, version)
        if key is None or found is None:
            raise _refusal(404, "KeyNotFound")
        kid = f"https://{host}/keys/{key.name}/{found.name}"
        if operation == "get":
            return _Answer(200, _describe(kid, key, found))
        if not found.enabled:
            raise _refusal(403, "Forbidden", "KeyDisabled")
        if operation not in key.key_ops:
            raise _refusal(403, "Forbidden", "KeyOperationForbidden")
        return _Answer(200, {"kid": kid, "value": _encode(_compute(operation, found.private, request))})

    def _authenticate(self, host: str, authorization: str) -> None:
        resource = _resource(host)
        token = self._tokens.get(authorization.removeprefix("Bearer "))
        if token is not None and token.resource == resource and token.directory == self.directory:
            return
        if token is not None and token.resource != resource:
            message = "AKV10022: Invalid audience."
        elif token is not None:
            message = "AKV10032: Invalid issuer."
        else:
            message = "AKV10000: Request is missing a Bearer or PoP token."
        refused = _refusal(401, "Unauthorized", None, message)
        challenge = f'Bearer authorization="https://{self.authority}/{self.directory}", resource="{resource}"'
        with self._lock:
            self.calls["rejected" if authorization else "challenge"] += 1
        raise _RefusedError(refused.answer._replace(headers={"WWW-Authenticate": challenge}))


def _name(key: str) -> str:
    return key.partition("/keys/")[2].partition("/")[0].lower() or key.lower()


def _resource(host: str) -> str:
    """What a token for the vault of this host is for: the domain, as it stands in Azure's challenge."""
    for part in (".vault.", ".managedhsm."):
        if part in host:
            return f"https://{part[1:-1]}.{host.partition(part)[2].partition(':')[0]}"
    return _RESOURCE


def _find(key: _Key | None, version: str) -> _Version | None:
    if key is None or key.deleted:
        return None
    if not version:
        return key.versions[-1]
    return next((each for each in key.versions if each.name == version), None)


def _describe(kid: str, key: _Key, version: _Version) -> dict[str, Any]:
    numbers = version.private.public_key().public_numbers()
    jwk = {
        "kid": kid,
        "kty": "RSA",
        "key_ops": list(key.key_ops),
        "n": _encode(numbers.n.to_bytes(key.size // 8, "big")),
        "e": _encode(numbers.e.to_bytes(3, "big")),
    }
    return {
        "key": jwk,
        "attributes": {"enabled": version.enabled, "created": 1700000000, "updated": 1700000000},
    }


def _compute(operation: str, private: rsa.RSAPrivateKey, request: dict[str, Any]) -> bytes:
    try:
        if request["alg"] != "RSA-OAEP-256":
            raise _refusal(400, "BadParameter")
        value = _decode(request["value"])
        if operation in ("encrypt", "wrapKey"):
            return private.public_key().encrypt(value, _OAEP)
        return private.decrypt(value, _OAEP)
    except (KeyError, TypeError, ValueError):
        raise _refusal(400, "BadParameter") from None


def _encode(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise ValueError from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    azure: AzureServer

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up or does not trust us is what some tests are about."""

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for connection in list(self._open):
            try:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with it, and two writes an answer, each call takes 40 ms more
    wbufsize = -1
    server: Any  # a _Server

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.server.azure._answer(self.command, self.path, self.headers, body)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(content)),
            "x-ms-request-id": secrets.token_hex(16),
            **answer.headers,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Say nothing: tests capture logs."""


def _make_tls(folder: Path) -> ssl.SSLContext:
    """A server's context under a certificate authority of its own, whose certificate is left in ``ca.pem``."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = _x509_name("sqla-byok test authority")
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in _NAMES]
    names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    ca = _certificate(
        ca_name,
        ca_name,
        ca_key.public_key(),
        [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False),
            (_key_usage(ca=True), True),
        ],
    ).sign(ca_key, hashes.SHA256())
    leaf = _certificate(
        _x509_name("localhost"),
        ca_name,
        key.public_key(),
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName(names), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
        ],
    ).sign(ca_key, hashes.SHA256())
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    chain = folder / "server.pem"
    chain.touch(mode=0o600)
    chain.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + leaf.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    chain.unlink()
    return context


def _x509_name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder
