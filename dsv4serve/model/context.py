"""What a layer needs of the step it runs in: positions, and where keys come from.

Two implementations: `model.whole.WholeSequence` (one sequence, no cache: the oracle, also used for training) and
`runner.paged.PagedStep` (a ragged batch over the paged cache). The network is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from dsv4serve.model.attention import Attention

Observer = Callable[[str, Tensor], None]  # receives named intermediate values


@dataclass(frozen=True)
class AttentionInputs:
    """Projections of one layer's input rows, before anything is looked up. None where the layer's ratio has none, and
    index_q and index_weights where nothing has to be chosen."""

    q: Tensor  # [rows, heads, head_dim], normed, with RoPE
    kv: Tensor  # [rows, head_dim], normed, with RoPE, not yet quantised
    compress: Tensor | None = None  # f32 [rows, 2 * coff * head_dim]: kv | gate with ape
    index_q: Tensor | None = None  # [rows, index_heads, index_dim], RoPE, Hadamard, quantisation done
    index_weights: Tensor | None = None  # [rows, index_heads]
    index_compress: Tensor | None = None  # f32 [rows, 4 * index_dim]: kv | gate with ape


class StepContext(Protocol):
    """The step as seen by the network."""

    @property
    def positions(self) -> Tensor:
        """int64 [rows], position of each row in its sequence."""

    def rope(self, frequencies: Tensor) -> Tensor:
        """Rotations complex64 [rows, rope_dim / 2] at `positions`; computed once a step per table."""

    def must_select(self, top_k: int) -> bool:
        """True when some row sees more than `top_k` C4 entries, so that the indexer has to choose."""

    def attend(self, layer: Attention, inputs: AttentionInputs) -> Tensor:
        """Store the rows' keys, compress, select, attend: [rows, heads, head_dim], inverse RoPE applied."""

    def observe(self, name: str, value: Tensor) -> None:
        """Called with named intermediate values (layer outputs, selections); tests and checks listen."""
