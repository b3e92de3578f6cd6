"""Customer keys from end to end over AWS: proofs, claims, roles, the vendor's default key, credentials and salts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from keys_tools import CountingKms, TurnableClock, hand_in, names, patient, table
from kms_server import KmsServer
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, insert, select, update

from sqla_byok import (
    AccessDeniedError,
    AwsKms,
    AwsSecretsManagerSalts,
    Byok,
    ConfigurationError,
    Encrypted,
    KeyDisabledError,
    KeysExpiredError,
    KeystoreTamperedError,
    LocalKms,
    NoTenantError,
    NotEncryptedError,
    SaltChangedError,
    TamperedError,
    TenantExistsError,
    TenantMismatchError,
    UnknownTenantError,
)
from sqla_byok.audit import Event, KmsCalled
from sqla_byok.keys.generations import SETTLE
from sqla_byok.kms import providers

_metadata = MetaData()
_person = Table(
    "person",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("mrn", Encrypted(String(20), searchable=True)),
)


class Cloud:
    """A Byok over the AWS double, with a clock to turn and a data engine."""

    def __init__(self, server: KmsServer, folder: Path, keystore_key: str) -> None:
        self.server, self.clock, self.folder = server, TurnableClock(), folder
        self.events: list[Event] = []
        self.url, self.keystore_key = f"sqlite:///{folder / 'keystore.db'}", keystore_key
        self.vendor = AwsKms(server.create_key())
        self.byok = self.another()
        self.byok.create_keystore()
        self.hand = hand_in(self.url)
        self.engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        _metadata.create_all(self.engine)
        patient.metadata.create_all(self.engine)
        self.byok.attach(self.engine)

    def another(self, **options: Any) -> Byok:
        """Another process's Byok."""
        return Byok(
            self.url,
            keystore_key=self.keystore_key,
            kms_profiles={"default": {**self.server.profile(), "attempts": 1}},
            default_kms=self.vendor,
            clock=self.clock,
            on_event=self.events.append,
            **options,
        )

    def write(self, mrn: str, tenant: str = "t1") -> None:
        with self.byok.tenant(tenant), self.engine.begin() as connection:
            connection.execute(insert(_person), [{"mrn": mrn}])

    def found(self, mrn: str, tenant: str = "t1") -> int:
        with self.byok.tenant(tenant), self.engine.connect() as connection:
            return len(connection.scalars(select(_person.c.mrn).where(_person.c.mrn == mrn)).all())

    @property
    def secret(self) -> str:
        """The name under which the newest salt was stored."""
        return [body["Name"] for operation, body in self.server.requests if operation == "CreateSecret"][-1]

    def close(self) -> None:
        self.byok.close()
        self.hand.dispose()
        self.engine.dispose()


@pytest.fixture
def cloud(kms_server: KmsServer, tmp_path: Path, keystore_key: str) -> Iterator[Cloud]:
    cloud = Cloud(kms_server, tmp_path, keystore_key)
    yield cloud
    cloud.close()


# -- one key, one role, one tenant -----------------------------------------------------------------------------------


def test_a_key_belongs_to_one_tenant(cloud: Cloud) -> None:
    """A customer that types another one's key into the form gets an error, before that key is called."""
    arn = cloud.server.create_key()
    cloud.byok.onboard("t1", AwsKms(arn))
    cloud.server.calls.clear()
    with pytest.raises(ConfigurationError, match="belongs to another tenant") as raised:
        cloud.byok.onboard("t2", AwsKms(arn))
    assert raised.value.tenant == "t2"
    assert (cloud.byok.tenants(), cloud.server.calls) == (["t1"], Counter())
    cloud.byok.onboard("t1", AwsKms(arn))


def test_a_key_that_a_tenant_left_is_free(cloud: Cloud) -> None:
    """Claims follow the tenant's key, and go with its row."""
    first, second = cloud.server.create_key(), cloud.server.create_key()
    cloud.byok.onboard("t1", AwsKms(first))
    cloud.byok.rewrap("t1", AwsKms(second))
    with pytest.raises(ConfigurationError, match="belongs to another tenant"):
        cloud.byok.onboard("t2", AwsKms(second))
    cloud.byok.onboard("t2", AwsKms(first))
    assert cloud.byok.tenants() == ["t1", "t2"]


def test_a_role_is_assumed_with_the_tenants_own_external_id(cloud: Cloud) -> None:
    """The customer names it in its trust policy before it is onboarded; nobody can choose another tenant's."""
    ids = {tenant: cloud.byok.external_id(tenant) for tenant in ("t1", "t2")}
    assert ids["t1"] != ids["t2"]
    assert ids["t1"] == cloud.another().external_id("t1")
    role = cloud.server.create_role("byok", external_id=ids["t1"])
    arn = cloud.server.create_key(principal=role)
    cloud.byok.onboard("t1", AwsKms(arn, role_arn=role))
    cloud.write("A-1")
    assert cloud.found("A-1") == 1
    with pytest.raises(ConfigurationError, match="belongs to another tenant"):
        cloud.byok.onboard("t2", AwsKms(cloud.server.create_key(), role_arn=role))


def test_a_role_that_trusts_another_external_id(cloud: Cloud) -> None:
    """The error shows the one that the customer has to put there."""
    role = cloud.server.create_role("byok", external_id="somebody-else")
    with pytest.raises(AccessDeniedError, match=cloud.byok.external_id("t1")):
        cloud.byok.onboard("t1", AwsKms(cloud.server.create_key(principal=role), role_arn=role))
    assert cloud.byok.tenants() == []


def test_an_external_id_of_ones_own_is_refused(cloud: Cloud) -> None:
    """We choose it, or the customer could name another tenant's."""
    role = cloud.server.create_role("byok", external_id="mine")
    with pytest.raises(ConfigurationError):
        cloud.byok.onboard(
            "t1", AwsKms(cloud.server.create_key(principal=role), role_arn=role, external_id="mine")
        )


# -- the vendor's default key ----------------------------------------------------------------------------------------


def test_tenants_without_a_key_share_the_vendors(cloud: Cloud) -> None:
    """They move to their own key, and back, with their rows as they are."""
    for tenant in ("t1", "t2"):
        cloud.byok.onboard(tenant)
        cloud.write("A-1", tenant)
    own = AwsKms(cloud.server.create_key())
    cloud.byok.rewrap("t1", own)
    cloud.byok.forget_keys()
    cloud.server.disable(own.key_arn)
    with pytest.raises(KeyDisabledError):
        cloud.found("A-1")
    with cloud.byok.tenant("t2"):
        pass
    cloud.server.enable(own.key_arn)
    cloud.byok.rewrap("t1", cloud.vendor)
    cloud.server.delete(own.key_arn)
    cloud.byok.forget_keys()
    with cloud.byok.tenant("t1"), cloud.engine.connect() as connection:
        assert connection.scalars(select(_person.c.mrn).limit(1)).all() == ["A-1"]


def test_without_a_default_key_a_tenant_brings_one(cloud: Cloud, tmp_path: Path) -> None:
    """There is no key that nobody chose."""
    byok = Byok(f"sqlite:///{tmp_path / 'other.db'}", keystore_key=cloud.keystore_key)
    byok.create_keystore()
    with pytest.raises(ConfigurationError, match="default_kms"):
        byok.onboard("t1")
    byok.close()


# -- probing and credentials -----------------------------------------------------------------------------------------


def test_a_probe_asks_whatever_is_in_memory(cloud: Cloud) -> None:
    """It proves the key now, tells the time, and leaves the keyring as it is."""
    arn = cloud.server.create_key()
    cloud.byok.onboard("t1", AwsKms(arn))
    cloud.write("A-1")
    proof = cloud.byok.probe("t1")
    assert (proof.tenant, proof.provider, proof.warnings) == ("t1", "aws", ())
    assert 0 < proof.seconds < 60
    cloud.server.disable(arn)
    with pytest.raises(KeyDisabledError) as raised:
        cloud.byok.probe("t1")
    assert raised.value.action_by == "customer"
    with pytest.raises(KeyDisabledError):  # a "no" is a "no", whatever was asked
        cloud.found("A-1")
    with pytest.raises(UnknownTenantError):
        cloud.byok.probe("nobody")
    assert [(e.reason, e.outcome) for e in cloud.events if isinstance(e, KmsCalled)] == [
        ("onboard", "ok"),
        ("onboard", "ok"),
        ("open", "ok"),
        ("probe", "ok"),
        ("probe", "KeyDisabledError"),
        ("open", "KeyDisabledError"),
    ]


@dataclass(frozen=True)
class ExpiringKms(CountingKms):
    """A key whose credential has a day on which it expires."""

    provider = "expiring"
    day: str = field(default="", kw_only=True)

    def config(self) -> dict[str, str]:
        return {"path": self.path, "day": self.day}

    @classmethod
    def from_config(cls, config: Any) -> ExpiringKms:
        return cls(config["path"], day=config["day"])

    def expires(self) -> date | None:
        return date.fromisoformat(self.day)

    def claims(self) -> tuple[str, ...]:
        return (f"expiring:{self.path}",)


@pytest.fixture
def expiring(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, customer_key: Path) -> ExpiringKms:
    monkeypatch.setitem(providers, ExpiringKms.provider, ExpiringKms)
    today = datetime.fromtimestamp(cloud.clock.wall(), timezone.utc).date()
    return ExpiringKms(str(customer_key), day=str(today + timedelta(days=40)))


def test_a_credential_that_expires_is_told_a_month_before(cloud: Cloud, expiring: ExpiringKms) -> None:
    """In the status and in a probe, from 30 days before; swapping the credential ends it."""
    cloud.byok.onboard("t1", expiring)
    assert cloud.byok.status().warnings == ()
    cloud.clock.turn(10 * 86_400)
    assert cloud.byok.probe("t1").expires == date.fromisoformat(expiring.day)
    for warnings in (cloud.byok.status().warnings, cloud.byok.probe("t1").warnings):
        assert len(warnings) == 1
        assert "expires in 30 days" in warnings[0]
        assert expiring.day in warnings[0]
    cloud.clock.turn(31 * 86_400)
    (warning,) = cloud.byok.status().warnings
    assert "has expired" in warning
    cloud.byok.update_credentials("t1", replace(expiring, day="2099-01-01"))
    assert (cloud.byok.status().warnings, cloud.byok.probe("t1").warnings) == ((), ())


def test_swapping_a_credential_has_no_downtime(cloud: Cloud, expiring: ExpiringKms) -> None:
    """Another process with the tenant open goes on, and takes the new way at its next call."""
    cloud.byok.onboard("t1", expiring)
    other = cloud.another()
    other_engine = create_engine(cloud.engine.url)
    other.attach(other_engine)
    with other.tenant("t1"), other_engine.begin() as connection:
        connection.execute(insert(patient), [{"name": "Ada"}])
    CountingKms.unwraps.clear()
    cloud.byok.update_credentials("t1", replace(expiring, day="2099-01-01"))
    assert CountingKms.unwraps == ["t1"]  # the probe
    cloud.clock.turn(4)
    with other.tenant("t1"), other_engine.connect() as connection:
        assert connection.scalars(names).all() == ["Ada"]
    assert CountingKms.unwraps == ["t1"]
    other.close()
    other_engine.dispose()


def test_a_credential_that_does_not_work_is_not_stored(cloud: Cloud) -> None:
    """Nor is another key taken for another credential."""
    role = cloud.server.create_role("byok", external_id=cloud.byok.external_id("t1"))
    arn = cloud.server.create_key()
    cloud.byok.onboard("t1", AwsKms(arn))
    cloud.server.deny_role(role)
    with pytest.raises(AccessDeniedError):
        cloud.byok.update_credentials("t1", AwsKms(arn, role_arn=role))
    with pytest.raises(ConfigurationError, match="another key"):
        cloud.byok.update_credentials("t1", AwsKms(cloud.server.create_key()))
    with pytest.raises(ConfigurationError, match="another key"):
        cloud.byok.update_credentials("t1", LocalKms(cloud.folder / "x.key"))
    with pytest.raises(UnknownTenantError):
        cloud.byok.update_credentials("nobody", AwsKms(arn))
    assert cloud.byok._keystore.load("t1").epoch == 1  # type: ignore[union-attr]
    cloud.byok.probe("t1")


def test_a_provider_of_ones_own_is_registered_once() -> None:
    """A name that is taken is refused; registering the same class again is not."""
    Byok.register_kms(LocalKms)

    class Other(CountingKms):
        provider = "local"

    with pytest.raises(ConfigurationError, match="another KMS provider"):
        Byok.register_kms(Other)
    assert providers["local"] is LocalKms


class Drawer:
    """A store of the operator's own, in memory."""

    def __init__(self) -> None:
        self.secrets: dict[str, str] = {}

    def read(self, name: str) -> str | None:
        return self.secrets.get(name)

    def write(self, name: str, secret: str) -> None:
        self.secrets[name] = secret


def test_a_set_up_page_stores_a_secret(cloud: Cloud) -> None:
    """In a store of the operator's, under its prefix for this tenant, and nowhere else."""
    drawer = Drawer()
    byok = cloud.another(
        secret_stores={"drawer": drawer}, secret_prefixes=["drawer:byok/{tenant}/", "env:BYOK_"]
    )
    byok.store_secret("t1", "drawer:byok/t1/azure", "hunter2")
    assert drawer.secrets == {"byok/t1/azure": "hunter2"}
    for reference in (
        "drawer:byok/t2/azure",
        "drawer:azure",
        "env:BYOK_T1",
        "hunter2",
        "cupboard:byok/t1/azure",
    ):
        with pytest.raises(ConfigurationError) as raised:
            byok.store_secret("t1", reference, "s3cret")
        assert "s3cret" not in str(raised.value)
        assert "hunter2" not in str(raised.value)
    assert drawer.secrets == {"byok/t1/azure": "hunter2"}
    byok.close()


# -- salts in AWS Secrets Manager ------------------------------------------------------------------------------------


def salts(**options: Any) -> AwsSecretsManagerSalts:
    return AwsSecretsManagerSalts("byok/t1/salt", region="eu-central-1", **options)


@pytest.mark.parametrize("form", ["sealed", "raw"])
def test_a_salt_kept_elsewhere_serves_searches(cloud: Cloud, form: Any) -> None:
    """One more call when the tenant is opened, none later; another process finds what this one wrote."""
    cloud.byok.onboard("t1", AwsKms(cloud.server.create_key()), salts=salts(format=form))
    assert cloud.secret.startswith("byok/t1/salt")
    text = cloud.server.secret(cloud.secret)
    assert len(text) == (32 if form == "raw" else 84)
    cloud.server.calls.clear()
    cloud.write("A-1")
    assert cloud.found("A-1") == 1
    assert cloud.server.calls == {"Decrypt": 1, "GetSecretValue": 1}
    other, engine = cloud.another(), create_engine(cloud.engine.url)
    other.attach(engine)
    with other.tenant("t1"), engine.connect() as connection:
        assert connection.scalars(select(_person.c.mrn).where(_person.c.mrn == "A-1")).all() == ["A-1"]
    other.close()
    engine.dispose()
    # Nothing of the salt is in the keystore: only where it is, sealed.
    with cloud.hand.connect() as connection:
        stored = connection.scalars(select(table("generation").c.sealed)).all()
    assert not any(text.encode() in blob or b"byok/t1" in blob for blob in stored)


def test_a_raw_salt_that_is_there_already_is_taken(cloud: Cloud) -> None:
    """Other programs that share it go on with it."""
    cloud.server.create_secret("byok/t1/salt", "0123456789abcdefghijklmnopqrstuv")
    cloud.byok.onboard("t1", AwsKms(cloud.server.create_key()), salts=salts(format="raw"))
    cloud.write("A-1")
    assert cloud.found("A-1") == 1
    assert cloud.server.secret("byok/t1/salt") == "0123456789abcdefghijklmnopqrstuv"


def test_a_sealed_salt_that_an_attempt_left_is_in_nobodys_way(cloud: Cloud) -> None:
    """A crash between storing the salt and the row does not block the tenant; the next attempt stores its own."""
    kms = AwsKms(cloud.server.create_key())
    insert_ = cloud.byok._keystore.insert
    cloud.byok._keystore.insert = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cloud.byok.onboard("t1", kms, salts=salts())
    cloud.byok._keystore.insert = insert_  # type: ignore[method-assign]
    left = cloud.secret
    cloud.byok.onboard("t1", kms, salts=salts())
    assert cloud.secret != left
    cloud.write("A-1")
    assert cloud.found("A-1") == 1


def test_moving_to_another_key_keeps_the_place_of_the_salt(cloud: Cloud) -> None:
    """Nobody else can have it afterwards, and onboarding again with the new key is fine."""
    first, second = AwsKms(cloud.server.create_key()), AwsKms(cloud.server.create_key())
    cloud.byok.onboard("t1", first, salts=salts())
    cloud.byok.rewrap("t1", second)
    cloud.byok.onboard("t1", second, salts=salts())
    with pytest.raises(ConfigurationError, match="belongs to another tenant"):
        cloud.byok.onboard("t2", first, salts=salts())


@pytest.mark.parametrize("form", ["sealed", "raw"])
@pytest.mark.parametrize("change", ["replaced", "gone", "denied"])
def test_a_salt_that_changed_is_no_silent_miss(cloud: Cloud, form: Any, change: str) -> None:
    """Another salt, or none, is an error: at once for who opens the tenant, at the next refresh for who has it open."""
    cloud.byok.onboard("t1", AwsKms(cloud.server.create_key()), salts=salts(format=form))
    cloud.write("A-1")
    name = cloud.secret
    cloud.server.delete_secret(name, at_once=True)
    if change != "gone":
        cloud.server.create_secret(name, "B" * 32 if form == "raw" else "B" * 83 + "=")
    if change == "denied":
        cloud.server.deny(name)
    assert cloud.found("A-1") == 1  # open already
    error: type[Exception] = AccessDeniedError if change == "denied" else SaltChangedError
    cloud.clock.turn(226)
    cloud.found("A-1")
    cloud.byok._keyrings.drain()
    with pytest.raises(error) as raised:
        cloud.found("A-1")
    assert raised.value.tenant == "t1"  # type: ignore[attr-defined]
    assert "BBBB" not in str(raised.value)


def test_a_rotated_salt_is_kept_where_the_first_one_is(cloud: Cloud) -> None:
    """Each generation has a secret of its own, under both formats, and rekeying stores a sealed one anew."""
    for form in ("sealed", "raw"):
        tenant = f"t-{form}"
        place = AwsSecretsManagerSalts(f"byok/{tenant}", region="eu-central-1", format=form)  # type: ignore[arg-type]
        cloud.byok.onboard(tenant, AwsKms(cloud.server.create_key()), salts=place)
        cloud.write("A-1", tenant)
        assert cloud.byok.rotate_salt(tenant) == 2
        assert cloud.clock.boot_now >= 1000 + SETTLE
        with cloud.engine.begin() as connection, cloud.byok.tenant(tenant):
            connection.execute(insert(_person), [{"mrn": "A-2"}])
        assert [cloud.found(mrn, tenant) for mrn in ("A-1", "A-2", "A-3")] == [1, 1, 0]
        cloud.byok.rekey(tenant)
        cloud.byok.forget_keys()
        assert [cloud.found(mrn, tenant) for mrn in ("A-1", "A-2", "A-3")] == [1, 1, 0]
        with cloud.engine.begin() as connection:
            connection.execute(_person.delete())


def test_a_reference_cannot_be_redirected(cloud: Cloud) -> None:
    """Who writes to the keystore cannot send us to another secret, nor give us a salt of theirs."""
    for tenant in ("t1", "t2"):
        place = AwsSecretsManagerSalts(f"byok/{tenant}", region="eu-central-1")
        cloud.byok.onboard(tenant, AwsKms(cloud.server.create_key()), salts=place)
    generations = table("generation")
    mine = (generations.c.tenant == "t1") & (generations.c.kind == "search-salt")
    with cloud.hand.begin() as connection:
        theirs = connection.scalar(
            select(generations.c.sealed).where(
                generations.c.tenant == "t2", generations.c.kind == "search-salt"
            )
        )
        connection.execute(update(generations).where(mine).values(sealed=theirs))
    cloud.server.calls.clear()
    with pytest.raises(KeystoreTamperedError, match="does not open under its tenant key"):
        cloud.found("A-1")
    assert cloud.server.calls == {"Decrypt": 1}


def test_onboarding_again_with_salts_elsewhere(cloud: Cloud) -> None:
    """The same place is fine; another, or none, is an error. A place belongs to one tenant."""
    kms = AwsKms(cloud.server.create_key())
    cloud.byok.onboard("t1", kms, salts=salts())
    cloud.byok.onboard("t1", kms, salts=salts())
    for other in (None, AwsSecretsManagerSalts("byok/t1/other", region="eu-central-1")):
        with pytest.raises(TenantExistsError, match="place for its salts"):
            cloud.byok.onboard("t1", kms, salts=other)
    with pytest.raises(ConfigurationError, match="belongs to another tenant"):
        cloud.byok.onboard("t2", AwsKms(cloud.server.create_key()), salts=salts())


# -- sealing what lives outside the columns --------------------------------------------------------------------------


def test_what_was_sealed_opens_for_the_same_tenant_and_purpose(cloud: Cloud) -> None:
    """Anything else is a typed error: another purpose, another tenant, altered, plaintext, no tenant, keys gone."""
    for tenant in ("t1", "t2"):
        cloud.byok.onboard(tenant)
    with cloud.byok.tenant("t1"):
        sealed = cloud.byok.seal(b"result for A-1", "mail")
        assert len(sealed) == len(b"result for A-1") + 46
        assert b"A-1" not in sealed
        assert cloud.byok.seal(b"result for A-1", "mail") != sealed
        assert cloud.byok.unseal(sealed, "mail") == b"result for A-1"
        assert cloud.byok.unseal(cloud.byok.seal(b"", "mail"), "mail") == b""
        for at in range(18, len(sealed)):
            altered = bytearray(sealed)
            altered[at] ^= 1
            with pytest.raises(TamperedError):
                cloud.byok.unseal(bytes(altered), "mail")
        with pytest.raises(TamperedError, match="another purpose"):
            cloud.byok.unseal(sealed, "cache")
        for nothing in (b"", b"result for A-1", sealed[:17]):
            with pytest.raises(NotEncryptedError):
                cloud.byok.unseal(nothing, "mail")
        for purpose in ("", "x" * 201):
            with pytest.raises(ConfigurationError, match="purpose"):
                cloud.byok.seal(b"", purpose)
    with cloud.byok.tenant("t2"), pytest.raises(TenantMismatchError) as raised:
        cloud.byok.unseal(sealed, "mail")
    assert (raised.value.owner, raised.value.tenant) == ("t1", "t2")
    with pytest.raises(NoTenantError):
        cloud.byok.seal(b"x", "mail")
    with pytest.raises(NoTenantError):
        cloud.byok.unseal(sealed, "mail")


async def test_sealing_from_asyncio(cloud: Cloud) -> None:
    """The same bytes, and the KMS asked without holding up the loop."""
    import asyncio

    await asyncio.to_thread(cloud.byok.onboard, "t1")
    async with cloud.byok.tenant("t1"):
        sealed = await cloud.byok.aseal(b"value", "cache")
        cloud.byok.forget_keys()
        assert await cloud.byok.aunseal(sealed, "cache") == b"value"


def test_a_column_and_a_purpose_do_not_open_each_other(cloud: Cloud) -> None:
    """What is sealed outside the columns opens in none of them, whatever its purpose is called."""
    cloud.byok.onboard("t1")
    with cloud.byok.tenant("t1"), cloud.engine.begin() as connection:
        sealed = cloud.byok.seal(b"A-1", "person.mrn")
        connection.exec_driver_sql("INSERT INTO person (mrn) VALUES (?)", (sealed,))
        with pytest.raises(TamperedError):
            connection.scalars(select(_person.c.mrn)).all()
        connection.execute(insert(_person), [{"id": 2, "mrn": "A-2"}])
        stored = connection.exec_driver_sql("SELECT mrn FROM person WHERE id = 2").scalar_one()
        with pytest.raises(TamperedError):
            cloud.byok.unseal(stored, "person.mrn")


def test_sealed_bytes_after_the_keys_went(cloud: Cloud) -> None:
    """A keyring that was cleared seals nothing."""
    cloud.byok.onboard("t1")
    ring = cloud.byok._keyrings.get("t1")
    ring.clear()
    from sqla_byok.crypto.values import seal_bytes

    with pytest.raises(KeysExpiredError):
        seal_bytes(ring, b"x", "mail")
