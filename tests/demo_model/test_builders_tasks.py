"""The builders of sums, puzzles, tools, JSON and natural text, and the tokenizer: same seed, same data, true checks."""

import itertools
import json
import random
import re

import jsonschema
import pytest
from tokenizers import Tokenizer

from dsv4serve.config import default_model
from tools.demo_model import tokenizer
from tools.demo_model.builders import arithmetic, json_answers, kinds, natural, puzzles, tools, values
from tools.demo_model.sample import Answer

BUILDERS = [arithmetic, tools, json_answers]
PROSE = [f"{name} went home. " + "It rained all day. " * 400 for name in ("Ann", "Bob")]
CHATS = [["Hi", "Hello"], ["How are you?", "Fine.", "Good.", "Yes."]]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def said(content, calls=()):
    return Answer(content=content, reasoning="", tool_calls=list(calls), finish_reason="stop")


@pytest.fixture
def small_natural(monkeypatch):
    lengths = list(itertools.accumulate(map(len, PROSE)))
    monkeypatch.setattr(natural, "_content", lambda: (PROSE, lengths, CHATS))


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_seed_fixes_the_samples_and_the_probes(builder):
    assert take(builder.samples(random.Random(1)), 100) == take(builder.samples(random.Random(1)), 100)
    assert take(builder.samples(random.Random(1)), 100) != take(builder.samples(random.Random(2)), 100)
    first, second = (take(builder.probes(random.Random(3)), 40) for _ in range(2))
    assert [(p.category, p.messages, p.tools) for p in first] == [(p.category, p.messages, p.tools) for p in second]


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_quarter_to_a_third_of_the_chats_think_and_every_thought_is_followed_by_an_answer(builder):
    chats = [sample for sample in take(builder.samples(random.Random(4)), 1000) if sample.messages]
    assert 0.2 < sum(sample.thinking for sample in chats) / len(chats) < 0.4
    for sample in chats:
        answer = sample.messages[-1]
        assert answer["role"] == "assistant"
        assert answer["content"] or answer["tool_calls"]
        assert bool(answer.get("reasoning_content")) == sample.thinking


def test_every_step_of_a_sum_is_true_and_the_last_number_is_the_result():
    draw = random.Random(5)
    for _ in range(2000):
        task = arithmetic.problem(draw)
        assert arithmetic.last_number(task.answer) == task.result, task
        for left, right in re.findall(r"(\d[\d +\-x/]*) = (-?\d+)", f"{task.steps} {task.answer}"):
            assert eval(left.replace("x", "*")) == int(right), task


def test_arithmetic_probes_take_the_result_and_nothing_else():
    for probe in take(arithmetic.probes(random.Random(6)), 130):
        if probe.category == "puzzles":
            continue
        task = probe.messages[-1]["content"]
        right = next(n for n in range(-1000, 10000) if probe.check(said(f"{task} It is {n}."))["right"])
        assert not probe.check(said(f"It is {right + 1}."))["right"]
        assert not probe.check(said("I do not know."))["right"]
        assert probe.check(said(""))["right"] is False
        assert ("closed" in probe.check(said("1"))) == probe.thinking


def test_the_last_number_has_its_sign():
    assert arithmetic.last_number("37 - 58 = -21.") == -21
    assert arithmetic.last_number("58-37") == 37
    assert arithmetic.last_number("none") is None


def test_puzzles_are_solved():
    draw = random.Random(7)
    for _ in range(300):
        asked, answer, _ = puzzles.sort_numbers(draw)
        shown = [int(n) for n in re.findall(r"\d+", asked)]
        assert [int(n) for n in answer.split(", ")] == sorted(shown, reverse="large to small" in asked)
        _, answer, steps = puzzles.letters(draw)
        letter, count, word = re.fullmatch(r'The letter "(.)" appears (\d+) times? in "(\w+)"\.', answer).groups()
        assert word.count(letter) == int(count)
        assert ", ".join(word) in steps
        asked, answer, steps = puzzles.legs(draw)
        each = {animal: number for number, animals in puzzles.LEGS.items() for animal in animals}
        legs = sum(int(count) * each[animal] for count, animal in re.findall(r"(\d+) (\w+)", asked))
        assert answer == f"They have {legs} legs."
        asked, answer, steps = puzzles.calendar(draw)
        if steps.startswith(("From", answer)):
            assert answer.split()[-1].rstrip(".") == re.split(r"[ ,]+", steps.rstrip("."))[-1]


def test_calls_fit_the_schemas_and_copy_from_the_request():
    for sample in take(tools.samples(random.Random(8)), 1500):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in sample.tools}
        assert 1 <= len(schemas) == len(sample.tools) <= 4
        asked = ""
        for message in sample.messages:
            asked = message["content"] if message["role"] == "user" else asked
            for call in message.get("tool_calls", ()):
                arguments = json.loads(call["function"]["arguments"])
                schema = schemas[call["function"]["name"]]
                jsonschema.validate(arguments, schema)
                assert set(arguments) <= set(schema["properties"])
                for value in arguments.values():
                    assert isinstance(value, bool) or kinds.wording(value) in asked


def test_the_pool_has_at_least_sixty_tools_and_every_request_names_what_is_required():
    assert len({tool.name for tool in tools.POOL}) >= 60
    for tool in tools.POOL:
        required = {name for name, (_, _, optional) in tool.args.items() if not optional}
        for ask in tool.asks:
            assert required <= set(re.findall(r"{(\w+)}", ask)) <= set(tool.args), tool.name


def test_tool_probes_accept_the_expected_call_only():
    for probe in take(tools.probes(random.Random(9)), 50):
        if probe.category == "tools, no call":
            assert probe.check(said("Hello!")) == {"no call": True}
            assert probe.check(said("", [("f", "{}")])) == {"no call": False}
            continue
        assert probe.check(said("Hello!")) == {"valid": False, "arguments": False}
        assert probe.check(said("", [("no_such_function", "{}")]))["valid"] is False
        assert probe.check(said("", [(probe.tools[0]["function"]["name"], "not JSON")]))["valid"] is False


def test_the_expected_call_is_valid_and_equal():
    draw = random.Random(10)
    for _ in range(100):
        offers = [tools.offer(draw, tools.POOL[draw.randrange(len(tools.POOL))], renamed=True, unseen=True)]
        request = tools.request(draw, offers[0], unseen=True)
        probe = tools._probe("tools", offers, request.text, [request], thinking=False)
        name, arguments = request.call()
        assert probe.check(said("", [(name, json.dumps(arguments))])) == {"valid": True, "arguments": True}
        changed = dict.fromkeys(arguments, "?")
        assert probe.check(said("", [(name, json.dumps(changed))]))["arguments"] is False


def test_held_out_words_are_never_in_training():
    words = {values.made_up(random.Random(seed), unseen=True) for seed in range(300)}
    assert all(values.held_out(word) for word in words)
    assert not any(values.held_out(values.made_up(random.Random(seed))) for seed in range(300))


def test_json_answers_are_the_objects_that_were_asked_for():
    for sample in take(json_answers.samples(random.Random(11)), 500):
        answer = json.loads(sample.messages[-1]["content"])
        prompt = " ".join(message["content"] for message in sample.messages[:-1])
        assert isinstance(answer, dict)
        assert all(key in prompt for key in answer)


def test_json_probes_accept_the_right_values_only():
    draw = random.Random(12)
    for _ in range(100):
        item = json_answers.task(draw, unseen=True)
        probe = json_answers._probe(item, [], thinking=False)
        assert probe.check(said(item.text())) == {"valid": True, "values": True}
        assert probe.check(said('{"a": 1}')) == {"valid": True, "values": False}
        assert probe.check(said(f"Here: {item.text()}")) == {"valid": False, "values": False}


def test_passages_are_whole_sentences_of_the_asked_length(small_natural):
    prose = [sample.text for sample in take(natural.samples(random.Random(13)), 500) if sample.text]
    assert all(250 < len(text) < 5.4 * 600 + 1 for text in prose)
    assert all(text[0].isupper() and text.endswith(".") for text in prose)


def test_prose_and_chit_chat_have_their_shares_by_length(small_natural):
    samples = take(natural.samples(random.Random(14)), 8000)
    prose = sum(len(sample.text) for sample in samples if sample.text)
    chat = sum(
        len(message["content"]) for sample in samples for message in sample.messages if message["role"] != "system"
    )
    assert prose / chat == pytest.approx(10 / 3, rel=0.1)


def test_natural_text_is_cleaned():
    assert natural.cleaned("“Yes,”  he said —[note] it`s late.So be it .") == '"Yes," he said - it\'s late. So be it.'


def test_a_chat_with_coarse_words_contact_data_or_mash_is_unwanted():
    for text in ("what the hell", "see www.example.com", "call 5551234", "aaaaaah", "sdfghjkl"):
        assert natural.UNWANTED.search(text)
    assert not natural.UNWANTED.search("Hello! I like classical music, shellfish and 3 dogs.")


def small_tokenizer():
    samples = take(tools.samples(random.Random(15)), 150) + take(arithmetic.samples(random.Random(15)), 150)
    texts = [text for sample in samples for text in tokenizer.rendered(sample)]
    return tokenizer.train_tokenizer(texts, 600)


@pytest.fixture(scope="module")
def trained():
    return small_tokenizer()


@pytest.mark.parametrize(
    "text", ["37 + 58 = 95.", "def f(x):\n\treturn [x]", "na\u00efve \u4f60\u597d \U0001f642", " "]
)
def test_text_survives_the_trained_tokenizer(trained, text):
    assert trained.decode(trained.encode(text).ids) == text


def test_digits_are_tokens_of_their_own_and_control_tokens_have_the_first_ids(trained):
    assert trained.encode("4821").tokens == ["4", "8", "2", "1"]
    assert [trained.token_to_id(name) for name in tokenizer.SPECIAL] == [0, 1, 2]
    assert trained.get_vocab_size() == 600


def test_drills_have_more_functions_where_there_is_room():
    most = {
        room: max(len(sample.tools) for sample in take(tools.samples(random.Random(3), max_tokens=room), 200))
        for room in (900, 4000)
    }
    assert most == {900: 4, 4000: tools.MOST_OFFERS}


def test_a_word_that_is_not_common_has_the_same_tokens_wherever_it_stands():
    embedded = Tokenizer.from_file(str(default_model() / "tokenizer.json"))
    draw = random.Random(5)
    for word in [values.made_up(draw, unseen) for unseen in (False, True) for _ in range(200)]:
        for text in (word, word.capitalize()):
            spoken, quoted = (embedded.encode(f"{before}{text}", add_special_tokens=False) for before in ("a ", '"'))
            assert spoken.tokens[2:] == quoted.tokens[1:]
            assert spoken.tokens[1] == "\u0120"  # the space alone


def test_training_a_tokenizer_twice_gives_the_same_file(trained):
    again = small_tokenizer()
    assert again.to_str() == trained.to_str()


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(RuntimeError, match="expected 4096: add text"):
        tokenizer.train_tokenizer(["one two"], 4096)
