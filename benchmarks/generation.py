"""Writing beside transformers' generate: the same weights, prompts and lengths, in turns in one process: python -m benchmarks.generation

Theirs is Qwen3ForCausalLM.generate with its cache, sampling, top_k=0. `canvas` is our own slow path, for scale.
"""
import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig

from lmtrain.generation import generate
from lmtrain.model import Size, Transformer, to_transformers

SIZES = {"1.1M": Size(2048, 128, 2, layers=4, length=256), "9.6M": Size(2048, 384, 6, layers=5, length=256)}


def rounds(jobs: dict[str, Callable[[], int]], times: int) -> dict[str, list[float]]:
    "Seconds a token of each job, round by round; a job returns how many tokens it wrote."
    out: dict[str, list[float]] = {n: [] for n in jobs}
    for r in range(times + 1):
        for name, job in jobs.items():
            began = time.perf_counter(); n = job(); took = time.perf_counter() - began
            if r: out[name].append(took / n)               # the first round warms up
    return out


def case(title: str, model: Transformer, prompts: list[list[int]], new: int, times: int, ends: float = 0.0) -> None:
    "One line: tokens a second of both, and the median over rounds of their ratio."
    net, stops = to_transformers(model), list(range(2, 2 + round(ends * model.size.vocab)))
    if ends:                                               # all tokens are equally likely, and some of them end a text
        net.get_parameter("lm_head.weight").data.zero_(); model.get_parameter("head.weight").data.zero_()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    how = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=stops or None)
    def theirs() -> int:
        out = net.generate(ids, attention_mask=mask, generation_config=how)[:, longest:]
        return int((out != 0).sum()) if stops else out.numel()
    end = (lambda ids: ids[-1] in stops) if stops else None
    def ours() -> int: return int((generate(model, prompts, new, stop=end, seed=len(prompts)).when > 0).sum())
    t = rounds({"theirs": theirs, "ours": ours}, times)
    ratios = sorted(a / b for a, b in zip(t["theirs"], t["ours"], strict=True))
    speed = [1 / statistics.median(t[n]) for n in ("theirs", "ours")]
    print(f"{title:46}{speed[0]:10,.0f}{speed[1]:10,.0f}{statistics.median(ratios):8.2f}   {ratios[0]:.2f}-{ratios[-1]:.2f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--new", type=int, default=128); p.add_argument("--rounds", type=int, default=4)
    a = p.parse_args()
    dice = torch.Generator().manual_seed(0)
    prompt = lambda n: torch.randint(3, 2048, (n,), generator=dice).tolist()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {a.new} new tokens, {a.rounds} rounds\n"
          f"{'':46}{'theirs/s':>10}{'ours/s':>10}{'ratio':>8}   spread")
    for name, size in SIZES.items():
        torch.manual_seed(0)
        model = Transformer(size).eval()
        case(f"{name}, 64 prompts of 16", model, [prompt(16) for _ in range(64)], a.new, a.rounds)
        case(f"{name}, 1 prompt of 16", model, [prompt(16)], a.new, 3 * a.rounds)
        if name == "1.1M":
            case(f"{name}, 64 prompts of 1 to 16", model, [prompt(1 + k % 16) for k in range(64)], a.new, a.rounds)
            case(f"{name}, 4 prompts of 96, 16 texts each", model, [q for q in [prompt(96) for _ in range(4)] for _ in range(16)], a.new, a.rounds)
            case(f"{name}, 64 prompts, a token in 64 ends", model, [prompt(16) for _ in range(64)], a.new, a.rounds, 1 / 64)


if __name__ == "__main__": main()
