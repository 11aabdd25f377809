"""The contract between scheduler and runner: what one step runs, and what came out.

The runner keeps per-slot state (page table, number of computed tokens, last sampled token, sampling
parameters), so a step of nothing but decodes is a list of slot numbers. Other ranks get the same message.
"""

from __future__ import annotations

import msgspec

from dsv4serve.types.request import SamplingParams, TokenLogprobs

PAGE_TOKENS = 256  # token positions per page; a multiple of both compression ratios, fixed by the row addressing


class SlotStart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A slot begins (or, after a retraction, begins again) to serve a request.

    The slot's state is initialised, or restored from `tail` when the prefix cache had one.
    """

    slot: int
    request_id: str
    sampling: SamplingParams
    num_computed_tokens: int = 0  # multiple of PAGE_TOKENS; > 0 only with a tail
    tail: int = -1  # tail to restore from; -1 = none
    num_prompt_tokens: int
    num_output_tokens: int = 0  # tokens already generated before a retraction; the sampler continues from here
    token_ids: list[int] = []  # prompt and these outputs, if sampling.needs_history


class PageAppend(msgspec.Struct, frozen=True):
    """`pages` are appended to the page table of `slot`."""

    slot: int
    pages: list[int]


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one request whose ids the scheduler knows: prefill, or re-prefill after a retraction.

    They take positions num_computed_tokens .. + len(token_ids). With `samples` the last row's logits choose
    the next token (the chunk completes the known tokens).
    """

    slot: int
    token_ids: list[int]
    samples: bool


class Verify(msgspec.Struct, frozen=True):
    """A decode with `num_draft_tokens` >= 1 drafts behind the token that the slot sampled last.

    The runner makes the drafts, and the slot advances by one position and one more for each draft that is accepted. All
    of them lie on pages that the slot has, and before the next page boundary.
    """

    slot: int
    num_draft_tokens: int


class TailSnapshot(msgspec.Struct, frozen=True):
    """After the step, copy the slot's window, C4 rows and stream vector to `tail`.

    The slot then stands exactly at a page boundary.
    """

    slot: int
    tail: int


class SchedulerOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One step. The runner applies starts, then page_appends, makes the drafts, runs chunks, decodes and verifies as
    one ragged batch, samples, and then takes the snapshots."""

    step_id: int
    starts: list[SlotStart] = []
    page_appends: list[PageAppend] = []
    chunks: list[Chunk] = []
    decodes: list[int] = []  # slots whose input is the token they sampled last
    verifies: list[Verify] = []  # the same with drafts; a slot is in one of both
    snapshots: list[TailSnapshot] = []

    @property
    def num_tokens(self) -> int:
        """Rows of this step's forward."""
        num_tokens = len(self.decodes) + sum(len(chunk.token_ids) for chunk in self.chunks)
        return num_tokens + sum(1 + verify.num_draft_tokens for verify in self.verifies)


class StepOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a step sampled: `token_ids[i]` are the new tokens of `slots[i]`: one, and the accepted drafts before
    it."""

    step_id: int
    prepare_s: float = 0.0  # seconds before the forward: slots, tails, the batch's tensors
    sample_s: float = 0.0  # seconds after the logits were there
    slots: list[int] = []
    token_ids: list[list[int]] = []
    num_nonfinite_drafts: int = 0  # drafts whose logits had NaN or infinite values
    first_nonfinite: str = ""  # the first operation whose output had some, where that is checked
    num_shadow_rows: int = 0  # rows whose logits were compared with those of the reference kernels,
    num_shadow_flips: int = 0  # of these, rows with another best token,
    shadow_drift: float = 0.0  # and the norm of the difference / the norm of the reference's logits
    logits: dict[int, list[bytes]] = {}  # slot -> float32 rows, one per new token, where asked for
    errors: dict[int, str] = {}  # slot -> why its request cannot go on, for the client
    prompt_logits: dict[int, list[bytes]] = {}  # slot -> float32 rows of this chunk's wanted prompt tokens
    logprobs: dict[int, list[TokenLogprobs]] = {}  # slot -> one per new token, where asked for
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # slot -> of the prompt tokens that follow this chunk's rows
