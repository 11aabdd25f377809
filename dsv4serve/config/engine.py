"""Engine choices: one class whose fields are CLI flags, DSV4_* environment variables and YAML recipe keys.

`dsv4serve launch --max-running-requests 8`, `DSV4_MAX_RUNNING_REQUESTS=8` and `max_running_requests: 8` in
a recipe are the same setting; flags win over the environment, the environment over the recipe. An unknown
key anywhere is an error.
"""

from __future__ import annotations

import importlib.resources
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from dsv4serve.types import ConfigError


class Numerics(StrEnum):
    """How numbers are computed."""

    EXACT = "exact"  # float32 everywhere, no quantisation: the mathematics of the paper
    OFFICIAL = "official"  # BF16 activations and every quantisation point of the official code


class ExpertActivations(StrEnum):
    """What the products of the routed experts take, whose weights are FP4. Only in `official` numerics."""

    BF16 = "bf16"  # W4A16: nothing is rounded
    FP8 = "fp8"  # W4A8: E4M3 per 128, what the official code does and the models were trained with
    FP4 = "fp4"  # W4A4: E2M1 per 32, for tensor cores that multiply FP4 by FP4


class EffortContract(StrEnum):
    """What reasoning_effort means to a checkpoint; its config.json does not say."""

    AUTO = "auto"  # as the encoder in the checkpoint's folder says, preview without one
    PREVIEW = "preview"  # the V4 checkpoints of April 2026
    SINCE_0731 = "0731"  # V4-Flash-0731, V4-Pro-0813


class Device(StrEnum):
    """What computes."""

    CPU = "cpu"
    CUDA = "cuda"  # one GPU, by the Triton kernels


class DraftMode(StrEnum):
    """How many drafts a step verifies, up to num_draft_tokens."""

    FIXED = "fixed"  # always as many
    ADAPTIVE = "adaptive"  # by the measured acceptance and by how many requests decode


class LoadFormat(StrEnum):
    """Where weights come from."""

    SAFETENSORS = "safetensors"
    DUMMY = "dummy"  # random weights of the right scale for any config.json; needs no weight files


def default_model() -> Path:
    """The checkpoint that ships inside the package."""
    return Path(str(importlib.resources.files("dsv4serve_configs"))) / "models" / "demo"


class EngineConfig(BaseSettings):
    """Everything that can be chosen at launch. Sizes are bytes or tokens, durations seconds."""

    model_config = SettingsConfigDict(env_prefix="DSV4_", extra="forbid", frozen=True, env_ignore_empty=True)

    model: Annotated[Path, Field(description="checkpoint folder", default_factory=default_model)]
    served_model_name: Annotated[str, Field(description="model name in the API; empty = the folder's name")] = ""
    model_alias: Annotated[
        tuple[str, ...],
        Field(description="other names that mean the served model, such as claude-* (shell patterns); repeatable"),
    ] = ()
    load_format: Annotated[LoadFormat, Field(description="where weights come from")] = LoadFormat.SAFETENSORS
    device: Annotated[Device, Field(description="what computes: cpu, or cuda for one GPU (official numerics only)")] = (
        Device.CPU
    )
    numerics: Annotated[Numerics, Field(description="exact = float32, official = the released quantisation")] = (
        Numerics.OFFICIAL
    )
    expert_activations: Annotated[
        ExpertActivations, Field(description="inputs of the routed experts in official numerics; fp8 = as released")
    ] = ExpertActivations.FP8
    deterministic: Annotated[
        bool,
        Field(description="a request has the same bits alone and in any crowd; slower, --device cuda only"),
    ] = False
    effort_contract: Annotated[
        EffortContract, Field(description="texts of reasoning_effort; auto = by the checkpoint's encoding folder")
    ] = EffortContract.AUTO
    developer_role: Annotated[
        str, Field(pattern="^(system|user)$", description="developer messages are system text, or user turns")
    ] = "system"
    default_thinking: Annotated[bool, Field(description="the model thinks where a request does not say")] = True
    host: Annotated[str, Field(description="address the HTTP server binds")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port of the HTTP server; 0 = any free one")] = 8000
    frontends: Annotated[int, Field(ge=1, le=64, description="HTTP frontend processes")] = 1
    api_key: Annotated[
        tuple[str, ...], Field(repr=False, description="accepted API keys; none = open; repeatable")
    ] = ()
    api_key_file: Annotated[
        tuple[Path, ...], Field(description="files with more API keys, one a line; repeatable")
    ] = ()
    admin_api_key: Annotated[
        str, Field(repr=False, description="key that may also abort everything and flush the cache; empty = none")
    ] = ""
    cors_origin: Annotated[
        tuple[str, ...], Field(description="origins whose pages may call the API from a browser; repeatable")
    ] = ()
    page: Annotated[bool, Field(description="serve the playground at /; its calls need a key like any other")] = True
    max_model_len: Annotated[
        int, Field(ge=0, description="tokens, prompt + output of one request; 0 = what model and memory allow")
    ] = 0
    max_running_requests: Annotated[int, Field(ge=1, le=16384, description="requests that run at once (slots)")] = 16
    max_waiting_requests: Annotated[int, Field(ge=1, description="requests that may wait before 429")] = 1024
    max_step_tokens: Annotated[
        int, Field(ge=256, description="tokens, rows of one forward step (prefill chunk budget)")
    ] = 1024
    cache_bytes: Annotated[
        int, Field(ge=0, description="bytes for slots, pages and tails; 0 = a share of free memory")
    ] = 0
    memory_fraction: Annotated[
        float, Field(gt=0, lt=1, description="share of free memory taken when cache_bytes is 0")
    ] = 0.25
    num_draft_tokens: Annotated[
        int,
        Field(ge=0, le=4, description="drafts of the MTP block that a step verifies per request; 0 = no speculation"),
    ] = 0
    draft_mode: Annotated[
        DraftMode, Field(description="fixed = always num_draft_tokens, adaptive = fewer where they do not pay")
    ] = DraftMode.ADAPTIVE
    accept_rate_reference: Annotated[
        float, Field(ge=0, lt=1, description="accept rate of first drafts to warn below; 0 = the server's own history")
    ] = 0.0
    check_numerics: Annotated[
        bool, Field(description="look for NaN and infinite values behind each operation of each layer; slow")
    ] = False
    shadow_steps: Annotated[
        int, Field(ge=0, description="every so many steps one is compared with the reference kernels; 0 = none")
    ] = 0
    prefix_cache: Annotated[bool, Field(description="reuse the KV of earlier prompts")] = True
    priority_ageing_s: Annotated[
        float, Field(gt=0, description="seconds of waiting that lift a request by one priority level")
    ] = 10.0
    high_priority_first: Annotated[
        bool, Field(description="requests with a higher priority run first, instead of those with a lower one")
    ] = False
    max_body_bytes: Annotated[int, Field(ge=1024, description="bytes, largest HTTP body accepted (413 above)")] = (
        32 << 20
    )
    request_timeout_s: Annotated[
        float, Field(ge=0, description="seconds after which a request ends with finish_reason abort; 0 = never")
    ] = 0.0
    stuck_restart_s: Annotated[
        float, Field(ge=0, description="seconds after which an engine that does not answer is restarted; 0 = never")
    ] = 60.0
    drain_timeout_s: Annotated[
        float, Field(ge=0, description="seconds that running requests get after SIGTERM before they are aborted")
    ] = 60.0
    threads: Annotated[int, Field(ge=1, description="CPU threads of the engine's tensor library")] = 1
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$", description="log level")] = "info"
    log_format: Annotated[str, Field(pattern="^(text|json)$", description="lines of text, or a JSON object a line")] = (
        "text"
    )
    otlp_endpoint: Annotated[
        str, Field(description="URL that takes OpenTelemetry traces, such as http://host:4318/v1/traces; empty = none")
    ] = ""

    @field_validator("expert_activations")
    @classmethod
    def _only_where_something_is_rounded(cls, value: ExpertActivations, info: ValidationInfo) -> ExpertActivations:
        if value is not ExpertActivations.FP8 and info.data.get("numerics") is Numerics.EXACT:
            raise ValueError("only for --numerics official, because exact numerics round nothing")
        return value

    @field_validator("deterministic")
    @classmethod
    def _only_where_rows_have_their_own_sums(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("device") is Device.CPU:
            raise ValueError(
                "only for --device cuda, because torch's products on a CPU add up a row in an order that depends on "
                "how many rows there are"
            )
        return value

    @property
    def model_name(self) -> str:
        """The name under which the API serves the model."""
        return self.served_model_name or self.model.resolve().name

    def read_api_keys(self) -> list[str]:
        """The keys of `api_key` and of the files. Raises ConfigError for a file that has none or cannot be read."""
        keys = list(self.api_key)
        for path in self.api_key_file:
            try:
                lines = path.read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file {path}: {error}") from None
            if not lines:
                raise ConfigError(f"api_key_file {path}: there is no key in it")
            keys += lines
        return keys


def load_engine_config(flags: dict[str, Any] | None = None, recipe: Path | None = None) -> EngineConfig:
    """Merge defaults < `recipe` (YAML) < DSV4_* environment < `flags`.

    Raises ConfigError that names every wrong key with what is allowed.
    """
    known = EngineConfig.model_fields
    prefix = EngineConfig.model_config["env_prefix"]
    strangers = sorted(
        name for name in os.environ if name.startswith(prefix) and name[len(prefix) :].lower() not in known
    )
    if strangers:
        allowed = ", ".join(prefix + name.upper() for name in known)
        raise ConfigError(f"unknown environment variables {', '.join(strangers)}; known: {allowed}")
    try:
        environment = EnvSettingsSource(EngineConfig)()
        return EngineConfig(**{**_read_recipe(recipe), **environment, **(flags or {})})
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None
    except SettingsError as error:  # only lists can be unreadable
        raise ConfigError(f'environment: {error}; a list is written as JSON: DSV4_API_KEY=["KEY"]') from None


def _read_recipe(recipe: Path | None) -> dict[str, Any]:
    if recipe is None:
        return {}
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {recipe}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"recipe {recipe}: expected a mapping of setting names to values")
    return values


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; known: {', '.join(EngineConfig.model_fields)}"
    got = "" if "api_key" in name else f" (got {item['input']!r})"
    return f"{name}: {item['msg']}{got}"
