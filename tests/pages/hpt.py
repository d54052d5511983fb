"""HPT, from Lv et al. 2025: its gate; the loss is the docstring's, one vote a problem."""

from pages import grpo, kit

BASE = grpo.BASE | {"steps": 4, "entropy_coef": 0.1}
NO_GATE = {"gate": -1, "zero_variance": "drop"}
SCENARIOS = {
    "one update": BASE | {"updates_per_step": 1, "temperature": 0.7, "warmup_steps": 2, "sft_coef": 0.3},
    "gate 2": BASE | {"gate": 2, "loss_norm": "token", "seed": 3, "tis_cap": 0.0, "clip_high": 0.28},
    "no gate": BASE | NO_GATE | {"scale_by_std": True, "loss_norm": "sequence", "clip_low": 0.1, "clip_high": 0.2},
    "dropped": BASE | {"gate": 1, "zero_variance": "drop", "sft_coef": 2.0, "loss_norm": "token", "group_size": 3},
    "some skipped": BASE | {"gate": 1, "skip_above": 4.0, "grad_clip": 0.5, "seed": 1, "loss_norm": "token"},
    "never skipped": BASE | {"gate": 1, "skip_above": 0.0, "sft_coef": 100.0, "steps": 2},
    "reference": BASE | {"gate": 1, "kl_coef": 0.1, "kl_estimator": "k2", "steps": 3, "warmup_steps": 5},
    "wide draw": BASE | {"problems_per_step": 8, "gate": 1, "steps": 2},  # six problems: some are drawn twice
}


def page(cfg, problems, ask):
    """A problem is imitated or its group trains; q and the denominators are the update's."""
    for step in range(cfg.steps):
        drawn = kit.draw(problems, cfg.problems_per_step, step, cfg.seed)
        groups = ask((cfg.seed, step, 0), [(question, []) for question in drawn], cfg.group_size)
        updates = []
        for u in range(cfg.updates_per_step):
            trained, traces, advantage = [], [], {}
            for group in kit.part(groups, u, cfg.updates_per_step):
                if sum(row.reward == 1 for row in group) <= cfg.gate:
                    traces.append(kit.trace(group[0].problem))
                    continue
                gains = grpo.advantages([row.reward for row in group], cfg.scale_by_std)
                if any(gains) or cfg.zero_variance == "keep":
                    trained.append(group)
                    advantage |= {id(row): gain for row, gain in zip(group, gains, strict=True)}
            q = len(traces) / max(len(traces) + len(trained), 1)  # a problem that is dropped has no vote
            trained = [row for group in trained for row in group]
            expert_tokens = sum(len(row.ids) for row in traces)

            def coefficient(row, t, seen, q=q, trained=trained, advantage=advantage, expert_tokens=expert_tokens):
                if row.expert:
                    return -cfg.sft_coef * q / expert_tokens
                gain = grpo.slope(cfg, advantage[id(row)], row.sampler[t], seen.before[t], seen.lp[t])
                gain -= cfg.kl_coef * (seen.lp[t] - seen.start[t])  # k2
                return -(1 - q) * grpo.weight(cfg, trained, row) * gain

            def bonus(row, t, seen, q=q, trained=trained):
                return 0.0 if row.expert else -(1 - q) * cfg.entropy_coef * grpo.weight(cfg, trained, row)

            def stepped(norm):
                return cfg.skip_above == 0 or norm <= cfg.skip_above

            lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
            updates.append(kit.Update([*trained, *traces], coefficient, lr, stepped, bonus=bonus))
        yield updates
