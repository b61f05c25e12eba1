"""A small random student and small GLUE data for the tests of fine-tuning."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertModel


def save_student(folder: Path, teacher: Path) -> Path:
    """A random student as fastkd exports it: no pooler, BERT's vocabulary."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A student\n")
    return folder


def write_sst2(data: Path, train: int = 96, dev: int = 40) -> Path:
    """Sentences of 3 to 12 words, positive where they hold "good"."""
    generator = np.random.default_rng(0)
    words = np.array(["the", "film", "was", "with", "plot", "and", "actors", "who", "speak", "of", "rain"])
    folder = data / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", dev), ("test", 6)):
        lines = ["index\tsentence" if name == "test" else "sentence\tlabel"]
        for i in range(rows):
            positive = int(generator.integers(2))
            sentence = [*generator.choice(words, generator.integers(2, 11)), "good" if positive else "bad"]
            text = " ".join(sentence)
            lines.append(f"{i}\t{text}" if name == "test" else f"{text}\t{positive}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return data


def write_rte(data: Path) -> Path:
    folder = data / "RTE"
    folder.mkdir(parents=True)
    labels = ("entailment", "not_entailment")
    rows = "".join(f"{i}\tIt rains.\tIt is {['wet', 'dry'][i % 2]}.\t{labels[i % 2]}\n" for i in range(40))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    return data
