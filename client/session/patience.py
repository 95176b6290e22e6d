"""How long a step may still take: overall, at a standstill, and in queues. Pure but for its clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from swarm.client.config import ClientConfig

__all__ = ["Patience"]


class Patience:
    """The deadlines of one session's steps.

    A long input takes as long as it takes, so getting further than ever before in a step renews its deadline;
    doing the same again after a loss does not, or a server that fails at the very end could go on for ever.
    """

    def __init__(self, config: ClientConfig, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._now_s = now_s
        self._deadline_s = 0.0
        self._progress_s = 0.0
        self._queueing_left_s = 0.0
        self._num_done = 0
        self._furthest = 0

    @property
    def left_s(self) -> float:
        """Seconds until the step's deadline; 0 when it has passed."""
        return max(self._deadline_s - self._now_s(), 0.0)

    @property
    def standstill_left_s(self) -> float:
        """Seconds until something must be done about the silence; 0 when they are over."""
        silence_end_s = self._progress_s + self._config.step_timeout_s
        return max(min(silence_end_s, self._deadline_s) - self._now_s(), 0.0)

    @property
    def queueing_left_s(self) -> float:
        """Seconds that the step may still spend in queues."""
        return self._queueing_left_s

    def begin_step(self) -> None:
        """A new step."""
        self._deadline_s = self._now_s() + self._config.request_timeout_s
        self._queueing_left_s = self._config.queue_timeout_s
        self._furthest = 0

    def begin_attempt(self, num_done: int = 0) -> None:
        """The step goes on along another route, all of whose servers hold `num_done` tokens of the log already."""
        self._num_done = num_done

    def note_movement(self) -> None:
        """Something was sent on, so silence is counted from now."""
        self._progress_s = self._now_s()

    def note_done(self, num_tokens: int) -> None:
        """So many more tokens have come through all blocks."""
        self.note_movement()
        self._num_done += num_tokens
        if self._num_done > self._furthest:
            self._furthest = self._num_done
            self._deadline_s = self._now_s() + self._config.request_timeout_s

    def note_queueing(self, seconds: float) -> None:
        """Time in a queue does not count against the step's deadline, but has a bound of its own."""
        self._deadline_s += min(seconds, self._queueing_left_s)
        self._queueing_left_s = max(self._queueing_left_s - seconds, 0.0)
