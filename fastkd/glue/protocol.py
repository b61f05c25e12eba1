"""How every task is fine-tuned, the same for all models so that scores compare: the headline protocol and the paper's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """One configuration, or one grid of them, for all tasks.

    Everything that is not listed is transformers' default: AdamW with β (0.9, 0.999) and ε 1e-8, gradients clipped
    at a norm of 1, the model's own dropout.
    """

    name: str
    tasks: tuple[str, ...]  # the average is over these
    learning_rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    seeds: int  # unless --seeds says otherwise
    epochs: int = 5
    schedule: str = "cosine"  # transformers' name of a decay to zero
    warmup: float = 0.1  # share of the steps before the decay
    weight_decay: float = 0.0  # AdamW's, of all but biases and LayerNorms
    max_length: int = 128  # tokens of an example, both texts and special tokens included

    @property
    def grid(self) -> list[tuple[float, int]]:
        """All (learning rate, batch size)."""
        return [(rate, size) for rate in self.learning_rates for size in self.batch_sizes]

    @property
    def description(self) -> str:
        """One line for tables and the plan."""
        rates = "/".join(f"{rate:g}" for rate in self.learning_rates)
        sizes = "/".join(str(size) for size in self.batch_sizes)
        best = ", best of the grid on the dev set (optimistic)" if len(self.grid) > 1 else ""
        recipe = f"{self.epochs} epochs, {self.schedule}, warm-up {self.warmup:g}, weight decay {self.weight_decay:g}"
        return f"{self.name}: learning rate {rates}, batch {sizes}, {recipe}{best}"


# Cramming's (Geiping and Goldstein 2022): no search, so nothing is fitted to the dev set.
HEADLINE = Protocol("headline", ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"), (4e-5,), (16,), seeds=5)
# The grid and the seven tasks of arXiv 2404.19319. Of the rest its code is known to decay the rate by transformers'
# "polynomial" (of power 1, a line to 1e-7, its defaults, which is assumed), without warm-up, at weight decay 0.01.
PAPER = Protocol(
    "paper", ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"), (1e-5, 3e-5, 5e-5, 8e-5), (16, 32), seeds=1,
    schedule="polynomial", warmup=0.0, weight_decay=0.01,
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in (HEADLINE, PAPER)}
