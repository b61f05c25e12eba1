"""Rows with values of their own: how they are written, what they run, and what they are said to differ in."""

import pytest

from fastkd.comparison import differences
from fastkd.comparison.rows import Row, base_row, parse_row, parse_rows

SHARED = {"preset": "quickstart"}


def test_a_value_is_written_after_its_option() -> None:
    row = parse_row("mlm+schedule=wsd+mask-rate=0.3+optimizer=muon")
    assert row == Row("mlm", values=(("optimizer", "muon"), ("schedule", "wsd"), ("mask_rate", 0.3)))
    assert row.label == "mlm +optimizer=muon +schedule=wsd +mask-rate=0.3"
    assert row.slug == "mlm-optimizer=muon-schedule=wsd-mask-rate=0.3"
    assert parse_row(row.label) == row
    run = row.resolved(SHARED, budget_tokens=1).run
    assert (run.optimizer, run.schedule, run.mask_rate) == ("muon", "wsd", 0.3)


def test_options_and_a_teacher_stand_beside_it() -> None:
    row = parse_row("minilmv2+init-from-teacher+optimizer=muon@runs/big")
    assert (row.options, row.values, row.teacher) == (("init_from_teacher",), (("optimizer", "muon"),), "runs/big")
    assert row.label == "minilmv2 +init-from-teacher +optimizer=muon @big"


def test_a_rows_own_value_stands_above_the_shared_one() -> None:
    shared = SHARED | {"optimizer": "muon", "schedule": "wsd"}
    run = parse_row("mlm+optimizer=adamw").resolved(shared, budget_tokens=1).run
    assert (run.optimizer, run.schedule) == ("adamw", "wsd")


def test_it_is_a_difference_and_no_base() -> None:
    rows = parse_rows("mlm+optimizer=muon+schedule=wsd,mlm+mask-rate=0.3,mlm,minilmv2", as_released=True)
    assert base_row(rows) == Row("mlm") and rows[-1] == Row("minilmv2", ("as_released",))
    found = [differences.of_options(row, rows, SHARED, 1e-3, 1e-3) for row in rows[:3]]
    assert found == [
        ["schedule wsd, mlm has linear", "optimizer muon, mlm has adamw"],
        ["mask_rate 0.3, mlm has 0.15"],
        [],
    ]


def test_an_option_of_its_method_is_one_of_its_values() -> None:
    row = parse_row("logit_kd:0.5>minilmv2+kd-until=0.2+relation-heads=6+schedule=wsd+divergence=mse")
    assert row.values == (("schedule", "wsd"), ("divergence", "mse"), ("kd_until", 0.2), ("relation_heads", 6))
    assert parse_row(row.label) == row
    resolved = row.resolved(SHARED | {"kd_until": 0.5}, budget_tokens=1)
    assert (resolved.run.schedule, resolved.method.kd_until, resolved.method.relation_heads) == ("wsd", 0.2, 6)
    found = differences.of_options(row, [row, parse_row("logit_kd")], SHARED | {"kd_until": 0.5}, [], [])
    assert found == [
        "divergence mse, otherwise kl",
        "kd_until 0.2, otherwise 0.5",
        "relation_heads 6, otherwise not set",
    ]
    assert parse_row("logit_kd+init-from-teacher+kd-until=0.2+schedule=wsd").control == parse_row(
        "mlm+init-from-teacher+schedule=wsd"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mlm+optimizer=lion", "optimizer=… takes 'adamw' or 'muon', got 'lion'"),
        ("mlm+optimizer", "takes 'adamw' or 'muon', got ''"),
        ("mlm+mask-rate=many", "mask-rate=… takes a number, got 'many'"),
        ("mlm+schedule=wsd+schedule=linear", "has +schedule twice"),
        ("mlm+warmup=0.1", "mlm takes +init-from-teacher, +optimizer=…, +schedule=…, +mask-rate=…, not +warmup=0.1"),
        ("logit_kd+kd-until", "kd-until=… takes a number, got ''"),
        ("mlm+kd-until=0.2", "not +kd-until=0.2"),
        ("minilmv2+relation-heads=2.5", "relation-heads=… takes a whole number, got '2.5'"),
        ("minilmv2+as-released=yes", "not +as-released=yes"),
    ],
)
def test_what_a_row_does_not_take_is_refused_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match="row") as refused:
        parse_row(spec)
    assert words in str(refused.value) and "\n" not in str(refused.value)
