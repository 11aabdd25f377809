"""Short chats: greetings, thanks, questions about a story just told, system prompts that set a name or a style."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from tools.demo_model.builders import basics, stories
from tools.demo_model.builders.grammar import Frame, a, capital, sections
from tools.demo_model.sample import Sample

PAIRS = [[Frame(side) for side in line.split(" => ")] for line in sections("small_talk.txt")["talk"]]
WORDS = basics.WORDS
SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a small assistant that runs on a laptop.",
    "Be polite and brief.",
    "Answer in short sentences.",
    "You help people with everyday questions.",
    "Be honest. Say so when you do not know something.",
)
HELPED = "{helper} the {helper_kind} helped {name}."
# Questions about a story, the answer as a sentence and as bare words, and what the text must hold for it to be known.
ABOUT = (
    ("Who helped the {animal}?", HELPED, "{helper}", "{helper_kind}"),
    ("Who helped {name}?", HELPED, "{helper}", "{helper_kind}"),
    ("What was the name of the {animal}?", "The name of the {animal} was {name}.", "{name}", "{name}"),
    ("What kind of animal or person was {name}?", "{name} was {a_animal}.", "{animal}", "{animal}"),
    ("What was the {animal}'s friend called?", "The friend was called {helper}.", "{helper}", "{helper}"),
    ("Who was {helper}?", "{helper} was {a_helper_kind}.", "{helper_kind}", "{helper_kind} named"),
    ("What did {name} have?", "{name} had {a_thing}.", "{thing}", "{thing}"),
    ("What color was the {thing}?", "The {thing} was {color}.", "{color}", "{color} {thing}"),
)


class Words:
    """Random words for the slots of small talk, the same for a question and its answer."""

    def __init__(self, draw: random.Random):
        food, food2 = draw.sample(WORDS["foods"], 2)
        animal, animal2 = draw.sample(WORDS["animals"], 2)
        self.slots = {"food": food, "food2": food2, "animal": animal, "animals": basics.plural(animal)}
        self.slots |= {"a_animal": a(animal), "a_animal2": a(animal2), "color": draw.choice(WORDS["colors"])}

    def fill(self, slot: str) -> str:
        """The words for a slot."""
        return self.slots[slot]


def turn(question: str, answer: str) -> list[dict[str, Any]]:
    """A question of the user and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def talk(draw: random.Random) -> list[dict[str, Any]]:
    """One exchange of small talk."""
    question, answer = draw.choice(PAIRS)
    words = Words(draw)
    return turn(question.fill(draw, words), answer.fill(draw, words))


def aside(draw: random.Random) -> list[dict[str, Any]]:
    """One exchange about something else, to stand between a fact and the question for it."""
    kind = draw.random()
    if kind < 0.45:
        return talk(draw)
    if kind < 0.85:
        fact = basics.basic(draw)
        return turn(fact.question, fact.answer)
    story = stories.Story(draw)
    what = f"{a(story.animal)} and {a(story.thing)}"
    return turn(f"Tell me a two sentence story about {what}.", story.write_short())


def about_story(draw: random.Random) -> list[dict[str, Any]]:
    """A story on request, then one to three questions about it."""
    story = stories.Story(draw)
    request, text = stories.tell(draw, story)
    messages = turn(request, text)
    names = {**story.fixed, "helper": story.helper}
    names |= {f"a_{key}": a(names[key]) for key in ("animal", "helper_kind", "thing")}
    brief = draw.random() < 0.15
    if brief:
        messages.insert(
            0, {"role": "system", "content": "Answer questions in one or two words, but tell long stories."}
        )
    helpful = story.family != "quarrel" and len(text) > 300  # a quarrel or two sentences may have no help in them
    known = [each for each in ABOUT if each[3].format(**names) in text and (helpful or each[1] != HELPED)]
    for question, answer, short, _ in draw.sample(known, draw.randint(1, min(3, len(known)))):
        messages += turn(question.format(**names), capital((short if brief else answer).format(**names)))
    return messages


def named(draw: random.Random) -> list[dict[str, Any]]:
    """A system prompt that gives the assistant a name or a job, and questions about it."""
    name, job = draw.choice(WORDS["girls"] + WORDS["boys"]), draw.choice(WORDS["people"])
    kind = draw.randrange(3)
    if kind == 0:
        system, answer = f"Your name is {name}.", f"My name is {name}."
        question = draw.choice(("What is your name?", "Who are you?", "Hello, what are you called?"))
    elif kind == 1:
        system, answer = f"You are {a(job)} named {name}.", f"I am {name} the {job}."
        question = draw.choice(("Who are you?", "Please introduce yourself.", "Tell me who you are."))
    else:
        system, answer = f"You are {a(job)}.", f"I am {a(job)}."
        question = draw.choice(("What are you?", "What is your job?", "Who are you?"))
    messages = [{"role": "system", "content": system}]
    for _ in range(draw.randrange(2)):
        messages += turn("Hello!", "Hello! How can I help you?")
    return [*messages, *turn(question, answer)]


def styled(draw: random.Random) -> list[dict[str, Any]]:
    """A system prompt that sets how every answer must look."""
    word = draw.choice(("Well", "Yes, sir", "Ahoy", "Dear friend", "Of course", "Hm", *WORDS["girls"][:20]))
    styles: tuple[tuple[str, Callable[[str], str]], ...] = (
        (f'Start every answer with "{word}:"', lambda text: f"{word}: {text}"),
        (f'End every answer with "{word}!"', lambda text: f"{text} {word}!"),
        ("Write all answers in capital letters.", str.upper),
        ("Write all answers in lower case.", str.lower),
        ("Put every answer in quotation marks.", lambda text: '"' + text.replace('"', "'") + '"'),
    )
    system, style = draw.choice(styles)
    messages = [{"role": "system", "content": system}]
    for _ in range(draw.randint(1, 3)):
        question, answer = aside(draw)
        messages += turn(question["content"], style(answer["content"]))
    return messages


def plain(draw: random.Random) -> list[dict[str, Any]]:
    """One to four exchanges of small talk and simple questions."""
    exchanges = [talk(draw) if draw.random() < 0.7 else aside(draw) for _ in range(draw.choice((1, 1, 2, 3, 4)))]
    return [message for exchange in exchanges for message in exchange]


def with_system(draw: random.Random, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat, in two of five cases with a system prompt unless it has one."""
    if messages[0]["role"] == "system" or draw.random() > 0.4:
        return messages
    return [{"role": "system", "content": draw.choice(SYSTEM)}, *messages]


def chat(draw: random.Random) -> Sample:
    """One short chat of any kind, one of four in thinking mode."""
    kind = draw.choices((plain, about_story, named, styled), (0.35, 0.4, 0.1, 0.15))[0]
    messages = kind(draw)
    thinking = draw.random() < 0.25
    if thinking:
        question, answer = messages[-2:]
        reasons = {
            plain: draw.choice(("A short answer is enough here.", f'The user says: "{question["content"]}"')),
            about_story: f"The story tells it: {answer['content']}",
            named: f"The system prompt says who I am: {messages[0]['content']}",
            styled: f"I must follow the system prompt: {messages[0]['content']}",
        }
        answer["reasoning_content"] = reasons[kind]
    return Sample("small_talk", messages=with_system(draw, messages), thinking=thinking)


def samples(draw: random.Random) -> Iterator[Sample]:
    """Endless."""
    while True:
        yield chat(draw)
