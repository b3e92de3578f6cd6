"""What an encrypted column cannot do raises UnsupportedQueryError; nothing slips through to the ciphertext."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    case,
    func,
    insert,
    literal,
    null,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, aliased, mapped_column
from sqlalchemy.sql import operators
from sqlalchemy.sql.default_comparator import operator_lookup
from sqlalchemy.sql.operators import ColumnOperators

from sqla_byok import Byok, Encrypted, UnsupportedQueryError, search_hash
from sqla_byok.normalize import casefold
from sqla_byok.orm.comparator import HashComparison

VALUE = "s3cret-value"


class Base(DeclarativeBase):
    pass


class P(Base):
    __tablename__ = "p"
    id = mapped_column(Integer, primary_key=True)
    mrn = mapped_column(Encrypted(String(20), searchable=True, salt_scope="record"))
    folded = mapped_column(Encrypted(String(20), searchable=True, salt_scope="record", normalize=casefold))
    keyed = mapped_column(Encrypted(String(20), searchable=True, salt_scope="record", hash="hmac-sha256"))
    number = mapped_column(Encrypted(Integer, searchable=True, salt_scope="record"))
    own = mapped_column(Encrypted(String(20), searchable=True))
    name = mapped_column(Encrypted(String(20)))
    doc = mapped_column(Encrypted(JSON))
    plain = mapped_column(String(20))


class R(Base):
    __tablename__ = "r"
    id = mapped_column(Integer, primary_key=True)
    mrn = mapped_column(Encrypted(String(20), searchable=True, salt_scope="record"))
    own = mapped_column(Encrypted(String(20), searchable=True))


def check(error: UnsupportedQueryError, column: str = "p.mrn") -> None:
    """The error names the column, says something to do, and tells no value."""
    assert error.column == column
    assert str(error).startswith(f"{column}: ")
    seen: BaseException | None = error
    while seen is not None:
        assert VALUE not in str(seen)
        assert VALUE not in repr(vars(seen))
        seen = seen.__context__


# -- by the operator or the Python value: when it is written ---------------------------------------------------------

WRITTEN: dict[str, Callable[[], Any]] = {
    "<": lambda: P.mrn < VALUE,
    "<=": lambda: P.mrn <= VALUE,
    ">": lambda: P.mrn > VALUE,
    ">=": lambda: VALUE <= P.mrn,  # noqa: SIM300 - reversed on purpose
    "between": lambda: P.mrn.between(VALUE, VALUE),
    "like": lambda: P.mrn.like(VALUE),
    "not_like": lambda: P.mrn.not_like(VALUE),
    "ilike": lambda: P.mrn.ilike(VALUE),
    "contains": lambda: P.mrn.contains(VALUE),
    "icontains": lambda: P.mrn.icontains(VALUE),
    "startswith": lambda: P.mrn.startswith(VALUE, autoescape=True),
    "endswith": lambda: P.mrn.endswith(VALUE),
    "match": lambda: P.mrn.match(VALUE),
    "regexp_match": lambda: P.mrn.regexp_match(VALUE),
    "regexp_replace": lambda: P.mrn.regexp_replace(VALUE, VALUE),
    "+": lambda: P.mrn + VALUE,
    "reversed +": lambda: VALUE + P.mrn,
    "concat": lambda: P.mrn.concat(VALUE),
    "op": lambda: P.mrn.op("||")(VALUE),
    "op =": lambda: P.mrn.op("=")(VALUE),
    "bool_op": lambda: P.mrn.bool_op("=")(VALUE),
    "reversed + of a Core column": lambda: VALUE + P.__table__.c.mrn,
    "reversed + of an alias": lambda: VALUE + aliased(P).mrn,
    "reversed -": lambda: VALUE - P.mrn,
    "collate": lambda: P.mrn.collate("binary"),
    "any_": lambda: P.mrn.any_(),
    "all_": lambda: P.mrn.all_(),
    "distinct": lambda: P.mrn.distinct(),
    "desc": lambda: P.mrn.desc(),
    "asc": lambda: P.mrn.asc(),
    "nulls_first": lambda: P.mrn.nulls_first(),
    "nulls_last": lambda: P.mrn.nulls_last(),
    "~": lambda: ~P.mrn,
    "-": lambda: -P.mrn,
    "&": lambda: P.mrn & VALUE,
    "[]": lambda: P.mrn[0],
    "is_ value": lambda: P.mrn.is_(VALUE),
    "is_ true": lambda: P.mrn.is_(True),
    "is_not true()": lambda: P.mrn.is_not(true()),
    "is_distinct_from": lambda: P.mrn.is_distinct_from(VALUE),
    "is_not_distinct_from None": lambda: P.mrn.is_not_distinct_from(None),
    "in_ a text": lambda: P.mrn.in_(VALUE),
    "in_ bytes": lambda: P.mrn.in_(VALUE.encode()),
    "in_ a number": lambda: P.mrn.in_(7),
    "in_ None": lambda: P.mrn.in_(None),
    "not_in a text": lambda: P.mrn.not_in(VALUE),
    "in_ values and text()": lambda: P.mrn.in_([VALUE, text("x")]),
    "< of a Core column": lambda: P.__table__.c.mrn < VALUE,
    "< of an alias": lambda: aliased(P).mrn < VALUE,
    "< of a label": lambda: P.mrn.label("x") < VALUE,
    "< of a parameter": lambda: P.mrn < bindparam("q"),
    "< of a column": lambda: P.mrn < R.mrn,
}


@pytest.mark.parametrize("form", WRITTEN)
def test_other_operators_raise_when_they_are_written(form: str) -> None:
    """The error names the column and the way out, and no value, not in a chained exception either."""
    with pytest.raises(UnsupportedQueryError) as raised:
        WRITTEN[form]()
    check(raised.value)


@pytest.mark.parametrize(
    ("form", "sign"),
    [("<", "<"), ("in_ a text", "in_()"), ("like", "like()"), ("[]", "[]"), ("~", "~"), ("op", "op()")],
)
def test_the_error_names_the_operator_as_it_is_written(form: str, sign: str) -> None:
    """Nobody has to know SQLAlchemy's own names of operators."""
    with pytest.raises(UnsupportedQueryError) as raised:
        WRITTEN[form]()
    assert str(raised.value).startswith(f"p.mrn: {sign} ")


@pytest.mark.parametrize("form", [lambda c: c == VALUE, lambda c: c != VALUE, lambda c: c.in_([VALUE])])
def test_a_column_without_hashes_says_how_to_get_them(form: Callable[[Any], Any]) -> None:
    """Equality on a column that is not searchable raises when it is written; IS NULL still works."""
    for column in (P.name, P.doc, P.__table__.c.name):
        with pytest.raises(UnsupportedQueryError, match="searchable=True") as raised:
            form(column)
        check(raised.value, column.type.column_id)
    assert str(P.name.is_(None)) == "p.name IS NULL"
    assert str(P.name != None) == "p.name IS NOT NULL"  # noqa: E711 - the form under test


# -- no operator is forgotten ----------------------------------------------------------------------------------------

LOOK_UPS = (operators.eq, operators.ne, operators.in_op, operators.not_in_op)
NULL_TESTS = (operators.eq, operators.ne, operators.is_, operators.is_not)


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All operators that SQLAlchemy knows by name, and custom ones."""
    for name, value in {**vars(operators), **vars(operator)}.items():
        if callable(value) and not inspect.isclass(value) and not name.startswith("__"):
            yield name, value
    for name in operator_lookup:
        found = (
            getattr(operators, name, None)
            or getattr(operator, name, None)
            or getattr(operator, f"{name}_", None)
        )
        assert found is not None or name in ("div", "custom_op", "contains"), f"{name} is new to this test"
    yield "custom_op", operators.custom_op("~~>")


def _result_or_refusal(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; None where it raised as it should, and without the value."""
    try:
        return function(*arguments)
    except UnsupportedQueryError as error:
        told = str(error)
    assert VALUE not in told
    return None


def test_each_operator_function_is_a_look_up_or_raises() -> None:
    """Deny by default: whatever operate() is asked for, only four operators give SQL, and it is over the hash."""
    comparator = P.__table__.c.mrn.comparator
    tried = set()
    for name, function in _functions():
        tried.add(name)
        for arguments in ((), ([VALUE],), (VALUE,), (P.__table__.c.plain,), (VALUE, VALUE)):
            for operate in (comparator.operate, comparator.reverse_operate):
                if operate == comparator.reverse_operate and len(arguments) != 1:
                    continue
                result = _result_or_refusal(operate, function, *arguments)
                if result is None:
                    continue
                assert function in (*NULL_TESTS, *LOOK_UPS), (name, arguments)
                if arguments == ():
                    assert str(result) in ("p.mrn IS NULL", "p.mrn IS NOT NULL"), (name, arguments)
                else:
                    assert function in LOOK_UPS, (name, arguments)
                    assert type(result) is HashComparison, (name, arguments)
    assert tried >= set(operator_lookup) & set(vars(operators))
    assert len(tried) > 80


def test_each_column_operator_method_is_a_look_up_or_raises() -> None:
    """The same over the methods of a column, as users call them, with one, two and no argument."""
    allowed = {"__eq__", "__ne__", "in_", "not_in", "notin_", "is_", "is_not", "isnot"}
    # What is no operator: Python's own methods, and those that take an operator.
    python = set(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    skipped = python | {"operate", "reverse_operate", "__sa_operate__", "op", "bool_op"}
    skipped.add("__rmod__")  # "text" % column is Python's own formatting of the text
    methods = [
        name
        for name in dir(ColumnOperators)
        if callable(getattr(ColumnOperators, name)) and name not in skipped
    ]
    assert len(methods) > 60
    for column in (P.mrn, P.__table__.c.mrn, P.doc):
        for name in methods:
            for arguments in ((), (VALUE,), ([VALUE],), (VALUE, VALUE), (None,)):
                if not _fits(getattr(ColumnOperators, name), arguments):
                    continue
                result = _result_or_refusal(getattr(column, name), *arguments)
                if result is None:
                    continue
                assert name in allowed, (name, arguments)
                assert type(result) is HashComparison or str(result).split(" IS ")[1] in ("NULL", "NOT NULL")


@pytest.mark.parametrize("method", ["in_", "not_in"])
def test_a_hash_in_something_that_is_no_list_is_refused_without_it(method: str) -> None:
    """SQLAlchemy's own error shows the value."""
    assert _result_or_refusal(getattr(search_hash(P.mrn), method), VALUE) is None


def _fits(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(function).bind(None, *arguments)
    except TypeError:
        return False
    return True


# -- by the other operand: when it is compiled -----------------------------------------------------------------------


def _distinct_on(statement: Any, column: Any) -> Any:
    """DISTINCT ON, which is an extension of the PostgreSQL dialect from 2.1 on."""
    extension = getattr(postgresql, "distinct_on", None)
    return statement.distinct(column) if extension is None else statement.ext(extension(column))


A = aliased(P)
_no_hash = select(P.id, P.mrn).subquery("sub")
_borrowed = select(P.own.label("mrn"), search_hash(P.mrn)).subquery("sub")
_of_two_aliases = select(P.id, P.mrn, search_hash(A.mrn).label("mrn_hash")).subquery("sub")
_of_crossed_aliases = union_all(
    select(P.id, A.mrn, search_hash(P.mrn).label("mrn_hash")),
    select(A.id, P.mrn, search_hash(A.mrn).label("mrn_hash")),
).subquery("sub")
_of_two_scopes = union_all(select(P.own, search_hash(P.own)), select(R.own, search_hash(R.own))).subquery(
    "sub"
)
_half = union_all(select(P.mrn, search_hash(P.mrn)), select(R.mrn, null())).subquery("sub")

COMPILED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "another scope": (lambda: P.mrn == P.own, "p.mrn", "salt_scope"),
    "two columns of their own": (lambda: P.own == R.own, "p.own", "salt_scope"),
    "another algorithm": (lambda: P.mrn != P.keyed, "p.mrn", "salt_scope"),
    "another normalizer": (lambda: P.mrn == P.folded, "p.mrn", "normalize"),
    "another type": (lambda: P.mrn == P.number, "p.mrn", "another way"),
    "a column that is not searchable": (lambda: P.mrn == P.name, "p.name", "searchable=True"),
    "on a column that is not searchable": (lambda: P.name == P.mrn, "p.name", "searchable=True"),
    "a parameter on it": (lambda: P.name == bindparam("q", VALUE), "p.name", "searchable=True"),
    "a plaintext column": (lambda: P.mrn == P.plain, "p.mrn", "no search hash"),
    "a function": (lambda: P.mrn == func.lower(VALUE), "p.mrn", "no search hash"),
    "a function of itself": (lambda: P.mrn != func.coalesce(P.mrn, VALUE), "p.mrn", "no search hash"),
    "text()": (lambda: P.mrn == text("x"), "p.mrn", "no search hash"),
    "true()": (lambda: P.mrn.in_([true()]), "p.mrn", "no search hash"),
    "a list with a plaintext column": (lambda: P.mrn.in_([VALUE, P.plain]), "p.mrn", "no search hash"),
    "a list with another scope": (lambda: P.mrn.not_in([R.mrn, R.own]), "p.mrn", "salt_scope"),
    "a list with a function": (lambda: P.mrn.in_([func.lower(VALUE)]), "p.mrn", "no search hash"),
    "a function on the left": (lambda: func.max(P.mrn) == VALUE, "p.mrn", "column itself"),
    "a case on the left": (lambda: case((P.id == 1, P.mrn)) == VALUE, "p.mrn", "column itself"),
    "type_coerce on the left": (lambda: type_coerce(P.plain, P.mrn.type) == VALUE, "p.mrn", "column itself"),
    "values of an unsearchable type": (
        lambda: literal(VALUE, P.name.type) == literal(VALUE, P.name.type),
        "p.name",
        "searchable=True",
    ),
    "a value of its type and plaintext": (
        lambda: literal(VALUE, P.mrn.type) == P.plain,
        "p.mrn",
        "no search hash",
    ),
    "a select on the left": (lambda: select(P.mrn).scalar_subquery() == VALUE, "p.mrn", "column itself"),
    "in_ (select of another scope)": (lambda: P.mrn.in_(select(R.own)), "p.mrn", "salt_scope"),
    "in_ (select of plaintext)": (lambda: P.mrn.in_(select(P.plain)), "p.mrn", "no search hash"),
    "in_ (select of a function)": (lambda: P.mrn.in_(select(func.max(R.mrn))), "p.mrn", "no search hash"),
    "in_ (select grouped)": (lambda: P.mrn.in_(select(R.mrn).group_by(R.id)), "p.mrn", "no search hash"),
    "in_ (select distinct on)": (
        lambda: P.mrn.in_(_distinct_on(select(R.mrn), R.id)),
        "p.mrn",
        "no search hash",
    ),
    "in_ (union)": (lambda: P.mrn.in_(select(P.mrn).union(select(R.mrn))), "p.mrn", "no search hash"),
    "== (select of another scope)": (lambda: P.mrn == select(R.own).scalar_subquery(), "p.mrn", "salt_scope"),
    "a subquery without hash": (
        lambda: _no_hash.c.mrn == VALUE,
        "p.mrn",
        r"select search_hash\(mrn\) there too",
    ),
    "a cte without hash": (
        lambda: (lambda cte: cte.c.mrn.in_([VALUE]))(select(P.mrn).cte("c")),
        "p.mrn",
        r"select search_hash\(mrn\) there too",
    ),
    "in_ (select from a subquery without hash)": (
        lambda: R.mrn.in_(select(_no_hash.c.mrn)),
        "p.mrn",
        r"select search_hash\(mrn\) there too",
    ),
    "a label that borrows another's name": (lambda: _borrowed.c.mrn == VALUE, "p.own", "there too"),
    "another alias's hash": (lambda: _of_two_aliases.c.mrn == VALUE, "p.mrn", "there too"),
    "another alias's hash in each part of a union": (
        lambda: _of_crossed_aliases.c.mrn == VALUE,
        "p.mrn",
        "there too",
    ),
    "a union of two scopes": (lambda: _of_two_scopes.c.own == VALUE, "p.own", "each of its rows"),
    "a union with half the hashes": (lambda: _half.c.mrn == VALUE, "p.mrn", "each of its rows"),
}


@pytest.mark.parametrize("form", COMPILED)
def test_other_operands_raise_when_they_are_compiled(form: str) -> None:
    """Building the comparison never raises; compiling it, negated or not, names the column and what to do."""
    build, column, reason = COMPILED[form]
    for criterion in (build(), ~build()):
        with pytest.raises(UnsupportedQueryError, match=reason) as raised:
            select(P.id).where(criterion).compile()
        check(raised.value, column)


def test_refused_statements_reach_no_database(engine: Engine, byok: Byok) -> None:
    """Executed through a session, in a SELECT, an UPDATE and a join, nothing is sent."""
    with byok.session("t1", engine) as session:
        for statement in (
            select(P).where(P.mrn == P.own),
            select(P).join(R, P.own == R.own),
            update(P).where(P.mrn == P.own).values(plain="x"),
        ):
            with pytest.raises(UnsupportedQueryError):
                session.execute(statement)  # there is not even a table


def test_columns_can_be_looked_for_in_lists(engine: Engine, byok: Byok) -> None:
    """SQLAlchemy compares columns with == to find them; the answer is identity, as for any column."""
    columns = list(P.__table__.c)
    for column in columns:
        assert [column in columns, columns.index(column)] == [True, list(P.__table__.c).index(column)]
        assert column not in [other for other in columns if other is not column]
        assert bool(column == column)
        assert not bool(column != column)
        assert not bool(column == P.__table__.c.id) or column is P.__table__.c.id
    with pytest.raises(TypeError, match="Boolean value"):
        bool(P.mrn.in_([VALUE]))
    Base.metadata.create_all(engine)
    if engine.dialect.insert_returning:
        with byok.session("t1", engine) as session:
            returned = session.scalars(insert(P).returning(P), [{"mrn": "a"}, {"mrn": "b"}]).all()
            assert sorted(one.mrn for one in returned) == ["a", "b"]


def test_tuples_and_bare_types_do_not_become_look_ups() -> None:
    """A comparator that is not of one column gives no comparison of hashes."""
    assert not isinstance(tuple_(P.mrn, P.id).in_([(VALUE, 1)]), HashComparison)
    bare = Table("bare", MetaData(), Column("x", Encrypted(String(5), searchable=True)))
    assert str(bare.c.x == "y") == "bare.x_hash = :x_1"
    with pytest.raises(UnsupportedQueryError, match="column itself"):
        (Column("loose", Encrypted(String(5), searchable=True)) == VALUE).compile()


def test_a_comparison_older_than_its_table_takes_the_salt_of_its_column(engine: Engine, byok: Byok) -> None:
    """A criterion that was written before the column had a table is hashed with the column's own salt all the same."""
    key = Column("key", Encrypted(String(20), searchable=True))
    wanted, listed = key == "k", key.in_(["k", "m"])
    table = Table("late", MetaData(), Column("id", Integer, primary_key=True), key)
    table.metadata.create_all(engine)
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(
            insert(table), [{"id": 1, "key": "k"}, {"id": 2, "key": "l"}, {"id": 3, "key": "m"}]
        )
        assert connection.scalars(select(table.c.id).where(wanted)).all() == [1]
        assert connection.scalars(select(table.c.id).where(listed).order_by(table.c.id)).all() == [1, 3]


@pytest.mark.parametrize("column", [P.mrn, P.name, P.__table__.c.mrn])
def test_what_ignores_case_is_refused_with_the_way_to_do_it(column: Any) -> None:
    """ilike() and its kin name normalize=casefold; what does not ignore case does not."""
    for name in ("ilike", "not_ilike", "icontains", "istartswith", "iendswith"):
        with pytest.raises(UnsupportedQueryError, match="normalize=casefold"):
            getattr(column, name)("a")
    for name in ("like", "is_distinct_from", "startswith"):
        with pytest.raises(UnsupportedQueryError) as raised:
            getattr(column, name)("a")
        assert "casefold" not in str(raised.value)


@pytest.mark.parametrize("function", [func.lower, func.upper])
@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_lower_and_upper_are_refused_with_the_way_to_do_it(byok: Byok, engine: Engine, function: Any) -> None:
    """The usual way to ignore case in SQL is told what takes its place."""
    for where in (
        function(P.mrn) == "a",
        function(P.mrn).in_(["a"]),
        function(P.name) == func.lower(P.plain),
    ):
        with byok.session("t1", engine) as session, pytest.raises(UnsupportedQueryError) as raised:
            session.execute(select(P.id).where(where))
        assert "normalize=casefold" in str(raised.value)


@pytest.mark.parametrize(
    "expression",
    [
        type_coerce(null(), P.__table__.c.mrn.type),
        case((P.id == 1, P.mrn)),
        func.coalesce(P.mrn, P.mrn, type_=P.__table__.c.mrn.type),
    ],
    ids=["type_coerce", "case", "coalesce"],
)
def test_a_column_without_a_name_is_not_named(expression: Any) -> None:
    """A subquery of an expression has no hash column of a name that could be told."""
    for other in (select(expression).subquery().c[0], select(expression.label("x")).subquery().c.x):
        with pytest.raises(UnsupportedQueryError, match="select its hash column there too"):
            str(select(P.id).where(P.mrn == other))
