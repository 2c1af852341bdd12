"""What a run reports of its steps while it trains: metrics, printed lines or a bar, a profile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from plt_jax.config import RunConfig
from plt_jax.distributed import processes
from plt_jax.distributed.chips import peak_flops
from plt_jax.evaluation.perplexity import Evaluation
from plt_jax.locks import Lock, lock_of
from plt_jax.model.arithmetic import train_flops
from plt_jax.training.guard import Guard
from plt_jax.training.logs import Logs
from plt_jax.training.metrics import MetricsWriter, NoMetrics
from plt_jax.training.objective import Metrics
from plt_jax.training.phases import PROFILING, STEPS, Phases
from plt_jax.training.profiling import ProfileWindow
from plt_jax.training.progress import ProgressReport, Speedometer
from plt_jax.training.step import first_loop_and_layer
from plt_jax.training.trackers import EVENTS, TensorBoard, Tracker, WeightsAndBiases


class Journal:
    """Reports the steps of one start of a run. It is a context manager."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        bytes_per_target: float,
        step: int,
        phases: Phases,
        lock: Lock | None = None,
    ):
        """
        Args:
          bytes_per_target: bytes of the training text per target; see `Data`.
          step: the step that this start goes on from.
          phases: the clock of the run's phases.
          lock: the run directory's, if this process has taken it.
        """
        training = config.training
        self.phases = phases
        self.speed = Speedometer(training.batch_size * config.sequence_length)
        self._config, self._mesh, self._step = config, mesh, step
        self._bytes_per_target = bytes_per_target
        self._progress = ProgressReport(step, training.steps)
        first = training.profile_from if processes.is_first() else None
        self._logs = Logs(config.directory, lock or lock_of(config.directory))
        events = self._logs.path / EVENTS
        self.profile = ProfileWindow(events, first, training.profile_steps, self.say)
        self._metrics: MetricsWriter | NoMetrics = NoMetrics()
        self._open = ExitStack()

    def __enter__(self) -> Journal:
        with ExitStack() as opened:
            opened.enter_context(self._logs)
            folder = self._logs.path
            self._metrics = opened.enter_context(open_metrics(self._config, folder, self._step))
            opened.enter_context(self._progress)
            opened.enter_context(self.profile)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def say(self, text: str) -> None:
        """Prints a line."""
        self._progress.say(text)

    def wait_for(self, metrics: Metrics) -> None:
        """Waits until a step is computed, in the phase of steps.

        Otherwise the phase that reads its arrays next would wait for it, and count the time.
        """
        with self.phases.phase(STEPS):
            jax.block_until_ready(metrics)

    @contextmanager
    def paused(self, phase: str, metrics: Metrics) -> Iterator[None]:
        """Times a block as a phase other than steps, and leaves it out of tokens per second.

        Args:
          metrics: those of the step before, which is waited for first.
        """
        self.wait_for(metrics)
        with self.speed.paused(), self.phases.phase(phase):
            yield

    def end_profile(self, step: int, metrics: Metrics) -> None:
        """Ends the profiler's window if this step is its last."""
        if self.profile.ends_with(step):
            with self.paused(PROFILING, metrics):
                self.profile.end()

    def roll_back(self, step: int, to: int) -> None:
        """Drops the metrics after step `to`, and records a rollback from `step` there."""
        self._metrics.rewind(to)
        self._metrics.write(to, rolled_back_from=step)
        self.speed.start(to)

    def log_step(self, step: int, metrics: Metrics, guard: Guard) -> None:
        """Writes and prints a step's metrics; waits until the step is computed."""
        self.wait_for(metrics)
        numbers = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        numbers["skipped"] = guard.take_skipped()
        if numbers["skipped"]:
            self.say(
                f"step {step}: {numbers['skipped']} of the steps since the last line were skipped, "
                "their loss or gradient not finite or above its limit"
            )
        loss, tokens_per_second = numbers["loss"], self.speed.mark(step)
        seconds = self.phases.seconds()
        self._metrics.write(
            step,
            **numbers,
            tokens_per_second=tokens_per_second,
            **arithmetic(self._config, self._mesh, tokens_per_second),
            goodput=seconds.get(STEPS, 0.0) / sum(seconds.values()),
            **{f"seconds/{phase}": round(spent, 3) for phase, spent in seconds.items()},
        )
        bits_per_byte = loss / math.log(2) / self._bytes_per_target
        self._progress.advance(step, loss, bits_per_byte, tokens_per_second)
        self._logs.send()

    def log_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Writes and prints an evaluation."""
        score = evaluation.score
        self._metrics.write(
            step,
            validation_loss=score.loss,
            bits_per_byte=score.bits_per_byte,
            validation_tokens=evaluation.tokens,
        )
        self.say(
            f"step {step}: held-out loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits per byte "
            f"({evaluation.tokens:,} tokens)"
        )
        self._logs.send()


def arithmetic(config: RunConfig, mesh: Mesh, tokens_per_second: float) -> dict[str, float]:
    """The metrics `model_tflops_per_second` and, where the devices' peak is known, `mfu`.

    The first counts the model's own arithmetic, in all loops and on all devices; the second is its
    share of the devices' peak (distributed/chips.py).
    """
    tokens = config.training.batch_size * config.sequence_length
    done = train_flops(config).model / tokens * tokens_per_second
    made = {"model_tflops_per_second": done / 1e12}
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if peak is not None:
        made["mfu"] = done / (peak * mesh.size)
    return made


def open_metrics(config: RunConfig, directory: Path, step: int) -> MetricsWriter | NoMetrics:
    """The metrics writer of process 0, in the folder of the run's logs; the other processes write
    nothing."""
    if not processes.is_first():
        return NoMetrics()
    project = config.training.wandb_project
    trackers: list[Tracker] = [TensorBoard(directory, step)]
    if project is not None:
        trackers.append(WeightsAndBiases(directory, project, config.model_dump(mode="json")))
    return MetricsWriter(directory, step, trackers, first_loop_and_layer(config.model))
