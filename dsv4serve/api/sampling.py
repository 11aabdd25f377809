"""The sampling fields of a body -> SamplingParams: completed from the defaults, held against the model."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dsv4serve.api.frontend import Frontend
from dsv4serve.api.schemas import Sampling
from dsv4serve.chat.render import OutputStart
from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.engine.messages import EngineInfo
from dsv4serve.types import InvalidRequest, SamplingParams

OPEN_REASONING = (OutputStart.REASONING, OutputStart.REASONING_CONTINUATION)


def sampling_params(
    frontend: Frontend, info: EngineInfo, body: Sampling, start: OutputStart | None, may_call: bool
) -> SamplingParams:
    """What all choices of a body share; `fit` adds the rest. `start` None is a raw completion, in which nothing is
    banned. Raises InvalidRequest for ids outside the vocabulary."""
    defaults, control_ids = frontend.sampling_defaults, frontend.tokenizer.control_ids
    for position, token_id in enumerate(body.stop_token_ids or ()):
        _check_id(token_id, info, f"stop_token_ids.{position}")
    bias = {int(name): value for name, value in (body.logit_bias or {}).items()}
    for token_id in bias:
        _check_id(token_id, info, f"logit_bias.{token_id}")
    budget = body.reasoning_budget if start in OPEN_REASONING else None
    # Markup of calls makes no sense where nobody reads calls.
    banned = () if start is None or may_call else (control_ids[ControlToken.DSML],)
    end_ids = () if budget is None else (control_ids[ControlToken.END_THINK], control_ids[ControlToken.DSML])
    repetition = body.repetition_penalty
    return SamplingParams(
        max_tokens=0,
        min_tokens=body.min_tokens or 0,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=min(max(defaults.top_k if body.top_k is None else body.top_k, 0), info.vocab_size),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        is_repeatable=body.seed is not None,
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_logprobs if body.echoes else None,
        repetition_penalty=defaults.repetition_penalty if repetition is None else repetition,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=bias,
        banned_token_ids=tuple(token_id for token_id in banned if token_id < info.vocab_size),
        bad_words=_bad_words(frontend.tokenizer, body.bad_words or (), info.vocab_size),
        thinking_budget=budget,
        thinking_end_ids=end_ids,
    )


def fit(params: SamplingParams, info: EngineInfo, num_prompt: int, max_tokens: int | None, seed: int) -> SamplingParams:
    """`params` of one choice. `max_tokens` None is the rest of the context. Raises InvalidRequest when the lengths do
    not fit the model or each other."""
    room = info.max_model_len - num_prompt
    if max_tokens is not None and max_tokens > room:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together they may have "
            f"{info.max_model_len}",
            "max_tokens",
        )
    max_tokens = max_tokens or room
    if params.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens ({params.min_tokens}) is above max_tokens ({max_tokens})", "min_tokens")
    return msgspec.structs.replace(params, max_tokens=max_tokens, seed=seed)


def _check_id(token_id: int, info: EngineInfo, param: str) -> None:
    if not 0 <= token_id < info.vocab_size:
        raise InvalidRequest(f"id {token_id} is outside the vocabulary (0 to {info.vocab_size - 1})", param)


def _bad_words(tokenizer: ChatTokenizer, words: Sequence[str], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The usual ids of each word, at the start of a text and behind a space."""
    texts = dict.fromkeys(text for word in words for text in (word, " " + word.lstrip(" ")))
    sequences = dict.fromkeys(tuple(tokenizer.encode(text)) for text in texts)
    return tuple(ids for ids in sequences if ids and max(ids) < vocab_size)
