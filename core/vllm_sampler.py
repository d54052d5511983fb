"""The engine on vLLM: one in each training process or over several ranks, on the trainer's device.

It has the methods of core/sampler.py's engine: `sleep` frees the device for the update, `sync` and
`decode` wake what they need. Measured with vllm 0.32.0. It guards against published bugs:
- the prefix cache keeps what the old weights computed: sync drops it, and vLLM must confirm;
- a tied head packed on the CPU is a copy that a reload forgets: it is packed again;
- a weight that never reaches the engine is silent garbage: sync compares the names on both sides;
- raw log-probabilities ignore the temperature: the engine returns processed ones.
"""

import gc
import os
from collections.abc import Iterable, Iterator

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process, and so sees the weights
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from core.config import RunConfig, resolve_model  # noqa: E402
from core.model import Policy, Tokenizer, load_config, named_weights  # noqa: E402
from core.processes import WAIT, World, before_shutdown, fail  # noqa: E402
from core.sampler import Sampled, stop_ids  # noqa: E402

if not torch.cuda.is_available():
    torch._dynamo.config.disable = True  # the log-probability helpers are compiled even in eager mode: ten seconds

import vllm  # noqa: E402

CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
CPU |= {"enable_chunked_prefill": False}  # a chunk breaks seeded requests there


class VLLMEngine:
    """Ranks [0, tensor_parallel), [tensor_parallel, 2 tensor_parallel), ... share an engine."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer, world: World, max_tokens: int):
        """max_tokens: of prompt and completion."""
        size = run.tensor_parallel  # ranks that share an engine
        if world.size % size:
            fail(f"--tensor_parallel {size} does not divide {world.size} processes")
        folder, config, self.max_tokens, self.asleep = resolve_model(run.model), load_config(run), max_tokens, set()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        self.shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
        try:
            generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except OSError:  # there is no such file: as transformers does
            generation_config = model.generation_config
        self.stop_ids = stop_ids(tokenizer, generation_config)
        shares = [range(first, first + size) for first in range(0, world.size, size)]
        groups = [dist.new_group(list(ranks), WAIT) for ranks in shares if size > 1]
        self.peers = groups[world.rank // size] if groups else None
        changed = ("rope_parameters", "max_position_embeddings") if run.rope_theta or run.max_positions else ()
        room = {"enable_sleep_mode": True, "gpu_memory_utilization": run.sampler_memory}
        cuda = world.device.type == "cuda"
        self.dtype, self.seeded = torch.bfloat16 if cuda else torch.float32, run.deterministic or not cuda
        self.synced = self.lost = False  # weights have come by a sync; they are dropped and have not come again
        self.engine = vllm.LLM(
            folder,
            load_format="safetensors",
            skip_tokenizer_init=True,
            hf_overrides={name: getattr(config, name) for name in changed},
            use_tqdm_on_load=False,
            generation_config="vllm",  # the model's own top_p or top_k would bias the ratio
            dtype=self.dtype,
            max_model_len=max_tokens,
            tensor_parallel_size=size,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            seed=world.rank // size,
            logprobs_mode="processed_logprobs",  # after the temperature, as the trainer computes them
            enable_prefix_caching=True,  # a hint that many rows share is computed once
            **(room if cuda else CPU | {"max_num_batched_tokens": 2**13 + max_tokens}),
        )
        before_shutdown.append(self.engine.llm_engine.engine_core.shutdown)  # it takes the default process group along
        self.names = {key for key, _ in self.inner.named_parameters()}

    @property
    def inner(self) -> nn.Module:
        """vLLM's own copy of the model."""
        return self.engine.apply_model(lambda model: model)[0]

    def sleep(self) -> None:
        """Drop the cache, and the weights, which the next sync brings; those that it never brought
        go to the host. Serves its peers until they sleep (collective).
        """
        while self.peers is not None and self._serve(None) is not None:
            pass
        if not self.asleep:  # on a CPU vLLM keeps the memory, but goes through the same states
            self.engine.sleep(level=2 if self.synced else 1)
            self.asleep, self.lost = {"weights", "kv_cache"}, self.synced

    def _wake(self, *tags: str) -> None:
        if needed := [tag for tag in tags if tag in self.asleep]:
            gc.collect()
            torch.cuda.empty_cache()
            self.engine.wake_up(needed)
            self.asleep -= set(needed)

    @torch.no_grad()
    def sync(self, weights: Policy | Iterable[tuple[str, Tensor]]) -> None:
        """Stream the weights in tensor by tensor and drop the prefix cache (collective)."""
        self._wake("weights")
        left, loaded, inner = dict(self.shapes), set(), self.inner

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named_weights(weights, self.dtype) if isinstance(weights, Policy) else weights:
                if left.pop(name, None) != tensor.shape:
                    raise RuntimeError(f"the sampler has no parameter {name} of shape {tuple(tensor.shape)}")
                yield name, tensor

        load = inner.load_weights
        inner.load_weights = lambda iterator: loaded.update(load(iterator))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
        del inner.load_weights
        if missing := left.keys() | (self.names - loaded):
            raise RuntimeError(f"parameters of the sampler were not updated: {sorted(missing)[:4]}")
        for module in inner.modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():  # a tied head: packed from the old embedding
                module.quant_method.process_weights_after_loading(module)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache")
        self.synced, self.lost = True, False

    def decode(self, prompts, prefixes, n, max_tokens, temperature, seeds, top_p) -> list[list[Sampled]]:
        """As TransformersEngine.decode. Every rank of a shared engine calls it, or sleep."""
        longest = max(map(len, prompts), default=0)
        if longest + max_tokens > self.max_tokens:
            raise ValueError(f"a prompt of {longest} tokens and {max_tokens} are over the engine's {self.max_tokens}")
        shared = {"n": n if temperature else 1, "temperature": temperature, "top_p": top_p, "top_k": 0}
        shared |= {"stop_token_ids": self.stop_ids, "logprobs": 0, "detokenize": False}
        requests = []
        for prompt, prefix, seed in zip(prompts, prefixes, seeds, strict=True):
            own = seed if self.seeded else None  # of each request: vLLM draws its tokens one by one
            params = vllm.SamplingParams(seed=own, max_tokens=max_tokens - len(prefix), **shared)
            requests.append(({"prompt_token_ids": [*prompt, *prefix]}, params, seed))
        return [made * (1 if temperature else n) for made in self._serve(requests)]  # greedy: n times the same

    def _serve(self, requests: list | None) -> list[list[Sampled]] | None:
        """What each request samples; None once every rank of the engine passes None (sleeps)."""
        parts: list = [requests]
        if self.peers is not None:
            parts = [None] * dist.get_world_size(self.peers)
            dist.all_gather_object(parts, requests, group=self.peers)
            if all(part is None for part in parts):
                return None
        if self.lost:
            raise RuntimeError("the sampler's weights were dropped for an update and have not come again: sync first")
        self._wake("weights", "kv_cache")
        asked = [request for part in parts for request in part or []]
        if asked and not self.seeded:  # one seed for all
            torch.manual_seed(asked[0][2])
            np.random.seed(asked[0][2] % 2**32)
        outputs = self.engine.generate([request[0] for request in asked], [r[1] for r in asked], use_tqdm=False)
        first = sum(len(part or []) for part in parts[: dist.get_rank(self.peers) if self.peers else 0])
        return [[sampled(row) for row in output.outputs] for output in outputs[first : first + len(requests or [])]]


def sampled(row: vllm.CompletionOutput) -> Sampled:
    """Token ids and the log-probability of each."""
    ids = list(row.token_ids)
    return ids, [at[token].logprob for at, token in zip(row.logprobs, ids, strict=True)]
