"""What a device can do that decides which kernel it gets."""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether `device` is an H100, an H200 or another GPU of that generation."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor run at once; one where none is."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
