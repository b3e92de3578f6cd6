"""A customer key in a file of this machine, for development, tests and offline recovery."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sqla_byok.errors import (
    AccessDeniedError,
    ConfigurationError,
    KeyDeletedError,
    KmsRefusedError,
    WrongKeyError,
)
from sqla_byok.kms.base import Kms, Operator, Wrapped, request_id

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LocalKms"]

_HEADER = b"\xb3\x01"
_LABEL = b"sqla-byok/1/local-kms"
_KEY_SIZE = 32
_NONCE_SIZE = 12
_ROOM = 4096
_FILE_LIMIT = 1024  # bytes; a key file has 45

# Flags that a platform lacks count as 0. O_NONBLOCK keeps a FIFO in the key's place from hanging us.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_COMMON = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | _NO_FOLLOW
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _COMMON
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _COMMON


@dataclass(frozen=True, init=False)
class LocalKms(Kms):
    """A key file in the place of a KMS.

    The file holds 32 random bytes as one line of base64 text (44 characters and a newline). It must be a
    regular file, not a symbolic link, owned by the process's user and closed to everybody else (mode 0600 or
    0400). It is read again at every wrap and unwrap: taking it away, or its permissions, is what disabling
    the key is to a real KMS. Nothing creates it but :meth:`create`, so that its loss is noticed.

    Where the system has no ``O_NOFOLLOW`` (Windows) a symbolic link is looked for just before the file is
    opened; where it has no ``geteuid``, owner and mode are not checked: protect the folder by its own means.

    :param path: where the file is; a relative path is made absolute now.
    :raises ConfigurationError: the path is empty or not one at all.

    Example::

        LocalKms.create("/etc/byok/dev.key")                 # once
        byok.onboard("org-42", LocalKms("/etc/byok/dev.key"))
    """

    provider: ClassVar[str] = "local"
    outbound: ClassVar[bool] = False
    path: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if not text or "\0" in text:
            raise ConfigurationError("LocalKms needs the path of a key file.")
        object.__setattr__(self, "path", os.path.abspath(text))

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Make a new key file with mode 0600, and write it through to the disk.

        :param path: where; the folder must exist, the file must not.
        :return: the description of the new key.
        :raises ConfigurationError: the file exists (it is never overwritten) or cannot be written.
        """
        kms = cls(path)
        try:
            descriptor = os.open(kms.path, _CREATE, 0o600)
        except FileExistsError:
            raise ConfigurationError(
                f"{kms.path} exists; a key file is never overwritten. Use LocalKms(path) to use it."
            ) from None
        except OSError as error:
            raise ConfigurationError(f"Cannot create the key file {kms.path}: {error.strerror}.") from None
        _fill(kms.path, descriptor)
        return kms

    @property
    def profile(self) -> str:
        """Always ``"default"``: a key file has no settings."""
        return "default"

    def config(self) -> dict[str, str]:
        """``{"path": …}``."""
        return {"path": self.path}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Self:
        """The key that :meth:`config` described.

        :raises ConfigurationError: *config* has other keys than ``path``, or a relative path.
        """
        path = config.get("path")
        if set(config) != {"path"} or not isinstance(path, str) or not os.path.isabs(path):
            raise ConfigurationError('The configuration of a LocalKms is {"path": <absolute path>}.')
        return cls(path)

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> _LocalClient:
        """A client that reads the key file at each call.

        :param settings: not used, like the others; a profile may serve other providers too.
        """
        return _LocalClient(self.path)


class _LocalClient:
    """Holds nothing but the path, so any thread and any forked process can use it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        """See :meth:`sqla_byok.kms.base.KmsClient.wrap`; takes up to 4,096 bytes."""
        if len(payload) > _ROOM:
            raise self._refused(
                KmsRefusedError, tenant, f"takes no more than {_ROOM} bytes. Use a smaller payload"
            )
        aead, context = self._open(tenant)
        nonce = os.urandom(_NONCE_SIZE)
        return Wrapped(_HEADER + nonce + aead.encrypt(nonce, payload, context))

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        """See :meth:`sqla_byok.kms.base.KmsClient.unwrap`.

        :raises WrongKeyError: the blob is damaged, another key's or another tenant's.
        """
        aead, context = self._open(tenant)
        blob = wrapped.blob
        body = blob[len(_HEADER) :]
        if blob.startswith(_HEADER):
            try:
                return aead.decrypt(body[:_NONCE_SIZE], body[_NONCE_SIZE:], context)
            except (InvalidTag, ValueError):
                pass
        raise self._refused(
            WrongKeyError,
            tenant,
            "does not open this wrapped key: it is damaged, another tenant's or another key file's. "
            "Put back the key file with which the tenant was onboarded",
        )

    def room(self, wrapped: Wrapped) -> int:
        """See :meth:`sqla_byok.kms.base.KmsClient.room`: as much as AWS KMS takes."""
        return _ROOM

    def _open(self, tenant: str) -> tuple[AESGCM, bytes]:
        request_id.set(None)
        context = _encode(_LABEL, tenant.encode())
        key = HKDF(SHA256(), 32, salt=None, info=context).derive(self._key(tenant))
        return AESGCM(key), context

    def _key(self, tenant: str) -> bytes:
        try:
            key = base64.b64decode(self._read(tenant).strip(), validate=True)
        except binascii.Error:
            key = b""
        if len(key) != _KEY_SIZE:
            raise self._refused(
                WrongKeyError,
                tenant,
                "is not a key file: it must hold 32 bytes in base64. Put back the file with which the tenant "
                "was onboarded",
            )
        return key

    def _read(self, tenant: str) -> bytes:
        if not _NO_FOLLOW and os.path.islink(self._path):
            raise self._link(tenant)
        try:
            descriptor = os.open(self._path, _READ)
            try:
                self._check(os.fstat(descriptor), tenant)
                return os.read(descriptor, _FILE_LIMIT)
            finally:
                os.close(descriptor)
        except OSError as error:
            code, reason = error.errno, error.strerror
        if code in (errno.ENOENT, errno.ENOTDIR):
            raise self._refused(KeyDeletedError, tenant, "is missing. Put it back from its backup")
        if code in (errno.ELOOP, errno.EMLINK):  # FreeBSD says EMLINK
            raise self._link(tenant)
        raise self._refused(
            AccessDeniedError, tenant, f"cannot be read ({reason}). Let this process's user own it, chmod 600"
        )

    def _check(self, status: os.stat_result, tenant: str) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise self._refused(AccessDeniedError, tenant, "is not a regular file. Put the key file there")
        if not hasattr(os, "geteuid"):
            return
        if status.st_uid != os.geteuid():
            raise self._refused(
                AccessDeniedError, tenant, f"belongs to another user (uid {status.st_uid}). Change its owner"
            )
        if status.st_mode & 0o077:
            raise self._refused(
                AccessDeniedError,
                tenant,
                f"is open to others (mode {status.st_mode & 0o777:o}). chmod 600 it",
            )

    def _link(self, tenant: str) -> KmsRefusedError:
        return self._refused(
            AccessDeniedError, tenant, "is a symbolic link. Put the file itself there, chmod 600"
        )

    def _refused(self, error: type[KmsRefusedError], tenant: str, what: str) -> KmsRefusedError:
        text = f"For tenant {tenant!r}, the key file {self._path} {what}."
        return error(text, tenant=tenant, action_by="operator")


def _encode(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _fill(path: str, descriptor: int) -> None:
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(os.urandom(_KEY_SIZE)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        with suppress(OSError):
            os.unlink(path)  # ours: O_EXCL has just made it, and half a key must not stay
        raise ConfigurationError(f"Cannot write the key file {path}: {error.strerror}.") from None


def _sync_folder(path: str) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
