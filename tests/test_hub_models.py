"""Teachers, tokenizers and GLUE from the hub: what goes wrong there is one line, and leaves no half file in use."""

from pathlib import Path

import hub as test_hub
import pytest
from hub_contents import card, parquet

from fastkd.data import hub_requests
from fastkd.glue.examples import read_examples
from fastkd.glue.model import find_model
from fastkd.glue.tasks import TASKS
from fastkd.models import hf

LASTING = {
    "missing": (None, None, r"model '.*' is neither here nor on the hub .*hf auth login"),
    "token": (".", 401, r"status 401, it refuses the token"),
    "gated": ("/resolve/", 403, r"is gated: accept its terms"),
    "many": (".", 429, r"status 429, too many requests.*issue the same command again later"),
    "error": ("tokenizer.json", 500, r"status 500.*issue the same command again later"),
    "cut": ("/blobs/", "cut", r"the answer was cut off.*issue the same command again later"),
    "page": ("/api/", "html", r"what answered is not the hub"),
    "page of a file": ("/blobs/", "html", r"the answer was cut off"),
    "slow": ("/api/models", "slow", r"no answer in time"),
}


def tree(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", LASTING)
def test_a_teacher_that_does_not_come_is_one_line_and_the_same_goes_on(
    hub: test_hub.Hub, made_teacher: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, kind, line = LASTING[name]
    monkeypatch.setattr(hub_requests, "NO_ANSWER", 0.1)
    model = f"teachers/{name.replace(' ', '-')}"
    if where is not None:
        hub.add("models", model, tree(made_teacher))
        hub.faults = [test_hub.Fault(where, kind)]
    with pytest.raises(ValueError, match=line) as error:
        hf.load(model)
    assert "\n" not in str(error.value) and model in str(error.value) and "--preset quickstart" in str(error.value)
    hub.faults = []
    hub.add("models", model, tree(made_teacher))
    assert hf.load(model).tokenizer.get_vocab() == hf.load(made_teacher).tokenizer.get_vocab()
    assert find_model(model).folder.is_dir()


def test_a_teacher_that_was_read_once_needs_no_hub(
    hub: test_hub.Hub, made_teacher: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("models", "teachers/cached", tree(made_teacher))
    digest = find_model("teachers/cached").sha256
    hub.faults = [test_hub.Fault(".", 500)]
    assert find_model("teachers/cached").sha256 == digest
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert find_model("teachers/cached").sha256 == digest
        with pytest.raises(ValueError, match=r"'teachers/other' from the hub \(HF_HUB_OFFLINE is set"):
            find_model("teachers/other")
    hub.repositories.clear()
    hub.faults = []
    with pytest.raises(ValueError, match="neither here nor on the hub"):  # not silently an old copy
        find_model("teachers/cached")


def test_a_tokenizer_is_read_without_the_weights_beside_it(hub: test_hub.Hub, made_teacher: Path) -> None:
    hub.add("models", "teachers/shape", tree(made_teacher))
    config, tokenizer = hf.shape("teachers/shape")
    assert len(tokenizer) == config.vocab_size
    assert not any("safetensors" in request for request in hub.requests)


def glue(*labels: int) -> bytes:
    return parquet({"sentence": [f"text {label}" for label in labels], "label": labels, "idx": range(len(labels))})


def test_glue_comes_in_the_layout_of_the_hub(hub: test_hub.Hub, waits: list[float]) -> None:
    parts = {"sst2/train-00000-of-00001.parquet": glue(1, 0, 1), "sst2/validation-00000-of-00001.parquet": glue(0, 1)}
    hub.add("datasets", "nyu-mll/glue", {"README.md": card("sst2", splits=("train", "validation")), **parts})
    hub.faults = [test_hub.Fault("parquet", 500)]
    with pytest.raises(
        ValueError, match=r"cannot read nyu-mll/glue:sst2:train from the hub \(.*--data FOLDER"
    ) as error:
        read_examples(TASKS["sst2"], "train")
    assert "\n" not in str(error.value)
    hub.faults = [test_hub.Fault("parquet", 429, times=1)]
    assert read_examples(TASKS["sst2"], "train").labels == [1, 0, 1]
    assert read_examples(TASKS["sst2"], "dev").texts == (["text 0", "text 1"],)
