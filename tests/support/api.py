"""A real HTTP server with a fake engine behind it, for the tests of the API."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn

from dsv4serve.api.app import create_app
from dsv4serve.api.process import DrainingServer
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import EngineConfig
from dsv4serve.engine.messages import EngineInfo, EngineStats
from dsv4serve.obs.histogram import StepHistogram
from dsv4serve.obs.kernels import KernelCounts
from dsv4serve.types import FinishReason, Request, RequestOutput

MAX_MODEL_LEN = 4096
INFO = EngineInfo(
    model_path="",
    max_model_len=MAX_MODEL_LEN,
    vocab_size=129280,
    eos_token_id=1,
    numerics="exact",
    num_slots=4,
    num_pages=64,
    num_tails=4,
)
STATS = EngineStats(
    num_running=1,
    num_waiting=2,
    num_free_slots=3,
    num_free_pages=60,
    num_free_tails=4,
    num_cached_pages=10,
    num_cached_tails=1,
    num_steps=100,
    num_prompt_tokens=1000,
    num_cached_tokens=500,
    num_generated_tokens=300,
    num_retractions=0,
    num_finished=7,
    num_verifies=50,
    num_drafted=[50, 50],
    num_accepted=[40, 30],
    num_frontends=1,
    step_times={"execute": StepHistogram()},
    ready_s=12.5,
    kernels={"start-up": KernelCounts(compiled=3, loaded=150, seconds=6.0), "serving": KernelCounts()},
)
Answer = Callable[[Request], list[RequestOutput]]


@dataclass
class FakeEngine:
    """Plays scripted outputs; `hold` makes it wait, after the first output, until an abort or `release`."""

    answer: Answer
    info: EngineInfo | None = INFO
    is_ready: bool = True
    alive: bool = True
    hold: bool = False
    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    waiting: dict[str, asyncio.Event] = field(default_factory=dict)

    async def is_alive(self) -> bool:
        return self.alive

    async def stats(self) -> EngineStats:
        return STATS

    async def abort_call(self, call_id: str | None) -> int:
        found = [name for name in self.waiting if call_id is None or name.startswith(call_id + "/")]
        for request_id in found:
            await self.abort(request_id)
        return len(found)

    async def flush_cache(self) -> int:
        return 7

    async def submit(self, request: Request):
        self.submitted.append(request)
        finished = False
        try:
            for output in self.answer(request):
                finished = output.finish_reason is not None
                yield output
                if self.hold and not finished:
                    event = self.waiting[request.request_id] = asyncio.Event()
                    await event.wait()
                    if request.request_id in self.aborted:
                        finished = True
                        yield RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT)
                        return
                await asyncio.sleep(0)
        finally:
            if not finished:
                self.aborted.append(request.request_id)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.waiting[request_id].set()


def ids_answer(ids, finish=FinishReason.STOP, cached=0, group=1) -> Answer:
    """The given ids, `group` an output; for STOP an EOS at the end."""

    def answer(request: Request) -> list[RequestOutput]:
        groups = [list(ids[i : i + group]) for i in range(0, len(ids), group)] or [[]]
        outputs = [RequestOutput(request_id=request.request_id, token_ids=g) for g in groups]
        outputs[0].num_cached_tokens = cached
        if finish is FinishReason.STOP:
            outputs.append(RequestOutput(request_id=request.request_id, token_ids=[1], stop_token_id=1))
        outputs[-1].finish_reason = finish
        return outputs

    return answer


class Server:
    """A real uvicorn on 127.0.0.1 in a thread, with a fake engine behind it."""

    def __init__(self, tokenizer: ChatTokenizer, model: Path, **settings) -> None:
        self.tokenizer = tokenizer
        self.engine = FakeEngine(ids_answer(tokenizer.encode("Hello world")))
        values = {"model": model, "served_model_name": "demo", **settings}
        self.app = create_app(EngineConfig(**values), self.engine, tokenizer)
        config = uvicorn.Config(
            self.app, http="httptools", loop="uvloop", lifespan="off", log_config=None, access_log=False
        )
        self.server = DrainingServer(config, self.app.state.frontend)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=30)
        wait_for(lambda: self.server.started)

    def say(self, text: str, **kwargs) -> None:
        """Make the engine answer with `text`, control tokens included."""
        self.engine.answer = ids_answer(self.tokenizer.encode(text), **kwargs)

    def chat(self, **fields) -> httpx.Response:
        return self.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], **fields}
        )

    def close(self) -> None:
        self.client.close()
        self.server.handle_exit(15, None)
        self.server.handle_exit(15, None)
        self.thread.join(20)
        assert not self.thread.is_alive()


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


def events(response: httpx.Response) -> list[dict]:
    """The JSON events of a complete SSE body, which must end in [DONE]."""
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-2]]
