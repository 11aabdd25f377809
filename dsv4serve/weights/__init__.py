"""Checkpoint index to verified parameters; converters; dummy weights."""

from dsv4serve.weights.dummy import dummy_weights
from dsv4serve.weights.export import write_checkpoint
from dsv4serve.weights.halve import halve
from dsv4serve.weights.index import CheckpointIndex, verify
from dsv4serve.weights.inventory import TensorSpec, inventory
from dsv4serve.weights.loader import load_weights
from dsv4serve.weights.reader import CheckpointReader

__all__ = [
    "CheckpointIndex",
    "CheckpointReader",
    "TensorSpec",
    "dummy_weights",
    "halve",
    "inventory",
    "load_weights",
    "verify",
    "write_checkpoint",
]
