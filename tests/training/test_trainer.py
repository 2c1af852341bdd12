"""A training run: what it writes, prints, refuses and keeps."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plt_jax.checkpoint.steps import list_steps
from plt_jax.config import RunConfig
from plt_jax.errors import FailedError, InputError
from plt_jax.model.costs import flops_by_loop
from plt_jax.runs.configuration import load_config
from plt_jax.runs.names import CHECKPOINTS, CONFIG, METRICS
from plt_jax.training import trainer
from plt_jax.training.journal import arithmetic
from plt_jax.training.program import TrainProgram
from tests.training.runs import (
    STEPS,
    call_at,
    json_rows,
    make_home,
    numbers,
    saved_state,
    tiny_config,
)


def test_the_run_directory_holds_everything(finished):
    directory = finished.directory
    names = {path.name for path in directory.iterdir()}
    expected = {"config.yaml", "tokenizer.json", "checkpoints", "metrics.jsonl", "tensorboard"}
    assert names == expected | {"special_tokens.json", "loss.png", "text.json"}
    assert load_config(directory / CONFIG) == finished.config
    assert list_steps(directory / CHECKPOINTS)[-1] == STEPS
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name.startswith("events.") for path in (directory / "tensorboard").iterdir()]


def test_metrics_have_a_row_a_step_and_one_an_evaluation(finished):
    rows = json_rows(finished.directory / METRICS)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert [row["step"] for row in validation] == [4, STEPS]
    assert len(rows) == len(training) + len(validation)
    for row in training:
        assert {name for name in row if "/" not in name} == {
            *("step", "time", "loss", "gradient_norm", "learning_rate", "skipped"),
            *("hidden_norm_by_loop", "gate_by_loop"),
            *("tokens_per_second", "model_tflops_per_second", "goodput"),
        }
        parts = [value for name, value in row.items() if name.startswith("gradient_norm/")]
        assert np.linalg.norm(parts) == pytest.approx(row["gradient_norm"], rel=1e-5)
        assert row["update_norm/layers.q"] > 0
        hidden, gates = np.array(row["hidden_norm_by_loop"]), np.array(row["gate_by_loop"])
        assert hidden.shape == (2,) and (hidden > 0).all()
        assert gates.shape == (1, 2) and ((gates > 0) & (gates < 1)).all()
        assert np.isfinite([one for one in row.values() if not isinstance(one, list)]).all()
        spent = {name: value for name, value in row.items() if name.startswith("seconds/")}
        share = spent.get("seconds/steps", 0.0) / sum(spent.values())
        assert row["goodput"] == pytest.approx(share, abs=0.02)
    for row in validation:
        names = {"step", "time", "validation_loss", "bits_per_byte", "validation_tokens"}
        assert set(row) == names
    # The last evaluation reads all held-out text, the others evaluation.sequences.
    assert validation[0]["validation_tokens"] <= 2 * 16 < validation[1]["validation_tokens"]
    assert training[-1]["tokens_per_second"] > 0
    rates = [row["learning_rate"] for row in training]
    assert rates[0] == pytest.approx(1e-2) and rates == sorted(rates, reverse=True)


def test_the_events_hold_the_same_numbers(finished):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (finished.directory / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:
        # A record is its length, the length's checksum, the event, and its checksum.
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        data = data[16 + length :]
    for row in json_rows(finished.directory / METRICS):
        step = row.pop("step")
        del row["time"]
        if "loss" in row:
            ((first, second),) = row.pop("gate_by_loop")
            row |= {"gate_by_loop/loop_2/layer_1": first, "gate_by_loop/loop_2/layer_2": second}
            one, two = row.pop("hidden_norm_by_loop")
            row |= {"hidden_norm_by_loop/loop_1": one, "hidden_norm_by_loop/loop_2": two}
        for name, value in row.items():
            assert found.pop((name, step)) == pytest.approx(value, rel=1e-6)
    assert not found


@pytest.mark.slow(reason="trains a run of its own")
def test_what_is_printed(finished, tmp_path, capsys):
    config = tiny_config(finished.home, tmp_path / "run", training={"sample_prompt": "the peace"})
    trainer.train(config)
    out = capsys.readouterr().out
    parameters = sum(leaf.size for leaf in jax.tree.leaves(saved_state(config).params))
    for expected in (
        f"run directory {tmp_path / 'run'}\n",
        f"model: plt, 2 loops through 2 layers, {parameters:,} parameters, float32\n",
        "training text: 9 documents, ",
        "validation text: 3 documents, ",
        "devices: 1 cpu (data 1 x fsdp 1 x expert 1 x context 1 x tensor 1)\n"
        if jax.device_count() == 1
        else "devices",
        "attention: xla\n",
        "compiling the train step ...\n",
        "a sample:\nthe peace",
        f"done: {STEPS} steps, median ",
        f"the run is in {tmp_path / 'run'}\n",
    ):
        assert expected in out
    assert len(re.findall(r"^step \d/8  loss \d+\.\d{3}  \d+\.\d{3} bits/byte  ", out, re.M)) == 8
    assert len(re.findall(r"^step [48]: held-out loss \d\.\d{4}, ", out, re.M)) == 2
    assert re.search(r"median [\d,]+ tokens/s, peak memory \d+\.\d\d GiB", out)


@pytest.mark.slow(reason="trains a run of its own")
def test_bits_per_byte_that_are_printed_are_those_of_the_training_text(finished, tmp_path, capsys):
    # Of a uniform guess over the vocabulary, for instance: log2(V) for each token predicted.
    config = tiny_config(finished.home, tmp_path / "run")
    trainer.train(config)
    out = capsys.readouterr().out
    loss, bits = map(float, re.search(r"step 1/8  loss ([\d.]+)  ([\d.]+) bits", out).groups())
    tokens, size = (
        int(number.replace(",", ""))
        for number in re.search(
            r"training text: 9 documents, (\S+) tokens, (\S+) bytes", out
        ).groups()
    )
    assert bits == pytest.approx(loss / np.log(2) * (tokens - 9) / size, abs=2e-3)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": {"data": 64}}, "need 64 devices, but there are"),
        ({"data": {"source": "nowhere"}}, "data.source: there is no text at 'nowhere'"),
        ({"data": {"validation_source": "nowhere"}}, "data.validation_source: there is no text"),
        ({"training": {"batch_size": 64}}, "fewer than training.batch_size 64"),
        ({"tokenizer": {"path": "nowhere.json"}}, "tokenizer.path: cannot read the tokenizer"),
        ({"model": {"vocab_size": 100}}, "model.vocab_size 100 cannot hold all 256 bytes"),
        ({"model": {"attention": "splash"}}, "model.attention is splash, which needs a TPU"),
        (
            {"model": {"moe": {"experts": 2, "grouped_product": "megablox"}}},
            "model.moe.grouped_product is megablox, which needs a TPU",
        ),
    ],
    ids=["mesh", "source", "validation", "batch", "tokenizer", "vocabulary", "kernel", "product"],
)
def test_nothing_is_written_for_a_run_that_cannot_start(finished, tmp_path, sections, message):
    config = tiny_config(finished.home, tmp_path / "run", **sections)
    with pytest.raises(InputError) as refusal:
        trainer.train(config)
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow(reason="trains a run of its own")
def test_at_most_one_step_waits_while_another_is_computed(finished, tmp_path, monkeypatch):
    """Else a stop would wait for all that have been begun since the last logged step."""
    step, wait, begun, waited = TrainProgram.step, jax.block_until_ready, [], []

    def recorded(*arguments):
        state, values = step(*arguments)
        begun.append(values)
        assert len(set(waited)) >= len(begun) - 2
        return state, values

    def recording_wait(values):
        waited.extend(index for index, other in enumerate(begun) if other is values)
        return wait(values)

    monkeypatch.setattr(TrainProgram, "step", recorded)
    monkeypatch.setattr(jax, "block_until_ready", recording_wait)
    training = {"log_every": STEPS, "evaluate_every": STEPS, "checkpoint_every": STEPS}
    trainer.train(tiny_config(finished.home, tmp_path / "run", training=training))
    assert len(begun) == STEPS
    assert sorted(set(waited)) == list(range(STEPS))  # the last, logged, at the end


@pytest.mark.slow(reason="trains a run of its own")
def test_checkpoints_that_are_kept(finished, tmp_path):
    config = tiny_config(
        finished.home,
        tmp_path / "run",
        training={"checkpoint_every": 1},
        checkpoint={"keep": 3, "keep_best": 1},
    )
    trainer.train(config)
    rows = json_rows(Path(config.run_dir) / METRICS)
    best = min(
        (row for row in rows if "validation_loss" in row), key=lambda r: r["validation_loss"]
    )
    assert list_steps(tmp_path / "run" / CHECKPOINTS) == sorted({6, 7, 8, best["step"]})


@pytest.mark.slow(reason="trains a run of its own")
def test_waiting_for_a_step_is_time_of_steps(finished, tmp_path, monkeypatch):
    """Whether its metrics, an evaluation or a checkpoint wait for it."""

    @jax.jit
    def late(value):
        """The value, after some tenths of a second on the device."""
        square = jnp.full((400, 400), 1e-3 * value)
        turned = jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), square)
        return value + 0.0 * jnp.sum(turned)

    step = TrainProgram.step

    def slow(*arguments):
        state, values = step(*arguments)
        return state, values | {"loss": late(values["loss"])}

    jax.block_until_ready(late(1.0))
    began = time.perf_counter()
    jax.block_until_ready(late(1.0))
    taken = time.perf_counter() - began
    monkeypatch.setattr(TrainProgram, "step", slow)
    trainer.train(tiny_config(finished.home, tmp_path / "run"))
    *_, row = [row for row in json_rows(tmp_path / "run" / METRICS) if "loss" in row]
    # All steps but the first, which is compiling; half, since the machine may have sped up.
    assert row["seconds/steps"] > (STEPS - 1) * taken / 2


class Devices(NamedTuple):
    """What is asked of a mesh's devices."""

    device_kind: str
    size: int

    @property
    def devices(self):
        return SimpleNamespace(flat=[self])


def test_arithmetic_counts_every_loop_and_mfu_all_devices():
    one, two = (RunConfig.model_validate({"model": {"loop": {"count": count}}}) for count in (1, 2))
    mesh = Devices("NVIDIA H100 80GB HBM3", 4)
    found = arithmetic(two, mesh, tokens_per_second=1000.0)
    per_token = 3 * sum(loop.total for loop in flops_by_loop(two.model, two.sequence_length))
    assert found["model_tflops_per_second"] == pytest.approx(per_token * 1000 / 1e12)
    assert found["mfu"] == pytest.approx(per_token * 1000 / (4 * 989e12))
    assert found["mfu"] > 1.2 * arithmetic(one, mesh, 1000.0)["mfu"]
    assert arithmetic(two, Devices("cpu", 4), 1000.0).keys() == {"model_tflops_per_second"}


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 62.02GiB with allocator "
            "GPU_0_bfc on device 0. [executable_name='jit_train_step']",
            "out of a device's memory, which 62.02GiB more do not fit into; raise training.acc",
        ),
        (
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 2.50G. "
            "That was not possible.",
            "out of a device's memory, which 2.50G more do not fit into; raise training.accumulate",
        ),
        ("RESOURCE_EXHAUSTED: too much", "out of a device's memory; raise training.accumulate"),
    ],
)
def test_a_device_without_the_memory_is_named(finished, tmp_path, monkeypatch, said, named):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(TrainProgram, "step", fail)
    with pytest.raises(FailedError) as failure:
        trainer.train(tiny_config(finished.home, tmp_path / "run"))
    assert str(failure.value).startswith(named)


def test_other_failures_of_devices_are_shown_as_they_are(finished, tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel is broken")

    monkeypatch.setattr(TrainProgram, "step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel is broken"):
        trainer.train(tiny_config(finished.home, tmp_path / "run"))


def test_two_do_not_train_in_one_directory(tmp_path):
    config = tiny_config(make_home(tmp_path / "home"), tmp_path / "run")
    refused = []

    def start_another():
        with pytest.raises(InputError, match="another process trains in --run_dir"):
            trainer.train(config)
        refused.append(True)

    with call_at(3, start_another):
        assert trainer.train(config).step == STEPS
    assert refused
    assert [row["step"] for row in numbers(config) if "loss" in row] == list(range(1, STEPS + 1))


def test_a_run_that_another_process_begins_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """Both have found no run when they looked."""
    config = tiny_config(make_home(tmp_path / "home"), tmp_path / "run")
    choose = trainer.choose_checkpoint

    def another_is_faster(config):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / CONFIG).write_text("theirs")
        return choose(config)

    monkeypatch.setattr(trainer, "choose_checkpoint", another_is_faster)
    with pytest.raises(InputError, match="another process has begun a run in --run_dir"):
        trainer.train(config)
    assert (tmp_path / "run" / CONFIG).read_text() == "theirs"
    assert len(list((tmp_path / "run").iterdir())) == 1
