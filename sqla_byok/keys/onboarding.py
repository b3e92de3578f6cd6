"""Bringing a tenant aboard, and looking after its customer key: prove, store, probe, swap credentials."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone

from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    SEARCH_SALT,
    Secret,
    is_reference,
    new_key,
    new_search_salt,
)
from sqla_byok.errors import ConfigurationError, TenantExistsError
from sqla_byok.keys.calls import KmsCalls, stored_config
from sqla_byok.keys.clock import Clock
from sqla_byok.keys.keystore import Keystore
from sqla_byok.keys.rows import SealedRecord, TenantRow
from sqla_byok.keys.salts import ExternalSalts
from sqla_byok.kms import Kms, Salts

__all__ = ["EXPIRY_WARNING_DAYS", "Onboarding", "Proof"]

EXPIRY_WARNING_DAYS = 30


@dataclass(frozen=True)
class Proof:
    """What :meth:`Byok.probe` found: the customer key works, now.

    :param tenant: whose key.
    :param provider: the provider's name, such as ``"aws"``.
    :param key_version: the version of the customer key that wraps the tenant key; empty where the provider keeps it to
        itself.
    :param seconds: how long one unwrap took, with the authentication before it.
    :param expires: the day on which the credential expires, where it is known.
    :param warnings: what somebody should do soon.
    """

    tenant: str
    provider: str
    key_version: str
    seconds: float
    expires: date | None = None
    warnings: tuple[str, ...] = ()


class Onboarding(Secret):
    """Writes tenants' first rows, and changes how their customer key is reached.

    :param keystore: where the rows are.
    :param calls: asks the tenants' KMS.
    :param salts: keeps search salts elsewhere.
    :param default_kms: the vendor's own key, for tenants that bring none.
    :param clock: where time is read.
    """

    def __init__(
        self,
        keystore: Keystore,
        calls: KmsCalls,
        salts: ExternalSalts,
        default_kms: Kms | None,
        clock: Clock,
    ) -> None:
        self._keystore, self._calls, self._salts = keystore, calls, salts
        self._default_kms, self._clock = default_kms, clock

    def onboard(
        self,
        tenant: str,
        kms: Kms | None,
        revoke_within_ms: int,
        outage_grace_ms: int,
        salts: Salts | None,
    ) -> None:
        """Give a tenant its keys, wrapped by its customer key; see :meth:`Byok.onboard`."""
        kms, claims = self.bound(tenant, kms)
        of_salts = () if salts is None else salts.claims()
        wanted = kms.provider, stored_config(kms), revoke_within_ms, outage_grace_ms, salts
        if self._is_onboarded(tenant, *wanted):
            return
        self._keystore.check_claims(tenant, (*claims, *of_salts))
        try:
            self._keystore.insert(
                self._new_row(tenant, kms, revoke_within_ms, outage_grace_ms, salts), claims, of_salts
            )
        except TenantExistsError:
            # Somebody else onboarded it just now; theirs stands.
            if self._is_onboarded(tenant, *wanted):
                return
        else:
            return
        raise TenantExistsError(
            f"the keystore's database takes {tenant!r} for the same name as another tenant's, perhaps since they "
            "differ in trailing blanks only; choose another name",
            tenant=tenant,
        )

    def probe(self, tenant: str) -> Proof:
        """Ask the tenant's KMS to unwrap the stored tenant key, and measure how long it takes."""
        row = self._keystore.row(tenant)
        wrapping = row.wrappings[0]
        kms = self._calls.describe(wrapping)
        started = time.perf_counter()
        row.open(self._calls.unwrap_one(wrapping, tenant, "probe"))
        seconds = time.perf_counter() - started
        expires = kms.expires()
        return Proof(
            tenant, kms.provider, wrapping.kms_key_version, seconds, expires, self.warnings(tenant, expires)
        )

    def update_credentials(self, tenant: str, kms: Kms) -> None:
        """Store another way to reach the same customer key, once it has proved to open the stored tenant key."""
        row = self._keystore.row(tenant)
        kms, claims = self.bound(tenant, kms)
        first = row.wrappings[0]
        known = self._calls.describe(first)
        if kms.provider != known.provider or kms.claims()[:1] != known.claims()[:1]:
            raise ConfigurationError(
                f"this is another key than tenant {tenant!r} has; update_credentials() swaps the credential of the "
                "same key, rewrap() moves a tenant to another key",
                tenant=tenant,
            )
        changed = replace(first, config=stored_config(kms))
        if changed == first:
            return
        self._keystore.check_claims(tenant, claims)
        # No name for the key here: no frame that touches the database holds a secret which a crash report could show.
        new = row.next(
            row.open(self._calls.unwrap_one(changed, tenant, "update-credentials")),
            wrappings=[changed, *row.wrappings[1:]],
        )
        self._keystore.replace(row, new, claims)

    def bound(self, tenant: str, kms: Kms | None) -> tuple[Kms, Sequence[str]]:
        """The customer key as the tenant's row stores it, and what of it belongs to the tenant alone.

        :param kms: the tenant's own key; None for the vendor's default one, which many share.
        """
        own = kms is not None and kms != self._default_kms
        kms = self._default_kms if kms is None else kms
        if kms is None:
            raise ConfigurationError(
                "give the tenant's key, or Byok a default_kms for tenants that bring none", tenant=tenant
            )
        self._keystore.require_key(kms.provider)
        if self._keystore.authenticates:
            kms = kms.for_tenant(self._keystore.external_id(tenant))
        return kms, kms.claims() if own else ()

    def warnings(self, tenant: str, expires: date | None) -> tuple[str, ...]:
        """What somebody should do about a credential that expires on that day."""
        if expires is None:
            return ()
        today = datetime.fromtimestamp(self._clock.wall(), timezone.utc).date()
        days = (expires - today).days
        if days > EXPIRY_WARNING_DAYS:
            return ()
        when = (
            f"expires in {days} days, on {expires}"
            if days > 0
            else f"has expired or expires today ({expires})"
        )
        return (
            f"the credential of tenant {tenant!r} {when}; make a new one and give it to update_credentials()",
        )

    def _is_onboarded(
        self,
        tenant: str,
        provider: str,
        config: str,
        revoke_within_ms: int,
        outage_grace_ms: int,
        salts: Salts | None,
    ) -> bool:
        row = self._keystore.load(tenant)
        if row is None:
            return False
        known = [(wrapping.provider, wrapping.config) for wrapping in row.wrappings[:1]]
        times = row.revoke_within_ms, row.outage_grace_ms
        elsewhere = any(is_reference(record.sealed) for record in row.generations)
        same_salts = (
            not elsewhere if salts is None else elsewhere and self._keystore.claimed(tenant, salts.claims())
        )
        if known != [(provider, config)] or times != (revoke_within_ms, outage_grace_ms) or not same_salts:
            raise TenantExistsError(
                f"tenant {tenant!r} is onboarded already, with another key, deadline, grace or place for its salts; "
                "onboarding never overwrites. rewrap() moves it to another key, update_credentials() swaps its "
                "credential",
                tenant=tenant,
            )
        return True

    def _new_row(
        self, tenant: str, kms: Kms, revoke_within_ms: int, outage_grace_ms: int, salts: Salts | None
    ) -> TenantRow:
        """New keys for a tenant, under a customer key that has proved itself.

        Made here, so that no frame that touches the database holds a secret which a crash report could show.
        """
        tenant_key, wrappings = self._calls.new_tenant_key(tenant, 1, [kms], "onboard")
        data_key = tenant_key.seal(DATA_KEY, 1, new_key())
        salt = (
            tenant_key.seal(SEARCH_SALT, 1, new_search_salt())
            if salts is None
            else self._salts.store(tenant_key, 1, new_search_salt(), salts)
        )
        generations = [
            SealedRecord(kind, 1, record_id, ACTIVE, sealed)
            for kind, (record_id, sealed) in ((DATA_KEY, data_key), (SEARCH_SALT, salt))
        ]
        row = TenantRow(tenant, revoke_within_ms, outage_grace_ms, wrappings, generations)
        return row.next(tenant_key)
