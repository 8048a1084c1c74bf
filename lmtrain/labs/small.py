"""The small models that the labs show: trained here once, kept in the cache, and what they say in `static/small.json`.

`python -m lmtrain.labs.small` trains them (some minutes) and writes that file anew.
"""
import base64
import json
from dataclasses import dataclass
from typing import Any

from lmtrain.settings import cache_dir

from .shared import STATIC, source

LENGTH, STEPS, EARLY = 64, 2000, 60
PROMPT, WRITTEN, HEAT = "To be, or not to be", 32, 0.8
SCORED = "The king is dead, and I am sorry for it."


@dataclass(frozen=True)
class Small:
    "A causal model, the same one early in its training, and a diffusion model, of the same size and text."
    causal: Any
    early: Any
    diffusion: Any
    tok: Any
    held: Any  # rows that none of them has seen


def trained(way: Any, steps: int, rows: Any, size: Any) -> Any:
    "A model of the labs' size; the same weights before the first step for all."
    from lmtrain.objectives.recipes import trained
    from lmtrain.train import native_bf16
    return trained(way, size, rows, 32, steps, .004, bf16=native_bf16())


def small() -> Small:
    "The labs' models: from the cache, or trained now on Shakespeare's plays. Raises OSError without the text."
    from lmtrain.corpora import corpus
    from lmtrain.model import Size, load, save
    from lmtrain.objectives.recipes import recipes
    from lmtrain.text import examples, train_bpe
    home, plays = cache_dir() / "labs" / f"{LENGTH}-{STEPS}-{EARLY}", corpus("shakespeare")
    kept = home / "causal" / "config.json"
    tok = load(home / "causal")[1] if kept.exists() else train_bpe(plays["train"]["text"][:], 1024)
    rows, held = (examples(plays[n]["text"][:], tok, LENGTH) for n in ("train", "validation"))
    size, models = Size(vocab=len(tok), dim=128, heads=4, layers=4, length=LENGTH), {}
    plan = {"causal": ("causal", STEPS), "early": ("causal", EARLY), "diffusion": ("diffusion", STEPS)}
    for name, (way, steps) in plan.items():
        if not (home / name / "config.json").exists():
            save(trained(recipes(tok)[way], steps, rows, size), tok, home / name)
        models[name] = load(home / name)[0].eval()
    return Small(**models, tok=tok, held=held)


def left_logits(model: Any, ids: list[int]) -> Any:
    "What a causal model says about each token from those to its left: (n,V); nothing (zeros) about the first."
    import torch
    from lmtrain.batch import Example, collate
    from lmtrain.model import evaluating
    with evaluating(model): z = model.head(model(collate([Example(ids)])))[0].float().cpu()  # (n,V)
    return torch.cat([torch.zeros_like(z[:1]), z[:-1]])                                # (n,V)


def gap_logits(model: Any, ids: list[int], mask_id: int) -> Any:
    "What a masked model says about each token from all others: (n,V); nothing (zeros) about the first."
    import torch
    from lmtrain.batch import Example, collate
    from lmtrain.model import evaluating
    b, at = collate([Example(ids)] * len(ids)), torch.arange(len(ids))                 # (n,n) (n,)
    hidden = b.ids.masked_fill(torch.eye(len(ids), dtype=torch.bool), mask_id)         # (n,n)
    b = b.set(ids=hidden, order=torch.zeros_like(b.order))
    with evaluating(model): z = model.head(model(b)[at, at]).float().cpu()             # (n,V)
    z[:, mask_id] = -1e4                                                               # a gap is never the answer
    return z.index_fill(0, torch.tensor([0]), 0.0)                                     # (n,V)


def run(name: str, about: str, ids: list[int], logits: Any) -> dict:
    "What a model says about a text, as `loss.js` reads it: logits in 16 bits."
    import numpy as np
    halves = np.asarray(logits).astype("<f2").tobytes()
    return {"name": name, "about": about, "ids": ids, "logits": base64.b64encode(halves).decode()}


def read_as(text: str, tok: Any, most: int) -> list[int]:
    "The tokens of a text behind bos, at most `most`; special tokens in it are plain text."
    return [tok.bos_token_id, *tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]][:most]


def runs(s: Small, text: str) -> list[dict]:
    "Three readers of one text."
    ids, left = read_as(text, s.tok, LENGTH), "Sees what is to the left."
    return [run("causal", f"{left} {STEPS:,} steps of training.", ids, left_logits(s.causal, ids)),
            run("causal, early", f"{left} {EARLY} steps of training.", ids, left_logits(s.early, ids)),
            run("both sides", "Each token is hidden in turn; sees all others. Trained by diffusion.", ids,
                gap_logits(s.diffusion, ids, s.tok.mask_token_id))]


def orders(n: int, seed: int = 0) -> dict[str, tuple[str, Any, Any]]:
    "Ways to unmask n places: name to (a sentence, picks, how sure)."
    from lmtrain.objectives import samplers as by
    token_prob = by.token_prob
    return {
        "blind order": ("One place a step, drawn blindly. Exact: it writes what the model believes.",
                        by.first_hitting(n, seed), token_prob),
        "surest draw first": ("A token is drawn for every place; the surest draw stays. Biased: it prefers the dull.",
                              by.most_confident(n, n), token_prob),
        "surest place first": ("The place where the model is surest, then a draw there. Exact.",
                               by.most_confident(n, n), by.max_prob),
        "four draws a step": ("As the surest draw, four at once: fast, and they do not know of each other.",
                             by.most_confident(n, n // 4), token_prob),
        "blocks of 8": ("From left to right in blocks; inside them the surest draw first.",
                        by.semi_autoregressive(n, 8, 8), token_prob),
        "all above .9": ("Every draw of a probability above .9, or the surest.", [by.threshold(.9)] * n, token_prob),
        "ancestral, 16 steps": ("Each place has the same chance in a step, as the noise had.",
                                by.ancestral(16, seed=seed), token_prob),
        "second thoughts": ("Ancestral, in 32 steps; a tenth may be hidden again (ReMDM).",
                            by.ancestral(32, again=.1, seed=seed), token_prob)}


def pairs(ids: Any) -> float:
    "Of all pairs of neighbouring tokens the share that differ."
    some = [tuple(p) for row in ids.tolist() for p in zip(row, row[1:], strict=False)]
    return len(set(some)) / len(some)


def writing(name: str, about: str, trace: Any, first: int) -> dict:
    "The first text of a trace as `noise.js` reads it, and how varied all of them are."
    return {"name": name, "about": about, "ids": trace.ids[0].tolist(), "when": trace.when[0].tolist(),
            "p": [round(v, 4) for v in trace.p[0].tolist()], "pairs": round(pairs(trace.ids[:, first:]), 4)}


def writings(s: Small, prompt: str = PROMPT, n: int = WRITTEN, texts: int = 48, seed: int = 0) -> list[dict]:
    "The same beginning, gone on with in each way."
    from lmtrain.generation import generate
    from lmtrain.objectives.samplers import unmask
    ids = read_as(prompt, s.tok, LENGTH)
    many, mask = [ids] * texts, s.tok.mask_token_id
    left = generate(s.causal, many, n, HEAT, seed=seed)
    out = [writing("left to right", "A causal model: the next token, and the next. Exact.", left, len(ids))]
    for name, (about, picks, sure) in orders(n, seed).items():
        done = unmask(s.diffusion, many, n, picks, mask, HEAT, confidence=sure, seed=seed)
        out.append(writing(name, about, done, len(ids)))
    return out


def cooked(s: Small, texts: int = 48) -> dict:
    "All that the labs show of the models without a kernel."
    import torch
    real = torch.tensor([list(e.ids[1:WRITTEN + 1]) for e in s.held if len(e.ids) > WRITTEN][:texts])  # (texts,n)
    return {"tokenizer": json.loads(s.tok.backend_tokenizer.to_str()), "writings": writings(s, texts=texts),
            "varied": round(pairs(real), 4), "runs": runs(s, SCORED)}


def stored() -> dict:
    "What `static/small.json` holds."
    return json.loads(source("small.json"))


if __name__ == "__main__":
    text = json.dumps(cooked(small()), ensure_ascii=False, separators=(",", ":"))
    (STATIC / "small.json").write_text(text + "\n", encoding="utf-8")
