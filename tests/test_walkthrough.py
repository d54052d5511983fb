"""WALKTHROUGH.md is true: its prompt, its picture, its diff, and the method that it adds."""

import ast
import doctest
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
import core.config
from results import methods

PAGE = (ROOT / "WALKTHROUGH.md").read_text()


def section(number: int) -> str:
    """The text of one numbered section."""
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, re.M | re.S)[0]


def block(number: int, language: str) -> str:
    """The one fenced block of a language in a section."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", section(number), re.M | re.S)
    return found


def hunks(diff: str) -> list[str]:
    """A unified diff's hunks, each without its @@ line."""
    return [hunk for hunk in re.split(r"^@@.*\n", diff, flags=re.M) if hunk]


# The page -----------------------------------------------------------------------------------------
def test_every_line_that_a_reader_types(capsys):
    """doctest runs the page as one session, and no output that it shows is another."""
    result = doctest.testfile(str(ROOT / "WALKTHROUGH.md"), module_relative=False, encoding="utf-8")
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted == len(re.findall(r"^    >>> ", PAGE, re.M)) > 25


def test_length_and_width():
    """At most 240 lines; prose and typed code at most 100 columns, fenced code 120 and a marker."""
    lines = PAGE.splitlines()
    assert 150 < len(lines) <= 240
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S).splitlines()
    assert [line for line in prose if len(line) > 100] == []
    assert [line for line in lines if len(line) > 121] == []


# The picture --------------------------------------------------------------------------------------
def drawn_rows() -> list[tuple[str, str, str, str]]:
    """(method, which row, boxes, what multiplies grad logprobs) of every line of the picture."""
    rows, name = [], ""
    for label, boxes, factors in re.findall(r"^(.{39})prompt \| ([█▒░]+) +(.*)$", block(3, ""), re.M):
        name = label[:12].strip() or name
        rows.append((name, label[12:].strip(), boxes, factors))
    return rows


def test_the_picture_has_every_method():
    """Every method of the table has a line with its name, nothing else has; no line is lost."""
    names = re.findall(r"^(\w+) .* prompt \|", block(3, ""), re.M)
    assert sorted(names) == sorted(m.name for m in methods.METHODS)
    assert {name for name, *_ in drawn_rows()} == set(names)
    assert len(drawn_rows()) == block(3, "").count("prompt |") == len(re.findall("[█▒░]{8}", section(3)))


def drawn_gradient(name: str, row: str, boxes: str, factors: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the loss by logprobs on a row like the boxes: by the code and by the page's formulas."""
    method, num_expert = importlib.import_module(name), sum(box != "░" for box in boxes)
    num_policy, p, A, chosen = len(boxes) - num_expert, 0.05, 0.5, {"weight": "dft", "phi": True, "lam": 0.25}
    chosen |= {"loss_norm": "token"}  # in which each count shows
    cfg = core.config.with_flags(method.Config(), {k: v for k, v in chosen.items() if hasattr(method.Config, k)})
    problem = common.Problem("p", "", [1], "", None)
    rollout = common.Rollout(problem, [1] * len(boxes), num_expert, [math.log(p)] * num_policy, advantage=A)
    rollout.taught = not row.startswith("more")
    batch = common.make_batch([rollout])
    counts = common.Counts(num_policy, num_expert, int(num_policy > 0), int(num_policy == 0))
    if name == "hpt":  # beside it three groups that passed, one that failed: q is a quarter
        counts = counts._replace(rows=3 * cfg.group_size, expert_rows=1)
    logprobs = torch.full((1, len(boxes)), math.log(p), requires_grad=True)
    entropy = torch.tensor([[float(box == "█") for box in boxes]])
    constants = {"chord": {"mu": 0.25}}.get(name, {})
    if name == "relift" and not num_policy:
        loss, _ = method.sft_loss_fn(cfg, batch, logprobs, entropy, counts)
    elif name == "bridge" and not num_policy:  # as written in its main
        loss = -(1 - cfg.lam) * common.token_mean(logprobs, batch.expert_mask, counts.expert)
    else:
        loss, _ = method.loss_fn(cfg, batch, logprobs, entropy, logprobs.detach(), counts, **constants)
        loss = cfg.lam * loss if name == "bridge" else loss
    loss.backward()

    count_all = re.findall(r"\w+", re.search(r"in ([\w, ]+)\s+it counts all", section(3))[1])
    counted = num_policy + num_expert * (name in count_all)
    names = core.config.flat(cfg) | constants | {"A": A, "p": p, "v": 1.0, "ratio": 1.0, "min": min}
    names |= {"num_expert": num_expert, "num_hint": num_expert, "weight": p, "phi": p * (1 - p), "q": 0.25}
    names |= {"w": 1 / counted} if counted else {}
    if name == "srft":
        names["w_sft"], names["w_pos"] = cfg.sft_coef * math.exp(-1.0), cfg.positive_coef  # H is 1 and 0
    expected = {"▒": 0.0}
    for box, formula in re.findall(r"([█░]) ([^█░]+)", factors):
        python = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.strip()).replace("^", "**")
        expected[box] = -eval(python, {}, names)
    return logprobs.grad[0], torch.tensor([expected[box] for box in boxes])


@pytest.mark.parametrize(
    ("name", "row", "boxes", "factors"), drawn_rows(), ids=[f"{name}, {row}" for name, row, *_ in drawn_rows()]
)
def test_the_picture_is_what_the_losses_do(name, row, boxes, factors):
    """The gradient of the method's own loss, token by token, is that of the boxes and formulas."""
    found, expected = drawn_gradient(name, row, boxes, factors)
    assert ((found != 0) == (expected != 0)).all()
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)


# The diff -----------------------------------------------------------------------------------------
def test_the_diff_is_the_real_one(tmp_path):
    """Hunk by hunk what `diff -U0` prints for the two bodies, with a sentence over each hunk."""
    for name in ("grpo", "luffy"):
        (tmp_path / name).write_text("".join(methods.body(name)))
    done = subprocess.run(["diff", "-U0", "grpo", "luffy"], cwd=tmp_path, capture_output=True, text=True, check=False)
    real = done.stdout.split("\n", 2)[2]  # below the two names
    assert hunks(block(4, "diff")) == hunks(real), real
    sentences = re.findall(r"^@@ (.+) @@$", block(4, "diff"), re.M)
    assert len(sentences) == len(hunks(real)) and all(len(sentence) > 15 for sentence in sentences)


# The reader's own method --------------------------------------------------------------------------
@pytest.fixture
def mix(tmp_path):
    """A copy of grpo.py with the page's example: every hunk has one place where it fits."""
    source = (ROOT / "grpo.py").read_text()
    for hunk in hunks(block(5, "diff")):
        before, after = ("".join(x[1:] for x in hunk.splitlines(True) if x[0] in side) for side in (" -", " +"))
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    (tmp_path / "mix.py").write_text(source)
    return tmp_path / "mix.py"


def test_the_example_trains(mix, tmp_path):
    """The page's command runs; where no row is right, the new term alone has a gradient."""
    (command,) = re.findall(r"^    (python mix\.py .*)$", section(5), re.M)
    flags = [*shlex.split(command)[1:], "--test_data=", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *flags], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "grad_norm" in row]
    assert len(updates) == 2 and all(row["grad_norm"] > 1e-3 and row["groups_mixed"] == 0 for row in updates)


def test_the_examples_entry(mix, monkeypatch):
    """The entry for results/methods.py is one: its diff is short, and its line is there once."""
    node = ast.parse(f"[{block(5, 'python')}]", mode="eval")
    (entry,) = eval(compile(node, "WALKTHROUGH.md", "eval"), {"Method": methods.Method})
    (mix.parent / "grpo.py").write_text((ROOT / "grpo.py").read_text())
    monkeypatch.setattr(methods, "ROOT", mix.parent)
    assert entry.name == "mix" and 0 < len(methods.body_diff(entry)) < 10 and entry.most == 10
    assert methods.equation_line(entry) > 0
