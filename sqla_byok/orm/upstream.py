"""The private SQLAlchemy names that filling and following a statement needs, in one place.

SQLAlchemy has no public way to change the values of an INSERT or UPDATE that somebody else built. Both supported
lines, 2.0 and 2.1, are tested against what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from typing import Any, TypeVar

from sqlalchemy import Table, UniqueConstraint
from sqlalchemy.orm.interfaces import CompileStateOption
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.util import immutabledict
from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

__all__ = [
    "FanOut",
    "compared",
    "conflict_elements",
    "conflict_values",
    "conflicts",
    "held",
    "hold",
    "in_greenlet",
    "known",
    "multi_values",
    "note_compared",
    "pinned",
    "plain_table",
    "processors",
    "remember",
    "remembered",
    "render_again",
    "resolved",
    "result_types",
    "select_names",
    "target",
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

    :param live: how many search salts the compiled statement looks up.
    """

    propagate_to_loaders = False
    _cache_key_traversal = [("live", InternalTraversal.dp_plain_obj)]  # noqa: RUF012 - SQLAlchemy's declaration

    def __init__(self, live: int) -> None:
        self.live = live


def note_compared(compiler: Any, live: int) -> None:
    """Keep with a statement, while it is compiled, that it compares search hashes, by so many search salts."""
    compiler._sqla_byok_live = live


def compared(compiled: Any) -> int:
    """By how many search salts a compiled statement compares; 0 where it compares no search hashes."""
    live: int = compiled.__dict__.get("_sqla_byok_live", 0)
    return live


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


def hold(connection: Any, ring: Any) -> None:
    """Keep a keyring for as long as the connection's transaction lasts."""
    connection._sqla_byok_unit = (connection.get_transaction(), ring)


def held(connection: Any) -> Any:
    """The keyring that :func:`hold` kept in this transaction; None after its end."""
    transaction, ring = connection.__dict__.get("_sqla_byok_unit") or (None, None)
    return ring if transaction is not None and transaction is connection.get_transaction() else None


def pinned(connection: Any, tenant: str | None) -> str | None:
    """The first tenant of the connection's transaction: this one, where none was there before."""
    transaction = connection.get_transaction()
    known = connection.__dict__.get("_sqla_byok")
    if known is None or known[0] is not transaction:
        known = connection._sqla_byok = (transaction, tenant)
    first: str | None = known[1]
    return first
