"""A year of an application, played: what changes under it while releases overlap, and writers and readers go on.

The writers of the running releases insert, update and delete all the time, in transactions of their own. Beside them a
plaintext twin is kept, and searches are compared with it at every moment: what is found has to be what the twin has, or
the search is refused by name. Time is turned instead of waited for, but only where no transaction is open: one that
stays open for longer than a change takes to settle is not covered, and documented as such.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from keys_tools import TurnableClock
from sqlalchemy import URL, create_engine, delete, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import (
    Byok,
    Encrypted,
    HashSpecChangedError,
    KeysExpiredError,
    NotSearchableError,
    SettlingError,
    UnsupportedQueryError,
)
from sqla_byok.jobs import Pace, destroy, rehash, rotate, verify
from sqla_byok.normalize import casefold
from sqla_byok.testing import FakeKms

MAILS = [f"{name}@{host}" for name in ("Ada", "ADA", "ada", "Bo", "bo", "Cy") for host in ("one", "Two")]
REFUSED = (NotSearchableError, SettlingError, HashSpecChangedError, UnsupportedQueryError)


class World:
    """The lock under which time is turned, and the plaintext twin, which changes as the database does."""

    def __init__(self) -> None:
        self.clock = Clock(self)
        self.twin: dict[int, str | None] = {}
        self.lost: list[str] = []
        self.counts: Counter[str] = Counter()
        self._lock, self._open = threading.Condition(), 0
        self._waiting, self._still = 0, False
        self.busy: set[int] = set()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            self._lock.wait_for(lambda: not self._waiting)
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                self._lock.notify_all()

    @contextmanager
    def stillness(self) -> Iterator[None]:
        """While no transaction is open, and nobody else has the stillness: time is not turned in a comparison."""
        with self._lock:
            self._waiting += 1
            self._lock.wait_for(lambda: not self._open and not self._still)
            self._still = True
        try:
            yield
        finally:
            with self._lock:
                self._still = False
                self._waiting -= 1
                self._lock.notify_all()


class Clock(TurnableClock):
    """Turned by whoever waits until something has settled."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def sleep(self, seconds: float) -> None:
        with self._world.stillness():
            self.turn(seconds)


class Release:
    """One release of the application: a model, a Byok and an engine of its own, and writers until it ends."""

    def __init__(self, world: World, keystore: str, url: URL, table: str, **options: Any) -> None:
        class Base(DeclarativeBase):
            pass

        class Member(Base):
            __tablename__ = table
            id: Mapped[int] = mapped_column(primary_key=True)
            mail: Mapped[str | None] = mapped_column(Encrypted(String40(), **options))

        self.world, self.member, self.base = world, Member, Base
        self.engine = create_engine(url)
        self.byok = Byok(keystore, clock=world.clock)
        self.byok.create_keystore()
        self.byok.attach(self.engine)
        self._ends = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self, seed: int) -> Release:
        for number in range(2):
            thread = threading.Thread(target=self._write, args=(random.Random(f"{seed} {number}"),))
            self._threads.append(thread)
            thread.start()
        return self

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def close(self) -> None:
        self.end()
        self.byok.close()
        self.engine.dispose()

    def _write(self, dice: random.Random) -> None:
        while not self._ends.is_set():
            try:
                with self.world.transaction():
                    self._once(dice)
            except REFUSED:
                self.world.counts["refused writes"] += 1
            except KeysExpiredError:
                pass  # the clock was turned by hours
            except Exception as error:  # a writer that dies must be seen
                self.world.lost.append(f"{type(error).__name__}: {error}")
                return
            time.sleep(0.002)

    def _once(self, dice: random.Random) -> None:
        """One transaction over a row that nobody else works on just now, and the same in the twin."""
        world, mail = self.world, dice.choice([None, *MAILS])
        id_ = dice.randrange(1, 400)
        with world._lock:
            if id_ in world.busy:
                return
            world.busy.add(id_)
        try:
            with self.byok.session("org", self.engine) as session:
                if id_ not in world.twin:
                    session.add(self.member(id=id_, mail=mail))
                elif dice.random() < 0.2:
                    session.execute(delete(self.member).where(self.member.id == id_))
                    mail = "gone"
                else:
                    session.execute(update(self.member).where(self.member.id == id_).values(mail=mail))
                session.commit()
            if mail == "gone":
                del world.twin[id_]
            else:
                world.twin[id_] = mail
            world.counts["writes"] += 1
        finally:
            with world._lock:
                world.busy.discard(id_)

    # -- the oracle ------------------------------------------------------------------------------------------------

    def compare(self, same: Callable[[str], str], *, may_refuse: bool) -> None:
        """Every search beside the twin's answer, and every row beside the twin's."""
        with self.world.stillness(), self.byok.session("org", self.engine) as session:
            rows = {row[0]: row[1] for row in session.execute(select(self.member.id, self.member.mail))}
            assert rows == self.world.twin, "a write was lost"
            for mail in MAILS:
                wanted = {i for i, m in self.world.twin.items() if m is not None and same(m) == same(mail)}
                try:
                    found = set(session.scalars(select(self.member.id).where(self.member.mail == mail)))
                except REFUSED:
                    assert may_refuse, "refused"
                    self.world.counts["refused searches"] += 1
                    continue
                assert found == wanted, f"a wrong row for {mail}"
                self.world.counts["comparisons"] += 1


def String40() -> Any:  # noqa: N802 - stands for a type
    from sqlalchemy import String

    return String(40)


@contextmanager
def oracle(release: Release, same: Callable[[str], str]) -> Iterator[None]:
    """Compare all the time, beside what is done in the block; a search may be refused there, and never be wrong."""
    stop, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        while not stop.is_set():
            try:
                release.compare(same, may_refuse=True)
            except KeysExpiredError:
                continue
            except BaseException as error:
                errors.append(error)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    for error in errors:
        raise error


def exact(mail: str) -> str:
    return mail


@pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)
def test_a_year(tmp_path: Path, sync_url: URL) -> None:
    world, keystore, pace = World(), f"sqlite:///{tmp_path / 'keystore.db'}", Pace(rows_a_second=1_000)
    releases: list[Release] = []

    def release(table: str = "yr_member", **options: Any) -> Release:
        releases.append(Release(world, keystore, sync_url, table, **options))
        return releases[-1]

    try:
        first = release()
        first.byok.onboard("org", FakeKms(f"year-{uuid.uuid4().hex[:6]}"))
        second = release(searchable=True)
        second.base.metadata.create_all(second.engine)
        first.begin(1)
        time.sleep(0.8)

        # January: mail becomes searchable, with the release before still there
        second.begin(2)
        time.sleep(0.5)
        first.end()
        with oracle(second, exact):
            assert rehash(second.byok, second.engine, second.base, pace=pace).state == "done"
        second.compare(exact, may_refuse=False)

        # March: another normalizer, prepared
        third = release(searchable=True, normalize=casefold)
        assert [each.kind for each in third.byok.check(third.base)] == ["changed"]
        with oracle(third, str.casefold):
            third.byok.check(third.base, prepare=True)
            third.begin(3)
            time.sleep(0.5)
            second.end()
            assert rehash(third.byok, third.engine, third.base, pace=pace).state == "done"
        third.compare(str.casefold, may_refuse=False)

        # June: both keys are rotated, retired and destroyed
        with oracle(third, str.casefold):
            rotation = rotate(third.byok, third.engine, "org", third.base, pace=pace)
            assert len(rotation.retired) == 2
            for kind, generation in rotation.retired:
                destroy(third.byok, "org", kind, generation, backups_kept=0)
        third.compare(str.casefold, may_refuse=False)

        # September: the table is renamed, in a minute without writers
        third.end()
        with third.engine.begin() as connection:
            connection.execute(text("ALTER TABLE yr_member RENAME TO yr_person"))
        fourth = release("yr_person", searchable=True, normalize=casefold, column_id="yr_member.mail")
        fourth.begin(4)
        time.sleep(0.5)
        fourth.compare(str.casefold, may_refuse=False)

        # November: the customer wants no search, and then wants it back
        with oracle(fourth, str.casefold):
            fourth.byok.set_searchable("org", set())
            time.sleep(0.5)
            fourth.byok.set_searchable("org", None)
            time.sleep(0.3)
            assert rehash(fourth.byok, fourth.engine, fourth.base, pace=pace).state == "done"
        fourth.compare(str.casefold, may_refuse=False)

        fourth.end()
        report = verify(fourth.byok, fourth.engine, fourth.base)
        assert (report.counts["failed"], report.rows) == (0, len(world.twin))
        assert world.lost == []
        assert world.counts["writes"] > 300
        assert world.counts["comparisons"] > 100
    finally:
        for each in releases:
            each.close()
