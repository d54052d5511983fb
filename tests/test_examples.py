"""examples/*.patch as their first lines say, in a copy: they apply, compute their ideas and train.

Every hunk must have just one place in the file that is copied. A hunk that lost its place is named.
"""

import ast
import dataclasses
import importlib.util
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import oracles
import pytest
from conftest import ROOT, read_metrics, run_script
from oracles import NORMS, Terms, agree, change, ragged, settings
from pages import bread, grpo, kit, luffy

import common

PARENTS = {"bread_phi": "bread", "grpo_sft": "grpo", "luffy_annealed": "luffy"}
COMMANDS = {  # of the new docstrings
    "bread_phi": "python bread_phi.py --model map",
    "grpo_sft": "python grpo_sft.py --model tiny --sft_steps 20",
    "luffy_annealed": "python luffy_annealed.py --model map --hint_steps 36",
}
PATCHES = {name: (ROOT / f"examples/{name}.patch").read_text() for name in PARENTS}


def hunks(patch: str) -> list[str]:
    """The hunks without their @@ lines."""
    return re.split(r"^@@ .*\n", patch, flags=re.M)[1:]


def misfits(name: str, source: str) -> list[str]:
    """Of every hunk that has no place or several in the text of the parent: which one, and how."""
    found, all_hunks = [], hunks(PATCHES[name])
    for number, hunk in enumerate(all_hunks, 1):
        before = "".join(line[1:] for line in hunk.splitlines(True) if line[0] != "+")
        if (places := f"\n{source}".count(f"\n{before}")) != 1:
            where = (
                f"examples/{name}.patch: hunk {number} of {len(all_hunks)} has {places} places in {PARENTS[name]}.py"
            )
            make = f"diff -U1 --label a/{name}.py --label b/{name}.py {PARENTS[name]}.py {name}.py"
            found.append(f"{where}, not one. Change a copy by hand; the patch below its first line is: {make}\n{hunk}")
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the three new files, each made by the command that heads its patch."""
    folder = tmp_path_factory.mktemp("copy")
    for path in [*ROOT.glob("*.py"), ROOT / "core", ROOT / "tiny", ROOT / "map", ROOT / "examples"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    lost = [said for name in PARENTS for said in misfits(name, (ROOT / f"{PARENTS[name]}.py").read_text())]
    assert not lost, "\n".join(lost)
    for name, parent in PARENTS.items():
        head = PATCHES[name].splitlines()[0].split(": ")[1]
        assert head == f"cp {parent}.py {name}.py && patch {name}.py examples/{name}.patch"
        done = subprocess.run(head, shell=True, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{head}\n{done.stdout}{done.stderr}"
    return folder


@pytest.fixture(scope="module")
def module(copy):
    """The new file of a name, as a module."""
    loaded = {}
    for name in PARENTS:
        spec = importlib.util.spec_from_file_location(name, copy / f"{name}.py")
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    yield loaded.get
    for name in PARENTS:
        del sys.modules[name]


# The patches --------------------------------------------------------------------------------------
def test_every_patch_is_here():
    assert {path.stem for path in (ROOT / "examples").iterdir()} == set(PARENTS)


@pytest.mark.parametrize("name", PARENTS)
def test_an_idea_is_under_25_lines(name):
    """Added and removed, the docstring's included."""
    changed = [
        line for hunk in hunks(PATCHES[name]) for line in hunk.splitlines() if line[0] in "+-" and line[1:].strip()
    ]
    assert 0 < len(changed) < 25


@pytest.mark.parametrize("name", PARENTS)
def test_git_applies_it_too_wherever_the_lines_moved(name, copy, tmp_path):
    """The same file as patch makes, also where the parent has grown above."""
    source = (ROOT / f"{PARENTS[name]}.py").read_text()
    for above in ("", "# a line\n" * 7):
        (tmp_path / f"{name}.py").write_text(source.replace("reward_fn = ", f"{above}reward_fn = ", 1))
        done = subprocess.run(
            ["git", "apply", str(ROOT / f"examples/{name}.patch")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{name}.py").read_text().replace(above, "") == (copy / f"{name}.py").read_text()


@pytest.mark.parametrize("name", PARENTS)
def test_a_hunk_without_its_place_is_named(name):
    """A changed line of the parent, or a second such place, is said with the hunk's number."""
    source, last = (ROOT / f"{PARENTS[name]}.py").read_text(), len(hunks(PATCHES[name]))
    line = max((line[1:] for line in hunks(PATCHES[name])[-1].splitlines(True) if line[0] != "+"), key=len)
    assert misfits(name, source) == []
    (said,) = misfits(name, source.replace(line, "    other = 1\n"))
    assert said.startswith(f"examples/{name}.patch: hunk {last} of {last} has 0 places in {PARENTS[name]}.py")
    assert len(misfits(name, source + source)) == last


def test_the_copies_read_as_the_others_do(copy):
    """Lint, format, and a docstring that names its own file in its command."""
    files = [str(copy / f"{name}.py") for name in PARENTS]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(["ruff", *command, "--config", str(ROOT / "pyproject.toml"), *files], capture_output=True)
        assert done.returncode == 0, done.stdout.decode()
    for name in PARENTS:
        text = ast.get_docstring(ast.parse((copy / f"{name}.py").read_text()))
        assert re.findall(r"^    ((?:python|torchrun) .*?)(?:   .*)?$", text, re.M) == [COMMANDS[name]]


def test_the_readmes_afternoon():
    """In at most 25 lines: the added lines of the patch, below the docstring, and the commands."""
    story = re.search(r"^\*\*An afternoon\.\*\*.*?(?=\n\n```\n)", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    patch = PATCHES["grpo_sft"].split('"""\n')[1]
    assert re.findall(r"^\+.*", story, re.M) == re.findall(r"^\+.*", patch, re.M)
    assert f"    {COMMANDS['grpo_sft']}\n" in story and len(story.splitlines()) <= 25


# The losses ---------------------------------------------------------------------------------------
FLAGS = {"kl_coef": 0.1, "entropy_coef": 0.01}


def grpo_sft_terms(c, cfg, sft: float) -> Terms:
    """GRPO on the policy's tokens; of the expert's the mean of -log p, times sft."""
    terms = oracles.policy_terms(c, cfg)
    for b, t in c.tokens(expert=True):
        terms[b, t] = (-sft * c.lp(b, t) / c.counts.expert, -sft / c.counts.expert)
    return terms


def bread_phi_terms(c, cfg) -> Terms:
    """(1 - mu) GRPO - mu / num_expert sum p (1 - p) log p, with p (1 - p) constant."""
    terms = {place: oracles.add((1 - cfg.mu, term)) for place, term in oracles.policy_terms(c, cfg).items()}
    for b, t in c.tokens(expert=True):
        p = math.exp(c.lp(b, t))
        weight = cfg.mu * p * (1 - p) / c.counts.expert
        terms[b, t] = (-weight * c.lp(b, t), -weight)
    return terms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["mixed", "extreme"])
@pytest.mark.parametrize("rows", ["mixed", "no expert", "only expert"])
def test_losses(norm, kind, rows, module):
    """Value and gradient, against the slow loops; NaN outside the rows changes nothing."""
    with oracles.float64():
        c = ragged(rows, kind)
        broken = change(c, logprobs=c.logprobs.detach().where(c.batch.completion_mask, math.nan))
        for name, rest, terms, flags in (
            ("grpo_sft", (0.3,), grpo_sft_terms, {}),
            ("grpo_sft", (0.0,), grpo_sft_terms, {}),
            ("bread_phi", (), bread_phi_terms, {"mu": 0.3}),
            ("bread_phi", (), bread_phi_terms, {"mu": 0.0}),
        ):
            cfg = settings(module(name), loss_norm=norm, **FLAGS, **flags)
            value, metrics = oracles.loss(module(name), c, cfg, *rest)
            agree(c, value, terms(c, cfg, *rest))
            assert metrics["loss"] == value and not any(metric.requires_grad for metric in metrics.values())
            again, _ = oracles.loss(module(name), broken, cfg, *rest)
            assert again == value and oracles.slope(again, broken).equal(oracles.slope(value, c))


def test_annealing_leaves_the_loss_alone(copy):
    """luffy_annealed.py has luffy.py's, to the letter."""

    def of(path) -> str:
        return path.read_text().split("# The loss -")[1].split("# Main -")[0]

    assert of(copy / "luffy_annealed.py") == of(ROOT / "luffy.py")


# The loops ----------------------------------------------------------------------------------------
def grpo_sft_page(cfg, problems, ask):
    """To GRPO's rows come the traces of the step's problems, until the coefficient is 0."""
    for step, updates in enumerate(grpo.page(cfg, problems, ask)):
        drawn, sft = kit.draw(problems, cfg.problems_per_step, step, cfg.seed), 0.0
        if step < cfg.sft_steps:
            sft = cfg.sft_coef * (cfg.sft_steps - step) / cfg.sft_steps
        for u, update in enumerate(updates):
            traces = [kit.trace(question) for question in kit.part(drawn, u, cfg.updates_per_step) if sft]
            slope = -sft / max(1, sum(len(row.ids) for row in traces))

            def coefficient(row, t, seen, slope=slope, plain=update.coefficient):
                return slope if row.expert else plain(row, t, seen)

            updates[u] = dataclasses.replace(update, rows=update.rows + traces, coefficient=coefficient)
        yield updates


def bread_phi_page(cfg, problems, ask):
    """BREAD's rows; the expert's tokens in them are imitated."""
    for updates in bread.page(cfg, problems, ask):
        for u, update in enumerate(updates):
            shown = sum(row.expert for row in update.rows)

            def coefficient(row, t, seen, shown=shown, plain=update.coefficient):
                if t >= row.expert:
                    return (1 - cfg.mu) * plain(row, t, seen)
                p = math.exp(seen.lp[t])
                return -cfg.mu * p * (1 - p) / shown

            updates[u] = dataclasses.replace(update, coefficient=coefficient)
        yield updates


def cosine(cfg, step: int) -> float:
    """UFT's share of what is shown, at a 0-based step."""
    if step + 1 > cfg.hint_steps:
        return 0.0
    return cfg.hint_low + (cfg.hint_high - cfg.hint_low) * (1 + math.cos(math.pi * (step + 1) / cfg.hint_steps)) / 2


def annealed_groups(cfg, problems, ask, step: int):
    """In place of pages.luffy's: a trace where the draw of this problem and step gives one."""
    drawn, groups, advantage = kit.draw(problems, cfg.problems_per_step, step, cfg.seed), [], {}
    sampled = ask((cfg.seed, step, 0), [(question, []) for question in drawn], cfg.group_size - cfg.expert_rows)
    for question, rows in zip(drawn, sampled, strict=True):
        random = np.random.default_rng(common.group_seed((cfg.seed, step, 1), question))
        group = rows + [kit.trace(question)] * random.binomial(cfg.expert_rows, cosine(cfg, step))
        values = luffy.advantages([row.reward for row in group], cfg.scale_by_std)
        groups.append(group if cfg.zero_variance == "keep" or any(values) else [])
        advantage |= {id(row): a for row, a in zip(groups[-1], values, strict=False)}
    return groups, advantage


SCENARIOS = {
    "grpo_sft": [
        {"sft_steps": 2},
        {"sft_coef": 0.3, "updates_per_step": 2, "loss_norm": "sequence", "zero_variance": "drop", "seed": 3},
        {"sft_coef": 0.0, "problems_per_step": 8},  # six problems: some are drawn twice
    ],
    "bread_phi": [
        {"num_episodes": 5, "mu": 0.4, "seed": 5, "updates_per_step": 2},
        {"num_episodes": 5, "trigger": "always", "loss_norm": "sequence", "zero_variance": "drop"},
        {"num_episodes": 5, "mu": 0.0},
    ],
    "luffy_annealed": [
        {"hint_high": 0.8, "hint_low": 0.3, "hint_steps": 3, "steps": 5, "problems_per_step": 6},
        {"hint_high": 1.0, "hint_low": 1.0, "zero_variance": "drop", "loss_norm": "sequence"},  # luffy.py
        {"expert_rows": 0, "problems_per_step": 8},
    ],
}
PAGES = {"grpo_sft": (grpo, grpo_sft_page), "bread_phi": (bread, bread_phi_page), "luffy_annealed": (luffy, luffy.page)}


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name in PARENTS for flags in SCENARIOS[name]])
def test_page(name, flags, module, world, monkeypatch):
    """The real main, update by update: rows, coefficient of every token, rates."""
    assert module(name)  # which puts it where import finds it
    of_parent, page = PAGES[name]
    monkeypatch.setitem(sys.modules, f"pages.{name}", of_parent)
    monkeypatch.setattr(luffy, "mixed_groups", annealed_groups)
    kit.assert_page(name, page, grpo.BASE | {"tokens_per_microbatch": 60} | flags, "mixed", world)


# The runs -----------------------------------------------------------------------------------------
def test_they_train(copy):
    """A few steps by each docstring's command: an idea is seen, and over when it should be."""
    short, found = "--steps 4 --problems_per_step 8 --group_size 4 --test_data=".split(), {}
    for name in PARENTS:
        later = {"grpo_sft": ["--sft_steps", "2"], "luffy_annealed": ["--hint_steps", "2"]}.get(name, [])
        run_script(*COMMANDS[name].split()[1:], *short, *later, cwd=copy)
        (out,) = copy.glob(f"runs/{name}-*")
        found[name] = [row for row in read_metrics(out) if "grad_norm" in row]
        assert len(found[name]) == 4 and (out / "final/model.safetensors").exists()
    run_script("plot.py", *map(str, copy.glob("runs/*")), "--out", "figure.png", cwd=copy)
    assert (copy / "figure.png").stat().st_size > 10_000
    sft, phi, annealed = found["grpo_sft"], found["bread_phi"], found["luffy_annealed"]
    assert [row["sft"] for row in sft] == [1.0, 0.5, 0.0, 0.0]
    assert ["sft_loss" in row for row in sft] == [True, True, False, False]
    assert all(row["grad_norm"] > 1e-3 for row in sft[:2])  # where no row is right the term alone has a gradient
    assert all("search_rate" in row for row in phi) and any(row["sft_loss"] > 0 for row in phi)
    assert [row["hint_share"] for row in annealed] == pytest.approx([0.5, 0.05, 0.0, 0.0])
    assert "guided_reward" in annealed[0] and not any("guided_reward" in row for row in annealed[2:])
