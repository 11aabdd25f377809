"""Chi-squared without a statistics package."""

from __future__ import annotations

from collections.abc import Sequence


def chi_squared_limit(degrees: int, deviations: float = 4.0) -> float:
    """What a chi-squared value of `degrees` stays below but once in 30,000 times (4 deviations): Wilson and Hilferty
    1931."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + deviations * spread**0.5) ** 3


def fits(counts: Sequence[int], probabilities: Sequence[float]) -> bool:
    """Whether counts could come from these probabilities; cells expected less than 5 times are put together."""
    total = sum(counts)
    cells = sorted(zip(probabilities, counts, strict=True), reverse=True)
    pooled, rest = [], [0.0, 0]
    for probability, count in cells:
        if probability * total >= 5:
            pooled.append((probability * total, count))
        else:
            rest = [rest[0] + probability * total, rest[1] + count]
    if rest[0] >= 5:
        pooled.append((rest[0], int(rest[1])))
    elif rest[1] > 5 + 5 * rest[0]:
        return False  # what should hardly happen does
    value = sum((count - expected) ** 2 / expected for expected, count in pooled)
    return value < chi_squared_limit(len(pooled) - 1)


def same_source(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two rows of counts could come from one distribution; cells seen less than 10 times are put together."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a + b >= 10]
    rare = [(a, b) for a, b in zip(first, second, strict=True) if a + b < 10]
    if rare:
        pairs.append((sum(a for a, _ in rare), sum(b for _, b in rare)))
    total = sum(a + b for a, b in pairs)
    shares = [sum(column) / total for column in zip(*pairs, strict=True)]
    value = sum(
        (count - (a + b) * share) ** 2 / ((a + b) * share)
        for a, b in pairs
        for count, share in zip((a, b), shares, strict=True)
        if a + b
    )
    return value < chi_squared_limit(len(pairs) - 1)
