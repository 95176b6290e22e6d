"""How often company or a lost server changes a greedy answer of compressed sessions (docs/kv-cache.md).

python benchmarks/kv_losses.py [--answers 20] [--tokens 80] [--kv pyramid+gear]

Two servers hold the second half of the demo model. Each prompt is answered twice undisturbed, and once with SIGKILL for
one of the two. A line for each prompt: where answers first differ, and by how much logits do up to there.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swarm.cli.chaos.swarm_under_test import FrailServer, ServersUnderTest
from swarm.cli.local_swarm import LocalSwarm
from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.datatypes import Span
from swarm.models import DEMO_MODEL, load_tokenizer, resolve_model

PROMPT_TOKENS = (60, 120, 250, 500, 900)
HALVES = (Span(start=0, end=13), Span(start=13, end=30))


class AtToken:
    """A streamer that does something once the answer has so many tokens."""

    def __init__(self, token: int, act: Callable[[], None]) -> None:
        self._left = token + 1  # the prompt comes first
        self._act = act

    def put(self, value: torch.Tensor) -> None:
        if self._left == 0:
            self._act()
        self._left -= 1

    def end(self) -> None:
        pass


def answer(model: Any, prompt: torch.Tensor, num_tokens: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [T] and the logits they were chosen by [T, V]."""
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[0, prompt.shape[1] :], torch.cat(output.logits)


def compare(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> str:
    differing = (one[0] != other[0]).nonzero()
    end = int(differing[0]) if len(differing) else len(one[0])
    largest = float((one[1][: end + 1] - other[1][: end + 1]).abs().max())
    return f"{'same' if not len(differing) else f'differ at {end}'}, logits by {largest:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--kv", default="pyramid+gear")
    arguments = parser.parse_args()
    source = resolve_model(DEMO_MODEL)
    tokenizer = load_tokenizer(source.name)
    topics = sorted(name for name, text in pydoc_data.topics.topics.items() if len(text) > 4000)
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalSwarm(source.name, (), num_threads=2) as swarm,
        ServersUnderTest(
            swarm, folder=Path(folder), with_proxies=False, arguments=("--kv", arguments.kv), log_folder=None
        ) as servers,
    ):
        swarm.start()
        for span in (*HALVES, HALVES[1]):
            servers.add(span)
        servers.wait_until_online()
        for number in range(arguments.answers):
            text = pydoc_data.topics.topics[topics[number * len(topics) // arguments.answers]]
            length = PROMPT_TOKENS[number % len(PROMPT_TOKENS)]
            prompt = torch.tensor([tokenizer(text)["input_ids"][:length]])
            killed: list[FrailServer] = []
            with SwarmModelForCausalLM.from_pretrained(source.name, initial_peers=[swarm.address]) as model:
                first = answer(model, prompt, arguments.tokens)
                again = answer(model, prompt, arguments.tokens)
                with model.session(max_length=length + arguments.tokens) as session:

                    def kill_second_hop() -> None:
                        killed.append(servers.find(session.route[1].peer_id))  # noqa: B023
                        killed[0].kill()  # noqa: B023

                    streamer = AtToken(arguments.tokens // 2, kill_second_hop)
                    disturbed = answer(model, prompt, arguments.tokens, session=session, streamer=streamer)
                    lost = session.num_failovers
            print(
                f"{number}: prompt of {length}; again: {compare(first, again)}; "
                f"after {lost} loss: {compare(first, disturbed)}",
                flush=True,
            )
            killed[0].start()
            killed[0].wait_until_online()


if __name__ == "__main__":
    main()
