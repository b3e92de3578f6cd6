"""A tenant's keys over time, seen from one process: states, settling, conflicts, crashes and forgery."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, TurnableClock, hand_in, table
from sqlalchemy import (
    Column,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    insert,
    select,
    type_coerce,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_byok import (
    Byok,
    ConfigurationError,
    Encrypted,
    KeyDisabledError,
    KeysExpiredError,
    KeystoreConflictError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    KmsUnavailableError,
    LocalKms,
    UnknownDataKeyError,
    UnknownTenantError,
    WrongKeyError,
)
from sqla_byok.audit import Event, GenerationChanged
from sqla_byok.crypto.formats import DATA_KEY, KINDS, SEARCH_SALT, unpack_tenant_key
from sqla_byok.keys.generations import SETTLE
from sqla_byok.keys.keyrings import POLL_EVERY, WRITE_WITHIN
from sqla_byok.keys.keystore import Keystore
from sqla_byok.keys.rows import TenantRow

_metadata = MetaData()
_patient = Table(
    "patient",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("mrn", Encrypted(String(20), searchable=True)),
)
_mrns = select(_patient.c.mrn).order_by(_patient.c.id)


class StagedClock(TurnableClock):
    """Does something in the middle of each sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.meanwhile()
        super().sleep(seconds)


class Process:
    """A Byok with a clock of its own, on the keystore and database that all share."""

    def __init__(self, folder: Path, keystore_key: str) -> None:
        self.clock = StagedClock()
        self.byok = Byok(
            keystore=f"sqlite:///{folder / 'keystore.db'}", keystore_key=keystore_key, clock=self.clock
        )
        self.engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        self.byok.attach(self.engine)
        self.events: list[GenerationChanged] = []
        self.byok._generations._audit.listeners.append(self._hear)

    def _hear(self, event: Event) -> None:
        if isinstance(event, GenerationChanged):
            self.events.append(event)

    def write(self, *mrns: str) -> None:
        with self.engine.execution_options(byok_tenant="t1").begin() as connection:
            connection.execute(insert(_patient), [{"mrn": mrn} for mrn in mrns])

    def read(self) -> list[Any]:
        with self.engine.execution_options(byok_tenant="t1").connect() as connection:
            return list(connection.scalars(_mrns))

    def find(self, mrn: str) -> int:
        with self.engine.execution_options(byok_tenant="t1").connect() as connection:
            return len(connection.scalars(_mrns.where(_patient.c.mrn == mrn)).all())

    def keys_used(self) -> list[int]:
        """The generation of the data key of each row."""
        row = self.row()
        generations = {
            each.id: each.generation for each in (*row.generations, *row.retired) if each.kind == DATA_KEY
        }
        with self.engine.connect() as connection:
            blobs = connection.scalars(
                select(type_coerce(_patient.c.mrn, LargeBinary)).order_by(_patient.c.id)
            )
            return [generations[blob[2:18]] for blob in blobs]

    def row(self) -> TenantRow:
        row = self.byok._keystore.load("t1")
        assert row is not None
        return row

    def states(self, kind: str) -> dict[int, str]:
        row = self.row()
        return {each.generation: each.state for each in (*row.generations, *row.retired) if each.kind == kind}

    def look(self) -> None:
        self.clock.turn(POLL_EVERY)
        with self.byok.tenant("t1"):
            pass

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


class World:
    """Two processes; the first onboarded the tenant."""

    def __init__(self, folder: Path, kms: CountingKms, keystore_key: str) -> None:
        self.kms = kms
        self.hand = hand_in(f"sqlite:///{folder / 'keystore.db'}")
        self.one, self.two = Process(folder, keystore_key), Process(folder, keystore_key)
        self.one.byok.create_keystore()
        self.one.byok.onboard("t1", kms)
        _metadata.create_all(self.one.engine)
        kms.unwraps.clear()

    @property
    def calls(self) -> int:
        return len(self.kms.unwraps)

    def close(self) -> None:
        self.one.close()
        self.two.close()
        self.hand.dispose()


@pytest.fixture
def world(tmp_path: Path, counting_kms: CountingKms, keystore_key: str) -> Iterator[World]:
    world = World(tmp_path, counting_kms, keystore_key)
    yield world
    world.close()


_ROTATE = {DATA_KEY: Byok.rotate_data_key, SEARCH_SALT: Byok.rotate_salt}


# -- rotating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_is_pending_then_active(world: World, kind: str) -> None:
    """Nobody writes with it while it settles, everybody knows it afterwards; two KMS calls, one settle time."""
    one, two = world.one, world.two
    one.write("A")
    seen: list[dict[int, str]] = []

    def meanwhile() -> None:
        seen.append(two.states(kind))
        two.look()
        two.write("B")
        assert (two.find("A"), two.find("B")) == (1, 1)

    one.clock.meanwhile = meanwhile
    two.find("A")
    world.kms.unwraps.clear()
    assert _ROTATE[kind](one.byok, "t1") == 2
    assert (one.clock.slept, world.calls) == ([SETTLE], 2)
    assert seen == [{1: "active", 2: "pending"}]
    assert one.states(kind) == {1: "readable", 2: "active"}
    one.look()
    one.write("C")
    two.clock.turn(WRITE_WITHIN)
    assert [two.find(mrn) for mrn in "ABC"] == [1, 1, 1]
    assert two.read() == one.read() == ["A", "B", "C"]
    assert two.keys_used() == ([1, 1, 2] if kind == DATA_KEY else [1, 1, 1])
    told = [(each.kind, each.generation, each.state, each.epoch) for each in one.events]
    # The first row noted how its hash is made: that is epoch 2.
    assert told[0] == (kind, 2, "pending", 3)
    assert sorted(told[1:]) == [(kind, 1, "readable", 4), (kind, 2, "active", 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_not_looked_meets_nothing_unknown(world: World, kind: str) -> None:
    """A process whose last look was right before the change works on to the end of WRITE_WITHIN, and loses nothing."""
    one, two = world.one, world.two
    two.write("A")  # its last look for now
    fail: list[bool] = []

    def meanwhile() -> None:
        # The keystore is away for the other process alone: all it has is its look of before.
        two.byok._keystore.database.read = _away  # type: ignore[method-assign]
        for n in range(1, 5):
            two.clock.turn(WRITE_WITHIN / 4 - 0.01)
            two.write("B")
            assert (two.find("B"), two.read().count("B")) == (n, n)
        two.clock.turn(0.04)
        for work in (lambda: two.write("C"), lambda: two.find("B")):
            with pytest.raises(KeystoreUnavailableError, match="not written nor"):
                work()
            fail.append(True)

    one.clock.meanwhile = meanwhile
    _ROTATE[kind](one.byok, "t1")
    assert fail == [True, True]
    one.look()
    assert one.find("B") == 4
    one.write("D")
    if kind == DATA_KEY:  # cut off for longer than the settle time: told as what it is, and never misread
        with pytest.raises(KeystoreUnavailableError, match="does not know"):
            two.read()
    else:
        assert two.read() == ["A", *["B"] * 4, "D"]
    del two.byok._keystore.database.read
    two.clock.turn(POLL_EVERY)
    assert (two.find("B"), two.find("D"), two.read().count("D")) == (4, 1, 1)


def _away(work: Callable[..., Any]) -> Any:
    raise KeystoreUnavailableError("away")


def test_the_settle_time_covers_the_longest_ignorance() -> None:
    """Whoever looked just before a change neither writes nor searches any more once it has settled."""
    assert SETTLE >= WRITE_WITHIN + POLL_EVERY


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_that_died_is_taken_up(world: World, kind: str) -> None:
    """A generation that is found pending waits the whole settle time again; none is made beside it."""

    class DiedError(BaseException):
        pass

    def die() -> None:
        raise DiedError

    world.one.clock.meanwhile = die
    with pytest.raises(DiedError):
        _ROTATE[kind](world.one.byok, "t1")
    assert world.two.states(kind) == {1: "active", 2: "pending"}
    world.two.write("A")
    assert world.two.find("A") == 1
    assert _ROTATE[kind](world.two.byok, "t1") == 2
    assert world.two.clock.slept == [SETTLE]
    assert world.two.states(kind) == {1: "readable", 2: "active"}
    assert world.two.find("A") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_two_rotations_at_once_agree(world: World, kind: str) -> None:
    """Who comes second settles the same generation, finds it active, and makes none of its own; both may go on."""
    world.one.clock.meanwhile = lambda: results.append(_ROTATE[kind](world.two.byok, "t1"))
    results: list[int] = []
    results.append(_ROTATE[kind](world.one.byok, "t1"))
    assert results == [2, 2]
    assert world.one.states(kind) == {1: "readable", 2: "active"}
    world.one.clock.meanwhile = lambda: None
    assert _ROTATE[kind](world.one.byok, "t1") == 3
    assert world.one.states(kind) == {1: "readable", 2: "readable", 3: "active"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_that_others_overtook_changes_nothing(world: World, kind: str) -> None:
    """Who finds its generation active, or readable by now, does not bring it back."""
    epochs: list[int] = []

    def meanwhile() -> None:
        for _ in range(2):
            _ROTATE[kind](world.two.byok, "t1")
        epochs.append(world.two.row().epoch)

    world.one.clock.meanwhile = meanwhile
    assert _ROTATE[kind](world.one.byok, "t1") == 2
    assert world.one.states(kind) == {1: "readable", 2: "readable", 3: "active"}
    assert [world.one.row().epoch] == epochs


def test_both_kinds_rotate_at_once(world: World) -> None:
    """No lock and no transaction is held while a generation settles; another change in between loses nothing."""

    def meanwhile() -> None:
        world.two.byok.rotate_salt("t1")
        world.two.byok.rekey("t1")

    world.one.clock.meanwhile = meanwhile
    assert world.one.byok.rotate_data_key("t1") == 2
    assert world.one.states(DATA_KEY) == world.one.states(SEARCH_SALT) == {1: "readable", 2: "active"}
    world.two.write("A")
    assert world.two.find("A") == 1


def test_a_tenant_that_keeps_changing_is_a_conflict(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three lost races the change gives up, typed, and nothing of it is stored."""
    real, lost = Keystore.replace, []

    def late(self: Keystore, old: TenantRow, new: TenantRow, claims: Any = None) -> None:
        if self is world.one.byok._keystore:
            lost.append(1)
            world.two.byok.rekey("t1")
        real(self, old, new, claims)

    monkeypatch.setattr(Keystore, "replace", late)
    with pytest.raises(KeystoreConflictError):
        world.one.byok.rotate_salt("t1")
    assert len(lost) == 3
    assert world.two.states(SEARCH_SALT) == {1: "active"}
    assert (world.two.row().tenant_key_generation, world.two.row().epoch) == (4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pending_generation_that_is_gone_does_not_become_active(world: World, kind: str) -> None:
    """Where the keystore was restored while a generation settled, the rotation fails and what stands stays whole."""
    before = world.one.row()

    def restore() -> None:
        now = world.one.row()
        key = world.one.byok._generations._open(now)
        old = replace(before, epoch=now.epoch).next(key)
        world.one.byok._keystore.replace(now, old)

    world.one.clock.meanwhile = restore
    with pytest.raises(KeystoreConflictError, match="rotate again"):
        _ROTATE[kind](world.one.byok, "t1")
    assert world.one.states(kind) == {1: "active"}


@pytest.mark.parametrize("at", ["before", "while it settles"])
def test_a_kms_that_says_no_stops_a_rotation(world: World, at: str) -> None:
    """The customer has its say before each change; what is stored stays valid, and a later rotation goes on."""

    def refuse() -> None:
        raise KeyDisabledError("disabled", tenant="t1")

    def disable() -> None:
        CountingKms.on_unwrap = staticmethod(refuse)

    if at == "before":
        disable()
    else:
        world.one.clock.meanwhile = disable
    with pytest.raises(KeyDisabledError):
        world.one.byok.rotate_salt("t1")
    expected = {1: "active"} if at == "before" else {1: "active", 2: "pending"}
    assert world.one.states(SEARCH_SALT) == expected
    CountingKms.on_unwrap = staticmethod(lambda: None)
    world.one.clock.meanwhile = lambda: None
    assert world.one.byok.rotate_salt("t1") == 2
    world.one.write("A")
    assert world.one.find("A") == 1


async def test_from_asyncio(world: World) -> None:
    """The twins do the same, and the event loop goes on."""
    byok = world.one.byok
    assert await byok.arotate_data_key("t1") == 2
    assert await byok.arotate_salt("t1") == 2
    assert await byok.arekey("t1") == 2
    await byok.arewrap("t1")
    assert byok._keystore is not None


@pytest.mark.parametrize("end", ["forgotten", "deadline", "rekeyed"])
def test_what_is_read_by_an_earlier_epoch_ends_with_the_tenant(world: World, end: str) -> None:
    """A result that began before a rotation is read on after it, and stops when the keys go, as any other."""
    one = world.one
    one.write(*"ABCDEF")
    with one.engine.execution_options(byok_tenant="t1").connect() as connection:
        rows = iter(connection.execution_options(yield_per=1).execute(_mrns))
        assert next(rows)[0] == "A"
        for expected in "BC":
            world.two.byok.rotate_data_key("t1")
            one.look()
            one.look()
            assert next(rows)[0] == expected
        if end == "forgotten":
            one.byok.forget_keys("t1")
        elif end == "rekeyed":
            world.two.byok.rekey("t1")
            one.look()
        else:
            one.clock.turn(300)
        with pytest.raises(KeysExpiredError):
            next(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_in_grace_know_what_changed(tmp_path: Path, world: World, kind: str) -> None:
    """Keys that outlive their deadline while the KMS does not answer are no older than the keystore says."""
    one, two = world.one, world.two
    one.byok.onboard("t1-grace", world.kms, outage_grace=3600)

    def write(process: Process, mrn: str) -> None:
        with process.engine.execution_options(byok_tenant="t1-grace").begin() as connection:
            connection.execute(insert(_patient).values(mrn=mrn))

    def find(process: Process, *mrns: str) -> list[str]:
        with process.engine.execution_options(byok_tenant="t1-grace").connect() as connection:
            return [each for mrn in mrns for each in connection.scalars(_mrns.where(_patient.c.mrn == mrn))]

    def silent() -> None:
        raise KmsUnavailableError("no answer", tenant="t1-grace")

    write(two, "A")
    CountingKms.on_unwrap = staticmethod(silent)
    two.clock.turn(230)
    find(two, "A")
    two.byok._keyrings.drain()
    CountingKms.on_unwrap = staticmethod(lambda: None)
    _ROTATE[kind](one.byok, "t1-grace")
    write(one, "B")
    CountingKms.on_unwrap = staticmethod(silent)
    two.clock.turn(71)  # idle since before the rotation
    assert find(two, "A", "B") == ["A", "B"]
    CountingKms.on_unwrap = staticmethod(lambda: None)


def test_a_long_unit_of_work_looks_as_others_do(world: World) -> None:
    """With a KMS call for each unit of work, one that lasts goes on writing and searching, and knows what changed."""
    one, two = world.one, world.two
    one.byok.onboard("t1-unit", world.kms, revoke_within=0)
    find = select(_patient.c.id).where(_patient.c.mrn == "A")
    with two.engine.execution_options(byok_tenant="t1-unit").connect() as connection:
        assert connection.scalars(find).all() == []
        world.kms.unwraps.clear()
        one.clock.meanwhile = lambda: (two.clock.turn(SETTLE), connection.scalars(find).all())
        one.byok.rotate_salt("t1-unit")
        one.byok.rotate_data_key("t1-unit")
        calls = world.calls
        with one.engine.execution_options(byok_tenant="t1-unit").begin() as other:
            other.execute(insert(_patient).values(mrn="A"))
        calls += 1
        two.clock.turn(POLL_EVERY)
        assert connection.scalars(select(_patient.c.mrn).where(_patient.c.mrn == "A")).all() == ["A"]
        assert world.calls == calls


async def test_a_long_unit_of_work_under_asyncio(world: World, tmp_path: Path) -> None:
    """The look of a unit of work does not hold up the event loop."""
    byok, clock = world.one.byok, world.one.clock
    await byok.aonboard("t1-unit", world.kms, revoke_within=0)
    world.kms.unwraps.clear()
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'data.db'}")
    byok.attach(engine)
    async with byok.asession("t1-unit", engine) as session:
        for _ in range(3):
            assert (await session.scalars(select(_patient.c.id).where(_patient.c.mrn == "A"))).all() == []
            clock.turn(WRITE_WITHIN + 1)
    assert world.calls == 1
    await engine.dispose()


# -- retiring and destroying -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_retire_and_destroy(world: World, kind: str) -> None:
    """A retired generation is out of the keyrings but kept; destroyed it is gone. Each again changes nothing."""
    one, two, generations = world.one, world.two, world.one.byok._generations
    one.write("A")
    _ROTATE[kind](one.byok, "t1")
    one.look()
    two.write("B")
    one.clock.slept.clear()
    generations.retire("t1", kind, 1)
    assert one.clock.slept == [SETTLE]  # who wrote with it until now has heard of the other
    assert one.states(kind) == {1: "retired", 2: "active"}
    epoch = one.row().epoch
    generations.retire("t1", kind, 1)
    assert one.row().epoch == epoch
    for process in (one, two):
        process.look()
        if kind == DATA_KEY:
            with pytest.raises(UnknownDataKeyError):
                process.read()
        else:
            assert (process.find("A"), process.find("B")) == (0, 1)
    assert _ROTATE[kind](one.byok, "t1") == 3  # numbers are not used again
    generations.destroy("t1", kind, 1)
    assert one.states(kind) == {2: "readable", 3: "active"}
    epoch = one.row().epoch
    generations.destroy("t1", kind, 1)
    assert one.row().epoch == epoch
    assert [each.state for each in one.events if (each.kind, each.generation) == (kind, 1)] == [
        "readable", "retired", "destroyed"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_use_is_neither_retired_nor_destroyed(world: World, kind: str) -> None:
    """Active and pending generations cannot be taken away, nor a readable one destroyed, nor one that never was."""
    generations, refused = world.one.byok._generations, []

    def meanwhile() -> None:
        world.two.clock.meanwhile = lambda: None
        for generation in (1, 2, 9):
            with pytest.raises(ConfigurationError):
                world.two.byok._generations.retire("t1", kind, generation)
            refused.append(generation)

    world.one.clock.meanwhile = meanwhile
    _ROTATE[kind](world.one.byok, "t1")
    assert refused == [1, 2, 9]
    for generation in (1, 2):
        with pytest.raises(ConfigurationError, match="only a retired generation"):
            generations.destroy("t1", kind, generation)
    assert world.one.states(kind) == {1: "readable", 2: "active"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("generation", "state"),
    [(g, s) for g in (1, 2, 3) for s in ("pending", "active", "readable", "retired", "odd")],
)
def test_a_state_changed_by_hand_is_refused(world: World, kind: str, generation: int, state: str) -> None:
    """Whoever writes to the keystore cannot bring a retired generation back, nor retire, activate or hide one."""
    generations = world.one.byok._generations
    for _ in range(2):
        _ROTATE[kind](world.one.byok, "t1")
    generations.retire("t1", kind, 1)  # 1 retired, 2 readable, 3 active
    before = world.one.states(kind)[generation]
    rows = table("generation")
    mine = (rows.c.tenant == "t1", rows.c.kind == kind, rows.c.generation == generation)
    with world.hand.begin() as connection:
        connection.execute(update(rows).where(*mine).values(state=state))
    fresh = world.two
    if state == before:
        fresh.write("A")
        return
    with pytest.raises(KeystoreTamperedError):
        fresh.write("A")
    with pytest.raises(KeystoreTamperedError):
        generations.rekey("t1")


# -- the tenant key --------------------------------------------------------------------------------------------------


def test_rekey(world: World) -> None:
    """A new tenant key under the same customer key: all is sealed anew, rows stay, others open once more."""
    one, two = world.one, world.two
    one.write("A")
    one.byok.rotate_data_key("t1")
    one.byok.rotate_salt("t1")
    one.byok._generations.retire("t1", DATA_KEY, 1)
    two.write("B")
    before, events = one.row(), len(one.events)
    world.kms.unwraps.clear()
    assert one.byok.rekey("t1") == 2
    assert world.calls == 2  # to open the old one, and to prove the new one
    after = one.row()
    assert after.epoch == before.epoch + 1
    assert after.tenant_key_id != before.tenant_key_id
    assert after.wrappings[0].wrapped != before.wrappings[0].wrapped
    pairs = list(
        zip((*before.generations, *before.retired), (*after.generations, *after.retired), strict=True)
    )
    assert len(pairs) == 4
    for old, new in pairs:
        assert old[:4] == new[:4]
        assert old.sealed != new.sealed
    assert [(each.kind, each.generation) for each in one.events[events:]] == [("tenant-key", 2)]
    world.kms.unwraps.clear()
    two.clock.turn(POLL_EVERY)
    assert two.find("B") == 1
    assert world.calls == 1
    two.write("C")
    one.look()
    assert (one.find("B"), one.find("C")) == (1, 1)
    assert one.byok.rotate_salt("t1") == 3  # it works on


def test_rewrap_to_another_key_and_back(world: World, tmp_path: Path, customer_key: Path) -> None:
    """The same tenant key under another customer key: others go on with what they hold, then ask the new one."""
    other = tmp_path / "other.key"
    LocalKms.create(other)
    one, two = world.one, world.two
    two.write("A")
    before = one.row()
    one.byok.rewrap("t1", LocalKms(other))
    after = one.row()
    assert (after.wrappings[0].provider, after.epoch) == ("local", before.epoch + 1)
    assert (after.tenant_key_id, list(after.generations)) == (before.tenant_key_id, list(before.generations))
    away = customer_key.rename(tmp_path / "away")
    world.kms.unwraps.clear()
    two.clock.turn(POLL_EVERY)
    two.write("B")
    assert two.find("A") == 1
    two.byok.forget_keys()
    assert (two.find("A"), two.find("B")) == (1, 1)
    assert world.calls == 0
    away.rename(customer_key)
    one.byok.rewrap("t1", world.kms)
    other.unlink()
    two.byok.forget_keys()
    assert (two.find("A"), world.calls) == (1, 2)
    before = one.row()
    one.byok.rewrap("t1")  # by the key's current version
    assert one.row().wrappings[0].wrapped != before.wrappings[0].wrapped
    assert [(each.kind, each.state) for each in one.events] == [("wrapping", "active")] * 3


def _wrong_back(world: World, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    real = CountingKms.unwrap

    def unwrap(self: CountingKms, wrapped: Any, *, tenant: str) -> bytes:
        found = real(self, wrapped, tenant=tenant)
        return found if world.calls == 1 else bytes(len(found))

    monkeypatch.setattr(CountingKms, "unwrap", unwrap)
    return WrongKeyError


def _refuses_to_wrap(world: World, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    def wrap(self: CountingKms, payload: bytes, *, tenant: str) -> Any:
        raise KeyDisabledError("disabled", tenant=tenant)

    monkeypatch.setattr(CountingKms, "wrap", wrap)
    return KeyDisabledError


@pytest.mark.parametrize("change", ["rekey", "rewrap"])
@pytest.mark.parametrize("fault", [_wrong_back, _refuses_to_wrap], ids=["not the same back", "refuses"])
def test_a_customer_key_that_does_not_prove_itself_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, change: str, fault: Callable[..., type[Exception]]
) -> None:
    """A tenant key that could not be unwrapped again would be lost with all the tenant's data."""
    before = world.one.row()
    error = fault(world, monkeypatch)
    with pytest.raises(error):
        getattr(world.one.byok, change)("t1")
    assert world.one.row() == before


@pytest.mark.parametrize("change", ["rotate_data_key", "rotate_salt", "rekey", "rewrap"])
def test_an_unknown_tenant(world: World, change: str) -> None:
    """There is nothing to change for a tenant that was never onboarded, or was removed."""
    with world.hand.begin() as connection:
        connection.execute(delete(table("tenant")))
    with pytest.raises(UnknownTenantError):
        getattr(world.one.byok, change)("t1")


# -- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["rotate_data_key", "rotate_salt", "rekey", "rewrap"])
def test_no_frame_that_touches_the_database_holds_a_secret(
    world: World, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A crash report of a failing keystore shows the variables of each frame: no key, salt or payload among them."""
    shown: list[bytes] = []
    real = Keystore.replace

    def look(self: Keystore, *args: Any) -> None:
        for frame in inspect.stack():
            shown.extend(value for value in frame.frame.f_locals.values() if isinstance(value, bytes))
        real(self, *args)

    monkeypatch.setattr(Keystore, "replace", look)
    getattr(world.one.byok, change)("t1")
    row = world.one.row()
    payload = world.one.byok._calls.unwrap(row, "rotate")
    key = row.open(payload)
    secrets = {key.open(each.kind, each.generation, each.id, each.sealed) for each in row.generations}
    secrets |= {payload, unpack_tenant_key(payload, "t1", row.tenant_key_generation)}
    assert not secrets & set(shown)
