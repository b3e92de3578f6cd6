"""The capacity plan, checked by a simulation that plays the rules of keys in memory out, event by event."""

from __future__ import annotations

import heapq
import random
import re
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sqla_byok.errors import ConfigurationError
from sqla_byok.keys.clock import REFRESH_FROM, REFRESH_TO
from sqla_byok.keys.keyrings import LOOKED_AT_ONCE, POLL_EVERY
from sqla_byok.plan import plan

PAGE = Path(__file__).parent.parent / "docs" / "capacity.md"
NEVER = float("inf")


@dataclass
class Ring:
    """One tenant's keys in one process, by the times that matter."""

    opened: float = -NEVER
    refresh_at: float = -NEVER
    fresh_until: float = -NEVER
    used: float = -NEVER
    last_read: float = -NEVER


@dataclass
class Simulation:
    """Statements that come at random, and processes that keep tenants' keys in memory. No clock but its own.

    :param every: seconds between two statements for a tenant in a process, on average.
    :param restarts: when each process is replaced by one without keys.
    :param silent_from: when the KMS answers no more.
    :param no_from: when the KMS begins to say "no".
    """

    tenants: int
    processes: int
    revoke_within: float
    seconds: float
    every: float = 0.05
    restarts: list[float] = field(default_factory=list)
    silent_from: float = NEVER
    no_from: float = NEVER
    outage_grace: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(20)
        self.kms_calls: list[float] = []
        self.keystore_queries: list[float] = []
        self.rings: dict[int, dict[int, Ring]] = defaultdict(lambda: defaultdict(Ring))  # of each process
        self._events: list[tuple[float, str, Any]] = []
        for process in range(self.processes):
            for tenant in range(self.tenants):
                # spread, as they are long after a restart
                self._use_later(self.random.uniform(0, 0.6 * self.revoke_within), (process, tenant))
        for process, moment in enumerate(self.restarts):
            heapq.heappush(self._events, (moment, "restart", process))
        while self._events and self._events[0][0] < self.seconds:
            now, what, about = heapq.heappop(self._events)
            getattr(self, f"_{what}")(now, about)

    def _use_later(self, now: float, who: tuple[int, int]) -> None:
        heapq.heappush(self._events, (now + self.random.expovariate(1 / self.every), "use", who))

    def _use(self, now: float, who: tuple[int, int]) -> None:
        self._use_later(now, who)
        process, tenant = who
        ring = self.rings[process][tenant]
        if now >= self._deadline(ring):
            self._ask(now, ring)
        elif now >= ring.fresh_until:
            self._poll(now, process, ring)
            if now >= ring.refresh_at:
                self._ask(now, ring)
        ring.used = now
        if now < ring.opened + self.revoke_within + self.outage_grace:
            ring.last_read = now

    def _poll(self, now: float, process: int, ring: Ring) -> None:
        """One query for this tenant, and for those in use whose turn it would be soon."""
        self.keystore_queries.append(now)
        others = [
            each
            for each in self.rings[process].values()
            if each is not ring
            and now < each.used + POLL_EVERY
            and each.fresh_until < now + POLL_EVERY / 2
            and now < min(each.refresh_at, self._deadline(each))
        ]
        for each in (ring, *others[:LOOKED_AT_ONCE]):
            self._looked(now, each)

    def _looked(self, now: float, ring: Ring) -> None:
        due = (ring.refresh_at,) if now < ring.refresh_at else ()
        ring.fresh_until = min(now + POLL_EVERY, self._deadline(ring), *due)

    def _deadline(self, ring: Ring) -> float:
        return ring.opened + self.revoke_within

    def _restart(self, now: float, process: int) -> None:
        self.rings.pop(process, None)

    def _ask(self, now: float, ring: Ring) -> None:
        """An opening or a refresh: the keystore's row, then the KMS."""
        self.kms_calls.append(now)
        self.keystore_queries.append(now)
        if now >= self.no_from:
            ring.opened = -NEVER
        elif now < self.silent_from:
            ring.opened = now
            ring.refresh_at = now + self.revoke_within * self.random.uniform(REFRESH_FROM, REFRESH_TO)
            self._looked(now, ring)

    def all_rings(self) -> list[Ring]:
        return [ring for rings in self.rings.values() for ring in rings.values()]

    def open_tenants(self) -> int:
        return sum(self._deadline(ring) > self.seconds for ring in self.all_rings())

    def last_read(self) -> float:
        return max(ring.last_read for ring in self.all_rings())


def rate(times: list[float], start: float, end: float) -> float:
    """How many a second, between two moments."""
    return (bisect_left(times, end) - bisect_left(times, start)) / (end - start)


@pytest.mark.parametrize(
    ("tenants", "processes", "revoke_within", "active", "queries_off"),
    [
        (6, 2, 30.0, 1.0, 0.14),
        (4, 5, 60.0, 0.5, 0.07),
        (20, 1, 120.0, 0.3, 0.08),
        (1, 6, 300.0, 1.0, 0.03),
        (520, 1, 300.0, 1.0, 0.15),
    ],
)
def test_the_rates_are_those_of_the_simulation(
    tenants: int, processes: int, revoke_within: float, active: float, queries_off: float
) -> None:
    """KMS calls within 3 % of the simulated ones; keystore queries at most as planned, and not far below."""
    planned = plan(tenants, processes, revoke_within, active=active)
    few = planned.open_tenants < 100
    seconds = (14 if few else 3) * revoke_within
    every = 0.05 if few else 0.5
    seen = Simulation(planned.open_tenants, processes, revoke_within, seconds, every=every)
    start = seconds - (seconds // planned.refresh_every - 3) * planned.refresh_every
    assert rate(seen.kms_calls, start, seconds) == pytest.approx(planned.kms_calls, rel=0.03)
    queries = rate(seen.keystore_queries, start, seconds)
    assert (1 - queries_off) * planned.keystore_queries <= queries <= planned.keystore_queries
    assert planned.open_tenants * processes == seen.open_tenants()


@pytest.mark.parametrize("every", [0.5, 3.0, 20.0, 100.0, 600.0])
def test_quieter_tenants_cost_less(every: float) -> None:
    """A house of thousands of quiet tenants is not sized as if each were busy all the time."""
    planned = plan(40, 5, 60.0, requests=200 / every)
    seen = Simulation(40, 5, 60.0, 4_000.0, every=every)
    assert rate(seen.kms_calls, 1_000.0, 4_000.0) == pytest.approx(planned.kms_calls, rel=0.03)
    queries = rate(seen.keystore_queries, 1_000.0, 4_000.0)
    assert 0.7 * planned.keystore_queries <= queries <= 1.01 * planned.keystore_queries
    assert planned.kms_calls <= plan(40, 5, 60.0).kms_calls


def test_one_query_looks_after_all_tenants_in_use() -> None:
    """Nobody sizes a keystore for a query for each tenant and process every three seconds."""
    few, many = (plan(tenants, 10, 3_600.0, requests=50_000) for tenants in (10, 500))
    # beside the look and the row that come with each call
    looks = [each.keystore_queries - 2 * each.kms_calls for each in (few, many)]
    assert looks == pytest.approx([10 / POLL_EVERY] * 2, rel=0.05)


@pytest.mark.parametrize(("revoke_within", "restart_within"), [(120.0, 20.0), (60.0, 60.0), (40.0, 120.0)])
def test_a_restart_calls_as_often_as_planned(revoke_within: float, restart_within: float) -> None:
    """Neither the openings of a deployment nor the wave of refreshes after it goes over what was planned for it."""
    tenants, processes = 40, 10
    planned = plan(tenants, processes, revoke_within, restart_within=restart_within)
    begin = 3 * revoke_within
    restarts = [begin + number * restart_within / processes for number in range(processes)]
    end = begin + restart_within + 3 * revoke_within
    seen = Simulation(tenants, processes, revoke_within, end, every=0.3, restarts=restarts)
    window = restart_within / 2
    peak = max(rate(seen.kms_calls, at, at + window) for at in range(int(begin), int(end - window)))
    assert 0.8 * planned.restart_calls <= peak <= 1.05 * planned.restart_calls
    assert planned.cold_starts == tenants * processes


@pytest.mark.parametrize("grace", [0.0, 45.0])
def test_the_dark_comes_when_planned(grace: float) -> None:
    """A "no" is heard everywhere in the time given, a silent KMS ends all reading in the other, and not much before."""
    planned = plan(5, 6, 100.0, outage_grace=grace)
    step = 1.0  # statements come that close at least, nearly always
    refused = Simulation(5, 6, 100.0, 600.0, no_from=400.0, outage_grace=grace).last_read()
    assert 0.85 * planned.heard_within <= refused - 400.0 <= planned.heard_within + step
    silent = Simulation(5, 6, 100.0, 600.0, silent_from=400.0, outage_grace=grace).last_read()
    assert 0.9 * planned.dark_within <= silent - 400.0 <= planned.dark_within


def quotas(**options: Any) -> list[tuple[str, str, float, float]]:
    """What 1,000 tenants, 55 processes and 88 seconds take: a call a second for each tenant, 1.5 in a restart."""
    found = plan(1_000, 55, 88.0, restart_within=110.0, **options).quotas
    return [(each.account, each.name, round(each.share, 9), round(each.restart_share, 9)) for each in found]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("vendor", "AWS KMS, symmetric keys", 0.1, 0.15)]),
        ({"aws_quota": 100_000}, [("vendor", "AWS KMS, symmetric keys", 0.01, 0.015)]),
        (
            {"assume_role": True, "sts_quota": 1_000},
            [
                ("customer", "AWS KMS, symmetric keys", 0.0001, 0.00015),
                ("vendor", "AWS STS", 1.0, 1.5),
            ],
        ),
        *(
            (
                {"provider": "azure", "key_bits": bits, "hsm": hsm},
                [
                    (
                        "customer",
                        f"Key Vault, RSA-{bits}, {'HSM' if hsm else 'software'} key",
                        round(10 / limit, 9),
                        round(15 / limit, 9),
                    )
                ],
            )
            for hsm, limits in ((False, (4_000, 1_000, 500)), (True, (2_000, 500, 250)))
            for bits, limit in zip((2048, 3072, 4096), limits, strict=True)
        ),
    ],
)
def test_each_quota_is_charged_to_its_account(options: dict[str, Any], expected: list[Any]) -> None:
    """All customers spend the vendor's AWS quota, unless they gave a role; an Azure vault has a quota of its own."""
    assert quotas(**options) == expected


@pytest.mark.parametrize(
    ("options", "tokens"), [({}, 0.0), ({"assume_role": True}, 1_000.0), ({"provider": "azure"}, 1_000.0)]
)
def test_each_call_with_a_credential_of_its_own_asks_for_one(options: dict[str, Any], tokens: float) -> None:
    """A role or an application is proved at each opening and refresh, so the token service is called as often."""
    assert plan(1_000, 55, 88.0, **options).token_calls == pytest.approx(tokens)


def test_memory_grows_with_open_tenants_alone() -> None:
    """16 KiB for each tenant in use, in each process, whatever the number of processes."""
    assert plan(10_000, 1, active=0.25).memory == plan(10_000, 99, active=0.25).memory == 2_500 * 16_384
    assert plan(10_000, 1, tenant_bytes=14_000).memory == 140_000_000


def test_nobody_costs_nothing() -> None:
    """A vendor that has no customers yet, or whose customers sleep, pays for no call."""
    for nobody in (plan(0, 8), plan(5_000, 8, active=0.0)):
        assert (nobody.kms_calls, nobody.keystore_queries, nobody.memory, nobody.cold_starts) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tenants": -1}, {"processes": 0}, {"revoke_within": 0}, {"revoke_within": 86_401}, {"active": 1.1},
        {"outage_grace": 3_601}, {"requests": 0}, {"restart_within": 0}, {"provider": "gcp"}, {"key_bits": 1024},
        {"aws_quota": 0}, {"sts_quota": 0}, {"revoke_within": float("nan")}, {"active": float("nan")},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    """A mistyped figure gives no plan that somebody then trusts."""
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        plan(**{"tenants": 1, "processes": 1, **wrong})


def number(cell: str) -> float:
    return float(re.sub(r"[,%s]| MiB", "", cell))


def table() -> list[list[str]]:
    """The rows of the table of typical sizes in docs/capacity.md."""
    section = PAGE.read_text(encoding="utf-8").partition("## Typical sizes")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    return rows[2:]


@pytest.mark.parametrize("row", table(), ids=lambda row: "-".join(row[:3]))
def test_the_page_tells_what_the_plan_computes(row: list[str]) -> None:
    """A vendor that reads the page instead of calling plan() reads the same figures."""
    tenants, processes, revoke_within = int(number(row[0])), int(number(row[1])), number(row[2])
    house = plan(tenants, processes, revoke_within, requests=5_000, restart_within=300)
    roles = plan(tenants, processes, revoke_within, assume_role=True, requests=5_000)
    vault = plan(tenants, processes, revoke_within, provider="azure")
    in_hsm = plan(tenants, processes, revoke_within, provider="azure", key_bits=4096, hsm=True)
    assert row[3:] == [
        f"{house.kms_calls:,.1f}",
        f"{house.quotas[0].share:.2%}",
        f"{house.quotas[0].restart_share:.2%}",
        f"{roles.quotas[1].share:.1%}",
        f"{vault.quotas[0].share:.3%}",
        f"{in_hsm.quotas[0].share:.2%}",
        f"{house.keystore_queries:,.0f}",
        f"{house.memory / 2**20:,.0f} MiB",
    ]


def test_there_is_a_table_to_check() -> None:
    """A change of the page's headings does not turn the test above off."""
    assert len(table()) >= 5
