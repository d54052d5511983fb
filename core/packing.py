"""Packing: which rows make a micro-batch of which rank, and how they stand in its line."""

import heapq
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch


def plan(sizes: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """plan[k][rank]: the rows of each micro-batch as indices of sizes, which are in tokens.

    All ranks stand in their k-th micro-batch together, for each layer gathers weights. So there are
    as few as the budget allows, equally full, and those of one k cost the same. A row above the
    budget is alone; a few may be empty where rows are few. It depends on sizes and order alone.
    """

    def spread(count: int) -> list[list[int]] | None:
        """The longest row first, each to the emptiest micro-batch; None where the budget ends."""
        filled, emptiest = [[] for _ in range(count * ranks)], [(0, b) for b in range(count * ranks)]
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            used, b = emptiest[0]
            if used and used + sizes[i] > budget:
                return None
            filled[b].append(i)
            heapq.heapreplace(emptiest, (used + sizes[i], b))
        return filled

    counts = range(-(-sum(min(size, budget) for size in sizes) // (budget * ranks)), -(-len(sizes) // ranks))
    filled = spread(counts.start + bisect_left(counts, True, key=lambda count: spread(count) is not None))
    filled.sort(key=lambda rows: -sum(sizes[i] + sizes[i] ** 2 / 41_000 for i in rows))  # attention's share at 7B
    return [filled[first : first + ranks] for first in range(0, len(filled), ranks)]


def lay_out(rows: list[tuple[Sequence[int], Sequence[int]]], device: torch.device | str) -> tuple[tuple, tuple]:
    """Rows of prompt and completion ids in one line: with what Policy.forward begins, and (row,
    column) of each completion token in it, (M,). All numbers go to the device in one transfer.
    """
    prompts, lengths = np.array([(len(prompt), len(completion)) for prompt, completion in rows]).T
    sizes, ids = prompts + lengths, np.concatenate([np.asarray(part) for row in rows for part in row])
    ends = sizes.cumsum()
    position = np.arange(len(ids)) - (ends - sizes).repeat(sizes)
    row = np.arange(len(rows)).repeat(lengths)
    column = np.arange(len(row)) - (lengths.cumsum() - lengths)[row]
    predict = (ends - lengths)[row] + column - 1  # completion token t is predicted at the position before its own
    parts = [ids, position, predict, ids[predict + 1], row, column, [0], ends]
    numbers = torch.from_numpy(np.concatenate(parts)).to(device)
    ids, position, predict, targets, row, column, borders = numbers.split([*map(len, parts[:-2]), len(rows) + 1])
    return (ids[None], position[None], borders.int(), sizes.tolist(), predict, targets), (row, column)
