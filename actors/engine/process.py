"""The actor's end of an inference engine that runs in a process of its own.

Episodes cost an actor a third of a millisecond of Python for each request: in the engine's process, under one
interpreter lock, they would pause the engine for that long. So the engine has its own process (`server.py`).

Invariants
- Messages are plain data in msgpack (`messages.py`) over a pair of sockets that no other process can reach.
- Weights go by the name of a file in memory, which the engine's process maps. Here their bytes are touched only in
  threads and without the interpreter's lock, whatever the size of the model: heartbeats and leases depend on it.
- If the process ends or cannot load a version, all requests fail, now and later. Callers set the time limits of loading
  and sampling. Cancelling a load ends the process, because its version is unknown from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from actors.engine.interface import EngineFailed, EngineStats, InferenceEngine, Sample
from actors.engine.messages import Messages, Request, Response, pack
from actors.engine.vllm import engine_environment
from actors.engine.weight_transfer import joining_facts, update_facts
from actors.prompts import load_tokenizer
from actors.tokens import decode_response
from services import process
from services.config.tree import ModelConfig, RolloutConfig
from services.errors import first_line
from services.model_folder import check_model_folder, read_weights
from services.schemas import VersionSpan
from services.weights import TransferLost
from services.weights.adapter import is_adapter, merged_form, merging
from services.weights.channel import new_file
from services.weights.payload import Layout, fill

if TYPE_CHECKING:
    import torch

    from services.weights import Delivery
    from services.weights.collective import Incoming
    from services.weights.memory import MemoryFile, MemoryName

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 3.0
RECEIVE_BYTES = 2**18


class EngineProcess(InferenceEngine):
    """A vLLM engine with continuous batching. Not reusable after `stop`.

    The kernel ends the process when the *thread* that called `start` exits.

    Args:
        model: the model and its lengths.
        rollout: resources of the engine.
        seed: of the engine; requests have their own.
    """

    def __init__(self, model: ModelConfig, rollout: RolloutConfig, seed: int = 0) -> None:
        self._model = model
        self._rollout = rollout
        self._seed = seed
        self._base: dict[str, torch.Tensor] | None = None
        self._tokenizer: Any = None
        self._version = 0
        self._stats = EngineStats()
        self._failure: EngineFailed | None = EngineFailed("the engine has not been started")
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[Sample]] = {}
        self._calls: deque[asyncio.Future[None]] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._starting: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        return self._version

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None before the start."""
        return self._process.pid if self._process else None

    def stats(self) -> EngineStats:
        return replace(self._stats, running=len(self._waiting))

    async def start(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await self._starting

    async def _start(self) -> None:
        check_model_folder(self._model.path)
        reader = await self._open_link()
        self._failure = None
        self._listening = asyncio.create_task(self._listen(reader))
        settings = self._model.model_dump_json(), self._rollout.model_dump_json(), self._seed
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._call("start", *settings, logging.getLogger().getEffectiveLevel())
            self._tokenizer = await asyncio.to_thread(load_tokenizer, self._model.path)
        except TimeoutError:
            await self.stop()
            raise EngineFailed(f"vLLM did not start within {START_TIMEOUT_S:g} s with {self._model.path}") from None
        except EngineFailed as error:
            await self.stop()
            raise EngineFailed(f"vLLM cannot start with {self._model.path}: {error}") from error
        except BaseException:
            await self.stop()
            raise

    async def _open_link(self) -> asyncio.StreamReader:
        """Start the process and open our end of the link. Whatever interrupts this leaves no process behind."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _launch(theirs)
            reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            raise
        return reader

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        self._require_working()
        context = self._model.max_prompt_tokens + self._model.max_response_tokens
        if not 0 < len(prompt_ids) <= context - max_tokens:
            raise ValueError(f"{len(prompt_ids)} prompt tokens and {max_tokens} to sample exceed {context} tokens")
        request = Request(next(self._ids), list(prompt_ids), temperature, max_tokens, seed, list(stop))
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            self._send("generate", *request)
            return await future
        except asyncio.CancelledError:
            if self._failure is None:
                self._send("drop", request.id)
            raise
        finally:
            del self._waiting[request.id]

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._require_working()
        with self._loading(version):
            file = await asyncio.to_thread(self._in_memory, tensors)
            await self._load(version, file.name)

    async def load_delivery(self, delivery: Delivery) -> None:
        version = delivery.version.version
        if await asyncio.to_thread(delivery.adapters):
            await self.load_weights(version, delivery.tensors())
            return
        self._require_working()
        with self._loading(version):
            await self._load(version, delivery.memory)

    async def _load(self, version: int, memory: MemoryName) -> None:
        await self._call("load", version, {"memory": asdict(memory)})
        self._version = version

    async def sleep(self) -> None:
        self._require_working()
        await self._call("sleep")

    async def load_initial(self) -> None:
        await self.load_weights(0, await asyncio.to_thread(read_weights, self._model.path))

    async def receive_weights(self, incoming: Incoming) -> None:
        self._require_working()
        version = incoming.version.version
        with self._loading(version):
            await self._call("receive", version, joining_facts(incoming), update_facts(incoming))
        self._version = version

    @contextlib.contextmanager
    def _loading(self, version: int) -> Iterator[None]:
        """Context of loading a version. A failure or cancellation in it fails the engine: its weights are unknown."""
        try:
            yield
        except TransferLost:
            raise
        except BaseException as error:
            reason = f"vLLM cannot load version {version}: {first_line(error)}"
            self._fail(reason)
            if isinstance(error, Exception):
                logger.error("%s", reason)
                raise EngineFailed(reason) from error
            raise

    def _in_memory(self, tensors: Mapping[str, torch.Tensor]) -> MemoryFile:
        """All weights of a version in a file in memory; adapters are merged into the initial weights."""
        adapters = is_adapter(tensors)
        if adapters and self._base is None:
            self._base = read_weights(self._model.path)
        base = self._base or {}
        layout = Layout.of(merged_form(tensors, base) if adapters else tensors)
        file = new_file(layout.nbytes)
        fill(layout.write_header(file.payload), merging(tensors, base) if adapters else tensors.items())
        return file

    async def stop(self) -> None:
        listening, self._listening = self._listening, None
        if listening is None or self._process is None or self._writer is None:
            if self._process is not None and self._writer is None:
                self._process.kill()  # its link is not open yet: `start` finds it closed and fails
            return
        if self._failure is None:
            self._send("stop")
            self._refuse_all("the engine has been stopped")
        await asyncio.wait([listening], timeout=STOP_TIMEOUT_S)
        self._process.kill()
        await listening
        self._writer.close()

    def _require_working(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send(self, kind: str, *members: object) -> None:
        assert self._writer is not None
        self._writer.write(pack(kind, *members))

    def _call(self, kind: str, *members: object) -> asyncio.Future[None]:
        """Send a message that is replied to in order; returns a future of the reply."""
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls.append(reply)
        self._send(kind, *members)
        return reply

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Handle the messages of the process until it has ended."""
        assert self._process is not None
        messages = Messages()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                for kind, *members in messages.of(data):
                    self._handle(kind, members)
        except ConnectionError:
            pass
        except Exception as error:  # without this task all callers would wait for ever
            logger.exception("invalid message from the engine process")
            self._fail(f"invalid message from the engine process: {first_line(error)}")
        # It has closed its end of the link, so it is about to end.
        code = await asyncio.to_thread(process.wait_or_kill, self._process, STOP_TIMEOUT_S)
        if self._failure is None:
            self._fail(f"the engine process ended (code {code})")

    def _handle(self, kind: str, members: list[Any]) -> None:
        match kind:
            case "responses":
                for response in members[0]:
                    self._deliver(Response(*response))
                self._stats = EngineStats(*members[1])
            case "refused":
                request, reason = members
                _settle(self._waiting.get(request), ValueError(reason))
            case "done":
                self._stats = EngineStats(*members[0])
                _settle(self._calls.popleft(), None)
            case "failed":
                lost, reason = members
                _settle(self._calls.popleft(), TransferLost(reason) if lost else EngineFailed(reason))
            case "broken":
                self._fail(members[0])

    def _deliver(self, response: Response) -> None:
        """Decode a response and return it to its caller."""
        by_text = isinstance(response.stopped_by, str)  # then the last token belongs to the text
        sample = Sample(
            token_ids=response.token_ids,
            logprobs=response.logprobs,
            versions=tuple(VersionSpan(version, tokens) for version, tokens in response.versions),
            text=decode_response(self._tokenizer, response.token_ids, response.finished and not by_text),
            finished=response.finished,
            stopped_by=response.stopped_by,
        )
        _settle(self._waiting.get(response.id), sample)

    def _fail(self, reason: str) -> None:
        """Fail all requests, now and later, and end the process."""
        self._refuse_all(reason)
        assert self._process is not None
        self._process.kill()

    def _refuse_all(self, reason: str) -> None:
        self._failure = EngineFailed(reason)
        futures: list[asyncio.Future[Any]] = [*self._waiting.values(), *self._calls]
        for future in futures:
            _settle(future, EngineFailed(reason))


def _launch(link: socket.socket) -> subprocess.Popen[bytes]:
    return process.start(
        # -P: a package of the same name in the working directory is not ours.
        [sys.executable, "-P", "-m", "actors.engine.server", str(link.fileno())],
        environment=engine_environment(),
        pass_fds=[link.fileno()],
    )


def _settle(future: asyncio.Future[Any] | None, outcome: object) -> None:
    """Set a future's result or exception, unless its caller was cancelled."""
    if future is None or future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
