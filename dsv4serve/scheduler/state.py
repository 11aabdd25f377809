"""What the scheduler knows of one request."""

from __future__ import annotations

from dsv4serve.cache import extend_keys
from dsv4serve.types import PAGE_TOKENS, Request, TokenLogprobs, Verify


class RequestState:
    """A request between admission to the queue and its end.

    The lower half describes one run in a slot; `reset_run` starts it afresh (first admission, after a retraction).
    """

    __slots__ = (
        "added_at",
        "cache_salt",
        "event",
        "first_step",
        "keys",
        "last_computed",
        "max_length",
        "may_draft",
        "min_length",
        "num_cached",
        "num_computed",
        "num_known",
        "num_prompt",
        "num_unseen",
        "order",
        "pages",
        "pending_tail",
        "prompt_logits",
        "prompt_logprobs",
        "request_id",
        "sampling",
        "slot",
        "started_at",
        "stop_ids",
        "stops",
        "tail_tokens",
        "tokens",
        "was_retracted",
    )

    def __init__(
        self,
        request: Request,
        order: tuple[float, int],
        max_length: int,
        eos_token_id: int,
        may_draft: bool,
    ) -> None:
        sampling, self.may_draft = request.sampling, may_draft
        self.request_id, self.sampling = request.request_id, sampling
        self.order = order  # smaller runs first and is retracted last
        self.tokens = list(request.prompt_ids)  # prompt and outputs: what is known
        self.keys: list[bytes] = []  # prefix-tree keys of the whole pages of tokens, made when needed
        self.cache_salt = request.cache_salt
        self.num_prompt = len(request.prompt_ids)
        self.max_length = max_length  # prompt and outputs at which it ends
        self.last_computed = max_length - 1  # the last token is sampled and never computed
        # A constraint that is complete leaves nothing but the end, which min_tokens must not ignore then.
        self.min_length = self.num_prompt + (sampling.min_tokens if sampling.constraint is None else 0)
        self.stop_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self.stop_ids.add(eos_token_id)
        self.num_cached: int | None = None  # prompt tokens found in the cache at the first admission, until reported
        self.added_at = 0.0  # by the scheduler's clock
        self.started_at: float | None = None  # when it first got a slot
        self.was_retracted = False  # and waits for a slot again
        self.reset_run()

    def reset_run(self) -> None:
        """No slot, nothing computed."""
        self.slot = -1
        self.first_step = 0  # results of steps before it belong to the slot's previous owner
        self.pages: list[int] = []
        self.num_computed = 0  # positions computed once all planned steps have run, if no unseen draft is accepted
        self.num_unseen = 0  # drafts whose result is not there yet
        self.num_known = 0  # tokens that were known at the start of the run: prefill up to here
        self.stops: list[int] = []  # page boundaries at which prefill stops for a tail, ascending
        self.event = 0  # decode needs care when num_computed reaches this: a page boundary or the end
        self.pending_tail = -1  # a tail not in the tree yet, taken behind tail_tokens tokens
        self.tail_tokens = 0
        self.prompt_logits: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprobs] = []

    def page_keys(self) -> list[bytes]:
        """The prefix-tree keys of all whole pages of what is known."""
        return extend_keys(self.keys, self.tokens, self.cache_salt)

    def next_event(self) -> int:
        """Positions at which decode needs care next: the end of the page or of the request."""
        return min((self.num_computed // PAGE_TOKENS + 1) * PAGE_TOKENS, self.last_computed)

    def until_stop(self, token_ids: list[int]) -> list[int]:
        """The first of several new tokens, up to one that ends the request: what was drafted behind it never was."""
        for index, token in enumerate(token_ids, start=1):
            if token in self.stop_ids and len(self.tokens) + index >= self.min_length:
                return token_ids[:index]
        return token_ids

    @property
    def must_wait(self) -> bool:
        """Whether the next decode could be the one that reaches `event`, which must not depend on unseen drafts."""
        return self.num_unseen > 0 and self.num_computed + self.num_unseen + 1 >= self.event

    @property
    def draft_room(self) -> int:
        """Drafts that the next decode may have, all unseen ones being accepted: it ends before the page boundary, and
        at max_length at the latest."""
        page_end = (self.num_computed // PAGE_TOKENS + 1) * PAGE_TOKENS
        return min(page_end - 2, self.last_computed - 1) - self.num_computed - self.num_unseen

    def verify(self, num_drafts: int) -> Verify:
        """Plan the next token with so many drafts."""
        self.num_computed += 1
        self.num_unseen += num_drafts
        return Verify(self.slot, num_drafts)

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether the whole prompt must be computed: its rows were asked for and are not sent yet."""
        wanted = self.sampling.num_prompt_logits > 0 or self.sampling.num_prompt_logprobs is not None
        return wanted and self.num_outputs == 0

    @property
    def num_pages_to_start(self) -> int:
        """Pages of the known tokens and of the position after them, where the next token will be computed."""
        return pages_of(min(len(self.tokens) + 1, self.max_length))


def pages_of(num_tokens: int) -> int:
    """Pages that hold `num_tokens` positions."""
    return -(-num_tokens // PAGE_TOKENS)
