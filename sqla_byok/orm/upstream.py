"""The private SQLAlchemy names that filling and following a statement needs, in one place.

SQLAlchemy has no public way to change the values of an INSERT or UPDATE that somebody else built. Both supported
lines, 2.0 and 2.1, are tested against what stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

from sqlalchemy import Engine, Select, Table, UniqueConstraint, and_, case
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import ColumnProperty, Mapper
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.orm.evaluator import UnevaluatableError, _EvaluatorCompiler
from sqlalchemy.orm.interfaces import CompileStateOption
from sqlalchemy.sql import operators, sqltypes
from sqlalchemy.sql.base import CompileState
from sqlalchemy.sql.compiler import WARN_LINTING, SQLCompiler
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    Grouping,
    Label,
    TableValuedColumn,
    TextClause,
    _anonymous_label,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.lambdas import NullLambdaStatement
from sqlalchemy.sql.selectable import (
    FromClause,
    Join,
    Lateral,
    ScalarValues,
    SelectState,
    TableClause,
    Values,
)
from sqlalchemy.sql.util import _deep_deannotate
from sqlalchemy.sql.visitors import InternalTraversal, iterate
from sqlalchemy.util import immutabledict
from sqlalchemy.util.concurrency import await_only
from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

from sqla_byok.orm.constructs import children, is_own

__all__ = [
    "Call",
    "Enclosing",
    "Evaluated",
    "FanOut",
    "Named",
    "Parts",
    "Steps",
    "Writing",
    "added_ctes",
    "before_synchronizing",
    "beside",
    "bound_as",
    "case_counts",
    "columns_of",
    "compiled_anew",
    "conflict_columns",
    "conflict_criteria",
    "conflict_elements",
    "conflict_values",
    "conflicts",
    "criteria",
    "dml_within",
    "driver_cursor",
    "engine_of",
    "evaluate_only",
    "excluded",
    "executed",
    "fanned_out",
    "forget_columns",
    "forget_metadata",
    "given_property",
    "has_rows",
    "held_to",
    "hints",
    "in_greenlet",
    "inside",
    "instead",
    "is_binary",
    "is_made_up",
    "json_functions",
    "made_by",
    "may_become",
    "multi_values",
    "named_in_compound",
    "named_in_order_by",
    "of_entity",
    "ordering",
    "parts",
    "pending_columns",
    "pieces_of",
    "plain_table",
    "prefetched",
    "prefixes",
    "properties_of",
    "proxied",
    "reads_early",
    "referred",
    "render_again",
    "renders_itself",
    "replacing",
    "resolved",
    "restated",
    "result_types",
    "returned",
    "returning",
    "row_of",
    "row_parameters",
    "rows_of_values",
    "run_or_await",
    "select_names",
    "selected_by",
    "selected_columns",
    "show_in_subqueries",
    "step_in",
    "tables_of",
    "target",
    "targets",
    "tells_rows_apart",
    "text_of",
    "traverse_too",
    "unique_columns",
    "values",
    "variants",
    "with_clauses",
    "with_conflicts",
    "with_criterion",
    "with_multi_values",
    "with_returned",
    "with_selected",
    "with_target",
    "with_values",
    "without_evaluated",
    "writing",
    "written",
    "written_froms",
]

T = TypeVar("T")
Item = tuple[Any, Any]


class FanOut(CompileStateOption):
    """An option that does nothing but enter a statement's cache key.

    :param live: how many search salts the compiled statement looks up, by whose they are, as pairs.
    """

    propagate_to_loaders = False
    _cache_key_traversal = [("live", InternalTraversal.dp_plain_obj)]  # noqa: RUF012 - SQLAlchemy's declaration

    def __init__(self, live: tuple[tuple[str | None, int], ...]) -> None:
        self.live = live


def fanned_out(compiler: Any) -> Mapping[str | None, int]:
    """How many search salts a statement that is being compiled looks up, by whose they are; 1 where nothing is said."""
    for option in getattr(inside(compiler.statement), "_with_options", ()):
        if isinstance(option, FanOut):
            return dict(option.live)
    return {}


def bound_as(bind: Any, type_: Any) -> Any:
    """A bound value of another type, under the same name."""
    other = bind._clone(maintain_key=True)
    other.type = type_
    return other


def with_clauses(clauses: Any, parts: list[Any]) -> Any:
    """A list of expressions with others in the place of its own."""
    other = clauses._clone()
    other.clauses = parts
    return other


def evaluate_only(may_be: Callable[[Any], bool]) -> None:
    """Have the ORM ask the database, and not evaluate in Python, where a comparison may not be.

    It does so for ``synchronize_session``, by a column's annotations, without which it could not alias the column.
    """
    plain: Any = _EvaluatorCompiler.visit_binary

    def visit_binary(self: Any, binary: Any) -> Any:
        if not may_be(binary):
            raise UnevaluatableError("an encrypted column is compared by its search hash")
        return plain(self, binary)

    _EvaluatorCompiler.visit_binary = visit_binary  # type: ignore[method-assign]


def tells_rows_apart(select: Any) -> bool:
    """Whether a SELECT groups or has a DISTINCT ON (an extension before the columns, from 2.1 on)."""
    before_columns = getattr(select, "_pre_columns_clause", None)
    return bool(select._distinct_on or select._group_by_clauses or before_columns is not None)


def traverse_too(name: str, *, expression: bool = False) -> Callable[[type[T]], type[T]]:
    """Have SQLAlchemy know of what a subclass of an expression holds, as part of its cache key.

    :param expression: it is one too, and not a string.
    """

    def more(cls: Any) -> Any:
        kind = InternalTraversal.dp_clauseelement if expression else InternalTraversal.dp_string
        field = [(name, kind)]
        cls._traverse_internals = cls._traverse_internals + field
        cls._cache_key_traversal = cls._cache_key_traversal + field
        return cls

    return more


def render_again(bind: Any, compiler: Any, suffix: str, **kwargs: Any) -> Any:
    """Render a copy of a bound value beside the first, under a name of its own and the first's key.

    The key is what SQLAlchemy finds the value by, wherever it was given, so that it serves both.
    """
    if kwargs.get("literal_binds"):
        return compiler.visit_bindparam(bind, **kwargs)
    first = compiler.binds.get(bind.key)
    name = bind.key if first is None else compiler.bind_names[first]
    compiler.bind_names[bind] = f"{name}{suffix}"
    text = compiler.visit_bindparam(bind, **kwargs)
    if first is not None:
        compiler.binds[bind.key] = first
    return text


_HAS_GREENLET = find_spec("greenlet") is not None


def in_greenlet() -> bool:
    """Whether this runs under asyncio, so that what takes long has to be awaited.

    SQLAlchemy 2.1 does not install greenlet, and raises where it is asked without one.
    """
    return _HAS_GREENLET and _in_greenlet()


def run_or_await(run: Callable[[], T], coroutine: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What takes long: run here, or awaited where this runs under asyncio."""
    if not in_greenlet():
        return run()
    awaited: T = await_only(coroutine())
    return awaited


def resolved(clause: Any) -> Any:
    """The statement inside a lambda statement."""
    return clause._resolved if getattr(clause, "_is_lambda_element", False) else clause


def inside(clause: Any) -> Any:
    """The statement inside a lambda statement and a ``from_statement()``: the one that is sent."""
    inner = resolved(clause)
    return inside(inner.element) if isinstance(inner, FromStatement) else inner


def instead(clause: Any, new: Any) -> Any:
    """The same with another in the place of the statement that :func:`inside` gives."""
    if getattr(clause, "_is_lambda_element", False):
        # What the ORM tells its compiler (synchronize_session) stands on the lambda, and not on what is inside.
        made: Any = NullLambdaStatement(instead(clause._resolved, new))  # type: ignore[no-untyped-call]
        return made._annotate(clause._annotations)
    if not isinstance(clause, FromStatement):
        return new
    changed = clause._generate()
    changed.element = instead(clause.element, new)
    return changed


def target(clause: Any) -> tuple[Any, bool]:
    """What the statement writes to, and whether the ORM sends it to one table of several (joined inheritance).

    The ORM then gives each table's statement all the values, and drops those of other tables when it compiles it.
    """
    emitted = clause._annotations.get("_emit_insert_table" if clause.is_insert else "_emit_update_table")
    return (clause.table, False) if emitted is None else (emitted, True)


class Writing(NamedTuple):
    """What an INSERT or UPDATE writes, as it was given."""

    table: Any  # what it writes to
    one_of_several: bool  # see target()
    values: list[Item]
    select_names: Sequence[str]
    multi_values: Sequence[Sequence[Any]]
    conflicts: Sequence[Any]
    returns: bool


def writing(clause: Any) -> Writing:
    """All of it at once."""
    return Writing(
        *target(clause),
        values(clause),
        select_names(clause),
        multi_values(clause),
        conflicts(clause),
        bool(clause._returning),
    )


def properties_of(mapper: Any) -> Mapping[Any, Any]:
    """The mapped properties of a class, by their columns."""
    found: Mapping[Any, Any] = mapper._columntoproperty
    return found


def given_property(mapper: Any, attribute: str) -> Any:
    """What a class that is being mapped was given for an attribute; None for nothing."""
    return mapper._init_properties.get(attribute)


def pending_columns(constraint: Any) -> list[Any]:
    """The columns that a constraint or index is about to be attached with; to be changed in place."""
    found: list[Any] = constraint._pending_colargs
    return found


def engine_of(engine: Engine) -> Engine:
    """The engine itself, of a view made by ``execution_options()``."""
    return getattr(engine, "_proxied", engine)


def json_functions(dialect: Any) -> tuple[Any, Any]:
    """The functions by which an engine writes and reads JSON, where it was given any."""
    return getattr(dialect, "_json_serializer", None), getattr(dialect, "_json_deserializer", None)


def added_ctes(statement: Any) -> Sequence[Any]:
    """The CTEs that were only added to a statement."""
    found: Sequence[Any] = getattr(statement, "_independent_ctes", ())
    return found


def plain_table(table: Table) -> Table:
    """The table itself, where the ORM annotated it."""
    return table._deannotate()


def select_names(clause: Any) -> Sequence[str]:
    """The target columns of an INSERT FROM SELECT; empty for any other."""
    return clause._select_names or () if clause.is_insert and clause.select is not None else ()


def selected_columns(insert: Any) -> Sequence[Any]:
    """What an INSERT FROM SELECT selects for its columns, in order; nothing where that cannot be told."""
    selected = inside(insert.select)
    return list(selected.selected_columns) if isinstance(selected, Select) else []


def with_selected(insert: Any, names: Sequence[str], value: Any) -> Any:
    """A copy of an INSERT FROM SELECT that gives further columns this value."""
    if not names:
        return insert
    new = insert._generate()
    new._select_names = [*insert._select_names, *names]
    new.select = insert.select.add_columns(*(value.label(name) for name in names))
    return new


def values(clause: Any) -> list[Item]:
    """What ``.values()`` or ``.ordered_values()`` were given."""
    ordered = getattr(clause, "_ordered_values", None)  # 2.0
    return list(ordered or (clause._values or {}).items())


def with_values(clause: Any, items: Iterable[Item]) -> Any:
    """A copy of the statement with these values."""
    new = clause._generate()
    if getattr(clause, "_ordered_values", None):
        new._ordered_values = list(items)
    else:
        new._values = immutabledict(items)
    return new


def multi_values(clause: Any) -> Sequence[Sequence[Any]]:
    """What ``insert().values([…])`` was given, once for each time."""
    return clause._multi_values if clause.is_insert else ()


def with_multi_values(clause: Any, groups: Iterable[Sequence[Any]]) -> Any:
    """A copy of the statement with these rows."""
    new = clause._generate()
    new._multi_values = tuple(groups)
    return new


def conflicts(clause: Any) -> Sequence[Any]:
    """The ON CONFLICT or ON DUPLICATE KEY clauses; 2.1 takes several on SQLite."""
    found = getattr(clause, "_post_values_clause", None) if clause.is_insert else None
    return () if found is None else getattr(found, "clauses", (found,))


def with_conflicts(clause: Any, new_conflicts: Iterable[Any]) -> Any:
    """A copy of the statement with these in place of its own, as many."""
    new = clause._generate()
    found = new._post_values_clause
    if hasattr(found, "clauses"):
        new._post_values_clause = copy(found)
        new._post_values_clause.clauses = tuple(new_conflicts)
    else:
        (new._post_values_clause,) = new_conflicts
    return new


def conflict_elements(conflict: Any) -> Sequence[Any]:
    """The columns whose conflict it answers, where it names any."""
    return getattr(conflict, "inferred_target_elements", None) or ()


def conflict_columns(table: Any, conflict: Any, *, untargeted: bool = False) -> Iterator[Any]:
    """The same as columns of the table; where it names a constraint, those that may be in it.

    :param untargeted: where it names nothing, those of any constraint.
    """
    for element in conflict_elements(conflict):
        column = table.c.get(element) if isinstance(element, str) else element
        if hasattr(column, "type"):
            yield column
    any_constraint = untargeted and not conflict_elements(conflict)
    if any_constraint or getattr(conflict, "constraint_target", None) is not None:
        yield from unique_columns(table)  # its name may be the database's


def unique_columns(table: Any) -> Iterator[Any]:
    """The columns of a table's unique constraints and indexes."""
    for unique in (*getattr(table, "constraints", ()), *getattr(table, "indexes", ())):
        if isinstance(unique, UniqueConstraint) or getattr(unique, "unique", False):
            yield from unique.columns


def conflict_values(conflict: Any) -> list[Item]:
    """What it sets; nothing for DO NOTHING."""
    found = getattr(conflict, _values_name(conflict), ())
    return list(found.items() if isinstance(found, Mapping) else found)


def with_target(conflict: Any, elements: Sequence[Any], items: Sequence[Item]) -> Any:
    """A copy of the clause that answers these columns' conflict and sets these values."""
    new = copy(conflict)
    if elements:
        new.inferred_target_elements = list(elements)
    if items:
        name = _values_name(conflict)
        # a list on 2.0, a dict on 2.1 and on MySQL
        setattr(new, name, dict(items) if isinstance(getattr(conflict, name), Mapping) else list(items))
    return new


def held_to(conflict: Any, column: Any, criterion: Any, same: Callable[[Any, Any], Any]) -> Any:
    """A copy of the clause that changes only rows of which this is true.

    :param column: what it is true of. MySQL's clause has no WHERE, and its drivers take no parameter of ours there
        with many rows: each column is left as it is where this one is not that of the row to be inserted.
    :param same: makes that comparison.
    """
    new = copy(conflict)
    if hasattr(conflict, "update_whereclause"):
        given = conflict.update_whereclause
        new.update_whereclause = criterion if given is None else and_(Grouping(given), criterion)
    elif items := conflict_values(conflict):
        columns, own = column.table.c, same(column, conflict.inserted_alias.c[column.key])
        new.update = {
            key: case((own, _expression(value, columns[key].type)), else_=columns[key])
            for name, value in items
            if (key := getattr(name, "key", name)) in columns
        }
    return new


def _expression(value: Any, type_: Any) -> Any:
    """What stands for a plain value in an expression."""
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    return value if isinstance(value, ClauseElement) else BindParameter(None, value, type_=type_, unique=True)


def with_criterion(dml: Any, criterion: Any) -> Any:
    """A copy of an UPDATE or DELETE that reaches only rows of which this is true, whatever text its WHERE is of."""
    given = dml._where_criteria
    if (
        given
        and not isinstance(given[-1], Evaluated)
        and not (len(given) == 1 and type(given[0]) is Grouping)
    ):
        given = (Grouping(and_(*given)),)
    new = dml._generate()
    new._where_criteria = (*given, criterion)
    return new


@traverse_too("sent", expression=True)
class Evaluated(Grouping[Any]):
    """A criterion that the ORM evaluates in Python in another form than the database does.

    :param element: the one that is evaluated.
    :param sent: the one that is sent.
    """

    inherit_cache = True

    def __init__(self, element: Any, sent: Any) -> None:
        super().__init__(element)
        self.sent = sent.self_group(against=operators.and_)

    @property
    def _from_objects(self) -> Any:
        return self.sent._from_objects


@compiles(Evaluated)
def _compile_evaluated(element: Evaluated, compiler: Any, **kwargs: Any) -> Any:
    return compiler.process(element.sent, **kwargs)


def without_evaluated(dml: Any) -> Any:
    """The same UPDATE or DELETE without such criteria."""
    given = dml._where_criteria
    kept = tuple(one for one in given if not isinstance(one, Evaluated))
    if len(kept) == len(given):
        return dml
    new = dml._generate()
    new._where_criteria = kept
    return new


def before_synchronizing(hold: Callable[[Any, Any, Any, Mapping[str, Any], Mapping[str, Any]], Any]) -> None:
    """Have the ORM's UPDATE and DELETE pass a function before it looks which objects of the session they reach.

    The session's own event would have SQLAlchemy prepare each SELECT twice.

    :param hold: is given the session, the statement, its class or alias, its execution options and what its connection
        is found by; returns the statement in its place.
    """
    for kind in ("update", "delete"):
        plain: Any = CompileState.plugins["orm", kind]

        class Held(plain):  # type: ignore[misc]
            @classmethod
            def orm_pre_session_exec(
                cls, session: Any, statement: Any, params: Any, options: Any, binds: Any, is_pre_event: bool
            ) -> Any:
                entity = inside(statement).table._annotations.get("parententity")
                if entity is not None and not is_pre_event and not isinstance(params, list):
                    statement = hold(session, statement, entity, options, binds)
                return super().orm_pre_session_exec(session, statement, params, options, binds, is_pre_event)

        CompileState.plugin_for("orm", kind)(Held)


def dml_within(compiled: Any) -> Iterator[Any]:
    """Each INSERT, UPDATE or DELETE that a compiled statement has within, in a CTE or elsewhere."""
    if not isinstance(compiled, SQLCompiler):
        return
    statement = executed(compiled)
    # Without CTEs only a statement of somebody's own has any: EXPLAIN of one, say.
    if compiled.ctes is None and not is_own(statement):
        return
    tops = [inside(compiled.statement), inside(statement)]
    seen: dict[int, Any] = {}
    todo = [statement, *(compiled.ctes or ())]
    while todo:
        element = resolved(todo.pop())
        if isinstance(element, _LEAVES) or id(element) in seen:
            continue
        if hasattr(element, "__clause_element__"):
            element = element.__clause_element__()
        seen[id(element)] = element
        todo.extend(children(element))
        if getattr(element, "is_dml", False) and element not in tops and hasattr(element, "table"):
            yield element


# What has nothing within.
_LEAVES = (TableClause, ColumnClause, BindParameter, TextClause)


def prefixes(dml: Any, dialect: str) -> list[str]:
    """What stands between INSERT or UPDATE and the table, on a dialect."""
    found = (text_of(element) for element, only in dml._prefixes if only in (None, "*", dialect))
    return [text for text in found if text is not None]


def _values_name(conflict: Any) -> str:
    return "update_values_to_set" if hasattr(conflict, "update_values_to_set") else "update"


def prefetched(compiled: Any) -> list[tuple[Any, str]]:
    """The columns that a default or onupdate in Python gives a value, each with the name of its parameter.

    Of an INSERT of several rows in one VALUES a column comes once for each row that was not given it.
    """
    return [
        (getattr(column, "original", column), compiled._within_exec_param_key_getter(column))
        for column in (*compiled.insert_prefetch, *compiled.update_prefetch)
    ]


def replacing(compiled: Any, names: Iterable[str]) -> str | None:
    """The name of a parameter that would be sent in the place of a value which the statement has itself.

    SQLAlchemy names such values: ``param_1``, ``org_m0``. Those of a single ``values()`` have the columns' names.
    """
    dml = inside(compiled.statement)
    table, _ = target(dml)
    while isinstance(table, Join):
        table = table.left
    for name in names:
        bind = compiled.binds.get(name)
        if bind is not None and (bind.unique or bind._is_crud) and name not in table.c:
            return name
    return None


def row_parameters(context: Any) -> Mapping[str, Any]:
    """The parameters of the row that a default in Python is asked for.

    SQLAlchemy looks whether it is one of several in a VALUES, and fails within ``from_statement()``. There we need not
    know it: what is given to several rows has its defaults already.
    """
    found: Mapping[str, Any] = context.get_current_parameters(
        isolate_multiinsert_groups=hasattr(context.compiled.compile_state, "isinsert")
    )
    return found


def result_types(compiled: Any) -> Iterator[Any]:
    """The types of the columns that a compiled statement returns."""
    return (column.type for column in getattr(compiled, "_result_columns", None) or ())


# -- how a statement is executed ---------------------------------------------------------------------------------------


class Steps:
    """The steps of an execution, under names of ours: those of SQLAlchemy's execution context that we step into."""

    compiled: Any
    cursor: Any
    execution_options: Any
    executemany: bool
    root_connection: Any

    if TYPE_CHECKING:

        @classmethod
        def of_text(
            cls, dialect: Any, conn: Any, dbapi: Any, options: Any, text: str, parameters: Any
        ) -> Any:
            """Begin the execution of a statement that is text."""

        @classmethod
        def of_ddl(cls, dialect: Any, conn: Any, dbapi: Any, options: Any, compiled: Any) -> Any:
            """Begin the execution of compiled DDL."""

        @classmethod
        def of_compiled(
            cls, dialect: Any, conn: Any, dbapi: Any, options: Any, compiled: Any, *more: Any, **kw: Any
        ) -> Any:
            """Begin the execution of a compiled statement: its parameters are bound here."""

        def about_to_be_sent(self) -> None:
            """What is to be done in the transaction, before the cursor is given the statement."""

        def processor_of(self, type_: Any, name: str, coltype: Any) -> Any:
            """The result processor of a column; asked for each of the cursor's columns in order, until it is known."""

        def result_of(self) -> Any:
            """The result, once the cursor has executed the statement."""


_STEPS = {
    "of_text": "_init_statement",
    "of_ddl": "_init_ddl",
    "of_compiled": "_init_compiled",
    "about_to_be_sent": "pre_exec",
    "processor_of": "get_result_processor",
    "result_of": "_setup_result_proxy",
}


def step_in(engine: Engine, steps: type[Steps], **attributes: Any) -> None:
    """Have all executions on an engine take these steps, those of its views and of open connections too.

    SQLAlchemy makes an execution context for each execution, of a class that the dialect names. A subclass sees the
    compiled statement before its parameters are bound, which no event does, and costs a bystander next to nothing.

    :param steps: calls ``super()`` for what SQLAlchemy does.
    :param attributes: what the class gets besides.
    """
    plain: Any = engine.dialect.execution_ctx_cls
    named = type(
        plain.__name__, (Steps, plain), {ours: getattr_static(plain, name) for ours, name in _STEPS.items()}
    )
    ours = {name: getattr_static(steps, ours) for ours, name in _STEPS.items()}
    engine.dialect.execution_ctx_cls = type(plain.__name__, (steps, named), {**attributes, **ours})


class Call(NamedTuple):
    """What an execution is given, in SQLAlchemy's order.

    :param compiled: the compiled statement.
    :param parameters: the rows of parameters; none where it has none.
    :param clause: the statement; None of one that was compiled beforehand.
    :param extracted: the values that were taken out of it when it was compiled.
    :param more: what else SQLAlchemy tells.
    """

    compiled: Any
    parameters: Any
    clause: Any
    extracted: Any
    more: dict[str, Any]


def compiled_anew(conn: Any, options: Any, clause: Any, parameters: Any) -> Call:
    """What SQLAlchemy makes of a statement before it executes it: compiled, or found compiled."""
    compiled, extracted, *rest = clause._compile_w_cache(
        dialect=conn.dialect,
        compiled_cache=options.get("compiled_cache", conn.engine._compiled_cache),
        column_keys=sorted(parameters[0]) if parameters else [],
        for_executemany=bool(parameters) and len(parameters) > 1,
        schema_translate_map=options.get("schema_translate_map"),
        linting=conn.dialect.compiler_linting | WARN_LINTING,
    )
    more = {"cache_hit": rest[-1]}
    if len(rest) > 1:  # 2.1
        more["param_dict"] = rest[0]
    return Call(compiled, parameters, clause, extracted, more)


def forget_metadata(compiled: Any) -> None:
    """Have the metadata of a compiled statement's result, and with it the result processors, made anew."""
    compiled._cached_metadata = None


def renders_itself(element: Any) -> bool:
    """Whether the class of a construct, of somebody's own, was given a way to be rendered: by ``@compiles``."""
    cls: Any = type(element)
    own = [one for one in cls.__mro__ if not one.__module__.startswith("sqlalchemy.")]
    return any("_compiler_dispatch" in vars(one) for one in own)


def forget_columns(compiled: Any) -> None:
    """Have the columns of a compiled statement's result be only what the database says of them."""
    compiled._result_columns = []


def driver_cursor(context: Any) -> Any:
    """The driver's own cursor of an execution, also under asyncio."""
    return getattr(context.cursor, "_cursor", context.cursor)


def reads_early(context: Any) -> bool:
    """Whether SQLAlchemy reads the result before it gives it away: RETURNING for server defaults."""
    early: bool = context._is_implicit_returning
    return early


# -- what the guard reads of a statement -------------------------------------------------------------------------------


def executed(compiled: Any) -> Any:
    """The statement that was compiled, as SQLAlchemy Core has it.

    Of an ORM statement it is the one with joined inheritance, relationships' ORDER BY, eager loads and loader criteria
    put in; ``compiled.statement`` has none of them.
    """
    state, statement = getattr(compiled, "compile_state", None), resolved(compiled.statement)
    # Of a text or a statement of somebody's own the state is that of a SELECT within it.
    return (
        statement
        if state is None or not hasattr(statement, "_compile_state_factory")
        else resolved(state.statement)
    )


class Enclosing:
    """Stands for the compiler, with the statements around the one that is looked at: it correlates with them."""

    def __init__(self, compiled: Any) -> None:
        self._global_attributes = dict(compiled._global_attributes)  # loader criteria among them
        self._compiled = getattr(compiled, "compile_state", None)
        self.stack: list[Mapping[str, Any]] = []

    def state_of(self, select: Any, in_from: Any) -> Any:
        """What SQLAlchemy makes of a SELECT to compile it; of the statement itself what it has made."""
        if isinstance(self._compiled, SelectState) and self._compiled.statement is select:
            return self._compiled
        return select._compile_state_factory(select, self, **_placed(in_from))

    def froms(self, state: Any, in_from: Any) -> Sequence[Any]:
        """The FROM of a SELECT as it is rendered here, without what it takes from around it.

        :param in_from: the subquery that it makes up, where it stands in a FROM itself.
        """
        entry = self.stack[-1] if self.stack else _NOTHING_AROUND
        explicit, implicit = self._enclosing_correlate_froms(entry, *_placed(in_from).values())
        froms: Sequence[Any] = state._get_display_froms(
            explicit_correlate_froms=explicit, implicit_correlate_froms=implicit
        )
        return froms

    # The ORM asks for it from 2.1.8 on.
    def _enclosing_correlate_froms(self, entry: Mapping[str, Any], asfrom: bool, lateral: bool) -> Any:
        every, nearest = entry["correlate_froms"], entry["asfrom_froms"]
        return (every - nearest, frozenset()) if asfrom and not lateral else (every, nearest)

    def enter(self, statement: Any, froms: Iterable[Any] | None, state: Any = None) -> None:
        """Look at what is within a statement, until :meth:`leave`.

        :param froms: what is correlated with within it; None where that is what is around it.
        """
        entry = self.stack[-1] if self.stack else _NOTHING_AROUND
        every = nearest = frozenset(one for source in froms or () for one in source._from_objects)
        if froms is None:
            every, nearest = entry["correlate_froms"], entry["asfrom_froms"]
        elif state is not None:
            every = nearest | entry["correlate_froms"]
        made = {"asfrom_froms": nearest, "correlate_froms": every, "selectable": statement}
        self.stack.append(made if state is None else {**made, "compile_state": state})

    def leave(self) -> None:
        """Go back to what was around the statement."""
        self.stack.pop()


_NOTHING_AROUND: Mapping[str, Any] = {"correlate_froms": frozenset(), "asfrom_froms": frozenset()}


def _placed(in_from: Any) -> dict[str, bool]:
    return {"asfrom": in_from is not None, "lateral": isinstance(in_from, Lateral)}


class Named(NamedTuple):
    """What a string names."""

    meant: list[Any]  # what SQLAlchemy puts in its place in ORDER BY, GROUP BY and windows
    alike: list[Any]  # the columns of the FROM that have the name


def _named(state: Any, name: str) -> Named:
    found = [columns[name] for columns in state._label_resolve_dict[:2] if name in columns]
    froms = (column for source in state.froms for column in getattr(source, "c", ()))
    return Named(found, [column for column in froms if column.name == name])


class Parts(NamedTuple):
    """What a SELECT consists of."""

    columns: list[Any]
    froms: Sequence[Any]
    named: Callable[[str], Named]
    criteria: Sequence[Any]
    having: Sequence[Any]
    group_by: Sequence[Any]
    order_by: Sequence[Any]
    distinct: bool
    distinct_on: Sequence[Any]
    others: list[Any]
    state: Any  # SQLAlchemy's, for Enclosing


def parts(select: Any, enclosing: Enclosing, in_from: Any = None) -> Parts:
    """The parts of a SELECT; of one of the ORM as SQLAlchemy Core has them.

    :param enclosing: the statements that it stands in.
    :param in_from: the subquery that it makes up, where it stands in a FROM.
    """
    state = enclosing.state_of(select, in_from)
    select, columns = state.statement, []
    for column in select._raw_columns:
        if isinstance(column, FromClause) and not isinstance(column, FunctionElement):
            columns.extend(column.c)
        else:
            columns.append(column)
    on = getattr(select, "_pre_columns_clause", None)  # 2.1
    distinct_on = [*select._distinct_on, *getattr(on, "_distinct_on", ())]
    texts = [element for element, _ in (*select._prefixes, *select._suffixes)]
    return Parts(
        columns=columns,
        froms=enclosing.froms(state, in_from),
        state=state,
        named=lambda name: _named(state, name),
        criteria=select._where_criteria,
        having=select._having_criteria,
        group_by=select._group_by_clauses,
        order_by=select._order_by_clauses,
        distinct=bool(select._distinct) or any("DISTINCT" in str(text_of(text)).upper() for text in texts),
        distinct_on=distinct_on,
        others=beside(select),
    )


# The extensions of 2.1 are the last three.
_OTHERS = (
    "_limit_clause",
    "_offset_clause",
    "_fetch_clause",
    "_post_select_clause",
    "_post_criteria_clause",
    "_post_body_clause",
)


def ordering(compound: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The ORDER BY and GROUP BY of a UNION or the like."""
    return compound._order_by_clauses, compound._group_by_clauses


def excluded(constraint: Any) -> list[Any]:
    """The SQL expressions of PostgreSQL's EXCLUDE; nothing of any other constraint over columns."""
    where = getattr(constraint, "where", None)
    found = [*(expression for expression, *_ in getattr(constraint, "_render_exprs", ())), where]
    return [one for one in found if isinstance(one, ClauseElement)]


def variants(type_: Any) -> Mapping[str, Any]:
    """The types that stand for a type on some dialects, by their names: see ``with_variant()``."""
    found: Mapping[str, Any] = type_._variant_mapping
    return found


def is_binary(type_: Any) -> TypeGuard[sqltypes._Binary]:
    """Whether a type is one of bytes, of any dialect: MySQL's TINYBLOB is no LargeBinary."""
    return isinstance(type_, sqltypes._Binary)


def text_of(element: Any) -> str | None:
    """The SQL text of text(); of a template string (2.1) without the columns and values in it; else None."""
    if not getattr(element, "_is_text_clause", False):
        return None
    pieces = getattr(element, "parts", None) or [element]
    return "".join(getattr(piece, "text", None) or " ? " for piece in pieces)


def pieces_of(text: Any) -> list[Any]:
    """What stands in a template string beside text."""
    return [piece for piece in getattr(text, "parts", ()) if getattr(piece, "text", None) is None]


def columns_of(element: Any) -> list[Any]:
    """The columns in an expression, but those of comparisons."""
    if isinstance(element, BinaryExpression):
        return []
    return [one for one in iterate(element) if isinstance(one, ColumnClause)]


def tables_of(element: Any) -> set[Any]:
    """The tables that an expression names, itself or by their columns."""
    found = {getattr(one, "table", one) for one in iterate(element)}
    return {table for table in found if isinstance(table, TableClause)}


def selected_by(compiled: Any) -> Any:
    """The SELECT of a compiled CREATE VIEW or CREATE TABLE AS (2.1); None of any other statement."""
    return getattr(getattr(compiled, "statement", None), "selectable", None)


def named_in_order_by(element: Any) -> str | None:
    """The name, where an ORDER BY, GROUP BY or window names a column by a string."""
    return str(element.element) if isinstance(element, _textual_label_reference) else None


def referred(element: Any) -> Any:
    """The label that an ORDER BY refers to; None for anything else."""
    return element.element if isinstance(element, _label_reference) else None


def named_in_compound(lists: Sequence[Sequence[Any]], name: str) -> Named:
    """What a string names in the ORDER BY of a UNION or the like: a result column of its first part."""
    keys = ("key", "name", "_tq_label")
    found = (
        column
        for column in (lists[0] if lists else ())
        if name in [getattr(column, key, None) for key in keys]
    )
    return Named(list(found), [])


def proxied(column: Any) -> Sequence[Any]:
    """The columns that a column of an alias or subquery stands for: one, or of a UNION one for each part.

    SQLAlchemy adds a label to what is in it; the parts of a UNION are annotated.
    """
    found: Sequence[Any] = column._proxies
    parts = [one for one in found if "weight" in one._annotations]
    inner = {id(one) for one in found}
    return parts or [one for one in found if not (isinstance(one, Label) and id(one.element) in inner)]


def is_made_up(name: Any) -> bool:
    """Whether SQLAlchemy gives the FROM its name when it is compiled."""
    return name is None or isinstance(name, _anonymous_label)


def may_become(name: Any, called: str) -> bool:
    """Whether SQLAlchemy may give a FROM this name when it is compiled: ``patient_1``, or ``anon_1``."""
    base = re.fullmatch(r"%\(\S+ (.*)\)s", str(name))
    return re.fullmatch(rf"{re.escape(base[1] if base else 'anon')}_\d+", called, re.IGNORECASE) is not None


def has_rows(element: Any) -> bool:
    """Whether it is a VALUES, in a FROM or as an operand."""
    return isinstance(element, Values | ScalarValues)


def row_of(element: Any) -> Any:
    """The FROM of which an expression is the whole row; None for any other."""
    return element.scalar_alias if isinstance(element, TableValuedColumn) else None


def restated(cte: Any) -> Any:
    """What a recursive CTE began with; None for any other FROM."""
    return getattr(cte, "_restates", None)


def rows_of_values(values: Any) -> Iterator[Any]:
    """The values of a VALUES."""
    for group in values._data:
        for row in group:
            yield from row


def criteria(dml: Any) -> Sequence[Any]:
    """The WHERE of an UPDATE or DELETE."""
    found: Sequence[Any] = getattr(dml, "_where_criteria", ())
    return found


def written_froms(dml: Any) -> list[Any]:
    """What subqueries of an INSERT, UPDATE or DELETE correlate with: none of an INSERT."""
    return (
        [] if dml.is_insert else [dml.table, *(one for each in criteria(dml) for one in each._from_objects)]
    )


def returning(dml: Any) -> Sequence[Any]:
    """What an INSERT, UPDATE or DELETE returns."""
    found: Sequence[Any] = dml._returning
    return found


def with_returned(insert: Any, unmapped: Callable[[Any], bool]) -> Any:
    """The same INSERT, which returns some columns as those of its table.

    Of a class the ORM would leave them out, since no attribute is mapped to them.

    :param unmapped: whether an expression is such a column, or a label of one.
    """
    found = insert._returning
    taken = tuple(
        _deep_deannotate(each, values=_OF_ENTITY)
        if "parententity" in getattr(each, "element", each)._annotations and unmapped(each)
        else each
        for each in found
    )
    if all(one is other for one, other in zip(found, taken, strict=True)):
        return insert
    new = insert._generate()
    new._returning = taken
    return new


def returned(compiled: Any) -> Sequence[Any]:
    """The same of a compiled statement: the ORM's bulk INSERT has it in another one than :func:`executed` gives."""
    statement = resolved(compiled.statement)
    if not getattr(statement, "is_dml", False):
        return ()
    return (*getattr(statement, "_returning", ()), *(compiled.effective_returning or ()))


def targets(compiled: Any) -> list[Any]:
    """The table that a compiled INSERT, UPDATE or DELETE is for."""
    statement = resolved(compiled.statement)
    table = getattr(getattr(statement, "element", statement), "table", None)  # from_statement() has it within
    return [] if table is None else [table]


def written(dml: Any, compiled: Any) -> set[Any]:
    """The keys of the columns that an INSERT or UPDATE writes other values to than it was given by name.

    Those of parameters, of a SELECT, of positional rows, and of defaults in Python.
    """
    columns = list(getattr(dml.table, "c", ()))
    given = {key for key, _ in values(dml)}
    keys = {*select_names(dml), *(compiled.column_keys or ())}
    for row in (row for group in multi_values(dml) for row in group):
        if isinstance(row, Mapping):
            given.update(row)
        else:
            keys.update(column.key for column in columns[: len(row)])
    if dml.is_insert and not (keys or given) and compiled.column_keys is None:
        return {column.key for column in columns}  # all of them
    default = "default" if dml.is_insert else "onupdate"
    return keys.union(
        column.key
        for column in columns
        if column.key not in given and getattr(column, default, None) is not None
    )


def beside(statement: Any) -> list[Any]:
    """What stands in an INSERT, UPDATE, DELETE or UNION before and behind its clauses."""
    found = [getattr(statement, name, None) for name in _OTHERS]
    texts = (*getattr(statement, "_prefixes", ()), *getattr(statement, "_suffixes", ()))
    return [one for one in (*found, *(element for element, _ in texts)) if one is not None]


def made_by(source: Any) -> list[Any]:
    """What stands before and behind a FROM: of a CTE its prefixes and suffixes, and what a TABLESAMPLE samples by."""
    found = [*beside(source), getattr(source, "sampling", None), getattr(source, "seed", None)]
    return [one for one in found if isinstance(one, ClauseElement)]


_INDEX_HINT = re.compile(r"\b(?:index|key)\b[^()]*\([^()]*\)|\bindexed\s+by\s+\S+", re.IGNORECASE)


def hints(statement: Any, compiled: Any) -> list[str]:
    """The texts of hints, for the database that it was compiled for, without the names of indexes."""
    here = ("*", compiled.dialect.name)
    found = [text for (_, dialect), text in getattr(statement, "_hints", {}).items() if dialect in here]
    found += [text for dialect, text in getattr(statement, "_statement_hints", ()) if dialect in here]
    return [_INDEX_HINT.sub(" ", text) for text in found]


def case_counts(dialect: Any) -> tuple[bool, bool]:
    """Whether names that differ in upper and lower case are two: those of tables, and those of columns."""
    if dialect.name in ("mysql", "mariadb"):
        return getattr(dialect, "_casing", 0) == 0, False
    return (dialect.name == "postgresql",) * 2


def conflict_criteria(conflict: Any) -> list[Any]:
    """The two WHERE of an ON CONFLICT."""
    found = (getattr(conflict, name, None) for name in ("inferred_target_whereclause", "update_whereclause"))
    return [one for one in found if one is not None]


# -- what the mapper has -----------------------------------------------------------------------------------------------


def show_in_subqueries(mapper: Any, hidden: Callable[[Mapper[Any]], Iterable[Any]]) -> None:
    """Have a SELECT of the mapped class within another statement render columns that no attribute is mapped to.

    SQLAlchemy does so with deferred attributes. These are not in the mapper, so nobody meets them who asks it for its
    attributes, and rows of a class that is selected directly have no such column.

    :param hidden: gives a mapper's columns, those of the classes that it inherits from included.
    """
    if "_iterate_polymorphic_properties" in vars(mapper):
        return
    made: dict[Any, Any] = {}  # always the same ones, since SQLAlchemy keeps what it meets in its paths

    def properties(mappers: Any = None) -> Iterator[Any]:
        yield from type(mapper)._iterate_polymorphic_properties(mapper, mappers)
        selected = mapper._with_polymorphic_mappers if mappers is None else mappers
        columns = dict.fromkeys(column for one in (mapper, *(selected or ())) for column in hidden(one))
        for column in columns:
            if column not in made:
                made[column] = _deferred(mapper, column)
            yield made[column]

    mapper._iterate_polymorphic_properties = properties


# The others name the source itself.
_OF_ENTITY = ("entity_namespace", "parententity", "parentmapper")


def of_entity(column: Any, source: Any) -> ColumnElement[Any]:
    """A column that no attribute is mapped to, as one of the entity that its source is an attribute of.

    The ORM finds the entity in a column's annotations, and by it the joins and criteria of an inheriting class.
    """
    entity = {key: value for key, value in source._annotations.items() if key in _OF_ENTITY}
    annotated: ColumnElement[Any] = column._annotate(entity)._set_propagate_attrs(source._propagate_attrs)
    return annotated


def _deferred(mapper: Any, column: Any) -> Any:
    """A deferred attribute that is in no mapper."""
    prop: Any = ColumnProperty(column, deferred=True)
    prop.set_parent(mapper, True)
    prop.key = f"the column {column.key}"  # no attribute has such a name
    prop.init()
    return prop
