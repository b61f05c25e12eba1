"""README, docs and CONTRIBUTING: what they name is there, their commands parse, their numbers are those of the result files."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from markupsafe import escape

from bench import front_page
from fastkd import config, probe
from fastkd.comparison.options import CompareConfig
from fastkd.glue import __main__ as glue
from fastkd.glue.tasks import load_task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "run": config.parse,
    "plan": lambda argv: config.parse(without("--json", argv)),
    "prepare": lambda argv: config.parse([*without(r"--tokens \S+", argv), *ANY_BUDGET]),
    "compare": lambda argv: config.split_options(argv, CompareConfig, "fastkd compare", unchecked),
    "glue": glue.parse,
    "probe": probe.parse,
}
ANY_BUDGET = ["--budget-tokens", "1"]


def unchecked(own: CompareConfig, shared: dict[str, object], explicit: object) -> None:
    """A mention may leave the budget out."""


def without(option: str, argv: list[str]) -> list[str]:
    """The arguments of a command line but one that is no option of a run."""
    return re.sub(option, "", " ".join(argv)).split()


def each_page() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """What a page shows to be typed, and whether it is a whole command, a line of a fence, or a mention in a sentence."""
    text = page.read_text("utf-8")
    for block in re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield from ((re.split(r"\s{2,}#", line)[0], True) for line in block.splitlines())
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from ((mention, False) for mention in re.findall(r"`([^`\n]+)`", text))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_its_table_and_plots_are_those_of_the_results() -> None:
    """Made by ``python -m bench.front_page``; other results need the command again, or this fails."""
    readme = ROOT / "README.md"
    device = front_page.device_shown(readme)
    assert front_page.block(device) in readme.read_text("utf-8")
    for theme in (front_page.LIGHT, front_page.DARK):
        drawn = (ROOT / "docs" / f"{theme.name}.svg").read_text("utf-8")
        assert f'aria-label="{escape(front_page.description(front_page.read(device)))}"' in drawn


def test_the_command_makes_the_page_again(tmp_path: Path) -> None:
    device, text = front_page.device_shown(ROOT / "README.md"), (ROOT / "README.md").read_text("utf-8")
    stale = front_page.BLOCK.sub(f"{front_page.BEGIN.format('abacus')}\nold\n{front_page.END}", text)
    (tmp_path / "README.md").write_text(stale)
    files = front_page.write(device, tmp_path)
    assert files[0].read_text("utf-8") == text
    assert [file.name for file in files[1:]] == ["speed.svg", "speed-dark.svg"] and all(map(Path.is_file, files))


def test_ratios_of_the_table_are_those_of_the_rates() -> None:
    device = front_page.device_shown(ROOT / "README.md")
    path = front_page.RESULTS / device / "throughput.json"
    groups = {(group["method"], group["dtype"]): group["rows"] for group in json.loads(path.read_text())["groups"]}
    for pair in front_page.read(device):
        for dtype, speed in pair.speed.items():
            ours, theirs = (groups[pair.method, dtype][row] for row in ("fastkd", pair.peer))
            assert speed == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
            assert pair.memory[dtype] == pytest.approx(ours["peak_memory_bytes"] / theirs["peak_memory_bytes"])


def test_a_device_that_was_not_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        front_page.main(["--device", "abacus"])
    assert "abacus" in (said := capsys.readouterr().err) and "python -m bench.throughput" in said


@each_page()
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = [*re.findall(r"\]\(([^)#\s]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@each_page()
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:fastkd|kernels|bench|tests|docs)/[\w./-]+)`", page.read_text("utf-8"))
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_the_maps_name_what_is_there() -> None:
    """CONTRIBUTING's roads through the code, each a list of `file:function` or `file:Class.method`."""
    stops = re.findall(r"`([\w/]+\.py):(\w+)(?:\.(\w+))?`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(stops) > 20
    for path, outer, inner in stops:
        tree = ast.parse((ROOT / "fastkd" / path).read_text("utf-8"))
        (found,) = (node for node in tree.body if getattr(node, "name", None) == outer)
        assert not inner or inner in {getattr(node, "name", None) for node in getattr(found, "body", [])}, (path, inner)


@each_page()
def test_modules_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"-m ((?:bench|fastkd)[\w.]*\w)", page.read_text("utf-8")))
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


@each_page()
def test_commands_parse(page: Path) -> None:
    """With the values that they show. A mention may leave the budget out."""
    for command, is_whole in commands(page):
        match = re.match(r"(?:fastkd |.*-m fastkd\.)(run|plan|compare|glue|probe|prepare)\b(.*)", command)
        if match is None or not match[2].strip() or "--method NAME" in command:
            continue
        needs_budget = match[1] in ("run", "plan") and "--budget" not in command and not is_whole
        PARSERS[match[1]]([*shlex.split(match[2]), *(ANY_BUDGET if needs_budget else [])])


def test_the_python_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert sum(map(bool, code.splitlines())) == 5
    names: dict[str, object] = {}
    exec(code.replace("30522", "1000").replace("512", "64"), names)  # the same in a moment
    h_s, W_s = names["h_s"], names["W_s"]
    assert h_s.grad.shape == (64, 384) and W_s.grad.shape == (1000, 384)  # type: ignore[attr-defined]


def test_the_task_file_of_the_docs_is_one(tmp_path: Path) -> None:
    (text,) = [
        block
        for block in re.findall(r"```\n(.*?)```", (ROOT / "docs" / "glue.md").read_text("utf-8"), flags=re.DOTALL)
        if "labels =" in block
    ]
    tomllib.loads(text)
    (tmp_path / "mood.toml").write_text(text)
    assert load_task(tmp_path / "mood.toml").labels == ("sad", "glad", "mad")
