"""A burst of requests passes in order, a few in a turn of the event loop."""

import asyncio
from itertools import groupby

from dsv4serve.api.turnstile import PER_TURN, Turnstile


def passes(num_requests, cancelled=()):
    """(turn of the loop, number) of the requests in the order in which they passed."""
    passed, turn = [], 0

    async def request(turnstile, number):
        await turnstile.enter()
        passed.append((turn, number))

    async def main():
        nonlocal turn
        turnstile = Turnstile()
        tasks = [asyncio.create_task(request(turnstile, number)) for number in range(num_requests)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        while not all(task.done() for task in tasks):
            turn += 1
            await asyncio.sleep(0)

    asyncio.run(main())
    return passed


def test_a_few_pass_in_a_turn_in_their_order():
    passed = passes(5 * PER_TURN + 1)
    assert [number for _, number in passed] == list(range(5 * PER_TURN + 1))
    sizes = [len(list(group)) for _, group in groupby(passed, key=lambda one: one[0])]
    assert sizes == [PER_TURN] * 5 + [1]


def test_who_goes_away_while_waiting_takes_nobodys_place():
    gone = range(PER_TURN, 3 * PER_TURN)
    passed = passes(4 * PER_TURN, cancelled=gone)
    assert [number for _, number in passed] == [n for n in range(4 * PER_TURN) if n not in gone]
