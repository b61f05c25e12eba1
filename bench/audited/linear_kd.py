"""linear_kd's kernels, by the terms of the loss."""

from __future__ import annotations

from typing import Any

import torch

from bench.audited import Build
from fastkd.kernels.linear_kd import launch, triton, triton_difference
from fastkd.kernels.linear_kd.logits import power_of_two

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


_KL, _CE = ("HAS_TEACHER",), ("HAS_LABELS", "HAS_CE")
_TERMS = {  # what a loss is made of: the arguments that are there
    "KL": _KL,
    "KL of labelled rows": (*_KL, "HAS_LABELS"),
    "CE": _CE,
    "KL+CE at τ=1": (*_KL, *_CE),
    "KL+CE": (*_KL, *_CE, "HAS_SUM_CE"),
}
_OPTIONAL = {
    "sum_ce_ptr": "HAS_SUM_CE",
    "student_sum_ce_ptr": "HAS_SUM_CE",
    "student_offset_ce_ptr": "HAS_SUM_CE",
    "teacher_maximum_ptr": "HAS_TEACHER",
    "teacher_sum_ptr": "HAS_TEACHER",
    "teacher_ptr": "HAS_TEACHER",
    "teacher_offset_ptr": "HAS_TEACHER",
    "labels_ptr": "HAS_LABELS",
    "db_ptr": "HAS_DB",
    "expected_ptr": "REVERSE",
}


def _variant(on: tuple[str, ...], signature: dict[str, str], *flags: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The signature and the constants of a kernel with some of its flags on."""
    absent = [name for name, flag in _OPTIONAL.items() if name in signature and flag not in on]
    constants = {flag: flag in on for flag in flags} | dict.fromkeys(absent, None)
    return {name: kind for name, kind in signature.items() if name not in absent}, constants


def _logits_build(dtype: torch.dtype, width: int, terms: str = "KL+CE") -> Build:
    pointer = f"*{_TYPES[dtype]}"
    signature = {"x_ptr": pointer, "weight_ptr": pointer, "bias_ptr": "*fp32", "labels_ptr": "*i64"}
    signature |= {"logits_ptr": pointer, **dict.fromkeys(("maximum_ptr", "sum_ptr", "sum_ce_ptr"), "*fp32")}
    signature |= {"rows": "i32", "vocabulary": "i32", "stride": "i32", "exponent": "fp32"}
    signature, constants = _variant(_TERMS[terms], signature, "HAS_LABELS", "HAS_SUM_CE")
    return Build(
        name=f"linear_kd.logits {_TYPES[dtype]} D={width} {terms}",
        kernel=triton._logits_kernel,
        signature=signature,
        constants={**constants, "WIDTH": width, "UPCAST": False},
        tile=launch.logits_tile_name(dtype, width),
        width=width,
        divisible=("stride",),
        matrix=dtype != torch.float32,
        wide=True,
    )


def _offsets_build(dtype: torch.dtype, tile: int, terms: str = "KL+CE") -> Build:
    vocabulary, width = 30522, 768
    statistics = ("student_maximum_ptr", "student_sum_ptr", "student_sum_ce_ptr", "teacher_maximum_ptr")
    signature = dict.fromkeys((*statistics, "teacher_sum_ptr", "bias_ptr", "ce_ptr"), "*fp32")
    signature |= dict.fromkeys(("x_ptr", "weight_ptr"), f"*{_TYPES[dtype]}") | {
        "labels_ptr": "*i64",
        "exponent": "fp32",
    }
    flags = ("HAS_TEACHER", "HAS_LABELS", "HAS_CE", "HAS_SUM_CE")
    signature, constants = _variant(_TERMS[terms], signature, *flags)
    tiles = -(-vocabulary // tile)
    sizes = {
        "WIDTH": width,
        "WIDTH_UP": power_of_two(width),
        "TILES": tiles,
        "TILES_UP": power_of_two(tiles),
    }
    return Build(
        name=f"linear_kd.offsets {_TYPES[dtype]} tiles of {tile} {terms}",
        kernel=triton._offsets_kernel,
        signature=signature,
        constants={**constants, **sizes},
        tile="linear_kd.offsets",
        width=width,
        blocks=(),
        matrix=False,
    )


def _gradient_build(
    dtype: torch.dtype,
    tile: int,
    terms: str = "KL+CE",
    *,
    divergence: str = "kl",
    write: bool = True,
    db: bool = True,
) -> Build:
    """Without ``write`` only the value is wanted; without ``db`` the head has no bias that learns."""
    logits = dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{_TYPES[dtype]}")
    offsets = dict.fromkeys(("student_offset_ptr", "student_offset_ce_ptr", "teacher_offset_ptr"), "*fp32")
    signature = logits | offsets | {"labels_ptr": "*i64", "share_ptr": "*fp64", "kl_ptr": "*fp32", "db_ptr": "*fp32"}
    signature |= {"expected_ptr": "*fp32"}
    signature |= {"rows": "i32", "stride": "i32", "exponent": "fp32", "kl_factor": "fp32", "ce_weight": "fp32"}
    flags = ("HAS_TEACHER", "HAS_LABELS", "HAS_CE", "HAS_SUM_CE", "HAS_DB", "WRITE")
    on = (*_TERMS[terms], *("WRITE",) * write, *("HAS_DB",) * (write and db))
    on += ("REVERSE",) * (write and divergence == "reverse_kl")
    case = ("" if db else ", no db") if write else ", value"
    terms = terms.replace("KL", divergence) if divergence != "kl" else terms
    signature, constants = _variant(on, signature, *flags)
    return Build(
        name=f"linear_kd.gradient {_TYPES[dtype]} tiles of {tile} {terms}{case}",
        kernel=triton._gradient_kernel,
        signature=signature,
        constants={**constants, "TILE": tile, "DIVERGENCE": divergence},
        tile=launch.gradient_tile_name(dtype),
        width=0,
        blocks=("BLOCK_M", "BLOCK_N"),
        divisible=("stride",),
        matrix=False,
        wide=write,
    )


def _difference_build(dtype: torch.dtype, widths: tuple[int, int], terms: str = "CE") -> Build:
    operands = ("x_ptr", "weight_ptr", "bias_ptr")
    pointer, statistics = f"*{_TYPES[dtype]}", ("maximum_ptr", "sum_ptr", "mean_ptr")
    signature = {f"{model}_{name}": pointer for model in ("student", "teacher") for name in operands}
    signature |= {f"{model}_bias_ptr": "*fp32" for model in ("student", "teacher")} | {"labels_ptr": "*i64"}
    signature |= {"logits_ptr": pointer, "difference_ptr": pointer, **dict.fromkeys(statistics, "*fp32")}
    signature |= {"rows": "i32", "vocabulary": "i32", "stride": "i32", "exponent": "fp32"}
    absent = () if terms == "CE" else ("labels_ptr", "logits_ptr", "maximum_ptr", "sum_ptr")
    flags = {"HAS_LABELS": terms == "CE", "HAS_CE": terms == "CE"}
    student, teacher = widths
    return Build(
        name=f"linear_kd.difference {_TYPES[dtype]} D={student}/{teacher} mse{'+CE' if terms == 'CE' else ''}",
        kernel=triton_difference._difference_kernel,
        signature={name: kind for name, kind in signature.items() if name not in absent},
        constants=flags
        | dict.fromkeys(absent, None)
        | {"STUDENT_WIDTH": student, "TEACHER_WIDTH": teacher, "UPCAST": False},
        tile=launch.difference_tile_name(dtype),
        width=max(widths),
        divisible=("stride",),
        matrix=dtype != torch.float32,
        wide=True,
    )


def _row_builds(dtype: torch.dtype, tile: int) -> tuple[Build, Build]:
    """What reverse_kl and mse each make of a row of labelled ones."""
    tiles = -(-30522 // tile)
    sizes = {"TILE": tile, "TILES": tiles, "HAS_LABELS": True}
    logits = dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{_TYPES[dtype]}")
    numbers = dict.fromkeys(("student_offset_ptr", "teacher_offset_ptr", "expected_ptr"), "*fp32")
    means = dict.fromkeys(("mean_ptr", "offset_ptr"), "*fp32") | {"labels_ptr": "*i64", "vocabulary": "i32"}
    expected = Build(
        name=f"linear_kd.expected {_TYPES[dtype]} tiles of {tile}",
        kernel=triton_difference._expected_kernel,
        signature=logits | numbers | {"labels_ptr": "*i64", "exponent": "fp32"},
        constants=sizes,
        tile="linear_kd.expected",
        width=0,
        blocks=("BLOCK_N",),
        matrix=False,
    )
    mean = Build(
        name=f"linear_kd.means tiles of {tile}",
        kernel=triton_difference._means_kernel,
        signature=means,
        constants=sizes | {"TILES_UP": power_of_two(tiles)},
        tile="linear_kd.offsets",
        width=0,
        blocks=(),
        matrix=False,
    )
    return expected, mean


def _labels_build() -> Build:
    pointers = {"labels_ptr": "*i64", "share_ptr": "*fp64", "right_ptr": "*i32"}
    return Build(
        name="linear_kd.labels",
        kernel=triton._labels_kernel,
        signature=pointers | {"rows": "i32", "vocabulary": "i32"},
        constants={},
        tile="linear_kd.sums",
        width=0,
        blocks=("BLOCK_N",),
        matrix=False,
    )


def _values_build(terms: str) -> Build:
    pointers = dict.fromkeys(("kl_ptr", "ce_ptr", "loss_out_ptr", "kl_out_ptr", "ce_out_ptr"), "*fp32")
    numbers = {"kl_size": "i32", "ce_size": "i32", "kl_factor": "fp32", "kl_weight": "fp32", "ce_weight": "fp32"}
    signature, constants = _variant(_TERMS[terms], pointers | {"share_ptr": "*fp64"} | numbers, "HAS_TEACHER", "HAS_CE")
    return Build(
        name=f"linear_kd.values {terms}",
        kernel=triton._values_kernel,
        signature=signature,
        constants=constants,
        tile="linear_kd.sums",
        width=0,
        blocks=("BLOCK_N",),
        matrix=False,
    )


AUDIT = (
    _labels_build(),
    *(_values_build(terms) for terms in ("KL", "CE", "KL+CE")),
    *(_logits_build(torch.bfloat16, width) for width in (312, 384, 768, 1024)),
    *(_logits_build(torch.bfloat16, 768, terms) for terms in ("KL", "CE")),
    _logits_build(torch.float16, 768),
    _logits_build(torch.float32, 384),
    *(_offsets_build(torch.bfloat16, 128, terms) for terms in _TERMS),
    _offsets_build(torch.float32, 64),
    *(_gradient_build(torch.bfloat16, 128, terms, db=db) for terms in _TERMS for db in (True, False)),
    *(_gradient_build(torch.bfloat16, 128, terms, write=False) for terms in ("KL", "KL of labelled rows")),
    _gradient_build(torch.bfloat16, 256),
    _gradient_build(torch.float32, 64),
    *(
        _gradient_build(torch.bfloat16, 128, terms, divergence=divergence)
        for divergence in ("reverse_kl", "mse")
        for terms in ("KL", "KL+CE at τ=1")
    ),
    _gradient_build(torch.bfloat16, 128, divergence="reverse_kl"),
    *(_gradient_build(torch.bfloat16, 128, "KL", divergence=each, write=False) for each in ("reverse_kl", "mse")),
    *(_difference_build(torch.bfloat16, widths) for widths in ((312, 768), (384, 768), (768, 1024))),
    _difference_build(torch.bfloat16, (384, 768), ""),
    _difference_build(torch.float32, (384, 768)),
    *_row_builds(torch.bfloat16, 128),
    *_row_builds(torch.float32, 64),
)
