"""Asks for codes hidden in a context, all questions side by side, over any cache and without changing it."""

# Letters: Hq query heads, t new tokens, n keys, D, Dv head dimensions.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swarm.cli.bench.kv_methods import KeptContext
from swarm.cli.bench.kv_record import CodeScores
from swarm.cli.bench.kv_texts import HiddenCodes
from swarm.kvpolicy.reference_cache import attend_over
from swarm.kvpolicy.reference_model import AttentionCall, ReferenceModel

__all__ = ["Peek", "ask", "peek_at"]

Peek = Callable[[torch.Tensor, torch.Tensor], Callable[[AttentionCall], torch.Tensor]]
"""From which new tokens see which [t, t], and their positions [t], to an attention that leaves the cache as it is."""


def ask(model: ReferenceModel, codes: HiddenCodes, peek: Peek) -> CodeScores:
    """All questions side by side, blind to one another; the right digits are fed, each is predicted."""
    token_ids: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    places: list[int] = []
    for index, (question, answer) in enumerate(zip(codes.questions, codes.answers, strict=True)):
        places += [len(token_ids) + len(question) - 1 + digit for digit in range(len(answer))]
        token_ids += [*question, *answer]
        positions += range(len(codes.context), len(codes.context) + len(question) + len(answer))
        owners += [index] * (len(question) + len(answer))
    owner = torch.tensor(owners)
    sees = (owner[:, None] == owner) & torch.ones(len(owners), len(owners), dtype=torch.bool).tril()
    hidden = model.run_hidden(token_ids, len(codes.context), peek(sees, torch.tensor(positions)), positions=positions)
    guesses = model.head(hidden[torch.tensor(places)]).argmax(dim=-1)
    right = (guesses == torch.tensor([token for answer in codes.answers for token in answer])).float()
    by_question = right.split([len(answer) for answer in codes.answers])
    exact = sum(float(part.min()) for part in by_question) / len(by_question)
    return CodeScores(digits=float(right.mean()), exact=exact)


def peek_at(kept: KeptContext) -> Peek:
    """Over what some method keeps of the context."""

    def peek(sees: torch.Tensor, new_positions: torch.Tensor) -> Callable[[AttentionCall], torch.Tensor]:
        def attend(call: AttentionCall) -> torch.Tensor:
            entries = [kept.keys_of(call.layer, head) for head in range(len(call.keys))]
            return _attend_beside(call, entries, sees, new_positions)

        return attend

    return peek


def _attend_beside(
    call: AttentionCall,
    entries: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    sees: torch.Tensor,
    new_positions: torch.Tensor,
) -> torch.Tensor:
    """New tokens over a cache's (keys, values, positions, biases) by head, and over one another as `sees` says."""
    group = len(call.queries) // len(entries)
    outputs = []
    for head, (keys, values, positions, biases) in enumerate(entries):
        heads = slice(head * group, (head + 1) * group)
        is_past = torch.zeros(len(sees), len(keys), dtype=torch.bool)
        if call.window:
            is_past = positions <= new_positions[:, None] - call.window
        is_hidden = torch.cat((is_past, ~sees), dim=1)
        outputs.append(
            attend_over(
                call.queries[heads],
                torch.cat((keys, call.keys[head])),
                torch.cat((values, call.values[head])),
                is_hidden=is_hidden,
                biases=torch.cat((biases, torch.zeros(len(sees)))),
                scaling=call.scaling,
                softcap=call.softcap,
                sink_scores=call.sink_scores[heads] if call.sink_scores is not None else None,
            )
        )
    return torch.cat(outputs)
