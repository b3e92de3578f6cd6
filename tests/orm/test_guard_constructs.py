"""Constructs of one's own: whatever they keep their parts in, the guard finds an encrypted column there."""

from __future__ import annotations

import contextlib
from collections import ChainMap, OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from orm.guard_forms import ENCRYPTED, MRN, SECRET, rows
from orm.test_guard import reached
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, literal, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ClauseElement, ColumnElement
from sqlalchemy.sql.expression import Executable
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.sql.visitors import InternalTraversal

from sqla_byok import Byok, UnsupportedQueryError

P = ENCRYPTED.P
c = P.__table__.c


@dataclass
class Held:
    part: Any


@dataclass(slots=True)
class HeldInSlots:
    part: Any


class Slotted:
    __slots__ = ("part",)

    def __init__(self, part: Any) -> None:
        self.part = part


class Bag:
    """A container of somebody's own."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Any:
        return self._parts[index]


Pair = namedtuple("Pair", "left right")


def _looped(part: Any) -> Any:
    loop: list[Any] = [part]
    loop.append({"again": loop})
    return loop


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda it: it,
    "a list": lambda it: [it],
    "a tuple": lambda it: (1, it),
    "a dict": lambda it: {"left": it},
    "a dict's keys": lambda it: {it: 1},
    "a set": lambda it: {it},
    "a frozenset": lambda it: frozenset([it]),
    "a deque": lambda it: deque([it]),
    "a named tuple": lambda it: Pair(it, 1),
    "an OrderedDict": lambda it: OrderedDict(left=it),
    "a ChainMap": lambda it: ChainMap({"left": it}),
    "a UserDict": lambda it: UserDict(left=it),
    "a UserList": lambda it: UserList([it]),
    "a read-only dict": lambda it: MappingProxyType({"left": it}),
    "a namespace": lambda it: SimpleNamespace(left=it),
    "a dataclass": Held,
    "a dataclass with slots": HeldInSlots,
    "slots": Slotted,
    "a container of one's own": Bag,
    "a partial": lambda it: partial(str, it),
    "a closure": lambda it: lambda: it,
    "all of them": lambda it: {"x": [({1: deque([Held(Slotted(Bag(frozenset([it]))))])},)]},
    "what leads back": _looped,
}


class Element(ColumnElement[str]):
    inherit_cache = False
    type = String()

    def __init__(self, told: Any, held: Any) -> None:
        self.told, self.held = told, held


class Function(FunctionElement[str]):
    name = "upper"
    inherit_cache = False
    type = String()

    def __init__(self, told: Any, held: Any) -> None:
        super().__init__(literal("x"))
        self.told, self.held = told, held


class Cached(ColumnElement[str]):
    """One that tells a part, and has another."""

    _traverse_internals = [("told", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 - SQLAlchemy's declaration
    inherit_cache = True
    type = String()

    def __init__(self, told: Any, held: Any) -> None:
        self.told, self.held = told, {"held": held}


class Named(ColumnElement[str]):
    """One that has a name only, and finds the column when it is asked."""

    inherit_cache = False
    type = String()

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def columns(self) -> Any:
        return [{"it": c[self.name]}]

    @property
    def broken(self) -> Any:
        raise RuntimeError


class OfClass(ColumnElement[str]):
    """One whose class has the column."""

    inherit_cache = False
    type = String()
    parts = (c.mrn,)


class coalesce_of_mine(GenericFunction[str]):  # noqa: N801 - as SQL has it
    """A function with the name of one that is fine."""

    name = "coalesce"
    inherit_cache = True
    _register = False
    type = String()


for _class in (Element, Function, Cached, Named, OfClass):

    @compiles(_class)
    def _rendered(element: Any, compiler: Any, **kwargs: Any) -> str:
        return "upper('x')"


@pytest.mark.parametrize("kind", [Element, Function])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_column_in_any_container_is_found(engine: Engine, byok: Byok, kind: Any, container: str) -> None:
    """As a condition, in ORDER BY and selected; with a plaintext column in its place the statement runs."""
    held, fine = (CONTAINERS[container](column) for column in (c.mrn, c.note))
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        for statement in (
            select(P.id).where(kind(1, held) == SECRET),
            select(P.id).order_by(kind(1, held)),
            select(kind(1, held).label("x")),
            select(P.id).where(kind(1, kind(2, held))._annotate({"x": 1}) == SECRET),
        ):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError) as raised:
                session.execute(statement)
            assert (sent, raised.value.column) == ([], MRN)
        session.execute(select(P.id, kind(1, fine)).order_by(kind(1, fine))).all()


def test_columns_that_are_not_told_are_found(engine: Engine, byok: Byok) -> None:
    """Beside what a class tells of itself, in its properties, in the class, and in functions of a known name."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        for refused in (
            Cached(literal("x"), c.mrn),
            Cached(c.mrn, literal("x")),
            Named("mrn"),
            OfClass(),
            coalesce_of_mine(c.mrn, c.mrn),
        ):
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError) as raised:
                session.execute(select(P.id).where(refused == SECRET))
            assert (sent, raised.value.column) == ([], MRN)
        session.execute(
            select(P.id).where(Named("note") == "x", coalesce_of_mine(c.note, c.note) == "x")
        ).all()


def test_what_a_construct_holds_beside_sql_is_left_alone(engine: Engine, byok: Byok) -> None:
    """A session, an engine, objects and classes of the model in it are no columns of the statement."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        patient = session.get_one(P, 1)
        session.expire(patient)
        for held in (session, engine, P, patient, [patient], P.__mapper__, {"model": P}, byok):
            with reached(engine) as sent:
                session.execute(select(P.id).order_by(Element(c.note, held))).all()
            assert len(sent) == 1


class InsertFromSelect(Executable, ClauseElement):
    """That of SQLAlchemy's documentation."""

    inherit_cache = False

    def __init__(self, table: Any, columns: str, selected: Any) -> None:
        self.table, self.columns, self.selected = table, columns, selected


@compiles(InsertFromSelect)
def _insert(element: InsertFromSelect, compiler: Any, **kwargs: Any) -> str:
    table = compiler.process(element.table, asfrom=True, **kwargs)
    return f"INSERT INTO {table} {element.columns} {compiler.process(element.selected, **kwargs)}"


class DeleteAll(Executable, ClauseElement):
    inherit_cache = False

    def __init__(self, table: Any) -> None:
        self.table = table


@compiles(DeleteAll)
def _delete(element: DeleteAll, compiler: Any, **kwargs: Any) -> str:
    return f"DELETE FROM {compiler.process(element.table, asfrom=True, **kwargs)}"


@pytest.mark.parametrize("mode", ["raise", "report"])
def test_a_statement_of_ones_own_writes_to_no_encrypted_column(
    engine: Engine, tmp_path: Path, customers: Any, kms_options: Any, mode: Any
) -> None:
    """Nothing in it would be encrypted: it is refused, also with guard="report"; reading and deleting is not."""
    notes = Table(
        "guard_log", MetaData(), Column("id", Integer, primary_key=True), Column("note", String(40))
    )
    ENCRYPTED.Base.metadata.create_all(engine)
    notes.metadata.create_all(engine)
    with contextlib.closing(Byok(keystore=f"sqlite:///{tmp_path / 'own.db'}", **kms_options)) as byok:
        byok.create_keystore()
        byok.attach(engine, guard=mode, raw_sql="allow")
        byok.onboard("t1", customers["t1"])
        with engine.begin() as connection:
            for columns in ("(id, mrn)", "(mrn_hash, id)", ""):
                refused = InsertFromSelect(P.__table__, columns, select(literal(9), literal(SECRET)))
                with reached(engine) as sent, pytest.raises(UnsupportedQueryError, match="insert\\(\\)"):
                    connection.execute(refused)
                assert sent == []
            connection.execute(InsertFromSelect(notes, "(id, note)", select(literal(9), literal(SECRET))))
            connection.execute(InsertFromSelect(notes, "(id, note)", select(c.id + 100, c.note)))
            own = select(c.id + 100, c.note).where(c.mrn == "a")
            with byok.tenant("t1"):
                connection.execute(InsertFromSelect(P.__table__, "(id, note)", own))
            connection.execute(DeleteAll(P.__table__))
