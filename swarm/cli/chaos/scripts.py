"""What sessions do in a test under faults: a catalogue of short conversations, and who plays which. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from swarm.errors import BadInputError

__all__ = ["LOSS_SCRIPT", "SCRIPTS", "Script", "Turn", "check_script_names", "choose_scripts"]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Some text is given, some tokens are generated greedily."""

    text: str
    num_new_tokens: int
    num_taken_back: int = 0
    """Tokens at the end of the history that are forgotten before this turn."""
    pause_s: float = 0.0
    """Idle time before this turn."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """One session."""

    name: str
    turns: tuple[Turn, ...]
    num_beams: int = 1
    """Above 1: beam search, in a session of its own for its one turn."""

    @property
    def num_new_tokens(self) -> int:
        return sum(turn.num_new_tokens for turn in self.turns)


_LONG: Final = (
    "The ferry to the island leaves twice a day, at seven in the morning and at four in the afternoon, unless the wind"
    " is stronger than the captain likes. Passengers bring bread, letters, seeds, and once a year a piano. The baker on"
    " the island has three ovens, of which two work. On Mondays she bakes for the school, on Thursdays for the"
    " lighthouse, and on all other days for whoever comes first. Her brother repairs clocks. He says that a clock which"
    " is wrong twice a day is at least predictable, and that most people who bring him one only want to talk. In winter"
    " the ferry may stay away for a week. Then the islanders count their candles, share their books, and meet in the"
    " school, where somebody tells the story of the piano again, which changes a little every time. Continue the story:"
)

SCRIPTS: Final = (
    Script(name="short", turns=(Turn(text="The three primary colours are", num_new_tokens=24),)),
    Script(name="longer", turns=(Turn(text="Once upon a time a river decided to", num_new_tokens=48),)),
    Script(name="long-prompt", turns=(Turn(text=_LONG, num_new_tokens=16),)),
    Script(
        name="chat",
        turns=(
            Turn(text="Question: what do bees make? Answer:", num_new_tokens=14),
            Turn(text="\nQuestion: and where do they live? Answer:", num_new_tokens=14),
            Turn(text="\nQuestion: why does that matter to us? Answer:", num_new_tokens=14),
        ),
    ),
    Script(
        name="rewind",
        turns=(
            Turn(text="A recipe for soup begins with", num_new_tokens=20),
            Turn(text=" a large onion and", num_new_tokens=14, num_taken_back=9),
            Turn(text=" some salt, because", num_new_tokens=14, num_taken_back=18),
        ),
    ),
    Script(
        name="idle",
        turns=(
            Turn(text="My grandmother kept her keys", num_new_tokens=8),
            Turn(text=" and her letters", num_new_tokens=8, pause_s=6.0),
            Turn(text=" but never her", num_new_tokens=8, pause_s=12.0),
        ),
    ),
    Script(name="beams", turns=(Turn(text="The best way to cross a bridge is", num_new_tokens=16),), num_beams=3),
)

LOSS_SCRIPT: Final = Script(
    name="loss", turns=(Turn(text="In the old harbour, the fishermen used to say that", num_new_tokens=40),)
)
"""For losses at chosen tokens: pages end at several of its positions."""


def choose_scripts(seed: int, client: int, names: tuple[str, ...] = ()) -> Iterator[Script]:
    """The sessions of one client, one after the other and without end; the same for the same arguments.

    Args:
        seed: any number.
        client: which client, from 0.
        names: of scripts to choose from; empty for all. Every client begins at another place of the catalogue, so
            that few clients play many scripts soon.
    """
    known = [script for script in SCRIPTS if not names or script.name in names]
    rng = random.Random(f"scripts {seed} {client}")
    yield known[(seed + client) % len(known)]
    while True:
        yield rng.choice(known)


def check_script_names(text: str) -> tuple[str, ...]:
    """`chat,idle` as names; empty for none. Raises BadInputError, naming those that exist, for one that does not."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    known = [script.name for script in SCRIPTS]
    for name in names:
        if name not in known:
            raise BadInputError(f"there is no script {name!r}; choose from {', '.join(known)}")
    return names
