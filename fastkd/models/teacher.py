"""The frozen teacher: cast once, without the layers that are not read, never in training mode."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastkd.models.attention import Setting
from fastkd.models.captured import Captured
from fastkd.models.float8 import quantise
from fastkd.models.tokenizer import entries

if TYPE_CHECKING:
    from fastkd.models.encoder import Encoder, EncoderConfig, Packed
    from fastkd.models.hf import Loaded
    from fastkd.models.needs import Needs, Outputs

PROBES = ("Hello World", "naïve Café, don't STOP!", "東京 2024 — état-major", "ﬁne\tline\u00a0break")


class Teacher:
    """A teacher that computes what ``needs`` reads, on ``device``, without gradients.

    Products run in ``dtype``: their weights and the word embeddings are cast to it once, and LayerNorms, positions
    and the residual stream stay float32, as under autocast. With ``float8`` the layers' products run in float8. Layers
    above the deepest one that is read are dropped from memory, and so is the MLM head if no logits are read. It is no
    nn.Module: nothing can put it into training mode or hand its parameters to an optimiser. ``attention`` names a backend
    (None: the fastest that takes its head width and sequences of ``longest`` tokens, by default as many as it has
    positions). With ``compile`` its forward is compiled. On CUDA, forwards of the first one's shapes are then one CUDA
    graph, and each overwrites the outputs of the one before.
    """

    def __init__(
        self,
        loaded: Loaded,
        needs: Needs,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        longest: int | None = None,
        attention: str | None = None,
        compile: bool = False,
        float8: bool = False,
    ) -> None:
        self.needs, self.config = needs, loaded.config
        self.encoder = _cast(_cut(loaded.encoder, needs).to(device), dtype)
        if float8:
            quantise(self.encoder.layers)
        setting = Setting.on(device, dtype, self.config.head_width, 0.0, longest or self.config.max_length)
        self.attention = self.encoder.attention = setting.choose(attention)
        self.attention_remark = setting.remark(self.attention)
        if compile:
            self.encoder.compile_graphs()
        self._captures = compile and torch.device(device).type == "cuda"
        self._captured: Captured | None = None

    @torch.inference_mode()
    def __call__(self, ids: Tensor, batch: Packed) -> Outputs:
        """The forward of Encoder on [T] ids, whether or not the caller is under autocast."""
        if self._captures and self._captured is None:
            self._captured = Captured(self._forward, ids, batch)
        if self._captured is not None and self._captured.inputs.fits(ids, batch):
            return self._captured(ids, batch)
        return self._forward(ids, batch)

    def release(self) -> None:
        """Give back the memory of the CUDA graph. The next forward, perhaps of other shapes, is captured again."""
        self._captured = None

    def _forward(self, ids: Tensor, batch: Packed) -> Outputs:
        with torch.autocast(ids.device.type, enabled=False):
            out: Outputs = self.encoder(ids, batch, self.needs)
            return out


def _cut(encoder: Encoder, needs: Needs) -> Encoder:
    """A frozen copy without the layers and the head that are not read."""
    cut = copy.copy(encoder)
    cut._modules = dict(encoder._modules)
    cut.layers = encoder.layers[: needs.depth(encoder.config.num_layers)]
    cut.head = encoder.head if needs.logits else None
    return copy.deepcopy(cut).eval().requires_grad_(False)


def _cast(encoder: Encoder, dtype: torch.dtype) -> Encoder:
    """The weights of all products, and the tables of words and of the decoder, in ``dtype``."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear) or module is encoder.word_embeddings:
            module.to(dtype)
        if isinstance(module, nn.Linear) and module.weight.device.type == "cpu" and dtype == torch.bfloat16:
            # Stored column by column: oneDNN multiplies by that 20% faster.
            module.weight.data = module.weight.t().contiguous().t()
    if encoder.head is not None and encoder.head.decoder is not None:
        encoder.head.decoder.data = encoder.head.decoder.data.to(dtype)
    return encoder


def check_teacher(
    teacher: Loaded,
    student: EncoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    needs: Needs,
    max_length: int,
) -> None:
    """Refuse a teacher that cannot teach this student, before anything is spent.

    ``needs`` is what the method reads of the teacher, ``max_length`` the longest sequence in tokens. Raises ValueError
    naming what does not fit and the remedy.
    """
    config = teacher.config
    if max_length > config.max_length:
        raise ValueError(
            f"--seq-length {max_length} is beyond the {config.max_length} positions of teacher {teacher.source}; lower it"
        )
    if max_length > (longest := teacher.tokenizer.model_max_length):
        raise ValueError(
            f"--seq-length {max_length} is beyond the {longest} tokens that teacher {teacher.source} was trained on, as its "
            "tokenizer_config.json says (model_max_length); lower it"
        )
    if needs.logits and teacher.encoder.head is None:
        raise ValueError(
            f"teacher {teacher.source} has no MLM head; train one with --method mlm, or use --method minilmv2"
        )
    if encoding_digest(teacher.tokenizer) != encoding_digest(tokenizer):
        raise ValueError(f"teacher {teacher.source} has another tokenizer than the student; use one for both")
    if (tokens := entries(tokenizer)) > config.vocab_size:
        raise ValueError(
            f"teacher {teacher.source} has embeddings for {config.vocab_size} tokens, the tokenizer {tokens}; use the tokenizer "
            "that it was trained with"
        )
    config.family.check_tokenizer(config, tokenizer)
    if needs.logits and config.vocab_size != student.vocab_size:
        raise ValueError(
            f"teacher {teacher.source} has {config.vocab_size} tokens, the student {student.vocab_size}; use equal ones"
        )
    deepest = max((*needs.hidden, *needs.qkv, 0))
    if deepest > config.num_layers:
        raise ValueError(f"teacher {teacher.source} has {config.num_layers} layers, not {deepest}; lower it")


def encoding_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of how texts become ids: sha256 over the vocabulary (token → id), the special tokens and the ids of a few
    probe texts, which show the normaliser."""
    probed = copy.deepcopy(tokenizer)  # a call sets its padding and truncation, which are exported
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": [getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask", "pad")],
        "probes": [probed(text)["input_ids"] for text in PROBES],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
