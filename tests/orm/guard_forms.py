"""Statements over encrypted columns that the guard refuses, and statements that it has to let through.

A refused form is built once of ORM attributes and once of Core columns. A legal one is built for the encrypted models
and for their plaintext twins, and both have to give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    ForeignKey,
    Integer,
    String,
    and_,
    any_,
    bindparam,
    case,
    cast,
    collate,
    column,
    delete,
    desc,
    distinct,
    except_all,
    exists,
    extract,
    func,
    insert,
    intersect,
    intersect_all,
    label,
    literal,
    literal_column,
    null,
    nulls_last,
    or_,
    select,
    table,
    text,
    true,
    tuple_,
    type_coerce,
    union,
    union_all,
    update,
    values,
)
from sqlalchemy.orm import (
    Bundle,
    DeclarativeBase,
    aliased,
    contains_eager,
    joinedload,
    lazyload,
    mapped_column,
    relationship,
    selectinload,
    subqueryload,
    with_loader_criteria,
)
from sqlalchemy.types import LargeBinary

from sqla_byok import Encrypted, search_hash


class Models(NamedTuple):
    """One set of the models."""

    Base: Any
    P: Any
    R: Any


def _models(prefix: str, encrypted: Callable[..., Any]) -> Models:
    class Base(DeclarativeBase):
        pass

    class P(Base):
        __tablename__ = f"{prefix}patient"
        id = mapped_column(Integer, primary_key=True, autoincrement=False)
        mrn = mapped_column(encrypted(String(20), searchable=True, salt_scope="record"), unique=True)
        nick = mapped_column(encrypted(String(20), searchable=True))
        sec = mapped_column(encrypted(String(20)))
        flag = mapped_column(encrypted(Boolean, searchable=True))
        age = mapped_column(encrypted(Integer, searchable=True))
        note = mapped_column(String(20))
        n = mapped_column(Integer)
        visits = relationship("R", back_populates="patient", order_by="R.id")
        by_code = relationship("R", order_by="R.code", viewonly=True)
        by_mrn = relationship("R", primaryjoin="P.mrn == foreign(R.mrn)", viewonly=True, order_by="R.id")

    class R(Base):
        __tablename__ = f"{prefix}visit"
        id = mapped_column(Integer, primary_key=True, autoincrement=False)
        pid = mapped_column(ForeignKey(P.id))
        mrn = mapped_column(encrypted(String(20), searchable=True, salt_scope="record"))
        code = mapped_column(encrypted(String(20), searchable=True))
        patient = relationship("P", back_populates="visits")

    return Models(Base, P, R)


ENCRYPTED = _models("g_", Encrypted)
PLAIN = _models("plain_g_", lambda type_, **_: type_)


def rows(models: Models) -> list[Any]:
    """The rows that the legal forms are tried on."""
    p, r = models.P, models.R
    return [
        p(id=1, mrn="a", nick="ada", sec="s", flag=True, age=3, note="one", n=1),
        p(id=2, mrn="b", nick=None, sec=None, flag=False, age=None, note="two", n=1),
        p(id=3, mrn="c", nick="ada", sec="s", flag=None, age=3, note="one", n=2),
        r(id=1, pid=1, mrn="a", code="x"),
        r(id=2, pid=1, mrn="b", code="y"),
        r(id=3, pid=2, mrn="b", code="x"),
        r(id=4, pid=None, mrn=None, code=None),
    ]


# -- refused ---------------------------------------------------------------------------------------------------------

MRN, NICK, SEC, CODE, FLAG = (
    "g_patient.mrn",
    "g_patient.nick",
    "g_patient.sec",
    "g_visit.code",
    "g_patient.flag",
)
SECRET = "plain-s3cret"


class Refused(NamedTuple):
    """What builds it of the columns of both tables, and the column that the error names."""

    build: Callable[[Any, Any], Any]
    column: str = MRN


def _labelled(p: Any) -> Any:
    labelled = p.mrn.label("m")
    return select(p.id, labelled).order_by(labelled)


def _cte_grouped(p: Any) -> Any:
    cte = select(p.mrn, func.count().label("c")).group_by(p.mrn).cte()
    return select(cte.c.c)


def _lateral(p: Any, r: Any) -> Any:
    inner = select(func.max(r.code).label("m")).where(r.pid == p.id).lateral()
    return select(p.id, inner.c.m).join(inner, true())


def _recursive(p: Any, r: Any) -> Any:
    first = select(p.id, p.mrn).cte("t", recursive=True)
    both = first.union(select(r.id, r.mrn).where(first.c.id == r.pid))
    return select(both.c.id)


def _hidden(p: Any, _: Any) -> Any:
    inner = select(p.id, type_coerce(p.mrn, LargeBinary).label("m")).subquery()
    return select(inner.c.id).where(inner.c.m == b"x")


def _distinct_of_union(p: Any, r: Any) -> Any:
    both = union_all(select(p.id, p.mrn), select(r.id, r.mrn)).subquery()
    return select(func.count()).select_from(select(both.c.id, both.c.mrn).distinct().subquery())


def _other_alias(p: Any, _: Any) -> Any:
    one, other = (p.mrn.table.alias() for _ in range(2))
    return select(one.c.id, other.c.mrn).where(one.c.n == other.c.n).distinct()


def _crossed(p: Any, _: Any) -> Any:
    one, other = (p.mrn.table.alias() for _ in range(2))
    same = one.c.n == other.c.n
    both = union_all(
        select(one.c.id, other.c.nick).where(same), select(other.c.id, one.c.nick).where(same)
    ).subquery()
    return select(both.c.id, both.c.nick).distinct()


def _coerced(column: Any) -> Any:
    return type_coerce(column, LargeBinary)


def _two_scopes(p: Any, r: Any) -> Any:
    return union_all(select(search_hash(p.nick).label("h")), select(search_hash(r.code))).subquery()


def _whole_row(p: Any, _: Any) -> Any:
    inner = select(p.nick).subquery("whole")
    return select(func.count(distinct(inner.table_valued())))


def _update(p: Any) -> Any:
    return update(p.id.table)


REFUSED: dict[str, Refused] = {
    "ORDER BY": Refused(lambda p, r: select(p.id).order_by(p.mrn)),
    "ORDER BY, not searchable": Refused(lambda p, r: select(p.id).order_by(p.sec), SEC),
    "ORDER BY desc()": Refused(lambda p, r: select(p.id).order_by(desc("mrn"), p.mrn)),
    "ORDER BY nulls_last": Refused(lambda p, r: select(p.id).order_by(nulls_last(p.mrn.label("x")))),
    "ORDER BY a string": Refused(lambda p, r: select(p.id, p.mrn).order_by("mrn")),
    "ORDER BY a string of the FROM": Refused(lambda p, r: select(p.id).order_by("mrn")),
    "ORDER BY a string, over a join": Refused(
        lambda p, r: select(p.id).join_from(p.id.table, r.id.table).order_by("code"), CODE
    ),
    "ORDER BY a string of an outer query": Refused(
        lambda p, r: select(p.id, select(r.id).where(r.pid == p.id).order_by("nick").limit(1).scalar_subquery()), NICK
    ),
    "ORDER BY desc of a string": Refused(lambda p, r: select(p.id, p.mrn).order_by(desc("mrn"))),
    "ORDER BY a label's name": Refused(lambda p, r: select(p.id, p.mrn.label("m")).order_by("m")),
    "ORDER BY a label": Refused(lambda p, r: _labelled(p)),
    "ORDER BY a position": Refused(lambda p, r: select(p.id, p.mrn).order_by(text("2 DESC"))),
    "ORDER BY a literal position": Refused(lambda p, r: select(p.id, p.mrn).order_by(literal_column("2"))),
    "ORDER BY positions": Refused(lambda p, r: select(p.id, p.mrn).order_by(text("1, 2"))),
    "GROUP BY a position": Refused(lambda p, r: select(p.mrn, func.count()).group_by(text("1"))),
    "ORDER BY case": Refused(lambda p, r: select(p.id).order_by(case((p.id == 1, p.mrn)))),
    "ORDER BY in a subquery": Refused(
        lambda p, r: select(func.count()).select_from(select(p.id).order_by(p.mrn).limit(1).subquery())
    ),
    "ORDER BY of a union": Refused(
        lambda p, r: union_all(select(p.id, p.mrn), select(p.id, p.mrn)).order_by("mrn")
    ),
    "GROUP BY": Refused(lambda p, r: select(func.count()).group_by(p.mrn)),
    "GROUP BY a string": Refused(lambda p, r: select(p.mrn, func.count()).group_by("mrn")),
    "GROUP BY a string, over a join": Refused(
        lambda p, r: select(func.count()).join_from(p.id.table, r.id.table).group_by("nick"), NICK
    ),
    "GROUP BY a label that shadows a column": Refused(
        lambda p, r: select(func.max(p.note).label("nick"), func.count()).group_by("nick"), NICK
    ),
    "GROUP BY another table's key": Refused(
        lambda p, r: select(p.mrn).join_from(p.id.table, r.id.table).group_by(r.id, p.mrn)
    ),
    "GROUP BY in a CTE": Refused(lambda p, r: _cte_grouped(p)),
    "DISTINCT": Refused(lambda p, r: select(p.mrn).distinct()),
    "DISTINCT as a prefix": Refused(lambda p, r: select(p.mrn).prefix_with("DISTINCT")),
    "DISTINCT with a plain column": Refused(lambda p, r: select(p.mrn, p.n).distinct()),
    "DISTINCT with another table's key": Refused(
        lambda p, r: select(p.id, r.mrn).where(p.id == r.pid).distinct(), "g_visit.mrn"
    ),
    "DISTINCT with another alias's key": Refused(_other_alias),
    "DISTINCT over UNION ALL of two tables": Refused(_distinct_of_union),
    "DISTINCT over UNION ALL of crossed aliases": Refused(_crossed, NICK),
    "DISTINCT of type_coerce": Refused(lambda p, r: select(_coerced(p.mrn)).distinct()),
    "DISTINCT of a label with a type": Refused(lambda p, r: select(label("x", p.mrn, type_=LargeBinary)).distinct()),
    "DISTINCT of a whole row": Refused(_whole_row, NICK),
    "UNION": Refused(lambda p, r: union(select(p.mrn), select(p.mrn))),
    "UNION with keys of two tables": Refused(lambda p, r: union(select(p.id, p.mrn), select(r.id, r.mrn))),
    "UNION of type_coerce": Refused(lambda p, r: union(select(_coerced(p.mrn)), select(_coerced(p.mrn)))),
    "EXCEPT ALL": Refused(lambda p, r: except_all(select(p.mrn), select(r.mrn))),
    "INTERSECT ALL": Refused(lambda p, r: intersect_all(select(p.mrn), select(r.mrn))),
    "INTERSECT": Refused(lambda p, r: intersect(select(p.mrn), select(p.mrn))),
    "UNION ALL of two columns": Refused(lambda p, r: union_all(select(p.mrn), select(r.code))),
    "UNION ALL with plaintext": Refused(lambda p, r: union_all(select(p.mrn), select(p.note))),
    "UNION ALL with plaintext first": Refused(lambda p, r: union_all(select(p.note), select(p.mrn))),
    "recursive UNION": Refused(_recursive),
    "literal == column": Refused(lambda p, r: select(p.id).where(literal(SECRET) == p.mrn)),
    "literal != column": Refused(lambda p, r: select(p.id).where(literal(SECRET) != p.sec), SEC),
    "literal < column": Refused(lambda p, r: select(p.id).where(literal(SECRET) < p.mrn)),
    "literal == hash": Refused(lambda p, r: select(p.id).where(literal(SECRET) == search_hash(p.mrn))),
    "literal BETWEEN": Refused(lambda p, r: select(p.id).where(literal(SECRET).between(p.mrn, "z"))),
    "literal IN": Refused(lambda p, r: select(p.id).where(literal(SECRET).in_([p.mrn]))),
    "literal BETWEEN hashes": Refused(
        lambda p, r: select(p.id).where(literal(SECRET).between(search_hash(p.mrn), "z"))
    ),
    "literal IN hashes": Refused(lambda p, r: select(p.id).where(literal(SECRET).in_([search_hash(p.mrn)]))),
    "type_coerce of a hash": Refused(
        lambda p, r: select(p.id).where(type_coerce(search_hash(p.mrn), String) == SECRET)
    ),
    "hash == plain": Refused(lambda p, r: select(p.id).where(search_hash(p.mrn) == p.note)),
    "hash == a function": Refused(lambda p, r: select(p.id).where(search_hash(p.mrn) == func.lower(SECRET))),
    "hash IN plain": Refused(lambda p, r: select(p.id).where(search_hash(p.mrn).in_([SECRET, p.note]))),
    "hash IN (SELECT plain)": Refused(lambda p, r: select(p.id).where(search_hash(p.mrn).in_(select(p.note)))),
    "hash IN another scope's": Refused(lambda p, r: select(p.id).where(search_hash(p.mrn).in_([search_hash(p.nick)]))),
    "hash IN (UNION of two scopes)": Refused(
        lambda p, r: select(p.id).where(
            search_hash(p.mrn).in_(union_all(select(search_hash(r.mrn)), select(search_hash(r.code))))
        )
    ),
    "hash == over hashes of two scopes": Refused(
        lambda p, r: (lambda both: select(both.c.h).where(both.c.h == SECRET))(_two_scopes(p, r)), NICK
    ),
    "GROUP BY over hashes of two scopes": Refused(
        lambda p, r: (lambda both: select(func.count()).select_from(both).group_by(both.c.h))(_two_scopes(p, r)), NICK
    ),
    "UNION of hashes of two scopes": Refused(
        lambda p, r: union(select(search_hash(p.nick)), select(search_hash(r.code))), NICK
    ),
    "UNION of hashes and plain": Refused(lambda p, r: union(select(search_hash(p.nick)), select(p.note)), NICK),
    "coalesce of hashes of two scopes": Refused(
        lambda p, r: select(func.count(distinct(func.coalesce(search_hash(p.nick), search_hash(p.mrn))))), NICK
    ),
    "IN (SELECT ordered by a position)": Refused(
        lambda p, r: select(p.id).where(p.mrn.in_(select(r.mrn).order_by(text("1")).limit(1))), "g_visit.mrn"
    ),
    "plain == column": Refused(lambda p, r: select(p.id).where(p.note == p.mrn)),
    "plain LIKE column": Refused(lambda p, r: select(p.id).where(p.note.ilike(p.mrn))),
    "plain IN (SELECT column)": Refused(lambda p, r: select(p.id).where(p.note.in_(select(p.mrn)))),
    "JOIN ON plain == column": Refused(
        lambda p, r: select(p.id).join_from(p.id.table, r.id.table, p.note == r.code), CODE
    ),
    "a tuple": Refused(lambda p, r: select(p.id).where(tuple_(p.id, p.mrn).in_([(1, SECRET)]))),
    "a tuple of hashes": Refused(lambda p, r: select(p.id).where(tuple_(p.id, search_hash(p.mrn)).in_([(1, SECRET)]))),
    "a tuple IN (SELECT)": Refused(
        lambda p, r: select(p.id).where(tuple_(p.id, p.note).in_(select(r.pid, r.code))), CODE
    ),
    "case(value=)": Refused(lambda p, r: select(case({SECRET: 1}, value=p.mrn, else_=0))),
    "case(value=hash)": Refused(lambda p, r: select(case({SECRET: 1}, value=search_hash(p.mrn), else_=0))),
    "case of two columns": Refused(lambda p, r: select(case((p.id == 1, p.mrn), else_=p.nick))),
    "case with plaintext": Refused(lambda p, r: select(case((p.id == 1, p.mrn), else_=SECRET))),
    "coalesce with plaintext": Refused(lambda p, r: select(func.coalesce(p.mrn, SECRET))),
    "coalesce of two columns": Refused(lambda p, r: select(func.coalesce(p.nick, p.mrn)), NICK),
    "lower()": Refused(lambda p, r: select(p.id).where(func.lower(p.mrn).is_(None))),
    "lower() selected": Refused(lambda p, r: select(func.lower(p.sec)), SEC),
    "length()": Refused(lambda p, r: select(func.length(p.mrn))),
    "replace()": Refused(lambda p, r: select(func.replace(p.mrn, SECRET, ""))),
    "max()": Refused(lambda p, r: select(func.max(p.mrn))),
    "min()": Refused(lambda p, r: select(func.min(p.age)), "g_patient.age"),
    "sum()": Refused(lambda p, r: select(func.sum(p.age)), "g_patient.age"),
    "count(distinct)": Refused(lambda p, r: select(func.count(distinct(p.mrn.label("x"))))),
    "HAVING": Refused(lambda p, r: select(p.id).group_by(p.id).having(func.max(p.mrn).is_not(None))),
    "FILTER": Refused(lambda p, r: select(func.count(p.id).filter(literal(SECRET) == p.mrn))),
    "concatenation": Refused(lambda p, r: select(literal("x") + p.mrn.label("m").element)),
    "arithmetic": Refused(lambda p, r: select(p.n + type_coerce(p.age, Integer)), "g_patient.age"),
    "CAST": Refused(lambda p, r: select(cast(p.mrn, String))),
    "CAST to its type": Refused(lambda p, r: select(cast(p.note, p.mrn.type))),
    "EXTRACT": Refused(lambda p, r: select(extract("year", p.sec)), SEC),
    "coalesce in a subquery": Refused(
        lambda p, r: (lambda inner: select(inner.c.id).order_by(inner.c.m))(
            select(p.id, func.coalesce(_coerced(p.mrn), null()).label("m")).subquery()
        )
    ),
    "case in a subquery": Refused(
        lambda p, r: (lambda inner: select(inner.c.id).order_by(inner.c.m))(
            select(p.id, case((p.n == 1, _coerced(p.mrn))).label("m")).subquery()
        )
    ),
    "a scalar subquery in a subquery": Refused(
        lambda p, r: (lambda inner: select(inner.c.id).order_by(inner.c.m))(
            select(p.id, select(_coerced(r.code)).limit(1).scalar_subquery().label("m")).subquery()
        ), CODE,
    ),
    "COLLATE": Refused(lambda p, r: select(collate(type_coerce(p.mrn, String), "C"))),
    "type_coerce and LIKE": Refused(lambda p, r: select(p.id).where(type_coerce(p.mrn, String).like("a%"))),
    "type_coerce in a subquery": Refused(_hidden),
    "window ORDER BY": Refused(lambda p, r: select(func.row_number().over(order_by=p.mrn))),
    "window ORDER BY a string": Refused(lambda p, r: select(p.mrn, func.row_number().over(order_by="mrn"))),
    "window ORDER BY a string, over a join": Refused(
        lambda p, r: select(func.row_number().over(order_by="code")).join_from(p.id.table, r.id.table), CODE
    ),
    "window ORDER BY a label that shadows a column": Refused(
        lambda p, r: select(p.note.label("nick"), func.row_number().over(order_by="nick")), NICK
    ),
    "window PARTITION BY": Refused(lambda p, r: select(func.row_number().over(partition_by=p.mrn, order_by=p.id))),
    "first_value()": Refused(lambda p, r: select(func.first_value(p.mrn).over(order_by=p.id))),
    "a scalar subquery == literal": Refused(
        lambda p, r: select(p.id).where(literal(SECRET) == select(r.code).limit(1).scalar_subquery()), CODE
    ),
    "any_()": Refused(
        lambda p, r: select(p.id).where(literal(SECRET) == any_(select(r.code).scalar_subquery())), CODE
    ),
    "a condition": Refused(lambda p, r: select(p.id).where(p.flag), FLAG),
    "a condition in and_()": Refused(lambda p, r: select(p.id).where(and_(p.id > 0, or_(p.flag, p.n == 1))), FLAG),
    "within EXISTS": Refused(lambda p, r: select(p.id).where(exists().where(func.lower(r.code) == p.note)), CODE),
    "LATERAL": Refused(_lateral, CODE),
    "VALUES": Refused(
        lambda p, r: select(values(column("v", p.mrn.type), name="v").data([("a",)]).c.v)
    ),
    "VALUES of columns": Refused(
        lambda p, r: select(values(column("v", String), name="v").data([(p.mrn,)]).c.v)
    ),
    "VALUES of expressions": Refused(
        lambda p, r: select(p.id).where(
            p.note.in_(values(column("v", String), name="v").data([(func.lower(p.mrn),)]).scalar_values())
        )
    ),
    "VALUES in a CTE": Refused(
        lambda p, r: select(values(column("v", String), name="v").data([(func.lower(p.mrn),)]).cte().c.v)
    ),
    "a table-valued function": Refused(
        lambda p, r: select(func.json_each(p.mrn).table_valued("value").c.value)
    ),
    "TABLESAMPLE": Refused(
        lambda p, r: select(p.id.table.tablesample(func.bernoulli(func.length(p.mrn)), name="few").c.id)
    ),
    "a name for two columns": Refused(
        lambda p, r: select(p.id).where(or_(p.mrn == bindparam("q"), p.nick == bindparam("q"))), NICK
    ),
    "a name for a plain column too": Refused(
        lambda p, r: select(p.id).where(or_(p.mrn == bindparam("q"), p.note == bindparam("q")))
    ),
    "hashes of two scopes": Refused(lambda p, r: select(p.id).where(search_hash(p.mrn) == search_hash(p.nick))),
    "UPDATE plain = column": Refused(lambda p, r: _update(p).values(note=p.mrn)),
    "UPDATE plain = f(column)": Refused(lambda p, r: _update(p).values(note=func.lower(p.mrn))),
    "UPDATE column = other column": Refused(lambda p, r: _update(p).values(mrn=p.nick)),
    "UPDATE WHERE f(column)": Refused(lambda p, r: _update(p).where(func.lower(p.mrn) == SECRET).values(note="x")),
    "UPDATE FROM": Refused(lambda p, r: _update(p).where(p.note == r.code).values(note="x"), CODE),
    "DELETE": Refused(lambda p, r: delete(r.id.table).where(literal(SECRET) == r.code), CODE),
    "DELETE USING": Refused(lambda p, r: delete(r.id.table).where(r.pid == p.id, p.mrn == p.note)),
    "INSERT FROM SELECT into plain": Refused(
        lambda p, r: insert(p.id.table).from_select(["id", "note"], select(r.id, r.code)), CODE
    ),
    "INSERT RETURNING": Refused(lambda p, r: insert(p.id.table).values(id=9).returning(func.lower(p.mrn))),
    "UPDATE RETURNING": Refused(lambda p, r: _update(p).values(note="x").returning(cast(p.mrn, String).label("x"))),
    "UPDATE FROM RETURNING": Refused(
        lambda p, r: update(r.id.table).where(r.pid == p.id).values(pid=None).returning(func.lower(p.mrn))
    ),
    "DELETE RETURNING": Refused(lambda p, r: delete(p.id.table).returning(p.id, literal(SECRET) == p.mrn)),
    "RETURNING in a CTE": Refused(
        lambda p, r: select(delete(p.id.table).returning(func.lower(p.mrn).label("x")).cte().c.x)
    ),
    "RETURNING in a CTE beside": Refused(
        lambda p, r: select(r.id).add_cte(delete(p.id.table).returning(func.lower(p.mrn).label("x")).cte())
    ),
    "column() beside the table": Refused(lambda p, r: select(column("mrn")).select_from(p.id.table)),
    "SELECT from table()": Refused(
        lambda p, r: select((t := table("g_patient", column("id"), column("mrn"))).c.id).where(t.c.mrn == SECRET)
    ),
    "column() beside table()": Refused(
        lambda p, r: select(func.count()).select_from(table("g_patient", column("id"))).where(column("mrn") == SECRET)
    ),
    "SELECT from an alias of table()": Refused(
        lambda p, r: select(table("g_patient", column("id"), column("mrn")).alias().c.mrn)
    ),
    "INSERT into table()": Refused(
        lambda p, r: insert(table("g_patient", column("id"), column("mrn"))).values(id=1, mrn=SECRET)
    ),
    "UPDATE of table()": Refused(
        lambda p, r: update(table("g_patient", column("id"), column("mrn"))).values(mrn=SECRET)
    ),
}  # fmt: skip

_P, _R = ENCRYPTED.P, ENCRYPTED.R

REFUSED_ORM: dict[str, Refused] = {
    "an alias": Refused(lambda p, r: (lambda other: select(other.id).order_by(other.mrn))(aliased(_P))),
    "an entity's subquery": Refused(
        lambda p, r: (lambda other: select(other).order_by(other.mrn))(aliased(_P, select(_P).subquery()))
    ),
    "ORDER BY of a joined relationship": Refused(lambda p, r: select(_P).options(joinedload(_P.by_code)), CODE),
    "any()": Refused(lambda p, r: select(_P).where(_P.visits.any(func.lower(_R.code) == "x")), CODE),
    "has()": Refused(lambda p, r: select(_R).where(_R.patient.has(func.lower(_P.mrn) == "x"))),
    "loader criteria": Refused(
        lambda p, r: select(_P).options(with_loader_criteria(_P, func.lower(_P.mrn) == "x"))
    ),
    "loader criteria in a subquery": Refused(
        lambda p, r: select(_R.id).where(_R.pid.in_(select(_P.id))).options(
            with_loader_criteria(_P, func.lower(_P.mrn) == "x")
        )
    ),
    "a join's and_()": Refused(
        lambda p, r: select(_P.id).join(_P.visits.and_(func.lower(_R.code) == "x")), CODE
    ),
    "a join within a subquery": Refused(
        lambda p, r: select(_P.id).where(
            _P.id.in_(select(_P.id).join(_P.visits.and_(func.lower(_R.code) == "x")))
        ), CODE,
    ),
    "a bundle": Refused(lambda p, r: select(Bundle("b", func.upper(_P.mrn)))),
    "DISTINCT of an entity's column": Refused(lambda p, r: select(_P.mrn, _P.n).distinct()),
    "INSERT RETURNING entities": Refused(lambda p, r: insert(_P).values(id=9).returning(_P, func.lower(_P.mrn))),
    "bulk UPDATE": Refused(lambda p, r: update(_P).values(note=_P.mrn)),
    "bulk DELETE": Refused(lambda p, r: delete(_R).where(func.lower(_R.code) == "x"), CODE),
}  # fmt: skip


# -- legal -----------------------------------------------------------------------------------------------------------

Legal = Callable[[Models], Any]


def _table(models: Models) -> Any:
    return models.P.__table__


def _limited(m: Models) -> Any:
    return select(m.P).options(joinedload(m.P.visits)).where(m.P.nick == "ada").order_by(m.P.id).limit(2)


def _distinct_alias(m: Models) -> Any:
    other = aliased(m.P)
    return select(other).join(other.visits).distinct().order_by(other.id)


def _keyed_subquery(m: Models) -> Any:
    inner = select(m.P.id, m.P.mrn).subquery()
    return select(inner.c.id, inner.c.mrn).distinct().order_by(inner.c.id)


def _cte(m: Models) -> Any:
    chosen = select(m.P).where(m.P.mrn != "c").cte()
    return select(chosen.c.mrn, chosen.c.sec).order_by(chosen.c.id)


def _numbered(m: Models) -> Any:
    number = func.row_number().over(partition_by=m.P.n, order_by=m.P.id)
    return select(m.P.mrn, number, func.count(m.P.nick).over()).order_by(m.P.id)


LEGAL: dict[str, Legal] = {
    "entities": lambda m: select(m.P).order_by(m.P.id),
    "columns": lambda m: select(m.P.mrn, m.P.sec, m.P.flag).order_by(m.P.id),
    "a label": lambda m: select(m.P.mrn.label("x")).order_by(m.P.id),
    "a label ordered by another string": lambda m: select(m.P.id.label("i"), m.P.mrn).order_by("i"),
    "ORDER BY a position": lambda m: select(m.P.id, m.P.mrn).order_by(text("1 DESC")),
    "ORDER BY the attribute's name": lambda m: select(m.P.note, m.P.id).order_by(desc("id")),
    "IS NULL": lambda m: select(m.P.id).where(m.P.nick.is_(None)),
    "NOT IS NULL": lambda m: select(m.P.id).where(~m.P.nick.is_(None)).order_by(m.P.id),
    "IS NULL selected": lambda m: select(m.P.sec.is_(None), m.P.nick.is_not(None)).order_by(m.P.id),
    "ORDER BY IS NULL": lambda m: select(m.P.id).order_by(m.P.nick.is_(None), m.P.id),
    "a condition ==": lambda m: select(m.P.id).where(m.P.flag == True),  # noqa: E712 - the form under test
    "a condition == true()": lambda m: select(m.P.id).where(m.P.flag == true()),
    "a condition in case": lambda m: select(case((m.P.mrn == "a", 1), else_=0)).order_by(m.P.id),
    "ORDER BY a condition": lambda m: select(m.P.id).order_by(case((m.P.mrn == "b", 0), else_=1), m.P.id),
    "count": lambda m: select(func.count(m.P.nick), func.count(), func.count(m.P.sec)),
    "count of case": lambda m: select(func.count(case((m.P.mrn != "a", m.P.nick)))),
    "count with FILTER": lambda m: select(func.count(m.P.id).filter(m.P.nick == "ada")),
    "HAVING count": lambda m: select(m.P.n).group_by(m.P.n).having(func.count(m.P.nick) > 0).order_by(m.P.n),
    "coalesce of one column": lambda m: select(func.coalesce(m.P.nick, m.P.nick, null())).order_by(m.P.id),
    "coalesce of two rows": lambda m: (
        (lambda one: (
            select(func.coalesce(one.nick, m.P.nick)).select_from(m.P).join(one, one.id == 1).order_by(m.P.id)
        ))(aliased(m.P))
    ),
    "case results": lambda m: select(case((m.P.n == 1, m.P.mrn), else_=null())).order_by(m.P.id),
    "EXISTS": lambda m: select(m.P.id).where(exists().where(m.R.mrn == m.P.mrn, m.R.code == "y")),
    "EXISTS of columns": lambda m: (
        select(m.P.id).where(select(m.R.code).where(m.R.pid == m.P.id).exists()).order_by(m.P.id)
    ),
    "EXISTS selected": lambda m: select(
        exists(select(m.R)), ~exists(m.R.mrn).where(m.R.id < 0), exists(select(m.R.code)).label("x")
    ),
    "EXISTS in case": lambda m: select(case((exists(select(m.R.mrn)), m.P.id), else_=0)).order_by(m.P.id),
    "NOT EXISTS": lambda m: select(m.P.id).where(~exists(m.R.mrn).where(m.R.mrn == m.P.mrn)),
    "a scalar subquery selected": lambda m: select(
        m.P.id, select(m.R.code).where(m.R.pid == m.P.id).order_by(m.R.id).limit(1).scalar_subquery()
    ).order_by(m.P.id),
    "DISTINCT entities": lambda m: select(m.P).join(m.P.visits).distinct().order_by(m.P.id),
    "DISTINCT of an alias": _distinct_alias,
    "DISTINCT with the key": lambda m: select(m.P.id, m.P.mrn).join(m.P.visits).distinct().order_by(m.P.id),
    "DISTINCT of a subquery with the key": _keyed_subquery,
    "DISTINCT of type_coerce with the key": lambda m: (
        select(func.count()).select_from(
            select(m.P.id, type_coerce(m.P.mrn, LargeBinary)).join(m.P.visits).distinct().subquery()
        )
    ),
    "ORDER BY a plain column's name, over a join": lambda m: select(m.R.id).join(m.R.patient).order_by("n", m.R.id),
    "ORDER BY a label that shadows a column": lambda m: (
        select(m.P.id, m.P.note.label("nick")).order_by("nick", m.P.id)
    ),
    "DISTINCT of plain columns": lambda m: select(m.P.note).where(m.P.nick == "ada").distinct(),
    "GROUP BY the key": lambda m: (
        select(m.P.id, m.P.mrn, func.count(m.R.id)).join(m.P.visits).group_by(m.P.id, m.P.mrn).order_by(m.P.id)
    ),
    "GROUP BY entities": lambda m: (
        select(m.P, func.count(m.R.id)).join(m.P.visits).group_by(m.P).order_by(m.P.id)
    ),
    "GROUP BY the key by name": lambda m: (
        select(m.P.id.label("i"), m.P.mrn.label("m"), func.count(m.R.id))
        .join(m.P.visits).group_by("i", "m").order_by("i")
    ),
    "GROUP BY a name, over a join": lambda m: (
        select(m.P.note, func.count(m.R.code)).join(m.P.visits).group_by("note").order_by("note")
    ),
    "GROUP BY a plain column": lambda m: (
        select(m.P.n, func.count(m.P.sec)).where(m.P.mrn != "b").group_by(m.P.n).order_by(m.P.n)
    ),
    "UNION with the key": lambda m: union(
        select(m.P.id, m.P.mrn).where(m.P.id < 3), select(m.P.id, m.P.mrn).where(m.P.id > 1)
    ).order_by("id"),
    "UNION with the key and a literal": lambda m: union(
        select(literal("x").label("k"), m.P.id, m.P.mrn), select(literal("y").label("k"), m.P.id, m.P.mrn)
    ).order_by("k", "id"),
    "UNION ALL": lambda m: union_all(
        select(m.P.id, m.P.mrn).where(m.P.id == 1), select(m.P.id, m.P.mrn).where(m.P.id == 2)
    ).order_by("id"),
    "UNION ALL with NULL": lambda m: union_all(select(m.P.id, m.P.mrn), select(m.R.id + 10, null())).order_by("id"),
    "IN (SELECT DISTINCT)": lambda m: select(m.P.id).where(m.P.mrn.in_(select(m.R.mrn).distinct())).order_by(m.P.id),
    "a subquery": lambda m: (lambda s: select(s.c.mrn).order_by(s.c.id))(select(m.P).subquery()),
    "a CTE": _cte,
    "joinedload": lambda m: select(m.P).options(joinedload(m.P.visits)).order_by(m.P.id),
    "joinedload with LIMIT": _limited,
    "joinedload over encrypted columns with LIMIT": lambda m: (
        select(m.P).options(joinedload(m.P.by_mrn)).order_by(m.P.id).limit(2)
    ),
    "selectinload": lambda m: select(m.P).options(selectinload(m.P.visits)).order_by(m.P.id),
    "subqueryload": lambda m: select(m.P).options(subqueryload(m.P.visits)).order_by(m.P.id),
    "lazyload": lambda m: select(m.P).options(lazyload(m.P.by_mrn)).order_by(m.P.id),
    "contains_eager": lambda m: (
        select(m.P).join(m.P.visits).options(contains_eager(m.P.visits)).order_by(m.P.id, m.R.id)
    ),
    "windows over plain columns": _numbered,
    "any()": lambda m: select(m.P.id).where(m.P.visits.any(m.R.code == "x")).order_by(m.P.id),
    "an aliased subquery": lambda m: (
        (lambda a: select(a).order_by(a.id))(aliased(m.P, select(m.P).order_by(m.P.id).limit(2).subquery()))
    ),
    "a bundle": lambda m: select(Bundle("b", m.P.id, m.P.mrn)).order_by(m.P.id),
    "Core": lambda m: select(_table(m).c.id, _table(m).c.mrn).where(_table(m).c.nick == "ada").order_by(_table(m).c.id),
    "FOR UPDATE": lambda m: select(m.P.id).where(m.P.mrn == "a").with_for_update(),
    "loader criteria": lambda m: select(m.P.id).options(with_loader_criteria(m.P, m.P.mrn == "a")),
    "one name for one column": lambda m: (
        select(m.P.id).where(or_(m.P.mrn == bindparam("q"), m.P.mrn.in_([bindparam("q")]))).params(q="b")
    ),
    "one name for one salt scope": lambda m: (
        select(m.P.id).join(m.P.visits).where(m.P.mrn == bindparam("q"), m.R.mrn == bindparam("q")).params(q="a")
    ),
    "literal_column": lambda m: select(literal_column("1"), m.P.id).where(m.P.mrn == "a"),
}  # fmt: skip
