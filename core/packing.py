"""Packing: which rows make a micro-batch of which rank, and how they stand in its line."""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def measure(rows: list[tuple[Sequence[int], Sequence[int], int]]) -> list[tuple[int, int]]:
    """Of rows (prompt, completion, expert tokens that open it): (tokens, how many of the first are
    those of the row before it too), which a group has computed once: its prompt and prefix.
    """
    found = [(len(prompt) + len(completion), 0) for prompt, completion, _ in rows]
    for i, ((prompt, completion, expert), (own, other, less)) in enumerate(pairwise(rows), 1):
        opening = min(expert, less, len(completion) - 1, len(other) - 1)
        opening *= completion[:opening] == other[:opening]
        found[i] = (found[i][0], len(own) + opening if own == prompt else 0)
    return found


def cost(size: int, shared: int) -> float:
    """Of a row without its first, shared tokens: tokens, and attention's share at 7B."""
    return size - shared + (size**2 - shared**2) / 41_000


def units(rows: list[tuple[int, int]], limit: int) -> list[list[tuple[int, int]]]:
    """Consecutive rows with a beginning in common stand together, up to limit tokens, such that the
    fewest are left: (row, tokens that the first of the unit has already), the first one's own 0.
    """
    best: list[tuple[int, list]] = [(0, [])]  # tokens of the first rows, and the chain of their units, the last first
    for end in range(1, len(rows) + 1):
        options, total, shared = [], 0, rows[end - 1][0]
        for start in range(end - 1, -1, -1):
            total += rows[start][0]
            tokens = total - (end - start - 1) * shared
            if start < end - 1 and (not shared or tokens > limit):
                break
            options.append((best[start][0] + tokens, start, shared))
            shared = min(shared, rows[start][1])
        tokens, start, shared = min(options, key=lambda option: option[0])
        best.append((tokens, [[(start, 0), *((i, shared) for i in range(start + 1, end))], best[start][1]]))
    found, chain = [], best[-1][1]
    while chain:
        found, chain = [chain[0], *found], chain[1]
    return found


def deal(parts: list[list[tuple[int, int]]], sizes: list[int], ranks: int, budget: int) -> list[list[list]]:
    """Units to as few micro-batches as the budget allows, equally full, those of one k alike."""
    tokens = [sum(sizes[i] - shared for i, shared in part) for part in parts]

    def spread(count: int) -> list[list[tuple[int, int]]] | None:
        """The longest unit first, each to the emptiest micro-batch; None where the budget ends."""
        filled, emptiest = [[] for _ in range(count * ranks)], [(0, b) for b in range(count * ranks)]
        for part in sorted(range(len(parts)), key=lambda part: -tokens[part]):
            used, b = emptiest[0]
            if used and used + tokens[part] > budget:
                return None
            filled[b] += parts[part]
            heapq.heapreplace(emptiest, (used + tokens[part], b))
        return filled

    counts = range(-(-sum(min(size, budget) for size in tokens) // (budget * ranks)), -(-len(parts) // ranks))
    filled = spread(counts.start + bisect_left(counts, True, key=lambda count: spread(count) is not None))
    filled.sort(key=lambda rows: -sum(cost(sizes[i], shared) for i, shared in rows))
    return [filled[first : first + ranks] for first in range(0, len(filled), ranks)]


def plan(rows: list[tuple[int, int]], ranks: int, budget: int) -> list[list[list[tuple[int, int]]]]:
    """plan[k][rank]: the rows of each micro-batch as (index of rows, first tokens that stand in the
    line already). rows are what `measure` gives.

    All ranks stand in their k-th micro-batch together, for each layer gathers weights. So there are
    as few as the budget allows, equally full, and those of one k cost the same. A row above the
    budget is alone; a few may be empty where rows are few. Rows that share a beginning stand
    together where that is cheaper: large units fill less. It depends on rows and their order alone.
    """
    sizes = [size for size, _ in rows]
    plans = [deal(units(rows, limit), sizes, ranks, budget) for limit in (budget, budget // 2, budget // 4, 0)]
    slowest = [sum(max(sum(cost(sizes[i], s) for i, s in part) for part in step) for step in steps) for steps in plans]
    return plans[slowest.index(min(slowest))]


class Rows(NamedTuple):
    """How the rows of a line attend: each sees all of itself, wherever in the line it stands."""

    queries: list[int]  # tokens of each row in the line: its last ones
    keys: list[int]  # tokens of each whole row
    query_ends: Tensor  # (rows + 1,) int32, where the tokens of each row end in the line, 0 first
    key_ends: Tensor  # (rows + 1,) int32, where those that they see end in `seen`, 0 first
    seen: Tensor | None  # (sum of keys,) their places in the line; None: no row shares any


def lay_out(rows: list[tuple], device: torch.device | str, shared: Sequence[int] = ()) -> tuple[tuple, tuple]:
    """Rows of prompt and completion ids in one line: with what Policy.forward begins, and (row,
    column) of each completion token, (M,). All numbers go to the device in one transfer.

    shared: how many tokens of each row, its prompt at least and never all, are left out, since the
    nearest row before it that shares none begins with them; empty: none of any.
    """
    prompts, lengths = np.array([(len(prompt), len(completion)) for prompt, completion in rows]).T
    sizes, shared = prompts + lengths, np.array(shared or [0] * len(rows))
    ids = np.concatenate([np.concatenate(row)[less:] for row, less in zip(rows, shared, strict=True)])
    ends, first = (sizes - shared).cumsum(), np.maximum.accumulate(np.where(shared == 0, np.arange(len(rows)), 0))
    starts = ends - sizes + shared

    def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, number in it) of counts[row] things of each row."""
        row = np.arange(len(rows)).repeat(counts)
        return row, np.arange(len(row)) - (counts.cumsum() - counts)[row]

    def find(row: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Where the token of a row stands in the line."""
        return np.where(token < shared[row], starts[first[row]] + token, starts[row] + token - shared[row])

    (owner, token), (row, column) = spread(sizes - shared), spread(lengths)
    before = prompts[row] + column - 1  # completion token t is predicted at the token before its own
    own = before >= shared[row] - 1  # the others have the first row's log-probability
    source = np.where(own, np.arange(len(row)), (lengths.cumsum() - lengths)[first[row]] + column)
    predict, targets = find(row[own], before[own]), ids[find(row[own], before[own] + 1)]
    seen = find(*spread(sizes)) if shared.any() else []
    parts = [ids, token + shared[owner], predict, targets, row, column, (own.cumsum() - 1)[source]]
    parts += [[0, *ends], [0, *sizes.cumsum()], seen]
    numbers = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
    ids, position, predict, targets, row, column, source, ends, borders, seen = numbers.split([*map(len, parts)])
    attention = ((sizes - shared).tolist(), sizes.tolist(), ends.int(), borders.int(), seen if shared.any() else None)
    return (ids[None], position[None], Rows(*attention), predict, targets, source), (row, column)
