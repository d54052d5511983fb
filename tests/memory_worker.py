"""Peaks of a step with fake and with real tensors, as a JSON line: memory_worker.py METHOD"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib  # noqa: E402

import transformers  # noqa: E402

from core.config import with_flags  # noqa: E402
from results import memory  # noqa: E402

method = sys.argv[1]
config = transformers.Qwen2Config(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
cfg = with_flags(importlib.import_module(method).Config(), {"tokens_per_microbatch": 2048})
found = [memory.run_step(method, cfg, config, 1, fake=fake, cuda=False) for fake in (True, False)]
print(json.dumps([{phase: sum(kinds.values()) for phase, kinds in run.items()} for run in found]))
