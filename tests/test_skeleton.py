"""Files stay small, parent and child alike, arrows point down, and what is printed is true."""

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from mutations import MUTATIONS, known_bugs

import common
from results import memory, methods
from results.methods import METHODS

NAMES = [m.name for m in METHODS]
CHILDREN = [m for m in METHODS if m.parent]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("core/*.py")])
SECTIONS = ["Config", "The loss", "The weights", "The hint", "The prefix", "The micro-groups", "The buffer"]
SECTIONS += ["The batch", "The adapter", "The shadow", "The anchor", "Main"]
PHASES = ["evaluation", "rollouts", "rows", "rewards", "buffer", "anchors", "advantages", "update", "sft", "sync"]


def lines(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def function(name: str, wanted: str) -> str:
    """The source of a function of a method file."""
    text = (ROOT / f"{name}.py").read_text()
    found = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == wanted)
    return ast.get_source_segment(text, next(found))


# Sizes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_method_files_are_short(name):
    """180 lines for the parent, 310 for bridge.py, 250 for the rest; main fits on a screen."""
    assert len(lines(f"{name}.py")) <= {"grpo": 180, "bridge": 310}.get(name, 250)
    if name == "grpo":
        assert len(function(name, "main").splitlines()) <= 78 and len(function(name, "loss_fn").splitlines()) <= 34


def test_the_whole_is_short():
    """common.py is small, the methods with it are an evening, core/ is bounded."""
    count = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert count["common.py"] <= 420
    assert count["common.py"] + sum(count[f"{name}.py"] for name in NAMES) <= 3500
    assert sum(n for name, n in count.items() if name.startswith("core/")) <= 3026


@pytest.mark.parametrize("method", CHILDREN, ids=lambda m: m.name)
def test_body_diffs_are_small(method):
    """The cap of results/methods.py only ever falls."""
    changed = methods.body_diff(method)
    assert len(changed) <= method.most, "".join(changed)


def test_no_function_is_long():
    """60 lines outside a method's main."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (path.stem not in NAMES or node.name != "main"):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_every_planted_line_is_there():
    """Once each, so that tests/mutations.py can break it."""
    places = {line: (ROOT / name).read_text().count(line) for name, line, _ in MUTATIONS}
    assert {line: n for line, n in places.items() if n != 1} == {}


def test_the_table_of_known_bugs_is_true():
    """Each row has tests that exist and mutations that are planted, or says why it cannot occur."""
    for bug, tests, mutations in known_bugs():
        assert all(len(found) == 1 for found in mutations), f"{bug}: of no mutation, or of several"
        assert bool(tests) == bool(mutations) == ("cannot occur: " not in bug), bug
        for file, name in (test.split("::") for test in tests):
            assert f"\ndef {name}(" in (ROOT / f"tests/{file}.py").read_text(), f"{bug}: {file}::{name}"
    assert {int(bug.split(".")[0].split()[0]) for bug, *_ in known_bugs()} == set(range(9))


# Shared paragraphs --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_sections_and_phases_come_in_one_order(name):
    """A reader who knows one file finds the way in every other."""
    text = (ROOT / f"{name}.py").read_text()
    titles = re.findall(r"^# (.*?) -{20,}$", text, re.M)
    assert titles == [title for title in SECTIONS if title in titles] and {"Config", "The loss", "Main"} <= set(titles)
    phases = list(dict.fromkeys(re.findall(r'log\.phase\("(\w+)"\)', function(name, "main"))))
    assert phases == [phase for phase in PHASES if phase in phases]
    assert {"evaluation", "update"} | ({"sync"} if "rollouts" in phases else set()) <= set(phases)


@pytest.mark.parametrize("name", ["dapo", "bread", "relift", "bridge"])
def test_the_parents_loss_is_kept(name):
    """Where the method is in the rows or in the updates, the loss is grpo.py's to the letter."""
    assert function(name, "loss_fn") == function("grpo", "loss_fn")


def config_fields(name: str) -> dict[str, tuple[str, str]]:
    """field: (default, comment) of a method's Config."""
    source = (ROOT / f"{name}.py").read_text().split("class Config:")[1].split("\n\n\n")[0]
    found = re.findall(r"^    (\w+): [^=\n]+ = (.*?)(?:  # (.*))?$", source, re.M)
    assert len({field for field, *_ in found}) == len(found), f"{name}: a second field would silently replace the first"
    return {field: (default, comment) for field, default, comment in found}


def test_shared_fields_have_the_same_comment():
    """A flag of several online methods says the same in all of them, whatever its default."""
    seen: dict[str, set[str]] = {}
    for name in NAMES:
        for field, (_, comment) in config_fields(name).items():
            if name not in ("sft", "iw_sft"):
                seen.setdefault(field, set()).add(comment)
    for field in config_fields("grpo"):
        assert len(seen[field]) == 1, (field, seen[field])


@pytest.mark.parametrize("name", NAMES)
def test_no_flag_is_there_twice(name):
    """Flags are flat: a field of Config must not have the name of one of RunConfig."""
    module = importlib.import_module(name)
    own = {field.name for field in dataclasses.fields(module.Config)}
    assert own & {field.name for field in dataclasses.fields(common.RunConfig)} == set() and "run" in own
    assert len(own) <= 30 and {"steps", "problems_per_step", "max_completion_tokens", "lr"} <= own


# Imports ------------------------------------------------------------------------------------------
def imported(path) -> set[str]:
    """Top-level names and our own dotted modules that a file imports anywhere, lazily too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


GRAPH = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path) for path in FILES}
OURS = {name: found & set(GRAPH) for name, found in GRAPH.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_imports_common_alone(name):
    """And the standard library, numpy, torch; Config is its only class, but for BRIDGE's layer."""
    assert OURS[name] == {"common"}
    tops = {module.split(".")[0] for module in GRAPH[name]}
    assert tops <= {"collections", "common", "dataclasses", "functools", "math", "numpy", "torch", "typing"}
    classes = [n.name for n in ast.parse((ROOT / f"{name}.py").read_text()).body if isinstance(n, ast.ClassDef)]
    assert classes == (["Config", "LoraLinear"] if name == "bridge" else ["Config"])


def test_arrows_point_down():
    """method -> common -> core, without a circle; importlib counts too."""
    for name, found in OURS.items():
        if name.startswith("core."):
            assert all(other.startswith("core.") for other in found), name
    lazily = {
        name: re.findall(r'import_module\("([\w.]+)"\)', path.read_text())
        for name, path in zip(GRAPH, FILES, strict=True)
    }
    edges = {name: found | (set(lazily[name]) & set(GRAPH)) for name, found in OURS.items()}
    for start in edges:
        seen, todo = set(), [start]
        while todo:
            for other in edges[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        assert start not in seen, f"{start} imports itself in the end"


def test_core_and_common_know_no_method():
    """No name of a method, no field of one method's own Config."""
    for path in [ROOT / "common.py", *ROOT.glob("core/*.py")]:
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        assert not re.search(rf"\b({'|'.join(NAMES)})\b", code), path.name


def test_what_common_hands_on_is_used_and_complete():
    """__all__ has what method files and the README use of core/, no more and no less."""
    used = set(re.findall(r"\bcommon\.(\w*_reward)", (ROOT / "MANUAL.md").read_text()))
    for name in [*NAMES, "eval", "bench"]:
        used |= set(re.findall(r"\bcommon\.(\w+)", (ROOT / f"{name}.py").read_text()))
    tree = ast.parse((ROOT / "common.py").read_text())
    own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert used <= own | set(common.__all__), used - own - set(common.__all__)
    inside = set(
        re.findall(r"\b(\w+)\b", (ROOT / "common.py").read_text().split("# Problems -")[1].split("__all__")[0])
    )
    assert set(common.__all__) <= used | inside, set(common.__all__) - used - inside


# What is printed ----------------------------------------------------------------------------------
def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))


def commands() -> list[tuple[str, str, str]]:
    """(where, script, flags) of every python or torchrun command of pages and docstrings."""
    pages = {page: (ROOT / page).read_text() for page in ("README.md", "MANUAL.md", "WALKTHROUGH.md")}
    texts = pages | {f"{name}.py": docstring(name) for name in [*NAMES, "eval", "bench", "plot", "view"]}
    found = []
    for where, text in texts.items():
        joined = re.sub(r"\\\n\s+", "", text)
        found += [(where, *c) for c in re.findall(r"^\s*(?:python|torchrun(?: .*?)?) (\w+)\.py\b(.*)$", joined, re.M)]
    return found


def test_commands_name_scripts_and_flags_that_exist():
    """Of pages and docstrings; every method has three; none names a data file to be made."""
    found = commands()
    assert {name: sum(where == f"{name}.py" for where, *_ in found) for name in NAMES} == dict.fromkeys(NAMES, 3)
    for where, script, flags in found:
        if not (ROOT / f"{script}.py").exists() and (
            where == "WALKTHROUGH.md" or (ROOT / f"examples/{script}.patch").exists()
        ):
            continue  # the example that its reader writes, which test_walkthrough.py or test_examples.py runs
        config = importlib.import_module(script).Config
        known = {field.name for field in dataclasses.fields(config)}
        if script == "bench" and "--method" in flags:  # whose flags may follow
            known |= {field.name for field in dataclasses.fields(importlib.import_module("grpo").Config)}
        known |= {field.name for field in dataclasses.fields(common.RunConfig)} if "run" in known else set()
        for flag in re.findall(r"--(?:no-)?(\w+)", flags.split("#")[0]):
            assert flag in known, f"{where}: {script}.py has no --{flag}"
        for file in re.findall(r"(?:--data |,)(\w\S*?\.jsonl)", flags):
            assert (ROOT / file).is_file(), f"{where} names a file that is not here: {flags}"


def test_docstrings_count_no_lines_and_no_tests():
    """Such numbers go stale with the next commit; the README's are generated."""
    for name in NAMES:
        assert not re.search(r"\b\d+ (lines|tests)\b", docstring(name)), name


def test_readme_has_its_first_command_early():
    assert any("python bread.py --model map" in line for line in lines("README.md")[:30])


def test_readme_tables_are_current():
    """The tables of methods and of memory are what their scripts print."""
    text = (ROOT / "README.md").read_text()
    assert f"<!-- methods -->\n{methods.readme_table()}<!-- end of methods -->" in text, "run: make table"
    assert memory.table() in (ROOT / "MANUAL.md").read_text(), "another table than: python bench.py --what memory"


def test_every_method_has_the_line_of_its_equation():
    """Exactly one line starts as the table says, below the docstring."""
    for method in METHODS:
        assert methods.equation_line(method) > len(docstring(method.name).splitlines())


def test_make_diffs_prints_every_child():
    printed = subprocess.run(["make", "diffs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in printed.splitlines() if line.startswith("===")] == [
        f"=== diff {m.parent}.py {m.name}.py" for m in CHILDREN
    ]


def test_pages_name_files_that_exist():
    """What the pages name in backticks or links is here."""
    for page in ("README.md", "WALKTHROUGH.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md", "tiny/README.md"):
        text = (ROOT / page).read_text()
        for path in re.findall(
            r"[`(]((?:core|tests|results|tiny)/[\w./]*?|examples/(?:\w+\.patch)?|[A-Z]+\.\w+)[`)]", text
        ):
            if "mine" in path:
                continue  # that of the page's reader
            assert (ROOT / path.rstrip("/")).exists(), f"{page}: {path}"


def test_citation_and_contributing():
    """What cff 1.2.0 requires, of an author that is no person; one screen; targets of make."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited) and cited["authors"] == [
        {"name": "nanoRFT contributors"}
    ]
    assert cited["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) <= 40
    assert set(re.findall(r"`make (\w+)`", text)) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def test_other_numbers_of_the_readme(capsys):
    """What the two published bugs do to plain SFT."""
    text = " ".join((ROOT / "MANUAL.md").read_text().split())
    importlib.import_module("results.accumulation_bugs").main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (eight,) = [row for row in rows if row[:1] == ["8"]]
    correct, first_last = float(eight[1]), float(eight[3])
    unseen = {row[0]: float(row[1]) for row in rows if len(row) == 2}
    assert f"gradient norm is {first_last:.2f} instead of {correct:.2f}" in text
    assert f"on unseen rows {unseen['first_last']:.2f} instead of {unseen['correct']:.2f}" in text


def test_what_a_passed_test_wrote_goes(tmp_path):
    """By the project's settings; a failed one's stays. Else a suite's checkpoints fill a disk."""
    (tmp_path / "test_two.py").write_text(
        "def test_one(tmp_path):\n    (tmp_path / 'passed').touch()\n\n\n"
        "def test_two(tmp_path):\n    (tmp_path / 'failed').touch()\n    assert False\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "test_two.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert "1 failed, 1 passed" in done.stdout
    assert [path.name for path in tmp_path.rglob("*ed") if path.is_file()] == ["failed"]
