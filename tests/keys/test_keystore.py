"""The keystore on every database: onboarding, names, the keystore key, and what a hostile writer can do."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from keys_tools import KEYSTORE_KEY, CountingKms, hand_in, table
from kms_server import KmsServer
from sqlalchemy import URL, Engine, func, select, update

from sqla_byok import (
    AwsKms,
    Byok,
    ConfigurationError,
    KeystoreError,
    KeystoreTamperedError,
    LocalKms,
    TenantExistsError,
    UnknownTenantError,
    WrongKeyError,
    keystore_metadata,
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


def test_several_threads_onboard_first_into_tables_that_a_migration_made(
    sync_url: URL, tmp_path: Path
) -> None:
    """No one pins the format there before they do, and it is pinned once."""
    engine = hand_in(sync_url)
    keystore_metadata.create_all(engine)
    byoks, meeting = [Byok(keystore=sync_url) for _ in range(4)], threading.Barrier(4)
    keys = [LocalKms.create(tmp_path / f"{number}.key") for number in range(4)]

    def onboard(number: int) -> None:
        meeting.wait(10)
        byoks[number].onboard(f"t{number}", keys[number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(onboard, range(4)))
    assert [_rows(engine, name) for name in ("format", "tenant")] == [1, 4]
    for byok in byoks:
        byok.close()
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


# -- what is stored --------------------------------------------------------------------------------------------------


def test_a_foreign_write_format_refuses_writers(sync_url: URL, local_kms: LocalKms) -> None:
    """A keystore that a newer release pinned is read but not written."""
    byok = Byok(keystore=sync_url)
    byok.create_keystore()
    byok.onboard("t1", local_kms)
    engine = hand_in(sync_url)
    with engine.begin() as connection:
        connection.execute(update(table("format")).values(write_format=2))
    for change in (lambda: byok.onboard("t2", local_kms), lambda: byok.rekey("t1")):
        with pytest.raises(KeystoreError, match="write format 2"):
            change()
    _opens(byok, "t1")
    assert byok.tenants() == ["t1"]
    engine.dispose()
    byok.close()


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
        ("wrapping", {"position": 1}),
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
