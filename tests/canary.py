"""Plants secrets, and looks for them in whatever an exception, a traceback or a log record shows."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import pickle
import random
import secrets
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from typing import Any

import pytest
from sqlalchemy import JSON, Date, Enum, Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from sqla_byok import Encrypted
from sqla_byok.crypto.formats import value_key
from sqla_byok.crypto.hashes import Scope, derive_column_salt

CANARY = "Zk7canary4Wq9Xd"
"""A value that stands nowhere else: letters and digits only, so that no quoting changes it."""

_SHOWN_EARLIER = ("__traceback__", "__cause__", "__context__", "__doc__", "__module__", "__weakref__")


def picky(text: str) -> str:
    """A normalizer of a user's, which tells what it does not like."""
    if text.startswith("unkind"):
        raise ValueError(f"cannot normalize {text}")
    return text.casefold()


class Picky(TypeDecorator[str]):
    """A type of a user's, which tells what it does not like."""

    impl = String(60)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        if value is not None and value.startswith("unwritable"):
            raise ValueError(f"cannot write {value}")
        return value

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        if value is not None and value.startswith("unreadable"):
            raise ValueError(f"cannot read {value}")
        return value


class Base(DeclarativeBase):
    """The models of the leak tests."""


class Patient(Base):
    """Has an encrypted column of each kind that can fail, and plain ones whose failures must not tell on the others."""

    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int | None]
    day: Mapped[date | None] = mapped_column(Date)
    name: Mapped[str] = mapped_column(Encrypted(String(60)))
    mrn: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True), unique=True)
    email: Mapped[str | None] = mapped_column(Encrypted(String(60), searchable=True, normalize=picky))
    code: Mapped[str | None] = mapped_column(Encrypted(Picky(), searchable=True))
    kind: Mapped[str | None] = mapped_column(Encrypted(Enum("new", "old", name="kind"), searchable=True))
    age: Mapped[int | None] = mapped_column(Encrypted(Integer, searchable=True))
    findings: Mapped[Any] = mapped_column(Encrypted(JSON), nullable=True)


class Needles:
    """Finds secrets in text: as they are, in hex, in base64 also within longer data, and as a bytes literal."""

    def __init__(self, *found_by_name: tuple[str, str | bytes]) -> None:
        self._forms: dict[str, str] = {}
        for name, secret in found_by_name:
            self.add(name, secret)

    def add(self, name: str, secret: str | bytes) -> None:
        """Look for this one too."""
        data = secret.encode() if isinstance(secret, str) else secret
        forms = {data.decode("latin-1"), data.hex(), repr(data)[2:-1]}
        for before in range(3):  # base64 has three ways to write data that stands within other data
            text = base64.b64encode(b"\0" * before + data).decode()
            inner = text[(before * 8 + 5) // 6 : (before + len(data)) * 8 // 6]
            forms |= {inner, inner.replace("+", "-").replace("/", "_")}
        # Case is ignored: a normalizer may have changed it, and no other text comes near.
        self._forms.update({form.casefold(): name for form in forms})

    def within(self, where: str, text: str) -> list[str]:
        """What is found in the text, and where."""
        folded = text.casefold()
        return sorted({f"{name} in {where}" for form, name in self._forms.items() if form in folded})


def chain(error: BaseException) -> list[BaseException]:
    """The exception and all that it brings along: causes, contexts, originals, arguments, members of groups."""
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and not any(each is known for known in found):
            found.append(each)
            waiting += [each.__cause__, each.__context__, getattr(each, "orig", None)]
            waiting += [*each.args, *getattr(each, "exceptions", ())]
    return found


def shown_by(error: BaseException) -> Iterator[tuple[str, str]]:
    """Everything that a log, a debugger's summary or a task queue could show of an exception, and where it stands."""
    yield "the traceback", "".join(traceback.format_exception(error))
    for each in chain(error):
        name = type(each).__name__
        yield f"str({name})", str(each)
        yield f"repr({name})", repr(each)
        # Not only __dict__: a driver's or codec's exception keeps its input in slots of its own (.object, .doc, .diag).
        for attribute in sorted({*dir(each), *getattr(each, "__dict__", {})}.difference(_SHOWN_EARLIER)):
            value = _readable(each, attribute)
            if not callable(value):
                yield f"{name}.{attribute}", _text(value)
    for each in chain(error):  # at the end: psycopg's exceptions lose what they hold when they are pickled
        pickled = b""
        with suppress(Exception):
            pickled = pickle.dumps(each)
        yield f"the pickled {type(each).__name__}", pickled.decode("latin-1")


def _readable(holder: Any, attribute: str) -> Any:
    with suppress(Exception):
        return getattr(holder, attribute)
    return None


def _text(value: Any) -> str:
    parts = [repr(value)]
    if isinstance(value, (bytearray, memoryview)):
        parts.append(repr(bytes(value)))
    if type(value).__module__.startswith("psycopg"):  # .diag, whose repr shows nothing of what it has
        parts += [repr(_readable(value, name)) for name in dir(value) if not name.startswith("_")]
    return "\n".join(parts)


class Log(logging.Handler):
    """Gathers what log records show, at once: their arguments may change later."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.shown: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        where = f"a record of {record.name} at {record.levelname}"
        self.shown.append((where, self.format(record)))
        self.shown.append(
            (where, repr({name: value for name, value in vars(record).items() if name != "exc_info"}))
        )
        if record.exc_info and record.exc_info[1] is not None:
            self.shown += [(f"{where}, {place}", text) for place, text in shown_by(record.exc_info[1])]

    @classmethod
    @contextmanager
    def of_everything(cls) -> Iterator[Log]:
        """Listen to all loggers, at DEBUG, while the block runs."""
        log, silent = cls(), logging.NullHandler()
        root, of_engines = logging.getLogger(), logging.getLogger("sqlalchemy.engine.Engine")
        levels = [(logger, logger.level) for logger in (root, logging.getLogger("sqlalchemy"))]
        for logger, _ in levels:
            logger.setLevel(logging.DEBUG)
        of_engines.addHandler(silent)  # or an engine with echo adds a handler that prints, for good
        root.addHandler(log)
        try:
            yield log
        finally:
            root.removeHandler(log)
            of_engines.removeHandler(silent)
            for logger, level in levels:
                logger.setLevel(level)

    def names(self) -> set[str]:
        """The first two parts of the names of the loggers that spoke."""
        return {".".join(where.split()[3].split(".")[:2]) for where, _ in self.shown}


class Planted:
    """The secrets of a test: the canary, and every 32-byte key and search salt that is made while it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.needles = Needles(("the canary", CANARY))
        self.keys: list[bytes] = []
        self._random = random.Random("planted")
        self._salt = ""
        monkeypatch.setattr(os, "urandom", self.urandom)
        monkeypatch.setattr(secrets, "choice", self.choice)

    def urandom(self, size: int) -> bytes:
        """Stands for ``os.urandom``: makes known keys, and true nonces."""
        if size != 32:
            return _urandom(size)
        key = self.next_key()
        self.keys.append(key)
        self.needles.add(f"key {len(self.keys)}", key)
        for tenant in ("t1", "t2"):
            self.needles.add(f"the value key of key {len(self.keys)}", value_key(key, tenant))
        return key

    def next_key(self) -> bytes:
        """What the next key will be."""
        return hashlib.sha256(f"planted key {len(self.keys) + 1}".encode()).digest()

    def choice(self, characters: Any) -> Any:
        """Stands for ``secrets.choice``: makes known search salts."""
        chosen = self._random.choice(characters)
        self._salt += chosen
        if len(self._salt) == 32:
            salt = self._salt.encode()
            self.needles.add("a search salt", salt)
            for tenant in ("t1", "t2"):
                for scope in (
                    Scope("column", f"patient.{name}") for name in ("mrn", "email", "code", "kind", "age")
                ):
                    self.needles.add("a column's salt", derive_column_salt(salt, tenant, "sha256", scope))
            self._salt = ""
        return chosen

    def traces(self, shown: Iterable[tuple[str, str]]) -> list[str]:
        """Where a secret shows."""
        return [found for where, text in shown for found in self.needles.within(where, text)]


_urandom = os.urandom
