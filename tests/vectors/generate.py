"""Write the frozen vectors of format 1 again, from ``sqla_byok.crypto`` and fixed inputs.

``python tests/vectors/generate.py`` prints them; ``--check`` compares them with ``format1.json`` instead.
Where they differ, stored data would no longer open: that needs a new format, not a new file.

Each vector is one operation: its name, its inputs (bytes in hexadecimal) and its output. ``verify.py``
computes the same outputs without this library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sqla_byok.crypto import codecs, formats, hashes
from sqla_byok.crypto.formats import ACTIVE, DATA_KEY, PENDING, READABLE, SEARCH_SALT, Record, TenantKey

PATH = Path(__file__).with_name("format1.json")

NONCE = bytes(range(0xA0, 0xAC))
TENANT_KEY = bytes(range(0x20, 0x40))
DATA_KEY_1 = bytes(range(0x20))
DATA_KEY_2 = bytes(range(0x80, 0xA0))
KEYSTORE_KEY = bytes(range(0x60, 0x80))
SALT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef"
SALT_2 = b"abcdefghijklmnopqrstuvwxyz012345"

Vector = dict[str, Any]
Make = Callable[..., Any]


def vectors() -> list[Vector]:
    """Make all vectors, in the order of the file."""
    # Nonces are random except here.
    with mock.patch("os.urandom", lambda size: NONCE[:size]):
        return [
            *_tenant("org-42"),
            *_tenant("Łódź-病院 🏥"),
            *_generations(),
            *_scopes(),
            *_pads(),
            *_codecs(),
            *_direct(),
        ]


def _vector(op: str, output: Any, **inputs: Any) -> Vector:
    return {"op": op, "in": {name: _plain(value) for name, value in inputs.items()}, "out": _plain(output)}


def _plain(x: Any) -> Any:
    return x.hex() if isinstance(x, bytes) else x


def _tenant(tenant: str) -> Iterator[Vector]:
    column, codec, text = "patient.mrn", "str", "A-1"
    key = TenantKey(TENANT_KEY, tenant, 1)
    of = {"tenant": tenant}
    yield _vector("tenant_bytes", formats.check_tenant(tenant), **of)
    yield _vector("tk_id", key.id, tk=TENANT_KEY, **of)
    payload = formats.pack_tenant_key(TENANT_KEY, tenant, 1)
    yield _vector("payload", payload, tk=TENANT_KEY, generation=1, **of)
    for label in ("seal", "manifest"):
        derived = formats.kdf(TENANT_KEY, 32, f"sqla-byok/1/{label}", tenant)
        yield _vector(f"{label}_key", derived, tk=TENANT_KEY, **of)

    records = []
    for kind, secret in ((DATA_KEY, DATA_KEY_1), (SEARCH_SALT, SALT)):
        record_id, sealed = key.seal(kind, 1, secret)
        records.append(Record(kind, 1, record_id, ACTIVE))
        op = "key_id" if kind == DATA_KEY else "salt_id"
        yield _vector(op, record_id, secret=secret, **of)
        yield _sealed(tenant, kind, 1, secret, sealed)
    tag = key.manifest_tag(7, records)
    yield _manifest(tenant, 7, records, tag)

    row: dict[str, Any] = {
        "provider": "aws",
        "config": b'{"key":"arn"}',
        "wrapped": b"WRAPPED",
        "kms_key_version": "v1",
        "revoke_within_ms": 300_000,
        "outage_grace_ms": 0,
        "tk_id": key.id,
        "tk_generation": 1,
        "epoch": 7,
        "manifest_tag": tag,
    }
    for version in ("v1", ""):
        row["kms_key_version"] = version
        row_tag = formats.row_tag(KEYSTORE_KEY, tenant=tenant, **row)
        yield _vector("row_tag", row_tag, keystore_key=KEYSTORE_KEY, **of, **row)

    key_id = formats.data_key_id(DATA_KEY_1, tenant)
    yield _vector("value_key", formats.value_key(DATA_KEY_1, tenant), dk=DATA_KEY_1, **of)
    for method, pad_to in ((formats.PLAIN, None), (formats.PADDED, 16)):
        header = formats.value_header(method, key_id)
        aad = formats.tenant_aad(header, tenant) + formats.column_aad(column, codec)
        plaintext = text.encode() if pad_to is None else formats.pad(text.encode(), pad_to)
        sealed = AESGCM(formats.value_key(DATA_KEY_1, tenant)).encrypt(NONCE, plaintext, aad)
        inputs = {"dk": DATA_KEY_1, "column": column, "codec": codec, "row": b"", "pad_to": pad_to, **of}
        yield _vector("value_aad", aad, **inputs)
        yield _vector("value", header + NONCE + sealed, nonce=NONCE, text=text, **inputs)

    for algorithm, scope in (
        ("sha256", hashes.Scope("column", column)),
        ("sha256", hashes.Scope("tenant", "")),
        ("hmac-sha256", hashes.Scope("column", column)),
    ):
        yield from _hashes(tenant, algorithm, scope, text)


def _direct() -> Iterator[Vector]:
    """The frame of direct values, around what stands for a KMS's ciphertext: each provider's is its own."""
    for key_version in ("", "78deebed173b48e48f55abf87ed4cf71"):
        for method in (formats.PLAIN, formats.PADDED):
            header = formats.value_header(method, formats.data_key_id(DATA_KEY_1, "org-42"))
            inner = header + NONCE + bytes(range(0x40, 0x60))
            blob = bytes(range(0x60, 0x90))
            value = formats.direct_value(inner, key_version, blob)
            yield _vector("direct_value", value, inner=inner, key_version=key_version, blob=blob)


def _sealed(tenant: str, kind: str, generation: int, secret: bytes, sealed: bytes) -> Vector:
    return _vector(
        "sealed",
        sealed,
        tk=TENANT_KEY,
        tenant=tenant,
        kind=kind,
        generation=generation,
        secret=secret,
        nonce=NONCE,
    )


def _manifest(tenant: str, epoch: int, records: list[Record], tag: bytes) -> Vector:
    listed = [{name: _plain(value) for name, value in record._asdict().items()} for record in records]
    return _vector("manifest_tag", tag, tk=TENANT_KEY, tenant=tenant, epoch=epoch, records=listed)


def _hashes(tenant: str, algorithm: str, scope: hashes.Scope, text: str) -> Iterator[Vector]:
    salt = hashes.derive_column_salt(SALT, tenant, algorithm, scope)
    of = {"search_salt": SALT, "tenant": tenant, "hash": algorithm, "scope": scope.kind, "name": scope.name}
    yield _vector("column_salt", salt.decode(), **of)
    yield _vector("search_hash", hashes.hasher(algorithm)(text.encode(), salt), text=text, **of)


def _generations() -> Iterator[Vector]:
    """A tenant key with several generations under it, handed over in no order."""
    tenant = "org-42"
    key = TenantKey(TENANT_KEY, tenant, 3)
    records = []
    for kind, generation, secret, state in (
        (SEARCH_SALT, 10, SALT_2, PENDING),
        (DATA_KEY, 300, DATA_KEY_2, ACTIVE),
        (SEARCH_SALT, 9, SALT, ACTIVE),
        (DATA_KEY, 2, DATA_KEY_1, READABLE),
    ):
        record_id, sealed = key.seal(kind, generation, secret)
        records.append(Record(kind, generation, record_id, state))
        yield _sealed(tenant, kind, generation, secret, sealed)
    epoch = 2**32 + 5
    yield _manifest(tenant, epoch, records, key.manifest_tag(epoch, records))
    payload = formats.pack_tenant_key(TENANT_KEY, tenant, 3)
    yield _vector("payload", payload, tk=TENANT_KEY, tenant=tenant, generation=3)


def _scopes() -> Iterator[Vector]:
    for algorithm in hashes.ALGORITHMS:
        for name in ("person", "Straße 1"):
            yield from _hashes("org-42", algorithm, hashes.Scope("scope", name), "Zoë@example.org")
        yield from _hashes("org-42", algorithm, hashes.Scope("column", "person"), "")
    yield from _hashes("org-42", "sha256", hashes.Scope("tenant", ""), "6" * 64)


def _pads() -> Iterator[Vector]:
    for plaintext, to in (
        (b"", 1),
        (b"", 16),
        (b"A-1", 4),
        (b"A-12", 4),
        (b"\x80\x00\x00", 8),
        (b"a" * 40, 32),
    ):
        yield _vector("pad", formats.pad(plaintext, to), plaintext=plaintext, to=to)


def _codecs() -> Iterator[Vector]:
    for make, arguments, read, values in CODECS:
        codec = make(**arguments)
        for value in values:
            python = read(value)
            text = None if codec.text is None else codec.text(python)
            output = {"encoded": codec.encode(python).hex(), "text": _plain(text)}
            yield _vector("codec", output, codec=codec.name, arguments=arguments, value=value)


def _float(value: str) -> float:
    return float.fromhex(value)


def _microseconds(value: int) -> timedelta:
    return timedelta(microseconds=value)


def _json_codec() -> codecs.Codec:
    return codecs.json_codec(json.dumps, json.loads)


def _same(value: Any) -> Any:
    return value


# Values are given as JSON has them; the function before them makes the Python value.
CODECS: list[tuple[Make, dict[str, Any], Callable[[Any], Any], list[Any]]] = [
    (codecs.text_codec, {}, str, ["", "A-1", "Zoë", "Zoe\u0308", "病院 🏥", "a\0b"]),
    (codecs.bytes_codec, {}, bytes.fromhex, ["", "00ff80"]),
    (codecs.enum_codec, {"names": ["new", "größer", "done"]}, str, ["new", "größer", "done"]),
    (codecs.bool_codec, {}, bool, [True, False]),
    (codecs.int_codec, {}, int, [0, 1, -1, 42, 2**63 - 1, -(2**63)]),
    (codecs.int_codec, {"bits": 16}, int, [32767, -32768]),
    (codecs.float_codec, {}, _float, ["0x0p+0", "-0x0p+0", "0x1.8p+0", "0x1.999999999999ap-4", "0x1p+70"]),
    (codecs.decimal_codec, {}, Decimal, ["0", "-0.00", "1", "1.0", "1E+3", "-12.340", "1E-7", "0.1"]),
    (codecs.decimal_codec, {"precision": 40, "scale": 2}, Decimal, ["1", "-0", "1.500", "-0.05", "9" * 38]),
    (codecs.date_codec, {}, date.fromisoformat, ["2024-02-29", "0001-01-01"]),
    (
        codecs.datetime_codec,
        {"aware": False},
        datetime.fromisoformat,
        ["2024-02-29T23:59:59.000001", "0987-01-02T00:00:00"],
    ),
    (
        codecs.datetime_codec,
        {"aware": True},
        datetime.fromisoformat,
        ["2024-03-01T01:29:59.500000+05:30", "2024-02-29T19:59:59.500000+00:00", "2024-12-31T23:00:00-02:00"],
    ),
    (codecs.time_codec, {"aware": False}, time.fromisoformat, ["00:00:00", "23:59:59.000100"]),
    (codecs.time_codec, {"aware": True}, time.fromisoformat, ["08:30:00+05:30", "08:30:00.250000-02:00"]),
    (codecs.interval_codec, {}, _microseconds, [0, 1, -1, 86_400_000_000, 86_399_999_999_999_999_999]),
    (codecs.uuid_codec, {}, UUID, ["00112233-4455-6677-8899-AABBCCDDEEFF"]),
    (_json_codec, {}, _same, [{"a": [1, None, "é"]}, "", None]),
    (codecs.uuid_codec, {"as_uuid": False}, str, ["00112233445566778899AABBCCDDEEFF"]),
]


def render() -> str:
    """The text of the file, one vector a line."""
    lines = ",\n".join(json.dumps(vector, ensure_ascii=False) for vector in vectors())
    return f'{{"format": 1, "vectors": [\n{lines}\n]}}\n'


def main(arguments: list[str]) -> int:
    """Print the vectors, or compare them."""
    if arguments == ["--check"]:
        same = render() == PATH.read_text(encoding="utf-8")
        print(f"{PATH.name}: {'unchanged' if same else 'DIFFERS from what the code makes'}")
        return 0 if same else 1
    sys.stdout.write(render())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
