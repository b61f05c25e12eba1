"""The run command, as users type it: every method and unit, its folder, its books, its refusals."""

import itertools
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from fastkd import run
from fastkd.files import read_jsonl
from fastkd.glue.model import find_model
from fastkd.ledger import surviving_steps
from fastkd.models import hf
from fastkd.reports.page import QUICKSTART_TEACHER_NOTE
from fastkd.run_folder import read_run

BUDGET = ["--budget-tokens", "12000"]
ONE_STEP = ["--batch-tokens", "512", "--budget-tokens", "600"]
RELATION_METHODS = ("tinybert", "minilm", "minilmv2")


def do(options: list[str], folder: Path) -> int:
    return run.main([*options, "--output-dir", str(folder)])


@pytest.fixture(scope="module")
def distilled(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of minilmv2 with the quickstart teacher, saved after each step."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    assert do([*small, "--method", "minilmv2", "--checkpoint-minutes", "0", *BUDGET], folder) == 0
    return folder


def padding_and_truncation(folder: Path) -> tuple[object, object]:
    """As a tokenizer.json has them, whatever fields its version leaves at their defaults."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.padding, tokenizer.truncation


@pytest.mark.parametrize(
    "method",
    [name if name == "minilmv2" else pytest.param(name, marks=pytest.mark.exhaustive) for name in RELATION_METHODS],
)
def test_relation_methods_run_with_the_quickstart_teacher(
    method: str, small: list[str], tmp_path: Path, quickstart_teacher: Path, request: pytest.FixtureRequest
) -> None:
    if method == "minilmv2":
        folder = request.getfixturevalue("distilled")
    else:
        folder = tmp_path / "run"
        assert do([*small, "--method", method, "--budget-tokens", "3200"], folder) == 0
    names = {path.name for path in folder.iterdir()}
    expected = {
        "config.toml",
        "environment.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "final",
        "report.html",
    }
    assert expected <= names
    last = read_jsonl(folder / "ledger.jsonl")[-4]
    assert last["flops"]["teacher"] > 0
    assert json.loads((folder / "final" / "config.json").read_text())["architectures"] == ["BertModel"]
    assert padding_and_truncation(folder / "final") == padding_and_truncation(quickstart_teacher)
    assert "was **not** trained" in (folder / "final" / "README.md").read_text()


def test_mlm_runs_without_a_teacher_and_exports_its_head(mlm_run: Path, quickstart_teacher: Path) -> None:
    steps = surviving_steps(mlm_run / "ledger.jsonl")
    assert steps[-1]["flops"]["teacher"] == 0
    assert padding_and_truncation(mlm_run / "final") == padding_and_truncation(quickstart_teacher)
    assert "teacher" not in tomllib.loads((mlm_run / "config.toml").read_text())
    assert AutoModelForMaskedLM.from_pretrained(mlm_run / "final").config.num_hidden_layers == 2
    # Trained on sequences of 32 tokens: the position table is longer, what was trained of it is not.
    assert AutoTokenizer.from_pretrained(mlm_run / "final").model_max_length == 32
    assert "sequences of at most 32 tokens" in (mlm_run / "final" / "README.md").read_text()
    first, last = _first_and_last_validation(mlm_run)
    assert last["loss"] < first["loss"]
    assert 0 <= last["accuracy"] <= 1


def _first_and_last_validation(folder: Path) -> tuple[dict, dict]:
    validations = [x for x in read_jsonl(folder / "metrics.jsonl") if x.get("event") == "validation"]
    return validations[0], validations[-1]


def test_logit_kd_takes_a_finished_mlm_run(mlm_run: Path, small: list[str], tmp_path: Path) -> None:
    options = [*small, "--method", "logit_kd", "--teacher", str(mlm_run), *BUDGET]
    assert do(options, tmp_path / "run") == 0
    parts = next(x for x in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "parts" in x)["parts"]
    assert set(parts) == {"kl", "ce"}


def test_logit_kd_refuses_a_teacher_without_a_head(small: list[str], tmp_path: Path, capsys) -> None:
    assert do([*small, "--method", "logit_kd", *BUDGET], tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "no MLM head" in error and "--method mlm" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_student_that_transformers_loads_is_the_student(distilled: Path) -> None:
    model = AutoModel.from_pretrained(distilled / "final", attn_implementation="eager").eval()
    loaded = hf.load(distilled)
    trained = load_file(sorted((distilled / "checkpoints").iterdir())[-1] / "model.safetensors")
    word_embeddings = model.get_input_embeddings().weight
    assert torch.equal(word_embeddings, trained["student.word_embeddings.weight"])
    assert torch.equal(loaded.encoder.word_embeddings.weight, word_embeddings)
    assert AutoTokenizer.from_pretrained(distilled / "final")("Hello world")["input_ids"][0] == 101


@pytest.mark.parametrize(
    ("flag", "amount", "spent"),
    [
        ("--budget-tokens", 12000, lambda line: line["tokens"]["real"]),
        ("--budget-flops", 5e9, lambda line: sum(line["flops"].values())),
        ("--budget-gpu-hours", 0.0005, lambda line: line["charged_s"] / 3600),
    ],
)
def test_every_unit_is_spent_to_within_a_step(
    flag: str, amount: float, spent, from_scratch: list[str], tmp_path: Path
) -> None:
    assert do([*from_scratch, "--method", "mlm", flag, str(amount)], tmp_path / "run") == 0
    steps = surviving_steps(tmp_path / "run" / "ledger.jsonl")
    amounts = [0.0, *map(spent, steps)]
    longest = max(after - before for before, after in itertools.pairwise(amounts))
    slack = 0.5 if flag == "--budget-gpu-hours" else 0.0  # seconds are predicted, the others are known
    assert -2 * slack * longest <= amount - amounts[-1] <= (1.1 + slack) * longest
    assert steps[-1]["lr"] <= 0.0101 * 1e-3
    assert steps[-1]["progress"] == 1.0


def test_phases_and_events_sum_to_the_wall_clock(distilled: Path) -> None:
    lines = read_jsonl(distilled / "ledger.jsonl")
    phases = sum(sum(line["phase_s"].values()) for line in lines if "event" not in line)
    events = sum(line["seconds"] for line in lines if line.get("charged"))
    charged = [line for line in lines if "event" not in line][-1]["charged_s"]
    assert phases + events == pytest.approx(lines[-1]["charged_s"], rel=1e-6)
    assert phases + sum(x["seconds"] for x in lines[:-3] if x.get("charged")) >= charged - 1e-6


def test_a_seed_gives_identical_parameters_and_another_gives_others(light: list[str], tmp_path: Path) -> None:
    students = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert do([*light, "--method", "minilmv2", "--seed", str(seed), *BUDGET], tmp_path / name) == 0
        students.append(load_file(tmp_path / name / "final" / "model.safetensors"))
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
    assert not torch.equal(
        students[0]["embeddings.word_embeddings.weight"], students[2]["embeddings.word_embeddings.weight"]
    )


def test_a_gpu_second_run_is_replayed_bit_for_bit(light: list[str], tmp_path: Path) -> None:
    options = [*light, "--method", "minilmv2", "--batch-tokens", "512", "--budget-gpu-hours", "0.0006"]
    assert do(options, tmp_path / "run") == 0
    assert do([*options, "--replay", str(tmp_path / "run" / "ledger.jsonl")], tmp_path / "replay") == 0
    run_, replay = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "replay"))
    assert all(torch.equal(run_[key], replay[key]) for key in run_)


def test_a_run_that_diverges_says_so(small: list[str], mlm_run: Path, tmp_path: Path, capsys) -> None:
    assert do([*small, "--method", "mlm", *BUDGET, "--lr", "10"], tmp_path / "run") == 0
    first, last = _first_and_last_validation(tmp_path / "run")
    assert last["loss"] is None or last["loss"] > first["loss"]
    warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    assert "held-out loss" in warning and "--lr than 10" in warning
    text = "give a smaller --lr than"
    assert all(text in (tmp_path / "run" / name).read_text() for name in ("report.html", "final/README.md"))
    assert not any(text in (mlm_run / name).read_text() for name in ("report.html", "final/README.md"))


def test_the_same_command_again_says_that_it_is_done(mlm_run: Path, small: list[str], capsys) -> None:
    before = (mlm_run / "ledger.jsonl").read_bytes()
    options = [*small, "--method", "mlm", "--budget-tokens", "40000"]
    assert do(options, mlm_run) == 0
    assert "finished already" in capsys.readouterr().out
    assert (mlm_run / "ledger.jsonl").read_bytes() == before


def test_a_run_of_an_older_version_is_resumed_and_reported(mlm_run: Path, small: list[str], tmp_path: Path) -> None:
    """Its folder knows nothing of what later versions added."""
    folder = tmp_path / "older"
    shutil.copytree(mlm_run, folder, ignore=shutil.ignore_patterns("final", "report.html", ".begun.json"))
    config, plan = folder / "config.toml", folder / "plan.json"
    kept = [line for line in config.read_text().splitlines(keepends=True) if not line.startswith("residual")]
    config.write_text("".join(kept))
    younger = ("residual", "attention_remark")
    plan.write_text(
        json.dumps({name: value for name, value in json.loads(plan.read_text()).items() if name not in younger})
    )
    assert do([*small, "--method", "mlm", "--budget-tokens", "40000"], folder) == 0
    assert (folder / "final" / "model.safetensors").exists() and (folder / "report.html").exists()


def test_another_configuration_is_refused_in_the_same_folder(mlm_run: Path, small: list[str], capsys) -> None:
    assert do([*small, "--method", "mlm", "--budget-tokens", "50000"], mlm_run) == 2
    assert "another configuration" in capsys.readouterr().err


def test_init_from_teacher_copies_every_other_layer(small: list[str], quickstart_teacher: Path, tmp_path: Path) -> None:
    options = [*small, "--method", "minilmv2", "--init-from-teacher", "--student", "3L-384H-12A", *ONE_STEP]
    assert do(options, tmp_path / "run") == 0
    student, teacher = hf.load(tmp_path / "run").encoder, hf.load(quickstart_teacher).encoder
    for number, source in enumerate((0, 2, 4)):
        copied = student.layers[number].attention_output.weight - teacher.layers[source].attention_output.weight
        assert copied.abs().max() < 1e-4  # one step at the final learning rate


def test_mlm_goes_on_from_a_teachers_weights(small: list[str], quickstart_teacher: Path, tmp_path: Path) -> None:
    going_on, student = tmp_path / "going-on", tmp_path / "student"
    options = ["--method", "mlm", "--init-from-teacher", "--student", "6L-384H-12A", *ONE_STEP]
    assert do([*small, *options], going_on) == 0
    model, teacher = hf.load(going_on).encoder, hf.load(quickstart_teacher).encoder
    for mine, theirs in zip(model.layers, teacher.layers, strict=True):
        assert (mine.attention_output.weight - theirs.attention_output.weight).abs().max() < 1e-4
    first = read_run(going_on)
    assert first.plan["student"]["start"] == "quickstart" and first.plan["teacher"] is None
    assert all(step["flops"]["teacher"] == 0 == step["phase_s"]["teacher"] for step in first.steps)

    options = ["--method", "logit_kd", "--teacher", str(going_on), *ONE_STEP]
    assert do([*small, *options], student) == 0
    assert read_run(student).plan["ancestors"] == [str(going_on), "quickstart"]
    assert all(find_model(folder).saw_pairs for folder in (going_on, student))
    assert all(
        QUICKSTART_TEACHER_NOTE in (folder / "final" / "README.md").read_text() for folder in (going_on, student)
    )


@pytest.mark.parametrize(
    "extra", [["--as-released"], ["--as-released", "--method", "tinybert", "--student", "2L-192H-12A"]]
)
def test_released_objectives_run(extra: list[str], light: list[str], tmp_path: Path) -> None:
    assert do([*light, *BUDGET, *extra], tmp_path / "run") == 0


def test_the_devices_clock_is_the_ledgers(distilled: Path) -> None:
    for line in surviving_steps(distilled / "ledger.jsonl"):
        assert set(line["phase_s"]) == {
            "data", "teacher", "student", "loss", "backward", "optimizer", "communication", "other",
        }  # fmt: skip
        assert all(seconds >= 0 for seconds in line["phase_s"].values())
        assert re.fullmatch(r"[\d.e-]+", str(line["charged_s"]))
