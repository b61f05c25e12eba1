"""Small model folders as people bring them: written by transformers, then changed as files are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packed_text import VOCAB, word_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, CamembertConfig, PreTrainedModel, RobertaConfig, XLMRobertaConfig

CONFIGS = {"Bert": BertConfig, "Roberta": RobertaConfig, "XLMRoberta": XLMRobertaConfig, "Camembert": CamembertConfig}
WEIGHTS, SHARDED = "model.safetensors", "model.safetensors.index.json"


def write(folder: Path, cls: type[PreTrainedModel] = BertForMaskedLM, shard: str = "1GB", **changes: Any) -> Path:
    """A model as transformers saves it, with random weights that are not at their initialisation, and its tokenizer."""
    is_bert = cls.__name__.startswith("Bert")
    shape = {
        "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52,
        "max_position_embeddings": 64, "pad_token_id": 0 if is_bert else 1, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = cls(CONFIGS[cls.__name__.partition("For")[0].removesuffix("Model")](**(shape | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    word_tokenizer(*(() if is_bert else (("cls", "pad", "unk", "sep", "mask"),))).save_pretrained(folder)
    return folder


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other weights in the same file."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    """The same weights as torch.save writes them: pytorch_model.bin, or its shards."""
    for path in list(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    if (folder / SHARDED).exists():
        index = (folder / SHARDED).read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(index)
        (folder / SHARDED).unlink()


def untie(state: dict[str, Tensor], weight: bool = True, bias: bool = True) -> dict[str, Tensor]:
    """A head whose decoder is not the word embeddings, or has a bias beside the one that is read."""
    place = "cls.predictions" if "cls.predictions.bias" in state else "lm_head"
    body = "bert" if place == "cls.predictions" else "roberta"
    if weight:
        state[f"{place}.decoder.weight"] = state[f"{body}.embeddings.word_embeddings.weight"].flip(0).clone()
    if bias:
        state[f"{place}.decoder.bias"] = state[f"{place}.bias"].flip(0) + 1
    return state


def vocabulary(folder: Path, **settings: Any) -> None:
    """The tokenizer as old folders hold it: vocab.txt and, perhaps, settings."""
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.__getitem__)))
