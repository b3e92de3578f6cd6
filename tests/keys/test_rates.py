"""What an hour costs: the keys themselves, run through it by a clock that is turned, beside the capacity plan."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, World
from sqlalchemy import event

from sqla_byok.plan import plan

HOUR = 3_600.0


@pytest.fixture
def world(tmp_path: Path, counting_kms: CountingKms, keystore_key: str) -> Iterator[World]:
    world = World(tmp_path, counting_kms, keystore_key)
    yield world
    world.close()


@pytest.fixture
def statements(world: World) -> Iterator[list[str]]:
    """What the keystore's database is asked."""
    seen: list[str] = []

    def note(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    engine = world.byok._keystore.database._engine
    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


def run(world: World, tenants: list[str], seconds: float, every: float, dice: random.Random) -> None:
    """Let time pass, with each tenant used at random, and the background done with its work after each use."""
    start = world.clock.boot_now
    uses = [(start + dice.expovariate(1 / every), tenant) for tenant in tenants]
    heapq.heapify(uses)
    while uses[0][0] < start + seconds:
        now, tenant = uses[0]
        world.clock.turn(now - world.clock.boot_now)
        world.open(tenant)
        world.byok._keyrings.drain()
        heapq.heapreplace(uses, (now + dice.expovariate(1 / every), tenant))


@pytest.mark.parametrize(
    ("count", "revoke_within", "every", "queries_off"),
    [(24, 120.0, 1.5, 0.3), (24, 300.0, 8.0, 0.3), (40, 60.0, 90.0, 0.1)],
    ids=["busy", "quiet", "quiet enough to expire"],
)
def test_an_hour_costs_what_was_planned(
    world: World,
    counting_kms: CountingKms,
    monkeypatch: pytest.MonkeyPatch,
    statements: list[str],
    count: int,
    revoke_within: float,
    every: float,
    queries_off: float,
) -> None:
    """KMS calls within 4 % of plan()'s, and no more queries than it says: a quota may be sized by it."""
    tenants = [f"tenant-{number}" for number in range(count)]
    for tenant in tenants:
        world.byok.onboard(tenant, counting_kms, revoke_within=revoke_within)
    dice = random.Random(5)
    monkeypatch.setattr("sqla_byok.keys.clock.random", dice)  # the refreshes too are the same in each run
    run(world, tenants, 2 * revoke_within, every, dice)  # until they are spread
    world.calls.clear()
    statements.clear()
    run(world, tenants, HOUR, every, dice)
    planned = plan(count, 1, revoke_within, requests=count / every)
    assert len(world.calls) / HOUR == pytest.approx(planned.kms_calls, rel=0.04)
    queries = len(statements) / HOUR
    assert (1 - queries_off) * planned.keystore_queries <= queries <= 1.02 * planned.keystore_queries
    # each call comes with the whole row, all else are looks at states
    assert sum("byok_wrapping" in each for each in statements) == len(world.calls)
