"""Keeping hash columns in step: what happens to each INSERT and UPDATE before it runs.

Whatever way a value takes to an encrypted column (flush, ORM bulk, Core, executemany, multi-VALUES, upsert), it
passes here. The hash column is given the same value, which its type then hashes; a value that was given a type of its
own (``literal("x")``, ``bindparam(…, type_=String)``) is bound through the column's type instead, or it would reach
the database in the clear. What cannot be kept in step is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from sqlalchemy import Alias, Column, Join, MetaData, Table, event
from sqlalchemy.sql.elements import BindParameter, ClauseElement, ColumnClause, Null
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import NullType

from sqla_byok.errors import EncodeError, UnsupportedQueryError
from sqla_byok.orm import upstream
from sqla_byok.orm.comparator import hash_column_of
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.types import Digest, Encrypted, SearchHash
from sqla_byok.orm.upstream import Item

__all__ = ["fill", "refuse_compiled", "refuse_embedded"]

Row = Mapping[str, Any]
_OURS = (Encrypted, SearchHash)


def fill(clause: Any, rows: Sequence[Row]) -> tuple[Any, Sequence[Row]] | None:
    """Complete an INSERT or UPDATE.

    :param clause: the statement.
    :param rows: its parameters, none of which is changed.
    :returns: the statement and parameters to run instead; None where no encrypted column is concerned.
    :raises UnsupportedQueryError: for what cannot be kept in step.
    """
    table, one_of_several = upstream.target(clause)
    while isinstance(table, Join):
        table = table.left  # where a key without a table belongs, in an UPDATE of several
    plan = _plan_of(table)
    if not (plan.encrypted or clause.is_update):
        return None
    items = upstream.values(clause)
    if one_of_several:
        items = [(key, value) for key, value in items if key.table == table]
    if not (plan.encrypted or any(isinstance(getattr(key, "type", None), _OURS) for key, _ in items)):
        return None
    for name in upstream.select_names(clause):
        if isinstance(table.c[name].type, _OURS):
            _refuse(
                table.c[name],
                "INSERT FROM SELECT cannot encrypt what the database selects; read and insert rows",
            )
    copied: dict[str, str] = {}
    if groups := upstream.multi_values(clause):
        clause = upstream.with_multi_values(
            clause, [[_fill_given(clause, table, plan, row, copied) for row in group] for group in groups]
        )
    elif items:
        clause = upstream.with_values(clause, _fill_items(clause, table, items, copied))
    if conflicts := upstream.conflicts(clause):
        clause = upstream.with_conflicts(clause, [_fill_conflict(table, conflict) for conflict in conflicts])
    if copied:
        rows = [{**row, **{new: row[old] for new, old in copied.items() if old in row}} for row in rows]
    return clause, _fill_rows(clause, table, plan, rows) if plan.pairs else rows


def refuse_embedded(ctes: Iterable[Any]) -> None:
    """Refuse an INSERT or UPDATE within another statement, which never passes :func:`fill`."""
    for cte in ctes:
        statement: Any = getattr(cte, "element", None)
        if (
            getattr(statement, "is_dml", False)
            and not statement.is_delete
            and fill(statement, ()) is not None
        ):
            raise UnsupportedQueryError(
                f"{statement.table.description}: an INSERT or UPDATE within a CTE cannot be given its hashes; run it "
                "as a statement of its own"
            )


def refuse_compiled(compiled: Any) -> None:
    """Refuse an INSERT or UPDATE that was compiled beforehand: nothing can be added to it any more."""
    if getattr(compiled, "isinsert", False) or getattr(compiled, "isupdate", False):
        statement = compiled.statement
        if fill(statement, ()) is not None:
            raise UnsupportedQueryError(
                f"{statement.table.description}: a statement compiled beforehand cannot be given its hashes; execute "
                "the statement itself"
            )


# -- what a table needs ----------------------------------------------------------------------------------------------


class _Plan:
    """The keys of a table's columns that concern us. It holds no column, which would keep the table alive."""

    __slots__ = ("defaults", "encrypted", "pairs")

    def __init__(self, table: Table) -> None:
        encrypted = [column for column in table.c if isinstance(column.type, Encrypted)]
        hashes = [(column, hash_column_of(column)) for column in encrypted]
        self.encrypted = bool(encrypted)
        self.pairs: tuple[tuple[Any, Any], ...] = tuple(
            (column.key, found.key) for column, found in hashes if found is not None
        )
        self.defaults = tuple(
            column.key for column, found in hashes if found is not None and column.default is not None
        )


_plans: WeakKeyDictionary[Table, _Plan] = WeakKeyDictionary()


@event.listens_for(Encrypted, "after_parent_attach")
def _encrypted_declared(type_: Encrypted[Any], column: Any) -> None:
    # A table can get the column, or one in the place of another, after statements on it were run.
    if isinstance(column, Column):
        event.listen(column, "after_parent_attach", lambda _, table: _plans.pop(table, None))


def _plan_of(table: Any) -> _Plan:
    if not isinstance(table, Table):
        while isinstance(table, Alias):
            table = table.element
        if not isinstance(table, Table):
            return _NOTHING
    plan = _plans.get(table)
    if plan is None:
        plan = _plans[upstream.plain_table(table)] = _Plan(table)
    return plan


_NOTHING = _Plan(Table("", MetaData()))


# -- parameters ------------------------------------------------------------------------------------------------------


def _fill_rows(clause: Any, table: Any, plan: _Plan, rows: Sequence[Row]) -> list[Row]:
    filled = [dict(row) for row in rows]
    for source, hash_key in plan.pairs:
        for row in filled:
            try:
                value = row[source]
                row[hash_key] = value if type(value) is not Sealed else _copied(table.c[hash_key], row)
            except KeyError:
                # A flush INSERT sends None for each attribute that was not set. Left here it would go before a value
                # that comes from .values() or from a default.
                if hash_key in row and (row.pop(hash_key) is not None or clause.is_update):
                    _refuse_hash(table.c[hash_key])
    return filled  # type: ignore[return-value]


def _copied(column: Any, row: Row) -> Digest:
    """The hash that is written with a sealed value, which nobody can hash: that of the row that it was read from."""
    given = row.get(column.key)
    if not isinstance(given, Digest):
        name = column.type.source.column_id
        raise EncodeError(
            f"{name}: a sealed value has no search hash by itself; read the row's {column.key} too, with undefer(), "
            "and write both as parameters, or reveal the value first",
            column=name,
        )
    kept: Digest = column.type.kept(given)
    return kept


# -- values ----------------------------------------------------------------------------------------------------------


def _fill_given(clause: Any, table: Any, plan: _Plan, given: Any, copied: dict[str, str]) -> Row:
    """One row of multi-VALUES."""
    if not isinstance(given, Mapping):
        raise UnsupportedQueryError(
            f"{table.fullname}: rows of positional values would shift by the hash columns; give dicts"
        )
    row: dict[Any, Any] = {}
    for key, value in given.items():
        column = _target(clause, table, key)
        row[key if column is None else column.key] = value
    for key in plan.defaults:
        if key not in row:
            row[key] = _default_of(table.c[key])
    return dict(_fill_items(clause, table, row.items(), copied))


def _default_of(column: Any) -> Any:
    return column.default.arg if column.default.is_scalar else column.default.arg(_NoContext(column))


class _NoContext:
    """What a default is given as its context in multi-VALUES, where SQLAlchemy has no row's parameters to offer."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(
            self._column,
            "its default reads other values of the row, which multi-VALUES does not offer; give it",
        )


def _fill_items(clause: Any, table: Any, items: Iterable[Item], copied: dict[str, str]) -> list[Item]:
    """The items with a hash beside each searchable value.

    :param copied: gathers the parameters that are needed under another name, new name to old.
    """
    filled: list[Item] = []
    for key, value in items:
        column = _target(clause, table, key)
        if column is None or not isinstance(column.type, _OURS):
            filled.append((key, value))
            continue
        if isinstance(column.type, SearchHash):
            _refuse_hash(column)
        value, hash_column = _value(column, value), hash_column_of(column)
        filled.append((key, value if _untyped(value) else _bound(column, value, copied)))
        if hash_column is not None:
            target = hash_column.key if isinstance(key, str) else hash_column
            filled.append((target, _bound(hash_column, value, copied)))
    return filled


def _target(clause: Any, table: Any, key: Any) -> Any:
    """The column that a key of ``.values()`` stands for; None for an unknown one.

    SQLAlchemy goes by the key's name, whatever table the key is of, unless an UPDATE has that table in its FROM.
    """
    if isinstance(key, str):
        return table.c.get(key)
    if not isinstance(key, ColumnClause):
        for column in iterate(key):
            if (
                isinstance(getattr(column, "type", None), _OURS)
                and getattr(column, "table", None) is not None
            ):
                _refuse(column, "name the column itself as what is set, not an expression over it")
        return None
    own, other = table.c.get(key.key), getattr(key, "table", None)
    if not clause.is_update or other is None or other == table:
        return own
    if any(isinstance(getattr(column, "type", None), _OURS) for column in (own, key)):
        named = [*iterate(clause.table), *(() if clause.whereclause is None else iterate(clause.whereclause))]
        if other not in {getattr(element, "table", element) for element in named}:
            raise UnsupportedQueryError(f"{key}: the UPDATE names a column of a table that it does not join")
    return key


def _value(column: Any, value: Any) -> Any:
    """What is to be bound: a plain value, NULL or a bind; nothing else."""
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    if not isinstance(value, ClauseElement) or isinstance(value, Null):
        return value
    if not isinstance(value, BindParameter):
        _refuse(column, "a SQL expression cannot be encrypted; compute the value in Python")
    if value.callable is not None:  # once, or the hash could be of another value
        return BindParameter(value.key, value.effective_value, unique=value.unique)
    return value


def _untyped(value: Any) -> bool:
    """Whether SQLAlchemy will give it the type of its column: what ``.values()`` makes of a plain value."""
    return isinstance(value, BindParameter) and value.unique and isinstance(value.type, NullType)


def _bound(column: Any, value: Any, copied: dict[str, str]) -> Any:
    """The value bound through the column's type.

    A named parameter gets a name of the column's own: where one name stands for two columns, SQLAlchemy binds both
    through the type that it met last.
    """
    if not isinstance(value, BindParameter):
        return value
    if value.unique:
        return BindParameter(None, value.value, type_=column.type, unique=True)
    name = f"{value.key}__byok_{column.key}"
    copied[name] = value.key
    if value.required:
        return BindParameter(name, type_=column.type)
    return BindParameter(name, value.value, type_=column.type)


# -- upserts ---------------------------------------------------------------------------------------------------------


def _fill_conflict(table: Any, conflict: Any) -> Any:
    elements = [_conflict_target(table, element) for element in upstream.conflict_elements(conflict)]
    items: list[Item] = []
    for key, value in upstream.conflict_values(conflict):
        items += _fill_conflict_item(table, key, value)
    return upstream.with_target(conflict, elements, items)


def _conflict_target(table: Any, element: Any) -> Any:
    column = table.c.get(element if isinstance(element, str) else getattr(element, "key", None))
    if column is None or not isinstance(column.type, Encrypted):
        return element
    hash_column = hash_column_of(column)
    if hash_column is None:
        _refuse(column, "it is not searchable, so no unique index can find its conflicts")
    return hash_column


def _fill_conflict_item(table: Any, key: Any, value: Any) -> list[Item]:
    if hasattr(key, "__clause_element__"):
        key = key.__clause_element__()
    name = key if isinstance(key, str) else key.key
    column = table.c.get(name)
    if column is None:
        # SQLAlchemy would write it nevertheless, in the clear where it is another spelling of an encrypted column.
        raise UnsupportedQueryError(f"{table.fullname}: the upsert sets {name!r}, which is no column's key")
    if isinstance(column.type, SearchHash):
        return []  # from set_=dict(excluded): it comes with its source
    if not isinstance(column.type, Encrypted):
        return [(key, value)]
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    hash_column = hash_column_of(column)
    if isinstance(value, ColumnClause):
        same = isinstance(value.type, Encrypted) and value.type.column_id == column.type.column_id
        bound, hashed = value, hash_column_of(value) if same else None
        if not same or (hashed is None) != (hash_column is None):
            _refuse(
                column, "only a value, or the same column of the row or of excluded, can be set on conflict"
            )
    else:
        value = _value(column, value)
        if isinstance(value, BindParameter) and not value.unique:
            _refuse(column, "a named parameter cannot be set on conflict; give the value or excluded")
        bound = _bound(column, value, {})
        hashed = None if hash_column is None else _bound(hash_column, value, {})
    return [(column.key, bound)] if hash_column is None else [(column.key, bound), (hash_column.key, hashed)]


def _refuse(column: Any, reason: str) -> NoReturn:
    name = (column.type.source if isinstance(column.type, SearchHash) else column.type).column_id
    raise UnsupportedQueryError(f"{name}: {reason}", column=name)


def _refuse_hash(column: Any) -> NoReturn:
    _refuse(column, "its hash column is written together with it, never by itself; set the encrypted column")
