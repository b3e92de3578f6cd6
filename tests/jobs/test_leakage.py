"""What hashes show, beside the same arithmetic in Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, String, delete
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, Encrypted, hash_index
from sqla_byok.jobs import leakage
from sqla_byok.normalize import first
from sqla_byok.testing import byok_for_tests


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "lk_guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    city: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))
    city_first = hash_index("city", transform=first(1))


class Stay(Base):
    __tablename__ = "lk_stay"
    __byok_tenant__ = "org"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column(String(20))
    room: Mapped[str | None] = mapped_column(Encrypted(String(20), searchable=True))


@pytest.fixture
def byok(engine: Engine) -> Iterator[Byok]:
    byok = byok_for_tests(engine, "t1")
    byok.onboard("t2", byok_key())
    Base.metadata.create_all(engine)
    yield byok
    byok.close()


def byok_key() -> object:
    import secrets

    from sqla_byok.testing import FakeKms

    return FakeKms(f"leak-{secrets.token_hex(4)}")


def guessed(values: list[str]) -> float:
    """Who knows the distribution gives values of one frequency out by chance, of which one is right."""
    frequencies = Counter(Counter(values).values())
    return sum(n for n in frequencies) / len(values)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.sampled_from(["t1", "t2"]), st.sampled_from([None, *"abcdefg"])), min_size=1)
)
def test_as_counted_in_python(byok: Byok, engine: Engine, rows: list[tuple[str, str | None]]) -> None:
    with byok.sealed(actor="test", reason="empty"), engine.begin() as connection:
        connection.execute(delete(Guest.__table__))
        connection.exec_driver_sql("DELETE FROM lk_stay")
    for tenant in ("t1", "t2"):
        with byok.session(tenant, engine) as session:
            for number, (whose, value) in enumerate(rows, 1):
                if whose == tenant:
                    session.add(Guest(id=number, city=value))
                    session.add(Stay(id=number, org=tenant, room=value))
            session.commit()
    found = leakage(byok, engine, Base)
    for column in ("lk_guest.city", "lk_guest.city_first", "lk_stay.room"):
        for tenant in ("t1", "t2"):
            values = [value for whose, value in rows if whose == tenant and value is not None]
            mine = [each for each in found if (each.tenant, each.column) == (tenant, column)]
            if not values:
                assert mine == []
                continue
            (one,) = mine
            shares = sorted((n / len(values) for n in Counter(values).values()), reverse=True)
            assert (one.rows, one.distinct) == (len(values), len(set(values)))
            assert one.largest == pytest.approx(shares[:5])
            assert one.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares), abs=1e-9)
            assert one.guessed == pytest.approx(guessed(values))
