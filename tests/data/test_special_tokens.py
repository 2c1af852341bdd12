"""Which tokens begin and end a text: by transformers' files, by our own, by their names."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from plt_jax.data.special_tokens import SPECIAL_TOKENS
from plt_jax.data.tokenizer import HUGGINGFACE, load_tokenizer
from plt_jax.errors import InputError

NAMES = ("<|start|>", "<s>", "<|stop|>", "</s>", "<|im_end|>")
START, S, STOP, END, IM_END = range(256, 261)


@pytest.fixture
def folder(tmp_path):
    """A folder with a byte-level tokenizer, whose special tokens are NAMES."""
    write_tokenizer(tmp_path)
    return tmp_path


def write_tokenizer(folder, names=NAMES, post_processor=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(names))
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(folder / "tokenizer.json"))


def template(*names):
    """A post-processor that puts special tokens before a text."""
    ids = {name: NAMES.index(name) + 256 for name in names}
    return processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=list(ids.items())
    )


def special_of(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(folder / "tokenizer.json").special


LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer"}


@pytest.mark.parametrize(
    ("tokens", "config", "bos"),
    [
        ({"bos_token": "<|start|>", "add_bos_token": True}, {}, START),
        (
            {"bos_token": {"content": "<|start|>", "lstrip": False}, "add_bos_token": True},
            {},
            START,
        ),
        ({"bos_token": "<|start|>", "add_bos_token": False}, {"bos_token_id": START}, None),
        ({"bos_token": None, "add_bos_token": False}, {"bos_token_id": START}, None),
        ({"add_bos_token": True}, {"bos_token_id": START}, START),
        (LLAMA | {"bos_token": "<|start|>"}, {}, START),
        (PLAIN | {"bos_token": "<|start|>"}, {}, None),
        (QWEN | {"bos_token": None}, {"bos_token_id": START}, None),
        ({"bos_token": "<|start|>"}, {}, START),
        ({}, {"bos_token_id": START}, START),
        ({}, {}, S),
    ],
)
def test_the_files_say_which_token_begins_a_text(folder, tokens, config, bos):
    assert special_of(folder, tokenizer_config=tokens, config=config).bos == bos


def test_the_post_processor_decides_unless_add_bos_token_does(folder):
    write_tokenizer(folder, post_processor=template("<|start|>"))
    assert special_of(folder).bos == START
    assert special_of(folder, tokenizer_config=QWEN | {"bos_token": "<s>"}).bos == START
    assert special_of(folder, tokenizer_config={"bos_token": "<s>", "add_bos_token": True}).bos == S
    assert special_of(folder, tokenizer_config={"add_bos_token": True}).bos == START
    assert special_of(folder, tokenizer_config={"add_bos_token": False}).bos is None


def test_several_tokens_before_a_text_are_refused(folder):
    write_tokenizer(folder, post_processor=template("<|start|>", "<s>"))
    with pytest.raises(InputError, match=r"puts 2 tokens before a text \(<\|start\|>, <s>\)"):
        special_of(folder)


def test_every_end_token_of_every_file_ends_a_text(folder):
    special = special_of(
        folder,
        tokenizer_config={"eos_token": "<|im_end|>"},
        config={"eos_token_id": STOP},
        generation_config={"eos_token_id": [END, STOP]},
        special_tokens_map={"eos_token": {"content": "<|im_end|>"}},
    )
    assert special.eos == (IM_END, END, STOP)


def test_a_number_that_stands_for_no_token_is_passed_over(folder):
    files = {"config": {"bos_token_id": False, "eos_token_id": -1}}
    files |= {"generation_config": {"bos_token_id": -1, "eos_token_id": [STOP, -1]}}
    assert special_of(folder, **files) == (S, (STOP,))


def test_names_decide_where_no_file_does(folder):
    assert special_of(folder) == (S, (END,))
    write_tokenizer(folder, ["<|im_end|>"])
    with pytest.raises(InputError, match="for the beginning of a document; add one of"):
        special_of(folder)
    assert special_of(folder, tokenizer_config={"add_bos_token": False}) == (None, (256,))


def test_what_is_saved_is_found_again(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    (tmp_path / "run").mkdir()
    special = tokenizer.special._replace(bos=None, eos=(STOP, END))
    type(tokenizer)(tokenizer.library, special).save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").special == special


def test_a_run_that_was_imported_before_has_the_files_in_a_folder(folder):
    (folder / HUGGINGFACE).mkdir()
    special = special_of(
        folder,
        **{f"{HUGGINGFACE}/tokenizer_config": {"bos_token": "<|start|>", "eos_token": "<|stop|>"}},
    )
    assert special == (START, (STOP,))


def test_files_beside_a_tokenizer_of_another_name_are_not_its_own(folder):
    special_of(folder, tokenizer_config={"bos_token": "<|start|>", "eos_token": "<|stop|>"})
    other = (folder / "tokenizer.json").rename(folder / "other.json")
    assert load_tokenizer(other).special == (S, (END,))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"bos_token": "<none>", "add_bos_token": True}},
            r"bos_token is '<none>', which the tokenizer does not have",
        ),
        ({"config": {"eos_token_id": "2"}}, r"config\.json: eos_token_id is '2'"),
        ({"config": {"eos_token_id": [2, "3"]}}, r"config\.json: eos_token_id is \[2, '3'\]"),
        ({"tokenizer_config": {"add_bos_token": "true"}}, "add_bos_token is 'true', which is none"),
        ({"tokenizer_config": {"eos_token": 3}}, r"tokenizer_config\.json: eos_token is 3"),
        ({"tokenizer_config": {"eos_token": "<none>"}}, r"eos_token is '<none>'"),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, r"which the tokenizer does not have"),
        ({"tokenizer_config": [1]}, r"must hold a mapping, not a list"),
    ],
)
def test_what_cannot_be_used_is_refused(folder, files, message):
    with pytest.raises(InputError, match=message):
        special_of(folder, **files)


def test_all_end_tokens_must_be_of_the_models_vocabulary(folder):
    special_of(folder, config={"eos_token_id": [END, 700]})
    with pytest.raises(InputError, match="special token 700 lies outside"):
        load_tokenizer(folder / "tokenizer.json").check_size(300)


def test_our_own_file_comes_first(folder):
    (folder / SPECIAL_TOKENS).write_text('{"bos_token_id": null, "eos_token_id": [258]}')
    assert special_of(folder, config={"bos_token_id": 0, "eos_token_id": 1}) == (None, (258,))
