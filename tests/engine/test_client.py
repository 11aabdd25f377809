"""EngineClient against real engine processes that are killed, stopped and stuck."""

import asyncio
import gc
import os
import signal
import subprocess
import sys

import pytest
from support.counting_runner import FAIL, STUCK
from support.engine_process import assert_complete, collect, connected, request, wait_gone

from dsv4serve.engine.client import PROBE_S, STUCK_S, EngineClient
from dsv4serve.types import EngineUnavailable, FinishReason


async def until(condition, timeout_s=20):
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.01)


def test_many_requests_at_once_end_right(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as client:
            asked = [request(f"r{i}", prompt=range(1, 2 + i), max_tokens=10 + i) for i in range(20)]
            for outputs, one in zip(await asyncio.gather(*(collect(client, one) for one in asked)), asked, strict=True):
                assert_complete(outputs, one)
            assert client.info.max_model_len == 4096
            assert (await client.stats()).num_finished == 20

    asyncio.run(main())


def test_a_killed_engine_ends_open_requests_at_once_and_the_next_engine_serves(engine):
    async def main():
        async with connected(engine.endpoint) as client:
            open_requests = [asyncio.create_task(collect(client, request(f"r{i}", max_tokens=4000))) for i in range(12)]
            await asyncio.sleep(0.3)
            engine.process.kill()
            for outputs in await asyncio.gather(*open_requests):
                assert outputs[-1].finish_reason is FinishReason.ERROR
                assert (outputs[-1].error, outputs[-1].error_status) == ("engine died", 500)
            assert not client.is_ready
            assert not await client.is_alive()
            (refused,) = await collect(client, request("between"))
            assert (refused.finish_reason, refused.error_status) == (FinishReason.ERROR, 503)
            with pytest.raises(EngineUnavailable):
                await client.stats()
            engine.process.wait()
            engine.start()
            async with asyncio.timeout(20):
                await client.wait_ready()
            asked = request("r0")
            assert_complete(await collect(client, asked), asked)
            assert (await client.stats()).num_finished == 1

    engine.start()
    asyncio.run(main())


def test_a_failing_runner_is_answered_and_the_process_exits_with_1(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as client:
            running = asyncio.create_task(collect(client, request("runs", max_tokens=4000)))
            await asyncio.sleep(0.1)
            failed = await collect(client, request("fails", prompt=[FAIL]))
            for outputs in (failed, await running):
                assert outputs[-1].finish_reason is FinishReason.ERROR
                assert "NaN in the logits" in outputs[-1].error

    asyncio.run(main())
    assert engine.process.wait(10) == 1


def test_a_stuck_engine_is_found_out_within_ten_seconds():
    assert 2 * PROBE_S + STUCK_S <= 10


def test_a_stuck_engine_is_not_alive_but_requests_can_still_be_ended(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint, probe_s=0.1, stuck_s=0.5) as client:
            await asyncio.sleep(0.5)
            assert await client.is_alive()
            stuck = asyncio.create_task(collect(client, request("stuck", prompt=[STUCK])))

            async def dead():
                return not await client.is_alive()

            await until(dead)
            with pytest.raises(EngineUnavailable, match="not answered"):
                await client.stats()
            await client.abort("stuck")
            assert (await stuck)[-1].finish_reason is FinishReason.ABORT

    asyncio.run(main())


def test_a_paused_engine_is_alive_again_when_it_goes_on(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint, probe_s=0.1, stuck_s=0.3) as client:
            engine.process.send_signal(signal.SIGSTOP)

            async def dead():
                return not await client.is_alive()

            await until(dead)
            engine.process.send_signal(signal.SIGCONT)
            await until(client.is_alive)

    asyncio.run(main())


def test_abort_storms_leave_nothing_running(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as client:

            async def one(i):
                asked = request(f"r{i}", prompt=range(1, 2 + i % 50), max_tokens=4000)
                stream = client.submit(asked)
                if i % 3 == 0:  # dropped after a few outputs
                    async for _ in stream:
                        break
                    await stream.aclose()
                elif i % 3 == 1:  # the task that reads is cancelled
                    task = asyncio.create_task(collect(client, asked))
                    await asyncio.sleep(0.001 * (i % 70))
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:  # aborted by name, twice
                    task = asyncio.create_task(collect(client, asked))
                    await asyncio.sleep(0.001 * (i % 70))
                    await client.abort(f"r{i}")
                    await client.abort(f"r{i}")
                    assert (await task)[-1].finish_reason is FinishReason.ABORT

            await asyncio.gather(*(one(i) for i in range(200)))

            async def idle():
                stats = await client.stats()
                return stats.num_running == stats.num_waiting == 0

            await until(idle)
            stats = await client.stats()
            assert stats.num_free_slots == 8
            assert client._open == {}  # every end has arrived, also of requests that nobody listened to
            asked = request("r0")
            assert_complete(await collect(client, asked), asked)

    asyncio.run(main())


def test_a_request_id_in_use_is_refused(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as client:
            asked = request("same", max_tokens=30)
            first = asyncio.create_task(collect(client, asked))
            await asyncio.sleep(0.05)
            (refused,) = await collect(client, asked)
            assert (refused.finish_reason, refused.error_status) == (FinishReason.ERROR, 400)
            assert_complete(await first, asked)

    asyncio.run(main())


def test_closing_a_client_ends_its_requests_on_both_sides(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as other:
            async with connected(engine.endpoint) as client:
                open_request = asyncio.create_task(collect(client, request("r", max_tokens=4000)))
                await asyncio.sleep(0.1)
            assert (await open_request)[-1].finish_reason is FinishReason.ABORT

            async def idle():
                return (await other.stats()).num_running == 0

            await until(idle)

    asyncio.run(main())


def test_a_client_may_start_long_before_the_engine(engine):
    async def main():
        client = EngineClient(engine.endpoint)
        await client.start()
        await asyncio.sleep(0.3)
        assert not client.is_ready
        engine.start()
        async with asyncio.timeout(20):
            await client.wait_ready()
        await client.close()

    asyncio.run(main())


def test_the_engine_dies_with_its_parent(engine, endpoint):
    """The parent is killed with SIGKILL while the engine is stuck in a step: it must go all the same."""
    code = (
        "import sys; from support.engine_process import EngineProcess; "
        "p = EngineProcess(sys.argv[1]).start(); print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, endpoint], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())

    async def get_stuck():
        async with connected(endpoint) as client:
            task = asyncio.create_task(collect(client, request("stuck", prompt=[STUCK])))
            await asyncio.sleep(0.1)
            task.cancel()

    asyncio.run(get_stuck())
    parent.kill()
    parent.communicate()
    wait_gone([pid])


@pytest.mark.parametrize(("builder", "code"), [("build_failing", 2), ("build_crashing", 1)])
def test_start_up_errors_have_their_exit_code(engine, builder, code):
    engine.runner = f"support.counting_runner:{builder}"
    _, stderr = engine.start().communicate(timeout=20)
    assert engine.process.returncode == code
    if code == 2:
        assert stderr.splitlines() == ["dsv4serve: model-00001.safetensors: 12 bytes are missing"]
    else:
        assert "a bug at start-up" in stderr


def test_ctrl_c_does_not_reach_the_engine_and_sigterm_stops_it(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as client:
            os.kill(engine.process.pid, signal.SIGINT)
            asked = request("r")
            assert_complete(await collect(client, asked), asked)

    asyncio.run(main())
    engine.process.terminate()
    assert engine.process.wait(10) == 0


def test_any_frontend_can_abort_a_call_and_flush(engine):
    engine.start()

    async def main():
        async with connected(engine.endpoint) as one, connected(engine.endpoint) as other:
            asked = [request(f"{name}/1-{i}", max_tokens=4000) for name in ("a", "ab") for i in range(2)]
            tasks = [asyncio.create_task(collect(one, single)) for single in asked]

            async def all_run():
                return (await other.stats()).num_running == 4

            await until(all_run)
            assert await asyncio.gather(other.abort_call("a"), other.abort_call("x")) == [2, 0]
            ends = await asyncio.gather(*tasks[:2])
            assert {outputs[-1].finish_reason for outputs in ends} == {FinishReason.ABORT}
            assert not any(task.done() for task in tasks[2:])
            assert await other.abort_call(None) == 2
            await asyncio.gather(*tasks)
            await collect(one, request("long", prompt=range(1, 600), max_tokens=1))
            num_cached = (await other.stats()).num_cached_pages
            assert await other.flush_cache() == num_cached > 0
            assert (await other.stats()).num_cached_pages == (await other.stats()).num_cached_tails == 0

    asyncio.run(main())


def test_a_message_of_the_engine_leaves_nothing_to_the_garbage_collector(engine):
    """Whose pauses would hold up all streams."""
    engine.start()

    async def main():
        async with connected(engine.endpoint) as client:
            await collect(client, request("before"))
            gc.collect()
            gc.disable()
            try:
                await collect(client, request("measured", max_tokens=50))
                assert gc.collect() < 50
            finally:
                gc.enable()

    asyncio.run(main())
