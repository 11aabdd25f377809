"""One torch thread per process: two on two shared cores are many times slower."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # `support` and `tools`

GOLDEN = Path(__file__).parent / "golden"
