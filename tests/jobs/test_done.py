"""What counts as done: a job that says so has done every row, whoever was at work beside it."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import TurnableClock
from sqlalchemy import Double, Engine, Float, Integer, String, create_engine, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, ConfigurationError, Encrypted, NotSearchableError, UnknownTenantError
from sqla_byok.crypto.formats import DATA_KEY, KINDS, SEARCH_SALT
from sqla_byok.jobs import Report, destroy, reencrypt, rehash, restore, resume, retire, rotate, verify
from sqla_byok.keys.jobs import Jobs
from sqla_byok.normalize import casefold
from sqla_byok.orm.stored import StoredTable
from sqla_byok.testing import FakeKms

TENANTS = ("acme", "ACME", "vendor")


def member(*, tenant: bool = False, unique: bool = False, columns: Any = None, **options: Any) -> Any:
    """One release's model."""

    class Base(DeclarativeBase):
        pass

    class Member(Base):
        __tablename__ = "dn_member"
        if tenant:
            __byok_tenant__ = "org"
        locals().update(columns or {"id": mapped_column(Integer, primary_key=True)})
        org: Mapped[str | None] = mapped_column(String(20))
        mail: Mapped[str | None] = mapped_column(Encrypted(String(40), **options), unique=unique)

    return Member


@pytest.fixture
def clock() -> TurnableClock:
    return TurnableClock()


@pytest.fixture
def byok(tmp_path: Path, clock: TurnableClock, engine: Engine) -> Iterator[Byok]:
    (tmp_path / "key").write_text(base64.b64encode(bytes(range(32))).decode())
    keystore, key = f"sqlite:///{tmp_path / 'keystore.db'}", f"file:{tmp_path / 'key'}"
    byok = Byok(keystore, keystore_key=key, clock=clock)
    byok.create_keystore()
    byok.attach(engine)
    for tenant in TENANTS:
        byok.onboard(tenant, FakeKms(f"done-{tenant}-{uuid.uuid4().hex[:6]}"))
    yield byok
    byok.close()


def put(byok: Byok, engine: Engine, model: Any, numbers: Any = range(1, 11), tenant: str = "acme") -> None:
    model.metadata.create_all(engine)
    with byok.session(tenant, engine) as session:
        session.add_all(model(id=n, org=tenant, mail=f"M{n}") for n in numbers)
        session.commit()


def find(byok: Byok, engine: Engine, model: Any, value: str, tenant: str = "acme") -> list[Any]:
    with byok.session(tenant, engine) as session:
        where = [model.org == tenant] if model.__table__.info else []
        return sorted(session.scalars(select(model.id).where(model.mail == value, *where)))


def beside(monkeypatch: pytest.MonkeyPatch, other: Callable[[], object]) -> None:
    """Have something else happen once, when a job has read a page and not stored it yet."""
    store, done = StoredTable.prepared, list[bool]()

    def late(self: StoredTable, dialect: Any, changes: Any) -> Any:
        if not done:
            done.append(True)
            other()
        return store(self, dialect, changes)

    monkeypatch.setattr(StoredTable, "prepared", late)


def total(report: Report) -> int:
    return sum(report.counts.values())


# -- others at work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [rehash, reencrypt])
def test_two_jobs_at_once(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch, first: Callable[..., Report]
) -> None:
    """Each changes what the other holds; no row is taken for the other's work."""
    plain, model = member(), member(searchable=True)
    model.metadata.create_all(engine)
    put(byok, engine, plain)
    byok.rotate_data_key("acme")
    second = reencrypt if first is rehash else rehash
    reports: list[Report] = []
    beside(monkeypatch, lambda: reports.append(second(byok, engine, model)))
    reports.append(first(byok, engine, model))
    assert [(each.counts["changed"], total(each)) for each in reports] == [(10, 10)] * 2
    assert find(byok, engine, model, "M7") == [7]
    retire(byok, engine, "acme", DATA_KEY, 1, model)
    assert verify(byok, engine, model).counts["already"] == 10


def test_a_writer_that_does_not_do_the_jobs_work(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changed another column of the row, or deleted it: the rest is still to be done."""

    class Base(DeclarativeBase):
        pass

    class Two(Base):
        __tablename__ = "dn_two"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[str] = mapped_column(Encrypted(String(20)))
        b: Mapped[str] = mapped_column(Encrypted(String(20)))

    Base.metadata.create_all(engine)
    with byok.session("acme", engine) as session:
        session.add_all(Two(id=n, a=f"a{n}", b=f"b{n}") for n in range(1, 6))
        session.commit()
    byok.rotate_data_key("acme")

    def write() -> None:
        with byok.session("acme", engine) as session:
            session.get_one(Two, 2).a = "new"
            session.delete(session.get_one(Two, 3))
            session.commit()

    beside(monkeypatch, write)
    report = reencrypt(byok, engine, Two)
    assert (report.counts["changed"], report.counts["overtaken"], total(report)) == (4, 1, 5)
    retire(byok, engine, "acme", DATA_KEY, 1, Two)


def test_a_row_that_no_update_finds_is_told_of(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others change it each time; it is neither done nor theirs, and the search stays shut."""
    plain, model = member(), member(searchable=True)
    model.metadata.create_all(engine)
    put(byok, engine, plain, range(1, 4))
    store, seen = StoredTable.prepared, list[int]()

    def late(self: StoredTable, dialect: Any, changes: Any) -> Any:
        if any(change.row.key == (2,) for change in changes):  # a release from before, that is still there
            seen.append(len(seen))
            with byok.session("acme", engine) as session:
                session.execute(
                    text("UPDATE dn_member SET mail_hash = :h WHERE id = 2"), {"h": bytes([len(seen)])}
                )
                session.commit()
        return store(self, dialect, changes)

    monkeypatch.setattr(StoredTable, "prepared", late)
    report = rehash(byok, engine, model)
    assert (report.counts["changed"], report.counts["failed"], total(report)) == (2, 1, 3)
    assert [(failure.key, "no UPDATE finds it" in failure.reason) for failure in report.failures] == [
        ((2,), True)
    ]
    with pytest.raises(NotSearchableError):
        find(byok, engine, model, "M1")


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
def test_keys_that_do_not_equal_themselves(byok: Byok, engine: Engine) -> None:
    """MariaDB's FLOAT compares so with the number that it gives back; a DOUBLE does not."""
    model = member(columns={"id": mapped_column(Float, primary_key=True)})
    model.metadata.create_all(engine)
    for job in (reencrypt, verify):
        with pytest.raises(ConfigurationError, match="FLOAT"):
            job(byok, engine, model)
    model.metadata.drop_all(engine)
    model = member(columns={"id": mapped_column(Double, primary_key=True)})
    put(byok, engine, model, (0.1, 0.25, 0.3))
    byok.rotate_data_key("acme")
    assert reencrypt(byok, engine, model).counts["changed"] == 3


# -- rows of a special kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_null_in_a_primary_key(byok: Byok, engine: Engine) -> None:
    """Only SQLite takes it. Refused before anything is closed."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE dn_member (id INT, part INT, org TEXT, mail BLOB, mail_hash BLOB, PRIMARY KEY (id, part))"
            )
        )

    def columns() -> dict[str, Any]:
        return {
            "id": mapped_column(Integer, primary_key=True),
            "part": mapped_column(Integer, primary_key=True),
        }

    plain, model = member(columns=columns()), member(columns=columns(), searchable=True)
    with byok.session("acme", engine) as session:
        session.execute(insert(plain.__table__), [{"id": 1, "part": 1, "mail": "a"}])
        session.execute(insert(plain.__table__), [{"id": 2, "part": None, "mail": "b"}])
        session.commit()
    for job in (rehash, reencrypt, verify):
        with pytest.raises(ConfigurationError, match="1 of its rows have NULL in the primary key"):
            job(byok, engine, model)
    assert byok._jobs.all() == []


def test_null_in_the_tenant_column(byok: Byok, engine: Engine) -> None:
    """Rows from before there was one: their values say whose they are, and they are not passed over."""
    plain, model = member(), member(tenant=True, searchable=True)
    model.metadata.create_all(engine)
    with byok.session("acme", engine) as session:
        session.execute(insert(plain.__table__), [{"id": n, "mail": f"M{n}"} for n in (1, 2)])
        session.commit()
    put(byok, engine, plain, (3,))
    put(byok, engine, plain, (4,), "vendor")
    byok.rotate_data_key("acme")
    assert rehash(byok, engine, model).counts["changed"] == 4
    assert reencrypt(byok, engine, model).counts["changed"] == 3
    with byok.session("acme", engine) as session:
        assert session.scalars(select(model.id).where(model.mail == "M2")).all() == [2]
    retire(byok, engine, "acme", DATA_KEY, 1, model)
    assert reencrypt(byok, engine, model, tenants=["vendor"]).counts["others"] == 2


def test_tenants_whose_names_differ_in_case(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the database takes for equal: their rows, their jobs and their searches are apart."""
    plain, model = member(tenant=True), member(tenant=True, searchable=True)
    model.metadata.create_all(engine)
    put(byok, engine, plain, (1, 2))
    put(byok, engine, plain, (3, 4, 5), "ACME")
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 1)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", 1)
    paused = rehash(byok, engine, model, tenants=["acme"], on_progress=lambda _: pause(byok))
    assert (paused.state, total(paused)) == ("paused", 1)
    other = rehash(byok, engine, model, tenants=["ACME"])
    assert (other.state, other.counts["changed"], total(other)) == ("done", 3, 3)
    assert find(byok, engine, model, "M4", "ACME") == [4]
    with pytest.raises(NotSearchableError):
        find(byok, engine, model, "M1")
    assert total(rehash(byok, engine, model)) == 5
    assert total(verify(byok, engine, model, tenants=["acme", "acme", "ACME"])) == 5


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
def test_jobs_of_such_tenants_in_a_keystore_that_ignores_case(engine: Engine) -> None:
    byok = Byok(engine, clock=TurnableClock())
    byok.create_keystore()
    jobs = byok._jobs
    begun = jobs.start("rehash", {"tenants": ["acme"]})
    assert jobs.unfinished("rehash", {"tenants": ["ACME"]}) is None
    found = jobs.unfinished("rehash", {"tenants": ["acme"]})
    assert found is not None
    assert found.id == begun.id
    byok.close()


def test_rows_of_a_tenant_that_is_in_no_keystore(byok: Byok, engine: Engine) -> None:
    """Nobody waits for it; and a job for one that was never onboarded is refused."""
    model = member(tenant=True)
    put(byok, engine, model)
    with engine.begin() as connection:
        connection.execute(text("UPDATE dn_member SET org = 'gone' WHERE id = 1"))
    report = reencrypt(byok, engine, model)
    assert (report.state, report.counts["failed"], report.counts["already"]) == ("done", 1, 9)
    with pytest.raises(UnknownTenantError, match="gone"):
        reencrypt(byok, engine, model, tenants=["acme", "gone"])


def test_views_have_no_rows_of_their_own(byok: Byok, engine: Engine) -> None:
    model = member(searchable=True)
    put(byok, engine, model)

    class Other(DeclarativeBase):
        pass

    class View(Other):
        __tablename__ = "dn_a_view"
        id: Mapped[int] = mapped_column(primary_key=True)
        mail: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True, column_id="dn_member.mail"))

    with engine.begin() as connection:
        connection.execute(text("CREATE VIEW dn_a_view AS SELECT id, mail, mail_hash FROM dn_member"))
    try:
        rotation = rotate(byok, engine, "acme", View, model)
        assert (total(rotation.reencrypted), rotation.retired) == (10, tuple((kind, 1) for kind in KINDS))
        with pytest.raises(ConfigurationError, match="a view has no rows"):
            verify(byok, engine, View)
        with byok.session("acme", engine) as session:
            assert session.scalars(select(View.id).where(View.mail == "M3")).all() == [3]
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP VIEW dn_a_view"))


# -- several databases -------------------------------------------------------------------------------------------------


def test_a_job_stays_in_its_database(
    byok: Byok, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call over another one is another job; a search opens when all have been hashed."""
    plain, model = member(), member(searchable=True)
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    byok.attach(other)
    for each in (engine, other):
        model.metadata.create_all(each)
        put(byok, each, plain)
    byok.rotate_data_key("acme")
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 4)
    begun = reencrypt(byok, engine, model, on_progress=lambda _: pause(byok))
    assert begun.state == "paused"
    assert reencrypt(byok, other, model).counts["changed"] == 10
    with pytest.raises(ConfigurationError, match="is over the database"):
        resume(byok, other, begun.job)
    with pytest.raises(ConfigurationError, match=r"values are under it still \(6 in dn_member\.mail\)"):
        retire(byok, other, "acme", DATA_KEY, 1, model)
    assert resume(byok, engine, begun.job).counts["changed"] == 10
    retire(byok, other, "acme", DATA_KEY, 1, model)

    with pytest.raises(ConfigurationError, match="open_search=False"):
        rehash(byok, engine, model)
    rehash(byok, engine, model, open_search=False)
    for each in (engine, other):
        with pytest.raises(NotSearchableError):
            find(byok, each, model, "M3")
    rehash(byok, other, model, open_search=True)
    for each in (engine, other):
        assert find(byok, each, model, "M3") == [3]
    other.dispose()


# -- how a job begins and ends -----------------------------------------------------------------------------------------


def pause(byok: Byok) -> None:
    byok._jobs.set_state(byok._jobs.all()[0], "paused")


@pytest.mark.parametrize("job", [rehash, reencrypt])
def test_paused_before_it_has_begun(
    byok: Byok,
    engine: Engine,
    clock: TurnableClock,
    monkeypatch: pytest.MonkeyPatch,
    job: Callable[..., Report],
) -> None:
    """While it waits until changes have settled: it goes on from its beginning, by its id or called again."""
    model = member(searchable=True)
    put(byok, engine, model)
    byok.rotate_data_key("acme")
    byok.rotate_salt("acme")
    for again in (lambda report: resume(byok, engine, report.job), lambda _: job(byok, engine, model)):
        with monkeypatch.context() as patch:
            patch.setattr(clock, "sleep", lambda _: pause(byok))
            report = job(byok, engine, model)
        assert (report.state, total(report)) == ("paused", 0)
        assert total(again(report)) == 10
    assert verify(byok, engine, model).counts["already"] == 10


@pytest.mark.parametrize("state", ["paused", "cancelled"])
def test_who_pauses_a_job_that_has_just_begun(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """What he has read of it is older than what is stored by now; that stays as it is, and authenticates."""
    model = member(searchable=True)
    put(byok, engine, model)
    begin = Jobs.begin

    def late(self: Jobs, job: Any, *arguments: Any) -> Any:
        begin(self, job, *arguments)
        self.set_state(job, state)
        return self.get(job.id)

    with monkeypatch.context() as patch:
        patch.setattr(Jobs, "begin", late)
        report = reencrypt(byok, engine, model)
    assert (report.state, len(byok._jobs.all())) == (state, 1)
    assert byok._jobs.set_state(byok._jobs.all()[0], "running").state == (
        "cancelled" if state == "cancelled" else "running"
    )
    assert total(reencrypt(byok, engine, model)) == 10


def test_what_cannot_be_hashed_anew_closes_nothing(byok: Byok, engine: Engine) -> None:
    def two(**options: Any) -> Any:
        class Base(DeclarativeBase):
            pass

        class Two(Base):
            __tablename__ = "dn_two"
            id: Mapped[int] = mapped_column(primary_key=True)
            a: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True, **options))
            b: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True, **options), unique=True)

        return Two

    old, new = two(), two(normalize=casefold)
    old.metadata.create_all(engine)
    with byok.session("acme", engine) as session:
        session.add(old(id=1, a="x", b="y"))
        session.commit()
    with pytest.raises(ConfigurationError, match="it is unique"):
        rehash(byok, engine, new)
    assert byok._jobs.all() == []
    with byok.session("acme", engine) as session:
        assert session.scalars(select(old.id).where(old.a == "x")).all() == [1]


# -- rotations ---------------------------------------------------------------------------------------------------------


def test_a_rotation_that_was_interrupted_is_the_same_one(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was: it ends with the generations that it began with. The next one is another."""
    model = member(searchable=True)
    put(byok, engine, model)
    calls: list[str] = []
    for name in ("rotate_salt", "reencrypt", "rehash", "retire", "retire again"):

        def die(*arguments: Any, name: str = name, **options: Any) -> Any:
            calls.append(name)
            if name == "retire again" and calls.count(name) == 1:
                return retire(*arguments, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if name == "rotate_salt":
                patch.setattr(byok, name, die)
            else:
                patch.setattr(f"sqla_byok.jobs.rotation.{name.split()[0]}", die)
            with pytest.raises(KeyboardInterrupt):
                rotate(byok, engine, "acme", model)
    rotated = rotate(byok, engine, "acme", model)
    assert rotated.retired == ((SEARCH_SALT, 1),)
    assert byok._keystore.active_generations()["acme"] == {DATA_KEY: 2, SEARCH_SALT: 2}
    assert rotate(byok, engine, "acme", model).retired == ((DATA_KEY, 2), (SEARCH_SALT, 2))


def test_rotating_an_owner_of_columns(byok: Byok, engine: Engine) -> None:
    """Its values are in the rows of all tenants."""
    model = member(tenant=True, owner="vendor", searchable=True)
    put(byok, engine, model)
    rotation = rotate(byok, engine, "vendor", model)
    assert rotation.retired == tuple((kind, 1) for kind in KINDS)
    byok.forget_keys()
    assert find(byok, engine, model, "M3") == [3]


def test_a_table_that_is_there_no_more(byok: Byok, engine: Engine) -> None:
    """Dropped, or renamed: who says so can retire; said of one that is there it is refused."""
    old = member(searchable=True)
    put(byok, engine, old)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE dn_member RENAME TO dn_person"))

    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __tablename__ = "dn_person"
        id: Mapped[int] = mapped_column(primary_key=True)
        mail: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True, column_id="dn_member.mail"))

    with byok.session("acme", engine) as session:
        session.add(Person(id=50, mail="new"))
        session.commit()
    with pytest.raises(ConfigurationError, match="--gone dn_member"):
        rotate(byok, engine, "acme", Person)
    with pytest.raises(ConfigurationError, match="is there"):
        rotate(byok, engine, "acme", Person, gone=["dn_member", "dn_person"])
    assert len(rotate(byok, engine, "acme", Person, gone=["dn_member"]).retired) == 2
    with byok.session("acme", engine) as session:
        assert session.scalars(select(Person.id).where(Person.mail == "M3")).all() == [3]

    with engine.begin() as connection:
        connection.execute(text("DROP TABLE dn_person"))
    another = member(searchable=True, column_id="dn.other")
    put(byok, engine, another)
    with pytest.raises(ConfigurationError, match="--gone dn_person"):
        rotate(byok, engine, "acme", another)
    rotated = rotate(byok, engine, "acme", another, gone=["dn_person", "dn_member.mail"])
    assert len(rotated.retired) == 2


def test_a_date_from_an_earlier_retirement_destroys_nothing(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one counts, also where the process ended right behind it."""
    model = member()
    put(byok, engine, model)
    byok.rotate_data_key("acme")
    reencrypt(byok, engine, model)
    with monkeypatch.context() as patch:
        patch.setattr("sqla_byok.jobs.rotation.datetime", _Yesteryear)
        retire(byok, engine, "acme", DATA_KEY, 1, model)
    restore(byok, "acme", DATA_KEY, 1)
    with pytest.raises(ConfigurationError, match="readable"):
        destroy(byok, "acme", DATA_KEY, 1, backups_kept=90)
    retire(byok, engine, "acme", DATA_KEY, 1, model)
    with pytest.raises(ConfigurationError, match="destroy it then"):
        destroy(byok, "acme", DATA_KEY, 1, backups_kept=90)
    restore(byok, "acme", DATA_KEY, 1)


@pytest.mark.parametrize("days", [float("nan"), float("inf"), -1, 1e9])
def test_for_how_long_backups_are_kept(byok: Byok, engine: Engine, days: float) -> None:
    put(byok, engine, member())
    byok.rotate_data_key("acme")
    with pytest.raises(ConfigurationError, match="number of days"):
        destroy(byok, "acme", DATA_KEY, 1, backups_kept=days)
    with pytest.raises(ConfigurationError, match="active"):
        destroy(byok, "acme", DATA_KEY, 2, backups_kept=90)


class _Yesteryear:
    @staticmethod
    def now(zone: Any) -> Any:
        from datetime import datetime, timedelta

        return datetime.now(zone) - timedelta(days=200)


# -- what check tells --------------------------------------------------------------------------------------------------


def test_an_owner_is_not_told_of_the_columns_of_others(byok: Byok, engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Two(Base):
        __tablename__ = "dn_two"
        id: Mapped[int] = mapped_column(primary_key=True)
        own: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True))
        vip: Mapped[str] = mapped_column(Encrypted(String(20), owner="vendor", searchable=True))

    Base.metadata.create_all(engine)
    with byok.session("acme", engine) as session:
        session.add(Two(id=1, own="x", vip="y"))
        session.commit()
    assert byok.check(Two) == []


def test_a_column_that_gets_an_owner_is_not_searched(byok: Byok, engine: Engine) -> None:
    """Its values are not the owner's: nothing is found by them, and nothing is let in twice."""
    own = member(searchable=True, unique=True)
    put(byok, engine, own)
    owned = member(searchable=True, unique=True, owner="vendor")
    with byok.session("acme", engine) as session, pytest.raises(NotSearchableError):
        session.scalars(select(owned.id).where(owned.mail == "M3")).all()
    owned = member(searchable=True, unique=True, owner="ACME")
    with byok.session("acme", engine) as session:
        session.add(owned(id=50, mail="M3"))
        with pytest.raises(NotSearchableError, match="twice"):
            session.flush()
    assert find(byok, engine, own, "M3") == [3]
