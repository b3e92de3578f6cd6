"""How the keystore reaches its database: a small pool of its own, beside the application's."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.pool import PoolProxiedConnection, SingletonThreadPool

from sqla_byok.errors import ConfigurationError, KeystoreUnavailableError, MissingExtraError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Database", "open_database"]

T = TypeVar("T")
Work = Callable[[Connection], T]

# Two connections of the keystore's own, so that a request that holds a data connection never waits for a second
# one from the same pool. A server that does not answer must not hold up statements for longer than this (seconds).
_PATIENCE = 5
_POOL: dict[str, Any] = {
    "pool_size": 2,
    "max_overflow": 0,
    "pool_timeout": _PATIENCE,
    "pool_pre_ping": True,
    "hide_parameters": True,
}

# What each driver has for giving up a server that does not answer, be it on connecting or later.
_GIVE_UP: dict[str, dict[str, int]] = {
    "psycopg": {"connect_timeout": _PATIENCE, "tcp_user_timeout": _PATIENCE * 1000},
    "psycopg2": {"connect_timeout": _PATIENCE, "tcp_user_timeout": _PATIENCE * 1000},
    "asyncpg": {"timeout": _PATIENCE, "command_timeout": _PATIENCE},
    "pymysql": {"connect_timeout": _PATIENCE, "read_timeout": _PATIENCE},
    "mysqldb": {"connect_timeout": _PATIENCE, "read_timeout": _PATIENCE},
    "aiomysql": {"connect_timeout": _PATIENCE},
    "asyncmy": {"connect_timeout": _PATIENCE, "read_timeout": _PATIENCE},
}

_NO_ANSWER = (SQLAlchemyError, OSError, asyncio.TimeoutError, concurrent.futures.CancelledError)


def _options(url: URL) -> dict[str, Any]:
    limits = _GIVE_UP.get(url.get_driver_name(), {})
    return {**_POOL, "connect_args": {name: limit for name, limit in limits.items() if name not in url.query}}


def _limited(connection: Connection, work: Work[T]) -> T:
    """Do the work, and let PostgreSQL give up on it when a lock is in its way. For this transaction only: behind a
    pooler, the next one on the connection may be another program's."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_PATIENCE * 1000:d}")
    return work(connection)


def _answer(ask: Callable[[], T]) -> T:
    """Call ``ask``, and make whatever the database or its driver raises one error of ours."""
    try:
        return ask()
    except IntegrityError:
        raise
    except Exception as error:
        # asyncpg's own exceptions come through SQLAlchemy as they are where connecting fails.
        if not isinstance(error, _NO_ANSWER) and not type(error).__module__.startswith("asyncpg."):
            raise
        reason = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    # Out here, nothing is chained to it: a driver's exception can hold the connection's password.
    raise KeystoreUnavailableError(
        f"the keystore's database failed: {reason}. Is it reachable, and was create_keystore() run?"
    )


class Database:
    """Runs functions of a :class:`~sqlalchemy.Connection` against the keystore's database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read(self, work: Work[T]) -> T:
        """Run ``work`` and leave no transaction behind."""
        return self._run(work, commit=False)

    def write(self, work: Work[T]) -> T:
        """Run ``work`` in a transaction of its own."""
        return self._run(work, commit=True)

    def _run(self, work: Work[T], *, commit: bool) -> T:
        def run() -> T:
            with self._engine.begin() if commit else self._engine.connect() as connection:
                return _limited(connection, work)

        return _answer(run)

    def after_fork(self) -> None:
        """Forget the parent process's connections without closing them."""
        self._engine.dispose(close=False)

    def close(self) -> None:
        """Close the pool."""
        self._engine.dispose()


def _async_engine(url: URL) -> AsyncEngine:
    try:
        from sqlalchemy.ext.asyncio import create_async_engine
    except ImportError as error:
        raise MissingExtraError(
            'an asyncio driver needs greenlet: pip install "sqlalchemy[asyncio]"'
        ) from error
    return create_async_engine(url, **_options(url))


class _AsyncDatabase(Database):
    """The same over an asyncio driver: the engine lives in an event loop of its own, in a thread of its own."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._async_engine = _async_engine(self._url)

    def _run(self, work: Work[T], *, commit: bool) -> T:
        async def run() -> T:
            opened = self._async_engine.begin() if commit else self._async_engine.connect()
            async with opened as connection:
                return await connection.run_sync(_limited, work)

        return _answer(lambda: self._submit(run()).result())

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._thread is None:
                started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
                self._thread = threading.Thread(
                    target=lambda: asyncio.run(self._serve(started)), name="byok-keystore", daemon=True
                )
                self._thread.start()
                self._loop = started.result()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _serve(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        self._closing = asyncio.Event()
        started.set_result(asyncio.get_running_loop())
        await self._closing.wait()
        await self._async_engine.dispose()

    def after_fork(self) -> None:
        if self._thread is not None:
            _inherited.append((self._async_engine, self._loop))
        self._start()

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._loop.call_soon_threadsafe(self._closing.set)
        if thread is not None:
            thread.join()


# A forked process keeps its parent's connections and event loops here and never touches them: closing one would
# take it out of the selector that the parent still waits on.
_inherited: list[object] = []


class _SharedConnection(Database):
    """The keystore inside the application's in-memory SQLite database, which is one DBAPI connection.

    That connection may hold the application's open transaction. Reading neither commits nor rolls back; writing is
    refused while a transaction is open.
    """

    def __init__(self, engine: Engine, *, owned: bool = False) -> None:
        self._owned = owned
        # Kept checked out: giving it back to the pool would roll back whatever the application has open.
        self._held: PoolProxiedConnection = engine.raw_connection()
        dbapi: Any = self._held.dbapi_connection
        self._dbapi = dbapi
        own = create_engine(
            "sqlite://", creator=lambda: dbapi, poolclass=StaticPool, pool_reset_on_return=None
        )
        # An engine of ours alone: its connections end without touching the transaction.
        own.dialect.do_rollback = self._nothing  # type: ignore[method-assign]
        own.dialect.do_commit = self._nothing  # type: ignore[method-assign]
        own.hide_parameters = True
        self._lock = threading.RLock()
        super().__init__(own)

    def _run(self, work: Work[T], *, commit: bool) -> T:
        with self._lock:
            if not commit:
                return super()._run(work, commit=False)
            if self._dbapi.in_transaction:
                raise ConfigurationError(
                    "a transaction is open on the in-memory database that also holds the keystore; "
                    "commit or roll it back before you change keys"
                )
            try:
                result = super()._run(work, commit=True)
            except BaseException:
                self._dbapi.rollback()
                raise
            self._dbapi.commit()
            return result

    @staticmethod
    def _nothing(dbapi_connection: Any) -> None:
        """Neither commit nor roll back."""

    def after_fork(self) -> None:
        # The database is copied with the process; a thread that held the lock is not.
        self._lock = threading.RLock()

    def close(self) -> None:
        """An application's connection stays open."""
        if self._owned and self._held.is_valid:
            self._held.invalidate()


def open_database(target: str | URL | Engine | AsyncEngine) -> Database:
    """Open the keystore's database.

    :param target: a database URL, or an engine whose URL is used. From an in-memory SQLite engine the connection
        itself is shared, since there is no other way to its tables.
    :raises ConfigurationError: for an in-memory database that cannot be shared.
    """
    if not isinstance(target, str | URL | Engine):
        target = target.sync_engine
    url = target.url if isinstance(target, Engine) else make_url(target)
    sqlite, is_async = url.get_backend_name() == "sqlite", url.get_dialect().is_async
    if not (sqlite and url.database in (None, "", ":memory:")):
        if sqlite:
            # A file is read in a thread either way; aiosqlite would bring one of its own for each connection.
            url = url.set(drivername="sqlite")
        elif is_async:
            return _AsyncDatabase(url)
        return Database(create_engine(url, **_options(url)))
    if is_async:
        raise ConfigurationError(
            "an in-memory SQLite database behind an asyncio driver cannot hold the keystore; give a file, "
            "or Byok(keystore='sqlite://')"
        )
    if not isinstance(target, Engine):
        engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
        return _SharedConnection(engine, owned=True)
    if isinstance(target.pool, SingletonThreadPool):
        raise ConfigurationError(
            "this in-memory SQLite engine gives each thread a database of its own; create it with "
            "create_engine('sqlite://', poolclass=StaticPool, connect_args={'check_same_thread': False})"
        )
    return _SharedConnection(target)
