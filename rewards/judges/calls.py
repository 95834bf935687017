"""One call from its turn to its outcome: a server is chosen, asked, and asked again; used from one event loop only."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.judges.counters import Counters
from rewards.judges.faults import REFUSED_ALONE, Fault, JudgeConfigurationError, check_completion
from rewards.judges.servers import Server, asked_wait, choose
from rewards.judges.settings import ClientSettings
from rewards.judges.transport import Transport
from rewards.names import nearest

Body = Mapping[str, Any]
COMPLETIONS = "/chat/completions"
_LOOK_AGAIN_SECONDS = 0.05
"""How often a call looks for a server while all of them rest."""


@dataclass(frozen=True)
class Outcome:
    """How one call ended.

    Attributes:
        answer: the server's answer; None: there is none.
        reason: why there is none; empty otherwise.
        attempts: how often it was tried.
        url: the server that answered.
    """

    answer: Body | None
    reason: str = ""
    attempts: int = 0
    url: str = ""


@dataclass
class Trail:
    """What has become of a call so far, still known when its deadline cuts it off."""

    number: int
    most_attempts: int
    deadline: float = math.inf
    attempts: int = 0
    url: str = ""
    fault: Fault | None = None


class Calls:
    """The loop's side of :class:`rewards.judges.client.JudgeClient`.

    Args:
        servers: whom to ask.
        transport: how.
        settings: how often, and for how long.
        counters: what is counted.
    """

    def __init__(
        self, servers: Sequence[Server], transport: Transport, settings: ClientSettings, counters: Counters
    ) -> None:
        self._servers = servers
        self._transport = transport
        self._settings = settings
        self._counters = counters
        self._gate = asyncio.Semaphore(settings.max_in_flight)
        # Of bodies, as many again lie ready: a server that has answered must not wait for the next image's encoding.
        self._desk = asyncio.Semaphore(2 * settings.max_in_flight)
        self._numbered = 0
        self._has_answered = False

    async def complete(self, request: Callable[[], Body], batch_deadline: float) -> Outcome:
        """Wait for a turn, make the body, and ask until there is an answer or no time, or attempt, is left.

        Raises:
            JudgeConfigurationError: a server refuses the request, and has not answered one like it yet.
        """
        trail = Trail(self._number(), self._settings.retry.attempts)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(batch_deadline), self._desk:
                # Images are encoded in there: the loop has other calls to look after.
                content = await asyncio.to_thread(lambda: json.dumps(request()).encode())
                async with self._gate:
                    started = loop.time()
                    trail.deadline = min(started + self._settings.call_seconds, batch_deadline)
                    async with asyncio.timeout_at(trail.deadline):
                        answer = await self._until_answered(COMPLETIONS, content, trail)
            self._counters.answered(loop.time() - started, trail.attempts, answer)
            return Outcome(answer, "", trail.attempts, trail.url)
        except TimeoutError:
            # Until a call has its turn, its deadline is infinite.
            is_call, settings = trail.deadline < batch_deadline, self._settings
            whose = f"call's {settings.call_seconds:g}" if is_call else f"batch's {settings.batch_seconds:g}"
            reason = f"the {whose} s are over"
        except Fault as fault:
            reason = f"no answer in {trail.attempts} attempts"
            trail.fault = fault
        except JudgeConfigurationError as refusal:
            # Others like it were answered: what is refused is this request, say a prompt that is too long.
            if refusal.status not in REFUSED_ALONE or not self._has_answered:
                raise
            self._counters.failed(f"status_{refusal.status}", trail.attempts)
            return Outcome(None, str(refusal), trail.attempts, trail.url)
        self._counters.failed(trail.fault.kind if trail.fault else "deadline", trail.attempts)
        return Outcome(None, f"{reason}; last fault: {trail.fault}" if trail.fault else reason, trail.attempts)

    async def path(self, path: str, body: Body, attempts: int) -> dict[str, Any]:
        """POST a body to a path, tried again as a completion is, so often at most.

        Raises:
            Fault: no answer within the attempts and the deadline of a call.
            JudgeConfigurationError: the server refuses the request.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.call_seconds
        trail = Trail(self._number(), attempts, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                return await self._until_answered(path, json.dumps(body).encode(), trail)
        except TimeoutError as error:
            raise Fault("timeout", f"no answer from {path} in {self._settings.call_seconds:g} s") from error

    async def _until_answered(self, path: str, content: bytes, trail: Trail) -> dict[str, Any]:
        retry = self._settings.retry
        last: Server | None = None
        spent = 0
        while True:
            last = await self._awake_server(last)
            trail.attempts, trail.url = trail.attempts + 1, last.url
            try:
                return await self._attempt(last, path, content)
            except Fault as fault:
                self._counters.fault(fault.kind)
                trail.fault = fault
            # A server that is away has not failed at this call: only the deadline ends the wait for it.
            spent += not trail.fault.is_unreachable
            now = asyncio.get_running_loop().time()
            # What one server asks for is no reason to wait where there is another.
            asked = asked_wait(self._servers, now) if trail.fault.retry_after else 0.0
            wait = retry.wait(trail.number, max(spent - 1, 0), asked)
            if spent >= trail.most_attempts or now + wait >= trail.deadline:
                # Where no time is left, its place in flight is worth more to another call.
                raise trail.fault
            await asyncio.sleep(wait)

    async def _awake_server(self, avoid: Server | None) -> Server:
        """Waits where all rest."""
        loop = asyncio.get_running_loop()
        while (server := choose(self._servers, loop.time(), avoid)) is None:
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        server.started(loop.time() + self._settings.rest_seconds)
        return server

    async def _attempt(self, server: Server, path: str, content: bytes) -> dict[str, Any]:
        answers = server.answers
        try:
            answer = await self._transport.post(server.url, path, content)
            if path == COMPLETIONS:
                check_completion(answer, server.url)
        except Fault as fault:
            self._failed(server, fault, is_silent=fault.kind == "timeout" and server.answers == answers)
            raise
        except JudgeConfigurationError as error:
            server.reached()
            if error.status != 404 or path != COMPLETIONS:
                raise
            raise JudgeConfigurationError(f"{error}{await self._served(server, content)}", 404) from error
        finally:
            server.ended()
        server.reached()
        self._has_answered |= path == COMPLETIONS
        return answer

    def _failed(self, server: Server, fault: Fault, is_silent: bool) -> None:
        """Note what a fault says of its server; a silent one answered nobody for the attempt's whole time."""
        now = asyncio.get_running_loop().time()
        # A rest only helps where somebody else takes the calls: a server that is alone may be slow and no more.
        others = [other for other in self._servers if other is not server and not other.is_on_trial]
        has_other = any(other.is_awake(now) for other in others)
        if fault.is_unreachable or (is_silent and has_other):
            server.unreachable(now + self._settings.rest_seconds)
        elif fault.kind != "timeout":
            server.reached()
        if fault.retry_after:
            # No call waits longer than that, and a server that asks for a day is tried again before.
            server.asked_to_wait(now + min(fault.retry_after, self._settings.call_seconds))

    async def _served(self, server: Server, content: bytes) -> str:
        """What a server has, for a model that it does not know."""
        try:
            models = await self._models(server)
        except (Fault, JudgeConfigurationError):
            return ""
        asked = str(json.loads(content).get("model"))
        return f"; it serves {', '.join(models)}, the nearest to {asked!r} is {nearest(asked, models)!r}"

    async def served_models(self) -> dict[str, list[str] | str]:
        """Ask every server once what it serves; by base URL, the names or the reason why there are none.

        Raises:
            JudgeConfigurationError: a server refuses the request.
        """

        async def one(server: Server) -> list[str] | str:
            try:
                return await self._models(server)
            except Fault as fault:
                return str(fault)

        models = await asyncio.gather(*(one(server) for server in self._servers))
        return {server.url: names for server, names in zip(self._servers, models, strict=True)}

    async def _models(self, server: Server) -> list[str]:
        listed = (await self._transport.get(server.url, "/models")).get("data")
        entries = listed if isinstance(listed, list) else []
        return [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]

    async def warm_up(self, body: Body) -> dict[str, Body | str]:
        """Send a body once to every server; by base URL, its answer or the reason why there is none.

        Raises:
            JudgeConfigurationError: a server refuses the request.
        """

        async def one(server: Server) -> Body | str:
            try:
                server.started(0.0)
                return await self._attempt(server, COMPLETIONS, content)
            except Fault as fault:
                return str(fault)

        content = json.dumps(body).encode()
        answers = await asyncio.gather(*(one(server) for server in self._servers))
        return {server.url: answer for server, answer in zip(self._servers, answers, strict=True)}

    def _number(self) -> int:
        self._numbered += 1
        return self._numbered
