"""What one frontend process knows: configuration, tokenizer, engine, and what it serves at this moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from dsv4serve.api.auth import ApiKeys
from dsv4serve.api.generation_config import read_generation_config
from dsv4serve.api.grammar_check import GrammarCheck
from dsv4serve.api.live import Live, StatsSource
from dsv4serve.api.probe import Probe
from dsv4serve.chat.effort import resolve_contract
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config import EngineConfig
from dsv4serve.engine.messages import EngineInfo
from dsv4serve.obs.metrics import FrontendMetrics
from dsv4serve.obs.traces import Tracer
from dsv4serve.types import EngineUnavailable, InvalidRequest, ModelNotFound, Request, RequestOutput

T = TypeVar("T")
TOKENIZE_THREADS = 2


class Engine(StatsSource, Protocol):
    """The engine as the API sees it: engine.client.EngineClient, or a fake in tests."""

    async def is_alive(self) -> bool:
        """Whether the step loop answers."""

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Outputs of a request, exactly one of them with a finish_reason; closing the iterator aborts."""

    async def abort(self, request_id: str) -> None:
        """End an open request with finish_reason abort."""

    async def abort_call(self, call_id: str | None) -> int:
        """End the requests of any frontend that begin with `call_id`/, or all; how many. Raises EngineUnavailable."""

    async def flush_cache(self) -> int:
        """Forget all prefixes; the number of pages freed. Raises EngineUnavailable."""


class Frontend:
    """Shared by all routes. Everything runs on one event loop, except tokenising."""

    def __init__(self, config: EngineConfig, engine: Engine, tokenizer: ChatTokenizer) -> None:
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.keys = ApiKeys(config.read_api_keys(), config.admin_api_key)
        self.effort_contract = resolve_contract(config.effort_contract, config.model)
        self.sampling_defaults = read_generation_config(config.model)
        self.metrics = FrontendMetrics()
        self.grammar_check = GrammarCheck(config.model)
        self.probe = Probe(engine)
        self.tracer = Tracer(config.otlp_endpoint) if config.otlp_endpoint else None
        self.live = Live(engine, self.metrics)
        self.draining = False
        self.num_active = 0  # HTTP requests between their first byte and their end, probes not counted
        self.running: set[str] = set()  # engine requests that are open
        self._open_calls: set[str] = set()
        self._threads = ThreadPoolExecutor(TOKENIZE_THREADS, "tokenize")

    def ready_info(self) -> EngineInfo:
        """The engine's facts. Raises EngineUnavailable while there is no engine to serve a request."""
        if not self.engine.is_ready or self.engine.info is None:
            raise EngineUnavailable("the engine is not ready; it is starting or being restarted")
        return self.engine.info

    def check_model(self, name: str | None) -> str:
        """The name to answer with: the one asked for. Raises ModelNotFound when it does not mean the served model."""
        served = self.config.model_name
        if name is None or name == served:
            return served
        if not any(fnmatchcase(name, pattern) for pattern in self.config.model_alias):
            raise ModelNotFound(f"the model {name!r} does not exist; this server serves {served!r}", "model")
        return name

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run rendering or tokenising off the event loop: a long prompt takes seconds."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def check_length(self, num_tokens: int, limit: int, at_least: bool = False) -> None:
        """Raise InvalidRequest unless a prompt of `num_tokens` leaves room for one token of output."""
        if num_tokens >= limit:
            raise InvalidRequest(
                f"the prompt has {'at least ' if at_least else ''}{num_tokens} tokens; "
                f"prompt and output together may have {limit}",
                "prompt",
            )

    @contextmanager
    def open_call(self, request_id: str) -> Iterator[None]:
        """Hold the id of a call. Raises InvalidRequest when another call of this frontend has it."""
        if request_id in self._open_calls:
            raise InvalidRequest(f"the request id {request_id!r} is in use by a request that still runs", "request_id")
        self._open_calls.add(request_id)
        try:
            yield
        finally:
            self._open_calls.remove(request_id)

    async def abort_all(self) -> None:
        """End every open request with finish_reason abort."""
        for request_id in list(self.running):
            await self.engine.abort(request_id)

    def close(self) -> None:
        """Free the threads and send the last traces."""
        if self.tracer is not None:
            self.tracer.close()
        self.grammar_check.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
