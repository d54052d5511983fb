"""Parent and child have the same paragraphs in the same order, files stay small, importing does nothing, the README is true."""

import ast
import difflib
import re

import pytest
from conftest import ROOT

METHODS = {"grpo": (None, 230, 0), "bread": ("grpo", 300, 75), "sft": ("grpo", 180, 150)}  # parent, cap on lines, on body diff
ORDER = ["Config", "The loss", "The anchor", "Main"]
LOOP = ["Evaluate and save", "Problems", "Rollouts", "Rows", "Rewards", "Anchors", "Advantages", "Update", "Sync and log"]


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


def test_bread_keeps_the_parents_functions():
    """The loss of bread.py is grpo.py's to the letter: the method is where the rows come from."""
    source = []
    for name in ("grpo", "bread"):
        text = (ROOT / f"{name}.py").read_text()
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "loss_fn"]
        source.append(ast.get_source_segment(text, functions[0]))
    assert source[0] == source[1]


@pytest.mark.parametrize("name", METHODS)
def test_methods_import_no_method_and_only_config_is_a_class(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= {"math", "collections.abc", "dataclasses", "typing", "torch", "common"}
    assert [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)] == ["Config"]


def test_common_knows_no_method():
    text = (ROOT / "common.py").read_text()
    assert "import grpo" not in text and "cfg.method" not in text and "\nimport bread" not in text


def test_readme_commands_parse():
    """Every python or torchrun command of the README names a script that exists and flags that it has."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^\s*(?:python|torchrun .*?) (\w+)\.py (.*)$", readme, re.M)
    assert len(commands) >= 4
    for script, flags in commands:
        source = (ROOT / f"{script}.py").read_text()
        for flag in re.findall(r"--(\w+)", flags.split("#")[0]):
            assert re.search(rf"^    {flag.removeprefix('no-')}:", source, re.M), f"{script}.py has no --{flag}"


def test_readme_has_its_first_command_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("python bread.py --model tiny" in line for line in lines[:30])
