"""Search hashes: 32 bytes that let the database find equal values.

A hash is made from the canonical text of a value (see :mod:`sqla_byok.crypto.codecs`) and a salt of 32
letters and digits. By default each column has a salt of its own, derived from the tenant's search salt;
columns that are to be compared with each other share a named scope.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from hashlib import sha256
from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from sqla_byok.crypto.formats import BASE62, enc
from sqla_byok.errors import ConfigurationError

__all__ = ["ALGORITHMS", "SALT_SIZE", "Scope", "derive_column_salt", "hasher"]

ALGORITHMS = ("sha256", "hmac-sha256")
SALT_SIZE = 32

# 384 bits of key material reduced modulo 62^32 (191 bits): the bias is below 2^-193.
_OKM_SIZE = 48

_SHA256 = SHA256()


class Scope(NamedTuple):
    """Who shares a column's salt.

    :param kind: ``"column"`` (nobody else), ``"scope"`` (all columns that name it) or ``"tenant"`` (all that
        say so; their salt is the search salt itself).
    :param name: the column id, the scope's name, or empty.
    """

    kind: str
    name: str


def derive_column_salt(search_salt: bytes, tenant: str, algorithm: str, scope: Scope) -> bytes:
    """Derive the salt of a column or scope.

    By HMAC-SHA-512, and not by the HKDF-SHA-256 of the other keys. HKDF without salt (RFC 5869) begins with
    an HMAC under a key of zeros (RFC 2104: ipad is 0x36), whose inner hash is SHA-256 of sixty-four "6" and
    the search salt. A column of scope "tenant" stores exactly that for the value of sixty-four "6", and every
    derived salt would follow from it.

    :param search_salt: 32 bytes.
    :param algorithm: one of :data:`ALGORITHMS`; each has salts of its own.
    :returns: 32 ASCII letters and digits.
    :raises ConfigurationError: an unknown hash or scope, or scope "tenant" with another hash than "sha256".
    :raises ValueError: the search salt has another size.
    """
    _check_algorithm(algorithm)
    if len(search_salt) != SALT_SIZE:
        raise ValueError(f"expects {SALT_SIZE} bytes, got {len(search_salt)}")
    if scope.kind == "tenant":
        if algorithm != "sha256":
            raise ConfigurationError('The salt scope "tenant" goes with the hash "sha256" only.')
        return search_salt
    if scope.kind not in ("column", "scope"):
        raise ConfigurationError('A salt scope is one of "column", "scope" and "tenant".')
    info = enc("sqla-byok/1/column-salt", tenant, algorithm, scope.kind, scope.name)
    return _base62(hmac.digest(search_salt, info, "sha512")[:_OKM_SIZE])


def _base62(okm: bytes) -> bytes:
    number, digits = int.from_bytes(okm, "big"), []
    for _ in range(SALT_SIZE):
        number, digit = divmod(number, len(BASE62))
        digits.append(BASE62[digit])
    return "".join(reversed(digits)).encode()


def hasher(algorithm: str) -> Callable[[bytes, bytes], bytes]:
    """Give the function ``(text, salt) -> hash`` of an algorithm; it keeps no state.

    :raises ConfigurationError: the algorithm is unknown.
    """
    _check_algorithm(algorithm)
    return _sha256 if algorithm == "sha256" else _hmac_sha256


def _check_algorithm(algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ConfigurationError(f"A search hash is one of {', '.join(ALGORITHMS)}.")


def _sha256(text: bytes, salt: bytes) -> bytes:
    return sha256(text + salt).digest()


def _hmac_sha256(text: bytes, salt: bytes) -> bytes:
    # RFC 2104. On short texts about a tenth cheaper than hmac.digest(), which looks its algorithm up by name.
    mac = HMAC(salt, _SHA256)
    mac.update(text)
    return mac.finalize()
