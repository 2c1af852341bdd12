"""A training run from its configuration: start or resume, train, evaluate, save, report."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from plt_jax.checkpoint.steps import list_steps
from plt_jax.checkpoint.store import Checkpoints, refuse_damaged
from plt_jax.config import ProcessesConfig, RunConfig
from plt_jax.data.cache import fingerprint
from plt_jax.data.load import Data, load_data
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.text import encode_prompt, stream_text
from plt_jax.distributed import processes, rendezvous
from plt_jax.distributed.mesh import BatchLayout, make_mesh, use_mesh
from plt_jax.errors import FailedError, InputError
from plt_jax.evaluation.perplexity import Evaluation, make_evaluate
from plt_jax.model.attention import choose_backend, fastest_backend
from plt_jax.model.grouped import choose_kernel
from plt_jax.model.kernels import traced_platform
from plt_jax.reports.loss_plot import plot_losses
from plt_jax.runs.names import CHECKPOINTS, CONFIG
from plt_jax.runs.resume import check_directory, check_text, write_directory
from plt_jax.training.guard import LAG, Guard, what_is_wrong
from plt_jax.training.journal import Journal
from plt_jax.training.phases import COMPILING, DATA, EVALUATION, SAVING, STEPS, Phases
from plt_jax.training.progress import peak_memory
from plt_jax.training.signals import StopRequest
from plt_jax.training.start import (
    GUARD,
    Start,
    check_start,
    choose_checkpoint,
    restore,
    set_aside_damaged,
    start_or_resume,
    start_params,
)
from plt_jax.training.step import TrainState, abstract_state, make_train_step, training_layout
from plt_jax.training.stopping import StopTogether
from plt_jax.training.trackers import check_wandb

SAMPLE_TOKENS = 120
CACHES = {"cache_dir": ""}
"""Of the data section, what each machine may have of its own."""


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    step: int
    stopped: bool
    """By a signal, with the state saved."""


class Checked(NamedTuple):
    """What is known of a run before anything is written."""

    changes: list[str]
    """Since its last start."""
    mesh: Mesh
    layout: BatchLayout
    abstract: TrainState
    kernels: str
    """For people."""
    data: Data
    evaluate: Callable[[Any, Any, int | None], Evaluation]


class Run(NamedTuple):
    """What stays fixed while a run trains."""

    config: RunConfig
    directory: Path
    checked: Checked
    checkpoints: Checkpoints


def train(config: RunConfig) -> Outcome:
    """Trains until `training.steps`, from the newest checkpoint of the run directory if it has one
    (see `choose_checkpoint`).

    SIGTERM and SIGINT (Ctrl-C) end the run after the steps under way, with its state saved; the
    same command resumes it, bit for bit. Of several processes one signalled is enough.

    Raises:
      InputError: text, tokenizer, mesh or run directory do not fit the configuration, in any
        process, or some process does not come; nothing in the run directory is changed then.
      FailedError: a checkpoint could not be saved, too many steps in a row were out of order (see
        GuardConfig), or a device's memory does not suffice.
    """
    rendezvous.initialize(config.processes)
    with Phases(config.training.hang_after) as phases, naming_what_memory_needs():
        return _train(config, phases)


@contextlib.contextmanager
def naming_what_memory_needs() -> Iterator[None]:
    """Raises FailedError with what may help where a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B?)", str(error))
        more = f", which {wanted[1]} more do not fit into" if wanted else ""
        raise FailedError(
            f"out of a device's memory{more}; raise training.accumulate, set model.remat to full, "
            "or spread the run over more devices (mesh.fsdp, mesh.tensor)"
        ) from error


def _train(config: RunConfig, phases: Phases) -> Outcome:
    patience = config.processes.timeout
    # Everything is checked before anything is written.
    with processes.fail_together("the configuration is checked", patience):
        checked = check(config)
    processes.check_equal(shared_state(config, checked.data), patience)
    with processes.fail_together("the checkpoint to go on from is checked", patience):
        resumed = choose_checkpoint(config)
    with processes.fail_together("the run directory is made", patience):
        params = start_params(config, checked.abstract)
        if processes.is_first():
            set_aside_damaged(config, resumed)
            write_directory(config, checked.data.tokenizer, checked.data.fingerprint)
    directory = Path(config.run_dir)
    with processes.fail_together("the run directory is seen", patience):
        check_shared(directory)
    describe(config, checked)
    with (
        StopRequest() as request,
        StopTogether(lambda: request.requested, resumed or 0, patience) as stop,
        Checkpoints(directory / CHECKPOINTS, config.checkpoint, patience) as saved,
    ):
        run = Run(config, directory, checked, saved)
        batches = iter(checked.data.training)
        start = start_or_resume(
            config, checked.mesh, checked.abstract, saved, resumed, batches, params
        )
        del params  # the step takes their place
        first = int(start.state.step)
        if first >= config.training.steps:
            print(f"finished: {directory} is at step {first} of {config.training.steps}")
            return Outcome(first, stopped=False)
        with Journal(config, checked.mesh, checked.data.bytes_per_target, first, phases) as journal:
            state = train_steps(run, start, batches, journal, stop)
    step = int(state.step)
    if processes.is_first():
        plot_losses(directory)
    if step < config.training.steps:
        print(f"stopped at step {step}, saved; run the same command to go on")
        return Outcome(step, stopped=True)
    print_sample(run, state.params)
    speed = journal.speed.median()
    print(
        f"done: {config.training.steps - first} steps, median {speed:,.0f} tokens/s, "
        f"peak memory {peak_memory() / 2**30:.2f} GiB; the run is in {directory}"
    )
    return Outcome(step, stopped=False)


def check(config: RunConfig) -> Checked:
    """Raises InputError where anything does not fit the configuration; changes nothing."""
    changes = check_directory(config)
    check_start(config)
    mesh = make_mesh(config.mesh)
    layout = training_layout(config, mesh)
    abstract = abstract_state(config, mesh)
    kernels = choose_kernels(config, mesh)
    check_wandb(config.training.wandb_project)
    data = load_data(config, layout.rows)
    check_text(config, data.tokenizer, data.fingerprint)
    check_sample_prompt(config, data.tokenizer)
    evaluate = make_evaluate(config, mesh, data.token_bytes)
    return Checked(changes, mesh, layout, abstract, kernels, data, evaluate)


def shared_state(config: RunConfig, data: Data) -> dict[str, str]:
    """What must be the same in all processes, by name."""
    own = {"processes": ProcessesConfig(), "data": config.data.model_copy(update=CACHES)}
    return {
        "configuration": config.model_copy(update=own).model_dump_json(),
        "tokenizer": fingerprint([data.tokenizer.to_str()]),
        "text": data.fingerprint,
    }


def check_shared(directory: Path) -> None:
    """Raises InputError where the run directory is not the one that the first process has made."""
    if not (directory / CONFIG).is_file():
        raise InputError(
            f"the run directory {directory} is not the one that process 0 has made; it must be on "
            "a file system that all share"
        )


def choose_kernels(config: RunConfig, mesh: Mesh) -> str:
    """What computes attention and experts on the mesh, and what would be faster there.

    Raises:
      InputError: its devices cannot run what the model names.
    """
    model = config.model
    with use_mesh(mesh):
        backend = choose_backend(model)
        chosen = [f"attention: {backend}"]
        if model.attention == "auto" and backend != fastest_backend():
            chosen[0] += f" (not {fastest_backend()}: {model.cudnn_obstacle})"
        if model.moe.experts:
            form = choose_kernel(model.moe)
            chosen.append(f"experts: {form}")
            auto = model.moe.grouped_product == "auto"
            if auto and form == "blocks" and traced_platform() == "gpu":
                chosen[-1] += " (tokamax is made for GPUs: pip install 'plt_jax[tokamax]')"
    return ", ".join(chosen)


def train_steps(
    run: Run, start: Start, batches: Iterator, journal: Journal, stop: StopTogether
) -> TrainState:
    """Steps up to the last one, or until a stop is requested; evaluates and saves on the way."""
    training = run.config.training
    train_step = make_train_step(run.config, run.checked.mesh)
    state, guard = start
    step, stopping, due, rollbacks, before = int(state.step), False, False, 0, None
    turn = step  # counts on where steps go back, so that processes can agree on a last one
    journal.say("compiling the train step ...")
    while step < training.steps and not stopping:
        with journal.phases.phase(DATA):
            batch = run.checked.layout.place(next(batches))
        with journal.phases.phase(STEPS if journal.speed.started else COMPILING):
            with journal.profile.step(step + 1):
                state, values = train_step(state, batch, guard.limits())
            step, turn = step + 1, turn + 1
            # One step waits while another is computed: more would only delay a stop.
            jax.block_until_ready(before if journal.speed.started else values)
        before = values
        if not journal.speed.started:
            journal.speed.start(step)
        journal.end_profile(step, values)
        guard.observe(values)
        if guard.lost():
            rollbacks, due = rollbacks + 1, False
            state = None  # where one fits, two may not
            state, guard = go_back(run, step, values, guard, rollbacks)
            journal.go_back(step, int(state.step))
            step = int(state.step)
            continue
        last = step == training.steps
        if step % training.log_every == 0 or last:
            journal.log_step(step, values, guard)
        validation_loss = None
        if step % training.evaluate_every == 0 or last:
            with journal.aside(EVALUATION, values):
                limit = None if last else run.config.evaluation.sequences
                evaluation = run.checked.evaluate(state.params, run.checked.data.validation, limit)
            validation_loss = evaluation.score.loss
            journal.log_evaluation(step, evaluation)
        stopping = stop.after(turn)  # asked once: the step that is saved is the step it stops at
        due |= step % training.checkpoint_every == 0
        # The newest checkpoint is what is gone back to: not, if it can wait, one of a step that was
        # out of order.
        if due:
            journal.settle(values)
        if (due and not values["skipped"]) or last or stopping:
            due = False
            with journal.aside(SAVING, values):
                optimizer = {"step": state.step, "opt_state": state.opt_state}
                data = batches.get_state() | {GUARD: guard.state()}
                run.checkpoints.save(step, state.params, optimizer, data, validation_loss)
        journal.phases.reached(step)
    return state


def go_back(run: Run, step: int, values: dict[str, jax.Array], lost: Guard, times: int) -> Start:
    """The newest checkpoint's state, where too many steps in a row were skipped.

    The batches stay where they are, so that training goes on behind those that led there.

    Args:
      values: metrics of the newest step.
      lost: the guard that says so.
      times: how often it is done, this time included.

    Raises:
      FailedError: it was done too often already, or there is no checkpoint.
    """
    config, patience = run.config.guard, run.config.processes.timeout
    seen = lost.last()._asdict()
    problem = what_is_wrong(values | seen, run.config.model.moe.dense_layers)
    run.checkpoints.wait()
    processes.barrier("the last checkpoint is complete", patience)
    # As the first process sees the folder: others may see it later.
    steps = json.loads(
        processes.broadcast(json.dumps(list_steps(run.directory / CHECKPOINTS)), patience)
    )
    if times > config.rollbacks or not steps:
        done = "there is no checkpoint to go back to"
        if steps:
            done = f"it went back {times - 1} times (guard.rollbacks)"
        raise FailedError(
            f"{problem} at step {step - LAG}, the last of {config.patience} in a row that were "
            f"skipped (guard.patience), and {done}; look at the data, raise guard.rollbacks, or "
            f"train on in another run, with a lower learning rate and --start_from {run.directory}"
        )
    if run.config.checkpoint.verify:
        with processes.fail_together("the checkpoint to go back to is checked", patience):
            refuse_damaged(run.directory / CHECKPOINTS, steps[-1])
    print(
        f"going back from step {step} to {steps[-1]}, and on with the data behind: {problem}",
        flush=True,
    )
    start, _ = restore(run.config, run.checked.abstract, run.checkpoints, steps[-1])
    start.guard.forget_skipped()
    return start


def describe(config: RunConfig, checked: Checked) -> None:
    """Prints what is about to be trained, on what."""
    loop, mesh = config.model.loop, checked.mesh
    parameters = sum(leaf.size for leaf in jax.tree.leaves(checked.abstract.params))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"run directory {config.run_dir}")
    for change in checked.changes:
        print(f"changed since its last start: {change}")
    print(
        f"model: {loop.scheme}, {loop.count} loops, {parameters:,} parameters, {config.model.dtype}"
    )
    for line in checked.data.about:
        print(line)
    several = "" if processes.is_single() else f" in {jax.process_count()} processes"
    print(f"devices: {mesh.devices.size} {jax.devices()[0].platform}{several} ({axes})")
    print(checked.kernels, flush=True)


def check_sample_prompt(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises InputError for a sample prompt that leaves no room in the context."""
    length = len(encode_prompt(tokenizer, config.training.sample_prompt))
    if length >= config.model.max_length:
        raise InputError(
            f"training.sample_prompt has {length} tokens, but the context holds "
            f"{config.model.max_length} (model.max_length), one of them new; shorten it"
        )


def print_sample(run: Run, params: Any) -> None:
    """Prints text that the model writes, drawn with the run's seed."""
    prompt, seed = run.config.training.sample_prompt, jax.random.key(run.config.seed)
    sampling = Sampling(temperature=0.8, top_p=0.95)
    tokenizer = run.checked.data.tokenizer
    with use_mesh(run.checked.mesh):
        pieces = stream_text(
            run.config.model, params, tokenizer, prompt, SAMPLE_TOKENS, sampling, seed
        )
        print(f"a sample:\n{prompt}{''.join(pieces)}\n")
