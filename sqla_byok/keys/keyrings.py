"""The keyrings in memory: opening them once, trusting them for as long as the tenant allows, dropping them."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sqla_byok.crypto.formats import Secret, TenantKey, unpack_tenant_key
from sqla_byok.errors import (
    ByokError,
    KeysExpiredError,
    KeystoreRolledBackError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    KmsNoAnswerError,
    KmsRefusedError,
    KmsUnavailableError,
    UnknownTenantError,
)
from sqla_byok.keys.keyring import Clock, Keyring
from sqla_byok.keys.keystore import Keystore, TenantRow, Wrapping
from sqla_byok.kms import KmsClient, Wrapped

__all__ = ["Keyrings"]

_log = logging.getLogger("sqla_byok")

# How often a process looks whether a tenant's generations changed, and how long after its last look it still writes.
# Both are far shorter than the settle time between publishing a generation and writing with it.
POLL_EVERY = 3.0
WRITE_WITHIN = 15.0

# KMS calls under way at once, for asyncio; a thread that opens a tenant runs its own.
_OPENING_AT_ONCE = 8
# As many as the keystore has connections.
_POLLING_AT_ONCE = 2


def _own(error: ByokError, leads: bool) -> ByokError:
    """An exception for one of those who waited: raised in several threads, one object would gather all their frames."""
    return error if leads else copy.copy(error)


class Keyrings(Secret):
    """Every open tenant of a process.

    :param keystore: where the sealed keys are.
    :param client: gives the KMS client for a wrapping.
    :param clock: where time is read.
    :param capacity: how many tenants stay open; beyond it the longest unused one goes.
    """

    def __init__(
        self, keystore: Keystore, client: Callable[[Wrapping], KmsClient], clock: Clock, capacity: int
    ) -> None:
        self._keystore = keystore
        self._client = client
        self.clock = clock
        self._boot, self._wall = clock.boot, clock.wall
        self._capacity = capacity
        self._rings: dict[str, Keyring] = {}
        self._evicted: weakref.WeakSet[Keyring] = weakref.WeakSet()
        # Each gives the keyring to all who wait for it, or None: "look again".
        self._opening: dict[str, Future[Keyring | None]] = {}
        self._highest: dict[str, int] = {}
        # Apart, so that customers' vaults that do not answer hold up nobody whose keys are in memory.
        self._openers: ThreadPoolExecutor | None = None
        self._pollers: ThreadPoolExecutor | None = None
        self._next_sweep = 0.0
        self._lock = threading.Lock()  # for the books above; never held over I/O, and not by warm()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (found := after_fork()) and found())

    def warm(self, tenant: str) -> Keyring | None:
        """The tenant's keyring if it is in memory and needs no look anywhere."""
        ring = self._rings.get(tenant)
        if ring is None:
            return None
        now = self._boot()
        if now >= ring.fresh_until or self._wall() >= ring.wall_deadline:
            return None
        ring.used = now
        return ring

    def get(self, tenant: str) -> Keyring:
        """The tenant's keyring, opened with one KMS call if it is not in memory.

        :raises UnknownTenantError: if the keystore has no such tenant.
        :raises KmsError: if the KMS refuses or does not answer.
        :raises KeystoreError: if the keystore does not answer, or does not authenticate.
        """
        ring = self.warm(tenant)
        while ring is None:
            opening, leads = self._join(tenant)
            if leads:
                self._lead(tenant, opening)
            try:
                ring = opening.result()
            except ByokError as error:
                raise _own(error, leads) from None
        return ring

    async def aget(self, tenant: str) -> Keyring:
        """The same from asyncio: the keystore and the KMS are asked in a thread, and the event loop goes on."""
        ring = self.warm(tenant)
        while ring is None:
            opening, leads = self._join(tenant)
            if leads:
                try:
                    self._workers(tenant).submit(self._lead, tenant, opening)
                except RuntimeError:  # the interpreter is shutting down
                    self._settle(tenant, opening)
                    opening.set_result(None)
                    raise
            try:
                # Shielded: a waiter that is cancelled takes neither the opening nor the other waiters with it.
                ring = await asyncio.shield(asyncio.wrap_future(opening))
            except ByokError as error:
                raise _own(error, leads) from None
        return ring

    def forget(self, tenant: str | None = None) -> None:
        """Take the keys of one tenant, or of all, out of memory at once; what is being opened is opened anew."""
        with self._lock:
            if tenant is None:
                dropped = [*self._rings.values(), *self._evicted]
                self._rings.clear()
                self._opening.clear()
            else:
                dropped = [ring for ring in self._evicted if ring.tenant == tenant]
                if tenant in self._rings:
                    dropped.append(self._rings.pop(tenant))
                self._opening.pop(tenant, None)
        for ring in dropped:
            ring.clear()

    def owner_of(self, header: bytes) -> str | None:
        """Which open tenant a value's header belongs to, for error messages."""
        return next((ring.tenant for ring in list(self._rings.values()) if header in ring.openers), None)

    def direct(self, ring: Keyring) -> tuple[KmsClient, Wrapping]:
        """What calls the customer key of an open tenant, and a wrapping under it. Makes no call to the KMS.

        The client is kept with the keyring, and goes with it.

        :raises KeysExpiredError: if the keyring was cleared.
        """
        wrapping, client = ring.wrapping, ring.client
        if ring.cleared or wrapping is None:
            ring.expired()
        if client is None:
            client = ring.client = self._client(wrapping)
        return client, wrapping

    def refused(self, tenant: str, error: KmsRefusedError) -> None:
        """Drop the keys of a tenant whose KMS said "no" when it was asked for something else than opening."""
        self.forget(tenant)

    def close(self) -> None:
        """Forget all keys and end the worker threads."""
        with self._lock:
            executors = [executor for executor in (self._openers, self._pollers) if executor is not None]
            self._openers = self._pollers = None
        for executor in executors:
            executor.shutdown()
        self.forget()

    # -- opening, by the one caller that leads ------------------------------------------------------------------

    def _join(self, tenant: str) -> tuple[Future[Keyring | None], bool]:
        """The opening that is under way, or a new one that the caller has to lead."""
        with self._lock:
            opening = self._opening.get(tenant)
            if opening is not None:
                return opening, False
            opening = self._opening[tenant] = Future()
            return opening, True

    def _lead(self, tenant: str, opening: Future[Keyring | None]) -> None:
        opening.set_running_or_notify_cancel()
        try:
            ring = self._renew(tenant, opening)
        except BaseException as error:
            self._settle(tenant, opening)
            if isinstance(error, Exception):
                opening.set_exception(error)
                return
            # Ctrl-C is for this thread alone; whoever else waits tries it in his own.
            opening.set_result(None)
            raise
        self._settle(tenant, opening)
        opening.set_result(ring)

    def _settle(self, tenant: str, opening: Future[Keyring | None]) -> None:
        with self._lock:
            if self._opening.get(tenant) is opening:
                del self._opening[tenant]

    def _renew(self, tenant: str, opening: Future[Keyring | None]) -> Keyring | None:
        self._sweep()
        ring = self._rings.get(tenant)
        if ring is not None:
            now = self._boot()
            # Asked again after the poll, which may have taken long.
            if self._live(ring) and (now < ring.fresh_until or (self._poll(ring, now) and self._live(ring))):
                ring.used = now
                return ring
            self._drop(ring)
        ring = self._open(tenant)
        with self._lock:
            if self._opening.get(tenant) is opening:
                self._make_room()
                self._rings[tenant] = ring
                return ring
        ring.clear()  # forgotten while it was opened
        return None

    def _live(self, ring: Keyring) -> bool:
        return not ring.cleared and self._boot() < ring.deadline and self._wall() < ring.wall_deadline

    def _sweep(self) -> None:
        """Take the keys of idle tenants out of memory once their time is up; at most once a second."""
        now = self._boot()
        if now < self._next_sweep:
            return
        self._next_sweep = now + 1.0
        with self._lock:
            ended = [ring for ring in (*self._rings.values(), *self._evicted) if not self._live(ring)]
            for ring in ended:
                if self._rings.get(ring.tenant) is ring:
                    del self._rings[ring.tenant]
        for ring in ended:
            ring.clear()

    def _drop(self, ring: Keyring) -> None:
        with self._lock:
            if self._rings.get(ring.tenant) is ring:
                del self._rings[ring.tenant]
        ring.clear()

    def _poll(self, ring: Keyring, now: float) -> bool:
        """Take over what changed in the keystore. False where the tenant has to be opened anew."""
        try:
            if self._keystore.epoch(ring.tenant) != ring.epoch:
                row = self._row(ring.tenant)
                if row.tenant_key_id != ring.tenant_key.id:
                    return False
                self._check(ring.tenant_key, row)
                ring.load(row.epoch, row.generations)
                ring.wrapping, ring.client = row.wrappings[0], None
        except KeystoreUnavailableError:
            # The keys stay good until their deadline; only writing stops, WRITE_WITHIN after the last look.
            _log.warning("the keystore does not answer; tenant %r goes on with the keys it has", ring.tenant)
            ring.fresh_until = min(ring.deadline, self._boot() + POLL_EVERY)
        except KeysExpiredError:
            return False  # forgotten meanwhile
        except Exception:
            self._drop(ring)
            raise
        else:
            self._looked(ring, now)
        return not ring.cleared

    def _open(self, tenant: str) -> Keyring:
        row = self._row(tenant)
        boot, wall = self._boot(), self._wall()
        tenant_key = TenantKey(self._unwrap(row), tenant, row.tenant_key_generation)
        self._check(tenant_key, row)
        ring = Keyring(tenant_key, row.epoch, row.generations)
        ring.wrapping = row.wrappings[0]
        # Counted from the sending of the call: what the KMS said is that old by now.
        ring.deadline = boot + row.revoke_within_ms / 1000
        ring.wall_deadline = wall + row.revoke_within_ms / 1000
        ring.used = boot
        self._looked(ring, boot)
        if not self._live(ring):
            ring.clear()
            raise KmsUnavailableError(
                f"the KMS took longer to answer than the keys of tenant {tenant!r} may be used; try again",
                tenant=tenant,
            )
        return ring

    def _unwrap(self, row: TenantRow) -> bytes:
        """One KMS call; the next wrapping is tried only on "no answer", never on "no"."""
        unanswered: KmsNoAnswerError | None = None
        for wrapping in row.wrappings:
            try:
                payload = self._client(wrapping).unwrap(
                    Wrapped(wrapping.wrapped, wrapping.kms_key_version), tenant=row.tenant
                )
                return unpack_tenant_key(payload, row.tenant, row.tenant_key_generation)
            except KmsNoAnswerError as error:
                unanswered = unanswered or error
        if unanswered is None:
            raise KeystoreTamperedError(f"tenant {row.tenant!r} has no wrapped tenant key", tenant=row.tenant)
        raise unanswered

    def _row(self, tenant: str) -> TenantRow:
        row = self._keystore.load(tenant)
        if row is None:
            raise UnknownTenantError(
                f"tenant {tenant!r} is not in the keystore; onboard it first, or it was removed",
                tenant=tenant,
            )
        if row.epoch < self._highest.get(tenant, 0):
            raise KeystoreRolledBackError(
                f"the keystore shows tenant {tenant!r} at epoch {row.epoch}, this process has seen "
                f"{self._highest[tenant]}: an old state was put back",
                tenant=tenant,
            )
        return row

    def _check(self, tenant_key: TenantKey, row: TenantRow) -> None:
        if tenant_key.id != row.tenant_key_id:
            raise KeystoreTamperedError(
                f"the tenant key of {row.tenant!r} is not the one its keystore row names", tenant=row.tenant
            )
        tenant_key.check_manifest(row.epoch, [record.record for record in row.generations], row.manifest_tag)
        self._highest[row.tenant] = max(row.epoch, self._highest.get(row.tenant, 0))

    @staticmethod
    def _looked(ring: Keyring, now: float) -> None:
        ring.fresh_until = min(ring.deadline, now + POLL_EVERY)
        ring.write_until = now + WRITE_WITHIN

    def _make_room(self) -> None:
        while len(self._rings) >= self._capacity:
            oldest = min(self._rings.values(), key=lambda ring: ring.used)
            # Not cleared: a statement that runs right now may hold it. Nobody else finds it any more.
            self._evicted.add(self._rings.pop(oldest.tenant))

    def _workers(self, tenant: str) -> ThreadPoolExecutor:
        """Who asks the keystore about an open tenant, or the KMS about one that is not."""
        with self._lock:
            ring = self._rings.get(tenant)
            if ring is not None and self._live(ring):
                self._pollers = self._pollers or ThreadPoolExecutor(
                    _POLLING_AT_ONCE, thread_name_prefix="byok-poll"
                )
                return self._pollers
            self._openers = self._openers or ThreadPoolExecutor(
                _OPENING_AT_ONCE, thread_name_prefix="byok-open"
            )
            return self._openers

    def _after_fork(self) -> None:
        # The parent's threads and connections are not ours; its opened keys are, with their deadlines.
        self._lock = threading.Lock()
        self._opening = {}
        self._openers = self._pollers = None
        self._keystore.database.after_fork()
