"""What is added to a table by declaring an encrypted column: the sibling hash column, and where constraints go.

All of it hangs on SQLAlchemy's schema events of our own type. A column of type :class:`Encrypted` hears of its table
and then gets its column id, gives up ``unique`` and ``index``, and appends its sibling right behind itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from sqlalchemy import (
    CheckConstraint,
    Column,
    ColumnDefault,
    Computed,
    FetchedValue,
    Index,
    Table,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.exc import NoReferenceError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapper
from sqlalchemy.schema import ColumnCollectionConstraint, MetaData
from sqlalchemy.sql.elements import BinaryExpression, ClauseElement, ColumnClause, Null, quoted_name
from sqlalchemy.sql.schema import CallableColumnDefault

from sqla_byok.errors import DeclarationError
from sqla_byok.normalize import identity
from sqla_byok.orm import upstream
from sqla_byok.orm.types import Encrypted, IndexedValue, IndexHash, SearchHash

__all__ = [
    "INDEX",
    "SOURCE",
    "HashColumn",
    "IndexOf",
    "add_index",
    "cannot_follow",
    "declares_encrypted",
    "hash_key",
    "indexes_of",
    "is_unique",
    "sources_of",
]

SOURCE = "byok_source"
"""The key in a hash column's ``info`` that names the column it follows; of several, the first."""

INDEX = "byok_index"
"""The key in the ``info`` of a further index's hash column that says what it indexes: an :class:`IndexOf`."""


class IndexOf(NamedTuple):
    """What a :class:`~sqla_byok.hash_index` is, as its hash column keeps it.

    :param name: its name; the hash column is ``<name>_hash``.
    :param sources: the keys of the columns whose values it takes.
    :param transform: what it makes of them.
    """

    name: str
    sources: tuple[str, ...]
    transform: Callable[..., Any]

    def same_as(self, other: object) -> bool:
        """Whether both hash in the same way. A model that is declared twice may have another function object."""
        return (
            isinstance(other, IndexOf)
            and self[:2] == other[:2]
            and identity(self.transform) == identity(other.transform)
        )


# In the info of a hash column: the names of its sources, by which a copy finds them where their keys are others.
_NAMES = "byok_source_names"
# In the info of a source whose sibling was made; copies of the column carry it along.
_HAS_HASH = "byok_has_hash"
# In the info of a column that was read from the database and may be a hash column: whose it is, nobody has said.
_REFLECTED = "byok_reflected"
_MOVED = "byok_moved"
_IDS = "byok_column_ids"
_WHY = "the database sees only ciphertext, which is different each time"


def hash_key(key: str) -> str:
    """The key of the sibling of a column with this key."""
    return f"{key}_hash"


def declares_encrypted(metadata: MetaData) -> bool:
    """Whether any of its tables was declared with an encrypted column."""
    return _IDS in metadata.info


# -- the column ------------------------------------------------------------------------------------------------------


@event.listens_for(Encrypted, "after_parent_attach")
def _type_attached(type_: Encrypted[Any], column: Any) -> None:
    if not isinstance(column, Column):
        return
    if column.type is not type_:
        raise DeclarationError(
            f"the column {column.name!r} has Encrypted inside {type(column.type).__name__} or as a variant of it; "
            "Encrypted must be the column's own type, with any other type inside it"
        )
    event.listen(column, "before_parent_attach", _before_table)
    event.listen(column, "after_parent_attach", _after_table)


def _before_table(column: Column[Any], table: Any) -> None:
    if not isinstance(table, Table) or not isinstance(column.type, Encrypted):
        return
    column.type = column.type.bound_to(_column_id(column, table), table.fullname)
    _refuse_impossible(column)
    # What was asked of the column is asked of its sibling; see _after_table.
    column.info = {**column.info, _MOVED: (column.unique, column.index)}
    column.unique = column.index = None


def _after_table(column: Column[Any], table: Any) -> None:
    if not isinstance(table, Table) or not isinstance(column.type, Encrypted):
        return
    for item, expression in _evaluated(table):
        _refuse_named(item, expression, table)
    unique, index = column.info.pop(_MOVED, (None, None))
    if not column.type.searchable:
        return
    if _HAS_HASH in column.info:
        # A copy (to_metadata): its sibling is copied too, behind it. Where it is not, it is made at the end.
        event.listen(table, "after_parent_attach", lambda *_: _complete(column, table))
        return
    column.info[_HAS_HASH] = True
    _add_sibling(column, table, unique, index)


def _complete(column: Column[Any], table: Table) -> None:
    if hash_key(column.key) not in table.c:
        _add_sibling(column, table, None, None)


def _add_sibling(column: Column[Any], table: Table, unique: bool | None, index: bool | None) -> None:
    type_: Encrypted[Any] = column.type  # type: ignore[assignment]
    sibling = _called(table, hash_key(column.key), hash_key(column.name))
    if sibling is None and _spelled_otherwise(table, hash_key(column.name)) is not None:
        _refuse_name(type_, hash_key(column.key))
    if sibling is not None:
        _adopt(sibling, column, table, unique, index)
    else:
        sibling = HashColumn(
            quoted_name(hash_key(column.name), getattr(column.name, "quote", None)),
            type_.hash_type,
            key=hash_key(column.key),
            nullable=True,
            unique=unique or None,
            index=True if index or not unique else None,
            info={SOURCE: column.key, _NAMES: (column.name,)},
        )
        table.append_column(sibling)
    # Where SQLite looks for what a column's own unique=True does on conflict.
    on_conflict = column.dialect_options["sqlite"]["on_conflict_unique"]
    if on_conflict is not None:
        sibling.dialect_options["sqlite"]["on_conflict_unique"] = on_conflict


def _called(table: Table, key: str, name: str) -> Column[Any] | None:
    """The column of a table that has this key or this name in the database."""
    return next((column for column in table.c if column.key == key or column.name == name), None)


def _spelled_otherwise(table: Table, name: str) -> Column[Any] | None:
    """A column of an application's own whose name is the same one but in PostgreSQL, where case counts."""
    same = (column for column in table.c if column.name.lower() == name.lower() and column.name != name)
    return next((column for column in same if not isinstance(column.type, SearchHash)), None)


def _adopt(
    existing: Column[Any], column: Column[Any], table: Table, unique: bool | None, index: bool | None
) -> None:
    """Take a column that is there already: reflected as plain bytes, or from before ``extend_existing``."""
    type_: Encrypted[Any] = column.type  # type: ignore[assignment]
    ours = existing.info.get(SOURCE) == column.key and INDEX not in existing.info
    if existing.key != hash_key(column.key) or not (ours or _REFLECTED in existing.info):
        _refuse_name(type_, hash_key(column.key))
    existing.__class__, existing.type = HashColumn, type_.hash_type
    existing.info[SOURCE], existing.info[_NAMES] = column.key, (column.name,)
    _index_existing(existing, table, unique)


def _refuse_name(type_: Encrypted[Any], name: str) -> NoReturn:
    raise DeclarationError(
        f"{type_.column_id}: the table has a column {name!r} of its own, whose name is needed for the search hashes. "
        "If it is meant for them, leave it out: it is made with the encrypted column; otherwise give it another name",
        column=type_.column_id,
    )


@event.listens_for(Column, "before_parent_attach")
def _refuse_plain(column: Column[Any], table: Any) -> None:
    """Refuse a plain column in the place of an encrypted one or of its hash column, which it would replace."""
    if not isinstance(table, Table) or not declares_encrypted(table.metadata):
        return
    there = _called(table, column.key, column.name)
    if isinstance(column.type, SearchHash):
        return
    if there is None:
        hashes = (one for one in table.c if isinstance(one.type, SearchHash))
        there = next((one for one in hashes if one.name.lower() == str(column.name).lower()), None)
    if there is None:
        return
    if isinstance(there.type, SearchHash):
        _refuse_name(there.type.source, there.key)
    if isinstance(there.type, Encrypted) and not isinstance(column.type, Encrypted):
        raise DeclarationError(
            f"{there.type.column_id}: the table has this column encrypted already, and a plain one in its place would "
            "write what it is given in the clear; declare it once",
            column=there.type.column_id,
        )


@event.listens_for(Table, "column_reflect")
def _reflected(inspector: Any, table: Table, given: Any) -> None:
    """Keep what is declared of a column that is read from the database, and note of others what may hold hashes."""
    there = next((column for column in table.c if column.name == given["name"]), None)
    if there is not None and isinstance(there.type, Encrypted | SearchHash):
        info = {key: value for key, value in there.info.items() if key != _HAS_HASH}
        given.update(type=there.type, key=there.key, info={**given.get("info", {}), **info})
    elif given["name"].endswith(hash_key("")) and upstream.is_binary(given["type"]):
        # No column tells that it holds hashes.
        given["info"] = {**given.get("info", {}), _REFLECTED: True}


def is_unique(column: Column[Any]) -> bool:
    """Whether a unique constraint or index has the column, alone or with others."""
    table = column.table
    uniques: list[Any] = [each for each in table.constraints if isinstance(each, UniqueConstraint)]
    uniques += [index for index in table.indexes if index.unique]
    return any(column in list(each.columns) for each in uniques)


def _index_existing(existing: Column[Any], table: Table, unique: bool | None) -> None:
    over = [c for c in {*table.constraints, *table.indexes} if list(getattr(c, "columns", ())) == [existing]]
    is_unique = any(isinstance(c, UniqueConstraint) or getattr(c, "unique", False) for c in over)
    if unique and not is_unique:
        table.append_constraint(UniqueConstraint(existing))
    elif not over:
        Index(None, existing)


@event.listens_for(SearchHash, "after_parent_attach")
def _hash_type_attached(type_: SearchHash, column: Any) -> None:
    if isinstance(column, Column):
        event.listen(column, "before_parent_attach", _follow_names)
        event.listen(column, "after_parent_attach", _hash_column_attached)


def _follow_names(column: Column[Any], table: Any) -> None:
    """In a copied table, such as one of versions, the sources may have got the keys of their attributes."""
    keys = {each.name: each.key for each in table.c} if isinstance(table, Table) else {}
    sources = tuple(keys[name] for name in column.info.get(_NAMES, ()) if name in keys)
    if not sources or len(sources) < len(column.info[_NAMES]):
        return
    column.info = {**column.info, SOURCE: sources[0]}
    if INDEX in column.info:
        column.info[INDEX] = column.info[INDEX]._replace(sources=sources)
    else:
        column.key = hash_key(sources[0])


def _hash_column_attached(column: Column[Any], table: Any) -> None:
    # In a copied table the source has a column id of its own.
    index = column.info.get(INDEX)
    if index is not None:
        if isinstance(table, Table) and all(key in table.c for key in index.sources):
            column.type = _indexed_value(table, index).written_type
        return
    source = table.c.get(column.info.get(SOURCE, "")) if isinstance(table, Table) else None
    if source is not None and isinstance(source.type, Encrypted):
        column.type = source.type.hash_type


class HashColumn(Column[Any]):
    """A hash column. Its default and onupdate are those of its sources, whenever those were given to them."""

    inherit_cache = True

    @property
    def default(self) -> Any:
        return self._following("default")

    @default.setter
    def default(self, given: Any) -> None:
        """It has none of its own."""

    @property
    def onupdate(self) -> Any:
        return self._following("onupdate")

    @onupdate.setter
    def onupdate(self, given: Any) -> None:
        """Nor does it have one of those."""

    def _following(self, attribute: str) -> CallableColumnDefault | None:
        table, index = getattr(self, "table", None), self.info.get(INDEX)
        keys: tuple[str, ...] = (self.info.get(SOURCE, ""),) if index is None else index.sources
        if table is None or all(getattr(table.c.get(key), attribute, None) is None for key in keys):
            return None
        if attribute == "onupdate" and len(keys) > 1:
            return None  # refused: see cannot_follow()
        made: dict[Any, CallableColumnDefault] = self.__dict__.setdefault("_byok_follows", {})
        if (attribute, keys) not in made:
            made[attribute, keys] = CallableColumnDefault(_Follow(keys), for_update=attribute == "onupdate")
        return made[attribute, keys]


def cannot_follow(table: Table, attribute: str) -> list[Column[Any]]:
    """The columns whose values would be written in the clear or without their hash, by what a table has by now.

    :param attribute: ``"default"`` of an INSERT, ``"onupdate"`` of an UPDATE.
    """
    found = []
    for column in table.c:
        if isinstance(column.type, Encrypted):
            if _is_sql_default(getattr(column, attribute)):
                found.append(column)
        elif isinstance(column.type, IndexHash) and attribute == "onupdate":
            sources = column.info[INDEX].sources
            if len(sources) > 1 and any(table.c[key].onupdate is not None for key in sources):
                found.append(column)
    return found


class _Follow:
    """A default that takes whatever values the source columns are given, their own defaults included."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys

    def __call__(self, context: Any) -> Any:
        given, keys = upstream.row_parameters(context), self._keys
        return given[keys[0]] if len(keys) == 1 else tuple(given.get(key) for key in keys)


# -- further indexes -------------------------------------------------------------------------------------------------


def add_index(table: Table, index: IndexOf, unique: bool) -> None:
    """Append the hash column of a further index to a table, behind all others.

    :raises DeclarationError: if the index cannot be, or its name is taken.
    """
    indexed = _indexed_value(table, index)
    names = tuple(table.c[key].name for key in index.sources)
    existing = _called(table, hash_key(index.name), hash_key(index.name))
    if existing is None:
        if _spelled_otherwise(table, hash_key(index.name)) is not None:
            _refuse_index_name(indexed, hash_key(index.name))
        existing = HashColumn(
            hash_key(index.name),
            indexed.written_type,
            nullable=True,
            unique=unique or None,
            index=None if unique else True,
            info={SOURCE: index.sources[0], INDEX: index, _NAMES: names},
        )
        table.append_column(existing)
    else:
        _adopt_index(existing, table, index, indexed, unique)
        existing.info[_NAMES] = names
    if existing in cannot_follow(table, "onupdate"):
        raise DeclarationError(
            f"{indexed.column_id}: a hash_index over several columns takes none with onupdate, which would change "
            "one of them without the others",
            column=indexed.column_id,
        )


def _adopt_index(
    existing: Column[Any], table: Table, index: IndexOf, indexed: IndexedValue, unique: bool
) -> None:
    before = existing.info.get(INDEX)
    reflected = before is None and SOURCE not in existing.info and _REFLECTED in existing.info
    if existing.key != hash_key(index.name) or not (reflected or index.same_as(before)):
        _refuse_index_name(indexed, existing.name)
    existing.__class__, existing.type = HashColumn, indexed.written_type
    existing.info[SOURCE], existing.info[INDEX] = index.sources[0], index
    _index_existing(existing, table, unique)


def _refuse_index_name(indexed: IndexedValue, name: str) -> NoReturn:
    raise DeclarationError(
        f"{indexed.column_id}: the table has another column {name!r}, whose name is needed for the hashes of this "
        "hash_index; give it another name=",
        column=indexed.column_id,
    )


def sources_of(hash_column: Column[Any]) -> tuple[str, ...]:
    """The keys of the encrypted columns that a hash column follows."""
    index = hash_column.info.get(INDEX)
    return (hash_column.info[SOURCE],) if index is None else tuple(index.sources)


def indexes_of(table: Table) -> dict[str, IndexOf]:
    """The further indexes of a table, by the keys of their hash columns."""
    return {column.key: column.info[INDEX] for column in table.c if isinstance(column.type, IndexHash)}


def _indexed_value(table: Table, index: IndexOf) -> IndexedValue:
    types = []
    for key in index.sources:
        type_ = table.c[key].type
        if not isinstance(type_, Encrypted):
            raise DeclarationError(
                f"{table.fullname}.{key}: hash_index takes encrypted columns; index a plain one with Index()"
            )
        types.append(type_)
    prefix, dot, _ = (types[0].column_id or "").rpartition(".")
    column_id = f"{prefix}{dot}{index.name}"
    _claim_id(column_id, table, hash_key(index.name), types[0].declared_id)
    return IndexedValue(index.transform, tuple(types), column_id)


def _column_id(column: Column[Any], table: Table) -> str:
    type_: Encrypted[Any] = column.type  # type: ignore[assignment]
    declared = type_.declared_id
    if declared is None and any("." in part for part in (table.schema or "", table.name, column.name)):
        raise DeclarationError(
            f"the encrypted column {column.name!r} of {table.fullname!r} has a dot in its name; give it a column_id"
        )
    column_id = declared or f"{table.fullname}.{column.name}"
    _claim_id(column_id, table, column.key, declared)
    return column_id


def _claim_id(column_id: str, table: Table, key: str, declared: str | None) -> None:
    """Refuse an id that is another column's."""
    ids: dict[str, set[tuple[str, str]]] = table.metadata.info.setdefault(_IDS, {})
    places, mine = ids.setdefault(column_id, set()), (table.fullname, key)
    for place in places - {mine}:
        other = _encrypted_at(place, column_id, table.metadata)
        # Concrete inheritance shares an explicit id between tables; nothing else may.
        if other is None or (place[0] != table.fullname and declared and other.declared_id):
            continue
        raise DeclarationError(
            f"two encrypted columns have the id {column_id!r}: {'.'.join(place)} and {'.'.join(mine)}; their values "
            "could be swapped unnoticed. Give one of them another column_id",
            column=column_id,
        )
    places.add(mine)


def _encrypted_at(place: tuple[str, str], column_id: str, metadata: MetaData) -> Encrypted[Any] | None:
    """The type of an encrypted column that was declared with this id; None where it is gone."""
    table = metadata.tables.get(place[0])
    column = None if table is None else table.c.get(place[1])
    type_ = None if column is None else column.type
    if isinstance(type_, IndexHash):
        type_ = type_.source
    return type_ if isinstance(type_, Encrypted) and type_.column_id == column_id else None


def _refuse_impossible(column: Column[Any]) -> None:
    type_: Encrypted[Any] = column.type  # type: ignore[assignment]
    reasons = {
        "a primary key": column.primary_key,
        "a foreign key": bool(column.foreign_keys),
        "a computed or identity column": column.computed is not None or column.identity is not None,
        "server_default": column.server_default is not None,
        "server_onupdate": column.server_onupdate is not None,
        "a default that is a SQL expression": _is_sql_default(column.default),
        "an onupdate that is a SQL expression": _is_sql_default(column.onupdate),
        "unique=True without searchable=True": bool(column.unique) and not type_.searchable,
        "index=True without searchable=True": bool(column.index) and not type_.searchable,
    }
    for reason, given in reasons.items():
        if given:
            raise DeclarationError(
                f"{type_.column_id}: an encrypted column cannot be declared with {reason}: {_WHY}",
                column=type_.column_id,
            )


@compiles(Encrypted)
def _rendered_in_ddl(type_: Encrypted[Any], compiler: Any, **kwargs: Any) -> Any:
    """The type in CREATE TABLE: a last look at the column, which may have been changed since it was declared."""
    column = kwargs.get("type_expression")
    if isinstance(column, Column) and column.type is type_:
        _refuse_impossible(column)
    return compiler.visit_type_decorator(type_, **kwargs)


@compiles(SearchHash)
def _hash_rendered_in_ddl(type_: SearchHash, compiler: Any, **kwargs: Any) -> Any:
    column = kwargs.get("type_expression")
    if isinstance(column, Column) and column.type is type_:
        if column.server_default is not None:
            raise DeclarationError(
                f"{type_.column_id}: its hash column takes no server_default: {_WHY}", column=type_.column_id
            )
        _refuse_long_name(column, type_, compiler.dialect.name)
    return compiler.visit_type_decorator(type_, **kwargs)


def _refuse_long_name(column: Column[Any], type_: SearchHash, database: str) -> None:
    """Refuse a hash column whose name its database does not take, or takes for another column's."""
    others = {other.name.encode()[:63] for other in column.table.c if other is not column}
    too_long = {
        "postgresql": column.name.encode()[:63] in others,  # it cuts names off
        "mysql": len(column.name) > 64,
        "mariadb": len(column.name) > 64,
    }
    if too_long.get(database):
        raise DeclarationError(
            f"{type_.column_id}: the name of its hash column, {column.name!r}, is too long for {database}; give the "
            "column a shorter name (and its old one as column_id)",
            column=type_.column_id,
        )


def _is_sql_default(default: Any) -> bool:
    return default is not None and (default.is_clause_element or default.is_sequence)


# -- constraints and indexes -----------------------------------------------------------------------------------------


@event.listens_for(ColumnCollectionConstraint, "before_parent_attach")
@event.listens_for(Index, "before_parent_attach")
def _move_columns(constraint: Any, table: Any) -> None:
    """Point a unique constraint or index that names an encrypted column at its hash column; refuse any other."""
    if not isinstance(table, Table) or isinstance(constraint, CheckConstraint):
        return
    pending = upstream.pending_columns(constraint)
    for position, given in enumerate(pending):
        column = table.c.get(given) if isinstance(given, str) else given
        if column is None or not isinstance(column.type, Encrypted):
            continue
        if not isinstance(constraint, UniqueConstraint | Index) or not column.type.searchable:
            _refuse_constraint(constraint, column)
        if hash_key(column.key) not in table.c:
            # A constraint over column objects is attached with the last of them, and may come before our listener.
            _after_table(column, table)
        sibling = table.c[hash_key(column.key)]
        if isinstance(constraint, Index):
            if constraint.expressions[position] is not given or _is_narrowed(constraint, column):
                _refuse_constraint(constraint, column)
            constraint.expressions[position] = sibling  # type: ignore[index]
        pending[position] = sibling


@event.listens_for(Index, "after_parent_attach")
def _give_way(index: Index, table: Any) -> None:
    """Take the index of a hash column away where another index that begins with the column gets its name.

    SQLAlchemy names an index that was given no name after its first column. That one serves the searches as well.
    """
    if not isinstance(table, Table) or index.name is None:
        return
    for other in [one for one in table.indexes if one is not index and one.name == index.name]:
        made = next((one for one in (other, index) if _is_automatic(one)), None)
        if made is None:
            continue
        given = index if made is other else other
        # What is reflected has options that say nothing.
        if any(isinstance(value, ClauseElement) or value for value in given.dialect_kwargs.values()):
            type_: Any = next(iter(made.columns)).type
            raise DeclarationError(
                f"{type_.column_id}: an index without a name of its own gets that of the column's search hashes, "
                f"{made.name!r}; give it one",
                column=type_.column_id,
            )
        table.indexes.discard(made)


def _is_automatic(index: Index) -> bool:
    columns = list(index.columns)
    return len(columns) == 1 and isinstance(columns[0].type, SearchHash) and not index.unique


def _is_narrowed(index: Index, column: Column[Any]) -> bool:
    """Whether a dialect's option says what the index makes of the column: of text, which its hash is not."""
    given = index.dialect_kwargs
    return any(
        value and (not isinstance(value, Mapping) or not {column.name, column.key}.isdisjoint(value))
        for option, value in given.items()
        if option.endswith(("_ops", "_length", "_prefix"))
    )


@event.listens_for(ColumnCollectionConstraint, "after_parent_attach")
@event.listens_for(Index, "after_parent_attach")
@event.listens_for(FetchedValue, "after_parent_attach")
@event.listens_for(ColumnDefault, "after_parent_attach")
def _item_attached(item: Any, parent: Any) -> None:
    # It may come before the columns that it names: see _after_table.
    if isinstance(parent, Table):
        _refuse_item(item, parent)
    elif isinstance(getattr(parent, "table", None), Table):
        _refuse_item(item, parent.table)
    else:
        event.listen(parent, "after_parent_attach", lambda _, table: _refuse_item(item, table))


def _refuse_item(item: Any, table: Any) -> None:
    if isinstance(table, Table):
        for expression in _expressions(item):
            _refuse_named(item, expression, table)


def _refuse_named(item: Any, expression: Any, table: Table) -> None:
    for column in _named_in(expression, table, isinstance(item, Index)):
        _refuse_constraint(item, column)


def _evaluated(table: Table) -> Iterator[tuple[Any, Any]]:
    """Whatever of a table the database evaluates, with its SQL expressions."""
    items: list[Any] = [*table.constraints, *table.indexes]
    for column in table.c:
        given = (column.server_default, column.server_onupdate, column.default, column.onupdate)
        items += [*column.constraints, *(one for one in given if one is not None)]
    yield from ((item, expression) for item in items for expression in _expressions(item))
    for option, value in table.dialect_kwargs.items():
        if option.endswith("partition_by") and value is not None:
            yield _PartitionKey(), text(value) if isinstance(value, str) else value


class _PartitionKey:
    """Stands for the key by which a table is parted."""


def _expressions(item: Any) -> Iterator[Any]:
    """The SQL expressions of a constraint, an index, a computed column or a default."""
    if isinstance(item, Index):
        yield from item.expressions
        for option, value in item.dialect_kwargs.items():
            if option.endswith("_where") and value is not None:
                yield text(value) if isinstance(value, str) else value
    elif isinstance(item, CheckConstraint | Computed):
        yield item.sqltext
    elif isinstance(item, ColumnCollectionConstraint):
        yield from upstream.excluded(item)
    else:
        given = getattr(item, "arg", None)  # of a default; a plain string is a value
        if isinstance(given, ClauseElement):
            yield given


# A name, quoted or not, perhaps with its table's; what is tested for NULL is not looked at.
_NAME = r"""(?:"[^"]+"|`[^`]+`|\[[^\]]+\]|\w+)"""
_NULL_TEST = re.compile(rf"(?:{_NAME}\s*\.\s*)*{_NAME}\s+is\s+(?:not\s+)?null\b", re.IGNORECASE)


def _named_in(expression: Any, table: Table, of_index: bool) -> list[Column[Any]]:
    """The encrypted columns that a SQL expression names, as objects or in its text, other than to test for NULL.

    A name before a parenthesis is a function's; but for an index, where MySQL has a length there.
    """
    behind = r"(?!\w)" if of_index else r"(?!\w|\s*\()"
    words, found = [], []
    for element in _parts(expression):
        other = getattr(element, "table", None)
        if isinstance(element, Column) and isinstance(element.type, Encrypted):
            found.append(element)
        elif isinstance(element, ColumnClause) and (other is None or other.description == table.description):
            words.append(element.name)
        elif (given := upstream.text_of(element)) is not None:
            words.append(_NULL_TEST.sub(" ", re.sub(r"'[^']*'", "''", given)))
    spoken = " ; ".join(words).lower()
    return found + [
        column
        for column in table.c
        if isinstance(column.type, Encrypted)
        and re.search(rf"(?<!\w)(?<!::){re.escape(column.name.lower())}{behind}", spoken)
    ]


def _parts(expression: Any) -> Iterator[Any]:
    """The parts of a SQL expression, but for what is tested for NULL."""
    if hasattr(expression, "__clause_element__"):
        expression = expression.__clause_element__()
    if isinstance(expression, BinaryExpression) and isinstance(expression.right, Null):
        return
    yield expression
    for child in expression.get_children():
        yield from _parts(child)


@event.listens_for(Table, "after_parent_attach")
def _refuse_references(table: Table, metadata: MetaData) -> None:
    """Refuse a foreign key to an encrypted column, whichever of the two tables is declared first."""
    keys = set(table.foreign_keys)
    if any(isinstance(column.type, Encrypted) for column in table.c):
        keys.update(key for other in metadata.tables.values() for key in other.foreign_keys)
    for key in keys:
        try:
            target = key.column
        except NoReferenceError:
            continue  # its table is yet to come
        if isinstance(target.type, Encrypted):
            _refuse_constraint(key, target)


def _refuse_constraint(constraint: Any, column: Column[Any]) -> None:
    type_: Encrypted[Any] = column.type  # type: ignore[assignment]
    raise DeclarationError(
        f"{type_.column_id}: {type(constraint).__name__.lstrip('_')} cannot hold on an encrypted column: {_WHY}. "
        "Unique constraints and plain indexes work with searchable=True, and any may test it for NULL",
        column=type_.column_id,
    )


# -- the mapping -----------------------------------------------------------------------------------------------------


@event.listens_for(Mapper, "instrument_class")
def _leave_out_hash_columns(mapper: Mapper[Any], cls: type[Any]) -> None:
    """Map no hash column, unless the class names it: who walks over the attributes sees what the class declares.

    Where the entity is selected within another statement its hash columns are rendered, so that it can be searched
    there.
    """
    hashes = {column for column in mapper.persist_selectable.c if isinstance(column.type, SearchHash)}
    if hashes:
        # As columns, not by name: an attribute of the application's own may have the name.
        mapper.exclude_properties = {*(mapper.exclude_properties or ()), *hashes}
        for each in mapper.iterate_to_root():
            upstream.show_in_subqueries(each, _hashes_of)


def _hashes_of(mapper: Mapper[Any]) -> list[Any]:
    """The hash columns of the mapped attributes of a class that are not mapped themselves."""
    known = upstream.properties_of(mapper)
    return [
        column
        for column in mapper.persist_selectable.c
        if isinstance(column.type, SearchHash)
        and column not in known
        and _source_of(column, mapper.persist_selectable) in known
    ]


def _source_of(column: Any, selectable: Any) -> Any:
    """The encrypted column in the same table, join or subquery that a hash column follows; None where it is not."""
    bases = [base for base in column.base_columns if isinstance(base, Column)]
    sources = {base.table.c.get(base.info.get(SOURCE, "")) for base in bases}
    return next((c for c in selectable.c if not c.base_columns.isdisjoint(sources)), None)
