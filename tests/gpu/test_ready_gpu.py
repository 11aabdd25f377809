"""An engine on a GPU in a process of its own: when it is ready, and that nothing is compiled afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
READY_S = 60  # from the process's start, with the kernels of an earlier one in the cache


def serve(**settings):
    """What tests/support/all_kinds.py prints."""
    command = [sys.executable, "-m", "support.all_kinds", json.dumps({"device": "cuda", **settings})]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, sys.path)])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("settings", [{"num_draft_tokens": 2}, {"deterministic": True}], ids=str)
def test_requests_of_all_kinds_need_no_kernel_that_start_up_has_not_made(settings):
    """The first process fills the cache if it is empty; the second one only loads."""
    for is_warm in (False, True):
        found = serve(**settings)
        assert found["serving"] == {"compiled": 0, "loaded": 0}
        assert found["start-up"]["compiled"] + found["start-up"]["loaded"] > 50
        assert found["num_tokens"] > 0
        assert "num_draft_tokens" not in settings or found["num_verifies"] > 0
        if is_warm:
            assert found["start-up"]["compiled"] == 0
            assert found["ready_s"] < READY_S
