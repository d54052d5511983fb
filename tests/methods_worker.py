"""Train methods one after another: torchrun --nproc_per_node 2 methods_worker.py RUNS_JSON."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from conftest import train  # noqa: E402

import common  # noqa: E402

if __name__ == "__main__":
    common.init(0)
    for method, flags in json.loads(Path(sys.argv[1]).read_text()).items():
        train(method, *flags)
    common.shutdown()
