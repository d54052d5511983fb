"""What the papers report, the command here that would reproduce it, and what that costs on GPUs.

python results/published.py          the table, as Markdown
python results/published.py write    into results/README.md; make results does it

Every accuracy is theirs, none is ours. The cost is arithmetic over the flags of the command:

    update   = trained tokens x N x (6 + 2 recomputed + 2 old log-probabilities + 2 reference) FLOPs
    sampling = decode steps x (weights read + DECODE_STEP) + cache read;  a call has as many decode
               steps as its longest row has tokens: the limit

N is the weights that multiply, tokens are rows x their mean. Left out: prompts, attention's own
products (5 % of a 7B's update at 4,000 tokens), sync, verifier, loading, checkpoints. A prefix
counts as if the policy had written it.
"""

import importlib
import sys
from dataclasses import dataclass
from math import ceil, log2, prod
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from results.memory import SHAPES  # noqa: E402
from results.methods import write  # noqa: E402

# Rates of one H100: MFU is measured (results/h100.md), what concerns sampling is assumed ---------
RATES = "one H100's update at 1.5 B weights as measured, and sampling as assumed"
PEAK, MFU = 989e12, 0.26  # FLOP/s in bf16; 29,153 tokens a second x 6 x 1.48e9: recomputation counts too
BANDWIDTH = 0.5 * 3.35e12  # bytes a second that decoding reads: half of the data sheet's
DECODE_STEP = 5e-3  # seconds of a decode step beside what it reads: scheduler, launches
MEMORY = 80e9  # bytes; --sampler_memory of them are the sampler's

# What no flag says --------------------------------------------------------------------------------
SHARE = 0.3  # mean of a row, as a share of the limit, where nobody says it
TRACE = 4000  # tokens of an OpenR1 trace: 2604.23747's 2.43e19 FLOPs of SFT / 6 N / 3 epochs of 45.7k
FAILED = 0.125  # of the groups: ReLIFT used 8k traces in 64k questions
PROBES = 0.82  # groups that BREAD probes for each of a step: on the tiny world, 40 steps
REDRAWS = 2.0  # groups that DAPO draws for each that it trains: as if half were mixed
TESTS = 500  # problems of an evaluation during training


@dataclass
class Paper:
    """What a paper reports of a method, in its own words, and how to run that here."""

    name: str  # of the file whose cost it is; the last of the stages
    what: str  # model and benchmarks
    theirs: str
    beside: str  # what they compare it with
    source: str
    commands: tuple[str, ...]  # of this repository, one a stage
    mean: int = 0  # tokens of a row of the policy, or of a trace where there is no policy; 0: SHARE of the limit
    why: str = "0.3 of the limit, assumed"  # that mean
    hours: str = "not said"  # GPU hours, theirs


LEGEND = f"""Accuracy in per cent. *Six*: AIME24, AIME25, AMC, MATH-500, Minerva, OlympiadBench; *five*: without AIME25.
AIME and AMC are avg@32 in most papers. *Reported*: read in a third party's notes, not in the paper. A run is scored by
`torchrun --nproc_per_node 8 eval.py --model runs/X/final --data aime24,aime25,amc23,math500,minerva,olympiad`, whose
AMC has 40 questions where LUFFY's has 83. Files without a slash are to be fetched first: UFT's Countdown, verl's
DAPO-Math-17k, levels 3 to 5 of MATH. GPU hours are an H100's: sampling + update; then sampled tokens a second and
GPU; then the mean of a row. Rates are {RATES}: an update at {100 * MFU:.0f} % of {PEAK / 1e12:.0f} TFLOP/s, decoding at
{BANDWIDTH / 1e12:.2f} TB/s and {1000 * DECODE_STEP:.0f} ms a step until the longest row of a call is at the limit."""

RUN, SIX, FIVE = "torchrun --nproc_per_node 8", "Qwen2.5-Math-7B, mean of six", "Qwen2.5-Math-7B, mean of five"
DATA = "--data Elliott/Openr1-Math-46k-8192 --test_data HuggingFaceH4/MATH-500"
THINK = f"--model Elliott/Qwen2.5-Math-7B-16k-think {DATA}"
STRETCHED = f"--model Qwen2.5-Math-7B --rope_theta 40000 --max_positions 16384 {DATA}"
VERL = "--grad_clip 0.016 --entropy_coef 0.00026 --tis_cap 0"  # what its forks' numbers are on our scale
SFT = f"{RUN} sft.py {THINK} --out runs/sft"
RL = f"{RUN} grpo.py --model runs/sft/final {DATA} --no-scale_by_std --clip_high 0.28 --updates_per_step 2 --tis_cap 0"

# fmt: off
PAPERS = [
    Paper("grpo", SIX, "45.5, LUFFY's on-policy RL; of Shao 2024 none at hand", "base 19.0", "LUFFY's table 1",
          (f"{RUN} grpo.py {THINK} --no-scale_by_std --loss_norm constant --updates_per_step 2 {VERL}",),
          2175, "ReLIFT's table, its RL", "320 A100, ReLIFT's RL, reported"),
    Paper("dapo", "Qwen2.5-32B, AIME24", "none at hand", "none at hand", "",
          ("torchrun --nnodes 2 --nproc_per_node 8 dapo.py --model Qwen2.5-32B --tensor_parallel 8 --tis_cap 0 "
           "--max_prompt_tokens 2048 --data dapo-math-17k.parquet --test_data HuggingFaceH4/aime_2024",)),
    Paper("dapo", "Qwen2.5-Math-7B, AIME24", "36.3", "none at hand", "verl's recipe; its 7B script redraws nothing",
          (f"{RUN} dapo.py --model Qwen2.5-Math-7B --max_positions 32768 --max_prompt_tokens 2048 "
           "--max_completion_tokens 8192 --overlong_cache 0.5 --resample_rounds 0 --zero_variance keep --steps 200 "
           "--tis_cap 0 --data dapo-math-17k.parquet --test_data HuggingFaceH4/aime_2024",)),
    Paper("sft", SIX, "52.2", "44.1 as LUFFY published it", "2604.23747, reported", (SFT,),
          TRACE, "of a trace, by its FLOPs", "192 A100, LUFFY's SFT"),
    Paper("sft then grpo", SIX, "57.0; after 50 RL steps at lr 5e-6 55.6; Llama-3.1-8B 43.7 of five",
          "SFT alone 52.2, LUFFY 50.1; HPT 21.5", "2604.23747, reported", (SFT, RL),
          4100, "1.20e19 FLOPs of 50 steps", "1040 A100, LUFFY's SFT+RL"),
    Paper("luffy", SIX, "50.1; run again by 2604.23747 46.3", "base 19.0, SFT 44.1, RL 45.5, SFT+RL 48.2", "table 1",
          (f"{RUN} luffy.py {THINK} {VERL}",), 2200, "2604.23747's 6.65e19 FLOPs", "616 A100"),
    Paper("srft", FIVE, "59.5; 59.1 in its abstract and table 3; of six 53.2, reported",
          "SFT 54.3 (47.3 in its table 1), RL 49.3, SFT+RL 54.5, LUFFY 55.5", "table 2",
          (f"{RUN} srft.py {THINK} --sft_coef 0.03 {VERL}",), hours="64 A100, hours not said"),
    Paper("relift", "Qwen2.5-Math-7B, five with AIME25 for Minerva, and MMLU-Pro",
          "52.6; of six 47.8, of five 54.0 as others quote it; run again by 2604.23747 48.8 in distribution",
          "SFT 49.0, RL 46.9, SFT+RL 50.8, LUFFY 50.9", "version 2, reported",
          (f"{RUN} relift.py {THINK} --steps 1070 --grad_clip 0.011 --sft_grad_clip 8 --entropy_coef 0.00026 "
           "--tis_cap 0",), 3000, "2604.23747's 8.76e19 FLOPs, if of 500 steps", "416 A100, reported"),
    Paper("prefix_rft", SIX, "51.8", "SFT 44.1, RL 45.5, SFT+RL 48.2, LUFFY 50.1: LUFFY's", "table 1, reported",
          (f"{RUN} prefix_rft.py {STRETCHED} --grad_clip 0.047 --entropy_coef 0.00026 --tis_cap 0",)),
    Paper("uft", "Qwen2.5-0.5B, Countdown; mean of its nine columns", "17.15; 9.45",
          "SFT+RL 17.45, RL 8.30, R3 9.99; SFT+RL 7.28, RL 3.25, R3 7.36", "table 2",
          ("torchrun --nproc_per_node 2 uft.py --model Qwen2.5-0.5B --data countdown_train.jsonl.gz "
           "--test_data countdown_test.jsonl.gz --tis_cap 0",), hours="2 H100, hours not said"),
    Paper("bread", "Qwen3-4B, avg@12 of AIME24, 25, 26 and HMMT",
          "43.33 by others, Qwen3-8B 42.67; the paper's tables not at hand: < 40 % of the traces, 3x faster than GRPO",
          "GRPO 38.44, LUFFY 38.72; GRPO 34.83, LUFFY 38.83", "ARG, 2026, table 7; data not at hand",
          (f"{RUN} bread.py --model Qwen3-4B {DATA} --problems_per_step 32 --steps 200 --warmup_steps 10 "
           "--clip_high 0.3",), 4900, "0.6 of the limit, assumed: it thinks"),
    Paper("bridge", "Qwen2.5-3B, mean of five (AMC23)", "36.0; 36.4 in version 1's table of costs",
          "SFT 27.9, RL 32.2, SFT+RL 32.2, CHORD 32.5", "version 3, reported; its batch, steps and traces not at hand",
          (f"{RUN} bridge.py --model Qwen2.5-3B --data math_levels_3_to_5.jsonl --test_data HuggingFaceH4/MATH-500",),
          hours="6.9 hours, GPUs not said"),
    Paper("chord", "Qwen2.5-7B-Instruct", "none at hand; as BRIDGE's baseline 32.5, Qwen3-8B 45.9",
          "BRIDGE 36.0, 49.9", "BRIDGE, version 3, reported",
          (f"{RUN} chord.py --model Qwen2.5-7B-Instruct {DATA} --max_completion_tokens 10240",)),
    Paper("hpt", SIX, "52.7; Llama-3.1-8B 21.5 of five", "its own not at hand; LUFFY 50.1, SRFT 53.2",
          "2604.23747, reported", (f"{RUN} hpt.py {STRETCHED} --sft_coef 0.12 --skip_above 1.25 {VERL}",)),
    Paper("trapo", FIVE, "56.6", "SFT 50.3, RL 50.4, SFT+RL 54.3, LUFFY 55.5", "reported; which five is not said",
          (f"{RUN} trapo.py {STRETCHED} --problems_per_step 128 --updates_per_step 2 --shares 0 0.2 0.5 1 "
           f"--thresholds -1 0.5 0.7 0.9 --lr 5e-6 {VERL}",)),
    Paper("iw_sft", "Qwen2.5-32B-Instruct, AIME24; GPQA-D", "66.7; 64.1",
          "SFT 56.7; 60.6, base 26.7; 49.0, by the reported gains", "abstract; rest reported",
          ("torchrun --nnodes 2 --nproc_per_node 8 iw_sft.py --model Qwen2.5-32B-Instruct --tensor_parallel 8 "
           "--loss_norm sequence --data simplescaling/s1K-1.1 --test_data HuggingFaceH4/aime_2024",),
          10000, "of a trace, half of the limit, assumed", "under 144 H100, reported"),
]
# fmt: on


def parse(command: str) -> tuple[str, object, int]:
    """(method, its Config, GPUs) of a command line, by the file's own flags."""
    before, _, flags = command.partition(".py ")
    *words, name = before.split()
    config = importlib.import_module(name).Config
    gpus = prod(int(word) for word in words if word.isdigit())  # --nnodes, --nproc_per_node
    return name, tyro.cli(config, args=flags.split(), config=(tyro.conf.OmitArgPrefixes,)), gpus


def step_tokens(name: str, cfg, mean: float, trace: float) -> tuple[float, float, int]:
    """(sampled tokens, trained tokens, generate calls) of a step, over all ranks."""
    one, traces = cfg.problems_per_step * mean, cfg.problems_per_step * trace
    own, taught = one * getattr(cfg, "group_size", 0), trace * getattr(cfg, "sft_problems_per_step", 0)
    draws = REDRAWS if getattr(cfg, "resample_rounds", 0) else 1.0
    offline, one_row = (0.0, traces, 0), (own - one, own - one + traces, 1)
    return {
        "sft": offline,
        "iw_sft": offline,
        "dapo": (own * draws, own, ceil(draws)),
        "luffy": one_row,
        "srft": one_row,
        "relift": (own, own + FAILED * traces, 1),
        "hpt": (own, own * (1 - FAILED) + FAILED * traces, 1),
        "bread": (own * (1 + PROBES), own, 1 + ceil(log2(getattr(cfg, "num_episodes", 1)))),
        "trapo": (own, own, 4),  # micro-groups, one after the other
        "chord": (own, own + taught, 1),
        "bridge": (own, 2 * own + taught, 1),  # twice: the shadow's pass
    }.get(name, (own, own, 1))


def hours(command: str, model: str, mean: float) -> tuple[float, float, float]:
    """(GPU hours of sampling, of the update, sampled tokens) of a command; model as in SHAPES."""
    name, cfg, gpus = parse(command)
    layers, hidden, wide, heads, key_heads, vocab, _, head = SHAPES[model]
    weights = layers * (2 * hidden * (heads + key_heads) * head + 3 * hidden * wide) + vocab * hidden
    limit = cfg.max_completion_tokens
    mean = mean or SHARE * limit
    trace = min(TRACE, limit / 2) if hasattr(cfg, "group_size") else mean
    sampled, trained, calls = step_tokens(name, cfg, mean, trace)
    forwards = (getattr(cfg, "updates_per_step", 1) > 1) + bool(getattr(cfg, "kl_coef", name == "iw_sft"))
    flops = trained * cfg.steps * weights * (6 + 2 * cfg.run.checkpoint_activations + 2 * forwards)
    evaluations = cfg.steps // cfg.run.eval_every + 1
    calls, tokens = calls * cfg.steps + evaluations, sampled * cfg.steps + evaluations * TESTS * mean
    cache, held = 4 * layers * key_heads * head, 2 * weights / cfg.run.tensor_parallel  # bytes: of a token, of a GPU
    fit = (cfg.run.sampler_memory * MEMORY - held) / (cache * mean / 2)  # rows that a GPU holds at once
    steps, read = max(calls * limit, tokens / gpus / fit), tokens / gpus * mean / 2 * cache
    seconds = steps * (held / BANDWIDTH + DECODE_STEP) + read / BANDWIDTH
    return gpus * seconds / 3600, flops / (PEAK * MFU) / 3600, tokens


def line(paper: Paper) -> str:
    """A row of the table."""
    (model,) = [name for name in SHAPES if name in " ".join(paper.commands).replace("-Math", "")]
    costs = [hours(command, model, TRACE if command == SFT else paper.mean) for command in paper.commands]
    sampling, update, tokens = map(sum, zip(*costs, strict=True))
    _, cfg, _ = parse(paper.commands[-1])
    length = f"{paper.mean or SHARE * cfg.max_completion_tokens:,.0f} tokens ({paper.why})"
    cost = f"**{sampling + update:,.0f}** = {sampling:,.0f} + {update:,.0f}; {tokens / sampling / 3600:,.0f}; {length}"
    commands = "<br>then ".join(f"`{command}`" for command in paper.commands)
    theirs = f"{paper.theirs} ({paper.source})" if paper.source else paper.theirs
    return f"| {paper.name} | {paper.what} | {theirs} | {paper.beside} | {commands} | {cost} | {paper.hours} |"


def page() -> str:
    """The table with its legend, as Markdown."""
    head = "| method | model, benchmark | they report | and beside it | command here | GPU hours here | and theirs |"
    return "\n".join([LEGEND, "", head, "|---" * 7 + "|", *map(line, PAPERS)]) + "\n"


def main() -> None:
    if sys.argv[1:] != ["write"]:
        return print(page(), end="")
    write("results/README.md", "published", page())


if __name__ == "__main__":
    main()
