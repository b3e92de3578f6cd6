"""Codecs: values come back, equal values have equal text, and what does not fit is refused in silence."""

# ruff: noqa: DTZ001 - datetimes without a zone are values here

from __future__ import annotations

import enum
import json
import math
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_byok.crypto import codecs
from sqla_byok.crypto.codecs import Codec, UnfitError
from sqla_byok.errors import DeclarationError

TEXT, BYTES, BOOL, INT, FLOAT = (
    codecs.text_codec(),
    codecs.bytes_codec(),
    codecs.bool_codec(),
    codecs.int_codec(),
    codecs.float_codec(),
)
FLOAT_DECIMAL = codecs.float_codec(as_decimal=True)
DECIMAL = codecs.decimal_codec()
MONEY = codecs.decimal_codec(12, 2)
DECIMAL_FLOAT = codecs.decimal_codec(as_float=True)
DATE, NAIVE, AWARE = (
    codecs.date_codec(),
    codecs.datetime_codec(aware=False),
    codecs.datetime_codec(aware=True),
)
TIME, TIMETZ = codecs.time_codec(aware=False), codecs.time_codec(aware=True)
INTERVAL, UUIDS, UUID_TEXT = codecs.interval_codec(), codecs.uuid_codec(), codecs.uuid_codec(as_uuid=False)
ENUM = codecs.enum_codec(["new", "größer", "done", ""])
JSON = codecs.json_codec(json.dumps, json.loads)

ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]))
OFFSETS = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)).map(timezone)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | ENCODABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ENCODABLE, inner, max_size=3),
    max_leaves=5,
)
ROUND_TRIPS: dict[str, tuple[Codec, st.SearchStrategy[Any]]] = {
    "text": (TEXT, ENCODABLE),
    "short text": (codecs.text_codec(10), st.text(st.characters(exclude_categories=["Cs"]), max_size=10)),
    "bytes": (BYTES, st.binary()),
    "bool": (BOOL, st.booleans()),
    "int": (INT, st.integers(-(2**63), 2**63 - 1)),
    "int 16": (codecs.int_codec(16), st.integers(-(2**15), 2**15 - 1)),
    "float": (FLOAT, st.floats(allow_nan=False)),
    "float as decimal": (FLOAT_DECIMAL, st.floats(allow_nan=False).map(lambda x: Decimal(repr(x)))),
    "decimal": (DECIMAL, st.decimals(allow_nan=False, allow_infinity=False, places=30) | st.integers()),
    "money": (MONEY, st.decimals(-(10**10) + 1, 10**10 - 1, places=2)),
    "decimal as float": (DECIMAL_FLOAT, st.floats(allow_nan=False, allow_infinity=False)),
    "date": (DATE, st.dates()),
    "datetime": (NAIVE, st.datetimes()),
    "datetimetz": (AWARE, st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=OFFSETS)),
    "time": (TIME, st.times()),
    "timetz": (TIMETZ, st.times(timezones=OFFSETS)),
    "timedelta": (INTERVAL, st.timedeltas()),
    "uuid": (UUIDS, st.uuids()),
    "uuid text": (UUID_TEXT, st.uuids().map(str)),
    "enum": (ENUM, st.sampled_from(["new", "größer", "done", ""])),
    "json": (JSON, DOCUMENTS),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@given(data=st.data())
def test_round_trip(name: str, data: st.DataObject) -> None:
    """Every value comes back equal and of its type, from no more bytes than the codec states."""
    codec, values = ROUND_TRIPS[name]
    value = data.draw(values)
    plaintext = codec.encode(value)
    assert type(plaintext) is bytes
    assert codec.max_size is None or len(plaintext) <= codec.max_size
    back = codec.decode(plaintext)
    assert back == value
    assert type(back) is type(value) or codec is DECIMAL


@given(st.floats())
def test_floats_come_back_bit_by_bit(x: float) -> None:
    """The sign of zero, infinities and NaN are kept."""
    back = FLOAT.decode(FLOAT.encode(x))
    assert (
        math.isnan(back) if math.isnan(x) else (back == x and math.copysign(1, back) == math.copysign(1, x))
    )


class Word(str):
    def __str__(self) -> str:
        return "changed"

    def encode(self, *_: Any) -> bytes:
        return b"changed"

    def __len__(self) -> int:
        return 99


class Colour(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Loud(float):
    def __repr__(self) -> str:
        return "loud"


@pytest.mark.parametrize(
    ("codec", "value", "plain"),
    [
        (TEXT, Word("word"), "word"),
        (codecs.text_codec(4), Word("word"), "word"),
        (TEXT, Colour.RED, "red"),
        (codecs.enum_codec(["red"]), Colour.RED, "red"),
        (INT, Number.ONE, 1),
        (FLOAT, Loud(1.5), 1.5),
        (FLOAT, 3, 3.0),
        (FLOAT_DECIMAL, Decimal("0.1"), 0.1),
        (DECIMAL, 3, Decimal(3)),
        (DECIMAL_FLOAT, Loud(1.5), 1.5),
        (BYTES, bytearray(b"ab"), b"ab"),
        (BYTES, memoryview(b"a.b.")[::2], b"ab"),
        (UUID_TEXT, "00112233445566778899AABBCCDDEEFF", "00112233-4455-6677-8899-aabbccddeeff"),
    ],
)
def test_subclasses_and_kin_are_taken_as_the_plain_value(codec: Codec, value: Any, plain: Any) -> None:
    """Whatever a subclass makes of itself, the bytes and text are those of the plain value."""
    assert codec.encode(value) == codec.encode(plain)
    assert codec.text is not None
    assert codec.text(value) == codec.text(plain)


@given(st.integers(-(10**6), 10**6), st.integers(0, 12), st.integers(0, 12))
def test_equal_decimals_have_equal_text(number: int, exponent: int, zeros: int) -> None:
    """1, 1.0 and 1E+0 are one value to search for."""
    value = Decimal(number).scaleb(-exponent)
    longer = Decimal(f"{value:f}" + ("" if exponent else ".") + "0" * zeros)
    assert longer == value
    assert _text(DECIMAL, value) == _text(DECIMAL, longer)
    assert Decimal(_text(DECIMAL, value).decode()) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(-99, 99, places=1))
def test_different_decimals_have_different_text(a: Decimal, b: Decimal) -> None:
    """Text tells values apart as far as they differ."""
    assert (_text(DECIMAL, a) == _text(DECIMAL, b)) == (a == b)


@pytest.mark.parametrize(
    ("codec", "values", "text"),
    [
        (DECIMAL, [0, Decimal("-0.00"), Decimal("0E+5"), Decimal("0E-9")], "0"),
        (DECIMAL, [100, Decimal("1E+2"), Decimal("100.00")], "100"),
        (MONEY, [Decimal("1.5"), Decimal("1.50"), Decimal("1.5000")], "1.5"),
        (MONEY, [Decimal("1.2345")], "1.2345"),
        (DECIMAL_FLOAT, [0.1, Decimal("0.1")], "0.1"),
        (DECIMAL_FLOAT, [1e-7, Decimal("1E-7")], "0.0000001"),
        (FLOAT, [0, 0.0, -0.0], "0.0"),
        (FLOAT, [1, 1.0], "1.0"),
        (FLOAT, [2**53, 2**53 + 1], "9007199254740992.0"),
        (FLOAT_DECIMAL, [Decimal("-0"), 0.0], "0.0"),
        (BOOL, [True], "true"),
        (BOOL, [False], "false"),
        (INT, [-42], "-42"),
        (codecs.int_codec(16), [70000], "70000"),
        (TEXT, ["Zoë"], "Zoë"),
        (codecs.text_codec(2), ["longer than the column"], "longer than the column"),
        (ENUM, ["größer"], "größer"),
        (DATE, [date(987, 1, 2)], "0987-01-02"),
        (NAIVE, [datetime(2024, 2, 29), datetime(2024, 2, 29, fold=1)], "2024-02-29T00:00:00.000000"),
        (TIME, [time(1, 2, 3)], "01:02:03.000000"),
        (INTERVAL, [timedelta(days=-1), timedelta(hours=-24)], "-86400000000"),
        (UUIDS, [UUID(int=255)], "00000000-0000-0000-0000-0000000000ff"),
        (UUID_TEXT, [str(UUID(int=255)), f"{255:032X}"], "00000000-0000-0000-0000-0000000000ff"),
    ],
)
def test_search_text(codec: Codec, values: list[Any], text: str) -> None:
    """Equal values have the one text that the format states."""
    assert {_text(codec, value) for value in values} == {text.encode()}


@given(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=OFFSETS), OFFSETS)
def test_equal_instants_have_equal_text_and_bytes(moment: datetime, zone: timezone) -> None:
    """One instant in two zones is one value."""
    assert _text(AWARE, moment) == _text(AWARE, moment.astimezone(zone)) == AWARE.encode(moment)
    assert _text(AWARE, moment).endswith(b"Z")


def test_zones_with_clock_changes_are_honoured() -> None:
    """The two half past two of an autumn night are two instants."""
    night = datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Zurich"))
    assert _text(AWARE, night) == b"2024-10-27T00:30:00.000000Z"
    assert _text(AWARE, night.replace(fold=1)) == b"2024-10-27T01:30:00.000000Z"


@pytest.mark.parametrize(
    ("codec", "value", "stored"),
    [
        (MONEY, 1, "1.00"),
        (MONEY, Decimal("1.5000"), "1.50"),
        (MONEY, Decimal("-0"), "0.00"),
        (MONEY, Decimal("-0.01"), "-0.01"),
        (MONEY, Decimal("9999999999.99"), "9999999999.99"),
        (DECIMAL, Decimal("1.500"), "1.500"),
        (DECIMAL, Decimal("-0.00"), "0.00"),
        (DECIMAL, Decimal("1E+5"), "100000"),
        (codecs.decimal_codec(5), Decimal("12E+3"), "12000"),
        (codecs.decimal_codec(2, 4), Decimal("0.0099"), "0.0099"),
        (codecs.decimal_codec(None, 3), 7, "7.000"),
    ],
)
def test_decimals_are_stored_as_numeric_shows_them(codec: Codec, value: Any, stored: str) -> None:
    """A decimal has the column's decimals, as PostgreSQL would give them back."""
    assert codec.encode(value) == stored.encode()


def test_decimals_do_not_depend_on_the_context() -> None:
    """A low precision in the caller's decimal context does not round what is stored."""
    value = Decimal("1234567890.12")
    with localcontext() as context:
        context.prec = 3
        assert MONEY.decode(MONEY.encode(value)) == value
        assert _text(MONEY, value) == b"1234567890.12"


@pytest.mark.parametrize("codec", [BOOL, INT, FLOAT, ENUM, INTERVAL, UUIDS, NAIVE, AWARE, DATE, TIME])
def test_fixed_width(codec: Codec) -> None:
    """Where the length of a value would tell something, all lengths are the same."""
    strategy = next(values for c, values in ROUND_TRIPS.values() if c is codec)

    @given(strategy)
    def check(value: Any) -> None:
        assert len(codec.encode(value)) == codec.max_size

    check()


def test_an_enum_reads_what_it_wrote_before_it_grew() -> None:
    """A longer name added later changes the padding, not what was stored."""
    assert (
        codecs.enum_codec(["new", "done", "cancelled"]).decode(codecs.enum_codec(["new"]).encode("new"))
        == "new"
    )


@pytest.mark.parametrize("name", ["a\0", "\ud800"])
def test_enums_that_cannot_be_padded_are_refused(name: str) -> None:
    """A name that padding would make ambiguous is an error of the model."""
    with pytest.raises(DeclarationError):
        codecs.enum_codec(["ok", name])


def test_sizes_follow_the_column() -> None:
    """The stated size is the longest plaintext there can be."""
    assert codecs.text_codec(10).max_size == 40 == len(codecs.text_codec(10).encode("🏥" * 10))
    assert codecs.bytes_codec(10).max_size == 10
    assert MONEY.max_size == len(MONEY.encode(Decimal("-9999999999.99")))
    assert codecs.decimal_codec(3).max_size == len("-999")
    assert codecs.decimal_codec(2, 4).max_size == len("-0.0099")
    assert ENUM.max_size == len("größer".encode())
    assert [codec.max_size for codec in (TEXT, BYTES, DECIMAL, JSON)] == [None] * 4


def test_what_has_many_texts_is_not_searchable() -> None:
    """JSON and times with a zone have no search text."""
    assert JSON.text is None
    assert TIMETZ.text is None


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (codecs.int_codec, (0,)),
        (codecs.int_codec, (65,)),
        (codecs.decimal_codec, (0,)),
        (codecs.decimal_codec, (3, -1)),
    ],
)
def test_impossible_columns_are_refused(make: Any, arguments: tuple[int, ...]) -> None:
    """A codec is not built for a column that cannot be."""
    with pytest.raises(ValueError):
        make(*arguments)


class BrokenZone(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        raise RuntimeError(f"SECRET {moment and moment.year}")

    dst = tzname = utcoffset  # type: ignore[assignment]


def _fail(value: Any) -> NoReturn:
    raise TypeError(f"cannot write {value}")


MARK = "SECRET"
UTC = timezone.utc
UNFIT: list[tuple[str, Codec, Any, str]] = [
    ("int for str", TEXT, 4242, "expects str, got int"),
    ("bytes for str", TEXT, b"SECRET", "expects str, got bytes"),
    ("too long", codecs.text_codec(5), "SECRET", "at most 5 characters, got 6"),
    ("surrogate", TEXT, "SECRET\ud800", "lone surrogates"),
    ("surrogate, limited", codecs.text_codec(9), "SECRET\ud800", "lone surrogates"),
    ("str for bytes", BYTES, "SECRET", "expects bytes, got str"),
    ("too many bytes", codecs.bytes_codec(5), b"SECRET", "at most 5 bytes, got 6"),
    ("unknown name", ENUM, "SECRET", "none of the enum's names"),
    ("no name", ENUM, 4242, "expects str, got int"),
    ("unhashable name", ENUM, ["SECRET"], "expects str, got list"),
    ("int for bool", BOOL, 4242, "expects bool, got int"),
    ("bool for int", INT, True, "expects int, got bool"),
    ("str for int", INT, "4242", "expects int, got str"),
    ("float for int", INT, 4242.5, "not a whole number"),
    ("Decimal for int", INT, Decimal("4242.5"), "not a whole number"),
    ("huge Decimal for int", INT, Decimal("4242E999999"), "out of range"),
    ("NaN for int", INT, math.nan, "not a whole number"),
    ("NaN decimal for int", INT, Decimal("sNaN4242"), "expects int, got Decimal"),
    ("too large", INT, 2**63, "out of range for 64 bits"),
    ("too large for 16", codecs.int_codec(16), 32768, "out of range for 16 bits"),
    ("huge", INT, 10**5000, "out of range"),
    ("bool for float", FLOAT, True, "expects float, int or Decimal, got bool"),
    ("str for float", FLOAT, "4242", "expects float, int or Decimal, got str"),
    ("Decimal for float", FLOAT, Decimal("42.42424242424242424242"), "more digits than a float holds"),
    ("huge for float", FLOAT, 10**400, "out of range for a float"),
    ("huge Decimal for float", FLOAT_DECIMAL, Decimal("4242E999"), "out of range for a float"),
    ("signalling NaN", FLOAT_DECIMAL, Decimal("sNaN4242"), "out of range for a float"),
    ("float for Decimal", DECIMAL, "4242.5", "expects Decimal, int or float, got str"),
    ("infinite float for Decimal", DECIMAL, math.inf, "not finite"),
    ("bool for Decimal", DECIMAL, True, "expects Decimal, int or float, got bool"),
    ("NaN", DECIMAL, Decimal("NaN4242"), "not finite"),
    ("signalling NaN decimal", DECIMAL, Decimal("sNaN4242"), "not finite"),
    ("infinite", DECIMAL, -Decimal("inf"), "not finite"),
    ("infinite float", DECIMAL_FLOAT, math.inf, "not finite"),
    ("too many decimals", MONEY, Decimal("42.421"), "at most 2 decimals, got 3"),
    ("too many digits", MONEY, Decimal(42424242424), r"more digits than NUMERIC\(12, 2\)"),
    ("decimals in NUMERIC(5)", codecs.decimal_codec(5), Decimal("42.5"), "at most 0 decimals"),
    ("a bomb", DECIMAL, Decimal("42E999999999"), "more than 131072 digits"),
    ("a small bomb", DECIMAL, Decimal("42E-99999999"), "16383 decimals"),
    ("datetime for date", DATE, datetime(1942, 4, 2, 1), "time or zone would be lost"),
    ("zone for date", DATE, datetime(1942, 4, 2, tzinfo=UTC), "time or zone would be lost"),
    ("str for date", DATE, "1942-04-02", "expects date, got str"),
    ("time for datetime", NAIVE, time(19, 42), "expects datetime, got time"),
    ("date for datetimetz", AWARE, date(1942, 4, 2), "expects datetime, got date"),
    ("zone for naive", NAIVE, datetime(1942, 4, 2, tzinfo=UTC), "without zone"),
    ("naive for zone", AWARE, datetime(1942, 4, 2), "with a zone"),
    (
        "before year 1",
        AWARE,
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
        "out of range in UTC",
    ),
    (
        "after year 9999",
        AWARE,
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        "out of range in UTC",
    ),
    ("broken zone", AWARE, datetime(1942, 4, 2, tzinfo=BrokenZone()), r"does not work \(RuntimeError\)"),
    ("str for time", TIME, "19:42", "expects time, got str"),
    ("str for timetz", TIMETZ, "19:42", "expects time, got str"),
    ("zone for naive time", TIME, time(19, 42, tzinfo=UTC), "without zone"),
    ("naive for zoned time", TIMETZ, time(19, 42), "fixed offset"),
    ("region for zoned time", TIMETZ, time(19, 42, tzinfo=ZoneInfo("Europe/Zurich")), "fixed offset"),
    ("int for interval", INTERVAL, 4242, "expects timedelta, got int"),
    ("str for UUID", UUIDS, str(UUID(int=0x4242)), "expects UUID, got str"),
    ("UUID for str", UUID_TEXT, UUID(int=0x4242), "expects str, got UUID"),
    ("no UUID", UUID_TEXT, "SECRET", "not a UUID"),
    ("underscores", UUID_TEXT, "4242_4242_4242_4242_4242_4242_42", "not a UUID"),
    ("other digits", UUID_TEXT, "٤" * 32, "not a UUID"),
    ("newline", UUID_TEXT, "4" * 32 + "\n", "not a UUID"),
    ("not JSON", JSON, {"SECRET"}, r"as JSON \(TypeError\)"),
    ("JSON with surrogate", codecs.json_codec(str, json.loads), "SECRET\ud800", "lone surrogates"),
    ("JSON of nothing", codecs.json_codec(lambda _: None, json.loads), "SECRET", "cannot be written as JSON"),  # type: ignore[arg-type, return-value]
    ("JSON loudly", codecs.json_codec(_fail, json.loads), "SECRET", r"as JSON \(TypeError\)"),
]
# Of the column's own limits, a search knows nothing.
SEARCHED = {
    "too long",
    "too many bytes",
    "too large for 16",
    "too many decimals",
    "too many digits",
    "decimals in NUMERIC(5)",
}
UNSEARCHED = [row for row in UNFIT if row[1].text is not None and row[0] not in SEARCHED]


@pytest.mark.parametrize(
    ("codec", "value", "reason"), [row[1:] for row in UNFIT], ids=[row[0] for row in UNFIT]
)
def test_unfit_values_are_refused_without_a_trace_of_them(codec: Codec, value: Any, reason: str) -> None:
    """The message gives the reason; neither it nor any chained exception holds the value."""
    with pytest.raises(UnfitError, match=reason) as caught:
        codec.encode(value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert len(caught.value.args) == 1
    for trace in (MARK, "4242", "42.4", "1942", "19:42", "\ud800"):
        assert trace not in str(caught.value)


@pytest.mark.parametrize(
    ("codec", "value"), [row[1:3] for row in UNSEARCHED], ids=[row[0] for row in UNSEARCHED]
)
def test_search_text_refuses_wrong_types_alike(codec: Codec, value: Any) -> None:
    """A value of the wrong type is refused in a search too, equally silently."""
    with pytest.raises(UnfitError) as caught:
        _text(codec, value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_what_no_query_would_find_has_no_text(x: float) -> None:
    """NaN and infinities can be stored but not searched for."""
    assert len(FLOAT.encode(x)) == 8
    with pytest.raises(UnfitError, match="not finite"):
        _text(FLOAT, x)


@pytest.mark.parametrize(
    ("codec", "value", "taken_as"),
    [
        (BOOL, 1, True),
        (BOOL, 0, False),
        (INT, 5.0, 5),
        (INT, Decimal("5.00"), 5),
        (INT, -(2.0**63), -(2**63)),
        (FLOAT, Decimal("0.1"), 0.1),
        (DECIMAL, 12.5, Decimal("12.5")),
        (DATE, datetime(1942, 4, 2), date(1942, 4, 2)),
        (NAIVE, date(1942, 4, 2), datetime(1942, 4, 2)),
    ],
)
def test_values_of_which_nothing_is_lost_are_taken(codec: Codec, value: Any, taken_as: Any) -> None:
    """A value of a kindred type is stored and searched as the value that it equals."""
    assert codec.encode(value) == codec.encode(taken_as)
    assert _text(codec, value) == _text(codec, taken_as)
    assert codec.decode(codec.encode(value)) == taken_as


def test_codecs_have_names_of_their_own() -> None:
    """Bytes of one type never open as another, because the name is authenticated."""
    made = [
        TEXT,
        BYTES,
        BOOL,
        INT,
        FLOAT,
        DECIMAL,
        DATE,
        NAIVE,
        AWARE,
        TIME,
        TIMETZ,
        INTERVAL,
        UUIDS,
        ENUM,
        JSON,
    ]
    assert len({codec.name for codec in made}) == len(made)


def _text(codec: Codec, value: Any) -> bytes:
    assert codec.text is not None
    return codec.text(value)
