"""Imported once by the process that is forked (`processes`): what each run would do again in its first seconds.

Nothing here computes with PyTorch: a fork has none of the threads that it would start.
"""

from contextlib import suppress

import matplotlib.figure  # noqa: F401
import torch.distributed.run  # noqa: F401

import fastkd.comparison.experiment
import fastkd.glue.finetune
import fastkd.pipeline  # noqa: F401
from fastkd.models import families
from fastkd.reports import page

families.available()
for template in page.environment(False).list_templates():
    page.environment(template.endswith(".md")).get_template(template)
with suppress(ImportError):  # the thousand patterns that transformers compiles before it saves a model
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("bert")
