"""The engine process: `python -m dsv4serve.engine.process`, started by the supervisor."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from dsv4serve.config import DraftMode, EngineConfig
from dsv4serve.engine.core import EngineCore
from dsv4serve.engine.messages import EngineInfo
from dsv4serve.engine.runner_protocol import Runner
from dsv4serve.engine.spawn import ProcessSpec, die_with_parent
from dsv4serve.obs.acceptance import AcceptanceWatch
from dsv4serve.obs.kernels import START_UP, kernels
from dsv4serve.obs.logging import configure
from dsv4serve.scheduler import Scheduler
from dsv4serve.scheduler.drafts import DraftPolicy
from dsv4serve.types import Dsv4Error

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM (exit code 0). 2 = wrong configuration or checkpoint, 1 = the engine failed."""
    spec = ProcessSpec.from_environment()
    die_with_parent(spec.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = spec.engine_config()
    configure("engine", config.log_level, config.log_format, in_thread=True)
    # Read by the tensor library when the runner's module imports it.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(config.threads)
    try:
        core = build_core(spec.endpoint, config, load_factory(spec.runner))
    except Dsv4Error as error:
        print(f"dsv4serve: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    signal.signal(signal.SIGTERM, lambda *_: core.stop())
    signal.set_wakeup_fd(core.wake_fd, warn_on_full_buffer=False)
    # Weights and code live as long as the process: the collector need not look at them again.
    gc.collect()
    gc.freeze()
    try:
        core.run()
    except Exception:
        logger.exception("the engine failed")
        return 1
    finally:
        signal.set_wakeup_fd(-1)
        core.close()
    return 0


def load_factory(name: str) -> Callable[[EngineConfig], Runner]:
    """The function that `name` (module:function) stands for."""
    module, _, function = name.partition(":")
    factory: Callable[[EngineConfig], Runner] = getattr(importlib.import_module(module), function)
    return factory


def build_core(endpoint: str, config: EngineConfig, build_runner: Callable[[EngineConfig], Runner]) -> EngineCore:
    """Runner, its scheduler, and the loop that drives them, bound to `endpoint`."""
    runner = build_runner(config)
    scheduler = build_scheduler(config, runner)
    info = EngineInfo(
        model_path=str(config.model),
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        eos_token_id=runner.eos_token_id,
        numerics=config.numerics.value,
        num_slots=runner.num_slots,
        num_pages=runner.num_pages,
        num_tails=runner.num_tails,
    )
    made = kernels.phases[START_UP]
    logger.info(
        "engine ready %.1f s after its start, kernels: %d compiled and %d loaded from the cache in %.1f s; %s",
        kernels.ready_s, made.compiled, made.loaded, made.seconds, info,
    )  # fmt: skip
    watch = None
    if config.num_draft_tokens:
        watch = AcceptanceWatch(config.num_draft_tokens, config.accept_rate_reference)
    return EngineCore(endpoint, scheduler, runner, info, watch)


def build_scheduler(config: EngineConfig, runner: Runner) -> Scheduler:
    """A scheduler of the runner's sizes."""
    return Scheduler(
        num_slots=runner.num_slots,
        num_pages=runner.num_pages,
        num_tails=runner.num_tails,
        max_model_len=runner.max_model_len,
        max_step_tokens=config.max_step_tokens,
        eos_token_id=runner.eos_token_id,
        prefix_cache=config.prefix_cache,
        max_waiting=config.max_waiting_requests,
        ageing_s=config.priority_ageing_s,
        drafts=_draft_policy(config, runner),
    )


def _draft_policy(config: EngineConfig, runner: Runner) -> DraftPolicy | None:
    if not config.num_draft_tokens:
        return None
    return DraftPolicy(config.num_draft_tokens, config.draft_mode is DraftMode.ADAPTIVE, runner.may_draft)


if __name__ == "__main__":
    sys.exit(main())
