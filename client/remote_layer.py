"""The one layer a remote model has: it stands in the place of all blocks and hands hidden states to the swarm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swarm.client.block_pass import current_pass
from swarm.errors import BadInputError

__all__ = ["RemoteLayer"]


class RemoteLayer(nn.Module):
    """Runs the pass that the model has set up; called by transformers in the place of a decoder layer."""

    def __init__(self, layer_type: type[nn.Module], returns_tuple: bool) -> None:
        """
        Args:
            layer_type: class of the layers it replaces.
            returns_tuple: whether those return a tuple that begins with the hidden states.
        """
        super().__init__()
        self.replaces = layer_type.__name__
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        """[B, T, H] to [B, T, H]; masks, positions and caches of transformers are not looked at.

        Raises:
            BadInputError: called by way of an inner module instead of the model itself.
        """
        block_pass = current_pass.get()
        if block_pass is None:
            raise BadInputError(
                "call the model itself: its inner modules do not know which tokens to send to the swarm"
            )
        output = block_pass.run(hidden_states)
        return (output,) if self.returns_tuple else output

    def extra_repr(self) -> str:
        return f"in place of {self.replaces}"
