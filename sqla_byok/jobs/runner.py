"""The runner of jobs: shards of tables, worked on page by page, by as many workers as there are.

A page is read, worked on in memory, and stored by compare-and-set on what was read: a row that somebody has changed
meanwhile is its writer's. Then the keystore is told how far the shard is. Whoever is killed in between leaves a page
that is found done already, since every kind of work leaves alone what is as it should be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sqla_byok.jobs.keys import key_from_json, key_to_json
from sqla_byok.jobs.rows import (
    CHANGED,
    DARK,
    FAILED,
    OTHERS,
    OVERTAKEN,
    Failure,
    Page,
    Tenants,
    Work,
    work_over,
)
from sqla_byok.keys import jobs as stored
from sqla_byok.keys.jobs import OUTCOMES, Job, Jobs, LostShardError, Shard
from sqla_byok.orm.stored import NOBODY, Change, Prepared, Processors, StoredRow, StoredTable
from sqla_byok.runtime import Byok

__all__ = ["SHARD_ROWS", "Pace", "Report", "Runner", "planned_shards"]

# A batch takes about so long (seconds): its transaction holds up no writer for longer.
_BATCH_TAKES = 0.5
_FIRST_ROWS, _FEWEST_ROWS, _MOST_ROWS = 200, 10, 5_000
SHARD_ROWS = 50_000
_OUT_OF_DATE = 2.0  # seconds that a page may wait to be stored
_TRIES = 5  # of a batch that meets a deadlock, or a locked database; of rows that others go on changing
_UNFOUND = (
    "no UPDATE finds it as it was read: its key does not compare equal to itself, or others go on changing it"
)


@dataclass(frozen=True, slots=True)
class Pace:
    """What holds a job back, for the sake of others.

    :param rows_a_second: at most so many rows, for each worker.
    :param pause_file: nothing is done while a file of this name is there.
    :param below: a query that gives one number, and what that has to stay below, such as a replica's lag in seconds;
        asked between two batches, in the database that the rows are in.
    """

    rows_a_second: float | None = None
    pause_file: str | Path | None = None
    below: tuple[str, float] | None = None

    def wait(self, engine: Engine, rows: int, took: float) -> None:
        """Wait for as long as it says, after a batch of so many rows that took so long."""
        if self.rows_a_second:
            time.sleep(max(0.0, rows / self.rows_a_second - took))
        while (self.pause_file is not None and Path(self.pause_file).exists()) or self._is_above(engine):
            time.sleep(0.2)

    def _is_above(self, engine: Engine) -> bool:
        if self.below is None:
            return False
        query, bound = self.below
        with engine.connect() as conn:
            number = conn.scalar(text(query))
        return number is not None and float(number) >= bound


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a job.

    :ivar job: its id; empty after a dry run.
    :ivar state: ``"done"``; ``"running"`` where tenants were dark, to whose rows it comes back when it is run again;
        ``"paused"`` or ``"cancelled"``; ``"dry run"``.
    :ivar counts: rows by outcome. ``changed`` were stored anew, ``already`` needed nothing, ``overtaken`` were changed
        by a writer meanwhile, ``failed`` are those in ``failures``, ``dark`` are of tenants whose KMS said no or did
        not answer, ``others`` of tenants that were not asked for. They add up to the rows that were looked at.
    :ivar found: what else was counted, by its name.
    :ivar failures: what could not be done, by row.
    :ivar dark: the tenants that were dark.
    """

    job: str
    kind: str
    state: str
    counts: Mapping[str, int]
    found: Mapping[str, int] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    dark: Sequence[str] = ()

    @property
    def rows(self) -> int:
        """How many rows were looked at."""
        return sum(self.counts.values())


_DARK_TENANT = "dark: "

_Paged = tuple[Page, Any, bool]


class Runner:
    """Works on the shards of one job, as one of perhaps several workers.

    :param byok: opens tenants.
    :param engine: of the database that the rows are in, attached to ``byok``.
    :param works: what is done with the rows of each table, by its name.
    :param tenants: those that the job works for; None: all.
    :param pace: what holds it back.
    :param tell: called after each batch.
    """

    def __init__(
        self,
        byok: Byok,
        engine: Engine,
        works: Mapping[str, Work],
        tenants: Sequence[str] | None,
        pace: Pace,
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        self._byok, self._engine, self._works, self._pace, self._tell = byok, engine, works, pace, tell
        self._jobs: Jobs = byok._jobs
        self._only = tenants
        self._limit: int | None = None  # of a page, as it went with the shards before

    def work(self, job: str) -> None:
        """Work until no shard is left, or the job is paused or cancelled."""
        holder = stored.holder_name()
        while self._jobs.get(job).state == stored.RUNNING:
            shard = self._jobs.claim(job, holder)
            if shard is not None:
                with suppress(LostShardError):
                    self._work_on(shard, holder)
            elif any(each.state == stored.OPEN for each in self._jobs.shards(job)):
                time.sleep(0.5)  # others work on them, and may die
            else:
                return

    def try_out(self, shards: Iterable[Mapping[str, Any]]) -> Iterator[Page]:
        """Do all the work but for storing what it makes."""
        for content in shards:
            for page, _, _ in self._pages(content, None):
                page.count(CHANGED, len(page.changes))
                yield page

    def _work_on(self, shard: Shard, holder: str) -> None:
        try:
            for page, at, is_last in self._ahead(self._pages(shard.content, shard.at)):
                started = time.monotonic()
                self._store(shard.content, page)
                counts = summed(shard.counts, page.counts)
                state = shard.state
                if is_last:
                    state = stored.DARK if counts.get(DARK) else stored.DONE
                shard = self._jobs.save(
                    shard,
                    holder=None if is_last else holder,
                    failures=[
                        failure._replace(key=key_to_json(failure.key))._asdict() for failure in page.failures
                    ],
                    at=at,
                    counts=counts,
                    state=state,
                )
                self._tell()
                if is_last:
                    return
                if self._jobs.get(shard.job).state != stored.RUNNING:
                    break
                waits = time.monotonic()
                self._pace.wait(self._engine, page.rows, waits - started)
                if time.monotonic() > waits + _OUT_OF_DATE:
                    break  # the next page was worked on before, and much may have changed
        finally:
            if shard.state == stored.OPEN:
                with suppress(LostShardError):
                    self._jobs.save(shard, holder=None)

    def _ahead(self, pages: Iterator[_Paged]) -> Iterator[_Paged]:
        """Work on the next page while the database stores the one before. SQLite does one thing at a time anyway."""
        if self._engine.dialect.name == "sqlite":
            yield from pages
            return
        with ThreadPoolExecutor(1, thread_name_prefix="byok-job") as thread:
            coming = thread.submit(next, pages, None)
            while (page := coming.result()) is not None:
                coming = thread.submit(next, pages, None)
                yield page

    def _pages(self, content: Mapping[str, Any], at: Any) -> Iterator[_Paged]:
        """What becomes of each page of a shard, with the key of its last row, and whether it is the last."""
        work, tenants = self._works[content["table"]], self._tenants()
        processors = self._processors(work.table)
        behind = key_from_json(at if at is not None else content["behind"])
        up_to, limit = key_from_json(content["up_to"]), self._limit or _FIRST_ROWS
        while True:
            started = time.monotonic()
            with self._engine.connect() as conn:
                rows = work.table.page(conn, limit, behind=behind, up_to=up_to, tenant=content["tenant"])
            page = self._worked(rows, work, tenants, processors)
            is_last, page.behind = len(rows) < limit, behind
            behind = page.up_to = rows[-1].key if rows else behind
            yield page, key_to_json(behind), is_last
            if is_last:
                return
            took = max(time.monotonic() - started, 0.001)
            limit = min(max(int(limit * min(_BATCH_TAKES / took, 4)), _FEWEST_ROWS), _MOST_ROWS)
            self._limit = limit

    def _worked(
        self, rows: Sequence[StoredRow], work: Work, tenants: Tenants, processors: Processors
    ) -> Page:
        page = work_over(rows, work, tenants, processors)
        page.prepare(work.table, self._engine.dialect)
        page.counts.update({_DARK_TENANT + tenant: 1 for tenant in tenants.dark})
        return page

    def _tenants(self) -> Tenants:
        return Tenants(self._byok._keyrings, self._byok._keystore, self._only)

    def _processors(self, table: StoredTable) -> Processors:
        return Processors(table, self._engine.dialect, self._byok._keyrings)

    # -- storing ---------------------------------------------------------------------------------------------------

    def _store(self, content: Mapping[str, Any], page: Page) -> None:
        """Store the changes of a page.

        Rows that are not any more as they were read are looked at again: whoever has changed them, a writer or another
        job, need not have done what this one is to do.
        """
        table, wanted, todo = self._works[content["table"]].table, page.rows + len(page.changes), page
        for _ in range(_TRIES):
            stored, refused = self._sent(table, todo.prepared, page)
            page.count(CHANGED, min(stored, wanted - page.rows))
            if stored + refused >= len(todo.changes):
                break
            todo = self._looked_at_again(content, page, todo)
            for outcome in (FAILED, DARK, OTHERS):
                page.count(outcome, min(todo.counts.get(outcome, 0), wanted - page.rows))
            page.counts.update({name: 1 for name in todo.counts if name.startswith(_DARK_TENANT)})
            page.failures += todo.failures
        else:
            stored = self._one_by_one(table, todo.changes, page, _UNFOUND)[0]
            page.count(CHANGED, min(stored, wanted - page.rows))
        page.count(OVERTAKEN, wanted - page.rows)

    def _looked_at_again(self, content: Mapping[str, Any], page: Page, todo: Page) -> Page:
        """What becomes of those rows of a page that were to be changed."""
        work = self._works[content["table"]]
        keys = {change.row.key for change in todo.changes} - {failure.key for failure in page.failures}
        within = {"behind": page.behind, "up_to": page.up_to, "tenant": content["tenant"]}
        with self._engine.connect() as conn:
            rows = [row for row in work.table.page(conn, None, **within) if row.key in keys]
        return self._worked(rows, work, self._tenants(), self._processors(work.table))

    def _sent(self, table: StoredTable, changes: Sequence[Prepared], page: Page) -> tuple[int, int]:
        """Store changes; how many rows were changed, and how many of them the database refused."""
        stored = refused = 0
        for prepared in changes:
            try:
                stored += self._tried(prepared)
            except IntegrityError:
                some, others = self._one_by_one(table, prepared.changes, page)
                stored, refused = stored + some, refused + others
        return stored, refused

    def _tried(self, prepared: Prepared) -> int:
        """Store changes, also where a writer's transaction and ours wait for each other; how many were stored."""
        tries = 0
        while True:
            try:
                with self._engine.begin() as conn:
                    return conn.execute(prepared.statement, prepared.parameters).rowcount
            except IntegrityError:
                raise
            except DBAPIError:
                tries += 1
                if tries == _TRIES:
                    raise
                time.sleep(0.1 * tries)

    def _one_by_one(
        self, table: StoredTable, changes: Sequence[Change], page: Page, unfound: str | None = None
    ) -> tuple[int, int]:
        """Store changes of which the database refuses some, and tell of each that it refuses.

        :param unfound: what is told of those that it does not find; None: they are left.
        :returns: how many rows were changed, and of how many was told.
        """
        stored = told = 0
        for change in changes:
            reason = unfound
            try:
                found = self._tried(table.prepared(self._engine.dialect, [change]))
            except IntegrityError:
                names = ", ".join(sorted(str(table.columns[key].name) for key in change.new))
                found = 0
                reason = (
                    f"the database refuses it: another row has the same value in a unique column ({names})"
                )
            stored += found
            if not found and reason is not None:
                told += 1
                page.count(FAILED)
                page.failures.append(Failure(table.name, change.row.key, "", reason))
        return stored, told


def summed(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Counts as they are stored, of two pieces of work."""
    total = dict(counts)
    for name, number in more.items():
        total[name] = 1 if name.startswith(_DARK_TENANT) else total.get(name, 0) + number
    return total


# -- planning and ending ---------------------------------------------------------------------------------------------


def planned_shards(
    conn: Connection, tables: Iterable[StoredTable], tenants: Sequence[str] | None, rows: int
) -> Iterator[dict[str, Any]]:
    """The shards of tables: those of tenant after tenant where a column says whose a row is, and then of nobody.

    :param tenants: in the order in which they are worked on; None: all.
    :param rows: how many a shard has.
    """
    for table in tables:
        of: list[str | None] = [None]
        if table.tenant is not None:
            of = [*(table.tenants(conn) if tenants is None else tenants)]
            if table.count(conn, tenant=NOBODY):  # whose they are is said by their values
                of.append(NOBODY)
        for tenant in of:
            behind = None
            while True:
                up_to = table.boundary(conn, rows, behind=behind, tenant=tenant)
                number = rows if up_to is not None else table.count(conn, behind=behind, tenant=tenant)
                yield {
                    "table": table.name,
                    "tenant": tenant,
                    "behind": key_to_json(behind),
                    "up_to": key_to_json(up_to),
                    "rows": number,
                }
                if up_to is None:
                    break
                behind = up_to


def report_of(jobs: Jobs, job: Job) -> Report:
    """What became of a job so far."""
    counts: dict[str, int] = {}
    for shard in jobs.shards(job.id):
        counts = summed(counts, shard.counts)
    failures = [
        Failure(each["table"], key_from_json(each["key"]) or (), each["column"], each["reason"])
        for each in jobs.failures(job.id)
    ]
    return made_report(job.id, job.kind, jobs.get(job.id).state, counts, failures)


def made_report(
    job: str, kind: str, state: str, counts: Mapping[str, int], failures: Sequence[Failure]
) -> Report:
    """A report of counts as they are stored."""
    dark = [name.removeprefix(_DARK_TENANT) for name in counts if name.startswith(_DARK_TENANT)]
    return Report(
        job,
        kind,
        state,
        {outcome: counts.get(outcome, 0) for outcome in OUTCOMES},
        {
            name: n
            for name, n in sorted(counts.items())
            if name not in OUTCOMES and not name.startswith(_DARK_TENANT)
        },
        failures,
        sorted(dark),
    )
