"""Somebody who can write to the keystore: each thing he can do is refused, before a KMS or anybody else is called.

What is authenticated under the keystore key (tenant and wrappings) is refused before any call. The generations are
authenticated under the tenant key, which only the customer's KMS opens: there the one call to the right key is made,
and nothing of the generations is used.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adversary_tools import KINDS, TABLES, Deployment, other_values, watching
from sqlalchemy import create_engine

from sqla_byok import (
    AwsKms,
    Byok,
    ByokError,
    ConfigurationError,
    KeystoreConflictError,
    KeystoreError,
    KeystoreRolledBackError,
    KeystoreTamperedError,
    LocalKms,
    UnknownDataKeyError,
    UnknownTenantError,
    keystore_metadata,
)
from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    PENDING,
    READABLE,
    RETIRED,
    Record,
    TenantKey,
    new_key,
    new_search_salt,
    pack_tenant_key,
    row_tag,
)
from sqla_byok.crypto.formats import (
    KINDS as GENERATIONS,
)
from sqla_byok.keys.keyrings import POLL_EVERY
from sqla_byok.keys.rows import Wrapping
from sqla_byok.testing import kms_server

# What opening a tenant may ask of its own customer's key, and of where its salt is kept.
OPENING = {
    "role": {"connect", "assumerole", "decrypt"},
    "vault": {"connect", "challenge", "discovery", "token", "decrypt"},
    "app": {"connect", "challenge", "discovery", "token", "decrypt"},
    "salts": {"connect", "decrypt", "getsecretvalue"},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with kms_server() as servers:
        deployment = Deployment(servers, tmp_path_factory.mktemp("keystore"))
        with watching(deployment):
            yield deployment
        deployment.close()


@pytest.fixture
def deployment(shared: Deployment) -> Iterator[Deployment]:
    """Customers on both clouds; the keystore is put back after each test."""
    shared.quiet()
    yield shared
    shared.put(shared.whole)
    shared.byok.close()
    shared.byok = shared.process()
    shared.data.dispose()
    shared.data = create_engine(shared.data.url)
    shared.byok.attach(shared.data)


def open_cold(deployment: Deployment, tenant: str, error: type[ByokError]) -> None:
    """A process that starts now gets this error."""
    byok = deployment.process()
    before = deployment.state()
    deployment.quiet()
    with pytest.raises(ByokError) as raised, byok.tenant(tenant):
        pass
    assert type(raised.value) is error
    deployment.refused(raised.value, tenant)
    assert deployment.state() == before
    byok.close()


def use_warm(deployment: Deployment, tenant: str, error: type[ByokError]) -> None:
    """A process that has the tenant open gets this error, to read, write and search, from its next look on."""
    stored, before = deployment.stored(), deployment.state()
    for use in (
        lambda: deployment.found(tenant, "A-1"),
        lambda: deployment.write(tenant, "A-2"),
        lambda: deployment.byok.probe(tenant),
        lambda: deployment.byok.rewrap(tenant),
        lambda: deployment.byok.rekey(tenant),
    ):
        with pytest.raises(ByokError) as raised:
            use()
        assert type(raised.value) is error
        deployment.refused(raised.value, tenant)
    assert (deployment.stored(), deployment.state()) == (stored, before)


def others_go_on(deployment: Deployment, tenant: str) -> None:
    assert deployment.byok.status().tenants >= len(KINDS)
    other = KINDS[KINDS.index(tenant) - 1]
    assert deployment.found(other, "A-1") == 1


# -- every column ----------------------------------------------------------------------------------------------------

BEFORE, AFTER, UNREAD = "before any call", "after opening with the right key", "not read by who opens"

# Each column of each table: what becomes of a tenant where it was changed.
COLUMNS: dict[str, tuple[str, type[ByokError] | None]] = {
    "byok_format.write_format": (UNREAD, None),
    "byok_tenant.tenant": (BEFORE, UnknownTenantError),
    "byok_tenant.revoke_within_ms": (BEFORE, KeystoreTamperedError),
    "byok_tenant.outage_grace_ms": (BEFORE, KeystoreTamperedError),
    "byok_tenant.tenant_key_id": (BEFORE, KeystoreTamperedError),
    "byok_tenant.tenant_key_generation": (BEFORE, KeystoreTamperedError),
    "byok_tenant.epoch": (BEFORE, KeystoreTamperedError),
    "byok_tenant.manifest_tag": (BEFORE, KeystoreTamperedError),
    "byok_tenant.onboarded_at": (UNREAD, None),
    "byok_wrapping.tenant": (BEFORE, KeystoreTamperedError),
    "byok_wrapping.position": (BEFORE, KeystoreTamperedError),
    "byok_wrapping.provider": (BEFORE, KeystoreTamperedError),
    "byok_wrapping.config": (BEFORE, KeystoreTamperedError),
    "byok_wrapping.wrapped": (BEFORE, KeystoreTamperedError),
    "byok_wrapping.kms_key_version": (BEFORE, KeystoreTamperedError),
    "byok_wrapping.row_tag": (BEFORE, KeystoreTamperedError),
    "byok_generation.tenant": (AFTER, KeystoreTamperedError),
    "byok_generation.kind": (AFTER, KeystoreTamperedError),
    "byok_generation.generation": (AFTER, KeystoreTamperedError),
    "byok_generation.id": (AFTER, KeystoreTamperedError),
    "byok_generation.sealed": (AFTER, KeystoreTamperedError),
    "byok_generation.state": (AFTER, KeystoreTamperedError),
    "byok_searchable.tenant": (AFTER, KeystoreTamperedError),
    "byok_searchable.content": (AFTER, KeystoreTamperedError),
    "byok_claim.claim": (UNREAD, None),
    "byok_claim.tenant": (UNREAD, None),
    "byok_claim.of": (UNREAD, None),
}

# Nobody reads these to open a tenant; what becomes of a job where they were changed is tested with the jobs.
OF_JOBS = ("byok_job", "byok_job_shard", "byok_job_failure", "byok_note")

# A look at the keystore every few seconds reads these; what else was changed shows when the keys are renewed.
POLLED = {"byok_tenant.tenant", "byok_tenant.epoch", "byok_tenant.manifest_tag"}

AUTHENTICATED = [column for column, (when, _) in COLUMNS.items() if when != UNREAD]


def test_no_column_is_left_out() -> None:
    """A column that is added to the keystore has to be thought of here."""
    tables = [table for name, table in keystore_metadata.tables.items() if name not in OF_JOBS]
    assert set(COLUMNS) == {f"{table.name}.{column.name}" for table in tables for column in table.c}


def changes(deployment: Deployment, column: str, tenant: str, every: int = 1) -> Iterator[Any]:
    """Change the column in each of the tenant's rows in each way, one after the other; put it back in between.

    :param every: take only every so many-th of the ways.
    """
    name, _, column = column.partition(".")
    for kind in GENERATIONS if name == "byok_generation" else ("",):
        where = f"tenant = '{tenant}'" + (f" AND kind = '{kind}'" if kind else "")
        for value in other_values(deployment.get(f"SELECT {column} FROM {name} WHERE {where}"))[::every]:
            deployment.run(f"UPDATE {name} SET {column} = ? WHERE {where}", value)
            yield kind
            deployment.put(deployment.whole)


@pytest.mark.parametrize("tenant", KINDS)
@pytest.mark.parametrize("column", AUTHENTICATED)
def test_a_process_that_opens_the_tenant_refuses(deployment: Deployment, column: str, tenant: str) -> None:
    """Any other value, size or type in any column is refused by who opens the tenant, and calls nobody else."""
    when, error = COLUMNS[column]
    assert error is not None
    number = 0
    for kind in changes(deployment, column, tenant, every=1 if tenant in ("role", "vault") else 3):
        open_cold(deployment, tenant, error)
        allowed = OPENING[tenant] if when == AFTER else set()
        if kind == "search-salt":
            allowed = allowed - {"getsecretvalue"}  # nobody is sent where an altered reference leads
        assert deployment.calls <= allowed
        if not number:
            others_go_on(deployment, tenant)
        number += 1
    assert number >= 3


@pytest.mark.parametrize("tenant", KINDS)
@pytest.mark.parametrize("column", AUTHENTICATED)
def test_a_process_that_has_the_tenant_open_refuses(deployment: Deployment, column: str, tenant: str) -> None:
    """What the poll sees is refused within seconds, anything else when the keys are renewed; nothing of it is used."""
    when, error = COLUMNS[column]
    assert error is not None
    for _ in changes(deployment, column, tenant, every=5):
        altered = deployment.state()
        deployment.put(deployment.whole)
        assert deployment.found(tenant, "A-1") == 1
        deployment.put(altered)
        deployment.quiet()
        deployment.clock.turn(POLL_EVERY)
        if column not in POLLED:
            assert deployment.found(tenant, "A-1") == 1
            assert not deployment.calls
            deployment.clock.turn(240)  # past half of revoke_within and its jitter
            with deployment.byok.tenant(tenant):
                pass
            deployment.byok._keyrings.drain()
        if column == "byok_generation.sealed":
            # No renewal unseals: the keys in memory are those that the manifest lists.
            deployment.byok.forget_keys(tenant)
        with pytest.raises(error):
            deployment.write(tenant, "A-2")
        assert deployment.calls <= (OPENING[tenant] if when == AFTER else set())
        use_warm(deployment, tenant, error) if when == BEFORE else None
        assert deployment.calls <= (OPENING[tenant] if when == AFTER else set())
        deployment.put(deployment.whole)
    others_go_on(deployment, tenant)


def test_what_nobody_reads_on_opening_opens_nothing_else(deployment: Deployment) -> None:
    """The date of onboarding, claims and the format are not authenticated, and nothing is opened by them."""
    for column, (when, _) in COLUMNS.items():
        if when != UNREAD:
            continue
        name = column.partition(".")[0]
        for value in other_values("x"):
            deployment.run(f"UPDATE {name} SET {column.partition('.')[2]} = ?", value)
            with deployment.byok.tenant("role"):
                pass
            if name == "byok_format":
                with pytest.raises(KeystoreError, match="write format"):
                    deployment.byok.rekey("role")
            deployment.put(deployment.whole)


# -- rows that are moved, copied, taken away and made up --------------------------------------------------------------

Hand = Callable[[Deployment, str], None]


def sql(*statements: str) -> Hand:
    """Statements with ``:t`` for the tenant and ``:o`` for another one of the same kind."""

    def run(deployment: Deployment, tenant: str) -> None:
        for statement in statements:
            deployment.run(statement.replace(":t", f"'{tenant}'").replace(":o", f"'{tenant}-2'"))

    return run


def swap(name: str, *columns: str) -> Hand:
    """Exchange columns of two tenants' rows."""
    sets = ", ".join(
        f"{c} = (SELECT {c} FROM swapped b WHERE b.tenant = CASE {name}.tenant WHEN :t THEN :o ELSE :t END"
        + (f" AND b.kind = {name}.kind" if name == "byok_generation" else "")
        + ")"
        for c in columns
    )
    # From a copy: the second row must not be given what the first has just been given.
    return sql(
        f"CREATE TABLE swapped AS SELECT * FROM {name}",
        f"UPDATE {name} SET {sets} WHERE tenant IN (:t, :o)",
        "DROP TABLE swapped",
    )


def rename(*names: str) -> Hand:
    """Give one tenant's rows to the other, and the other way round."""
    return sql(
        *(
            f"UPDATE {name} SET tenant = {new} WHERE tenant = {old}"
            for name in names
            for old, new in ((":t", "'?'"), (":o", ":t"), ("'?'", ":o"))
        )
    )


def configured(**changed: str | None) -> Hand:
    """Lead the tenant to somebody else's key, vault, role, secret or settings."""

    def change(deployment: Deployment, tenant: str) -> None:
        config = json.loads(deployment.get(f"SELECT config FROM byok_wrapping WHERE tenant = '{tenant}'"))
        theirs = {
            "<key>": deployment.servers.aws.create_key(),
            "<vault>": deployment.servers.azure.create_key(),
            "<directory>": deployment.servers.azure.directory,
        }
        config |= {name: theirs.get(value or "", value) for name, value in changed.items()}
        deployment.run(f"UPDATE byok_wrapping SET config = ? WHERE tenant = '{tenant}'", json.dumps(config))

    return change


def text(change: Callable[[str], str]) -> Hand:
    """Write the configuration in another way."""

    def hand(deployment: Deployment, tenant: str) -> None:
        config = deployment.get(f"SELECT config FROM byok_wrapping WHERE tenant = '{tenant}'")
        deployment.run(f"UPDATE byok_wrapping SET config = ? WHERE tenant = '{tenant}'", change(config))

    return hand


def forged(tag_key: bytes | None) -> Hand:
    """A tenant made up from end to end, under a key file of the adversary's; only the keystore key is not his."""

    def hand(deployment: Deployment, tenant: str) -> None:
        path = deployment.folder / f"adversary-{tenant}-{len(tag_key or b'')}.key"
        kms = LocalKms(path) if path.exists() else LocalKms.create(path)
        forge(deployment, tenant, kms, tag_key)

    return hand


def forge(deployment: Deployment, tenant: str, kms: LocalKms, tag_key: bytes | None) -> None:
    secret = new_key()
    key = TenantKey(secret, tenant, 1)
    wrapped = kms.connect({}).wrap(pack_tenant_key(secret, tenant, 1), tenant=tenant).blob
    records = []
    deployment.run(f"DELETE FROM byok_generation WHERE tenant = '{tenant}'")
    for kind, content in ((DATA_KEY, new_key()), ("search-salt", new_search_salt())):
        record_id, sealed = key.seal(kind, 1, content)
        deployment.run(
            "INSERT INTO byok_generation VALUES (?, ?, 1, ?, ?, 'active')", tenant, kind, record_id, sealed
        )
        records.append((kind, 1, record_id, ACTIVE))
    manifest = key.manifest_tag(9, [Record(*each) for each in records])
    deployment.run(
        f"UPDATE byok_tenant SET tenant_key_id = ?, tenant_key_generation = 1, epoch = 9, manifest_tag = ? "
        f"WHERE tenant = '{tenant}'",
        key.id,
        manifest,
    )
    config = json.dumps(kms.config())
    tag = (
        None
        if tag_key is None
        else row_tag(
            tag_key,
            tenant=tenant,
            provider="local",
            config=config.encode(),
            wrapped=wrapped,
            kms_key_version="",
            revoke_within_ms=300_000,
            outage_grace_ms=0,
            tk_id=key.id,
            tk_generation=1,
            epoch=9,
            manifest_tag=manifest,
        )
    )
    deployment.run(
        f"UPDATE byok_wrapping SET provider = 'local', config = ?, wrapped = ?, kms_key_version = '', row_tag = ? "
        f"WHERE tenant = '{tenant}'",
        config,
        wrapped,
        tag,
    )


_COPY = "INSERT INTO byok_generation SELECT :t, kind, {generation}, id, sealed, {state} FROM byok_generation "
_TENANT_COLUMNS = [c.name for c in keystore_metadata.tables["byok_tenant"].c if c.name != "tenant"]
_WRAPPING_COLUMNS = ["provider", "config", "wrapped", "kms_key_version", "row_tag"]

ROWS: dict[str, tuple[Hand, str]] = {
    "all rows of two tenants": (
        rename("byok_tenant", "byok_wrapping", "byok_generation", "byok_claim", "byok_searchable"),
        BEFORE,
    ),
    "tenant rows of two tenants": (swap("byok_tenant", *_TENANT_COLUMNS), BEFORE),
    "wrappings of two tenants": (rename("byok_wrapping"), BEFORE),
    "generations of two tenants": (rename("byok_generation"), AFTER),
    **{f"{c} of two tenants": (swap("byok_wrapping", c), BEFORE) for c in ("config", "wrapped", "row_tag")},
    **{f"{c} of two tenants": (swap("byok_tenant", c), BEFORE) for c in ("tenant_key_id", "manifest_tag")},
    **{f"{c} of two tenants": (swap("byok_generation", c), AFTER) for c in ("id", "sealed")},
    "id and sealed of two tenants": (swap("byok_generation", "id", "sealed"), AFTER),
    "tag and manifest of two tenants": (
        lambda d, t: (
            swap("byok_wrapping", "row_tag")(d, t),
            swap("byok_tenant", "manifest_tag")(d, t),
            None,
        )[-1],
        BEFORE,
    ),
    "the other's wrapping beside it": (
        sql(
            "INSERT INTO byok_wrapping SELECT :t, 1, provider, config, wrapped, kms_key_version, row_tag "
            "FROM byok_wrapping WHERE tenant = :o"
        ),
        BEFORE,
    ),
    "the other's wrapping before it": (
        sql(
            "UPDATE byok_wrapping SET position = 1 WHERE tenant = :t",
            "INSERT INTO byok_wrapping SELECT :t, 0, provider, config, wrapped, kms_key_version, row_tag "
            "FROM byok_wrapping WHERE tenant = :o",
        ),
        BEFORE,
    ),
    "its wrapping twice": (
        sql(
            "INSERT INTO byok_wrapping SELECT :t, 1, provider, config, wrapped, kms_key_version, row_tag "
            "FROM byok_wrapping WHERE tenant = :t"
        ),
        BEFORE,
    ),
    "no wrapping": (sql("DELETE FROM byok_wrapping WHERE tenant = :t"), BEFORE),
    "no generation": (sql("DELETE FROM byok_generation WHERE tenant = :t"), AFTER),
    "no data key": (sql("DELETE FROM byok_generation WHERE tenant = :t AND kind = 'data-key'"), AFTER),
    "no search salt": (sql("DELETE FROM byok_generation WHERE tenant = :t AND kind = 'search-salt'"), AFTER),
    "the other's generations beside its own": (
        sql(_COPY.format(generation=2, state="'readable'") + "WHERE tenant = :o"),
        AFTER,
    ),
    "its generations twice": (
        sql(_COPY.format(generation=2, state="'pending'") + "WHERE tenant = :t"),
        AFTER,
    ),
    "key and salt in each other's place": (
        sql(
            "UPDATE byok_generation SET kind = CASE kind WHEN 'data-key' THEN 'search-salt' ELSE 'data-key' END "
            "WHERE tenant = :t"
        ),
        AFTER,
    ),
    "longer times": (
        sql(
            "UPDATE byok_tenant SET revoke_within_ms = 86400000, outage_grace_ms = 3600000 WHERE tenant = :t"
        ),
        BEFORE,
    ),
    "a later epoch": (sql("UPDATE byok_tenant SET epoch = 1000 WHERE tenant = :t"), BEFORE),
    "no tag": (sql("UPDATE byok_wrapping SET row_tag = NULL WHERE tenant = :t"), BEFORE),
    "an empty tag": (sql("UPDATE byok_wrapping SET row_tag = x'' WHERE tenant = :t"), BEFORE),
    "another settings' name": (configured(profile="lenient"), BEFORE),
    "nested configuration": (text(lambda config: "[" * 100_000), BEFORE),
    "huge configuration": (text(lambda config: config + " " * (1 << 20)), BEFORE),
    "not a number": (text(lambda config: '{"key": NaN, "profile": Infinity}'), BEFORE),
    "the same in other words": (text(lambda config: config.replace("e", "\\u0065", 1)), BEFORE),
    "an entry twice": (text(lambda config: config[:-1] + ', "profile": "default"}'), BEFORE),
    "another provider": (sql("UPDATE byok_wrapping SET provider = 'local' WHERE tenant = :t"), BEFORE),
    "an unknown provider": (sql("UPDATE byok_wrapping SET provider = 'fake' WHERE tenant = :t"), BEFORE),
    "made up, without a tag": (forged(None), BEFORE),
    "made up, under another keystore key": (forged(bytes(32)), BEFORE),
}


@pytest.mark.parametrize("tenant", KINDS)
@pytest.mark.parametrize("attack", ROWS)
def test_rows_that_were_moved_or_made_up_are_refused(
    deployment: Deployment, attack: str, tenant: str
) -> None:
    """Rows cannot change places, be copied, go missing or be made up: not in a new process, nor in one at work."""
    hand, when = ROWS[attack]
    assert deployment.found(tenant, "A-1") == 1
    hand(deployment, tenant)
    open_cold(deployment, tenant, KeystoreTamperedError)
    allowed = OPENING[tenant] if when == AFTER else set()
    assert deployment.calls <= allowed
    deployment.byok.forget_keys(tenant)
    deployment.quiet()
    if when == BEFORE:
        use_warm(deployment, tenant, KeystoreTamperedError)
    assert not deployment.calls
    others_go_on(deployment, tenant)


@pytest.mark.parametrize(
    ("tenant", "change"),
    [
        ("role", {"key": "<key>"}),
        ("role", {"key": "arn:aws:kms:us-east-1:666666666666:key/1234abcd-12ab-34cd-56ef-1234567890ab"}),
        ("role", {"role": "arn:aws:iam::666666666666:role/adversary"}),
        ("role", {"external_id": "00000000000000000000000000000000"}),
        ("role", {"endpoint_url": "http://127.0.0.1:9"}),
        ("salts", {"role": "arn:aws:iam::666666666666:role/adversary", "external_id": "xx"}),
        ("vault", {"key_url": "<vault>"}),
        ("vault", {"key_url": "https://adversary.vault.azure.net/keys/byok"}),
        ("vault", {"key_url": "https://127.0.0.1:9/keys/byok"}),
        ("vault", {"tenant_id": "66666666-86f1-41af-91ab-2d7cd011db47"}),
        ("vault", {"client_id": "66666666-86f1-41af-91ab-2d7cd011db47"}),
        ("vault", {"client_secret": "env:DATABASE_URL"}),
        ("vault", {"client_secret": "env:BYOK_TEST_KEYSTORE_KEY"}),
        ("vault", {"operations": "wrap"}),
        ("app", {"tenant_id": "66666666-86f1-41af-91ab-2d7cd011db47"}),
        ("app", {"credential": "another"}),
        ("app", {"key_url": "<vault>"}),
    ],
)
def test_nobody_is_led_elsewhere(deployment: Deployment, tenant: str, change: dict[str, str]) -> None:
    """Keys, regions, roles, vaults, directories, applications and secrets of the adversary's are not called."""
    assert deployment.found(tenant, "A-1") == 1
    configured(**change)(deployment, tenant)
    open_cold(deployment, tenant, KeystoreTamperedError)
    assert not deployment.calls
    deployment.byok.forget_keys(tenant)
    use_warm(deployment, tenant, KeystoreTamperedError)
    assert not deployment.calls
    others_go_on(deployment, tenant)


# -- generations in every state ---------------------------------------------------------------------------------------


@pytest.fixture
def rotated(deployment: Deployment) -> Deployment:
    """The tenant "role" with data keys 1 retired, 2 readable, 3 active and 4 pending."""
    byok = deployment.byok
    for _ in range(2):
        byok.rotate_data_key("role")
    byok._generations.retire("role", DATA_KEY, 1)
    clock = deployment.clock
    clock.sleep = lambda seconds: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        byok.rotate_data_key("role")
    del clock.sleep
    states = {1: RETIRED, 2: READABLE, 3: ACTIVE, 4: PENDING}
    assert generations(deployment) == states
    return deployment


def generations(deployment: Deployment) -> dict[int, str]:
    with deployment.hand.connect() as connection:
        return dict(
            connection.exec_driver_sql(
                "SELECT generation, state FROM byok_generation WHERE tenant = 'role' AND kind = 'data-key'"
            ).all()
        )


def test_no_state_can_be_changed(rotated: Deployment) -> None:
    """Retiring, reviving, activating, hiding: each change of each generation's state breaks the manifest."""
    whole = rotated.state()
    for generation, state in generations(rotated).items():
        for other in {PENDING, ACTIVE, READABLE, RETIRED} - {state}:
            rotated.run(
                "UPDATE byok_generation SET state = ? WHERE tenant = 'role' AND kind = 'data-key' AND generation = ?",
                other,
                generation,
            )
            open_cold(rotated, "role", KeystoreTamperedError)
            assert rotated.calls <= OPENING["role"]
            rotated.put(whole)


def test_no_states_can_be_exchanged_and_no_generation_taken_away(rotated: Deployment) -> None:
    """With exactly one active, as it should be, and still not what the tenant key authenticated."""
    whole, states = rotated.state(), generations(rotated)
    mine = "WHERE tenant = 'role' AND kind = 'data-key' AND generation"
    for generation in states:
        if states[generation] != ACTIVE:
            rotated.run(f"UPDATE byok_generation SET state = ? {mine} = 3", states[generation])
            rotated.run(f"UPDATE byok_generation SET state = 'active' {mine} = {generation}")
            open_cold(rotated, "role", KeystoreTamperedError)
            rotated.put(whole)
        if states[generation] != RETIRED:
            rotated.run(f"DELETE FROM byok_generation {mine} = {generation}")
            open_cold(rotated, "role", KeystoreTamperedError)
            rotated.put(whole)


def test_a_generation_from_a_backup_does_not_come_back(rotated: Deployment) -> None:
    """A destroyed generation's row, authentic when it was written, is not in the manifest any more."""
    rotated.byok._generations.destroy("role", DATA_KEY, 1)
    rotated.run(
        "INSERT INTO byok_generation SELECT tenant, kind, 1, id, sealed, 'readable' FROM byok_generation "
        "WHERE tenant = 'role' AND kind = 'data-key' AND generation = 2"
    )
    open_cold(rotated, "role", KeystoreTamperedError)


def test_what_is_put_among_the_retired_is_never_used(rotated: Deployment) -> None:
    """Retired generations are not listed: one that was made up is not read, and cannot be carried over by a rekey."""
    rotated.run(
        "UPDATE byok_generation SET sealed = zeroblob(62) WHERE tenant = 'role' AND state = 'retired'"
    )
    before = rotated.state()
    with rotated.byok.tenant("role"):
        pass
    with pytest.raises(KeystoreTamperedError):
        rotated.byok.rekey("role")
    assert rotated.state() == before


# -- several wrappings ------------------------------------------------------------------------------------------------


def _wrapping(deployment: Deployment, tenant: str) -> Wrapping:
    row = deployment.byok._keystore.load(tenant)
    assert row is not None
    return row.wrappings[0]


@pytest.mark.parametrize(
    "attack",
    [
        sql(
            "UPDATE byok_wrapping SET position = 2 WHERE tenant = :t AND position = 0",
            "UPDATE byok_wrapping SET position = 0 WHERE tenant = :t AND position = 1",
            "UPDATE byok_wrapping SET position = 1 WHERE tenant = :t AND position = 2",
        ),
        sql("DELETE FROM byok_wrapping WHERE tenant = :t AND position = 1"),
        sql("DELETE FROM byok_wrapping WHERE tenant = :t AND position = 0"),
        sql(
            "DELETE FROM byok_wrapping WHERE tenant = :t AND position = 0",
            "UPDATE byok_wrapping SET position = 0 WHERE tenant = :t",
        ),
        sql("UPDATE byok_wrapping SET position = 5 WHERE tenant = :t AND position = 1"),
        sql("UPDATE byok_wrapping SET position = -1 WHERE tenant = :t AND position = 1"),
        sql("UPDATE byok_wrapping SET position = 0 WHERE tenant = :t"),
        sql(
            "INSERT INTO byok_wrapping SELECT :t, 2, provider, config, wrapped, kms_key_version, row_tag "
            "FROM byok_wrapping WHERE tenant = :t AND position = 1"
        ),
    ],
    ids=["exchanged", "second gone", "first gone", "second alone", "gap", "before", "one position", "twice"],
)
def test_which_wrapping_is_tried_first_is_authenticated(deployment: Deployment, attack: Hand) -> None:
    """Else a second key, such as one for recovery, would answer for a customer that has said no with the first."""
    second = deployment.servers.aws_key()
    under = [_wrapping(deployment, "role"), Wrapping(second.provider, json.dumps(second.config()), b"", "")]
    deployment.byok._generations.rewrap("role", under)
    assert deployment.found("role", "A-1") == 1
    deployment.byok.forget_keys()
    attack(deployment, "role")
    open_cold(deployment, "role", KeystoreTamperedError)
    assert not deployment.calls


def test_how_many_wrappings_there_are_is_authenticated(deployment: Deployment) -> None:
    """The last of three cannot be taken away either, which leaves the others where they were."""
    second = deployment.servers.aws_key()
    other = Wrapping(second.provider, json.dumps(second.config()), b"", "")
    deployment.byok._generations.rewrap("role", [_wrapping(deployment, "role"), other, other])
    deployment.run("DELETE FROM byok_wrapping WHERE tenant = 'role' AND position = 2")
    open_cold(deployment, "role", KeystoreTamperedError)
    assert not deployment.calls


# -- old states -------------------------------------------------------------------------------------------------------


def test_an_old_state_is_refused_by_who_has_seen_a_newer_one(deployment: Deployment) -> None:
    """For every use, by a poll or when opened anew, without a call; also by a process that only wrote it."""
    deployment.process().rewrap("vault")
    deployment.byok.rewrap("role")  # has not opened it since
    assert deployment.found("vault", "A-1") == 1
    deployment.put(deployment.whole)
    deployment.clock.turn(POLL_EVERY)
    deployment.quiet()
    for tenant in ("vault", "role"):
        use_warm(deployment, tenant, KeystoreRolledBackError)
    assert not deployment.calls
    assert deployment.found("app", "A-1") == 1


def test_another_state_of_the_same_epoch_is_refused(deployment: Deployment) -> None:
    """After an old state was put back and changed again, nobody writes on with a data key that is lost."""
    deployment.byok.rotate_data_key("role")
    assert deployment.found("role", "A-1") == 1
    epoch = deployment.get("SELECT epoch FROM byok_tenant WHERE tenant = 'role'")
    deployment.put(deployment.whole)
    deployment.process().rotate_data_key("role")
    assert deployment.get("SELECT epoch FROM byok_tenant WHERE tenant = 'role'") == epoch
    deployment.quiet()
    use_warm(deployment, "role", KeystoreRolledBackError)
    assert not deployment.calls
    with deployment.process().tenant("role"):
        pass


def test_a_new_process_cannot_know(deployment: Deployment) -> None:
    """An authentic old state is opened by a process that has seen no newer one; what is newer does not open there."""
    deployment.byok.rotate_data_key("role")
    deployment.write("role", "A-2")
    deployment.put(deployment.whole)
    other = deployment.process()
    deployment.byok.close()
    deployment.data.dispose()
    deployment.data = create_engine(deployment.data.url)
    deployment.byok = other
    other.attach(deployment.data)
    assert deployment.found("role", "A-1") == 1
    with pytest.raises(UnknownDataKeyError):
        deployment.read("role")


def test_an_epoch_that_is_held_is_noticed_by_its_tag(deployment: Deployment) -> None:
    """Who holds the epoch alone, to hide a rotation, breaks the row; what he must put back is the whole old state."""
    assert deployment.found("role", "A-1") == 1
    deployment.process().rewrap("role")
    deployment.run("UPDATE byok_tenant SET epoch = 1 WHERE tenant = 'role'")
    deployment.clock.turn(POLL_EVERY)
    deployment.quiet()
    use_warm(deployment, "role", KeystoreTamperedError)
    assert not deployment.calls


def test_a_tenant_that_was_deleted_is_unknown(deployment: Deployment) -> None:
    """A deleted row is a "no" at the next look, with or without what hung on it."""
    assert deployment.found("role", "A-1") == 1
    deployment.run("DELETE FROM byok_tenant WHERE tenant = 'role'")
    deployment.clock.turn(POLL_EVERY)
    deployment.quiet()
    open_cold(deployment, "role", UnknownTenantError)
    use_warm(deployment, "role", UnknownTenantError)
    assert not deployment.calls


# -- without the right keystore key -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", KINDS)
def test_without_the_right_keystore_key_nobody_is_called(
    deployment: Deployment, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Byok with another keystore key, or none, refuses every tenant whose KMS is outside."""
    monkeypatch.setenv("OTHER_KEY", base64.b64encode(bytes(32)).decode())
    for reference, refused in (("env:OTHER_KEY", KeystoreTamperedError), (None, ConfigurationError)):
        byok = deployment.process(keystore_key=reference)
        deployment.quiet()
        with pytest.raises(refused), byok.tenant(tenant):
            pass
        assert not deployment.calls
        byok.close()


@pytest.fixture
def keyless(deployment: Deployment, local_kms: LocalKms) -> Byok:
    """A Byok without a keystore key, and its one tenant "dev" under a key file."""
    byok = deployment.process(keystore_key=None)
    byok.onboard("dev", local_kms)
    return byok


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("config", "[" * 100_000, KeystoreTamperedError),
        ("config", '{"path": NaN}', ConfigurationError),
        ("config", '{"path": "relative"}', ConfigurationError),
        ("config", '{"path": 5}', ConfigurationError),
        ("config", "[]", KeystoreTamperedError),
        ("config", '"x"', KeystoreTamperedError),
        ("config", "", KeystoreTamperedError),
        ("config", "null", KeystoreTamperedError),
        ("config", b"{}", KeystoreTamperedError),
        ("wrapped", "text", KeystoreTamperedError),
        ("wrapped", 5, KeystoreTamperedError),
        ("provider", "aws", ConfigurationError),
        ("provider", "fake", ConfigurationError),
        ("provider", None, ConfigurationError),
        ("provider", b"local", KeystoreTamperedError),
        ("position", "x", KeystoreTamperedError),
    ],
)
def test_a_row_without_a_tag_may_hold_anything(
    deployment: Deployment, keyless: Byok, column: str, value: Any, error: type[ByokError]
) -> None:
    """Without a keystore key nothing outside is called, nonsense is an error of ours, and nobody else is stopped."""
    deployment.run(f"UPDATE byok_wrapping SET {column} = ? WHERE tenant = 'dev'", value)
    deployment.quiet()
    with pytest.raises(error), keyless.tenant("dev"):
        pass
    assert not deployment.calls
    assert deployment.byok.status().tenants == len(KINDS) * 2 + 1
    assert deployment.found("role", "A-1") == 1


@pytest.mark.parametrize("column", ["revoke_within_ms", "outage_grace_ms"])
def test_no_row_makes_keys_last_for_ever(deployment: Deployment, keyless: Byok, column: str) -> None:
    """Even where rows are not authenticated, times are no longer than onboarding takes them."""
    deployment.run(f"UPDATE byok_tenant SET {column} = 86400001 WHERE tenant = 'dev'")
    with pytest.raises(KeystoreTamperedError), keyless.tenant("dev"):
        pass


def test_without_a_keystore_key_a_tenant_can_be_made_up(
    deployment: Deployment, keyless: Byok, tmp_path: Path
) -> None:
    """The known limit, for development only: what is written from then on is written under the adversary's key."""
    forge(deployment, "dev", LocalKms.create(tmp_path / "adversary.key"), None)
    with keyless.tenant("dev"):
        pass


def test_claims_protect_against_customers_not_against_the_adversary(deployment: Deployment) -> None:
    """A claim that was taken away lets a key be onboarded twice; the first tenant's keys stay what they are."""
    kms = AwsKms(deployment.servers.aws.create_key())
    deployment.byok.onboard("one", kms)
    with pytest.raises(ConfigurationError, match="belongs to another tenant"):
        deployment.byok.onboard("two", kms)
    deployment.run("DELETE FROM byok_claim WHERE tenant = 'one'")
    deployment.byok.onboard("two", kms)
    swap_names = rename("byok_wrapping")
    deployment.run("UPDATE byok_wrapping SET tenant = 'one-2' WHERE tenant = 'two'")
    swap_names(deployment, "one")
    open_cold(deployment, "one", KeystoreTamperedError)
    assert not deployment.calls


def test_a_generation_number_that_is_taken_stops_a_rotation_only(deployment: Deployment) -> None:
    """A made-up retired row in the next one's place: the rotation gives up with nothing changed."""
    deployment.run("CREATE UNIQUE INDEX once ON byok_generation (tenant, kind, generation)")
    deployment.run(
        _COPY.format(generation=2, state="'retired'").replace(":t", "'role'") + "WHERE tenant = 'role'"
    )
    before = deployment.state()
    with pytest.raises(KeystoreConflictError):
        deployment.byok.rotate_data_key("role")
    assert deployment.state() == before
    deployment.run("DROP INDEX once")
    assert deployment.found("role", "A-1") == 1


def test_tables_are_all_there() -> None:
    """The hand reaches every table of the keystore."""
    mine = {f"byok_{name}" for name in ("format", "tenant", "wrapping", "generation", "searchable", "claim")}
    assert set(TABLES) == {*mine, *OF_JOBS}
