"""The KMS calls of single values, for columns in ``mode="direct"``: each is a line in the customer's own log.

Every one of them goes through :meth:`~sqla_byok.keys.keyrings.Keyrings.ask_directly`.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

from sqla_byok.crypto.formats import OVERHEAD, direct_value, is_value_of, split_direct
from sqla_byok.errors import EncodeError, TamperedError, WrongKeyError
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.kms import Wrapped

__all__ = ["AT_ONCE", "Cell", "adecrypt", "aencrypt", "decrypt", "encrypt"]

AT_ONCE = 8
"""KMS calls under way at once for one tenant, beside those that a thread makes for a single value of its own."""

T = TypeVar("T")
R = TypeVar("R")


class Cell(NamedTuple):
    """A value and the id of its column."""

    column: str
    value: bytes


def encrypt(keyrings: Keyrings, ring: Keyring, cells: Sequence[Cell]) -> list[bytes]:
    """Have the customer's KMS encrypt values: one call for each, several at once. All of them, or it raises.

    :param cells: the values as another column would store them.
    :returns: what is to be stored.
    :raises EncodeError: if one is too long for the customer key; no call was made.
    :raises KmsError: if the KMS refuses or does not answer.
    """
    _check_room(keyrings, ring, cells)
    return _run(ring.tenant, lambda cell: _encrypted(keyrings, ring, cell), cells)


async def aencrypt(keyrings: Keyrings, ring: Keyring, cells: Sequence[Cell]) -> list[bytes]:
    """:func:`encrypt` from asyncio: the calls are made in threads, and the event loop goes on."""
    # In a thread as well, since making the client imports a provider's SDK.
    await _arun(ring.tenant, lambda _: _check_room(keyrings, ring, cells), [None])
    return await _arun(ring.tenant, lambda cell: _encrypted(keyrings, ring, cell), cells)


def decrypt(keyrings: Keyrings, ring: Keyring, cells: Sequence[Cell]) -> list[bytes]:
    """Have the customer's KMS decrypt stored values: one call for each, several at once.

    :param cells: direct values, whose data keys are in ``ring``.
    :returns: the values as another column would store them.
    :raises TamperedError: if one does not open.
    :raises KmsError: if the KMS refuses or does not answer.
    """
    return _run(ring.tenant, lambda cell: _decrypted(keyrings, ring, cell), cells)


async def adecrypt(keyrings: Keyrings, ring: Keyring, cell: Cell) -> bytes:
    """:func:`decrypt` of one value from asyncio."""
    (value,) = await _arun(ring.tenant, lambda cell: decrypt(keyrings, ring, [cell])[0], [cell])
    return value


# -- one value -------------------------------------------------------------------------------------------------------


def _check_room(keyrings: Keyrings, ring: Keyring, cells: Sequence[Cell]) -> None:
    room = keyrings.room(ring)
    for cell in cells:
        if len(cell.value) > room:
            raise EncodeError(
                f"{cell.column}: a value is longer than the {room - OVERHEAD} bytes that the customer key of tenant "
                f"{ring.tenant!r} encrypts at once; declare the column with mode='envelope', which has no such limit",
                column=cell.column,
                tenant=ring.tenant,
            )


def _encrypted(keyrings: Keyrings, ring: Keyring, cell: Cell) -> bytes:
    wrapped = keyrings.ask_directly(ring, "wrap", lambda client: client.wrap(cell.value, tenant=ring.tenant))
    return direct_value(cell.value, wrapped.key_version, wrapped.blob)


def _decrypted(keyrings: Keyrings, ring: Keyring, cell: Cell) -> bytes:
    parts = split_direct(cell.value)
    if parts is None:
        raise TamperedError(
            f"{cell.column}: a stored value is not well formed; it was altered",
            column=cell.column,
            tenant=ring.tenant,
        )
    key_id, version, blob = parts
    inner = request_id = None
    try:
        inner = keyrings.ask_directly(
            ring, "unwrap", lambda client: client.unwrap(Wrapped(blob, version), tenant=ring.tenant)
        )
    except WrongKeyError as error:
        request_id = error.request_id
    if inner is None or not is_value_of(inner, key_id):
        asked = f" (request {request_id})" if request_id else ""
        raise TamperedError(
            f"{cell.column}: the customer's KMS does not open a stored value{asked}; it was altered, or it is under a "
            f"customer key that tenant {ring.tenant!r} has since replaced by another",
            column=cell.column,
            tenant=ring.tenant,
        )
    return inner


# -- several at once -------------------------------------------------------------------------------------------------


class _Lanes:
    """Threads for the calls of one tenant, as long as there are any: a KMS that hangs holds up no other tenant's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[str, tuple[ThreadPoolExecutor, int]] = {}

    @contextmanager
    def of(self, tenant: str) -> Iterator[ThreadPoolExecutor]:
        with self._lock:
            pool, users = self._lanes.get(tenant) or (
                ThreadPoolExecutor(AT_ONCE, thread_name_prefix="byok-direct"), 0
            )  # fmt: skip
            self._lanes[tenant] = pool, users + 1
        try:
            yield pool
        finally:
            with self._lock:
                _, users = self._lanes[tenant]
                if users > 1:
                    self._lanes[tenant] = pool, users - 1
                else:
                    del self._lanes[tenant]
                    pool.shutdown(wait=False)  # its threads end when they have nothing left to do


_lanes = _Lanes()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_lanes.__init__)  # type: ignore[misc]  # the parent's threads are not ours


class _Batch(Generic[T, R]):
    """Calls a function with each item; after the first failure, with none any more."""

    def __init__(self, function: Callable[[T], R]) -> None:
        self._function = function
        self.failure: BaseException | None = None

    def take(self, item: T) -> R | None:
        if self.failure is not None:
            return None
        try:
            return self._function(item)
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for the batch
            self.failure = error
            return None

    def done(self, results: Sequence[R | None]) -> list[R]:
        if self.failure is not None:
            raise self.failure
        return list(results)  # type: ignore[arg-type]  # None only after a failure


def _run(tenant: str, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    if len(items) < 2:
        return [function(item) for item in items]
    batch = _Batch(function)
    with _lanes.of(tenant) as pool:
        try:
            futures = [pool.submit(contextvars.copy_context().run, batch.take, item) for item in items]
            results = [future.result() for future in futures]
        except BaseException as error:  # Ctrl-C
            batch.failure = error
            raise
    return batch.done(results)


async def _arun(tenant: str, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    batch = _Batch(function)
    with _lanes.of(tenant) as pool:
        try:
            futures = [pool.submit(contextvars.copy_context().run, batch.take, item) for item in items]
            results = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except BaseException as error:  # cancelled
            batch.failure = error
            raise
    return batch.done(results)
