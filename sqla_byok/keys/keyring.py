"""One tenant's opened keys in memory, with a deadline."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from typing import NoReturn, cast

from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, Secret, TenantKey
from sqla_byok.crypto.hashes import Scope, derive_column_salt
from sqla_byok.crypto.values import Opener, ValueKey
from sqla_byok.errors import KeysExpiredError, KeystoreUnavailableError
from sqla_byok.keys.clock import Lease
from sqla_byok.keys.rows import SealedRecord, Wrapping
from sqla_byok.keys.searchable import Searchable
from sqla_byok.kms import Kms, KmsClient

__all__ = ["Keyring"]

# A derived salt takes some 170 bytes; the cap, which a tenant's live search salts share, keeps it within its 16 KiB
# whatever the number of columns.
_SALTS_KEPT = 40


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

    Its :class:`Lease` says until when it may be used; :meth:`clear` takes the keys away in place, so that a result
    that is still being read stops too. Its generations never change: a newer epoch makes a :meth:`successor`, so that
    a statement is prepared under one epoch from its first parameter to its last.

    :param tenant_key: the opened tenant key.
    :param epoch: the keystore's epoch that ``records`` belong to.
    :param records: the sealed generations, already checked against the manifest.
    :param searchable_text: what the keystore says of searching, likewise.
    :ivar write: the active data key.
    :ivar openers: all live data keys.
    :ivar live_salts: the column salts by each live search salt, the active one first: what a look-up has to try.
    :ivar salts: those by the active search salt: what is written.
    :ivar searchable: what the keystore says of searching at this epoch.
    :ivar off: tells of a column id whether it gets no hashes; None where that holds for none.
    """

    __slots__ = (
        "__weakref__",
        "_tenant_key",
        "client",
        "epoch",
        "expires",
        "fresh_until",
        "lease",
        "live_salts",
        "looked_at",
        "off",
        "openers",
        "salts",
        "searchable",
        "tenant",
        "wrapping",
        "write",
        "write_until",
    )

    write: ValueKey

    def __init__(
        self,
        tenant_key: TenantKey,
        epoch: int,
        records: Iterable[SealedRecord],
        searchable_text: str = "",
        lease: Lease | None = None,
    ) -> None:
        self.tenant = tenant_key.tenant
        self.lease = Lease() if lease is None else lease
        self.looked_at = self.fresh_until = self.write_until = 0.0
        self.epoch = epoch
        self.searchable = Searchable.parse(searchable_text, self.tenant)
        self.off = self.searchable.off
        self._tenant_key: TenantKey | None = tenant_key
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
        self._enlist()

    def _enlist(self) -> None:
        """Become one of those that the lease clears."""
        rings = self.lease.rings
        for gone in [each for each in rings if each() is None]:
            with suppress(ValueError):  # another thread's turn
                rings.remove(gone)
        rings.append(weakref.ref(self))
        if self.lease.cleared:  # by another thread, just now
            self.end()

    def successor(self, epoch: int, records: Iterable[SealedRecord], searchable_text: str = "") -> Keyring:
        """The keyring of a newer epoch, under the same lease. Needs no KMS call: the tenant key is the same.

        Statements under way go on with this one. When either is cleared, both are.
        """
        return Keyring(self.tenant_key, epoch, records, searchable_text, self.lease)

    @property
    def cleared(self) -> bool:
        """Whether the keys were taken away."""
        return self.lease.cleared

    def renamed(self, epoch: int, searchable_text: str) -> Keyring:
        """The keyring of a newer epoch that differs only in what can be searched. It shares the opened keys."""
        newer = object.__new__(Keyring)
        for name in Keyring.__slots__:
            if name != "__weakref__":
                setattr(newer, name, getattr(self, name))
        newer.epoch = epoch
        newer.searchable = Searchable.parse(searchable_text, self.tenant)
        newer.off = newer.searchable.off
        newer._enlist()
        return newer

    @property
    def tenant_key(self) -> TenantKey:
        """The tenant key, to check a newer manifest with."""
        if self._tenant_key is None:
            self.expired()
        return self._tenant_key

    def clear(self) -> None:
        """Take the keys away in place, those of every epoch of this opening."""
        self.lease.clear()

    def wipe(self) -> None:
        """Take away what this object holds; :meth:`clear` is for all others to call."""
        self.fresh_until = self.write_until = 0.0
        self.write = self._no_key()
        self.openers = {}
        self._tenant_key = self.client = None
        for salts in self.live_salts:
            salts.clear()

    def end(self) -> NoReturn:
        """Clear the keyring, whose deadline has passed.

        :raises KeysExpiredError: always.
        """
        self.clear()
        self.expired()

    def _no_key(self) -> ValueKey:
        return cast("ValueKey", _NoKey(self.expired))

    def outdated(self) -> NoReturn:
        """Raise the error of a keyring by which nothing is written any more, since nobody has looked for too long."""
        if self.cleared:
            self.expired()
        raise KeystoreUnavailableError(
            f"the keystore has not answered for a while; tenant {self.tenant!r} can be read but not written nor "
            "searched until it does, since its data key or search salt may have changed",
            tenant=self.tenant,
        )

    def expired(self) -> NoReturn:
        """Raise the error of a cleared keyring."""
        _expired(self.tenant)


def _expired(tenant: str) -> NoReturn:
    raise KeysExpiredError(
        f"the keys of tenant {tenant!r} expired or were forgotten while they were in use; "
        "run the statement again to ask the KMS anew",
        tenant=tenant,
    )
