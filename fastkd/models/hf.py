"""Hugging Face checkpoints: load teachers and students, export students."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as hf_logging

from fastkd import files, manifest, optim
from fastkd.data import hub_requests
from fastkd.health import Diverged
from fastkd.models import families, parameter_names, sentences, weights
from fastkd.models import tokenizer as tokenizers
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.shape import MOST_LAYERS, require_size

REMEDY = "name a hub id, a Hugging Face folder or a finished run, or use --preset quickstart"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with its tokenizer and where it came from."""

    encoder: Encoder
    config: EncoderConfig
    tokenizer: PreTrainedTokenizerBase
    source: str
    sha256: str | None = None  # of configuration and numbers, however they are stored
    revision: str | None = None  # commit, for a hub id


def load(source: str | Path, *, device: torch.device | str = "cpu", sha256: str | None = None) -> Loaded:
    """Load a checkpoint of one of ``families`` in float32 with its tokenizer.

    source: a hub id, a local Hugging Face folder, or the folder of a finished run (its ``final/``). The
    encoder has an MLM head only if the checkpoint holds one. Raises ValueError if the source cannot be
    read, is not what was exported, is of another family, holds NaN, or, with ``sha256`` given, if its model.safetensors has
    another digest.
    """
    where, revision, hf_config, config = _described(source)
    if sha256 is not None:
        weights.check_file(Path(where), sha256)
    tokenizer = _tokenizer(where)
    weights.files(Path(where))
    with _readable(source):
        stored = weights.read(Path(where))
    weights.check_size(stored, config, where)
    with _readable(source):
        # config.json chooses neither class, attention nor file: no code from a model folder runs, and no package is missing.
        model, found = config.family.classes[config.model_type].masked_lm.from_pretrained(
            None, config=hf_config, state_dict=stored, dtype=torch.float32, attn_implementation="eager",
            output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
    mlm_head = weights.has_head(found, config, where)
    weights.check_finite(model.named_parameters(), where)
    encoder = from_hf_model(model, mlm_head=mlm_head).to(device)
    return Loaded(encoder, encoder.config, tokenizer, str(source), weights.digest(encoder), revision)


def shape(source: str | Path) -> tuple[EncoderConfig, PreTrainedTokenizerBase]:
    """The configuration and tokenizer that ``load`` would load, without the weights. Raises as ``load``."""
    where, _, _, config = _described(source, weights=False)
    return config, _tokenizer(where)


def digest_of_files(source: str | Path) -> str:
    """What an older version noted of a local model: sha256 over its config.json and weight files, by name."""
    folder = Path(_resolve(source, weights=True))
    first = next(folder / name for name in weights.STORAGES if (folder / name).is_file())
    contents = {path.name: files.file_sha256(path) for path in (folder / "config.json", first, *weights.files(folder))}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _described(source: str | Path, *, weights: bool = True) -> tuple[str, str | None, PreTrainedConfig, EncoderConfig]:
    """The folder of a model (with its weights only if they are asked for), its commit on the hub, and its configuration as
    transformers' and as the encoder's."""
    where = _resolve(source, weights=weights)
    revision = None if Path(source).is_dir() else Path(where).name  # …/snapshots/COMMIT
    if revision is None:  # of a hub's copy, some files were not downloaded, and others may be of a later commit
        manifest.verify(Path(where))
    known = families.available()
    with _readable(source):
        found, _ = PreTrainedConfig.get_config_dict(where)
        named: Any = found.get("model_type")
        hf_class = known[named].classes[named].config if named in known else PreTrainedConfig
        hf_config = hf_class.from_dict(found)
    try:
        return where, revision, hf_config, from_hf(hf_config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _tokenizer(where: str) -> PreTrainedTokenizerBase:
    with _quiet():
        return tokenizers.load(where)


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """Read by transformers, without its bars and reports; an error becomes one line."""
    try:
        with _quiet():
            yield
    except Exception as error:  # a damaged file raises whatever its reader does
        raise ValueError(f"cannot load {str(source)!r} ({tokenizers.reason(error)}); {REMEDY}") from error


def _resolve(source: str | Path, *, weights: bool) -> str:
    """The Hugging Face folder behind a source; that of a hub id is in the hub's cache."""
    folder = Path(source)
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or len(folder.parts) > 2):
        raise ValueError(f"{folder} is no folder; {REMEDY}")  # nor a hub id
    if not folder.is_dir():
        return str(hub_requests.model_folder(str(source), remedy=REMEDY, weights=weights))
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    raise ValueError(f"{folder} holds no config.json and no finished run; {REMEDY}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what they report is checked here."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def from_hf(config: PreTrainedConfig) -> EncoderConfig:
    """The encoder's configuration from transformers'; ValueError for what it cannot compute."""
    family = families.of(config.model_type)
    if getattr(config, "quantization_config", None):
        raise ValueError("quantised weights are not supported; use the checkpoint that they were made from")
    found = family.from_hf(config)
    require_size("num_hidden_layers", found.num_layers, most=MOST_LAYERS)
    return found


def to_hf(config: EncoderConfig) -> PreTrainedConfig:
    """transformers' configuration of an encoder."""
    return config.family.to_hf(config)


def from_hf_model(model: PreTrainedModel, *, mlm_head: bool) -> Encoder:
    """An encoder with the weights of a MaskedLM class, its decoder tied where the numbers are the same."""
    config = replace(from_hf(model.config), tied=not mlm_head or _is_tied(model))
    with torch.device("meta"):
        encoder = Encoder(config, mlm_head=mlm_head)
    encoder.load_state_dict(parameter_names.from_hf(model.state_dict(), config, mlm_head=mlm_head), assign=True)
    return encoder.requires_grad_(True)


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the decoder equals the word embeddings: if a file holds two, transformers loads two, whatever config.json says."""
    table, decoder = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return table is decoder or torch.equal(table, decoder)  # type: ignore[arg-type]


def to_hf_model(encoder: Encoder, *, mlm_head: bool) -> PreTrainedModel:
    """The transformers model with the encoder's weights, on the CPU in float32: the MaskedLM class of its family with
    ``mlm_head``, else the bare one without its pooler."""
    config = encoder.config
    classes = config.family.classes[config.model_type]
    model: PreTrainedModel = (classes.masked_lm if mlm_head else classes.bare)(to_hf(config))
    model.load_state_dict(parameter_names.to_hf(encoder, mlm_head=mlm_head), strict=True)
    return model.eval()


def export(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str,
    mlm_head: bool,
    max_length: int | None = None,
) -> None:
    """Write a Hugging Face folder (weights, configuration, tokenizer, README.md), whole or not at all.

    ``mlm_head``: whether the head was trained; if not, the bare model is written. ``max_length``: the longest sequence of the
    training, written as the tokenizer's model_max_length. A folder that exists is replaced.

    Raises:
        Diverged: a weight is not finite; nothing is written.
    """
    if bad := optim.not_finite(encoder.state_dict()):
        raise Diverged(f"the student is not exported, since {bad[0]} is not finite: train it again with a smaller --lr")
    written = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        with _quiet():
            model = to_hf_model(encoder, mlm_head=mlm_head)
            model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            model.save_pretrained(written)
        _limited(tokenizer, max_length).save_pretrained(written)
        sentences.write(written, encoder.config.hidden_size, max_length or encoder.config.max_length)
        (written / "README.md").write_text(card, encoding="utf-8")
        manifest.write(written)
        files.give_usual_modes(written)
        _replace(written, folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _limited(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> PreTrainedTokenizerBase:
    """A tokenizer whose model_max_length is at most the positions that were trained."""
    if max_length is None or max_length >= tokenizer.model_max_length:
        return tokenizer
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = max_length
    return limited


def _replace(written: Path, folder: Path) -> None:
    """Put a written folder in the place of another, so that a crash leaves one of the two."""
    for path in (*written.rglob("*"), written):
        files.sync(path)
    old = written.with_name(written.name + "-old")
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    files.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
