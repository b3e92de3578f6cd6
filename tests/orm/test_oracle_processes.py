"""Two processes answer random queries as over plaintext, at every moment while keys of their tenants are rotated.

A round begins with new keys and new rows. Then the processes rotate data keys and search salts of both tenants, one
process or both at once, and retire old ones. The time in which a change settles passes in steps; in each step both
write rows, and both answer some queries. Every answer is one comparison with that of the plaintext twin; what has to be
refused while several salts live is counted apart.

All of a round follows from its seed. ``make oracle`` makes 20,000 comparisons on each database.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from orm.oracle_forms import (
    ENCRYPTED,
    PLAIN,
    TENANTS,
    Built,
    Query,
    Row,
    how_many,
    queries,
    rows,
    with_values_of,
)
from orm.oracle_worker import SLEEPS, Answer, Other, engine_of
from sqlalchemy import URL, Engine, insert, update
from sqlalchemy.orm import Session

from sqla_byok import LocalKms, keystore_metadata
from sqla_byok.crypto.formats import KINDS, SEARCH_SALT
from sqla_byok.keys.keyrings import WRITE_WITHIN

COMPARISONS = 150  # on each database, unless --comparisons says otherwise
STEPS = 6  # in which a change settles
QUERIES = 2  # in a step
CHANGES = 4  # of keys, in a round
PERSONS, VISITS = 7, 6


@pytest.fixture
def others() -> Iterator[list[Other]]:
    others = [Other(), Other()]
    yield others
    for other in others:
        other.close()


def drawn(seed: int) -> Iterator[Query]:
    """Queries without end, the same for the same seed."""
    for number in count():
        found = _batch(seed * 1_000 + number)
        random.Random(seed + number).shuffle(found)  # the simplest come first
        yield from found


def _batch(seed: int) -> list[Query]:
    found: list[Query] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(queries())
    def collect(query: Query) -> None:
        found.append(query)

    collect()
    return found


class Round:
    """From new keys on, all that the two processes do, and the twin in plaintext."""

    def __init__(
        self, seed: int, others: list[Other], plain: Engine, key: Path, counted: Counter[str]
    ) -> None:
        self.random, self.queries, self.counted = random.Random(seed), drawn(seed), counted
        self.others, self.plain = others, plain
        self.since = [0.0, 0.0]  # each one's last look at the keystore
        for metadata in (ENCRYPTED.Base.metadata, PLAIN.Base.metadata, keystore_metadata):
            metadata.drop_all(self.plain)
        for metadata in (ENCRYPTED.Base.metadata, PLAIN.Base.metadata):
            metadata.create_all(self.plain)
        for other in others:
            other.do("begin", plain.url)
        others[0].do("onboard", str(key))
        for other in others:
            other.do("open")
        self.rows = self._new_rows()

    def _new_rows(self) -> list[Row]:
        new = rows(self._numbers("P", PERSONS), self._numbers("V", VISITS))
        with self.plain.connect() as connection:
            for row in new:
                connection.execute(insert(getattr(PLAIN, row.entity).__table__), row.values)
        for number, other in enumerate(self.others):
            other.do("insert", [row for row in new if row.salt % len(self.others) == number])
        return new

    def _numbers(self, entity: str, most: int) -> list[int]:
        return [self.random.randrange(how_many(entity, most)) for _ in range(self.random.randint(2, most))]

    def run(self) -> None:
        self.step(0)
        for _ in range(CHANGES):
            self.change_keys()
        self.step(WRITE_WITHIN - max(self.since))
        for other in self.others:
            other.do("end")

    # -- keys ---------------------------------------------------------------------------------------------------------

    def change_keys(self) -> None:
        """Rotate in one process or in both at once, each for a tenant of its own; then perhaps retire the old ones."""
        tenants = self.random.sample(TENANTS, len(TENANTS))
        busy = self.random.sample(range(len(self.others)), self.random.randint(1, len(self.others)))
        changes = {
            number: (
                tenants[number],
                SEARCH_SALT if self.random.random() < 0.6 else self.random.choice(KINDS),
            )
            for number in busy
        }
        self.settle({number: ("rotate", *change) for number, change in changes.items()})
        self.counted["rotations"] += len(changes)
        if self.random.random() < 0.5:
            number, (tenant, kind) = self.random.choice(sorted(changes.items()))
            self.settle({number: ("retire", tenant, kind, lambda: self.of(tenant))})

    def of(self, tenant: str) -> list[Row]:
        return [row for row in self.rows if row.values["org"] == tenant]

    def settle(self, commands: dict[int, tuple[Any, ...]]) -> None:
        """Have processes do what has to settle, and something happen in each part of that time."""
        for number in commands:
            self.others[number].do("turn", 0, True)
        retiring = any(name == "retire" for name, *_ in commands.values())
        for number, (name, *arguments) in commands.items():
            self.others[number].start(name, *(each() if callable(each) else each for each in arguments))
        waiting = set(commands)
        while sleeping := {
            number: seconds for number in sorted(waiting) if (seconds := self._sleeps(number))
        }:
            waiting = set(sleeping)
            for _ in range(STEPS):
                self.step(max(sleeping.values()) / STEPS, busy=sleeping, writes=not retiring)
            for number in sleeping:
                self.others[number].wake()

    def _sleeps(self, number: int) -> float | None:
        answer = self.others[number].answer()
        return answer[1] if isinstance(answer, tuple) and answer[0] == SLEEPS else None

    # -- what happens in a moment -------------------------------------------------------------------------------------

    def step(self, seconds: float, busy: Any = (), writes: bool = True) -> None:
        """Time passes; both write, then both are asked.

        A process that changes no keys is cut off from the keystore for as long as it may be.
        """
        for number, other in enumerate(self.others):
            self.since[number] += seconds
            looks = number in busy or self.since[number] + seconds >= WRITE_WITHIN
            other.do("turn", seconds, looks)
            if looks:
                self.since[number] = 0.0
        for other in self.others if writes else ():
            self.write(other)
        for _ in range(QUERIES):
            self.compare(next(self.queries))

    def write(self, other: Other) -> None:
        which = self.random.sample(range(len(self.rows)), self.random.randint(1, 2))
        for each in which:
            row = self.rows[each]
            self.rows[each] = with_values_of(row, self.random.randrange(how_many(row.entity, VISITS)))
        changed = [self.rows[each] for each in which]
        other.do("write", changed, self.random.choice(["update", "replace", "attributes"]))
        with self.plain.connect() as connection:
            for row in changed:
                table = getattr(PLAIN, row.entity).__table__
                connection.execute(update(table).where(table.c.id == row.values["id"]).values(row.values))

    def compare(self, query: Query) -> None:
        """Demand that both find what is found over plaintext, or refuse it where it has to be."""
        for other in self.others:
            other.start("ask", query)
        with Session(self.plain) as session:
            expected = Built(query, PLAIN, session).rows()
        for number, other in enumerate(self.others):
            answer: Answer = other.answer()
            if answer.refused and answer.live > 1 and answer.compares_columns:
                assert "while its salts are being rotated" in answer.refused
                self.counted["more refused"] += 1
                continue
            assert (answer.refused or answer.found) == expected, f"process {number}: {query}"
            self.counted["comparisons"] += 1
            self.counted["of them while several salts live"] += answer.live > 1


@pytest.fixture
def plain(sync_url: URL) -> Iterator[Engine]:
    """For the twin in plaintext."""
    engine = engine_of(sync_url)
    yield engine
    engine.dispose()


def test_answers_while_keys_rotate(
    others: list[Other], plain: Engine, tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    """Whoever rotates, and whatever a process knows of it, a search misses no row and finds none too many."""
    asked: int | None = request.config.getoption("--comparisons")
    given_seed: int | None = request.config.getoption("--oracle-seed")
    first = random.randrange(10**6) if given_seed is None else given_seed
    key, counted = tmp_path / "customer.key", Counter[str]()
    LocalKms.create(key)
    for seed in count(first):
        if counted["comparisons"] >= (asked or COMPARISONS):
            break
        print(f'To repeat it: make oracle ARGS="--oracle-seed {seed} --comparisons 1"')  # shown if it fails
        Round(seed, others, plain, key, counted).run()
        counted["rounds"] += 1
        if asked and counted["rounds"] % 10 == 0:
            _say(capsys, plain, counted, first)
    assert counted["of them while several salts live"] > 0
    if asked:
        _say(capsys, plain, counted, first)


def _say(capsys: Any, plain: Engine, counted: Counter[str], seed: int) -> None:
    told = ", ".join(f"{number:,} {what}" for what, number in counted.items())
    with capsys.disabled():
        print(f"\n{plain.dialect.name}, from seed {seed}: {told}", end="", flush=True)
