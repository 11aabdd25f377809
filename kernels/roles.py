"""What Gluon kernels whose warps have roles share: barriers, and names that differ between Triton 3.6 and 3.9."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

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


@gluon.jit
def buffer_barriers(NUM: gl.constexpr):
    """Two barriers for each of NUM buffers, one arrival a phase: that it is full, and that it is empty again."""
    full = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(NUM):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=1)
    fence_async_shared()
    return full, empty
