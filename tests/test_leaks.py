"""No plaintext and no key shows in an exception, a traceback, a log record, a repr or a cache key.

Each way to fail is one row of a table. A row that does not fail, or fails with something else, is a failing test.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from canary import CANARY, Base, Log, Needles, Patient, Planted, chain, shown_by
from kms_server import KmsServer
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Engine,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Time,
    Uuid,
    bindparam,
    case,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import (
    CompileError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
    StatementError,
)
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from sqla_byok import (
    AccessDeniedError,
    AwsKms,
    Byok,
    ConfigurationError,
    DecryptError,
    EncodeError,
    Encrypted,
    KeyDeletedError,
    KeyDisabledError,
    KeysExpiredError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    KmsRefusedError,
    KmsUnavailableError,
    LocalKms,
    NotAttachedError,
    NoTenantError,
    NotEncryptedError,
    TamperedError,
    TenantMismatchError,
    ThrottledError,
    UnknownDataKeyError,
    UnsupportedQueryError,
    WrongKeyError,
    search_hash,
)
from sqla_byok.kms import aws_api

TYPES = {
    "integer": Integer(),
    "small_integer": SmallInteger(),
    "big_integer": BigInteger(),
    "float": Float(),
    "numeric": Numeric(8, 2),
    "boolean": Boolean(),
    "date": Date(),
    "datetime": DateTime(),
    "time": Time(),
    "interval": Interval(),
    "uuid": Uuid(),
    "bytes": LargeBinary(40),
    "enum": Enum("new", "old"),
}
EVERY = Table(
    "every_type",
    MetaData(),
    *(Column(name, Encrypted(type_)) for name, type_ in TYPES.items()),
)


def flipped(stored: bytes) -> bytes:
    """The stored value with one bit of its last byte changed."""
    return stored[:-1] + bytes([stored[-1] ^ 1])


class World:
    """An attached engine with one patient of tenant t1, whose every text is the canary, and a session of t1."""

    def __init__(self, byok: Byok, engine: Engine, folder: Path, needs: ExitStack) -> None:
        self.byok, self.engine, self.folder, self.needs = byok, engine, folder, needs
        Base.metadata.create_all(engine)
        self.s: Session = needs.enter_context(byok.session("t1", engine))
        self.flush(id=1, name=CANARY, mrn=CANARY, email=CANARY, code=CANARY, findings={"a": CANARY})
        self.s.commit()

    def flush(self, **values: Any) -> None:
        """Add a patient in the session and flush."""
        self.s.add(Patient(**{"id": 2, "name": CANARY, **values}))
        self.s.flush()

    def search(self, *criteria: Any, **parameters: Any) -> None:
        """Look for patients."""
        self.s.scalars(select(Patient.id).where(*criteria), parameters or None).all()

    def core(self, statement: Any, rows: Any = None) -> None:
        """Run a Core statement."""
        self.s.connection().execute(statement, rows)

    def upsert(self, values: dict[str, Any], changes: dict[str, Any]) -> None:
        """INSERT, or change the row that has the same id."""
        dialect = self.engine.dialect.name
        statement: Any = (
            {"sqlite": sqlite, "postgresql": postgresql}.get(dialect, mysql).insert(Patient).values(values)
        )  # type: ignore[attr-defined]
        if dialect == "mariadb":
            statement = statement.on_duplicate_key_update(**changes)
        else:
            statement = statement.on_conflict_do_update(index_elements=["id"], set_=changes)
        self.s.execute(statement)

    def unattached(self) -> Engine:
        """Another engine on the same database, which no Byok knows."""
        engine = create_engine(self.engine.url, hide_parameters=True)
        self.needs.callback(engine.dispose)
        return engine

    def store(self, **stored: Any) -> None:
        """Put bytes into the patient's row, as somebody would who can write to the database."""
        with self.unattached().begin() as connection:
            sets = ", ".join(f"{name} = :{name}" for name in stored)
            connection.execute(text(f"UPDATE patient SET {sets}"), stored)

    def stored(self, name: str) -> bytes:
        """What the database has in a column of the patient's row."""
        with self.unattached().connect() as connection:
            return bytes(connection.scalar(text(f"SELECT {name} FROM patient")))

    def read(self, column: Any) -> None:
        """Read the column of every patient, with a keyring that is there."""
        self.s.execute(select(column)).all()

    def setenv(self, keystore_key: str) -> None:
        """Hold a keystore key in the environment."""
        patch = pytest.MonkeyPatch()
        self.needs.callback(patch.undo)
        patch.setenv("LEAKS_KEYSTORE_KEY", keystore_key)

    def disconnect(self) -> None:
        """End the session's connection from outside, in the middle of its transaction."""
        dialect = self.engine.dialect.name
        if dialect == "sqlite":
            connection: Any = self.s.connection().connection.dbapi_connection
            connection.close()
            return
        ask, end = {
            "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({}, 5000)"),
            "mariadb": ("SELECT CONNECTION_ID()", "KILL {}"),
        }[dialect]
        backend = self.s.scalar(text(ask))
        with self.unattached().connect() as other:
            other.exec_driver_sql(end.format(backend))


class Failure(NamedTuple):
    """One way to fail: its name, what to do, and what is raised."""

    name: str
    act: Callable[[World], Any]
    raises: type[BaseException] | tuple[type[BaseException], ...]


class _Talkative:
    def __repr__(self) -> str:
        return f"talks of {CANARY}"


def lose_the_key_file(world: World) -> None:
    """Take the customer's key file away."""
    world.byok.forget_keys()
    (world.folder / "customer.key").unlink()


def without_a_key(act: Callable[[World], Any]) -> Callable[[World], Any]:
    """Do it after the customer's key file is gone."""
    return lambda world: (lose_the_key_file(world), act(world))


def tamper_keystore(world: World, statement: str) -> None:
    """Change the keystore's database behind the library's back."""
    engine = create_engine(f"sqlite:///{world.folder / 'keystore.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()
    world.byok.forget_keys()


def an_enum_that_lost_a_name(world: World) -> None:
    """Read a value of an Enum that the class of today no longer has."""
    then, now = (
        Table(
            "lost",
            MetaData(),
            Column("id", Integer, primary_key=True),
            Column("kind", Encrypted(Enum(*names, name="k"))),
        )
        for names in (("new", CANARY), ("new", "other"))
    )
    then.create(world.engine)
    # By an engine of its own: a name that a type declares is no secret, and stands in the cache of its statements.
    before = world.unattached()
    world.byok.attach(before)
    with world.byok.session("t1", before) as session:
        session.execute(insert(then), {"id": 1, "kind": CANARY})
        session.commit()
    world.s.execute(select(now.c.kind)).all()


def another_tenants_row(world: World, *, warm: bool) -> None:
    """Read t1's row for t2, with t1's keys in memory or not."""
    world.s.commit()
    if not warm:
        world.byok.forget_keys()
    with world.byok.session("t2", world.engine) as session:
        session.scalars(select(Patient.name)).all()


def expired_while_reading(world: World) -> None:
    """Lose the keys between executing and fetching."""
    result = world.s.execute(select(Patient.name))
    world.byok.forget_keys()
    result.all()


def no_tenant(world: World) -> None:
    """Write in a session that belongs to nobody."""
    with Session(world.engine) as session:
        session.add(Patient(id=2, name=CANARY, mrn=CANARY))
        session.flush()


def not_attached(world: World, *, write: bool) -> None:
    """Use an engine that no Byok knows."""
    with Session(world.unattached()) as session:
        if write:
            session.add(Patient(id=2, name=CANARY, mrn=CANARY))
            session.flush()
        session.scalars(select(Patient.id).where(Patient.mrn == CANARY)).all()


def failing_listener(world: World, *, talks: bool) -> None:
    """An audit hook of the user's own fails, and may repeat what the driver was given."""

    def audit(
        conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        raise RuntimeError(
            f"the audit log is full: {statement} {parameters!r}" if talks else "the audit log is full"
        )

    event.listen(world.engine, "after_cursor_execute", audit)
    world.flush(mrn=f"{CANARY}2")


def stale(world: World) -> None:
    """Change a patient whose row somebody has deleted meanwhile."""
    patient = world.s.get_one(Patient, 1)
    world.core(delete(Patient))
    patient.mrn = patient.name = f"{CANARY}2"
    world.s.flush()


def pending_rollback(world: World) -> None:
    """Go on with a session whose flush failed: the message repeats the first failure."""
    with suppress(IntegrityError):
        world.flush(mrn=CANARY)
    world.search(Patient.mrn == CANARY)


def savepoint(world: World) -> None:
    """Fail within a savepoint."""
    with world.s.begin_nested():
        world.flush(mrn=CANARY)


def go_on_after_disconnect(world: World) -> None:
    """Use a connection that was lost in its transaction."""
    world.disconnect()
    with suppress(StatementError):
        world.search(Patient.mrn == CANARY)
    world.search(Patient.mrn == CANARY)


SURROGATE = f"{CANARY}\ud800"
LONG = CANARY * 5

# What is refused before a row or a query reaches the database: the database makes no difference.
REFUSED = [
    # the customer's KMS and the keystore
    Failure("key file gone, flush", without_a_key(lambda w: w.flush(mrn=f"{CANARY}2")), KeyDeletedError),
    Failure("key file gone, search", without_a_key(lambda w: w.search(Patient.mrn == CANARY)), KeyDeletedError),
    Failure("key file gone, lazy load", without_a_key(lambda w: w.s.get_one(Patient, 1).name), KeyDeletedError),
    Failure("onboarding with a key file that is gone",
            without_a_key(lambda w: w.byok.onboard("t3", LocalKms(w.folder / "customer.key"))), KeyDeletedError),
    Failure("another key file in its place",
            without_a_key(lambda w: (LocalKms.create(w.folder / "customer.key"), w.flush())), WrongKeyError),
    Failure("keystore tables gone",
            lambda w: (tamper_keystore(w, "ALTER TABLE byok_wrapping RENAME TO gone"), w.flush()),
            KeystoreUnavailableError),
    Failure("keystore epoch altered",
            lambda w: (tamper_keystore(w, "UPDATE byok_tenant SET epoch = 9"), w.flush()), KeystoreTamperedError),
    Failure("keystore record altered",
            lambda w: (tamper_keystore(w, "UPDATE byok_generation SET sealed = zeroblob(62)"), w.flush()),
            KeystoreTamperedError),
    *(Failure(f"keystore server does not answer, {driver}",
              lambda w, url=f"{driver}://byok:{CANARY}@127.0.0.1:1/byok": Byok(url).tenants(), KeystoreUnavailableError)
      for driver in ("postgresql+psycopg", "mariadb+pymysql", "postgresql+asyncpg", "mariadb+asyncmy")),
    Failure("keystore key that is none", lambda w: Byok("sqlite://", keystore_key=CANARY), ConfigurationError),
    Failure("keystore key of a wrong size",
            lambda w: (w.setenv(f"{CANARY}{CANARY}"), Byok("sqlite://", keystore_key="env:LEAKS_KEYSTORE_KEY")),
            ConfigurationError),
    Failure("keystore key that is not base64",
            lambda w: (w.setenv(f"!{CANARY}"), Byok("sqlite://", keystore_key="env:LEAKS_KEYSTORE_KEY")),
            ConfigurationError),
    Failure("wrapped tenant key altered",
            lambda w: (tamper_keystore(w, "UPDATE byok_wrapping SET wrapped = zeroblob(95)"), w.flush()),
            WrongKeyError),
    # values that do not fit
    *(Failure(f"text in a {name} column",
              lambda w, name=name: w.core(insert(EVERY).values({name: CANARY})), EncodeError)
      for name in TYPES),
    Failure("list in a text column, flush", lambda w: w.flush(mrn=[CANARY]), EncodeError),
    Failure("list in a text column, search", lambda w: w.search(Patient.mrn == [CANARY]), EncodeError),
    Failure("too long, flush", lambda w: w.flush(name=LONG), EncodeError),
    Failure("too long, searchable", lambda w: w.flush(mrn=LONG), EncodeError),
    Failure("too long, executemany",
            lambda w: w.core(insert(Patient), [{"id": 2, "name": CANARY}, {"id": 3, "name": LONG}]), EncodeError),
    Failure("too long, multi-VALUES",
            lambda w: w.core(insert(Patient).values([{"id": 2, "name": CANARY}, {"id": 3, "name": LONG}])),
            EncodeError),
    Failure("too long, update", lambda w: w.core(update(Patient).values(name=LONG)), EncodeError),
    Failure("lone surrogates, flush", lambda w: w.flush(name=SURROGATE), EncodeError),
    Failure("lone surrogates, searchable", lambda w: w.flush(mrn=SURROGATE), EncodeError),
    Failure("lone surrogates, search", lambda w: w.search(Patient.mrn == SURROGATE), EncodeError),
    Failure("lone surrogates, normalized search", lambda w: w.search(Patient.email == SURROGATE), EncodeError),
    Failure("lone surrogates, user's type", lambda w: w.flush(code=SURROGATE), EncodeError),
    Failure("lone surrogates in a JSON key", lambda w: w.flush(findings={SURROGATE: {1, 2}}), EncodeError),
    Failure("user's type raises, flush", lambda w: w.flush(code=f"unwritable {CANARY}"), EncodeError),
    Failure("user's type raises, search", lambda w: w.search(Patient.code == f"unwritable {CANARY}"), EncodeError),
    Failure("user's type raises, IN", lambda w: w.search(Patient.code.in_([f"unwritable {CANARY}"])), EncodeError),
    Failure("user's type raises on what it is given", lambda w: w.flush(code=_Talkative()), EncodeError),
    Failure("user's type raises, read",
            lambda w: (w.flush(code=f"unreadable {CANARY}"), w.read(Patient.code)), DecryptError),
    Failure("normalizer raises, flush", lambda w: w.flush(email=f"unkind {CANARY}"), EncodeError),
    Failure("normalizer raises, search", lambda w: w.search(Patient.email == f"unkind {CANARY}"), EncodeError),
    Failure("normalizer raises, NOT IN", lambda w: w.search(Patient.email.not_in([f"unkind {CANARY}"])), EncodeError),
    Failure("name the Enum does not have, flush", lambda w: w.flush(kind=CANARY), EncodeError),
    Failure("name the Enum does not have, search", lambda w: w.search(Patient.kind == CANARY), EncodeError),
    Failure("name the Enum no longer has, read", an_enum_that_lost_a_name, DecryptError),
    Failure("integer out of range", lambda w: w.flush(age=int.from_bytes(CANARY.encode(), "big")), EncodeError),
    Failure("not JSON", lambda w: w.flush(findings={"a": CANARY, "b": _Talkative()}), EncodeError),
    Failure("not JSON, key", lambda w: w.flush(findings={(CANARY,): 1}), EncodeError),
    # queries that would run on ciphertext
    Failure("LIKE", lambda w: w.search(Patient.mrn.like(f"{CANARY}%")), UnsupportedQueryError),
    Failure("ILIKE", lambda w: w.search(Patient.mrn.ilike(f"{CANARY}%")), UnsupportedQueryError),
    Failure("startswith", lambda w: w.search(Patient.mrn.startswith(CANARY)), UnsupportedQueryError),
    Failure("contains", lambda w: w.search(Patient.mrn.contains(CANARY)), UnsupportedQueryError),
    Failure("regexp_match", lambda w: w.search(Patient.mrn.regexp_match(CANARY)), UnsupportedQueryError),
    Failure("match", lambda w: w.search(Patient.mrn.match(CANARY)), UnsupportedQueryError),
    Failure("greater than", lambda w: w.search(Patient.mrn > CANARY), UnsupportedQueryError),
    Failure("BETWEEN", lambda w: w.search(Patient.mrn.between(CANARY, LONG)), UnsupportedQueryError),
    Failure("concatenation", lambda w: w.search((Patient.mrn + CANARY).is_(None)), UnsupportedQueryError),
    Failure("concatenation, reversed", lambda w: w.search((CANARY + Patient.mrn).is_(None)), UnsupportedQueryError),
    Failure("concatenation, reversed, Core",
            lambda w: w.search((CANARY + Patient.__table__.c.mrn).is_(None)), UnsupportedQueryError),
    Failure("concat()", lambda w: w.search(Patient.mrn.concat(CANARY).is_(None)), UnsupportedQueryError),
    Failure("operator of one's own", lambda w: w.search(Patient.mrn.op("~")(CANARY)), UnsupportedQueryError),
    Failure("IS a value", lambda w: w.search(Patient.mrn.is_(CANARY)), UnsupportedQueryError),
    Failure("IS DISTINCT FROM", lambda w: w.search(Patient.mrn.is_distinct_from(CANARY)), UnsupportedQueryError),
    Failure("into JSON", lambda w: w.search(Patient.findings[CANARY].is_(None)), UnsupportedQueryError),
    Failure("IN with a string", lambda w: w.search(Patient.mrn.in_(CANARY)), UnsupportedQueryError),
    Failure("NOT IN with bytes",
            lambda w: w.search(Patient.mrn.not_in(CANARY.encode())), UnsupportedQueryError),
    Failure("IN with an object", lambda w: w.search(Patient.mrn.in_(_Talkative())), UnsupportedQueryError),
    Failure("IN with a SELECT in the list",
            lambda w: w.search(Patient.mrn.in_([CANARY, select(Patient.mrn)])), UnsupportedQueryError),
    Failure("IN with a class in the list", lambda w: w.search(Patient.mrn.in_([CANARY, Patient])), EncodeError),
    Failure("equality, not searchable", lambda w: w.search(Patient.name == CANARY), UnsupportedQueryError),
    Failure("IN, not searchable", lambda w: w.search(Patient.name.in_([CANARY])), UnsupportedQueryError),
    Failure("a literal on the left", lambda w: w.search(literal(CANARY) == Patient.mrn), UnsupportedQueryError),
    Failure("a literal on the left of the hash",
            lambda w: w.search(literal(CANARY) == search_hash(Patient.mrn)), UnsupportedQueryError),
    Failure("equality of a function", lambda w: w.search(func.lower(Patient.mrn) == CANARY), UnsupportedQueryError),
    Failure("case of a value", lambda w: w.search(case({CANARY: 1}, value=Patient.mrn) == 1), UnsupportedQueryError),
    Failure("coalesce with a literal",
            lambda w: w.s.execute(select(func.coalesce(Patient.mrn, CANARY))), UnsupportedQueryError),
    Failure("a tuple", lambda w: w.search(tuple_(Patient.id, Patient.mrn).in_([(1, CANARY)])), UnsupportedQueryError),
    Failure("a name for two columns",
            lambda w: w.search(Patient.mrn == bindparam("q"), Patient.size == bindparam("q"), q=CANARY),
            (UnsupportedQueryError, StatementError)),
    Failure("equality with a function", lambda w: w.search(Patient.mrn == func.lower(CANARY)), UnsupportedQueryError),
    # statements that would write what no hash follows
    Failure("INSERT of an expression",
            lambda w: w.core(insert(Patient).values(id=2, name=CANARY, mrn=func.lower(CANARY))), UnsupportedQueryError),
    Failure("UPDATE of an expression",
            lambda w: w.core(update(Patient).values(name=func.lower(CANARY))), UnsupportedQueryError),
    Failure("UPDATE of a CAST",
            lambda w: w.core(update(Patient).values(name=literal(CANARY) + "")), UnsupportedQueryError),
    Failure("INSERT FROM SELECT",
            lambda w: w.core(insert(Patient).from_select(["id", "name"], select(literal(2), literal(CANARY)))),
            UnsupportedQueryError),
    Failure("positional values",
            lambda w: w.core(insert(Patient).values([(2, 1, None, CANARY)])), UnsupportedQueryError),
    Failure("a hash by itself", lambda w: w.core(insert(Patient).values(id=2, name=CANARY, mrn_hash=CANARY)),
            UnsupportedQueryError),
    Failure("a hash by itself, executemany",
            lambda w: w.core(insert(Patient), [{"id": 2, "name": CANARY, "mrn_hash": CANARY}] * 2),
            UnsupportedQueryError),
    Failure("upsert with a named parameter",
            lambda w: w.upsert({"id": 2, "name": CANARY}, {"mrn": bindparam("m", CANARY)}),
            UnsupportedQueryError),
    Failure("upsert with an expression",
            lambda w: w.upsert({"id": 2, "name": CANARY}, {"mrn": func.lower(CANARY)}), UnsupportedQueryError),
    Failure("unconsumed names", lambda w: w.core(insert(Patient).values(id=2, mrn=CANARY, zzz=CANARY)), CompileError),
    Failure("bulk update without a primary key",
            lambda w: w.s.execute(update(Patient), [{"mrn": CANARY, "name": CANARY}]), InvalidRequestError),
    # nobody's statement
    Failure("no tenant, flush", no_tenant, NoTenantError),
    Failure("no tenant, search",
            lambda w: Session(w.engine).scalars(select(Patient.id).where(Patient.mrn == CANARY)), NoTenantError),
    Failure("engine not attached, flush", lambda w: not_attached(w, write=True), NotAttachedError),
    Failure("engine not attached, search", lambda w: not_attached(w, write=False), NotAttachedError),
]  # fmt: skip

# What the database or its driver has a part in.
FROM_THE_DATABASE = [
    Failure("unique violation, flush", lambda w: w.flush(mrn=CANARY), IntegrityError),
    Failure("unique violation, Core",
            lambda w: w.core(insert(Patient).values(id=2, name=CANARY, mrn=CANARY)), IntegrityError),
    Failure("unique violation, executemany",
            lambda w: w.core(insert(Patient), [{"id": i, "name": CANARY, "mrn": CANARY} for i in (2, 3)]),
            IntegrityError),
    Failure("unique violation, ORM bulk",
            lambda w: w.s.scalars(insert(Patient).returning(Patient.id),
                                  [{"id": i, "name": CANARY, "mrn": CANARY} for i in (2, 3)]), IntegrityError),
    Failure("unique violation, update", lambda w: (w.flush(mrn="other"), w.core(update(Patient).values(mrn=CANARY))),
            IntegrityError),
    Failure("upsert that violates a constraint",
            lambda w: w.upsert({"id": 1, "name": CANARY, "mrn": f"{CANARY}2"}, {"name": None, "email": CANARY}),
            IntegrityError),
    Failure("NOT NULL violation, flush", lambda w: w.flush(name=None, mrn=f"{CANARY}2"), IntegrityError),
    Failure("NOT NULL violation, Core", lambda w: w.core(insert(Patient), {"id": 2, "mrn": f"{CANARY}2", "name": None}),
            IntegrityError),
    Failure("violation in a savepoint", savepoint, IntegrityError),
    Failure("parameter missing, search",
            lambda w: w.search(Patient.mrn == bindparam("a"), Patient.size == bindparam("b"), a=CANARY),
            StatementError),
    Failure("parameter missing, executemany",
            lambda w: w.core(insert(Patient), [{"id": 2, "mrn": CANARY, "name": CANARY}, {"id": 3, "name": CANARY}]),
            StatementError),
    Failure("integer overflow in a plain column",
            lambda w: w.flush(size=2**70, mrn=f"{CANARY}2"), (DBAPIError, OverflowError)),
    Failure("integer overflow, executemany",
            lambda w: w.core(insert(Patient), [{"id": i, "name": CANARY, "size": 2**70} for i in (2, 3)]),
            (DBAPIError, OverflowError)),
    Failure("bad date in a plain column", lambda w: w.flush(day="no date", mrn=f"{CANARY}2"), StatementError),
    Failure("no such table", lambda w: (w.core(text("DROP TABLE patient")), w.flush(mrn=CANARY)), DBAPIError),
    Failure("connection lost, flush", lambda w: (w.disconnect(), w.flush(mrn=f"{CANARY}2")), DBAPIError),
    Failure("connection lost, search", lambda w: (w.disconnect(), w.search(Patient.mrn == CANARY)), DBAPIError),
    Failure("connection lost, went on", go_on_after_disconnect, (PendingRollbackError, DBAPIError)),
    Failure("pending rollback", pending_rollback, PendingRollbackError),
    Failure("row gone", stale, StaleDataError),
    Failure("tampered value",
            lambda w: (w.store(name=flipped(w.stored("name"))), w.read(Patient.name)), TamperedError),
    Failure("value of another column", lambda w: (w.store(name=w.stored("mrn")), w.read(Patient.name)), TamperedError),
    Failure("plaintext in the column",
            lambda w: (w.store(name=CANARY.encode()), w.read(Patient.name)), NotEncryptedError),
    Failure("plaintext in the column, entity",
            lambda w: (w.store(mrn=CANARY.encode() * 4), w.read(Patient)), NotEncryptedError),
    Failure("another tenant's row", lambda w: another_tenants_row(w, warm=True), TenantMismatchError),
    Failure("another tenant's row, cold", lambda w: another_tenants_row(w, warm=False), UnknownDataKeyError),
    Failure("keys forgotten while reading", expired_while_reading, KeysExpiredError),
    Failure("user's listener fails", lambda w: failing_listener(w, talks=False), RuntimeError),
    Failure("user's listener repeats the parameters", lambda w: failing_listener(w, talks=True), RuntimeError),
]  # fmt: skip


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Every key and salt of the test is a known one."""
    return Planted(monkeypatch)


@pytest.fixture
def log() -> Iterator[Log]:
    """All log records of the test, at DEBUG."""
    with Log.of_everything() as log:
        yield log


@pytest.fixture
def world(planted: Planted, log: Log, byok: Byok, engine: Engine, tmp_path: Path) -> Iterator[World]:
    """With every secret known from the start, and all loggers at DEBUG, the engine's echo too."""
    engine.echo = "debug"
    with ExitStack() as needs:
        yield World(byok, engine, tmp_path, needs)


def traces_of(failure: Failure, world: World, planted: Planted, log: Log) -> list[str]:
    """Fail in this way, and tell where a secret shows."""
    with pytest.raises(failure.raises) as caught:
        failure.act(world)
    assert "sqlalchemy.engine" in log.names()
    world.s.rollback()
    keys = [("a key of the compiled cache", repr(key)) for key in world.engine._compiled_cache or ()]
    return planted.traces([*shown_by(caught.value), *log.shown, *keys])


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("failure", REFUSED, ids=lambda failure: failure.name)
def test_what_is_refused_shows_no_secret(failure: Failure, world: World, planted: Planted, log: Log) -> None:
    """A refusal of ours names the column and the reason, never the value or a key."""
    assert traces_of(failure, world, planted, log) == []


@pytest.mark.parametrize("failure", FROM_THE_DATABASE, ids=lambda failure: failure.name)
def test_what_the_database_refuses_shows_no_secret(
    failure: Failure, world: World, planted: Planted, log: Log
) -> None:
    """SQLAlchemy's and the driver's exceptions on a table with encrypted columns have their parameters hidden."""
    assert traces_of(failure, world, planted, log) == []


class Work(NamedTuple):
    """Something that goes well: its name, and what to do; returns a text that must show nothing either."""

    name: str
    act: Callable[[World], str | None]


def with_literals(statement: Any) -> Work:
    """Render a statement's values into its SQL, as people do for debugging: it is refused."""

    def act(world: World) -> str:
        with pytest.raises(UnsupportedQueryError, match="not rendered") as caught:
            statement.compile(world.engine, compile_kwargs={"literal_binds": True})
        return "".join(traceback.format_exception(caught.value)) + str(statement.compile(world.engine))

    return Work(f"literal_binds, {str(statement).split()[0]}", act)


def ring(world: World) -> Any:
    """The opened keys of t1."""
    found = world.byok._keyrings.warm("t1")
    assert found is not None
    assert found.openers
    return found


FOUND = select(Patient).where(Patient.mrn == CANARY, Patient.email.in_([CANARY]), Patient.age != 7)
QUIET = [
    Work("flush", lambda w: w.flush(mrn=f"{CANARY}2")),
    Work("executemany",
         lambda w: w.core(insert(Patient), [{"id": i, "name": CANARY, "email": CANARY} for i in (2, 3)])),
    Work("multi-VALUES", lambda w: w.core(insert(Patient).values([{"id": i, "name": CANARY} for i in (2, 3)]))),
    Work("upsert", lambda w: w.upsert({"id": 1, "name": CANARY, "mrn": CANARY}, {"mrn": f"{CANARY}2"})),
    Work("insert with RETURNING", lambda w: repr(type(w.s.scalars(insert(Patient).returning(Patient.name),
                                                                  [{"id": 2, "name": CANARY}]).one()))),
    Work("update", lambda w: w.core(update(Patient).where(Patient.mrn == CANARY).values(name=LONG[:60]))),
    Work("update of no row",
         lambda w: w.core(update(Patient).where(Patient.mrn == "none").values(name=CANARY, mrn=CANARY))),
    Work("repr of an instance",
         lambda w: repr(w.s.scalars(FOUND.where(Patient.age.is_(None)).with_only_columns(Patient)).all())),
    Work("forget and open again", lambda w: (w.byok.forget_keys(), w.search(Patient.mrn == CANARY))[1]),
    Work("onboard", lambda w: w.byok.onboard("t3", LocalKms(w.folder / "customer.key"))),
]  # fmt: skip

# What makes a text: the database makes no difference.
SHOWN = [
    Work("repr of a new instance", lambda w: repr(Patient(name=CANARY))),
    Work("str of a statement", lambda w: f"{FOUND} {FOUND!r} {insert(Patient).values(mrn=CANARY)}"),
    Work("repr of a comparison", lambda w: f"{Patient.mrn == CANARY!r} {(Patient.mrn == CANARY)!r}"),
    Work("cache key of a SELECT", lambda w: repr(FOUND._generate_cache_key()[0])),
    Work("cache key of an INSERT", lambda w: repr(insert(Patient).values(mrn=CANARY)._generate_cache_key()[0])),
    with_literals(FOUND),
    with_literals(insert(Patient).values(id=2, name=CANARY, mrn=CANARY)),
    with_literals(update(Patient).values(name=CANARY).where(Patient.code.not_in([CANARY]))),
    with_literals(delete(Patient).where(Patient.kind == CANARY)),
    Work("repr of the table and its types",
         lambda w: repr([Patient.__table__, *(c.type for c in Patient.__table__.c)])),
    Work("repr of the engine and the session", lambda w: repr([w.engine, w.s, w.s.connection(), w.engine.dialect])),
    Work("repr of the Byok and its parts", lambda w: repr([w.byok, w.byok._keystore, w.byok._keyrings, vars(w.byok)])),
    Work("repr of the keyring", lambda w: repr([ring(w), ring(w).tenant_key, ring(w).write])),
    Work("repr of the keyring's salts", lambda w: repr(ring(w).salts)),
    Work("repr of what calls the KMS", lambda w: repr([w.byok._calls, vars(w.byok._calls)])),
    Work("repr of the keystore's row", lambda w: repr(w.byok._keystore.load("t1"))),
]  # fmt: skip


@pytest.mark.parametrize("work", QUIET, ids=lambda work: work.name)
def test_what_works_is_not_logged(work: Work, world: World, planted: Planted, log: Log) -> None:
    """Not only failures: the SQL log at DEBUG and the cache of compiled statements show nothing either."""
    before = len(log.shown)
    shown = work.act(world)
    assert len(log.shown) > before
    keys = [("a key of the compiled cache", repr(key)) for key in world.engine._compiled_cache or ()]
    assert planted.traces([("the result", shown or ""), *log.shown, *keys]) == []


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("work", SHOWN, ids=lambda work: work.name)
def test_no_text_shows_a_secret(work: Work, world: World, planted: Planted) -> None:
    """Reprs, cache keys and rendered statements, as they stand in debuggers, reports and migration files."""
    world.search(Patient.mrn == CANARY)  # the salt of a column is derived when it is first needed
    shown = work.act(world)
    assert shown
    assert planted.traces([("the text", shown)]) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"echo": "debug"},
        {"echo": "debug", "logging_name": "app"},
        {"logging_name": "app"},
        {"execution_options": {"logging_token": "request 7"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_rows_are_not_logged_however_the_engine_logs(
    options: dict[str, Any], sync_url: Any, planted: Planted, log: Log, tmp_path: Path
) -> None:
    """SQLAlchemy logs each row after decryption; on an attached engine the record stays, its content does not."""
    engine = create_engine(sync_url, **options)
    byok = Byok(f"sqlite:///{tmp_path / 'keystore.db'}")
    byok.create_keystore()
    byok.attach(engine)
    byok.onboard("t1", LocalKms.create(tmp_path / "customer.key"))
    with ExitStack() as needs:
        needs.callback(engine.dispose)
        needs.callback(byok.close)
        world = World(byok, engine, tmp_path, needs)
        log.shown.clear()
        world.read(Patient.name)
    rows = [
        text for where, text in log.shown if "sqlalchemy.engine.Engine" in where and text.endswith("columns]")
    ]
    assert len(rows) == 1
    assert planted.traces(log.shown) == []


def test_an_option_engine_from_before_attaching_hides_parameters_too(
    planted: Planted, log: Log, byok: Byok, engine: Engine, tmp_path: Path
) -> None:
    """``engine.execution_options()`` copies how parameters are logged; a copy made before attach() must not tell."""
    fresh = create_engine(engine.url)
    early = fresh.execution_options(byok_tenant="t1")
    byok.attach(fresh)
    Base.metadata.create_all(fresh)
    with ExitStack() as needs:
        needs.callback(fresh.dispose)
        session = needs.enter_context(Session(early))
        session.add(Patient(id=1, name=CANARY, mrn=CANARY))
        session.commit()
        session.add(Patient(id=1, name=CANARY, mrn=CANARY, size=7))
        with pytest.raises(IntegrityError) as caught:
            session.flush()
    assert caught.value.params is None
    assert planted.traces([*shown_by(caught.value), *log.shown]) == []


# -- AWS KMS: the keys travel over HTTP, and botocore logs what travels ------------------------------------------------


class AwsWorld:
    """Tenant t1 onboarded with a key of the double, in memory of none."""

    def __init__(self, server: KmsServer, keystore: str, planted: Planted) -> None:
        self.server, self.keystore, self.planted = server, keystore, planted
        self.arn = server.create_key()
        self.byok = self.byok_at(server.url)
        self.byok.create_keystore()
        self.tenant_key = planted.next_key()
        self.byok.onboard("t1", AwsKms(self.arn))
        self.other = server.create_key()
        assert self.tenant_key in planted.keys

    def byok_at(self, url: str) -> Byok:
        """A Byok on the same keystore that looks for the KMS at this URL."""
        return Byok(
            self.keystore,
            keystore_key="env:LEAKS_KEYSTORE_KEY",
            kms_profiles={"default": {"endpoint_url": url, "attempts": 1}},
        )

    def open(self, url: str | None = None) -> None:
        """Open t1, which nobody has in memory."""
        with self.byok_at(url or self.server.url).tenant("t1"):
            pass

    def onboard(self, url: str | None = None) -> None:
        """Onboard another tenant."""
        self.byok_at(url or self.server.url).onboard("t2", AwsKms(self.other))

    def fail(self, operation: str, code: str, status: int = 400) -> None:
        """Fail the operation with a message that repeats the key as it was sent, or is to be sent."""
        sent = self.planted.next_key() if operation == "Encrypt" else self.tenant_key
        message = f"1 error: {code} at 'plaintext': {base64.b64encode(sent).decode()} {sent.hex()}"
        self.server.fail(operation, code, status, message)


def closed_port() -> str:
    """A URL at which nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class AwsFailure(NamedTuple):
    """One way to fail: its name, what to do, and what is raised."""

    name: str
    act: Callable[[AwsWorld], Any]
    raises: type[BaseException]


AWS = [
    AwsFailure("nobody answers, open", lambda w: w.open(closed_port()), KmsUnavailableError),
    AwsFailure("nobody answers, onboard", lambda w: w.onboard(closed_port()), KmsUnavailableError),
    AwsFailure("key disabled, open", lambda w: (w.server.disable(w.arn), w.open()), KeyDisabledError),
    AwsFailure("key deleted, onboard", lambda w: (w.server.delete(w.other), w.onboard()), KeyDeletedError),
    AwsFailure("denied, repeats the key, onboard", lambda w: (w.fail("Encrypt", "AccessDeniedException"), w.onboard()),
               AccessDeniedError),
    AwsFailure("denied, repeats the key, round trip",
               lambda w: (w.fail("Decrypt", "AccessDeniedException"), w.onboard()),
               AccessDeniedError),
    AwsFailure("not valid, repeats the key",
               lambda w: (w.fail("Encrypt", "ValidationException"), w.onboard()), KmsRefusedError),
    AwsFailure("unknown code, repeats the key",
               lambda w: (w.fail("Decrypt", "NewException"), w.open()), KmsRefusedError),
    AwsFailure("throttled, repeats the key",
               lambda w: (w.fail("Decrypt", "ThrottlingException"), w.open()), ThrottledError),
    AwsFailure("fault, repeats the key", lambda w: (w.fail("Decrypt", "KMSInternalException", 500), w.open()),
               KmsUnavailableError),
    AwsFailure("the key is the code",
               lambda w: (w.server.fail("Decrypt", w.tenant_key.hex()), w.open()), KmsRefusedError),
]  # fmt: skip


@pytest.fixture
def aws_world(
    planted: Planted, log: Log, kms_server: KmsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AwsWorld:
    """With all loggers at DEBUG, botocore's among them."""
    keystore_key = bytes(range(160, 192))
    planted.needles.add("the keystore key", keystore_key)
    monkeypatch.setenv("LEAKS_KEYSTORE_KEY", base64.b64encode(keystore_key).decode())
    return AwsWorld(kms_server, f"sqlite:///{tmp_path / 'keystore.db'}", planted)


@pytest.mark.parametrize("failure", AWS, ids=lambda failure: failure.name)
def test_what_aws_refuses_shows_no_key(failure: AwsFailure, aws_world: AwsWorld, log: Log) -> None:
    """However the KMS fails, and even if it repeats the request, no key shows in the exception or a log."""
    with pytest.raises(failure.raises) as caught:
        failure.act(aws_world)
    assert aws_world.planted.traces([*shown_by(caught.value), *log.shown]) == []


def test_keys_that_travel_to_aws_and_back_are_not_logged(aws_world: AwsWorld, log: Log) -> None:
    """Onboarding and opening leave no key in botocore's and urllib3's logs at DEBUG."""
    aws_world.open()
    assert aws_world.server.calls["Decrypt"] == 2
    assert aws_world.planted.traces(log.shown) == []


def test_without_the_quiet_botocore_would_log_them(
    aws_world: AwsWorld, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two tests above can fail: this is what botocore logs when nobody keeps it from it."""
    monkeypatch.setattr(aws_api, "quiet", lambda *roots: contextlib.nullcontext())
    aws_world.open()
    traces, planted_keys = aws_world.planted.traces(log.shown), aws_world.planted.keys
    number = planted_keys.index(aws_world.tenant_key) + 1
    assert f"key {number} in a record of botocore.parsers at DEBUG" in traces


# -- the search itself ---------------------------------------------------------------------------------------------


def planted_in(place: str) -> BaseException:
    """An exception that shows the canary in this place only."""
    error: Any = ValueError("a reason")
    hidden = ValueError(f"about {CANARY}")
    if place == "message":
        return hidden
    if place == "note":
        error.__notes__ = [f"about {CANARY}"]
    elif place == "cause":
        error.__cause__ = hidden
    elif place == "context":
        error.__context__, error.__suppress_context__ = hidden, True
    elif place == "argument":
        return ValueError("a reason", {"value": [CANARY.encode()]})
    elif place == "exception as argument":
        return ValueError("a reason", hidden)
    elif place == "attribute":
        error.detail = {CANARY: 1}
    elif place == "slot":
        return UnicodeEncodeError("utf-8", f"{CANARY}\ud800", 0, 1, "surrogates not allowed")
    elif place == "hidden parameters":
        return StatementError("a reason", "SELECT 1", {"a": CANARY}, None, hide_parameters=True)
    elif place == "original":
        return StatementError("a reason", "SELECT 1", None, hidden, hide_parameters=True)
    return error  # type: ignore[no-any-return]


PLACES = [
    "message", "note", "cause", "context", "argument", "exception as argument", "attribute", "slot",
    "hidden parameters", "original",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_search_finds_the_canary_in_an_exceptions(place: str, planted: Planted) -> None:
    """A leak test that looks too little would pass on any leak."""
    assert planted.traces(shown_by(planted_in(place)))
    assert not planted.traces(shown_by(planted_in("nothing")))


@pytest.mark.parametrize(
    "written",
    [
        f"<{CANARY}>",
        CANARY.lower(),
        CANARY.encode().hex(),
        CANARY.encode().hex().upper(),
        *(
            base64.b64encode(b"x" * before + CANARY.encode() + b"y" * after).decode()
            for before in range(4)
            for after in range(4)
        ),
        base64.urlsafe_b64encode(b"\xff" + CANARY.encode()).decode(),
    ],
)
def test_the_search_knows_how_a_value_may_be_written(written: str) -> None:
    """As text, in hex and in base64, alone and within longer data, in upper and lower case."""
    assert Needles(("the canary", CANARY)).within("a text", f"a long text with {written} in it") == [
        "the canary in a text"
    ]


def test_the_search_finds_keys_as_python_writes_bytes() -> None:
    """A key that is no text shows as escapes in a repr."""
    key = bytes(range(224, 256))
    needles = Needles(("the key", key))
    for shown in (
        repr({"key": b"\x01" + key}),
        key.hex(),
        base64.b64encode(b"\x01" + key + b"\x02").decode(),
    ):
        assert needles.within("it", shown) == ["the key in it"]


@pytest.mark.parametrize("write", ["message", "argument", "exception"])
def test_the_search_reads_log_records(write: str, planted: Planted, log: Log) -> None:
    """A record's message, arguments and exception are looked at when it is made."""
    logger, values = logging.getLogger("leaks"), [CANARY]
    if write == "message":
        logger.debug(f"about {CANARY}")  # noqa: G004 - the leak that is looked for
    elif write == "argument":
        logger.debug("about %.1s", values)
        values.clear()
    else:
        logger.debug("about", exc_info=planted_in("context"))
    assert planted.traces(log.shown)


def test_the_chain_of_an_exception_is_followed_once() -> None:
    """Exceptions may point at each other in a circle."""
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__cause__ = second, first
    assert chain(first) == [first, second]
