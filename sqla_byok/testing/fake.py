"""A customer key in this process's memory, which a test can disable, slow down and count.

Importing this module makes the provider ``fake`` known. A program that does not import :mod:`sqla_byok.testing` knows
no such provider, so that no row of its keystore can name one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    KeyDeletedError,
    KeyDisabledError,
    KmsBlockedError,
    KmsError,
    KmsRefusedError,
    KmsUnavailableError,
    ThrottledError,
    WrongKeyError,
)
from sqla_byok.kms import providers
from sqla_byok.kms.base import Kms, Operator, Wrapped, request_id
from sqla_byok.kms.profiles import Profile

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FakeKms"]

_ROOM = 4096
_NONCE_SIZE = 12

_REASONS: dict[type[KmsError], str] = {
    KeyDisabledError: "the key is disabled. The customer must enable it again",
    KeyDeletedError: "the key is deleted or pending deletion. The customer can cancel a deletion that is pending",
    AccessDeniedError: "access is denied. The customer must allow us the key",
    ThrottledError: "the request quota is used up. Try again later",
    KmsUnavailableError: "there was no answer. Try again later",
    KmsBlockedError: "our firewall did not let us through. Check its rules",
}


@dataclass(frozen=True)
class FakeKms(Kms):
    """A customer key in memory, for tests: as fast as no key at all, and under the test's control.

    It gives and refuses what a real KMS does, with the same exceptions: a payload is bound to its tenant, a key has
    versions, a disabled key opens nothing. The state is this process's own and goes by the name: two values of one name
    are one key, in another process the same name is another key. It makes no outbound call, so a Byok needs no
    ``keystore_key`` for it.

    :param name: tells keys apart.
    :raises ConfigurationError: the name is empty or no text.

    Example::

        kms = FakeKms()
        byok.onboard("org-42", kms)
        kms.disable()                       # the customer says no
        byok.forget_keys()                  # or let the time run out
        with pytest.raises(KeyDisabledError), byok.tenant("org-42"):
            ...
        assert kms.calls == {"wrap": 1, "unwrap": 2}
    """

    provider: ClassVar[str] = "fake"
    outbound: ClassVar[bool] = False
    name: str = "fake"

    def __post_init__(self) -> None:
        if not _is_name(self.name):
            raise ConfigurationError("A FakeKms has a name, which tells it from others.")

    def config(self) -> dict[str, str]:
        """``{"name": …}``."""
        return {"name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The key that :meth:`config` described.

        :raises ConfigurationError: *config* has other keys than ``name``, or no text there.
        """
        if set(config) != {"name"}:
            raise ConfigurationError('The configuration of a FakeKms is {"name": <name>}.')
        return cls(config["name"])

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> _FakeClient:
        """A client for this key.

        :param settings: checked as real providers do, and not used.
        :raises ConfigurationError: a setting is unknown or has the wrong type.
        """
        Profile.parse(settings)
        return _FakeClient(self.name, self._key)

    # -- what the test sees ------------------------------------------------------------------------------------------

    @property
    def calls(self) -> Counter[str]:
        """How often the key was asked, refusals included: ``calls["wrap"]``, ``calls["unwrap"]``."""
        return Counter(operation for operation, _ in self._key.asked())

    def calls_for(self, tenant: str) -> Counter[str]:
        """:attr:`calls` for one tenant."""
        return Counter(operation for operation, asker in self._key.asked() if asker == tenant)

    # -- what the customer does --------------------------------------------------------------------------------------

    def disable(self) -> None:
        """Answer :class:`~sqla_byok.errors.KeyDisabledError` until :meth:`enable`."""
        self._key.state = KeyDisabledError

    def delete(self) -> None:
        """Answer :class:`~sqla_byok.errors.KeyDeletedError` until :meth:`enable`, which cancels the deletion."""
        self._key.state = KeyDeletedError

    def enable(self) -> None:
        """Undo :meth:`disable` and :meth:`delete`."""
        self._key.state = None

    def deny(self) -> None:
        """Answer :class:`~sqla_byok.errors.AccessDeniedError` until :meth:`allow`."""
        self._key.denied = True

    def allow(self) -> None:
        """Undo :meth:`deny`."""
        self._key.denied = False

    def rotate(self) -> None:
        """Make a new version of the key: it wraps from now on, and the earlier ones open what they wrapped."""
        self._key.rotate()

    # -- what befalls the way there ----------------------------------------------------------------------------------

    def outage(self) -> None:
        """Answer :class:`~sqla_byok.errors.KmsUnavailableError` until :meth:`recover`."""
        self._key.trouble = (KmsUnavailableError, None)

    def throttle(self, retry_after: float | None = None) -> None:
        """Answer :class:`~sqla_byok.errors.ThrottledError` until :meth:`recover`.

        :param retry_after: seconds, which the exception tells.
        """
        self._key.trouble = (ThrottledError, retry_after)

    def recover(self) -> None:
        """Undo :meth:`outage` and :meth:`throttle`, and forget what :meth:`fail_next` has left."""
        self._key.trouble = None
        self._key.failures.clear()

    def fail_next(self, error: type[KmsError], times: int = 1) -> None:
        """Raise this class of error at the next calls, after those already waiting.

        :param error: such as :class:`~sqla_byok.errors.KmsBlockedError`.
        :param times: how many calls fail.
        """
        self._key.failures.extend([error] * times)

    def latency(self, wait: float | Callable[[], object]) -> None:
        """Wait before each answer. A call is counted before it waits, and the state it meets is that of afterwards.

        :param wait: seconds, 0 for none, or what to call: with ``threading.Event().wait`` a test holds a call for as
            long as it likes.
        """
        self._key.wait = wait

    def reset(self) -> None:
        """Undo all of the above and count from 0 again. The key's versions stay: what it wrapped still opens."""
        self._key.reset()

    @property
    def _key(self) -> _Key:
        return _keys.get(self.name) or _keys.setdefault(self.name, _Key())


class _Key:
    """The state behind a name."""

    def __init__(self) -> None:
        self.versions: dict[str, AESGCM] = {}
        self.rotate()
        self.reset()

    def reset(self) -> None:
        self.state: type[KmsError] | None = None
        self.denied = False
        self.trouble: tuple[type[KmsError], float | None] | None = None
        self.failures: deque[type[KmsError]] = deque()
        self.wait: float | Callable[[], object] = 0.0
        self.log: deque[tuple[str, str]] = deque()

    def rotate(self) -> None:
        self.newest = str(len(self.versions) + 1)
        self.versions[self.newest] = AESGCM(os.urandom(32))

    def asked(self) -> list[tuple[str, str]]:
        return list(self.log.copy())  # copied in one step, as other threads go on

    def refusal(self) -> tuple[type[KmsError], float | None] | None:
        """What the call at hand meets, and the seconds until the next try; None for an answer."""
        wait = self.wait
        if callable(wait):
            wait()
        elif wait:
            time.sleep(wait)
        try:
            return self.failures.popleft(), None
        except IndexError:
            pass
        if self.trouble is not None:
            return self.trouble
        if self.denied:
            return AccessDeniedError, None
        return None if self.state is None else (self.state, None)


_keys: dict[str, _Key] = {}
_numbers = itertools.count(1)


class _FakeClient:
    """One key, for any number of threads."""

    def __init__(self, name: str, key: _Key) -> None:
        self._name, self._key = name, key

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        """See :meth:`sqla_byok.kms.base.KmsClient.wrap`; takes up to 4,096 bytes."""
        self._ask("wrap", tenant)
        if len(payload) > _ROOM:
            raise self._error(
                KmsRefusedError, "wrap", tenant, "takes no more than 4,096 bytes", by="operator"
            )
        version = self._key.newest
        nonce = os.urandom(_NONCE_SIZE)
        sealed = self._key.versions[version].encrypt(nonce, payload, _context(tenant, version))
        return Wrapped(nonce + sealed, version)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        """See :meth:`sqla_byok.kms.base.KmsClient.unwrap`.

        :raises WrongKeyError: the blob is damaged, another key's or another tenant's.
        """
        self._ask("unwrap", tenant)
        blob, version = wrapped
        key = self._key.versions.get(version)
        if key is not None:
            try:
                return key.decrypt(blob[:_NONCE_SIZE], blob[_NONCE_SIZE:], _context(tenant, version))
            except (InvalidTag, ValueError):
                pass
        raise self._error(
            WrongKeyError,
            "unwrap",
            tenant,
            "the wrapped key is damaged, another tenant's, another key's or another process's",
            by="operator",
        )

    def room(self, wrapped: Wrapped) -> int:
        """See :meth:`sqla_byok.kms.base.KmsClient.room`: as much as AWS KMS takes."""
        return _ROOM

    def _ask(self, operation: str, tenant: str) -> None:
        self._key.log.append((operation, tenant))
        request_id.set(f"fake-{next(_numbers)}")
        refusal = self._key.refusal()
        if refusal is not None:
            kind, retry_after = refusal
            reason = _REASONS.get(kind, "it was told to fail so")
            raise self._error(kind, operation, tenant, reason, retry_after=retry_after)

    def _error(
        self,
        kind: type[KmsError],
        operation: str,
        tenant: str,
        reason: str,
        *,
        by: Literal["customer", "operator"] | None = None,
        retry_after: float | None = None,
    ) -> KmsError:
        return kind(
            f"The fake KMS did not {operation} for tenant {tenant!r} with {self._name!r}: {reason}.",
            tenant=tenant,
            action_by=by,
            retry_after=retry_after,
            request_id=request_id.get(),
        )


def _is_name(value: object) -> bool:  # a stored configuration may hold anything
    return isinstance(value, str) and value != ""


def _context(tenant: str, version: str) -> bytes:
    return b"\0".join((b"sqla-byok/testing/fake", version.encode(), tenant.encode()))


providers[FakeKms.provider] = FakeKms
