"""The figures of a run's report, in their order; a figure without data is left out."""

from __future__ import annotations

from functools import partial

from plt_jax.reports.html import Section, draw_all
from plt_jax.reports.model_plots import (
    draw_expert_loads,
    draw_experts_by_loop,
    draw_gates,
    draw_hidden_norms,
    draw_norms_by_parameter,
)
from plt_jax.reports.run_history import History
from plt_jax.reports.training_plots import (
    draw_gradient_norm,
    draw_learning_rate,
    draw_losses,
    draw_speed,
    draw_wall_time,
)

DRAWINGS = (
    draw_losses,
    draw_learning_rate,
    draw_gradient_norm,
    draw_norms_by_parameter,
    draw_gates,
    draw_hidden_norms,
    draw_expert_loads,
    draw_experts_by_loop,
    draw_speed,
    draw_wall_time,
)
"""The functions that draw them, in the order of the page."""


def draw_sections(history: History) -> list[Section]:
    """The figures of a run, with titles and explanations.

    Raises:
      InputError: the values of a metric are not numbers, or differ in shape.
    """
    return draw_all(partial(draw, history) for draw in DRAWINGS)
