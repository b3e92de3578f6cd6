"""Search salts that are kept outside the keystore, such as in AWS Secrets Manager.

The keystore then holds, in the place of the sealed salt, a reference that is sealed under the tenant key: nobody who
writes to the keystore can send us elsewhere. What is found there has to be the salt whose id the manifest lists.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqla_byok.crypto.formats import SEARCH_SALT, Secret, TenantKey, is_reference, salt_id
from sqla_byok.errors import ByokError, ConfigurationError, KeystoreTamperedError, SaltChangedError
from sqla_byok.keys.rows import SealedRecord
from sqla_byok.kms import AwsSecretsManagerSalts, Operator, Salts, SaltsClient

__all__ = ["ExternalSalts"]

_providers: dict[str, type[Salts]] = {AwsSecretsManagerSalts.provider: AwsSecretsManagerSalts}


class ExternalSalts(Secret):
    """Reads and stores search salts outside the keystore.

    :param profiles: the settings of clients by name.
    :param operator: secrets and credentials of the operator's.
    """

    def __init__(self, profiles: Mapping[str, Mapping[str, Any]], operator: Operator) -> None:
        self._profiles, self._operator = profiles, operator

    def resolve(self, tenant_key: TenantKey, records: Iterable[SealedRecord]) -> list[SealedRecord]:
        """The records with each reference replaced by the sealed salt that it leads to: one call for each.

        :raises SaltChangedError: what is found is not the salt that the record names.
        :raises KmsError: the place where it is kept refuses or does not answer.
        """
        return [
            self._fetched(tenant_key, record) if is_reference(record.sealed) else record for record in records
        ]

    def store(
        self, tenant_key: TenantKey, generation: int, secret: bytes, salts: Salts
    ) -> tuple[bytes, bytes]:
        """Keep a new salt outside, and return its id (16 bytes) and the sealed reference.

        What is there already under the same name is taken, where its format allows it: of two processes that store a
        salt at the same time, both take the same one.

        :param secret: the salt, 32 characters.
        :raises SaltChangedError: something else is there.
        """
        record_id, sealed = tenant_key.seal(SEARCH_SALT, generation, secret)
        name = salts.name(generation)
        if salts.format == "raw":
            text = self._asked(tenant_key.tenant, salts, lambda client: client.create(name, secret.decode()))
            record_id = salt_id(text.encode(), tenant_key.tenant)
        else:
            name = self._keep(tenant_key, generation, record_id, sealed, salts)
        return record_id, self._reference(tenant_key, generation, record_id, salts, name)

    def renewed(self, record: SealedRecord, old: TenantKey, new: TenantKey) -> SealedRecord:
        """The same reference under another tenant key; a salt that is sealed under the old one is stored anew."""
        salts, name = self._location(old, record)
        if salts.format != "raw":
            kept = self._fetched(old, record).resealed(old, new)
            name = self._keep(new, record.generation, record.id, kept.sealed, salts)
        return record._replace(sealed=self._reference(new, record.generation, record.id, salts, name))

    def where(self, tenant_key: TenantKey, record: SealedRecord) -> Salts | None:
        """Where a salt is kept; None for the keystore itself."""
        return self._location(tenant_key, record)[0] if is_reference(record.sealed) else None

    def _keep(
        self, tenant_key: TenantKey, generation: int, record_id: bytes, sealed: bytes, salts: Salts
    ) -> str:
        """Store a sealed salt under a name of its own: what an attempt that failed left behind is in nobody's way."""
        name = f"{salts.name(generation)}-{record_id.hex()[:8]}{tenant_key.id.hex()[:8]}"
        text = base64.b64encode(sealed).decode()
        if self._asked(tenant_key.tenant, salts, lambda client: client.create(name, text)) != text:
            raise SaltChangedError(f"there is another salt in {name!r}", tenant=tenant_key.tenant)
        return name

    def _reference(
        self, tenant_key: TenantKey, generation: int, record_id: bytes, salts: Salts, name: str
    ) -> bytes:
        location = {"provider": salts.provider, "config": salts.config(), "name": name}
        return tenant_key.seal_reference(
            SEARCH_SALT, generation, record_id, json.dumps(location, sort_keys=True).encode()
        )

    def _location(self, tenant_key: TenantKey, record: SealedRecord) -> tuple[Salts, str]:
        location = json.loads(
            tenant_key.open_reference(record.kind, record.generation, record.id, record.sealed)
        )
        provider = _providers.get(location["provider"])
        if provider is None:
            raise ConfigurationError(
                f"search salts of tenant {tenant_key.tenant!r} are kept with {location['provider']!r}, which this "
                "release does not know",
                tenant=tenant_key.tenant,
            )
        return provider.from_config(location["config"]), location["name"]

    def _fetched(self, tenant_key: TenantKey, record: SealedRecord) -> SealedRecord:
        salts, name = self._location(tenant_key, record)
        text = self._asked(tenant_key.tenant, salts, lambda client: client.read(name))
        if salts.format == "raw":
            record_id, sealed = tenant_key.seal(record.kind, record.generation, text.encode())
            fits = record_id == record.id
        else:
            sealed, fits = base64.b64decode(text), True
            try:
                tenant_key.open(record.kind, record.generation, record.id, sealed)
            except KeystoreTamperedError:
                fits = False
        if not fits:
            raise SaltChangedError(
                f"the search salt of tenant {tenant_key.tenant!r} in {name!r} is not the one that its hashes were made "
                "with; put back that one. Nothing was searched with this one",
                tenant=tenant_key.tenant,
            )
        return record._replace(sealed=sealed)

    def _asked(self, tenant: str, salts: Salts, ask: Callable[[SaltsClient], str]) -> str:
        settings = self._profiles.get(salts.profile)
        if settings is None:
            raise ConfigurationError(
                f"there is no KMS profile {salts.profile!r}; name it in Byok(kms_profiles=…)"
            )
        try:
            return ask(salts.connect(settings, self._operator))
        except ByokError as error:
            error.tenant = tenant
            raise
