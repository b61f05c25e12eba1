"""What cannot work is refused in one line with its remedy, exit code 2 (3: budget too small), and nothing is written."""

import shutil
from pathlib import Path

import pytest

from fastkd import pipeline, plan, run

TOKENS = ["--budget-tokens", "12000"]


def refused(options: list[str], capsys, code: int = 2) -> str:
    assert run.main(options) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "nope", *TOKENS], ("nope", "quickstart", "paper-6l")),
        (["--method", "nope", *TOKENS], ("nope", "minilmv2")),
        (["--corpus", "missing/file.txt", *TOKENS], ("missing/file.txt",)),
        ([], ("exactly one budget", "--budget-gpu-hours")),
        ([*TOKENS, "--budget-flops", "1e12"], ("exactly one budget",)),
        (["--budget-gpu-hours", "0"], ("above zero", "0")),
        (["--budget-gpu-hours", "-1"], ("above zero", "-1")),
        (["--budget-gpu-hours", "nan"], ("above zero",)),
        (["--budget-gpu-hours", "much"], ("budget", "much")),
        (["--student", "3L-100H-12A", *TOKENS], ("100", "12", "heads")),
        (["--student", "huge", *TOKENS], ("huge", "3L-384H-12A")),
        (["--temperature", "3", *TOKENS], ("minilmv2", "--temperature", "logit_kd")),
        (["--frobnicate", *TOKENS], ("--frobnicate",)),
        (["--relation-heads", "7", *TOKENS], ("7", "384")),
        (["--teacher-layer", "9", *TOKENS], ("9", "6")),
        (["--method", "mlm", "--teacher", "quickstart", *TOKENS], ("mlm", "--teacher")),
        (["--method", "tinybert", "--student", "4L-384H-12A", *TOKENS], ("6", "4")),
        (["--method", "tinybert", "--student", "3L-384H-6A", *TOKENS], ("heads", "6", "12")),
        (["--init-from-teacher", "--student", "3L-768H-12A", *TOKENS], ("--init-from-teacher", "6L-384H-12A-1536I")),
        (["--init-from-teacher", "--student", "3L-192H-4A", *TOKENS], ("192H-6A or 192H-8A or 192H-12A",)),
        (["--student", "99999999L-384H-12A", *TOKENS], ("--student", "GiB")),
        (["--relation-heads", "0", *TOKENS], ("--relation-heads 0",)),
        (["--teacher-layer", "0", *TOKENS], ("--teacher-layer 0",)),
        (["--batch-tokens", "1000", *TOKENS], ("1000", "2048")),
        (["--batch-tokens", "0", *TOKENS], ("--batch-tokens is 0", "2048")),
        (["--micro-batch", "many", *TOKENS], ("--micro-batch", "auto", "2048", "many")),
        (["--micro-batch", "²", *TOKENS], ("--micro-batch", "auto", "2048", "²")),
        (["--micro-batch", "0", *TOKENS], ("--micro-batch", "auto", "2048", "0")),
        (["--micro-batch", "2000", *TOKENS], ("--micro-batch is 2000", "2048")),
        (["--preset", "../presets/quickstart", *TOKENS], ("../presets/quickstart", "paper-6l")),
        (["--method", "logit_kd", "--temperature", "nan", *TOKENS], ("--temperature", "nan")),
        (["--method", "logit_kd", "--ce-weight", "inf", *TOKENS], ("--ce-weight", "finite")),
        (["--method", "logit_kd", "--divergence", "js", *TOKENS], ("--divergence", "js", "reverse_kl", "mse")),
        (
            ["--method", "logit_kd", "--divergence", "mse", "--as-released", *TOKENS],
            ("--as-released", "--divergence mse"),
        ),
        (["--method", "logit_kd", "--divergence", "mse", "--temperature", "3", *TOKENS], ("--temperature 3", "mse")),
        (["--seed", "1.5", *TOKENS], ("--seed", "1.5")),
        (["--output-dir", "x" * 300, *TOKENS], ("x" * 300, "--output-dir")),
        (["--output-dir", "/dev/null", *TOKENS], ("/dev/null", "--output-dir")),
        (["--log-to", "carrier-pigeon", *TOKENS], ("carrier-pigeon", "tensorboard")),
        (["--lr", "-1", *TOKENS], ("--lr", "-1")),
        (["--warmup", "2", *TOKENS], ("--warmup", "2")),
        (["--teacher", "missing/folder", *TOKENS], ("missing/folder", "--preset quickstart")),
        (["--corpus", "someone/some-dataset", *TOKENS], ("someone/some-dataset", "--preset quickstart")),
        (["--replay", "missing.jsonl", *TOKENS], ("missing.jsonl",)),
        (["--attention", "magic", *TOKENS], ("magic", "sdpa")),
        (["--seq-length", "600", "--batch-tokens", "9600", *TOKENS], ("600", "512")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_configurations(options: list[str], words: tuple[str, ...], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = options if "--preset" in options else ["--preset", "quickstart", *options]
    error = refused(options, capsys)
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_an_empty_corpus(small: list[str], tmp_path: Path, capsys) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n  \n")
    error = refused([*small, "--corpus", str(empty), *TOKENS, "--output-dir", str(tmp_path / "run")], capsys)
    assert "empty.txt" in error
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_the_tokenizer_does_not_know(small: list[str], tmp_path: Path, capsys) -> None:
    """Every word is [UNK], which a student learns to predict at a loss of 0."""
    runes = tmp_path / "runes.txt"
    runes.write_text("\n\n".join("ᚠᚢᚦ ᚨᚱᚲ " * count for count in range(1, 200)))
    error = refused([*small, "--corpus", str(runes), *TOKENS, "--output-dir", str(tmp_path / "run")], capsys)
    assert "100.0% of the corpus's tokens are unknown to the tokenizer" in error
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_teachers(mlm_run: Path, small: list[str], tmp_path: Path, capsys) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(mlm_run / "final")
    tokenizer.add_tokens(["fastkdtoken"])
    tokenizer.save_pretrained(other)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=48)).save_pretrained(other)  # fmt: skip
    capsys.readouterr()
    error = refused([*small, "--tokenizer", str(other), *TOKENS, "--output-dir", str(tmp_path / "run")], capsys)
    assert "tokenizer" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "budget", [["--budget-tokens", "500"], ["--budget-flops", "1000"], ["--budget-gpu-hours", "1e-9"]]
)
def test_a_budget_under_one_step(budget: list[str], light: list[str], tmp_path: Path, capsys) -> None:
    error = refused([*light, *budget, "--output-dir", str(tmp_path / "run")], capsys, code=3)
    assert "one step takes" in error and "--batch-tokens" in error
    assert not (tmp_path / "run").exists()
    assert plan.main([*light, *budget]) == 3


def test_a_folder_that_cannot_be_written(small: list[str], tmp_path: Path, capsys) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "nowhere")
    folders = [file, file / "run", link, link / "run", tmp_path / "new" / ("x" * 300)]
    if Path("/proc").is_dir():
        folders.append(Path("/proc/foo"))  # a folder that says that root may write to it
    for folder in folders:
        assert "--output-dir" in refused([*small, "--method", "mlm", *TOKENS, "--output-dir", str(folder)], capsys)


@pytest.mark.parametrize(
    ("ledger", "words"),
    [
        (b"", "holds no steps"),
        (b'{"event": "setup", "seconds": 1.0}\n', "holds no steps"),
        (bytes(range(256)) * 2, "cannot be read"),
        (b"[" * 100_000 + b"\n{}\n", "cannot be read"),
        (b'{"event": "crash"}\n', "cannot be read"),
        (b'{"progress": 0.5}\n', "cannot be read"),
        (b'{"step": 1, "loss": 2.5}\n', "lacks step 1"),
        (b'{"step": 1, "progress": "half"}\n', "lacks step 1"),
        (b'{"step": 1, "progress": 0}\n', "lacks step 1"),
        (b'{"step": 1, "progress": NaN}\n', "lacks step 1"),
        (b'{"step": 1, "progress": 0.1}\n{"step": 2, "progress": 1.1}\n', "lacks step 2"),
        (b'{"step": 1, "progress": 0.1}\n{"step": 5, "progress": 0.5}\n', "lacks step 2"),  # as in metrics.jsonl
        (None, "is no file"),
    ],
)
def test_a_replay_of_no_ledger(ledger: bytes | None, words: str, small: list[str], tmp_path: Path, capsys) -> None:
    path = tmp_path / "ledger.jsonl"
    path.mkdir() if ledger is None else path.write_bytes(ledger)
    options = [*small, *TOKENS, "--replay", str(path)]
    error = refused([*options, "--output-dir", str(tmp_path / "run")], capsys)
    assert f"--replay {path} {words}" in error and "give the ledger.jsonl of a finished run" in error
    assert not (tmp_path / "run").exists()
    assert plan.main(options) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.toml", None, "is a folder"),
        ("ledger.jsonl", None, "is a folder"),
        ("report.html", None, "is a folder"),
        ("checkpoints", b"", "is not a folder"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    name: str, content: bytes | None, words: str, mlm_run: Path, small: list[str], tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(mlm_run, folder, ignore=shutil.ignore_patterns("final", name))
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    options = [*small, "--method", "mlm", "--budget-tokens", "40000", "--output-dir", str(folder)]
    error = refused(options, capsys)
    assert words in error and str(folder) in error, error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_with_something_else_in_it(small: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    error = refused([*small, *TOKENS, "--output-dir", str(tmp_path)], capsys)
    assert "not empty" in error
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_budget_that_set_up_uses_up_exports_nothing(
    from_scratch: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = pipeline.train
    budget, setup = 0.001, 60.0  # hours, longer than a step on any machine; seconds, longer than the budget
    monkeypatch.setattr(pipeline, "train", lambda *measured, setup_seconds: train(*measured, setup_seconds=setup))
    options = [*from_scratch, "--method", "mlm", "--budget-gpu-hours", str(budget), "--charge", "all"]
    error = refused([*options, "--output-dir", str(tmp_path / "run")], capsys, code=3)
    assert "none is left for a step" in error
    assert not (tmp_path / "run" / "final").exists()
