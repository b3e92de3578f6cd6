"""The first benchmark: the encrypted model beside the same model in plaintext, in one run, against the budgets.

The two take turns, in alternating order, and of each the fastest round counts, so that whatever else the machine does
falls on neither. ``--full`` adds the look-up over a million rows.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, Integer, String, create_engine, event, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from databases import SYNC, Databases, NotFoundError

from sqla_byok import Byok, Encrypted, LocalKms

ROWS = 5_000
TENANT = "org-42"


class Base(DeclarativeBase):
    pass


class Plain(Base):
    __tablename__ = "bench_plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    a: Mapped[str] = mapped_column(String(40), index=True)
    b: Mapped[str] = mapped_column(String(40))
    c: Mapped[str] = mapped_column(String(40))
    d: Mapped[str] = mapped_column(String(40))
    e: Mapped[str] = mapped_column(String(40))


class Secret(Base):
    __tablename__ = "bench_encrypted"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    a: Mapped[str] = mapped_column(Encrypted(String(40)))
    b: Mapped[str] = mapped_column(Encrypted(String(40)))
    c: Mapped[str] = mapped_column(Encrypted(String(40)))
    d: Mapped[str] = mapped_column(Encrypted(String(40)))
    e: Mapped[str] = mapped_column(Encrypted(String(40)))


class PlainLookUp(Base):
    __tablename__ = "bench_plain_look_up"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(String(40), index=True)


class SecretLookUp(Base):
    __tablename__ = "bench_encrypted_look_up"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True))


def value(row: int, column: str) -> str:
    """A text of 32 characters."""
    return f"{column}-{row:030d}"


# -- measuring -----------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    finally:
        gc.enable()


def ratio(
    encrypted: Callable[[], object], plain: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """The fastest of the rounds of each, as a ratio and in seconds; the two take turns, in alternating order."""
    mine, theirs = [seconds(encrypted)], [seconds(plain)]
    for number in range(rounds):
        first, second = (mine, encrypted), (theirs, plain)
        for times, work in (first, second) if number % 2 else (second, first):
            times.append(seconds(work))
    return min(mine) / min(theirs), min(mine), min(theirs)


def repeat(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


class Report:
    """Gathers a line for each figure and says whether it is within its budget."""

    def __init__(self) -> None:
        self.table = Table(
            "what", "encrypted", "plain", "measured", "budget", title="sqla_byok beside plaintext"
        )
        self.over: list[str] = []

    def ratio(
        self, what: str, measured: tuple[float, float, float], budget: float, per: int, unit: str
    ) -> None:
        quotient, mine, theirs = measured
        self.add(
            what,
            f"{mine / per * 1e6:.2f} µs/{unit}",
            f"{theirs / per * 1e6:.2f} µs/{unit}",
            quotient,
            budget,
            "×",
        )

    def add(self, what: str, mine: str, theirs: str, measured: float, budget: float, unit: str) -> None:
        fits = measured <= budget
        if not fits:
            self.over.append(what)
        colour = "green" if fits else "red"
        shown = f"{measured:.2f}" if measured < 100 else f"{measured:,.0f}"
        self.table.add_row(what, mine, theirs, f"[{colour}]{shown} {unit}[/]", f"≤ {budget:g} {unit}")


# -- what is measured ----------------------------------------------------------------------------------------------


def measure_values(report: Report, byok: Byok, engine: Engine) -> None:
    """One 32-byte value through the processors, beside AES-GCM alone with a key object at hand."""
    from sqla_byok.orm.slots import slot_of

    type_ = Secret.__table__.c.a.type
    seal, unseal = type_.bind_processor(engine.dialect), type_.result_processor(engine.dialect, None)
    slot, text_ = slot_of(engine.dialect), value(1, "a")
    cipher, plaintext, aad = AESGCM(os.urandom(32)), text_.encode(), b"x" * 60

    def bare_seal() -> bytes:
        nonce = os.urandom(12)
        return nonce + cipher.encrypt(nonce, plaintext, aad)

    with byok.tenant(TENANT):
        ring = byok._keyrings.get(TENANT)
        slot.binding.set(ring)
        slot.reading.set(ring)
        stored, bare = seal(text_), bare_seal()
        nonce, body = bare[:12], bare[12:]
        times = 5_000
        measured = ratio(repeat(lambda: seal(text_), times), repeat(bare_seal, times), 60)
        report.ratio("value, bind ÷ AESGCM with its nonce", measured, 1.5, times, "value")
        report.ratio(
            "value, result ÷ AESGCM",
            ratio(repeat(lambda: unseal(stored), times), repeat(lambda: cipher.decrypt(nonce, body, aad), times), 60),
            1.5, times, "value",
        )  # fmt: skip
        report.add("stored bytes over the plaintext", "", "", len(stored) - len(plaintext), 46, "bytes")
        slot.binding.set(None)
        slot.reading.set(None)


def measure_rows(report: Report, byok: Byok, engine: Engine, budgets: tuple[float, float]) -> None:
    """5,000 rows of five columns: flush INSERT, and SELECT of entities."""

    def add(model: Any) -> None:
        with byok.session(TENANT, engine) as session:
            session.add_all(
                model(number=row, **{column: value(row, column) for column in "abcde"}) for row in range(ROWS)
            )
            session.flush()
            session.rollback()

    def load(model: Any) -> None:
        with byok.session(TENANT, engine) as session:
            assert len(session.scalars(select(model)).all()) == ROWS

    rounds = 15
    insert_budget, select_budget = budgets
    name = engine.dialect.name
    report.ratio(
        f"flush INSERT, {name}",
        ratio(lambda: add(Secret), lambda: add(Plain), rounds),
        insert_budget,
        ROWS,
        "row",
    )
    for model in (Secret, Plain):
        fill(byok, engine, model, ROWS)
    report.ratio(
        f"SELECT of entities, {name}",
        ratio(lambda: load(Secret), lambda: load(Plain), rounds),
        select_budget,
        ROWS,
        "row",
    )


def fill(byok: Byok, engine: Engine, model: Any, rows: int) -> None:
    columns = [
        column.key
        for column in model.__table__.c
        if column.key not in ("id", "number") and column.key[-5:] != "_hash"
    ]
    with byok.tenant(TENANT), engine.begin() as connection:
        for start in range(0, rows, 10_000):
            batch = [
                {"id": row, **({"number": row} if "number" in model.__table__.c else {})}
                | {column: value(row, column) for column in columns}
                for row in range(start, min(start + 10_000, rows))
            ]
            connection.execute(insert(model.__table__), batch)


def measure_look_up(report: Report, byok: Byok, engine: Engine, rows: int) -> None:
    """An equality look-up by hash beside one on a plaintext indexed column, ``rows`` rows each."""
    for model in (SecretLookUp, PlainLookUp):
        with engine.begin() as connection:
            connection.execute(model.__table__.delete())
        fill(byok, engine, model, rows)
    analyze(engine)
    with byok.session(TENANT, engine) as session:
        wanted = [value(row * 7919 % rows, "mrn") for row in range(300)]

        def look_up(model: Any) -> Callable[[], None]:
            def run() -> None:
                for mrn in wanted:
                    session.execute(select(model.id).where(model.mrn == mrn)).one()

            return run

        report.ratio(
            f"equality look-up, {engine.dialect.name}, {rows:,} rows",
            ratio(look_up(SecretLookUp), look_up(PlainLookUp), 21), 1.12, len(wanted), "query",
        )  # fmt: skip


def measure_bystander(report: Report, attached: Engine, other: Engine) -> None:
    """A statement without encrypted columns: on an attached engine, on one not attached, on one with idle listeners."""
    times, kind = 200, attached.dialect.name
    idle = create_engine(other.url)
    event.listen(
        idle, "before_execute", lambda _, clause, multi, params, options: (clause, multi, params), retval=True
    )
    event.listen(idle, "before_cursor_execute", lambda *arguments: arguments[2:4], retval=True)
    event.listen(idle, "after_execute", lambda *arguments: None)

    def one(engine: Engine) -> Callable[[], None]:
        def run() -> None:
            with engine.connect() as connection:
                for row in range(times):
                    connection.execute(select(Plain.number).where(Plain.id == row)).all()

        return run

    measured = ratio(one(attached), one(other), 40)
    if kind == "postgresql":
        report.ratio("bystander statement, postgresql", measured, 1.05, times, "query")
    for what, (_, mine, theirs) in (
        ("bystander statement", measured),
        ("… over idle listeners", ratio(one(attached), one(idle), 40)),
    ):
        shown = (f"{mine / times * 1e6:.2f} µs/query", f"{theirs / times * 1e6:.2f} µs/query")
        report.add(f"{what}, {kind}", *shown, (mine - theirs) / times * 1e6, 4.0, "µs")
    idle.dispose()


def measure_guard(report: Report, attached: Engine) -> None:
    """The guard's walk, once for each compiled statement, beside compiling it; a cached one is asked what was found."""
    from sqla_byok.orm import upstream
    from sqla_byok.orm.guard import Findings, Guard

    guard, times = Guard("raise", "warn", Findings()), 200
    statement = (
        select(SecretLookUp).where(SecretLookUp.mrn == "x", SecretLookUp.id > 1).order_by(SecretLookUp.id)
    )
    compiled = statement.compile(attached)
    measured = ratio(
        repeat(lambda: guard.judge(compiled), times), repeat(lambda: statement.compile(attached), times), 15
    )
    report.ratio("the guard's walk ÷ compiling the statement", measured, 0.6, times, "statement")
    times = 20_000
    _, asked, nothing = ratio(
        repeat(lambda: upstream.known(compiled, guard.judge), times), repeat(lambda: None, times), 15
    )
    cost = (asked - nothing) / times * 1e6
    report.add("the guard for a cached statement", f"{cost:.2f} µs/statement", "", cost, 1.0, "µs")


def analyze(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for model in (SecretLookUp, PlainLookUp):
            name = model.__tablename__
            connection.execute(
                text(
                    f"ANALYZE TABLE {name}"
                    if engine.dialect.name in ("mysql", "mariadb")
                    else f"ANALYZE {name}"
                )
            )


def measure_tenants(report: Report, byok: Byok) -> None:
    """Entering a warm tenant, and the memory that an open one takes."""
    times = 2_000

    def enter() -> None:
        with byok.tenant(TENANT):
            pass

    enter()
    took = min(seconds(repeat(enter, times)) for _ in range(15)) / times
    report.add("entering a warm tenant", f"{took * 1e6:.2f} µs", "", took * 1e6, 5.0, "µs")
    report.add("memory of an open tenant", "", "", memory_of_a_tenant(), 16 * 1024, "bytes")


def memory_of_a_tenant(tenants: int = 2_000) -> float:
    """Resident bytes for each keyring with 40 column salts, counted in a process of its own."""
    import subprocess

    code = f"""
import os, resource
from sqla_byok.crypto.formats import *
from sqla_byok.crypto.hashes import Scope
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.rows import SealedRecord

def ring(number):
    tenant = f"tenant-{{number}}"
    key = TenantKey(os.urandom(32), tenant, 1)
    records = [SealedRecord(kind, 1, *[key.seal(kind, 1, secret)][0][:1], ACTIVE, b"") for kind, secret in ()]
    for kind, secret in ((DATA_KEY, new_key()), (SEARCH_SALT, new_search_salt())):
        id_, sealed = key.seal(kind, 1, secret)
        records.append(SealedRecord(kind, 1, id_, ACTIVE, sealed))
    ring = Keyring(key, 1, records)
    for column in range(1_000):
        ring.salts["sha256", SCOPES[column]]
    return ring

SCOPES = [Scope("column", f"table.column{{n}}") for n in range(1_000)]
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
kept = [ring(n) for n in range(100)]
before = resident()
kept += [ring(n) for n in range({tenants})]
print((resident() - before) / {tenants})
"""
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


# -- the run -------------------------------------------------------------------------------------------------------


@contextmanager
def engines(databases: Databases) -> Iterator[dict[str, tuple[Engine, Engine]]]:
    """For each database found, an engine to attach and one to leave alone."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, tuple[Engine, Engine]] = {}
        for kind in SYNC:
            if kind == "sqlite":
                url: Any = f"sqlite:///{folder}/bench.db"
            else:
                try:
                    url = databases.get(kind).url.set(drivername=SYNC[kind])
                except NotFoundError as error:
                    Console().print(f"[yellow]without {kind}: {error}[/]")
                    continue
            found[kind] = (create_engine(url), create_engine(url))
        yield found
        for pair in found.values():
            for engine in pair:
                engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="look up over a million rows too (some minutes)")
    options = parser.parse_args()
    report, databases, calls = Report(), Databases(), count_kms_calls()
    try:
        with engines(databases) as found, tempfile.TemporaryDirectory() as folder:
            byok = Byok(keystore=f"sqlite:///{folder}/keystore.db")
            byok.create_keystore()
            # longer than the run, so that no refresh is counted
            byok.onboard(TENANT, LocalKms.create(Path(folder) / "customer.key"), revoke_within=3_600)
            calls.clear()
            for attached, _ in found.values():
                byok.attach(attached)
                Base.metadata.create_all(attached)
            measure_values(report, byok, found["sqlite"][0])
            measure_guard(report, found["sqlite"][0])
            for kind, (attached, other) in found.items():
                measure_bystander(report, attached, other)
                measure_rows(
                    report,
                    byok,
                    attached,
                    {"sqlite": (1.5, 2.5), "postgresql": (1.15, 1.75)}.get(kind, (1.5, 2.5)),
                )
                if kind == "postgresql":
                    for rows in (10_000, 100_000, *([1_000_000] if options.full else [])):
                        measure_look_up(report, byok, attached, rows)
            report.add("KMS calls for all of this", "", "", len(calls), 1, "calls")
            measure_tenants(report, byok)
            byok.close()
    finally:
        databases.close()
    Console(width=140).print(report.table)
    if report.over:
        Console().print(f"[red]over budget:[/] {', '.join(report.over)}")
    return 0


def count_kms_calls() -> list[str]:
    """Count the calls to the customer key, which for LocalKms is a reading of its file."""
    calls: list[str] = []

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and str(arguments[0]).endswith("customer.key"):
            calls.append(name)

    sys.addaudithook(hook)
    return calls


if __name__ == "__main__":
    sys.exit(main())
