"""ReLIFT, from Ma et al. 2025 and its trainer: GRPO, a buffer of failed problems, SFT steps."""

import dataclasses
import functools

from pages import grpo, kit

BASE = grpo.BASE | {"steps": 5, "sft_lr": 0.02, "entropy_coef": 0.1, "sft_entropy_coef": 0.3}
OLDEST = {"buffer_order": "oldest", "shared_optimizer": True}
SCENARIOS = {
    "newest": BASE | {"buffer_size": 3, "updates_per_step": 1, "temperature": 0.7, "warmup_steps": 3, "group_size": 2},
    "oldest": BASE | OLDEST | {"buffer_size": 3, "group_size": 2, "seed": 3, "clip_low": 0.1, "clip_high": 0.28},
    "dropped": BASE | {"buffer_size": 6, "zero_variance": "drop", "loss_norm": "sequence", "scale_by_std": True},
    "limits": BASE | {"buffer_size": 2, "sft_grad_clip": 0.0, "grad_clip": 0.7, "tis_cap": 0.0, "weight_decay": 0.2},
    "no buffer": BASE | {"buffer_size": 0, "steps": 2, "group_size": 2, "warmup_steps": 2, "sft_grad_clip": 0.3},
    "negative": BASE | {"buffer_size": -1, "steps": 1, "group_size": 2, "shared_optimizer": True},
    "wide draw": BASE | {"problems_per_step": 8, "buffer_size": 5, "loss_norm": "token", "steps": 3},
}


def page(cfg, problems, ask):
    """The steps of GRPO's page, each with one more update when enough problems have failed."""
    groups, buffer = [], []  # the newest block first, each block in the order of the draw

    def bonus(rows, row, t, seen):
        return -cfg.entropy_coef * grpo.weight(cfg, rows, row)

    def keep(*args):
        groups[:] = ask(*args)
        return groups

    for updates in grpo.page(cfg, problems, keep):
        for update in updates:
            update.optimizer, update.bonus = "rl", functools.partial(bonus, update.rows)
        failed = [group[0].problem for group in groups if not any(row.reward for row in group)]
        buffer = failed + buffer
        if 0 < cfg.buffer_size <= len(buffer):
            if cfg.buffer_order == "newest":
                chosen, buffer = buffer[: cfg.buffer_size], buffer[cfg.buffer_size :]
            else:
                chosen, buffer = buffer[-cfg.buffer_size :], buffer[: -cfg.buffer_size]
            rows = [kit.trace(dataclasses.replace(question, occurrence=0)) for question in chosen]
            tokens = sum(len(row.ids) for row in rows)
            owner = "rl" if cfg.shared_optimizer else "sft"

            def coefficient(row, t, seen, tokens=tokens):
                return -1 / tokens

            def sft_bonus(row, t, seen, tokens=tokens):
                return -cfg.sft_entropy_coef / tokens

            sft = kit.Update(rows, coefficient, cfg.sft_lr, limit=cfg.sft_grad_clip, optimizer=owner, bonus=sft_bonus)
            updates.append(sft)
        yield updates
