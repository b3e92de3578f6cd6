"""Byok: the one object that an application makes, which wires the rooms together."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from sqlalchemy import URL, Connection, Dialect, Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Session

from sqla_byok.audit import AcrossOpened, Actor, Audit, Event, SealedOpened, acting
from sqla_byok.crypto.formats import DATA_KEY, SEARCH_SALT, Secret, check_tenant
from sqla_byok.crypto.values import open_bytes, seal_bytes
from sqla_byok.errors import (
    ByokError,
    ConfigurationError,
    KeystoreTamperedError,
    KmsError,
    KmsRefusedError,
    NotAttachedError,
    NoTenantError,
    UnknownTenantError,
    UnsupportedQueryError,
)
from sqla_byok.keys.calls import KmsCalls, stored_config
from sqla_byok.keys.clock import Clock, SystemClock
from sqla_byok.keys.database import open_database
from sqla_byok.keys.generations import Generations
from sqla_byok.keys.health import CLOSED, DARK, FRESH, GRACE
from sqla_byok.keys.jobs import Jobs
from sqla_byok.keys.keyring import Keyring
from sqla_byok.keys.keyrings import Keyrings
from sqla_byok.keys.keystore import OUTAGE_GRACE_MS, REVOKE_WITHIN_MS, Keystore
from sqla_byok.keys.onboarding import Onboarding, Proof
from sqla_byok.keys.rows import Wrapping
from sqla_byok.keys.salts import ExternalSalts
from sqla_byok.keys.searchable import NOTHING, HashSpec, Searchable, SearchableColumns
from sqla_byok.kms import Kms, Operator, Salts, providers
from sqla_byok.kms.profiles import Profile
from sqla_byok.kms.secrets import Secrets, SecretStore
from sqla_byok.metrics import observe
from sqla_byok.orm.checks import CHANGED, Finding, findings, specs_of
from sqla_byok.orm.chosen import chosen
from sqla_byok.orm.current import Attachment, refuse_foreign
from sqla_byok.orm.digests import hashes, is_known
from sqla_byok.orm.direct import areveal, reveal
from sqla_byok.orm.guard import Findings, Guard, search_hash
from sqla_byok.orm.hash_index import searched_id
from sqla_byok.orm.kept import ATTACHMENT, SESSION_TURN
from sqla_byok.orm.rings import SEALED, Across
from sqla_byok.orm.statements import attach
from sqla_byok.orm.turns import TENANT_OPTION, Blocks, SessionTurn, Whose, one_tenant, whose
from sqla_byok.orm.types import Digest

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

__all__ = ["Byok", "Outcome", "Status"]

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What :meth:`Byok.each_tenant` got for one tenant.

    :param tenant: whose turn it was.
    :param value: what the function returned; None where it did not come to that.
    :param error: why not, such as a :class:`KeyDisabledError`.
    """

    tenant: str
    value: T | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Status:
    """How the tenants of this process are.

    :param tenants: how many there are in the keystore.
    :param fresh: how many are open, and their KMS has agreed within ``revoke_within``.
    :param grace: how many are served on although their KMS does not answer, within their ``outage_grace``.
    :param dark: how many cannot be opened, as far as this process has tried.
    :param changed_recently: how many became dark, came into grace, or came out of either in the last five minutes. Many
        at once are hardly as many customers' decision: look at ``causes``.
    :param causes: how many tenants' last KMS call failed, by exception and by who must act (``"customer"`` or
        ``"operator"``).
    :param breakers: for how many tenants the KMS is left alone for some seconds after repeated failures.
    :param waiting: how many threads and tasks wait for a tenant to be opened.
    :param warnings: what somebody should do soon, such as renew a credential that expires within 30 days.
    """

    tenants: int
    fresh: int
    grace: int
    dark: int
    changed_recently: int
    causes: Mapping[tuple[str, str], int]
    breakers: int
    waiting: int
    warnings: tuple[str, ...]


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
    :param revoke_within: seconds, 1 to 86,400, or 0: what a tenant is onboarded with unless told otherwise. Keys are
        used no longer than this after the customer's KMS last said yes. 0 is a KMS call for each unit of work: each
        transaction, for 60 seconds at most.
    :param outage_grace: seconds, 0 to 3,600: what a tenant is onboarded with unless told otherwise. How much longer its
        keys may be used while its KMS does not answer at all. Raise it only with the customer's consent.
    :param max_tenants: how many tenants stay open in memory.
    :param default_kms: your own customer key, for tenants that bring none. They can move to their own, and back, by
        :meth:`rewrap`.
    :param single_tenant: the tenant of every statement that has no other, for an application that serves only one.
    :param kms_profiles: how KMS are reached, by profile name; see :class:`~sqla_byok.kms.profiles.Profile`. From code
        only; the keystore and the customer name a profile, never its content.
    :param credentials: factories of credentials by name, for ``AzureKeyVault(credential="name")``. Each takes the
        customer's directory id and returns a credential of azure-identity.
    :param secret_prefixes: under which prefixes references to secrets are resolved, such as ``"env:BYOK_"``; none
        unless given. ``{tenant}`` in a prefix stands for the tenant.
    :param secret_stores: places for secrets of your own, by the scheme that references to them begin with; those with
        a method ``write`` take secrets too (:meth:`store_secret`).
    :param on_event: called with each audit event (:mod:`sqla_byok.audit`), in the thread in which it happened.
    :param clock: where time is read; for tests.
    :raises ConfigurationError: if a parameter cannot be used.
    """

    def __init__(
        self,
        keystore: str | URL | Engine | AsyncEngine,
        *,
        keystore_key: str | None = None,
        revoke_within: float = 300.0,
        outage_grace: float = 0.0,
        max_tenants: int = 10_000,
        default_kms: Kms | None = None,
        single_tenant: str | None = None,
        kms_profiles: Mapping[str, Mapping[str, Any]] | None = None,
        credentials: Mapping[str, Callable[[str], Any]] | None = None,
        secret_prefixes: Sequence[str] = (),
        secret_stores: Mapping[str, SecretStore] | None = None,
        on_event: Callable[[Event], object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if max_tenants < 1:
            raise ConfigurationError("max_tenants takes at least 1")
        if single_tenant is not None:
            check_tenant(single_tenant)
        self._revoke_within_ms = _revoke_within(revoke_within)
        self._outage_grace_ms = _outage_grace(outage_grace)
        profiles = {"default": {}, **(kms_profiles or {})}
        for settings in profiles.values():
            Profile.parse(settings)
        self._blocks = Blocks(single_tenant)
        clock = clock or SystemClock()
        self._findings, self._dialect = Findings(), cast("Dialect | None", None)
        self._clock = clock
        self._audit = Audit(*(() if on_event is None else (on_event,)))
        self._secrets = Secrets(secret_prefixes, secret_stores, profiles["default"])
        self._database = open_database(keystore)
        self._keystore = Keystore(self._database, _resolve_key(keystore_key))
        operator = Operator(self._secrets, credentials or {})
        salts = ExternalSalts(profiles, operator)
        self._calls = KmsCalls(profiles, operator, self._audit)
        self._onboarding = Onboarding(self._keystore, self._calls, salts, default_kms, clock)
        self._keyrings = Keyrings(self._keystore, self._calls, salts, clock, max_tenants, self._audit)
        generations = self._generations = Generations(self._keystore, self._calls, salts, clock, self._audit)
        self._searchable = SearchableColumns(generations.search, generations.settle)
        self._jobs = Jobs(self._keystore)
        self._engines: list[Engine] = []

    # -- setting up --------------------------------------------------------------------------------------------------

    def create_keystore(self) -> None:
        """Create the keystore's tables where they are missing. A migration that was made of :data:`keystore_metadata`
        does the same.

        :raises KeystoreUnavailableError: if the database does not answer.
        """
        self._keystore.create()

    async def acreate_keystore(self) -> None:
        """:meth:`create_keystore` from asyncio."""
        await asyncio.to_thread(self.create_keystore)

    def attach(
        self,
        *engines: Engine | AsyncEngine,
        guard: Literal["raise", "report"] = "raise",
        raw_sql: Literal["warn", "refuse", "allow"] = "warn",
    ) -> None:
        """Let statements on these engines, sync or async, encrypt and decrypt. Makes no connection.

        From now on the engine hides parameters in logs and exceptions. Attaching twice changes nothing.

        :param guard: ``"raise"``: a statement that would compare, sort, group or compute on ciphertext raises
            :class:`UnsupportedQueryError` before it reaches the database. ``"report"``: it is logged once to
            ``sqla_byok.guard``, counted in :meth:`guard_report` and let through, for the time before a first migration;
            but one that would send a value in the clear, and what the column's own operators refuse, raises even then.
        :param raw_sql: what happens to textual SQL that names a table with encrypted columns: ``"warn"`` logs each text
            once, ``"refuse"`` raises, ``"allow"`` does nothing. DDL and inspection are left alone.
        :raises ConfigurationError: if an engine is attached to another Byok, or for another word.
        """
        for engine in engines:
            sync_engine = engine if isinstance(engine, Engine) else engine.sync_engine
            judge = Guard(guard, raw_sql, self._findings, sync_engine.dialect)
            attach(sync_engine, self._keyrings, self._jobs, self._blocks, judge)
            if sync_engine not in self._engines:
                self._engines.append(sync_engine)
            self._dialect = self._dialect or type(sync_engine.dialect)()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that were given to :meth:`attach`, of async ones the sync engine within."""
        return tuple(self._engines)

    def guard_report(self) -> dict[str, dict[str, int]]:
        """What the guard has found on engines attached with ``guard="report"``, since the start of the process.

        :returns: by column id, what was found and what to do, with the number of compiled statements in which it was.
        """
        return self._findings.summary()

    @staticmethod
    def register_kms(provider: type[Kms]) -> None:
        """Make a KMS provider of your own known, before the first tenant that uses it is onboarded or opened.

        :param provider: a class derived from :class:`sqla_byok.kms.base.Kms`, with a ``provider`` name of its own.
        :raises ConfigurationError: the name is taken by another class, or is none.
        """
        name = getattr(provider, "provider", None)
        if not isinstance(name, str) or not 1 <= len(name) <= 40:
            raise ConfigurationError("a KMS class needs a provider name of 1 to 40 characters")
        if providers.setdefault(name, provider) is not provider:
            raise ConfigurationError(f"there is another KMS provider of the name {name!r}")

    def external_id(self, tenant: str) -> str:
        """The external id with which the role of ``AwsKms(…, role_arn=…)`` is assumed for this tenant.

        The customer names it in the trust policy of its role, before it is onboarded. It is no secret.

        :returns: 32 hexadecimal digits, always the same for the same tenant and ``keystore_key``.
        :raises ConfigurationError: without ``keystore_key``.
        """
        return self._keystore.external_id(tenant)

    def onboard(
        self,
        tenant: str,
        kms: Kms | None = None,
        *,
        revoke_within: float | None = None,
        outage_grace: float | None = None,
        salts: Salts | None = None,
    ) -> None:
        """Give a tenant its keys, wrapped by its customer key.

        The key is proved by a real encrypt and decrypt before anything is stored. Nothing is kept in memory: the
        first use opens the tenant from the stored row. Onboarding again with the same key is fine and changes nothing.

        :param tenant: the name by which the tenant is known, 1 to 255 bytes in NFC.
        :param kms: the customer key, such as ``AwsKms("arn:aws:kms:…")``; without it, Byok's ``default_kms``.
        :param revoke_within: seconds, 0 or 1 to 86,400; the Byok's own value unless given.
        :param outage_grace: seconds, 0 to 3,600; the Byok's own value unless given.
        :param salts: where the search salt is kept, such as :class:`AwsSecretsManagerSalts`; in the keystore unless
            given.
        :raises TenantExistsError: if the tenant is there with another key, deadline, grace or place for its salts.
        :raises KmsError: if the KMS refuses or does not answer; each outcome has its own class, and says who must do
            what.
        :raises ConfigurationError: without ``keystore_key``, for any key but LocalKms; if the key, role or secret is
            another tenant's; if there is no key to take.
        """
        check_tenant(tenant)
        self._onboarding.onboard(
            tenant,
            kms,
            self._revoke_within_ms if revoke_within is None else _revoke_within(revoke_within),
            self._outage_grace_ms if outage_grace is None else _outage_grace(outage_grace),
            salts,
        )

    async def aonboard(
        self,
        tenant: str,
        kms: Kms | None = None,
        *,
        revoke_within: float | None = None,
        outage_grace: float | None = None,
        salts: Salts | None = None,
    ) -> None:
        """:meth:`onboard` from asyncio."""
        await asyncio.to_thread(
            self.onboard, tenant, kms, revoke_within=revoke_within, outage_grace=outage_grace, salts=salts
        )

    def store_secret(self, tenant: str, reference: str, secret: str) -> None:
        """Put a customer's secret into a store of yours that can write, as a set-up page does.

        ::

            byok.store_secret("org-42", "vault:byok/org-42/azure", form["client_secret"])

        :param reference: where, under ``secret_prefixes``; what the customer key is then given as ``client_secret``.
        :param secret: it is handed to the store and kept nowhere else.
        :raises ConfigurationError: if the reference is not allowed for this tenant, or its store only reads.
        :raises CredentialInvalidError: if the store refuses.
        :raises KmsNoAnswerError: if it does not answer.
        """
        check_tenant(tenant)
        self._secrets.write(reference, secret, tenant)

    async def astore_secret(self, tenant: str, reference: str, secret: str) -> None:
        """:meth:`store_secret` from asyncio."""
        await asyncio.to_thread(self.store_secret, tenant, reference, secret)

    def update_credentials(self, tenant: str, kms: Kms) -> None:
        """Reach the same customer key in another way: with a new client secret, another role, another profile.

        The new way is proved on the stored tenant key before it is stored. Nobody notices: processes that have the
        tenant open go on, and take the new way at their next call.

        :param kms: the same key with what is to change.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises ConfigurationError: if it is another key; :meth:`rewrap` moves a tenant to one.
        :raises KmsError: if the key cannot be used in the new way; the old one stays.
        """
        self._onboarding.update_credentials(tenant, kms)
        self._keyrings.health.forget(tenant)  # the next use tries the new way at once

    async def aupdate_credentials(self, tenant: str, kms: Kms) -> None:
        """:meth:`update_credentials` from asyncio."""
        await asyncio.to_thread(self.update_credentials, tenant, kms)

    # -- looking after tenants ---------------------------------------------------------------------------------------

    def tenants(self, state: str | None = None) -> list[str]:
        """The names of the onboarded tenants, sorted. Opens none of them.

        :param state: only those that are ``"fresh"``, ``"grace"``, ``"dark"`` or ``"closed"`` in this process; see
            :class:`Status`. A tenant that was not used here is closed, whatever its KMS would say.
        :raises ConfigurationError: for another state.
        """
        if state not in (None, FRESH, GRACE, DARK, CLOSED):
            raise ConfigurationError('a state is one of "fresh", "grace", "dark" and "closed"')
        names, states = self._keystore.tenants(), self._keyrings.states()
        return names if state is None else [name for name in names if states.get(name, CLOSED) == state]

    async def atenants(self, state: str | None = None) -> list[str]:
        """:meth:`tenants` from asyncio."""
        return await asyncio.to_thread(self.tenants, state)

    def each_tenant(
        self,
        work: Callable[[str], T],
        *,
        tenants: Iterable[str] | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> list[Outcome[T]]:
        """Do something for each tenant in its own block, and go on past those that are dark.

        ::

            for outcome in byok.each_tenant(lambda tenant: count_overdue(tenant)):
                print(outcome.tenant, outcome.error or outcome.value)

        :param work: called with the tenant's name within ``with byok.tenant(name)``. Its errors of this library are
            collected; any other ends the round.
        :param tenants: whose turn it is; all of them unless given.
        """
        outcomes = []
        for name in self.tenants() if tenants is None else tenants:
            try:
                with self.tenant(name, actor=actor, reason=reason):
                    outcomes.append(Outcome(name, work(name)))
            except ByokError as error:
                outcomes.append(Outcome[T](name, error=error))
        return outcomes

    async def aeach_tenant(
        self,
        work: Callable[[str], Awaitable[T]],
        *,
        tenants: Iterable[str] | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> list[Outcome[T]]:
        """:meth:`each_tenant` for asyncio; ``work`` is a coroutine function."""
        outcomes = []
        for name in await self.atenants() if tenants is None else tenants:
            try:
                async with self.tenant(name, actor=actor, reason=reason):
                    outcomes.append(Outcome(name, await work(name)))
            except ByokError as error:
                outcomes.append(Outcome[T](name, error=error))
        return outcomes

    def preload(self, tenants: Iterable[str] | None = None, *, within: float = 10.0) -> list[Outcome[None]]:
        """Open tenants side by side, so that their first requests find them open. What fails is told, never raised.

        :param tenants: which ones; all of them unless given.
        :param within: how many seconds to take at most.
        :raises ConfigurationError: if a single name was given in place of a list.
        """
        if isinstance(tenants, str):
            raise ConfigurationError("preload() takes a list of tenants, not one name")
        try:
            names = self.tenants() if tenants is None else list(tenants)
        except ByokError as error:
            return [Outcome("", error=error)]
        return [Outcome(name, error=error) for name, error in self._keyrings.preload(names, within).items()]

    async def apreload(
        self, tenants: Iterable[str] | None = None, *, within: float = 10.0
    ) -> list[Outcome[None]]:
        """:meth:`preload` from asyncio."""
        return await asyncio.to_thread(self.preload, tenants, within=within)

    def probe(self, tenant: str) -> Proof:
        """Prove the tenant's key by a call to its KMS, whatever is in memory.

        :returns: how long it took, and what somebody should do soon.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises KmsError: if the KMS refuses or does not answer; each outcome has its own class.
        """
        return self._heard(tenant, lambda: self._onboarding.probe(tenant))

    async def aprobe(self, tenant: str) -> Proof:
        """:meth:`probe` from asyncio."""
        return await asyncio.to_thread(self.probe, tenant)

    def status(self) -> Status:
        """How the tenants of this process are, and what somebody should do soon. Calls no KMS."""
        health, states = self._keyrings.health, list(self._keyrings.states().values())
        return Status(
            tenants=len(self._keystore.tenants()),
            fresh=states.count(FRESH),
            grace=states.count(GRACE),
            dark=states.count(DARK),
            changed_recently=health.changed_recently(),
            causes=health.causes(),
            breakers=health.breakers(),
            waiting=self._keyrings.waiting(),
            warnings=tuple(
                warning
                for name, expires in self._expiries()
                for warning in self._onboarding.warnings(name, expires)
            ),
        )

    async def astatus(self) -> Status:
        """:meth:`status` from asyncio."""
        return await asyncio.to_thread(self.status)

    # -- changing keys -----------------------------------------------------------------------------------------------

    def rotate_data_key(self, tenant: str) -> int:
        """Make a new data key, with which everything is encrypted from then on. Rows are not touched.

        Takes 21 seconds, in which every process comes to know the new key before it is used; the work of all goes on.
        After a crash call it again: it goes on with the key that was made.

        :returns: the number of the new key.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises KmsError: if the customer's KMS refuses or does not answer; nothing is lost then.
        :raises KeystoreConflictError: if other processes keep changing the tenant; call it again.
        """
        return self._heard(tenant, lambda: self._generations.rotate(tenant, DATA_KEY))

    async def arotate_data_key(self, tenant: str) -> int:
        """:meth:`rotate_data_key` from asyncio."""
        return await asyncio.to_thread(self.rotate_data_key, tenant)

    def rotate_salt(self, tenant: str) -> int:
        """Make a new search salt, by which everything is hashed from then on. Rows are not touched.

        Takes 21 seconds, as :meth:`rotate_data_key`. Until the rows are hashed anew, look-ups of this tenant try both
        salts, and a unique index does not see that a value under one equals a value under the other.

        :returns: the number of the new salt.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises KmsError: if the customer's KMS refuses or does not answer; nothing is lost then.
        :raises KeystoreConflictError: if other processes keep changing the tenant; call it again.
        """
        return self._heard(tenant, lambda: self._generations.rotate(tenant, SEARCH_SALT))

    async def arotate_salt(self, tenant: str) -> int:
        """:meth:`rotate_salt` from asyncio."""
        return await asyncio.to_thread(self.rotate_salt, tenant)

    def rekey(self, tenant: str) -> int:
        """Make a new tenant key under the same customer key, and seal all data keys and salts anew under it.

        Rows are not touched. Other processes open the tenant anew at their next look, a few seconds later.

        :returns: the number of the new tenant key.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises KmsError: if the customer's KMS refuses or does not answer; nothing is lost then.
        :raises KeystoreConflictError: if other processes keep changing the tenant; call it again.
        """
        return self._heard(tenant, lambda: self._generations.rekey(tenant))

    async def arekey(self, tenant: str) -> int:
        """:meth:`rekey` from asyncio."""
        return await asyncio.to_thread(self.rekey, tenant)

    def rewrap(self, tenant: str, kms: Kms | None = None) -> None:
        """Wrap the tenant key by the current version of its customer key, or by another customer key.

        Rows are not touched, and nobody notices, but for values of columns in ``mode="direct"``: those stay under the
        key that encrypted them, and are lost with it. Write them anew first.

        A tenant of ``default_kms`` that brings its own key moves to it in this way, and back with
        ``rewrap(tenant, default_kms)``. Both KMS have to agree: the old one opens, the new one wraps and is proved by
        unwrapping.

        :param kms: the other customer key.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises KmsError: if a KMS refuses or does not answer; nothing is changed then.
        :raises ConfigurationError: if the key, role or secret is another tenant's.
        """
        if kms is None:
            self._generations.rewrap(tenant)
            return
        kms, claims = self._onboarding.bound(tenant, kms)
        self._generations.rewrap(tenant, [Wrapping(kms.provider, stored_config(kms), b"", "")], claims)
        self._keyrings.health.forget(tenant)

    async def arewrap(self, tenant: str, kms: Kms | None = None) -> None:
        """:meth:`rewrap` from asyncio."""
        await asyncio.to_thread(self.rewrap, tenant, kms)

    def check(self, *what: Any, prepare: bool = False) -> list[Finding]:
        """Compare what models declare searchable with what the keystore notes, for all tenants. Calls no KMS.

        ::

            for finding in byok.check(Base):
                print(finding.tenant, finding.column, finding.kind, finding.run)

        Run it before a deployment, with the new release's models: what it lists would else be found out by a first
        write or search. With ``prepare`` the search of columns that are hashed otherwise than before is closed now, for
        which the tenants are opened; the call returns after 21 seconds, when releases of both kinds can write. Then
        deploy, and when nothing of the earlier release runs any more, re-hash (:func:`sqla_byok.jobs.rehash`).

        :param what: models, tables or attributes; all models of this process unless given.
        :param prepare: whether to close the search of what has changed.
        :returns: what they disagree about; after ``prepare`` what is left.
        :raises KeystoreTamperedError: a newer release wrote the keystore, or somebody altered it.
        """
        over = chosen(what)
        found = list(findings(self._keystore.searchable_texts(), over))
        changed = {(each.tenant, each.column) for each in found if each.kind == CHANGED}
        if not prepare or not changed:
            return found
        specs = {spec.column: spec for table in over for spec in specs_of(table)}
        closing = [(tenant, specs[column]) for tenant, column in sorted(changed)]
        self._revise_each(closing, lambda now, spec: now.closing_for(spec))
        self._generations.settle()
        self._revise_each(closing, lambda now, spec: now.mixed(spec.column))
        return list(findings(self._keystore.searchable_texts(), over))

    async def acheck(self, *what: Any, prepare: bool = False) -> list[Finding]:
        """:meth:`check` from asyncio."""
        return await asyncio.to_thread(self.check, *what, prepare=prepare)

    def _revise_each(
        self, columns: Iterable[tuple[str, HashSpec]], change: Callable[..., Searchable]
    ) -> None:
        """Change what of tenants can be searched; those whose KMS says no stay as they are."""
        for tenant, spec in columns:
            with suppress(KmsError, UnknownTenantError):
                self._keyrings.revise(self._keyrings.get(tenant), partial(change, spec=spec))

    def set_searchable(self, tenant: str, columns: Iterable[Any] | None, *, but: Iterable[Any] = ()) -> None:
        """Say by which columns a tenant can be searched, among those that the models declare searchable.

        ::

            byok.set_searchable("org-42", {Patient.mrn, Patient.phone_last4, "patient.email"})
            byok.set_searchable("org-42", None, but={Patient.phone_last4})

        A tenant for which this was never called can be searched by all of them. A disabled column is not searched any
        more (:class:`NotSearchableError`); 21 seconds later, when every process knows of it, NULL is written in place
        of its hashes, and the call returns. Hashes that are there stay until they are overwritten or the rows are
        re-hashed. For a tenant that has no rows yet the call returns at once.

        A column that is enabled when there are rows already gets hashes at once, and is searched only after its rows
        were re-hashed.

        :param tenant: whose.
        :param columns: attributes, columns of tables, :class:`hash_index` attributes or column ids; None for all. Those
            that a later release makes searchable are off where columns are named here, and on with None.
        :param but: with None, those that are off.
        :raises ConfigurationError: for something that is not declared searchable.
        :raises UnknownTenantError: if the tenant was never onboarded.
        :raises KmsError: if the customer's KMS refuses or does not answer; nothing is changed then.
        :raises KeystoreConflictError: if other processes keep changing the tenant, or what this call disables was
            hashed anew and enabled meanwhile; call it again. Of two calls at once the one that disables has its way.
        """
        if isinstance(columns, str) or not isinstance(columns, Iterable | None):
            raise ConfigurationError("set_searchable takes a set of columns; put a single one into one too")
        if isinstance(but, str) or (columns is not None and list(but)):
            raise ConfigurationError("set_searchable takes but= as a set of columns, and with None only")
        enabled = None if columns is None else {searched_id(each) for each in columns}
        self._searchable.set(tenant, enabled, {searched_id(each) for each in but})
        self._keyrings.look_again(tenant)

    async def aset_searchable(
        self, tenant: str, columns: Iterable[Any] | None, *, but: Iterable[Any] = ()
    ) -> None:
        """:meth:`set_searchable` from asyncio."""
        await asyncio.to_thread(self.set_searchable, tenant, columns, but=but)

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

    def metrics(self, meter_provider: MeterProvider | None = None) -> None:
        """Report KMS requests and the state of the keys to OpenTelemetry, from now on; to be called once a process.

        No metric has a tenant among its attributes. Needs the ``otel`` extra.

        :param meter_provider: where to report; the program's global one unless given.
        :raises MissingExtraError: if ``opentelemetry-api`` is not installed.
        """
        observe(self._audit, self._keyrings.snapshot, meter_provider)

    def forget_keys(self, tenant: str | None = None) -> None:
        """Take one tenant's keys, or all, out of memory at once; results still being read fail from here on.

        The next use asks the KMS, also where repeated failures would have left it alone for some seconds. Other
        processes keep their keys until their own deadline.
        """
        self._keyrings.forget(tenant)

    def close(self) -> None:
        """Forget all keys and close the keystore's connections."""
        self._keyrings.close()
        self._database.close()

    async def aclose(self) -> None:
        """:meth:`close` from asyncio."""
        await asyncio.to_thread(self.close)

    # -- working for a tenant ----------------------------------------------------------------------------------------

    def tenant(self, tenant: str, *, actor: str | None = None, reason: str | None = None) -> _Within:
        """Work for one tenant within a block, in this thread or task: ``with`` or ``async with``.

        Entering opens the tenant's keys where they are not in memory: one KMS call, for which a plain ``with`` in
        a coroutine would hold up the event loop. Blocks nest; a session's or engine's execution option
        ``byok_tenant`` goes before the block.

        A :class:`~sqlalchemy.orm.Session` serves one tenant: do not carry one from a block into another
        tenant's. One with ``expire_on_commit=False`` that still holds the other's values is refused
        (:class:`TenantMismatchError`). And do not ``yield`` from within a block: a generator's caller would run under
        its tenant. :meth:`session` has neither trap.

        :param actor: who asks, for the audit; as in the block around it unless given.
        :param reason: what for; likewise.
        :raises UnknownTenantError: on entering, if the tenant was never onboarded.
        :raises KmsError: on entering, if the customer's KMS refuses or does not answer.
        """
        return _Within((tenant,), self._blocks, self._keyrings, self._audit, Actor(actor, reason))

    def across(self, tenants: Iterable[str], *, actor: str, reason: str) -> _Across:
        """Read rows of several tenants within a block, each under its own tenant's keys: ``with`` or ``async with``.

        ::

            with byok.across(["org-1", "org-2"], actor="ada@vendor", reason="ticket 4711"), Session(engine) as session:
                session.scalars(select(Patient).where(Patient.mrn == "A-1")).all()

        Entering opens the tenants that are not in memory, and tells the audit (:class:`~sqla_byok.audit.AcrossOpened`).
        A row of a tenant that was not named still raises :class:`TenantMismatchError`. Equality searches by the hashes
        of all the tenants, up to 20 search salts in all. A new encrypted value needs one tenant: that of a
        :meth:`tenant` block within, or of the execution option ``byok_tenant``, which both go before this block.
        Columns in ``mode="direct"`` are read as :class:`Sealed`.

        :param tenants: their names.
        :param actor: who asks.
        :param reason: what for.
        :raises ConfigurationError: without tenants, actor or reason.
        :raises UnknownTenantError: on entering, if one of them was never onboarded.
        :raises KmsError: on entering, if the KMS of one of them refuses or does not answer.
        """
        names = () if isinstance(tenants, str) else tuple(sorted(set(tenants)))
        if not names:
            raise ConfigurationError("across() takes a list of at least one tenant's name")
        return _Across(names, self._blocks, self._keyrings, self._audit, _accountable(actor, reason))

    def sealed(self, *, actor: str, reason: str) -> _Sealed:
        """Work on rows within a block without any tenant's keys or KMS: ``with`` or ``async with``.

        ::

            with byok.sealed(actor="ada@vendor", reason="contract ended"), Session(engine) as session:
                patient = session.get_one(Patient, 1)
                patient.name                               # <Sealed patient.name>
                session.delete(patient)
                session.commit()

        Encrypted attributes are read as :class:`Sealed`, whoever's they are; a flush leaves them as they were, and they
        can be copied to the same column of another row. Plain columns are read, searched and written as ever. A new
        encrypted value and a search on an encrypted column raise :class:`SealedError`. It holds for sessions with a
        tenant of their own too; a :meth:`tenant` or :meth:`across` block within ends it. The audit is told
        (:class:`~sqla_byok.audit.SealedOpened`). Engines and sessions can be sealed for good by the execution option
        ``byok_sealed=True``.

        :param actor: who asks.
        :param reason: what for.
        :raises ConfigurationError: without actor or reason.
        """
        return _Sealed((), self._blocks, self._keyrings, self._audit, _accountable(actor, reason))

    @contextmanager
    def session(
        self,
        tenant: str,
        engine: Engine,
        *,
        actor: str | None = None,
        reason: str | None = None,
        **options: Any,
    ) -> Iterator[Session]:
        """A session whose every statement, lazy load and flush works on one tenant's data.

        ::

            with byok.session("org-42", engine) as session:
                session.scalars(select(Patient).where(Patient.mrn == "A-1")).one()

        The tenant is opened before a connection is taken from the pool. The same holds for a session of your own over
        ``engine.execution_options(byok_tenant="org-42")``.

        :param engine: an attached engine.
        :param actor: who asks, for the audit of the opening.
        :param reason: what for.
        :param options: what :class:`~sqlalchemy.orm.Session` takes.
        :raises NotAttachedError: if the engine was not given to :meth:`attach`.
        """
        self._require_attached(engine)
        who = _inheriting(actor, reason)
        of_tenant = _of_tenant(tenant, who, options)
        self._keyrings.enter(tenant, who)
        if TENANT_OPTION in engine.get_execution_options():  # another's view, whose option would go first
            engine = engine.execution_options(**{TENANT_OPTION: tenant})
        with Session(engine, **of_tenant) as session:
            yield session

    @asynccontextmanager
    async def asession(
        self,
        tenant: str,
        engine: AsyncEngine,
        *,
        actor: str | None = None,
        reason: str | None = None,
        **options: Any,
    ) -> AsyncIterator[AsyncSession]:
        """:meth:`session` for asyncio.

        :param options: what :class:`~sqlalchemy.ext.asyncio.AsyncSession` takes.
        """
        from sqlalchemy.ext.asyncio import AsyncSession  # needs greenlet, which only asyncio needs

        self._require_attached(getattr(engine, "sync_engine", None))
        who = _inheriting(actor, reason)
        await self._keyrings.aenter(tenant, who)
        if TENANT_OPTION in engine.get_execution_options():
            engine = engine.execution_options(**{TENANT_OPTION: tenant})
        async with AsyncSession(engine, **_of_tenant(tenant, who, options)) as session:
            yield session

    def hash(self, column: Any, value: Any) -> Digest:
        """The search hash of a value for the current tenant, for handwritten SQL.

        ::

            with byok.tenant("org-42"):
                mrn = byok.hash(Patient.mrn, "A-1")
                connection.execute(text("SELECT id FROM patient WHERE mrn_hash = :mrn"), {"mrn": mrn})

        :param column: the attribute or column, searchable, or a :class:`~sqla_byok.hash_index`.
        :param value: what its type takes, normalized as the column says; for a hash_index the transform's result.
        :returns: 32 bytes.
        :raises UnsupportedQueryError: while the tenant's search salts are being rotated, when a value may have several
            hashes: take :meth:`hashes` with IN. And if the column has no hashes, or the value is None.
        :raises NotSearchableError: if the tenant has not enabled the search of the column.
        :raises EncodeError: if the value does not fit the column.
        :raises NoTenantError: for a column without an owner, outside ``byok.tenant()``, without ``single_tenant``.
        :raises KmsError: if the tenant has to be opened and its KMS refuses or does not answer.
        """
        return _only(self.hashes(column, value), column)

    async def ahash(self, column: Any, value: Any) -> Digest:
        """:meth:`hash` from asyncio."""
        return _only(await self.ahashes(column, value), column)

    def hashes(self, column: Any, value: Any) -> list[Digest]:
        """All search hashes that a value may have for the current tenant: one, and more while salts are rotated.

        ::

            find = text("SELECT id FROM patient WHERE mrn_hash IN :mrn")
            find = find.bindparams(bindparam("mrn", expanding=True))
            connection.execute(find, {"mrn": byok.hashes(Patient.mrn, "A-1")})

        Takes and raises what :meth:`hash` does, and returns the active salt's hash first.
        """
        ring = self._keyrings.get(self._tenant_of_column(column))
        if not is_known(column, ring):
            ring = self._keyrings.note(ring, NOTHING)
        return hashes(column, value, ring, self._clock, self._dialect or DefaultDialect())

    async def ahashes(self, column: Any, value: Any) -> list[Digest]:
        """:meth:`hashes` from asyncio."""
        ring = await self._keyrings.aget(self._tenant_of_column(column))
        if not is_known(column, ring):
            ring = await self._keyrings.anote(ring, NOTHING)
        return hashes(column, value, ring, self._clock, self._dialect or DefaultDialect())

    def seal(self, data: bytes, purpose: str) -> bytes:
        """Encrypt bytes under the current tenant's data key, for a place outside the columns: a task's argument, a
        cache, a file.

        ::

            with byok.tenant("org-42"):
                message = byok.seal(b"result ready for A-1", "mail-task")

        :param data: what to encrypt.
        :param purpose: what it is for, 1 to 200 characters; it opens for the same tenant and purpose only.
        :returns: 46 bytes more than the data.
        :raises NoTenantError: outside ``byok.tenant()``, without ``single_tenant``.
        :raises KmsError: if the tenant has to be opened and its KMS refuses or does not answer.
        :raises KeystoreUnavailableError: if nobody knows whether the data key is still the one to write with.
        :raises ConfigurationError: if the purpose is empty or too long.
        """
        return self._sealed(self._ring(), data, purpose)

    async def aseal(self, data: bytes, purpose: str) -> bytes:
        """:meth:`seal` from asyncio."""
        return self._sealed(await self._aring(), data, purpose)

    def unseal(self, sealed: bytes, purpose: str) -> bytes:
        """Decrypt what :meth:`seal` returned, for the same tenant and purpose.

        :raises TamperedError: it does not authenticate: altered, or sealed for another purpose.
        :raises TenantMismatchError: it is another tenant's.
        :raises NotEncryptedError: it is nothing that was sealed.
        :raises NoTenantError: outside ``byok.tenant()``, without ``single_tenant``.
        :raises KmsError: if the tenant has to be opened and its KMS refuses or does not answer.
        :raises ConfigurationError: if the purpose is empty or too long.
        """
        return open_bytes(self._ring(), sealed, _purpose(purpose), self._refuse)

    async def aunseal(self, sealed: bytes, purpose: str) -> bytes:
        """:meth:`unseal` from asyncio."""
        return open_bytes(await self._aring(), sealed, _purpose(purpose), self._refuse)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _tenant_of(self, session: Session, bind: Engine | Connection) -> str | None:
        options: Mapping[str, Any] = bind.get_execution_options()
        turn = session.info.get(SESSION_TURN)
        if turn is not None and options.get(TENANT_OPTION) is None:
            options = {**options, TENANT_OPTION: turn.tenant}
        return one_tenant(whose(options, bind, self._blocks))

    def _tenant_of_column(self, column: Any) -> str:
        """Whose keys the column takes: its owner's, or those of the tenant whose turn it is."""
        hash_column: Any = search_hash(column)
        owner: str | None = hash_column.type.source.owner
        return self._required_tenant() if owner is None else owner

    def _required_tenant(self) -> str:
        tenant = one_tenant(self._blocks.current())
        if tenant is None:
            raise NoTenantError("no tenant is set; do this within 'with byok.tenant(tenant)'")
        return tenant

    def _ring(self) -> Keyring:
        return self._keyrings.get(self._required_tenant())

    async def _aring(self) -> Keyring:
        return await self._keyrings.aget(self._required_tenant())

    def _sealed(self, ring: Keyring, data: bytes, purpose: str) -> bytes:
        if self._keyrings.clock.boot() >= ring.write_until:
            ring.outdated()
        return seal_bytes(ring, data, _purpose(purpose))

    def _heard(self, tenant: str, ask: Callable[[], T]) -> T:
        """Ask the tenant's KMS for something else than opening, and take its answer for one: "no" drops the keys."""
        try:
            answer = ask()
        except KmsRefusedError as error:
            self._keyrings.refused(tenant, error)
            raise
        self._keyrings.health.forget(tenant)
        return answer

    def _refuse(self, ring: Keyring, blob: bytes, where: str) -> None:
        refuse_foreign(self._keyrings, where, ring, blob)

    def _expiries(self) -> Iterator[tuple[str, date | None]]:
        for tenant, provider, config in self._keystore.configs():
            with suppress(KeystoreTamperedError, ConfigurationError):
                yield tenant, self._calls.describe(Wrapping(provider, config, b"", "")).expires()

    def _require_attached(self, engine: object) -> None:
        if not isinstance(engine, Engine):
            raise ConfigurationError(
                f"this takes an engine, not {type(engine).__name__}: byok.session() an Engine, byok.asession() an "
                "AsyncEngine"
            )
        attachment: Attachment | None = engine.dialect.__dict__.get(ATTACHMENT)
        if attachment is None or attachment.keyrings is not self._keyrings:
            raise NotAttachedError("give the engine to Byok.attach() before you open a session on it")


def _of_tenant(tenant: str, who: Actor, options: Mapping[str, Any]) -> dict[str, Any]:
    """A session's options, with its own tenant among them."""
    return {**options, "info": {**(options.get("info") or {}), SESSION_TURN: SessionTurn(tenant, who)}}


def _only(found: list[Digest], column: Any) -> Digest:
    if len(found) > 1:
        raise UnsupportedQueryError(
            f"{column}: the tenant's search salts are being rotated, so that the value may have one of {len(found)} "
            "hashes; look it up with Byok.hashes() and IN"
        )
    return found[0]


class _Within:
    """The block of :meth:`Byok.tenant`. Holds no state, so one may be entered by several threads and tasks."""

    __slots__ = ("_actor", "_audit", "_blocks", "_keyrings", "_names")

    def __init__(
        self, names: tuple[str, ...], blocks: Blocks, keyrings: Keyrings, audit: Audit, actor: Actor
    ) -> None:
        self._names, self._blocks, self._keyrings = names, blocks, keyrings
        self._audit, self._actor = audit, actor

    def __enter__(self) -> None:
        who = _inheriting(*self._actor)
        for name in self._names:
            self._keyrings.enter(name, who)
        self._begin(who)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block = self._blocks.innermost.get()
        if block is not None and block.block is self and acting.get() is not block.before:
            acting.set(block.before)
        self._blocks.end(self)

    async def __aenter__(self) -> None:
        who = _inheriting(*self._actor)
        await asyncio.gather(*(self._keyrings.aenter(name, who) for name in self._names))
        self._begin(who)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def _begin(self, who: Actor) -> None:
        before = acting.get()
        self._tell()
        self._blocks.begin(self._whose(), self, before)
        if who is not before:
            acting.set(who)

    def _whose(self) -> Whose:
        return self._names[0]

    def _tell(self) -> None:
        """Opening one tenant is told where its keys come into memory."""


class _Across(_Within):
    """The block of :meth:`Byok.across`."""

    __slots__ = ()

    def _whose(self) -> Whose:
        return Across(self._names)

    def _tell(self) -> None:
        self._audit.tell(AcrossOpened(self._names, str(self._actor.name), str(self._actor.purpose)))


class _Sealed(_Within):
    """The block of :meth:`Byok.sealed`."""

    __slots__ = ()

    def _whose(self) -> Whose:
        return SEALED

    def _tell(self) -> None:
        self._audit.tell(SealedOpened(str(self._actor.name), str(self._actor.purpose)))


def _accountable(actor: str, reason: str) -> Actor:
    if not (actor and reason):
        raise ConfigurationError("say who asks (actor=) and what for (reason=); the audit is told both")
    return Actor(actor, reason)


def _inheriting(actor: str | None, reason: str | None) -> Actor:
    """Who is named in the audit: what is given, and for the rest who is named already."""
    outer = acting.get()
    if actor is None and reason is None:
        return outer
    return Actor(actor or outer.name, reason or outer.purpose)


def _revoke_within(seconds: float) -> int:
    if seconds != 0 and not 1 <= seconds <= REVOKE_WITHIN_MS / 1000:
        raise ConfigurationError(
            "revoke_within takes 1 to 86,400 seconds, or 0 for a KMS call per unit of work"
        )
    return round(seconds * 1000)


def _outage_grace(seconds: float) -> int:
    if not 0 <= seconds <= OUTAGE_GRACE_MS / 1000:
        raise ConfigurationError("outage_grace takes 0 to 3,600 seconds")
    return round(seconds * 1000)


def _purpose(purpose: str) -> str:
    if not 1 <= len(purpose) <= 200:
        raise ConfigurationError("a purpose has 1 to 200 characters")
    return purpose


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
