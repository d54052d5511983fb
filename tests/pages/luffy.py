"""LUFFY, from Yan et al. 2025 section 3 and the equations of the docstring, without KL."""

import math

from pages import kit
from pages.grpo import advantages, slope

BASE = {"problems_per_step": 4, "group_size": 4, "max_completion_tokens": 60, "kl_coef": 0.0, "steps": 3, "lr": 0.01}
PAPER = {"loss_norm": "token", "scale_by_std": True, "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.01}
DROP = {"zero_variance": "drop", "group_size": 2, "updates_per_step": 4}  # some updates have no row
SCENARIOS = {
    "one update": BASE | {"updates_per_step": 1, "temperature": 0.7, "warmup_steps": 3, "steps": 5},
    "two updates": BASE | {"seed": 3, "entropy_coef": 0.0, "tis_cap": 0.2},  # all else is the script's
    "the paper's": BASE | PAPER | {"tis_cap": 0.0, "temperature": 1.3, "grad_clip": 0.016},
    "dropped": BASE | DROP | {"loss_norm": "sequence", "gamma": 0.5},
    "unshaped": BASE | {"gamma": -1.0, "clip_low": 0.1},
    "no expert": BASE | {"expert_rows": 0, "clip_high": 0.28, "updates_per_step": 3},
    "wide draw": BASE | {"problems_per_step": 8, "steps": 2},  # six problems: some are drawn twice
}


def mixed_groups(cfg, problems, ask, step: int) -> tuple[list[list[kit.Row]], dict[int, float]]:
    """The trace in place of one sample of a group, and one baseline for all rows of the group."""
    drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
    sampled = ask((cfg.seed, step, 0), [(question, []) for question in drawn], cfg.group_size - cfg.expert_rows)
    groups, advantage = [], {}
    for question, rows in zip(drawn, sampled, strict=True):
        group = [kit.trace(question) for _ in range(cfg.expert_rows)] + rows
        values = advantages([row.reward for row in group], cfg.scale_by_std)
        groups.append(group if cfg.zero_variance == "keep" or any(values) else [])
        advantage |= {id(row): a for row, a in zip(groups[-1], values, strict=False)}
    return groups, advantage


def weight(cfg, rows: list[kit.Row], row: kit.Row) -> float:
    """w, by --loss_norm: the expert's rows and tokens count as the policy's (Z of equation 5)."""
    if cfg.loss_norm == "sequence":
        return 1 / (len(rows) * len(row.ids))
    return 1 / (len(rows) * cfg.max_completion_tokens if cfg.loss_norm == "constant" else sum(len(r.ids) for r in rows))


def shaped(cfg, logprob: float) -> float:
    """d/d log p of f(p), never clipped."""
    p = math.exp(logprob)
    return p if cfg.gamma < 0 else cfg.gamma * p / (p + cfg.gamma) ** 2


def page(cfg, problems, ask):
    """The trace's tokens by f(p), the policy's by the ratio, one denominator for both."""
    for step in range(cfg.steps):
        groups, advantage = mixed_groups(cfg, problems, ask, step)
        updates = []
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage):
                a = advantage[id(row)]
                if row.expert:
                    gain = a * shaped(cfg, seen.lp[t])
                else:
                    gain = slope(cfg, a, row.sampler[t], seen.before[t], seen.lp[t])
                return -weight(cfg, rows, row) * gain

            def bonus(row, t, seen, rows=rows):
                return -cfg.entropy_coef * weight(cfg, rows, row)

            rate = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(rows, coefficient, rate, bonus=bonus))
        yield updates
