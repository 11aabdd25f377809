"""SIGTERM, wrong checkpoints, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from support.server import serve, wait_until

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("frontends", ["1", "3"])
def test_sigterm_finishes_what_runs_and_refuses_what_is_new(frontends: str) -> None:
    with serve("--frontends", frontends) as server:
        body = {"model": "demo", "prompt": "x", "max_tokens": 150, "ignore_eos": True}

        async def run() -> tuple[list[httpx.Response], httpx.Response]:
            async with httpx.AsyncClient(timeout=60) as client:
                url = server.url + "/v1/completions"
                running = [asyncio.create_task(client.post(url, json=body)) for _ in range(6)]
                await asyncio.sleep(0.6)
                assert not any(task.done() for task in running)
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.4)
                refused = await client.post(url, json=body)
                return await asyncio.gather(*running), refused

        answers, refused = asyncio.run(run())
        assert [answer.status_code for answer in answers] == [200] * 6
        assert {answer.json()["choices"][0]["finish_reason"] for answer in answers} == {"length"}
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == 503
        assert server.process.wait(30) == 0


def test_drain_timeout_aborts_with_a_proper_end() -> None:
    with serve("--drain-timeout-s", "0.5") as server:
        body = {"model": "demo", "prompt": "x", "max_tokens": 8000, "ignore_eos": True}

        async def run() -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as client:
                task = asyncio.create_task(client.post(server.url + "/v1/completions", json=body))
                await asyncio.sleep(0.6)
                server.process.send_signal(signal.SIGTERM)
                return await task

        answer = asyncio.run(run())
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["finish_reason"] == "abort"
        assert server.process.wait(30) == 0


def test_a_killed_launcher_leaves_no_process() -> None:
    with serve("--frontends", "2") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) >= 3
        server.process.kill()
        wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))


def test_a_wrong_checkpoint_ends_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}')
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "dsv4serve.cli.main",
            "launch",
            "--port",
            "0",
            "--model",
            str(tmp_path),
            "--log-level",
            "error",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    complaints = [line for line in result.stderr.splitlines() if "DeepSeek-V3" in line]
    assert complaints
    assert "Traceback" not in result.stderr
