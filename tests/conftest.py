"""Fixtures for databases, and the watch over blocking calls in async tests."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx
from databases import ASYNC, KINDS, SYNC, Database, Databases, NotFoundError
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

pytest_plugins = ["kms_server", "azure_fixtures", "byok_fixtures", "canary"]

# (file, function): where a driver does what blockbuster takes for blocking, and why that is no fault of ours.
MAY_BLOCK = [
    # asyncpg looks for a password file and certificates in the home folder, on the event loop, at every connect
    ("asyncpg/connect_utils.py", "_parse_connect_dsn_and_args"),
    # makes the path of an SQLite file absolute, which asks for the working directory and reads no disk
    ("sqlalchemy/dialects/sqlite/pysqlite.py", "create_connect_args"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-all",
        action="store_true",
        help="a database server that cannot be had fails its tests instead of skipping them",
    )
    parser.addoption(
        "--kms",
        choices=("local", "clouds"),
        default="local",
        help="whose keys the tenants of the fixtures have: files', or AWS KMS's (t1) and Azure Key Vault's (t2)",
    )
    parser.addoption(
        "--deep",
        action="store_true",
        help="twenty times as many random examples in the tests that search for faults",
    )
    parser.addoption(
        "--comparisons",
        type=int,
        help="how many answers of two processes are compared with plaintext's, on each database, while keys rotate",
    )
    parser.addoption(
        "--oracle-seed",
        type=int,
        help="what these comparisons begin with, to repeat a round that failed",
    )
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write the SQL of tests/orm/snapshots.txt and the tables of docs/queries.md anew",
    )


def pytest_configure() -> None:
    # SIGTERM, as a cancelled CI job gets it, ends the run as Ctrl-C does: with the databases dropped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    databases = Databases()
    yield databases
    databases.close()


@pytest.fixture
def clean() -> Iterator[list[Database]]:
    """The shared databases that this test has used; each is emptied after it."""
    used: list[Database] = []
    yield used
    for database in used:
        database.empty()


def _url(kind: str, drivers: dict[str, str], request: pytest.FixtureRequest) -> URL:
    if kind == "sqlite":
        folder: Path = request.getfixturevalue("tmp_path")
        return URL.create(drivers[kind], database=str(folder / "test.db"))
    databases: Databases = request.getfixturevalue("databases")
    try:
        database = databases.get(kind)
    except NotFoundError as error:
        if request.config.getoption("--require-all"):
            pytest.fail(f"--require-all: {error}", pytrace=False)
        pytest.skip(str(error))
    used: list[Database] = request.getfixturevalue("clean")
    if database not in used:
        used.append(database)
    return database.url.set(drivername=drivers[kind])


@pytest.fixture(params=KINDS)
def sync_url(request: pytest.FixtureRequest, clean: list[Database]) -> URL:
    """A database with no tables, for a sync driver."""
    return _url(request.param, SYNC, request)


@pytest.fixture(params=KINDS)
def async_url(request: pytest.FixtureRequest, clean: list[Database]) -> URL:
    """A database with no tables, for an async driver."""
    return _url(request.param, ASYNC, request)


@pytest.fixture
def engine(sync_url: URL) -> Iterator[Engine]:
    engine = create_engine(sync_url)
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(async_url: URL) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(async_url)
    yield engine
    await engine.dispose()


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """In an async test, a blocking call that sqla_byok makes on the event loop raises BlockingError."""
    if request.node.get_closest_marker("asyncio") is None:
        yield
        return
    with blockbuster_ctx("sqla_byok") as watch:
        for function in watch.functions.values():
            for file, name in MAY_BLOCK:
                function.can_block_in(file, name)
        yield
