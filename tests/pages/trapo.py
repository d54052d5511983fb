"""TRAPO, from Su et al. 2025 and the equations of the docstring: micro-groups and a prefix term."""

import math

from conftest import byte_tokenizer

import common
from pages import grpo, kit

BASE = grpo.BASE | {"group_size": 8, "entropy_coef": 0.002}
EVEN = {"group_size": 6, "sizes": (1, 2, 1, 2), "shares": (0.2, 0.45, 1.0, 1.0), "thresholds": (0.1, 0.6, 0.9, 2.0)}
SCENARIOS = {
    "script": BASE | {"temperature": 0.7, "warmup_steps": 2, "seed": 5, "steps": 4},
    "two updates": BASE | EVEN | {"updates_per_step": 2, "clip_low": 0.1, "clip_high": 0.1, "tis_cap": 0.0},
    "token": BASE | {"loss_norm": "token", "sft_coef": 0.3, "trsft_alpha": 0.01, "tis_cap": 0.5},
    "sequence": BASE | EVEN | {"loss_norm": "sequence", "scale_by_std": True, "trsft_alpha": 0.02, "seed": 1},
    "dropped": BASE | {"zero_variance": "drop", "updates_per_step": 2, "trsft_alpha": 1.0, "max_completion_tokens": 70},
    "one prefix": BASE | {"shares": (0.3, 0.3, 0.3, 0.3), "thresholds": (2.0, 2.0, 2.0, 2.0), "loss_norm": "token"},
    "paper": BASE | {"shares": (0.0, 0.2, 0.5, 1.0), "thresholds": (-1.0, 0.5, 0.7, 0.9), "grad_clip": 0.125},
    "whole": BASE | {"shares": (0.0, 0.0, 1.0, 0.9), "thresholds": (-1.0, 0.5, 2.0, 2.0), "loss_norm": "sequence"},
    "wide draw": BASE | {"problems_per_step": 9, "sizes": (2, 2, 2, 2), "zero_variance": "drop", "seed": 3},
}


def shown(question, share: float, tokenizer) -> int:
    """Expert tokens of a share of the trace, which end before the answer; share 1 is all of it."""
    n = len(question.expert_ids)
    return n if share == 1 else min(int(share * n), common.tokens_before_answer(question, tokenizer))


def draw(cfg, question, step: int, ask, tokenizer) -> list[kit.Row]:
    """The rows of a problem, a micro-group after the other."""
    rows: list[kit.Row] = []
    for j, (size, share, threshold) in enumerate(zip(cfg.sizes, cfg.shares, cfg.thresholds, strict=True)):
        needed = rows and sum(row.reward for row in rows) / len(rows) < threshold  # the first is plain
        count = shown(question, share, tokenizer) if needed else 0
        if count == len(question.expert_ids):
            rows += [kit.trace(question) for _ in range(size)]
        else:
            rows += ask((cfg.seed, step, j), [(question, question.expert_ids[:count])], size)[0]
    return rows


def weight(cfg, rows: list[kit.Row], row: kit.Row) -> float:
    """w, the same in both sums: rows and tokens are all of the update, whoever wrote them."""
    tokens = {"token": sum(len(r.ids) for r in rows), "sequence": len(rows) * len(row.ids)}
    return 1 / tokens.get(cfg.loss_norm, len(rows) * cfg.max_completion_tokens)


def page(cfg, problems, ask):
    """One baseline a group; of the rows with the same prefix one teaches it."""
    tokenizer = byte_tokenizer()
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = [draw(cfg, question, step, ask, tokenizer) for question in drawn]
        advantage, taught, updates = {}, set(), []
        for group in groups:
            values = grpo.advantages([row.reward for row in group], cfg.scale_by_std)
            advantage |= {id(row): a for row, a in zip(group, values, strict=True)}
            taught |= {id(row) for row in {row.expert: row for row in reversed(group)}.values()}
        if cfg.zero_variance == "drop":
            groups = [group if any(advantage[id(row)] for row in group) else [] for group in groups]
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage, taught=taught):
                if t >= row.expert:
                    gain = grpo.slope(cfg, advantage[id(row)], row.sampler[t - row.expert], seen.before[t], seen.lp[t])
                    return -weight(cfg, rows, row) * gain
                trust = min(1.0, math.exp(seen.lp[t]) / cfg.trsft_alpha) if id(row) in taught else 0.0
                return -weight(cfg, rows, row) * cfg.sft_coef * trust

            def bonus(row, t, seen, rows=rows):
                return -cfg.entropy_coef * weight(cfg, rows, row) if t >= row.expert else 0.0

            lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(rows, coefficient, lr, bonus=bonus))
        yield updates
