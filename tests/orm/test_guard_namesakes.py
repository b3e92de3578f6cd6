"""Another Table object with the name of a table that has encrypted columns: what it would do in the clear."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    case,
    cast,
    column,
    create_engine,
    delete,
    event,
    except_,
    exists,
    func,
    insert,
    literal,
    or_,
    quoted_name,
    select,
    table,
    text,
    tuple_,
    type_coerce,
    union,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.automap import automap_base
from sqlalchemy.orm import DeclarativeBase, Session, aliased, mapped_column

from sqla_byok import Byok, Encrypted, UnsupportedQueryError

CANARY = "plain-c4nary"


class Base(DeclarativeBase):
    pass


class Crate(Base):
    __tablename__ = "k_crate"
    id = mapped_column(Integer, primary_key=True, autoincrement=False)
    owner = mapped_column(Encrypted(String(20), searchable=True))
    note = mapped_column(String(40))


class Plain(Base):
    __tablename__ = "k_plain"
    id = mapped_column(Integer, primary_key=True, autoincrement=False)
    note = mapped_column(String(40))


def _other(name: Any = "k_crate", owner: str = "owner", **options: Any) -> Table:
    """What pandas' ``to_sql`` makes: a Table of a MetaData of its own, which names the columns as it finds them."""
    return Table(
        name,
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column(owner, String(40), **options),
        Column("owner_hash", LargeBinary(32)),
        Column("note", String(40)),
    )


OTHER = _other()
KEYED = Table(
    "k_crate", MetaData(), Column("id", Integer, primary_key=True), Column("owner", String(40), key="o")
)
LIGHT = table("k_crate", column("id"), column("owner"), column("note"))
o, p = OTHER.c, Plain.__table__.c


class Classic(DeclarativeBase):
    pass


class OtherCrate(Classic):
    """A class that somebody mapped to such a Table."""

    __table__ = OTHER


def _over(source: Any) -> Any:
    return select(source.c.id).where(source.c.owner == CANARY)


Rows = list[dict[str, Any]] | None
REFUSED: dict[str, Callable[[], Any]] = {
    "INSERT": lambda: insert(OTHER).values(id=9, owner=CANARY),
    "INSERT of several rows": lambda: insert(OTHER).values(
        [{"id": 9, "owner": CANARY}, {"id": 8, "owner": CANARY}]
    ),
    "INSERT by position": lambda: insert(OTHER).values([(9, CANARY, None, None)]),
    "INSERT of a key": lambda: insert(KEYED).values(id=9, o=CANARY),
    "INSERT by a default": lambda: insert(_other(default=CANARY)).values(id=9),
    "INSERT FROM SELECT": lambda: insert(OTHER).from_select(["id", "owner"], select(p.id, p.note)),
    "INSERT in a CTE": lambda: select(p.id).add_cte(
        insert(OTHER).values(id=9, owner=CANARY).returning(o.id).cte("made")
    ),
    "INSERT of a hash": lambda: insert(OTHER).values(id=9, owner_hash=b"x"),
    "INSERT into table()": lambda: insert(LIGHT).values(id=9, owner=CANARY),
    "UPDATE": lambda: update(OTHER).values(owner=CANARY),
    "UPDATE by a Column": lambda: update(OTHER).values({o.owner: CANARY}),
    "UPDATE of ordered values": lambda: update(OTHER).ordered_values((o.owner, CANARY)),
    "UPDATE by a parameter": lambda: update(OTHER).values(owner=bindparam("given", CANARY)),
    "UPDATE by an expression": lambda: update(OTHER).values(owner=func.lower(CANARY)),
    "UPDATE by onupdate": lambda: update(_other(onupdate=CANARY)).values(note="x"),
    "UPDATE of a hash": lambda: update(OTHER).values(owner_hash=b"x"),
    "UPDATE FROM": lambda: update(OTHER).where(o.id == p.id).values(owner=p.note),
    "UPDATE that copies it": lambda: update(Plain.__table__).where(o.id == p.id).values(note=o.owner),
    "UPDATE in a CTE": lambda: select(p.id).add_cte(
        update(OTHER).values(owner=CANARY).returning(o.id).cte("made")
    ),
    "DELETE": lambda: delete(OTHER).where(o.owner == CANARY),
    "==": lambda: select(o.id).where(o.owner == CANARY),
    "!=": lambda: select(o.id).where(o.owner != CANARY),
    "LIKE": lambda: select(o.id).where(o.owner.like(CANARY)),
    "IN": lambda: select(o.id).where(o.owner.in_([CANARY])),
    "a tuple": lambda: select(o.id).where(tuple_(o.id, o.owner).in_([(1, CANARY)])),
    "a hash ==": lambda: select(o.id).where(o.owner_hash == b"x"),
    "a hash of an alias": lambda: (lambda a: select(a.c.id).where(a.c.owner_hash == b"x"))(OTHER.alias()),
    "== of table()": lambda: select(LIGHT.c.id).where(LIGHT.c.owner == CANARY),
    "== in EXISTS": lambda: select(p.id).where(exists().where(o.owner == CANARY)),
    "== of an alias": lambda: _over(OTHER.alias()),
    "== of a subquery": lambda: _over(select(OTHER).subquery()),
    "== of a CTE": lambda: _over(select(o.id, o.owner).cte()),
    "== the model's column": lambda: select(Crate.id).where(Crate.owner == o.owner),
    "JOIN ON": lambda: select(p.id).join_from(Plain.__table__, OTHER, p.note == o.owner),
    "ORDER BY": lambda: select(o.id).order_by(o.owner),
    "ORDER BY a string": lambda: select(o.id, o.owner).order_by("owner"),
    "ORDER BY a position": lambda: select(o.id, o.owner).order_by(text("2")),
    "ORDER BY text": lambda: select(o.id).order_by(text("owner")),
    "GROUP BY": lambda: select(func.count()).group_by(o.owner),
    "DISTINCT": lambda: select(o.owner).distinct(),
    "UNION": lambda: union(select(o.owner), select(o.owner)),
    "EXCEPT": lambda: except_(select(o.owner), select(literal(CANARY))),
    "a window": lambda: select(func.row_number().over(partition_by=o.owner, order_by=o.id)),
    "lower()": lambda: select(func.lower(o.owner)),
    "max()": lambda: select(func.max(o.owner)),
    "CAST": lambda: select(cast(o.owner, LargeBinary)),
    "concatenation": lambda: select(o.owner + CANARY),
    "CASE": lambda: select(case((o.owner == CANARY, 1), else_=0)),
}
PARAMETERS: dict[str, tuple[Any, Any]] = {
    "INSERT": (insert(OTHER), {"id": 9, "owner": CANARY}),
    "INSERT, executemany": (insert(OTHER), [{"id": 9, "owner": CANARY}, {"id": 8, "owner": CANARY}]),
    "INSERT of a key": (insert(KEYED), [{"id": 9, "o": CANARY}]),
    "INSERT into table()": (insert(LIGHT), [{"id": 9, "owner": CANARY}]),
    "UPDATE": (update(OTHER).where(o.id == bindparam("b_id")), [{"b_id": 1, "owner": CANARY}]),
    "UPDATE by a parameter": (
        update(OTHER).where(o.id == bindparam("b_id")).values(owner=bindparam("given")),
        [{"b_id": 1, "given": CANARY}],
    ),
}


def _changed(session: Session) -> None:
    found = session.get(OtherCrate, 1)
    assert found is not None
    found.owner = CANARY  # type: ignore[attr-defined]
    session.flush()


ORM: dict[str, Callable[[Session], Any]] = {
    "add": lambda s: (s.add(OtherCrate(id=9, owner=CANARY)), s.flush()),
    "change": _changed,
    "bulk_insert_mappings": lambda s: s.bulk_insert_mappings(
        OtherCrate.__mapper__, [{"id": 9, "owner": CANARY}]
    ),
    "bulk_update_mappings": lambda s: s.bulk_update_mappings(
        OtherCrate.__mapper__, [{"id": 1, "owner": CANARY}]
    ),
    "bulk INSERT": lambda s: s.execute(insert(OtherCrate), [{"id": 9, "owner": CANARY}]),
    "bulk UPDATE": lambda s: s.execute(update(OtherCrate), [{"id": 1, "owner": CANARY}]),
    "UPDATE": lambda s: s.execute(update(OtherCrate).values(owner=CANARY)),
    "filter_by": lambda s: s.query(OtherCrate).filter_by(owner=CANARY).all(),
    "an alias": lambda s: s.execute(select((a := aliased(OtherCrate)).id).order_by(a.owner)),  # type: ignore[attr-defined]
}


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Before a table's name refuses a statement, garbage is collected: here not that of a whole run, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def crates(engine: Engine, byok: Byok) -> Engine:
    """The engine, with the tables and one row."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(Crate(id=1, owner="Ada", note="x"))
        session.commit()
    return engine


@contextmanager
def sent_to(engine: Engine) -> Iterator[list[tuple[str, str]]]:
    """The SQL and the parameters that the cursor was given within the block."""
    engine.connect().close()  # the dialect's own questions come first
    sent: list[tuple[str, str]] = []

    def listen(cursor: Any, statement: str, *rest: Any) -> None:
        sent.append((statement, repr(rest[:-1])))

    for name in ("do_execute", "do_executemany"):
        event.listen(engine, name, listen)
    yield sent
    for name in ("do_execute", "do_executemany"):
        event.remove(engine, name, listen)


def _wrong(engine: Engine, work: Callable[[], Any], runs: bool = False) -> str | None:
    """What is wrong: nothing, where the work is refused and no value is sent.

    :param runs: it may run, as long as it sends no value.
    """
    with sent_to(engine) as sent:
        try:
            work()
        except UnsupportedQueryError:
            said = None
        except DBAPIError as error:
            said = None if runs else repr(error)
        else:
            said = None if runs else "it ran"
    return f"it sent {sent}" if CANARY in str(sent) else said


@pytest.mark.parametrize("mode", [{"raw_sql": "warn"}, {"raw_sql": "allow"}, {"guard": "report"}], ids=str)
def test_what_another_table_would_do_in_the_clear_is_refused(
    crates: Engine, byok: Byok, mode: dict[str, Any]
) -> None:
    """Writing, comparing and sorting by it is refused, whatever raw_sql says; a report sends no value either."""
    engine = create_engine(crates.url)
    byok.attach(engine, **mode)
    statements: dict[str, tuple[Any, Any]] = {name: (build(), None) for name, build in REFUSED.items()}
    statements.update({f"{name}, with parameters": given for name, given in PARAMETERS.items()})
    wrong: dict[str, str] = {}
    for name, (statement, given) in statements.items():
        with byok.session("t1", engine) as session:
            connection = session.connection()
            work = partial(connection.execute, statement, given)
            if said := _wrong(engine, work, runs="guard" in mode):
                wrong[name] = said
    engine.dispose()
    assert wrong == {}


def test_the_orm_over_another_table_is_refused(crates: Engine, byok: Byok) -> None:
    """Automapped and classically mapped classes write nothing in the clear."""
    wrong: dict[str, str] = {}
    for name, work in ORM.items():
        with byok.session("t1", crates) as session:
            if said := _wrong(crates, partial(work, session)):
                wrong[name] = said
    automapped = automap_base()
    automapped.prepare(autoload_with=crates)
    made = automapped.classes.k_crate
    with byok.session("t1", crates) as session:
        session.add(made(id=9, owner=b"x"))
        with pytest.raises(UnsupportedQueryError):
            session.flush()
    assert wrong == {}


def test_upserts_into_another_table_are_refused(crates: Engine, byok: Byok) -> None:
    """In SET, in WHERE, and as what conflicts are found by."""
    if crates.dialect.name in ("mysql", "mariadb"):
        statements = [mysql.insert(OTHER).values(id=1).on_duplicate_key_update(owner=CANARY)]
    else:
        given = {"sqlite": sqlite, "postgresql": postgresql}[crates.dialect.name].insert(OTHER).values(id=1)
        statements = [
            given.on_conflict_do_update(index_elements=["id"], set_={"owner": CANARY}),
            given.on_conflict_do_update(index_elements=["id"], set_={o.owner: CANARY}),
            given.on_conflict_do_update(index_elements=["id"], set_={"note": given.excluded.owner}),
            given.on_conflict_do_update(
                index_elements=["id"], set_={"note": "x"}, where=given.excluded.owner == CANARY
            ),
            given.on_conflict_do_nothing(index_elements=["owner"]),
            given.on_conflict_do_nothing(index_elements=[o.owner]),
        ]
    with byok.session("t1", crates) as session:
        for statement in statements:
            assert _wrong(crates, partial(session.connection().execute, statement)) is None


def test_bytes_may_be_read_through_another_table(crates: Engine, byok: Byok) -> None:
    """Copying tools and dumps go on: the ciphertext as it is, NULL tests, counts, and the other columns."""
    raw = _other()
    raw.c.owner.type = LargeBinary()
    c = raw.c
    with byok.session("t1", crates) as session:
        connection = session.connection()
        ((id_, stored, hashed),) = connection.execute(select(c.id, c.owner, c.owner_hash)).all()
        assert (id_, len(hashed)) == (1, 32)
        assert b"Ada" not in bytes(stored)
        assert connection.execute(select(c.id).where(c.owner.is_not(None))).scalar() == 1
        assert connection.execute(select(func.count(c.owner))).scalar() == 1
        assert connection.execute(select(func.length(c.owner))).scalar() == len(stored)
        assert connection.execute(select(c.id, c.owner).distinct()).all()
        assert connection.scalar(select(type_coerce(c.owner, Crate.__table__.c.owner.type))) == "Ada"
        assert connection.execute(select(c.id).where(c.note == "x").order_by(c.note)).scalar() == 1
        connection.execute(update(raw).values(note="y").where(or_(c.id == 1, c.note == "z")))
        connection.execute(insert(raw).values(id=2, note="z"))
        connection.execute(delete(raw).where(c.id == 2))
        sealed = literal("Eve", Crate.__table__.c.owner.type)
        connection.execute(insert(raw).values(id=3, owner=sealed))
        assert connection.scalar(select(Crate.owner).where(Crate.id == 3)) == "Eve"


def test_another_schema_is_another_table(crates: Engine, byok: Byok) -> None:
    """The default schema's name means the same table, another name another; a translated one may be either."""
    schema: Any = crates.dialect.default_schema_name
    assert schema
    same, elsewhere = (
        Table("k_crate", MetaData(schema=name), Column("id", Integer), Column("owner", String))
        for name in (schema, "k_elsewhere")
    )
    with byok.session("t1", crates) as session, pytest.raises(UnsupportedQueryError):
        session.connection().execute(insert(same).values(id=9, owner=CANARY))
    with (
        byok.session("t1", crates) as session,
        pytest.raises(DBAPIError, match="k_elsewhere"),  # there is no such schema
    ):
        session.connection().execute(insert(elsewhere).values(id=9, owner=CANARY))
    with byok.session("t1", crates) as session:
        options: Any = {"schema_translate_map": {"k_elsewhere": None}}
        connection = session.connection(execution_options=options)
        with pytest.raises(UnsupportedQueryError):
            connection.execute(insert(elsewhere).values(id=9, owner=CANARY))


def test_names_are_compared_as_the_database_does(crates: Engine, byok: Byok) -> None:
    """K_CRATE is the same table on SQLite alone; OWNER the same column on all but PostgreSQL."""
    dialect = crates.dialect.name
    with byok.session("t1", crates) as session:
        for other, name, same in (
            (_other("K_CRATE"), "owner", dialect == "sqlite"),
            (_other("k_crate", "OWNER"), "OWNER", dialect != "postgresql"),
        ):
            with pytest.raises(Exception) as raised, session.begin_nested():
                session.connection().execute(insert(other).values({"id": 9, name: CANARY}))
            assert isinstance(raised.value, UnsupportedQueryError) is same


def test_names_that_are_rendered_as_they_stand_are_read_as_the_database_does(
    crates: Engine, byok: Byok
) -> None:
    """With quote=False a name may hold a schema, quotes and comments, and what it names is encrypted all the same."""
    quote = crates.dialect.identifier_preparer.quote_identifier
    schema = crates.dialect.default_schema_name
    tables = [f"{schema}.k_crate", quote("k_crate"), "/* x */ k_crate", f"{quote(schema or '')}. k_crate "]
    columns = [quote("owner"), " owner", "/* x */owner", f"k_crate.{quote('owner')}"]
    wrong = {}
    for name, owner in [(each, "owner") for each in tables] + [("k_crate", each) for each in columns]:
        other = _other(quoted_name(name, quote=False), quoted_name(owner, quote=False))
        light = table(quoted_name(name, quote=False), column("id"), column(quoted_name(owner, quote=False)))
        for statement in (
            *(insert(each).values({"id": 9, owner: CANARY}) for each in (other, light)),
            *(update(each).values({owner: CANARY}) for each in (other, light)),
            select(light.c.id).where(light.c[owner] == CANARY),
        ):
            with byok.session("t1", crates) as session:
                if said := _wrong(crates, partial(session.connection().execute, statement)):
                    wrong[str(statement)] = said
    assert wrong == {}


def test_a_table_that_is_no_more_counts_no_more(crates: Engine, byok: Byok) -> None:
    """Its name is free again, also where statements on it were run."""

    def gone() -> None:
        class Fleeting(DeclarativeBase):
            pass

        class Gone(Fleeting):
            __tablename__ = "k_plain"
            id = mapped_column(Integer, primary_key=True)
            note = mapped_column(Encrypted(String, searchable=True))

        with byok.session("t1", crates) as session, pytest.raises(UnsupportedQueryError):
            session.execute(select(p.id).order_by(p.note))

    gc.disable()  # the guard asks for itself, before it refuses
    try:
        gone()
        crates.clear_compiled_cache()
    finally:
        gc.enable()
    with byok.session("t1", crates) as session:
        assert session.execute(select(p.id).order_by(p.note)).all() == []


def test_ddl_by_another_table_is_left_alone(crates: Engine) -> None:
    """Migrations and tests create and drop tables by whatever Table they have."""
    OTHER.drop(crates)
    OTHER.create(crates)
    OTHER.drop(crates)


def test_a_view_is_what_is_declared_of_it(crates: Engine, byok: Byok) -> None:
    """With the column's id it decrypts, is searched and guarded as the table; as bytes it is read as bytes."""
    declared, raw = MetaData(), MetaData()
    type_: Any = Encrypted(String(20), searchable=True, column_id="k_crate.owner")
    view = Table("k_view", declared, Column("id", Integer, primary_key=True), Column("owner", type_))
    as_bytes = Table("k_view", raw, Column("id", Integer), Column("stored", LargeBinary, key="owner"))
    with crates.begin() as connection:
        connection.execute(
            text("CREATE VIEW k_view AS SELECT id, owner, owner_hash, owner AS stored FROM k_crate")
        )
    try:
        with byok.session("t1", crates) as session:
            connection = session.connection()
            found = select(view.c.owner).where(view.c.owner == "Ada")
            assert connection.execute(found).scalars().all() == ["Ada"]
            with pytest.raises(UnsupportedQueryError):
                connection.execute(select(view.c.id).order_by(view.c.owner))
            assert b"Ada" not in bytes(connection.scalar(select(as_bytes.c.owner)))
    finally:
        with crates.begin() as connection:
            connection.execute(text("DROP VIEW k_view"))
