"""Customer keys in AWS KMS.

The error table follows the "Errors" sections of
https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html and
https://docs.aws.amazon.com/kms/latest/APIReference/CommonErrors.html.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from weakref import WeakValueDictionary

from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    CredentialExpiredError,
    CredentialInvalidError,
    KeyDeletedError,
    KeyDisabledError,
    KmsBlockedError,
    KmsError,
    KmsNoAnswerError,
    KmsRefusedError,
    KmsUnavailableError,
    MissingExtraError,
    ThrottledError,
    WrongKeyError,
)
from sqla_byok.kms.base import Kms, Operator, Wrapped
from sqla_byok.kms.profiles import Profile
from sqla_byok.kms.quiet import quiet, watch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AwsKms"]

_ROOM = 4096
_LOGGERS = ("boto3", "botocore", "urllib3")

# The region becomes part of a host name, so a customer's form must not be able to put anything else there.
_KEY_ARN = re.compile(
    r"arn:aws(?:-[a-z]+)*:kms:(?P<region>[a-z]{2,5}(?:-[a-z]+){1,2}-[0-9]{1,2}):[0-9]{12}:key/"
    r"(?:mrk-[0-9a-f]{32}|(?:mrk-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
)


@dataclass(frozen=True)
class AwsKms(Kms):
    """A customer's symmetric key in AWS KMS.

    The key's policy must allow our principal ``kms:Encrypt`` and ``kms:Decrypt``. Calls carry the encryption
    context ``sqla-byok:format``, ``sqla-byok:purpose`` and ``sqla-byok:tenant``, which the customer sees in
    clear in its CloudTrail and may demand in its key policy. Credentials come from boto3's default chain.

    :param key_arn: the full ARN of the key. An alias would let the customer's data end up under two keys, and
        a bare id would be looked for in our own account.
    :param profile: which of the operator's settings to use.
    :raises ConfigurationError: *key_arn* is not a key ARN.

    Example::

        AwsKms("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")

    Source: https://docs.aws.amazon.com/kms/latest/developerguide/key-policy-modifying-external-accounts.html
    """

    provider: ClassVar[str] = "aws"
    key_arn: str
    profile: str = field(default="default", kw_only=True)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        if not _is_key_arn(self.key_arn):
            raise ConfigurationError(
                "AwsKms needs the full ARN of a key, arn:aws:kms:<region>:<account>:key/<id>, "
                "not an alias or a bare key id."
            )
        if not _is_name(self.profile):
            raise ConfigurationError(
                "The profile of an AwsKms is the name of one of the operator's settings."
            )

    @property
    def region(self) -> str:
        """The AWS region, which the ARN names."""
        return self.key_arn.split(":")[3]

    def config(self) -> dict[str, str]:
        """``{"key": <ARN>, "profile": <name>}``."""
        return {"key": self.key_arn, "profile": self.profile}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The key that :meth:`config` described.

        :raises ConfigurationError: *config* has other keys than ``key`` and ``profile``, or a bad ARN.
        """
        if set(config) != {"key", "profile"}:
            raise ConfigurationError('The configuration of an AwsKms is {"key": <ARN>, "profile": <name>}.')
        return cls(config["key"], profile=config["profile"])

    def claims(self) -> tuple[str, ...]:
        """The key."""
        return (f"aws:{self.key_arn}",)

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> _AwsClient:
        """A client for this key. Makes no call; the boto3 client is made at the first one.

        :param settings: see :class:`~sqla_byok.kms.profiles.Profile`.
        :raises ConfigurationError: a setting is unknown or has the wrong type.
        :raises MissingExtraError: boto3 is not installed.

        Source: https://docs.aws.amazon.com/botocore/latest/reference/config.html
        """
        parsed = Profile.parse(settings)
        _import_boto3()
        return _AwsClient(self.key_arn, _shared_connection(self.region, parsed))


# Both take any object: a stored configuration may hold anything.


def _is_key_arn(value: object) -> bool:
    return isinstance(value, str) and _KEY_ARN.fullmatch(value) is not None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


class _Connection:
    """The boto3 client of one region and profile.

    All of a region's keys share it: a client takes about 9 MB and 50 ms to make, and a tenant should not.
    """

    def __init__(self, region: str, settings: Profile) -> None:
        self._region = region
        self._settings = settings
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._client: Any = None

    def client(self) -> Any:
        if self._pid != os.getpid():
            self._start()  # a forked process must not write into its parent's sockets, nor wait for its lock
        client = self._client
        if client is None:
            with self._lock:  # making a client is not thread-safe, using one is
                client = self._client = self._client or self._create()
        return client

    def discard(self, client: Any) -> None:
        """Make the next call look for credentials again: a client without any never finds them later."""
        if self._client is client:
            self._client = None

    def _create(self) -> Any:
        session_type, config_type = _import_boto3()
        settings = self._settings
        config = config_type(
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            max_pool_connections=50,
            proxies=dict(settings.proxies) if settings.proxies is not None else None,
            user_agent_extra="sqla-byok",
        )
        client = session_type().client(
            "kms",
            region_name=self._region,
            endpoint_url=settings.endpoint_url,
            verify=settings.ca_file,
            config=config,
        )
        watch(*_LOGGERS)  # modules imported just now have brought new loggers
        return client


_connections: WeakValueDictionary[tuple[str, Profile], _Connection] = WeakValueDictionary()


def _shared_connection(region: str, settings: Profile) -> _Connection:
    # Two threads that race here get a connection each, which costs memory and nothing else.
    return _connections.setdefault((region, settings), _Connection(region, settings))


def _import_boto3() -> tuple[Any, Any]:
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError as error:
        raise MissingExtraError('AwsKms needs boto3: pip install "sqla-byok[aws]"') from error
    return Session, Config


class _AwsClient:
    """One key, through the connection that its region's keys share."""

    def __init__(self, key_arn: str, connection: _Connection) -> None:
        self._key_arn = key_arn
        self._connection = connection

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        """See :meth:`sqla_byok.kms.base.KmsClient.wrap`; takes 1 to 4,096 bytes.

        Source: https://docs.aws.amazon.com/kms/latest/APIReference/API_Encrypt.html
        """
        return Wrapped(self._call("encrypt", tenant, "CiphertextBlob", Plaintext=payload))

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        """See :meth:`sqla_byok.kms.base.KmsClient.unwrap`.

        Source: https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html
        """
        return self._call("decrypt", tenant, "Plaintext", CiphertextBlob=wrapped.blob)

    def room(self, wrapped: Wrapped) -> int:
        """See :meth:`sqla_byok.kms.base.KmsClient.room`."""
        return _ROOM

    def _call(self, operation: str, tenant: str, result: str, **arguments: bytes) -> bytes:
        client = None
        try:
            with quiet(*_LOGGERS):
                client = self._connection.client()
                # KeyId is pinned for decrypt too, or a blob under any key that we may use would open.
                response = getattr(client, operation)(
                    KeyId=self._key_arn, EncryptionContext=_context(tenant), **arguments
                )
            answer: bytes = response[result]
            return answer
        except Exception as error:  # noqa: BLE001 - botocore raises more than its own; all of it is a "no"
            failure = _translate(error, operation, self._key_arn, tenant)
        if isinstance(failure, (CredentialExpiredError, CredentialInvalidError)):
            self._connection.discard(client)
        # Raised here: in the except block it would take along an exception that shows request or response.
        raise failure


def _context(tenant: str) -> dict[str, str]:
    return {
        "sqla-byok:format": "1",
        "sqla-byok:purpose": "tenant-key",
        "sqla-byok:tenant": tenant,
    }


class _Meaning(NamedTuple):
    """What a provider's error means: our exception, who must act, what happened and what to do."""

    error: type[KmsError]
    action_by: Literal["customer", "operator"]
    what: str
    todo: str
    retryable: bool | None = None


_DISABLED = _Meaning(
    KeyDisabledError, "customer", "the key is disabled", "The customer must enable it again."
)
_DELETED = _Meaning(
    KeyDeletedError,
    "customer",
    "the key is deleted or pending deletion",
    "The customer can cancel a deletion that is pending; a deleted key is gone, and the data with it.",
)
_UNKNOWN_KEY = _Meaning(
    KeyDeletedError, "customer", "there is no such key", "The customer must check the ARN, or has deleted it."
)
_UNUSABLE = _Meaning(
    KeyDisabledError,
    "customer",
    "the key's state does not allow its use",
    "The customer must import its key material or connect its key store.",
)
_DENIED = _Meaning(
    AccessDeniedError,
    "customer",
    "access is denied",
    "The customer must allow our principal kms:Encrypt and kms:Decrypt in the key's policy.",
)
_DENIED_TO_US = _Meaning(
    AccessDeniedError,
    "operator",
    "access is denied by a policy of our own account",
    "Allow kms:Encrypt and kms:Decrypt on the key in our IAM policies.",
)
_WRONG_KEY = _Meaning(
    WrongKeyError,
    "operator",
    "the wrapped key is damaged, another tenant's or another key's",
    "Check which key and which keystore row belong to the tenant.",
)
_WRONG_KIND = _Meaning(
    KmsRefusedError,
    "customer",
    "the key cannot encrypt and decrypt symmetrically",
    "The customer must give us a key with KeySpec SYMMETRIC_DEFAULT and KeyUsage ENCRYPT_DECRYPT.",
)
_NOT_ACCEPTED = _Meaning(
    KmsRefusedError, "operator", "the request is not a valid one", "Check the size of the payload."
)
_EXPIRED = _Meaning(
    CredentialExpiredError, "operator", "our AWS credential has expired", "Renew it; check the clock as well."
)
_INVALID = _Meaning(
    CredentialInvalidError,
    "operator",
    "our AWS credential is missing or wrong",
    "Give this process valid AWS credentials; check the clock as well.",
)
_THROTTLED = _Meaning(
    ThrottledError,
    "operator",
    "the request quota is used up",
    "Try again later, or raise the KMS quota of our own account, which pays for all tenants' calls.",
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
    "Check the region of the key, the endpoint and the DNS.",
    retryable=False,
)
_TLS = _Meaning(
    KmsUnavailableError,
    "operator",
    "its TLS certificate was not accepted, or the handshake failed",
    "Check the endpoint, ca_file and proxies of the profile.",
    retryable=False,
)
_PROXY = _Meaning(
    KmsBlockedError, "operator", "our proxy did not let us through", "Check the proxy and its rules."
)
_UNLISTED = _Meaning(
    KmsRefusedError,
    "operator",
    "it refused for a reason we do not know",
    "Look the code up; report it to us.",
)

# By the error code of a response, or the name of botocore's exception or of the nearest listed base of it.
_MEANINGS: dict[str, _Meaning] = {
    "DisabledException": _DISABLED,
    "KMSInvalidStateException": _UNUSABLE,
    "NotFoundException": _UNKNOWN_KEY,
    "AccessDenied": _DENIED,
    "AccessDeniedException": _DENIED,
    "InvalidCiphertextException": _WRONG_KEY,
    "IncorrectKeyException": _WRONG_KEY,
    "InvalidKeyUsageException": _WRONG_KIND,
    "ValidationException": _NOT_ACCEPTED,
    "ParamValidationError": _NOT_ACCEPTED,
    #
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "UnauthorizedSSOTokenError": _EXPIRED,
    "AuthFailure": _INVALID,
    "IncompleteSignature": _INVALID,
    "IncompleteSignatureException": _INVALID,
    "InvalidAccessKeyId": _INVALID,
    "InvalidClientTokenId": _INVALID,
    "InvalidIdentityToken": _INVALID,
    "InvalidSignatureException": _INVALID,
    "MissingAuthenticationToken": _INVALID,
    "MissingAuthenticationTokenException": _INVALID,
    "NotAuthorized": _INVALID,
    "OptInRequired": _INVALID,
    "SignatureDoesNotMatch": _INVALID,
    "UnrecognizedClientException": _INVALID,
    "ConfigNotFound": _INVALID,
    "CredentialRetrievalError": _INVALID,
    "LoginError": _INVALID,
    "NoAuthTokenError": _INVALID,
    "NoCredentialsError": _INVALID,
    "PartialCredentialsError": _INVALID,
    "ProfileNotFound": _INVALID,
    "SSOError": _INVALID,
    "TokenRetrievalError": _INVALID,
    #
    "LimitExceeded": _THROTTLED,
    "LimitExceededException": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "RequestThrottledException": _THROTTLED,
    "SlowDown": _THROTTLED,
    "Throttling": _THROTTLED,
    "ThrottledException": _THROTTLED,
    "ThrottlingException": _THROTTLED,
    "TooManyRequests": _THROTTLED,
    "TooManyRequestsException": _THROTTLED,
    "DependencyTimeoutException": _FAULT,
    "InternalFailure": _FAULT,
    "KMSInternalException": _FAULT,
    "KeyUnavailableException": _FAULT,
    "RequestTimeout": _FAULT,
    "RequestTimeoutException": _FAULT,
    "ServiceUnavailable": _FAULT,
    "ServiceUnavailableException": _FAULT,
    "ConnectionError": _NO_CONNECTION,  # EndpointConnectionError, ConnectTimeoutError
    "HTTPClientError": _NO_CONNECTION,  # ReadTimeoutError, ConnectionClosedError
    "MetadataRetrievalError": _NO_CONNECTION,
    "ProxyConnectionError": _PROXY,
    "SSLError": _TLS,
}

# How AWS names a policy of the caller's side in an AccessDeniedException:
# https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
_OUR_POLICIES = (
    "identity-based polic",
    "permissions boundar",
    "service control polic",
    "session polic",
    "VPC endpoint polic",
)


def _translate(error: Exception, operation: str, key_arn: str, tenant: str) -> KmsError:
    from botocore.exceptions import ClientError

    retry_after = None
    if isinstance(error, ClientError):
        meaning, code = _read_response(error)
        retry_after = _retry_after(error)
    else:
        meaning, code = _read_exception(error), type(error).__name__
    failure = meaning.error(
        f"AWS KMS did not {operation} for tenant {tenant!r} with {key_arn}: "
        f"{meaning.what} ({code}). {meaning.todo}",
        tenant=tenant,
        action_by=meaning.action_by,
        retry_after=retry_after,
    )
    if meaning.retryable is not None:
        failure.retryable = meaning.retryable
    return failure


def _read_response(error: Any) -> tuple[_Meaning, str]:
    answer = error.response.get("Error", {})
    code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    meaning = _meaning_of(code, message, status)
    if error.operation_name not in ("Encrypt", "Decrypt"):
        meaning = _meaning_for_credentials(meaning)
    # The code comes from the wire: shown only if it looks like one, so never a stretch of key material.
    return meaning, code if re.fullmatch(r"[A-Za-z0-9]{1,60}", code) else f"HTTP {status}"


def _meaning_of(code: str, message: str, status: int) -> _Meaning:
    meaning = _MEANINGS.get(code)
    if meaning in (_DISABLED, _UNUSABLE) and "deletion" in message:
        return _DELETED
    if meaning is _DENIED and any(policy in message for policy in _OUR_POLICIES):
        return _DENIED_TO_US
    if meaning is not None:
        return meaning
    if status == 429:
        return _THROTTLED
    return _FAULT if status >= 500 else _UNLISTED


def _meaning_for_credentials(meaning: _Meaning) -> _Meaning:
    """The same for a call that botocore made on its own, to get us a credential."""
    if issubclass(meaning.error, (KmsNoAnswerError, CredentialExpiredError)):
        return meaning
    return _INVALID


def _read_exception(error: Exception) -> _Meaning:
    if _is_unknown_host(error):
        return _UNKNOWN_HOST
    names = (base.__name__ for base in type(error).__mro__)
    return next((_MEANINGS[name] for name in names if name in _MEANINGS), _UNLISTED)


def _is_unknown_host(error: Exception) -> bool:
    inner = getattr(error, "kwargs", {}).get("error")
    cause = inner if isinstance(inner, socket.gaierror) else getattr(inner, "__context__", None)
    # EAI_AGAIN is a resolver that does not answer: an outage like any other.
    return isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN


def _retry_after(error: Any) -> float | None:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    for name, unit in (("retry-after", 1.0), ("x-amz-retry-after", 0.001)):
        text = headers.get(name, "")
        if re.fullmatch(r"[0-9]{1,6}", text):
            return int(text) * unit
    return None
