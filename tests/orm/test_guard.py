"""What would run on ciphertext is refused before it reaches the database; reports, text and hashes of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy
from keys_tools import TurnableClock
from orm.guard_forms import ENCRYPTED, MRN, REFUSED, REFUSED_ORM, SECRET, Refused, rows
from orm.search_forms import statements
from sqlalchemy import (
    Column,
    Engine,
    Executable,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    case,
    cast,
    column,
    create_engine,
    event,
    exists,
    func,
    insert,
    inspect,
    lambda_stmt,
    literal,
    literal_column,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import aliased
from sqlalchemy.sql import coercions, ddl, elements, roles

from sqla_byok import (
    Byok,
    ConfigurationError,
    Digest,
    Encrypted,
    LocalKms,
    NoTenantError,
    UnsupportedQueryError,
    search_hash,
)
from sqla_byok.orm import guard as guard_module

P, R = ENCRYPTED.P, ENCRYPTED.R
LOG = "sqla_byok.guard"
SQLALCHEMY_2_0 = sqlalchemy.__version__.startswith("2.0.")


@contextmanager
def reached(engine: Engine) -> Iterator[list[str]]:
    """The SQL that the cursor was given within the block."""
    engine.connect().close()  # the dialect's own questions come first
    sent: list[str] = []

    def listen(cursor: Any, statement: str, *rest: Any) -> None:
        sent.append(statement)

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, listen)
    yield sent
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.remove(engine, name, listen)


def _refused(engine: Engine, byok: Byok, form: Refused, style: str) -> None:
    with byok.session("t1", engine) as session:
        executes = session if style == "ORM" else session.connection()
        tables = (P, R) if style == "ORM" else (P.__table__.c, R.__table__.c)
        with reached(engine) as sent, pytest.raises(UnsupportedQueryError) as raised:
            executes.execute(form.build(*tables), {"q": SECRET})
        assert sent == []
    assert raised.value.column == form.column
    assert str(raised.value).startswith(f"{form.column}: ")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("style", ["ORM", "Core"])
def test_refused_forms_reach_no_database(engine: Engine, byok: Byok, style: str) -> None:
    """Every form that would run on ciphertext raises, names the column and a way out, and sends nothing."""
    wrong: dict[str, BaseException] = {}
    forms = {**REFUSED, **REFUSED_ORM} if style == "ORM" else REFUSED
    for name, form in forms.items():
        if name == "DELETE USING" and engine.dialect.name == "sqlite":
            continue  # it has no such statement
        try:
            _refused(engine, byok, form, style)
        except BaseException as error:
            wrong[name] = error
    assert wrong == {}


async def test_refused_forms_are_refused_on_async_engines(async_engine: AsyncEngine, abyok: Byok) -> None:
    """The same over AsyncSession."""
    missed = []
    async with abyok.asession("t1", async_engine) as session:
        for name, form in REFUSED.items():
            if name == "DELETE USING":
                continue
            try:
                await session.execute(form.build(P, R), {"q": SECRET})
            except UnsupportedQueryError:
                continue
            missed.append(name)
    assert missed == []


def test_lazy_loads_and_legacy_queries_are_walked(engine: Engine, byok: Byok) -> None:
    """A relationship ordered by ciphertext raises when it loads; Query and lambda statements like any other."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        for work in (
            lambda: session.get_one(P, 1).by_code,
            lambda: session.query(P).order_by(P.mrn).all(),
            lambda: session.query(P.mrn).distinct().all(),
            lambda: session.query(P).filter(func.lower(P.mrn) == "a").count(),
            lambda: session.execute(lambda_stmt(lambda: select(P.id).order_by(P.mrn))),
            lambda: session.execute(insert(P).values(id=9, mrn="z", note=select(P.nick).scalar_subquery())),
        ):
            with pytest.raises(UnsupportedQueryError):
                work()


def test_a_string_means_what_sqlalchemy_takes_it_for(engine: Engine, byok: Byok) -> None:
    """Of two tables with a column of one name it is the later one's, also where the other's is selected."""
    metadata = MetaData()
    plain = Table("g_plain", metadata, Column("id", Integer, primary_key=True), Column("memo", String(20)))
    stored = Table(
        "g_stored", metadata, Column("id", Integer, primary_key=True), Column("memo", Encrypted(String))
    )
    metadata.create_all(engine)
    statement = select(plain.c.id, plain.c.memo)
    with byok.tenant("t1"), engine.connect() as connection:
        for refused in (
            statement.join_from(plain, stored, plain.c.id == stored.c.id).order_by("memo"),
            statement.join_from(plain, stored, plain.c.id == stored.c.id).group_by("memo"),
            select(func.row_number().over(order_by="memo")).join_from(
                plain, stored, plain.c.id == stored.c.id
            ),
        ):
            with pytest.raises(UnsupportedQueryError) as raised:
                connection.execute(refused)
            assert raised.value.column == "g_stored.memo"
        connection.execute(
            statement.join_from(stored, plain, plain.c.id == stored.c.id).order_by("memo")
        ).all()


class Shout(elements.ColumnElement[str]):
    """An expression of one's own, which says nothing of its parts."""

    inherit_cache = False
    type = String()

    def __init__(self, *columns: Any) -> None:
        self.columns = columns


class Copy(Executable, elements.ClauseElement):
    """A statement of one's own, as in SQLAlchemy's documentation."""

    inherit_cache = False

    def __init__(self, table: Table, selected: Any) -> None:
        self.table, self.select = table, selected


@compiles(Shout)
def _shout(element: Shout, compiler: Any, **kwargs: Any) -> str:
    return f"upper({compiler.process(element.columns[0], **kwargs)})"


@compiles(Copy)
def _copy(element: Copy, compiler: Any, **kwargs: Any) -> str:
    return f"INSERT INTO {element.table.name} (id, note) {compiler.process(element.select, **kwargs)}"


def test_constructs_of_ones_own_are_walked(engine: Engine, byok: Byok) -> None:
    """An element or a statement that does not tell its parts is searched for what it holds."""
    ENCRYPTED.Base.metadata.create_all(engine)
    columns = P.__table__.c
    with byok.session("t1", engine) as session:
        for refused in (
            select(P.id).where(Shout(P.mrn) == SECRET),
            select(P.id).order_by(Shout(columns.mrn)),
            select(Shout(columns.mrn.label("x"))),
            select(P.id).where(Shout(columns.mrn)._annotate({"x": 1}) == SECRET),
            Copy(P.__table__, select(columns.id, columns.mrn)),
        ):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError) as raised:
                session.execute(refused)
            assert (sent, raised.value.column) == ([], MRN)
        session.execute(Copy(P.__table__, select(columns.id, columns.note).where(columns.mrn == "a")))
        assert (
            session.execute(
                select(Shout(columns.note)).where(P.mrn == "a").order_by(Shout(columns.note))
            ).all()
            == []
        )


def test_constructs_that_lead_back_to_themselves_are_walked_once(engine: Engine, byok: Byok) -> None:
    """A part that knows its whole, or an element that holds itself, is no endless walk."""
    ENCRYPTED.Base.metadata.create_all(engine)
    columns = P.__table__.c

    def looped(column: Any) -> Any:
        part = Shout(column)
        whole = Shout(part)
        part.columns = (column, whole, part)
        return whole

    def copied(column: Any) -> Any:
        statement: Any = Copy(P.__table__, select(columns.id, column).where(columns.mrn == "a"))
        statement.first = statement
        return statement

    with byok.session("t1", engine) as session:
        query = select(columns.id, looped(columns.note)).order_by(looped(columns.note))
        assert session.execute(query).all() == []
        session.execute(copied(columns.note))
        for refused in (query.order_by(looped(columns.mrn)), copied(columns.mrn)):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError) as raised:
                session.execute(refused)
            assert (sent, raised.value.column) == ([], MRN)


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
def test_full_text_search_is_refused(engine: Engine, byok: Byok) -> None:
    """MATCH … AGAINST keeps attributes as they were given, and no value is sent for an encrypted one."""
    with byok.session("t1", engine) as session:
        for criterion in (
            mysql.match(P.mrn, against=SECRET),
            mysql.match(P.note, P.mrn, against=SECRET),
            mysql.match(P.note, against=P.mrn),
            mysql.match(P.__table__.c.mrn, against=SECRET).in_boolean_mode(),
        ):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError) as raised:
                session.execute(select(P.id).where(criterion))
            assert (sent, raised.value.column) == ([], MRN)


def test_upserts_are_walked(engine: Engine, byok: Byok) -> None:
    """ON CONFLICT … WHERE and SET plain = excluded.encrypted are refused; RETURNING an expression too."""
    dialect: Any = {"sqlite": sqlite, "postgresql": postgresql}.get(engine.dialect.name)
    if dialect is None:
        pytest.skip("MariaDB has no ON CONFLICT; run this on another database")
    given = dialect.insert(P).values(id=1, mrn="a")
    upsert = given.on_conflict_do_update
    with byok.session("t1", engine) as session:
        for statement in (
            upsert(index_elements=["id"], set_={"note": given.excluded.mrn}),
            upsert(index_elements=["id"], set_={"note": "x"}, where=literal(SECRET) == P.__table__.c.mrn),
            given.returning(func.lower(P.mrn)),
        ):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError):
                session.execute(statement)
            assert sent == []


def test_returning_of_many_rows_is_walked(engine: Engine, byok: Byok) -> None:
    """The ORM's bulk INSERT keeps RETURNING in another statement than it compiles; executemany has it in one."""
    dialect: Any = {"sqlite": sqlite, "postgresql": postgresql}.get(engine.dialect.name)
    rows = [{"id": 8, "mrn": "a"}, {"id": 9, "mrn": "b"}]
    returned = (
        func.lower(P.mrn),
        cast(P.mrn, String).label("x"),
        literal_column("mrn"),
        text("g_patient.mrn"),
        literal(SECRET) == P.mrn,
        Shout(P.mrn),
    )
    ENCRYPTED.Base.metadata.create_all(engine)
    for element in returned:
        for table_ in (P, P.__table__):
            statements = [
                insert(table_).returning(element),
                insert(table_).returning(P.id, element),
                insert(table_).returning(P.id, element, sort_by_parameter_order=True),
            ]
            if dialect is not None:
                given = dialect.insert(table_)
                set_ = {"note": given.excluded.note}
                statements.append(
                    given.on_conflict_do_update(index_elements=["id"], set_=set_).returning(element)
                )
            for statement in statements:
                with byok.session("t1", engine) as session:
                    executes: Any = session if table_ is P else session.connection()
                    with reached(engine) as sent, pytest.raises(UnsupportedQueryError):
                        executes.execute(statement, rows)
                    assert sent == []
    if dialect is not None:
        with byok.session("t1", engine) as session:
            fine = insert(P).returning(P, P.mrn, P.mrn.is_(None), sort_by_parameter_order=True)
            assert [row.mrn for row in session.execute(fine, rows)] == ["a", "b"]


def test_a_statement_is_walked_once(engine: Engine, byok: Byok, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached statement costs no walk, refused or not."""
    ENCRYPTED.Base.metadata.create_all(engine)
    walks = []
    top = guard_module._Walk.top
    monkeypatch.setattr(guard_module._Walk, "top", lambda self, it: (walks.append(it), top(self, it))[1])
    with byok.session("t1", engine) as session:
        for value in ("a", "b", "c"):
            session.scalars(select(P).where(P.mrn == value)).all()
            with pytest.raises(UnsupportedQueryError):
                session.scalars(select(P).where(P.note == value).order_by(P.mrn))
    assert len(walks) == 2


def test_without_a_tenant_the_guard_is_there_too(engine: Engine, byok: Byok) -> None:
    """A statement that neither encrypts nor decrypts is walked, though it needs no tenant."""
    with engine.connect() as connection, pytest.raises(UnsupportedQueryError):
        connection.execute(select(P.id).order_by(P.mrn))


# -- look-ups beside GROUP BY ----------------------------------------------------------------------------------------


def _grouped(entity: Any) -> dict[str, Any]:
    """Look-ups in a statement that groups by the key and by what is looked up."""
    found, key = entity.mrn == "b", (entity.id, entity.mrn)
    return {
        "HAVING": select(entity.id).group_by(*key).having(found),
        "HAVING, in an expression": select(entity.id).group_by(*key).having(case((found, 1), else_=0) == 1),
        "HAVING, negated": select(entity.id).group_by(*key).having(~(entity.mrn != "b")),
        "HAVING, in a list": select(entity.id).group_by(*key).having(entity.mrn.in_(["b", "x"])),
        "HAVING, correlated": (
            select(entity.id)
            .group_by(*key)
            .having(exists(select(R.id).where(R.mrn == entity.mrn, R.id == 2)))
        ),
        "columns": select(entity.id, found).group_by(*key).order_by(found.desc()).limit(1),
        "ORDER BY": select(entity.id).group_by(*key).order_by(case((found, 0), else_=1)).limit(1),
    }


def _entity(kind: str) -> Any:
    if kind == "a class":
        return P
    if kind == "an alias":
        return aliased(P)
    return aliased(P, select(P).subquery() if kind == "a subquery" else select(P).cte())


def _said(session: Any, statement: Any) -> str | None:
    try:
        session.execute(statement)
    except UnsupportedQueryError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["a class", "an alias", "a subquery", "a CTE"])
def test_a_look_up_beside_group_by_is_right_or_refused(engine: Engine, byok: Byok, kind: str) -> None:
    """Where the database would not know the hash it says what to group by, and by that the statement works."""
    ENCRYPTED.Base.metadata.create_all(engine)
    entity = _entity(kind)
    refused = []
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.commit()
        for name, statement in _grouped(entity).items():
            with_hash = session.execute(statement.group_by(search_hash(entity.mrn))).all()
            assert [row[0] for row in with_hash] == [2], name
            if (why := _said(session, statement)) is None:
                assert [row[0] for row in session.execute(statement).all()] == [2], name
            else:
                assert why.startswith(f"{MRN}: "), why
                assert why.endswith("add search_hash(column) to group_by()"), why
                refused.append(name)
    having = [name for name in _grouped(entity) if name.startswith("HAVING")]
    derived = kind in ("a subquery", "a CTE")
    expected = {"sqlite": [], "postgresql": list(_grouped(entity)) if derived else []}.get(
        engine.dialect.name, having
    )
    if engine.dialect.name == "postgresql" and derived:
        expected.remove("HAVING, correlated")
        refused = [name for name in refused if name != "HAVING, correlated"]
    assert refused == expected


def test_what_an_aggregate_is_over_needs_no_group(engine: Engine, byok: Byok) -> None:
    """Look-ups within aggregate functions, in WHERE, and of tables in subqueries of HAVING are as they were."""
    ENCRYPTED.Base.metadata.create_all(engine)
    inner = aliased(P, select(P).subquery())
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.commit()
        for statement in (
            select(P.n).group_by(P.n).having(func.max(case((P.mrn == "b", 1), else_=0)) == 1),
            select(inner.n).group_by(inner.n).having(func.sum(case((inner.mrn == "b", 1), else_=0)) == 1),
            select(P.n).where(P.mrn == "b").group_by(P.n),
            select(P.n).group_by(P.n).having(exists(select(R.id).where(R.mrn == "b"))).order_by(P.n).limit(1),
            select(P.n, func.count(case((P.mrn == "b", 1)))).group_by(P.n).order_by(P.n).limit(1),
        ):
            assert [row[0] for row in session.execute(statement).all()] == [1]


# -- guard="report" --------------------------------------------------------------------------------------------------


@pytest.fixture
def reporting(engine: Engine, byok: Byok) -> Iterator[Engine]:
    """Another engine on the same database, attached with guard="report"."""
    ENCRYPTED.Base.metadata.create_all(engine)
    other = create_engine(engine.url)
    byok.attach(other, guard="report")
    yield other
    other.dispose()


def test_a_report_lets_statements_run(
    reporting: Engine, byok: Byok, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind is logged once, without values, and counted by column; the statement runs."""
    with byok.session("t1", reporting) as session, caplog.at_level(logging.WARNING, LOG):
        for number in (1, 2):
            session.execute(select(P.id).where(P.n == number).order_by(P.mrn))
        session.execute(select(P.note).order_by(P.mrn))
        session.execute(select(func.substr(P.nick, 1, 3)))
        session.execute(select(func.length(P.sec)))
    assert [record.name for record in caplog.records] == [LOG] * 3
    report = byok.guard_report()
    assert {column: list(found.values()) for column, found in report.items()} == {
        MRN: [2],
        "g_patient.nick": [1],
        "g_patient.sec": [1],
    }
    assert all(message.startswith(f"{column}: ") for column, found in report.items() for message in found)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda: literal(SECRET) == P.mrn,
        lambda: literal(SECRET) == search_hash(P.mrn),
        lambda: func.lower(P.mrn) == SECRET,
        lambda: literal(SECRET).between(P.mrn, P.sec),
    ],
)
def test_a_report_sends_no_plaintext(reporting: Engine, byok: Byok, criterion: Any) -> None:
    """A comparison that would carry a value past the type is refused even then."""
    with byok.session("t1", reporting) as session, reached(reporting) as sent:
        with pytest.raises(UnsupportedQueryError):
            session.execute(select(P.id).where(criterion()))
        assert sent == []


def test_other_words_are_refused(byok: Byok) -> None:
    """A typing error does not turn the guard off."""
    engine = create_engine("sqlite://")
    for options in ({"guard": "off"}, {"raw_sql": "no"}):
        with pytest.raises(ConfigurationError):
            byok.attach(engine, **options)  # type: ignore[arg-type]


# -- text ------------------------------------------------------------------------------------------------------------

NAMING = [
    "SELECT mrn FROM g_patient",
    'select p.mrn from "G_PATIENT" p',
    "WITH x AS (SELECT 1) SELECT * FROM x, g_patient",
    "UPDATE g_patient SET note = 'x'",
    "DELETE FROM g_patient",
    "INSERT INTO g_patient (id) SELECT 1",
    "/* hint */ SELECT 1 FROM g_visit",
]
NOT_NAMING = [
    "SELECT 'g_patient'",
    "SELECT 1 -- g_patient",
    "SELECT /* g_patient */ 1",
    "SELECT 1 AS g_patient_count",
    "DROP TABLE IF EXISTS g_nothing",
    "CREATE TABLE g_copy (g_patient int)",
]


@pytest.fixture
def refusing(engine: Engine, byok: Byok) -> Iterator[Engine]:
    """Another engine on the same database, attached with raw_sql="refuse"."""
    ENCRYPTED.Base.metadata.create_all(engine)
    other = create_engine(engine.url)
    byok.attach(other, raw_sql="refuse")
    yield other
    other.dispose()


def test_text_that_names_a_protected_table_is_refused(refusing: Engine, byok: Byok) -> None:
    """By tokens, in text(), in exec_driver_sql() and within a statement; strings, comments and DDL do not count."""
    namesake = Table(
        "note", MetaData(), Column("x", Encrypted(String))
    )  # as a plain column of the statement's table
    assert namesake.c.x.type.column_id == "note.x"
    with refusing.connect() as connection:
        for sql in NAMING:
            with reached(refusing) as sent:
                with pytest.raises(UnsupportedQueryError, match="textual SQL"):
                    connection.execute(text(sql))
                with pytest.raises(UnsupportedQueryError, match="textual SQL"):
                    connection.exec_driver_sql(sql)
                assert sent == []
        for sql in NOT_NAMING:
            connection.execute(text(sql))
        connection.exec_driver_sql("SELECT 1")
        for statement in (
            select(P.id).order_by(text("mrn")),
            select(P).from_statement(text("SELECT * FROM g_patient")),
            select(text("count(*)")).select_from(text("g_patient")),
        ):
            with pytest.raises(UnsupportedQueryError, match="textual SQL"):
                connection.execute(statement)
        with byok.tenant("t1"):
            connection.execute(select(P.id).order_by(text("note"), text("g_patient.n"))).all()


def _template(*parts: Any) -> Any:
    """What tstring() makes of a template string, which takes Python 3.14 to write."""
    template = elements.TString.__new__(elements.TString)  # type: ignore[attr-defined]
    template.parts = [
        elements._TStringText(part)
        if isinstance(part, str)
        else coercions.expect(roles.ExpressionElementRole, part)  # type: ignore[attr-defined]
        for part in parts
    ]
    return template


@pytest.mark.skipif(SQLALCHEMY_2_0, reason="template strings are new in SQLAlchemy 2.1; use 2.1")
def test_a_template_string_is_text(refusing: Engine, byok: Byok) -> None:
    """Also where the names come from the columns that are put into it."""
    mrn, note = P.__table__.c.mrn, P.__table__.c.note
    with refusing.connect() as connection, byok.tenant("t1"):
        for statement in (
            _template("SELECT mrn FROM g_patient WHERE mrn = ", literal(SECRET)),
            select(P.id).order_by(_template("", mrn, " DESC")),
            _template("SELECT * FROM (", select(mrn).scalar_subquery(), ") ORDER BY mrn, g_patient"),
            select(P.id).where(_template("lower(", mrn, ") = ", literal(SECRET))),
            select(P.id).order_by(_template("", func.lower(mrn))),
        ):
            with reached(refusing) as sent, pytest.raises(UnsupportedQueryError, match="textual SQL"):
                connection.execute(statement)
            assert sent == []
        connection.execute(select(P.id).where(_template("lower(", note, ") = ", literal("x")))).all()
        connection.execute(_template("SELECT ", literal(1))).all()


@pytest.mark.skipif(SQLALCHEMY_2_0, reason="CREATE VIEW is new in SQLAlchemy 2.1; use 2.1")
def test_views_are_walked(engine: Engine, byok: Byok) -> None:
    """The SELECT of a CREATE VIEW or CREATE TABLE AS is refused as it would be by itself."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for create, selected in (
            (ddl.CreateView, select(P.mrn).distinct()),  # type: ignore[attr-defined]
            (ddl.CreateView, select(P.id).order_by(P.mrn)),  # type: ignore[attr-defined]
            (ddl.CreateTableAs, select(select(func.count().label("c")).group_by(P.mrn).subquery())),  # type: ignore[attr-defined]
        ):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError, match=r"g_patient\.mrn: "):
                connection.execute(create(selected, "g_made"))
            assert sent == []
        view = ddl.CreateView(select(P.id, P.note), "g_made")  # type: ignore[attr-defined]
        connection.execute(view)
        assert connection.execute(select(view.table)).all() == []
        connection.execute(text("DROP VIEW g_made"))


def test_inspection_and_ddl_are_left_alone(refusing: Engine) -> None:
    """Reflection, CREATE, DROP and has_table work with raw_sql="refuse"."""
    inspector = inspect(refusing)
    assert {"g_patient", "g_visit"} <= set(inspector.get_table_names())
    assert "mrn_hash" in {found["name"] for found in inspector.get_columns("g_patient")}
    inspector.get_indexes("g_patient")
    inspector.get_unique_constraints("g_patient")
    inspector.get_foreign_keys("g_visit")
    with refusing.begin() as connection:
        connection.execute(text("ALTER TABLE g_patient ADD COLUMN extra INTEGER"))
    ENCRYPTED.Base.metadata.drop_all(refusing)
    ENCRYPTED.Base.metadata.create_all(refusing)


def test_text_warns_once(engine: Engine, byok: Byok, caplog: pytest.LogCaptureFixture) -> None:
    """By default a text is logged once, without its values, and runs."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with engine.connect() as connection, caplog.at_level(logging.WARNING, LOG):
        for _ in range(3):
            connection.execute(text(f"SELECT id FROM g_patient WHERE note = '{SECRET}'")).all()
            connection.exec_driver_sql("SELECT id FROM g_patient").all()
    assert len(caplog.records) == 2
    assert SECRET not in caplog.text


def test_text_can_be_allowed(engine: Engine, byok: Byok, caplog: pytest.LogCaptureFixture) -> None:
    """raw_sql="allow" says nothing."""
    ENCRYPTED.Base.metadata.create_all(engine)
    other = create_engine(engine.url)
    byok.attach(other, raw_sql="allow")
    with other.connect() as connection, caplog.at_level(logging.WARNING, LOG):
        connection.execute(text("SELECT id FROM g_patient")).all()
    other.dispose()
    assert caplog.records == []


def test_light_tables_of_other_names_are_free(engine: Engine, byok: Byok) -> None:
    """table() and column() are refused for encrypted columns of protected tables only."""
    ENCRYPTED.Base.metadata.create_all(engine)
    light = table("g_patient", column("id"), column("note"), column("mrn"))
    with engine.begin() as connection:
        connection.execute(update(light).where(light.c.id == 1).values(note="x"))
        assert connection.execute(select(func.count()).select_from(light)).scalar() == 0
        assert connection.execute(select(light.c.id, light.c.note)).all() == []
        with pytest.raises(UnsupportedQueryError, match=r"table\(\)"):
            connection.execute(insert(light), [{"id": 1, "mrn": SECRET}, {"id": 2, "mrn": SECRET}])


# -- hashes of one's own ---------------------------------------------------------------------------------------------


def test_search_hash_groups_and_counts(engine: Engine, byok: Byok) -> None:
    """Grouping and counting by value, on the attribute, a column and an alias."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        other = aliased(P)
        for of in (P, P.__table__.c, other):
            found = search_hash(of.nick)
            counts = session.execute(select(found, func.count()).group_by(found)).all()
            assert sorted((type(one) is Digest, count) for one, count in counts) == [(False, 1), (True, 2)]
            assert session.scalar(select(func.count(found.distinct()))) == 1
        with pytest.raises(UnsupportedQueryError, match="searchable=True"):
            search_hash(P.sec)
        with pytest.raises(UnsupportedQueryError, match="there too"):
            search_hash(select(P.nick).subquery().c.nick)
    with engine.connect() as connection, pytest.raises(NoTenantError, match="groups by search hashes"):
        connection.execute(select(func.count()).group_by(search_hash(P.nick)))


def test_a_hash_for_handwritten_sql_finds_the_row(engine: Engine, byok: Byok) -> None:
    """Byok.hash() and Byok.hashes() are what the hash column holds, for text and for the column."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session, byok.tenant("t1"):
        session.add_all(rows(ENCRYPTED))
        session.flush()
        digest = byok.hash(P.mrn, "b")
        by_text = text("SELECT id FROM g_patient WHERE mrn_hash = :mrn")
        assert session.scalars(by_text, {"mrn": digest}).all() == [2]
        assert session.scalars(select(P.id).where(search_hash(P.mrn) == digest)).all() == [2]
        many = text("SELECT id FROM g_patient WHERE mrn_hash IN :mrn").bindparams(
            bindparam("mrn", expanding=True)
        )
        assert session.scalars(many, {"mrn": byok.hashes(P.__table__.c.mrn, "b")}).all() == [2]
        with pytest.raises(UnsupportedQueryError, match="NULL"):
            byok.hash(P.mrn, None)
        with pytest.raises(UnsupportedQueryError, match="searchable=True"):
            byok.hash(P.sec, "x")
    with pytest.raises(NoTenantError):
        byok.hash(P.mrn, "b")


async def test_hashes_from_asyncio(async_engine: AsyncEngine, abyok: Byok) -> None:
    """The async twins open a cold tenant without blocking."""
    async with abyok.tenant("t1"):
        assert [await abyok.ahash(P.mrn, "b")] == await abyok.ahashes(P.mrn, "b")


def test_while_salts_are_rotated_hashes_do_not_lie(
    engine: Engine, tmp_path: Any, local_kms: LocalKms
) -> None:
    """A value has two hashes then: grouping and hash() are refused, hashes() gives both, and look-ups go on."""
    ENCRYPTED.Base.metadata.create_all(engine)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'rotating.db'}", clock=TurnableClock())
    byok.create_keystore()
    byok.attach(engine)
    byok.onboard("t1", local_kms)
    with byok.session("t1", engine) as session:
        session.add(P(id=1, mrn="a", nick="ada"))
        session.commit()
    byok.rotate_salt("t1")
    with byok.session("t1", engine) as session, byok.tenant("t1"):
        session.add(P(id=2, mrn="b", nick="ada"))
        session.commit()
        assert session.scalars(select(P.id).where(P.nick == "ada").order_by(P.id)).all() == [1, 2]
        found = search_hash(P.nick)
        for statement in (
            select(func.count()).group_by(found),
            select(found).distinct(),
            select(func.count(found.distinct())),
            select(func.row_number().over(partition_by=found)),
            select(search_hash(P.nick)).union(select(search_hash(P.nick))),
        ):
            with statements(engine), pytest.raises(UnsupportedQueryError, match="being rotated"):
                session.execute(statement)
        with pytest.raises(UnsupportedQueryError, match="hashes"):
            byok.hash(P.nick, "ada")
        both = byok.hashes(P.nick, "ada")
        many = text("SELECT id FROM g_patient WHERE nick_hash IN :h ORDER BY id")
        many = many.bindparams(bindparam("h", expanding=True))
        assert session.scalars(many, {"h": both}).all() == [1, 2]
        assert len(both) == 2
        assert session.scalars(select(P).distinct().order_by(P.id)).all()
    byok.close()
