"""Orders of events after which a search must not be open over rows that it would miss, nor a salt be retired."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import TurnableClock
from sqlalchemy import Engine, String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, ConfigurationError, Encrypted, NotSearchableError
from sqla_byok.crypto.formats import SEARCH_SALT
from sqla_byok.jobs import cancel, rehash, resume, retire, verify
from sqla_byok.normalize import casefold
from sqla_byok.testing import FakeKms

ROWS = range(1, 41)


def release(owner: str | None = None, **options: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Member(Base):
        __tablename__ = "od_member"
        __byok_tenant__ = "org"
        id: Mapped[int] = mapped_column(primary_key=True)
        org: Mapped[str] = mapped_column(String(9))
        mail: Mapped[str] = mapped_column(Encrypted(String(40), owner=owner, **options))

    return Member


class Killed(BaseException):
    """A process that dies."""


class Clock(TurnableClock):
    """Kills whoever waits, at the n-th time."""

    kills = 0

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.kills -= 1
        if self.kills == 0:
            raise Killed


class World:
    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.kms = {name: FakeKms(f"order-{name}-{uuid.uuid4().hex[:6]}") for name in ("t1", "t2", "vendor")}
        self.engine: Engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        self.byok = Byok(f"sqlite:///{folder / 'keystore.db'}", clock=self.clock)
        self.byok.create_keystore()
        self.byok.attach(self.engine)
        for name, kms in self.kms.items():
            self.byok.onboard(name, kms)

    def put(self, model: Any, tenant: str, numbers: Any = ROWS, prefix: str = "M") -> None:
        model.metadata.create_all(self.engine)
        with self.byok.session(tenant, self.engine) as session:
            for n in numbers:
                session.merge(model(id=n, org=tenant, mail=f"{prefix}{n}"))
            session.commit()

    def find(self, model: Any, tenant: str, value: str) -> list[int]:
        with self.byok.session(tenant, self.engine) as session:
            return list(session.scalars(select(model.id).where(model.mail == value, model.org == tenant)))

    def pause(self, _: Any) -> None:
        self.byok._jobs.set_state(self.byok._jobs.all()[0], "paused")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 10)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", 10)
    world = World(tmp_path)
    yield world
    world.byok.close()
    world.engine.dispose()


A: dict[str, Any] = {"searchable": True}
B: dict[str, Any] = {"searchable": True, "normalize": casefold}


def test_an_owners_column_needs_the_rows_of_all(world: World) -> None:
    """A re-hash of some tenants' rows, or of none, neither opens its search nor lets its salt go."""
    model = release("vendor", **A)
    world.put(model, "t1", [1])
    world.put(model, "t2", [2])
    world.byok.rotate_salt("vendor")
    for tenants in (["vendor"], ["t1"]):
        rehash(world.byok, world.engine, model, tenants=tenants)
        with pytest.raises(ConfigurationError, match="byok rehash"):
            retire(world.byok, world.engine, "vendor", SEARCH_SALT, 1, model)
    changed = release("vendor", **B)
    rehash(world.byok, world.engine, changed, tenants=["t1"])
    assert world.find(model, "t2", "M2") == [2], "the search was not closed, and its rows were left"
    rehash(world.byok, world.engine, model)
    retire(world.byok, world.engine, "vendor", SEARCH_SALT, 1, model)
    assert [world.find(model, t, f"M{n}") for n, t in ((1, "t1"), (2, "t2"))] == [[1], [2]]


def test_verify_does_not_mend_what_another_release_searches(world: World) -> None:
    world.put(release(**A), "t1")
    report = verify(world.byok, world.engine, release(**B), repair=True)
    assert (report.counts["changed"], report.counts["failed"]) == (0, 0)
    assert world.find(release(**A), "t1", "M7") == [7]


def test_verify_opens_by_the_active_salt_only(world: World) -> None:
    model = release(**A)
    world.put(model, "t1")
    world.byok.rotate_salt("t1")
    assert verify(world.byok, world.engine, model, open_search=True).counts["failed"] == len(ROWS)
    with pytest.raises(ConfigurationError, match="byok rehash"):
        retire(world.byok, world.engine, "t1", SEARCH_SALT, 1, model)


def test_a_tenant_whose_first_rows_came_later(world: World) -> None:
    """A job that begins anew has other shards."""
    old, new = release(**A), release(**B)
    world.put(old, "t1")
    assert rehash(world.byok, world.engine, new.mail, on_progress=world.pause).state == "paused"
    world.byok.check(old, prepare=True)
    world.put(old, "t2", [101])
    assert rehash(world.byok, world.engine, new.mail).state == "done"
    assert world.find(new, "t2", "m101") == [101]
    assert world.find(new, "t1", "m3") == [3]


@pytest.mark.parametrize("when", [1, 2])
def test_killed_while_the_search_is_closed_anew(world: World, when: int) -> None:
    """The next call does not go on from the middle."""
    old, new = release(**A), release(**B)
    world.put(old, "t1")
    rehash(world.byok, world.engine, new.mail, on_progress=world.pause)
    world.byok.check(old, prepare=True)
    world.put(old, "t1", range(1, 6), prefix="N")
    world.clock.kills = when
    with pytest.raises(Killed):
        rehash(world.byok, world.engine, new.mail)
    assert rehash(world.byok, world.engine, new.mail).state == "done"
    assert [world.find(new, "t1", f"n{n}") for n in range(1, 6)] == [[n] for n in range(1, 6)]


def test_what_one_job_has_closed_no_other_opens(world: World) -> None:
    """Neither one that was paused, nor one that is done and cannot be gone on with."""
    model = release(**A)
    world.put(model, "t1")
    first = rehash(world.byok, world.engine, model.mail, on_progress=world.pause)
    world.byok.set_searchable("t1", None, but={model.mail})
    world.put(model, "t1", range(1, 6), prefix="N")
    world.byok.set_searchable("t1", None)
    world.clock.kills = 2
    with pytest.raises(Killed):
        rehash(world.byok, world.engine, model)
    again = rehash(world.byok, world.engine, model.mail)
    assert (again.job != first.job, again.state) == (True, "done")
    assert [world.find(model, "t1", f"N{n}") for n in range(1, 6)] == [[n] for n in range(1, 6)]
    with pytest.raises(ConfigurationError, match="is done"):
        resume(world.byok, world.engine, again.job)


def test_dark_while_the_search_was_closed(world: World) -> None:
    """Its rows are left, though its KMS answers by the time they come; what it is searched by stays as it was."""
    old, new = release(**A), release(**B)
    for tenant, numbers in (("t1", range(1, 20)), ("t2", range(20, 40))):
        world.put(old, tenant, numbers)
    world.kms["t2"].disable()
    world.byok.forget_keys()
    enabled: Callable[[Any], None] = lambda _: world.kms["t2"].enable() or world.byok.forget_keys()  # type: ignore[func-returns-value] # noqa: E731
    report = rehash(world.byok, world.engine, new.mail, on_progress=enabled)
    assert (report.state, report.counts["dark"]) == ("running", 20)
    assert world.find(old, "t2", "M25") == [25]
    assert world.find(new, "t1", "m5") == [5]
    assert rehash(world.byok, world.engine, new.mail).state == "done"
    assert world.find(new, "t2", "m25") == [25]


def test_a_cancelled_verify_gives_nothing_up(world: World) -> None:
    old, new = release(**A), release(**B)
    world.put(old, "t1")
    looked = verify(world.byok, world.engine, new, on_progress=world.pause)
    rehash(world.byok, world.engine, new.mail, on_progress=lambda _: _quietly(world, looked.job))
    assert world.find(new, "t1", "m5") == [5]


def _quietly(world: World, job: str) -> None:
    if world.byok._jobs.get(job).state != "cancelled":
        cancel(world.byok, job)


def test_what_is_off_is_not_told_as_wrong(world: World) -> None:
    """Hashes stay until the rows are written again; a search of it is refused anyway."""
    model = release(**A)
    world.put(model, "t1")
    world.byok.set_searchable("t1", set())
    assert verify(world.byok, world.engine, model).counts["failed"] == 0
    with pytest.raises(NotSearchableError):
        world.find(model, "t1", "M1")
