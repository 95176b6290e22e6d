"""`swarm generate`: one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.options import (
    AdapterOption,
    JoinOption,
    JsonOption,
    ModelArgument,
    PolicyOption,
    PrecisionOption,
    VerboseOption,
    WaitTimeoutOption,
)
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, say, write_text

if TYPE_CHECKING:
    from swarm.cli.answering import Answer

__all__ = ["generate", "summarise"]


def generate(
    model: ModelArgument,
    join: JoinOption,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to ask.", show_default=False)],
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="At most this many tokens.", show_default="256"),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token; above, samples."),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="Makes sampling repeatable.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed the prompt as it is, without the chat template.")] = False,
    adapter: AdapterOption = None,
    precision: PrecisionOption = None,
    kv: PolicyOption = None,
    wait_timeout: WaitTimeoutOption = 30.0,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Ask a swarm for one answer, and show it as it comes.

    The prompt becomes a user's message in the model's chat template where there is one (see --raw).
    """
    prepare_process(verbose)
    with json_only(json):
        from swarm.cli.answering import AnswerSettings, answer
        from swarm.cli.open_client import open_client

        settings = AnswerSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        remote, tokenizer = open_client(
            model, join, wait_timeout_s=wait_timeout, adapter=adapter, precision=precision, kv_policy=kv
        )
        with remote:
            result = answer(
                remote, tokenizer, prompt, settings, is_raw=raw, on_text=write_text if not json else lambda text: None
            )
        if json:
            print_json(result.to_json(model))
            return
        write_text("\n")
        say(summarise(result), style="dim")


def summarise(result: Answer) -> str:
    """One line about an answer: how much, how fast, along which route."""
    route = " → ".join(f"{hop.peer_id[-6:]} [{hop.span}]" for hop in result.route)
    replaced = f", {result.num_failovers} servers replaced" if result.num_failovers else ""
    return (
        f"{len(result.token_ids)} tokens, the first after {result.seconds_to_first_token:.2f} s,"
        f" then {result.tokens_per_s:.1f} tokens/s along {route}{replaced}"
    )
