"""A model that hashes in another way than the stored hashes, and tenants that say what can be searched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, StagedClock, hand_in, table
from sqlalchemy import (
    Engine,
    Integer,
    String,
    TypeDecorator,
    create_engine,
    event,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Session, aliased, mapped_column

from sqla_byok import (
    Byok,
    ConfigurationError,
    Encrypted,
    HashSpecChangedError,
    KeystoreTamperedError,
    KeystoreUnavailableError,
    NotSearchableError,
    SettlingError,
    hash_index,
    search_hash,
)
from sqla_byok.keys.generations import SETTLE
from sqla_byok.keys.keyrings import POLL_EVERY, Keyrings
from sqla_byok.normalize import casefold, compose, last, named, trim

TAIL = named("tail")(lambda value: value[-2:])


def model(
    mrn: dict[str, Any] | None = None,
    phone: dict[str, Any] | None = None,
    tail: Callable[..., Any] = TAIL,
    sources: tuple[str, ...] = ("phone",),
) -> Any:
    """One release's model of the same table."""

    given = {"type_": String(20), "searchable": True}
    of_mrn, of_phone = Encrypted(**{**given, **(mrn or {})}), Encrypted(**{**given, **(phone or {})})

    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "hs_patient"
        id = mapped_column(Integer, primary_key=True)
        note = mapped_column(String(20))
        mrn = mapped_column(of_mrn, unique=True)
        phone = mapped_column(of_phone)
        tail_of = hash_index(*sources, transform=tail)

    return Patient


class Process:
    """One process of an application: a model, a Byok and an engine of its own, over the same databases."""

    def __init__(self, fleet: Fleet, patient: Any) -> None:
        self.patient, folder, kms = patient, fleet.folder, fleet.kms
        self.byok = Byok(
            keystore=f"sqlite:///{folder / 'keystore.db'}", keystore_key=fleet.keystore_key, clock=fleet.clock
        )
        self.byok.create_keystore()
        self.engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        patient.metadata.create_all(self.engine)
        self.byok.attach(self.engine)
        self.byok.onboard("t1", kms)
        self.byok.onboard("t2", kms)

    def write(self, id_: int, tenant: str = "t1", **values: Any) -> None:
        with self.byok.session(tenant, self.engine) as session:
            session.merge(self.patient(id=id_, **values))
            session.commit()

    def rewrite(self, *ids: int, **values: Any) -> None:
        """What the job does: set rows anew, changed or not."""
        with self.byok.session("t1", self.engine) as session:
            session.execute(update(self.patient).where(self.patient.id.in_(ids)).values(values))
            session.commit()

    def find(self, criterion: Any, tenant: str = "t1") -> list[int]:
        with self.byok.session(tenant, self.engine) as session:
            return sorted(session.scalars(select(self.patient.id).where(criterion)))

    def hashes(self, name: str) -> list[bytes | None]:
        with self.engine.connect() as connection:
            return [
                row[0]
                for row in connection.exec_driver_sql(f"SELECT {name}_hash FROM hs_patient ORDER BY id")
            ]

    def close(self) -> None:
        self.byok.close()
        self.engine.dispose()


class Fleet:
    """Processes that come and go, under one clock."""

    def __init__(self, folder: Path, kms: CountingKms, keystore_key: str) -> None:
        self.folder, self.kms, self.keystore_key, self.clock = folder, kms, keystore_key, StagedClock()
        self.processes: list[Process] = []
        # As somebody has them who may write there.
        self.keystore = hand_in(f"sqlite:///{folder / 'keystore.db'}")
        self.data = create_engine(f"sqlite:///{folder / 'data.db'}")

    def start(self, patient: Any = None) -> Process:
        process = Process(self, model() if patient is None else patient)
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.close()
        self.keystore.dispose()
        self.data.dispose()


@pytest.fixture
def fleet(tmp_path: Path, counting_kms: CountingKms, keystore_key: str) -> Iterator[Fleet]:
    """Nobody runs yet."""
    fleet = Fleet(tmp_path, counting_kms, keystore_key)
    yield fleet
    fleet.close()


# -- specifications --------------------------------------------------------------------------------------------------


class Upper(TypeDecorator[str]):
    """A type that makes another text of a value, and so another hash."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.upper()


class Shouting(TypeDecorator[str]):
    """One whose values are read in another way than they are stored."""

    impl = String(20)
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else f"{value}!"


class Named(TypeDecorator[str]):
    """A type that changes nothing."""

    impl = String(20)
    cache_ok = True


CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "a normalizer more": (lambda: model(mrn={"normalize": casefold}), "mrn"),
    "another algorithm": (lambda: model(mrn={"hash": "hmac-sha256"}), "mrn"),
    "a decorator around it": (lambda: model(mrn={"type_": Upper()}), "mrn"),
    "a decorator around its source": (lambda: model(phone={"type_": Shouting()}), "tail_of"),
    "another scope": (lambda: model(mrn={"salt_scope": "one"}), "mrn"),
    "another type": (lambda: model(mrn={"type_": Integer()}), "mrn"),
    "another version of a transform": (
        lambda: model(tail=named("tail", 2)(lambda value: value[-3:])),
        "tail_of",
    ),
    "another transform": (lambda: model(tail=last(3)), "tail_of"),
    "another result": (lambda: model(tail=named("tail", returns=int)(lambda value: 1)), "tail_of"),
    "another source": (lambda: model(sources=("mrn",)), "tail_of"),
}
SAME: dict[str, Callable[[], Any]] = {
    "the same": model,
    "another length": lambda: model(mrn={"type_": String(30)}),
    "a decorator that changes nothing": lambda: model(mrn={"type_": Named()}),
    "padded": lambda: model(mrn={"pad_to": 64}),
    "the transform moved": lambda: model(tail=named("tail")(lambda value: value[-2:])),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_model_is_refused(fleet: Fleet, change: str) -> None:
    """No search of the column runs, and the message says to re-hash; other columns go on.

    A unique column is not written either. Another one is, once every process knows that nobody searches it any more.
    """
    old = fleet.start()
    old.write(1, mrn="1", phone="12345")
    changed, name = CHANGED[change]
    new = fleet.start(changed())
    value: Any = 1 if "type" in change or "result" in change else "45"
    column = f"hs_patient.{name}"
    written = {"mrn": value} if name == "mrn" else {"phone": "67", "mrn": "9"}
    for criterion in (getattr(new.patient, name) == value, getattr(new.patient, name).in_([value])):
        with pytest.raises(HashSpecChangedError):
            new.find(criterion)
    other = aliased(new.patient)
    with pytest.raises(HashSpecChangedError):
        new.find(new.patient.id.in_(select(other.id).where(getattr(other, name) != value)))
    if "source" not in change:
        assert new.find(new.patient.phone == "12345") == [1]
        with new.byok.session("t1", new.engine) as session:
            session.execute(update(new.patient).values(note="x"))
    new.write(3, tenant="t2", **written)  # which has no hashes of the old model
    assert old.find(old.patient.mrn == "1") == [1]
    error = HashSpecChangedError if name == "mrn" else SettlingError
    for turn in (0.0, SETTLE - 0.1):
        fleet.clock.turn(turn)
        with pytest.raises(error) as caught:
            new.write(2, **written)
        assert (caught.value.tenant, caught.value.column) == ("t1", column)
    fleet.clock.turn(0.1)
    if name == "mrn":
        return
    new.write(2, **written)
    old.write(4, mrn="4", phone="12")
    for process in (old, new):
        with pytest.raises(NotSearchableError, match="re-hash"):
            process.find(getattr(process.patient, name) == value)


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_change_hashes_is_no_change(fleet: Fleet, change: str) -> None:
    """A release that hashes alike finds what the one before wrote."""
    fleet.start().write(1, mrn="A-1", phone="12345")
    new = fleet.start(SAME[change]())
    new.write(2, mrn="A-2", phone="12399")
    assert new.find(new.patient.mrn == "A-1") == [1]
    assert new.find(new.patient.tail_of == "99") == [2]


def test_null_tests_of_an_index_are_searches_too(fleet: Fleet) -> None:
    """IS NULL of an index asks its hashes; of the column itself it does not."""
    fleet.start().write(1, mrn="A-1")
    new = fleet.start(model(mrn={"normalize": casefold}, tail=last(3)))
    with pytest.raises(HashSpecChangedError):
        new.find(new.patient.tail_of.is_(None))
    assert new.find(new.patient.mrn.is_(None)) == []


def test_two_releases_at_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both write a tenant's first row, one wins and the other gets the error: no column of two kinds."""
    one, two = fleet.start(), fleet.start(model(mrn={"normalize": casefold}))
    for process in (one, two):
        with process.byok.tenant("t1"):
            pass
    replace, raced = one.byok._keystore.replace, []

    def late(*args: Any) -> None:
        if not raced:
            raced.append(True)
            two.write(2, mrn="B")
        replace(*args)

    monkeypatch.setattr(one.byok._keystore, "replace", late)
    with pytest.raises(HashSpecChangedError):
        one.write(1, mrn="A")
    assert raced
    assert two.find(two.patient.mrn == "b") == [2]
    assert one.find(one.patient.phone == "x") == []


def tables(*names: str) -> list[Any]:
    """Classes of further tables of an application."""

    class Base(DeclarativeBase):
        pass

    return [
        type(
            f"Of{name}",
            (Base,),
            {
                "__tablename__": name,
                "id": mapped_column(Integer, primary_key=True),
                "text": mapped_column(Encrypted(String(20), searchable=True)),
            },
        )
        for name in names
    ]


def test_first_writes_to_many_tables_at_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import into all tables of a new tenant: whoever is last to note its own is not refused."""
    one, two = fleet.start(), fleet.start()
    others = tables(*(f"hs_{number}" for number in range(12)))
    others[0].metadata.create_all(two.engine)
    left, replace = list(others), one.byok._keystore.replace

    def late(*args: Any) -> None:
        if left:
            with two.byok.session("t1", two.engine) as session:
                session.add(left.pop()(id=1, text="A"))
                session.commit()
        replace(*args)

    monkeypatch.setattr(one.byok._keystore, "replace", late)
    one.write(1, mrn="A-1")
    assert left == []
    assert one.find(one.patient.mrn == "A-1") == [1]
    assert len(one.byok._keyrings.get("t1").searchable.tables) == 13


def test_a_look_that_takes_too_long(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that first looks for a column never hashed is not sent by salts that are outdated by then."""
    one, two = fleet.start(), fleet.start()
    one.write(1, mrn="A-1")
    (other,) = tables("hs_other")
    other.metadata.create_all(one.engine)
    row, looks = two.byok._keystore.row, list[str]()

    def late(tenant: str) -> Any:
        looks.append(tenant)
        if len(looks) > 1:
            return row(tenant)
        one.byok.rotate_salt("t1")
        one.write(2, phone="12")
        return row(tenant)

    criterion = or_(two.patient.phone == "12", exists().where(other.text == "x"))
    assert two.find(criterion) == []
    monkeypatch.setattr(two.byok._keystore, "row", late)
    with pytest.raises(KeystoreUnavailableError, match="nor searched"):
        two.find(criterion)
    assert two.find(criterion) == [2]


def test_a_specification_is_noted_once(fleet: Fleet) -> None:
    """One keystore write at a tenant's first row of a table, none for later rows, other processes and no KMS call."""
    one = fleet.start()
    statements: list[str] = []
    event.listen(
        one.byok._database._engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    with one.byok.tenant("t1"):
        fleet.kms.unwraps.clear()
        statements.clear()
        one.write(1, mrn="A-1", phone="12")
        noted = [each for each in statements if each.startswith("INSERT INTO byok_searchable")]
        assert len(noted) == 1
        statements.clear()
        one.write(2, mrn="A-2", phone="34")
        assert one.find(one.patient.mrn == "A-2") == [2]
        assert statements == []
        assert fleet.kms.unwraps == []
    two = fleet.start()
    epoch = two.byok._keyrings.get("t1").epoch
    two.write(3, mrn="A-3")
    assert two.byok._keyrings.get("t1").epoch == epoch
    assert two.find(two.patient.mrn == "A-1") == [1]


def test_it_stays_through_every_change_of_keys(fleet: Fleet) -> None:
    """Rotations, rekeying and rewrapping authenticate it anew."""
    one = fleet.start()
    one.write(1, mrn="A-1", phone="12")
    one.byok.rotate_data_key("t1")
    one.byok.rotate_salt("t1")
    one.byok.rekey("t1")
    one.byok.rewrap("t1")
    one.byok.forget_keys()
    assert set(one.byok._keyrings.get("t1").searchable.specs) == {
        "hs_patient.mrn",
        "hs_patient.phone",
        "hs_patient.tail_of",
    }
    one.write(2, mrn="A-2", phone="34")
    assert one.find(one.patient.mrn.in_(["A-1", "A-2"])) == [1, 2]
    assert one.find(one.patient.tail_of.in_(["12", "34"])) == [1, 2]
    with pytest.raises(SettlingError):
        fleet.start(model(tail=last(3))).write(3, mrn="x", phone="x")


TAMPERED = {
    "removed": "DELETE FROM byok_searchable WHERE tenant = 't1'",
    "altered": "UPDATE byok_searchable SET content = replace(content, 'on', 'off') WHERE tenant = 't1'",
    "another tenant's": (
        "UPDATE byok_searchable SET content = (SELECT content FROM byok_searchable WHERE tenant = 't2') "
        "WHERE tenant = 't1'"
    ),
    "no text": "UPDATE byok_searchable SET content = x'00' WHERE tenant = 't1'",
    "added": "INSERT INTO byok_searchable SELECT 't3', content FROM byok_searchable WHERE tenant = 't1'",
}


@pytest.mark.parametrize("how", TAMPERED)
def test_whoever_writes_to_the_keystore_cannot_change_it(fleet: Fleet, how: str) -> None:
    """A specification or state that was changed by hand is refused before anything of it is used."""
    one = fleet.start()
    one.byok.onboard("t3", fleet.kms)
    one.write(1, mrn="A-1")
    one.byok.set_searchable("t2", set())
    with fleet.keystore.begin() as connection:
        assert connection.execute(text(TAMPERED[how])).rowcount == 1
    one.byok.forget_keys()
    with pytest.raises(KeystoreTamperedError):
        one.find(one.patient.mrn == "A-1", tenant="t3" if how == "added" else "t1")


def test_an_old_state_cannot_be_put_back(fleet: Fleet) -> None:
    """Not even a whole one that was authentic: the manifest is of one epoch."""
    one = fleet.start()
    one.byok.set_searchable("t1", set())
    searchable = table("searchable")
    with fleet.keystore.connect() as connection:
        before = connection.execute(select(searchable).where(searchable.c.tenant == "t1")).one()
    one.byok.set_searchable("t1", {"hs_patient.mrn"})
    with fleet.keystore.begin() as connection:
        connection.execute(
            update(searchable).where(searchable.c.tenant == "t1").values(content=before.content)
        )
    one.byok.forget_keys()
    with pytest.raises(KeystoreTamperedError):
        one.find(one.patient.mrn == "A-1")


# -- what a tenant enables -------------------------------------------------------------------------------------------


def test_what_is_not_enabled_has_no_hash_and_is_not_searched(fleet: Fleet) -> None:
    """NULL in place of hashes, whatever writes them; a search is refused before it reaches the database."""
    one = fleet.start()
    patient = one.patient
    one.byok.set_searchable("t1", {patient.phone, "hs_patient.tail_of"})
    one.write(1, mrn="A-1", phone="12345")
    with one.byok.session("t1", one.engine) as session:
        session.execute(insert(patient), [{"id": 2, "mrn": "A-1"}, {"id": 3, "mrn": None}])
        session.execute(update(patient).where(patient.id == 3).values(mrn="A-3"))
        session.commit()
    assert one.hashes("mrn") == [None, None, None]  # not even a unique column collides
    assert one.find(patient.phone == "12345") == one.find(patient.tail_of == "45") == [1]
    sent: list[str] = []
    event.listen(one.engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    other = aliased(patient)
    for criterion in (
        patient.mrn == "A-1",
        patient.mrn != "A-1",
        patient.mrn.in_(["A-1"]),
        patient.mrn == other.mrn,
        patient.__table__.c.mrn_hash == "A-1",
        patient.id.in_(select(other.id).where(other.mrn == "A-1")),
    ):
        sent.clear()
        with pytest.raises(NotSearchableError, match="t1") as caught:
            one.find(criterion)
        assert (caught.value.tenant, caught.value.column) == ("t1", "hs_patient.mrn")
        assert "A-1" not in str(caught.value)
        assert sent == []
    with one.byok.session("t1", one.engine) as session:
        upsert = sqlite_insert(patient).values(id=4, mrn="A-1")
        for statement in (
            # An upsert would not find the row, and add another.
            upsert.on_conflict_do_update(index_elements=["mrn"], set_={"note": "x"}),
            upsert.on_conflict_do_nothing(index_elements=[patient.__table__.c.mrn_hash]),
            update(patient).where(patient.mrn == "A-1").values(note="x"),
            select(func.count()).select_from(patient).where(patient.mrn.in_([])),
            select(func.count()).group_by(search_hash(patient.mrn)),
            select(func.count(search_hash(patient.mrn).distinct())),
        ):
            with pytest.raises(NotSearchableError):
                session.execute(statement)
        session.execute(upsert.on_conflict_do_nothing(index_elements=["id"]))
    with one.byok.tenant("t1"), pytest.raises(NotSearchableError):
        one.byok.hash(patient.mrn, "A-1")
    with one.byok.tenant("t2"):
        assert len(one.byok.hash(patient.mrn, "A-1")) == 32
    assert one.find(patient.mrn.is_(None)) == []
    one.write(9, tenant="t2", mrn="B")
    assert one.find(patient.mrn == "B", tenant="t2") == [9]


def test_an_index_that_is_not_enabled(fleet: Fleet) -> None:
    """It gets no hash, and not even a NULL test is answered, which would lie; its source goes on."""
    one = fleet.start()
    one.byok.set_searchable("t1", {one.patient.__table__.c.mrn, one.patient.phone})
    one.write(1, mrn="A-1", phone="12345")
    assert one.hashes("tail_of") == [None]
    for criterion in (one.patient.tail_of == "45", one.patient.tail_of.is_(None)):
        with pytest.raises(NotSearchableError, match=r"hs_patient\.tail_of"):
            one.find(criterion)
    assert one.find(one.patient.phone == "12345") == [1]


def test_enabled_later_it_is_pending_until_its_rows_are_hashed(fleet: Fleet) -> None:
    """From then on hashes are written; searched is only after the job has said that every row has one."""
    one, columns = fleet.start(), fleet.start().byok._searchable
    one.byok.set_searchable("t1", set())
    one.write(1, mrn="A-1", phone="12")
    one.byok.set_searchable("t1", {one.patient.mrn})
    one.write(2, mrn="A-2", phone="34")
    first, second = one.hashes("mrn")
    assert first is None
    assert second is not None
    with pytest.raises(NotSearchableError, match="re-hash"):
        one.find(one.patient.mrn == "A-2")
    assert columns.state("t1", "hs_patient.mrn") == "pending"
    one.write(1, mrn="A-0", phone="12")  # what the job does: every row is written again
    columns.rehashed("t1", "hs_patient.mrn")
    columns.rehashed("t1", "hs_patient.mrn")
    fleet.clock.turn(POLL_EVERY)
    assert one.find(one.patient.mrn == "A-0") == [1]
    with pytest.raises(NotSearchableError):
        one.find(one.patient.phone == "12")
    with pytest.raises(ConfigurationError, match="phone"):
        columns.rehashed("t1", "hs_patient.phone")


def test_disabled_and_enabled_again_it_needs_the_job(fleet: Fleet) -> None:
    """What was written meanwhile has no hash, also where everything is enabled again at once."""
    one = fleet.start()
    one.write(1, mrn="A-1")
    assert one.find(one.patient.mrn == "A-1") == [1]
    one.byok.set_searchable("t1", {"hs_patient.phone"})
    with pytest.raises(NotSearchableError):
        one.find(one.patient.mrn == "A-1")
    one.write(1, mrn="A-2")
    assert one.hashes("mrn") == [None]
    one.byok.set_searchable("t1", None)
    with pytest.raises(NotSearchableError, match="re-hash"):
        one.find(one.patient.mrn == "A-1")
    assert one.find(one.patient.phone == "x") == []


def test_while_it_is_being_disabled_no_row_is_missed(fleet: Fleet) -> None:
    """A process that does not know yet finds every row, since all write hashes until each has had its look."""
    one, two = fleet.start(), fleet.start()
    one.write(1, phone="12")
    assert two.find(two.patient.phone == "12") == [1]
    steps: list[str] = []

    def meanwhile() -> None:
        one.byok._keyrings.look_again("t1")
        one.write(2, phone="12")
        with pytest.raises(NotSearchableError):
            one.find(one.patient.phone == "12")
        assert two.find(two.patient.phone == "12") == [1, 2]
        fleet.clock.turn(POLL_EVERY)
        with pytest.raises(NotSearchableError):
            two.find(two.patient.phone == "12")
        two.write(3, phone="12")
        steps.append("done")

    fleet.clock.meanwhile = meanwhile
    before = fleet.clock.boot()
    one.byok.set_searchable("t1", set())
    assert steps == ["done"]
    assert fleet.clock.boot() >= before + SETTLE
    one.write(4, phone="12")
    assert [hash_ is None for hash_ in one.hashes("phone")] == [False, False, False, True]


def test_a_tenant_without_rows_is_limited_at_once(fleet: Fleet) -> None:
    """Whoever searches what was never hashed, or writes it, looks first; so nobody has to wait for anybody."""
    one, two, three, four = fleet.start(), fleet.start(), fleet.start(), fleet.start()
    for process in (two, three, four):
        assert process.find(process.patient.mrn == "A-1") == []
    before = fleet.clock.boot()
    one.byok.set_searchable("t1", {one.patient.phone})
    one.write(1, mrn="A-1", phone="12")
    assert fleet.clock.boot() == before
    with pytest.raises(NotSearchableError):
        two.find(two.patient.mrn == "A-1")
    with three.byok.tenant("t1"), pytest.raises(NotSearchableError):
        three.byok.hash(three.patient.mrn, "A-1")
    with four.byok.tenant("t1"), pytest.raises(NotSearchableError):
        asyncio.run(four.byok.ahash(four.patient.mrn, "A-1"))
    three.write(2, mrn="A-2")
    assert one.hashes("mrn") == [None, None]
    assert two.find(two.patient.phone == "12") == [1]


def test_a_changed_specification_is_rehashed(fleet: Fleet) -> None:
    """The job begins with the new model: the old one is refused from then on, and searches wait for its end."""
    old, new = fleet.start(), fleet.start(model(mrn={"normalize": compose(trim, casefold)}))
    old.write(1, mrn=" A-1 ")
    columns = new.byok._searchable

    def meanwhile() -> None:
        assert old.find(old.patient.mrn == " A-1 ") == [1]  # who has not looked yet
        with pytest.raises(SettlingError):
            new.write(3, mrn="A-3")
        fleet.clock.turn(POLL_EVERY)
        old.write(4, mrn="A-4")
        with pytest.raises(NotSearchableError):
            old.find(old.patient.mrn == " A-1 ")

    fleet.clock.meanwhile = meanwhile
    columns.rehashing("t1", new.patient.mrn.type.spec)
    fleet.clock.turn(SETTLE)
    with pytest.raises(HashSpecChangedError):
        old.write(2, mrn="A-2")
    for process in (old, new):
        with pytest.raises(NotSearchableError):
            process.find(process.patient.mrn == "a-1")
    for id_, mrn in ((1, " A-1"), (4, "A-4")):
        new.write(id_, mrn=mrn)
    columns.rehashed("t1", "hs_patient.mrn")
    fleet.clock.turn(POLL_EVERY)
    assert new.find(new.patient.mrn == "a-1") == [1]
    with pytest.raises(HashSpecChangedError):
        old.find(old.patient.mrn == " A-1 ")
    new.byok.set_searchable("t1", set())
    with pytest.raises(ConfigurationError, match="mrn"):
        columns.rehashing("t1", new.patient.mrn.type.spec)


# -- what comes and goes with a release ------------------------------------------------------------------------------

UNSEARCHED = {"searchable": False}


def unindexed(searchable: bool = True) -> Any:
    """A release before the hash_index."""

    class Base(DeclarativeBase):
        pass

    class Patient(Base):
        __tablename__ = "hs_patient"
        id = mapped_column(Integer, primary_key=True)
        note = mapped_column(String(20))
        mrn = mapped_column(Encrypted(String(20), searchable=searchable))
        phone = mapped_column(Encrypted(String(20), searchable=searchable))

    return Patient


LATE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a column, beside another": (lambda: model(phone=UNSEARCHED), "phone", "12"),
    "the first column of its table": (lambda: unindexed(searchable=False), "phone", "12"),
    "an index": (unindexed, "tail_of", "12"),
}


@pytest.mark.parametrize("how", LATE)
@pytest.mark.parametrize("first", ["search", "write"])
def test_what_becomes_searchable_later_waits_for_its_rows(fleet: Fleet, how: str, first: str) -> None:
    """Rows of the release before have no hash; what misses them is refused, also before the new release writes."""
    before, name, value = LATE[how]
    full = model()
    full.metadata.create_all(fleet.data)
    old = fleet.start(before())
    old.write(1, phone="12")
    new = fleet.start(full)
    column = f"hs_patient.{name}"
    if first == "write":
        new.write(2, phone="12")
        assert [hash_ is None for hash_ in new.hashes(name)] == [True, False]
    with pytest.raises(NotSearchableError, match="re-hash") as caught:
        new.find(getattr(new.patient, name) == value)
    assert (caught.value.tenant, caught.value.column) == ("t1", column)
    old.write(3, phone="12")  # side by side with the new release
    new.rewrite(1, 3, phone="12")
    new.byok._searchable.rehashed("t1", column)
    fleet.clock.turn(POLL_EVERY)
    assert new.find(getattr(new.patient, name) == value) == ([1, 2, 3] if first == "write" else [1, 3])
    assert new.find(getattr(new.patient, name) == value, tenant="t2") == []
    with pytest.raises(HashSpecChangedError, match=name):
        old.write(4, phone="12")  # it would be missed


@pytest.mark.parametrize("how", LATE)
def test_an_earlier_release_ends_where_the_job_begins(fleet: Fleet, how: str) -> None:
    """It would write rows without a hash behind the job's back."""
    before, name, value = LATE[how]
    full = model()
    full.metadata.create_all(fleet.data)
    old, new = fleet.start(before()), fleet.start(full)
    old.write(1, phone="12")
    columns, spec = new.byok._searchable, full.__table__.c[f"{name}_hash"].type.spec
    fleet.clock.meanwhile = lambda: old.write(2, phone="12")
    columns.rehashing("t1", spec)
    fleet.clock.turn(SETTLE)
    new.rewrite(1, 2, phone="12")
    with pytest.raises(HashSpecChangedError, match=name):
        old.write(3, phone="12")
    columns.rehashed("t1", spec.column)
    fleet.clock.turn(POLL_EVERY)
    assert new.find(getattr(new.patient, name) == value) == [1, 2]


def test_a_renamed_column_keeps_its_rows_or_is_refused(fleet: Fleet) -> None:
    """With column_id= it is the same column; without, no search says that there is nothing."""
    fleet.start().write(1, mrn="A-1", phone="12")

    def renamed(**options: Any) -> Any:
        class Base(DeclarativeBase):
            pass

        class Patient(Base):
            __tablename__ = "hs_patient"
            id = mapped_column(Integer, primary_key=True)
            number = mapped_column(Encrypted(String(20), searchable=True, **options))

        return Patient

    with fleet.data.begin() as connection:
        for name in ("mrn", "mrn_hash"):
            connection.exec_driver_sql(
                f"ALTER TABLE hs_patient RENAME COLUMN {name} TO {name.replace('mrn', 'number')}"
            )
    lost = fleet.start(renamed())
    with pytest.raises(NotSearchableError):
        lost.find(lost.patient.number == "A-1")
    kept = fleet.start(renamed(column_id="hs_patient.mrn"))
    assert kept.find(kept.patient.number == "A-1") == [1]
    kept.write(2, number="A-2")
    assert kept.find(kept.patient.number.in_(["A-1", "A-2"])) == [1, 2]


def test_a_column_that_is_hashed_no_more_has_to_be_disabled_first(fleet: Fleet) -> None:
    """Whoever left out its hashes would have another release miss rows; reading goes on."""
    old, new = fleet.start(), fleet.start(model(phone=UNSEARCHED))
    old.write(1, mrn="A-1", phone="12")
    for written in ({"phone": "34"}, {"mrn": "A-2"}):
        with pytest.raises(HashSpecChangedError, match=r"set_searchable") as caught:
            new.write(2, **written)
        assert (caught.value.tenant, caught.value.column) == ("t1", "hs_patient.phone")
    assert new.find(new.patient.mrn == "A-1") == [1]
    new.byok.set_searchable("t1", {"hs_patient.mrn", "hs_patient.tail_of"})
    new.write(2, phone="34", mrn="A-2")
    new.write(3, tenant="t2", phone="34", mrn="A-2")
    with pytest.raises(NotSearchableError):
        old.find(old.patient.phone == "34")


@pytest.mark.parametrize("sync_url", ["mariadb"], indirect=True)
def test_each_table_that_an_update_sets_is_noted(byok: Byok, engine: Engine) -> None:
    """MySQL's UPDATE takes several: what a release may not write alone, it may not write beside another table."""
    (other,), full, old = tables("hs_beside"), model(), unindexed()
    other.metadata.create_all(engine)
    full.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add(other(id=1, text="x"))
        session.commit()
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO hs_patient (id) VALUES (1)")

    def joined(patient: Any) -> Any:
        return update(other).where(other.id == patient.id).values({other.text: "y", patient.phone: "12"})

    with byok.session("t1", engine) as session:
        assert session.execute(joined(full)).rowcount
        session.commit()
        with pytest.raises(HashSpecChangedError) as caught:
            session.execute(joined(old))
    assert caught.value.column == "hs_patient.tail_of"
    assert byok._keyrings.get("t1").searchable.tables == {"hs_beside", "hs_patient"}


def test_the_columns_of_an_owner_are_noted_with_the_owner(fleet: Fleet) -> None:
    """Whoever writes: the specification of their hashes is kept among the owner's."""

    def owned(**options: Any) -> Any:
        class Base(DeclarativeBase):
            pass

        class Patient(Base):
            __tablename__ = "hs_patient"
            id = mapped_column(Integer, primary_key=True)
            email = mapped_column(Encrypted(String(20), searchable=True, owner="t2", **options))
            name = mapped_column(Encrypted(String(20), searchable=True))

        return Patient

    old, new = fleet.start(owned()), fleet.start(owned(normalize=casefold))
    old.write(1, email="Ada", name="x")
    assert old.find(old.patient.email == "Ada") == [1]
    assert old.byok._keyrings.get("t1").searchable.specs.keys() == {"hs_patient.name"}
    assert old.byok._keyrings.get("t2").searchable.specs.keys() == {"hs_patient.email"}
    works = {
        HashSpecChangedError: lambda: new.find(new.patient.email == "ada"),
        SettlingError: lambda: new.write(2, email="Bo"),
    }
    for error, work in works.items():
        with pytest.raises(error) as caught:
            work()
        assert (caught.value.tenant, caught.value.column) == ("t2", "hs_patient.email")
    new.rewrite(1, name="y")
    assert new.find(new.patient.name == "y") == [1]


def test_only_what_is_declared_searchable_can_be_enabled(fleet: Fleet) -> None:
    """A plain or unsearchable attribute is no search; nothing is changed."""
    one = fleet.start(model(phone={"searchable": False}))
    for wrong in (one.patient.note, one.patient.phone, one.patient, 1):
        with pytest.raises(ConfigurationError):
            one.byok.set_searchable("t1", {wrong})
    for single in ("hs_patient.mrn", one.patient.mrn, one.patient.tail_of):
        with pytest.raises(ConfigurationError, match="a set"):
            one.byok.set_searchable("t1", single)
    one.write(1, mrn="A-1")
    assert one.find(one.patient.mrn == "A-1") == [1]


async def test_it_works_on_asyncio(async_engine: AsyncEngine, abyok: Byok) -> None:
    """Noting a specification within a flush waits in a thread; a refusal comes as on a sync engine."""
    patient = model()
    async with async_engine.begin() as connection:
        await connection.run_sync(patient.metadata.create_all)
    await abyok.aset_searchable("t1", {patient.mrn})
    async with abyok.asession("t1", async_engine) as session:
        assert (await session.scalars(select(patient.id).where(patient.mrn == "A-1"))).all() == []
        session.add(patient(id=1, mrn="A-1", phone="12"))
        await session.commit()
        assert (await session.scalars(select(patient.id).where(patient.mrn == "A-1"))).all() == [1]
        with pytest.raises(NotSearchableError):
            await session.scalars(select(patient).where(patient.tail_of == "12"))
    async with abyok.tenant("t1"):
        with pytest.raises(NotSearchableError):
            await abyok.ahash(patient.phone, "12")
    async with abyok.tenant("t2"):
        assert len(await abyok.ahash(patient.phone, "12")) == 32


async def test_a_search_that_waits_for_a_job_on_asyncio(async_engine: AsyncEngine, abyok: Byok) -> None:
    """The keystore is asked in a thread how far the job is. One that is gone, or nobody tells of, is not told of."""
    patient = model()
    async with async_engine.begin() as connection:
        await connection.run_sync(patient.metadata.create_all)
    async with abyok.asession("t1", async_engine) as session:
        session.add(patient(id=1, mrn="A-1"))
        await session.commit()
    spec = patient.__table__.c.mrn_hash.type.spec

    async def waiting_for(job: str) -> NotSearchableError:
        await asyncio.to_thread(
            abyok._generations.search, "t1", lambda now: now.not_searched(spec.column).rehashing(spec, job)
        )
        abyok._keyrings.look_again("t1")
        async with abyok.asession("t1", async_engine) as session:
            with pytest.raises(NotSearchableError) as caught:
                await session.scalars(select(patient).where(patient.mrn == "A-1"))
        return caught.value

    job = await asyncio.to_thread(abyok._jobs.start, "rehash", {})
    error = await waiting_for(job.id)
    assert (error.progress, str(error).endswith(f"Job {job.id} is preparing: at 0 of 0 rows")) == (
        (0, 0),
        True,
    )
    assert (await waiting_for("f" * 32)).progress is None


def test_on_every_database(engine: Engine, byok: Byok) -> None:
    """The same holds on each database that the data may be in."""
    patient = model()
    patient.metadata.create_all(engine)
    byok.set_searchable("t1", {patient.mrn})
    with byok.session("t1", engine) as session:
        assert isinstance(session, Session)
        session.add_all([patient(id=1, mrn="A-1", phone="12"), patient(id=2, mrn="A-2", phone="12")])
        session.flush()
        assert session.scalars(select(patient.id).where(patient.mrn == "A-2")).all() == [2]
        with pytest.raises(NotSearchableError):
            session.scalars(select(patient.id).where(patient.phone == "12"))
    if engine.dialect.name == "postgresql":
        byok.set_searchable("t2", {patient.phone})
        upsert = postgresql_insert(patient).values(id=3, mrn="A-2")
        with byok.session("t2", engine) as session, pytest.raises(NotSearchableError):
            session.execute(upsert.on_conflict_do_nothing(constraint="hs_patient_mrn_hash_key"))


def test_tenants_share_what_is_the_same(fleet: Fleet) -> None:
    """However many columns there are, a tenant's share of the memory is a reference."""
    one = fleet.start()
    for tenant in ("t1", "t2"):
        one.write(1 if tenant == "t1" else 2, tenant=tenant, mrn=tenant)
    keyrings: Keyrings = one.byok._keyrings
    assert keyrings.get("t1").searchable is keyrings.get("t2").searchable


# -- before a first write finds out ----------------------------------------------------------------------------------


def test_check_lists_what_has_to_run(fleet: Fleet) -> None:
    """For all tenants, by what the keystore notes, without any KMS call; and nothing where nothing has changed."""
    old = fleet.start()
    old.write(1, mrn="A-1", phone="12345")
    old.write(2, tenant="t2", mrn="A-2")
    assert old.byok.check(old.patient) == []
    new = fleet.start(model(mrn={"normalize": casefold}, tail=last(3)))
    new.byok.forget_keys()
    calls = len(CountingKms.unwraps)
    found = [(each.tenant, each.column, each.kind) for each in new.byok.check(new.patient)]
    assert len(CountingKms.unwraps) == calls
    assert found == [
        (tenant, column, kind)
        for tenant in ("t1", "t2")
        for column, kind in (("hs_patient.mrn", "unique"), ("hs_patient.tail_of", "changed"))
    ]
    assert [each.kind for each in new.byok.check(new.patient.phone)] == ["changed", "changed"]
    dropped = fleet.start(unindexed())
    assert {(each.column, each.kind) for each in dropped.byok.check(dropped.patient)} == {
        ("hs_patient.tail_of", "dropped")
    }


def test_prepared_no_write_has_to_wait(fleet: Fleet) -> None:
    """Not of either release; and the search is closed before the first of them."""
    old = fleet.start()
    old.write(1, phone="12345")
    new = fleet.start(model(tail=last(3)))
    left = new.byok.check(new.patient, prepare=True)
    assert [(each.tenant, each.kind) for each in left] == [("t1", "unhashed")]
    assert all("byok rehash" in each.run for each in left)
    new.write(2, phone="12345")
    old.write(3, phone="12345")
    for process in (old, new):
        with pytest.raises(NotSearchableError):
            process.find(process.patient.tail_of == "345")


def test_a_release_that_was_replaced_comes_back_by_prepare_only(fleet: Fleet) -> None:
    """Left over it is refused; who goes back to it on purpose says so first."""
    old, new = fleet.start(), fleet.start(model(tail=last(3)))
    old.write(1, phone="12345")
    columns, spec = new.byok._searchable, new.patient.__table__.c.tail_of_hash.type.spec
    columns.rehashing("t1", spec)
    columns.rehashed("t1", spec.column)
    fleet.clock.turn(SETTLE)
    with pytest.raises(HashSpecChangedError):
        old.write(2, phone="1")
    assert new.find(new.patient.tail_of == "345") == []
    assert [each.kind for each in old.byok.check(old.patient)] == ["changed"]
    old.byok.check(old.patient, prepare=True)
    fleet.clock.turn(POLL_EVERY)
    old.write(2, phone="1")


def test_all_but_these_are_searchable(fleet: Fleet) -> None:
    """Those of a later release too, where set_searchable with names leaves them off."""
    model().metadata.create_all(fleet.data)
    before = fleet.start(model(phone=UNSEARCHED))
    before.byok.set_searchable("t1", None, but={before.patient.tail_of})
    before.byok.set_searchable("t2", {before.patient.mrn})
    later = fleet.start()
    for tenant in ("t1", "t2"):
        later.write(1 if tenant == "t1" else 2, tenant=tenant, mrn=tenant, phone="12")
    assert later.find(later.patient.phone == "12") == [1]
    for tenant, criterion in (("t1", later.patient.tail_of == "12"), ("t2", later.patient.phone == "12")):
        with pytest.raises(NotSearchableError):
            later.find(criterion, tenant=tenant)
    assert later.hashes("tail_of") == [None, None]
    for wrong in ("hs_patient.mrn", {later.patient.note}):
        with pytest.raises(ConfigurationError):
            later.byok.set_searchable("t1", None, but=wrong)
    with pytest.raises(ConfigurationError, match="but="):
        later.byok.set_searchable("t1", set(), but={later.patient.mrn})
