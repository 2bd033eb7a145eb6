"""Write the manual page from the texts of `--help`: `python -m catfeeder_cron.console.manual > catfeeder-cron.1`."""

from typing import Any

import typer

from catfeeder_cron.console.cli import app
from catfeeder_cron.version import __version__

_ENVIRONMENT = {
    "CATFEEDER_CRON_CONFIG": "The configuration, where --config names none.",
    "CATFEEDER_CRON_DATABASE_URL": "The database's address; goes before every other place where one stands.",
    "CREDENTIALS_DIRECTORY": "Set by systemd. The file database-url in it holds the database's address; goes before "
    "url and url_file in the configuration.",
    "STATE_DIRECTORY": "Set by systemd. Where received OAuth tokens are kept until they are stored; must survive a "
    "restart.",
    "PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGSSLMODE, ...": "libpq's own, as is ~/.pgpass: for what the "
    "database's address leaves out.",
    "NO_COLOR": "Log entries on a terminal have no colours.",
}
_FILES = {
    "./config.toml, /etc/catfeeder-cron/config.toml": "The configuration: the first of them, where none is named. One "
    "that others may write is refused.",
    "/etc/catfeeder-cron/database-url": "The database's address on an installed machine, for root alone (mode 0600).",
    "/var/lib/catfeeder-cron, ~/.local/state/catfeeder-cron": "In place of $STATE_DIRECTORY: the first where it is "
    "there and may be written to, else the second.",
}


def page() -> str:
    """Return the page in roff's man macros (man(7))."""
    program: Any = typer.main.get_command(app)
    lines = [
        f'.TH CATFEEDER-CRON 1 "" "catfeeder-cron {__version__}" "User Commands"',
        ".SH NAME",
        "catfeeder-cron \\- the maintenance jobs of a Cat Feeder web backend",
        ".SH SYNOPSIS",
        ".B catfeeder-cron",
        "[\\fB\\-\\-config\\fR \\fIPATH\\fR] \\fICOMMAND\\fR [\\fIARGUMENT\\fR]...",
        ".SH DESCRIPTION",
        _escaped(program.help),
        ".SH OPTIONS",
        *_options(program),
        ".SH COMMANDS",
    ]
    for name, command in program.commands.items():
        arguments = " ".join(map(_usage, _parameters(command, "argument")))
        lines += [f".SS {_escaped(name)} {_escaped(arguments)}".rstrip(), _escaped(command.help), *_options(command)]
    lines += [".SH EXIT STATUS", _escaped(program.epilog.removeprefix("Exit status: "))]
    lines += [".SH ENVIRONMENT", *_list(_ENVIRONMENT), ".SH FILES", *_list(_FILES)]
    lines += [".SH SEE ALSO", ".BR crontab (5),", ".BR journalctl (1)"]
    return "\n".join(lines) + "\n"


def _parameters(command: Any, kind: str) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == kind and not parameter.hidden]


def _usage(argument: Any) -> str:
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return f"{name}..." if argument.nargs == -1 else name


def _options(command: Any) -> list[str]:
    lines = []
    for option in _parameters(command, "option"):
        names = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in option.opts)
        value = "" if option.is_flag else f" \\fI{_escaped(option.metavar or 'N')}\\fR"
        lines += [".TP", names + value, _escaped(option.help or "")]
    return lines


def _list(explained: dict[str, str]) -> list[str]:
    return [line for name, text in explained.items() for line in (".TP", f"\\fB{_escaped(name)}\\fR", _escaped(text))]


def _escaped(text: str) -> str:
    """Return the text with all characters escaped that have a meaning in roff."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti")
    lines = (line.strip() for line in escaped.strip().splitlines())
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line or ".PP" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
