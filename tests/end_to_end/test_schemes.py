"""Every looping scheme trains, evaluates and generates."""

import json

import pytest

from plt_jax.config import SCHEMES
from tests.training.runs import command, json_rows, tiny_values, write_config

pytestmark = pytest.mark.slow(reason="trains every scheme")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_evaluates_and_generates(finished, tmp_path, scheme):
    count = 1 if scheme == "no_loop" else 3
    values = tiny_values(
        finished.home,
        run_dir=str(tmp_path / "run"),
        model={"layers": 1, "loop": {"scheme": scheme, "count": count}},
        training={"steps": 2},
    )
    result = command("train.py", write_config(tmp_path / "config.yaml", values))
    assert result.code == 0, result
    loops = "one loop" if count == 1 else f"{count} loops"
    assert f"model: {scheme}, {loops} through one layer" in result.out
    rows = json_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[1]["loss"] < 7.0

    assert command("eval.py", tmp_path / "run").code == 0
    numbers = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [row["loop"] for row in numbers["by_loop"]] == list(range(1, count + 1))
    assert numbers["loss"] == pytest.approx(rows[2]["validation_loss"], rel=1e-6)

    # Drawn as the sample was that train.py printed, so that no new programs are compiled.
    words = ["--max_new_tokens", "15", "--temperature", "0.8", "--top_p", "0.95"]
    result = command("plt_jax.generate", tmp_path / "run", *words)
    assert (result.code, result.err) == (0, "")
    assert len(result.out) > 1
