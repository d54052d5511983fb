"""The verifier: is a boxed answer right? math-verify in worker processes that can be killed."""

import ast
import atexit
import logging
import multiprocessing
import operator
import os
import re
import threading
from collections.abc import Callable
from fractions import Fraction

import math_verify
import pebble
from tqdm import tqdm

from core.processes import first_line, print0

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we bring our own time limit

BRACES = re.compile(r"\\boxed\{|\\(?!\\boxed\{)[\\{}]|[{}]")  # \{ and \} are characters of a set, not braces
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", "×": "*", "÷": "/", "−": "-"}


# Finding the answer -------------------------------------------------------------------------------
def boxed(text: str) -> list[str]:
    r"""The contents of every closed, non-empty, outermost \boxed{...}, in order and in one pass."""
    opened, spans, found = [], [], []
    for token in BRACES.finditer(text):
        if token[0] in ("{", r"\boxed{"):
            opened.append(token)
        elif token[0] == "}" and opened and (start := opened.pop())[0] != "{":
            spans.append((start.end(), token.start()))
    last = -1
    for start, end in sorted(spans):
        if start > last:
            last = end
            found.append(text[start:end].strip())
    return [content for content in found if content]


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
    """What is graded: all, or of a thought that prompt or text opens what follows </think>, up to a
    second one.
    """
    return (text.split("</think>")[1:] or [""])[0] if thinks or opens(text) else text


# Comparing ----------------------------------------------------------------------------------------
def plain_integer(text: str) -> bool:
    """Whether a text is an integer in ASCII digits, short enough to compare at once."""
    return text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 100


def countdown_correct(equation: str, target: int, nums: list[int]) -> bool:
    """Whether an equation over + - * / hits the target and uses each number once. Never eval."""
    for latex, plain in LATEX.items():
        equation = equation.replace(latex, plain)
    left, equals, right = equation.partition("=")
    if len(equation) > 200 or (equals and right.strip() != str(target)) or not re.fullmatch(r"[0-9+*/() -]+", left):
        return False  # the characters keep out 0x2C, 4_4 and comments, which Python would read
    used = []

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"{type(node).__name__} is not allowed")

    try:
        value = walk(ast.parse(left.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False  # not an equation: a wrong answer, not an error of the verifier
    return value == target and sorted(used) == sorted(nums)


def parse_gold(answer: str) -> list:
    r"""math-verify reads `2^{10}`, `3\sqrt{2}` or `\$18` right only between dollars."""
    return math_verify.parse(answer if re.search(r"(?<!\\)\$", answer) else f"${answer}$", parsing_timeout=None)


def check_item(item: tuple[str, str | None]) -> bool:
    """In a worker: whether a prediction equals the gold, or with None whether the gold parses."""
    gold, prediction = item
    gold_parsed = parse_gold(gold)
    if prediction is None:
        return bool(gold_parsed)
    parsed = math_verify.parse(f"\\boxed{{{prediction}}}", parsing_timeout=None)
    return bool(math_verify.verify(gold_parsed, parsed, timeout_seconds=None))


# Worker processes ---------------------------------------------------------------------------------

_pool: pebble.ProcessPool | None = None
_pool_lock = threading.Lock()


def in_pool(function: Callable, items: list[tuple], time_limit: float, progress: str = "") -> tuple[list, int]:
    """function(*item) of all in worker processes. (results, errors): None for one that died."""
    global _pool
    if not items or multiprocessing.parent_process():  # in a worker, whose time is limited already
        return [function(*item) for item in items], 0
    with _pool_lock:
        if _pool is None or not _pool.active:
            fork = multiprocessing.get_context("fork")
            _pool = pebble.ProcessPool(max_workers=min(8, os.cpu_count() or 1), context=fork)
        futures = [_pool.schedule(function, args=item, timeout=time_limit) for item in items]
    results, errors = [], 0
    for future in tqdm(futures, desc=progress or "verifying", disable=None, leave=False, delay=2):
        error = future.exception()  # what a worker raised, TimeoutError where it hung, ProcessExpired where it died
        if error is not None:
            print0(f"reward error: {first_line(error)}")
            errors += 1
        results.append(None if error is not None else future.result())
    return results, errors


def check_items(items: list[tuple[str, str | None]], time_limit: float, progress: str = "") -> tuple[list[bool], int]:
    """check_item of all in the pool. (verdicts, errors): to hang or crash is False and an error."""
    verdicts, errors = in_pool(check_item, [(item,) for item in items], time_limit, progress)
    return [bool(verdict) for verdict in verdicts], errors


@atexit.register
def close_verifier() -> None:
    """Stop the worker processes."""
    global _pool
    with _pool_lock:
        if _pool is not None:
            _pool.stop()
            _pool.join()
            _pool = None


def golds_parse(answers: list[str | dict], time_limit: float = 5.0) -> list[bool]:
    """Whether the verifier can read each gold; plain integers and Countdown need no parser."""
    asked = [i for i, answer in enumerate(answers) if isinstance(answer, str) and not plain_integer(answer.strip())]
    verdicts, _ = check_items([(answers[i], None) for i in asked], time_limit, "parsing answers")
    readable = [True] * len(answers)
    for i, verdict in zip(asked, verdicts, strict=True):
        readable[i] = verdict
    return readable


def verify(
    texts: list[str],
    answers: list[str | dict],  # a string, or {"target", "nums"} for Countdown
    many_boxes: str = "zero",  # several different boxes: zero, or last to take the last one
    time_limit: float = 5.0,  # seconds per item
    progress: str = "",
) -> tuple[list[float], int]:
    """(1.0 where the boxed answer of a text is right, else 0.0; the number of verifier errors).

    A box is required. Countdown, equal strings and plain integers are decided here, the rest by
    math-verify.
    """
    scores, asked = [0.0] * len(texts), []
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        boxes = boxed(text)
        if not boxes or (len(set(boxes)) > 1 and many_boxes == "zero"):
            continue
        box = boxes[-1]
        if isinstance(answer, dict):
            scores[i] = float(countdown_correct(box, answer["target"], answer["nums"]))
        elif box == answer.strip():
            scores[i] = 1.0
        elif plain_integer(box) and plain_integer(answer.strip()):
            scores[i] = float(int(box) == int(answer))
        else:
            asked.append((i, answer, box))
    verdicts, errors = check_items([(answer, box) for _, answer, box in asked], time_limit, progress)
    for (i, _, _), verdict in zip(asked, verdicts, strict=True):
        scores[i] = float(verdict)
    return scores, errors
