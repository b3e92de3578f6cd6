"""Which tables are a tenant table by another name or object, and which only look like one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    column,
    delete,
    insert,
    literal_column,
    quoted_name,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import (
    Byok,
    DeclarationError,
    Encrypted,
    NoTenantError,
    TenantMismatchError,
    UnsupportedQueryError,
)

WHO = {"actor": "ada", "reason": "ticket 4711"}


class Base(DeclarativeBase):
    pass


class Beast(Base):
    __tablename__ = "n_beast"
    __byok_tenant__ = "org"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(20))
    kind: Mapped[str] = mapped_column(String(10), default="beast")
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "beast"}  # noqa: RUF012


class Bird(Beast):
    __tablename__ = "n_bird"
    number: Mapped[int] = mapped_column("id", ForeignKey("n_beast.id"), primary_key=True)
    wings: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "bird"}  # noqa: RUF012


class Owl(Bird):
    """Two tables away from the one with the column."""

    __tablename__ = "n_owl"
    number: Mapped[int] = mapped_column("id", ForeignKey("n_bird.id"), primary_key=True)
    tune: Mapped[str | None] = mapped_column(String(10))
    __mapper_args__ = {"polymorphic_identity": "owl"}  # noqa: RUF012


OWL: Any = Owl.__table__


@pytest.fixture
def owls(byok: Byok, engine: Engine) -> Engine:
    """The engine, with an owl of each tenant."""
    Base.metadata.create_all(engine)
    for number, tenant in enumerate(("t1", "t2"), 1):
        with byok.session(tenant, engine) as session:
            session.add(Owl(id=number, number=number, org=tenant, tune="hoo"))
            session.commit()
    return engine


def tunes(engine: Engine) -> dict[int, str]:
    with engine.connect() as connection:
        return {row.id: row.tune for row in connection.execute(text("SELECT id, tune FROM n_owl"))}


def _copied(engine: Engine) -> Table:
    """With all tables beside it, which makes a model of its own of its MetaData."""
    copies = MetaData()
    for each in Base.metadata.sorted_tables:
        each.to_metadata(copies)
    return copies.tables["n_owl"]


OBJECTS: dict[str, Callable[[Engine], Any]] = {
    "table()": lambda engine: table("n_owl", column("id"), column("tune")),
    "table() without its key": lambda engine: table("n_owl", column("tune")),
    "reflected": lambda engine: Table("n_owl", MetaData(), autoload_with=engine),
    "a copy": lambda engine: OWL.to_metadata(MetaData()),
    "a copy of all": _copied,
    "an alias": lambda engine: OWL.alias("other"),
    "an alias of table()": lambda engine: table("n_owl", column("id"), column("tune")).alias("other"),
    "by the default schema": lambda engine: table(
        "n_owl", column("id"), column("tune"), schema=engine.dialect.default_schema_name
    ),
    "a Table by the default schema": lambda engine: Table(
        "n_owl",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("tune", String(10)),
        schema=engine.dialect.default_schema_name,
    ),
    "keyed": lambda engine: Table(
        "n_owl",
        MetaData(),
        Column("id", Integer, key="k", primary_key=True),
        Column("tune", String(10), key="c"),
    ),
}


def _tune(owl: Any) -> Any:
    return next(each for each in owl.c if each.name == "tune")


@pytest.mark.parametrize("kind", OBJECTS)
def test_the_table_of_a_subclass_is_known_by_its_name(byok: Byok, owls: Engine, kind: str) -> None:
    """An UPDATE or DELETE through another object of its name would reach all tenants' rows."""
    owl = OBJECTS[kind](owls)
    is_alias = kind.startswith("an alias")
    with byok.session("t1", owls) as session:
        changed: Any = session.execute(update(owl).values({_tune(owl): "own"}))
        assert changed.rowcount == 1
        session.commit()
        assert tunes(owls) == {1: "own", 2: "hoo"}
        if not is_alias:
            assert session.execute(delete(owl)).rowcount == 1  # type: ignore[attr-defined]
        session.commit()
    with Session(owls) as session:
        for write in (update(owl).values({_tune(owl): "x"}), delete(owl)):
            with pytest.raises(NoTenantError):
                session.execute(write)
    assert tunes(owls) == ({1: "own", 2: "hoo"} if is_alias else {2: "hoo"})
    with byok.sealed(**WHO), Session(owls) as session:
        changed = session.execute(update(owl).values({_tune(owl): "sealed"}))
        assert changed.rowcount == (2 if is_alias else 1)


def upsert_of(engine: Engine, owl: Any) -> Any:
    module: Any = {"postgresql": postgresql, "sqlite": sqlite}.get(engine.dialect.name, mysql)
    upsert = module.insert(owl).values(id=2, tune="taken")
    if module is mysql:
        return upsert.on_duplicate_key_update(tune="taken")
    return upsert.on_conflict_do_update(index_elements=["id"], set_={"tune": "taken"})


@pytest.mark.parametrize("kind", ["table()", "reflected", "a copy", "a copy of all"])
def test_an_upsert_of_a_subclass_by_another_object_is_refused(byok: Byok, owls: Engine, kind: str) -> None:
    """Nothing could hold it to the tenant's rows."""
    owl = OBJECTS[kind](owls)
    upsert = upsert_of(owls, owl)
    with byok.session("t1", owls) as session, pytest.raises(UnsupportedQueryError, match="upsert"):
        session.execute(upsert)
    with Session(owls) as session, pytest.raises(NoTenantError):
        session.execute(upsert)
    assert tunes(owls) == {1: "hoo", 2: "hoo"}


@pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("kind", ["table()", "reflected", "a copy", "a copy of all"])
def test_within_another_statement_a_subclass_is_refused_by_another_object(
    byok: Byok, owls: Engine, kind: str
) -> None:
    """In a CTE it cannot be held, by whatever object its table is named."""
    owl = OBJECTS[kind](owls)
    gone = select(delete(owl).returning(owl.c.id).cte())
    with byok.session("t1", owls) as session, pytest.raises(UnsupportedQueryError, match="of its own"):
        session.execute(gone)
    with Session(owls) as session, pytest.raises(NoTenantError):
        session.execute(gone)
    assert tunes(owls) == {1: "hoo", 2: "hoo"}


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("kind", ["table()", "reflected", "a copy", "a copy of all"])
def test_replace_of_a_subclass_by_another_object_is_refused(byok: Byok, owls: Engine, kind: str) -> None:
    """It would delete another tenant's row of the same key."""
    replaced = insert(OBJECTS[kind](owls)).prefix_with("OR REPLACE").values(id=2)
    with byok.session("t1", owls) as session, pytest.raises(UnsupportedQueryError, match="REPLACE"):
        session.execute(replaced)
    assert tunes(owls) == {1: "hoo", 2: "hoo"}


@pytest.mark.parametrize("options", [{"name": "n_moved"}, {"schema": "n_elsewhere"}])
def test_a_copy_of_a_subclass_that_was_moved_is_refused(
    byok: Byok, owls: Engine, options: dict[str, Any]
) -> None:
    """Its rows belong to tenants, and the table that says whose they are may be anywhere."""
    moved = OWL.to_metadata(MetaData(), **options)
    upsert = upsert_of(owls, moved)
    with byok.session("t1", owls) as session:
        for write in (update(moved).values(tune="x"), delete(moved), upsert):
            with pytest.raises(UnsupportedQueryError, match=r"n_moved|n_elsewhere"):
                session.execute(write)
    with Session(owls) as session, pytest.raises(NoTenantError):
        session.execute(delete(moved))


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_a_subclass_that_replaces_by_itself_is_refused(byok: Byok, engine: Engine) -> None:
    """SQLite's ON CONFLICT REPLACE in the subclass's own table deletes another tenant's row there."""
    key = Column("id", Integer, ForeignKey("n_beast.id"), primary_key=True)
    key.dialect_options["sqlite"]["on_conflict_primary_key"] = "REPLACE"

    class Fish(Beast):
        __table__ = Table("n_fish", Base.metadata, key)
        number = __table__.c.id
        __mapper_args__ = {"polymorphic_identity": "fish"}  # noqa: RUF012

    try:
        with byok.session("t1", engine) as session, pytest.raises(UnsupportedQueryError, match="REPLACE"):
            session.execute(insert(Fish.__table__).values(id=1))
    finally:
        Base.metadata.remove(Fish.__table__)  # type: ignore[arg-type]


# -- schemas -----------------------------------------------------------------------------------------------------------


class Placed(DeclarativeBase):
    pass


class Cage(Placed):
    """In a schema that is translated to the real one."""

    __tablename__ = "n_cage"
    __table_args__ = {"schema": "n_ten"}  # noqa: RUF012
    __byok_tenant__ = "org"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(20))
    size: Mapped[int | None]
    kind: Mapped[str] = mapped_column(String(10), default="cage")
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "cage"}  # noqa: RUF012


class Aviary(Cage):
    __tablename__ = "n_aviary"
    __table_args__ = {"schema": "n_ten"}  # noqa: RUF012
    number: Mapped[int] = mapped_column("id", ForeignKey("n_ten.n_cage.id"), primary_key=True)
    size_of_net: Mapped[int | None] = mapped_column("net")
    __mapper_args__ = {"polymorphic_identity": "aviary"}  # noqa: RUF012


def _in(metadata: MetaData, name: str, schema: str | None) -> Table:
    value = Column("size" if name == "n_cage" else "net", Integer)
    return Table(
        name, metadata, Column("id", Integer, primary_key=True), value, schema=schema, extend_existing=True
    )


REAL: dict[str, Callable[[str, str | None, Engine], Any]] = {
    "table()": lambda name, schema, engine: table(
        name, column("id"), column("size"), column("net"), schema=schema
    ),
    "a Table": lambda name, schema, engine: _in(MetaData(), name, schema),
    "reflected": lambda name, schema, engine: Table(name, MetaData(), autoload_with=engine, schema=schema),
    "in the model's MetaData": lambda name, schema, engine: _in(Placed.metadata, name, schema),
}


@pytest.mark.parametrize("name", ["n_cage", "n_aviary"])
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("given", [True, False])
def test_a_translated_schema_and_the_real_one_are_one(
    byok: Byok, engine: Engine, name: str, kind: str, given: bool
) -> None:
    """Under its real schema, or under none, the model's table is still the tenants'."""
    real = engine.dialect.default_schema_name
    mapped = engine.execution_options(schema_translate_map={"n_ten": real if given else None})
    Placed.metadata.create_all(mapped)
    for number, tenant in enumerate(("t1", "t2"), 1):
        with byok.session(tenant, mapped) as session:
            session.add(Aviary(id=number, number=number, org=tenant, size=1, size_of_net=1))
            session.commit()
    value = "size" if name == "n_cage" else "net"
    for schema in (real, None):
        other = REAL[kind](name, schema, engine)
        try:
            with byok.session("t1", mapped) as session:
                changed: Any = session.execute(update(other).values({other.c[value]: 2}))
                assert changed.rowcount == 1
                if name == "n_aviary":
                    assert session.execute(delete(other)).rowcount == 1  # type: ignore[attr-defined]
                session.rollback()
            with Session(mapped) as session, pytest.raises(NoTenantError):
                session.execute(delete(other))
        finally:
            if isinstance(other, Table):
                other.metadata.remove(other)


def test_a_statement_is_looked_at_by_its_own_schemas(byok: Byok, engine: Engine) -> None:
    """SQLAlchemy compiles a statement once for all maps: what was found with one must not go for another."""
    real = engine.dialect.default_schema_name

    class Other(DeclarativeBase):
        pass

    class Chest(Other):
        __tablename__ = "n_chest"
        __table_args__ = {"schema": "n_ten"}  # noqa: RUF012
        id: Mapped[int] = mapped_column(primary_key=True)
        owner: Mapped[str] = mapped_column(Encrypted(String(20)))

    light = table("n_chest", column("id"), column("owner"), schema=real)
    mapped = engine.execution_options(schema_translate_map={"n_ten": real})
    Other.metadata.create_all(mapped)
    # the second table is another one by the first map, and by the second the model's
    for translated in ({"n_none": "n_nowhere"}, {"n_ten": real}):
        with (
            byok.session("t1", engine.execution_options(schema_translate_map=translated)) as session,
            pytest.raises(UnsupportedQueryError),
        ):
            session.connection().execute(insert(light).values(id=1, owner="in the clear"))


@contextmanager
def elsewhere(engine: Engine) -> Iterator[tuple[Connection, str]]:
    """A connection, and the name of another schema on it."""
    name = f"n_else_{uuid4().hex[:8]}"
    word = {"postgresql": "SCHEMA", "sqlite": "DATABASE ':memory:' AS"}.get(engine.dialect.name, "DATABASE")
    verb = "ATTACH" if engine.dialect.name == "sqlite" else "CREATE"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"{verb} {word} {name}")
        connection.commit()
        try:
            yield connection, name
        finally:
            connection.rollback()
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
                connection.commit()
            elif engine.dialect.name != "sqlite":
                connection.exec_driver_sql(f"DROP DATABASE {name}")


@pytest.mark.parametrize("tenant", [None, "t1"])
def test_a_table_of_another_schema_is_another_table(byok: Byok, owls: Engine, tenant: str | None) -> None:
    """It is not the tenants', whether it has such a column or not: it needs no tenant, and all its rows are reached."""
    with elsewhere(owls) as (connection, schema):
        owned = Table(
            "n_beast",
            MetaData(),
            Column("id", Integer, primary_key=True),
            Column("org", String(9)),
            schema=schema,
        )
        without = Table(
            "n_owl",
            MetaData(),
            Column("id", Integer, primary_key=True),
            Column("tune", String(9)),
            schema=schema,
        )
        light = table("n_beast", column("id"), column("org"), schema=schema)
        owned.create(connection)
        without.create(connection)
        scoped = connection.execution_options(byok_tenant=tenant) if tenant else connection
        scoped.execute(insert(owned), [{"id": 1, "org": "t1"}, {"id": 2, "org": "t2"}])
        scoped.execute(insert(light).values(id=3))
        scoped.execute(insert(without), [{"id": 1}, {"id": 2}])
        assert scoped.execute(update(owned).values(org="x")).rowcount == 3
        assert scoped.execute(update(without).values(tune="x")).rowcount == 2
        assert scoped.execute(delete(light)).rowcount == 3
        assert scoped.execute(delete(without)).rowcount == 2


@pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)
def test_a_name_in_capitals_and_a_temporary_table_are_others(byok: Byok, owls: Engine) -> None:
    """PostgreSQL keeps "N_beast" and n_beast, and pg_temp.n_beast, apart."""
    with owls.begin() as connection:
        capital = Table("N_beast", MetaData(), Column("id", Integer, primary_key=True))
        capital.create(connection)
        connection.exec_driver_sql("CREATE TEMPORARY TABLE n_owl (id integer)")
        connection.execute(insert(capital).values(id=1))
        assert connection.execute(update(table("N_beast", column("id"))).values(id=2)).rowcount == 1
        temporary = table("n_owl", column("id"), schema="pg_temp")
        connection.execute(insert(temporary).values(id=1))
        assert connection.execute(delete(temporary)).rowcount == 1
        connection.exec_driver_sql("DROP TABLE pg_temp.n_owl")
    folded = table(quoted_name("N_BEAST", quote=False), column("id"))
    with Session(owls) as session, pytest.raises(NoTenantError):
        session.execute(update(folded).values(id=1))


@pytest.mark.parametrize("quote", [True, None])
def test_a_quoted_name_is_known_too(byok: Byok, engine: Engine, quote: bool | None) -> None:
    """SQLAlchemy's quoted_name does not change its case when it is asked to."""
    name: Any = quoted_name("N_Vault", quote=quote)
    vault = Table(
        name,
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("org", String(9)),
        Column("code", Encrypted(String(9))),
        info={"byok_tenant": "org"},
    )
    vault.create(engine)
    light = table("N_Vault", column("id"), column("code"))
    with Session(engine) as session, pytest.raises(NoTenantError):
        session.execute(delete(light))
    with byok.session("t1", engine) as session, pytest.raises(UnsupportedQueryError):
        session.execute(update(light).values(code="in the clear"))


def rendered(engine: Engine, name: str) -> list[Any]:
    """Names that SQLAlchemy renders as they stand, all of them of one table."""
    schema = engine.dialect.default_schema_name
    quoted = engine.dialect.identifier_preparer.quote_identifier(name)
    mysql_ = engine.dialect.name in ("mysql", "mariadb")
    names = [
        f"{schema}.{name}",
        quoted,
        f"{schema} . {quoted}",
        f" {name} ",
        f"/* x */ {name}",
        f"{name} -- x\n",
    ]
    names += [f"[{name}]", f"'{name}'"] if engine.dialect.name == "sqlite" else []
    return [quoted_name(each, quote=False) for each in [*names, *([f"`{name}`"] if mysql_ else [])]]


def test_a_name_that_is_rendered_as_it_stands_is_read_as_the_database_does(byok: Byok, owls: Engine) -> None:
    """With quote=False a name may hold a schema, quotes and comments, and is the tenant's table all the same."""
    for name in rendered(owls, "n_beast"):
        light = table(name, column("id"), column("org"), column("kind"))
        other = Table(name, MetaData(), Column("id", Integer, primary_key=True), Column("org", String(20)))
        for each in (light, other):
            with Session(owls) as session, pytest.raises(NoTenantError):
                session.execute(update(each).values(id=9))
            with byok.session("t1", owls) as session, pytest.raises(TenantMismatchError):
                session.execute(insert(each).values(id=9, org="t2"))
        with byok.session("t1", owls) as session:
            assert session.execute(update(light).values(kind=light.c.kind)).rowcount == 1  # type: ignore[attr-defined]
    schema: Any = quoted_name(
        owls.dialect.identifier_preparer.quote_identifier(owls.dialect.default_schema_name or ""), quote=False
    )
    for where in ("n_beast, n_owl", "n_owl, n_beast"):
        both = table(quoted_name(where, quote=False), column("id"))
        with byok.session("t1", owls) as session, pytest.raises(UnsupportedQueryError, match="quote=False"):
            session.execute(update(both).values(id=9))
    with Session(owls) as session, pytest.raises(NoTenantError):
        session.execute(update(table("n_beast", column("id"), schema=schema)).values(id=9))


def test_a_column_that_is_rendered_as_it_stands_is_read_so_too(byok: Byok, owls: Engine) -> None:
    """Quotes and text in the place of a column's name leave it the tenant's column."""
    for name in rendered(owls, "org")[1:]:
        if str(name).startswith(str(owls.dialect.default_schema_name)):
            continue
        for named in (column(name), literal_column(str(name))):
            light = table("n_beast", column("id"), named)
            for write in (update(light).values({name: "t2"}), insert(light).values({"id": 9, name: "t2"})):
                with byok.session("t1", owls) as session, pytest.raises(TenantMismatchError):
                    session.execute(write)
    several: Any = quoted_name("kind = 'x', org", quote=False)
    light = table("n_beast", column("id"), column(several))
    with byok.session("t1", owls) as session, pytest.raises(UnsupportedQueryError, match="quote=False"):
        session.execute(update(light).values({several: "t2"}))


@pytest.mark.parametrize("info", [{}, {"byok_tenant": "org"}])
def test_a_table_is_not_declared_by_such_a_name(info: dict[str, str]) -> None:
    """Nothing could be known by it."""
    code: Any = String(9) if info else Encrypted(String(9), column_id="vault.code")
    name = quoted_name("public.vault", quote=False)
    with pytest.raises(DeclarationError, match="schema="):
        Table(name, MetaData(), Column("org", String(9)), Column("code", code), info=info)


@pytest.mark.parametrize("sync_url", ["sqlite", "mariadb"], indirect=True)
def test_a_column_in_capitals_is_the_same_column(byok: Byok, owls: Engine) -> None:
    """Where case does not count, ORG says whose the row is as org does."""
    light = table("n_beast", column("ID"), column("ORG"))
    with byok.session("t1", owls) as session:
        for write in (update(light).values(ORG="t2"), insert(light).values(ID=9, ORG="t2")):
            with pytest.raises(TenantMismatchError):
                session.execute(write)
        assert session.execute(update(light).values(ORG="t1")).rowcount == 1  # type: ignore[attr-defined]
        session.commit()
        found = session.execute(select(Beast.id, Beast.org).order_by(Beast.id)).all()
    assert [tuple(row) for row in found] == [(1, "t1"), (2, "t2")]
