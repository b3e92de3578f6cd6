"""Values of every type through encrypted columns: what comes back, what is stored, what is refused."""

import copy
import enum
import json
import pickle
import traceback
import warnings
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    CHAR,
    JSON,
    VARCHAR,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
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
    TypeDecorator,
    Unicode,
    Uuid,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateColumn

from sqla_byok import Byok, Encrypted, LeakWarning
from sqla_byok.errors import DeclarationError, DecryptError, EncodeError, TamperedError, UnsupportedQueryError
from sqla_byok.kms import Kms
from sqla_byok.normalize import casefold

on_sqlite = pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)

SECRET = "Zaubertrank-4711"
EAST = timezone(timedelta(hours=5, minutes=30))


class Color(enum.Enum):
    RED = "r"
    ULTRAMARINE = "u"
    CRIMSON = "r"  # noqa: PIE796 - an alias is meant


class Size(str, enum.Enum):
    SMALL = "s"
    LARGE = "l"


class Money(TypeDecorator[Decimal]):
    """A user's type: cents as an integer."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


class Upper(TypeDecorator[str]):
    impl = String(5)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return "NOTHING"[:5] if value is None else value.upper()


class Bracketed(TypeDecorator[str]):
    """A user's type around a user's type."""

    impl = Upper
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else f"<{value}>"

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value[1:-1]


class Guid(TypeDecorator[UUID]):
    """A user's type that is another one on each database."""

    impl = CHAR(32)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(Uuid() if dialect.name == "postgresql" else CHAR(32))

    def process_bind_param(self, value: UUID | None, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else value.hex

    def process_result_value(self, value: Any, dialect: Dialect) -> UUID | None:
        return value if value is None or isinstance(value, UUID) else UUID(value)


ID = UUID("00112233-4455-6677-8899-aabbccddeeff")

# type, value, what is read back (... for the same), bytes of the plaintext
VALUES: dict[str, tuple[Any, Any, Any, int]] = {
    "string": (String(20), "Ä-1 🙂", ..., 9),
    "empty": (String(20), "", ..., 0),
    "longest": (String(5), "🙂" * 5, ..., 20),
    "text": (Text, "x" * 70_000, ..., 70_000),
    "unicode": (Unicode(9), "Žluť", ..., 6),
    "str_enum": (String(9), Size.SMALL, "s", 1),
    "bytes": (LargeBinary, b"\x00\xff\x00", ..., 3),
    "bytearray": (LargeBinary(9), bytearray(b"ab"), b"ab", 2),
    "integer": (Integer, -5, ..., 8),
    "big": (BigInteger, 2**63 - 1, ..., 8),
    "small": (SmallInteger, -(2**15), ..., 8),
    "float": (Float, 0.1, ..., 8),
    "float_infinite": (Float(), float("-inf"), ..., 8),
    "float_decimal": (Float(asdecimal=True), Decimal("0.25"), ..., 8),
    "numeric": (Numeric(10, 2), Decimal("-12.3"), Decimal("-12.30"), 6),
    "numeric_free": (Numeric, Decimal("1E+3"), Decimal(1000), 4),
    "numeric_float": (Numeric(10, 2, asdecimal=False), 12.5, ..., 5),
    "true": (Boolean, True, ..., 1),
    "false": (Boolean(), False, ..., 1),
    "date": (Date, date(1815, 12, 10), ..., 10),
    "naive": (DateTime, datetime(2024, 2, 29, 1, 2, 3, 4), ..., 26),  # noqa: DTZ001
    "aware": (
        DateTime(timezone=True),
        datetime(2024, 2, 29, 1, 2, 3, tzinfo=EAST),
        datetime(2024, 2, 28, 19, 32, 3, tzinfo=timezone.utc),
        27,
    ),
    "time": (Time, time(23, 59, 59, 999_999), ..., 15),
    "interval": (Interval, timedelta(days=-3, microseconds=7), ..., 16),
    "uuid": (Uuid, ID, ..., 16),
    "uuid_str": (Uuid(as_uuid=False), ID.hex, str(ID), 16),
    "enum": (Enum("a", "bcd", name="letters"), "a", ..., 3),
    "enum_class": (Enum(Color), Color.RED, ..., 11),
    "enum_name": (Enum(Color), "ULTRAMARINE", Color.ULTRAMARINE, 11),
    "enum_aliases": (Enum(Color, omit_aliases=False), Color.CRIMSON, Color.RED, 11),
    "enum_values": (Enum(Color, values_callable=lambda c: [m.value for m in c]), Color.ULTRAMARINE, ..., 1),
    "enum_str": (Enum(Size), Size.LARGE, ..., 5),
    "json": (JSON, {"a": [1, None, "ä"]}, ..., 26),
    "json_null": (JSON, JSON.NULL, None, 4),
    "json_false": (JSON(none_as_null=True), False, ..., 5),
    "jsonb": (postgresql.JSONB(), [1], ..., 3),
    "money": (Money, Decimal("12.34"), ..., 8),
    "upper": (Upper, "abc", "ABC", 3),
    "nested": (Bracketed, "abc", "ABC", 5),
    "guid": (Guid, ID, ..., {"postgresql": 16}),  # type: ignore[dict-item]
    "dialect_type": (mysql.TINYINT(), 7, ..., 8),
}


@pytest.fixture
def every_type() -> Table:
    """A column of each type, and a searchable twin where there can be one."""
    columns = []
    for name, (type_, *_) in VALUES.items():
        columns.append(Column(name, Encrypted(type_)))
        if "json" not in name and name != "float_infinite":  # those have no search text
            columns.append(Column(f"s_{name}", Encrypted(type_, searchable=True)))
    return Table("every", MetaData(), Column("id", Integer, primary_key=True), *columns)


def column_names(table: Table) -> list[str]:
    return [c.name for c in table.c if isinstance(c.type, Encrypted)]


def test_every_type_round_trips(every_type: Table, byok: Byok, engine: Engine) -> None:
    """On each database a value of each type comes back as from a plain column, is found, and is stored encrypted."""
    every_type.create(engine)
    row = {name: VALUES[name.removeprefix("s_")][1] for name in column_names(every_type)}
    expected = {
        name: value if (back := VALUES[name.removeprefix("s_")][2]) is ... else back
        for name, value in row.items()
    }
    nothing = dict.fromkeys(row)
    with byok.session("t1", engine) as session:
        session.execute(insert(every_type), row)
        session.execute(insert(every_type), nothing)
        session.commit()
        found = session.execute(select(*(every_type.c[name] for name in row)).order_by(every_type.c.id)).all()
        assert dict(found[0]._mapping) == expected
        assert {name: type(value) for name, value in found[0]._mapping.items()} == {
            name: type(value) for name, value in expected.items()
        }
        of_none = dict(found[1]._mapping)
        assert {name: value for name, value in of_none.items() if value is not None} == {
            "upper": "NOTHI",
            "s_upper": "NOTHI",
            "nested": "OTH",
            "s_nested": "OTH",
        }
        ids = {
            name: session.scalars(select(every_type.c.id).where(every_type.c[name] == value)).all()
            for name, value in row.items()
            if name.startswith("s_")
        }
        assert ids == {name: [1] for name in ids}
        stored = session.execute(
            select(*(type_coerce(every_type.c[name], LargeBinary).label(name) for name in row)).where(
                every_type.c.id == 1
            )
        ).one()
    sizes = {name: VALUES[name.removeprefix("s_")][3] for name in row}
    sizes = {
        name: size.get(engine.dialect.name, 32) if isinstance(size, dict) else size
        for name, size in sizes.items()
    }
    assert {name: len(bytes(value)) - 46 for name, value in stored._mapping.items()} == sizes
    assert {bytes(value)[:2] for value in stored} == {b"\xb1\x01"}


async def test_every_type_round_trips_async(
    every_type: Table, abyok: Byok, async_engine: AsyncEngine
) -> None:
    """So it does with each async driver."""
    row = {name: VALUES[name.removeprefix("s_")][1] for name in column_names(every_type)}
    async with async_engine.begin() as connection:
        await connection.run_sync(every_type.create)
    async with abyok.asession("t1", async_engine) as session:
        await session.execute(insert(every_type), row)
        found = (await session.execute(select(*(every_type.c[name] for name in row)))).one()
    assert dict(found._mapping) == {
        name: value if (back := VALUES[name.removeprefix("s_")][2]) is ... else back
        for name, value in row.items()
    }


STRATEGIES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "str": (String, st.text()),
    "bytes": (LargeBinary, st.binary()),
    "int": (BigInteger, st.integers(-(2**63), 2**63 - 1)),
    "float": (Float, st.floats(allow_nan=False, allow_infinity=False)),
    "numeric": (Numeric, st.decimals(allow_nan=False, allow_infinity=False, places=6)),
    "bool": (Boolean, st.booleans()),
    "date": (Date, st.dates()),
    "naive": (DateTime, st.datetimes()),
    "aware": (
        DateTime(timezone=True),
        st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.timezones()),  # noqa: DTZ001
    ),
    "time": (Time, st.times()),
    "interval": (Interval, st.timedeltas()),
    "uuid": (Uuid, st.uuids()),
    "enum": (Enum(Color), st.sampled_from(Color)),
    "json": (
        JSON,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ).filter(lambda value: value is not None),
    ),
}


@pytest.mark.parametrize("pad_to", [None, 16])
@on_sqlite
def test_any_value_round_trips(pad_to: int | None, byok: Byok, engine: Engine) -> None:
    """Whatever the value: it reads back equal, and equality finds exactly its row."""
    columns = [
        Column(name, Encrypted(type_, searchable=name != "json", pad_to=pad_to))
        for name, (type_, _) in STRATEGIES.items()
    ]
    table = Table("any", MetaData(), Column("id", Integer, primary_key=True), *columns)
    table.create(engine)

    with byok.session("t1", engine) as session:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.fixed_dictionaries({name: strategy for name, (_, strategy) in STRATEGIES.items()}))
        def check(row: dict[str, Any]) -> None:
            session.execute(table.delete())
            session.execute(insert(table), [{"id": 1, **row}])
            session.execute(insert(table).values(id=2))
            found = session.execute(select(*(table.c[name] for name in row)).where(table.c.id == 1)).one()
            # As UTC: Python holds a moment in or near a change of the clocks to differ from itself in another zone.
            assert dict(found._mapping) == {**row, "aware": row["aware"].astimezone(timezone.utc)}
            searched = [table.c[name] == value for name, value in row.items() if name != "json"]
            assert session.scalars(select(table.c.id).where(*searched)).all() == [1]

        check()


# -- JSON and mutable values -----------------------------------------------------------------------------------------


def test_json_null_and_none(byok: Byok, engine: Engine) -> None:
    """JSON's own rules: None is JSON's null, or NULL with none_as_null; unset and null() are NULL; all read as None."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        plain: Mapped[Any] = mapped_column(JSON, nullable=True)
        body: Mapped[Any] = mapped_column(Encrypted(JSON), nullable=True)
        as_null: Mapped[Any] = mapped_column(Encrypted(JSON(none_as_null=True)), nullable=True)

    Base.metadata.create_all(engine)
    table: Any = Note.__table__
    given = [None, JSON.NULL, ..., null(), {}]
    rows = [{} if value is ... else {"plain": value, "body": value, "as_null": value} for value in given]
    with byok.session("t1", engine) as session:
        session.add_all([Note(**row) for row in rows])
        session.flush()
        for row in rows:
            session.execute(insert(Note), [row])
            session.execute(insert(table).values(**row))
            session.connection().execute(insert(table), [row])
        updated = Note(body={}, plain={}, as_null={})
        session.add(updated)
        session.commit()
        updated.body = updated.plain = updated.as_null = None
        session.commit()
        found = session.execute(select(Note.body, Note.as_null).order_by(Note.id)).all()
        documents = [row[0] for row in found]
        assert [one for one in documents if one is not None] == [{}] * 4
        raw = [type_coerce(table.c[key], LargeBinary).is_(None) for key in ("body", "as_null")]
        stored = session.execute(select(Note.plain.is_(None), *raw).order_by(Note.id)).all()
        assert [body for _, body, _ in stored] == [plain for plain, _, _ in stored]
        assert [row[2] for row in stored[:5]] == [True, False, True, True, False]
        assert tuple(stored[-1]) == (False, False, True)


def test_a_type_that_evaluates_none_is_given_it(byok: Byok, engine: Engine) -> None:
    """evaluates_none(), of the type inside or of Encrypted itself: a default does not take the place of a None."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        inner: Mapped[str | None] = mapped_column(Encrypted(String(9).evaluates_none()), default="x")
        outer: Mapped[str | None] = mapped_column(
            Encrypted(String(9), searchable=True).evaluates_none(), default="x"
        )
        plain: Mapped[str | None] = mapped_column(Encrypted(String(9)), default="x")

    Base.metadata.create_all(engine)
    assert Note.__table__.c.outer.type.column_id == "note.outer"
    with byok.session("t1", engine) as session:
        session.add(Note(inner=None, outer=None, plain=None))
        session.add(Note())
        session.commit()
        assert session.execute(select(Note.inner, Note.outer, Note.plain).order_by(Note.id)).all() == [
            (None, None, "x"),
            ("x", "x", "x"),
        ]
        assert session.scalars(select(Note.id).where(Note.outer == "x")).all() == [2]


@on_sqlite
def test_engine_json_serializer_is_honoured(byok: Byok, engine: Engine) -> None:
    """What create_engine was given for JSON holds for encrypted JSON too."""
    table = Table(
        "note", MetaData(), Column("id", Integer, primary_key=True), Column("body", Encrypted(JSON))
    )
    table.create(engine)
    own = create_engine(
        engine.url,
        json_serializer=lambda value: json.dumps({"wrapped": value}),
        json_deserializer=lambda document: {"read": json.loads(document)},
    )
    byok.attach(own)
    with byok.session("t1", own) as session:
        session.execute(insert(table).values(body=[1]))
        session.commit()
        assert session.scalars(select(table.c.body)).all() == [{"read": {"wrapped": [1]}}]
    with byok.session("t1", engine) as session:
        assert session.scalars(select(table.c.body)).all() == [{"wrapped": [1]}]
    own.dispose()


def test_change_within_a_mutable_value_is_flushed(byok: Byok, engine: Engine) -> None:
    """MutableDict.as_mutable goes around Encrypted: a change in place is noticed and written encrypted."""

    class Base(DeclarativeBase):
        pass

    class HasBody:
        body: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(Encrypted(JSON)))

    class Note(HasBody, Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)

    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        note = Note(body={"a": 1})
        session.add(note)
        session.commit()
        note.body["b"] = SECRET
        assert note in session.dirty
        session.commit()
    with byok.session("t1", engine) as session:
        assert session.scalars(select(Note.body)).one() == {"a": 1, "b": SECRET}
        raw = session.scalars(select(type_coerce(Note.__table__.c.body, LargeBinary))).one()
        assert SECRET.encode() not in bytes(raw)


class Loose(TypeDecorator[str]):
    """A user's type for which case makes no difference."""

    impl = String
    cache_ok = True

    def compare_values(self, x: str, y: str) -> bool:
        return x.casefold() == y.casefold()


@on_sqlite
def test_unchanged_values_are_not_written_again(byok: Byok, engine: Engine) -> None:
    """An equal value set again is no change, though it would encrypt otherwise; the wrapped type says what is equal."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[Any] = mapped_column(Encrypted(JSON))
        title: Mapped[str] = mapped_column(Encrypted(String(9), searchable=True))
        code: Mapped[str] = mapped_column(Encrypted(Loose))

    Base.metadata.create_all(engine)
    raw = text("SELECT body, title, title_hash, code FROM note")
    with byok.session("t1", engine) as session:
        session.add(Note(body={"a": [1]}, title="x", code="c"))
        session.commit()
        before = session.execute(raw).one()
        note = session.scalars(select(Note)).one()
        note.body, note.title, note.code = {"a": [1]}, "x", "C"
        assert not session.is_modified(note)
        session.commit()
        assert session.execute(raw).one() == before
        session.refresh(note)
        note.title, note.code = "y", "d"
        assert session.is_modified(note)
        session.commit()
        after = session.execute(raw).one()
    assert after.body == before.body
    assert all(getattr(after, name) != getattr(before, name) for name in ("title", "title_hash", "code"))


@on_sqlite
def test_values_that_cannot_be_hashed_are_known_as_such(byok: Byok, engine: Engine) -> None:
    """The ORM asks a column's type whether its values can be hashed; dicts cannot, encrypted or not."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[Any] = mapped_column(Encrypted(JSON))

    Base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        session.add_all([Note(body={"a": 1}), Note(body={"b": 2})])
        session.flush()
        with pytest.raises(InvalidRequestError, match="produces non-hashable values"):
            session.execute(select(Note.id, Note.body)).unique().all()
        assert sorted(session.query(Note, Note.body), key=lambda row: row[0].id)[1][1] == {"b": 2}


# -- lengths ---------------------------------------------------------------------------------------------------------


def test_stored_length_is_46_bytes_over_the_text(byok: Byok, engine: Engine) -> None:
    """Exactly 46 bytes are added, counted by the database; with pad_to the length tells only the block."""
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("plain", Encrypted(String(100))),
        Column("padded", Encrypted(String(100), pad_to=32)),
    )
    table.create(engine)
    texts = ["", "a", "é", "x" * 31, "x" * 32, "🙂" * 25]
    with byok.session("t1", engine) as session:
        session.execute(insert(table), [{"plain": value, "padded": value} for value in texts])
        lengths = session.execute(
            text(f"SELECT {_octets(engine)}(plain), {_octets(engine)}(padded) FROM t ORDER BY id")
        ).all()
        assert session.scalars(select(table.c.padded).order_by(table.c.id)).all() == texts
    assert [plain for plain, _ in lengths] == [46 + len(value.encode()) for value in texts]
    assert [padded for _, padded in lengths] == [46 + 32, 46 + 32, 46 + 32, 46 + 32, 46 + 64, 46 + 128]


def _octets(engine: Engine) -> str:
    return "length" if engine.dialect.name == "sqlite" else "octet_length"


@on_sqlite
def test_changed_pad_to_still_reads_old_rows(byok: Byok, engine: Engine) -> None:
    """pad_to may be given, changed or dropped at any time: rows say for themselves how they were written."""
    values = {None: "a", 16: "b", 64: "c"}
    for pad_to, value in values.items():
        table = _one_column(Encrypted(String, pad_to=pad_to))
        table.create(engine, checkfirst=True)
        with byok.session("t1", engine) as session:
            session.execute(insert(table).values(v=value))
            session.commit()
    for pad_to in values:
        table = _one_column(Encrypted(String, pad_to=pad_to))
        with byok.session("t1", engine) as session:
            assert session.scalars(select(table.c.v).order_by(table.c.id)).all() == ["a", "b", "c"]


def _one_column(type_: Any) -> Table:
    return Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("v", type_))


# -- values that do not fit ------------------------------------------------------------------------------------------

UNFIT: dict[str, tuple[Any, Any, str]] = {
    "too long": (String(5), SECRET, "at most 5 characters, got 16"),
    "too long in a user's type": (Upper, SECRET, "at most 5 characters, got 16"),
    "too long in a nested type": (Bracketed, SECRET, "at most 5 characters, got 18"),
    "bytes too long": (LargeBinary(5), SECRET.encode(), "at most 5 bytes, got 16"),
    "int for str": (String(50), 4711_4711, "expects str, got int"),
    "bytes for str": (Text, SECRET.encode(), "expects str, got bytes"),
    "str for int": (Integer, SECRET, "expects int, got str"),
    "bool for int": (Integer, True, "expects int, got bool"),
    "too large": (SmallInteger, 4711_4711, "out of range for 16 bits"),
    "far too large": (BigInteger, 4711_4711**4, "out of range for 64 bits"),
    "too many decimals": (Numeric(10, 2), Decimal("4711.4711"), "at most 2 decimals"),
    "too many digits": (Numeric(5, 2), Decimal("47114711.5"), "has more digits than NUMERIC(5, 2) holds"),
    "str for date": (Date, "1815-12-10", "expects date, got str"),
    "datetime for date": (Date, datetime(1815, 12, 10, 1), "whose time or zone would be lost"),  # noqa: DTZ001
    "zone for naive": (DateTime, datetime(1815, 12, 10, tzinfo=EAST), "expects a datetime without zone"),
    "naive for zone": (DateTime(timezone=True), datetime(1815, 12, 10), "with a zone"),  # noqa: DTZ001
    "unknown name": (Enum("a", "b", name="letters"), SECRET, "is none of the enum's names"),
    "another class's member": (Enum(Color), Size.LARGE, "is none of the enum's names"),
    "not JSON": (JSON, {SECRET}, "cannot be written as JSON"),
    "a surrogate": (String, SECRET + "\ud800", "is not encodable text"),
    "str for uuid": (Uuid, SECRET, "expects UUID, got str"),
    "a user's type raises": (Money, SECRET, "the column's own type raised ValueError"),
}


def _by_flush(entity: Any, session: Session, value: Any) -> None:
    session.add_all([entity(v="fits" if isinstance(value, str) else None), entity(v=value)])
    session.flush()


def _by_core(entity: Any, session: Session, value: Any) -> None:
    session.execute(insert(entity.__table__).values(v=value))


def _by_executemany(entity: Any, session: Session, value: Any) -> None:
    session.execute(insert(entity.__table__), [{"v": None}, {"v": value}])


def _by_bulk(entity: Any, session: Session, value: Any) -> None:
    session.execute(insert(entity), [{"v": None}, {"v": value}])


def _by_values(entity: Any, session: Session, value: Any) -> None:
    session.execute(insert(entity.__table__).values([{"v": None}, {"v": value}]))


def _by_literal(entity: Any, session: Session, value: Any) -> None:
    session.execute(insert(entity.__table__).values(v=literal(value, String)))


def _by_parameter(entity: Any, session: Session, value: Any) -> None:
    session.execute(insert(entity.__table__).values(v=bindparam("given")), {"given": value})


def _by_update(entity: Any, session: Session, value: Any) -> None:
    session.execute(update(entity).values(v=value))


PATHS = [_by_flush, _by_core, _by_executemany, _by_bulk, _by_values, _by_literal, _by_parameter, _by_update]


def _model(type_: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        v: Mapped[Any] = mapped_column(Encrypted(type_), nullable=True)

    return Thing


def _told(error: BaseException) -> str:
    """All that a log could show of an error: its text, attributes and chain."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:  # SQLAlchemy makes some errors their own cause
        chain.append(following)
        following = following.__cause__ or following.__context__
    return " ".join(f"{error!s} {error!r} {error.__dict__}" for error in chain)


def _refuses(entity: Any, byok: Byok, engine: Engine, value: Any, path: Callable[..., None]) -> EncodeError:
    """Check that the path writes nothing and leaves the session usable."""
    entity.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        with pytest.raises(EncodeError) as raised:
            path(entity, session, value)
        session.rollback()
        assert session.scalar(select(func.count()).select_from(entity)) == 0
        session.add(entity(v=None))
        session.commit()
        assert session.scalar(select(func.count()).select_from(entity)) == 1
    return raised.value


@pytest.mark.parametrize("case", UNFIT)
@on_sqlite
def test_value_that_does_not_fit(case: str, byok: Byok, engine: Engine) -> None:
    """It is refused with the column and the reason, never the value; nothing is written, the session can go on."""
    type_, value, reason = UNFIT[case]
    error = _refuses(_model(type_), byok, engine, value, _by_core)

    assert str(error).startswith("thing.v: ")
    assert reason in str(error)
    assert error.column == "thing.v"
    if not isinstance(value, (bool, Size)):
        told = _told(error)
        for part in ("Zaubertrank", "4711", "1815", "Timestamp"):
            assert part not in told


@pytest.mark.parametrize("path", PATHS)
def test_value_that_does_not_fit_by_every_path(path: Callable[..., None], byok: Byok, engine: Engine) -> None:
    """On each database and by each way of writing: refused before anything is written, without the value."""
    entity = _model(String(8))
    if path is _by_update:
        entity.metadata.create_all(engine)
        with byok.session("t1", engine) as session:
            session.add(entity(v="old"))
            session.commit()
            with pytest.raises(EncodeError) as raised:
                path(entity, session, SECRET)
            session.rollback()
            assert session.scalars(select(entity.v)).all() == ["old"]
        error = raised.value
    else:
        error = _refuses(entity, byok, engine, SECRET, path)

    assert str(error) == "thing.v: at most 8 characters, got 16"
    assert SECRET not in _told(error)
    assert error.tenant == "t1"


@on_sqlite
def test_searching_for_what_does_not_fit(byok: Byok, engine: Engine) -> None:
    """Too long a text is simply not found, as in plain SQL; a wrong type is refused without the value."""
    table = _one_column(Encrypted(String(5), searchable=True))
    table.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(v="abc"))
        assert session.scalars(select(table.c.id).where(table.c.v == SECRET)).all() == []
        with pytest.raises(EncodeError, match=r"^t\.v: expects str, got bytes$") as raised:
            session.scalars(select(table.c.id).where(table.c.v == SECRET.encode())).all()
    assert SECRET not in _told(raised.value)


@on_sqlite
def test_users_type_that_fails_while_reading(byok: Byok, engine: Engine) -> None:
    """Its exception could hold the plaintext: only the name of its class is told."""

    class Failing(TypeDecorator[str]):
        impl = String
        cache_ok = True

        def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
            raise ValueError(value)

    table = _one_column(Encrypted(Failing))
    table.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(v=SECRET))
        with pytest.raises(DecryptError, match=r"^t\.v: the column's own type raised ValueError") as raised:
            session.scalars(select(table.c.v)).all()
    assert SECRET not in _told(raised.value)


# -- what reaches the driver and the disk ----------------------------------------------------------------------------


def test_bytes_go_to_the_driver_as_they_are(byok: Byok, engine: Engine) -> None:
    """No wrapper around each value: psycopg's alone made inserts half as slow again."""
    table = _one_column(Encrypted(String(20), searchable=True))
    table.create(engine)
    seen: list[Any] = []
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[3]))
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(v="abc"))
        assert session.scalars(select(table.c.v).where(table.c.v == "abc")).all() == ["abc"]
    inserted, selected = [
        list(parameters.values() if isinstance(parameters, dict) else parameters) for parameters in seen
    ]
    assert [(type(value), len(value)) for value in inserted] == [(bytes, 49), (bytes, 32)]
    assert [(type(value), len(value)) for value in selected] == [(bytes, 32)]


@on_sqlite
def test_plaintext_is_nowhere_on_disk(byok: Byok, engine: Engine, tmp_path: Path) -> None:
    """No byte of the database's or the keystore's files tells a value; the same scan finds a plain column's."""
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("plain", String),
        Column("secret", Encrypted(String, searchable=True)),
        Column("document", Encrypted(JSON)),
        Column("padded", Encrypted(Text, searchable=True, pad_to=64)),
        Column("raw", Encrypted(LargeBinary)),
    )
    table.create(engine)
    with byok.session("t1", engine) as session:
        for number in range(50):
            value = f"{SECRET}-{number}"
            session.execute(
                insert(table).values(
                    plain="visible-0815",
                    secret=value,
                    document={"k": value},
                    padded=value,
                    raw=value.encode(),
                )
            )
        session.execute(update(table).where(table.c.secret == f"{SECRET}-7").values(secret=f"{SECRET}-x"))
        session.execute(table.delete().where(table.c.secret == f"{SECRET}-9"))
        session.commit()
        assert session.scalar(select(func.count()).select_from(table)) == 49
    contents = b"".join(path.read_bytes() for path in tmp_path.iterdir() if ".db" in path.name)
    assert b"visible-0815" in contents
    for trace in (SECRET, "Zaubertrank", "4711-"):
        assert trace.encode() not in contents
        assert trace.encode("utf-16-le") not in contents


# -- the type object -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "shown"),
    [
        (Encrypted(String(20)), "Encrypted(String(length=20))"),
        (Encrypted(String(20), pad_to=32), "Encrypted(String(length=20), pad_to=32)"),
        (
            Encrypted(Date, searchable=True, hash="hmac-sha256", salt_scope="born", column_id="p.born"),
            "Encrypted(Date(), searchable=True, hash='hmac-sha256', salt_scope='born', column_id='p.born')",
        ),
    ],
)
def test_repr_shows_what_was_given(type_: Encrypted[Any], shown: str) -> None:
    """It is what a user would write; it goes into migrations and logs."""
    assert repr(type_) == shown


class Mrn(Encrypted[str]):
    """A type of an application's own, made without arguments."""

    def __init__(self) -> None:
        super().__init__(VARCHAR(12), searchable=True)


TELLS: list[tuple[Encrypted[Any], list[str], type[Any]]] = [
    (Encrypted(String(20)), ["String"], String),
    (Encrypted(Text), ["Text", "String"], Text),
    (Encrypted(VARCHAR(5), searchable=True), ["VARCHAR", "String"], VARCHAR),
    (Encrypted(BigInteger), ["BigInteger", "Integer"], BigInteger),
    (Encrypted(Date), ["Date"], Date),
    (Encrypted(Interval), ["Interval"], Interval),
    (Encrypted(JSON), ["JSON"], JSON),
    (Encrypted(Boolean), ["Boolean"], Boolean),
    (Encrypted(LargeBinary(4)), ["LargeBinary"], LargeBinary),
    (Encrypted(Enum(Color)), ["Enum", "String"], Enum),
    (Encrypted(Money()), ["Money", "Integer"], Integer),
    (Encrypted(Bracketed()), ["Bracketed", "Upper", "String"], String),
    (Mrn(), ["VARCHAR", "String", "Mrn"], VARCHAR),
]


@pytest.mark.parametrize(("type_", "names", "impl"), TELLS, ids=repr)
def test_a_type_tells_what_is_inside(type_: Encrypted[Any], names: list[str], impl: type[Any]) -> None:
    """Form and schema makers go by the names of a type's classes, their impl and its own; SQLAlchemy sees bytes."""
    cls = type(type_)
    assert [each.__name__ for each in cls.__mro__][: len(names)] == names
    assert cls.impl.__name__ == names[0]  # type: ignore[union-attr]
    assert isinstance(type_.impl, impl)
    assert isinstance(type_.impl_instance, LargeBinary)
    assert isinstance(type_, Encrypted)
    assert type_._type_affinity is LargeBinary()._type_affinity
    for copied in (type_.copy(), copy.deepcopy(type_), pickle.loads(pickle.dumps(type_))):  # noqa: S301 - our own
        assert type(copied) is cls
        assert repr(copied) == repr(type_)
    table = Table("t", MetaData(), Column("x", type_))
    plain = Table("t", MetaData(), Column("x", LargeBinary))
    bound = table.c.x.type
    assert type(bound) is cls
    assert type(pickle.loads(pickle.dumps(bound))) is cls  # noqa: S301 - our own
    ddl = [str(CreateColumn(each.c.x).compile(dialect=postgresql.dialect())) for each in (table, plain)]
    assert ddl[0] == ddl[1] == "x BYTEA"


def test_a_type_gives_the_length_and_names_of_what_is_inside() -> None:
    """For validation in forms; what nothing inside has is not there."""
    assert Encrypted(String(20)).length == 20
    assert Encrypted(Bracketed()).length == 5
    assert Encrypted(Enum(Color)).enums == [each.name for each in Color]
    assert (Encrypted(Numeric(8, 2)).precision, Encrypted(Numeric(8, 2)).scale) == (8, 2)
    assert not hasattr(Encrypted(Date), "length")


def test_python_type_is_that_of_the_value() -> None:
    """Tools that ask for the Python type get the wrapped type's."""
    assert Encrypted(Date).python_type is date
    assert Encrypted(Numeric).python_type is Decimal


@on_sqlite
def test_types_that_differ_share_no_compiled_statement(byok: Byok, engine: Engine) -> None:
    """Two types alike but for the column id read and write apart on one engine, though the SQL is the same."""
    table = Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("raw", LargeBinary))
    table.create(engine)
    a, b = Encrypted(String, column_id="a.x"), Encrypted(String, column_id="b.x")
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(id=1, raw=literal("in a", a)))
        session.execute(insert(table).values(id=2, raw=literal("in b", b)))

        def read(number: int, type_: Encrypted[str]) -> list[str]:
            of_row = select(type_coerce(table.c.raw, type_)).where(table.c.id == number)
            return list(session.scalars(of_row))

        assert (read(1, a), read(2, b)) == (["in a"], ["in b"])
        for number, type_ in ((1, b), (2, a)):
            with pytest.raises(TamperedError):
                read(number, type_)


@on_sqlite
def test_type_of_a_copied_column_shares_no_compiled_statement(byok: Byok, engine: Engine) -> None:
    """A type that was in use before its column was copied is another type in the copy."""
    table = Table("raw", MetaData(), Column("id", Integer, primary_key=True), Column("raw", LargeBinary))
    table.create(engine)
    original = _one_column(Encrypted(String)).c.v
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(raw=literal("x", original.type)))
        assert session.scalars(select(type_coerce(table.c.raw, original.type))).all() == ["x"]
        copied = original.table.to_metadata(MetaData(), name="archive").c.v
        with pytest.raises(TamperedError, match=r"^archive\.v: "):
            session.scalars(select(type_coerce(table.c.raw, copied.type))).all()


class Fruit(enum.Enum):
    APPLE = 1


class Computer(enum.Enum):
    APPLE = 1


@pytest.mark.parametrize(
    "options",
    [
        {"pad_to": 64},
        {"hash": "hmac-sha256"},
        {"salt_scope": "contact"},
        {"salt_scope": "tenant"},
        {"normalize": casefold},
        {"column_id": "b.x"},
    ],
    ids=lambda option: next(iter(option)) if "salt_scope" not in option else str(option),
)
@on_sqlite
def test_every_option_keeps_statements_apart(options: dict[str, Any], byok: Byok, engine: Engine) -> None:
    """What is stored and hashed after another option was used is what it is on a fresh statement cache."""
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("raw", LargeBinary),
        Column("digest", LargeBinary),
    )
    table.create(engine)
    plain: dict[str, Any] = {"searchable": True, "column_id": "a.x"}
    with byok.session("t1", engine) as session:

        def write(number: int, given: dict[str, Any]) -> tuple[int, bytes]:
            type_ = Encrypted(String, **{**plain, **given})
            value = "Ada"
            session.execute(
                insert(table).values(
                    id=number, raw=literal(value, type_), digest=literal(value, type_.hash_type)
                )
            )
            row = session.execute(select(table).where(table.c.id == number)).one()
            return len(row.raw), row.digest

        first, other = write(1, {}), write(2, options)
        engine.clear_compiled_cache()
        assert write(3, options) == other
        assert write(4, {}) == first
    assert first != other


@on_sqlite
def test_enums_of_two_classes_share_no_compiled_statement(byok: Byok, engine: Engine) -> None:
    """SQLAlchemy's own cache key of an Enum leaves its names and class out; here each reads its own members."""
    table = Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("raw", LargeBinary))
    table.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(
            insert(table).values(raw=literal(Fruit.APPLE, Encrypted(Enum(Fruit), column_id="a.x")))
        )
        read = [
            session.scalars(select(type_coerce(table.c.raw, Encrypted(Enum(cls), column_id="a.x")))).one()
            for cls in (Fruit, Computer)
        ]
    assert read == [Fruit.APPLE, Computer.APPLE]


@on_sqlite
def test_same_type_shares_a_compiled_statement(byok: Byok, engine: Engine) -> None:
    """Statements over an encrypted column are cached as any others, and tenants share them."""
    table = _one_column(Encrypted(String(20), searchable=True))
    table.create(engine)
    hits: list[Any] = []
    event.listen(
        engine,
        "before_cursor_execute",
        lambda *args: hits.append(args[4].cache_hit.name) if args[4].compiled else None,
    )
    for tenant in ("t1", "t2"):
        with byok.session(tenant, engine) as session:
            session.scalars(select(table.c.v).where(table.c.v == tenant)).all()
    assert hits == ["CACHE_MISS", "CACHE_HIT"]


@on_sqlite
def test_type_that_belongs_to_no_column_is_refused(byok: Byok, engine: Engine) -> None:
    """Without a column id there is nothing to bind a value to: it is neither written nor read."""
    table = Table("t", MetaData(), Column("id", Integer, primary_key=True), Column("raw", LargeBinary))
    table.create(engine)
    with byok.session("t1", engine) as session:
        with pytest.raises(DeclarationError, match="belongs to no column"):
            session.execute(insert(table).values(raw=literal(SECRET, Encrypted(String))))
        session.rollback()
        session.execute(insert(table).values(raw=b"abc"))
        with pytest.raises(DeclarationError, match="belongs to no column"):
            session.scalars(select(type_coerce(table.c.raw, Encrypted(String)))).all()


def test_no_value_is_rendered_into_sql() -> None:
    """Who prints a statement with literal_binds is told so, by the column's name; str() goes on as it was."""
    table = _one_column(Encrypted(String(20), searchable=True))
    statements = (
        insert(table).values(v=SECRET),
        insert(table).values([{"v": SECRET}]),
        select(table.c.id).where(table.c.v == SECRET),
        select(table.c.id).where(table.c.v.in_([SECRET])),
        select(literal(SECRET, table.c.v.type)),
        update(table).values(v=SECRET),
        delete(table).where(table.c.v != SECRET),
    )
    for statement in statements:
        with pytest.raises(UnsupportedQueryError, match=r"t\.v: its values are not rendered") as caught:
            statement.compile(compile_kwargs={"literal_binds": True})
        assert caught.value.column == "t.v"
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert SECRET not in str(statement)
        assert SECRET not in str(statement.compile(compile_kwargs={"render_postcompile": True}))
    assert "v_hash=NULL" in str(
        update(table).values(v=None, v_hash=None).compile(compile_kwargs={"literal_binds": True})
    )


def test_no_value_is_rendered_into_sql_when_it_is_executed(byok: Byok, engine: Engine) -> None:
    """literal_execute renders a value when the statement runs: ours says no, and the transaction can go on."""
    table = _one_column(Encrypted(String(20), searchable=True))
    table.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(id=1, v=SECRET))
        one, several = (
            bindparam("q", literal_execute=True),
            bindparam("q", expanding=True, literal_execute=True),
        )
        typed = bindparam("q", type_=String, literal_execute=True)
        for criterion, value in (
            (table.c.v == one, SECRET),
            (table.c.v == typed, SECRET),
            (table.c.v != one, SECRET),
            (table.c.v.in_(several), [SECRET]),
            (or_(table.c.v == one, table.c.id == 7), SECRET),
        ):
            for _ in range(2):
                with pytest.raises(
                    UnsupportedQueryError, match=r"t\.v: its values are not rendered"
                ) as caught:
                    session.execute(select(table.c.id).where(criterion), {"q": value})
                assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert session.scalars(select(table.c.id).where(table.c.v == SECRET)).all() == [1]
        assert session.scalars(select(table.c.id).where(table.c.v.in_(several)), {"q": []}).all() == []
        session.execute(insert(table).values(id=2, v=bindparam("w", literal_execute=True)), {"w": "bound"})
        assert session.scalars(select(table.c.id).where(table.c.v == "bound")).all() == [2]


@pytest.mark.parametrize("type_", [Boolean, Enum("a", "b", name="letters"), Enum(Color)])
def test_a_searchable_column_of_few_values_warns(type_: Any) -> None:
    """Frequencies give its values away; the warning names the leak, and nothing else warns."""
    with pytest.warns(LeakWarning, match="frequencies") as caught:
        Encrypted(type_, searchable=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encrypted(type_)
        Encrypted(String(3), searchable=True)
        warnings.simplefilter("ignore", LeakWarning)
        Encrypted(type_, searchable=True)


@on_sqlite
def test_a_variant_of_the_inner_type_holds_on_its_dialect(byok: Byok, engine: Engine) -> None:
    """JSON().with_variant(JSONB) and the like are common, and wrap as the type itself; so does another length."""
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("body", Encrypted(JSON().with_variant(postgresql.JSONB(), "postgresql"))),
        Column("name", Encrypted(String(3).with_variant(String(5), "sqlite"))),
    )
    table.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(body=[1], name="abcde"))
        assert session.execute(select(table.c.body, table.c.name)).all() == [([1], "abcde")]
        with pytest.raises(EncodeError, match="at most 5"):
            session.execute(insert(table).values(name="abcdef"))


@on_sqlite
def test_enum_names_added_later(byok: Byok, engine: Engine) -> None:
    """A longer name makes new values longer; the old ones still read and are still found."""
    old = _one_column(Encrypted(Enum("a", "bc", name="letters"), searchable=True))
    old.create(engine)
    with byok.session("t1", engine) as session:
        session.execute(insert(old), [{"v": "a"}, {"v": "bc"}])
        session.commit()
    new = _one_column(Encrypted(Enum("a", "bc", "defgh", name="letters"), searchable=True))
    with byok.session("t1", engine) as session:
        session.execute(insert(new).values(v="defgh"))
        assert session.scalars(select(new.c.v).order_by(new.c.id)).all() == ["a", "bc", "defgh"]
        assert session.scalars(select(new.c.id).where(new.c.v == "a")).all() == [1]


@on_sqlite
def test_value_moved_between_tenants_or_columns_does_not_open(
    byok: Byok, engine: Engine, new_customer: Callable[[int], Kms]
) -> None:
    """Ciphertext copied to another column raises; it never reads as a value there."""
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("a", Encrypted(String)),
        Column("b", Encrypted(String)),
    )
    table.create(engine)
    byok.onboard("t3", new_customer(2))
    with byok.session("t1", engine) as session:
        session.execute(insert(table).values(a=SECRET, b="other"))
        session.execute(text("UPDATE t SET b = a"))
        session.commit()
        assert session.scalars(select(table.c.a)).all() == [SECRET]
        with pytest.raises(TamperedError) as raised:
            session.scalars(select(table.c.b)).all()
        assert raised.value.column == "t.b"
    with byok.session("t3", engine) as session, pytest.raises(DecryptError):
        session.scalars(select(table.c.a)).all()
