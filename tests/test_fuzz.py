"""A thousand texts a day that no policy should write: what the verifier owes to each of them."""

import datetime
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from core import verifier
from core.verifier import close_verifier, golds_parse, in_pool, verify

TOWERS = [
    "9^{9^{9^{9}}}",
    "10**10**8",
    "2^{2^{2^{2^{2}}}}",
    "(x+1)^{100000}",
    r"10^{-10^{10}}",
    "0.1e99999",
    "7" * 1999,
]
TOWERS += [
    "10000000!",
    "9!!!!",
    r"\binom{10^9}{10^8}",
    r"\sum_{n=1}^{10^9} n",
    r"\prod_{n=1}^{10^6} n",
    "1+" * 900 + "1",
]
TOWERS += [
    "{" * 990 + "1" + "}" * 990,
    "(" * 1900,
    r"\frac{" * 300,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    "{" * 200000,
    "½" * 1999,
]
ATOMS = [*"0 1 -7 42 0.5 1e-7 3,000 50\\% x y e i pi \\pi n! √2 ½ 3² ∞ −5 １２ 90° $5 5cm Paris yes no A (E)".split()]
ATOMS += [
    *"\\infty x' 5_3 ... \\text{red} \\mathrm{m} \\ldots \\unknown {} } { $ $$ \\ ^ _ & % # ~ ' \" = < > | [ )".split()
]
ATOMS += [
    *"\\left( \\\\ é 年 😀 اب knight knave \\begin{pmatrix}1\\\\2\\end{pmatrix} \\int \\lim \\cases Eq(x,1)".split()
]
ATOMS += [*"\x00\x0b\x1b\ud7ff\u200b\u2028\u202e\ufeff\uffff"]
JOINS = (
    " + ",
    "-",
    "*",
    "/",
    "^",
    ", ",
    " ",
    "",
    "=",
    r" \cdot ",
    " and ",
    r"\approx ",
    r"\in ",
    r"\\",
    "\n",
    r"\cup ",
    ";",
)
WRAPS = [
    "({})",
    "{{{}}}",
    r"\frac{{{}}}{{3}}",
    r"\sqrt{{{}}}",
    r"\{{{}\}}",
    "[{})",
    r"\text{{{}}}",
    r"\boxed{{{}}}",
    "|{}|",
    "${}$",
]
WRAPS += [
    r"\left({}\right)",
    r"\sin({})",
    "f({})",
    "{}!",
    "-{}",
    "{}^{{2}}",
    "{}_{{2}}",
    "<think>{}</think>",
    "Max({}, 2)",
]


def grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger formulas of smaller ones."""
    joined = st.tuples(parts, st.sampled_from(JOINS), parts).map("".join)
    return joined | st.tuples(st.sampled_from(WRAPS), parts).map(lambda pair: pair[0].format(pair[1]))


FORMULA = st.recursive(st.sampled_from(ATOMS) | st.text(max_size=6) | st.integers().map(str), grown, max_leaves=4)
ANSWER = st.sampled_from([True, *[False] * 15]).flatmap(lambda hostile: st.sampled_from(TOWERS) if hostile else FORMULA)
NUMBERS = st.fixed_dictionaries({"target": st.integers(), "nums": st.lists(st.integers(), min_size=1, max_size=4)})
GOLD = FORMULA.filter(str.strip) | FORMULA.filter(str.strip).map(str.strip) | NUMBERS
TEXT = st.tuples(st.lists(st.tuples(FORMULA, ANSWER), max_size=3), FORMULA).map(
    lambda found: "".join(f"{before} \\boxed{{{box}}}" for before, box in found[0]) + found[1]
)
TODAY = datetime.datetime.now(tz=datetime.UTC).toordinal()


def drawn(strategy: st.SearchStrategy, count: int) -> list:
    """Examples of a strategy, the same ones all day."""
    found = []

    @seed(TODAY)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @given(strategy)
    def collect(example: object) -> None:
        found.append(example)

    collect()
    return (found * count)[:count]  # hypothesis makes fewer where it knows all


def resident_mb(pid: int) -> float:
    """Memory of a process; 0 if it has ended."""
    path = Path(f"/proc/{pid}/statm")
    return int(path.read_text().split()[1]) * 4096 / 2**20 if path.exists() else 0.0


def nap(seconds: float) -> str:
    """In a worker: an item that takes a while."""
    time.sleep(seconds)
    return "done"


def workers() -> list[int]:
    """The pool's processes, when those that hung have been replaced."""
    in_pool(time.sleep, [(0.5,)] * 4, 5.0)
    return [*verifier._pool._pool_manager.worker_manager.workers.copy()]


@pytest.mark.timeout(300)
def test_a_thousand_texts():
    """Nothing is raised, rewards are 0 or 1, the pool lives, its memory and time are bounded."""
    pairs = drawn(st.tuples(TEXT, GOLD), 1000)
    close_verifier()
    since = time.monotonic()
    scores, _ = verify([text for text, _ in pairs], [gold for _, gold in pairs], time_limit=2.0)
    seconds = time.monotonic() - since
    assert len(scores) == 1000 and set(scores) <= {0.0, 1.0} and seconds < 120
    assert verify([r"\boxed{0.5}"], [r"\frac12"]) == ([1.0], 0)
    sizes = [resident_mb(pid) for pid in workers()]
    print(f"{seconds:.1f} s, workers of {[round(size) for size in sizes]} MB")
    assert sizes and max(sizes) < resident_mb(os.getpid()) + 500


@pytest.mark.timeout(300)
def test_a_gold_that_can_be_met_is_met_by_its_own_box():
    """And nothing but a time limit is an error of an item, in whichever order two are compared."""
    golds = [
        gold for gold in drawn(GOLD, 300) if isinstance(gold, str) and verifier.boxed(f"\\boxed{{{gold}}}") == [gold]
    ]
    readable = golds_parse(golds, time_limit=2.0)
    met, _ = verify([f"\\boxed{{{gold}}}" for gold in golds], golds, time_limit=2.0)
    assert sum(readable) > 50 and all(score for score, ok in zip(met, readable, strict=True) if ok)
    found, _ = in_pool(raised, [*zip(golds, golds[1:] + golds[:1], strict=True)], 2.0)
    assert not [*filter(None, found)]


def raised(gold: str, said: str) -> str:
    """In a worker: what comparing two answers raises, if anything."""
    try:
        verifier.check_item(gold, said), verifier.check_item(said, gold)
    except MemoryError:  # of the limit
        return ""
    except Exception as error:  # anything else is one of ours
        return f"{gold!r} against {said!r}: {error!r}"
    return ""


NUMBER = st.sampled_from(
    ["2", "7", "12", "0.5", r"\frac{1}{2}", r"\sqrt{2}", r"\pi", "x", "x+1", "2(3)", "3^2", "-4", "1e3"]
)


@pytest.mark.timeout(300)
def test_values_are_equal_in_either_order():
    """Of sums, products and fractions; a text that is equal to another one has its equals."""
    values = drawn(
        st.recursive(NUMBER, lambda v: st.tuples(v, st.sampled_from("+*-"), v).map("".join), max_leaves=4), 40
    )
    pairs = [(a, b) for i, a in enumerate(values[:14]) for b in values[:i]]
    there, _ = in_pool(verifier.check_item, pairs, 10.0)
    back, _ = in_pool(verifier.check_item, [(b, a) for a, b in pairs], 10.0)
    assert [*zip(pairs, there, strict=True)] == [*zip(pairs, back, strict=True)]


def eat(size: int) -> int:
    """In a worker: take memory."""
    return len(bytes(size))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_worker_has_two_gigabytes():
    """More is one item's error, and the next item works."""
    assert in_pool(eat, [(3 * 2**30,), (2**20,)], 5.0) == ([None, 2**20], 1)
