"""The shape of the tree: which way imports point, how deep they go, how long files and functions are."""

import ast
import dataclasses
from functools import cache
from pathlib import Path

import pytest

from fastkd.setup import Setup

ROOT = Path(__file__).parents[1]
LONGEST_CHAIN, LONGEST_FILE, LONGEST_FUNCTION = 10, 400, 60
COMMANDS = {f"fastkd.{name}" for name in ("run", "plan", "compare", "prepare", "probe", "glue.__main__", "__main__")}
FOLDERS = ("fastkd", "kernels", "bench", "tests")
# A link, such as fastkd/kernels, is not entered.
FILES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


def named(path: Path) -> str:
    """A file's name as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(("fastkd", *parts) if parts[0] == "kernels" else parts)
    return name.removesuffix(".__init__")


MODULES = {named(path): path for path in FILES if path.relative_to(ROOT).parts[0] in ("fastkd", "kernels")}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the project that one imports, within its functions too, but not those for annotations."""
    found: set[str] = set()
    statements: list[ast.AST] = list(ast.parse(MODULES[module].read_text("utf-8")).body)
    while statements:
        match statements.pop():
            case ast.Import(names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=base, names=names):
                found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else f"{base}" for alias in names}
            case ast.If(test=ast.Name("TYPE_CHECKING"), orelse=others):
                statements += others
            case statement:
                statements += [
                    node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt | ast.excepthandler)
                ]
    return frozenset(found & MODULES.keys() - {module})


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest way down from a module, itself included. A circle of imports has no end: RecursionError."""
    return (module, *max(map(chain, sorted(imports(module))), key=len, default=()))


def test_no_chain_of_imports_is_long_and_none_is_a_circle() -> None:
    longest = max(map(chain, MODULES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " → ".join(longest)


def test_nothing_imports_a_command() -> None:
    users = {(module, command) for module in MODULES for command in imports(module) & COMMANDS}
    assert users == set()


@pytest.mark.parametrize("folder", ["data", "kernels"])
def test_data_and_kernels_import_nothing_else_of_the_project(folder: str) -> None:
    inside = f"fastkd.{folder}"
    outside = {name for module in MODULES if module.startswith(f"{inside}.") for name in imports(module)}
    assert {name for name in outside if not name.startswith(inside)} <= {"fastkd"}  # its version


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= LONGEST_FILE
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_a_setup_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        object.__new__(Setup).lr = 1.0
