"""Where the wall time of made-up runs went, and what their summaries say of it."""

import pytest

from plt_jax.reports.run_history import make_history, restart_steps
from plt_jax.reports.run_page import key_numbers
from plt_jax.reports.run_summary import summarize
from plt_jax.reports.wall_time import BETWEEN, UNDONE
from tests.reports.rows import BEGAN, CONFIG, clocked, evaluated, rolled_back


def spent(*rows) -> dict[str, float]:
    """Seconds by phase of a run, after a check that they are all of its time."""
    history = make_history(CONFIG, list(rows))
    first = next(row for row in history.rows if row["clock"])
    whole = history.rows[-1]["time"] - first["time"] + sum(first["clock"].values())
    assert sum(history.spent.values()) == pytest.approx(whole)
    return history.spent


def test_the_wall_time_of_an_undisturbed_run_is_that_of_its_newest_row():
    rows = [
        clocked(10, 5, starting=1, compiling=3, steps=1),
        clocked(20, 8, starting=1, compiling=3, steps=4),
    ]
    assert spent(*rows) == {"starting": 1, "compiling": 3, "steps": 4}
    assert spent(*rows, evaluated(20, 10)) == {
        **{"starting": 1, "compiling": 3, "steps": 4, "evaluation": 2}
    }


def test_what_lies_between_starts_is_counted_apart():
    rows = [
        clocked(10, 5, starting=1, steps=4),
        clocked(20, 10, starting=2, steps=8),
        evaluated(20, 12),
        # It went on to step 29 or so, was killed, and began anew after 100 seconds.
        clocked(30, 105, starting=1, steps=4),
        clocked(40, 110, starting=1, steps=9),
    ]
    history = make_history(CONFIG, rows)
    assert [len(start) for start in history.starts] == [3, 2]
    assert restart_steps(history.starts) == [20]
    assert spent(*rows) == {"starting": 3, "steps": 17, "evaluation": 2, BETWEEN: 88}
    assert summarize(history).goodput == pytest.approx(17 / 110)
    assert summarize(history).restarts == 1


def test_a_start_that_is_slow_to_its_first_row_is_told_from_the_one_before():
    """Its seconds are more than those of the row before, but fewer than have gone by."""
    rows = [
        clocked(10, 5, starting=1, steps=4),
        clocked(20, 65, starting=40, steps=8),
        clocked(30, 70, starting=40, steps=13),
    ]
    assert len(make_history(CONFIG, rows).starts) == 2
    assert spent(*rows) == {"starting": 41, "steps": 17, BETWEEN: 12}
    # The same seconds at a time at which they are one start's.
    rows[1]["time"], rows[2]["time"] = BEGAN + 48, BEGAN + 53
    assert spent(*rows) == {"starting": 40, "steps": 13}


def test_a_start_may_evaluate_before_it_logs():
    rows = [
        clocked(20, 10, starting=1, steps=9),
        evaluated(25, 107),
        clocked(40, 110, starting=1, steps=9),
    ]
    history = make_history(CONFIG, rows)
    assert [[row["step"] for row in start] for start in history.starts] == [[20], [25, 40]]
    assert spent(*rows) == {"starting": 2, "steps": 18, BETWEEN: 90}


def test_steps_that_a_rollback_undid_are_not_good_ones():
    rows = [
        clocked(20, 20, steps=20),
        rolled_back(20, 30, 50),
        rolled_back(20, 40, 90),
        clocked(30, 100, steps=100),
    ]
    assert spent(*rows) == {"steps": pytest.approx(30), UNDONE: pytest.approx(70)}
    history = make_history(CONFIG, rows)
    assert summarize(history).goodput == pytest.approx(0.3)
    assert [one.undone for one in summarize(history).rollbacks] == [30, 40]
    # Killed before another row, it leaves the time alone to judge by.
    assert spent(*rows[:2]) == {"steps": 20, UNDONE: 30}
    begun_anew = clocked(30, 160, steps=10)
    assert spent(*rows[:2], begun_anew) == {"steps": 30, UNDONE: 30, BETWEEN: 100}
    # The first thing of a start, after it resumed at step 20.
    late = [rolled_back(20, 30, 180), clocked(30, 190, steps=40)]
    assert spent(rows[0], *late) == {
        **{"steps": pytest.approx(30), UNDONE: pytest.approx(30), BETWEEN: 130}
    }


def test_clocks_without_times_say_nothing_of_what_lies_between():
    rows = [clocked(10, 0, steps=4), clocked(20, 0, steps=8), clocked(30, 0, steps=3)]
    for row in rows:
        del row["time"]
    history = make_history(CONFIG, rows)
    assert history.spent == {"steps": 11} and summarize(history).restarts == 1


def test_rows_without_clocks_tell_no_wall_time():
    history = make_history(CONFIG, [{"step": 1, "loss": 2.0, "goodput": 0.5}])
    assert history.spent == {}
    summary = summarize(history)
    assert summary.goodput is summary.seconds is summary.restarts is None
    assert "wall time" not in [name for name, _, _ in key_numbers(CONFIG, summary)]
