"""Whose a row is: by which value, however it comes into a statement and however the database compares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import (
    CHAR,
    Column,
    Engine,
    Enum,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    Uuid,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    lambda_stmt,
    literal,
    literal_column,
    null,
    or_,
    select,
    table,
    text,
    update,
)
from sqlalchemy import column as light_column
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, load_only, mapped_column

from sqla_byok import Byok, LocalKms, NoTenantError, TenantMismatchError, UnsupportedQueryError

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


# -- what is said twice ------------------------------------------------------------------------------------------------

B = bindparam
TWICE: dict[str, Callable[[str, str], tuple[Any, Any]]] = {
    "named parameter and key": lambda one, other: (
        insert(T).values(org_id=B("o")),
        [{"id": 50, "o": one, "org_id": other}],
    ),
    "in a later row": lambda one, other: (
        insert(T).values(org_id=B("o")),
        [{"id": 50, "o": "t1", "org_id": "t1"}, {"id": 51, "o": one, "org_id": other}],
    ),
    "literal and key": lambda one, other: (
        insert(T).values(org_id=literal(one)),
        [{"id": 50, "org_id": other}],
    ),
    "NULL and key": lambda one, other: (
        insert(T).values(org_id=null() if one != other else other),
        [{"id": 50, "org_id": other}],
    ),
    "ORM, named parameter and key": lambda one, other: (
        insert(Ticket).values(org=B("o")),
        [{"id": 50, "o": one, "org": other}],
    ),
    "several rows and a parameter": lambda one, other: (
        insert(T).values([{"id": 50, "org_id": B("o", other)}, {"id": 51, "org_id": other}]),
        {"o": one},
    ),
    "Column and string": lambda one, other: (
        insert(T).values({"id": 50, T.c.org_id: one, "org_id": other}),
        None,
    ),
    "string and Column": lambda one, other: (
        insert(T).values({"id": 50, "org_id": one, T.c.org_id: other}),
        None,
    ),
    "in one of several rows": lambda one, other: (
        insert(T).values([{"id": 50, "org_id": other}, {"id": 51, T.c.org_id: one, "org_id": other}]),
        None,
    ),
    "update, named parameter and key": lambda one, other: (
        update(T).where(T.c.id == 1).values(org_id=B("o")),
        {"o": one, "org_id": other},
    ),
    "update, Column and string": lambda one, other: (
        update(T).values({T.c.org_id: one, "org_id": other}),
        None,
    ),
}


@pytest.mark.parametrize("way", TWICE)
def test_neither_of_two_values_is_another_tenants(byok: Byok, tickets: Engine, way: str) -> None:
    """Which of them SQLAlchemy sends depends on how they were given."""
    for values in (("t2", "t1"), ("t1", "t2")):
        with byok.session("t1", tickets) as session, pytest.raises(TenantMismatchError):
            (session if "ORM" in way else session.connection()).execute(*TWICE[way](*values))
    assert rows(tickets) == [(1, "t1")]
    with byok.session("t1", tickets) as session:
        (session if "ORM" in way else session.connection()).execute(*TWICE[way]("t1", "t1"))
        session.commit()
    assert {org for _, org in rows(tickets)} == {"t1"}


@pytest.mark.parametrize("target", [T, Ticket], ids=["Core", "ORM"])
def test_an_expression_beside_a_parameter_is_refused(byok: Byok, tickets: Engine, target: Any) -> None:
    """It is what is sent, and only the database knows what it gives."""
    key = "org" if target is Ticket else "org_id"
    for unknown in (func.lower("T2"), literal_column("'t2'"), select(literal("t2")).scalar_subquery()):
        with byok.session("t1", tickets) as session, pytest.raises(UnsupportedQueryError, match="by name"):
            session.execute(insert(target).values({key: unknown}), [{"id": 50, key: "t1"}])
        with byok.session("t1", tickets) as session, pytest.raises(UnsupportedQueryError, match="by name"):
            session.connection().execute(update(T).values(org_id=unknown), {"org_id": "t1"})
    assert rows(tickets) == [(1, "t1")]


def test_no_parameter_takes_the_place_of_a_value_that_was_checked(byok: Byok, tickets: Engine) -> None:
    """SQLAlchemy names what a statement has itself, and would send a parameter of that name in its place."""
    with byok.session("t2", tickets) as session:
        session.add(Ticket(id=2, org="t2"))
        session.commit()
    upsert: Any = {"postgresql": postgresql, "sqlite": sqlite}.get(tickets.dialect.name, mysql).insert(T)
    upsert = upsert.values(id=1, org_id="t1")
    on: Any = {"org_id": "t1"}
    if tickets.dialect.name in ("mysql", "mariadb"):
        upsert = upsert.on_duplicate_key_update(on)
    else:
        upsert = upsert.on_conflict_do_update(index_elements=["id"], set_=on)
    two = insert(T).values([{"id": 50, "org_id": "t1"}, {"id": 51, "org_id": "t1"}])
    for write, given in (
        (update(T).values(note="x", org_id="t1"), ["param_1", "param_2", "param_3", "org_id_1"]),
        (delete(T), ["param_1", "param_2"]),
        (two, ["org_id_m0"]),
        (two, ["org_id_m1"]),
        (upsert, ["param_1", "param_2", "param_3"]),
    ):
        with byok.session("t1", tickets) as session, pytest.raises(UnsupportedQueryError, match="parameter"):
            session.connection().execute(write, dict.fromkeys(given, "t2"))
    with byok.session("t1", tickets) as session, pytest.raises(UnsupportedQueryError, match="parameter"):
        session.connection().execute(update(T).values(note=B("n")), [{"n": "x"}, {"n": "x", "param_1": "t2"}])
    assert rows(tickets) == [(1, "t1"), (2, "t2")]
    with byok.session("t1", tickets) as session:
        session.connection().execute(update(T).where(T.c.id == B("b")), {"b": 1, "note": "x", "other": 1})
        session.commit()


# -- what an upsert names ----------------------------------------------------------------------------------------------

SHELF = Table(
    "r_shelf",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("org_id", String(20), key="org"),
    Column("note", String(20)),
    info={"byok_tenant": "org"},
)


def _keyed(name: str, key: str, **options: Any) -> Any:
    made: Any = light_column(name, **options)
    made.key = key
    return made


NAMED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "name": lambda: ("org_id", "t2"),
    "name as a column": lambda: (light_column("org_id"), "t2"),
    "capitals": lambda: ("ORG_ID", "t2"),
    "capitals as a column": lambda: (light_column("ORG_ID"), "t2"),
    "capitals under another's key": lambda: (_keyed("ORG_ID", "note"), "t2"),
    "text under another's key": lambda: (_keyed("org_id", "note", is_literal=True), "t2"),
    "text for a value": lambda: ("org", _keyed("'t2'", "org", is_literal=True)),
    "another column for a value": lambda: ("org", _keyed("note", "org")),
}


@pytest.mark.filterwarnings("ignore:Additional column names")  # SQLAlchemy's, of the names that are refused
@pytest.mark.parametrize("how", NAMED)
def test_an_upsert_names_the_column_by_its_key(byok: Byok, engine: Engine, how: str) -> None:
    """SQLAlchemy writes other names as they are, which are the column to the database."""
    SHELF.create(engine)
    light = table("r_shelf", light_column("id"), light_column("org_id"), light_column("ORG_ID"))
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(insert(SHELF).values(id=1, org="t1", note="t2"))
    key, value = NAMED[how]()
    make: Any = {"postgresql": postgresql, "sqlite": sqlite}.get(engine.dialect.name, mysql)
    for set_ in ({key: value}, {"note": "x", key: value}):
        upsert = make.insert(SHELF).values(id=1, org="t1")
        if make is mysql:
            upsert = upsert.on_duplicate_key_update(set_)
        else:
            upsert = upsert.on_conflict_do_update(index_elements=["id"], set_=set_)
        with byok.tenant("t1"), engine.begin() as connection, pytest.raises(UnsupportedQueryError):
            connection.execute(upsert)
    if make is not postgresql:  # where they are two columns
        with (
            byok.tenant("t1"),
            engine.begin() as connection,
            pytest.raises(UnsupportedQueryError, match="twice"),
        ):
            connection.execute(update(light).values({"org_id": "t1", "ORG_ID": "t2"}))
    with byok.tenant("t1"), engine.begin() as connection, pytest.raises(TenantMismatchError):
        connection.execute(update(SHELF).ordered_values((SHELF.c.org, "t2"), ("org", "t1")))
    with engine.connect() as connection:
        assert connection.execute(select(SHELF.c.org, SHELF.c.note)).all() == [("t1", "t2")]


# -- names that a column does not keep ---------------------------------------------------------------------------------

ID = str(uuid4()).replace("1", "a")


class Lowered(TypeDecorator[str]):
    impl = String(40)
    cache_ok = True
    python_type = str

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return value if value is None else value.lower()


class Numbered(TypeDecorator[int]):
    """A number that is stored as text, and comes back."""

    impl = String(40)
    cache_ok = True
    python_type = int

    def process_bind_param(self, value: int | None, dialect: Any) -> str | None:
        return value if value is None else f"no. {value}"

    def process_result_value(self, value: str | None, dialect: Any) -> int | None:
        return value if value is None else int(value[4:])


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
    "a type that changes names": (Lowered(), "acme", "acme", ["ACME", "Acme"]),
    "such a type as a variant": (
        String(40).with_variant(Lowered(), "postgresql", "mariadb", "mysql", "sqlite"),
        "acme",
        "acme",
        ["ACME"],
    ),
    "a type that does not": (Numbered(), 7, "7", ["07", "seven"]),
    "Enum": (Enum("acme", "other", native_enum=False), "acme", "acme", ["ACME"]),
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


def test_a_value_is_sent_by_no_type_that_changes_it(byok: Byok, local_kms: LocalKms, tickets: Engine) -> None:
    """A type that is given with a value goes before the column's; another table of the name has its own."""
    byok.onboard("T1", local_kms)
    other = Table(
        "r_ticket", MetaData(), Column("id", Integer, primary_key=True), Column("org_id", Lowered())
    )
    typed = bindparam("o", type_=Lowered())
    for write, given in (
        (insert(T).values(id=50, org_id=literal("T1", Lowered())), None),
        (insert(T).values(id=50, org_id=typed), {"o": "T1"}),
        (insert(T).values([{"id": 50, "org_id": typed}]), {"o": "T1"}),
        (update(T).values(org_id=typed), {"o": "T1"}),
        (insert(other), {"id": 50, "org_id": "T1"}),
        (insert(other).values(id=50, org_id="T1"), None),
        (update(other).values(org_id="T1"), None),
    ):
        with byok.session("T1", tickets) as session, pytest.raises(TenantMismatchError, match="Lowered"):
            session.connection().execute(write, given)
        with byok.session("t1", tickets) as session:
            session.connection().execute(write, {"o": "t1"}) if given and "o" in given else None
    assert {org for _, org in rows(tickets)} == {"t1"}


def test_among_several_tenants_such_a_name_has_no_rows(
    byok: Byok, local_kms: LocalKms, engine: Engine
) -> None:
    """In across() those that the column can name are held to theirs, and the others reach nothing."""
    key = Column("id", Integer, primary_key=True)
    visit = Table("r_visit", MetaData(), key, Column("org", Integer), info={"byok_tenant": "org"})
    visit.create(engine)
    for tenant in ("7", "07", "8"):
        byok.onboard(tenant, local_kms)
    who = {"actor": "ada", "reason": "ticket 4711"}
    with byok.across(["7", "07", "t1", "8"], **who), engine.begin() as connection:
        connection.execute(insert(visit), [{"id": 1, "org": 7}, {"id": 2, "org": 8}])
        assert connection.execute(update(visit).values(id=visit.c.id + 10)).rowcount == 2
        with pytest.raises(TenantMismatchError):
            connection.execute(insert(visit).values(id=3, org="07"))
    with byok.across(["07", "t1"], **who), engine.begin() as connection, pytest.raises(TenantMismatchError):
        connection.execute(delete(visit))


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


# -- the session's objects ---------------------------------------------------------------------------------------------


class Cases(DeclarativeBase):
    pass


class Case(Cases):
    __tablename__ = "r_case"
    __byok_tenant__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column("org_id", String(20))
    note: Mapped[str | None] = mapped_column(String(20))
    kind: Mapped[str] = mapped_column(String(10), default="case")
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "case"}  # noqa: RUF012


class Urgent(Case):
    """In the same table."""

    __mapper_args__ = {"polymorphic_identity": "urgent"}  # noqa: RUF012


class Appeal(Case):
    """In a table of its own."""

    __tablename__ = "r_appeal"
    number: Mapped[int] = mapped_column("id", ForeignKey("r_case.id"), primary_key=True)
    court: Mapped[str | None] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_identity": "appeal"}  # noqa: RUF012


VALUE = {Case: "note", Urgent: "note", Appeal: "court"}
LAMBDAS: dict[Any, Callable[[], Any]] = {
    Case: lambda: update(Case).values(note="new"),
    Urgent: lambda: update(Urgent).values(note="new"),
    Appeal: lambda: update(Appeal).values(court="new"),
}
SYNC = ["auto", "evaluate", "fetch", None]


@pytest.fixture
def cases(byok: Byok, engine: Engine) -> Engine:
    """The engine, with a case of each kind of each tenant."""
    Cases.metadata.create_all(engine)
    for number, tenant in enumerate(("t1", "t2")):
        with byok.session(tenant, engine) as session:
            for place, cls in enumerate(VALUE, 1):
                session.add(cls(id=10 * number + place, owner=tenant, **{"note": "old", VALUE[cls]: "old"}))
            session.commit()
    return engine


def _options(sync: str | None) -> dict[str, Any]:
    return {} if sync is None else {"synchronize_session": sync}


def _changed(session: Session, cls: Any, way: str, sync: str | None) -> Any:
    """An UPDATE of all the objects of a class, in one of the ways that the ORM has."""
    value, options = {VALUE[cls]: "new"}, _options(sync)
    id_ = getattr(cls, "number", cls.id)  # of its own table
    if way == "query":
        return session.query(cls).update(value, synchronize_session=sync or "auto")  # type: ignore[arg-type]
    statement: Any = update(cls).values(**value)
    if way == "where":
        statement = statement.where(id_ >= 0, id_ < 99)
    elif way == "or":
        statement = statement.where(or_(id_ >= 0, id_ < 0))
    elif way == "lambda":
        statement = lambda_stmt(LAMBDAS[cls])
    elif way == "spoiled lambda":
        statement = lambda_stmt(LAMBDAS[cls]).spoil()
    return session.execute(statement, execution_options=options)


@pytest.mark.parametrize("cls", VALUE)
@pytest.mark.parametrize("sync", SYNC)
@pytest.mark.parametrize("way", ["plain", "where", "or", "query", "lambda", "spoiled lambda"])
def test_an_update_changes_no_other_tenants_objects(
    byok: Byok, cases: Engine, cls: Any, sync: str | None, way: str
) -> None:
    """What the ORM changes in the session is what the database has changed."""
    with byok.session("t1", cases) as session:
        found = session.scalars(select(cls).order_by(cls.id)).all()
        assert {one.owner for one in found} == {"t1", "t2"}
        _changed(session, cls, way, sync)
        seen = {one.id: (one.owner, getattr(one, VALUE[cls])) for one in found}
        assert not session.dirty
        session.expire_all()
        stored = {one.id: (one.owner, getattr(one, VALUE[cls])) for one in session.scalars(select(cls))}
        assert seen == stored
        assert set(seen.values()) == {("t1", "new"), ("t2", "old")}


@pytest.mark.filterwarnings("ignore:DELETE statement on table")
@pytest.mark.parametrize("cls", [Case, Urgent])
@pytest.mark.parametrize("sync", SYNC)
def test_a_delete_removes_no_other_tenants_objects(
    byok: Byok, cases: Engine, cls: Any, sync: str | None
) -> None:
    """An object whose row is there is still the session's."""
    with byok.sealed(actor="ada", reason="ticket 4711"), Session(cases) as session:
        session.execute(delete(Appeal))
        session.commit()
    with byok.session("t1", cases) as session:
        found = session.scalars(select(cls)).all()
        session.execute(delete(cls), execution_options=_options(sync))
        assert {one.owner for one in found if one in session} == {"t2"}
        assert session.scalars(select(cls.id)).all() == [one.id for one in found if one in session]


def test_an_object_whose_tenant_is_not_loaded_is_not_guessed_at(byok: Byok, cases: Engine) -> None:
    """SQLAlchemy's evaluation would change it; the rows are fetched instead, as they are for a criterion in text."""
    evaluate: Any = {"synchronize_session": "evaluate"}
    with byok.session("t1", cases) as session:
        partly = select(Case).options(load_only(Case.note)).where(Case.kind == "case").order_by(Case.id)
        mine, theirs = session.scalars(partly)
        with pytest.raises(InvalidRequestError, match="Could not evaluate"):
            session.execute(update(Case).values(note="x"), execution_options=evaluate)
        session.execute(update(Case).values(note="new"))
        assert (mine.note, theirs.note) == ("new", "old")
        assert (mine.owner, theirs.owner) == ("t1", "t2")
        session.execute(update(Case).where(text("id = 1 OR id = 11")).values(note="newer"))
        assert (mine.note, theirs.note) == ("newer", "old")
        session.execute(update(Case).values(note="newest"), execution_options=evaluate)
        assert (mine.note, theirs.note) == ("newest", "old")
        session.expire(theirs, ["owner"])
        session.expire(mine, ["owner"])
        session.execute(update(Case).values(note="last"))
        assert (mine.note, theirs.note) == ("last", "old")


@pytest.mark.parametrize("type_", [Integer(), Uuid()], ids=["Integer", "Uuid"])
@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch"])
def test_objects_of_tenants_that_are_numbers_or_uuids(
    byok: Byok, engine: Engine, type_: Any, sync: str
) -> None:
    """Their values are compared, and not their names."""

    class Numbers(DeclarativeBase):
        pass

    class Number(Numbers):
        __tablename__ = "r_number"
        __byok_tenant__ = "org"
        id: Mapped[int] = mapped_column(primary_key=True)
        org: Mapped[Any] = mapped_column(type_)
        note: Mapped[str | None] = mapped_column(String(20))

    Numbers.metadata.create_all(engine)
    both = (7, 8) if isinstance(type_, Integer) else (UUID(int=7), UUID(int=8))
    for number, tenant in enumerate(both, 1):
        with Session(engine.execution_options(byok_tenant=str(tenant))) as session:
            session.add(Number(id=number, org=tenant, note="old"))
            session.commit()
    with Session(engine.execution_options(byok_tenant=str(both[0]))) as session:
        for options in ([], [load_only(Number.note)]):
            if options and sync == "evaluate":
                continue
            session.expunge_all()
            found = session.scalars(select(Number).order_by(Number.id).options(*options)).all()
            session.execute(update(Number).values(note="new"), execution_options=_options(sync))
            assert [one.note for one in found] == ["new", "old"]


@pytest.mark.parametrize("sync", SYNC)
def test_several_tenants_and_none_synchronize_too(byok: Byok, cases: Engine, sync: str | None) -> None:
    """In across() the objects of those that are named are changed, in sealed() all, without a tenant none."""
    options = _options(sync)
    with Session(cases) as session:
        found = session.scalars(select(Case).where(Case.kind == "case").order_by(Case.id)).all()
        for blocks, notes in (
            (byok.across(["t1", "t2"], actor="ada", reason="ticket 4711"), ["new", "new"]),
            (byok.sealed(actor="ada", reason="ticket 4711"), ["new", "new"]),
        ):
            with blocks:
                session.execute(update(Case).values(note="new"), execution_options=options)
                assert [one.note for one in found] == notes
            session.rollback()
        with pytest.raises(NoTenantError):
            session.execute(update(Case).values(note="new"), execution_options=options)
        assert [one.note for one in found] == ["old", "old"]
        session.execute(update(Case).values(note="new"), execution_options={**options, "byok_tenant": "t2"})
        assert [one.note for one in found] == ["old", "new"]


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
@pytest.mark.parametrize("sync", SYNC)
def test_objects_are_compared_exactly_too(engine: Engine, byok: Byok, sync: str | None) -> None:
    """Where the objects are fetched by a SELECT, the collation has no say in it either."""
    Cases.metadata.create_all(engine)
    for number, tenant in enumerate(ALIKE, 1):
        with Session(engine.execution_options(byok_tenant=tenant)) as session:
            session.add(Case(id=number, owner=tenant, note="old"))
            session.commit()
    with Session(engine.execution_options(byok_tenant="ACME")) as session:
        found = session.scalars(select(Case).order_by(Case.id)).all()
        session.execute(update(Case).values(note="new"), execution_options=_options(sync))
        assert [one.note for one in found] == ["old", "new", "old", "old"]


def test_what_belongs_to_no_tenant_synchronizes_as_ever(byok: Byok, engine: Engine, tmp_path: Any) -> None:
    """A class without such a column needs no tenant; an engine without a Byok knows of none."""
    Cases.metadata.create_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        desk = Desk(id=1, note="old")
        session.add(desk)
        session.flush()
        session.execute(update(Desk).values(note="new"))
        assert desk.note == "new"
    plain = create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    Cases.metadata.create_all(plain)
    with Session(plain) as session:
        both = [Case(id=number, owner=f"t{number}", note="old") for number in (1, 2)]
        session.add_all(both)
        session.flush()
        session.execute(update(Case).values(note="new"))
        assert [one.note for one in both] == ["new", "new"]
        session.execute(delete(Case))
        assert not any(one in session for one in both)
    plain.dispose()


async def test_objects_are_left_alone_under_asyncio(abyok: Byok, async_engine: AsyncEngine) -> None:
    """The same where the session works in a greenlet."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Cases.metadata.create_all)
    for number, tenant in enumerate(("t1", "t2"), 1):
        async with abyok.asession(tenant, async_engine) as session:
            session.add(Case(id=number, owner=tenant, note="old"))
            await session.commit()
    async with abyok.asession("t1", async_engine, expire_on_commit=False) as session:
        found = (await session.scalars(select(Case).order_by(Case.id))).all()
        for sync in SYNC:
            await session.execute(update(Case).values(note=f"by {sync}"), execution_options=_options(sync))
            await session.commit()
            for one in found:
                await session.refresh(one)
            assert [one.note for one in found] == [f"by {sync}", "old"]


@pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)
def test_a_select_of_a_statement_that_sets_defaults(engine: Engine, byok: Byok) -> None:
    """DML in a CTE of a SELECT, with a default in Python, over a table that is nobody's: as without tenant tables."""
    metadata = MetaData()
    plain = Table(
        "tr_plain", metadata, Column("id", Integer, primary_key=True), Column("n", Integer, default=7)
    )
    Table(
        "tr_owned",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("org", String(9)),
        info={"byok_tenant": "org"},
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        inner = insert(plain).values(id=1).returning(plain.c.id).cte("made")
        assert connection.execute(select(inner.c.id)).all() == [(1,)]
        assert connection.execute(select(plain.c.n)).all() == [(7,)]
