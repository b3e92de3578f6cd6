"""The way of every statement on an attached engine. docs/statements.md tells its life, with a picture.

SQLAlchemy compiles a statement, or finds it compiled, and makes an execution context for it, which here is an
:class:`Execution`. In the order of its steps: :meth:`Statements.complete` gives INSERT and UPDATE their hashes;
:meth:`Statements.ask` looks what the compiled statement needs, once; :meth:`Statements.begin` finds whose turn it is
and opens what is cold; the parameters are bound under that turn; :meth:`Statements.send` looks at the clocks and at the
transaction a last time; and the result keeps the turn, by which rows are opened as they are fetched: see
:mod:`sqla_byok.orm.fetches`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn, cast

from sqlalchemy import Engine, Join, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import StatementError
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import SelectBase

from sqla_byok.errors import ConfigurationError, NoTenantError, NotSearchableError, UnsupportedQueryError
from sqla_byok.keys.jobs import Jobs
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.searchable import NOTHING, HashSpec, Written, refuse_unseen
from sqla_byok.orm import direct, kept, tenant_column, upstream
from sqla_byok.orm.binary import ask_for_binary, learn_of_binary
from sqla_byok.orm.constructs import is_own
from sqla_byok.orm.current import RUNNING, Attachment, Turn, attachment_of
from sqla_byok.orm.earlier import EarlierRows
from sqla_byok.orm.fetches import Columns, Fetch, Reader
from sqla_byok.orm.guard import Guard
from sqla_byok.orm.needs import Need, Needs, needs_of
from sqla_byok.orm.rings import SEALED, Across, AcrossRing, SealedRing, StatementRing, singles
from sqla_byok.orm.sessions import meet, of_unit
from sqla_byok.orm.sql_text import Syntax, explains
from sqla_byok.orm.tenant_column import Database
from sqla_byok.orm.turns import TENANT_OPTION, Blocks, Whose, refuse_overruled, whose
from sqla_byok.orm.types import SearchHash
from sqla_byok.orm.upstream import Call
from sqla_byok.orm.waiting import Waiting
from sqla_byok.orm.writes import (
    fill,
    hashed_table,
    made_known,
    refuse_compiled,
    sources_in,
    written_table,
)

__all__ = ["attach"]


def attach(engine: Engine, keyrings: Keyrings, jobs: Jobs, blocks: Blocks, guard: Guard) -> None:
    """Have an engine's statements pass here. Their parameters are hidden from logs and exceptions.

    :param keyrings: where the tenants' keys are.
    :param jobs: tell how far one is for which a search waits.
    :param blocks: tell whose turn it is in this thread or task, where no execution option says it.
    :param guard: judges each compiled statement, and text.
    :raises ConfigurationError: if the engine is attached to other keyrings already.
    """
    # A view made by execution_options() shares its engine's dialect: what is hung on the view alone would leave the
    # engine itself with a dialect that is attached, and statements that nobody prepared.
    engine = upstream.engine_of(engine)
    attachment = attachment_of(engine.dialect)
    if attachment.keyrings is keyrings:
        return
    if attachment.keyrings is not None:
        raise ConfigurationError(
            "this engine is attached to another Byok already; give each Byok engines of its own"
        )
    attachment.keyrings, attachment.blocks = keyrings, blocks
    statements = Statements(attachment, keyrings, jobs, blocks, guard)
    event.listen(engine, "handle_error", _hide_parameters)
    binary = engine.dialect.driver in ("psycopg", "psycopg_async")
    upstream.step_in(engine, Execution, statements=statements, binary=binary)
    engine.hide_parameters = True
    logger: Any = engine.logger
    # With echo=True there is a wrapper of SQLAlchemy's own around it.
    getattr(logger, "logger", logger).addFilter(_hide_rows)


class Statements:
    """What an attached engine does with each of its statements."""

    def __init__(
        self, attachment: Attachment, keyrings: Keyrings, jobs: Jobs, blocks: Blocks, guard: Guard
    ) -> None:
        self._attachment, self._keyrings, self._blocks, self._guard = attachment, keyrings, blocks, guard
        self._earlier, self._waiting = EarlierRows(), Waiting(jobs, keyrings.clock)

    # -- as it was given -------------------------------------------------------------------------------------------

    def complete(self, conn: Any, options: Mapping[str, Any], call: Call) -> Call:
        """Give an INSERT or UPDATE its hashes, and hold DML to the tenant's rows.

        :param call: what is to be executed.
        :returns: what is executed in its place; the same where there is nothing to do.
        """
        tenant = whose(options, conn, self._blocks) if tenant_column.used else None
        if call.clause is None:
            if tenant_column.used:
                tenant_column.refuse_compiled(call.compiled, tenant)
            refuse_compiled(call.compiled)
            return call
        given, given_rows = call.clause, call.parameters or ()
        if not isinstance(given, UpdateBase):
            given = upstream.inside(given)
        if not getattr(given, "is_dml", False):
            return call
        statement, rows, held, filled = given, given_rows, None, None
        database = Database(conn.dialect, options.get("schema_translate_map"))
        if tenant_column.used:
            refuse_overruled(call.clause.get_execution_options(), options, conn.get_execution_options())
            held = tenant_column.check(statement, rows, tenant, database)
            statement = given if held is None else held
        if not statement.is_delete and (filled := fill(statement, rows)) is not None:
            statement, rows = filled
        if held is not None:
            statement = tenant_column.hold_conflicts(statement, tenant, database)
        if statement is not given:
            clause = upstream.instead(call.clause, statement)
            call = upstream.compiled_anew(conn, options, clause, rows)
        elif rows is not given_rows:
            call = _with_rows(conn, options, call, rows)
        if held is not None or filled is not None:
            _refuse_replacing(call.compiled, given, given_rows)
        return call

    # -- compiled, its parameters not yet bound --------------------------------------------------------------------

    def judge_text(self, statement: str) -> None:
        """Look at a statement that is text."""
        _refuse(self._guard.text(statement))

    def judge_ddl(self, compiled: Any) -> None:
        """Look at compiled DDL, which may have a SELECT in it."""
        _refuse(self._guard.judge(compiled).refusal)

    def ask(self, compiled: Any) -> Needs | None:
        """What a compiled statement needs; None where nothing of it concerns us. Kept with the statement."""
        upstream.forget_metadata(
            compiled
        )  # of a cache of the application's, from before the engine was attached
        if is_own(compiled.statement) and explains(compiled.string, Syntax.of(compiled.dialect)):
            upstream.forget_columns(compiled)
        needs = compiled.__dict__[kept.NEEDS] = needs_of(compiled, self._guard)
        return needs

    def begin(self, conn: Any, options: Mapping[str, Any], needs: Needs) -> tuple[Turn, bool]:
        """Whose turn it is, with the keys that the statement needs.

        :returns: also whether it was compiled for as many search salts as there are.
        :raises UnsupportedQueryError: the guard refuses it.
        :raises NoTenantError: it needs a tenant's keys, and there is no tenant.
        :raises KmsError: a tenant has to be opened, and its KMS refuses or does not answer.
        """
        tenant = whose(options, conn, self._blocks)
        if needs.tenant_rows is not None:
            tenant_column.check_compiled(needs.tenant_rows, tenant)
        if needs.refusal is not None:
            _refuse(needs.refusal)
        rings: dict[str | None, StatementRing] = {}
        fits = True
        for owner, need in needs.of.items():
            taker = tenant if owner is None or tenant is SEALED else owner
            if taker is None:
                _refuse_nobody(need)
                continue
            ring: StatementRing | None = self._keyrings.warm(taker)  # type: ignore[arg-type] # only a name is found
            if ring is None:
                ring = self._ring(conn, taker)
            if need.hashes and ring.searchable is not need.allowed_by:
                ring = self._ready(conn, ring, need)
            if need.salts and need.salts != len(ring.live_salts):
                fits = False
            rings[owner] = ring
        if needs.conflict is not None and needs.conflict.owner in rings:
            _refuse_upsert(needs.conflict, rings[needs.conflict.owner])
        return Turn(self._attachment, tenant, rings), fits

    def fan_out(self, conn: Any, options: Mapping[str, Any], call: Call, needs: Needs, turn: Turn) -> Call:
        """The statement compiled for as many search salts as there are."""
        if call.clause is None:
            _refuse_precompiled(turn)
        if is_own(call.clause) and not isinstance(call.clause, SelectBase | UpdateBase):
            _refuse_within_own(turn)
        live = {owner: len(turn.rings[owner].live_salts) for owner, need in needs.of.items() if need.salts}
        statement = upstream.inside(call.clause).options(upstream.FanOut(tuple(live.items())))
        clause = upstream.instead(call.clause, statement)
        return upstream.compiled_anew(conn, options, clause, call.parameters)

    def _ring(self, conn: Any, tenant: Whose) -> StatementRing:
        """The keyring of a tenant; of several; of nobody."""
        if isinstance(tenant, SealedRing):
            return tenant
        if isinstance(tenant, Across):
            return AcrossRing(tenant, [self._one(conn, name) for name in tenant.names])
        return self._one(conn, tenant)

    def _one(self, conn: Any, tenant: str) -> Keyring:
        keyrings, clock = self._keyrings, self._keyrings.clock
        ring = keyrings.warm(tenant) or of_unit(conn, tenant, clock)
        if ring is not None and ring.lease.one_unit and clock.boot() >= ring.fresh_until:
            held = ring
            ring = upstream.run_or_await(lambda: keyrings.look(held), lambda: keyrings.alook(held))
        if ring is None:
            turn = conn.__dict__.get(kept.TURN)
            actor = None if turn is None else turn.actor
            ring = upstream.run_or_await(
                lambda: keyrings.get(tenant, actor=actor), lambda: keyrings.aget(tenant, actor=actor)
            )
        return ring

    def _ready(self, conn: Any, ring: StatementRing, need: Need) -> StatementRing:
        """The keyring, once the keystore allows what the statement does with hashes."""
        self._check_current(ring, need)
        if isinstance(ring, Keyring):
            for written in need.written:
                ring = self._noted(conn, ring, written)
        if ring is SEALED and (need.salts or need.grouped):
            SEALED.search()
        if need.grouped:
            _refuse_groups(ring, need)
        known = [self._check_hashes(conn, each, need) for each in singles(ring)]
        if isinstance(ring, Keyring) and all(known) and not need.grouped:
            need.allowed_by = ring.searchable
        return ring

    def _noted(self, conn: Any, ring: Keyring, written: Written) -> Keyring:
        """The tenant's keyring, once the keystore knows of a table that is about to be written.

        :raises NotSearchableError: rows from before are there, which a unique index of it does not see.
        """
        if not ring.searchable.knows(written):
            table = written_table(written)
            sources = () if table is None else sources_in(table, written.specs)
            late = table is not None and self._earlier.are_in(conn, ring, table, sources)
            ring = self._look(ring, written, late)
            if late and written.unique:
                refuse_unseen(ring.tenant, min(written.unique))
        ring.searchable.check_write(ring.tenant, written)
        return ring

    def _check_hashes(self, conn: Any, ring: Keyring, need: Need) -> bool:
        """Refuse what is hashed in another way than the tenant's stored hashes, or cannot be searched.

        :returns: whether all that is compared was hashed before. Where not, somebody may do so at any time.
        """
        compared = need.searched | need.grouped
        known = ring.searchable.knows_all(compared)
        if not known:
            ring = self._look(ring, NOTHING)  # a look whether somebody has written it since
            for spec in compared:
                if spec.column not in ring.searchable.specs and spec.table not in ring.searchable.tables:
                    ring = self._known(conn, ring, spec)
        try:
            ring.searchable.check(ring.tenant, need.hashed, compared)
        except NotSearchableError as error:
            job = ring.searchable.job(error.column or "")
            if not job:
                raise
            raise self._how_far(error, job) from None
        return known

    def _how_far(self, error: NotSearchableError, job: str) -> NotSearchableError:
        return upstream.run_or_await(
            lambda: self._waiting.told(error, job), lambda: self._waiting.atold(error, job)
        )

    def _known(self, conn: Any, ring: Keyring, spec: HashSpec) -> Keyring:
        """The tenant's keyring, once it is known whether rows from before are in a table that is searched first."""
        table = hashed_table(spec)
        if table is None:
            return ring
        if not ring.searchable.tables and spec.owner is None:
            return ring
        sources = sources_in(table, [spec.column])
        self._earlier.refuse_plaintext(conn, table, sources)
        if self._earlier.are_in(conn, ring, table, sources):
            of_column = next(each for each in made_known(table).values() if spec.column in each.specs)
            ring = self._look(ring, of_column, late=True)
        return ring

    def _look(self, ring: Keyring, written: Written, late: bool = False) -> Keyring:
        keyrings = self._keyrings
        return upstream.run_or_await(
            lambda: keyrings.note(ring, written, late=late), lambda: keyrings.anote(ring, written, late=late)
        )

    def _look_again(self, ring: StatementRing) -> None:
        """Look at the keystore where binding took long, as it does with many values or with the customer's KMS."""
        keyrings = self._keyrings
        for each in singles(ring):
            if keyrings.clock.boot() >= each.write_until:
                upstream.run_or_await(partial(keyrings.look, each), partial(keyrings.alook, each))

    def _check_current(self, ring: StatementRing, need: Need) -> None:
        """Refuse to write and to search by keys that may have changed since the process looked."""
        if need.current and self._keyrings.clock.boot() >= ring.write_until:
            ring.outdated()

    # -- bound, not yet sent ---------------------------------------------------------------------------------------

    def send(self, context: Any, needs: Needs, turn: Turn) -> None:
        """The last look before the statement goes to the database, in its transaction.

        :raises TenantMismatchError: the transaction has worked for another tenant too.
        :raises KeystoreUnavailableError: keys or salts may have changed since the process looked.
        """
        conn, own = context.root_connection, turn.rings.get(None)
        if own is not None and own.lease.one_unit:
            kept.hold(conn, own)
        if needs.sends and isinstance(own, Keyring):
            direct.send(context, self._keyrings, own)
        now = self._keyrings.clock.boot()
        for owner, ring in turn.rings.items():
            if now >= ring.write_until and needs.of[owner].current:
                self._look_again(ring)
                self._check_current(ring, needs.of[owner])
        need = needs.of.get(None)
        if need is not None and (need.reads or context.isinsert or context.isupdate):
            met = conn.__dict__.get(kept.MET)
            if met is not None and met[0] is conn.get_transaction():  # as most often: nothing to refuse
                if need.reads and not met[1]:
                    met[1].append(turn.tenant)
                if met[1] == [turn.tenant]:
                    return
            updates = need.binds and context.isupdate
            meet(
                conn, context.execution_options, turn.tenant, self._blocks, reads=need.reads, updates=updates
            )


class Execution(upstream.Steps):
    """The way of one statement, as its execution context takes it; mixed into that of the engine's dialect.

    :cvar statements: what the engine does with each of its statements.
    :cvar binary: whether its driver may have to be asked for binary results.
    """

    statements: ClassVar[Statements]
    binary: ClassVar[bool]

    _byok: tuple[Needs, Turn] | None = None  # of a statement that needs something
    _byok_readers: list[Reader | None] | None = None  # of the columns that processors were asked for

    @classmethod
    def of_text(cls, dialect: Any, conn: Any, dbapi: Any, options: Any, text: str, parameters: Any) -> Any:
        cls.statements.judge_text(text)
        return super().of_text(dialect, conn, dbapi, options, text, parameters)

    @classmethod
    def of_ddl(cls, dialect: Any, conn: Any, dbapi: Any, options: Any, compiled: Any) -> Any:
        cls.statements.judge_ddl(compiled)
        return super().of_ddl(dialect, conn, dbapi, options, compiled)

    @classmethod
    def of_compiled(
        cls, dialect: Any, conn: Any, dbapi: Any, options: Any,
        compiled: Any, parameters: Any, clause: Any, extracted: Any, **more: Any,
    ) -> Any:  # fmt: skip
        statements = cls.statements
        if not isinstance(clause, SelectBase):
            call = Call(compiled, parameters, clause, extracted, more)
            compiled, parameters, clause, extracted, more = statements.complete(conn, options, call)
        needs = compiled.__dict__.get(kept.NEEDS, kept.UNASKED)
        if needs is kept.UNASKED:
            needs = statements.ask(compiled)
        if needs is None:
            return super().of_compiled(
                dialect, conn, dbapi, options, compiled, parameters, clause, extracted, **more
            )
        own: Mapping[str, Any] = {} if clause is None else cast("Any", clause).get_execution_options()
        if TENANT_OPTION in own:
            refuse_overruled(own, options, conn.get_execution_options())
        turn, fits = statements.begin(conn, options, needs)
        if not fits:
            call = Call(compiled, parameters, clause, extracted, more)
            compiled, _, clause, extracted, more = statements.fan_out(conn, options, call, needs, turn)
        token = RUNNING.set(turn)
        try:
            self = super().of_compiled(
                dialect, conn, dbapi, options, compiled, parameters, clause, extracted, **more
            )
        finally:
            RUNNING.reset(token)
        self._byok = needs, turn
        if cls.binary and not self.executemany:
            ask_for_binary(self)
        if needs.tenant_rows is not None and needs.tenant_rows.defaults:
            tenant_column.check_defaults(self, turn.tenant)
        return self

    def about_to_be_sent(self) -> None:
        super().about_to_be_sent()
        if self._byok is not None:
            try:
                self.statements.send(self, *self._byok)
            except BaseException:
                self.cursor.close()
                raise

    def processor_of(self, type_: Any, name: str, coltype: Any) -> Any:
        process = super().processor_of(type_, name, coltype)
        if self._byok is None:
            return process
        if self._byok_readers is None:
            self._byok_readers = kept.gather(self.compiled)
        reads = isinstance(process, Reader) and not upstream.reads_early(self)
        self._byok_readers.append(process if reads else None)
        return None if reads else process

    def result_of(self) -> Any:
        if self._byok is None:
            return super().result_of()
        (_, turn), known = self._byok, self.compiled.__dict__
        if known.get(kept.COLUMNS) is not None:
            result = super().result_of()
        else:
            token = RUNNING.set(turn)  # for what it reads itself
            try:
                result = super().result_of()
            finally:
                RUNNING.reset(token)
        columns = self._columns()
        if columns is not None:
            if self.binary and not self.executemany:
                learn_of_binary(self)
            result.cursor_strategy = Fetch(result.cursor_strategy, turn, columns)
        return result

    def _columns(self) -> Columns | None:
        """The columns of the result that are opened at the fetch.

        SQLAlchemy keeps a result's metadata with the compiled statement before we have kept its columns. Another
        thread, or whoever comes after an interrupt, may meet the one alone: the readers are there before both.
        """
        there, readers = self.compiled.__dict__, self._byok_readers
        if readers is None:
            if kept.COLUMNS in there:
                found: Columns | None = there[kept.COLUMNS]
                return found
            readers = max(there.get(kept.READERS, ()), key=len, default=None)
        if readers is None:
            return None
        columns = there[kept.COLUMNS] = Columns.of(readers)
        return columns


def _with_rows(conn: Any, options: Mapping[str, Any], call: Call, rows: Sequence[Any]) -> Call:
    """The same statement compiled for rows with other keys; kept, since a flush makes the same ones each time."""
    known = call.compiled.__dict__.setdefault(kept.WITH_ROWS, {})
    keys = tuple(rows[0]) if rows else ()
    compiled = known.get(keys)
    if compiled is None:
        compiled = known[keys] = upstream.compiled_anew(conn, options, call.clause, rows).compiled
    return call._replace(compiled=compiled, parameters=rows)


def _refuse_replacing(compiled: Any, dml: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    columns: Any = () if isinstance(dml.table, Join) else dml.table.c
    given: set[str] = set().union(*rows)
    names = [name for name in given if name not in columns and name in compiled.binds]
    name = upstream.replacing(compiled, names) if names else None
    if name is not None:
        raise UnsupportedQueryError(
            f"the parameter {name!r} has the name of a value that the statement itself has, and would be sent in its "
            "place, past what was checked of it; leave it out, or give the value as bindparam() under another name"
        )


def _refuse_precompiled(turn: Turn) -> NoReturn:
    raise UnsupportedQueryError(
        f"the search salts of tenant {_names(turn)!r} are being rotated, and this statement was compiled beforehand "
        "for another number of them; execute the statement itself"
    )


def _refuse_within_own(turn: Turn) -> NoReturn:
    raise UnsupportedQueryError(
        f"the search salts of tenant {_names(turn)!r} are being rotated, and this statement is a construct of "
        "somebody's own, in which a search is for one of them only; execute the statement within it"
    )


def _names(turn: Turn) -> str:
    return ", ".join(sorted(str(ring.tenant) for ring in turn.rings.values()))


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
