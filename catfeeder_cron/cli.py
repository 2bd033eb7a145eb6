"""The command line. What a command needs is imported when it runs, so that `--help` stays quick."""

import logging
import os
import sys
from datetime import UTC, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from catfeeder_cron import __version__
from catfeeder_cron.errors import CatfeederCronError, DatabaseError, JobAborted, JobIsRunning, UnknownJob

if TYPE_CHECKING:
    from catfeeder_cron.config import Settings
    from catfeeder_cron.crons import Crons
    from catfeeder_cron.history import PastRun
    from catfeeder_cron.job import JobReport, Outcome

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
    """Run the command line; errors become one line each on standard error and an exit status."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
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
        status = 0  # typer's answer to a broken pipe: whoever read our output has seen enough
    except OSError as error:
        status = 0 if isinstance(error, BrokenPipeError) else _complain(error, FAILED)
        # Python would try to write what is left once more at exit, and complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _complain(error: object, status: int) -> int:
    for line in str(error).splitlines():
        print(f"catfeeder-cron: {line}", file=sys.stderr)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"catfeeder-cron {__version__}")
        raise typer.Exit


def _duration(text: str) -> timedelta:
    from catfeeder_cron.config import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f'got "{text}", expected {error}') from error


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
    context.obj = config


@app.command()
def start(context: typer.Context) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT."""
    from catfeeder_cron import daemon, logs

    settings = _load(context)
    logs.configure(settings.logging.level, settings.logging.format)
    daemon.run(settings)


@app.command("list")
def list_jobs(context: typer.Context, as_json: Json = False) -> None:
    """Show every configured job: whether it is enabled, its trigger, its next run, its last run and how that ended."""
    from catfeeder_cron import overview, terminal

    settings = _load(context)
    _log_warnings(settings)
    jobs = overview.jobs(settings)
    if as_json:
        terminal.print_json(jobs)
        return
    terminal.print_table(
        ("JOB", "ENABLED", "TRIGGER", "NEXT RUN (UTC)", "LAST RUN (UTC)", "OUTCOME"),
        [
            (
                job["job"],
                "yes" if job["enabled"] else "no",
                job["trigger"],
                (job["next_run"] or "-")[:19].replace("T", " "),
                (job["last_run"] or "-")[:19].replace("T", " "),
                job["last_outcome"] or "-",
            )
            for job in jobs
        ],
    )


@app.command("run-once")
def run_once(
    context: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="The ids of the jobs, in this order.")],
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
    from catfeeder_cron import terminal
    from catfeeder_cron.crons import Crons
    from catfeeder_cron.service import StopSignals

    settings = _load(context)
    _log_warnings(settings)
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
                print(_in_words(report), flush=True)
                for provider, counts in report.by_provider.items():
                    print(f"  {provider}: {_counts_in_words(counts)}", flush=True)
    if as_json:
        terminal.print_json(reports)
    return next(status for status in (FAILED, RUNNING_ELSEWHERE, 0) if status in statuses)


def _run_one(crons: "Crons", job: str, dry_run: bool, wait: timedelta) -> tuple["JobReport", int]:
    from catfeeder_cron import terminal
    from catfeeder_cron.runner import not_run

    try:
        with terminal.progress_bar(job) as progress:
            report = crons.run(job, dry_run=dry_run, wait=wait, progress=progress)
    except JobIsRunning as error:
        _complain(error, RUNNING_ELSEWHERE)
        return not_run(job, "skipped", str(error), dry_run=dry_run), RUNNING_ELSEWHERE
    except (DatabaseError, JobAborted) as error:
        _complain(f"{job}: {error}", FAILED)
        outcome: Outcome = "aborted" if isinstance(error, JobAborted) else "failed"
        return not_run(job, outcome, str(error), dry_run=dry_run), FAILED
    return report, 0 if report.outcome in ("succeeded", "skipped") else FAILED


@app.command()
def history(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of them by default.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show this many at most.")] = 20,
    as_json: Json = False,
) -> None:
    """Show past runs, newest first, and the slots that did not run with the reason.

    For example: catfeeder-cron history clean-tokens --limit 5
    """
    from catfeeder_cron import history as past
    from catfeeder_cron import schema, terminal
    from catfeeder_cron.database import Database

    settings = _load(context)
    if job is not None:
        settings.require_job(job)
    _log_nothing()
    with Database(settings.database) as database:
        schema.require(database)
        runs = past.past_runs(database, job, limit)
        durations = past.durations(database, job)
    if as_json:
        terminal.print_json([run.as_json() for run in runs])
        return
    terminal.print_table(
        ("RUN", "JOB", "SLOT (UTC)", "TRIGGER", "OUTCOME", "STARTED (UTC)", "SECONDS", "DETAILS"),
        [_in_cells(run) for run in runs],
    )
    for each in durations:
        print(
            f"{each.job}: {each.runs} succeeded, median {each.median.total_seconds():.2f} s, "
            f"longest {each.longest.total_seconds():.2f} s"
        )


@app.command()
def forecast(
    context: typer.Context,
    days: Annotated[int, typer.Option(min=0, help="Look this many days ahead.")] = 30,
    as_json: Json = False,
) -> None:
    """Show which OAuth links will need a new login of their user, when and why, and which need it now.

    For example: catfeeder-cron forecast --days 7
    """
    from catfeeder_cron import schema, terminal
    from catfeeder_cron.database import Database
    from catfeeder_cron.renewal.forecast import logins_needed

    settings = _load(context)
    _log_warnings(settings)
    with Database(settings.database) as database:
        schema.ensure(database)
        links = logins_needed(database, settings.database.tables, settings.oauth, timedelta(days=days))
    if as_json:
        terminal.print_json([link.as_json() for link in links])
        return
    terminal.print_table(
        ("OAUTH", "USER", "PROVIDER", "NEEDED", "REASON"),
        [
            (
                str(link.oauth_id),
                "-" if link.user_id is None else str(link.user_id),
                link.provider or "-",
                "now" if link.needed_now else f"{link.needed_at:%Y-%m-%d %H:%M:%S}",
                link.reason,
            )
            for link in links
        ],
    )


@app.command("init-db")
def init_db(
    context: typer.Context,
    with_app_tables: Annotated[bool, typer.Option(help="Create Cat Feeder's own tables too, where missing.")] = False,
    with_indexes: Annotated[bool, typer.Option(help="Create the indexes that the jobs want, where missing.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Create or upgrade the daemon's own schema, catfeeder_cron. Repeating it does no harm."""
    from catfeeder_cron import schema
    from catfeeder_cron.database import Database
    from catfeeder_cron.jobs import built_in
    from catfeeder_cron.schema.application import create_tables
    from catfeeder_cron.schema.indexes import create_indexes

    settings = _load(context)
    _log_nothing()
    tables = settings.database.tables
    wanted = [index for job in built_in().values() for index in job.wanted_indexes]
    done = False
    with Database(settings.database) as database:
        steps = [schema.upgrade(database, dry_run=dry_run)]
        if with_app_tables:
            steps.append(create_tables(database, tables, dry_run=dry_run))
        if with_indexes:
            steps.append(create_indexes(database, tables, wanted, dry_run=dry_run))
        for step in steps:
            for line in step:
                done = True
                print(line, flush=True)
    if not done:
        print("nothing to do")


@app.command()
def demo() -> None:
    """Show the daemon at work on a throw-away PostgreSQL with sample data, until Ctrl-C."""
    from catfeeder_cron.demo import run

    run()


def _load(context: typer.Context) -> "Settings":
    from catfeeder_cron.config import load
    from catfeeder_cron.jobs import built_in

    return load(context.obj, jobs={job.id: job.settings for job in built_in().values()})


def _log_nothing() -> None:
    """A command that tells its own failure in one line logs nothing beside it."""
    from catfeeder_cron import logs

    logs.configure("critical", "console")


def _log_warnings(settings: "Settings") -> None:
    """A command that prints its own results logs what went wrong and nothing else, unless debugging."""
    from catfeeder_cron import logs

    logs.configure("debug" if settings.logging.level == "debug" else "warning", "console")
    # The command tells of an outage itself, in the line of the job that met it.
    logging.getLogger("catfeeder_cron.database").setLevel(logging.CRITICAL)


def _in_cells(run: "PastRun") -> tuple[str, ...]:
    details = [f"{name.replace('_', ' ')} {number}" for name, number in run.counts.items()]
    if run.missed and run.last_slot:
        details.append(f"{run.missed} slots until {run.last_slot.astimezone(UTC):%Y-%m-%d %H:%M:%S}")
    return (
        str(run.run_id),
        run.job,
        f"{run.slot.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if run.slot else "-",
        run.trigger,
        run.outcome or "running",
        f"{run.started_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
        f"{run.duration.total_seconds():.2f}" if run.duration else "-",
        ", ".join([*([run.reason] if run.reason else []), *details]),
    )


def _in_words(report: "JobReport") -> str:
    counts = _counts_in_words(report.counts)
    told = [
        report.outcome.replace("_", " "),
        *([report.reason] if report.reason else []),
        *([counts] if counts else []),
    ]
    return f"{report.job}: {', '.join(told)} ({report.duration.total_seconds():.2f} s)"


def _counts_in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items())
