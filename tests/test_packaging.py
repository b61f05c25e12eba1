"""The checkout and the wheel never shadow Hugging Face's package ``kernels``, and arrows between parts point one way."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHADOW = """
import importlib.util
import fastkd.kernels.linear_kd
import transformers
from transformers import BertModel
spec = importlib.util.find_spec("kernels")
print("regular" if spec is not None and spec.origin is not None else "none")
"""


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_imports_from_the_checkout(installed: bool, tmp_path: Path) -> None:
    """With and without a regular package of the name ``kernels``, such as Hugging Face's, on the path."""
    path = []
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.16.0'\n")
        (tmp_path / "kernels-0.16.0.dist-info").mkdir()
        (tmp_path / "kernels-0.16.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.16.0\n")
        path = [str(tmp_path)]
    code = f"import sys; sys.path[1:1] = {path!r}" + SHADOW
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("regular" if installed else "none")


def test_the_wheel_holds_fastkd_kernels_and_no_top_level_kernels(tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    argv = [sys.executable, "-c", build, str(tmp_path)]
    result = subprocess.run(argv, cwd=copy, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert "fastkd/kernels/linear_kd.py" in names
    assert "fastkd/presets/quickstart.toml" in names
    assert any(name.startswith("fastkd/templates/") for name in names)
    assert {name.split("/")[0] for name in names} == {"fastkd", "fastkd-0.1.0.dist-info"}


def imports(path: Path) -> set[str]:
    """Modules of fastkd that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastkd"):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastkd")}
    return found


@pytest.mark.parametrize("part", ["kernels", "data"])
def test_kernels_and_data_import_nothing_else_of_fastkd(part: str) -> None:
    for path in (ROOT / "fastkd" / part).resolve().glob("*.py"):
        strangers = {name for name in imports(path) if not name.startswith(f"fastkd.{part}")}
        assert strangers <= {"fastkd"}, path


def test_nothing_imports_a_command_but_compare() -> None:
    commands = {"fastkd.run", "fastkd.compare"}
    for path in (ROOT / "fastkd").rglob("*.py"):
        if path.name not in ("compare.py",):
            assert not imports(path) & commands, path
