"""LocalKms: the bytes, the guards on the key file, and what each refusal is called."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import pickle
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    KeyDeletedError,
    KmsRefusedError,
    WrongKeyError,
)
from sqla_byok.kms import KmsClient, LocalKms, Wrapped, describe, local

TENANT = "org-42"
PAYLOAD = bytes(range(65))

posix_only = pytest.mark.skipif(os.name != "posix", reason="file owners and modes are POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a new key file."""
    return Path(LocalKms.create(tmp_path / "dev.key").path)


@pytest.fixture
def client(path: Path) -> KmsClient:
    """A client of that file."""
    return LocalKms(path).connect({})


def refusal(client: KmsClient, wrapped: Wrapped | None = None) -> KmsRefusedError:
    """The error of an unwrap, after checking that wrap is refused for the same reason."""
    with pytest.raises(KmsRefusedError) as unwrapping:
        client.unwrap(wrapped or Wrapped(b""), tenant=TENANT)
    with pytest.raises(type(unwrapping.value)):
        client.wrap(PAYLOAD, tenant=TENANT)
    assert unwrapping.value.tenant == TENANT
    assert unwrapping.value.action_by == "operator"
    return unwrapping.value


# The bytes


def independent_blob(file_key: bytes, nonce: bytes, payload: bytes, tenant: str) -> bytes:
    """The blob by format.md, from the standard library's HMAC and the low-level AES-GCM."""
    label, name = b"sqla-byok/1/local-kms", tenant.encode()
    context = len(label).to_bytes(4, "big") + label + len(name).to_bytes(4, "big") + name
    extracted = hmac.digest(bytes(32), file_key, hashlib.sha256)
    key = hmac.digest(extracted, context + b"\x01", hashlib.sha256)
    encryptor = Cipher(AES(key), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(context)
    return b"\xb3\x01" + nonce + encryptor.update(payload) + encryptor.finalize() + encryptor.tag


VECTOR_KEY = bytes(range(32))
VECTOR_NONCE = bytes(range(0xA0, 0xAC))
VECTOR = (
    "b301a0a1a2a3a4a5a6a7a8a9aaabf68e9a374c7b4d55f86d159d8e077025cf82ce27b78100935569"
    "e8c044c76045ea7d6858d5d3aa1b880f4e50640a26ae3edcef8689971be7fc7218bab552ad06ff0a"
    "184cd219ce7aa26a6001d145e519b4"
)


@pytest.fixture
def vector_client(path: Path) -> KmsClient:
    """A client of a file with the vector's key."""
    path.write_bytes(base64.b64encode(VECTOR_KEY) + b"\n")
    return LocalKms(path).connect({})


def test_vector_is_what_the_format_says() -> None:
    """Protects the frozen vector: a second implementation computes the same bytes."""
    assert independent_blob(VECTOR_KEY, VECTOR_NONCE, PAYLOAD, TENANT).hex() == VECTOR


def test_unwrap_opens_the_vector(vector_client: KmsClient) -> None:
    """Protects stored blobs: what an earlier version wrapped still opens."""
    assert vector_client.unwrap(Wrapped(bytes.fromhex(VECTOR)), tenant=TENANT) == PAYLOAD


def test_wrap_makes_the_format_with_a_fresh_nonce(vector_client: KmsClient) -> None:
    """Protects the written format, and AES-GCM from a repeated nonce."""
    first, second = (vector_client.wrap(PAYLOAD, tenant=TENANT) for _ in range(2))
    assert first.blob == independent_blob(VECTOR_KEY, first.blob[2:14], PAYLOAD, TENANT)
    assert first.blob[2:14] != second.blob[2:14]
    assert first.key_version == ""


@given(payload=st.binary(max_size=200), tenant=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(client: KmsClient, payload: bytes, tenant: str) -> None:
    """Protects every payload and tenant name: what was wrapped comes back."""
    assert client.unwrap(client.wrap(payload, tenant=tenant), tenant=tenant) == payload


def test_other_tenant_is_the_wrong_key(client: KmsClient) -> None:
    """Protects isolation: a row copied to another tenant does not open."""
    with pytest.raises(WrongKeyError, match="org-43"):
        client.unwrap(client.wrap(PAYLOAD, tenant=TENANT), tenant="org-43")


def test_other_key_file_is_the_wrong_key(client: KmsClient, tmp_path: Path) -> None:
    """Protects against a swapped key file."""
    other = LocalKms.create(tmp_path / "other.key").connect({})
    with pytest.raises(WrongKeyError):
        other.unwrap(client.wrap(PAYLOAD, tenant=TENANT), tenant=TENANT)


def test_damaged_blobs_are_the_wrong_key(client: KmsClient) -> None:
    """Protects integrity: each byte of the blob, header included, and each length counts."""
    blob = client.wrap(PAYLOAD, tenant=TENANT).blob
    flipped = [blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :] for i in range(len(blob))]
    cut = [blob[:i] for i in range(len(blob))]
    for damaged in [*flipped, *cut, blob + b"\0"]:
        with pytest.raises(WrongKeyError):
            client.unwrap(Wrapped(damaged), tenant=TENANT)


# The key file


@posix_only
def test_create_makes_a_private_file(path: Path) -> None:
    """Protects the key from other users from its first moment on."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert content.endswith(b"\n")
    assert len(base64.b64decode(content)) == 32


def test_create_refuses_to_overwrite(path: Path) -> None:
    """Protects an existing key: overwriting it would lose all data under it."""
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="never overwritten"):
        LocalKms.create(path)
    assert path.read_bytes() == before


@posix_only
def test_create_does_not_follow_a_link(tmp_path: Path) -> None:
    """Protects against a link planted where the key will be written."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError):
        LocalKms.create(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_create_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against a key that was used but never reached the disk."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        LocalKms.create(tmp_path / "dev.key")
    assert not (tmp_path / "dev.key").exists()


def test_create_in_a_missing_folder(tmp_path: Path) -> None:
    """Protects the operator from a key in a folder that was mistyped."""
    with pytest.raises(ConfigurationError, match="No such file"):
        LocalKms.create(tmp_path / "missing" / "dev.key")


def test_keys_differ(path: Path, tmp_path: Path) -> None:
    """Protects against a constant key."""
    other = LocalKms.create(tmp_path / "other.key")
    assert Path(other.path).read_bytes() != path.read_bytes()


def test_missing_file_bites_at_the_next_call(client: KmsClient, path: Path) -> None:
    """Protects revocation: the file is read at each call, its absence is a "no", nothing makes it anew."""
    wrapped = client.wrap(PAYLOAD, tenant=TENANT)
    path.rename(path.with_suffix(".away"))
    assert type(refusal(client, wrapped)) is KeyDeletedError
    assert not path.exists()
    path.with_suffix(".away").rename(path)
    assert client.unwrap(wrapped, tenant=TENANT) == PAYLOAD


@posix_only
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o602, 0o601, 0o666])
def test_open_modes_are_refused(client: KmsClient, path: Path, mode: int) -> None:
    """Protects the key from a file that others can read, write or run."""
    path.chmod(mode)
    error = refusal(client)
    assert type(error) is AccessDeniedError
    assert "chmod 600" in str(error)


@posix_only
def test_a_read_only_file_is_accepted(client: KmsClient, path: Path) -> None:
    """Protects deployments that mount the key read-only: 0400 is private too."""
    path.chmod(0o400)
    client.wrap(PAYLOAD, tenant=TENANT)


@posix_only
def test_foreign_owner_is_refused(client: KmsClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against a key that another user planted and knows."""
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    error = refusal(client)
    assert type(error) is AccessDeniedError
    assert f"uid {uid}" in str(error)


@posix_only
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_refused(client: KmsClient, path: Path) -> None:
    """Protects revocation by permission: no read permission is a "no"."""
    path.chmod(0)
    assert type(refusal(client)) is AccessDeniedError


def test_other_system_errors_are_refused(tmp_path: Path) -> None:
    """Protects fail-closed: an error of the file system that nobody thought of is a "no"."""
    error = refusal(LocalKms(tmp_path / ("k" * 300)).connect({}))
    assert type(error) is AccessDeniedError
    assert "chmod 600" in str(error)


@posix_only
def test_symlink_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against a link to a file of the attacker's choice, also one put there after a look."""
    monkeypatch.setattr(os.path, "islink", lambda path: False)
    (tmp_path / "link").symlink_to(path)
    error = refusal(LocalKms(tmp_path / "link").connect({}))
    assert type(error) is AccessDeniedError
    assert "symbolic link" in str(error)


@posix_only
def test_symlink_is_refused_without_o_nofollow(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects platforms without O_NOFOLLOW: links are refused there as well."""
    monkeypatch.setattr(local, "_NO_FOLLOW", 0)
    monkeypatch.setattr(local, "_READ", os.O_RDONLY)
    (tmp_path / "link").symlink_to(path)
    assert type(refusal(LocalKms(tmp_path / "link").connect({}))) is AccessDeniedError


@posix_only
def test_works_without_posix_owners(client: KmsClient, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects Windows, whose modes say nothing: the key is usable there."""
    path.chmod(0o666)
    monkeypatch.delattr(os, "geteuid")
    client.wrap(PAYLOAD, tenant=TENANT)


@posix_only
def test_fifo_and_folder_are_refused(tmp_path: Path) -> None:
    """Protects the process from hanging on a FIFO, and from reading anything but a regular file."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    for odd in (tmp_path / "fifo", tmp_path):
        error = refusal(LocalKms(odd).connect({}))
        assert type(error) is AccessDeniedError
        assert "not a regular file" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"not base64 at all!\n",
        bytes(range(32)),
        base64.b64encode(bytes(31)) + b"\n",
        base64.b64encode(bytes(33)) + b"\n",
        base64.b64encode(bytes(32)) * 2 + b"\n",
        b"A" * 5000,
    ],
)
def test_malformed_file_is_the_wrong_key(client: KmsClient, path: Path, content: bytes) -> None:
    """Protects against use of a truncated or foreign file as a key; its content is not shown."""
    path.write_bytes(content)
    error = refusal(client)
    assert type(error) is WrongKeyError
    assert len(content) < 8 or content[:8].decode("latin-1") not in str(error)


def test_errors_survive_pickling(client: KmsClient, path: Path) -> None:
    """Protects task queues: type, message and attributes come through."""
    path.unlink()
    error = refusal(client)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is KeyDeletedError
    assert (str(copy), copy.tenant, copy.action_by) == (str(error), TENANT, "operator")


# The description


def test_path_is_absolute_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a stored configuration from a process with another working directory."""
    monkeypatch.chdir(tmp_path)
    kms = LocalKms("dev.key")
    assert kms.config() == {"path": str(tmp_path / "dev.key")}


def test_describe_restores_an_equal_value(path: Path) -> None:
    """Protects the keystore round trip: an equal, hashable, frozen value."""
    kms = LocalKms(path)
    assert describe("local", kms.config()) == kms
    assert hash(describe(kms.provider, kms.config())) == hash(kms)
    assert kms.profile == "default"
    with pytest.raises(AttributeError):
        kms.path = "/elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [{}, {"path": "relative"}, {"path": ""}, {"path": "/a", "mode": "0"}, {"path": 3}, {"path": "/a\0b"}],
)
def test_bad_configurations(config: dict[str, str]) -> None:
    """Protects against a keystore row that is not a LocalKms's."""
    with pytest.raises(ConfigurationError):
        describe("local", config)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_bad_paths(path: str) -> None:
    """Protects the operator from a path that cannot be one."""
    with pytest.raises(ConfigurationError):
        LocalKms(path)


def test_no_file_descriptor_leaks(client: KmsClient, path: Path) -> None:
    """Protects long-lived processes: neither success nor refusal leaves a descriptor open."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts /proc/self/fd")
    before = len(os.listdir("/proc/self/fd"))
    client.wrap(PAYLOAD, tenant=TENANT)
    path.chmod(0o644)
    refusal(client)
    assert len(os.listdir("/proc/self/fd")) == before
