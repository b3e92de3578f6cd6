"""Alembic's own command, on the environment that ``alembic init`` writes: what it generates runs, and is complete.

The versions beside the installed one come from ``make test``, which puts each into a folder of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, inspect, select, text

from sqla_byok import Byok, NotAttachedError, NotEncryptedError, keystore_metadata
from sqla_byok.testing import FakeKms, byok_for_tests

NEWEST = "newest"
OLDER = ("1.17.2", "1.18.0", "1.20.0")
_FOLDER = Path(__file__).parent.parent / ".alembic"

FIRST = """
from datetime import date
from decimal import Decimal
from typing import Any
from sqlalchemy import JSON, Date, Integer, LargeBinary, Numeric, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqla_byok import Encrypted, hash_index, keystore_metadata
from sqla_byok.normalize import casefold, last, named

@named("zoo.badges")
def badges(value: str) -> str:
    return value.replace("-", "")

class Base(DeclarativeBase):
    pass

class Keeper(Base):
    __tablename__ = "keeper"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    badge: Mapped[str] = mapped_column(Encrypted(String(16), searchable=True, normalize=badges), unique=True)
    mail: Mapped[str | None] = mapped_column(Encrypted(String(254), searchable=True, normalize=casefold), index=True)
    pay: Mapped[Decimal | None] = mapped_column(Encrypted(Numeric(12, 2), hash="hmac-sha256", searchable=True))
    born: Mapped[date | None] = mapped_column(Encrypted(Date, pad_to=32))
    phone: Mapped[str | None] = mapped_column(Encrypted(String(20)), comment="with its country")
    phone_last4 = hash_index("phone", transform=last(4))
    letter: Mapped[str | None] = mapped_column(Encrypted(Text))
    long_one: Mapped[str | None] = mapped_column(Encrypted(String(70_000)))
    facts: Mapped[Any | None] = mapped_column(Encrypted(JSON))
    photo: Mapped[bytes | None] = mapped_column(Encrypted(LargeBinary))
    scan: Mapped[str | None] = mapped_column(Encrypted(String(40), mode="direct"))
"""
BORN = "    born: Mapped[date | None]"
ADDED = "    locker: Mapped[str | None] = mapped_column(Encrypted(String(9), searchable=True))\n"
SECOND = FIRST.replace(BORN, ADDED + BORN)
THIRD = SECOND.replace("    mail:", "    email:").replace(
    "normalize=casefold", 'normalize=casefold, column_id="keeper.mail"'
)
RENAMES = """
    op.drop_index("ix_keeper_mail_hash", "keeper")
    with op.batch_alter_table("keeper") as batch:
        batch.alter_column("mail", new_column_name="email", existing_type=sa.LargeBinary())
        batch.alter_column("mail_hash", new_column_name="email_hash", existing_type={hash})
    op.create_index("ix_keeper_email_hash", "keeper", ["email_hash"])
"""


class Environment:
    """A folder as ``alembic init`` makes it, but for its URL and metadata, and the command in it."""

    def __init__(self, folder: Path, url: URL, version: str = NEWEST) -> None:
        self.folder, self.version = folder, version
        self.environ = {**os.environ, "PYTHONPATH": os.pathsep.join(self._path())}
        self.run("init", "migrations")
        self._replace("alembic.ini", "driver://user:pass@localhost/dbname", url.render_as_string(False))
        self._replace(
            "migrations/env.py", "target_metadata = None", "import zoo\ntarget_metadata = zoo.WANTED"
        )
        if version < "1.18":
            self._replace(
                "migrations/env.py",
                "from alembic import context",
                "import sqla_byok.alembic\nfrom alembic import context",
            )
            self.configure("**sqla_byok.alembic.options()")

    def _path(self) -> list[str]:
        if self.version == NEWEST:
            return [str(self.folder)]
        return [str(self.folder), str(_FOLDER / self.version)]

    def _replace(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))

    def configure(self, more: str) -> None:
        """Give context.configure() something more."""
        self._replace(
            "migrations/env.py", "target_metadata=target_metadata", f"target_metadata=target_metadata, {more}"
        )

    def declare(self, models: str, wanted: str = "Base.metadata") -> None:
        # Removed first: bytecode of a file of the same second and size is taken for its own.
        (self.folder / "zoo.py").unlink(missing_ok=True)
        (self.folder / "zoo.py").write_text(f"{models}\nWANTED = {wanted}\n")

    def models(self) -> Any:
        module = ModuleType("zoo")
        sys.modules["zoo"] = module  # where SQLAlchemy looks for what annotations name
        try:
            exec((self.folder / "zoo.py").read_text(), vars(module))  # noqa: S102 - the test's own text
        finally:
            del sys.modules["zoo"]
        return module

    def run(self, *command: str, fails: bool = False, python: str | None = None) -> str:
        start = ["-m", "alembic"] if python is None else ["-c", python]
        done = subprocess.run(
            [sys.executable, "-B", *start, *command],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode != 0) is fails, f"alembic {' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def revise(self, message: str) -> str:
        """Autogenerate and upgrade; what was written."""
        before = set(self.versions())
        self.run("revision", "--autogenerate", "-m", message)
        (made,) = set(self.versions()) - before
        self.run("upgrade", "head")
        return made.read_text()

    def write(self, message: str, upgrade: str, fails: bool = False) -> str:
        """Write a revision by hand and upgrade; what the command said. One that fails is removed."""
        before = set(self.versions())
        self.run("revision", "-m", message)
        (made,) = set(self.versions()) - before
        there = made.read_text()
        made.write_text(re.sub(r'("""Upgrade schema.""")\n    pass', lambda m: m[1] + upgrade, there))
        told = self.run("upgrade", "head", fails=fails)
        if fails:
            made.unlink()
        return told

    def versions(self) -> list[Path]:
        return sorted((self.folder / "migrations" / "versions").glob("*.py"))


@pytest.fixture(params=[NEWEST, *OLDER])
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    if version != NEWEST and not (_FOLDER / version).exists():
        if request.config.getoption("--require-all"):
            pytest.fail(
                f"--require-all: Alembic {version} is not in {_FOLDER.name}/; make test puts it there"
            )
        pytest.skip(f"Alembic {version} is not in {_FOLDER.name}/; make test puts it there")
    return version


@pytest.fixture
def environment(tmp_path: Path, sync_url: URL) -> Environment:
    """For the newest version, on each database."""
    return Environment(tmp_path, sync_url)


@pytest.fixture
def byok(engine: Engine) -> Iterator[Byok]:
    byok = byok_for_tests(engine, "t")
    yield byok
    byok.close()


def _hash_type(engine: Engine) -> str:
    return "sa.LargeBinary(32)" if engine.dialect.name not in ("mysql", "mariadb") else "sa.BINARY(32)"


def test_the_years_of_a_table(environment: Environment, engine: Engine, byok: Byok) -> None:
    """Made, filled, given a searchable column, a column renamed, and taken back: nothing of it edited by hand."""
    environment.declare(FIRST)
    environment.revise("keepers")
    environment.run("check")
    keeper = environment.models().Keeper
    with byok.session("t", engine) as session:
        session.add(keeper(id=1, name="Ada", badge="A-1", mail="Ada@zoo.org", letter="x" * 70_000, scan="s"))
        session.commit()
    environment.declare(SECOND)
    written = environment.revise("lockers")
    assert "keeper_locker_hash" in written
    environment.run("check")
    environment.declare(THIRD)
    environment.write("rename", RENAMES.format(hash=_hash_type(engine)))
    environment.run("check")
    keeper = environment.models().Keeper
    with byok.session("t", engine) as session:
        found = session.scalars(select(keeper).where(keeper.email == "ADA@zoo.org")).one()
        assert (found.badge, found.letter, found.scan) == ("A-1", "x" * 70_000, "s")
        assert session.scalars(select(keeper.id).where(keeper.badge == "A1")).all() == [1]


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_each_version_of_alembic(tmp_path: Path, sync_url: URL, version: str) -> None:
    """A release older than 1.18 has no plugins and needs one line of env.py; 1.18 to 1.20.0 iterate over them."""
    environment = Environment(tmp_path, sync_url, version)
    environment.declare(FIRST)
    written = environment.revise("keepers")
    assert "sa.Column('badge', sa.LargeBinary(), nullable=False)" in written
    assert "sa.Column('badge_hash', sa.LargeBinary(length=32), nullable=True)" in written
    environment.run("check")
    environment.declare(SECOND)
    environment.configure("render_as_batch=True")
    assert "batch_op.add_column(sa.Column('locker_hash'" in environment.revise("lockers")
    environment.run("check")
    environment.run("downgrade", "base")
    engine = create_engine(sync_url)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_a_migration_needs_nothing_of_ours(environment: Environment, engine: Engine) -> None:
    """It runs where the package is not installed, online and as a script of SQL, and takes itself back."""
    environment.declare(FIRST)
    assert "byok" not in environment.revise("keepers")
    environment.run("downgrade", "base")
    (environment.folder / "zoo.py").write_text("WANTED = None\n")
    without = "import sys; sys.modules['sqla_byok'] = None; from alembic.config import main; main()"
    script = environment.run("upgrade", "head", "--sql", python=without)
    assert "CREATE TABLE keeper" in script
    environment.run("upgrade", "head", python=without)
    made = inspect(engine)
    hashed = {index["column_names"][0] for index in made.get_indexes("keeper") if not index["unique"]}
    assert hashed == {"mail_hash", "pay_hash", "phone_last4_hash"}
    uniques = [
        *made.get_unique_constraints("keeper"),
        *(i for i in made.get_indexes("keeper") if i["unique"]),
    ]
    assert {each["column_names"][0] for each in uniques} == {"badge_hash"}
    environment.run("downgrade", "base", python=without)
    assert inspect(engine).get_table_names() == ["alembic_version"]


TENANT = """
class Cage(Base):
    __tablename__ = "cage"
    __byok_tenant__ = "org"
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[str] = mapped_column("org_id", String(40))
    label: Mapped[str] = mapped_column(String(40), info={"of": "the application"})

class Lion(Cage):
    __tablename__ = "lion"
    id: Mapped[int] = mapped_column(ForeignKey("cage.id"), primary_key=True)
    roar: Mapped[str | None] = mapped_column(Encrypted(String(40)))
"""


def test_a_tenant_column_is_a_column_like_any_other(environment: Environment, engine: Engine) -> None:
    """What the table's info says of it means something to models only, and the column's key is theirs too."""
    environment.declare(FIRST.replace("import JSON", "import ForeignKey, JSON") + TENANT)
    written = environment.revise("cages")
    assert "info=" not in written
    environment.run("check")
    assert {column["name"] for column in inspect(engine).get_columns("cage")} == {"id", "org_id", "label"}


def test_the_keystore_is_left_alone_unless_it_is_asked_for(environment: Environment, engine: Engine) -> None:
    """Its tables stand beside the application's and are not in its metadata; with it in the metadata they are whole."""
    # In a process of its own: packages that other tests import change how types are rendered.
    url = engine.url.render_as_string(hide_password=False)
    environment.run(python=f"from sqla_byok import Byok; Byok({url!r}).create_keystore()")
    environment.declare(FIRST)
    assert "byok_" not in environment.revise("keepers")
    environment.run("check")
    environment.declare(FIRST, "[Base.metadata, keystore_metadata]")
    environment.run("check")


def test_a_keystore_that_a_migration_made_takes_tenants(environment: Environment, engine: Engine) -> None:
    environment.declare(FIRST, "[keystore_metadata]")
    environment.revise("keystore")
    environment.run("check")
    byok = Byok(engine)
    byok.onboard("north", FakeKms("migrated"))
    assert byok.tenants() == ["north"]
    byok.create_keystore()
    assert byok.tenants() == ["north"]
    byok.close()
    environment.run("downgrade", "base")
    assert not set(inspect(engine).get_table_names()) & set(keystore_metadata.tables)


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_hooks_of_the_application_are_asked_too(environment: Environment) -> None:
    environment.declare(FIRST)
    environment.configure(
        "render_item=lambda kind, item, _: 'sa.Unicode(40)' if kind == 'type' and str(item) == 'VARCHAR(40)' else False"
    )
    written = environment.revise("keepers")
    assert "sa.Column('name', sa.Unicode(40)" in written
    assert "sa.Column('mail', sa.LargeBinary()" in written


@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_a_column_that_becomes_encrypted_in_its_place_is_told_of(environment: Environment) -> None:
    """The migration changes its type; what stands in it is not encrypted by that."""
    environment.declare(FIRST)
    environment.revise("keepers")
    environment.declare(FIRST.replace("mapped_column(String(40))", "mapped_column(Encrypted(String(40)))"))
    told = environment.run("revision", "--autogenerate", "-m", "name")
    assert "keeper.name becomes an encrypted column" in told
    assert told.count("becomes an encrypted column") == 1


BULK = """
    import zoo
    {table}
    op.bulk_insert(table, [{{"id": 1, "name": "Ada", "badge": {value}}}])
"""
MODELS = "table = zoo.Keeper.__table__"
OWN = 'table = sa.table("keeper", sa.column("id"), sa.column("name"), sa.column("badge", sa.LargeBinary()))'


def test_what_a_migration_inserts_is_not_stored_in_the_clear(
    environment: Environment, engine: Engine, byok: Byok
) -> None:
    """Its engine is not attached: the model's own table refuses it, a table of the migration's takes no text.

    Bytes it would take; nothing reads them as values afterwards.
    """
    environment.declare(FIRST)
    environment.revise("keepers")
    told = environment.write("by the model", BULK.format(table=MODELS, value='"A-1"'), fails=True)
    assert NotAttachedError.__name__ in told
    environment.write("by itself", BULK.format(table=OWN, value='"A-1"'), fails=True)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM keeper")).all() == []
    environment.write("bytes", BULK.format(table=OWN, value='b"A-1"'))
    keeper = environment.models().Keeper
    with byok.session("t", engine) as session, pytest.raises(NotEncryptedError):
        session.scalars(select(keeper)).all()
