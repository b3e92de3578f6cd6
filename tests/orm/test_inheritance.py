"""Encrypted columns under single-table, joined and concrete inheritance."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, String, event, func, inspect, or_, select, update
from sqlalchemy.ext.declarative import AbstractConcreteBase, ConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    configure_mappers,
    mapped_column,
    selectin_polymorphic,
    with_polymorphic,
)

from sqla_byok import Byok, Encrypted, UnsupportedQueryError


def searchable(**options: Any) -> Encrypted[str]:
    return Encrypted(String(20), searchable=True, **options)


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """The SQL that reaches the driver meanwhile."""
    seen: list[str] = []

    def listen(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: Any) -> None:
        seen.append(" ".join(statement.split()))

    event.listen(engine, "before_cursor_execute", listen)
    yield seen
    event.remove(engine, "before_cursor_execute", listen)


def fetched(statement: str) -> str:
    return statement.split(" FROM ")[0]


def staff() -> tuple[Any, Any, Any, Any]:
    """Person; Doctor and Nurse share its table and one column; Employee has a table of its own."""

    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __tablename__ = "person"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(20))
        name: Mapped[str] = mapped_column("full_name", searchable())
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    class Doctor(Person):
        licence: Mapped[str | None] = mapped_column(searchable(), use_existing_column=True)
        title: Mapped[str | None] = mapped_column(searchable(), unique=True)
        __mapper_args__ = {"polymorphic_identity": "doctor"}  # noqa: RUF012

    class Nurse(Person):
        licence: Mapped[str | None] = mapped_column(searchable(), use_existing_column=True)
        __mapper_args__ = {"polymorphic_identity": "nurse"}  # noqa: RUF012

    class Employee(Person):
        __tablename__ = "employee"
        id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
        badge: Mapped[str | None] = mapped_column(searchable(), unique=True)
        __mapper_args__ = {"polymorphic_identity": "employee"}  # noqa: RUF012

    return Person, Doctor, Nurse, Employee


def test_columns_and_attributes_of_a_hierarchy() -> None:
    """A subclass's columns join its table with their siblings; no class has an attribute for a hash."""
    person, doctor, nurse, employee = staff()

    assert person.__table__.c.keys() == [
        "id", "kind", "full_name", "full_name_hash", "licence", "licence_hash", "title", "title_hash"
    ]  # fmt: skip
    assert person.__table__.c.licence.type.column_id == "person.licence"
    assert employee.__table__.c.keys() == ["id", "badge", "badge_hash"]
    common = {"id", "kind", "name"}
    assert set(inspect(person).attrs.keys()) == common
    assert set(inspect(doctor).attrs.keys()) == {*common, "licence", "title"}
    assert set(inspect(nurse).attrs.keys()) == {*common, "licence"}
    assert set(inspect(employee).attrs.keys()) == {*common, "badge"}


def test_single_and_joined_tables(byok: Byok, engine: Engine) -> None:
    """Rows of every class are saved, found by inherited and own columns, changed in a flush and by a statement."""
    person, doctor, nurse, employee = staff()
    person.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [
                doctor(name="d", licence="L-1", title="Dr"),
                nurse(name="n", licence="L-2"),
                employee(name="e", badge="B-1"),
                person(name="p"),
            ]
        )
        session.commit()

        with statements(engine) as sql:
            assert session.scalars(select(doctor).where(doctor.licence == "L-1")).one().name == "d"
            assert session.scalars(select(nurse).where(nurse.name == "n")).one().licence == "L-2"
            assert session.scalars(select(doctor).where(doctor.licence == "L-2")).all() == []
            found = session.scalars(
                select(employee).where(employee.badge == "B-1", employee.name == "e")
            ).one()
            assert (found.badge, found.name) == ("B-1", "e")
        assert not [statement for statement in sql if "hash" in fetched(statement)]
        assert sorted(type(p).__name__ for p in session.scalars(select(person))) == [
            "Doctor", "Employee", "Nurse", "Person"
        ]  # fmt: skip

        session.scalars(select(doctor)).one().licence = "L-9"
        found.badge, found.name = "B-9", "e9"
        session.flush()
        assert session.scalars(select(doctor.name).where(doctor.licence == "L-9")).all() == ["d"]
        assert session.scalars(
            select(employee.id).where(employee.badge == "B-9", employee.name == "e9")
        ).all() == [found.id]
        session.execute(update(nurse).where(nurse.licence == "L-2").values(licence="L-3"))
        assert session.scalars(select(nurse.name).where(nurse.licence == "L-3")).all() == ["n"]
        assert (
            session.scalar(select(func.count()).select_from(person).where(person.name.in_(["d", "n", "e9"])))
            == 3
        )


@pytest.mark.parametrize("options", [{}, {"aliased": True}, {"flat": True}], ids=str)
@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_with_polymorphic(byok: Byok, engine: Engine, options: dict[str, bool]) -> None:
    """Conditions on columns of several classes find their hash columns through aliases and flat joins."""
    person, doctor, nurse, employee = staff()
    person.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [doctor(name="d", title="Dr"), nurse(name="n", licence="L"), employee(name="e", badge="B")]
        )
        session.commit()
        session.expunge_all()

        every = with_polymorphic(person, [doctor, nurse, employee], **options)
        condition = or_(every.Employee.badge == "B", every.Doctor.title == "Dr", every.name == "x")
        with statements(engine) as sql:
            found = session.scalars(select(every).where(condition).order_by(every.id)).all()
            assert [p.name for p in found] == ["d", "e"]
            assert (found[0].title, found[1].badge) == ("Dr", "B")
        assert len(sql) == 1
        assert "hash" not in fetched(sql[0])
        session.expunge_all()
        loaded = session.scalars(
            select(person)
            .options(selectin_polymorphic(person, [doctor, employee]))
            .where(person.name.in_(["d", "e"]))
        ).all()
        assert sorted(p.name for p in loaded) == ["d", "e"]


def concrete(column_id: str | None) -> tuple[Any, Any]:
    class Base(DeclarativeBase):
        pass

    class Contact(ConcreteBase, Base):
        __tablename__ = "contact"
        id: Mapped[int] = mapped_column(primary_key=True)
        phone: Mapped[str] = mapped_column(searchable(column_id=column_id))
        __mapper_args__ = {"polymorphic_identity": "contact", "concrete": True}  # noqa: RUF012

    class Emergency(Contact):
        __tablename__ = "emergency"
        id: Mapped[int] = mapped_column(primary_key=True)
        phone: Mapped[str] = mapped_column(searchable(column_id=column_id))
        relation: Mapped[str | None] = mapped_column(searchable())
        __mapper_args__ = {"polymorphic_identity": "emergency", "concrete": True}  # noqa: RUF012

    configure_mappers()
    return Contact, Emergency


def test_concrete_tables_with_one_column_id(byok: Byok, engine: Engine) -> None:
    """Tables that are read through one UNION share a declared column id: every row opens and is found."""
    contact, emergency = concrete("contact.phone")
    contact.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [
                contact(phone="1"),
                contact(phone="2"),
                emergency(phone="2", relation="sister"),
                emergency(phone="3"),
            ]
        )
        session.commit()
        session.expunge_all()

        with statements(engine) as sql:
            found = session.scalars(select(contact).where(contact.phone == "2")).all()
            assert sorted(type(c).__name__ for c in found) == ["Contact", "Emergency"]
        assert "hash" not in fetched(sql[0])
        assert sorted(c.phone for c in session.scalars(select(contact))) == ["1", "2", "2", "3"]
        assert session.scalars(select(emergency.phone).where(emergency.relation == "sister")).all() == ["2"]


def test_concrete_tables_with_derived_ids_fail_loudly(byok: Byok, engine: Engine) -> None:
    """Without a common id, a UNION would read one table's values as the other's: it raises and returns nothing."""
    contact, emergency = concrete(None)
    contact.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([contact(phone="1"), emergency(phone="2")])
        session.commit()
        session.expunge_all()

        for wanted in (contact, contact.phone):
            with pytest.raises(UnsupportedQueryError, match="declare one column_id"):
                session.scalars(select(wanted)).all()
        assert session.scalars(select(emergency.phone)).all() == ["2"], "its own table is read as ever"


def test_abstract_concrete_base(byok: Byok, engine: Engine) -> None:
    """A base that is only a UNION does not fetch hashes, and finds rows of each table by them."""

    class Base(DeclarativeBase):
        pass

    class Contact(AbstractConcreteBase, Base):
        strict_attrs = True
        phone: Mapped[str] = mapped_column(searchable(column_id="contact.phone"))

    class Home(Contact):
        __tablename__ = "home"
        id: Mapped[int] = mapped_column(primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "home", "concrete": True}  # noqa: RUF012

    class Work(Contact):
        __tablename__ = "work"
        id: Mapped[int] = mapped_column(primary_key=True)
        desk: Mapped[str | None] = mapped_column(searchable())
        __mapper_args__ = {"polymorphic_identity": "work", "concrete": True}  # noqa: RUF012

    configure_mappers()
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([Home(phone="1"), Work(phone="1", desk="D"), Work(phone="2")])
        session.commit()
        session.expunge_all()
        with statements(engine) as sql:
            found = session.scalars(select(Contact).where(Contact.phone == "1")).all()
            assert sorted((type(c).__name__, c.phone) for c in found) == [("Home", "1"), ("Work", "1")]
        assert "hash" not in fetched(sql[0])
        assert session.scalars(select(Work.phone).where(Work.desk == "D")).all() == ["1"]
