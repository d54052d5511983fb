"""The headline is of what the policy wrote alone, in every file; what was sampled is counted."""

import importlib
import json
import math
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import warm
from conftest import ROOT, problem, random_model, read_metrics, run_script
from one_step import one_step
from test_method_updates import PLAIN, PROBLEMS

import common
from core.config import flat
from results.methods import METHODS

ONLINE = [method.name for method in METHODS if "sft" not in (method.name, method.parent)]
WITH_EXPERT_ROWS = ("luffy", "srft", "prefix_rft", "uft", "bread", "trapo", "chord")
FLAGS = {"trapo": {"problems_per_step": 4, "updates_per_step": 1}, "uft": {"hint_high": 0.5, "hint_low": 0.5}}


@pytest.mark.parametrize("name", ONLINE)
def test_the_headline_is_of_what_the_policy_wrote_alone(name, world):
    """A policy that is right where the expert began and nowhere else has reward 0."""
    made = []

    def generate(problems, prefixes, n, *rest):
        groups = []
        for question, prefix in zip(problems, prefixes or [[]] * len(problems), strict=True):
            ids = [*prefix, *[7] * (3 + len(question.prompt_ids))]
            row = {"num_expert_tokens": len(prefix), "sampler_logprobs": [-1.0] * (len(ids) - len(prefix))}
            groups.append([common.Rollout(question, ids, **row, reward=float(bool(prefix))) for _ in range(n)])
        made.extend(groups)
        return groups

    method, flags = importlib.import_module(name), PLAIN | {"loss_norm": "token"} | FLAGS.get(name, {})
    known = {flag: value for flag, value in flags.items() if flag in flat(method.Config())}
    models = [random_model("qwen2", 0, torch.float64) for _ in range(2)]
    _, (line,) = one_step(method, models, generate, PROBLEMS, **known)
    rows = [row for group in made for row in group]
    plain = [row for row in rows if not row.num_expert_tokens]
    assert plain and line["reward"] == 0
    assert (line["groups_mixed"], line["groups_solved"], line["groups_failed"]) == (0, 0, 1)
    assert line["completion_tokens"] == sum(len(row.completion_ids) for row in plain) / len(plain)
    assert line["truncated"] == 1
    helped = name in ("luffy", "srft", "prefix_rft", "uft", "bread", "trapo")
    assert line.get("guided_reward") == (1 if helped else None)
    sampled = sum(len(row.sampler_logprobs) for row in rows)
    assert line["sampled_tokens"] == sampled
    seconds = sampled / line["tokens_per_second_rollouts"]
    assert seconds == pytest.approx(line["seconds_rollouts"], abs=1e-4)
    trained = line.get("trained_tokens", 0)  # dapo.py found nothing to train on
    assert (trained > sampled - line.get("probe_tokens", 0)) == (name in WITH_EXPERT_ROWS)
    assert not trained or trained / line["tokens_per_second_update"] == pytest.approx(line["seconds_update"], rel=0.01)


def test_without_a_row_of_its_own_there_is_no_headline(world, capsys):
    """UFT with a hint in every row: no reward of the policy alone, in the file and in the line."""

    def generate(problems, prefixes, n, *rest):
        return [
            [common.Rollout(p, [*prefix, 7], len(prefix), [-1.0], reward=float(i % 2)) for i in range(n)]
            for p, prefix in zip(problems, prefixes, strict=True)
        ]

    flags = PLAIN | {"hint_high": 1.0, "hint_low": 1.0, "format_reward": 0.1}
    long = [problem("q", expert="a\nb\n\\boxed{1}", id=str(i)) for i in range(4)]
    models = [random_model("qwen2", 0, torch.float64)]
    _, (line,) = one_step(importlib.import_module("uft"), models, generate, long, **flags)
    assert not {"reward", "groups_mixed", "completion_tokens", "truncated"} & set(line) and line["guided_reward"] == 0.5
    assert "0/1 | clip 0 entropy 4.678 | guided 0.5 | loss" in capsys.readouterr().out


def test_a_format_reward_is_no_success(world):
    """UFT's 0.1 for a wrong answer in a box: the group is failed, its reward 0."""

    def generate(problems, prefixes, n, *rest):
        return [[common.Rollout(p, [7, 8], 0, [-1.0] * 2, text="\\boxed{9}") for _ in range(n)] for p in problems]

    flags = PLAIN | {"hint_high": 0.0, "hint_low": 0.0, "format_reward": 0.1}
    models = [random_model("qwen2", 0, torch.float64)]
    _, (line,) = one_step(importlib.import_module("uft"), models, generate, PROBLEMS, **flags)
    assert line["groups_failed"] == 1 and line["groups_solved"] == 0 and line["reward"] == 0


class Log:
    """Keeps the values of every mean."""

    def __init__(self):
        self.values, self.samples, self.terms = {}, [], {}

    def add(self, *rows, **terms):
        self.terms |= terms

    def add_mean(self, name, values, mask=None):
        values = values if mask is None else values[mask]
        self.values.setdefault(name, []).extend(float(value) for value in values)


def test_a_group_counts_once_however_many_plain_rows_it_has():
    """TRAPO draws eight plain rows of a solved problem, four of a failed one: half are solved."""
    log, question = Log(), problem("q")
    solved = [common.Rollout(question, [1] * 10, reward=1.0, finished=True) for _ in range(8)]
    failed = [common.Rollout(question, [1] * 40) for _ in range(4)] + [
        common.Rollout(question, [1, 2], 1, reward=1.0)
    ] * 4
    common.log_rollouts(log, [solved, failed])
    means = {name: sum(values) / len(values) for name, values in log.values.items()}
    assert (means["reward"], means["completion_tokens"], means["truncated"]) == (0.5, 25, 0.5)
    assert means["groups_failed"] == 0.5 and means["guided_reward"] == 1


def test_how_far_sampler_and_trainer_differ():
    """exp(trainer - sampler) of policy tokens: mean, share outside [0.9, 1.1], largest; else 1."""
    log, rows = Log(), [common.Rollout(problem("q"), [5, 6, 7, 0], 1, [-1.0, -2.0, -3.0])]
    logprobs = torch.tensor([[-9.0, -1.0, -2.0 + math.log(1.05), -3.0 + math.log(0.5)]])
    common.log_update(log, {}, common.make_batch(rows), logprobs, 1)
    assert log.values["sampler_ratio"] == pytest.approx([1, 1.05, 0.5], rel=1e-5)
    assert log.values["sampler_ratio_off"] == [0, 0, 1] and log.terms["sampler_ratio_max"] == pytest.approx(1.05)
    assert common.importance_weights(common.make_batch(rows), logprobs, 2.0)[0, :2].tolist() == [1, 1]
    common.log_update(log, {}, common.make_batch(rows), logprobs - 1, 1)
    assert log.terms["sampler_ratio_max"] == pytest.approx(1.05 / math.e)  # not the 1 of an expert's token


def test_partial_rewards_solve_nothing():
    """Solved and failed go by rewards of 1; mixed by rewards that differ."""

    log, question = Log(), problem("q")
    rewards = [[0.1, 0.1], [0.1, 0.0], [1.0, 0.1], [1.0, 1.0]]
    groups = [[common.Rollout(question, [1], reward=r) for r in group] for group in rewards]
    common.log_rollouts(log, groups)
    assert log.values["groups_mixed"] == [0, 1, 1, 0] and log.values["groups_solved"] == [0, 0, 0, 1]
    assert log.values["groups_failed"] == [1, 1, 0, 0]


def test_the_test_set_is_asked_the_same_way_every_time(world):
    """With one seed that no step has, without prefixes, under the flags of evaluation."""
    asked = []

    def generate(problems, prefixes, n, max_tokens, temperature, seed):
        asked.append((len(problems), prefixes, n, max_tokens, temperature, seed))
        return [[common.Rollout(p, [7], reward=float(i == j)) for j in range(n)] for i, p in enumerate(problems)]

    sampler, problems = SimpleNamespace(generate=generate), [problem("a" * (i + 1)) for i in range(3)]
    run = common.RunConfig(seed=5, eval_samples=2)
    cfg = SimpleNamespace(run=run, max_completion_tokens=9, temperature=0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "score", lambda groups: {})
        found = [common.evaluate(sampler, problems, cfg, world) for _ in range(2)]
    assert found == [{"test_accuracy": pytest.approx(2 / 6)}] * 2
    assert asked == [(3, None, 2, 9, 0.7, (5, -1))] * 2


# The terminal, wandb and the end ------------------------------------------------------------------
SMALL = ["--model", "map", "--problems_per_step", "3", "--group_size", "4", "--test_data", ""]


def test_a_new_metric_is_one_line(tmp_path):
    """In a copy of grpo.py: on the terminal, in metrics.jsonl, in the plot."""
    source, line = (ROOT / "grpo.py").read_text(), '    metrics["surprise"] = (-logprobs * w).detach().sum()\n'
    before, found, after = source.partition("    if cfg.kl_coef:\n        policy_lp")
    assert found
    (tmp_path / "mine.py").write_text(before + line + found + after)
    done = run_script(str(tmp_path / "mine.py"), *SMALL, "--steps", "2", "--out", str(tmp_path / "run"))
    values = [row["surprise"] for row in read_metrics(tmp_path / "run") if "surprise" in row]
    shown = re.findall(r"^step .*\| surprise ([0-9.e-]+) \| \d+ tokens/s 0:00:\d\d left \|", done.stdout, re.MULTILINE)
    assert len(values) == 2 and [float(v) for v in shown] == pytest.approx(values, rel=1e-3), done.stdout
    figure = tmp_path / "a.svg"
    run_script("plot.py", str(tmp_path / "run"), "--keys", "reward", "surprise", "--out", str(figure))
    assert figure.stat().st_size > 1000


def test_the_line_begins_with_what_a_person_steers_by(tmp_path):
    """Its order is the README's."""
    flags = [*SMALL[:-2], "--test_data", str(ROOT / "map/test.jsonl"), "--steps", "1", "--kl_coef", "0.1"]
    (line,) = re.findall(r"^step    0/1 .*", run_script("grpo.py", *flags, "--out", str(tmp_path)).stdout, re.MULTILINE)
    names = re.findall(r"(?<= )([a-z/]+) (?=[-0-9.])", line)
    assert names[:9] == "reward test kl clip entropy len cut mixed failed".split() and "tokens/s" in line, line
    readme = (ROOT / "README.md").read_text().partition("## Reading the log")[2]
    places = [readme.index(f"\n| {name}") for name in "reward test kl entropy len mixed guided loss tokens/s".split()]
    assert places == sorted(places)


def test_wandb_gets_every_line_and_a_resumed_run_is_the_same_there(tmp_path, monkeypatch):
    """A package in the place of wandb writes down what it is given."""
    (tmp_path / "wandb.py").write_text(
        "import json, os, sys\n"
        "def log(*line, step=None):\n    print(json.dumps([step, *line]), file=open(os.environ['SEEN'], 'a'))\n"
        "def init(config, **named):\n    log(named)\n    return sys.modules['wandb']\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    out = str(tmp_path / "run")
    run_script("grpo.py", *SMALL, "--steps", "1", "--wandb_project", "mine", "--out", out, fresh=True)
    run_script("grpo.py", "--resume", out, "--steps", "2", fresh=True)
    first, zero, second, one = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert first == second and first[1] == {"project": "mine", "name": "run", "id": first[1]["id"], "resume": "allow"}
    assert (zero[0], one[0]) == (0, 1) and "reward" in zero[1] and "entropy" in one[1]


def test_a_checkpoint_in_the_middle_becomes_a_model(tmp_path):
    """By --resume with its number as --steps; the end says how final/ is served and evaluated."""
    out, flags = tmp_path / "run", [*SMALL, "--steps", "40", "--save_every", "1", "--keep", "9"]
    process = warm.Popen([sys.executable, "grpo.py", *flags, "--out", str(out)], stdout=subprocess.DEVNULL, cwd=ROOT)
    while not (out / "checkpoints/00000002").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    step = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    done = run_script("grpo.py", "--resume", str(out), "--steps", str(step))
    assert (out / "final/model.safetensors").exists() and len(read_metrics(out)) == step + 1
    said = done.stdout.splitlines()[-3:]
    assert said[1:] == [f"  vllm serve {out}/final", f"  python eval.py --model {out}/final"]
