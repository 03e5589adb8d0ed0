"""Process of one engine: `python -m actors.engine.server DESCRIPTOR`, started by `engine/process.py`.

One thread does everything: before a step it handles the messages that have arrived, after it it sends finished
responses; an engine that is idle or sleeps blocks on the socket. So nothing competes with a step for the interpreter
lock.

Invariants
- The process ends with its parent, however that ends: the kernel kills it, or the socket is closed.
- A failure of vLLM is reported, then the process ends: nothing is sampled with weights of an unknown version.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from actors.engine.messages import Messages, Request, pack
from actors.engine.vllm import VllmCore
from services.config.tree import ModelConfig, RolloutConfig
from services.errors import first_line
from services.weights import TransferLost

logger = logging.getLogger(__name__)

RECEIVE_BYTES = 2**20
REPORT_S = 0.1


class EngineServer:
    """Serves one engine. Call `serve` once.

    Args:
        link: socket to the actor.
    """

    def __init__(self, link: socket.socket) -> None:
        link.set_inheritable(False)  # workers that outlive this process must not keep it open
        self._link = link
        self._messages = Messages()
        self._core: VllmCore | None = None
        self._reported = 0.0

    def serve(self) -> None:
        """Serve until `stop`, the end of the link, or a failure."""
        while self._receive():
            if self._core is not None and self._core.may_step and not self._step(self._core):
                return

    def _receive(self) -> bool:
        """Handle all messages that have arrived; block if the engine is idle. Returns whether to continue."""
        waits = self._core is None or not self._core.may_step
        while True:
            try:
                data = self._link.recv(RECEIVE_BYTES, 0 if waits else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if not data:
                return False
            for kind, *members in self._messages.of(data):
                if not self._handle(kind, members):
                    return False
            waits = False

    def _handle(self, kind: str, members: list[Any]) -> bool:
        """Handle a message. Returns whether to continue."""
        core = self._core
        if kind == "start":
            return self._reply(self._start, members)
        assert core is not None, f"{kind} before start"
        match kind:
            case "generate":
                self._generate(core, Request(*members))
            case "drop":
                core.drop(*members)
            case "load":
                return self._reply(core.load, members)
            case "receive":
                return self._reply(core.receive, members)
            case "sleep":
                return self._reply(core.sleep, members)
            case "stop":
                core.stop()
                return False
        return True

    def _start(self, model: str, rollout: str, seed: int, log_level: int) -> None:
        logging.basicConfig(level=log_level)
        core = VllmCore(ModelConfig.model_validate_json(model), RolloutConfig.model_validate_json(rollout), seed)
        core.start()
        self._core = core

    def _generate(self, core: VllmCore, request: Request) -> None:
        try:
            core.add(request)
        except ValueError as error:
            self._send("refused", request.id, str(error))

    def _reply(self, function: Callable[..., None], members: list[Any]) -> bool:
        """Call a function, reply `done` or `failed`. Returns whether to continue, as after a lost transfer."""
        try:
            function(*members)
        except Exception as error:
            lost = isinstance(error, TransferLost)
            if not lost:
                logger.exception("vLLM failed")
            self._send("failed", lost, first_line(error))
            return lost
        self._send("done", self._stats())
        return True

    def _step(self, core: VllmCore) -> bool:
        """Do one step and send the finished responses. Returns whether to continue."""
        try:
            responses = core.step()
        except Exception as error:
            logger.exception("vLLM stopped working")
            self._send("broken", f"vLLM stopped working: {first_line(error)}")
            return False
        now = time.monotonic()
        if responses or now - self._reported > REPORT_S:
            self._reported = now
            self._send("responses", responses, self._stats())
        return True

    def _stats(self) -> tuple[Any, ...]:
        assert self._core is not None
        return astuple(self._core.stats())

    def _send(self, kind: str, *members: object) -> None:
        self._link.sendall(pack(kind, *members))


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as link:
        EngineServer(link).serve()


if __name__ == "__main__":
    main()
