"""Rotary embedding: frequency tables (plain and YaRN), rotations per position, their application and inverse."""

from dsv4_kernels.cpu import preferred
from dsv4_kernels.rope import cpu, reference
from dsv4_kernels.rope.reference import rope_frequencies, rope_table

__all__ = ["apply_rope", "rope_frequencies", "rope_table"]

apply_rope = preferred(cpu.apply_rope, reference.apply_rope)
