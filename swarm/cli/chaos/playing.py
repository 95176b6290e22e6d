"""One session plays one script, checks every token, and stamps when each came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.chaos.reference import GREEDY
from swarm.cli.chaos.stalls import TokenGap
from swarm.errors import SwarmError

if TYPE_CHECKING:
    import torch

    from swarm.cli.chaos.reference import Part, Reference
    from swarm.cli.chaos.scripts import Script
    from swarm.client.generation_session import GenerationSession
    from swarm.client.remote_model import SwarmModelForCausalLM

__all__ = ["Outcome", "play"]

_LATE_S: Final = 15.0
"""How much later than its deadline an error may come on a busy machine."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a session."""

    script: str
    client: int
    started_s: float
    ended_s: float = 0.0
    num_tokens: int = 0
    """Right ones."""
    num_wrong_tokens: int = 0
    num_failovers: int = 0
    gaps: list[TokenGap] = field(default_factory=list)
    error: str = ""
    """Name of the class of a SwarmError that ended it."""
    message: str = ""
    """That error's sentence, or how the tokens differ."""
    is_late: bool = False
    """The error came long after the deadline."""
    is_untyped: bool = False
    """What ended it is no SwarmError: a bug."""


class _Stamps:
    """Notes the time of every token; a stop criterion that never stops."""

    def __init__(self, outcome: Outcome, count_failovers: Callable[[], int], on_token: Callable[[int], None]) -> None:
        self._outcome = outcome
        self._count = count_failovers
        self._on_token = on_token
        self._num_failovers = count_failovers()
        self._since_s = time.monotonic()
        self._is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        self.note()
        self._on_token(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def note(self) -> None:
        """A token has come, or will not come."""
        now_s, num_failovers = time.monotonic(), self._count()
        changed = num_failovers - self._num_failovers
        self._outcome.gaps.append(
            TokenGap(started_s=self._since_s, ended_s=now_s, num_failovers=changed, is_first=self._is_first)
        )
        self._is_first = False
        self._outcome.num_failovers += changed
        self._since_s, self._num_failovers = now_s, num_failovers


def play(
    model: SwarmModelForCausalLM,
    script: Script,
    reference: Reference,
    *,
    client: int,
    deadline_s: float,
    on_token: Callable[[int], None] = lambda position: None,
    on_session: Callable[[GenerationSession], None] = lambda session: None,
) -> Outcome:
    """Play it to its end, or until an error; never raises an Exception.

    Args:
        model: may be shared by several threads.
        script: what to do.
        reference: what must come out.
        client: noted in the outcome.
        deadline_s: of the model's client; a typed error may come at most that long after its step began.
        on_token: called after each token with the number of columns so far.
        on_session: called with the session once it is there; not for beams.
    """
    outcome = Outcome(script=script.name, client=client, started_s=time.monotonic())
    stamps: list[_Stamps] = []
    try:
        if script.num_beams > 1:
            stamps.append(_Stamps(outcome, lambda: 0, on_token))
            _play_beams(model, script, reference, outcome, stamps[0])
        else:
            with model.session(max_length=reference.max_length) as session:
                on_session(session)
                for turn, part in zip(script.turns, reference.parts, strict=True):
                    time.sleep(turn.pause_s)
                    session.position = part.start
                    stamps.append(_Stamps(outcome, lambda: session.num_failovers, on_token))
                    ids = _generate(model, part, stamps[-1], session=session)
                    if not _check(ids, part, outcome):
                        break
    except SwarmError as error:
        stamps[-1].note()
        outcome.error, outcome.message = type(error).__name__, str(error)
        outcome.is_late = outcome.gaps[-1].length_s > deadline_s + _LATE_S
    except Exception as error:
        outcome.error, outcome.message, outcome.is_untyped = type(error).__name__, str(error), True
    outcome.ended_s = time.monotonic()
    return outcome


def _play_beams(
    model: SwarmModelForCausalLM, script: Script, reference: Reference, outcome: Outcome, stamps: _Stamps
) -> None:
    (part,) = reference.parts
    ids = _generate(model, part, stamps, num_beams=script.num_beams)
    _check(ids, part, outcome)


def _generate(model: SwarmModelForCausalLM, part: Part, stamps: _Stamps, **settings: Any) -> Sequence[int]:
    import torch
    from transformers import StoppingCriteriaList

    input_ids = torch.tensor([list(part.text_ids)])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=len(part.new_ids),
        stopping_criteria=StoppingCriteriaList([stamps]),
        **GREEDY,
        **settings,
    )
    ids: list[int] = output[0, input_ids.shape[1] :].tolist()
    return ids


def _check(ids: Sequence[int], part: Part, outcome: Outcome) -> bool:
    """Count right and wrong tokens; whether all are right."""
    right = list(part.new_ids)
    num_right = next((index for index, (a, b) in enumerate(zip(ids, right, strict=False)) if a != b), len(right))
    num_right = min(num_right, len(ids))
    outcome.num_tokens += num_right
    if list(ids) == right:
        return True
    outcome.num_wrong_tokens += max(len(right), len(ids)) - num_right
    outcome.message = f"token {num_right} of a turn differs: {ids[num_right:][:3]} instead of {right[num_right:][:3]}"
    return False
