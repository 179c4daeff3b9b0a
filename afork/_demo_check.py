"""What the pool of the demo runs: whether the servers' answers are right."""

from __future__ import annotations

import math

import afork.rpc

#: The number of the request in whose answer a worker is killed.
FATAL = 500
PRIMES_IN_TABLE = 539_777  # below 8,000,000


def check(answers: list[tuple[int, bytes]]) -> list[int]:
    """The numbers of the requests with a right answer; an event for every ten."""
    right = []
    for i, (number, body) in enumerate(answers, 1):
        if is_right(number, body):
            right.append(number)
        if i % 10 == 0:
            afork.rpc.event(10)
    return right


def question(number: int) -> int:
    """The number whose next prime a request asks for."""
    return number * 499 % 999_983


def is_right(number: int, body: bytes) -> bool:
    """Whether a body is what was asked for."""
    if number == FATAL:
        return body.count(1) == PRIMES_IN_TABLE
    first, last = question(number), int(body)
    return is_prime(last) and not any(map(is_prime, range(first, last)))


def is_prime(n: int) -> bool:
    """By trial division: not by the table that the servers have."""
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
