"""Results in PostgreSQL's binary format: the same values as by text, or text."""

from __future__ import annotations

import enum
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.adapt import Loader
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Engine,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Text,
    Time,
    Uuid,
    create_engine,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_byok import Byok, Encrypted, UnsupportedQueryError

pytestmark = pytest.mark.parametrize("sync_url", ["postgresql"], indirect=True)


class Colour(enum.Enum):
    RED = 1


ZONE = timezone(timedelta(hours=2))
ALIKE: dict[str, tuple[Any, Any]] = {
    "small": (SmallInteger(), -7),
    "number": (Integer(), 2**31 - 1),
    "big": (BigInteger(), -(2**63)),
    "yes": (Boolean(), True),
    "real": (Float(53), 0.1),
    "exact": (Numeric(20, 5), Decimal("-123456789.00010")),
    "as_float": (Numeric(10, 2, asdecimal=False), 1.25),
    "word": (String(20), "é\u20ac\U0001f511"),
    "words": (Text(), ""),
    "raw": (LargeBinary(), bytes(range(256))),
    "day": (Date(), date(1, 1, 1)),
    "moment": (DateTime(), datetime(2026, 2, 28, 23, 59, 59, 999999)),  # noqa: DTZ001 - without a zone
    "instant": (DateTime(timezone=True), datetime(2026, 2, 28, 12, tzinfo=ZONE)),
    "hour": (Time(), time(23, 59, 59, 1)),
    "span": (Interval(), timedelta(days=-3, microseconds=1)),
    "uuid": (Uuid(), UUID(int=7)),
    "uuid_text": (Uuid(as_uuid=False), str(UUID(int=7))),
    "json": (JSON(), {"a": [1, None, "é"]}),
    "jsonb": (JSONB(), {"a": [1.5, True]}),
    "enum_text": (Enum(Colour, native_enum=False), Colour.RED),
}
NOT_ALIKE: dict[str, tuple[Any, Any]] = {
    "enum": (Enum(Colour, name="byok_colour"), Colour.RED),
    "real4": (REAL(), 0.5),
}


@pytest.fixture
def formats(engine: Engine) -> list[int]:
    """The formats in which the statements of an engine were fetched."""
    seen: list[int] = []
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[1].format))
    return seen


def table_of(engine: Engine, columns: dict[str, tuple[Any, Any]]) -> Table:
    table = Table(
        "mixed",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("secret", Encrypted(String(40))),
        *(Column(name, type_) for name, (type_, _) in columns.items()),
    )
    table.metadata.create_all(engine)
    return table


def fill(byok: Byok, engine: Engine, table: Any, columns: dict[str, tuple[Any, Any]]) -> None:
    values = {name: value for name, (_, value) in columns.items()}
    with byok.tenant("t1"), engine.begin() as connection:
        connection.execute(insert(table), {"id": 1, "secret": "s", **values})
        connection.execute(insert(table), {"id": 2})


def test_the_same_values_come_of_both_formats(byok: Byok, engine: Engine, formats: list[int]) -> None:
    """Every type that is fetched in binary gives what it gives as text, NULL too; the first execution is by text."""
    table: Any = table_of(engine, ALIKE)
    fill(byok, engine, table, ALIKE)
    formats.clear()
    with byok.tenant("t1"), engine.connect() as connection:
        rows = [connection.execute(select(table).order_by(table.c.id)).all() for _ in range(3)]
    assert formats == [0, 1, 1]
    assert rows[0] == rows[1] == rows[2]
    assert [[type(cell) for cell in row] for row in rows[0]] == [[type(c) for c in row] for row in rows[1]]
    assert rows[1][0][1:] == ("s", *(value for _, value in ALIKE.values()))
    assert set(rows[1][1][1:]) == {None}


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_what_comes_out_otherwise_is_fetched_as_text(
    byok: Byok, engine: Engine, formats: list[int], name: str
) -> None:
    """A native enum and the like stay with text, beside an encrypted column as alone."""
    table: Any = table_of(engine, {name: NOT_ALIKE[name]})
    fill(byok, engine, table, {name: NOT_ALIKE[name]})
    formats.clear()
    with byok.tenant("t1"), engine.connect() as connection:
        for _ in range(3):
            row = connection.execute(select(table).where(table.c.id == 1)).one()
            assert row[1:] == ("s", NOT_ALIKE[name][1])
    assert set(formats) == {0}


def test_a_statement_without_encrypted_columns_is_left_alone(
    byok: Byok, engine: Engine, formats: list[int]
) -> None:
    """What does not concern us is fetched as ever."""
    table: Any = table_of(engine, {})
    with engine.connect() as connection:
        for _ in range(3):
            connection.execute(select(table.c.id)).all()
    assert set(formats) == {0}


def test_a_loader_of_the_applications_is_not_passed_over(
    byok: Byok, engine: Engine, formats: list[int]
) -> None:
    """Whoever has psycopg load a type in a way of his own gets it so each time."""

    class Shouted(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    @event.listens_for(engine, "connect")
    def adapt(dbapi_connection: Any, _: Any) -> None:
        dbapi_connection.adapters.register_loader("varchar", Shouted)

    engine.dispose()
    columns = {"word": (String(20), "quiet")}
    table: Any = table_of(engine, columns)
    fill(byok, engine, table, columns)
    formats.clear()
    with byok.tenant("t1"), engine.connect() as connection:
        found = [connection.scalar(select(table.c.word, table.c.secret)) for _ in range(3)]
    assert found == ["QUIET"] * 3
    assert set(formats) == {0}


def test_a_type_that_changes_is_noticed(byok: Byok, engine: Engine) -> None:
    """A column whose type is altered meanwhile is never read wrong: refused once, then read as text."""
    columns = {"word": (String(20), "RED")}
    table: Any = table_of(engine, columns)
    fill(byok, engine, table, columns)
    query = select(table.c.word, table.c.secret).where(table.c.id == 1)
    with byok.tenant("t1"), engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(2):
            assert connection.execute(query).all() == [("RED", "s")]
        connection.execute(text("CREATE TYPE byok_colour AS ENUM ('RED')"))
        connection.execute(text("ALTER TABLE mixed ALTER word TYPE byok_colour USING word::byok_colour"))
        with pytest.raises(UnsupportedQueryError, match="execute it again"):
            connection.execute(query)
        for _ in range(2):
            assert connection.execute(query).all() == [("RED", "s")]
        connection.execute(text("DROP TABLE mixed"))
        connection.execute(text("DROP TYPE byok_colour"))


def test_cursors_that_know_no_binary_are_left_alone(byok: Byok, engine: Engine) -> None:
    """psycopg's client-side cursors refuse binary results."""
    table: Any = table_of(engine, {})
    fill(byok, engine, table, {})
    client = create_engine(engine.url, connect_args={"cursor_factory": psycopg.ClientCursor})
    byok.attach(client)
    with byok.tenant("t1"), client.connect() as connection:
        for _ in range(3):
            assert connection.scalars(select(table.c.secret).order_by(table.c.id)).all() == ["s", None]
    client.dispose()


def test_returning_comes_in_binary_too(byok: Byok, engine: Engine, formats: list[int]) -> None:
    """RETURNING of one row and of many gives the same values each time."""
    table: Any = table_of(engine, {"word": (String(20), "w")})
    with byok.tenant("t1"), engine.connect() as connection:
        for number in range(3):
            one = insert(table).returning(table.c.secret, table.c.word)
            assert connection.execute(one, {"secret": f"s{number}", "word": "w"}).all() == [
                (f"s{number}", "w")
            ]
            many = [{"secret": f"{number}-{n}", "word": "w"} for n in range(3)]
            assert sorted(connection.execute(one, many).scalars()) == [row["secret"] for row in many]
    assert 1 in formats


async def test_under_asyncio(byok: Byok, engine: Engine) -> None:
    """psycopg's async cursors are asked for binary likewise."""
    table: Any = table_of(engine, ALIKE)
    asynchronous = create_async_engine(engine.url.set(drivername="postgresql+psycopg"))
    seen: list[int] = []
    event.listen(
        asynchronous.sync_engine, "before_cursor_execute", lambda *args: seen.append(args[1]._cursor.format)
    )
    byok.attach(asynchronous)
    values = {name: value for name, (_, value) in ALIKE.items()}
    async with byok.tenant("t1"), asynchronous.connect() as connection:
        await connection.execute(insert(table), {"id": 1, "secret": "s", **values})
        seen.clear()
        rows = [(await connection.execute(select(table))).all() for _ in range(3)]
    await asynchronous.dispose()
    assert rows[0] == rows[1] == rows[2] == [(1, "s", *values.values())]
    assert seen == [0, 1, 1]
