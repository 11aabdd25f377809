"""Facts made by rules and small tables: calendar, plurals, counting, number words, letters, colors, animals."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from tools.demo_model.builders.grammar import a, capital, words

WORDS = words("words.txt")
TABLES = words("basics.txt")
DAYS, MONTHS, ONES, TENS, ORDINALS = (TABLES[name] for name in ("days", "months", "ones", "tens", "ordinals"))
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def pairs(name: str) -> dict[str, str]:
    """A section of basics.txt whose entries are key:value."""
    return dict(entry.split(":") for entry in TABLES[name])


PLURALS, COLORS, YOUNG, SOUNDS, MIXES = (pairs(name) for name in ("plurals", "colors", "young", "sounds", "mixes"))


@dataclass(frozen=True)
class Fact:
    """A question, its answer as a sentence, and the bare answer where one word or name is enough."""

    question: str
    answer: str
    short: str = ""


def plural(noun: str) -> str:
    """The plural of a noun in lower case; of two words the last one changes."""
    *front, last = noun.split(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    else:
        last += "s"
    return " ".join([*front, last])


def number_word(number: int) -> str:
    """An English number word, 0 to 999."""
    if number >= 100:
        rest = number % 100
        return f"{ONES[number // 100]} hundred" + (f" and {number_word(rest)}" if rest else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def calendar(draw: random.Random) -> Fact:
    """Days and months."""
    kind = draw.randrange(5)
    step, word = draw.choice(((1, "after"), (-1, "before")))
    if kind == 0:
        place = draw.randrange(7)
        day, other = DAYS[place], DAYS[(place + step) % 7]
        question = draw.choice(("What day comes {} {}?", "Which day is {} {}?", "What is the day {} {}?"))
        return Fact(question.format(word, day), f"{other} comes {word} {day}.", other)
    if kind == 1:
        place = draw.randrange(12)
        month, other = MONTHS[place], MONTHS[(place + step) % 12]
        question = draw.choice(("What month comes {} {}?", "Which month is {} {}?", "What is the month {} {}?"))
        return Fact(question.format(word, month), f"{other} comes {word} {month}.", other)
    if kind == 2:
        place = draw.randrange(12)
        answer = f"{MONTHS[place]} has {LENGTHS[place]} days" + (", and 29 in a leap year." if place == 1 else ".")
        return Fact(f"How many days does {MONTHS[place]} have?", answer, str(LENGTHS[place]))
    if kind == 3:
        place = draw.randrange(12)
        answer = f"The {ORDINALS[place]} month of the year is {MONTHS[place]}."
        return Fact(f"What is the {ORDINALS[place]} month of the year?", answer, MONTHS[place])
    place, days = draw.randrange(7), draw.randint(2, 6)
    other = DAYS[(place + days) % 7]
    question = f"Today is {DAYS[place]}. What day is it in {number_word(days)} days?"
    return Fact(question, f"In {number_word(days)} days it is {other}.", other)


def counting(draw: random.Random) -> Fact:
    """Counting up, down and in steps; number words."""
    kind = draw.randrange(4)
    if kind == 0:
        start, steps = draw.randint(0, 90), draw.randint(3, 10)
        numbers = range(start, start + steps)
        question = draw.choice(("Count from {} to {}.", "Can you count from {} to {}?"))
    elif kind == 1:
        start, steps = draw.randint(10, 99), draw.randint(3, 9)
        numbers = range(start, start - steps, -1)
        question = draw.choice(("Count down from {} to {}.", "Count backwards from {} to {}."))
    elif kind == 2:
        step = draw.choice((2, 3, 5, 10))
        numbers = range(step, step * draw.randint(4, 9), step)
        question = f"Count by {number_word(step)}s from {{}} to {{}}."
    else:
        number = draw.randint(0, 999)
        if draw.random() < 0.5:
            return Fact(f"Write {number} in words.", f"{number} is {number_word(number)}.", number_word(number))
        written = number_word(number)
        return Fact(f"Write {written} as a number.", f"{capital(written)} is {number}.", str(number))
    return Fact(question.format(numbers[0], numbers[-1]), ", ".join(map(str, numbers)) + ".")


def letters(draw: random.Random) -> Fact:
    """The alphabet and spelling."""
    kind = draw.randrange(5)
    alphabet = string.ascii_uppercase
    if kind == 0:
        place = draw.randrange(25)
        first, second = alphabet[place], alphabet[place + 1]
        if draw.random() < 0.5:
            return Fact(f"Which letter comes after {first}?", f"{second} comes after {first}.", second)
        return Fact(f"Which letter comes before {second}?", f"{first} comes before {second}.", first)
    if kind == 1:
        place = draw.randrange(12)
        answer = f"The {ORDINALS[place]} letter of the alphabet is {alphabet[place]}."
        return Fact(f"What is the {ORDINALS[place]} letter of the alphabet?", answer, alphabet[place])
    word = draw.choice(WORDS[draw.choice(("animals", "objects", "foods", "people"))])
    if kind == 2:
        first = word[0].upper()
        return Fact(f"What is the first letter of {word}?", f"The first letter of {word} is {first}.", first)
    question = draw.choice(("Spell {}.", "How do you spell {}?", 'Spell the word "{}".', "Can you spell {}?"))
    return Fact(question.format(word), "-".join(word.replace(" ", "").upper()))


def plurals(draw: random.Random) -> Fact:
    """The plural of a noun and the singular of a plural."""
    noun = draw.choice(WORDS[draw.choice(("animals", "objects", "people"))] + list(PLURALS))
    many = plural(noun)
    if draw.random() < 0.25:
        return Fact(f"What is the singular of {many}?", f"The singular of {many} is {noun}.", noun)
    question = draw.choice(("What is the plural of {}?", "Give me the plural of {}.", "What is the plural form of {}?"))
    return Fact(question.format(noun), f"The plural of {noun} is {many}.", many)


def everyday(draw: random.Random) -> Fact:
    """Colors, young animals and sounds."""
    kind = draw.randrange(4)
    if kind == 0:
        thing = draw.choice(list(COLORS))
        question = draw.choice(("What color is {}?", "Which color does {} have?", "Tell me the color of {}."))
        return Fact(question.format(thing), f"{capital(thing)} is {COLORS[thing]}.", COLORS[thing])
    if kind == 1:
        pair = draw.choice(list(MIXES))
        mixed = MIXES[pair]
        first, second = draw.sample(pair.split("+"), 2)
        question = draw.choice(("What do you get when you mix {} and {}?", "Which color do {} and {} make?"))
        return Fact(question.format(first, second), f"{capital(first)} and {second} make {mixed}.", mixed)
    animal = draw.choice(list(YOUNG if kind == 2 else SOUNDS))
    if kind == 2:
        question = draw.choice(("What is a young {} called?", "What do you call a baby {}?"))
        return Fact(question.format(animal), f"A young {animal} is called {a(YOUNG[animal])}.", YOUNG[animal])
    question = draw.choice(("What does {} say?", "What sound does {} make?", "Which sound does {} make?"))
    return Fact(question.format(a(animal)), f"{capital(a(animal))} says {SOUNDS[animal]}.", SOUNDS[animal])


def basic(draw: random.Random) -> Fact:
    """One fact of any kind of this file."""
    return draw.choice((calendar, counting, letters, plurals, everyday))(draw)
