"""Scoring, gates and requests of the demo model's evaluation, and what is measured inside the model."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from support.models import random_ids, small_config, small_transformer

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.config.engine import default_model
from dsv4serve.model.whole import WholeSequence
from tools.demo_model import evaluate, offline, probing
from tools.demo_model.drafts import Acceptance, draft_tokens
from tools.demo_model.sample import Answer, Probe


def probe(category: str, text: str = "hi", thinking: bool = False, **measures: bool) -> Probe:
    """Always the same measures, whatever is answered."""
    return Probe(category, [{"role": "user", "content": text}], lambda _: measures, thinking=thinking, max_tokens=4)


ANSWER = Answer("ok", "", [], "stop")


def test_probes_are_balanced_over_categories() -> None:
    def endless() -> Iterator[Probe]:
        for index in itertools.count():
            yield probe("rare" if index % 10 == 9 else "common", str(index))

    chosen = probing.balanced(endless(), 3)
    assert [item.category for item in chosen] == ["common"] * 3 + ["rare"] * 3
    assert [item.messages[0]["content"] for item in chosen] == ["0", "1", "2", "9", "19", "29"]


def test_held_out_probes_are_always_the_same() -> None:
    first, second = (probing.held_out("arithmetic", 2) for _ in range(2))
    assert [item.messages for item in first] == [item.messages for item in second]
    assert len({item.category for item in first}) * 2 == len(first)


def test_a_gate_pools_its_categories_and_one_without_probes_does_not_pass() -> None:
    answered = [
        ("arithmetic", probe("sums, 3 digits", right=True), ANSWER),
        ("arithmetic", probe("sums, 3 digits", right=True), ANSWER),
        ("arithmetic", probe("sums, 3 digits, thinking", thinking=True, right=False), ANSWER),
        ("arithmetic", probe("word problems", right=False), ANSWER),
    ]
    rows = probing.tabulate(answered)
    assert [(row.category, row.num, dict(row.judged)) for row in rows] == [
        ("sums, 3 digits", 2, {"right": 2}),
        ("sums, 3 digits, thinking", 1, {"right": 1}),
        ("word problems", 1, {"right": 1}),
        ("thinking", 1, {"closed": 1}),
    ]
    verdicts = probing.judge(rows, ["arithmetic"])
    assert [(verdict.gate.least, verdict.share, verdict.passed) for verdict in verdicts] == [
        (0.99, None, False),
        (0.95, 2 / 3, False),
    ]
    table = probing.render_table(rows, verdicts)
    assert "not measured" in table
    assert "FAIL" in table
    enough = probing.judge(probing.tabulate(answered[:2]), ["arithmetic"])
    assert [verdict.passed for verdict in enough] == [False, True]


@pytest.mark.parametrize(
    ("answer", "closed"),
    [
        (Answer("yes", "hm", [], "stop"), True),
        (Answer("", "hm", [("f", "{}")], "tool_calls"), True),
        (Answer("", "hm", [], "stop"), False),
        (Answer("ye", "hm", [], "length"), False),
    ],
)
def test_thinking_is_closed_when_an_answer_follows_and_ends(answer: Answer, closed: bool) -> None:
    (_, row) = probing.tabulate([("facts", probe("any", thinking=True, right=True), answer)])
    assert row.share("closed") == closed


def test_requests_carry_the_probe_and_answers_come_back_in_order() -> None:
    bodies: list[dict[str, object]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        bodies.append(body)
        text = body["messages"][0]["content"]
        if text == "7":
            return httpx.Response(400, text="too long")
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
        message = {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call]}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "tool_calls"}]})

    tool = {"type": "function", "function": {"name": "f"}}
    questions = [("tools", Probe("t", probe("t", str(i)).messages, lambda _: {}, [tool], i > 5)) for i in range(40)]
    ended = []

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://scripted") as client:
            return await evaluate.ask(client, "m", questions, lambda: ended.append(1))

    answers = asyncio.run(run())
    assert len(ended) == len(bodies) == 40
    assert answers[3] == Answer("", "so", [("f", "3")], "tool_calls")
    assert answers[7] == Answer("", "", [], "HTTP 400: too long")
    body = next(body for body in bodies if body["messages"] == questions[9][1].messages)
    assert (body["temperature"], body["tools"], body["max_tokens"]) == (0, [tool], 200)
    assert body["chat_template_kwargs"] == {"thinking": True}


@pytest.mark.e2e
def test_a_run_through_the_real_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"stories": [probe("stories", **{"both nouns": True}), probe("stories", **{"both nouns": False})]}
    monkeypatch.setattr(evaluate, "held_out", lambda suite, num: asked[suite])
    out, wrong = tmp_path / "quality.jsonl", tmp_path / "wrong.jsonl"
    assert evaluate.main(["--suite", "stories", "--out", str(out), "--wrong", str(wrong)]) == 1
    shown = capsys.readouterr().out
    assert "50.0%    95%  FAIL" in shown
    assert "requests failed" not in shown
    record = json.loads(out.read_text())
    assert record["command"].startswith("python -m tools.demo_model.evaluate --suite stories")
    assert {"commit", "device", "time"} <= record.keys()
    assert record["results"]["gates"][0]["share"] == 0.5
    (line,) = wrong.read_text().splitlines()
    assert json.loads(line)["answer"]["finish_reason"] in ("length", "stop")


# Drafts


@pytest.mark.parametrize(("window", "first"), [(5, 1), (5, 20), (16, 2), (16, 30)])
def test_drafts_of_all_rounds_are_those_of_chained_whole_sequences(window: int, first: int) -> None:
    config = small_config(sliding_window=window)
    model, length = small_transformer(config, window), 40
    ids = torch.tensor(random_ids(config, length, window))
    with torch.inference_mode():
        main = model(ids, WholeSequence(length))
        drafts = draft_tokens(model, ids, main, first)
        assert drafts.shape == (3, length - first)
        for i in {first - 1, first, first + 3, 38}:
            streams, following = main[: i + 1], ids[1 : i + 2]
            for k in range(3):
                output, logits = model.mtp(streams, following, WholeSequence(len(following)))
                assert logits[-1].argmax() == drafts[k, i - first + 1]
                streams = torch.cat([streams, output[-1:]])
                following = torch.cat([following, logits[-1:].argmax(-1)])


def test_drafts_are_judged_after_right_ones_only_and_inside_the_answer() -> None:
    ids = torch.tensor([9, 9, 1, 2, 3, 4, 5, 6])  # two of the prompt, six of the answer
    drafts = torch.full((3, 6), -1)
    for index in range(6):  # all right ...
        target = ids[index + 3 :][:3]
        drafts[: len(target), index] = target
    drafts[1, 0] = 0  # ... but the second of the first round: its third does not count
    found = Acceptance.empty()
    found.add(drafts, ids, 2)
    # Five rounds have something to draft; the last two have only two and one token left.
    assert found.judged == [5, 4, 2]
    assert found.right == [5, 3, 2]
    assert found.rates() == [1.0, 0.75, 1.0]
    # First round: one draft and one token; second: three drafts, the end.
    assert (found.num_tokens, found.num_rounds, found.mean_length()) == (5, 2, 2.5)


def test_an_answer_of_one_token_has_no_draft() -> None:
    found = Acceptance.empty()
    found.add(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([4, 5, 6]), 2)
    assert found.rates() == [None, None, None]
    assert found.mean_length() is None


# Nats and the indexer


def test_nats_are_means_over_learnt_tokens_by_category() -> None:
    config = small_config()
    models = [small_transformer(config, seed) for seed in (1, 2)]
    tokens = torch.tensor([random_ids(config, 13, seed) for seed in (3, 4)])
    kinds = torch.zeros(2, 13, dtype=torch.int64)
    kinds[0, 5:9], kinds[1, 12] = 1, 3
    found = offline.mix_nats(models, [(tokens, kinds)])
    assert list(found) == [offline.CATEGORIES[0], offline.CATEGORIES[2], "all"]
    for index, model in enumerate(models):
        nats = []
        for row in tokens:
            with torch.inference_mode():
                logits = model.logits(model(row, WholeSequence(13)))
            nats.append(-torch.log_softmax(logits, -1)[:-1].gather(1, row[1:, None])[:, 0])
        stories = nats[0][4:8].mean().item()
        assert math.isclose(found[offline.CATEGORIES[0]][index], stories, rel_tol=1e-5)
        assert math.isclose(found["all"][index], (4 * stories + nats[1][11].item()) / 5, rel_tol=1e-5)


def test_random_choice_is_as_many_visible_entries_but_others() -> None:
    config = small_config()
    model, length = small_transformer(config), 120
    ids = torch.tensor(random_ids(config, length, 0))
    seen: dict[str, list[torch.Tensor]] = {}

    def logits(step: WholeSequence, name: str) -> torch.Tensor:
        step._observer = lambda key, value: seen.setdefault(name, []).append(value) if "selected" in key else None
        with torch.inference_mode():
            return model.logits(model(ids, step))

    chosen = logits(WholeSequence(length), "indexer")
    randomly = logits(offline.RandomChoice(length, 0), "random")
    visible = (torch.arange(length) + 1) // 4
    for entries, others in zip(seen["random"], seen["indexer"], strict=True):
        assert (entries < visible.unsqueeze(1)).all()
        assert torch.equal((entries >= 0).sum(1), (others >= 0).sum(1))
    assert torch.equal(chosen[:67], randomly[:67])  # up to 16 entries all are chosen
    assert not torch.equal(chosen[67:], randomly[67:])


def test_a_greedy_answer_is_found_again_inside_the_model() -> None:
    directory = default_model()
    # In `exact`: random weights have near ties, which BF16 decides differently for another number of rows.
    model, tokenizer = offline.load_model(directory, offline.Numerics.EXACT), ChatTokenizer(directory)
    prompt = offline.prompt_ids(tokenizer, probe("recall", "Remember: " + "one two three " * 110))
    assert len(prompt) > 4 * (model.config.index_topk + 1)  # the indexer has to choose
    answer: list[int] = []
    for _ in range(3):
        ids = torch.tensor(prompt + answer)
        with torch.inference_mode():
            answer.append(int(model.logits(model(ids, WholeSequence(len(ids)))[-1:]).argmax()))
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    exact = Probe("recall, 300 tokens", [], lambda found: {"right": found.content == text})
    wrong = Probe("recall, 300 tokens", [], lambda found: {"right": found.content != text})
    drafts, recall = offline.look_inside(
        model, tokenizer, [("recall 300", each, prompt, answer) for each in (exact, wrong)]
    )
    assert recall["recall 300"].shares()[0] == 0.5
    assert drafts["recall, 300 tokens"].judged[0] == 4  # two of each answer's three tokens
