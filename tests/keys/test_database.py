"""The keystore's own pool, in-memory databases, and databases that do not answer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from sqlalchemy import (
    URL,
    Column,
    Integer,
    MetaData,
    StaticPool,
    String,
    Table,
    create_engine,
    func,
    insert,
    make_url,
    select,
)
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_byok import Byok, ConfigurationError, Encrypted, KeystoreUnavailableError, LocalKms
from sqla_byok.keys import database

_metadata = MetaData()
_patient = Table(
    "patient",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Encrypted(String(50))),
)
_count = select(func.count()).select_from(_patient)


def test_a_request_never_waits_for_a_second_connection(sync_url: URL, customer_key: Path) -> None:
    """With one data connection, held by an open transaction, a cold tenant opens from the same database."""
    engine = create_engine(sync_url, pool_size=1, max_overflow=0, pool_timeout=1)
    byok = Byok(keystore=engine)
    byok.create_keystore()
    byok.attach(engine)
    for tenant in ("t1", "t2"):
        byok.onboard(tenant, LocalKms(customer_key))
    _metadata.create_all(engine)
    # An SQLite file takes one writer at a time, and a tenant's first write is noted.
    for tenant in ("t1", "t2"):
        with engine.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert(_patient).values(id=0, name="Ada"))
            connection.rollback()
    with engine.begin() as connection:
        assert connection.scalar(_count) == 0
        for id_, tenant in enumerate(("t1", "t2"), start=1):
            insertion = insert(_patient).values(id=id_, name="Ada").execution_options(byok_tenant=tenant)
            byok.forget_keys(tenant)  # cold, in an open transaction that has read or written
            connection.execute(insertion)
    with engine.connect() as connection:
        assert connection.scalar(_count) == 2
    byok.close()
    engine.dispose()


async def test_a_task_never_waits_for_a_second_connection(async_url: URL, local_kms: LocalKms) -> None:
    """The same on asyncio drivers: the statement hook opens the tenant while its connection is held."""
    engine = create_async_engine(async_url, pool_size=1, max_overflow=0, pool_timeout=1)
    byok = Byok(keystore=engine)
    await byok.acreate_keystore()
    byok.attach(engine)
    await byok.aonboard("t1", local_kms)
    async with engine.begin() as connection:
        await connection.run_sync(_metadata.create_all)
        assert await connection.scalar(_count) == 0
        await connection.execute(
            insert(_patient).values(id=1, name="Ada").execution_options(byok_tenant="t1")
        )
        names = await connection.scalars(select(_patient.c.name).execution_options(byok_tenant="t1"))
        assert names.all() == ["Ada"]
    await byok.aclose()
    await engine.dispose()


def test_an_in_memory_database_keeps_its_open_transaction(customer_key: Path) -> None:
    """Opening a tenant neither commits nor loses what is open; onboarding into it is refused and changes nothing."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    _metadata.create_all(engine)
    byok = Byok(keystore=engine)
    byok.create_keystore()
    byok.attach(engine)
    byok.onboard("t1", LocalKms(customer_key))
    ours = engine.execution_options(byok_tenant="t1")
    with ours.connect() as connection:  # a tenant's first write is noted
        connection.execute(insert(_patient).values(id=3, name="Ada"))
    for end, rows in (("rollback", 0), ("commit", 2)):
        byok.forget_keys()
        with engine.connect() as connection:
            connection.execute(insert(_patient).values(id=1, name=None))
            with ours.connect() as same:  # the same connection of the one-connection pool
                same.execute(insert(_patient).values(id=2, name="Ada"))
                assert byok.tenants() == ["t1"]
                for change in (byok.create_keystore, lambda: byok.onboard("t2", LocalKms(customer_key))):
                    with pytest.raises(ConfigurationError, match="commit or roll it back"):
                        change()
                assert same.scalar(_count) == 2
                getattr(same, end)()
        with engine.connect() as connection:
            assert connection.scalar(_count) == rows
    byok.onboard("t2", LocalKms(customer_key))
    assert byok.tenants() == ["t1", "t2"]
    byok.close()
    with engine.connect() as connection:
        assert connection.scalar(_count) == 2  # the connection is the application's and stays open
    engine.dispose()


def test_a_failed_write_to_an_in_memory_keystore_leaves_nothing(customer_key: Path) -> None:
    """A refused onboarding is rolled back, so that the application's next commit does not take it along."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    byok = Byok(keystore=engine)
    with pytest.raises(KeystoreUnavailableError, match="create_keystore"):
        byok.onboard("t1", LocalKms(customer_key))
    byok.create_keystore()
    byok.onboard("t1", LocalKms(customer_key))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE byok_generation")
    with pytest.raises(KeystoreUnavailableError):
        byok.onboard("t2", LocalKms(customer_key))
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT tenant FROM byok_tenant").scalars().all() == ["t1"]
    byok.close()
    engine.dispose()


def test_a_keystore_in_memory_of_its_own(customer_key: Path) -> None:
    """Byok(keystore="sqlite://") works beside any data engine, and from several threads."""
    byok = Byok(keystore="sqlite://")
    byok.create_keystore()
    byok.onboard("t1", LocalKms(customer_key))
    with byok.tenant("t1"):
        assert byok.tenants() == ["t1"]
    byok.close()


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:"])
def test_in_memory_databases_that_cannot_be_shared(url: str) -> None:
    """A pool with a database a thread, and an asyncio one, are refused with what to do instead."""
    with pytest.raises(ConfigurationError, match="StaticPool"):
        Byok(keystore=create_engine("sqlite://"))
    with pytest.raises(ConfigurationError, match="give a file"):
        Byok(keystore=url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://127.0.0.1:9/x",
        "postgresql+asyncpg://127.0.0.1:9/x",
        "mariadb+pymysql://127.0.0.1:9/x",
        "mariadb+asyncmy://127.0.0.1:9/x",
        "sqlite:////nowhere/k.db",
        "sqlite+aiosqlite:////nowhere/k.db",
    ],
)
def test_a_database_that_is_not_there(url: str) -> None:
    """Whatever the driver raises is one error of ours; the driver's own, which can hold a password, is not chained."""
    byok = Byok(keystore=url)
    with pytest.raises(KeystoreUnavailableError, match="Is it reachable") as raised:
        byok.tenants()
    assert raised.value.__cause__ is raised.value.__context__ is None
    byok.close()


def test_a_server_without_that_database(sync_url: URL, async_url: URL) -> None:
    """asyncpg raises exceptions of its own where the server refuses the connection; they become ours too."""
    for url in (sync_url, async_url):
        byok = Byok(
            keystore=url.set(database="/nowhere/k.db" if "sqlite" in url.drivername else "byok_nowhere")
        )
        with pytest.raises(KeystoreUnavailableError):
            byok.tenants()
        byok.close()


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mariadb+pymysql", "mariadb+asyncmy"])
def test_a_server_that_never_answers_does_not_hold_up_statements(
    monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    """Connecting is bounded, whatever the driver's own idea of patience is."""
    name = driver.partition("+")[2]
    monkeypatch.setitem(database._GIVE_UP, name, dict.fromkeys(database._GIVE_UP[name], 0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        byok = Byok(keystore=f"{driver}://x@127.0.0.1:{silent.getsockname()[1]}/x")
        with pytest.raises(KeystoreUnavailableError):
            byok.tenants()
        byok.close()


def test_a_longer_patience_can_be_asked_for() -> None:
    """An option that the keystore's URL gives stays what it is."""
    given = make_url("postgresql+psycopg://h/x")
    assert database._options(given)["connect_args"]["connect_timeout"] == 5
    asked = database._options(given.set(query={"connect_timeout": "60"}))["connect_args"]
    assert "connect_timeout" not in asked
    assert "tcp_user_timeout" in asked


def test_a_closed_byok_can_be_used_again(async_url: URL, sync_url: URL, customer_key: Path) -> None:
    """Closing ends threads and connections; the next use opens new ones."""
    for url in (async_url, sync_url):
        byok = Byok(keystore=url)
        byok.create_keystore()
        byok.onboard("t1", LocalKms(customer_key))
        byok.close()
        byok.close()
        assert byok.tenants() == ["t1"]
        byok.close()
