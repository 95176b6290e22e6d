"""Pages that later sessions may share, found by what went into them. Pure; what comes out of a page is opaque here.

A page's name is a keyed hash over everything its sequence received up to the page's end, so whoever finds a
page has sent its whole content: nobody can read another's state by guessing (RadixAttention and vLLM's
automatic prefix caching share by token ids; a server here never sees any).

A shared page must also answer what its tokens' outputs were, because the next hop needs them: an entry keeps
them. A failover's replay is answered from here as well.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["PrefixEntry", "PrefixIndex", "PrefixTrail"]

Output = TypeVar("Output")
Digest = bytes
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class PrefixEntry(Generic[Output]):
    """One page per layer, full, and the outputs of its tokens."""

    pages: Sequence[int]
    outputs: Output
    size_bytes: int
    """Memory of `outputs`."""


class PrefixIndex(Generic[Output]):
    """Entries by digest, least recently used first."""

    def __init__(self, *, max_bytes: int) -> None:
        """`max_bytes` bounds the memory of the outputs; the pages count as KV memory."""
        self._max_bytes = max_bytes
        self._key = os.urandom(32)
        self._entries: OrderedDict[Digest, PrefixEntry[Output]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PrefixEntry[Output]]:
        return iter(self._entries.values())

    def root(self, name: str) -> Digest:
        """The digest before the first page of a sequence that runs the blocks, and the adapter, called `name`."""
        return hashlib.blake2b(name.encode(), key=self._key, digest_size=_DIGEST_BYTES).digest()

    def extend(self, digest: Digest, content: bytes) -> Digest:
        """The digest after one more page of `content`."""
        return hashlib.blake2b(digest + content, key=self._key, digest_size=_DIGEST_BYTES).digest()

    def find(self, digest: Digest) -> PrefixEntry[Output] | None:
        """The entry of a page, if it is here."""
        return self._entries.get(digest)

    def touch(self, digests: Sequence[Digest]) -> None:
        """A sequence used these pages: its last page becomes older than its first, for it goes first."""
        for digest in reversed(digests):
            if digest in self._entries:
                self._entries.move_to_end(digest)

    def insert(self, digest: Digest, entry: PrefixEntry[Output]) -> None:
        """Add a page that is not here yet; `touch` its sequence and `trim` afterwards."""
        if digest in self._entries:
            raise ValueError("the page is in the index already")
        self._entries[digest] = entry
        self.size_bytes += entry.size_bytes

    def trim(self) -> list[PrefixEntry[Output]]:
        """Remove what has to go to keep within the memory, least recently used first."""
        evicted: list[PrefixEntry[Output]] = []
        while self.size_bytes > self._max_bytes:
            evicted.append(self._pop(next(iter(self._entries))))
        return evicted

    def evict(self, num_pages: int, is_evictable: Callable[[PrefixEntry[Output]], bool]) -> list[PrefixEntry[Output]]:
        """Remove the least recently used entries that are evictable, until they had `num_pages` in all."""
        chosen: list[Digest] = []
        for digest, entry in self._entries.items():
            if num_pages <= 0:
                break
            if is_evictable(entry):
                chosen.append(digest)
                num_pages -= len(entry.pages)
        return [self._pop(digest) for digest in chosen]

    def _pop(self, digest: Digest) -> PrefixEntry[Output]:
        entry = self._entries.pop(digest)
        self.size_bytes -= entry.size_bytes
        return entry


class PrefixTrail(Generic[Output]):
    """Digests of a sequence's full pages, and what the page under way has received and answered so far."""

    def __init__(self, root: Digest, *, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._digests: list[Digest] = [root]
        self._contents: list[bytes] = []
        """Content of each token of the page under way."""
        self._outputs: list[Output] = []
        self.is_broken = False
        """After a rewind into a page whose content is gone; such a sequence shares nothing before another rewind."""

    @property
    def length(self) -> int:
        """Positions followed; all of the sequence unless the trail is broken."""
        return (len(self._digests) - 1) * self._page_tokens + len(self._contents)

    @property
    def last(self) -> Digest:
        """Digest after the last full page."""
        return self._digests[-1]

    @property
    def digests(self) -> Sequence[Digest]:
        """Digests of the full pages, first page first."""
        return self._digests[1:]

    def copy(self) -> PrefixTrail[Output]:
        """An independent trail of the same tokens."""
        twin: PrefixTrail[Output] = PrefixTrail(self._digests[0], page_tokens=self._page_tokens)
        twin._digests = list(self._digests)
        twin._contents = list(self._contents)
        twin._outputs = list(self._outputs)
        twin.is_broken = self.is_broken
        return twin

    def rewind(self, length: int) -> None:
        """Forget positions from `length` on."""
        if length > self.length or (length == self.length and not self.is_broken):
            return
        num_full, num_left = divmod(length, self._page_tokens)
        if num_full == len(self._digests) - 1 and not self.is_broken:
            del self._contents[num_left:], self._outputs[num_left:]
            return
        del self._digests[num_full + 1 :]
        self._contents.clear()
        self._outputs.clear()
        self.is_broken = num_left > 0

    def give_up(self) -> None:
        """The sequence went on in a way that was not followed."""
        self._contents.clear()
        self._outputs.clear()
        self.is_broken = True

    def skip_page(self, digest: Digest) -> None:
        """A whole page was taken from the index."""
        if self._contents or self.is_broken:
            raise ValueError("pages can be skipped only at a page's start")
        self._digests.append(digest)

    def append(self, content: bytes, output: Output) -> tuple[bytes, list[Output]] | None:
        """One more token. When it fills its page: the page's content and outputs, to be indexed."""
        self._contents.append(content)
        self._outputs.append(output)
        if len(self._contents) < self._page_tokens:
            return None
        page = (b"".join(self._contents), self._outputs)
        self._contents, self._outputs = [], []
        return page

    def close_page(self, digest: Digest) -> None:
        """The page that `append` returned has this digest."""
        self._digests.append(digest)
