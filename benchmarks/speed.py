"""Seconds of a training step beside transformers' Trainer: the same Qwen3 model, rows, arithmetic and optimizer.

    python -m benchmarks.speed --sizes 1M 10M --rounds 5 --compile

The trainers take turns, so that whatever else the machine does falls on all of them alike.
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from lmtrain.cli import _quick_on_cpu

_quick_on_cpu()  # for all sides alike, and before torch: see lmtrain/cli.py

from benchmarks.common import ROWS, SIZES, T, Clock, flops, full, gpt2, keep, machine, native, ours, peak, qwen3, shakespeare, spread, theirs

SIDES = {"lmtrain": (native, ours), "transformers qwen3": (qwen3, theirs), "transformers gpt2": (gpt2, theirs)}


def steps_of(side: str, size: str, rows, steps: int, compile: bool, bf16: bool = False) -> list[float]:
    "Seconds of each of `steps` steps after three that warm up (ten if they compile)."
    make, trainer = SIDES[side]
    warm, clock = 10 if compile else 3, Clock()
    t = trainer(make(SIZES[size]), rows if side == "lmtrain" else full(rows[:ROWS * (steps + warm)]), steps + warm, compile=compile, bf16=bf16, callbacks=[clock])
    t.fit() if side == "lmtrain" else t.train()
    return clock.seconds[warm:]


def optimizer_share(size: str, rows) -> dict[str, float]:
    "The share of a step that each optimizer takes."
    from lmtrain.optim import adamw, muon
    shares = {}
    for f in adamw, muon:
        trainer, spent = ours(native(SIZES[size]), rows, 12, optimizer=f), []
        step = trainer.optimizer.step
        def timed(step=step, spent=spent):
            start = time.perf_counter(); step(); spent.append(time.perf_counter() - start)
        trainer.optimizer.step = timed
        whole = trainer.fit()["seconds"]
        shares[f.__name__] = sum(spent[2:]) / sum(whole[2:])
    return shares


def alone(words: list[str]) -> str:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]


def seconds_to_import(what: str) -> float:
    start = "import time; t = time.perf_counter(); "
    return min(float(alone(["-c", f"{start}{what}; print(time.perf_counter() - t)"])) for _ in range(3))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", nargs="+", default=["1M", "10M"], choices=SIZES)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--compile", action="store_true", help="compiled against compiled as well")
    p.add_argument("--out", default="results/benchmarks")
    p.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    rows, _ = shakespeare()
    if a.memory:
        steps_of(*a.memory, rows, 3, False)
        print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1024)  # ru_maxrss is inherited
        return
    result = {"machine": machine(), "rows": ROWS, "tokens": T, "sizes": {}}
    print(f"{result['machine']}\n")
    for size in a.sizes:
        n = sum(p.numel() for p in native(SIZES[size]).parameters())
        modes = [(False, False), *[(True, False)] * a.compile, (False, True)]           # (compiled, 16 bits)
        kinds = [(side, *mode) for mode in modes for side in SIDES]
        times = {kind: [] for kind in kinds}
        for _ in range(a.rounds):
            for side, *mode in kinds: times[side, *mode].append(sum(steps_of(side, size, rows, a.steps, *mode)) / a.steps)
        top = peak()
        print(f"{size}: {n:,} parameters, {ROWS} x {T} tokens a step, {flops(SIZES[size]) / 1e9:.0f} GFLOP a step, matrix product in "
              f"float32 {top / 1e9:.0f} GFLOP/s")
        print(f"{'':32}{'ms a step':>24}{'tokens/s':>12}{'of peak':>9}{'ratio':>8}{'peak MB':>9}")
        table = result["sizes"][size] = {"parameters": n}
        for side, compiled, bf16 in kinds:
            s, name = spread(times[side, compiled, bf16]), side + ", compiled" * compiled + ", bf16" * bf16
            base = spread(times["transformers qwen3", compiled, bf16])["median"]
            memory = float("nan") if compiled or bf16 else float(alone(["-m", "benchmarks.speed", "--memory", side, size]))
            row = table[name] = {
                "seconds": s, "tokens_per_second": ROWS * T / s["median"], "share_of_peak": flops(SIZES[size]) / s["median"] / top,
                "times_as_fast_as_transformers": base / s["median"], "peak_megabytes": memory}
            print(f"{name:32}{1e3 * s['median']:10.1f} ({1e3 * s['low']:.0f} to {1e3 * s['high']:.0f}){row['tokens_per_second']:12,.0f}"
                  f"{row['share_of_peak']:9.0%}{row['times_as_fast_as_transformers']:8.2f}{memory:9.0f}", flush=True)
        table["optimizer_share"] = optimizer_share(size, rows)
        print("share of the optimizer in a step:", ", ".join(f"{k} {v:.1%}" for k, v in table["optimizer_share"].items()), "\n", flush=True)
    result["import_seconds"] = {w: seconds_to_import(w) for w in ("import lmtrain", "from lmtrain import Trainer", "from transformers import Trainer")}
    print(result["import_seconds"])
    keep("speed", a.out, result)


if __name__ == "__main__":
    main()
