"""The column that says whose a row is: ``__byok_tenant__``, checked before each write.

A flush is checked twice: an object against the tenant before its statement is made, which also sees whose the object
was; and each statement, whoever made it. An UPDATE or DELETE is held to the tenant's own rows, since what its WHERE
finds cannot be known beforehand; so is what an upsert does on conflict. What stands within another statement, in a CTE
or elsewhere, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn
from uuid import UUID
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import (
    CHAR,
    NCHAR,
    Alias,
    Boolean,
    Column,
    Join,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    Uuid,
    event,
    inspect,
    literal,
    literal_column,
    or_,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.exc import UnmappedColumnError
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, ClauseElement, ColumnClause, Null
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import TableClause
from sqlalchemy.sql.visitors import iterate, replacement_traverse

from sqla_byok.errors import DeclarationError, NoTenantError, TenantMismatchError, UnsupportedQueryError
from sqla_byok.orm import upstream
from sqla_byok.orm.constructs import is_own
from sqla_byok.orm.current import attachment_of
from sqla_byok.orm.namesakes import Naming, Stored, is_rendered, refuse_rendered
from sqla_byok.orm.rings import SEALED, Across
from sqla_byok.orm.schema import declares_encrypted
from sqla_byok.orm.turns import Whose, shown, whose
from sqla_byok.orm.types import Encrypted
from sqla_byok.orm.upstream import Item
from sqla_byok.orm.writes import set_on_conflict

__all__ = [
    "TENANT_COLUMN",
    "TENANT_INFO",
    "Database",
    "Digits",
    "TenantRows",
    "check",
    "check_compiled",
    "check_defaults",
    "exactly",
    "hold_conflicts",
    "python_type",
    "refuse_compiled",
    "rows_of",
    "tenant_key",
    "used",
]

TENANT_COLUMN = "byok_tenant"
"""The key in a table's ``info`` that names its tenant's column, where no mapped class does by ``__byok_tenant__``."""

used: dict[str, WeakSet[Table]] = {}
"""The tables whose rows belong to tenants, by name; empty for most applications, which then pay nothing."""

_HEIR = "byok_tenant_inherited"  # in the info of the table of a subclass, which copies of it carry along
TENANT_INFO = (TENANT_COLUMN, _HEIR)
_columns: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of a Table
# Of the table of a subclass in joined inheritance: its mapper, which leads to the table with the column.
_heirs: WeakKeyDictionary[Any, ref[Mapper[Any]]] = WeakKeyDictionary()
_NAMES = (str, int, UUID)


# -- declaring it ----------------------------------------------------------------------------------------------------


@event.listens_for(Table, "after_parent_attach")
def _table_declared(table: Table, metadata: Any) -> None:
    info: Any = table.info  # SQLAlchemy takes anything there
    key = info.get(TENANT_COLUMN) if isinstance(info, Mapping) else None
    if key is not None:
        _declare(table, table.c.get(key), f"info[{TENANT_COLUMN!r}]", key)


@event.listens_for(Mapper, "after_mapper_constructed")
def _class_mapped(mapper: Mapper[Any], cls: type[Any]) -> None:
    name = getattr(cls, "__byok_tenant__", None)
    if name is not None:
        column = mapper.columns.get(name)
        table = mapper.local_table if column is None else column.table
        _declare(table, column, f"{cls.__name__}.__byok_tenant__", name)
    if any(_key_of(table) is not None for table in mapper.tables):
        if mapper.inherit_condition is not None and _key_of(mapper.local_table) is None:
            _inherits(mapper)
        for when in ("before_insert", "before_update", "before_delete"):
            event.listen(cls, when, _check_object)


def _inherits(mapper: Mapper[Any]) -> None:
    table: Any = mapper.local_table
    if isinstance(table, Table):
        _heirs[table] = ref(mapper)
        _use(table)
        table.info[_HEIR] = True


def _use(table: Table) -> None:
    refuse_rendered(table)
    if not used:
        upstream.before_synchronizing(_hold_objects)
    used.setdefault(str.lower(table.name), WeakSet()).add(table)


def _declare(table: Any, column: Any, where: str, name: str) -> None:
    if not isinstance(table, Table) or not isinstance(column, Column):
        raise DeclarationError(f"{where}: {getattr(table, 'description', 'it')} has no column {name!r}")
    if _set_by_database(column):
        raise DeclarationError(
            f"{where}: what the database sets {name!r} to cannot be checked; set it in Python"
        )
    if python_type(column.type) not in _NAMES or isinstance(column.type, Encrypted):
        raise DeclarationError(f"{where}: {name!r} has to be a string, an integer or a UUID")
    if column.type.bind_expression(literal("")) is not None:
        raise DeclarationError(
            f"{where}: what bind_expression() makes of {name!r} is known to the database only; convert it in Python"
        )
    _use(table)
    _columns[table] = column.key
    table.info[TENANT_COLUMN] = column.key  # copies of the table carry it along


def _set_by_database(column: Column[Any]) -> bool:
    of_database = (column.server_default, column.server_onupdate, column.computed, column.identity)
    of_python = (column.default, column.onupdate)
    return any(one is not None for one in of_database) or any(
        one is not None and (one.is_clause_element or one.is_sequence) for one in of_python
    )


def _key_of(table: Any) -> str | None:
    """The key of a table's tenant column."""
    key = _columns.get(table)
    if (
        key is None and isinstance(table, Table) and TENANT_COLUMN in table.info
    ):  # a copy: it gets its info late
        _table_declared(table, table.metadata)
        key = _columns.get(table)
    return key


def tenant_key(table: Table) -> str | None:
    """The key of the column that says whose a row of the table is; None where it has none of its own."""
    return _key_of(table)


def python_type(type_: Any) -> type[Any] | None:
    """The Python type of a column's values; None where its type does not say."""
    try:
        found: type[Any] = type_.python_type
    except NotImplementedError:
        return None
    return found


# -- objects ---------------------------------------------------------------------------------------------------------


def _check_object(mapper: Mapper[Any], connection: Any, target: Any) -> None:
    blocks = attachment_of(connection.dialect).blocks
    if blocks is None:
        return
    tenant = whose(connection.get_execution_options(), connection, blocks)
    for table in mapper.tables:
        key = _key_of(table)
        if key is None:
            continue
        names, attribute = _allowed(table, tenant), _attribute(mapper, table.c[key])
        if attribute is None:
            continue  # the statement is held to the tenant's rows
        history = inspect(target).attrs[attribute].load_history()
        # What it was is checked too: an object is not taken over by renaming its owner.
        for value in (*history.added, *history.unchanged, *history.deleted):
            if names is not None and (value is not None or inspect(target).persistent):
                _check_value(table.c[key], value, names)


def _attribute(mapper: Mapper[Any], column: Any) -> str | None:
    """The attribute of a tenant's column; None where a class does not map it."""
    try:
        return mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        return None


def _hold_objects(
    session: Any, statement: Any, entity: Any, options: Mapping[str, Any], binds: Mapping[str, Any]
) -> Any:
    """Hold an UPDATE or DELETE of the ORM's before it is executed, so that it changes no other tenant's objects."""
    mapper: Mapper[Any] = entity.mapper
    tables = (each for each in mapper.tables if isinstance(each, Table))
    if not any(str.lower(each.name) in used or is_rendered(each.name) for each in tables):
        return statement
    arguments = {**binds, "mapper": mapper, "clause": statement}
    blocks = attachment_of(session.get_bind(**arguments).dialect).blocks
    if blocks is None:
        return statement
    connection = session.connection(bind_arguments=arguments)
    merged = {**statement.get_execution_options(), **connection.get_execution_options(), **options}
    tenant = whose(merged, connection, blocks)
    if tenant is None:
        return statement  # it is refused when it is executed
    dml, database = (
        upstream.inside(statement),
        Database(connection.dialect, merged.get("schema_translate_map")),
    )
    for target in _written(dml, database):
        names = _names(target, tenant)
        if names is not None:
            dml = upstream.with_criterion(dml, _evaluated(session, entity, target, names))
    return upstream.instead(statement, dml)


# -- statements ------------------------------------------------------------------------------------------------------


class Database(NamedTuple):
    """Where a statement is executed.

    :param translated: its ``schema_translate_map``, if it has one.
    :param compiled: the statement itself, where it is only known as it was compiled.
    """

    dialect: Any
    translated: Mapping[str | None, str | None] | None = None
    compiled: Any = None

    @property
    def naming(self) -> Naming:
        """Which names are one in it."""
        if self.compiled is not None:
            return Naming.of_compiled(self.compiled)
        return Naming.of(self.dialect, self.translated)


class _Target(NamedTuple):
    """What a statement writes to, where its rows belong to tenants.

    :param table: the table, an alias of it, or another object of its name.
    :param known: the table that was declared under the name.
    :param column: the tenant's, in the table; in joined inheritance in the declared one; None where nobody knows.
    :param declared: the table that was declared with it.
    :param joins: what leads to the declared table from that of a subclass.
    """

    table: Any
    known: Table
    column: Any
    declared: Table
    dialect: Any
    joins: tuple[Any, ...] = ()

    @property
    def inherits(self) -> bool:
        """Whether its rows are whose the rows of another table are."""
        return bool(self.joins) or self.column is None

    @property
    def type(self) -> Any:
        """How a tenant's name is stored."""
        return self.declared.c[_columns[self.declared]].type


def check(clause: Any, rows: Sequence[Mapping[str, Any]], tenant: Whose | None, database: Database) -> Any:
    """Check what an INSERT, UPDATE or DELETE sets a tenant's column to, and hold it to the tenant's rows.

    :param clause: the statement.
    :param rows: its parameters.
    :returns: the statement to run instead; None where any row may be written.
    :raises TenantMismatchError: if it sets the column to another tenant's name.
    :raises NoTenantError: if there is no tenant.
    :raises UnsupportedQueryError: if what it sets the column to cannot be known.
    """
    targets = [(target, _names(target, tenant)) for target in _written(clause, database)]
    held = [(target, names) for target, names in targets if names is not None]
    if not held:
        return None
    given = [] if clause.is_delete else list(_given(clause, rows))
    if not clause.is_insert:
        clause = upstream.without_evaluated(clause)
    for target, names in held:
        if not clause.is_delete and not target.inherits:
            _check_given(clause, target, _own(clause, target, given), names)
            _check_conflicts(clause, target, rows, names)
        if not clause.is_insert:
            clause = upstream.with_criterion(clause, _held(target, names))
    return clause


def hold_conflicts(clause: Any, tenant: Whose | None, database: Database) -> Any:
    """Hold what an upsert does on conflict to the tenant's rows.

    :param clause: an INSERT that was checked, and is complete otherwise.
    """
    conflicts = upstream.conflicts(clause)
    if not conflicts:
        return clause
    for target in _written(clause, database):
        names = _names(target, tenant)
        if names is not None:
            if target.inherits:  # what an INSERT has within sees nothing of the row that is there
                if any(upstream.conflict_values(each) for each in conflicts):
                    _refuse_upsert(target)
                continue
            held = _held(target, names)
            same = partial(_same, target)
            conflicts = [upstream.held_to(each, target.column, held, same) for each in conflicts]
            return upstream.with_conflicts(clause, conflicts)
    return clause


def _refuse_upsert(target: _Target) -> NoReturn:
    raise UnsupportedQueryError(
        f"{target.table.description}: its rows belong to tenants by {target.declared.fullname}, and an upsert cannot "
        "be held to one of them; look the row up, then update or insert it"
    )


def refuse_compiled(compiled: Any, tenant: Whose | None) -> None:
    """Refuse a statement that was compiled beforehand: it can be held to nothing any more."""
    statement = upstream.inside(getattr(compiled, "statement", None))
    if not getattr(statement, "is_dml", False):
        return
    for target in _written(statement, Database(compiled.dialect, compiled=compiled)):
        if _allowed(target.declared, tenant) is not None:
            raise UnsupportedQueryError(
                f"{target.declared.fullname}: its rows belong to tenants, and a statement compiled beforehand cannot "
                "be held to one of them; execute the statement itself"
            )


def _held(target: _Target, names: Mapping[str, Any]) -> Any:
    """True of the tenants' own rows."""
    if target.column is None:
        raise UnsupportedQueryError(
            f"{target.known.fullname}: it is a copy of a subclass's table, and whose its rows are cannot be found from "
            "it; use the table of the class itself"
        )
    values = (literal(value, target.type) for value in names.values())
    own = or_(*(_same(target, target.column, value) for value in values))
    if not target.joins:
        return own
    return select(literal_column("1")).where(*target.joins, own).correlate(target.table).exists()


def _evaluated(session: Any, entity: Any, target: _Target, names: Mapping[str, Any]) -> Any:
    """The same, which the ORM can evaluate, where it knows the tenant of each object in the session.

    It would take an object whose tenant is not loaded for one of them, and else it fetches which rows they are.
    """
    held, mapper = _held(target, names), entity.mapper
    key = _attribute(mapper, target.column)
    if key is None:
        return upstream.Evaluated(held, held)
    for state in session.identity_map.all_states():
        if key not in state.dict and not state.expired and state.mapper.isa(mapper):
            return upstream.Evaluated(held, held)
    attribute = getattr(entity.entity, key)
    return upstream.Evaluated(or_(*(attribute == value for value in names.values())), held)


def _same(target: _Target, column: Any, value: Any) -> Any:
    """True where a column has this value."""
    return exactly(column, value) if _kind(target.type) is str else column == value


def exactly(column: Any, value: Any) -> Exactly:
    """True where a column of texts has this value, and not one that its collation takes for equal."""
    return Exactly(column, value, operators.eq, type_=Boolean())


class Exactly(BinaryExpression[Any]):
    """``column = value``, and not a value that the column's collation takes for equal.

    The plain comparison is there for an index on the column.
    """

    inherit_cache = True


@compiles(Exactly)
def _compile_exactly(element: Exactly, compiler: Any, **kwargs: Any) -> str:
    column, value = (compiler.process(side, **kwargs) for side in (element.left, element.right))
    left, right = _EXACTLY.get(compiler.dialect.name, ("{}", "{}"))
    return f"({column} = {value} AND {left.format(column)} = {right.format(value)})"


# In one character set and as bytes, since even MySQL's binary collations take what is filled up with spaces for equal.
_BYTES = "CAST(CAST({} AS CHAR CHARACTER SET utf8mb4) AS BINARY)"
_EXACTLY = {
    "sqlite": ("{} COLLATE BINARY", "{}"),
    "postgresql": ('CAST({} AS TEXT) COLLATE "C"', "CAST({} AS TEXT)"),
    "mysql": (_BYTES, _BYTES),
    "mariadb": (_BYTES, _BYTES),
}


class Digits(FunctionElement[Any]):
    """A text as hexadecimal digits, which no collation takes for others."""

    inherit_cache = True
    type = String()


@compiles(Digits)
def _compile_digits(element: Digits, compiler: Any, **kwargs: Any) -> str:
    template = _DIGITS.get(compiler.dialect.name, "HEX({})")
    return template.format(compiler.process(element.clauses, **kwargs))


_DIGITS = {
    "postgresql": "encode(convert_to(CAST({} AS TEXT), 'UTF8'), 'hex')",
    "mysql": "HEX(CAST({} AS CHAR CHARACTER SET utf8mb4))",
    "mariadb": "HEX(CAST({} AS CHAR CHARACTER SET utf8mb4))",
}


def _written(clause: Any, database: Database) -> Iterator[_Target]:
    """What a statement writes to; MySQL's UPDATE of several tables sets columns of any of them."""
    table, one_of_several = upstream.target(clause)
    tables = list(_tables(table))
    if clause.is_update and not one_of_several:
        for other in (getattr(key, "table", None) for key, _ in upstream.values(clause)):
            if other is not None and other not in tables:
                tables.append(other)
    for one in tables:
        target = _target(one, database)
        if target is not None:
            yield target


def _tables(table: Any) -> Iterator[Any]:
    if isinstance(table, Join):
        yield from _tables(table.left)
        yield from _tables(table.right)
    else:
        yield table


def _target(table: Any, database: Database) -> _Target | None:
    inner = table
    while isinstance(inner, Alias):
        inner = inner.element
    if not isinstance(inner, TableClause):
        return None
    key = _key_of(inner)
    if key is not None:
        declared = upstream.plain_table(inner)  # type: ignore[arg-type]  # a Table
        return _Target(table, declared, table.c[key], declared, database.dialect)
    known = _known_as(inner, database)
    if known is None:
        return None
    if known not in _columns:
        return _inherited(table, known, database)
    column = _column(table, known.c[_columns[known]].name, database)
    return _Target(table, known, column, known, database.dialect)


def _column(table: Any, name: str, database: Database) -> Any:
    """A table's column by the name that it has in the database; table() need not have been given it."""
    naming = database.naming
    found = [column for column in table.c if naming.column_of(column) == naming.column(name)]
    if len(found) > 1:
        raise UnsupportedQueryError(
            f"{table.description}: it has {name!r} twice, by names that are one to the database; give it once"
        )
    if not found:
        found = [ColumnClause(name)]
        found[0].table = table
    return found[0]


def _inherited(table: Any, known: Table, database: Database) -> _Target:
    """The table of a subclass in joined inheritance, or what stands for it: a row is whose the row is that it joins."""

    def its_own(element: Any, **_: Any) -> Any:
        of = getattr(element, "table", None)
        if isinstance(of, Table) and upstream.plain_table(of) is known:
            return _column(table, element.name, database)
        return None

    joins: list[Any] = []
    found = _heirs.get(known)
    above = None if found is None else found()
    while above is not None:
        key = _key_of(above.local_table)
        if key is not None:
            declared: Any = above.local_table
            return _Target(table, known, declared.c[key], declared, database.dialect, tuple(joins))
        if above.inherit_condition is not None:
            joins.append(replacement_traverse(above.inherit_condition, {}, its_own))
        above = above.inherits
    return _Target(table, known, None, known, database.dialect)


def _known_as(table: Any, database: Database) -> Table | None:
    """The declared table of which another object has the name: table(), or a Table that was reflected.

    A Table among others with encrypted or tenants' columns is a model of its own, and taken at its word; but not one
    among those of the model itself, nor a copy of a subclass's table.
    """
    if isinstance(table, Stored):
        return None
    if table in _heirs:
        return upstream.plain_table(table)
    inherits = isinstance(table, Table) and _HEIR in table.info
    if str.lower(table.name) not in used and not is_rendered(table.name):
        return table if inherits else None
    found = database.naming.known(used, table.name, table.schema)
    if isinstance(table, Table) and not inherits and _is_model(table):
        found = [one for one in found if one.metadata is table.metadata]
    return found[0] if found else table if inherits else None


def _is_model(table: Table) -> bool:
    return declares_encrypted(table.metadata) or any(
        one.metadata is table.metadata for one in tuple(_columns)
    )


def _given(clause: Any, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Item]]:
    """What is said of each row that a statement sets, whichever way: of a column also twice, as by values() and as a
    parameter. Which of them is sent is SQLAlchemy's to say, so none may be another tenant's."""
    groups = upstream.multi_values(clause)
    # Rows of positional values are refused where hashes are filled; here they stand for their columns.
    given = [
        list(row.items() if isinstance(row, dict) else zip(clause.table.c.keys(), row, strict=False))
        for group in groups
        for row in group
    ]
    given = given if groups else [upstream.values(clause)]
    for row in rows or ({},):
        for items in given:
            yield [*[(key, _sent(value, row)) for key, value in items], *row.items()]


def _sent(value: Any, row: Mapping[str, Any]) -> Any:
    """A value, or what the row of parameters has under its name."""
    if not isinstance(value, BindParameter) or value.key not in row:
        return value
    given = row[value.key]
    return BindParameter(None, given, type_=value.type, unique=True) if _is_own_type(value.type) else given


def _own(clause: Any, target: _Target, given: Sequence[Sequence[Item]]) -> list[list[Any]]:
    """What the rows set a table's tenant to, of each row all that is said.

    SQLAlchemy goes by a key's name, unless an UPDATE has its table in its FROM.
    """
    others: set[Any] = set()
    if clause.is_update and clause.whereclause is not None:
        elements = [*iterate(clause.table), *iterate(clause.whereclause)]
        others = {getattr(element, "table", element) for element in elements} - {target.table, None}
    named = target.column.key
    return [
        [
            value
            for key, value in row
            if (key if isinstance(key, str) else getattr(key, "key", key)) == named
            and getattr(key, "table", None) not in others
        ]
        for row in given
    ]


def _check_given(
    clause: Any, target: _Target, given: Sequence[Sequence[Any]], names: Collection[str]
) -> None:
    column = target.column
    if column.type is not target.type:  # of another object of the table's name
        _check_type(target, column.type, names)
    default = getattr(column, "default" if clause.is_insert else "onupdate", None)
    if column.key in upstream.select_names(clause):
        _unknown(column, "INSERT FROM SELECT sets it to")
    for values in given:
        for value in values:
            _check_value(column, _plain(target, value, names), names)
        if values:
            continue
        if default is not None and (default.is_clause_element or default.is_sequence):
            _unknown(column, "its default or onupdate sets it to")  # of another object of the table's name
        elif clause.is_insert and default is None:
            _check_value(column, None, names)


def _check_conflicts(
    clause: Any, target: _Target, rows: Sequence[Mapping[str, Any]], names: Collection[str]
) -> None:
    """Check what an upsert sets the tenant's column to on conflict."""
    column = target.column
    for conflict in upstream.conflicts(clause):
        for key, value in upstream.conflict_values(conflict):
            if set_on_conflict(target.table, key).key != column.key or _is_column(value, column.name):
                continue
            for row in rows or ({},):
                _check_value(column, _plain(target, _sent(value, row), names), names)


def _is_column(value: Any, name: str) -> bool:
    """Whether a value is a column of this name: the row's own, or excluded's."""
    return isinstance(value, ColumnClause) and value.name == name and not (value.is_literal or is_own(value))


def _plain(target: _Target, value: Any, names: Collection[str]) -> Any:
    """The Python value that a tenant's column is set to."""
    column = target.column
    if isinstance(value, BindParameter):
        if value.callable is not None:
            _unknown(column, "a function gives as a parameter is called once more when it is sent, and what")
        _check_type(target, value.type, names)
        return value.effective_value
    if isinstance(value, Null):
        return None
    if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
        _unknown(column, "it is set to")
    return value


def _unknown(column: Any, what: str) -> NoReturn:
    raise UnsupportedQueryError(
        f"{column}: it names the row's tenant, and what {what} is known to the database only; give the value by name"
    )


# -- compiled statements ---------------------------------------------------------------------------------------------


class TenantRows(NamedTuple):
    """What a compiled statement does with rows that belong to tenants, so far as it is known only of it.

    :param within: the tables that a statement within it writes to, which cannot be held to a tenant.
    :param replaces: the tables of which it may delete rows without saying so.
    :param defaults: whether a Python-side default or onupdate gives the tenant of its rows.
    """

    within: tuple[str, ...]
    replaces: tuple[str, ...]
    defaults: bool


def rows_of(compiled: Any) -> TenantRows | None:
    """What a compiled statement does with tenants' rows; None where there is nothing to look at."""
    if not used or not hasattr(compiled, "isinsert"):
        return None
    top = upstream.inside(compiled.statement)
    database = Database(compiled.dialect, compiled=compiled)
    within = {
        target.declared.fullname: None
        for dml in upstream.dml_within(compiled)
        for target in _written(dml, database)
    }
    replaces: list[str] = []
    if getattr(top, "is_dml", False) and not top.is_delete:
        dialect = compiled.dialect.name
        told = any(map(_REPLACE.search, upstream.prefixes(top, dialect))) or _REPLACE.match(compiled.string)
        replaces = [
            target.declared.fullname
            for target in _written(top, database)
            if told or (dialect == "sqlite" and _replaces(target))
        ]
    defaults = bool(_defaults(compiled, database))
    return TenantRows(tuple(within), tuple(replaces), defaults) if within or replaces or defaults else None


def check_compiled(rows: TenantRows, tenant: Whose | None) -> None:
    """Refuse what a compiled statement cannot be held to.

    :raises NoTenantError: there is no tenant.
    :raises UnsupportedQueryError: it cannot be held to the tenant's rows.
    """
    for name in rows.within:
        if _allowed(name, tenant) is not None:
            raise UnsupportedQueryError(
                f"{name}: its rows belong to tenants, and an INSERT, UPDATE or DELETE within another statement cannot "
                "be held to one of them; run it as a statement of its own"
            )
    for name in rows.replaces:
        if _allowed(name, tenant) is not None:
            raise UnsupportedQueryError(
                f"{name}: its rows belong to tenants, and REPLACE would delete another tenant's row that has the same "
                "key; use on_conflict_do_update(), which leaves such a row alone"
            )


_REPLACE = re.compile(r"\breplace\b", re.IGNORECASE)


def _replaces(target: _Target) -> bool:
    """Whether SQLite deletes a row, perhaps another tenant's, that has the key of one that is written."""
    table, key = target.known, _columns.get(target.known)
    options = [
        (constraint.dialect_options["sqlite"].get("on_conflict"), constraint.columns.keys())
        for constraint in table.constraints
        if isinstance(constraint, UniqueConstraint | PrimaryKeyConstraint)
    ]
    for column in table.c:
        of_column = column.dialect_options["sqlite"]
        options += [
            (of_column.get(f"on_conflict_{kind}"), [column.key])
            for kind, there in (("primary_key", column.primary_key), ("unique", column.unique))
            if there
        ]
    return any(_REPLACE.search(str(option)) and key not in keys for option, keys in options)


def _defaults(compiled: Any, database: Database) -> list[tuple[_Target, str]]:
    """What is written to where a default or onupdate in Python gives the tenant, with the parameter's name."""
    given, statement = upstream.prefetched(compiled), upstream.inside(compiled.statement)
    if not given or not getattr(statement, "is_dml", False):  # a SELECT may have DML in a CTE
        return []
    return [
        (target, name)
        for target in _written(statement, database)
        if not target.inherits
        for column, name in given
        if target.column.shares_lineage(column)
    ]


def check_defaults(context: Any, tenant: Whose | None) -> None:
    """Check what a Python-side default or onupdate gave for a tenant's column.

    :param context: the execution of a statement whose parameters are bound.
    :raises NoTenantError: there is no tenant.
    :raises TenantMismatchError: it gave the name of another one.
    """
    database = Database(context.dialect, context.execution_options.get("schema_translate_map"))
    for target, parameter in _defaults(context.compiled, database):
        names = _names(target, tenant)
        if names is not None:
            for row in context.compiled_parameters:
                _check_value(target.column, row.get(parameter), names)


# -- one value -------------------------------------------------------------------------------------------------------


def _allowed(table: Any, tenant: Whose | None) -> tuple[str, ...] | None:
    """The tenants whose rows may be written; None for all of them, where nothing is encrypted or decrypted."""
    if tenant is None:
        raise NoTenantError(
            f"{getattr(table, 'fullname', table)}: its rows belong to tenants, and no tenant is set for this "
            "statement; run it in byok.session(tenant, engine), or in byok.sealed(…) for rows of any tenant"
        )
    if tenant is SEALED:
        return None
    return tenant.names if isinstance(tenant, Across) else (str(tenant),)


def _names(target: _Target, tenant: Whose | None) -> Mapping[str, Any] | None:
    """The same, with their names as values of the column.

    :raises TenantMismatchError: it would not give the name back, so that two tenants could share their rows.
    """
    names = _allowed(target.declared, tenant)
    if names is None or target.column is None:
        return None if names is None else dict.fromkeys(names)
    found = {
        name: value for name in names if (value := _typed(target.type, target.dialect, name)) is not None
    }
    if not found:
        _refuse_name(target, target.type, names[0])
    return found


def _check_type(target: _Target, type_: Any, names: Collection[str]) -> None:
    """Refuse a value that is sent by a type of the application's own which makes another tenant's name of it."""
    if _is_own_type(type_):
        for name in names:
            if _typed(type_, target.dialect, name) is None:
                _refuse_name(target, type_, name)


def _is_own_type(type_: Any) -> bool:
    """Whether a type is of the application's own, or may be so on a dialect."""
    return bool(upstream.variants(type_)) or not type(type_).__module__.startswith("sqlalchemy.")


def _refuse_name(target: _Target, type_: Any, name: str) -> NoReturn:
    raise TenantMismatchError(
        f"{target.column}: it holds no tenant of the name {name!r}, which {type_!r} would not give back as it is; "
        "declare a column that does, such as String, or give the tenant the name that comes back",
        tenant=name,
    )


# Of a column's type: the names of tenants as its values, by dialect.
_typed_names: WeakKeyDictionary[Any, dict[tuple[str, str], Any]] = WeakKeyDictionary()
_NAMES_KEPT = 1_000
_ABSENT = object()


def _typed(type_: Any, dialect: Any, name: str) -> Any:
    """A tenant's name as a value of a column's type; None where the name would not come back."""
    kept = _typed_names.setdefault(type_, {})
    value = kept.get((dialect.name, name), _ABSENT)
    if value is _ABSENT:
        if len(kept) >= _NAMES_KEPT:
            kept.clear()
        value = kept[dialect.name, name] = _as_value(type_, dialect, name)
    return value


def _as_value(type_: Any, dialect: Any, name: str) -> Any:
    try:
        value = _kind(type_)(name)
        here = upstream.variants(type_).get(dialect.name, type_)
        cut = name.endswith(" ") and isinstance(here, CHAR | NCHAR)  # which are filled up with spaces
        if cut or str(value) != name:
            return None
        value = value if getattr(type_, "as_uuid", True) else name
        return value if _comes_back(type_, dialect, value) else None
    except (LookupError, TypeError, ValueError):
        return None


def _comes_back(type_: Any, dialect: Any, value: Any) -> bool:
    """Whether a type reads a value again from what it makes of it."""
    here = type_.dialect_impl(dialect)
    bind, read = here.bind_processor(dialect), here.result_processor(dialect, None)
    sent = value if bind is None else bind(value)
    for stored in (sent, str(sent)):  # a driver may take a UUID and give text
        with suppress(AttributeError, LookupError, TypeError, ValueError):
            if (stored if read is None else read(stored)) == value:
                return True
    return False


def _kind(type_: Any) -> type[Any]:
    """What a tenant's name is made to be stored."""
    return UUID if isinstance(type_, Uuid) else python_type(type_) or str


def _check_value(column: Any, value: Any, names: Collection[str]) -> None:
    if value is not None and str(value) in names:
        return
    tenant = next(iter(names)) if len(names) == 1 else shown(Across(tuple(names)))
    raise TenantMismatchError(
        f"{column}: a row of {'no tenant' if value is None else f'tenant {str(value)!r}'} would be written for tenant "
        f"{tenant!r}; set {column.key} to the tenant whose the row is, and write it for that tenant",
        tenant=tenant,
        owner=None if value is None else str(value),
    )
