"""The byte formats: what opens, and all that must not."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_byok.crypto import formats
from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    KINDS,
    PENDING,
    READABLE,
    SEARCH_SALT,
    Record,
    TenantKey,
)
from sqla_byok.errors import ConfigurationError, KeystoreTamperedError, WrongKeyError

SECRET = bytes(range(32))
DK = bytes(range(32, 64))
SALT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ012345"
SECRETS = {DATA_KEY: DK, SEARCH_SALT: SALT}
FIELDS = st.lists(st.binary(max_size=8), max_size=5)


@pytest.fixture(scope="module")
def key() -> TenantKey:
    return TenantKey(SECRET, "org-42", 1)


@given(FIELDS, FIELDS)
def test_fields_join_without_ambiguity(a: list[bytes], b: list[bytes]) -> None:
    """Two different lists of fields never give the same bytes."""
    assert (formats.enc(*a) == formats.enc(*b)) == (a == b)


def test_text_fields_are_utf8() -> None:
    """A text field is the same as its UTF-8 bytes."""
    assert formats.enc("ä", b"x") == b"\0\0\0\x02\xc3\xa4\0\0\0\x01x"


def test_kdf_is_hkdf_of_rfc_5869() -> None:
    """The key derivation is HKDF-SHA-256 without salt, extract and expand written out."""
    info = formats.enc("label", "org-42")
    extracted = hmac.digest(bytes(32), SECRET, "sha256")
    first = hmac.digest(extracted, info + b"\x01", "sha256")
    second = hmac.digest(extracted, first + info + b"\x02", "sha256")
    assert formats.kdf(SECRET, 48, "label", "org-42") == (first + second)[:48]


@pytest.mark.parametrize("tenant", ["a", "org-42", "Łódź 病院 🏥", "x" * 255, "ü" * 127])
def test_valid_tenants_give_their_bytes(tenant: str) -> None:
    """Any NFC text of up to 255 bytes names a tenant."""
    assert formats.check_tenant(tenant) == tenant.encode()


@pytest.mark.parametrize(
    ("tenant", "reason"),
    [
        ("", "1 to 255"),
        ("x" * 256, "1 to 255"),
        ("ü" * 128, "1 to 255"),
        ("Zoe\u0308", "normal form C"),
        ("a\0", "control"),
        ("a\nb", "control"),
        ("a\x85", "control"),
        ("\ud800", "surrogates"),
        (b"org", "must be a str"),
        (None, "must be a str"),
    ],
)
def test_invalid_tenants_are_refused(tenant: str, reason: str) -> None:
    """A tenant that could be written in two ways, or break a log line, is refused with the reason."""
    with pytest.raises(ConfigurationError, match=reason):
        formats.check_tenant(tenant)
    with pytest.raises(ConfigurationError, match=reason):
        TenantKey(SECRET, tenant, 1)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1))
def test_tenant_key_payload_round_trip(secret: bytes, generation: int) -> None:
    """A payload of 65 bytes gives the tenant key back."""
    payload = formats.pack_tenant_key(secret, "org-42", generation)
    assert len(payload) == formats.PAYLOAD_SIZE == 65
    assert formats.unpack_tenant_key(payload, "org-42", generation) == secret


@pytest.mark.parametrize(
    ("tenant", "generation", "change"),
    [
        ("org-43", 1, lambda p: p),
        ("org-42", 2, lambda p: p),
        ("org-42", -1, lambda p: p),
        ("org-42", 2**32, lambda p: p),
        ("org-42", 1, lambda p: p[:-1]),
        ("org-42", 1, lambda p: p + b"\0"),
        ("org-42", 1, lambda _: b""),
        ("org-42", 1, lambda p: b"\x02" + p[1:]),
        ("org-42", 1, lambda p: p[:-1] + bytes([p[-1] ^ 1])),
    ],
)
def test_foreign_payloads_are_refused(tenant: str, generation: int, change: Callable[[bytes], bytes]) -> None:
    """A payload of another tenant, generation, version or length is the wrong key."""
    payload = change(formats.pack_tenant_key(SECRET, "org-42", 1))
    with pytest.raises(WrongKeyError) as caught:
        formats.unpack_tenant_key(payload, tenant, generation)
    assert caught.value.tenant == tenant


@pytest.mark.parametrize("kind", KINDS)
def test_sealed_round_trip(key: TenantKey, kind: str) -> None:
    """What a tenant key seals, another object of the same key opens; each seal has a nonce of its own."""
    record_id, sealed = key.seal(kind, 1, SECRETS[kind])
    assert len(sealed) == formats.SEALED_SIZE == 62
    assert TenantKey(SECRET, "org-42", 1).open(kind, 1, record_id, sealed) == SECRETS[kind]
    assert key.seal(kind, 1, SECRETS[kind])[1] != sealed


@pytest.mark.parametrize("kind", KINDS)
def test_each_flipped_bit_of_a_sealed_record_is_found(key: TenantKey, kind: str) -> None:
    """No bit of a sealed record or of its id can change unnoticed."""
    record_id, sealed = key.seal(kind, 1, SECRETS[kind])
    both = record_id + sealed
    for bit in range(len(both) * 8):
        forged = bytearray(both)
        forged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KeystoreTamperedError):
            key.open(kind, 1, bytes(forged[:16]), bytes(forged[16:]))


@pytest.mark.parametrize(
    ("opener", "kind", "generation"),
    [
        (TenantKey(SECRET, "org-43", 1), DATA_KEY, 1),
        (TenantKey(DK, "org-42", 1), DATA_KEY, 1),
        (TenantKey(SECRET, "org-42", 1), SEARCH_SALT, 1),
        (TenantKey(SECRET, "org-42", 1), "other", 1),
        (TenantKey(SECRET, "org-42", 1), DATA_KEY, 2),
        (TenantKey(SECRET, "org-42", 1), DATA_KEY, -1),
        (TenantKey(SECRET, "org-42", 1), DATA_KEY, 2**32 + 1),
        (TenantKey(SECRET, "org-42", 1), DATA_KEY, None),
    ],
)
def test_a_sealed_record_opens_in_its_place_only(
    key: TenantKey, opener: TenantKey, kind: str, generation: int
) -> None:
    """Another tenant, key, kind or generation does not open it, and the error keeps no context."""
    record_id, sealed = key.seal(DATA_KEY, 1, DK)
    with pytest.raises(KeystoreTamperedError) as caught:
        opener.open(kind, generation, record_id, sealed)
    assert caught.value.tenant == opener.tenant
    assert caught.value.__context__ is None


@pytest.mark.parametrize("sealed", [b"", b"\xb2\x01", bytes(62), bytes(63), None, "text"])
def test_what_is_no_sealed_record_is_refused(key: TenantKey, sealed: bytes) -> None:
    """Whatever a database hands over is refused by the same error."""
    with pytest.raises(KeystoreTamperedError):
        key.open(DATA_KEY, 1, bytes(16), sealed)


def test_a_record_named_after_another_key_is_refused(key: TenantKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an authentic record is refused where its id is not the one of the secret inside."""
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_record_id", lambda *_: bytes(16))
        _, sealed = key.seal(DATA_KEY, 1, DK)
    with pytest.raises(KeystoreTamperedError):
        key.open(DATA_KEY, 1, bytes(16), sealed)


@pytest.mark.parametrize(
    ("kind", "secret"), [("other", DK), (DATA_KEY, DK[:-1]), (SEARCH_SALT, DK), (SEARCH_SALT, SALT + b"A")]
)
def test_only_proper_secrets_are_sealed(key: TenantKey, kind: str, secret: bytes) -> None:
    """A short key, or a salt with other characters, is an error before it is stored."""
    with pytest.raises(ValueError):
        key.seal(kind, 1, secret)


def records() -> list[Record]:
    return [
        Record(DATA_KEY, 1, b"a" * 16, READABLE),
        Record(DATA_KEY, 2, b"b" * 16, ACTIVE),
        Record(SEARCH_SALT, 1, b"c" * 16, ACTIVE),
        Record(SEARCH_SALT, 2, b"d" * 16, PENDING),
    ]


@given(st.permutations(records()))
def test_the_manifest_ignores_the_order_of_rows(shuffled: list[Record]) -> None:
    """A database may give the rows in any order."""
    key = TenantKey(SECRET, "org-42", 1)
    key.check_manifest(7, shuffled, key.manifest_tag(7, records()))


def _replaced(index: int, **changes: object) -> list[Record]:
    changed = records()
    changed[index] = changed[index]._replace(**changes)  # type: ignore[arg-type]
    return changed


@pytest.mark.parametrize(
    ("epoch", "listed"),
    [
        (6, records()),
        (8, records()),
        (7, records()[1:]),
        (7, records()[:-1]),
        (7, []),
        (7, [*records(), Record(DATA_KEY, 3, b"e" * 16, READABLE)]),
        (7, _replaced(0, generation=3)),
        (7, _replaced(0, id=b"e" * 16)),
        (7, _replaced(0, state=PENDING)),
        (7, _replaced(3, state=READABLE)),
        (7, [r._replace(kind=DATA_KEY if r.kind == SEARCH_SALT else SEARCH_SALT) for r in records()]),
    ],
)
def test_any_change_of_the_manifest_is_found(key: TenantKey, epoch: int, listed: list[Record]) -> None:
    """A row added, dropped or altered, or an older epoch, does not fit the tag."""
    with pytest.raises(KeystoreTamperedError):
        key.check_manifest(epoch, listed, key.manifest_tag(7, records()))


@pytest.mark.parametrize(
    ("epoch", "listed"),
    [
        (-1, records()),
        (2**64, records()),
        (None, records()),
        (7, _replaced(0, kind="other")),
        (7, _replaced(0, state="retired")),
        (7, _replaced(0, state=None)),
        (7, _replaced(0, state=ACTIVE)),
        (7, _replaced(1, state=READABLE)),
        (7, _replaced(2, state=READABLE)),
        (7, records()[:2]),
        (7, _replaced(0, generation=2)),
        (7, _replaced(0, id=b"b" * 16)),
        (7, _replaced(0, id=b"short")),
        (7, _replaced(0, id="a" * 16)),
        (7, _replaced(0, generation=-1)),
        (7, _replaced(0, generation=2**32)),
        (7, _replaced(0, generation="1")),
    ],
)
def test_an_invalid_manifest_is_neither_tagged_nor_accepted(
    key: TenantKey, monkeypatch: pytest.MonkeyPatch, epoch: int, listed: list[Record]
) -> None:
    """Unknown kinds and states, doubles, and anything but one active per kind fail, whatever the tag."""
    with pytest.raises(ValueError):
        key.manifest_tag(epoch, listed)
    monkeypatch.setattr(TenantKey, "_manifest_tag", lambda *_: bytes(32))
    with pytest.raises(KeystoreTamperedError):
        key.check_manifest(epoch, listed, bytes(32))


@pytest.mark.parametrize("tag", [b"", bytes(32), bytes(33), None, "0" * 32])
def test_a_tag_of_another_shape_is_refused(key: TenantKey, tag: bytes) -> None:
    """Whatever a database hands over as the tag is refused by the same error."""
    with pytest.raises(KeystoreTamperedError):
        key.check_manifest(7, records(), tag)


def test_a_manifest_belongs_to_its_tenant_key(key: TenantKey) -> None:
    """The same rows under another tenant or key have another tag."""
    others = [TenantKey(SECRET, "org-43", 1), TenantKey(DK, "org-42", 1)]
    tags = {other.manifest_tag(7, records()) for other in (key, *others)}
    assert len(tags) == 3


def test_key_objects_show_and_give_away_nothing(key: TenantKey) -> None:
    """A key object has a bare repr and refuses pickle and copy."""
    assert repr(key) == str(key) == f"{key}" == "<TenantKey>"
    assert not hasattr(key, "__dict__")
    for leave in (
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda k: pickle.dumps(k, protocol=0),
        lambda k: k.__reduce__(),
    ):
        with pytest.raises(TypeError, match="TenantKey holds key material"):
            leave(key)


def test_a_tenant_key_does_not_keep_its_secret(key: TenantKey) -> None:
    """The object holds derived keys only."""
    held = [getattr(key, name) for name in TenantKey.__slots__]
    assert SECRET not in held
    with pytest.raises(ValueError):
        TenantKey(SECRET[:-1], "org-42", 1)


def test_derived_keys_and_ids_differ_by_purpose_and_tenant() -> None:
    """No derived value serves two purposes or two tenants."""
    derived = {
        derive(DK, tenant)
        for derive in (formats.data_key_id, formats.salt_id, lambda k, t: formats.value_key(k, t)[:16])
        for tenant in ("org-42", "org-43")
    }
    assert len(derived) == 6
    for derive in (formats.data_key_id, formats.salt_id, formats.value_key):
        with pytest.raises(ValueError):
            derive(DK[:-1], "org-42")


def test_new_secrets() -> None:
    """New keys have 32 bytes, new salts 32 letters and digits, and none comes twice."""
    salts = {formats.new_search_salt() for _ in range(200)}
    assert len(salts) == len({formats.new_key() for _ in range(200)}) == 200
    assert {len(salt) for salt in salts} == {len(formats.new_key())} == {32}
    assert set(b"".join(salts)) == set(formats.BASE62.encode())


ROW: dict[str, Any] = {
    "tenant": "org-42",
    "provider": "aws",
    "config": b"{}",
    "wrapped": b"w",
    "kms_key_version": "",
    "revoke_within_ms": 300_000,
    "outage_grace_ms": 0,
    "tk_id": bytes(16),
    "tk_generation": 1,
    "epoch": 7,
    "manifest_tag": bytes(32),
}


@pytest.mark.parametrize("field", ROW)
def test_each_field_of_a_tenant_row_is_tagged(field: str) -> None:
    """No field of a row can change under its tag."""
    value = ROW[field]
    more = {int: 1, str: "x", bytes: b"x"}[type(value)]
    changed = value + more
    assert formats.row_tag(SECRET, **ROW) != formats.row_tag(SECRET, **{**ROW, field: changed})


def test_the_place_of_a_wrapping_is_tagged_where_there_are_several() -> None:
    """Neither order nor number of several wrappings can change; a single one has the tag of format 1."""
    tags = [formats.row_tag(SECRET, **ROW)]
    assert formats.row_tag(SECRET, **ROW, position=0, count=1) == tags[0]
    tags += [formats.row_tag(SECRET, **ROW, position=p, count=n) for n in (2, 3) for p in range(n)]
    assert len({*tags}) == 6


def test_the_row_tag_needs_a_whole_key() -> None:
    """A keystore key of another size is a configuration error, and numbers out of range have no tag."""
    with pytest.raises(ConfigurationError, match="32 bytes"):
        formats.row_tag(b"short", **ROW)
    with pytest.raises(OverflowError):
        formats.row_tag(SECRET, **{**ROW, "revoke_within_ms": -1})


def test_value_frame() -> None:
    """Header and additional data have the stated layout, and no text begins like a value."""
    header = formats.value_header(formats.PLAIN, b"k" * 16)
    assert header == b"\xb1\x01" + b"k" * 16
    assert len(header) == formats.HEADER_SIZE
    assert formats.OVERHEAD == 46
    aad = formats.tenant_aad(header, "org-42") + formats.column_aad("patient.mrn", "str")
    assert aad == header + formats.enc("org-42", "patient.mrn", "str", b"")
    with pytest.raises(UnicodeDecodeError):
        header[:1].decode()
    with pytest.raises(ValueError):
        formats.value_header(formats.PLAIN, b"short")


@given(st.binary(max_size=80), st.integers(1, 64))
def test_pad_round_trip(plaintext: bytes, to: int) -> None:
    """Padding reaches the next multiple and comes off again, zeros and markers in the plaintext included."""
    for data in (plaintext, plaintext + b"\x80\0\0"):
        padded = formats.pad(data, to)
        assert len(padded) % to == 0
        assert len(data) < len(padded) <= len(data) + to
        assert formats.unpad(padded) == data


@pytest.mark.parametrize("padded", [b"", b"\0\0", b"abc", b"abc\x80\0x", b"\x81\0"])
def test_bad_padding_is_refused(padded: bytes) -> None:
    """What has no padding of ours is not guessed at."""
    with pytest.raises(ValueError, match=r"^bad padding$"):
        formats.unpad(padded)


def test_padding_to_nothing_is_refused() -> None:
    """A multiple below 1 is an error."""
    with pytest.raises(ValueError):
        formats.pad(b"", 0)


def test_salt_ids_are_sha512() -> None:
    """A salt's id is made with SHA-512, of which a stored SHA-256 search hash tells nothing."""
    message = formats.enc("sqla-byok/1/salt-id", "org-42")
    assert formats.salt_id(SALT, "org-42") == hmac.new(SALT, message, hashlib.sha512).digest()[:16]


# -- direct values -----------------------------------------------------------------------------------------------------

KEY_ID = bytes(range(16))
INNER = b"\xb1\x01" + KEY_ID + bytes(28)


@pytest.mark.parametrize("version", ["", "v1", "78deebed173b48e48f55abf87ed4cf71", "x" * 255, "A-b_9"])
@pytest.mark.parametrize("algorithm", [1, 2])
def test_a_direct_value_gives_back_what_was_framed(version: str, algorithm: int) -> None:
    """A value is decrypted with the version of the customer key that encrypted it."""
    inner = INNER[:1] + bytes((algorithm,)) + INNER[2:]
    framed = formats.direct_value(inner, version, b"blob")
    assert formats.is_direct(framed)
    assert formats.split_direct(framed) == (KEY_ID, version, b"blob")
    assert len(framed) == 18 + 1 + len(version) + 4


@pytest.mark.parametrize("version", ["x" * 256, "a.b", "a/b", "..", "a b", "a%2f", "é", "a\n", "a\0"])
def test_a_key_version_that_could_leave_its_place_is_refused(version: str) -> None:
    """It is put into a provider's URL: neither written nor read, whoever wrote it into the database."""
    with pytest.raises(ValueError, match="key version"):
        formats.direct_value(INNER, version, b"blob")
    stored = version.encode()[:255]
    if len(version) < 256:
        assert formats.split_direct(b"\xb1\x10" + KEY_ID + bytes((len(stored),)) + stored + b"blob") is None


@pytest.mark.parametrize(
    "inner",
    [b"", b"plaintext", INNER[:45], b"\xb1\x10" + INNER[2:], b"\xb2" + INNER[1:], b"\xb1\x03" + INNER[2:]],
)
def test_only_values_are_framed(inner: bytes) -> None:
    """Inside is always a value that binds tenant and column, never plaintext or another frame."""
    with pytest.raises(ValueError, match="not a value"):
        formats.direct_value(inner, "", b"blob")
    assert not formats.is_value_of(inner, KEY_ID)
    assert not formats.is_value_of(INNER, bytes(16))


@pytest.mark.parametrize("stored", [b"", b"\xb1\x10", b"\xb1\x10" + KEY_ID, INNER, b"text", "text", None, 7])
def test_what_is_no_frame_is_not_taken_for_one(stored: object) -> None:
    """Whatever a database gives back."""
    assert not formats.is_direct(stored)


@pytest.mark.parametrize("tail", [b"\x00", b"\x05abc", b"\x03abc", b"\xff"])
def test_a_cut_frame_is_noticed(tail: bytes) -> None:
    """A value without ciphertext, or without all of its version, goes to no KMS."""
    assert formats.split_direct(b"\xb1\x10" + KEY_ID + tail) is None
