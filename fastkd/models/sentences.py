"""The files that sentence-transformers reads in a Hugging Face folder: a text's vector is the mean of its last hidden states."""

import json
from pathlib import Path

# The names of version 2, which later versions still read.
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def write(folder: Path, width: int, max_length: int) -> None:
    """Make ``SentenceTransformer(folder)`` work: vectors of ``width`` numbers, texts of ``max_length`` tokens at most."""
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling").mkdir()
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(folder / "modules.json", MODULES)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
