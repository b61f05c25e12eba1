"""Which differences between rows hold: against scratch training and against the best row; a report's first sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fastkd import quantities
from fastkd.comparison.intervals import holm
from fastkd.comparison.results import SCRATCH, Arm, Results, lower_is_better

if TYPE_CHECKING:
    from fastkd.comparison.intervals import Difference

Side = Literal["scratch", "best"]  # what rows are compared with
_NAMES = {"scratch": "scratch", "best": "the best"}
MOST_NAMED = 4  # differences in the first sentence of a report
ONE_SEED = "one seed: differences between seeds are not in this interval"


@dataclass(frozen=True)
class Claim:
    """A row's difference from another in one score."""

    arm: Arm
    score: str
    difference: Difference
    holds: bool  # told apart after Holm's correction over the rows of this score

    @property
    def is_better(self) -> bool:
        """Whether the row's mean is the better one."""
        return (self.difference.mean < 0) == lower_is_better(self.score)


def base_of(results: Results, arm: Arm, side: Side, score: str) -> Arm | None:
    """What a row is compared with: scratch training, or the row with the best mean of a score, of the same match and budget."""
    beside = [other for other in results.arms if (other.match, other.budget) == (arm.match, arm.budget)]
    if side == "scratch":
        return next((other for other in beside if other.label == SCRATCH), None)
    sign = -1 if lower_is_better(score) else 1
    means = [(sign * found.mean, other) for other in beside if (found := other.score(score)) is not None]
    return max(means, key=lambda pair: pair[0], default=(0.0, None))[1]


def against(results: Results, side: Side, score: str) -> list[Claim]:
    """Every row's difference from its base, where the two share a seed with this score."""
    found = [
        (arm, difference)
        for arm in results.arms
        if (base := base_of(results, arm, side, score)) is not None
        and arm is not base
        and (difference := arm.difference(base, score)) is not None
    ]
    tested = [difference for _, difference in found if difference.p_better is not None]
    held = dict(zip(map(id, tested), holm([difference.p_value for difference in tested]), strict=True))
    return [Claim(arm, score, difference, held.get(id(difference), False)) for arm, difference in found]


def sentence(results: Results) -> str:
    """What the comparison shows, in one sentence: which rows are told apart from scratch training, or why none is."""
    if not results.score_names():
        return "Nothing is told apart: no row has a score yet."
    if all(arm.label != SCRATCH for arm in results.arms):
        return f"Nothing is told apart from scratch: no row is scratch training ({SCRATCH})."
    claims = [claim for score in results.headline for claim in against(results, "scratch", score)]
    held = sorted(
        (claim for claim in claims if claim.holds), key=lambda claim: (not claim.is_better, claim.difference.p_value)
    )
    if not held:
        return f"Nothing is told apart from scratch: {_why_none(claims)}."
    named = _told(results, held[:MOST_NAMED])
    more = [claim.is_better for claim in held[MOST_NAMED:]]
    counts = ", ".join(f"{n} {word}" for word, n in (("better", sum(more)), ("worse", more.count(False))) if n)
    rest = f"told apart below too: {counts}" if more else "nothing else is told apart from scratch"
    seeds = f" ({ONE_SEED})" if any(claim.difference.is_of_one_seed for claim in held) else ""
    return f"{named}; {rest}{seeds}."


def _told(results: Results, held: list[Claim]) -> str:
    """The claims one row after the other, each with the scores in which it is better, or worse."""
    rows: dict[tuple[str, bool], list[str]] = {}
    for claim in held:
        rows.setdefault((results.name_of(claim.arm), claim.is_better), []).append(_numbers(results, claim))
    return "; ".join(
        f"{name} is {'better' if is_better else 'worse'} than scratch {', and '.join(scores)}"
        for (name, is_better), scores in rows.items()
    )


def _numbers(results: Results, claim: Claim) -> str:
    found, largest = claim.difference, results.largest(claim.score)
    assert found.half_width is not None and found.p_better is not None
    half_width = quantities.aligned(found.half_width, largest)
    return (
        f"on {claim.score}, {signed(found.mean, largest)} ± {half_width} (95%), P(better) {probability(found.p_better)}"
    )


def _why_none(claims: list[Claim]) -> str:
    tested = [claim for claim in claims if claim.difference.half_width is not None]
    if tested:
        if len(tested) == 1:
            return "the one difference is within what chance does"
        return f"all {len(tested)} differences are within what chance does among so many (Holm's correction)"
    if not claims:
        return "no other row shares a seed and a score with it"
    return f"{_no_interval(claims)}, so chance cannot be told" + (
        "" if _has_seeds(claims) else "; give --seeds 2 or more"
    )


def _no_interval(claims: list[Claim]) -> str:
    return "all seeds differ by the same amount" if _has_seeds(claims) else "one seed a row and no scores item by item"


def _has_seeds(claims: list[Claim]) -> bool:
    return any(claim.difference.seeds > 1 for claim in claims)


def basis(results: Results, score: str) -> str:
    """What the intervals of a score rest on, how many comparisons were made with scratch and with the best row, and what is not
    in them."""
    claims = {side: against(results, side, score) for side in get_args(Side)}
    intervals = {
        side: [each.difference for each in found if each.difference.half_width is not None]
        for side, found in claims.items()
    }
    tested = [difference for found in intervals.values() for difference in found]
    if not tested:
        return f"No intervals: {_no_interval(claims['best'])}."
    items = _range("item", [found.items for found in tested if found.items])
    seeds = _range("seed", [found.seeds for found in tested])
    made = [f"{len(found)} with {_NAMES[side]}" for side, found in intervals.items() if found]
    texts = [f"Intervals over {f'{items} and {seeds}' if items else seeds}", f"comparisons: {', '.join(made)}"]
    if any(found.is_of_one_seed for found in tested):
        texts.append(ONE_SEED)
    return "; ".join(texts) + "."


def _range(noun: str, counts: list[int]) -> str:
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low:,} {noun}{'s' * (low > 1)}" if low == high else f"{low:,} to {high:,} {noun}s"


def signed(value: float, largest: float) -> str:
    """A difference with its sign, with the decimals of `largest`: "+4.24", "0.00"."""
    text = quantities.aligned(value, largest)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def probability(p: float) -> str:
    """A probability that is never written as 0 or 1: "0.97", "0.998", "over 0.999"."""
    if not 0.001 <= p <= 0.999:
        return "under 0.001" if p < 0.5 else "over 0.999"
    return f"{p:.2f}" if 0.01 <= p <= 0.99 else f"{p:.3f}"
