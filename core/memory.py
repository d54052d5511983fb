"""What an update will need of a GPU, by arithmetic; bench.py --what memory measures it."""

import torch
import transformers
from torch import nn

from core.config import RunConfig
from core.processes import World, fail, print0

GIB = 2**30


def step_bytes(model: nn.Module, gpus: int, tokens: int, checkpointed: bool, rank: int = 0) -> tuple[float, float]:
    """(weights, gradients and Adam; all of an update) of one GPU, for a model on any device.

    fp32 masters, bf16 compute; at a LoRA rank the model is frozen in bf16 and the adapter trains.
    """
    config, layers = model.config.get_text_config(), model.get_decoder().layers
    whole, layer = (sum(p.numel() for p in part.parameters()) for part in (model, layers[0]))
    linear = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    adapter = sum(rank * (m.in_features + m.out_features) for m in linear)
    states = (16 * adapter + 2 * whole if rank else 16 * whole) / gpus
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 4 * head * (config.num_attention_heads + config.num_key_value_heads)  # q, k, v and the output
    saved = 16 * hidden + attention + 8 * inner  # of a token in a layer: norms in fp32, four tensors of the MLP
    kept = tokens * len(layers) * (2 * hidden if checkpointed else saved)
    a_layer = tokens * (6 * inner + 10 * hidden + (saved if checkpointed else 0))  # in its backward
    the_head = 14 * 2**26 + 4 * config.vocab_size * hidden  # 2^26 logits and their gradient; the weight's twice
    gathered = 2 * (whole - layer * (len(layers) - 2)) + (0 if rank else 4 * layer)  # root, two layers; gradients
    return states, states + kept + max(a_layer, the_head) + gathered


def announce(run: RunConfig, config: transformers.PretrainedConfig, world: World) -> None:
    """Say what an update needs and a GPU has, and the flags with which it would fit; end the run
    where weights, gradients and Adam alone do not. Nothing is said of a CPU.
    """
    if world.device.type == "cpu":
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    has, rank = torch.cuda.mem_get_info(world.device)[1] - 2 * GIB, run.lora_rank  # less CUDA's own
    asked = (world.size, run.tokens_per_microbatch or 2**14, run.checkpoint_activations, rank)
    states, needs = step_bytes(model, *asked)
    said = f"an update of {run.model} on {world.size} GPU needs about {needs / GIB:.0f} GiB of each"
    said += f" ({states / GIB:.0f} for weights, gradients and Adam), and {has / GIB:.0f} are there"
    if needs <= has:
        return print0(f"memory: {said}")
    ways = {"--checkpoint_activations": (*asked[:2], True, rank)}
    ways |= {f"--tokens_per_microbatch {n}": (asked[0], n, True, rank) for n in (2**13, 2**12, 2**11)}
    ways |= {"--lora_rank 32": (*asked[:2], True, 32)}
    ways |= {f"{n} GPU": (n, asked[1], True, rank) for n in range(world.size + 1, 257)}
    fit = [way for way, sizes in ways.items() if step_bytes(model, *sizes)[1] <= has]
    fit = fit[:1] if "--checkpoint_activations" in fit else fit  # it changes nothing but time
    kinds = {way.strip("0123456789"): way for way in reversed(fit)}  # the first of each kind
    said += f"; it fits with {' or '.join(reversed(kinds.values())) or 'no flag'}"
    if states > has:
        fail(said)
    print0(f"WARNING, this will run out of memory: {said}")
