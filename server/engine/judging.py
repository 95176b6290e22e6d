"""What the tokens of a sequence are worth at an event: looked at again by the newest queries of the input, if any."""

# Letters: L layers of a sequence, Hk KV heads, Hq query heads, P (layer, KV head) pairs at hand, n leaving tokens,
# R rows, w newest queries, D head dimension.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from swarm.kvpolicy.layer_settings import LayerSettings
from swarm.kvpolicy.scorers import attention_received
from swarm.kvpolicy.stacked_codec import StackedCodec
from swarm.kvpolicy.streaming import CompressionEvent
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compressed_store import SUMMARY_SLOT, CompressedStore
from swarm.server.engine.raw_tokens import read_tokens
from swarm.server.engine.stored_rows import StoredRows

__all__ = ["Judge"]


class Judge:
    """Scores tokens of all sequences of a server."""

    def __init__(
        self,
        store: CompressedStore,
        settings: Sequence[LayerSettings],
        scalings: Sequence[float],
        codec: StackedCodec,
    ) -> None:
        """`settings` and `scalings` are those of each of the server's layers."""
        self._store = store
        self._settings = tuple(settings)
        self._scalings = tuple(scalings)
        self._codec = codec
        self._num_heads = store.num_kv_heads

    def rescore(
        self,
        sequence: CompressedSequence,
        event: CompressionEvent,
        layers: npt.NDArray[np.int64],
        stored: StoredRows,
        owners: npt.NDArray[np.int64],
        new_scores: torch.Tensor,
        judges: torch.Tensor | None,
    ) -> torch.Tensor:
        """Scores of stored and leaving tokens [R + P * n] looked at again, in float16's precision as they are stored.

        Those of stored tokens are updated where they stand.
        """
        num_stored = len(stored.owners)
        scores = torch.cat((stored.scores, new_scores.flatten().float()))
        is_new = torch.arange(len(scores), device=scores.device) >= num_stored
        scorer = self._settings[sequence.first_layer + layers[0]].scorer
        if judges is None or not self._settings[sequence.first_layer + layers[0]].judges:
            owners_there = torch.from_numpy(owners).to(scores.device)
            unseen: torch.Tensor = scorer.rescore_unseen(scores, is_new, owners_there).half()
            return unseen.float()
        starts = np.searchsorted(stored.owners, np.arange(len(new_scores) + 1))
        num_new = new_scores.shape[1]
        for index, layer in enumerate(layers.tolist()):
            own = [slice(starts[pair], starts[pair + 1]) for pair in self._pairs_at(index)]
            all_received = self._find_received(sequence, event, layer, [stored.positions[each] for each in own], judges)
            for head, received in enumerate(all_received):
                pair = index * self._num_heads + head
                first = num_stored + pair * num_new
                places = torch.cat(
                    (torch.arange(own[head].start, own[head].stop), torch.arange(first, first + num_new))
                ).to(scores.device)
                absolute = self._settings[sequence.first_layer + layer].layer
                scores[places] = scorer.rescore(absolute, head, scores[places], is_new[places], received)
        scores = scores.half()
        if num_stored and self._store.scores is not None:
            self._store.scores[stored.places] = scores[:num_stored].view(-1, sequence.table.layout.tile_rows)
        return scores.float()

    def _pairs_at(self, index: int) -> range:
        return range(index * self._num_heads, (index + 1) * self._num_heads)

    def _find_received(
        self,
        sequence: CompressedSequence,
        event: CompressionEvent,
        layer: int,
        stored: Sequence[torch.Tensor],
        judges: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Of each KV head, the attention that its candidates get from the newest queries.

        Args:
            stored: of each head, the positions of its rows.
        """
        store, table, sinks = self._store, sequence.table, self._store.policy.num_sinks
        settings = self._settings[sequence.first_layer + layer]
        places = np.concatenate((np.arange(sinks), np.arange(event.first, event.length)))
        keys, _, _ = read_tokens(store, sequence, np.array([layer]), places)
        queries = judges[layer, :, -settings.scorer.query_tokens :].chunk(self._num_heads)
        num_new = event.end - event.first
        received = []
        for head, positions in enumerate(stored):
            parts = [keys[head].float()]
            order = positions.argsort()
            num_held = len(order)
            if num_held:
                rows, _, _ = store.read_head(table, layer, head)
                coded, _ = self._codec.decode(rows[order], (sequence.first_layer + layer) * self._num_heads + head)
                parts.insert(0, coded)
            has_summary = settings.has_summary and table.num_dropped[layer, head] > 0
            if has_summary:
                summary, _, _ = store.read_slots(*store.slot_places(table, np.array([layer]), np.array([SUMMARY_SLOT])))
                parts.insert(0, summary[:, head].float())
            every = torch.cat(parts)
            weights = attention_received(
                queries[head],
                every,
                self._scalings[sequence.first_layer + layer],
                num_before=len(every) - queries[head].shape[1],
            )[int(has_summary) :]
            by_rows = torch.empty_like(weights[:num_held])
            by_rows[order] = weights[:num_held]
            received.append(torch.cat((by_rows, weights[num_held + sinks : num_held + sinks + num_new])))
        return received
