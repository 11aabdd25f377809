"""The builders of stories, facts and recall: same seed, same data; probes that can tell; needles as long as asked."""

import io
import itertools
import json
import random
import re
import tarfile

import pytest

from tools.demo_model import fetch
from tools.demo_model.builders import basics, copying, facts, memory, recall, small_talk, stories
from tools.demo_model.builders.grammar import Frame, a
from tools.demo_model.sample import Answer

TABLES = {
    "countries": [
        {"name": "Togo", "capital": "Lome", "continent": "Africa", "language": "French", "neighbours": ["Ghana"]},
        {"name": "Ghana", "capital": "Accra", "continent": "Africa", "language": "English", "neighbours": ["Togo"]},
        {"name": "Cuba", "capital": "Havana", "continent": "North America", "language": "Spanish", "neighbours": []},
    ],
    "definitions": {"jacket": ["n", "a short coat"], "quit": ["v", "put an end to a state"]},
    "opposites": {"dry": "wet", "wet": "dry"},
    "kinds": {
        **{word: ["bird", "animal"] for word in ("crow", "dove", "eagle", "owl", "robin")},
        "kitten": ["animal"],
        "cow": ["mammal", "animal"],
        "hut": ["building"],
    },
}


@pytest.fixture(autouse=True)
def small_tables(tmp_path, monkeypatch):
    """Tables of three countries and two words: the real ones are made from fetched packages."""
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(TABLES))
    monkeypatch.setattr(facts, "FACTS", path)
    facts.tables.cache_clear()
    yield
    facts.tables.cache_clear()


def answer(content):
    return Answer(content, "", [], "stop")


def take(builder, count, seed=0, **options):
    return list(itertools.islice(builder.samples(random.Random(seed), **options), count))


def words_of(sample):
    texts = [sample.text or "", *(message["content"] for message in sample.messages)]
    return sum(len(text.split()) for text in texts)


@pytest.mark.parametrize("builder", [stories, facts, recall])
def test_a_seed_fixes_the_samples(builder):
    assert take(builder, 200) == take(builder, 200)
    assert take(builder, 200) != take(builder, 200, seed=1)


@pytest.mark.parametrize("builder", [stories, facts, recall])
def test_samples_keep_the_contract(builder):
    for sample in take(builder, 500):
        assert (sample.text is None) == bool(sample.messages)
        if sample.text is not None:
            continue
        roles = [message["role"] for message in sample.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"].strip() for message in sample.messages)
        assert sample.thinking == bool(sample.messages[-1].get("reasoning_content"))
        assert not any("reasoning_content" in message for message in sample.messages[:-1])


@pytest.mark.parametrize("builder", [stories, facts, recall])
def test_no_slot_is_left_open(builder):
    for sample in take(builder, 500):
        assert not set("{}<>|") & set(str(sample.text) + "".join(message["content"] for message in sample.messages))


def test_stories_name_both_nouns():
    draw = random.Random(2)
    for _ in range(1000):
        story = stories.Story(draw, animal="fox", thing="kite")
        request, text = stories.tell(draw, story)
        assert stories.has("fox", request)
        assert stories.has("kite", request)
        assert stories.has("fox", text), text
        assert stories.has("kite", text), text


def test_stories_are_60_to_250_words():
    draw = random.Random(3)
    lengths = [len(stories.Story(draw).write(draw.randrange(9)).split()) for _ in range(1000)]
    assert min(lengths) >= 50
    assert max(lengths) <= 250
    assert sum(length >= 60 for length in lengths) >= 990


def test_pronouns_and_articles_agree():
    draw = random.Random(4)
    for _ in range(300):
        story = stories.Story(draw, animal="queen")
        assert story.name in stories.WORDS["girls"]
        assert story.fixed["his"] == "her"
    assert [a(noun) for noun in ("owl", "unicorn", "honest fox", "hat", "hour")] == [
        "an owl",
        "a unicorn",
        "an honest fox",
        "a hat",
        "an hour",
    ]
    assert Frame("A <old> a <new> An <kite>").fill(draw, story) == "An old a new A kite"


def test_story_probe_wants_both_nouns():
    for probe in itertools.islice(stories.probes(random.Random(5)), 20):
        request = probe.messages[-1]["content"]
        assert probe.check(answer(request)) == {"both nouns": True}
        assert probe.check(answer("Once there was a fly.")) == {"both nouns": False}


def test_fact_probes_want_the_exact_words():
    found = {}
    for probe in itertools.islice(facts.probes(random.Random(6)), 40):
        found.setdefault(probe.category, []).append(probe)
    for probe in found["capitals"]:
        question = probe.messages[-1]["content"]
        (country,) = (each for each in TABLES["countries"] if each["name"] in question)
        assert probe.check(answer(f"The capital is {country['capital']}."))["right"]
        assert not probe.check(answer(f"The capital is {country['capital']}ville."))["right"]
        assert not probe.check(answer(f"It is {country['name']}."))["right"]
    for probe in found["definitions"]:
        (gloss,) = (gloss for word, (_, gloss) in TABLES["definitions"].items() if word in probe.messages[0]["content"])
        assert probe.check(answer(f"It means: {gloss}."))["right"]
        assert not probe.check(answer(f"It means: {gloss[:-3]}."))["right"]


def test_a_denial_is_certain():
    assert facts.denied(["animal"]) == ["building"]  # a kitten is a mammal, even where WordNet says only "animal"
    assert facts.denied(["bird", "animal"]) == ["mammal", "building"]


def test_basic_facts():
    assert [basics.plural(noun) for noun in ("fox", "goose", "pony", "flower pot", "polar bear", "key")] == [
        "foxes",
        "geese",
        "ponies",
        "flower pots",
        "polar bears",
        "keys",
    ]
    assert [basics.number_word(number) for number in (0, 17, 40, 85, 300, 999)] == [
        "zero",
        "seventeen",
        "forty",
        "eighty-five",
        "three hundred",
        "nine hundred and ninety-nine",
    ]


def test_missing_tables_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FACTS", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="extract_facts"):
        facts.tables()


@pytest.mark.parametrize("tokens", [300, 1000, 3000])
def test_needle_texts_are_as_long_as_asked(tokens):
    draw = random.Random(7)
    for _ in range(30):
        length = words_of(recall.needle(draw, tokens)) * recall.TOKENS_PER_WORD
        assert 0.8 * tokens <= length <= 1.2 * tokens


def test_needles_lie_anywhere_in_the_text():
    draw, places = random.Random(8), []
    for _ in range(200):
        (one,) = memory.needles(draw, 1)
        text = recall.haystack(draw, [one], 300)
        assert text.count(one.statement) == 1
        places.append(text.index(one.statement) / len(text))
    assert all(40 <= sum(low <= place < low + 1 / 3 for place in places) <= 95 for low in (0, 1 / 3, 2 / 3))


@pytest.mark.parametrize("tokens", [300, 1000])
def test_recall_probe_wants_the_value(tokens):
    for probe in itertools.islice(recall.probes(random.Random(9), tokens=tokens), 20):
        text = "\n".join(message["content"] for message in probe.messages)
        assert probe.check(answer(text)) == {"right": True}
        assert probe.check(answer("I do not know.")) == {"right": False}
        assert probe.category == f"recall, {tokens} tokens"


def test_what_the_user_told_is_answered_with_its_value():
    draw = random.Random(10)
    for _ in range(200):
        *before, _question, last = recall.told(draw, 400).messages
        said = " ".join(message["content"] for message in before if message["role"] == "user")
        value = re.search(r"(\w+)( years old)?\.$", last["content"])[1]  # the last word of a place or a thing
        assert re.search(rf"\b{value}\b", said), last


def test_answers_about_a_story_come_from_the_story():
    draw = random.Random(11)
    for _ in range(300):
        messages = small_talk.about_story(draw)
        story = next(message["content"] for message in messages if message["role"] == "assistant")
        for question, reply in itertools.pairwise(messages[-2:]):
            if question["content"].startswith("What color"):
                assert reply["content"].rstrip(".").split()[-1].lower() in story


def archive(name, content=b"text"):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tarball:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tarball.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def test_extraction_stays_in_its_folder(tmp_path):
    package = fetch.Package("some", "1", "npm", "", ("data/",), ("data/a.txt",), "")
    fetch.extract(package, archive("package/data/a.txt"), tmp_path / "in")
    assert fetch.missing(package, tmp_path / "in") == []
    with pytest.raises(ValueError, match="unsafe path"):
        fetch.extract(package, archive("package/data/../../a.txt"), tmp_path / "in")
    assert [path.name for path in tmp_path.rglob("a.txt")] == ["a.txt"]


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    package = fetch.Package("some", "1", "npm", "0" * 64, ("data/",), ("data/a.txt",), "")
    folder = tmp_path / "archive"
    folder.mkdir()
    data = archive("package/data/a.txt")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: (folder / "some-1.tgz").write_bytes(data))
    with pytest.raises(RuntimeError, match="SHA-256"):
        fetch.download(package, folder)


def test_what_is_to_be_copied_was_said_before():
    samples = copying.samples(random.Random(11), max_tokens=600)
    for sample in itertools.islice(samples, 60):
        said = ""
        for message in sample.messages:
            if message["role"] == "assistant":
                assert message["content"] in said
            said += message["content"]
