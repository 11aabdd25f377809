"""Recall: chats in which something said early is asked for later, and needles in long texts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from tools.demo_model.builders import memory, small_talk
from tools.demo_model.builders.basics import WORDS
from tools.demo_model.builders.memory import Memory
from tools.demo_model.builders.small_talk import aside, turn
from tools.demo_model.builders.stories import Story
from tools.demo_model.sample import Answer, Probe, Sample

TOKENS_PER_WORD = 1.35
SHORTEST = 200  # tokens of the shortest needle text
SENTENCE_END = re.compile(r'(?<=[.!?]) (?=[A-Z])|(?<=[.!?]") (?=[A-Z])')
MARKERS = ("", "", "", "Remember this: ", "Important: ", "Note: ", "By the way: ")
HEARD = ("OK.", "I will remember that.", "Noted.", "Good to know.", "Thank you for telling me.", "All right.")
READ_THIS = (
    "Read this text.",
    "Here is a text. I will ask you about it.",
    "Read the text and answer the question at the end.",
    "Text:",
    "Please read this carefully.",
    "",
)
QUESTION = ("Question: {}", "{}", "{} Answer from the text.", "Now tell me: {}", "My question: {}")
READ = ("I have read it. What is your question?", "OK, I have read the text.", "Done. Please ask.", "I have read it.")
SYSTEM = (
    "You are a helpful assistant.",
    "Answer from the text.",
    "You have a good memory.",
    "Answer questions about the text in one sentence.",
    "Read carefully and answer briefly.",
    "You are a careful reader.",
)


def filler(draw: random.Random, words: int) -> list[str]:
    """Sentences of stories, about `words` words in all; a sentence that ends a story ends with an empty line."""
    sentences: list[str] = []
    while words > 0:
        story = SENTENCE_END.split(Story(draw).write(draw.randrange(6)).replace("\n\n", " "))
        story[-1] += "\n\n"
        for sentence in story:
            if words <= 0:
                break
            sentences.append(sentence)
            words -= sentence.count(" ") + 1
    return sentences


def joined(sentences: list[str]) -> str:
    """The text of some sentences."""
    return " ".join(sentences).replace("\n\n ", "\n\n").strip()


def haystack(draw: random.Random, found: list[Memory], words: int) -> str:
    """Filler of about `words` words with the statements at uniform places."""
    sentences = filler(draw, words - sum(each.statement.count(" ") + 1 for each in found))
    for each in found:
        sentences.insert(draw.randint(0, len(sentences)), draw.choice(MARKERS) + each.statement)
    return joined(sentences)


def reason(draw: random.Random, asked: Memory) -> str:
    """A short reasoning text that quotes what was said."""
    if not asked.statement:
        return "I looked for it, but the text does not say anything about it."
    form = draw.choice(("I was told: {0} So the answer is {1}.", 'The text says: "{0}"', "I remember: {0} It is {1}."))
    return form.format(asked.statement, asked.value)


def read_and_ask(draw: random.Random, asked: Memory, text: str) -> list[dict[str, Any]]:
    """The text and the question for one memory, in one user turn or two; the last message is the question."""
    start, question = draw.choice(READ_THIS), draw.choice(QUESTION).format(asked.question)
    text = f"{start}\n\n{text}".strip()
    if draw.random() < 0.5:
        return [{"role": "user", "content": f"{text}\n\n{question}"}]
    return [*turn(text, draw.choice(READ)), {"role": "user", "content": asked.question}]


def needle(draw: random.Random, tokens: int) -> Sample:
    """A long text with needles; one is asked for, mostly others after it, or something that is not in the text.

    Longer texts hold more needles and more questions, or almost nothing of them would be learnt.
    """
    found = memory.needles(draw, draw.randint(1, max(4, min(48, tokens // 50))))
    first, *others = draw.sample(found, len(found))
    form = draw.random()
    if form < 0.15:
        others = []
    elif form < 0.9:
        others = others[: draw.randint(len(others) // 2, len(others))]
    said = sum(f"{each.question} {each.answer}".count(" ") + 1 for each in others)
    text = haystack(draw, found, int(tokens / TOKENS_PER_WORD) - 25 - said)
    if form < 0.1:
        return Sample("recall", text=f"{text}\n\nQuestion: {first.question}\nAnswer: {first.answer}")
    if form < 0.15:
        first = absent(draw, found)
    messages = [*read_and_ask(draw, first, text), {"role": "assistant", "content": first.answer}]
    for each in others:
        messages += turn(each.question, each.answer)
    thinking = draw.random() < 0.1  # of a thinking chat only the last answer is learnt
    if thinking:
        messages[-1]["reasoning_content"] = reason(draw, [first, *others][-1])
    if draw.random() < 0.4:
        messages.insert(0, {"role": "system", "content": draw.choice(SYSTEM)})
    return Sample("recall", messages=messages, thinking=thinking)


def absent(draw: random.Random, found: list[Memory]) -> Memory:
    """A memory whose question none of the statements answers."""
    topics = {each.topic for each in found}
    while (other := memory.needles(draw, 1)[0]).topic in topics:
        pass
    return Memory(other.topic, "", other.question, "The text does not say that.", "")


def told(draw: random.Random, tokens: int) -> Sample:
    """A chat in which the user says some things and asks later; up to a third of `tokens` lies between."""
    messages: list[dict[str, Any]] = []
    found: dict[str, Memory] = {}
    for _ in range(draw.randint(1, 4)):
        each = memory.own(draw)
        if each.topic in found:
            continue
        found[each.topic] = each
        reply = f"Nice to meet you, {each.value}!" if each.topic == "name" else draw.choice(HEARD)
        messages += turn(each.statement, reply)
        for _ in range(draw.randrange(3)):
            messages += aside(draw)
    budget = draw.randint(0, tokens // 3) / TOKENS_PER_WORD
    while budget > 0 and draw.random() < 0.9:
        exchange = small_talk.about_story(draw) if draw.random() < 0.3 else aside(draw)
        exchange = [message for message in exchange if message["role"] != "system"]
        budget -= sum(message["content"].count(" ") + 1 for message in exchange)
        messages += exchange
    for asked in draw.sample(list(found.values()), draw.randint(1, len(found))):
        messages += turn(asked.question, asked.answer)
    thinking = draw.random() < 0.2
    if thinking:
        messages[-1]["reasoning_content"] = f'The user said: "{asked.statement}"'
    return Sample("recall", messages=small_talk.with_system(draw, messages), thinking=thinking)


def shopping(draw: random.Random) -> Sample:
    """A list that the user builds, changes and asks for."""
    items = draw.sample(WORDS["foods"], draw.randint(2, 5))
    things = [*items]
    name = draw.choice(("shopping list", "list", "menu"))
    messages = turn(
        draw.choice((f"Start a {name}: {', '.join(items)}.", f"Put {', '.join(items)} on my {name}.")),
        f"Your {name}: {', '.join(things)}.",
    )
    for _ in range(draw.randrange(4)):
        kind = draw.random()
        if kind < 0.4:
            new = draw.choice([food for food in draw.sample(WORDS["foods"], 9) if food not in things])
            things.append(new)
            request = draw.choice((f"Add {new}.", f"I also need {new}.", f"Please add {new}."))
        elif kind < 0.6 and len(things) > 1:
            old = things.pop(draw.randrange(len(things)))
            request = draw.choice((f"Remove {old}.", f"I already have {old}.", f"Take {old} off the {name}."))
        else:
            messages += aside(draw)
            continue
        messages += turn(request, f"Your {name}: {', '.join(things)}.")
    kind = draw.random()
    if kind < 0.6:
        question = draw.choice((f"What is on my {name}?", f"Read me my {name}.", f"Show me the {name}."))
        messages += turn(question, f"Your {name}: {', '.join(things)}.")
    else:
        food = draw.choice(things if draw.random() < 0.5 else WORDS["foods"])
        answer = f"Yes, the {name} has {food}." if food in things else f"No, the {name} has no {food}."
        messages += turn(f"Does my {name} have {food}?", answer)
    return Sample("recall", messages=small_talk.with_system(draw, messages))


def samples(draw: random.Random, max_tokens: int = 1000) -> Iterator[Sample]:
    """Needles of SHORTEST to `max_tokens` tokens and chats with something to remember. Endless."""
    while True:
        kind = draw.random()
        if kind < 0.60:
            yield needle(draw, draw.randint(SHORTEST, max_tokens))
        elif kind < 0.90:
            yield told(draw, max_tokens)
        else:
            yield shopping(draw)


def probes(draw: random.Random, tokens: int = 1000) -> Iterator[Probe]:
    """A text of about `tokens` tokens with three needles, one of them asked for. Endless."""
    while True:
        found = memory.needles(draw, 3)
        asked = draw.choice(found)
        text = haystack(draw, found, int(tokens / TOKENS_PER_WORD) - 25)

        def check(answer: Answer, value: str = asked.value) -> dict[str, bool]:
            return {"right": re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer.content) is not None}

        yield Probe(f"recall, {tokens} tokens", read_and_ask(draw, asked, text), check, max_tokens=60)
