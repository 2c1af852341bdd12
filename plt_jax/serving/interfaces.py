"""What the scheduler asks of the device's part and of whoever measures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from plt_jax.serving.request import Finish, SlotSampling


class DrawnTokens(Protocol):
    """What a program drew; see `slot_programs.Drawn`."""

    @property
    def tokens_B(self) -> Any: ...

    @property
    def logs_B(self) -> Any: ...

    @property
    def likeliest_BA(self) -> Any: ...

    @property
    def likeliest_logs_BA(self) -> Any: ...


class Slots(Protocol):
    """The device's part, as the scheduler uses it; see `slots.SlotModel`."""

    slots: int
    context: int
    chunk: int

    def padded(self, count: int) -> int: ...

    def beginning(self, sampling: SlotSampling) -> bytes: ...

    def start(self, slot: int, sampling: SlotSampling, prompt: Sequence[int]) -> None: ...

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        is_last: bool,
        following: Sequence[int] | None = None,
    ) -> tuple[DrawnTokens, Any]: ...

    def step(self, active_B: np.ndarray, log_probabilities: bool, longest: int) -> DrawnTokens: ...

    def save_block(self, slot: int, start: int) -> Any: ...

    def load_block(self, slot: int, start: int, block: Any) -> None: ...


class Observer(Protocol):
    """What measures the scheduler; times are in seconds."""

    def admitted(self, queued: float, prompt_tokens: int, cached_tokens: int) -> None: ...

    def first_token(self, since_arrival: float) -> None: ...

    def next_token(self, since_last: float) -> None: ...

    def finished(self, why: Finish) -> None: ...
