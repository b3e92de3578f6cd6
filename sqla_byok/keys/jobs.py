"""What the keystore keeps of jobs: long work over rows, in shards that workers take, lose and take over.

A worker holds a shard by a lease, which it prolongs with each checkpoint. Whoever finds a lease that has ended takes
the shard over, and the worker that was late finds its checkpoint refused. All of it is compare-and-set on the version
of the shard, by the clock of the database where it has one.

What a job has done decides what is searched and what is destroyed. So each row here is authenticated by the keystore
key, as tenants' rows are: whoever can write to the keystore cannot end a job that has not run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, NoReturn

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Integer,
    Select,
    String,
    Table,
    Text,
    and_,
    extract,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import mysql

from sqla_byok.errors import ConfigurationError, KeystoreTamperedError
from sqla_byok.keys.keystore import Keystore, keystore_metadata, name_type, tag_column

__all__ = [
    "CANCELLED",
    "DARK",
    "DONE",
    "LEASE",
    "OPEN",
    "OUTCOMES",
    "PAUSED",
    "PREPARING",
    "RUNNING",
    "Job",
    "Jobs",
    "LostShardError",
    "Progress",
    "Shard",
    "holder_name",
]

PREPARING, RUNNING, PAUSED, CANCELLED, DONE = "preparing", "running", "paused", "cancelled", "done"
OPEN, DARK = "open", "dark"

OUTCOMES = ("changed", "already", "overtaken", "failed", "dark", "others")
"""What becomes of a row; each has exactly one."""

LEASE = 30.0
"""How long (seconds) a worker may go without a checkpoint before its shard is another's."""

_KEPT = 1_000  # failures between two checkpoints; beyond it they are counted only


def _long() -> Text:
    return Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")


_job = Table(
    "byok_job",
    keystore_metadata,
    Column("job", String(32), primary_key=True),
    Column("kind", String(20), nullable=False),
    Column("plan", _long(), nullable=False),
    Column("began", _long(), nullable=False),
    Column("shards", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("begun_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True), nullable=True),
    tag_column(),
)

_shard = Table(
    "byok_job_shard",
    keystore_metadata,
    Column("job", String(32), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content", Text, nullable=False),
    Column("progress", Text, nullable=False),
    Column("state", String(20), nullable=False),
    Column("version", Integer, nullable=False),
    Column("holder", String(255), nullable=True),
    Column("held_until", Double, nullable=True),
    tag_column(),
    ForeignKeyConstraint(["job"], ["byok_job.job"], ondelete="CASCADE"),
)

# What could not be done, by row. It decides nothing, and so has no tag.
_failure = Table(
    "byok_job_failure",
    keystore_metadata,
    Column("job", String(32), primary_key=True),
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content", Text, nullable=False),
    ForeignKeyConstraint(["job"], ["byok_job.job"], ondelete="CASCADE"),
)


# What a job has shown of a tenant, by name: by which salt a column's hashes are, when a generation was retired.
_note = Table(
    "byok_note",
    keystore_metadata,
    Column("tenant", name_type(), primary_key=True),
    Column("name", name_type(), primary_key=True),
    Column("content", Text, nullable=False),
    tag_column(),
    ForeignKeyConstraint(["tenant"], ["byok_tenant.tenant"], ondelete="CASCADE"),
)


class LostShardError(Exception):
    """Another worker has taken the shard over: nothing that was done since the last checkpoint is counted here."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the keystore has it.

    :ivar id: 32 hexadecimal digits.
    :ivar kind: what it does: ``"rehash"`` and the like.
    :ivar plan: over what, and how; JSON of texts, numbers and lists.
    :ivar began: the active generations with which it began, by tenant: of the data key and of the search salt.
    :ivar shards: how many it has.
    :ivar state: ``"preparing"``, ``"running"`` (both also where nobody does so just now), ``"paused"``,
        ``"cancelled"`` or ``"done"``.
    """

    id: str
    kind: str
    plan: Mapping[str, Any]
    state: str
    begun_at: datetime
    ended_at: datetime | None
    began: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shards: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a job.

    :ivar content: which rows; JSON.
    :ivar at: behind which key to go on; None: at the beginning.
    :ivar counts: rows by outcome.
    :ivar state: ``"open"``, ``"done"``, or ``"dark"`` where rows of tenants were left whose KMS says no.
    """

    job: str
    number: int
    content: Mapping[str, Any]
    at: Any = None
    counts: Mapping[str, int] = field(default_factory=dict)
    state: str = OPEN
    version: int = 0
    holder: str | None = None

    @property
    def progress(self) -> str:
        """What is stored of how far it is."""
        return _json({"at": self.at, "counts": dict(self.counts)})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    :ivar rows: how many rows were looked at; ``of``: how many there were when it began.
    :ivar counts: rows by outcome.
    """

    rows: int
    of: int
    counts: Mapping[str, int]


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


class Jobs:
    """Reads and writes the keystore's tables of jobs.

    :param keystore: the keystore that they are in.
    """

    def __init__(self, keystore: Keystore) -> None:
        self._keystore = keystore
        self._database = keystore.database

    # -- jobs ------------------------------------------------------------------------------------------------------

    def start(self, kind: str, plan: Mapping[str, Any]) -> Job:
        """Store a new job, which is to be prepared."""
        job = Job(secrets.token_hex(16), kind, plan, PREPARING, datetime.now(timezone.utc), None)

        def work(connection: Connection) -> None:
            connection.execute(
                insert(_job).values(
                    job=job.id,
                    kind=kind,
                    plan=_json(plan),
                    began=_json({}),
                    shards=job.shards,
                    state=PREPARING,
                    begun_at=job.begun_at,
                    tag=self._tag(job),
                )
            )

        self._database.write(work)
        return job

    def all(self) -> list[Job]:
        """All jobs, the newest first."""
        return self._jobs(select(_job).order_by(_job.c.begun_at.desc()))

    def get(self, job: str) -> Job:
        """One job.

        :raises ConfigurationError: there is none of that id.
        """
        found = self._jobs(select(_job).where(_job.c.job == job))
        if not found:
            raise ConfigurationError(f"there is no job {job!r} in the keystore")
        return found[0]

    def unfinished(self, kind: str, plan: Mapping[str, Any]) -> Job | None:
        """The job of this kind and plan that is not at its end; the newest."""
        statement = select(_job).where(_job.c.kind == kind, _job.c.state.in_((PREPARING, RUNNING, PAUSED)))
        wanted = _json(plan)  # compared here: a database may take upper and lower case for one
        found = self._jobs(statement.order_by(_job.c.begun_at.desc()))
        return next((job for job in found if _json(job.plan) == wanted), None)

    def set_state(self, job: Job, state: str) -> Job:
        """Pause, go on, cancel or end a job. Workers see it at their next checkpoint.

        :returns: the job as it is then; one that is at its end stays as it is.
        """
        ended = datetime.now(timezone.utc) if state in (CANCELLED, DONE) else None
        while True:
            now = self.get(job.id)  # what was given may be older than what somebody has stored since
            if now.state in (CANCELLED, DONE):
                return now
            new = replace(now, state=state, ended_at=ended)
            if self._replaced(now, new):
                return new

    def _replaced(self, now: Job, new: Job) -> bool:
        """Store a job in another state, where it is as it was read."""
        change = (
            update(_job)
            .where(_job.c.job == now.id, _job.c.state == now.state, _job.c.shards == now.shards)
            .values(state=new.state, ended_at=new.ended_at, tag=self._tag(new))
        )
        return self._database.write(lambda connection: connection.execute(change).rowcount) == 1

    def begin(self, job: Job, began: Mapping[str, Sequence[int]], shards: Iterable[Mapping[str, Any]]) -> Job:
        """Let a job that was prepared run; where another runner was faster, its shards hold.

        :param began: the active generations of its tenants.
        :param shards: which rows each of its shards has.
        """
        made = [Shard(job.id, number, content) for number, content in enumerate(shards)]
        new = replace(job, state=RUNNING, began=dict(began), shards=len(made))
        values = {"state": RUNNING, "began": _json(new.began), "shards": new.shards, "tag": self._tag(new)}

        def work(connection: Connection) -> None:
            mine = _job.c.job == job.id, _job.c.state == PREPARING
            if connection.execute(update(_job).where(*mine).values(**values)).rowcount != 1:
                return
            rows = [
                self._row_of(shard, content=_json(shard.content), job=job.id, number=shard.number)
                for shard in made
            ]
            if rows:
                connection.execute(insert(_shard), rows)

        self._database.write(work)
        return self.get(job.id)

    def _jobs(self, statement: Any) -> list[Job]:
        rows = self._database.read(lambda connection: connection.execute(statement).all())
        found = []
        for row in rows:
            job = None
            with suppress(ValueError):
                job = Job(
                    row.job,
                    row.kind,
                    json.loads(row.plan),
                    row.state,
                    _utc(row.begun_at),
                    _utc(row.ended_at),
                    json.loads(row.began),
                    row.shards,
                )
            if job is None:
                self._refuse(row.job)
            self._authenticate(row.job, row.tag, self._tag(job))
            found.append(job)
        return found

    # -- shards ----------------------------------------------------------------------------------------------------

    def shards(self, job: str) -> list[Shard]:
        """All shards of a job.

        :raises KeystoreTamperedError: some were altered, or taken away.
        """
        found = self._shards(lambda _: select(_shard).where(_shard.c.job == job).order_by(_shard.c.number))
        if len(found) != self.get(job).shards:
            self._refuse(job)
        return found

    def progress(self, job: str) -> Progress:
        """How far a job is, by what its workers have stored."""
        shards = self.shards(job)
        counts = {outcome: sum(shard.counts.get(outcome, 0) for shard in shards) for outcome in OUTCOMES}
        return Progress(sum(counts.values()), sum(shard.content["rows"] for shard in shards), counts)

    def claim(self, job: str, holder: str) -> Shard | None:
        """Take the next shard that nobody works on; None where there is none just now."""
        while True:
            found = self._shards(
                lambda connection: (
                    select(_shard)
                    .where(
                        _shard.c.job == job,
                        _shard.c.state == OPEN,
                        or_(
                            _shard.c.holder.is_(None),
                            _shard.c.held_until.is_(None),
                            _shard.c.held_until < _now(connection),
                            _shard.c.holder.in_(self._dead(connection, job)),
                        ),
                    )
                    .order_by(_shard.c.number)
                    .limit(1)
                )
            )
            if not found:
                return None
            with suppress(LostShardError):  # another worker was faster
                return self.save(found[0], holder=holder)

    def save(
        self,
        shard: Shard,
        *,
        holder: str | None,
        failures: Sequence[Mapping[str, Any]] = (),
        **changes: Any,
    ) -> Shard:
        """Store how far a shard is, and who holds it from now on for another :data:`LEASE` seconds.

        :param failures: what could not be done since it was last stored.
        :param changes: the fields that change.
        :raises LostShardError: somebody else has stored it meanwhile.
        """
        new = replace(shard, holder=holder, version=shard.version + 1, **changes)

        def work(connection: Connection) -> None:
            until = None if holder is None else _now(connection) + LEASE
            changed = connection.execute(
                update(_shard)
                .where(
                    _shard.c.job == shard.job,
                    _shard.c.number == shard.number,
                    _shard.c.version == shard.version,
                )
                .values(**self._row_of(new, held_until=until))
            )
            if changed.rowcount != 1:
                raise LostShardError
            rows = [
                {"job": shard.job, "shard": shard.number, "number": number, "content": _json(failure)}
                for number, failure in enumerate(failures[:_KEPT], new.version * _KEPT)
            ]
            if rows:
                connection.execute(insert(_failure), rows)

        self._database.write(work)
        return new

    def begin_again(self, job: str) -> None:
        """Open the shards anew in which rows of dark tenants were left."""
        for shard in self.shards(job):
            if shard.state == DARK:
                self._forget_failures(shard)
                with suppress(LostShardError):
                    self.save(shard, holder=None, state=OPEN, at=None, counts={})

    def failures(self, job: str) -> list[Mapping[str, Any]]:
        """What could not be done, by row; between two checkpoints the first 1,000."""
        rows = self._database.read(
            lambda connection: connection.scalars(
                select(_failure.c.content)
                .where(_failure.c.job == job)
                .order_by(_failure.c.shard, _failure.c.number)
            ).all()
        )
        return [json.loads(row) for row in rows]

    def _forget_failures(self, shard: Shard) -> None:
        ours = and_(_failure.c.job == shard.job, _failure.c.shard == shard.number)
        self._database.write(lambda connection: connection.execute(_failure.delete().where(ours)))

    def _shards(self, statement: Callable[[Connection], Select[Any]]) -> list[Shard]:
        def work(connection: Connection) -> Sequence[Any]:
            return connection.execute(statement(connection)).all()

        found = []
        for row in self._database.read(work):
            shard = None
            with suppress(ValueError, TypeError, KeyError):
                progress = json.loads(row.progress)
                shard = Shard(
                    row.job, row.number, json.loads(row.content), progress["at"], progress["counts"],
                    row.state, row.version, row.holder,
                )  # fmt: skip
            if shard is None:
                self._refuse(row.job)
            self._authenticate(row.job, row.tag, self._shard_tag(shard))
            found.append(shard)
        return found

    def _row_of(self, shard: Shard, **more: Any) -> dict[str, Any]:
        return {
            "progress": shard.progress,
            "state": shard.state,
            "version": shard.version,
            "holder": shard.holder,
            "tag": self._shard_tag(shard),
            **more,
        }

    # -- what was shown of tenants -----------------------------------------------------------------------------------

    def note(self, tenant: str, name: str, content: Mapping[str, Any]) -> None:
        """Keep something of a tenant, in the place of what had the name."""
        row = {"tenant": tenant, "name": _short_name(name), "content": _json(content)}
        mine = and_(_note.c.tenant == tenant, _note.c.name == row["name"])

        def work(connection: Connection) -> None:
            connection.execute(_note.delete().where(mine))
            connection.execute(insert(_note).values(**row, tag=self._note_tag(row)))

        self._database.write(work)

    def noted(self, tenant: str, name: str) -> Mapping[str, Any] | None:
        """What was kept; None where nothing was.

        :raises KeystoreTamperedError: it was altered.
        """
        mine = and_(_note.c.tenant == tenant, _note.c.name == _short_name(name))
        row = self._database.read(lambda connection: connection.execute(select(_note).where(mine)).first())
        if row is None:
            return None
        self._authenticate(f"note {name}", row.tag, self._note_tag(dict(row._mapping)))
        found: Mapping[str, Any] = json.loads(row.content)
        return found

    def _note_tag(self, row: Mapping[str, Any]) -> bytes | None:
        return self._keystore.mac("sqla-byok/1/note", row["tenant"], row["name"], row["content"])

    # -- who holds what --------------------------------------------------------------------------------------------

    def _dead(self, connection: Connection, job: str) -> list[str]:
        """Holders on this machine whose process is gone: nobody has to wait for their leases."""
        holders = connection.scalars(
            select(_shard.c.holder).where(_shard.c.job == job, _shard.c.holder.is_not(None)).distinct()
        )
        return [holder for holder in holders if _is_gone(holder)]

    # -- authentication --------------------------------------------------------------------------------------------

    def _tag(self, job: Job) -> bytes | None:
        ended = "" if job.ended_at is None else "ended"
        return self._keystore.mac(
            "sqla-byok/1/job",
            job.id,
            job.kind,
            _json(job.plan),
            _json(job.began),
            str(job.shards),
            job.state,
            ended,
        )

    def _shard_tag(self, shard: Shard) -> bytes | None:
        return self._keystore.mac(
            "sqla-byok/1/job-shard",
            shard.job,
            str(shard.number),
            _json(shard.content),
            shard.progress,
            shard.state,
        )

    def _authenticate(self, job: str, found: Any, wanted: bytes | None) -> None:
        if wanted is None and not self._keystore.authenticates and found is None:
            return
        if wanted is None or not isinstance(found, bytes) or not hmac.compare_digest(found, wanted):
            self._refuse(job)

    @staticmethod
    def _refuse(job: str) -> NoReturn:
        raise KeystoreTamperedError(
            f"what the keystore holds of job {job!r} does not authenticate: it was altered, or written under another "
            "keystore key. Nothing of it was used; start the job anew"
        )


def _short_name(name: str) -> str:
    # A column id may be of any length; the database's index takes 255 characters.
    return name if len(name) <= 255 else f"{name[:190]}#{hashlib.sha256(name.encode()).hexdigest()}"


def holder_name() -> str:
    """A name for a worker, by which others on its machine can tell whether its process still runs."""
    return f"{socket.gethostname()[:150]}/{os.getpid()}/{_started(os.getpid())}/{secrets.token_hex(8)}"


def _is_gone(holder: str) -> bool:
    host, _, rest = holder.partition("/")
    pid, _, rest = rest.partition("/")
    started = rest.partition("/")[0]
    return host == socket.gethostname()[:150] and pid.isdecimal() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process was started, in the kernel's units; empty where there is none, or nobody can tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            state, *fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _now(connection: Connection) -> float:
    """Seconds since the epoch, by the keystore's own clock: its workers' clocks need not agree."""
    clocks = {
        "postgresql": extract("epoch", func.clock_timestamp()),
        "mysql": func.unix_timestamp(func.now(6)),
        "mariadb": func.unix_timestamp(func.now(6)),
    }
    clock = clocks.get(connection.dialect.name)
    return time.time() if clock is None else float(connection.execute(select(clock)).scalar_one())


def _utc(stored: datetime | None) -> Any:
    # SQLite and MySQL keep no zone.
    return stored if stored is None or stored.tzinfo is not None else stored.replace(tzinfo=timezone.utc)
