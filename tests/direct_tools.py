"""What the tests of ``mode="direct"`` share: a metered KMS, models, and the ways to write and read their values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from sqlalchemy import (
    Date,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    String,
    bindparam,
    func,
    insert,
    literal,
    select,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
)

from sqla_byok import Encrypted, LocalKms, WrongKeyError
from sqla_byok.kms import Kms, Operator, Wrapped, providers

VALUE = 0xB1


class Meter:
    """Counts the calls for values, and how many of them were under way at once.

    :ivar opened: calls that opened a tenant.
    :ivar encrypted: calls that encrypted a value, as the tenants they were for.
    :ivar decrypted: calls that decrypted one.
    :ivar most: the most calls under way at once.
    :ivar on_call: called with each call for a value, while it is under way; may wait or raise.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.room = 4096
        self.version = ""
        self.on_call: Callable[[str], None] = lambda operation: None
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.opened: list[str] = []
        self.encrypted: list[str] = []
        self.decrypted: list[str] = []
        self.under_way = self.most = 0

    def call(self, operation: str, tenant: str, function: Callable[[], Any]) -> Any:
        """Make a call for a value."""
        with self._lock:
            (self.encrypted if operation == "encrypt" else self.decrypted).append(tenant)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            self.on_call(operation)
            return function()
        finally:
            with self._lock:
                self.under_way -= 1


@dataclass(frozen=True)
class MeteredKms(Kms):
    """A LocalKms, in whose place it stands in the keystore, behind a meter."""

    provider: ClassVar[str] = "local"
    outbound: ClassVar[bool] = False
    meter: ClassVar[Meter] = Meter()
    path: str
    profile: str = field(default="default", init=False)

    def config(self) -> dict[str, str]:
        return {"path": self.path}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> MeteredKms:
        return cls(config["path"])

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> MeteredKms:
        return self

    def room(self, wrapped: Wrapped) -> int:
        return self.meter.room

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        local = LocalKms(self.path).connect({})
        if payload[0] != VALUE:
            return local.wrap(payload, tenant=tenant)
        blob = self.meter.call("encrypt", tenant, lambda: local.wrap(payload, tenant=tenant).blob)
        return Wrapped(blob, self.meter.version)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        local = LocalKms(self.path).connect({})
        if len(wrapped.blob) == 95:  # 65 bytes of a tenant key, and LocalKms's 30
            self.meter.opened.append(tenant)
            return local.unwrap(wrapped, tenant=tenant)

        def call() -> bytes:
            if wrapped.key_version != self.meter.version:
                raise WrongKeyError("no such version", tenant=tenant, request_id="r-1")
            return local.unwrap(wrapped, tenant=tenant)

        answer: bytes = self.meter.call("decrypt", tenant, call)
        return answer


@pytest.fixture
def local_kms(customer_key: Any, monkeypatch: pytest.MonkeyPatch) -> MeteredKms:
    """In the place of the LocalKms of the ``byok`` fixtures."""
    monkeypatch.setitem(providers, "local", MeteredKms)
    monkeypatch.setattr(MeteredKms, "meter", Meter())
    return MeteredKms(str(customer_key))


@pytest.fixture
def meter(local_kms: MeteredKms) -> Meter:
    return local_kms.meter


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    # PostgreSQL's counter must keep clear of the ids that the forms give
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10), default="plain")
    name: Mapped[str | None] = mapped_column(Encrypted(String(60)))
    ssn: Mapped[Any] = mapped_column(Encrypted(String(60), searchable=True, mode="direct"), nullable=True)
    born: Mapped[Any] = mapped_column("born_db", Encrypted(Date, mode="direct", pad_to=16), nullable=True)
    made: Mapped[int] = mapped_column(Integer, server_default="7")
    visits: Mapped[list[Visit]] = relationship(order_by="Visit.id")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}  # noqa: RUF012 - as Declarative has it


class Vip(Patient):
    __tablename__ = "vip"
    id: Mapped[int] = mapped_column(ForeignKey("patient.id"), primary_key=True)
    phone: Mapped[Any] = mapped_column(Encrypted(String(60), mode="direct"), nullable=True)
    __mapper_args__ = {"polymorphic_identity": "vip"}  # noqa: RUF012


class Visit(Base):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    patient_id: Mapped[int] = mapped_column(ForeignKey("patient.id"))
    code: Mapped[Any] = mapped_column(Encrypted(String(60), mode="direct"), nullable=True)


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True))


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[Any] = mapped_column(Encrypted(LargeBinary, mode="direct"))
    # its normalizer takes anything
    tag: Mapped[Any] = mapped_column(Encrypted(String, searchable=True, normalize=str), nullable=True)


patients = Patient.__table__
STORED = select(type_coerce(patients.c.ssn, LargeBinary)).order_by(patients.c.id)


def stored(session: Session) -> list[bytes]:
    """What the database holds of each ssn."""
    return [bytes(blob) for blob in session.scalars(STORED) if blob is not None]


def fill(session: Session) -> None:
    """Six patients: three plain with a visit each, one with none of it, two VIPs. 3 + 3 + 2 × 2 values."""
    session.add_all(
        [Patient(id=n, ssn=f"ssn-{n}", visits=[Visit(id=n, code=f"code-{n}")]) for n in (1, 2, 3)]
    )
    session.add(Patient(id=4))
    session.add_all([Vip(id=n, ssn=f"ssn-{n}", phone=f"phone-{n}") for n in (5, 6)])
    session.commit()


FILLED = 10

# -- ways to write: each gives how many values it writes, and the ssns that there are then ---------------------------

Written = tuple[int, list[str]]


def flush(session: Session) -> Written:
    session.add_all([Patient(id=n, ssn=f"s{n}", name="x") for n in range(1, 6)])
    session.flush()
    return 5, [f"s{n}" for n in range(1, 6)]


def flush_by_the_database_ids(session: Session) -> Written:
    session.add_all([Patient(ssn=f"s{n}") for n in range(5)])
    session.flush()
    return 5, [f"s{n}" for n in range(5)]


def flush_an_update(session: Session) -> Written:
    one, two = Patient(id=1, ssn="a"), Patient(id=2, ssn="b", name="x")
    session.add_all([one, two])
    session.flush()
    one.ssn, two.name = "c", "y"
    session.flush()
    return 3, ["c", "b"]


def several_values_of_a_row(session: Session) -> Written:
    from datetime import date

    session.add(Vip(id=1, ssn="a", born=date(1999, 1, 2), phone="1"))
    session.flush()
    return 3, ["a"]


def orm_bulk(session: Session) -> Written:
    session.execute(insert(Patient), [{"id": n, "ssn": f"s{n}"} for n in range(1, 6)])
    return 5, [f"s{n}" for n in range(1, 6)]


def orm_bulk_update(session: Session) -> Written:
    orm_bulk(session)
    session.execute(update(Patient), [{"id": n, "ssn": f"t{n}"} for n in range(1, 4)])
    return 8, ["t1", "t2", "t3", "s4", "s5"]


def core_executemany(session: Session) -> Written:
    session.execute(insert(patients), [{"id": n, "kind": "plain", "ssn": f"s{n}"} for n in range(1, 6)])
    return 5, [f"s{n}" for n in range(1, 6)]


def core_update_executemany(session: Session) -> Written:
    core_executemany(session)
    statement = update(patients).where(patients.c.id == bindparam("which")).values(ssn=bindparam("new"))
    session.connection().execute(statement, [{"which": n, "new": f"t{n}"} for n in (1, 2)])
    return 7, ["t1", "t2", "s3", "s4", "s5"]


def small_batches(session: Session) -> Written:
    rows = [{"kind": "plain", "ssn": f"s{n}"} for n in range(7)]
    found = session.execute(
        insert(patients).returning(patients.c.id, sort_by_parameter_order=True),
        rows,
        execution_options={"insertmanyvalues_page_size": 2},
    )
    assert len(found.all()) == 7
    return 7, [f"s{n}" for n in range(7)]


def multi_values(session: Session) -> Written:
    session.execute(insert(Patient).values([{"id": n, "kind": "plain", "ssn": f"s{n}"} for n in (1, 2)]))
    return 2, ["s1", "s2"]


def a_literal(session: Session) -> Written:
    session.execute(insert(patients).values(id=1, kind="plain", ssn=literal("a")))
    return 1, ["a"]


def update_where(session: Session) -> Written:
    orm_bulk(session)
    session.execute(update(Patient).where(Patient.ssn == "s2").values(ssn="t"))
    return 6, ["s1", "t", "s3", "s4", "s5"]


def upsert(session: Session) -> Written:
    session.execute(insert(patients).values(id=1, kind="plain", ssn="a"))
    dialect = session.get_bind().dialect.name
    make: Any = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}.get(dialect, mysql.insert)
    statement = make(patients).values(id=1, kind="plain", ssn="b")
    if make is mysql.insert:
        statement = statement.on_duplicate_key_update(ssn="c")
    else:
        statement = statement.on_conflict_do_update(index_elements=["id"], set_={"ssn": "c"})
    session.execute(statement)
    return 3, ["c"]


def merged(session: Session) -> Written:
    session.merge(Patient(id=1, ssn="a"))
    session.flush()
    return 1, ["a"]


def nothing(session: Session) -> Written:
    session.add_all([Patient(id=1, ssn=None, name="x"), Plain(id=1, name="y")])
    session.flush()
    session.scalars(select(Plain).where(Plain.name == "y")).one()
    return 0, []


WRITE = [
    flush,
    flush_by_the_database_ids,
    flush_an_update,
    several_values_of_a_row,
    orm_bulk,
    orm_bulk_update,
    core_executemany,
    core_update_executemany,
    small_batches,
    multi_values,
    a_literal,
    update_where,
    upsert,
    merged,
    nothing,
]

# -- ways to read what fill() wrote: each gives how many values it decrypts, what it read and what it should have ----

Read = tuple[int, list[Any], list[Any]]
SSNS = ["ssn-1", "ssn-2", "ssn-3", None, "ssn-5", "ssn-6"]


def entities(session: Session) -> Read:
    return 5, [patient.ssn for patient in session.scalars(select(Patient).order_by(Patient.id))], SSNS


def of_a_subclass(session: Session) -> Read:
    vips = session.scalars(select(Vip).order_by(Vip.id)).all()
    return 4, [(v.ssn, v.phone) for v in vips], [("ssn-5", "phone-5"), ("ssn-6", "phone-6")]


def columns(session: Session) -> Read:
    rows = session.execute(select(Patient.id, Patient.ssn, Patient.name).order_by(Patient.id))
    return 5, [row.ssn for row in rows], SSNS


def labels_and_aliases(session: Session) -> Read:
    other = aliased(Patient)
    rows = session.execute(
        select(Patient.ssn.label("x"), other.ssn.label("y")).join(other, other.id == Patient.id + 1)
        .where(Patient.id < 3).order_by(Patient.id)
    )  # fmt: skip
    # ssn-2 stands in both rows, and is one value
    return 3, [(row.x, row.y) for row in rows], [("ssn-1", "ssn-2"), ("ssn-2", "ssn-3")]


def subquery(session: Session) -> Read:
    inner = select(Patient).where(Patient.id < 4).subquery()
    rows = session.execute(select(inner.c.made, inner.c.ssn).order_by(inner.c.id))
    return 3, [row.ssn for row in rows], SSNS[:3]


def union(session: Session) -> Read:
    both = union_all(
        select(patients.c.id, patients.c.ssn).where(patients.c.id == 1),
        select(patients.c.id, patients.c.ssn).where(patients.c.id == 2),
    )
    return 2, [row.ssn for row in session.execute(both.order_by("id"))], SSNS[:2]


def eager(session: Session) -> Read:
    found = session.scalars(select(Patient).options(joinedload(Patient.visits)).order_by(Patient.id))
    got = [(p.ssn, [v.code for v in p.visits]) for p in found.unique() if p.id < 4]
    return 8, got, [(f"ssn-{n}", [f"code-{n}"]) for n in (1, 2, 3)]


def lazy(session: Session) -> Read:
    return 2, [v.code for v in session.get_one(Patient, 1).visits], ["code-1"]


def found_by_hash(session: Session) -> Read:
    return 1, list(session.scalars(select(Patient.ssn).where(Patient.ssn.in_(["ssn-3", "-"])))), ["ssn-3"]


def refreshed(session: Session) -> Read:
    patient = session.get_one(Patient, 1)
    session.refresh(patient)
    return 2, [patient.ssn], ["ssn-1"]


def one_by_one(session: Session) -> Read:
    result = session.execute(select(Patient.ssn).order_by(Patient.id))
    got = []
    while (row := result.fetchone()) is not None:
        got.append(row[0])
    return 5, got, SSNS


def in_parts(session: Session) -> Read:
    result = session.scalars(select(Patient).order_by(Patient.id).execution_options(yield_per=2))
    return 5, [patient.ssn for part in result.partitions() for patient in part], SSNS


def by_fetchmany(session: Session) -> Read:
    result = session.execute(select(patients.c.ssn).order_by(patients.c.id))
    return 5, [row[0] for size in (4, 1, 9) for row in result.fetchmany(size)], SSNS


def yielded(session: Session) -> Read:
    result = session.connection().execute(select(patients.c.ssn).order_by(patients.c.id)).yield_per(4)
    return 5, [row[0] for row in result], SSNS


def streamed(session: Session) -> Read:
    statement = select(patients.c.ssn).order_by(patients.c.id).execution_options(stream_results=True)
    return 5, [row[0] for row in session.execute(statement)], SSNS


def text_by_name(session: Session) -> Read:
    statement = text("SELECT ssn, id FROM patient WHERE id < 3 ORDER BY id").columns(ssn=patients.c.ssn.type)
    return 2, [row.ssn for row in session.execute(statement)], SSNS[:2]


def text_as_orm(session: Session) -> Read:
    statement = text("SELECT id, ssn FROM patient WHERE id < 3 ORDER BY id")
    found = session.scalars(select(Patient.ssn).from_statement(statement.columns(Patient.id, Patient.ssn)))
    return 2, list(found), SSNS[:2]


def ciphertext_itself(session: Session) -> Read:
    got = session.execute(
        select(type_coerce(patients.c.ssn, LargeBinary)).where(patients.c.id == 1)
    ).scalar_one()
    return 0, [bytes(got)[:2]], [b"\xb1\x10"]


def without_direct_columns(session: Session) -> Read:
    return (
        0,
        [session.scalars(select(Patient.name)).all(), session.scalar(select(func.count(Patient.ssn)))],
        [
            [None] * 6,
            5,
        ],
    )


READ = [
    entities,
    of_a_subclass,
    columns,
    labels_and_aliases,
    subquery,
    union,
    eager,
    lazy,
    found_by_hash,
    refreshed,
    one_by_one,
    in_parts,
    by_fetchmany,
    yielded,
    streamed,
    text_by_name,
    text_as_orm,
    ciphertext_itself,
    without_direct_columns,
]
