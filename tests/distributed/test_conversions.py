"""Two processes of four devices convert what one device does, and each reads its own part."""

import json

import jax
import numpy as np
import pytest

from plt_jax import save_huggingface
from plt_jax.checkpoint.manifest import MANIFEST, find_damage, own_files, read_manifest
from plt_jax.checkpoint.store import save_params
from plt_jax.data.tokenizer_training import train_tokenizer
from plt_jax.files.paths import to_path
from plt_jax.runs.directory import find_checkpoint, read_params
from tests.distributed.commands import run_together
from tests.models import random_params, small_config
from tests.training.runs import SENTENCE, command, snapshot

pytestmark = pytest.mark.slow(reason="two processes run every conversion")

CONVERT = "plt_jax.convert"
SIZES = {"width": 16, "heads": 8, "kv_heads": 8, "ffn_width": 24, "vocab_size": 272}
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_width": 8, "routing": "topk_then_softmax"}
COMMANDS = {
    "plt": [CONVERT, "import", "HOME/plt_hf", "OUT/plt"],
    "mixture": [CONVERT, "import", "HOME/mixture_hf", "OUT/mixture", "--dtype", "bfloat16"],
    "no_loop": [CONVERT, "import", "HOME/no_loop_hf", "OUT/no_loop"],
    "looped": [CONVERT, "retrofit", "OUT/no_loop", "OUT/looped", "--first_layer", 1],
    "rounded": [CONVERT, "quantize", "OUT/plt", "OUT/rounded"],
    "half": ["plt_jax.checkpoint", "export", "OUT/rounded", "OUT/half", "--dtype", "bfloat16"],
}
EXPORT = [CONVERT, "export", "OUT/mixture", "OUT/mixture_hf"]
BUCKET = "gs://runs/conversions"
IN_BUCKET = [CONVERT, "import", f"{BUCKET}/plt_hf", f"{BUCKET}/plt"]
TAKEN = [CONVERT, "import", "HOME/plt_hf", "OUT/plt"]
FSDP, EXPERT = ["--mesh.fsdp", 4, "--mesh.tensor", 2], ["--mesh.expert", 4, "--mesh.tensor", 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with Hugging Face checkpoints, and an array of 32 MB that one device has saved."""
    home = tmp_path_factory.mktemp("conversions")
    models = {
        "plt": small_config("plt", **SIZES),
        "mixture": small_config("plt", **SIZES, qk_norm=True, moe=EXPERTS),
        "no_loop": small_config("no_loop", 1, **SIZES),
    }
    for name, config in models.items():
        save_huggingface(home / f"{name}_hf", config, random_params(config))
        train_tokenizer([SENTENCE], 270, 1).save(home / f"{name}_hf")
    (home / "large").mkdir()
    save_params(home / "large", 0, {"x": jax.numpy.ones((8, 1024, 1024))})
    return home


def within(home, out, words) -> list[object]:
    return [str(word).replace("HOME", str(home)).replace("OUT", str(out)) for word in words]


@pytest.fixture(scope="module")
def alone(home):
    """What one device writes, by name."""
    out = home / "alone"
    out.mkdir()
    for words in [*COMMANDS.values(), EXPORT]:
        result = command(*within(home, out, words))
        assert result.code == 0, result
    return out


@pytest.fixture(scope="module")
def together(home, bucket_server):
    """What two processes write, and how their commands ended."""
    out = home / "together"
    out.mkdir()
    for file in (home / "plt_hf").iterdir():
        to_path(f"{BUCKET}/plt_hf/{file.name}").write_bytes(file.read_bytes())
    meshes = {name: EXPERT if name == "mixture" else FSDP for name in COMMANDS}
    commands = [[*words, *meshes[name]] for name, words in COMMANDS.items()]
    commands += [[*EXPORT, *EXPERT], ["tests.distributed.reading", "HOME/large"]]
    commands += [[*IN_BUCKET, *FSDP], [*TAKEN, *FSDP]]
    return out, run_together([within(home, out, words) for words in commands])


def test_both_processes_end_well_and_the_first_prints(alone, together):
    out, (first, second) = together
    for name, one, other in zip(COMMANDS, first, second, strict=False):
        assert (one.code, other.code) == (0, 0), (name, one, other)
        assert f"written to {out / name}" in one.out
        assert other.out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_write_the_parameters_of_one_device(alone, together, name):
    right, found = (read_params(find_checkpoint(out / name)) for out in (alone, together[0]))
    assert jax.tree.structure(found) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", COMMANDS)
def test_both_write_one_sound_checkpoint_and_the_first_all_else(alone, together, name):
    checkpoint = together[0] / name / "checkpoints" / "0"
    assert find_damage(checkpoint) == []
    listed = read_manifest(checkpoint).files.keys()
    assert {*listed, MANIFEST} == {*own_files(checkpoint, 0), *own_files(checkpoint, 1)}
    assert own_files(checkpoint, 1)
    files, right = (
        {k: v for k, v in snapshot(out / name).items() if "checkpoints/" not in k}
        for out in (together[0], alone)
    )
    assert files.keys() == right.keys()
    for file, content in files.items():
        assert str(content).replace("together", "alone") == str(right[file]), file


def test_what_they_have_imported_is_exported_as_one_device_does(alone, together):
    assert snapshot(together[0] / "mixture_hf") == snapshot(alone / "mixture_hf")


def test_two_processes_import_from_a_bucket_and_into_it(alone, together):
    for results in together[1]:
        assert results[-2].code == 0, results[-2]
    assert find_damage(to_path(f"{BUCKET}/plt/checkpoints/0")) == []
    right, found = (read_params(find_checkpoint(run)) for run in (alone / "plt", f"{BUCKET}/plt"))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, right))


def test_each_process_reads_its_part_of_what_one_device_has_saved(together):
    for results in together[1]:
        read = json.loads(results[len(COMMANDS) + 1].out)
        assert 2**24 <= read < 1.2 * 2**24


def test_a_refusal_is_one_line_and_leaves_nothing(together):
    out, (first, second) = together
    for result in (first[-1], second[-1]):
        assert result.code == 2 and "is not empty" in result.err, result
    assert {path.name for path in out.iterdir()} == {*COMMANDS, "mixture_hf"}
