"""A run stopped at any step and gone on with, as it was or with anything changed: the same end, or one line."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.batch import Example
from lmtrain.checkpoint import checkpoints, load_state, restore, save_state, trainer_state
from lmtrain.loader import Loader
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM, PrefixLM
from lmtrain.objectives.diffusion import Diffusion
from lmtrain.optim import adamw, muon
from lmtrain.train import Callback, Trainer

STEPS = 8
DICE = torch.Generator().manual_seed(0)
ITEMS = [Example([1, *torch.randint(4, 30, (n % 7 + 3,), generator=DICE).tolist()]) for n in range(26)]
BASE = {"objective": CLM(), "items": ITEMS, "rows": 3, "T": 12, "pack": True, "seed": 4, "lr": 1e-2, "window": 2, "optimizer": muon, "clip": 1.0,
        "dim": 16, "workers": 0, "world": 1, "steps": STEPS}
CHANGES = {"objective": [PrefixLM(.5), Diffusion(3)], "items": [ITEMS[:-1], ITEMS[::-1], [*ITEMS[:5], Example([1, 2]), *ITEMS[6:]]], "rows": [2, 4], "T": [11, 16],
           "pack": [False], "seed": [0, 5], "lr": [1e-3, 2e-2], "window": [1, 3], "optimizer": [adamw], "clip": [.5], "dim": [8]}
MAY = {"workers": [2], "steps": [STEPS + 3]}  # how batches are made, and more steps, are no part of what a run is


class Stop(Callback):
    def __init__(self, at): self.at = at
    def after_step(self, trainer): trainer.stop = trainer.done == self.at


def made(at=None, **change):
    s = BASE | change
    torch.manual_seed(0)
    loader = Loader(s["items"], s["objective"], s["rows"], s["T"], s["pack"], s["seed"], rank=0, world=s["world"], workers=s["workers"])
    model = Transformer(Size(30, s["dim"], 2, layers=1, length=16))
    return Trainer(model, s["objective"], loader, s["lr"], s["steps"], s["window"], s["optimizer"], clip=s["clip"],
                   schedule=constant, callbacks=[Stop(at)])


def constant(step: int, steps: int) -> float: return 1.0


def end(trainer): return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


WHOLE = {}


def whole(steps: int) -> torch.Tensor:
    if steps not in WHOLE: t = made(steps=steps); t.fit(); WHOLE[steps] = end(t)
    return WHOLE[steps]


@settings(max_examples=70)
@given(st.integers(1, STEPS - 1), st.sampled_from([None, *CHANGES, *MAY]), st.integers(0, 9))
def test_the_same_end_or_one_line(tmp_path_factory, at, name, which):
    "What a run depends on is refused by name; what it does not depend on changes nothing, bit for bit."
    choices = {**CHANGES, **MAY}.get(name, [None])
    change = {} if name is None else {name: choices[which % len(choices)]}
    first = made(at); first.fit()
    path = save_state(tmp_path_factory.mktemp("c") / f"step-{at:08}", **trainer_state(first))
    assert checkpoints(path.parent) == [path]
    torch.manual_seed(99)
    again = made(**change)
    try: restore(again, load_state(path))
    except ValueError as e:
        assert name in CHANGES and "\n" not in str(e)
        said = {"items": "batches.data", "dim": "another model", "rows": "batches.rows", "T": "batches.T", "pack": "batches.pack", "seed": "batches.seed"}
        assert said.get(name, name) in str(e)
        return
    assert name not in CHANGES, f"{name} was changed, and nobody said so"
    again.fit()
    assert torch.equal(end(again), whole(again.steps)) and again.done == again.steps
