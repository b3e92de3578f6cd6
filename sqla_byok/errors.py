"""Every exception that sqla_byok raises.

::

    ByokError
    ├── ConfigurationError            the program is set up wrongly
    │   ├── DeclarationError          a model or table cannot be declared like this
    │   ├── HashSpecChangedError      the stored search hashes were made in another way
    │   ├── NotAttachedError          the engine was not given to Byok.attach()
    │   └── MissingExtraError         an optional package is not installed
    ├── NoTenantError                 nobody said whose data this is
    ├── SealedError                   it needs keys, and runs sealed
    ├── UnknownTenantError            the tenant was never onboarded
    ├── TenantExistsError             the tenant was onboarded with another configuration
    ├── EncodeError                   a value does not fit its encrypted column
    ├── UnsupportedQueryError         the query would run on ciphertext
    ├── NotSearchableError            the tenant cannot be searched by this column
    ├── SettlingError                 what the model changes has to become known first: try again in seconds
    ├── DecryptError                  a stored value does not open
    │   ├── NotEncryptedError         it is not one of our values at all
    │   ├── TamperedError             it does not authenticate
    │   ├── TenantMismatchError       it belongs to another tenant
    │   └── UnknownDataKeyError       its data key is not in this tenant's keyring
    ├── KeysExpiredError              the keys' time ran out while rows were read
    ├── KeystoreError                 the keystore cannot be used
    │   ├── KeystoreUnavailableError  it does not answer
    │   ├── KeystoreTamperedError     a row does not authenticate
    │   ├── KeystoreRolledBackError   an old state was put back
    │   ├── KeystoreConflictError     somebody else changed the tenant at the same time
    │   └── SaltChangedError          the search salt kept elsewhere is not the recorded one
    └── KmsError                      the customer's KMS did not do what was asked
        ├── KmsRefusedError           "no": the keyring is dropped at once
        │   ├── KeyDisabledError
        │   ├── KeyDeletedError       deleted, or pending deletion
        │   ├── AccessDeniedError
        │   ├── CredentialExpiredError
        │   ├── CredentialInvalidError
        │   └── WrongKeyError         the wrapped key is not this key's
        └── KmsNoAnswerError          "no answer": worth another try
            ├── ThrottledError
            ├── KmsUnavailableError
            └── KmsBlockedError       a firewall on our side

Every one derives from :class:`sqlalchemy.exc.DontWrapMixin`, so SQLAlchemy passes it on as it is and does
not put it into a ``StatementError`` that would print the parameters in the clear. Every one survives
pickling with its attributes, as task queues need. None carries a value, key, salt or secret.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.exc import DontWrapMixin

__all__ = [
    "AccessDeniedError",
    "ByokError",
    "ConfigurationError",
    "CredentialExpiredError",
    "CredentialInvalidError",
    "DeclarationError",
    "DecryptError",
    "EncodeError",
    "HashSpecChangedError",
    "KeyDeletedError",
    "KeyDisabledError",
    "KeysExpiredError",
    "KeystoreConflictError",
    "KeystoreError",
    "KeystoreRolledBackError",
    "KeystoreTamperedError",
    "KeystoreUnavailableError",
    "KmsBlockedError",
    "KmsError",
    "KmsNoAnswerError",
    "KmsRefusedError",
    "KmsUnavailableError",
    "MissingExtraError",
    "NoTenantError",
    "NotAttachedError",
    "NotEncryptedError",
    "NotSearchableError",
    "SaltChangedError",
    "SealedError",
    "SettlingError",
    "TamperedError",
    "TenantExistsError",
    "TenantMismatchError",
    "ThrottledError",
    "UnknownDataKeyError",
    "UnknownTenantError",
    "UnsupportedQueryError",
    "WrongKeyError",
]


class ByokError(DontWrapMixin, Exception):
    """The base of all errors of this library.

    :param message: what happened and what to do about it; never a value, key, salt or secret.
    :param tenant: the tenant concerned, where there is one.
    :param column: the id of the column concerned, where there is one.
    """

    def __init__(self, message: str, *, tenant: str | None = None, column: str | None = None) -> None:
        super().__init__(message)
        self.tenant = tenant
        self.column = column

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[ByokError], args: tuple[Any, ...], state: dict[str, Any]) -> ByokError:
    # Not by cls(*args): a subclass may take other arguments. The built-in base sets what it keeps beside, such as
    # ImportError.msg.
    error = cls.__new__(cls, *args)
    super(ByokError, error).__init__(*args)
    error.__dict__.update(state)
    return error


class ConfigurationError(ByokError):
    """The program is set up wrongly; no retry will help."""


class DeclarationError(ConfigurationError):
    """A model or table cannot be declared like this: the database would work on ciphertext."""


class HashSpecChangedError(ConfigurationError):
    """The model hashes a column in another way than its stored hashes were made: re-hash it. Nothing was written."""


class NotAttachedError(ConfigurationError):
    """The statement's engine was not given to :meth:`sqla_byok.Byok.attach`. Nothing was written."""


class MissingExtraError(ConfigurationError, ImportError):
    """An optional package is missing; the message names the extra to install."""


class NoTenantError(ByokError):
    """A statement with encrypted values ran with no tenant set."""


class SealedError(ByokError):
    """What was asked takes a tenant's keys, and runs sealed, without any: a search, or a new encrypted value."""


class UnknownTenantError(ByokError):
    """The tenant is not in the keystore."""


class TenantExistsError(ByokError):
    """The tenant is in the keystore with another configuration; onboarding never overwrites."""


class EncodeError(ByokError):
    """A value does not fit its encrypted column: wrong type, too long, out of range. Nothing was written."""


class UnsupportedQueryError(ByokError):
    """The query would compare, sort or compute on ciphertext; the message says what to do instead."""


class NotSearchableError(ByokError):
    """The tenant has not enabled the search of a column, or the column's rows are yet to be hashed.

    :ivar progress: how many rows the job has looked at that hashes them, and of how many; None where there is none.
    """

    def __init__(
        self,
        message: str,
        *,
        tenant: str | None = None,
        column: str | None = None,
        progress: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message, tenant=tenant, column=column)
        self.progress = progress


class SettlingError(ByokError):
    """What the model changes has to become known to every process first. Nothing was written; try again.

    :ivar retryable: always true.
    :ivar retry_after: in how many seconds at most it has settled.
    """

    retryable = True
    retry_after = 21.0


class DecryptError(ByokError):
    """A stored value does not open."""


class NotEncryptedError(DecryptError):
    """The stored value is not one of ours: plaintext from before a migration, or another program's."""


class TamperedError(DecryptError):
    """The stored value does not authenticate: altered, or moved from another column or row."""


class TenantMismatchError(DecryptError):
    """The stored value, or the running statement, belongs to another tenant.

    :param owner: the tenant to whom the value belongs.
    """

    def __init__(
        self,
        message: str,
        *,
        tenant: str | None = None,
        column: str | None = None,
        owner: str | None = None,
    ) -> None:
        super().__init__(message, tenant=tenant, column=column)
        self.owner = owner


class UnknownDataKeyError(DecryptError):
    """The stored value was sealed under a data key that is not in the tenant's keyring."""


class KeysExpiredError(ByokError):
    """The keys' deadline passed, or they were forgotten, while a result was still being read."""


class KeystoreError(ByokError):
    """The keystore cannot be used."""


class KeystoreUnavailableError(KeystoreError):
    """The keystore's database does not answer, or has no tables yet."""


class KeystoreTamperedError(KeystoreError):
    """A keystore row does not authenticate. Nothing of it was used."""


class KeystoreRolledBackError(KeystoreError):
    """The keystore shows an older state than this process has already seen."""


class KeystoreConflictError(KeystoreError):
    """Another process changed the tenant's keys at the same time. Nothing was changed here; do it again."""


class SaltChangedError(KeystoreError):
    """The search salt that is kept outside the keystore is missing, or not the one that the hashes were made with."""


class KmsError(ByokError):
    """The customer's KMS did not do what was asked.

    :param action_by: who must act, ``"customer"`` or ``"operator"`` (us); the class's own unless given.
    :param retry_after: seconds to wait before the next try, where the provider said.
    :param request_id: what the provider called the request, where it said.
    :ivar retryable: whether the same call may succeed later without anybody changing anything.
    """

    retryable: bool = False
    action_by: Literal["customer", "operator"] = "customer"

    def __init__(
        self,
        message: str,
        *,
        tenant: str | None = None,
        column: str | None = None,
        action_by: Literal["customer", "operator"] | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, tenant=tenant, column=column)
        if action_by is not None:
            self.action_by = action_by
        self.retry_after = retry_after
        self.request_id = request_id


class KmsRefusedError(KmsError):
    """The KMS said "no". The tenant's keys are dropped at once."""


class KeyDisabledError(KmsRefusedError):
    """The customer key is disabled."""


class KeyDeletedError(KmsRefusedError):
    """The customer key is deleted, pending deletion, or was never there."""


class AccessDeniedError(KmsRefusedError):
    """The key's policy does not allow us the operation."""


class CredentialExpiredError(KmsRefusedError):
    """The credential with which we call the KMS has expired."""


class CredentialInvalidError(KmsRefusedError):
    """The credential with which we call the KMS is missing or wrong."""


class WrongKeyError(KmsRefusedError):
    """The wrapped tenant key is not this key's, is not this tenant's, or is damaged."""

    action_by = "operator"


class KmsNoAnswerError(KmsError):
    """The KMS did not answer. Nothing is known about the key; the call may be tried again."""

    retryable = True
    action_by = "operator"


class ThrottledError(KmsNoAnswerError):
    """The KMS is over its quota."""


class KmsUnavailableError(KmsNoAnswerError):
    """The KMS timed out, broke the connection, or reported a fault of its own."""


class KmsBlockedError(KmsNoAnswerError):
    """A firewall or network rule keeps us from the KMS."""
