"""GLUE's command as users type it: scored once, killed and continued, refused in one line."""

import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from glue_case import save_student, write_rte, write_sst2
from hub import Hub
from hub_contents import card, parquet
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from fastkd.files import read_jsonl
from fastkd.glue import __main__ as command_line
from fastkd.glue.evaluation import evaluate
from fastkd.glue.examples import read_examples
from fastkd.glue.tasks import TASKS
from fastkd.signals import INTERRUPTED

GLUE = "fastkd.glue.__main__"


@pytest.fixture(scope="module")
def student(quickstart_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"), quickstart_teacher)


@pytest.fixture
def run_folder(student: Path, tmp_path: Path) -> Path:
    """What a finished run leaves behind, as far as GLUE reads it."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "ledger.jsonl").write_text('{"event": "export", "seconds": 1.0, "step": 3, "charged": false}\n')
    (folder / "plan.json").write_text('{"ancestors": ["runs/other", "quickstart"]}')
    subprocess.run(["cp", "-r", str(student), str(folder / "final")], check=True)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sst2(tmp_path / "data")


def glue(*options: object) -> subprocess.CompletedProcess[str]:
    """The command as users type it."""
    argv = [sys.executable, "-m", "fastkd.glue", *map(str, options)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def put_on_hub(hub: Hub, data: Path, *tasks: str) -> None:
    """The rows of official files, in the hub's layout."""
    splits = {"train": "train", "dev": "validation"}
    files = {}
    for task, (split, name) in itertools.product(map(TASKS.__getitem__, tasks), splits.items()):
        found = read_examples(task, split, data)
        columns = dict(zip(task.texts, found.texts, strict=True)) | {"label": found.labels, "idx": range(len(found))}
        files[f"{task.name}/{name}-00000-of-00001.parquet"] = parquet(columns)
    hub.add("datasets", "nyu-mll/glue", {"README.md": card(*tasks, splits=tuple(splits.values())), **files})


def test_a_run_is_scored_once(run_folder: Path, tmp_path: Path, hub: Hub) -> None:
    data = write_rte(write_sst2(tmp_path / "data"))
    options = (run_folder, "--data", data, "--seeds", 2, "--predict-test", "--tasks", "sst2", "--train-rows", "32")
    first = glue(*options)
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    scores = json.loads((run_folder / "glue.json").read_text())
    assert set(scores) == {"sst2"} and scores["sst2"]["accuracy"]["seeds"] == [0, 1]
    text = (run_folder / "final" / "README.md").read_text()
    assert text.startswith("---\nlicense") and "fixed random subset of 32 rows" in text
    assert "fine-tuned on NLI and paraphrase pairs" in text
    result = (ModelCard(text).data.eval_results or [])[0]
    assert (result.dataset_type, result.dataset_config, result.metric_type) == ("nyu-mll/glue", "sst2", "accuracy")
    assert result.metric_value == pytest.approx(scores["sst2"]["accuracy"]["mean"] / 100, abs=1e-5)
    event = json.loads((run_folder / "ledger.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "glue" and event["charged"] is False and event["seconds"] > 0
    assert (event["task"], event["seed"]) == ("sst2", 1), "a line for each fine-tuning: a kill loses none that finished"
    submission = (run_folder / "submission" / "SST-2.tsv").read_text().splitlines()
    assert submission[0] == "index\tprediction" and [line[:2] for line in submission[1:]] == [
        f"{i}\t" for i in range(6)
    ]

    before = snapshot(run_folder)
    again = processes.run(GLUE, *options)
    assert again.returncode == 0 and "2 of them finished before" in again.stdout
    assert snapshot(run_folder) == before

    log: list[str] = []
    put_on_hub(hub, data, "sst2", "rte")
    evaluate(
        run_folder,
        data=None,
        tasks=["sst2", "rte"],
        seeds=2,
        train_rows={"sst2": 32},
        output_dir=run_folder,
        log=log.append,
    )
    assert "4 fine-tunings, 2 of them finished before" in log[1]
    assert set(json.loads((run_folder / "glue.json").read_text())) == {"sst2", "rte"}
    text = (run_folder / "final" / "README.md").read_text()
    assert text.count("## GLUE") == 1
    assert [result.dataset_config for result in ModelCard(text).data.eval_results or []] == ["sst2", "rte"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(process: processes.Command, text: str) -> None:
    assert any(text in line for line in process.stdout), f"{text} never came"


def test_killed_and_issued_again_it_repeats_nothing(run_folder: Path, data: Path) -> None:
    options = (run_folder, "--data", data, "--seeds", 3)
    process = processes.Command(GLUE, *options)
    wait_for(process, "[1/3]")
    process.kill()
    process.finish()
    assert not (run_folder / "glue.json").exists()
    finished = snapshot(run_folder / "glue")
    assert 1 <= len(finished) < 3
    again = processes.run(GLUE, *options)
    assert f"{len(finished)} of them finished before" in again.stdout, again.stderr
    after = snapshot(run_folder / "glue")
    assert len(after) == 3 and finished.items() <= after.items()


def start_two_workers(run_folder: Path, data: Path, command: str = GLUE) -> tuple[processes.Command, list[int]]:
    """An evaluation of two long fine-tunings side by side, and the ids of its workers."""
    write_sst2(data, train=12000)
    process = processes.Command(command, run_folder, "--data", data, "--seeds", 2, "--jobs", 2)
    wait_for(process, "2 at a time")
    children: list[int] = []
    while len(children) < 2:  # multiprocessing's resource tracker is a child too
        ids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [int(pid) for pid in ids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(0.01)  # between two looks
    while any(len(list(Path(f"/proc/{pid}/task").iterdir())) < 2 for pid in children):
        time.sleep(0.01)  # until both wait for their parent's end in a thread
    return process, children


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_their_parent(run_folder: Path, data: Path) -> None:
    process, children = start_two_workers(run_folder, data)
    handles = [os.pidfd_open(pid) for pid in children]
    process.kill()
    process.finish()
    for handle in handles:
        assert select.select([handle], [], [], 120)[0], "a worker outlived its parent"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_dies_is_named(run_folder: Path, data: Path) -> None:
    process, children = start_two_workers(run_folder, data)
    os.kill(max(children), signal.SIGKILL)
    done = process.finish()
    assert done.returncode == 1
    assert "seed 1, died (exit code -9); the same command continues" in done.stderr and done.stderr.count("\n") == 1


IMPATIENT = """
import sys
if __name__ == "__main__":
    from fastkd.glue import __main__ as glue, workers
    workers.PATIENCE = 8.0
    sys.exit(glue.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_is_stopped_is_ended_and_named(run_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    process, children = start_two_workers(run_folder, data, str(tmp_path / "impatient.py"))
    os.kill(max(children), signal.SIGSTOP)
    done = process.finish()
    assert done.returncode == 1
    assert re.search(r"seed 1, said nothing for \d+ s; the same command continues", done.stderr)


def test_a_terminated_evaluation_says_how_to_go_on(run_folder: Path, data: Path) -> None:
    process = processes.Command(GLUE, run_folder, "--data", data, "--seeds", 3)
    wait_for(process, "[1/3]")
    process.send_signal(signal.SIGTERM)
    done = process.finish()
    assert done.returncode == 75 and "the same command continues" in done.stderr
    first, *_, last = [line for line in read_jsonl(run_folder / "ledger.jsonl") if line["event"] == "glue"]
    assert first["seed"] == 0 and last["task"] is None and last["seconds"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_all_processes_of_an_evaluation_is_one_line(run_folder: Path, data: Path) -> None:
    """As a scheduler sends it."""
    process, children = start_two_workers(run_folder, data)
    for number in (*children, process.pid):
        os.kill(number, signal.SIGTERM)
    done = process.finish()
    assert (done.returncode, done.stderr) == (75, INTERRUPTED + "\n")
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def break_layer(folder: Path) -> None:
    weights = load_file(folder / "final" / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, folder / "final" / "model.safetensors", metadata={"format": "pt"})


def break_tokenizer(folder: Path) -> None:
    for path in (folder / "final").glob("tokenizer*"):
        path.unlink()


def unfinish(folder: Path) -> None:
    (folder / "final").rename(folder / "other")


def spoil_card(folder: Path) -> None:
    (folder / "final" / "README.md").write_bytes(b"\xff\xfe\xfa")


REFUSED: dict[str, tuple[Callable[[Path], None] | None, list[str], str]] = {
    "protocol": (None, ["--protocol", "best"], "invalid choice: 'best'"),
    "option": (None, ["--seed", "3"], "unknown option '--seed': --help lists them"),
    "seeds": (None, ["--seeds", "0"], "--seeds must be at least 1, not 0"),
    "task": (None, ["--tasks", "sst2,squad"], "unknown task 'squad': choose from cola"),
    "absent task": (None, ["--tasks", "cola"], "has no folder CoLA"),
    "rows": (None, ["--train-rows", "many"], "--train-rows takes a number from 1, 20000, or one by task"),
    "rows of another task": (None, ["--train-rows", "rte=3"], "--train-rows names 'rte', which is not evaluated"),
    "no rows": (None, ["--train-rows", "0"], "--train-rows takes a number from 1"),
    "card": (spoil_card, [], "README.md is no text file in UTF-8"),
    "data": (None, ["--data", "nowhere"], "--data nowhere is not a folder"),
    "task file": (None, ["--task-file", "absent.toml"], "absent.toml: not a readable TOML file"),
    "weights": (break_layer, [], "lacks bert.encoder.layer.0.output.dense.weight and 0 more weights"),
    "tokenizer": (break_tokenizer, [], "tokenizer"),
    "unfinished": (unfinish, [], "the run is not finished: issue its command again"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_nothing_written(
    case: str, run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, options, message = REFUSED[case]
    if damage is not None:
        damage(run_folder)
    before = snapshot(run_folder)
    assert command_line.main([str(run_folder), "--data", str(data), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert snapshot(run_folder) == before


def test_a_bad_row_is_refused_before_anything_is_written(run_folder: Path, data: Path) -> None:
    with (data / "SST-2" / "dev.tsv").open("a") as file:
        file.write("A row\tmaybe\n")
    before = snapshot(run_folder)
    with pytest.raises(ValueError, match=r"dev\.tsv:42: label 'maybe' is neither one of negative, positive"):
        evaluate(run_folder, data=data)
    assert snapshot(run_folder) == before


def test_weights_that_are_not_finite_are_named(run_folder: Path, data: Path) -> None:
    weights = load_file(run_folder / "final" / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"].fill_(float("nan"))
    save_file(weights, run_folder / "final" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="SST-2, seed 0: the loss is nan; are the model's weights finite"):
        evaluate(run_folder, data=data, seeds=1)


WITHOUT_SKLEARN = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
    del sys.modules[name]
sys.modules["sklearn"] = None
from fastkd.glue.__main__ import main
sys.exit(main())
"""


def test_the_packages_of_the_extra_are_asked_for(run_folder: Path, data: Path, tmp_path: Path) -> None:
    """A process in which scikit-learn cannot be imported."""
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_SKLEARN)
    found = processes.run(str(script), run_folder, "--data", data)
    assert found.returncode == 2
    assert found.stderr == 'error: GLUE needs scikit-learn: pip install "fastkd[glue]"\n'


def test_other_weights_or_rows_are_scored_anew(run_folder: Path, data: Path) -> None:
    log: list[str] = []

    def reused() -> str:
        evaluate(run_folder, data=data, seeds=1, log=log.append)
        return [line for line in log if "finished before" in line][-1].split(", ")[1].split(" of")[0]

    assert reused() == "0" and reused() == "1"
    weights = load_file(run_folder / "final" / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"] += 1
    save_file(weights, run_folder / "final" / "model.safetensors", metadata={"format": "pt"})
    assert reused() == "0" and reused() == "1"
    with (data / "SST-2" / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    assert reused() == "0" and reused() == "1"


def test_scores_beside_the_model_are_no_part_of_it(student: Path, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(student, model)
    evaluate(model, data=data, seeds=1, output_dir=model, log=lambda line: None)
    said: list[str] = []
    evaluate(model, data=data, seeds=1, output_dir=model, log=said.append)
    assert "1 of them finished before" in said.pop(1)
    for result in (model / "glue").iterdir():
        result.write_text("[]")  # valid JSON, but no result
    evaluate(model, data=data, seeds=1, output_dir=model, log=said.append)
    assert any("0 of them finished before" in line for line in said)


def test_a_torn_ledger_line_is_cut_off(run_folder: Path, data: Path) -> None:
    with (run_folder / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"event": "st')
    evaluate(run_folder, data=data, seeds=1, log=lambda line: None)
    assert [line["event"] for line in read_jsonl(run_folder / "ledger.jsonl")] == ["export", "glue"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_files_of_a_model_are_named(name: str, run_folder: Path, data: Path) -> None:
    (run_folder / "final" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"final (cannot be loaded|has no usable tokenizer) \(\w+: "):
        evaluate(run_folder, data=data, seeds=1, log=lambda line: None)


def test_a_file_that_changes_meanwhile_is_noticed(run_folder: Path, data: Path) -> None:
    def change(line: str) -> None:
        if "finished before" in line:
            write_sst2(data, train=97)

    with pytest.raises(ValueError, match=r"SST-2/train\.tsv has changed since the evaluation began"):
        evaluate(run_folder, data=data, seeds=1, log=change)


def test_predictions_that_were_not_asked_for_before_are_made(run_folder: Path, data: Path) -> None:
    evaluate(run_folder, data=data, seeds=1, log=lambda line: None)
    assert evaluate(run_folder, data=data, seeds=1, predict_test=True, log=lambda line: None)["submission"]
    finished = snapshot(run_folder / "glue")
    evaluate(run_folder, data=data, seeds=1, log=lambda line: None)
    assert snapshot(run_folder / "glue") == finished, "predictions are kept where they are not asked for again"


def test_a_task_file_is_scored_beside_glue(student: Path, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "tone.toml").write_text(
        'name = "tone"\ntexts = ["said"]\nlabels = ["low", "mid", "high"]\nmetrics = ["macro_f1"]\n'
        'train = "train.csv"\ndev = "train.csv"\ntest = "test.csv"\n'
    )
    (own / "train.csv").write_text("said,label\n" + "hum,low\nah,mid\neek,high\n" * 8)
    (own / "test.csv").write_text("said\nhum\neek\n")
    result = evaluate(
        student, ["sst2"], data, seeds=1, output_dir=tmp_path / "out", task_files=[own / "tone.toml"], train_rows=16,
        predict_test=True, log=lambda line: None,
    )  # fmt: skip
    assert {name: list(found) for name, found in result["scores"].items()} == {
        "sst2": ["accuracy"],
        "tone": ["macro_f1"],
    }
    assert result["average"] is None
    assert "RTE" in result["missing"] and "SST-2" not in result["missing"]
    answers = (tmp_path / "out" / "submission" / "tone.tsv").read_text().split()
    assert answers[:3] == ["index", "prediction", "0"] and set(answers[3::2]) <= {"low", "mid", "high"}
