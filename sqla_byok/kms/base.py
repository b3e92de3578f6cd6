"""What a customer key is to the rest of the library: the two protocols that every provider implements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Kms", "KmsClient", "Wrapped"]


class Wrapped(NamedTuple):
    """A payload under a customer key, as the keystore stores it.

    :param blob: the ciphertext, as the provider returned it.
    :param key_version: the version of the customer key that wrapped, which alone can unwrap; ``""`` where
        the provider keeps that to itself.
    """

    blob: bytes
    key_version: str = ""


class KmsClient(Protocol):
    """Calls one customer key. Safe to use from several threads; each method is one call to the provider.

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


class Kms(Protocol):
    """A description of one customer key: a small frozen value without secrets, which does no I/O.

    The keystore stores ``provider`` and :meth:`config`; :meth:`from_config` makes an equal value of them in
    another process, and :meth:`connect` the client that calls the provider::

        kms = AwsKms("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
        client = kms.connect({"read_timeout": 2.0})
        wrapped = client.wrap(payload, tenant="org-42")
    """

    provider: ClassVar[str]

    @property
    def profile(self) -> str:
        """The name of the operator's settings for this key; the settings themselves stand in code only."""
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

    def connect(self, settings: Mapping[str, Any]) -> KmsClient:
        """A client for this key. Makes no call to the provider.

        :param settings: the operator's profile from code (endpoints, timeouts), never from the keystore.
        :raises ConfigurationError: a setting is unknown or has the wrong type.
        :raises MissingExtraError: the provider's SDK is not installed.
        """
        ...
