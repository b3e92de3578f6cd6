"""The command ``byok``: what an operator does beside the application, with the application's own models and keys.

Exit codes: 0, done; 1, something was found or could not be done with some rows; 2, the command was given wrongly;
3, it could not be done at all; 4, not finished: paused, cancelled, or tenants were dark.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Table as Grid
except ImportError:  # said where it is run
    raise SystemExit("the command needs an extra: pip install 'sqla-byok[cli]'") from None

from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError

from sqla_byok import jobs
from sqla_byok.errors import ByokError
from sqla_byok.jobs.kinds import DATABASE, found_app
from sqla_byok.jobs.runner import report_of
from sqla_byok.keys.jobs import CANCELLED, DONE, OPEN, PAUSED, PREPARING, RUNNING, Job, Jobs
from sqla_byok.runtime import Byok

__all__ = ["app", "main"]

FOUND, WRONG, FAILED, UNFINISHED = 1, 2, 3, 4

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # they could show a secret
    rich_markup_mode=None,
)
_jobs = typer.Typer(help="Look at jobs, pause them, go on with them.", no_args_is_help=True)
app.add_typer(_jobs, name="jobs")


@dataclass
class _Context:
    """What all commands share."""

    app: str | None
    database: str | None
    as_json: bool
    _byok: Byok | None = None
    _engine: Engine | None = None

    @property
    def byok(self) -> Byok:
        """The application's."""
        if self._byok is None:
            if self.app is None:
                _fail("where is your Byok? Give --app package.module:attribute, or set BYOK_APP")
            sys.path.insert(0, os.getcwd())  # as flask and alembic find an application
            self._byok = found_app(self.app)
            if self.database is not None:
                os.environ[DATABASE] = self.database  # for workers: it does not stand among their arguments
                self._engine = create_engine(self.database)
                self._byok.attach(self._engine)
        return self._byok

    @property
    def engine(self) -> Engine | None:
        """The one of --database; None: the one that the application has attached."""
        _ = self.byok
        return self._engine


@app.callback()
def _all(
    context: typer.Context,
    app_: Annotated[
        str | None,
        typer.Option(
            "--app", envvar="BYOK_APP", help="Where your Byok is: package.module:attribute, or a function's."
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            envvar=DATABASE,
            help="The database with the rows, by URL, where your application attaches none or several.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    context.obj = _Context(app_, database, as_json)


# -- what is printed -------------------------------------------------------------------------------------------------

_out, _err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def _fail(message: str, code: int = FAILED) -> NoReturn:
    _err.print(f"byok: {message}", markup=False)
    raise typer.Exit(code)


def _print(of: _Context, content: Any, show: Callable[[], object]) -> None:
    if of.as_json:
        print(json.dumps(content, default=str))  # noqa: T201 - what a command is for
    else:
        show()


def _grid(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    rows = [tuple(map(str, row)) for row in rows]
    if not _out.is_terminal:
        for row in rows:
            _out.print("\t".join(row), markup=False)
        return
    grid = Grid(*columns, box=None)
    for row in rows:
        grid.add_row(*row)
    _out.print(grid)


@contextmanager
def _told(of: _Context) -> Iterator[Callable[[jobs.Progress], None] | None]:
    """What shows how far a job is: a bar on a terminal, a line now and then elsewhere, nothing for programs."""
    if of.as_json:
        yield None
        return
    if not _err.is_terminal:
        last = [0.0]

        def line(progress: jobs.Progress) -> None:
            if time.monotonic() >= last[0] + 5 or progress.rows >= progress.of:
                last[0] = time.monotonic()
                _err.print(f"{progress.rows} of {progress.of} rows", markup=False)

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=_err) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda progress: bar.update(task, completed=progress.rows, total=progress.of)


def _reported(of: _Context, report: jobs.Report) -> None:
    """Print what became of a job, and end with the code that says so."""

    def show() -> None:
        counts = ", ".join(f"{number} {outcome}" for outcome, number in report.counts.items() if number)
        _out.print(f"{report.kind}: {report.state}; {counts or 'no rows'}", markup=False)
        for name, number in report.found.items():
            _out.print(f"  {number} {name}", markup=False)
        for failure in report.failures:
            key = ", ".join(map(str, failure.key))
            _out.print(f"  {failure.table} ({key}) {failure.column}: {failure.reason}", markup=False)
        if report.dark:
            _out.print(f"  dark: {', '.join(report.dark)}; run it again when their KMS answers", markup=False)

    _print(of, {**asdict(report), "failures": [failure._asdict() for failure in report.failures]}, show)
    if report.counts.get("failed"):
        raise typer.Exit(FOUND)
    if report.state not in ("done", "dry run"):
        raise typer.Exit(UNFINISHED)


# -- jobs ------------------------------------------------------------------------------------------------------------

What = Annotated[
    list[str] | None,
    typer.Argument(
        help="Tables (patient) and columns (patient.mrn, by their column ids); all models unless given."
    ),
]
Tenants = Annotated[
    list[str] | None,
    typer.Option("--tenant", help="Only this tenant's rows; may be repeated, in their order."),
]
Workers = Annotated[int, typer.Option(min=1, help="How many processes work at once.")]
Rate = Annotated[float | None, typer.Option(min=1, help="At most so many rows a second, for each worker.")]
PauseFile = Annotated[str | None, typer.Option(help="Wait while a file of this name is there.")]
Below = Annotated[
    tuple[str, float] | None,
    typer.Option(
        help="A query that gives one number, and what it has to stay below, such as a replica's lag."
    ),
]
Gone = Annotated[
    list[str] | None, typer.Option(help="A table that is there no more, under that name; may be repeated.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Store nothing.")]


def _how(of: _Context, workers: int, tell: Callable[[jobs.Progress], None] | None) -> jobs.How:
    how: jobs.How = {"workers": workers}
    if tell is not None:
        how["on_progress"] = tell
    if workers > 1 and of.app is not None:
        how["app"] = of.app
    return how


def _run(
    of: _Context,
    job: Callable[..., jobs.Report],
    what: list[str] | None,
    tenants: list[str] | None,
    workers: int,
    pace: jobs.Pace,
    **options: Any,
) -> None:
    if tenants:
        options["tenants"] = tenants
    with _told(of) as tell:
        options |= {**_how(of, workers, tell), "pace": pace}
        report = job(of.byok, of.engine, *(what or ()), **options)
    _reported(of, report)


@app.command()
def reencrypt(
    context: typer.Context,
    what: What = None,
    tenant: Tenants = None,
    workers: Workers = 1,
    rate: Rate = None,
    pause_file: PauseFile = None,
    below: Below = None,
    dry_run: DryRun = False,
) -> None:
    """Bring all values under the active data keys.

    Example: byok --app shop.db:byok reencrypt --tenant org-42
    """
    pace = jobs.Pace(rate, pause_file, below)
    _run(context.obj, jobs.reencrypt, what, tenant, workers, pace, dry_run=dry_run)


@app.command()
def rehash(
    context: typer.Context,
    what: What = None,
    tenant: Tenants = None,
    workers: Workers = 1,
    rate: Rate = None,
    pause_file: PauseFile = None,
    below: Below = None,
    dry_run: DryRun = False,
    open_search: Annotated[
        bool | None,
        typer.Option("--open-search/--leave-closed", help="Where the table is in several databases."),
    ] = None,
) -> None:
    """Hash rows as the models declare, by the active search salts. No other release may run any more.

    Example: byok --app shop.db:byok rehash patient.mrn
    """
    pace = jobs.Pace(rate, pause_file, below)
    _run(context.obj, jobs.rehash, what, tenant, workers, pace, dry_run=dry_run, open_search=open_search)


@app.command()
def verify(
    context: typer.Context,
    what: What = None,
    repair: Annotated[bool, typer.Option("--repair", help="Mend hashes.")] = False,
    open_search: Annotated[
        bool,
        typer.Option("--open-search", help="Open the search of columns that you have hashed by yourself."),
    ] = False,
    tenant: Tenants = None,
    workers: Workers = 1,
    rate: Rate = None,
    pause_file: PauseFile = None,
    below: Below = None,
    dry_run: DryRun = False,
) -> None:
    """Open every value and compute every hash anew, and tell of each row that is not as it should be.

    Example: byok --app shop.db:byok verify patient
    """
    pace = jobs.Pace(rate, pause_file, below)
    _run(
        context.obj,
        jobs.verify,
        what,
        tenant,
        workers,
        pace,
        dry_run=dry_run,
        repair=repair,
        open_search=open_search,
    )


@app.command()
def leakage(
    context: typer.Context,
    what: What = None,
    tenant: Tenants = None,
    fail_over: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="End with 1 where more than this share of rows can be guessed."),
    ] = None,
) -> None:
    """Tell what search hashes show: how the values of each column are distributed.

    Example: byok --app shop.db:byok leakage patient.city --fail-over 0.1
    """
    of: _Context = context.obj
    found = jobs.leakage(of.byok, of.engine, *(what or ()), tenants=tenant)
    shown = [
        (
            each.tenant, each.column, each.rows, each.distinct, " ".join(f"{share:.1%}" for share in each.largest),
            f"{each.entropy:.1f} bits", f"{each.guessed:.1%}",
        )
        for each in found
    ]  # fmt: skip
    names = ("tenant", "column", "rows", "distinct", "largest", "entropy", "guessed")
    _print(of, [each._asdict() for each in found], lambda: _grid(names, shown))
    if fail_over is not None and any(each.guessed > fail_over for each in found):
        raise typer.Exit(FOUND)


@_jobs.command("list")
def list_jobs(context: typer.Context) -> None:
    """All jobs, the newest first, and how far each is.

    Example: byok --app shop.db:byok jobs list
    """
    of: _Context = context.obj
    found = [(job, of.byok._jobs.progress(job.id)) for job in of.byok._jobs.all()]
    rows = [
        (
            job.id,
            job.kind,
            job.state,
            f"{progress.rows} of {progress.of}",
            job.begun_at.isoformat(timespec="seconds"),
        )
        for job, progress in found
    ]
    content = [dict(zip(("job", "kind", "state", "rows", "begun"), row, strict=True)) for row in rows]
    _print(of, content, lambda: _grid(("job", "kind", "state", "rows", "begun"), rows))


@_jobs.command()
def show(context: typer.Context, job: str) -> None:
    """What became of a job so far, with the rows that failed.

    Example: byok --app shop.db:byok jobs show 4b32595d2e96d15d3f50b9a9a5d5742e
    """
    of: _Context = context.obj
    _reported(of, report_of(of.byok._jobs, of.byok._jobs.get(job)))


@_jobs.command()
def watch(context: typer.Context, job: str) -> None:
    """Show how far a job is, until it is at its end.

    Example: byok --app shop.db:byok jobs watch 4b32595d2e96d15d3f50b9a9a5d5742e
    """
    of: _Context = context.obj
    stored = of.byok._jobs
    with _told(of) as tell:
        while stored.get(job).state == PREPARING or _is_worked_on(stored, job):
            if tell is not None:
                tell(stored.progress(job))
            time.sleep(1)
    _reported(of, report_of(stored, stored.get(job)))


def _is_worked_on(stored: Jobs, job: str) -> bool:
    """Whether anything is left for workers; rows of dark tenants are not, until it is run again."""
    return stored.get(job).state == RUNNING and any(shard.state == OPEN for shard in stored.shards(job))


@_jobs.command()
def pause(context: typer.Context, job: str) -> None:
    """Have the workers of a job stop after the batch that they are at; resume goes on.

    Example: byok --app shop.db:byok jobs pause 4b32595d2e96d15d3f50b9a9a5d5742e
    """
    _set(context.obj, job, PAUSED)


@_jobs.command()
def cancel(context: typer.Context, job: str) -> None:
    """End a job for good. What it has done stays; columns that it was hashing stay closed for searching.

    Example: byok --app shop.db:byok jobs cancel 4b32595d2e96d15d3f50b9a9a5d5742e
    """
    of: _Context = context.obj
    jobs.cancel(of.byok, job)
    _print(of, {"job": job, "state": CANCELLED}, lambda: _out.print(f"{job}: {CANCELLED}", markup=False))


@_jobs.command()
def resume(context: typer.Context, job: str, workers: Workers = 1) -> None:
    """Go on with a job where it was.

    Example: byok --app shop.db:byok jobs resume 4b32595d2e96d15d3f50b9a9a5d5742e
    """
    of: _Context = context.obj
    with _told(of) as tell:
        report = jobs.resume(of.byok, of.engine, job, **_how(of, workers, tell))
    _reported(of, report)


def _set(of: _Context, job: str, state: str) -> None:
    found: Job = of.byok._jobs.get(job)
    if found.state in (CANCELLED, DONE):
        _fail(f"the job is {found.state}")
    of.byok._jobs.set_state(found, state)
    _print(of, {"job": job, "state": state}, lambda: _out.print(f"{job}: {state}", markup=False))


# -- keys and columns --------------------------------------------------------------------------------------------------


@app.command()
def check(
    context: typer.Context,
    what: What = None,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Close the search of what is hashed otherwise than before (21 s)."),
    ] = False,
) -> None:
    """Compare what models declare searchable with what the keystore notes, before a deployment.

    Example: byok --app shop.db:byok check --prepare
    """
    of: _Context = context.obj
    found = of.byok.check(*(what or ()), prepare=prepare)
    _print(of, [each._asdict() for each in found], lambda: _grid(("tenant", "column", "what", "run"), found))
    if found:
        raise typer.Exit(FOUND)


@app.command()
def rotate(
    context: typer.Context, tenant: str, what: What = None, workers: Workers = 1, gone: Gone = None
) -> None:
    """Give a tenant a new data key and search salt, move its rows, and retire the old ones.

    Example: byok --app shop.db:byok rotate org-42
    """
    of: _Context = context.obj
    with _told(of) as tell:
        done = jobs.rotate(
            of.byok, of.engine, tenant, *(what or ()), gone=gone or (), **_how(of, workers, tell)
        )

    def show() -> None:
        for kind, generation in done.retired:
            _out.print(f"retired {kind} {generation}", markup=False)

    _print(of, {"retired": done.retired}, show)


Kind = Annotated[str, typer.Argument(help="data-key or search-salt.")]
Generation = Annotated[int, typer.Argument(help="Its number.")]


@app.command()
def retire(
    context: typer.Context, tenant: str, kind: Kind, generation: Generation, gone: Gone = None
) -> None:
    """Stop reading with a generation that no row needs any more; refused where one does.

    Example: byok --app shop.db:byok retire org-42 data-key 1
    """
    of: _Context = context.obj
    jobs.retire(of.byok, of.engine, tenant, kind, generation, gone=gone or ())
    said = f"retired {kind} {generation}. What seal() made and what backups hold could not be asked"
    _print(of, {"retired": [kind, generation]}, lambda: _out.print(said, markup=False))


@app.command()
def restore(context: typer.Context, tenant: str, kind: Kind, generation: Generation) -> None:
    """Make a retired generation readable again.

    Example: byok --app shop.db:byok restore org-42 data-key 1
    """
    of: _Context = context.obj
    jobs.restore(of.byok, tenant, kind, generation)
    _print(
        of,
        {"restored": [kind, generation]},
        lambda: _out.print(f"readable: {kind} {generation}", markup=False),
    )


@app.command()
def destroy(
    context: typer.Context,
    tenant: str,
    kind: Kind,
    generation: Generation,
    backups_kept: Annotated[
        float, typer.Option(min=0, help="For how many days backups of the rows are kept.")
    ],
    confirm: Annotated[
        str | None, typer.Option(help="The tenant's name once more; asked for on a terminal.")
    ] = None,
) -> None:
    """Delete a retired generation for good. What is under it, in backups too, is lost.

    Example: byok --app shop.db:byok destroy org-42 data-key 1 --backups-kept 90
    """
    of: _Context = context.obj
    if confirm is None:
        if not sys.stdin.isatty():
            _fail("destroying asks twice: give --confirm with the tenant's name", WRONG)
        confirm = typer.prompt(f"{kind} {generation} of {tenant} cannot be had back. Type the tenant's name")
    if confirm != tenant:
        _fail("that is not the tenant's name; nothing was destroyed", WRONG)
    jobs.destroy(of.byok, tenant, kind, generation, backups_kept=backups_kept)
    _print(
        of,
        {"destroyed": [kind, generation]},
        lambda: _out.print(f"destroyed {kind} {generation}", markup=False),
    )


@app.command("set-searchable")
def set_searchable(
    context: typer.Context,
    tenant: str,
    columns: Annotated[
        list[str] | None, typer.Argument(help="Column ids; none of them disables all.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All columns, also those of later releases.")] = False,
    but: Annotated[
        list[str] | None, typer.Option(help="With --all: all but this one; may be repeated.")
    ] = None,
) -> None:
    """Say by which columns a tenant can be searched. What is enabled in a table with rows needs a rehash.

    Example: byok --app shop.db:byok set-searchable org-42 patient.mrn patient.email
    """
    of: _Context = context.obj
    if all_ and columns:
        _fail("give columns or --all, not both", WRONG)
    if columns or but:
        # It refuses what no model declares: a typo would disable all others.
        of.byok.check(*(columns or ()), *(but or ()))
    of.byok.set_searchable(tenant, None if all_ else set(columns or ()), but=set(but or ()))
    found = [each for each in of.byok.check() if each.tenant == tenant]
    _print(of, [each._asdict() for each in found], lambda: _grid(("tenant", "column", "what", "run"), found))


def main() -> None:
    """Run the command; what goes wrong is told in a line."""
    try:
        app()
    except ByokError as error:
        _err.print(f"byok: {error}", markup=False)
        raise SystemExit(FAILED) from None
    except SQLAlchemyError as error:  # its own text has the statement too
        reason = getattr(error, "orig", None) or error
        _err.print(f"byok: the database: {' '.join(str(reason).split())}", markup=False)
        raise SystemExit(FAILED) from None
