"""Opens a model of a swarm with its tokenizer, as generate and chat need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.cli.progress import TerminalProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarm.client.remote_model import SwarmModelForCausalLM

__all__ = ["check_join_addresses", "open_client"]


def check_join_addresses(join: Sequence[str]) -> None:
    """Refuse addresses that are none before anything slow begins. Raises BadInputError."""
    from swarm.discovery.addresses import parse_join_address

    for address in join:
        parse_join_address(address)


def open_client(
    model_name: str,
    join: Sequence[str],
    *,
    wait_timeout_s: float,
    adapter: str | None = None,
    precision: str | None = None,
    kv_policy: str | None = None,
) -> tuple[SwarmModelForCausalLM, PreTrainedTokenizerBase]:
    """The model and its tokenizer; close the model when done.

    Args:
        wait_timeout_s: how long to wait for blocks that nobody serves yet.
        adapter: name of a LoRA adapter to use; None: the model as it is.
        precision: of the servers' weights at least; None: any.
        kv_policy: under which servers are to keep the session's cache; None: as each does by itself.

    Raises: as `SwarmModelForCausalLM.from_pretrained`.
    """
    check_join_addresses(join)
    with TerminalProgress() as progress:
        progress.start("Loading libraries", None, "")
        from swarm.client.remote_model import SwarmModelForCausalLM
        from swarm.models import load_tokenizer

        progress.start(f"Opening {model_name}", None, "")
        model = SwarmModelForCausalLM.from_pretrained(
            model_name,
            initial_peers=list(join),
            report=progress,
            no_route_wait_s=wait_timeout_s,
            adapter=adapter,
            precision=precision,
            kv_policy=kv_policy,
        )
        try:
            return model, load_tokenizer(model_name)
        except BaseException:
            model.close()
            raise
