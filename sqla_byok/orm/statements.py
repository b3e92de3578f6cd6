"""The way of every statement on an attached engine. docs/statements.md tells its life, with a picture.

In the order in which a statement passes: :meth:`Statements.before` completes INSERT and UPDATE; once the statement is
compiled, :meth:`Statements.begin` looks what it needs, finds whose turn it is and opens what is cold; its parameters
are bound under that turn; :meth:`Statements.send` looks at the clocks and at the transaction a last time; and its
result keeps the turn, by which rows are opened as they are fetched (:mod:`sqla_byok.orm.fetches`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import StatementError

from sqla_byok.audit import Actor
from sqla_byok.errors import ConfigurationError, NoTenantError, UnsupportedQueryError
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.searchable import NOTHING, Written
from sqla_byok.orm import direct, sessions, tenant_column, upstream
from sqla_byok.orm.current import Attachment, Turn, attachment_of
from sqla_byok.orm.fetches import Fetch, Reader
from sqla_byok.orm.guard import Guard
from sqla_byok.orm.needs import Need, Needs, needs_of
from sqla_byok.orm.rings import SEALED, Across, AcrossRing, SealedRing, StatementRing
from sqla_byok.orm.turns import ACTOR_OPTION, Blocks, Whose, whose
from sqla_byok.orm.types import SearchHash
from sqla_byok.orm.writes import fill, refuse_compiled

__all__ = ["attach"]


def attach(engine: Engine, keyrings: Keyrings, blocks: Blocks, guard: Guard) -> None:
    """Have an engine's statements pass here. Their parameters are hidden from logs and exceptions.

    :param keyrings: where the tenants' keys are.
    :param blocks: tell whose turn it is in this thread or task, where no execution option says it.
    :param guard: judges each compiled statement, and text.
    :raises ConfigurationError: if the engine is attached to other keyrings already.
    """
    # A view made by execution_options() shares its engine's dialect: what is hung on the view alone would leave the
    # engine itself with a dialect that is attached, and statements that nobody prepared.
    engine = getattr(engine, "_proxied", engine)
    attachment = attachment_of(engine.dialect)
    if attachment.keyrings is keyrings:
        return
    if attachment.keyrings is not None:
        raise ConfigurationError(
            "this engine is attached to another Byok already; give each Byok engines of its own"
        )
    attachment.keyrings, attachment.blocks = keyrings, blocks
    statements = Statements(attachment, keyrings, blocks, guard)
    event.listen(engine, "before_execute", statements.before, retval=True)
    event.listen(engine, "handle_error", _hide_parameters)
    upstream.pass_through(engine, statements, Reader)
    engine.hide_parameters = True
    logger: Any = engine.logger
    # With echo=True there is a wrapper of SQLAlchemy's own around it.
    getattr(logger, "logger", logger).addFilter(_hide_rows)


class Statements:
    """What an attached engine does with each of its statements."""

    def __init__(self, attachment: Attachment, keyrings: Keyrings, blocks: Blocks, guard: Guard) -> None:
        self._attachment, self._keyrings, self._blocks, self._guard = attachment, keyrings, blocks, guard

    # -- before it is compiled -------------------------------------------------------------------------------------

    def before(
        self, conn: Any, clause: Any, multi: Any, params: Any, options: Mapping[str, Any]
    ) -> tuple[Any, Any, Any]:
        """Complete an INSERT or UPDATE, and hold DML to the tenant's rows. SQLAlchemy's event ``before_execute``."""
        is_dml = getattr(clause, "is_dml", None)
        if is_dml is None:
            refuse_compiled(clause)
        if not is_dml:
            return clause, multi, params
        statement, rows = upstream.resolved(clause), multi or ([params] if params else [])
        if tenant_column.used:
            clause = statement = tenant_column.check(statement, rows, whose(options, self._blocks))
        if not statement.is_delete and (filled := fill(statement, rows)) is not None:
            clause, rows = filled
            multi, params = (rows, {}) if multi else ([], rows[0] if rows else {})
        return clause, multi, params

    # -- compiled, its parameters not yet bound --------------------------------------------------------------------

    def judge_text(self, statement: str) -> None:
        """Look at a statement that is text."""
        _refuse(self._guard.text(statement))

    def judge_ddl(self, compiled: Any) -> None:
        """Look at compiled DDL, which may have a SELECT in it."""
        _refuse(self._guard.judge(compiled).refusal)

    def needs(self, compiled: Any) -> Needs | None:
        """What a compiled statement needs; None where nothing of it concerns us."""
        return upstream.known(compiled, self._ask)

    def _ask(self, compiled: Any) -> Needs | None:
        return needs_of(compiled, self._guard)

    def begin(self, conn: Any, options: Mapping[str, Any], needs: Needs) -> Turn:
        """Whose turn it is, with the keys that the statement needs.

        :raises UnsupportedQueryError: the guard refuses it.
        :raises NoTenantError: it needs a tenant's keys, and there is no tenant.
        :raises KmsError: a tenant has to be opened, and its KMS refuses or does not answer.
        """
        _refuse(needs.refusal)
        tenant = whose(options, self._blocks)
        rings: dict[str | None, StatementRing] = {}
        for owner, need in needs.of.items():
            taker = tenant if owner is None or tenant is SEALED else owner
            if taker is None:
                _refuse_nobody(need)
                continue
            rings[owner] = self._ready(self._ring(conn, taker, options.get(ACTOR_OPTION)), need)
        if needs.conflict is not None and needs.conflict.owner in rings:
            _refuse_upsert(needs.conflict, rings[needs.conflict.owner])
        return Turn(self._attachment, tenant, rings)

    def fan_out(self, needs: Needs, turn: Turn, *, precompiled: bool) -> upstream.FanOut | None:
        """What has the statement compiled anew, where it compares by another number of search salts than there are.

        :param precompiled: whether that cannot be done.
        :raises UnsupportedQueryError: it would have to be, and cannot.
        """
        compared = {owner: need.salts for owner, need in needs.of.items() if need.salts}
        live = {owner: len(turn.rings[owner].live_salts) for owner in compared}
        if live == compared:
            return None
        if precompiled:
            tenants = ", ".join(sorted({str(turn.rings[owner].tenant) for owner in live}))
            raise UnsupportedQueryError(
                f"the search salts of tenant {tenants!r} are being rotated, and this statement was compiled beforehand "
                "for another number of them; execute the statement itself"
            )
        return upstream.FanOut(tuple(live.items()))

    def _ring(self, conn: Any, tenant: Whose, who: Actor | None) -> StatementRing:
        """The keyring of a tenant; of several; of nobody."""
        if isinstance(tenant, SealedRing):
            return tenant
        if isinstance(tenant, Across):
            return AcrossRing(tenant, [self._one(conn, name, who) for name in tenant.names])
        return self._one(conn, tenant, who)

    def _one(self, conn: Any, tenant: str, who: Actor | None) -> Keyring:
        keyrings, clock = self._keyrings, self._keyrings.clock
        ring = keyrings.warm(tenant) or sessions.of_unit(conn, tenant, clock)
        if ring is not None and ring.lease.one_unit and clock.boot() >= ring.fresh_until:
            held = ring
            ring = upstream.run_or_await(lambda: keyrings.look(held), lambda: keyrings.alook(held))
        if ring is None:
            ring = upstream.run_or_await(
                lambda: keyrings.get(tenant, actor=who), lambda: keyrings.aget(tenant, actor=who)
            )
        return ring

    def _ready(self, ring: StatementRing, need: Need) -> StatementRing:
        """The keyring, once the keystore allows what the statement does with hashes."""
        self._check_fresh(ring, need)
        if isinstance(ring, Keyring):
            for written in need.written:
                ring = self._noted(ring, written)
        if ring is SEALED and (need.salts or need.grouped):
            SEALED.search()
        if need.grouped:
            _refuse_groups(ring, need)
        self._check_hashes(ring, need)
        return ring

    def _noted(self, ring: Keyring, written: Written) -> Keyring:
        """The tenant's keyring, once the keystore knows of a table that is about to be written."""
        if ring.searchable is written.allowed_by:
            return ring
        if not ring.searchable.knows(written):
            ring = self._recorded(ring, written)
        ring.searchable.check_write(ring.tenant, written)
        written.allowed_by = ring.searchable
        return ring

    def _recorded(self, ring: Keyring, written: Written) -> Keyring:
        keyrings = self._keyrings
        return upstream.run_or_await(
            lambda: keyrings.record(ring, written), lambda: keyrings.arecord(ring, written)
        )

    def _check_hashes(self, ring: StatementRing, need: Need) -> None:
        """Refuse what is hashed in another way than the tenant's stored hashes, or cannot be searched."""
        compared = need.searched | need.grouped
        for each in ring.rings if isinstance(ring, AcrossRing) else (ring,):
            if not isinstance(each, Keyring) or each.searchable is need.allowed_by:
                continue
            known = each.searchable.knows_all(compared)
            if not known:
                each = self._recorded(each, NOTHING)  # a look whether somebody has written it since
            each.searchable.check(each.tenant, need.hashed, compared)
            if known:
                need.allowed_by = each.searchable

    # -- bound, not yet sent ---------------------------------------------------------------------------------------

    def bound(self, context: Any, needs: Needs, turn: Turn) -> None:
        """Look at what defaults gave for a tenant's column."""
        if needs.names_tenant:
            tenant_column.check_defaults(context, turn.tenant)

    def send(self, conn: Any, context: Any, needs: Needs, turn: Turn) -> None:
        """The last look before the statement goes to the database, in its transaction.

        :raises TenantMismatchError: the transaction has worked for another tenant too.
        :raises KeystoreUnavailableError: keys or salts may have changed since the process looked.
        """
        own, need = turn.rings.get(None), needs.of.get(None)
        if own is not None and own.lease.one_unit:
            sessions.hold(conn, own)
        if needs.sends and isinstance(own, Keyring):
            direct.send(context, self._keyrings, own)
        for owner, each in needs.of.items():
            if owner in turn.rings:
                self._check_fresh(turn.rings[owner], each)
        if need is not None and (need.reads or context.isinsert or context.isupdate):
            is_own = turn.tenant == whose(conn.get_execution_options(), self._blocks)
            updates = need.binds and context.isupdate
            sessions.meet(conn, turn.tenant, own=is_own, reads=need.reads, updates=updates)

    def _check_fresh(self, ring: StatementRing, need: Need) -> None:
        """Refuse to write and to search by keys that may have changed since the process looked."""
        if (need.binds or need.salts or need.grouped) and self._keyrings.clock.boot() >= ring.write_until:
            ring.outdated()

    def fetch(self, strategy: Any, turn: Turn, readers: Sequence[tuple[int, Reader]]) -> Fetch:
        """What stands before a result's cursor strategy, and opens the rows."""
        return Fetch(strategy, turn, readers)


def _refuse_nobody(need: Need) -> None:
    """Refuse without a tenant what needs one. What only binds may go on: NULL can be written without keys."""
    if need.salts or need.grouped:
        does = "compares" if need.salts else "groups by"
        raise NoTenantError(
            f"no tenant is set for this statement, which {does} search hashes: nobody could say whether equal values "
            "have equal hashes; run it in byok.session(tenant, engine)"
        )
    if need.reads:
        raise NoTenantError(
            f"{need.column}: no tenant is set for this statement; run it in byok.session(tenant, engine), within "
            "'with byok.tenant(tenant)', or with the execution option byok_tenant",
            column=need.column,
        )


def _refuse(refusal: tuple[str, str | None] | None) -> None:
    if refusal is not None:
        message, column = refusal
        raise UnsupportedQueryError(message, column=column)


def _refuse_groups(ring: StatementRing, need: Need) -> None:
    """Refuse what tells hashes apart where one value may have several."""
    if isinstance(ring, AcrossRing):
        raise UnsupportedQueryError(
            f"{ring.tenant}: one value has another hash for each tenant; group for each tenant, or in Python"
        )
    if len(ring.live_salts) > 1:
        column = min(spec.column for spec in need.grouped)
        raise UnsupportedQueryError(
            f"{column}: the search salts of tenant {ring.tenant!r} are being rotated, so that one value may have "
            "several hashes: it cannot be grouped by its hash while its salts are being rotated; wait until the rows "
            "are hashed anew, or group in Python",
            tenant=ring.tenant,
            column=column,
        )


def _refuse_upsert(conflict: SearchHash, ring: StatementRing) -> None:
    """Refuse an upsert that finds its conflicts by a hash: it would miss a row hashed by another salt, and add one."""
    if len(ring.live_salts) > 1:
        raise UnsupportedQueryError(
            f"{conflict.column_id}: an upsert cannot find its conflicts while the column's salts are being rotated, "
            "since an equal value may have another hash; look the row up, then update or insert it",
            column=conflict.column_id,
        )


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
