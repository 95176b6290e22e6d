"""How a server that leaves gets rid of its sessions: successors take them over, or they finish in time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from swarm.datatypes import ServerInfo, ServerState, Span
from swarm.errors import SwarmError
from swarm.kvpolicy.settings import FULL_CACHE
from swarm.server.rpc.handing_over import HandoverSender

if TYPE_CHECKING:
    from swarm.server.hosting import Hosting
    from swarm.server.rpc.server_session import ServerSession
    from swarm.server.rpc.session_claims import KVSizes
    from swarm.server.rpc.sessions import SessionTable

__all__ = ["choose_successors", "drain"]

logger = logging.getLogger(__name__)

_MAX_SUCCESSORS: Final = 4
"""Servers asked for one session before it is looked who else there is."""
_POLL_S: Final = 0.1
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 4.0
_FAREWELL_S: Final = 2.0
"""How long clients that were told where their sessions are get to hang up."""

FindServers = Callable[[], Awaitable[Sequence[ServerInfo]]]


def choose_successors(
    servers: Sequence[ServerInfo],
    own: ServerInfo,
    span: Span,
    *,
    num_tokens: int,
    kv_policy: str = FULL_CACHE.preset,
    sizes: KVSizes | None = None,
) -> list[ServerInfo]:
    """Servers that could go on with a session of these blocks, which holds `num_tokens`.

    Those of our own KV policy come first, then those that stay where they are, and of them those with most room.

    Args:
        kv_policy: preset that the session is kept by; one that is kept exactly can go to servers of any policy, though
            some will refuse it because their pages are of another size.
        sizes: of our own memory, by which room that others of our policy announce is told for such a session.
    """
    is_exact = kv_policy == FULL_CACHE.preset

    def room(server: ServerInfo) -> int:
        if sizes is None or server.kv_policy != own.kv_policy:
            return server.kv_tokens_free
        return sizes.convert_tokens(server.kv_tokens_free, compresses=not is_exact)

    able = [
        server
        for server in servers
        if server.peer_id != own.peer_id
        and server.state is ServerState.ONLINE
        and server.model_hash == own.model_hash
        and server.weights == own.weights
        and (is_exact or server.kv_policy == kv_policy)
        and server.span.contains_span(span)
        and room(server) >= num_tokens
        and server.addresses
    ]
    return sorted(
        able,
        key=lambda server: (
            server.kv_policy != own.kv_policy,
            server.moving_to is not None,
            -server.kv_tokens_free,
            server.peer_id,
        ),
    )[:_MAX_SUCCESSORS]


async def drain(hosting: Hosting, find_servers: FindServers, *, own: ServerInfo, timeout_s: float) -> int:
    """Let nobody in, and return when no session is left or the time is over; says how many are left.

    Sessions go to servers that `find_servers` names and `choose_successors` likes; who has none is served until it
    ends or somebody is found. To be cancelled when the server is to leave at once: nothing is half moved then.
    """
    sessions = hosting.sessions
    sender = HandoverSender(hosting.model, hosting.engine, sessions)
    sessions.start_draining()
    try:
        async with asyncio.timeout(timeout_s):
            await _hand_over_all(sessions, sender, find_servers, own)
    except TimeoutError:
        logger.warning("%d sessions are left at the end of draining", sessions.num_sessions)
    finally:
        await sender.close()
    farewell_s = time.monotonic() + min(_FAREWELL_S, timeout_s)
    while sessions.moves.num_farewells and time.monotonic() < farewell_s:
        await asyncio.sleep(_POLL_S)
    return sessions.num_sessions


async def _hand_over_all(
    sessions: SessionTable, sender: HandoverSender, find_servers: FindServers, own: ServerInfo
) -> None:
    """Look for successors again and again, until no session is left."""
    under_way: dict[ServerSession, asyncio.Task[None]] = {}
    tried: set[ServerSession] = set()
    pause_s = _FIRST_PAUSE_S
    try:
        while True:
            await sessions.close_dead()
            under_way = {session: task for session, task in under_way.items() if not task.done()}
            # Nobody took them, and nobody waits for them.
            await sessions.close_absent(tried - under_way.keys())
            if not sessions.num_sessions:
                return
            servers = await _find(find_servers)
            for session in sessions.open_sessions():
                successors = choose_successors(
                    servers,
                    own,
                    session.span,
                    num_tokens=session.mirror.num_positions,
                    kv_policy=session.mirror.policy.preset,
                    sizes=sessions.sizes,
                )
                if session not in under_way and successors:
                    under_way[session] = asyncio.create_task(_hand_over(session, successors, sender))
            tried.update(sessions.open_sessions())
            next_round_s = time.monotonic() + pause_s
            while sessions.num_sessions and time.monotonic() < next_round_s:
                await asyncio.sleep(_POLL_S)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    finally:
        for task in under_way.values():
            task.cancel()
        await asyncio.gather(*under_way.values(), return_exceptions=True)


async def _find(find_servers: FindServers) -> Sequence[ServerInfo]:
    try:
        return await find_servers()
    except Exception as error:  # the next round asks again; the sessions go on meanwhile
        logger.warning("could not look for successors: %s", error)
        return ()


async def _hand_over(session: ServerSession, successors: Sequence[ServerInfo], sender: HandoverSender) -> None:
    """Offer a session to one after the other, until one takes it."""
    for successor in successors:
        if session.is_over:
            return
        try:
            await sender.hand_over(session, successor)
            return
        except SwarmError as error:
            logger.info("%s does not take over session %s: %s", successor.peer_id[-8:], session.name, error)
        except Exception:
            logger.exception("session %s could not be handed over", session.name)
