"""Wrong lines, planted one at a time in a copy of the repository: which does no test see?

python tests/mutations.py                 all of them: an hour or two on two cores
python tests/mutations.py --only bread    those whose file has this in its name
python tests/mutations.py --sample        ten of them, chosen by today's date

Prints the survivors, and exits with 1 if there are any that SURVIVORS does not explain.
"""

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
METHOD = "test_defaults test_pages test_method_losses test_method_updates test_log test_methods"
WHERE = {  # the tests that could see a line of a file, the quick ones first; FILE:EXPRESSION is with -k EXPRESSION
    "common.py": "test_sampler test_losses test_packing test_method_losses: test_log test_pages:grpo-or-luffy-or-uft "
    "test_method_updates:grpo-or-luffy-or-two_ranks test_gradients test_eval test_rewards test_scripts",
    "core/data.py": "test_hints test_sampler test_data test_asking test_pages:uft",
    "core/records.py": "test_log test_methods:saving test_resume test_gradients",
    "core/model.py": "test_packing test_losses test_sampler test_gradients test_methods:grpo",
    "core/rewards.py": "test_rewards",
    "core/sampler.py": "test_sampler test_methods:grpo",
    "core/config.py": "test_scripts test_defaults: test_skeleton",
    "core/processes.py": "test_packing test_gradients test_method_updates:grpo-or-two_ranks test_resume",
    "core/verifier.py": "test_verifier test_data test_fuzz",
    "core/answers.py": "test_verifier test_fuzz",
    "eval.py": "test_eval",
    "bridge.py": "test_defaults test_bridge test_methods",
    "dapo.py": "test_defaults test_dapo test_pages test_methods",
    "iw_sft.py": "test_defaults test_iw_sft test_losses test_pages test_methods",
    "sft.py": "test_defaults test_losses test_iw_sft test_pages test_methods",
    "bread.py": "test_bread test_defaults test_pages test_methods test_hints test_rewards",
    "hpt.py": METHOD + " test_rewards",
    "relift.py": METHOD + " test_rewards",
    "uft.py": METHOD + " test_hints",
    "prefix_rft.py": METHOD + " test_hints",
    "trapo.py": METHOD + " test_hints",
}
BY_METHOD = METHOD.replace("test_log ", "")  # of these test files only what has the method's name

MUTATIONS = [  # (file, the line as it is, wrong)
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
        "common.draw(train, cfg.sft_problems_per_step, step, cfg.run.seed + 1",
        "common.draw(train, cfg.sft_problems_per_step, step, cfg.run.seed",
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
    ("common.py", "predict = (ends - lengths)[row] + column - 1", "predict = (ends - lengths)[row] + column"),
    ("common.py", "if not (r.num_expert_tokens or r.problem.hinted)", "if not r.problem.hinted"),
    (
        "core/data.py",
        "key = (seed, problem.id, problem.occurrence) if problem.occurrence",
        "key = (seed, problem.id) if problem.occurrence",
    ),
    ("core/data.py", "*ends, _ = episode_ends(problem, tokenizer)", "ends = episode_ends(problem, tokenizer)"),
    ("core/data.py", "[end for end in ends if end <= limit]", "ends"),
    ("core/data.py", "starts += [len(solution) - len(rest)] if rest else []", "pass"),
    (
        "core/sampler.py",
        "torch.log_softmax(logits.float() / (temperature or 1.0), -1)",
        "torch.log_softmax(logits.float(), -1)",
    ),
    ("core/model.py", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ("core/verifier.py", "if start > last:", "if start >= 0:"),
    # rewards
    ("bread.py", "success = sum(r.solved for r in group)", "success = sum(r.reward for r in group)"),
    ("bread.py", "if sum(r.solved for r in group)", "if sum(r.reward for r in group)"),
    ("bread.py", "hard = [sum(r.solved for r in g)", "hard = [sum(r.reward for r in g)"),
    ("relift.py", "any(r.solved for r in group) else", "any(r.reward for r in group) else"),
    ("hpt.py", "failed = [sum(r.solved for r", "failed = [sum(r.reward for r"),
    ("common.py", "self.problem.grader.solved - 1e-6", "1 - 1e-6"),
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
    ("core/verifier.py", "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n", ""),
    ("core/data.py", "golds_parse(answers, right=COMPARED.get(grader.kind))", "golds_parse(answers)"),
    ("core/rewards.py", "float(weight) * float(value)", "float(value)"),
    ("core/rewards.py", "Grade(0.0) if result is None", "Grade(1.0) if result is None"),
    # defaults
    ("luffy.py", "gamma: float = 0.1", "gamma: float = 0.01"),
    ("uft.py", "hint_steps: int = 300", "hint_steps: int = 3000"),
    ("hpt.py", "lr: float = 5e-6", "lr: float = 5e-5"),
    ("trapo.py", "(-1.0, 0.5, 2 / 3, 1.0)", "(-1.0, 0.5, 0.7, 1.0)"),
    ("core/config.py", "grad_clip: float = 1.0", "grad_clip: float = 10.0"),
]
SURVIVORS: dict[tuple[str, str], str] = {}  # (file, the line as it is): why no test can see it


@dataclass
class Config:
    only: str = ""  # mutate files with this in their name
    sample: bool = False  # ten of them, by today's date


def plant(copy: Path, name: str, line: str, wrong: str) -> str:
    """Change the copy, where the line must stand just once; returns the text to put back."""
    text = (copy / name).read_text()
    assert text.count(line) == 1, f"{name} has {text.count(line)} times: {line!r}"
    (copy / name).write_text(text.replace(line, wrong))
    return text


def seen(copy: Path, name: str) -> str:
    """The test that fails, or nothing."""
    stem, where = Path(name).stem, WHERE.get(name, METHOD)
    choose = [f"{file}:{stem}-or-two_ranks" if file in BY_METHOD.split() else file for file in where.split()]
    for expression, files in itertools.groupby(choose, lambda file: file.partition(":")[2].replace("-", " ")):
        chosen = [f"tests/{file.partition(':')[0]}.py" for file in files] + (["-k", expression] if expression else [])
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, check=False)
        if done.returncode not in (0, 5):  # 5: no test was chosen
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return failed[0][:110] if failed else f"pytest ends with {done.returncode}"
    return ""


def main(cfg: Config) -> None:
    chosen = [m for m in MUTATIONS if cfg.only in m[0]]
    if cfg.sample:
        chosen = random.Random(date.today().isoformat()).sample(MUTATIONS, 10)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repo"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("runs", "__pycache__", ".pytest_cache"))
        for name, line, wrong in chosen:
            whole, since = plant(copy, name, line, wrong), time.time()
            by = seen(copy, name)
            (copy / name).write_text(whole)
            first = wrong.strip().splitlines()[0] if wrong.strip() else "(left out)"
            print(
                f"{time.time() - since:5.0f}s {'caught' if by else 'SURVIVES':8} {name}: {first[:70]} | {by}",
                flush=True,
            )
            if not by:
                survivors.append((name, line))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    unexplained = [s for s in survivors if s not in SURVIVORS]
    for name, line in survivors:
        print(f"survives: {name}: {line.strip()!r}: {SURVIVORS.get((name, line), 'not explained')}")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
