"""Engine processes, clients and requests for the tests of dsv4serve.engine."""

import asyncio
import contextlib
import os
import subprocess
import time

import psutil
from support.counting_runner import expected_token

from dsv4serve.config import EngineConfig
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.spawn import ProcessSpec, command, config_values
from dsv4serve.types import FinishReason, Request, SamplingParams


class EngineProcess:
    """Engine processes of the counting runner, one after the other on the same endpoint."""

    def __init__(self, endpoint, builder="build"):
        self.endpoint, self.runner = endpoint, f"support.counting_runner:{builder}"
        self.process = None

    def start(self, **settings):
        spec = ProcessSpec(
            config=config_values(EngineConfig(**settings)),
            endpoint=self.endpoint,
            parent_pid=os.getpid(),
            runner=self.runner,
        )
        self.process = subprocess.Popen(
            command("dsv4serve.engine.process"), env=spec.environment(), stderr=subprocess.PIPE, text=True
        )
        return self.process

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@contextlib.asynccontextmanager
async def connected(endpoint, **settings):
    """A client that is ready."""
    client = EngineClient(endpoint, **settings)
    await client.start()
    try:
        async with asyncio.timeout(20):
            await client.wait_ready()
        yield client
    finally:
        await client.close()


def request(request_id, prompt=(5, 6, 7), max_tokens=5, **fields):
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=request_id, prompt_ids=list(prompt), sampling=sampling, **fields)


async def collect(client, asked):
    """All outputs of a request, and the proof that the last and only the last has a finish_reason."""
    async with asyncio.timeout(20):
        outputs = [output async for output in client.submit(asked)]
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {asked.request_id}
    return outputs


def tokens(outputs):
    return [token for output in outputs for token in output.token_ids]


def assert_complete(outputs, asked):
    """It ran to its length with the right tokens."""
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    first = len(asked.prompt_ids)
    assert tokens(outputs) == [expected_token(first + i) for i in range(asked.sampling.max_tokens)]


def wait_gone(pids, timeout_s=10):
    """Return when none of the processes runs any more (a zombie that nobody has collected does not run)."""
    deadline = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
