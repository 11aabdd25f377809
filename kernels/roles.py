"""What Gluon kernels whose warps have roles share: names that differ between Triton 3.6 and 3.9."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

meet = getattr(gl, "barrier", None) or gl.thread_barrier  # of the warps of one role


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def seen_as(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory as another tensor of as many bytes."""
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)

else:

    @gluon.jit
    def seen_as(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """Shared memory as another tensor of as many bytes."""
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)
