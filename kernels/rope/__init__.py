"""Rotary embedding: frequency tables (plain and YaRN), rotations per position, their application and inverse."""

from dsv4_kernels.rope.reference import apply_rope, rope_frequencies, rope_table

__all__ = ["apply_rope", "rope_frequencies", "rope_table"]
