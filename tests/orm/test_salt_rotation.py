"""While search salts are rotated, each search finds rows hashed by any of them, or is refused; then it is as before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from keys_tools import TurnableClock
from orm.search_forms import ENCRYPTED, FORMS, PLAIN, ids, rows, statements
from sqlalchemy import (
    DDL,
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    lambda_stmt,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import ObjectNotExecutableError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import (
    DeclarativeBase,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.schema import CreateSequence, DropSequence
from sqlalchemy.types import TypeDecorator

from sqla_byok import (
    Byok,
    Encrypted,
    KeystoreUnavailableError,
    NoTenantError,
    UnsupportedQueryError,
    hash_index,
    search_hash,
)
from sqla_byok.crypto.hashes import Scope
from sqla_byok.keys.keyring import _SALTS_KEPT
from sqla_byok.keys.keyrings import POLL_EVERY, WRITE_WITHIN
from sqla_byok.kms import Kms
from sqla_byok.normalize import last, named

Person, Visit = ENCRYPTED.Person, ENCRYPTED.Visit

# What compares a column with a column or a subquery: equal values may have unequal hashes meanwhile.
REFUSED = {
    "in_ literals and columns",
    "column == itself",
    "join on columns",
    "outer join",
    "column != column",
    "self join",
    "exists",
    "not exists",
    "any by a hash",
    "has by a hash",
    "in_ (select)",
    "in_ (select distinct)",
    "in_ (select of a label)",
    "not_in (select)",
    "not_in (select with NULL) finds none",
    "in_ (select of an alias)",
    "== scalar subquery",
    "scalar subquery on the left",
    "correlated scalar subquery",
}


class StagedClock(TurnableClock):
    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.meanwhile()
        super().sleep(seconds)


class Process:
    """A Byok with a clock of its own, over an engine of its own."""

    def __init__(self, folder: Path, url: Any, options: dict[str, Any]) -> None:
        self.clock = StagedClock()
        self.byok = Byok(keystore=f"sqlite:///{folder / 'rotated.db'}", clock=self.clock, **options)
        self.engine = create_engine(url)
        self.byok.attach(self.engine)

    def session(self, tenant: str = "t1") -> Any:
        return self.byok.session(tenant, self.engine)

    def look(self) -> None:
        self.clock.turn(POLL_EVERY)
        for tenant in ("t1", "t2"):
            with self.byok.tenant(tenant):
                pass

    def live(self, tenant: str = "t1") -> int:
        return len(self.byok._keyrings.get(tenant).live_salts)

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


class World:
    """One process that searches, and another that rotates; the tenants t1 and t2, of which t1 is rotated."""

    def __init__(
        self, folder: Path, engine: Engine, customers: dict[str, Kms], options: dict[str, Any]
    ) -> None:
        self.one, self.other = (Process(folder, engine.url, options) for _ in range(2))
        self.one.byok.create_keystore()
        for tenant, kms in customers.items():
            self.one.byok.onboard(tenant, kms)
        for models in (ENCRYPTED, PLAIN):
            models.Base.metadata.create_all(engine)

    def rotate(self, stage: str, between: Callable[[Process], object]) -> None:
        """Bring t1 to a stage, as ``one`` sees it, and let ``between`` write by the new salt."""
        one, other = self.one, self.other
        one.look()
        if stage == "pending":  # by the last look of one; the other has gone on since
            other.clock.meanwhile = one.look
        other.byok.rotate_salt("t1")
        other.clock.meanwhile = lambda: None
        if stage == "three":
            other.clock.meanwhile = one.look
            other.byok.rotate_salt("t1")
        other.look()
        between(other)
        if stage == "readable":
            one.look()
        assert one.live() == (3 if stage == "three" else 2)

    def close(self) -> None:
        self.one.close()
        self.other.close()


@pytest.fixture
def world(
    tmp_path: Path, engine: Engine, customers: dict[str, Kms], kms_options: dict[str, Any]
) -> Iterator[World]:
    world = World(tmp_path, engine, customers, kms_options)
    yield world
    world.close()


def _fill(world: World, stage: str) -> None:
    """The rows of the forms, in turn by the old salt and by the new one."""
    with world.one.session() as session:
        for group in (rows(ENCRYPTED), rows(PLAIN)):
            session.add_all([row for row in group if row.id in (1, 2) and hasattr(row, "note")])
            session.flush()
            session.add_all([row for row in group if row.id in (1, 3) and not hasattr(row, "note")])
        session.commit()

    def between(other: Process) -> None:
        with other.session() as session:
            for group in (rows(ENCRYPTED), rows(PLAIN)):
                session.add_all([row for row in group if row.id in (3, 4) and hasattr(row, "note")])
                session.flush()
                session.add_all([row for row in group if row.id in (2, 4) and not hasattr(row, "note")])
            session.commit()

    world.rotate(stage, between)


@pytest.mark.parametrize("stage", ["pending", "readable", "three"])
@pytest.mark.parametrize("style", ["select", "query"])
def test_each_form_finds_rows_by_each_salt_or_is_refused(world: World, style: str, stage: str) -> None:
    """Whatever salt made a row's hash, no form misses it and NULL is as in plaintext; what could lie says so."""
    _fill(world, stage)
    wrong: dict[str, object] = {}
    with world.one.session() as session:
        start: Any = select if style == "select" else session.query
        for name, form in FORMS.items():
            built = form.build(ENCRYPTED, start)
            try:
                found: Any = ids(
                    [
                        row[0] if hasattr(row, "_mapping") else row
                        for row in (session.scalars(built).all() if style == "select" else built.all())
                    ]
                )
            except UnsupportedQueryError as error:
                told = "while its salts are being rotated" in str(error) and error.column
                found = "refused" if told else error
            if found != ("refused" if name in REFUSED else form.found):
                wrong[name] = found
    assert wrong == {}


def _normal(sql: str) -> str:
    return sql.replace("%(mrn_1)s", "?").replace("%(nick_1)s", "?").replace("%s", "?").replace("`", "")


def test_tenants_in_different_states_share_one_statement(world: World) -> None:
    """One statement object, in turn for a rotating and a steady tenant: each gets its rows by its own SQL, cached."""
    person = select(Person.id).where(Person.mrn == "A", Person.nick.in_(["x", "y"]))
    cached: list[Any] = []
    for tenant, number in (("t1", 1), ("t2", 2)):
        with world.one.session(tenant) as session:
            session.add(Person(id=number, mrn="A", nick="x"))
            session.commit()
    with world.one.session("t2") as session, statements(world.one.engine) as before:
        session.scalars(person).all()

    def between(other: Process) -> None:
        with other.session() as session:
            session.add(Person(id=3, mrn="A", nick="y"))
            session.commit()

    world.rotate("readable", between)
    event.listen(
        world.one.engine,
        "before_cursor_execute",
        lambda *given: cached.append(given[4].cache_hit.name),
    )
    sent: list[str] = []
    for turn in range(3):
        for tenant, found in (("t1", [1, 3]), ("t2", [2])):
            with world.one.session(tenant) as session, statements(world.one.engine) as seen:
                assert sorted(session.scalars(person)) == found
            sent += seen
        assert cached[2 * turn :] == (["CACHE_MISS", "CACHE_HIT"] if turn == 0 else ["CACHE_HIT"] * 2)
    assert sent[1::2] == before * 3
    assert _normal(before[0]).count("mrn_hash = ?") == 1
    assert len(set(sent[0::2])) == 1
    assert "mrn_hash IN (" in sent[0]
    assert sent[0].count("nick_hash IN (") == 2


def test_a_steady_tenant_pays_nothing(world: World) -> None:
    """Once the old salt is retired, the SQL is again what it was, byte for byte, in the cache of the time before."""
    person = select(Person.id).where(Person.mrn == "A")
    with world.one.session() as session, statements(world.one.engine) as before:
        session.scalars(person).all()
    world.rotate("readable", lambda other: None)
    with world.one.session() as session, statements(world.one.engine) as rotating:
        session.scalars(person).all()
    assert rotating != before
    world.other.byok._generations.retire("t1", "search-salt", 1)
    world.one.look()
    with world.one.session() as session, statements(world.one.engine) as after:
        session.scalars(person).all()
    assert after == before


def _two_by_two(world: World, stage: str = "readable") -> None:
    """Persons 1 and 2 by the old salt, 3 and 4 by the new one; of each pair one "A" and one "B". Visits likewise."""

    def pair(process: Process, first: int) -> None:
        with process.session() as session:
            session.add_all([Person(id=first, mrn="A", nick="x"), Person(id=first + 1, mrn="B", nick=None)])
            session.flush()
            session.add_all(
                [
                    Visit(id=first, person_id=1, mrn="A", code="c1"),
                    Visit(id=first + 1, person_id=1, mrn="B", code="c2"),
                ]
            )
            session.commit()

    pair(world.one, 1)
    world.rotate(stage, lambda other: pair(other, 3))


_person = Person.__table__
_executemany = _person.update().where(_person.c.mrn == bindparam("m")).values(note=bindparam("n"))
_DML: dict[str, tuple[Callable[[Session], Any], dict[int, str | None]]] = {
    "update": (
        lambda s: s.execute(update(Person).where(Person.mrn == "A").values(note="n")),
        {1: "n", 2: None, 3: "n", 4: None},
    ),
    "update by evaluation": (
        lambda s: (
            s.scalars(select(Person)).all(),
            s.execute(
                update(Person).where(Person.mrn != "A").values(note="n"),
                execution_options={"synchronize_session": "evaluate"},
            ),
            [person.note for person in s.identity_map.values()].count("n") == 2 or pytest.fail("stale"),
        ),
        {1: None, 2: "n", 3: None, 4: "n"},
    ),
    "update by fetching": (
        lambda s: (
            s.scalars(select(Person)).all(),
            s.execute(
                update(Person).where(Person.mrn.in_(["A", "Z"])).values(note="n"),
                execution_options={"synchronize_session": "fetch"},
            ),
            [person.note for person in s.identity_map.values()].count("n") == 2 or pytest.fail("stale"),
        ),
        {1: "n", 2: None, 3: "n", 4: None},
    ),
    "update of the searched column": (
        lambda s: (
            s.execute(update(Person).where(Person.mrn == "A").values(mrn="C")),
            s.execute(update(Person).where(Person.mrn == "C").values(note="n")),
        ),
        {1: "n", 2: None, 3: "n", 4: None},
    ),
    "executemany": (
        lambda s: s.connection().execute(_executemany, [{"m": "A", "n": "a"}, {"m": "B", "n": "b"}]),
        {1: "a", 2: "b", 3: "a", 4: "b"},
    ),
    "one set of parameters": (
        lambda s: s.connection().execute(_executemany, {"m": "B", "n": "b"}),
        {1: None, 2: "b", 3: None, 4: "b"},
    ),
    "delete": (
        lambda s: s.execute(delete(Person).where(Person.mrn == "B", Person.id > 2)),
        {1: None, 2: None, 3: None},
    ),
    "core delete": (
        lambda s: s.connection().execute(_person.delete().where(_person.c.mrn.not_in(["A"]), _person.c.id > 2)),
        {1: None, 2: None, 3: None},
    ),
    "insert from select": (
        lambda s: (
            s.execute(
                insert(Visit.__table__).from_select(
                    ["id", "person_id"], select(Person.id + 10, Person.id).where(Person.mrn == bindparam("m"))
                ),
                {"m": "A"},
            ),
            sorted(s.scalars(select(Visit.id))) == [11, 13] or pytest.fail("missed"),
        ),
        {1: None, 2: None, 3: None, 4: None},
    ),
    "legacy query": (
        lambda s: s.query(Person).filter(Person.mrn == "A").update({"note": "n"}),
        {1: "n", 2: None, 3: "n", 4: None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_DML))
def test_dml_reaches_the_rows_of_each_salt(world: World, name: str) -> None:
    """UPDATE, DELETE and INSERT FROM SELECT by an encrypted column touch all its rows, in every way to run them."""
    _two_by_two(world)
    work, expected = _DML[name]
    with world.one.session() as session:
        session.execute(delete(Visit))
        work(session)
        session.commit()
        assert {row.id: row.note for row in session.execute(select(Person.id, Person.note))} == expected


def test_what_is_written_is_hashed_by_the_active_salt(world: World) -> None:
    """While the new salt is pending the old one writes, afterwards the new one; never one that is only readable."""
    with world.one.session() as session:
        session.add(Person(id=1, mrn="A"))
        session.commit()
        first = session.scalar(select(search_hash(Person.mrn)).where(Person.id == 1))

    def between(other: Process) -> None:
        with other.session() as session:
            session.add(Person(id=3, mrn="A"))
            session.commit()

    world.other.clock.meanwhile = lambda: None
    world.rotate("pending", between)
    with world.one.session() as session:
        session.add(Person(id=2, mrn="A"))
        session.commit()
        world.one.look()
        session.execute(insert(Person), [{"id": 4, "mrn": "A"}, {"id": 5, "mrn": "A"}])
        session.commit()
        hashes = session.scalars(select(search_hash(Person.mrn)).order_by(Person.id)).all()
    assert hashes == [first, first, hashes[2], hashes[2], hashes[2]]
    assert hashes[2] != first


# -- further indexes -------------------------------------------------------------------------------------------------


class IndexBase(DeclarativeBase):
    pass


class Card(IndexBase):
    __tablename__ = "bank_card"
    id = mapped_column(Integer, primary_key=True)
    note = mapped_column(String(20))
    pan = mapped_column(Encrypted(String(20)))
    holder = mapped_column(Encrypted(String(20)))
    last4: Any = hash_index("pan", transform=last(4))
    both: Any = hash_index("holder", "pan", transform=named("holder-and-pan")(lambda *parts: "/".join(parts)))


_CARDS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "==": (lambda: Card.last4 == "1111", [1, 3]),
    "!=": (lambda: Card.last4 != "1111", [2, 4]),
    "in_": (lambda: Card.last4.in_(["1111", "9999"]), [1, 3]),
    "not_in": (lambda: Card.last4.not_in(["2222"]), [1, 3]),
    "not_in nothing": (lambda: Card.last4.not_in([]), [1, 2, 3, 4, 5]),
    "negated": (lambda: ~(Card.last4 == "1111"), [2, 4]),
    "is_": (lambda: Card.last4.is_(None), [5]),
    "is_not": (lambda: Card.last4.is_not(None), [1, 2, 3, 4]),
    "of two columns": (lambda: Card.both == "ada/01111", [1, 3]),
    "with others": (lambda: and_(Card.last4 == "1111", Card.both != "x", Card.id > 1), [3]),
}


@pytest.mark.parametrize("stage", ["pending", "readable", "three"])
def test_an_index_finds_rows_of_each_salt(world: World, engine: Engine, stage: str) -> None:
    """As a column does; what a flush brings along is hashed by the active salt, and the SQL is one again afterwards."""
    IndexBase.metadata.create_all(engine)

    def pair(process: Process, first: int) -> None:
        with process.session() as session:
            session.add_all(
                [
                    Card(id=first, pan="01111", holder="ada"),
                    Card(id=first + 1, pan="02222", holder="bo"),
                ]
            )
            session.commit()

    def found(process: Process) -> dict[str, list[int]]:
        with process.session() as session:
            return {
                name: sorted(session.scalars(select(Card.id).where(build())))
                for name, (build, _) in _CARDS.items()
            }

    pair(world.one, 1)
    with world.one.session() as session:
        session.add(Card(id=5, holder="cy"))
        session.commit()
    steady = select(Card.id).where(Card.last4 == "1111")
    with world.one.session() as session, statements(world.one.engine) as before:
        assert session.scalars(steady).all() == [1]
    world.rotate(stage, lambda other: pair(other, 3))
    assert found(world.one) == {name: ids for name, (_, ids) in _CARDS.items()}
    with world.one.session() as session:
        session.execute(update(Card).where(Card.last4.in_(["1111"])).values(note="n"))
        assert sorted(session.scalars(select(Card.id).where(Card.note == "n"))) == [1, 3]
        session.get_one(Card, 1).holder = "eve"
        session.commit()
        assert session.scalars(select(Card.id).where(Card.both == "eve/01111")).all() == [1]
    world.one.clock.turn(POLL_EVERY)
    world.other.byok._generations.settle()
    with world.other.session() as session:
        for card in session.scalars(select(Card)):
            session.execute(update(Card).where(Card.id == card.id).values(pan=card.pan, holder=card.holder))
        session.commit()
    for old in range(1, 3 if stage == "three" else 2):
        world.other.byok._generations.retire("t1", "search-salt", old)
    world.one.look()
    with world.one.session() as session, statements(world.one.engine) as after:
        assert sorted(session.scalars(steady)) == [1, 3]
    assert after == before


# -- what the ORM runs by itself -------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"
    id = mapped_column(Integer, primary_key=True)
    code = mapped_column(Encrypted(String(20), searchable=True, salt_scope="code"))
    children = relationship(
        "Child", primaryjoin="and_(Parent.id == Child.parent_id, Child.kind == 'k')", viewonly=True
    )
    alike = relationship("Child", primaryjoin="Parent.code == foreign(Child.code)", viewonly=True)
    everyone = relationship("Child", primaryjoin="Parent.id == Child.parent_id", viewonly=True)
    of_p = relationship(
        "Child", primaryjoin="and_(Parent.id == Child.parent_id, Parent.code == 'p')", viewonly=True
    )


class Child(Base):
    __tablename__ = "child"
    id = mapped_column(Integer, primary_key=True)
    parent_id = mapped_column(ForeignKey(Parent.id))
    kind = mapped_column(Encrypted(String(20), searchable=True))
    code = mapped_column(Encrypted(String(20), searchable=True, salt_scope="code"))


_of_kind = with_loader_criteria(Child, Child.kind == "k")
_of_kind_by_lambda = with_loader_criteria(Child, lambda cls: cls.kind == "k")
_LOADERS: dict[str, tuple[Any, str, object]] = {
    "lazy": ([], "children", [1, 3]),
    "lazy by a hash": ([], "alike", [1, 2, 3]),
    "lazy by the parent's own": ([], "of_p", [1, 2, 3, 4]),
    "joined by the parent's own": ([joinedload(Parent.of_p)], "of_p", [1, 2, 3, 4]),
    "selectin": ([selectinload(Parent.children)], "children", [1, 3]),
    "joined": ([joinedload(Parent.children)], "children", [1, 3]),
    "subquery": ([subqueryload(Parent.children)], "children", [1, 3]),
    "selectin by a hash": ([selectinload(Parent.alike)], "alike", UnsupportedQueryError),
    "joined by a hash": ([joinedload(Parent.alike)], "alike", UnsupportedQueryError),
    "and_": ([selectinload(Parent.everyone.and_(Child.kind == "k"))], "everyone", [1, 3]),
    "lazy with criteria": ([_of_kind], "everyone", [1, 3]),
    "selectin with criteria": ([selectinload(Parent.everyone), _of_kind], "everyone", [1, 3]),
    "joined with criteria": ([joinedload(Parent.everyone), _of_kind], "everyone", [1, 3]),
    "lambda criteria": ([selectinload(Parent.everyone), _of_kind_by_lambda], "everyone", [1, 3]),
}


@pytest.mark.parametrize("name", list(_LOADERS))
def test_loaders(world: World, engine: Engine, name: str) -> None:
    """Statements that the ORM makes by itself find the rows of each salt, before, while and after they are rotated."""
    Base.metadata.create_all(engine)
    options, attribute, expected = _LOADERS[name]

    def children(process: Process, first: int) -> None:
        with process.session() as session:
            session.add_all(
                [
                    Child(id=first, parent_id=1, kind="k", code="p"),
                    Child(id=first + 1, parent_id=1, kind="other", code="p" if first == 1 else "q"),
                ]
            )
            session.commit()

    def load(process: Process) -> list[int]:
        with process.session() as session:
            parent = session.scalars(
                select(Parent).where(Parent.code == "p").order_by(Parent.id).limit(5).options(*options)
            ).unique().one()  # fmt: skip
            return sorted(child.id for child in getattr(parent, attribute))

    with world.one.session() as session:
        session.add(Parent(id=1, code="p"))
        session.commit()
    children(world.one, 1)
    steady = load(world.one)
    world.rotate("readable", lambda other: children(other, 3))
    if not isinstance(expected, list):
        with pytest.raises(UnsupportedQueryError, match="while its salts are being rotated"):
            load(world.one)
        return
    assert steady == [number for number in expected if number < 3]
    assert load(world.one) == expected
    assert load(world.one) == expected  # from the caches


_name = "A"
_OTHER_FORMS: dict[str, Callable[[Session], Any]] = {
    "lambda statement": lambda s: s.scalars(lambda_stmt(lambda: select(Person.id).where(Person.mrn == "A"))),
    "lambda statement, closure": lambda s: _by_closure(s, "A"),
    "lambda in where": lambda s: s.scalars(select(Person.id).where(lambda: Person.mrn == _name)),
    "connection": lambda s: s.connection().scalars(select(_person.c.id).where(_person.c.mrn == "A")),
    "hash column": lambda s: s.scalars(select(Person.id).where(search_hash(Person.mrn) == "A")),
    "hash column in": lambda s: s.scalars(select(Person.id).where(search_hash(Person.mrn).in_(["A", "Z"]))),
    "hash column not in": lambda s: s.scalars(select(Person.id).where(search_hash(Person.mrn).not_in(["B", "Z"]))),
    "hash column, not": lambda s: s.scalars(select(Person.id).where(~(search_hash(Person.mrn) != "A"))),
    "union_all": lambda s: s.scalars(
        union_all(select(Person.id).where(Person.mrn == "A"), select(Person.id).where(Person.nick == "none"))
    ),
    "one name twice": lambda s: s.scalars(
        select(Person.id).where(or_(Person.mrn == bindparam("q"), Person.mrn == bindparam("q"))), {"q": "A"}
    ),
    "one condition twice": lambda s: s.scalars(
        (lambda c: select(Person.id).where(c, Person.id.in_(select(Person.id).where(c))))(Person.mrn == "A")
    ),
    "many at once": lambda s: s.scalars(
        select(Person.id).where(and_(*[Person.mrn != f"n{n}" for n in range(30)], Person.mrn == "A"))
    ),
    "no cache": lambda s: s.scalars(
        select(Person.id).where(Person.mrn == "A"), execution_options={"compiled_cache": None}
    ),
    "from_statement": lambda s: [
        person.id
        for person in s.scalars(select(Person).from_statement(select(Person).where(Person.mrn == "A")))
    ],
    "from_statement of an update": lambda s: (
        [
            person.id
            for person in s.scalars(
                select(Person).from_statement(
                    update(Person).where(Person.mrn == "A").values(nick="n").returning(Person)
                )
            )
        ]
        if s.get_bind().dialect.update_returning
        else [1, 3]
    ),
    "spoiled lambda": lambda s: s.scalars(
        lambda_stmt(lambda: select(Person.id).where(Person.mrn == "A")).spoil()
    ),
    "function": lambda s: [1, 3] if s.scalar(select(func.count()).where(Person.mrn == "A")) == 2 else [],
    "cte of a delete": lambda s: s.scalars(
        (lambda found: select(found.c.id))(select(Person.id).where(Person.mrn == "A").cte())
    ),
    "yield_per": lambda s: s.scalars(select(Person.id).where(Person.mrn == "A").execution_options(yield_per=1)),
}  # fmt: skip


def _by_closure(session: Session, mrn: str) -> Any:
    return session.scalars(lambda_stmt(lambda: select(Person.id).where(Person.mrn == mrn)))


@pytest.mark.parametrize("stage", ["pending", "three"])
def test_other_ways_to_search(world: World, stage: str) -> None:
    """Lambdas, connections, hash columns, names used twice: each finds both salts' rows, also when cached."""
    _two_by_two(world, stage)
    wrong: dict[str, object] = {}
    with world.one.session() as session:
        for name, run in _OTHER_FORMS.items():
            for _ in range(2):
                found = sorted(run(session))
                if found != [1, 3]:
                    wrong[name] = found
        assert sorted(_by_closure(session, "B")) == [2, 4]
    assert wrong == {}


def test_statements_that_search_nothing(world: World, engine: Engine) -> None:
    """Text, functions, DDL and sequences run for a tenant whose salts are being rotated as for any other."""
    world.rotate("readable", lambda other: None)
    with world.one.session() as session:
        connection = session.connection()
        assert connection.scalar(text("SELECT 1")) == 1
        assert connection.execute(text("SELECT 1").columns(id=Integer)).all() == [(1,)]
        assert connection.scalar(func.lower("A")) == "a"
        if engine.dialect.supports_sequences:
            sequence = Sequence("numbers")
            connection.execute(CreateSequence(sequence))
            assert connection.scalar(sequence) == 1
            connection.execute(DropSequence(sequence))
        _slow.create(connection)
        connection.execute(DDL("DROP TABLE slow"))


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_upserts(world: World, name: str) -> None:
    """The condition of an upsert's update reaches rows of each salt, compiled anew or from the cache."""
    if world.one.engine.dialect.name != name:
        pytest.skip("each has an INSERT of its own")
    _two_by_two(world)
    make: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[name]
    with world.one.session() as session:
        for number in (1, 2, 3, 4):
            upsert = make(Person).values(id=number, mrn="A")
            session.execute(
                upsert.on_conflict_do_update(
                    index_elements=["id"], set_={"note": "n"}, where=Person.mrn == "A"
                )
            )
        assert sorted(session.scalars(select(Person.id).where(Person.note == "n"))) == [1, 3]


_unique = Table(
    "unique_mrn",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("mrn", Encrypted(String(20), searchable=True), unique=True),
    Column("note", String(20)),
)
_UPSERTS: dict[str, list[Callable[[Any], Any]]] = {
    "sqlite": [
        lambda insert: insert.on_conflict_do_update(index_elements=["mrn"], set_={"note": "n"}),
        lambda insert: insert.on_conflict_do_update(index_elements=[_unique.c.mrn], set_={"note": "n"}),
        lambda insert: insert.on_conflict_do_nothing(),
    ],
    "postgresql": [
        lambda insert: insert.on_conflict_do_update(index_elements=["mrn"], set_={"note": "n"}),
        lambda insert: insert.on_conflict_do_nothing(index_elements=[_unique.c.mrn_hash]),
        lambda insert: insert.on_conflict_do_nothing(),
    ],
    "mysql": [lambda insert: insert.on_duplicate_key_update(note="n")],
}


def test_upserts_by_a_hash(world: World, engine: Engine) -> None:
    """One would not see the row that has the value under the other salt, and add a second; once rotated it works on."""
    dialect = {"mariadb": "mysql"}.get(engine.dialect.name, engine.dialect.name)
    make: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert, "mysql": mysql.insert}[dialect]
    _unique.create(engine)
    upserts = [upsert(make(_unique).values(mrn="A")) for upsert in _UPSERTS[dialect]]
    with world.one.session() as session:
        for upsert in upserts:
            session.execute(upsert)
        session.commit()
    world.rotate("readable", lambda other: None)
    with world.one.session() as session:
        for upsert in upserts:
            with pytest.raises(UnsupportedQueryError, match="look the row up"):
                session.execute(upsert)
        if dialect != "mysql":  # there it is not said by which key a conflict is found
            by_id = make(_unique).values(id=1, mrn="B").on_conflict_do_nothing(index_elements=["id"])
            session.execute(by_id)
        session.commit()
        assert session.scalars(select(_unique.c.mrn)).all() == ["A"]
    world.other.byok._generations.retire("t1", "search-salt", 1)
    world.one.look()
    with world.one.session() as session:
        session.execute(upserts[0])


async def test_from_asyncio(
    tmp_path: Path, async_engine: AsyncEngine, customers: dict[str, Kms], kms_options: dict[str, Any]
) -> None:
    """The same under asyncio, over async drivers."""
    keystore = f"sqlite:///{tmp_path / 'k.db'}"
    byok = await asyncio.to_thread(Byok, keystore, clock=TurnableClock(), **kms_options)
    await byok.acreate_keystore()
    await byok.aonboard("t1", customers["t1"])
    byok.attach(async_engine)
    async with async_engine.begin() as connection:
        await connection.run_sync(ENCRYPTED.Base.metadata.create_all)
    for number in (1, 2):
        async with byok.asession("t1", async_engine) as session:
            session.add(Person(id=number, mrn="A"))
            await session.commit()
            assert (
                sorted(await session.scalars(select(Person.id).where(Person.mrn == "A"))) == [1, 2][:number]
            )
        await byok.arotate_salt("t1")
    await byok.aclose()


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_statement_compiled_beforehand(world: World) -> None:
    """It looks up by one salt, and would miss rows; where its tenant is steady it goes on working."""
    compiled = select(_person.c.id).where(_person.c.mrn == "A").compile(world.one.engine)
    joined = select(_person.c.id).where(_person.c.mrn == _person.c.mrn).compile(world.one.engine)
    _two_by_two(world)
    for beforehand in (compiled, joined):
        with (
            world.one.session() as session,
            pytest.raises((UnsupportedQueryError, ObjectNotExecutableError), match=r"beforehand|executable"),
        ):
            session.connection().execute(beforehand)
        if sqlalchemy.__version__.startswith("2.0"):  # 2.1 takes no compiled statement at all
            with world.one.session("t2") as session:
                session.connection().execute(beforehand)


def test_a_hash_that_was_read_before(world: World) -> None:
    """A row's hash finds the rows of its own salt only, which is a miss while others are live."""
    _two_by_two(world)
    with world.one.session() as session:
        digest = session.scalar(select(search_hash(Person.mrn)).where(Person.id == 1))
        for criterion in (
            Person.mrn == digest,
            search_hash(Person.mrn) == digest,
            search_hash(Person.mrn).in_([digest]),
        ):
            with pytest.raises(UnsupportedQueryError, match="look the value up"):
                session.scalars(select(Person.id).where(criterion)).all()
        with pytest.raises(UnsupportedQueryError, match="while its salts are being rotated"):
            session.scalars(select(Person.id).where(search_hash(Person.mrn) == search_hash(Visit.mrn))).all()


def test_hashes_are_compared_for_a_tenant_only(world: World) -> None:
    """Without a tenant nobody could say whether some tenant's salts are being rotated."""
    joined = select(Person.id).join(Visit, Visit.mrn == Person.mrn)
    with (
        world.one.engine.connect() as connection,
        pytest.raises(NoTenantError, match="compares search hashes"),
    ):
        connection.execute(joined)


def test_who_has_not_looked_does_not_search(world: World) -> None:
    """Past WRITE_WITHIN a process cannot know all salts: searching is refused, also in DELETE, joins and groups."""
    _two_by_two(world)
    world.one.byok._keystore.database.read = _away  # type: ignore[method-assign]
    searches: list[Any] = [
        select(Person.id).where(Person.mrn == "A"),
        select(Person.id).where(Person.mrn.in_(["A"])),
        delete(Person).where(Person.mrn == "B"),
        update(Person).where(Person.mrn == "A").values(note="n"),
    ]
    world.one.clock.turn(WRITE_WITHIN - 0.1)
    with world.one.session() as session:
        for search in searches:
            session.execute(search)
        session.rollback()
        world.one.clock.turn(0.2)
        for search in searches:
            with pytest.raises(KeystoreUnavailableError, match="not written nor searched"):
                session.execute(search)
        assert session.scalars(select(Person.mrn).order_by(Person.id)).all() == ["A", "B", "A", "B"]
        session.execute(update(Person).values(note="n"))
    steady: list[Any] = [
        select(Person.id).join(Visit, Visit.mrn == Person.mrn),
        select(func.count()).group_by(search_hash(Person.mrn)),
        select(func.count(search_hash(Person.mrn).distinct())),
        select(search_hash(Person.mrn)).distinct(),
    ]
    with world.one.session("t2") as session:
        for search in steady:
            with pytest.raises(KeystoreUnavailableError, match="nor searched"):
                session.execute(search)


def _away(work: Callable[..., Any]) -> Any:
    raise KeystoreUnavailableError("away")


# -- a statement keeps to one epoch ----------------------------------------------------------------------------------


class Pausing(TypeDecorator[str]):
    """A text whose conversion can be made to wait for something."""

    impl = String
    cache_ok = True
    pause: Callable[[], object] = staticmethod(lambda: None)

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        type(self).pause()
        return value


_slow = Table(
    "slow",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("mrn", Encrypted(Pausing(20), searchable=True)),
)


@pytest.mark.parametrize("late", [False, True], ids=["in time", "too late"])
def test_keys_that_change_while_a_statement_is_prepared(
    world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """It is bound by the salts of one epoch from first to last; one too old to be complete is refused, not run."""
    _slow.create(engine)
    find = select(_slow.c.id).where(_slow.c.mrn == "A")
    one, other = world.one, world.other
    paused: list[int] = []

    def write(process: Process, number: int) -> None:
        with process.session() as session:
            session.execute(insert(_slow).values(id=number, mrn="A"))
            session.commit()

    def look() -> None:
        thread = threading.Thread(target=one.look)
        thread.start()
        thread.join(30)

    def pause() -> None:
        if paused:
            return
        paused.append(one.live())
        if late:
            other.byok.rotate_salt("t1")
            one.clock.turn(WRITE_WITHIN)
            other.look()
            write(other, 3)
        look()
        paused.append(one.live())

    write(one, 1)
    if late:
        one.look()
    else:
        world.rotate("pending", lambda process: write(process, 2))
    monkeypatch.setattr(Pausing, "pause", staticmethod(pause))
    with one.session() as session:
        if late:
            with pytest.raises(KeystoreUnavailableError):
                session.scalars(find).all()
            assert paused == [1, 2]
            assert sorted(session.scalars(find)) == [1, 3]
        else:
            assert sorted(session.scalars(find)) == [1, 2]
            assert sorted(session.scalars(find)) == [1, 2]


def test_derived_salts_are_bounded(world: World) -> None:
    """However many columns are searched and salts are live, a tenant keeps within its memory."""
    _two_by_two(world, "three")
    ring = world.one.byok._keyrings.get("t1")
    for salts in ring.live_salts:
        for number in range(100):
            assert salts["hmac-sha256", Scope("column", f"t.c{number}")]
    assert len(ring.live_salts) == 3
    assert sum(len(salts) for salts in ring.live_salts) <= _SALTS_KEPT
    ring.clear()
    assert [len(salts) for salts in ring.live_salts] == [0, 0, 0]
