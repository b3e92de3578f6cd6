"""References to secrets: what the keystore holds in their place, and how they are resolved."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

from sqla_byok.errors import (
    ByokError,
    ConfigurationError,
    CredentialInvalidError,
    KmsUnavailableError,
)
from sqla_byok.kms.aws_api import Api, Meaning, connection
from sqla_byok.kms.profiles import Profile

__all__ = ["SecretStore", "Secrets", "WritableSecretStore"]

_SCHEME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_BUILT_IN = ("env", "file", "aws-sm")
_TENANT = "{tenant}"
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_MOST = 65_536  # bytes; the longest secret of AWS Secrets Manager
_SECRET_ARN = re.compile(
    r"arn:aws(?:-[a-z]+)*:secretsmanager:(?P<region>[a-z]{2,5}(?:-[a-z]+){1,2}-[0-9]{1,2}):[0-9]{12}:secret:"
    r"[A-Za-z0-9/_+=.@-]{1,519}"
)
_SECRET_NAME = re.compile(r"[A-Za-z0-9/_+=.@-]{1,512}")


class SecretStore(Protocol):
    """A place of the operator's own for secrets, registered as ``Byok(secret_stores={"vault": store})``.

    Its references are ``vault:<name>``. A store that can write, for a set-up page of the operator's, has also a method
    ``write(name, secret)``.
    """

    def read(self, name: str) -> str | None:
        """The secret, or None where there is none of that name.

        An ``OSError``, as network clients raise it, is taken for "no answer": the tenant's keys may be served on for
        its ``outage_grace``. One of our exceptions is passed on. Anything else is a "no".
        """
        ...


@runtime_checkable
class WritableSecretStore(SecretStore, Protocol):
    """A :class:`SecretStore` that can be written to."""

    def write(self, name: str, secret: str) -> None:
        """Store the secret under that name, in place of one that is there."""
        ...


class _Prefix(NamedTuple):
    """What a reference may begin with, or all of it where the prefix ends with the tenant."""

    scheme: str
    parts: tuple[str, ...]  # between them stands the tenant

    @property
    def is_exact(self) -> bool:
        return self.parts[-1] == ""

    def text(self, tenant: str) -> str:
        return tenant.join(self.parts)

    def fits(self, tenant: str) -> bool:
        """Whether no other tenant's names can begin with this tenant's prefix.

        Under ``byok/{tenant}/`` a tenant ``a`` would reach what is of a tenant ``a/b``. So a tenant whose id has the
        character that ends it cannot use the prefix.
        """
        return all(part[:1] not in tenant for part in self.parts[1:] if part)


class Secrets:
    """Resolves references such as ``env:BYOK_ORG42_SECRET`` under the prefixes that the operator allows.

    A reference is ``<scheme>:<name>``:

    ========== =========================================================================================
    scheme     name
    ========== =========================================================================================
    ``env``    an environment variable
    ``file``   an absolute path
    ``aws-sm`` a secret in AWS Secrets Manager: its name, in the region of boto3's default chain, or ARN
    other      whatever the store takes that the operator registered under that name
    ========== =========================================================================================

    :param prefixes: what references may begin with, such as ``"env:BYOK_"`` or ``"file:/run/secrets/byok/{tenant}/"``;
        none unless given, so nothing resolves. ``{tenant}`` stands for the tenant's id and binds the secret to it: at
        the end of a prefix, the reference must end there too; elsewhere, the character after it must not be in the id.
        A prefix of ``file`` is a directory, with its ``/`` at the end.
    :param stores: the operator's own stores by scheme.
    :param settings: the profile for AWS Secrets Manager.
    :raises ConfigurationError: a prefix allows everything of its scheme or is of none that is known, or a store's name
        is not a scheme's, or taken.

    Example::

        secrets = Secrets(["env:BYOK_{tenant}_"])
        secrets.resolve("env:BYOK_org42_SECRET", "org42")
    """

    def __init__(
        self,
        prefixes: Sequence[str] = (),
        stores: Mapping[str, SecretStore] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._stores = dict(stores or {})
        for name in self._stores:
            if not _SCHEME.fullmatch(name) or name in _BUILT_IN:
                raise ConfigurationError(
                    f"{name!r} cannot name a secret store: lower-case letters, digits and - are allowed, "
                    f"and {', '.join(_BUILT_IN)} are taken."
                )
        if isinstance(prefixes, str):
            raise ConfigurationError("secret_prefixes is a list of prefixes, not one text.")
        self._prefixes = tuple(self._parse(prefix) for prefix in prefixes)
        self._profile = Profile.parse(settings or {})

    def _parse(self, prefix: str) -> _Prefix:
        scheme, _, rest = prefix.partition(":")
        if scheme not in _BUILT_IN and scheme not in self._stores:
            raise ConfigurationError(
                f"The secret prefix {prefix!r} has no known scheme; known are {self._schemes()}."
            )
        if not (rest.replace(_TENANT, "").strip("/") if scheme in _BUILT_IN else rest):
            raise ConfigurationError(
                f"The secret prefix {prefix!r} would allow everything there; it must say more."
            )
        if scheme == "file" and not (rest.startswith("/") and rest.endswith("/") and _is_normal(rest[:-1])):
            raise ConfigurationError(
                f"The secret prefix {prefix!r} must be the absolute path of a directory, with / at its end."
            )
        return _Prefix(scheme, tuple(rest.split(_TENANT)))

    def _schemes(self) -> str:
        return ", ".join([*_BUILT_IN, *sorted(self._stores)])

    def check(self, reference: str, tenant: str) -> None:
        """Refuse what is not a reference that this tenant may use. Does not read the secret.

        :raises ConfigurationError: it is not ``<scheme>:<name>``, or under none of the operator's prefixes, or a file
            whose links lead out of there. The message does not repeat it: it may be a secret by mistake.
        """
        self._parts(reference, tenant)

    def resolve(self, reference: str, tenant: str) -> str:
        """The secret, without the newline at its end.

        :raises ConfigurationError: as :meth:`check`.
        :raises CredentialInvalidError: there is no such secret, or we cannot read it (``action_by="operator"``).
        :raises KmsNoAnswerError: its store does not answer.
        """
        scheme, name = self._parts(reference, tenant)
        if scheme == "env":
            secret = os.environ.get(name)
        elif scheme == "file":
            secret = self._read_file(name, reference, tenant)
        elif scheme == "aws-sm":
            secret = self._read_aws(name, reference, tenant)
        else:
            secret = self._read_store(scheme, name, reference, tenant)
        secret = re.sub(r"\r?\n\Z", "", secret or "")
        if not secret:
            _raise_invalid(reference, tenant, "there is no such secret, or it is empty")
        return secret

    def write(self, reference: str, secret: str, tenant: str) -> None:
        """Store a secret, where the reference's store can.

        :raises ConfigurationError: as :meth:`check`, or the store cannot write: ``env``, ``file`` and ``aws-sm``
            never do.
        :raises CredentialInvalidError: the store refused (``action_by="operator"``).
        :raises KmsNoAnswerError: the store does not answer.
        """
        scheme, name = self._parts(reference, tenant)
        store = self._stores.get(scheme)
        if not isinstance(store, WritableSecretStore):
            raise ConfigurationError(
                f"Secrets under {scheme}: are only read here. Write it where it is kept, or register a store with "
                "a method write(name, secret).",
                tenant=tenant,
            )
        try:
            store.write(name, secret)
            return
        except Exception as error:  # noqa: BLE001 - somebody else's code
            failure = _translate(error, "write", reference, tenant)
        raise failure  # here, so that nothing is chained that may show the secret

    # References

    def _parts(self, reference: object, tenant: str) -> tuple[str, str]:
        """The scheme and the name of a reference that the tenant may use; of a file, the path without links."""
        scheme, _, name = reference.partition(":") if isinstance(reference, str) else ("", "", "")
        if (scheme not in _BUILT_IN and scheme not in self._stores) or not name or not name.isprintable():
            raise ConfigurationError(
                "This is not a reference to a secret. Give the place where it is kept, <scheme>:<name> with one of "
                f"{self._schemes()}, never the secret itself.",
                tenant=tenant,
            )
        fitting = [prefix for prefix in self._prefixes if prefix.scheme == scheme and prefix.fits(tenant)]
        for prefix in fitting:
            allowed = prefix.text(tenant)
            if name == allowed if prefix.is_exact else name.startswith(allowed):
                return scheme, self._real_path(name, allowed, tenant) if scheme == "file" else name
        raise ConfigurationError(
            f"Tenant {tenant!r} may not use this reference to a secret: it is under none of the prefixes that the "
            f"operator allows for {scheme}:, which are {self._allowed(scheme)} (secret_prefixes).",
            tenant=tenant,
        )

    def _allowed(self, scheme: str) -> str:
        texts = [f"{scheme}:{_TENANT.join(each.parts)}" for each in self._prefixes if each.scheme == scheme]
        return ", ".join(texts) or "none"

    def _real_path(self, name: str, folder: str, tenant: str) -> str:
        # The folder holds the tenant's id by now, which may be "..": then the name is not normal either.
        root, path = os.path.realpath(folder), os.path.realpath(name)
        if _is_normal(name) and path.startswith(root + "/"):
            return path
        raise ConfigurationError(
            f"Tenant {tenant!r} may not use this reference to a secret: the file is not in the directory that the "
            "operator allows, or is reached by .., // or a link that leads out of it.",
            tenant=tenant,
        )

    # Places

    def _read_file(self, path: str, reference: str, tenant: str) -> str:
        content, reason = _read_regular(path)
        if content is None:
            _raise_invalid(reference, tenant, reason)
        return content

    def _read_aws(self, name: str, reference: str, tenant: str) -> str | None:
        arn = _SECRET_ARN.fullmatch(name)
        if arn is None and _SECRET_NAME.fullmatch(name) is None:
            _raise_invalid(reference, tenant, "this is neither the name nor the ARN of a secret")
        answer = connection(arn["region"] if arn else None, self._profile).call(
            _AWS,
            "get_secret_value",
            f"AWS Secrets Manager did not read {reference} for tenant {tenant!r}",
            tenant=tenant,
            SecretId=name,
        )
        return answer.get("SecretString")

    def _read_store(self, scheme: str, name: str, reference: str, tenant: str) -> str | None:
        try:
            secret: object = self._stores[scheme].read(name)
        except Exception as error:  # noqa: BLE001 - somebody else's code
            failure = _translate(error, "read", reference, tenant)
        else:
            if secret is None or isinstance(secret, str):
                return secret
            failure = CredentialInvalidError(
                f"The secret {reference} for tenant {tenant!r} is not a text but a {type(secret).__name__}.",
                tenant=tenant,
                action_by="operator",
            )
        raise failure  # here, so that nothing is chained that may show the secret


def _is_normal(path: str) -> bool:
    return os.path.normpath(path) == path and not path.startswith("//")


def _read_regular(path: str) -> tuple[str | None, str]:
    """The text of a file, or None and why not."""
    try:
        # Without waiting, should it be a pipe; links were followed before, and the result was checked.
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None, "it is not a regular file"
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(_MOST + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        return None, f"the file cannot be read ({type(error).__name__})"
    if len(content) > _MOST:
        return None, f"the file has more than {_MOST:,} bytes"
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError:
        return None, "the file is not text in UTF-8"


def _raise_invalid(reference: str, tenant: str, reason: str) -> NoReturn:
    raise CredentialInvalidError(
        f"The secret {reference} for tenant {tenant!r} cannot be used: {reason}. "
        "Put it there, readable for this process.",
        tenant=tenant,
        action_by="operator",
    )


def _translate(error: Exception, operation: str, reference: str, tenant: str) -> ByokError:
    if isinstance(error, ByokError):
        error.__cause__ = error.__context__ = None
        return error
    kind: type[CredentialInvalidError | KmsUnavailableError] = (
        KmsUnavailableError if isinstance(error, OSError) else CredentialInvalidError
    )
    return kind(
        f"The store of {reference} did not {operation} the secret for tenant {tenant!r} ({type(error).__name__}). "
        "Look into its own log.",
        tenant=tenant,
        action_by="operator",
    )


_AWS_MISSING = Meaning(
    CredentialInvalidError, "operator", "there is no such secret, or it is being deleted", "Put it there."
)
_AWS_DENIED = Meaning(
    CredentialInvalidError,
    "operator",
    "access is denied",
    "Allow our principal secretsmanager:GetSecretValue on it, and the use of the KMS key it is stored under.",
)


def _of_aws(code: str, message: str) -> Meaning | None:
    if code == "ResourceNotFoundException" or (code == "InvalidRequestException" and "delet" in message):
        return _AWS_MISSING
    return _AWS_DENIED if code in ("AccessDenied", "AccessDeniedException", "DecryptionFailure") else None


_AWS = Api("secretsmanager", _of_aws)
