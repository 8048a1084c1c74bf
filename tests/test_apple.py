"""Apple's GPUs have no 64-bit floats: everything that trains, scores or writes, on a device that refuses them (tests/apple.py)."""
import copy
import json

import pytest
import torch
from apple import device

from lmtrain.batch import Example, Noise, collate, to_float64
from lmtrain.checkpoint import Save, load_state, restore, trainer_state
from lmtrain.evaluate import bits_per_byte, likelihood, pseudo_likelihood
from lmtrain.generation import distribution, fill, generate, left_to_right, uniform
from lmtrain.loader import Loader
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM, PrefixLM
from lmtrain.objectives.diffusion import BlockDiffusion, Diffusion, Stepped, Uniform, exact_k, nelbo
from lmtrain.objectives.masked import MLM, Spans
from lmtrain.objectives.mixed import Mix
from lmtrain.objectives.samplers import first_hitting, unmask
from lmtrain.optim import muon
from lmtrain.text import examples
from lmtrain.train import Trainer

V, M = 40, 39
IDS = torch.arange(4, 39)
ROWS = [Example([1, *range(5 + n, 15 + n)], index=n) for n in range(8)]
OBJECTIVES = [CLM(), PrefixLM(.5), MLM(M, IDS), Spans(M, range(4, 39)), Diffusion(M), Diffusion(M, exact_k), Diffusion(M, Stepped(eps=0., steps=4)), BlockDiffusion(M, 4),
              Uniform(range(V)), Mix((.5, .5), clm=CLM(), mntp=MLM(M, IDS, shifted=True))]


def made() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Size(V, 16, 2, layers=1, length=32))


def losses(objective, optimizer=None, callbacks=()) -> list[float]:
    more = {} if optimizer is None else {"optimizer": optimizer}
    return Trainer(made(), objective, Loader(ROWS, objective, 4, 16), steps=3, callbacks=callbacks, bf16=False, **more).fit()["loss"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:40])
def test_every_objective_trains_there(objective, monkeypatch):
    "Three steps have the losses that they have on the CPU. Control: where the package does not know, `fit` fails in step 1."
    want = losses(objective)
    with device(monkeypatch): assert losses(objective) == pytest.approx(want, rel=1e-5)
    monkeypatch.setattr("lmtrain.batch.WITHOUT_FLOAT64", {"mps"})
    with device(), pytest.raises(TypeError, match="float64"): losses(objective)


def test_muon_and_checkpoints_there(tmp_path, monkeypatch):
    "Muon, and a run that was stopped and restored, end as on the CPU."
    want = losses(CLM(), muon)
    with device(monkeypatch):
        assert losses(CLM(), muon) == pytest.approx(want, rel=1e-4)
        monkeypatch.setattr(torch.mps, "get_rng_state", torch.get_rng_state, raising=False)
        losses(CLM(), callbacks=[Save(tmp_path, every=2)])
        t = Trainer(made(), CLM(), Loader(ROWS, CLM(), 4, 16), steps=3, bf16=False)
        restore(t, load_state(tmp_path / "step-00000002")); t.fit()
        assert t.history["loss"] == pytest.approx(losses(CLM())[2:], rel=1e-5) and trainer_state(t)["progress"]["done"] == 3


def test_scoring_and_writing_there(monkeypatch, tok, pages):
    "Bounds, bits, likelihoods, text and unmasking are the CPU's."
    model, rows = made().eval(), [*ROWS]
    ids = torch.tensor([[1, 5, 6, M, M]])
    text = examples(pages[:2], tok, 32)
    big = Transformer(Size(len(tok), 16, 2, layers=1, length=32)).eval()
    def all_of(model, big):
        return {"bits": bits_per_byte(big, text), "likelihood": likelihood(model, rows).tolist(), "pseudo": pseudo_likelihood(model, rows[:2], M).tolist(),
                "bound": nelbo(model, collate(rows), Diffusion(M), 2).nats.tolist(),
                "fill": fill(model, ids, ids == M, M, left_to_right, .8, shifted=True, seed=3).ids.cpu().tolist(),
                "generate": generate(model, [[1, 5], [1]], 6, temperature=.9, top_p=.9, seed=1).ids.tolist(),
                "unmask": unmask(model, [[1, 5]], 6, first_hitting(6), M, seed=2).ids.tolist()}
    want = all_of(model, big)
    with device(monkeypatch) as d: got = all_of(copy.deepcopy(model).to(d), copy.deepcopy(big).to(d))
    for name in want: assert torch.allclose(torch.tensor(got[name], dtype=torch.float64), torch.tensor(want[name], dtype=torch.float64), rtol=1e-5), name


def test_corruption_there(monkeypatch):
    "A batch that already lies there is corrupted to the same tokens and weights."
    for o in OBJECTIVES:
        want = o.corrupt(collate(ROWS), Noise(5))
        with device(monkeypatch) as d: got = o.corrupt(collate(ROWS).to(d), Noise(5)).to("cpu")
        assert torch.equal(got.ids, want.ids) and torch.allclose(got.weights, want.weights), o


def test_to_float64(monkeypatch):
    "64 bits: in place on the CPU, on the CPU from a device that has none; odds and uniform numbers are the same there."
    x = torch.randn(2, 9)
    assert to_float64(x).dtype == torch.float64 and torch.equal(to_float64(x).float(), x)
    with device(monkeypatch) as d:
        there = x.to(d)
        assert there.device.type == "meta" and not to_float64(there).is_meta and torch.equal(to_float64(there), x.double())
        for knobs in ((0.,), (.7, .8)): assert torch.equal(distribution(there, *knobs), distribution(x, *knobs))
        at = torch.arange(4)
        assert torch.equal(uniform(Noise(), at.to(d), at.to(d), 3), uniform(Noise(), at, at, 3))
        with pytest.raises(TypeError, match="float64"): there.double()                 # the control: it does refuse
        with pytest.raises(RuntimeError, match="same device"): there + x


def test_commands_use_the_accelerator(tmp_path, monkeypatch, capsys):
    "`generate` and `evaluate` move the model to the accelerator that is there, and say what they say on the CPU."
    from typer.testing import CliRunner

    from lmtrain import save, train_bpe
    from lmtrain.cli import app
    texts = [f"the sea was calm on day {i} and the ship, number {i * i}, was old" for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tok = train_bpe(texts, 300)
    save(Transformer(Size(len(tok), 16, 2, layers=1, length=64)).eval(), tok, tmp_path / "m")
    words = (["generate", str(tmp_path / "m"), "--tokens", "12"], ["evaluate", str(tmp_path / "m"), "--data", str(tmp_path / "t.jsonl")])
    want, seen = [CliRunner().invoke(app, w).stdout for w in words], []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, b, cache=None: seen.append(b.ids.device.type) or forward(self, b, cache))
    with device(monkeypatch): got = [CliRunner().invoke(app, w) for w in words]
    assert [g.stdout for g in got] == want and all(want), [g.exception for g in got]
    assert {*seen} == {"meta"}
