"""Text and literal columns: what they may name of the statement's own tables, and where a table can stand in SQL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from orm.test_guard import reached
from sqlalchemy import (
    Engine,
    ForeignKey,
    Integer,
    String,
    bindparam,
    case,
    column,
    create_engine,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, aliased, mapped_column

from sqla_byok import Byok, Encrypted, UnsupportedQueryError

CANARY = "plain-c4nary"


class Base(DeclarativeBase):
    pass


class W(Base):
    __tablename__ = "w_ward"
    id = mapped_column(Integer, primary_key=True, autoincrement=False)
    mrn = mapped_column(Encrypted(String(20), searchable=True))
    date = mapped_column(Encrypted(String(20)))
    note = mapped_column(String(20))


class V(Base):
    __tablename__ = "w_visit"
    id = mapped_column(Integer, primary_key=True, autoincrement=False)
    ward = mapped_column(ForeignKey(W.id))
    mrn = mapped_column(String(20))  # the same name, in plaintext


class Order(Base):
    __tablename__ = "order"
    id = mapped_column(Integer, primary_key=True)
    value = mapped_column(Encrypted(String(20)))


class User(Base):
    __tablename__ = "user"
    id = mapped_column(Integer, primary_key=True)
    key = mapped_column(Encrypted(String(20)))


t, v = W.__table__, V.__table__
NAMES = ["mrn", "w_ward.mrn", "lower(mrn)", "MRN", "mrn_hash", "id, mrn", "w_ward.date"]

# Each clause, given a text that stands for a value there.
CLAUSES: dict[str, Callable[[str], Any]] = {
    "columns": lambda it: select(W.id, text(it)),
    "columns, literal": lambda it: select(W.id, literal_column(it)),
    "a label": lambda it: select(W.id, literal_column(it).label("x")),
    "WHERE": lambda it: select(W.id).where(text(f"{it} = '{CANARY}'")),
    "WHERE, literal": lambda it: select(W.id).where(literal_column(it) == CANARY),
    "WHERE in EXISTS": lambda it: select(V.id).where(exists().where(W.id == V.ward, text(f"{it} = '{CANARY}'"))),
    "WHERE in IN": lambda it: select(V.id).where(V.ward.in_(select(W.id).where(text(f"{it} = 'x'")))),
    "WHERE in a CTE": lambda it: select(select(W.id).where(text(f"{it} = 'x'")).cte().c.id),
    "ORDER BY": lambda it: select(W.id).order_by(text(it)),
    "ORDER BY, literal": lambda it: select(W.id).order_by(literal_column(it).desc()),
    "GROUP BY": lambda it: select(func.count()).select_from(W).group_by(text(it)),
    "HAVING": lambda it: select(W.id).group_by(W.id).having(text(f"{it} = 'x'")),
    "ON": lambda it: select(W.id).join_from(t, v, text(f"{it} = 'x'")),
    "a function": lambda it: select(func.upper(text(it))).select_from(W),
    "CASE": lambda it: select(case((text(f"{it} = 'x'"), 1), else_=0)).select_from(W),
    "a window": lambda it: select(func.row_number().over(order_by=text(it))).select_from(W),
    "a prefix": lambda it: select(W.id).prefix_with(text(f"{it},")),
    "a suffix": lambda it: select(W.id).suffix_with(text(f"ORDER BY {it}")),
    "a statement's hint": lambda it: select(W.id).with_statement_hint(f"ORDER BY {it}"),
    "a table's hint": lambda it: select(W.id).with_hint(t, f"ORDER BY {it}"),
    "SET": lambda it: update(W).values(note=text(it)),
    "SET, literal": lambda it: update(W).values(note=literal_column(it)),
    "UPDATE WHERE": lambda it: update(W).where(text(f"{it} = 'x'")).values(note="x"),
    "DELETE WHERE": lambda it: delete(W).where(text(f"{it} = 'x'")),
    "RETURNING": lambda it: delete(W).returning(text(it)),
    "RETURNING, literal": lambda it: insert(W).values(id=9).returning(literal_column(it)),
    "a text SELECT": lambda it: select(W.id).where(
        W.id.in_(text(f"SELECT 1 WHERE {it} = 'x'").columns(column("id")))
    ),
}  # fmt: skip

_alias = aliased(W, name="wa")
_sub = select(W.id, W.mrn.label("m")).subquery("ws")

OTHERS: dict[str, Callable[[], Any]] = {
    "an alias, by its name": lambda: select(_alias.id).order_by(text("wa.mrn")),
    "an alias": lambda: select(_alias.id).order_by(text("mrn")),
    "an alias without a name": lambda: select(t.alias().c.id).order_by(text("w_ward_1.mrn")),
    "a subquery's label": lambda: select(_sub.c.id).order_by(text("ws.m")),
    "a label": lambda: select(W.id, W.mrn.label("m")).order_by(text("m")),
    "a label with another column's name": lambda: select(W.id, W.mrn.label("note")).order_by(text("note")),
    "a union's column": lambda: union_all(select(W.id, W.mrn), select(W.id, W.mrn)).order_by(text("mrn")),
    "a quoted name": lambda: select(W.id).order_by(literal_column('"mrn"')),
    "of the enclosing statement": lambda: select(W.id).where(exists(select(V.id).where(text("w_ward.mrn = 'x'")))),
}  # fmt: skip

FINE: dict[str, Callable[[], Any]] = {
    "a plaintext column": lambda: select(W.id).order_by(text("w_ward.note DESC, id")),
    "a position": lambda: select(W.id, W.note).order_by(text("2")),
    "in a string": lambda: select(W.id).where(text("note = 'mrn'")),
    "in a comment": lambda: select(W.id).where(text("note = 'x' /* mrn */")),
    "as a parameter": lambda: select(W.id).where(text("note = :mrn").bindparams(mrn="x")),
    "as a label": lambda: select(literal_column("1 AS mrn")),
    "as a type": lambda: select(literal_column("CAST(NULL AS date)")).select_from(W),
    "count(*)": lambda: select(literal_column("count(*)")).select_from(W),
    "the inner table's": lambda: select(W.id).where(exists(select(V.id).where(V.ward == W.id, text("mrn = 'x'")))),
    "the inner table's, by name": lambda: (
        select(W.id).where(exists(select(V.id).where(V.ward == W.id, text("w_visit.mrn = 'x'"))))
    ),
    "the other table's, by name": lambda: select(W.id).join_from(t, v).order_by(text("w_visit.mrn")),
    "a prefix that is a comment": lambda: select(W.id).prefix_with(text("/* mrn */")),
    "another database's hint": lambda: select(W.id).with_statement_hint("ORDER BY mrn", "oracle"),
    "a parameter's name": lambda: select(W.id).where(W.note == bindparam("mrn", "x")),
}  # fmt: skip


@pytest.fixture
def ready(engine: Engine, byok: Byok) -> Engine:
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def other(ready: Engine, byok: Byok) -> Iterator[Callable[..., Engine]]:
    """Another engine on the same database, attached in another way."""
    made: list[Engine] = []

    def attached(**options: Any) -> Engine:
        made.append(create_engine(ready.url))
        byok.attach(made[-1], **options)
        return made[-1]

    yield attached
    for one in made:
        one.dispose()


def _refusal(engine: Engine, byok: Byok, statement: Any, style: str = "Core") -> str | None:
    """What an engine says of a statement; None where it lets it run, whatever the database then says."""
    with byok.session("t1", engine) as session, reached(engine) as sent:
        try:
            (session if style == "ORM" else session.connection()).execute(statement)
        except UnsupportedQueryError as error:
            return f"sent {sent}" if sent or CANARY in str(error) else str(error)
        except Exception:
            return None
    return None


@pytest.mark.parametrize("raw_sql", ["refuse", "allow"])
def test_text_names_no_encrypted_column_of_its_statement(
    other: Callable[..., Engine], byok: Byok, raw_sql: str
) -> None:
    """In whatever clause it stands, whatever raw_sql says: the database would answer on ciphertext."""
    engine = other(raw_sql=raw_sql)
    ran = [
        (clause, name, style)
        for clause, build in CLAUSES.items()
        for name in NAMES
        for style in ("ORM", "Core")
        if "w_ward." not in (_refusal(engine, byok, build(name), style) or "")
    ]
    ran += [(name, "", "") for name, made in OTHERS.items() if not _refusal(engine, byok, made())]
    # On MariaDB "mrn" is a string, and PostgreSQL knows but one hint.
    elsewhere = {"mysql": "a quoted name", "mariadb": "a quoted name", "postgresql": "a table's hint"}
    ran = [each for each in ran if each[0] != elsewhere.get(engine.dialect.name)]
    assert ran == []


def test_text_in_upserts_names_no_encrypted_column(ready: Engine, byok: Byok) -> None:
    """In SET, WHERE and as the index that conflicts are found by."""
    if ready.dialect.name in ("mysql", "mariadb"):
        statements = [mysql.insert(W).values(id=1).on_duplicate_key_update(note=text("VALUES(mrn)"))]
    else:
        given = {"sqlite": sqlite, "postgresql": postgresql}[ready.dialect.name].insert(W).values(id=1)
        upsert = given.on_conflict_do_update
        statements = [
            upsert(index_elements=["id"], set_={"note": text("excluded.mrn")}),
            upsert(index_elements=["id"], set_={"note": "x"}, where=text("w_ward.mrn = 'x'")),
            given.on_conflict_do_nothing(index_elements=["id"], index_where=text("mrn = 'x'")),
        ]
    assert [one for one in statements if not _refusal(ready, byok, one)] == []


def test_text_that_names_none_is_fine(other: Callable[..., Engine], byok: Byok) -> None:
    """Plaintext columns, strings, comments, parameters and labels of an encrypted column's name."""
    engine = other(raw_sql="refuse")
    refused = {}
    for name, build in FINE.items():
        with byok.session("t1", engine) as session:
            try:
                session.execute(build()).all()
            except UnsupportedQueryError as error:
                refused[name] = str(error)
            except Exception as error:
                refused[name] = repr(error)
    assert refused == {}


def test_fragments_name_other_tables_as_raw_sql_says(other: Callable[..., Engine], byok: Byok) -> None:
    """A text within a statement that reads another table with encrypted columns is text like any other."""
    named = [
        select(V.id).where(text("EXISTS (SELECT 1 FROM w_ward)")),
        select(text("count(*)")).select_from(text("w_ward")),
        select(text("x.n")).select_from(text("w_visit, (SELECT count(*) AS n FROM w_ward) x")),
    ]
    refusing, allowing = other(raw_sql="refuse"), other(raw_sql="allow")
    assert [one for one in named if "textual SQL" not in (_refusal(refusing, byok, one) or "")] == []
    assert [one for one in named if _refusal(allowing, byok, one)] == []


# -- whole statements ------------------------------------------------------------------------------------------------

READING = [
    "SELECT * FROM w_ward",
    "select 1 from w_visit, w_ward w",
    "SELECT 1 FROM w_visit JOIN (w_ward w CROSS JOIN w_visit x) ON 1 = 1",
    "SELECT (SELECT max(id) FROM w_ward)",
    "SELECT 1 FROM ((w_ward))",
    "SELECT 1; DELETE FROM w_ward",
    "DROP TABLE IF EXISTS w_none; DELETE FROM w_ward",
    "TABLE w_ward",
    "(SELECT 1) UNION (TABLE w_ward)",
    "WITH w AS (SELECT 1) SELECT * FROM w, w_ward",
    "WITH w_ward AS (SELECT * FROM w_ward) SELECT 1 FROM w_ward",
    "WITH w_ward AS (SELECT 1) DELETE FROM w_ward",
    "INSERT INTO w_visit SELECT id, id, 'x' FROM w_ward",
    "UPDATE w_visit SET mrn = (SELECT note FROM w_ward LIMIT 1)",
    "UPDATE w_ward SET note = 'x'",
    "MERGE INTO w_ward USING w_visit ON 1 = 1 WHEN MATCHED THEN DELETE",
    "MERGE INTO w_visit USING w_ward ON 1 = 1 WHEN MATCHED THEN DELETE",
    "DELETE FROM w_visit USING w_ward WHERE 1 = 1",
    "EXPLAIN SELECT * FROM w_ward",
    "SELECT 'it''s' FROM w_ward",
    "SELECT 1 /* one */ FROM /* two */ w_ward",
    "SELECT 1 FROM w_ward -- one",
]
OF_A_DATABASE = {
    "sqlite": [
        'SELECT 1 FROM "order"',
        "SELECT 1 FROM [w_ward]",
        "SELECT 1 FROM main.w_ward",
        "INSERT OR REPLACE INTO w_ward (id) VALUES (1)",
        "UPDATE OR IGNORE w_ward SET note = 'x'",
        "REPLACE INTO w_ward (id) VALUES (1)",
    ],
    "postgresql": [
        'SELECT 1 FROM "user" u',
        "SELECT 1 FROM ONLY public.w_ward",
        "SELECT 1 FROM W_WARD",
        "COPY w_ward TO stdout",
        "DO $$ BEGIN DELETE FROM w_ward; END $$",
        "DECLARE c CURSOR FOR SELECT * FROM w_ward",
        "SELECT 1 FROM w_visit, LATERAL (SELECT 1 FROM w_ward) x",
        "SELECT E'it\\'s' FROM w_ward",
        "SELECT '\\' FROM w_ward",
    ],
    "mysql": [
        "SELECT 1 FROM `order`",
        "INSERT w_ward (id) VALUES (1)",
        "INSERT IGNORE INTO w_ward (id) VALUES (1)",
        "REPLACE w_ward (id) VALUES (1)",
        "UPDATE LOW_PRIORITY w_visit, w_ward SET w_visit.mrn = 'x'",
        "SELECT 1 /*!50000 FROM w_ward */",
        "SELECT 1--1 FROM w_ward",
        "SELECT 'it\\'s' FROM w_ward",
        "SELECT STRAIGHT_JOIN 1 FROM w_visit STRAIGHT_JOIN w_ward",
    ],
}
ELSEWHERE = [
    "SELECT 1 AS w_ward",
    "SELECT 'FROM w_ward'",
    "SELECT 1 -- FROM w_ward",
    "SELECT /* FROM w_ward */ 1",
    "SELECT id FROM w_visit ORDER BY id",  # there is a table named order
    "SELECT id FROM w_visit x WHERE x.id = 1",
    "SELECT mrn AS user, id AS date FROM w_visit",
    "WITH w_ward AS (SELECT 1 AS a) SELECT a FROM w_ward",
    "WITH RECURSIVE w_ward(a) AS (SELECT 1 UNION ALL SELECT a + 1 FROM w_ward WHERE a < 3) SELECT a FROM w_ward",
    "SELECT w_ward FROM (SELECT 1 AS w_ward) x",
    "DELETE FROM w_visit",
    "UPDATE w_visit SET mrn = 'x'",
    "CREATE TABLE w_made (w_ward int)",
    "DROP TABLE w_made",
]


def test_text_is_refused_where_a_table_can_stand(other: Callable[..., Engine], byok: Byok) -> None:
    """By position, in text() and exec_driver_sql(), in the forms of each database."""
    engine = other(raw_sql="refuse")
    engine.connect().close()
    kind = "mysql" if engine.dialect.name == "mariadb" else engine.dialect.name
    ran = []
    for sql in [*READING, *OF_A_DATABASE[kind]]:
        for run in ("execute", "exec_driver_sql"):
            with engine.connect() as connection, reached(engine) as sent:
                try:
                    getattr(connection, run)(text(sql.replace(":", "\\:")) if run == "execute" else sql)
                except UnsupportedQueryError:
                    assert sent == []
                else:
                    ran.append(sql)
    assert ran == []


def test_a_word_is_no_table_elsewhere(other: Callable[..., Engine], byok: Byok) -> None:
    """Keywords, aliases, strings, comments, CTEs and DDL with the name of a table that has encrypted columns."""
    engine = other(raw_sql="refuse")
    with engine.begin() as connection:
        for sql in ELSEWHERE:
            connection.execute(text(sql))


def test_a_table_with_a_keywords_name_warns_of_itself_only(
    ready: Engine, byok: Byok, caplog: pytest.LogCaptureFixture
) -> None:
    """A table named ``order`` is no reason to warn of each ORDER BY."""
    quote = ready.dialect.identifier_preparer.quote("order")
    with ready.connect() as connection, caplog.at_level(logging.WARNING, "sqla_byok.guard"):
        connection.execute(text("SELECT id FROM w_visit ORDER BY id")).all()
        connection.execute(select(V.id).order_by(text("id"))).all()
        assert caplog.records == []
        connection.execute(text(f"SELECT id FROM {quote} ORDER BY id")).all()
    assert len(caplog.records) == 1
