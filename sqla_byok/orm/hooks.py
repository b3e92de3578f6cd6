"""The statement hooks: the listeners on an engine through which every statement passes.

In the order of a statement's life: :func:`before_execute` finds the tenant, opens it where it is cold, and completes
INSERT and UPDATE; :func:`before_cursor_execute` makes sure that nothing else took its place meanwhile;
:func:`after_execute` ties the result to the keyring, so that rows fetched later, in another block, thread or task,
are still read under the tenant of their statement.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.util.concurrency import await_only

from sqla_byok.errors import (
    ConfigurationError,
    NoTenantError,
    TenantMismatchError,
    UnsupportedQueryError,
)
from sqla_byok.keys.keyring import Clock, Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.orm import direct, upstream
from sqla_byok.orm.fill import fill, refuse_compiled, refuse_embedded
from sqla_byok.orm.slots import slot_of
from sqla_byok.orm.types import Encrypted, SearchHash

__all__ = ["ACTOR_OPTION", "TENANT_OPTION", "attach"]

TENANT_OPTION = "byok_tenant"
"""The execution option that says whose data a session, connection or engine works on."""

ACTOR_OPTION = "byok_actor"
"""Who is named in the audit for what it opens; Byok.session() sets it."""


def attach(engine: Engine, keyrings: Keyrings, current_tenant: Callable[[], str | None]) -> None:
    """Put the statement hooks on an engine. Its statements' parameters are hidden from logs and exceptions.

    :param keyrings: where the tenants' keys are.
    :param current_tenant: tells whose turn it is in this thread or task, where no execution option says it.
    :raises ConfigurationError: if the engine is attached to other keyrings already.
    """
    # A view made by execution_options() shares its engine's dialect: hooks on the view alone would leave the engine
    # itself with a dialect that is attached, and statements that nobody prepared.
    engine = getattr(engine, "_proxied", engine)
    slot = slot_of(engine.dialect)
    if slot.keyrings is keyrings:
        return
    if slot.keyrings is not None:
        raise ConfigurationError(
            "this engine is attached to another Byok already; give each Byok engines of its own"
        )
    slot.keyrings = keyrings
    binding, reading, clock = slot.binding, slot.reading, keyrings.clock
    # What a statement run by another one's column default or event has to put back. One level is enough: where more
    # tenants are nested, before_cursor_execute refuses.
    enclosing: ContextVar[Keyring | None] = ContextVar("byok_enclosing", default=None)

    def before_execute(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> tuple[Any, Any, Any]:
        tenant, ring = options.get(TENANT_OPTION), None
        if tenant is None:
            tenant = current_tenant()
        if tenant is not None:
            ring = keyrings.warm(tenant) or _of_unit(conn, tenant, clock)
            if ring is not None and ring.lease.one_unit and clock.boot() >= ring.fresh_until:
                ring = await_only(keyrings.alook(ring)) if upstream.in_greenlet() else keyrings.look(ring)
            if ring is None:
                who = options.get(ACTOR_OPTION)
                ring = (
                    await_only(keyrings.aget(tenant, actor=who))
                    if upstream.in_greenlet()
                    else keyrings.get(tenant, actor=who)
                )
        is_dml = getattr(clause, "is_dml", None)
        if is_dml is None:
            refuse_compiled(clause)
        elif is_dml and not clause.is_delete:
            statement = upstream.resolved(clause)
            filled = fill(statement, multi or ([params] if params else []))
            if filled is not None:
                clause, rows = filled
                multi, params = (rows, {}) if multi else ([], rows[0] if rows else {})
        if ring is not None and len(ring.live_salts) > 1:
            clause = _fan_out(clause, len(ring.live_salts))
        # Setting a context variable costs several times what reading it does.
        previous = binding.get()
        if enclosing.get() is not previous:
            enclosing.set(previous)
        if ring is not previous:
            binding.set(ring)
        return clause, multi, params

    def before_cursor_execute(
        conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        ring = binding.get()
        if ring is not None and ring.lease.one_unit:
            upstream.hold(conn, ring)
        compiled = context.compiled
        if compiled is None:
            return statement, parameters
        encrypts, decrypts, sends, _, compared = upstream.known(compiled, _concerns)
        if not (encrypts or decrypts or compared):
            return statement, parameters
        if encrypts or compared:
            _may_bind(ring, clock, compared)
        tenant = context.execution_options.get(TENANT_OPTION)
        if tenant is None:
            tenant = current_tenant()
            _check_one_tenant(conn, tenant, updates=encrypts and context.isupdate)
        _check_unchanged(ring, tenant)
        # What runs between here and after_execute may be another tenant's.
        upstream.remember(context, ring)
        if decrypts and context.is_crud:
            reading.set(ring)  # RETURNING together with server defaults is read before after_execute
        if sends and ring is not None:
            parameters = direct.send(context, parameters, keyrings, ring)
            _may_bind(ring, clock, compared)  # again, since the KMS may have taken long to answer
        return statement, parameters

    def after_execute(conn: Any, clause: Any, multi: Any, params: Any, options: Any, result: Any) -> None:
        previous = enclosing.get()
        if binding.get() is not previous:
            binding.set(previous)
        context = getattr(result, "context", None)  # a default's result is a plain value
        if context is None or context.compiled is None or result._soft_closed:
            return
        concerns = upstream.known(context.compiled, _concerns)
        if concerns.decrypts:
            ring = upstream.remembered(context)
            strategy, opener = result.cursor_strategy, None
            if concerns.opens:
                opener = direct.opener(result, keyrings, ring)
            result.cursor_strategy = (
                _TenantFetch(strategy, ring, reading, keyrings)
                if opener is None
                else _DirectFetch(strategy, ring, reading, keyrings, opener=opener)
            )

    event.listen(engine, "before_execute", before_execute, retval=True)
    event.listen(engine, "before_cursor_execute", before_cursor_execute, retval=True)
    event.listen(engine, "after_execute", after_execute)
    event.listen(engine, "handle_error", _hide_parameters)
    engine.hide_parameters = True
    logger: Any = engine.logger
    # With echo=True there is a wrapper of SQLAlchemy's own around it.
    getattr(logger, "logger", logger).addFilter(_hide_rows)


def _of_unit(conn: Any, tenant: str, clock: Clock) -> Keyring | None:
    """The keyring of the connection's transaction, for a tenant that wants a KMS call for each."""
    ring: Keyring | None = upstream.held(conn)
    if ring is None or ring.tenant != tenant:
        return None
    return ring if ring.lease.live(clock.boot(), clock.wall()) else None


class _Concerns(NamedTuple):
    """What a compiled statement has of ours."""

    encrypts: bool  # or hashes
    decrypts: bool
    sends: bool  # values to the customer's KMS
    opens: bool  # values by the customer's KMS
    compared: int  # by how many search salts it compares


def _concerns(compiled: Any) -> _Concerns:
    """Asked once per compiled statement."""
    refuse_embedded(getattr(compiled, "ctes", None) or ())
    binds = [bind.type for bind in getattr(compiled, "binds", {}).values()]
    results = [type_ for type_ in upstream.result_types(compiled) if isinstance(type_, Encrypted)]
    return _Concerns(
        encrypts=any(isinstance(type_, Encrypted | SearchHash) for type_ in binds),
        decrypts=bool(results),
        sends=any(isinstance(type_, Encrypted) and type_.mode == "direct" for type_ in binds),
        opens=any(type_.mode == "direct" for type_ in results),
        compared=upstream.compared(compiled),
    )


def _check_one_tenant(conn: Any, tenant: str | None, *, updates: bool) -> None:
    """Refuse an UPDATE in a transaction that began with another tenant.

    A session that outlives a block still holds the objects of the block's tenant, and would write them under the
    keys of whoever's turn it is.
    """
    first = upstream.pinned(conn, tenant)
    if updates and first != tenant:
        raise TenantMismatchError(
            f"this transaction began with tenant {first!r} and would now update rows for {tenant!r}; give each "
            "tenant a session of its own, with byok.session(tenant, engine)",
            tenant=tenant,
            owner=first,
        )


def _check_unchanged(ring: Keyring | None, tenant: str | None) -> None:
    if tenant != (None if ring is None else ring.tenant):
        raise TenantMismatchError(
            "the tenant changed while this statement was prepared: a column default, a type or an event ran a "
            "statement of its own that failed, or changed the tenant",
            tenant=tenant,
            owner=None if ring is None else ring.tenant,
        )


def _fan_out(clause: Any, live: int) -> Any:
    """Have a statement compiled for several search salts."""
    statement = upstream.resolved(clause)
    if getattr(statement, "is_insert", False):
        _refuse_upsert(statement)
    # A sequence and DDL come here as well.
    compares = getattr(statement, "is_select", False) or getattr(statement, "is_dml", False)
    return statement.options(upstream.FanOut(live)) if compares else clause


def _refuse_upsert(statement: Any) -> None:
    """Refuse an upsert that finds its conflicts by a hash: it would miss a row hashed by another salt, and add one."""
    table, _ = upstream.target(statement)
    for conflict in upstream.conflicts(statement):
        targets = upstream.conflict_elements(conflict) or upstream.unique_columns(table)
        for target in targets:
            column = table.c.get(target) if isinstance(target, str) else target
            type_ = getattr(column, "type", None)
            if isinstance(type_, SearchHash):
                name = type_.source.column_id
                raise UnsupportedQueryError(
                    f"{name}: an upsert cannot find its conflicts while the column's salts are being rotated, since "
                    "an equal value may have another hash; look the row up, then update or insert it",
                    column=name,
                )


def _may_bind(ring: Keyring | None, clock: Clock, compared: int) -> None:
    """Refuse to write and to search by keys that may have changed since the process looked."""
    if ring is None:
        if compared:
            raise NoTenantError(
                "no tenant is set for this statement, which compares search hashes: nobody could say whether equal "
                "values have equal hashes; run it in byok.session(tenant, engine)"
            )
        return
    if clock.boot() >= ring.write_until:
        ring.outdated()
    if compared and compared != len(ring.live_salts):
        raise UnsupportedQueryError(
            f"the search salts of tenant {ring.tenant!r} are being rotated, and this statement was compiled "
            "beforehand for another number of them; execute the statement itself",
            tenant=ring.tenant,
        )


class _TenantFetch:
    """Stands before a result's cursor strategy: whoever fetches, rows are read under the statement's tenant."""

    __slots__ = ("_inner", "_keyrings", "_reading", "_ring")

    def __init__(
        self, inner: Any, ring: Keyring | None, reading: ContextVar[Keyring | None], keyrings: Keyrings
    ) -> None:
        self._inner, self._ring, self._reading, self._keyrings = inner, ring, reading, keyrings

    def _enter(self) -> None:
        # After the fetch, which may have awaited, and before the rows are made of it.
        ring = self._ring
        if ring is not None:
            clock, lease = self._keyrings.clock, ring.lease
            now = clock.boot()
            if now >= lease.deadline or clock.wall() >= lease.wall_deadline:
                ring.end()
            if now >= lease.refresh_at:
                self._keyrings.refresh_soon(ring)
        self._reading.set(ring)

    @property
    def alternate_cursor_description(self) -> Any:
        return self._inner.alternate_cursor_description

    def fetchone(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._inner.fetchone(*args, **kwargs)
        self._enter()
        return rows

    def fetchmany(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._inner.fetchmany(*args, **kwargs)
        self._enter()
        return rows

    def fetchall(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._inner.fetchall(*args, **kwargs)
        self._enter()
        return rows

    def yield_per(self, result: Any, cursor: Any, num: int) -> None:
        self._inner.yield_per(result, cursor, num)
        if result.cursor_strategy is not self:
            result.cursor_strategy = self._around(result.cursor_strategy)

    def _around(self, inner: Any) -> _TenantFetch:
        return _TenantFetch(inner, self._ring, self._reading, self._keyrings)

    def soft_close(self, *args: Any) -> None:
        self._inner.soft_close(*args)

    def hard_close(self, *args: Any) -> None:
        self._inner.hard_close(*args)

    def handle_exception(self, *args: Any) -> Any:
        return self._inner.handle_exception(*args)


class _DirectFetch(_TenantFetch):
    """The same for a result with direct values: the customer's KMS decrypts those of all rows that are fetched."""

    __slots__ = ("_open",)

    def __init__(self, *args: Any, opener: Callable[[Any], list[Any]]) -> None:
        super().__init__(*args)
        self._open = opener

    def fetchone(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        row = super().fetchone(result, *args, **kwargs)
        return row if row is None else self._opened(result, [row])[0]

    def fetchmany(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        return self._opened(result, super().fetchmany(result, *args, **kwargs))

    def fetchall(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        return self._opened(result, super().fetchall(result, *args, **kwargs))

    def _opened(self, result: Any, rows: Any) -> list[Any]:
        try:
            opened = self._open(rows)
            self._enter()  # the KMS may have taken long
        except BaseException:
            result.close()  # or whoever fetched on would miss these rows
            raise
        return opened

    def _around(self, inner: Any) -> _DirectFetch:
        return _DirectFetch(inner, self._ring, self._reading, self._keyrings, opener=self._open)


def _hide_parameters(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if isinstance(error, StatementError):
        error.hide_parameters = True
        error.params = None


def _hide_rows(record: logging.LogRecord) -> bool:
    # SQLAlchemy logs each row after decryption, at DEBUG.
    if isinstance(record.msg, str) and record.msg.endswith("Row %r"):
        record.msg, record.args = "Row [hidden: the engine reads encrypted columns]", ()
    return True
