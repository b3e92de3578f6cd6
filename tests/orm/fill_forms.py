"""The ways in which a value can take to an encrypted column, each with the rows that must be there afterwards.

The forms are plain functions over a session, so that one list serves sync and async engines. :func:`check_stored` is
the oracle: it looks at every stored cell and works the hashes out by itself.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    cast,
    column,
    event,
    func,
    insert,
    lambda_stmt,
    literal,
    null,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    make_transient,
    mapped_column,
    registry,
)

from sqla_byok import Byok, Encrypted, UnsupportedQueryError
from sqla_byok.crypto.hashes import Scope

Row = tuple[Any, ...]

counter = itertools.count()


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    # PostgreSQL's counter must keep clear of the ids that the forms give
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    name: Mapped[str | None] = mapped_column(Encrypted(String(60)))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True), unique=True)
    email: Mapped[str | None] = mapped_column("email_db", Encrypted(String(60), searchable=True))
    n: Mapped[int | None]
    note: Mapped[str | None] = mapped_column(String(60))

    @hybrid_property
    def contact(self) -> str:
        return f"{self.name}|{self.email}"

    @contact.inplace.expression
    @classmethod
    def _contact(cls) -> Any:
        return func.lower(cls.note)

    @contact.inplace.update_expression
    @classmethod
    def _set_contact(cls, value: str) -> list[tuple[Any, Any]]:
        name, email = value.split("|")
        return [(cls.name, name), (cls.email, email)]


class Defaulted(Base):
    __tablename__ = "defaulted"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    called: Mapped[str | None] = mapped_column(
        Encrypted(String(60), searchable=True), insert_default=lambda: f"secret-called-{next(counter)}"
    )
    constant: Mapped[str | None] = mapped_column(
        Encrypted(String(60), searchable=True), insert_default="secret-constant"
    )
    touched: Mapped[str | None] = mapped_column(
        Encrypted(String(60), searchable=True),
        insert_default="secret-new",
        onupdate=lambda: f"secret-touched-{next(counter)}",
    )
    unsearchable: Mapped[str | None] = mapped_column(
        Encrypted(String(60)), insert_default="secret-unsearchable"
    )
    n: Mapped[int | None]


class Contextual(Base):
    __tablename__ = "contextual"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    derived: Mapped[str | None] = mapped_column(
        Encrypted(String(60), searchable=True),
        insert_default=lambda context: f"secret-{context.get_current_parameters()['n']}",
    )
    n: Mapped[int | None]


class Versioned(Base):
    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    version: Mapped[int] = mapped_column()
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True))
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - how declarative takes it


class Staff(Base):
    __tablename__ = "staff"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    badge: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "staff"}  # noqa: RUF012


class Doctor(Staff):
    __tablename__ = "doctor"
    id: Mapped[int] = mapped_column(ForeignKey("staff.id"), primary_key=True)
    licence: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True))
    __mapper_args__ = {"polymorphic_identity": "doctor"}  # noqa: RUF012


class Imperative:
    """Mapped imperatively, under another name than its column's."""

    id: int
    number: str | None

    def __init__(self, number: str | None) -> None:
        self.number = number


imperative = Table(
    "imperative",
    Base.metadata,
    Column("id", Integer, Identity(start=100), primary_key=True),
    Column("number_db", Encrypted(String(60), searchable=True), key="number_key"),
)
registry(metadata=Base.metadata).map_imperatively(
    Imperative, imperative, properties={"number": imperative.c.number_key}
)

patient: Table = Patient.__table__  # type: ignore[assignment]
defaulted: Table = Defaulted.__table__  # type: ignore[assignment]
contextual: Table = Contextual.__table__  # type: ignore[assignment]
plain = Table("plain", Base.metadata, Column("id", Integer, primary_key=True), Column("note", String(60)))


# -- the oracle ------------------------------------------------------------------------------------------------------


def check_stored(
    byok: Byok, connection: Connection, tenant: str = "t1", metadata: MetaData = Base.metadata
) -> None:
    """Check every cell of every encrypted column and of its hash column."""
    for table in metadata.sorted_tables:
        order = next(iter(table.primary_key)).name
        stored = connection.exec_driver_sql(f"SELECT * FROM {table.name} ORDER BY {order}").mappings().all()
        opened = connection.execute(select(table).order_by(text(order))).mappings().all()
        assert len(stored) == len(opened)
        for raw, row in zip(stored, opened, strict=True):
            for source in table.c:
                if not isinstance(source.type, Encrypted):
                    continue
                value, cell, where = row[source], raw[source.name], f"{source} of {dict(raw)}"
                if value is None:
                    assert cell is None, where
                else:
                    assert isinstance(cell, bytes), where
                    assert len(cell) == 46 + len(value), where
                    assert b"secret" not in cell, where
                if source.type.searchable:
                    assert raw[f"{source.name}_hash"] == _hash(byok, tenant, source, value), where


def _hash(byok: Byok, tenant: str, source: Any, value: str | None) -> bytes | None:
    if value is None:
        return None
    ring = byok._keyrings.warm(tenant)
    assert ring is not None
    salt = ring.salts["sha256", Scope("column", source.type.column_id)]
    return sha256(value.encode() + salt).digest()


# -- running a form --------------------------------------------------------------------------------------------------


class Run:
    """What a form works with: a session of tenant t1 whose tables hold the two rows A and B."""

    def __init__(self, session: Session, sql: list[str]) -> None:
        self.s, self.c, self.sql = session, session.connection(), sql
        self.kind = self.c.dialect.name

    def id_of(self, mrn: str) -> int | None:
        """Find a row by its hash."""
        return self.s.scalar(select(Patient.id).where(Patient.mrn == mrn))

    def upsert(self, target: Any = patient) -> Any:
        """The dialect's own INSERT."""
        kinds: dict[str, Any] = {
            "sqlite": sqlite.insert,
            "postgresql": postgresql.insert,
            "mysql": mysql.insert,
            "mariadb": mysql.insert,
        }
        return kinds[self.kind](target)


A: Row = ("secret-a", "secret-ea", "secret-na", 1)
B: Row = ("secret-b", None, "secret-nb", 2)

EVERYWHERE = frozenset(["sqlite", "postgresql", "mariadb", "mysql"])
ON_CONFLICT = frozenset(["sqlite", "postgresql"])
MARIADB = EVERYWHERE - ON_CONFLICT

Work = Callable[[Run], "list[Row] | None"]


@dataclass(frozen=True)
class Form:
    """One way of writing. It returns the rows (mrn, email, name, n) that Patient must hold, or checks by itself."""

    name: str
    kinds: frozenset[str]
    work: Work

    def failures(self, byok: Byok, session: Session, sql: list[str]) -> list[str]:
        """Run it in a transaction that is rolled back, and tell what went wrong."""
        try:
            self._check(byok, session, sql)
        except Exception as error:
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == __file__
            ]
            return [f"{self.name} (line {lines[-1]}): {type(error).__name__}: {error}"]
        finally:
            session.rollback()
        return []

    def _check(self, byok: Byok, session: Session, sql: list[str]) -> None:
        _seed(session)
        sql.clear()
        expected = self.work(Run(session, sql))
        session.flush()
        check_stored(byok, session.connection())
        if expected is not None:
            same(sorted(rows_of(session), key=repr), sorted(expected, key=repr))
            for mrn, *_ in expected:
                if mrn is not None:
                    count = select(func.count()).select_from(Patient).where(Patient.mrn == mrn)
                    assert session.scalar(count) == 1, f"{mrn} is not found by its hash"


@dataclass(frozen=True)
class RefusedForm(Form):
    """One that must be refused, in the name of a column, before anything reaches the database."""

    column: str | None

    def _check(self, byok: Byok, session: Session, sql: list[str]) -> None:
        _seed(session)
        sql.clear()
        with pytest.raises(UnsupportedQueryError) as refusal:
            self.work(Run(session, sql))
        assert [statement for statement in sql if not statement.startswith("SELECT")] == []
        assert refusal.value.column == self.column
        assert self.column is None or self.column in str(refusal.value)
        assert "secret" not in str(refusal.value)
        session.rollback()
        assert rows_of(session) == []


FORMS: dict[str, list[Form]] = {}
REFUSED: list[RefusedForm] = []


def form(group: str, kinds: frozenset[str] = EVERYWHERE) -> Callable[[Work], Work]:
    """Register a form."""

    def register(work: Work) -> Work:
        FORMS.setdefault(group, []).append(Form(work.__name__, kinds, work))
        return work

    return register


def refused(name: str, column: str | None, work: Work, kinds: frozenset[str] = EVERYWHERE) -> None:
    """Register a form that is refused in the name of a column."""
    REFUSED.append(RefusedForm(name, kinds, work, column))


def rows_of(session: Session) -> list[Row]:
    rows = session.connection().execute(
        select(patient.c.mrn, patient.c.email_db, patient.c.name, patient.c.n).order_by(patient.c.id)
    )
    return [tuple(row) for row in rows]


def same(found: Any, expected: Any, what: str = "") -> None:
    assert found == expected, f"{what} found {found!r} instead of {expected!r}"


def _seed(session: Session) -> None:
    for key, (mrn, email, name, n) in enumerate((A, B), start=1):
        session.add(Patient(id=key, mrn=mrn, email=email, name=name, n=n, note="note"))
    session.flush()


@contextmanager
def recorded(engine: Engine) -> Iterator[list[str]]:
    """The SQL that an engine sends."""
    sql: list[str] = []

    def listen(conn: Any, cursor: Any, statement: str, *args: Any) -> None:
        sql.append(" ".join(statement.split()))

    event.listen(engine, "before_cursor_execute", listen)
    yield sql
    event.remove(engine, "before_cursor_execute", listen)


def _expression(session: Session, key: int, attribute: str, value: Any) -> None:
    setattr(session.get_one(Patient, key), attribute, value)
    session.flush()


def new(mrn: str | None, email: str | None = None, name: str | None = None, n: int | None = None) -> Row:
    return (mrn, email, name, n)


# -- flush -----------------------------------------------------------------------------------------------------------


@form("flush")
def insert_one(run: Run) -> list[Row]:
    run.s.add(Patient(mrn="secret-x", email="secret-ex", name="secret-nx", n=3))
    return [A, B, new("secret-x", "secret-ex", "secret-nx", 3)]


@form("flush")
def insert_many(run: Run) -> list[Row]:
    run.s.add_all([Patient(mrn=f"secret-{i}", n=i) for i in range(20)])
    run.s.flush()
    # SQLite takes such rows one at a time, since it has no IDENTITY
    assert sum(statement.startswith("INSERT") for statement in run.sql) == (20 if run.kind == "sqlite" else 1)
    return [A, B, *(new(f"secret-{i}", n=i) for i in range(20))]


@form("flush")
def insert_heterogeneous(run: Run) -> list[Row]:
    run.s.add_all(
        [Patient(mrn="secret-x"), Patient(email="secret-ey"), Patient(n=3), Patient(name="secret-n")]
    )
    return [A, B, new("secret-x"), new(None, "secret-ey"), new(None, n=3), new(None, name="secret-n")]


@form("flush")
def update_one(run: Run) -> list[Row]:
    run.s.get_one(Patient, 1).mrn = "secret-x"
    run.s.flush()
    assert run.id_of("secret-a") is None
    assert len([statement for statement in run.sql if statement.startswith("UPDATE")]) == 1
    return [("secret-x", *A[1:]), B]


@form("flush")
def update_many(run: Run) -> list[Row]:
    for key in (1, 2):
        run.s.get_one(Patient, key).mrn = f"secret-{key}"
    return [("secret-1", *A[1:]), ("secret-2", *B[1:])]


@form("flush")
def update_to_none(run: Run) -> list[Row]:
    person = run.s.get_one(Patient, 1)
    person.mrn = person.name = None
    return [(None, A[1], None, A[3]), B]


@form("flush")
def update_of_another_column(run: Run) -> list[Row]:
    run.s.get_one(Patient, 1).n = 9
    run.s.flush()
    (statement,) = [statement for statement in run.sql if statement.startswith("UPDATE")]
    assert "hash" not in statement
    return [(*A[:3], 9), B]


@form("flush")
def typed_literal(run: Run) -> list[Row]:
    run.s.add(Patient(id=3, mrn=literal("secret-x"), name=literal("secret-n")))
    run.s.get_one(Patient, 1).email = literal("secret-y")
    run.s.get_one(Patient, 2).mrn = null()
    return [("secret-a", "secret-y", *A[2:]), (None, *B[1:]), new("secret-x", None, "secret-n")]


@form("flush")
def merge(run: Run) -> list[Row]:
    run.s.merge(Patient(id=1, mrn="secret-x"))
    run.s.merge(Patient(id=50, mrn="secret-y"))
    return [("secret-x", *A[1:]), B, new("secret-y")]


@form("flush")
def make_transient_copy(run: Run) -> list[Row]:
    person = run.s.get_one(Patient, 1)
    run.s.expunge(person)
    make_transient(person)
    person.id, person.mrn = 50, "secret-x"
    run.s.add(person)
    return [A, B, ("secret-x", *A[1:])]


@form("flush")
def savepoint_rolled_back(run: Run) -> list[Row]:
    nested = run.s.begin_nested()
    run.s.get_one(Patient, 1).mrn = "secret-x"
    run.s.flush()
    nested.rollback()
    assert run.id_of("secret-x") is None
    assert run.s.get_one(Patient, 1).mrn == "secret-a"
    return [A, B]


@form("flush")
def version_counter(run: Run) -> None:
    run.s.add(Versioned(id=1, mrn="secret-x"))
    run.s.flush()
    run.s.get_one(Versioned, 1).mrn = "secret-y"
    run.s.flush()
    run.s.execute(update(Versioned).where(Versioned.mrn == "secret-y").values(mrn="secret-z"))
    assert run.s.execute(
        select(Versioned.id, Versioned.version).where(Versioned.mrn == "secret-z")
    ).all() == [(1, 2)]


@form("flush")
def joined_inheritance(run: Run) -> None:
    run.s.add_all(
        [Doctor(badge="secret-1", licence="secret-l1"), Staff(badge="secret-2"), Doctor(licence="secret-l3")]
    )
    run.s.flush()
    doctor = run.s.scalars(
        select(Doctor).where(Doctor.badge == "secret-1", Doctor.licence == "secret-l1")
    ).one()
    doctor.badge, doctor.licence = "secret-3", None
    run.s.flush()
    assert run.s.scalars(select(Staff.badge).where(Staff.badge.in_(["secret-1", "secret-3"]))).all() == [
        "secret-3"
    ]


@form("flush")
def imperative_renamed(run: Run) -> None:
    run.s.add_all([Imperative("secret-x"), Imperative(None)])
    run.s.flush()
    one = run.s.scalars(select(Imperative).where(imperative.c.number_key == "secret-x")).one()
    one.number = "secret-y"
    run.s.flush()
    run.s.execute(update(Imperative).values(number="secret-z").where(imperative.c.number_key == "secret-y"))
    run.s.execute(insert(Imperative), [{"number": "secret-1"}, {"number": "secret-2"}])
    run.c.execute(imperative.insert().values(number_key="secret-3"))
    stored = run.s.scalars(select(imperative.c.number_key)).all()
    assert sorted(stored, key=str) == [None, "secret-1", "secret-2", "secret-3", "secret-z"]


# -- ORM bulk --------------------------------------------------------------------------------------------------------


@form("bulk")
def bulk_insert(run: Run) -> list[Row]:
    run.s.execute(
        insert(Patient), [{"mrn": "secret-x", "email": "secret-e"}, {"mrn": "secret-y", "email": None}]
    )
    return [A, B, new("secret-x", "secret-e"), new("secret-y")]


@form("bulk")
def bulk_insert_heterogeneous(run: Run) -> list[Row]:
    run.s.execute(insert(Patient), [{"mrn": "secret-x"}, {"email": "secret-e"}, {"mrn": "secret-y", "n": 3}])
    return [A, B, new("secret-x"), new(None, "secret-e"), new("secret-y", n=3)]


@form("bulk")
def bulk_insert_render_nulls(run: Run) -> list[Row]:
    statement = insert(Patient).execution_options(render_nulls=True)
    run.s.execute(statement, [{"mrn": "secret-x", "email": None}, {"mrn": None, "email": "secret-e"}])
    return [A, B, new("secret-x"), new(None, "secret-e")]


@form("bulk")
def bulk_insert_returning_entities(run: Run) -> list[Row]:
    rows = [{"mrn": f"secret-{i}", "name": f"secret-n{i}"} for i in range(5)]
    statement = insert(Patient).returning(Patient, sort_by_parameter_order=True)
    people = run.s.scalars(statement, rows).all()
    assert [(person.mrn, person.name) for person in people] == [(row["mrn"], row["name"]) for row in rows]
    return [A, B, *(new(row["mrn"], None, row["name"]) for row in rows)]


@form("bulk")
def bulk_insert_returning_columns(run: Run) -> list[Row]:
    statement = insert(Patient).returning(Patient.email, Patient.mrn)
    found = run.s.execute(statement, [{"mrn": "secret-x", "email": "secret-e"}]).all()
    assert found == [("secret-e", "secret-x")]
    return [A, B, new("secret-x", "secret-e")]


@form("bulk")
def bulk_insert_with_values_and_rows(run: Run) -> list[Row]:
    statement = insert(Patient).values(n=5, email="secret-e")
    run.s.execute(statement, [{"mrn": "secret-x"}, {"mrn": "secret-y"}])
    return [A, B, new("secret-x", "secret-e", n=5), new("secret-y", "secret-e", n=5)]


@form("bulk")
def insert_values_by_name_and_by_attribute(run: Run) -> list[Row]:
    run.s.execute(insert(Patient).values(mrn="secret-x", email="secret-e"))
    run.s.execute(
        insert(Patient).values({Patient.mrn: "secret-y", Patient.email: "secret-f", Patient.name: "secret-n"})
    )
    return [A, B, new("secret-x", "secret-e"), new("secret-y", "secret-f", "secret-n")]


@form("bulk")
def insert_many_values(run: Run) -> list[Row]:
    run.s.execute(
        insert(Patient).values([{"mrn": "secret-x", "email": "secret-e"}, {"mrn": "secret-y", "email": None}])
    )
    return [A, B, new("secret-x", "secret-e"), new("secret-y")]


@form("bulk")
def update_values(run: Run) -> list[Row]:
    run.s.execute(update(Patient).where(Patient.mrn == "secret-a").values(mrn="secret-x", email="secret-e"))
    run.s.execute(
        update(Patient).where(Patient.mrn == "secret-b").values({Patient.mrn: None, Patient.name: null()})
    )
    assert run.s.get_one(Patient, 1).mrn == "secret-x"
    return [("secret-x", "secret-e", *A[2:]), (None, None, None, 2)]


@form("bulk")
def update_by_primary_key(run: Run) -> list[Row]:
    run.s.execute(
        update(Patient), [{"id": 1, "mrn": "secret-x"}, {"id": 2, "mrn": "secret-y", "email": "secret-e"}]
    )
    return [("secret-x", *A[1:]), ("secret-y", "secret-e", *B[2:])]


@form("bulk")
def update_ordered_values(run: Run) -> list[Row]:
    statement = update(Patient).where(Patient.id == 1)
    run.s.execute(
        statement.ordered_values((Patient.n, 9), (Patient.mrn, "secret-x"), (Patient.name, "secret-n"))
    )
    (sent,) = [statement for statement in run.sql if statement.startswith("UPDATE")]
    assert sent.index("n=") < sent.index("mrn=") < sent.index("mrn_hash=") < sent.index("name=")
    return [("secret-x", "secret-ea", "secret-n", 9), B]


@form("bulk")
def update_of_an_alias(run: Run) -> list[Row]:
    other = aliased(Patient)
    statement = update(Patient).where(Patient.id == other.id, other.mrn == "secret-a").values(mrn="secret-x")
    run.s.execute(statement.execution_options(synchronize_session=False))
    return [("secret-x", *A[1:]), B]


@form("bulk")
def update_under_an_aliased_class(run: Run) -> list[Row]:
    other = aliased(Patient)
    statement = update(other).where(other.mrn == "secret-a").values(mrn="secret-x", name=literal("secret-n"))
    run.s.execute(statement.execution_options(synchronize_session=False))
    return [("secret-x", "secret-ea", "secret-n", 1), B]


@form("bulk")
def update_by_hybrid(run: Run) -> list[Row]:
    run.s.execute(update(Patient).where(Patient.id == 1).values({Patient.contact: "secret-n|secret-e"}))
    run.s.execute(update(Patient).where(Patient.id == 2).values(contact="secret-m|secret-f"))
    return [("secret-a", "secret-e", "secret-n", 1), ("secret-b", "secret-f", "secret-m", 2)]


@form("bulk")
def query_update(run: Run) -> list[Row]:
    assert (
        run.s.query(Patient).filter(Patient.mrn == "secret-a").update({"mrn": "secret-x", Patient.n: 9}) == 1
    )
    return [("secret-x", "secret-ea", "secret-na", 9), B]


@form("bulk")
def legacy_bulk_methods(run: Run) -> list[Row]:
    run.s.bulk_insert_mappings(Patient, [{"mrn": "secret-x"}, {"mrn": "secret-y", "email": "secret-e"}])  # type: ignore[arg-type]
    run.s.bulk_update_mappings(Patient, [{"id": 1, "mrn": "secret-1"}, {"id": 2, "email": "secret-e2"}])  # type: ignore[arg-type]
    run.s.bulk_save_objects([Patient(mrn="secret-z"), Patient(name="secret-n")])
    return [
        ("secret-1", *A[1:]),
        ("secret-b", "secret-e2", *B[2:]),
        new("secret-x"),
        new("secret-y", "secret-e"),
        new("secret-z"),
        new(None, None, "secret-n"),
    ]


@form("bulk")
def bulk_save_a_detached_object(run: Run) -> list[Row]:
    person = run.s.get_one(Patient, 1)
    run.s.expunge(person)
    person.mrn = "secret-x"
    run.s.bulk_save_objects([person])
    return [("secret-x", *A[1:]), B]


@form("bulk")
def bulk_insert_of_joined_inheritance(run: Run) -> None:
    statement = insert(Doctor).returning(Doctor, sort_by_parameter_order=True)
    rows = [{"badge": f"secret-{i}", "licence": f"secret-l{i}"} for i in range(3)]
    doctors = run.s.scalars(statement, rows).all()
    assert [(doctor.badge, doctor.licence) for doctor in doctors] == [
        (row["badge"], row["licence"]) for row in rows
    ]
    assert (
        len(
            run.s.scalars(
                select(Doctor).where(Doctor.badge == "secret-1", Doctor.licence == "secret-l1")
            ).all()
        )
        == 1
    )
    run.s.execute(insert(Doctor).values(badge="secret-x", licence=literal("secret-y")), [{"id": 50}])
    run.s.execute(update(Doctor).values(badge=literal("secret-z")), [{"id": 50, "licence": "secret-w"}])
    run.s.execute(update(Doctor), [{"id": 50, "badge": "secret-z"}])
    assert run.s.scalars(select(Doctor.licence).where(Doctor.badge == "secret-z")).all() == ["secret-w"]


@form("bulk")
def lambda_statement(run: Run) -> list[Row]:
    def set_mrn(key: int, mrn: str) -> None:
        run.s.execute(lambda_stmt(lambda: update(Patient).where(Patient.id == key).values(mrn=mrn)))

    set_mrn(1, "secret-x")
    set_mrn(2, "secret-y")
    return [("secret-x", *A[1:]), ("secret-y", *B[1:])]


@form("bulk")
def lambda_statement_that_synchronizes(run: Run) -> list[Row]:
    mrn, patient_ = "secret-x", run.s.get_one(Patient, 1)
    statement = lambda_stmt(lambda: update(Patient).where(Patient.id == 1).values(mrn=mrn))
    run.s.execute(statement, execution_options={"synchronize_session": "fetch"})
    assert patient_.mrn == "secret-x"
    return [("secret-x", *A[1:]), B]


@form("bulk")
def lambda_statement_spoiled(run: Run) -> list[Row]:
    run.s.execute(lambda_stmt(lambda: update(Patient).where(Patient.id == 1).values(mrn="secret-x")).spoil())
    return [("secret-x", *A[1:]), B]


@form("bulk")
def insert_inside_from_statement(run: Run) -> list[Row]:
    statement = insert(Patient).values(mrn="secret-x", email="secret-e").returning(Patient)
    found = run.s.scalars(select(Patient).from_statement(statement)).one()
    assert (found.mrn, found.email) == ("secret-x", "secret-e")
    return [A, B, new("secret-x", "secret-e")]


@form("bulk", EVERYWHERE - MARIADB)
def update_inside_from_statement(run: Run) -> list[Row]:
    statement = update(Patient).where(Patient.id == 1).values(mrn="secret-x").returning(Patient)
    found = run.s.scalars(select(Patient).from_statement(statement)).one()
    assert found.mrn == "secret-x"
    return [("secret-x", *A[1:]), B]


# -- Core ------------------------------------------------------------------------------------------------------------


@form("core")
def parameters(run: Run) -> list[Row]:
    run.c.execute(patient.insert(), {"mrn": "secret-x", "email_db": "secret-e", "name": "secret-n"})
    run.c.execute(patient.update().where(patient.c.id == 1), {"mrn": "secret-y"})
    return [("secret-y", *A[1:]), B, new("secret-x", "secret-e", "secret-n")]


@form("core")
def values_by_keyword_string_and_column(run: Run) -> list[Row]:
    run.c.execute(patient.insert().values(mrn="secret-x"))
    run.c.execute(patient.insert().values({"mrn": "secret-y", patient.c.email_db: "secret-e"}))
    run.c.execute(patient.insert().values({column("mrn"): "secret-z", column("name"): "secret-n"}))
    run.c.execute(
        patient.update().where(patient.c.mrn == "secret-a").values({"mrn": "secret-1", patient.c.n: 9})
    )
    return [
        ("secret-1", *A[1:3], 9),
        B,
        new("secret-x"),
        new("secret-y", "secret-e"),
        new("secret-z", None, "secret-n"),
    ]


@form("core")
def parameters_go_before_values(run: Run) -> list[Row]:
    run.c.execute(patient.insert().values(mrn="secret-default"), [{"mrn": "secret-x"}, {"mrn": "secret-y"}])
    run.c.execute(patient.insert().values(mrn="secret-d", n=5), {"name": "secret-n"})
    return [A, B, new("secret-x"), new("secret-y"), new("secret-d", None, "secret-n", 5)]


@form("core")
def values_of_the_rows_before_the_hash(run: Run) -> list[Row]:
    run.c.execute(patient.insert().values((50, "secret-n", "secret-x")))
    return [A, B, new("secret-x", None, "secret-n")]


@form("core")
def values_of_a_whole_row_in_order(run: Run) -> list[Row]:
    run.c.execute(patient.insert().values((50, "secret-n", "secret-x", b"nonsense", *[None] * 4)))
    return [A, B, new("secret-x", None, "secret-n")]


def _whole_row(run: Run, **changed: Any) -> dict[str, Any]:
    """All of a row, with the hashes that it had before the change."""
    return {**run.c.execute(select(patient).where(patient.c.id == 1)).mappings().one(), **changed}


@form("core")
def a_whole_row_as_values(run: Run) -> list[Row]:
    run.c.execute(patient.insert().values(_whole_row(run, id=50, mrn="secret-x")))
    run.c.execute(
        patient.insert().values({patient.c[key]: v for key, v in _whole_row(run, id=51, mrn=None).items()})
    )
    run.c.execute(patient.update().where(patient.c.id == 2).values(_whole_row(run, id=2, mrn="secret-y")))
    return [A, ("secret-y", *A[1:]), ("secret-x", *A[1:]), (None, *A[1:])]


@form("core")
def whole_rows_as_parameters(run: Run) -> list[Row]:
    run.c.execute(
        patient.insert(), [_whole_row(run, id=50, mrn="secret-x"), _whole_row(run, id=51, mrn=None)]
    )
    run.c.execute(patient.update().where(patient.c.id == 2), _whole_row(run, id=2, mrn="secret-y"))
    return [A, ("secret-y", *A[1:]), ("secret-x", *A[1:]), (None, *A[1:])]


@form("core")
def whole_rows_as_many_values(run: Run) -> list[Row]:
    rows = [_whole_row(run, id=50, mrn="secret-x"), _whole_row(run, id=51, mrn=None)]
    run.c.execute(patient.insert().values(rows))
    return [A, B, ("secret-x", *A[1:]), (None, *A[1:])]


@form("core")
def a_whole_row_as_ordered_values(run: Run) -> list[Row]:
    row = _whole_row(run, mrn="secret-x")
    run.c.execute(patient.update().where(patient.c.id == 1).ordered_values(*reversed(row.items())))
    return [("secret-x", *A[1:]), B]


@form("upsert", ON_CONFLICT)
def a_whole_row_on_conflict(run: Run) -> list[Row]:
    row = _whole_row(run, mrn="secret-x")
    run.c.execute(run.upsert().values(row).on_conflict_do_update(index_elements=["id"], set_=row))
    return [("secret-x", *A[1:]), B]


@form("bulk")
def whole_rows_by_the_orm(run: Run) -> list[Row]:
    row = _whole_row(run, id=50, mrn="secret-x")
    row["email"] = row.pop("email_db")
    run.s.execute(insert(Patient), [row, {**row, "id": 51, "mrn": None}])
    run.s.execute(update(Patient), [{**row, "id": 2, "mrn": "secret-y"}])
    return [A, ("secret-y", *A[1:]), ("secret-x", *A[1:]), (None, *A[1:])]


@form("bulk")
def whole_rows_as_values_by_the_orm(run: Run) -> list[Row]:
    row = _whole_row(run, id=50, mrn="secret-x")
    row["email"] = row.pop("email_db")
    run.s.execute(insert(Patient).values(**row))
    run.s.execute(insert(Patient).values([{**row, "id": 51, "mrn": None}]))
    row = {key: value for key, value in row.items() if key != "id"}
    changed = update(Patient).where(Patient.id == 2).values(**{**row, "mrn": "secret-y"})
    run.s.execute(changed, execution_options={"synchronize_session": False})
    columns = {patient.c[key]: value for key, value in _whole_row(run, mrn="secret-z").items() if key != "id"}
    run.s.execute(update(Patient).where(Patient.mrn == "secret-a").values(columns))
    return [("secret-z", *A[1:]), ("secret-y", *A[1:]), ("secret-x", *A[1:]), (None, *A[1:])]


@form("core")
def ordered_values(run: Run) -> list[Row]:
    run.c.execute(patient.update().where(patient.c.id == 1).ordered_values(("n", 9), ("mrn", "secret-x")))
    return [("secret-x", *A[1:3], 9), B]


@form("core")
def executemany(run: Run) -> list[Row]:
    run.c.execute(patient.insert(), [{"mrn": "secret-x"}, {"mrn": "secret-y"}, {"mrn": None}])
    run.c.execute(patient.insert().values(n=bindparam("of_n")), [{"email_db": "secret-e", "of_n": 7}] * 2)
    by_key = patient.update().where(patient.c.id == bindparam("of_id"))
    run.c.execute(by_key, [{"of_id": 1, "mrn": "secret-1"}, {"of_id": 2, "mrn": "secret-2"}])
    return [
        ("secret-1", *A[1:]),
        ("secret-2", *B[1:]),
        *[new("secret-x"), new("secret-y"), new(None)],
        *[new(None, "secret-e", None, 7)] * 2,
    ]


@form("core")
def named_parameters(run: Run) -> list[Row]:
    by_key = patient.update().where(patient.c.id == bindparam("of_id"))
    run.c.execute(
        by_key.values(mrn=bindparam("m")), [{"of_id": 1, "m": "secret-x"}, {"of_id": 2, "m": "secret-y"}]
    )
    run.c.execute(by_key.values(name=bindparam("m", type_=String)), {"of_id": 1, "m": "secret-n"})
    run.c.execute(by_key.values(email_db=bindparam("m", type_=String)), [{"of_id": 2, "m": "secret-e"}])
    return [("secret-x", "secret-ea", "secret-n", 1), ("secret-y", "secret-e", "secret-nb", 2)]


@form("core")
def named_parameter_with_a_default(run: Run) -> list[Row]:
    statement = patient.insert().values(mrn=bindparam("m", "secret-default"))
    run.c.execute(statement, [{"m": "secret-x"}, {"m": "secret-y"}])
    run.c.execute(statement)
    return [A, B, new("secret-x"), new("secret-y"), new("secret-default")]


@form("core")
def one_named_parameter_for_several_columns(run: Run) -> list[Row]:
    m = bindparam("m", type_=String)
    run.c.execute(patient.update().where(patient.c.id == 1).values(name=m, mrn=m, note=m), {"m": "secret-a"})
    stored = run.c.execute(select(patient.c.note).where(patient.c.mrn == "secret-a")).scalars().all()
    assert stored == ["secret-a"]
    return [("secret-a", "secret-ea", "secret-a", 1), B]


@form("core")
def many_values(run: Run) -> list[Row]:
    run.c.execute(patient.insert().values([{"mrn": "secret-x", "n": 3}, {"mrn": "secret-y", "n": 4}]))
    run.c.execute(patient.insert().values([{patient.c.mrn: "secret-z", patient.c.name: literal("secret-n")}]))
    named = [{"mrn": bindparam("m1")}, {"mrn": bindparam("m2", type_=String)}]
    run.c.execute(patient.insert().values(named), {"m1": "secret-1", "m2": "secret-2"})
    return [
        *[A, B, new("secret-x", n=3), new("secret-y", n=4)],
        *[new("secret-z", None, "secret-n"), new("secret-1"), new("secret-2")],
    ]


@form("core")
def typed_binds(run: Run) -> list[Row]:
    for key in (1, 2):
        run.c.execute(
            patient.update()
            .where(patient.c.id == key)
            .values(
                name=literal(f"secret-n{key}"),
                mrn=literal(f"secret-{key}", String),
                email_db=bindparam(None, f"secret-e{key}", type_=String, unique=True),
            )
        )
    return [(f"secret-{key}", f"secret-e{key}", f"secret-n{key}", key) for key in (1, 2)]


@form("core")
def bind_of_a_callable(run: Run) -> list[Row]:
    values = iter(f"secret-{i}" for i in range(9))
    bind = bindparam("m", type_=String, callable_=lambda: next(values))
    run.c.execute(patient.update().where(patient.c.id == 1).values(mrn=bind))
    return [("secret-0", *A[1:]), B]


@form("core")
def values_with_null(run: Run) -> list[Row]:
    run.c.execute(patient.update().where(patient.c.id == 1).values(mrn=null(), name=null()))
    run.c.execute(patient.update().where(patient.c.id == 2).values(mrn=None))
    return [(None, "secret-ea", None, 1), (None, *B[1:])]


@form("core")
def returning(run: Run) -> list[Row]:
    statement = patient.insert().returning(patient.c.mrn, patient.c.mrn_hash, sort_by_parameter_order=True)
    found = run.c.execute(statement, [{"mrn": f"secret-{i}"} for i in range(5)]).all()
    assert [mrn for mrn, _ in found] == [f"secret-{i}" for i in range(5)]
    assert all(type(digest).__name__ == "Digest" for _, digest in found)
    return [A, B, *(new(f"secret-{i}") for i in range(5))]


@form("core")
def update_under_an_alias(run: Run) -> list[Row]:
    other = patient.alias("p")
    run.c.execute(
        update(other).where(other.c.mrn == "secret-a").values(mrn="secret-x", name=literal("secret-n"))
    )
    run.c.execute(update(other).where(other.c.id == 2), {"mrn": "secret-y"})
    return [("secret-x", "secret-ea", "secret-n", 1), ("secret-y", *B[1:])]


@form("core", MARIADB)
def update_of_two_tables(run: Run) -> list[Row]:
    versioned = Versioned.__table__
    run.s.add(Versioned(id=1, mrn="secret-v"))
    run.s.flush()
    joined = patient.join(versioned, patient.c.id == versioned.c.id)
    run.c.execute(
        update(joined).values({patient.c.mrn: literal("secret-x"), versioned.c.mrn: literal("secret-w")})
    )
    assert run.s.execute(select(versioned.c.mrn)).all() == [("secret-w",)]
    assert run.s.execute(select(versioned.c.id).where(versioned.c.mrn == "secret-w")).all() == [(1,)]
    run.c.execute(update(joined), {"mrn": "secret-y"})
    return [("secret-y", *A[1:]), B]


@form("core", MARIADB)
def update_of_an_encrypted_table_beside_a_plain_one(run: Run) -> list[Row]:
    run.c.execute(plain.insert().from_select(["id"], select(patient.c.id)))
    statement = plain.update().where(plain.c.id == patient.c.id, patient.c.mrn == "secret-a")
    run.c.execute(statement.values({plain.c.note: "n", patient.c.mrn: literal("secret-x")}))
    return [("secret-x", *A[1:]), B]


@form("core")
def insert_from_select_of_plain_columns(run: Run) -> list[Row]:
    run.c.execute(patient.insert().from_select(["n"], select(patient.c.n)))
    return [A, B, new(None, n=1), new(None, n=2)]


@form("core")
def insert_from_select_of_null(run: Run) -> list[Row]:
    nothing = select(patient.c.n, null(), cast(null(), LargeBinary), null().label("x"))
    run.c.execute(patient.insert().from_select(["n", "mrn", "name", "email_db"], nothing))
    nothing = select(func.count()).where(patient.c.mrn.is_(None), patient.c.mrn_hash.is_(None))
    assert run.s.scalar(nothing) == 2
    return [A, B, new(None, n=1), new(None, n=2)]


@form("core")
def insert_from_select_of_null_beside_a_default(run: Run) -> list[Row]:
    run.c.execute(defaulted.insert().from_select(["n", "constant"], select(patient.c.n, null())))
    nothing = (defaulted.c.constant.is_(None), defaulted.c.constant_hash.is_(None))
    assert run.s.scalar(select(func.count()).select_from(defaulted).where(*nothing)) == 2
    return [A, B]


@form("core")
def schema_translate_map(run: Run) -> list[Row]:
    run.c.execute(
        patient.insert(), {"mrn": "secret-x"}, execution_options={"schema_translate_map": {"x": None}}
    )
    other = patient.to_metadata(MetaData(), schema="x")
    run.c.execute(
        other.update().where(other.c.id == 1).values(n=7),
        execution_options={"schema_translate_map": {"x": None}},
    )
    return [(*A[:3], 7), B, new("secret-x")]


@form("core")
def given_dicts_and_lists_stay_as_they_were(run: Run) -> list[Row]:
    one, many, orm = {"mrn": "secret-x"}, [{"mrn": "secret-y"}, {"mrn": "secret-z"}], [{"mrn": "secret-o"}]
    values, named = [{"mrn": "secret-v"}], [{"m": "secret-n"}]
    run.c.execute(patient.insert(), one)
    run.c.execute(patient.insert(), many)
    run.c.execute(patient.insert().values(values))
    run.c.execute(patient.insert().values(mrn=bindparam("m")), named)
    run.s.execute(insert(Patient), orm)
    assert (one, many, orm) == (
        {"mrn": "secret-x"},
        [{"mrn": "secret-y"}, {"mrn": "secret-z"}],
        [{"mrn": "secret-o"}],
    )
    assert (values, named) == ([{"mrn": "secret-v"}], [{"m": "secret-n"}])
    return [A, B, *(new(f"secret-{name}") for name in "xyzovn")]


@form("core")
def one_statement_used_again(run: Run) -> list[Row]:
    statement = patient.insert().values(mrn=bindparam("m"), name="secret-n")
    before = str(statement.compile())
    for i in range(3):
        run.c.execute(statement, {"m": f"secret-{i}"})
    assert str(statement.compile()) == before
    return [A, B, *(new(f"secret-{i}", None, "secret-n") for i in range(3))]


# -- upserts ---------------------------------------------------------------------------------------------------------

# SQLAlchemy warns of the statement as it was given, as it does of a plain one.
AS_GIVEN = pytest.mark.filterwarnings(
    "ignore:Additional column names not matching", "ignore:UPDATE statement has a cartesian product"
)

SETS: dict[str, tuple[Callable[[Any], Any], Row]] = {
    "a value": (lambda st: {"mrn": "secret-w"}, ("secret-w", *A[1:])),
    "a value by column": (lambda st: {patient.c.mrn: "secret-w", patient.c.n: 9}, ("secret-w", *A[1:3], 9)),
    "a value by attribute": (lambda st: {Patient.email: "secret-w"}, ("secret-a", "secret-w", *A[2:])),
    "a value by a bare column": (lambda st: {column("name"): literal("secret-w")}, (*A[:2], "secret-w", 1)),
    "a typed bind": (
        lambda st: {"mrn": literal("secret-w"), "name": literal("secret-n")},
        ("secret-w", A[1], "secret-n", 1),
    ),
    "None": (lambda st: {"mrn": None, "name": null()}, (None, A[1], None, 1)),
    "excluded": (
        lambda st: {"mrn": st.excluded.mrn, "name": st.excluded.name},
        ("secret-k", A[1], "secret-n", 1),
    ),
    "excluded by column": (
        lambda st: {patient.c.email_db: st.excluded.email_db},
        ("secret-a", "secret-e", *A[2:]),
    ),
    "the row's own value": (lambda st: {"mrn": patient.c.mrn, "name": patient.c.name, "n": 9}, (*A[:3], 9)),
    "all of excluded": (lambda st: st.excluded, ("secret-k", "secret-e", "secret-n", None)),
    "all of excluded, as a dict": (
        lambda st: {c.name: c for c in st.excluded},
        ("secret-k", "secret-e", "secret-n", None),
    ),
}


@form("upsert", ON_CONFLICT)
def conflict_sets(run: Run) -> None:
    for name, (set_, expected) in SETS.items():
        nested = run.c.begin_nested()
        statement = run.upsert().values(id=1, mrn="secret-k", email_db="secret-e", name="secret-n")
        run.c.execute(statement.on_conflict_do_update(index_elements=["id"], set_=set_(statement)))
        same(rows_of(run.s), [expected, B], name)
        assert expected[0] is None or run.id_of(expected[0]) == 1, name
        nested.rollback()


@form("upsert", ON_CONFLICT)
def conflict_of_the_encrypted_unique_column(run: Run) -> list[Row]:
    for n, target in enumerate(
        ["mrn", patient.c.mrn, Patient.mrn, column("mrn"), patient.c.mrn_hash], start=3
    ):
        statement = run.upsert().values(mrn="secret-a", n=0)
        run.s.execute(statement.on_conflict_do_update(index_elements=[target], set_={"n": n}))
        assert rows_of(run.s) == [(*A[:3], n), B]
        run.c.execute(
            run.upsert().values(mrn="secret-b", n=0).on_conflict_do_nothing(index_elements=[target])
        )
    run.c.execute(run.upsert().values(mrn="secret-b").on_conflict_do_nothing())
    return [(*A[:3], 7), B]


@form("upsert", ON_CONFLICT)
def conflict_of_many_rows(run: Run) -> list[Row]:
    rows = [{"id": 1, "mrn": "secret-1"}, {"id": 50, "mrn": "secret-50"}]
    statement = run.upsert().values(rows)
    run.c.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"mrn": statement.excluded.mrn})
    )
    statement = run.upsert()
    statement = statement.on_conflict_do_update(
        index_elements=["id"], set_={"mrn": statement.excluded.mrn, "name": statement.excluded.name}
    )
    run.c.execute(
        statement, [{"id": 2, "mrn": "secret-2", "name": "secret-n2"}, {"id": 51, "mrn": None, "name": None}]
    )
    statement = run.upsert(Patient)
    statement = statement.on_conflict_do_update(
        index_elements=[Patient.id], set_={Patient.email: statement.excluded.email_db}
    )
    run.s.execute(statement, [{"id": 50, "email": "secret-e50"}, {"id": 51, "email": "secret-e51"}])
    return [
        ("secret-1", *A[1:]),
        ("secret-2", None, "secret-n2", 2),
        new("secret-50", "secret-e50"),
        new(None, "secret-e51"),
    ]


@form("upsert", ON_CONFLICT)
def conflict_with_a_condition(run: Run) -> list[Row]:
    for mrn, n in (("secret-a", 8), ("secret-b", 9)):
        statement = run.upsert(Patient).values(id=1, mrn="secret-k")
        run.s.execute(
            statement.on_conflict_do_update(index_elements=["id"], set_={"n": n}, where=(Patient.mrn == mrn))
        )
    return [(*A[:3], 8), B]


@form("upsert", ON_CONFLICT)
def conflict_returning(run: Run) -> list[Row]:
    statement = run.upsert(Patient).values(mrn="secret-a", email="secret-e")
    statement = statement.on_conflict_do_update(
        index_elements=["mrn"], set_={"email_db": statement.excluded.email_db}
    )
    person = run.s.scalars(statement.returning(Patient), execution_options={"populate_existing": True}).one()
    assert (person.id, person.email) == (1, "secret-e")
    return [("secret-a", "secret-e", *A[2:]), B]


@form("upsert", ON_CONFLICT)
def conflict_of_a_default(run: Run) -> None:
    for n in (1, 2):
        statement = run.upsert(Defaulted).values(id=1, n=n)
        run.s.execute(
            statement.on_conflict_do_update(index_elements=["id"], set_={"called": statement.excluded.called})
        )
    statement = run.upsert(Defaulted).values([{"id": 1, "n": 3}, {"id": 2, "n": 4}])
    run.s.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"called": statement.excluded.called})
    )
    found = run.s.scalars(select(Defaulted).order_by(Defaulted.id)).all()
    assert [run.s.scalar(select(Defaulted.id).where(Defaulted.called == row.called)) for row in found] == [
        1,
        2,
    ]


def several_conflict_clauses(run: Run) -> list[Row]:
    for values in ({"id": 9, "mrn": "secret-a"}, {"id": 2, "mrn": "secret-x"}):
        statement = run.upsert().values(values)
        statement = statement.on_conflict_do_update(
            index_elements=["mrn"], set_={"name": literal("secret-n")}
        )
        statement = statement.on_conflict_do_update(
            index_elements=["id"], set_={"mrn": statement.excluded.mrn}
        )
        run.c.execute(statement)
    return [(*A[:2], "secret-n", 1), ("secret-x", *B[1:])]


if hasattr(sqlite.Insert, "ext"):  # SQLAlchemy 2.1
    form("upsert", frozenset(["sqlite"]))(several_conflict_clauses)


@form("upsert", MARIADB)
def duplicate_key_sets(run: Run) -> None:
    sets: dict[str, tuple[Callable[[Any], Any], Row]] = {
        **{
            name: pair
            for name, pair in SETS.items()
            if name.startswith(("a value", "a typed", "None", "the row"))
        },
        "inserted": (
            lambda st: {"mrn": st.inserted.mrn, "name": st.inserted.name},
            ("secret-k", A[1], "secret-n", 1),
        ),
        "a list": (
            lambda st: [("n", 9), ("mrn", st.inserted.mrn), ("name", "secret-w")],
            ("secret-k", A[1], "secret-w", 9),
        ),
        "all of inserted": (lambda st: st.inserted, ("secret-k", "secret-e", "secret-n", None)),
    }
    for name, (set_, expected) in sets.items():
        nested = run.c.begin_nested()
        statement = run.upsert().values(id=1, mrn="secret-k", email_db="secret-e", name="secret-n")
        run.c.execute(statement.on_duplicate_key_update(set_(statement)))
        same(rows_of(run.s), [expected, B], name)
        assert expected[0] is None or run.id_of(expected[0]) == 1, name
        nested.rollback()
    statement = run.upsert(Patient).values(mrn="secret-a", email="secret-e")
    run.s.execute(statement.on_duplicate_key_update(mrn="secret-x", email_db=statement.inserted.email_db))
    assert rows_of(run.s) == [("secret-x", "secret-e", *A[2:]), B]


@form("upsert", MARIADB)
def duplicate_key_of_many_rows(run: Run) -> list[Row]:
    statement = run.upsert().values([{"id": 1, "mrn": "secret-1"}, {"id": 50, "mrn": "secret-50"}])
    run.c.execute(statement.on_duplicate_key_update(mrn=statement.inserted.mrn))
    statement = run.upsert()
    statement = statement.on_duplicate_key_update(name=statement.inserted.name, mrn=statement.inserted.mrn)
    run.c.execute(
        statement, [{"id": 2, "mrn": "secret-2", "name": "secret-n2"}, {"id": 51, "mrn": None, "name": None}]
    )
    return [("secret-1", *A[1:]), ("secret-2", None, "secret-n2", 2), new("secret-50"), new(None)]


# -- defaults --------------------------------------------------------------------------------------------------------


def _defaulted(run: Run, n: int) -> Any:
    """The row with this n, found by each of its hashes, too."""
    row = run.c.execute(select(defaulted).where(defaulted.c.n == n)).one()
    for key in ("called", "constant", "touched"):
        if getattr(row, key) is not None:
            found = (
                run.c.execute(select(defaulted.c.n).where(defaulted.c[key] == getattr(row, key)))
                .scalars()
                .all()
            )
            assert n in found
    return row


@form("defaults")
def defaults_of_a_flush(run: Run) -> None:
    run.s.add_all([Defaulted(n=1), Defaulted(n=2, called="secret-given", constant=None), Contextual(n=3)])
    run.s.flush()
    assert _defaulted(run, 1).constant == "secret-constant"
    assert _defaulted(run, 1).unsearchable == "secret-unsearchable"
    assert _defaulted(run, 2).called == "secret-given"
    assert run.s.scalars(select(Contextual.n).where(Contextual.derived == "secret-3")).all() == [3]


@form("defaults")
def defaults_of_core_and_bulk(run: Run) -> None:
    run.c.execute(defaulted.insert(), {"n": 1})
    run.c.execute(defaulted.insert(), [{"n": 2}, {"n": 3}])
    run.c.execute(defaulted.insert(), [{"n": 4, "called": "secret-given"}, {"n": 5, "called": None}])
    run.c.execute(defaulted.insert().values(n=6))
    run.s.execute(insert(Defaulted), [{"n": 7}, {"n": 8}])
    run.c.execute(defaulted.insert(), [{"n": 9, "constant_hash": None}])
    called = {_defaulted(run, n).called for n in range(1, 10)}
    assert len(called) == 9
    assert None in called
    assert "secret-given" in called
    assert _defaulted(run, 9).constant == "secret-constant"
    run.c.execute(contextual.insert(), [{"n": 1}, {"n": 2}])
    run.s.execute(insert(Contextual), [{"n": 3}, {"n": 4}])
    found = run.s.scalars(select(Contextual.n).where(Contextual.derived.in_(["secret-2", "secret-4"]))).all()
    assert sorted(found) == [2, 4]


@form("defaults")
def defaults_of_many_values(run: Run) -> None:
    run.c.execute(defaulted.insert().values([{"n": 1}, {"n": 2}]))
    run.s.execute(insert(Defaulted).values([{"n": 3}, {"n": 4, "constant": "secret-given"}]))
    assert len({_defaulted(run, n).called for n in (1, 2, 3, 4)}) == 4
    assert [_defaulted(run, n).constant for n in (3, 4)] == ["secret-constant", "secret-given"]
    run.c.execute(contextual.insert().values([{"n": 1, "derived": "secret-given"}]))


@form("defaults")
def defaults_inside_from_statement(run: Run) -> None:
    for values in ({"n": 1}, [{"n": 2}, {"n": 3, "constant": "secret-given"}]):
        statement = insert(Defaulted).values(values).returning(Defaulted)
        for row in run.s.scalars(select(Defaulted).from_statement(statement)).all():
            assert row.called == _defaulted(run, row.n).called
    assert [_defaulted(run, n).constant for n in (1, 2, 3)] == [*["secret-constant"] * 2, "secret-given"]


@form("defaults", EVERYWHERE - MARIADB)
def onupdate_inside_from_statement(run: Run) -> None:
    run.s.add(Defaulted(id=1, n=1))
    run.s.flush()
    statement = update(Defaulted).values(n=2).returning(Defaulted)
    (row,) = run.s.scalars(select(Defaulted).from_statement(statement)).all()
    run.s.refresh(row)
    assert row.touched == _defaulted(run, 2).touched != "secret-new"


@form("defaults")
def defaults_of_insert_from_select(run: Run) -> None:
    run.c.execute(defaulted.insert().from_select(["n"], select(patient.c.n)))
    rows = [_defaulted(run, n) for n in (1, 2)]
    assert {row.constant for row in rows} == {"secret-constant"}
    assert len({row.called for row in rows}) == 1
    run.c.execute(contextual.insert().from_select(["n"], select(patient.c.n), include_defaults=False))
    assert run.c.execute(select(contextual.c.derived)).scalars().all() == [None, None]


@form("defaults")
def onupdate(run: Run) -> None:
    run.s.add_all([Defaulted(id=1, n=1), Defaulted(id=2, n=2)])
    run.s.flush()
    seen = ["secret-new"]

    def changed() -> None:
        seen.append(_defaulted(run, n).touched)
        assert seen[-1] != seen[-2]
        assert seen[-1].startswith("secret-touched")

    n = 10
    run.s.get_one(Defaulted, 1).n = n
    run.s.flush()
    changed()
    n = 11
    run.c.execute(defaulted.update().where(defaulted.c.id == 1).values(n=n))
    changed()
    n = 12
    run.s.execute(update(Defaulted).where(Defaulted.id == 1).values(n=n))
    changed()
    n = 13
    run.s.execute(update(Defaulted), [{"id": 1, "n": n}, {"id": 2, "n": 20}])
    changed()
    n = 14
    run.c.execute(defaulted.update().where(defaulted.c.id == bindparam("of_id")), [{"of_id": 1, "n": n}])
    changed()
    run.s.execute(update(Defaulted).where(Defaulted.id == 1).values(touched="secret-given"))
    assert _defaulted(run, n).touched == "secret-given"


# -- refused ---------------------------------------------------------------------------------------------------------

MRN, EMAIL, NAME = "patient.mrn", "patient.email_db", "patient.name"


def _upsert(run: Run, set_: Callable[[Any], Any], **values: Any) -> Any:
    statement = run.upsert().values(id=1, mrn="secret-k", email_db="secret-e", name="secret-n")
    if run.kind in ON_CONFLICT:
        statement = statement.on_conflict_do_update(index_elements=["id"], set_=set_(statement.excluded))
    else:
        statement = statement.on_duplicate_key_update(set_(statement.inserted))
    return run.c.execute(statement, values)


def _execute(build: Callable[[], Any], *rows: Any) -> Work:
    return lambda run: run.s.execute(build(), *rows)


def _core(build: Callable[[], Any], *rows: Any) -> Work:
    return lambda run: run.c.execute(build(), *rows)


for _key, _id in (("mrn", MRN), ("name", NAME)):
    for _kind, _value in {
        "a function": func.lower("secret-x"),
        "text": text("'secret-x'"),
        "a cast": cast("secret-x", String(60)),
        "a type_coerce": type_coerce("secret-x", String),
        "a label": literal("secret-x").label("y"),
        "another column": patient.c.note,
        "another encrypted column": patient.c.email_db,
        "a subquery": select(patient.c.note).limit(1).scalar_subquery(),
    }.items():
        refused(f"{_kind} as {_key}", _id, _core(lambda k=_key, v=_value: patient.update().values({k: v})))

refused("an expression in an ORM update", MRN, _execute(lambda: update(Patient).values(mrn=Patient.email)))
refused(
    "an expression in an ORM insert",
    MRN,
    _execute(lambda: insert(Patient).values(mrn=func.lower("secret-x"))),
)
refused(
    "an expression in many values",
    MRN,
    _core(lambda: patient.insert().values([{"mrn": func.lower("secret-x")}])),
)
refused("an expression in a flush", MRN, lambda run: _expression(run.s, 1, "mrn", func.lower("secret-x")))
refused("an aliased column", MRN, _execute(lambda: update(Patient).values(mrn=aliased(Patient).mrn)))

refused("a hash in values", MRN, _execute(lambda: update(Patient).values({patient.c.mrn_hash: b"secret"})))
refused("a hash in many values", MRN, _core(lambda: patient.insert().values([{"mrn_hash": b"secret"}])))
refused("a hash in parameters", MRN, _core(patient.insert, {"mrn_hash": b"secret"}))
refused("a hash in a later row", MRN, _core(patient.insert, [{"mrn_hash": None}, {"mrn_hash": b"secret"}]))
refused("no hash in an update", MRN, _core(patient.update, {"mrn_hash": None}))
refused("a hash under an alias", MRN, _core(lambda: update(patient.alias()).values(mrn_hash=b"secret")))

refused("from select", MRN, _execute(lambda: insert(Patient).from_select(["mrn"], select(Patient.mrn))))
refused(
    "from select, not searchable",
    NAME,
    _core(lambda: patient.insert().from_select(["name"], select(patient.c.note))),
)
refused(
    "a hash from select",
    MRN,
    _core(lambda: patient.insert().from_select(["mrn_hash"], select(patient.c.mrn_hash))),
)
refused(
    "a hash alone on conflict",
    MRN,
    _execute(lambda: sqlite.insert(Patient).values(id=1).on_conflict_do_update(set_={"mrn_hash": b"secret"})),
    frozenset(["sqlite"]),
)
refused("positional rows", None, _core(lambda: patient.insert().values([(50, "secret-n", "secret-x", None)])))
for _way, _row in {
    "a positional row": (50, "secret-n", "secret-x", "secret-e"),
    "a positional row of NULL": [50, None, None, None, "secret-e"],
}.items():
    refused(_way, None, _core(lambda row=_row: patient.insert().values(row)))
    refused(f"{_way}, by the ORM", None, _execute(lambda row=_row: insert(Patient).values(row)))
refused(
    "a parameter in the place of one of many values",
    None,
    _core(lambda: patient.insert().values([{"mrn": "secret-x"}]), {"mrn_m0": "secret-y"}),
)
refused(
    "a column twice in many values",
    None,
    _core(
        lambda: patient.insert().values([{"mrn": "secret-a"}, {patient.c.mrn: "secret-x", "mrn": "secret-y"}])
    ),
)
refused(
    "a default that reads its row, in many values",
    "contextual.derived",
    _core(lambda: contextual.insert().values([{"n": 1}, {"n": 2}])),
)
refused(
    "a column of a table that is not in the UPDATE",
    None,
    _core(lambda: patient.update().values({Versioned.__table__.c.mrn: "secret-x"})),
)

refused("an upsert's function", MRN, lambda run: _upsert(run, lambda new: {"mrn": func.lower("secret-x")}))
refused(
    "an upsert's coalesce",
    MRN,
    lambda run: _upsert(run, lambda new: {"mrn": func.coalesce(new.mrn, patient.c.mrn)}),
)


def _keyed(name: str, key: str) -> Any:
    made: Any = column(name)
    made.key = key
    return made


refused("an upsert's other column", MRN, lambda run: _upsert(run, lambda new: {"mrn": new.email_db}))
refused("an upsert's plain column", NAME, lambda run: _upsert(run, lambda new: {"name": patient.c.note}))
refused(
    "an upsert's named parameter",
    MRN,
    lambda run: _upsert(run, lambda new: {"mrn": bindparam("m")}, m="secret-x"),
)
refused("an upsert's other spelling", None, lambda run: _upsert(run, lambda new: {"NAME": "secret-x"}))
refused(
    "an upsert's other spelling under another's key",
    None,
    lambda run: _upsert(run, lambda new: {_keyed("NAME", "note"): "secret-x"}),
)
refused(
    "a conflict of a column that is not searchable",
    NAME,
    lambda run: run.c.execute(
        run.upsert().values(name="secret-x").on_conflict_do_nothing(index_elements=["name"])
    ),
    ON_CONFLICT,
)
