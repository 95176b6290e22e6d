"""Steps of sessions: judge one, run it on the engine, send its output on, remember it for a retry."""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final

from swarm.errors import BadInputError, LengthLimitError, PeerLostError, SessionStateError, SwarmError
from swarm.pb import session_pb2 as pb
from swarm.server.engine.engine import Engine
from swarm.server.engine.work import StepWork
from swarm.server.rpc.request_checks import HostedModel, check_step_tensor
from swarm.server.rpc.server_session import LastStep, ServerSession
from swarm.server.session_mirror import MirrorState, SequenceStep, Verdict
from swarm.wire.failures import failure_from_error
from swarm.wire.frames import Frame, encode_frame

if TYPE_CHECKING:
    import torch

__all__ = ["StepRunner"]

logger = logging.getLogger(__name__)

_MAX_REPEATS: Final = 8
"""Answers from memory to one step: enough for any retry, and an end to routes that bite their own tail."""


class StepRunner:
    """Runs the steps of all sessions; lives on the event loop."""

    def __init__(self, model: HostedModel, engine: Engine, *, max_steps_under_way: int) -> None:
        self._model = model
        self._engine = engine
        self._max_steps_under_way = max_steps_under_way
        self._tasks: set[asyncio.Task[None]] = set()

    async def take_step(self, session: ServerSession, step: pb.Step, frame: Frame) -> None:
        """Judge a step and hand it to the engine; its output is delivered when it is done.

        A refusal is sent to the client; nothing is raised for it. While the session is held back, so are its steps.
        """
        try:
            num_rows = check_step_tensor(frame, self._model)
            num_held_back = 0 if session.held_back is None else len(session.held_back)
            if session.num_under_way + num_held_back >= self._max_steps_under_way:
                raise BadInputError(f"{self._max_steps_under_way} steps are under way, the most a session may have")
        except BadInputError as error:
            await self._refuse(session, step, error)
            return
        if session.held_back is not None:
            session.held_back.append((step, frame))
        else:
            await self._judge(session, step, frame, num_rows)

    async def _judge(self, session: ServerSession, step: pb.Step, frame: Frame, num_rows: int) -> None:
        sequences = [
            SequenceStep(item.sequence, item.parent, item.start, item.count, item.unfinished) for item in step.sequences
        ]
        try:
            verdict = session.mirror.judge(epoch=step.epoch, step=step.step, sequences=sequences, num_rows=num_rows)
        except SwarmError as error:
            await self._refuse(session, step, error)
            return
        if verdict is Verdict.REPEAT:
            await self._repeat(session, step)
        else:
            self._submit(session, step, sequences, frame.tensor(0))

    async def _refuse(self, session: ServerSession, step: pb.Step, error: SwarmError) -> None:
        if isinstance(error, BadInputError) and not isinstance(error, LengthLimitError):
            self._fail(session)
        await self.send_failure(session, error, step=step.step)

    def _submit(
        self, session: ServerSession, step: pb.Step, sequences: list[SequenceStep], hidden: torch.Tensor
    ) -> None:
        last = session.last = LastStep(header=step, relay=step.relay)
        session.num_under_way += 1
        session.settled.clear()
        loop = asyncio.get_running_loop()
        started_s = time.perf_counter()

        def on_done(output: torch.Tensor | None, error: BaseException | None) -> None:
            last.compute_s = time.perf_counter() - started_s
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(self._step_done, session, last, output, error)

        work = StepWork(
            session=session.key,
            span=session.span,
            sequences=sequences,
            hidden=hidden,
            on_done=on_done,
            adapter=session.adapter,
            compresses=session.compresses,
        )
        session.works[step.step] = work
        self._engine.submit(work)

    def cancel_after(self, session: ServerSession, step: int) -> None:
        """Have the engine drop what it has not finished of later steps than `step`."""
        works = [work for number, work in session.works.items() if number > step]
        if works:
            self._engine.cancel(works)

    # -- holding back --------------------------------------------------------------------------

    async def hold_back(self, session: ServerSession) -> None:
        """Let what is under way finish and be delivered; later steps wait for `go_on` or `refuse_held_back`."""
        session.held_back = deque()
        await session.settled.wait()

    async def go_on(self, session: ServerSession) -> None:
        """Run what was held back, in the order in which it came; later steps run as they come."""
        while session.held_back:
            step, frame = session.held_back.popleft()
            await self._judge(session, step, frame, check_step_tensor(frame, self._model))
        session.held_back = None

    # -- done ----------------------------------------------------------------------------------

    def _fail(self, session: ServerSession) -> None:
        """A failed session can not go on, so what it holds is of no use to anybody."""
        if session.mirror.state is MirrorState.OPEN:
            session.mirror.fail()
            self._engine.forget(session.key)

    def _step_done(
        self, session: ServerSession, last: LastStep, output: torch.Tensor | None, error: BaseException | None
    ) -> None:
        session.works.pop(last.header.step, None)
        if session.mirror.state is MirrorState.CLOSED:
            self._settle_one(session)
        elif error is not None:
            self._fail(session)
            self._settle_one(session)
            self.spawn(self.send_failure(session, error, step=last.header.step))
        else:
            last.output = output
            self.spawn(self._deliver_first(session, last))

    def _settle_one(self, session: ServerSession) -> None:
        session.num_under_way -= 1
        if not session.num_under_way:
            session.settled.set()

    async def _repeat(self, session: ServerSession, step: pb.Step) -> None:
        """Answer from memory; a step still under way is answered when it is done, as now asked."""
        last = session.last
        if last is None or last.header.step != step.step:
            await self.send_failure(
                session, SessionStateError("the step's output is no longer remembered"), step=step.step
            )
            return
        last.num_repeats += 1
        if last.num_repeats > _MAX_REPEATS:
            self._fail(session)
            error = BadInputError(f"step {step.step} was repeated more than {_MAX_REPEATS} times")
            await self.send_failure(session, error, step=step.step)
            return
        last.relay = last.relay or step.relay
        if last.output is not None:
            await self._deliver(session, last)

    async def _deliver_first(self, session: ServerSession, last: LastStep) -> None:
        try:
            await self._deliver(session, last)
        finally:
            self._settle_one(session)

    async def _deliver(self, session: ServerSession, last: LastStep) -> None:
        """Send an output to the next hop, or to the client when this is the last one or the push fails.

        The hop at which a replay ends tells the client so, without the output: nobody needs it.
        """
        assert last.output is not None
        async with session.delivery:
            ends_here = 0 < last.header.replay_end <= session.span.end
            problem = ""
            if session.push is not None and not last.relay and not ends_here:
                try:
                    header = pb.SessionRequest(step=last.header)
                    header.step.session_id = session.session_id
                    await session.push.write(encode_frame(header, [last.output]))
                except PeerLostError as error:
                    problem = str(error)
                else:
                    return
            is_intermediate = session.push is not None and not ends_here
            output = last.output
            if last.header.last_only and not is_intermediate:
                output = _last_rows(output, [item.count for item in last.header.sequences])
            result = pb.StepResult(
                epoch=session.mirror.epoch,
                step=last.header.step,
                relay=is_intermediate,
                push_problem=problem,
                compute_us=int(last.compute_s * 1e6),
            )
            await self.send(session, encode_frame(pb.SessionReply(result=result), [] if ends_here else [output]))

    async def send_failure(self, session: ServerSession, error: BaseException, *, step: int) -> None:
        """Tell the client, if it is there, why a step was not run, or (step 0) why none will be."""
        failure = failure_from_error(error, epoch=session.mirror.epoch, step=step)
        await self.send(session, encode_frame(pb.SessionReply(failure=failure)))

    async def send(self, session: ServerSession, body: bytes) -> None:
        """To the client; one that is absent asks again when it comes back."""
        if session.send is not None:
            await session.send(body)

    # -- tasks ---------------------------------------------------------------------------------

    def spawn(self, work: Awaitable[None]) -> None:
        """Run a delivery as an owned task whose failure is logged."""

        async def run() -> None:
            try:
                await work
            except Exception:
                logger.exception("a delivery failed")

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def shutdown(self) -> None:
        """End all deliveries."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _last_rows(output: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The last row of each sequence that has any: [number of such sequences, H]."""
    ends: list[int] = []
    end = 0
    for count in counts:
        end += count
        if count:
            ends.append(end - 1)
    return output if len(ends) == output.shape[0] else output[ends]
