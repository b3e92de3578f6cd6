"""Search salts in AWS Secrets Manager.

The error table follows the "Errors" sections of
https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_GetSecretValue.html and
https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_CreateSecret.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sqla_byok.errors import AccessDeniedError, ConfigurationError, KmsUnavailableError, SaltChangedError
from sqla_byok.kms.aws_api import Api, Connection, Meaning, connection
from sqla_byok.kms.base import Operator, Salts
from sqla_byok.kms.profiles import Profile

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AwsSecretsManagerSalts"]

_NAME = re.compile(r"[A-Za-z0-9/_+=.@-]{1,500}")  # AWS allows 512; the rest is for the generation
_REGION = re.compile(r"[a-z]{2,5}(?:-[a-z]+){1,2}-[0-9]{1,2}")

_FORMS = {
    "raw": (re.compile(r"[A-Za-z0-9]{32}"), "32 characters of A–Z a–z 0–9"),
    "sealed": (re.compile(r"[A-Za-z0-9+/]{83}="), "a sealed record of 62 bytes in base64"),
}


@dataclass(frozen=True)
class AwsSecretsManagerSalts(Salts):
    """One tenant's search salt in AWS Secrets Manager, for ``Byok.onboard(…, salts=…)``.

    Our principal needs ``secretsmanager:GetSecretValue`` and, to begin with and for each rotation of the salt,
    ``secretsmanager:CreateSecret``. The secret is created if it is absent.

    :param secret_id: the secret's name, 1 to 500 of ``A–Z a–z 0–9 / _ + = . @ -``. The first generation of the salt is
        kept under it, the n-th under ``<secret_id>-g<n>``.
    :param region: the AWS region.
    :param format: what the secret's text is. ``"sealed"``: the salt under the tenant key, so that the customer's "no"
        covers it. ``"raw"``: the salt itself, exactly 32 characters, for other programs that compute the same hashes;
        the customer's "no" does not reach those who can read the secret.
    :param profile: which of the operator's settings to use.
    :raises ConfigurationError: one of them is none of these.

    Example::

        AwsSecretsManagerSalts("byok/org-42/salt", region="eu-central-1")
    """

    provider: ClassVar[str] = "aws-secretsmanager"
    secret_id: str
    region: str = field(kw_only=True)
    # A field is a property that nobody can set, as the class is frozen.
    format: Literal["sealed", "raw"] = field(  # pyright: ignore[reportIncompatibleMethodOverride]
        default="sealed", kw_only=True
    )
    profile: str = field(default="default", kw_only=True)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        if not _matches(_NAME, self.secret_id):
            raise ConfigurationError(
                "secret_id must be the name of a secret, 1 to 500 of A–Z a–z 0–9 / _ + = . @ -, not an ARN."
            )
        if not _matches(_REGION, self.region):
            raise ConfigurationError("region must be the name of an AWS region, such as eu-central-1.")
        if self.format not in _FORMS:
            raise ConfigurationError('The format of a salt is "sealed" or "raw".')
        if not _matches(re.compile(r".+"), self.profile):
            raise ConfigurationError("profile must be the name of one of the operator's settings.")

    def config(self) -> dict[str, str]:
        """``{"secret": <name>, "region": …, "format": …, "profile": <name>}``."""
        return {
            "secret": self.secret_id,
            "region": self.region,
            "format": self.format,
            "profile": self.profile,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The description that :meth:`config` came from.

        :raises ConfigurationError: *config* has other keys than :meth:`config` gives, or a bad value.
        """
        if set(config) != {"secret", "region", "format", "profile"}:
            raise ConfigurationError(
                'The configuration of AwsSecretsManagerSalts is {"secret", "region", "format", "profile"}.'
            )
        given: dict[str, Any] = {name: config[name] for name in ("region", "format", "profile")}
        return cls(config["secret"], **given)

    def claims(self) -> tuple[str, ...]:
        """The secret."""
        return (f"aws-salt:{self.region}:{self.secret_id}",)

    def name(self, generation: int) -> str:
        """The secret's name for a generation, which are counted from 1."""
        return self.secret_id if generation == 1 else f"{self.secret_id}-g{generation}"

    def connect(self, settings: Mapping[str, Any], operator: Operator | None = None) -> _SecretsClient:
        """A client for the secret. Makes no call.

        :param settings: see :class:`~sqla_byok.kms.profiles.Profile`.
        :raises ConfigurationError: a setting is unknown or has the wrong type.
        :raises MissingExtraError: boto3 is not installed.
        """
        return _SecretsClient(self, connection(self.region, Profile.parse(settings)))


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


class _SecretsClient:
    def __init__(self, salts: AwsSecretsManagerSalts, shared: Connection) -> None:
        self._salts = salts
        self._connection = shared

    def read(self, name: str) -> str:
        """See :meth:`sqla_byok.kms.base.SaltsClient.read`.

        Source: https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_GetSecretValue.html
        """
        answer = self._connection.call(
            _SECRETS, "get_secret_value", self._failing("read", name), SecretId=name
        )
        return self._checked(name, answer.get("SecretString"))

    def create(self, name: str, text: str) -> str:
        """See :meth:`sqla_byok.kms.base.SaltsClient.create`.

        Source: https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_CreateSecret.html
        """
        try:
            self._connection.call(
                _SECRETS,
                "create_secret",
                self._failing("create", name),
                Name=name,
                Description="A search salt of sqla-byok. Without it nothing is found; a changed one finds nothing.",
                SecretString=text,
            )
            return text
        except _IsThereError:
            pass
        # Another process was first, or it is an old one.
        return self.read(name)

    def _failing(self, operation: str, name: str) -> str:
        return f"AWS Secrets Manager did not {operation} the salt {name!r} in {self._salts.region}"

    def _checked(self, name: str, text: object) -> str:
        pattern, words = _FORMS[self._salts.format]
        if isinstance(text, str) and pattern.fullmatch(text):
            return text
        raise SaltChangedError(
            f"The secret {name!r} in {self._salts.region} is not {words}. "
            "Put back the version that hashes were made with, and check who writes it."
        )


class _IsThereError(SaltChangedError):
    """There is a secret of that name."""


_GONE = Meaning(
    SaltChangedError,
    "operator",
    "the salt is gone",
    "Restore the secret: hashes that were made with it cannot be searched or made without it.",
)
_DELETED = _GONE._replace(
    what="the salt is marked for deletion",
    todo="Restore the secret (aws secretsmanager restore-secret) before AWS deletes it for good.",
)
_IS_THERE = Meaning(_IsThereError, "operator", "there is one of that name", "Read it.")
_DENIED = Meaning(
    AccessDeniedError,
    "operator",
    "access is denied",
    "Allow our principal secretsmanager:GetSecretValue and secretsmanager:CreateSecret on it, and the use of the KMS "
    "key that it is stored under.",
)
_NOT_DECRYPTED = Meaning(
    AccessDeniedError,
    "operator",
    "the KMS key under which it is stored cannot be used",
    "Check the state and the policy of that key.",
)
_BUSY = Meaning(KmsUnavailableError, "operator", "it is being changed", "Try again later.")

_MEANINGS: dict[str, Meaning] = {
    "AccessDenied": _DENIED,
    "AccessDeniedException": _DENIED,
    "DecryptionFailure": _NOT_DECRYPTED,
    "EncryptionFailure": _NOT_DECRYPTED,
    "PreconditionNotMetException": _BUSY,
    "ResourceExistsException": _IS_THERE,
    "ResourceNotFoundException": _GONE,
}


def _of_secrets(code: str, message: str) -> Meaning | None:
    if code == "InvalidRequestException" and "delet" in message:
        return _DELETED
    return _MEANINGS.get(code)


_SECRETS = Api("secretsmanager", _of_secrets)
