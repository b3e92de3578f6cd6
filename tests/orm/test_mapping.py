"""Mapped classes have attributes for what they declare and none for hash columns; search_hash() is the way to those."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
    delete,
    event,
    func,
    insert,
    inspect,
    literal,
    select,
    update,
)
from sqlalchemy import text as sql_text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.declarative import AbstractConcreteBase, ConcreteBase
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    Bundle,
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    aliased,
    column_property,
    configure_mappers,
    mapped_column,
    registry,
    relationship,
    synonym,
    undefer,
    with_polymorphic,
)

from sqla_byok import (
    Byok,
    DeclarationError,
    Digest,
    Encrypted,
    UnsupportedQueryError,
    hash_index,
    search_hash,
)
from sqla_byok.normalize import last


def searchable(**options: Any) -> Encrypted[str]:
    return Encrypted(String(20), searchable=True, **options)


class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "mp_person"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    mrn: Mapped[str] = mapped_column("record_number", searchable())
    name: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    phone: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    phone_last4 = hash_index("phone", transform=last(4))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


class Doctor(Person):
    licence: Mapped[str | None] = mapped_column(searchable())
    __mapper_args__ = {"polymorphic_identity": "doctor"}  # noqa: RUF012


class Nurse(Person):
    __tablename__ = "mp_nurse"
    id: Mapped[int] = mapped_column(ForeignKey("mp_person.id"), primary_key=True)
    badge: Mapped[str | None] = mapped_column(searchable())
    __mapper_args__ = {"polymorphic_identity": "nurse"}  # noqa: RUF012


@pytest.fixture
def session(byok: Byok, engine: Engine) -> Any:
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [
                Person(id=1, mrn="A-1", name="Ada", phone="555 1234"),
                Doctor(id=2, mrn="B-2", licence="L-2", phone="555 9999"),
                Nurse(id=3, mrn="C-3", badge="N-3"),
            ]
        )
        session.commit()
        yield session


def sent(engine: Engine) -> list[str]:
    """The statements from now on."""
    found: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: found.append(args[2]))
    return found


# -- walking ---------------------------------------------------------------------------------------------------------


def test_no_list_of_attributes_has_a_hash() -> None:
    """Whatever an application or a framework goes by, a hash column is in the Table alone."""
    configure_mappers()
    for cls in (Person, Doctor, Nurse):
        mapper = inspect(cls)
        for names in (
            mapper.attrs.keys(),
            mapper.column_attrs.keys(),
            mapper.all_orm_descriptors.keys(),
            mapper.columns.keys(),
            [prop.key for prop in mapper.iterate_properties],
            vars(cls),
            inspect(aliased(cls)).mapper.attrs.keys(),
        ):
            assert not [name for name in names if name.endswith("_hash")]
    assert [c.key for c in Person.__table__.c if c.key.endswith("_hash")] == [
        "record_number_hash", "phone_last4_hash", "licence_hash"
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [Person, Doctor, Nurse])
def test_a_detached_object_can_be_walked(session: Session, engine: Engine, cls: Any) -> None:
    """All that was loaded can be read, pickled and merged after its session: no attribute is left to load."""
    found = session.scalars(select(cls).order_by(cls.id)).first()
    session.expunge_all()
    statements = sent(engine)
    walked = {attribute.key: getattr(found, attribute.key) for attribute in inspect(cls).column_attrs}
    assert walked == {key: value for key, value in inspect(found).dict.items() if key in walked}
    assert {state.key for state in inspect(found).attrs} == set(walked)
    again = pickle.loads(pickle.dumps(found))  # noqa: S301 - its own bytes
    assert {key: getattr(again, key) for key in walked} == walked
    assert statements == []
    again.mrn = "Z-9"
    session.merge(again)
    session.flush()
    assert session.scalars(select(Person.id).where(Person.mrn == "Z-9")).all() == [found.id]
    assert session.scalars(select(Person.id).where(Person.mrn == walked["mrn"])).all() == []


async def test_an_object_can_be_walked_on_asyncio(abyok: Byok, async_engine: AsyncEngine) -> None:
    """No attribute wants a statement of its own, which only awaiting could run."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with abyok.asession("t1", async_engine) as session:
        session.add(Doctor(id=2, mrn="B-2", licence="L-2"))
        await session.commit()
        session.expunge_all()
        found = (await session.scalars(select(Doctor))).one()
        walked = {attribute.key: getattr(found, attribute.key) for attribute in inspect(Doctor).column_attrs}
        assert (walked["mrn"], walked["licence"]) == ("B-2", "L-2")
        for key, value in walked.items():
            setattr(found, key, value)
        await session.commit()


def test_all_attributes_can_be_copied_onto_another_object(session: Session) -> None:
    """One by one, with autoflush between; the row is then found by what it has become."""
    one, two = session.get_one(Person, 1), session.get_one(Doctor, 2)
    for attribute in inspect(Person).column_attrs:
        if attribute.key not in ("id", "kind"):
            setattr(two, attribute.key, getattr(one, attribute.key))
            session.scalar(select(func.count(Person.id)))
    session.commit()
    assert session.scalars(select(Person.id).where(Person.mrn == "A-1").order_by(Person.id)).all() == [1, 2]
    assert session.scalars(select(Person.id).where(Person.mrn == "B-2")).all() == []
    assert session.scalars(
        select(Person.id).where(Person.phone_last4 == "1234").order_by(Person.id)
    ).all() == [1, 2]


def test_everything_undeferred_has_no_hash(session: Session) -> None:
    """undefer("*") loads each attribute once, and expiring and refreshing them all likewise."""
    one = session.scalars(select(Person).where(Person.id == 1).options(undefer("*"))).one()
    session.expire(one, inspect(Person).column_attrs.keys())
    session.refresh(one, inspect(Person).column_attrs.keys())
    assert (one.mrn, one.phone_last4) == ("A-1", "1234")


def test_eager_defaults_and_dataclasses(byok: Byok, engine: Engine) -> None:
    """Defaults that are read back after a flush, and classes that are dataclasses, have what they declare."""

    class Data(MappedAsDataclass, DeclarativeBase):
        pass

    class Visit(Data):
        __tablename__ = "mp_visit"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        code: Mapped[str] = mapped_column(searchable())
        at: Mapped[str | None] = mapped_column(String(20), server_default="here", init=False)
        __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012

    Data.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        visit = Visit(code="x")
        session.add(visit)
        session.flush()
        assert dataclasses.asdict(visit) == {"id": visit.id, "code": "x", "at": "here"}
        assert session.scalars(select(Visit).where(Visit.code == "x")).all() == [visit]
        assert not inspect(visit).unloaded


# -- names of the application's own ----------------------------------------------------------------------------------


OWN: dict[str, Callable[[], dict[str, Any]]] = {
    "a property": lambda: {"mrn_hash": property(lambda self: f"own {self.plain}")},
    "a method": lambda: {"mrn_hash": lambda self: f"own {self.plain}"},
    "a value": lambda: {"mrn_hash": "own x"},
    "a hybrid": lambda: {"mrn_hash": hybrid_property(lambda self: "own " + self.plain)},
    "a synonym": lambda: {"mrn_hash": synonym("plain")},
    "a column of another name": lambda: {"mrn_hash": mapped_column("digest", String(20))},
    "an encrypted column of another name": lambda: {"mrn_hash": mapped_column("digest", searchable())},
    "a column property": lambda: {"mrn_hash": column_property(func.length(literal("x")))},
    "a relationship": lambda: {
        "mrn_hash": relationship("Patient", remote_side="Patient.id", viewonly=True),
        "parent_id": mapped_column(ForeignKey("mp_patient.id")),
    },
    "a hash_index": lambda: {"mrn_hash": hash_index("plain_enc", transform=last(2))},
}


@pytest.mark.parametrize("kind", OWN)
def test_an_attribute_of_that_name_stays_the_applications(byok: Byok, engine: Engine, kind: str) -> None:
    """The class keeps what it has under ``mrn_hash``, and searches by mrn all the same, in subqueries too."""

    class Own(DeclarativeBase):
        pass

    own = OWN[kind]()
    patient: Any = type(
        "Patient",
        (Own,),
        {
            "__tablename__": "mp_patient",
            "id": mapped_column(Integer, primary_key=True),
            "mrn": mapped_column(searchable()),
            "plain": mapped_column(String(20)),
            "plain_enc": mapped_column(Encrypted(String(20))),
            **own,
        },
    )
    configure_mappers()
    before = inspect(patient).attrs.get("mrn_hash")
    Own.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(patient(id=1, mrn="A-1", plain="x", plain_enc="secret"))
        session.commit()
        found = session.scalars(select(patient).where(patient.mrn == "A-1")).one()
        shown = found.mrn_hash() if kind == "a method" else found.mrn_hash
        assert shown in ("own x", "x", None, 1, "et")
        inner = aliased(patient, select(patient).subquery())
        assert session.scalars(select(inner.id).where(inner.mrn == "A-1")).all() == [1]
        assert type(session.scalar(select(search_hash(patient.mrn)))) is Digest
    assert inspect(patient).attrs.get("mrn_hash") is before


def test_a_hash_column_can_be_mapped_on_purpose(byok: Byok, engine: Engine) -> None:
    """A class that names the column has an attribute for it, which its source overrules."""
    mapping = registry()
    table = Table(
        "mp_owned", mapping.metadata, Column("id", Integer, primary_key=True), Column("mrn", searchable())
    )

    class Owned:
        id: Any
        mrn: Any
        digest: Any

    mapping.map_imperatively(Owned, table, properties={"digest": table.c.mrn_hash})
    mapping.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        owned = Owned()
        owned.id, owned.mrn = 1, "A-1"
        session.add(owned)
        session.commit()
        assert type(owned.digest) is Digest
        digest, owned.mrn, owned.digest = owned.digest, "B-2", b"nonsense"
        session.commit()
        assert owned.digest != digest
        assert session.scalars(select(Owned).where(Owned.mrn == "B-2")).all() == [owned]  # type: ignore[attr-defined]
        owned.digest = b"nonsense"
        with pytest.raises(UnsupportedQueryError, match="never by itself"):
            session.commit()


def test_the_name_of_a_hash_index_is_not_taken_either() -> None:
    """A column that the application has, or a hash column of another source, is refused by name."""

    class Own(DeclarativeBase):
        pass

    with pytest.raises(DeclarationError, match=r"phone_last4_hash.*another name="):

        class Patient(Own):
            __tablename__ = "mp_patient"
            id: Mapped[int] = mapped_column(primary_key=True)
            phone_last4_hash: Mapped[bytes] = mapped_column(LargeBinary(32))
            phone: Mapped[str] = mapped_column(Encrypted(String(20)))
            phone_last4 = hash_index("phone", transform=last(4))

    with pytest.raises(DeclarationError, match="mrn_hash"):

        class Visitor(Own):
            __tablename__ = "mp_visitor"
            id: Mapped[int] = mapped_column(primary_key=True)
            mrn: Mapped[str] = mapped_column(searchable())
            end = hash_index("mrn", transform=last(4), name="mrn")

    class Guest(Own):
        __tablename__ = "mp_guest"
        id: Mapped[int] = mapped_column(primary_key=True)
        other: Mapped[str] = mapped_column(searchable())
        code = hash_index("other", transform=last(4))

    with pytest.raises(DeclarationError, match="code_hash"):
        Guest.__table__.append_column(Column("code", searchable()))  # type: ignore[attr-defined]


# -- entities in other statements ------------------------------------------------------------------------------------

ENTITIES: dict[str, Callable[[], tuple[Any, list[tuple[str, str, list[int]]]]]] = {
    "the base": lambda: (Person, [("mrn", "B-2", [2]), ("phone_last4", "1234", [1])]),
    "a class in its table": lambda: (
        Doctor,
        [("mrn", "B-2", [2]), ("licence", "L-2", [2]), ("phone_last4", "1234", [])],
    ),
    "a class with a table": lambda: (Nurse, [("mrn", "C-3", [3]), ("badge", "N-3", [3])]),
    "an alias": lambda: (aliased(Person), [("mrn", "B-2", [2]), ("phone_last4", "9999", [2])]),
    "an alias of a class": lambda: (aliased(Nurse), [("mrn", "C-3", [3]), ("badge", "N-3", [3])]),
    "all classes": lambda: (
        with_polymorphic(Person, "*"),
        [("mrn", "C-3", [3]), ("phone_last4", "1234", [1])],
    ),
    "all classes, flat": lambda: (with_polymorphic(Person, "*", flat=True), [("mrn", "B-2", [2])]),
}


@pytest.mark.parametrize("way", ["subquery", "cte"])
@pytest.mark.parametrize("kind", ENTITIES)
def test_an_entity_in_a_subquery_can_be_searched(session: Session, kind: str, way: str) -> None:
    """A SELECT of the class within another one brings its hashes, whatever is mapped."""
    entity, searches = ENTITIES[kind]()
    inner = getattr(select(entity), way)()
    of_inner = aliased(entity if inspect(entity).is_mapper else inspect(entity).mapper.class_, inner)
    for name, value, found in searches:
        assert session.scalars(select(of_inner.id).where(getattr(of_inner, name) == value)).all() == found


def test_classes_and_columns_that_come_later(byok: Byok, engine: Engine) -> None:
    """A column or subclass added to a mapped class is searched in subqueries like the others."""

    class Own(DeclarativeBase):
        pass

    class Animal(Own):
        __tablename__ = "mp_animal"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10))
        name: Mapped[str | None] = mapped_column(searchable())
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012

    str(select(Animal).subquery().select())
    Animal.chip = mapped_column(searchable())  # type: ignore[attr-defined]

    class Dog(Animal):
        tag: Mapped[str | None] = mapped_column(searchable())
        __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012

    Own.metadata.create_all(engine)
    assert set(inspect(Dog).attrs.keys()) == {"id", "kind", "name", "chip", "tag"}
    with byok.session("t1", engine) as session:
        session.add(Dog(id=1, name="Rex", tag="T", chip="C"))
        session.commit()
        for cls, names in (
            (Animal, {"name": "Rex", "chip": "C"}),
            (Dog, {"name": "Rex", "chip": "C", "tag": "T"}),
        ):
            inner = select(cls).subquery()
            for name, value in names.items():
                assert session.scalars(select(inner.c.id).where(inner.c[name] == value)).all() == [1]


@pytest.mark.parametrize("base", [ConcreteBase, AbstractConcreteBase])
def test_concrete_tables_together(byok: Byok, engine: Engine, base: Any) -> None:
    """The union of concrete classes' tables is walked and searched as a class of its own is."""

    class Own(DeclarativeBase):
        pass

    if base is ConcreteBase:

        class Contact(ConcreteBase, Own):
            __tablename__ = "mp_contact"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(searchable(column_id="contact.name"))
            __mapper_args__ = {"polymorphic_identity": "contact", "concrete": True}  # noqa: RUF012
    else:

        class Contact(AbstractConcreteBase, Own):  # type: ignore[no-redef]
            strict_attrs = True
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(searchable(column_id="contact.name"))

    class Firm(Contact):
        __tablename__ = "mp_firm"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(searchable(column_id="contact.name"))
        __mapper_args__ = {"polymorphic_identity": "firm", "concrete": True}  # noqa: RUF012

    Own.registry.configure()
    for cls in (Contact, Firm):
        assert not [name for name in inspect(cls).attrs.keys() if "hash" in name]  # noqa: SIM118 - no mapping
    Own.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(Firm(id=1, name="Acme"))
        session.commit()
        assert [type(one) for one in session.scalars(select(Contact).where(Contact.name == "Acme"))] == [Firm]
        assert (
            session.scalars(select(search_hash(Firm.name))).all()
            == session.scalars(select(search_hash(Contact.name))).all()
        )


# -- the way to a hash -----------------------------------------------------------------------------------------------

HASHES: dict[str, Callable[[], Any]] = {
    "an attribute": lambda: select(search_hash(Person.mrn)).where(Person.id == 1),
    "beside the entity": lambda: select(search_hash(Person.mrn), Person).where(Person.id == 1),
    "a column": lambda: select(search_hash(Person.__table__.c.record_number)).where(
        Person.__table__.c.id == 1
    ),
    "an alias": lambda: (lambda a: select(search_hash(a.mrn)).where(a.id == 1))(aliased(Person)),
    "an alias of the table": lambda: (lambda a: select(search_hash(a.c.record_number)).where(a.c.id == 1))(
        Person.__table__.alias()
    ),
    "an entity in a subquery": lambda: (lambda s: select(search_hash(s.c.record_number)).where(s.c.id == 1))(
        select(Person).subquery()
    ),
    "an entity of a subquery": lambda: (lambda a: select(search_hash(a.mrn)).where(a.id == 1))(
        aliased(Person, select(Person).subquery())
    ),
    "a subquery": lambda: (lambda s: select(search_hash(s.c.it)).where(s.c.id == 1))(
        select(Person.id, Person.mrn.label("it"), search_hash(Person.mrn).label("h")).subquery()
    ),
    "a CTE": lambda: (lambda s: select(search_hash(s.c.mrn)).where(s.c.id == 1))(
        select(Person.id, Person.mrn, search_hash(Person.mrn)).cte()
    ),
    "all classes": lambda: (lambda e: select(search_hash(e.mrn)).where(e.id == 1))(
        with_polymorphic(Person, "*")
    ),
    "a label": lambda: select(search_hash(Person.mrn).label("digest")).where(Person.id == 1),
}


@pytest.mark.parametrize("kind", HASHES)
def test_a_hash_can_be_read(session: Session, byok: Byok, kind: str) -> None:
    """It is the hash that a look-up would compare, from the same row."""
    with byok.tenant("t1"):
        expected = byok.hash(Person.mrn, "A-1")
    assert session.execute(HASHES[kind]()).first()[0] == expected  # type: ignore[index]


def test_a_hash_can_be_returned(session: Session, byok: Byok) -> None:
    """What an UPDATE or DELETE wrote or removed, or an INSERT through the ORM or of the table."""
    if session.get_bind().dialect.name in ("mysql", "mariadb"):
        pytest.skip("MySQL has no RETURNING")
    with byok.tenant("t1"):
        expected = byok.hash(Person.mrn, "Z-9")
    table: Any = Person.__table__
    change = update(Person).where(Person.id == 1).values(mrn="Z-9").returning(search_hash(Person.mrn))
    assert session.scalars(change).all() == [expected]
    removed = delete(Person).where(search_hash(Person.mrn) == "Z-9").returning(search_hash(Person.mrn))
    assert session.scalars(removed).all() == [expected]
    for found in (search_hash(Person.mrn), search_hash(table.c.record_number), table.c.record_number_hash):
        added = session.scalars(insert(Person).returning(found), [{"id": 9, "kind": "person", "mrn": "Z-9"}])
        assert added.all() == [expected]
        session.execute(delete(Person).where(Person.id == 9))


@pytest.mark.parametrize("rows", ["one", "several", "values"])
def test_an_insert_returns_hashes_beside_other_columns(session: Session, rows: str) -> None:
    """Whatever stands beside it, and of a class with tables of its own too: what a SELECT would give of the rows."""
    many = rows == "several"
    ids = [20, 21] if many else [20]
    given = [{"id": nth, "mrn": f"R-{nth}", "phone": "555 1234"} for nth in ids]
    hashes = [search_hash(Person.mrn), search_hash(Person.phone_last4)]
    returned: list[tuple[Any, dict[str, Any], list[Any]]] = [
        (Person, {"kind": "person"}, [*hashes, Person.id, Person.name]),
        (Person, {"kind": "person"}, [Person, search_hash(Person.mrn).label("found")]),
        (Doctor, {"kind": "doctor", "licence": "L"}, [search_hash(Doctor.licence), *hashes, Doctor.mrn]),
    ]
    if rows != "values":
        both = [Nurse.id, search_hash(Nurse.badge), search_hash(Nurse.mrn)]
        returned.append((Nurse, {"badge": "N", "kind": "nurse"}, both))
    for cls, more, what in returned:
        full = [{**each, **more} for each in given]
        if rows == "values":
            added = session.execute(insert(cls).values(full).returning(*what)).all()
        else:
            added = session.execute(insert(cls).returning(*what, sort_by_parameter_order=True), full).all()
        assert added == session.execute(select(*what).where(cls.id.in_(ids)).order_by(cls.id)).all()
        session.rollback()


def test_returning_takes_bundles(session: Session) -> None:
    """Of INSERT, UPDATE and DELETE, nested and with hashes; what is computed on ciphertext in one is refused."""
    if session.get_bind().dialect.name in ("mysql", "mariadb"):
        pytest.skip("no RETURNING of UPDATE; use another database")
    bundle = Bundle("b", Person.id, Person.mrn, Bundle("c", Person.name, Person.mrn.label("again")))
    given = {"id": 30, "kind": "person", "mrn": "R-30", "name": "Ada"}
    expected = (30, "R-30", ("Ada", "R-30"))
    for statement in (
        insert(Person).values(given).returning(bundle),
        update(Person).where(Person.mrn == "R-30").values(name="Ada").returning(bundle),
        delete(Person).where(Person.id == 30).returning(bundle),
    ):
        assert [tuple(row) for row in session.scalars(statement)] == [expected]
    rows = session.scalars(
        insert(Person).returning(bundle), [given, {**given, "id": 31, "mrn": "R-31"}]
    ).all()
    assert [row.mrn for row in rows] == ["R-30", "R-31"]
    hashes = session.execute(
        update(Person)
        .where(Person.id == 30)
        .values(name="x")
        .returning(Bundle("b", search_hash(Person.mrn), Person.id))
    ).all()
    assert hashes == [((session.scalar(select(search_hash(Person.mrn)).where(Person.id == 30)), 30),)]
    for refused in (
        Bundle("b", Person.id, func.lower(Person.mrn)),
        Bundle("b", Person.id, Bundle("c", func.lower(Person.mrn))),
    ):
        with pytest.raises(UnsupportedQueryError):
            session.execute(update(Person).values(name="x").returning(refused))


def test_a_hash_of_an_index_can_be_read(session: Session, byok: Byok) -> None:
    """A hash_index is asked in the same way, aliased and by subclasses too."""
    with byok.tenant("t1"):
        expected = byok.hash(Person.phone_last4, "9999")
    other = aliased(Person)
    for entity in (Person, Doctor, other):
        found = select(search_hash(entity.phone_last4)).where(entity.id == 2)  # type: ignore[attr-defined]
        assert session.scalars(found).all() == [expected]
    raw = sql_text("SELECT id FROM mp_person WHERE phone_last4_hash = :hash")
    assert session.connection().exec_driver_sql("SELECT 1").scalar() == 1
    assert session.scalars(raw, {"hash": bytes(expected)}).all() == [2]
    grouped = select(search_hash(Person.phone_last4), func.count()).group_by(search_hash(Person.phone_last4))
    assert sorted(count for _, count in session.execute(grouped)) == [1, 1, 1]


def test_what_has_no_hash_says_so() -> None:
    """Neither an attribute that is not searchable nor a FROM without the hash column gives one."""
    inner = select(Person.id, Person.mrn).subquery()
    for column, reason in (
        (Person.name, "searchable=True"),
        (Person.kind, "searchable=True"),
        (inner.c[1], "search_hash"),
    ):
        with pytest.raises(UnsupportedQueryError, match=reason):
            search_hash(column)


def test_a_hash_is_written_with_its_source_alone(session: Session) -> None:
    """Rows of a whole table can be given back, and keep each its own hash; a hash by itself is refused."""
    table: Any = Person.__table__
    rows = [dict(row) for row in session.execute(select(table)).mappings()]
    swapped = dict(zip(("record_number_hash", "phone_last4_hash"), (b"x" * 32, b"y" * 32), strict=True))
    session.execute(insert(table), [{**row, **swapped, "id": row["id"] + 10} for row in rows])
    for row in rows:
        session.execute(insert(table).values(**{**row, **swapped, "id": row["id"] + 20}))
    found = select(table.c.id).where(table.c.record_number == "B-2").order_by(table.c.id)
    assert session.scalars(found).all() == [2, 12, 22]
    for alone in ({"record_number_hash": b"x"}, {"record_number_hash": b"x", "phone": "1"}):
        with pytest.raises(UnsupportedQueryError, match="never by itself"):
            session.execute(table.update().values(**alone))
