"""Runs SQLAlchemy's own tests on attached engines: whatever passes without us has to pass with us.

It fetches the source of the installed SQLAlchemy with pip, and runs those of its tests that execute statements once as
they are, and once with every engine attached to a Byok::

    .venv/bin/python tests/upstream_suite.py                   # plain and attached, SQLite in memory
    .venv/bin/python tests/upstream_suite.py test/orm/dml      # some of them
    .venv/bin/python tests/upstream_suite.py --swapped         # String columns become Encrypted, too
    .venv/bin/python tests/upstream_suite.py --db postgresql+psycopg://user@127.0.0.1/test

A test that fails attached and not plain is a fault, or stands in ``EXPECTED`` with its reason. With ``--swapped`` a
test may also fail by one of our own exceptions, which is right: it did what cannot be done with ciphertext. What else
fails there is listed to be read, since many of the tests assert on the SQL text, or on the number of columns.

The same file is the pytest plugin that the runs are made with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

MODE, LOG = "BYOK_SUITE_MODE", "BYOK_SUITE_LOG"

# Those that execute something. What only compiles never meets an engine.
FILES = (
    "test/orm",
    "test/ext",
    "test/engine/test_ddlevents.py",
    "test/engine/test_execute.py",
    "test/engine/test_reconnect.py",
    "test/engine/test_reflection.py",
    "test/engine/test_transaction.py",
    "test/dialect/test_sqlite.py",
    "test/dialect/test_suite.py",
    "test/sql/test_case_statement.py",
    "test/sql/test_computed.py",
    "test/sql/test_cte.py",
    "test/sql/test_ddlemit.py",
    "test/sql/test_defaults.py",
    "test/sql/test_delete.py",
    "test/sql/test_from_linter.py",
    "test/sql/test_functions.py",
    "test/sql/test_identity_column.py",
    "test/sql/test_insert_exec.py",
    "test/sql/test_lambdas.py",
    "test/sql/test_query.py",
    "test/sql/test_quote.py",
    "test/sql/test_resultset.py",
    "test/sql/test_returning.py",
    "test/sql/test_sequences.py",
    "test/sql/test_table_via_select.py",
    "test/sql/test_type_expressions.py",
    "test/sql/test_types.py",
    "test/sql/test_update.py",
    "test/sql/test_values.py",
)

# What has to differ on an attached engine, by a part of the test's name.
EXPECTED = {
    "EngineEventsTest": "counts on an engine without listeners; an attached one has ours",
    "test_generative_engine_event_dispatch_hasevents": "likewise",
    "test_row_logging_fall": "an attached engine shows no rows in its log",
}

# What SQLAlchemy's tests take for granted of a String column and what is otherwise with an encrypted one, by a part of
# the message of the test that then fails.
ASSUMED = {
    "_hash": "counts the columns, or compares SQL or dicts, in which a hash column stands beside the column",
    "Digest(": "counts the columns of a row",
    "Fetch object": "looks at the class of a result's cursor strategy, or into it",
    "Fetch' object": "likewise",
    "Testing for compiled statement": "compares SQL",
    "on dialect": "compares SQL",
    "Encrypted(": "asks for the class of a column's type",
}


# -- the plugin ------------------------------------------------------------------------------------------------------


def _attach_all() -> None:
    """Attach each engine that is made from now on to one Byok."""
    from sqlalchemy import Dialect

    from sqla_byok import Byok
    from sqla_byok.testing import FakeKms

    byok = Byok(keystore="sqlite://", single_tenant="suite", revoke_within=86_400)
    byok.create_keystore()
    byok.onboard("suite", FakeKms("suite"))
    created = Dialect.engine_created

    def attach(cls: Any, engine: Any) -> None:
        created.__func__(cls, engine)  # type: ignore[attr-defined]
        byok.attach(engine, raw_sql="refuse")

    Dialect.engine_created = classmethod(attach)  # type: ignore[assignment,method-assign]


def _swap_strings() -> None:
    """Declare String columns as Encrypted, but those that cannot be: keys, and what the database sets or checks."""
    from sqlalchemy import CheckConstraint, Column, Computed, FetchedValue, ForeignKey, String, Text, Unicode

    from sqla_byok import Encrypted

    swapped = {String, Text, Unicode}
    kept = (ForeignKey, Computed, CheckConstraint, FetchedValue)
    made = Column.__init__

    def swap(given: Any) -> Any:
        cls = given if isinstance(given, type) else type(given)
        return Encrypted(given, searchable=True) if cls in swapped else given

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        given = (kwargs.get(name) for name in ("primary_key", "server_default", "server_onupdate"))
        fixed = any(one is not None and one is not False for one in given)
        if not (fixed or any(isinstance(each, kept) for each in args)):
            args = tuple(swap(each) for each in args)
            if "type_" in kwargs:
                kwargs["type_"] = swap(kwargs["type_"])
        made(self, *args, **kwargs)

    Column.__init__ = make  # type: ignore[method-assign]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _note(**entry: Any) -> None:
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps(entry) + "\n")


def _of_failure(error: BaseException) -> dict[str, Any]:
    from sqla_byok import ByokError

    ours = next((each for each in _chain(error) if isinstance(each, ByokError)), None)
    shown = ours or error
    return {
        "refused": None if ours is None else type(ours).__name__,
        "why": f"{type(shown).__name__}: {str(shown).strip()[:2_000]}",
    }


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """Write how each test ended."""
    outcome: Any = yield
    report = outcome.get_result()
    if LOG not in os.environ:
        return
    if report.failed:
        error = call.excinfo.value if call.excinfo else AssertionError("passed, and should have failed")
        _note(test=item.nodeid, outcome="failed", **_of_failure(error))
    elif report.when == "call" or report.skipped:
        _note(test=item.nodeid, outcome=report.outcome)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write which file could not be read."""
    if LOG in os.environ and report.failed:
        why = str(report.longrepr)
        refused = "at its declaration" if "sqla_byok.errors." in why else None
        _note(test=report.nodeid, outcome="failed", refused=refused, why=why[-2_000:])


if MODE in os.environ:
    if os.environ[MODE] != "plain":
        _attach_all()
    if os.environ[MODE] == "swapped":
        _swap_strings()


# -- the command -----------------------------------------------------------------------------------------------------


def fetched(folder: Path) -> Path:
    """SQLAlchemy's source of the installed version, unpacked in *folder*, as pip downloads it."""
    name = f"sqlalchemy-{version('sqlalchemy')}"
    if not (folder / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "sqlalchemy"]
        subprocess.run([*pip, f"sqlalchemy=={version('sqlalchemy')}", "--dest", folder], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name


def run(source: Path, mode: str, files: Sequence[str], db: str | None, more: Sequence[str]) -> dict[str, Any]:
    """Run SQLAlchemy's tests.

    :returns: for each test how it ended.
    """
    log = source.parent / f"{mode}.jsonl"
    log.unlink(missing_ok=True)
    here = Path(__file__).resolve()
    environment = {
        **os.environ,
        MODE: mode,
        LOG: str(log),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here.parent)]),
    }
    options = ["-o", "addopts=", "-p", "upstream_suite", "-p", "no:cacheprovider", "-q", "--tb=no", "-r", "E"]
    options.append("--continue-on-collection-errors")
    # -s, or SQLAlchemy's conftest would take the source's own library in place of the installed one
    command = [
        sys.executable,
        "-s",
        "-m",
        "pytest",
        *options,
        *(["--dburi", db] if db else []),
        *more,
        *files,
    ]
    subprocess.run(command, cwd=source, env=environment, stdout=sys.stderr, check=False)
    found: dict[str, Any] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if found.get(entry["test"], {}).get("outcome") != "failed":
            found[entry["test"]] = entry
    return found


def summary(found: dict[str, Any]) -> str:
    """How many tests ended how."""
    ended = Counter("refused" if one.get("refused") else one["outcome"] for one in found.values())
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(ended.items()))


def compared(plain: dict[str, Any], with_us: dict[str, Any], swapped: bool) -> list[str]:
    """What is to be looked at: tests that fail with us and not without, and for no reason that is known."""
    found = []
    for name, one in sorted(with_us.items()):
        if one["outcome"] != "failed" or plain.get(name, {}).get("outcome") == "failed":
            continue
        known = any(part in name for part in EXPECTED)
        if swapped and not known:
            known = one["refused"] is not None or any(part in one["why"] for part in ASSUMED)
        if not known:
            found.append(f"{name}\n    {one['why'][:300]}")
    if not swapped:  # there a file may not even be read, where what it declares is refused
        ran = (name for name, one in plain.items() if one["outcome"] == "passed" and name not in with_us)
        found += [f"{name}\n    did not run" for name in ran]
    return found


def main(given: Sequence[str] | None = None) -> int:
    """The command; 1 where an attached engine fails a test that a plain one passes."""
    parser = argparse.ArgumentParser(description="Run SQLAlchemy's own tests on attached engines.")
    parser.add_argument("files", nargs="*", help="some of the tests, below SQLAlchemy's source")
    parser.add_argument("--swapped", action="store_true", help="String columns become Encrypted")
    parser.add_argument("--db", help="the URL of another database, which the suite fills and empties")
    parser.add_argument("--keep", type=Path, help="a folder for the source and the logs")
    options, more = parser.parse_known_args(given)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        source, mode = fetched(folder), "swapped" if options.swapped else "attached"
        files = [name for name in options.files or FILES if (source / name.split("::")[0]).exists()]
        plain = run(source, "plain", files, options.db, more)
        with_us = run(source, mode, files, options.db, more)
    found = compared(plain, with_us, options.swapped)
    print("\n".join(found))
    print(f"SQLAlchemy {version('sqlalchemy')}\nplain: {summary(plain)}\n{mode}: {summary(with_us)}")
    print(f"{len(found)} to look at")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
