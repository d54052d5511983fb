"""The papers' numbers: commands are the files' own, the cost is what a hand works out."""

import importlib
import re
import sys

import pytest
from conftest import ROOT

import common
from core.config import flat
from results import published
from results.methods import METHODS

NOT_THE_METHODS = {"model", "data", "test_data", "max_prompt_tokens", "tensor_parallel", "out"}


def parse(words: list[str], monkeypatch) -> object:
    """The Config that the file's own parser makes of FILE.py and its flags."""
    monkeypatch.setattr(sys, "argv", words)
    return common.parse(importlib.import_module(words[0].removesuffix(".py")).Config)


@pytest.mark.parametrize("command", sorted({command for paper in published.PAPERS for command in paper.commands}))
def test_commands_parse(command, tmp_path, monkeypatch):
    """By the file's own parser; the second stage starts from a folder that the first one leaves."""
    (tmp_path / "runs/sft/final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = command.split()
    launcher = [i for i, word in enumerate(words) if word.endswith(".py")][0]
    assert parse(words[launcher:], monkeypatch) == published.parse(command)[1]


def test_every_method_has_a_row():
    assert {m.name for m in METHODS} | {"sft then grpo"} == {paper.name for paper in published.PAPERS}


def test_commands_are_those_of_the_docstrings(monkeypatch):
    """Where a docstring has the paper's command, or its script's, the table has the same flags."""
    seen = set()
    for m in METHODS:
        text = re.sub(r" *\\\n +", " ", (ROOT / f"{m.name}.py").read_text())
        said = rf" torchrun --nproc_per_node \d ({m.name}\.py .*?)  .*(?:paper|script|re-run|2604)"
        for command in re.findall(said, text):
            wanted = flat(parse(command.split(), monkeypatch))
            rows = [flat(published.parse(p.commands[-1])[1]) for p in published.PAPERS if p.name == m.name]
            assert any({k for k in wanted if wanted[k] != row[k]} <= NOT_THE_METHODS for row in rows), m.name
            seen.add(m.name)
    assert seen == {m.name for m in METHODS} - {"grpo", "chord"}


def test_cost_of_luffy_by_hand(monkeypatch):
    """500 steps of 128 groups: 7 rows of 2,200 tokens and a trace of 4,000, on 8 GPUs.

    Weights: 28 (2 x 3584 x 32 x 128 + 3 x 3584 x 18944) + 152064 x 3584 = 7,070,285,824.
    Trained: 500 x 128 (7 x 2200 + 4000) = 1.2416e9 tokens, 10 N each (6, recomputed, old).
    Sampled: 500 x 128 x 7 x 2200 + 51 x 500 x 2200 = 1.0417e9 in 551 calls of 8192 decode steps,
    each of 14.14 GB / 2 TB/s + 10 ms = 17.07 ms; a token reads 1100 x 57,344 bytes of cache.
    """
    for name, value in {"PEAK": 1e15, "MFU": 0.4, "BANDWIDTH": 2e12, "DECODE_STEP": 0.01, "TRACE": 4000}.items():
        monkeypatch.setattr(published, name, value)
    (luffy,) = [paper for paper in published.PAPERS if paper.name == "luffy"]
    sampling, update, tokens = published.hours(luffy.commands[0], "Qwen2.5-7B", 2200)
    assert update == pytest.approx(1.2416e9 * 10 * 7070285824 / 4e14 / 3600)  # 60.96 hours
    assert tokens == pytest.approx(1.0417e9)
    seconds = 551 * 8192 * 17.070285824e-3 + 1.0417e9 / 8 * 1100 * 57344 / 2e12
    assert sampling == pytest.approx(8 * seconds / 3600)  # 180.3 hours


@pytest.mark.parametrize(
    "name,wanted",
    [
        ("grpo", (128 * 8 * 10, 128 * 8 * 10, 1)),
        ("sft", (0, 64 * 100, 0)),
        ("dapo", (512 * 16 * 10 * 2, 512 * 16 * 10, 2)),
        ("bread", (128 * 8 * 10 * 1.75, 128 * 8 * 10, 5)),  # the plain call, then ceil(log2 10) probes
        ("relift", (128 * 8 * 10, 128 * 8 * 10 + 16 * 100, 1)),
        ("hpt", (128 * 8 * 10, 112 * 8 * 10 + 16 * 100, 1)),  # 16 of 128 groups fail
        ("chord", (32 * 8 * 10, 32 * 8 * 10 + 64 * 100, 1)),
        ("bridge", (128 * 8 * 10, 2 * 128 * 8 * 10 + 64 * 100, 1)),
    ],
)
def test_tokens_of_a_step_by_hand(name, wanted, monkeypatch):
    """At each file's defaults, rows of 10 tokens and traces of 100."""
    for constant, value in {"FAILED": 0.125, "PROBES": 0.75, "REDRAWS": 2.0}.items():
        monkeypatch.setattr(published, constant, value)
    assert published.step_tokens(name, importlib.import_module(name).Config(), 10, 100) == wanted


def test_the_page_is_what_the_program_makes():
    text = (ROOT / "results/README.md").read_text()
    assert f"<!-- published -->\n{published.page()}<!-- end of published -->\n" in text, "run: make results"
