"""What crosses the ZMQ socket between a frontend (DEALER) and the engine (ROUTER): msgspec/msgpack, no pickle.

A frontend's requests carry its ZMQ identity, so the engine answers only that frontend. `decode_*` raise
msgspec.ValidationError on anything that is not one of these messages.
"""

from __future__ import annotations

import msgspec

from dsv4serve.obs.histogram import StepHistogram
from dsv4serve.obs.kernels import KernelCounts
from dsv4serve.types import Request, RequestOutput


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a frontend after every (re)connection; answered by EngineInfo."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Admit a request. Answered by Outputs until one has a finish_reason."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these requests. Each that is still open ends with finish_reason abort."""

    request_ids: list[str]


class AbortCall(msgspec.Struct, frozen=True, tag="abort_call"):
    """Stop the requests of every frontend whose id begins with `call_id` and a slash; None: all requests.

    Answered by Done, whose count is how many there were.
    """

    call_id: str | None


class FlushCache(msgspec.Struct, frozen=True, tag="flush_cache"):
    """Forget all prefixes; what requests hold stays with them. Answered by Done, whose count is the pages freed."""


class GetStats(msgspec.Struct, frozen=True, tag="get_stats"):
    """Ask for EngineStats; also the liveness probe (the step loop answers it, not a thread beside it)."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag="engine_info"):
    """What a frontend must know of the engine before it admits requests."""

    model_path: str
    max_model_len: int  # prompt + output tokens of one request that can always be served
    vocab_size: int
    eos_token_id: int
    numerics: str
    num_slots: int
    num_pages: int
    num_tails: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="engine_stats"):
    """Gauges and counters of the step loop."""

    num_running: int
    num_waiting: int
    num_free_slots: int
    num_free_pages: int
    num_free_tails: int
    num_cached_pages: int  # held by nothing but the prefix cache; these count as free, too
    num_cached_tails: int
    num_steps: int
    num_prompt_tokens: int  # computed prompt tokens, cached ones not counted
    num_cached_tokens: int
    num_generated_tokens: int
    num_retractions: int
    num_retracted: int = 0  # that wait now because they were retracted
    num_prefix_hits: int = 0  # starts of requests that found a prefix in the cache
    num_evicted_pages: int = 0  # from the prefix cache; tails too
    num_evicted_tails: int = 0
    num_finished: int
    num_verifies: int = 0  # decodes with drafts
    num_drafted: list[int] = []  # by place of the draft: how many were verified
    num_accepted: list[int] = []  # and how many of them accepted
    num_nonfinite_drafts: int = 0  # drafts whose logits had NaN or infinite values
    num_nonfinite_steps: int = 0  # steps in which check_numerics found any in a layer
    num_shadow_rows: int = 0  # see StepOutput: in all steps that were compared with the reference kernels
    num_shadow_flips: int = 0
    shadow_drift: float = 0.0  # of the last one
    num_accept_alarms: int = 0  # times that the accept rate fell below its reference
    is_accept_rate_low: bool = False
    num_frontends: int  # that said Hello and are not known to be gone
    step_times: dict[str, StepHistogram] = {}  # schedule, prepare, execute, sample, update
    ready_s: float = 0.0  # from the start of the engine's process until it could serve
    kernels: dict[str, KernelCounts] = {}  # by phase, start-up and serving


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer to AbortCall or FlushCache; answers come in the order of the questions."""

    count: int


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """New tokens and ends of one step, for one frontend."""

    outputs: list[RequestOutput]


FromFrontend = Hello | Submit | Abort | AbortCall | FlushCache | GetStats
FromEngine = EngineInfo | EngineStats | Outputs | Done

encode = msgspec.msgpack.Encoder().encode
decode_from_frontend = msgspec.msgpack.Decoder(FromFrontend).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
