"""What one training step launches, in closed form: FLOPs, bytes and exponentials of each part, from the models' shapes.

T tokens in sequences of n, M predicted rows, D width, I intermediate width, V vocabulary. Products are bfloat16, the
residual stream float32 or bfloat16, parameters float32. All T tokens are one micro-batch, every sequence is full.
Bytes of elementwise kernels were counted in the code that torch.compile made for an H100 of a single layer; what one
graph of all layers leaves out, and eager operations, by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.roofline import Step, product
from bench.throughput import SIZES
from fastkd import methods
from fastkd.data.sizes import SEQUENCES_PER_PACK
from fastkd.models import flops
from fastkd.models.encoder import EncoderConfig
from fastkd.models.needs import Needs

VOCABULARY = 30_522
MASK_RATE = 0.15
MASKS_BYTES = 10_700  # a token, of the masking's elementwise int64 operations
HOST_OPERATIONS = {"all": 47, "predicted": 55, "projection": 12}  # of a layer, forward and backward


@dataclass(frozen=True)
class Stream:
    """Bytes a token and unit of width that a layer's elementwise kernels move because of the residual stream.

    Of float32: forward, two sums with LayerNorm (read 4 + 2, write 4 + 2, and 4 more of the second that the backward
    reads); backward, two LayerNorms (14 and 18), of which the upper one takes the layer above's sum of gradients in.
    """

    forward: int
    backward: int
    kept: int  # of the forward, what only a backward reads
    embeddings_forward: int
    embeddings_backward: int


STREAMS = {
    "float32": Stream(forward=28, backward=34, kept=4, embeddings_forward=14, embeddings_backward=22),
    "bfloat16": Stream(forward=12, backward=14, kept=2, embeddings_forward=8, embeddings_backward=16),
}
# Float32, with every layer a graph of its own: the cast before a layer's first product (6) and the sum of gradients
# after its last (10) are kernels, an unread QKV output has a gradient of zeros (6 + 6), and the embeddings run eagerly.
LAYERS_APART = Stream(forward=32, backward=54, kept=4, embeddings_forward=28, embeddings_backward=56)


@dataclass(frozen=True)
class Work:
    """A student, its teacher and the text of one step."""

    student: EncoderConfig
    teacher: EncoderConfig
    tokens: int
    length: int

    @property
    def sequences(self) -> int:
        return self.tokens // self.length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of every sequence."""
        return (self.length,) * self.sequences

    @property
    def pairs(self) -> int:
        """Σ length²."""
        return self.tokens * self.length

    @property
    def predicted(self) -> int:
        """M: a fixed number in each pack."""
        return round(MASK_RATE * SEQUENCES_PER_PACK * self.length) * self.sequences // SEQUENCES_PER_PACK


def config(spec: str) -> EncoderConfig:
    """The BERT of a spec such as 6L-768H-12A, with a feed-forward of four widths."""
    layers, width, heads = (int(number) for number in re.findall(r"\d+", spec))
    return EncoderConfig("bert", VOCABULARY, width, layers, heads, 4 * width)


def work(size: str, tokens: int) -> Work:
    """The models of a size of ``bench.throughput``, and this many tokens.

    Raises:
        ValueError: an unknown size, or tokens that are no whole packs.
    """
    if size not in SIZES:
        raise ValueError(f"no size {size!r}: choose one of {', '.join(SIZES)}")
    pair = SIZES[size]
    pack = SEQUENCES_PER_PACK * pair.seq_length
    if tokens < pack or tokens % pack:
        raise ValueError(f"{tokens} tokens are no whole packs: give a multiple of {pack}")
    return Work(config(pair.student), config(pair.teacher), tokens, pair.seq_length)


def method_of(name: str, work: Work) -> methods.Method:
    """The method with its default options, as it reads this pair; raises ValueError for an unknown name."""
    module = methods.load(name)
    method: methods.Method = module.METHOD(module.Config(), work.student, work.teacher)
    return method


# ---- layers ---------------------------------------------------------------------------------------------------


def layer_products(c: EncoderConfig, extent: str, work: Work) -> list[Step]:
    """The products of a layer's forward; each has two of the same FLOPs and bytes in the backward."""
    T, M, D, I = work.tokens, work.predicted, c.hidden_size, c.intermediate_size  # noqa: E741
    if extent == "projection":
        return [product(T, D, 3 * D)]
    rows = T if extent == "all" else M
    projections = [product(T, D, 3 * D)] if extent == "all" else [product(T, D, 2 * D), product(M, D, D)]
    return [*projections, product(rows, D, D), product(rows, D, I), product(rows, I, D)]


def attention(c: EncoderConfig, rows: int, work: Work) -> tuple[Step, Step]:
    """``packed_attention`` forward and backward for the queries of ``rows`` rows, keys and values of all.

    Forward: reads q, k, v, writes the output. Backward: reads these and the output's gradient, writes dq, dk, dv. Five
    products instead of two.
    """
    T, D = work.tokens, c.hidden_size
    forward = 4 * D * work.pairs * rows // T
    return (
        Step(forward, D * (4 * rows + 4 * T), kind="attention"),
        Step(2.5 * forward, D * (8 * rows + 8 * T), kind="attention"),
    )


def layer_forward(c: EncoderConfig, extent: str, work: Work, stream_bytes: int) -> list[Step]:
    """Products, attention, and the elementwise kernels: the stream's, and gelu (reads and writes I)."""
    steps, D = layer_products(c, extent, work), c.hidden_size
    if extent == "projection":
        return steps
    rows = work.tokens if extent == "all" else work.predicted
    return [*steps, attention(c, rows, work)[0], Step(0, rows * (stream_bytes * D + 4 * c.intermediate_size))]


def layer_backward(c: EncoderConfig, extent: str, work: Work, stream_bytes: int) -> list[Step]:
    """Two products for each, attention, and elementwise kernels.

    These: the stream's; the sums over rows for four biases (10 D + 2 I); gelu's (6 I).
    Where only predicted rows are read, keys and values still have all rows, and the gradient of x gathers both.
    """
    T, D, I = work.tokens, c.hidden_size, c.intermediate_size  # noqa: E741
    products = 2 * layer_products(c, extent, work)
    if extent == "projection":
        return [*products, Step(0, 18 * T * D)]
    rows = T if extent == "all" else work.predicted
    bytes_ = rows * ((stream_bytes + 10) * D + 8 * I) + (26 * T * D if extent == "predicted" else 0)
    return [*products, attention(c, rows, work)[1], Step(0, bytes_)]


def extents(c: EncoderConfig, needs: Needs) -> list[str]:
    """How far each layer that runs must run, first to last."""
    return [needs.extent(number, c.num_layers) for number in range(1, needs.depth(c.num_layers) + 1)]


def head_forward(c: EncoderConfig, needs: Needs, work: Work) -> list[Step]:
    """The MLM head up to the decoder: dense, gelu, LayerNorm; nothing where no logits are read."""
    M, D = work.predicted, c.hidden_size
    return [product(M, D, D), Step(0, 12 * M * D)] if needs.logits else []


def student_parts(c: EncoderConfig, needs: Needs, work: Work, stream: Stream) -> dict[str, list[Step]]:
    """Forward and backward of the student, without its loss."""
    T, D = work.tokens, c.hidden_size

    def both(extent: str) -> list[Step]:
        return layer_forward(c, extent, work, stream.forward) + layer_backward(c, extent, work, stream.backward)

    *lower, last = extents(c, needs)
    head = head_forward(c, needs, work)
    embeddings = (stream.embeddings_forward + stream.embeddings_backward) * T * D + 4 * c.vocab_size * D
    return {
        "layers below the last": [step for extent in lower for step in both(extent)],
        "last layer": both(last),
        "embeddings": [Step(0, embeddings)],
        "head": [*head, *2 * head],
    }


def teacher_steps(c: EncoderConfig, needs: Needs, work: Work, stream: Stream) -> list[Step]:
    """The teacher's forward as far as the method reads it; nothing is kept for a backward."""
    layers = (layer_forward(c, extent, work, stream.forward - stream.kept) for extent in extents(c, needs))
    embeddings = Step(0, stream.embeddings_forward * work.tokens * c.hidden_size)
    return [embeddings, *(step for layer in layers for step in layer), *head_forward(c, needs, work)]


def update(c: EncoderConfig, needs: Needs) -> Step:
    """AdamW (28 bytes a parameter), clipping (12), and casts of weights and their gradients (12 of a layer's)."""
    D, I = c.hidden_size, c.intermediate_size  # noqa: E741
    whole, projection = 4 * D * D + 2 * D * I + 9 * D + I, 3 * D * (D + 1)
    layers = sum(projection if extent == "projection" else whole for extent in extents(c, needs))
    tables = (c.vocab_size + c.max_positions + c.type_vocab_size + 2) * D
    head = D * D + 3 * D + c.vocab_size if needs.logits else 0
    return Step(0, 40 * (layers + tables + head) + 12 * layers)


# ---- the whole step, its loss apart ---------------------------------------------------------------------------


def parts(method: methods.Method, work: Work, stream: Stream) -> dict[str, list[Step]]:
    """The launches of a step by part, ``stream`` being the student's; a teacher's is float32."""
    needs = method.student_needs
    found = student_parts(work.student, needs, work, stream)
    if method.teacher_needs is not None:
        of_teachers = STREAMS["float32"] if stream is STREAMS["bfloat16"] else stream
        found["teacher"] = teacher_steps(work.teacher, method.teacher_needs, work, of_teachers)
    found["clip, AdamW"] = [update(work.student, needs)]
    found["masks, log"] = [Step(0, MASKS_BYTES * work.tokens)]
    return found


def host_operations(method: methods.Method, work: Work) -> int:
    """What the host issues, the loss apart: layers, embeddings 20, head 20, masks 45, optimiser 25, teacher's graph 5."""
    needs = method.student_needs
    layers = sum(HOST_OPERATIONS[extent] for extent in extents(work.student, needs))
    return layers + 20 + 20 * needs.logits + 45 + 25 + 5 * (method.teacher_needs is not None)


def executed_flops(method: methods.Method, work: Work, *, whole: bool = False) -> int:
    """FLOPs of a step as ``fastkd.models.flops`` counts them; ``whole``: as if all rows of all layers of both models ran."""
    shape = {"tokens": work.tokens, "pairs": work.pairs, "predicted": work.predicted}

    def forward(c: EncoderConfig, needs: Needs) -> int:
        needs = Needs(logits=needs.logits, hidden=(c.num_layers,)) if whole else needs
        return flops.forward_flops(c, needs, **shape)

    student = forward(work.student, method.student_needs)
    teacher = 0 if method.teacher_needs is None else forward(work.teacher, method.teacher_needs)
    return student + flops.backward_flops(student) + teacher + method.loss_flops(**shape)
