"""The command ``byok``, installed, on an application in a folder; and jobs whose process is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, column, create_engine, select, table

from sqla_byok import LocalKms
from sqla_byok.orm.stored import Bytes, key_id

APP = '''
import time
from sqlalchemy import String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqla_byok import Byok, Encrypted, hash_index
from sqla_byok.normalize import casefold, last

class Clock:
    """Waits for nothing: a settle time is over at once."""
    def __init__(self): self.turned = 0.0
    def boot(self): return time.monotonic() + self.turned
    def wall(self): return time.time() + self.turned
    def sleep(self, seconds): self.turned += seconds

class Base(DeclarativeBase):
    pass

class Member(Base):
    __tablename__ = "cm_member"
    id: Mapped[int] = mapped_column(primary_key=True)
    mail: Mapped[str] = mapped_column(Encrypted(String(40), searchable=True{options}))
    mail_end = hash_index("mail", transform=last(3))

engine = create_engine({data!r})
byok = Byok({keystore!r}, keystore_key="file:" + {key!r}, clock=Clock())
byok.attach(engine)
'''


class Application:
    """A folder with an application, and the command over it."""

    def __init__(self, folder: Path, data: URL) -> None:
        self.folder = folder
        key = folder / "keystore.key"
        key.write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
        self.parts = {
            "data": data.render_as_string(hide_password=False),
            "keystore": f"sqlite:///{folder / 'keystore.db'}",
            "key": str(key),
        }
        self.write()

    def write(self, options: str = "") -> None:
        (self.folder / "shop.py").unlink(missing_ok=True)
        (self.folder / "shop.py").write_text(APP.format(options=options, **self.parts))

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).parent / "byok"), "--app", "shop:byok", *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            self.command(*arguments), cwd=self.folder, env=environ, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return out + err

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run("--json", *arguments, code=code))

    def python(self, code: str) -> None:
        subprocess.run([sys.executable, "-B", "-c", code], cwd=self.folder, check=True, timeout=120)

    def set_up(self, rows: int) -> None:
        LocalKms.create(self.folder / "org.key")
        self.python(
            "from shop import *; from sqla_byok import LocalKms; from sqlalchemy import insert\n"
            "byok.create_keystore(); byok.onboard('org', LocalKms('org.key')); Base.metadata.create_all(engine)\n"
            "with byok.session('org', engine) as session:\n"
            f"    rows = [{{'id': n, 'mail': f'Mail {{n % 50}}'}} for n in range(1, {rows} + 1)]\n"
            "    session.execute(insert(Member), rows); session.commit()\n"
        )


@pytest.fixture
def application(tmp_path: Path, sync_url: URL) -> Application:
    application = Application(tmp_path, sync_url)
    application.set_up(300)
    return application


only_sqlite = pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)


@only_sqlite
def test_a_deployment_with_another_normalizer(application: Application) -> None:
    """check, check --prepare, rehash; by codes that a script can go by."""
    assert application.run("check") == ""
    application.write(", normalize=casefold")
    found = application.json("check", code=1)
    assert [(each["column"], each["kind"]) for each in found] == [("cm_member.mail", "changed")]
    application.run("check", "--prepare", code=1)
    report = application.json("rehash", "cm_member.mail")
    assert (report["state"], report["counts"]["changed"]) == ("done", 300)
    assert application.run("check") == ""
    listed = application.json("jobs", "list")
    assert [(job["kind"], job["state"], job["rows"]) for job in listed] == [("rehash", "done", "300 of 300")]
    shown = application.run("jobs", "show", listed[0]["job"])
    assert "300 changed" in shown
    application.run("jobs", "pause", listed[0]["job"], code=3)


@only_sqlite
def test_a_rotation_and_its_end(application: Application) -> None:
    assert application.json("rotate", "org")["retired"] == [["data-key", 1], ["search-salt", 1]]
    application.run("restore", "org", "data-key", "1")
    application.run("retire", "org", "data-key", "1")
    application.run("destroy", "org", "data-key", "1", "--backups-kept", "0", code=2)
    application.run("destroy", "org", "data-key", "1", "--backups-kept", "0", "--confirm", "other", code=2)
    application.run("destroy", "org", "data-key", "1", "--backups-kept", "9", "--confirm", "org", code=3)
    application.run("destroy", "org", "data-key", "1", "--backups-kept", "0", "--confirm", "org")
    assert application.json("verify")["counts"]["already"] == 300
    application.run("set-searchable", "org", "--all", "--but", "cm_member.mail_end")
    assert "not searched" not in application.run("reencrypt", "cm_member.mail", "--workers", "2")


@only_sqlite
def test_what_goes_wrong_is_told_in_a_line(application: Application) -> None:
    """Without a traceback, and without a secret."""
    for arguments, code in (
        (("rehash", "nothing.like_it"), 3),
        (("jobs", "show", "nothing"), 3),
        (("retire", "org", "data-key", "1"), 3),
        (("retire", "nobody", "data-key", "1"), 3),
        (("retire", "org", "data-key", "1", "--gone", "cm_member"), 3),
        (("set-searchable", "org", "--all", "cm_member.mail"), 2),
        (("set-searchable", "org", "cm_member.maill"), 3),
        (("rehash", "--tenant", "nobody"), 3),
        (("verify", "--below", "SELECT nonsense FROM nowhere", "5"), 3),
        (("destroy", "org", "data-key", "1", "--backups-kept", "1e9", "--confirm", "org"), 3),
        (("--app", ":byok", "check"), 3),
        (("--app", ".shop:byok", "check"), 3),
        (("--database", "no URL", "verify"), 3),
        (("--database", f"sqlite:///{application.folder / 'empty.db'}", "verify"), 3),
        (("--database", f"sqlite:///{application.folder / 'empty.db'}", "leakage"), 3),
        (("--database", "postgresql+psycopg://u:AAECAwQ@127.0.0.1:1/x", "reencrypt"), 3),
    ):
        told = application.run(*arguments, code=code)
        assert "Traceback" not in told
        assert "AAECAwQ" not in told
    (application.folder / "shop.py").write_text("byok = 1")
    assert "there is no Byok" in application.run("check", code=3)


@only_sqlite
def test_watching_ends_where_only_a_dark_tenants_rows_are_left(application: Application) -> None:
    LocalKms.create(application.folder / "other.key")
    application.python(
        "from shop import *; from sqla_byok import LocalKms; byok.onboard('other', LocalKms('other.key'))\n"
        "with byok.session('other', engine) as session: session.add(Member(id=900, mail='x')); session.commit()\n"
    )
    (application.folder / "other.key").rename(application.folder / "away.key")
    job = application.json("verify", code=4)["job"]
    assert application.json("jobs", "watch", job, code=4)["dark"] == ["other"]
    (application.folder / "away.key").rename(application.folder / "other.key")
    assert application.json("verify")["job"] == job


def test_two_processes_work_on_one_job(application: Application) -> None:
    application.python("from shop import *; byok.rotate_data_key('org')")
    report = application.json("reencrypt", "--workers", "2")
    assert (report["state"], report["counts"]["changed"]) == ("done", 300)


def test_workers_find_the_database_that_the_command_was_given(application: Application) -> None:
    """Where importing the application attaches none, as one with an async engine."""
    application.python("from shop import *; byok.rotate_data_key('org')")
    shop = application.folder / "shop.py"
    shop.write_text(shop.read_text().replace("byok.attach(engine)", ""))
    report = application.json("--database", application.parts["data"], "reencrypt", "--workers", "2")
    assert (report["state"], report["counts"]["changed"]) == ("done", 300)


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def _cells(url: URL) -> dict[int, tuple[bytes, bytes, bytes]]:
    member = table(
        "cm_member", *(column(n, Bytes()) for n in ("mail", "mail_hash", "mail_end_hash")), column("id")
    )
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(select(member)).all()
    engine.dispose()
    return {row.id: (row.mail, row.mail_hash, row.mail_end_hash) for row in rows}


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often a job is killed; on the databases with a server in the long run only."""
    deep = request.config.getoption("--deep")
    if not deep and request.getfixturevalue("sync_url").get_backend_name() != "sqlite":
        return 1
    return 50 if deep else 3


@pytest.mark.parametrize("kind", ["reencrypt", "rehash"])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, sync_url: URL, kills: int, kind: str) -> None:
    """No row is changed twice, every row is right, and the counts of all pieces add up to the table's rows."""
    application = Application(tmp_path, sync_url)
    application.set_up(2_000)
    first = _cells(sync_url)
    rotate = "data_key" if kind == "reencrypt" else "salt"
    application.python(f"from shop import *; byok.rotate_{rotate}('org')")
    dice, before, killed = random.Random(kind), first, 0
    while killed < kills:
        process = application.start(kind, "--rate", "1500")
        time.sleep(dice.uniform(0.4, 2.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate(timeout=60)
        now = _cells(sync_url)
        again = [id_ for id_, cells in now.items() if cells != before[id_] != first[id_]]
        assert again == [], "changed twice"
        before = now
        if killed < kills and all(now[id_] != first[id_] for id_ in now):  # a round is over: another one
            assert application.json(kind)["state"] == "done"
            application.python(f"from shop import *; byok.rotate_{rotate}('org')")
            first = before = now
    report = application.json(kind)
    counts = report["counts"]
    assert report["state"] == "done"
    assert counts["failed"] == counts["dark"] == counts["overtaken"] == 0
    assert counts["changed"] + counts["already"] == 2_000
    done = _cells(sync_url)
    assert all(done[id_] != first[id_] for id_ in done)
    if kind == "reencrypt":
        assert len({key_id(cells[0]) for cells in done.values()}) == 1
    assert application.json("verify")["counts"]["already"] == 2_000
    application.run("retire", "org", "data-key" if kind == "reencrypt" else "search-salt", "1")
