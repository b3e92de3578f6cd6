"""Random queries answer as over plaintext, whatever the rows; what they cannot answer is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from keys_tools import TurnableClock
from orm.oracle_forms import (
    ENCRYPTED,
    PLAIN,
    TENANTS,
    Built,
    Query,
    Row,
    Unsupported,
    queries,
    row_numbers,
    rows,
    unsupported,
)
from orm.oracle_worker import engine_of
from sqlalchemy import URL, event, insert
from sqlalchemy.orm import Session

from sqla_byok import Byok, UnsupportedQueryError
from sqla_byok.kms import Kms

DATABASES = pytest.mark.parametrize("sync_url", ["sqlite", "postgresql"], indirect=True)


class Process:
    """A Byok over an engine of its own, which knows the salts of the time at which it was made: its clock stands."""

    def __init__(self, keystore: str, url: URL, options: dict[str, Any]) -> None:
        self.byok = Byok(keystore=keystore, clock=TurnableClock(), **options)
        self.engine = engine_of(url)
        self.byok.attach(self.engine)

    def open(self) -> None:
        for tenant in TENANTS:
            with self.byok.tenant(tenant):
                pass

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


class World:
    """The models and their twins in one database; the last of the processes searches, each writes by its salt."""

    def __init__(self, folder: Path, url: URL, customers: dict[str, Kms], options: dict[str, Any]) -> None:
        self._given = (f"sqlite:///{folder / 'oracle.db'}", url, options)
        self.processes = [Process(*self._given)]
        first = self.processes[0].byok
        first.create_keystore()
        for tenant, kms in customers.items():
            first.onboard(tenant, kms)
        self.processes[0].open()
        self.plain = engine_of(url)
        for models in (ENCRYPTED, PLAIN):
            models.Base.metadata.create_all(self.plain)
        self.sent: list[str] = []
        self._listen()

    def rotate(self) -> None:
        """Give t1 one more live salt, which only a new process knows."""
        rotating = Process(*self._given)
        rotating.byok.rotate_salt("t1")
        rotating.close()
        self.processes.append(Process(*self._given))
        self.processes[-1].open()
        self._listen()

    def _listen(self) -> None:
        self.reader.engine.connect().close()  # the dialect's own questions come first
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(
                self.reader.engine, name, lambda cursor, statement, *rest: self.sent.append(statement)
            )

    @property
    def reader(self) -> Process:
        return self.processes[-1]

    @property
    def live(self) -> int:
        return len(self.reader.byok._keyrings.get("t1").live_salts)

    def fill(self, given: list[Row]) -> None:
        """Make these the rows of both sets of models."""
        with self.plain.connect() as connection:
            for models in (ENCRYPTED, PLAIN):
                for table in models.Base.metadata.tables.values():
                    connection.exec_driver_sql(f"DELETE FROM {table.name}")
            for entity, some in groupby(given, lambda row: row.entity):
                connection.execute(insert(getattr(PLAIN, entity).__table__), [row.values for row in some])

        def place(row: Row) -> tuple[str, str, int]:
            return row.entity, row.values["org"], row.salt % len(self.processes)

        for (entity, org, salt), some in groupby(sorted(given, key=place), place):
            engine = self.processes[salt].engine.execution_options(byok_tenant=org)
            with engine.connect() as connection:
                connection.execute(insert(getattr(ENCRYPTED, entity).__table__), [row.values for row in some])

    def session(self, tenant: str) -> Any:
        return self.reader.byok.session(tenant, self.reader.engine)

    def close(self) -> None:
        for process in self.processes:
            process.close()
        self.plain.dispose()


@pytest.fixture
def world(
    tmp_path: Path, sync_url: URL, customers: dict[str, Kms], kms_options: dict[str, Any]
) -> Iterator[World]:
    world = World(tmp_path, sync_url, customers, kms_options)
    yield world
    world.close()


@pytest.fixture
def explore(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a test of Hypothesis's with so many examples, or more with --deep."""

    def run(test: Callable[..., None], examples: int) -> None:
        settings(
            max_examples=examples * (20 if request.config.getoption("--deep") else 1),
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        )(test)()

    return run


_persons, _visits = row_numbers("P", 7), row_numbers("V", 6)
_several = st.lists(queries(), min_size=1, max_size=8)


def _agree(world: World, query: Query) -> None:
    """Demand that a query finds the same over ciphertext as over plaintext, or is refused where it has to be."""
    with Session(world.plain) as session:
        expected: Any = Built(query, PLAIN, session).rows()
    with world.session(query.tenant) as session:
        built, refused = Built(query, ENCRYPTED, session), None
        try:
            found = built.rows()
        except UnsupportedQueryError as error:
            found = refused = str(error)
    if refused and query.tenant == "t1" and world.live > 1 and built.compares_columns:
        expected, found = True, "while its salts are being rotated" in refused
    assert found == expected


@DATABASES
def test_supported_queries_answer_as_over_plaintext(world: World, explore: Callable[..., None]) -> None:
    """A search that silently misses a row, or finds one too many, is the worst that can happen here."""

    @given(_persons, _visits, _several)
    def agree(persons: list[int], visits: list[int], several: list[Query]) -> None:
        world.fill(rows(persons, visits))
        for query in several:
            _agree(world, query)

    explore(agree, 250 if world.plain.dialect.name == "sqlite" else 120)


@DATABASES
def test_while_three_salts_live(world: World, explore: Callable[..., None]) -> None:
    """While salts are rotated, a row is found by whichever made its hash, and what could miss one is refused."""
    world.rotate()
    world.rotate()
    assert world.live == 3

    @given(_persons, _visits, _several)
    def agree(persons: list[int], visits: list[int], several: list[Query]) -> None:
        world.fill(rows(persons, visits))
        for query in several:
            _agree(world, query)

    explore(agree, 120 if world.plain.dialect.name == "sqlite" else 60)


@DATABASES
def test_unsupported_queries_are_refused(world: World, explore: Callable[..., None]) -> None:
    """Wherever a query would run on ciphertext, it raises before the database could answer, and wrongly."""

    @given(unsupported())
    def refuse(form: Unsupported) -> None:
        with world.session(form.query.tenant) as session:
            world.sent.clear()
            with pytest.raises(UnsupportedQueryError) as raised:
                session.execute(*form.statement)
            assert world.sent == []
        assert "pl\u00e4in" not in str(raised.value)

    explore(refuse, 600 if world.plain.dialect.name == "sqlite" else 200)
