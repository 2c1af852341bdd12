"""The study of slices: its cases, resuming, more micro-batches until a case fits, and the table."""

import json

import pytest

from benchmarks import scaling
from plt_jax.distributed.chips import parse_topology
from plt_jax.errors import InputError


def found(fastest: float, fits: bool = True) -> dict:
    """What `plt_jax.compile` writes of a job, as far as the table reads it."""
    row = {"memory": {"needed": 2**30, "temporaries": 2**29}, "fits": fits, "mesh": {"data": 8}}
    seconds = {"fastest": fastest, "slowest": 2 * fastest}
    mfu = {"fastest": 0.5, "slowest": 0.25}
    return row | {"seconds": seconds, "mfu": mfu, "dominating": "compute"}


def test_every_case_has_a_configuration_and_a_mesh_that_divides_its_devices():
    for job in scaling.all_jobs():
        assert (scaling.CONFIGS / f"{job.config}.yaml").is_file()
        taken = 1
        for size in scaling.MESHES[job.config][job.topology].values():
            taken *= size
        assert parse_topology(job.topology).devices % taken == 0


def test_a_case_that_does_not_fit_is_tried_with_more_micro_batches(monkeypatch):
    asked = []

    def compile_job(job, accumulate, timeout):
        asked.append(accumulate)
        return found(1.0, fits=accumulate >= 4)

    monkeypatch.setattr(scaling, "compile_job", compile_job)
    row = scaling.run_job(scaling.all_jobs()[0], 1)
    assert asked == [1, 2, 4]
    assert (row["fits"], row["accumulate"]) == (True, 4)
    assert [one["fits"] for one in row["tries"]] == [False, False, True]


def test_a_case_that_never_fits_keeps_its_last_try(monkeypatch):
    def compile_job(job, accumulate, timeout):
        return found(1.0, fits=False) if accumulate < 4 else {"error": "does not divide"}

    monkeypatch.setattr(scaling, "compile_job", compile_job)
    row = scaling.run_job(scaling.all_jobs()[0], 1)
    assert (row["fits"], row["accumulate"], "error" in row) == (False, 2, False)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with compiles that take no time; returns the names of what it compiled."""
    compiled = []

    def run_job(job, timeout):
        compiled.append(job.name)
        return {"name": job.name, **job._asdict(), "accumulate": 1, **found(job.loops / 2)}

    monkeypatch.setattr(scaling, "run_job", run_job)

    def run(*words: str) -> list[str]:
        compiled.clear()
        monkeypatch.setattr("sys.argv", ["scaling", "--out", str(tmp_path), *words])
        scaling.main()
        return list(compiled)

    return run


def test_a_study_goes_on_with_what_is_missing(run, tmp_path):
    assert run("--only", "dense v5e loops=1") == ["plt_dense_1b v5e:16x16 loops=1"]
    assert run("--only", "dense v5e") == [
        f"plt_dense_1b v5e:16x16 loops={loops}" for loops in (2, 3)
    ]
    assert run("--only", "dense v5e") == []
    lines = (tmp_path / "scaling.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loops"] for line in lines] == [1, 2, 3]
    table = (tmp_path / "scaling.txt").read_text(encoding="utf-8").splitlines()
    assert len(table) == 4
    assert "25.0-50.0" in table[1]
    assert [line.split()[-2] for line in table[1:]] == ["1.00", "2.00", "3.00"]


def test_words_that_no_case_has_are_refused(run):
    with pytest.raises(InputError, match="no case has these words"):
        run("--only", "v6e")
