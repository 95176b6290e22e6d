"""What a session holds in the engine's memory: its sequences, all exact or all compressed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from swarm.kvcache.page_table import PageTable, pages_for
from swarm.server.engine.sequence_pages import HeldPages, SequencePages

if TYPE_CHECKING:
    from swarm.datatypes import AdapterHash, Span
    from swarm.server.engine.compressed_sequence import CompressedSequence
    from swarm.server.engine.prefix_sharing import Trail
    from swarm.server.engine.spilling import SpilledPages
    from swarm.server.engine.work import SessionKey

__all__ = ["HeldSequence", "HeldSession", "PlainSequence"]


class HeldSequence(Protocol):
    """What exact and compressed sequences have in common."""

    @property
    def length(self) -> int:
        """Positions held; 0 while the pages are in host memory."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""

    def owned_pages(self) -> npt.NDArray[np.int64]:
        """All of them."""

    def filled_pages(self) -> npt.NDArray[np.int64]:
        """Those that hold something of the sequence."""

    def fork_pages_wanted(self, length: int) -> int:
        """Pages that a fork at `length` takes at once."""

    def can_rewind(self, start: int) -> bool:
        """Whether the sequence can go on from an earlier position as if it had never been further."""

    def rewind(self, start: int) -> None:
        """Forget positions from `start` on."""

    def free(self) -> None:
        """Give all pages back; the sequence is empty then."""

    def drop_reserve(self) -> None:
        """Give back pages that were taken in reserve for the step at hand."""

    def take_out(self) -> HeldPages:
        """Give all pages back as their contents are saved elsewhere; returns what `put_back` needs."""

    def put_back(self, held: HeldPages) -> None:
        """Undo `take_out`, on pages that others hold too; those without contents are taken from the pool."""


class PlainSequence:
    """An exact sequence: pages, and the trail by which others may find them."""

    def __init__(self, table: PageTable, trail: Trail, *, page_tokens: int) -> None:
        self.table = table
        self.trail = trail
        self._page_tokens = page_tokens

    @property
    def length(self) -> int:
        """As HeldSequence says."""
        return self.table.length

    @property
    def num_pages(self) -> int:
        """As HeldSequence says."""
        return self.table.num_pages * self.table.num_layers

    def owned_pages(self) -> npt.NDArray[np.int64]:
        """As HeldSequence says."""
        return self.table.owned_pages()

    def filled_pages(self) -> npt.NDArray[np.int64]:
        """All of them."""
        return self.table.owned_pages()

    def fork_pages_wanted(self, length: int) -> int:
        """None: all are shared until one side writes."""
        return 0

    def can_rewind(self, start: int) -> bool:
        """Always."""
        return start <= self.table.length

    def rewind(self, start: int) -> None:
        """As HeldSequence says."""
        self.table.rewind(start)
        self.trail.rewind(start)

    def fork(self, length: int) -> PlainSequence:
        """Another sequence that holds the same first `length` positions."""
        trail = self.trail.copy()
        trail.rewind(length)
        return PlainSequence(self.table.fork(length), trail, page_tokens=self._page_tokens)

    def free(self) -> None:
        """As HeldSequence says."""
        self.table.free()

    def drop_reserve(self) -> None:
        """There is none."""

    def take_out(self) -> SequencePages:
        """As HeldSequence says."""
        held = SequencePages(self.table.length, self.table.pages.copy())
        self.table.free()
        return held

    def put_back(self, held: HeldPages) -> None:
        """As HeldSequence says."""
        assert isinstance(held, SequencePages)
        self.table.adopt(held.pages, held.length)

    def pages_up_to(self, length: int, held: HeldPages | None) -> SequencePages:
        """Where the first `length` positions are; `held` is where all are, when that is elsewhere."""
        assert held is None or isinstance(held, SequencePages)
        pages = self.table.pages if held is None else held.pages
        return SequencePages(length, pages[:, : pages_for(length, self._page_tokens)].copy())


@dataclass
class HeldSession:
    """One session at one epoch."""

    key: SessionKey
    span: Span
    number: int
    """Rises with every session: who came first makes room last."""
    adapter: AdapterHash
    """What it computes with besides the blocks: its pages are of no use to sessions with another one."""
    compresses: bool = False
    """Whether its sequences are held under the server's policy."""
    sequences: dict[int, PlainSequence | CompressedSequence] = field(default_factory=dict)
    last_used_s: float = 0.0
    has_forked: bool = False
    """The forks of the step at hand are made; it waits for room."""
    spilled: SpilledPages | None = None
    """What the sequences hold while the session is in host memory; they are empty then."""

    @property
    def tables(self) -> dict[int, PageTable]:
        """Of exact sequences."""
        return {number: held.table for number, held in self.sequences.items() if isinstance(held, PlainSequence)}

    @property
    def holds_pages(self) -> bool:
        return any(held.num_pages for held in self.sequences.values())
