"""Tokenized corpora of others: what is damaged, missing or leads elsewhere is named or refused."""

import json

import pytest

from plt_jax.data.special_tokens import SPECIAL_TOKENS
from plt_jax.data.tokenized_corpus import MANIFEST, find_problems, open_tokenized_corpus
from plt_jax.data.tokenizer import TOKENIZER
from plt_jax.errors import InputError
from tests.data.corpora import damage, make, same_corpus


@pytest.fixture
def copy(corpus, lines, tokenizer, tmp_path):
    """A corpus that a test may damage."""
    out = tmp_path / "made"
    make(lines, out, tokenizer)
    return out


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["training-00001.array_record", TOKENIZER])
def test_damage_is_found_named_and_mended(copy, corpus, lines, tokenizer, kind, name):
    path = copy / name
    damage(path, kind)
    (problem,) = find_problems(copy)
    assert str(path) in problem
    if kind != "flipped" or name == TOKENIZER:  # shards are too large to hash at every start
        with pytest.raises(InputError, match=name):
            open_tokenized_corpus(copy)
    if name != TOKENIZER:
        path.unlink(missing_ok=True)
        make(lines, copy, tokenizer)
        assert find_problems(copy) == []
        assert same_corpus(copy, corpus)


def test_a_damaged_manifest_is_named(copy):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=rf"{MANIFEST} is damaged, or from another version"):
        open_tokenized_corpus(copy)


def test_other_special_tokens_are_damage(copy):
    (copy / SPECIAL_TOKENS).write_text('{"bos_token_id": 5, "eos_token_id": [7]}')
    (problem,) = find_problems(copy)
    assert SPECIAL_TOKENS in problem
    (copy / SPECIAL_TOKENS).unlink()
    with pytest.raises(InputError, match=SPECIAL_TOKENS):
        open_tokenized_corpus(copy)


def forge(copy, **fields):
    """Changes the first shard's entry in the manifest."""
    values = json.loads((copy / MANIFEST).read_text())
    values["shards"][0] |= fields
    (copy / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "/dev/zero", "a\0b", ""])
def test_a_shard_elsewhere_is_refused(copy, name):
    forge(copy, name=name)
    with pytest.raises(InputError, match="is not the name of a file in"):
        open_tokenized_corpus(copy)
    (problem,) = find_problems(copy)
    assert "is not the name of a file in" in problem


def test_a_linked_shard_is_refused(copy):
    path = copy / "training-00001.array_record"
    path.rename(copy.parent / "elsewhere")
    path.symlink_to(copy.parent / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        open_tokenized_corpus(copy)


@pytest.mark.parametrize("wrong", [{"tokens": 5000}, {"tokens": 1}, {"documents": 1}])
def test_a_shard_of_other_numbers_than_the_manifests_is_damaged(copy, wrong):
    forge(copy, **wrong)
    assert any("is damaged" in problem for problem in find_problems(copy))
    if "tokens" in wrong:  # reading it must end
        stream = open_tokenized_corpus(copy).stream("training")
        with pytest.raises(InputError, match="is damaged"):
            stream.read(0, len(stream))


@pytest.mark.parametrize("content", ["[1]", "3", "{", '{"files": ' + "[" * 10_000])
def test_a_plan_that_is_none_is_one_line(copy, lines, tokenizer, content):
    (copy / "parts" / "plan.json").write_text(content)
    with pytest.raises(InputError):
        make(lines, copy, tokenizer)


def test_parts_that_name_files_elsewhere_are_written_again(copy, corpus, lines, tokenizer):
    for path in (copy / "parts").glob("0*.json"):
        part = json.loads(path.read_text())
        for shard in part["shards"]:
            shard["name"] = "../../../etc/passwd"
        path.write_text(json.dumps(part))
    make(lines, copy, tokenizer)
    assert same_corpus(copy, corpus)
