"""What clients may send. See api.strict for fields that are not here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, model_validator

from dsv4serve.api.strict import Strict
from dsv4serve.chat.messages import unknown_message_fields
from dsv4serve.chat.shown_reasoning import Form
from dsv4serve.types import InvalidRequest

MAX_TOKENS = 2**31 - 1
MAX_IDS = 2**20  # as many as the longest context of the family has
MAX_N = 128
MAX_PROMPTS = 1024
MAX_STOPS, MAX_STOP_CHARS = 16, 1024
MAX_STOP_IDS = 256
MAX_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_LOGPROBS = 20
REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}$"
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
RequestId = Annotated[str, Field(pattern=REQUEST_ID)]
Salt = Annotated[str, Field(max_length=1024)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
Task = Literal["action", "query", "authority", "domain", "read_url", "title"]


class StreamOptions(Strict):
    """OpenAI's stream_options."""

    include_usage: bool | None = None  # in a chunk of its own at the end
    continuous_usage_stats: bool | None = None  # so far, in every chunk
    include_obfuscation: bool | None = None  # without effect


class Thinking(Strict):
    """DeepSeek's thinking switch."""

    type: Literal["enabled", "disabled"]


class Reasoning(Strict):
    """The weakest thinking switch."""

    enabled: bool | None = None
    effort: Effort | None = None


class TemplateKwargs(Strict):
    """The switches that other engines take as chat_template_kwargs."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    drop_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class ChatSwitches(Strict):
    """What decides, beside the messages, how they become a prompt: see api.chat_prompt, which checks what is Any."""

    thinking: Thinking | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    continue_final_message: bool | None = None
    task: Task | None = None  # of the last message, as that message's own field `task`
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _check_end(self) -> ChatSwitches:
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise InvalidRequest(
                "a new assistant turn begins unless continue_final_message is true; it must be the opposite of that",
                "add_generation_prompt",
            )
        return self


class Sampling(Strict):
    """What completions and chat completions share. Absent numbers come from generation_config.json."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Any = None  # a string or a list of strings; checked below so that the message can say so
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # the same under its other name
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
            ],
            Field(max_length=MAX_BIAS),
        ]
        | None
    ) = None
    bad_words: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MAX_BAD_WORDS)] | None
    ) = None
    return_token_ids: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    ignore_eos: bool | None = None
    # At most one of them; see api.constraints, which checks what is Any.
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None
    structured_outputs: Any = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    request_id: RequestId | None = None
    rid: RequestId | None = None
    # Prefixes are shared only between requests that have the same of these.
    cache_salt: Salt | None = None
    extra_key: Salt | None = None

    @property
    def cache_scope(self) -> str:
        """Both salts as one, empty without them."""
        salts = (self.cache_salt, self.extra_key)
        return str(salts) if any(salts) else ""

    @property
    def reasoning_form(self) -> Form:
        """How reasoning is shown."""
        return Form.APART

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def keeps_stop(self) -> bool:
        """Whether what ended a choice stays in its text."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)

    @property
    def num_logprobs(self) -> int | None:
        """Best tokens to list beside each token; None for no log probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the output."""
        return False

    @property
    def reasoning_budget(self) -> int | None:
        """Tokens after which the reasoning is ended."""
        return None

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        stops = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
            raise InvalidRequest(
                f"stop: expected a string or a list of strings of 1 to {MAX_STOP_CHARS} characters", "stop"
            )
        if len(stops) > MAX_STOPS:
            raise InvalidRequest(f"stop: {len(stops)} strings; at most {MAX_STOPS} are allowed", "stop")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is allowed only with stream true", "stream_options")
        return self


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Any  # a string, a list of strings, a list of ids, or a list of lists of ids
    suffix: str | None = None  # what stands behind the gap that is to be filled
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None  # 0 only with echo
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None

    @property
    def num_logprobs(self) -> int | None:
        """The field `logprobs`."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """The field `echo`."""
        return bool(self.echo)

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens: 0 asks for nothing, unless echo is true; give at least 1", "max_tokens")
        if self.echo and self.suffix:
            raise InvalidRequest("echo and suffix cannot be combined", "echo")
        return self


class ChatBody(Sampling, ChatSwitches):
    """POST /v1/chat/completions. Messages are checked by chat.messages."""

    messages: list[Any]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    parallel_tool_calls: bool | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None

    @property
    def reasoning_form(self) -> Form:
        """From the last three fields; the first that is false decides."""
        if self.include_reasoning is False:
            return Form.HIDDEN
        if self.separate_reasoning is False:
            return Form.IN_CONTENT
        return Form.IN_ONE_PIECE if self.stream_reasoning is False else Form.APART

    def unknown_fields(self) -> list[str]:
        """Those of the messages too."""
        return super().unknown_fields() + unknown_message_fields(self.messages)

    @property
    def num_logprobs(self) -> int | None:
        """From the fields `logprobs` and `top_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def reasoning_budget(self) -> int | None:
        """The field `thinking_token_budget`."""
        return self.thinking_token_budget

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is allowed only with logprobs true", "top_logprobs")
        return self


class TokenizeBody(ChatSwitches):
    """POST /tokenize: a prompt as completions reads it, or messages as chat renders them."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None


class AbortBody(Strict):
    """POST /abort_request."""

    rid: RequestId | None = None
    abort_all: bool | None = None


class DetokenizeBody(Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_IDS), FailFast()]
    skip_special_tokens: bool | None = None
