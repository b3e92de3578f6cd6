"""The private SQLAlchemy names that filling and following a statement needs, in one place.

SQLAlchemy has no public way to change the values of an INSERT or UPDATE that somebody else built. Both supported
lines, 2.0 and 2.1, are tested against what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sqlalchemy import Engine, Table, UniqueConstraint, and_
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.orm.interfaces import CompileStateOption
from sqlalchemy.sql.compiler import WARN_LINTING
from sqlalchemy.sql.elements import (
    ClauseElement,
    TableValuedColumn,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.sql.visitors import InternalTraversal, iterate
from sqlalchemy.util import immutabledict
from sqlalchemy.util.concurrency import await_only
from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

from sqla_byok.orm.current import RUNNING

if TYPE_CHECKING:
    from sqla_byok.orm.statements import Statements

__all__ = [
    "FanOut",
    "Named",
    "Parts",
    "children",
    "compared",
    "conflict_columns",
    "conflict_criteria",
    "conflict_elements",
    "conflict_values",
    "conflicts",
    "criteria",
    "executed",
    "fanned_out",
    "held",
    "held_to",
    "hold",
    "in_greenlet",
    "known",
    "met",
    "multi_values",
    "named_in_compound",
    "named_in_order_by",
    "note_compared",
    "ordering",
    "parts",
    "pass_through",
    "plain_table",
    "proxied",
    "referred",
    "render_again",
    "resolved",
    "restated",
    "result_types",
    "returning",
    "row_of",
    "rows_of_values",
    "run_or_await",
    "searched",
    "select_names",
    "selected_by",
    "target",
    "text_of",
    "unique_columns",
    "values",
    "with_conflicts",
    "with_multi_values",
    "with_target",
    "with_values",
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
    for option in getattr(compiler.statement, "_with_options", ()):
        if isinstance(option, FanOut):
            return dict(option.live)
    return {}


def note_compared(compiler: Any, live: int, owner: str | None, specs: Iterable[Any] = ()) -> None:
    """Keep with a statement, while it is compiled, that it compares search hashes, by so many search salts.

    :param owner: whose they are, where they are not the statement's tenant's.
    :param specs: how the hashes are made that it compares.
    """
    compiler.__dict__.setdefault("_sqla_byok_live", {})[owner] = live
    compiler.__dict__.setdefault("_sqla_byok_searched", {}).setdefault(owner, set()).update(specs)


def compared(compiled: Any) -> Mapping[str | None, int]:
    """By how many search salts a compiled statement compares hashes, by whose they are."""
    live: Mapping[str | None, int] = compiled.__dict__.get("_sqla_byok_live", {})
    return live


def searched(compiled: Any) -> dict[str | None, frozenset[Any]]:
    """How the search hashes are made that a compiled statement compares, by the columns' owners."""
    found = compiled.__dict__.get("_sqla_byok_searched", {})
    return {owner: frozenset(specs) for owner, specs in found.items()}


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


def target(clause: Any) -> tuple[Any, bool]:
    """What the statement writes to, and whether the ORM sends it to one table of several (joined inheritance).

    The ORM then gives each table's statement all the values, and drops those of other tables when it compiles it.
    """
    emitted = clause._annotations.get("_emit_insert_table" if clause.is_insert else "_emit_update_table")
    return (clause.table, False) if emitted is None else (emitted, True)


def plain_table(table: Table) -> Table:
    """The table itself, where the ORM annotated it."""
    return table._deannotate()


def select_names(clause: Any) -> Sequence[str]:
    """The target columns of an INSERT FROM SELECT; empty for any other."""
    return clause._select_names or () if clause.is_insert and clause.select is not None else ()


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


def held_to(conflict: Any, criterion: Any) -> Any:
    """A copy of the clause that updates only rows of which this is true; MySQL's has no such thing, and stays."""
    if not hasattr(conflict, "update_whereclause"):
        return conflict
    new, given = copy(conflict), conflict.update_whereclause
    new.update_whereclause = criterion if given is None else and_(given, criterion)
    return new


def _values_name(conflict: Any) -> str:
    return "update_values_to_set" if hasattr(conflict, "update_values_to_set") else "update"


def result_types(compiled: Any) -> Iterator[Any]:
    """The types of the columns that a compiled statement returns."""
    return (column.type for column in getattr(compiled, "_result_columns", None) or ())


def known(compiled: Any, ask: Callable[[Any], T]) -> T:
    """What ``ask`` says of a compiled statement, asked once and kept with it."""
    kept = compiled.__dict__
    if "_sqla_byok" not in kept:
        kept["_sqla_byok"] = ask(compiled)
    found: T = kept["_sqla_byok"]
    return found


def hold(connection: Any, ring: Any) -> None:
    """Keep a keyring for as long as the connection's transaction lasts."""
    connection._sqla_byok_unit = (connection.get_transaction(), ring)


def held(connection: Any) -> Any:
    """The keyring that :func:`hold` kept in this transaction; None after its end."""
    transaction, ring = connection.__dict__.get("_sqla_byok_unit") or (None, None)
    return ring if transaction is not None and transaction is connection.get_transaction() else None


def met(connection: Any) -> list[Any]:
    """For whom the connection's transaction has worked so far, in order; to be added to."""
    transaction = connection.get_transaction()
    known = connection.__dict__.get("_sqla_byok")
    if known is None or known[0] is not transaction:
        known = connection._sqla_byok = (transaction, [])
    tenants: list[Any] = known[1]
    return tenants


# -- how a statement is executed ---------------------------------------------------------------------------------------


def pass_through(engine: Engine, statements: Statements, reader: type) -> None:
    """Have all executions on an engine pass ``statements``, those of its views and of open connections too.

    SQLAlchemy makes an execution context for each execution, of a class that the dialect names. A subclass of it sees
    the compiled statement before parameters are bound, which no event does, and costs a bystander next to nothing.

    :param reader: the class of the result processors that open values at the fetch.
    """
    engine.dialect.execution_ctx_cls = _context_class(engine.dialect.execution_ctx_cls, statements, reader)
    engine.clear_compiled_cache()  # what was compiled and read before keeps result processors that are not ours


def _context_class(plain: Any, statements: Statements, reader: type) -> Any:
    class Context(plain):  # type: ignore[misc] # whatever class the dialect has
        # The needs and the turn of a statement that has some.
        _byok: tuple[Any, Any] | None = None

        @classmethod
        def _init_statement(
            cls, dialect: Any, conn: Any, dbapi: Any, options: Any, text: str, parameters: Any
        ) -> Any:
            statements.judge_text(text)
            return super()._init_statement(dialect, conn, dbapi, options, text, parameters)

        @classmethod
        def _init_ddl(cls, dialect: Any, conn: Any, dbapi: Any, options: Any, compiled: Any) -> Any:
            statements.judge_ddl(compiled)
            return super()._init_ddl(dialect, conn, dbapi, options, compiled)

        @classmethod
        def _init_compiled(
            cls, dialect: Any, conn: Any, dbapi: Any, options: Any,
            compiled: Any, parameters: Any, clause: Any, extracted: Any, **more: Any,
        ) -> Any:  # fmt: skip
            needs = statements.needs(compiled)
            if needs is None:
                return super()._init_compiled(
                    dialect, conn, dbapi, options, compiled, parameters, clause, extracted, **more
                )
            turn = statements.begin(conn, options, needs)
            fan_out = statements.fan_out(needs, turn, precompiled=clause is None)
            if fan_out is not None:
                clause = resolved(clause).options(fan_out)
                compiled, extracted, more = _compiled_anew(conn, clause, parameters, options)
            token = RUNNING.set(turn)
            try:
                self = super()._init_compiled(
                    dialect, conn, dbapi, options, compiled, parameters, clause, extracted, **more
                )
            finally:
                RUNNING.reset(token)
            self._byok = needs, turn
            statements.bound(self, needs, turn)
            return self

        def pre_exec(self) -> None:
            super().pre_exec()
            if self._byok is not None:
                try:
                    statements.send(self.root_connection, self, *self._byok)
                except BaseException:
                    self.cursor.close()
                    raise

        def get_result_processor(self, type_: Any, colname: str, coltype: Any) -> Any:
            process = super().get_result_processor(type_, colname, coltype)
            if self._byok is None:
                return process
            # Asked for each column of the cursor, in order, where the statement is executed first.
            is_reader = isinstance(process, reader)
            self.__dict__.setdefault("_byok_columns", []).append(process if is_reader else None)
            return None if is_reader and not self._is_implicit_returning else process

        def _setup_result_proxy(self) -> Any:
            if self._byok is None:
                return super()._setup_result_proxy()
            _, turn = self._byok
            token = RUNNING.set(turn)  # for what it reads itself: RETURNING beside server defaults
            try:
                result = super()._setup_result_proxy()
            finally:
                RUNNING.reset(token)
            readers = self._byok_readers()
            if readers and not result._soft_closed and not self._is_implicit_returning:
                result.cursor_strategy = statements.fetch(result.cursor_strategy, turn, readers)
            return result

        def _byok_readers(self) -> Any:
            """The places of the columns that are opened at the fetch, and what opens each."""
            columns, kept = self.__dict__.get("_byok_columns"), self.compiled.__dict__
            if columns is not None:
                kept["_sqla_byok_readers"] = [
                    (place, process) for place, process in enumerate(columns) if process is not None
                ]
            return kept.get("_sqla_byok_readers", ())

    Context.__name__, Context.__qualname__ = plain.__name__, plain.__qualname__
    return Context


def _compiled_anew(conn: Any, clause: Any, parameters: Any, options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """What SQLAlchemy makes of a statement before it is executed: compiled or found compiled."""
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
    return compiled, extracted, more


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


class _Top:
    """Stands for a compiler that is about to compile a statement which is in no other."""

    stack = ()

    def __init__(self, compiled: Any) -> None:
        self._global_attributes = dict(compiled._global_attributes)  # loader criteria among them


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
    group_by: Sequence[Any]
    order_by: Sequence[Any]
    distinct: bool
    distinct_on: Sequence[Any]
    others: list[Any]


def parts(select: Any, compiled: Any) -> Parts:
    """The parts of a SELECT; of one of the ORM as SQLAlchemy Core has them.

    :param compiled: the compiled statement that it is or stands in.
    """
    state = select._compile_state_factory(select, _Top(compiled))
    select, columns = state.statement, []
    for column in select._raw_columns:
        if isinstance(column, FromClause) and not isinstance(column, FunctionElement):
            columns.extend(column.c)
        else:
            columns.append(column)
    on = getattr(select, "_pre_columns_clause", None)  # 2.1
    distinct_on = [*select._distinct_on, *getattr(on, "_distinct_on", ())]
    others = [getattr(select, name, None) for name in _OTHERS]
    texts = [element for element, _ in (*select._prefixes, *select._suffixes)]
    return Parts(
        columns=columns,
        froms=state._get_display_froms(),
        named=lambda name: _named(state, name),
        criteria=(*select._where_criteria, *select._having_criteria),
        group_by=select._group_by_clauses,
        order_by=select._order_by_clauses,
        distinct=bool(select._distinct) or any("DISTINCT" in str(text_of(text)).upper() for text in texts),
        distinct_on=distinct_on,
        others=[*(other for other in others if other is not None), *texts],
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


def text_of(element: Any) -> str | None:
    """The SQL text of text(); of a template string (2.1) with the names of the columns and tables in it; else None."""
    if not getattr(element, "_is_text_clause", False):
        return None
    pieces = getattr(element, "parts", None) or [element]
    return "".join(
        getattr(piece, "text", None) or " ".join(str(getattr(one, "name", "")) for one in iterate(piece))
        for piece in pieces
    )


def selected_by(compiled: Any) -> Any:
    """The SELECT of a compiled CREATE VIEW or CREATE TABLE AS (2.1); None of any other statement."""
    return getattr(getattr(compiled, "statement", None), "selectable", None)


def children(element: Any) -> Iterator[Any]:
    """The parts of an expression: what it tells, and of a class of somebody's own whatever else it holds."""
    yield from element.get_children()
    own = (cls for cls in type(element).__mro__ if not cls.__module__.startswith("sqlalchemy."))
    if any(issubclass(cls, ClauseElement) for cls in own):  # also where the ORM annotated it
        for value in tuple(vars(element).values()):
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, ClauseElement | QueryableAttribute):
                    yield one


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
    """The columns that a column of an alias or subquery stands for: one, or of a UNION one for each part."""
    found: Sequence[Any] = column._proxies
    return found


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


def returning(dml: Any) -> Sequence[Any]:
    """What an INSERT, UPDATE or DELETE returns."""
    found: Sequence[Any] = dml._returning
    return found


def conflict_criteria(conflict: Any) -> list[Any]:
    """The two WHERE of an ON CONFLICT."""
    found = (getattr(conflict, name, None) for name in ("inferred_target_whereclause", "update_whereclause"))
    return [one for one in found if one is not None]
