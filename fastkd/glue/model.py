"""The model that is evaluated: a run folder, a Hugging Face folder, a hub id or the quickstart teacher."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastkd import manifest, quickstart
from fastkd.data import hub_requests
from fastkd.files import file_sha256
from fastkd.run_folder import ancestors

REMEDY = "name a run folder, a Hugging Face folder or a hub id"
HASHED = (".json", ".safetensors", ".bin", ".model", ".txt")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate: its folder, its name, and the run it came from, if any."""

    folder: Path
    name: str
    run: Path | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over weights, configuration and tokenizer, without model card and scores."""
        digests = {
            path.name: file_sha256(path) if path.is_file() else None
            for path in self.folder.iterdir()
            if path.suffix in HASHED and path.name != "glue.json"
        }
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    @property
    def output_dir(self) -> Path:
        """Where its scores go by default: its run folder, else ``runs/glue-NAME-HASH``."""
        return self.run or Path("runs") / f"glue-{self.name.replace('/', '-')}-{self.sha256[:8]}"

    @property
    def saw_pairs(self) -> bool:
        """Whether it is the quickstart teacher, fine-tuned on NLI and paraphrase pairs, or was made from it."""
        return quickstart.NAME in ancestors(str(self.run or self.folder))


def find_model(model: str | Path) -> EvaluatedModel:
    """The model behind a name.

    Raises:
        ValueError: nothing of that name, an unfinished run, a folder that is not what was exported, or a hub that cannot be
            reached.
    """
    folder = Path(model)
    if str(model) == quickstart.NAME and not folder.is_dir():
        return EvaluatedModel(quickstart.folder(), "quickstart-teacher")
    if not folder.is_dir():
        return EvaluatedModel(_download(str(model)), str(model))
    path = folder.resolve()
    if (folder / "final" / "config.json").is_file():
        found = EvaluatedModel(folder / "final", path.name, folder)
    elif path.name == "final" and (path.parent / "ledger.jsonl").is_file():
        found = EvaluatedModel(path, path.parent.name, path.parent)
    else:
        found = EvaluatedModel(folder, path.name)
    _check_files(found)
    manifest.verify(found.folder)
    return found


def _check_files(model: EvaluatedModel) -> None:
    folder = model.folder
    if not (folder / "config.json").is_file():
        unfinished = (folder / "ledger.jsonl").is_file()
        remedy = "the run is not finished: issue its command again" if unfinished else REMEDY
        raise ValueError(f"{folder} holds no config.json and no final/; {remedy}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"{folder} holds no model.safetensors; export the model again")


def _download(name: str) -> Path:
    """A hub model's snapshot."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no folder {name}; {REMEDY}")
    folder = hub_requests.model_folder(name, remedy=REMEDY)
    _check_files(EvaluatedModel(folder, name))
    return folder
