"""What the tests stand on: where a database server is looked for, what is left behind, and the watch over async."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import databases
import pytest
from blockbuster import BlockingError
from databases import Database, Databases, NotFoundError, Server, find
from sqlalchemy import URL, Engine, create_engine, inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

import sqla_byok

HERE = Path(__file__).parent
SERVERS = ("postgresql", "mariadb")


class Answering:
    """A fake `probe`: only the given hosts (or sockets) and users let anyone in."""

    def __init__(self, *accepted: tuple[str, str]) -> None:
        self.accepted = accepted
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, url: URL) -> None:
        where = url.host or url.query.get("host") or url.query.get("unix_socket")
        self.asked.append((str(where), url.username))
        if (where, url.username) not in self.accepted:
            raise NotFoundError("connection refused")


def source(name: str, calls: list[str], *, has: bool) -> Callable[[str], Server]:
    """A fake source that notes that it was asked."""

    def fake(kind: str) -> Server:
        calls.append(name)
        if not has:
            raise NotFoundError("nothing here")
        return Server(kind, make_url(f"{kind}://{name}/"))

    fake.__name__ = name
    return fake


def test_the_order_of_the_sources() -> None:
    """A server that someone names or runs already wins over one that would have to be started."""
    assert [each.__name__ for each in databases.SOURCES] == [
        "from_environment",
        "from_this_machine",
        "from_docker",
        "from_package",
    ]


def test_the_first_server_is_taken_and_no_further_source_asked() -> None:
    """Nothing is started while a running server answers."""
    calls: list[str] = []
    sources = [source("a", calls, has=False), source("b", calls, has=True), source("c", calls, has=True)]
    assert find("mariadb", sources).url.host == "b"
    assert calls == ["a", "b"]


def test_without_a_server_the_reason_says_what_to_do() -> None:
    """Whoever reads a skip learns how to get the test to run, and what each source said."""
    with pytest.raises(NotFoundError) as caught:
        find("postgresql", [source("a", [], has=False)])
    assert "no PostgreSQL server. Set BYOK_TEST_POSTGRESQL_URL" in str(caught.value)
    assert "a: nothing here" in str(caught.value)


def test_the_environments_url_is_taken_with_our_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any driver, or none, may stand in the variable."""
    monkeypatch.setattr(databases, "probe", Answering(("db.example", "me")))
    server = databases.from_environment(
        "postgresql", {"BYOK_TEST_POSTGRESQL_URL": "postgresql://me:pw@db.example/x"}
    )
    assert server.url == make_url("postgresql+psycopg://me:pw@db.example/x")


def test_an_environments_url_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing mistake in the variable does not quietly run the tests elsewhere."""
    monkeypatch.setattr(databases, "probe", Answering())
    monkeypatch.setenv("BYOK_TEST_MARIADB_URL", "mariadb://me@db.example")
    with pytest.raises(RuntimeError, match="BYOK_TEST_MARIADB_URL is set"):
        find("mariadb")


@pytest.mark.parametrize(
    ("kind", "socket"), [("postgresql", "/var/run/postgresql"), ("mariadb", "/run/mysqld/mysqld.sock")]
)
def test_this_machine_is_tried_by_the_usual_users(
    kind: str, socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A developer's own server is found whether it trusts an administrator, their name or a socket."""
    administrator = {"postgresql": "postgres", "mariadb": "root"}[kind]
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    probe = Answering((socket, "ada"))
    monkeypatch.setattr(databases, "probe", probe)
    assert databases.from_this_machine(kind).url.username == "ada"
    assert probe.asked == [("127.0.0.1", administrator), ("127.0.0.1", "ada"), (socket, "ada")]


def test_a_machine_without_a_docker_engine_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Constructing a container raises where there is no engine; the search must go on."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    for kind in SERVERS:
        with pytest.raises(NotFoundError, match="no Docker engine"):
            databases.from_docker(kind)


def test_the_package_has_only_postgresql() -> None:
    """No attempt is made to get a MariaDB out of it."""
    with pytest.raises(NotFoundError):
        databases.from_package("mariadb")


def test_a_missing_server_is_looked_for_once() -> None:
    """A hundred tests that are skipped for one missing server do not cost a hundred searches."""
    calls: list[str] = []
    run = Databases([source("a", calls, has=False)])
    for _ in range(3):
        with pytest.raises(NotFoundError):
            run.get("mariadb")
    assert calls == ["a"]


def test_a_server_that_was_started_is_stopped_even_if_no_database_can_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No container outlives the run that started it."""
    stopped: list[str] = []

    def started(kind: str) -> Server:
        return Server(kind, make_url(f"{kind}://h/"), lambda: stopped.append(kind))

    def refuse(_server: Server) -> Database:
        raise PermissionError

    monkeypatch.setattr(databases, "Database", refuse)
    run = Databases([started])
    with pytest.raises(PermissionError):
        run.get("mariadb")
    run.close()
    assert stopped == ["mariadb"]


def own(kind: str, request: pytest.FixtureRequest) -> Database:
    """A database beside the run's own, to be dropped by the caller."""
    run: Databases = request.getfixturevalue("databases")
    try:
        server = run.get(kind).server
    except NotFoundError as error:
        if request.config.getoption("--require-all"):
            raise
        pytest.skip(str(error))
    return Database(server)


@pytest.mark.parametrize("kind", SERVERS)
def test_emptying_ends_a_forgotten_transaction_and_says_so(kind: str, request: pytest.FixtureRequest) -> None:
    """A test that leaves a lock behind fails itself, and neither hangs the run nor spoils the next test."""
    database = own(kind, request)
    engine = create_engine(database.url)
    try:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE t (a INT)"))
        forgotten = engine.connect()
        forgotten.execute(text("SELECT * FROM t"))
        with pytest.raises(AssertionError, match="left a transaction open"):
            database.empty()
        with contextlib.suppress(Exception):  # its connection was ended
            forgotten.close()
        engine.dispose()
        assert inspect(engine).get_table_names() == []
    finally:
        engine.dispose()
        database.drop()


@pytest.mark.parametrize("kind", SERVERS)
def test_dropping_does_not_wait_for_open_connections(kind: str, request: pytest.FixtureRequest) -> None:
    """An engine that nobody disposed does not keep the database alive."""
    database = own(kind, request)
    engine = create_engine(database.url)
    connection = engine.connect()
    connection.execute(text("SELECT 1"))
    database.drop()
    with contextlib.suppress(Exception):
        connection.close()
    engine.dispose()
    with pytest.raises(NotFoundError):
        databases.probe(database.url)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_drops_its_database(
    number: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Ctrl-C and a cancelled CI job leave nothing on a shared server."""
    server = own("postgresql", request)
    server.drop()
    (tmp_path / "test_slow.py").write_text(
        "import sys, time\n"
        "def test_slow(databases):\n"
        "    print(databases.get('postgresql').name, file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
    )
    settings = str(HERE.parent / "pyproject.toml")
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "-s",
            "-c",
            settings,
            "-p",
            "conftest",
            str(tmp_path / "test_slow.py"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # Where a shell runs the tests in the background, it has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={
            **os.environ,
            "PYTHONPATH": str(HERE),
            "BYOK_TEST_POSTGRESQL_URL": server.server.url.render_as_string(hide_password=False),
        },
    ) as run:
        assert run.stderr is not None
        name = run.stderr.readline().strip()
        assert name.startswith("byok_test_")
        run.send_signal(number)
        run.communicate(timeout=30)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    with pytest.raises(NotFoundError):
        databases.probe(server.url.set(database=name))


def test_each_test_gets_an_empty_database(engine: Engine) -> None:
    """Run twice, below too: a table that one test makes is not there for the next."""
    assert inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (a INT)"))


test_each_test_gets_an_empty_database_again = test_each_test_gets_an_empty_database


async def test_the_async_engine_reaches_the_same_kinds(async_engine: AsyncEngine) -> None:
    """Every async driver connects, and finds none of the sync tests' tables."""
    async with async_engine.begin() as connection:
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == []
        await connection.execute(text("CREATE TABLE t (a INT)"))


def as_if_ours(source: str) -> dict[str, Any]:
    """The names that the source defines, as a module in sqla_byok would."""
    names: dict[str, Any] = {}
    exec(compile(source, str(Path(sqla_byok.__file__).with_name("ours.py")), "exec"), names)  # noqa: S102 - see above
    return names


async def test_a_blocking_call_of_ours_is_caught() -> None:
    """The watch is on: a library that stalls its users' event loop does not pass."""
    ours = as_if_ours("import time\ndef stall(): time.sleep(0)\n")
    with pytest.raises(BlockingError):
        ours["stall"]()


async def test_connecting_is_not_taken_for_a_blocking_call(async_url: URL) -> None:
    """What drivers do on the event loop when they connect is not held against us."""
    ours = as_if_ours(
        "from sqlalchemy.ext.asyncio import create_async_engine\n"
        "async def connect(url):\n"
        "    engine = create_async_engine(url)\n"
        "    async with engine.begin() as connection:\n"
        "        await connection.exec_driver_sql('CREATE TABLE t (a INT)')\n"
        "        await connection.exec_driver_sql('SELECT * FROM t')\n"
        "    await engine.dispose()\n"
    )
    await ours["connect"](async_url)
