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
        "rings",
        "used",
        "wall_deadline",
        "wall_renewed_until",
    )

    def __init__(self) -> None:
        self.cleared = self.one_unit = self.refreshing = False
        self.deadline = self.wall_deadline = self.renewed_until = self.wall_renewed_until = 0.0
        self.renewed_at = self.outage_grace = self.refresh_at = self.used = 0.0
        self.rings: list[weakref.ref[_Ring]] = []

    def renew(self, boot: float, wall: float, revoke_within: float, outage_grace: float) -> None:
        """Count the time anew, from the sending of a KMS call that was answered with yes.

        :param boot: when it was sent, on the boot-time clock.
        :param wall: when it was sent, in wall time.
        :param revoke_within: how long the keys may be used after it, in seconds.
        :param outage_grace: how much longer while the KMS does not answer.
        """
        self.renewed_at, self.outage_grace = boot, outage_grace
        self.renewed_until, self.wall_renewed_until = boot + revoke_within, wall + revoke_within
        self.deadline, self.wall_deadline = self.renewed_until, self.wall_renewed_until
        # Spread, so that processes which opened a tenant together do not ask together.
        self.refresh_at = boot + revoke_within * random.uniform(REFRESH_FROM, REFRESH_TO)  # noqa: S311

    def stretch(self, *, to_grace: bool) -> None:
        """Note that the KMS did not answer: whether the keys may be used for ``outage_grace`` more."""
        more = self.outage_grace if to_grace else 0.0
        self.deadline, self.wall_deadline = self.renewed_until + more, self.wall_renewed_until + more

    def over(self, boot: float, wall: float) -> bool:
        """Whether the keys may not be used, or not any more."""
        return self.cleared or boot >= self.deadline or wall >= self.wall_deadline

    def hopeless(self, boot: float, wall: float) -> bool:
        """Whether not even an outage of the KMS could let the keys be used again."""
        grace = self.outage_grace
        return self.cleared or boot >= self.renewed_until + grace or wall >= self.wall_renewed_until + grace

    def clear(self) -> None:
        """Take the keys away in place; everything that still holds one of the keyrings fails from now on."""
        self.cleared = True
        for each in tuple(self.rings):
            ring = each()
            if ring is not None:
                ring.wipe()
