"""byok.sealed(): rows without keys. What is read, what is written back, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms
from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError
from sqlalchemy import (
    JSON,
    Date,
    Engine,
    ForeignKey,
    LargeBinary,
    String,
    create_engine,
    delete,
    func,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

from sqla_byok import (
    Byok,
    ConfigurationError,
    EncodeError,
    Encrypted,
    KeyDisabledError,
    NotEncryptedError,
    Sealed,
    SealedError,
    TenantMismatchError,
    hash_index,
)
from sqla_byok.audit import Event, SealedOpened
from sqla_byok.normalize import casefold, first, named

WHO = {"actor": "ada", "reason": "ticket 4711"}


@named("both")
def both(town: str, phone: bytes) -> str:
    """A transform over two columns."""
    return f"{town}/{len(phone)}"


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(10))
    note: Mapped[str | None] = mapped_column(String(20))
    name: Mapped[str | None] = mapped_column(Encrypted(String(40)))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))
    email: Mapped[str | None] = mapped_column(Encrypted(String(90), searchable=True, normalize=casefold))
    scan: Mapped[bytes | None] = mapped_column(Encrypted(LargeBinary, searchable=True))
    born: Mapped[date | None] = mapped_column(Encrypted(Date))
    findings: Mapped[Any] = mapped_column(Encrypted(JSON), nullable=True)
    town: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    town_start = hash_index("town", transform=first(2))
    phone: Mapped[bytes | None] = mapped_column(Encrypted(LargeBinary(20), searchable=True))
    town_and_phone = hash_index("town", "phone", transform=both)
    visits: Mapped[list[Visit]] = relationship(cascade="all, delete-orphan", back_populates="patient")


class Visit(Base):
    __tablename__ = "visit"
    id: Mapped[int] = mapped_column(primary_key=True)
    patient_id: Mapped[int] = mapped_column(ForeignKey("patient.id"))
    code: Mapped[str | None] = mapped_column(Encrypted(String(20)))
    patient: Mapped[Patient] = relationship(back_populates="visits")


T: Any = Patient.__table__
ENCRYPTED = [column.key for column in T.c if isinstance(column.type, Encrypted)]
HASHES = [key for key in T.c.keys() if key.endswith("_hash")]  # noqa: SIM118 - no mapping


def patient(id_: int, tenant: str, **values: Any) -> Patient:
    given = {
        "name": f"{tenant} Ada",
        "mrn": f"{tenant}-{id_}",
        "email": "Ada@Example.com",
        "scan": bytes(range(40)),
        "born": date(1815, 12, 10),
        "findings": {"a": [1, None]},
        "town": f"{tenant} town",
        "phone": b"555",
        "visits": [Visit(id=id_, code=f"{tenant}-visit")],
        **values,
    }
    return Patient(id=id_, org=tenant, note="plain", **given)


def stored(engine: Engine, id_: int) -> dict[str, bytes]:
    """What the database holds of a row."""
    columns = [type_coerce(T.c[key], LargeBinary).label(key) for key in (*ENCRYPTED, *HASHES)]
    with engine.connect() as connection:
        return dict(connection.execute(select(*columns).where(T.c.id == id_)).mappings().one())


@pytest.fixture
def data(byok: Byok, engine: Engine) -> Engine:
    """The engine, with a row of t1, one of t2, and one without values."""
    Base.metadata.create_all(engine)
    for id_, tenant in ((1, "t1"), (2, "t2")):
        with byok.session(tenant, engine) as session:
            session.add(patient(id_, tenant))
            session.commit()
    with Session(engine) as session:
        session.add(Patient(id=3, org="t3", note="plain"))
        session.commit()
    return engine


@pytest.fixture
def session(byok: Byok, data: Engine) -> Iterator[Session]:
    """A session within a sealed block."""
    with byok.sealed(**WHO), Session(data) as session:
        yield session


# -- reading ---------------------------------------------------------------------------------------------------------


def test_rows_of_all_tenants_are_read_sealed(session: Session) -> None:
    """Entities, columns and loaded relationships of any tenant come as sealed values; NULL is None."""
    one, two, none = session.scalars(select(Patient).order_by(Patient.id)).all()
    for found in (one, two):
        for key in ENCRYPTED:
            value = getattr(found, key)
            assert (type(value), value.column, str(value)) == (
                Sealed,
                f"patient.{key}",
                f"<Sealed patient.{key}>",
            )
        assert type(found.visits[0].code) is Sealed  # a lazy load
    assert [getattr(none, key) for key in ENCRYPTED] == [None] * len(ENCRYPTED)
    assert one.note == "plain"
    assert type(session.scalar(select(Patient.name).where(Patient.id == 1))) is Sealed
    for how in (joinedload, selectinload):
        session.expunge_all()
        again = (
            session.scalars(select(Patient).where(Patient.id == 1).options(how(Patient.visits)))
            .unique()
            .one()
        )
        assert type(again.visits[0].code) is Sealed
    session.refresh(again)
    assert type(again.name) is Sealed


def test_the_stored_bytes_are_those_in_the_database(data: Engine, session: Session) -> None:
    """What is sealed is the value itself, so that it can be copied elsewhere."""
    found = session.get_one(Patient, 1)
    held = stored(data, 1)
    assert {key: getattr(found, key).stored for key in ENCRYPTED} == {key: held[key] for key in ENCRYPTED}


def test_no_key_is_asked_for(
    tmp_path: Path, counting_kms: CountingKms, keystore_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dark tenant's rows are read, changed and deleted without one call to its KMS, and the keystore is not asked."""
    engine = create_engine(f"sqlite:///{tmp_path / 'data.db'}")
    Base.metadata.create_all(engine)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}", keystore_key=keystore_key)
    byok.create_keystore()
    byok.attach(engine)
    byok.onboard("t1", counting_kms)
    with byok.session("t1", engine) as session:
        session.add(patient(1, "t1"))
        session.commit()
    byok.forget_keys()

    def refuse() -> None:
        raise KeyDisabledError("disabled")

    monkeypatch.setattr(CountingKms, "on_unwrap", staticmethod(refuse))
    with pytest.raises(KeyDisabledError), byok.session("t1", engine):
        pass
    before = len(counting_kms.unwraps)
    monkeypatch.setattr(byok._keystore, "load", None)
    with byok.sealed(**WHO), Session(engine) as session:
        found = session.scalars(select(Patient).where(Patient.org == "t1")).one()
        assert type(found.mrn) is Sealed
        found.note = "dark"
        session.flush()
        session.delete(found)
        session.commit()
    assert len(counting_kms.unwraps) == before
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Patient)) == 0
    byok.close()
    engine.dispose()


def test_what_is_not_ours_is_refused(data: Engine, session: Session) -> None:
    """Plaintext from before a migration does not pass for a sealed value, which would be printed and copied freely."""
    with data.begin() as connection:
        connection.execute(
            text("UPDATE patient SET name = :b WHERE id = 1"), {"b": b"Ada Lovelace, in the clear, in 1815"}
        )
    with pytest.raises(NotEncryptedError) as raised:
        session.get(Patient, 1)
    assert "Lovelace" not in str(raised.value)


# -- writing ---------------------------------------------------------------------------------------------------------


def test_unchanged_values_flush_as_they_were(byok: Byok, data: Engine) -> None:
    """A change of a plain column leaves each encrypted value and hash byte for byte, and the tenant reads them."""
    before = stored(data, 1)
    with byok.sealed(**WHO), Session(data) as session:
        found = session.get_one(Patient, 1)
        found.note, found.name = "changed", found.name
        session.commit()
        session.execute(update(Patient).where(Patient.id == 1).values(note="bulk"))
        session.commit()
    assert stored(data, 1) == before
    with byok.session("t1", data) as of_tenant:
        again = of_tenant.scalars(select(Patient).where(Patient.mrn == "t1-1")).one()
        assert (again.note, again.name, again.findings) == ("bulk", "t1 Ada", {"a": [1, None]})


NEW: dict[str, Any] = {
    "name": "x",
    "mrn": "x",
    "email": "x@x",
    "scan": b"x",
    "born": date(2000, 1, 1),
    "findings": {"x": 1},
}
WRITES: dict[str, Callable[[Session, str], object]] = {
    "flush": lambda s, key: (setattr(s.get_one(Patient, 1), key, NEW[key]), s.flush()),
    "add": lambda s, key: (s.add(Patient(id=9, org="t1", **{key: NEW[key]})), s.flush()),
    "update": lambda s, key: s.execute(update(Patient).where(Patient.id == 1).values(**{key: NEW[key]})),
    "bulk update": lambda s, key: s.execute(update(Patient), [{"id": 1, key: NEW[key]}]),
    "bulk insert": lambda s, key: s.execute(insert(Patient), [{"id": 9, "org": "t1", key: NEW[key]}]),
    "Core insert": lambda s, key: s.execute(insert(T).values(id=9, org="t1", **{key: NEW[key]})),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_new_value_is_refused(data: Engine, session: Session, way: str) -> None:
    """There is no key for it, and it is not written in the clear."""
    before = stored(data, 1)
    for key in NEW:
        with pytest.raises(SealedError, match="runs sealed"):
            WRITES[way](session, key)
        session.rollback()
    assert stored(data, 1) == before
    assert session.scalar(select(func.count(Patient.id))) == 3


def test_a_value_can_be_emptied(data: Engine, session: Session) -> None:
    """None needs no key, and takes the hash along."""
    session.get_one(Patient, 1).mrn = None
    session.commit()
    held = stored(data, 1)
    assert (held["mrn"], held["mrn_hash"]) == (None, None)


def test_a_source_of_an_index_over_several_columns_can_be_emptied(byok: Byok, data: Engine) -> None:
    """The other has a hash too, which nobody could make anew."""
    before = stored(data, 1)
    with byok.sealed(**WHO), Session(data) as session:
        session.get_one(Patient, 1).phone = None
        session.commit()
    emptied = {"phone", "phone_hash", "town_and_phone_hash"}
    assert stored(data, 1) == {key: None if key in emptied else value for key, value in before.items()}
    with byok.session("t1", data) as session:
        session.get_one(Patient, 1).phone = b"1234"
        session.commit()
        assert session.scalars(select(Patient.id).where(Patient.town_and_phone == "t1 town/4")).all() == [1]


def test_rows_are_deleted_with_what_depends_on_them(data: Engine, session: Session) -> None:
    """Whoever leaves is deleted, by cascade and by statement, without keys."""
    session.delete(session.get_one(Patient, 1))
    session.flush()
    assert session.scalars(select(Visit.id)).all() == [2]
    session.execute(delete(Visit).where(Visit.patient_id == 2))
    session.execute(delete(Patient).where(Patient.org == "t2"))
    session.commit()
    assert session.scalars(select(Patient.id)).all() == [3]


SEARCHES: dict[str, Any] = {
    "==": lambda: Patient.mrn == "t1-1",
    "!=": lambda: Patient.mrn != "t1-1",
    "in": lambda: Patient.mrn.in_(["t1-1"]),
    "not in": lambda: Patient.mrn.not_in(["t1-1"]),
    "columns": lambda: Patient.mrn == Patient.mrn,
    "normalized": lambda: Patient.email == "ada@example.com",
}


@pytest.mark.parametrize("form", SEARCHES)
def test_a_search_is_refused(byok: Byok, data: Engine, form: str) -> None:
    """Without salts it would find nothing and say nothing; whether the statement was compiled before or not."""
    query = select(Patient.id).where(SEARCHES[form]())
    for _ in range(2):
        with byok.sealed(**WHO), Session(data) as session:
            with pytest.raises(SealedError, match="search"):
                session.scalars(query).all()
            with pytest.raises(SealedError, match="search"):
                session.execute(delete(Visit).where(Visit.patient_id.in_(query)))
        with byok.session("t1", data) as session:  # and the compiled statement is right for a tenant
            assert (1 in session.scalars(query).all()) == (form not in ("!=", "not in"))


def test_null_can_be_searched(session: Session) -> None:
    """IS NULL needs no salt."""
    assert session.scalars(select(Patient.id).where(Patient.mrn.is_(None))).all() == [3]
    assert session.scalars(select(Patient.id).where(Patient.mrn != None).order_by(Patient.id)).all() == [1, 2]  # noqa: E711


# -- copying ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def staging(byok: Byok, tmp_path: Path) -> Iterator[Engine]:
    """Another database for the same rows."""
    engine = create_engine(f"sqlite:///{tmp_path / 'staging.db'}")
    Base.metadata.create_all(engine)
    byok.attach(engine)
    yield engine
    engine.dispose()


def by_core(session: Session, target: Session) -> None:
    target.execute(insert(T), [dict(row) for row in session.execute(select(T)).mappings()])


def by_values(session: Session, target: Session) -> None:
    for row in session.execute(select(T)).mappings():
        target.execute(insert(T).values(**row))


def by_many_values(session: Session, target: Session) -> None:
    target.execute(insert(T).values([dict(row) for row in session.execute(select(T)).mappings()]))


def by_update(session: Session, target: Session) -> None:
    target.add_all([Patient(id=id_, org="x") for id_ in (1, 2, 3)])
    target.flush()
    for row in session.execute(select(T)).mappings():
        target.execute(update(T).where(T.c.id == row["id"]).values(**row))


@pytest.mark.parametrize("copy", [by_core, by_values, by_many_values, by_update])
def test_rows_are_copied_to_staging(
    byok: Byok, data: Engine, staging: Engine, copy: Callable[[Session, Session], None]
) -> None:
    """Read with their hashes, rows arrive byte for byte, and each tenant finds its own there."""
    with byok.sealed(**WHO), Session(data) as session, Session(staging) as target:
        copy(session, target)
        target.commit()
    for id_, tenant in ((1, "t1"), (2, "t2")):
        assert stored(staging, id_) == stored(data, id_)
        with byok.session(tenant, staging) as session:
            for found in (
                Patient.mrn == f"{tenant}-{id_}",
                Patient.scan == bytes(range(40)),
                Patient.phone == b"555",
                Patient.town_start == tenant,
                Patient.town_and_phone == f"{tenant} town/3",
            ):
                assert session.scalars(select(Patient.name).where(found)).all() == [f"{tenant} Ada"]
    assert set(stored(staging, 3).values()) == {None}


def test_a_copy_without_its_hash_is_refused(byok: Byok, data: Engine, staging: Engine) -> None:
    """A row that no search finds would be lost silently."""
    with byok.sealed(**WHO), Session(data) as session, Session(staging) as target:
        found = session.get_one(Patient, 1)
        for key in ("mrn", "email", "scan", "town", "phone"):
            value = getattr(found, key)
            for write in (
                lambda key=key, value=value: target.execute(insert(T), [{"id": 1, "org": "x", key: value}]),
                lambda key=key, value=value: (
                    target.add(Patient(id=1, org="x", **{key: value})),
                    target.flush(),
                ),
                lambda key=key, value=value: target.execute(insert(T).values(id=1, org="x", **{key: value})),
            ):
                with pytest.raises(EncodeError):
                    write()
                target.rollback()
        target.execute(insert(T), [{"id": 1, "org": "x", "name": found.name, "born": found.born}])
        target.commit()
    assert stored(staging, 1)["name"] == stored(data, 1)["name"]


def test_a_copy_with_some_sources_of_an_index_changed_is_refused(
    byok: Byok, data: Engine, staging: Engine
) -> None:
    """The hash over several columns is that of the row that was read, all of it."""
    with byok.sealed(**WHO), Session(data) as session:
        row = dict(session.execute(select(T).where(T.c.id == 1)).mappings().one())
    without = {key: value for key, value in row.items() if key != "town_and_phone_hash"}
    with byok.session("t1", staging) as target:
        with pytest.raises(EncodeError, match="town_and_phone_hash"):
            target.execute(insert(T), [without])
        with pytest.raises(EncodeError, match=r"town_and_phone.*sealed"):
            target.execute(insert(T), [{**row, "town": "other"}])
        target.execute(insert(T), [{**row, "town": None}])
        assert target.scalars(select(T.c.id).where(Patient.town_and_phone.is_(None))).all() == [1]


def test_a_merge_into_the_same_row_changes_nothing(data: Engine, byok: Byok) -> None:
    """A detached sealed object can come back, changed in its plain columns."""
    with byok.sealed(**WHO):
        with Session(data) as session:
            found = session.get_one(Patient, 1)
        found = pickle.loads(pickle.dumps(found))  # noqa: S301 - our own
        found.note = "merged"
        before = stored(data, 1)
        with Session(data) as session:
            session.merge(found)
            session.commit()
            assert session.scalar(select(Patient.note).where(Patient.id == 1)) == "merged"
    assert stored(data, 1) == before


def test_a_sealed_value_goes_to_its_own_column_and_tenant_only(byok: Byok, data: Engine) -> None:
    """Its bytes would open nowhere else; for another tenant they are refused before they are written."""
    with byok.sealed(**WHO), Session(data) as session:
        one = session.get_one(Patient, 1)
        one.visits[0].code = value = one.name
        with pytest.raises(EncodeError, match=r"visit\.code.*patient\.name"):
            session.flush()
    with byok.session("t1", data) as of_t1:
        of_t1.add(Patient(id=9, org="t1", name=value))
        of_t1.commit()
        assert of_t1.get_one(Patient, 9).name == "t1 Ada"
    with byok.session("t2", data) as of_t2:
        of_t2.add(Patient(id=10, org="t2", name=value))
        with pytest.raises(TenantMismatchError):
            of_t2.flush()


# -- whose turn it is ------------------------------------------------------------------------------------------------


def test_the_block_goes_before_a_sessions_tenant(byok: Byok, data: Engine) -> None:
    """A support page over an ordinary session of the tenant shows no plaintext; a tenant's block within does."""
    with byok.session("t1", data) as session:
        query = select(Patient.name).where(Patient.id == 1)
        with byok.sealed(**WHO):
            assert type(session.scalar(query)) is Sealed
            with byok.tenant("t1"):
                assert session.scalar(query) == "t1 Ada"
            assert type(session.scalar(query)) is Sealed
        assert session.scalar(query) == "t1 Ada"


def test_an_engine_can_be_sealed_for_good(byok: Byok, data: Engine) -> None:
    """By execution option, for an engine, a session or one statement; it goes before a tenant's option and block."""
    query = select(Patient.name).where(Patient.id == 1)
    with byok.tenant("t1"), Session(data.execution_options(byok_sealed=True)) as session:
        assert type(session.scalar(query)) is Sealed
        session.add(Patient(id=9, org="t1", name="x"))
        with pytest.raises(SealedError):
            session.flush()
    with byok.session("t1", data) as session:
        assert type(session.scalar(query, execution_options={"byok_sealed": True})) is Sealed
        assert session.scalar(query, execution_options={"byok_sealed": False}) == "t1 Ada"
        assert session.scalar(query) == "t1 Ada"


def test_a_stream_stays_what_it_was(byok: Byok, data: Engine) -> None:
    """Rows fetched after the block are still sealed, and a tenant's stream fetched within it is not."""
    query = select(Patient.name).where(Patient.id == 1)
    with data.connect() as connection:
        with byok.sealed(**WHO):
            sealed = connection.execute(query)
        with byok.tenant("t1"):
            opened = connection.execute(query)
        with byok.tenant("t1"):
            assert type(sealed.scalar()) is Sealed
        with byok.sealed(**WHO):
            assert opened.scalar() == "t1 Ada"


def test_a_sealed_session_does_not_update_for_a_tenant(byok: Byok, data: Engine) -> None:
    """In one transaction: its objects are anybody's, and would be written under that tenant's keys."""
    with Session(data) as session:
        with byok.sealed(**WHO):
            found = session.get_one(Patient, 2)
        with byok.tenant("t1"):
            found.name = "x"
            with pytest.raises(TenantMismatchError, match="sealed"):
                session.flush()


def test_nothing_else_is_encrypted_or_opened_within(byok: Byok, data: Engine, session: Session) -> None:
    """seal(), unseal() and reveal() need a tenant, and say so."""
    found = session.get_one(Patient, 1)
    for ask in (
        lambda: byok.seal(b"x", "p"),
        lambda: byok.unseal(b"x", "p"),
        lambda: byok.reveal(found, "name"),
    ):
        with pytest.raises(SealedError):
            ask()
    with byok.tenant("t1"):
        assert (byok.reveal(found, "name"), found.name) == ("t1 Ada", "t1 Ada")
        with pytest.raises(TenantMismatchError):
            byok.reveal(session.get_one(Patient, 2), "name")
    assert type(found.mrn) is Sealed


def test_entering_is_told_to_the_audit(byok: Byok) -> None:
    """Who looked, and what for; without saying so nobody enters."""
    told: list[Event] = []
    byok._audit.listeners.append(told.append)
    with byok.sealed(actor="ada", reason="ticket 4711"):
        assert told == [SealedOpened("ada", "ticket 4711")]
    for missing in ({"actor": "", "reason": "x"}, {"actor": "x", "reason": ""}):
        with pytest.raises(ConfigurationError, match="audit"):
            byok.sealed(**missing)


# -- JSON ------------------------------------------------------------------------------------------------------------


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    name: str | Sealed | None


class Strict(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    name: str


def test_an_api_answers_with_no_placeholder_unless_asked(session: Session) -> None:
    """JSON and Pydantic refuse a sealed attribute; default=str is asking."""
    found = session.get_one(Patient, 1)
    with pytest.raises(TypeError):
        json.dumps({"name": found.name})
    assert json.loads(json.dumps({"name": found.name}, default=str)) == {"name": "<Sealed patient.name>"}
    with pytest.raises(ValueError, match="valid string"):
        Strict.model_validate(found)
    answer = Answer.model_validate(found)
    assert answer.name is found.name
    assert "t1" not in repr(answer)
    with pytest.raises(PydanticSerializationError):
        answer.model_dump_json()
