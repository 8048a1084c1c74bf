"The noise lab: how a text is lost, token by token, and how models write it anew."
import json
from typing import Any

import traitlets as tr

from . import small
from .shared import Lab, built

DIM = 16  # numbers of a token's vector, as in noise.js
SCHEDULES = [
    {"name": "linear", "schedule": {"kind": "Schedule", "eps": 1e-3}},
    {"name": "cosine", "schedule": {"kind": "Cosine", "eps": 1e-3}},
    {"name": "t squared", "schedule": {"kind": "Polynomial", "eps": 1e-3, "power": 2.0}},
    {"name": "root of t", "schedule": {"kind": "Polynomial", "eps": 1e-3, "power": 0.5}}]


def normals(noise: Any, index: Any, place: Any, draw: int) -> Any:
    "Normal numbers from two uniform ones, float64. Box and Muller (1958)."
    import numpy as np
    u, v = (noise.at(index, place, 2 * draw + k).double().numpy() for k in (0, 1))
    return np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v)


def directions(V: int, D: int = DIM) -> Any:
    "A random direction of length 1 for each of V tokens: (V,D)."
    import numpy as np
    import torch
    from lmtrain.batch import Noise
    table = normals(Noise(), torch.arange(V)[:, None].expand(V, D), torch.arange(D).expand(V, D), 0)
    return table / np.sqrt((table**2).sum(1, keepdims=True))


def gaussian(ids: list[int], table: Any, share: float, noise: Any, may: list[bool]) -> list[int]:
    "Tokens after noise on their vectors: those whose vectors are nearest to the noisy ones."
    import numpy as np
    import torch
    D, n = table.shape[1], len(ids)
    place = torch.arange(n)[:, None] * D + torch.arange(D)                             # (n,D)
    dirt = normals(noise, torch.zeros_like(place), place, 20)                          # (n,D)
    x = np.sqrt(1 - share) * table[ids] + np.sqrt(share / D) * dirt                    # (n,D)
    near = (x @ table.T).argmax(1)                                                     # (n,)
    return [int(v) if m else i for i, v, m in zip(ids, near, may, strict=True)]


def swapped(b: Any, noise: Any, vocab: range, schedule: Any, time: float) -> Any:
    "`Uniform` with its clock stopped: ids (B,T)."
    import torch
    may = b.answer & (b.doc > 0)                                                       # (B,T)
    other = vocab.start + (noise(b, 1) * len(vocab)).long()                            # (B,T)
    gone = 1 - schedule.alpha(torch.tensor(time, dtype=torch.float32))                 # ()
    return torch.where(may & (noise(b) < gone), other, b.ids)


class NoiseLab(Lab):
    """What noise does to a text at time t, and two ways of writing side by side.

    Without `models` it shows writings that come with it; with `models`, a `small.Small` such as `small.small()` makes,
    they write now: `lab.write("Good morrow")`.
    """
    name = "noise"
    tokenizer = tr.Unicode().tag(sync=True)
    text = tr.Unicode().tag(sync=True)
    kind = tr.Int(0).tag(sync=True)          # 0 hidden, 1 swapped, 2 shaken
    schedules: Any = tr.List().tag(sync=True)
    schedule = tr.Int(0).tag(sync=True)
    t = tr.Float(0.3).tag(sync=True)
    seed = tr.Int(0).tag(sync=True)
    mask = tr.Int().tag(sync=True)
    vocab: Any = tr.List().tag(sync=True)
    writings: Any = tr.List().tag(sync=True)
    pair = tr.List([0, 1]).tag(sync=True)    # which two are shown
    step = tr.Int(0).tag(sync=True)
    varied = tr.Float().tag(sync=True)

    def __init__(self, models: Any = None, text: str = "To be, or not to be, that is the question.", seed: int = 0):
        known, self.models = small.stored(), models
        tok = known["tokenizer"] if models is None else json.loads(models.tok.backend_tokenizer.to_str())
        special = {a["content"]: a["id"] for a in tok["added_tokens"]}
        super().__init__(tokenizer=json.dumps(tok), text=text, schedules=SCHEDULES, seed=seed, mask=special["<|mask|>"],
                         vocab=[0, len(tok["model"]["vocab"])], writings=known["writings"], varied=known["varied"])
        if models is not None: self.write()

    def write(self, prompt: str = small.PROMPT, n: int = small.WRITTEN, seed: int = 0) -> None:
        "Let the models go on with `prompt` for `n` tokens, in every way. Raises ValueError without models."
        if self.models is None: raise ValueError("this lab has no models: NoiseLab(small.small())")
        self.writings, self.step = small.writings(self.models, prompt, n, 16, seed), 0

    @property
    def noised(self) -> dict:
        "What the upper half shows, in Python: ids, the share expected to change, a gap's weight; None if there is none."
        import torch
        from lmtrain.batch import Noise, collate
        from lmtrain.objectives.diffusion import Stopped
        from lmtrain.objectives.masked import words_of
        b, noise = collate([words_of(self.text, self.tok)]), Noise(self.seed)
        s, time = built(self.schedules[self.schedule]["schedule"]), max(self.t, 1e-3)
        far = torch.tensor(time, dtype=torch.float32)                                  # ()
        hidden = float(s.hidden(far))
        share = (hidden, hidden * (1 - 1 / len(range(*self.vocab))), None)[self.kind]
        weight = float(s.weight(far)) if self.kind == 0 else None
        if self.kind == 0: ids = Stopped(self.mask, time, s).corrupt(b, noise).ids[0].tolist()
        elif self.kind == 1: ids = swapped(b, noise, range(*self.vocab), s, time)[0].tolist()
        else: ids = gaussian(b.ids[0].tolist(), directions(self.vocab[1]), hidden, noise, b.answer[0].tolist())
        return {"ids": ids, "share": share, "weight": weight}

    def picture(self) -> str:
        "The text under noise, and the two writings at their end, as tokens."
        from html import escape
        now = "".join(f"<span style='margin:2px'>{escape(self.tok.decode([i]))}</span>" for i in self.noised["ids"])
        both = "".join(f"<p><b>{escape(w['name'])}</b>: {escape(self.tok.decode(w['ids']))}</p>"
                       for w in (self.writings[k] for k in self.pair))
        return f"<div><p>t = {self.t:g}: {now}</p>{both}</div>"
