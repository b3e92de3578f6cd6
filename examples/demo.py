"""The main job, done on a real database: two clinics' patients, each under the clinic's own key.

Run it with ``make demo``; ``make demo ARGS="--database-url postgresql+psycopg://…"`` takes another database. It makes
its tables (``byok_demo_…``) and a folder for the keys, and removes both at the end.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from faker import Faker
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from sqlalchemy import JSON, Date, Engine, ForeignKey, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sqla_byok import Byok, ByokError, Encrypted, LocalKms
from sqla_byok.normalize import casefold

CLINIC, OTHER = "st-mary", "lakeside"


# -- the models: what a vendor writes ------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Priority(Enum):
    ROUTINE = "routine"
    URGENT = "urgent"
    STAT = "stat"


class Patient(Base):
    __tablename__ = "byok_demo_patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    clinic: Mapped[str] = mapped_column(String(40), index=True)
    name: Mapped[str] = mapped_column(Encrypted(String(120)))
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)
    email: Mapped[str | None] = mapped_column(Encrypted(String(254), searchable=True, normalize=casefold))
    born: Mapped[date] = mapped_column(Encrypted(Date))
    phone: Mapped[str] = mapped_column(Encrypted(String(40)))
    requests: Mapped[list[TestRequest]] = relationship(back_populates="patient")


class TestRequest(Base):
    __tablename__ = "byok_demo_test_request"
    id: Mapped[int] = mapped_column(primary_key=True)
    patient_id: Mapped[int] = mapped_column(ForeignKey(Patient.id), index=True)
    test: Mapped[str] = mapped_column(Encrypted(String(80), searchable=True))
    priority: Mapped[Priority] = mapped_column(Encrypted(sa.Enum(Priority)))
    requested_at: Mapped[datetime] = mapped_column(sa.DateTime)
    findings: Mapped[dict[str, Any] | None] = mapped_column(Encrypted(JSON))
    patient: Mapped[Patient] = relationship(back_populates="requests")


# -- synthetic data ------------------------------------------------------------------------------------------------

TESTS = {
    "Haemoglobin A1c": ("%", 4.8, 11.0),
    "Potassium": ("mmol/l", 3.1, 5.9),
    "C-reactive protein": ("mg/l", 0.3, 140.0),
    "Thyroid-stimulating hormone": ("mIU/l", 0.2, 9.0),
    "Creatinine": ("µmol/l", 45.0, 210.0),
    "Ferritin": ("µg/l", 8.0, 420.0),
}


def patients(clinic: str, count: int, seed: int) -> Iterator[Patient]:
    """So many made-up people, the same ones at every run."""
    fake = Faker(["en_GB", "de_DE", "fr_FR", "pl_PL"])
    fake.seed_instance(seed)
    chance = random.Random(seed)
    for number in range(1, count + 1):
        patient = Patient(
            clinic=clinic,
            name=fake.name(),
            mrn=f"{clinic[:2].upper()}-{number:06d}",
            email=fake.email() if chance.random() < 0.8 else None,
            born=fake.date_of_birth(minimum_age=0, maximum_age=98),
            phone=fake.phone_number(),
        )
        for _ in range(chance.choice([0, 1, 1, 2, 3])):
            test, (unit, low, high) = chance.choice(list(TESTS.items()))
            done = chance.random() < 0.7
            patient.requests.append(
                TestRequest(
                    test=test,
                    priority=chance.choice(list(Priority)),
                    requested_at=fake.date_time_this_year(),
                    findings={"value": round(chance.uniform(low, high), 1), "unit": unit} if done else None,
                )
            )
        yield patient


# -- the walk ------------------------------------------------------------------------------------------------------


class Demo:
    """Walks through the four flows and shows each."""

    def __init__(self, console: Console, engine: Engine, folder: Path, count: int) -> None:
        self.console, self.engine, self.folder, self.count = console, engine, folder, count
        self.key_file = folder / f"{CLINIC}.key"
        self.byok = Byok(keystore=f"sqlite:///{folder / 'keystore.db'}")

    def run(self) -> None:
        self.set_up()
        self.write()
        self.read()
        self.write_searchable()
        self.search()
        self.second_tenant()
        self.key_taken_away()
        self.byok.close()

    def title(self, text: str, flow: str) -> None:
        self.console.print()
        self.console.print(Rule(f"[bold cyan]{text}[/]", align="left"))
        self.console.print(f"[dim]{flow}[/]\n")

    def set_up(self) -> None:
        byok = self.byok
        byok.create_keystore()
        byok.attach(self.engine)
        Base.metadata.create_all(self.engine)
        byok.onboard(CLINIC, LocalKms.create(self.key_file))
        byok.onboard(OTHER, LocalKms.create(self.folder / f"{OTHER}.key"))
        where = self.engine.url.render_as_string(hide_password=True)
        self.console.print(
            Panel(
                f"[bold]database[/]   {where}\n"
                f"[bold]tenants[/]    {', '.join(byok.tenants())}, each with a customer key of its own\n"
                f"[bold]keys[/]       LocalKms: a file stands in for the customer's AWS KMS or Azure Key Vault",
                title="[bold]sqla_byok[/]  Bring Your Own Key for SQLAlchemy",
                border_style="cyan",
            )
        )

    def write(self) -> None:
        self.title("1  Write", "value → encrypted under the clinic's key → stored")
        started = time.perf_counter()
        with self.progress() as progress:
            for clinic, count, seed in ((CLINIC, self.count, 1), (OTHER, self.count // 4, 2)):
                task = progress.add_task(clinic, total=count)
                with self.byok.session(clinic, self.engine) as session:
                    for number, patient in enumerate(patients(clinic, count, seed), 1):
                        session.add(patient)
                        if number % 250 == 0 or number == count:
                            session.commit()
                            progress.update(task, completed=number)
        took = time.perf_counter() - started
        rows = {model.__tablename__: self.rows(model) for model in (Patient, TestRequest)}
        self.console.print(
            f"{rows[Patient.__tablename__]:,} patients and {rows[TestRequest.__tablename__]:,} test requests in "
            f"{took:.1f} s, made-up data included.\n"
        )
        self.show_bytes()

    def show_bytes(self) -> None:
        """One stored value, taken apart."""
        name, stored = self.a_value(Patient.name)
        parts = [
            ("version and algorithm", stored[:2], "magenta"),
            ("which data key", stored[2:18], "blue"),
            ("nonce, new for each value", stored[18:30], "yellow"),
            ("AES-256-GCM ciphertext", stored[30:-16], "green"),
            ("tag: bound to tenant and column", stored[-16:], "red"),
        ]
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for label, part, colour in parts:
            table.add_row(f"[{colour}]{label}[/]", Text(part.hex(" ", 2), style=colour), f"{len(part)} bytes")
        more = len(stored) - len(name.encode())
        self.console.print(
            f"patient.name of one row, [bold]{name}[/], is stored as {len(stored)} bytes (+{more}):"
        )
        self.console.print(table)

    def read(self) -> None:
        self.title("2  Read", "stored → decrypted, by an ordinary ORM query")
        columns = Patient.__table__.c
        with self.byok.session(CLINIC, self.engine) as session:
            patient = session.scalars(
                select(Patient).where(Patient.clinic == CLINIC, Patient.requests.any()).order_by(Patient.id)
            ).first()
            assert patient is not None
            raw = self.raw_row(patient.id)
            table = Table("column", "as the ORM sees it", "as the database holds it")
            for column in columns:
                seen = (
                    "[dim]not loaded[/]"
                    if column.key.endswith("_hash")
                    else str(getattr(patient, column.key))
                )
                table.add_row(column.key, seen, shown(raw[column.key]))
            for request in patient.requests[:1]:
                table.add_section()
                table.add_row("a request's findings", str(request.findings), "JSON, encrypted whole")
        self.console.print(table)

    def write_searchable(self) -> None:
        self.title("3  Write searchable", "the clinic's salt → hash → stored beside the ciphertext")
        with self.byok.session(CLINIC, self.engine) as session:
            session.add(
                Patient(
                    clinic=CLINIC,
                    name="Ada Lovelace",
                    mrn="ADA-1815",
                    email="Ada@Example.org",
                    born=date(1815, 12, 10),
                    phone="+44 20 7946 0000",
                )
            )
            statements = self.statements(session.commit)
            ada = session.scalars(select(Patient).where(Patient.mrn == "ADA-1815")).one()
            raw = self.raw_row(ada.id)
        self.console.print(Syntax(next(sql for sql in statements if "INSERT" in sql), "sql", word_wrap=True))
        table = Table("column", "value", "ciphertext", "hash: SHA-256 over the text and the salt")
        for column in ("mrn", "email"):
            table.add_row(
                column, getattr(ada, column), shown(raw[column], 12), raw[f"{column}_hash"].hex()[:40] + "…"
            )
        self.console.print(table)
        self.console.print(
            "The salt is 32 random characters, stored only sealed under the clinic's key; "
            "each column derives its own."
        )

    def search(self) -> None:
        self.title("4  Search", "the clinic's salt → hash → indexed look-up → decrypted")
        query = select(Patient).where(Patient.email == "ADA@example.ORG")
        self.console.print(Syntax('select(Patient).where(Patient.email == "ADA@example.ORG")', "python"))
        self.analyze()
        with self.byok.session(CLINIC, self.engine) as session:
            found: list[Patient] = []
            statements = self.statements(lambda: found.extend(session.scalars(query)))
            plan = self.plan(session, query)
            joined = session.scalars(
                select(Patient.name)
                .join(Patient.requests)
                .where(TestRequest.test == "Potassium", Patient.clinic == CLINIC)
                .limit(3)
            ).all()
        self.console.print(
            Panel(Syntax(statements[-1], "sql", word_wrap=True), title="SQL", border_style="green")
        )
        self.console.print(Panel(Text(plan), title="query plan", border_style="green"))
        for patient in found:
            self.console.print(
                f"[bold green]found[/] {patient.name}, {patient.mrn}, born {patient.born}, {patient.email}"
            )
        self.console.print(f"[bold green]found[/] by a join on an encrypted column: {', '.join(joined)}, …")
        with self.byok.session(CLINIC, self.engine) as session:
            self.refused(
                lambda: session.scalars(select(Patient).where(Patient.mrn.like("ADA%"))).all(), "LIKE"
            )

    def second_tenant(self) -> None:
        self.title("5  A second tenant", "the same database, the same query, another key")
        with self.byok.session(OTHER, self.engine) as session:
            none = session.scalars(select(Patient).where(Patient.mrn == "ADA-1815")).all()
            self.console.print(
                f"{OTHER} searches for ADA-1815: [bold]{len(none)} rows[/] (its salt is another one)"
            )
            self.refused(
                lambda: session.scalars(select(Patient).where(Patient.clinic == CLINIC).limit(1)).all(),
                f"{OTHER} reads a row of {CLINIC}",
            )
        with Session(self.engine) as session:
            self.refused(
                lambda: session.scalars(select(Patient).limit(1)).all(), "nobody said whose data it is"
            )

    def key_taken_away(self) -> None:
        self.title(
            "6  The customer says no", "the key file is taken away, as a customer would disable its key"
        )
        hidden = self.key_file.with_suffix(".gone")
        self.key_file.rename(hidden)
        # In production a process notices by itself within revoke_within seconds; here we don't wait.
        self.byok.forget_keys(CLINIC)

        def read() -> None:
            with self.byok.session(CLINIC, self.engine) as session:
                session.scalars(select(Patient).limit(1)).all()

        self.refused(read, f"{CLINIC} reads its own data")
        with self.byok.session(OTHER, self.engine) as session:
            count = len(session.scalars(select(Patient.name).where(Patient.clinic == OTHER)).all())
        self.console.print(f"{OTHER} works on: {count:,} patients read")
        hidden.rename(self.key_file)
        with self.byok.session(CLINIC, self.engine) as session:
            ada = session.scalars(select(Patient).where(Patient.mrn == "ADA-1815")).one()
        self.console.print(f"the key is back, and so is [bold]{ada.name}[/]")

    # -- looking at what happens -----------------------------------------------------------------------------------

    def progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )

    def refused(self, work: Any, what: str) -> None:
        try:
            work()
        except ByokError as error:
            body = Group(Text(type(error).__name__, style="bold red"), Text(str(error)))
            self.console.print(Panel(body, title=f"[red]{what}[/]", border_style="red"))
        else:
            raise AssertionError(f"{what}: this should have been refused")

    def statements(self, work: Any) -> list[str]:
        """The SQL that ``work`` emits."""
        emitted: list[str] = []

        def listen(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
            emitted.append(statement)

        sa.event.listen(self.engine, "before_cursor_execute", listen)
        try:
            work()
        finally:
            sa.event.remove(self.engine, "before_cursor_execute", listen)
        return emitted

    def raw_row(self, key: int) -> dict[str, Any]:
        """A patient's row as anyone with access to the database sees it."""
        query = sa.text("SELECT * FROM byok_demo_patient WHERE id = :id")
        with self.engine.connect() as connection:
            row = connection.execute(query, {"id": key}).mappings().one()
        return {name: bytes(value) if isinstance(value, memoryview) else value for name, value in row.items()}

    def a_value(self, attribute: Any) -> tuple[str, bytes]:
        with self.byok.session(CLINIC, self.engine) as session:
            key, name = session.execute(
                select(Patient.id, attribute).where(Patient.clinic == CLINIC).order_by(Patient.id).limit(1)
            ).one()
        return name, self.raw_row(key)["name"]

    def rows(self, model: type[Base]) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(select(sa.func.count()).select_from(model)) or 0

    def analyze(self) -> None:
        word = "ANALYZE TABLE" if self.engine.dialect.name in ("mysql", "mariadb") else "ANALYZE"
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"{word} {Patient.__tablename__}"))

    def plan(self, session: Session, query: sa.Select[Any]) -> str:
        """How the database finds the row."""
        compiled = query.compile(self.engine, compile_kwargs={"render_postcompile": True})
        explain = "EXPLAIN QUERY PLAN" if self.engine.dialect.name == "sqlite" else "EXPLAIN"
        hashed = session.execute(
            select(Patient.__table__.c.email_hash).where(Patient.mrn == "ADA-1815")
        ).scalar_one()
        (name,) = compiled.params
        statement = sa.text(f"{explain} {query.compile(dialect=_named(self.engine))}")
        with self.engine.connect() as connection:
            rows = connection.execute(statement, {name: bytes(hashed)}).mappings().all()
        if len(rows[0]) == 1:
            return "\n".join(str(value) for row in rows for value in row.values())
        shown = ("detail", "type", "key", "rows")
        return "\n".join(", ".join(f"{name}: {row[name]}" for name in shown if row.get(name)) for row in rows)


def _named(engine: Engine) -> Any:
    """The engine's dialect with named parameters, so that the statement can be sent as text."""
    return type(engine.dialect)(paramstyle="named")


def shown(value: Any, size: int = 24) -> str:
    """A value as a database client would show it."""
    if isinstance(value, bytes):
        return f"[dim]{value[:size].hex()}…[/] ({len(value)} bytes)" if len(value) > size else value.hex()
    return str(value)


@contextmanager
def fresh(url: str | None) -> Iterator[tuple[Engine, Path]]:
    """An engine without the demo's tables, and a folder; both are cleared at the end."""
    with tempfile.TemporaryDirectory(prefix="sqla-byok-demo-") as name:
        folder = Path(name)
        engine = sa.create_engine(url or f"sqlite:///{folder / 'clinic.db'}")
        names = {table.name for table in Base.metadata.tables.values()}
        there = names & set(sa.inspect(engine).get_table_names())
        if there:
            sys.exit(
                f"the database already has {', '.join(sorted(there))}: drop them, or give another database"
            )
        try:
            yield engine, folder
        finally:
            Base.metadata.drop_all(engine)
            engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring Your Own Key for SQLAlchemy, start to end.")
    parser.add_argument(
        "--database-url", help="a SQLAlchemy URL, of PostgreSQL or MariaDB say; SQLite unless given"
    )
    parser.add_argument("--patients", type=int, default=2_000, help="how many patients to make up (2000)")
    options = parser.parse_args()
    console = Console()
    with fresh(options.database_url) as (engine, folder):
        Demo(console, engine, folder, max(options.patients, 8)).run()
    console.print()
    console.print(Rule("[bold cyan]That was it[/]", align="left"))
    console.print("Next: [bold]README.md[/] for your first model, [bold]make test[/] to see it all proved.")


if __name__ == "__main__":
    main()
