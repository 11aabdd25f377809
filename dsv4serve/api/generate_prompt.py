"""A body of POST /generate, SGLang's own form of completions -> the same request as a completions body."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dsv4serve.api.body import validate
from dsv4serve.api.schemas import CompletionBody, RequestId, Salt
from dsv4serve.api.strict import Strict
from dsv4serve.types import InvalidRequest

DEFAULT_MAX_TOKENS = 128  # SGLang's
# Fields of sampling_params by what completions call them.
OTHER_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}


class GenerateSampling(Strict):
    """sampling_params. Values are checked as those of completions."""

    max_new_tokens: Any = None
    min_new_tokens: Any = None
    sampling_seed: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    no_stop_trim: Any = None
    ignore_eos: Any = None
    skip_special_tokens: Any = None
    n: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    json_schema: Any = None


class GenerateBody(Strict):
    """POST /generate."""

    text: Any = None  # as the prompt of completions, each
    input_ids: Any = None
    sampling_params: GenerateSampling | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Field(ge=-1)] | None = None  # of the prompt, from here on; -1 = none of it
    top_logprobs_num: Any = None
    return_text_in_logprobs: bool | None = None
    rid: RequestId | None = None
    priority: Any = None
    cache_salt: Salt | None = None
    extra_key: Salt | None = None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt were asked for."""
        return bool(self.return_logprob) and self.logprob_start_len is not None and self.logprob_start_len >= 0


def completion_body(body: GenerateBody) -> CompletionBody:
    """The completions request that means the same. Raises InvalidRequest naming what is wrong as it is called here."""
    if (body.text is None) == (body.input_ids is None):
        raise InvalidRequest("give either text or input_ids", "text")
    params = (body.sampling_params or GenerateSampling()).model_dump(exclude=set(OTHER_NAMES.values()))
    params |= {ours: getattr(body.sampling_params, theirs, None) for ours, theirs in OTHER_NAMES.items()}
    schema = params.pop("json_schema")
    num_top = 0 if body.top_logprobs_num is None else body.top_logprobs_num
    wanted: dict[str, Any] = params | {
        "prompt": body.text if body.input_ids is None else body.input_ids,
        "max_tokens": DEFAULT_MAX_TOKENS if params["max_tokens"] is None else params["max_tokens"],
        "structured_outputs": None if schema is None else {"json": schema},
        "echo": body.wants_prompt_logprobs or params["max_tokens"] == 0,
        "logprobs": num_top if body.return_logprob else None,
        "return_token_ids": True,
        **body.model_dump(include={"stream", "rid", "priority", "cache_salt", "extra_key"}),
    }
    wanted = {name: value for name, value in wanted.items() if value is not None}
    try:
        return validate(wanted, CompletionBody)
    except InvalidRequest as error:
        raise renamed(error, body) from None


def renamed(error: InvalidRequest, body: GenerateBody) -> InvalidRequest:
    """`error` about a completions body as one about `body`."""
    name, _, rest = (error.param or "").partition(".")
    if name == "prompt":
        name = "text" if body.input_ids is None else "input_ids"
    elif name == "logprobs":
        name = "top_logprobs_num"
    elif name == "structured_outputs":
        name, rest = "sampling_params.json_schema", rest.removeprefix("json").removeprefix(".")
    elif OTHER_NAMES.get(name, name) in GenerateSampling.model_fields:
        name = f"sampling_params.{OTHER_NAMES.get(name, name)}"
    return InvalidRequest(str(error), ".".join(filter(None, (name, rest))) or None)
