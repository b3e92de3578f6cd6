"""What the tests of keys and time need: a clock to turn, a KMS that counts, and a hand in the keystore."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from databases import SYNC
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    make_url,
    select,
    update,
)

from sqla_byok import Byok, Encrypted, LocalKms, keystore_metadata
from sqla_byok.crypto.formats import (
    ACTIVE,
    DATA_KEY,
    READABLE,
    Record,
    TenantKey,
    new_key,
    row_tag,
    unpack_tenant_key,
)
from sqla_byok.kms import Kms, Operator, Wrapped, describe

KEYSTORE_KEY = bytes(range(32))


class TurnableClock:
    """A clock for Byok(clock=…) that stands until it is turned."""

    def __init__(self) -> None:
        self.boot_now, self.wall_now = 1000.0, 1_700_000_000.0

    def boot(self) -> float:
        return self.boot_now

    def wall(self) -> float:
        return self.wall_now

    def sleep(self, seconds: float) -> None:
        self.turn(seconds)

    def turn(self, seconds: float) -> None:
        self.boot_now += seconds
        self.wall_now += seconds


class StagedClock(TurnableClock):
    """Does something once, when part of the next sleep is over."""

    def __init__(self) -> None:
        super().__init__()
        self.after = 0.0
        self.meanwhile: Callable[[], object] | None = None

    def sleep(self, seconds: float) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        self.turn(seconds * self.after)
        if meanwhile is not None:
            meanwhile()
        self.turn(seconds * (1 - self.after))


@dataclass(frozen=True)
class CountingKms(Kms):
    """A LocalKms that counts its calls and can be made to fail or to wait."""

    provider: ClassVar[str] = "counting"
    unwraps: ClassVar[list[str]] = []
    on_unwrap: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    lock: ClassVar[threading.Lock] = threading.Lock()
    path: str
    profile: str = field(default="default", init=False)

    def config(self) -> dict[str, str]:
        return {"path": self.path}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> CountingKms:
        return cls(config["path"])

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> CountingKms:
        return self

    def room(self, wrapped: Wrapped) -> int:
        return 4096

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        return LocalKms(self.path).connect({}).wrap(payload, tenant=tenant)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        with self.lock:
            self.unwraps.append(tenant)
        type(self).on_unwrap()
        return LocalKms(self.path).connect({}).unwrap(wrapped, tenant=tenant)


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not come"


def in_child(work: Callable[[], None], started: Callable[[int], object] = lambda pid: None) -> int:
    """Run in a forked child and give its exit status; a child that hangs is ended by its own alarm.

    :param started: is told the child's process id.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    started(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def table(name: str) -> Table:
    """One of the keystore's tables: "tenant", "wrapping", "generation" or "format"."""
    return keystore_metadata.tables[f"byok_{name}"]


def hand_in(url: str | URL) -> Engine:
    """An engine on the keystore's database, as somebody has who may write there."""
    given = make_url(url)
    return create_engine(given.set(drivername=SYNC[given.get_backend_name()]))


def publish_data_key(
    engine: Engine, tenant: str, keystore_key: bytes | None = None, settings: Mapping[str, Any] | None = None
) -> bytes:
    """Publish and activate a new generation of the data key, as another process would. Gives its key id."""
    tenants, wrappings, generations = table("tenant"), table("wrapping"), table("generation")
    with engine.begin() as connection:
        row = connection.execute(select(tenants).where(tenants.c.tenant == tenant)).one()
        wrapping = connection.execute(select(wrappings).where(wrappings.c.tenant == tenant)).one()
        kms = describe(wrapping.provider, json.loads(wrapping.config))
        payload = kms.connect(settings or {}).unwrap(
            Wrapped(wrapping.wrapped, wrapping.kms_key_version), tenant=tenant
        )
        secret = unpack_tenant_key(payload, tenant, row.tenant_key_generation)
        tenant_key = TenantKey(secret, tenant, row.tenant_key_generation)
        mine = generations.c.tenant == tenant
        newest = connection.scalars(
            select(generations.c.generation)
            .where(mine, generations.c.kind == DATA_KEY)
            .order_by(generations.c.generation.desc())
        ).first()
        assert newest is not None
        connection.execute(
            update(generations).where(mine, generations.c.kind == DATA_KEY).values(state=READABLE)
        )
        key_id, sealed = tenant_key.seal(DATA_KEY, newest + 1, new_key())
        connection.execute(
            insert(generations).values(
                tenant=tenant, kind=DATA_KEY, generation=newest + 1, id=key_id, sealed=sealed, state=ACTIVE
            )
        )
        records = [
            Record(r.kind, r.generation, r.id, r.state)
            for r in connection.execute(select(generations).where(mine))
        ]
        kept = connection.scalar(
            select(table("searchable").c.content).where(table("searchable").c.tenant == tenant)
        )
        tag = tenant_key.manifest_tag(row.epoch + 1, records, kept or "")
        connection.execute(
            update(tenants).where(tenants.c.tenant == tenant).values(epoch=row.epoch + 1, manifest_tag=tag)
        )
        if keystore_key is not None:
            mac = row_tag(
                keystore_key,
                tenant=tenant,
                provider=wrapping.provider,
                config=wrapping.config.encode(),
                wrapped=wrapping.wrapped,
                kms_key_version=wrapping.kms_key_version,
                revoke_within_ms=row.revoke_within_ms,
                outage_grace_ms=row.outage_grace_ms,
                tk_id=row.tenant_key_id,
                tk_generation=row.tenant_key_generation,
                epoch=row.epoch + 1,
                manifest_tag=tag,
            )
            connection.execute(update(wrappings).where(wrappings.c.tenant == tenant).values(row_tag=mac))
    return key_id


_metadata = MetaData()
patient = Table(
    "patient",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Encrypted(String(50))),
)
insert_patient = insert(patient)
names = select(patient.c.name).order_by(patient.c.id)


class World:
    """A Byok with a clock to turn, a keystore to reach into, and a data engine."""

    def __init__(self, folder: Path, kms: CountingKms, keystore_key: str | None, **options: Any) -> None:
        self.kms, self.clock, self.folder = kms, TurnableClock(), folder
        url = f"sqlite:///{folder / 'keystore.db'}"
        self._of_another = {"keystore": url, "keystore_key": keystore_key, "clock": self.clock}
        self.byok = Byok(**self._of_another, **options)
        self.byok.create_keystore()
        self.hand = hand_in(url)
        self.engine = create_engine(f"sqlite:///{folder / 'data.db'}")
        _metadata.create_all(self.engine)
        self.byok.attach(self.engine)
        for tenant in ("t1", "t2", "t3"):
            self.byok.onboard(tenant, kms)
        kms.unwraps.clear()

    def another(self) -> Byok:
        """Another process's Byok, as it were."""
        return Byok(**self._of_another)

    @property
    def calls(self) -> list[str]:
        """The tenants for whom the KMS was asked, in order."""
        return self.kms.unwraps

    def open(self, tenant: str = "t1") -> None:
        with self.byok.tenant(tenant):
            pass

    def write(self, *names: str, tenant: str = "t1") -> None:
        with self.engine.execution_options(byok_tenant=tenant).begin() as connection:
            connection.execute(insert(patient), [{"name": name} for name in names])

    def read(self, tenant: str = "t1") -> list[Any]:
        with self.connect(tenant) as connection:
            return list(connection.scalars(names))

    def connect(self, tenant: str = "t1") -> Connection:
        return self.engine.execution_options(byok_tenant=tenant).connect()

    def alter(self, name: str, **values: Any) -> None:
        with self.hand.begin() as connection:
            connection.execute(update(table(name)).where(table(name).c.tenant == "t1").values(values))

    def close(self) -> None:
        self.byok.close()
        self.hand.dispose()
        self.engine.dispose()
