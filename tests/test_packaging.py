"""The checkout and the wheel never shadow Hugging Face's package ``kernels``, and arrows between parts point one way."""

import ast
import os
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip install .`` builds from a clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "source")], check=True)
    argv = [sys.executable, "-c", build, str(folder)]
    result = subprocess.run(argv, cwd=folder / "source", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "would be ignored" not in result.stdout + result.stderr, "data that setuptools takes for a package"
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_fastkd_kernels_and_no_top_level_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastkd/kernels/linear_kd/__init__.py" in names
    assert {name.split("/")[0] for name in names} == {"fastkd", "fastkd-0.1.0.dist-info"}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    """Presets, templates and all modules, those of a new folder too."""
    source = wheel.parent / "source"
    kernels = {f"fastkd/{path.relative_to(source)}" for path in (source / "kernels").rglob("*.py")}
    rest = {str(path.relative_to(source)) for path in (source / "fastkd").rglob("*") if path.is_file()}
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fastkd/")}
    assert packaged == kernels | {name for name in rest if "/kernels/" not in name and "__pycache__" not in name}


def test_the_source_archive_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
    options = {"check": True, "capture_output": True, "timeout": 120}
    argv = [sys.executable, "-c", build.format("sdist"), str(tmp_path)]
    subprocess.run(argv, cwd=wheel.parent / "source", **options)  # type: ignore[call-overload]
    subprocess.run(["tar", "-xzf", next(tmp_path.glob("*.tar.gz"))], cwd=tmp_path, **options)  # type: ignore[call-overload]
    argv = [sys.executable, "-c", build.format("wheel"), str(tmp_path)]
    subprocess.run(argv, cwd=tmp_path / "fastkd-0.1.0", **options)  # type: ignore[call-overload]
    assert zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist() == zipfile.ZipFile(wheel).namelist()


def test_the_installed_command_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, timeout=120)
    environment = os.environ | {"PYTHONPATH": str(site)}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    version = subprocess.run([site / "bin" / "fastkd", "--version"], **options)  # type: ignore[call-overload]
    assert version.stdout == "fastkd 0.1.0\n"
    shown = subprocess.run([site / "bin" / "fastkd", "run", "--help"], **options)  # type: ignore[call-overload]
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: fastkd run ") and "--config FILE" in shown.stdout


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
    for path in (ROOT / "fastkd" / part).resolve().rglob("*.py"):
        strangers = {name for name in imports(path) if not name.startswith(f"fastkd.{part}")}
        assert strangers <= {"fastkd"}, path


def test_nothing_imports_a_command_but_compare() -> None:
    commands = {"fastkd.run", "fastkd.compare"}
    for path in (ROOT / "fastkd").rglob("*.py"):
        if path.name not in ("compare.py",):
            assert not imports(path) & commands, path
