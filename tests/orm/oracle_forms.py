"""Random rows and random queries, as plain data, and what builds a query for the encrypted models or their twins.

Hypothesis draws the data, so that a failure is shown, and shrunk, as a few tuples. A row is one number, whose digits
choose its values.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from hypothesis import strategies as st
from sqlalchemy import (
    Boolean,
    Date,
    Enum,
    Integer,
    Numeric,
    String,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    distinct,
    exists,
    func,
    lambda_stmt,
    literal,
    not_,
    or_,
    select,
    tuple_,
    union,
    union_all,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    aliased,
    defer,
    joinedload,
    load_only,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.types import TypeDecorator

from sqla_byok import Encrypted
from sqla_byok.normalize import casefold


class Color(enum.Enum):
    """What an Enum column holds."""

    RED = "r"
    GREEN = "g"


class Folded(TypeDecorator[str]):
    """Text that is stored, compared and read as casefold makes it."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else casefold(value)


class Hundredths(TypeDecorator[Decimal]):
    """Exact decimals also on SQLite, which has none."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Any) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Any) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


class Models(NamedTuple):
    """One set of the models."""

    Base: Any
    P: Any
    V: Any


# The twins' texts differ where the encrypted ones do: also in case, and in a blank at the end.
_EXACT_TEXTS = {"mariadb_collate": "utf8mb4_nopad_bin"}


def _models(prefix: str, column: Callable[..., Any], folded: Any, exact: Any) -> Models:
    class Base(DeclarativeBase):
        pass

    class P(Base):
        __tablename__ = f"{prefix}person"
        __table_args__ = _EXACT_TEXTS
        id = mapped_column(Integer, primary_key=True, autoincrement=False)
        org = mapped_column(String(10))
        note = mapped_column(String(10))
        mrn = mapped_column(column(String(20), salt_scope="record"))
        nick = mapped_column(column(String(20), hash="hmac-sha256"))
        low = mapped_column(folded)
        age = mapped_column(column(Integer()))
        born = mapped_column(column(Date()))
        color = mapped_column(column(Enum(Color, native_enum=False)))
        uid = mapped_column(column(Uuid()))
        flag = mapped_column(column(Boolean()))
        price = mapped_column(exact)
        visits = relationship("V", primaryjoin="P.id == foreign(V.person_id)", order_by="V.id", viewonly=True)
        records = relationship("V", primaryjoin="P.mrn == foreign(V.mrn)", order_by="V.id", viewonly=True)

    class V(Base):
        __tablename__ = f"{prefix}visit"
        __table_args__ = _EXACT_TEXTS
        id = mapped_column(Integer, primary_key=True, autoincrement=False)
        org = mapped_column(String(10))
        person_id = mapped_column(Integer)
        mrn = mapped_column(column(String(20), salt_scope="record"))
        low = mapped_column(folded)
        code = mapped_column(column(String(20)))

    return Models(Base, P, V)


ENCRYPTED = _models(
    "o_",
    lambda type_, **options: Encrypted(type_, searchable=True, **options),
    Encrypted(String(20), searchable=True, normalize=casefold, salt_scope="low"),
    Encrypted(Numeric(10, 2), searchable=True),
)
PLAIN = _models("plain_o_", lambda type_, **options: type_, Folded(20), Hundredths())
TENANTS = ("t1", "t2")

_TEXTS: tuple[Any, ...] = ("a", None, "", "b", "A", "a ", "\u00e9", "e\u0301")
_LOWS: tuple[Any, ...] = ("ada", None, "", "ADA", "AdA", "\u00df", "SS")
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "P": {
        "mrn": _TEXTS,
        "nick": ("x", None, "", "y"),
        "low": _LOWS,
        "age": (0, None, 1, -1, 2**31 - 1),
        "born": (date(2000, 1, 1), None, date(1, 1, 1), date(9999, 12, 31)),
        "color": (Color.RED, None, Color.GREEN),
        "uid": (UUID(int=0), None, UUID(int=2**128 - 1)),
        "flag": (True, None, False),
        "price": (Decimal("1.5"), None, Decimal("1.50"), Decimal(0), Decimal("-0.01"), Decimal("-0")),
        "note": ("n", None, "a"),
    },
    "V": {"mrn": _TEXTS, "low": _LOWS, "code": ("x", None, "y", "")},
}
# The columns of one salt scope, and so those that can be compared.
_SHARED = ("mrn", "low")


# -- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row to insert, and by which of the live salts."""

    entity: str
    salt: int
    values: dict[str, Any]


def _decoded(entity: str, number: int) -> tuple[str, int, int, dict[str, Any]]:
    number, salt = divmod(number, 3)
    number, org = divmod(number, len(TENANTS))
    values = {}
    for name, choices in VALUES[entity].items():
        number, choice = divmod(number, len(choices))
        values[name] = choices[choice]
    return TENANTS[org], salt, number, values


def how_many(entity: str, most: int) -> int:
    """How many different rows there are, where there may be so many at a time."""
    size = 3 * len(TENANTS) * (most if entity == "V" else 1)
    for choices in VALUES[entity].values():
        size *= len(choices)
    return size


def with_values_of(row: Row, number: int) -> Row:
    """The same row of the same tenant with the values that the number stands for."""
    _, salt, _, values = _decoded(row.entity, number)
    return Row(row.entity, salt, {**row.values, **values})


def rows(persons: Sequence[int], visits: Sequence[int]) -> list[Row]:
    """The rows that the numbers stand for. A visit is one of a person of the same tenant, or of nobody."""
    found = []
    known: dict[str, list[int | None]] = {tenant: [None] for tenant in TENANTS}
    for id_, number in enumerate(persons, 1):
        org, salt, _, values = _decoded("P", number)
        known[org].append(id_)
        found.append(Row("P", salt, {"id": id_, "org": org, **values}))
    for id_, number in enumerate(visits, 1):
        org, salt, rest, values = _decoded("V", number)
        person = known[org][-1 - rest % len(known[org])]
        found.append(Row("V", salt, {"id": id_, "org": org, "person_id": person, **values}))
    return found


# -- queries, as data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A query. ``where`` and ``inner`` are criteria as nested tuples, each with its operator first."""

    tenant: str
    style: str  # "orm", "query", "core" or "lambda"
    source: str  # what stands for the table
    what: str  # what is selected
    where: Any
    inner: tuple[Any, Any]  # the criteria within the source
    join: tuple[str, str] | None  # its kind and by what
    option: tuple[Any, ...] | None  # a loader option
    page: tuple[int, int] | None  # limit and offset
    scoped: bool  # whether the encrypted one too is filtered by tenant


_columns = {side: st.sampled_from([name for name in VALUES[side] if name != "note"]) for side in ("P", "V")}
_values = {(side, name): st.sampled_from(of) for side, each in VALUES.items() for name, of in each.items()}
_present = {
    (side, name): st.sampled_from([value for value in of if value is not None])
    for side, each in VALUES.items()
    for name, of in each.items()
}
_lists = {key: st.lists(values, max_size=3) for key, values in _values.items()}
_bools = st.booleans()
_hows = st.sampled_from(["value", "bind", "bind value", "literal"])
_leaves = st.sampled_from(["==", "!=", "in", "not in", "==", "in", "null", "not null", "plain"])
_links = st.sampled_from(["id", *_SHARED])
_nodes = {
    "P": st.sampled_from(
        ["leaf", "and", "or", "not", "exists", "any", "in select", "scalar", "columns", "condition"]
    ),
    "V": st.sampled_from(["leaf", "and", "or", "not"]),
}
_small = st.integers(0, 5)
_shared = st.sampled_from(_SHARED)
_sides = st.sampled_from(["P", "V"])
_styles = st.sampled_from(["orm", "query", "core", "lambda"])
_sources = st.sampled_from(["table", "table", "alias", "subquery", "cte", "union all", "nested"])
_whats = st.sampled_from(["entity", "id", "columns", "count", "distinct", "exists"])
_joins = st.sampled_from(
    [(kind, by) for kind in ("inner", "outer") for by in ("id", *_SHARED, "visits", "self")]
)
_options = st.sampled_from(["select in", "joined", "subquery", "records", "defer", "load only", "criteria"])
_relationships = st.sampled_from(["visits", "records"])
_tenants = st.sampled_from(TENANTS)


@st.composite
def _leaf(draw: Any, side: str) -> Any:
    op = draw(_leaves)
    if op == "plain":
        return op, side, draw(_small)
    name = draw(_columns[side])
    if op in ("null", "not null"):
        return op, side, name
    if op in ("in", "not in"):
        return op, side, name, tuple(draw(_lists[side, name])), draw(_bools)
    return op, side, name, draw(_values[side, name]), draw(_hows)


@st.composite
def _criterion(draw: Any, sides: str, depth: int, simple: bool = False) -> Any:
    """A criterion over the entities: "P", or "PV" where a visit is joined, or "V" within EXISTS."""
    side = sides if len(sides) == 1 else draw(_sides)
    op = draw(_nodes["V" if simple else side]) if depth else "leaf"
    if op == "leaf":
        return draw(_leaf(side))
    if op in ("and", "or"):
        return op, *(draw(_criterion(sides, depth - 1, simple)) for _ in range(2))
    if op == "not":
        return op, draw(_criterion(sides, depth - 1, simple))
    if op == "exists":
        return op, draw(_links), draw(_criterion("V", depth - 1))
    if op == "any":
        return op, draw(_relationships), draw(_criterion("V", depth - 1))
    if op == "in select":
        return op, draw(_shared), draw(_bools), draw(_criterion("V", depth - 1))
    if op == "scalar":
        return op, draw(_shared), draw(_bools), draw(_small)
    if op == "condition":
        return op, draw(_leaf("P"))
    return op, draw(_shared), draw(_bools), len(sides) > 1


@st.composite
def queries(draw: Any) -> Query:
    """A query of the supported forms."""
    style = draw(_styles)
    simple = style == "lambda"  # SQLAlchemy takes an alias from the first call into all that follow
    source = "table" if simple else draw(_sources)
    what = draw(_whats)
    if (style, what) == ("query", "exists") and source not in ("table", "alias"):
        what = "entity"  # Query.exists() loses a union, and in SQLAlchemy 2.0 a subquery's parameters
    join = option = page = None
    if not simple and draw(_bools):
        join = draw(_joins)
    where = draw(_criterion("PV" if join and join[1] != "self" else "P", 3, simple))
    inner = (None, None)
    if source not in ("table", "alias"):
        inner = draw(_criterion("P", 1)), draw(_criterion("P", 1))
    scoped = True
    if draw(_bools):
        name = draw(_columns["P"])
        if draw(_bools):
            where = "and", ("==", "P", name, draw(_present["P", name]), draw(_hows)), where
        else:
            where = "and", ("in", "P", name, tuple(draw(_lists["P", name])), draw(_bools)), where
        # A subquery that gives values would give another tenant's, from within the source too.
        criteria = [where, *(criterion for criterion in inner if criterion is not None)]
        scoped = any(op in ("in select", "scalar") for criterion in criteria for op in _operators(criterion))
    if what in ("entity", "distinct") and style not in ("core", "lambda") and draw(_bools):
        option = draw(_options), draw(_values["P", "nick"])
    if what in ("entity", "id", "columns", "distinct") and draw(_bools):
        page = draw(_small), draw(_small)
    tenant = draw(_tenants)
    return Query(tenant, style, source, what, where, inner, join, option, page, scoped)


def _operators(criterion: Any) -> Iterator[str]:
    yield criterion[0]
    for part in criterion[1:]:
        if isinstance(part, tuple) and part and isinstance(part[0], str):
            yield from _operators(part)


def row_numbers(entity: str, most: int) -> Any:
    """Rows as numbers."""
    return st.lists(st.integers(0, how_many(entity, most) - 1), max_size=most)


# -- queries, built --------------------------------------------------------------------------------------------------


class Built:
    """A query over one set of models. Its parts can also be had apart, for what is no supported form."""

    def __init__(self, query: Query, models: Models, session: Any = None) -> None:
        self.query, self.models, self.session = query, models, session
        self.core = query.style == "core"
        self.scoped = query.scoped or models is PLAIN
        self.params: dict[str, Any] = {}
        self.compares_columns = False
        self._names = 0
        self.person, self._start = self._source()
        self.visit: Any = None

    def column(self, entity: Any, name: str) -> Any:
        return entity.c[name] if hasattr(entity, "c") else getattr(entity, name)

    def rows(self) -> list[tuple[Any, ...]]:
        """What the database answers, in a form that both sets of models share; in order where that is defined."""
        query = self.query
        statement = self.statement()
        if query.style == "query":
            statement = statement.params(**self.params)
            if query.what == "count":
                return [(statement.count(),)]
            if query.what == "exists":  # a negated subquery within loses them there
                statement = self.session.query(statement.exists()).params(**self.params)
            result = statement.all()
            result = [row if isinstance(row, Sequence) else (row,) for row in result]
        else:
            found = self.session.execute(statement, self.params)
            result = (found.unique() if query.option else found).all()
        seen = [tuple(self._shown(value) for value in row) for row in result]
        if query.what == "columns" or (self.core and len(seen and seen[0]) > 1 and query.what != "count"):
            seen = [self._folded(row) for row in result]
        return seen if query.page else sorted(seen, key=repr)

    def statement(self) -> Any:
        """The statement, a legacy Query for that style; build it once."""
        query, person = self.query, self.person
        id_ = self.column(person, "id")
        statement: Any = self._lambdas() if query.style == "lambda" else self._plain()
        if query.page:
            limit, offset = query.page
            if query.style == "lambda":
                statement += lambda each: each.order_by(id_).limit(limit).offset(offset)
            else:
                statement = statement.order_by(id_).limit(limit).offset(offset)
        if query.what == "exists" and query.style in ("orm", "core"):
            statement = select(statement.exists())
        return statement

    def _plain(self) -> Any:
        query = self.query
        if query.style != "query":
            statement = select(*self._selected()).select_from(self.person)
        elif self._start is None:
            statement = self.session.query(*self._selected())
        else:
            statement = self._start
            if query.what in ("id", "columns"):
                statement = statement.with_entities(*self._selected())
        statement = self._joined(statement)
        statement = statement.where(self.truth(query.where), *self._of_tenant(self.person))
        if query.option:
            statement = statement.options(self._option())
        return statement.distinct() if query.what == "distinct" else statement

    def _lambdas(self) -> Any:
        query, base = self.query, select(*self._selected())
        where = and_(self.truth(query.where), *self._of_tenant(self.person))
        statement = lambda_stmt(lambda: base)
        statement += lambda each: each.where(where)
        if query.what == "distinct":
            statement += lambda each: each.distinct()
        op, *rest = query.where if query.where[0] != "and" else query.where[1]
        if op == "==" and rest[2] is not None:
            column, value = self.column(self.person, rest[1]), rest[2]
            statement += lambda each: each.where(column == value)
        return statement

    # -- FROM ----------------------------------------------------------------------------------------------------------

    def _entity(self, name: str) -> Any:
        model = getattr(self.models, name)
        return model.__table__.alias() if self.core else aliased(model)

    def _source(self) -> tuple[Any, Any]:
        """The persons, and the legacy Query of them where it is a union of its own."""
        query = self.query
        table: Any = self.models.P.__table__ if self.core else self.models.P
        if query.source == "table":
            return table, None
        if query.source == "alias":
            return self._entity("P"), None
        first, second = (
            and_(self._truth(criterion, table, None), *self._of_tenant(table)) for criterion in query.inner
        )
        if query.style == "query" and query.source == "union all":
            ask = self.session.query
            return table, ask(table).where(first).union_all(ask(table).where(second))
        if query.source == "union all":
            inner: Any = union_all(select(table).where(first), select(table).where(second)).subquery()
        elif query.source == "nested":
            inner = select(select(table).where(first).subquery()).subquery()
        elif query.source == "cte":
            inner = select(table).where(first).cte("chosen")
        else:
            inner = select(table).where(first).subquery()
        return (inner if self.core else aliased(self.models.P, inner)), None

    def _of_tenant(self, *entities: Any) -> list[Any]:
        if not self.scoped:
            return []
        return [self.column(entity, "org") == self.query.tenant for entity in entities]

    def _joined(self, statement: Any) -> Any:
        if self.query.join is None:
            return statement
        kind, by = self.query.join
        self.visit = other = self._entity("P" if by == "self" else "V")
        if by == "visits" and not self.core:
            on = self.person.visits.of_type(other)
            return statement.join(on, isouter=kind == "outer")
        on = and_(self._linked(self.person, other, by), *self._of_tenant(other))
        return statement.join(other, on, isouter=kind == "outer")

    def _linked(self, person: Any, other: Any, by: str) -> Any:
        if by in ("id", "visits"):
            return self.column(person, "id") == self.column(other, "person_id")
        self.compares_columns = True
        name = "nick" if by == "self" else by
        return self.column(person, name) == self.column(other, name)

    # -- SELECT --------------------------------------------------------------------------------------------------------

    def _selected(self) -> list[Any]:
        query, column = self.query, lambda name: self.column(self.person, name)
        if query.what == "count" and query.style != "query":
            return [func.count(column("id")), func.count(column("low"))]
        if query.what == "id" or (query.what == "exists" and query.style != "lambda"):
            return [column("id")]
        if query.what == "columns" or self.core:
            labelled = query.what == "columns"
            return [
                column("id"),
                *(column(name).label(f"the_{name}") if labelled else column(name) for name in VALUES["P"]),
            ]
        return [self.person]

    def _option(self) -> Any:
        name, value = self.query.option or ("", None)
        person = self.person
        if name == "criteria":
            return with_loader_criteria(self.models.P, self.models.P.nick == value)
        if name == "records":
            self.compares_columns = True
            return selectinload(person.records)
        simple = {
            "select in": selectinload(person.visits),
            "joined": joinedload(person.visits),
            "subquery": subqueryload(person.visits),
            "defer": defer(person.mrn),
            "load only": load_only(person.note),
        }
        return simple[name]

    # -- WHERE ---------------------------------------------------------------------------------------------------------

    def truth(self, criterion: Any) -> Any:
        return self._truth(criterion, self.person, self.visit)

    def _truth(self, criterion: Any, person: Any, visit: Any) -> Any:
        op, *rest = criterion
        if op in ("and", "or"):
            parts = [self._truth(part, person, visit) for part in rest]
            return and_(*parts) if op == "and" else or_(*parts)
        if op == "not":
            return not_(self._truth(rest[0], person, visit))
        if op == "condition":
            return case((self._truth(rest[0], person, visit), 1), else_=0) == 1
        if op in ("exists", "any", "in select", "scalar"):
            return self._subquery(op, rest, person)
        if op == "columns":
            return self._of_columns(rest, person, visit)
        entity = visit if rest[0] == "V" else person
        if op == "plain":
            return self.column(entity, "id") <= rest[1]
        return self._compared(op, self.column(entity, rest[1]), *rest[2:])

    def _of_columns(self, rest: list[Any], person: Any, visit: Any) -> Any:
        name, equal, joined = rest
        self.compares_columns = True
        one, other = (
            self.column(person, name),
            self.column(visit if joined and visit is not None else person, name),
        )
        return one == other if equal else one != other

    def _compared(self, op: str, column: Any, value: Any = None, how: Any = None) -> Any:
        if op in ("null", "not null"):
            return column.is_(None) if op == "null" else column.is_not(None)
        if self.query.style == "lambda":
            how = None  # SQLAlchemy keeps the names of the first call's parameters for all that follow
        if op in ("in", "not in"):
            given: Any = list(value)
            if how:
                given = bindparam(self._name(), expanding=True)
                self.params[given.key] = list(value)
            return column.in_(given) if op == "in" else column.not_in(given)
        if how == "bind":
            self.params[self._name()] = value
            value = bindparam(f"q{self._names}")
        elif how == "bind value":
            value = bindparam(self._name(), value, type_=column.type)
        elif how == "literal" and value is not None:
            value = literal(value, column.type)
        return column == value if op == "==" else column != value

    def _name(self) -> str:
        self._names += 1
        return f"q{self._names}"

    def _subquery(self, op: str, rest: list[Any], person: Any) -> Any:
        if op == "any" and not self.core:
            visit = self.models.V
            self.compares_columns |= rest[0] == "records"
            return getattr(person, rest[0]).any(
                and_(self._truth(rest[1], None, visit), *self._of_tenant(visit))
            )
        visit = self._entity("V")
        of_tenant = self._of_tenant(visit)
        if op in ("exists", "any"):
            by = {"visits": "id", "records": "mrn"}.get(rest[0], rest[0])
            on = self._linked(person, visit, by)
            return exists().where(on, self._truth(rest[1], None, visit), *of_tenant)
        self.compares_columns = True
        column, inner = self.column(person, rest[0]), select(self.column(visit, rest[0])).where(*of_tenant)
        if op == "in select":
            inner = inner.where(self._truth(rest[2], None, visit))
            return column.in_(inner) if rest[1] else column.not_in(inner)
        scalar = inner.where(self.column(visit, "id") == rest[2]).scalar_subquery()
        return column == scalar if rest[1] else column != scalar

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _folded(self, row: Any) -> tuple[Any, ...]:
        """A row of columns: the twin gives folded text."""
        names = ["id", *VALUES["P"]]
        return tuple(_as_compared(name, value) for name, value in zip(names, row, strict=True))

    def _shown(self, value: Any) -> Any:
        if not isinstance(value, self.models.P):
            return value
        option = self.query.option[0] if self.query.option else None
        visits = value.visits if option in ("select in", "joined", "subquery") else ()
        records = value.records if option == "records" else ()
        return (
            *(_as_compared(name, getattr(value, name)) for name in ("id", *VALUES["P"])),
            *((visit.id, visit.code) for visit in visits),
            *((visit.id, visit.mrn) for visit in records if visit.org == self.query.tenant),
        )


def _as_compared(name: str, value: Any) -> Any:
    if value is None:
        return None
    return casefold(value) if name == "low" else value + 0 if name == "price" else value


# -- queries that have to be refused -------------------------------------------------------------------------------

# Conditions that would be made on ciphertext: of the column, another column, a value and the person.
_CONDITIONS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "like": lambda c, o, v, p: c.like("a%"),
    "ilike": lambda c, o, v, p: c.ilike("%a"),
    "startswith": lambda c, o, v, p: c.startswith("a"),
    "contains": lambda c, o, v, p: ~c.contains("a"),
    "regexp": lambda c, o, v, p: c.regexp_match("a"),
    "<": lambda c, o, v, p: c < v,
    ">=": lambda c, o, v, p: c >= bindparam("q0"),
    "value < column": lambda c, o, v, p: literal(v) < c,
    "between": lambda c, o, v, p: c.between(v, v),
    "literal ==": lambda c, o, v, p: literal(v, String) == c,
    "literal !=": lambda c, o, v, p: literal(v, String) != c,
    "literal in": lambda c, o, v, p: literal(v, String).in_([c]),
    "is distinct from": lambda c, o, v, p: c.is_distinct_from(v),
    "lower": lambda c, o, v, p: func.lower(c) == v,
    "length": lambda c, o, v, p: func.length(c) > 1,
    "coalesce": lambda c, o, v, p: func.coalesce(c, v) == v,
    "cast": lambda c, o, v, p: cast(c, String) == v,
    "concatenation": lambda c, o, v, p: c + "x" == v,
    "value and column": lambda c, o, v, p: "x" + c == v,
    "arithmetic": lambda c, o, v, p: c * 2 > 1,
    "tuple": lambda c, o, v, p: tuple_(p["id"], c).in_([(1, v)]),
    "tuple of one": lambda c, o, v, p: tuple_(c).in_([(v,)]),
    "case": lambda c, o, v, p: case({v: 1}, value=c, else_=0) == 1,
    "case of it": lambda c, o, v, p: case((p["id"] == 1, c), else_=v) == v,
    "other salt": lambda c, o, v, p: c == o,
    "other salt !=": lambda c, o, v, p: o != c,
    "plaintext": lambda c, o, v, p: c == p["note"],
    "plaintext on the left": lambda c, o, v, p: p["note"] == c,
    "plaintext in a select": lambda c, o, v, p: p["note"].in_(select(c)),
    "other salt in a select": lambda c, o, v, p: c.in_(select(o)),
    "max in a subquery": lambda c, o, v, p: select(func.max(c)).scalar_subquery() == v,
    "the condition itself": lambda c, o, v, p: c,
}


def _unioned(statement: Any, column: Any, of: Any) -> Any:
    only = statement.with_only_columns(column)
    return union(only, only)


# Places in which ciphertext would be sorted, compared or computed on: the statement, the column, the columns of all.
_PLACES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "order by": lambda s, c, of: s.order_by(c),
    "order by desc": lambda s, c, of: s.order_by(c.desc().nulls_last()),
    "order by a label": lambda s, c, of: s.add_columns(label := c.label("l")).order_by(label),
    "order by a name": lambda s, c, of: s.add_columns(c.label("named")).order_by("named"),
    "order in a subquery": lambda s, c, of: select(func.count()).select_from(
        s.with_only_columns(of("id")).order_by(c).limit(2).subquery()
    ),
    "group by": lambda s, c, of: s.with_only_columns(func.count()).group_by(c),
    "group by and having": lambda s, c, of: (
        s.with_only_columns(of("id")).group_by(of("id")).having(func.max(c) == "a")
    ),
    "distinct": lambda s, c, of: s.with_only_columns(c).distinct(),
    "distinct with more": lambda s, c, of: s.with_only_columns(of("note"), c).distinct(),
    "count distinct": lambda s, c, of: s.with_only_columns(func.count(distinct(c))),
    "union": _unioned,
    "union all of two": lambda s, c, of: union_all(s.with_only_columns(c), s.with_only_columns(of("note"))),
    "window order": lambda s, c, of: s.add_columns(func.row_number().over(order_by=c)),
    "window part": lambda s, c, of: s.add_columns(func.rank().over(partition_by=c, order_by=of("id"))),
    "min": lambda s, c, of: s.with_only_columns(func.min(c)),
    "max": lambda s, c, of: s.with_only_columns(func.max(c)),
    "sum": lambda s, c, of: s.with_only_columns(func.sum(c)),
    "upper": lambda s, c, of: s.add_columns(func.upper(c)),
    "cast": lambda s, c, of: s.add_columns(cast(c, String)),
    "concatenation": lambda s, c, of: s.add_columns(literal("x") + c),
}


@dataclass(frozen=True)
class Unsupported:
    """A supported query, and what makes it none."""

    query: Query
    name: str
    column: str
    other: str
    value: Any
    within: str  # how a condition is combined with the query's own

    @property
    def statement(self) -> tuple[Any, dict[str, Any]]:
        """The statement, and its parameters. To build it may raise already."""
        built = Built(self.query, ENCRYPTED)
        statement, person = built.statement(), built.person
        column = built.column(person, self.column)
        if self.name in _PLACES:
            return _PLACES[self.name](
                statement, column, lambda name: built.column(person, name)
            ), built.params
        plain = {name: built.column(person, name) for name in ("id", "note")}
        condition = _CONDITIONS[self.name](column, built.column(person, self.other), self.value, plain)
        built.params["q0"] = self.value
        own = built.truth(self.query.where)
        if self.within == "or":
            condition = or_(own, and_(own, condition))
        elif self.within == "not":
            condition = and_(own, not_(condition))
        elif self.within == "case":
            return statement.add_columns(case((condition, 1), else_=0)), built.params
        elif self.within == "exists":
            visit = built._entity("V")
            condition = exists().where(built.column(visit, "person_id") == plain["id"], condition)
        return statement.where(condition), built.params


@st.composite
def unsupported(draw: Any) -> Unsupported:
    """A query that would run on ciphertext."""
    query = draw(queries().filter(lambda query: query.style in ("orm", "core") and not query.page))
    query = replace(query, what="entity", option=None)
    one, other = draw(_two)
    value = draw(_secrets if one in ("mrn", "nick", "low") else _present["P", one])
    return Unsupported(query, draw(_names), one, other, value, draw(_withins))


# of two salts
_two = st.permutations([name for name in VALUES["P"] if name != "note"]).map(lambda names: names[:2])
_names = st.sampled_from([*_CONDITIONS, *_PLACES])
_secrets = st.sampled_from(["a", "", "pl\u00e4in"])
_withins = st.sampled_from(["and", "or", "not", "case", "exists"])
