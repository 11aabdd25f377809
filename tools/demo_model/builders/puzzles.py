"""Small puzzles in words: comparing, sorting, counting letters and legs, syllogisms, families, the calendar."""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.demo_model.builders.chats import THINKING_SHARE, answered, question
from tools.demo_model.builders.values import BOYS, GIRLS, NAMES, WORDS, made_up, words
from tools.demo_model.sample import Answer, Probe, Sample

CATEGORY = "puzzles"
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
LEGS = {
    2: words("ducks hens penguins geese parrots owls"),
    4: words("dogs cats horses cows sheep foxes rabbits goats pigs lions"),
    6: words("bees ants beetles flies crickets"),
    8: words("spiders scorpions"),
}
ANIMALS = tuple(word for word in WORDS["animals"] if word[-1] in "nrtgkb")  # whose plural is with -s
ADJECTIVES = words("red loud soft tall cold round bright quick heavy sweet")
Puzzle = tuple[str, str, str]  # question, answer, steps that lead to it


def compare(draw: random.Random) -> Puzzle:
    """Which of two different numbers is larger or smaller."""
    top = draw.choice((20, 100, 1000, 10000))
    a, b = draw.sample(range(top), 2)
    larger = draw.random() < 0.6
    word, result = ("larger", max(a, b)) if larger else ("smaller", min(a, b))
    forms = ("Which number is {w}, {a} or {b}?", "Which is {w}: {a} or {b}?", "{a} or {b}: which one is {w}?")
    sign = "<" if a < b else ">"
    return (
        draw.choice(forms).format(w=word, a=a, b=b),
        f"{result} is {word}.",
        f"{a} {sign} {b}, so {result} is {word}.",
    )


def parity(draw: random.Random) -> Puzzle:
    """Even or odd."""
    a = draw.randrange(draw.choice((10, 100, 1000, 10000)))
    kind = "odd" if a % 2 else "even"
    forms = ("Is {} even or odd?", "Is the number {} odd or even?", "Tell me if {} is even or odd.")
    return draw.choice(forms).format(a), f"{a} is {kind}.", f"The last digit of {a} is {a % 10}, which is {kind}."


def sort_numbers(draw: random.Random) -> Puzzle:
    """Three to six numbers in order."""
    items = draw.sample(range(draw.choice((10, 100, 100, 1000))), draw.randint(3, 6))
    down = draw.random() < 0.3
    order = "from large to small" if down else draw.choice(("from small to large", "in ascending order"))
    shown, result = ", ".join(map(str, items)), ", ".join(map(str, sorted(items, reverse=down)))
    verb = draw.choice(("Sort", "Order", "Please sort"))
    steps = f"The {'largest' if down else 'smallest'} is {result.split(',')[0]}. In order: {result}."
    return f"{verb} these numbers {order}: {shown}", result, steps


def sort_words(draw: random.Random) -> Puzzle:
    """Three to five words by the alphabet."""
    pool = [word for kind in ("animals", "objects", "foods") for word in WORDS[kind] if " " not in word]
    items = draw.sample(sorted(set(pool)), draw.randint(3, 5))
    result = ", ".join(sorted(items))
    forms = ("Sort these words alphabetically: {}", "Put these words in alphabetical order: {}")
    firsts = ", ".join(word[0] for word in sorted(items))
    return draw.choice(forms).format(", ".join(items)), result, f"First letters in order: {firsts}. So: {result}."


def letters(draw: random.Random) -> Puzzle:
    """How often a letter is in a word."""
    word = draw.choice(draw.choice((WORDS["animals"], WORDS["foods"], [made_up(draw)]))).replace(" ", "")
    letter = draw.choice(word) if draw.random() < 0.8 else draw.choice("abcdefghilmnoprstuvw")
    count = word.count(letter)
    forms = ('How many times does "{l}" appear in "{w}"?', "How many letters {l} are in the word {w}?",
             'Count the letter "{l}" in "{w}".')  # fmt: skip
    times = f"{count} time{'s' * (count != 1)}"
    spelled = f"The letters of {word} are {', '.join(word)}. The letter {letter} appears {times}."
    return draw.choice(forms).format(l=letter, w=word), f'The letter "{letter}" appears {times} in "{word}".', spelled


def word_length(draw: random.Random) -> Puzzle:
    """How many letters a word has."""
    word = draw.choice(draw.choice((WORDS["animals"], WORDS["foods"], [made_up(draw)]))).replace(" ", "")
    forms = ("How many letters does the word {w} have?", 'How long is the word "{w}"?', "Count the letters of {w}.")
    counted = ", ".join(f"{letter} {place}" for place, letter in enumerate(word, start=1))
    return draw.choice(forms).format(w=word), f"The word {word} has {len(word)} letters.", f"Counting: {counted}."


def legs(draw: random.Random) -> Puzzle:
    """The legs of two or three groups of animals."""
    parts, total, steps = [], 0, []
    for each in draw.sample(sorted(LEGS), draw.choice((1, 2, 2, 3))):
        count, animal = draw.randint(2, 9), draw.choice(LEGS[each])
        parts.append(f"{count} {animal}")
        steps.append(f"{count} {animal} have {count} x {each} = {count * each} legs.")
        if total:
            steps.append(f"{total} + {count * each} = {total + count * each}.")
        total += count * each
    shown = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    forms = ("How many legs do {} have?", "How many legs do {} have together?", "Count the legs of {}.")
    return draw.choice(forms[: 1 + 2 * (len(parts) > 1)]).format(shown), f"They have {total} legs.", " ".join(steps)


def syllogism(draw: random.Random) -> Puzzle:
    """All A are B (or adjectives), x is an A: is x a B?"""
    one = made_up(draw) if draw.random() < 0.5 else draw.choice(ANIMALS)
    name, quality, other = draw.choice(NAMES), *draw.sample(ADJECTIVES, 2)
    fact = f"{name} is {'an' if one[0] in 'aeiou' else 'a'} {one}"
    case = draw.randrange(3)
    if case == 2:
        steps = f"All {one}s are {quality}, but nothing is said about {other}."
        return f"All {one}s are {quality}. {fact}. Is {name} {other}?", "That cannot be known.", steps
    rule = f"{'No' if case else 'All'} {one}s are {quality}"
    answer = f"No, {name} is not {quality}." if case else f"Yes, {name} is {quality}."
    return f"{rule}. {fact}. Is {name} {quality}?", answer, f"{fact}. {rule}."


def family(draw: random.Random) -> Puzzle:
    """One or two steps in a family."""
    a, c = draw.sample(GIRLS, 2)
    b, d = draw.sample(BOYS, 2)
    facts, who, whom, role = draw.choice((
        (f"{a} is the mother of {b}.", b, a, "son"),
        (f"{d} is the father of {b}.", b, d, "son"),
        (f"{d} is the father of {c}.", c, d, "daughter"),
        (f"{a} is the mother of {c}.", c, a, "daughter"),
        (f"{a} and {b} have the same parents.", a, b, "sister"),
        (f"{a} and {b} have the same parents.", b, a, "brother"),
        (f"{a} is the mother of {b}. {b} is the father of {c}.", a, c, "grandmother"),
        (f"{a} is the mother of {b}. {b} is the father of {d}.", d, a, "grandson"),
        (f"{d} is the father of {b}. {b} is the father of {c}.", d, c, "grandfather"),
        (f"{d} is the father of {b}. {b} is the father of {c}.", c, d, "granddaughter"),
        (f"{a} is the sister of {b}. {b} is the father of {c}.", a, c, "aunt"),
        (f"{d} is the brother of {a}. {a} is the mother of {c}.", d, c, "uncle"),
    ))  # fmt: skip
    answer = f"{who} is {whom}'s {role}."
    return f"{facts} Who is {who} to {whom}?", answer, f"{facts} {who} is a {'girl' if who in (a, c) else 'boy'}."


def calendar(draw: random.Random) -> Puzzle:
    """Days and months some steps away, and the lengths of months."""
    case, steps = draw.randrange(4), draw.randint(1, 9)
    if case == 0:
        start = draw.randrange(7)
        back = draw.random() < 0.3
        day = DAYS[(start - steps if back else start + steps) % 7]
        when = f"{steps} day{'s' * (steps > 1)} {'before' if back else 'after'}"
        walk = [DAYS[(start + (-i if back else i)) % 7] for i in range(1, steps + 1)]
        return f"What day is {when} {DAYS[start]}?", f"It is {day}.", f"From {DAYS[start]}: {', '.join(walk)}."
    if case == 1:
        start = draw.randrange(12)
        month = MONTHS[(start + steps) % 12]
        walk = [MONTHS[(start + i) % 12] for i in range(1, steps + 1)]
        asked = f"Which month is {steps} month{'s' * (steps > 1)} after {MONTHS[start]}?"
        return asked, f"It is {month}.", f"From {MONTHS[start]}: {', '.join(walk)}."
    if case == 2:
        number = draw.randrange(12)
        note = " In a leap year it has 29." if number == 1 else ""
        asked = draw.choice(("How many days does {} have?", "How many days are in {}?")).format(MONTHS[number])
        answer = f"{MONTHS[number]} has {LENGTHS[number]} days.{note}"
        return asked, answer, f"{MONTHS[number]} is month {number + 1} of the year."
    start, date = draw.randrange(7), draw.randint(1, 20)
    walk = [DAYS[(start + i) % 7] for i in range(1, steps + 1)]
    asked = f"If the {_ordinal(date)} is a {DAYS[start]}, what day is the {_ordinal(date + steps)}?"
    way = f"{date + steps} - {date} = {steps}. From {DAYS[start]}: {', '.join(walk)}."
    return asked, f"It is a {walk[-1]}.", way


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


KINDS: tuple[Callable[[random.Random], Puzzle], ...] = (
    compare, parity, sort_numbers, sort_words, letters, word_length, legs, syllogism, family, calendar,
)  # fmt: skip


def sample(draw: random.Random) -> Sample:
    """One puzzle as a chat."""
    asked, answer, steps = draw.choice(KINDS)(draw)
    messages = question(draw, asked)
    return answered(messages, CATEGORY, answer, steps if draw.random() < THINKING_SHARE * 1.5 else None)


def probe(draw: random.Random) -> Probe:
    """One puzzle; right when the answer is the expected one word for word."""
    asked, expected, _ = draw.choice(KINDS)(draw)

    def check(answer: Answer) -> dict[str, bool]:
        return {"right": answer.content.strip() == expected}

    return Probe("puzzles", [{"role": "user", "content": asked}], check)
