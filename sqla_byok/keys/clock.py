"""Where time is read, and how long opened keys may be used."""

from __future__ import annotations

import random
import time
import weakref
from functools import partial
from typing import Protocol

__all__ = ["REFRESH_FROM", "REFRESH_TO", "Clock", "Lease", "SystemClock"]

# When a keyring in use is renewed, as parts of revoke_within: early enough for many tries, and spread so widely that
# tenants that were opened together do not stay together.
REFRESH_FROM, REFRESH_TO = 0.5, 0.75

# In the grace, how long keys may be used after the KMS did not answer last (seconds): until it is asked again, after
# the longest back-off, and that call has run into its timeout. Never longer than revoke_within.
_UNANSWERED_FOR = 30.0


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


class _Ring(Protocol):
    """What holds keys: a keyring."""

    def wipe(self) -> None: ...


class Lease:
    """How long the keyrings of one opening may be used; shared by all of them, under whatever epoch.

    :ivar deadline: until when, on the boot-time clock; ``wall_deadline`` in wall time, whichever comes first.
    :ivar renewed_at: when the last KMS call that was answered with yes was sent.
    :ivar renewed_until: ``revoke_within`` after that.
    :ivar outage_grace: how much longer while the KMS does not answer, in seconds.
    :ivar unanswered: whether the KMS did not answer when it was asked last, in a way that the grace is for.
    :ivar refresh_at: from when on the KMS is to be asked again; ``refreshing`` while it is.
    :ivar one_unit: whether it is of one unit of work only (``revoke_within=0``).
    :ivar used: when it was last used.
    :ivar cleared: whether the keys were taken away.
    """

    __slots__ = (
        "cleared",
        "deadline",
        "one_unit",
        "outage_grace",
        "refresh_at",
        "refreshing",
        "renewed_at",
        "renewed_until",
        "revoke_within",
        "rings",
        "unanswered",
        "used",
        "wall_deadline",
        "wall_renewed_until",
    )

    def __init__(self) -> None:
        self.cleared = self.one_unit = self.refreshing = self.unanswered = False
        self.deadline = self.wall_deadline = self.renewed_until = self.wall_renewed_until = 0.0
        self.renewed_at = self.revoke_within = self.outage_grace = self.refresh_at = self.used = 0.0
        self.rings: list[weakref.ref[_Ring]] = []

    def renew(self, boot: float, wall: float, revoke_within: float, outage_grace: float) -> None:
        """Count the time anew, from the sending of a KMS call that was answered with yes.

        :param boot: when it was sent, on the boot-time clock.
        :param wall: when it was sent, in wall time.
        :param revoke_within: how long the keys may be used after it, in seconds.
        :param outage_grace: how much longer while the KMS does not answer.
        """
        self.renewed_at, self.revoke_within, self.outage_grace = boot, revoke_within, outage_grace
        self.renewed_until, self.wall_renewed_until = boot + revoke_within, wall + revoke_within
        self.deadline, self.wall_deadline = self.renewed_until, self.wall_renewed_until
        self.unanswered = False
        # Spread, so that processes which opened a tenant together do not ask together.
        self.refresh_at = boot + revoke_within * random.uniform(REFRESH_FROM, REFRESH_TO)  # noqa: S311

    def leave_unanswered(self, boot: float, wall: float, *, graced: bool) -> None:
        """Note that the KMS did not answer. In the grace, this alone lets the keys be used on, for a while each time.

        :param boot: when that was known, on the boot-time clock.
        :param wall: the same in wall time.
        :param graced: whether time may mend it, which is what ``outage_grace`` is for.
        """
        self.unanswered = graced
        self.deadline = self._until(self.renewed_until, boot)
        self.wall_deadline = self._until(self.wall_renewed_until, wall)

    def _until(self, renewed_until: float, now: float) -> float:
        if not self.unanswered:
            return renewed_until
        more = now + min(_UNANSWERED_FOR, self.revoke_within)
        return max(renewed_until, min(more, renewed_until + self.outage_grace))

    @property
    def dark_at(self) -> float:
        """When the keys may be used no longer if the KMS does not answer any more, on the boot-time clock."""
        return self.renewed_until + (self.outage_grace if self.unanswered else 0.0)

    def over(self, boot: float, wall: float) -> bool:
        """Whether the keys may not be used, or not any more."""
        return self.cleared or boot >= self.deadline or wall >= self.wall_deadline

    def in_grace(self, boot: float, wall: float) -> bool:
        """Whether ``revoke_within`` is over, and only the KMS keeps the tenant dark or not: it did not answer, or is
        being asked just now, and the grace is not over."""
        return (
            not self.cleared
            and (self.unanswered or self.refreshing)
            and (boot >= self.renewed_until or wall >= self.wall_renewed_until)
            and boot < self.renewed_until + self.outage_grace
            and wall < self.wall_renewed_until + self.outage_grace
        )

    def clear(self) -> None:
        """Take the keys away in place; everything that still holds one of the keyrings fails from now on."""
        self.cleared = True
        for each in tuple(self.rings):
            ring = each()
            if ring is not None:
                ring.wipe()
