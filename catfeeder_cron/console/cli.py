"""The command line. A command imports what it needs when it runs, so that `--help` stays quick."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from catfeeder_cron.errors import (
    CatfeederCronError,
    ConfigurationError,
    DatabaseError,
    JobAborted,
    JobIsRunning,
    PermissionDenied,
    SchemaProblem,
    UnknownJob,
)
from catfeeder_cron.version import __version__

if TYPE_CHECKING:
    from catfeeder_cron.config import Settings
    from catfeeder_cron.database import Database
    from catfeeder_cron.report import JobReport, Outcome
    from catfeeder_cron.scheduler.crons import Crons

FAILED = 84
WRONG_USAGE = 2
RUNNING_ELSEWHERE = 75

app = typer.Typer(
    name="catfeeder-cron",
    help="The maintenance jobs of a Cat Feeder web backend.",
    epilog="Exit status: 0 done, 84 failed, 2 wrong usage, 75 running elsewhere.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and change nothing.")]


def main() -> NoReturn:
    """Run the command line and exit; an error becomes a line on standard error and an exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Characters that a console can't show become escapes, as they do on standard error by default.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="catfeeder-cron", standalone_mode=False) or 0
        if sys.stdout is not None:  # as it is where a process is started without
            sys.stdout.flush()
    except UnknownJob as error:
        status = _complain(error, WRONG_USAGE)
    except CatfeederCronError as error:
        status = _complain(error, FAILED)
    except typer.Abort:
        status = FAILED
    except typer.TyperException as error:
        status = _complain(error.format_message(), WRONG_USAGE)
    except SystemExit:
        status = 0  # typer exits on a broken pipe: the reader of our output has closed it, which is no failure
    except OSError as error:
        status = 0 if isinstance(error, BrokenPipeError) else _complain(error, FAILED)
        # At exit, Python would write the rest of the output again, and report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _complain(error: object, status: int) -> int:
    from catfeeder_cron.logs.journald import is_journal

    priority = "<3>" if is_journal(sys.stderr) else ""
    for line in str(error).splitlines():
        print(f"{priority}catfeeder-cron: {line}", file=sys.stderr)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"catfeeder-cron {__version__}")
        raise typer.Exit


def _duration(text: str | timedelta) -> timedelta:
    """Return the duration in an option's text; a default is a timedelta already."""
    from catfeeder_cron.times import parse_duration

    try:
        return parse_duration(int(text) if isinstance(text, str) and text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(f'got "{text}", expected {error}') from error


def _some_time(text: str) -> timedelta:
    if not (duration := _duration(text)):
        raise typer.BadParameter(f'got "{text}", expected longer than 0')
    return duration


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The configuration; else $CATFEEDER_CRON_CONFIG, ./config.toml, /etc/catfeeder-cron/config.toml.",
        ),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options that stand before the command, and keep the configuration's path for it."""
    context.obj = config


@app.command()
def start(context: typer.Context) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT; SIGHUP has it read the configuration again.

    For example: catfeeder-cron --config /etc/catfeeder-cron/config.toml start
    """
    import signal

    # Ignored until the daemon handles it: a start reads the configuration anyway.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from catfeeder_cron import logs
    from catfeeder_cron.service import daemon

    logs.use_nonblocking_stderr()
    settings = _load(context)
    logs.configure(settings.logging.level, settings.logging.format)
    daemon.run(settings, lambda: _read(settings.path))


@app.command("list")
def list_jobs(context: typer.Context, as_json: Json = False) -> None:
    """Show every configured job: whether it is enabled, its trigger, its next run, its last run and how that ended.

    For example: catfeeder-cron list
    """
    from catfeeder_cron.console import overview, rendering, terminal

    settings = _read(context.obj, needs_address=False)
    _log_warnings(settings)
    jobs = overview.jobs(settings)
    if as_json:
        terminal.print_json([{key: job[key] for key in overview.LISTED} for job in jobs])
    else:
        rendering.print_jobs(jobs)


@app.command("run-once")
def run_once(
    context: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB", help="The ids of the jobs, in this order.")],
    dry_run: DryRun = False,
    wait: Annotated[
        timedelta,
        typer.Option(
            parser=_duration,
            metavar="DURATION",
            show_default=False,
            help='Wait for a job that runs elsewhere, at most "5m" say.',
        ),
    ] = timedelta(0),
    as_json: Json = False,
) -> int:
    """Run jobs now, one after the other, in this process, enabled or not, and print what each did.

    For example: catfeeder-cron run-once clean-tokens --dry-run
    """
    from catfeeder_cron.console import rendering, terminal
    from catfeeder_cron.scheduler.crons import Crons
    from catfeeder_cron.service.signals import StopSignals

    settings = _load(context)
    _log_warnings(settings)
    if _one_terminal() and settings.logging.level != "debug":
        logging.getLogger("catfeeder_cron.results").setLevel(logging.CRITICAL)
    reports: list[dict[str, Any]] = []
    with StopSignals() as signals, Crons(config=settings) as crons:
        signals.on_request(crons.request_stop)
        for job in jobs:
            crons.find(job)
        statuses = set()
        for job in jobs:
            report, status = _run_one(crons, job, dry_run, wait)
            statuses.add(status)
            if as_json:
                reports.append(report.as_json())
            else:
                print(rendering.in_words(report), flush=True)
    if as_json:
        terminal.print_json(reports)
    return next(status for status in (FAILED, RUNNING_ELSEWHERE, 0) if status in statuses)


def _run_one(crons: "Crons", job: str, dry_run: bool, wait: timedelta) -> tuple["JobReport", int]:
    from catfeeder_cron.console import terminal
    from catfeeder_cron.scheduler.executor import not_run

    try:
        with terminal.progress_bar(job) as progress:
            report = crons.run(job, dry_run=dry_run, wait=wait, progress=progress)
    except JobIsRunning as error:
        if not _one_terminal():
            _complain(error, RUNNING_ELSEWHERE)
        return not_run(job, "skipped", str(error), dry_run=dry_run), RUNNING_ELSEWHERE
    except (DatabaseError, JobAborted) as error:
        if not _one_terminal():
            _complain(f"{job}: {error}", FAILED)
        outcome: Outcome = "aborted" if isinstance(error, JobAborted) else "failed"
        return not_run(job, outcome, str(error), dry_run=dry_run), FAILED
    return report, 0 if report.outcome in ("succeeded", "skipped") else FAILED


def _one_terminal() -> bool:
    """Return whether results and errors go to one terminal, where a failure's reason need not be printed twice."""
    return sys.stdout.isatty() and sys.stderr.isatty()


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the daemons on this database, what each is running, and which jobs are paused or overdue.

    For example: catfeeder-cron status
    """
    from catfeeder_cron.console import overview, rendering, terminal

    with _opened(context) as (settings, database):
        found = overview.status(settings, database)
    if as_json:
        terminal.print_json(found)
    else:
        rendering.print_status(found)


@app.command()
def pause(
    context: typer.Context,
    jobs: Annotated[list[str] | None, typer.Argument(metavar="JOB", help="All of them by default.")] = None,
    duration: Annotated[
        timedelta | None,
        typer.Option("--for", parser=_some_time, metavar="DURATION", help='End by itself, after "2h" say.'),
    ] = None,
    because: Annotated[str | None, typer.Option(metavar="TEXT", help="The reason, for those who look.")] = None,
) -> None:
    """Let no daemon on this database start these jobs, until they are resumed. What is running goes on.

    For example: catfeeder-cron pause clean-tokens --for 2h --because "table is being moved"
    """
    from catfeeder_cron.ledger import pauses

    with _opened(context, jobs or []) as (_, database):
        pauses.pause(database, jobs or [], duration, because)
    print(f"paused: {', '.join(jobs or ['all jobs'])}")


@app.command()
def resume(
    context: typer.Context,
    jobs: Annotated[list[str] | None, typer.Argument(metavar="JOB", help="All of them by default.")] = None,
) -> None:
    """End the pause of these jobs, or every pause. They go on with their next slot.

    For example: catfeeder-cron resume clean-tokens
    """
    from catfeeder_cron.ledger import pauses

    with _opened(context, jobs or []) as (_, database):
        ended = pauses.resume(database, jobs or [])
        still = [pause for pause in pauses.in_force(database) if pause.job == pauses.ALL_JOBS]
    print(f"resumed: {', '.join('all jobs' if job == pauses.ALL_JOBS else job for job in ended) or 'nothing'}")
    if others := [job for job in jobs or [] if job not in ended]:
        print(f"not paused by name: {', '.join(others)}")
    if still:
        print("all jobs are paused still; `catfeeder-cron resume` ends that")


@app.command()
def check(context: typer.Context, as_json: Json = False) -> int:
    """Look whether all that the enabled jobs need is there: each line ok, or a warning or an error with the remedy.

    For example: catfeeder-cron check
    """
    from catfeeder_cron.checks import check as findings_of
    from catfeeder_cron.console import terminal
    from catfeeder_cron.database import Database
    from catfeeder_cron.report import Finding

    _log_nothing()
    try:
        settings = _load(context)
    except ConfigurationError as error:
        findings = [Finding("error", "configuration", fault) for fault in error.faults]
    else:
        with Database(settings.database) as database:
            findings = list(findings_of(settings, database))
    if as_json:
        terminal.print_json([finding.as_json() for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.level + ':':<8} {finding.subject}: {finding.message}")
    return FAILED if any(finding.level == "error" for finding in findings) else 0


@app.command()
def history(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="One job; all of them by default.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show this many at most.")] = 20,
    as_json: Json = False,
) -> None:
    """Show past runs, newest first, and the slots that did not run with the reason.

    For example: catfeeder-cron history clean-tokens --limit 5
    """
    from catfeeder_cron.console import rendering, terminal
    from catfeeder_cron.ledger import history as past

    with _opened(context, [job] if job else []) as (_, database):
        runs = past.past_runs(database, job, limit)
        durations = past.durations(database, job)
    if as_json:
        terminal.print_json([run.as_json() for run in runs])
    else:
        rendering.print_history(runs, durations)


@app.command()
def forecast(
    context: typer.Context,
    days: Annotated[int, typer.Option(min=0, max=36500, help="Look this many days ahead.")] = 30,
    as_json: Json = False,
) -> None:
    """Show which OAuth links will need a new login of their user, when and why, and which need it now.

    For example: catfeeder-cron forecast --days 7
    """
    from catfeeder_cron.console import rendering, terminal
    from catfeeder_cron.database import Database, schema
    from catfeeder_cron.renewal.forecast import logins_needed

    settings = _load(context)
    _log_warnings(settings)
    with Database(settings.database) as database:
        schema.ensure(database)
        links = logins_needed(database, settings.database.tables, settings.oauth, timedelta(days=days))
    if as_json:
        terminal.print_json([link.as_json() for link in links])
    elif links:
        rendering.print_forecast(links)
    else:
        print(f"no link needs a new login within {days} days, as far as is known")


@app.command("init-db")
def init_db(
    context: typer.Context,
    with_app_tables: Annotated[bool, typer.Option(help="Create Cat Feeder's own tables too, where missing.")] = False,
    with_indexes: Annotated[bool, typer.Option(help="Create the indexes that the jobs want, where missing.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Create or upgrade the daemon's own schema, catfeeder_cron. Repeating it does no harm.

    For example: catfeeder-cron init-db --with-indexes --dry-run
    """
    from catfeeder_cron.database import Database, schema
    from catfeeder_cron.database.schema.application import create_tables
    from catfeeder_cron.database.schema.indexes import create_indexes
    from catfeeder_cron.jobs import built_in

    settings = _load(context)
    _log_nothing()
    tables = settings.database.tables
    jobs = built_in().values()
    wanted = [index for job in jobs for index in job.wanted_indexes]
    enabled = [job for job in jobs if settings.jobs[job.id].enabled]
    needed = [use.table for job in enabled for use in job.tables if not use.optional]
    if with_app_tables and dry_run:
        needed = []  # without --dry-run they would have been created by then
    done = False
    with Database(settings.database) as database:
        steps = [schema.upgrade(database, dry_run=dry_run)]
        if with_app_tables:
            steps.append(create_tables(database, tables, dry_run=dry_run))
        if with_indexes:
            steps.append(create_indexes(database, tables, wanted, needed=needed, dry_run=dry_run))
        try:
            for line in chain.from_iterable(steps):
                done = True
                print(line, flush=True)
        except PermissionDenied as error:
            raise SchemaProblem(f"{error.found}; run `init-db` as the owner of the database and its tables") from None
    if not done:
        print("nothing to do")


@app.command()
def demo() -> None:
    """Show the daemon at work on a throw-away PostgreSQL with sample data, until Ctrl-C."""
    from catfeeder_cron.demo.run import run

    run()


def _load(context: typer.Context) -> "Settings":
    return _read(context.obj)


def _read(path: Path | None, *, needs_address: bool = True) -> "Settings":
    from catfeeder_cron.jobs import load_settings

    return load_settings(path, needs_address=needs_address)


@contextmanager
def _opened(context: typer.Context, jobs: Iterable[str] = ()) -> Iterator[tuple["Settings", "Database"]]:
    """Yield the configuration and its database. Raises UnknownJob for a job that is not in it, and SchemaProblem."""
    from catfeeder_cron.database import Database, schema

    settings = _load(context)
    for job in jobs:
        settings.require_job(job)
    _log_nothing()
    with Database(settings.database) as database:
        schema.require(database)
        yield settings, database


def _log_nothing() -> None:
    """Switch logging off, for a command that prints its failure itself, in one line."""
    from catfeeder_cron import logs

    logs.configure("critical", "console")


def _log_warnings(settings: "Settings") -> None:
    """Log only warnings and errors, unless debugging, for a command that prints its own results."""
    from catfeeder_cron import logs

    logs.configure("debug" if settings.logging.level == "debug" else "warning", "console")
    # The command prints an outage itself, in the line of the job that met it.
    logging.getLogger("catfeeder_cron.database").setLevel(logging.CRITICAL)
    # The output of jobs is shown, too.
    for name in ("catfeeder_cron.output", "catfeeder_cron.jobs"):
        logging.getLogger(name).setLevel(logging.INFO)
