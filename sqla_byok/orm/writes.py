"""Keeping hash columns in step: what happens to each INSERT and UPDATE before it runs.

Whatever way a value takes to an encrypted column (flush, ORM bulk, Core, executemany, multi-VALUES, upsert), it
passes here. The hash column is given the same value, which its type then hashes; a value that was given a type of its
own (``literal("x")``, ``bindparam(…, type_=String)``) is bound through the column's type instead, or it would reach
the database in the clear. What cannot be kept in step is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from sqlalchemy import Alias, Column, Join, MetaData, Table, event, null
from sqlalchemy.sql.elements import BindParameter, Cast, ClauseElement, ColumnClause, Label, Null, TypeCoerce
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import NullType

from sqla_byok.errors import EncodeError, UnsupportedQueryError
from sqla_byok.keys.searchable import HashSpec, Written
from sqla_byok.orm import upstream
from sqla_byok.orm.comparator import hash_column_of
from sqla_byok.orm.namesakes import declared_tables
from sqla_byok.orm.schema import IndexOf, indexes_of, is_unique, sources_of
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.types import Digest, Encrypted, SearchHash
from sqla_byok.orm.upstream import Item

__all__ = [
    "embedded",
    "fill",
    "hashed_table",
    "made_known",
    "refuse_compiled",
    "set_on_conflict",
    "sources_in",
    "written",
    "written_table",
]

Row = Mapping[str, Any]
# Parameters that are needed under another name too: what their values are, out of a row; KeyError where it has none.
Copies = dict[str, Callable[[Row], Any]]
_OURS = (Encrypted, SearchHash)


def fill(clause: Any, rows: Sequence[Row]) -> tuple[Any, Sequence[Row]] | None:
    """Complete an INSERT or UPDATE.

    :param clause: the statement.
    :param rows: its parameters, none of which is changed.
    :returns: the statement and parameters to run instead; None where no encrypted column is concerned.
    :raises UnsupportedQueryError: for what cannot be kept in step.
    """
    given = upstream.writing(clause)
    table, items = _first(given.table), given.values
    plan = _plan_of(table)
    if not (plan.encrypted or clause.is_update):
        return None
    if given.one_of_several:
        items = [(key, value) for key, value in items if key.table == table]
    if not (plan.encrypted or any(isinstance(getattr(key, "type", None), _OURS) for key, _ in items)):
        return None
    if items:
        _refuse_shifted(table, items)
    if given.select_names:
        clause = _fill_select(clause, table, plan, given.select_names)
    if plan.compounds and rows:
        _refuse_mixed(table, plan, [key for key, _ in items] or _first_keys(given.multi_values), rows)
    copied: Copies = {}
    if given.multi_values:
        groups = _fill_groups(clause, table, plan, given.multi_values, copied)
        clause = upstream.with_multi_values(clause, groups)
    elif items:
        clause = upstream.with_values(clause, _fill_items(clause, table, plan, items, copied))
    if given.conflicts:
        conflicts = [_fill_conflict(table, plan, each) for each in given.conflicts]
        clause = upstream.with_conflicts(clause, conflicts)
    if copied:
        rows = [{**row, **_copies(row, copied)} for row in rows]
    if plan.searchable:
        rows = _fill_rows(clause, table, plan, rows)
    if given.returns and clause.is_insert:
        clause = upstream.with_returned(clause, lambda one: _is_hash_of(table, one))
    return clause, rows


def _fill_select(clause: Any, table: Any, plan: _Plan, names: Sequence[str]) -> Any:
    """An INSERT FROM SELECT, which may give an encrypted column nothing but NULL; its hashes are then NULL too."""
    selected = upstream.selected_columns(clause)
    nulls = {name for name, column in zip(names, selected, strict=False) if _is_null(column)}
    for name in names:
        if isinstance(table.c[name].type, _OURS) and name not in nulls:
            _refuse(
                table.c[name],
                "INSERT FROM SELECT cannot encrypt what the database selects; read and insert rows",
            )
    hashes = {key: None for source, key in plan.pairs if source in nulls}
    hashes |= {key: None for key, index in plan.compounds.items() if not nulls.isdisjoint(index.sources)}
    return upstream.with_selected(clause, [key for key in hashes if key not in names], null())


def _is_null(element: Any) -> bool:
    while isinstance(element, Label | Cast | TypeCoerce):
        element = element.clause if isinstance(element, Cast | TypeCoerce) else element.element
    return isinstance(element, Null)


def _is_hash_of(table: Any, element: Any) -> bool:
    """Whether an expression is a hash column of a table, or a label of one."""
    bare = getattr(element, "element", element)
    return isinstance(getattr(bare, "type", None), SearchHash) and bare.table == table


def written(clause: Any) -> list[Mapping[str | None, Written]]:
    """What an INSERT or UPDATE makes known of each table that it writes to, by the owners of its columns."""
    clause = upstream.inside(clause)
    table, _ = upstream.target(clause)
    # MySQL's UPDATE of several tables sets columns of any of them.
    others = {key.table for key, _ in upstream.values(clause) if getattr(key, "table", None) is not None}
    return [_plan_of(each).written for each in {_first(table), *others}]


def made_known(table: Any) -> Mapping[str | None, Written]:
    """What a write to a table makes known, by the owners of its columns."""
    return _plan_of(table).written


def written_table(written: Written) -> Table | None:
    """The table that makes this known when it is written."""
    return next((table for table in declared_tables() if written in _known_by(table)), None)


def hashed_table(spec: HashSpec) -> Table | None:
    """The table with a column that is hashed in this way."""
    found = (table for table in declared_tables() if table.fullname == spec.table)
    return next((t for t in found if any(spec in known.specs.values() for known in _known_by(t))), None)


def sources_in(table: Table, columns: Collection[str]) -> list[str]:
    """The keys of the encrypted columns that these hash columns follow, given by their column ids."""
    hashes = [
        each for each in table.c if isinstance(each.type, SearchHash) and each.type.column_id in columns
    ]
    return list(dict.fromkeys(key for each in hashes for key in sources_of(each)))


def _known_by(table: Table) -> list[Written]:
    return list(made_known(table).values())


def _first(table: Any) -> Any:
    """Where a key without a table belongs, in an UPDATE of several."""
    while isinstance(table, Join):
        table = table.left
    return table


def concerns(clause: Any) -> bool:
    """Whether an INSERT or UPDATE writes to encrypted columns, or to a table that has any."""
    if not (clause.is_insert or clause.is_update):
        return False
    keys = [key for key, _ in upstream.values(clause)]
    return _plan_of(_first(upstream.target(clause)[0])).encrypted or any(
        isinstance(getattr(key, "type", None), _OURS) for key in keys
    )


def embedded(compiled: Any) -> tuple[str, None] | None:
    """Why a compiled statement is refused that has an INSERT or UPDATE within, which never passes :func:`fill`."""
    for statement in upstream.dml_within(compiled):
        if concerns(statement):
            return (
                f"{statement.table.description}: an INSERT or UPDATE within another statement cannot be given its "
                "hashes; run it as a statement of its own",
                None,
            )
    return None


def refuse_compiled(compiled: Any) -> None:
    """Refuse an INSERT or UPDATE that was compiled beforehand: nothing can be added to it any more."""
    if getattr(compiled, "isinsert", False) or getattr(compiled, "isupdate", False):
        statement = upstream.inside(compiled.statement)
        if concerns(statement):
            raise UnsupportedQueryError(
                f"{statement.table.description}: a statement compiled beforehand cannot be given its hashes; execute "
                "the statement itself"
            )


# -- what a table needs ----------------------------------------------------------------------------------------------


class _Plan:
    """The keys of a table's columns that concern us. It holds no column, which would keep the table alive."""

    __slots__ = ("compounds", "encrypted", "followed", "hashes", "pairs", "searchable", "written")

    def __init__(self, table: Table) -> None:
        encrypted = [column for column in table.c if isinstance(column.type, Encrypted)]
        siblings = [(column.key, hash_column_of(column)) for column in encrypted]
        indexes = indexes_of(table)
        self.encrypted = bool(encrypted)
        # A hash that follows one column, or several.
        self.pairs: tuple[tuple[Any, Any], ...] = (
            *((key, found.key) for key, found in siblings if found is not None),
            *((index.sources[0], key) for key, index in indexes.items() if len(index.sources) == 1),
        )
        self.compounds = {key: index for key, index in indexes.items() if len(index.sources) > 1}
        self.hashes: dict[str, list[str]] = {}
        for source, hash_key in self.pairs:
            self.hashes.setdefault(source, []).append(hash_key)
        followed = {*self.hashes, *(key for index in self.compounds.values() for key in index.sources)}
        self.followed = tuple(column.key for column in encrypted if column.key in followed)
        hashes = [column for column in table.c if isinstance(column.type, SearchHash)]
        self.searchable = bool(hashes)
        self.written = _written(table.fullname, hashes, [column.type for column in encrypted])


def _written(table: str, hashes: Sequence[Any], encrypted: Sequence[Any]) -> dict[str | None, Written]:
    """What a write makes known of a table, by the columns' owners; None are those of the statement's tenant."""
    owners = {column.type.owner for column in hashes} | {type_.owner for type_ in encrypted}
    return {
        owner: Written(
            table,
            {column.type.spec.column: column.type.spec for column in hashes if column.type.owner == owner},
            frozenset(type_.column_id or "" for type_ in encrypted if type_.owner == owner),
            frozenset(
                column.type.spec.column
                for column in hashes
                if column.type.owner == owner and is_unique(column)
            ),
        )
        for owner in owners
    }


_plans: WeakKeyDictionary[Table, _Plan] = WeakKeyDictionary()


@event.listens_for(Encrypted, "after_parent_attach")
@event.listens_for(SearchHash, "after_parent_attach")
def _column_declared(type_: Encrypted[Any] | SearchHash, column: Any) -> None:
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
    for hash_key, index in plan.compounds.items():
        # SQLAlchemy goes by the first row's keys, and leaves out what only others have.
        sent = [source for source in index.sources if filled and source in filled[0]]
        for row in filled:
            _fill_compound(clause, table, index, hash_key, row, sent)
    return filled  # type: ignore[return-value]


def _copied(column: Any, row: Row) -> Digest:
    """The hash that is written with a sealed value, which nobody can hash: that of the row that it was read from."""
    given = row.get(column.key)
    if not isinstance(given, Digest):
        name = column.type.source.column_id
        raise EncodeError(
            f"{name}: a sealed value has no search hash by itself; read the row's {column.key} too, with search_hash() "
            "or a SELECT of the table, and write both with insert() or update() of the table; or reveal the value "
            "first",
            column=name,
        )
    kept: Digest = column.type.kept(given)
    return kept


def _fill_compound(
    clause: Any, table: Any, index: IndexOf, hash_key: Any, row: dict[str, Any], sent: Sequence[str]
) -> None:
    """Set a row's hash of several columns, all of which have to be there but in an INSERT.

    :param sent: those that the statement sends.
    """
    if not sent:
        if hash_key in row and (row.pop(hash_key) is not None or clause.is_update):
            _refuse_hash(table.c[hash_key])
    elif clause.is_update and any(row.get(key) is None for key in sent):
        row[hash_key] = None  # whatever the others are
    elif _complete(clause, table, index, hash_key, sent):
        values = tuple(row.get(source) if source in sent else None for source in index.sources)
        sealed = all(type(value) is Sealed for value in values)
        row[hash_key] = _copied(table.c[hash_key], row) if sealed else values
    else:
        row.pop(hash_key, None)


def _complete(clause: Any, table: Any, index: IndexOf, hash_key: Any, given: Iterable[str]) -> bool:
    """Whether all values of an index are known here. Not so where a default is to give one of them."""
    missing = [source for source in index.sources if source not in given]
    if missing and clause.is_update:
        _refuse_partial(table.c[hash_key], missing)
    return all(table.c[source].default is None for source in missing)


def _refuse_partial(hash_column: Any, missing: Iterable[str]) -> NoReturn:
    _refuse(
        hash_column,
        f"it is an index over several columns, and this statement sets only some; set {', '.join(missing)} too, "
        "or change and flush an object whose class has all of them",
    )


def _first_keys(groups: Sequence[Sequence[Any]]) -> Iterable[Any]:
    return groups[0][0] if groups else ()


def _refuse_mixed(table: Any, plan: _Plan, given: Iterable[Any], rows: Sequence[Row]) -> None:
    keys = {key if isinstance(key, str) else getattr(key, "key", None) for key in given}
    for hash_key, index in plan.compounds.items():
        if not keys.isdisjoint(index.sources) and not all(
            row.keys().isdisjoint(index.sources) for row in rows
        ):
            _refuse(
                table.c[hash_key],
                "it is an index over several columns; give all of them in values(), or all as parameters",
            )


# -- values ----------------------------------------------------------------------------------------------------------


def _refuse_shifted(table: Any, items: Sequence[Item]) -> None:
    """Refuse one row of positional values, of which ``values()`` has made a mapping.

    It has all columns up to a hash column, which stands for the next one that the program knows of. What was read as a
    whole row has all columns of the table, and a sealed value comes with its hash.
    """
    columns, given = list(getattr(table, "c", ())), {_key_of(key): value for key, value in items}
    if len(given) < len(columns):
        for column in itertools.takewhile(lambda column: column.key in given, columns):
            if isinstance(column.type, SearchHash) and not isinstance(_plain(given[column.key]), Digest):
                _refuse_positional(table)


def _refuse_positional(table: Any) -> NoReturn:
    raise UnsupportedQueryError(
        f"{getattr(table, 'fullname', table.description)}: rows of positional values would shift by the hash columns; "
        "give dicts"
    )


def _fill_groups(
    clause: Any, table: Any, plan: _Plan, groups: Sequence[Sequence[Any]], copied: Copies
) -> list[list[Row]]:
    """The rows of multi-VALUES. What the first of them does not have, SQLAlchemy leaves out of all others."""
    rows = [[_given(clause, table, plan, row) for row in group] for group in groups]
    columns = rows[0][0].keys()
    return [
        [
            dict(_fill_items(clause, table, plan, [(k, v) for k, v in row.items() if k in columns], copied))
            for row in group
        ]
        for group in rows
    ]


def _given(clause: Any, table: Any, plan: _Plan, given: Any) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        _refuse_positional(table)
    row: dict[Any, Any] = {}
    for key, value in given.items():
        column = _target(clause, table, key)
        name = key if column is None else column.key
        if name in row:  # SQLAlchemy takes one of them in the first row and another in those behind
            raise UnsupportedQueryError(
                f"{table.fullname}: a row gives {name!r} twice, by two spellings; give it once"
            )
        row[name] = value
    for key in plan.followed:
        if key not in row and table.c[key].default is not None:
            row[key] = _default_of(table.c[key])
    return row


def _default_of(column: Any) -> Any:
    if not (column.default.is_scalar or column.default.is_callable):
        _refuse(
            column,
            "its default is a SQL expression, which cannot be encrypted; give it a Python value or function",
        )
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


def _fill_items(clause: Any, table: Any, plan: _Plan, items: Iterable[Item], copied: Copies) -> list[Item]:
    """The items with a hash beside each searchable value.

    A hash that is among them, as in the values of a whole row, is made anew with its source.

    :param copied: gathers the parameters that are needed under another name.
    """
    filled: list[Item] = []
    by_table: dict[Any, dict[str, Any]] = {}
    by_name: dict[Any, bool] = {}
    targets = [(key, _target(clause, table, key), value) for key, value in items]
    given = {
        column: value for _, column, value in targets if isinstance(getattr(column, "type", None), SearchHash)
    }
    followed: set[Any] = set()
    for key, column, value in targets:
        if column in given:
            continue
        if column is None or not isinstance(column.type, Encrypted):
            filled.append((key, value))
            continue
        if column.key in by_table.get(column.table, ()):
            continue  # by its other spelling: SQLAlchemy takes the first
        value = _value(column, value)
        filled.append((key, value if _untyped(value) else _bound(column, value, copied)))
        for hash_column in _hashes_of(column):
            followed.add(hash_column)
            target = hash_column.key if isinstance(key, str) else hash_column
            hashed = _given_hash(hash_column, [value], given)
            filled.append((target, _bound(hash_column, value, copied) if hashed is None else hashed))
        by_table.setdefault(column.table, {})[column.key] = value
        by_name[column.table] = isinstance(key, str)
    for written, values in by_table.items():
        for hash_column, hashed in _compounds(clause, written, values, given, copied):
            followed.add(hash_column)
            if hashed is not None:
                filled.append((hash_column.key if by_name[written] else hash_column, hashed))
    for hash_column in given.keys() - followed:
        _refuse_hash(hash_column)
    return filled


def _compounds(
    clause: Any, table: Any, values: Mapping[str, Any], given: Mapping[Any, Any], copied: Copies
) -> Iterator[tuple[Any, Any]]:
    """The hashes of several columns of which some are among the values; None for one that a default makes."""
    for hash_key, index in _plan_of(table).compounds.items():
        sources, hash_column = [source for source in index.sources if source in values], table.c[hash_key]
        if not sources:
            continue
        parts = [values.get(source) for source in index.sources]
        if clause.is_update and any(_plain(values[source]) is None for source in sources):
            yield hash_column, null()  # whatever the others are
        elif _complete(clause, table, index, hash_key, sources):
            hashed = _given_hash(hash_column, parts, given)
            yield hash_column, _bound_together(hash_column, parts, copied) if hashed is None else hashed
        else:
            yield hash_column, None


def _given_hash(
    hash_column: Any, parts: Sequence[Any], given: Mapping[Any, Any]
) -> BindParameter[Any] | None:
    """The hash that was given with sealed values; None with others, which are hashed."""
    if not all(type(_plain(part)) is Sealed for part in parts):
        return None
    digest = _copied(hash_column, {hash_column.key: _plain(given.get(hash_column))})
    return BindParameter(None, digest, type_=hash_column.type, unique=True)


def _plain(value: Any) -> Any:
    """The Python value that an item sets; itself where it is a named parameter, whose value is not known here."""
    if isinstance(value, Null):
        return None
    return value.value if isinstance(value, BindParameter) and value.unique else value


def _hashes_of(column: Any) -> list[Any]:
    """The columns that hold a hash of this column alone, in the same FROM."""
    return [column.table.c[key] for key in _plan_of(column.table).hashes.get(column.key, ())]


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


def _bound(column: Any, value: Any, copied: Copies) -> Any:
    """The value bound through the column's type.

    A named parameter gets a name of the column's own: where one name stands for two columns, SQLAlchemy binds both
    through the type that it met last.
    """
    if not isinstance(value, BindParameter):
        return value
    if value.unique:
        return BindParameter(None, value.value, type_=column.type, unique=True)
    name = f"{value.key}__byok_{column.key}"
    copied[name] = lambda row: row[value.key]
    if value.required:
        return BindParameter(name, type_=column.type)
    return BindParameter(name, value.value, type_=column.type)


def _bound_together(hash_column: Any, parts: Sequence[Any], copied: Copies) -> Any:
    """The values of several columns as one, bound through the type of the hash over them."""
    if any(part is None or isinstance(part, Null) for part in parts):
        return null()
    values = [part.value if isinstance(part, BindParameter) else part for part in parts]
    named = [isinstance(part, BindParameter) and not part.unique for part in parts]
    if not any(named):
        return BindParameter(None, tuple(values), type_=hash_column.type, unique=True)
    name = f"__byok_{hash_column.key}"

    def together(row: Row) -> tuple[Any, ...]:
        return tuple(
            (row[part.key] if part.required else row.get(part.key, value)) if from_row else value
            for part, value, from_row in zip(parts, values, named, strict=True)
        )

    copied[name] = together
    if any(from_row and part.required for part, from_row in zip(parts, named, strict=True)):
        return BindParameter(name, type_=hash_column.type)
    return BindParameter(name, tuple(values), type_=hash_column.type)


def _copies(row: Row, copied: Copies) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, take in copied.items():
        with suppress(KeyError):
            found[name] = take(row)
    return found


# -- upserts ---------------------------------------------------------------------------------------------------------


def _fill_conflict(table: Any, plan: _Plan, conflict: Any) -> Any:
    elements = [_conflict_target(table, element) for element in upstream.conflict_elements(conflict)]
    items: list[Item] = []
    values: dict[str, Any] = {}
    for key, value in upstream.conflict_values(conflict):
        items += _fill_conflict_item(table, key, value, values)
    for hash_key, index in plan.compounds.items():
        missing = [source for source in index.sources if source not in values]
        if not missing:
            made = _conflict_hash(table.c[hash_key], [values[key] for key in index.sources])
        elif len(missing) == len(index.sources):
            continue
        elif any(_plain(values[key]) is None for key in index.sources if key in values):
            made = null()
        else:
            _refuse_partial(table.c[hash_key], missing)
        items.append((hash_key, made))
    named = {_key_of(key) for key, _ in upstream.conflict_values(conflict)}
    for alone in named - {_key_of(key) for key, _ in items}:
        if isinstance(table.c[alone].type, SearchHash):
            _refuse_hash(table.c[alone])
    return upstream.with_target(conflict, elements, items)


def _conflict_target(table: Any, element: Any) -> Any:
    column = table.c.get(element if isinstance(element, str) else getattr(element, "key", None))
    if column is None or not isinstance(column.type, Encrypted):
        return element
    hash_column = hash_column_of(column)
    if hash_column is None:
        _refuse(column, "it is not searchable, so no unique index can find its conflicts")
    return hash_column


def _conflict_hash(hash_column: Any, values: Sequence[Any]) -> Any:
    """The hash over several columns that are set on conflict: of values, or that of the row they are all taken from."""
    rows: set[Any] = {value.table for value in values if isinstance(value, ColumnClause)}
    if not rows:
        return _bound_together(hash_column, values, {})
    if len(rows) > 1 or not all(isinstance(value, ColumnClause) for value in values):
        _refuse(
            hash_column,
            "it is an index over several columns; on conflict set all of them to values, or all from excluded",
        )
    return rows.pop().c[hash_column.key]


def _key_of(key: Any) -> Any:
    """The key of a column that an upsert sets, by whatever it is named."""
    if hasattr(key, "__clause_element__"):
        key = key.__clause_element__()
    return key if isinstance(key, str) else key.key


def set_on_conflict(table: Any, key: Any) -> Any:
    """The column that an upsert sets by a key.

    :raises UnsupportedQueryError: if it is none by its key. SQLAlchemy would write it nevertheless, past all checks
        where it is another spelling of a column.
    """
    name = _key_of(key)
    column = table.c.get(name)
    other = not isinstance(key, str) and (
        getattr(key, "is_literal", False) or getattr(key, "name", name) != getattr(column, "name", None)
    )
    if column is None or other:
        raise UnsupportedQueryError(f"{table.fullname}: the upsert sets {name!r}, which is no column's key")
    return column


def _fill_conflict_item(table: Any, key: Any, value: Any, values: dict[str, Any]) -> list[Item]:
    column = set_on_conflict(table, key)
    if isinstance(column.type, SearchHash):
        return []  # from set_=dict(excluded): it comes with its source
    if not isinstance(column.type, Encrypted):
        return [(key, value)]
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    hash_columns = _hashes_of(column)
    if isinstance(value, ColumnClause):
        same = isinstance(value.type, Encrypted) and value.type.column_id == column.type.column_id
        row: Any = value.table
        if not same or not all(one.key in row.c for one in hash_columns):
            _refuse(
                column, "only a value, or the same column of the row or of excluded, can be set on conflict"
            )
        bound, hashed = value, [row.c[one.key] for one in hash_columns]
    else:
        value = _value(column, value)
        if isinstance(value, BindParameter) and not value.unique:
            _refuse(column, "a named parameter cannot be set on conflict; give the value or excluded")
        bound = _bound(column, value, {})
        hashed = [_bound(one, value, {}) for one in hash_columns]
    values[column.key] = value
    return [
        (column.key, bound),
        *((one.key, made) for one, made in zip(hash_columns, hashed, strict=True)),
    ]


def _refuse(column: Any, reason: str) -> NoReturn:
    name = (column.type.source if isinstance(column.type, SearchHash) else column.type).column_id
    raise UnsupportedQueryError(f"{name}: {reason}", column=name)


def _refuse_hash(column: Any) -> NoReturn:
    _refuse(column, "its hash column is written together with it, never by itself; set the encrypted column")
