"""Packages that walk over mapped classes, take their types for forms and schemas, or copy their rows.

Each of them sees an encrypted column as the plain column that is declared, and no hash column.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict
from sqladmin import Admin, ModelView
from sqlalchemy import (
    JSON,
    Boolean,
    Date,
    Engine,
    Enum,
    Integer,
    Numeric,
    String,
    Text,
    select,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    configure_mappers,
    declarative_base,
    mapped_column,
    sessionmaker,
)
from sqlalchemy.types import TypeDecorator

from sqla_byok import Byok, Encrypted, LocalKms, UnsupportedQueryError, hash_index
from sqla_byok.normalize import last, named

WHY_FLASK = "needs flask, flask-sqlalchemy and flask-admin, in the project's test dependencies"
CANARIES = (b"A-1", b"B-2", b"Lovelace", b"1815", b"4100")


class Ward(enum.Enum):
    """Where somebody lies."""

    north = "n"
    south = "s"


@named("mail-and-mrn")
def together(mail: str, mrn: str) -> str:
    return f"{mail}/{mrn}"


class Initials(TypeDecorator[str]):
    """A type of an application's own."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and value.upper()


def hospital(base: Any = None, versioned: bool = False) -> Any:
    """A model with a column of most kinds, in a metadata of its own."""

    class Base(DeclarativeBase):
        pass

    class Patient(base or Base):  # type: ignore[misc]
        __tablename__ = "patient"
        if versioned:
            __versioned__: Any = {}
        id: Mapped[int] = mapped_column(primary_key=True)
        note: Mapped[str | None] = mapped_column(String(20))
        mrn: Mapped[str] = mapped_column(Encrypted(String(20), searchable=True), unique=True)
        name: Mapped[str | None] = mapped_column(Encrypted(Text))
        born: Mapped[date | None] = mapped_column(Encrypted(Date, searchable=True))
        beds: Mapped[int | None] = mapped_column(Encrypted(Integer))
        fee: Mapped[Decimal | None] = mapped_column(Encrypted(Numeric(8, 2)))
        insured: Mapped[bool | None] = mapped_column(Encrypted(Boolean))
        findings: Mapped[Any] = mapped_column(Encrypted(JSON), nullable=True)
        ward: Mapped[Ward | None] = mapped_column(Encrypted(Enum(Ward)))
        initials: Mapped[str | None] = mapped_column(Encrypted(Initials(4)))
        phone: Mapped[str | None] = mapped_column(Encrypted(String(20)))
        phone_last4 = hash_index("phone", transform=last(4))

    return Patient


PLAIN = {
    "id", "note", "mrn", "name", "born", "beds", "fee", "insured", "findings", "ward", "initials", "phone",
}  # fmt: skip
ADA: dict[str, Any] = {
    "id": 1, "note": "x", "mrn": "A-1", "name": "Ada Lovelace", "born": date(1815, 12, 10), "beds": 2,
    "fee": Decimal("12.50"), "insured": True, "findings": {"a": [1]}, "ward": Ward.north, "initials": "AL",
    "phone": "555 1234",
}  # fmt: skip


@pytest.fixture
def sqlite_engine(tmp_path: Path, byok: Byok, engine: Engine) -> Iterator[Engine]:
    """An engine whose connections go through threads, attached, and every session of it the tenant's."""
    if engine.dialect.name != "sqlite":
        pytest.skip("once is enough: what is asked of a package does not depend on the database")
    yield engine.execution_options(byok_tenant="t1")
    stored = (tmp_path / "test.db").read_bytes()
    assert not [canary for canary in CANARIES if canary in stored], "in the clear"


@pytest.fixture
def patient(sqlite_engine: Engine) -> Any:
    """The model with its table and Ada in it."""
    found = hospital()
    found.metadata.create_all(sqlite_engine)
    with Session(sqlite_engine) as session:
        session.add(found(**ADA))
        session.commit()
    return found


# -- schemas ---------------------------------------------------------------------------------------------------------


def test_marshmallow(sqlite_engine: Engine, patient: Any) -> None:
    """A schema made of the model has a field of the right kind for each attribute; it dumps, validates and loads."""
    from marshmallow import ValidationError, fields
    from marshmallow_sqlalchemy import SQLAlchemyAutoSchema

    class PatientSchema(SQLAlchemyAutoSchema):
        class Meta:
            model = patient
            load_instance = True

    schema = PatientSchema()
    assert set(schema.fields) == PLAIN
    kinds = {
        "mrn": fields.String, "name": fields.String, "born": fields.Date, "beds": fields.Integer,
        "fee": fields.Decimal, "insured": fields.Boolean, "findings": fields.Raw, "ward": fields.Enum,
        "initials": fields.String,
    }  # fmt: skip
    assert {key: type(schema.fields[key]) for key in kinds} == kinds
    assert schema.fields["mrn"].required
    with Session(sqlite_engine) as session:
        dumped = schema.dump(session.get_one(patient, 1))
        assert dumped["born"] == "1815-12-10"
        assert set(dumped) == PLAIN
        dumped["fee"], dumped["mrn"] = "13.00", "B-2"
        session.commit()
        session.add(schema.load(dumped, session=session))
        session.commit()
        found = session.scalars(select(patient).where(patient.mrn == "B-2")).one()
        assert (found.id, found.fee, found.ward) == (1, Decimal("13.00"), Ward.north)
        assert session.scalars(select(patient.id).where(patient.mrn == "A-1")).all() == []
        with pytest.raises(ValidationError, match="Longer than maximum length 20"):
            schema.load({"mrn": "x" * 21}, session=session, transient=True)


def test_pydantic(sqlite_engine: Engine, patient: Any) -> None:
    """A model with from_attributes reads an object, detached too, and everything that its class declares."""

    class PatientOut(BaseModel):
        model_config = ConfigDict(from_attributes=True)
        id: int
        mrn: str
        born: date | None
        ward: Ward | None
        findings: Any
        phone_last4: str | None

    with Session(sqlite_engine) as session:
        ada = session.get_one(patient, 1)
    out = PatientOut.model_validate(ada).model_dump()
    assert out == {key: ADA[key] for key in ("id", "mrn", "born", "ward", "findings")} | {
        "phone_last4": "1234"
    }


# -- forms -----------------------------------------------------------------------------------------------------------

SHOWN = ("Ada Lovelace", "1815-12-10", "12.5", "555 1234", "north")
BO = {
    "mrn": "B-2", "name": "Bo", "born": "1900-01-02", "beds": "4", "fee": "1.5", "ward": "south",
    "findings": '{"b": 2}', "phone": "555 9999", "note": "from a form",
}  # fmt: skip


def check_bo(patient: Any, engine: Engine) -> None:
    """What was typed in is stored, as what it means, and found."""
    with Session(engine) as session:
        bo = session.scalars(select(patient).where(patient.mrn == "B-2")).one()
        assert (bo.born, bo.beds, bo.fee, bo.ward) == (date(1900, 1, 2), 4, Decimal("1.50"), Ward.south)
        assert bo.findings == {"b": 2}
        assert bo.id in session.scalars(select(patient.id).where(patient.phone_last4 == "9999")).all()


def test_sqladmin_with_its_defaults(sqlite_engine: Engine, patient: Any) -> None:
    """A view of which nothing is said lists, shows, creates and edits, with fields of the right kind."""

    class PatientAdmin(ModelView, model=patient):
        pass

    class All(ModelView, model=patient):
        column_list = "__all__"
        column_searchable_list = ["mrn"]  # noqa: RUF012 - sqladmin's declaration

        def search_query(self, stmt: Any, term: str) -> Any:
            return stmt.filter(patient.mrn == term)

    app = FastAPI()
    for path, view in (("/admin", PatientAdmin), ("/all", All)):
        Admin(app, session_maker=sessionmaker(sqlite_engine), base_url=path).add_view(view)
    with TestClient(app) as client:
        assert client.get("/admin/patient/list").status_code == 200
        for page in (client.get("/all/patient/list").text, client.get("/admin/patient/details/1").text):
            assert not [value for value in SHOWN if value not in page]
            assert "hash" not in page
        form = client.get("/admin/patient/create").text
        assert "hash" not in form
        for field in (
            'maxlength="20" name="mrn"',
            '<option value="north">',
            '<textarea class="form-control" id="findings"',
        ):
            assert field in form
        made = client.post("/admin/patient/create", data=BO, follow_redirects=False)
        assert made.status_code == 302, made.text
        check_bo(patient, sqlite_engine)
        assert "Ada Lovelace" in client.get("/admin/patient/edit/1").text
        changed = client.post("/admin/patient/edit/1", data={**BO, "mrn": "A-9"}, follow_redirects=False)
        assert changed.status_code == 302, changed.text
        assert "A-9" in client.get("/all/patient/list?search=A-9").text
        assert "from a form" not in client.get("/all/patient/list?search=A-1").text


def test_flask_admin_over_flask_sqlalchemy(tmp_path: Path, local_kms: LocalKms) -> None:
    """A view of which nothing is said lists, creates and edits; the session is Flask-SQLAlchemy's."""
    import flask_admin.contrib.sqla as flask_admin_sqla
    from flask import Flask
    from flask_admin import Admin
    from flask_sqlalchemy import SQLAlchemy
    from wtforms import fields

    app = Flask("neighbour")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'flask.db'}",
        SQLALCHEMY_ENGINE_OPTIONS={"execution_options": {"byok_tenant": "t1"}},
        SECRET_KEY="only for this test",
        TESTING=True,
    )
    db = SQLAlchemy(app, model_class=declarative_base())
    patient = hospital(db.Model)
    byok = Byok(keystore=f"sqlite:///{tmp_path / 'keystore.db'}")
    byok.create_keystore()
    byok.onboard("t1", local_kms)
    with app.app_context():
        byok.attach(db.engine)
        db.create_all()
        db.session.add(patient(**ADA))
        db.session.commit()
        view = flask_admin_sqla.ModelView(patient, db)
        Admin(app).add_view(view)
    with app.test_request_context():
        form = view.create_form()
    assert {field.name for field in form} == PLAIN - {"id"}
    for key, kind in {
        "mrn": fields.StringField, "name": fields.TextAreaField, "born": fields.DateField,
        "beds": fields.IntegerField, "fee": fields.DecimalField, "initials": fields.StringField,
    }.items():  # fmt: skip
        assert isinstance(form[key], kind), key
    client = app.test_client()
    page = client.get("/admin/patient/").text
    assert not [value for value in SHOWN if value not in page]
    with pytest.raises(UnsupportedQueryError, match="ORDER BY"):
        client.get(f"/admin/patient/?sort={[name for name, _ in view.get_list_columns()].index('mrn')}")
    assert client.post("/admin/patient/new/", data=BO).status_code == 302
    assert "Ada Lovelace" in client.get("/admin/patient/edit/?id=1").text
    assert client.post("/admin/patient/edit/?id=1", data={**BO, "mrn": "A-9"}).status_code == 302
    with app.app_context():
        check_bo(patient, db.engine)
        assert db.session.scalars(select(patient.id).where(patient.mrn == "A-9")).all() == [1]
        db.engine.dispose()
    byok.close()
    assert not [canary for canary in CANARIES if canary in (tmp_path / "flask.db").read_bytes()]


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlalchemy_continuum", "sqlalchemy_history"])
def versioned(request: pytest.FixtureRequest, sqlite_engine: Engine) -> Iterator[Any]:
    """Continuum or History, versioning what is declared from now on."""
    package = pytest.importorskip(request.param, reason="Continuum 2 needs Python 3.11")
    manager = package.VersioningManager()
    package.make_versioned(manager=manager, user_cls=None)
    try:
        yield package
    finally:
        package.remove_versioning(manager=manager)


def test_versions_and_revert(versioned: Any, sqlite_engine: Engine) -> None:
    """Every version is encrypted under its own table's columns, can be searched, and be gone back to."""
    package, patient = versioned, hospital(versioned=True)
    configure_mappers()
    patient.metadata.create_all(sqlite_engine)
    version = package.version_class(patient)
    assert {"mrn_hash", "phone_last4_hash"}.isdisjoint(version.__mapper__.attrs.keys())
    assert version.__table__.c.mrn.type.column_id == "patient_version.mrn"
    with Session(sqlite_engine) as session:
        ada = patient(**ADA)
        session.add(ada)
        session.commit()
        ada.mrn, ada.phone = "B-2", "555 9999"
        session.commit()
        assert [each.mrn for each in ada.versions] == ["A-1", "B-2"]
        assert session.scalars(select(version.phone).where(version.mrn == "A-1")).all() == ["555 1234"]
        before = ada.versions[0]
        assert ada.versions[1].changeset["mrn"] == ["A-1", "B-2"]
        before.revert()
        session.commit()
        assert (ada.mrn, ada.phone, ada.born, ada.findings) == (
            "A-1",
            "555 1234",
            ADA["born"],
            ADA["findings"],
        )
        assert session.scalars(select(patient.id).where(patient.mrn == "A-1")).all() == [1]
        assert session.scalars(select(patient.id).where(patient.phone_last4 == "1234")).all() == [1]
        assert session.scalars(select(patient.id).where(patient.mrn == "B-2")).all() == []


def test_versions_of_columns_with_other_names(versioned: Any, sqlite_engine: Engine) -> None:
    """A version's columns have the attributes' names; their hashes follow, those over several columns too."""

    class Base(DeclarativeBase):
        pass

    class Guest(Base):
        __tablename__ = "guest"
        __versioned__: Any = {}  # noqa: RUF012 - Continuum's declaration, and History's
        id: Mapped[int] = mapped_column(primary_key=True)
        mrn: Mapped[str] = mapped_column("record_number", Encrypted(String(20), searchable=True))
        mail: Mapped[str] = mapped_column("m", Encrypted(String(20), searchable=True), key="k")
        mail_end = hash_index("mail", transform=last(2))
        both = hash_index("mail", "mrn", transform=together)

    configure_mappers()
    Base.metadata.create_all(sqlite_engine)
    version = versioned.version_class(Guest)
    table = version.__table__
    with Session(sqlite_engine) as session:
        guest = Guest(id=1, mrn="A-1", mail="a@x.org")
        session.add(guest)
        session.commit()
        guest.mrn = "B-2"
        session.commit()
        for criterion, found in (
            (version.mrn == "B-2", ["B-2"]),
            (version.mail == "a@x.org", ["A-1", "B-2"]),
            (table.c.mail_end_hash == "rg", ["A-1", "B-2"]),
            (table.c.both_hash == "a@x.org/A-1", ["A-1"]),
        ):
            assert sorted(session.scalars(select(version.mrn).where(criterion))) == found
        guest.versions[0].revert()
        session.commit()
        assert session.scalars(select(Guest.id).where(Guest.both == "a@x.org/A-1")).all() == [1]
