"The loss lab: what each token costs, what else was expected, and a model that learns while you look."
import asyncio
import base64
import json
import time
from copy import deepcopy
from typing import Any

import traitlets as tr

from . import small
from .shared import Lab

AFTER = 10  # steps after which the held-out texts are scored again, and the text is read


def logits_of(run: dict) -> Any:
    "A run's logits as the page has them: (n,V) float64."
    import numpy as np
    return np.frombuffer(base64.b64decode(run["logits"]), "<f2").reshape(len(run["ids"]), -1).astype(float)


def costs(run: dict, temperature: float = 1.0, smoothing: float = 0.0) -> Any:
    "What each token costs, none for the first: (n,) float64, nats. Smoothed labels: Szegedy et al. (2016)."
    import torch
    z, ids = torch.tensor(logits_of(run)) / temperature, torch.tensor(run["ids"])      # (n,V) (n,)
    each = torch.nn.functional.cross_entropy(z, ids, label_smoothing=smoothing, reduction="none")  # (n,)
    return each.index_fill(0, torch.tensor([0]), 0.0).numpy()


class Learner:
    "A trainer that takes one step at a time and can begin again."
    def __init__(self, trainer: Any, held: Any):
        self.trainer, self.held = trainer, held
        parts = trainer.model, trainer.optimizer, trainer.batches
        self.first = deepcopy(tuple(p.state_dict() for p in parts))
        self.windows = trainer.stream()

    def step(self) -> list[float]:
        "One step: [number, loss in nats a token]."
        self.trainer.task.train()
        row = self.trainer.one(next(self.windows), time.perf_counter())
        return [row["step"], row["loss"]]

    def score(self) -> list[float]:
        "The held-out loss: [step, nats a token]."
        from lmtrain.evaluate import held_loss
        return [self.trainer.done, sum(held_loss(self.trainer.model, self.trainer.objective, self.held).values())]

    def reset(self) -> None:
        "The first weights, the first batch."
        model, optimizer, batches = deepcopy(self.first)
        self.trainer.model.load_state_dict(model); self.trainer.optimizer.load_state_dict(optimizer)
        self.trainer.batches.load_state_dict(batches)
        self.trainer.done, self.windows = 0, self.trainer.stream()


class LossLab(Lab):
    """What each token of a text costs two readers.

    Without `models` it shows what comes with it; with `models`, a `small.Small`, any text. With a causal `trainer` and
    `held` rows there is one reader more, which learns while you look: play, step, reset.
    """
    name = "loss"
    tokenizer = tr.Unicode().tag(sync=True)
    text = tr.Unicode().tag(sync=True)
    runs: Any = tr.List().tag(sync=True)
    pair = tr.List([0, 1]).tag(sync=True)       # which two are shown
    chosen = tr.Int(3).tag(sync=True)           # the token whose alternatives are listed
    temperature = tr.Float(1.0).tag(sync=True)
    smoothing = tr.Float(0.0).tag(sync=True)
    live = tr.Bool(False).tag(sync=True)        # can it read another text?
    trains = tr.Bool(False).tag(sync=True)
    command = tr.Unicode("pause").tag(sync=True)
    train: Any = tr.List().tag(sync=True)            # [step, nats a token], ...
    held: Any = tr.List().tag(sync=True)
    size = tr.Int(1).tag(sync=True)

    def __init__(self, models: Any = None, text: str = small.SCORED, trainer: Any = None, held: Any = None,
                 tok: Any = None):
        known, self.models, self.mine = small.stored(), models, models.tok if models is not None else tok
        if trainer is not None and (held is None or self.mine is None):
            raise ValueError("a trainer needs held-out rows and its tokenizer: LossLab(trainer=..., held=..., tok=...)")
        self.learner = None if trainer is None else Learner(trainer, held)
        own = known["tokenizer"] if self.mine is None else json.loads(self.mine.backend_tokenizer.to_str())
        live = self.mine is not None
        super().__init__(tokenizer=json.dumps(own), text=text if live else small.SCORED,
                         size=len(own["model"]["vocab"]), live=live, trains=trainer is not None, runs=known["runs"])
        if self.mine is not None: self.read()
        if self.learner: self.held = [self.learner.score()]
        self.observe(self.read, "text")
        self.observe(self.obey, "command")

    def read(self, _: Any = None) -> None:
        "Let the models read the text."
        found = small.runs(self.models, self.text) if self.models is not None else []
        if self.learner and self.mine is not None:
            m = self.learner.trainer.model
            ids = small.read_as(self.text, self.mine, m.size.length)
            about = f"Learns here: {self.learner.trainer.done} steps."
            found = [small.run("the learner", about, ids, small.left_logits(m, ids)), *found]
        if found: self.runs = found

    def forward(self) -> None:
        "One step of the learner; the curves and, now and then, the text follow."
        if self.learner is None: raise ValueError("this lab trains nothing: give it a trainer")
        self.train = [*self.train, self.learner.step()]
        if self.learner.trainer.done % AFTER == 0 or self.command == "step":
            self.held = [*self.held, self.learner.score()]
            self.read()

    def obey(self, change: Any) -> None:
        "What a button asked for."
        if self.learner is None: return
        if change["new"] == "step": self.forward()
        if change["new"] == "reset":
            self.learner.reset()
            self.train, self.held = [], [self.learner.score()]
            self.read()
        if change["new"] == "play": self.playing = asyncio.ensure_future(self.play())
        elif change["new"] != "pause": self.command = "pause"

    async def play(self) -> None:
        "Step until the button is pressed again; the page is answered in between."
        while self.command == "play":
            self.forward()
            await asyncio.sleep(0.02)

    def picture(self) -> str:
        "Two readers' tokens with what they cost."
        from html import escape
        def row(r: dict) -> str:
            cost = costs(r, self.temperature, self.smoothing)
            pairs = zip(r["ids"], cost, strict=True)
            cells = "".join("<span style='display:inline-block;margin:2px;text-align:center'>"
                            f"{escape(self.tok.decode([i]))}<br><small>{c:.2f}</small></span>" for i, c in pairs)
            return f"<p><b>{escape(r['name'])}</b>, {cost[1:].mean():.3f} nats a token</p><div>{cells}</div>"
        return "".join(row(self.runs[min(k, len(self.runs) - 1)]) for k in self.pair)
