"""The manual page, written from the texts of `--help`: `python -m catfeeder_cron.manual > catfeeder-cron.1`."""

from typing import Any

import typer

from catfeeder_cron import __version__
from catfeeder_cron.cli import app


def page() -> str:
    """Return the page in the man macros of roff (man(7))."""
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
    lines += [".SH FILES", _escaped("./config.toml, /etc/catfeeder-cron/config.toml")]
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


def _escaped(text: str) -> str:
    """Keep roff from reading anything into the text."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    lines = (line.strip() for line in escaped.strip().splitlines())
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line or ".PP" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
