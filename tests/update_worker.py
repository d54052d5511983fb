"""One update of every method on this many ranks, the clipped gradients into a file: torchrun update_worker.py PROBLEMS FILE."""

import sys

import pytest
import torch
from test_method_updates import METHODS, update

import common
import relift


def main() -> None:
    dist, found = common.init(0), {}
    runs = METHODS | {"relift": (relift, {"buffer_size": 1, "sft_entropy_coef": 0.0, "lr": 0.0, "weight_decay": 0.0}, None)}
    with pytest.MonkeyPatch.context() as patch:
        for method, (module, flags, _) in runs.items():
            flags = (
                {"problems_per_step": int(sys.argv[1]), "sft_problems_per_step": 3}
                if method == "chord"
                else flags | {"problems_per_step": int(sys.argv[1])}
            )
            found[method] = update(module, patch, tokens_per_microbatch=60, **flags)[0]
    if dist.rank == 0:
        torch.save(found, sys.argv[2])
    common.shutdown()


if __name__ == "__main__":
    main()
