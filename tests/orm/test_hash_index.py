"""Further indexes of encrypted columns: found like a plaintext hybrid, and in step after every way of writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date
from typing import Annotated, Any

import pytest
from sqlalchemy import (
    Column,
    Date,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    bindparam,
    delete,
    event,
    func,
    insert,
    inspect,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    aliased,
    defer,
    load_only,
    mapped_column,
    registry,
    with_polymorphic,
)

from sqla_byok import (
    Byok,
    DeclarationError,
    EncodeError,
    Encrypted,
    UnsupportedQueryError,
    hash_index,
    search_hash,
)
from sqla_byok.normalize import casefold, compose, digits, email_domain, first, last, named, year


@named("surname-year")
def surname_year(surname: str, born: date) -> str | None:
    """A transform over two columns; no hash for the nameless."""
    return f"{casefold(surname)}/{born.year}" if surname else None


class Base(DeclarativeBase):
    """The models' base."""


class HasFax:
    """A mixin with an index, named by the attribute itself."""

    fax: Mapped[str | None] = mapped_column("fax_db", Encrypted(String(40)))
    fax_last4 = hash_index(fax, transform=last(4))


class Upper(TypeDecorator[str]):
    """A type that stores another text than it is given."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """In upper case."""
        return None if value is None else value.upper()


Mail = Annotated[str | None, mapped_column(Encrypted(String(80), searchable=True, normalize=casefold))]


class Person(HasFax, Base):
    """A model with every kind of index."""

    __tablename__ = "hi_person"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10), default="p")
    note: Mapped[str | None] = mapped_column(String(20))
    phone: Mapped[str | None] = mapped_column(Encrypted(String(40)))
    phone_last4 = hash_index("phone", transform=compose(digits, last(4)))
    mail: Mapped[Mail]
    domain = hash_index("mail", transform=email_domain)
    mail_start = hash_index("mail", transform=first(2), name="mail_head")
    surname: Mapped[str | None] = mapped_column(Encrypted(String(40)))
    born: Mapped[date | None] = mapped_column(Encrypted(Date))
    born_year = hash_index(born, transform=year)
    who = hash_index("surname", "born", transform=surname_year)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "p"}  # noqa: RUF012 - SQLAlchemy's way


class Doctor(Person):
    """A subclass with a table of its own, and an index there."""

    __tablename__ = "hi_doctor"
    id: Mapped[int] = mapped_column(ForeignKey(Person.id), primary_key=True)
    licence: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    licence_end = hash_index("licence", transform=last(2))
    __mapper_args__ = {"polymorphic_identity": "d"}  # noqa: RUF012


class Nurse(Person):
    """A subclass in its parent's table, with a column and an index of its own."""

    ward: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    ward_start = hash_index("ward", transform=first(1))
    __mapper_args__ = {"polymorphic_identity": "n"}  # noqa: RUF012


class Firm(HasFax, Base):
    """Another user of the mixin, with a unique index."""

    __tablename__ = "hi_firm"
    id: Mapped[int] = mapped_column(primary_key=True)
    vat: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    vat_digits = hash_index("vat", transform=digits, unique=True)


class Dated(MappedAsDataclass, DeclarativeBase):
    """The base of a dataclass."""


class Card(Dated):
    """A mapped dataclass, whose sources have defaults."""

    __tablename__ = "hi_card"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(Encrypted(String(20)), insert_default="9999")
    until: Mapped[date | None] = mapped_column(
        Encrypted(Date), insert_default=lambda: date(2030, 1, 1), init=False
    )
    number_last4 = hash_index("number", transform=last(4))
    both = hash_index(
        "number", "until", transform=named("both")(lambda number, until: f"{number}{until.year}")
    )


mapper_registry = registry()
visitor_table = Table(
    "hi_visitor",
    mapper_registry.metadata,
    Column("id", Integer, primary_key=True),
    Column("badge", Encrypted(String(20))),
)


class Visitor:
    """An imperatively mapped class."""

    badge_end = hash_index("code", transform=last(2))

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


mapper_registry.map_imperatively(Visitor, visitor_table, properties={"code": visitor_table.c.badge})

person: Any = Person.__table__


@pytest.fixture
def session(engine: Engine, byok: Byok) -> Iterator[Session]:
    """A session of tenant t1, over tables with three people."""
    for metadata in (Base.metadata, Dated.metadata, mapper_registry.metadata):
        metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [
                Person(
                    id=1,
                    phone="555-1234",
                    fax="9-7777",
                    mail="Ada@Example.org",
                    surname="Byron",
                    born=date(1815, 12, 10),
                ),
                Doctor(
                    id=2,
                    phone="(555) 99 99",
                    fax="9-8888",
                    licence="L-42",
                    surname="Lovelace",
                    born=date(1815, 1, 1),
                ),
                Nurse(id=3, ward="West"),
            ]
        )
        session.commit()
        yield session


def ids(session: Session, criterion: Any, entity: Any = Person) -> list[int]:
    """Whom a criterion finds."""
    return sorted(each.id for each in session.scalars(select(entity).where(criterion)))


# -- searching -------------------------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "==": (lambda: Person.phone_last4 == "1234", [1]),
    "== finds nothing": (lambda: Person.phone_last4 == "555-1234", []),
    "!=": (lambda: Person.phone_last4 != "1234", [2]),
    "not ==": (lambda: ~(Person.phone_last4 == "1234"), [2]),
    "in_": (lambda: Person.phone_last4.in_(["1234", "9999", None]), [1, 2]),
    "in_ nothing": (lambda: Person.phone_last4.in_([]), []),
    "not_in": (lambda: Person.phone_last4.not_in(["1234"]), [2]),
    "not in_": (lambda: ~Person.phone_last4.in_(["1234"]), [2]),
    "== None": (lambda: Person.phone_last4 == None, [3]),  # noqa: E711 - what is tested
    "is null()": (lambda: Person.phone_last4.is_(null()), [3]),
    "is_not(None)": (lambda: Person.phone_last4.is_not(None), [1, 2]),
    "not is_(None)": (lambda: ~Person.phone_last4.is_(None), [1, 2]),
    "of a mixin": (lambda: Person.fax_last4 == "7777", [1]),
    "another name": (lambda: Person.mail_start == "Ad", [1]),
    "an index of a searchable column": (lambda: Person.domain == "example.org", [1]),
    "its source": (lambda: Person.mail == "ADA@example.org", [1]),
    "a number": (lambda: Person.born_year == 1815, [1, 2]),
    "of two": (lambda: Person.who == "byron/1815", [1]),
    "in a subclass's own table": (lambda: Doctor.licence_end == "42", [2]),
    "inherited": (lambda: Doctor.phone_last4 == "9999", [2]),
    "in the parent's table": (lambda: Nurse.ward_start == "W", [3]),
    "the hash column itself": (lambda: person.c.phone_last4_hash == "1234", [1]),
    "the hash column of a number": (lambda: person.c.born_year_hash.in_([1815]), [1, 2]),
}


def test_each_form_finds_its_rows(session: Session) -> None:
    """The searched value is the transform's result, and NULL behaves as in plaintext."""
    for form, (criterion, found) in FOUND.items():
        entity = (
            Doctor if "inherited" in form or "own table" in form else Nurse if "parent's" in form else Person
        )
        assert (form, ids(session, criterion(), entity)) == (form, found)


def test_it_is_a_hybrid(session: Session) -> None:
    """On an object it computes from the decrypted values; the mapper lists it; queries in other guises find it."""
    ada, nurse = session.get_one(Person, 1), session.get_one(Nurse, 3)
    assert (ada.phone_last4, ada.domain, ada.born_year, ada.who) == (
        "1234",
        "example.org",
        1815,
        "byron/1815",
    )
    assert (nurse.phone_last4, nurse.who, nurse.ward_start) == (None, None, "W")
    assert "phone_last4" in inspect(Person).all_orm_descriptors
    other = aliased(Person)
    assert session.scalars(select(other.id).where(other.who == "byron/1815")).all() == [1]
    flat = aliased(Doctor, flat=True)
    assert session.scalars(select(flat.id).where(flat.phone_last4 == "9999")).all() == [2]
    everybody = with_polymorphic(Person, [Doctor])
    assert [
        each.id for each in session.scalars(select(everybody).where(everybody.phone_last4 == "9999"))
    ] == [2]
    assert [each.id for each in session.scalars(select(Person).filter_by(fax_last4="7777"))] == [1]
    within = aliased(Person, select(Person).where(Person.id < 3).subquery())
    assert [each.id for each in session.scalars(select(within).where(within.phone_last4 == "9999"))] == [2]
    asked = select(Person.id).where(Person.phone_last4 == bindparam("q"))
    assert [session.scalars(asked, {"q": value}).all() for value in ("1234", "9999")] == [[1], [2]]


def test_other_ways_of_mapping(session: Session) -> None:
    """Dataclasses with defaults and imperative classes have indexes too, which follow what is not given."""
    session.add_all([Card(id=1, number="1111"), later := Card(id=2, number="2222")])
    later.until = date(2027, 1, 1)
    session.add(Visitor(id=1, code="B-77"))
    session.flush()
    session.execute(insert(Card), [{"id": 3}, {"id": 4}])
    session.execute(insert(Card).values([{"id": 5}, {"id": 6, "number": "6"}]))
    session.execute(insert(Card).values(id=7))
    session.execute(insert(Card).values(id=8, number="88"))
    assert ids(session, Card.number_last4 == "1111", Card) == [1]
    assert ids(session, Card.number_last4 == "9999", Card) == [3, 4, 5, 7]
    assert ids(session, Card.both.in_(["99992030", "62030", "882030"]), Card) == [3, 4, 5, 6, 7, 8]
    assert ids(session, Card.both == "22222027", Card) == [2]
    assert ids(session, Visitor.badge_end == "77", Visitor) == [1]  # type: ignore[arg-type]


def test_indexes_have_salts_of_their_own(session: Session) -> None:
    """The same text has another hash in each index, in its column, and for each tenant."""
    session.add(Person(id=9, phone="1234", fax="1234", mail="1234", surname="x", born=date(2000, 1, 1)))
    session.flush()
    row = session.execute(
        select(person.c.phone_last4_hash, person.c.fax_last4_hash, person.c.mail_head_hash).where(
            person.c.id == 9
        )
    ).one()
    assert len(set(row)) == 3
    assert person.c.mail_head_hash.type.source.column_id == "hi_person.mail_head"


def test_a_look_up_uses_the_index(session: Session, engine: Engine) -> None:
    """One comparison of one column, which is indexed."""
    sql = str(select(Person.id).where(Person.phone_last4 == "1").compile(engine))
    assert "hi_person.phone_last4_hash =" in sql
    assert [index.name for index in person.indexes if "phone_last4_hash" in index.columns] == [
        "ix_hi_person_phone_last4_hash"
    ]
    assert any(
        isinstance(each, UniqueConstraint) and "vat_digits_hash" in each.columns
        for each in Firm.__table__.constraints  # type: ignore[attr-defined]
    )


def test_objects_in_the_session_stay_right(session: Session) -> None:
    """An UPDATE or DELETE by an index reaches the objects that are there: SQLAlchemy does not compare their sources."""
    ada = session.get_one(Person, 1)
    assert (ada.phone, ada.note) == ("555-1234", None)
    session.execute(update(Person).where(Person.phone_last4 == "1234").values(note="x"))
    assert ada.note == "x"
    session.add(firm := Firm(id=1, vat="GB-1"))
    session.flush()
    session.execute(delete(Firm).where(Firm.vat_digits == "1"))
    assert firm not in session


def test_unique_forbids_equal_results(session: Session) -> None:
    """Of a unique index no two rows may have the same result; rows without one do not collide."""
    session.add_all([Firm(id=1, vat="GB 1"), Firm(id=2, vat=None), Firm(id=3, vat=None)])
    session.flush()
    session.add(Firm(id=4, vat="g-b-1"))
    with pytest.raises(IntegrityError):
        session.flush()


REFUSED: dict[str, Callable[[], Any]] = {
    "order_by": lambda: select(Person).order_by(Person.phone_last4),
    "select": lambda: select(Person.phone_last4),
    "<": lambda: Person.phone_last4 < "1",  # type: ignore[operator]
    "like": lambda: Person.phone_last4.like("1%"),
    "+": lambda: Person.phone_last4 + "1",  # type: ignore[operator]
    "reverse +": lambda: "1" + Person.phone_last4,  # type: ignore[operator]
    "a function": lambda: func.max(Person.phone_last4),
    "in_ of a text": lambda: Person.phone_last4.in_("secret"),  # type: ignore[arg-type]
    "in_ of a text, its hash": lambda: search_hash(Person.phone_last4).in_("secret"),  # type: ignore[attr-defined]
    "not_in of a text, its hash": lambda: search_hash(Person.phone_last4).not_in("secret"),  # type: ignore[attr-defined]
    "another index": lambda: Person.fax_last4 == Person.phone_last4,
    "a set": lambda: update(Person).values(phone_last4="1234"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_a_hash_cannot_do_is_refused(form: str) -> None:
    """Everything but equality is refused when it is written, and no message tells a value."""
    with pytest.raises(UnsupportedQueryError) as caught:
        REFUSED[form]()
    assert "phone_last4" in str(caught.value)
    assert "secret" not in str(caught.value)


COMPILED: dict[str, Callable[[], Any]] = {
    "a plaintext column": lambda: Person.phone_last4 == Person.note,
    "a searchable column": lambda: Person.phone_last4 != Person.mail,
    "a subquery": lambda: Person.phone_last4 == select(Person.phone).scalar_subquery(),
    "in_ (select)": lambda: Person.phone_last4.in_(select(Person.note)),
    "in_ with a column": lambda: Person.phone_last4.not_in(["1234", Person.note]),
    "a function": lambda: Person.phone_last4 == func.substr("secret", 3),
    "its hash column and a plaintext column": lambda: search_hash(Person.phone_last4) == Person.note,  # type: ignore[attr-defined]
    "its hash column and another's": lambda: search_hash(Person.phone_last4) == search_hash(Person.fax_last4),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("form", COMPILED)
def test_a_comparison_with_an_expression_is_refused(session: Session, form: str) -> None:
    """Neither another column nor a subquery has hashes of this index."""
    with pytest.raises(UnsupportedQueryError) as caught:
        session.scalars(select(Person).where(COMPILED[form]())).all()
    assert "phone_last4" in str(caught.value.column)
    assert "secret" not in str(caught.value)


def test_a_name_for_an_index_and_a_column_is_refused(session: Session) -> None:
    """The value would be hashed for one of the two only."""
    either = or_(Person.phone_last4 == bindparam("q"), Person.mail == bindparam("q"))
    with pytest.raises(UnsupportedQueryError, match="name of its own"):
        session.execute(select(Person.id).where(either), {"q": "1234"})


# -- writing ---------------------------------------------------------------------------------------------------------

NEW = {"phone": "4321", "surname": "King", "born": date(1900, 1, 1)}


def _upsert(
    session: Session, entity: Any, row: dict[str, Any], sets: Callable[[Any], Any] | None = None
) -> Any:
    """An upsert of the row in the database's own dialect."""
    name = session.get_bind().dialect.name
    dialect: Any = {"postgresql": postgresql, "sqlite": sqlite, "mysql": mysql, "mariadb": mysql}[name]
    statement = dialect.insert(entity).values(id=1, kind="p", **row)
    if dialect is mysql:
        return statement.on_duplicate_key_update((sets or (lambda _: row))(statement.inserted))
    return statement.on_conflict_do_update(
        index_elements=["id"], set_=(sets or (lambda _: row))(statement.excluded)
    )


def _flush(session: Session) -> None:
    ada = session.get_one(Person, 1)
    for name, value in NEW.items():
        setattr(ada, name, value)
    session.flush()


WRITES: dict[str, Callable[[Session], Any]] = {
    "flush": _flush,
    "merge": lambda s: (s.merge(Person(id=1, kind="p", **NEW)), s.flush()),
    "ORM update": lambda s: s.execute(update(Person).where(Person.id == 1).values(**NEW)),
    "ORM update by its own index": lambda s: s.execute(
        update(Person).where(Person.phone_last4 == "1234").values(**NEW)
    ),
    "ORM bulk update": lambda s: s.execute(update(Person), [{"id": 1, **NEW}]),
    "bulk_update_mappings": lambda s: s.bulk_update_mappings(Person, [{"id": 1, **NEW}]),
    "Core update": lambda s: s.connection().execute(update(person).where(person.c.id == 1).values(NEW)),
    "Core update, columns": lambda s: s.connection().execute(
        update(person).where(person.c.id == 1).values({person.c[name]: value for name, value in NEW.items()})
    ),
    "Core update, ordered": lambda s: s.connection().execute(
        update(person)
        .where(person.c.id == 1)
        .ordered_values(*((person.c[name], value) for name, value in NEW.items()))
    ),
    "Core update, named parameters": lambda s: s.connection().execute(
        update(person)
        .where(person.c.id == bindparam("i"))
        .values(phone=bindparam("p"), surname=bindparam("s"), born=bindparam("b")),
        [
            {"i": 1, "p": NEW["phone"], "s": NEW["surname"], "b": NEW["born"]},
            {"i": 0, "p": "", "s": "", "b": None},
        ],
    ),
    "Core update, some named": lambda s: s.connection().execute(
        update(person).where(person.c.id == 1).values(phone="4321", surname=bindparam("s"), born=NEW["born"]),
        {"s": "King"},
    ),
    "Core update, parameters": lambda s: s.connection().execute(update(person).where(person.c.id == 1), NEW),
    "insert": lambda s: (
        s.execute(delete(person).where(person.c.id == 1)),
        s.execute(insert(person), {"id": 1, "kind": "p", **NEW}),
    ),
    "insert many": lambda s: (
        s.execute(delete(person).where(person.c.id == 1)),
        s.execute(insert(Person), [{"id": 1, "kind": "p", **NEW}, {"id": 7, "kind": "p", "surname": "x"}]),
    ),
    "insert rows": lambda s: (
        s.execute(delete(person).where(person.c.id == 1)),
        s.execute(insert(Person).values([{"id": 1, "kind": "p", **NEW}])),
    ),
    "upsert": lambda s: s.execute(_upsert(s, Person, NEW)),
    "upsert, excluded": lambda s: s.execute(
        _upsert(s, Person, NEW, lambda row: {name: row[name] for name in NEW})
    ),
}


def test_every_write_keeps_the_indexes_in_step(session: Session) -> None:
    """After it the row is found by its new results, and no longer by the old ones."""
    for way, write in WRITES.items():
        write(session)
        for index, new, old in [
            (Person.phone_last4, "4321", "1234"),
            (Person.born_year, 1900, None),
            (Person.who, "king/1900", "byron/1815"),
        ]:
            assert (way, ids(session, index == new)) == (way, [1])
            assert (way, old is None or ids(session, index == old)) in ((way, []), (way, True))
        session.rollback()


BORN = date(1900, 1, 1)
# Of several values SQLAlchemy takes one, and of several rows it goes by the first one's keys.
TAKEN: dict[str, Callable[[Session], Any]] = {
    "two spellings": lambda s: s.connection().execute(
        update(person).values({person.c.surname: "x", "surname": "y", "born": BORN, person.c.phone: "1"})
    ),
    "the other way round": lambda s: s.connection().execute(
        update(person).values({"surname": "x", person.c.surname: "y", person.c.born: BORN})
    ),
    "values twice": lambda s: s.connection().execute(
        update(person).values({person.c.surname: "x", person.c.born: BORN}).values(surname="y", born=None)
    ),
    "ORM, values twice": lambda s: s.execute(
        update(Person)
        .values({Person.surname: "x", "born": BORN, "phone": "1"})
        .values(surname="y", phone="2")
    ),
    "ordered": lambda s: s.connection().execute(
        update(person).ordered_values(("surname", "x"), (person.c.surname, "y"), (person.c.born, BORN))
    ),
    "an insert": lambda s: s.connection().execute(
        insert(person).values({"surname": "x", person.c.surname: "y", "born": BORN, "kind": "p", "id": 8})
    ),
    "a single column": lambda s: s.connection().execute(
        insert(person).values({person.c.phone: "12345", "phone": "98765", "kind": "p", "id": 8})
    ),
    "later rows with more": lambda s: s.connection().execute(
        insert(person),
        [{"id": 8, "kind": "p", "surname": "x"}, {"id": 9, "kind": "p", "surname": "x", "born": BORN}],
    ),
}


@pytest.mark.parametrize("way", TAKEN)
def test_what_sqlalchemy_takes_is_what_is_hashed(session: Session, way: str) -> None:
    """A value that is given twice, or in some rows only, is not hashed where another one is stored."""
    TAKEN[way](session)
    people = session.scalars(select(Person)).all()
    assert any(
        "x" in (each.surname, each.phone) or each.surname == "y" or each.phone == "12345" for each in people
    )
    for each in people:
        for name in ("who", "phone_last4", "born_year"):
            index, result = getattr(Person, name), getattr(each, name)
            found = ids(session, index.is_(None) if result is None else index == result)
            assert each.id in found, (name, result)


def test_a_flush_of_one_source_brings_the_others(session: Session) -> None:
    """Expired and deferred sources are loaded; what did not change is not written."""
    ada = session.get_one(Person, 1)
    ada.surname = "King"
    session.commit()
    assert ids(session, Person.who == "king/1815") == [1]
    ada.born = date(1900, 1, 1)  # everything is expired
    session.commit()
    assert ids(session, Person.who == "king/1900") == [1]
    session.expunge_all()
    ada = session.scalars(select(Person).where(Person.id == 1).options(defer(Person.surname))).one()
    ada.born = date(1901, 1, 1)
    session.commit()
    assert ids(session, Person.who == "king/1901") == [1]
    session.get_one(Doctor, 2).surname = None
    session.commit()
    assert ids(session, Person.who.is_(None)) == [2, 3]


@pytest.mark.parametrize(
    "option", [defer(Person.surname, raiseload=True), load_only(Person.born, raiseload=True)]
)
def test_a_flush_loads_what_an_access_may_not(session: Session, option: Any) -> None:
    """With raiseload=True the program may not load a source by accident; the hash needs it."""
    session.expunge_all()
    ada = session.scalars(select(Person).where(Person.id == 1).options(option)).one()
    with pytest.raises(InvalidRequestError):
        _ = ada.surname
    for year_of in (1900, 1901):  # the second time everything is expired
        ada.born = date(year_of, 1, 1)
        session.commit()
        assert ids(session, Person.who == f"byron/{year_of}") == [1]


def test_a_flush_of_something_else_leaves_the_sources_alone(session: Session, engine: Engine) -> None:
    """An index over several columns costs other updates nothing."""
    ada = session.get_one(Person, 1)
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    ada.note = "x"
    session.flush()
    assert len(seen) == 1
    assert "surname" not in seen[0]


async def test_a_flush_brings_the_others_on_asyncio(async_engine: AsyncEngine, abyok: Byok) -> None:
    """Loading an expired source within a flush works where only awaiting can do it."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with abyok.asession("t1", async_engine, expire_on_commit=True) as session:
        assert isinstance(session, AsyncSession)
        ada = Person(id=1, kind="p", surname="Byron", born=date(1815, 1, 1))
        session.add(ada)
        await session.commit()
        ada.surname = "King"
        await session.commit()
        assert (await session.scalars(select(Person.id).where(Person.who == "king/1815"))).all() == [1]


class Pet(Base):
    """A model whose index over two columns stands in a subclass in its table, with listeners of an application."""

    __tablename__ = "hi_pet"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    note: Mapped[str | None] = mapped_column(String(20))
    name: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    born: Mapped[date | None] = mapped_column(Encrypted(Date))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "pet"}  # noqa: RUF012


class Dog(Pet):
    """Has the index."""

    who = hash_index("name", "born", transform=surname_year)
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012


class Cat(Pet):
    """Has it not, but its rows have the hash."""

    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012


@event.listens_for(Pet, "before_update", propagate=True)
def _rename(mapper: Any, connection: Any, pet: Pet) -> None:
    if pet.note:
        pet.name = pet.note


@pytest.mark.parametrize("cls", [Pet, Dog, Cat])
@pytest.mark.parametrize("attribute", ["name", "note"])
def test_a_flush_brings_the_others_of_every_class(session: Session, cls: Any, attribute: str) -> None:
    """Of parents and siblings in the same table too, and where an application's own listener changes a source."""
    session.add(cls(id=1, name="Rex", born=date(2020, 1, 1)))
    session.commit()
    setattr(session.get_one(cls, 1), attribute, "Max")
    session.commit()
    table = Pet.__table__
    assert session.scalars(select(table.c.id).where(table.c.who_hash == "max/2020")).all() == [1]
    session.get_one(cls, 1).born = None
    session.commit()
    assert session.scalars(select(table.c.id).where(table.c.who_hash.is_(None))).all() == [1]


def test_a_class_that_lacks_a_source_does_not_change_the_others(engine: Engine, byok: Byok) -> None:
    """A flush cannot bring along what its class has not; it says so, and leaves everything else alone."""

    class Base(DeclarativeBase):
        pass

    class Boat(Base):
        __tablename__ = "hi_boat"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10))
        name: Mapped[str | None] = mapped_column(Encrypted(String(20)))
        port: Mapped[str | None] = mapped_column(Encrypted(String(20)))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "boat"}  # noqa: RUF012

    class Ferry(Boat):
        built: Mapped[date | None] = mapped_column(Encrypted(Date))
        who = hash_index("name", "built", transform=surname_year)
        __mapper_args__ = {"polymorphic_identity": "ferry"}  # noqa: RUF012

    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        boat, ferry = Boat(id=1, name="Rex"), Ferry(id=2, name="Max", built=date(2020, 1, 1))
        session.add_all([boat, ferry])
        session.commit()
        ferry.name, boat.port = "Rex", "Kiel"
        session.commit()
        boat.name = "Max"
        with pytest.raises(UnsupportedQueryError, match="set built too") as caught:
            session.commit()
        assert caught.value.column == "hi_boat.who"
        session.rollback()
        assert session.scalars(select(Ferry.id).where(Ferry.who == "rex/2020")).all() == [2]
        assert (boat.name, boat.port) == ("Rex", "Kiel")


INCOMPLETE: dict[str, Callable[[Session], Any]] = {
    "insert values": lambda s: s.execute(insert(Person).values(id=4, surname="x")),
    "Core insert values": lambda s: s.connection().execute(
        insert(person).values(id=4, kind="p", surname="x")
    ),
    "insert parameters": lambda s: s.execute(insert(Person), [{"id": 4, "surname": "x"}]),
    "ORM insert, named parameters": lambda s: s.execute(
        insert(Person).values(id=4, kind="p", surname=bindparam("s"), born=bindparam("b", None)), {"s": "x"}
    ),
    # SQLAlchemy goes by the first row's keys, and leaves out what only others have.
    "insert rows, the first shorter": lambda s: s.execute(
        insert(Person).values(
            [
                {"id": 4, "kind": "p", "surname": "x"},
                {"id": 5, "kind": "p", "surname": "x", "born": date(1900, 1, 1)},
            ]
        )
    ),
    "insert rows, twice": lambda s: s.execute(
        insert(Person)
        .values([{"id": 4, "kind": "p", "surname": "x"}])
        .values([{"id": 5, "kind": "p", "surname": "x", "born": date(1900, 1, 1)}])
    ),
}


@pytest.mark.parametrize("way", INCOMPLETE)
def test_a_row_without_all_sources_has_no_hash(session: Session, way: str) -> None:
    """However it was left out."""
    INCOMPLETE[way](session)
    new = session.scalars(select(Person).where(Person.surname.is_not(None), Person.id > 3)).all()
    assert {(each.surname, each.born) for each in new} == {("x", None)}
    assert ids(session, Person.who.is_(None)) == [3, *(each.id for each in new)]


def test_an_index_of_an_abstract_concrete_base(engine: Engine, byok: Byok) -> None:
    """Each table has its own, and the union of them is searched by it too."""

    class Base(DeclarativeBase):
        pass

    class Contact(AbstractConcreteBase, Base):
        strict_attrs = True
        phone: Mapped[str] = mapped_column(Encrypted(String(20), column_id="contact.phone"))
        name: Mapped[str] = mapped_column(Encrypted(String(20), column_id="contact.name"))
        phone_end = hash_index("phone", transform=last(2))
        name_and_phone = hash_index("name", "phone", transform=named("both")(lambda *both: "/".join(both)))

    class Friend(Contact):
        __tablename__ = "hi_friend"
        id: Mapped[int] = mapped_column(primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "friend", "concrete": True}  # noqa: RUF012

    class Firm(Contact):
        __tablename__ = "hi_contact_firm"
        id: Mapped[int] = mapped_column(primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "firm", "concrete": True}  # noqa: RUF012

    Base.registry.configure()
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [Friend(name="a", phone="123"), Firm(name="b", phone="923"), Firm(name="c", phone="9")]
        )
        session.commit()
        session.scalars(select(Firm).where(Firm.phone_end == "23")).one().name = "d"
        session.commit()
        found = session.scalars(select(Contact).where(Contact.phone_end == "23")).all()
        assert {type(each) for each in found} == {Friend, Firm}
        found = session.scalars(select(Contact).where(Contact.name_and_phone.in_(["d/923", "b/923"]))).all()
        assert [each.name for each in found] == ["d"]


PARTIAL: dict[str, Callable[[Session], Any]] = {
    "ORM update": lambda s: s.execute(update(Person).values(surname="x")),
    "ORM bulk update": lambda s: s.execute(update(Person), [{"id": 1, "born": date(1900, 1, 1)}]),
    "Core update": lambda s: s.connection().execute(update(person).values(born=date(1900, 1, 1))),
    "Core update, parameters": lambda s: s.connection().execute(update(person), {"surname": "x"}),
    "mixed": lambda s: s.connection().execute(update(person).values(surname="x"), {"born": None}),
    "mixed in a later row": lambda s: s.connection().execute(
        insert(person).values(kind="p", surname="x", born=date(1900, 1, 1)),
        [{"id": 8}, {"id": 9, "surname": "y"}],
    ),
    "mixed with many values": lambda s: s.connection().execute(
        insert(person).values(
            [{"id": 8, "kind": "p", "surname": "x"}, {"id": 9, "kind": "p", "surname": "x"}]
        ),
        {"surname": "y"},
    ),
    "later rows with more": lambda s: s.connection().execute(
        update(person).where(person.c.id == bindparam("i")),
        [{"i": 1, "surname": None}, {"i": 2, "surname": "x", "born": date(1900, 1, 1)}],
    ),
    "upsert": lambda s: s.execute(_upsert(s, Person, NEW, lambda _: {"surname": "x"})),
    "upsert, half excluded": lambda s: s.execute(
        _upsert(s, Person, NEW, lambda row: {"surname": "x", "born": row.born})
    ),
    "the hash itself": lambda s: s.execute(update(Person).values(who_hash=b"x")),
}


EMPTIED: dict[str, Callable[[Session], Any]] = {
    "flush": lambda s: setattr(s.get_one(Person, 1), "born", None),
    "ORM update": lambda s: s.execute(update(Person).where(Person.id == 1).values(born=None)),
    "ORM bulk update": lambda s: s.execute(update(Person), [{"id": 1, "born": None}]),
    "Core update": lambda s: s.connection().execute(
        update(person).where(person.c.id == 1).values(born=null())
    ),
    "Core update, parameters": lambda s: s.connection().execute(
        update(person).where(person.c.id == 1), {"born": None}
    ),
    "upsert": lambda s: s.execute(_upsert(s, Person, NEW, lambda _: {"born": None})),
}


@pytest.mark.parametrize("way", EMPTIED)
def test_a_source_that_becomes_null_takes_the_hash_along(session: Session, way: str) -> None:
    """The other source need not be named for that, and the row is no longer found by what it was."""
    assert ids(session, Person.who == "byron/1815") == [1]
    EMPTIED[way](session)
    session.flush()
    assert ids(session, Person.who == "byron/1815") == []
    assert 1 in ids(session, Person.who.is_(None))
    assert session.scalar(select(Person.surname).where(Person.id == 1)) == "Byron"


def test_a_bulk_update_of_some_sources_is_refused(session: Session) -> None:
    """The hash over several columns could not be told; the message names the index."""
    for write in PARTIAL.values():
        with pytest.raises(UnsupportedQueryError, match="who"):
            write(session)


def test_values_are_hashed_as_they_will_be_read(engine: Engine, byok: Byok) -> None:
    """A transform sees what the column will give back, not what it was given; its error tells no value."""
    metadata = MetaData()
    mapped = registry(metadata=metadata)

    @named("plain")
    def picky(value: Any) -> str:
        if not isinstance(value, date):
            raise TypeError(f"cannot take {value}")
        if value.year == 1:
            raise ValueError(f"cannot take {value}")
        return value.isoformat()

    class Day:
        day_text = hash_index("day", transform=picky)
        code_end = hash_index("code", transform=last(2))

    columns = Column("day", Encrypted(Date)), Column("code", Encrypted(Upper))
    mapped.map_imperatively(Day, Table("hi_day", metadata, Column("id", Integer, primary_key=True), *columns))
    metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(Day).values(id=1, day=date(2020, 2, 3)))
        assert session.scalar(select(Day.id).where(Day.day_text == "2020-02-03")) == 1  # type: ignore[attr-defined]
        session.execute(update(Day).values(code="x-ab"))
        assert session.scalars(select(Day)).one().code_end == "AB"
        assert session.scalar(select(Day.id).where(Day.code_end == "AB")) == 1  # type: ignore[attr-defined]
        with pytest.raises(EncodeError) as caught:
            session.execute(insert(Day).values(id=2, day=date(1, 1, 1)))
        assert "ValueError" in str(caught.value)
        assert "0001" not in str(caught.value)
        with pytest.raises(EncodeError):
            session.scalars(select(Day).where(Day.day_text == 2020)).all()


# -- declaring -------------------------------------------------------------------------------------------------------


def _declare(**attributes: Any) -> None:
    """A class with two encrypted columns, one plain one and the given attributes."""
    base = type("B", (DeclarativeBase,), {})
    type(
        "T",
        (base,),
        {
            "__tablename__": "t",
            "id": mapped_column(Integer, primary_key=True),
            "secret": mapped_column(Encrypted(String(9), searchable=True)),
            "other": mapped_column(Encrypted(String(9)), onupdate=lambda: "x"),
            "plain": mapped_column(String(9)),
            "owned": mapped_column(Encrypted(String(9), owner="vendor")),
            **attributes,
        },
    )


WRONG: dict[str, Callable[[], Any]] = {
    "no source": lambda: hash_index(transform=digits),
    "a lambda": lambda: hash_index("secret", transform=lambda value: value),
    "a name with a dot": lambda: hash_index("secret", transform=digits, name="a.b"),
    "unknown": lambda: _declare(x=hash_index("nothing", transform=digits)),
    "not encrypted": lambda: _declare(x=hash_index("plain", transform=digits)),
    "twice": lambda: _declare(x=hash_index("secret", "secret", transform=named("n")(lambda a, b: a))),
    "the sibling's name": lambda: _declare(x=hash_index("secret", transform=digits, name="secret")),
    "one name for two": lambda: _declare(
        x=hash_index("secret", transform=digits), y=hash_index("secret", transform=last(1), name="x")
    ),
    "onupdate of one of several": lambda: _declare(
        x=hash_index("secret", "other", transform=named("n")(lambda a, b: a))
    ),
    "of two owners": lambda: _declare(x=hash_index("secret", "owned", transform=named("n")(lambda a, b: a))),
    "another result": lambda: _declare(
        x=hash_index("secret", transform=named("n", returns=list)(lambda value: [value]))
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_declared_is_refused(what: str) -> None:
    """At declaration, not at the first query."""
    with pytest.raises(DeclarationError):
        WRONG[what]()


def test_an_index_that_was_assigned_later_says_so() -> None:
    """Where nothing tells it its sources it is refused by name, whatever is asked of it."""

    class Own(DeclarativeBase):
        pass

    class Guest(Own):
        __tablename__ = "hi_guest"
        id: Mapped[int] = mapped_column(primary_key=True)
        phone: Mapped[str] = mapped_column(Encrypted(String(20)))

    Guest.phone_last4 = hash_index("phone", transform=last(4))  # type: ignore[attr-defined]
    for asked in (lambda: Guest(phone="555").phone_last4, lambda: Guest.phone_last4 == "1"):  # type: ignore[attr-defined]
        with pytest.raises(DeclarationError, match="in the body of its class"):
            asked()


def test_a_copied_table_has_the_index_too() -> None:
    """to_metadata() keeps the transform, and takes the id of the new table."""
    copied = person.to_metadata(MetaData(), schema="s")
    assert copied.c.phone_last4_hash.type.source.column_id == "s.hi_person.phone_last4"
    assert copied.c.who_hash.type.source.transform is surname_year
