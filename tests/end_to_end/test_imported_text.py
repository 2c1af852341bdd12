"""What imported models write: with their spaces, up to their end tokens, in their chats."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import plt_jax
from plt_jax import InputError, Sampling
from plt_jax import generate as generate_tokens
from plt_jax.runs.directory import open_trained
from tests.decoding.test_chat import CHATML
from tests.tokenizers_of_kinds import byte_level, tokenizer_of, write_chain_model
from tests.training.runs import assert_refused, command, output_of

THE_FOX = "the quick brown fox jumps"


def generate(run, *words):
    return output_of("plt_jax.generate", run, *words)


@pytest.fixture
def imported(tmp_path):
    """Imports a model that writes a text; returns its run directory."""

    def make(library, tokens, **files):
        source = write_chain_model(tmp_path / "source", library, tokens, **files)
        output_of("plt_jax.convert", "import", source, tmp_path / "run")
        return tmp_path / "run"

    return make


@pytest.mark.parametrize("kind", ["byte-level", "Llama 2", "Llama 2, new"])
def test_the_first_space_is_written(imported, kind):
    tokenizer = tokenizer_of(kind)
    run = imported(tokenizer.library, [*tokenizer.encode(THE_FOX), tokenizer.eos])
    assert generate(run, "--prompt", "the quick") == f"{THE_FOX}\n"


def test_a_stop_ends_the_text_and_is_none_of_it(imported):
    tokenizer = tokenizer_of("byte-level")
    run = imported(tokenizer.library, [*tokenizer.encode(THE_FOX), tokenizer.eos])
    words = ("--prompt", "the quick", "--stop", "zz", "--stop", "ox j")
    assert generate(run, *words) == "the quick brown f\n"
    assert generate(run, "--prompt", "the quick", "--stop", "</s>") == f"{THE_FOX}\n"


def test_every_end_token_of_the_files_ends_the_text(imported):
    """As in Llama 3, whose chats end by another token than its documents."""
    library = byte_level()
    tokens = library.encode(THE_FOX, add_special_tokens=False).ids
    end, other = library.token_to_id("</s>"), library.token_to_id("<|im_end|>")
    junk = library.encode("state union", add_special_tokens=False).ids
    files = {"config": {"eos_token_id": end}, "generation_config": {"eos_token_id": [end, other]}}
    run = imported(library, [*tokens, other, *junk], **files)
    assert generate(run, "--prompt", "the quick") == f"{THE_FOX}\n"


def test_an_end_token_has_no_text_even_if_it_is_not_special(imported):
    """As in chat models that added theirs as an ordinary token."""
    library = byte_level()
    library.add_tokens(["<end_of_turn>"])
    tokens = library.encode(THE_FOX, add_special_tokens=False).ids
    end = library.token_to_id("<end_of_turn>")
    run = imported(library, [*tokens, end], generation_config={"eos_token_id": end})
    assert generate(run, "--prompt", "the quick") == f"{THE_FOX}\n"


def test_a_tokenizer_with_names_of_its_own_is_used(imported):
    library = byte_level()
    library.add_special_tokens(["<begin>", "<end>"])
    tokens = library.encode(THE_FOX, add_special_tokens=False).ids
    begin, end = library.token_to_id("<begin>"), library.token_to_id("<end>")
    run = imported(
        library,
        [begin, *tokens, end],
        config={"bos_token_id": begin, "eos_token_id": end},
        tokenizer_config={"bos_token": "<begin>", "eos_token": "<end>", "add_bos_token": True},
    )
    assert generate(run) == f"{THE_FOX}\n"


def test_a_chat_model_answers(imported):
    library = byte_level()
    library.add_special_tokens(["<|im_start|>"])
    question = "<|im_start|>user\nwho jumps?<|im_end|>\n<|im_start|>assistant\n"
    answer = library.encode(THE_FOX, add_special_tokens=False).ids
    last = library.encode(question, add_special_tokens=False).ids[-1]
    run = imported(
        library,
        [last, *answer, library.token_to_id("<|im_end|>")],
        tokenizer_config={"eos_token": "<|im_end|>", "add_bos_token": False},
        chat=CHATML,
    )
    assert generate(run, "--prompt", "who jumps?", "--chat") == f"{THE_FOX}\n"
    plain = generate(run, "--prompt", question, "--special_tokens", "--max_new_tokens", "2")
    assert plain.startswith(f"{question}{THE_FOX[:4]}")


def test_a_begin_token_that_there_is_not_is_refused_at_import(tmp_path):
    library = byte_level()
    source = write_chain_model(
        tmp_path / "source", library, [1, 2], tokenizer_config={"eos_token": "<none>"}
    )
    result = command("plt_jax.convert", "import", source, tmp_path / "run")
    assert_refused(result, "eos_token is '<none>', which the tokenizer does not have")
    assert not (tmp_path / "run").exists()


def test_our_own_export_keeps_what_begins_and_ends_a_text(imported, tmp_path):
    tokenizer = tokenizer_of("byte-level")
    run = imported(
        tokenizer.library,
        [*tokenizer.encode(THE_FOX), tokenizer.eos],
        tokenizer_config={"bos_token": None, "eos_token": "</s>", "add_bos_token": False},
    )
    output_of("plt_jax.convert", "export", run, tmp_path / "out")
    output_of("plt_jax.convert", "import", tmp_path / "out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "special_tokens.json").read_text()) == {
        "bos_token_id": None,
        "eos_token_id": [tokenizer.eos],
    }
    assert generate(tmp_path / "again", "--prompt", "the quick") == f"{THE_FOX}\n"


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, number):
    tokenizer = tokenizer_of("byte-level")
    source = write_chain_model(tmp_path / "source", tokenizer.library, [1, 2])
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 1] = number
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    result = command("plt_jax.convert", "import", source, tmp_path / "run")
    assert_refused(result, "model.layers.0.mlp.down_proj.weight holds numbers that are not finite")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="not finite"):
        plt_jax.load_huggingface(source)


def test_a_model_whose_logits_are_no_numbers_writes_nothing(imported):
    """As an overflow makes them, which no look at the weights finds."""
    tokenizer = tokenizer_of("byte-level")
    run = imported(tokenizer.library, [*tokenizer.encode(THE_FOX), tokenizer.eos])
    trained = open_trained(run)
    params = trained.params | {"head": trained.params["head"] * np.float32(1e38)}
    for sampling in (Sampling(), Sampling(temperature=1.0, top_k=5, top_p=0.9)):
        with pytest.raises(InputError, match="logits are not finite"):
            generate_tokens(
                *(trained.config.model, params, [[5, 6]], 3, sampling), jax.random.key(0)
            )
