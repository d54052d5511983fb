"""What ranks do for each other: torchrun ready_worker.py weights|slow|dead [folder]."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import common  # noqa: E402
from core import processes  # noqa: E402

if __name__ == "__main__":
    what, processes.PATIENCE = sys.argv[1], 1.0
    world = common.init(0)
    if what == "weights":
        run = common.RunConfig(model=sys.argv[2])
        stock = common.load_model(run)
        if world.rank:
            transformers.PreTrainedModel.from_pretrained = None  # it reads no file
        policy = common.load_policy(run, world)
        for name, weight in common.named_weights(policy):
            assert torch.equal(weight, stock.get_parameter(name)), name
        for name, buffer in policy.model.named_buffers():
            assert torch.equal(buffer, stock.get_buffer(name)), name
        shards = sum(p.to_local().numel() for p in policy.parameters())
        assert shards < 0.6 * sum(p.numel() for p in stock.parameters())
        tied = stock.get_input_embeddings().weight is stock.get_output_embeddings().weight
        assert tied == (policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight)
    elif what == "slow":
        processes.doing[:] = ("update", "rollouts")[world.rank], time.perf_counter()
        time.sleep(8 * world.rank)
    elif world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    common.all_sum(torch.ones(1), world)
    print(f"rank {world.rank} is done\n", end="", flush=True)
    common.shutdown()
