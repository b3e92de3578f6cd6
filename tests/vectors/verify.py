"""Check the frozen vectors of format 1 without the library.

A second implementation of the byte formats, from their description alone: the standard library and AES-GCM
of ``cryptography``, nothing of ``sqla_byok``. ``python tests/vectors/verify.py [file]`` prints how many
vectors it checked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PATH = Path(__file__).with_name("format1.json")


def verify(path: Path | str = PATH) -> int:
    """Compute every vector of the file from its inputs.

    :returns: how many there were.
    :raises AssertionError: one has another output.
    """
    vectors = json.loads(Path(path).read_text(encoding="utf-8"))["vectors"]
    for number, vector in enumerate(vectors):
        computed = OPERATIONS[vector["op"]](**vector["in"])
        if isinstance(computed, bytes):
            computed = computed.hex()
        if computed != vector["out"]:
            raise AssertionError(
                f"vector {number} ({vector['op']}): computed {computed}, not {vector['out']}"
            )
    return len(vectors)


def fields(*parts: str | bytes | tuple[int, int]) -> bytes:
    """Length-prefix and join: text, bytes, or (number, its bits)."""
    out = bytearray()
    for part in parts:
        if isinstance(part, tuple):
            number, bits = part
            part = struct.pack({32: ">I", 64: ">Q"}[bits], number)
        data = part.encode("utf-8") if isinstance(part, str) else part
        out += struct.pack(">I", len(data))
        out += data
    return bytes(out)


def hkdf(key: bytes, length: int, *info: str) -> bytes:
    """HKDF-SHA-256 of RFC 5869 with an empty salt."""
    pseudorandom = hmac.new(bytes(32), key, hashlib.sha256).digest()
    out, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(pseudorandom, block + fields(*info) + bytes([counter]), hashlib.sha256).digest()
        out += block
    return out[:length]


def sha256_mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-256 of RFC 2104, written out."""
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in block) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in block) + inner).digest()


def tenant_bytes(tenant: str) -> bytes:
    assert unicodedata.normalize("NFC", tenant) == tenant
    assert 1 <= len(tenant.encode("utf-8")) <= 255
    return tenant.encode("utf-8")


def tk_id(tk: str, tenant: str) -> bytes:
    return hkdf(bytes.fromhex(tk), 16, "sqla-byok/1/tenant-key-id", tenant)


def payload(tk: str, tenant: str, generation: int) -> bytes:
    binding = hashlib.sha256(fields("sqla-byok/1/tenant-key", tenant, (generation, 32))).digest()
    return b"\x01" + bytes.fromhex(tk) + binding


def seal_key(tk: str, tenant: str) -> bytes:
    return hkdf(bytes.fromhex(tk), 32, "sqla-byok/1/seal", tenant)


def manifest_key(tk: str, tenant: str) -> bytes:
    return hkdf(bytes.fromhex(tk), 32, "sqla-byok/1/manifest", tenant)


def key_id(secret: str, tenant: str) -> bytes:
    return hkdf(bytes.fromhex(secret), 16, "sqla-byok/1/key-id", tenant)


def salt_id(secret: str, tenant: str) -> bytes:
    message = fields("sqla-byok/1/salt-id", tenant)
    return hmac.new(bytes.fromhex(secret), message, hashlib.sha512).digest()[:16]


def sealed(tk: str, tenant: str, kind: str, generation: int, secret: str, nonce: str) -> bytes:
    record_id = {"data-key": key_id, "search-salt": salt_id}[kind](secret, tenant)
    magic = b"\xb2\x01"
    aad = magic + fields("sqla-byok/1/sealed", kind, tenant, tk_id(tk, tenant), (generation, 32), record_id)
    body = AESGCM(seal_key(tk, tenant)).encrypt(bytes.fromhex(nonce), bytes.fromhex(secret), aad)
    out = magic + bytes.fromhex(nonce) + body
    assert len(out) == 62
    return out


def manifest_tag(tk: str, tenant: str, epoch: int, records: list[dict[str, Any]]) -> bytes:
    parts: list[str | bytes | tuple[int, int]] = ["sqla-byok/1/manifest", tenant, tk_id(tk, tenant)]
    parts += [(epoch, 64), (len(records), 32)]
    for kind in ("data-key", "search-salt"):
        mine = {record["generation"]: record for record in records if record["kind"] == kind}
        assert [record["state"] for record in mine.values()].count("active") == 1
        for generation in sorted(mine):
            record = mine[generation]
            parts += [kind, (generation, 32), bytes.fromhex(record["id"]), record["state"]]
    return sha256_mac(manifest_key(tk, tenant), fields(*parts))


def row_tag(keystore_key: str, tenant: str, provider: str, config: str, wrapped: str, **row: Any) -> bytes:
    message = fields(
        "sqla-byok/1/tenant-row",
        tenant,
        provider,
        bytes.fromhex(config),
        bytes.fromhex(wrapped),
        row["kms_key_version"],
        (row["revoke_within_ms"], 32),
        (row["outage_grace_ms"], 32),
        bytes.fromhex(row["tk_id"]),
        (row["tk_generation"], 32),
        (row["epoch"], 64),
        bytes.fromhex(row["manifest_tag"]),
    )
    return sha256_mac(bytes.fromhex(keystore_key), message)


def value_key(dk: str, tenant: str) -> bytes:
    return hkdf(bytes.fromhex(dk), 32, "sqla-byok/1/value", tenant)


def value_aad(dk: str, tenant: str, column: str, codec: str, row: str, pad_to: int | None) -> bytes:
    header = bytes([0xB1, 1 if pad_to is None else 2]) + key_id(dk, tenant)
    return header + fields(tenant, column, codec, bytes.fromhex(row))


def value(nonce: str, text: str, pad_to: int | None, dk: str, tenant: str, **column: Any) -> bytes:
    plaintext = text.encode("utf-8")
    if pad_to is not None:
        plaintext = pad(plaintext.hex(), pad_to)
    aad = value_aad(dk, tenant, pad_to=pad_to, **column)
    body = AESGCM(value_key(dk, tenant)).encrypt(bytes.fromhex(nonce), plaintext, aad)
    out = aad[:18] + bytes.fromhex(nonce) + body
    assert len(out) == len(plaintext) + 46
    return out


def direct_value(inner: str, key_version: str, blob: str) -> bytes:
    value = bytes.fromhex(inner)
    assert value[0] == 0xB1
    assert value[1] in (1, 2)
    version = key_version.encode("ascii")
    return bytes([0xB1, 0x10]) + value[2:18] + struct.pack(">B", len(version)) + version + bytes.fromhex(blob)


def pad(plaintext: str, to: int) -> bytes:
    out = bytes.fromhex(plaintext) + b"\x80"
    while len(out) % to:
        out += b"\0"
    return out


def column_salt(search_salt: str, tenant: str, hash: str, scope: str, name: str) -> str:  # noqa: A002
    salt = bytes.fromhex(search_salt)
    if scope == "tenant":
        return salt.decode("ascii")
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    message = fields("sqla-byok/1/column-salt", tenant, hash, scope, name)
    number = int(hmac.new(salt, message, hashlib.sha512).hexdigest()[:96], 16) % 62**32
    return "".join(digits[number // 62**place % 62] for place in range(31, -1, -1))


def search_hash(text: str, **column: Any) -> bytes:
    salt = column_salt(**column).encode("ascii")
    if column["hash"] == "sha256":
        return hashlib.sha256(text.encode("utf-8") + salt).digest()
    return sha256_mac(salt, text.encode("utf-8"))


def codec(codec: str, arguments: dict[str, Any], value: Any) -> dict[str, str | None]:
    arguments.pop("aware", None)  # the codec's name says it
    encoded, text = CODECS[codec](value, **arguments)
    return {"encoded": encoded.hex(), "text": None if text is None else text.hex()}


Coded = tuple[bytes, "bytes | None"]


def as_text(value: str) -> Coded:
    return value.encode("utf-8"), value.encode("utf-8")


def as_bytes(value: str) -> Coded:
    return bytes.fromhex(value), bytes.fromhex(value)


def as_enum(value: str, names: list[str]) -> Coded:
    longest = max(len(name.encode("utf-8")) for name in names)
    name = value.encode("utf-8")
    return name + b"\0" * (longest - len(name)), name


def as_bool(value: bool) -> Coded:
    return (b"\x01", b"true") if value else (b"\x00", b"false")


def as_int(value: int, bits: int = 64) -> Coded:
    assert -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
    return struct.pack(">q", value), b"%d" % value


def as_float(value: str) -> Coded:
    x = float.fromhex(value)
    return struct.pack(">d", x), repr(math.fabs(x) if x == 0 else x).encode("ascii")


def as_decimal(value: str, precision: int | None = None, scale: int | None = None) -> Coded:
    digits, _, exponent = value.lower().partition("e")
    sign, digits = ("-", digits[1:]) if digits[0] == "-" else ("", digits)
    whole, _, decimals = digits.partition(".")
    for _ in range(int(exponent or 0)):
        whole, decimals = whole + (decimals[:1] or "0"), decimals[1:]
    for _ in range(-int(exponent or 0)):
        whole, decimals = whole[:-1], (whole[-1:] or "0") + decimals
    whole = whole.lstrip("0") or "0"
    if not (whole + decimals).strip("0"):
        sign = ""
    least = decimals.rstrip("0")
    if scale is not None:
        assert len(least) <= scale
        decimals = least + "0" * (scale - len(least))
    return tuple(f"{sign}{whole}{'.' * bool(part)}{part}".encode() for part in (decimals, least))  # type: ignore[return-value]


def as_date(value: str) -> Coded:
    return value.encode(), value.encode()


def as_datetime(value: str) -> Coded:
    day, clock, offset = split(value)
    assert offset is None
    text = f"{day}T{show(clock)}".encode()
    return text, text


def as_datetimetz(value: str) -> Coded:
    day, clock, offset = split(value)
    assert offset is not None
    days, clock = divmod(clock - offset, 86_400_000_000)
    text = f"{civil(ordinal(day) + days)}T{show(clock)}Z".encode()
    return text, text


def as_time(value: str) -> Coded:
    text = show(split("T" + value)[1]).encode()
    return text, text


def as_timetz(value: str) -> Coded:
    return (show(split("T" + value)[1]) + value[-6:]).encode(), None


def split(value: str) -> tuple[str, int, int | None]:
    """Take an ISO text apart: the day, the microseconds of the day, the offset in microseconds."""
    day, _, clock = value.partition("T")
    offset = None
    if clock[-6:-5] in ("+", "-") and clock[-3] == ":":
        clock, zone = clock[:-6], clock[-6:]
        offset = (int(zone[1:3]) * 60 + int(zone[4:6])) * 60_000_000 * (-1 if zone[0] == "-" else 1)
    seconds, _, fraction = clock.partition(".")
    hour, minute, second = map(int, seconds.split(":"))
    return day, ((hour * 60 + minute) * 60 + second) * 1_000_000 + int(fraction.ljust(6, "0") or 0), offset


def show(clock: int) -> str:
    """Write the microseconds of a day as HH:MM:SS.ffffff."""
    seconds, fraction = divmod(clock, 1_000_000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:06}"


def month_lengths(year: int) -> list[int]:
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return [31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


def ordinal(day: str) -> int:
    """Days since 0001-01-01."""
    year, month, date = map(int, day.split("-"))
    years = (year - 1) * 365 + (year - 1) // 4 - (year - 1) // 100 + (year - 1) // 400
    return years + sum(month_lengths(year)[: month - 1]) + date - 1


def civil(days: int) -> str:
    """The day so many days after 0001-01-01."""
    year, month = days // 366 + 1, 1
    while ordinal(f"{year + 1}-1-1") <= days:
        year += 1
    while month < 12 and ordinal(f"{year}-{month + 1}-1") <= days:
        month += 1
    return f"{year:04}-{month:02}-{days - ordinal(f'{year}-{month}-1') + 1:02}"


def as_timedelta(value: int) -> Coded:
    return (value % 2**128).to_bytes(16, "big"), b"%d" % value


def as_uuid(value: str, as_uuid: bool = True) -> Coded:
    digits = value.replace("-", "").lower()
    hyphened = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return bytes.fromhex(digits), hyphened.encode()


def as_json(value: Any) -> Coded:
    return json.dumps(value).encode(), None


CODECS: dict[str, Callable[..., Coded]] = {
    "str": as_text,
    "bytes": as_bytes,
    "enum": as_enum,
    "bool": as_bool,
    "int": as_int,
    "float": as_float,
    "decimal": as_decimal,
    "date": as_date,
    "datetime": as_datetime,
    "datetimetz": as_datetimetz,
    "time": as_time,
    "timetz": as_timetz,
    "timedelta": as_timedelta,
    "uuid": as_uuid,
    "json": as_json,
}

OPERATIONS: dict[str, Callable[..., Any]] = {
    "tenant_bytes": tenant_bytes,
    "tk_id": tk_id,
    "payload": payload,
    "seal_key": seal_key,
    "manifest_key": manifest_key,
    "key_id": key_id,
    "salt_id": salt_id,
    "sealed": sealed,
    "manifest_tag": manifest_tag,
    "row_tag": row_tag,
    "value_key": value_key,
    "value_aad": value_aad,
    "value": value,
    "direct_value": direct_value,
    "pad": pad,
    "column_salt": column_salt,
    "search_hash": search_hash,
    "codec": codec,
}


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) > 1 else PATH
    print(f"{verify(file)} vectors checked")
