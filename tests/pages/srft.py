"""SRFT, from Fu et al. 2025 equations 6 to 13 and the equations of the docstring, without KL."""

import math

from pages import kit
from pages.grpo import slope
from pages.luffy import BASE, DROP, mixed_groups, shaped, weight

CLIPPED = {"clip_low": 0.2, "clip_high": 0.2, "lr": 0.02, "temperature": 1.3}
PM1 = BASE | {"rollouts": "pm1", "positive_coef": 0.3}
SCENARIOS = {
    "one update": BASE | {"updates_per_step": 1, "temperature": 0.7, "warmup_steps": 3, "steps": 5},
    "token": BASE | {"entropy_scope": "token", "sft_entropy_sign": 1, "sft_coef": 0.001, "seed": 3, "tis_cap": 0.2},
    "batch": BASE | CLIPPED | {"entropy_scope": "batch", "positive_entropy_sign": -1, "loss_norm": "token"},
    "plus and minus": PM1 | CLIPPED | {"loss_norm": "sequence", "seed": 3, "tis_cap": 0.2, "gamma": -1.0},
    "dropped": PM1 | DROP | {"entropy_scope": "batch", "tis_cap": 0.0, "entropy_coef": 0.0},
    "no entropy": BASE | {"positive_entropy_sign": 0, "sft_entropy_sign": 0, "scale_by_std": True, "gamma": 0.5},
    "no expert": BASE | {"expert_rows": 0, "clip_low": 0.1, "clip_high": 0.28, "entropy_coef": 0.01},
    "wide draw": BASE | {"problems_per_step": 8, "steps": 2, "updates_per_step": 3},  # some are drawn twice
}


def uncertainty(cfg, t: int, seen: kit.Seen) -> float:
    """H of token t: its own, or the mean of all tokens of its row or of the update."""
    if cfg.entropy_scope == "token":
        return seen.entropy[t]
    tokens = seen.entropy if cfg.entropy_scope == "row" else [h for row in seen.update for h in row.entropy]
    return sum(tokens) / len(tokens)


def page(cfg, problems, ask):
    """The trace is imitated (equation 8) and a sample of the group (9); the rollouts (12, or A)."""
    for step in range(cfg.steps):
        groups, advantage = mixed_groups(cfg, problems, ask, step)
        updates = []
        for u in range(cfg.updates_per_step):
            rows = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]

            def coefficient(row, t, seen, rows=rows, advantage=advantage):
                w, a, h = weight(cfg, rows, row), advantage[id(row)], uncertainty(cfg, t, seen)
                if row.expert:
                    w_sft = cfg.sft_coef * math.exp(cfg.sft_entropy_sign * h)
                    return -w_sft / sum(r.expert for r in rows) - w * a * shaped(cfg, seen.lp[t])
                w_pos = cfg.positive_coef * math.exp(cfg.positive_entropy_sign * h)
                if cfg.rollouts == "adv":
                    push = slope(cfg, a, row.sampler[t], seen.before[t], seen.lp[t])
                    return -w * push * (w_pos if a > 0 else 1)
                v = min(math.exp(seen.before[t] - row.sampler[t]), cfg.tis_cap) if cfg.tis_cap else 1.0
                return -w * v * (w_pos if row.reward == 1 else -1)

            def bonus(row, t, seen, rows=rows):
                return -cfg.entropy_coef * weight(cfg, rows, row)  # none through w_sft and w_pos

            rate = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(rows, coefficient, rate, bonus=bonus))
        yield updates
