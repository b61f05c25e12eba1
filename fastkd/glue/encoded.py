"""Examples as token ids: tokenised once a task, the vocabulary cut to what the task uses, batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fastkd.glue.examples import Examples, read_examples
from fastkd.glue.tasks import Task
from fastkd.models import families
from fastkd.models.tokenizer import reason

ROW_SEED = 0  # of the subset that --train-rows keeps, the same for every model and seed
POOL = 50  # batches that are sorted by length together: larger pools pad less and shuffle less
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")
# Model types without a file in models/families/ whose positions start after the padding id, as RoBERTa's do.
OFFSET_ELSEWHERE = ("mpnet",)


class EncodedSplit(torch.utils.data.Dataset[dict[str, list[int] | int | float]]):
    """A tokenised split; items hold ``input_ids``, ``labels`` and the tokenizer's other outputs."""

    def __init__(self, columns: Mapping[str, list[list[int]]], labels: Sequence[int | float]) -> None:
        self.columns, self.labels = dict(columns), labels
        self.lengths = [len(ids) for ids in columns["input_ids"]]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int] | int | float]:
        item: dict[str, list[int] | int | float] = {name: values[index] for name, values in self.columns.items()}
        return item | ({"labels": self.labels[index]} if self.labels else {})


@dataclass(frozen=True)
class EncodedTask:
    """A task's splits in token ids that index ``used``, the ids of the model's vocabulary that occur in them."""

    splits: dict[str, EncodedSplit]
    used: Tensor  # [U] int64 ascending; all ids up to the padding's are in it, so these stay the same
    pad_token_id: int


def load_examples(
    task: Task, data: Path | None, train_rows: int | None, test: Sequence[str] = ()
) -> dict[str, Examples]:
    """All splits of a task; at most ``train_rows`` training examples, a fixed random subset in file order."""
    splits = {split: read_examples(task, split, data) for split in (task.train, *task.dev, *test)}
    train = splits[task.train]
    if train_rows is not None and train_rows < len(train):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(ROW_SEED))
        splits[task.train] = train.take(sorted(order[:train_rows].tolist()))
    return splits


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError where there is none, or it cannot pad."""
    if not any(path for name in TOKENIZER_FILES for path in model.glob(name)):
        # transformers would invent one that knows only special tokens
        raise ValueError(f"{model} holds no tokenizer (tokenizer.json, vocab.txt, …); save it beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # of any kind, from the reader of a damaged tokenizer.json
        raise ValueError(f"{model} has no usable tokenizer ({reason(error)})") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{model}: the tokenizer has no padding token; set one and save it again")
    return tokenizer


def encode(model: Path, splits: Mapping[str, Examples], max_length: int) -> EncodedTask:
    """Tokenise, cutting the longer text first, to at most ``max_length`` tokens or what the model takes."""
    tokenizer = load_tokenizer(model)
    length = _max_length(model, tokenizer, max_length)
    encoded = {name: _split(tokenizer, examples, length) for name, examples in splits.items()}
    pad = tokenizer.pad_token_id
    seen = {token for split in encoded.values() for ids in split.columns["input_ids"] for token in ids}
    used = sorted(seen | set(range(pad + 1)))
    place = {token: i for i, token in enumerate(used)}
    for split in encoded.values():
        split.columns["input_ids"] = [[place[token] for token in ids] for ids in split.columns["input_ids"]]
    return EncodedTask(encoded, torch.tensor(used), pad)


def require_encoder(model: Path) -> None:
    """Raises ValueError for a model that cannot classify padded batches of texts by position, such as T5 or GPT-2."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1 or getattr(config, "pad_token_id", None) is None:
        raise ValueError(
            f"{model} is a {config.model_type} without a table of positions or a padding token; "
            "give an encoder, such as BERT, RoBERTa, MPNet or DistilBERT"
        )


def _max_length(model: Path, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    positions = config.max_position_embeddings
    if config.model_type in OFFSET_ELSEWHERE:
        positions -= config.pad_token_id + 1
    elif family := families.available().get(config.model_type):
        positions -= family.position_offset(config)
    return min(wanted, positions, tokenizer.model_max_length)


def _split(tokenizer: PreTrainedTokenizerBase, examples: Examples, max_length: int) -> EncodedSplit:
    columns = tokenizer(*examples.texts, truncation=True, max_length=max_length, return_attention_mask=False)
    return EncodedSplit(dict(columns), examples.labels)


def cut_embeddings(model: torch.nn.Module, encoded: EncodedTask) -> None:
    """Keep only the word embeddings that the task uses, in place.

    Exact: an embedding that no text uses has a zero gradient, which adds nothing to the gradient's norm. AdamW's decay may
    change it, but no text reads it. No step has to update what is cut: half of the weights of a small model.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    rows = table.weight.detach()[encoded.used].clone()
    model.set_input_embeddings(  # type: ignore[operator]
        torch.nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=table.padding_idx)
    )


class LengthGroupedBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of examples of similar length, shuffled again in each epoch.

    Examples are shuffled, sorted by length within pools of 50 batches, cut into batches, and the batches shuffled.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths), generator=self.generator)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in order.split(POOL * self.batch_size)]
        batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
        for i in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[i].tolist()


def collate(items: Sequence[Mapping[str, list[int] | int | float]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch padded to its longest example: ids, types and mask [B, S] int64; labels [B] int64 or float32."""
    lengths = torch.tensor([len(item["input_ids"]) for item in items])  # type: ignore[arg-type]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    batch = {"attention_mask": mask.long()}
    for name in items[0].keys() - {"labels"}:
        padded = torch.full(mask.shape, pad_token_id if name == "input_ids" else 0)
        padded[mask] = torch.tensor([value for item in items for value in item[name]])  # type: ignore[union-attr]
        batch[name] = padded
    if "labels" in items[0]:
        batch["labels"] = torch.tensor([item["labels"] for item in items])
    return batch
