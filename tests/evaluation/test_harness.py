"""The lm-evaluation-harness on a trained run: each request against a direct computation, and tasks
on real text as a user runs them."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import plt_jax
from plt_jax.errors import InputError
from plt_jax.evaluation.tasks import SUITES, load_tasks
from plt_jax.model.looping import with_loops
from plt_jax.runs.directory import open_trained
from tests.evaluation.local_tasks import CHOICES, write_task
from tests.models import forward
from tests.training.runs import assert_refused, command, environment, simulated

pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'plt_jax[lm_eval]')")

from lm_eval.tasks import TaskManager

from plt_jax.evaluation.harness import HarnessModel

pytestmark = pytest.mark.usefixtures("task_files")

PAIRS = [
    ("the state of our", " union"),
    ("", "peace goes on"),
    ("the work of peace ", "goes on and on and on"),
    ("is strong and the work of peace goes on and the state", " of"),
    ("peace", " of our union is strong and the work of peace goes on and the state of it" * 2),
    ("our unio", "n"),  # which the tokenizer joins
    ("th", "e work"),
]


def requests(*arguments):
    """As the harness hands them over."""
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The session's run, and what direct computations need of it."""
    from tests.training.runs import finished_run

    finished = finished_run(tmp_path_factory.getbasetemp())
    return open_trained(finished.directory)


@pytest.fixture(scope="module")
def model(run):
    return HarnessModel(str(run.directory), batch_size=3)


def log_probabilities(run, tokens):
    """Log-probability of each token but the first, given all before it, float64."""
    config = run.config.model
    # Padded behind, where no position looks, so that one program does for all.
    inputs = np.zeros((1, config.max_length), np.int32)
    inputs[0, : len(tokens) - 1] = tokens[:-1]
    logits = forward(config)(run.params, inputs)[0, : len(tokens) - 1]
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return log_p[np.arange(len(tokens) - 1), tokens[1:]], log_p.argmax(-1) == tokens[1:]


def expected_likelihood(run, context, continuation):
    """In whole contexts, the last one reaching back for its own, as the text is read or, where that
    would join both, each by itself."""
    kept = context.rstrip()
    before = run.tokenizer.encode_prompt(kept)
    whole = run.tokenizer.encode_prompt(context + continuation)
    if whole[: len(before)] != before:
        new = run.tokenizer.encode(context[len(kept) :] + continuation)
        whole = before + new
    total, greedy, done = 0.0, True, len(before)
    while done < len(whole):
        # What fits behind the context as it is; what is longer by itself goes in windows of 16.
        end = len(whole) if len(whole) - len(before) <= 16 else min(done + 16, len(whole))
        log_p, likeliest = log_probabilities(run, whole[max(end - 17, 0) : end])
        total += log_p[-(end - done) :].sum()
        greedy &= likeliest[-(end - done) :].all()
        done = end
    return total, greedy


@pytest.mark.slow(reason="compiles several programs")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_are_the_models(run, batch_size):
    assert len(run.tokenizer.encode_prompt("our union")) == len(
        run.tokenizer.encode_prompt("our unio")
    )
    model = HarnessModel(str(run.directory), batch_size=str(batch_size))
    answers = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for pair, (found, greedy) in zip(PAIRS, answers, strict=True):
        total, likeliest = expected_likelihood(run, *pair)
        assert found == pytest.approx(total, abs=1e-4)
        assert greedy == likeliest


DEVICES = """
import json, sys
from plt_jax.evaluation.harness import HarnessModel
from tests.evaluation.test_harness import CONTEXTS, PAIRS, requests

model = HarnessModel(sys.argv[1], batch_size=3)
settings = {"until": [], "max_gen_toks": 8}
print(json.dumps({
    "batch_size": model.batch_size,
    "likelihoods": model.loglikelihood(requests(*PAIRS), disable_tqdm=True),
    "rolling": model.loglikelihood_rolling(requests((PAIRS[-2][0] * 9,)), disable_tqdm=True),
    "texts": model.generate_until(requests(*((c, settings) for c in CONTEXTS)), disable_tqdm=True),
}))
"""


@pytest.mark.slow(reason="a process of its own simulates eight devices")
def test_on_eight_devices(run):
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(run.directory)],
        **{"env": environment(**simulated(8)), "capture_output": True, "text": True},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["batch_size"] == 8
    for pair, (total, greedy) in zip(PAIRS, found["likelihoods"], strict=True):
        expected, likeliest = expected_likelihood(run, *pair)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest
    assert found["rolling"] == pytest.approx([expected_rolling(run, PAIRS[-2][0] * 9)], abs=1e-4)
    assert found["texts"] == [generated(run, context, 8) for context in CONTEXTS]


def test_how_likely_nothing_is_cannot_be_asked(model):
    with pytest.raises(
        InputError, match="a task has an empty continuation after the context 'union'"
    ):
        model.loglikelihood(requests(("union", "")), disable_tqdm=True)


@pytest.mark.slow(reason="compiles several programs")
def test_rolling_scores_each_token_once_with_the_begin_token_before(run, model):
    texts = ["the state of our union is strong and the work of peace goes on" * 2, "peace"]
    found = model.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    assert found == pytest.approx([expected_rolling(run, text) for text in texts], abs=1e-4)


def expected_rolling(run, text):
    """In whole contexts, the last one reaching back for its own."""
    whole, done, expected = run.tokenizer.encode_prompt(text), 0, 0.0
    while done < len(whole) - 1:
        end = min(done + 16, len(whole) - 1)
        log_p, _ = log_probabilities(run, whole[max(end - 16, 0) : end + 1])
        expected += log_p[-(end - done) :].sum()
        done = end
    return expected


def generated(run, context, count):
    """By `generate`, one prompt alone."""
    prompt = run.tokenizer.encode_prompt(context)[-(16 - count) :]
    weights = plt_jax.prepare_for_decode(run.config.model, run.params)
    (tokens,) = plt_jax.generate(run.config.model, weights, [prompt], count)
    return run.tokenizer.decode(tokens.tolist())


CONTEXTS = ["the state of", "union", "the work of peace goes on and the state of our union is"]


@pytest.mark.slow(reason="compiles several programs")
def test_generation_is_greedy_and_ends_before_its_stops(run, model):
    settings = {"until": [], "max_gen_toks": 8}
    found = model.generate_until(
        requests(*((context, settings) for context in CONTEXTS)), disable_tqdm=True
    )
    assert found == [generated(run, context, 8) for context in CONTEXTS]
    text = next(text for text in found if len(text) > 3)
    stop = text[2:4]
    again = model.generate_until(
        requests(*((context, settings | {"until": [stop, "\0"]}) for context in CONTEXTS)),
        disable_tqdm=True,
    )
    assert again == [text.split(stop)[0] for text in found]


@pytest.mark.slow(reason="compiles several programs")
def test_draws_depend_on_the_seed_and_not_on_the_batch(run):
    asked = requests(
        *((text, {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}) for text in "abcde")
    )
    one, other, seeded = (
        HarnessModel(str(run.directory), batch_size=size, seed=seed).generate_until(
            asked, disable_tqdm=True
        )
        for size, seed in ((5, 1), (2, 1), (5, 2))
    )
    assert one == other != seeded


@pytest.mark.parametrize("name", ["batch_size", "loops"])
@pytest.mark.parametrize("number", ["many", "0", "-1", 2.5, True])
def test_a_number_that_is_none_is_refused(run, name, number):
    with pytest.raises(
        InputError, match=f"{name} is {number}; it must be a whole number of at least 1"
    ):
        HarnessModel(str(run.directory), **{name: number})


def test_a_models_arguments_come_before_the_harnesss(run):
    text, harness = f"path={run.directory},batch_size=5", {"batch_size": 1, "device": None}
    assert HarnessModel.create_from_arg_string(text, harness).batch_size == 5
    alone = {"path": str(run.directory)}
    assert HarnessModel.create_from_arg_obj(alone, {"batch_size": "2"}).batch_size == 2


@pytest.mark.slow(reason="compiles several programs")
def test_more_loops_than_it_was_trained_with(run):
    model = HarnessModel(str(run.directory), loops="3")
    config, params = with_loops(run.config.model, run.params, 3)
    more = run._replace(config=run.config.model_copy(update={"model": config}), params=params)
    ((found, _),) = model.loglikelihood(requests(PAIRS[0]), disable_tqdm=True)
    assert found == pytest.approx(expected_likelihood(more, *PAIRS[0])[0], abs=1e-4)
    assert found != pytest.approx(expected_likelihood(run, *PAIRS[0])[0], abs=1e-3)
    settings = {"until": [], "max_gen_toks": 8}
    (text,) = model.generate_until(requests(("the state of", settings)), disable_tqdm=True)
    assert text == generated(more, "the state of", 8)


@pytest.mark.slow(reason="compiles several programs")
def test_at_most_half_the_context_is_made(run, model):
    context = PAIRS[3][0]
    (found,) = model.generate_until(
        requests((context, {"until": [], "max_gen_toks": 100})), disable_tqdm=True
    )
    assert found == generated(run, context, 8)


def test_a_model_argument_that_is_not_known_is_refused(run):
    with pytest.raises(InputError, match="no model argument pth; it has path"):
        HarnessModel(str(run.directory), pth="x")


@pytest.mark.slow(reason="reads all tasks of the harness")
def test_the_papers_tasks_are_the_harnesss():
    manager = TaskManager()
    for names in SUITES.values():
        assert set(names) <= set(manager.all_tasks)


ROWS = [
    {"start": "the state of our", "choices": [" union", " zebra"], "label": 0},
    {"start": "the work of", "choices": [" nothing", " peace"], "label": 1},
    {"start": "peace goes", "choices": [" on", " off", " up"], "label": 2},
]


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to write tasks.json in."""
    return shutil.copytree(run.directory, tmp_path / "copy")


@pytest.fixture
def tasks(tmp_path):
    """A folder with one task."""
    return write_task(tmp_path / "tasks", "choices", CHOICES, ROWS)


@pytest.mark.slow(reason="runs the whole harness")
def test_a_local_task_as_its_user_runs_it(run, copy, tasks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = command("eval.py", copy, "--tasks", "choices", "--include_path", tasks)
    assert result.code == 0, result.err
    written = json.loads((copy / "tasks.json").read_text())
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            whole = run.tokenizer.encode_prompt(row["start"] + choice)
            count = len(whole) - len(run.tokenizer.encode_prompt(row["start"]))
            scores.append(log_probabilities(run, whole[-17:])[0][-count:].sum())
        right += np.argmax(scores) == row["label"]
    assert written["results"]["choices"]["acc,none"] == pytest.approx(right / 3)
    assert written["step"] == run.step
    assert "|choices|" in result.out and result.out.endswith(f"{copy / 'tasks.json'}\n")


@pytest.mark.slow(reason="runs the whole harness")
def test_the_harness_itself_knows_the_model(copy, tasks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["run", "--model", "plt_jax", "--model_args", f"path={copy}", "--tasks", "choices"]
    result = command("plt_jax.lm_eval", *words, "--include_path", tasks)
    assert result.code == 0, result.err
    assert "|choices|" in result.out


@pytest.mark.slow(reason="reads all tasks of the harness")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "nosuch"], "no task is called nosuch; lm_eval ls tasks lists"),
        (["--suite", "nosuch"], "no suite is called nosuch; there are paper_moe, paper_dense"),
        (["--limit", "3"], "--limit is for --exact_match, --by_document, --tasks and --suite"),
        (["--tasks", "choices", "--text", "x"], "--text is for scores, --by_document, --loops"),
        (["--run_code"], "--run_code is for --tasks and --suite"),
        (
            ["--suite", "paper_moe"],
            "humaneval, mbpp would run the code that the model writes; add --run_code",
        ),
        (["--tasks", "humaneval_infilling"], "humaneval_infilling would run the code"),
        (["--tasks", "choices", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--tasks", "choices", "--num_fewshot", "-1"], "--num_fewshot is -1"),
        (["--tasks", "choices", "--include_path", "/no/where"], "--include_path /no/where is no"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(copy, words, message):
    assert_refused(command("eval.py", copy, *words), message)
    assert not (copy / "tasks.json").exists()


@pytest.mark.slow(reason="reads all tasks of the harness")
def test_a_task_that_runs_code_by_what_it_includes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_task(tmp_path / "tasks", "hidden", "include: base\n", ROWS)
    (folder / "base").write_text(f"unsafe_code: true\n{CHOICES}")
    manager = TaskManager(include_path=str(folder))
    with pytest.raises(InputError, match="hidden would run the code"):
        load_tasks(manager, ["hidden"], run_code=False)
    (task,) = load_tasks(manager, ["hidden"], run_code=True)
    assert task.task_name == "hidden"


@pytest.mark.slow(reason="runs the whole harness")
def test_a_task_whose_data_is_not_there_is_one_line(copy, tasks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tasks / "rows.jsonl").unlink()
    result = command("eval.py", copy, "--tasks", "choices", "--include_path", tasks)
    assert_refused(result, "choices cannot be loaded: ")


@pytest.mark.slow(reason="runs the whole harness")
def test_a_tokenizer_of_more_tokens_than_the_model_is_one_line(copy, tasks):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][0] | {"id": 270, "content": "<one more>"}
    )
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = command("eval.py", copy, "--tasks", "choices", "--include_path", tasks)
    assert_refused(result, "271 tokens")
