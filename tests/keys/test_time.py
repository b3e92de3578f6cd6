"""Keys and time: refreshing in the background, outages and grace, breakers, caps, and units of work."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from keys_tools import CountingKms, World, insert_patient, names, until
from sqlalchemy import delete

from sqla_byok import (
    AccessDeniedError,
    ConfigurationError,
    CredentialExpiredError,
    KeyDisabledError,
    KeysExpiredError,
    KeystoreUnavailableError,
    KmsBlockedError,
    KmsError,
    KmsUnavailableError,
    LocalKms,
    ThrottledError,
    UnknownTenantError,
)
from sqla_byok.audit import Event, KeysOpened, KeyStateChanged, KmsCalled
from sqla_byok.keys import calls
from sqla_byok.keys.keyrings import POLL_EVERY, UNIT_WITHIN

GRACE = 600


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def world(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str, events: list[Event]
) -> Iterator[World]:
    world = World(tmp_path, counting_kms, keystore_key, on_event=events.append)
    world.byok.onboard("patient-one", counting_kms, outage_grace=GRACE)
    world.calls.clear()
    events.clear()
    yield world
    world.close()


def answer(error: type[Exception] | None = None, **attributes: object) -> None:
    """What the KMS says from now on."""

    def say() -> None:
        if error is not None:
            raised = error("as the test wants it")
            for name, value in attributes.items():
                setattr(raised, name, value)
            raise raised

    CountingKms.on_unwrap = staticmethod(say)


def turn(world: World, seconds: float, *tenants: str, step: float = 1.0) -> None:
    """Let time pass, with the tenants in use and the background done with its work at each step."""
    end = world.clock.boot_now + seconds
    while world.clock.boot_now < end:
        world.clock.turn(min(step, end - world.clock.boot_now))
        for tenant in tenants:
            world.open(tenant)
        world.byok._keyrings.drain()


# -- in the background -----------------------------------------------------------------------------------------------


def test_a_tenant_in_use_is_asked_for_in_the_background(world: World) -> None:
    """From half of revoke_within on, and before three quarters of it, the KMS is asked without anybody waiting."""
    world.write("Ada")
    turn(world, 149, "t1")
    assert world.calls == ["t1"]
    turn(world, 79, "t1")
    assert world.calls == ["t1", "t1"]
    turn(world, 10_000, "t1")
    assert 10_000 / 229 <= len(world.calls) <= 10_000 / 149
    assert world.read() == ["Ada"]


def test_processes_that_opened_together_do_not_ask_together(world: World) -> None:
    """The point at which a keyring is renewed is spread."""
    world.open("t1")
    ring = world.byok._keyrings.get("t1")
    points = set()
    for _ in range(200):
        ring.lease.renew(0.0, 0.0, 300.0, 0.0)
        points.add(ring.lease.refresh_at)
        assert 150 <= ring.lease.refresh_at <= 225
    assert max(points) - min(points) > 50
    assert len(points) > 190


def test_an_idle_tenant_is_asked_for_by_nobody(world: World) -> None:
    """Only tenants in use are renewed; the others' keys go at their deadline, without a call."""
    world.open("t1")
    world.open("t2")
    ring = world.byok._keyrings.get("t2")
    turn(world, 305, "t1")
    assert Counter(world.calls) == {"t1": 2, "t2": 1}
    assert ring.cleared
    assert world.byok.tenants("closed") == ["patient-one", "t2", "t3"]


def test_a_no_in_the_background_drops_the_keys_at_once(world: World) -> None:
    """A customer that says no does not wait for its deadline, nor for a statement's own call."""
    world.write("Ada")
    answer(KeyDisabledError)
    ring = world.byok._keyrings.get("t1")
    turn(world, 149, "t1")
    with pytest.raises(KeyDisabledError):
        turn(world, 79, "t1")
    assert ring.cleared
    assert world.clock.boot_now - ring.lease.renewed_until < 0  # long before the deadline that it had
    with pytest.raises(KeyDisabledError):
        world.read()


def test_a_row_that_is_gone_is_a_no(world: World) -> None:
    """An operator that deletes a tenant's row takes its keys out of every process at its next look."""
    from keys_tools import table

    world.open("t1")
    ring = world.byok._keyrings.get("t1")
    with world.hand.begin() as connection:
        for name in ("generation", "wrapping", "tenant"):
            connection.execute(delete(table(name)).where(table(name).c.tenant == "t1"))
    with pytest.raises(UnknownTenantError):
        turn(world, POLL_EVERY + 1, "t1")
    assert ring.cleared


def test_a_long_result_outlives_the_first_deadline(world: World) -> None:
    """Rows that are read for longer than revoke_within go on while the KMS agrees, and stop when it says no."""
    world.write(*"abcdefghij")
    with world.connect() as connection:
        rows = iter(connection.execution_options(yield_per=1).execute(names))

        def slowly(name: str) -> str:
            world.clock.turn(70)
            world.byok._keyrings.drain()
            return name

        read = [slowly(next(rows)[0]) for _ in range(6)]
        assert read == list("abcdef")
        assert len(world.calls) >= 2
        answer(AccessDeniedError)
        with pytest.raises(KeysExpiredError):
            read += [slowly(row[0]) for row in rows]
    assert len(read) < 10


def test_new_times_reach_the_processes_that_have_a_tenant_open(world: World) -> None:
    """A refresh takes revoke_within and grace from the row as it is by then."""
    world.open("patient-one")
    ring = world.byok._keyrings.get("patient-one")
    assert (ring.lease.outage_grace, ring.lease.renewed_until - world.clock.boot_now) == (GRACE, 300)


def test_one_look_at_the_keystore_serves_all_tenants_in_use(world: World) -> None:
    """A process with thousands of busy tenants asks the keystore every few seconds, not thousands of times."""
    busy = [f"busy-{n}" for n in range(30)]
    for tenant in busy:
        world.byok.onboard(tenant, world.kms)
        world.open(tenant)
    asked: list[int] = []
    states = world.byok._keystore.states
    world.byok._keystore.states = lambda names: (asked.append(len(names)), states(names))[1]  # type: ignore[method-assign]
    turn(world, 60, *busy)
    assert 15 <= len(asked) <= 41
    assert sum(asked) >= 30 * 60 / POLL_EVERY


# -- no answer -------------------------------------------------------------------------------------------------------


each_outage = pytest.mark.parametrize("error", [KmsUnavailableError, ThrottledError, KmsBlockedError])


@each_outage
@pytest.mark.parametrize("used", [True, False], ids=["in use", "idle since it was asked"])
def test_an_outage_is_served_until_deadline_and_grace(
    world: World, error: type[KmsError], used: bool
) -> None:
    """Not a second longer, whether the tenant was in use all the time or came back in the middle of it."""
    world.write("Ada", tenant="patient-one")
    start = world.byok._keyrings.get("patient-one").lease.renewed_until - 300
    answer(error)
    if used:
        turn(world, 300 + GRACE - 1, "patient-one")
    else:
        turn(world, 230, "patient-one")
        world.clock.turn(70 + GRACE - 1)
    assert world.read("patient-one") == ["Ada"]
    assert world.clock.boot_now - start == 300 + GRACE - 1
    assert world.byok.tenants("grace") == ["patient-one"]
    world.byok._keyrings.drain()
    world.clock.turn(1)
    with pytest.raises(error):
        world.read("patient-one")
    assert world.byok.tenants("dark") == ["patient-one"]


@each_outage
def test_the_grace_of_an_idle_tenant_needs_an_outage(world: World, error: type[KmsError]) -> None:
    """Nobody has asked the KMS of an idle tenant, so its keys go at the deadline; the grace itself prolongs nothing."""
    world.write("Ada", tenant="patient-one")
    ring = world.byok._keyrings.get("patient-one")
    world.clock.turn(300)
    until(lambda: ring.cleared)
    assert world.calls == ["patient-one"]
    answer(error)
    with pytest.raises(error):
        world.read("patient-one")


@pytest.mark.parametrize("at", [250, 320, 700], ids=["before the deadline", "after it", "late"])
def test_a_no_after_an_outage_needs_no_use(world: World, at: float) -> None:
    """Keys that outlive the deadline since the KMS did not answer are asked for on, used or not: a "no" bites."""
    world.write("Ada", tenant="patient-one")
    answer(KmsUnavailableError)
    turn(world, at, "patient-one")
    ring = world.byok._keyrings.get("patient-one")
    assert not ring.cleared
    answer(KeyDisabledError)
    world.clock.turn(max(31, 300 - at))
    until(lambda: ring.cleared)
    until(lambda: world.byok.tenants("dark") == ["patient-one"])


def test_a_long_result_goes_on_in_the_grace(world: World) -> None:
    """Rows that are read slowly during an outage go on until the grace is over, and not a row longer."""
    world.byok.onboard("slow", world.kms, outage_grace=60)
    world.write(*(str(number) for number in range(50)), tenant="slow")
    with world.connect("slow") as connection:
        rows = iter(connection.execution_options(yield_per=1).execute(names))
        next(rows)
        answer(KmsUnavailableError)
        until_then = world.clock.boot_now + 360
        with pytest.raises(KeysExpiredError):  # noqa: PT012 - whichever row it is
            for _ in rows:
                last = world.clock.boot_now
                world.byok._keyrings.drain()
                world.clock.turn(10)
    assert last == until_then - 10


@pytest.mark.parametrize("counted_by", ["boot_now", "wall_now"])
def test_the_question_between_rows(world: World, counted_by: str) -> None:
    """Whichever clock says that the time is up: the keys go, and a renewal that is due is begun without waiting."""
    world.open("t1")
    keyrings = world.byok._keyrings
    ring = keyrings.get("t1")
    world.clock.turn(250)
    keyrings.check(ring)
    keyrings.drain()
    assert world.calls == ["t1", "t1"]
    setattr(world.clock, counted_by, getattr(world.clock, counted_by) + 300)
    with pytest.raises(KeysExpiredError):
        keyrings.check(ring)
    assert ring.cleared
    assert world.calls == ["t1", "t1"]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_forgetting_all_forgets_all(world: World, error: type[BaseException]) -> None:
    """A listener that raises when the first tenant's keys go leaves no other tenant's in memory, nor untold."""
    rings = [(world.open(tenant), world.byok._keyrings.get(tenant))[1] for tenant in ("t1", "t2", "t3")]
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, KeyStateChanged):
            told.append(event.tenant)
            raise error

    world.byok._audit.listeners.append(listen)
    with contextlib.nullcontext() if issubclass(error, Exception) else pytest.raises(error):
        world.byok.forget_keys()
    assert all(ring.cleared for ring in rings)
    assert sorted(told) == ["t1", "t2", "t3"]


def test_a_yes_after_an_outage_needs_no_use(world: World) -> None:
    """Likewise a "yes": the tenant is fresh again for revoke_within, and idle after that."""
    world.write("Ada", tenant="patient-one")
    answer(KmsUnavailableError)
    turn(world, 400, "patient-one")
    ring = world.byok._keyrings.get("patient-one")
    answer()
    world.clock.turn(31)
    until(lambda: ring.lease.renewed_at == world.clock.boot_now)
    world.clock.turn(299)
    assert world.read("patient-one") == ["Ada"]


def test_a_late_answer_does_not_call_a_dark_tenant_in_grace(world: World) -> None:
    """A refresh that was under way when the tenant became dark says nothing new."""
    asked, goes_on = threading.Event(), threading.Event()

    def say() -> None:
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            goes_on.wait(10)
        raise ThrottledError("as the test wants it")

    world.write("Ada", tenant="patient-one")
    CountingKms.on_unwrap = staticmethod(say)
    world.clock.turn(250)
    world.open("patient-one")
    assert asked.wait(10)
    world.clock.turn(50 + GRACE)
    with pytest.raises(ThrottledError):
        world.read("patient-one")
    assert world.byok.tenants("dark") == ["patient-one"]
    goes_on.set()
    world.byok._keyrings.drain()
    assert world.byok.tenants("dark") == ["patient-one"]


def test_without_grace_an_outage_is_dark_at_the_deadline(world: World) -> None:
    """Zero is the default: no consent, no grace."""
    world.write("Ada")
    answer(KmsUnavailableError)
    turn(world, 299, "t1")
    assert world.read() == ["Ada"]
    world.clock.turn(1)
    with pytest.raises(KmsUnavailableError):
        world.read()


@pytest.mark.parametrize("first", [True, False], ids=["from the start", "after an outage"])
def test_what_time_alone_will_not_mend_gets_no_grace(world: World, first: bool) -> None:
    """An unknown host or a failed TLS handshake may be somebody in between: served to the deadline, no further."""
    world.write("Ada", tenant="patient-one")
    if not first:
        answer(KmsUnavailableError)
        turn(world, 250, "patient-one")
    answer(KmsUnavailableError, retryable=False)
    turn(world, 299 if first else 49, "patient-one")
    assert world.read("patient-one") == ["Ada"]
    world.clock.turn(1)
    with pytest.raises(KmsUnavailableError):
        world.read("patient-one")


def test_a_no_ends_the_grace(world: World) -> None:
    """An outage that turns into a refusal is a refusal."""
    world.write("Ada", tenant="patient-one")
    answer(KmsUnavailableError)
    turn(world, 400, "patient-one")
    answer(KeyDisabledError)
    with pytest.raises(KeyDisabledError):
        turn(world, 20, "patient-one")
    assert world.byok.tenants("dark") == ["patient-one"]


def test_an_outage_that_ends_leaves_nothing(world: World) -> None:
    """When the KMS answers again the tenant is as fresh as ever, and its next grace is whole."""
    world.write("Ada", tenant="patient-one")
    answer(KmsUnavailableError)
    turn(world, 500, "patient-one")
    answer()
    turn(world, 20, "patient-one")
    assert world.byok.tenants("fresh") == ["patient-one"]
    answer(KmsUnavailableError)
    turn(world, 860, "patient-one")
    assert world.read("patient-one") == ["Ada"]


def test_a_keystore_outage_is_no_outage_of_the_kms(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grace is for the customer's KMS; a silent keystore leaves the keys until their deadline, no longer."""
    world.write("Ada", tenant="patient-one")

    def silent(*_: object) -> None:
        raise KeystoreUnavailableError("silent")

    monkeypatch.setattr(world.byok._keystore.database, "read", silent)
    turn(world, 299, "patient-one")
    assert world.read("patient-one") == ["Ada"]
    world.clock.turn(1)
    with pytest.raises(KeystoreUnavailableError):
        world.read("patient-one")


# -- dead vaults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KmsUnavailableError, AccessDeniedError])
def test_a_dead_vault_is_left_alone(world: World, error: type[KmsError]) -> None:
    """After three failures in a row the KMS is asked rarely, and the caller is told when to come back."""
    answer(error)
    for _ in range(3):
        with pytest.raises(error):
            world.open("t1")
    assert len(world.calls) == 3
    for _ in range(50):
        with pytest.raises(error) as raised:
            world.open("t1")
        assert raised.value.retry_after is not None
        assert 0 < raised.value.retry_after <= 1
    assert len(world.calls) == 3
    for _ in range(300):
        world.clock.turn(1)
        with pytest.raises(error):
            world.open("t1")
    assert 3 + 300 / 15 <= len(world.calls) <= 3 + 4 + 300 / 11
    answer()
    world.clock.turn(15)
    world.open("t1")


def test_forgetting_a_tenant_lets_it_try_at_once(world: World) -> None:
    """An operator who knows that the customer has mended it need not wait."""
    answer(KeyDisabledError)
    for _ in range(5):
        with pytest.raises(KeyDisabledError):
            world.open("t1")
    answer()
    world.byok.forget_keys("t1")
    world.open("t1")
    assert len(world.calls) == 4


def test_a_throttled_vault_is_left_alone_for_as_long_as_it_says(world: World) -> None:
    """Retry-After goes before the breaker's own time, within a minute."""
    answer(ThrottledError, retry_after=30.0)
    for _ in range(3):
        with pytest.raises(ThrottledError):
            world.open("t1")
    world.clock.turn(29)
    with pytest.raises(ThrottledError):
        world.open("t1")
    assert len(world.calls) == 3
    world.clock.turn(1.1)
    with pytest.raises(ThrottledError):
        world.open("t1")
    assert len(world.calls) == 4


def test_a_thousand_threads_make_one_call(world: World) -> None:
    """However many start at the same time on a cold tenant."""
    waiting = threading.Barrier(1_000)

    def enter() -> None:
        waiting.wait(60)
        world.open("t1")

    threads = [threading.Thread(target=enter) for _ in range(1_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert world.calls == ["t1"]


async def test_a_thousand_tasks_make_one_call(world: World) -> None:
    """Likewise from asyncio."""

    async def enter() -> None:
        async with world.byok.tenant("t1"):
            pass

    await asyncio.gather(*(enter() for _ in range(1_000)))
    assert world.calls == ["t1"]


def test_few_wait_for_a_tenant_that_failed(world: World) -> None:
    """A dead vault does not gather an application's threads: sixteen wait for its next answer, the others are told."""
    answer(KmsUnavailableError)
    with pytest.raises(KmsUnavailableError):
        world.open("t1")
    release, asked = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        assert release.wait(30)
        raise KmsUnavailableError("dead")

    CountingKms.on_unwrap = staticmethod(wait)
    told: list[type[Exception]] = []
    with ThreadPoolExecutor(40) as pool:
        first = pool.submit(world.open, "t1")
        assert asked.wait(30)
        others = [pool.submit(world.open, "t1") for _ in range(39)]
        # Those that are not let in come back while the call is still under way.
        while sum(other.done() for other in others) < 39 - 16:
            pass
        assert not release.is_set()
        told = [type(other.exception()) for other in others if other.done()]
        assert world.byok.status().waiting == 16
        release.set()
        assert {type(future.exception()) for future in (first, *others)} == {KmsUnavailableError}
    assert told == [KmsUnavailableError] * 23
    assert world.calls == ["t1", "t1"]


def test_dead_vaults_stall_nobody_else(world: World) -> None:
    """Vaults that failed before hold eight calls at most, however many tenants have one; the others are opened."""
    dead = [f"dead-{n}" for n in range(20)]
    for name in dead:
        world.byok.onboard(name, world.kms)
    answer(KmsUnavailableError)
    for name in dead:
        with pytest.raises(KmsUnavailableError):
            world.open(name)
    world.calls.clear()
    release = threading.Event()

    def wait() -> None:
        if world.calls[-1].startswith("dead") and threading.current_thread().name.startswith("dead"):
            assert release.wait(30)
            raise KmsUnavailableError("dead")

    CountingKms.on_unwrap = staticmethod(wait)
    with ThreadPoolExecutor(20, thread_name_prefix="dead") as pool:
        futures = [pool.submit(world.open, name) for name in dead]
        while sum(future.done() for future in futures) < 20 - calls.FAILING_AT_ONCE:
            pass
        for tenant in ("t1", "t2", "t3"):
            world.open(tenant)
        assert len(world.calls) == calls.FAILING_AT_ONCE + 3
        release.set()
        refused = [future.exception() for future in futures]
    assert {type(error) for error in refused} == {KmsUnavailableError}


def test_the_calls_under_way_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of cold tenants makes no more KMS calls at a time than the process allows, and opens all of them."""
    monkeypatch.setattr(calls, "CALLS_AT_ONCE", 4)
    cold = [f"cold-{n}" for n in range(24)]
    for name in cold:
        world.byok.onboard(name, world.kms)
    world.calls.clear()
    lock, now, most = threading.Lock(), 0, 0
    full = threading.Event()

    def count() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 4:
                full.set()
        assert full.wait(30)
        with lock:
            now -= 1

    CountingKms.on_unwrap = staticmethod(count)
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(world.open, cold))
    assert (most, sorted(world.calls)) == (4, sorted(cold))


# -- preloading ------------------------------------------------------------------------------------------------------


def test_preloading_is_never_fatal(world: World) -> None:
    """What cannot be opened is told; the others are open afterwards."""
    bad = LocalKms.create(world.folder / "bad.key")
    world.byok.onboard("bad", bad)
    Path(bad.path).unlink()
    outcomes = {each.tenant: each.error for each in world.byok.preload(["t1", "t2", "bad", "nobody"])}
    assert [type(outcomes[name]).__name__ for name in ("t1", "t2", "bad", "nobody")] == [
        "NoneType",
        "NoneType",
        "KeyDeletedError",
        "UnknownTenantError",
    ]
    assert sorted(world.calls) == ["t1", "t2"]
    world.open("t1")
    world.open("t2")
    assert sorted(world.calls) == ["t1", "t2"]


def test_preloading_everybody(world: World) -> None:
    """Without names it is all tenants; without a keystore it is one outcome, not an exception."""
    assert {each.tenant for each in world.byok.preload() if each.error is None} == {
        "patient-one",
        "t1",
        "t2",
        "t3",
    }
    world.hand.dispose()
    for file in world.folder.glob("keystore.db*"):
        file.unlink()
    world.byok._database.close()
    (only,) = world.byok.preload()
    assert isinstance(only.error, KeystoreUnavailableError)


def test_preloading_does_not_wait_for_a_dead_vault(world: World) -> None:
    """It takes no longer than it may; who was not open in time is told."""
    release = threading.Event()

    def wait() -> None:
        if world.calls[-1] == "t2":
            assert release.wait(30)

    CountingKms.on_unwrap = staticmethod(wait)
    outcomes = world.byok.preload(["t2"], within=0.05)
    release.set()
    assert [(each.tenant, type(each.error)) for each in outcomes] == [("t2", KmsUnavailableError)]


# -- units of work ---------------------------------------------------------------------------------------------------


@pytest.fixture
def units(world: World) -> World:
    """A world whose tenant "unit" wants a KMS call for each unit of work."""
    world.byok.onboard("unit", world.kms, revoke_within=0)
    world.calls.clear()
    return world


def test_a_kms_call_for_each_unit_of_work(units: World) -> None:
    """One for each transaction, whatever number of statements; entering a block and its first transaction share one."""
    with units.byok.tenant("unit"), units.engine.begin() as connection:
        connection.execute(insert_patient, [{"name": "Ada"}])
        assert list(connection.scalars(names)) == ["Ada"]
        assert units.calls == ["unit"]
    for count in (2, 3):
        assert units.read("unit") == ["Ada"]
        assert units.calls == ["unit"] * count
    with units.byok.session("unit", units.engine) as session:
        assert session.scalars(names).all() == ["Ada"]
        assert session.scalars(names).all() == ["Ada"]
        assert len(units.calls) == 4
        session.commit()
        assert session.scalars(names).all() == ["Ada"]
        assert len(units.calls) == 5
        session.rollback()
        assert session.scalars(names).all() == ["Ada"]
    assert len(units.calls) == 6


def test_a_no_bites_at_the_next_unit_of_work(units: World) -> None:
    """The transaction that runs ends; no other begins."""
    units.write("Ada", tenant="unit")
    with units.connect("unit") as connection:
        assert list(connection.scalars(names)) == ["Ada"]
        answer(KeyDisabledError)
        assert list(connection.scalars(names)) == ["Ada"]
        connection.rollback()
        with pytest.raises(KeyDisabledError):
            connection.scalars(names)


def test_a_unit_of_work_does_not_last_for_ever(units: World) -> None:
    """A transaction that stays open asks again."""
    units.write("Ada", tenant="unit")
    units.calls.clear()
    with units.connect("unit") as connection:
        assert list(connection.scalars(names)) == ["Ada"]
        units.clock.turn(UNIT_WITHIN - 1)
        assert list(connection.scalars(names)) == ["Ada"]
        units.clock.turn(1)
        assert list(connection.scalars(names)) == ["Ada"]
    assert units.calls == ["unit", "unit"]


def test_keys_opened_for_a_unit_that_begins_later_are_not_used(units: World) -> None:
    """A block that does something else first pays a second call rather than work with an old answer."""
    with units.byok.tenant("unit"):
        units.clock.turn(2)
        with units.engine.connect() as connection:
            assert list(connection.scalars(names)) == []
    assert units.calls == ["unit", "unit"]


def test_units_of_two_tenants_on_one_connection(units: World) -> None:
    """Each has a keyring of its own."""
    units.write("Ada", tenant="unit")
    units.write("Bob", tenant="t1")
    units.calls.clear()
    with units.engine.connect() as connection:
        with units.byok.tenant("unit"):
            first = names.limit(1)
            assert list(connection.scalars(first)) == ["Ada"]
        with units.byok.tenant("t1"):
            assert connection.scalars(names.offset(1)).all() == ["Bob"]
        with units.byok.tenant("unit"):
            assert list(connection.scalars(first)) == ["Ada"]
    assert Counter(units.calls)["unit"] <= 3


# -- what a second pair of eyes found ------------------------------------------------------------------------------


def test_a_listener_may_use_the_tenant_that_it_is_told_of(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str
) -> None:
    """An audit table on an attached engine is what many will write first: it must not wait for its own opening."""
    told: list[str] = []
    worlds: list[World] = []

    def listen(event: Event) -> None:
        if worlds and isinstance(event, KeysOpened) and not told:
            told.append(event.tenant)
            worlds[0].write("told", tenant=event.tenant)

    world = World(tmp_path, counting_kms, keystore_key, on_event=listen)
    worlds.append(world)
    thread = threading.Thread(target=world.open, args=("t1",), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert (told, world.read()) == (["t1"], ["told"])
    world.close()


def test_a_no_takes_every_keyring_of_the_tenant(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str
) -> None:
    """Also one that went to make room and is still held by a result, or that another opening made since."""
    world = World(tmp_path, counting_kms, keystore_key, max_tenants=1)
    world.open("t1")
    old = world.byok._keyrings.get("t1")
    world.open("t2")  # t1 has to go
    world.open("t1")
    new = world.byok._keyrings.get("t1")
    assert old is not new
    assert not old.cleared
    answer(AccessDeniedError)
    with pytest.raises(AccessDeniedError):
        world.byok.probe("t1")
    assert (old.cleared, new.cleared) == (True, True)
    assert world.byok.tenants("dark") == ["t1"]
    world.close()


def test_what_an_idle_process_holds_is_taken_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys whose time is up go from memory although nobody uses the process any more."""
    monkeypatch.setattr("sqla_byok.keys.keyrings._SWEEP_EVERY", 0.01)
    world.open("t1")
    ring = world.byok._keyrings.get("t1")
    world.clock.turn(301)
    for _ in range(1_000):
        if ring.cleared:
            break
        threading.Event().wait(0.01)  # for the thread that sweeps
    assert ring.cleared
    assert world.byok.tenants("fresh") == []


def test_nothing_is_opened_after_close(world: World) -> None:
    """A handler that outlives the application's end gets an error, not keys in memory that nobody watches."""
    world.open("t1")
    world.byok.close()
    with pytest.raises(ConfigurationError, match="closed"):
        world.open("t1")
    with pytest.raises(ConfigurationError, match="closed"):
        world.read()


def test_a_tenant_that_was_mended_is_tried_at_once(world: World) -> None:
    """Who has swapped the credential, or probed with success, need not wait for the breaker."""
    answer(ThrottledError, retry_after=60.0)
    for _ in range(4):
        with pytest.raises(ThrottledError):
            world.open("t1")
    answer()
    world.byok.probe("t1")
    world.open("t1")


def test_a_rekey_during_an_outage_leaves_the_keys_that_are_there(world: World) -> None:
    """Another process made a new tenant key; until the KMS can be asked for it, reading goes on, to the deadline."""
    world.write("Ada")
    other = world.another()
    other.rekey("t1")
    answer(KmsUnavailableError)
    world.clock.turn(POLL_EVERY)
    assert world.read() == ["Ada"]
    world.clock.turn(250)
    assert world.read() == ["Ada"]
    world.byok._keyrings.drain()
    world.clock.turn(300)
    with pytest.raises(KmsUnavailableError):
        world.read()
    other.close()


def test_sealing_needs_a_look_at_the_keystore_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sealed under a data key that was retired meanwhile would open nowhere."""
    with world.byok.tenant("t1"):
        world.byok.seal(b"x", "mail")

        def silent(*_: object) -> None:
            raise KeystoreUnavailableError("silent")

        monkeypatch.setattr(world.byok._keystore.database, "read", silent)
        world.clock.turn(16)
        with pytest.raises(KeystoreUnavailableError, match="not written"):
            world.byok.seal(b"x", "mail")


def test_the_actor_of_a_session_and_of_nested_blocks(world: World, events: list[Event]) -> None:
    """A session's own actor goes before the block's; a block without one inherits it."""
    with world.byok.tenant("t1", actor="alice", reason="ward"):
        with world.byok.tenant("t2"):
            pass
        with world.byok.session("t3", world.engine, actor="bob") as session:
            world.byok.forget_keys("t3")
            session.scalars(names).all()
    opened = [(event.tenant, event.actor, event.purpose) for event in events if isinstance(event, KeysOpened)]
    assert opened == [
        ("t1", "alice", "ward"),
        ("t2", "alice", "ward"),
        ("t3", "bob", "ward"),
        ("t3", "bob", "ward"),
    ]


async def test_waiters_that_are_cancelled_are_not_counted(world: World) -> None:
    """They would fill the few places that a failing tenant has."""
    release, asked, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(asked.set)
        assert release.wait(30)

    CountingKms.on_unwrap = staticmethod(wait)

    async def enter() -> None:
        async with world.byok.tenant("t1"):
            pass

    tasks = [asyncio.create_task(enter()) for _ in range(50)]
    await asked.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert world.byok._keyrings.waiting() == 0
    release.set()


async def test_dead_vaults_do_not_hold_up_looks_at_the_keystore(world: World) -> None:
    """Two tenants that have to be opened anew wait for their KMS elsewhere than where open tenants are looked after."""
    for tenant in ("t1", "t2", "t3"):
        await asyncio.to_thread(world.open, tenant)
    other = await asyncio.to_thread(world.another)
    for tenant in ("t1", "t2"):
        await asyncio.to_thread(other.rekey, tenant)
    await asyncio.to_thread(other.close)
    release = threading.Event()
    CountingKms.on_unwrap = staticmethod(lambda: release.wait(30) and None)
    world.clock.turn(POLL_EVERY)

    async def enter(tenant: str) -> str:
        async with world.byok.tenant(tenant):
            return tenant

    dead = [asyncio.create_task(enter(tenant)) for tenant in ("t1", "t2")]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(enter("t3"), 20) == "t3"
    assert not any(task.done() for task in dead)
    release.set()
    assert await asyncio.gather(*dead) == ["t1", "t2"]


def test_one_name_is_no_list_of_tenants(world: World) -> None:
    """preload("t1") would try to open "t" and "1"."""
    with pytest.raises(ConfigurationError, match="list of tenants"):
        world.byok.preload("t1")


# -- what operators see ----------------------------------------------------------------------------------------------


def test_each_change_of_state_is_told_once(world: World, events: list[Event]) -> None:
    """A tenant's way through open, outage, grace, dark and open again is one event each, with who must act."""
    world.open("patient-one")
    answer(KmsUnavailableError)
    turn(world, 900 - 1, "patient-one")
    for _ in range(3):
        world.clock.turn(20)
        with pytest.raises(KmsUnavailableError):
            world.open("patient-one")
    answer()
    world.clock.turn(20)
    world.open("patient-one")
    world.byok.forget_keys()
    changes = [event for event in events if isinstance(event, KeyStateChanged)]
    assert [(each.before, each.after, each.cause, each.action_by) for each in changes] == [
        ("closed", "fresh", None, None),
        ("fresh", "grace", "KmsUnavailableError", "operator"),
        ("grace", "dark", "KmsUnavailableError", "operator"),
        ("dark", "fresh", None, None),
        ("fresh", "closed", None, None),
    ]
    assert {each.tenant for each in changes} == {"patient-one"}


def test_each_call_and_opening_is_told(world: World, events: list[Event]) -> None:
    """With why, by whom and what came of it; a warm tenant tells nothing."""
    with world.byok.tenant("t1", actor="nurse-7", reason="ward round"):
        world.open("t1")
    world.byok.preload(["t2"])
    answer(AccessDeniedError)
    with pytest.raises(AccessDeniedError):
        world.open("t3")
    calls = [(e.tenant, e.operation, e.reason, e.outcome) for e in events if isinstance(e, KmsCalled)]
    assert calls == [
        ("t1", "unwrap", "open", "ok"),
        ("t2", "unwrap", "preload", "ok"),
        ("t3", "unwrap", "open", "AccessDeniedError"),
    ]
    opened = [(e.tenant, e.reason, e.actor, e.purpose) for e in events if isinstance(e, KeysOpened)]
    assert opened == [("t1", "open", "nurse-7", "ward round"), ("t2", "preload", None, None)]


def test_our_own_mistake_is_told_apart(world: World) -> None:
    """When every tenant goes dark at once, the status says how many did, why, and that it is ours to mend."""
    answer(CredentialExpiredError, action_by="operator")
    for tenant in ("t1", "t2"):
        with pytest.raises(CredentialExpiredError):
            world.open(tenant)
    answer(KeyDisabledError)
    with pytest.raises(KeyDisabledError):
        world.open("t3")
    status = world.byok.status()
    assert status.causes == {("CredentialExpiredError", "operator"): 2, ("KeyDisabledError", "customer"): 1}
    assert (status.tenants, status.dark, status.changed_recently) == (4, 3, 3)
    world.clock.turn(301)
    answer()
    world.open("t1")
    assert (world.byok.status().changed_recently, world.byok.status().dark) == (1, 2)


@pytest.mark.parametrize("state", ["open", "FRESH", ""])
def test_tenants_of_a_state_that_there_is_not(world: World, state: str) -> None:
    """A misspelled state is an error, not an empty list that looks like good news."""
    with pytest.raises(ConfigurationError, match='"fresh", "grace", "dark" and "closed"'):
        world.byok.tenants(state)


def test_each_tenant_goes_on_past_dark_ones(world: World) -> None:
    """A nightly round is not ended by one customer's key."""
    world.write("Ada", tenant="t1")
    world.write("Bob", "Cy", tenant="t3")
    world.byok.forget_keys()

    def say() -> None:
        if world.calls[-1] == "t2":
            raise KeyDisabledError("disabled", tenant="t2")

    CountingKms.on_unwrap = staticmethod(say)
    outcomes = world.byok.each_tenant(str.upper)
    assert [(each.tenant, each.value, type(each.error).__name__) for each in outcomes] == [
        ("patient-one", "PATIENT-ONE", "NoneType"),
        ("t1", "T1", "NoneType"),
        ("t2", None, "KeyDisabledError"),
        ("t3", "T3", "NoneType"),
    ]
    with pytest.raises(ZeroDivisionError):
        world.byok.each_tenant(lambda tenant: 1 // 0)
