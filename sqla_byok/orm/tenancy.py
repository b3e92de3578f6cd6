"""The column that says whose a row is: ``__byok_tenant__``, checked before each write.

A flush is checked twice: an object against the tenant before its statement is made, which also sees whose the object
was; and each statement, whoever made it. An UPDATE or DELETE is held to the tenant's own rows, since what its WHERE
finds cannot be known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import Alias, Column, Join, Table, event, inspect, or_
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.sql.elements import BindParameter, ClauseElement, ColumnClause, Null

from sqla_byok.errors import DeclarationError, NoTenantError, TenantMismatchError, UnsupportedQueryError
from sqla_byok.orm import upstream
from sqla_byok.orm.isolation import SEALED, Across, Whose, shown, whose
from sqla_byok.orm.sealed import Sealed
from sqla_byok.orm.slots import slot_of
from sqla_byok.orm.types import Encrypted

__all__ = ["TENANT_COLUMN", "check", "check_defaults", "used"]

TENANT_COLUMN = "byok_tenant"
"""The key in a table's ``info`` that names its tenant's column, where no mapped class does by ``__byok_tenant__``."""

used: list[str] = []
"""The names of the tables that have such a column; empty for most applications, which then pay nothing."""

_columns: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of a Table
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
    if any(table in _columns for table in mapper.tables):
        for when in ("before_insert", "before_update", "before_delete"):
            event.listen(cls, when, _check_object)


def _declare(table: Any, column: Any, where: str, name: str) -> None:
    if not isinstance(table, Table) or not isinstance(column, Column):
        raise DeclarationError(f"{where}: {getattr(table, 'description', 'it')} has no column {name!r}")
    if column.server_default is not None or column.computed is not None:
        raise DeclarationError(
            f"{where}: what the database sets {name!r} to cannot be checked; set it in Python"
        )
    if _python_type(column) not in _NAMES or isinstance(column.type, Encrypted):
        raise DeclarationError(f"{where}: {name!r} has to be a string, an integer or a UUID")
    if table not in _columns:
        used.append(table.fullname)
    _columns[table] = column.key


def _python_type(column: Any) -> type[Any] | None:
    try:
        found: type[Any] = column.type.python_type
    except NotImplementedError:
        return None
    return found


# -- objects ---------------------------------------------------------------------------------------------------------


def _check_object(mapper: Mapper[Any], connection: Any, target: Any) -> None:
    slot = slot_of(connection.dialect)
    if slot.scopes is None:
        return
    tenant = whose(connection.get_execution_options(), slot.scopes)
    for table in mapper.tables:
        key = _columns.get(table)
        if key is None:
            continue
        names = _allowed(table, tenant)
        history = inspect(target).attrs[mapper.get_property_by_column(table.c[key]).key].load_history()
        # What it was is checked too: an object is not taken over by renaming its owner.
        for value in (*history.added, *history.unchanged, *history.deleted):
            if names is not None and (value is not None or inspect(target).persistent):
                _check_value(table.c[key], value, names)


_MET = "byok_met"


@event.listens_for(Session, "after_begin")
def _check_session(session: Session, transaction: Any, connection: Any) -> None:
    """Refuse a session that still holds one tenant's values when it begins a transaction for another.

    It would write what changed in them under the other's keys. With ``expire_on_commit=True`` it holds none, nor after
    ``expunge_all()`` and ``close()``.
    """
    scopes = slot_of(connection.dialect).scopes
    if scopes is None:
        return
    met: dict[Any, list[Whose | None]] = session.info.setdefault(_MET, {})
    tenant, tenants = whose(connection.get_execution_options(), scopes), upstream.met(connection)
    others = [each for each in met.get(connection.engine, ()) if each != tenant]
    if others:
        first = next((each for each in others if each is not SEALED), None)
        if tenant is not None and tenant is not SEALED and first is not None and _holds(session, plain=True):
            raise TenantMismatchError(
                f"this session holds values of tenant {shown(first)!r} that its last commit did not expire, and would "
                f"now work for {shown(tenant)!r}; give each tenant a session of its own, or close() it in between",
                tenant=shown(tenant),
                owner=shown(first),
            )
        if _holds(session, plain=False):
            tenants.extend(others)  # so that nothing is updated
    met[connection.engine] = tenants


def _holds(session: Session, *, plain: bool) -> bool:
    """Whether a session has values of its tenant's encrypted columns; decrypted ones, or sealed ones too.

    Those of a column with an owner are the owner's, whoever's turn it is.
    """
    return any(
        isinstance(type_ := attribute.columns[0].type, Encrypted)
        and type_.owner is None
        and attribute.key in state.dict
        and not (plain and type(state.dict[attribute.key]) is Sealed)
        for state in session.identity_map.all_states()
        for attribute in state.mapper.column_attrs
    )


# -- statements ------------------------------------------------------------------------------------------------------


def check(clause: Any, rows: Sequence[Mapping[str, Any]], tenant: Whose | None) -> Any:
    """Check what an INSERT, UPDATE or DELETE sets a tenant's column to, and hold it to the tenant's rows.

    :param clause: the statement.
    :param rows: its parameters.
    :returns: the statement to run instead.
    :raises TenantMismatchError: if it sets the column to another tenant's name.
    :raises NoTenantError: if there is no tenant.
    :raises UnsupportedQueryError: if what it sets the column to cannot be known.
    """
    given = None
    for target in _targets(upstream.target(clause)[0]):
        table = target.element if isinstance(target, Alias) else target
        key = _columns.get(table)
        if key is None:
            continue
        names = _allowed(table, tenant)
        if names is None:
            continue
        if not clause.is_delete:
            given = given or list(_given(clause, rows))
            _check_given(clause, target.c[key], given, names)
        if not clause.is_insert:
            clause = clause.where(_held(target.c[key], names))
        elif conflicts := upstream.conflicts(clause):
            held = _held(target.c[key], names)
            clause = upstream.with_conflicts(clause, [upstream.held_to(each, held) for each in conflicts])
    return clause


def _held(column: Any, names: tuple[str, ...]) -> Any:
    """True of the tenants' own rows."""
    return or_(*(column == _typed(column, name) for name in names))


def check_defaults(context: Any, tenant: Whose | None) -> None:
    """Check what a Python-side default gave for a tenant's column.

    :param context: the execution of an INSERT, just before it is sent.
    """
    table = upstream.inside(context.compiled.statement).table
    key = _columns.get(table)
    names = None if key is None else _allowed(table, tenant)
    if key is not None and names is not None:
        for row in context.compiled_parameters:
            if key in row:
                _check_value(table.c[key], row[key], names)


def _targets(table: Any) -> Iterator[Any]:
    """The tables, or aliases of tables, that a statement writes to."""
    if isinstance(table, Join):
        yield from _targets(table.left)
        yield from _targets(table.right)
    elif isinstance(table, Table) or (isinstance(table, Alias) and isinstance(table.element, Table)):
        yield table


def _given(clause: Any, rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[Any, Any]]:
    """Each row that a statement sets, whichever way it was given."""
    groups = upstream.multi_values(clause)
    if groups:
        # Rows of positional values are refused where hashes are filled; here they stand for their columns.
        columns = clause.table.c.keys()
        yield from (
            row if isinstance(row, dict) else dict(zip(columns, row, strict=False))
            for group in groups
            for row in group
        )
        return
    items = dict(upstream.values(clause))
    for row in rows or ({},):
        yield {
            **{
                key: row[value.key] if isinstance(value, BindParameter) and value.key in row else value
                for key, value in items.items()
            },
            **row,
        }


_ABSENT = object()


def _check_given(
    clause: Any, column: Any, given: Sequence[Mapping[Any, Any]], names: tuple[str, ...]
) -> None:
    if column.key in upstream.select_names(clause):
        _unknown(column, "INSERT FROM SELECT sets it to")
    for row in given:
        value = row.get(column.key, row.get(column, _ABSENT))
        if value is not _ABSENT:
            _check_value(column, _plain(column, value), names)
        elif clause.is_insert and column.default is None:
            _check_value(column, None, names)
    for conflict in upstream.conflicts(clause):
        for key, value in upstream.conflict_values(conflict):
            same = isinstance(value, ColumnClause) and value.key == column.key  # as it is, or excluded
            if getattr(key, "key", key) == column.key and not same:
                _check_value(column, _plain(column, value), names)


def _plain(column: Any, value: Any) -> Any:
    """The Python value that a tenant's column is set to."""
    if isinstance(value, BindParameter):
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


# -- one value -------------------------------------------------------------------------------------------------------


def _allowed(table: Any, tenant: Whose | None) -> tuple[str, ...] | None:
    """The tenants whose rows may be written; None for all of them, where nothing is encrypted or decrypted."""
    if tenant is None:
        raise NoTenantError(
            f"{table.fullname}: its rows belong to tenants, and no tenant is set for this statement; run it in "
            "byok.session(tenant, engine), or in byok.sealed(…) for rows of any tenant"
        )
    if tenant is SEALED:
        return None
    return tenant.names if isinstance(tenant, Across) else (str(tenant),)


def _check_value(column: Any, value: Any, names: tuple[str, ...]) -> None:
    if value is not None and str(value) in names:
        return
    tenant = names[0] if len(names) == 1 else shown(Across(names))
    raise TenantMismatchError(
        f"{column}: a row of {'no tenant' if value is None else f'tenant {str(value)!r}'} would be written for tenant "
        f"{tenant!r}; set {column.key} to the tenant whose the row is, and write it for that tenant",
        tenant=tenant,
        owner=None if value is None else str(value),
    )


def _typed(column: Any, name: str) -> Any:
    """A tenant's name as a value of the column."""
    kind = _python_type(column) or str
    try:
        return kind(name)
    except ValueError:
        pass
    raise TenantMismatchError(
        f"{column}: it holds no tenant of the name {name!r}, which is no {kind.__name__}", tenant=name
    )
