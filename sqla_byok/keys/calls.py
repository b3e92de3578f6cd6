"""The calls to customers' KMS: the one place from which any of them is asked for anything."""

from __future__ import annotations

import hmac
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from sqla_byok.audit import Audit, KmsCalled
from sqla_byok.crypto.formats import Secret, TenantKey, new_key, pack_tenant_key
from sqla_byok.errors import (
    ByokError,
    ConfigurationError,
    KeystoreTamperedError,
    KmsNoAnswerError,
    KmsUnavailableError,
    WrongKeyError,
)
from sqla_byok.keys.rows import TenantRow, Wrapping
from sqla_byok.kms import Kms, KmsClient, Operator, Wrapped, describe
from sqla_byok.kms.base import request_id

__all__ = ["KmsCalls"]

T = TypeVar("T")

# KMS calls under way at once in this process; those for tenants whose last call failed get a part of them, so that
# dead vaults, each of which holds its call until it times out, never take them all.
CALLS_AT_ONCE = 32
FAILING_AT_ONCE = 8
# How long a call waits for its turn (seconds).
_PATIENCE = 5.0


class KmsCalls(Secret):
    """Wraps and unwraps tenant keys with customers' keys, and tells each call to the audit.

    :param profiles: the settings of KMS clients by name.
    :param operator: secrets and credentials of the operator's.
    :param audit: hears of each call.
    """

    def __init__(self, profiles: Mapping[str, Mapping[str, Any]], operator: Operator, audit: Audit) -> None:
        self._profiles, self._operator, self._audit = profiles, operator, audit
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the calls of the parent process."""
        self._turn = threading.Condition()
        self._under_way = self._failing = 0

    def describe(self, wrapping: Wrapping) -> Kms:
        """The customer key that an authenticated keystore row names.

        :raises KeystoreTamperedError: the row describes none.
        :raises ConfigurationError: the provider is not known here.
        """
        try:
            return describe(wrapping.provider, json.loads(wrapping.config))
        except (AttributeError, RecursionError, TypeError, ValueError):
            raise KeystoreTamperedError(
                "the keystore's row does not describe a customer key; restore it"
            ) from None

    def client(self, kms: Kms, reason: str) -> KmsClient:
        """A client for one purpose. Makes no call.

        :raises ConfigurationError: its profile, credential, host or secret reference is not one that we allow.
        """
        settings = self._profiles.get(kms.profile)
        if settings is None:
            raise ConfigurationError(
                f"there is no KMS profile {kms.profile!r}; name it in Byok(kms_profiles=…)"
            )
        return kms.connect(settings, self._operator, reason=reason)

    @contextmanager
    def turn(self, tenant: str, *, failing: bool) -> Iterator[None]:
        """Be one of the few that ask for a tenant at the same time.

        :param failing: whether the tenant's last call failed, which gives it a turn only where few such are under way.
        :raises KmsUnavailableError: others have all turns.
        """
        turn = self._turn
        with turn:
            free = turn.wait_for(lambda: self._under_way < CALLS_AT_ONCE, timeout=0 if failing else _PATIENCE)
            if not free or (failing and self._failing >= FAILING_AT_ONCE):
                raise KmsUnavailableError(
                    f"too many KMS calls are under way to ask for tenant {tenant!r} as well; try again",
                    tenant=tenant,
                    retry_after=1.0,
                )
            self._under_way += 1
            self._failing += failing
        try:
            yield
        finally:
            with turn:
                self._under_way -= 1
                self._failing -= failing
                turn.notify()

    def unwrap(self, row: TenantRow, reason: str) -> bytes:
        """What the row's wrappings hold: one KMS call; the next is tried only on "no answer", never on "no"."""
        unanswered: list[KmsNoAnswerError] = []
        for wrapping in row.wrappings:
            try:
                return self.unwrap_one(wrapping, row.tenant, reason)
            except KmsNoAnswerError as error:
                unanswered.append(error)
        raise unanswered[0]

    def unwrap_one(self, wrapping: Wrapping, tenant: str, reason: str) -> bytes:
        """What one wrapping holds: one KMS call."""
        kms = self.describe(wrapping)
        client = self.client(kms, reason)
        wrapped = Wrapped(wrapping.wrapped, wrapping.kms_key_version)
        return self.call(lambda: client.unwrap(wrapped, tenant=tenant), kms, "unwrap", tenant, reason)

    def new_tenant_key(
        self, tenant: str, generation: int, under: Iterable[Kms], reason: str
    ) -> tuple[TenantKey, list[Wrapping]]:
        """Make a tenant key, and :meth:`wrap` it."""
        secret = new_key()
        try:
            wrappings = self.wrap(pack_tenant_key(secret, tenant, generation), under, tenant, reason)
            return TenantKey(secret, tenant, generation), wrappings
        finally:
            secret = b""  # crash reports show the variables of each frame

    def wrap(self, payload: bytes, under: Iterable[Kms], tenant: str, reason: str) -> list[Wrapping]:
        """Wrap a tenant key under customer keys, and prove by unwrapping that it comes back: two KMS calls for each.

        :raises WrongKeyError: something else comes back.
        """
        try:
            return [self._wrap(payload, kms, tenant, reason) for kms in under]
        finally:
            payload = b""

    def _wrap(self, payload: bytes, kms: Kms, tenant: str, reason: str) -> Wrapping:
        back = b""
        try:
            client = self.client(kms, reason)
            wrapped = self.call(lambda: client.wrap(payload, tenant=tenant), kms, "wrap", tenant, reason)
            back = self.call(lambda: client.unwrap(wrapped, tenant=tenant), kms, "unwrap", tenant, reason)
            if not hmac.compare_digest(back, payload):
                raise WrongKeyError(
                    f"the KMS gave tenant {tenant!r} back another key than it was given", tenant=tenant
                )
        finally:
            payload = back = b""
        return Wrapping(kms.provider, stored_config(kms), wrapped.blob, wrapped.key_version)

    def call(self, ask: Callable[[], T], kms: Kms, operation: str, tenant: str, reason: str) -> T:
        """Make one KMS call and tell the audit."""
        request_id.set(None)
        outcome, started, failure = "ok", time.perf_counter(), None
        try:
            return ask()
        except ByokError as error:
            outcome, failure = type(error).__name__, error
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = time.perf_counter() - started
            self._audit.tell(
                KmsCalled(tenant, kms.provider, operation, reason, outcome, seconds, request_id.get())
            )
        # The client's frames hold what was to be wrapped, or is about to be returned.
        raise failure.with_traceback(None)


def stored_config(kms: Kms) -> str:
    """The text that the keystore holds of a customer key; tagged as it is, so it must always come out the same."""
    return json.dumps(kms.config(), sort_keys=True)
