"""A request as the engine sees it: token ids in, sampling parameters, nothing of HTTP or text."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. Every admitted request ends in exactly one of these."""

    STOP = "stop"  # EOS, a stop token id, or (decided by the frontend) a stop string
    LENGTH = "length"  # max_tokens or the context length reached
    ABORT = "abort"  # the client went away, asked for it, or the drain timeout passed
    ERROR = "error"  # the engine failed; the message says how


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the output must match: a structural tag as xgrammar reads it, JSON text."""

    text: str
    after_id: int | None = None  # it begins behind the first output token with this id; None = at once


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. Already validated and completed by the frontend; the engine trusts it.

    `seed` is always set: one (seed, output index) pair gives one random number, so a request samples the
    same tokens alone, in a batch, and after a retraction, as long as no drafts are made for it. `temperature` 0 means
    greedy.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = no limit
    min_p: float = 0.0
    seed: int = 0  # 0 <= seed < 2**63
    is_repeatable: bool = False  # the same tokens must come again: drawn without drafts, on which they would depend
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    return_logits: bool = False  # send back the float32 logits row that chose each token
    num_prompt_logits: int = 0  # also the rows of the last n prompt tokens (offline use; disables prefix reuse)
    num_logprobs: int | None = None  # log probability of each output token, and of so many best tokens beside it
    num_prompt_logprobs: int | None = None  # the same of each prompt token but the first; disables prefix reuse
    # Changes of the logits, in this order; all ids are inside the vocabulary.
    repetition_penalty: float = 1.0  # (0, 2]; for tokens of prompt and output
    frequency_penalty: float = 0.0  # -2..2, times the count in the output
    presence_penalty: float = 0.0  # -2..2, once for each token of the output
    logit_bias: dict[int, float] = {}
    banned_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences that the output must not contain, each at least one id
    thinking_budget: int | None = None  # output tokens after which reasoning that is still open is ended
    thinking_end_ids: tuple[int, ...] = ()  # any of them ends the reasoning; the budget forces the first
    constraint: Constraint | None = None  # stronger than all of these

    @property
    def may_speculate(self) -> bool:
        """Whether drafts may be made for the request. Greedy tokens do not depend on them."""
        return self.temperature == 0.0 or not self.is_repeatable

    @property
    def wants_only_tokens(self) -> bool:
        """Nothing changes the request's logits before a token is drawn, and nothing of them is sent back."""
        changes = self.needs_history or self.logit_bias or self.banned_token_ids or self.min_tokens
        return not changes and not self.return_logits and self.num_logprobs is None

    @property
    def needs_history(self) -> bool:
        """Whether the runner must know the ids of the prompt, or of the output before a retraction."""
        return (
            self.num_prompt_logprobs is not None
            or self.thinking_budget is not None
            or self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or bool(self.bad_words)
            or self.constraint is not None
        )


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate. `prompt_ids` has at least one id; `priority` lower runs first. Prefixes are reused only
    between requests of the same `cache_salt`."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural logarithms of probabilities at one position: softmax of the model's logits, before anything that
    sampling does to them."""

    logprob: float  # of the token that stands there
    top_ids: list[int]  # the best, descending, equal ones by id
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one engine step added to one request. The last one of a request has `finish_reason`.

    It can be part of no cycle, and a step makes one per request: the garbage collector need not look at them.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it, when finish_reason is STOP
    num_cached_tokens: int | None = None  # set once, with the first tokens: prompt tokens not recomputed
    queue_s: float | None = None  # with the first tokens: seconds from submission to the first slot
    prefill_s: float | None = None  # likewise: from there to the first token
    error: str | None = None
    error_status: int | None = None  # HTTP status that fits `error`; None means 500
    # Defaults are tuples: a list would be made anew for every output.
    logits: Sequence[bytes] = ()  # float32 rows [vocab_size], one per token of token_ids, if asked for
    prompt_logits: Sequence[bytes] = ()  # float32 rows [vocab_size] of the last num_prompt_logits prompt tokens
    logprobs: Sequence[TokenLogprobs] = ()  # one per token of token_ids, if asked for
    prompt_logprobs: Sequence[
        TokenLogprobs
    ] = ()  # with the first tokens, if asked for: from the second prompt token on
