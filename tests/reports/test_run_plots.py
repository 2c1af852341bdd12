"""The figures of made-up runs."""

from xml.etree import ElementTree

import numpy as np
import pytest

from plt_jax.reports.run_history import make_history
from plt_jax.reports.run_plots import draw_sections
from tests.reports.rows import CONFIG, full_rows, rolled_back


def titles(*rows) -> list[str]:
    """The titles of all sections, whose figures are checked to be XML."""
    sections = draw_sections(make_history(CONFIG, list(rows)))
    for section in sections:
        ElementTree.fromstring(section.svg)
    return [section.title for section in sections]


ALL = [
    *["Losses", "Learning rate", "Gradient norm", "Norms by parameter", "Gates"],
    *["Hidden states by loop", "Experts", "Experts by loop and layer", "Speed"],
    "Where the wall time went",
]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_all_that_a_run_may_write_is_drawn(count, recwarn):
    assert titles(*full_rows(count)) == ALL
    assert not [str(warning.message) for warning in recwarn]


def test_what_is_not_there_is_left_out(recwarn):
    assert titles({"step": 1, "loss": None}) == []
    assert titles(rolled_back(3, 5, 1)) == []
    assert titles({"step": 1, "validation_loss": 2.0, "bits_per_byte": 1.0}) == ["Losses"]
    old = {"step": 1, "loss": 2.0, "gradient_norm": None, "tokens_per_second": 0.0}
    assert titles(old, {**old, "step": 2, "loss": None}) == ["Losses"]
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("gradient_norm/layers.q", "Norms by parameter"),
        ("update_norm/layers.q", "Norms by parameter"),
        ("gate_by_loop", "Gates"),
        ("hidden_norm_by_loop", "Hidden states by loop"),
        ("expert_max_load", "Experts"),
        ("router_z_by_loop", "Experts by loop and layer"),
        ("mfu", "Speed"),
        ("seconds/steps", "Where the wall time went"),
    ],
)
def test_one_name_makes_a_section(name, section):
    rows = [{"step": row["step"], "loss": None, name: row[name]} for row in full_rows(3)]
    assert titles(*rows) == [section]


@pytest.mark.slow(reason="draws every figure")
def test_numbers_that_are_not_finite_leave_gaps(recwarn):
    rows = full_rows(30)
    for name in set(rows[0]) - {"step", "time", "clock"}:
        if not name.startswith("seconds/"):
            value = rows[3][name]
            rows[3][name] = (np.full_like(value, None, object)).tolist() if value else None
    rows[3]["skipped"] = 2.0
    assert titles(*rows) == ALL
    assert not [str(warning.message) for warning in recwarn]
