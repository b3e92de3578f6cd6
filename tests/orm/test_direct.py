"""mode="direct" on sync engines: each value is a call to the customer's KMS, in every way to write and to read."""

from __future__ import annotations

import base64
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from canary import CANARY, Log, Planted, shown_by
from direct_tools import (
    FILLED,
    READ,
    SSNS,
    STORED,
    WRITE,
    Base,
    Meter,
    MeteredKms,
    Note,
    Patient,
    Plain,
    Read,
    Visit,
    Written,
    fill,
    local_kms,
    meter,
    patients,
    stored,
)
from keys_tools import TurnableClock
from kms_server import KmsServer
from sqlalchemy import (
    Engine,
    LargeBinary,
    String,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateColumn

from sqla_byok import (
    AwsKms,
    Byok,
    ByokError,
    DeclarationError,
    DecryptError,
    EncodeError,
    Encrypted,
    KeyDisabledError,
    KeysExpiredError,
    KeystoreUnavailableError,
    KmsUnavailableError,
    LocalKms,
    NotAttachedError,
    NoTenantError,
    TamperedError,
    TenantMismatchError,
    ThrottledError,
    UnknownDataKeyError,
)
from sqla_byok.keys.direct import AT_ONCE, _lanes
from sqla_byok.keys.keyrings import WRITE_WITHIN
from sqla_byok.orm import direct, plain

__all__ = ["local_kms", "meter"]  # fixtures


@pytest.fixture
def data(byok: Byok, engine: Engine, meter: Meter) -> Engine:
    """The engine, with tables; nothing is open yet."""
    Base.metadata.create_all(engine)
    meter.reset()
    return engine


@pytest.fixture
def filled(byok: Byok, data: Engine, meter: Meter) -> Engine:
    """The same with rows of t1."""
    with byok.session("t1", data) as session:
        fill(session)
    assert len(meter.encrypted) == FILLED
    meter.reset()
    return data


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> TurnableClock:
    return TurnableClock()


@pytest.fixture
def local(
    tmp_path: Path, sqlite: Engine, local_kms: MeteredKms, meter: Meter, clock: TurnableClock
) -> Iterator[Byok]:
    """A Byok on SQLite alone, for what the database has no part in; rows of t1 are there."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", clock=clock)
    byok.create_keystore()
    byok.attach(sqlite)
    for tenant in ("t1", "t2"):
        byok.onboard(tenant, local_kms)
    with byok.session("t1", sqlite) as session:
        fill(session)
    meter.reset()
    yield byok
    byok.close()


# -- every way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITE)
def test_each_value_written_is_one_call(
    byok: Byok, data: Engine, meter: Meter, write: Callable[[Session], Written]
) -> None:
    """However a value is written, the customer's log has it, the database has only what the KMS made, and it reads."""
    with byok.session("t1", data) as session:
        calls, ssns = write(session)
        assert (len(meter.encrypted), meter.decrypted) == (calls, [])
        assert [blob[:2] for blob in stored(session)] == [b"\xb1\x10"] * len(ssns)
        session.commit()
        assert (
            list(session.scalars(select(Patient.ssn).where(Patient.ssn.is_not(None)).order_by(Patient.id)))
            == ssns
        )
        for ssn in ssns:  # the hashes are in step
            assert session.scalars(select(Patient.ssn).where(Patient.ssn == ssn)).one() == ssn
    assert meter.opened == ["t1"]


@pytest.mark.parametrize("read", READ)
def test_each_value_read_is_one_call(
    byok: Byok, filled: Engine, meter: Meter, read: Callable[[Session], Read]
) -> None:
    """However a value is read, the customer's log has it once, and a statement without such columns costs nothing."""
    with byok.session("t1", filled) as session:
        calls, got, expected = read(session)
    assert got == expected
    assert len(meter.decrypted) == calls


def test_returned_values_are_read_too(byok: Byok, data: Engine, meter: Meter) -> None:
    """RETURNING goes other ways through SQLAlchemy than SELECT, one of them past every fetch."""
    if not data.dialect.insert_returning:
        pytest.skip("the database has no RETURNING")
    with byok.session("t1", data) as session:
        rows = [{"ssn": f"s{n}"} for n in range(5)]
        assert sorted(session.scalars(insert(Patient).returning(Patient.ssn), rows)) == [
            f"s{n}" for n in range(5)
        ]
        assert (len(meter.encrypted), len(meter.decrypted)) == (5, 5)
        beside = insert(patients).values(kind="plain", ssn="a")
        beside = beside.return_defaults(patients.c.made, supplemental_cols=[patients.c.ssn])
        assert session.connection().execute(beside).one().ssn == "a"
        assert (len(meter.encrypted), len(meter.decrypted)) == (6, 6)
        assert session.scalars(insert(Patient).values(ssn="b").returning(Patient)).one().ssn == "b"
        if data.dialect.update_returning:
            changed = update(Patient).where(Patient.ssn == "b").values(ssn="c").returning(Patient.ssn)
            assert session.scalars(changed).all() == ["c"]


# -- several at once -------------------------------------------------------------------------------------------------


def test_calls_run_side_by_side_but_bounded(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """A batch is not slowed to one call after the other, and does not use up the customer's quota at a stroke."""
    gate = threading.Barrier(AT_ONCE)
    meter.on_call = lambda operation: gate.wait(30) and None
    with local.session("t1", sqlite) as session:
        session.add_all([Patient(ssn=f"many-{n}") for n in range(3 * AT_ONCE)])
        session.commit()
        assert (len(meter.encrypted), meter.most) == (3 * AT_ONCE, AT_ONCE)
        meter.reset()
        assert len(session.scalars(select(Patient.ssn).where(Patient.id > 6)).all()) == 3 * AT_ONCE
        assert (len(meter.decrypted), meter.most) == (3 * AT_ONCE, AT_ONCE)


def test_statements_of_a_tenant_share_the_bound(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """Many requests of one tenant together stay within what is allowed at once."""
    reached, release = threading.Semaphore(0), threading.Event()

    def wait(operation: str) -> None:
        reached.release()
        assert release.wait(30)

    meter.on_call = wait
    got: list[Any] = []

    def read() -> None:
        with local.session("t1", sqlite) as session:
            got.append(session.scalars(select(Patient.ssn).order_by(Patient.id)).all())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(AT_ONCE):
        assert reached.acquire(timeout=30)
    release.set()
    for thread in threads:
        thread.join()
    assert got == [SSNS] * 4
    assert meter.most == AT_ONCE


def test_a_hanging_kms_holds_up_no_other_tenant(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """One customer's vault that does not answer leaves the others' calls their threads."""
    with local.session("t2", sqlite) as session:
        session.add_all([Patient(id=100 + n, ssn=f"other-{n}") for n in range(3)])
        session.commit()
    reached, release = threading.Semaphore(0), threading.Event()

    def hang(operation: str) -> None:
        if meter.under_way and meter.decrypted[-1] == "t1":
            reached.release()
            assert release.wait(30)

    meter.on_call = hang
    mine = select(Patient.ssn).where(Patient.id < 100)

    def read() -> None:
        with local.session("t1", sqlite) as session:
            session.scalars(mine).all()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(AT_ONCE):
        assert reached.acquire(timeout=30)
    with local.session("t2", sqlite) as session:
        found = session.scalars(select(Patient.ssn).where(Patient.id >= 100).order_by(Patient.id)).all()
    release.set()
    for thread in threads:
        thread.join()
    assert found == ["other-0", "other-1", "other-2"]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is delivered, also where a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_calls(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """A batch that is given up leaves no queue of calls behind."""
    release = threading.Event()

    def interrupt(operation: str) -> None:
        if len(meter.encrypted) == AT_ONCE:
            pool, _ = _lanes._lanes["t1"]
            while pool._work_queue.qsize() < 50 - AT_ONCE:
                release.wait(0.001)  # until all are in the queue, and the main thread waits for them
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert release.wait(30)

    meter.on_call = interrupt
    with local.session("t1", sqlite) as session:
        with pytest.raises(KeyboardInterrupt):
            session.execute(insert(Patient), [{"ssn": f"s{n}"} for n in range(50)])
        release.set()
        for thread in threading.enumerate():
            if thread.name.startswith("byok-direct"):
                thread.join(30)
                assert not thread.is_alive()
    assert len(meter.encrypted) == AT_ONCE


# -- the KMS says no -------------------------------------------------------------------------------------------------


def refuse_from(meter: Meter, first: int, error: ByokError) -> None:
    lock, seen = threading.Lock(), [0]

    def on_call(operation: str) -> None:
        with lock:
            seen[0] += 1
            if seen[0] >= first:
                raise error

    meter.on_call = on_call


@pytest.mark.parametrize("page", [1, 1000])
def test_a_no_in_the_middle_writes_nothing(byok: Byok, data: Engine, meter: Meter, page: int) -> None:
    """Not even without a transaction, and in several batches, is half of a statement written; the keys are dropped."""
    with byok.session("t1", data) as session:
        session.scalar(select(func.count(Patient.id)))
        refuse_from(meter, 30, KeyDisabledError("disabled", tenant="t1"))
        autocommit = data.execution_options(
            isolation_level="AUTOCOMMIT", byok_tenant="t1", insertmanyvalues_page_size=page
        )
        rows = [{"kind": "plain", "ssn": f"s{n}"} for n in range(200)]
        with autocommit.connect() as connection, pytest.raises(KeyDisabledError):
            connection.execute(insert(patients).returning(patients.c.id), rows) if (
                data.dialect.insert_executemany_returning
            ) else connection.execute(insert(patients), rows)
        assert 30 <= len(meter.encrypted) < 30 + AT_ONCE
        meter.on_call = lambda operation: None
        assert session.scalars(select(Patient.ssn)).all() == []
    assert meter.opened == ["t1", "t1"]  # the second statement had to ask again


@pytest.mark.parametrize(
    ("error", "opened"),
    [
        (KeyDisabledError("disabled", tenant="t1"), ["t1", "t1"]),
        (ThrottledError("slow down", tenant="t1", retry_after=2.0), ["t1"]),
        (KmsUnavailableError("silence", tenant="t1"), ["t1"]),
    ],
)
def test_a_read_raises_what_the_kms_said(
    local: Byok, sqlite: Engine, meter: Meter, error: ByokError, opened: list[str]
) -> None:
    """Each outcome has its class; "no" drops the keys at once, "no answer" does not."""
    local.forget_keys()
    with local.session("t1", sqlite) as session:
        meter.on_call = lambda operation: (_ for _ in ()).throw(error)
        with pytest.raises(type(error)) as raised:
            session.scalars(select(Patient.ssn)).all()
        assert raised.value is error
        meter.on_call = lambda operation: None
        assert session.scalars(select(Patient.ssn).order_by(Patient.id)).all() == SSNS
    assert meter.opened == opened


def test_a_failed_fetch_skips_no_row(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """Whoever catches the error and fetches on does not get the rest as if it were all."""
    with local.session("t1", sqlite) as session:
        result = session.connection().execute(select(patients.c.ssn).order_by(patients.c.id)).yield_per(1)
        assert result.fetchone() == ("ssn-1",)
        refuse_from(meter, 1, ThrottledError("slow down", tenant="t1"))
        with pytest.raises(ThrottledError):
            result.fetchone()
        meter.on_call = lambda operation: None
        with pytest.raises(ResourceClosedError):
            result.fetchone()


def test_keys_end_within_a_result(local: Byok, sqlite: Engine, meter: Meter, clock: TurnableClock) -> None:
    """A long result stops at the deadline, and forgotten keys stop it at once; the KMS is asked for no more."""
    statement = select(patients.c.ssn).order_by(patients.c.id)
    for stop in (lambda: clock.turn(301), local.forget_keys):
        meter.reset()
        with local.session("t1", sqlite) as session:
            result = session.connection().execute(statement).yield_per(1)
            assert result.fetchone() == ("ssn-1",)
            stop()
            with pytest.raises(KeysExpiredError):
                result.fetchone()
            assert len(meter.decrypted) == 1


def test_keys_that_end_during_the_calls_give_nothing(
    local: Byok, sqlite: Engine, meter: Meter, clock: TurnableClock
) -> None:
    """A KMS that answers after the deadline makes no row."""
    with local.session("t1", sqlite) as session:
        session.connection()
        meter.on_call = lambda operation: clock.turn(301)
        with pytest.raises(KeysExpiredError):
            session.scalars(select(Patient.ssn).where(Patient.id == 1)).all()


def test_a_write_that_waits_long_for_the_kms_looks_at_the_keystore(
    local: Byok, sqlite: Engine, meter: Meter, clock: TurnableClock
) -> None:
    """Many values take a KMS minutes: they are written all the same, unless the tenant's keys changed meanwhile."""
    with local.session("t1", sqlite) as session:
        session.connection()
        meter.on_call = lambda operation: clock.turn(WRITE_WITHIN + 1)
        session.execute(insert(Note), [{"id": 1, "body": b"x"}])
        meter.on_call = lambda operation: local.rotate_data_key("t1") and None
        with pytest.raises(KeystoreUnavailableError):
            session.execute(insert(Note), [{"id": 2, "body": b"x"}])
        meter.on_call = lambda operation: None
        session.execute(insert(Note), [{"id": 3, "body": b"x"}])
        assert session.scalars(select(Note.id).order_by(Note.id)).all() == [1, 3]


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "limit"), [(190, 144), (318, 272), (4096, 4050)])
def test_the_size_is_checked_before_any_call(
    local: Byok, sqlite: Engine, meter: Meter, room: int, limit: int
) -> None:
    """A value at the limit is written; one byte more is refused without a call, with what to do, whatever the batch."""
    meter.room = room
    with local.session("t1", sqlite) as session:
        session.add(Note(id=1, body=b"x" * limit))
        session.commit()
        assert session.get_one(Note, 1).body == b"x" * limit
        meter.reset()
        with pytest.raises(EncodeError, match=rf"note\.body.* {limit} bytes .*mode='envelope'") as raised:
            session.execute(insert(Note), [{"id": 2, "body": b"x"}, {"id": 3, "body": b"x" * (limit + 1)}])
        assert (raised.value.column, raised.value.tenant) == ("note.body", "t1")
        assert meter.encrypted == []
        assert session.scalars(select(Note.id)).all() == [1]


# -- whose value -----------------------------------------------------------------------------------------------------


def test_two_tenants_interleaved(byok: Byok, filled: Engine, meter: Meter) -> None:
    """Rows of two results taken in turns are each decrypted for their own tenant, in one process and one database."""
    with byok.session("t2", filled) as session:
        session.add_all([Patient(id=100 + n, ssn=f"other-{n}") for n in range(3)])
        session.commit()
    meter.reset()
    with byok.session("t1", filled) as one, byok.session("t2", filled) as two:
        first = one.execute(select(Patient.ssn).where(Patient.id < 4).order_by(Patient.id))
        second = two.execute(select(Patient.ssn).where(Patient.id >= 100).order_by(Patient.id))
        got = [(first.fetchone(), second.fetchone()) for _ in range(3)]
    assert got == [((f"ssn-{n + 1}",), (f"other-{n}",)) for n in range(3)]
    assert sorted(meter.decrypted) == ["t1"] * 3 + ["t2"] * 3


def test_another_tenants_value_is_refused_before_the_kms_hears_of_it(
    byok: Byok, filled: Engine, meter: Meter
) -> None:
    """A forgotten filter shows no row, and asks neither customer's KMS."""
    with byok.session("t1", filled) as owner, byok.session("t2", filled) as session:
        owner.scalar(select(func.count(Patient.id)))
        with pytest.raises(TenantMismatchError) as raised:
            session.scalars(select(Patient.ssn)).all()
        assert (raised.value.owner, raised.value.column) == ("t1", "patient.ssn")
    byok.forget_keys()
    with byok.session("t2", filled) as session, pytest.raises(UnknownDataKeyError):
        session.scalars(select(Patient.ssn)).all()
    with Session(filled) as session, pytest.raises(NoTenantError):
        session.scalars(select(Patient.ssn)).all()
    assert meter.decrypted == []


DAMAGES: list[tuple[Callable[[bytes], bytes], int]] = [
    (lambda blob: blob[:18] + b"\x011" + blob[19:], 1),  # a version that the key does not have
    (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), 1),
    (lambda blob: blob[:40], 1),
    # the rest cannot be one of ours, and the KMS is not asked
    (lambda blob: blob[:18] + b"\x03../" + blob[19:], 0),
    (lambda blob: blob[:18] + b"\x03a/b" + blob[19:], 0),
    (lambda blob: blob[:18] + b"\x02\xc3\xa9" + blob[19:], 0),
    (lambda blob: blob[:18] + b"\xff" + blob[19:], 0),
    (lambda blob: blob[:18] + b"\x0c" + b"v" * 12, 0),
    (lambda blob: blob[:2] + bytes(16) + blob[18:], 0),
    (lambda blob: b"\xb1\x11" + blob[2:], 0),
    (lambda blob: blob[:18], 0),
    (lambda blob: b"", 0),
]


@pytest.mark.parametrize(("damage", "calls"), DAMAGES)
def test_a_damaged_value_is_never_returned(
    local: Byok, sqlite: Engine, meter: Meter, damage: Callable[[bytes], bytes], calls: int
) -> None:
    """Whatever was done to a stored value, reading it raises; it costs the tenant neither its keys nor other rows."""
    with local.session("t1", sqlite) as session:
        (blob,) = session.execute(STORED.where(patients.c.id == 1)).one()
        session.execute(text("UPDATE patient SET ssn = :it WHERE id = 1"), {"it": damage(blob)})
        with pytest.raises(DecryptError) as raised:
            session.scalars(select(Patient.ssn).where(Patient.id == 1)).all()
        assert raised.value.column == "patient.ssn"
        assert len(meter.decrypted) == calls
        assert session.scalars(select(Patient.ssn).where(Patient.id == 2)).all() == ["ssn-2"]
    assert meter.opened == []


def test_a_value_of_another_column_does_not_open(local: Byok, sqlite: Engine) -> None:
    """What the customer's KMS opens is still bound to its column."""
    with local.session("t1", sqlite) as session:
        session.execute(text("UPDATE visit SET code = (SELECT ssn FROM patient WHERE id = 1) WHERE id = 1"))
        with pytest.raises(TamperedError, match=r"visit\.code"):
            session.scalars(select(Visit.code).where(Visit.id == 1)).all()


def test_a_frame_within_a_frame_does_not_open(
    local: Byok, sqlite: Engine, meter: Meter, local_kms: MeteredKms
) -> None:
    """What the KMS gives back must be a value, and of the data key that the frame names; the KMS is asked once."""
    client = LocalKms(local_kms.path).connect({})
    with local.session("t1", sqlite) as session:
        (blob,) = session.execute(STORED.where(patients.c.id == 1)).one()
        for inside in (blob, b"\xb1\x01" + bytes(16) + bytes(40), b"ssn-1"):
            forged = blob[:19] + client.wrap(inside, tenant="t1").blob
            session.execute(text("UPDATE patient SET ssn = :it WHERE id = 1"), {"it": forged})
            meter.reset()
            with pytest.raises(TamperedError):
                session.scalars(select(Patient.ssn).where(Patient.id == 1)).all()
            assert len(meter.decrypted) == 1


# -- the mode of a column --------------------------------------------------------------------------------------------


def test_the_version_of_the_customer_key_is_kept(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """After the customer rotates its key, Azure decrypts with the version that encrypted, and no other."""
    meter.version = "78deebed173b48e48f55abf87ed4cf71"
    with local.session("t1", sqlite) as session:
        session.add(Patient(id=50, ssn="versioned"))
        session.commit()
        # the meter compares the version
        assert session.scalars(select(Patient.ssn).where(Patient.id == 50)).one() == "versioned"


def test_values_from_before_the_mode_was_changed(local: Byok, sqlite: Engine, meter: Meter) -> None:
    """A column that becomes direct reads what it has; one that stops being direct says so instead of guessing."""
    envelope = type_coerce(patients.c.ssn, Encrypted(String(60), column_id="patient.ssn"))
    with local.session("t1", sqlite) as session:
        with pytest.raises(DecryptError, match="mode='direct'"):
            session.scalars(select(envelope)).all()
        connection = session.connection()
        blob = connection.execute(select(type_coerce("before", envelope.type))).scalar_one()
        assert blob == "before"
        raw = type_coerce(type_coerce("before", envelope.type), LargeBinary)
        stored_before = connection.execute(select(raw)).scalar_one()
        session.execute(text("UPDATE patient SET ssn = :it WHERE id = 1"), {"it": stored_before})
        assert session.scalars(select(Patient.ssn).where(Patient.id == 1)).one() == "before"
    assert meter.decrypted == []


def test_the_mode_is_checked_shown_and_kept_apart() -> None:
    """A typing error is found at once, and two modes share neither a compiled statement nor a migration's text."""
    with pytest.raises(DeclarationError, match="mode"):
        Encrypted(String, mode="indirect")  # type: ignore[arg-type]
    envelope, direct = (
        Encrypted(String(5), column_id="a.b"),
        Encrypted(String(5), column_id="a.b", mode="direct"),
    )
    assert envelope._static_cache_key != direct._static_cache_key
    assert (direct.copy().mode, direct.bound_to("c.d", "c").mode) == ("direct", "direct")
    assert repr(direct) == "Encrypted(String(length=5), column_id='a.b', mode='direct')"
    assert "mode" not in repr(envelope)


def test_drivers_that_want_their_own_binary(
    local: Byok, tmp_path: Path, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a driver wants around bytes is put around what the KMS made, and taken off before the KMS is asked."""
    monkeypatch.setattr(plain, "_PLAIN_BYTES", frozenset())
    engine = create_engine(f"sqlite:///{tmp_path / 'wrapped.db'}")
    Base.metadata.create_all(engine)
    local.attach(engine)
    with local.session("t1", engine) as session:
        sent: list[type] = []

        @event.listens_for(engine, "before_cursor_execute")
        def see(conn: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
            sent.extend(type(value) for row in parameters if isinstance(row, tuple) for value in row)

        session.execute(insert(patients), [{"kind": "plain", "ssn": "a"}, {"kind": "plain", "ssn": "b"}])
        session.commit()
        assert memoryview in sent
        assert bytes not in sent
        assert session.scalars(select(Patient.ssn).order_by(Patient.id)).all() == ["a", "b"]
    assert (len(meter.encrypted), len(meter.decrypted)) == (2, 2)
    engine.dispose()


def test_mysql_has_room_for_what_a_kms_makes() -> None:
    """BLOB takes 64 KiB: the longest ciphertext of AWS fits, where the plaintext's size would take a smaller type."""
    made = str(CreateColumn(patients.c.ssn).compile(dialect=mysql.dialect()))
    assert made.startswith("ssn BLOB")
    assert "(" not in made, "with a size it would become a TINYBLOB"


# -- nothing gets out ------------------------------------------------------------------------------------------------


def test_an_unsent_value_is_not_stored(
    byok: Byok, data: Engine, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a way be found past the hooks, the driver refuses the parameter instead of storing it half encrypted."""
    monkeypatch.setattr(direct, "send", lambda context, parameters, *rest: parameters)
    with byok.session("t1", data) as session:
        for statement, rows in (
            (insert(patients).values(id=1, ssn="a"), None),
            (insert(patients), [{"ssn": "a"}] * 2),
        ):
            with pytest.raises(Exception) as raised:
                session.execute(statement, rows)
            assert not isinstance(raised.value, ByokError)
            session.rollback()
        assert session.scalar(select(func.count(patients.c.id))) == 0


def test_without_the_hooks_nothing_is_written(sqlite: Engine, local: Byok, tmp_path: Path) -> None:
    """An engine that was not attached writes nothing."""
    engine = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(engine)
    with engine.connect() as connection, pytest.raises(NotAttachedError):
        connection.execute(insert(patients).values(id=1, kind="plain", ssn="a"))
    engine.dispose()


def test_nothing_shows(
    planted: Planted, tmp_path: Path, sqlite: Engine, local_kms: MeteredKms, meter: Meter
) -> None:
    """No value, and no key, in the errors and logs of direct calls."""
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
    byok.create_keystore()
    byok.attach(sqlite)
    byok.onboard("t1", local_kms)
    shown: list[tuple[str, str]] = []
    with Log.of_everything() as log, byok.session("t1", sqlite) as session:
        session.add(Patient(id=1, ssn=CANARY))
        session.commit()
        assert session.scalars(select(Patient.ssn)).all() == [CANARY]
        meter.room = 60
        for failing in (
            lambda: session.execute(insert(Patient), [{"id": n, "ssn": f"{CANARY}{n}"} for n in (2, 3)]),
            lambda: refuse_from(meter, 2, KeyDisabledError("disabled")) or session.execute(
                insert(Patient), [{"id": n, "ssn": CANARY[:14]} for n in range(2, 30)]
            ),
            lambda: session.scalars(select(Patient.ssn)).all(),
        ):  # fmt: skip
            with pytest.raises(ByokError) as raised:
                failing()
            session.rollback()
            shown += shown_by(raised.value)
    assert planted.traces([*shown, *log.shown]) == []
    byok.close()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    return Planted(monkeypatch)


# -- over the wire ---------------------------------------------------------------------------------------------------


def test_over_the_wire_to_aws(
    kms_server: KmsServer, tmp_path: Path, sqlite: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS sees one Encrypt for a value written and one Decrypt for a value read, beside the one that opens."""
    monkeypatch.setenv("BYOK_TEST_KEYSTORE_KEY", base64.b64encode(bytes(32)).decode())
    byok = Byok(
        keystore=f"sqlite:///{tmp_path / 'keystore.db'}",
        keystore_key="env:BYOK_TEST_KEYSTORE_KEY",
        kms_profiles={"default": {"endpoint_url": kms_server.url, "attempts": 1}},
    )
    byok.create_keystore()
    byok.attach(sqlite)
    key = kms_server.create_key()
    byok.onboard("t1", AwsKms(key))
    kms_server.calls.clear()
    with byok.session("t1", sqlite) as session:
        fill(session)
        session.add(Patient(id=20, ssn="x" * 60))
        session.commit()
        assert kms_server.calls == {"Encrypt": FILLED + 1, "Decrypt": 1}
        assert session.scalars(select(Patient.ssn).where(Patient.id < 10).order_by(Patient.id)).all() == SSNS
        session.scalars(select(Plain)).all()
        assert kms_server.calls == {"Encrypt": FILLED + 1, "Decrypt": 1 + 5}
        # In the customer's log an access to a value is told from the opening of the tenant.
        purposes = [body["EncryptionContext"]["sqla-byok:purpose"] for _, body in kms_server.requests]
        assert purposes[2:4] == ["tenant-key", "value"]
        assert set(purposes[3:]) == {"value"}
        kms_server.disable(key)
        with pytest.raises(KeyDisabledError):
            session.scalars(select(Patient.ssn)).all()
    byok.close()
