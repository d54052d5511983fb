"""A reward of one's own, in loading, training and eval.py; what solved is; what breaks."""

import dataclasses
import json
import shutil
import time

import pytest
from conftest import ROOT, problem, read_metrics, run_script, train

import common
from core.rewards import VERIFIER, Grade, Grader, grade, load_grader

FUNCTIONS = """
import time

def length(problem, completion):
    return len(completion) / 100

def row(problem, completion):
    return float(problem.row["wanted"] in completion)

def parts(problem, completion):
    return {"digits": (0.5, sum(c.isdigit() for c in completion)), "boxed": (-2.0, "boxed" in completion)}

def tenths(problem, completion):
    return 0.7 + 0.2 + 0.1 if completion == "2" else 0.0

def slow(problem, completion):
    time.sleep(60 * (completion == "hang"))
    return 1

def broken(problem, completion):
    return 1 / len(completion)

def nothing(problem, completion):
    pass

def short(problem, completion):
    from common import math_reward
    return {"right": (1.0, math_reward(problem, completion)), "short": (0.5, len(completion) < 20)}

def crash(problem, completion):
    import os
    os._exit(3)
"""


@pytest.fixture
def own(tmp_path):
    """The grader of a function of a file."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)

    def load(name: str, **changed: float) -> Grader:
        found = load_grader(common.RunConfig(reward=f"{tmp_path / 'mine.py'}:{name}"), common.math_reward)
        return dataclasses.replace(found, **changed)

    return load


def graded(grader: Grader, *texts: str, **row: str) -> tuple[list[Grade], int]:
    question = dataclasses.replace(problem("q"), grader=grader, row=row)
    return grade([question] * len(texts), list(texts))


def test_a_number_or_parts(own):
    """It sees the row and the whole text; a reward is the weighted sum of its parts."""
    assert graded(own("length"), "a" * 50, "") == ([Grade(0.5), Grade(0.0)], 0)
    assert graded(own("row"), "the cat", "a dog", wanted="cat") == ([Grade(1.0), Grade(0.0)], 0)
    wanted = [Grade(1.0, {"digits": 2, "boxed": 0}), Grade(-1.5, {"digits": 1, "boxed": 1})]
    assert graded(own("parts"), "12", "boxed 1") == (wanted, 0)


def test_the_verifier_can_be_a_part_of_it(own):
    """In a worker process it needs no worker of its own."""
    grader = own("short")
    question = dataclasses.replace(problem("q", answer="1/2"), grader=grader)
    found, errors = grade([question] * 3, ["\\boxed{\\frac{1}{2}}", "\\boxed{0.5}" + " " * 20, "\\boxed{2}"])
    assert [g.reward for g in found] == [1.5, 1.0, 0.5] and errors == 0


def test_the_default_is_the_verifier():
    """Of what follows a thought."""
    assert load_grader(common.RunConfig(), common.math_reward) == VERIFIER
    right, wrong, thinking = "\\boxed{1}", "\\boxed{2}", "\\boxed{1}</think>\\boxed{2}"
    assert graded(VERIFIER, right, wrong) == ([Grade(1.0), Grade(0.0)], 0)
    thinks = dataclasses.replace(problem("q"), thinks=True)
    assert grade([thinks], [thinking])[0] == [Grade(0.0)] and common.math_reward(thinks, thinking) == 0
    assert common.math_reward(problem("q"), right) == 1


KNIGHTS = "Ann is a knight\nBo is a knave"
NUMBERS = {"target": 5, "nums": [8, 2, 1]}


@pytest.mark.parametrize(
    ("name", "gold", "right", "wrong"),
    [
        (
            "countdown_reward",
            NUMBERS,
            ["\\boxed{8/2+1}", "\\boxed{8/2+1} \\boxed{\\frac82+1}"],
            ["\\boxed{8+2+1}", "8/2+1"],
        ),
        (
            "words_reward",
            "Paris",
            ["\\boxed{\\text{PARIS}}", "\\boxed{paris} \\boxed{Paris}"],
            ["Paris", "\\boxed{sirap}"],
        ),
        (
            "knights_reward",
            KNIGHTS,
            ["\\boxed{Knaves: Bo; Knights: Ann}"],
            ["\\boxed{Ann is a knight}", "\\boxed{Ann}"],
        ),
        ("words_reward", "Ann", ["\\boxed{ann}"], ["\\boxed{nan}", "\\boxed{Ann} \\boxed{Bo}"]),
        ("words_reward", "red and blue", ["\\boxed{blue, red}", "\\boxed{red}, \\boxed{blue}"], ["\\boxed{red}"]),
        (
            "words_reward",
            KNIGHTS,
            ["\\boxed{Knaves: Bo; Knights: Ann}", "\\boxed{Ann: knight}, \\boxed{Bo: knave}"],
            ["\\boxed{Ann}"],
        ),
        ("math_reward", "1/2", ["\\boxed{0.5}"], ["\\boxed{2}"]),
    ],
)
def test_rewards_by_name(name, gold, right, wrong):
    """By its flag, as a method file's function and alone; the default is the one of the gold."""
    function = getattr(common, name)
    by_flag = load_grader(common.RunConfig(reward=name), common.math_reward)
    by_file = load_grader(common.RunConfig(reward=f"{ROOT}/core/rewards.py:{name}"), common.math_reward)
    assert by_flag == by_file == load_grader(common.RunConfig(), function)
    assert (by_flag == VERIFIER) == (name == "math_reward")
    for grader in (by_flag, VERIFIER):
        question = dataclasses.replace(problem("q", answer=gold), grader=grader)
        texts = [*right, *wrong]
        found, errors = grade([question] * len(texts), texts)
        assert [g.reward for g in found] == [1.0] * len(right) + [0.0] * len(wrong) and not errors
        assert [function(question, text) for text in texts] == [g.reward for g in found]


def test_named_words_are_no_mathematics():
    """A word that looks like a product, and a value in another notation."""
    for gold, said in (("xy", "yx"), ("0.5", "\\frac12"), ("abc", "a*b*c")):
        question, texts = problem("q", answer=gold), [f"\\boxed{{{said}}}", f"\\boxed{{{gold}}}"]
        for name, wanted in (("math_reward", [1, 1]), ("words_reward", [0, 1])):
            assert [getattr(common, name)(question, text) for text in texts] == wanted
            named = dataclasses.replace(question, grader=load_grader(common.RunConfig(reward=name), common.math_reward))
            assert [found.reward for found in grade([named] * 2, texts)[0]] == wanted


@pytest.mark.parametrize("name, text", [("slow", "hang"), ("broken", ""), ("nothing", "x"), ("crash", "x")])
def test_what_breaks_earns_nothing_and_is_counted(name, text, own, capsys):
    """And the next one works."""
    since = time.time()
    assert graded(own(name, seconds=1.0), text) == ([Grade(0.0)], 1)
    assert time.time() - since < 20 and "reward error" in capsys.readouterr().out
    assert graded(own("length"), "a" * 50) == ([Grade(0.5)], 0)


@pytest.mark.parametrize("source", ["mine.py", "none.py:f", "{}:missing", "{}.py:length", "{}"])
def test_what_cannot_be_loaded_is_a_sentence(source, own, tmp_path):
    own("length")
    with pytest.raises(SystemExit, match="--reward"):
        load_grader(common.RunConfig(reward=source.format(tmp_path / "mine.py")), common.math_reward)


def test_a_function_inside_a_function_is_a_sentence():
    with pytest.raises(SystemExit, match="top of a file"):
        load_grader(common.RunConfig(), lambda problem, completion: 1.0)


# In a run -----------------------------------------------------------------------------------------
SMALL = ["--model", "tiny", "--steps", "2", "--problems_per_step", "2", "--group_size", "4", "--eval_samples", "1"]


def rows(path, n=6, **extra):
    """The first problems of tiny in a file of their own."""
    found = [json.loads(line) for line in (ROOT / "tiny/train.jsonl").read_text().splitlines()[:n]]
    path.write_text("".join(json.dumps(row | extra) + "\n" for row in found))
    return str(path)


def test_a_run_with_ones_own_reward(own, tmp_path):
    """Reward, parts, test accuracy and test reward are the function's, eval.py of final/ too."""
    source, data, out = own("parts").source, rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    train("grpo", *SMALL, "--data", data, "--test_data", data, "--reward", source, "--solved", 2, "--out", out)
    lines = read_metrics(out)
    for line in lines[:2]:
        assert line["reward"] == pytest.approx(0.5 * line["reward_digits"] - 2 * line["reward_boxed"], abs=1e-6)
    assert lines[0]["reward_digits"] > 1 and lines[-1]["test_reward"] != lines[-1]["test_accuracy"]
    assert 0 <= lines[-1]["test_accuracy"] <= 1
    assert (out / "mine.py").read_text() == FUNCTIONS
    assert json.loads((out / "config.json").read_text())["flags"]["reward"] == source
    run_script("eval.py", "--model", str(out / "final"), "--data", data, "--samples", "2", "--max_tokens", "20")
    report = json.loads((out / "final/eval/report.json").read_text())["rows"]
    assert report["protocol"]["reward"].startswith("parts ") and report["protocol"]["solved"] == 2
    samples = [json.loads(line) for line in (out / "final/eval/rows.samples.jsonl").read_text().splitlines()]
    earned = [0.5 * s["reward_digits"] - 2 * s["reward_boxed"] for s in samples]
    assert [s["reward"] for s in samples] == earned and [s["solved"] for s in samples] == [e >= 2 for e in earned]
    assert report["result"]["mean_reward"] == pytest.approx(sum(earned) / len(earned))
    assert report["result"]["avg@2"] == pytest.approx(sum(e >= 2 for e in earned) / len(earned))


def test_a_method_file_with_ones_own_reward(tmp_path):
    """A copy of grpo.py names its function once; no flag."""
    text = (ROOT / "grpo.py").read_text()
    line = next(line for line in text.splitlines() if line.startswith("reward_fn"))
    mine = "def reward_fn(problem, completion):\n    return float(len(completion))"
    for name in ("common.py", "core", "tiny"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine.py").write_text(text.replace(line, mine))
    data = rows(tmp_path / "rows.jsonl")
    run_script("mine.py", *SMALL, "--data", data, "--test_data", data, "--out", "run", cwd=tmp_path)
    line = read_metrics(tmp_path / "run")[0]
    assert line["reward"] > 3 and line["test_reward"] > 3 and line["test_accuracy"] == 1


def test_rows_without_an_answer(own, tmp_path):
    """A reward of one's own needs none; it says which traces are right, and they get no box."""
    source, tokenizer = own("row").source, common.load_tokenizer("tiny")
    grader = load_grader(common.RunConfig(reward=source), common.math_reward)
    path = tmp_path / "rows.jsonl"
    wanted = [{"problem": "1+1", "solution": f"{i}", "wanted": "1"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    found = common.load_problems(str(path), tokenizer, require_expert=True, grader=grader)
    assert [tokenizer.decode(p.expert_ids[:-1]) for p in found] == ["1", "10", "11"]
    assert all(p.answer == "" and p.row["wanted"] == "1" and p.grader == grader for p in found)
    with pytest.raises(SystemExit, match="no answer"):
        common.load_problems(str(path), tokenizer, require_expert=True)


def test_a_trace_that_is_solved_but_for_rounding_is_kept(own, tmp_path):
    """0.7 + 0.2 + 0.1 is a hair below 1; a rollout of that reward is solved, so is the trace."""
    tokenizer, path = common.load_tokenizer("tiny"), tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "1+1", "solution": "2"}) + "\n")
    assert len(common.load_problems(str(path), tokenizer, require_expert=True, grader=own("tenths"))) == 1


def test_a_named_reward_reads_its_golds(tmp_path, capsys):
    """Others are counted drops; traces get their box and are checked, as by default."""
    tokenizer, path = common.load_tokenizer("tiny"), tmp_path / "rows.jsonl"
    asked = {"problem": "1+1", "meta": NUMBERS}
    found = [asked | {"solution": "8/2+1", "answer": "8/2+1"}, asked | {"solution": "8-2", "answer": "8-2"}]
    found += [{"problem": "1+1", "answer": "2", "solution": "2"}, {"problem": "Who?", "answer": KNIGHTS}]
    found[-1]["solution"] = f"So it is.\n{KNIGHTS}"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    for name, kept in (("countdown_reward", 1), ("knights_reward", 1), ("words_reward", 2), ("math_reward", 3)):
        grader = load_grader(common.RunConfig(reward=name), common.math_reward)
        problems = common.load_problems(str(path), tokenizer, require_expert=True, grader=grader)
        said = capsys.readouterr().out
        assert len(problems) == kept and all("boxed" in tokenizer.decode(p.expert_ids) for p in problems)
        assert ("answer that the verifier cannot read" in said) == (name != "math_reward")


def test_a_run_with_a_named_reward(tmp_path):
    """It stands in config and settings, so that eval.py of the trained model takes it too."""
    data, out = rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    train("grpo", *SMALL, "--data", data, "--test_data", data, "--reward", "words_reward", "--out", out)
    assert json.loads((out / "config.json").read_text())["flags"]["reward"] == "words_reward"
    run_script("eval.py", "--model", str(out / "final"), "--data", data, "--samples", "1", "--max_tokens", "5")
    assert json.loads((out / "final/eval/report.json").read_text())["rows"]["protocol"]["reward"] == "words_reward"


def test_a_function_that_never_works_is_a_sentence(own, tmp_path, capsys):
    """Before anything is sampled."""
    tokenizer = common.load_tokenizer("tiny")
    with pytest.raises(SystemExit, match="mine.py:broken fails on problem .* and an empty completion"):
        common.load_problems(rows(tmp_path / "rows.jsonl"), tokenizer, grader=own("broken"))
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_the_readmes_functions(tmp_path):
    """The block of the section, as printed, in a run."""
    code = (ROOT / "README.md").read_text().split("## Your reward")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "my_rewards.py").write_text(code)
    flags = [*SMALL, "--test_data", "", "--out", tmp_path / "run", "--reward", f"{tmp_path}/my_rewards.py:two_parts"]
    train("grpo", *flags)
    line = read_metrics(tmp_path / "run")[0]
    assert (
        line["reward"] == pytest.approx(line["reward_right"] + 0.1 * line["reward_steps"]) and line["reward_steps"] > 0
    )
    short = dataclasses.replace(
        load_grader(common.RunConfig(reward=f"{tmp_path}/my_rewards.py:short"), common.math_reward)
    )
    assert [found.reward for found in graded(short, "\\boxed{1}", "\\boxed{1}" + " " * 400)[0]] == [1.0, 0.0]


# Solved -------------------------------------------------------------------------------------------
def test_solved_is_a_threshold():
    """A reward in parts may add up to just under it."""
    question = dataclasses.replace(problem("q"), grader=Grader(solved=0.8))
    rewards = [0.1 + 0.7, 0.8, 0.79, 1.0, -1.0]
    assert [common.Rollout(question, [1], reward=r).solved for r in rewards] == [True, True, False, True, False]
    assert not common.Rollout(problem("q"), [1], reward=0.99).solved


def test_partial_credit_switches_nothing_off(own, tmp_path):
    """With 0.1 for anything BREAD still searches, ReLIFT still buffers, HPT still imitates."""
    tenth = 'def tenth(problem, completion):\n    return 1.0 if completion == problem.row["solution"] else 0.1\n'
    (tmp_path / "tenth.py").write_text(tenth)
    data = rows(tmp_path / "rows.jsonl")
    flags = [*SMALL, "--data", data, "--test_data", "", "--reward", f"{tmp_path}/tenth.py:tenth", "--solved"]
    for method, key in (("bread", "search_rate"), ("relift", "buffer"), ("hpt", "gated")):
        for solved in (0.5, 0.1):
            out = tmp_path / f"{method}{solved}"
            train(method, *flags, solved, "--out", out)
            assert (read_metrics(out)[0][key] > 0) == (solved == 0.5), method
            shutil.rmtree(out)
