"""The private SQLAlchemy names that filling and following a statement needs, in one place.

SQLAlchemy has no public way to change the values of an INSERT or UPDATE that somebody else built. Both supported
lines, 2.0 and 2.1, are tested against what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Table, UniqueConstraint, and_
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.orm.interfaces import CompileStateOption
from sqlalchemy.sql.elements import (
    ClauseElement,
    TableValuedColumn,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.lambdas import NullLambdaStatement
from sqlalchemy.sql.selectable import FromClause, Lateral, SelectState
from sqlalchemy.sql.visitors import InternalTraversal, iterate
from sqlalchemy.util import immutabledict
from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

__all__ = [
    "Around",
    "FanOut",
    "Named",
    "Parts",
    "children",
    "compared",
    "compared_owned",
    "conflict_columns",
    "conflict_criteria",
    "conflict_elements",
    "conflict_values",
    "conflicts",
    "criteria",
    "executed",
    "held",
    "held_to",
    "hold",
    "in_greenlet",
    "inside",
    "instead",
    "known",
    "met",
    "multi_values",
    "named_in_compound",
    "named_in_order_by",
    "note_compared",
    "ordering",
    "parts",
    "plain_table",
    "processors",
    "proxied",
    "referred",
    "remember",
    "remember_owned",
    "remembered",
    "remembered_owned",
    "render_again",
    "resolved",
    "restated",
    "result_types",
    "returning",
    "row_of",
    "rows_of_values",
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
    "written_froms",
]

T = TypeVar("T")
Item = tuple[Any, Any]


class FanOut(CompileStateOption):
    """An option that does nothing but enter a statement's cache key.

    :param live: how many search salts the compiled statement looks up, and whose.
    """

    propagate_to_loaders = False
    _cache_key_traversal = [("live", InternalTraversal.dp_plain_obj)]  # noqa: RUF012 - SQLAlchemy's declaration

    def __init__(self, live: Hashable) -> None:
        self.live = live


def note_compared(compiler: Any, live: int, owner: str | None, specs: Iterable[Any] = ()) -> None:
    """Keep with a statement, while it is compiled, that it compares search hashes, by so many search salts.

    :param owner: whose they are, where they are not the statement's tenant's.
    :param specs: how the hashes are made that it compares.
    """
    if owner is None:
        compiler._sqla_byok_live = live
    else:
        compiler.__dict__.setdefault("_sqla_byok_owned", {})[owner] = live
    compiler.__dict__.setdefault("_sqla_byok_searched", {}).setdefault(owner, set()).update(specs)


def compared(compiled: Any) -> int:
    """By how many search salts a compiled statement compares; 0 where it compares no search hashes."""
    live: int = compiled.__dict__.get("_sqla_byok_live", 0)
    return live


def compared_owned(compiled: Any) -> Mapping[str, int]:
    """Likewise for each owner of single columns by whose salts it compares."""
    owned: Mapping[str, int] = compiled.__dict__.get("_sqla_byok_owned", {})
    return owned


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


def conflict_columns(table: Any, conflict: Any) -> Iterator[Any]:
    """The same as columns of the table; where it names a constraint, those that may be in it."""
    for element in conflict_elements(conflict):
        column = table.c.get(element) if isinstance(element, str) else element
        if hasattr(column, "type"):
            yield column
    if getattr(conflict, "constraint_target", None) is not None:
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


def processors(result: Any) -> Sequence[Any]:
    """What each column of a result's raw rows passes through, in the order of the rows; None where nothing does."""
    return result._metadata._processors or ()


def known(compiled: Any, ask: Callable[[Any], T]) -> T:
    """What ``ask`` says of a compiled statement, asked once and kept with it."""
    found: T | None = compiled.__dict__.get("_sqla_byok")
    if found is None:
        found = compiled._sqla_byok = ask(compiled)
    return found


def remember(context: Any, ring: Any) -> None:
    """Keep a statement's keyring with its execution."""
    context._sqla_byok = ring


def remembered(context: Any) -> Any:
    """The keyring that the statement was executed with."""
    return context._sqla_byok


def remember_owned(context: Any, owned: Any) -> None:
    """Keep the keyrings of the owners of single columns with a statement's execution."""
    context._sqla_byok_owned = owned


def remembered_owned(context: Any) -> Any:
    """Those keyrings; None where it has no such column."""
    return context.__dict__.get("_sqla_byok_owned")


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


class Around:
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
    group_by: Sequence[Any]
    order_by: Sequence[Any]
    distinct: bool
    distinct_on: Sequence[Any]
    others: list[Any]
    state: Any  # SQLAlchemy's, for Around


def parts(select: Any, around: Around, in_from: Any = None) -> Parts:
    """The parts of a SELECT; of one of the ORM as SQLAlchemy Core has them.

    :param around: the statements that it stands in.
    :param in_from: the subquery that it makes up, where it stands in a FROM.
    """
    state = around.state_of(select, in_from)
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
        froms=around.froms(state, in_from),
        state=state,
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


def written_froms(dml: Any) -> list[Any]:
    """What subqueries of an INSERT, UPDATE or DELETE correlate with: none of an INSERT."""
    return (
        [] if dml.is_insert else [dml.table, *(one for each in criteria(dml) for one in each._from_objects)]
    )


def returning(dml: Any) -> Sequence[Any]:
    """What an INSERT, UPDATE or DELETE returns."""
    found: Sequence[Any] = dml._returning
    return found


def conflict_criteria(conflict: Any) -> list[Any]:
    """The two WHERE of an ON CONFLICT."""
    found = (getattr(conflict, name, None) for name in ("inferred_target_whereclause", "update_whereclause"))
    return [one for one in found if one is not None]
