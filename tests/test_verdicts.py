"""results/verdicts.py: what it refuses, its numbers by hand, and the pages are the records."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from test_claims import GRID

from results import claims, compared, verdicts

REPORT = {f"map/{s}.jsonl": {"result": {"pass@1": 0.1, "pass@16": 0.5, "score": 1}} for s in verdicts.SPLITS}


def record(cell: claims.Cell, seed: int) -> dict:
    """As claims.run leaves it, of a made-up run that rises to a height of its cell's own."""
    rng = np.random.default_rng([seed, *cell.name.encode()])
    top = float(np.random.default_rng([*cell.name.encode()]).uniform(0.5, 0.95) + rng.normal(0, 0.02))
    total, stages = sum(flags["steps"] for _, flags in cell.stages), json.loads(json.dumps(cell.stages))
    made = {"cell": cell.name, "seed": seed, "stages": stages, "bug": cell.bug, "threads": cell.threads}
    made["accuracy"] = {str(s): top - (top - 0.1) * math.exp(-s / 15) for s in range(0, total + 1, 10)}
    made["splits"] = {s: {"pass@1": round(top - i / 10, 4), "pass@16": 0.99} for i, s in enumerate(verdicts.SPLITS)}
    parts = range(len(compared.ends(made)))
    curves = {"entropy": [0.3 / (i + 1) for i in parts], "completion_tokens": [42.0 + rng.normal() for _ in parts]}
    curves["trained_tokens"] = [100_000 * (i + 1) for i in parts]
    if cell.stages[0][0] not in ("sft", "iw_sft"):
        curves |= {"sampled_tokens": curves["trained_tokens"], "groups_mixed": [0.5 - 0.05 * i for i in parts]}
    if cell.stages[0][0] == "bread":
        curves |= {
            "anchor_depth": [None, *(0.5 - 0.03 * i for i in parts[1:])],
            "traces_opened": [190.0 for _ in parts],
        }
    same = {"commit": "a" * 40, "dirty": False, "versions": {"torch": "2"}, "hardware": "x86"}
    return made | {"curves": curves, "wall": 100} | same


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """Of every run; the grid's accuracies are those that chose the rates."""
    cells = claims.cells(GRID, 60)
    known = {r["cell"]: r["accuracy"] for r in GRID}
    found = [record(cell, seed) for cell in cells for seed in cell.seeds]
    return [r | {"accuracy": known.get(r["cell"], r["accuracy"])} for r in found]


@pytest.fixture(scope="module")
def cells(records) -> dict[str, dict]:
    lines = json.loads(json.dumps(compared.compact(records, REPORT)))
    return {line["cell"]: line for line in lines}


# What is refused ----------------------------------------------------------------------------------
def changed(records: list[dict], **new: object) -> list[dict]:
    return [*records[:-1], records[-1] | new]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: changed(r, commit="b" * 40), "2 commits: aaaaaaa, bbbbbbb"),
        (lambda r: [], "0 commits"),
        (lambda r: changed(r, dirty=True), "had changes in 1 runs"),
        (lambda r: [*r, r[0]], "several records"),
        (lambda r: r[:-1], r"1 runs are missing \(--partial goes on\): threads/grpo"),
        (lambda r: changed(r, stages=[["grpo", {"steps": 60, "lr": 1.0}]]), "threads/grpo has other flags"),
        (lambda r: changed(r, cell="nobody"), "nobody has other flags"),
    ],
)
def test_what_would_mislead_is_refused(records, change, sentence):
    with pytest.raises(SystemExit, match=sentence):
        compared.compact(change(records), REPORT)


def test_a_missing_run_may_be_and_is_named_on_the_page(records):
    some = [r for r in records if (r["cell"], r["seed"]) != ("controlled/sft", 3)]
    cells = {line["cell"]: line for line in compared.compact(some, REPORT, True)}
    assert sorted(cells["controlled/sft"]["seeds"]) == ["0", "1", "2", "4"]
    assert "; **not run yet**: 1 of controlled" in verdicts.origin(cells)
    assert "mean of 4 to 5 seeds" in verdicts.short_page(cells)


def test_files_of_two_machines_are_one_table(records, tmp_path, monkeypatch):
    """Both have the grid's records, which are the same lines."""
    for name, some in (("one", records[:200]), ("two", records[100:])):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in some))
    monkeypatch.setattr(compared, "RECORDS", tmp_path / "claims.jsonl")
    with pytest.raises(SystemExit, match="python eval.py --model map"):
        compared.add((tmp_path / "one", tmp_path / "two"), False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/report.json").write_text(json.dumps(REPORT))
    compared.add((tmp_path / "one", tmp_path / "two"), False)
    assert sum(len(line["seeds"]) for name, line in compared.load().items() if name != "base") == len(records)


@pytest.fixture
def later(records, cells, tmp_path, monkeypatch):
    """TRAPO's ablations were run later; a function writes them and runs of the first commit."""
    first = {name: line for name, line in cells.items() if not name.startswith("ablation/trapo")}
    monkeypatch.setattr(compared, "RECORDS", tmp_path / "claims.jsonl")
    monkeypatch.setattr(claims, "recorded", lambda: GRID)
    compared.keep(list(first.values()))
    new = [r | {"commit": "b" * 40} for r in records if r["cell"].startswith("ablation/trapo")]

    def make(change: dict, *again: dict) -> tuple:
        (tmp_path / "raw").write_text("".join(json.dumps(r) + "\n" for r in [*again, new[0] | change, *new[1:]]))
        return (tmp_path / "raw",)

    return new, make


def test_runs_of_a_later_commit_stand_beside_a_run_made_at_both(later):
    new, make = later
    compared.add_later(make({}, new[0] | {"commit": "a" * 40}))
    cells = compared.load()
    assert cells[new[0]["cell"]]["commit"] == "b" * 40 and cells["base"]["missing"] == []
    assert f", {len(new)} runs of commit bbbbbbb (" in verdicts.origin(cells)
    assert "; 1 runs were made at both" in verdicts.origin(cells) and "not run" not in verdicts.page(cells)


def test_later_runs_may_come_in_parts_and_never_replace(later, records, capsys):
    """What is still missing is named; a cell of the first commit stays as it is."""
    new, make = later
    again = new[0] | {"commit": "a" * 40}
    (path,) = make({}, again)
    whole = path.read_text().splitlines(True)
    path.write_text("".join(whole[:-1]))
    compared.add_later((path,))
    assert compared.load()["base"]["missing"] == [f"{new[-1]['cell']} (seed {new[-1]['seed']})"]
    sft = next(r for r in records if r["cell"] == "controlled/sft") | {"commit": "b" * 40, "splits": {}}
    other = json.loads(whole[-1]) | {"hardware": "arm"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (again, new[0], sft, other)))
    compared.add_later((path,))
    cells = compared.load()
    assert cells["base"]["missing"] == [] and len(cells["base"]["repeated"]) == 1
    assert cells[other["cell"]]["hardware"] == ["x86", "arm"] and cells["controlled/sft"]["commit"] == "a" * 40
    assert "controlled/sft: claims.jsonl has it of aaaaaaa, which stays" in capsys.readouterr().out


def test_a_later_commit_whose_numbers_are_others_is_refused(later, records):
    new, make = later
    again = new[0] | {"commit": "a" * 40}
    known = {cell.name: json.loads(json.dumps(cell.stages)) for cell in claims.cells(GRID, 60)}
    for change, old, sentence in (
        ({}, again | {"splits": {}}, r"trapo.*seed 0\) is not what it is at aaaaaaa"),
        ({}, again | {"seed": 7}, r"trapo.*seed 7\) is not what"),
        ({}, again | {"cell": "controlled/trapo", "stages": known["controlled/trapo"]}, "controlled/trapo .* not what"),
        ({}, again | {"stages": [["sft", {"steps": 60}]]}, "trapo.* has other flags"),
        ({"dirty": True}, again, "had changes in 1 runs"),
        ({"commit": "c" * 40}, again, "2 commits: bbbbbbb, ccccccc"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            compared.add_later(make(change, old))
    with pytest.raises(SystemExit, match="0 commits"):
        compared.add_later(make({}))
    (path,) = make({})
    path.write_text("")
    with pytest.raises(SystemExit, match="0 commits"):
        compared.add_later((path,))
    sft = next(r for r in records if r["cell"] == "controlled/sft") | {"commit": "b" * 40}
    with pytest.raises(SystemExit, match="No run of trapo is there of aaaaaaa too"):
        compared.add_later(make({}, sft, sft | {"commit": "a" * 40}))
    assert new[0]["cell"] not in compared.load()


def test_machines_and_versions_are_kept(records):
    """One commit on two machines is one table, which says so."""
    other = {"versions": {"torch": "3"}, "hardware": "arm"}
    mixed = [r | other if r["seed"] == 4 else r for r in records]
    cells = {line["cell"]: line for line in compared.compact(mixed, REPORT)}
    assert cells["controlled/sft"]["hardware"] == ["x86", "arm"] and len(cells["controlled/sft"]["versions"]) == 2
    assert "torch 2; torch 3; arm; x86" in verdicts.origin(cells)
    assert cells["base"]["splits"]["test"] == {"pass@1": 0.1, "pass@16": 0.5}


# Numbers by hand ----------------------------------------------------------------------------------
def test_interval():
    """1, 2, 3: std 1, 4.303 / sqrt(3); five seeds, std sqrt(2.5), 2.776 / sqrt(5)."""
    assert compared.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / 3**0.5))
    assert compared.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3, 2.776 * 2.5**0.5 / 5**0.5))
    assert compared.interval([1.0]) == (1, math.inf)


def test_verdict():
    """Of 0.1, 0.2, 0.3 the interval ends at -0.05; of 0.2, 0.25, 0.3 at 0.13."""
    assert compared.verdict([0.1, 0.2, 0.3]) == "*not seen*"
    assert compared.verdict([0.2, 0.25, 0.3]) == "*seen*"
    assert compared.verdict([-0.2, -0.25, -0.3]) == "*not seen*; the reverse is seen"
    assert compared.verdict([0.5]) == "one seed, no interval"


def run_of(accuracy: list[float], **curves: list) -> dict:
    return {"steps": [0, 10, 20], "accuracy": accuracy, "curves": {"trained_tokens": [100, 300]} | curves}


def cell_of(script: str, *runs: dict, **flags: object) -> dict:
    return {"stages": [[script, {"steps": 20} | flags]], "seeds": {str(i): run for i, run in enumerate(runs)}}


def test_costs():
    """2 a parameter for a sampled token, 6 for a trained one; bridge: rows twice, and traces."""
    sampled, n = {"sampled_tokens": [50, 150]}, compared.PARAMETERS
    run = run_of([0.1, 0.2, 0.3], **sampled)
    assert compared.spent(cell_of("grpo", run), run, "FLOPs") == pytest.approx(np.array([0, 700, 2100]) * n)
    assert compared.spent(cell_of("sft", run_of([0.1] * 3)), run_of([0.1] * 3), "tokens") == pytest.approx(np.zeros(3))
    flags = {"sft_problems_per_step": 2}
    for meta, twice in ((True, 2), (False, 1)):
        cell = cell_of("bridge", run, meta=meta, **flags)
        assert compared.spent(cell, run, "trained")[-1] == pytest.approx(300 * twice + 20 * 2 * compared.TRACE)


def test_ends_of_two_stages():
    """The first one's measured end is a line of its own, so later parts end a step earlier."""
    two = {"stages": [["sft", {"steps": 30}], ["grpo", {"steps": 30}]]}
    assert compared.ends(two) == [10, 20, 30, 39, 49, 59, 60]
    assert compared.ends({"stages": [["grpo", {"steps": 25}]]}) == [10, 20, 25]


def test_steps_to_and_equal_flops():
    """b ends at 0.5 and 0.4: 0.4 is the target, which a has at 6 and never, b at 16 and 20."""
    a = cell_of("grpo", run_of([0.1, 0.6, 0.6]), run_of([0.1, 0.1, 0.1]))
    b = cell_of("grpo", run_of([0.1, 0.25, 0.5]), run_of([0.1, 0.25, 0.4]))
    cells, claim = {"a": a, "b": b}, {"a": "a", "b": "b", "what": "steps to", "share": 0.5}
    assert compared.pairs(claim, cells) == [pytest.approx((6, 16, 2)), pytest.approx((20, 20, -10))]
    cheap = run_of([0.1, 0.3, 0.6], trained_tokens=[100, 200])  # ends where b's has 200 of 300: between 10 and 20
    cells = {"a": cell_of("grpo", cheap), "b": cell_of("grpo", run_of([0.1, 0.25, 0.5]))}
    assert compared.pairs(claim | {"what": "equal FLOPs"}, cells) == [pytest.approx((0.6, 0.375, 0.225))]


def test_reached():
    """At the first of two evaluations that are at the target; from the start; never."""
    x = np.array([0.0, 10.0, 20.0])
    found = [compared.reached(x, [0.1, 0.4, 0.4], target) for target in (0.4, 0.25, 0.1, 0.5)]
    assert found == pytest.approx([10, 5, 0, 20])


def test_claims_on_one_cell():
    """Traces under a bound; an anchor that moves to the start."""
    run = run_of([0.1] * 3, traces_opened=[100.0, 128.0], anchor_depth=[None, 0.5, 0.3])
    cells = {"a": cell_of("bread", run)}
    assert compared.pairs({"a": "a", "what": "traces", "bound": 0.4}, cells) == [pytest.approx((0.25, 0.4, 0.15))]
    assert compared.pairs({"a": "a", "what": "anchor"}, cells) == [pytest.approx((0.5, 0.3, 0.2))]


def test_accuracies_are_paired_by_seed(cells):
    """The base has no seeds: it is the same number for all."""
    claim = {"a": "ablation/bread, first hit", "b": "controlled/bread", "split": "hard"}
    one, two = (cells[claim[side]]["seeds"] for side in ("a", "b"))
    wanted = [one[s]["splits"]["hard"]["pass@1"] - two[s]["splits"]["hard"]["pass@1"] for s in "012"]
    assert [d for *_, d in compared.pairs(claim, cells)] == pytest.approx(wanted)
    assert {b for _, b, _ in compared.pairs({"a": "controlled/sft", "b": "base"}, cells)} == {0.1}


def test_what_of_an_advantage_the_bug_is():
    """A method at 0.8, the pipeline at 0.7, with a bug at 0.5: 0.2 of 0.3; another below both."""
    level = {"controlled/sft_then_grpo": 0.7, "audit/sft then grpo, first_last": 0.5}
    level |= {"audit/sft then grpo, mean_of_means": 0.7} | {f"controlled/{m}": 0.8 for m in verdicts.MIXED}
    level["controlled/luffy"] = 0.4
    cells = {}
    for name, height in level.items():
        runs = [run_of([0.1, 0.2, height]) | {"splits": {"test": {"pass@1": height}}} for _ in range(2)]
        cells[name] = cell_of("grpo", *runs, sft_problems_per_step=0)
    rows = verdicts.audit_table(cells).splitlines()
    gains = "+0.100 ± 0.000 | +0.300 ± 0.000 | 67% | +0.100 ± 0.000 | 0%"
    assert f"| bread, equal steps | {gains} |" in rows and f"| srft, equal FLOPs | {gains} |" in rows
    losses = "-0.300 ± 0.000 | -0.100 ± 0.000 | no advantage | -0.300 ± 0.000 | no advantage"
    assert f"| luffy, equal steps | {losses} |" in rows


def test_what_a_run_saw_and_had_graded():
    """By the flags of a cell; where groups are drawn again, tokens over the mean length."""
    flags = {"problems_per_step": 32, "group_size": 8}
    runs = [run_of([0.1] * 3, sampled_tokens=[50, 150], completion_tokens=[None, 3.0], traces_opened=[5.0, 7.0])]
    for name, seen, calls in (
        ("grpo", "0", "5,120"),
        ("sft", "640", "0"),
        ("luffy", "640", "4,480"),
        ("relift", "at most 640", "5,120"),
        ("trapo", "at most 640 prefixes", "at most 5,120"),
        ("bread", "7 different prefixes", "at least 50"),
        ("dapo", "0", "about 50"),
    ):
        cell = cell_of(name, *runs, **flags)
        assert (verdicts.traces_seen(name, cell, runs), verdicts.verifier_calls(name, cell, runs)) == (seen, calls)
    two = {"stages": [["sft", {"steps": 30} | flags], ["grpo", {"steps": 30} | flags]]}
    found = verdicts.traces_seen("sft_then_grpo", two, runs), verdicts.verifier_calls("sft_then_grpo", two, runs)
    assert found == ("960", "7,680")
    assert verdicts.traces_seen("chord", cell_of("chord", **flags, sft_problems_per_step=64), runs) == "1,280"


# Claims and pages ---------------------------------------------------------------------------------
def test_claims_name_cells_that_exist_and_use_all():
    """Of ablations, traces, the tail and the audit every cell is in some claim."""
    names = {cell.name for cell in claims.cells(GRID, 60)} | {"base"}
    used = {claim[side] for claim in verdicts.CLAIMS for side in ("a", "b") if side in claim}
    assert used <= names, used - names
    wanted = {name for name in names if name.split("/")[0] in ("ablation", "traces", "tail", "audit")}
    assert wanted <= used, wanted - used
    keys = {"method", "says", "a", "b", "what", "split", "share", "bound", "cannot", "but"}
    assert all(set(claim) <= keys and ("cannot" in claim) != ("a" in claim) for claim in verdicts.CLAIMS)


def test_every_claim_has_a_verdict_and_a_page(cells, tmp_path, monkeypatch):
    """With all runs none is without one; the grid alone breaks nothing; the figures are small."""
    text = verdicts.page(cells)
    assert text.count("*seen*") + text.count("*not seen*") > 80 and "not run" not in text
    rest = {name: line for name, line in cells.items() if name == "base" or name.startswith("rate/")}
    assert "not run" in verdicts.page(rest) and "before training" in verdicts.short_page(rest)
    monkeypatch.setattr("results.verdicts_pictures.HERE", tmp_path)
    verdicts.draw(cells)
    assert all(10_000 < (tmp_path / name).stat().st_size < 150_000 for name in ("accuracy.png", "signals.png"))


def test_only_what_is_between_the_markers_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("by hand\n<!-- x -->\nold\n<!-- end of x -->\nby hand too\n")
    verdicts.write(page, "x", "new\n")
    assert page.read_text() == "by hand\n<!-- x -->\nnew\n<!-- end of x -->\nby hand too\n"


def test_pages_are_the_records():
    """Both pages have between their markers what results/claims.jsonl gives."""
    if not compared.RECORDS.exists():
        pytest.skip("results/claims.jsonl is not there yet: python results/claims.py, then verdicts.py --add")
    cells = compared.load()
    for page, name, text in (
        ("README.md", "results", verdicts.short_page(cells)),
        ("results/README.md", "claims", verdicts.page(cells)),
    ):
        marked = f"<!-- {name} -->\n{text}<!-- end of {name} -->"
        assert marked in (ROOT / page).read_text(), f"{page} is not what the records give: make results"
