"""The nouns: request, sampling parameters, scheduler and step output, finish reason, the error tree. No torch."""

from dsv4serve.types.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    Dsv4Error,
    EngineUnavailable,
    InvalidRequest,
    KernelUnavailable,
    ModelNotFound,
    QueueFull,
    ShuttingDown,
)
from dsv4serve.types.request import Constraint, FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from dsv4serve.types.step import (
    PAGE_TOKENS,
    Chunk,
    PageAppend,
    SchedulerOutput,
    SlotStart,
    StepOutput,
    TailSnapshot,
    Verify,
)

__all__ = [
    "PAGE_TOKENS",
    "CapacityError",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "Constraint",
    "Dsv4Error",
    "EngineUnavailable",
    "FinishReason",
    "InvalidRequest",
    "KernelUnavailable",
    "ModelNotFound",
    "PageAppend",
    "QueueFull",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "SchedulerOutput",
    "ShuttingDown",
    "SlotStart",
    "StepOutput",
    "TailSnapshot",
    "TokenLogprobs",
    "Verify",
]
