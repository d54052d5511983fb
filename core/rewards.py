"""Rewards: what a completion earns, by the verifier or by a function of one's own."""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.answers import knights_right, words_right
from core.processes import fail, first_line
from core.verifier import answer_part, countdown_right, in_pool, verify

RewardFn = Callable[[object, str], float | dict[str, tuple[float, float]]]  # (problem, completion) -> number or parts


@dataclass(frozen=True)
class Grader:
    """How the completions of a run are graded; every problem holds it."""

    source: str = ""  # FILE.py:FUNCTION of one's own; empty: the verifier
    kind: str = ""  # words_reward and the like, for all answers; empty: what each looks like
    solved: float = 1.0  # a reward from here on is a solved problem
    seconds: float = 5.0  # time limit of one completion

    def solves(self, reward: float) -> bool:
        """Whether a reward reaches --solved; weighted parts may sum to a hair less."""
        return reward >= self.solved - 1e-6


VERIFIER = Grader()


class Grade(NamedTuple):
    """What a completion earned: the weighted sum of its parts, if the function names any."""

    reward: float
    parts: dict[str, float] = {}


def countdown_reward(problem, completion: str) -> float:
    """1 where the boxed equation hits the target and uses each number once, else 0."""
    return verify([answer_part(completion, problem.thinks)], [problem.answer], right=countdown_right)[0][0]


def knights_reward(problem, completion: str) -> float:
    """1 where the box has each name as knight or knave, as in the answer, else 0."""
    return verify([answer_part(completion, problem.thinks)], [problem.answer], right=knights_right)[0][0]


def words_reward(problem, completion: str) -> float:
    """1 where the box has the answer's words, else 0."""
    return verify([answer_part(completion, problem.thinks)], [problem.answer], right=words_right)[0][0]


def math_reward(problem, completion: str) -> float:
    """One of these by what the answer looks like, else 1 where values are equal: the default."""
    return verify([answer_part(completion, problem.thinks)], [problem.answer])[0][0]


# What verify is given for them, whole batches at a time.
COMPARED = {"math_reward": None, "countdown_reward": countdown_right, "knights_reward": knights_right}
COMPARED |= {"words_reward": words_right}


def load_grader(run, reward_fn: RewardFn) -> Grader:
    """The grader of a RunConfig: FILE.py:FUNCTION or a name of --reward, else the method file's.

    A file that has no such function ends the run with a sentence.
    """
    if not run.reward and ("." in reward_fn.__qualname__ or reward_fn.__name__ == "<lambda>"):
        fail("reward_fn must be a function at the top of a file: worker processes load it from there")
    source = run.reward or f"{inspect.getsourcefile(reward_fn)}:{reward_fn.__name__}"
    path, _, name = source.rpartition(":")
    ours = Path(name).name  # settings.json says ../words_reward
    if ours in COMPARED and Path(path or __file__).resolve() == Path(__file__).resolve():
        return Grader("", ours if COMPARED[ours] else "", run.solved, run.reward_seconds)
    if not Path(path).is_file():
        fail(f"--reward {source}: no file {path or source}; write FILE.py:FUNCTION or one of {', '.join(COMPARED)}")
    try:
        load_function(source)
    except Exception as error:  # whatever a file of the user's own raises while it runs
        fail(f"--reward {source}: {path} cannot be run, or has no function {name} ({first_line(error)})")
    return Grader(f"{Path(path).resolve()}:{name}", "", run.solved, run.reward_seconds)


@functools.cache
def load_function(source: str) -> Callable:
    """The function of FILE.py:FUNCTION. The file runs once a process, imports from its folder."""
    path, _, name = source.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"reward_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    return getattr(module, name)


def call(source: str, problem, completion: str) -> Grade:
    """In a worker: what a function of one's own says of a completion.

    It returns a number, or {name: (weight, number)}. ValueError where it returns anything else.
    """
    found = load_function(source)(problem, completion)
    parts = found if isinstance(found, dict) else {"": (1.0, found)}
    try:
        reward = math.fsum(float(weight) * float(value) for weight, value in parts.values())
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise ValueError(f"a reward is a finite number or {{name: (weight, number)}}, not {found!r}")
    return Grade(reward, {name: float(value) for name, (_, value) in parts.items() if name})


def grade(problems: list, texts: list[str], progress: str = "", many_boxes: str = "zero") -> tuple[list[Grade], int]:
    """(the grade of every text, the number of errors): what hangs or crashes earns 0.

    A function of one's own sees the problem and the whole text, the verifier the text after a
    thought. `many_boxes` is the verifier's.
    """
    grader = problems[0].grader if problems else VERIFIER
    if not grader.source:
        parts = [answer_part(text, problem.thinks) for problem, text in zip(problems, texts, strict=True)]
        answers, right = [p.answer for p in problems], COMPARED.get(grader.kind)
        rewards, errors = verify(parts, answers, many_boxes, grader.seconds, progress, right)
        return [Grade(reward) for reward in rewards], errors
    items = [(grader.source, problem, text) for problem, text in zip(problems, texts, strict=True)]
    found, errors = in_pool(call, items, grader.seconds, progress)
    return [Grade(0.0) if result is None else result for result in found], errors
