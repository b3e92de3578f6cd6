"""One tenant's opened keys in memory, with a deadline."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, NoReturn, Protocol, cast

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, Record, Secret, TenantKey
from sqla_byok.crypto.hashes import Scope, derive_column_salt
from sqla_byok.crypto.values import Opener, ValueKey
from sqla_byok.errors import KeysExpiredError

__all__ = ["Clock", "Keyring", "SealedRecord", "SystemClock"]

# A derived salt takes some 170 bytes; the cap, which a tenant's live search salts share, keeps it within its 16 KiB
# whatever the number of columns.
_SALTS_KEPT = 40


class Clock(Protocol):
    """Where the library reads time. Both are in seconds; a test gives its own."""

    def boot(self) -> float:
        """Time since an arbitrary start, never set back, counting while the machine sleeps where it can."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch."""
        ...

    def sleep(self, seconds: float, /) -> None:
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
    """The column salts of one search salt, derived when first asked for; bounded."""

    __slots__ = ("_kept", "_search_salt", "_tenant")

    def __init__(self, search_salt: bytes, tenant: str) -> None:
        self._search_salt: bytes | None = search_salt
        self._tenant = tenant
        self._kept = _SALTS_KEPT

    def __missing__(self, key: tuple[str, Scope]) -> bytes:
        if self._search_salt is None:
            _expired(self._tenant)
        salt = derive_column_salt(self._search_salt, self._tenant, *key)
        if len(self) >= self._kept:
            super().clear()
        self[key] = salt
        if not self._kept:  # cleared by another thread, just now
            super().clear()
        return salt

    def share(self, among: int) -> None:
        """Keep no more than one's part where several search salts are live."""
        self._kept = max(1, _SALTS_KEPT // among)

    def clear(self) -> None:
        self._search_salt, self._kept = None, 0
        super().clear()


class _NoKey:
    """Stands where the key stood, once a keyring is cleared."""

    header = padded_header = aad = padded_aad = b""

    def __init__(self, expired: Callable[[], NoReturn]) -> None:
        self._expired = expired

    def encrypt(self, nonce: bytes, plaintext: bytes, aad: bytes) -> NoReturn:
        self._expired()


class Keyring(Secret):
    """One tenant's opened keys, as one epoch has them.

    It may be used until :attr:`deadline` on the boot-time clock and :attr:`wall_deadline` on the wall clock,
    whichever comes first; :meth:`clear` takes the keys away in place, so that a result that is still being read
    stops too. Its generations never change: a newer epoch makes a :meth:`successor`, so that a statement is prepared
    under one epoch from its first parameter to its last.

    :param tenant_key: the opened tenant key.
    :param epoch: the keystore's epoch that ``records`` belong to.
    :param records: the sealed generations, already checked against the manifest.
    :ivar write: the active data key.
    :ivar openers: all live data keys.
    :ivar live_salts: the column salts by each live search salt, the active one first: what a look-up has to try.
    :ivar salts: those by the active search salt: what is written.
    """

    __slots__ = (
        "__weakref__",
        "_lineage",
        "_tenant_key",
        "cleared",
        "deadline",
        "epoch",
        "fresh_until",
        "live_salts",
        "openers",
        "salts",
        "tenant",
        "used",
        "wall_deadline",
        "write",
        "write_until",
    )

    write: ValueKey

    def __init__(self, tenant_key: TenantKey, epoch: int, records: Iterable[SealedRecord]) -> None:
        self.tenant = tenant_key.tenant
        self.cleared = False
        self.deadline = self.wall_deadline = self.fresh_until = self.write_until = self.used = 0.0
        self.epoch = epoch
        self._tenant_key: TenantKey | None = tenant_key
        self._lineage: list[weakref.ref[Keyring]] = [
            weakref.ref(self)
        ]  # shared by a keyring and its successors
        self.openers: dict[bytes, Opener] = {}
        self.write = self._no_key()  # never stays: the manifest has exactly one active data key
        active: list[_Salts] = []
        others: list[_Salts] = []
        secret = None
        try:
            for record in records:
                secret = tenant_key.open(record.kind, record.generation, record.id, record.sealed)
                if record.kind == DATA_KEY:
                    key = ValueKey(secret, self.tenant)
                    self.openers.update(key.openers)
                    if record.state == ACTIVE:
                        self.write = key
                else:
                    (active if record.state == ACTIVE else others).append(_Salts(secret, self.tenant))
        finally:
            secret = None  # crash reports show the variables of each frame
        self.live_salts = (*active, *others)
        self.salts = self.live_salts[0]
        for salts in self.live_salts:
            salts.share(len(self.live_salts))

    def successor(self, epoch: int, records: Iterable[SealedRecord]) -> Keyring:
        """The keyring of a newer epoch, with the same deadlines. Needs no KMS call: the tenant key is the same.

        Statements under way go on with this one. When either is cleared, both are.
        """
        newer = Keyring(self.tenant_key, epoch, records)
        newer.deadline, newer.wall_deadline, newer.used = self.deadline, self.wall_deadline, self.used
        newer._lineage = self._lineage
        newer._lineage[:] = [*(each for each in self._lineage if each() is not None), weakref.ref(newer)]
        if self.cleared:  # by another thread, just now
            newer.end()
        return newer

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
        self._tenant_key = None
        for salts in self.live_salts:
            salts.clear()
        for each in tuple(self._lineage):
            found = each()
            if found is not None and not found.cleared:
                found.clear()

    def end(self) -> NoReturn:
        """Clear the keyring, whose deadline has passed.

        :raises KeysExpiredError: always.
        """
        self.clear()
        self.expired()

    def _no_key(self) -> ValueKey:
        return cast("ValueKey", _NoKey(self.expired))

    def expired(self) -> NoReturn:
        """Raise the error of a cleared keyring."""
        _expired(self.tenant)


def _expired(tenant: str) -> NoReturn:
    raise KeysExpiredError(
        f"the keys of tenant {tenant!r} expired or were forgotten while they were in use; "
        "run the statement again to ask the KMS anew",
        tenant=tenant,
    )
