"""The student before its first step: random, or from its teacher's weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastkd.device.clock import now
from fastkd.models import importance, subcloning
from fastkd.models import student as students
from fastkd.models.encoder import Encoder, EncoderConfig

if TYPE_CHECKING:
    from fastkd.methods import Method
    from fastkd.models import hf
    from fastkd.run_config import RunConfig
    from fastkd.setup import Setup

log = logging.getLogger(__name__)

IMPORTANCE_PACKS = 8  # a teacher's neurons are ranked on this many packs of the training text


def random(
    config: RunConfig,
    shape: EncoderConfig,
    found: Sequence[Method],
    attention: str,
    device: torch.device,
) -> Encoder:
    """A random student; the methods' own weights too."""
    head = any(method.trains_mlm_head for method in found)
    student = Encoder(
        shape, mlm_head=head, attention=attention, residual=getattr(torch, config.residual), seed=config.seed
    )
    for method in found:
        method.initialise(torch.Generator().manual_seed(config.seed), device)
    return student.to(device)


def from_teacher(setup: Setup, loaded: hf.Loaded) -> None:
    """Put the teacher's weights into the student. Where it is narrower, every rank finds the same important neurons on the same
    text; the data order does not change. A run that goes on does it again, before its checkpoint takes the place of them."""
    if not subcloning.is_cut(setup.student.config, loaded.config):
        students.init_from_teacher(setup.student, loaded.encoder)
        return
    began, teacher = now(), loaded.encoder.to(setup.world.device)
    packs = setup.first_packs(IMPORTANCE_PACKS)
    found = importance.measure(teacher, ((setup.method.text(batch), batch) for batch in packs))
    students.init_from_teacher(setup.student, teacher, found)
    loaded.encoder.to("cpu")  # the place that it was loaded to
    seconds = now() - began
    log.info("starting with %s, chosen on %d packs of text in %.1f s", setup.start_remark, IMPORTANCE_PACKS, seconds)
