"""A world of three tokens in which groups can be enumerated: the ground under bias.py.

A completion is up to three letters, a or b, and a full stop, which is certain after the third: 15
in all. Two problems: right is what has "ba" in it, or "ab". The policy is a softmax over the next
token given problem and last token, 18 parameters, in float64. A group of four rows is a multiset of
completions with its probability, or what a method makes of it: with a trace, a hint, an anchor.
"""

import importlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import common
from results.methods import METHODS

METHOD = {m.name: importlib.import_module(m.name) for m in METHODS}
N, T = 4, 4  # rows of a group; tokens of a completion at most
TEXTS = ["".join(letters) + "." for n in range(T) for letters in itertools.product("ab", repeat=n)]
IDS = [[".ab".index(letter) for letter in text] for text in TEXTS]
ASKED, TRACES = ("ba", "ab"), ("bba.", "aab.")  # of the two problems
PROBLEMS = [common.Problem(asked, "", [0], "", None) for asked in ASKED]
SOLVES = [[asked in text for text in TEXTS] for asked in ASKED]
RIGHT = torch.tensor(SOLVES, dtype=torch.float64)  # (2, 15)
TARGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999)  # rewards of the policies


# Policies -----------------------------------------------------------------------------------------
class Policy:
    """weights (2, 3, 3): shared by the problems and opposed in them, last token, next token."""

    def __init__(self, weights: Tensor):
        self.weights = weights
        self.logprobs, self.entropy = self.look_up(weights)

    @staticmethod
    def look_up(weights: Tensor) -> tuple[Tensor, Tensor]:
        """(log pi of a token, entropy there), (2, 15, T); 0 where it is certain or past the end."""
        table = torch.stack([weights[0] - weights[1], weights[0] + weights[1]]).log_softmax(-1)
        ids = torch.tensor([row + [0] * (T - len(row)) for row in IDS])
        last = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        free = torch.tensor([[t < min(len(row), T - 1) for t in range(T)] for row in IDS])
        return tuple(x.where(free, 0.0) for x in (table[:, last, ids], -(table.exp() * table).sum(-1)[:, last]))

    @cached_property
    def scores(self) -> Tensor:
        """(2, 15, T, 18): the gradient of every log-probability."""
        return torch.autograd.functional.jacobian(lambda w: self.look_up(w)[0], self.weights).flatten(3)

    def reward(self, shown: int = 0) -> Tensor:
        """(2,): the expected reward of each problem after `shown` tokens of its trace."""
        begins = torch.tensor([[t[:shown] == trace[:shown] and len(t) > shown for t in TEXTS] for trace in TRACES])
        return (self.logprobs[:, :, shown:].sum(-1).exp() * begins * RIGHT).sum(1)

    def true_gradient(self, of: Callable[[Tensor], Tensor] = Tensor.mean) -> Tensor:
        """(18,): the gradient of a function of the problems' expected rewards, of their mean."""
        weights = self.weights.clone().requires_grad_()
        return torch.autograd.grad(of(Policy(weights).reward()), weights)[0].flatten()

    def moved(self, by: float) -> "Policy":
        """A step of length `by` along the gradient of mean log reward."""
        uphill = self.true_gradient(lambda rewards: rewards.log().mean())
        return Policy(self.weights + (by * uphill / uphill.norm()).view(2, 3, 3))

    def writer(self, name: str) -> "Policy":
        """Who sampled the rows that this policy is updated with: now, old or other."""
        noise = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"now": self, "old": self.moved(-0.25), "other": Policy(self.weights + 0.3 * noise)}[name]


@cache
def policies() -> list[Policy]:
    """From hopeless to solved; "ab" is the harder problem."""
    shared = [[3.0, -1.5, 1.0], [2.5, 0.0, -1.0], [2.5, -1.5, 0.0]]
    policy, found = Policy(torch.tensor([shared, [[0.0] * 3] * 3], dtype=torch.float64)), []
    for target in TARGETS:
        while policy.reward().mean() < target:
            policy = policy.moved(0.05)
        found.append(policy)
    return found


# Groups -------------------------------------------------------------------------------------------
class Group(NamedTuple):
    """What an update gets of one problem. A row: (completion, how many tokens are the expert's)."""

    problem: int
    rows: tuple[tuple[int, int], ...]  # these share a baseline
    traces: tuple[tuple[int, int], ...] = ()  # expert rows outside of it
    times: float = 1.0  # probability / that of the policy's tokens and of `failed`
    failed: tuple[int, ...] = ()  # tokens shown to the groups that failed before

    def solved(self) -> list[bool]:
        return [SOLVES[self.problem][y] for y, _ in self.rows]


EXPERT = [((TEXTS.index(trace), T),) for trace in TRACES]


def continued(problem: int, shown: int) -> list[tuple[int, int]]:
    """The rows that open with so many tokens of the trace; all of it is a row of the expert's."""
    opens = [(y, shown) for y in range(len(TEXTS)) if TEXTS[y][:shown] == TRACES[problem][:shown]]
    return [(y, shown) for y, _ in opens if len(TEXTS[y]) > shown or shown == T]


def drawn(n: int = N, shown: int = 0, times: float = 1.0, failed: tuple[int, ...] = ()) -> list[Group]:
    """All groups of n samples."""
    groups = []
    for problem in range(2):
        for rows in itertools.combinations_with_replacement(continued(problem, shown), n):
            orders = math.factorial(n) // math.prod(map(math.factorial, Counter(rows).values()))
            groups.append(Group(problem, rows, (), times * orders, failed))
    return groups


def micro_groups() -> list[Group]:
    """TRAPO's, of one row each, by its file's shares and thresholds."""
    groups, cfg = [Group(problem, ()) for problem in range(2)], METHOD["trapo"].Config()
    for given in zip(cfg.shares, cfg.thresholds, strict=True):
        lengths = [METHOD["trapo"].prefix_tokens(T, *given, group.solved()) for group in groups]
        pairs = zip(groups, lengths, strict=True)
        groups = [g._replace(rows=(*g.rows, row)) for g, shown in pairs for row in continued(g.problem, shown)]
    return groups


def solved(groups: list[Group]) -> list[Group]:
    return [g for g in groups if any(g.solved())]


def failed() -> list[Group]:
    """The trace in place of a group that failed."""
    return [Group(problem, (), EXPERT[problem], 1.0, (0,)) for problem in range(2)]


LAYOUTS: dict[str, Callable[[], list[Group]]] = {
    "group": drawn,
    "group with trace": lambda: [g._replace(rows=g.rows + EXPERT[g.problem]) for g in drawn(N - 1)],
    "group and trace": lambda: [g._replace(traces=EXPERT[g.problem]) for g in drawn()],
    "group or trace": lambda: failed() + solved(drawn()),
    "trace after a failure": failed,  # nothing otherwise
    "trace": lambda: [Group(problem, (), EXPERT[problem]) for problem in range(2)],
    "hint of 1": lambda: drawn(shown=1),
    "hints": lambda: drawn(shown=0, times=0.25) + drawn(shown=1, times=0.5) + drawn(shown=2, times=0.25),
    "anchor": lambda: (
        solved(drawn() + drawn(shown=1, failed=(0,)) + drawn(shown=2, failed=(0, 1)))
        + [g._replace(failed=(1, 2)) for g in drawn() if not any(g.solved())]
    ),
    "hybrid": lambda: [
        g._replace(rows=(*g.rows, row)) for g in drawn(N - 1, times=0.5) for k in (1, 2) for row in continued(g[0], k)
    ],
    "micro-groups": micro_groups,
}


class Rows:
    """All groups of a layout as one micro-batch, since every loss is a sum over rows."""

    def __init__(self, layout: str):
        self.groups = LAYOUTS[layout]()
        flat = [(i, g.problem, *row, True) for i, g in enumerate(self.groups) for row in g.rows]
        flat += [(i, g.problem, *row, False) for i, g in enumerate(self.groups) for row in g.traces]
        self.group, problem, y, _, self.shares = torch.tensor(flat).T
        self.problem = torch.tensor([g.problem for g in self.groups])
        self.times = torch.tensor([g.times for g in self.groups], dtype=torch.float64)
        self.failed = torch.tensor([[shown in g.failed for shown in range(3)] for g in self.groups])
        self.place, self.rewards = (problem, y), RIGHT[problem, y]
        kinds = {row[1:4]: common.Rollout(PROBLEMS[row[1]], IDS[row[2]], row[3]) for row in set(flat)}
        self.batch = common.make_batch([kinds[row[1:4]] for row in flat])

    def sums(self, values: Tensor) -> Tensor:
        """(rows, ...) -> (groups, ...)"""
        return values.new_zeros(len(self.groups), *values.shape[1:]).index_add(0, self.group, values)

    def chances(self, writer: Policy) -> Tensor:
        """(groups,): probabilities where `writer` samples and each problem is as likely."""
        failure = torch.stack([(1 - writer.reward(shown)) ** N for shown in range(3)], 1)
        known = torch.where(self.failed, failure[self.problem], 1.0).prod(1) * self.times / 2
        written = writer.logprobs[self.place].where(self.batch.policy_mask, 0.0).sum(1)
        return known * self.sums(written).exp()

    def advantages(self, scale_by_std: bool) -> Tensor:
        """(rows,); 0 for a trace outside of the group."""
        sizes, found = self.sums(self.shares)[self.group] * self.shares, torch.zeros_like(self.rewards)
        for size in set(sizes.tolist()) - {0}:
            grouped = self.rewards[sizes == size].view(-1, size)
            found[sizes == size] = common.group_advantages(grouped, scale_by_std).flatten()
        return found


rows_of = cache(Rows)
