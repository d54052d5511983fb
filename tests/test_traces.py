"""Traces: sampled from a teacher by eval.py, trained on, and absent where --traces optional."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT, easy_problems, read_metrics, run_script, train
from safetensors.torch import load_file
from test_asking import OPENS, chat_tokenizer
from test_methods import ALIKE, SFT, small

import common
import eval as evaluation
from results.methods import METHODS


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# From a teacher -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(folder, what was printed): traces of the bundled model, a hard problem at the end."""
    folder = tmp_path_factory.mktemp("teacher")
    easy_problems(folder / "all.jsonl")
    hard = {"id": "hard", "problem": "7*7*3-3*3*3*7", "answer": "974262", "solution": "\\boxed{974262}", "level": 5}
    write(folder / "all.jsonl", [*rows_of(folder / "all.jsonl"), hard])
    flags = ["--model", "tiny", "--data", folder / "all.jsonl", "--samples", 4, "--temperature", 1.0, "--max_tokens"]
    flags += [24, "--out", folder / "out", "--traces", folder / "made/traces.jsonl"]
    return folder, run_script("eval.py", *map(str, flags)).stdout


def test_what_is_kept_and_counted(sampled):
    """Of each problem the shortest right and finished sample, in the problem's own row."""
    folder, printed = sampled
    asked, made = rows_of(folder / "all.jsonl"), rows_of(folder / "made/traces.jsonl")
    samples, counts, traced = rows_of(folder / "out/all.samples.jsonl"), Counter(), 0
    assert [row["id"] for row in made] == [row["id"] for row in asked] and len(samples) == 100
    for row, before in zip(made, asked, strict=True):
        group = [s for s in samples if s["id"] == row["id"]]
        right = [s for s in group if s["reward"] == 1 and s["finished"]]
        shortest = min((s["tokens"] for s in right), default=None)
        assert row.get("solution") in ([s["text"] for s in right if s["tokens"] == shortest] or [None])
        assert {**row, "solution": 0} == {**before, "solution": 0}, "the rest is as it was"
        traced += bool(right)
        distinct = len({s["text"] for s in right})
        counts.update(cut=sum(not s["finished"] for s in group), duplicate=len(right) - distinct)
        counts.update(wrong=sum(s["finished"] and s["reward"] == 0 for s in group), longer=max(0, distinct - 1))
    assert 0 < traced < 25 and "solution" not in made[-1] and made[-1]["level"] == 5 and counts["cut"]
    wanted = f"25 problems, {traced} with a trace, {25 - traced} without; samples: {traced} kept, "
    wanted += ", ".join(f"{counts[fate]} {fate}" for fate in ("wrong", "cut", "duplicate", "longer"))
    assert f"wrote {folder}/made/traces.jsonl: {wanted}, 0 with a control token inside\n" in printed


def test_all_of_them_without_sampling_again(sampled, tmp_path):
    """--keep all on the same samples: a row for each text; the loader gives each an id."""
    folder, _ = sampled
    before = (folder / "out/all.samples.jsonl").read_text()
    flags = ["--model", "tiny", "--data", folder / "all.jsonl", "--samples", 4, "--temperature", 1.0, "--max_tokens"]
    flags += [24, "--out", folder / "out", "--keep", "all", "--traces", tmp_path / "all.jsonl"]
    printed = run_script("eval.py", *map(str, flags)).stdout
    assert "25 of 25 problems are done already" in printed and ", 0 longer," in printed
    assert (folder / "out/all.samples.jsonl").read_text() == before
    made = [(row["id"], row["solution"]) for row in rows_of(tmp_path / "all.jsonl") if "solution" in row]
    right = {(s["id"], s["text"]) for s in rows_of(folder / "out/all.samples.jsonl") if s["solved"] and s["finished"]}
    assert set(made) == right and len(made) == len(right)


@pytest.mark.parametrize(("script", "extra"), [("sft", []), ("luffy", ["--group_size", "4"])])
def test_traces_train(script, extra, sampled, tmp_path):
    """Every trace is right again at load, and has as many tokens as the teacher sampled."""
    folder, _ = sampled
    traces = folder / "made/traces.jsonl"
    flags = [*small(traces, tmp_path / "run"), *extra, "--steps", 1]
    printed = run_script(f"{script}.py", *map(str, flags)).stdout
    left = sum("solution" in row for row in rows_of(traces))
    assert f"{left} of 25 rows kept" in printed and f"; {25 - left} dropped: no solution (first" in printed
    assert "rejects" not in printed and "had no" not in printed
    problems = common.load_problems(
        str(traces), common.load_tokenizer("tiny"), "plain", require_expert=True, request=""
    )
    for problem in problems:
        same = [s for s in rows_of(folder / "out/all.samples.jsonl") if s["id"] == problem.id and s["solved"]]
        assert len(problem.expert_ids) == min(s["tokens"] for s in same)


@pytest.mark.parametrize("template", ["plain", "think"])
def test_the_tokens_are_those_that_were_sampled(template, tmp_path, world, tokenizer, monkeypatch):
    """EOS included, and where the prompt opens the thought or the completion does."""
    row = {"question": "1+1?", "answer": "so\n#### 2", "reward_model": {"ground_truth": "x"}, "system": "Be brief."}
    options = {"require_expert": True, "template": template, "max_prompt_tokens": 900}
    (problem,) = common.load_problems(
        str(write(tmp_path / "a.jsonl", [row])), tokenizer, template=template, max_prompt_tokens=900, keep_rows=True
    )
    texts = ["\nhm\n</think>\n\n \\boxed{2} ", "\n\nhm</think>\\boxed{2}"]
    texts = texts if template == "think" else ["<think>\nhm\n</think>\n\\boxed{2}", " hm \\boxed{2}\n"]
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    group = [common.Rollout(problem, i, text=text, finished=True) for i, text in zip(ids, texts, strict=True)]
    cfg = evaluation.Config(keep="all")
    rows, _ = evaluation.make_traces(cfg, [problem], {"1": evaluation.grade([group], "zero")[0]}, tokenizer)
    assert all(made["question"] == "1+1?" and made["answer"] == "2" and made["system"] == "Be brief." for made in rows)
    made = common.load_problems(str(write(tmp_path / "b.jsonl", rows)), tokenizer, **options)
    assert sorted(p.expert_ids for p in made) == sorted(ids)
    assert {tuple(p.prompt_ids) for p in made} == {tuple(problem.prompt_ids)}
    plain = common.load_problems(str(tmp_path / "b.jsonl"), tokenizer, template="qwen_math", require_expert=True)
    assert len(plain) == 2, "another template takes them too: the thought is opened in the trace"


SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
OLD = {"role": "assistant", "content": "I say \\boxed{2}"}
OWN = {  # a row, and the columns with which it is asked
    "messages": ({"messages": [*SAID, OLD], "answer": 2, "source": "x"}, ""),
    "chat completion": ({"prompt": SAID, "completion": [OLD], "answer": "2"}, ""),
    "LUFFY": ({"prompt": SAID, "target": [OLD], "reward_model": {"ground_truth": "2"}}, ""),
    "OpenR1": ({"problem": "1+1?", "generations": ["\\boxed{2}"], "correctness_llama": [True], "answer": "2"}, ""),
    "s1K": ({"question": "1+1?", "solution": "\\boxed{2}", "thinking_trajectories": ["a"], "attempt": "2"}, ""),
    "Alpaca": ({"instruction": "Add.", "input": "1+1?", "output": "\\boxed{2}", "answer": "2"}, ""),
    "MATH": ({"problem": "1+1?", "solution": "It is \\boxed{2}"}, ""),
    "steps": ({"problem": "1+1?", "solution": "a\nb", "answer": "2", "steps": ["a", "b"], "score": 0.5}, ""),
    "own columns": ({"q": "1+1?", "a": "2", "e": "\\boxed{2}", "problem": "no"}, "problem=q answer=a expert=e"),
    "Countdown": ({"problem": "Make 3.", "target": 3, "nums": [1, 2]}, ""),
}


@pytest.mark.parametrize("found", [True, False], ids=["traced", "not"])
@pytest.mark.parametrize("name", OWN)
def test_rows_of_every_schema(name, found, tmp_path):
    """The same question and gold, the teacher's trace or none; the old trace is gone."""
    row, columns = OWN[name]
    tokenizer = chat_tokenizer()
    options = {"columns": columns, "keep_rows": True}
    (problem,) = common.load_problems(str(write(tmp_path / "a.jsonl", [row])), tokenizer, **options)
    text = "new: \\boxed{1+2}" if name == "Countdown" else "new: \\boxed{2}"
    sample = {"text": text, "finished": True, "solved": found, "tokens": 3}
    ((made,), _) = evaluation.make_traces(evaluation.Config(columns=columns), [problem], {"1": [sample]}, tokenizer)
    path = str(write(tmp_path / "b.jsonl", [made, {"id": "2", "problem": "1?", "answer": "2", "solution": text}]))
    if name == "Countdown":
        path = str(write(tmp_path / "b.jsonl", [made, {"id": "2", **row, "solution": text}]))
    again, _ = common.load_problems(path, tokenizer, require_expert=True, optional=True)
    assert (again.prompt_ids, again.answer, again.text) == (problem.prompt_ids, problem.answer, problem.text)
    assert tokenizer.decode(again.expert_ids) == (text + "<|im_end|>" if found else "")
    assert {k: v for k, v in row.items() if k in ("source", "reward_model")}.items() <= made.items()


def test_a_sample_that_training_would_refuse_is_not_kept(tmp_path):
    """One with a control token inside; the shortest of the other right ones is taken."""
    tokenizer = chat_tokenizer(OPENS)
    path = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "2"}])
    (problem,) = common.load_problems(str(path), tokenizer, keep_rows=True)
    texts = ["a</think><|im_start|>\\boxed{2}", "b</think>\\boxed{2}", "c</think>\\boxed{2}", "b</think>\\boxed{2}"]
    group = [{"text": text, "finished": True, "solved": True, "tokens": i} for i, text in enumerate(texts)]
    rows, counts = evaluation.make_traces(evaluation.Config(), [problem], {"1": group[::-1]}, tokenizer)
    assert [row["solution"] for row in rows] == ["<think>\nb</think>\\boxed{2}"]
    found = ("with a control token inside", "kept", "longer", "duplicate", "with a trace")
    assert counts == dict.fromkeys(found, 1)


def test_a_real_kill(tmp_path):
    """kill -9 while the second part is sampled: what is on disk stays, and is not sampled again."""
    rows = [{"id": str(i), "problem": "1+2*3", "answer": "36"} for i in range(192)]
    write(tmp_path / "many.jsonl", rows)
    flags = ["eval.py", "--model", "tiny", "--data", str(tmp_path / "many.jsonl"), "--samples", "2"]
    flags += ["--max_tokens", "40", "--temperature", "1.0"]
    mine = [*flags, "--out", str(tmp_path / "out"), "--traces", str(tmp_path / "traces.jsonl")]
    process = warm.Popen([sys.executable, *mine], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    samples, limit = tmp_path / "out/many.samples.jsonl", time.time() + 100
    while not (samples.exists() and samples.stat().st_size) and time.time() < limit:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = samples.read_text()
    printed = run_script(*mine).stdout
    assert before and (f"{before.count(chr(10)) // 2} of 192 problems are done already" in printed)
    after = samples.read_text()
    assert after.startswith(before) and Counter(s["id"] for s in rows_of(samples)) == {str(i): 2 for i in range(192)}
    run_script(*flags, "--out", str(tmp_path / "other"), "--traces", str(tmp_path / "straight.jsonl"))
    assert (tmp_path / "traces.jsonl").read_text() == (tmp_path / "straight.jsonl").read_text()
    assert sum("solution" in row for row in rows_of(tmp_path / "traces.jsonl")) > 0


@pytest.mark.parametrize("extra", [["traces.parquet"], ["data.jsonl"], ["t.jsonl", "--many_boxes", "last"]])
def test_what_cannot_be_is_said_before_a_model_is_loaded(extra, tmp_path):
    """A file of another kind, the problems themselves, and boxes that training refuses."""
    write(tmp_path / "data.jsonl", [{"problem": "1+1", "answer": "2"}])
    done = run_script(
        *f"{ROOT}/eval.py --model tiny --data data.jsonl --out out --traces".split(), *extra, check=False, cwd=tmp_path
    )
    wanted = f"error: --traces {extra[0]}: it needs a .jsonl file that is not --data, and --many_boxes zero"
    assert done.returncode == 1 and wanted in done.stderr and "Traceback" not in done.stderr


# Without one --------------------------------------------------------------------------------------
TRACED = [m.name for m in METHODS if "require_expert=True" in (ROOT / f"{m.name}.py").read_text()]
MIXED = ["--seed", 1, "--lr", 1e-4]  # with which groups are mixed
FIVE = ["--group_size", 5]  # one of them the expert's
EVERY = {  # flags with which the method would use a trace in every group, and else is grpo.py with ALIKE
    "bread": [*ALIKE, "--trigger", "always", "--band_low", 0.99],
    "luffy": [*ALIKE, *FIVE],
    "srft": [*ALIKE, *FIVE, "--positive_coef", 1, "--positive_entropy_sign", 0],
    "relift": [*ALIKE, "--buffer_size", 1],
    "uft": [*ALIKE, "--hint_low", 1, "--format_reward", 0, "--hint_coef", 7, "--kl_coef", 0],
    "hpt": [*ALIKE, "--gate", 9, "--skip_above", 0],
}


def test_every_method_with_traces_is_here():
    assert set(TRACED) == {*EVERY, "prefix_rft", "trapo", "chord", "bridge", "sft", "iw_sft"}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """(24 problems of 25 have no trace that can be used, every second one has; their ids with one).

    In the first, four steps of six draw all but the one with a trace, by the seed of MIXED.
    """
    folder = tmp_path_factory.mktemp("problems")
    easy_problems(folder / "easy.jsonl")
    rows = rows_of(folder / "easy.jsonl")
    solutions = [row.pop("solution") for row in rows]
    rows[0]["solution"], rows[1]["solution"] = "\\boxed{no}", "1" * 90 + f"\\boxed{{{rows[1]['answer']}}}"
    traced = rows[0] | {"id": "traced", "solution": solutions[0]}
    last = int(np.random.default_rng([1, 0]).permutation(25)[24])
    one = write(folder / "one.jsonl", [*rows[:last], traced, *rows[last:]])
    half = [row | {"solution": s} if i % 2 else row for i, (row, s) in enumerate(zip(rows, solutions, strict=True))]
    return one, write(folder / "half.jsonl", half[2:]), {row["id"] for row in half[3::2]}


@pytest.fixture(scope="module")
def grpo(problems, tmp_path_factory):
    """The run of the parent."""
    out = tmp_path_factory.mktemp("grpo") / "run"
    train("grpo", *small(problems[0], out, *ALIKE, *MIXED))
    assert max(row.get("groups_mixed", 0) for row in read_metrics(out)) > 0
    return out


def weights(out: Path) -> dict:
    return load_file(out / "final/model.safetensors")


@pytest.mark.parametrize("method", EVERY)
def test_without_traces_it_is_grpo(method, problems, grpo, tmp_path, capsys):
    """Bit for bit, where it would use the trace of every problem drawn if there was one."""
    train(method, *small(problems[0], tmp_path / "run", *EVERY[method], *MIXED, "--traces", "optional"))
    printed = capsys.readouterr().out
    assert "25 of 25 rows kept" in printed and "; 22 kept without a trace: no solution (first" in printed
    assert "1 kept without a trace: expert trace over 80 tokens" in printed
    assert "1 kept without a trace: expert trace that the verifier rejects" in printed
    a, b = weights(tmp_path / "run"), weights(grpo)
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("method", ["prefix_rft", "trapo"])
def test_without_traces_there_is_no_prefix(method, problems, tmp_path):
    """Their rows come from several seeds, so that they are grpo.py's in kind but not in number."""
    for kind in ("group", "split") if method == "prefix_rft" else ("",):
        extra = ["--advantages", kind, "--zero_variance", "drop"] if kind else []
        train(method, *small(problems[0], tmp_path / f"run{kind}", *extra, *MIXED, "--traces", "optional"))
        *lines, _ = read_metrics(tmp_path / f"run{kind}")
        assert len(lines) == 4 and all("reward" in line and "guided_reward" not in line for line in lines)
        assert max(line["groups_mixed"] for line in lines) > 0
    if method == "prefix_rft":
        a, b = weights(tmp_path / "rungroup"), weights(tmp_path / "runsplit")
        assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("chord", ["--mu_peak", 1, "--mu_valley", 1, "--group_size", 2]),
        ("bridge", ["--lam", 0, "--adapter_rank", 0, "--group_size", 2]),
    ],
)
def test_sft_rows_come_from_the_problems_with_a_trace(method, flags, problems, tmp_path, capsys):
    """With no weight on RL it is sft.py, which drops the others also where traces are optional."""
    same = ["--traces", "optional", "--weight_decay", 0]
    train(method, *small(problems[1], tmp_path / "mine", *flags, *same, "--sft_problems_per_step", 6))
    assert "22 of 22 rows kept" in capsys.readouterr().out
    train("sft", *small(problems[1], tmp_path / "sft", *SFT, *same, "--seed", 1))
    assert "11 of 22 rows kept, template plain; 11 dropped: no solution" in capsys.readouterr().out
    a, b = weights(tmp_path / "mine"), weights(tmp_path / "sft")
    assert max((a[k] - b[k]).abs().max() for k in a) <= 1e-4


@pytest.mark.parametrize("method", [name for name in TRACED if "sft" not in (name, name.partition("_")[2])])
def test_the_two_kinds_of_problems_meet(method, problems, tmp_path):
    """Half of the problems with a trace: the run ends, and every row of an expert is of those."""
    flags = ["--buffer_size", 2] if method == "relift" else ["--trigger", "always"] if method == "bread" else []
    train(method, *small(problems[1], tmp_path / "run", *flags, "--traces", "optional"))
    shown = {row["id"] for row in rows_of(tmp_path / "run/samples.jsonl") if row["expert_tokens"]}
    assert shown <= problems[2] and len(read_metrics(tmp_path / "run")) == 5


def test_no_trace_at_all_is_an_error(tmp_path):
    """A wrong column would else make a run of GRPO under another name."""
    write(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2"}])
    flags = small(tmp_path / "a.jsonl", tmp_path / "run", "--traces", "optional")
    done = run_script("luffy.py", *map(str, flags), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no usable row among 1 (1 kept without a trace: no solution (first" in done.stderr
