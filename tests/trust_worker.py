"""Load data where rank 1 meets a fault: torchrun trust_worker.py FAULT."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common  # noqa: E402
import core.data as data  # noqa: E402
from core import config  # noqa: E402

if __name__ == "__main__":
    world, fault = common.init(0), sys.argv[1]
    if world.rank == 1 and fault == "timeout":
        golds, grades = data.golds_parse, data.grade
        data.golds_parse = lambda answers: [False, *golds(answers)[1:]]
        data.grade = lambda *args, **kwargs: ([g._replace(reward=0.0) for g in grades(*args, **kwargs)[0]], 0)
    if world.rank == 1 and fault in ("fewer", "other", "none"):
        whole, kept = data.read_rows, {"fewer": slice(1, None), "other": slice(None, None, -1), "none": slice(0)}[fault]
        data.read_rows = lambda names, split: whole(names, split)[kept]

    run = config.RunConfig(model="tiny", data="tiny/train.jsonl", test_data="")
    cfg = SimpleNamespace(run=run, max_completion_tokens=200, group_size=1)
    train, _ = common.load_data(cfg, common.load_tokenizer("tiny"), common.math_reward, require_expert=True)
    print(f"rank {world.rank} has {len(train)} problems {cfg.run.data_hash}\n", end="", flush=True)
    common.shutdown()
