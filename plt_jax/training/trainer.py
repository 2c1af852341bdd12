"""A training run from its configuration: start or resume, train, evaluate, save, report."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax

from plt_jax.checkpoint.store import Checkpoints
from plt_jax.config import RunConfig
from plt_jax.data.load import check_named
from plt_jax.decoding.sampling import Sampling
from plt_jax.decoding.text import TextStream
from plt_jax.distributed import processes, rendezvous
from plt_jax.distributed.mesh import use_mesh
from plt_jax.errors import FailedError
from plt_jax.locks import Lock, lock_of
from plt_jax.reports.loss_plot import plot_losses
from plt_jax.runs.names import CHECKPOINTS
from plt_jax.runs.resume import make_directory, take_lock, write_directory
from plt_jax.training.journal import Journal
from plt_jax.training.objective import Metrics
from plt_jax.training.phases import COMPILING, DATA, EVALUATION, SAVING, STEPS, Phases
from plt_jax.training.progress import peak_memory
from plt_jax.training.rollback import roll_back
from plt_jax.training.setup import (
    RunSetup,
    check_shared_directory,
    print_setup,
    set_up,
    shared_state,
)
from plt_jax.training.signals import StopRequest
from plt_jax.training.start import (
    GUARD,
    StartPoint,
    choose_checkpoint,
    load_start_params,
    set_aside_damaged,
    start_or_resume,
)
from plt_jax.training.step import TrainState
from plt_jax.training.stopping import CoordinatedStop

SAMPLE_TOKENS = 120


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    step: int
    stopped: bool
    """Whether a signal stopped it; its state is saved then."""


def train(config: RunConfig, take_over: bool = False) -> Outcome:
    """Trains until `training.steps`, from the newest checkpoint of the run directory if there is
    one (see `choose_checkpoint`).

    SIGTERM and SIGINT (Ctrl-C) end the run after the steps under way, with its state saved; the
    same command resumes it, bit for bit. With several processes a signal to one is enough.

    Args:
      take_over: see `lock_of`.

    Raises:
      InputError: the configuration names no data; text, tokenizer, mesh or run directory do not
        fit it, in any process; or some process does not come. Nothing in the run directory is
        changed then.
      FailedError: a checkpoint could not be saved, too many steps in a row were skipped (see
        GuardConfig), or a device's memory does not suffice.
    """
    check_named(config)
    rendezvous.initialize(config.processes)
    lock = lock_of(config.directory, take_over)
    with Phases(config.training.hang_after) as phases, explain_out_of_memory():
        try:
            return _train(config, phases, lock)
        finally:
            lock.release()


@contextlib.contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Raises FailedError with possible remedies where a device runs out of memory in the block."""
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


def _train(config: RunConfig, phases: Phases, lock: Lock) -> Outcome:
    patience = config.processes.timeout
    # Everything is checked before anything is written.
    with processes.fail_together("the configuration is checked", patience):
        if processes.is_first():
            take_lock(lock, config.directory)
        setup = set_up(config)
    processes.check_equal(shared_state(setup), patience)
    with processes.fail_together("the checkpoint to go on from is checked", patience):
        checkpoint = choose_checkpoint(config)
    with processes.fail_together("the run directory is made", patience):
        params = load_start_params(config, setup.program.abstract_state)
        if processes.is_first():
            make_directory(config.directory, lock)
            set_aside_damaged(config, checkpoint)
            write_directory(config, setup.data.tokenizer, setup.data.fingerprint)
    with processes.fail_together("the run directory is seen", patience):
        check_shared_directory(setup.directory)
    print_setup(setup)
    with (
        StopRequest() as request,
        CoordinatedStop(lambda: request.requested, checkpoint or 0, patience) as stop,
        Checkpoints(
            setup.directory / CHECKPOINTS, config.checkpoint, patience, lock.renew
        ) as checkpoints,
    ):
        batches = iter(setup.data.training)
        start = start_or_resume(setup.program, checkpoints, checkpoint, batches, params)
        del params  # the first step donates them
        first = int(start.state.step)
        if first >= config.training.steps:
            print(f"finished: {setup.directory} is at step {first} of {config.training.steps}")
            return Outcome(first, stopped=False)
        bytes_per_target = setup.data.bytes_per_target
        opened = Journal(config, setup.mesh, bytes_per_target, first, phases, lock)
        with opened as journal:
            state = Trainer(setup, start, batches, checkpoints, journal, stop).run()
    step = int(state.step)
    if processes.is_first():
        plot_losses(setup.directory)
    if step < config.training.steps:
        print(f"stopped at step {step}, saved; run the same command to go on")
        return Outcome(step, stopped=True)
    print_sample(setup, state.params)
    print(
        f"done: {config.training.steps - first} steps, median {journal.speed.median():,.0f} "
        f"tokens/s, peak memory {peak_memory() / 2**30:.2f} GiB; the run is in {setup.directory}"
    )
    return Outcome(step, stopped=False)


class Trainer:
    """Takes a run's steps; evaluates, saves and rolls back on the way."""

    def __init__(
        self,
        setup: RunSetup,
        start: StartPoint,
        batches: grain.DatasetIterator,
        checkpoints: Checkpoints,
        journal: Journal,
        stop: CoordinatedStop,
    ):
        """
        Args:
          batches: of the training data, at the batch after the start point.
        """
        self._setup, self._training = setup, setup.config.training
        self._batches, self._checkpoints = batches, checkpoints
        self._journal, self._stop = journal, stop
        self._state, self._guard = start
        self._step = int(start.state.step)
        # Steps computed: rollbacks do not lower it, so that processes can agree on a last one.
        self._computed = self._step
        self._rollbacks, self._save_is_due = 0, False
        self._before: Metrics | None = None
        """The metrics of the step before the newest."""

    def run(self) -> TrainState:
        """Trains up to the last step, or until a stop is requested."""
        training, stopping = self._training, False
        self._journal.say("compiling the train step ...")
        while self._step < training.steps and not stopping:
            metrics = self._take_step()
            if self._guard.should_roll_back():
                self._roll_back(metrics)
                continue
            last = self._step == training.steps
            if self._step % training.log_every == 0 or last:
                self._journal.log_step(self._step, metrics, self._guard)
            validation_loss = None
            if self._step % training.evaluate_every == 0 or last:
                validation_loss = self._evaluate(metrics, last)
            # It is asked once a step: the step that is saved must be the one that it stops at.
            stopping = self._stop.should_stop(self._computed)
            self._save_if_due(metrics, validation_loss, last or stopping)
            self._journal.phases.finish_step(self._step)
        return self._state

    def _take_step(self) -> Metrics:
        journal, program = self._journal, self._setup.program
        with journal.phases.phase(DATA):
            batch = program.batch_layout.place(next(self._batches))
        with journal.phases.phase(STEPS if journal.speed.started else COMPILING):
            with journal.profile.step(self._step + 1):
                limits = self._guard.limits()
                self._state, metrics = program.step(self._state, batch, limits)
            self._step, self._computed = self._step + 1, self._computed + 1
            # One step waits while another is computed: more would only delay a stop.
            jax.block_until_ready(self._before if journal.speed.started else metrics)
        self._before = metrics
        if not journal.speed.started:
            journal.speed.start(self._step)
        journal.end_profile(self._step, metrics)
        self._guard.observe(metrics)
        return metrics

    def _roll_back(self, metrics: Metrics) -> None:
        step, self._rollbacks, self._save_is_due = self._step, self._rollbacks + 1, False
        del self._state  # a device may not hold two states
        self._state, self._guard = roll_back(
            self._setup, self._checkpoints, step, metrics, self._guard, self._rollbacks
        )
        self._step = int(self._state.step)
        self._journal.roll_back(step, self._step)

    def _evaluate(self, metrics: Metrics, last: bool) -> float:
        """The validation loss, in nats per token."""
        setup = self._setup
        with self._journal.paused(EVALUATION, metrics):
            limit = None if last else setup.config.evaluation.sequences
            evaluation = setup.evaluate(self._state.params, setup.data.validation, limit)
        self._journal.log_evaluation(self._step, evaluation)
        return evaluation.score.loss

    def _save_if_due(self, metrics: Metrics, validation_loss: float | None, at_end: bool) -> None:
        """Saves a checkpoint at every `training.checkpoint_every`th step, and at the end.

        If the step was skipped, the checkpoint waits for the next one that is not: rollbacks go to
        the newest checkpoint.
        """
        self._save_is_due |= self._step % self._training.checkpoint_every == 0
        if self._save_is_due:
            self._journal.wait_for(metrics)
        if (self._save_is_due and not metrics["skipped"]) or at_end:
            self._save_is_due = False
            with self._journal.paused(SAVING, metrics):
                state = self._state
                optimizer = {"step": state.step, "opt_state": state.opt_state}
                data = self._batches.get_state() | {GUARD: self._guard.state()}
                self._checkpoints.save(self._step, state.params, optimizer, data, validation_loss)


def print_sample(setup: RunSetup, params: Any) -> None:
    """Prints text that the model writes, drawn with the run's seed."""
    config = setup.config
    prompt, seed = config.training.sample_prompt, jax.random.key(config.seed)
    sampling = Sampling(temperature=0.8, top_p=0.95)
    tokenizer = setup.data.tokenizer
    tokens = tokenizer.encode_prompt(prompt)
    with use_mesh(setup.mesh):
        pieces = TextStream(config.model, params, tokenizer, tokens, SAMPLE_TOKENS, sampling, seed)
        print(f"a sample:\n{prompt}{''.join(pieces)}\n")
