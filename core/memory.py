"""What a step will need of a GPU, by arithmetic from the shapes, said before anything is loaded.

python bench.py --what memory measures it; tests hold the two together.
"""

import torch
import transformers
from torch import nn

from core.config import RunConfig
from core.processes import World, fail, print0

GIB = 2**30


def step_bytes(model: nn.Module, gpus: int, tokens: int, checkpointed: bool, rank: int = 0) -> tuple[float, float]:
    """(weights, gradients and Adam; the whole update) of one GPU, for a model on any device.

    fp32 masters, bf16 compute; at a LoRA rank the model is frozen in bf16 and the adapter trains.
    """
    config, layers = model.config.get_text_config(), model.get_decoder().layers
    whole = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in layers[0].parameters())
    linear = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    trained = sum(rank * (m.in_features + m.out_features) for m in linear) if rank else whole
    states = (16 * trained + (2 * whole if rank else 0)) / gpus
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 4 * head * (config.num_attention_heads + config.num_key_value_heads)
    saved = (
        16 * hidden + attention + 8 * inner
    )  # of a token in a layer: norms in fp32, q k v and output, the MLP's four
    kept = 2 * hidden * len(layers) + saved if checkpointed else saved * len(layers)
    backward = max(tokens * (6 * inner + 10 * hidden), 2**29)  # of one layer; or logits of the head
    gathered = 2 * (whole - layer * (len(layers) - 2)) + 4 * layer  # the root and two layers; a layer's gradients
    return states, states + tokens * kept + backward + gathered


def announce(run: RunConfig, config: transformers.PretrainedConfig, world: World) -> None:
    """Say what an update needs and a GPU has, with the flags that would make it fit; end the run
    where weights, gradients and Adam alone do not. Of a CPU nothing is said: it has no such limit.
    """
    if world.device.type == "cpu":
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tokens, checkpointed = run.tokens_per_microbatch or 2**14, run.checkpoint_activations
    rank, has = getattr(run, "lora_rank", 0), torch.cuda.mem_get_info(world.device)[1] - 2 * GIB  # CUDA's own

    def fits(tokens: int = tokens, checkpointed: bool = checkpointed, gpus: int = world.size, rank: int = rank) -> bool:
        return step_bytes(model, gpus, tokens, checkpointed, rank)[1] <= has

    states, needs = step_bytes(model, world.size, tokens, checkpointed, rank)
    said = f"{run.model} on {world.size} GPU(s): an update needs about {needs / GIB:.0f} GiB on each, "
    said += f"{states / GIB:.0f} of them for weights, gradients and Adam, and {has / GIB:.0f} are there"
    if fits():
        return print0(f"memory: {said}")
    fewer = next((n for n in (2**13, 2**12, 2**11) if n < tokens and fits(n, True)), 0)
    helps = ["--checkpoint_activations"] if not checkpointed and fits(checkpointed=True) else []
    helps += [f"--checkpoint_activations --tokens_per_microbatch {fewer}"] if fewer and not helps else []
    helps += ["--lora_rank 32"] if hasattr(run, "lora_rank") and not rank and fits(checkpointed=True, rank=32) else []
    helps += [
        f"{n} GPUs"
        for n in [n for n in range(world.size, 257) if fits(checkpointed=True, gpus=n)][:1]
        if n > world.size
    ]
    said += f"; it fits with {' or '.join(helps) or 'a smaller model alone'}"
    if states > has:
        fail(said)
    print0(f"WARNING: out of memory ahead. {said}")
