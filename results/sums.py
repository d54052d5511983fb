"""Sums of two to four numbers for results/real.py: problems with traces, and their reward."""

import re
from random import Random


def last_number(problem, completion: str) -> float:
    """1 where the last number is the answer; no box is asked for."""
    numbers = re.findall(r"\d+", completion.replace(",", ""))
    return float(numbers[-1:] == [problem.answer])


def sums(seed: int, n: int) -> list[dict]:
    """n different problems, a third each of two, three and four numbers from 10 to 99."""
    rng, rows = Random(seed), {}
    while len(rows) < n:
        numbers = [rng.randint(10, 99) for _ in range(2 + len(rows) % 3)]
        totals = [sum(numbers[: i + 1]) for i in range(len(numbers))]
        lines = [f"{a} + {b} = {c}." for a, b, c in zip(totals, numbers[1:], totals[1:], strict=False)]
        question = f"What is {' + '.join(map(str, numbers))}?"
        trace = " ".join([*lines, f"The answer is {totals[-1]}."])
        rows[question] = {"problem": question, "answer": str(totals[-1]), "solution": trace}
    return list(rows.values())
