"""Which files of a repository on the Hub are fetched for a model."""

import json

import pytest

from plt_jax.errors import InputError
from plt_jax.hub.names import HubName
from plt_jax.interop.hub_checkpoint import SMALL_FILES, open_hub_checkpoint
from plt_jax.interop.safetensors_folder import INDEX
from plt_jax.interop.tokenizer_files import COMPANIONS
from tests.golden.huggingface import GOLDEN
from tests.interop.damage import FIRST, MODEL, SECOND

NAME = HubName("lab/loop", None)
LOOP = GOLDEN / "loopcoder_l2"
CODE = dict.fromkeys(("modeling.py", "tokenization_loop.py", "pytorch_model.bin", "x.pt"), b"x")


def opened(name=NAME):
    return open_hub_checkpoint(name, report=lambda line: None)


def assert_refused(hub, *parts):
    """Asserts that a repository is refused, and that nothing but its small files was fetched."""
    with pytest.raises(InputError) as refusal:
        opened()
    for part in parts:
        assert part in str(refusal.value)
    assert set(hub.fetched()) <= {"config.json", INDEX}


def test_small_files_come_first_and_code_never(hub):
    small = {name: json.dumps(name).encode() for name in SMALL_FILES if name != INDEX}
    hub.add_folder("lab/loop", LOOP, **CODE, **small, **{"original/model.safetensors": b"x"})
    found = opened()
    assert (found.config.loop.scheme, found.config.loop.count) == ("loop_kv_share_window", 2)
    assert list(found.weights) == [MODEL]
    assert set(hub.fetched()) == {"config.json", *small}


def test_what_an_import_keeps_is_fetched_without_code():
    """SMALL_FILES has every file that a run directory keeps, so that a name gives what a folder
    does."""
    kept = {name for name in COMPANIONS if "*" not in name} - {"config.json"}
    assert set(SMALL_FILES) - {INDEX} == kept | {"chat_template.jinja", "chat_template.json"}


def test_of_several_files_those_that_the_index_names(sharded, hub):
    hub.add_folder("lab/loop", sharded, **{"consolidated.safetensors": b"x", **CODE})
    assert opened().weights == [FIRST, SECOND]
    assert set(hub.fetched()) == {"config.json", INDEX}


def test_one_file_comes_before_an_index(hub):
    """As it does in a folder."""
    index = json.dumps({"weight_map": {"x": FIRST}}).encode()
    hub.add_folder("lab/loop", LOOP, **{INDEX: index, FIRST: b"x"})
    assert opened().weights == [MODEL]


def test_an_unknown_model_type_is_refused_before_the_weights(hub):
    config = json.loads((LOOP / "config.json").read_text()) | {"model_type": "mamba"}
    del config["architectures"]
    hub.add_folder("lab/loop", LOOP, **{"config.json": json.dumps(config).encode()})
    assert_refused(hub, "lab/loop: config.json: unknown model_type 'mamba'")


def test_a_repository_without_safetensors_is_refused(hub):
    hub.add_folder("lab/loop", LOOP, without=[MODEL], **CODE)
    assert_refused(hub, "lab/loop on the Hub has neither", "only safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin"])
def test_an_index_names_safetensors_of_its_folder_alone(hub, file):
    index = json.dumps({"weight_map": {"x": file}}).encode()
    hub.add_folder("lab/loop", LOOP, without=[MODEL], **{INDEX: index, file: b"x"})
    assert_refused(hub, f"{file!r}, which is not a safetensors file in its folder")
