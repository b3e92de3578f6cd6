"""SQLModel classes: encrypted fields, searchable ones and further indexes, as SQLModel has its fields declared."""

import json
from datetime import date
from typing import Any, ClassVar

import pytest
from pydantic import ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError
from sqlalchemy import JSON, Column, Date, Engine, MetaData, String
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, Session, SQLModel, select

from sqla_byok import Byok, Encrypted, Sealed, hash_index
from sqla_byok.normalize import casefold, email_domain, first, last, named


@named("name-year")
def name_year(name: str, born: date) -> str:
    """A transform over two fields."""
    return f"{name}/{born.year}"


class Base(SQLModel):
    """Tells Pydantic once that an index is no field."""

    metadata = MetaData()
    model_config = ConfigDict(ignored_types=(hash_index,))


class Named(Base):
    """Fields and an index that a table and a request body share, as SQLModel recommends."""

    name: str = Field(sa_type=Encrypted(String(20)), max_length=20)
    name_start = hash_index("name", transform=first(2))


class Guest(Named, table=True):
    """A table with every way to declare a field."""

    __tablename__ = "sm_guest"
    id: int | None = Field(default=None, primary_key=True)
    code: str = Field(sa_type=Encrypted(String(20), searchable=True), unique=True)
    mail: str | None = Field(
        default=None, sa_column=Column("mail_db", Encrypted(String(80), searchable=True, normalize=casefold))
    )
    born: date = Field(sa_type=Encrypted(Date))
    notes: dict[str, Any] = Field(default_factory=dict, sa_type=Encrypted(JSON))
    domain = hash_index("mail", transform=email_domain)
    who = hash_index("name", "born", transform=name_year)
    code_end: ClassVar[hash_index[str]] = hash_index("code", transform=last(1))


class Staff(Named, table=True):
    """Another table of the same base, with salts of its own."""

    __tablename__ = "sm_staff"
    id: int | None = Field(default=None, primary_key=True)


FIELDS = {"name", "id", "code", "mail", "born", "notes"}
HASHES = {"name_start_hash", "code_hash", "mail_db_hash", "domain_hash", "who_hash", "code_end_hash"}


@pytest.fixture
def data(byok: Byok, engine: Engine) -> Engine:
    """The engine, with a guest and one of the staff."""
    Base.metadata.create_all(engine)
    with Session(engine.execution_options(byok_tenant="t1")) as session:
        session.add(Guest(name="Ada", code="A-1", mail="Ada@Example.org", born=date(1815, 12, 10)))
        session.add(Staff.model_validate(Named(name="Bob").model_dump()))
        session.commit()
    return engine


def test_an_index_is_a_column_and_no_field() -> None:
    """The table has the hashes; the model knows nothing of them."""
    table: Any = Guest.__table__  # type: ignore[attr-defined]
    assert set(Guest.model_fields) == FIELDS
    assert {column.name for column in table.c} == (FIELDS - {"mail"}) | {"mail_db"} | HASHES
    assert set(Staff.__table__.c.keys()) == {"name", "id", "name_start_hash"}  # type: ignore[attr-defined]


def test_rows_are_found_and_changed(data: Engine) -> None:
    """By the value, and by every index; a flush keeps them in step."""
    with Session(data.execution_options(byok_tenant="t1")) as session:
        found: list[Any] = [
            Guest.code == "A-1",
            Guest.mail == "ada@example.ORG",
            Guest.name_start == "Ad",
            Guest.domain == "example.org",
            Guest.who == "Ada/1815",
            Guest.code_end == "1",
        ]
        for criterion in found:
            assert session.exec(select(Guest.name).where(criterion)).all() == ["Ada"]
        assert session.exec(select(Staff.name).where(Staff.name_start == "Bo")).all() == ["Bob"]
        ada = session.exec(select(Guest)).one()
        ada.sqlmodel_update({"born": date(1900, 1, 1), "notes": {"a": 1}})
        session.commit()
        assert session.exec(select(Guest.notes).where(Guest.who == "Ada/1900")).all() == [{"a": 1}]
        session.add(Guest(name="Eve", code="A-1", born=date(1900, 1, 1)))
        with pytest.raises(IntegrityError):
            session.commit()


def test_models_validate_and_dump_their_fields(data: Engine) -> None:
    """As if nothing were encrypted."""
    with Session(data.execution_options(byok_tenant="t1")) as session:
        ada = session.exec(select(Guest)).one()
        assert (ada.name_start, ada.domain, ada.who, ada.code_end) == ("Ad", "example.org", "Ada/1815", "1")
        dumped = ada.model_dump()
        assert dumped == {
            "name": "Ada", "id": 1, "code": "A-1", "mail": "Ada@Example.org", "born": date(1815, 12, 10), "notes": {},
        }  # fmt: skip
        assert Guest.model_validate(json.loads(ada.model_dump_json())).model_dump() == dumped
        with pytest.raises(ValidationError):
            Named(name="x" * 21)


def test_sealed_objects_show_nothing(byok: Byok, data: Engine) -> None:
    """They print, stand in no JSON, and are no valid input."""
    with byok.sealed(actor="ada", reason="ticket"), Session(data) as session:
        ada = session.exec(select(Guest)).one()
        assert isinstance(ada.code, Sealed)
        assert isinstance(ada.who, Sealed)
        assert "<Sealed sm_guest.code>" in repr(ada)
        with pytest.raises(PydanticSerializationError):
            ada.model_dump_json(warnings=False)
        with pytest.raises(ValidationError):
            Guest.model_validate(ada.model_dump(warnings=False))
        session.delete(ada)
        session.commit()
        assert session.exec(select(Guest.id)).all() == []
