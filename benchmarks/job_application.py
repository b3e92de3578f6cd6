"""The application over whose table jobs are measured: what their workers import."""

from __future__ import annotations

import os
import time
from typing import Any

from sqlalchemy import String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_byok import Byok, Encrypted


class Base(DeclarativeBase):
    pass


class Patient(Base):
    __tablename__ = "job_patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    mrn: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True))
    note: Mapped[str] = mapped_column(Encrypted(String(40)))


class Clock:
    """Does not wait until a change has settled, which is not what is measured."""

    def __init__(self) -> None:
        self._turned = 0.0

    def boot(self) -> float:
        return time.monotonic() + self._turned

    def wall(self) -> float:
        return time.time() + self._turned

    def sleep(self, seconds: float) -> None:
        self._turned += seconds


byok: Any = None
engine: Any = None


def open_in(folder: str) -> None:
    """Open the database, with the keystore in a folder."""
    global byok, engine
    engine = create_engine(os.environ["BENCH_JOBS_DATABASE"])
    byok = Byok(f"sqlite:///{folder}/keystore.db", clock=Clock())
    byok.attach(engine)


if "BENCH_JOBS_FOLDER" in os.environ:
    open_in(os.environ["BENCH_JOBS_FOLDER"])
