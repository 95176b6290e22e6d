"""The life of a server: join, choose blocks, load, announce, serve, move, drain, leave."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from swarm.datatypes import ServerInfo, ServerState, Span
from swarm.errors import BadInputError, FinalError
from swarm.server.draining import drain
from swarm.server.hosting import Hosting, free_memory, load_hosting
from swarm.server.moving import MayLeave, MoveOutcome, Mover, choose_with_others
from swarm.server.node_config import NodeConfig
from swarm.server.preparing import Workplace, find_workplace
from swarm.server.presence import Presence, announced_address, describe_joining, join_dht
from swarm.server.rpc.service import NodeService

if TYPE_CHECKING:
    from collections.abc import Callable

    from swarm.discovery.registry import Registry
    from swarm.identity import Identity
    from swarm.models import ModelSource
    from swarm.models.progress import ProgressReporter
    from swarm.routing.rebalancing import Move
    from swarm.server.engine.engine import Engine
    from swarm.server.rpc.sessions import SessionTable

__all__ = ["Node", "NodeConfig"]

logger = logging.getLogger(__name__)


class Node:
    """One server. `start`, then `wait_until_left` after `drain` or `leave`."""

    def __init__(
        self, source: ModelSource, identity: Identity, config: NodeConfig, *, registry: Registry | None = None
    ) -> None:
        """Without `registry` the server joins the DHT named by the config; tests pass one in memory."""
        self._source = source
        self._identity = identity
        self._config = config
        self._info: ServerInfo | None = None
        self._registry = registry
        self._hosting: Hosting | None = None
        self._workplace: Workplace | None = None
        self._num_fitting = source.num_blocks
        """The most blocks it may hold when its operator has not said."""
        self._service: NodeService | None = None
        self._moving: asyncio.Task[None] | None = None
        self._failure: FinalError | None = None
        self._has_failed = asyncio.Event()
        self.why = "its operator says so"
        """Why it began with the blocks it did, as half a sentence."""
        self.on_moved: Callable[[Span, Move], None] = lambda left, move: None
        """Told after each move which blocks were left, and what for."""
        self._presence: Presence | None = None
        self._is_leaving = asyncio.Event()

    @property
    def info(self) -> ServerInfo:
        """What this server announces now. Raises RuntimeError before start."""
        if self._info is None:
            raise RuntimeError("the server has not started")
        if self._hosting is None or self._info.state is ServerState.JOINING:
            return self._info  # it has no totals yet that free tokens could be a part of
        sessions, engine = self._hosting.sessions, self._hosting.engine
        return replace(self._info, num_sessions=sessions.num_sessions, kv_tokens_free=engine.num_tokens_free)

    @property
    def _sessions(self) -> SessionTable | None:
        return self._hosting.sessions if self._hosting is not None else None

    @property
    def _engine(self) -> Engine | None:
        return self._hosting.engine if self._hosting is not None else None

    @property
    def plan(self) -> str:
        """What was put where, in one sentence; empty before blocks are loaded."""
        return self._hosting.plan if self._hosting is not None else ""

    @property
    def kv_note(self) -> str:
        """What its operator should know about the KV policy, in one sentence; mostly empty."""
        return self._hosting.kv_note if self._hosting is not None else ""

    @property
    def weights_reason(self) -> str:
        """Why weights have the precision they have; empty when its operator said so."""
        return self._workplace.reason if self._workplace is not None else ""

    def join_addresses(self) -> list[str]:
        """What others pass to --join, DHT addresses first."""
        addresses = self._registry.join_addresses() if self._registry is not None else []
        return [*addresses, *(f"grpc://{address}" for address in (self._info.addresses if self._info else ()))]

    async def start(self, report: ProgressReporter | None = None) -> None:
        """Join the swarm, load and check the blocks, and announce them. On failure nothing stays behind."""
        try:
            await self._start(report)
        except BaseException:
            await self.leave()
            raise

    async def _start(self, report: ProgressReporter | None) -> None:
        config = self._config
        self._check_asked_blocks()
        self._workplace = await asyncio.to_thread(find_workplace, self._source, config)
        if config.span is None and config.num_blocks is None:
            self._num_fitting = await asyncio.to_thread(self._workplace.count_fitting, self._source, config)
        self._is_first = self._registry is None and not config.join
        if self._registry is None:
            self._registry = await join_dht(self._identity, config)
        self._info = describe_joining(self._source, config, peer_id=self._identity.peer_id)
        self._presence = Presence(self._registry, lambda: self.info, period_s=config.announce_period_s)
        await self._choose_blocks()
        self._service = self._new_service()
        # Before loading: a port that is taken is better known at once.
        port = await self._service.start(config.host, config.port)
        self._info = replace(self._info, addresses=[announced_address(config, port=port)])
        self._host(await self._load(self._info.span, report))
        await self._presence.announce()
        if config.moves:
            self._moving = asyncio.create_task(self._move_forever(), name="move")

    async def _choose_blocks(self) -> None:
        """Settle on the blocks and announce them before they are loaded, so that others who start choose others."""
        config, source = self._config, self._source
        if config.span is not None:
            await self.announce_span(config.span, is_choosing=False)
            return
        # The first of a new swarm has nobody to wait for.
        settle_s = 0.0 if self._is_first else config.settle_s
        chosen = await choose_with_others(
            self, self._room, source.num_blocks, least=self._config.num_blocks or 1, settle_s=settle_s
        )
        self.why = chosen.why

    @property
    def _room(self) -> int:
        """The most blocks to hold."""
        return self._config.num_blocks or self._num_fitting

    async def _load(self, span: Span, report: ProgressReporter | None = None) -> Hosting:
        assert self._workplace is not None
        return await load_hosting(
            self._source, span, self._config, self._workplace, peer_id=self._identity.peer_id, report=report
        )

    def _new_service(self) -> NodeService:
        from swarm.discovery import CachedRegistry
        from swarm.discovery.lookup_service import answer_lookup

        assert self._registry is not None
        registry = CachedRegistry(self._registry)  # anyone may ask, and each look-up reads many keys

        async def lookup(request: bytes) -> bytes:
            return await answer_lookup(registry, request)

        return NodeService(describe=lambda: self.info, answer_lookup=lookup, join_addresses=self.join_addresses)

    def _host(self, hosting: Hosting) -> None:
        """Serve what has been loaded."""
        assert self._info is not None
        assert self._service is not None
        self._hosting = hosting
        hosting.on_broken = self._fail
        self._service.host(hosting)
        self._info = replace(
            self._info,
            span=hosting.span,
            state=ServerState.ONLINE,
            weights=hosting.weights,
            kv_policy=hosting.model.kv_policy,
            kv_tokens_free=hosting.engine.num_tokens_free,
            kv_tokens_total=hosting.engine.num_tokens_total,
            tokens_per_s=hosting.tokens_per_s,
            moving_to=None,
            adapters=hosting.model.adapters,
        )

    def _check_asked_blocks(self) -> None:
        """Refuse blocks that the model does not have, before anybody is asked for anything."""
        config, source = self._config, self._source
        if config.span is not None and config.span.end > source.num_blocks:
            raise BadInputError(
                f"blocks {config.span} are outside {source.name}, which has blocks 0:{source.num_blocks}"
            )
        if config.num_blocks is not None and not 1 <= config.num_blocks <= source.num_blocks:
            raise BadInputError(f"--num-blocks {config.num_blocks} is outside 1..{source.num_blocks} of {source.name}")

    # -- moving ------------------------------------------------------------------------------------

    async def look_up(self) -> list[ServerInfo]:
        """See Movable."""
        assert self._registry is not None
        return await self._registry.lookup(self._source.model_hash, self._source.num_blocks)

    async def announce_span(self, span: Span, *, is_choosing: bool) -> None:
        """See Movable."""
        await self._announce_as(replace(self.info, span=span, is_choosing=is_choosing))
        assert self._presence is not None
        self._presence.keep_announcing()  # choosing takes several looks, and a record lives for two periods

    async def announce_wish(self, wish: Span | None) -> None:
        """See Movable."""
        await self._announce_as(replace(self.info, moving_to=wish))

    async def _announce_as(self, info: ServerInfo) -> None:
        assert self._presence is not None
        self._info = info
        await self._presence.announce()

    def _announce_soon(self, info: ServerInfo) -> None:
        assert self._presence is not None
        self._info = info
        self._presence.announce_soon()

    async def _move_forever(self) -> None:
        config = self._config
        mover = Mover(
            self,
            room=self._room,
            least=config.num_blocks or 1,
            period_s=config.rebalance_period_s,
            announce_period_s=config.announce_period_s,
            on_moved=lambda left, move: self.on_moved(left, move),
        )
        try:
            await mover.run()
        except FinalError as error:
            self._fail(error)
        except Exception:  # a bug of ours; the blocks are served as before
            logger.exception("this server does not move any more")

    def _fail(self, error: FinalError) -> None:
        """This server can not go on; whoever runs it is told."""
        self._failure = error
        self._has_failed.set()

    async def change_blocks(self, span: Span, may_leave: MayLeave) -> MoveOutcome:
        """See Movable. Raises FinalError when neither the new blocks nor the old ones could be loaded."""
        hosting = self._hosting
        assert hosting is not None
        stays = replace(self.info, moving_to=None)
        try:
            self._announce_soon(replace(stays, state=ServerState.DRAINING, moving_to=span))
            await self._empty(hosting)
            is_free = await may_leave()
        except Exception:
            hosting.sessions.stop_draining()
            self._announce_soon(stays)
            raise
        if not is_free:
            hosting.sessions.stop_draining()
            self._announce_soon(stays)
            return MoveOutcome.STAYED
        del hosting  # the last but one reference to weights and pages, which must be gone before others are loaded
        return await self._reload(stays, span)

    async def _reload(self, stays: ServerInfo, span: Span) -> MoveOutcome:
        """Load other blocks in place of those of `stays`, or these again if that fails."""
        problems: list[str] = []
        await self._unload()
        for target in (span, stays.span):
            # What others may expect of it there, until it has measured itself.
            tokens_per_s = stays.tokens_per_s * len(stays.span) / len(target)
            self._announce_soon(
                replace(
                    stays,
                    state=ServerState.JOINING,
                    span=target,
                    moving_to=target,
                    tokens_per_s=tokens_per_s,
                    kv_tokens_free=0,
                    kv_tokens_total=0,
                    num_sessions=0,
                )
            )
            try:
                self._host(await self._load(target))
            except Exception as error:  # whatever it is, the blocks left are still there to go back to
                logger.warning("could not load blocks %s: %s", target, error)
                problems.append(f"blocks {target}: {error}")
            else:
                self._announce_soon(self.info)
                return MoveOutcome.MOVED if target == span else MoveOutcome.WENT_BACK
        raise FinalError(
            f"this server could load neither its new blocks nor the old ones again ({'; '.join(problems)})"
        )

    async def _unload(self) -> None:
        assert self._service is not None
        assert self._hosting is not None
        await self._hosting.sessions.shutdown()
        await self._service.unhost()
        await self._hosting.close()
        self._hosting = None
        await asyncio.to_thread(free_memory)

    @property
    def is_loading(self) -> bool:
        """Whether it serves nothing yet, or is between two spans; a thread may then be busy for minutes more."""
        return self._hosting is None

    async def wait_until_failed(self) -> FinalError:
        """Returns when the server serves nothing any more and can not help itself; then it is to be left."""
        await self._has_failed.wait()
        assert self._failure is not None
        return self._failure

    # -- leaving -----------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Take no new sessions, let those that are open finish until the deadline, then leave."""
        await self._stop_moving()
        if self._hosting is not None and self._info is not None and not self._is_leaving.is_set():
            self._announce_soon(replace(self._info, state=ServerState.DRAINING, moving_to=None))
            await self._empty(self._hosting)
        if not self._is_leaving.is_set():
            await self.leave()

    async def _empty(self, hosting: Hosting) -> None:
        """Take no new sessions, hand over those that others can take; until none is left, or the deadline."""
        draining = asyncio.create_task(
            drain(hosting, self.look_up, own=self.info, timeout_s=self._config.drain_timeout_s), name="drain"
        )
        leaving = asyncio.create_task(self._is_leaving.wait(), name="leaving")
        try:
            await asyncio.wait({draining, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if draining.done() and (error := draining.exception()) is not None:
                logger.error("draining failed; sessions that are left are closed", exc_info=error)
        finally:
            draining.cancel()
            leaving.cancel()
            await asyncio.gather(draining, leaving, return_exceptions=True)

    async def _stop_moving(self) -> None:
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)

    async def leave(self) -> None:
        """Stop serving at once and withdraw; harmless when repeated."""
        if self._is_leaving.is_set():
            return
        self._is_leaving.set()
        await self._stop_moving()
        if self._presence is not None and self._info is not None:
            await self._presence.end()
            self._info = replace(self._info, state=ServerState.OFFLINE, moving_to=None)
            await self._presence.withdraw()
        if self._hosting is not None:
            await self._hosting.sessions.shutdown()
        if self._service is not None:
            await self._service.stop()
        if self._hosting is not None:
            await self._hosting.close()
        if self._registry is not None:
            await self._registry.close()
