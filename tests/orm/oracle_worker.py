"""A process that writes and searches as it is told, for the tests that compare its answers with plaintext's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from keys_tools import TurnableClock
from orm.oracle_forms import ENCRYPTED, TENANTS, Built, Query, Row
from sqlalchemy import URL, Engine, create_engine, delete, event, insert, update
from told_process import WAKE, ToldProcess

from sqla_byok import Byok, Encrypted, KeystoreUnavailableError, LocalKms, UnsupportedQueryError
from sqla_byok.crypto.formats import DATA_KEY, READABLE

SLEEPS = "sleeps"


def engine_of(url: URL) -> Engine:
    """An engine for which a commit costs little: nothing here has to survive a power cut."""
    if url.get_backend_name() == "postgresql":
        return create_engine(
            url, isolation_level="AUTOCOMMIT", connect_args={"options": "-c synchronous_commit=off"}
        )
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    return engine


class Answer(NamedTuple):
    """What a process says to a query.

    :ivar found: its rows; None where it was refused.
    :ivar refused: why.
    :ivar compares_columns: whether it compares two columns.
    :ivar live: how many salts this process searches with.
    """

    found: list[tuple[Any, ...]] | None
    refused: str | None
    compares_columns: bool
    live: int


class Worker:
    """What runs in a process. Its clock stands until it is turned; who lets a change settle says so, and serves on."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.byok: Byok
        self.engine: Engine
        self.clock: ToldClock

    def serve(self, until: object = None) -> None:
        """Do what the parent says, until it says ``until``."""
        while (told := self.pipe.recv()) != until:
            name, *arguments = told
            try:
                answer = getattr(self, name)(*arguments)
            except Exception as error:
                answer = error
            self.pipe.send(answer)

    # -- keys ---------------------------------------------------------------------------------------------------------

    def begin(self, url: URL) -> None:
        """Start anew, over a keystore in the same database as the rows."""
        self.clock = ToldClock(self)
        self.byok = Byok(keystore=url, clock=self.clock)
        self.engine = engine_of(url)
        self.byok.attach(self.engine)
        self.reads = self.byok._keystore.database.read

    def onboard(self, key: str) -> None:
        self.byok.create_keystore()
        for tenant in TENANTS:
            self.byok.onboard(tenant, LocalKms(key))

    def open(self) -> None:
        """Open the tenants and have noted what is written for them, which it could not do while it is cut off."""
        for tenant in TENANTS:
            with self.byok.session(tenant, self.engine) as session:
                for model in (ENCRYPTED.P, ENCRYPTED.V):
                    nothing = {c.key: None for c in model.__table__.c if isinstance(c.type, Encrypted)}
                    session.execute(insert(model).values(id=0, **nothing))
                    session.execute(delete(model).where(model.id == 0))

    def turn(self, seconds: float, looks: bool) -> None:
        """Time passes, and the keystore can be reached from here or not."""
        self.clock.turn(seconds)
        self.byok._keystore.database.read = self.reads if looks else _unreachable  # type: ignore[method-assign]
        for tenant in TENANTS if looks else ():
            with self.byok.tenant(tenant):
                pass

    def rotate(self, tenant: str, kind: str) -> int:
        return self.byok.rotate_data_key(tenant) if kind == DATA_KEY else self.byok.rotate_salt(tenant)

    def retire(self, tenant: str, kind: str, rows: list[Row]) -> int:
        """Write each row anew, as a job does, and take the old keys away. Gives how many."""
        row = self.byok._keystore.load(tenant)
        assert row is not None
        old = [each.generation for each in row.generations if each.kind == kind and each.state == READABLE]
        if old:
            self.byok._generations.settle()
            self.write(rows, "update")
        for generation in old:
            self.byok._generations.retire(tenant, kind, generation)
        return len(old)

    def end(self) -> None:
        self.byok.close()
        self.engine.dispose()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def insert(self, rows: list[Row]) -> None:
        for entity, org, some in grouped(rows):
            with self.byok.session(org, self.engine) as session:
                session.execute(insert(getattr(ENCRYPTED, entity)), [row.values for row in some])
                session.commit()

    def write(self, rows: list[Row], how: str) -> None:
        """Give rows that are there other values."""
        for entity, org, some in grouped(rows):
            model = getattr(ENCRYPTED, entity)
            with self.byok.session(org, self.engine) as session:
                for row in some:
                    mine = model.id == row.values["id"]
                    if how == "update":
                        session.execute(update(model).where(mine).values(row.values))
                    elif how == "replace":
                        session.execute(delete(model).where(mine))
                        session.execute(insert(model).values(row.values))
                    else:
                        entity = session.get_one(model, row.values["id"])
                        for name, value in row.values.items():
                            setattr(entity, name, value)
                session.commit()

    def ask(self, query: Query) -> Answer:
        with self.byok.session(query.tenant, self.engine) as session:
            built = Built(query, ENCRYPTED, session)
            found = refused = None
            try:
                found = built.rows()
            except UnsupportedQueryError as error:
                refused = str(error)
        live = len(self.byok._keyrings.get(query.tenant).live_salts)
        return Answer(found, refused, built.compares_columns, live)


class ToldClock(TurnableClock):
    """Has its process serve on while something settles; the parent turns it meanwhile."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker

    def sleep(self, seconds: float) -> None:
        self.worker.pipe.send((SLEEPS, seconds))
        self.worker.serve(until=WAKE)


def grouped(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """By entity and tenant."""

    def place(row: Row) -> tuple[str, str]:
        return row.entity, row.values["org"]

    for (entity, org), some in groupby(sorted(rows, key=place), place):
        yield entity, org, list(some)


def _unreachable(work: Callable[..., Any]) -> Any:
    raise KeystoreUnavailableError("cut off")


def _serve(pipe: Any) -> None:
    Worker(pipe).serve()


class Other(ToldProcess):
    """A process that is ended wherever it is."""

    patience = 120.0

    def __init__(self) -> None:
        super().__init__(_serve)

    def close(self) -> None:
        self.kill()
        self.pipe.close()
