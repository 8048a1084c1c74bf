"""What one GPU makes of a step and of writing: one script, at most eight minutes, no network: python -m benchmarks.gpu

Random tokens, bf16 products, AdamW. Each line: milliseconds a step, the share of the speed of a large matrix product
measured here, the most memory, and, where there is one, the ratio to transformers' Qwen3 trained by hand. On a machine
without a GPU only `--toy` runs, and says nothing about speed.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lmtrain.batch import Batch, Example, Noise, collate
from lmtrain.generation import generate
from lmtrain.model import Size, Transformer, config_of
from lmtrain.objective import CLM, Objective
from lmtrain.objectives.diffusion import BlockDiffusion, Diffusion
from lmtrain.objectives.masked import MLM
from lmtrain.optim import adamw
from lmtrain.train import Task

SIZES = {"34M": (Size(16384, 512, 8, layers=8, length=1024), 32), "124M": (Size(32768, 768, 12, layers=12, length=1024), 16)}
TOY = {"toy": (Size(256, 32, 2, layers=2, length=64), 2)}


def now(device: str) -> float:
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(f: Callable[[], object], device: str, times: int) -> float:
    for _ in range(3): f()
    took = []
    for _ in range(times): began = now(device); f(); took.append(1e3 * (now(device) - began))
    return statistics.median(took)


def peak(device: str) -> float:
    "Operations a second of a large product in bf16 (float32 on a CPU)."
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device, 10) * 1e3


def flops(size: Size, tokens: int, T: int, causal: bool) -> float:
    "Operations of a training step: 6 a weight and token, and the attention's products (half of them if causal)."
    layer = 2 * size.dim * size.heads * size.head_dim + 2 * size.dim * size.kv * size.head_dim + 3 * size.dim * size.ff
    return 6 * tokens * (size.layers * (layer + (1 if causal else 2) * T * size.heads * size.head_dim) + size.dim * size.vocab)


def batches(size: Size, rows: int) -> dict[str, tuple[Objective, Batch]]:
    "The kinds of steps: an objective, and its batch on the CPU."
    T, V, dice = size.length, size.vocab, torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(7, V - 1, (n,), generator=dice).tolist()
    whole = collate([Example(draw(T), index=i) for i in range(rows)])
    packed = collate([Example(draw(T // 4), index=i) for i in range(4 * rows)], T, pack=True)
    half = collate([Example(draw(T // 2), index=i) for i in range(rows)])              # a block row is read twice
    M, O = V - 1, range(7, V - 1)
    asked = {"CLM": (CLM(), whole), "MLM": (MLM(M, O), whole), "diffusion": (Diffusion(M), whole), "block diffusion": (BlockDiffusion(M, 16), half), "CLM, packed": (CLM(), packed)}
    return {n: (o, o.corrupt(b, Noise())) for n, (o, b) in asked.items()}


def step_of(task: Callable, optimizer: torch.optim.Optimizer, objective: Objective, b: Batch) -> Callable[[], None]:
    count = int(sum(objective.count(b).values()))
    def step() -> None:
        loss = sum(task(b).values()) / count
        loss.backward(); optimizer.step(); optimizer.zero_grad()  # type: ignore[union-attr]
    return step


def theirs(size: Size, b: Batch, device: str, how: dict) -> Callable[[], None]:
    "transformers' Qwen3 with the same arithmetic, by hand: causal, the loss of every token."
    from transformers import Qwen3ForCausalLM
    torch.manual_seed(0)
    net: nn.Module = Qwen3ForCausalLM(config_of(size)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device == "cuda")
    run = torch.compile(net, **how) if how else net
    def step() -> None:
        with torch.autocast(device, torch.bfloat16): loss = run(input_ids=b.ids, labels=b.ids, use_cache=False).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    return step


def steps(name: str, size: Size, rows: int, device: str, top: float, times: int, compiled: dict | None) -> None:
    "A line for each kind of step."
    for kind, (objective, made) in batches(size, rows).items():
        for how in ({}, *([compiled] if compiled else [])):
            torch.manual_seed(0)
            b = made.to(device)
            task: Callable = Task(Transformer(size).to(device), objective, True)
            optimizer = adamw(task, 1e-4)  # type: ignore[arg-type]
            if device == "cuda": torch.cuda.reset_peak_memory_stats()
            ms = median_ms(step_of(torch.compile(task, **how) if how else task, optimizer, objective, b), device, times)
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            share = flops(size, b.ids.numel(), b.ids.shape[1], kind.startswith("CLM")) / ms * 1e3 / top
            ratio = median_ms(theirs(size, b, device, how), device, times) / ms if kind == "CLM" else 0.0
            print(f"{name:6}{kind:18}{'compiled' if how else 'eager':10}{ms:9.1f} ms{share:8.1%} of the product{memory:8.1f} GiB" + (f"{ratio:8.2f}x transformers" if ratio else ""), flush=True)
            del task, optimizer


def writing(name: str, size: Size, device: str, rows: int, new: int) -> None:
    "Tokens a second of 64 rows, in bf16 and float32, twice: the second time no length is new."
    for kind in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = Transformer(size).to(device, kind).eval()
        speeds = []
        for _ in range(2): began = now(device); generate(model, [[1, *range(7, 22)]] * rows, new); speeds.append(rows * new / (now(device) - began))
        print(f"{name:6}writing, {rows} rows, {str(kind)[6:]:9}{speeds[0]:10,.0f} tokens a second, then {speeds[1]:,.0f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--toy", action="store_true", help="a toy, on any machine"); p.add_argument("--sizes", nargs="+", default=list(SIZES))
    p.add_argument("--no-compile", action="store_true"); p.add_argument("--times", type=int, default=10)
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not a.toy: raise SystemExit("no GPU here: --toy runs the same lines at the size of a toy")
    top, compiled = peak(device), {"dynamic": False} if device == "cuda" else {"backend": "eager"}
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, a product makes {top / 1e12:.2f} Tflop/s", flush=True)
    for name, (size, rows) in (TOY if a.toy else {n: SIZES[n] for n in a.sizes}).items():
        steps(name, size, rows, device, top, 2 if a.toy else a.times, None if a.no_compile else compiled)
        if name != "124M": writing(name, size, device, 4 if a.toy else 64, 8 if a.toy else 256)


if __name__ == "__main__": main()
