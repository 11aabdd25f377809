"""Stories with a state: hero, helper, object and place recur through all beats, from the setting to the moral."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tools.demo_model.builders.grammar import Frame, a, sections, words
from tools.demo_model.sample import Answer, Probe, Sample

WORDS = words("words.txt")
FRAMES = {name: [Frame(line) for line in lines] for name, lines in sections("story_frames.txt").items()}
WATER_PLACES = [place for place in WORDS["places"] if re.search("beach|sea|lake|island|ship|harbor|lighthouse", place)]
FEMALE = {"girl", "princess", "queen", "hen", "cow"}
MALE = {"boy", "prince", "king", "rooster", "fisherman", "postman", "wizard"}
KINDS = WORDS["animals"] + WORDS["people"]
PRONOUNS = {
    False: {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    True: {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}
PLANS = {
    "lost": "{name} loses the {thing} and {helper} helps to find it",
    "stuck": "the {thing} gets stuck and {helper} helps to free it",
    "broken": "the {thing} breaks and {helper} helps to mend it",
    "taken": "somebody takes the {thing} and {helper} helps to get it back",
    "storm": "a bad night comes and {helper} gives {name} shelter",
    "quarrel": "{name} and {helper} quarrel about the {thing} and make up",
    "heavy": "the {thing} is too heavy and {helper} helps to carry it",
    "skill": "{name} learns to use the {thing} with the help of {helper}",
    "lonely": "{name} is lonely and finds a friend, {helper}, with the {thing}",
    "way": "{name} gets lost with the {thing} and {helper} shows the way home",
}
SYSTEM = (
    "You are a storyteller.",
    "You tell stories to children.",
    "You are a helpful assistant.",
    "You are a friendly assistant who likes stories.",
    "You are a writer. Use simple words.",
    "Answer in plain English.",
    "You are a kind grandmother who tells bedtime stories.",
    "Keep your stories friendly.",
    "You write short stories.",
)
REQUESTS = (
    "Tell me a story about {what}.",
    "Tell me a {length}story about {what}.",
    "Can you tell me a {length}story about {what}?",
    "Please tell me a {length}story about {what}.",
    "Write a {length}story about {what}.",
    "Please write a {length}story about {what}.",
    "Make up a {length}story about {what}.",
    "I would like to hear a {length}story about {what}.",
    "I want a {length}story about {what}.",
    "Could you write a {length}story with {what}?",
    "Write me a {length}story with {what} in it.",
    "My child wants a {length}bedtime story about {what}.",
    "Give me a {length}story about {what}, please.",
    "Do you know a {length}story about {what}?",
    "A {length}story about {what}, please.",
    "Let me hear a {length}story with {what}.",
    "Invent a {length}story about {what}.",
    "tell me a {length}story about {what}",
)


class Story:
    """The people and things of one story. The draws are made once, so that every mention agrees.

    `animal`, `thing`, `place`, `helper_kind` and `name` fix a draw. A first mention introduces ("an old owl named
    Olive", "a goat"), later ones refer back ("Olive", "the goat").
    """

    def __init__(self, draw: random.Random, animal: str | None = None, thing: str | None = None):
        pick = draw.choice
        self.draw = draw
        self.animal = animal or pick(KINDS if draw.random() < 0.4 else WORDS["animals"])
        self.thing = thing or pick(WORDS["objects"])
        self.helper_kind, self.other = draw.sample([kind for kind in draw.sample(KINDS, 5) if kind != self.animal], 2)
        she, she2 = self._gender(self.animal), self._gender(self.helper_kind)
        self.name = pick(WORDS["girls" if she else "boys"])
        self.helper = pick(WORDS["girls" if she2 else "boys"])
        while self.helper == self.name:
            self.helper = pick(WORDS["girls" if she2 else "boys"])
        wet = self.animal in ("whale", "dolphin", "shark", "seahorse", "starfish", "octopus", "goldfish", "salmon")
        self.place = pick(WATER_PLACES if wet else WORDS["places"])
        self.color, self.look = pick(WORDS["colors"]), pick(WORDS["looks"])
        self.family = pick(list(PLANS))
        self.food, self.food2 = draw.sample(WORDS["foods"], 2)
        self.introduced: set[str] = set()
        self.fixed = {
            "name": self.name,
            "animal": self.animal,
            "thing": self.thing,
            "place": self.place,
            "helper_kind": self.helper_kind,
            "color": self.color,
            "look": self.look,
            "food": self.food,
            "food2": self.food2,
            "weather": pick(WORDS["weather"]),
            "nature": pick(WORDS["natures"]),
            "intro": f"{a(pick(WORDS['natures']) + ' ' + self.animal)} named {self.name}",
            **PRONOUNS[she],
            **{f"{word}2": value for word, value in PRONOUNS[she2].items()},
        }

    def _gender(self, kind: str) -> bool:
        return kind in FEMALE or (kind not in MALE and self.draw.random() < 0.5)

    def fill(self, slot: str) -> str:
        """The words for a slot; see story_frames.txt for the slots."""
        if (value := self.fixed.get(slot)) is not None:
            return value
        draw = self.draw
        if slot == "hero":
            return self.name if draw.random() < 0.65 else f"the {self.animal}"
        if slot == "object":
            return f"the {self.color} {self.thing}" if draw.random() < 0.25 else f"the {self.thing}"
        if slot == "a_object":
            self.introduced.add("object")
            return a(f"{self.look} {self.color} {self.thing}" if draw.random() < 0.3 else f"{self.color} {self.thing}")
        if slot == "helper_name":
            self.introduced.add("helper")
            return self.helper
        if slot in ("helper", "helper_intro"):
            if "helper" not in self.introduced:
                self.introduced.add("helper")
                return f"{a(draw.choice(WORDS['helper_natures']) + ' ' + self.helper_kind)} named {self.helper}"
            return self.helper if draw.random() < 0.8 else f"the {self.helper_kind}"
        if slot in ("other", "a_other"):
            if "other" not in self.introduced:
                self.introduced.add("other")
                return a(self.other)
            return f"the {self.other}"
        if slot == "spot":
            return draw.choice([spot for spot in draw.sample(WORDS["places"], 2) if spot != self.place])
        return draw.choice(WORDS[{"plant": "plants", "color2": "colors"}[slot]])

    def write(self, details: int = 2, moral: bool | None = None) -> str:
        """The story in 60 to 250 words; more `details` make it longer. `moral` None leaves the last beat to chance."""
        draw = self.draw
        late = min(draw.randint(0, details), 3)  # sentences about the helper, once there is one
        early = details - late
        last = "moral" if moral else draw.choice(("moral", "ending", ""))
        beats = ["setting", "want", *["detail"] * early, f"problem {self.family}", f"help {self.family}"]
        beats += [*["detail2"] * late, f"fix {self.family}", "feeling", last]
        used: set[int] = set()
        lines = []
        for beat in filter(None, beats):
            frame = draw.choice(FRAMES[beat])
            while id(frame) in used:
                frame = draw.choice(FRAMES[beat])
            used.add(id(frame))
            lines.append(frame.fill(draw, self))
        if draw.random() < 0.5:
            return " ".join(lines)
        parts = lines[: 2 + early], lines[2 + early : 5 + details], lines[5 + details :]
        return "\n\n".join(" ".join(part) for part in parts)

    def write_short(self) -> str:
        """The story in two sentences."""
        return self.draw.choice(FRAMES["short"]).fill(self.draw, self)

    def plan(self) -> str:
        """One clause that says what happens."""
        return PLANS[self.family].format(name=self.name, helper=self.helper, thing=self.thing)


def tell(draw: random.Random, story: Story) -> tuple[str, str]:
    """A request for the story and the story, which does what the request asks for."""
    what = f"{a(story.animal)} and {a(story.thing)}"
    kind = draw.random()
    if kind < 0.10:
        what = f"{a(story.animal)} named {story.name} and {a(story.thing)}"
    elif kind < 0.18:
        what = f"{a(story.animal)}, {a(story.helper_kind)} and {a(story.thing)}"
    elif kind < 0.26:
        what = f"{a(story.animal)} and {a(story.thing)} {story.place}"
    elif kind < 0.30:
        what = f"{a(story.thing)} and {a(story.animal)}"
    request, length, moral, ending = draw.choice(REQUESTS), "", None, ""
    details = draw.randrange(6)
    style = draw.random()
    if style < 0.10:
        length = "two sentence "
    elif style < 0.20:
        length, details = "short ", 0
    elif style < 0.27:
        length, details = "long ", draw.randint(6, 8)
    elif style < 0.34:
        moral, ending = True, draw.choice((" with a moral", " that ends with a moral", " and give it a moral"))
    elif style < 0.41:
        ending = draw.choice((" with a happy end", " with a happy ending", " and let it end well"))
    if "{length}" not in request:
        length, details = "", min(details, 5)
    text = story.write_short() if length == "two sentence " else story.write(details, moral)
    return request.format(length=length, what=what + ending), text


def samples(draw: random.Random) -> Iterator[Sample]:
    """Half raw texts, some with a title; half chats that ask for a story. Endless."""
    while True:
        story = Story(draw)
        if draw.random() < 0.5:
            text = story.write(draw.randrange(8)) if draw.random() < 0.95 else story.write_short()
            title = f"The {story.animal.title()} and the {story.thing.title()}\n\n" if draw.random() < 0.25 else ""
            yield Sample("stories", text=title + text)
            continue
        request, text = tell(draw, story)
        messages = [{"role": "user", "content": request}]
        if draw.random() < 0.4:
            messages.insert(0, {"role": "system", "content": draw.choice(SYSTEM)})
        answer = {"role": "assistant", "content": text}
        thinking = draw.random() < 0.1
        if thinking:
            answer["reasoning_content"] = draw.choice(
                (
                    f"The user wants a story about {a(story.animal)} and {a(story.thing)}. Plan: {story.plan()}.",
                    f"The hero is {story.name} the {story.animal}, the friend is {story.helper} the"
                    f" {story.helper_kind}. In the story {story.plan()}.",
                    f"I need {a(story.animal)} and {a(story.thing)}. I will tell how {story.plan()}.",
                )
            )
        yield Sample("stories", messages=[*messages, answer], thinking=thinking)


def has(word: str, text: str) -> bool:
    """Whether the text has the word, in the singular or with an s, whatever the case."""
    return re.search(rf"\b{re.escape(word)}s?\b", text, re.IGNORECASE) is not None


def probes(draw: random.Random) -> Iterator[Probe]:
    """Requests with two nouns; the story must name both. Endless."""
    while True:
        story = Story(draw)
        animal, thing = story.animal, story.thing
        request = draw.choice(REQUESTS).format(length="", what=f"{a(animal)} and {a(thing)}")

        def check(answer: Answer, animal: str = animal, thing: str = thing) -> dict[str, bool]:
            return {"both nouns": has(animal, answer.content) and has(thing, answer.content)}

        yield Probe("stories", [{"role": "user", "content": request}], check, max_tokens=400)
