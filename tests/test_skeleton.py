"""Parent and child have the same paragraphs in the same order, files stay small, importing does nothing, the README is true."""

import ast
import difflib
import re

import pytest
from conftest import ROOT

METHODS = {  # parent, cap on lines, on body diff
    "grpo": (None, 243, 0),
    "bread": ("grpo", 313, 75),
    "luffy": ("grpo", 268, 50),
    "srft": ("luffy", 318, 60),
    "relift": ("grpo", 318, 95),
    "prefix_rft": ("grpo", 323, 110),
    "uft": ("grpo", 308, 90),
    "bridge": ("grpo", 393, 225),
    "chord": ("grpo", 278, 65),
    "hpt": ("grpo", 268, 70),
    "trapo": ("grpo", 318, 115),
    "sft": ("grpo", 188, 160),
    "iw_sft": ("sft", 288, 130),
}
ORDER = [
    "Config",
    "The loss",
    "The weights",
    "The hint",
    "The prefix",
    "The micro-groups",
    "The buffer",
    "The adapter",
    "The anchor",
]
ORDER += ["Main"]
LOOP = ["Evaluate and save", "Problems", "Hints", "Prefixes", "Rollouts", "Rows", "Rewards", "Buffer", "Anchors", "Advantages"]
LOOP += ["Gate", "Weights", "Update", "SFT step", "Sync and log"]


def body(name: str) -> list[str]:
    text = (ROOT / f"{name}.py").read_text()
    return text[text.index('"""\n', 3) + 4 :].splitlines()


@pytest.mark.parametrize("name", METHODS)
def test_sections_and_loop_comments(name):
    lines = body(name)
    titles = [lines[i + 1][2:] for i, line in enumerate(lines[:-2]) if line.startswith("# ---") and lines[i + 2] == line]
    assert titles == [title for title in ORDER if title in titles] and {"Config", "The loss", "Main"} <= set(titles)
    comments = [re.match(r"        # ([A-Z][a-z ]+)", line) for line in lines]
    found = [c.group(1).strip() for c in comments if c]
    assert found == [paragraph for paragraph in LOOP if paragraph in found] and {"Problems", "Update", "Sync and log"} <= set(found)


@pytest.mark.parametrize("name", METHODS)
def test_sizes(name):
    parent, lines, changed = METHODS[name]
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= lines
    if parent:
        diff = [line for line in difflib.ndiff(body(parent), body(name)) if line[:2] in ("+ ", "- ")]
        assert len(diff) <= changed, "".join(diff)


def function(name: str, wanted: str) -> str:
    text = (ROOT / f"{name}.py").read_text()
    return next(
        ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == wanted
    )


@pytest.mark.parametrize("name", ["bread", "relift", "bridge"])
def test_the_parents_loss_is_kept(name):
    """Where the method is in the rows or in the updates, the loss is grpo.py's to the letter."""
    assert function(name, "loss_fn") == function("grpo", "loss_fn")


def test_shared_fields_are_alike():
    """A flag of several methods has the same comment in all of them, apart from the defaults and what a method adds."""
    fields = {}
    for name in METHODS:
        for line in (ROOT / f"{name}.py").read_text().splitlines():
            if found := re.match(r"    (\w+): [^=]+ = [^#]+# (.*)", line):
                fields.setdefault(found[1], {}).setdefault(found[2], []).append(name)
    shared = (
        "model data test_data out resume seed max_prompt_tokens temperature template columns loss_norm clip_low clip_high tis_cap"
    )
    shared += " kl_coef kl_estimator entropy_coef warmup_steps weight_decay grad_clip updates_per_step tokens_per_microbatch"
    shared += " checkpoint_activations eval_samples keep scale_by_std zero_variance"
    shared += " sampler_memory tensor_parallel rope_theta max_positions"
    for field in shared.split():
        online = {comment for comment, names in fields[field].items() if set(names) - {"sft", "iw_sft"}}
        assert len(online) == 1, (field, fields[field])


@pytest.mark.parametrize("name", METHODS)
def test_no_field_is_there_twice(name):
    """A second field of the same name would silently replace the first."""
    fields = re.findall(
        r"^    (\w+): [^=\n]+ = ", (ROOT / f"{name}.py").read_text().split("class Config:")[1].split("# ---")[0], re.M
    )
    assert len(fields) == len(set(fields)) and {"model", "seed", "lr", "wandb"} <= set(fields)


@pytest.mark.parametrize("name", METHODS)
def test_methods_import_no_method_and_only_config_is_a_class(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= {"math", "collections.abc", "dataclasses", "typing", "numpy", "torch", "torch.nn.functional", "common"}
    assert [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)] in (["Config"], ["Config", "LoraLinear"])


def test_common_knows_no_method():
    text = (ROOT / "common.py").read_text()
    assert "import grpo" not in text and "cfg.method" not in text and "\nimport bread" not in text


def test_readme_commands_parse():
    """Every python or torchrun command of the README and of the docstrings names a script that exists and flags that it has."""
    texts = [(ROOT / "README.md").read_text(), *((ROOT / f"{name}.py").read_text().split('"""')[1] for name in METHODS)]
    commands = [c for text in texts for c in re.findall(r"^\s*(?:python|torchrun(?: .*?)?) (\w+)\.py (.*)$", text, re.M)]
    assert len(commands) >= 4 + 3 * len(METHODS)
    for script, flags in commands:
        source = (ROOT / f"{script}.py").read_text()
        for flag in re.findall(r"--(?:no-)?(\w+)", flags.split("#")[0]):
            assert re.search(rf"^    {flag}:", source, re.M), f"{script}.py has no --{flag}"


def test_readme_has_its_first_command_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("python bread.py --model tiny" in line for line in lines[:30])
