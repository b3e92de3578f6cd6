"""The keystore on every database: onboarding, names, the keystore key, and what a hostile writer can do."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from keys_tools import KEYSTORE_KEY, CountingKms, hand_in, publish_data_key, table
from kms_server import KmsServer
from sqlalchemy import URL, Engine, delete, func, insert, select, update

from sqla_byok import (
    AwsKms,
    Byok,
    ByokError,
    ConfigurationError,
    KeystoreError,
    KeystoreRolledBackError,
    KeystoreTamperedError,
    LocalKms,
    TenantExistsError,
    UnknownTenantError,
    WrongKeyError,
)
from sqla_byok.kms import Kms, Wrapped

NAMES = ["MÜLLER", "Muller", "Müller", "muller", "müller", "o" * 255]


def _rows(engine: Engine, name: str) -> int:
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table(name))) or 0


def _opens(byok: Byok, tenant: str) -> None:
    with byok.tenant(tenant):
        pass


# -- setting up and onboarding ---------------------------------------------------------------------------------------


def _check_onboarding(url: URL, customer_key: Path) -> None:
    byok = Byok(keystore=url)
    byok.create_keystore()
    byok.create_keystore()
    kms, other = LocalKms(customer_key), LocalKms.create(customer_key.with_name("other.key"))
    for name in NAMES:
        byok.onboard(name, kms)
    byok.onboard("Müller", kms)
    for given, seconds in ((other, 300.0), (kms, 60.0)):
        with pytest.raises(TenantExistsError, match="onboarding never overwrites") as raised:
            byok.onboard("Müller", given, revoke_within=seconds)
        assert raised.value.tenant == "Müller"
    assert byok.tenants() == sorted(NAMES)
    for unknown in ("mÜller", "Mueller", "Müller ", "o" * 254):
        with pytest.raises(UnknownTenantError, match="onboard it first"):
            _opens(byok, unknown)
    for name in NAMES:
        _opens(byok, name)
    byok.close()
    engine = hand_in(url)
    assert [_rows(engine, name) for name in ("format", "tenant", "wrapping", "generation")] == [1, 6, 6, 12]
    engine.dispose()


def test_onboarding_over_a_sync_url(sync_url: URL, customer_key: Path) -> None:
    """Creating twice, onboarding again, refusing another key, and names that collations take for one."""
    _check_onboarding(sync_url, customer_key)


def test_onboarding_over_an_async_url(async_url: URL, customer_key: Path) -> None:
    """The same where the keystore's own driver is an asyncio one, called from plain threads."""
    _check_onboarding(async_url, customer_key)


async def test_onboarding_from_asyncio(async_url: URL, local_kms: LocalKms) -> None:
    """The async twins do the same without blocking the event loop (blockbuster watches)."""
    byok = Byok(keystore=async_url)
    await byok.acreate_keystore()
    await byok.aonboard("t1", local_kms)
    await byok.aonboard("t1", local_kms)
    with pytest.raises(TenantExistsError):
        await byok.aonboard("t1", local_kms, revoke_within=2)
    with pytest.raises(UnknownTenantError):
        async with byok.tenant("t2"):
            pass
    async with byok.tenant("t1"):
        assert await byok.atenants() == ["t1"]
    await byok.aclose()


def test_a_name_with_a_trailing_blank_is_never_taken_for_the_other(sync_url: URL, customer_key: Path) -> None:
    """MariaDB compares without trailing blanks: there the second name is refused, elsewhere it is another tenant."""
    byok = Byok(keystore=sync_url)
    byok.create_keystore()
    byok.onboard("a", LocalKms(customer_key))
    with pytest.raises(UnknownTenantError):
        _opens(byok, "a ")
    if sync_url.get_backend_name() == "mariadb":
        with pytest.raises(TenantExistsError, match="trailing blanks"):
            byok.onboard("a ", LocalKms(customer_key))
        assert byok.tenants() == ["a"]
    else:
        byok.onboard("a ", LocalKms(customer_key))
        _opens(byok, "a ")
        assert byok.tenants() == ["a", "a "]
    byok.close()


class _MeetingKms(Kms):
    """A key file whose holder waits for another one before it inserts."""

    provider, profile = "local", "default"

    def __init__(self, path: Path, meeting: threading.Barrier) -> None:
        self._kms, self._meeting = LocalKms(path), meeting

    def config(self) -> dict[str, str]:
        return self._kms.config()

    def connect(self, settings: Any, operator: Any = None, *, reason: str = "open") -> Any:
        return self

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        self._meeting.wait(10)
        return self._kms.connect({}).wrap(payload, tenant=tenant)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        return self._kms.connect({}).unwrap(wrapped, tenant=tenant)


@pytest.mark.parametrize("same", [True, False], ids=["same key", "other keys"])
def test_two_threads_onboard_one_tenant(sync_url: URL, customer_key: Path, same: bool) -> None:
    """One of them wins, whole; the other is content with the same key and refused with another."""
    other = LocalKms.create(customer_key.with_name("other.key"))
    byok, meeting = Byok(keystore=sync_url), threading.Barrier(2)
    byok.create_keystore()
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(byok.onboard, "t1", _MeetingKms(path, meeting))  # type: ignore[abstract]
            for path in (customer_key, customer_key if same else Path(other.path))
        ]
        refused = [error for error in (future.exception() for future in running) if error is not None]
    assert [type(error) for error in refused] == ([] if same else [TenantExistsError])
    engine = hand_in(sync_url)
    assert [_rows(engine, name) for name in ("tenant", "wrapping", "generation")] == [1, 1, 2]
    engine.dispose()
    _opens(byok, "t1")
    byok.close()


def test_several_threads_create_the_keystore(sync_url: URL) -> None:
    """Processes that start at the same time may all call create_keystore()."""
    byoks, meeting = [Byok(keystore=sync_url) for _ in range(4)], threading.Barrier(4)

    def create(byok: Byok) -> None:
        meeting.wait(10)
        byok.create_keystore()
        byok.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, byoks))
    engine = hand_in(sync_url)
    assert [_rows(engine, name) for name in ("format", "tenant")] == [1, 0]
    engine.dispose()


# -- the keystore key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_the_keystore_key_by_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: bytes
) -> None:
    """env: and file: references lead to the same key, with or without a newline behind it."""
    text = base64.b64encode(KEYSTORE_KEY) + newline
    (tmp_path / "ks.key").write_bytes(text)
    monkeypatch.setenv("KS_KEY", text.decode())
    url, kms = f"sqlite:///{tmp_path / 'k.db'}", LocalKms.create(tmp_path / "c.key")
    first = Byok(keystore=url, keystore_key="env:KS_KEY")
    first.create_keystore()
    first.onboard("t1", kms)
    second = Byok(keystore=url, keystore_key=f"file:{tmp_path / 'ks.key'}")
    _opens(second, "t1")
    first.close()
    second.close()


_RAW = bytes(range(128, 160))
_B64 = base64.b64encode(_RAW).decode()


@pytest.mark.parametrize(
    ("reference", "content", "message"),
    [
        (_B64, None, "is a reference"),
        (f"base64:{_B64}", None, "is a reference"),
        ("", None, "is a reference"),
        ("env:KS_KEY", None, "nothing at 'env:KS_KEY'"),
        ("env:KS_KEY", b"", "nothing at"),
        ("env:KS_KEY", base64.b64encode(b"x" * 31), "32 bytes in base64"),
        ("env:KS_KEY", b"not base64 at all!", "32 bytes in base64"),
        ("env:KS_KEY", "schlüssel".encode(), "32 bytes in base64"),
        ("file:ks.key", None, "nothing at"),
        ("file:.", None, "cannot be read"),
        ("file:ks.key", _RAW, "32 bytes in base64"),
        ("file:ks.key", base64.b64encode(b"x" * 33), "32 bytes in base64"),
    ],
)
def test_a_keystore_key_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, content: bytes | None, message: str
) -> None:
    """Literals, missing ones and wrong lengths are refused, and no message or chained exception tells the content."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("ks.key").write_bytes(content)
        monkeypatch.setenv("KS_KEY", content.decode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match=message) as raised:
        Byok(keystore="sqlite://", keystore_key=reference)
    shown = [raised.value, raised.value.__cause__, raised.value.__context__]
    assert not any(_B64 in repr(error) or repr(_RAW)[2:-1] in repr(error) for error in shown)
    assert not any(isinstance(error, UnicodeError) for error in shown)


def test_without_a_keystore_key_there_are_only_key_files(tmp_path: Path, kms_server: KmsServer) -> None:
    """Nothing may lead an unauthenticated row to an outbound call: neither onboarding nor a row that was altered."""
    url = f"sqlite:///{tmp_path / 'k.db'}"
    byok = Byok(keystore=url, kms_profiles={"default": {"endpoint_url": kms_server.url}})
    byok.create_keystore()
    with pytest.raises(ConfigurationError, match="keystore_key"):
        byok.onboard("t1", AwsKms(kms_server.create_key()))
    byok.onboard("t1", LocalKms.create(tmp_path / "c.key"))
    config = f'{{"key": "{kms_server.create_key()}", "profile": "default"}}'
    with hand_in(url).begin() as connection:
        connection.execute(update(table("wrapping")).values(provider="aws", config=config))
    with pytest.raises(ConfigurationError, match="keystore_key"):
        _opens(byok, "t1")
    assert kms_server.calls == {}
    byok.close()


def test_a_keystore_under_another_key_opens_nothing(
    tmp_path: Path, kms_server: KmsServer, keystore_key: str
) -> None:
    """A keystore of another deployment, or none of the key at all, is refused before any call."""
    url, profiles = f"sqlite:///{tmp_path / 'k.db'}", {"default": {"endpoint_url": kms_server.url}}
    byok = Byok(keystore=url, keystore_key=keystore_key, kms_profiles=profiles)
    byok.create_keystore()
    byok.onboard("t1", AwsKms(kms_server.create_key()))
    kms_server.calls.clear()
    (tmp_path / "other").write_text(base64.b64encode(bytes(32)).decode())
    for reference, refused in (
        (f"file:{tmp_path / 'other'}", KeystoreTamperedError),
        (None, ConfigurationError),
    ):
        other = Byok(keystore=url, keystore_key=reference, kms_profiles=profiles)
        with pytest.raises(refused):
            _opens(other, "t1")
        other.close()
    assert kms_server.calls == {}
    byok.close()


# -- hostile hands ---------------------------------------------------------------------------------------------------

_INTEGERS = [-1, 1 << 40, 7, "x", b"x"]
_BYTES = [b"", b"x" * 16, b"x" * 32, "text", 5]
_CHANGES: dict[str, list[Any]] = {
    "tenant.revoke_within_ms": _INTEGERS,
    "tenant.outage_grace_ms": _INTEGERS,
    "tenant.tenant_key_generation": _INTEGERS,
    "tenant.epoch": _INTEGERS,
    "tenant.tenant_key_id": _BYTES,
    "tenant.manifest_tag": _BYTES,
    "wrapping.provider": ["local", "nobody", b"x", 5],
    "wrapping.config": ["x", b"x", 5],
    "wrapping.wrapped": _BYTES,
    "wrapping.kms_key_version": ["x", b"x", 5],
    "wrapping.row_tag": [*_BYTES, None],
    "generation.kind": ["x", "", b"x", 5],
    "generation.generation": [2, "x", -1],
    "generation.state": ["x", "pending", "readable", b"x", 5],
    "generation.id": _BYTES,
    "generation.sealed": _BYTES,
}


@pytest.fixture
def aws_byok(tmp_path: Path, kms_server: KmsServer, keystore_key: str) -> Iterator[tuple[Byok, Engine]]:
    """A Byok with the tenants t1 and t2 under one AWS key each, and a hand in its keystore; no call counted yet."""
    url, profiles = f"sqlite:///{tmp_path / 'k.db'}", {"default": {"endpoint_url": kms_server.url}}
    byok = Byok(keystore=url, keystore_key=keystore_key, kms_profiles=profiles)
    byok.create_keystore()
    for tenant in ("t1", "t2"):
        byok.onboard(tenant, AwsKms(kms_server.create_key()))
    kms_server.calls.clear()
    engine = hand_in(url)
    yield byok, engine
    engine.dispose()
    byok.close()


def _alter(engine: Engine, column: str, value: Any) -> None:
    # Past the column's type: SQLite stores anything in any column.
    name, _, column = column.partition(".")
    only = "AND kind = 'data-key'" if name == "generation" else ""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE byok_{name} SET {column} = ? WHERE tenant = 't1' {only}", (value,)
        )


_TABLES = ("tenant", "wrapping", "generation")


def _state(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    with engine.connect() as connection:
        return {n: [dict(r) for r in connection.execute(select(table(n))).mappings()] for n in _TABLES}


def _restore(engine: Engine, state: dict[str, list[dict[str, Any]]]) -> None:
    with engine.begin() as connection:
        for name in reversed(_TABLES):
            connection.execute(delete(table(name)))
        for name in _TABLES:
            connection.execute(insert(table(name)), state[name])


@pytest.mark.parametrize("column", _CHANGES)
def test_an_altered_column_is_refused(
    aws_byok: tuple[Byok, Engine], kms_server: KmsServer, column: str
) -> None:
    """Whatever is written to any column is refused, and no KMS is called for a row that does not authenticate."""
    byok, engine = aws_byok
    state = _state(engine)
    for value in _CHANGES[column]:
        kms_server.calls.clear()
        _alter(engine, column, value)
        with pytest.raises(KeystoreTamperedError) as raised:
            _opens(byok, "t1")
        assert raised.value.tenant == "t1"
        # Generations are authenticated under the tenant key, which only the KMS opens.
        assert kms_server.calls == ({"Decrypt": 1} if column.startswith("generation") else {})
        _restore(engine, state)
    _opens(byok, "t1")
    _opens(byok, "t2")


def test_no_column_is_left_out() -> None:
    """A column that is added to the keystore has to be thought of here."""
    columns = {f"{name}.{c.name}" for name in _TABLES for c in table(name).c}
    keys = {f"{name}.tenant" for name in _TABLES} | {"wrapping.position"}
    assert columns - keys == {*_CHANGES, "tenant.onboarded_at"}


def test_the_date_of_onboarding_is_nobodys_business(aws_byok: tuple[Byok, Engine]) -> None:
    """The one column that is not authenticated is not read either."""
    byok, engine = aws_byok
    _alter(engine, "tenant.onboarded_at", "never")
    _opens(byok, "t1")


def _swap(name: str, column: str) -> Callable[[Engine], None]:
    def swap(engine: Engine) -> None:
        t = table(name)
        keys = [c for c in t.primary_key if c.name != "tenant"]
        with engine.begin() as connection:
            rows = connection.execute(select(t).order_by(*keys, t.c.tenant)).mappings().all()
            other = {"t1": "t2", "t2": "t1"}
            values = {(r["tenant"], *(r[key.name] for key in keys)): r[column] for r in rows}
            for r in rows:
                rest = tuple(r[key.name] for key in keys)
                mine = [key == r[key.name] for key in keys]
                connection.execute(
                    update(t)
                    .where(t.c.tenant == r["tenant"], *mine)
                    .values({column: values[(other[r["tenant"]], *rest)]})
                )

    return swap


def _swap_names(engine: Engine) -> None:
    with engine.begin() as connection:
        for name in ("tenant", "wrapping", "generation"):
            for old, new in (("t1", "x"), ("t2", "t1"), ("x", "t2")):
                connection.execute(update(table(name)).where(table(name).c.tenant == old).values(tenant=new))


def _swap_wrappings(engine: Engine) -> None:
    t = table("wrapping")
    with engine.begin() as connection:
        for old, new in (("t1", "x"), ("t2", "t1"), ("x", "t2")):
            connection.execute(update(t).where(t.c.tenant == old).values(tenant=new))


def _second_wrapping(engine: Engine) -> None:
    t = table("wrapping")
    with engine.begin() as connection:
        theirs = connection.execute(select(t).where(t.c.tenant == "t2")).mappings().one()
        connection.execute(insert(t).values({**theirs, "tenant": "t1", "position": 1}))


def _without(name: str, *where: Any) -> Callable[[Engine], None]:
    def remove(engine: Engine) -> None:
        with engine.begin() as connection:
            connection.execute(delete(table(name)).where(table(name).c.tenant == "t1", *where))

    return remove


@pytest.mark.parametrize(
    ("hand", "decrypts"),
    [
        pytest.param(_swap_names, 0, id="all rows of two tenants"),
        pytest.param(_swap_wrappings, 0, id="wrappings of two tenants"),
        pytest.param(_swap("wrapping", "wrapped"), 0, id="wrapped keys of two tenants"),
        pytest.param(_swap("wrapping", "config"), 0, id="customer keys of two tenants"),
        pytest.param(_swap("wrapping", "row_tag"), 0, id="tags of two tenants"),
        pytest.param(_swap("tenant", "manifest_tag"), 0, id="manifests of two tenants"),
        pytest.param(_swap("generation", "sealed"), 1, id="data keys and salts of two tenants"),
        pytest.param(_swap("generation", "id"), 1, id="key ids of two tenants"),
        pytest.param(_second_wrapping, 0, id="another tenant's wrapping beside it"),
        pytest.param(_without("wrapping"), 0, id="no wrapping"),
        pytest.param(_without("generation"), 1, id="no generation"),
        pytest.param(
            _without("generation", table("generation").c.kind == "search-salt"), 1, id="no search salt"
        ),
    ],
)
def test_rows_that_were_moved_or_taken_away_are_refused(
    aws_byok: tuple[Byok, Engine], kms_server: KmsServer, hand: Callable[[Engine], None], decrypts: int
) -> None:
    """Rows of two tenants cannot change places, and a missing row is damage, not an unknown tenant."""
    byok, engine = aws_byok
    hand(engine)
    with pytest.raises(KeystoreTamperedError):
        _opens(byok, "t1")
    assert kms_server.calls["Decrypt"] == decrypts


def test_a_tenant_that_was_deleted_is_unknown(aws_byok: tuple[Byok, Engine], kms_server: KmsServer) -> None:
    """A deleted row is a "no", with or without what hung on it."""
    byok, engine = aws_byok
    _without("tenant")(engine)
    with pytest.raises(UnknownTenantError):
        _opens(byok, "t1")
    assert kms_server.calls == {}


def test_an_old_row_that_was_put_back_is_refused(
    aws_byok: tuple[Byok, Engine], kms_server: KmsServer
) -> None:
    """An authentic but older state is refused by a process that has seen a newer one."""
    byok, engine = aws_byok
    old = _state(engine)
    byok_kms = {"endpoint_url": kms_server.url}
    publish_data_key(engine, "t1", KEYSTORE_KEY, byok_kms)
    _opens(byok, "t1")
    byok.forget_keys()
    kms_server.calls.clear()
    _restore(engine, old)
    with pytest.raises(KeystoreRolledBackError, match="at epoch 1, this process has seen 2"):
        _opens(byok, "t1")
    assert kms_server.calls == {}
    _opens(byok, "t2")


def test_a_foreign_write_format_refuses_writers(aws_byok: tuple[Byok, Engine], kms_server: KmsServer) -> None:
    """A keystore that a newer release pinned is read but not written."""
    byok, engine = aws_byok
    with engine.begin() as connection:
        connection.execute(update(table("format")).values(write_format=2))
    with pytest.raises(KeystoreError, match="write format 2"):
        byok.onboard("t3", AwsKms(kms_server.create_key()))
    _opens(byok, "t1")
    assert byok.tenants() == ["t1", "t2"]


def test_every_database_gives_back_what_was_authenticated(
    sync_url: URL, counting_kms: CountingKms, keystore_key: str
) -> None:
    """On every database: the row as stored authenticates, and one changed column of each kind does not."""
    byok = Byok(keystore=sync_url, keystore_key=keystore_key, revoke_within=86_400)
    byok.create_keystore()
    byok.onboard("Zoë ☂", counting_kms)
    counting_kms.unwraps.clear()
    engine = hand_in(sync_url)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("tenant", {"revoke_within_ms": 86_400_001}),
        ("tenant", {"outage_grace_ms": 1}),
        ("tenant", {"tenant_key_id": b"x" * 16}),
        ("tenant", {"tenant_key_generation": 2}),
        ("tenant", {"epoch": 2}),
        ("tenant", {"manifest_tag": b"x" * 32}),
        ("wrapping", {"provider": "local"}),
        ("wrapping", {"config": '{"path":"/etc/passwd"}'}),
        ("wrapping", {"wrapped": b"x"}),
        ("wrapping", {"kms_key_version": "2"}),
        ("wrapping", {"row_tag": b"x" * 32}),
    ]
    for name, change in changes:
        t = table(name)
        with engine.begin() as connection:
            old = connection.execute(select(*(t.c[key] for key in change))).mappings().one()
            connection.execute(update(t).values(change))
        with pytest.raises(KeystoreTamperedError):
            _opens(byok, "Zoë ☂")
        with engine.begin() as connection:
            connection.execute(update(t).values(dict(old)))
    assert counting_kms.unwraps == []
    _opens(byok, "Zoë ☂")
    assert counting_kms.unwraps == ["Zoë ☂"]
    engine.dispose()
    byok.close()


@pytest.mark.parametrize("config", ["", "[]", "{", '{"path": 5}', '{"path": "relative"}', '"x"', "5", "null"])
def test_a_row_without_a_tag_may_hold_anything(tmp_path: Path, customer_key: Path, config: str) -> None:
    """Without a keystore key a key file's row is not authenticated; nonsense in it is still one of our errors."""
    url = f"sqlite:///{tmp_path / 'k.db'}"
    byok = Byok(keystore=url)
    byok.create_keystore()
    byok.onboard("t1", LocalKms(customer_key))
    with hand_in(url).begin() as connection:
        connection.execute(update(table("wrapping")).values(config=config))
    with pytest.raises(ByokError):
        _opens(byok, "t1")
    byok.close()


def test_another_key_file_is_the_wrong_key(tmp_path: Path, customer_key: Path) -> None:
    """A wrapped key that is led to another customer key does not open."""
    url, other = f"sqlite:///{tmp_path / 'k.db'}", LocalKms.create(tmp_path / "other.key")
    byok = Byok(keystore=url)
    byok.create_keystore()
    byok.onboard("t1", LocalKms(customer_key))
    with hand_in(url).begin() as connection:
        connection.execute(update(table("wrapping")).values(config=f'{{"path": "{other.path}"}}'))
    with pytest.raises(WrongKeyError):
        _opens(byok, "t1")
    byok.close()
