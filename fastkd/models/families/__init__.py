"""Model families: one file each. A family says how its models compute, what they cost and what Hugging Face calls their parts.

A file here defines one subclass of :class:`Family` and an instance of it called ``FAMILY``. The encoder, the reading and
writing of checkpoints, the FLOP count and the memory estimate ask that instance; nothing else knows a family by name. A new
family is one new file: write the methods that :class:`Family` leaves open, and import what it shares with another family
from that one, as ``roberta.py`` does from ``bert.py``. ``tests/modernbert_family.py`` is one that shares nothing; attention to
neighbours only, which released ModernBERTs alternate with it, would also need a window in ``models/attention.py``.

Shapes: T packed tokens, M predicted rows, D width, V vocabulary.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fastkd.models.encoder import EncoderConfig
    from fastkd.models.needs import Extent

# A parameter of the encoder → transformers' names for it; several are its equal parts, stacked along the first dimension,
# such as the queries, keys and values of one product.
Names = dict[str, tuple[str, ...]]
# A parameter of the encoder → what each of its dimensions counts: ``width`` (channels of the residual stream), ``qkv`` (queries,
# keys and values, head by head), ``context`` (the values that attention returns), ``intermediate``, ``rows`` of a table, or
# ``decoded`` (the channels of what the decoder multiplies, in a parameter that they are proportional to).
Axes = dict[str, tuple[str, ...]]


class Classes(NamedTuple):
    """transformers' classes of a model type."""

    config: type[PreTrainedConfig]
    masked_lm: Any  # a subclass of PreTrainedModel
    bare: Callable[[PreTrainedConfig], PreTrainedModel]  # makes the model without a head and without a pooler


class Family(ABC):
    """What a family's file defines. Its methods read a configuration and keep no state."""

    classes: ClassVar[Mapping[str, Classes]]  # by model_type, as config.json names it

    # ---- configuration --------------------------------------------------------------------------------------

    @abstractmethod
    def from_hf(self, config: Any) -> EncoderConfig:
        """The encoder's configuration (a subclass of EncoderConfig where the family has fields of its own) from transformers'.

        Raises:
            ValueError: it asks for something that the encoder cannot compute.
        """

    @abstractmethod
    def to_hf(self, config: EncoderConfig) -> PreTrainedConfig:
        """The reverse."""

    def check(self, config: EncoderConfig) -> None:  # noqa: B027
        """Raise ValueError for a configuration that this family cannot compute."""

    def check_tokenizer(self, config: EncoderConfig, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027
        """Raise ValueError for a tokenizer that does not fit the model."""

    def position_offset(self, config: EncoderConfig) -> int:
        """Row of the position table of position 0."""
        return 0

    # ---- parameter names ------------------------------------------------------------------------------------

    @abstractmethod
    def body_names(self, config: EncoderConfig) -> Names:
        """Names of all parameters but the head's, as the bare model has them."""

    @abstractmethod
    def head_names(self, config: EncoderConfig) -> Names:
        """Names of the head's parameters, as the MaskedLM class has them; ``head.decoder`` only if it is not tied."""

    @abstractmethod
    def copies(self, config: EncoderConfig) -> dict[str, str]:
        """transformers' names in the MaskedLM class that repeat another parameter → the encoder's name of that one."""

    def head_in_file(self, config: EncoderConfig) -> set[str]:
        """The names by which a checkpoint's head is found: all of them are in the file, or none."""
        return {name for names in self.head_names(config).values() for name in names}

    def matrices_in(self, config: EncoderConfig, name: str) -> int:
        """Of how many equal matrices, one above the other, a layer's weight is made: of queries, keys and values three.

        ``--optimizer muon`` orthogonalises each. A family of which transformers has them in one tensor too says it here.
        """
        return len(self.body_names(config)[name])

    def axes(self, config: EncoderConfig) -> Axes:
        """What the dimensions of each parameter count: what ``models/subcloning.py`` cuts a narrower student by.

        Empty (the default): a student starts from such a model in its own width only. A family that names them has the layers of
        ``models/layer.py``, and a post-norm residual stream.
        """
        return {}

    # ---- modules --------------------------------------------------------------------------------------------

    @abstractmethod
    def embeddings(self, config: EncoderConfig) -> dict[str, nn.Module]:
        """What the embeddings have besides the word table. The encoder takes these modules as its own, under these names."""

    @abstractmethod
    def embed(self, encoder: Any, ids: Tensor, position_ids: Tensor) -> Tensor:
        """[T] ids and places → [T, D], the first layer's input. ``encoder.words(ids)`` looks the ids up."""

    @abstractmethod
    def layer(self, config: EncoderConfig, number: int) -> nn.Module:
        """Layer ``number``, from 1, with the two methods of ``fastkd.models.layer.Layer``.

        What follows the last layer, such as the final LayerNorm of a pre-norm encoder, belongs to the last layer.
        """

    @abstractmethod
    def head(self, config: EncoderConfig) -> nn.Module:
        """The MLM head up to the decoder, [M, D] → [M, D]. It has ``bias`` [V], and ``decoder`` [V, D] or None if tied."""

    # ---- costs ----------------------------------------------------------------------------------------------

    @abstractmethod
    def parameters(self, config: EncoderConfig) -> int:
        """How many numbers its tables and matrices hold, without the head's and without biases and LayerNorms."""

    @abstractmethod
    def layer_flops(
        self, config: EncoderConfig, number: int, extent: Extent, *, tokens: int, pairs: int, predicted: int
    ) -> int:
        """FLOPs of a layer's forward that runs as far as ``extent``; arguments as in ``fastkd.models.flops.forward_flops``."""

    @abstractmethod
    def head_flops(self, config: EncoderConfig, predicted: int) -> int:
        """FLOPs of the head's forward up to the decoder."""

    @abstractmethod
    def embedding_bytes(self, config: EncoderConfig, tokens: int) -> int:
        """Bytes that the embeddings keep for their backward."""

    @abstractmethod
    def layer_bytes(
        self,
        config: EncoderConfig,
        extent: Extent,
        *,
        tokens: int,
        predicted: int,
        itemsize: int,
        residual_itemsize: int,
        weight_pairs: int,
    ) -> int:
        """Bytes that a layer keeps for its backward; arguments as in ``fastkd.device.memory.activation_bytes``."""

    @abstractmethod
    def head_bytes(self, config: EncoderConfig, predicted: int) -> int:
        """Bytes that the head keeps for its backward."""


_LISTED: dict[tuple[str, ...], dict[str, Family]] = {}  # by the folders: a configuration asks several times a step


def available() -> dict[str, Family]:
    """The families in this folder by model type."""
    folders = tuple(__path__)
    if folders not in _LISTED:
        found: dict[str, Family] = {}
        for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
            family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
            found |= dict.fromkeys(family.classes, family)
        _LISTED[folders] = found
    return _LISTED[folders]


def of(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        ValueError: no file here has it.
    """
    families = available()
    if model_type not in families:
        raise ValueError(f"model type {model_type or None!r} is not supported; use one of {', '.join(families)}")
    return families[model_type]
