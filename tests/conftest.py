"""One torch thread per process: two on two shared cores are many times slower."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

GOLDEN = Path(__file__).parent / "golden"
