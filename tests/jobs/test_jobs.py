"""Jobs over every kind of table, beside writers, dark tenants, damaged rows and other workers."""

from __future__ import annotations

import pickle
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from keys_tools import TurnableClock, hand_in
from sqlalchemy import (
    Date,
    Engine,
    ForeignKey,
    Integer,
    String,
    Uuid,
    column,
    create_engine,
    select,
    table,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.attributes import flag_modified

from sqla_byok import (
    Byok,
    ConfigurationError,
    Encrypted,
    HashSpecChangedError,
    KeystoreTamperedError,
    NotSearchableError,
    SettlingError,
    hash_index,
    keystore_metadata,
)
from sqla_byok.crypto.formats import DATA_KEY, SEARCH_SALT
from sqla_byok.jobs import (
    Pace,
    Progress,
    Report,
    cancel,
    destroy,
    reencrypt,
    rehash,
    restore,
    resume,
    retire,
    rotate,
    verify,
)
from sqla_byok.keys.jobs import OUTCOMES
from sqla_byok.normalize import casefold, last
from sqla_byok.orm.stored import Bytes, StoredTable
from sqla_byok.testing import FakeKms


class Base(DeclarativeBase):
    pass


class Person(Base):
    """No column says whose a row is."""

    __tablename__ = "jb_person"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(9))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))
    born: Mapped[date | None] = mapped_column(Encrypted(Date, pad_to=32))
    mrn_last2 = hash_index("mrn", transform=last(2))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


class Patient(Person):
    """Joined inheritance: its columns are in a table of their own."""

    __tablename__ = "jb_patient"
    id: Mapped[int] = mapped_column(ForeignKey("jb_person.id"), primary_key=True)
    ward: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True, hash="hmac-sha256"))
    vip: Mapped[str | None] = mapped_column(Encrypted(String(20), owner="vendor", searchable=True))
    __mapper_args__ = {"polymorphic_identity": "patient"}  # noqa: RUF012


class Visit(Base):
    """A composite key, and a tenant column."""

    __tablename__ = "jb_visit"
    __byok_tenant__ = "org"
    org: Mapped[str] = mapped_column(String(20), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    number: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
    note: Mapped[str | None] = mapped_column(Encrypted(String(90), searchable=True))
    scan: Mapped[str | None] = mapped_column(Encrypted(String(20), mode="direct"))


VISITS, PERSONS = 40, 60
ALL = ("t1", "t2", "vendor")
Jobs = Callable[..., Report]


@pytest.fixture
def clock() -> TurnableClock:
    return TurnableClock()


@pytest.fixture
def kms() -> dict[str, FakeKms]:
    return {tenant: FakeKms(f"jobs-{tenant}-{uuid.uuid4().hex[:6]}") for tenant in ALL}


@pytest.fixture
def byok(tmp_path: Path, clock: TurnableClock, kms: dict[str, FakeKms], engine: Engine) -> Iterator[Byok]:
    byok = Byok(f"sqlite:///{tmp_path / 'keystore.db'}", clock=clock)
    byok.create_keystore()
    byok.attach(engine)
    for tenant, key in kms.items():
        byok.onboard(tenant, key)
    Base.metadata.create_all(engine)
    yield byok
    byok.close()
    for key in kms.values():
        key.reset()


def fill(byok: Byok, engine: Engine) -> None:
    """Rows of both tenants, by turns, with NULLs in between."""
    for tenant in ("t1", "t2"):
        first = 1 if tenant == "t1" else 2
        with byok.session(tenant, engine) as session:
            for n in range(first, PERSONS + 1, 2):
                cls = Patient if n % 3 else Person
                row = cls(id=n, mrn=None if n % 7 == 0 else f"M-{n % 20:02}", born=date(1950 + n, 1, 1))
                if cls is Patient:
                    row.ward, row.vip = f"w{n % 4}", f"v{n}"
                session.add(row)
            for n in range(VISITS // 2):
                day, number = date(2020, 1, 1 + n % 9), uuid.UUID(int=n * 2 + first)
                session.add(Visit(org=tenant, day=day, number=number, note=f"note {n % 5}", scan=f"s{n}"))
            session.commit()


def values(byok: Byok, engine: Engine) -> dict[Any, Any]:
    """Everything, as an application reads it."""
    found: dict[Any, Any] = {}
    for tenant in ("t1", "t2"):
        with byok.session(tenant, engine) as session:
            ids = range(1 if tenant == "t1" else 2, PERSONS + 1, 2)
            for row in session.scalars(select(Person).where(Person.id.in_(list(ids)))):
                found[row.id] = (row.mrn, row.born, getattr(row, "ward", None), getattr(row, "vip", None))
            for visit in session.scalars(select(Visit).where(Visit.org == tenant)):
                found[visit.number] = (visit.note, visit.scan)
    return found


def searches(byok: Byok, engine: Engine, tenant: str) -> list[Any]:
    with byok.session(tenant, engine) as session:
        return [
            sorted(session.scalars(select(Person.id).where(Person.mrn == "M-03"))),
            sorted(session.scalars(select(Person.id).where(Person.mrn_last2 == "03"))),
            sorted(session.scalars(select(Patient.id).where(Patient.ward == "w1"))),
            sorted(session.scalars(select(Patient.id).where(Patient.vip == "v5"))),
            sorted(map(str, session.scalars(select(Visit.number).where(Visit.note == "note 3")))),
        ]


def rows_in(engine: Engine) -> int:
    with engine.connect() as connection:
        return sum(
            connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one()
            for name in ("jb_person", "jb_patient", "jb_visit")
        )


def adds_up(report: Report, engine: Engine) -> bool:
    return set(report.counts) == set(OUTCOMES) and report.rows == rows_in(engine)


# -- what they do ----------------------------------------------------------------------------------------------------


def test_a_rotation_of_the_data_key_to_its_end(byok: Byok, engine: Engine) -> None:
    """Every value of every kind of table is under the new key, and the old one can go. Plaintexts stay as they are."""
    fill(byok, engine)
    before = values(byok, engine)
    for tenant in ALL:
        byok.rotate_data_key(tenant)
    report = reencrypt(byok, engine, Base)
    assert (report.state, report.counts["changed"]) == ("done", rows_in(engine))
    assert adds_up(report, engine)
    again = reencrypt(byok, engine, Base)
    assert (again.counts["already"], again.counts["changed"]) == (rows_in(engine), 0)
    for tenant in ALL:
        retire(byok, engine, tenant, DATA_KEY, 1, Base)
        destroy(byok, tenant, DATA_KEY, 1, backups_kept=0)
    byok.forget_keys()
    assert values(byok, engine) == before
    assert verify(byok, engine, Base).counts["already"] == rows_in(engine)


def test_a_rotation_of_the_salt_to_its_end(byok: Byok, engine: Engine) -> None:
    """Every hash is by the new salt; while it is made anew the columns are searched by both, without a gap."""
    fill(byok, engine)
    before = {tenant: searches(byok, engine, tenant) for tenant in ("t1", "t2")}
    for tenant in ALL:
        byok.rotate_salt(tenant)
    seen = []
    report = rehash(
        byok,
        engine,
        Base,
        on_progress=lambda _: seen.append([searches(byok, engine, t) for t in ("t1", "t2")]),
    )
    assert all(each == [before["t1"], before["t2"]] for each in seen)
    assert seen
    assert (report.state, report.counts["failed"]) == ("done", 0)
    assert adds_up(report, engine)
    for tenant in ALL:
        retire(byok, engine, tenant, SEARCH_SALT, 1, Base)
    byok.forget_keys()
    assert {tenant: searches(byok, engine, tenant) for tenant in ("t1", "t2")} == before
    assert rehash(byok, engine, Base).counts["changed"] == 0


def test_the_whole_rotation_is_one_call(byok: Byok, engine: Engine) -> None:
    """And what it retired can be made readable again until it is destroyed, which waits for the backups."""
    fill(byok, engine)
    before, found = values(byok, engine), searches(byok, engine, "t1")
    rotation = rotate(byok, engine, "t1", Base)
    assert rotation.retired == ((DATA_KEY, 1), (SEARCH_SALT, 1))
    again = rotate(byok, engine, "t1", Base)
    assert again.retired == ((DATA_KEY, 2), (SEARCH_SALT, 2))
    byok.forget_keys()
    assert (values(byok, engine), searches(byok, engine, "t1")) == (before, found)
    restore(byok, "t1", DATA_KEY, 1)
    states = {(each.kind, each.generation): each.state for each in byok._keystore.row("t1").generations}
    assert states[DATA_KEY, 1] == "readable"
    retire(byok, engine, "t1", DATA_KEY, 1, Base)
    with pytest.raises(ConfigurationError, match="backups"):
        destroy(byok, "t1", DATA_KEY, 1, backups_kept=30)
    destroy(byok, "t1", DATA_KEY, 1, backups_kept=0)
    with pytest.raises(ConfigurationError, match="destroyed"):
        restore(byok, "t1", DATA_KEY, 1)


def test_what_rows_need_is_not_retired(byok: Byok, engine: Engine) -> None:
    """Nor what nobody can say of: a table that was written and is not given."""
    fill(byok, engine)
    byok.rotate_data_key("t1")
    byok.rotate_salt("t1")
    with pytest.raises(ConfigurationError, match=r"in jb_person\.born.*byok reencrypt"):
        retire(byok, engine, "t1", DATA_KEY, 1, Base)
    with pytest.raises(ConfigurationError, match=r"jb_person\.mrn.*byok rehash"):
        retire(byok, engine, "t1", SEARCH_SALT, 1, Base)
    reencrypt(byok, engine, Base)
    rehash(byok, engine, Person)
    with pytest.raises(ConfigurationError, match="jb_visit"):
        retire(byok, engine, "t1", DATA_KEY, 1, Person, Patient)
    with pytest.raises(ConfigurationError, match=r"jb_visit\.note"):
        retire(byok, engine, "t1", SEARCH_SALT, 1, Base)
    for kind, generation in ((DATA_KEY, 2), (DATA_KEY, 9), (SEARCH_SALT, 2)):
        with pytest.raises(ConfigurationError):
            retire(byok, engine, "t1", kind, generation, Base)
    with pytest.raises(ConfigurationError):
        retire(byok, engine, "t1", "tenant-key", 1, Base)
    byok.rotate_salt("t1")
    rehash(byok, engine, Base)
    for generation in (1, 2):
        retire(byok, engine, "t1", SEARCH_SALT, generation, Base)


def test_padding_and_mode_that_have_changed(byok: Byok, engine: Engine) -> None:
    """reencrypt brings them to what is declared; a direct value stays under the customer's own key."""

    class Later(DeclarativeBase):
        pass

    class Padded(Later):
        __tablename__ = "jb_person"
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str | None] = mapped_column(Encrypted(String(20), pad_to=64))
        born: Mapped[date | None] = mapped_column(Encrypted(Date))

    class Direct(Later):
        __tablename__ = "jb_visit"
        __byok_tenant__ = "org"
        org: Mapped[str] = mapped_column(String(20), primary_key=True)
        day: Mapped[date] = mapped_column(Date, primary_key=True)
        number: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True)
        note: Mapped[str | None] = mapped_column(Encrypted(String(90), mode="direct"))

    fill(byok, engine)
    before = values(byok, engine)
    assert reencrypt(byok, engine, Padded, Direct).counts["failed"] == 0
    with engine.connect() as connection:
        lengths = {len(row[0]) for row in connection.exec_driver_sql("SELECT mrn FROM jb_person") if row[0]}
        born = {len(row[0]) for row in connection.exec_driver_sql("SELECT born FROM jb_person") if row[0]}
        kinds = {bytes(row[0])[1] for row in connection.exec_driver_sql("SELECT note FROM jb_visit")}
    assert (lengths, born, kinds) == ({46 + 64}, {46 + 10}, {0x10})
    with byok.session("t1", engine) as session:
        assert {row.note for row in session.scalars(select(Direct).where(Direct.org == "t1"))} == {
            f"note {n}" for n in range(5)
        }
        assert all(
            row.mrn == before[row.id][0] for row in session.scalars(select(Padded).where(Padded.id % 2 == 1))
        )
    assert reencrypt(byok, engine, Padded, Direct).counts["changed"] == 0


def test_only_some_tenants_in_their_order(byok: Byok, engine: Engine) -> None:
    """The others' rows are counted and left alone."""
    fill(byok, engine)
    for tenant in ("t1", "t2"):
        byok.rotate_data_key(tenant)
    report = reencrypt(byok, engine, Visit, tenants=["t2"])
    assert (report.counts["changed"], report.rows) == (VISITS // 2, VISITS // 2)
    report = reencrypt(byok, engine, Person, tenants=["t2"])
    assert (report.counts["changed"], report.counts["others"]) == (PERSONS // 2, PERSONS // 2)


def test_a_dry_run_stores_nothing(byok: Byok, engine: Engine) -> None:
    fill(byok, engine)
    byok.rotate_data_key("t1")
    cells, plain = select(table("jb_visit", column("scan"))), create_engine(engine.url)
    with plain.connect() as connection:
        before = connection.execute(cells).all()
    report = reencrypt(byok, engine, Base, dry_run=True)
    assert report.state == "dry run"
    assert report.counts["changed"] > VISITS // 2
    assert adds_up(report, engine)
    assert byok._jobs.all() == []
    with plain.connect() as connection:
        assert connection.execute(cells).all() == before
    plain.dispose()


# -- a column that becomes searchable, or is hashed otherwise ----------------------------------------------------------


def _release(**options: Any) -> Any:
    class Release(DeclarativeBase):
        pass

    class Member(Release):
        __tablename__ = "jb_member"
        id: Mapped[int] = mapped_column(primary_key=True)
        mail: Mapped[str | None] = mapped_column(Encrypted(String(40), **options))

    return Member


def test_several_models_of_one_table(byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a report's light one beside the application's. None of its columns is left, nor one made in another way."""

    class Wide(DeclarativeBase):
        pass

    class Member(Wide):
        __tablename__ = "jb_member"
        id: Mapped[int] = mapped_column(primary_key=True)
        mail: Mapped[str | None] = mapped_column(Encrypted(String(40)))
        phone: Mapped[str | None] = mapped_column(Encrypted(String(40)))

    light, padded = _release(), _release(pad_to=64)
    Wide.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all(Member(id=n, mail=f"m{n}", phone=f"p{n}") for n in range(1, 10))
        session.commit()
    byok.rotate_data_key("t1")
    with pytest.raises(ConfigurationError, match="several models declare the table 'jb_member'"):
        reencrypt(byok, engine, padded, Wide)
    assert reencrypt(byok, engine, light).counts["changed"] == 9
    for models in ((light, Wide), (Wide, light)):
        with pytest.raises(ConfigurationError, match=r"9 in jb_member\.phone"):
            retire(byok, engine, "t1", DATA_KEY, 1, *models)
    pause = _pausing(byok, 4, monkeypatch)
    begun = reencrypt(byok, engine, light, Member, on_progress=pause)
    monkeypatch.undo()
    assert (begun.state, begun.counts["changed"]) == ("paused", 4)
    assert resume(byok, engine, begun.job).counts["changed"] == 9
    retire(byok, engine, "t1", DATA_KEY, 1, Wide, light)
    byok.rotate_data_key("t1")
    begun = reencrypt(byok, engine, padded, on_progress=_pausing(byok, 4, monkeypatch))
    monkeypatch.undo()
    assert resume(byok, engine, begun.job).counts["changed"] == 9
    with engine.connect() as connection:
        lengths = {len(bytes(row[0])) for row in connection.exec_driver_sql("SELECT mail FROM jb_member")}
    assert lengths == {46 + 64}, "the job goes on by the model that it was begun with"


def test_a_column_that_becomes_searchable(byok: Byok, engine: Engine) -> None:
    plain, searchable = _release(), _release(searchable=True)
    searchable.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([plain(id=n, mail=f"m{n % 3}") for n in range(1, 10)])
        session.commit()
    find = select(searchable.id).where(searchable.mail == "m1")
    with byok.session("t1", engine) as session, pytest.raises(NotSearchableError, match="byok rehash"):
        session.scalars(find)
    report = rehash(byok, engine, searchable.mail)
    assert (report.state, report.counts["changed"]) == ("done", 9)
    with byok.session("t1", engine) as session:
        assert sorted(session.scalars(find)) == [1, 4, 7]
    with byok.session("t1", engine) as session:
        session.add(plain(id=99, mail="m1"))
        with pytest.raises(HashSpecChangedError):
            session.flush()


def test_who_has_hashed_the_rows_by_himself(byok: Byok, engine: Engine) -> None:
    """verify opens the search; where a row is missing it does not, and tells of it."""
    plain, searchable = _release(), _release(searchable=True)
    searchable.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([plain(id=n, mail=f"m{n}") for n in range(1, 5)])
        session.add(plain(id=9, mail=None))
        session.commit()

    def write_again(*numbers: int) -> None:
        with byok.session("t1", engine) as session:
            for n in numbers:
                flag_modified(session.get_one(searchable, n), "mail")
            session.commit()

    write_again(1, 2, 3)
    report = verify(byok, engine, searchable.mail, open_search=True)
    assert [(each.key, each.reason) for each in report.failures] == [((4,), "it has no hash")]
    find = select(searchable.id).where(searchable.mail == "m4")
    with byok.session("t1", engine) as session, pytest.raises(NotSearchableError):
        session.scalars(find)
    write_again(4)
    report = verify(byok, engine, searchable.mail, open_search=True)
    assert (report.counts["already"], report.counts["failed"]) == (5, 0)
    with byok.session("t1", engine) as session:
        assert session.scalars(find).all() == [4]


def test_planted_and_stale_hashes(byok: Byok, engine: Engine) -> None:
    """verify finds a hash that is another value's, one beside NULL, and one that is gone; and mends them when told."""
    fill(byok, engine)
    visit, own = (
        table("jb_visit", column("number", Uuid), column("note_hash", Bytes())),
        create_engine(engine.url),
    )
    member = table(
        "jb_person", column("id", Integer), *(column(n, Bytes()) for n in ("mrn_hash", "mrn_last2_hash"))
    )
    with own.begin() as connection:
        connection.execute(
            update(visit).where(visit.c.number == uuid.UUID(int=1)).values(note_hash=b"x" * 32)
        )
        connection.execute(update(member).where(member.c.id == 7).values(mrn_hash=b"y" * 32))
        connection.execute(update(member).where(member.c.id == 3).values(mrn_last2_hash=None))
    own.dispose()
    report = verify(byok, engine, Base)
    found = sorted((each.table, each.column, each.reason) for each in report.failures)
    assert found == [
        ("jb_person", "jb_person.mrn", "its hash is not that of its value"),
        ("jb_person", "jb_person.mrn_last2", "it has no hash"),
        ("jb_visit", "jb_visit.note", "its hash is not that of its value"),
    ]
    assert report.counts["failed"] == 3
    generations = {name.rpartition(" ")[0] for name in report.found}
    assert "jb_visit.note under t1" in generations
    mended = verify(byok, engine, Base, repair=True)
    assert (mended.counts["changed"], mended.counts["failed"], list(mended.failures)) == (3, 0, [])
    assert verify(byok, engine, Base).counts["failed"] == 0
    assert adds_up(mended, engine)


def test_another_normalizer_with_both_releases_writing(
    byok: Byok, engine: Engine, clock: TurnableClock
) -> None:
    """INSERTs go on, but for the seconds in which the search is closed; the job makes one kind of all."""
    old, new = _release(searchable=True), _release(searchable=True, normalize=casefold)
    old.metadata.create_all(engine)

    def add(model: Any, id_: int, mail: str) -> None:
        with byok.session("t1", engine) as session:
            session.add(model(id=id_, mail=mail))
            session.commit()

    add(old, 1, "Ada")
    with pytest.raises(SettlingError):
        add(new, 2, "ADA")
    clock.turn(21)
    add(new, 2, "ADA")
    add(old, 3, "aDa")
    for model in (old, new):
        with byok.session("t1", engine) as session, pytest.raises(NotSearchableError):
            session.scalars(select(model.id).where(model.mail == "ada"))
    assert rehash(byok, engine, new.mail).counts["changed"] == 2
    with byok.session("t1", engine) as session:
        assert sorted(session.scalars(select(new.id).where(new.mail == "aDa"))) == [1, 2, 3]
    with pytest.raises(HashSpecChangedError):
        add(old, 4, "x")


def test_set_searchable_turned_off_and_on(byok: Byok, engine: Engine) -> None:
    fill(byok, engine)
    before = searches(byok, engine, "t1")
    byok.set_searchable("t1", set())
    assert rehash(byok, engine, Base).state == "done"
    with engine.connect() as connection:
        hashes = connection.exec_driver_sql("SELECT note_hash FROM jb_visit WHERE org = 't1'").all()
    assert {row[0] for row in hashes} == {None}, "what is off has no hashes left"
    byok.set_searchable("t1", None)
    with pytest.raises(NotSearchableError):
        searches(byok, engine, "t1")
    rehash(byok, engine, Base)
    assert searches(byok, engine, "t1") == before


def test_a_unique_column_is_not_hashed_otherwise_in_its_place(byok: Byok, engine: Engine) -> None:
    def release(**options: Any) -> Any:
        class Release(DeclarativeBase):
            pass

        class Account(Release):
            __tablename__ = "jb_account"
            id: Mapped[int] = mapped_column(primary_key=True)
            mail: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True, **options), unique=True)

        return Account

    old, new = release(), release(normalize=casefold)
    old.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(old(id=1, mail="Ada"))
        session.commit()
    with pytest.raises(ConfigurationError, match="unique"):
        rehash(byok, engine, new.mail)
    with byok.session("t1", engine) as session:
        assert session.scalars(select(old.id).where(old.mail == "Ada")).all() == [1]


def test_a_value_that_two_rows_got_while_salts_were_rotated(byok: Byok, engine: Engine) -> None:
    """The index could not see it; the job tells of it by row, and leaves both."""

    class Own(DeclarativeBase):
        pass

    class Badge(Own):
        __tablename__ = "jb_badge"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(Encrypted(String(9), searchable=True), unique=True)

    Own.metadata.create_all(engine)
    for n in (1, 2, 3):
        with byok.session("t1", engine) as session:
            session.add(Badge(id=n, code="A" if n < 3 else "B"))
            session.commit()
        if n == 1:
            byok.rotate_salt("t1")
    report = rehash(byok, engine, Badge)
    assert (report.counts["failed"], report.counts["already"]) == (1, 2)
    ((where, key, _, reason),) = report.failures
    assert (where, key) == ("jb_badge", (1,))
    assert "same value" in reason


# -- beside others ---------------------------------------------------------------------------------------------------


def test_a_row_that_was_changed_meanwhile_is_its_writers(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(byok, engine)
    byok.rotate_data_key("t1")
    prepared, done = StoredTable.prepared, []

    def late(self: StoredTable, dialect: Any, changes: Any) -> Any:
        if not done:
            done.append(True)
            with byok.session("t1", engine) as session:
                session.execute(update(Person).where(Person.id == 3).values(mrn="new"))
                session.execute(text("DELETE FROM jb_person WHERE id = 21"))  # no Patient: 21 % 3 == 0
                session.commit()
        return prepared(self, dialect, changes)

    monkeypatch.setattr(StoredTable, "prepared", late)
    report = reencrypt(byok, engine, Person.__table__)
    assert done
    assert report.counts["overtaken"] == 1, (
        "the one that was deleted; of the other a value was under the old key still"
    )
    with byok.session("t1", engine) as session:
        assert session.get_one(Person, 3).mrn == "new"


def test_several_workers_share_the_shards(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is changed by one of them, also where two runners were started by mistake."""
    monkeypatch.setattr("sqla_byok.jobs.kinds.SHARD_ROWS", 7)
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 3)
    fill(byok, engine)
    byok.rotate_data_key("t1")
    byok.rotate_data_key("t2")
    reports: list[Report] = []
    first = byok._jobs
    runners = [
        threading.Thread(target=lambda: reports.append(reencrypt(byok, engine, Visit, Patient, workers=2)))
        for _ in range(2)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert len(reports) == 2
    rows = VISITS + sum(1 for n in range(1, PERSONS + 1) if n % 3) + PERSONS
    # A runner that comes when the other is done has a job of its own, with nothing to do.
    assert sum(report.counts["changed"] for report in {r.job: r for r in reports}.values()) == rows
    assert all(report.counts["failed"] == 0 for report in reports)
    assert first.all()[0].state == "done"


class _Elsewhere(Executor):
    """Runs a task as another process would, and shows what it was given, as a scheduler's page does."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given += [*args, kwargs]
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except ConfigurationError as error:
            done.set_exception(error)
        return done


def test_workers_elsewhere_are_given_no_password(
    byok: Byok, engine: Engine, tmp_path: Path, clock: TurnableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing the application attaches the engine, or their environment says where the rows are."""
    fill(byok, engine)
    byok.rotate_data_key("t1")
    theirs, elsewhere = Byok(f"sqlite:///{tmp_path / 'keystore.db'}", clock=clock), _Elsewhere()
    monkeypatch.setitem(sys.modules, "jb_app", cast("ModuleType", SimpleNamespace(byok=theirs)))
    monkeypatch.delenv("BYOK_DATABASE", raising=False)
    with pytest.raises(ConfigurationError, match="BYOK_DATABASE"):
        reencrypt(byok, engine, Visit, executor=elsewhere, app="jb_app:byok")
    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("BYOK_DATABASE", url)
    seen: list[Progress] = []
    report = reencrypt(
        byok, engine, Visit, executor=elsewhere, app="jb_app:byok", workers=2, on_progress=seen.append
    )
    assert (report.state, report.counts["changed"]) == ("done", VISITS // 2)
    assert (seen[-1].rows, seen[-1].of) == (VISITS, VISITS)
    assert url not in repr(elsewhere.given)
    (attached,) = theirs.engines
    attached.dispose()
    theirs.close()


def test_how_far_a_job_is_that_goes_on(byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did before it was paused counts."""
    pause = _pausing(byok, 15, monkeypatch)
    fill(byok, engine)
    begun = reencrypt(byok, engine, Visit, on_progress=pause)
    seen: list[Progress] = []
    resume(byok, engine, begun.job, on_progress=seen.append)
    rows = [each.rows for each in seen]
    assert (rows, {each.of for each in seen}) == (sorted(rows), {VISITS})
    assert rows[0] > begun.rows > 0
    assert rows[-1] == VISITS


def test_a_search_that_waits_says_how_far_the_job_is(
    byok: Byok, engine: Engine, clock: TurnableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For people and for programs; the keystore is asked once in three seconds, however many searches there are."""
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 10)
    fill(byok, engine)
    byok.set_searchable("t1", set())
    byok.set_searchable("t1", None)

    def refused() -> NotSearchableError:
        with byok.session("t1", engine) as session, pytest.raises(NotSearchableError) as caught:
            session.scalars(select(Visit.number).where(Visit.note == "note 3")).all()
        return caught.value

    assert (refused().progress, "Job" in str(refused())) == (None, False), "no job hashes them yet"
    told: list[tuple[Progress, NotSearchableError, NotSearchableError]] = []

    def tell(progress: Progress) -> None:
        told.append((progress, refused(), refused()))
        clock.turn(3.5)

    report = rehash(byok, engine, Visit, on_progress=tell)
    assert len(told) > 1
    for progress, error, again in told:
        assert error.progress == again.progress == (progress.rows, progress.of)
        assert f"Job {report.job} is at {progress.rows} of {VISITS} rows" in str(error)
        assert pickle.loads(pickle.dumps(error)).progress == error.progress  # noqa: S301 - our own


def test_searches_that_wait_do_not_crowd_the_keystore(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(byok, engine)
    byok.set_searchable("t1", set())
    byok.set_searchable("t1", None)
    asked, reading = list[int](), byok._jobs.progress

    def progress(job: str) -> Progress:
        asked.append(1)
        return reading(job)

    def tell(_: Progress) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(byok._jobs, "progress", progress)
            for _ in range(5):
                with byok.session("t1", engine) as session, pytest.raises(NotSearchableError):
                    session.scalars(select(Visit.number).where(Visit.note == "note 3")).all()

    rehash(byok, engine, Visit, on_progress=tell)
    assert sum(asked) == 1


def test_a_dark_tenant_is_left_and_come_back_to(
    byok: Byok, engine: Engine, kms: dict[str, FakeKms], clock: TurnableClock
) -> None:
    fill(byok, engine)
    for tenant in ("t1", "t2"):
        byok.rotate_salt(tenant)
    before = {tenant: searches(byok, engine, tenant) for tenant in ("t1", "t2")}
    byok.forget_keys()
    kms["t2"].deny()
    report = rehash(byok, engine, Base)
    assert (report.state, list(report.dark)) == ("running", ["t2"])
    assert adds_up(report, engine)
    assert report.counts["dark"] > 0
    assert byok._jobs.noted("t1", "hashed jb_visit.note") is not None
    assert byok._jobs.noted("t2", "hashed jb_visit.note") is None
    kms["t2"].allow()
    byok.forget_keys()
    clock.turn(60)
    again = rehash(byok, engine, Base)
    assert (again.job, again.state, list(again.dark), again.counts["dark"]) == (report.job, "done", [], 0)
    assert adds_up(again, engine)
    for tenant in ("t1", "t2"):
        byok._generations.retire(tenant, SEARCH_SALT, 1)
        byok.forget_keys()
        assert searches(byok, engine, tenant) == before[tenant]


def test_rows_that_cannot_be_opened_are_told_and_left(byok: Byok, engine: Engine) -> None:
    """Altered values, of no key, plaintext: by primary key and reason, never rewritten; the search stays shut."""
    plain, searchable = _release(), _release(searchable=True)
    searchable.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([plain(id=n, mail=f"m{n}") for n in range(1, 6)])
        session.commit()
    member = table("jb_member", column("id", Integer), column("mail", Bytes()))
    own = create_engine(engine.url)
    with own.begin() as connection:
        first = connection.scalars(select(member.c.mail).where(member.c.id == 1)).one()
        damaged = {1: first[:-1] + bytes([first[-1] ^ 1]), 2: b"plain", 3: b"\xb1\x01" + bytes(60)}
        for id_, blob in damaged.items():
            connection.execute(update(member).where(member.c.id == id_).values(mail=blob))
    report = rehash(byok, engine, searchable.mail)
    assert (report.counts["failed"], report.counts["changed"], report.rows) == (3, 2, 5)
    assert [(failure.table, failure.key) for failure in report.failures] == [
        ("jb_member", (n,)) for n in (1, 2, 3)
    ]
    reasons = [failure.reason.partition(":")[0] for failure in report.failures]
    assert reasons == ["TamperedError", "NotEncryptedError", "UnknownDataKeyError"]
    with own.connect() as connection:
        for id_, blob in damaged.items():
            assert connection.scalars(select(member.c.mail).where(member.c.id == id_)).one() == blob
    with byok.session("t1", engine) as session, pytest.raises(NotSearchableError):
        session.scalars(select(searchable.id).where(searchable.mail == "m4"))
    own.dispose()


def test_paused_and_gone_on_with(byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 5)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", 5)
    fill(byok, engine)
    byok.rotate_data_key("t1")

    def pause(_: Any) -> None:
        byok._jobs.set_state(byok._jobs.all()[0], "paused")

    report = reencrypt(byok, engine, Person.__table__, on_progress=pause)
    assert (report.state, report.rows) == ("paused", 5)
    report = resume(byok, engine, report.job)
    assert (report.state, report.rows) == ("done", PERSONS)


def test_cancelled_the_columns_stay_closed(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun can be begun again; and the release before comes back by its own check --prepare."""
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 2)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", 2)
    old, new = _release(searchable=True), _release(searchable=True, normalize=casefold)
    old.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([old(id=n, mail=f"M{n}") for n in range(1, 8)])
        session.commit()

    def stop(_: Any) -> None:
        cancel(byok, byok._jobs.all()[0].id)

    monkeypatch.setattr("sqla_byok.jobs.kinds.declared_tables", lambda: [new.__table__])
    report = rehash(byok, engine, new.mail, on_progress=stop)
    assert (report.state, report.rows) == ("cancelled", 2)
    with pytest.raises(ConfigurationError, match="cancelled"):
        cancel(byok, report.job)
    for model in (old, new):
        with byok.session("t1", engine) as session, pytest.raises(NotSearchableError):
            session.scalars(select(model.id).where(model.mail == "M1"))
    byok.check(old, prepare=True)
    with byok.session("t1", engine) as session:
        session.add(old(id=9, mail="M9"))
        session.commit()
    assert rehash(byok, engine, old.mail).state == "done"
    with byok.session("t1", engine) as session:
        assert session.scalars(select(old.id).where(old.mail == "M9")).all() == [9]
        assert session.scalars(select(old.id).where(old.mail == "M1")).all() == [1]


def test_a_release_that_was_withdrawn_before_a_job_of_its_own(byok: Byok, engine: Engine) -> None:
    """Its way back was a re-hash by the one before; a process of it that was forgotten is refused."""
    old, new = _release(searchable=True), _release(searchable=True, normalize=casefold)
    old.metadata.create_all(engine)

    def write(model: Any, id_: int) -> None:
        with byok.session("t1", engine) as session:
            session.add(model(id=id_, mail="Ada"))
            session.commit()

    write(old, 1)
    byok.check(new, prepare=True)
    write(new, 2)
    byok.check(old, prepare=True)
    rehash(byok, engine, old)
    for _ in range(2):
        with pytest.raises(HashSpecChangedError):
            write(new, 3)
    assert byok.check(old) == []
    with byok.session("t1", engine) as session:
        assert sorted(session.scalars(select(old.id).where(old.mail == "Ada"))) == [1, 2]
    byok.check(new, prepare=True)
    write(new, 3)
    rehash(byok, engine, new)
    with pytest.raises(HashSpecChangedError):
        write(old, 4)


def test_a_release_that_comes_back_during_the_job_keeps_it_closed(byok: Byok, engine: Engine) -> None:
    """The job ends, and does not open what has been closed anew meanwhile."""
    old, new = _release(searchable=True), _release(searchable=True, normalize=casefold)
    old.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([old(id=n, mail=f"M{n}") for n in range(1, 8)])
        session.commit()
    report = rehash(byok, engine, new.mail, on_progress=lambda _: byok.check(old, prepare=True))
    assert report.counts["changed"] == 7
    with byok.session("t1", engine) as session, pytest.raises(NotSearchableError):
        session.scalars(select(new.id).where(new.mail == "m1"))
    assert byok._jobs.noted("t1", "hashed jb_member.mail") is None


def _pausing(byok: Byok, rows: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Pauses a job after its first batch, of so many rows."""
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", rows)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", rows)
    return lambda _: byok._jobs.set_state(byok._jobs.all()[0], "paused")


def test_what_was_rotated_while_a_job_was_paused(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew, or the rows that it has done would be under keys that are old by now, and nobody would know."""
    fill(byok, engine)
    byok.rotate_salt("t1")
    byok.rotate_data_key("t1")
    pause = _pausing(byok, 4, monkeypatch)
    for job in (rehash, reencrypt):
        assert job(byok, engine, Visit, on_progress=pause).state == "paused"
    byok.rotate_salt("t1")
    byok.rotate_data_key("t1")
    for job in (rehash, reencrypt):
        report = job(byok, engine, Visit)
        assert (report.state, report.rows, report.counts["changed"]) == ("done", VISITS, VISITS // 2)
    noted = byok._jobs.noted("t1", "hashed jb_visit.note")
    assert noted is not None
    assert noted["salt"] == 3
    assert reencrypt(byok, engine, Visit).counts["changed"] == 0


def test_a_release_that_wrote_while_a_job_was_paused(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the job's back there are rows of another specification: it begins anew."""
    old, new = _release(searchable=True), _release(searchable=True, normalize=casefold)
    old.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([old(id=n, mail=f"M{n}") for n in range(10, 20)])
        session.commit()
    pause = _pausing(byok, 4, monkeypatch)
    assert rehash(byok, engine, new.mail, on_progress=pause).state == "paused"
    byok.check(old, prepare=True)
    with byok.session("t1", engine) as session:
        session.add(old(id=1, mail="M1"))
        session.commit()
    assert rehash(byok, engine, new.mail).state == "done"
    with byok.session("t1", engine) as session:
        for n in (1, 10, 19):
            assert session.scalars(select(new.id).where(new.mail == f"m{n}")).all() == [n]


def test_another_release_does_not_go_on_with_a_job(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hashes otherwise begins one of its own."""
    releases = [_release(searchable=True, normalize=casefold), _release(searchable=True, hash="hmac-sha256")]
    first = _release(searchable=True)
    first.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([first(id=n, mail=f"M{n}") for n in range(10, 20)])
        session.commit()
    pause = _pausing(byok, 4, monkeypatch)
    begun = rehash(byok, engine, releases[0].mail, on_progress=pause)
    monkeypatch.setattr("sqla_byok.jobs.kinds.declared_tables", lambda: [releases[1].__table__])
    with pytest.raises(ConfigurationError, match="another way"):
        resume(byok, engine, begun.job)
    report = rehash(byok, engine, releases[1].mail)
    assert (report.job != begun.job, report.state, report.rows) == (True, "done", 10)
    with byok.session("t1", engine) as session:
        assert session.scalars(select(releases[1].id).where(releases[1].mail == "M12")).all() == [12]


def test_what_holds_a_job_back(
    byok: Byok, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is there, and a number that is too high: it waits, and goes on."""
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 20)
    fill(byok, engine)
    file, waits = tmp_path / "pause", []
    file.touch()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            file.unlink()

    monkeypatch.setattr("sqla_byok.jobs.runner.time.sleep", sleep)
    pace = Pace(pause_file=file, below=("SELECT 0", 1))
    assert reencrypt(byok, engine, Person.__table__, pace=pace).state == "done"
    assert len(waits) >= 3


def test_a_page_that_was_held_back_is_not_stored_over_another_release(
    byok: Byok, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker had made ready before it waited is of no use afterwards: others have hashed the rows."""
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 10)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", 10)
    old, new = _release(searchable=True), _release(searchable=True, normalize=casefold)
    old.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([old(id=n, mail=f"M{n}") for n in range(1, 31)])
        session.commit()
    held: list[str] = []

    class Held(Pace):
        def wait(self, engine: Engine, rows: int, took: float) -> None:
            if held:
                return
            time.sleep(0.3)  # the next page is made ready meanwhile, but on SQLite
            held.append(byok._jobs.all()[0].id)
            cancel(byok, held[0])
            byok.check(old, prepare=True)
            assert rehash(byok, engine, old.mail).state == "done"

    monkeypatch.setattr("sqla_byok.jobs.runner._OUT_OF_DATE", 0.0)
    monkeypatch.setattr("sqla_byok.jobs.kinds.declared_tables", lambda: [new.__table__])
    assert rehash(byok, engine, new.mail, pace=Held()).state == "cancelled"
    with byok.session("t1", engine) as session:
        for n in range(1, 31):
            assert session.scalars(select(old.id).where(old.mail == f"M{n}")).all() == [n]


# -- a hostile keystore ----------------------------------------------------------------------------------------------


# Each column that somebody who can write to the keystore may change: whether it is noticed. Where it is not, it says
# who works on a shard and when, no more.
JOB_COLUMNS = {
    "byok_job.job": True,
    "byok_job.kind": True,
    "byok_job.plan": True,
    "byok_job.began": True,
    "byok_job.shards": True,
    "byok_job.state": True,
    "byok_job.begun_at": False,
    "byok_job.ended_at": True,
    "byok_job.tag": True,
    "byok_job_shard.job": True,
    "byok_job_shard.number": True,
    "byok_job_shard.content": True,
    "byok_job_shard.progress": True,
    "byok_job_shard.state": True,
    "byok_job_shard.version": False,
    "byok_job_shard.holder": False,
    "byok_job_shard.held_until": False,
    "byok_job_shard.tag": True,
    "byok_note.tenant": True,
    "byok_note.name": True,
    "byok_note.content": True,
    "byok_note.tag": True,
}
FORGED = {
    "job": "'00000000000000000000000000000000'",
    "number": "number + 7",
    "version": "version + 1",
    "content": "replace(content, '0', '1')",
    "plan": "replace(plan, 'null', '[\"t1\"]')",
    "began": "'{}'",
    "shards": "shards - 1",
    "progress": "replace(progress, '5', '6')",
    "state": "'done'",
    "ended_at": "'2026-01-01 00:00:00.000000'",
    "begun_at": "'2026-01-01 00:00:00.000000'",
    "holder": "'nobody'",
    "held_until": "1.0",
    "kind": "'rehash'",
    "tag": "NULL",
    "tenant": "'t2'",
    "name": "replace(name, '1', '2')",
}


def test_no_column_of_jobs_is_left_out() -> None:
    told = {"byok_job", "byok_job_shard", "byok_note"}
    there = {f"{t.name}.{c.name}" for t in keystore_metadata.tables.values() for c in t.c if t.name in told}
    assert set(JOB_COLUMNS) == there


def _forgery(column: str) -> str:
    name, _, column = column.partition(".")
    return f"UPDATE {name} SET {column} = {FORGED[column]}"


BY_HAND = {column: [_forgery(column)] for column in JOB_COLUMNS if not column.startswith("byok_note")} | {
    "a shard is taken away": ["DELETE FROM byok_job_shard"],
    "and no longer counted": ["DELETE FROM byok_job_shard", _forgery("byok_job.shards")],
}


Forge = Callable[..., None]


@pytest.fixture
def authenticated(tmp_path: Path, keystore_key: str) -> Iterator[tuple[Byok, Engine, Forge]]:
    """With a keystore key and rows, and what changes the keystore by hand."""
    engine, keystore = (
        create_engine(f"sqlite:///{tmp_path / 'data.db'}"),
        f"sqlite:///{tmp_path / 'keystore.db'}",
    )
    byok = Byok(keystore, keystore_key=keystore_key, clock=TurnableClock())
    byok.create_keystore()
    byok.attach(engine)
    for tenant in ALL:
        byok.onboard(tenant, FakeKms(f"forged-{tenant}-{uuid.uuid4().hex[:6]}"))
    Base.metadata.create_all(engine)
    fill(byok, engine)

    def forge(*statements: str) -> None:
        hand = hand_in(keystore)
        with hand.begin() as connection:
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            changed = [connection.exec_driver_sql(statement).rowcount for statement in statements]
        hand.dispose()
        assert all(changed)

    yield byok, engine, forge
    byok.close()
    engine.dispose()


@pytest.mark.parametrize("forged", BY_HAND)
def test_nobody_ends_a_job_by_hand(
    authenticated: tuple[Byok, Engine, Forge], forged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    byok, engine, forge = authenticated
    monkeypatch.setattr("sqla_byok.jobs.runner._FIRST_ROWS", 5)
    monkeypatch.setattr("sqla_byok.jobs.runner._MOST_ROWS", 5)
    byok.rotate_data_key("t1")
    report = reencrypt(
        byok,
        engine,
        Person.__table__,
        on_progress=lambda _: byok._jobs.set_state(byok._jobs.all()[0], "paused"),
    )
    forge(*BY_HAND[forged])
    if not JOB_COLUMNS.get(forged, True):
        done = resume(byok, engine, report.job)
        assert (done.state, done.rows) == ("done", PERSONS)
    elif forged == "byok_job.job":
        with pytest.raises(KeystoreTamperedError):
            byok._jobs.all()
    else:
        with pytest.raises(KeystoreTamperedError):
            resume(byok, engine, report.job)


@pytest.mark.parametrize(
    ("forged", "tenant", "generation"),
    [("tenant", "t2", 1), ("name", "t1", 2), ("content", "t1", 1), ("tag", "t1", 1)],
)
def test_nobody_forges_what_was_noted_of_a_tenant(
    authenticated: tuple[Byok, Engine, Forge], forged: str, tenant: str, generation: int
) -> None:
    """When a generation was retired decides when it may be destroyed."""
    byok, engine, forge = authenticated
    for each in ("t1", "t1", "t2"):
        rotate(byok, engine, each, Base)
    others = "DELETE FROM byok_note WHERE tenant <> 't1' OR name NOT LIKE '% 1'"
    forge(others, _forgery(f"byok_note.{forged}"))
    with pytest.raises(KeystoreTamperedError):
        destroy(byok, tenant, DATA_KEY, generation, backups_kept=30)


def test_tables_without_a_primary_key_are_refused(byok: Byok, engine: Engine) -> None:
    from sqlalchemy import Column, MetaData, Table

    bare = Table("jb_bare", MetaData(), Column("mail", Encrypted(String(9))))
    with pytest.raises(ConfigurationError, match="primary key"):
        reencrypt(byok, engine, bare)
