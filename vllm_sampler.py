"""The sampler on vLLM: one engine in each training process, or one over several ranks, sharing the device with the trainer.

It has the interface of common.Sampler. `sleep` frees the device for the update, `sync` and `generate` wake what they need.
Measured with vllm 0.32.0. What the code below guards against, each a published bug:
- the prefix cache keeps what the old weights computed: sync drops it, and vLLM must confirm;
- a tied head packed on the CPU is a copy that a reload forgets: it is packed again;
- a weight that never reaches the engine is silent garbage: sync compares the names on both sides;
- raw log-probabilities ignore the temperature: the engine returns processed ones.
"""

import gc
import os
from collections.abc import Iterable

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process, and so sees the weights
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch  # noqa: E402
import torch.distributed as td  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import common  # noqa: E402

if not torch.cuda.is_available():
    torch._dynamo.config.disable = True  # the log-probability helpers are compiled even in eager mode, ten seconds for nothing

import vllm  # noqa: E402

CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
CPU |= {"enable_chunked_prefill": False}  # a chunk breaks seeded requests there


class VLLMSampler(common.Sampler):
    """Generates with vLLM. Ranks [0, tensor_parallel), [tensor_parallel, 2 tensor_parallel), ... share an engine each."""

    def __init__(
        self,
        name: str,
        tokenizer: transformers.PreTrainedTokenizerBase,
        dist: common.Dist,
        max_tokens: int,  # of prompt and completion
        memory: float,  # share of the device for the engine, weights included; on a CPU the cache has 256 MiB
        tensor_parallel: int,
    ):
        if dist.world_size % tensor_parallel:
            common.fail(f"--tensor_parallel {tensor_parallel} does not divide {dist.world_size} processes")
        self.tokenizer, self.dist, self.max_tokens, self.asleep = tokenizer, dist, max_tokens, set()
        folder, cuda = common.resolve_model(name), dist.device.type == "cuda"
        config = common.stretch(transformers.AutoConfig.from_pretrained(folder))
        changed, window = any(common.CONTEXT.values()), getattr(config, "max_position_embeddings", max_tokens)
        if window < max_tokens:
            common.fail(
                f"--sampler vllm: prompt and completion have up to {max_tokens} tokens, the window of {name} is {window}; lower "
                "--max_completion_tokens, or stretch it with --rope_theta and --max_positions"
            )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        self.shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
        try:
            generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except OSError:  # there is no such file: as transformers does
            generation_config = model.generation_config
        self.stop_ids = common.stop_ids(tokenizer, generation_config)
        groups = [list(range(first, first + tensor_parallel)) for first in range(0, dist.world_size, tensor_parallel)]
        self.peers = [td.new_group(ranks) for ranks in groups][dist.rank // tensor_parallel] if tensor_parallel > 1 else None
        self.engine = vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            hf_overrides={name: getattr(config, name) for name in ("rope_parameters", "max_position_embeddings") if changed},
            use_tqdm_on_load=False,
            generation_config="vllm",  # the model's own top_p or top_k would bias the ratio
            dtype="bfloat16" if cuda else "float32",
            max_model_len=max_tokens,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            seed=dist.rank // tensor_parallel,
            logprobs_mode="processed_logprobs",  # after the temperature, as the trainer computes them
            enable_prefix_caching=True,  # a hint that many rows share is computed once
            **(
                {"enable_sleep_mode": True, "gpu_memory_utilization": memory}
                if cuda
                else CPU | {"max_num_batched_tokens": 2**13 + max_tokens}
            ),
        )
        common.before_shutdown.append(self.engine.llm_engine.engine_core.shutdown)  # takes its groups along, and the default one
        self.names = {key for key, _ in self.inner.named_parameters()}

    @property
    def inner(self) -> nn.Module:
        return self.engine.apply_model(lambda model: model)[0]

    def sleep(self) -> None:
        """Leave the device to the update: weights to the host, cache dropped. Peers are served until they sleep (collective)."""
        while self.peers is not None and self._serve(None) is not None:
            pass
        if not self.asleep:  # on a CPU vLLM keeps the memory, but goes through the same states
            self.engine.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def _wake(self, *tags: str) -> None:
        needed = [tag for tag in tags if tag in self.asleep]
        if needed:
            gc.collect()
            torch.cuda.empty_cache()
            self.engine.wake_up(needed)
            self.asleep -= set(needed)

    @torch.no_grad()
    def sync(self, weights: common.Policy | Iterable[tuple[str, Tensor]]) -> None:
        """Stream the trained weights into the engine, one tensor at a time, and drop the prefix cache (collective)."""
        self._wake("weights")
        sent, loaded, inner = set(), set(), self.inner

        def stream():
            for name, tensor in common.named_weights(weights) if isinstance(weights, common.Policy) else weights:
                if self.shapes.get(name) != tensor.shape:
                    raise RuntimeError(f"the sampler has no parameter {name} of shape {tuple(tensor.shape)}")
                sent.add(name)
                yield name, tensor

        load = inner.load_weights
        inner.load_weights = lambda iterator: loaded.update(load(iterator))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
        del inner.load_weights
        missing = (self.shapes.keys() - sent) | (self.names - loaded)
        if missing:
            raise RuntimeError(f"parameters of the sampler were not updated: {sorted(missing)[:4]}")
        for module in inner.modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():  # a tied head: packed from the old embedding
                module.quant_method.process_weights_after_loading(module)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache")

    def generate(
        self,
        problems: list[common.Problem],
        prefixes: list[list[int]] | None,
        n: int,
        max_tokens: int,
        temperature: float,
        seed: tuple[int, ...],
        top_p: float = 1.0,
    ) -> list[list[common.Rollout]]:
        """As common.Sampler.generate. Every rank of a shared engine calls it, or sleep."""
        prefixes = common.check_prefixes(problems, prefixes, max_tokens)
        requests = []
        for problem, prefix in zip(problems, prefixes, strict=True):
            prompt = [*problem.prompt_ids, *prefix]
            room = max_tokens - len(prefix)
            if len(prompt) + room > self.max_tokens:
                raise ValueError(f"{problem.id}: {len(prompt)} tokens and {room} to come are over the engine's {self.max_tokens}")
            params = vllm.SamplingParams(
                n=n if temperature else 1,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                seed=common.group_seed(seed, problem.id),
                max_tokens=room,
                stop_token_ids=self.stop_ids,
                logprobs=0,
                detokenize=False,
            )
            requests.append((prompt, params))
        groups = []
        for problem, prefix, made in zip(problems, prefixes, self._serve(requests), strict=True):
            rows = made * (1 if temperature else n)  # greedy: n times the same
            group = [common.Rollout(problem, [*prefix, *ids], len(prefix), list(logprobs)) for ids, logprobs in rows]
            groups.append(group)
        return self.finish(groups)

    def _serve(self, requests: list | None) -> list[list[tuple[list[int], list[float]]]] | None:
        """(token ids, log-probabilities) per request and sample; None when no rank of the engine had any but None."""
        parts: list = [requests]
        if self.peers is not None:
            parts = [None] * td.get_world_size(self.peers)
            td.all_gather_object(parts, requests, group=self.peers)
            if all(part is None for part in parts):
                return None
        self._wake("weights", "kv_cache")
        flat = [request for part in parts for request in part or []]
        outputs = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in flat], [params for _, params in flat], use_tqdm=False
        )
        first = sum(len(part or []) for part in parts[: td.get_rank(self.peers) if self.peers else 0])
        return [
            [
                (list(row.token_ids), [at[token].logprob for at, token in zip(row.logprobs, row.token_ids, strict=True)])
                for row in output.outputs
            ]
            for output in outputs[first : first + len(requests or [])]
        ]
