"""The keyrings in memory: opening them once, trusting them for as long as the tenant allows, dropping them.

A keyring is used until its deadline, and looked after only while it is used:

- every POLL_EVERY seconds the keystore is asked whether the tenant's generations changed;
- from half of ``revoke_within`` on, the KMS is asked again in the background;
- "no" drops it at once; "no answer" leaves it until its deadline, and within the tenant's ``outage_grace`` beyond it
  for as long as the KMS, which is asked again and again, does not answer.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as NotDoneError
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from functools import partial
from typing import NamedTuple, TypeVar

from sqla_byok.audit import Actor, Audit, KeysOpened, acting
from sqla_byok.crypto.formats import Secret, TenantKey
from sqla_byok.crypto.values import DECRYPT_FAILURES
from sqla_byok.errors import (
    ByokError,
    ConfigurationError,
    KeysExpiredError,
    KeystoreConflictError,
    KeystoreUnavailableError,
    KmsError,
    KmsNoAnswerError,
    KmsUnavailableError,
    WrongKeyError,
)
from sqla_byok.keys.calls import CALLS_AT_ONCE, KmsCalls
from sqla_byok.keys.clock import Clock, Lease
from sqla_byok.keys.health import CLOSED, DARK, FRESH, GRACE, Health
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keystore import Keystore
from sqla_byok.keys.rows import SealedRecord, State, TenantRow, Wrapping
from sqla_byok.keys.salts import ExternalSalts
from sqla_byok.keys.searchable import Searchable, Written
from sqla_byok.kms import Kms, KmsClient, Wrapped
from sqla_byok.kms.base import request_id
from sqla_byok.metrics import Snapshot

__all__ = ["POLL_EVERY", "SETTLE", "WRITE_WITHIN", "Keyrings"]

T = TypeVar("T")

_log = logging.getLogger("sqla_byok")

# How often a process looks whether a tenant's generations changed, and how long after its last look it still writes
# and searches.
# Both are far shorter than the settle time between publishing a generation and writing with it.
POLL_EVERY = 3.0
WRITE_WITHIN = 15.0

# A process that looked just before a change was stored writes and searches for WRITE_WITHIN more by what it saw
# (15 s); a statement that was let through at the last moment has to reach the database, which is given one POLL_EVERY
# (3 s); and clocks of different machines run at different rates, and threads wait for their turn (3 s). So 21 s after
# a change nobody works without knowing of it.
SETTLE = WRITE_WITHIN + POLL_EVERY + 3.0

# How often keys whose time is up are looked for (seconds): none stays in memory for a second more.
_SWEEP_EVERY = 0.4
# For how many tenants one query looks.
LOOKED_AT_ONCE = 500
# Another process or thread that notes another table of the tenant at the same time is no reason to give up: each that
# was faster has no more to note, so there may be as many conflicts as an application has tables.
_NOTING_TRIES = 100
# As many as the keystore has connections.
_POLLING_AT_ONCE = 2
_REFRESHING_AT_ONCE = 8

# Who may wait for one tenant whose last KMS call failed: a dead vault must not gather an application's threads.
_WAITING_FOR_FAILING = 16

# With revoke_within=0: how long one unit of work may go on with its keys, and how soon it must begin after they were
# opened for it.
UNIT_WITHIN = 60.0
_UNIT_BEGINS_WITHIN = 1.0


def _own(error: ByokError, leads: bool) -> ByokError:
    """An exception for one of those who waited: raised in several threads, one object would gather all their frames."""
    return error if leads else copy.copy(error)


def _sweep_for_ever(keyrings: weakref.ref[Keyrings], closed: threading.Event) -> None:
    while not closed.wait(_SWEEP_EVERY):
        found = keyrings()
        if found is None:
            return
        try:
            found._sweep()
        except BaseException as error:  # noqa: BLE001 - a listener may raise anything; all other keys have deadlines too
            with suppress(BaseException):
                _log.error("%s while keys were taken out of memory; it goes on", type(error).__name__)
        del found


def midnight(day: date) -> float:
    """The end of a day in UTC, in seconds since the epoch."""
    return datetime.combine(day + timedelta(days=1), time(), timezone.utc).timestamp()


class _Opening(Future["Keyring | None"]):
    """An opening under way. Gives the keyring to all who wait for it, or None: "look again"."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0

    def leave(self, leads: bool) -> None:
        """Count one less who waits; a leader was not counted."""
        if not leads:
            self.waiting -= 1


class _Opened(NamedTuple):
    """What an unwrap gave, when it was sent, and when the keystore was looked at before."""

    row: TenantRow
    tenant_key: TenantKey
    records: Sequence[SealedRecord]
    looked: float
    boot: float
    wall: float
    request_id: str | None


class _MustOpenError(Exception):
    """A thread that is for looking at the keystore has come to where the KMS has to be asked."""


class Keyrings(Secret):
    """Every open tenant of a process.

    :param keystore: where the sealed keys are.
    :param calls: asks the tenants' KMS.
    :param salts: reads the search salts that are kept elsewhere.
    :param clock: where time is read.
    :param capacity: how many tenants stay open; beyond it the longest unused one goes.
    :param audit: hears of openings and changes of state.
    """

    def __init__(
        self,
        keystore: Keystore,
        calls: KmsCalls,
        salts: ExternalSalts,
        clock: Clock,
        capacity: int,
        audit: Audit,
    ) -> None:
        self._keystore = keystore
        self._calls = calls
        self._salts = salts
        self.clock = clock
        self._boot, self._wall = clock.boot, clock.wall
        self._capacity = capacity
        self._audit = audit
        self.health = Health(clock, audit)
        self._rings: dict[str, Keyring] = {}
        self._units: dict[str, Keyring] = {}  # opened for one unit of work that has not begun
        self._evicted: weakref.WeakSet[Keyring] = weakref.WeakSet()
        # Since when this process has seen the search of a column closed that its model hashes otherwise than before.
        self._closing: dict[tuple[str, str], tuple[str, float]] = {}
        self._opening: dict[str, _Opening] = {}
        # Apart, so that customers' vaults that do not answer hold up nobody whose keys are in memory.
        self._executors: dict[str, ThreadPoolExecutor] = {}
        self._background: set[Future[None]] = set()
        self._next_sweep = 0.0
        self._sweeper: threading.Thread | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()  # for the books above; never held over I/O, and not by warm()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (found := after_fork()) and found())

    def warm(self, tenant: str) -> Keyring | None:
        """The tenant's keyring if it is in memory and needs no look anywhere."""
        ring = self._rings.get(tenant)
        if ring is None:
            return None
        now, lease = self._boot(), ring.lease
        if now >= ring.fresh_until or self._wall() >= lease.wall_deadline:
            return None
        lease.used = now
        return ring

    def get(self, tenant: str, reason: str = "open", actor: Actor | None = None) -> Keyring:
        """The tenant's keyring, opened with one KMS call if it is not in memory.

        :param reason: what the audit and the customer's log are told.
        :param actor: who asks, for the audit; who is named for this thread or task unless given.
        :raises UnknownTenantError: if the keystore has no such tenant.
        :raises KmsError: if the KMS refuses or does not answer.
        :raises KeystoreError: if the keystore does not answer, or does not authenticate.
        """
        ring = self.warm(tenant) or self._unit(tenant)
        while ring is None:
            opening, leads = self._join(tenant)
            if leads:
                self._lead(tenant, opening, reason, actor or acting.get())
            try:
                ring = opening.result()
            except ByokError as error:
                raise _own(error, leads) from None
            finally:
                opening.leave(leads)
        return ring

    async def aget(self, tenant: str, reason: str = "open", actor: Actor | None = None) -> Keyring:
        """The same from asyncio: the keystore and the KMS are asked in a thread, and the event loop goes on."""
        ring = self.warm(tenant) or self._unit(tenant)
        while ring is None:
            opening, leads = self._join(tenant)
            if leads:
                try:
                    self._start(tenant, opening, reason, actor or acting.get())
                except RuntimeError:  # the interpreter is shutting down
                    self._end_opening(tenant, opening)
                    opening.set_result(None)
                    raise
            try:
                # Shielded: a waiter that is cancelled takes neither the opening nor the other waiters with it.
                ring = await asyncio.shield(asyncio.wrap_future(opening))
            except ByokError as error:
                raise _own(error, leads) from None
            finally:
                opening.leave(leads)
        return ring

    def check(self, ring: Keyring) -> None:
        """Look at both clocks in the middle of a result. Does no I/O; a renewal that is due is begun in the background.

        :raises KeysExpiredError: the keyring's time is up.
        """
        now, wall, lease = self._boot(), self._wall(), ring.lease
        if now >= lease.deadline or wall >= lease.wall_deadline or lease.cleared:
            if not lease.in_grace(now, wall):
                ring.clear()
            ring.expired()
        if now >= lease.refresh_at:
            self.refresh_soon(ring)

    def look(self, ring: Keyring) -> Keyring | None:
        """The keyring of a unit of work with what changed since it last looked; None where it has to be opened anew."""
        return self._poll(ring, self._boot())

    async def alook(self, ring: Keyring) -> Keyring | None:
        """The same from asyncio."""
        with self._lock:
            pool = self._pool("poll", _POLLING_AT_ONCE)
        return await asyncio.wrap_future(pool.submit(self.look, ring))

    def note(self, ring: Keyring, written: Written, *, late: bool = False) -> Keyring:
        """Note a table that is about to be written first, and how its columns are hashed. Needs no KMS call.

        Where another process was faster, with the same specification or another, what it noted holds.

        :param written: what to note; with nothing in it, this is a look at what the keystore has.
        :param late: whether there are rows in the table, though it was never noted.
        :returns: the tenant's keyring, which knows them.
        :raises KeystoreError: if the keystore cannot be read or written; without a note, nothing may be written.
        """
        settled = partial(self._has_settled, ring.tenant)
        ring = self.revise(ring, lambda now: now.noted(written, settled, late=late))
        for column in written.specs:
            mark, seen = ring.searchable.mark(column), self._closing.get((ring.tenant, column))
            if mark and (seen is None or seen[0] != mark):
                self._closing[ring.tenant, column] = mark, self._boot()
        return ring

    def _has_settled(self, tenant: str, column: str, mark: str) -> bool:
        """Whether the search of a column has been closed for the settle time, as far as this process has seen."""
        seen, since = self._closing.get((tenant, column), ("", 0.0))
        return seen == mark and self._boot() >= since + SETTLE

    def revise(self, ring: Keyring, change: Callable[[Searchable], Searchable]) -> Keyring:
        """Change what of an open tenant can be searched. Needs no KMS call; others take it over at their next look.

        :param change: makes the new state of the stored one; called again after a conflict.
        :returns: the tenant's keyring, which knows it.
        :raises KeystoreError: if the keystore cannot be read or written.
        """
        now, tries = self._boot(), 0
        while True:
            row = self._keystore.row(ring.tenant)
            if row.tenant_key_id != ring.tenant_key.id:
                self._drop(ring)  # rekeyed meanwhile
                return self.revise(self.get(ring.tenant), change)
            row.check(ring.tenant_key)
            self._keystore.saw(row)
            noted = change(Searchable.parse(row.searchable_text, ring.tenant)).text
            new = row if noted == row.searchable_text else row.next(ring.tenant_key, searchable_text=noted)
            try:
                if new is not row:
                    self._keystore.replace(row, new)
            except KeystoreConflictError:
                tries += 1
                if tries == _NOTING_TRIES:
                    raise
            else:
                break
        if new.epoch == ring.epoch:
            newer = ring
        elif row.epoch == ring.epoch:
            newer = self._put(ring, ring.renamed(new.epoch, new.searchable_text))
        else:  # something else changed too
            newer = self._succeed(ring, new, self._salts.resolve(ring.tenant_key, new.generations))
        self._looked(newer, now)
        return newer

    async def anote(self, ring: Keyring, written: Written, *, late: bool = False) -> Keyring:
        """The same from asyncio."""
        with self._lock:
            pool = self._pool("open", CALLS_AT_ONCE)
        return await asyncio.wrap_future(pool.submit(self.note, ring, written, late=late))

    def look_again(self, tenant: str) -> None:
        """Have the tenant's next statement look whether anything changed in the keystore."""
        ring = self._rings.get(tenant)
        if ring is not None:
            ring.fresh_until = 0.0

    def enter(self, tenant: str, actor: Actor) -> None:
        """Open the tenant for a block that begins now."""
        ring = self.warm(tenant)
        if ring is None:
            self._begin(self.get(tenant, actor=actor))

    async def aenter(self, tenant: str, actor: Actor) -> None:
        """The same from asyncio."""
        ring = self.warm(tenant)
        if ring is None:
            self._begin(await self.aget(tenant, actor=actor))

    def preload(self, tenants: Iterable[str], within: float) -> dict[str, Exception | None]:
        """Open tenants side by side. What fails is told, not raised.

        :param within: how long to wait for all of them, in seconds.
        :returns: for each tenant None where it is open now, or why it is not.
        """
        names = list(dict.fromkeys(tenants))
        outcomes: dict[str, Exception | None] = {
            name: KmsUnavailableError(f"tenant {name!r} was not open in time", tenant=name) for name in names
        }
        pool = ThreadPoolExecutor(_REFRESHING_AT_ONCE, thread_name_prefix="byok-preload")
        opening = {pool.submit(self.get, name, "preload"): name for name in names}
        with suppress(NotDoneError):
            for done in as_completed(opening, timeout=within):
                error = done.exception()
                outcomes[opening[done]] = error if isinstance(error, Exception) else None
        pool.shutdown(wait=False, cancel_futures=True)
        return outcomes

    def forget(self, tenant: str | None = None) -> None:
        """Take the keys of one tenant, or of all, out of memory at once; what is being opened is opened anew."""
        with self._lock:
            names = {*self._rings, *self._units, *(ring.tenant for ring in self._evicted)}
            for opening in [*self._opening] if tenant is None else [tenant]:
                self._opening.pop(opening, None)
        self.health.forget(tenant)
        with self._audit.later():  # whatever a listener raises, all are taken
            for name in names if tenant is None else [tenant]:
                for ring in self._take(name):
                    self._end(ring)

    def owner_of(self, header: bytes) -> str | None:
        """Which open tenant a value's header belongs to, for error messages."""
        return next((ring.tenant for ring in list(self._rings.values()) if header in ring.openers), None)

    def ask_directly(self, ring: Keyring, operation: str, ask: Callable[[KmsClient], T]) -> T:
        """Make one KMS call for a value of an open tenant, and note what comes of it. "No" drops the keyring.

        :param operation: ``"wrap"`` or ``"unwrap"``.
        :param ask: makes the call.
        :raises KmsError: what the KMS said, or said last while it is left alone.
        """
        self.health.admit(ring.tenant)
        kms, client = self._direct(ring)
        try:
            answer = self._calls.call(lambda: ask(client), kms, operation, ring.tenant, "direct")
        except WrongKeyError:
            raise  # says something of the value, not of the key
        except KmsError as error:
            self.health.failed(ring.tenant, error)
            if not isinstance(error, KmsNoAnswerError):
                self.refused(ring.tenant, error)
            raise
        self.health.forget(ring.tenant)
        return answer

    def refused(self, tenant: str, error: ByokError) -> None:
        """Take every key of a tenant out of memory, since its KMS said no to whatever it was asked."""
        self._take(tenant)
        self.health.enter(tenant, DARK, error)

    def _take(self, tenant: str) -> list[Keyring]:
        """Clear all keyrings of a tenant, and take them out of the books."""
        with self._lock:
            taken = [ring for ring in self._evicted if ring.tenant == tenant]
            taken += [book[tenant] for book in (self._rings, self._units) if tenant in book]
            for ring in taken:
                self._remove(ring)
        return taken

    def room(self, ring: Keyring) -> int:
        """How many bytes the tenant's customer key encrypts at once. Makes no call."""
        _, client = self._direct(ring)
        wrapping = self._wrapping(ring)
        return client.room(Wrapped(wrapping.wrapped, wrapping.kms_key_version))

    def snapshot(self) -> Snapshot:
        """The keys of this process at this moment, for metrics. Does no I/O."""
        now, states = self._boot(), list(self.states().values())
        rings = [ring for ring in list(self._rings.values()) if self._usable(ring)]
        in_use = [ring for ring in rings if ring.lease.used >= ring.lease.renewed_at]
        expiries = [midnight(ring.expires) - self._wall() for ring in rings if ring.expires is not None]
        return Snapshot(
            fresh=states.count(FRESH),
            grace=states.count(GRACE),
            dark=states.count(DARK),
            seconds_to_dark=min((ring.lease.dark_at - now for ring in in_use), default=None),
            waiters=self.waiting(),
            breakers=self.health.breakers(),
            epoch_lag=max((max(0.0, ring.lease.used - ring.looked_at) for ring in in_use), default=None),
            decrypt_failures=DECRYPT_FAILURES.value,
            earliest_expiry=min(expiries, default=None),
        )

    def states(self) -> dict[str, str]:
        """The states of all tenants but the closed ones, as they are now."""
        now = self._boot()
        found = dict.fromkeys(self.health.dark(), DARK)
        for ring in list(self._rings.values()):
            if self._usable(ring):
                found[ring.tenant] = FRESH if now < ring.lease.renewed_until else GRACE
        return found

    def waiting(self) -> int:
        """How many wait for a tenant that is being opened."""
        with self._lock:
            return sum(opening.waiting for opening in self._opening.values())

    def drain(self) -> None:
        """Wait for what is under way in the background."""
        while True:
            with self._lock:
                under_way = list(self._background)
            if not under_way:
                return
            for future in under_way:
                future.exception()

    def close(self) -> None:
        """Forget all keys and end the worker threads."""
        with self._lock:
            self._closed.set()
            executors, self._executors = self._executors, {}
        for executor in executors.values():
            executor.shutdown()
        self.forget()

    # -- opening, by the one caller that leads ------------------------------------------------------------------

    def _join(self, tenant: str) -> tuple[_Opening, bool]:
        """The opening that is under way, or a new one that the caller has to lead."""
        with self._lock:
            if self._closed.is_set():
                raise ConfigurationError(
                    "this Byok was closed; nothing is opened by it any more", tenant=tenant
                )
            opening = self._opening.get(tenant)
            if opening is None:
                opening = self._opening[tenant] = _Opening()
                return opening, True
            error = self.health.failing(tenant)
            if error is None or opening.waiting < _WAITING_FOR_FAILING:
                opening.waiting += 1
                return opening, False
        raise self.health.again(error, POLL_EVERY)

    def _start(self, tenant: str, opening: _Opening, reason: str, actor: Actor) -> None:
        """Have a thread lead: one that looks at the keystore where the tenant is open, else one that asks the KMS."""
        with self._lock:
            ring = self._rings.get(tenant)
            looks = ring is not None and self._usable(ring)
            pool = self._pool("poll", _POLLING_AT_ONCE) if looks else self._pool("open", CALLS_AT_ONCE)
        pool.submit(self._lead, tenant, opening, reason, actor, may_ask=not looks)

    def _lead(
        self, tenant: str, opening: _Opening, reason: str, actor: Actor, *, may_ask: bool = True
    ) -> None:
        if not opening.running():
            opening.set_running_or_notify_cancel()
        # A listener may use the tenant: it is told when nobody waits for this opening any more.
        with self._audit.later():
            try:
                ring = self._renew(tenant, opening, reason, actor, may_ask=may_ask)
            except _MustOpenError:
                with self._lock:
                    pool = self._pool("open", CALLS_AT_ONCE)
                pool.submit(self._lead, tenant, opening, reason, actor)
                return
            except BaseException as error:
                self._end_opening(tenant, opening)
                if isinstance(error, Exception):
                    opening.set_exception(error)
                    return
                # Ctrl-C is for this thread alone; whoever else waits tries it in his own.
                opening.set_result(None)
                raise
            self._end_opening(tenant, opening)
            opening.set_result(ring)

    def _end_opening(self, tenant: str, opening: _Opening) -> None:
        with self._lock:
            if self._opening.get(tenant) is opening:
                del self._opening[tenant]

    def _renew(
        self, tenant: str, opening: _Opening, reason: str, actor: Actor, *, may_ask: bool
    ) -> Keyring | None:
        if self._boot() >= self._next_sweep:  # the clock of a test may have been turned
            self._sweep()
        ring = self._rings.get(tenant)
        if ring is not None and self._usable(ring):
            now = self._boot()
            current = ring if now < ring.fresh_until else self._poll(ring, now)
            # Asked again after the poll, which may have taken long.
            if current is not None and self._usable(current):
                current.lease.used = now
                self.refresh_soon(current)
                return current
            ring = current or ring
        if not may_ask:
            raise _MustOpenError
        try:
            opened = self._open(tenant, reason)
        except ByokError as error:
            current = None if ring is None else self._goes_on(ring, error)
            if current is None:
                raise
            return current
        self._audit.tell(KeysOpened(tenant, reason, actor.name, actor.purpose, opened.request_id))
        return self._admit(self._ring_of(opened), opening, ring)

    def _admit(self, ring: Keyring, opening: _Opening, old: Keyring | None) -> Keyring | None:
        """Let everybody find a keyring that was opened just now, unless it was forgotten meanwhile."""
        with self._lock:
            if old is not None:
                self._remove(old)
            admitted = self._opening.get(ring.tenant) is opening
            if admitted:
                self._rings.pop(ring.tenant, None)
                if ring.lease.one_unit:
                    self._evicted.add(ring)  # whose unit it is holds it
                else:
                    self._make_room()
                    self._rings[ring.tenant] = ring
                self._watch()
        if not admitted:
            ring.clear()
            return None
        return ring

    def _goes_on(self, ring: Keyring, error: ByokError) -> Keyring | None:
        """The keys that are there, used on since their KMS did not answer: in their time, or in the tenant's grace.

        They may have been idle for long: what changed meanwhile is taken over first, where that needs no KMS.
        """
        if isinstance(error, KeystoreUnavailableError):
            return None  # says nothing about the key
        if isinstance(error, KmsNoAnswerError):
            ring.lease.leave_unanswered(self._boot(), self._wall(), graced=error.retryable)
            current = self._poll(ring, self._boot()) if self._usable(ring) else None
            # None: there is another tenant key, for which the KMS has to be asked.
            if current is None and self._usable(ring):
                ring.fresh_until = min(ring.lease.deadline, self._boot() + POLL_EVERY)
                current = ring
            if current is not None and self._usable(current):
                if self._boot() >= current.lease.renewed_until:
                    self.health.enter(ring.tenant, GRACE, error)
                return current
        self._drop(ring, error)
        return None

    def _usable(self, ring: Keyring) -> bool:
        return not ring.lease.over(self._boot(), self._wall())

    def _watch(self) -> None:
        """Have a thread take away keys whose time is up, also where nobody uses any."""
        if self._sweeper is None or not self._sweeper.is_alive():
            keyrings = weakref.ref(self)
            self._sweeper = threading.Thread(
                target=_sweep_for_ever, args=(keyrings, self._closed), name="byok-sweep", daemon=True
            )
            self._sweeper.start()

    def _sweep(self) -> None:
        """Take the keys out of memory whose time is up; in the grace the KMS is asked on, used or not."""
        now, wall = self._boot(), self._wall()
        self._next_sweep = now + _SWEEP_EVERY
        asked, ended = list[Keyring](), list[Keyring]()
        with self._lock:
            for ring in (*self._rings.values(), *self._evicted, *self._units.values()):
                if ring.lease.in_grace(now, wall) and self._rings.get(ring.tenant) is ring:
                    asked.append(ring)
                elif ring.lease.over(now, wall):
                    ended.append(ring)
            for ring in ended:
                self._remove(ring)
        for ring in asked:
            self.refresh_soon(ring)
        with self._audit.later():  # whatever a listener raises, all are told
            for ring in ended:
                self._end(ring)

    def _remove(self, ring: Keyring) -> None:
        """Clear a keyring and take it out of the books, in this order: a process that is forked in between finds it."""
        ring.clear()
        for book in (self._rings, self._units):
            if book.get(ring.tenant) is ring:
                del book[ring.tenant]

    def _drop(self, ring: Keyring, error: ByokError | None = None) -> None:
        if error is not None and not isinstance(error, KmsNoAnswerError):
            self.refused(ring.tenant, error)
            return
        with self._lock:
            self._remove(ring)
        if error is not None:
            self.health.enter(ring.tenant, DARK, error)

    def _end(self, ring: Keyring) -> None:
        """Note that a tenant's keys are gone, unless it was opened anew meanwhile or its KMS has said why they are."""
        if ring.tenant not in self._rings and self.health.failing(ring.tenant) is None:
            self.health.enter(ring.tenant, CLOSED)

    def _poll(self, ring: Keyring, now: float) -> Keyring | None:
        """Take over what changed in the keystore. None where the tenant has to be opened anew."""
        try:
            others = self._due_soon(ring, now)
            states = self._keystore.states([ring.tenant, *(each.tenant for each in others)])
            for each in others:
                if self._is_current(each, states.get(each.tenant)):
                    self._looked(each, now)
            if not self._is_current(ring, states.get(ring.tenant)):
                row = self._keystore.row(ring.tenant)
                if row.tenant_key_id != ring.tenant_key.id:
                    return None
                ring = self._succeed(ring, row, self._checked(ring.tenant_key, row))
        except (KeystoreUnavailableError, KmsNoAnswerError) as error:
            # The keys stay good until their deadline; only writing stops, WRITE_WITHIN after the last look. It is the
            # place where search salts are kept that answers as a KMS does.
            _log.warning("%s; tenant %r goes on with the keys it has", type(error).__name__, ring.tenant)
            ring.fresh_until = min(ring.lease.deadline, self._boot() + POLL_EVERY)
        except KeysExpiredError:
            return None  # forgotten meanwhile
        except Exception as error:
            self._drop(ring, error if isinstance(error, ByokError) else None)
            raise
        else:
            self._looked(ring, now)
        return None if ring.cleared else ring

    def _is_current(self, ring: Keyring, found: State | None) -> bool:
        """Whether the keystore still shows what the keyring was made of."""
        return found is not None and found.epoch == ring.epoch and found == self._keystore.seen(ring.tenant)

    def _due_soon(self, ring: Keyring, now: float) -> list[Keyring]:
        """Other tenants in use that will soon be looked after: one query looks for many.

        Not those that are to be refreshed: looked after by others, they would stay warm and never come to it.
        """
        due = [
            each
            for each in list(self._rings.values())
            if each is not ring
            and now - each.lease.used < POLL_EVERY
            and each.fresh_until - now < POLL_EVERY / 2
            and now < each.lease.refresh_at
            and self._usable(each)
        ]
        return due[:LOOKED_AT_ONCE]

    def _succeed(self, ring: Keyring, row: TenantRow, records: Sequence[SealedRecord]) -> Keyring:
        """Put a keyring of the row's epoch in the place of the one that was polled."""
        newer = ring.successor(row.epoch, records, row.searchable_text)
        newer.wrapping, newer.expires = row.wrappings[0], ring.expires
        return self._put(ring, newer)

    def _put(self, ring: Keyring, newer: Keyring) -> Keyring:
        with self._lock:
            current = self._rings.get(ring.tenant)
            if current is not None and current.lease is ring.lease and current.epoch >= newer.epoch:
                return current  # another thread was faster
            if current is not None and current.lease is ring.lease:
                self._rings[ring.tenant] = newer
            else:  # gone to make room; had it been forgotten, both would be cleared
                self._evicted.add(newer)
        return newer

    def _direct(self, ring: Keyring) -> tuple[Kms, KmsClient]:
        """The customer key of an open tenant, and what calls it; kept with the keyring until it is renewed."""
        found = ring.client
        if found is None:
            kms = self._calls.describe(self._wrapping(ring))
            found = ring.client = kms, self._calls.client(kms, "direct")
        return found

    @staticmethod
    def _wrapping(ring: Keyring) -> Wrapping:
        if ring.cleared or ring.wrapping is None:
            ring.expired()
        return ring.wrapping

    # -- asking the KMS -------------------------------------------------------------------------------------------

    def _open(self, tenant: str, reason: str) -> _Opened:
        """One KMS call, and all that has to be true before its answer is used."""
        looked, row = self._boot(), self._keystore.row(tenant)
        try:
            self.health.admit(tenant)
            with self._calls.turn(tenant, failing=self.health.failing(tenant) is not None):
                return self._ask(row, reason, looked)
        except KmsError as error:
            if tenant not in self._rings:
                self.health.enter(tenant, DARK, error)
            raise

    def _ask(self, row: TenantRow, reason: str, looked: float) -> _Opened:
        boot, wall = self._boot(), self._wall()
        try:
            tenant_key = row.open(self._calls.unwrap(row, reason))
            asked = request_id.get()
            self._keystore.saw(row)
            records = self._salts.resolve(tenant_key, row.generations)
            return _Opened(row, tenant_key, records, looked, boot, wall, asked)
        except KmsError as error:
            self.health.failed(row.tenant, error)
            raise

    def _ring_of(self, opened: _Opened) -> Keyring:
        """A keyring of what was opened. Its time counts from the sending of the call: the answer is that old by now."""
        row, tenant = opened.row, opened.row.tenant
        ring = Keyring(opened.tenant_key, row.epoch, opened.records, row.searchable_text)
        self._trust(ring, opened)
        ring.lease.used = opened.boot
        self._looked(ring, opened.looked)
        if not self._usable(ring):
            ring.clear()
            raise KmsUnavailableError(
                f"the KMS took longer to answer than the keys of tenant {tenant!r} may be used; try again",
                tenant=tenant,
            )
        return ring

    def _trust(self, ring: Keyring, opened: _Opened) -> None:
        row, lease = opened.row, ring.lease
        lease.one_unit = row.revoke_within_ms == 0
        revoke_within = UNIT_WITHIN if lease.one_unit else row.revoke_within_ms / 1000
        lease.renew(opened.boot, opened.wall, revoke_within, row.outage_grace_ms / 1000)
        ring.wrapping, ring.expires = (
            row.wrappings[0],
            self._calls.describe(row.wrappings[0]).expires(),
        )
        ring.client = None  # the next direct call authenticates anew
        self.health.succeeded(ring.tenant, CLOSED if lease.one_unit else FRESH)

    def refresh_soon(self, ring: Keyring) -> None:
        """Ask the KMS again in the background, where it is time to."""
        lease = ring.lease
        if self._boot() < lease.refresh_at or lease.cleared:
            return
        with self._lock:
            current = self._rings.get(ring.tenant)
            if current is None or current.lease is not lease or lease.refreshing or self._closed.is_set():
                return
            try:
                future = self._pool("refresh", _REFRESHING_AT_ONCE).submit(self._refresh, current)
            except RuntimeError:  # the interpreter is shutting down
                return
            lease.refreshing = True
            self._background.add(future)
        future.add_done_callback(self._background.discard)

    def _refresh(self, ring: Keyring) -> None:
        tenant, lease = ring.tenant, ring.lease
        with self._audit.later():
            try:
                self._take_over(lease, self._open(tenant, "refresh"))
            except KmsNoAnswerError as error:
                lease.leave_unanswered(self._boot(), self._wall(), graced=error.retryable)
                lease.refresh_at = self._boot() + self.health.retry_in(tenant)
                if self._boot() >= lease.renewed_until and self._usable(ring):  # not dark since
                    self.health.enter(tenant, GRACE, error)
            except KeystoreUnavailableError:
                lease.refresh_at = self._boot() + POLL_EVERY
            except KeysExpiredError:
                pass  # forgotten meanwhile
            except ByokError as error:
                self._drop(ring, error)
            except Exception as error:  # noqa: BLE001 - nobody waits for it; its text could carry anything
                self._drop(ring)
                _log.error("tenant %r was dropped: %s while its KMS was asked", tenant, type(error).__name__)
            finally:
                with self._lock:  # not before it was set
                    lease.refreshing = False

    def _take_over(self, lease: Lease, opened: _Opened) -> None:
        """Go on with what a refresh found, unless the tenant was forgotten or opened anew meanwhile."""
        row = opened.row
        current = self._rings.get(row.tenant)
        if current is None or current.lease is not lease:
            return
        if opened.tenant_key.id != current.tenant_key.id:  # rekeyed: results being read end
            newer = self._ring_of(opened)
            with self._lock:
                if self._rings.get(row.tenant) is not current:
                    newer.clear()
                    return
                current.clear()
                self._rings[row.tenant] = newer
        elif current.epoch > row.epoch:
            return  # what was asked is older than what a look has found since; it is asked again
        else:
            newer = self._succeed(current, row, opened.records) if current.epoch < row.epoch else current
            self._trust(newer, opened)
            self._looked(newer, opened.looked)
        self._audit.tell(KeysOpened(row.tenant, "refresh", request_id=opened.request_id))

    def _checked(self, tenant_key: TenantKey, row: TenantRow) -> Sequence[SealedRecord]:
        """The row's generations, once the tenant key has authenticated the list of them."""
        row.check(tenant_key)
        self._keystore.saw(row)
        return self._salts.resolve(tenant_key, row.generations)

    def _looked(self, ring: Keyring, now: float) -> None:
        soon, lease = now + POLL_EVERY, ring.lease
        if now < lease.refresh_at:
            soon = min(soon, lease.refresh_at)
        ring.fresh_until = min(lease.deadline, soon)
        ring.looked_at, ring.write_until = now, now + WRITE_WITHIN

    def _make_room(self) -> None:
        while len(self._rings) >= self._capacity:
            oldest = min(self._rings.values(), key=lambda ring: ring.lease.used)
            # Not cleared: a statement that runs right now may hold it. Nobody else finds it any more.
            self._evicted.add(oldest)
            del self._rings[oldest.tenant]
            self.health.enter(oldest.tenant, CLOSED)

    # -- units of work, for tenants with revoke_within=0 ----------------------------------------------------------

    def _begin(self, ring: Keyring) -> None:
        """Keep the keys of a tenant that is asked for each unit of work until the unit's first statement."""
        if ring.lease.one_unit:
            with self._lock:
                self._units[ring.tenant] = ring

    def _unit(self, tenant: str) -> Keyring | None:
        if tenant not in self._units:
            return None
        with self._lock:
            ring = self._units.pop(tenant, None)
        if ring is None or not self._usable(ring):
            return None
        return ring if self._boot() - ring.lease.renewed_at < _UNIT_BEGINS_WITHIN else None

    # -- threads ----------------------------------------------------------------------------------------------------

    def _pool(self, name: str, size: int) -> ThreadPoolExecutor:
        pool = self._executors.get(name)
        if pool is None:
            pool = self._executors[name] = ThreadPoolExecutor(size, thread_name_prefix=f"byok-{name}")
        return pool

    def _after_fork(self) -> None:
        # The parent's threads and connections are not ours; its opened keys are, with their deadlines.
        self._lock = threading.Lock()
        self._opening, self._executors, self._background = {}, {}, set()
        closed, self._closed = self._closed.is_set(), threading.Event()
        if closed:
            self._closed.set()
        for ring in (*self._rings.values(), *self._units.values(), *self._evicted):
            # Its sockets are the parent's, and so may a lock be that a thread of the parent's held.
            ring.lease.refreshing, ring.client = False, None
        self.health.after_fork()
        self._calls.after_fork()
        self._keystore.database.after_fork()
        if self._rings or self._units or self._evicted:
            self._watch()  # the process may never ask for a tenant
