"""Customer keys in AWS KMS, with our own credentials or through a role in the customer's account.

The error tables follow the "Errors" sections of
https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html and
https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    CredentialExpiredError,
    KeyDeletedError,
    KeyDisabledError,
    KmsError,
    KmsRefusedError,
    KmsUnavailableError,
    WrongKeyError,
)
from sqla_byok.kms.aws_api import NOT_ACCEPTED, Api, Connection, Meaning, Session, connection
from sqla_byok.kms.base import Kms, Operator, Wrapped, request_id
from sqla_byok.kms.profiles import Profile

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AwsKms"]

_ROOM = 4096
_SESSION_SECONDS = 900  # the shortest that STS gives
_MARGIN = 60  # before a session's end, for all tries of a call that begins just now

# The region becomes part of a host name, so a customer's form must not be able to put anything else there.
_KEY_ARN = re.compile(
    r"arn:(?P<partition>aws(?:-[a-z]+)*):kms:(?P<region>[a-z]{2,5}(?:-[a-z]+){1,2}-[0-9]{1,2}):[0-9]{12}:key/"
    r"(?:mrk-[0-9a-f]{32}|(?:mrk-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
)
_ROLE_ARN = re.compile(
    r"arn:(?P<partition>aws(?:-[a-z]+)*):iam::[0-9]{12}:role/(?:[!-.0-~]+/){0,20}[A-Za-z0-9_+=,.@-]{1,64}"
)
# https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
_EXTERNAL_ID = re.compile(r"[A-Za-z0-9_+=,.@:/-]{2,1224}")


@dataclass(frozen=True)
class AwsKms(Kms):
    """A customer's symmetric key in AWS KMS.

    The key's policy must allow ``kms:Encrypt`` and ``kms:Decrypt``, either to our principal or to a role in the
    customer's account, which we assume before we call. Calls carry the encryption context ``sqla-byok:format``,
    ``sqla-byok:purpose`` and ``sqla-byok:tenant``, which the customer sees in clear in its CloudTrail and may demand
    in its key policy. Our own credentials come from boto3's default chain.

    :param key_arn: the full ARN of the key. An alias would let the customer's data end up under two keys, and
        a bare id would be looked for in our own account.
    :param role_arn: the ARN of the customer's role. Its session is named after the tenant and the reason of the call,
        lasts 15 minutes at most, and is made anew for each opening and refresh of the tenant's keys.
    :param external_id: what the role's trust policy must demand. Onboarding puts it in, one for each tenant: a customer
        who chose its own could choose another customer's.
    :param profile: which of the operator's settings to use.
    :raises ConfigurationError: *key_arn* is not a key's ARN, *role_arn* not a role's of the same partition, or
        *external_id* stands without a role or is none that AWS takes.

    Example::

        AwsKms(
            "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
            role_arn="arn:aws:iam::111122223333:role/byok",
        )

    Source: https://docs.aws.amazon.com/kms/latest/developerguide/key-policy-modifying-external-accounts.html and
    https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_common-scenarios_third-party.html
    """

    provider: ClassVar[str] = "aws"
    key_arn: str
    role_arn: str | None = field(default=None, kw_only=True)
    external_id: str = field(default="", kw_only=True)
    # A field is a property that nobody can set, as the class is frozen.
    profile: str = field(default="default", kw_only=True)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        partition = _partition(_KEY_ARN, self.key_arn)
        if partition is None:
            raise ConfigurationError(
                "AwsKms needs the full ARN of a key, arn:aws:kms:<region>:<account>:key/<id>, "
                "not an alias or a bare key id."
            )
        if self.role_arn is not None and _partition(_ROLE_ARN, self.role_arn) != partition:
            raise ConfigurationError(
                "role_arn must be the full ARN of a role, arn:aws:iam::<account>:role/<name>, "
                "in the partition of the key."
            )
        if self.external_id != "" and self.role_arn is None:
            raise ConfigurationError("An external id goes with a role_arn.")
        if self.external_id != "" and not _matches(_EXTERNAL_ID, self.external_id):
            raise ConfigurationError("An external id has 2 to 1,224 of A–Z a–z 0–9 _ + = , . @ : / -.")
        if not _is_name(self.profile):
            raise ConfigurationError(
                "The profile of an AwsKms is the name of one of the operator's settings."
            )

    @property
    def region(self) -> str:
        """The AWS region, which the ARN names."""
        return self.key_arn.split(":")[3]

    def config(self) -> dict[str, str]:
        """``{"key": <ARN>, "profile": <name>}``, and with a role ``"role"`` and ``"external_id"``."""
        config = {"key": self.key_arn, "profile": self.profile}
        if self.role_arn is not None:
            config |= {"role": self.role_arn, "external_id": self.external_id}
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The key that :meth:`config` described.

        :raises ConfigurationError: *config* has other keys than :meth:`config` gives, or a bad value.
        """
        if set(config) not in ({"key", "profile"}, {"key", "profile", "role", "external_id"}):
            raise ConfigurationError(
                'The configuration of an AwsKms is {"key": <ARN>, "profile": <name>}, with a role also '
                '{"role": <ARN>, "external_id": <text>}.'
            )
        if "role" not in config:
            return cls(config["key"], profile=config["profile"])
        return cls(
            config["key"],
            role_arn=f"{config['role']}",  # a None must not pass for no role at all
            external_id=config["external_id"],
            profile=config["profile"],
        )

    def claims(self) -> tuple[str, ...]:
        """The key and the role. The replicas of a multi-region key in other regions are the same key."""
        key = self.key_arn
        if "/mrk-" in key:
            key = key.replace(f":{self.region}:", ":*:", 1)
        return (f"aws:{key}",) if self.role_arn is None else (f"aws:{key}", f"aws-role:{self.role_arn}")

    def for_tenant(self, external_id: str) -> Self:
        """The same key with the tenant's external id, where there is a role to assume.

        :raises ConfigurationError: another external id was given to the constructor.
        """
        if self.role_arn is None:
            return self
        if self.external_id not in ("", external_id):
            raise ConfigurationError(
                f"The external id of this tenant is {external_id!r}. Leave external_id out, and have the customer "
                f"put that one into the trust policy of {self.role_arn}."
            )
        return replace(self, external_id=external_id)

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> _AwsClient:
        """A client for this key. Makes no call; the boto3 client is made at the first one.

        :param settings: see :class:`~sqla_byok.kms.profiles.Profile`.
        :param reason: why the key is called; it becomes part of a role session's name.
        :raises ConfigurationError: a setting is unknown or has the wrong type, or the role's external id is missing.
        :raises MissingExtraError: boto3 is not installed.

        Source: https://docs.aws.amazon.com/botocore/latest/reference/config.html
        """
        if self.role_arn is not None and not self.external_id:
            raise ConfigurationError(
                f"To assume {self.role_arn} takes the tenant's external id, which onboarding puts in: for_tenant()."
            )
        return _AwsClient(self, connection(self.region, Profile.parse(settings)), reason)


# All take any object: a stored configuration may hold anything.


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _partition(pattern: re.Pattern[str], value: object) -> str | None:
    found = pattern.fullmatch(value) if isinstance(value, str) else None
    return found["partition"] if found else None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


class _AwsClient:
    """One key, through the connection that its region's keys share."""

    def __init__(self, kms: AwsKms, shared: Connection, reason: str) -> None:
        self._kms = kms
        self._connection = shared
        self._reason = reason
        # The customer's log then tells an access to a single value from the opening of the tenant.
        self._purpose = "value" if reason == "direct" else "tenant-key"
        self._lock = threading.Lock()
        self._session: tuple[str, Session, float] | None = None  # for whom, and until when

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
        request_id.set(None)
        key = self._kms.key_arn
        failing = f"AWS KMS did not {operation} for tenant {tenant!r} with {key}"
        try:
            session = self._role_session(tenant)
            # KeyId is pinned for decrypt too, or a blob under any key that we may use would open.
            answer = self._connection.call(
                _KMS if session is None else _KMS_BY_ROLE,
                operation,
                failing if session is None else f"{failing} as {self._kms.role_arn}",
                tenant=tenant,
                session=session,
                KeyId=key,
                EncryptionContext=_context(tenant, self._purpose),
                **arguments,
            )
        except KmsError as error:
            request_id.set(error.request_id)
            if isinstance(error, CredentialExpiredError):
                self._session = None
            raise
        request_id.set(answer.get("ResponseMetadata", {}).get("RequestId"))
        secret = answer.get(result)
        if not isinstance(secret, bytes):
            raise KmsRefusedError(
                f"{failing}: its answer holds no {result}. Check the endpoint and the proxies of the profile.",
                tenant=tenant,
                action_by="operator",
            )
        return secret

    def _role_session(self, tenant: str) -> Session | None:
        if self._kms.role_arn is None:
            return None
        with self._lock:  # of this client only, whose calls would all wait for the same session
            if self._session is not None:
                owner, session, until = self._session
                if owner == tenant and monotonic() < until:
                    return session
            sent = monotonic()
            session = self._assume(tenant)
            self._session = tenant, session, sent + _SESSION_SECONDS - _MARGIN
            return session

    def _assume(self, tenant: str) -> Session:
        role, external_id = self._kms.role_arn, self._kms.external_id
        failing = (
            f"AWS STS did not let us assume {role} with external id {external_id!r} for tenant {tenant!r}"
        )
        answer = self._connection.call(
            _STS,
            "assume_role",
            failing,
            tenant=tenant,
            RoleArn=role,
            RoleSessionName=_session_name(self._reason, tenant),
            ExternalId=external_id,
            DurationSeconds=_SESSION_SECONDS,
        )
        given: dict[str, str] = answer.get("Credentials") or {}
        parts = [given.get(name, "") for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")]
        if not all(parts):
            raise KmsRefusedError(
                f"{failing}: its answer holds no credentials. Check the endpoint and the proxies of the profile.",
                tenant=tenant,
                action_by="operator",
            )
        return Session(*parts)


def _session_name(reason: str, tenant: str) -> str:
    """What the customer reads in its CloudTrail: the only free text of ours there, with few characters allowed."""
    return re.sub(r"[^A-Za-z0-9_+=,.@-]", "-", f"sqla-byok-{reason}-{tenant}")[:64]


def _context(tenant: str, purpose: str) -> dict[str, str]:
    return {
        "sqla-byok:format": "1",
        "sqla-byok:purpose": purpose,
        "sqla-byok:tenant": tenant,
    }


_DISABLED = Meaning(KeyDisabledError, "customer", "the key is disabled", "The customer must enable it again.")
_DELETED = Meaning(
    KeyDeletedError,
    "customer",
    "the key is deleted or pending deletion",
    "The customer can cancel a deletion that is pending; a deleted key is gone, and the data with it.",
)
_UNKNOWN_KEY = Meaning(
    KeyDeletedError, "customer", "there is no such key", "The customer must check the ARN, or has deleted it."
)
_UNUSABLE = Meaning(
    KeyDisabledError,
    "customer",
    "the key's state does not allow its use",
    "The customer must import its key material or connect its key store.",
)
_DENIED = Meaning(
    AccessDeniedError,
    "customer",
    "access is denied",
    "The customer must allow our principal kms:Encrypt and kms:Decrypt in the key's policy.",
)
_DENIED_TO_US = Meaning(
    AccessDeniedError,
    "operator",
    "access is denied by a policy of our own account",
    "Allow kms:Encrypt and kms:Decrypt on the key in our IAM policies.",
)
_DENIED_BY_ENDPOINT = Meaning(
    AccessDeniedError,
    "operator",
    "access is denied by the policy of our VPC endpoint",
    "Allow kms:Encrypt, kms:Decrypt and sts:AssumeRole there.",
)
_DENIED_TO_ROLE = Meaning(
    AccessDeniedError,
    "customer",
    "access is denied to the role",
    "The customer must allow it kms:Encrypt and kms:Decrypt, in the role's policy or in the key's.",
)
_SESSION_REVOKED = Meaning(
    AccessDeniedError,
    "customer",
    "the role's session is no longer valid",
    "The customer has deleted the role, or must check it.",
)
_SESSION_EXPIRED = Meaning(
    CredentialExpiredError,
    "operator",
    "the role's session has expired",
    "Check the clock of this machine: a session is used for 14 minutes only.",
)
_WRONG_KEY = Meaning(
    WrongKeyError,
    "operator",
    "the wrapped key is damaged, another tenant's or another key's",
    "Check which key and which keystore row belong to the tenant.",
)
_WRONG_KIND = Meaning(
    KmsRefusedError,
    "customer",
    "the key cannot encrypt and decrypt symmetrically",
    "The customer must give us a key with KeySpec SYMMETRIC_DEFAULT and KeyUsage ENCRYPT_DECRYPT.",
)
_WRONG_SIZE = NOT_ACCEPTED._replace(todo="Check the size of the payload.")
_FAULT = Meaning(KmsUnavailableError, "operator", "it has a fault of its own", "Try again later.")

_MEANINGS: dict[str, Meaning] = {
    "DisabledException": _DISABLED,
    "KMSInvalidStateException": _UNUSABLE,
    "NotFoundException": _UNKNOWN_KEY,
    "AccessDenied": _DENIED,
    "AccessDeniedException": _DENIED,
    "InvalidCiphertextException": _WRONG_KEY,
    "IncorrectKeyException": _WRONG_KEY,
    "InvalidKeyUsageException": _WRONG_KIND,
    "ValidationException": _WRONG_SIZE,
    "ParamValidationError": _WRONG_SIZE,
    "DependencyTimeoutException": _FAULT,
    "KMSInternalException": _FAULT,
    "KeyUnavailableException": _FAULT,
}

# Where the request was signed by the customer's role, these are about that session and not about our credential.
_MEANINGS_BY_ROLE: dict[str, Meaning] = {
    **_MEANINGS,
    "AccessDenied": _DENIED_TO_ROLE,
    "AccessDeniedException": _DENIED_TO_ROLE,
    "ExpiredToken": _SESSION_EXPIRED,
    "ExpiredTokenException": _SESSION_EXPIRED,
    "InvalidClientTokenId": _SESSION_REVOKED,
    "UnrecognizedClientException": _SESSION_REVOKED,
}

# How AWS names a policy of the caller's side in an AccessDeniedException:
# https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
_ENDPOINT_POLICY = "VPC endpoint polic"
_OUR_POLICIES = (
    "identity-based polic",
    "permissions boundar",
    "service control polic",
    "session polic",
    _ENDPOINT_POLICY,
)


def _of_state(meaning: Meaning | None, message: str) -> Meaning | None:
    return _DELETED if meaning in (_DISABLED, _UNUSABLE) and "deletion" in message else meaning


def _of_kms(code: str, message: str) -> Meaning | None:
    meaning = _MEANINGS.get(code)
    if meaning is _DENIED and any(policy in message for policy in _OUR_POLICIES):
        return _DENIED_TO_US
    return _of_state(meaning, message)


def _of_kms_by_role(code: str, message: str) -> Meaning | None:
    meaning = _MEANINGS_BY_ROLE.get(code)
    if meaning is _DENIED_TO_ROLE and _ENDPOINT_POLICY in message:
        return _DENIED_BY_ENDPOINT
    return _of_state(meaning, message)


_NOT_TRUSTED = Meaning(
    AccessDeniedError,
    "customer",
    "access is denied, which is also AWS's answer for a role that is gone",
    "The role's trust policy must allow our principal sts:AssumeRole with this external id; if it does, our own IAM "
    "policies must allow us sts:AssumeRole on the role.",
)
_NOT_ALLOWED_TO_ASSUME = Meaning(
    AccessDeniedError,
    "operator",
    "access is denied by a policy of our own account",
    "Allow sts:AssumeRole on the role in our IAM policies.",
)
_REGION_OFF = Meaning(
    KmsRefusedError,
    "customer",
    "STS is switched off in this region for the role's account",
    "The customer must activate STS for the key's region in its IAM account settings.",
)


def _of_sts(code: str, message: str) -> Meaning | None:
    if code in ("AccessDenied", "AccessDeniedException"):
        ours = any(policy in message for policy in _OUR_POLICIES)
        return _NOT_ALLOWED_TO_ASSUME if ours else _NOT_TRUSTED
    return _REGION_OFF if code == "RegionDisabledException" else None


_KMS = Api("kms", _of_kms)
_KMS_BY_ROLE = Api("kms", _of_kms_by_role)
_STS = Api("sts", _of_sts)
