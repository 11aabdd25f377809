"""Sums, differences, products, quotients and word problems, with worked steps where a step at a time is needed.

Every answer ends with its result, so that the last number of an answer is what a probe checks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tools.demo_model.builders import puzzles
from tools.demo_model.builders.chats import THINKING_SHARE, answered, question
from tools.demo_model.builders.values import BOYS, GIRLS, WORDS
from tools.demo_model.sample import Answer, Probe, Sample

CATEGORY = "arithmetic"
PUZZLE_SHARE = 0.3


@dataclass(frozen=True)
class Problem:
    """`steps` lead to the result. `direct` answers need no steps; the others show them outside thinking mode too."""

    question: str
    answer: str
    steps: str
    result: int
    direct: bool = True


FORMS = {
    "+": (
        "What is {a} + {b}?", "{a}+{b}=", "{a} + {b} =", "Add {a} and {b}.", "What is {a} plus {b}?", "{a} + {b}",
        "Calculate {a} + {b}.", "How much is {a} plus {b}?", "What is the sum of {a} and {b}?", "{a} plus {b}?",
        "Please add {a} and {b}.", "Compute {a} + {b}.", "Can you tell me what {a} + {b} is?",
    ),
    "-": (
        "What is {a} - {b}?", "{a}-{b}=", "{a} - {b} =", "Subtract {b} from {a}.", "What is {a} minus {b}?",
        "{a} - {b}", "Calculate {a} - {b}.", "How much is {a} minus {b}?", "{a} minus {b}?", "Compute {a} - {b}.",
        "What is the difference of {a} and {b}?", "Take {b} away from {a}.", "Can you tell me what {a} - {b} is?",
    ),
    "x": (
        "What is {a} x {b}?", "{a}x{b}=", "{a} x {b} =", "Multiply {a} by {b}.", "What is {a} times {b}?", "{a} x {b}",
        "Calculate {a} * {b}.", "How much is {a} times {b}?", "{a} times {b}?", "What is {a} * {b}?", "{a}*{b}=",
        "What is the product of {a} and {b}?", "Compute {a} * {b}.",
    ),
    "/": (
        "What is {a} / {b}?", "Divide {a} by {b}.", "{a} / {b} =", "What is {a} divided by {b}?", "{a}/{b}=",
        "Calculate {a} / {b}.", "How much is {a} divided by {b}?",
    ),
}  # fmt: skip
COLUMNS = ("Ones", "Tens", "Hundreds")


def number(draw: random.Random, digits: int) -> int:
    """A number of exactly `digits` digits; one digit may be 0."""
    return draw.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def add_columns(a: int, b: int) -> str:
    """Column addition in words: "Ones: 7 + 8 = 15, write 5, carry 1. Tens: ..."."""
    carry, steps = 0, []
    width = max(len(str(a)), len(str(b)))
    for place, name in enumerate(COLUMNS[:width]):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        terms = f"{x} + {y} + 1" if carry else f"{x} + {y}"
        carry = total // 10
        tail = f", write {total % 10}, carry 1" if carry and place + 1 < width else ""
        steps.append(f"{name}: {terms} = {total}{tail}.")
    return " ".join([*steps, f"Result: {a + b}."])


def subtract_columns(a: int, b: int) -> str:
    """Column subtraction for a >= b: "Ones: 2 - 8, borrow, 12 - 8 = 4. Tens: ..."."""
    borrow, steps = 0, []
    for place, name in enumerate(COLUMNS[: len(str(a))]):
        x, y = a // 10**place % 10, b // 10**place % 10
        terms = f"{x} - {y} - 1" if borrow else f"{x} - {y}"
        low = x - y - borrow
        text = (
            f"{terms}, borrow, {terms.replace(str(x), str(x + 10), 1)} = {low + 10}" if low < 0 else f"{terms} = {low}"
        )
        borrow = int(low < 0)
        steps.append(f"{name}: {text}.")
    return " ".join([*steps, f"Result: {a - b}."])


def _expression(draw: random.Random, symbol: str, a: int, b: int, result: int, steps: str, direct: bool) -> Problem:
    expression = f"{a} {symbol} {b}"
    asked = draw.choice(FORMS[symbol]).format(a=a, b=b)
    return Problem(asked, f"{expression} = {result}.", steps, result, direct)


def sum_of(draw: random.Random, digits: int | None = None) -> Problem:
    """a + b; both of `digits` digits, or of 1 to 3 each."""
    a, b = _pair(draw, digits)
    steps = add_columns(a, b) if max(a, b) > 9 else f"{a} + {b} = {a + b}."
    return _expression(draw, "+", a, b, a + b, steps, direct=True)


def difference(draw: random.Random, digits: int | None = None) -> Problem:
    """a - b; below zero in one of ten."""
    a, b = _pair(draw, digits)
    a, b = max(a, b), min(a, b)
    steps = subtract_columns(a, b) if a > 9 else f"{a} - {b} = {a - b}."
    if a > b and draw.random() < 0.1:
        steps = f"{b} is less than {a}, so the result is below zero. {a} - {b}: {steps} So it is {b - a}."
        return _expression(draw, "-", b, a, b - a, steps, direct=True)
    return _expression(draw, "-", a, b, a - b, steps, direct=True)


def _pair(draw: random.Random, digits: int | None) -> tuple[int, int]:
    if digits is None:
        size = draw.choices((1, 2, 3), (1, 4, 5))[0]
        first, second = size, size if draw.random() < 0.8 else draw.randint(1, size)
        if draw.random() < 0.5:
            first, second = second, first
        return number(draw, first), number(draw, second)
    return number(draw, digits), number(draw, digits)


def small_product(draw: random.Random) -> Problem:
    """Two digits times one digit, or one times one."""
    a, b = number(draw, draw.choice((1, 2, 2, 2))), number(draw, 1)
    tens, ones = a // 10 * 10, a % 10
    steps = f"{a} x {b} = {a * b}."
    if tens and ones:
        steps = f"{tens} x {b} = {tens * b}. {ones} x {b} = {ones * b}. {tens * b} + {ones * b} = {a * b}."
    if draw.random() < 0.2:
        return _expression(draw, "x", b, a, a * b, steps, direct=True)
    return _expression(draw, "x", a, b, a * b, steps, direct=True)


def product(draw: random.Random) -> Problem:
    """Two digits times two digits, with steps unless the second ends in 0."""
    a, b = number(draw, 2), number(draw, 2)
    tens, ones = b // 10 * 10, b % 10
    steps = f"{a} x {tens} = {a * tens}."
    if ones:
        steps += f" {a} x {ones} = {a * ones}. {a * tens} + {a * ones} = {a * b}."
    return _expression(draw, "x", a, b, a * b, steps, direct=not ones)


def quotient(draw: random.Random) -> Problem:
    """A division without remainder by one digit."""
    b, result = draw.randint(1, 9), draw.randint(1, 20)
    return _expression(draw, "/", b * result, b, result, f"{b} x {result} = {b * result}.", direct=True)


def three_terms(draw: random.Random) -> Problem:
    """a + b + c or a + b - c, always with steps."""
    a, b, c = (number(draw, draw.choice((1, 2, 2))) for _ in range(3))
    sign = draw.choice("+-") if a + b >= c else "+"
    result = a + b + c if sign == "+" else a + b - c
    expression = f"{a} + {b} {sign} {c}"
    asked = draw.choice(("What is {}?", "{} =", "Calculate {}.", "How much is {}?", "{}")).format(expression)
    steps = f"{a} + {b} = {a + b}. {a + b} {sign} {c} = {result}."
    return Problem(asked, f"{expression} = {result}.", steps, result, direct=False)


STORIES = (  # text, question, answer, operations on a, b and c
    ("{N} has {a} {things}. {M} gives {him} {b} more.", "How many does {N} have now?", "{N} has {r} {things}.", "+"),
    ("{N} has {a} {things} and {M} has {b} {things}.", "How many do they have together?", "They have {r}.", "+"),
    ("There are {a} {things} in a box. {N} puts in {b} more.", "How many are in the box?", "There are {r}.", "+"),
    ("{N} picks {a} {foods} on Monday and {b} on Tuesday.", "How many is that in all?", "That is {r} {foods}.", "+"),
    ("{N} has {a} {things}. {He} gives {b} to {M}.", "How many {things} does {N} have left?", "{N} has {r} left.", "-"),
    ("There are {a} {foods} on the table. {N} takes {b} of them.", "How many are left?", "There are {r} left.", "-"),
    ("{N} had {a} coins and spent {b}.", "How many coins are left?", "There are {r} left.", "-"),
    ("{N} has {a} {things}. {M} has {b}.", "How many more does {N} have?", "{N} has {r} more.", "-"),
    ("{N} has {a} bags with {b} {things} each.", "How many {things} is that?", "That is {r} {things}.", "x"),
    ("A box holds {b} {things}. {N} buys {a} boxes.", "How many {things} does {he} get?", "{He} gets {r}.", "x"),
    ("{N} reads {b} pages a day for {a} days.", "How many pages does {he} read?", "{He} reads {r} pages.", "x"),
    ("{N} shares {a} {foods} among {b} friends.", "How many does each friend get?", "Each friend gets {r}.", "/"),
    ("{N} puts {a} {things} into {b} equal piles.", "How many are in each pile?", "Each pile has {r}.", "/"),
    ("{N} has {a} {foods}. {M} gives {him} {b}. {He} eats {c}.", "How many are left?", "There are {r} left.", "+-"),
    ("{N} has {a} {things}, finds {b} more and loses {c}.", "How many are there now?", "There are {r}.", "+-"),
    ("{N} has {a} {things}, gives {b} to {M} and buys {c} more.", "How many are there now?", "There are {r}.", "-+"),
    ("{N} buys {a} boxes of {b} {things} and gives {c} to {M}.", "How many are left?", "There are {r} left.", "x-"),
    ("{N} has {c} {things} and buys {a} boxes with {b} more each.", "How many are there now?", "There are {r}.", "x+"),
)  # fmt: skip
FOODS = WORDS["foods"][:14]
THINGS = ("marbles", "stamps", "cards", "books", "pencils", "shells", "stickers", "balloons", "buttons", *FOODS)


def word_problem(draw: random.Random) -> Problem:
    """A little story with one operation, or with two, which are then always worked out."""
    text, asked, answer, operations = draw.choice(STORIES)
    names = draw.choice((GIRLS, BOYS))
    first, other = draw.choice(names), draw.choice(FRIENDS)
    while other == first:
        other = draw.choice(FRIENDS)
    if operations[0] == "x":
        a, b = draw.randint(2, 9), draw.randint(2, 20)
    elif operations[0] == "/":
        b = draw.randint(2, 9)
        a = b * draw.randint(2, 12)
    else:
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        if operations[0] == "-":
            a, b = max(a, b), min(a, b)
    result = _apply(operations[0], a, b)
    steps, c = f"{a} {operations[0]} {b} = {result}.", 0
    if len(operations) == 2:
        c = draw.randint(1, min(30, result) if operations[1] == "-" else 30) if result else 0
        total = _apply(operations[1], result, c)
        steps, result = f"{steps} {result} {operations[1]} {c} = {total}.", total
    words = {"N": first, "M": other, "a": a, "b": b, "c": c, "r": result}
    words |= {"things": draw.choice(THINGS), "foods": draw.choice(FOODS)}
    words |= {"he": "he", "He": "He", "him": "him"} if names is BOYS else {"he": "she", "He": "She", "him": "her"}
    direct = len(operations) == 1
    return Problem(f"{text} {asked}".format(**words), answer.format(**words), steps, result, direct)


def _apply(operation: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "x": a * b, "/": a // max(b, 1)}[operation]


FRIENDS = GIRLS[:20] + BOYS[:20]
KINDS: tuple[tuple[Callable[[random.Random], Problem], int], ...] = (
    (sum_of, 30), (difference, 26), (small_product, 12), (product, 8), (quotient, 5), (three_terms, 7),
    (word_problem, 12),
)  # fmt: skip


def problem(draw: random.Random) -> Problem:
    """A problem of any kind, in the training shares."""
    return draw.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])[0](draw)


def _chat(draw: random.Random) -> Sample:
    task = problem(draw)
    messages = question(draw, task.question)
    if draw.random() < THINKING_SHARE * 1.3:  # three-digit sums need the thinking mode most
        return answered(messages, CATEGORY, task.answer, task.steps)
    return answered(messages, CATEGORY, task.answer if task.direct else f"{task.steps} {task.answer}", None)


def _lines(draw: random.Random) -> Sample:
    """Raw text: a page of exercises with their answers."""
    tasks = [draw.choice((sum_of, difference, small_product))(draw) for _ in range(draw.randint(6, 16))]
    return Sample(CATEGORY, text="\n".join(task.answer for task in tasks))


def samples(draw: random.Random) -> Iterator[Sample]:
    """Chats and exercise pages, with puzzles among them."""
    while True:
        if draw.random() < PUZZLE_SHARE:
            yield puzzles.sample(draw)
        else:
            yield _chat(draw) if draw.random() < 0.85 else _lines(draw)


def last_number(text: str) -> int | None:
    """The last number in `text`; a minus counts when no digit, letter or space and digit stand before it."""
    found = re.findall(r"(?<![\w.])-?\d+", text)
    return int(found[-1]) if found else None


def probe(category: str, task: Problem, thinking: bool) -> Probe:
    """Asks `task`: right when the last number is the result; in thinking mode also closed when content came."""

    def check(answer: Answer) -> dict[str, bool]:
        measures = {"right": last_number(answer.content) == task.result}
        if thinking:
            measures["closed"] = answer.finish_reason == "stop" and bool(answer.content.strip())
        return measures

    return Probe(category, [{"role": "user", "content": task.question}], check, thinking=thinking)


def probes(draw: random.Random) -> Iterator[Probe]:
    """All categories in turn."""
    while True:
        for digits in (2, 3):
            for thinking in (False, True):
                mode = ", thinking" if thinking else ""
                yield probe(f"sums, {digits} digits{mode}", sum_of(draw, digits), thinking)
                yield probe(f"differences, {digits} digits{mode}", difference(draw, digits), thinking)
        yield probe("products, 2x1 digits", small_product(draw), False)
        yield probe("products, 2x2 digits, thinking", product(draw), True)
        yield probe("word problems", word_problem(draw), False)
        yield probe("word problems, thinking", word_problem(draw), True)
        yield puzzles.probe(draw)
