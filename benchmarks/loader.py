"""How fast batches are made, beside two usual ways over the same tokens, in turns in one process: python -m benchmarks.loader

transformers: rows as lists of numbers, torch's DataLoader, DataCollatorForLanguageModeling. torch: pieces of a memory map,
drawn anywhere, as plain loops do; it neither packs nor keeps documents apart, and can not be resumed. Also: what a second
start costs, and the memory that the loss takes.
"""
import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pydoc_data.topics import topics
from torch.utils.data import DataLoader, RandomSampler
from transformers import DataCollatorForLanguageModeling

from lmtrain.batch import Example, Noise, collate
from lmtrain.loader import Loader
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM, PrefixLM, nll, shift
from lmtrain.objectives.diffusion import BlockDiffusion, Diffusion, Uniform, exact_k, ranked
from lmtrain.objectives.masked import MLM, Spans, span_corrupt
from lmtrain.objectives.mixed import Mix, fim
from lmtrain.text import examples, train_bpe

B, T = 64, 1024


def speed(makers: dict[str, Callable[[], Iterator]], batches: int, rounds: int) -> dict[str, list[float]]:
    "CPU milliseconds a batch of each, round by round, taking turns."
    out: dict[str, list[float]] = {n: [] for n in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            it = make(); next(it)
            began = time.process_time()
            for _ in range(batches): next(it)
            out[name].append(1e3 * (time.process_time() - began) / batches)
    return out


def loading(a) -> None:
    pages = list(topics.values())
    tok = train_bpe(pages, 2048)
    long, short = examples(["\n".join(pages * 3)], tok, T), examples([p[k:k + 700] for p in pages * 3 for k in range(0, len(p), 700)], tok, T)
    M, O = tok.mask_token_id, range(7, 2048)
    flat = np.concatenate([e.ids for e in long]).astype(np.int64)
    listed = [{"input_ids": e.lists().ids} for e in long if len(e) == T]
    collators = {"CLM": DataCollatorForLanguageModeling(tok, mlm=False), "MLM": DataCollatorForLanguageModeling(tok, mlm_probability=.15)}
    def forever(data: DataLoader) -> Iterator:
        while True: yield from data
    def theirs(kind: str): return forever(DataLoader(listed, B, sampler=RandomSampler(listed), collate_fn=collators[kind], drop_last=True))  # type: ignore[arg-type]
    def pieces() -> Iterator:
        while True:
            at = torch.randint(len(flat) - T - 1, (B,)).tolist()
            yield tuple(torch.from_numpy(np.stack([flat[i + k:i + k + T] for i in at])) for k in (0, 1))
    def ours(items, objective, **how): return (b for _, b in Loader(items, objective, B, T, rank=0, **how).made())
    spans = lambda e, n: span_corrupt(e, n, range(2000, 2048)) if len(e) > 60 else e
    sides = {"transformers, CLM": lambda: theirs("CLM"), "torch, pieces of a map": pieces, "CLM, long texts": lambda: ours(long, CLM(), world=1),
             "CLM, long texts, 8 ranks": lambda: ours(long, CLM(), world=8), "CLM, short, packed": lambda: ours(short, CLM(), world=1, pack=True),
             "CLM, short, packed, 8 ranks": lambda: ours(short, CLM(), world=8, pack=True), "CLM, short, not packed": lambda: ours(short, CLM(), world=1),
             "transformers, MLM": lambda: theirs("MLM"), "MLM, long texts": lambda: ours(long, MLM(M, O), world=1), "MLM, long texts, 8 ranks": lambda: ours(long, MLM(M, O), world=8),
             "fim, packed": lambda: ours(short, CLM(), world=1, pack=True, change=lambda e, n: fim(e, n, (4, 5, 6))),
             "span_corrupt, short": lambda: ours(short, CLM(), world=1, change=spans)}
    ms = {n: statistics.median(t) for n, t in speed(sides, a.batches, a.rounds).items()}
    print(f"{B} x {T} tokens a batch, one thread, CPU time, load {os.getloadavg()[0]:.1f}\n{'':32}{'ms a batch':>12}{'M places/s':>12}{'of theirs':>11}")
    for name, t in ms.items():
        base = ms["transformers, MLM" if "MLM" in name else "transformers, CLM"]
        print(f"{name:32}{t:12.2f}{B * T / t / 1e3:12.1f}{base / t:10.2f}x")


def lengths() -> None:
    "How the time of each objective's corruption grows with the length of a row: its exponent, and PrefixLM and `ranked` at 16 x 2048."
    M, O = 2047, range(7, 2047)
    objectives = {"CLM": CLM(), "PrefixLM(cut)": PrefixLM(.5), "MLM": MLM(M, O), "Spans": Spans(M, O), "Diffusion": Diffusion(M), "exact_k": Diffusion(M, exact_k),
                  "BlockDiffusion": BlockDiffusion(M, 16), "Uniform": Uniform(range(2048)), "Mix": Mix((.5, .5), clm=CLM(), mntp=MLM(M, O, shifted=True))}
    def ms(f: Callable, times: int = 7) -> float:
        f(); took = []
        for _ in range(times): began = time.perf_counter(); f(); took.append(1e3 * (time.perf_counter() - began))
        return statistics.median(took)
    sizes = (512, 1024, 2048, 4096, 8192)
    batch = {n: collate([Example(torch.randint(7, 2047, (n,)).tolist(), index=i) for i in range(16)]) for n in sizes}
    for name, o in objectives.items():
        t = [ms(lambda o=o, n=n: o.corrupt(batch[n], Noise())) for n in sizes]
        print(f"{name:16} {np.polyfit(np.log(sizes), np.log(t), 1)[0]:5.2f} = exponent over 512 ... 8192;  {t[2]:.2f} ms at 16 x 2048")
    b = batch[2048]
    print(f"ranked           {ms(lambda: ranked(Noise()(b), b.answer, b.doc)):.2f} ms at 16 x 2048")


def starting(megabytes: int) -> None:
    "A first and a second start on the same text, in MB of text a second."
    text = "\n".join(topics.values())
    texts = [f"{i} {text}" for i in range(max(1, round(megabytes * 1e6 / len(text.encode()))))]
    size, tok = sum(len(t.encode()) for t in texts) / 1e6, train_bpe(texts[:1], 2048)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMTRAIN_CACHE"] = folder
        for which in ("first", "second"):
            began = time.perf_counter()
            rows = examples(texts, tok, T)
            print(f"{which} start: {size:.0f} MB in {time.perf_counter() - began:.2f} s, {size / (time.perf_counter() - began):.0f} MB/s, {len(rows):,} rows")


PEAK = "VmHWM"


def memory(vocab: int = 50_000, tokens: int = 2048) -> None:
    "The most memory that a loss and its gradient take above the model, chunked and in one piece."
    import lmtrain.objective as module
    for name, chunk in (("in chunks", module.CHUNK), ("in one piece", 2**62)):
        if (child := os.fork()) == 0:
            module.CHUNK = chunk
            model = Transformer(Size(vocab, 64, 2, layers=1, length=tokens))
            b = shift(collate([Example(torch.randint(vocab, (tokens,)).tolist())]))
            read = lambda what: next(int(s.split()[1]) for s in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if s.startswith(what)) / 2**20
            before = read("VmRSS"); nll(model, b).sum().backward()
            print(f"loss of {tokens:,} x {vocab:,}, {name}: {read(PEAK) - before:.2f} GiB above {before:.2f}", flush=True); os._exit(0)
        os.waitpid(child, 0)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=int, default=8); p.add_argument("--rounds", type=int, default=3); p.add_argument("--megabytes", type=int, default=20)
    a = p.parse_args()
    torch.set_num_threads(1)
    memory(); lengths(); loading(a); starting(a.megabytes)


if __name__ == "__main__": main()
