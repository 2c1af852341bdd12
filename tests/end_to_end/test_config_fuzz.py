"""Random configurations: each is refused in one line that names a field, or trains two steps.

`PLT_FUZZ=3000 pytest -s tests/end_to_end/test_config_fuzz.py` draws as many, from another seed
(PLT_FUZZ_SEED) and prints each as a JSON line; `fuzz_worker --values` tries one of them again.
"""

import collections
import json
import os
import subprocess
import sys
import time
from typing import Annotated, Any

import jax
import pytest
from pydantic import Field

from plt_jax.config import RunConfig
from plt_jax.config.types import Section
from tests.end_to_end.drawn_configs import drawn
from tests.end_to_end.field_values import all_fields, invalid, kind_of, valid, valid_of_type
from tests.end_to_end.fuzz_worker import names
from tests.training.runs import CACHE, REPOSITORY, environment, simulated

# Other programs, which compile in half of the time; later versions know no such flag, and end.
QUICK = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
CASES = {1: 8, 8: 2}
"""The number of cases in a plain run of the tests, by the number of devices."""


def fuzz(folder, devices: int, cases: int, seed: int) -> dict[str, Any]:
    """Runs the worker and prints its lines; returns its counts and failures."""
    many, seen = "PLT_FUZZ" in os.environ, simulated(devices)
    flags = {
        **seen,
        "XLA_FLAGS": seen["XLA_FLAGS"] + QUICK,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # The shared cache would get thousands of programs that no other test needs.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax") if many else CACHE,
    }
    words = [folder / "home", "--cases", cases, "--seed", seed, *(["--all"] if many else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.end_to_end.fuzz_worker", *map(str, words)],
        **{"cwd": REPOSITORY, "env": environment(**flags)},
        **{"stdout": subprocess.PIPE, "text": True},
    )
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
    assert process.returncode == 0
    return json.loads(line)


@pytest.mark.slow(reason="starts processes")
@pytest.mark.parametrize("devices", CASES)
def test_a_random_config_is_refused_by_a_field_or_trains(tmp_path, devices):
    cases = int(os.environ.get("PLT_FUZZ", CASES[devices]))
    seed = int(os.environ.get("PLT_FUZZ_SEED", time.time() if "PLT_FUZZ" in os.environ else 0))
    found = fuzz(tmp_path, devices, cases, seed)
    assert found["devices"] == devices
    assert found["failures"] == []
    counts = collections.Counter(found["counts"])
    assert counts["trained"] + counts["refused"] == cases
    assert min(counts["trained"], counts["refused"]) >= cases // 5


@pytest.mark.slow(reason="draws four hundred configurations")
def test_every_field_is_drawn_with_valid_and_invalid_values(tmp_path):
    seen = {name for case in drawn(tmp_path, 400, seed=0) for name in case.values}
    fields = dict(all_fields())
    assert set(fields) <= seen
    for name, kind in fields.items():
        assert valid(name, kind, tmp_path).is_empty is False
        assert invalid(name, kind, tmp_path).is_empty is False


def test_a_new_field_is_drawn_by_its_type(tmp_path):
    class New(Section):
        switch: bool = False
        ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
        table: dict[str, int] = Field({})

    class Larger(RunConfig):
        new: New = New()

    added = dict(all_fields(Larger)).keys() - dict(all_fields()).keys()
    assert added == {"new.switch", "new.ratio", "new.table"}
    ratio = kind_of(New.model_fields["ratio"].annotation)
    assert ratio.type is float and ratio.optional
    values = [0.01, 0.3, 0.5, 0.9, 1.0]
    assert repr(valid_of_type("new.ratio", ratio, tmp_path)) == f"sampled_from({values})"
    with pytest.raises(TypeError, match=r"new\.table has type .*: say in field_values\.py"):
        valid("new.table", dict(all_fields(Larger))["new.table"], tmp_path)


@pytest.mark.parametrize(
    ("message", "field", "named"),
    [
        ("error: a.yaml: training.steps = 0: input should be", "training.steps", True),
        ("error: a.yaml: model.loop: loop.count is 2, but", "model.loop.count", True),
        ("error: a.yaml: model: heads 6 is not divisible by kv_heads 4", "model.kv_heads", True),
        ("error: a.yaml: model: heads 6 is not divisible by kv_heads 4", "model.width", False),
        ("error: --run_dir x is a file; choose another", "run_dir", True),
        ("error: there is no text at 'x'; give the source of one", "data.source", False),
        ("error: /tmp/data/source/x is no folder", "data.source", False),
        ("error: data.sources: x is not a tokenized corpus", "data.source", False),
        ("error: cannot read the tokenizer x; give the path of one", "tokenizer.path", False),
        ("error: a.yaml: unknown field model.wdths; did you mean", "model.wdths", True),
    ],
)
def test_a_message_that_names_a_field_is_recognized(message, field, named):
    assert names(message, field) is named
