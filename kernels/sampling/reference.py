"""Token sampling in plain torch. One uniform number per row, so a row's draw does not depend on its batch.

Order of a step: `token_logprobs` looks at the logits as the model gave them; then `penalise`, `add_bias` and `ban`
change them; then `sample` draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = (1 << 64) - 1
LOWEST = torch.finfo(torch.float32).min  # the logit of a banned token
FIRST_WIDTH = 256  # candidates that are sorted before all of them are
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: successive counters land far apart
MIXERS = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)  # of splitmix64: shift, then factor
DRAFT, COIN = 1, 2  # streams of `uniform`: which token a draft is, whether it is accepted


class NonFiniteLogits(ValueError):
    """A row of logits has no finite maximum; `rows` lists which."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"logits of rows {rows} are NaN or infinite")
        self.rows = rows


def _mix(value: int) -> int:
    """Finaliser of the splitmix64 generator: a bijection of 64-bit integers that spreads every bit."""
    for bits, factor in MIXERS:
        value = ((value ^ (value >> bits)) * factor) & MASK
    return value ^ (value >> 31)


def uniform(seed: int, index: int, stream: int = 0) -> float:
    """The number in [0, 1) that belongs to output `index` of a request with `seed`: a hash, no state.

    Streams are independent: 0 draws the token, the others what else has to be drawn for it (DRAFT, COIN).
    """
    start = _mix(seed & MASK)
    if stream:
        start = _mix(start ^ stream)
    return (_mix((start + (index + 1) * GOLDEN) & MASK) >> 11) * 2.0**-53


def uniforms(seeds: Tensor, indices: Tensor, stream: int = 0) -> Tensor:
    """`uniform` of int64 seeds and outputs, elementwise: float64 of their shape. A seed of 64 bits is the int64 of the
    same bits (`signed`); int64 products wrap, as the hash wants them to."""

    def mix(value: Tensor) -> Tensor:
        for bits, factor in MIXERS:
            value = (value ^ _shifted(value, bits)) * signed(factor)
        return value ^ _shifted(value, 31)

    start = mix(seeds)
    if stream:
        start = mix(start ^ stream)
    return _shifted(mix(start + (indices + 1) * signed(GOLDEN)), 11).double() * 2.0**-53


def _shifted(value: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: of int64 the sign would."""
    return (value >> bits) & (MASK >> bits)


def signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    value &= MASK
    return value - ((value >> 63) << 64)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of given and of the best tokens: log_softmax of the model's own logits, before penalties, bias,
    bans, temperature and filters.

    Args:
        logits: float32 [B, V]; token_ids: int64 [B]; num_top: at most V.

    Returns float32 [B] of `token_ids`, int64 [B, num_top] the ids of the largest logits, equal ones by ascending id,
    and float32 [B, num_top] of these. Sums are float64: over 129,280 tokens torch's float32 `log_softmax` is 2e-5 off.
    """
    top = logits.max(dim=-1, keepdim=True).values.double()
    masses = (logits.double() - top).exp_()
    total = top + masses.cumsum(-1)[:, -1:].log()  # a running sum, so that no row depends on its batch
    top_ids = _descending(logits, num_top)
    chosen, best = ((logits.gather(1, ids).double() - total).float() for ids in (token_ids.unsqueeze(1), top_ids))
    return chosen.squeeze(1), top_ids, best


def penalise(
    logits: Tensor,
    *,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Make tokens that a text has already less likely, in place: float32 logits [B, V]. What is finite stays finite.

    Args:
        rows, token_ids: int64 [N], the places of the tokens of prompt and output, none twice.
        counts: int64 [N], how often the output has the token; 0 for one of the prompt alone.
        repetition: float32 [N], > 0: the logit is divided by it if positive, else multiplied (Keskar et al. 2019).
        frequency, presence: float32 [N]: then frequency x count is taken off, and presence once where count > 0.
    """
    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition).clamp(LOWEST, -LOWEST)
    logits[rows, token_ids] = values - frequency * counts - presence * (counts > 0)


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """Add float32 values [N] in place at (rows, token_ids), int64 [N] each; a place named twice gets both."""
    logits.index_put_((rows, token_ids), values, accumulate=True)


def ban(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Give the tokens at (rows, token_ids), int64 [N] each, the lowest finite logit, in place.

    They are drawn only from a row that has nothing else left, so that bans and masks together cannot empty a row.
    """
    # A number on the right would be copied to the device, which waits for it.
    logits[rows, token_ids] = logits.new_full((), LOWEST)


def sample(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Draw one token per row: logits float32 [B, V] -> int64 [B].

    Args:
        temperature: float32 [B]; 0 = greedy (the lowest id among equal maxima).
        top_k: int64 [B], 0 = no limit; top_p, min_p: float32 [B].
        uniform: float64 [B] in [0, 1).

    Filters apply in this order: temperature, top-k, top-p (over what top-k kept, renormalised; the token that crosses
    top_p is kept), min-p (relative to the largest probability). The draw inverts the cumulative sum of what is left in
    descending order, equal probabilities by id; of a row without filters in the order of ids, which needs no sort.
    Raises NonFiniteLogits when a row's maximum is NaN or infinite.
    """
    top, greedy = _maximum(logits)
    is_greedy = temperature == 0
    if bool(is_greedy.all()):
        return greedy
    scaled = (logits - top.unsqueeze(1)) / torch.where(is_greedy, 1.0, temperature).unsqueeze(1)
    drawn = draw(scaled.exp(), uniform)
    rows = (_has_filter(logits.shape[1], top_k, top_p, min_p) & ~is_greedy).nonzero().squeeze(1)
    if rows.numel():
        drawn[rows] = _draw(scaled[rows], top_k[rows], top_p[rows].double(), min_p[rows], uniform[rows], FIRST_WIDTH)
    return torch.where(is_greedy, greedy, drawn)


def distribution(logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """What `sample` draws from: float32 [B, V], each row adds up to 1; all of a greedy row lies on its token.

    Same arguments, filters and errors as `sample`.
    """
    top, greedy = _maximum(logits)
    is_greedy = temperature == 0
    scaled = (logits - top.unsqueeze(1)) / torch.where(is_greedy, 1.0, temperature).unsqueeze(1)
    masses = scaled.exp()
    rows = (_has_filter(logits.shape[1], top_k, top_p, min_p) & ~is_greedy).nonzero().squeeze(1)
    if rows.numel():
        order = _descending(scaled[rows], logits.shape[1])
        _, num_kept, _ = _kept(scaled[rows], order, top_k[rows], top_p[rows].double(), min_p[rows])
        is_cut = torch.empty_like(order, dtype=torch.bool)
        is_cut.scatter_(1, order, torch.arange(logits.shape[1]) >= num_kept.unsqueeze(1))
        masses[rows] = masses[rows].masked_fill(is_cut, 0.0)
    masses[is_greedy] = torch.nn.functional.one_hot(greedy[is_greedy], logits.shape[1]).to(masses.dtype)
    return (masses / masses.sum(-1, keepdim=True, dtype=torch.float64)).float()


def _maximum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and the lowest id that has it. Raises NonFiniteLogits."""
    top, greedy = logits.max(dim=-1)
    if not bool(torch.isfinite(top).all()):
        raise NonFiniteLogits((~torch.isfinite(top)).nonzero().squeeze(1).tolist())
    return top, greedy


def _has_filter(vocab: int, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)


def draw(masses: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id per row, int64 [B], by the cumulative sum over ids.

    masses float32 [B, V] >= 0, not all of a row 0, in any unit; uniform float64 [B] in [0, 1).
    """
    cumulative = masses.cumsum(-1, dtype=torch.float64)  # a running sum, so that no row depends on its batch
    total = cumulative[:, -1:].contiguous()
    # Rounding may push the target onto the total; the last id with any probability then takes it.
    last = torch.searchsorted(cumulative, total)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)
    return torch.minimum(drawn, last).squeeze(1)


def _descending(scaled: Tensor, width: int) -> Tensor:
    """Ids of the `width` largest of each row, equal values by ascending id, int64 [B, width]."""
    bits = (scaled + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    last = scaled.shape[1] - 1
    keys = (ordered << 32) | (last - torch.arange(scaled.shape[1]))  # unique: value first, then the lower id
    return last - (keys.topk(width, dim=-1).values & 0xFFFFFFFF)


def _draw(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, width: int) -> Tensor:
    """Draw from rows of logits / temperature with maximum 0, float32 [B, V].

    What the filters keep is a prefix of the descending order, and it is short in practice. So only `width` candidates
    are sorted; rows whose answer may lie further are drawn again with all of them.
    """
    vocab = scaled.shape[1]
    width = min(width, vocab)
    order = _descending(scaled, width)
    probs, num_kept, cumulative = _kept(scaled, order, top_k, top_p, min_p)
    target = uniform * cumulative.gather(1, (num_kept - 1).unsqueeze(1)).squeeze(1)
    # Rounding may push the target onto the mass; the last kept token with any probability then takes it.
    last = torch.minimum(num_kept, (probs > 0).sum(-1)) - 1
    rank = torch.minimum((cumulative <= target.unsqueeze(1)).sum(-1), last)
    drawn = order.gather(1, rank.unsqueeze(1)).squeeze(1)
    if width < vocab:
        limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
        settled = (limit <= width) | ((limit == vocab) & (num_kept < width))
        rows = (~settled).nonzero().squeeze(1)
        if rows.numel():
            drawn[rows] = _draw(scaled[rows], top_k[rows], top_p[rows], min_p[rows], uniform[rows], width=vocab)
    return drawn


def _kept(scaled: Tensor, order: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the filters leave of the candidates `order`, the ids [B, width] of the largest in descending order.

    Returns masses float64 [B, width] relative to the largest, which is 1, how many of them stay int64 [B], and the
    cumulative masses.
    """
    vocab, width = scaled.shape[1], order.shape[1]
    total = scaled.exp().cumsum(-1, dtype=torch.float64)[:, -1]  # a running sum, so that no row depends on its batch
    probs = scaled.gather(1, order).exp().double()
    cumulative = probs.cumsum(-1)
    limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    limit_mass = cumulative.gather(1, (limit - 1).clamp(max=width - 1).unsqueeze(1)).squeeze(1)
    limit_mass = torch.where(limit == vocab, total, limit_mass)
    in_top_p = (cumulative - probs < (top_p * limit_mass).unsqueeze(1)) | (top_p >= 1).unsqueeze(1)
    num_kept = torch.minimum((in_top_p & (probs >= min_p.unsqueeze(1))).sum(-1), limit)
    return probs, num_kept.clamp_(min=1), cumulative
