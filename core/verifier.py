"""The verifier: is a boxed answer right? math-verify in worker processes that can be killed."""

import ast
import atexit
import logging
import math
import multiprocessing
import operator
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import pebble

from core.answers import LONGEST, TYPE, equal, is_words, parts, rewritten, words_right
from core.processes import first_line, print0, waiting

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we bring our own time limit
pebble.CONSTS.term_timeout = 0.1  # seconds until a worker that hung, and ignores SIGTERM, is killed

BRACES = re.compile(r"\\boxed\s{0,9}\{|\\(?!\\boxed\s{0,9}\{)[\\{}]|[{}]")  # \{ and \} belong to a set
BLANK = re.compile(r"\\[hv]?phantom\{[^{}]*\}|\s")  # prints nothing: the box that a question shows
LINE_END = re.compile(r"(?<!\\\\)(?<![,&\[$])\n")  # the lines of a display end otherwise
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
PLAIN = (*TYPE, (r"\\times|\\cdot", "*"), (r"\\div", "/"), (r"\[", "("), (r"\]", ")"))
FRACTION = r"\\[dtc]?frac ?(?:\{([^{}]*)\} ?\{([^{}]*)\}|(\d)(\d))"
MOST_BOXES = 16  # different ones in a text that are compared; with more it has no answer


# Finding the answer -------------------------------------------------------------------------------
def boxed(text: str) -> list[str]:
    r"""The contents of every closed, non-empty, outermost \boxed{...}, in order and in one pass."""
    opened, spans = [], []
    for token in BRACES.finditer(text):
        if token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token)
        elif token[0] == "}" and opened and (start := opened.pop())[0] != "{":
            while spans and spans[-1].start > start.end():  # boxes inside of this one
                spans.pop()
            spans.append(slice(start.end(), token.start()))
    return [text[span].strip() for span in spans if BLANK.sub("", text[span])]


def last_box(text: str) -> str | None:
    """The content of the last box of a text; None without one."""
    return next(reversed(boxed(text)), None)


def completion_text(ids: list[int], tokenizer, stop_ids: list[int] = ()) -> str:
    """What a completion says: all but the stop tokens and padding at its end."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, *stop_ids}
    return tokenizer.decode(ids[: max((i for i, token in enumerate(ids, 1) if token not in ends), default=0)])


def opens(text: str) -> bool:
    """Whether a text begins with a thought of its own."""
    return text.lstrip().startswith("<think>")


def answer_part(text: str, thinks: bool) -> str:
    """What is graded: all; after a thought, open in prompt or text, what is up to a second one."""
    return (text.split("</think>")[1:] or [""])[0] if thinks or opens(text) else text


# Comparing ----------------------------------------------------------------------------------------
def plain_integer(text: str) -> bool:
    """Whether a text is an integer in ASCII digits, short enough to compare at once."""
    return text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 100


def countdown_gold(answer: object) -> bool:
    """Whether an answer is {"target": whole number, "nums": list of them}."""
    held = answer if isinstance(answer, dict) else {}
    numbers = [held.get("target"), *held["nums"]] if isinstance(held.get("nums"), list) else [None]
    return all(type(number) is int for number in numbers)


def countdown_correct(equation: str, target: int, nums: list[int]) -> bool:
    """Whether an equation over + - * / hits the target and uses each number once. Never eval."""
    equation = rewritten(equation, PLAIN) if len(equation) <= 400 else ""
    while re.search(FRACTION, equation):  # innermost first
        equation = re.sub(FRACTION, r"((\1\3)/(\2\4))", equation)
    sides = [side.strip() for side in equation.split("=")]
    left = [side for side in sides if side != str(target)] or [str(target)]
    equation = re.sub(r"(?<=[\d)]) *(?=\()", "*", re.sub(r"[{}]", "", left[0]))
    if len(equation) > 200 or len(left) > 1 or not re.fullmatch(r"[0-9+*/() -]+", equation):
        return False  # the characters keep out 0x2C, 4_4 and comments, which Python would read

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"{type(node).__name__} is not allowed")

    try:
        value = walk(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False  # not an equation: a wrong answer, not an error of the verifier
    return value == target and sorted(map(int, re.findall(r"\d+", equation))) == sorted(nums)


def countdown_right(answer: dict, boxes: list[str]) -> bool:
    """Whether there are equations, and all solve the problem."""
    return bool(boxes) and all(countdown_correct(box, answer["target"], answer["nums"]) for box in boxes)


def check_item(gold: str, prediction: str, *lines: tuple[str, ...]) -> bool:
    """In a worker: whether a prediction equals the gold.

    Of several boxes, given line by line, all must be equal; k boxes of one line are one answer to
    a gold of k parts.
    """
    if not lines:
        return equal(gold, prediction)
    count, answers = len(parts(rewritten(gold, TYPE))), []
    for boxes in map(dict.fromkeys, lines):
        joined = len(boxes) == count and all(len(parts(rewritten(box, TYPE))) == 1 for box in boxes)
        answers += [", ".join(boxes)] if joined else boxes
    last = answers[-1]
    return equal(gold, last) and all(said == last or equal(last, said) or equal(said, last) for said in set(answers))


# Worker processes ---------------------------------------------------------------------------------
_pool: pebble.ProcessPool | None = None
_pool_lock = threading.Lock()


def risk(text: str) -> int:
    """What is verified last: long texts, and powers, factorials and the like that may never end."""
    return len(text) + 50 * text.count("^") + 100 * len(re.findall(r"!|\\(?:binom|sum|prod|int|lim|zeta)", text))


def calm() -> None:
    """As a worker begins: signals to the run's group are not its, and memory ends 2 GB above."""
    os.setpgrp()
    if sys.platform == "linux":
        forked = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (forked + 2**31, resource.RLIM_INFINITY))


def timed(seconds: float, function: Callable, *item: object) -> tuple[object, float]:
    """In a worker: (what a function says, seconds of its CPU that took)."""
    since = time.process_time()
    limit = math.ceil(since + seconds) + 5  # for one that hangs when a killed run can no longer end it
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    return function(*item), time.process_time() - since


def in_pool(
    function: Callable,
    items: list[tuple],
    time_limit: float,  # seconds of one item
    progress: str = "",
    hostile: bool = False,  # (gold, a policy's text) each: quick ones first, after 10 s of slow ones no more
) -> tuple[list, int]:
    """function(*item) of all in worker processes. (results, errors): None for one that died."""
    global _pool
    if not items or multiprocessing.parent_process():  # in a worker, whose time is limited already
        return [function(*item) for item in items], 0
    with _pool_lock:
        if _pool is None or not _pool.active:
            fork = multiprocessing.get_context("fork")
            _pool = pebble.ProcessPool(max_workers=min(8, os.cpu_count() or 1), initializer=calm, context=fork)
        order = sorted(range(len(items)), key=lambda i: risk(items[i][1]) if hostile else i)
        futures = {i: _pool.schedule(timed, args=(time_limit, function, *items[i]), timeout=time_limit) for i in order}
    budget = 10 * max(1, len(items) / 1000) if hostile else math.inf
    results, errors, lost = [None] * len(items), [], 0.0
    for i, future in waiting(futures.items(), desc=progress or "verifying"):
        since = time.monotonic()
        if lost > budget and future.cancel():
            error = TimeoutError("given up, since items before it took too long")
        else:
            error = future.exception()  # what a worker raised, TimeoutError where it hung, ProcessExpired if it died
        waited = time.monotonic() - since
        results[i], spent = (None, waited) if error else future.result()
        lost += min(waited, spent) if spent > 0.5 else 0.0  # on a busy machine only what is slow of itself
        errors += [first_line(error)] if error else []
    if errors:
        print0(f"reward errors: {len(errors)} of {len(items)} items, the first: {errors[0]}")
    return results, len(errors)


@atexit.register
def close_verifier() -> None:
    """Stop the worker processes."""
    global _pool
    with _pool_lock:
        if _pool is not None:
            _pool.stop()
            _pool.join()
            _pool = None


def golds_parse(answers: list[str | dict], time_limit: float = 5.0, right: Callable | None = None) -> list[bool]:
    """Whether each gold can be answered: whether its own box is right, or it is Countdown's."""
    if right:
        numbers = right is countdown_right
        return [countdown_gold(a) if numbers else isinstance(a, str) and right(a, [a]) for a in answers]
    asked = [a for a in answers if isinstance(a, str) and not plain_integer(a.strip())]
    verdicts, _ = in_pool(check_item, [(a, a) for a in asked], time_limit, "reading answers")
    read = dict(zip(asked, verdicts, strict=True))
    return [bool(read.get(a, True)) if isinstance(a, str) else countdown_gold(a) for a in answers]


def verify(
    texts: list[str],
    answers: list[str | dict],  # a string, or {"target", "nums"} for Countdown
    many_boxes: str = "zero",  # several boxes that differ in value: zero, or last to take the last one
    time_limit: float = 5.0,  # seconds per item
    progress: str = "",
    right: Callable | None = None,  # what compares boxes with an answer; None: by what the answer looks like
) -> tuple[list[float], int]:
    """(1.0 where the boxed answer of a text is right, else 0.0; the number of verifier errors).

    A box is required. Countdown, words, equal strings and plain integers are decided here,
    the rest in the pool.
    """
    scores, asked = [0.0] * len(texts), {}  # asked: by the place of the text
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        boxes = boxed(text) if many_boxes == "zero" else boxed(text)[-1:]
        different = set(boxes)
        if not boxes or len(different) > MOST_BOXES or max(map(len, boxes)) > LONGEST:
            continue
        box = boxes[-1]
        if right or isinstance(answer, dict):
            scores[i] = float((right or countdown_right)(answer, different))
        elif different == {answer.strip()}:
            scores[i] = 1.0
        elif len(different) == 1 and plain_integer(box) and plain_integer(answer.strip()):
            scores[i] = float(int(box) == int(answer))
        elif is_words(answer):
            scores[i] = float(words_right(answer, different))
        elif len(different) > 1:
            lines = [tuple(boxed(line)) for line in LINE_END.split(text)]
            whole = [*chain(*lines)] == boxes  # no box goes over several lines
            asked[i] = (answer, box, *filter(None, dict.fromkeys(lines if whole else zip(boxes))))
        else:
            asked[i] = (answer, box)
    verdicts, errors = in_pool(check_item, [*asked.values()], time_limit, progress, hostile=True)
    for i, verdict in zip(asked, verdicts, strict=True):
        scores[i] = float(bool(verdict))
    return scores, errors
