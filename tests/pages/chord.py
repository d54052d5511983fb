"""CHORD, from Zhang et al. 2025 (official mu_schedule_function and phi) and the docstring."""

import math

from pages import kit
from pages.grpo import advantages, slope, weight

BASE = {"problems_per_step": 4, "group_size": 4, "sft_problems_per_step": 5, "max_completion_tokens": 60}
BASE |= {"kl_coef": 0.0, "steps": 3, "lr": 0.01}
SCENARIOS = {
    "all of mu": BASE | {"mu_warmup": 2, "mu_decay": 3, "steps": 6, "temperature": 0.7, "warmup_steps": 3},
    "phi": BASE | {"phi": True, "mu_peak": 0.1, "mu_valley": 0.1, "updates_per_step": 2, "seed": 3, "tis_cap": 0.1},
    "no warm-up": BASE
    | {"mu_peak": 0.8, "mu_valley": 0.2, "mu_decay": 2, "updates_per_step": 2, "loss_norm": "sequence"}
    | {"scale_by_std": False, "tis_cap": 0.0, "clip_high": 0.28, "clip_low": 0.1},
    "constant": BASE
    | {"loss_norm": "constant", "mu_warmup": 1, "mu_decay": 0, "phi": True, "temperature": 1.3, "tis_cap": 0.02}
    | {"kl_coef": 0.1, "kl_estimator": "k2", "entropy_coef": 0.01, "grad_clip": 0.1},
    "dropped": BASE
    | {"zero_variance": "drop", "updates_per_step": 2, "mu_warmup": 3, "mu_decay": 1, "mu_valley": 0.0}
    | {"clip_low": -1.0, "clip_high": -1.0, "steps": 5},
    "wide draw": BASE | {"problems_per_step": 8, "sft_problems_per_step": 9, "seed": 1},  # of six problems
    "one trace": BASE | {"sft_problems_per_step": 1, "updates_per_step": 2},  # an update without a trace
    "no sft": BASE | {"mu_peak": 0.0, "mu_valley": 0.0, "updates_per_step": 2},
    "no grpo": BASE | {"mu_peak": 1.0, "mu_valley": 1.0},
}


def mu(cfg, done: int) -> float:
    """Share of SFT in the step that makes it `done` steps: a line, then half a cosine."""
    if done <= cfg.mu_warmup:
        return cfg.mu_peak * done / cfg.mu_warmup
    if done >= cfg.mu_warmup + cfg.mu_decay:
        return cfg.mu_valley
    fall = (1 + math.cos(math.pi * (done - cfg.mu_warmup) / cfg.mu_decay)) / 2
    return cfg.mu_valley + (cfg.mu_peak - cfg.mu_valley) * fall


def page(cfg, problems, ask):
    """GRPO on the policy's rows and SFT on traces that are drawn apart, one mean each."""
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = ask((cfg.seed, step, 0), [(question, []) for question in drawn], cfg.group_size)
        share = mu(cfg, step + 1)
        taught = kit.draw(problems, cfg.sft_problems_per_step if share else 0, step, cfg.seed + 1)
        advantage, updates = {}, []
        for group in groups:
            for row, a in zip(group, advantages([row.reward for row in group], cfg.scale_by_std), strict=True):
                advantage[id(row)] = a
        if cfg.zero_variance == "drop":
            groups = [group if any(advantage[id(row)] for row in group) else [] for group in groups]
        for u in range(cfg.updates_per_step):
            own = [row for group in kit.part(groups, u, cfg.updates_per_step) for row in group]
            traces = [kit.trace(question) for question in kit.part(taught, u, cfg.updates_per_step)]

            def coefficient(row, t, seen, own=own, traces=traces, share=share, advantage=advantage):
                if row.expert:
                    p = math.exp(seen.lp[t])
                    phi = p * (1 - p) if cfg.phi else 1.0
                    return -share * phi / sum(len(one.ids) for one in traces)
                gain = slope(cfg, advantage[id(row)], row.sampler[t], seen.before[t], seen.lp[t])
                far = seen.lp[t] - seen.start[t]  # the slope of k2, from the reference
                return -(1 - share) * weight(cfg, own, row) * (gain - cfg.kl_coef * far)

            def bonus(row, t, seen, own=own, share=share):
                return 0.0 if row.expert else -(1 - share) * weight(cfg, own, row) * cfg.entropy_coef

            lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update(own + traces, coefficient, lr, bonus=bonus))
        yield updates
