"""``guard="report"``: statements run, and no value reaches an encrypted column in the clear, by whatever path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from orm.guard_forms import ENCRYPTED, MRN
from orm.test_guard_constructs import Element
from orm.test_guard_namesakes import CANARY, sent_to
from sqlalchemy import (
    Engine,
    String,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    create_engine,
    except_,
    exists,
    func,
    literal,
    literal_column,
    null,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    union,
    union_all,
    update,
    values,
)
from sqlalchemy.exc import DBAPIError

from sqla_byok import Byok, UnsupportedQueryError

P, R = ENCRYPTED.P, ENCRYPTED.R


def _cast(column: Any = P.mrn) -> Any:
    return cast(column, String(20))


def _given() -> Any:
    return values(column("v", String), name="given").data([(CANARY,)])


def _lowered(kind: str) -> Any:
    selected = select(P.id, func.lower(P.mrn).label("low"))
    return selected.cte() if kind == "cte" else selected.subquery()


def _where(criterion: Any) -> Any:
    return select(P.id).where(criterion)


SENT: dict[str, Callable[[], Any]] = {
    "a cast": lambda: _where(_cast() == CANARY),
    "a cast of another type": lambda: _where(_cast(P.age) == CANARY),
    "a value on the left": lambda: _where(_cast() == CANARY),
    "IN": lambda: _where(_cast().in_([CANARY])),
    "a tuple": lambda: _where(tuple_(P.id, P.mrn).in_([(1, CANARY)])),
    "a function": lambda: _where(func.lower(P.mrn) == CANARY),
    "a function's argument": lambda: select(func.replace(P.mrn, CANARY, "")),
    "what a position was taken of": lambda: _where(func.substr(P.mrn, 1, 3) == CANARY),
    "a text where a position stands": lambda: select(func.substr(P.mrn, CANARY)),
    "concatenation": lambda: select(type_coerce(P.mrn, String) + CANARY),
    "LIKE": lambda: _where(type_coerce(P.mrn, String).like(CANARY)),
    "NULLIF in count": lambda: select(func.count(func.nullif(P.mrn, CANARY))),
    "NULLIF in IS NULL": lambda: _where(func.nullif(P.mrn, CANARY).is_(None)),
    "COALESCE": lambda: select(func.coalesce(P.mrn, CANARY)),
    "CASE": lambda: select(case((_cast() == CANARY, 1), else_=0)),
    "CASE of a value": lambda: select(case({CANARY: 1}, value=P.mrn, else_=0)),
    "the result of CASE": lambda: _where(case((P.n == 1, _cast()), else_="x") == CANARY),
    "ORDER BY CASE": lambda: select(P.id).order_by(case((_cast() == CANARY, 1), else_=0)),
    "HAVING": lambda: select(P.id).group_by(P.id).having(func.max(_cast()) == CANARY),
    "EXISTS": lambda: select(R.id).where(exists().where(R.pid == P.id, func.lower(P.mrn) == CANARY)),
    "SET": lambda: update(P).values(note=case((_cast() == CANARY, "a"), else_="b")),
    "UPDATE WHERE": lambda: update(P).values(note="x").where(_cast() == CANARY),
    "a scalar subquery": lambda: _where(select(func.lower(R.code)).limit(1).scalar_subquery() == CANARY),
    "a value in a subquery": lambda: _where(_cast().in_(select(literal(CANARY)))),
    "a value in a subquery's FROM": lambda: (
        _where(_cast().in_(select(select(literal(CANARY).label("v")).subquery().c.v)))
    ),
    "a value in text": lambda: (
        (lambda s: _where(_cast() == s.c.v))(text(f"SELECT '{CANARY}' AS v").columns(column("v")).subquery())
    ),
    "any_()": lambda: _where(literal(CANARY) == any_(select(R.code).scalar_subquery())),
    "computed in a subquery": lambda: (lambda s: select(s.c.id).where(s.c.low == CANARY))(_lowered("subquery")),
    "computed in a CTE": lambda: (lambda s: select(s.c.id).where(s.c.low == CANARY))(_lowered("cte")),
    "computed here and given there": lambda: (
        (lambda s, v: select(s.c.id).join(v, s.c.low == v.c.v))(_lowered("subquery"), _given())
    ),
    "VALUES": lambda: (lambda v: _where(_cast() == v.c.v))(_given()),
    "VALUES as a CTE": lambda: (lambda v: _where(_cast() == v.c.v))(_given().cte("c")),
    "VALUES as an operand": lambda: _where(_cast().in_(_given().scalar_values())),
    "UNION": lambda: union(select(P.mrn), select(literal(CANARY))),
    "UNION ALL": lambda: union_all(select(P.mrn), select(literal(CANARY))),
    "EXCEPT": lambda: except_(select(_cast()), select(literal(CANARY))),
    "a literal column": lambda: _where(_cast() == literal_column(f"'{CANARY}'")),
    "text": lambda: _where(_cast() == text(f"'{CANARY}'")),
    "text that names the column": lambda: _where(text(f"mrn = '{CANARY}'")),
    "column()": lambda: _where(column("mrn") == CANARY),
    "a rendered value": lambda: _where(_cast() == bindparam(None, CANARY, literal_execute=True)),
    "a construct of one's own": lambda: _where(Element(1, {"x": P.mrn}) == CANARY),
    "a value in it": lambda: _where(Element(1, [P.mrn, literal(CANARY)]).is_(None)),
    "a truth value": lambda: _where(and_(P.n == 1, type_coerce(P.flag, P.n.type) == true(), literal(CANARY) != P.note)),
}  # fmt: skip
RUN: dict[str, Callable[[], Any]] = {
    "ORDER BY": lambda: select(P.id).where(P.n == 5).order_by(P.mrn).limit(3),
    "a value of another column": lambda: select(P.id, literal("x")).where(P.note == "x").order_by(P.sec),
    "positions": lambda: select(func.substr(P.mrn, 1, 3)),
    "positions in bytes of a number": lambda: select(func.substr(P.age, 1, 3)),
    "a length": lambda: select(func.length(P.sec)).where(P.mrn == "x"),
    "DISTINCT": lambda: select(P.mrn).distinct().where(P.note == "x"),
    "a subquery that sorts": lambda: (
        select(P.id).where(P.n == 1, P.id.in_(select(R.pid).where(R.pid == 2).order_by(R.code)))
    ),
    "NULL": lambda: union_all(select(P.mrn), select(null())).order_by(text("1")),
}  # fmt: skip


@pytest.fixture
def reporting(engine: Engine, byok: Byok) -> Iterator[Engine]:
    """Another engine on the same database, attached with guard="report"."""
    ENCRYPTED.Base.metadata.create_all(engine)
    other = create_engine(engine.url)
    byok.attach(other, guard="report")
    yield other
    other.dispose()


def test_a_report_sends_no_value_by_any_path(reporting: Engine, byok: Byok) -> None:
    """What would send one is refused, whatever stands between it and the column."""
    wrong = {}
    for name, build in SENT.items():
        with byok.session("t1", reporting) as session, sent_to(reporting) as sent:
            try:
                session.execute(build())
            except UnsupportedQueryError:
                continue
            except DBAPIError as error:
                wrong[name] = str(error)
            else:
                wrong[name] = "it ran"
            if CANARY in str(sent):
                wrong[name] = f"it sent {sent}"
    assert wrong == {}


def test_a_report_lets_run_what_sends_none(reporting: Engine, byok: Byok) -> None:
    """Values of other columns, limits, lengths and positions are no reason to refuse."""
    refused = {}
    for name, build in RUN.items():
        with byok.session("t1", reporting) as session:
            try:
                session.execute(build()).all()
            except UnsupportedQueryError as error:
                refused[name] = str(error)
    assert refused == {}
    assert len(byok.guard_report()[MRN]) >= 3
