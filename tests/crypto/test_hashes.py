"""Search hashes: who shares a salt, and that nobody else does."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_byok.crypto.formats import BASE62, enc
from sqla_byok.crypto.hashes import ALGORITHMS, SALT_SIZE, Scope, derive_column_salt, hasher
from sqla_byok.errors import ConfigurationError

SALT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ012345"
COLUMN = Scope("column", "patient.mrn")
TENANT = Scope("tenant", "")


@given(st.binary(min_size=32, max_size=32))
def test_derived_salts_are_32_letters_and_digits(search_salt: bytes) -> None:
    """Each derived salt is printable ASCII of the stated length."""
    salt = derive_column_salt(search_salt, "org-42", "sha256", COLUMN)
    assert len(salt) == SALT_SIZE == 32
    assert set(salt) <= set(BASE62.encode())


def test_each_column_scope_tenant_and_algorithm_has_its_own_salt() -> None:
    """Equal values in two columns cannot be matched, unless the columns share a scope."""
    salts = {
        derive_column_salt(search_salt, tenant, algorithm, scope)
        for search_salt in (SALT, SALT[::-1])
        for tenant in ("org-42", "org-43")
        for algorithm in ALGORITHMS
        for scope in (COLUMN, Scope("column", "a.b"), Scope("scope", "a.b"), Scope("scope", "patient.mrn"))
    }
    assert len(salts) == 2 * 2 * 2 * 4


def test_derivation_is_deterministic() -> None:
    """Every process derives the same salt."""
    assert len({derive_column_salt(SALT, "org-42", "sha256", COLUMN) for _ in range(3)}) == 1


def test_tenant_scope_is_the_search_salt() -> None:
    """Scope "tenant" hashes with the search salt itself, which only plain SHA-256 may do."""
    assert derive_column_salt(SALT, "org-42", "sha256", TENANT) == SALT
    with pytest.raises(ConfigurationError, match="tenant"):
        derive_column_salt(SALT, "org-42", "hmac-sha256", TENANT)


def test_a_stored_hash_gives_no_derived_salt_away() -> None:
    """A stored hash of sixty-four "6" is an inner hash of HKDF-SHA-256: the derivation is another."""
    stored = hasher("sha256")(b"6" * 64, SALT)
    extracted = hashlib.sha256(b"\x5c" * 64 + stored).digest()
    assert extracted == hmac.digest(bytes(32), SALT, "sha256")  # what an attacker would have of HKDF-SHA-256
    info = enc("sqla-byok/1/column-salt", "org-42", "sha256", *COLUMN)
    number = int.from_bytes(hmac.digest(SALT, info, "sha512")[:48], "big")
    digits = [BASE62[number // 62**place % 62] for place in reversed(range(32))]
    assert derive_column_salt(SALT, "org-42", "sha256", COLUMN).decode() == "".join(digits)


@given(st.binary(max_size=200))
def test_hashes_are_the_named_functions(text: bytes) -> None:
    """The two algorithms are SHA-256 over text and salt, and HMAC-SHA-256 of the standard library."""
    assert hasher("sha256")(text, SALT) == hashlib.sha256(text + SALT).digest()
    assert hasher("hmac-sha256")(text, SALT) == hmac.digest(SALT, text, "sha256")


@pytest.mark.parametrize("algorithm", ["md5", "", "SHA256"])
def test_unknown_algorithms_are_refused(algorithm: str) -> None:
    """A misspelt algorithm is a configuration error, not a default."""
    with pytest.raises(ConfigurationError):
        hasher(algorithm)
    with pytest.raises(ConfigurationError):
        derive_column_salt(SALT, "org-42", algorithm, COLUMN)


def test_unknown_scopes_and_short_salts_are_refused() -> None:
    """Neither is derived from."""
    with pytest.raises(ConfigurationError):
        derive_column_salt(SALT, "org-42", "sha256", Scope("table", "patient"))
    with pytest.raises(ValueError):
        derive_column_salt(SALT[:-1], "org-42", "sha256", TENANT)
