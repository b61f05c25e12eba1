"""How a recipe is written, what it means, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fastkd import recipe
from fastkd.config import parse, resolve
from fastkd.methods import logit_kd

OPTIONS = {"preset": "quickstart", "budget_tokens": 1000}


@pytest.mark.parametrize("spec", ["minilmv2:0.3>mlm", " minilmv2:0.30 > mlm", "minilmv2:.3,mlm"])
def test_one_spelling_and_stages_that_fill_the_budget(spec: str) -> None:
    assert recipe.spelled(spec) == "minilmv2:0.3>mlm" and recipe.slug("minilmv2:0.3>mlm") == "minilmv2-0.3-mlm"
    first, second = recipe.stages(recipe.spelled(spec), recipe.options_class("minilmv2:0.3>mlm")())
    assert (first.method, first.start, first.end) == ("minilmv2", 0.0, 0.3)
    assert (second.method, second.start, second.end) == ("mlm", 0.3, 1.0)
    assert not first.goes_on and not second.goes_on


def test_a_method_alone_is_one_stage_with_its_own_options() -> None:
    assert recipe.options_class("logit_kd") is logit_kd.Config
    (only,) = recipe.stages("logit_kd", logit_kd.Config(temperature=3.0))
    assert only.options == logit_kd.Config(temperature=3.0) and (only.start, only.end) == (0.0, 1.0)


def test_a_step_belongs_to_the_stage_that_its_progress_is_in() -> None:
    found = recipe.stages("mlm:0.25>minilmv2:0.5>mlm", recipe.options_class("mlm:0.25>minilmv2:0.5>mlm")())
    at = {0.0: 0, 0.25: 0, math.nextafter(0.25, 1): 1, 0.75: 1, 0.76: 2, 1.0: 2}
    assert {progress: recipe.at(found, progress) for progress in at} == at


def test_a_time_without_the_teacher_goes_on_with_the_optimiser() -> None:
    options = recipe.options_class("minilmv2:0.5>logit_kd")(kd_until=0.2, ce_weight=1.0)
    first, taught, alone = recipe.stages("minilmv2:0.5>logit_kd", options)
    assert (taught.start, taught.end, alone.start, alone.end) == (0.5, 0.6, 0.6, 1.0)
    assert alone.goes_on and not taught.goes_on and not first.goes_on
    assert isinstance(alone.options, logit_kd.Untaught) and not isinstance(taught.options, logit_kd.Untaught)
    assert dataclasses.asdict(alone.options) == dataclasses.asdict(taught.options)


def test_options_of_all_methods_are_read_and_checked() -> None:
    found = resolve({**OPTIONS, "method": "minilmv2:0.3>logit_kd", "relation_heads": 6, "temperature": 1.5})
    first, second = recipe.stages(found.run.method, found.method)
    assert (first.options.relation_heads, second.options.temperature) == (6, 1.5)
    both = resolve({**OPTIONS, "method": "minilmv2:0.3>logit_kd", "as_released": True})
    assert all(stage.options.as_released for stage in recipe.stages(both.run.method, both.method))
    with pytest.raises(ValueError, match="--temperature must be above 0"):
        resolve({**OPTIONS, "method": "minilmv2:0.3>logit_kd", "temperature": 0.0})
    with pytest.raises(ValueError, match="does not read --temperature; it is an option of logit_kd"):
        parse(["--method", "minilmv2:0.3>mlm", "--temperature", "2", "--budget-tokens", "9"])
    assert "minilmv2-0.3-mlm" in str(parse(["--method", "minilmv2:0.3,mlm", "--budget-tokens", "9"]).output_dir)


def test_scratch_stages_need_no_teacher_and_one_that_does_keeps_it() -> None:
    assert resolve({**OPTIONS, "method": "mlm:0.5>mlm"}).run.teacher is None
    assert resolve({**OPTIONS, "method": "mlm:0.5>minilmv2"}).run.teacher == "quickstart"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("minilmv2>mlm", "for which share of the budget 'minilmv2' trains, such as minilmv2:0.3"),
        ("minilmv2:0.3", "give it no share, or write 'minilmv2:0.3>mlm', in quotes"),
        ("minilmv2:0.3>mlm:0.7", "give it no share"),
        ("minilmv2:0.6>logit_kd:0.4>mlm", "leave nothing of the budget for mlm"),
        ("minilmv2:1>mlm", "between 0 and 1, got '1'"),
        ("minilmv2:a>mlm", "between 0 and 1, got 'a'"),
        ("minilmv2:nan>mlm", "between 0 and 1, got 'nan'"),
        ("minilmv2:0.3>", "unknown method ''"),
        ("minilm3:0.3>mlm", "unknown method 'minilm3'"),
    ],
)
def test_what_is_no_recipe_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        recipe.spelled(spec)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("until", "ce"), [(0.0, 0.5), (1.1, 0.5), (math.nan, 0.5), (0.2, 0.0)])
def test_a_time_that_is_none_is_refused(until: float, ce: float) -> None:
    with pytest.raises(ValueError, match="--kd-until"):
        logit_kd.Config(kd_until=until, ce_weight=ce)
