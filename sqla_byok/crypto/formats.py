"""The byte formats: keys, sealed records, tags, and the frame of a stored value.

Every structure is built from length-prefixed fields (:func:`enc`), so that no two different lists of fields
give the same bytes, and every derived key has a label of its own (:func:`kdf`), so that no key serves two
purposes.

=====================  ==============================================  ======
what                   bytes                                           size
=====================  ==============================================  ======
tenant key payload     0x01 ‖ tenant key ‖ SHA-256 of whose it is          65
sealed record          0xB2 0x01 ‖ nonce ‖ ciphertext ‖ tag                62
manifest and row tag   HMAC-SHA-256                                        32
value                  0xB1 ‖ algorithm ‖ key id ‖ nonce ‖ … ‖ tag       46 +
direct value           0xB1 0x10 ‖ key id ‖ version ‖ KMS.Encrypt(value)  19 +
=====================  ==============================================  ======
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn, SupportsIndex

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sqla_byok.errors import ConfigurationError, KeystoreTamperedError, WrongKeyError

__all__ = [
    "ACTIVE",
    "BASE62",
    "DATA_KEY",
    "DIRECT",
    "HEADER_SIZE",
    "ID_SIZE",
    "KEY_SIZE",
    "KINDS",
    "NONCE_SIZE",
    "OVERHEAD",
    "PADDED",
    "PAYLOAD_SIZE",
    "PENDING",
    "PLAIN",
    "READABLE",
    "RETIRED",
    "SEALED_SIZE",
    "SEARCH_SALT",
    "STATES",
    "TAG_SIZE",
    "VALUE_MAGIC",
    "Record",
    "Secret",
    "TenantKey",
    "check_tenant",
    "column_aad",
    "data_key_id",
    "direct_value",
    "enc",
    "is_direct",
    "is_reference",
    "is_value_of",
    "kdf",
    "lp",
    "new_key",
    "new_search_salt",
    "pack_tenant_key",
    "pad",
    "row_tag",
    "salt_id",
    "split_direct",
    "tenant_aad",
    "u32",
    "u64",
    "unpack_tenant_key",
    "unpad",
    "value_header",
    "value_key",
]

DATA_KEY = "data-key"
SEARCH_SALT = "search-salt"
KINDS = (DATA_KEY, SEARCH_SALT)

PENDING = "pending"
ACTIVE = "active"
READABLE = "readable"
STATES = (PENDING, ACTIVE, READABLE)

# Outside the manifest: a generation that is kept, and of which nobody takes notice.
RETIRED = "retired"

KEY_SIZE = 32
ID_SIZE = 16
NONCE_SIZE = 12
TAG_SIZE = 16

VALUE_MAGIC = 0xB1
PLAIN = 0x01
PADDED = 0x02
DIRECT = 0x10
HEADER_SIZE = 2 + ID_SIZE
OVERHEAD = HEADER_SIZE + NONCE_SIZE + TAG_SIZE

# What a provider puts into its URL must not be able to leave its place there: no dot, slash, colon or percent.
_VERSION = re.compile(rb"[A-Za-z0-9_-]{0,255}")

BASE62 = string.ascii_uppercase + string.ascii_lowercase + string.digits

_PAYLOAD_VERSION = b"\x01"
PAYLOAD_SIZE = len(_PAYLOAD_VERSION) + KEY_SIZE + hashlib.sha256().digest_size

_SEALED_MAGIC = b"\xb2\x01"
_REFERENCE_MAGIC = b"\xb2\x02"
_SEALED_BODY = len(_SEALED_MAGIC) + NONCE_SIZE
SEALED_SIZE = _SEALED_BODY + KEY_SIZE + TAG_SIZE


def lp(x: bytes) -> bytes:
    """Prefix ``x`` with its length, 4 bytes big-endian."""
    return len(x).to_bytes(4, "big") + x


def enc(*fields: bytes | str) -> bytes:
    """Join fields, each behind its length; a ``str`` stands for its UTF-8 bytes."""
    return b"".join([lp(field.encode() if isinstance(field, str) else field) for field in fields])


def u32(n: int) -> bytes:
    """4 bytes, big-endian.

    :raises OverflowError: ``n`` is negative or does not fit.
    """
    return n.to_bytes(4, "big")


def u64(n: int) -> bytes:
    """8 bytes, big-endian.

    :raises OverflowError: ``n`` is negative or does not fit.
    """
    return n.to_bytes(8, "big")


def kdf(key: bytes, length: int, *fields: bytes | str) -> bytes:
    """Derive ``length`` bytes from ``key`` by HKDF-SHA-256 (RFC 5869), without salt, the fields as its info.

    A salt adds nothing here: every input key is uniformly random (RFC 5869, section 3.1).
    """
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=enc(*fields)).derive(key)


def new_key() -> bytes:
    """32 random bytes: a new tenant key or data key."""
    return os.urandom(KEY_SIZE)


def new_search_salt() -> bytes:
    """32 random characters of A–Z a–z 0–9 in ASCII (190 bits): a new search salt."""
    return "".join(secrets.choice(BASE62) for _ in range(KEY_SIZE)).encode()


class Secret:
    """A base for objects that hold key material: they show nothing of it and do not leave the process."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds key material: it cannot be pickled or copied")

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        self.__reduce__()

    def __copy__(self) -> NoReturn:
        self.__reduce__()

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce__()


def check_tenant(tenant: str) -> bytes:
    """Check a tenant's name and return its UTF-8 bytes.

    :returns: 1 to 255 bytes. Compare these, not the text a database gave back: databases collate.
    :raises ConfigurationError: it is no ``str``, empty, too long, not in NFC, or has control characters.
    """
    fault = _tenant_fault(tenant)
    if fault:
        raise ConfigurationError(f"The name of a tenant must {fault}.")
    return tenant.encode()


def _tenant_fault(tenant: object) -> str:
    if not isinstance(tenant, str):
        return f"be a str, not {type(tenant).__name__}"
    categories = {unicodedata.category(character) for character in tenant}
    if "Cs" in categories:
        return "be encodable as UTF-8, without lone surrogates"
    if "Cc" in categories:
        return "have no control characters"
    if not unicodedata.is_normalized("NFC", tenant):
        return "be in Unicode normal form C, else one name could be written in two ways"
    size = len(tenant.encode())
    return "" if 1 <= size <= 255 else f"have 1 to 255 bytes in UTF-8, not {size}"


def pack_tenant_key(tenant_key: bytes, tenant: str, generation: int) -> bytes:
    """Make the payload that the customer's KMS wraps.

    :param tenant_key: 32 bytes.
    :returns: 65 bytes, short enough for RSA-2048 with OAEP and SHA-256.
    :raises ValueError: the key has another size.
    """
    return _PAYLOAD_VERSION + _sized(tenant_key, KEY_SIZE) + _payload_binding(tenant, generation)


def unpack_tenant_key(payload: bytes, tenant: str, generation: int) -> bytes:
    """Take the tenant key out of an unwrapped payload.

    RSA-OAEP authenticates nothing: whoever has the public key can wrap a payload of their own. The binding
    detects honest mix-ups (another tenant's row, an old backup); against forgers there is the row's tag.

    :returns: 32 bytes.
    :raises WrongKeyError: the payload was not made for this tenant and generation, or is damaged.
    """
    binding = payload[len(_PAYLOAD_VERSION) + KEY_SIZE :]
    framed = len(payload) == PAYLOAD_SIZE and payload.startswith(_PAYLOAD_VERSION) and _fits(generation, 32)
    if not framed or not hmac.compare_digest(binding, _payload_binding(tenant, generation)):
        raise WrongKeyError(
            f"What the KMS unwrapped is not the tenant key of {tenant!r}, generation {generation}. "
            "Check that this row of the keystore belongs to this tenant and this customer key.",
            tenant=tenant,
        )
    return payload[len(_PAYLOAD_VERSION) : len(_PAYLOAD_VERSION) + KEY_SIZE]


def _payload_binding(tenant: str, generation: int) -> bytes:
    return hashlib.sha256(enc("sqla-byok/1/tenant-key", tenant, u32(generation))).digest()


def _sized(secret: bytes, size: int) -> bytes:
    if len(secret) != size:
        raise ValueError(f"expects {size} bytes, got {len(secret)}")
    return secret


class Record(NamedTuple):
    """One generation of a data key or search salt, as the manifest lists it.

    :param kind: one of :data:`KINDS`.
    :param generation: 32 bits.
    :param id: 16 bytes.
    :param state: one of :data:`STATES`.
    """

    kind: str
    generation: int
    id: bytes
    state: str


class TenantKey(Secret):
    """An opened tenant key: seals and opens a tenant's data keys and search salts, and tags the list of them.

    It keeps what is derived from the key and forgets the key itself.

    :param secret: 32 bytes.
    :param tenant: whose it is.
    :param generation: the generation of the tenant key, 32 bits.
    :raises ConfigurationError: the tenant's name is not valid.
    :raises ValueError: the key has another size.
    """

    __slots__ = ("_cipher", "_manifest_key", "generation", "id", "tenant")

    def __init__(self, secret: bytes, tenant: str, generation: int) -> None:
        check_tenant(tenant)
        _sized(secret, KEY_SIZE)
        self.tenant = tenant
        self.generation = generation
        self.id = kdf(secret, ID_SIZE, "sqla-byok/1/tenant-key-id", tenant)
        self._cipher = AESGCM(kdf(secret, KEY_SIZE, "sqla-byok/1/seal", tenant))
        self._manifest_key = kdf(secret, KEY_SIZE, "sqla-byok/1/manifest", tenant)

    def seal(self, kind: str, generation: int, secret: bytes) -> tuple[bytes, bytes]:
        """Seal a data key or search salt with AES-256-GCM (NIST SP 800-38D) under a random nonce.

        :param secret: 32 bytes; a search salt must be 32 letters and digits in ASCII.
        :returns: its id (16 bytes) and the sealed record (62 bytes).
        :raises ValueError: an unknown kind, or a secret that is none of its kind.
        :raises OverflowError: the generation does not fit 32 bits.
        """
        if kind not in KINDS:
            raise ValueError(f"a record is one of {', '.join(KINDS)}")
        if kind == SEARCH_SALT and not secret.isalnum():
            raise ValueError("a search salt is made of ASCII letters and digits")
        record_id = _record_id(kind, _sized(secret, KEY_SIZE), self.tenant)
        nonce = os.urandom(NONCE_SIZE)
        body = self._cipher.encrypt(nonce, secret, self._aad(kind, generation, record_id))
        return record_id, _SEALED_MAGIC + nonce + body

    def open(self, kind: str, generation: int, record_id: bytes, sealed: bytes) -> bytes:
        """Open a sealed record; its id is computed again, so that a row cannot name another key.

        :returns: 32 bytes.
        :raises KeystoreTamperedError: anything of it does not fit; nothing of it was used.
        """
        secret = self._open(kind, generation, record_id, sealed)
        if secret is None or not hmac.compare_digest(record_id, _record_id(kind, secret, self.tenant)):
            raise KeystoreTamperedError(
                f"A sealed key or salt of tenant {self.tenant!r} does not open under its tenant key: its row "
                "was altered, or moved from another tenant or generation. Restore the row from a backup.",
                tenant=self.tenant,
            )
        return secret

    def seal_reference(self, kind: str, generation: int, record_id: bytes, location: bytes) -> bytes:
        """Seal where a secret is kept, to stand in the place of its sealed record.

        :param record_id: the id of the secret, 16 bytes; the manifest lists it as that of any other.
        :param location: any bytes.
        :returns: 30 bytes more than the location.
        """
        nonce = os.urandom(NONCE_SIZE)
        body = self._cipher.encrypt(nonce, location, self._reference_aad(kind, generation, record_id))
        return _REFERENCE_MAGIC + nonce + body

    def open_reference(self, kind: str, generation: int, record_id: bytes, sealed: bytes) -> bytes:
        """Open what :meth:`seal_reference` sealed, before anybody is sent there.

        :raises KeystoreTamperedError: anything of it does not fit; nothing of it was used.
        """
        nonce, body = sealed[len(_REFERENCE_MAGIC) : _SEALED_BODY], sealed[_SEALED_BODY:]
        try:
            return self._cipher.decrypt(nonce, body, self._reference_aad(kind, generation, record_id))
        except (InvalidTag, ValueError):
            pass
        raise KeystoreTamperedError(
            f"The reference to a salt of tenant {self.tenant!r} does not open under its tenant key: its row was "
            "altered, or moved from another tenant or generation. Restore the row from a backup.",
            tenant=self.tenant,
        )

    def manifest_tag(self, epoch: int, records: Iterable[Record], searchable: str = "") -> bytes:
        """Authenticate which generations there are, and in which state; and what can be searched.

        :param epoch: 64 bits; one more with each change.
        :param records: in any order; exactly one of each kind is active.
        :param searchable: what is kept of the searchable columns; empty for nothing.
        :returns: 32 bytes.
        :raises ValueError: the records are no valid manifest.
        """
        listed = list(records)
        fault = _manifest_fault(epoch, listed)
        if fault:
            raise ValueError(fault)
        return self._manifest_tag(epoch, listed, searchable)

    def check_manifest(self, epoch: int, records: Iterable[Record], tag: bytes, searchable: str = "") -> None:
        """Check the tag over a tenant's records, and over what can be searched, as they were read back.

        :raises KeystoreTamperedError: the tag does not fit, or the records are no valid manifest.
        """
        listed = list(records)
        fault = _manifest_fault(epoch, listed)
        if not fault:
            fits = _is_bytes(tag, 32) and hmac.compare_digest(
                tag, self._manifest_tag(epoch, listed, searchable)
            )
            fault = "" if fits else "it does not fit its tag"
        if fault:
            raise KeystoreTamperedError(
                f"The list of the keys and salts of tenant {self.tenant!r} was altered: {fault}. "
                "Restore the tenant's rows from a backup.",
                tenant=self.tenant,
            )

    def _open(self, kind: str, generation: int, record_id: bytes, sealed: bytes) -> bytes | None:
        if kind not in KINDS or not _fits(generation, 32) or not _is_bytes(record_id, ID_SIZE):
            return None
        if not _is_bytes(sealed, SEALED_SIZE) or not sealed.startswith(_SEALED_MAGIC):
            return None
        nonce, body = sealed[len(_SEALED_MAGIC) : _SEALED_BODY], sealed[_SEALED_BODY:]
        try:
            return self._cipher.decrypt(nonce, body, self._aad(kind, generation, record_id))
        except InvalidTag:
            return None

    def _aad(self, kind: str, generation: int, record_id: bytes) -> bytes:
        return _SEALED_MAGIC + enc(
            "sqla-byok/1/sealed", kind, self.tenant, self.id, u32(generation), record_id
        )

    def _reference_aad(self, kind: str, generation: int, record_id: bytes) -> bytes:
        return _REFERENCE_MAGIC + enc(
            "sqla-byok/1/sealed-reference", kind, self.tenant, self.id, u32(generation), record_id
        )

    def _manifest_tag(self, epoch: int, records: Sequence[Record], searchable: str) -> bytes:
        fields: list[bytes | str] = ["sqla-byok/1/manifest", self.tenant, self.id]
        fields += (u64(epoch), u32(len(records)))
        for record in sorted(records, key=lambda record: (record.kind.encode(), record.generation)):
            fields += (record.kind, u32(record.generation), record.id, record.state)
        if searchable:
            fields.append(searchable)
        return hmac.digest(self._manifest_key, enc(*fields), "sha256")


def is_reference(sealed: object) -> bool:
    """Whether it says where a secret is kept, and is not the sealed secret itself."""
    return isinstance(sealed, bytes) and sealed.startswith(_REFERENCE_MAGIC)


def _record_id(kind: str, secret: bytes, tenant: str) -> bytes:
    return data_key_id(secret, tenant) if kind == DATA_KEY else salt_id(secret, tenant)


def _manifest_fault(epoch: int, records: Sequence[Record]) -> str:
    if not _fits(epoch, 64):
        return "the epoch is out of range"
    for record in records:
        if record.kind not in KINDS or record.state not in STATES:
            return "a kind or state is unknown"
        if not _fits(record.generation, 32) or not _is_bytes(record.id, ID_SIZE):
            return "a generation or id is out of range"
    for key in ({(r.kind, r.generation) for r in records}, {(r.kind, r.id) for r in records}):
        if len(key) != len(records):
            return "a generation or id is listed twice"
    for kind in KINDS:
        if sum(record.kind == kind and record.state == ACTIVE for record in records) != 1:
            return f"not exactly one {kind} is active"
    return ""


# What comes from a database may be of any type (SQLite enforces none).


def _fits(n: object, bits: int) -> bool:
    return isinstance(n, int) and 0 <= n < 1 << bits


def _is_bytes(x: object, size: int) -> bool:
    return isinstance(x, bytes) and len(x) == size


def data_key_id(data_key: bytes, tenant: str) -> bytes:
    """Name a data key: 16 bytes that commit to it, so a stored value opens under one key only.

    :raises ValueError: the key has not 32 bytes.
    """
    return kdf(_sized(data_key, KEY_SIZE), ID_SIZE, "sqla-byok/1/key-id", tenant)


def salt_id(salt: bytes, tenant: str) -> bytes:
    """Name a search salt: 16 bytes.

    By HMAC-SHA-512 and not by :func:`kdf`, for the reason given at
    :func:`~sqla_byok.crypto.hashes.derive_column_salt`.

    :raises ValueError: the salt has not 32 bytes.
    """
    return hmac.digest(_sized(salt, KEY_SIZE), enc("sqla-byok/1/salt-id", tenant), "sha512")[:ID_SIZE]


def value_key(data_key: bytes, tenant: str) -> bytes:
    """Derive the key that encrypts a tenant's values: 32 bytes, one for all columns.

    :raises ValueError: the data key has not 32 bytes.
    """
    return kdf(_sized(data_key, KEY_SIZE), KEY_SIZE, "sqla-byok/1/value", tenant)


def row_tag(
    keystore_key: bytes,
    *,
    tenant: str,
    provider: str,
    config: bytes,
    wrapped: bytes,
    kms_key_version: str,
    revoke_within_ms: int,
    outage_grace_ms: int,
    tk_id: bytes,
    tk_generation: int,
    epoch: int,
    manifest_tag: bytes,
    position: int = 0,
    count: int = 1,
) -> bytes:
    """Authenticate a tenant's row, to be checked before any field of it is used.

    :param keystore_key: 32 bytes that the vendor holds outside the database.
    :param config: the bytes as they are stored; parsing and writing JSON again would change them.
    :param kms_key_version: empty where the provider has none.
    :param position: which of the tenant's wrappings this is, from 0: the order in which they are tried.
    :param count: how many there are. Position and count are part of the tag where there are several, so that none can
        be taken away or put first.
    :returns: 32 bytes. Compare with :func:`hmac.compare_digest`.
    :raises ConfigurationError: the keystore key has another size.
    :raises OverflowError: a number is negative or too large, which no row of ours has.
    """
    if len(keystore_key) != KEY_SIZE:
        raise ConfigurationError(f"The keystore key must have {KEY_SIZE} bytes, not {len(keystore_key)}.")
    fields = (
        *("sqla-byok/1/tenant-row", tenant, provider, config, wrapped, kms_key_version),
        *(u32(revoke_within_ms), u32(outage_grace_ms), tk_id, u32(tk_generation), u64(epoch), manifest_tag),
        *((u32(position), u32(count)) if count > 1 else ()),
    )
    return hmac.digest(keystore_key, enc(*fields), "sha256")


def value_header(algorithm: int, key_id: bytes) -> bytes:
    """The first 18 bytes of a stored value. The first of them never begins UTF-8, so text is told apart."""
    return bytes((VALUE_MAGIC, algorithm)) + _sized(key_id, ID_SIZE)


def direct_value(inner: bytes, key_version: str, blob: bytes) -> bytes:
    """Frame what the customer's KMS made of a value.

    :param inner: the value that was encrypted, as any other column would store it.
    :param key_version: the version of the customer key, up to 255 ASCII letters, digits, ``-`` and ``_``; empty where
        the provider keeps that to itself.
    :param blob: the KMS's ciphertext of ``inner``.
    :raises ValueError: the key version is not one, or ``inner`` is not a value.
    """
    version = key_version.encode()
    if _VERSION.fullmatch(version) is None or not is_value_of(inner, inner[2:HEADER_SIZE]):
        raise ValueError("not a value, or not a key version of letters, digits, - and _")
    return value_header(DIRECT, inner[2:HEADER_SIZE]) + bytes((len(version),)) + version + blob


_DIRECT_BEGINS = bytes((VALUE_MAGIC, DIRECT))


def is_direct(value: object) -> bool:
    """Whether a stored value says that the customer's KMS encrypted it."""
    return isinstance(value, bytes) and value.startswith(_DIRECT_BEGINS) and len(value) > HEADER_SIZE


def split_direct(value: bytes) -> tuple[bytes, str, bytes] | None:
    """Take a direct value apart.

    :returns: the id of the data key of the value inside (16 bytes), the key version, and what the KMS made; ``None``
        where it is not well formed.
    """
    body = HEADER_SIZE + 1 + value[HEADER_SIZE] if is_direct(value) else len(value)
    version, blob = value[HEADER_SIZE + 1 : body], value[body:]
    if not blob or _VERSION.fullmatch(version) is None:
        return None
    return value[2:HEADER_SIZE], version.decode(), blob


def is_value_of(inner: bytes, key_id: bytes) -> bool:
    """Whether what a KMS decrypted is a value under the data key that its frame names, and no frame again."""
    return len(inner) >= OVERHEAD and inner[:HEADER_SIZE] in (
        value_header(PLAIN, key_id),
        value_header(PADDED, key_id),
    )


def tenant_aad(header: bytes, tenant: str) -> bytes:
    """The first part of a value's additional data: what its tenant's key determines."""
    return header + enc(tenant)


def column_aad(column_id: str, codec: str, row: bytes = b"") -> bytes:
    """The second part of a value's additional data: what its column determines.

    :param row: the row the value is bound to; empty for none.
    """
    return enc(column_id, codec, row)


def pad(plaintext: bytes, to: int) -> bytes:
    """Append 0x80 and then zeros up to a multiple of ``to`` bytes (ISO/IEC 9797-1, method 2).

    :raises ValueError: ``to`` is less than 1.
    """
    if to < 1:
        raise ValueError("pads to a multiple of at least 1 byte")
    return plaintext + b"\x80" + bytes(-(len(plaintext) + 1) % to)


def unpad(padded: bytes) -> bytes:
    """Undo :func:`pad`, to whatever multiple it was.

    For authenticated plaintexts only, where an error tells nobody anything.

    :raises ValueError: the padding is not one of ours.
    """
    marked = padded.rstrip(b"\0")
    if not marked.endswith(b"\x80"):
        raise ValueError("bad padding")
    return marked[:-1]
