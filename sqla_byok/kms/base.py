"""What a customer key is to the rest of the library: the two protocols that every provider implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from sqla_byok.kms.secrets import Secrets

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Kms", "KmsClient", "Operator", "Salts", "SaltsClient", "Wrapped", "request_id"]

request_id: ContextVar[str | None] = ContextVar("byok_kms_request_id", default=None)
"""What the provider called the last call of this thread or task, for the audit; a client sets it after each call."""


class Wrapped(NamedTuple):
    """A payload under a customer key, as the keystore stores it.

    :param blob: the ciphertext, as the provider returned it.
    :param key_version: the version of the customer key that wrapped, which alone can unwrap; ``""`` where
        the provider keeps that to itself.
    """

    blob: bytes
    key_version: str = ""


@dataclass(frozen=True, repr=False)
class Operator:
    """What the operator gives to KMS clients beside a profile's settings: from code only, like those.

    :param secrets: resolves references to secrets.
    :param credentials: factories by name; each takes the customer's directory id and returns a credential object of
        the provider's SDK.
    """

    secrets: Secrets = field(default_factory=Secrets)
    credentials: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


class KmsClient(Protocol):
    """Calls one customer key. Safe to use from several threads; each method is one call to the provider.

    A client is made for one purpose, such as opening a tenant, and authenticates anew: what it keeps of tokens and
    sessions lives no longer than itself, so that a credential that was taken away is noticed by the next client.

    Both methods raise a subclass of :class:`~sqla_byok.errors.KmsRefusedError` for "no" and of
    :class:`~sqla_byok.errors.KmsNoAnswerError` for "no answer", with ``tenant`` set. A "no answer" whose
    ``retryable`` is false (an unknown host, a failed TLS handshake) is one that time alone will not mend.
    """

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        """Encrypt *payload* under the customer key, bound to *tenant*.

        :param payload: the bytes to protect; every provider takes 1 to 190.
        :param tenant: the tenant id, in NFC, 1 to 255 bytes of UTF-8.
        :return: what :meth:`unwrap` needs to get the payload back.
        """
        ...

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        """Decrypt what :meth:`wrap` returned.

        :param wrapped: the blob and the key version that came with it.
        :param tenant: the tenant for whom it was wrapped.
        :return: the payload.
        """
        ...

    def room(self, wrapped: Wrapped) -> int:
        """How many bytes :meth:`wrap` takes under the key that made *wrapped*. Makes no call."""
        ...


class Kms(Protocol):
    """A description of one customer key: a small frozen value without secrets, which does no I/O.

    A provider derives from this class, and has what it does not define itself.

    The keystore stores ``provider`` and :meth:`config`; :meth:`from_config` makes an equal value of them in
    another process, and :meth:`connect` the client that calls the provider::

        kms = AwsKms("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
        client = kms.connect({"read_timeout": 2.0})
        wrapped = client.wrap(payload, tenant="org-42")
    """

    provider: ClassVar[str]
    outbound: ClassVar[bool] = True
    """Whether its clients call out of this process: then a keystore key must protect the rows that say where."""

    @property
    def profile(self) -> str:
        """The name of the operator's settings for this key; the settings themselves stand in code only."""
        return "default"

    def config(self) -> dict[str, str]:
        """What the keystore stores: enough for :meth:`from_config`, never a secret."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The description that *config* came from.

        :raises ConfigurationError: *config* is not what :meth:`config` returns.
        """
        ...

    def claims(self) -> Sequence[str]:
        """What of it may belong to one tenant only: the key, the role, the secret's reference, each as a text."""
        return ()

    def for_tenant(self, external_id: str) -> Self:
        """The same key, as onboarding stores it for a tenant whose external id is *external_id*."""
        return self

    def expires(self) -> date | None:
        """The day on which the credential for this key expires, where it is known."""
        return None

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> KmsClient:
        """A client for this key. Makes no call to the provider.

        :param settings: the operator's profile from code (endpoints, timeouts), never from the keystore.
        :param operator: secrets and credentials; none of either unless given.
        :param reason: why the key is called: ``onboard``, ``open``, ``refresh``, ``probe``, ``rewrap``, ``direct``.
            Providers that can show it in the customer's own log do.
        :raises ConfigurationError: a setting is unknown or has the wrong type.
        :raises MissingExtraError: the provider's SDK is not installed.
        """
        ...


class SaltsClient(Protocol):
    """Reads and makes the texts of one tenant's search salts, outside the keystore. Safe to use from several threads.

    Both methods raise :class:`~sqla_byok.errors.SaltChangedError` where a salt is gone or has not the form that it
    was stored in, and otherwise what :class:`KmsClient` raises, without ``tenant``.
    """

    def read(self, name: str) -> str:
        """The text of the salt that :meth:`Salts.name` names."""
        ...

    def create(self, name: str, text: str) -> str:
        """Store *text* under *name* unless there is something already, and return what is there now."""
        ...


class Salts(Protocol):
    """A description of where a tenant's search salts are kept: a small frozen value without secrets, as :class:`Kms`.

    ``format`` says what is stored there: ``"sealed"``, the salt's sealed record in base64, or ``"raw"``, the salt.
    """

    provider: ClassVar[str]

    @property
    def profile(self) -> str:
        """The name of the operator's settings for it."""
        ...

    @property
    def format(self) -> str:
        """``"sealed"`` or ``"raw"``."""
        ...

    def config(self) -> dict[str, str]:
        """What the keystore stores: enough for :meth:`from_config`, never a secret."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The description that *config* came from.

        :raises ConfigurationError: *config* is not what :meth:`config` returns.
        """
        ...

    def claims(self) -> Sequence[str]:
        """What of it may belong to one tenant only, each as a text."""
        ...

    def name(self, generation: int) -> str:
        """Under which name the salt of a generation is kept."""
        ...

    def connect(self, settings: Mapping[str, Any], operator: Operator | None = None) -> SaltsClient:
        """A client for it. Makes no call.

        :raises ConfigurationError: a setting is unknown or has the wrong type.
        :raises MissingExtraError: the provider's SDK is not installed.
        """
        ...
