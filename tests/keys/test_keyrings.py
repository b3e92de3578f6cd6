"""Keys in memory: how long they are used, who opens them, and what other processes change meanwhile."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from keys_tools import (
    KEYSTORE_KEY,
    CountingKms,
    TurnableClock,
    World,
    hand_in,
    names,
    patient,
    publish_data_key,
    table,
)
from sqlalchemy import (
    Engine,
    LargeBinary,
    delete,
    event,
    insert,
    select,
    type_coerce,
)

from sqla_byok import (
    Byok,
    KeyDisabledError,
    KeysExpiredError,
    KeystoreRolledBackError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    KmsUnavailableError,
    LocalKms,
    UnknownTenantError,
)
from sqla_byok.keys.calls import CALLS_AT_ONCE
from sqla_byok.keys.keyrings import POLL_EVERY, WRITE_WITHIN

_headers = select(type_coerce(patient.c.name, LargeBinary)).order_by(patient.c.id)


@pytest.fixture
def world(tmp_path: Path, counting_kms: CountingKms, keystore_key: str) -> Iterator[World]:
    world = World(tmp_path, counting_kms, keystore_key)
    yield world
    world.close()


def _refuse() -> None:
    raise KeyDisabledError("the key is disabled", tenant="t1")


# -- the deadline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["boot_now", "wall_now"])
def test_the_deadline_by_either_clock(world: World, clock: str) -> None:
    """At revoke_within the next statement asks the KMS again, whichever clock says so, and not before."""
    world.write("Ada")
    ring = world.byok._keyrings.get("t1")
    setattr(world.clock, clock, getattr(world.clock, clock) + 299.9)
    assert world.byok._keyrings._usable(ring)
    setattr(world.clock, clock, getattr(world.clock, clock) + 0.2)
    assert not world.byok._keyrings._usable(ring)
    assert world.calls == ["t1"]
    assert world.read() == ["Ada"]
    assert world.calls == ["t1", "t1"]


def test_a_wall_clock_set_back_gains_nothing(world: World) -> None:
    """The boot clock goes on when somebody sets the date back."""
    world.open()
    world.clock.wall_now -= 86_400
    world.clock.boot_now += 300
    world.open()
    assert world.calls == ["t1", "t1"]


def test_the_deadline_counts_from_the_sending_of_the_call(world: World) -> None:
    """What a slow KMS answered is as old as its question."""
    CountingKms.on_unwrap = staticmethod(lambda: world.clock.turn(299))
    world.open()
    CountingKms.on_unwrap = staticmethod(lambda: None)
    world.clock.turn(1)
    world.open()
    assert world.calls == ["t1", "t1"]


def test_each_tenant_has_its_own_deadline(world: World) -> None:
    """revoke_within is the tenant's, from its row."""
    world.byok.onboard("quick", world.kms, revoke_within=1)
    world.calls.clear()
    for _ in range(2):
        world.open("quick")
        world.open("t1")
        world.clock.turn(1)
    assert world.calls == ["quick", "t1", "quick"]


@pytest.mark.parametrize("end", ["deadline", "forget_keys", "close", "refused"])
def test_a_result_that_is_still_read_stops(world: World, end: str) -> None:
    """When the keys go, rows that are fetched later do not decrypt any more, on the same connection or another."""
    world.write(*"abcdef")
    with world.connect() as connection, world.connect() as other:
        results = [
            connection.execution_options(yield_per=2).execute(names),
            other.execution_options(stream_results=True, max_row_buffer=1).execute(names),
        ]
        iterators = [iter(result) for result in results]
        assert [next(iterator)[0] for iterator in iterators] == ["a", "a"]
        if end == "forget_keys":
            world.byok.forget_keys("t1")
        elif end == "close":
            world.byok.close()
        else:
            world.clock.turn(300)
        if end == "refused":
            CountingKms.on_unwrap = staticmethod(_refuse)
            with pytest.raises(KeyDisabledError):
                world.read()
        for iterator in iterators:
            with pytest.raises(KeysExpiredError, match="run the statement again") as raised:
                list(iterator)
            assert raised.value.tenant == "t1"
    assert world.calls == ["t1"] + ["t1"] * (end == "refused")


def test_forgotten_keys_are_asked_for_again(world: World) -> None:
    """forget_keys() takes one tenant's keys or all."""
    world.write("Ada")
    for tenant in ("t2", "t3"):
        world.open(tenant)
    world.byok.forget_keys("t1")
    world.byok.forget_keys("nobody")
    for tenant in ("t1", "t2", "t3"):
        world.open(tenant)
    assert world.calls == ["t1", "t2", "t3", "t1"]
    world.byok.forget_keys()
    for tenant in ("t1", "t2", "t3"):
        world.open(tenant)
    assert world.calls[4:] == ["t1", "t2", "t3"]
    assert world.read() == ["Ada"]


# -- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyDisabledError, KmsUnavailableError])
def test_a_failed_opening_is_not_kept(world: World, error: type[Exception]) -> None:
    """After a "no" or no answer the next statement asks anew; a failure is no state."""
    world.write("Ada")
    world.byok.forget_keys()

    def fail() -> None:
        raise error("not now")

    CountingKms.on_unwrap = staticmethod(fail)
    for _ in range(2):
        with pytest.raises(error, match="not now"):
            world.read()
    CountingKms.on_unwrap = staticmethod(lambda: None)
    assert world.read() == ["Ada"]
    assert world.calls == ["t1"] * 4


def test_an_interrupted_thread_does_not_interrupt_the_others(world: World) -> None:
    """Ctrl-C ends the thread that asks the KMS; those that waited for its answer ask themselves."""
    waiting, asked = threading.Event(), threading.Event()

    def interrupt() -> None:
        asked.set()
        if len(world.calls) == 1:
            assert waiting.wait(10)
            raise KeyboardInterrupt

    CountingKms.on_unwrap = staticmethod(interrupt)

    def waiter() -> list[Any]:
        waiting.set()
        return world.read()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(world.open)
        assert asked.wait(10)
        second = pool.submit(waiter)
        assert isinstance(first.exception(10), KeyboardInterrupt)
        assert second.result(10) == []
    assert world.calls == ["t1", "t1"]


def test_keys_forgotten_while_they_are_opened_are_asked_for_anew(world: World) -> None:
    """An answer that was asked for before forget_keys() is not used after it."""

    def forget() -> None:
        CountingKms.on_unwrap = staticmethod(lambda: None)
        world.byok.forget_keys("t1")

    CountingKms.on_unwrap = staticmethod(forget)
    world.open()
    assert world.calls == ["t1", "t1"]
    world.open()
    assert world.calls == ["t1", "t1"]


async def test_a_waiter_that_is_cancelled_harms_nobody(world: World) -> None:
    """Neither the first nor a later task takes the opening with it when it is cancelled."""
    release, asked = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(asked.set)
        assert release.wait(10)

    CountingKms.on_unwrap = staticmethod(wait)

    async def enter() -> str:
        async with world.byok.tenant("t1"):
            return "open"

    tasks = [asyncio.create_task(enter()) for _ in range(4)]
    await asked.wait()
    for task in (tasks[0], tasks[2]):
        task.cancel()
    await asyncio.sleep(0)
    release.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in done] == [asyncio.CancelledError, str, asyncio.CancelledError, str]
    assert await enter() == "open"
    assert world.calls == ["t1"]


async def test_a_waiter_that_is_cancelled_in_the_queue_harms_nobody(world: World) -> None:
    """So many tenants are opened at once and no more; who waits for another may give up, and takes nobody along."""
    release, asked, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()
    slow = [f"slow-{n:02}" for n in range(CALLS_AT_ONCE)]
    for tenant in slow:
        await asyncio.to_thread(world.byok.onboard, tenant, world.kms)
    world.calls.clear()

    def wait() -> None:
        if len(world.calls) == len(slow):
            loop.call_soon_threadsafe(asked.set)
        assert release.wait(10)

    CountingKms.on_unwrap = staticmethod(wait)

    async def enter(tenant: str) -> str:
        async with world.byok.tenant(tenant):
            return tenant

    many = [asyncio.create_task(enter(tenant)) for tenant in slow]
    await asked.wait()
    first, second = (asyncio.create_task(enter("t1")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert sorted(world.calls) == slow
    release.set()
    assert await asyncio.gather(*many, second) == [*slow, "t1"]
    assert first.cancelled()
    assert world.calls[CALLS_AT_ONCE:] == ["t1"]


async def test_all_waiters_of_a_failed_opening_fail_alike(world: World) -> None:
    """Tasks that waited for the same answer get the same refusal, from one call."""
    release, asked = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def refuse() -> None:
        loop.call_soon_threadsafe(asked.set)
        assert release.wait(10)
        _refuse()

    CountingKms.on_unwrap = staticmethod(refuse)

    async def enter() -> None:
        async with world.byok.tenant("t1"):
            pass

    tasks = [asyncio.create_task(enter()) for _ in range(10)]
    await asked.wait()
    release.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {KeyDisabledError}
    assert world.calls == ["t1"]


def test_one_slow_tenant_does_not_hold_up_another(world: World) -> None:
    """While one tenant's KMS does not answer, others open."""
    release, asked = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        if world.calls[-1] == "t1":
            assert release.wait(10)

    CountingKms.on_unwrap = staticmethod(slow)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(world.open)
        assert asked.wait(10)
        world.open("t2")
        world.byok.forget_keys("t3")
        assert not opening.done()
        release.set()
        opening.result(10)
    assert world.calls == ["t1", "t2"]


# -- the bound -------------------------------------------------------------------------------------------------------


def test_the_longest_unused_tenant_makes_room(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str
) -> None:
    """max_tenants bounds what is in memory; a result under way goes on, until its keys are forgotten."""
    world = World(tmp_path, counting_kms, keystore_key, max_tenants=2)
    world.write(*"abc", tenant="t1")
    with world.connect("t1") as connection:
        rows = iter(connection.execution_options(yield_per=1).execute(names))
        assert next(rows)[0] == "a"
        world.clock.turn(1)
        world.open("t2")
        world.clock.turn(1)
        world.open("t1")
        world.clock.turn(1)
        world.open("t3")  # t2 goes
        world.clock.turn(1)
        world.open("t1")
        assert world.calls == ["t1", "t2", "t3"]
        world.clock.turn(1)
        world.open("t2")  # t3 goes, since it was used before t1
        world.open("t3")  # t1 goes
        assert world.calls == ["t1", "t2", "t3", "t2", "t3"]
        assert next(rows)[0] == "b"
        world.byok.forget_keys("t1")
        with pytest.raises(KeysExpiredError):
            next(rows)
    world.close()


# -- what other processes change -------------------------------------------------------------------------------------


def test_a_new_generation_is_taken_over(world: World) -> None:
    """After the poll interval, without a KMS call; rows of either generation are readable, also by those who wait."""
    world.write("old")
    key_id = publish_data_key(world.hand, "t1", KEYSTORE_KEY)
    world.calls.clear()
    world.write("still old")
    world.clock.turn(POLL_EVERY)
    with world.connect() as connection:
        rows = iter(connection.execution_options(yield_per=1).execute(names))
        assert next(rows)[0] == "old"
        world.open()
        assert [row[0] for row in rows] == ["still old"]
    world.write("new")
    assert world.read() == ["old", "still old", "new"]
    with world.engine.connect() as connection:
        headers = [blob[2:18] == key_id for blob in connection.scalars(_headers)]
    assert headers == [False, False, True]
    assert world.calls == []
    world.byok.forget_keys()
    assert world.read() == ["old", "still old", "new"]


def test_between_two_looks_the_keystore_is_not_asked(world: World) -> None:
    """A warm tenant costs no statement on the keystore, and one for each poll."""
    world.open()
    statements: list[str] = []
    event.listen(
        world.byok._database._engine,
        "before_cursor_execute",
        lambda conn, cursor, statement, *rest: statements.append(statement.split()[0]),
    )
    for moved, seen in ((0.0, 0), (POLL_EVERY - 0.1, 0), (0.1, 1), (0.0, 1), (POLL_EVERY, 2)):
        world.clock.turn(moved)
        world.open()
        assert statements == ["SELECT"] * seen


def test_without_the_keystore_reading_goes_on_to_the_deadline(world: World) -> None:
    """Writing stops WRITE_WITHIN after the last look and comes back with the keystore; reading at the deadline."""
    world.write("Ada")
    with world.hand.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE byok_tenant RENAME TO gone")
    world.clock.turn(WRITE_WITHIN - 0.1)
    world.write("Bob")
    world.clock.turn(0.1)
    with pytest.raises(KeystoreUnavailableError, match="can be read but not written") as raised:
        world.write("Cyd")
    assert raised.value.tenant == "t1"
    assert world.read() == ["Ada", "Bob"]
    with world.hand.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO byok_tenant")
    world.clock.turn(POLL_EVERY)
    world.write("Cyd")
    with world.hand.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE byok_tenant RENAME TO gone")
    world.clock.turn(300 - WRITE_WITHIN - POLL_EVERY - 0.1)
    assert world.read() == ["Ada", "Bob", "Cyd"]
    world.clock.turn(0.2)
    with pytest.raises(KeystoreUnavailableError):
        world.read()
    assert world.calls == ["t1"]


def _delete(world: World) -> None:
    with world.hand.begin() as connection:
        connection.execute(delete(table("tenant")).where(table("tenant").c.tenant == "t1"))


@pytest.mark.parametrize(
    ("hand", "error"),
    [
        (_delete, UnknownTenantError),
        (lambda world: world.alter("tenant", epoch=9), KeystoreTamperedError),
        (lambda world: world.alter("tenant", epoch=0), KeystoreTamperedError),
        (lambda world: world.alter("tenant", epoch="x"), KeystoreTamperedError),
    ],
    ids=["deleted", "epoch raised", "epoch lowered", "epoch nonsense"],
)
def test_a_keystore_that_says_no_drops_the_keys(
    world: World, hand: Callable[[World], None], error: type[Exception]
) -> None:
    """At the next look: the statement is refused, and a result that is still read stops."""
    world.write(*"abc")
    with world.connect() as connection:
        rows = iter(connection.execution_options(yield_per=1).execute(names))
        next(rows)
        hand(world)
        world.open()  # not looked yet
        world.clock.turn(POLL_EVERY)
        for _ in range(2):
            with pytest.raises(error):
                world.open()
        with pytest.raises(KeysExpiredError):
            next(rows)
    assert world.calls == ["t1"]


@pytest.mark.parametrize("authenticated", [True, False])
def test_an_old_state_that_was_put_back_while_open(
    tmp_path: Path, keystore_key: str, local_kms: LocalKms, authenticated: bool
) -> None:
    """A process that has seen epoch 2 refuses epoch 1, with its rows intact, also where no row is authenticated."""
    url, clock = f"sqlite:///{tmp_path / 'k.db'}", TurnableClock()
    byok = Byok(keystore=url, keystore_key=keystore_key if authenticated else None, clock=clock)
    byok.create_keystore()
    byok.onboard("t1", local_kms)
    engine = hand_in(url)
    old = _snapshot(engine)
    publish_data_key(engine, "t1", KEYSTORE_KEY if authenticated else None)
    with byok.tenant("t1"):
        pass
    _restore(engine, old)
    clock.turn(POLL_EVERY)
    for _ in range(2):
        with pytest.raises(KeystoreRolledBackError, match="an old state was put back"), byok.tenant("t1"):
            pass
    engine.dispose()
    byok.close()


_NAMES = ("tenant", "wrapping", "generation")


def _snapshot(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    with engine.connect() as connection:
        return {n: [dict(r) for r in connection.execute(select(table(n))).mappings()] for n in _NAMES}


def _restore(engine: Engine, state: dict[str, list[dict[str, Any]]]) -> None:
    with engine.begin() as connection:
        for name in reversed(_NAMES):
            connection.execute(delete(table(name)))
        for name in _NAMES:
            connection.execute(insert(table(name)), state[name])


def test_a_forged_generation_is_not_taken_over(world: World) -> None:
    """A manifest that does not fit its records is refused at the look, and the keys are dropped."""
    world.write("Ada")
    publish_data_key(world.hand, "t1", KEYSTORE_KEY)
    with world.hand.begin() as connection:
        g = table("generation")
        connection.execute(delete(g).where(g.c.tenant == "t1", g.c.generation == 1, g.c.kind == "data-key"))
    world.clock.turn(POLL_EVERY)
    for _ in range(2):
        with pytest.raises(KeystoreTamperedError, match="was altered"):
            world.read()


def test_another_tenant_key_is_opened_anew(world: World) -> None:
    """A row that was wrapped afresh with another tenant key costs one call, and the old keys are dropped."""
    world.open()
    with world.hand.begin() as connection:
        for name in reversed(_NAMES):
            connection.execute(delete(table(name)).where(table(name).c.tenant == "t1"))
    world.byok.onboard("t1", world.kms)
    publish_data_key(world.hand, "t1", KEYSTORE_KEY)  # epoch 2, so that the process looks
    world.calls.clear()
    world.clock.turn(POLL_EVERY)
    world.write("Ada")
    assert world.calls == ["t1"]
    assert world.read() == ["Ada"]


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_key_objects_tell_nothing(world: World) -> None:
    """No repr of what holds keys shows any, and none of it can be pickled or copied."""
    world.open()
    keyrings = world.byok._keyrings
    ring = keyrings.get("t1")
    for held in (world.byok, world.byok._keystore, keyrings, ring, ring.write, ring.tenant_key):
        assert repr(held) == f"<{type(held).__name__}>"
        for leave in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                leave(held)
