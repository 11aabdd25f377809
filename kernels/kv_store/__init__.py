"""Row formats of the compressed KV cache, and the writes into it.

Main row (`Format.KV_FP8`, 584 B at head_dim 512): nope values in e4m3 with one ue8m0 scale per 64, rope values in
bf16 (docs/model.md section 9: bit-equal to the official simulation). Indexer rows: FP4
(68 B at dim 128, official) or FP8 (132 B). `Format.F32` holds unrounded values for the `exact` numerics.

All functions are pure but for `store`, which writes only the named rows. Zero rows are accepted everywhere.
"""

from dsv4_kernels.kv_store.reference import Format, Planes, RowFormat, decode, encode, load, store, take_rows

__all__ = ["Format", "Planes", "RowFormat", "decode", "encode", "load", "store", "take_rows"]
