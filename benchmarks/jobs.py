"""Measures jobs beside a bare UPDATE of the same bytes in a table that is a copy, on PostgreSQL, in one run.

The bare UPDATE reads nothing and makes nothing: its bytes are there before the clock starts, and it is sent in batches
of 5,000 rows. ``--rows`` takes another size, ``--workers`` measures more workers, which are processes.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import job_application
from measure import Figure, Report
from models import Databases
from sqlalchemy import Engine, func, insert, select, text

from sqla_byok import Byok, LocalKms
from sqla_byok.jobs import Report as Done
from sqla_byok.jobs import reencrypt, rehash, verify

BATCH = 5_000
BUDGET = 1.4
VALUE, HASH = 46 + 32, 32
TENANT = "org-42"


def fill(byok: Byok, engine: Engine, rows: int) -> None:
    """The table with so many rows, and its copy with the same indexes."""
    model = job_application.Patient
    job_application.Base.metadata.drop_all(engine)
    job_application.Base.metadata.create_all(engine)
    with byok.session(TENANT, engine) as session:
        for start in range(1, rows + 1, 10_000):
            given = [
                {"id": row, "mrn": f"mrn-{row:028d}", "note": f"note{row:028d}"}
                for row in range(start, min(start + 10_000, rows + 1))
            ]
            session.execute(insert(model), given)
        session.commit()
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS bare"))
        connection.execute(
            text("CREATE TABLE bare AS SELECT id, mrn AS a, mrn_hash AS b, note AS c FROM job_patient")
        )
        connection.execute(text("ALTER TABLE bare ADD PRIMARY KEY (id)"))
        connection.execute(text("CREATE INDEX ON bare (b)"))


def settle(engine: Engine) -> None:
    """Leave no dead rows of what ran before, nor work for the checkpointer."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for command in ("VACUUM ANALYZE job_patient", "VACUUM ANALYZE bare", "CHECKPOINT"):
            connection.execute(text(command))


def bare_update(engine: Engine, rows: int, columns: dict[str, int]) -> float:
    """How long the bare UPDATE takes, in seconds.

    :param columns: the size in bytes of each.
    """
    given = ", ".join(["%s::int[]", *("%s::bytea[]" for _ in columns)])
    sets = ", ".join(f"{name} = given.{name}" for name in columns)
    names = ", ".join(["id", *columns])
    sql = f"UPDATE bare SET {sets} FROM unnest({given}) AS given({names}) WHERE bare.id = given.id"  # noqa: S608 - names of ours
    took = 0.0
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        for start in range(1, rows + 1, BATCH):
            ids = list(range(start, min(start + BATCH, rows + 1)))
            values = [[os.urandom(size) for _ in ids] for size in columns.values()]
            started = time.perf_counter()
            cursor.execute(sql, [ids, *values])
            connection.connection.commit()
            took += time.perf_counter() - started
        cursor.close()
    return took


def timed(job: Callable[[], Done], rows: int) -> float:
    started = time.perf_counter()
    done = job()
    took = time.perf_counter() - started
    assert (done.rows, done.state) == (rows, "done"), done
    return took


def measure(report: Report, rows: int, workers: int, rounds: int) -> None:
    byok, engine = job_application.byok, job_application.engine
    fill(byok, engine, rows)
    how = {"workers": workers, "app": "job_application:byok"} if workers > 1 else {}
    jobs = {
        "reencrypt": (lambda: byok.rotate_data_key(TENANT), reencrypt, {"a": VALUE, "c": VALUE}),
        "rehash": (lambda: byok.rotate_salt(TENANT), rehash, {"b": HASH}),
        "verify": (lambda: None, verify, None),
    }
    for name, (before, job, columns) in jobs.items():
        mine, theirs = [], []
        for _ in range(rounds):
            before()
            settle(engine)
            mine.append(timed(lambda job=job: job(byok, engine, job_application.Base, **how), rows))
            if columns is not None:
                settle(engine)
                theirs.append(bare_update(engine, rows, columns))
        what = f"{name}, {rows:,} rows, {workers} worker{'s' if workers > 1 else ''}"
        rate = f"{rows / min(mine):,.0f} rows/s"
        if theirs:
            budget = BUDGET if workers == 1 else None
            bare = f"{rows / min(theirs):,.0f} rows/s"
            report.add(Figure(what, min(mine) / min(theirs), "×", rate, bare, budget))
        else:
            report.add(Figure(what, rows / min(mine), "rows/s", rate))
    if workers == 1:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report.add(Figure(f"peak memory of the process, after {rows:,} rows", peak, "MB"))
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(text("bare"))) == rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, action="append", help="how many; may be repeated (100000 unless given)"
    )
    parser.add_argument("--workers", type=int, action="append", help="may be repeated (1 and 2 unless given)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    databases = Databases()
    with tempfile.TemporaryDirectory() as folder:
        try:
            url = databases.get("postgresql").url.set(drivername="postgresql+psycopg")
            os.environ["BENCH_JOBS_DATABASE"] = url.render_as_string(hide_password=False)
            os.environ["BENCH_JOBS_FOLDER"] = folder
            os.environ["PYTHONPATH"] = str(Path(__file__).parent)
            job_application.open_in(folder)
            job_application.byok.create_keystore()
            job_application.byok.onboard(TENANT, LocalKms.create(Path(folder) / "customer.key"))
            report = Report()
            for rows in options.rows or [100_000]:
                for workers in options.workers or [1, 2]:
                    measure(report, rows, workers, options.rounds if rows < 1_000_000 else 1)
            if options.json:
                print(report.as_json())
            else:
                report.show()
            job_application.byok.close()
            job_application.engine.dispose()
        finally:
            databases.close()


if __name__ == "__main__":
    sys.exit(main())
