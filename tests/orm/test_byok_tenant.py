"""__byok_tenant__: a row that is another tenant's is not written, whichever way it is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import (
    Column,
    Computed,
    Engine,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    and_,
    bindparam,
    column,
    delete,
    event,
    exists,
    func,
    insert,
    lambda_stmt,
    literal,
    literal_column,
    or_,
    select,
    table,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import ObjectNotExecutableError, SAWarning
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    load_only,
    make_transient_to_detached,
    mapped_column,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.expression import Executable

from sqla_byok import (
    Byok,
    DeclarationError,
    Encrypted,
    LocalKms,
    NoTenantError,
    TenantMismatchError,
    UnsupportedQueryError,
)

WHO = {"actor": "ada", "reason": "ticket 4711"}
turn = "t1"


class Base(DeclarativeBase):
    pass


class Owned:
    __byok_tenant__ = "org"
    org: Mapped[str | None] = mapped_column("org_id", String(40))


class Patient(Owned, Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(Encrypted(String(40), searchable=True))
    note: Mapped[str | None] = mapped_column(String(20))
    kind: Mapped[str] = mapped_column(String(10), default="patient")
    __mapper_args__ = {"polymorphic_on": kind, "polymorphic_identity": "patient"}  # noqa: RUF012


class Child(Patient):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(ForeignKey("patient.id"), primary_key=True)
    school: Mapped[str | None] = mapped_column(Encrypted(String(40)))
    __mapper_args__ = {"polymorphic_identity": "child"}  # noqa: RUF012


class Room(Base):
    """Without an encrypted column, and with a default for the tenant's."""

    __tablename__ = "room"
    __byok_tenant__ = "org_id"
    id: Mapped[int] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(String(40), default=lambda: turn)


class Free(Base):
    __tablename__ = "free"
    id: Mapped[int] = mapped_column(primary_key=True)
    org_id: Mapped[str | None] = mapped_column(String(40))


T: Any = Patient.__table__


@pytest.fixture
def data(byok: Byok, engine: Engine) -> Engine:
    """The engine, with a patient, a child and a room of each tenant."""
    global turn
    Base.metadata.create_all(engine)
    for number, tenant in enumerate(("t1", "t2")):
        turn = tenant
        with byok.session(tenant, engine) as session:
            session.add(Patient(id=10 * number + 1, org=tenant, name=f"{tenant} Ada", note="plain"))
            session.add(
                Child(id=10 * number + 2, org=tenant, name=f"{tenant} Bob", school="Eton", note="plain")
            )
            session.add(Room(id=number + 1))
            session.commit()
    turn = "t1"
    return engine


def all_of(engine: Engine) -> list[Any]:
    """The rows as the database holds them."""
    names = [c.name for c in T.c]
    with engine.connect() as connection:
        return [
            tuple(row)
            for row in connection.execute(text(f"SELECT {', '.join(names)} FROM patient ORDER BY id"))
        ]


def writes_of(engine: Engine) -> list[str]:
    """The statements that reach the database, but SELECTs, from now on."""
    sent: list[str] = []

    def before_cursor_execute(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("SELECT"):
            sent.append(statement)

    event.listen(engine, "before_cursor_execute", before_cursor_execute)
    return sent


NEW: dict[str, Any] = {"id": 30, "org": "t2", "name": "x", "kind": "patient"}
ROW: dict[str, Any] = {"id": 30, "org_id": "t2", "name": "x", "kind": "patient"}
THEIRS: dict[str, Callable[[Session], object]] = {
    "add": lambda s: (s.add(Patient(**NEW)), s.flush()),
    "add, unset": lambda s: (s.add(Patient(id=30, name="x")), s.flush()),
    "add a child": lambda s: (s.add(Child(**{**NEW, "kind": "child"})), s.flush()),
    "bulk_save_objects": lambda s: s.bulk_save_objects([Patient(**NEW)]),
    "bulk_insert_mappings": lambda s: s.bulk_insert_mappings(Patient, [NEW]),  # type: ignore[arg-type]
    "bulk insert": lambda s: s.execute(insert(Patient), [{**NEW, "id": 31, "org": "t1"}, NEW]),
    "bulk insert of children": lambda s: s.execute(insert(Child), [{**NEW, "kind": "child"}]),
    "ORM insert values": lambda s: s.execute(insert(Patient).values(**NEW)),
    "Core insert": lambda s: s.execute(insert(T), [{**ROW, "id": 31, "org_id": "t1"}, ROW]),
    "Core insert, unset": lambda s: s.execute(insert(T), {"id": 30, "name": "x"}),
    "Core insert, NULL": lambda s: s.execute(insert(T), {**ROW, "org_id": None}),
    "values": lambda s: s.execute(insert(T).values(**ROW)),
    "values by column": lambda s: s.execute(
        insert(T).values({T.c[key]: value for key, value in ROW.items()})
    ),
    "multi-values": lambda s: s.execute(insert(T).values([{**ROW, "id": 31, "org_id": "t1"}, ROW])),
    "named parameter": lambda s: s.execute(
        insert(T).values(id=30, org_id=bindparam("o"), name="x", kind="patient"), {"o": "t2"}
    ),
    "default": lambda s: s.connection().execute(insert(Room.__table__), {"id": 9}),
    "default in a flush": lambda s: (s.add(Room(id=9)), s.flush()),
    "update": lambda s: s.execute(update(T).where(T.c.id == 1).values(org_id="t2")),
    "ORM update": lambda s: s.execute(update(Patient).where(Patient.id == 1).values(org="t2")),
    "update to NULL": lambda s: s.execute(update(T).values(org_id=None)),
    "update by parameters": lambda s: s.connection().execute(
        update(T).where(T.c.id == bindparam("b")), [{"b": 1, "org_id": "t2"}]
    ),
    "ORM bulk update": lambda s: s.execute(update(Patient), [{"id": 1, "org": "t2"}]),
    "insert in from_statement": lambda s: s.execute(
        select(Patient).from_statement(insert(Patient).values(**NEW).returning(Patient))
    ),
    "update in from_statement": lambda s: s.execute(
        select(Patient.id).from_statement(update(Patient).values(org="t2").returning(Patient.id))
    ),
    "lambda": lambda s: s.execute(
        lambda_stmt(lambda: update(Patient).where(Patient.id == 1).values(org="t2"))
    ),
    "spoiled lambda": lambda s: s.execute(
        lambda_stmt(lambda: insert(Patient).values(id=30, org="t2")).spoil()
    ),
}


@pytest.mark.parametrize("way", THEIRS)
def test_a_row_for_another_tenant_is_refused(byok: Byok, data: Engine, way: str) -> None:
    """Each way to write, for t1, a row that says t2's: both are named, and nothing reached the database."""
    global turn
    before = all_of(data)
    with byok.session("t1", data) as session:
        session.connection()
        sent = writes_of(data)
        turn = "t2"
        with pytest.raises(TenantMismatchError, match="'t1'") as raised:
            THEIRS[way](session)
        turn = "t1"
        unset = "NULL" in way or "unset" in way
        assert (raised.value.tenant, raised.value.owner) == ("t1", None if unset else "t2")
        assert "x" not in str(raised.value).split()
        assert [one for one in sent if "patient" in one or "room" in one] == []
        session.rollback()
    assert all_of(data) == before


CHANGES: dict[str, Callable[[Session, Patient], object]] = {
    "plain": lambda s, p: setattr(p, "note", "x"),
    "encrypted": lambda s, p: setattr(p, "name", "x"),
    "taken over": lambda s, p: setattr(p, "org", "t1"),
    "delete": lambda s, p: s.delete(p),
}


@pytest.mark.parametrize("way", CHANGES)
@pytest.mark.parametrize("id_", [11, 12])
def test_another_tenants_object_is_not_flushed(byok: Byok, data: Engine, way: str, id_: int) -> None:
    """An object of t2 that was read with its plain columns only is not written, taken over or deleted for t1."""
    before = all_of(data)
    with byok.session("t1", data) as session:
        found = session.get_one(Patient, id_, options=[load_only(Patient.note, Patient.org)])
        CHANGES[way](session, found)
        with pytest.raises(TenantMismatchError, match=r"'t2'.*'t1'"):
            session.flush()
        session.rollback()
    assert all_of(data) == before


def test_a_class_that_does_not_map_the_column_is_held_too(byok: Byok, data: Engine) -> None:
    """A second class over the table writes the tenant's own rows, and nobody else's."""

    class Others(DeclarativeBase):
        pass

    class Slim(Others):
        __table__ = T
        __mapper_args__ = {"include_properties": ["id", "note", "kind"]}  # noqa: RUF012

    before = all_of(data)
    for change in (lambda s, p: setattr(p, "note", "x"), lambda s, p: s.delete(p)):
        with byok.session("t1", data) as session:
            change(session, session.get_one(Slim, 11))
            with pytest.raises((StaleDataError, SAWarning)):  # which a DELETE of no row only warns of
                session.flush()
    for added in (Slim(id=50), Slim(id=50, note="x")):
        with byok.session("t1", data) as session:
            session.add(added)
            with pytest.raises(TenantMismatchError):
                session.flush()
    with Session(data) as session:
        session.get_one(Slim, 1).note = "x"
        with pytest.raises(NoTenantError):
            session.flush()
    assert all_of(data) == before
    with byok.session("t1", data) as session:
        session.get_one(Slim, 1).note = "own"
        session.commit()
        session.execute(update(Slim).values(note="own"))
        session.delete(session.get_one(Slim, 1))
        session.commit()
    assert {row[0] for row in all_of(data)} == {row[0] for row in before} - {1}


def test_the_tenants_own_rows_are_written_as_ever(byok: Byok, data: Engine) -> None:
    """No false alarm, and no row of another tenant within reach of an UPDATE or DELETE that names none."""
    with byok.session("t1", data) as session:
        found = session.get_one(Child, 2)
        found.note, found.school, found.name = "changed", "Harrow", "Cyd"
        session.flush()
        session.execute(insert(Patient), [{"id": 30 + n, "org": "t1", "name": "x"} for n in range(3)])
        session.execute(insert(T).values([{"id": 40, "org_id": "t1", "name": "x", "kind": "patient"}]))
        session.execute(update(Patient).values(note="bulk"))
        session.execute(update(Patient), [{"id": 30, "name": "y", "org": "t1"}, {"id": 31, "name": "z"}])
        session.delete(session.get_one(Patient, 32))
        session.commit()
        assert session.scalars(
            select(Patient.id).where(Patient.name.in_(["y", "z"])).order_by(Patient.id)
        ).all() == [
            30,
            31,
        ]
        assert session.execute(delete(T).where(T.c.id.in_([40, 11]))).rowcount == 1  # type: ignore[attr-defined]
        session.commit()
    with byok.session("t2", data) as session:
        theirs = session.scalars(select(Patient).where(Patient.org == "t2").order_by(Patient.id)).all()
        assert [(one.id, one.note, one.name) for one in theirs] == [
            (11, "plain", "t2 Ada"),
            (12, "plain", "t2 Bob"),
        ]


def test_a_bulk_update_by_key_reaches_no_other_tenants_row(byok: Byok, data: Engine) -> None:
    """Its rows do not say whose they are, and it would put t1's ciphertext into t2's row."""
    before = all_of(data)
    with byok.session("t1", data) as session:
        with pytest.raises(StaleDataError):
            session.execute(update(Patient), [{"id": 11, "name": "x"}])
        session.rollback()
        session.execute(update(Patient).where(Patient.id == 11).values(name="x"))
        session.connection().execute(
            update(T).where(T.c.id == bindparam("b")).values(name=bindparam("n")), [{"b": 11, "n": "x"}]
        )
        session.execute(delete(Patient).where(Patient.id == 11))
        alias = T.alias()
        session.execute(update(alias).where(alias.c.id == 11).values(name="x"))
        changed = lambda_stmt(lambda: update(Patient).where(Patient.id == 11).values(name="x"))
        for statement in (changed, changed.spoil()):
            session.execute(statement, execution_options={"synchronize_session": "fetch"})
        if data.dialect.update_returning:
            returned = update(Patient).where(Patient.id == 11).values(name="x").returning(Patient)
            assert session.scalars(select(Patient).from_statement(returned)).all() == []
        session.commit()
    assert all_of(data) == before


UNKNOWN: dict[str, Callable[[Session], object]] = {
    "expression": lambda s: s.execute(update(T).values(org_id=func.lower("T1"))),
    "literal column": lambda s: s.execute(update(Patient).values(org=Patient.note)),
    "insert expression": lambda s: s.execute(
        insert(T).values(id=30, org_id=select(literal("t1")).scalar_subquery())
    ),
    "insert from select": lambda s: s.execute(
        insert(T).from_select(["id", "org_id"], select(literal(9), literal("t1")))
    ),
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_only_the_database_knows_is_refused(byok: Byok, data: Engine, way: str) -> None:
    """It could be any tenant."""
    with byok.session("t1", data) as session, pytest.raises(UnsupportedQueryError, match="by name"):
        UNKNOWN[way](session)


def test_without_a_tenant_no_such_row_is_written(byok: Byok, data: Engine) -> None:
    """Not even one without an encrypted value; tables without the declaration are free."""
    with Session(data) as session:
        for write in (
            lambda: (session.add(Room(id=9, org_id="t1")), session.flush()),
            lambda: session.execute(update(Patient).values(note="x")),
            lambda: session.execute(delete(Room)),
            lambda: session.execute(lambda_stmt(lambda: delete(Room)).spoil()),
            lambda: session.execute(select(Room).from_statement(delete(Room).returning(Room))),
        ):
            with pytest.raises(NoTenantError, match=r"room|patient"):
                write()
            session.rollback()
        session.add(Free(id=1, org_id="anybody"))
        session.commit()


def test_sealed_and_across_write_what_they_may(byok: Byok, local_kms: LocalKms, data: Engine) -> None:
    """Sealed, rows of anybody, without keys; across, plain columns of the tenants that were named."""
    byok.onboard("t3", local_kms)
    with byok.sealed(**WHO), Session(data) as session:
        session.add(Patient(id=50, org="t9", note="copied"))
        session.execute(update(Patient).where(Patient.id == 11).values(note="sealed"))
        session.delete(session.get_one(Patient, 12))
        session.commit()
    with byok.across(["t1", "t2"], **WHO), Session(data) as session:
        session.get_one(Patient, 11).note = "across"
        session.add(Room(id=60, org_id="t2"))
        session.commit()
        session.add(Room(id=61, org_id="t3"))
        with pytest.raises(TenantMismatchError, match=r"t1.*t2"):
            session.flush()
        session.rollback()
        session.execute(update(Patient).values(note="all"))
        session.commit()
    with data.connect() as connection:
        notes = dict(connection.execute(select(T.c.id, T.c.note)).all())  # type: ignore[arg-type]
    assert notes == {1: "all", 2: "all", 11: "all", 50: "copied"}


def test_an_upsert_does_not_change_the_owner(byok: Byok, data: Engine) -> None:
    """What is set on conflict is checked too."""
    row = {"id": 1, "org_id": "t1", "kind": "patient", "name": "x"}
    if data.dialect.name in ("mysql", "mariadb"):
        upsert: Any = mysql.insert(T).values(row).on_duplicate_key_update(org_id="t2")
    else:
        make: Any = postgresql.insert if data.dialect.name == "postgresql" else sqlite.insert
        upsert = make(T).values(row).on_conflict_do_update(index_elements=["id"], set_={"org_id": "t2"})
    with byok.session("t1", data) as session, pytest.raises(TenantMismatchError, match="'t2'"):
        session.execute(upsert)


def test_an_upsert_leaves_another_tenants_row_alone(byok: Byok, data: Engine) -> None:
    """It is held to the tenant's rows like an UPDATE, whatever its own WHERE says."""
    make: Any = {"postgresql": postgresql, "sqlite": sqlite}.get(data.dialect.name, mysql)
    for tenant in ("t1", "t2"):  # by one compiled statement
        rows = [{"id": id_, "org_id": tenant, "kind": "patient", "name": f"new {tenant}"} for id_ in (1, 11)]
        with byok.session(tenant, data) as session:
            for where in (None, T.c.note.is_(None), T.c.id > 0):
                for parameters in (rows, None):
                    upsert = make.insert(T) if parameters else make.insert(T).values(rows)
                    if make is mysql:  # which takes no WHERE; what is set first is seen by what is set next
                        upsert = upsert.on_duplicate_key_update(
                            org_id=upsert.inserted.org_id,
                            note=literal_column("'upsert'"),
                            name=upsert.inserted.name,
                        )
                    else:
                        upsert = upsert.on_conflict_do_update(
                            index_elements=["id"], set_={"name": upsert.excluded.name}, where=where
                        )
                    session.execute(upsert, parameters)
            session.commit()
            own = 1 if tenant == "t1" else 11
            assert session.scalars(select(T.c.name).where(T.c.id == own)).all() == [f"new {tenant}"]
            assert session.scalars(select(T.c.id).where(T.c.name == f"new {tenant}")).all() == [own]
    if make is not mysql:
        return
    with byok.session("t1", data) as session:
        upsert = mysql.insert(T).values([{**row, "org_id": "t1"} for row in rows])
        session.execute(upsert.on_duplicate_key_update(name="one value", note=func.lower("PLAIN")))
        session.commit()
        assert session.scalars(select(T.c.name).where(T.c.id == 1)).all() == ["one value"]


@pytest.mark.parametrize(
    ("type_", "tenant", "other"),
    [(Integer, "42", 43), (Uuid, str(uuid4()), uuid4())],
    ids=["Integer", "Uuid"],
)
def test_names_that_are_numbers_or_uuids(
    byok: Byok, local_kms: LocalKms, engine: Engine, type_: Any, tenant: str, other: Any
) -> None:
    """The column may hold what the tenant's name is the text of; declared on a plain Table as well."""
    table = Table(
        "visit",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("org", type_),
        Column("code", Encrypted(String(9))),
        info={"byok_tenant": "org"},
    )
    table.create(engine)
    byok.onboard(tenant, local_kms)
    own = int(tenant) if type_ is Integer else UUID(tenant)
    with byok.tenant(tenant), engine.begin() as connection:
        connection.execute(insert(table), [{"id": 1, "org": own, "code": "x"}])
        assert connection.execute(update(table).values(code="y")).rowcount == 1
        with pytest.raises(TenantMismatchError):
            connection.execute(insert(table), [{"id": 2, "org": other, "code": "x"}])
    with byok.tenant("t1"), engine.begin() as connection, pytest.raises(TenantMismatchError, match="t1"):
        connection.execute(update(table).values(code="y"))


class Lowered(TypeDecorator[str]):
    impl = String(9)
    cache_ok = True
    python_type = str

    def bind_expression(self, bindparam: Any) -> Any:
        return func.lower(bindparam)


@pytest.mark.parametrize(
    "declared",
    [
        None,
        Column("org", LargeBinary),
        Column("org", Encrypted(String(9))),
        Column("org", String(9), server_default="t1"),
        Column("org", String(9), default=func.current_user()),
        Column("org", String(9), onupdate=func.current_user()),
        Column("org", String(9), default=select(literal("t1")).scalar_subquery()),
        Column("org", Integer, Sequence("numbers")),
        Column("org", Integer, Identity()),
        Column("org", String(9), Computed("'t1'")),
        Column("org", Lowered()),
    ],
)
def test_what_cannot_be_checked_is_refused_at_declaration(declared: Column[Any] | None) -> None:
    """A declaration that checks nothing would be worse than none."""
    columns = [Column("id", Integer, primary_key=True), *([] if declared is None else [declared])]
    with pytest.raises(DeclarationError, match="byok_tenant"):
        Table("bad", MetaData(), *columns, info={"byok_tenant": "org"})


def test_a_class_without_the_column_is_refused() -> None:
    """A base class that declares it for all tables leaves none out silently."""
    with pytest.raises(DeclarationError, match="__byok_tenant__"):

        class Loose(Base):
            __tablename__ = "loose"
            __byok_tenant__ = "org_id"
            id: Mapped[int] = mapped_column(primary_key=True)


def test_a_session_does_not_carry_values_into_another_tenants_block(byok: Byok, data: Engine) -> None:
    """With expire_on_commit=False it would encrypt for t2 what it read for t1; cleared in between it serves both."""
    mine, theirs = select(Patient).where(Patient.id == 1), select(Patient).where(Patient.id == 11)
    for expire in (True, False):
        with Session(data, expire_on_commit=expire) as session:
            with byok.tenant("t1"):
                kept = session.scalars(mine).one()
                session.commit()
                assert session.scalars(mine).one() is kept
                session.commit()
            with byok.tenant("t2"):
                if not expire:
                    with pytest.raises(TenantMismatchError, match=r"'t1'.*'t2'"):
                        session.scalars(theirs).one()
                    session.close()
                assert session.scalars(theirs).one().name == "t2 Ada"
                session.commit()
            with byok.sealed(**WHO):
                assert session.scalar(select(Patient.id).where(Patient.id == 1)) == 1
    with Session(data, expire_on_commit=False) as session:
        with byok.sealed(**WHO):
            held = session.scalars(mine).one()
            session.commit()
        with byok.tenant("t1"):
            assert byok.reveal(held, "name") == "t1 Ada"


# -- wherever in a statement it stands -------------------------------------------------------------------------------

on_postgresql = pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)
R: Any = Room.__table__
F: Any = Free.__table__


def rows_of(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        rooms = connection.execute(text("SELECT id, org_id FROM room ORDER BY id")).all()
        frees = connection.execute(text("SELECT id, org_id FROM free ORDER BY id")).all()
    return [*all_of(engine), rooms, frees]


def gone(*, nesting: bool = False) -> Any:
    return delete(R).where(R.c.id == 2).returning(R.c.id).cte("gone", nesting=nesting)


class Explain(Executable, ClauseElement):
    """A statement of somebody's own around another."""

    inherit_cache = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner


@compiles(Explain)
def _explain(element: Explain, compiler: Any, **kwargs: Any) -> str:
    return "EXPLAIN ANALYZE " + str(compiler.process(element.inner, **kwargs))


WITHIN: dict[str, Callable[[], Any]] = {
    "DELETE in a CTE": lambda: select(gone()),
    "UPDATE in a CTE": lambda: select(
        update(R).where(R.c.id == 2).values(org_id="t1").returning(R.c.id).cte("inner")
    ),
    "INSERT in a CTE": lambda: select(insert(R).values(id=9, org_id="t2").returning(R.c.id).cte("inner")),
    "INSERT FROM SELECT in a CTE": lambda: select(
        insert(R)
        .from_select(["id", "org_id"], select(literal(9), literal("t2")))
        .returning(R.c.id)
        .cte("inner")
    ),
    "upsert in a CTE": lambda: select(
        postgresql.insert(R)
        .values(id=2, org_id="t1")
        .on_conflict_do_update(index_elements=["id"], set_={"org_id": "t1"})
        .returning(R.c.id)
        .cte("inner")
    ),
    "encrypted": lambda: select(delete(T).where(T.c.id == 11).returning(T.c.id).cte("inner")),
    "an alias of the CTE": lambda: select(gone().alias("other")),
    "a CTE within a CTE": lambda: select(select(gone()).cte("outer")),
    "nesting": lambda: select(select(gone(nesting=True)).subquery()),
    "beside a SELECT": lambda: select(F.c.id).add_cte(gone()),
    "beside an INSERT": lambda: insert(F).values(id=9).add_cte(gone()),
    "beside an UPDATE": lambda: update(F).values(org_id="x").add_cte(gone()),
    "beside a DELETE": lambda: delete(F).add_cte(gone()),
    "in an INSERT FROM SELECT": lambda: insert(F).from_select(["id"], select(gone())),
    "in a subquery": lambda: select(select(gone()).subquery()),
    "in a scalar subquery": lambda: select(select(gone()).scalar_subquery()),
    "in EXISTS": lambda: select(F.c.id).where(exists(select(gone()))),
    "in IN": lambda: select(F.c.id).where(F.c.id.in_(select(gone()))),
    "in a DELETE": lambda: delete(F).where(F.c.id.in_(select(gone()))),
    "in a value": lambda: update(F).values(id=select(gone()).scalar_subquery()),
    "in a union": lambda: union_all(select(F.c.id), select(gone())),
    "of a light table": lambda: select(
        delete(table("room", column("id"))).where(column("id") == 2).returning(column("id")).cte("inner")
    ),
    "from_statement": lambda: select(Free).from_statement(select(F).add_cte(gone())),
    "of somebody's own": lambda: Explain(delete(R).where(R.c.id == 2)),
}


@pytest.mark.parametrize("kind", WITHIN)
@on_postgresql
def test_dml_within_another_statement_is_refused(byok: Byok, data: Engine, kind: str) -> None:
    """It cannot be held to the tenant; without one it is NoTenantError as anywhere; nothing is changed."""
    with Session(data) as session:
        session.add(Free(id=1))
        session.commit()
    before = rows_of(data)
    with (
        byok.session("t1", data) as session,
        pytest.raises(UnsupportedQueryError, match="statement of its own"),
    ):
        session.execute(WITHIN[kind]())
    with Session(data) as session, pytest.raises(NoTenantError):
        session.execute(WITHIN[kind]())
    assert rows_of(data) == before


@on_postgresql
def test_dml_within_another_statement_runs_where_it_may(byok: Byok, data: Engine) -> None:
    """Sealed it reaches any tenant's rows; tables of no tenant need neither, nor does what only reads a tenant's."""
    with byok.sealed(**WHO), Session(data) as session:
        assert session.execute(select(gone())).scalars().all() == [2]
        session.commit()
    with Session(data) as session:
        added = insert(F).from_select(["id"], select(R.c.id)).returning(F.c.id).cte("added")
        assert session.scalars(select(added)).all() == [1]
        session.commit()


def forms_of_or(target: Any) -> list[Any]:
    return [
        text("id = 11 OR id = 12 OR id = 2"),
        literal_column("id = 11 OR id = 12 OR id = 2"),
        and_(literal_column("id = 11 OR id = 2"), target.c.id > 0),
        or_(target.c.id == 11, target.c.id == 2),
        (target.c.id == 11).op("OR")(target.c.id == 2),
    ]


@pytest.mark.parametrize("form", range(5))
def test_text_in_where_does_not_reach_another_tenants_row(byok: Byok, data: Engine, form: int) -> None:
    """An OR in a text does not take the tenant's condition for one of its alternatives."""
    before = rows_of(data)
    with byok.session("t1", data) as session:
        for target in (T, R):
            where = forms_of_or(target)[form]
            session.execute(update(target).where(where).values(org_id="t1"))
            session.execute(delete(target).where(where).where(target.c.id > 5))
            upsert_where = {"sqlite": sqlite, "postgresql": postgresql}.get(data.dialect.name)
            if upsert_where is not None:
                upsert: Any = upsert_where.insert(target).values(id=12 if target is T else 2, org_id="t1")
                session.execute(
                    upsert.on_conflict_do_update(
                        index_elements=["id"],
                        set_={"org_id": "t1"},
                        where=text(f"{target.name}.id > 0 OR 1 = 1"),
                    )
                )
        session.commit()
    found = rows_of(data)
    assert [row for row in found[:-2] if row[-1] == "t2" or "t2" in row] == [
        row for row in before[:-2] if "t2" in row
    ]
    assert (2, "t2") in found[-2]


def others_of(engine: Engine, name: str) -> list[Any]:
    """Objects for a table that know nothing of its tenants: lightweight, reflected, partly declared, aliased."""
    names = [c.name for c in Base.metadata.tables[name].c]
    return [
        table(name, *map(column, names)),
        table(name, column("id")),
        Table(name, MetaData(), autoload_with=engine),
        Table(name, MetaData(), Column("id", Integer, primary_key=True)),
        table(name, *map(column, names)).alias("other"),
    ]


@pytest.mark.parametrize("which", range(5))
def test_another_object_of_the_tables_name_is_held_too(byok: Byok, data: Engine, which: int) -> None:
    """table() and reflected Tables reach the tenant's own rows only, and nothing without a tenant."""
    before = rows_of(data)
    room = others_of(data, "room")[which]
    plain = getattr(room, "element", room)
    with byok.session("t1", data) as session:
        session.execute(update(room).values(id=room.c.id + 100))
        session.execute(delete(room).where(room.c.id.in_([2, 102])) if room is plain else delete(R))
        if "org_id" in plain.c:
            for row in ({"id": 7, "org_id": "t2"}, {"id": 7}):
                with pytest.raises(TenantMismatchError):
                    session.execute(insert(plain).values(**row))
            with pytest.raises(TenantMismatchError):
                session.execute(update(room).values(org_id="t2"))
            session.execute(insert(plain), {"id": 8, "org_id": "t1"})
        else:
            with pytest.raises(TenantMismatchError):
                session.execute(insert(plain).values(id=7))
        session.commit()
    assert (2, "t2") in rows_of(data)[-2]
    assert rows_of(data)[:-2] == before[:-2]
    with Session(data) as session:
        for write in (update(room).values(id=1), delete(room), insert(plain).values(id=1)):
            with pytest.raises(NoTenantError):
                session.execute(write)
            session.rollback()


def test_a_reflected_column_is_compared_as_it_was_declared(
    byok: Byok, local_kms: LocalKms, engine: Engine
) -> None:
    """A UUID is stored otherwise on each database: the declared type says how, not the reflected one."""
    tenant = uuid4()
    declared = Table(
        "site",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("org", Uuid),
        info={"byok_tenant": "org"},
    )
    declared.create(engine)
    byok.onboard(str(tenant), local_kms)
    with byok.tenant(str(tenant)), engine.begin() as connection:
        connection.execute(insert(declared), [{"id": 1, "org": tenant}])
        for other in (Table("site", MetaData(), autoload_with=engine), table("site", column("id"))):
            assert connection.execute(update(other).values(id=other.c.id)).rowcount == 1


def test_a_model_of_its_own_is_taken_at_its_word(byok: Byok, data: Engine) -> None:
    """Another model's table that has the same name, in another schema or among encrypted columns, needs no tenant."""

    class Other(DeclarativeBase):
        pass

    class Place(Other):
        __tablename__ = "room"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Secret(Other):
        __tablename__ = "secret_of_place"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(Encrypted(String(9)))

    with Session(data) as session:
        session.execute(update(Place).values(id=Place.id))
        session.execute(select(F.c.id))
        session.rollback()


def test_a_copy_of_the_table_is_held_too(byok: Byok, data: Engine) -> None:
    """to_metadata() carries the declaration along."""
    copy = T.to_metadata(MetaData())
    before = all_of(data)
    with byok.session("t1", data) as session:
        session.execute(delete(copy).where(copy.c.id == 11))
        with pytest.raises(TenantMismatchError):
            session.execute(insert(copy).values(**ROW))
        session.commit()
    with Session(data) as session, pytest.raises(NoTenantError):
        session.execute(delete(copy))
    assert all_of(data) == before


def test_a_statement_compiled_beforehand_is_refused(byok: Byok, data: Engine) -> None:
    """It can be held to nothing any more; of other tables, and sealed, it runs. 2.1 takes no compiled one at all."""
    before = rows_of(data)
    statements = [
        update(R).values(id=3),
        delete(R),
        insert(R).values(id=7, org_id="t1"),
        delete(T),
        delete(table("room", column("id"))),
    ]
    for statement in statements:
        compiled: Any = statement.compile(data)
        for where, error in ((byok.tenant("t1"), UnsupportedQueryError), (nullcontext(), NoTenantError)):
            with where, data.begin() as connection, pytest.raises((error, ObjectNotExecutableError)):
                connection.execute(compiled)
    assert rows_of(data) == before
    if not hasattr(compiled, "_execute_on_connection"):
        return
    free: Any = insert(F).values(id=5).compile(data)
    rooms: Any = delete(R).compile(data)
    reading: Any = select(R.c.id).compile(data)
    with data.begin() as connection:
        connection.execute(free)
        assert len(connection.execute(reading).all()) == 2
    with byok.sealed(**WHO), data.begin() as connection:
        connection.execute(rooms)
    assert rows_of(data)[-2:] == [[], [(5, None)]]


@pytest.mark.parametrize("sync_url", ["sqlite", "mariadb"], indirect=True)
def test_replace_is_refused(byok: Byok, data: Engine) -> None:
    """It would delete another tenant's row; what leaves such a row as it is may run."""
    before = rows_of(data)
    lite = data.dialect.name == "sqlite"
    own = {"id": 2, "org_id": "t1"}
    with byok.session("t1", data) as session:
        if lite:
            refused = [
                insert(R).prefix_with("OR REPLACE").values(own),
                update(R).prefix_with("or  replace").values(id=2),
            ]
            for statement in refused:
                with pytest.raises(UnsupportedQueryError, match="REPLACE"):
                    session.execute(statement)
            with pytest.raises(UnsupportedQueryError, match="REPLACE"):
                session.execute(
                    insert(T).prefix_with("OR REPLACE", dialect="sqlite").values(id=11, org_id="t1")
                )
        ignore = "OR IGNORE" if lite else "IGNORE"
        session.execute(insert(R).prefix_with(ignore).prefix_with("OR REPLACE", dialect="oracle").values(own))
        session.execute(update(R).prefix_with(ignore).values(id=2))
        session.commit()
    assert rows_of(data) == before


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("how", ["constraint", "primary key", "unique", "unique of the tenant"])
def test_a_table_that_replaces_by_itself_is_refused(byok: Byok, engine: Engine, how: str) -> None:
    """SQLite's ON CONFLICT REPLACE of a constraint does with every INSERT what OR REPLACE does with one."""
    options: dict[str, Any] = {
        "primary key": {"sqlite_on_conflict_primary_key": "REPLACE"},
        "unique": {"sqlite_on_conflict_unique": "replace", "unique": True},
    }
    key = options.get(how, {})
    constraints = {
        "constraint": [UniqueConstraint("id", "code", sqlite_on_conflict="REPLACE")],
        "unique of the tenant": [UniqueConstraint("org", "code", sqlite_on_conflict="REPLACE")],
    }
    bed = Table(
        "bed",
        MetaData(),
        Column("id", Integer, primary_key=True, **(key if how == "primary key" else {})),
        Column("code", Integer, **(key if how == "unique" else {})),
        Column("org", String(9)),
        *constraints.get(how, []),
        info={"byok_tenant": "org"},
    )
    bed.create(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        if how == "unique of the tenant":
            connection.execute(insert(bed), {"id": 1, "code": 1, "org": "t1"})
            return
        with pytest.raises(UnsupportedQueryError, match="REPLACE"):
            connection.execute(insert(bed), {"id": 1, "code": 1, "org": "t1"})


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
def test_update_of_several_tables_is_held_in_each(byok: Byok, data: Engine) -> None:
    """MariaDB's sets columns of a table that is not the statement's own."""
    with Session(data) as session:
        session.add_all([Free(id=1), Free(id=2)])
        session.commit()
    before = rows_of(data)
    both = update(F).where(F.c.id == R.c.id, R.c.id == 2)
    with byok.session("t1", data) as session:
        session.execute(both.values({F.c.org_id: "x", R.c.id: 77}))
        with pytest.raises(TenantMismatchError):
            session.execute(both.values({F.c.org_id: "t2", R.c.org_id: "t2"}))
        session.commit()
    assert rows_of(data) == before
    with Session(data) as session, pytest.raises(NoTenantError):
        session.execute(both.values({F.c.org_id: "x", R.c.id: 77}))


def test_the_column_is_known_by_its_name_however_it_is_given(byok: Byok, data: Engine) -> None:
    """SQLAlchemy goes by the key's name, whatever object it is; so does the check."""
    before = rows_of(data)
    for key in (column("org_id"), table("x", column("org_id")).c.org_id, R.c.org_id, Room.org_id):
        for statement in (
            update(R).values({key: "t2"}),
            update(R).ordered_values((key, "t2")),
            insert(R).values({"id": 9, key: "t2"}),
        ):
            with byok.session("t1", data) as session, pytest.raises(TenantMismatchError):
                session.execute(statement)
    assert rows_of(data) == before


def test_an_onupdate_of_the_column_is_checked(byok: Byok, engine: Engine) -> None:
    """What a Python function sets it to in an UPDATE is looked at as a default is."""
    table_ = Table(
        "shift",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("note", String(9)),
        Column("org", String(9), onupdate=lambda: turn),
        info={"byok_tenant": "org"},
    )
    table_.create(engine)
    global turn
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(insert(table_), {"id": 1, "org": "t1"})
        connection.execute(update(table_).values(note="x"))
        turn = "t2"
        try:
            with pytest.raises(TenantMismatchError):
                connection.execute(update(table_).values(note="y"))
        finally:
            turn = "t1"
        assert connection.execute(select(table_.c.org, table_.c.note)).all() == [("t1", "x")]


async def test_flushes_and_statements_under_asyncio(abyok: Byok, async_engine: AsyncEngine) -> None:
    """The same checks where the flush runs in a greenlet."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with abyok.asession("t2", async_engine) as session:
        session.add(Patient(id=11, org="t2", name="t2 Ada"))
        await session.commit()
    async with abyok.asession("t1", async_engine, expire_on_commit=False) as session:
        session.add(Patient(id=1, org="t1", name="t1 Ada"))
        await session.commit()
        session.add(Patient(id=2, org="t2", name="x"))
        with pytest.raises(TenantMismatchError, match=r"'t2'.*'t1'"):
            await session.flush()
        await session.rollback()
        foreign = await session.get_one(Patient, 11, options=[load_only(Patient.note)])
        foreign.note = "x"
        with pytest.raises(TenantMismatchError, match=r"'t2'.*'t1'"):
            await session.flush()
        await session.rollback()
        await session.execute(update(Patient).values(note="bulk"))
        await session.commit()
        notes = await session.execute(select(Patient.id, Patient.note).order_by(Patient.id))
        assert [tuple(row) for row in notes] == [(1, "bulk"), (11, None)]


# -- the tables of subclasses ------------------------------------------------------------------------------------------


class Pupil(Child):
    """Two tables away from the one with the column."""

    __tablename__ = "pupil"
    id: Mapped[int] = mapped_column(ForeignKey("child.id"), primary_key=True)
    form: Mapped[str | None] = mapped_column(String(20))
    __mapper_args__ = {"polymorphic_identity": "pupil"}  # noqa: RUF012


C: Any = Child.__table__
U: Any = Pupil.__table__


def _detached(delete_it: bool) -> Callable[[Session], object]:
    def flush(session: Session) -> None:
        pupil = Pupil(id=13, org="t1", form="1b")  # the object says that it is ours, and the row is not
        make_transient_to_detached(pupil)
        session.add(pupil)
        session.delete(pupil) if delete_it else setattr(pupil, "form", "taken")
        session.flush()

    return flush


HEIRS: dict[str, Callable[[Session], object]] = {
    "Core update": lambda s: s.execute(update(U).values(form="taken")),
    "ORM update": lambda s: s.execute(update(Pupil).values(form="taken")),
    "update by key": lambda s: s.execute(update(Pupil), [{"id": 13, "form": "taken"}]),
    "bulk_update_mappings": lambda s: s.bulk_update_mappings(Pupil, [{"id": 13, "form": "taken"}]),  # type: ignore[arg-type]
    "update of the middle": lambda s: s.execute(update(C).values(school="taken")),
    "many": lambda s: s.connection().execute(
        update(U).where(U.c.id == bindparam("b")), [{"b": 13, "form": "taken"}, {"b": 13, "form": "taken"}]
    ),
    "flush": _detached(False),
    "delete in a flush": _detached(True),
    "delete": lambda s: s.execute(delete(U)),
    "text": lambda s: s.execute(delete(U).where(text("1 = 1 OR 1 = 1"))),
    "update of an alias": lambda s: s.execute(update(U.alias("a")).values(form="taken")),
    "upsert": lambda s: s.execute(_upsert_of(s)),
}


def _upsert_of(session: Session) -> Any:
    row = {"id": 13, "form": "taken"}
    if session.get_bind().dialect.name in ("mysql", "mariadb"):
        return mysql.insert(U).values(row).on_duplicate_key_update(form="taken")
    module: Any = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    return module.insert(U).values(row).on_conflict_do_update(index_elements=["id"], set_={"form": "taken"})


@pytest.mark.filterwarnings("ignore:DELETE statement on table")
@pytest.mark.parametrize("form", HEIRS)
def test_the_table_of_a_subclass_is_held_to_the_tenants_rows(byok: Byok, data: Engine, form: str) -> None:
    """Joined inheritance: a row of it is whose the row is that it joins; without a tenant it is NoTenantError."""
    for number, tenant in ((3, "t1"), (13, "t2")):
        with byok.session(tenant, data) as session:
            session.add(Pupil(id=number, org=tenant, school="Eton", form="1a"))
            session.commit()

    def theirs() -> list[Any]:
        with byok.session("t2", data) as session:
            found = select(Pupil.id, Pupil.school, Pupil.form).where(Pupil.id > 10)
            return [tuple(row) for row in session.execute(found)]

    before = theirs()
    with byok.session("t1", data) as session, suppress(StaleDataError, UnsupportedQueryError):
        HEIRS[form](session)
        session.commit()
    assert theirs() == before == [(13, "Eton", "1a")]
    with Session(data) as session, pytest.raises(NoTenantError):
        HEIRS[form](session)


def test_the_table_of_a_subclass_is_written_for_its_own_tenant(byok: Byok, data: Engine) -> None:
    """What is the tenant's own is reached as before, by flush, bulk and Core; sealed, all rows are."""
    with byok.session("t1", data) as session:
        session.add_all([Pupil(id=n, org="t1", school="Eton", form="1a") for n in (3, 4, 5)])
        session.commit()
        assert session.execute(update(U).values(form="2a")).rowcount == 3
        session.execute(update(Pupil), [{"id": 3, "form": "2b", "note": "bulk"}])
        pupil = session.get_one(Pupil, 4)
        pupil.form, pupil.school = "2c", "Harrow"
        session.delete(session.get_one(Pupil, 5))
        session.commit()
        found = session.execute(select(Pupil.id, Pupil.form, Pupil.school).order_by(Pupil.id)).all()
        assert [tuple(row) for row in found] == [(3, "2b", "Eton"), (4, "2c", "Harrow")]
    with byok.sealed(**WHO), Session(data) as session:
        assert session.execute(delete(U)).rowcount == 2


def test_a_tenant_that_a_function_gives_is_refused(byok: Byok, data: Engine) -> None:
    """It is called again when the statement is sent, and need not say the same."""
    names = iter(["t1", "t2", "t2"])
    given = bindparam("o", callable_=lambda: next(names))
    with byok.session("t1", data) as session, pytest.raises(UnsupportedQueryError, match="by name"):
        session.execute(insert(R).values(id=9, org_id=given))
