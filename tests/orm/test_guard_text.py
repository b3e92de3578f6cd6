"""Text and literal columns: what they may name of the statement's own tables, and where a table can stand in SQL."""

from __future__ import annotations

import logging
import warnings
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
    cast,
    column,
    create_engine,
    delete,
    distinct,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    true,
    tuple_,
    type_coerce,
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


SPELLED = {
    "": ["substring(mrn FROM 1)", "overlay(mrn, 1)", "trim(mrn FROM 'x')", "1 <> mrn", "0 IN (mrn)"],
    "sqlite": ["w_ward.'mrn'", "'w_ward'.'mrn'", "mrn 'alias'", "mrn ->> 'x'"],
    "postgresql": [
        "mrn::text", "mrn ::text", "w_ward.mrn::bytea", "(w_ward).mrn", "'x' @@mrn", "mrn @@to_tsquery('x')", "@mrn",
        'U&"m\\0072n"', 'w_ward.u&"mr!006e" UESCAPE \'!\'',
    ],
    "mysql": ["mrn 'alias'", "w_ward.`mrn`"],
}  # fmt: skip


def test_no_spelling_of_a_column_is_missed(ready: Engine, byok: Byok) -> None:
    """Casts, operators, special syntax, strings and escapes that a database takes for the column."""
    kind = "mysql" if ready.dialect.name == "mariadb" else ready.dialect.name
    ran = [
        it
        for it in [*SPELLED[""], *SPELLED[kind]]
        if not _refusal(ready, byok, select(text(it)).select_from(W))
    ]
    assert ran == []


# -- whole rows and positions ----------------------------------------------------------------------------------------

_visited = select(W.id, W.mrn.label("m")).subquery("v")

ROWS: dict[str, Callable[[], Any]] = {
    "cast": lambda: select(W.id).where(text(f"w_ward::text LIKE '%{CANARY}%'")),
    "cast, apart": lambda: select(W.id).where(text(f"w_ward ::text LIKE '%{CANARY}%'")),
    "a literal column": lambda: (
        select(W.id).where(func.to_jsonb(literal_column("w_ward")).op("->>")("mrn") == CANARY)
    ),
    "quoted": lambda: select(W.id).where(func.to_jsonb(literal_column('"w_ward"')).op("->>")("mrn") == CANARY),
    "column()": lambda: select(W.id).where(cast(column("w_ward"), String).like(CANARY)),
    "selected": lambda: select(literal_column("w_ward")).select_from(W),
    "an alias": lambda: select(_alias.id).where(func.to_jsonb(literal_column("wa")).op("->>")("mrn") == CANARY),
    "an alias without a name": lambda: select(t.alias().c.id).where(text("w_ward_1::text = 'x'")),
    "a subquery": lambda: select(func.count(distinct(literal_column("v")))).select_from(_visited),
    "a subquery without a name": lambda: select(select(W.mrn).subquery().c.mrn).where(text("anon_1::text = 'x'")),
    "a CTE": lambda: (lambda cte: select(cte.c.id).order_by(text("lots")))(select(W.id, W.mrn).cte("lots")),
    "of the enclosing statement": lambda: select(W.id).where(exists(select(V.id).where(text("w_ward::text = 'x'")))),
    "a function's notation": lambda: select(W.id).order_by(text("mrn(w_ward)")),
    "a composite": lambda: select(W.id).where(text("(w_ward).mrn = 'x'")),
    "md5": lambda: select(func.md5(cast(text("w_ward"), String))).select_from(W),
    "all columns": lambda: select(W.id).where(text("(w_ward.*)::text = 'x'")),
    "all columns, with a schema": lambda: select(W.id).where(text("(public.w_ward.*)::text = 'x'")),
    "in a join": lambda: select(V.id).join_from(v, t).order_by(text("w_ward")),
    "GROUP BY": lambda: select(func.count()).select_from(W).group_by(text("w_ward")),
    "UPDATE": lambda: update(W).where(text("w_ward::text = 'x'")).values(note="x"),
    "RETURNING": lambda: delete(W).returning(text("w_ward::text")),
    "excluded": lambda: (
        postgresql.insert(W)
        .values(id=1)
        .on_conflict_do_update(index_elements=["id"], set_={"note": text("excluded::text")})
    ),
}  # fmt: skip


def test_a_name_may_stand_for_a_whole_row(engine: Engine, byok: Byok) -> None:
    """To PostgreSQL a table's name is its row, ciphertext included; in other databases it is no expression."""
    _only_postgresql(engine)
    Base.metadata.create_all(engine)
    said = {name: _refusal(engine, byok, build()) for name, build in ROWS.items()}
    assert [name for name, refusal in said.items() if not (refusal or "").startswith("w_ward.mrn: ")] == []


class Named(Base):
    __tablename__ = "w_named"
    id = mapped_column(Integer, primary_key=True, autoincrement=False)
    w_named = mapped_column(String(20))
    secret = mapped_column(Encrypted(String(20)))


NO_ROWS: dict[str, Callable[[], Any]] = {
    "a column of the table's": lambda: select(W.id).where(text("w_ward.id = 1")).order_by(text("w_ward.note")),
    "a column with the table's name": lambda: select(Named.id).order_by(text("w_named")),
    "that column of column()": lambda: select(column("w_named")).select_from(Named),
    "another table's": lambda: select(V.id).where(exists(select(W.id))).order_by(text("w_visit.id")),
    "in a FROM of the text": lambda: select(W.id).where(text("EXISTS (SELECT 1 FROM w_ward x WHERE x.id = w_ward.id)")),
    "a keyword": lambda: select(User.id).where(text("'x' = user")),
    "a label": lambda: select(W.id, func.length(W.note).label("w_ward")).order_by(text("w_ward")),
    "as a string": lambda: select(W.id).where(text("note = 'w_ward'")),
    "of a table in plaintext": lambda: select(func.count(text("w_visit.id"))).select_from(V),
}  # fmt: skip


def test_a_tables_name_is_no_row_elsewhere(ready: Engine, byok: Byok) -> None:
    """Before a dot, as a column of its own, in the text's FROM, as a keyword: no reason to refuse."""
    forms = {name: build for name, build in NO_ROWS.items() if name != "a keyword"}
    if ready.dialect.name == "postgresql":
        forms = NO_ROWS
    said = {}
    for name, build in forms.items():
        with byok.session("t1", ready) as session:
            try:
                session.execute(build()).all()
            except Exception as error:
                said[name] = repr(error)
    assert said == {}


def test_a_star_names_all_columns(ready: Engine, byok: Byok) -> None:
    """Selected as text it is read past the types, and may be compared around them; in count() and EXISTS it is not."""
    refused = [
        select(text("*")).select_from(W),
        select(literal_column("w_ward.*")).select_from(W),
        select(W.id).prefix_with(text("*,")),
        select(func.count()).select_from(select(text("*")).select_from(W).distinct().subquery()),
    ]
    assert [one for one in refused if not _refusal(ready, byok, one)] == []
    with byok.session("t1", ready) as session:
        for fine in (
            select(func.count(literal_column("*"))).select_from(W),
            select(literal_column("count(*)")).select_from(W),
            select(V.id).where(exists().where(W.id == V.ward)),
            select(V.id).where(exists(select(text("*")).select_from(W).where(W.id == V.ward))),
            select(text("*")).select_from(V),
            select(W.id * 2, literal_column("2 * w_ward.id")),
        ):
            session.execute(fine).all()


# By the second column, as a database may read it: where it takes it for an expression it is refused all the same.
PLACES: dict[str, Any] = {
    "text": text("2"),
    "parentheses": text("(2)"),
    "nested": text("((2))"),
    "a comment": text("/**/2"),
    "a line comment": text("-- c\n2"),
    "a sign": text("+2"),
    "a zero": text("02"),
    "hexadecimal": text("0x2"),
    "sorted": text("(2) DESC NULLS LAST"),
    "collated": text("2 COLLATE nocase"),
    "the second of two": text("1, 2"),
    "likely()": text("likely(2)"),
    "a literal column": literal_column("2"),
    "a literal column in parentheses": literal_column("((2))"),
    "descending": literal_column("2").desc(),
    "a label that is not selected": literal_column("2").label("z"),
    "a bound value": literal(2),
    "a bound value, sorted": literal(2).desc(),
    "a bound value, grouped": literal(2).self_group(),
    "a parameter": bindparam("x", 2),
    "a parameter of a text": text(":x").bindparams(x=2),
    "a rendered value": literal(2, literal_execute=True),
    "coerced": type_coerce(2, Integer),
    "collate()": literal_column("2").collate("nocase"),
}  # fmt: skip


def _by_place(name: str) -> dict[str, Any]:
    by, columns = PLACES[name], (W.id, W.mrn)
    union = union_all(select(W.id, W.mrn), select(W.id, W.mrn))
    return {
        "ORDER BY": select(*columns).order_by(by),
        "GROUP BY": select(W.note, W.mrn, func.count()).group_by(by),
        "UNION": union.order_by(by),
        "a subquery": select(func.count()).select_from(select(*columns).order_by(by).limit(1).subquery()),
        "an expression over it": select(W.id, W.mrn.label("m")).order_by(W.id, by),
    }


@pytest.mark.parametrize("name", PLACES)
def test_no_position_gets_past(ready: Engine, byok: Byok, name: str) -> None:
    """However a position is written, and also where only the driver makes one of a value."""
    said = {clause: _refusal(ready, byok, statement) for clause, statement in _by_place(name).items()}
    assert [
        clause for clause, refusal in said.items() if not (refusal or "").startswith("w_ward.mrn: ")
    ] == []


_other = aliased(W)
PLACED: dict[str, Callable[[], Any]] = {
    "DISTINCT ON": lambda: _distinct_on(select(W.mrn, W.id), text("1")),
    "DISTINCT ON, in parentheses": lambda: _distinct_on(select(W.mrn, W.id), text("(1)")),
    "DISTINCT ON as a prefix": lambda: select(W.id, W.mrn).prefix_with("DISTINCT ON (2)"),
    "IN (SELECT …)": lambda: (
        select(W.id).where(W.mrn.in_(select(_other.mrn).order_by(text("(1)")).limit(1)))
    ),
    "IN (SELECT …), bound": lambda: (
        select(W.id).where(W.mrn.in_(select(_other.mrn).order_by(literal(1)).limit(1)))
    ),
    "true()": lambda: select(W.mrn, W.id).order_by(true()),
    "GROUP BY true()": lambda: select(W.mrn, func.count()).group_by(true()),
    "behind a text of two columns": lambda: select(text("id, note"), W.mrn).order_by(text("3")),
    "behind a prefix": lambda: select(W.id, W.mrn).prefix_with("note,").order_by(text("3")),
    "behind all of another table's": lambda: (
        select(text("w_visit.*"), W.mrn).join_from(t, v).order_by(text("4"))
    ),
    "in a suffix": lambda: select(W.id, W.mrn).suffix_with("ORDER BY 2"),
    "in a hint": lambda: select(W.id, W.mrn).with_statement_hint("ORDER BY (2) DESC"),
    "in WHERE": lambda: select(W.id, W.mrn).where(text("1 = 1 ORDER BY 2")),
    "ROLLUP": lambda: select(W.id, W.mrn, func.count()).group_by(func.rollup(W.id, text("2"))),
    "GROUPING SETS": lambda: (
        select(W.id, W.mrn).group_by(func.grouping_sets(tuple_(literal_column("2")), W.id))
    ),
}  # fmt: skip


def _distinct_on(statement: Any, by: Any) -> Any:
    made = getattr(postgresql, "distinct_on", None)
    if made is None:
        pytest.skip("new in SQLAlchemy 2.1; use 2.1")
    return statement.ext(made(by))


def _only_postgresql(engine: Engine) -> None:
    if engine.dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has it; use PostgreSQL")


@pytest.mark.parametrize("name", PLACED)
def test_positions_are_found_in_every_clause(ready: Engine, byok: Byok, name: str) -> None:
    """In DISTINCT ON, in subqueries of look-ups, in texts beside the clause, and where other columns shift them."""
    if name in ("DISTINCT ON", "DISTINCT ON, in parentheses"):
        _only_postgresql(ready)
    assert (_refusal(ready, byok, PLACED[name]()) or "").startswith("w_ward.mrn: ")


def test_distinct_by_a_position_is_one_by_its_column(ready: Engine, byok: Byok) -> None:
    """The older way to write DISTINCT ON."""
    _only_postgresql(ready)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        statement = select(W.mrn, W.id).distinct(text("(1)"))
    assert (_refusal(ready, byok, statement) or "").startswith("w_ward.mrn: ")


PLACED_FINE: dict[str, Callable[[], Any]] = {
    "a plaintext column's": lambda: select(W.id, W.mrn, W.note).order_by(text("(3) DESC"), literal_column("1")),
    "GROUP BY with the key": lambda: select(W.mrn, W.id, func.count()).group_by(text("1"), text("2")),
    "no encrypted column": lambda: select(W.id, W.note).order_by(text("(2)")),
    "an expression with a number": lambda: select(W.id, W.mrn).order_by(text("w_ward.id + 2"), W.id * 2),
    "a function's number": lambda: select(W.id, W.mrn).order_by(func.coalesce(W.note, "2"), text("abs(2)")),
    "a window's": lambda: select(W.id, W.mrn, func.row_number().over(order_by=text("id"))),
    "of a selected label": lambda: (
        (lambda two: select(W.id, W.mrn, two).order_by(two))(literal_column("2 + 0").label("z"))
    ),
    "LIMIT": lambda: select(W.id, W.mrn).order_by(W.id).limit(2).offset(2),
    "a text's own": lambda: select(W.id, W.mrn).where(text("w_ward.id IN (SELECT id FROM w_visit ORDER BY 1)")),
}  # fmt: skip


def test_other_positions_and_numbers_are_fine(ready: Engine, byok: Byok) -> None:
    """Those of plaintext columns, those that the primary key stands beside, and numbers that are none."""
    said = {}
    for name, build in PLACED_FINE.items():
        with byok.session("t1", ready) as session:
            try:
                session.execute(build()).all()
            except Exception as error:
                said[name] = repr(error)
    assert said == {}


def test_a_label_goes_before_a_column_in_order_by(ready: Engine, byok: Byok) -> None:
    """As in the database: by its name in a text the label is sorted by, whatever the FROM calls so."""
    fine = select(W.id, W.note.label("mrn")).order_by(text("mrn DESC"), literal_column("mrn"))
    with byok.session("t1", ready) as session:
        session.add_all([W(id=1, note="a"), W(id=2, note="b")])
        session.flush()
        assert session.scalars(fine).all() == [2, 1]
    for refused in (
        fine.order_by(text("w_ward.mrn")),
        select(W.id, W.note.label("mrn")).order_by(text("lower(mrn)")),
        select(W.id, W.mrn.label("note")).order_by(text("note")),
    ):
        assert _refusal(ready, byok, refused)


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
    "WITH w AS (WITH w_ward AS (SELECT 1) SELECT * FROM w_ward) SELECT * FROM w_ward",
    "SELECT 1 FROM (WITH w_ward AS (SELECT 1) SELECT * FROM w_ward) x, w_ward",
    "(WITH w_ward AS (SELECT 1) SELECT * FROM w_ward) UNION SELECT id FROM w_ward",
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
        "SELECT 1 FROM 'w_ward'",
        "SELECT 1 FROM 'main'.'w_ward'",
        "SELECT 1 FROM w_visit JOIN 'w_ward' ON 1 = 1",
        "INSERT INTO 'w_ward' (id) VALUES (1)",
        "UPDATE 'w_ward' SET note = 'x'",
        "DELETE FROM 'w_ward'",
        "SELECT 1 WHERE 1 IN w_ward",
        "SELECT 1 WHERE 1 NOT IN main.w_ward",
        "SELECT 1 IN 'w_ward', 2",
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
        "SELECT 1 FROM ONLY (w_ward)",
        "SELECT 1 FROM w_visit, ONLY ( public . w_ward ) x",
        "TABLE ONLY (w_ward)",
        "UPDATE ONLY (w_ward) SET note = 'x'",
        "DELETE FROM ONLY (w_ward)",
        'SELECT 1 FROM U&"w\\005fward"',
        'SELECT 1 FROM u&"w\\+00005fward" x',
        "SELECT 1 FROM U&\"w!005fward\" UESCAPE '!'",
        "SELECT U&'it''s' FROM w_ward",
        "SELECT 1::int FROM w_ward",
        'WITH "W_WARD" AS (SELECT 1) SELECT 1 FROM w_ward',
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
        "SELECT 1 FROM {oj w_ward LEFT OUTER JOIN w_visit ON 1 = 1}",
        "SELECT 1 FROM w_visit, {oj w_ward}",
        "SELECT 1 FROM .w_ward",
        "SELECT 1 FROM w_visit, .w_ward",
        "SELECT 1 FROM w_visit JOIN (.`w_ward`)",
        "INSERT IGNORE .w_ward (id) VALUES (1)",
        "UPDATE IGNORE .w_ward SET note = 'x'",
        "REPLACE INTO .w_ward (id) VALUES (1)",
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
    "WITH w_ward AS (SELECT 1 AS a), w AS (WITH x AS (SELECT 1) SELECT * FROM w_ward) SELECT w.a FROM w_ward, w",
    "WITH RECURSIVE w_ward(a) AS (SELECT 1 UNION ALL SELECT a + 1 FROM w_ward WHERE a < 3) SELECT a FROM w_ward",
    "SELECT w_ward FROM (SELECT 1 AS w_ward) x",
    "DELETE FROM w_visit",
    "UPDATE w_visit SET mrn = 'x'",
    "SELECT 'w_ward', id FROM w_visit WHERE mrn IN ('w_ward')",
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
