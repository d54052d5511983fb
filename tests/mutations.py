"""Wrong lines, planted one at a time in a copy of the repository: which does no test see?

python tests/mutations.py                 all of them: an hour or two on two cores
python tests/mutations.py --only bread    those whose file has this in its name
python tests/mutations.py --sample        ten of them, chosen by today's date
python tests/mutations.py --known         the known bugs of tests/README.md, each by its own tests

Prints the survivors, and exits with 1 if there are any that SURVIVORS does not explain.
"""

import importlib.util
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
METHOD = "test_defaults test_pages test_method_losses test_method_updates test_log test_methods test_traces"
WHERE = {  # the tests that could see a line of a file, the quick ones first; FILE:EXPRESSION is with -k EXPRESSION
    "common.py": "test_sampler test_losses test_packing test_method_losses: test_log test_pages:grpo-or-luffy-or-uft "
    "test_method_updates:grpo-or-luffy-or-two_ranks test_gradients test_eval test_rewards test_scripts",
    "core/packing.py": "test_packing test_gradients",
    "core/data.py": "test_hints test_sampler test_data test_rewards test_asking test_pages:uft test_traces",
    "core/records.py": "test_log test_lora:resume-or-sft test_damage:found-or-file "
    "test_trust:finite-or-move-or-collapse test_methods:saving "
    "test_damage test_trust test_resume test_gradients test_sampler",
    "core/model.py": "test_trust:nan test_lora test_damage:safetensors test_packing test_architectures test_losses "
    "test_sampler "
    "test_gradients test_methods:grpo test_ready",
    "core/engines.py": "test_ready:engine",
    "core/memory.py": "test_bench:start-or-adapter",
    "core/rewards.py": "test_rewards",
    "core/sampler.py": "test_sampler test_methods:grpo",
    "core/config.py": "test_lora:resume test_damage:file test_scripts test_trust:resume test_faults:command "
    "test_defaults: "
    "test_skeleton",
    "core/processes.py": "test_damage:memory-or-full test_packing test_gradients test_trust test_resume "
    "test_method_updates:grpo-or-two_ranks: test_dapo test_ready:rank-or-card",
    "core/vllm_sampler.py": "test_vllm",
    "core/verifier.py": "test_verifier test_data test_fuzz test_faults:worker",
    "core/answers.py": "test_verifier test_fuzz",
    "eval.py": "test_eval test_traces",
    "grpo.py": METHOD + " test_losses test_gradients",
    "bridge.py": "test_defaults test_lora:bridge test_bridge test_methods",
    "dapo.py": "test_defaults test_dapo test_pages test_methods",
    "iw_sft.py": "test_defaults test_iw_sft test_losses test_pages test_methods",
    "sft.py": "test_defaults test_losses test_iw_sft test_pages test_methods test_gradients test_ready:offline",
    "bread.py": "test_bread test_defaults test_pages test_methods test_hints test_rewards",
    "hpt.py": METHOD + " test_rewards",
    "relift.py": METHOD + " test_rewards",
    "uft.py": METHOD + " test_hints",
    "prefix_rft.py": METHOD + " test_hints",
    "trapo.py": METHOD + " test_hints",
    **dict.fromkeys(("examples/grpo_sft.patch", "examples/bread_phi.patch"), "test_examples"),
    "examples/luffy_annealed.patch": "test_examples",
}
BY_METHOD = METHOD.replace("test_log ", "")  # of these test files only what has the method's name

MUTATIONS = [  # (file, the line as it is, wrong)
    # Examples
    ("examples/grpo_sft.patch", "max(0.0, 1 - step / cfg.sft_steps)", "max(0.0, 1 - (step + 1) / cfg.sft_steps)"),
    ("examples/bread_phi.patch", "logprobs.detach(), 0.0)", "logprobs, 0.0)"),
    ("examples/luffy_annealed.patch", "step < cfg.hint_steps else", "step <= cfg.hint_steps else"),
    # LoRA
    ("core/model.py", 'b, a, alpha=layer.scaling["default"])', "b, a)"),
    ("core/model.py", "rescale_adapter_scale(policy.model, 0.0)", "rescale_adapter_scale(policy.model, 1.0)"),
    ("core/model.py", "if dtypes and not p.requires_grad)", "if dtypes and p.requires_grad)"),
    ("core/model.py", 'if all(".lora_" in name for name in trained) else {}', "if trained else {}"),
    ("core/model.py", "and policy.model.name_or_path == resolve_model(run.model):", ":"),
    ("core/model.py", r"\.lora_|\.base_layer\.weight$", r"\.lora_|base_layer"),
    ("core/records.py", 'if "lora_" in k or not run.lora_rank}', 'if "lora_A" in k or not run.lora_rank}'),
    ("core/records.py", 'extra.get("frozen", 0) != frozen_bits(state["model"], log.world)', "False"),
    ("core/config.py", '"lora_rank": int}.items()', "}.items()"),
    ("bridge.py", ' and ".lora_" not in name:', ":"),
    (
        "bridge.py",
        "named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]",
        "named = list(policy.named_parameters())",
    ),
    # what is sampled
    ("grpo.py", "(cfg.run.seed, step, 0),", "(cfg.run.seed, 0, 0),"),
    ("luffy.py", "(cfg.run.seed, step, 0),", "(0, step, 0),"),
    ("hpt.py", "            cfg.temperature,\n", "            1.0,\n"),
    (
        "chord.py",
        "            cfg.max_completion_tokens,\n            cfg.temperature",
        "            512,\n            cfg.temperature",
    ),
    ("srft.py", "cfg.group_size - cfg.expert_rows,", "cfg.group_size,"),
    (
        "relift.py",
        "common.draw(train, cfg.problems_per_step, step, cfg.run.seed",
        "common.draw(train, cfg.problems_per_step, 0, cfg.run.seed",
    ),
    (
        "bridge.py",
        "common.draw(traced, cfg.sft_problems_per_step, step, cfg.run.seed + 1",
        "common.draw(traced, cfg.sft_problems_per_step, step, cfg.run.seed",
    ),
    ("prefix_rft.py", "seed = (cfg.run.seed, step, 1)", "seed = (cfg.run.seed, step, 0)"),
    (
        "prefix_rft.py",
        "common.group_seed((cfg.run.seed, step, 2), problem)",
        "common.group_seed((cfg.run.seed, 0, 2), problem)",
    ),
    (
        "uft.py",
        "common.group_seed((cfg.run.seed, step, 1), problem)",
        "common.group_seed((cfg.run.seed, step, 1), problems[0])",
    ),
    ("bread.py", "seed = (cfg.run.seed, step, rounds)", "seed = (cfg.run.seed, step, 0)"),
    ("trapo.py", "(cfg.run.seed, step, stage),", "(cfg.run.seed, step, 0),"),
    ("dapo.py", "world, place + len(keep))", "world, place)"),
    ("iw_sft.py", "default_rng([seed, step])", "default_rng([seed])"),
    # schedules
    ("uft.py", "share, hints = hint_share(step,", "share, hints = hint_share(0,"),
    ("uft.py", "    t = step + 1\n    return low", "    t = step\n    return low"),
    ("prefix_rft.py", "low, prefixes = lowest_share(step,", "low, prefixes = lowest_share(0,"),
    ("chord.py", "mu = sft_share(step,", "mu = sft_share(0,"),
    ("chord.py", "(step + 1 - warmup) / max(1, decay)", "(step - warmup) / max(1, decay)"),
    ("bridge.py", "step / max(1, cfg.steps - 1)", "step / max(1, cfg.steps)"),
    ("grpo.py", "warm = min(1.0, (step + 1) / (cfg.warmup_steps or 1))", "warm = 1.0"),
    (
        "trapo.py",
        "warm = min(1.0, (step + 1) / (cfg.warmup_steps or 1))",
        "warm = min(1.0, step / (cfg.warmup_steps or 1))",
    ),
    ("sft.py", "learning_rate(step, cfg.steps,", "learning_rate(0, cfg.steps,"),
    ("iw_sft.py", "learning_rate(step, cfg.steps,", "learning_rate(step, cfg.steps + 1,"),
    ("dapo.py", "place += done", "place += len(keep)"),
    # temperatures and denominators
    (
        "grpo.py",
        "token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef",
        "token_logprobs(policy, batch, 1.0, cfg.entropy_coef",
    ),
    (
        "srft.py",
        "token_logprobs(policy, batch, cfg.temperature, cfg.entropy_coef",
        "token_logprobs(policy, batch, 1.0, cfg.entropy_coef",
    ),
    ("sft.py", "batch, temperature=1.0)", "batch, temperature=cfg.temperature)"),
    ("hpt.py", "            counts = common.count(rows, world)", "            counts = common.count(rows[:1], world)"),
    (
        "luffy.py",
        "mask, num_tokens, num_rows = batch.completion_mask, counts.policy + counts.expert",
        "mask, num_tokens, num_rows = batch.completion_mask, counts.policy",
    ),
    ("uft.py", "num_hint = counts.expert if cfg.hint_norm", "num_hint = counts.policy if cfg.hint_norm"),
    ("hpt.py", "max(num_rows / cfg.group_size + counts.expert_rows, 1)", "max(num_rows + counts.expert_rows, 1)"),
    (
        "relift.py",
        "mask, num_tokens = batch.expert_mask, counts.expert",
        "mask, num_tokens = batch.expert_mask, len(batch.rollouts)",
    ),
    ("iw_sft.py", "cfg.loss_norm, counts.expert,", "cfg.loss_norm, counts.rows,"),
    ("trapo.py", "total = (num_tokens + counts.expert,", "total = (num_tokens,"),
    ("srft.py", "/ max(counts.policy + counts.expert, 1)", "/ max(counts.policy, 1)"),
    # which rows, which masks
    ("relift.py", '["" if any(r.solved for r in group) else', '["" if group[0].reward else'),
    ("relift.py", "taken[world.rank :: world.size]", "taken"),
    ("hpt.py", "sum(r.solved for r in group) <= cfg.gate", "sum(r.solved for r in group) < cfg.gate"),
    ("bread.py", '(cfg.band_low if cfg.trigger == "always" else 0.0) for', "0.0 for"),
    ("bread.py", "mids, rounds = [(lo[i] + hi[i] + 1) // 2", "mids, rounds = [max(lo[i] + 1, (lo[i] + hi[i]) // 2)"),
    ("bread.py", "0 < success < 1, success > 0, -episodes", "0 < success < 1, success > 0, episodes"),
    ("trapo.py", "lengths = list(map(min, lengths, limits))", "pass"),
    ("trapo.py", "            mark_taught(group)\n", ""),
    (
        "prefix_rft.py",
        "prefixes.append(problem.expert_ids[: min(length, limit)])",
        "prefixes.append(problem.expert_ids[:length])",
    ),
    ("prefix_rft.py", "any(r.advantage or r.prefix_advantage for r in g)", "any(r.advantage for r in g)"),
    ("prefix_rft.py", "torch.where(batch.expert_mask & ~kept, 0.0,", "torch.where(batch.expert_mask & kept, 0.0,"),
    (
        "luffy.py",
        "surrogate = torch.where(batch.expert_mask, shaped * A, surrogate)",
        "surrogate = torch.where(batch.expert_mask, shaped, surrogate)",
    ),
    ("dapo.py", "len({r.reward for r in group}) > 1", "len({r.reward for r in group}) > 0"),
    (
        "dapo.py",
        "batch = [k for k, good in enumerate(keep) if good][:n]",
        "batch = [k for k, good in enumerate(keep) if good][-n:]",
    ),
    (
        "chord.py",
        "sft_problems, update, cfg.updates_per_step, cfg.sft_problems_per_step",
        "sft_problems, 0, cfg.updates_per_step, cfg.sft_problems_per_step",
    ),
    ("bridge.py", "mine.grad = mine.grad - theirs.grad", "mine.grad = mine.grad + theirs.grad"),
    # clips, detach, signs
    ("common.py", "low = 1 - clip_low if clip_low >= 0", "low = 1 - clip_high if clip_low >= 0"),
    ("common.py", "torch.minimum(plain, clipped)", "torch.maximum(plain, clipped)"),
    (
        "common.py",
        "torch.where(batch.old_logprobs.isnan(), logprobs.detach(),",
        "torch.where(batch.old_logprobs.isnan(), logprobs,",
    ),
    ("common.py", "log_ratio.detach() + k2 - k2.detach()", "log_ratio.detach() + 0 * k2"),
    ("common.py", "+ log_ratio).clamp(max=10)", "+ log_ratio)"),
    ("common.py", "rewards.std(1, keepdim=True) + 1e-6", "rewards.std(1, keepdim=True, unbiased=False) + 1e-6"),
    ("srft.py", "H = torch.where(mask, entropy.detach(), 0.0)", "H = torch.where(mask, entropy, 0.0)"),
    ("trapo.py", "p / p.detach().clamp(min=cfg.trsft_alpha)", "p / p.clamp(min=cfg.trsft_alpha)"),
    ("iw_sft.py", "@torch.no_grad()\ndef weigh", "def weigh"),
    ("chord.py", "logprobs.detach(), 0.0)", "logprobs, 0.0)"),
    ("prefix_rft.py", "torch.maximum(surrogate, cfg.dual_clip * A)", "torch.minimum(surrogate, cfg.dual_clip * A)"),
    ("bridge.py", "torch.minimum(logprobs, highest)", "logprobs"),
    ("grpo.py", "loss = loss - cfg.entropy_coef", "loss = loss + cfg.entropy_coef"),
    # updates, sync, evaluation, checkpoints
    (
        "grpo.py",
        "        if cfg.updates_per_step > 1:\n            common.store_old",
        "        if cfg.updates_per_step > 2:\n            common.store_old",
    ),
    ("uft.py", '        log.phase("sync")\n        sampler.sync(policy)\n', '        log.phase("sync")\n'),
    ("luffy.py", "            optimizer.zero_grad()\n", ""),
    ("hpt.py", "norm <= cfg.skip_above:", "norm >= cfg.skip_above:"),
    ("relift.py", "common.save(log, step, state, buffer=buffer)", "common.save(log, step, state)"),
    ("dapo.py", "common.save(log, step, state, place=place)", "common.save(log, step, state)"),
    ("bread.py", "common.save(log, step, state, opened=sorted(opened))", "common.save(log, step, state)"),
    ("relift.py", ', "sft_optimizer": (policy, sft_optimizer)}', "}"),
    ("iw_sft.py", '| ({"q": ema} if ema else {})', ""),
    ("core/records.py", "or entry[1].state}", "or True}"),
    ("core/records.py", 'json.dumps({"step": step, **extra})', 'json.dumps({"step": step + 1, **extra})'),
    (
        "common.py",
        "seed = problems[world.rank :: world.size], (cfg.run.seed, -1)",
        "seed = problems[world.rank :: world.size], (cfg.run.seed, -2)",
    ),
    (
        "common.py",
        "cfg.run.eval_samples, cfg.max_completion_tokens, cfg.temperature, seed)",
        "cfg.run.eval_samples, cfg.max_completion_tokens, 0.0, seed)",
    ),
    # rows, counts, packing, seeds
    ("common.py", "drawn[:k].count(i)", "0"),
    (
        "common.py",
        "(i * world.size + world.rank) * updates // total == update",
        "i * updates // max(1, len(values)) == update",
    ),
    (
        "common.py",
        "torch.tensor([total - expert, expert, len(rollouts) - whole, whole])",
        "torch.tensor([total, expert, len(rollouts) - whole, whole])",
    ),
    ("core/packing.py", "before = prompts[row] + column - 1", "before = prompts[row] + column"),
    ("common.py", "if not (r.num_expert_tokens or r.problem.hinted)", "if not r.problem.hinted"),
    (
        "core/data.py",
        "key = (seed, problem.id, problem.occurrence) if problem.occurrence",
        "key = (seed, problem.id) if problem.occurrence",
    ),
    ("core/data.py", "*ends, _ = episode_ends(problem, tokenizer)", "ends = episode_ends(problem, tokenizer)"),
    ("core/data.py", "[end for end in ends if end <= limit]", "ends"),
    ("core/data.py", '[*filter(str.strip, steps), ""]', "filter(str.strip, steps)"),
    (
        "core/sampler.py",
        "torch.log_softmax(logits.float() / (temperature or 1.0), -1)",
        "torch.log_softmax(logits.float(), -1)",
    ),
    # the check at load, and what architectures ask for
    ("core/model.py", "    check_packing(policy, run.model, world.device)\n", ""),
    ("core/memory.py", "    if states > has:\n", "    if needs > has:\n"),
    ("core/memory.py", "if needs <= has:", "if states <= has:"),
    ("core/memory.py", "saved = 16 * hidden + attention + 8 * inner", "saved = 34 * hidden"),
    ("core/memory.py", "states = (16 * adapter + 2 * whole if rank", "states = (16 * adapter + 4 * whole if rank"),
    ("core/processes.py", "        ctypes.CDLL(None).mallopt(-3, 24 * 2**20)", "        ctypes.CDLL(None)"),
    ("core/model.py", "full.tril(before - window)", "full.tril(before - window - 1)"),
    ("core/model.py", '("drop" in k or "jitter" in k)', '("jitter" in k)'),
    ("core/model.py", '    if rope.get("rope_type") == "longrope":', '    if rope.get("rope_type") == "none":'),
    ("core/model.py", "logits * self.scale", "logits / self.scale"),
    ("core/model.py", "self.cap * torch.tanh(logits / self.cap) if self.cap else logits", "logits"),
    ("core/model.py", 'attention = "eager" if getattr', "attention = None if getattr"),
    ("core/model.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ("core/verifier.py", "while spans and spans[-1].start > start.end():", "while False:"),
    # rewards
    ("bread.py", "success = sum(r.solved for r in group)", "success = sum(r.reward for r in group)"),
    ("bread.py", "if sum(r.solved for r in group)", "if sum(r.reward for r in group)"),
    ("bread.py", "hard = [sum(r.solved for r in g)", "hard = [sum(r.reward for r in g)"),
    ("relift.py", "any(r.solved for r in group) else", "any(r.reward for r in group) else"),
    ("hpt.py", "failed = [sum(r.solved for r", "failed = [sum(r.reward for r"),
    ("core/rewards.py", "self.solved - 1e-6", "1 - 1e-6"),
    ("core/data.py", "if not problem.grader.solves(found.reward)", "if found.reward < problem.grader.solved"),
    # what is right
    ("core/answers.py", "return sympy.solve(*equation) or [sympy.Dummy()]", "return sympy.solve(*equation)"),
    (
        "core/answers.py",
        "    if LOST.search(gold) or LOST.search(said):\n",
        "    if LOST.search(gold) and LOST.search(said):\n",
    ),
    ("core/answers.py", "return [] if contradicts(found) else [found]", "return [found]"),
    ("core/rewards.py", "progress, right)", "progress)"),
    ("core/verifier.py", "if spent > 0.5 else 0.0", "if spent > 99 else 0.0"),
    ("core/verifier.py", "resource.setrlimit(resource.RLIMIT_AS, (forked + 2**31, resource.RLIM_INFINITY))", "pass"),
    ("core/data.py", "golds_parse(answers, right=COMPARED.get(asking.grader.kind))", "golds_parse(answers)"),
    ("core/rewards.py", "float(weight) * float(value)", "float(value)"),
    ("core/rewards.py", "Grade(0.0) if result is None", "Grade(1.0) if result is None"),
    # what cannot be right
    ("core/model.py", 'if not p.isfinite().all()), "")', 'if False), "")'),
    ("core/records.py", "if math.isfinite(norm) and not bad:", "if not bad:"),
    ("core/records.py", "            optimizer.zero_grad()\n", "            pass\n"),
    ("core/records.py", 'if run.data_hash not in ("", found):', "if False:"),
    ("core/records.py", 'holder.partition(" ")[0] not in ("", host)', "False"),
    ("core/records.py", "not low <= sum(values) / len(values) <= high", "False"),
    ("core/processes.py", "found = [make() if dist.get_rank() == 0 else None]", "found = [make()]; return found[0]"),
    ("core/processes.py", "os._exit(130)", "pass"),
    ("core/processes.py", "if doing[0] in ('update', 'sft') else", "if False else"),
    ("core/records.py", "or found[n] != written.get(n)]", "]"),
    ("core/records.py", "[0])[0] < p.offset + p.length", "[0])[0] < 0"),
    ("core/records.py", "if f.name.isdigit())", 'if f.suffix != ".partial")'),
    ("core/records.py", 'os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"', "pass"),
    ("core/model.py", '"use_safetensors": True', '"use_safetensors": None'),
    ("core/config.py", 'flags["resume"] = ""', "pass"),
    ("core/verifier.py", "    os.setpgrp()\n", ""),
    ("core/verifier.py", "resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))", "pass"),
    # without a trace
    ("luffy.py", " * bool(problem.expert_ids)", ""),
    ("relift.py", "for problem in train if problem.expert_ids}", "for problem in train}"),
    ("hpt.py", " and group[0].problem.expert_ids != []", ""),
    ("prefix_rft.py", ' == "split" and group[0].problem.expert_ids:', ' == "split":'),
    ("chord.py", "common.draw(traced, ", "common.draw(train, "),
    ("trapo.py", "(len(problem.expert_ids) or 1)", "len(problem.expert_ids)"),
    ("core/data.py", "where, replace(problem, expert_ids=[], step_ends=())", "where, problem"),
    ("core/data.py", ".removeprefix(prompt[len(prompt.rstrip()) :])", ".lstrip()"),
    ("eval.py", '{"solution": opening + text}', '{"solution": text}'),
    ("eval.py", 'or "solution" in again]', "]"),
    ("eval.py", '"longer": bool(texts)', '"longer": False'),
    # defaults
    ("luffy.py", "gamma: float = 0.1", "gamma: float = 0.01"),
    ("uft.py", "hint_steps: int = 300", "hint_steps: int = 3000"),
    ("hpt.py", "lr: float = 5e-6", "lr: float = 5e-5"),
    ("trapo.py", "(-1.0, 0.5, 2 / 3, 1.0)", "(-1.0, 0.5, 0.7, 1.0)"),
    ("core/config.py", "grad_clip: float = 1.0", "grad_clip: float = 10.0"),
    # known bugs of this field, each planted for a row of the table in tests/README.md
    (
        "common.py",
        "    return torch.where(batch.old_logprobs.isnan(), logprobs.detach(), batch.old_logprobs)",
        "    x = batch.old_logprobs\n    return x.copy_(torch.where(x.isnan(), logprobs.detach(), x))",
    ),
    (
        "luffy.py",
        "    p = torch.exp(torch.where(batch.expert_mask, logprobs, 0.0))",
        ("    p = torch.exp(torch.where(batch.expert_mask, logprobs, 0.0))\n    batch.expert_mask[:, 0] = False"),
    ),
    (
        "grpo.py",
        'metrics["entropy"] = common.token_mean(entropy.detach(), mask, num_tokens)',
        'metrics["entropy"] = common.token_mean(entropy.detach(), mask, num_tokens) / num_tokens',
    ),
    (
        "core/sampler.py",
        "room = [max_tokens - len(prefixes[i]) for i in chunk]",
        "room = [max(1, max_tokens - size[i]) for i in chunk]",
    ),
    (
        "core/sampler.py",
        "ends = lengths.tolist()",
        "ends = [n - (t[n - 1] in self.stop_ids) for n, t in zip(lengths.tolist(), tokens.tolist())]",
    ),
    (
        "core/sampler.py",
        "    if top_p < 1:",
        "    if top_p <= 1:\n        logp = transformers.TopKLogitsWarper(8)(None, logp)",
    ),
    ("sft.py", "import common\n\nreward_fn", "import commons as common\n\nreward_fn"),
    (
        "common.py",
        'torch.where(mask, 1 / max(num_tokens if loss_norm == "token" else num_rows * max_tokens, 1), 0.0)',
        'torch.where(mask, 1 / (num_tokens if loss_norm == "token" else num_rows * max_tokens), 0.0)',
    ),
    ("core/data.py", "    ids = problem.expert_ids[:-1]\n", "    ids = problem.expert_ids\n"),
    ("dapo.py", "len(keep) <= cfg.resample_rounds * cfg.problems_per_step", "len(keep) <= 9 * cfg.problems_per_step"),
    ("relift.py", "cfg.sft_entropy_coef *", "(cfg.sft_entropy_coef + 0.001) *"),
    ("srft.py", '    if cfg.rollouts == "adv":', '    if cfg.rollouts != "adv":'),
    ("chord.py", "phi / max(counts.expert, 1)", "phi / batch.expert_mask.sum().clamp(min=1)"),
    (
        "grpo.py",
        "loss, metrics = loss_fn(cfg, batch, logprobs, entropy, ref_logprobs, counts)",
        "loss, metrics = loss_fn(cfg, batch, logprobs, entropy, ref_logprobs, common.count(batch.rollouts, world))",
    ),
    (
        "common.py",
        "Counts(*all_sum(torch.tensor([total - expert, expert, len(rollouts) - whole, whole]), world).tolist())",
        "Counts(total - expert, expert, len(rollouts) - whole, whole)",
    ),
    (
        "grpo.py",
        "            counts = common.count(rows, world)",
        "            counts = common.count([row for group in kept for row in group], world)",
    ),
    (
        "grpo.py",
        'if cfg.zero_variance == "keep" or any(r.advantage for r in group) else [] for',
        "if cfg.zero_variance or any(r.advantage for r in group) else [] for",
    ),
    ("common.py", "else num_rows * max_tokens, 1), 0.0)", "else num_rows * mask.shape[1], 1), 0.0)"),
    ("core/records.py", 'if name.endswith("_max") else totals[name] + term', 'if name.endswith("_max") else term'),
    (
        "sft.py",
        "loss, metrics = loss_fn(cfg, batch, logprobs, entropy, None, counts)",
        "loss, metrics = loss_fn(cfg, batch, logprobs, entropy, None, common.count(batch.rollouts, world))",
    ),
    (
        "sft.py",
        "for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world):",
        "for batch in common.microbatches(rows, cfg.run.tokens_per_microbatch, world)[:1]:",
    ),
    ("common.py", "1 / (max(num_rows, 1) * lengths)", "1 / (max(num_rows, 1) * lengths.mean())"),
    (
        "common.py",
        "lengths = mask.sum(1, keepdim=True).clamp(min=1)",
        "lengths = torch.full_like(mask.sum(1, keepdim=True), mask.shape[1])",
    ),
    ("grpo.py", "cfg.entropy_coef * (w * entropy).sum()", "cfg.entropy_coef * entropy[mask].mean()"),
    (
        "common.py",
        "        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)",
        "        advantages = advantages / (rewards.std() + 1e-6)",
    ),
    (
        "common.py",
        "(rewards.mean(1, keepdim=True) if baseline is None else baseline)",
        "(rewards.mean() if baseline is None else baseline)",
    ),
    (
        "common.py",
        (
            "    if scale_by_std and rewards.shape[1] > 1:\n"
            "        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)\n"
            "    return torch.where(constant, 0.0, advantages)"
        ),
        "    return advantages / (rewards.std(1, keepdim=True) + 1e-6) if scale_by_std else advantages",
    ),
    (
        "common.py",
        "constant = (rewards == rewards[:, :1]).all(1, keepdim=True)",
        "constant = (rewards == 0).all(1, keepdim=True)",
    ),
    (
        "common.py",
        'log.add_mean("groups_mixed", [len({r.reward for r in group}) > 1 for group in plain])',
        'log.add_mean("groups_mixed", [len({r.reward for r in group}) > 0 for group in plain])',
    ),
    (
        "core/processes.py",
        "return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]",
        "return [value for part in parts for value in part]",
    ),
    ("luffy.py", "baseline=rewards.mean())", "baseline=rewards[:, :-1].mean())"),
    ("grpo.py", "for x in (logprobs, ref_logprobs))", "for x in (logprobs, logprobs.detach()))"),
    ("common.py", "    log_ratio = logprobs - ref_logprobs", "    log_ratio = ref_logprobs - logprobs"),
    (
        "grpo.py",
        "reference = common.load_reference(cfg.run, policy, world) if cfg.kl_coef else None",
        "reference = policy if cfg.kl_coef else None",
    ),
    (
        "luffy.py",
        "    shaped = p / (p + cfg.gamma) if cfg.gamma >= 0 else p",
        (
            "    shaped = p / (p + cfg.gamma) if cfg.gamma >= 0 else p\n"
            "    shaped = shaped.clamp(min=1 - cfg.clip_low) if cfg.clip_low >= 0 else shaped"
        ),
    ),
    ("common.py", "ratio.clamp(max=cap)", "ratio"),
    (
        "common.py",
        "pad(torch.full_like(sampled, not filler, dtype=torch.bool))",
        "pad((line[-2][line[-1]] != 0) & (not filler))",
    ),
    (
        "core/sampler.py",
        "ids = ids if isinstance(ids, list) else [ids]",
        "ids = ids[:1] if isinstance(ids, list) else [ids]",
    ),
    ("core/data.py", 'max_completion_tokens} tokens"', 'max_completion_tokens} tokens" * 0'),
    ("common.py", "rollout.finished = rollout.completion_ids[-1] in self.engine.stop_ids", "rollout.finished = True"),
    (
        "common.py",
        "    lengths = [len(r.completion_ids) for r in rollouts]",
        (
            "    rollouts = [replace(r, completion_ids=r.problem.prompt_ids + r.completion_ids) for r in rollouts]\n"
            "    lengths = [len(r.completion_ids) for r in rollouts]"
        ),
    ),
    (
        "srft.py",
        "row_mean = H.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)",
        "row_mean = H.sum(1, keepdim=True) / mask.sum(1, keepdim=True)",
    ),
    ("common.py", "[*prefix, *ids]", "self.tokenizer(self.tokenizer.decode([*prefix, *ids])).input_ids"),
    (
        "uft.py",
        "hints.append(problem.expert_ids[: draw_hint(cuts, share, cfg.schedule, rng)])",
        (
            "text = tokenizer.decode(problem.expert_ids[: draw_hint(cuts, share, cfg.schedule, rng)])\n"
            "            hints.append(tokenizer(text.strip()).input_ids)"
        ),
    ),
    ("core/sampler.py", "(mask.cumsum(1) - 1).clamp(min=0)", "torch.arange(width, device=self.device).expand_as(mask)"),
    (
        "core/model.py",
        "parts = (query.split(rows.queries, dim=2), key.split(rows.keys, dim=2), value.split(rows.keys, dim=2))",
        "parts = ((query,), (key,), (value,))",
    ),
    (
        "core/packing.py",
        "parts = [ids, token + shared[owner],",
        "parts = [ids, np.arange(len(ids)),",
    ),
    (
        "core/data.py",
        "    ids = tokenizer(first, add_special_tokens=False).input_ids",
        "    ids = [tokenizer.bos_token_id, *tokenizer(first, add_special_tokens=False).input_ids]",
    ),
    ("core/data.py", 'SYSTEMS = {"qwen_math": BOX_REQUEST.strip(),', 'SYSTEMS = {"qwen_math": BOX_REQUEST,'),
    ("core/vllm_sampler.py", 'logprobs_mode="processed_logprobs"', 'logprobs_mode="raw_logprobs"'),
    ("core/sampler.py", "logp.gather(1, token[:, None])[:, 0]", "logp.max(1).values"),
    ("core/vllm_sampler.py", "if not self.engine.reset_prefix_cache():", "if False:"),
    ("core/vllm_sampler.py", "module.quant_method.process_weights_after_loading(module)", "pass"),
    (
        "core/sampler.py",
        "        if mine:\n            raise RuntimeError",
        "        if False:\n            raise RuntimeError",
    ),
    ("common.py", "(gap - 1).abs() > 0.1, mask)", "(gap - 1) > 0.1, mask)"),
    (
        "core/model.py",
        "def load_model(run: RunConfig, dtype=torch.float32, attention",
        "def load_model(run: RunConfig, dtype=torch.bfloat16, attention",
    ),
    ("core/model.py", "dict.fromkeys(noise, 0.0)", "dict.fromkeys(noise, 0.1)"),
    ("core/model.py", "return hidden.float() @ weight.float().T", "return (hidden @ weight.T).float()"),
    ("core/model.py", "if world.rank == 0 else buffer, 0)", "if world.rank == 0 else buffer, 1)"),
    ("core/engines.py", 'if "made" in vars(self):', "if True:"),
    ("sft.py", "            sampler.sync(policy)\n", ""),
    (
        "core/data.py",
        "key = (seed, problem.id, problem.occurrence) if problem.occurrence else (seed, problem.id)",
        "key = (seed[:1], problem.id, problem.occurrence) if problem.occurrence else (seed[:1], problem.id)",
    ),
    (
        "common.py",
        "    return found[world.rank :: world.size]",
        "    return found[: len(found[world.rank :: world.size])]",
    ),
    (
        "common.py",
        "    for step in steps:\n        numbers, shared",
        "    for step in [step for step in steps if step[world.rank]]:\n        numbers, shared",
    ),
    ("common.py", "torch.full_like(sampled, not filler, dtype", "torch.full_like(sampled, True, dtype"),
    # which rank updates a row
    ("core/packing.py", "if used and used + tokens[part] > budget:", "if used + tokens[part] > 2 * budget:"),
    ("core/packing.py", "heapq.heapreplace(emptiest, (used + tokens[part], b))", "emptiest.append(emptiest.pop(0))"),
    (
        "core/packing.py",
        "    filled.sort(key=lambda rows:",
        "    sorted(filled, key=lambda rows:",
    ),
    ("core/packing.py", "key=lambda part: -tokens[part]):", "key=lambda part: tokens[part]):"),
    # what a group shares
    ("core/packing.py", "opening *= completion[:opening] == other[:opening]\n", "pass\n"),
    ("core/packing.py", "len(own) + opening if own == prompt else 0", "len(own) + opening"),
    ("core/packing.py", "token + shared[owner], predict", "token, predict"),
    ("core/packing.py", "own = before >= shared[row] - 1", "own = before >= shared[row]"),
    ("core/packing.py", "shared = min(shared, rows[start][1])", "shared = rows[start][1]"),
    ("core/packing.py", "plans[slowest.index(min(slowest))]", "plans[-1]"),
    ("core/records.py", "                    group.update(now)", "                    pass"),
    ("core/model.py", "(full.triu(before + 1) + full.tril(before - window))", "(full.triu(1) + full.tril(-window))"),
    ("common.py", "batch.own[i].old_logprobs = values", "batch.rollouts[0].old_logprobs = values"),
    ("common.py", "dict(enumerate(rollouts, sum(map(len, sizes[: world.rank]))))", "dict(enumerate(rollouts))"),
    ("common.py", "batch.sampler_logprobs, -math.inf).exp()", "batch.sampler_logprobs, 0.0).exp()"),
    ("core/records.py", "values.where(mask, 0).sum()", "values.sum()"),
    (
        "grpo.py",
        "ratio = torch.exp(torch.where(batch.policy_mask, logprobs - old_logprobs, 0.0))",
        "ratio = torch.exp((logprobs - old_logprobs) * batch.policy_mask)",
    ),
    (
        "hpt.py",
        "            counts = common.count(rows, world)",
        "            counts = common.count(rows, world) if rows else common.Counts(1, 1, 1)",
    ),
    (
        "core/model.py",
        "return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else torch.inf))",
        (
            "grads = [getattr(p.grad, '_local_tensor', p.grad) for p in parameters if p.grad is not None]\n"
            "    return torch.nn.utils.get_total_norm(grads)"
        ),
    ),
    ("grpo.py", 'state = {"model": policy, "optimizer": (policy, optimizer)}', 'state = {"model": policy}'),
    ("core/records.py", "if f.name.isdigit())", "if f.name[:1].isdigit())"),
    ("uft.py", "loss = loss + cfg.hint_coef * hint_loss", "loss = loss + hint_loss"),
    ("core/answers.py", "found = latex2sympy(text, is_real", "found = latex2sympy(text.split('^')[0], is_real"),
    (
        "core/verifier.py",
        "return [bool(read.get(a, True)) if isinstance(a, str) else countdown_gold(a) for a in answers]",
        "return [isinstance(a, str) or countdown_gold(a) for a in answers]",
    ),
    ("core/answers.py", "grader.verify(read(gold), read(said),", "grader.verify(read(said), read(gold),"),
    ("core/answers.py", "elif depth == 0:", "elif depth >= 0:"),
    ("core/answers.py", "close(a, b) or ((bare_a is a) != (bare_b is b) and close(bare_a, bare_b))", "close(a, b)"),
    ("core/answers.py", "1.000001e-6 if decimal", "1.000001e-3 if decimal"),
    (
        "core/verifier.py",
        " and all(said == last or equal(last, said) or equal(said, last) for said in set(answers))",
        "",
    ),
    (
        "core/verifier.py",
        'return [text[span].strip() for span in spans if BLANK.sub("", text[span])]',
        'return [text[span].strip() for span in spans if BLANK.sub("", text[span])] or re.findall(r"\\d+", text)',
    ),
    (
        "core/verifier.py",
        'BRACES = re.compile(r"\\\\boxed\\s{0,9}\\{',
        'BRACES = re.compile(r"\\\\(?:fbox|boxed)\\s{0,9}\\{',
    ),
    ("core/answers.py", 'r"(1.0\\\\times \\1\\\\times 10^{\\2})"', 'r"\\1"'),
    (
        "core/answers.py",
        "return text[: unit.start()] if unit and not has_variable(text[: unit.start()]) else text",
        "return text",
    ),
    ("core/verifier.py", "timeout=time_limit)", "timeout=None)"),
    ("core/answers.py", 'lambda m: re.sub(r"\\D", "", m[0])', "lambda m: m[0]"),
    ("core/verifier.py", "errors += [first_line(error)] if error else []", "pass"),
    (
        "core/records.py",
        "generation.eos_token_id = ends if len(ends) > 1 else ends[0]",
        "generation.eos_token_id = ends[0]",
    ),
    ("core/verifier.py", "elif len(different) == 1 and plain_integer(box) and", "elif False and"),
    ("bread.py", "    loss = -(w * v * surrogate).sum()", "    loss = (w * v * surrogate).sum()"),
]
SURVIVORS: dict[tuple[str, str], str] = {}  # (file, the line as it is): why no test can see it


@dataclass
class Config:
    only: str = ""  # mutate files with this in their name
    sample: bool = False  # ten of them, by today's date
    known: bool = False  # those of the known bugs, each against the tests of its row


Mutation = tuple[str, str, str]


def named(name: str, part: str) -> list[Mutation]:
    """The mutations of a file with this in the line as it is or as it becomes, but for blanks."""
    return [m for m in MUTATIONS if m[0] == name and any("".join(part.split()) in "".join(x.split()) for x in m[1:])]


def known_bugs() -> list[tuple[str, list[str], list[list[Mutation]]]]:
    """(what a row says, its tests, what each name there means) of tests/README.md's table."""
    table = (ROOT / "tests/README.md").read_text().split("\n## Known bugs of this field\n")[1].split("\n## ")[0]
    rows = [line.strip("| ") for line in table.splitlines() if line.startswith("| ")][1:]
    tests = [re.findall(r"`(test_\w+::test_\w+)`", row) for row in rows]
    names = [re.findall(r"`([\w/]+\.py)`: `([^`]+)`", row) for row in rows]
    return [(row, held, [named(*n) for n in many]) for row, held, many in zip(rows, tests, names, strict=True)]


def plant(copy: Path, name: str, line: str, wrong: str) -> str:
    """Change the copy, where the line must stand just once; returns the text to put back."""
    text = (copy / name).read_text()
    assert text.count(line) == 1, f"{name} has {text.count(line)} times: {line!r}"
    (copy / name).write_text(text.replace(line, wrong))
    return text


def failing(copy: Path, *chosen: str) -> str:
    """The first test that fails, or nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, check=False)
    if done.returncode in (0, 5):  # 5: no test was chosen
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:110] if failed else f"pytest ends with {done.returncode}"


def seen(copy: Path, name: str) -> str:
    """The test that fails, or nothing."""
    stem, where = Path(name).stem, WHERE.get(name, METHOD)
    choose = [f"{file}:{stem}-or-two_ranks" if file in BY_METHOD.split() else file for file in where.split()]
    for expression, files in itertools.groupby(choose, lambda file: file.partition(":")[2].replace("-", " ")):
        chosen = [f"tests/{file.partition(':')[0]}.py" for file in files] + (["-k", expression] if expression else [])
        if failed := failing(copy, *chosen):
            return failed
    return ""


def testable(mutation: Mutation) -> bool:
    """Whether this environment has what the tests of a mutation need."""
    return mutation[0] != "core/vllm_sampler.py" or importlib.util.find_spec("vllm") is not None


def watch(copy: Path, mutation: Mutation, looks: list[Callable[[], str]]) -> list[str]:
    """Plant one, look, put the file back. What each look finds; the first of it is printed."""
    name, line, wrong = mutation
    whole, since = plant(copy, name, line, wrong), time.time()
    found = [look() for look in looks]
    (copy / name).write_text(whole)
    by = next(filter(None, found), "")
    first = wrong.strip().splitlines()[0] if wrong.strip() else "(left out)"
    print(f"{time.time() - since:5.0f}s {'caught' if by else 'SURVIVES':8} {name}: {first[:70]} | {by}", flush=True)
    return found


def arguments(test: str, name: str) -> list[str]:
    """pytest's for FILE::TEST, only for the method whose file it is where tests go by methods."""
    (file, function), stem = test.split("::"), Path(name).stem
    by_method = file in BY_METHOD.split() and "/" not in name and stem != "common"
    return [f"tests/{file}.py::{function}", *(["-k", stem] if by_method else [])]


def known_survivors(copy: Path, only: str) -> list[tuple[str, str]]:
    """(bug, what no test of its row sees) and (bug, a test of its row that sees nothing)."""
    survivors = []
    for bug, tests, mutations in known_bugs():
        planted = [m for (m,) in mutations if only in m[0] and testable(m)]
        found = [watch(copy, m, [partial(failing, copy, *arguments(test, m[0])) for test in tests]) for m in planted]
        survivors += [(bug, m[1]) for m, failed in zip(planted, found, strict=True) if not any(failed)]
        survivors += [(bug, test) for test, *failed in zip(tests, *found, strict=True) if planted and not any(failed)]
    return survivors


def main(cfg: Config) -> None:
    chosen = [m for m in MUTATIONS if cfg.only in m[0] and testable(m)]
    if cfg.sample:
        chosen = random.Random(date.today().isoformat()).sample(chosen, 10)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repo"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("runs", "__pycache__", ".pytest_cache"))
        if cfg.known:
            survivors = known_survivors(copy, cfg.only)
        else:
            survivors = [m[:2] for m in chosen if not any(watch(copy, m, [partial(seen, copy, m[0])]))]
            print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    for name, line in survivors:
        print(f"survives: {name}: {line.strip()!r}: {SURVIVORS.get((name, line), 'not explained')}")
    sys.exit(any(s not in SURVIVORS for s in survivors))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
