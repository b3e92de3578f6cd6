"""Whose a row is: by which value, however it comes into a statement and however the database compares it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import (
    CHAR,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Uuid,
    bindparam,
    delete,
    event,
    func,
    insert,
    select,
    table,
    update,
)
from sqlalchemy import column as light_column
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import Byok, LocalKms, TenantMismatchError, UnsupportedQueryError

NAMES: list[str] = []
"""What the default and the onupdate give, one after the other; then t1."""


def name() -> str:
    return NAMES.pop(0) if NAMES else "t1"


class Base(DeclarativeBase):
    pass


class Ticket(Base):
    __tablename__ = "r_ticket"
    __byok_tenant__ = "org"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column("org_id", String(20), default=name, onupdate=name)
    note: Mapped[str | None] = mapped_column(String(20))


class Desk(Base):
    """Of no tenant."""

    __tablename__ = "r_desk"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(20))


T: Any = Ticket.__table__
D: Any = Desk.__table__


@pytest.fixture
def tickets(byok: Byok, engine: Engine) -> Iterator[Engine]:
    """The engine, with a ticket of t1."""
    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([Ticket(id=1, org="t1"), Desk(id=1)])
        session.commit()
    yield engine
    NAMES.clear()


def rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(T.c.id, T.c.org_id).order_by(T.c.id))]


# -- what a function gives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Ticket, T], ids=["ORM", "Core"])
@pytest.mark.parametrize(
    "given",
    [
        [{"id": 2}, {"id": 3}],
        [{"id": 2}, {"id": 3}, {"id": 4, "org_id": "t1"}, {"id": 5}],
        [{"id": 2, "org_id": "t1"}, {"id": 3}],
        [{"id": 2, "org_id": "t1"}, {"id": 3, "org_id": "t1"}, {"id": 4}],
    ],
    ids=["first", "fourth", "second", "third"],
)
def test_a_default_is_checked_in_each_row_of_values(
    byok: Byok, tickets: Engine, target: Any, given: list[dict[str, Any]]
) -> None:
    """In one VALUES of several rows a later row's default has a parameter of its own."""
    if target is Ticket:
        given = [{("org" if key == "org_id" else key): value for key, value in row.items()} for row in given]
    missing = sum(len(row) == 1 for row in given)
    for last in range(missing):
        NAMES[:] = ["t1"] * last + ["t2"]
        with byok.session("t1", tickets) as session, pytest.raises(TenantMismatchError, match="'t2'"):
            session.execute(insert(target).values(given))
    NAMES.clear()
    with byok.session("t1", tickets) as session:
        session.execute(insert(target).values(given))
        session.commit()
    assert rows(tickets) == [(number, "t1") for number in range(1, len(given) + 2)]


def test_a_default_is_checked_in_each_set_of_parameters(byok: Byok, tickets: Engine) -> None:
    """The same where rows are given as parameters, to Core or in a flush, and of INSERT FROM SELECT."""
    for given in ([{"id": 2}, {"id": 3}], [{"id": 2}]):
        NAMES[:] = ["t1"] * (len(given) - 1) + ["t2"]
        with byok.session("t1", tickets) as session, pytest.raises(TenantMismatchError):
            session.connection().execute(insert(T), given)
        NAMES[:] = ["t1"] * (len(given) - 1) + ["t2"]
        with byok.session("t1", tickets) as session:
            session.add_all([Ticket(**row) for row in given])
            with pytest.raises(TenantMismatchError):
                session.flush()
    NAMES[:] = ["t2"]
    with byok.session("t1", tickets) as session, pytest.raises(TenantMismatchError):
        session.execute(insert(T).from_select(["id"], select(D.c.id + 10)))
    assert rows(tickets) == [(1, "t1")]


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
def test_an_onupdate_of_another_table_is_checked(byok: Byok, tickets: Engine) -> None:
    """MySQL's UPDATE of several tables has the onupdate of each, under a parameter of its table's name."""
    both = update(D).where(D.c.id == T.c.id).values({D.c.note: "x", T.c.note: "x"})
    NAMES[:] = ["t2"]
    with byok.session("t1", tickets) as session, pytest.raises(TenantMismatchError, match="'t2'"):
        session.execute(both)
    with byok.session("t1", tickets) as session:
        session.execute(both)
        session.commit()
    assert rows(tickets) == [(1, "t1")]


def _named(**options: Any) -> Table:
    key = Column("id", Integer, primary_key=True)
    return Table(
        "r_ticket", MetaData(), key, Column("org_id", String(20), **options), Column("note", String(20))
    )


def test_what_another_table_of_the_name_gives_is_checked(byok: Byok, tickets: Engine) -> None:
    """Its default and onupdate are its own, and were not looked at where it was declared."""
    other = _named(default=name, onupdate=name)
    unknown = _named(default=func.lower("T2"), onupdate=func.lower("T2"))
    for write in (
        insert(other).values(id=2),
        insert(other).values([{"id": 2, "org_id": "t1"}, {"id": 3}]),
        update(other).values(note="x"),
        update(other).values(note=bindparam("n", "x")),
    ):
        NAMES[:] = ["t2"]
        with byok.session("t1", tickets) as session, pytest.raises(TenantMismatchError, match="'t2'"):
            session.execute(write)
    for write in (insert(unknown).values(id=2), update(unknown).values(note="x")):
        with byok.session("t1", tickets) as session, pytest.raises(UnsupportedQueryError, match="by name"):
            session.execute(write)
    NAMES.clear()
    with byok.session("t1", tickets) as session:
        session.execute(insert(other).values(id=2))
        session.execute(update(unknown).values(note="x", org_id="t1"))
        session.commit()
    assert rows(tickets) == [(1, "t1"), (2, "t1")]
    with Session(tickets) as session:
        session.execute(update(D).values(note="x"))


# -- names that a column does not keep ---------------------------------------------------------------------------------

ID = str(uuid4()).replace("1", "a")
SPELLED: dict[str, tuple[Any, Any, str, list[str]]] = {
    "Integer": (Integer(), 7, "7", ["07", "+7", " 7", "7 ", "\uff17", "0_7", "-7 ", "7.0", "None"]),
    "zero": (Integer(), 0, "0", ["-0", "00", "+0"]),
    "Uuid": (
        Uuid(),
        UUID(ID),
        ID,
        [ID.upper(), ID.replace("-", ""), f"{{{ID}}}", f"urn:uuid:{ID}", f"{{{ID.upper()}}}"],
    ),
    "Uuid as text": (Uuid(as_uuid=False), ID, ID, [ID.upper(), ID.replace("-", ""), f"{{{ID}}}"]),
    "CHAR": (CHAR(40), "acme", "acme", ["acme ", "acme  "]),
    "String as CHAR": (
        String(40).with_variant(CHAR(40), "postgresql", "mariadb", "mysql", "sqlite"),
        "acme",
        "acme",
        ["acme "],
    ),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_a_name_that_the_column_does_not_keep_is_refused(
    byok: Byok, local_kms: LocalKms, engine: Engine, kind: str
) -> None:
    """Two tenants whose names become one value would share their rows, in whichever statement."""
    type_, value, tenant, others = SPELLED[kind]
    visit = Table(
        "r_visit",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("org", type_),
        info={"byok_tenant": "org"},
    )

    class Visits(DeclarativeBase):
        pass

    class Visit(Visits):
        __table__ = visit

    visit.create(engine)
    byok.onboard(tenant, local_kms)
    with byok.tenant(tenant), engine.begin() as connection:
        connection.execute(insert(visit), [{"id": 1, "org": value}])
        assert connection.execute(update(visit).values(id=1)).rowcount == 1
    for other in others:
        theirs = engine.execution_options(byok_tenant=other)
        for write in (
            update(visit).values(id=2),
            delete(visit),
            update(visit).values(org=other),
            insert(visit).values(id=2, org=other),
            insert(visit).values([{"id": 2, "org": other}]),
        ):
            with theirs.begin() as connection, pytest.raises(TenantMismatchError) as raised:
                connection.execute(write)
            assert raised.value.tenant == other
        with Session(theirs) as session:
            session.add(Visit(id=3, org=other))
            with pytest.raises(TenantMismatchError):
                session.flush()
    with byok.tenant(tenant), engine.begin() as connection:
        ((id_, kept),) = connection.execute(select(visit.c.id, visit.c.org))
        assert (id_, kept.strip() if isinstance(kept, str) else kept) == (1, value)
        assert connection.execute(delete(visit)).rowcount == 1


# -- names that a collation takes for one ------------------------------------------------------------------------------

ALIKE = ("acme", "ACME", "acm\u00e9", "acme ")
BOTH_CASES = ("acme", "ACME")
COLLATED: dict[str, tuple[str, str, Any, tuple[str, ...]]] = {
    "sqlite NOCASE": ("sqlite", "VARCHAR(40) COLLATE NOCASE", String(40), BOTH_CASES),
    "sqlite NOCASE, declared": ("sqlite", "VARCHAR(40) COLLATE NOCASE", String(40, "NOCASE"), BOTH_CASES),
    "sqlite RTRIM": ("sqlite", "VARCHAR(40) COLLATE RTRIM", String(40), ("acme", "acme ")),
    "postgresql citext": ("postgresql", "citext", String(40), BOTH_CASES),
    "postgresql citext, declared": ("postgresql", "citext", postgresql.CITEXT(), BOTH_CASES),
    "postgresql nondeterministic": ("postgresql", "varchar(40) COLLATE r_alike", String(40), ALIKE[:3]),
    "mariadb": ("mariadb", "VARCHAR(40)", String(40), ALIKE),
    "mariadb Text": ("mariadb", "TEXT", mysql.TEXT(), ALIKE),
    "mariadb binary": ("mariadb", "VARCHAR(40) COLLATE utf8mb4_bin", String(40), ("acme", "acme ")),
    "mariadb latin1": ("mariadb", "VARCHAR(40) CHARACTER SET latin1", String(40), ALIKE),
}


def _extended(engine: Engine) -> None:
    if engine.dialect.name != "postgresql":
        return
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS citext")
            connection.exec_driver_sql(
                "CREATE COLLATION IF NOT EXISTS r_alike "
                "(provider = icu, locale = 'und-u-ks-level1', deterministic = false)"
            )
    except DBAPIError:
        pytest.skip("this server has neither citext nor ICU")


@pytest.fixture
def collated(byok: Byok, engine: Engine, request: pytest.FixtureRequest) -> tuple[Table, tuple[str, ...]]:
    """A table with a row of each tenant, the first of which is 0."""
    _, stored, type_, tenants = COLLATED[request.param]
    _extended(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE r_alike (id INTEGER PRIMARY KEY, org {stored} NOT NULL, note VARCHAR(20))"
        )
    columns = Column("id", Integer, primary_key=True), Column("org", type_), Column("note", String(20))
    alike = Table("r_alike", MetaData(), *columns, info={"byok_tenant": "org"})
    for number, tenant in enumerate(tenants):
        with engine.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert(alike).values(id=number, org=tenant, note="old"))
    return alike, tenants


def _notes(engine: Engine) -> dict[int, str]:
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT id, note FROM r_alike ORDER BY id")
        return {row.id: row.note for row in found}


def collations(*but: str) -> pytest.MarkDecorator:
    """Each kind on its own database."""
    kinds = [(one[0], kind) for kind, one in COLLATED.items() if kind not in but]
    return pytest.mark.parametrize(
        ("sync_url", "collated"), kinds, indirect=True, ids=[kind for _, kind in kinds]
    )


@collations()
def test_what_a_collation_takes_for_equal_is_another_tenant(
    engine: Engine, collated: tuple[Table, tuple[str, ...]]
) -> None:
    """A tenant reaches the rows of its own name, and not those of a name in other case or accents."""
    alike, tenants = collated
    light = table("r_alike", light_column("id"), light_column("note"))
    make: Any = {"postgresql": postgresql, "sqlite": sqlite}.get(engine.dialect.name, mysql)
    for number, tenant in enumerate(tenants):
        scoped = engine.execution_options(byok_tenant=tenant)
        left = dict.fromkeys(range(len(tenants)), "old")
        with scoped.connect() as connection:
            for target in (alike, light, alike.alias("other")):
                assert connection.execute(update(target).values(note="new")).rowcount == 1
            connection.commit()
        assert _notes(engine) == {**left, number: "new"}
        given = [{"id": each, "org": tenant, "note": "upsert"} for each in left]
        upsert = make.insert(alike)
        if make is mysql:
            upsert = upsert.on_duplicate_key_update(note=upsert.inserted.note)
        else:
            upsert = upsert.on_conflict_do_update(index_elements=["id"], set_={"note": upsert.excluded.note})
        with scoped.begin() as connection:
            connection.execute(upsert, given)
        assert _notes(engine) == {**left, number: "upsert"}
        with scoped.connect() as connection:
            assert connection.execute(delete(alike)).rowcount == 1
        with scoped.begin() as connection:
            connection.execute(update(alike).values(note="old"))
    with engine.execution_options(byok_tenant=tenants[-1]).begin() as connection:
        assert connection.execute(delete(alike)).rowcount == 1
    assert set(_notes(engine)) == set(range(len(tenants) - 1))


@collations("postgresql citext")  # PostgreSQL uses none for a citext that is compared with VARCHAR
def test_an_index_on_the_column_is_still_used(
    engine: Engine, collated: tuple[Table, tuple[str, ...]]
) -> None:
    """The exact comparison alone would have the database read every tenant's rows."""
    alike, _ = collated
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.begin() as connection:
        length = "(40)" if isinstance(alike.c.org.type, mysql.TEXT) else ""
        connection.exec_driver_sql(f"CREATE INDEX r_alike_org ON r_alike (org{length})")
        many = [{"id": number, "org": f"other {number}"} for number in range(10, 2_000)]
        scoped = connection.execution_options(byok_sealed=True)
        scoped.execute(insert(alike), many)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE TABLE r_alike" if "maria" in engine.dialect.name else "ANALYZE")
    sent: list[Any] = []

    def keep(conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", keep)
    with engine.connect() as connection:
        scoped = connection.execution_options(byok_tenant="acme")
        for write in (update(alike).values(note="x"), delete(alike)):
            sent.clear()
            scoped.execute(write)
            statement, parameters = sent[0]
            plan = connection.exec_driver_sql(explain + statement, parameters).all()
            assert "r_alike_org" in str(plan), plan
