"""Customer keys in Azure Key Vault and Managed HSM.

The error tables follow https://learn.microsoft.com/azure/key-vault/general/rest-error-codes and
https://learn.microsoft.com/entra/identity-platform/reference-error-codes.
"""

from __future__ import annotations

import base64
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    CredentialExpiredError,
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
from sqla_byok.kms.base import Kms, Operator, Wrapped, request_id
from sqla_byok.kms.profiles import AZURE_VAULT_DOMAINS, Profile
from sqla_byok.kms.quiet import quiet, watch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AzureKeyVault"]

_ALGORITHM = "RSA-OAEP-256"
_OVERHEAD = (
    66  # bytes: two SHA-256 digests and two of padding, https://www.rfc-editor.org/rfc/rfc8017#section-7.1.1
)
_API_VERSION = "7.4"  # the newest that all clouds and Managed HSM have
_LOGGERS = ("azure", "msal", "requests", "urllib3")
_PATIENCE = 5.0  # seconds; who is told to wait for longer is better told so than kept
_wait: Callable[[float], None] = time.sleep

_GUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_HOST = r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]{1,5})?"
_CLIENT_ID = re.compile(_GUID)
_DIRECTORY = re.compile(rf"{_GUID}|[a-z0-9-]+(?:\.[a-z0-9-]+)+")
_KEY_NAME = re.compile(r"[0-9A-Za-z-]{1,127}")
_VAULT_NAME = re.compile(r"[A-Za-z][0-9A-Za-z-]{1,22}[0-9A-Za-z]")
_VAULT_URL = re.compile(rf"https://(?P<host>{_HOST})/?", re.IGNORECASE)
_KEY_URL = re.compile(
    rf"https://(?P<host>{_HOST})/keys/(?P<name>{_KEY_NAME.pattern})(?:/[0-9a-z]{{1,64}})?/?", re.IGNORECASE
)
_VERSION = re.compile(r"[0-9a-zA-Z]{1,64}")
_SCOPE = re.compile(r"https://(?:vault|managedhsm)\.[a-z.]+/\.default")
_VAULT_SCOPE = "https://vault.azure.net/.default"
_REFERENCE = re.compile(r"[a-z][a-z0-9-]*:\S+")
_OPTIONAL = ("client_id", "client_secret", "credential", "expires")

# Who issues the tokens for the vaults of a sovereign cloud; elsewhere it is Microsoft's public authority.
_AUTHORITIES = {".azure.cn": "login.chinacloudapi.cn", ".usgovcloudapi.net": "login.microsoftonline.us"}
_PUBLIC_AUTHORITY = "login.microsoftonline.com"


@dataclass(frozen=True, init=False)
class AzureKeyVault(Kms):
    """A customer's RSA key in Azure Key Vault or Managed HSM.

    The customer allows either the key permissions Encrypt and Decrypt (``operations="encrypt"``) or Wrap Key and
    Unwrap Key (``operations="wrap"``); Get is not needed and not used. The algorithm is RSA-OAEP-256, with keys of
    2048, 3072 or 4096 bits.

    We are known to the customer's directory in one of two ways. With ``client_id`` and ``client_secret``, by an
    application that the customer registers: the secret itself is never given here, but a reference to where the
    operator keeps it. With ``credential``, by the operator's own multi-tenant application, which the customer's
    administrator consents to; then no secret of the customer has to be kept.

    :param key_url: the key's URL, as the portal shows it as "Key Identifier". A version in it is dropped: the tenant
        key is wrapped under the newest version and opened with the one that wrapped it, so that the customer can
        rotate its key at any time.
    :param vault_url: in place of *key_url*, with *key_name*: the vault's URL ("Vault URI"), or its bare name for a
        vault in Azure's public cloud.
    :param key_name: the key's name in that vault.
    :param tenant_id: the customer's directory ("Directory (tenant) ID"), a GUID or a domain name.
    :param client_id: the customer's application ("Application (client) ID"), a GUID.
    :param client_secret: the reference to its client secret: ``"env:…"``, ``"file:…"``, ``"aws-sm:…"`` or a store of
        the operator's own.
    :param credential: in place of the two, a name in ``Byok(credentials={name: factory})``. The factory gets
        *tenant_id* and returns a **new** credential object of azure-identity at each call; one that is kept goes on
        to hold its tokens for an hour after the customer has withdrawn its consent.
    :param expires: the day on which the client secret expires, to be warned before.
    :param operations: ``"encrypt"`` or ``"wrap"``, whichever pair of permissions the customer allows.
    :param profile: which of the operator's settings to use.
    :raises ConfigurationError: an argument is missing, or not what it should be. No value is shown.

    Example::

        AzureKeyVault(
            "https://contoso.vault.azure.net/keys/byok",
            tenant_id="72f988bf-86f1-41af-91ab-2d7cd011db47",
            client_id="fad7d5b3-69d6-4b48-9259-8d12124e1cf1",
            client_secret="env:BYOK_CONTOSO_SECRET",
            expires=date(2027, 6, 30),
        )

    Source: https://learn.microsoft.com/azure/key-vault/keys/about-keys
    """

    provider: ClassVar[str] = "azure"
    key_url: str
    tenant_id: str
    client_id: str | None
    client_secret: str | None
    credential: str | None
    secret_expires: date | None
    operations: str
    # A field is a property that nobody can set, as the class is frozen; its value hides the base's property.
    profile: str = "default"  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self,
        key_url: str | None = None,
        *,
        tenant_id: str,
        vault_url: str | None = None,
        key_name: str | None = None,
        client_id: str | None = None,
        client_secret: str | None = None,
        credential: str | None = None,
        expires: date | None = None,
        operations: Literal["encrypt", "wrap"] = "encrypt",
        profile: str = "default",
    ) -> None:
        own = client_id is not None or client_secret is not None
        if own == (credential is not None):
            raise ConfigurationError(
                "AzureKeyVault needs either client_id and client_secret, or credential, and not both."
            )
        if own:
            _check(_matches(_CLIENT_ID, client_id, lower=True), "client_id", "the application's id, a GUID")
            _check(
                _matches(_REFERENCE, client_secret),
                "client_secret",
                'a reference such as "env:BYOK_CONTOSO_SECRET", never the secret itself',
            )
        else:
            _check(_is_name(credential), "credential", "a name in Byok(credentials={…})")
        _check(
            _matches(_DIRECTORY, tenant_id, lower=True), "tenant_id", "the directory's id, a GUID or a domain"
        )
        _check(operations in ("encrypt", "wrap"), "operations", '"encrypt" or "wrap"')
        _check(_is_name(profile), "profile", "the name of one of the operator's settings")
        _check(
            expires is None or (own and type(expires) is date),
            "expires",
            "the date on which client_secret ends",
        )
        values = {
            "key_url": _key_url(key_url, vault_url, key_name),
            "tenant_id": tenant_id.lower(),
            "client_id": client_id.lower() if client_id is not None else None,
            "client_secret": client_secret,
            "credential": credential,
            "secret_expires": expires,
            "operations": operations,
            "profile": profile,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def vault_url(self) -> str:
        """The vault's URL."""
        return self.key_url.partition("/keys/")[0]

    @property
    def key_name(self) -> str:
        """The key's name in the vault."""
        return self.key_url.rpartition("/")[2]

    def config(self) -> dict[str, str]:
        """The arguments that make an equal value, without those that are None; ``expires`` as ``YYYY-MM-DD``."""
        values = {
            "key_url": self.key_url,
            "tenant_id": self.tenant_id,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "credential": self.credential,
            "expires": self.secret_expires.isoformat() if self.secret_expires is not None else None,
            "operations": self.operations,
            "profile": self.profile,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The key that :meth:`config` described.

        :raises ConfigurationError: *config* is not what :meth:`config` returns.
        """
        needed = {"key_url", "tenant_id", "operations", "profile"}
        if not needed <= set(config) <= needed.union(_OPTIONAL):
            raise ConfigurationError(
                "The configuration of an AzureKeyVault has other entries than it should."
            )
        values: dict[str, Any] = dict(config)
        if "expires" in values:
            values["expires"] = _parse_date(values["expires"])
        kms = cls(**values)
        if kms.config() != config:
            raise ConfigurationError("The configuration of an AzureKeyVault is not in its canonical form.")
        return kms

    def claims(self) -> tuple[str, ...]:
        """The key, and the reference to the customer's secret; not the operator's application, which all share."""
        key = (
            f"azure:{self.key_url.removeprefix('https://')}".lower()
        )  # the vault ignores the case of a key's name
        return (key,) if self.client_secret is None else (key, f"secret:{self.client_secret}")

    def expires(self) -> date | None:
        """The day on which the client secret expires, where it was given."""
        return self.secret_expires

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> _AzureClient:
        """A client for this key. Makes no call; the secret is looked up at the first one.

        :param settings: see :class:`~sqla_byok.kms.profiles.Profile`.
        :param operator: secrets and credentials.
        :param reason: stands at the front of the user agent, which the customer's log shows.
        :raises ConfigurationError: a setting is unknown or has the wrong type, the profile does not allow the
            vault's host, or nobody registered the credential.
        :raises MissingExtraError: the Azure SDK is not installed.

        Source: https://learn.microsoft.com/python/api/overview/azure/keyvault-keys-readme
        """
        parsed = Profile.parse(settings)
        operator = operator if operator is not None else Operator()
        host = self.vault_url.removeprefix("https://")
        if not parsed.allows(host):
            raise ConfigurationError(
                f"The profile {self.profile!r} does not allow the vault host {host!r}; "
                "add it to the profile's hosts if it is one of Azure's or your own."
            )
        if self.credential is not None and self.credential not in operator.credentials:
            raise ConfigurationError(
                f"There is no credential {self.credential!r}; register its factory with Byok(credentials={{…}})."
            )
        _import_sdk()
        watch(*_LOGGERS)
        return _AzureClient(self, parsed, operator, reason)


# They take any object: a stored configuration may hold anything.


def _check(fits: bool, name: str, wanted: str) -> None:
    if not fits:
        raise ConfigurationError(f"The {name} of an AzureKeyVault must be {wanted}.")


def _matches(pattern: re.Pattern[str], value: object, *, lower: bool = False) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value.lower() if lower else value) is not None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _parse_date(text: object) -> date | None:
    try:
        return date.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None  # which is not canonical either


def _key_url(key_url: object, vault_url: object, key_name: object) -> str:
    """The key's URL in its canonical form: host in lower case, no default port, no version."""
    if key_url is not None:
        if vault_url is not None or key_name is not None:
            raise ConfigurationError("AzureKeyVault needs key_url, or vault_url and key_name, and not both.")
        found = _KEY_URL.fullmatch(key_url) if isinstance(key_url, str) else None
        if found is None:
            raise ConfigurationError(
                "The key_url of an AzureKeyVault must be https://<vault>.vault.azure.net/keys/<name>."
            )
        return f"https://{_host(found)}/keys/{found['name']}"
    _check(_matches(_KEY_NAME, key_name), "key_name", "the key's name: letters, digits and hyphens")
    if isinstance(vault_url, str) and _VAULT_NAME.fullmatch(vault_url):
        return f"https://{vault_url.lower()}.vault.azure.net/keys/{key_name}"
    found = _VAULT_URL.fullmatch(vault_url) if isinstance(vault_url, str) else None
    if found is None:
        raise ConfigurationError(
            "The vault_url of an AzureKeyVault must be https://<vault>.vault.azure.net, or the vault's name."
        )
    return f"https://{_host(found)}/keys/{key_name}"


def _host(found: re.Match[str]) -> str:
    return found["host"].lower().removesuffix(":443")


def _authority(vault_host: str, profile: Profile) -> str:
    if profile.authority is not None:
        return "https://" + profile.authority.removeprefix("https://").rstrip("/")
    return next((_AUTHORITIES[end] for end in _AUTHORITIES if vault_host.endswith(end)), _PUBLIC_AUTHORITY)


# The SDK


class _Sdk(NamedTuple):
    key_client: Any
    request: Any
    transport: Any
    secret_credential: Any
    token_info: Any


def _import_sdk() -> _Sdk:
    try:
        from azure.core.credentials import AccessTokenInfo
        from azure.core.pipeline.transport import RequestsTransport
        from azure.core.rest import HttpRequest
        from azure.identity import ClientSecretCredential
        from azure.keyvault.keys import KeyClient
    except ImportError as error:
        raise MissingExtraError(
            'AzureKeyVault needs the Azure SDK: pip install "sqla-byok[azure]"'
        ) from error
    return _Sdk(KeyClient, HttpRequest, RequestsTransport, ClientSecretCredential, AccessTokenInfo)


# A new TLS connection costs about 20 ms of CPU for loading the authorities to trust, so those that a process has are
# shared. They know nothing of tenants: no token, and no cookies. Each process has its own; a forked one must not
# write into its parent's sockets.
_transports: dict[tuple[int, Profile], Any] = {}


def _shared_transport(profile: Profile) -> Any:
    key = (os.getpid(), profile)
    transport = _transports.get(key)
    if transport is None:
        # Two threads that race here make one each, and one of the two is used from then on.
        transport = _transports.setdefault(key, _make_transport(profile))
    return transport


def _make_transport(profile: Profile) -> Any:
    transport = _import_sdk().transport(
        connection_timeout=profile.connect_timeout,
        read_timeout=profile.read_timeout,
        connection_verify=profile.ca_file or True,
    )
    transport.open()
    transport.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    for adapter in transport.session.adapters.values():
        adapter.init_poolmanager(50, 50)  # hosts, and connections to each
    return transport


class _TokenError(Exception):
    """No token was to be had. Carries the SDK's exception, since a trace of the call would show its text."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class _Directory:
    """A credential for one directory's vaults only, whatever the vault's challenge names.

    A directory may be given by its domain, which the SDK would take for another than the challenge's GUID. And it
    checks what the token shall be good for only where a vault is in one of Azure's own domains.
    """

    def __init__(self, credential: Any = None) -> None:
        self._credential = credential
        self.answer: Any = None  # the token endpoint's refusal, where the SDK lets us see it

    def use(self, credential: Any) -> None:
        self._credential = credential

    def note(self, response: Any) -> None:
        if response.http_response.status_code >= 400:
            self.answer = response.http_response

    def get_token_info(self, *scopes: str, options: Mapping[str, Any] | None = None) -> Any:
        scopes = tuple(scope if _SCOPE.fullmatch(scope) else _VAULT_SCOPE for scope in scopes)
        wanted = {name: value for name, value in (options or {}).items() if name != "tenant_id"}
        failure: Exception
        try:
            if hasattr(self._credential, "get_token_info"):
                return self._credential.get_token_info(*scopes, options=wanted)
            token = self._credential.get_token(*scopes, **wanted)
            return _import_sdk().token_info(token.token, token.expires_on)
        except Exception as error:  # noqa: BLE001 - a credential may be the operator's own; all of it is a "no"
            failure = error
        raise _TokenError(failure)


class _Session(NamedTuple):
    """What is thrown away together: the SDK's client, and the credential with its token."""

    client: Any
    directory: _Directory


class _Answer(NamedTuple):
    value: bytes
    version: str


class _AzureClient:
    """One key, for one purpose. Its token lives no longer than itself."""

    def __init__(self, kms: AzureKeyVault, profile: Profile, operator: Operator, reason: str) -> None:
        self._kms = kms
        self._profile = profile
        self._operator = operator
        self._reason = reason
        self._lock = threading.Lock()
        self._session: _Session | None = None

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        """See :meth:`sqla_byok.kms.base.KmsClient.wrap`; takes 1 to 190, 318 or 446 bytes, by the key's size.

        Done by the vault, though the SDK could do it here with the public key: so a disabled key refuses, Get is not
        needed, and the answer names the version.

        Source: https://learn.microsoft.com/rest/api/keyvault/keys/encrypt/encrypt
        """
        if not payload:
            raise self._failure(_EMPTY, "no payload", "encrypt", tenant)
        answer = self._call(
            "encrypt" if self._kms.operations == "encrypt" else "wrapkey", "", payload, tenant
        )
        return Wrapped(answer.value, answer.version)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        """See :meth:`sqla_byok.kms.base.KmsClient.unwrap`; asks the version that wrapped.

        Source: https://learn.microsoft.com/rest/api/keyvault/keys/decrypt/decrypt
        """
        operation = "decrypt" if self._kms.operations == "encrypt" else "unwrapkey"
        if not _VERSION.fullmatch(wrapped.key_version):  # it becomes part of a URL
            raise self._failure(_WRONG_KEY, "no key version", operation, tenant)
        return self._call(operation, f"/{wrapped.key_version}", wrapped.blob, tenant).value

    def room(self, wrapped: Wrapped) -> int:
        """See :meth:`sqla_byok.kms.base.KmsClient.room`."""
        return len(wrapped.blob) - _OVERHEAD

    def _call(self, operation: str, version: str, value: bytes, tenant: str) -> _Answer:
        url = f"{self._kms.key_url}{version}/{operation}"
        body = {"alg": _ALGORITHM, "value": base64.urlsafe_b64encode(value).rstrip(b"=").decode()}
        attempt = 1
        while True:
            outcome = self._attempt(operation, url, body, tenant)
            if isinstance(outcome, _Answer):
                return outcome
            pause = _pause(outcome, attempt)
            if attempt >= self._profile.attempts or pause is None:
                # Raised here: in an except block it would take along an exception that shows request or response.
                raise outcome
            _wait(pause)
            attempt += 1

    def _attempt(self, operation: str, url: str, body: dict[str, str], tenant: str) -> _Answer | KmsError:
        request_id.set(None)
        session = self._session or self._open(operation, tenant)
        response: Any = None
        try:
            with quiet(*_LOGGERS):
                response = session.client.send_request(_import_sdk().request("POST", url, json=body))
            request_id.set(response.headers.get("x-ms-request-id"))
            if response.status_code == 200:
                answer = _read_answer(response, self._kms.key_name)
                if answer is not None:
                    return answer
            meaning, code = _read_response(response, operation)
        except _TokenError as failed:
            response = session.directory.answer
            meaning, code = _read_token_error(failed.error, response, own=self._kms.credential is None)
            self._discard(session)  # it remembers some failures for a minute
        except Exception as error:  # noqa: BLE001 - the SDK raises more than its own; all of it is a "no"
            meaning, code = _read_exception(error)
        if meaning.error is CredentialInvalidError:
            self._discard(session)  # it would show the refused token again
        return self._failure(meaning, code, operation, tenant, response)

    def _open(self, operation: str, tenant: str) -> _Session:
        with self._lock:  # those who wait for it need the same token
            if self._session is None:
                self._session = self._create(operation, tenant)
            return self._session

    def _create(self, operation: str, tenant: str) -> _Session:
        kms, secret = self._kms, ""
        if kms.client_secret is not None:
            secret = self._operator.secrets.resolve(kms.client_secret, tenant)  # its errors are already ours
        try:
            with quiet(*_LOGGERS):
                return self._connect(secret)
        except Exception as error:  # noqa: BLE001 - the factory is the operator's own
            failure = self._failure(_NO_CREDENTIAL, type(error).__name__, operation, tenant)
        raise failure

    def _connect(self, secret: str) -> _Session:
        kms, profile, sdk = self._kms, self._profile, _import_sdk()
        host = kms.vault_url.removeprefix("https://")
        shared = {
            "transport": _shared_transport(profile),
            "proxies": dict(profile.proxies) if profile.proxies is not None else None,
            "retry_total": 0,  # tried again above, 429 without Retry-After included
            "user_agent": f"sqla-byok/{self._reason}",
        }
        if kms.credential is not None:
            directory = _Directory(self._operator.credentials[kms.credential](kms.tenant_id))
        else:
            directory = _Directory()
            directory.use(
                sdk.secret_credential(
                    kms.tenant_id,
                    kms.client_id,
                    secret,
                    authority=_authority(host, profile),
                    disable_instance_discovery=profile.disable_instance_discovery,
                    raw_response_hook=directory.note,
                    **shared,
                )
            )
        client = sdk.key_client(
            kms.vault_url,
            directory,
            api_version=_API_VERSION,
            permit_redirects=False,  # a redirect would take the payload along
            verify_challenge_resource=host.endswith(AZURE_VAULT_DOMAINS),
            **shared,
        )
        return _Session(client, directory)

    def _discard(self, session: _Session) -> None:
        with self._lock:
            if self._session is session:
                self._session = None

    def _failure(
        self, meaning: _Meaning, code: str, operation: str, tenant: str, response: Any = None
    ) -> KmsError:
        headers = response.headers if response is not None else {}
        todo = meaning.todo.format(permission=_PERMISSIONS[operation], action=_ACTIONS[operation])
        failure = meaning.error(
            f"Azure Key Vault did not {operation} for tenant {tenant!r} with {self._kms.key_url}: "
            f"{meaning.what} ({code}). {todo}",
            tenant=tenant,
            action_by=meaning.action_by,
            retry_after=_retry_after(headers),
            request_id=headers.get("x-ms-request-id"),
        )
        if meaning.retryable is not None:
            failure.retryable = meaning.retryable
        return failure


def _pause(failure: KmsError, attempt: int) -> float | None:
    """How many seconds to wait before the next attempt; None where another would be of no use."""
    if not failure.retryable or isinstance(failure, KmsBlockedError):
        return None
    if failure.retry_after is not None:
        return failure.retry_after if failure.retry_after <= _PATIENCE else None
    return random.uniform(0.5, 1.0) * 2.0 ** (attempt - 1)  # noqa: S311 - no secret, and all callers differ


# What answers mean


class _Meaning(NamedTuple):
    """What a provider's error means: our exception, who must act, what happened and what to do."""

    error: type[KmsError]
    action_by: Literal["customer", "operator"]
    what: str
    todo: str
    retryable: bool | None = None


_PERMISSIONS = {"encrypt": "Encrypt", "decrypt": "Decrypt", "wrapkey": "Wrap Key", "unwrapkey": "Unwrap Key"}
_ACTIONS = {"encrypt": "encrypt", "decrypt": "decrypt", "wrapkey": "wrap", "unwrapkey": "unwrap"}

_DISABLED = _Meaning(
    KeyDisabledError,
    "customer",
    "the key or its version is disabled",
    "The customer must enable it again, on the vault's page Keys.",
)
_NOT_IN_TIME = _Meaning(
    KeyDisabledError,
    "customer",
    "the key's activation or expiration date does not allow its use now",
    "The customer must change the dates, on the vault's page Keys.",
)
_DELETED = _Meaning(
    KeyDeletedError,
    "customer",
    "the key is deleted or was never there",
    "The customer must check the key's URL, or recover it on the vault's page Keys, Manage deleted keys; "
    "a purged key is gone, and the data with it.",
)
_BUSY = _Meaning(
    KmsUnavailableError, "operator", "the key is being changed or recovered", "Try again in a minute."
)
_DENIED_BY_POLICY = _Meaning(
    AccessDeniedError,
    "customer",
    "the vault's access policies do not allow it",
    "The customer must give our application the key permission {permission}, on the vault's page Access policies.",
)
_DENIED_BY_RBAC = _Meaning(
    AccessDeniedError,
    "customer",
    "no role allows it",
    "The customer must give our application a role with the data action keys/{action}/action on the key, on its page "
    "Access control (IAM) or, in a Managed HSM, Local RBAC; a change takes some minutes.",
)
_DENIED = _Meaning(
    AccessDeniedError,
    "customer",
    "access is denied",
    "The customer must give our application the key permission {permission}, on the vault's page Access policies or "
    "Access control (IAM).",
)
_NOT_PERMITTED = _Meaning(
    AccessDeniedError,
    "customer",
    "the operation is not among the key's permitted operations",
    "The customer must add {permission} to the permitted operations of the key's version, on the vault's page Keys.",
)
_FIREWALL = _Meaning(
    KmsBlockedError,
    "operator",
    "the vault's firewall does not let our address through",
    "Check from which address we call; the customer must allow it, on the vault's page Networking.",
)
_WRONG_KEY = _Meaning(
    WrongKeyError,
    "operator",
    "the wrapped key is damaged or another key's",
    "Check which key and which keystore row belong to the tenant.",
)
_NOT_ACCEPTED = _Meaning(
    KmsRefusedError,
    "customer",
    "the key cannot be used with RSA-OAEP-256, or the payload is too long for it",
    "The customer must give us an RSA key of 2048, 3072 or 4096 bits.",
)
_EMPTY = _Meaning(KmsRefusedError, "operator", "the payload is empty", "Give it at least one byte.")
_OTHER_DIRECTORY = _Meaning(
    CredentialInvalidError,
    "customer",
    "the vault belongs to another directory than tenant_id",
    "The customer must give us the Directory ID that the vault's page Overview shows.",
)
_UNAUTHORIZED = _Meaning(
    CredentialInvalidError,
    "operator",
    "the vault does not accept our token",
    "Check the authority, the credential and the clock.",
)
_THROTTLED = _Meaning(
    ThrottledError,
    "operator",
    "it has too many requests",
    "Try again later; if it stays, others use up the same vault's quota, or revoke_within is very short.",
)
_FAULT = _Meaning(KmsUnavailableError, "operator", "it has a fault of its own", "Try again later.")
_NO_CONNECTION = _Meaning(
    KmsUnavailableError,
    "operator",
    "there was no answer in time, or the connection failed",
    "Try again later; check the network if it stays.",
)
_UNKNOWN_HOST = _Meaning(
    KmsUnavailableError,
    "operator",
    "its host name is unknown",
    "Ask the customer whether the vault is still there; check the authority of the profile and the DNS.",
    retryable=False,
)
_TLS = _Meaning(
    KmsUnavailableError,
    "operator",
    "its TLS certificate was not accepted, or the handshake failed",
    "Check the vault's host, and ca_file and proxies of the profile.",
    retryable=False,
)
_PROXY = _Meaning(
    KmsBlockedError, "operator", "our proxy did not let us through", "Check the proxy and its rules."
)
_UNREADABLE = _Meaning(
    KmsRefusedError, "operator", "its answer cannot be read", "Check what stands between us and the vault."
)
_UNLISTED = _Meaning(
    KmsRefusedError,
    "operator",
    "it refused for a reason we do not know",
    "Look the code up; report it to us.",
)

# By the innermost code of a vault's answer.
_MEANINGS: dict[str, _Meaning] = {
    "KeyDisabled": _DISABLED,
    "KeyNotYetValid": _NOT_IN_TIME,
    "KeyExpired": _NOT_IN_TIME,
    "KeyOperationForbidden": _NOT_PERMITTED,
    "ForbiddenByPolicy": _DENIED_BY_POLICY,
    "ForbiddenByRbac": _DENIED_BY_RBAC,
    "AccessDenied": _DENIED,
    "Forbidden": _DENIED,
    "ForbiddenByFirewall": _FIREWALL,
    "ForbiddenByConnection": _FIREWALL,
    "KeyNotFound": _DELETED,
    "ObjectIsDeletedButRecoverable": _DELETED,
    "ObjectIsBeingDeleted": _DELETED,
    "ObjectIsBeingRecovered": _BUSY,
    "Conflict": _BUSY,
    "Throttled": _THROTTLED,
}
_STATUSES = {404: _DELETED, 408: _FAULT, 429: _THROTTLED}

_NO_CREDENTIAL = _Meaning(
    CredentialInvalidError,
    "operator",
    "the credential could not be made",
    "Check its factory in Byok(credentials={{…}}) and the authority of the profile.",
)
_TOKEN_REFUSED = _Meaning(
    CredentialInvalidError,
    "operator",
    "the directory refused our application",
    "Look the code up at https://login.microsoftonline.com/error.",
)
_UNKNOWN_DIRECTORY = _Meaning(
    CredentialInvalidError,
    "customer",
    "there is no such directory",
    "The customer must give us its Directory (tenant) ID.",
)
_CONDITIONAL_ACCESS = _Meaning(
    AccessDeniedError,
    "customer",
    "the directory's conditional access keeps our application out",
    "The customer must change the policy, in Microsoft Entra ID, Conditional Access.",
)
_CLOCK = _Meaning(
    CredentialInvalidError,
    "operator",
    "our application's assertion is out of its time",
    "Check the clock of this machine.",
)

# By the number of an AADSTS code: whoever the application belongs to.
_TOKEN_MEANINGS: dict[str, _Meaning] = {
    "50196": _THROTTLED,
    "90055": _THROTTLED,
    "50000": _FAULT,
    "90033": _FAULT,
    "53003": _CONDITIONAL_ACCESS,
    "90002": _UNKNOWN_DIRECTORY,
    "900023": _UNKNOWN_DIRECTORY,
    "700024": _CLOCK,
}
_RENEW = (
    "The customer must make a new client secret, in Microsoft Entra ID, App registrations, Certificates & secrets, "
    "and give it to us."
)
_OWN_UNKNOWN = _Meaning(
    CredentialInvalidError,
    "customer",
    "the directory does not know the customer's application, or has it disabled",
    "The customer must check the application's id, in Microsoft Entra ID, App registrations and "
    "Enterprise applications.",
)
_OWN_MEANINGS: dict[str, _Meaning] = {
    "7000222": _Meaning(
        CredentialExpiredError,
        "customer",
        "the client secret of the customer's application has expired",
        _RENEW,
    ),
    "7000215": _Meaning(
        CredentialInvalidError,
        "customer",
        "the client secret of the customer's application is wrong or deleted",
        _RENEW,
    ),
    "700016": _OWN_UNKNOWN,
    "7000112": _OWN_UNKNOWN,
    "7000229": _OWN_UNKNOWN,
}
_VENDOR_INVALID = _Meaning(
    CredentialInvalidError,
    "operator",
    "the secret, certificate or federation of our own application is wrong",
    "Check what the factory in Byok(credentials={{…}}) gives; this concerns every customer who uses it.",
)
_VENDOR_UNKNOWN = _Meaning(
    CredentialInvalidError,
    "customer",
    "our application is not, or no longer, allowed in the customer's directory",
    "An administrator of the customer must consent to it, or enable it in Microsoft Entra ID, "
    "Enterprise applications.",
)
_VENDOR_MEANINGS: dict[str, _Meaning] = {
    "7000222": _Meaning(
        CredentialExpiredError,
        "operator",
        "the secret of our own application has expired",
        "Renew it; this concerns every customer who uses it.",
    ),
    "7000215": _VENDOR_INVALID,
    "700027": _VENDOR_INVALID,
    "70021": _VENDOR_INVALID,
    "700213": _VENDOR_INVALID,
    "700016": _VENDOR_UNKNOWN,
    "7000112": _VENDOR_UNKNOWN,
    "7000229": _VENDOR_UNKNOWN,
}


def _read_answer(response: Any, key_name: str) -> _Answer | None:
    """The answer of a call that succeeded; None where it does not look like one."""
    body = _json(response)
    kid, value = body.get("kid"), body.get("value")
    if not isinstance(kid, str) or not isinstance(value, str):
        return None
    found = re.fullmatch(
        rf"https://[^/]+/keys/{re.escape(key_name)}/({_VERSION.pattern})", kid, re.IGNORECASE
    )
    if found is None or not re.fullmatch(r"[0-9A-Za-z_-]+", value) or len(value) % 4 == 1:
        return None
    return _Answer(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), found[1])


def _json(response: Any) -> dict[str, Any]:
    try:
        body = response.json()
    except Exception:  # noqa: BLE001 - an answer that cannot be read tells nothing
        return {}
    return body if isinstance(body, dict) else {}


def _read_response(response: Any, operation: str) -> tuple[_Meaning, str]:
    error, message, code = _json(response).get("error"), "", ""
    while isinstance(error, dict):
        code, message = str(error.get("code", code)), message or str(error.get("message", ""))
        error = error.get("innererror")
    status = response.status_code
    if status == 401:
        found = re.search(r"AKV[0-9]{5}", message)
        other = found is not None and found[0] == "AKV10032"
        return _OTHER_DIRECTORY if other else _UNAUTHORIZED, found[0] if found else "HTTP 401"
    # The code comes from the wire: shown only if it looks like one, so never a stretch of key material.
    shown = code if re.fullmatch(r"[A-Za-z]{1,60}", code) else f"HTTP {status}"
    return _meaning_of(code, status, operation), shown


def _meaning_of(code: str, status: int, operation: str) -> _Meaning:
    if code in _MEANINGS:
        return _MEANINGS[code]
    if code == "BadParameter" and status == 400:
        return _WRONG_KEY if operation in ("decrypt", "unwrapkey") else _NOT_ACCEPTED
    if status == 200:
        return _UNREADABLE
    return _FAULT if status >= 500 else _STATUSES.get(status, _UNLISTED)


def _read_exception(error: Exception) -> tuple[_Meaning, str]:
    network = _read_network(error)
    if network is not None:
        return network
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return _meaning_of("", status, ""), type(error).__name__


def _read_network(error: Exception) -> tuple[_Meaning, str] | None:
    """What an exception means that is about the connection; None for any other."""
    causes = list(_causes(error))
    names = {base.__name__: each for each in reversed(causes) for base in type(each).__mro__}
    unknown = [each for each in causes if isinstance(each, socket.gaierror)]
    if "ProxyError" in names:
        return _PROXY, "ProxyError"
    if unknown:
        # EAI_AGAIN is a resolver that does not answer: an outage like any other.
        meaning = _NO_CONNECTION if unknown[0].errno == socket.EAI_AGAIN else _UNKNOWN_HOST
        return meaning, "gaierror"
    if any(isinstance(each, ssl.SSLError) and not isinstance(each, _BROKEN_OFF) for each in causes):
        return _TLS, "SSLError"
    for name in ("ServiceRequestError", "ServiceResponseError", "IncompleteReadError", "OSError"):
        if name in names:
            return _NO_CONNECTION, type(names[name]).__name__
    return None


_INNER = ("__cause__", "__context__", "inner_exception", "reason")
_BROKEN_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError)  # a connection that ended, whatever was in it


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that it was made of, wherever the libraries in between put it."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            inner = [getattr(each, name, None) for name in _INNER]
            waiting.extend(part for part in [*inner, *each.args] if isinstance(part, BaseException))


def _read_token_error(error: Exception, answer: Any, *, own: bool) -> tuple[_Meaning, str]:
    network = _read_network(error)
    if network is not None:
        meaning, code = network
    else:
        meaning, code = _read_token_refusal(error, answer, own=own)
    return meaning._replace(what=f"no token was issued, since {meaning.what}"), code


def _read_token_refusal(error: Exception, answer: Any, *, own: bool) -> tuple[_Meaning, str]:
    response = answer if answer is not None else getattr(error, "response", None)
    text = response.text() if response is not None else " ".join(str(each) for each in _causes(error))
    status = response.status_code if response is not None else _status_in(text)
    found = re.search(r"AADSTS([0-9]{4,8})", text)
    code = found[0] if found else f"HTTP {status}" if status >= 400 else type(error).__name__
    if status == 429:
        return _THROTTLED, code
    if status >= 500:
        return _FAULT, code
    table = _OWN_MEANINGS if own else _VENDOR_MEANINGS
    number = found[1] if found else ""
    return table.get(number) or _TOKEN_MEANINGS.get(number) or _TOKEN_REFUSED, code


def _status_in(text: str) -> int:
    """The HTTP status that MSAL tells of, for a credential of the operator's own, whose answers we do not see.

    Without it an outage of the directory would be a "no" for every customer of the operator's application at once.
    """
    found = re.search(r"HTTP Error: ([0-9]{3})", text)
    return int(found[1]) if found else 0


def _retry_after(headers: Any) -> float | None:
    text = headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"[0-9]{1,6}", text) else None
