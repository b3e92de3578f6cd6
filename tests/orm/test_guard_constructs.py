"""Constructs of one's own: whatever they keep their parts in, the guard finds an encrypted column there."""

from __future__ import annotations

import contextlib
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, deque, namedtuple
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from keys_tools import TurnableClock
from orm.guard_forms import ENCRYPTED, MRN, SECRET, rows
from orm.test_guard import reached
from sqlalchemy import (
    Boolean,
    Column,
    Engine,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    exists,
    func,
    inspect,
    literal,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import joinedload
from sqlalchemy.sql.elements import ClauseElement, ColumnElement
from sqlalchemy.sql.expression import Executable
from sqlalchemy.sql.functions import FunctionElement, GenericFunction
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.sql.visitors import InternalTraversal

from sqla_byok import Byok, LocalKms, UnsupportedQueryError

P = ENCRYPTED.P
R = ENCRYPTED.R
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


class Is(ColumnElement[bool]):
    """A comparison that comes to its column by a way of its own."""

    inherit_cache = False
    type = Boolean()

    def __init__(self, way: Callable[[Any], Any], held: Any, value: Any) -> None:
        self.way, self.held, self.value = way, held, value


class Upper(FunctionElement[str]):
    """A function that does."""

    name = "upper"
    inherit_cache = False
    type = String()

    def __init__(self, way: Callable[[Any], Any], held: Any) -> None:
        super().__init__()
        self.way, self.held = way, held


class Sampled(FromClause):
    """A FROM that does."""

    inherit_cache = False
    named_with_column = False

    def __init__(self, way: Callable[[Any], Any], held: Any) -> None:
        self.way, self.held = way, held

    def _refresh_for_new_column(self, column: Any) -> None:
        pass


class Listed(Select[Any]):
    """A SELECT that does."""

    inherit_cache = False
    way: Any = None
    held: Any = None


class Find(Executable, ClauseElement):
    """A statement that does."""

    inherit_cache = False

    def __init__(self, way: Callable[[Any], Any], held: Any) -> None:
        self.way, self.held = way, held


@compiles(Is)
def _is(element: Is, compiler: Any, **kwargs: Any) -> str:
    column = element.way(element.held)
    shown = column if isinstance(column, str) else compiler.process(column, **kwargs)
    return f"{shown} = {compiler.process(literal(element.value), **kwargs)}"


@compiles(Upper)
def _upper(element: Upper, compiler: Any, **kwargs: Any) -> str:
    return f"upper({compiler.process(element.way(element.held), **kwargs)})"


@compiles(Sampled)
def _sampled(element: Sampled, compiler: Any, **kwargs: Any) -> str:
    column = compiler.process(element.way(element.held))
    return f"(SELECT max({column}) AS x FROM g_patient) AS s"


@compiles(Listed)
def _listed(element: Listed, compiler: Any, **kwargs: Any) -> str:
    plain = compiler.visit_select(element, **kwargs)
    return f"{plain} ORDER BY {compiler.process(element.way(element.held))}"


@compiles(Find)
def _find(element: Find, compiler: Any, **kwargs: Any) -> str:
    column = element.way(element.held)
    return f"SELECT g_patient.id FROM g_patient WHERE {compiler.process(column)} = 'x'"


REGISTRY: dict[str, Any] = {}


def _of_class(held: Any, name: str) -> Any:
    return getattr(held, name).__clause_element__()


# What a construct holds, and how it comes from there to a column of this name.
WAYS: dict[str, Callable[[str], tuple[Any, Callable[[Any], Any]]]] = {
    "a mapped class": lambda name: (P, lambda it: _of_class(it, name)),
    "a class in a container": lambda name: ([{"model": P}], lambda it: _of_class(it[0]["model"], name)),
    "a Table": lambda name: (P.__table__, lambda it: it.c[name]),
    "a MetaData": lambda name: (P.metadata, lambda it: it.tables["g_patient"].c[name]),
    "a mapper": lambda name: (inspect(P), lambda it: it.columns[name]),
    "an object": lambda name: (P(id=1), lambda it: _of_class(type(it), name)),
    "a default of a function": lambda name: (lambda it=c[name]: it, lambda it: it()),
    "a default by name": lambda name: (_keyword_of(c[name]), lambda it: it()),
    "a weak reference": lambda name: (weakref.ref(c[name]), lambda it: it()),
    "a weak dict": lambda name: (_weak_dict(c[name]), lambda it: next(iter(it.values()))),
    "a context variable": lambda name: (_variable(c[name]), lambda it: it.get()),
    "a registry": lambda name: (name, lambda it: REGISTRY[it]),
    "a module": lambda name: (ENCRYPTED, lambda it: _of_class(it.P, name)),
    "a function": lambda name: (None, lambda it: _of_class(P, name)),
}  # fmt: skip


def _keyword_of(column: Any) -> Any:
    def default(*, it: Any = column) -> Any:
        return it

    return default


def _weak_dict(column: Any) -> Any:
    return weakref.WeakValueDictionary({1: column})


def _variable(column: Any) -> ContextVar[Any]:
    variable = ContextVar[Any]("variable")
    variable.set(column)
    return variable


def _of_own(way: Any, held: Any) -> dict[str, Any]:
    listed = Listed(c.id)
    listed.way, listed.held = way, held
    return {
        "a condition": select(P.id).where(Is(way, held, SECRET)),
        "a condition, the column selected too": select(P.id, P.mrn, P.note).where(Is(way, held, SECRET)),
        "beside a look-up": select(P.id).where(P.mrn == "a", Is(way, held, SECRET)),
        "within another": select(P.id).where(Element(1, [Is(way, held, SECRET)]) == SECRET),
        "in HAVING": select(P.id).group_by(P.id).having(Is(way, held, SECRET)),
        "in EXISTS": select(R.id).where(exists(select(P.id).where(Is(way, held, SECRET)))),
        "in SET": update(P.__table__).values(note=Upper(way, held)),
        "a function": select(P.id).order_by(Upper(way, held)),
        "a FROM": select(literal(1)).select_from(Sampled(way, held)),
        "a SELECT": listed,
        "a statement": Find(way, held),
    }


@pytest.mark.parametrize("name", WAYS)
def test_a_column_that_a_construct_does_not_hold_is_found(engine: Engine, byok: Byok, name: str) -> None:
    """By whatever way it comes to it when it is rendered; by the same way it may come to a plaintext column."""
    REGISTRY.update({"mrn": c.mrn, "note": c.note})
    ENCRYPTED.Base.metadata.create_all(engine)
    ran, wrong = [], {}
    with byok.session("t1", engine) as session:
        for form, statement in _of_own(*reversed(WAYS[name]("mrn"))).items():
            with reached(engine) as sent:
                try:
                    session.connection().execute(statement)
                except UnsupportedQueryError as error:
                    if error.column == MRN and not sent:
                        continue
                ran.append(form)
        for form, statement in _of_own(*reversed(WAYS[name]("note"))).items():
            try:
                session.connection().execute(statement)
            except UnsupportedQueryError as error:
                wrong[form] = str(error)
            except DBAPIError:
                session.rollback()
    assert (ran, wrong) == ([], {})


class Told(ColumnElement[Any]):
    """One that renders what it is told, and needs the statement around it for that."""

    inherit_cache = False
    type = Boolean()

    def __init__(self, told: Any, around: int = 0, model: Any = None) -> None:
        self.told, self.around, self.model = told, around, model

    def get_children(self, **kwargs: Any) -> Any:
        return [self.told]


@compiles(Told)
def _told(element: Told, compiler: Any, **kwargs: Any) -> str:
    assert not element.around or compiler.stack[-1]["selectable"].selected_columns
    assert element.around != 2 or len(compiler.stack[-1]["selectable"].selected_columns) == 2
    return f"({compiler.process(element.told, **kwargs)})"


def test_what_is_right_on_ciphertext_is_right_in_a_construct(engine: Engine, byok: Byok) -> None:
    """Look-ups, NULL tests, counting and EXISTS within one, also where it can be rendered in a statement only."""
    ENCRYPTED.Base.metadata.create_all(engine)
    right = [
        P.mrn == "a",
        P.mrn.is_(None),
        ~P.mrn.in_(["a", "b"]),
        exists(select(R.id).where(R.mrn == P.mrn)),
        exists(select(R).where(R.code == "x")),
        exists(select(R.code).where(R.pid == P.id)),
        P.id.in_(select(R.pid).where(R.mrn == "a")),
        select(func.count(R.code)).scalar_subquery() > 0,
    ]
    with byok.session("t1", engine) as session:
        for told in right:
            for around in (0, 1):
                session.execute(select(P.id, P.mrn).where(Told(told, around), Told(told, around, P))).all()
                session.execute(select(P.id).where(Told(Told(told, around), around))).all()


def test_a_construct_that_cannot_be_rendered_alone_counts_by_what_it_has(engine: Engine, byok: Byok) -> None:
    """Nobody can tell what it makes of a class with encrypted columns: refused; of plaintext only, not."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        for model in (P, P.__table__, [P], inspect(P)):
            with pytest.raises(UnsupportedQueryError, match="cannot be rendered by itself"):
                session.execute(select(P.id, P.n).where(Told(P.note == "x", 2, model)))
        session.execute(select(P.id, P.n).where(Told(P.note == "x", 2))).all()


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


class Explain(Executable, ClauseElement):
    """That of SQLAlchemy's wiki; the text around the statement can be another."""

    inherit_cache = False

    def __init__(self, statement: Any, around: str = "EXPLAIN {}", beside: Any = None) -> None:
        self.statement, self.around, self.beside = statement, around, beside


class ExplainOfElement(Explain):
    """With the statement under a name that SQLAlchemy's own constructs have for it."""

    inherit_cache = False

    def __init__(self, statement: Any, around: str = "EXPLAIN {}", beside: Any = None) -> None:
        super().__init__(statement, around, beside)
        self.element = statement


@compiles(Explain)
def _explain(element: Explain, compiler: Any, **kwargs: Any) -> str:
    return element.around.format(compiler.process(element.statement, **kwargs))


EXPLAINED: dict[str, Callable[[], Any]] = {
    "entities": lambda: select(P),
    "columns": lambda: select(P.id, P.mrn),
    "one column": lambda: select(P.mrn),
    "as many as a plan has": lambda: select(P.id, P.mrn, P.nick, P.sec),
    "of Core": lambda: select(P.__table__),
    "a look-up": lambda: select(P.mrn).where(P.mrn == SECRET, P.nick.in_([SECRET, "x"])),
    "a join": lambda: select(P, R).join(R, R.mrn == P.mrn),
    "a subquery": lambda: select(select(P).subquery()),
    "a CTE": lambda: select(select(P).cte().c.mrn),
    "a union": lambda: union_all(select(P.id, P.mrn), select(P.id, P.mrn)),
    "of eager loads": lambda: select(P).options(joinedload(P.visits)),
}


@pytest.mark.parametrize("kind", [Explain, ExplainOfElement])
@pytest.mark.parametrize("name", EXPLAINED)
def test_a_statement_is_explained_as_it_would_run(engine: Engine, byok: Byok, kind: Any, name: str) -> None:
    """Whatever it selects; what is read is the plan, of which nothing is taken for ciphertext."""
    ENCRYPTED.Base.metadata.create_all(engine)
    around = {"sqlite": "EXPLAIN QUERY PLAN {}", "postgresql": "EXPLAIN (ANALYZE, COSTS OFF) {}"}
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        explained = kind(EXPLAINED[name](), around.get(engine.dialect.name, "EXPLAIN {}"))
        for run in (session.execute, session.connection().execute):
            with reached(engine) as sent:
                plan = run(explained).all()
            assert plan
            assert SECRET not in str(sent)


def test_a_statement_around_another_may_not_compute(engine: Engine, byok: Byok) -> None:
    """What is refused by itself is refused within, and so is what the text around it makes of its ciphertext."""
    ENCRYPTED.Base.metadata.create_all(engine)
    refused = [
        Explain(select(P.id).order_by(P.mrn)),
        Explain(select(func.lower(P.mrn))),
        Explain(select(P.mrn), "SELECT max(mrn) FROM ({}) AS x"),
        Explain(select(P.mrn), "WITH x AS ({}) SELECT count(DISTINCT mrn) FROM x"),
        Explain(select(P.mrn), "{} ORDER BY mrn"),
        Explain(select(P.mrn), "{} ORDER BY 1"),
        Explain(select(P.mrn), "{} UNION SELECT 'x'"),
        Explain(select(P.id, P.mrn), "INSERT INTO g_visit (id, note) {}"),
        Explain(select(P.id, P.note), "EXPLAIN {}", beside=[func.lower(P.mrn)]),
        ExplainOfElement(select(P.id, P.note), "EXPLAIN {}", beside=[func.lower(P.mrn)]),
    ]
    with byok.session("t1", engine) as session:
        for statement in refused:
            with reached(engine) as sent, pytest.raises(UnsupportedQueryError):
                session.execute(statement)
            assert sent == []


def test_a_hint_around_a_statement_leaves_its_rows(engine: Engine, byok: Byok) -> None:
    """A construct that only puts a comment before a SELECT returns its rows, decrypted."""
    ENCRYPTED.Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(rows(ENCRYPTED))
        session.flush()
        hinted = Explain(select(P.id, P.mrn).where(P.mrn == "b"), "/* hint */ {}")
        assert session.execute(hinted).all() == [(2, "b")]


def test_while_salts_are_rotated_a_construct_says_so(engine: Engine, tmp_path: Path) -> None:
    """A statement within it cannot be given a second hash to look for: an error that says what to do."""
    ENCRYPTED.Base.metadata.create_all(engine)
    look_up = select(P.id).where(P.mrn == "a")
    url = f"sqlite:///{tmp_path / 'rotating.db'}"
    with contextlib.closing(Byok(keystore=url, clock=TurnableClock())) as byok:
        byok.create_keystore()
        byok.attach(engine)
        byok.onboard("t1", LocalKms.create(tmp_path / "rotating.key"))
        with byok.session("t1", engine) as session:
            session.add_all(rows(ENCRYPTED))
            session.commit()
            assert session.execute(Explain(look_up, "/* hint */ {}")).all() == [(1,)]
        byok.rotate_salt("t1")
        with byok.session("t1", engine) as session:
            assert session.execute(look_up).all() == [(1,)]
            with pytest.raises(UnsupportedQueryError, match="being rotated"):
                session.execute(Explain(look_up, "/* hint */ {}"))
