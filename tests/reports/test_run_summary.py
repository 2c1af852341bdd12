"""The findings in the summaries of made-up runs."""

from plt_jax.reports.run_history import make_history
from plt_jax.reports.run_summary import summarize, what_stands_out
from tests.reports.rows import CONFIG, clocked, evaluated, rolled_back


def test_what_stands_out_is_reported():
    assert what_stands_out(*history_and_summary({"step": 1, "loss": 2.0})) == []
    findings = what_stands_out(
        *history_and_summary(
            {**clocked(10, 10, steps=4, data=6), "skipped": 3.0},
            evaluated(10, 10, 2.0),
            rolled_back(10, 12, 20),
            {**clocked(20, 30, steps=8, data=22), "loss": None, "expert_dropped": 0.25},
            evaluated(20, 30, 2.5),
        )
    )
    assert len(findings) == 6
    assert findings[0] == "The newest loss, at step 20, is not finite."
    assert findings[1] == "Validation loss was lowest at step 10, 2.0000; it is 2.5000 now."
    assert findings[2].startswith("Up to 25.00% of the expert choices")
    assert findings[3].startswith("3 of 20 steps were skipped")
    assert findings[4].startswith("Rollbacks: 1. They undid 12 steps, and each followed 10")
    assert findings[5].endswith("other part, 73%, was: waiting for data.")


def history_and_summary(*rows):
    history = make_history(CONFIG, list(rows))
    return history, summarize(history)
