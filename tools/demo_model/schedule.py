"""The recipe: phases of training and the learning rate, by share of all steps."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4serve.config import ExpertActivations

# Modules of builders/.
CATEGORIES = ("stories", "facts", "arithmetic", "tools", "json_answers", "recall", "copying", "small_talk", "natural")
STEP_TOKENS = 131072
MICRO_BATCHES = 2  # parts of a step, so that it fits one 80 GB card, or two cards share it
RATE = 4e-3  # peak learning rate
WARM_UP = 150  # steps
DECAY = 0.5  # over the last so much of all steps the rate falls linearly to zero


@dataclass(frozen=True)
class Phase:
    """From this share of all steps on: sequence length, what C4 layers see, whether weights are rounded, which mix, and
    what the routed experts' inputs are rounded to, the parts of a step in turn."""

    start: float
    length: int
    select: bool
    round_weights: bool
    mix: str
    activations: tuple[ExpertActivations, ...] = (ExpertActivations.FP8,)


# So that W4A4 serves a model that has seen such inputs.
BOTH = (ExpertActivations.FP8, ExpertActivations.FP4)
PHASES = (
    Phase(0.0, 1024, select=False, round_weights=False, mix="base"),
    Phase(0.4, 1024, select=True, round_weights=True, mix="base"),
    Phase(0.6, 4096, select=True, round_weights=True, mix="tools", activations=BOTH),
)


def phase_at(step: int, steps: int) -> Phase:
    """The phase of a step."""
    return [phase for phase in PHASES if phase.start * steps <= step][-1]


def rate_at(step: int, steps: int, first: int = 0) -> float:
    """Learning rate of a step: warm-up from step `first` on, constant, linear to zero."""
    return RATE * min(1.0, (step + 1 - first) / WARM_UP, (steps - step) / (DECAY * steps))
