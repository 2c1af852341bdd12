"""Two processes of four devices evaluate, generate and export what one device does, and refuse
together."""

import json
import shutil

import pytest

from plt_jax.data.synthetic_examples import byte_tokenizer
from plt_jax.runs.directory import create_run
from plt_jax.training.trainer import train
from tests.distributed.commands import run_together
from tests.evaluation.local_tasks import CHOICES, write_task
from tests.models import random_params
from tests.training.runs import command, flat_numbers, make_home, snapshot, tiny_config

pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'plt_jax[lm_eval]')")

pytestmark = pytest.mark.slow(reason="two processes compile the programs of every evaluation")

MESH = ["--mesh.fsdp", 4, "--mesh.tensor", 2]
TASK = {"task": "addition", "difficulties": [1], "test_difficulties": [1, 2]}
WHOLE_TEXTS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}}"
metric_list:
  - {metric: bits_per_byte}
"""
CONTINUED = """
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{continued}}"
generation_kwargs: {until: ["!"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match}
"""
GENERATE = ["plt_jax.generate", "RUN", "--prompt", "3+4=", "--max_new_tokens", 6]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus, and a run on a synthetic task that answers some of it."""
    home = make_home(tmp_path_factory.mktemp("evaluation") / "home")
    sections = {
        "model": {"loop": {"exit_gate": True}},
        "data": {"synthetic": TASK},
        "training": {"steps": 250, "batch_size": 16, "exit_entropy": 0.1, "log_every": 50}
        | {"evaluate_every": 250, "checkpoint_every": 250},
    }
    train(tiny_config(home, home / "run", **sections))
    experts = {"experts": 4, "expert_width": 8}
    model = {"moe": experts, "qk_norm": True}
    mixture = tiny_config(home, home / "mixture", model=model, data={"synthetic": TASK})
    create_run(mixture, random_params(mixture.model), byte_tokenizer(mixture), {})
    return home


@pytest.fixture(scope="module")
def uses(home):
    """Commands that evaluate a run, by the file that each writes."""
    rows = [{"start": start, "choices": ["4", "5", "x"]} for start in ("1+3=", "2+2=", "4+1=")]
    for number, row in enumerate(rows):
        row |= {"label": number % 3, "continued": "?"}
    # One of them is what the model writes.
    words = [*GENERATE[:3], rows[0]["start"], "--max_new_tokens", 6]
    text = command(*(home / "run" if word == "RUN" else word for word in words)).out.strip("\n")
    rows[0]["continued"] = text.removeprefix(rows[0]["start"])
    tasks = home / "tasks"
    tasks.mkdir()
    for name, settings in (("choice", CHOICES), ("whole", WHOLE_TEXTS), ("continued", CONTINUED)):
        write_task(tasks / name, name, settings, rows)
    corpus = home / "corpus"
    return {
        "eval.json": ["eval.py", "RUN", "--at_loops", 3],
        "documents.json": ["eval.py", "RUN", "--by_document", "--text", corpus, "--stride", 5],
        "loops.json": ["eval.py", "RUN", "--loops", "--sequences", 2],
        "exits.json": ["eval.py", "RUN", "--exit", "kl:0.01,entropy:1,gate:0.6"],
        "exact_match.json": ["eval.py", "RUN", "--exact_match", "--limit", 11],
        "tasks.json": [
            *("eval.py", "RUN", "--tasks", "choice,whole,continued"),
            *("--include_path", tasks, "--batch_size", 3),
        ],
    }


EXPORT = ["plt_jax.convert", "export", "RUN/../mixture", "RUN/exported", "--shard_gb", 1e-5]
BY_EXPERT = [*EXPORT[:3], "RUN/by_expert", *EXPORT[4:], "--mesh.expert", 4, "--mesh.tensor", 2]


def in_run(run, words) -> list[object]:
    return [str(word).replace("RUN", str(run)) for word in words]


@pytest.fixture(scope="module")
def alone(home, uses, task_files):
    """The run that one device has evaluated, and what it generates."""
    run = home / "alone"
    shutil.copytree(home / "run", run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for words in uses.values():
            result = command(*in_run(run, words))
            assert result.code == 0, result
    assert command(*in_run(run, EXPORT)).code == 0
    return run, command(*in_run(run, GENERATE)).out


REFUSED = (
    (["run", "--mesh.data", 1, "--mesh.fsdp", 16], "need 16 devices, but there are 8"),
    (["run", "--mesh.tensor", 8], "embedding has a dimension of 270, which does not divide by"),
    (["run", *MESH, "--batch_size", 0], "--batch_size is 0; it must be at least 1"),
    (["run", *MESH, "--batch_size", "1INDEX"], "the command line here is not that of process 0"),
    (["mixture", *MESH, "--loops"], "which experts cannot share over mesh axes data x fsdp x"),
)


@pytest.fixture(scope="module")
def together(home, uses):
    """The run that two processes have evaluated, and how their commands ended."""
    run = home / "together"
    shutil.copytree(home / "run", run)
    commands = [[*in_run(run, words), *MESH] for words in [*uses.values(), GENERATE, EXPORT]]
    commands += [in_run(run, BY_EXPERT)]
    commands += [["eval.py", home / name, *words] for (name, *words), _ in REFUSED]
    return run, run_together(commands)


def test_both_processes_end_well_and_the_first_prints(together, uses):
    _, (first, second) = together
    for one, other in zip(first[: len(uses)], second, strict=False):
        assert (one.code, other.code) == (0, 0), (one.err, other.err)
        assert "devices: 8 cpu in 2 processes (data 1 x fsdp 4 x" in one.err
        assert "written to " in one.out
        assert "devices: " not in other.err
    assert second[0].out == ""


NAMES = ("eval", "documents", "loops", "exits", "exact_match", "tasks")


@pytest.mark.parametrize("name", [f"{name}.json" for name in NAMES])
def test_two_processes_find_the_numbers_of_one_device(alone, together, name):
    found, right = (
        flat_numbers(json.loads((run / name).read_text())) for run in (together[0], alone[0])
    )
    assert found.keys() == right.keys() and right
    for where, number in right.items():
        if "time" in where or where == "date":
            continue
        # Square roots of what is zero but for rounding, where all heads see the same key.
        tolerance = 1e-3 if "head_rank" in where else 1e-5
        assert found[where] == pytest.approx(number, rel=tolerance, abs=tolerance), where


def test_some_answers_are_right_and_some_are_not(alone):
    run, _ = alone
    results = json.loads((run / "tasks.json").read_text())["results"]
    assert results["continued"]["exact_match,none"] == pytest.approx(1 / 3)


def test_each_document_has_a_line(alone, together):
    lines = [(run / "documents.jsonl").read_text().splitlines() for run in (alone[0], together[0])]
    assert len(lines[0]) == len(lines[1]) == 12
    for right, found in zip(*(map(json.loads, of_run) for of_run in lines), strict=True):
        assert found == pytest.approx(right, rel=1e-5)


def test_two_processes_write_the_text_of_one_device(alone, together, uses):
    _, (first, second) = together
    assert first[len(uses)].out == alone[1]
    assert (first[len(uses)].code, second[len(uses)].code) == (0, 0)


def test_two_processes_export_the_files_of_one_device(alone, together):
    _, ended = together
    for (*_, result), out in zip(
        (results[: -len(REFUSED)] for results in ended), ("written to ", ""), strict=True
    ):
        assert result.code == 0, result
        assert out in result.out
    right = snapshot(alone[0] / "exported")
    assert len(right) > 5
    for name in ("exported", "by_expert"):
        assert snapshot(together[0] / name) == right


def test_what_both_refuse_is_one_line_of_each(together):
    for results in together[1]:
        for (words, message), result in zip(REFUSED, results[-len(REFUSED) :], strict=True):
            assert result.code == 2, (words, result)
            assert message in result.err
            assert [line.startswith("error: ") for line in result.err.splitlines()].count(True) == 1
    differs = together[1][0][-2].err
    assert differs.splitlines()[-1].startswith("error: process 1 of 2 (host "), differs
