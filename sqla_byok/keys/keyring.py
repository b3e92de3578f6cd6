"""One tenant's opened keys in memory, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol, cast

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, SEARCH_SALT, Record, Secret, TenantKey
from sqla_byok.crypto.hashes import Scope, derive_column_salt
from sqla_byok.crypto.values import Opener, ValueKey
from sqla_byok.errors import KeysExpiredError

if TYPE_CHECKING:
    from sqla_byok.keys.keystore import Wrapping
    from sqla_byok.kms import KmsClient

__all__ = ["Clock", "Keyring", "SealedRecord", "SystemClock"]

# A derived salt takes some 170 bytes; the cap keeps a tenant within its 16 KiB whatever the number of columns.
_SALTS_KEPT = 40


class Clock(Protocol):
    """Where the library reads time. Both are in seconds; a test gives its own."""

    def boot(self) -> float:
        """Time since an arbitrary start, never set back, counting while the machine sleeps where it can."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; used where generations have to settle."""
        ...


class SystemClock:
    """The machine's clocks: CLOCK_BOOTTIME where there is one (monotonic elsewhere), and wall time."""

    # Plain C functions, since every statement asks.
    boot = staticmethod(
        partial(time.clock_gettime, time.CLOCK_BOOTTIME)
        if hasattr(time, "CLOCK_BOOTTIME")
        else time.monotonic
    )
    wall = staticmethod(time.time)
    sleep = staticmethod(time.sleep)


class SealedRecord(NamedTuple):
    """A generation of a data key or search salt, as the keystore holds it."""

    kind: str
    generation: int
    id: bytes
    state: str
    sealed: bytes

    @property
    def record(self) -> Record:
        """What the manifest says of it."""
        return Record(self.kind, self.generation, self.id, self.state)


class _Salts(Secret, dict[tuple[str, Scope], bytes]):
    """Column salts, derived when first asked for; bounded."""

    __slots__ = ("_derive",)

    def __init__(self, derive: Callable[[str, Scope], bytes]) -> None:
        self._derive = derive

    def __missing__(self, key: tuple[str, Scope]) -> bytes:
        salt = self._derive(*key)
        if len(self) >= _SALTS_KEPT:
            super().clear()
        self[key] = salt
        return salt


class _NoKey:
    """Stands where the key stood, once a keyring is cleared."""

    header = padded_header = aad = padded_aad = b""

    def __init__(self, expired: Callable[[], NoReturn]) -> None:
        self._expired = expired

    def encrypt(self, nonce: bytes, plaintext: bytes, aad: bytes) -> NoReturn:
        self._expired()


class Keyring(Secret):
    """One tenant's opened keys.

    It may be used until :attr:`deadline` on the boot-time clock and :attr:`wall_deadline` on the wall clock,
    whichever comes first; :meth:`clear` takes the keys away in place, so that a result that is still being read
    stops too.

    :param tenant_key: the opened tenant key.
    :param epoch: the keystore's epoch that ``records`` belong to.
    :param records: the sealed generations, already checked against the manifest.
    """

    __slots__ = (
        "__weakref__",
        "_search_salt",
        "_tenant_key",
        "cleared",
        "client",
        "deadline",
        "epoch",
        "fresh_until",
        "openers",
        "salts",
        "tenant",
        "used",
        "wall_deadline",
        "wrapping",
        "write",
        "write_until",
    )

    write: ValueKey

    def __init__(self, tenant_key: TenantKey, epoch: int, records: Iterable[SealedRecord]) -> None:
        self.tenant = tenant_key.tenant
        self.cleared = False
        self.deadline = self.wall_deadline = self.fresh_until = self.write_until = self.used = 0.0
        self._tenant_key: TenantKey | None = tenant_key
        # The customer key, for values that it encrypts itself, and what calls it; made when first needed.
        self.wrapping: Wrapping | None = None
        self.client: KmsClient | None = None
        self.openers: dict[bytes, Opener] = {}
        self.load(epoch, records)

    def load(self, epoch: int, records: Iterable[SealedRecord]) -> None:
        """Take over the generations of ``epoch``. Needs no KMS call: they are sealed under the tenant key."""
        tenant_key = self._tenant_key
        if tenant_key is None:
            self.expired()
        openers: dict[bytes, Opener] = {}
        write = self._no_key()  # never stays: the manifest has exactly one active data key
        secret = search_salt = None
        try:
            for record in records:
                secret = tenant_key.open(record.kind, record.generation, record.id, record.sealed)
                if record.kind == DATA_KEY:
                    key = ValueKey(secret, self.tenant)
                    openers.update(key.openers)
                    if record.state == ACTIVE:
                        write = key
                elif record.kind == SEARCH_SALT and record.state == ACTIVE:
                    search_salt = secret
        except BaseException:
            search_salt = None
            raise
        finally:
            secret = None  # crash reports show the variables of each frame
        # Other threads use this keyring meanwhile: they can read what is written before anything is written.
        self.openers = openers
        self.write = write
        self._search_salt: bytes | None = search_salt
        self.salts = _Salts(self._derive)
        self.epoch = epoch
        if self.cleared:  # by another thread, just now
            self.clear()
            self.expired()

    @property
    def tenant_key(self) -> TenantKey:
        """The tenant key, to check a newer manifest with."""
        if self._tenant_key is None:
            self.expired()
        return self._tenant_key

    def clear(self) -> None:
        """Take the keys away in place; everything that still holds this keyring fails from now on."""
        self.cleared = True
        self.fresh_until = self.deadline = self.write_until = 0.0
        self.write = self._no_key()
        self.openers = {}
        self._tenant_key = self._search_salt = self.client = None
        self.salts.clear()

    def end(self) -> NoReturn:
        """Clear the keyring, whose deadline has passed.

        :raises KeysExpiredError: always.
        """
        self.clear()
        self.expired()

    def _no_key(self) -> ValueKey:
        return cast("ValueKey", _NoKey(self.expired))

    def _derive(self, algorithm: str, scope: Scope) -> bytes:
        if self._search_salt is None:
            self.expired()
        return derive_column_salt(self._search_salt, self.tenant, algorithm, scope)

    def expired(self) -> NoReturn:
        """Raise the error of a cleared keyring."""
        raise KeysExpiredError(
            f"the keys of tenant {self.tenant!r} expired or were forgotten while they were in use; "
            "run the statement again to ask the KMS anew",
            tenant=self.tenant,
        )
