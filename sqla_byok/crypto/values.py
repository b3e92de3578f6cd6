"""Sealing and opening column values: the hot path.

Everything that can be known before the value is bound here, once per column and dialect, so that a value costs one
look-up of the running statement's keys, one nonce and one AES-GCM call (NIST SP 800-38D)::

    value = H ‖ nonce (12) ‖ ciphertext ‖ tag (16)          H = 0xB1 ‖ algorithm ‖ key id (16)
    AAD   = H ‖ LP(tenant) ‖ LP(column id) ‖ LP(codec) ‖ LP(row)

The first half of the AAD belongs to the tenant's key (:class:`ValueKey`), the second to the column.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os import urandom
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sqla_byok.crypto.codecs import Codec, UnfitError
from sqla_byok.crypto.formats import (
    HEADER_SIZE,
    NONCE_SIZE,
    OVERHEAD,
    PADDED,
    PLAIN,
    VALUE_MAGIC,
    Secret,
    column_aad,
    data_key_id,
    pad,
    tenant_aad,
    unpad,
    value_header,
    value_key,
)
from sqla_byok.crypto.hashes import Scope, hasher
from sqla_byok.errors import EncodeError, NotEncryptedError, TamperedError

__all__ = [
    "DECRYPT_FAILURES",
    "Opener",
    "Opening",
    "Ring",
    "Taker",
    "ValueKey",
    "hash_with",
    "open_bytes",
    "open_with",
    "reseal_with",
    "seal_bytes",
    "seal_with",
]


class _Count:
    """How many stored values did not open, since the process started."""

    value = 0

    def add(self) -> None:
        self.value += 1


DECRYPT_FAILURES = _Count()

_ALTERED = (
    "{column}: a stored value does not authenticate; it was altered, or written for another column. Where this one, "
    "its table or its schema was renamed, declare it with column_id= and the old name"
)

Seal = Callable[[bytes, bytes, bytes], bytes]
Opener = tuple[Callable[[bytes, bytes, bytes], bytes], bytes]

_BODY = HEADER_SIZE + NONCE_SIZE

# Slicing by constants: one allocation less for each.
_HEADER_PART = slice(0, HEADER_SIZE)
_NONCE_PART = slice(HEADER_SIZE, _BODY)
_SEALED_PART = slice(_BODY, None)


class ValueKey(Secret):
    """One generation of a tenant's data key, ready for use.

    :param data_key: 32 bytes.
    :param tenant: the tenant it belongs to.
    """

    __slots__ = ("aad", "encrypt", "header", "id", "openers", "padded_aad", "padded_header")

    def __init__(self, data_key: bytes, tenant: str) -> None:
        cipher = AESGCM(value_key(data_key, tenant))
        self.id = data_key_id(data_key, tenant)
        self.encrypt: Seal = cipher.encrypt
        self.header = value_header(PLAIN, self.id)
        self.aad = tenant_aad(self.header, tenant)
        self.padded_header = value_header(PADDED, self.id)
        self.padded_aad = tenant_aad(self.padded_header, tenant)
        self.openers: dict[bytes, Opener] = {
            self.header: (cipher.decrypt, self.aad),
            self.padded_header: (cipher.decrypt, self.padded_aad),
        }


class Ring(Protocol):
    """What the hot path needs of a keyring: the key to write with, the keys to read with, the column salts.

    While search salts are rotated there are several: ``salts`` are the active one's, ``live_salts`` all of them.
    ``off`` tells of a column whether it gets no hashes; None where that holds for none.
    """

    @property
    def tenant(self) -> str: ...
    @property
    def write(self) -> ValueKey: ...
    @property
    def openers(self) -> Mapping[bytes, Opener]: ...
    @property
    def salts(self) -> Mapping[tuple[str, Scope], bytes]: ...
    @property
    def live_salts(self) -> Sequence[Mapping[tuple[str, Scope], bytes]]: ...
    @property
    def off(self) -> Callable[[str], bool] | None: ...


class Running(Protocol):
    """The turn of a statement: whose keyrings it uses."""

    @property
    def attachment(self) -> object: ...
    @property
    def rings(self) -> Mapping[str | None, Ring]: ...


class Taker(NamedTuple):
    """Where a column's processors find the keyring that they work with. They look by themselves: it is a call less.

    :param running: gives the turn of the running statement.
    :param attachment: what the turn has to belong to.
    :param owner: whose keyring of the turn it is.
    :param nobody: raises the error where there is none.
    """

    running: Callable[[], Running | None]
    attachment: object
    owner: str | None
    nobody: Callable[[], NoReturn]

    def ring(self) -> Ring | None:
        """The keyring; None where there is none."""
        turn = self.running()
        return None if turn is None or turn.attachment is not self.attachment else turn.rings.get(self.owner)


def seal_with(
    taker: Taker,
    column: str,
    codec: Codec,
    limit: int | None = None,
    pad_to: int | None = None,
    kept: tuple[type, Callable[[Any], bytes]] | None = None,
) -> Callable[[Any], bytes | None]:
    """Build the function that turns a Python value into a stored value.

    :param taker: finds the keyring of the running statement.
    :param column: the column id, bound into each value.
    :param limit: the longest text in characters that needs no further check.
    :param pad_to: pad the plaintext to a multiple of so many bytes.
    :param kept: a class whose objects are stored values already, and what takes the bytes out of one.
    :returns: ``None`` for ``None``, else 46 bytes more than the (padded) plaintext. The function raises
        :class:`~sqla_byok.errors.EncodeError` for a value that does not fit.
    """
    tail = column_aad(column, codec.name)
    encode = codec.encode
    longest = (sys.maxsize if limit is None else limit) if codec.name == "str" else -1
    kept_type, keep = kept or (None, None)
    running, attachment, owner, nobody = taker

    def seal(value: Any) -> bytes | None:
        if value is None:
            return None
        turn = running()
        if turn is None or turn.attachment is not attachment or (ring := turn.rings.get(owner)) is None:
            nobody()
        plaintext, unfit = b"", None
        try:
            if type(value) is str and len(value) <= longest:
                plaintext = value.encode()
            elif type(value) is kept_type and keep is not None:
                return keep(value)
            else:
                plaintext = encode(value)
        except UnfitError as error:
            unfit = str(error)
        except UnicodeEncodeError:
            unfit = "is not encodable text (lone surrogates)"
        if unfit is not None:
            raise EncodeError(f"{column}: {unfit}", column=column, tenant=ring.tenant)
        key = ring.write
        nonce = urandom(12)
        if pad_to is None:
            return key.header + nonce + key.encrypt(nonce, plaintext, key.aad + tail)
        return key.padded_header + nonce + key.encrypt(nonce, pad(plaintext, pad_to), key.padded_aad + tail)

    return seal


class Opening(NamedTuple):
    """What turns stored values of one column back into Python values, under the keyring that it is given.

    Both give ``None`` for ``None``, and raise :class:`~sqla_byok.errors.TamperedError` for a value that does not
    authenticate in this column, which they never return.

    :param one: opens one stored value.
    :param many: opens a sequence of them; the more there are, the less each costs.
    """

    one: Callable[[Ring | None, Any], Any]
    many: Callable[[Ring | None, Sequence[Any]], Sequence[Any]]

    def then(self, step: Callable[[Any], Any] | None) -> Opening:
        """The same with a step behind it."""
        if step is None:
            return self
        one, many = self
        return Opening(
            lambda ring, blob: step(one(ring, blob)),
            lambda ring, blobs: [step(value) for value in many(ring, blobs)],
        )

    def after(self, step: Callable[[Any], Any] | None) -> Opening:
        """The same with a step before it."""
        if step is None:
            return self
        one, many = self
        return Opening(
            lambda ring, blob: one(ring, step(blob)),
            lambda ring, blobs: many(ring, [step(blob) for blob in blobs]),
        )


def open_with(
    foreign: Callable[[Ring | None, bytes], Any],
    column: str,
    codec: Codec,
) -> Opening:
    """Build what turns stored values back into Python values.

    :param foreign: told of a value whose key is not in the keyring; raises the error, or says what is read instead.
    :param column: the column id, bound into each value.
    """
    tail = column_aad(column, codec.name)
    decode: Callable[[bytes], Any] = bytes.decode if codec.name == "str" else codec.decode

    def refuse(ring: Ring | None, blob: Any) -> Any:
        blob = bytes(blob) if isinstance(blob, bytes | bytearray | memoryview) else b""
        if ring is None or blob[:HEADER_SIZE] not in ring.openers:
            return foreign(ring, blob)
        DECRYPT_FAILURES.add()
        raise TamperedError(
            _ALTERED.format(column=column),
            column=column,
            tenant=ring.tenant,
        )

    def one(ring: Ring | None, blob: Any) -> Any:
        if blob is None:
            return None
        try:
            decrypt, aad = ring.openers[blob[_HEADER_PART]]  # type: ignore[union-attr]
            plaintext = decrypt(blob[_NONCE_PART], blob[_SEALED_PART], aad + tail)
            return decode(plaintext) if blob[1] == PLAIN else decode(unpad(plaintext))
        except Exception:  # noqa: BLE001, S110 - whatever it is, its text and its chain could carry the plaintext
            pass
        return refuse(ring, blob)  # out here, nothing is chained to what is raised

    def many(ring: Ring | None, blobs: Sequence[Any]) -> Sequence[Any]:
        # Most often all were sealed under one key: then the header, which each AAD begins with, is compared instead of
        # looked up. Where anything is otherwise, each is opened by itself.
        opened: list[Any] = []
        try:
            header = next(blob for blob in blobs if blob is not None)[_HEADER_PART]
            decrypt, aad = ring.openers[header]  # type: ignore[union-attr]
            aad += tail
            if header[1] == PLAIN:
                opened = [
                    None if blob is None else decode(decrypt(blob[_NONCE_PART], blob[_SEALED_PART], aad))
                    for blob in blobs
                    if blob is None or blob.startswith(header)
                ]
        except Exception:  # noqa: BLE001, S110 - as above
            pass
        return opened if len(opened) == len(blobs) else [one(ring, blob) for blob in blobs]

    return Opening(one, many)


def reseal_with(
    foreign: Callable[[Ring | None, bytes], Any],
    column: str,
    codec: str,
    pad_to: int | None = None,
) -> Callable[[Ring, bytes], bytes]:
    """Build what brings a stored value under the data key that is written with, and to the declared padding.

    Its plaintext stays as it is, to the byte: no codec, and no code of the application, sees it.

    :param foreign: told of a value whose key is not in the keyring; raises the error.
    :param codec: the name of the column's codec.
    :returns: a function that gives the same object where there is nothing to do, and that raises
        :class:`~sqla_byok.errors.TamperedError` for a value that does not authenticate in this column.
    """
    tail = column_aad(column, codec)

    def reseal(ring: Ring, blob: bytes) -> bytes:
        key, found = ring.write, blob[_HEADER_PART]
        if pad_to is None:
            header, aad = key.header, key.aad
        else:
            header, aad = key.padded_header, key.padded_aad
        if found == header and (pad_to is None or (len(blob) - OVERHEAD) % pad_to == 0):
            return blob
        opener, plaintext = ring.openers.get(found), None
        if opener is None:
            foreign(ring, blob)
        else:
            try:  # suppress() takes as long as the decryption
                plaintext = opener[0](blob[_NONCE_PART], blob[_SEALED_PART], opener[1] + tail)
                plaintext = plaintext if found[1] == PLAIN else unpad(plaintext)
            except (InvalidTag, ValueError):
                plaintext = None
        if plaintext is None:
            DECRYPT_FAILURES.add()
            raise TamperedError(
                _ALTERED.format(column=column),
                column=column,
                tenant=ring.tenant,
            )
        nonce = urandom(12)
        return (
            header
            + nonce
            + key.encrypt(nonce, plaintext if pad_to is None else pad(plaintext, pad_to), aad + tail)
        )

    return reseal


# In place of a column's codec: what is sealed outside the columns opens in none of them.
_BYTES = "sealed-bytes"


def seal_bytes(ring: Ring, data: bytes, purpose: str) -> bytes:
    """Encrypt bytes that live outside the columns.

    :param purpose: bound into the result in place of a column id.
    :returns: 46 bytes more than the data.
    """
    key, nonce = ring.write, urandom(12)
    return key.header + nonce + key.encrypt(nonce, bytes(data), key.aad + column_aad(purpose, _BYTES))


R = TypeVar("R", bound=Ring)


def open_bytes(ring: R, sealed: bytes, purpose: str, refuse: Callable[[R, bytes, str], object]) -> bytes:
    """Decrypt what :func:`seal_bytes` returned.

    :param refuse: raises the error for a key that is not in the keyring.
    :raises TamperedError: it does not authenticate for this purpose.
    """
    opener = ring.openers.get(sealed[_HEADER_PART])
    if opener is None:
        refuse(ring, sealed, purpose)
    else:
        decrypt, aad = opener
        with suppress(InvalidTag, ValueError):
            return decrypt(sealed[_NONCE_PART], sealed[_SEALED_PART], aad + column_aad(purpose, _BYTES))
    raise TamperedError(
        f"{purpose}: what was to be unsealed does not authenticate; it was altered, or sealed for another purpose",
        tenant=ring.tenant,
    )


def hash_with(
    taker: Taker,
    column: str,
    codec: Codec,
    algorithm: str,
    scope: Scope,
    normalize: Callable[[Any], Any] | None = None,
    nth: int = 0,
) -> Callable[[Any], bytes | None]:
    """Build the function that turns a Python value into its search hash (32 bytes).

    :param nth: by which of the live search salts; 0 is the active one.
    :param normalize: applied to the value before it is hashed; ``None`` from it means "no hash".
    :returns: a function that raises :class:`~sqla_byok.errors.EncodeError` for a value that does not fit.
    """
    digest, key = hasher(algorithm), (algorithm, scope)
    if codec.text is None:
        raise TypeError(f"codec {codec.name} has no search text")
    text_of, is_text = codec.text, codec.name == "str"
    running, attachment, owner, nobody = taker

    def hash_(value: Any) -> bytes | None:
        if value is None:
            return None
        turn = running()
        if turn is None or turn.attachment is not attachment or (ring := turn.rings.get(owner)) is None:
            nobody()
        off = ring.off
        if off is not None and off(column):
            return None
        text, unfit = b"", None
        try:
            if normalize is not None:
                value = normalize(value)
                if value is None:
                    return None
            text = value.encode() if is_text and type(value) is str else text_of(value)
        except UnfitError as error:
            unfit = str(error)
        except UnicodeEncodeError:
            unfit = "is not encodable text (lone surrogates)"
        except Exception as error:  # noqa: BLE001 - a user's function; its text could carry the value
            unfit = f"its normalizer raised {type(error).__name__}"
        if unfit is not None:
            raise EncodeError(f"{column}: {unfit}", column=column, tenant=ring.tenant)
        return digest(text, (ring.live_salts[nth] if nth else ring.salts)[key])

    return hash_


def explain_foreign(blob: bytes, column: str, tenant: str | None) -> None:
    """Raise :class:`~sqla_byok.errors.NotEncryptedError` where a stored value has not the shape of ours."""
    if len(blob) < _BODY or blob[0] != VALUE_MAGIC:
        raise NotEncryptedError(
            f"{column}: the stored value was not written by sqla_byok; it may be plaintext from before a migration",
            column=column,
            tenant=tenant,
        )
