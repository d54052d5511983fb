"""GRPO, from Shao et al. 2024 section 4.1 and the equation of the docstring, without KL."""

import math

from pages import kit

BASE = {"problems_per_step": 4, "group_size": 4, "max_completion_tokens": 60, "kl_coef": 0.0, "steps": 3, "lr": 0.01}
SCENARIOS = {
    "one update": BASE | {"updates_per_step": 1, "temperature": 0.7, "warmup_steps": 2},
    "two updates": BASE | {"updates_per_step": 2, "loss_norm": "sequence", "seed": 3},
    "constant": BASE | {"loss_norm": "constant", "scale_by_std": False, "tis_cap": 0.0, "clip_high": 0.28},
    "capped": BASE | {"tis_cap": 0.1, "kl_coef": 0.0, "grad_clip": 0.5, "weight_decay": 0.3},
    "dropped": BASE | {"zero_variance": "drop", "updates_per_step": 2, "clip_low": -1.0, "clip_high": -1.0},
    "wide draw": BASE | {"problems_per_step": 8, "steps": 2},  # six problems: some are drawn twice
}


def advantages(rewards: list[float], by_std: bool) -> list[float]:
    """R - mean, over the unbiased std on request; 0 where all are equal."""
    mean = sum(rewards) / len(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) if by_std else r - mean for r in rewards]


def slope(cfg, advantage: float, sampler: float, before: float, now: float) -> float:
    """d/d log p of v min(ratio A, clip(ratio) A)."""
    ratio = math.exp(now - before)
    if cfg.clip_high >= 0 and advantage > 0 and ratio > 1 + cfg.clip_high:
        return 0.0
    if cfg.clip_low >= 0 and advantage < 0 and ratio < 1 - cfg.clip_low:
        return 0.0
    return (min(math.exp(before - sampler), cfg.tis_cap) if cfg.tis_cap else 1.0) * ratio * advantage


def weight(cfg, rows: list[kit.Row], row: kit.Row) -> float:
    """w of a policy token, by --loss_norm, over the policy's tokens of all rows of the update."""
    if cfg.loss_norm == "sequence":
        return 1 / (len(rows) * (len(row.ids) - row.expert))
    return 1 / (len(rows) * cfg.max_completion_tokens if cfg.loss_norm == "constant" else policy_tokens(rows))


def policy_tokens(rows: list[kit.Row]) -> int:
    return sum(len(row.ids) - row.expert for row in rows)


def page(cfg, problems, ask):
    """A group per problem, one advantage per row, one denominator per update."""
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = ask((cfg.seed, step, 0), [(question, []) for question in drawn], cfg.group_size)
        advantage, updates = {}, []
        for group in groups:
            for row, a in zip(group, advantages([row.reward for row in group], cfg.scale_by_std), strict=True):
                advantage[id(row)] = a
        if cfg.zero_variance == "drop":
            groups = [group if any(advantage[id(row)] for row in group) else [] for group in groups]
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage):
                gain = slope(cfg, advantage[id(row)], row.sampler[t], seen.before[t], seen.lp[t])
                return -weight(cfg, rows, row) * gain

            updates.append(kit.Update(rows, coefficient, cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))))
        yield updates
