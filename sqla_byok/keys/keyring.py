"""One tenant's opened keys in memory, with a deadline."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol, cast

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, Record, Secret, TenantKey
from sqla_byok.crypto.hashes import Scope, derive_column_salt
from sqla_byok.crypto.values import Opener, ValueKey
from sqla_byok.errors import KeysExpiredError
from sqla_byok.keys.searchable import Searchable

if TYPE_CHECKING:
    from sqla_byok.keys.keystore import Wrapping
    from sqla_byok.kms import Kms, KmsClient

__all__ = ["REFRESH_FROM", "REFRESH_TO", "Clock", "Keyring", "SealedRecord", "SystemClock"]

# When a keyring in use is renewed, as parts of revoke_within: early enough for many tries, and spread so widely that
# tenants that were opened together do not stay together.
REFRESH_FROM, REFRESH_TO = 0.5, 0.75

# A derived salt takes some 170 bytes; the cap, which a tenant's live search salts share, keeps it within its 16 KiB
# whatever the number of columns.
_SALTS_KEPT = 40


# What a keyring shares with its successors.
_TIMES = (
    "deadline",
    "wall_deadline",
    "renewed_until",
    "wall_renewed_until",
    "outage_grace",
    "renewed_at",
    "refresh_at",
    "refreshing",
    "one_unit",
    "used",
)


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
    :param searchable: what the keystore says of searching, likewise.
    :ivar write: the active data key.
    :ivar openers: all live data keys.
    :ivar live_salts: the column salts by each live search salt, the active one first: what a look-up has to try.
    :ivar salts: those by the active search salt: what is written.
    :ivar searchable: what the keystore says of searching at this epoch.
    :ivar off: tells of a column id whether it gets no hashes; None where that holds for none.
    """

    __slots__ = (
        "__weakref__",
        "_lineage",
        "_tenant_key",
        "cleared",
        "client",
        "deadline",
        "epoch",
        "expires",
        "fresh_until",
        "live_salts",
        "looked_at",
        "off",
        "one_unit",
        "openers",
        "outage_grace",
        "refresh_at",
        "refreshing",
        "renewed_at",
        "renewed_until",
        "salts",
        "searchable",
        "tenant",
        "used",
        "wall_deadline",
        "wall_renewed_until",
        "wrapping",
        "write",
        "write_until",
    )

    write: ValueKey

    def __init__(
        self, tenant_key: TenantKey, epoch: int, records: Iterable[SealedRecord], searchable: str = ""
    ) -> None:
        self.tenant = tenant_key.tenant
        self.cleared = False
        self.refreshing = self.one_unit = False
        self.deadline = self.wall_deadline = 0.0
        self.renewed_at = self.renewed_until = self.wall_renewed_until = 0.0
        self.looked_at = self.fresh_until = self.write_until = self.used = self.refresh_at = (
            self.outage_grace
        ) = 0.0
        self.epoch = epoch
        self.searchable = Searchable.parse(searchable, self.tenant)
        self.off = self.searchable.off
        self._tenant_key: TenantKey | None = tenant_key
        # Shared by a keyring and its successors.
        self._lineage: list[weakref.ref[Keyring]] = [weakref.ref(self)]
        # The customer key, for values that it encrypts itself, and what calls it; made when first needed.
        self.wrapping: Wrapping | None = None
        self.expires: date | None = None
        self.client: tuple[Kms, KmsClient] | None = None
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

    def successor(self, epoch: int, records: Iterable[SealedRecord], searchable: str = "") -> Keyring:
        """The keyring of a newer epoch, with the same deadlines. Needs no KMS call: the tenant key is the same.

        Statements under way go on with this one. When either is cleared, both are.
        """
        newer = Keyring(self.tenant_key, epoch, records, searchable)
        for name in _TIMES:
            setattr(newer, name, getattr(self, name))
        newer._lineage = self._lineage
        newer._lineage[:] = [*map(weakref.ref, self.kin()), weakref.ref(newer)]
        if self.cleared:  # by another thread, just now
            newer.end()
        return newer

    def renamed(self, epoch: int, searchable: str) -> Keyring:
        """The keyring of a newer epoch that differs only in what can be searched. It shares the opened keys."""
        newer = object.__new__(Keyring)
        for name in Keyring.__slots__:
            if name != "__weakref__":
                setattr(newer, name, getattr(self, name))
        newer.epoch = epoch
        newer.searchable = Searchable.parse(searchable, self.tenant)
        newer.off = newer.searchable.off
        newer._lineage[:] = [*map(weakref.ref, self.kin()), weakref.ref(newer)]
        if self.cleared:  # by another thread, just now
            newer.end()
        return newer

    @property
    def tenant_key(self) -> TenantKey:
        """The tenant key, to check a newer manifest with."""
        if self._tenant_key is None:
            self.expired()
        return self._tenant_key

    def renew(self, boot: float, wall: float, revoke_within: float, outage_grace: float) -> None:
        """Count the time anew, from the sending of a KMS call that was answered with yes.

        :param boot: when it was sent, on the boot-time clock.
        :param wall: when it was sent, in wall time.
        :param revoke_within: how long the keys may be used after it, in seconds.
        :param outage_grace: how much longer while the KMS does not answer.
        """
        # Spread, so that processes which opened a tenant together do not ask together.
        refresh_at = boot + revoke_within * random.uniform(REFRESH_FROM, REFRESH_TO)  # noqa: S311
        for ring in self.kin():
            ring.renewed_until, ring.wall_renewed_until = boot + revoke_within, wall + revoke_within
            ring.deadline, ring.wall_deadline = ring.renewed_until, ring.wall_renewed_until
            ring.renewed_at, ring.outage_grace, ring.refresh_at = boot, outage_grace, refresh_at

    def stretch(self, *, to_grace: bool) -> None:
        """Note that the KMS did not answer: whether the keys may be used for ``outage_grace`` more."""
        more = self.outage_grace if to_grace else 0.0
        for ring in self.kin():
            ring.deadline, ring.wall_deadline = ring.renewed_until + more, ring.wall_renewed_until + more

    def kin(self) -> list[Keyring]:
        """This keyring and those of the same opening under other epochs, which share its time."""
        return [ring for each in tuple(self._lineage) if (ring := each()) is not None]

    def clear(self) -> None:
        """Take the keys away in place; everything that still holds this keyring fails from now on."""
        self.cleared = True
        self.fresh_until = self.deadline = self.write_until = 0.0
        self.write = self._no_key()
        self.openers = {}
        self._tenant_key = self.client = None
        for salts in self.live_salts:
            salts.clear()
        for ring in self.kin():
            if not ring.cleared:
                ring.clear()

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
