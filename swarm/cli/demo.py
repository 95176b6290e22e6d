"""`swarm demo`: the main job on one machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from swarm.cli.failures import FAILURE
from swarm.cli.local_swarm import LocalSwarm, fair_num_threads, split_blocks
from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console, say, write_text

if TYPE_CHECKING:
    from swarm.cli.answering import Answer, AnswerSettings
    from swarm.models import ModelSource

__all__ = ["demo"]

_PROMPT: Final = "What is a swarm of bees? Answer in two sentences."
_SERVE_PORT: Final = 31331


def demo(
    servers: Annotated[
        int, typer.Option("--servers", metavar="N", min=1, help="How many servers share the model.")
    ] = 3,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to ask.")] = _PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="At most this many tokens.")
    ] = 64,
    check: Annotated[
        bool, typer.Option("--check", help="Run the prompt with plain transformers too, and compare the token ids.")
    ] = False,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """See it work on this machine: an entry point and N servers that split the built-in model, and an answer.

    Every part is a process of its own, as it would be on several machines. The first run fetches the model
    (93 MB); the swarm ends with the demo.
    """
    prepare_process(verbose, swarm_level=logging.ERROR)
    with json_only(json):
        from swarm.cli.answering import AnswerSettings, check_prompt

        check_prompt(prompt)
        settings = AnswerSettings(max_new_tokens=max_new_tokens)
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.models import DEMO_MODEL, resolve_model

            source = resolve_model(DEMO_MODEL, report=progress)
        result = _answer_with_own_swarm(source, servers, prompt, settings, is_json=json)
        matches = _matches_local(source, result, settings, num_servers=servers) if check else None
        if json:
            print_json(result.to_json(source.name) | ({} if matches is None else {"matches_local": matches}))
        elif matches is not None:
            say(
                "MATCH: plain transformers gives the same tokens."
                if matches
                else "MISMATCH: plain transformers gives other tokens.",
                style="bold green" if matches else "bold red",
            )
        if not json:
            _say_how_to_go_on(source.name)
        if matches is False:
            raise typer.Exit(FAILURE)


def _answer_with_own_swarm(
    source: ModelSource, num_servers: int, prompt: str, settings: AnswerSettings, *, is_json: bool
) -> Answer:
    """The answer of a swarm that lives only for it."""
    from swarm.cli.answering import answer
    from swarm.cli.generate import summarise

    num_threads = fair_num_threads(num_servers)
    spans = split_blocks(source.num_blocks, num_servers)
    with LocalSwarm(source.name, spans, num_threads=num_threads) as swarm, TerminalProgress() as progress:
        progress.start(f"Starting an entry point and {num_servers} servers", None, "")
        swarm.start()
        import torch

        from swarm.client.remote_model import SwarmModelForCausalLM
        from swarm.models import load_tokenizer

        torch.set_num_threads(num_threads)
        # While the servers load, so does the client.
        tokenizer = load_tokenizer(source.name)
        with SwarmModelForCausalLM.from_pretrained(source.name, initial_peers=[swarm.address]) as model:
            progress.start("Servers online", num_servers, "servers")
            num_shown = 0

            def show(num_online: int) -> None:
                nonlocal num_shown
                progress.advance(num_online - num_shown)
                num_shown = num_online

            online = swarm.wait_until_online(show)
            progress.finish()
            if not is_json:
                say(f"{source.name}: {source.num_blocks} blocks over {num_servers} servers")
                for server in online:
                    say(f"  blocks {server.span!s:>6}  {server.peer_id}  process {server.pid}", style="dim")
                say()
                say(f"> {prompt}", style="bold")
            result = answer(
                model, tokenizer, prompt, settings, on_text=write_text if not is_json else lambda text: None
            )
            if not is_json:
                write_text("\n")
                say()
                say(summarise(result), style="dim")
        return result


def _matches_local(source: ModelSource, result: Answer, settings: AnswerSettings, *, num_servers: int) -> bool:
    """Whether plain transformers, with the whole model in this process, gives the same token ids."""
    with TerminalProgress() as progress:
        progress.start("Running the same prompt with plain transformers", None, "")
        local_ids = generate_locally(source, result.prompt_token_ids, settings, num_servers=num_servers)
    return local_ids == result.token_ids


def generate_locally(
    source: ModelSource, prompt_token_ids: list[int], settings: AnswerSettings, *, num_servers: int
) -> list[int]:
    """New token ids of the model run by transformers alone, in fp32 as the demo's servers do."""
    import torch
    from transformers import AutoModelForCausalLM

    source.ensure_tensors()
    torch.set_num_threads(fair_num_threads(num_servers))
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True)
    input_ids = torch.tensor([prompt_token_ids])
    limit = settings.new_tokens_after(len(prompt_token_ids), source.max_positions)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=limit,
        **settings.generate_arguments(),
    )
    new_ids: list[int] = output[0, len(prompt_token_ids) :].tolist()
    return new_ids


def _say_how_to_go_on(model_name: str) -> None:
    from swarm.discovery.addresses import advertised_host

    address = f"grpc://{advertised_host('0.0.0.0')}:{_SERVE_PORT}"
    console = results_console()
    lines = (
        "",
        "This demo's swarm has ended with it. For one that stays, on this machine:",
        f"  swarm serve {model_name} --new-swarm --port {_SERVE_PORT}",
        "on a second machine in the same network, to share the work:",
        f"  swarm serve {model_name} --join {address}",
        "and on any of them:",
        f"  swarm chat {model_name} --join {address}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
