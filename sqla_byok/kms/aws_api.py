"""Calls to AWS: the boto3 clients that a region's calls share, and what AWS's errors mean.

The codes that all services have in common follow
https://docs.aws.amazon.com/kms/latest/APIReference/CommonErrors.html.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from sqla_byok.errors import (
    ByokError,
    CredentialExpiredError,
    CredentialInvalidError,
    KmsBlockedError,
    KmsError,
    KmsNoAnswerError,
    KmsRefusedError,
    KmsUnavailableError,
    MissingExtraError,
    ThrottledError,
)
from sqla_byok.kms.profiles import Profile
from sqla_byok.kms.quiet import quiet, watch

__all__ = ["NOT_ACCEPTED", "Api", "Connection", "Meaning", "Session", "connection"]

_LOGGERS = ("boto3", "botocore", "urllib3")


class Meaning(NamedTuple):
    """What a provider's error means: our exception, who must act, what happened and what to do."""

    error: type[ByokError]
    action_by: Literal["customer", "operator"]
    what: str
    todo: str
    retryable: bool | None = None


class Api(NamedTuple):
    """One AWS service as we use it.

    :param service: boto3's name for it.
    :param meaning: what the code and message of its own errors mean; None where they are like every service's.
    """

    service: str
    meaning: Callable[[str, str], Meaning | None]


class Session(NamedTuple):
    """A role's temporary credentials, as STS gives them."""

    access_key: str
    secret_key: str
    token: str

    def __repr__(self) -> str:
        return f"<Session {self.access_key}>"


def connection(region: str | None, settings: Profile) -> Connection:
    """The one connection of a region and profile. Makes no call.

    :param region: None for that of boto3's default chain.
    :raises MissingExtraError: boto3 is not installed.
    """
    _import_boto3()
    return _kept(region, settings)


@lru_cache(
    maxsize=32
)  # customers choose regions; a client takes about 9 MB, so not any number of them is kept
def _kept(region: str | None, settings: Profile) -> Connection:
    return Connection(region, settings)


class Connection:
    """The boto3 clients of one region and profile.

    All of a region's keys and roles share them: a client takes about 9 MB and 50 ms to make, and a tenant should not.
    """

    def __init__(self, region: str | None, settings: Profile) -> None:
        self._region = region
        self._settings = settings
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._sessions: dict[bool, Any] = {}
        self._clients: dict[tuple[str, bool], Any] = {}

    def call(
        self,
        api: Api,
        operation: str,
        failing: str,
        *,
        tenant: str | None = None,
        session: Session | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Do one operation, with the profile's number of tries.

        :param operation: the name of the client's method, such as ``"decrypt"``.
        :param failing: how an error's message begins, such as ``"AWS KMS did not decrypt for tenant 'org-42'"``.
        :param tenant: the exceptions' ``tenant``.
        :param session: the role's session that signs the request; our own credentials without.
        :param arguments: the operation's.
        :return: AWS's answer.
        :raises ByokError: what the error means, by *api* or the codes that all services share.
        """
        client, has_credentials = None, session is not None
        try:
            with quiet(*_LOGGERS), _signing_with(session):
                client = self._client(api.service, session is not None)
                if session is None:
                    self._refresh_credentials()
                    has_credentials = True
                answer: dict[str, Any] = getattr(client, operation)(**arguments)
            return answer
        except Exception as error:  # noqa: BLE001 - botocore raises more than its own; all of it is a "no"
            failure = _translate(error, api, failing, tenant, has_credentials=has_credentials)
        if session is None and isinstance(failure, (CredentialExpiredError, CredentialInvalidError)):
            self._discard(api.service, client)
        # Raised here: in the except block it would take along an exception that shows request or response.
        raise failure

    def _client(self, service: str, with_role: bool) -> Any:
        if self._pid != os.getpid():
            self._start()  # a forked process must not write into its parent's sockets, nor wait for its lock
        client = self._clients.get((service, with_role))
        if client is None:
            with self._lock:  # making a client is not thread-safe, using one is
                client = self._clients.get((service, with_role)) or self._create(service, with_role)
        return client

    def _create(self, service: str, with_role: bool) -> Any:
        session_type, config_type = _import_boto3()
        settings = self._settings
        if with_role not in self._sessions:
            self._sessions[with_role] = session_type(botocore_session=_botocore_session(with_role))
        config = config_type(
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            max_pool_connections=50,
            proxies=dict(settings.proxies) if settings.proxies is not None else None,
            user_agent_extra="sqla-byok",
        )
        client = self._sessions[with_role].client(
            service,
            region_name=self._region,
            endpoint_url=settings.endpoint_url,
            verify=settings.ca_file,
            config=config,
        )
        watch(*_LOGGERS)  # modules imported just now have brought new loggers
        self._clients[service, with_role] = client
        return client

    def _refresh_credentials(self) -> None:
        # On its own, so that an error of a call that botocore makes for our credential is not taken for one of the
        # call that we make with it: both may be an AssumeRole.
        session = self._sessions.get(False)
        credentials = session.get_credentials() if session is not None else None
        if credentials is not None:
            credentials.get_frozen_credentials()

    def _discard(self, service: str, client: Any) -> None:
        # The next call looks for credentials again: a client without any never finds them later.
        if client is None or self._clients.get((service, False)) is client:
            self._forget()


def _import_boto3() -> tuple[Any, Any]:
    try:
        from boto3.session import Session as Boto3Session
        from botocore.config import Config
    except ImportError as error:
        raise MissingExtraError('Calls to AWS need boto3: pip install "sqla-byok[aws]"') from error
    return Boto3Session, Config


# How one shared client signs for many roles

_signing: ContextVar[Session | None] = ContextVar("sqla_byok_aws_session", default=None)


@contextmanager
def _signing_with(session: Session | None) -> Iterator[None]:
    token = _signing.set(session)
    try:
        yield
    finally:
        _signing.reset(token)


def _botocore_session(with_role: bool) -> Any:
    import botocore.session
    from botocore.credentials import CredentialResolver

    session = botocore.session.Session()
    # Elsewhere than in the key's region STS may not be allowed, and the global one is a single point of failure.
    session.set_config_variable("sts_regional_endpoints", "regional")
    if with_role:
        session.register_component("credential_provider", CredentialResolver([_RoleProvider()]))
    return session


class _RoleProvider:
    """The only source of credentials of the clients that sign for roles, so that they never sign with our own."""

    METHOD = "sqla-byok-role"

    def load(self) -> Any:
        from botocore.credentials import Credentials, ReadOnlyCredentials
        from botocore.exceptions import NoCredentialsError

        class RunningCalls(Credentials):  # type: ignore[misc] # botocore has no types
            """Those of the call that is running in this thread."""

            def get_frozen_credentials(self) -> Any:
                session = _signing.get()
                if session is None:
                    raise NoCredentialsError
                return ReadOnlyCredentials(*session)

        return RunningCalls("role", "role")


# What errors mean

NOT_ACCEPTED = Meaning(
    KmsRefusedError,
    "operator",
    "the request is not a valid one",
    "Check what was asked for; report it to us.",
)
"""Refused by AWS or by botocore before sending; a service may say more."""

_EXPIRED = Meaning(
    CredentialExpiredError, "operator", "our AWS credential has expired", "Renew it; check the clock as well."
)
_INVALID = Meaning(
    CredentialInvalidError,
    "operator",
    "our AWS credential is missing or wrong",
    "Give this process valid AWS credentials; check the clock as well.",
)
_NO_REGION = Meaning(
    CredentialInvalidError,
    "operator",
    "no AWS region is configured",
    "Set AWS_DEFAULT_REGION for this process, or name the whole ARN.",
)
_THROTTLED = Meaning(
    ThrottledError,
    "operator",
    "the request quota is used up",
    "Try again later, or raise the quota of the account that calls: ours for all tenants, or that of a tenant's role.",
)
_FAULT = Meaning(KmsUnavailableError, "operator", "it has a fault of its own", "Try again later.")
_NO_CONNECTION = Meaning(
    KmsUnavailableError,
    "operator",
    "there was no answer in time, or the connection failed",
    "Try again later; check the network if it stays.",
)
_UNKNOWN_HOST = Meaning(
    KmsUnavailableError,
    "operator",
    "its host name is unknown",
    "Check the region, the endpoint and the DNS.",
    retryable=False,
)
_TLS = Meaning(
    KmsUnavailableError,
    "operator",
    "its TLS certificate was not accepted, or the handshake failed",
    "Check the endpoint, ca_file and proxies of the profile.",
    retryable=False,
)
_PROXY = Meaning(
    KmsBlockedError, "operator", "our proxy did not let us through", "Check the proxy and its rules."
)
_UNLISTED = Meaning(
    KmsRefusedError,
    "operator",
    "it refused for a reason we do not know",
    "Look the code up; report it to us.",
)

# By the error code of a response, or the name of botocore's exception or of the nearest listed base of it.
_COMMON: dict[str, Meaning] = {
    "ParamValidationError": NOT_ACCEPTED,
    "ValidationError": NOT_ACCEPTED,
    "ValidationException": NOT_ACCEPTED,
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
    "NoRegionError": _NO_REGION,
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
    "InternalFailure": _FAULT,
    "InternalServiceError": _FAULT,
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


def _translate(
    error: Exception, api: Api, failing: str, tenant: str | None, *, has_credentials: bool
) -> ByokError:
    from botocore.exceptions import ClientError

    retry_after = request_id = None
    if isinstance(error, ClientError):
        meaning, code = _read_response(error, api)
        if not has_credentials:
            meaning = _meaning_for_credentials(meaning)
        retry_after, request_id = _retry_after(error), _metadata(error).get("RequestId")
    else:
        meaning, code = _read_exception(error, api), type(error).__name__
    message = f"{failing}: {meaning.what} ({code}). {meaning.todo}"
    if not issubclass(meaning.error, KmsError):
        return meaning.error(message, tenant=tenant)
    failure = meaning.error(
        message,
        tenant=tenant,
        action_by=meaning.action_by,
        retry_after=retry_after,
        request_id=request_id,
    )
    if meaning.retryable is not None:
        failure.retryable = meaning.retryable
    return failure


def _metadata(error: Any) -> Mapping[str, Any]:
    metadata: Mapping[str, Any] = error.response.get("ResponseMetadata", {})
    return metadata


def _read_response(error: Any, api: Api) -> tuple[Meaning, str]:
    answer = error.response.get("Error", {})
    code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
    status = _metadata(error).get("HTTPStatusCode", 0)
    meaning = api.meaning(code, message) or _COMMON.get(code) or _meaning_of_status(status)
    # The code comes from the wire: shown only if it looks like one, so never a stretch of key material.
    return meaning, code if re.fullmatch(r"[A-Za-z0-9]{1,60}", code) else f"HTTP {status}"


def _meaning_of_status(status: int) -> Meaning:
    if status == 429:
        return _THROTTLED
    return _FAULT if status >= 500 else _UNLISTED


def _meaning_for_credentials(meaning: Meaning) -> Meaning:
    """The same for a call that botocore made on its own, to get us a credential."""
    if issubclass(meaning.error, (KmsNoAnswerError, CredentialExpiredError)):
        return meaning
    return _INVALID


def _read_exception(error: Exception, api: Api) -> Meaning:
    if _is_unknown_host(error):
        return _UNKNOWN_HOST
    for base in type(error).__mro__:
        meaning = api.meaning(base.__name__, "") or _COMMON.get(base.__name__)
        if meaning is not None:
            return meaning
    return _UNLISTED


def _is_unknown_host(error: Exception) -> bool:
    inner = getattr(error, "kwargs", {}).get("error")
    cause = inner if isinstance(inner, socket.gaierror) else getattr(inner, "__context__", None)
    # EAI_AGAIN is a resolver that does not answer: an outage like any other.
    return isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN


def _retry_after(error: Any) -> float | None:
    headers = _metadata(error).get("HTTPHeaders", {})
    for name, unit in (("retry-after", 1.0), ("x-amz-retry-after", 0.001)):
        text = headers.get(name, "")
        if re.fullmatch(r"[0-9]{1,6}", text):
            return int(text) * unit
    return None
