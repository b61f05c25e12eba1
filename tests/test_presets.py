"""The paper's presets as they are, through a hub that has their models and data under the real names, but small."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import hub as test_hub
import made_model
import numpy as np
import pytest
import torch
from hub_contents import card, parquet
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from fastkd import run

SMALL = ["--student", "2L-48H-12A", "--batch-tokens", "1024", "--seq-length", "32", "--dtype", "float32"]
CARD = card("20231101.en")


@pytest.fixture
def papers(hub: test_hub.Hub, made_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> test_hub.Hub:
    """A hub with what the presets name."""
    model = {path.name: path for path in made_teacher.iterdir()}
    for name in ("google-bert/bert-base-uncased", "google-bert/bert-large-uncased"):
        hub.add("models", name, {"README.md": f"# {name}\n", "rust_model.ot": b"not read", **model})
    articles, sentences = (
        made_model.texts(120),
        [f"{line}." for text in made_model.texts(60, seed=1) for line in text.split(". ")],
    )
    wiki = {
        f"20231101.en/train-{file:05}-of-00003.parquet": parquet(
            {"id": list(map(str, range(40))), "title": ["t"] * 40, "text": articles[40 * file : 40 * file + 40]}
        )
        for file in range(3)
    }
    hub.add("datasets", "wikimedia/wikipedia", {"README.md": CARD, **wiki})
    hub.add("datasets", "bookcorpus/bookcorpus", {"README.md": "---\n---\n", "bookcorpus.py": "raise SystemExit\n"})
    rows = {"plain_text/train/0000.parquet": parquet({"text": sentences})}
    hub.add("datasets", "bookcorpus/bookcorpus", rows, "refs/convert/parquet")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


def test_paper_6l_runs_by_the_bare_command_and_is_pushed(
    papers: test_hub.Hub, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The student on the hub is the one here, loads as a SentenceTransformer, and says what it is made from."""
    folder = tmp_path / "run"
    argv = command("run", "--preset", "paper-6l", "--budget-gpu-hours", "0.001", *SMALL)
    argv += ["--output-dir", str(folder), "--push-to-hub", "student"]
    first = subprocess.run(argv, env=os.environ | {"HF_HOME": str(tmp_path / "home")}, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert not any("rust_model" in request for request in papers.requests)
    pushed = papers.repositories["models", "someone/student"]
    tree = pushed.commits[pushed.branches["main"]]
    final = {
        path.relative_to(folder / "final").as_posix(): path for path in (folder / "final").rglob("*") if path.is_file()
    }
    assert {name: b"".join(blob.read()) for name, blob in tree.items() if name != ".gitattributes"} == {
        name: path.read_bytes() for name, path in final.items()
    }
    metadata = ModelCard.load(folder / "final" / "README.md").data
    assert metadata.base_model == "google-bert/bert-base-uncased"
    assert metadata.datasets == ["wikimedia/wikipedia", "bookcorpus/bookcorpus"]
    held_out = next(result for result in metadata.eval_results or [] if result.metric_type == "loss")
    assert 0 < held_out.metric_value < 100
    check_vectors(folder / "final")


def check_vectors(folder: Path) -> None:
    """SentenceTransformer's vectors are the means of AutoModel's last states, finite, and differ from text to text."""
    texts = [text[:60] for text in made_model.texts(4, seed=2)]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    means = ((states * mask).sum(1) / mask.sum(1)).numpy()
    assert np.isfinite(means).all() and np.abs(means - means[0]).max(axis=1)[1:].min() > 1e-6
    modules = [module["type"].rsplit(".")[-1] for module in json.loads((folder / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling"]
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True and pooling["word_embedding_dimension"] == 48
    library = pytest.importorskip("sentence_transformers")
    vectors = library.SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(vectors, means, rtol=1e-4, atol=1e-5 * np.abs(means).max())


def test_paper_12l_runs_and_a_push_that_failed_is_done_by_the_same_command(
    papers: test_hub.Hub, tmp_path: Path, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    papers.large = 1 << 30  # httpx warns of how huggingface_hub sends large files, and warnings are errors here
    argv = ["--preset", "paper-12l", "--budget-tokens", "3000", *SMALL, "--output-dir", str(tmp_path / "run")]
    assert run.main([*argv, "--push-to-hub", "other/student"]) == 2
    assert "'someone' may write to someone" in capfd.readouterr().err
    papers.faults = [test_hub.Fault("/commit/", 500)]
    assert run.main([*argv, "--push-to-hub", "student"]) == 75
    said = capfd.readouterr().err.splitlines()[-1]
    assert "final is finished, but cannot push model 'someone/student' to the hub (status 500" in said
    assert "issue the same command again" in said
    papers.faults = []
    assert run.main([*argv, "--push-to-hub", "student"]) == 0
    assert (
        "model.safetensors"
        in papers.repositories["models", "someone/student"].commits[
            papers.repositories["models", "someone/student"].branches["main"]
        ]
    )


@pytest.mark.parametrize(
    ("token", "name", "line"),
    [
        ("hf_reader", "student", "the token may only read"),
        ("hf_unknown", "student", "status 401, it refuses the token"),
        (None, "student", "needs a token: log in with `hf auth login`"),
        ("hf_writer", "a/b/c", "is no name for a repository"),
        ("hf_writer", "", "is no name for a repository"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_spent(
    hub: test_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    token: str | None, name: str, line: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    argv = ["--preset", "paper-6l", "--budget-tokens", "3000", "--output-dir", str(tmp_path / "run")]
    assert run.main([*argv, "--push-to-hub", name]) == 2
    assert line in capfd.readouterr().err and not (tmp_path / "run").exists()
    assert not any("safetensors" in request for request in hub.requests)
