"""byok_for_tests: one line, and an application's models work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, String, create_engine, select, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_byok import Byok, Encrypted, LocalKms
from sqla_byok.errors import ConfigurationError, KeyDisabledError, KeystoreUnavailableError
from sqla_byok.testing import FakeKms, byok_for_tests


class Base(DeclarativeBase):
    """An application's models."""


class Patient(Base):
    """One of them."""

    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Encrypted(String(60), searchable=True))


FIND_ADA = select(Patient).where(Patient.name == "Ada")


def test_a_plain_session_works(engine: Engine, byok_fake_kms: FakeKms) -> None:
    """Tests that open sessions of their own go on, their values are encrypted, and the key is the test's to disable."""
    with contextlib.closing(byok_for_tests(engine, kms=byok_fake_kms)) as byok:
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Patient(name="Ada"))
            session.commit()
            assert session.scalars(FIND_ADA).one().name == "Ada"
            assert b"Ada" not in bytes(session.scalar(text("SELECT name FROM patient")) or b"")
        assert byok.tenants() == ["t"]
        assert byok_fake_kms.calls_for("t") == {"wrap": 1, "unwrap": 2}
        byok_fake_kms.disable()
        byok.forget_keys()
        with Session(engine) as session, pytest.raises(KeyDisabledError):
            session.scalars(FIND_ADA).all()


@pytest.fixture
def byok_of_async_engine(async_engine: AsyncEngine) -> Iterator[Byok]:
    """As a user's conftest has it: a plain fixture, without an event loop."""
    with contextlib.closing(byok_for_tests(async_engine, "org-1")) as byok:
        yield byok


async def test_an_async_engine_works(async_engine: AsyncEngine, byok_of_async_engine: Byok) -> None:
    """The same line serves asyncio; the engine needs no event loop of its own for it."""
    async with async_engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(async_engine) as session:
        session.add(Patient(name="Ada"))
        await session.commit()
        assert (await session.scalars(FIND_ADA)).one().name == "Ada"


def test_options_and_kms_are_the_callers(engine: Engine, local_kms: LocalKms) -> None:
    """What a test says of the Byok or the key goes before what the line would choose."""
    byok = byok_for_tests(engine, kms=local_kms, single_tenant=None)
    with pytest.raises(ConfigurationError, match="revoke_within"):
        byok_for_tests(engine, revoke_within=0.5)
    byok.onboard("other", FakeKms("other"))
    assert byok.tenants() == ["other", "t"]
    byok.close()


def test_closing_closes_the_keystore(engine: Engine) -> None:
    """A run of a thousand tests does not end with a thousand open databases."""
    byok = byok_for_tests(engine)
    byok.close()
    with pytest.raises(KeystoreUnavailableError, match="closed"):
        byok.tenants()
    byok.close()


def test_a_failure_says_what_is_wrong(engine: Engine) -> None:
    """An engine that another test's Byok still owns is named, and nothing is left open."""
    byok = byok_for_tests(engine)
    with pytest.raises(ConfigurationError, match="another Byok"):
        byok_for_tests(engine)
    byok.close()
    with pytest.raises(ArgumentError):
        byok_for_tests(create_engine("sqlite://"), keystore="nonsense")
