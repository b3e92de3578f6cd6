"""Codecs: the canonical bytes of Python values, and their canonical text for search hashes.

``encode`` refuses what the plain column would refuse or change (a wrong type, too long, out of range, too
many decimals), because the database can no longer check. ``text`` refuses wrong types, but knows nothing of
the column's lengths and ranges: to search for what cannot be in the column finds nothing, as in plain SQL.
Values that the column holds as equal have equal text.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqla_byok.errors import DeclarationError

__all__ = [
    "Codec",
    "UnfitError",
    "bool_codec",
    "bytes_codec",
    "date_codec",
    "datetime_codec",
    "decimal_codec",
    "enum_codec",
    "float_codec",
    "int_codec",
    "interval_codec",
    "json_codec",
    "text_codec",
    "time_codec",
    "uuid_codec",
]


class UnfitError(Exception):
    """A value does not fit its codec. The message is a reason, and never holds the value.

    It is raised outside of ``except`` blocks only: an exception in its context (``UnicodeEncodeError`` with
    its ``object``) would carry the plaintext into logs.
    """


@dataclass(frozen=True, slots=True)
class Codec:
    """How the values of one column type become bytes.

    :param name: bound into each stored value, so that bytes of one type never open as another.
    :param encode: value to plaintext; raises :class:`UnfitError`.
    :param decode: plaintext to value; may raise anything for bytes that ``encode`` did not make.
    :param text: value to search text; raises :class:`UnfitError`. ``None``: not searchable.
    :param max_size: the longest plaintext in bytes; ``None``: no limit.
    """

    name: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    text: Callable[[Any], bytes] | None
    max_size: int | None


def _expects(wanted: str, value: object) -> UnfitError:
    return UnfitError(f"expects {wanted}, got {type(value).__name__}")


def text_codec(length: int | None = None) -> Codec:
    """``str`` as UTF-8, of at most ``length`` characters. A ``str`` enum counts as the text it is."""

    def text(value: Any) -> bytes:
        if not isinstance(value, str):
            raise _expects("str", value)
        return _utf8(str.__str__(value))

    def encode(value: Any) -> bytes:
        if length is not None and isinstance(value, str) and str.__len__(value) > length:
            raise UnfitError(f"at most {length} characters, got {str.__len__(value)}")
        return text(value)

    return Codec("str", encode, bytes.decode, text, None if length is None else 4 * length)


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        pass
    raise UnfitError("is not encodable text (lone surrogates)")


def bytes_codec(length: int | None = None) -> Codec:
    """``bytes``, ``bytearray`` or ``memoryview``, of at most ``length`` bytes; read back as ``bytes``."""

    def text(value: Any) -> bytes:
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise _expects("bytes", value)
        return bytes(value)

    def encode(value: Any) -> bytes:
        data = text(value)
        if length is not None and len(data) > length:
            raise UnfitError(f"at most {length} bytes, got {len(data)}")
        return data

    return Codec("bytes", encode, bytes, text, length)


def enum_codec(names: Sequence[str]) -> Codec:
    """One of ``names``, padded with NULs to the longest of them, so that the length tells nothing.

    Values written before a longer name was added still read.

    :raises DeclarationError: a name holds a NUL or a lone surrogate.
    """
    for name in names:
        if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
            raise DeclarationError("The names of an encrypted Enum must be encodable text without NUL.")
    texts = {name: name.encode() for name in names}
    by_bytes = {data: name for name, data in texts.items()}
    size = max(map(len, by_bytes), default=0)

    def text(value: Any) -> bytes:
        if not isinstance(value, str):
            raise _expects("str", value)
        data = texts.get(str.__str__(value))
        if data is None:
            raise UnfitError("is none of the enum's names")
        return data

    def encode(value: Any) -> bytes:
        return text(value).ljust(size, b"\0")

    def decode(data: bytes) -> str:
        return by_bytes[data.rstrip(b"\0")]

    return Codec("enum", encode, decode, text, size)


def json_codec(dumps: Callable[[Any], str | bytes], loads: Callable[[str], Any]) -> Codec:
    """Whatever ``dumps`` can write, as UTF-8. Not searchable: equal documents have many texts."""

    def encode(value: Any) -> bytes:
        document, failed = None, ""
        try:
            document = dumps(value)
        except Exception as error:  # noqa: BLE001 - it is the user's function
            failed = f" ({type(error).__name__})"
        if not isinstance(document, (str, bytes)):
            raise UnfitError(f"cannot be written as JSON{failed}")
        return _utf8(document) if isinstance(document, str) else document

    def decode(data: bytes) -> Any:
        return loads(data.decode())

    return Codec("json", encode, decode, None, None)


def uuid_codec(as_uuid: bool = True) -> Codec:
    """A UUID as its 16 bytes.

    :param as_uuid: ``UUID`` in and out; else ``str``, with or without hyphens in, lower case with hyphens
        out.
    """

    def from_uuid(value: Any) -> UUID:
        if not isinstance(value, UUID):
            raise _expects("UUID", value)
        return value

    def from_str(value: Any) -> UUID:
        if not isinstance(value, str):
            raise _expects("str", value)
        if not _UUID.fullmatch(value):
            raise UnfitError("is not a UUID in hexadecimal")
        return UUID(str.__str__(value))

    read = from_uuid if as_uuid else from_str

    def encode(value: Any) -> bytes:
        return read(value).bytes

    def text(value: Any) -> bytes:
        return UUID.__str__(read(value)).encode()

    def decode(data: bytes) -> UUID | str:
        value = UUID(bytes=data)
        return value if as_uuid else str(value)

    return Codec("uuid", encode, decode, text, 16)


# Narrower than UUID() itself, which takes braces, prefixes, underscores and digits of other scripts.
_UUID = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def bool_codec() -> Codec:
    """``bool`` as one byte, 0 or 1; the numbers 0 and 1 are taken for one."""

    def encode(value: Any) -> bytes:
        if isinstance(value, int) and value in (0, 1):
            return b"\x01" if value else b"\x00"
        raise _expects("bool", value)

    def text(value: Any) -> bytes:
        return b"true" if encode(value) == b"\x01" else b"false"

    def decode(data: bytes) -> bool:
        return {b"\x00": False, b"\x01": True}[data]

    return Codec("bool", encode, decode, text, 1)


def int_codec(bits: int = 64) -> Codec:
    """``int`` as 8 bytes, big-endian with sign, whatever its size, so that the length tells nothing.

    A ``float`` or ``Decimal`` that is a whole number is taken as that.

    :param bits: the signed range of the column, 64 at most.
    """
    if not 1 <= bits <= 64:
        raise ValueError("an int column has 1 to 64 bits")
    bound = 1 << (bits - 1)

    def encode(value: Any) -> bytes:
        number = _whole(value)
        if not -bound <= number < bound:
            raise UnfitError(f"is out of range for {bits} bits")
        return int.to_bytes(number, 8, "big", signed=True)

    def text(value: Any) -> bytes:
        number = _whole(value)
        if not -_INT64 <= number < _INT64:
            raise UnfitError("is out of range for 64 bits")
        return int.__repr__(number).encode()

    def decode(data: bytes) -> int:
        return int.from_bytes(data, "big", signed=True)

    return Codec("int", encode, decode, text, 8)


_INT64 = 1 << 63


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) or (isinstance(value, Decimal) and value.is_finite()):
        # Compared first: the int of Decimal("1E999999999") would fill the memory.
        number = int(value) if -_INT64 <= value < _INT64 else _INT64
        if number == value:
            return number
        raise UnfitError("is out of range, or not a whole number")
    raise _expects("int", value)


def float_codec(as_decimal: bool = False) -> Codec:
    """``float``, ``int`` or ``Decimal`` as 8 bytes, IEEE 754 binary64, big-endian.

    :param as_decimal: reads ``Decimal`` back: the shortest that is that float. Without it, a ``Decimal`` is taken
        where the float stands for it.
    """

    def number(value: Any) -> float:
        if type(value) is float:
            return value
        if not isinstance(value, (float, int, Decimal)) or isinstance(value, bool):
            raise _expects("float, int or Decimal", value)
        x = _to_float(value)
        if isinstance(value, Decimal) and not as_decimal and value.is_finite() and Decimal(repr(x)) != value:
            raise UnfitError("has more digits than a float holds")
        return x

    def encode(value: Any) -> bytes:
        return _DOUBLE.pack(number(value))

    def text(value: Any) -> bytes:
        # Adding zero turns -0.0 into 0.0 and changes nothing else.
        x = number(value) + 0.0
        if x - x != 0.0:
            raise UnfitError("is not finite")
        return repr(x).encode()

    def decode(data: bytes) -> float | Decimal:
        (x,) = _DOUBLE.unpack(data)
        return Decimal(repr(x)) if as_decimal else float(x)

    return Codec("float", encode, decode, text, 8)


_DOUBLE = struct.Struct(">d")


def _to_float(value: float | int | Decimal) -> float:
    try:
        x = float.__pos__(value) if isinstance(value, float) else float(value)
    except (OverflowError, ValueError):  # a huge int, a signalling NaN
        x = None
    # float(Decimal("1E999")) is inf, not an error.
    if x is None or (x in (_INF, -_INF) and isinstance(value, Decimal) and value.is_finite()):
        raise UnfitError("is out of range for a float")
    return x


_INF = float("inf")


def decimal_codec(precision: int | None = None, scale: int | None = None, as_float: bool = False) -> Codec:
    """``Decimal``, ``int`` or ``float`` as fixed-point text with ``scale`` decimals, the way NUMERIC shows it.

    A ``float`` is taken as the decimal number it prints as. What NUMERIC(precision, scale) would round is refused.
    As in SQL, a precision alone means no decimals; neither means as many as the value has.

    :param as_float: reads ``float`` back.
    """
    if precision is not None and scale is None:
        scale = 0
    if (precision is not None and precision < 1) or (scale is not None and scale < 0):
        raise ValueError("a NUMERIC column has at least 1 digit and no negative scale")
    whole_digits = None if precision is None or scale is None else precision - scale
    size = None if whole_digits is None or scale is None else 1 + max(whole_digits, 1) + (scale and 1 + scale)

    def number(value: Any) -> Decimal:
        if isinstance(value, float):
            value = Decimal(float.__repr__(value))
        elif not isinstance(value, (Decimal, int)) or isinstance(value, bool):
            raise _expects("Decimal, int or float", value)
        return _plain(Decimal(value))

    def encode(value: Any) -> bytes:
        x = number(value)
        if whole_digits is not None and x and x.adjusted() >= whole_digits:
            raise UnfitError(f"has more digits than NUMERIC({precision}, {scale}) holds")
        whole, _, decimals = format(x, "f").partition(".")
        if scale is not None:
            if len(decimals.rstrip("0")) > scale:
                raise UnfitError(f"at most {scale} decimals, got {len(decimals.rstrip('0'))}")
            decimals = decimals[:scale].ljust(scale, "0")
        return f"{whole}.{decimals}".rstrip(".").encode()

    def text(value: Any) -> bytes:
        whole, _, decimals = format(number(value), "f").partition(".")
        return f"{whole}.{decimals.rstrip('0')}".rstrip(".").encode()

    def decode(data: bytes) -> Decimal | float:
        return float(data) if as_float else Decimal(data.decode("ascii"))

    return Codec("decimal", encode, decode, text, size)


# PostgreSQL's limits for NUMERIC. They also keep Decimal("1E999999999") from filling the memory with zeros.
_MAX_WHOLE, _MAX_DECIMALS = 131072, 16383


def _plain(x: Decimal) -> Decimal:
    exponent = x.as_tuple().exponent
    if not isinstance(exponent, int):
        raise UnfitError("is not finite")
    if (x and x.adjusted() >= _MAX_WHOLE) or exponent < -_MAX_DECIMALS:
        raise UnfitError(f"has more than {_MAX_WHOLE} digits or {_MAX_DECIMALS} decimals")
    return x or x.copy_abs()  # no negative zero


def date_codec() -> Codec:
    """``date`` as ISO 8601; a ``datetime`` is taken at midnight without zone, where nothing of it is lost."""

    def encode(value: Any) -> bytes:
        if not isinstance(value, date):
            raise _expects("date", value)
        if isinstance(value, datetime) and (value.tzinfo is not None or value.time() != time.min):
            raise UnfitError("expects a date, got a datetime whose time or zone would be lost")
        return date(value.year, value.month, value.day).isoformat().encode()

    def decode(data: bytes) -> date:
        return date.fromisoformat(data.decode("ascii"))

    return Codec("date", encode, decode, encode, 10)


def datetime_codec(aware: bool) -> Codec:
    """``datetime`` as ISO 8601 with six decimals.

    :param aware: with a zone only, stored in UTC, read back in UTC; else without zone only, or a ``date`` for its
        midnight.
    """

    def naive(value: Any) -> bytes:
        if type(value) is date:
            value = datetime.combine(value, time.min)
        if not isinstance(value, datetime):
            raise _expects("datetime", value)
        if value.tzinfo is not None:
            raise UnfitError("expects a datetime without zone, got one with a zone")
        return datetime.isoformat(value, timespec="microseconds").encode()

    def zoned(value: Any) -> bytes:
        if not isinstance(value, datetime):
            raise _expects("datetime", value)
        if _offset(value) is None:
            raise UnfitError("expects a datetime with a zone, got one without")
        return _utc(value)

    def decode_naive(data: bytes) -> datetime:
        return datetime.fromisoformat(data.decode("ascii"))

    def decode_zoned(data: bytes) -> datetime:
        # fromisoformat() takes a "Z" from Python 3.11 on only.
        return datetime.fromisoformat(data.removesuffix(b"Z").decode("ascii")).replace(tzinfo=timezone.utc)

    if aware:
        return Codec("datetimetz", zoned, decode_zoned, zoned, 27)
    return Codec("datetime", naive, decode_naive, naive, 26)


def _offset(value: datetime | time) -> timedelta | None:
    failed = ""
    try:
        return value.utcoffset()
    except Exception as error:  # noqa: BLE001 - a zone may be the user's class
        failed = type(error).__name__
    raise UnfitError(f"has a zone that does not work ({failed})")


def _utc(value: datetime) -> bytes:
    try:
        moved = datetime.astimezone(value, timezone.utc)
    except (OverflowError, ValueError):
        moved = None
    if moved is None:
        raise UnfitError("is out of range in UTC")
    return datetime.isoformat(moved, timespec="microseconds")[:26].encode() + b"Z"


def time_codec(aware: bool) -> Codec:
    """``time`` as ISO 8601 with six decimals.

    :param aware: with an offset only, which is kept; not searchable, as equal times have many texts. Else
        without zone only.
    """

    def naive(value: Any) -> bytes:
        if not isinstance(value, time):
            raise _expects("time", value)
        if value.tzinfo is not None:
            raise UnfitError("expects a time without zone, got one with a zone")
        return time.isoformat(value, timespec="microseconds").encode()

    def zoned(value: Any) -> bytes:
        if not isinstance(value, time):
            raise _expects("time", value)
        if _offset(value) is None:
            raise UnfitError("expects a time with a fixed offset, got one without")
        return time.isoformat(value, timespec="microseconds").encode()

    def decode(data: bytes) -> time:
        return time.fromisoformat(data.decode("ascii"))

    if aware:
        return Codec("timetz", zoned, decode, None, 31)
    return Codec("time", naive, decode, naive, 15)


def interval_codec() -> Codec:
    """``timedelta`` as its microseconds in 16 bytes, big-endian with sign (the range needs 67 bits)."""

    def microseconds(value: Any) -> int:
        if not isinstance(value, timedelta):
            raise _expects("timedelta", value)
        return (value.days * 86_400 + value.seconds) * 1_000_000 + value.microseconds

    def encode(value: Any) -> bytes:
        return microseconds(value).to_bytes(16, "big", signed=True)

    def text(value: Any) -> bytes:
        return str(microseconds(value)).encode()

    def decode(data: bytes) -> timedelta:
        return timedelta(microseconds=int.from_bytes(data, "big", signed=True))

    return Codec("timedelta", encode, decode, text, 16)
