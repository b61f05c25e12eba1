"""``--config``: what a run wrote is the same run, flags override, mistakes are one line; any text survives the file."""

import dataclasses
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd import compare, config_file, files, run
from fastkd.comparison.options import CompareConfig, check
from fastkd.config import parse, resolve, split_options
from fastkd.run_config import RunConfig

BUDGET = ["--budget-gpu-hours", "1", "--preset", "quickstart"]
SURROGATE = st.characters(categories=["Cs"])
TEXT = st.text(st.one_of(st.characters(), SURROGATE, st.sampled_from("'\"\\\n\r\t\x00\x07\x1b\x7f\x85\u2028#[]=")))


# Options that take some texts only.
CHECKED = {"preset", "method", "student", "micro_batch", "log_to", "replay", "probes"}
OPTIONS = {name: kind for name, kind in config_file.kinds(RunConfig).items() if name not in CHECKED}
TEXTS = {name: TEXT for name, kind in OPTIONS.items() if kind in (str, str | None)} | {
    name: st.lists(TEXT, min_size=1, max_size=3) for name, kind in OPTIONS.items() if kind == list[str]
}


def test_texts_are_options() -> None:
    assert {"teacher", "tokenizer", "corpus", "text_field", "output_dir", "push_to_hub"} <= set(TEXTS)


@given(texts=st.fixed_dictionaries({}, optional=TEXTS))
def test_any_text_reads_back_or_is_refused_before_anything_is_written(
    texts: dict[str, str | list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {"preset": "quickstart", "budget_tokens": 5.0} | texts
    if any("\ud800" <= character <= "\udfff" for text in texts.values() for each in text for character in each):
        with pytest.raises(ValueError, match="is no UTF-8 text") as refused:
            resolve(values)
        assert len(str(refused.value).splitlines()) == 1
        str(refused.value).encode()  # and can be printed
        return
    resolved = resolve(values)
    path = files.write(tmp_path_factory.mktemp("text") / "config.toml", resolved.to_toml())
    assert tomllib.loads(path.read_bytes().decode()).items() >= texts.items()
    again = parse(["--config", str(path)])
    assert again.run == resolved.run and again.method == resolved.method
    assert again.continues(resolved.to_toml()) and resolved.continues(path.read_text("utf-8"))


NAMES = TEXT.map(lambda text: re.sub("[\0/\ud800-\udfff]", "_", text)[:60]).filter(
    lambda name: name not in ("", ".", "..")
)


@given(name=NAMES)
def test_a_run_goes_on_in_a_folder_of_any_name(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("any") / name, ["--output-dir", f"somewhere/{name}"])
    assert parse(["--config", str(path)]).default_output_dir() == path.parent


@given(
    lr=st.floats(1e-9, 10), seed=st.integers(0, 2**63 - 1), minutes=st.floats(0, 1e9), heads=st.integers(1, 2**40),
    compile=st.sampled_from([None, True, False]), budget=st.floats(1e-300, 1e300),
)  # fmt: skip
def test_any_number_reads_back(
    lr: float, seed: int, minutes: float, heads: int, compile: bool | None, budget: float
) -> None:
    resolved = resolve({
        "preset": "quickstart", "budget_flops": budget, "lr": lr, "seed": seed, "checkpoint_minutes": minutes,
        "relation_heads": heads, "compile": compile,
    })  # fmt: skip
    read = tomllib.loads(resolved.to_toml())
    method = read.pop("method_options")
    assert RunConfig(**read) == resolved.run and type(resolved.method)(**method) == resolved.method


RUNS = [
    [],
    ["--method", "mlm"],
    ["--method", "mlm", "--init-from-teacher", "--student", "6L-384H-12A"],
    ["--method", "logit_kd", "--teacher", "runs/larger", "--ce-weight", "0.3", "--as-released"],
    ["--lr", "1e-3", "--corpus", "a.txt", "b [1].txt", "--compile", "false", "--seed", "3"],
    ["--relation-heads", "24", "--log-to", "tensorboard", "--log-every", "3"],
]


@pytest.mark.parametrize("options", RUNS, ids=" ".join)
def test_a_runs_config_is_the_same_run_with_the_same_name(options: list[str], tmp_path: Path) -> None:
    original = parse([*BUDGET, *options])
    path = tmp_path / "run.toml"
    path.write_text(original.to_toml())
    again = parse(["--config", str(path)])
    assert (again.run, again.method) == (original.run, original.method)
    assert again.default_output_dir() == original.default_output_dir()
    assert parse(again.command()[3:]).run == original.run
    assert again.preset_reason == f"named by {path}"


def written(folder: Path, options: list[str]) -> Path:
    """The config.toml of a run in its folder."""
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    (folder / "config.toml").write_text(parse([*BUDGET, *options]).to_toml())
    return folder / "config.toml"


def test_a_config_in_its_folder_goes_on_there_but_another_run_does_not(tmp_path: Path) -> None:
    path = written(tmp_path / "x", ["--seed", "0", "--output-dir", "elsewhere"])
    same = parse(["--config", str(path)])
    assert same.run.output_dir is None and same.default_output_dir() == tmp_path / "x"
    assert parse(["--config", str(path), "--log-every", "3"]).default_output_dir() == tmp_path / "x"
    other = parse(["--config", str(path), "--seed", "1"])
    assert other.run.output_dir is None and other.default_output_dir().parent == Path("runs")
    assert parse(["--config", str(path), "--output-dir", "mine"]).run.output_dir == "mine"
    copied = tmp_path / "copied.toml"
    shutil.copy(path, copied)
    assert parse(["--config", str(copied)]).run.output_dir == "elsewhere"


def test_a_finished_run_is_finished_and_another_folder_repeats_it(mlm_run: Path, tmp_path: Path, capsys) -> None:
    path = mlm_run / "config.toml"
    assert run.main(["--config", str(path)]) == 0
    assert f"{mlm_run} is finished already" in capsys.readouterr().out
    assert run.main(["--config", str(path), "--output-dir", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "final" / "model.safetensors").read_bytes() == (
        mlm_run / "final" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lr", "2e-3"], {"lr": 2e-3, "student": "2L-48H-12A"}),
        (["--budget-tokens", "7"], {"budget_tokens": 7.0, "budget_gpu_hours": None}),
        (["--method", "mlm"], {"method": "mlm", "teacher": None, "tokenizer": "quickstart", "lr": 1e-3}),
        (["--preset", "paper-6l"], {"preset": "paper-6l", "student": "6L-768H-12A", "lr": 1e-3}),
        (["--corpus", "b.txt"], {"corpus": ["b.txt"]}),
    ],
)
def test_the_command_line_overrides_the_file(options: list[str], expected: dict, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(parse([*BUDGET, "--student", "2L-48H-12A", "--lr", "1e-3", "--relation-heads", "24"]).to_toml())
    resolved = parse(["--config", str(path), *options])
    assert {name: getattr(resolved.run, name) for name in expected} == expected
    same_method = resolved.run.method == "minilmv2"
    assert getattr(resolved.method, "relation_heads", None) == (24 if same_method else None)


def test_a_few_options_by_hand_stand_above_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'preset = "quickstart"\nmethod = "logit_kd"\nteacher = "t"\ntemperature = 3\nbudget_gpu_hours = 2\n'
    )
    resolved = parse(["--config", str(path)])
    assert (resolved.run.student, resolved.run.teacher, resolved.method.temperature) == ("3L-384H-12A", "t", 3.0)
    assert resolved == dataclasses.replace(
        parse(["--preset", "quickstart", "--method", "logit_kd", "--teacher", "t", "--temperature", "3",
               "--budget-gpu-hours", "2"]), preset_reason=resolved.preset_reason)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("studnet = '3L-384H-12A'", ("unknown key 'studnet'", "--help")),
        ("temperature = 3.0", ("unknown key 'temperature'",)),
        ("[method_options]\ntemperature = 3.0", ("unknown key 'temperature'",)),
        ("[method_optoins]\nrelation_heads = 3", ("unknown key 'method_optoins'",)),
        ("method_options = 3", ("method_options takes a table, got 3",)),
        ("[method_options]\nrelation_heads = 'many'", ("relation_heads takes a whole number, got 'many'",)),
        ("lr = 'fast'", ("lr takes a number, got 'fast'",)),
        ("lr = true", ("lr takes a number, got True",)),
        ("lr = 20", ("--lr must be between", "20")),
        ("lr = nan", ("--lr must be between", "nan")),
        ("seed = 1.5", ("seed takes a whole number, got 1.5",)),
        ("seed = -1", ("--seed must be between", "-1")),
        ("compile = 'yes'", ("compile takes true or false, got 'yes'",)),
        ("corpus = 'a.txt'", ("corpus takes a list of text in quotes, got 'a.txt'",)),
        ("corpus = [1]", ("corpus takes a list of text in quotes, got [1]",)),
        ("micro_batch = 2048", ("micro_batch takes text in quotes, got 2048",)),
        ("packing = 'tight'", ("packing takes 'documents' or 'full-sentences', got 'tight'",)),
        ("charge = 'all of it'", ("charge takes", "'loop'")),
        ("preset = 3", ("preset takes text in quotes, got 3",)),
        ("preset = 'nope'", ("unknown preset 'nope'", "paper-6l")),
        ("method = 'nope'", ("nope", "minilmv2")),
        ("method = 'mlm'\nteacher = 'quickstart'", ("trains without a teacher",)),
        ("budget_tokens = 1\nbudget_flops = 2", ("exactly one budget",)),
        ("budget_tokens = -1", ("above zero", "-1")),
        ("batch_tokens = 1000", ("1000", "2048")),
        ("lr = @", ("is no TOML", "line 1")),
        (b"lr = '\xff'", ("cannot be read: it is no UTF-8 text",)),
        (None, ("cannot be read: Is a directory",)),
    ],
    ids=str,
)
def test_a_mistake_in_a_file_is_one_line_with_file_and_key(
    content: str | bytes | None, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.mkdir() if content is None else path.write_bytes(content.encode() if isinstance(content, str) else content)
    options = [] if isinstance(content, str) and "budget" in content else ["--budget-tokens", "12000"]
    for command in (run, compare):
        assert command.main(["--config", str(path), *(options if command is run else ["--budget-gpu-hours", "1"])]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}") and error.count("\n") == 1
        assert all(word in error for word in words), error


def test_a_file_that_is_not_there(capsys) -> None:
    assert run.main(["--config", "missing.toml", "--budget-tokens", "9"]) == 2
    assert capsys.readouterr().err == "error: missing.toml cannot be read: No such file or directory\n"


def test_a_comparison_takes_what_holds_for_every_row(tmp_path: Path) -> None:
    options = ["--method", "logit_kd", "--teacher", "t", "--temperature", "3", "--lr", "1e-3", "--charge", "all"]
    path = written(tmp_path / "x", [*options, "--corpus", "a.txt"])
    argv = ["--config", str(path), "--budget-gpu-hours", "2", "--lr", "2e-3"]
    own, shared = split_options(argv, CompareConfig, "", check)
    with pytest.raises(ValueError, match="reads --temperature: leave it out"):
        split_options([*argv, "--temperature", "2"], CompareConfig, "", check)
    assert own.budget_gpu_hours == [2.0]
    assert shared == {"preset": "quickstart", "teacher": "t", "temperature": 3.0, "corpus": ["a.txt"], "lr": 2e-3}


def test_every_kind_of_an_option_has_words() -> None:
    for kind in config_file.kinds(RunConfig).values():
        assert config_file.in_words(kind)
