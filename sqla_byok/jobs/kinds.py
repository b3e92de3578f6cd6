"""The jobs themselves: what each is over, what it needs before its first row, and what it ends with."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypedDict

from sqlalchemy import Engine, Table, create_engine
from typing_extensions import Unpack

from sqla_byok.crypto.formats import DATA_KEY, SEARCH_SALT
from sqla_byok.errors import ConfigurationError
from sqla_byok.jobs.plans import columns_of, database_of, elsewhere, engine_of, entry_of, plan_of, works_of
from sqla_byok.jobs.rows import DARK, FAILED, OTHERS
from sqla_byok.jobs.runner import (
    SHARD_ROWS,
    Pace,
    Report,
    Runner,
    made_report,
    planned_shards,
    report_of,
    summed,
)
from sqla_byok.jobs.searching import Hashed, Searching, give_up
from sqla_byok.keys.jobs import CANCELLED, DONE, OPEN, PREPARING, RUNNING, Job, Progress
from sqla_byok.keys.jobs import DARK as DARK_ROWS
from sqla_byok.orm.chosen import hashes_in, values_in
from sqla_byok.orm.namesakes import declared_tables
from sqla_byok.orm.stored import NOBODY, StoredTable
from sqla_byok.runtime import Byok

__all__ = ["How", "cancel", "reencrypt", "rehash", "resume", "verify"]

REENCRYPT, REHASH, VERIFY = "reencrypt", "rehash", "verify"


class How(TypedDict, total=False):
    """How a job is run; what all jobs take.

    :ivar tenants: whose rows, in the order in which they are worked on, where a column says whose a row is; all unless
        given.
    :ivar workers: how many work at once; 1 unless given. They are threads, which is enough where the database is what
        takes the time; with ``app`` they are processes.
    :ivar executor: whose workers they are: any :class:`concurrent.futures.Executor`. One whose workers are other
        processes needs ``app``.
    :ivar app: where workers in other processes find the Byok, as ``"package.module:attribute"``; importing it has to
        declare the models and attach the engine, or ``BYOK_DATABASE`` in their environment to be its URL.
    :ivar pace: what holds the job back.
    :ivar on_progress: called with a :class:`Progress` now and then.
    :ivar dry_run: whether nothing is stored, neither in the rows nor in the keystore.
    """

    tenants: Sequence[str]
    workers: int
    executor: Executor
    app: str
    pace: Pace
    on_progress: Callable[[Progress], object]
    dry_run: bool


def reencrypt(byok: Byok, engine: Engine | None, /, *what: Any, **how: Unpack[How]) -> Report:
    """Bring every stored value under its tenant's active data key, and to the declared padding and mode.

    ::

        byok.rotate_data_key("org-42")
        reencrypt(byok, engine, Base, tenants=["org-42"])

    Plaintexts stay as they are, to the byte, and hashes are not touched. Begins with 21 seconds in which everybody
    comes to know the active key. Called again after it was interrupted, it goes on where it was.

    :param byok: opens the tenants: one KMS call each.
    :param engine: of the database that the rows are in; None: the only one that was attached.
    :param what: models, tables or encrypted attributes; all models unless given.
    :param how: see :class:`How`.
    :raises ConfigurationError: a table has no primary key; the engine is not attached; something is no model.
    """
    engine = engine_of(byok, engine)
    over = columns_of(engine, what)
    entries = {
        table.fullname: entry_of(table, values_in(table, keys), [])
        for table, keys in over.items()
        if values_in(table, keys)
    }
    return _Run(byok, engine, REENCRYPT, plan_of(byok, engine, entries, how.get("tenants")), how, over).go()


def rehash(
    byok: Byok,
    engine: Engine | None,
    /,
    *what: Any,
    open_search: bool | None = None,
    **how: Unpack[How],
) -> Report:
    """Hash the rows of searchable columns and hash indexes as the models declare, by the active search salt.

    ::

        rehash(byok, engine, Patient.mrn, Patient.phone_last4)

    It is run when a column became searchable in a table with rows, when its normalizer, transform, hash or salt scope
    has changed, after ``set_searchable`` has enabled it, and after ``rotate_salt``. Run it when all processes have
    models that declare it so: from its begin on, those with others are refused to write to the table
    (:class:`HashSpecChangedError`). Until it is done the columns cannot be searched, unless they could be before
    and only the salt is another. What has its hash already is left alone.

    Takes, what :func:`reencrypt` takes; begins with 21 seconds, or twice as many where the search has to be closed.

    :param open_search: whether the search is opened at the end, which is right where all rows were hashed. Where a
        table is in several databases, give False for all of them but the last, and True for that.
    :raises ConfigurationError: a unique column's hashes are made in another way than before; another attached
        database has one of the tables too, and ``open_search`` is not given; and as above.
    """
    engine = engine_of(byok, engine)
    over = columns_of(engine, what)
    entries = {
        table.fullname: entry_of(table, [], hashes_in(table, keys))
        for table, keys in over.items()
        if hashes_in(table, keys)
    }
    if not entries:
        raise ConfigurationError("nothing of it has hashes; declare columns searchable, or a hash_index")
    if open_search is None and (there := elsewhere(byok, engine, over)) is not None:
        raise ConfigurationError(
            f"there is {there} too, and its rows are hashed by a job of their own: give open_search=False ('byok "
            "rehash --leave-closed') for all databases but the last, and open_search=True (--open-search) for that one"
        )
    plan = plan_of(byok, engine, entries, how.get("tenants"), opens=open_search is not False)
    return _Run(byok, engine, REHASH, plan, how, over).go()


def verify(
    byok: Byok,
    engine: Engine | None,
    /,
    *what: Any,
    repair: bool = False,
    open_search: bool = False,
    **how: Unpack[How],
) -> Report:
    """Open every value and compute every hash anew, and tell of each row that is not as it should be.

    Finds values that were altered, that are another tenant's or plaintext; hashes that are missing, planted or of an
    older value. ``found`` has, by column, under which data key how many values are.

    :param repair: mend hashes; values cannot be mended.
    :param open_search: open the search of the columns, if all is as it should be: for whoever has hashed the rows by a
        program of his own. From its begin on models that hash them otherwise are refused, as by :func:`rehash`.
    """
    engine = engine_of(byok, engine)
    over = columns_of(engine, what)
    entries = {
        table.fullname: {
            **entry_of(table, values_in(table, keys), hashes_in(table, keys)),
            "verify": {"repair": repair},
        }
        for table, keys in over.items()
    }
    plan = plan_of(byok, engine, entries, how.get("tenants"), opens=open_search)
    return _Run(byok, engine, VERIFY, plan, how, over).go()


def resume(byok: Byok, engine: Engine | None, job: str, **how: Unpack[How]) -> Report:
    """Go on with a job by its id, whoever began it, also one that was paused."""
    found = byok._jobs.get(job)
    if found.state in (CANCELLED, DONE):
        raise ConfigurationError(f"the job {job!r} is {found.state}; begin another")
    engine = engine_of(byok, engine)
    if found.plan["database"] != database_of(engine):
        raise ConfigurationError(
            f"the job {job!r} is over the database {found.plan['database']!r}, and this is {database_of(engine)!r}; "
            "give that one's engine, by the same address, or cancel the job and begin another"
        )
    return _Run(byok, engine, found.kind, found.plan, how, declared_tables()).go(found)


def cancel(byok: Byok, job: str) -> None:
    """End a job for good. What it has done stays; columns that it was hashing cannot be searched until a re-hash.

    :raises ConfigurationError: it is at its end already, or there is none of that id.
    """
    found = byok._jobs.get(job)
    if found.state in (CANCELLED, DONE):
        raise ConfigurationError(f"the job {job!r} is {found.state} already")
    byok._jobs.set_state(found, CANCELLED)
    give_up(byok, job)


class _Run:
    """One call of a job."""

    def __init__(
        self,
        byok: Byok,
        engine: Engine,
        kind: str,
        plan: Mapping[str, Any],
        how: How,
        tables: Iterable[Table],
    ) -> None:
        self._byok, self._kind, self._plan, self._how = byok, kind, plan, how
        self._engine = engine
        self._works, self._tenants = works_of(plan, tables), plan["tenants"]
        hashed = [
            each for work in self._works.values() for each in Hashed.in_table(work.table, work.table.hashes)
        ]
        self._searching = Searching(byok, hashed, self._tenants) if kind == REHASH or plan["opens"] else None

    def go(self, job: Job | None = None) -> Report:
        if self._how.get("dry_run"):
            return self._tried()
        with self._engine.connect() as conn:
            for table in self._tables():
                table.refuse_keys(conn)
        if self._searching is not None:
            self._searching.check()
        jobs = self._byok._jobs
        job = job or jobs.unfinished(self._kind, self._plan)
        if job is not None and not job.shards:  # it was paused before it had any
            job = jobs.set_state(job, PREPARING)
        if job is not None and job.state != PREPARING and self._is_outdated(job):
            jobs.set_state(job, CANCELLED)
            job = None
        job = job or jobs.start(self._kind, self._plan)
        job = self._prepared(job) if job.state == PREPARING else self._resumed(job)
        self._work(job)
        return self._ended(job)

    def _tables(self) -> list[StoredTable]:
        return [work.table for work in self._works.values()]

    def _is_outdated(self, job: Job) -> bool:
        """Whether what a job has done holds no more: it is begun anew then, with other shards.

        So it is where somebody has closed the search of its columns for another release or job since, and where a
        tenant has other keys than when it began.
        """
        if self._searching is not None and not self._searching.is_closed(job.id):
            return True
        looks_only = self._kind == VERIFY and self._searching is None
        return not looks_only and _differ(job.began, self._generations(), 0 if self._kind == REENCRYPT else 1)

    def _prepared(self, job: Job) -> Job:
        """The job, running. Its shards are planned last: whoever writes first rows later writes them right."""
        # Looked up before it settles: whoever rotates meanwhile is not taken for having been waited for.
        now = self._generations()
        closed = self._searching is not None and self._searching.close(job.id)
        if not closed and (self._kind != VERIFY or self._searching is not None):
            self._byok._generations.settle()
        with self._engine.connect() as conn:
            shards = list(planned_shards(conn, self._tables(), self._tenants, SHARD_ROWS))
        return self._byok._jobs.begin(job, now, shards)

    def _resumed(self, job: Job) -> Job:
        self._byok._jobs.begin_again(job.id)
        return self._byok._jobs.set_state(job, RUNNING)

    def _generations(self) -> dict[str, list[int]]:
        """The active generations of its tenants, and of its columns' owners: of the data key and of the search salt."""
        mine = None if self._tenants is None else {*self._tenants, *self._owners()}
        return {
            tenant: [of[DATA_KEY], of[SEARCH_SALT]]
            for tenant, of in self._byok._keystore.active_generations().items()
            if mine is None or tenant in mine
        }

    def _owners(self) -> set[str]:
        owners = {owner for table in self._tables() for owner in table.owners.values()}
        return {owner for owner in owners if owner is not None}

    def _work(self, job: Job) -> None:
        """Have it worked on: in this thread, in threads of its own or given ones, or in other processes."""
        executor, workers = self._how.get("executor"), self._how.get("workers", 1)
        if executor is not None:
            self._work_by(executor, job)
        elif workers == 1:
            self._runner(lambda: self._tell(job)).work(job.id)
        else:
            with _own_workers(workers, in_processes="app" in self._how) as own:
                self._work_by(own, job)

    def _work_by(self, executor: Executor, job: Job) -> None:
        workers, app = self._how.get("workers", 1), self._how.get("app")
        if isinstance(executor, ThreadPoolExecutor):
            self._wait_for([executor.submit(self._runner().work, job.id) for _ in range(workers)], job)
            return
        if app is None:
            raise ConfigurationError("workers in other processes need app='package.module:attribute'")
        place, pace = self._byok.engines.index(self._engine), self._how.get("pace", Pace())
        self._wait_for([executor.submit(work_as_one, app, place, job.id, pace) for _ in range(workers)], job)
        self._runner().work(job.id)  # what a worker that died has left

    def _wait_for(self, waiting: Iterable[Future[Any]], job: Job) -> None:
        left = set(waiting)
        while left:
            done, left = wait(left, timeout=1)
            self._tell(job)
            for each in done:
                each.result()

    def _runner(self, tell: Callable[[], object] = lambda: None) -> Runner:
        pace = self._how.get("pace", Pace())
        return Runner(self._byok, self._engine, self._works, self._tenants, pace, tell)

    def _tell(self, job: Job) -> None:
        tell = self._how.get("on_progress")
        if tell is not None:
            tell(self._byok._jobs.progress(job.id))

    def _ended(self, job: Job) -> Report:
        jobs = self._byok._jobs
        shards = jobs.shards(job.id)
        report = report_of(jobs, job)
        if report.state != RUNNING:  # paused or cancelled
            return report
        if self._searching is not None and self._plan["opens"]:

            def is_done(tenant: str, column: Hashed) -> bool:
                mine = [each for each in shards if each.content["table"] == column.table]
                if column.owner is not None:  # the rows of all tenants
                    left = (FAILED, DARK, OTHERS)
                    return all(each.state != OPEN and not any(map(each.counts.get, left)) for each in mine)
                mine = [each for each in mine if each.content["tenant"] in (None, NOBODY, tenant)]
                if tenant in report.dark or any(
                    each.state == OPEN or each.counts.get(FAILED) for each in mine
                ):
                    return False
                return not any(each.content["tenant"] == tenant and each.counts.get(DARK) for each in mine)

            salts = {tenant: began[1] for tenant, began in job.began.items()}
            self._searching.open(is_done, salts, job.id)
        if not any(shard.state == DARK_ROWS for shard in shards):
            jobs.set_state(job, DONE)
        return replace(report, state=jobs.get(job.id).state)

    def _tried(self) -> Report:
        counts: dict[str, int] = {}
        failures = []
        with self._engine.connect() as conn:
            shards = list(planned_shards(conn, self._tables(), self._tenants, SHARD_ROWS))
        for page in self._runner().try_out(shards):
            failures += page.failures
            counts = summed(counts, page.counts)
        return made_report("", self._kind, "dry run", counts, failures)


def _differ(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]], place: int) -> bool:
    return any(tenant in now and now[tenant][place] != of[place] for tenant, of in before.items())


def _own_workers(workers: int, in_processes: bool) -> Executor:
    if not in_processes:
        return ThreadPoolExecutor(workers, thread_name_prefix="byok-job")
    # Importing them makes a second __main__; only those who have workers in processes need it.
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


DATABASE = "BYOK_DATABASE"
"""The environment's variable with the URL of the database, where importing the application does not attach it."""


def work_as_one(app: str, place: int, job: str, pace: Pace) -> None:
    """Work on a job as one of its workers, in a process of its own.

    What it is given may be seen by whoever sees an executor's tasks, so no URL with a password is among it.

    :param app: where the Byok is found.
    :param place: of the engine among those that are attached; where importing the application attaches less, it is
        that of :data:`DATABASE`.
    :raises ConfigurationError: it is in neither.
    """
    byok = found_app(app)
    if place >= len(byok.engines):
        url = os.environ.get(DATABASE)
        if url is None:
            raise ConfigurationError(
                f"importing {app} attaches no engine of the database that the job is over; attach it there, or set "
                f"{DATABASE} to its URL"
            )
        byok.attach(create_engine(url))
        place = -1
    plan = byok._jobs.get(job).plan
    Runner(byok, byok.engines[place], works_of(plan, declared_tables()), plan["tenants"], pace).work(job)


def found_app(app: str) -> Byok:
    """The Byok of ``"package.module:attribute"``; a function of that name is called.

    :raises ConfigurationError: there is none.
    """
    module, _, attribute = app.partition(":")
    if not module or module.startswith("."):
        raise ConfigurationError(f"{app}: give package.module:attribute, by its whole name")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(f"{app}: {error}") from error
    for name in (attribute or "byok").split("."):
        found = getattr(found, name, None)
    if callable(found):
        found = found()
    if not isinstance(found, Byok):
        raise ConfigurationError(f"{app}: there is no Byok; give package.module:attribute")
    return found
