"""How fast questions are asked: MLM beside transformers' DataCollatorForLanguageModeling, in one process, in turns.

    python -m benchmarks.masking
"""
import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from pydoc_data.topics import topics
from transformers import DataCollatorForLanguageModeling

from lmtrain.batch import Noise, collate
from lmtrain.objectives.masked import MLM, Spans
from lmtrain.text import examples, train_bpe


def turns(jobs: dict[str, Callable], times: int) -> dict[str, np.ndarray]:
    "Milliseconds of each job, (times,): all jobs take turns, so that a busy moment of the machine falls on all."
    for job in jobs.values(): job()
    out: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(times):
        for name, job in jobs.items():
            start = time.perf_counter(); job(); out[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(ms) for name, ms in out.items()}


def table(title: str, ms: dict[str, np.ndarray], tokens: int) -> None:
    "Median and middle half of each job, tokens a second, and how many times as fast as the first it is."
    first = next(iter(ms.values()))
    heads = f"{'median ms':>10}{'middle half':>16}{'tokens/s':>13}{'ratio':>7}{'middle half':>14}"
    print(f"\n{title}\n{'':42}{heads}")
    for name, t in ms.items():
        low, mid, high = np.quantile(t, [.25, .5, .75])
        r = np.quantile(first / t, [.25, .5, .75])
        ratio = f"{r[1]:7.2f}{r[0]:8.2f}-{r[2]:5.2f}"
        print(f"{name:42}{mid:10.2f}{low:9.2f}-{high:6.2f}{tokens / mid * 1e3:13,.0f}{ratio}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--rows", type=int, default=64); ask.add_argument("--length", type=int, default=512)
    ask.add_argument("--times", type=int, default=60); ask.add_argument("--rate", type=float, default=.15)
    a = ask.parse_args()
    torch.set_num_threads(1)
    pages = [topics[name] for name in sorted(topics)]
    tok = train_bpe(pages[:20], 2048)
    rows = [e for e in examples(pages * 4, tok, a.length) if len(e) == a.length][:a.rows]
    regular_ids, b, noise = range(len(tok.all_special_ids), len(tok)), collate(rows), Noise()
    theirs = DataCollatorForLanguageModeling(tok, mlm_probability=a.rate)
    ours = MLM(tok.mask_token_id, regular_ids, a.rate)
    special = torch.isin(b.ids, torch.tensor(tok.all_special_ids))                     # (B,T)
    words, spans = MLM(tok.mask_token_id, regular_ids, a.rate, words=True), Spans(tok.mask_token_id, regular_ids, a.rate)
    b_words = b.with_extra(word=b.ids % 7)                                             # (B,T) any runs will do
    dicts = lambda: [{"input_ids": e.ids} for e in rows]
    tokens = b.ids.numel()
    print(f"{len(rows)} rows of {a.length} tokens, rate {a.rate}, one thread, torch {torch.__version__}, {a.times} turns")
    table("masking alone: from a batch of tokens to reads and targets", turns({
        "collator.torch_mask_tokens": lambda: theirs.torch_mask_tokens(b.ids.clone()),
        "  the same, special tokens marked before": lambda: theirs.torch_mask_tokens(b.ids.clone(), special),
        "MLM.corrupt": lambda: ours.corrupt(b, noise), "MLM.corrupt, words": lambda: words.corrupt(b_words, noise),
        "Spans.corrupt": lambda: spans.corrupt(b, noise)}, a.times), tokens)
    table("the whole way: from lists of ids to a batch that is asked", turns({
        "collator(examples)": lambda: theirs(dicts()),
        "collate, MLM.corrupt": lambda: ours.corrupt(collate(rows), noise),
        "  of this: collate": lambda: collate(rows)}, a.times), tokens)


if __name__ == "__main__": main()
