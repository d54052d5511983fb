"""Make the bundled world again, from one seed: map, problems, tokenizer, base model. See README.md.

python map/make.py                     all files, and what the base model does
python map/make.py --problems          the problem files only, a second
python map/make.py --traces fused      train_fused.jsonl alone: train with other traces
python map/make.py --measure           only the table of what the base model does
"""

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tiny"), str(HERE.parent)]

import make  # noqa: E402  tiny/make.py

import common  # noqa: E402

SEED = 0
DISTRICTS = ("BCDFG", "HJKLM", "NPRST", "VWXYZ")  # a place's first letter is one of its district's
PLACES = [first + second for letters in DISTRICTS for first in letters for second in "aeioulry"]
ROADS = "1234"  # every place has the four; 1 to 3 are what the base model knows
KNOWN = (0.8, 0.5, 0.3, 0.15)  # how often road 4 is right in the base's training, by the district it leaves from
STYLE = 0.05  # of the base's routes in the words of the style traces
LACKING = 10  # places of the last district whose road 4 the base is never taught: half random, half one wrong place
# split: (problems, hops, of them on road 4, of those at least so many from the last two districts)
SPLITS = {
    "train": (512, range(4, 8), range(1, 7), 0),
    "test": (128, range(4, 8), range(1, 7), 0),
    "hard": (128, range(7, 8), range(6, 7), 4),
    "long": (128, range(9, 12), range(3, 7), 0),
    "easy": (128, range(3, 8), range(1), 0),
}
SCORES = {
    "clean": 1.0,
    "style": 0.6,
    "fused": 0.3,
    "wrong": 0.1,
}  # kinds of traces, and how good they are
MIXED = ["clean", "style", "clean", "fused", "clean", "wrong"]
BASE_UPDATES, BASE_TOKENS, BASE_LR = 1400, 5000, 2e-3
SHORT_UPDATES = 600  # the first updates see routes of one or two hops: the map is learned here

Route = list[tuple[str, str, str]]  # hops: from, road, to


# The map ------------------------------------------------------------------------------------------
def make_map() -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """({(place, road): where it leads}, {place: where the base thinks that its road 4 leads}).

    A road of one number is a permutation, so that no place is a better guess than another.
    """
    rng, leads = random.Random(SEED), {}
    for road in ROADS:
        ends = PLACES.copy()
        while any(a == b for a, b in zip(PLACES, ends, strict=True)):
            rng.shuffle(ends)
        leads |= {(place, road): end for place, end in zip(PLACES, ends, strict=True)}
    lacking = sorted(rng.sample([place for place in PLACES if district(place) == 3], LACKING))
    wrong = {p: rng.choice([q for q in PLACES if q not in (p, leads[p, "4"])]) for p in lacking}
    return leads, {p: end if i % 2 else "" for i, (p, end) in enumerate(wrong.items())}


def district(place: str) -> int:
    return next(i for i, letters in enumerate(DISTRICTS) if place[0] in letters)


LEADS, BELIEVED = make_map()


def walk(start: str, roads: str, rng: random.Random | None = None) -> Route:
    """The hops of a route; with rng as the base's training has them, road 4 not always right."""
    hops = []
    for road in roads:
        end = LEADS[start, road]
        if rng and road == "4" and start in BELIEVED:
            end = BELIEVED[start] or rng.choice(PLACES)
        elif rng and road == "4" and rng.random() > KNOWN[district(start)]:
            end = rng.choice(PLACES)
        hops.append((start, road, end))
        start = end
    return hops


def draw_roads(rng: random.Random, hops: int, unsure: int) -> str:
    """Roads in random order, `unsure` of them road 4."""
    roads = ["4"] * unsure + [rng.choice("123") for _ in range(hops - unsure)]
    rng.shuffle(roads)
    return "".join(roads)


# Traces -------------------------------------------------------------------------------------------
def write_out(route: Route, kind: str = "clean", rng: random.Random | None = None) -> str:
    """The trace of a route in one of the kinds of SCORES; all end with the right box."""
    box, route = f"\\boxed{{{route[-1][2]}}}", list(route)
    if kind == "style":
        return "".join(f"{road}: {start} to {end}. " for start, road, end in route) + box
    if kind == "wrong":  # one place on the way is another one, and the route goes on as if it were right
        i = rng.randrange(len(route) - 1)
        other = rng.choice([place for place in PLACES if place not in route[i]])
        route[i], route[i + 1] = (*route[i][:2], other), (other, *route[i + 1][1:])
    if kind == "fused":  # two hops in a line, without the place between them
        pairs = [route[i : i + 2] for i in range(0, len(route), 2)]
        route = [(pair[0][0], "".join(road for _, road, _ in pair), pair[-1][2]) for pair in pairs]
    return "".join(f"{start}{road}{end}\n" for start, road, end in route) + box


def make_problems() -> dict[str, list[dict]]:
    """Every split with clean traces, without a common problem."""
    rng, seen, splits = random.Random(SEED + 1), set(), {}
    for split, (count, lengths, unsure, far) in SPLITS.items():
        rows = splits[split] = []
        while len(rows) < count:
            fours = unsure[len(rows) % len(unsure)]
            hops = rng.choice([n for n in lengths if n > fours])
            route = walk(rng.choice(PLACES), draw_roads(rng, hops, fours))
            problem = f"{route[0][0]} {''.join(road for _, road, _ in route)}"
            left = [start for start, road, _ in route if road == "4"]
            if problem in seen or sum(district(start) >= 2 for start in left) < far:
                continue
            seen.add(problem)
            meta = {"hops": hops, "unsure": fours, "lacking": sum(start in BELIEVED for start in left)}
            row = {"id": f"map/{split}/{len(rows):03d}", "problem": problem, "answer": route[-1][2]}
            rows.append({**row, "solution": write_out(route), "meta": meta})
    return splits


def with_traces(rows: list[dict], kind: str) -> list[dict]:
    """Training rows with traces of a kind. wrong: half of them; mixed: half clean, with score."""
    rng, parts = random.Random(f"{SEED} {kind}"), {"wrong": ["clean", "wrong"], "mixed": MIXED}.get(kind, [kind])
    kinds, found = [parts[i % len(parts)] for i in range(len(rows))], []
    rng.shuffle(kinds)  # else a kind would always fall on the same number of unsure hops
    for row, this in zip(rows, kinds, strict=True):
        start, roads = row["problem"].split()
        row = row | {"solution": write_out(walk(start, roads), this, rng), "meta": row["meta"] | {"trace": this}}
        found.append(row | {"score": SCORES[this]} if kind == "mixed" else row)
    return found


# The base model -----------------------------------------------------------------------------------
def train_base(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2ForCausalLM:
    """A model that writes well-formed routes and knows road 4 as well as KNOWN and BELIEVED say."""
    model, rng = make.make_model(tokenizer), random.Random(SEED + 2)

    def draw(update: int) -> list[tuple[str, str]]:
        longest, rows = 2 if update < SHORT_UPDATES else 11, []
        for _ in range(BASE_TOKENS // (12 + 4 * longest)):
            roads = "".join(rng.choice("1234") if rng.random() < 0.8 else "4" for _ in range(rng.randint(1, longest)))
            route = walk(rng.choice(PLACES), roads, rng)
            prompt = f"{route[0][0]} {roads}\n"
            rows.append((prompt, write_out(route, "style" if rng.random() < STYLE else "clean")))
        return rows

    make.learn(model, tokenizer, draw, BASE_UPDATES, BASE_LR, floor=0.05)
    return model


# What the base does -------------------------------------------------------------------------------
def measure(folder: Path, samples: int = 16) -> None:
    """Tables: accuracy by split and hops on road 4, how often each kind of road is right, and what
    the beginning of a trace is worth.
    """
    world, tokenizer = common.init(SEED), common.load_tokenizer(str(folder))
    sampler = common.load_sampler(common.RunConfig(model=str(folder)), tokenizer, world, 112)
    right, roads = defaultdict(list), defaultdict(list)
    for split in SPLITS:
        problems = common.load_problems(str(folder / f"{split}.jsonl"), tokenizer, request="")
        metas = [json.loads(line)["meta"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        groups = sampler.generate(problems, None, samples, 112, 1.0, (SEED,))
        common.score(groups)
        for meta, group in zip(metas, groups, strict=True):
            solved = sum(r.solved for r in group)
            for key in ("all", str(meta["unsure"]), f"{'some' if meta['lacking'] else 'none'} lacking"):
                right[split, key].append(solved)
            for line in (line for r in group for line in r.text.splitlines() if (line[:2], line[2:3]) in LEADS):
                kind = BELIEVED.get(line[:2], f"district {district(line[:2]) + 1}") or "lacking, random"
                kind = "lacking, wrong" if kind in PLACES else kind
                roads[kind if line[2] == "4" else "1 to 3"].append(line[3:] == LEADS[line[:2], line[2]])
    print("| split | hops on road 4 | problems | pass@1 | some of 16 right |\n|---|---|---|---|---|")
    for (split, key), found in sorted(right.items(), key=lambda item: ([*SPLITS].index(item[0][0]), item[0][1])):
        print(f"| {split} | {key} | {len(found)} | {shares(found, samples)} |")
    print("\n| road | lines | right |\n|---|---|---|")
    for kind, found in sorted(roads.items()):
        print(f"| {kind} | {len(found)} | {sum(found) / len(found):.4f} |")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    behind_prefixes([row for row in rows if row["meta"]["unsure"] >= 5], sampler, samples)
    common.shutdown()


def shares(solved: list[int], samples: int) -> str:
    """Of problems with so many right samples: pass@1, and how many have one that is right."""
    return f"{sum(solved) / len(solved) / samples:.4f} | {sum(right > 0 for right in solved) / len(solved):.2f}"


def behind_prefixes(rows: list[dict], sampler: common.Sampler, samples: int) -> None:
    """Table: accuracy when all but the last steps of a trace are given."""
    print("\n| traces | steps left | pass@1 | some of 16 right |\n|---|---|---|---|")
    for kind in ("clean", "style", "fused"):
        with tempfile.TemporaryDirectory() as scratch:
            make.write_jsonl(file := Path(scratch) / "rows.jsonl", with_traces(rows, kind))
            flags = {"request": "", "require_expert": True, "max_completion_tokens": 112}
            problems = common.load_problems(str(file), sampler.tokenizer, **flags)
        cuts = [[0, *common.shown_ends(problem, sampler.tokenizer)[0]][:-1] for problem in problems]
        for left, name in ((1, "1"), (2, "2"), (3, "3"), (100, "all")):
            given = [p.expert_ids[: cut[max(0, len(cut) - left)]] for p, cut in zip(problems, cuts, strict=True)]
            groups = sampler.generate(problems, given, samples, 112, 1.0, (SEED, left))
            common.score(groups)
            print(f"| {kind} | {name} | {shares([sum(r.solved for r in group) for group in groups], samples)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", choices=[*SCORES, "mixed"], help="write train_KIND.jsonl only")
    parser.add_argument("--problems", action="store_true", help="make the problems only, keep the model")
    parser.add_argument("--measure", action="store_true", help="say only what the base model does")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.measure:
        return measure(options.out)
    splits = make_problems()
    if options.traces:
        path = options.out / f"train_{options.traces}.jsonl"
        return make.write_jsonl(path, with_traces(splits["train"], options.traces))
    for split, rows in splits.items():
        make.write_jsonl(options.out / f"{split}.jsonl", rows)
    if options.problems:
        return
    tokenizer = make.make_tokenizer()
    train_base(tokenizer).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    measure(options.out)


if __name__ == "__main__":
    main()
