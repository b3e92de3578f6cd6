"""Searches that wait for a job: how far it is.

The keystore is asked once in a while, however many searches are refused meanwhile.
"""

from __future__ import annotations

import asyncio

from sqla_byok.errors import ConfigurationError, KeystoreError, NotSearchableError
from sqla_byok.keys.clock import Clock
from sqla_byok.keys.jobs import RUNNING, Jobs
from sqla_byok.keys.keyrings import POLL_EVERY

__all__ = ["Waiting"]

_KEPT = 100


class Waiting:
    """Tells of refused searches how far the job is that they wait for.

    :param jobs: what the keystore has of them.
    :param clock: says when it is asked again.
    """

    def __init__(self, jobs: Jobs, clock: Clock) -> None:
        self._jobs, self._clock = jobs, clock
        self._told: dict[str, tuple[float, str, tuple[int, int] | None]] = {}

    def told(self, error: NotSearchableError, job: str) -> NotSearchableError:
        """The error with what is known of the job; where the keystore says nothing, as it is."""
        now = self._clock.boot()
        known = self._told.get(job)
        if known is None or now >= known[0] + POLL_EVERY:
            if len(self._told) >= _KEPT:
                self._told.clear()
            known = self._told[job] = (now, *self._asked(job))
        _, text, progress = known
        return NotSearchableError(
            f"{error}{text}", tenant=error.tenant, column=error.column, progress=progress
        )

    async def atold(self, error: NotSearchableError, job: str) -> NotSearchableError:
        """The same from asyncio."""
        return await asyncio.to_thread(self.told, error, job)

    def _asked(self, job: str) -> tuple[str, tuple[int, int] | None]:
        try:
            state, progress = self._jobs.get(job).state, self._jobs.progress(job)
        except (ConfigurationError, KeystoreError):  # it was removed; or the keystore does not answer
            return "", None
        is_ = "is" if state == RUNNING else f"is {state}:"
        return (
            f". Job {job} {is_} at {progress.rows:,} of {progress.of:,} rows",
            (progress.rows, progress.of),
        )
