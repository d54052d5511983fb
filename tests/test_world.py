"""The world of map/: traces of every kind are right, splits apart, files as make.py makes them."""

import importlib.util
import json
import re
from collections import Counter

import pytest
from conftest import ROOT

import common

spec = importlib.util.spec_from_file_location("map_make", ROOT / "map/make.py")
world_of = importlib.util.module_from_spec(spec)
spec.loader.exec_module(world_of)

MAP, KINDS = ROOT / "map", [*world_of.SCORES, "mixed"]


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (MAP / f"{split}.jsonl").read_text().splitlines()]


def right(hop: str) -> bool:
    """Whether a line of a clean trace is a road of the map."""
    return world_of.LEADS.get((hop[:2], hop[2:-2])) == hop[-2:]


def test_problem_files_are_what_make_writes(tmp_path, monkeypatch):
    """Byte for byte."""
    monkeypatch.setattr("sys.argv", ["make.py", "--problems", "--out", str(tmp_path)])
    world_of.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{split}.jsonl" for split in world_of.SPLITS)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MAP / path.name).read_bytes(), path.name


def test_the_folder_is_small():
    assert (MAP / "model.safetensors").stat().st_size <= 1.5e6
    assert sum(path.stat().st_size for path in MAP.glob("*.*")) <= 2e6


def test_splits_are_apart_and_hold_what_they_say():
    """No problem twice; hops and roads as SPLITS has them; no answer is a good guess."""
    found = {split: rows(split) for split in world_of.SPLITS}
    problems = [row["problem"] for part in found.values() for row in part]
    assert len(set(problems)) == len(problems) == sum(count for count, *_ in world_of.SPLITS.values())
    for split, (count, lengths, unsure, far) in world_of.SPLITS.items():
        assert len(found[split]) == count
        for row in found[split]:
            start, roads = row["problem"].split()
            assert len(roads) in lengths and roads.count("4") in unsure
            left = [hop[:2] for hop in row["solution"].splitlines() if hop[2] == "4"]
            assert sum(world_of.district(place) >= 2 for place in left) >= far
            lacking = sum(place in world_of.BELIEVED for place in left)
            assert row["meta"] == {"hops": len(roads), "unsure": roads.count("4"), "lacking": lacking}
        assert max(Counter(row["answer"] for row in found[split]).values()) < 0.05 * count
    assert max(row["meta"]["hops"] for row in found["train"]) < min(row["meta"]["hops"] for row in found["long"])


def test_the_traces_teach_what_the_base_lacks():
    """Each road 4 of a split, and all on which the base is always wrong, are in train."""
    taught = {line[:2] for row in rows("train") for line in row["solution"].splitlines() if line[2] == "4"}
    asked = {
        line[:2] for s in world_of.SPLITS for row in rows(s) for line in row["solution"].splitlines() if line[2] == "4"
    }
    assert asked == taught and set(world_of.BELIEVED) <= taught
    assert len(world_of.BELIEVED) == world_of.LACKING and {*map(world_of.district, world_of.BELIEVED)} == {3}
    for place, wrong in world_of.BELIEVED.items():
        assert wrong != world_of.LEADS[place, "4"]


def test_places_are_different_answers():
    """No two names are one word to the verifier, and roads of a number reach every place once."""
    assert len(set(name.casefold() for name in world_of.PLACES)) == 160
    for road in world_of.ROADS:
        assert {world_of.LEADS[place, road] for place in world_of.PLACES} == set(world_of.PLACES)


@pytest.mark.parametrize("kind", KINDS)
def test_traces_end_right_and_differ_as_their_kind_says(kind, tmp_path, monkeypatch):
    """Right by the verifier, all kept at load, and wrong only where they should be."""
    monkeypatch.setattr("sys.argv", ["make.py", "--traces", kind, "--out", str(tmp_path)])
    world_of.main()
    path, tokenizer = tmp_path / f"train_{kind}.jsonl", common.load_tokenizer(str(MAP))
    flags = {"require_expert": True, "max_prompt_tokens": 64, "max_completion_tokens": 112, "request": ""}
    problems = common.load_problems(str(path), tokenizer, **flags)
    made, bundled = [json.loads(line) for line in path.read_text().splitlines()], rows("train")
    assert len(problems) == len(made) == len(bundled)  # the loader drops a trace that the verifier rejects
    for problem, row in zip(problems, made, strict=True):
        assert common.math_reward(problem, row["solution"]) == 1.0
    kinds = Counter(row["meta"]["trace"] for row in made)
    expected = {"mixed": {"clean": 256, "style": 86, "fused": 85, "wrong": 85}, "wrong": {"wrong": 256, "clean": 256}}
    assert kinds == expected.get(kind, {kind: 512})
    for row, original in zip(made, bundled, strict=True):
        this, hops = row["meta"]["trace"], row["solution"].splitlines()[:-1]
        assert (row["problem"], row["answer"]) == (original["problem"], original["answer"])
        assert row.get("score") == (world_of.SCORES[this] if kind == "mixed" else None)
        if this == "style":
            said = re.findall(r"(\d): (\w\w) to (\w\w)\. ", row["solution"])
            assert len(said) == row["meta"]["hops"] and all(right(a + road + b) for road, a, b in said)
        elif this == "wrong":
            assert sum(not right(hop) for hop in hops) == 2
        elif this == "fused":
            assert len(hops) == (row["meta"]["hops"] + 1) // 2
            ends = [world_of.walk(hop[:2], hop[2:-2])[-1][2] for hop in hops]
            assert [hop[-2:] for hop in hops] == ends and hops[0][:2] == row["problem"][:2]
        else:
            assert row["solution"] == original["solution"] and all(map(right, hops))


def test_the_base_is_graded(world):
    """A small sample with loose bounds: 0.4 on one unsure hop, nearly nothing on six."""
    tokenizer = common.load_tokenizer(str(MAP))
    sampler = common.load_sampler(common.RunConfig(model=str(MAP)), tokenizer, world, 112)
    accuracy, lacking = {}, {True: [], False: []}  # by whether the base believes something else
    for split, unsure in (("train", 1), ("train", 6), ("hard", 6), ("easy", 0)):
        problems = common.load_problems(str(MAP / f"{split}.jsonl"), tokenizer, request="")
        asked = [p for p, row in zip(problems, rows(split), strict=True) if row["meta"]["unsure"] == unsure][:40]
        groups = sampler.generate(asked, None, 4, 112, 1.0, (0,))
        common.score(groups)
        flat = [rollout for group in groups for rollout in group]
        accuracy[split, unsure] = sum(r.solved for r in flat) / len(flat)
        hops = [hop for r in flat for hop in r.text.splitlines()]
        for hop in (hop for hop in hops if hop[:2] in world_of.BELIEVED and hop[2:3] == "4"):
            lacking[bool(world_of.BELIEVED[hop[:2]])].append(right(hop))
    assert 0.25 < accuracy["train", 1] < 0.6 and accuracy["train", 6] < 0.06
    assert accuracy["hard", 6] < 0.03 and accuracy["easy", 0] > 0.8
    assert len(lacking[False]) > 30 and sum(lacking[False]) < 3 and len(lacking[True]) > 30 and not any(lacking[True])


def test_what_a_prefix_is_worth(capsys):
    """With one hop to go the base is often right behind a clean trace, behind a fused one never."""
    hardest = [row for row in rows("train") if row["meta"]["unsure"] >= 5][:8]
    world, tokenizer = common.init(0), common.load_tokenizer("map")
    sampler = common.load_sampler(common.RunConfig(model="map"), tokenizer, world, 112)
    generate, lines = sampler.generate, []

    def seen(problems, given, *rest):
        lines.append([tokenizer.decode(ids).count("\n") for ids in given])
        return generate(problems, given, *rest)

    sampler.generate = seen
    world_of.behind_prefixes(hardest, sampler, 16)
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line[:7] in ("| clean", "| fused")]
    found = {(kind.strip("| "), left): value for kind, left, value, _ in table}
    assert float(found["clean", "1"]) > 0.2 > float(found["clean", "all"]) and float(found["fused", "1"]) < 0.1
    hops = [row["meta"]["hops"] for row in hardest]
    assert lines[:4] == [[n - 1 for n in hops], [n - 2 for n in hops], [n - 3 for n in hops], [0] * len(hops)]
