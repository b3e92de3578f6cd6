"""Rows that are written in every way, while keys change: each is found by its current value, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from keys_tools import CountingKms, StagedClock
from sqlalchemy import Integer, String, bindparam, create_engine, delete, event, insert, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column

from sqla_byok import Byok, Encrypted, NotSearchableError
from sqla_byok.crypto.formats import DATA_KEY, READABLE, SEARCH_SALT
from sqla_byok.keys.generations import SETTLE
from sqla_byok.keys.keyrings import POLL_EVERY
from sqla_byok.keys.searchable import OFF, ON, PENDING
from sqla_byok.normalize import casefold


class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "machine_person"
    id = mapped_column(Integer, primary_key=True)
    org = mapped_column(String(20))
    mrn = mapped_column(Encrypted(String(20), searchable=True))
    nick = mapped_column(Encrypted(String(20), searchable=True, normalize=casefold))
    age = mapped_column(Encrypted(Integer, searchable=True, salt_scope="tenant"))
    name = mapped_column(Encrypted(String(20)))


_table = Person.__table__
# By column: the values that rows take, and what a search regards as equal.
VALUES: dict[str, tuple[Any, ...]] = {
    "mrn": ("a", "b", "", None),
    "nick": ("Ada", "ADA", "y", "", None),
    "age": (1, 2, None),
    "name": ("n", "m", None),
}
NORMAL: dict[str, Callable[[Any], Any]] = {"mrn": str, "nick": casefold, "age": int}
SEARCHED = {name: [value for value in VALUES[name] if value is not None] for name in NORMAL}
_read = select(_table.c.id, *(_table.c[name] for name in VALUES)).where(_table.c.org == bindparam("org"))
_equal = {name: select(Person.id).where(getattr(Person, name) == bindparam("v")) for name in NORMAL}
_among = {
    name: select(Person.id).where(getattr(Person, name).in_(bindparam("v", expanding=True)))
    for name in NORMAL
}
_other = {
    name: select(Person.id).where(Person.org == bindparam("org"), getattr(Person, name) != bindparam("v"))
    for name in NORMAL
}
_none = {
    name: select(Person.id).where(Person.org == bindparam("org"), getattr(Person, name).is_(None))
    for name in NORMAL
}

_tenants = st.sampled_from([0, 1])
_processes = st.sampled_from([0, 1])
_rows = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()})
_parts = st.dictionaries(st.sampled_from(list(VALUES)), st.integers(0, 59), min_size=1, max_size=2).map(
    lambda given: {name: VALUES[name][number % len(VALUES[name])] for name, number in given.items()}
)
_conditions = st.sampled_from([(name, value) for name, values in SEARCHED.items() for value in values])
_ends = st.sampled_from(["commit", "commit", "rollback", "savepoint", "savepoint rolled back"])
_kinds = st.sampled_from([SEARCH_SALT, DATA_KEY])
_synchronize = st.sampled_from(["auto", "fetch", "evaluate", False])
_halves = st.sampled_from([0.0, 0.5])


class World:
    """Two processes over one keystore and one database, by one clock. Each run takes two new tenants."""

    def __init__(self, folder: Path, kms: CountingKms, keystore_key: str) -> None:
        self.clock, self.kms, self.numbers = StagedClock(), kms, count()
        self.processes = []
        for _ in range(2):
            keystore = f"sqlite:///{folder / 'keystore.db'}"
            byok = Byok(keystore=keystore, keystore_key=keystore_key, clock=self.clock)
            engine = create_engine(f"sqlite:///{folder / 'data.db'}")
            event.listen(
                engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF")
            )
            byok.attach(engine)
            self.processes.append((byok, engine))
        self.processes[0][0].create_keystore()
        Base.metadata.create_all(self.processes[0][1])

    def begin(self) -> tuple[str, str]:
        byok, engine = self.processes[0]
        with engine.begin() as connection:
            connection.execute(delete(_table))
        number = next(self.numbers)
        tenants = f"t1-{number}", f"t2-{number}"
        for tenant in tenants:
            byok.onboard(tenant, self.kms)
        return tenants

    def close(self) -> None:
        for byok, engine in self.processes:
            byok.close()
            engine.dispose()


@pytest.fixture
def world(tmp_path: Path, counting_kms: CountingKms, keystore_key: str) -> Iterator[World]:
    world = World(tmp_path, counting_kms, keystore_key)
    yield world
    world.close()


class Machine(RuleBasedStateMachine):
    """Keeps beside the database what its rows have to be."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.tenants = world.begin()
        self.rows: dict[str, dict[int, dict[str, Any]]] = {tenant: {} for tenant in self.tenants}
        self.written = dict.fromkeys(self.tenants, False)
        self.states = {tenant: dict.fromkeys(NORMAL, ON) for tenant in self.tenants}
        self.ids = count(1)
        self.turn = 0

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _session(self, process: int, tenant: str) -> Any:
        byok, engine = self.world.processes[process]
        return byok.session(tenant, engine)

    def _do(
        self,
        process: int,
        tenant: str,
        end: str,
        work: Callable[[Session], object],
        after: dict[int, dict[str, Any]],
        by: str | None = None,
    ) -> None:
        """Do work in a transaction that ends as said; ``after`` are the tenant's rows once it is done.

        :param by: the column by which it searches.
        """
        if by is not None and self.states[tenant][by] != ON:
            with self._session(process, tenant) as session, pytest.raises(NotSearchableError):
                work(session)
            return
        with self._session(process, tenant) as session:
            if end.startswith("savepoint"):
                savepoint = session.begin_nested()
                work(session)
                session.flush()
                savepoint.rollback() if end.endswith("rolled back") else savepoint.commit()
                session.commit()
            else:
                work(session)
                session.flush()
                session.rollback() if end == "rollback" else session.commit()
        if not end.endswith(("rollback", "rolled back")):
            self.rows[tenant] = after

    def _changed(self, tenant: str, ids: Any, values: dict[str, Any]) -> dict[int, dict[str, Any]]:
        return {id_: {**row, **values} if id_ in ids else row for id_, row in self.rows[tenant].items()}

    def _matching(self, tenant: str, name: str, value: Any) -> list[int]:
        normal = NORMAL[name]
        return [
            id_
            for id_, row in self.rows[tenant].items()
            if row[name] is not None and normal(row[name]) == normal(value)
        ]

    def _one(self, tenant: str, number: int) -> int:
        ids = list(self.rows[tenant])
        return ids[number % len(ids)]

    @rule(
        process=_processes,
        tenant=_tenants,
        end=_ends,
        several=st.lists(_rows, min_size=1, max_size=3),
        how=st.sampled_from(["flush", "executemany", "values", "bulk", "merge"]),
    )
    def add(self, process: int, tenant: int, end: str, several: list[dict[str, Any]], how: str) -> None:
        name = self.tenants[tenant]
        new = {next(self.ids): row for row in several}
        full = [{"id": id_, "org": name, **row} for id_, row in new.items()]

        def work(session: Session) -> None:
            if how == "flush":
                session.add_all([Person(**row) for row in full])
            elif how == "executemany":
                session.connection().execute(insert(_table), full)
            elif how == "values":
                session.execute(insert(Person).values(full))
            elif how == "bulk":
                session.bulk_insert_mappings(Person.__mapper__, full)
            else:
                for row in full:
                    session.merge(Person(**row))

        self.written[name] = True
        self._do(process, name, end, work, {**self.rows[name], **new})

    @precondition(lambda self: all(self.rows.values()))
    @rule(
        process=_processes,
        tenant=_tenants,
        end=_ends,
        number=st.integers(0, 9),
        values=_parts,
        how=st.sampled_from(["attribute", "merge", "bulk", "by id", "executemany"]),
    )
    def change(
        self, process: int, tenant: int, end: str, number: int, values: dict[str, Any], how: str
    ) -> None:
        name = self.tenants[tenant]
        id_ = self._one(name, number)

        def work(session: Session) -> None:
            if how == "attribute":
                person = session.get_one(Person, id_)
                for key, value in values.items():
                    setattr(person, key, value)
            elif how == "merge":
                session.merge(Person(id=id_, **values))
            elif how == "bulk":
                session.bulk_update_mappings(Person.__mapper__, [{"id": id_, **values}])
            elif how == "by id":
                session.execute(update(Person).where(Person.id == id_).values(values))
            else:
                session.connection().execute(
                    update(_table)
                    .where(_table.c.id == bindparam("of"))
                    .values({key: bindparam(f"new_{key}") for key in values}),
                    [{"of": id_, **{f"new_{key}": value for key, value in values.items()}}] * 2,
                )

        self._do(process, name, end, work, self._changed(name, [id_], values))

    @rule(
        process=_processes,
        tenant=_tenants,
        end=_ends,
        condition=_conditions,
        values=_parts,
        loaded=st.booleans(),
        synchronize=_synchronize,
    )
    def bulk_update(
        self,
        process: int,
        tenant: int,
        end: str,
        condition: tuple[str, Any],
        values: dict[str, Any],
        loaded: bool,
        synchronize: Any,
    ) -> None:
        name, (key, value) = self.tenants[tenant], condition
        if synchronize == "evaluate" and key == "nick":
            synchronize = "auto"  # SQLAlchemy cannot evaluate a normalizer
        after = self._changed(name, self._matching(name, key, value), values)

        def work(session: Session) -> None:
            people = session.scalars(select(Person).where(Person.org == name)).all() if loaded else ()
            session.execute(
                update(Person).where(getattr(Person, key) == value).values(values),
                execution_options={"synchronize_session": synchronize},
            )
            if synchronize is not False:
                assert [{key: getattr(one, key) for key in VALUES} for one in people] == [
                    after[one.id] for one in people
                ]

        self.written[name] = True
        self._do(process, name, end, work, after, by=key)

    @rule(
        process=_processes,
        tenant=_tenants,
        end=_ends,
        number=st.integers(0, 9),
        row=_rows,
        values=_parts,
        new=st.booleans(),
        excluded=st.booleans(),
    )
    def upsert(
        self,
        process: int,
        tenant: int,
        end: str,
        number: int,
        row: dict[str, Any],
        values: dict[str, Any],
        new: bool,
        excluded: bool,
    ) -> None:
        name = self.tenants[tenant]
        id_ = next(self.ids) if new or not self.rows[name] else self._one(name, number)
        statement = sqlite.insert(Person).values(id=id_, org=name, **row)
        if excluded:
            values = {key: row[key] for key in values}
        given: dict[str, Any] = {key: statement.excluded[key] for key in values} if excluded else values
        known = self.rows[name].get(id_)
        self.written[name] = True
        self._do(
            process,
            name,
            end,
            lambda session: session.execute(
                statement.on_conflict_do_update(index_elements=["id"], set_=given)
            ),
            {**self.rows[name], id_: row if known is None else {**known, **values}},
        )

    @rule(
        process=_processes,
        tenant=_tenants,
        end=_ends,
        condition=_conditions,
        how=st.sampled_from(["objects", "bulk", "among"]),
    )
    def delete(self, process: int, tenant: int, end: str, condition: tuple[str, Any], how: str) -> None:
        name, (key, value) = self.tenants[tenant], condition
        gone = self._matching(name, key, value)
        column = getattr(Person, key)

        def work(session: Session) -> None:
            if how == "objects":
                for person in session.scalars(select(Person).where(column == value)):
                    session.delete(person)
            else:
                session.execute(
                    delete(Person).where(column == value if how == "bulk" else column.in_([value, None]))
                )

        after = {id_: row for id_, row in self.rows[name].items() if id_ not in gone}
        self._do(process, name, end, work, after, by=key)

    # -- keys ---------------------------------------------------------------------------------------------------------

    @rule(process=_processes, tenant=_tenants, kind=_kinds, row=_rows, after=_halves)
    def rotate(self, process: int, tenant: int, kind: str, row: dict[str, Any], after: float) -> None:
        """Rotate in one process, while the other one works on, with what is pending or not knowing of it."""
        name, byok = self.tenants[tenant], self.world.processes[process][0]
        if len(byok._keyrings.get(name).live_salts) > 3:
            return

        self._meanwhile(process, tenant, row, after)
        byok.rotate_salt(name) if kind == SEARCH_SALT else byok.rotate_data_key(name)

    @rule(process=_processes, tenant=_tenants, kind=_kinds)
    def retire(self, process: int, tenant: int, kind: str) -> None:
        """Write each row anew, and take the old keys away."""
        name, byok = self.tenants[tenant], self.world.processes[process][0]
        row = byok._keystore.load(name)
        assert row is not None
        old = [each.generation for each in row.generations if each.kind == kind and each.state == READABLE]
        if not old:
            return
        byok._generations.settle()
        self._rewrite(process, name)
        for generation in old:
            byok._generations.retire(name, kind, generation)

    def _meanwhile(self, process: int, tenant: int, row: dict[str, Any], after: float) -> None:
        """Have the other process write a row during the next sleep, and both search."""

        def work() -> None:
            self.add(1 - process, tenant, "commit", [row], "flush")
            self.check()
            self.check()

        self.world.clock.after, self.world.clock.meanwhile = after, work

    def _rewrite(self, process: int, tenant: str) -> None:
        again = [{"of": id_, **each} for id_, each in self.rows[tenant].items()]
        if again:
            with self._session(process, tenant) as session:
                session.connection().execute(update(_table).where(_table.c.id == bindparam("of")), again)
                session.commit()

    @rule(
        process=_processes,
        tenant=_tenants,
        enabled=st.none() | st.sets(st.sampled_from(list(NORMAL))),
        row=_rows,
        after=_halves,
        then=st.booleans(),
    )
    def limit(
        self,
        process: int,
        tenant: int,
        enabled: set[str] | None,
        row: dict[str, Any],
        after: float,
        then: bool,
    ) -> None:
        """Say by what the tenant can be searched, while the other process goes on as before; perhaps take it back."""
        self._limit(process, tenant, enabled, row, after)
        if then:
            self.add(process, tenant, "commit", [row], "flush")
            self._limit(1 - process, tenant, None, row, after)
            self.check()
            self.rehash(process, tenant)

    def _limit(
        self, process: int, tenant: int, enabled: set[str] | None, row: dict[str, Any], after: float
    ) -> None:
        name, byok = self.tenants[tenant], self.world.processes[process][0]
        before, kept = self.states[name], set(NORMAL) if enabled is None else enabled
        again = PENDING if self.written[name] else ON
        states = {
            key: OFF if key not in kept else again if state == OFF else state for key, state in before.items()
        }
        closing = {key for key, state in before.items() if key not in kept and state != OFF}
        if closing and self.written[name]:
            self.states[name] = {**states, **{key: f"{before[key]}, closing" for key in closing}}
            self._meanwhile(process, tenant, row, after)
        byok.set_searchable(name, None if enabled is None else {getattr(Person, key) for key in enabled})
        assert self.world.clock.meanwhile is None
        self.states[name] = states
        if not self.written[name]:
            # What is enabled at once another process may refuse for so long.
            self.world.clock.turn(POLL_EVERY)
        self.check()

    @rule(process=_processes, tenant=_tenants)
    def rehash(self, process: int, tenant: int) -> None:
        """Write each row anew, as the job does, and have what was pending searched."""
        name, byok = self.tenants[tenant], self.world.processes[process][0]
        pending = [key for key, state in self.states[name].items() if state == PENDING]
        if pending:
            self.world.clock.turn(SETTLE)
            self._rewrite(process, name)
            for key in pending:
                byok._searchable.rehashed(name, f"machine_person.{key}")
            self.world.clock.turn(POLL_EVERY)
            self.states[name].update(dict.fromkeys(pending, ON))

    @rule(process=_processes, tenant=_tenants)
    def forget(self, process: int, tenant: int) -> None:
        """A process without a tenant's keys asks the customer's KMS once."""
        name, byok = self.tenants[tenant], self.world.processes[process][0]
        for each, _ in self.world.processes:
            each._keyrings.drain()
        byok.forget_keys(name)
        self.world.kms.unwraps.clear()
        for _ in range(2):
            with self._session(process, name) as session:
                self._check_tenant(session, name)
        assert self.world.kms.unwraps == [name]

    @rule(seconds=st.sampled_from([1, 4, 200, 400]))
    def wait(self, seconds: int) -> None:
        self.world.clock.turn(seconds)

    # -- what has to hold ---------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        """Each row reads as it is, and each search finds what it has to."""
        self.turn += 1
        for number, tenant in enumerate(self.tenants):
            with self._session((self.turn + number) % 2, tenant) as session:
                self._check_tenant(session, tenant)

    def _check_tenant(self, session: Session, tenant: str) -> None:
        read = {row.id: row._asdict() for row in session.execute(_read, {"org": tenant})}
        assert read == {id_: {"id": id_, **row} for id_, row in self.rows[tenant].items()}
        for name, state in self.states[tenant].items():
            none = sorted(id_ for id_, row in self.rows[tenant].items() if row[name] is None)
            assert sorted(session.scalars(_none[name], {"org": tenant})) == none
            if state == ON:
                self._check_search(session, tenant, name, none)
            elif state == "on, closing":  # as long as a process has not looked
                with suppress(NotSearchableError):
                    self._check_search(session, tenant, name, none)
            else:
                for statement in (_equal, _other):
                    with pytest.raises(NotSearchableError):
                        session.scalars(statement[name], {"v": SEARCHED[name][0], "org": tenant})

    def _check_search(self, session: Session, tenant: str, name: str, none: list[int]) -> None:
        mine, values = sorted(self.rows[tenant]), SEARCHED[name]
        for value in values:
            found = sorted(session.scalars(_equal[name], {"v": value}))
            assert found == sorted(self._matching(tenant, name, value))
            others = sorted(session.scalars(_other[name], {"v": value, "org": tenant}))
            assert others == [id_ for id_ in mine if id_ not in (*found, *none)]
        assert sorted(session.scalars(_among[name], {"v": values})) == [i for i in mine if i not in none]

    def teardown(self) -> None:
        for byok, _ in self.world.processes:
            byok._keyrings.drain()
        assert self.world.clock.meanwhile is None


def test_rows_are_found_by_what_they_are(world: World, request: pytest.FixtureRequest) -> None:
    """Whatever was written, by whom and however it ended, no search is ever silently wrong."""
    run_state_machine_as_test(
        lambda: Machine(world),
        settings=settings(
            max_examples=40 * (20 if request.config.getoption("--deep") else 1),
            stateful_step_count=30,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
