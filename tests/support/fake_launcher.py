"""`dsv4serve launch` with the counting runner and the fake frontend: python -m support.fake_launcher JSON [BUILDER]."""

import asyncio
import json
import sys

from dsv4serve.config import load_engine_config
from dsv4serve.engine.supervisor import Supervisor
from dsv4serve.obs.logging import configure


async def main(settings, builder="build"):
    runner = f"support.counting_runner:{builder}"
    return await Supervisor(load_engine_config(settings), runner=runner, frontend_module="support.fake_frontend").run()


if __name__ == "__main__":
    configure("launcher", "info")
    sys.exit(asyncio.run(main(json.loads(sys.argv[1]), *sys.argv[2:])))
