"""Reasoning effort: a text right after BOS, in thinking mode only.

The same checkpoint format has two contracts, which give the same names of tiers other texts. Nothing in config.json
tells them apart, so the encoder that ships with the checkpoint is read (as text; it is never run).
"""

from __future__ import annotations

import logging
from pathlib import Path

from dsv4serve.config import EffortContract
from dsv4serve.types import CheckpointError

logger = logging.getLogger(__name__)

MAX_ENCODER_BYTES = 1 << 20

_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum \u2014 exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
TEXTS = {
    EffortContract.PREVIEW: {"low": "", "high": "", "max": _ABSOLUTE},
    EffortContract.SINCE_0731: {"low": "", "high": _ABSOLUTE, "max": _BEYOND},
}
_TIERS = {
    EffortContract.PREVIEW: {"xhigh": "max", "max": "max", "ultra": "max"},
    EffortContract.SINCE_0731: {"minimal": "low", "low": "low", "max": "max", "ultra": "max"},
}


def effort_tier(effort: str | None, contract: EffortContract) -> str:
    """The tier (low, high, max) of an API value: none, minimal, low, medium, high, xhigh, max, ultra, or absent."""
    return _TIERS[contract].get(effort or "", "high")


def effort_text(effort: str | None, contract: EffortContract) -> str:
    """What an API value puts in front of the system text. Chat mode has no such text."""
    return TEXTS[contract][effort_tier(effort, contract)]


def resolve_contract(setting: EffortContract, directory: Path) -> EffortContract:
    """`setting`, or for AUTO what the checkpoint in `directory` says.

    Where it says nothing the answer is PREVIEW: its default adds no text, while the default of 0731 is a long demand
    that makes a preview checkpoint think until its answers are cut off.
    """
    if setting is not EffortContract.AUTO:
        return setting
    found = detect_contract(directory)
    if found is None:
        logger.info("no effort contract in %s/encoding; --effort-contract preview is assumed", directory)
    return found or EffortContract.PREVIEW


def detect_contract(directory: Path) -> EffortContract | None:
    """The contract of the checkpoint in `directory`, by the names in encoding/encoding_dsv4.py; None without them.

    Raises CheckpointError when the file is there but cannot be read.
    """
    path = directory / "encoding" / "encoding_dsv4.py"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_ENCODER_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if b"REASONING_EFFORT_PROMPTS" in text:
        return EffortContract.SINCE_0731
    return EffortContract.PREVIEW if b"REASONING_EFFORT_MAX" in text else None
