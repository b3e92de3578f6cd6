"""How tenants' KMS calls went of late: the breaker of each tenant, and the states that operators watch."""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter, deque
from typing import NamedTuple

from sqla_byok.audit import Audit, KeyStateChanged
from sqla_byok.errors import KmsError
from sqla_byok.keys.clock import Clock

__all__ = ["CLOSED", "DARK", "FRESH", "GRACE", "Health"]

CLOSED, FRESH, GRACE, DARK = "closed", "fresh", "grace", "dark"

# After so many failures in a row the KMS is left alone: for 1, 2, 4, 8, then 15 seconds. Until then each failure is
# its statement's alone, so that a customer who enables its key again need not wait.
_FAILURES = 3
_LONGEST = 15.0

_CHANGES_KEPT = 100_000
RECENTLY = 300.0


class _Failures:
    __slots__ = ("error", "failures", "open_until")

    def __init__(self) -> None:
        self.failures, self.open_until = 0, 0.0
        self.error: KmsError | None = None


class _Change(NamedTuple):
    at: float
    tenant: str
    action_by: str | None


class Health:
    """What is known of the tenants' KMS, in this process.

    :param clock: where time is read.
    :param audit: hears of each change of a tenant's state.
    """

    def __init__(self, clock: Clock, audit: Audit) -> None:
        self._clock, self._audit = clock, audit
        self._failing: dict[str, _Failures] = {}
        self._states: dict[str, str] = {}
        self._changes: deque[_Change] = deque(maxlen=_CHANGES_KEPT)
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """Take a lock that no thread of the parent's holds."""
        self._lock = threading.Lock()

    def admit(self, tenant: str) -> None:
        """Let a KMS call for the tenant through, or raise what the last one said while its breaker is open.

        :raises KmsError: the last failure again, with ``retry_after``.
        """
        found = self._failing.get(tenant)
        if found is None or found.error is None:
            return
        wait = found.open_until - self._clock.boot()
        if wait > 0:
            raise self.again(found.error, wait)

    def failing(self, tenant: str) -> KmsError | None:
        """What the tenant's last KMS call raised; None where it succeeded."""
        found = self._failing.get(tenant)
        return None if found is None else found.error

    @staticmethod
    def again(error: KmsError, wait: float | None = None) -> KmsError:
        """The same failure for another caller."""
        error = copy.copy(error)
        if wait is not None:
            error.retry_after = max(wait, 0.001)
        return error

    def succeeded(self, tenant: str, state: str = FRESH) -> None:
        """The KMS said yes."""
        with self._lock:
            self._failing.pop(tenant, None)
        self.enter(tenant, state)

    def failed(self, tenant: str, error: KmsError) -> None:
        """The KMS said no, or nothing."""
        now = self._clock.boot()
        with self._lock:
            found = self._failing.setdefault(tenant, _Failures())
            found.failures += 1
            found.error = copy.copy(error).with_traceback(None)
            beyond = found.failures - _FAILURES
            if beyond >= 0:
                wait = min(_LONGEST, 2.0 ** min(beyond, 10)) * random.uniform(0.8, 1.0)  # noqa: S311 - spreads calls
                found.open_until = now + max(wait, min(error.retry_after or 0.0, 4 * _LONGEST))

    def retry_in(self, tenant: str) -> float:
        """In how many seconds the KMS may be asked in the background again."""
        found = self._failing.get(tenant)
        return 1.0 if found is None else max(1.0, found.open_until - self._clock.boot())

    def enter(self, tenant: str, state: str, cause: BaseException | None = None) -> None:
        """Note the state of a tenant's keys, and tell the audit where it is another than before."""
        with self._lock:
            before = self._states.get(tenant, CLOSED)
            if before == state:
                return
            if state == CLOSED:
                self._states.pop(tenant, None)
            else:
                self._states[tenant] = state
            action_by = cause.action_by if isinstance(cause, KmsError) else None
            if {before, state} & {GRACE, DARK}:
                self._changes.append(_Change(self._clock.boot(), tenant, action_by))
        self._audit.tell(
            KeyStateChanged(
                tenant,
                before,
                state,
                cause=None if cause is None else type(cause).__name__,
                action_by=action_by,
            )
        )

    def forget(self, tenant: str | None = None) -> None:
        """Close the breaker of a tenant, or of all: the next use asks the KMS."""
        with self._lock:
            names = [*self._failing] if tenant is None else [tenant]
            for name in names:
                self._failing.pop(name, None)

    def dark(self) -> list[str]:
        """The tenants that could not be opened when they were last asked for."""
        with self._lock:
            return [tenant for tenant, state in self._states.items() if state == DARK]

    def causes(self) -> Counter[tuple[str, str]]:
        """How many tenants' last KMS call failed, by exception and by who must act."""
        with self._lock:
            errors = [each.error for each in self._failing.values() if each.error is not None]
        return Counter((type(error).__name__, error.action_by) for error in errors)

    def breakers(self) -> int:
        """How many breakers are open."""
        now = self._clock.boot()
        with self._lock:
            return sum(each.open_until > now for each in self._failing.values())

    def changed_recently(self) -> int:
        """How many tenants became dark, came into grace, or came out of either in the last five minutes."""
        since = self._clock.boot() - RECENTLY
        with self._lock:
            return len({change.tenant for change in self._changes if change.at > since})
