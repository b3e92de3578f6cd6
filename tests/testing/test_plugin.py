"""The pytest plugin, in runs of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import _sqla_byok_pytest

PLUGIN = ["-p", "_sqla_byok_pytest"]
FOLDER = str(Path(_sqla_byok_pytest.__file__).parent)


def python(folder: Path, *arguments: str, **environment: str) -> str:
    """What a Python of its own says."""
    child = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": FOLDER, "PATH": "", **environment},
        capture_output=True,
        text=True,
    )
    return child.stdout + child.stderr


def run(folder: Path, code: str, *arguments: str) -> str:
    """What pytest says about a test module; only this plugin is loaded."""
    (folder / "test_it.py").write_text(code)
    command = ["-m", "pytest", "-W", "error", "-q", "--rootdir=.", *arguments]
    return python(folder, *command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def test_it_is_registered() -> None:
    """Installing the package is enough: pytest finds the plugin."""
    (found,) = {each.value for each in entry_points(group="pytest11", name="sqla_byok")}
    assert found == _sqla_byok_pytest.__name__


UNUSED = """
import sys
def test_nothing_was_imported():
    assert "_sqla_byok_pytest" in sys.modules
    roots = {name.partition(".")[0] for name in sys.modules}
    assert not roots & {"sqla_byok", "sqlalchemy", "cryptography", "moto", "boto3", "azure"}
"""


def test_it_costs_nothing_unused(tmp_path: Path) -> None:
    """A project that shares the environment pays nothing for it, and sees no warning."""
    assert "1 passed" in run(tmp_path, UNUSED, *PLUGIN)


INSTALLED = {
    "METADATA": "Metadata-Version: 2.1\nName: installed\nVersion: 1\n",
    "entry_points.txt": "[pytest11]\nsqla_byok = _sqla_byok_pytest\n",
    "RECORD": "sqla_byok/__init__.py,,\nsqla_byok/runtime.py,,\n_sqla_byok_pytest.py,,\n",
}
EMBEDDED = """
import sys, sqla_byok, pytest
sys.exit(pytest.main(["-q", "--rootdir=.", "-p", "no:asyncio", "-W", "error", "test_it.py"]))
"""


def test_a_program_that_runs_pytest_sees_no_warning(tmp_path: Path) -> None:
    """An application with a command of its own for its tests has imported us before pytest asks for our files."""
    folder = tmp_path / "site" / "installed-1.dist-info"
    folder.mkdir(parents=True)
    for name, content in INSTALLED.items():
        (folder / name).write_text(content)
    (tmp_path / "test_it.py").write_text("def test_it(byok_fake_kms): byok_fake_kms.disable()")
    said = python(tmp_path, "-c", EMBEDDED, PYTHONPATH=f"{FOLDER}:{folder.parent}")
    assert "1 passed" in said, said
    assert "warning" not in said.lower()


CONFTEST = """
import pytest
from sqlalchemy import StaticPool, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqla_byok import Encrypted
from sqla_byok.errors import KeyDisabledError, KeystoreUnavailableError

class Base(DeclarativeBase): pass

class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Encrypted(String(60)))

@pytest.fixture
def engine():
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()
"""

USED = (
    CONFTEST
    + """
seen = []

@pytest.mark.parametrize("round", [1, 2])
def test_fixtures(byok_for_tests, byok_fake_kms, engine, round):
    assert byok_fake_kms.calls == {}
    byok = byok_for_tests(engine, kms=byok_fake_kms)
    seen.append((byok, byok_fake_kms))
    with Session(engine) as session:
        session.add(Patient(name="Ada"))
        session.commit()
    byok_fake_kms.disable()
    byok.forget_keys()
    with pytest.raises(KeyDisabledError), byok.session("t", engine): pass

def test_what_they_made_was_closed():
    (byok, kms), (_, other) = seen
    assert kms != other and kms.calls == {}
    with pytest.raises(KeystoreUnavailableError, match="closed"):
        byok.tenants()
"""
)


def test_fixtures_serve_and_clean_up(tmp_path: Path) -> None:
    """Each test has a key of its own; what the factory made is closed and the key left as new."""
    assert "3 passed" in run(tmp_path, USED, *PLUGIN)


SERVERS = """
import os, pytest
before = dict(os.environ)

@pytest.mark.parametrize("round", [1, 2])
def test_servers(byok_kms_server, round):
    kms = byok_kms_server.aws_key()
    client = kms.connect(byok_kms_server.profiles["default"])
    assert client.unwrap(client.wrap(b"x", tenant="t"), tenant="t") == b"x"
    assert byok_kms_server.aws.calls == {"Encrypt": 1, "Decrypt": 1}

def test_environment_is_as_before():
    now = dict(os.environ)
    assert {**now, "PYTEST_CURRENT_TEST": ""} == {**before, "PYTEST_CURRENT_TEST": ""}
"""


def test_servers_start_once_and_leave_no_trace(tmp_path: Path) -> None:
    """Dummy credentials are there for the tests that use the servers, and for no others."""
    assert "3 passed" in run(tmp_path, SERVERS, *PLUGIN)
