"""Byok: the one object that an application makes, which wires the rooms together."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.orm import Session

from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    SEARCH_SALT,
    Secret,
    TenantKey,
    check_tenant,
    new_key,
    new_search_salt,
    pack_tenant_key,
)
from sqla_byok.errors import (
    ConfigurationError,
    KeystoreTamperedError,
    NotAttachedError,
    TenantExistsError,
    WrongKeyError,
)
from sqla_byok.keys.database import open_database
from sqla_byok.keys.keyring import Clock, SealedRecord, SystemClock
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.keystore import Keystore, TenantRow, Wrapping
from sqla_byok.kms import Kms, KmsClient, describe
from sqla_byok.orm.direct import areveal, reveal
from sqla_byok.orm.hooks import TENANT_OPTION, attach
from sqla_byok.orm.slots import slot_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

__all__ = ["Byok"]

_CLIENTS_KEPT = 1_000


class Byok(Secret):
    """Bring Your Own Key for the engines of one application.

    ::

        byok = Byok(keystore=engine, keystore_key="env:BYOK_KEYSTORE_KEY")
        byok.create_keystore()
        byok.attach(engine)
        byok.onboard("org-42", AwsKms("arn:aws:kms:…"))

        with byok.session("org-42", engine) as session:
            session.add(Patient(name="Ada", mrn="A-1"))
            session.commit()

    Wherever there is I/O there is an async twin prefixed with ``a``.

    :param keystore: where tenants' wrapped keys are kept: a database URL, or an engine whose URL is used. The keystore
        has a pool of two connections of its own, sync or async as the URL says.
    :param keystore_key: 32 bytes in base64, by reference (``"env:NAME"`` or ``"file:/path"``), never literally. It
        authenticates the keystore's rows, so that somebody who can write to the database can redirect no tenant to
        another key. Without it only :class:`LocalKms` tenants may be onboarded. Make one with
        ``python -c "import base64, os; print(base64.b64encode(os.urandom(32)).decode())"`` and keep it outside the
        database.
    :param revoke_within: seconds, 1 to 86,400: what a tenant is onboarded with unless told otherwise. Keys are used no
        longer than this after the customer's KMS last said yes.
    :param max_tenants: how many tenants stay open in memory.
    :param single_tenant: the tenant of every statement that has no other, for an application that serves only one.
    :param kms_profiles: what KMS clients are to use, by profile name: endpoints, timeouts, proxies. From code only;
        the keystore and the customer name a profile, never its content.
    :param clock: where time is read; for tests.
    :raises ConfigurationError: if a parameter cannot be used.
    """

    def __init__(
        self,
        keystore: str | URL | Engine | AsyncEngine,
        *,
        keystore_key: str | None = None,
        revoke_within: float = 300.0,
        max_tenants: int = 10_000,
        single_tenant: str | None = None,
        kms_profiles: Mapping[str, Mapping[str, Any]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if max_tenants < 1:
            raise ConfigurationError("max_tenants takes at least 1")
        if single_tenant is not None:
            check_tenant(single_tenant)
        self._revoke_within_ms = _milliseconds(revoke_within)
        self._profiles = {"default": {}, **(kms_profiles or {})}
        self._clients: dict[Kms, KmsClient] = {}
        self._single_tenant = single_tenant
        self._tenant: ContextVar[_Scope | None] = ContextVar("byok_tenant", default=None)
        self._database = open_database(keystore)
        self._keystore = Keystore(self._database, _resolve_key(keystore_key))
        self._keyrings = Keyrings(self._keystore, self._client_of, clock or SystemClock(), max_tenants)

    # -- setting up --------------------------------------------------------------------------------------------------

    def create_keystore(self) -> None:
        """Create the keystore's tables where they are missing. With Alembic, use :data:`keystore_metadata` instead.

        :raises KeystoreUnavailableError: if the database does not answer.
        """
        self._keystore.create()

    async def acreate_keystore(self) -> None:
        """:meth:`create_keystore` from asyncio."""
        await asyncio.to_thread(self.create_keystore)

    def attach(self, *engines: Engine | AsyncEngine) -> None:
        """Let statements on these engines, sync or async, encrypt and decrypt. Makes no connection.

        From now on the engine hides parameters in logs and exceptions. Attaching twice changes nothing.

        :raises ConfigurationError: if an engine is attached to another Byok.
        """
        for engine in engines:
            sync_engine = engine if isinstance(engine, Engine) else engine.sync_engine
            attach(sync_engine, self._keyrings, self._current_tenant)

    def onboard(self, tenant: str, kms: Kms, *, revoke_within: float | None = None) -> None:
        """Give a tenant its keys, wrapped by its customer key.

        The key is proved by a real encrypt and decrypt before anything is stored. Nothing is kept in memory: the
        first use opens the tenant from the stored row. Onboarding again with the same key is fine and changes nothing.

        :param tenant: the name by which the tenant is known, 1 to 255 bytes in NFC.
        :param kms: the customer key, such as ``AwsKms("arn:aws:kms:…")``.
        :param revoke_within: seconds, 1 to 86,400; the Byok's own value unless given.
        :raises TenantExistsError: if the tenant is there with another key or deadline.
        :raises KmsError: if the KMS refuses or does not answer; each outcome has its own class.
        :raises ConfigurationError: without ``keystore_key``, for any key but LocalKms.
        """
        check_tenant(tenant)
        self._keystore.require_key(kms.provider)
        milliseconds = self._revoke_within_ms if revoke_within is None else _milliseconds(revoke_within)
        config = json.dumps(kms.config(), sort_keys=True)
        if self._is_onboarded(tenant, kms, config, milliseconds):
            return
        try:
            self._keystore.insert(self._new_row(tenant, kms, config, milliseconds))
        except TenantExistsError:
            # Somebody else onboarded it just now; theirs stands.
            if self._is_onboarded(tenant, kms, config, milliseconds):
                return
        else:
            return
        raise TenantExistsError(
            f"the keystore's database takes {tenant!r} for the same name as another tenant's, perhaps since they "
            "differ in trailing blanks only; choose another name",
            tenant=tenant,
        )

    async def aonboard(self, tenant: str, kms: Kms, *, revoke_within: float | None = None) -> None:
        """:meth:`onboard` from asyncio."""
        await asyncio.to_thread(self.onboard, tenant, kms, revoke_within=revoke_within)

    def tenants(self) -> list[str]:
        """The names of all onboarded tenants, sorted. Opens none of them."""
        return self._keystore.tenants()

    async def atenants(self) -> list[str]:
        """:meth:`tenants` from asyncio."""
        return await asyncio.to_thread(self.tenants)

    # -- working for a tenant ----------------------------------------------------------------------------------------

    def tenant(self, tenant: str) -> _Within:
        """Work for one tenant within a block, in this thread or task: ``with`` or ``async with``.

        Entering opens the tenant's keys where they are not in memory: one KMS call, for which a plain ``with`` in
        a coroutine would hold up the event loop. Blocks nest; a session's or engine's execution option
        ``byok_tenant`` goes before the block.

        A :class:`~sqlalchemy.orm.Session` serves one tenant: do not carry one from a block into another
        tenant's. And do not ``yield`` from within a block: a generator's caller would run under its tenant.
        :meth:`session` has neither trap.

        :raises UnknownTenantError: on entering, if the tenant was never onboarded.
        :raises KmsError: on entering, if the customer's KMS refuses or does not answer.
        """
        return _Within(tenant, self._tenant, self._keyrings)

    @contextmanager
    def session(self, tenant: str, engine: Engine, **options: Any) -> Iterator[Session]:
        """A session whose every statement, lazy load and flush works on one tenant's data.

        ::

            with byok.session("org-42", engine) as session:
                session.scalars(select(Patient).where(Patient.mrn == "A-1")).one()

        The tenant is opened before a connection is taken from the pool. The same holds for a session of your own over
        ``engine.execution_options(byok_tenant="org-42")``.

        :param engine: an attached engine.
        :param options: what :class:`~sqlalchemy.orm.Session` takes.
        :raises NotAttachedError: if the engine was not given to :meth:`attach`.
        """
        self._require_attached(engine)
        self._keyrings.get(tenant)
        with Session(engine.execution_options(**{TENANT_OPTION: tenant}), **options) as session:
            yield session

    @asynccontextmanager
    async def asession(self, tenant: str, engine: AsyncEngine, **options: Any) -> AsyncIterator[AsyncSession]:
        """:meth:`session` for asyncio.

        :param options: what :class:`~sqlalchemy.ext.asyncio.AsyncSession` takes.
        """
        from sqlalchemy.ext.asyncio import AsyncSession  # needs greenlet, which only asyncio needs

        self._require_attached(getattr(engine, "sync_engine", None))
        await self._keyrings.aget(tenant)
        async with AsyncSession(engine.execution_options(**{TENANT_OPTION: tenant}), **options) as session:
            yield session

    def reveal(self, obj: Any, attribute: str) -> Any:
        """Decrypt an attribute that was read as :class:`Sealed`, by one call to the tenant's KMS.

        The object then has the plaintext, as if it had been loaded: nothing is flushed. What is not sealed is
        returned as it is, without a call; on a sync engine nothing is. From asyncio use :meth:`areveal`.

        :param obj: a mapped object in a session, whose tenant is the session's or that of the block.
        :param attribute: the name of the attribute.
        :returns: the plaintext.
        :raises NoTenantError: if neither the session's engine nor a block says whose the object is.
        :raises TenantMismatchError: if it is another tenant's; the KMS was not asked.
        :raises TamperedError: if it does not open.
        :raises KmsError: if the KMS refuses or does not answer.
        :raises sqlalchemy.orm.exc.DetachedInstanceError: if the object is in no session.
        """
        return reveal(obj, attribute, self._keyrings, self._tenant_of)

    async def areveal(self, obj: Any, attribute: str) -> Any:
        """:meth:`reveal` from asyncio.

        ::

            patient = await session.get(Patient, 1)
            patient.ssn                                # <Sealed patient.ssn>
            await byok.areveal(patient, "ssn")         # "078-05-1120", and so is patient.ssn from now on
        """
        return await areveal(obj, attribute, self._keyrings, self._tenant_of)

    def forget_keys(self, tenant: str | None = None) -> None:
        """Take one tenant's keys, or all, out of memory at once; results still being read fail from here on.

        Other processes keep theirs until their own deadline.
        """
        self._keyrings.forget(tenant)

    def close(self) -> None:
        """Forget all keys and close the keystore's connections."""
        self._keyrings.close()
        self._database.close()

    async def aclose(self) -> None:
        """:meth:`close` from asyncio."""
        await asyncio.to_thread(self.close)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _current_tenant(self) -> str | None:
        scope = self._tenant.get()
        return self._single_tenant if scope is None else scope.tenant

    def _tenant_of(self, bind: Engine | Connection) -> str | None:
        tenant: str | None = bind.get_execution_options().get(TENANT_OPTION)
        return self._current_tenant() if tenant is None else tenant

    def _require_attached(self, engine: object) -> None:
        if not isinstance(engine, Engine):
            raise ConfigurationError(
                f"this takes an engine, not {type(engine).__name__}: byok.session() an Engine, byok.asession() an "
                "AsyncEngine"
            )
        if slot_of(engine.dialect).keyrings is not self._keyrings:
            raise NotAttachedError("give the engine to Byok.attach() before you open a session on it")

    def _is_onboarded(self, tenant: str, kms: Kms, config: str, revoke_within_ms: int) -> bool:
        row = self._keystore.load(tenant)
        if row is None:
            return False
        known = [(wrapping.provider, wrapping.config) for wrapping in row.wrappings[:1]]
        if known != [(kms.provider, config)] or row.revoke_within_ms != revoke_within_ms:
            raise TenantExistsError(
                f"tenant {tenant!r} is onboarded already, with another key or deadline; onboarding never overwrites",
                tenant=tenant,
            )
        return True

    def _new_row(self, tenant: str, kms: Kms, config: str, revoke_within_ms: int) -> TenantRow:
        """New keys for a tenant, under a customer key that has proved itself.

        Made here, so that no frame that touches the database holds a secret which a crash report could show.
        """
        secret, generation = new_key(), 1
        payload = pack_tenant_key(secret, tenant, generation)
        client = self._client(kms)
        wrapped = client.wrap(payload, tenant=tenant)
        if not hmac.compare_digest(client.unwrap(wrapped, tenant=tenant), payload):
            raise WrongKeyError(
                f"the KMS gave tenant {tenant!r} back another key than it was given", tenant=tenant
            )
        tenant_key = TenantKey(secret, tenant, generation)
        generations = [
            _first(tenant_key, DATA_KEY, new_key()),
            _first(tenant_key, SEARCH_SALT, new_search_salt()),
        ]
        return TenantRow(
            tenant=tenant,
            revoke_within_ms=revoke_within_ms,
            outage_grace_ms=0,
            tenant_key_id=tenant_key.id,
            tenant_key_generation=generation,
            epoch=1,
            manifest_tag=tenant_key.manifest_tag(1, [record.record for record in generations]),
            wrappings=[Wrapping(kms.provider, config, wrapped.blob, wrapped.key_version)],
            generations=generations,
        )

    def _client_of(self, wrapping: Wrapping) -> KmsClient:
        try:
            kms = describe(wrapping.provider, json.loads(wrapping.config))
        except (AttributeError, TypeError, ValueError):
            raise KeystoreTamperedError(
                "the keystore's row does not describe a customer key; restore it"
            ) from None
        return self._client(kms)

    def _client(self, kms: Kms) -> KmsClient:
        client = self._clients.get(kms)
        if client is None:
            settings = self._profiles.get(kms.profile)
            if settings is None:
                raise ConfigurationError(
                    f"there is no KMS profile {kms.profile!r}; name it in Byok(kms_profiles=…)"
                )
            client = kms.connect(settings)
            if len(self._clients) >= _CLIENTS_KEPT:
                self._clients.clear()
            self._clients[kms] = client
        return client


class _Scope(NamedTuple):
    """Whose turn it is in a thread or task, and whose it is again afterwards."""

    tenant: str
    outer: _Scope | None
    block: _Within


class _Within:
    """The block of :meth:`Byok.tenant`. Holds no state, so one may be entered by several threads and tasks."""

    __slots__ = ("_keyrings", "_name", "_variable")

    def __init__(self, name: str, variable: ContextVar[_Scope | None], keyrings: Keyrings) -> None:
        self._name, self._variable, self._keyrings = name, variable, keyrings

    def __enter__(self) -> None:
        self._keyrings.get(self._name)
        self._variable.set(_Scope(self._name, self._variable.get(), self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._variable.set(self._without_me(self._variable.get()))

    async def __aenter__(self) -> None:
        await self._keyrings.aget(self._name)
        self._variable.set(_Scope(self._name, self._variable.get(), self))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def _without_me(self, scope: _Scope | None) -> _Scope | None:
        # Generators can leave blocks in another order than they entered them, or in another task.
        if scope is None or scope.block is self:
            return None if scope is None else scope.outer
        return scope._replace(outer=self._without_me(scope.outer))


def _first(tenant_key: TenantKey, kind: str, secret: bytes) -> SealedRecord:
    record_id, sealed = tenant_key.seal(kind, 1, secret)
    return SealedRecord(kind, 1, record_id, ACTIVE, sealed)


def _milliseconds(seconds: float) -> int:
    if not 1 <= seconds <= 86_400:
        raise ConfigurationError("revoke_within takes 1 to 86,400 seconds")
    return round(seconds * 1000)


def _resolve_key(reference: str | None) -> bytes | None:
    """The keystore key behind a reference. No message tells what was found there."""
    if reference is None:
        return None
    kind, _, name = reference.partition(":")
    if kind == "env":
        text = os.environ.get(name, "").encode(errors="replace")
    elif kind == "file":
        text = _read(name)
    else:
        raise ConfigurationError(
            "keystore_key is a reference, 'env:NAME' or 'file:/path', so that the key stands in no code"
        )
    if not text:
        raise ConfigurationError(f"keystore_key: there is nothing at {reference!r}")
    key = b""
    with suppress(ValueError):
        key = base64.b64decode(text.strip(), validate=True)
    if len(key) != 32:
        raise ConfigurationError(f"keystore_key: {reference!r} does not hold 32 bytes in base64")
    return key


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigurationError(
            f"keystore_key: the file {path!r} cannot be read: {error.strerror}"
        ) from None
