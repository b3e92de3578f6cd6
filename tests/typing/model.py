"""A user's models in every style of declaration, for mypy --strict and pyright to read."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Table,
    Time,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    select,
)
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declared_attr,
    mapped_column,
    registry,
)
from typing_extensions import assert_type

from sqla_byok import Byok, Encrypted, hash_index
from sqla_byok.normalize import casefold, compose, digits, last, named, trim, year


class Blood(enum.Enum):
    A = "a"
    B = "b"


class Upper(TypeDecorator[str]):
    """A type of the user's own."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.upper()


assert_type(Encrypted(String(20)), Encrypted[str])
assert_type(Encrypted(String), Encrypted[str])
assert_type(Encrypted(Date), Encrypted[date])
assert_type(Encrypted(Upper, searchable=True), Encrypted[str])


@named("name-and-year", version=2)
def name_and_year(name: str, born: date) -> str | None:
    """A transform of the user's own."""
    return f"{casefold(name)}/{born.year}" if name else None


Secret = Encrypted(String(50), searchable=True, salt_scope="contact", normalize=casefold)
Phone = Annotated[
    str, mapped_column(Encrypted(String(40), searchable=True, normalize=compose(trim, digits), pad_to=16))
]
Phi = Annotated[str, 50]


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 - that is how SQLAlchemy wants it
        Phi: Encrypted(String(50)),
        dict[str, Any]: Encrypted(JSON),
    }


class HasEmail:
    email: Mapped[str | None] = mapped_column(Secret)

    @declared_attr
    def tax(self) -> Mapped[str | None]:
        return mapped_column(Encrypted(String(20), searchable=True, hash="hmac-sha256"))


class Patient(HasEmail, Base):
    __tablename__ = "patient"
    __table_args__ = (UniqueConstraint("org", "mrn"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(20))
    name: Mapped[str] = mapped_column(Encrypted(String(120)))
    mrn: Mapped[str] = mapped_column(
        Encrypted(String(20), searchable=True, column_id="person.mrn"), unique=True
    )
    initials: Mapped[str | None] = mapped_column(Encrypted(Upper, searchable=True))
    photo: Mapped[bytes | None] = mapped_column(Encrypted(LargeBinary))
    visits: Mapped[int | None] = mapped_column(Encrypted(Integer))
    weight: Mapped[float | None] = mapped_column(Encrypted(Float))
    debt: Mapped[Decimal | None] = mapped_column(Encrypted(Numeric(10, 2)))
    insured: Mapped[bool | None] = mapped_column(Encrypted(Boolean))
    born: Mapped[date | None] = mapped_column(Encrypted(Date))
    seen: Mapped[datetime | None] = mapped_column(Encrypted(DateTime(timezone=True)))
    wakes: Mapped[time | None] = mapped_column(Encrypted(Time))
    waits: Mapped[timedelta | None] = mapped_column(Encrypted(Interval))
    token: Mapped[UUID | None] = mapped_column(Encrypted(Uuid))
    blood: Mapped[Blood | None] = mapped_column(Encrypted(Enum(Blood), searchable=True))
    findings: Mapped[dict[str, Any] | None]
    settings: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(Encrypted(JSON)))
    note: Mapped[Phi | None]
    phone: Mapped[Phone | None]
    phone_last4 = hash_index("phone", transform=last(4))
    born_year = hash_index(born, transform=year, name="year")
    who = hash_index(name, "born", transform=name_and_year, unique=True)


class Record(MappedAsDataclass, Base):
    __tablename__ = "record"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    code: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)
    phone: Mapped[Phone | None] = mapped_column(default=None)


registered = registry()
visitor_table = Table(
    "visitor",
    registered.metadata,
    Column("id", Integer, primary_key=True),
    Column("badge", Encrypted(String(20), searchable=True)),
)


class Visitor:
    id: int
    badge: str
    badge_end = hash_index("badge", transform=last(2))


registered.map_imperatively(Visitor, visitor_table)


def save_and_find(session: Session) -> Sequence[str]:
    """What an application does, as its types say it."""
    ada = Patient(org="x", name="Ada", mrn="A-1", blood=Blood.A, initials="al", seen=None)
    record = Record(code="R-1")
    session.add_all([ada, record])
    session.flush()
    assert_type(ada.mrn, str)
    assert_type(ada.born, date | None)
    assert_type(ada.debt, Decimal | None)
    assert_type(record.code, str)
    assert_type(ada.phone_last4, str | None)
    assert_type(ada.born_year, int | None)
    assert_type(ada.who, str | None)
    wanted = Patient.phone_last4.in_(["1234"]) & (Patient.born_year == 1815) & Patient.who.is_not(None)
    assert session.scalars(select(Patient).where(wanted, Patient.who != "x")).all() == []
    same = session.scalars(select(Patient).where(Patient.mrn == "A-1", Patient.blood.in_([Blood.A]))).one()
    assert_type(same, Patient)
    assert session.scalars(select(Record).where(Record.code != "R-2")).one() is record
    return session.scalars(select(Patient.name).where(Patient.initials == "AL")).all()


def limit(byok: Byok) -> None:
    """What a tenant enables."""
    byok.set_searchable("org-1", {Patient.mrn, Patient.phone_last4, "patient.blood"})
    byok.set_searchable("org-1", None)
