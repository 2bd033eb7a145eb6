"""Print results: tables on a terminal, plain columns in a pipe, JSON, and a progress bar for a run that takes long."""

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from catfeeder_cron.imports import load
from catfeeder_cron.report import Progress, no_progress


def print_json(document: Any) -> None:
    """Print a document as valid JSON in any encoding of standard output; Python's escapes (`\\xfc`) are not JSON."""
    is_utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    print(json.dumps(document, indent=2, ensure_ascii=not is_utf8))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their headings: with lines on a terminal that is wide enough, elsewhere aligned with spaces."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    if sys.stdout.isatty():
        load("rich.console", "rich.table", "rich.text")
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        console = Console()
        fitting = _narrowed(widths, [columns, *rows], console.width - 3 * len(columns) - 1)
        if fitting:
            table = Table(*(Column(name, width=width) for name, width in zip(columns, fitting, strict=True)))
            for row in rows:
                table.add_row(*(Text(cell, overflow="fold") for cell in row))
            console.print(table)
            return
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _narrowed(widths: Sequence[int], rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Narrow the widest columns until all fit, without breaking words of up to 20 characters; None if that fails."""
    words = [[word for cell in column for word in cell.split()] for column in zip(*rows, strict=True)]
    least = [min(20, max(map(len, column))) for column in words]
    narrowed = list(widths)
    while sum(narrowed) > room:
        wide = [column for column, width in enumerate(narrowed) if width > least[column]]
        if not wide:
            return None
        narrowed[max(wide, key=narrowed.__getitem__)] -= 1
    return narrowed


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Yield the function to which a job reports its progress; on a terminal it shows a bar after the first report."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    load("rich.console", "rich.progress")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)

    def report(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        bar.start()

    try:
        yield report
    finally:
        bar.stop()
