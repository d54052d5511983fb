"""A run that meets a fault: damage_worker.py FAULT SCRIPT FLAGS, as `python SCRIPT.py FLAGS`."""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

import common  # noqa: E402
from core import records  # noqa: E402


def out_of_memory(*args: object, **kwargs: object) -> None:
    """As the allocator of CUDA says it."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def cut_short(*args: object, checkpoint_id: Path) -> None:
    """A file system that loses the end of the last file at the third save, without a word."""
    whole_save(*args, checkpoint_id=checkpoint_id)
    if checkpoint_id.name.startswith("00000003") and int(os.environ.get("RANK", 0)) == 0:
        path = max(checkpoint_id.glob("*.distcp"))
        os.truncate(path, path.stat().st_size - 1000)


if __name__ == "__main__":
    fault, script = sys.argv[1:3]
    sys.argv[:3] = [f"{script}.py"]
    module, whole_save = importlib.import_module(script), dcp.save
    patched = {
        "rollouts": (common.Sampler, "generate", out_of_memory),
        "update": (common, "clip_gradients", out_of_memory),
        "loading": (common, "load_policy", out_of_memory),
        "bug": (common, "draw", lambda *args: [][0]),
        "cut": (records.dcp, "save", cut_short),
    }[fault]
    setattr(*patched)
    module.main(common.parse(module.Config))
