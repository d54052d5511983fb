"""What `updates` of a test module returns on many ranks: torchrun update_worker.py MODULE FILE."""

import importlib
import sys

import torch
from conftest import ROOT  # noqa: F401  puts the root on sys.path

import common

if __name__ == "__main__":
    module, file = sys.argv[1:]
    world = common.init(0)
    found = importlib.import_module(module).updates()
    if world.rank == 0:
        torch.save(found, file)
    common.shutdown()
