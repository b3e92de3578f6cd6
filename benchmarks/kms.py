"""KMS calls and time for 1, 100 and 10,000 rows: envelope beside direct mode, with keys in memory and without.

The KMS is simulated: each call takes 20 ms, about what AWS KMS or an Azure vault takes within a region. How often it is
called is asserted, not only shown. Takes some two minutes, nearly all of it in the simulated KMS.
"""

from __future__ import annotations

import argparse
import base64
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from models import TENANT, Databases, urls, value
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, String, create_engine, delete, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, Encrypted, LocalKms
from sqla_byok.kms import Kms, Operator, Wrapped, providers

SIZES = (1, 100, 10_000)
LATENCY = 0.020
KEYSTORE_KEY = "BYOK_BENCH_KEYSTORE_KEY"


class Base(DeclarativeBase):
    pass


class Envelope(Base):
    __tablename__ = "bench_kms_envelope"
    id: Mapped[int] = mapped_column(primary_key=True)
    secret: Mapped[str] = mapped_column(Encrypted(String(40)))


class Direct(Base):
    __tablename__ = "bench_kms_direct"
    id: Mapped[int] = mapped_column(primary_key=True)
    secret: Mapped[str] = mapped_column(Encrypted(String(40), mode="direct"))


@dataclass(frozen=True)
class SlowKms(Kms):
    """A key file that takes as long to answer as a KMS, and counts its calls."""

    provider: ClassVar[str] = "slow"
    calls: ClassVar[int] = 0
    lock: ClassVar[threading.Lock] = threading.Lock()
    path: str
    profile: str = field(default="default", init=False)

    def config(self) -> dict[str, str]:
        return {"path": self.path}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> SlowKms:
        return cls(config["path"])

    def connect(
        self, settings: Mapping[str, Any], operator: Operator | None = None, *, reason: str = "open"
    ) -> SlowKms:
        return self

    def wrap(self, payload: bytes, *, tenant: str) -> Wrapped:
        self._answer()
        return LocalKms(self.path).connect({}).wrap(payload, tenant=tenant)

    def unwrap(self, wrapped: Wrapped, *, tenant: str) -> bytes:
        self._answer()
        return LocalKms(self.path).connect({}).unwrap(wrapped, tenant=tenant)

    def room(self, wrapped: Wrapped) -> int:
        return 4096

    def _answer(self) -> None:
        with self.lock:
            type(self).calls += 1
        time.sleep(LATENCY)


def measured(work: Callable[[], object]) -> tuple[int, float]:
    """KMS calls and seconds."""
    calls, start = SlowKms.calls, time.perf_counter()
    work()
    return SlowKms.calls - calls, time.perf_counter() - start


def measure(table: Table, byok: Byok, engine: Engine, model: type[Envelope | Direct], rows: int) -> None:
    """Write and read so many rows, with no keys in memory at first and then with them."""

    def write() -> None:
        with byok.session(TENANT, engine) as session:
            session.add_all(model(id=row, secret=value(row, "a")) for row in range(rows))
            session.commit()

    def read() -> None:
        with byok.session(TENANT, engine) as session:
            found = session.scalars(select(model).order_by(model.id)).all()
            assert [row.secret for row in found] == [value(row, "a") for row in range(rows)]

    for keys in ("cold", "warm"):
        with engine.begin() as connection:
            connection.execute(delete(model))
        figures = []
        for work in (write, read):
            if keys == "cold":
                byok.forget_keys()
            figures.append(measured(work))
        (wrote, write_seconds), (read_, read_seconds) = figures
        expected = (keys == "cold") + (rows if model is Direct else 0)
        assert (wrote, read_) == (expected, expected), f"{wrote} and {read_} KMS calls instead of {expected}"
        table.add_row(
            engine.dialect.name, model.__name__.lower(), f"{rows:,}", keys, f"{wrote:,}", f"{read_:,}",
            f"{write_seconds:.3f} s", f"{read_seconds:.3f} s",
            f"{write_seconds / rows * 1e6:,.0f} µs", f"{read_seconds / rows * 1e6:,.0f} µs",
        )  # fmt: skip
    table.add_section()


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    providers[SlowKms.provider] = SlowKms
    os.environ[KEYSTORE_KEY] = base64.b64encode(os.urandom(32)).decode()
    table = Table(
        "database", "mode", "rows", "keys", "calls to write", "… to read",
        "write", "read", "write, a row", "read, a row",
        title=f"KMS calls and time, one encrypted column, a KMS that answers in {LATENCY * 1000:.0f} ms",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    databases = Databases()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = urls(Path(folder), databases)
            byok = Byok(keystore=f"sqlite:///{folder}/keystore.db", keystore_key=f"env:{KEYSTORE_KEY}")
            byok.create_keystore()
            # longer than the run, so that no refresh is counted
            byok.onboard(TENANT, SlowKms(LocalKms.create(Path(folder) / "key").path), revoke_within=3_600)
            for kind in ("sqlite", "postgresql"):
                if kind not in found:
                    continue
                engine = create_engine(found[kind])
                byok.attach(engine)
                Base.metadata.create_all(engine)
                for model in (Envelope, Direct):
                    for rows in SIZES:
                        # Once is enough where the time is the KMS's: 10,000 calls, eight at a time, take 25 seconds.
                        if model is Envelope or rows < SIZES[-1] or kind == "sqlite":
                            measure(table, byok, engine, model, rows)
                engine.dispose()
            byok.close()
    finally:
        databases.close()
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
