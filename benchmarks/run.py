"""Measures the encrypted models beside the same models in plaintext, in one run, against the budgets.

Whatever is compared takes turns, in alternating order, and of each the fastest round counts. ``--only NAME`` runs one
of the measurements, ``--full`` adds the look-up over a million rows, ``--json`` prints the figures as JSON. What is
over its budget is red, and no failure: another machine has other figures.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from measure import Clock, Figure, Report, Work, fastest, repeat
from models import (
    ASYNC,
    COLUMNS,
    STORED,
    SYNC,
    TENANT,
    Base,
    Databases,
    Plain,
    PlainEntity,
    PlainLookUp,
    Secret,
    SecretEntity,
    SecretLookUp,
    fill,
    urls,
    value,
    values,
)
from sqlalchemy import (
    URL,
    Dialect,
    Engine,
    Integer,
    TypeDecorator,
    bindparam,
    create_engine,
    delete,
    event,
    literal,
    select,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_byok import Byok, LocalKms

ROWS = 5_000
ENTITIES = 300  # of those of which one is looked up
SESSIONS = 200  # at once
POOL = 20  # connections for them
TENANTS = 2_000  # for an open one's memory
CPU: Clock = time.process_time


class Bench:
    """A Byok with one tenant, and for each database an engine that is attached and one that is not."""

    def __init__(self, folder: Path, databases: Databases, full: bool) -> None:
        self.folder, self.full, self.report = folder, full, Report()
        self.loop = asyncio.new_event_loop()
        self._close = ExitStack()
        self._close.callback(self.loop.close)
        self.customer_key = folder / "customer.key"
        self.keystore = f"sqlite:///{folder}/keystore.db"
        self.byok = Byok(keystore=self.keystore)
        self._close.callback(self.byok.close)
        self.byok.create_keystore()
        # longer than the run, so that no refresh falls into a measurement
        self.byok.onboard(TENANT, LocalKms.create(self.customer_key), revoke_within=3_600)
        self.engines, self.async_engines = cache(self._engines), cache(self._async_engines)
        self.urls = urls(folder, databases)

    @property
    def kinds(self) -> list[str]:
        """The databases that are there."""
        return list(self.urls)

    def _engines(self, kind: str) -> tuple[Engine, Engine]:
        attached, other = (create_engine(self.urls[kind].set(drivername=SYNC[kind])) for _ in range(2))
        self.byok.attach(attached)
        Base.metadata.create_all(attached)
        for engine in (attached, other):
            self._close.callback(engine.dispose)
        return attached, other

    def _async_engines(self, kind: str) -> tuple[AsyncEngine, AsyncEngine]:
        self.engines(kind)  # which makes the tables
        url = self.urls[kind].set(drivername=ASYNC[kind])
        attached, other = (create_async_engine(url, pool_size=POOL, max_overflow=0) for _ in range(2))
        self.byok.attach(attached)
        for engine in (attached, other):
            self._close.callback(lambda engine=engine: self.run(engine.dispose()))
        return attached, other

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    def close(self) -> None:
        self._close.close()


# -- values --------------------------------------------------------------------------------------------------------


class Running(TypeDecorator[int]):
    """Does some work where a statement's parameters are processed, and so with the keys of its tenant."""

    impl = Integer
    cache_ok = False

    def __init__(self, work: Callable[[Dialect], None]) -> None:
        super().__init__()
        self.work = work

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        self.work(dialect)
        return value


def measure_value_in(bench: Bench) -> None:
    """A text of 32 bytes through the bind processor, beside AES-GCM with its nonce and a key object at hand."""
    attached, _ = bench.engines("sqlite")
    cipher, text, aad, times = AESGCM(os.urandom(32)), value(1, "a"), os.urandom(60), 2_000
    plaintext, found = text.encode(), list[list[float]]()

    def bare() -> bytes:
        nonce = os.urandom(12)
        return nonce + cipher.encrypt(nonce, plaintext, aad)

    def work(dialect: Dialect) -> None:
        seal = Secret.__table__.c.a.type.bind_processor(dialect)
        assert seal is not None
        found.append(fastest([repeat(lambda: seal(text), times), repeat(bare, times)], 2, CPU))

    # A statement that needs the keys for its parameters. Several, since each has to end soon after it began.
    for _ in range(40):
        with bench.byok.session(TENANT, attached) as session:
            session.execute(
                select(SecretLookUp.id).where(SecretLookUp.mrn == text, literal(1, Running(work)) == 1)
            )
    mine, theirs = (min(each) / times for each in zip(*found, strict=True))
    bench.report.ratio("a value in ÷ AES-GCM with its nonce", mine, theirs, 1.3, "value")


def measure_value_out(bench: Bench) -> None:
    """A value of 32 bytes: what a fetch of 25,000 takes longer than one of the bytes, beside AES-GCM alone."""
    attached, other = bench.engines("sqlite")
    fill(bench.byok, attached, Secret, ROWS)
    number = ROWS * len(COLUMNS)
    statement = select(*(Secret.__table__.c[name] for name in COLUMNS))
    cipher, nonce, aad = AESGCM(os.urandom(32)), os.urandom(12), os.urandom(60)
    body = cipher.encrypt(nonce, value(1, "a").encode(), aad)
    with (
        attached.execution_options(byok_tenant=TENANT).connect() as one,
        other.connect() as another,
    ):
        stored = another.execute(select(STORED)).all()
        bench.report.add(
            Figure(
                "bytes stored beside the plaintext's", len(stored[0].a) - len(body) + 16, "bytes", budget=46
            )
        )
        opened, fetched, bare = fastest(
            [
                lambda: one.execute(statement).all(),
                lambda: another.execute(select(STORED)).all(),
                repeat(lambda: cipher.decrypt(nonce, body, aad), number),
            ],
            30,
            CPU,
        )
    bench.report.ratio(
        "a value out, of a fetch of many ÷ AES-GCM", (opened - fetched) / number, bare / number, 1.4, "value"
    )


# -- many rows -----------------------------------------------------------------------------------------------------


def measure_insert(bench: Bench) -> None:
    """Flush INSERT of 5,000 entities."""
    for kind in bench.kinds:
        attached, other = bench.engines(kind)
        for model in (Secret, Plain):
            fill(bench.byok, attached, model, 0)

        def add(session: Session, model: Any) -> None:
            session.add_all(model(**values(model, row)) for row in range(ROWS))
            session.flush()
            session.rollback()

        def mine(attached: Engine = attached) -> None:
            with bench.byok.session(TENANT, attached) as session:
                add(session, Secret)

        def theirs(other: Engine = other) -> None:
            with Session(other) as session:
                add(session, Plain)

        budget = {"sqlite": 1.38, "postgresql": 1.06}.get(kind)
        _of_rows(bench, f"flush INSERT, {attached.dialect.driver}", [mine, theirs], budget)


def measure_select(bench: Bench) -> None:
    """SELECT of 5,000 entities."""
    for kind in bench.kinds:
        attached, other = bench.engines(kind)
        for model in (Secret, Plain):
            fill(bench.byok, attached, model, ROWS)

        def mine(attached: Engine = attached) -> None:
            with bench.byok.session(TENANT, attached) as session:
                assert len(session.scalars(select(Secret)).all()) == ROWS

        def theirs(other: Engine = other) -> None:
            with Session(other) as session:
                assert len(session.scalars(select(Plain)).all()) == ROWS

        budget = {"sqlite": 2.0, "postgresql": 1.9, "mariadb": 1.5}[kind]
        _of_rows(bench, f"SELECT of entities, {attached.dialect.driver}", [mine, theirs], budget)
        if kind == "postgresql":
            _of_rows(bench, "SELECT of entities, asyncpg", _async_selects(bench), budget)


def _async_selects(bench: Bench) -> list[Work]:
    attached, other = bench.async_engines("postgresql")

    async def mine() -> None:
        async with bench.byok.asession(TENANT, attached) as session:
            assert len((await session.scalars(select(Secret))).all()) == ROWS

    async def theirs() -> None:
        async with AsyncSession(other) as session:
            assert len((await session.scalars(select(Plain))).all()) == ROWS

    return [lambda: bench.run(mine()), lambda: bench.run(theirs())]


def _of_rows(bench: Bench, what: str, works: list[Work], budget: float | None) -> None:
    mine, theirs = fastest(works, 15)
    bench.report.ratio(what, mine / ROWS, theirs / ROWS, budget, "row")


# -- one row -------------------------------------------------------------------------------------------------------


def measure_look_up(bench: Bench) -> None:
    """One row by equality, beside one by a plaintext indexed column, in a table of so many rows."""
    if "postgresql" not in bench.kinds:
        return
    attached, _ = bench.engines("postgresql")
    for rows in (10_000, 100_000, *([1_000_000] if bench.full else [])):
        for model in (SecretLookUp, PlainLookUp):
            fill(bench.byok, attached, model, rows)
        wanted = [value(1 + row * 7919 % rows, "mrn") for row in range(ENTITIES)]
        with bench.byok.session(TENANT, attached) as session:

            def look_up(model: Any, session: Session = session, wanted: list[str] = wanted) -> Work:
                def run() -> None:
                    for mrn in wanted:
                        session.execute(select(model.id).where(model.mrn == mrn)).one()

                return run

            mine, theirs = fastest([look_up(SecretLookUp), look_up(PlainLookUp)], 21)
        what = f"look-up by hash among {rows:,} rows, psycopg"
        bench.report.ratio(what, mine / ENTITIES, theirs / ENTITIES, 1.12, "query")


def measure_request(bench: Bench) -> None:
    """An entity of five encrypted columns by hash, in CPU time: in an open session, and a whole request."""
    for kind in ("sqlite", "postgresql"):
        if kind not in bench.kinds:
            continue
        attached, other = bench.engines(kind)
        for model in (SecretEntity, PlainEntity):
            fill(bench.byok, attached, model, 1_000)
        with bench.byok.session(TENANT, attached) as mine, Session(other) as theirs:
            opened = [_prepared(mine, SecretEntity), _prepared(theirs, PlainEntity)]
            what = f"an entity of 5 values by hash, CPU, all open, {attached.dialect.driver}"
            _of_entities(bench, what, opened, 1.3 if kind == "sqlite" else None)
        requests = [
            _requests(lambda attached=attached: bench.byok.session(TENANT, attached), SecretEntity),
            _requests(lambda other=other: Session(other), PlainEntity),
        ]
        what = f"an entity of 5 values by hash, CPU, a whole request, {attached.dialect.driver}"
        _of_entities(bench, what, requests, 1.35 if kind == "sqlite" else None)


def _of_entities(bench: Bench, what: str, works: list[Work], budget: float | None) -> None:
    mine, theirs = fastest(works, 40, CPU)
    bench.report.ratio(what, mine / ENTITIES, theirs / ENTITIES, budget, "entity")


def _prepared(session: Session, model: Any) -> Work:
    statement = select(model).where(model.a == bindparam("wanted"))
    wanted = [{"wanted": value(row + 1, "a")} for row in range(ENTITIES)]

    def run() -> None:
        for one in wanted:
            assert session.scalars(statement, one).one().e

    return run


def _requests(session_of: Callable[[], Any], model: Any) -> Work:
    wanted = [value(row + 1, "a") for row in range(ENTITIES)]

    def run() -> None:
        for one in wanted:
            with session_of() as session:
                assert session.scalars(select(model).where(model.a == one)).one().e

    return run


def measure_concurrent(bench: Bench) -> None:
    """200 sessions at once on asyncpg, of which each looks one row up by hash."""
    if "postgresql" not in bench.kinds:
        return
    for model in (SecretEntity, PlainEntity):
        fill(bench.byok, bench.engines("postgresql")[0], model, 1_000)
    attached, other = bench.async_engines("postgresql")

    async def look_up(opened: Any, model: Any, wanted: str) -> None:
        async with opened as session:
            assert (await session.scalars(select(model).where(model.a == wanted))).one().e

    async def all_(session_of: Callable[[], Any], model: Any) -> None:
        wanted = [value(row + 1, "a") for row in range(SESSIONS)]
        await asyncio.gather(*(look_up(session_of(), model, one) for one in wanted))

    mine, theirs = fastest(
        [
            lambda: bench.run(all_(lambda: bench.byok.asession(TENANT, attached), SecretEntity)),
            lambda: bench.run(all_(lambda: AsyncSession(other), PlainEntity)),
        ],
        40,
    )
    bench.report.add(
        Figure(
            f"throughput of {SESSIONS} sessions at once, asyncpg",
            theirs / mine,
            "×",
            f"{SESSIONS / mine:,.0f} a second",
            f"{SESSIONS / theirs:,.0f} a second",
            0.85,
            at_least=True,
        )
    )


# -- what has nothing to do with us --------------------------------------------------------------------------------


def measure_bystander(bench: Bench) -> None:
    """A statement without encrypted columns on an attached engine, with and without a tenant, in CPU time.

    Beside it: an engine that is not attached, and one with listeners that do nothing, which cost something in
    themselves.
    """
    for kind in ("sqlite", "postgresql"):
        if kind not in bench.kinds:
            continue
        attached, other = bench.engines(kind)
        with idle_listeners(other.url) as idle:
            times, owned = 100, attached.execution_options(byok_tenant=TENANT)
            works = [_reading(engine, times) for engine in (attached, owned, idle, other)]
            without, with_, listeners, bare = (each / times for each in fastest(works, 150, CPU))
        driver, report = attached.dialect.driver, bench.report
        report.difference(f"bystander, CPU, over no listeners, {driver}", without, bare, 13, "query")
        report.difference(f"bystander, CPU, over idle listeners, {driver}", without, listeners, 6, "query")
        report.difference(
            f"bystander with a tenant, CPU, over no listeners, {driver}", with_, bare, 13, "query"
        )
        report.difference(
            f"bystander with a tenant, CPU, over idle listeners, {driver}", with_, listeners, 6, "query"
        )
        report.difference(f"idle listeners themselves, CPU, {driver}", listeners, bare, None, "query")


def _reading(engine: Engine, times: int) -> Work:
    statement = select(Plain.__table__.c.number).where(Plain.__table__.c.id == bindparam("wanted"))

    def run() -> None:
        with engine.connect() as connection:
            for row in range(times):
                connection.execute(statement, {"wanted": row}).all()

    return run


@contextmanager
def idle_listeners(url: URL) -> Iterator[Engine]:
    """An engine with the listeners that an attached one has, which do nothing."""
    engine = create_engine(url)

    @event.listens_for(engine, "before_execute", retval=True)
    def before_execute(_: Any, clause: Any, multi: Any, params: Any, options: Any) -> Any:
        return clause, multi, params

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def before_cursor_execute(
        _: Any, cursor: Any, statement: Any, params: Any, context: Any, many: Any
    ) -> Any:
        return statement, params

    event.listen(engine, "after_execute", lambda *arguments: None)
    yield engine
    engine.dispose()


def measure_guard(bench: Bench) -> None:
    """The guard's walk, once for each compiled statement, beside compiling that."""
    from sqla_byok.orm.guard import Findings, Guard

    attached, _ = bench.engines("sqlite")
    guard, times = Guard("raise", "warn", Findings()), 200
    statement = (
        select(SecretEntity).where(SecretEntity.a == "x", SecretEntity.id > 1).order_by(SecretEntity.id)
    )
    compiled = statement.compile(attached)
    walk, compiling = fastest(
        [repeat(lambda: guard.judge(compiled), times), repeat(lambda: statement.compile(attached), times)], 15
    )
    bench.report.ratio("the guard's walk ÷ compiling", walk / times, compiling / times, 0.6, "statement")


# -- tenants -------------------------------------------------------------------------------------------------------


def measure_tenants(bench: Bench) -> None:
    """Entering a warm tenant, and the memory that an open one takes."""
    times = 2_000

    def enter() -> None:
        with bench.byok.tenant(TENANT):
            pass

    (took,) = fastest([repeat(enter, times)], 15)
    bench.report.add(Figure("entering a warm tenant", took / times * 1e6, "µs", budget=5))
    kms = LocalKms.create(bench.folder / "of-all.key")
    for number in range(TENANTS + 100):
        bench.byok.onboard(f"tenant-{number}", kms, revoke_within=3_600)
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("memory.py"), bench.keystore],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    bench.report.add(Figure("memory of an open tenant", float(run.stdout), "bytes", budget=16 * 1024))


def measure_kms_calls(bench: Bench) -> None:
    """KMS calls of a tenant, with no keys in memory and with them: LocalKms opens its file for each."""
    attached, _ = bench.engines("sqlite")
    calls: list[str] = []

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and str(arguments[0]) == str(bench.customer_key):
            calls.append(name)

    def work() -> int:
        calls.clear()
        with bench.byok.session(TENANT, attached) as session:
            for row in range(100):
                session.add(SecretEntity(**values(SecretEntity, row)))
                session.flush()
                session.scalars(select(SecretEntity).where(SecretEntity.a == value(row, "a"))).all()
            session.execute(delete(SecretEntity))
        return len(calls)

    sys.addaudithook(hook)  # stays for the process's life: this comes last
    bench.byok.forget_keys()
    bench.report.add(Figure("KMS calls of a tenant, cold", work(), "calls", budget=1))
    bench.report.add(Figure("KMS calls of a tenant, warm", work(), "calls", budget=0))


# -- the run -------------------------------------------------------------------------------------------------------

MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "value-in": measure_value_in,
    "value-out": measure_value_out,
    "insert": measure_insert,
    "select": measure_select,
    "look-up": measure_look_up,
    "request": measure_request,
    "concurrent": measure_concurrent,
    "bystander": measure_bystander,
    "guard": measure_guard,
    "tenants": measure_tenants,
    "kms-calls": measure_kms_calls,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures encrypted models beside the same in plaintext.")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="run this one; may be repeated")
    parser.add_argument("--full", action="store_true", help="look up over a million rows too (some minutes)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    databases = Databases()
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), databases, options.full)
            try:
                for name, measure in MEASUREMENTS.items():
                    if not options.only or name in options.only:
                        measure(bench)
            finally:
                bench.close()
    finally:
        databases.close()
    if options.json:
        print(bench.report.as_json())
    else:
        bench.report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
