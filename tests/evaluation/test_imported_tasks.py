"""The harness on imported models: spaces, stops that are special tokens, and chats."""

import json

import pytest

from tests.decoding.test_chat import CHATML
from tests.evaluation.local_tasks import write_task
from tests.tokenizers_of_kinds import byte_level, tokenizer_of, write_chain_model
from tests.training.runs import assert_refused, command, output_of

pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'plt_jax[lm_eval]')")

pytestmark = pytest.mark.usefixtures("task_files")

THE_FOX = "the quick brown fox jumps"
GENERATE = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: STOPS, max_gen_toks: 12}
metric_list:
  - {metric: exact_match}
"""


def imported(folder, library, tokens, **files):
    source = write_chain_model(folder / "source", library, tokens, **files)
    output_of("plt_jax.convert", "import", source, folder / "run")
    return folder / "run"


def score(run, folder, row, stops, *words):
    """The share of right answers of a task with one row."""
    settings = GENERATE.replace("STOPS", json.dumps(stops))
    tasks = write_task(folder / "tasks", "written", settings, [row])
    words = [run, "--tasks", "written", "--include_path", tasks, *words]
    result = command("eval.py", *words)
    assert result.code == 0, result
    found = json.loads((run / "tasks.json").read_text())
    return found["results"]["written"]["exact_match,none"]


@pytest.mark.slow(reason="imports models and compiles their programs")
@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("Llama 2", ["\n"]),
        ("byte-level", ["<|im_end|>", "\n"]),
        ("Llama 2, new", [" lazy", "<|im_end|>"]),
    ],
)
def test_an_answer_has_its_first_space_and_ends_at_a_special_token(tmp_path, kind, stops):
    tokenizer = tokenizer_of(kind)
    end = tokenizer.library.token_to_id("<|im_end|>")
    behind = tokenizer.continuing.encode(" dog" if "\n" in stops else " lazy")
    tokens = [*tokenizer.encode(THE_FOX), end, *behind, tokenizer.eos]
    run = imported(tmp_path, tokenizer.library, tokens)
    answer = " brown fox jumps" if "<|im_end|>" in stops else " brown fox jumps dog"
    assert score(run, tmp_path, {"q": "the quick", "a": answer}, stops) == 1


@pytest.mark.slow(reason="imports models and compiles their programs")
def test_tasks_are_put_into_the_models_chat(tmp_path):
    library = byte_level()
    library.add_special_tokens(["<|im_start|>"])
    begin = library.encode("assistant\n", add_special_tokens=False).ids[-1]
    end = library.token_to_id("<|im_end|>")
    answer = library.encode(THE_FOX, add_special_tokens=False).ids
    run = imported(
        *(tmp_path, library, [begin, *answer, end]),
        tokenizer_config={"eos_token": "</s>", "add_bos_token": False},
        chat=CHATML,
    )
    row = {"q": "who jumps?", "a": THE_FOX}
    words = ["--apply_chat_template", "--system_instruction", "Be brief."]
    assert score(run, tmp_path, row, ["<|im_end|>"], *words) == 1


@pytest.mark.slow(reason="imports models and compiles their programs")
def test_a_model_without_a_chat_template_is_refused(tmp_path):
    tokenizer = tokenizer_of("byte-level")
    run = imported(tmp_path, tokenizer.library, [*tokenizer.encode(THE_FOX), tokenizer.eos])
    settings = GENERATE.replace("STOPS", "[]")
    tasks = write_task(tmp_path / "tasks", "written", settings, [{"q": "a", "a": "b"}])
    words = [run, "--tasks", "written", "--include_path", tasks]
    assert_refused(command("eval.py", *words, "--apply_chat_template"), "it is no chat model")
    assert_refused(command("eval.py", *words, "--fewshot_as_multiturn"), "--apply_chat_template")
