"""Two and three processes on one keystore, while the keys of their tenant change.

Each other process has a clock that its parent turns. Where one of them has to wait for a change to settle, it says so
and waits to be told that the time has passed, so that the parent decides what happens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import TurnableClock
from sqlalchemy import URL, LargeBinary, String, create_engine, insert, select, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from told_process import WAKE, ToldProcess

from sqla_byok import Byok, Encrypted, KeystoreConflictError, KeystoreUnavailableError, LocalKms
from sqla_byok.crypto.formats import DATA_KEY, KINDS, SEARCH_SALT
from sqla_byok.keys.generations import SETTLE
from sqla_byok.keys.keyrings import POLL_EVERY, WRITE_WITHIN


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True))


# -- what the other processes run ------------------------------------------------------------------------------------


class _ToldClock(TurnableClock):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe = pipe

    def sleep(self, seconds: float) -> None:
        self.pipe.send(("sleeps", seconds))
        assert self.pipe.recv() == WAKE
        super().sleep(seconds)


class Worker:
    """Writes and searches for one tenant."""

    def __init__(self, url: str, clock: TurnableClock) -> None:
        self.engine, self.clock = create_engine(url), clock
        self.byok = Byok(keystore=url, clock=clock)
        self.byok.attach(self.engine)
        self.reads = self.byok._keystore.database.read

    def write(self, mrn: str) -> None:
        with self.byok.session("t1", self.engine) as session:
            session.execute(insert(Patient).values(mrn=mrn))
            session.commit()

    def find(self, *mrns: str) -> list[str]:
        """What is found of these values, each searched by itself and all by one IN."""
        with self.byok.session("t1", self.engine) as session:
            each = [
                found
                for mrn in mrns
                for found in session.scalars(select(Patient.mrn).where(Patient.mrn == mrn))
            ]
            together = session.scalars(select(Patient.mrn).where(Patient.mrn.in_(mrns))).all()
            assert sorted(each) == sorted(together)
            return each

    def read(self) -> list[str]:
        with self.byok.session("t1", self.engine) as session:
            return sorted(session.scalars(select(Patient.mrn)))

    def turn(self, seconds: float) -> None:
        self.clock.turn(seconds)

    def rotate(self, kind: str) -> int:
        return self.byok.rotate_data_key("t1") if kind == DATA_KEY else self.byok.rotate_salt("t1")

    def retire(self, kind: str, generation: int) -> None:
        self.byok._generations.retire("t1", kind, generation)

    def cut_off(self, cut_off: bool) -> None:
        """Whether the keystore cannot be reached from here."""
        self.byok._keystore.database.read = _unreachable if cut_off else self.reads  # type: ignore[method-assign]

    def forget(self) -> None:
        self.byok.forget_keys()

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


def _unreachable(work: Callable[..., Any]) -> Any:
    raise KeystoreUnavailableError("cut off")


def _serve(url: str, pipe: Any) -> None:
    worker = Worker(url, _ToldClock(pipe))
    for name, *arguments in iter(pipe.recv, None):
        try:
            answer = getattr(worker, name)(*arguments)
        except Exception as error:
            answer = error
        pipe.send(answer)
    worker.close()


class Other(ToldProcess):
    """Another process."""

    def __init__(self, url: URL) -> None:
        super().__init__(_serve, url.render_as_string(hide_password=False))

    def settling(self) -> None:
        """Wait until it says that it lets a change settle."""
        assert self.answer() == ("sleeps", SETTLE)


@pytest.fixture
def others(sync_url: URL) -> Iterator[list[Other]]:
    others = [Other(sync_url), Other(sync_url)]
    yield others
    for other in others:
        other.close()


class StagedClock(TurnableClock):
    """Lets the time of all pass in small steps, and something happen in each."""

    def __init__(self) -> None:
        super().__init__()
        self.step: Callable[[float], object] = lambda seconds: None

    def sleep(self, seconds: float) -> None:
        for _ in range(STEPS):
            self.turn(seconds / STEPS)
            self.step(seconds / STEPS)


STEPS = 6


@pytest.fixture
def here(sync_url: URL, customer_key: Path) -> Iterator[Worker]:
    """This process, which onboards the tenant."""
    here = Worker(sync_url.render_as_string(hide_password=False), StagedClock())
    here.byok.create_keystore()
    here.byok.onboard("t1", LocalKms(customer_key))
    Base.metadata.create_all(here.engine)
    yield here
    here.close()


def _states(here: Worker, kind: str) -> dict[int, str]:
    row = here.byok._keystore.load("t1")
    assert row is not None
    return {each.generation: each.state for each in (*row.generations, *row.retired) if each.kind == kind}


class Watch:
    """Has all processes write and search, and knows what must be found and which data keys may be written with."""

    def __init__(self, here: Worker, others: list[Other]) -> None:
        self.here, self.others, self.written = here, others, list[str]()
        self.since = 0.0  # the last look of the second

    def step(self, seconds: float) -> None:
        """Time passes for all; each writes, then each searches and reads.

        The first looks at the keystore in each step. The second is cut off from it for as long as it may be.
        """
        self.since += seconds
        looks = self.since + seconds >= WRITE_WITHIN
        for number, other in enumerate(self.others):
            if number == 1:
                other.do("cut_off", not looks)
            other.do("turn", seconds)
            mrn = f"{number}-{len(self.written)}"
            other.do("write", mrn)
            self.written.append(mrn)
            self.refuse_retired()
        for other in self.others:
            assert sorted(other.do("find", *self.written)) == sorted(self.written)
            assert other.do("read") == sorted(self.written)
        if looks:
            self.since = 0.0

    def refuse_retired(self) -> None:
        """The newest row is under a data key that is in use."""
        row = self.here.byok._keystore.load("t1")
        assert row is not None
        with self.here.engine.connect() as connection:
            blob = connection.scalars(
                select(type_coerce(Patient.mrn, LargeBinary)).order_by(Patient.id.desc()).limit(1)
            ).one()
        assert blob[2:18] in {each.id for each in row.generations if each.kind == DATA_KEY}


def test_processes_work_on_while_keys_are_rotated(here: Worker, others: list[Other]) -> None:
    """Two write and search at every moment while a third rotates: no unknown key, no missed row, no retired key."""
    watch = Watch(here, others)
    assert isinstance(here.clock, StagedClock)
    here.clock.step = watch.step
    watch.step(WRITE_WITHIN)
    for generation in (2, 3):
        for kind in KINDS:
            assert here.rotate(kind) == generation
            watch.step(0)
    assert _states(here, SEARCH_SALT) == {1: "readable", 2: "readable", 3: "active"}
    # As a job does: once nobody writes with the old ones any more, write all rows anew.
    here.byok._generations.settle()
    with here.byok.session("t1", here.engine) as session:
        for patient in session.scalars(select(Patient)):
            patient.mrn = f"{patient.mrn}!"
        session.commit()
    watch.written = [f"{mrn}!" for mrn in watch.written]
    for kind in KINDS:
        for generation in (1, 2):
            here.retire(kind, generation)
            watch.step(0)
    watch.step(WRITE_WITHIN)
    assert _states(here, DATA_KEY) == {1: "retired", 2: "retired", 3: "active"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_killed_in_between(here: Worker, others: list[Other], kind: str) -> None:
    """Killed between publishing and activating it leaves a whole state; whoever rotates next completes it."""
    killed, alive = others
    here.write("before")
    killed.start("rotate", kind)
    killed.settling()
    killed.kill()
    assert _states(here, kind) == {1: "active", 2: "pending"}
    for other in (here, alive):
        work = getattr(other, "do", None) or (lambda name, *arguments: getattr(here, name)(*arguments))
        work("turn", POLL_EVERY)
        work("write", f"between {id(other)}")
        assert work("find", "before", f"between {id(other)}") == ["before", f"between {id(other)}"]
    alive.start("rotate", kind)
    alive.settling()
    alive.wake()
    assert alive.answer() == 2
    assert _states(here, kind) == {1: "readable", 2: "active"}
    alive.do("write", "after")
    here.turn(POLL_EVERY)
    assert here.find("before", "after") == ["before", "after"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_rotate_at_once(here: Worker, others: list[Other], kind: str) -> None:
    """They race to publish and to activate: both agree or one is told of a conflict; there is one active, none lost."""
    here.write("A")
    for round_ in range(1, 4):
        for other in others:
            other.start("rotate", kind)
        results: list[Any] = []
        sleeping = []
        for other in others:
            try:
                other.settling()
                sleeping.append(other)
            except KeystoreConflictError as error:
                results.append(type(error))
        for other in sleeping:
            other.wake()
        for other in sleeping:
            try:
                results.append(other.answer())
            except KeystoreConflictError as error:
                results.append(type(error))
        assert round_ + 1 in results
        assert set(results) <= {round_ + 1, KeystoreConflictError}
        expected = dict.fromkeys(range(1, round_ + 1), "readable")
        assert _states(here, kind) == {**expected, round_ + 1: "active"}
    here.turn(POLL_EVERY)
    here.write("B")
    for other in others:
        other.do("turn", POLL_EVERY)
        assert other.do("find", "A", "B") == ["A", "B"]


def test_rekey_and_rewrap_are_noticed(here: Worker, others: list[Other], customer_key: Path) -> None:
    """Others open anew after a rekey, go on with their keys after a rewrap, and ask the new customer key in the end."""
    one, two = others
    one.do("write", "A")
    assert two.do("find", "A") == ["A"]
    assert here.byok.rekey("t1") == 2
    for other in others:
        other.do("turn", POLL_EVERY)
        other.do("write", "B")
    assert two.do("find", "A", "B") == ["A", "B", "B"]

    new = customer_key.with_name("new.key")
    LocalKms.create(new)
    here.byok.rewrap("t1", LocalKms(new))
    customer_key.unlink()
    for other in others:
        other.do("turn", POLL_EVERY)
        other.do("write", "C")  # with what it holds, also at its look
        assert other.do("find", "A")
        other.do("forget")
        assert other.do("find", "A") == ["A"]  # by the new customer key, the only one that is there
    away = new.rename(new.with_name("away"))
    one.do("forget")
    with pytest.raises(Exception, match="is missing"):
        one.do("find", "A")
    assert two.do("find", "A") == ["A"]
    two.do("turn", 301)
    with pytest.raises(Exception, match="is missing"):
        two.do("find", "A")
    away.rename(new)
    assert one.do("find", "C") == two.do("find", "C") == ["C", "C"]
