"""Where NaN and infinite values begin: looks behind each operation of each layer, on demand (`--check-numerics`)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Sentinel:
    """An observer that remembers the first operation of a step whose output is not finite.

    Each name is logged once; a model that is broken would fill the disk otherwise.
    """

    def __init__(self) -> None:
        self.first = ""  # of this step; the runner clears it
        self._logged: set[str] = set()

    def __call__(self, name: str, value: Tensor) -> None:
        """Look at the output of operation `name`, one row per row of the step; ids are not looked at."""
        if self.first or not value.is_floating_point():
            return
        is_wrong = ~torch.isfinite(value).flatten(1).all(1)
        if not bool(is_wrong.any()):
            return
        self.first = name
        if name not in self._logged:
            self._logged.add(name)
            rows = is_wrong.nonzero().squeeze(1).tolist()
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinite values"
            logger.error(
                "%s in the output of %s: %d of %d rows, the first is row %d of the step; all before it is finite",
                *(kind, name, len(rows), len(value), rows[0]),
            )
