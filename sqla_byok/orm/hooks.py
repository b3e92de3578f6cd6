"""The statement hooks: the listeners on an engine through which every statement passes.

In the order of a statement's life: :func:`before_execute` finds the tenant, opens it where it is cold, and completes
INSERT and UPDATE; :func:`before_cursor_execute` makes sure that nothing else took its place meanwhile;
:func:`after_execute` ties the result to the keyring, so that rows fetched later, in another block, thread or task,
are still read under the tenant of their statement.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.util.concurrency import await_only

from sqla_byok.audit import Actor
from sqla_byok.errors import (
    ConfigurationError,
    NoTenantError,
    TenantMismatchError,
    UnsupportedQueryError,
)
from sqla_byok.keys.keyring import Clock, Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.searchable import NOTHING, HashSpec, Searchable, Written
from sqla_byok.orm import direct, tenancy, upstream
from sqla_byok.orm.fill import fill, refuse_compiled, refuse_embedded
from sqla_byok.orm.guard import Guard, Verdict, search_hash
from sqla_byok.orm.isolation import (
    ALL_SEALED,
    SEALED,
    Across,
    AcrossRing,
    Owned,
    Scopes,
    Statements,
    Whose,
    shown,
    whose,
)
from sqla_byok.orm.slots import Slot, slot_of
from sqla_byok.orm.types import Digest, Encrypted, SearchHash, owners

__all__ = ["ACTOR_OPTION", "attach", "hashes", "is_known"]

ACTOR_OPTION = "byok_actor"
"""Who is named in the audit for what it opens; Byok.session() sets it."""


def attach(engine: Engine, keyrings: Keyrings, scopes: Scopes, guard: Guard) -> None:
    """Put the statement hooks on an engine. Its statements' parameters are hidden from logs and exceptions.

    :param keyrings: where the tenants' keys are.
    :param scopes: tells whose turn it is in this thread or task, where no execution option says it.
    :param guard: judges each compiled statement, and text.
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
    slot.keyrings, slot.scopes = keyrings, scopes
    binding, reading, clock = slot.binding, slot.reading, keyrings.clock
    # What a statement run by another one's column default or event has to put back. One level is enough: where more
    # tenants are nested, before_cursor_execute refuses.
    enclosing: ContextVar[Statements | None] = ContextVar("byok_enclosing", default=None)

    def ask(compiled: Any) -> _Concerns:
        return _concerns(compiled, guard)

    def before_execute(conn: Any, clause: Any, multi: Any, params: Any, options: Any) -> tuple[Any, Any, Any]:
        tenant, ring = whose(options, scopes), None
        if tenant is not None:
            # Nothing but a name is found there.
            ring = keyrings.warm(tenant) or _opened(  # type: ignore[arg-type]
                conn, tenant, keyrings, options.get(ACTOR_OPTION)
            )
        if owners:
            owned = _owned(conn, clause, multi or [params], tenant, keyrings)
            if slot.binding_owned.get() is not owned:
                slot.binding_owned.set(owned)
            if any(len(each.live_salts) > 1 for each in owned.values()):
                clause = _fan_out(
                    clause, tuple(sorted((n, len(each.live_salts)) for n, each in owned.items()))
                )
        given = statement = upstream.inside(clause)
        is_dml = getattr(statement, "is_dml", None)
        if is_dml is None:
            refuse_compiled(clause)
        elif is_dml and tenancy.used:
            rows = multi or ([params] if params else [])
            statement = tenancy.check(statement, rows, tenant)
        if is_dml and not statement.is_delete:
            filled = fill(statement, multi or ([params] if params else []))
            if filled is not None:
                statement, rows, tables = filled
                multi, params = (rows, {}) if multi else ([], rows[0] if rows else {})
                for written in tables:
                    if isinstance(ring, Keyring) and None in written:
                        ring = _noted(ring, written[None], keyrings)
                    if owners:
                        _note_owned(slot, written, keyrings)
        if statement is not given:
            clause = upstream.instead(clause, statement)
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
            _refuse(guard.text(statement))
            return statement, parameters
        if tenancy.used and context.isinsert:
            tenancy.check_defaults(context, whose(context.execution_options, scopes))
        encrypts, decrypts, sends, _, compared, verdict, owned_by, made = upstream.known(compiled, ask)
        grouped: Mapping[str | None, frozenset[HashSpec]] = {}
        if verdict is not None:
            _refuse(verdict.refusal)
            grouped = verdict.grouped
            if None in grouped:
                _check_groups(ring, grouped[None], keyrings)
        if owned_by:
            owned = _complete(conn, slot.binding_owned.get(), owned_by, keyrings)
            for name, live in upstream.compared_owned(compiled).items():
                _may_bind(owned[name] if owned else SEALED, clock, live)
            for owner in owned_by & made.keys():
                _check_specs(owned[owner], made[owner], keyrings)
            for owner in owned_by & grouped.keys():
                _check_groups(owned[owner], grouped[owner], keyrings)
            upstream.remember_owned(context, owned)
            if context.is_crud:
                slot.reading_owned.set(owned)
        if not (encrypts or decrypts or compared):
            return statement, parameters
        if encrypts or compared:
            _may_bind(ring, clock, compared)
            if None in made:
                _check_specs(ring, made[None], keyrings)
        tenant = whose(context.execution_options, scopes)
        if decrypts or context.isinsert or context.isupdate:
            if tenant == whose(conn.get_execution_options(), scopes):
                _check_one_tenant(conn, tenant, updates=encrypts and context.isupdate)
            elif (
                decrypts
            ):  # a statement that names its tenant itself may write, but what it read is another's
                _meet(conn, tenant)
        _check_unchanged(ring, tenant)
        # What runs between here and after_execute may be another tenant's.
        upstream.remember(context, ring)
        if decrypts and context.is_crud:
            reading.set(ring)  # RETURNING together with server defaults is read before after_execute
        if sends and isinstance(ring, Keyring):
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
        concerns = upstream.known(context.compiled, ask)
        if concerns.owned_by:
            owned = upstream.remembered_owned(context)
            result.cursor_strategy = _OwnedFetch(result.cursor_strategy, owned, slot, keyrings)
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


def _opened(conn: Any, tenant: Whose, keyrings: Keyrings, who: Actor | None) -> Statements:
    """The keyring of a tenant that is not in memory, or needs a look; of several; of nobody."""
    if tenant is SEALED:
        return SEALED
    if isinstance(tenant, Across):
        return AcrossRing(
            tenant, [keyrings.warm(name) or _one(conn, name, keyrings, who) for name in tenant.names]
        )
    return _one(conn, tenant, keyrings, who)  # type: ignore[arg-type]  # what remains


def _one(conn: Any, tenant: str, keyrings: Keyrings, who: Actor | None = None) -> Keyring:
    clock = keyrings.clock
    ring = _of_unit(conn, tenant, clock)
    if ring is not None and ring.lease.one_unit and clock.boot() >= ring.fresh_until:
        ring = await_only(keyrings.alook(ring)) if upstream.in_greenlet() else keyrings.look(ring)
    if ring is None:
        ring = (
            await_only(keyrings.aget(tenant, actor=who))
            if upstream.in_greenlet()
            else keyrings.get(tenant, actor=who)
        )
    return ring


def _of_unit(conn: Any, tenant: str, clock: Clock) -> Keyring | None:
    """The keyring of the connection's transaction, for a tenant that wants a KMS call for each."""
    held: Statements | None = upstream.held(conn)
    rings = held.rings if isinstance(held, AcrossRing) else [held]
    ring = next((ring for ring in rings if isinstance(ring, Keyring) and ring.tenant == tenant), None)
    if ring is None:
        return None
    return ring if ring.lease.live(clock.boot(), clock.wall()) else None


@dataclass(slots=True)
class _Specs:
    """How search hashes are made."""

    hashed: frozenset[HashSpec]  # of values that are only written
    searched: frozenset[HashSpec]  # of columns that are compared
    allowed_by: Searchable | None = None  # the last that allowed them; most tenants share one


def _searched(compiled: Any) -> Mapping[str | None, frozenset[HashSpec]]:
    """Of columns that are compared, and of those by which an upsert finds its conflicts; by the columns' owners."""
    found = upstream.searched(compiled)
    if getattr(compiled, "isinsert", False):
        statement = upstream.inside(compiled.statement)
        table, _ = upstream.target(statement)
        for conflict in upstream.conflicts(statement):
            for column in upstream.conflict_columns(table, conflict):
                if isinstance(column.type, SearchHash):
                    owner = _owner(column.type)
                    found[owner] = found.get(owner, frozenset()) | {column.type.spec}
    return found


def _specs(
    binds: Iterable[Any], searched: Mapping[str | None, frozenset[HashSpec]]
) -> dict[str | None, _Specs]:
    hashed: dict[str | None, set[HashSpec]] = {}
    for type_ in binds:
        if isinstance(type_, SearchHash) and type_.source.column_id:
            hashed.setdefault(_owner(type_), set()).add(type_.spec)
    return {
        owner: _Specs(
            frozenset(hashed.get(owner, set()) - searched.get(owner, frozenset())),
            searched.get(owner, frozenset()),
        )
        for owner in {*hashed, *searched}
    }


def _noted(ring: Keyring, written: Written, keyrings: Keyrings) -> Keyring:
    """The tenant's keyring, once the keystore knows of a table that is about to be written."""
    if ring.searchable is written.allowed_by:
        return ring
    if not ring.searchable.knows(written):
        ring = _recorded(ring, written, keyrings)
    ring.searchable.check_write(ring.tenant, written)
    written.allowed_by = ring.searchable
    return ring


def _recorded(ring: Keyring, written: Written, keyrings: Keyrings) -> Keyring:
    if upstream.in_greenlet():
        noted: Keyring = await_only(keyrings.arecord(ring, written))
        return noted
    return keyrings.record(ring, written)


def _note_owned(slot: Slot, written: Mapping[str | None, Written], keyrings: Keyrings) -> None:
    """The same for the owners of single columns."""
    owned = slot.binding_owned.get()
    for owner in owned.keys() & written.keys():
        ring = owned[owner]
        if isinstance(ring, Keyring) and (now := _noted(ring, written[owner], keyrings)) is not ring:
            owned = Owned({**owned, owner: now})
            slot.binding_owned.set(owned)


def _check_specs(ring: Statements | None, specs: _Specs, keyrings: Keyrings) -> None:
    """Refuse what is hashed in another way than the tenant's stored hashes, or cannot be searched."""
    for each in ring.rings if isinstance(ring, AcrossRing) else (ring,):
        if not isinstance(each, Keyring) or each.searchable is specs.allowed_by:
            continue
        known = each.searchable.knows_all(specs.searched)
        if not known:
            looked = _recorded(each, NOTHING, keyrings)  # a look whether somebody has written it since
            _may_bind(each, keyrings.clock, 0)  # again, since the look may have taken long
            each = looked
        each.searchable.check(each.tenant, specs.hashed, specs.searched)
        if known:
            specs.allowed_by = each.searchable


class _Concerns(NamedTuple):
    """What a compiled statement has of ours."""

    encrypts: bool  # or hashes
    decrypts: bool
    sends: bool  # values to the customer's KMS
    opens: bool  # values by the customer's KMS
    compared: int  # by how many search salts it compares
    verdict: Verdict | None  # where the guard has something to say
    owned_by: frozenset[str]  # whose columns it has beside those of its tenant
    made: Mapping[str | None, _Specs]  # how hashes are made, by the columns' owners


def _concerns(compiled: Any, guard: Guard) -> _Concerns:
    """Asked once per compiled statement."""
    refuse_embedded(getattr(compiled, "ctes", None) or ())
    binds = [bind.type for bind in getattr(compiled, "binds", {}).values()]
    results = [type_ for type_ in upstream.result_types(compiled) if isinstance(type_, Encrypted)]
    verdict = guard.judge(compiled)
    made = _specs(binds, _searched(compiled))
    owned_by = {_owner(type_) for type_ in (*binds, *results)}.union(
        upstream.compared_owned(compiled), verdict.grouped
    )
    if owned_by:
        binds = [type_ for type_ in binds if _owner(type_) is None]
        results = [type_ for type_ in results if _owner(type_) is None]
    return _Concerns(
        encrypts=any(isinstance(type_, Encrypted | SearchHash) for type_ in binds),
        decrypts=bool(results),
        sends=any(isinstance(type_, Encrypted) and type_.mode == "direct" for type_ in binds),
        opens=any(type_.mode == "direct" for type_ in results),
        compared=upstream.compared(compiled),
        verdict=None if verdict.refusal is None and not verdict.grouped else verdict,
        owned_by=frozenset(name for name in owned_by if name is not None),
        made=made,
    )


def _check_groups(ring: Statements | None, grouped: frozenset[HashSpec], keyrings: Keyrings) -> None:
    """Refuse what tells hashes apart where one value may have several, or none."""
    if ring is None or ring is SEALED:
        raise NoTenantError(
            "no tenant is set for this statement, which groups by search hashes: nobody could say whether equal "
            "values have equal hashes; run it in byok.session(tenant, engine)"
        )
    if isinstance(ring, AcrossRing):
        raise UnsupportedQueryError(
            f"{ring.tenant}: one value has another hash for each tenant; group for each tenant, or in Python"
        )
    if len(ring.live_salts) > 1:
        raise UnsupportedQueryError(
            f"the search salts of tenant {ring.tenant!r} are being rotated, so that one value may have several hashes: "
            "grouping by them would count it several times; wait until the rows are hashed anew, or group in Python",
            tenant=ring.tenant,
        )
    _may_bind(ring, keyrings.clock, 0)
    _check_specs(ring, _Specs(frozenset(), grouped), keyrings)


def _refuse(refusal: tuple[str, str | None] | None) -> None:
    if refusal is not None:
        message, column = refusal
        raise UnsupportedQueryError(message, column=column)


def _owner(type_: Any) -> str | None:
    """Whose keys a type takes, where they are not the statement's tenant's."""
    source = type_.source if isinstance(type_, SearchHash) else type_
    return source.owner if isinstance(source, Encrypted) else None


def _owned(
    conn: Any, clause: Any, rows: Sequence[Mapping[str, Any]], tenant: Whose | None, keyrings: Keyrings
) -> Owned:
    """The keyrings of the owners of single columns: those in memory, and those that the statement shows it needs."""
    if tenant is SEALED:
        return ALL_SEALED
    owned = Owned((name, ring) for name in owners if (ring := keyrings.warm(name)) is not None)
    return owned if len(owned) == len(owners) else _complete(conn, owned, _named(clause, rows), keyrings)


def _complete(conn: Any, owned: Owned, names: Iterable[str], keyrings: Keyrings) -> Owned:
    missing = [name for name in names if name not in owned]
    return Owned({**owned, **{name: _one(conn, name, keyrings) for name in missing}}) if missing else owned


def _named(clause: Any, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The owners of columns that a statement compares or sets; those of what it only reads can wait."""
    if not isinstance(clause, ClauseElement):
        return set()
    statement = upstream.inside(clause)
    columns = list(iterate(statement))
    if getattr(statement, "is_dml", False) and not statement.is_delete:
        written = {getattr(key, "key", key) for key, _ in upstream.values(statement)}.union(*rows)
        columns += [
            column
            for column in upstream.target(statement)[0].c
            if column.key in written or column.default or column.onupdate or upstream.multi_values(statement)
        ]
    return {owner for column in columns if (owner := _owner(getattr(column, "type", None))) is not None}


def _check_one_tenant(conn: Any, tenant: Whose | None, *, updates: bool) -> None:
    """Refuse an UPDATE in a transaction that has worked for another tenant too.

    A session that outlives a block still holds the objects of the block's tenant, and would write them under the
    keys of whoever's turn it is.
    """
    tenants = _meet(conn, tenant)
    if updates and len(tenants) > 1:
        other = next(each for each in tenants if each != tenant)
        how = "began with" if other == tenants[0] else "has worked for"
        raise TenantMismatchError(
            f"this transaction {how} tenant {shown(other)!r} and would now update rows for {shown(tenant)!r}, which "
            "may be what it read before; give each tenant a session of its own, with byok.session(tenant, engine)",
            tenant=shown(tenant),
            owner=shown(other),
        )


def _meet(conn: Any, tenant: Whose | None) -> list[Whose | None]:
    tenants = upstream.met(conn)
    if tenant not in tenants:
        tenants.append(tenant)
    return tenants


def _check_unchanged(ring: Statements | None, tenant: Whose | None) -> None:
    if shown(tenant) != (None if ring is None else ring.tenant):
        raise TenantMismatchError(
            "the tenant changed while this statement was prepared: a column default, a type or an event ran a "
            "statement of its own that failed, or changed the tenant",
            tenant=shown(tenant),
            owner=None if ring is None else ring.tenant,
        )


def _fan_out(clause: Any, live: Hashable) -> Any:
    """Have a statement compiled for several search salts."""
    statement = upstream.inside(clause)
    if getattr(statement, "is_insert", False):
        _refuse_upsert(statement)
    # A sequence and DDL come here as well.
    compares = getattr(statement, "is_select", False) or getattr(statement, "is_dml", False)
    return upstream.instead(clause, statement.options(upstream.FanOut(live))) if compares else clause


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


def _may_bind(ring: Statements | None, clock: Clock, compared: int) -> None:
    """Refuse to write and to search by keys that may have changed since the process looked."""
    if ring is None:
        if compared:
            raise NoTenantError(
                "no tenant is set for this statement, which compares search hashes: nobody could say whether equal "
                "values have equal hashes; run it in byok.session(tenant, engine)"
            )
        return
    if ring is SEALED:
        if compared:
            SEALED.search()
        return
    if clock.boot() >= ring.write_until:
        ring.outdated()
    if compared and compared != len(ring.live_salts):
        raise UnsupportedQueryError(
            f"the search salts of tenant {ring.tenant!r} are being rotated, and this statement was compiled "
            "beforehand for another number of them; execute the statement itself",
            tenant=ring.tenant,
        )


def is_known(column: Any, ring: Keyring) -> bool:
    """Whether a column was ever hashed, as far as the process knows. Where not, it has to look again to say so."""
    type_: Any = search_hash(column).type
    return ring.searchable.knows_all([type_.spec])


def hashes(column: Any, value: Any, ring: Keyring, clock: Clock, dialect: Dialect) -> list[Digest]:
    """What a value may be hashed to by each of a tenant's live search salts, the active one first.

    :param column: an attribute or column that is encrypted and searchable.
    :param dialect: one of the kind that the column is used with, attached to nothing.
    :param ring: the tenant's, or that of the column's owner.
    :raises UnsupportedQueryError: if the column has no hashes, or the value is NULL.
    :raises NotSearchableError: if the tenant has not enabled the search of the column.
    :raises KeystoreUnavailableError: if the salts may have changed since the process looked.
    """
    _may_bind(ring, clock, 0)
    type_: Any = search_hash(column).type
    ring.searchable.check(ring.tenant, (), [type_.spec])
    slots, found = slot_of(dialect), []
    token = slots.binding.set(ring)
    of_owner = slots.binding_owned.set(Owned({ring.tenant: ring}))
    try:
        for slot in range(len(ring.live_salts)):
            process = type_.at(slot).bind_processor(dialect)
            found.append(process(value))
    finally:
        slots.binding.reset(token)
        slots.binding_owned.reset(of_owner)
    if None in found:
        name = type_.source.column_id
        raise UnsupportedQueryError(f"{name}: NULL has no hash; test the column with IS NULL", column=name)
    return [Digest(one) for one in found]


class _TenantFetch:
    """Stands before a result's cursor strategy: whoever fetches, rows are read under the statement's tenant."""

    __slots__ = ("_inner", "_keyrings", "_reading", "_ring")

    def __init__(
        self, inner: Any, ring: Statements | None, reading: ContextVar[Statements | None], keyrings: Keyrings
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
                for each in ring.rings if isinstance(ring, AcrossRing) else (ring,):
                    self._keyrings.refresh_soon(each)  # type: ignore[arg-type]  # sealed is never due
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


class _OwnedFetch(_TenantFetch):
    """The same for the columns of a result that have owners of their own."""

    __slots__ = ("_owned", "_slot")

    def __init__(self, inner: Any, owned: Owned, slot: Slot, keyrings: Keyrings) -> None:
        super().__init__(inner, None, slot.reading, keyrings)
        self._owned, self._slot = owned, slot

    def _enter(self) -> None:
        clock = self._keyrings.clock
        for ring in self._owned.values():
            lease = ring.lease
            if clock.boot() >= lease.deadline or clock.wall() >= lease.wall_deadline:
                ring.end()
        self._slot.reading_owned.set(self._owned)

    def _around(self, inner: Any) -> _OwnedFetch:
        return _OwnedFetch(inner, self._owned, self._slot, self._keyrings)


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
