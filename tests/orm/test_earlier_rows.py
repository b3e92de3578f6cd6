"""Rows from before, in a table that the keystore does not know: told of, instead of not found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, String, delete, event, inspect, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, Encrypted, NotEncryptedError, NotSearchableError, TamperedError
from sqla_byok.jobs import rehash
from sqla_byok.testing import FakeKms, byok_for_tests


def member(table: str, tenant: bool = False, unique: bool = False, **options: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Member(Base):
        __tablename__ = table
        id: Mapped[int] = mapped_column(primary_key=True)
        org: Mapped[str | None] = mapped_column(String(20))
        mail: Mapped[str | None] = mapped_column(
            Encrypted(String(40), searchable=True, **options), unique=unique
        )
        if tenant:
            __byok_tenant__ = "org"

    return Member


@pytest.fixture
def byok(engine: Engine) -> Iterator[Byok]:
    byok = byok_for_tests(engine, "t", clock=_Clock())
    yield byok
    byok.close()


class _Clock:
    def __init__(self) -> None:
        self.turned = 0.0

    def boot(self) -> float:
        return 1_000.0 + self.turned

    def wall(self) -> float:
        return 1_700_000_000.0 + self.turned

    def sleep(self, seconds: float) -> None:
        self.turned += seconds


def renamed(byok: Byok, engine: Engine, old: Any, new: str) -> None:
    """A table with rows, renamed in the database."""
    old.metadata.create_all(engine)
    with byok.session("t", engine) as session:
        session.add_all([old(id=n, org="t", mail=f"m{n}") for n in (1, 2)])
        session.commit()
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {old.__tablename__} RENAME TO {new}"))


@pytest.mark.parametrize("tenant", [False, True], ids=["by its header", "by its tenant column"])
def test_a_renamed_table_is_told_of(byok: Byok, engine: Engine, tenant: bool) -> None:
    """A search does not find nothing, and a DELETE by it does not delete nothing; reading says what to declare."""
    renamed(byok, engine, member("er_old", tenant), "er_new")
    new = member("er_new", tenant)
    for statement in (select(new.id).where(new.mail == "m1"), delete(new).where(new.mail == "m1")):
        with byok.session("t", engine) as session, pytest.raises(NotSearchableError, match="byok rehash"):
            session.execute(statement)
    with byok.session("t", engine) as session, pytest.raises(TamperedError, match="column_id="):
        session.scalars(select(new)).all()
    again = member("er_new", tenant, column_id="er_old.mail")
    with byok.session("t", engine) as session:
        assert session.scalars(select(again.id).where(again.mail == "m1")).all() == [1]


def test_a_unique_column_lets_nothing_in_twice(byok: Byok, engine: Engine) -> None:
    renamed(byok, engine, member("er_old", unique=True), "er_new")
    new = member("er_new", unique=True)
    with byok.session("t", engine) as session:
        session.add(new(id=3, mail="m1"))
        with pytest.raises(NotSearchableError, match="twice"):
            session.flush()


@pytest.mark.parametrize("tenant", [False, True], ids=["by its header", "by its tenant column"])
def test_copied_rows_are_told_of(byok: Byok, engine: Engine, tenant: bool) -> None:
    """The table that they come from is there still; rows of another tenant in the copy are nobody's business."""
    old, new = member("er_old", tenant), member("er_new", tenant)
    for model in (old, new):
        model.metadata.create_all(engine)
    byok.onboard("u", FakeKms("er-u"))
    for whose, id_ in (("t", 1), ("u", 2)):
        with byok.session(whose, engine) as session:
            session.add(old(id=id_, org=whose, mail="m1"))
            session.commit()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO er_new SELECT * FROM er_old WHERE id = 1"))
    with byok.session("t", engine) as session, pytest.raises(NotSearchableError, match="byok rehash"):
        session.scalars(select(new.id).where(new.mail == "m1")).all()
    with byok.session("u", engine) as session:
        assert session.scalars(select(new.id).where(new.mail == "m1")).all() == []


def test_a_new_tenants_tables_are_not_looked_at(byok: Byok, engine: Engine) -> None:
    """A table is looked through once by each tenant that has written to another one before."""
    first, second = member("er_first"), member("er_second")
    for model in (first, second):
        model.metadata.create_all(engine)
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    with byok.session("t", engine) as session:
        session.add(first(id=1, mail="m1"))
        session.commit()
    assert [each.partition(" ")[0] for each in sent] == ["INSERT"]
    with byok.session("t", engine) as session:
        session.add(second(id=1, mail="m1"))
        session.commit()
    with byok.session("t", engine) as session:
        assert session.scalars(select(second.id).where(second.mail == "m1")).all() == [1]
        session.add(second(id=2, mail="m1"))
        session.commit()
    looked = [each for each in sent if "er_second" in each and each.startswith("SELECT")]
    assert len(looked) == 2, "the look, and the search"


def test_plaintext_from_before_is_told_of(byok: Byok, engine: Engine) -> None:
    """A search would not find it; reading says so anyway."""
    first, second = member("er_first"), member("er_second")
    for model in (first, second):
        model.metadata.create_all(engine)
    with byok.session("t", engine) as session:
        session.add(first(id=1, mail="m1"))
        session.commit()
    with engine.begin() as connection:
        value = "CAST('Ada' AS BYTEA)" if engine.dialect.name == "postgresql" else "CAST('Ada' AS BINARY)"
        value = "CAST('Ada' AS BLOB)" if engine.dialect.name == "sqlite" else value
        connection.exec_driver_sql(f"INSERT INTO er_second (id, mail) VALUES (1, {value})")
    for _ in range(2):
        with byok.session("t", engine) as session, pytest.raises(NotEncryptedError, match="er_second"):
            session.scalars(select(second.id).where(second.mail == "Ada"))


def test_a_rehash_opens_what_was_told_of(byok: Byok, engine: Engine) -> None:
    """Where the column keeps its id and only the keystore's note of the table is gone, as after a restore."""
    renamed(byok, engine, member("er_old", tenant=True, column_id="er.mail"), "er_new")
    new = member("er_new", tenant=True, column_id="er.mail")
    with byok.session("t", engine) as session:
        assert session.scalars(select(new.id).where(new.mail == "m2")).all() == [2]
    assert rehash(byok, engine, new).counts["already"] == 2
    assert inspect(engine).has_table("er_new")
