"The masking lab: what an objective makes of a text, or of the very batches that a model is trained on."
import json
from typing import Any

import traitlets as tr

from . import small
from .shared import Lab, built, described

LINEAR = {"kind": "Schedule", "eps": 1e-3}
ABOUT = {
    "Causal (CLM)": "Each label is the next token; a token sees only what is to its left.",
    "Masked (MLM)": "Some tokens are hidden; all see both sides. Of the hidden, some stay readable, some are swapped.",
    "Whole words": "Masked, but a word is hidden as a whole or not at all.",
    "Spans": "Masked, in runs of random length.",
    "Masked, shifted (MNTP)": "Masked, but each label stands one position early, as in a causal model.",
    "Prefix": "A beginning is read both ways, the rest is causal.",
    "Mixed": "Each row draws one of two objectives.",
    "Diffusion": "Hidden at a rate t; the fewer are hidden, the more each counts.",
    "Uniform noise": "Some tokens become random ones, and the model is not told which.",
    "Block diffusion": "Diffusion inside blocks, causal between them. The clean text stands behind the noised one.",
    "T5 spans": "Spans are cut out and put behind the text, where they are the labels.",
    "UL2": "One of seven ways to hide, behind a token that tells its kind (R, S or X)."}


def menu(mask: int, regular_ids: list[int], marks: list[int]) -> list[dict]:
    "The objectives that the lab knows: name, a sentence, objective as JSON; written out, so nothing is imported."
    mlm = {"kind": "MLM", "mask_id": mask, "regular_ids": regular_ids, "rate": 0.3, "keep": 0.1, "swap": 0.1,
           "shifted": False, "words": False}
    early = mlm | {"shifted": True}
    both = {"kind": "Mix", "probs": [0.5, 0.5], "parts": {"clm": {"kind": "CLM"}, "mntp": early}}
    kinds = [
        {"kind": "CLM"}, mlm, mlm | {"words": True}, mlm | {"kind": "Spans", "rate": 0.15, "p": 0.2, "longest": 10},
        early,
        {"kind": "PrefixLM", "cut": 0.5}, both, {"kind": "Stopped", "mask_id": mask, "t": 0.5, "schedule": LINEAR},
        {"kind": "Uniform", "vocab": [0, regular_ids[1]], "schedule": LINEAR},
        {"kind": "BlockDiffusion", "mask_id": mask, "block": 4, "schedule": LINEAR},
        {"kind": "SpanCorrupt", "rate": 0.15, "mean": 3.0, "unbiased": False, "sentinels": marks},
        {"kind": "UL2", "sentinels": marks[3:], "modes": marks[:3]}]
    return [{"name": n, "about": about, "objective": o} for (n, about), o in zip(ABOUT.items(), kinds, strict=True)]


def marked(tokenizer: dict, n: int = 35) -> dict:
    "A tokenizer's JSON with `n` more special tokens, for T5's gaps and UL2's kinds."
    size = max(*tokenizer["model"]["vocab"].values(), *(a["id"] for a in tokenizer["added_tokens"])) + 1
    more = [{**tokenizer["added_tokens"][0], "id": size + k, "content": f"<|cut{k}|>"} for k in range(n)]
    return tokenizer | {"added_tokens": [*tokenizer["added_tokens"], *more]}


def columns(b: Any, r: int) -> dict:
    "Row `r` of a Batch as `core.js` reads it."
    names = "ids", "clean", "doc", "order", "answer", "targets", "weights", "index"
    extra = {n: c[r].tolist() for n, c in b.extra.items() if c.ndim == 2}
    return {n: getattr(b, n)[r].tolist() for n in names} | {"extra": extra}


def as_batch(row: dict) -> Any:
    "A row of `columns` as a Batch again. The inverse of `columns`, in the types of `lay`."
    import torch
    from lmtrain.batch import Batch
    of = lambda v: torch.tensor([v], dtype=torch.float if any(isinstance(x, float) for x in v) else None)  # (1,T)
    main: Any = {n: of(v) for n, v in row.items() if n != "extra"}
    zero = torch.zeros(1, dtype=torch.long)                                            # (1,)
    return Batch(**main, item=zero, role=zero, extra={n: of(v) for n, v in row["extra"].items()})


def alone(b: Any) -> Any:
    "The one document of a row as an Example. Raises ValueError if there are several."
    from lmtrain.batch import Example
    if int(b.doc.max()) > 1: raise ValueError("this row holds several documents: T5 and UL2 change one at a time")
    real = b.doc[0] > 0                                                                # (T,)
    return Example(b.clean[0][real].tolist(), b.answer[0][real].tolist(), index=int(b.index[0, 0]))


def batches(loader: Any, steps: int, rows: int) -> list[dict]:
    "The next batches of a loader before its objective: [{epoch, rows}, ...]."
    out = []
    for k in range(steps):
        b, noise = loader.peek(k)
        out.append({"epoch": noise.epoch, "rows": [columns(b, r) for r in range(min(rows, len(b)))]})
    return out


class MaskingLab(Lab):
    """What an objective makes: inputs, labels, weights and attention, on any text or on a loader's batches.

    `tok` is a tokenizer of `train_bpe` or `train_chars`; by default one that comes with the lab. With `loader`, its
    objective is the first of the menu and its next `steps` batches can be gone through; what is painted for one is the
    batch that it trains on.
    """
    name = "masking"
    tokenizer = tr.Unicode().tag(sync=True)
    menu: Any = tr.List().tag(sync=True)
    chosen = tr.Int(0).tag(sync=True)         # which of the menu
    values = tr.Dict().tag(sync=True)         # fields that a slider changed
    text = tr.Unicode().tag(sync=True)
    batches: Any = tr.List().tag(sync=True)
    step = tr.Int(-1).tag(sync=True)          # which batch; -1: the text
    row = tr.Int(0).tag(sync=True)
    seed = tr.Int(0).tag(sync=True)
    epoch = tr.Int(0).tag(sync=True)

    def __init__(self, tok: Any = None, text: str = "To be, or not to be, that is the question.", loader: Any = None,
                 steps: int = 8, rows: int = 4, seed: int = 0):
        own = small.stored()["tokenizer"] if tok is None else json.loads(tok.backend_tokenizer.to_str())
        known, whole = {a["content"]: a["id"] for a in own["added_tokens"]}, marked(own)
        size, last = len(own["model"]["vocab"]), max(known.values())
        marks = [a["id"] for a in whole["added_tokens"] if a["content"].startswith("<|cut")]
        listed, next_ones = menu(known["<|mask|>"], [last + 1, size], marks), []
        if loader is not None:
            listed = [{"name": "the loader's", "about": "The objective of this loader.",
                       "objective": described(loader.objective)}, *listed]
            next_ones, seed = batches(loader, steps, rows), loader.seed
        super().__init__(tokenizer=json.dumps(whole), menu=listed, text=text, batches=next_ones, seed=seed,
                         step=0 if next_ones else -1, chosen=int(loader is None))

    @property
    def painted(self) -> Any:
        "The Batch of one row that the lab shows, computed in Python."
        from lmtrain.batch import Noise, collate
        from lmtrain.objective import PrefixLM
        from lmtrain.objectives.masked import span_corrupt, words_of
        from lmtrain.objectives.mixed import ul2
        o, noise = {**self.menu[self.chosen]["objective"], **self.values}, Noise(self.seed, self.epoch)
        b = collate([words_of(self.text, self.tok)])
        if self.step >= 0:
            batch = self.batches[self.step]
            noise, b = Noise(self.seed, batch["epoch"]), as_batch(batch["rows"][self.row])
        if o["kind"] not in ("SpanCorrupt", "UL2"): return built(o).corrupt(b, noise)
        e = alone(b)
        if o["kind"] == "UL2": e = ul2(e, noise, o["sentinels"], o["modes"])
        else: e = span_corrupt(e, noise, o["sentinels"], o["rate"], o["mean"], o["unbiased"])
        return PrefixLM().corrupt(collate([e]), noise)

    def picture(self) -> str:
        "The row as it is now, painted by Python."
        from html import escape
        from lmtrain.views import paint
        return f"<div>{escape(self.menu[self.chosen]['name'])}</div>{paint(self.painted, self.tok, rows=1)}"
