"""Whose keys a statement uses, and a result, whatever else runs meanwhile: sync engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Engine,
    ForeignKey,
    LargeBinary,
    String,
    create_engine,
    func,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
)
from sqlalchemy.types import TypeDecorator

from sqla_byok import (
    Byok,
    ByokError,
    ConfigurationError,
    Encrypted,
    LocalKms,
    NotAttachedError,
    NoTenantError,
    TenantMismatchError,
    UnknownTenantError,
)
from sqla_byok.kms import Kms

ROWS = 6


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(10))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))
    visits: Mapped[list[Visit]] = relationship(order_by="Visit.id")


class Visit(Base):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    patient_id: Mapped[int] = mapped_column(ForeignKey("patient.id"))
    code: Mapped[str | None] = mapped_column(Encrypted(String(20)))


def mrns(tenant: str) -> list[str]:
    return [f"{tenant}-{n}" for n in range(ROWS)]


def of(tenant: str) -> Any:
    return select(Patient.mrn).where(Patient.org == tenant).order_by(Patient.id)


STORED = select(type_coerce(Patient.__table__.c.mrn, LargeBinary)).order_by(Patient.__table__.c.id)


@pytest.fixture
def data(byok: Byok, engine: Engine) -> Engine:
    """The engine, with rows of t1 and t2 in it."""
    Base.metadata.create_all(engine)
    for number, tenant in enumerate(("t1", "t2")):
        with byok.session(tenant, engine) as session:
            for n, mrn in enumerate(mrns(tenant)):
                id_ = 1 + number * 1000 + n
                session.add(Patient(id=id_, org=tenant, mrn=mrn, visits=[Visit(id=id_, code=f"{mrn}-visit")]))
            session.commit()
    return engine


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def on_sqlite(
    tmp_path: Path, customers: dict[str, Kms], kms_options: dict[str, Any], sqlite: Engine
) -> Iterator[Byok]:
    """A Byok on SQLite alone, for what the database has no part in."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", **kms_options)
    byok.create_keystore()
    byok.attach(sqlite)
    for tenant, kms in customers.items():
        byok.onboard(tenant, kms)
    Base.metadata.create_all(sqlite)
    yield byok
    byok.close()


def owners(byok: Byok, engine: Engine, statement: Any = STORED) -> list[str | None]:
    """Under whose key each stored value is."""
    with engine.connect() as connection:
        return [byok._keyrings.owner_of(blob[:18]) for blob in connection.scalars(statement)]


# -- who it is -------------------------------------------------------------------------------------------------------


def test_every_place_that_names_the_tenant(byok: Byok, data: Engine) -> None:
    """The option of statement, call, connection, session, session's connection and engine, the block, the session."""
    query, option = of("t1").where(Patient.mrn == "t1-3"), {"byok_tenant": "t1"}
    with Session(data) as session:
        assert session.scalar(query.execution_options(byok_tenant="t1")) == "t1-3"
        assert session.scalar(query, execution_options=option) == "t1-3"
        session.rollback()
        session.connection(execution_options=option)
        assert session.scalar(query) == "t1-3"
    with data.connect() as connection:
        assert connection.scalar(query, execution_options=option) == "t1-3"
    with data.connect().execution_options(byok_tenant="t1") as connection:
        assert connection.scalar(query) == "t1-3"
    with data.execution_options(byok_tenant="t1").connect() as connection:
        assert connection.scalar(query) == "t1-3"
    with Session(data.execution_options(byok_tenant="t1")) as session:
        assert session.scalar(query) == "t1-3"
    with byok.tenant("t1"), Session(data) as session:
        assert session.scalar(query) == "t1-3"
    with byok.session("t1", data) as session:
        assert session.scalar(query) == "t1-3"


def test_a_statement_never_runs_for_another_tenant_than_it_names(byok: Byok, data: Engine) -> None:
    """SQLAlchemy lets the option of a connection or engine go before the statement's: no rows, or the wrong ones."""
    query = of("t2").where(Patient.mrn == "t2-3").execution_options(byok_tenant="t2")
    with Session(data.execution_options(byok_tenant="t1")) as session:
        for statement in (query, insert(Patient).values(id=900, mrn="x").execution_options(byok_tenant="t2")):
            with pytest.raises(TenantMismatchError, match="execution_options=") as raised:
                session.execute(statement)
            assert (raised.value.tenant, raised.value.owner) == ("t1", "t2")
        assert session.scalar(query, execution_options={"byok_tenant": "t2"}) == "t2-3"
        assert session.scalar(query.execution_options(byok_tenant="t1")) is None
        session.execute(select(Patient.id).execution_options(byok_tenant="t2")).all()  # needs no tenant
    with byok.tenant("t1"), Session(data) as session:
        assert session.scalar(query) == "t2-3"
    with byok.session("t1", data) as session:
        assert session.scalar(query) == "t2-3"


def test_another_tenants_search_finds_nothing(byok: Byok, data: Engine) -> None:
    """Hashes differ between tenants, so equality cannot find a foreign row."""
    with byok.session("t2", data) as session:
        assert session.scalars(select(Patient.id).where(Patient.mrn == "t1-3")).all() == []
        assert session.scalars(select(Patient.id).where(Patient.mrn.in_(mrns("t1")))).all() == []


def test_a_foreign_row_does_not_decrypt(byok: Byok, data: Engine) -> None:
    """Reading a row of another tenant is refused, both named, also where both are open."""
    for reader, owner in (("t1", "t2"), ("t2", "t1")):
        with byok.session(reader, data) as session:
            for query in (of(owner), select(Patient).where(Patient.org == owner)):
                with pytest.raises(TenantMismatchError, match="filter the query by tenant") as raised:
                    session.scalars(query).all()
                error = raised.value
                assert (error.tenant, error.owner, error.column) == (reader, owner, "patient.mrn")


def test_without_a_tenant_nothing_encrypted_moves(byok: Byok, data: Engine) -> None:
    """NoTenantError for reads, also where no value would come, searches and writes; plain columns and NULL are fine."""
    with Session(data) as session:
        none = select(Patient.mrn).where(Patient.id == -1)
        for query in (of("t1"), select(Patient.id).where(Patient.mrn == "t1-3"), select(Patient), none):
            with pytest.raises(NoTenantError, match=r"byok\.session"):
                session.scalars(query).all()
        assert session.scalar(select(func.count(Patient.id))) == 2 * ROWS
        session.add(Patient(id=5000, org="t3", mrn=None))
        session.flush()
        assert session.scalars(select(Patient.id).where(Patient.mrn.is_(None))).all() == [5000]
        for write in (
            insert(Patient).values(id=5001, org="t3", mrn="x"),
            update(Patient).where(Patient.id == 1).values(mrn="x"),
        ):
            with pytest.raises(NoTenantError):
                session.execute(write)
        session.add(Patient(id=5002, org="t3", mrn="x"))
        with pytest.raises(NoTenantError):
            session.flush()
    with data.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Patient)) == 2 * ROWS


def test_the_option_goes_before_the_block_before_the_only_tenant(
    tmp_path: Path, on_sqlite: Byok, kms_options: dict[str, Any]
) -> None:
    """Statement, then session or engine, then block, then single_tenant."""
    engine = create_engine(f"sqlite:///{tmp_path / 'single.db'}")
    keystore = f"sqlite:///{tmp_path / 'keystore.db'}"
    single = Byok(keystore, single_tenant="t1", **kms_options)
    single.attach(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Patient), [{"id": 1, "org": "t1", "mrn": "single"}])
        with single.tenant("t2"):
            connection.execute(insert(Patient), [{"id": 2, "org": "t2", "mrn": "block"}])
            given = {"byok_tenant": "t1"}
            connection.execute(
                insert(Patient), [{"id": 3, "org": "t1", "mrn": "option"}], execution_options=given
            )
        connection.execute(insert(Patient), [{"id": 4, "org": "t1", "mrn": "single again"}])
    assert owners(single, engine) == ["t1", "t2", "t1", "t1"]
    option = engine.execution_options(byok_tenant="t2")
    with option.connect() as connection, single.tenant("t1"):
        assert connection.scalar(of("t2")) == "block"
        assert connection.scalar(of("t1"), execution_options=given) == "single"
    single.close()
    engine.dispose()


def test_a_session_is_its_own_tenants_whatever_view_it_is_made_of(on_sqlite: Byok, sqlite: Engine) -> None:
    """byok.session("t1", …) over another tenant's view of the engine works for t1."""
    with on_sqlite.session("t1", sqlite.execution_options(byok_tenant="t2")) as session:
        session.add(Patient(id=1, org="t1", mrn="A"))
        session.commit()
    assert owners(on_sqlite, sqlite) == ["t1"]


def test_an_empty_name_is_not_nobody(on_sqlite: Byok, sqlite: Engine) -> None:
    """An application that computed "" must not fall back to another tenant."""
    for name, error in (("", ConfigurationError), (7, ConfigurationError), ("t3", UnknownTenantError)):
        with on_sqlite.tenant("t1"), sqlite.execution_options(byok_tenant=name).connect() as connection:
            for _ in range(2):
                with pytest.raises(error):
                    connection.execute(select(Patient.mrn))


# -- how far it reaches ----------------------------------------------------------------------------------------------


def test_a_session_keeps_its_tenant(byok: Byok, data: Engine) -> None:
    """Lazy loads, refresh, expired attributes, autoflush, flush and commits, inside another tenant's block too."""
    with byok.session("t1", data) as session, byok.tenant("t2"):
        patient = session.scalars(select(Patient).where(Patient.mrn == "t1-3")).one()
        assert [visit.code for visit in patient.visits] == ["t1-3-visit"]
        session.expire_all()
        assert patient.mrn == "t1-3"
        session.refresh(patient, ["mrn"])
        patient.mrn = "t1-new"
        assert session.scalars(select(Patient.id).where(Patient.mrn == "t1-new")).all() == [patient.id]
        session.commit()
        assert (patient.mrn, patient.visits[0].code) == ("t1-new", "t1-3-visit")
        session.rollback()
        assert session.get(Patient, patient.id, populate_existing=True) is patient


MEANWHILE: dict[str, Callable[[Byok, Session], Any]] = {
    "a block of the other": lambda byok, s: _within(byok.tenant("t2"), lambda: s.get_one(Patient, 1001)),
    "a block across": lambda byok, s: _within(
        byok.across(["t1", "t2"], actor="ada", reason="r"), lambda: s.get_one(Patient, 1001)
    ),
    "a sealed block": lambda byok, s: _within(
        byok.sealed(actor="ada", reason="r"), lambda: s.get_one(Patient, 1001)
    ),
    "the statement's option": lambda byok, s: s.get_one(
        Patient, 1001, execution_options={"byok_tenant": "t2"}
    ),
    "sealed by option": lambda byok, s: s.get_one(Patient, 1001, execution_options={"byok_sealed": True}),
}


def _within(block: Any, read: Callable[[], Any]) -> Any:
    with block:
        return read()


# A session's option goes before a tenant's block, which then reads nothing.
BY_OPTION = [how for how in MEANWHILE if how not in ("a block of the other", "a block across")]


@pytest.mark.parametrize(
    ("how", "by_option"), [*((how, False) for how in MEANWHILE), *((how, True) for how in BY_OPTION)]
)
@pytest.mark.parametrize("commits", [False, True], ids=["one transaction", "another"])
def test_what_was_read_meanwhile_is_not_written(
    byok: Byok, data: Engine, how: str, commits: bool, by_option: bool
) -> None:
    """Another tenant's row would be encrypted under the keys of the session's."""
    engine = data.execution_options(byok_tenant="t1") if by_option else data
    with byok.tenant("t1"), Session(engine, expire_on_commit=False) as session:
        session.scalars(select(Patient).where(Patient.mrn == "t1-0")).one()
        other = MEANWHILE[how](byok, session)
        if commits:
            session.commit()
        other.mrn = "stolen"
        with pytest.raises(TenantMismatchError, match="each tenant a session of its own"):
            session.flush()
    assert owners(byok, data) == [*["t1"] * ROWS, *["t2"] * ROWS]


def test_a_statement_that_names_its_tenant_updates_for_it(byok: Byok, data: Engine) -> None:
    """One after the other in one transaction, since nothing is carried from one to the next."""
    with data.begin() as connection:
        for tenant in ("t1", "t2", "t1"):
            option = {"byok_tenant": tenant}
            rows = connection.execute(
                select(Patient.id, Patient.mrn).where(Patient.org == tenant), execution_options=option
            )
            for id_, mrn in rows.all():
                connection.execute(
                    update(Patient.__table__).where(Patient.id == id_).values(mrn=f"{mrn}!"),  # type: ignore[arg-type]
                    execution_options=option,
                )
    assert owners(byok, data) == [*["t1"] * ROWS, *["t2"] * ROWS]


def test_a_statements_option_reaches_its_eager_loads_only(byok: Byok, data: Engine) -> None:
    """What a statement loads along has its tenant; what is loaded later has the session's, which is none."""
    query = select(Patient).where(Patient.mrn == "t1-3").execution_options(byok_tenant="t1")
    for eager in (selectinload, subqueryload):
        with Session(data) as session:
            patient = session.scalars(query.options(eager(Patient.visits))).one()
            assert [visit.code for visit in patient.visits] == ["t1-3-visit"]
    with Session(data) as session:
        patient = session.scalars(query).one()
        with pytest.raises(NoTenantError):
            _ = patient.visits
        patient.mrn = "changed"
        with pytest.raises(NoTenantError):  # the autoflush before it is not the statement's
            session.execute(select(Patient.id).execution_options(byok_tenant="t1"))


def test_a_sessions_connection_option_ends_with_the_transaction(byok: Byok, data: Engine) -> None:
    """session.connection(execution_options=…) holds for one transaction; Session(engine with option) for all."""
    with Session(data) as session:
        session.connection(execution_options={"byok_tenant": "t1"})
        assert session.scalar(of("t1")) == "t1-0"
        session.commit()
        with pytest.raises(NoTenantError):
            session.scalar(of("t1"))


def test_blocks_nest_and_threads_do_not_inherit(on_sqlite: Byok, sqlite: Engine) -> None:
    """Each block puts back what was before, also on an error; a new thread has no tenant."""
    byok = on_sqlite

    def write(id_: int) -> None:
        with sqlite.begin() as connection:
            connection.execute(insert(Patient).values(id=id_, org="x", mrn="x"))

    def refused() -> list[BaseException]:
        raised: list[BaseException] = []

        def run() -> None:
            try:
                write(100)
            except NoTenantError as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return raised

    one = byok.tenant("t1")
    with one:
        write(1)
        with byok.tenant("t2"):
            write(2)
            with one:  # a block may be entered again
                write(3)
            write(4)
            assert len(refused()) == 1
        with suppress(ZeroDivisionError), byok.tenant("t2"):
            raise ZeroDivisionError
        with pytest.raises(UnknownTenantError), byok.tenant("t3"):
            pass
        write(5)
    with pytest.raises(NoTenantError):
        write(6)
    assert owners(byok, sqlite) == ["t1", "t2", "t1", "t2", "t1"]


def test_one_block_object_in_many_threads(on_sqlite: Byok, sqlite: Engine) -> None:
    """byok.tenant(…) kept in a module and entered by threads in turns leaves each its own."""
    block, step = on_sqlite.tenant("t1"), threading.Barrier(2)
    found: list[str | None] = []

    def run(late: bool) -> None:
        if late:
            step.wait(10)
        with block:
            if not late:
                step.wait(10)
            step.wait(10)
        found.append(on_sqlite._blocks.current())

    threads = [threading.Thread(target=run, args=(late,)) for late in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [None, None]


def test_generators_that_leave_in_another_order(on_sqlite: Byok) -> None:
    """A block that is left early takes only its own tenant away, not the one that was entered later."""

    def work(tenant: str) -> Iterator[None]:
        with on_sqlite.tenant(tenant):
            yield

    first, second = work("t1"), work("t2")
    next(first)
    next(second)
    first.close()
    assert on_sqlite._blocks.current() == "t2"
    second.close()
    assert on_sqlite._blocks.current() is None


# -- results ---------------------------------------------------------------------------------------------------------

Fetch = Callable[[Byok, Engine], list[str]]


def _after_the_block(byok: Byok, engine: Engine) -> list[str]:
    with Session(engine) as session:
        with byok.tenant("t1"):
            result = session.execute(of("t1"))
        return [row[0] for row in result]


def _in_anothers_block(byok: Byok, engine: Engine) -> list[str]:
    with Session(engine) as session:
        with byok.tenant("t1"):
            result = session.execute(of("t1"))
        with byok.tenant("t2"):
            assert session.scalar(of("t2")) == "t2-0"
            return [row[0] for row in result]


def _in_another_thread(byok: Byok, engine: Engine) -> list[str]:
    found: list[str] = []
    with engine.execution_options(byok_tenant="t1").connect() as connection:
        result = connection.execute(of("t1"))
        thread = threading.Thread(target=lambda: found.extend(result.scalars()))
        thread.start()
        thread.join()
    return found


def _row_by_row(byok: Byok, engine: Engine) -> list[str]:
    with _both(engine) as (one, two):
        pairs = list(zip(one.execute(of("t1")), two.execute(of("t2")), strict=True))
    assert [other[0] for _, other in pairs] == mrns("t2")
    return [mine[0] for mine, _ in pairs]


def _streams_interleaved(byok: Byok, engine: Engine) -> list[str]:
    found: list[str] = []
    with _both(engine) as (one, two):
        options = {"stream_results": True, "yield_per": 2}
        mine = one.execution_options(**options).execute(of("t1")).partitions()
        theirs = two.execution_options(**options).execute(of("t2")).partitions()
        for a, b in zip(mine, theirs, strict=True):
            found += [row[0] for row in a]
            assert [row[0][:2] for row in b] == ["t2", "t2"]
    return found


def _yield_per_of_the_orm(byok: Byok, engine: Engine) -> list[str]:
    with Session(engine) as session:
        with byok.tenant("t1"):
            entities = session.scalars(
                select(Patient).where(Patient.org == "t1").order_by(Patient.id).execution_options(yield_per=2)
            )
        with byok.tenant("t2"):
            return [patient.mrn or "" for patient in entities]


def _yield_per_afterwards(byok: Byok, engine: Engine) -> list[str]:
    with engine.execution_options(byok_tenant="t1").connect() as connection:
        result = connection.execute(of("t1")).yield_per(2)
        with byok.session("t2", engine) as session:
            assert session.scalar(of("t2")) == "t2-0"
            return [row[0] for row in result]


def _mappings(byok: Byok, engine: Engine) -> list[str]:
    with engine.execution_options(byok_tenant="t1").connect() as connection:
        result = connection.execute(of("t1")).mappings()
        with byok.session("t2", engine) as session:
            assert session.scalar(of("t2")) == "t2-0"
        return [row["mrn"] for row in result]


def _frozen(byok: Byok, engine: Engine) -> list[str]:
    with engine.execution_options(byok_tenant="t1").connect() as connection:
        frozen = connection.execute(of("t1")).freeze()
    with byok.tenant("t2"):
        return list(frozen().scalars())


def _typed_text(byok: Byok, engine: Engine) -> list[str]:
    query = text("SELECT mrn FROM patient WHERE org = 't1' ORDER BY id").columns(Patient.__table__.c.mrn)
    with byok.session("t1", engine) as session:
        return list(session.scalars(query))


def _fetchmany(byok: Byok, engine: Engine) -> list[str]:
    with _both(engine) as (one, two):
        mine, theirs = one.execute(of("t1")), two.execute(of("t2"))
        found = [row[0] for row in mine.fetchmany(2)]
        assert theirs.fetchone()[0] == "t2-0"
        return found + [row[0] for row in mine.fetchall()]


class _both:  # noqa: N801 - reads as what it gives
    def __init__(self, engine: Engine) -> None:
        self.connections = [engine.execution_options(byok_tenant=t).connect() for t in ("t1", "t2")]

    def __enter__(self) -> list[Any]:
        return self.connections

    def __exit__(self, *exc: object) -> None:
        for connection in self.connections:
            connection.close()


@pytest.mark.parametrize(
    "fetch",
    [
        _after_the_block,
        _in_anothers_block,
        _in_another_thread,
        _row_by_row,
        _streams_interleaved,
        _yield_per_of_the_orm,
        _yield_per_afterwards,
        _mappings,
        _frozen,
        _typed_text,
        _fetchmany,
    ],
    ids=lambda fetch: fetch.__name__.strip("_").replace("_", " "),
)
def test_a_result_belongs_to_its_statement(on_sqlite: Byok, sqlite: Engine, fetch: Fetch) -> None:
    """However late, wherever and in whatever portions it is fetched."""
    _fill(on_sqlite, sqlite)
    assert fetch(on_sqlite, sqlite) == mrns("t1")


def _fill(byok: Byok, engine: Engine) -> None:
    for number, tenant in enumerate(("t1", "t2")):
        rows = [
            {"id": 1 + number * 1000 + n, "org": tenant, "mrn": mrn} for n, mrn in enumerate(mrns(tenant))
        ]
        with engine.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert(Patient), rows)


def test_results_of_two_tenants_on_every_driver(byok: Byok, data: Engine) -> None:
    """Buffered, streamed and in portions, as each driver does it."""
    for fetch in (_in_anothers_block, _row_by_row, _in_another_thread, _yield_per_of_the_orm):
        assert fetch(byok, data) == mrns("t1")
    if data.dialect.name != "sqlite":
        assert _streams_interleaved(byok, data) == mrns("t1")


def test_returning_belongs_to_its_statement(byok: Byok, data: Engine) -> None:
    """RETURNING of one row, of many and of the ORM's bulk insert, read while another tenant was read last."""
    if not data.dialect.insert_returning:
        pytest.fail("all three databases return from INSERT")
    read_t2 = of("t2")
    with byok.session("t1", data) as session:

        def distract() -> None:
            with byok.session("t2", data) as other:
                assert other.scalar(read_t2) == "t2-0"

        rows = [{"id": 6000 + n, "org": "t3", "mrn": f"many-{n}"} for n in range(20)]
        distract()
        values = insert(Patient).values([{"id": 5000, "org": "t3", "mrn": "x"}])
        assert session.scalars(values.returning(Patient.mrn)).all() == ["x"]
        distract()
        one = insert(Patient).values(id=5001, org="t3", mrn="y").returning(Patient)
        assert session.scalars(one).one().mrn == "y"
        distract()
        result = session.connection().execute(insert(Patient.__table__).returning(Patient.mrn), rows)
        distract()
        assert sorted(row[0] for row in result) == sorted(row["mrn"] for row in rows)
        distract()
        sorted_rows = [{**row, "id": 1000 + row["id"]} for row in rows]
        bulk = insert(Patient).returning(Patient, sort_by_parameter_order=True)
        found = session.scalars(bulk, sorted_rows)
        distract()
        assert [patient.mrn for patient in found] == [row["mrn"] for row in rows]


# -- statements inside statements ------------------------------------------------------------------------------------


class Nested(DeclarativeBase):
    pass


class Other(Nested):
    __tablename__ = "other"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))


class _Meddling(TypeDecorator[str]):
    """A type of the user's that runs statements of its own while values are bound."""

    impl = String(50)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        if value is not None:
            MEDDLE["now"]()
        return value


MEDDLE: dict[str, Callable[[], object]] = {"now": lambda: None}


def _default() -> int:
    MEDDLE["now"]()
    return 7


class Row(Nested):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    before: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    number: Mapped[int] = mapped_column(default=_default)
    note: Mapped[str | None] = mapped_column(_Meddling())
    mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))


ROW = Row.__table__.c


@pytest.mark.parametrize("where", ["same engine", "other engine", "other Byok"])
@pytest.mark.parametrize(
    "how", ["search", "write", "plain", "fails", "fails to compile", "unknown tenant", "nested"]
)
@pytest.mark.parametrize("note", [None, "note"], ids=["default", "default and type"])
def test_a_statement_of_another_tenant_inside_one(
    on_sqlite: Byok,
    sqlite: Engine,
    tmp_path: Path,
    customer_key: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    how: str,
    note: str | None,
) -> None:
    """A default or type that runs a statement for t2, even one that fails and is swallowed: the outer row is t1's."""
    byok, inner_byok = on_sqlite, on_sqlite
    inner, sqlite_too = sqlite, create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    if where == "other engine":
        inner = sqlite_too
        byok.attach(inner)
    elif where == "other Byok":
        inner = sqlite_too
        inner_byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
        inner_byok.attach(inner)
    Nested.metadata.create_all(sqlite)
    Nested.metadata.create_all(inner)

    def meddle() -> None:
        with suppress(ByokError, DBAPIError), inner_byok.tenant("t2"), Session(inner) as session:
            if how == "search":
                session.scalars(select(Other).where(Other.mrn == "x")).all()
            elif how == "write" and inner is not sqlite:  # SQLite has one writer
                session.add(Other(mrn="x"))
                session.commit()
            elif how == "plain":
                session.scalars(select(Other.id)).all()
            elif how == "fails":
                session.execute(text("SELECT * FROM nowhere"))
            elif how == "fails to compile":
                session.execute(select(Other.id).order_by(Other.mrn < "x"))
            elif how == "unknown tenant":
                session.execute(select(Other.id), execution_options={"byok_tenant": "t3"})
            else:
                session.scalars(select(Other).where(Other.mrn == "x")).all()
                with inner_byok.tenant("t1"):
                    session.scalars(select(Other).where(Other.mrn == "x")).all()

    monkeypatch.setitem(MEDDLE, "now", meddle)
    rows = [{"mrn": f"A-{n}", "before": "b", "note": note} for n in range(3)]
    refused: list[tuple[str | None, str | None]] = []
    with byok.tenant("t2"), byok.tenant("t1"), Session(sqlite) as session:
        try:
            session.execute(insert(Row), rows)
            session.add(Row(mrn="B", before="b", note=note))
            session.commit()
        except TenantMismatchError as error:
            refused.append((error.tenant, error.owner))
    for column in (ROW.before, ROW.mrn):
        found = owners(byok, sqlite, select(type_coerce(column, LargeBinary)))
        assert found == ([] if refused else ["t1"] * 4)
    if where != "same engine" or how in ("search", "write", "plain", "unknown tenant"):
        assert not refused
    assert refused in ([], [("t1", "t2")])
    with byok.session("t1", sqlite) as session:
        hashed = session.scalars(select(Row.mrn).where(Row.mrn.in_(["A-0", "A-1", "A-2", "B"]))).all()
        assert sorted(hashed) == ([] if refused else ["A-0", "A-1", "A-2", "B"])
    if inner_byok is not byok:
        inner_byok.close()
    sqlite_too.dispose()


def test_a_default_that_changes_the_tenant_does_not_change_its_statements(
    on_sqlite: Byok, sqlite: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement is its tenant's from its first parameter to its last, whatever runs in between."""
    Nested.metadata.create_all(sqlite)
    block = on_sqlite.tenant("t2")
    monkeypatch.setitem(MEDDLE, "now", block.__enter__)
    with on_sqlite.tenant("t1"), Session(sqlite) as session:
        session.add(Row(mrn="B"))
        session.flush()
        block.__exit__(None, None, None)
        session.commit()
    assert owners(on_sqlite, sqlite, select(type_coerce(ROW.mrn, LargeBinary))) == ["t1"]


# -- engines ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_was_not_attached_writes_nothing(byok: Byok, data: Engine) -> None:
    """NotAttachedError for reads and writes in any block, and never a value in the clear."""
    foreign = create_engine(data.url)
    with byok.tenant("t1"), Session(foreign) as session:
        with pytest.raises(NotAttachedError, match=r"Byok\.attach"):
            session.scalars(of("t1")).all()
        session.rollback()
        with pytest.raises(NotAttachedError):
            session.execute(insert(Patient).values(id=5000, org="t1", mrn="secret"))
        session.rollback()
        session.add(Patient(id=5000, org="t1", mrn="secret"))
        with pytest.raises(NotAttachedError):
            session.flush()
    with pytest.raises(NotAttachedError), byok.session("t1", foreign):
        pass
    with foreign.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Patient)) == 2 * ROWS
    foreign.dispose()


def test_an_attached_engine_lends_its_tenant_to_no_other(
    on_sqlite: Byok, sqlite: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a statement of an attached engine, a foreign engine's values are still refused."""
    foreign = create_engine(f"sqlite:///{tmp_path / 'foreign.db'}")
    for engine in (sqlite, foreign):
        Nested.metadata.create_all(engine)
    refused: list[str] = []

    def meddle() -> None:
        try:
            with foreign.begin() as connection:
                connection.execute(insert(Other).values(id=1, mrn="secret"))
        except NotAttachedError as error:
            refused.append(type(error).__name__)

    monkeypatch.setitem(MEDDLE, "now", meddle)
    with on_sqlite.session("t1", sqlite) as session:
        session.add(Row(mrn="A"))
        session.commit()
    with foreign.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Other)) == 0
    assert refused == ["NotAttachedError"]
    assert owners(on_sqlite, sqlite, select(type_coerce(ROW.mrn, LargeBinary))) == ["t1"]
    foreign.dispose()


def test_two_byoks_with_an_engine_each(
    on_sqlite: Byok, sqlite: Engine, tmp_path: Path, customer_key: Path
) -> None:
    """Two keystores with a tenant of the same name: nothing of one reads or finds what the other wrote."""
    other_engine = create_engine(sqlite.url)
    other = Byok(keystore=f"sqlite:///{tmp_path / 'other.db'}")
    other.create_keystore()
    other.onboard("t1", LocalKms(customer_key))
    other.attach(other_engine)
    for byok, engine, mrn in ((on_sqlite, sqlite, "one"), (other, other_engine, "two")):
        with byok.session("t1", engine) as session:
            session.add(Patient(org=mrn, mrn=mrn))
            session.commit()
    for byok, engine, mine, theirs in (
        (on_sqlite, sqlite, "one", "two"),
        (other, other_engine, "two", "one"),
    ):
        with byok.session("t1", engine) as session:
            assert session.scalars(select(Patient.org).where(Patient.mrn.in_(["one", "two"]))).all() == [mine]
            assert session.scalars(of(mine)).all() == [mine]
            with pytest.raises(ByokError, match="data key"):
                session.scalars(of(theirs)).all()
        with (
            pytest.raises(NotAttachedError),
            byok.session("t1", other_engine if engine is sqlite else sqlite),
        ):
            pass
    other.close()
    other_engine.dispose()


def test_one_byok_on_two_engines(on_sqlite: Byok, sqlite: Engine) -> None:
    """A primary and a replica read each other's rows."""
    replica = create_engine(sqlite.url)
    on_sqlite.attach(replica, sqlite)
    with on_sqlite.session("t1", sqlite) as session:
        session.add(Patient(org="t1", mrn="A"))
        session.commit()
    with on_sqlite.session("t1", replica) as session:
        assert session.scalars(of("t1").where(Patient.mrn == "A")).all() == ["A"]
    replica.dispose()


@pytest.mark.parametrize("late", [False, True], ids=["attached first", "attached last"])
@pytest.mark.parametrize("given", ["engine", "view"])
def test_attaching_an_engine_and_its_views(on_sqlite: Byok, sqlite: Engine, late: bool, given: str) -> None:
    """engine.execution_options() made before or after attaching, and attached itself, is the engine all the same."""
    engine = create_engine(sqlite.url)
    view = engine.execution_options(byok_tenant="t1")
    target = engine if given == "engine" else view
    if late:
        with view.connect() as connection, pytest.raises(NotAttachedError):
            connection.execute(insert(Patient).values(id=1, org="t1", mrn="x"))
    on_sqlite.attach(target)
    on_sqlite.attach(engine, view)
    with view.begin() as connection:
        connection.execute(insert(Patient).values(id=1, org="t1", mrn="A"))
    with view.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(insert(Patient).values(id=1, org="t1", mrn="A"))
    with engine.connect() as connection:
        assert connection.scalar(of("t1"), execution_options={"byok_tenant": "t1"}) == "A"
        with pytest.raises(NoTenantError):  # never with what the view's statements left behind
            connection.execute(insert(Patient).values(id=2, org="t1", mrn="B"))
        with pytest.raises(NoTenantError):
            connection.scalars(of("t1")).all()
    assert owners(on_sqlite, engine) == ["t1"]
    engine.dispose()


def test_an_open_connection_sees_the_attaching(on_sqlite: Byok, sqlite: Engine) -> None:
    """Attaching works for connections that were made before."""
    engine = create_engine(sqlite.url)
    with engine.connect() as connection:
        with pytest.raises(NotAttachedError):
            connection.execute(insert(Patient).values(id=1, org="t1", mrn="x"))
        connection.rollback()
        on_sqlite.attach(engine)
        with on_sqlite.tenant("t1"):
            connection.execute(insert(Patient).values(id=1, org="t1", mrn="A"))
            assert connection.scalars(of("t1").where(Patient.mrn == "A")).all() == ["A"]
    engine.dispose()


def test_a_second_byok_is_refused(on_sqlite: Byok, sqlite: Engine) -> None:
    """An engine has one Byok, and keeps the first."""
    other = Byok(keystore="sqlite://")
    for engine in (sqlite, sqlite.execution_options(byok_tenant="t1")):
        with pytest.raises(ConfigurationError, match="another Byok"):
            other.attach(engine)
    with on_sqlite.session("t1", sqlite) as session:
        assert session.scalars(of("t1")).all() == []
    other.close()


def test_attaching_twice_listens_once(on_sqlite: Byok, sqlite: Engine) -> None:
    """The hooks are there once, however often the engine is attached, with echo too."""
    engine = create_engine(sqlite.url, echo=True)
    on_sqlite.attach(engine)
    listeners = len(list(engine.dispatch.before_execute))
    on_sqlite.attach(engine, engine)
    assert len(list(engine.dispatch.before_execute)) == listeners
    engine.dispose()
