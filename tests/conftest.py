"""What every test needs before its first import."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: there is no GPU

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # `support` and `tools`

GOLDEN = Path(__file__).parent / "golden"
