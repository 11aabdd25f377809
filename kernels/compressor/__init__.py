"""Compression of raw KV rows into C4 and C128 entries (docs/model.md section 5).

`pool_sequence` is the oracle over a whole sequence; `pool_c4` reads the eight raw rows of each closing entry from the
slot's state ring; `online_update` is the C128 running softmax, exact up to float32 association. `finish` turns pooled
values into an entry. All accept zero entries. On a GPU, `dsv4_kernels.compressor.triton` does all of it and the store
in one launch.
"""

from dsv4_kernels.compressor.reference import finish, online_update, pool_c4, pool_sequence

__all__ = ["finish", "online_update", "pool_c4", "pool_sequence"]
