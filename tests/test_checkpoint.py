"""Checkpoints: complete, atomic, checked. Killed, damaged, and out of space."""
import builtins
import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from lmtrain import checkpoint as module
from lmtrain.batch import Example
from lmtrain.checkpoint import Save, checkpoints, latest, load_state, restore, resume, save_state, trainer_state, verify
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM
from lmtrain.optim import adamw, muon
from lmtrain.loader import Loader
from lmtrain.train import Callback, Trainer


class Stop(Callback):
    "Ask for the end after a number of steps."
    def __init__(self, at): self.at = at

    def after_step(self, trainer): trainer.stop = trainer.done == self.at


class Dropping(Transformer):
    "A model with dropout, whose future depends on torch's generator."
    def forward(self, b): return nn.functional.dropout(super().forward(b), .1, self.training)


def rows(n=40):
    g = torch.Generator().manual_seed(0)
    return [Example([1, *torch.randint(3, 30, (int(torch.randint(3, 11, (1,), generator=g)),), generator=g).tolist()])
            for _ in range(n)]


def new(*callbacks, optimizer=muon, kind=Dropping, workers=0, steps=12, window=2):
    torch.manual_seed(0)
    loader = Loader(rows(), CLM(), 3, 12, pack=True, seed=4, workers=workers)
    return Trainer(kind(Size(30, 16, 2, layers=2, length=12)), CLM(), loader, lr=1e-2, steps=steps, window=window,
                   optimizer=optimizer, callbacks=callbacks)


def weights(t): return [p.detach().clone() for p in t.task.parameters()]


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# ---- complete

@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_resumed_is_uninterrupted(optimizer, tmp_path):
    "Stopped at every step in turn, checkpoints, read back into a new trainer: the same parameters, bit for bit, with dropout."
    whole = new(optimizer=optimizer); whole.fit()
    for at in range(1, 12):
        first = new(Stop(at), optimizer=optimizer); first.fit()
        save_state(tmp_path / str(at), **trainer_state(first))
        torch.manual_seed(99)
        again = new(optimizer=optimizer); restore(again, load_state(tmp_path / str(at)))
        assert again.done == at
        again.fit()
        assert same(weights(whole), weights(again)), at
        assert again.history["loss"] == whole.history["loss"][at:]


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "batches"])
def test_every_part_is_needed(part):
    "Negative control: with any one part left as a new run has it, the end is another."
    whole = new(); whole.fit()
    first = new(Stop(6)); first.fit()
    state, fresh = trainer_state(first), trainer_state(new())
    if part == "batches": state["progress"]["batches"] = fresh["progress"]["batches"]
    else: state[part] = fresh[part]
    again = new(); restore(again, state); again.fit()
    assert not same(weights(whole), weights(again))


def test_states_come_back_as_they_were(tmp_path):
    "Nested states of every kind, odd floats, empty and tied tensors, several types."
    tied = torch.randn(3, 4)
    state = {"a": {"b": [1, 2.5, 1e-300, None, True, "text"]}, "tied": tied, "again": tied, "view": tied[1:],
             "none": torch.zeros(0), "half": torch.randn(2).bfloat16(), "bits": torch.arange(5, dtype=torch.uint8),
             "scalar": torch.tensor(3.), "turned": tied.T}
    back = load_state(save_state(tmp_path / "x", it=state))["it"]
    assert back["a"] == state["a"]
    for k, v in state.items():
        if isinstance(v, torch.Tensor): assert torch.equal(back[k], v) and back[k].dtype == v.dtype, k
    from safetensors.torch import load_file
    stored = load_file(tmp_path / "x" / "it.safetensors")
    assert "tied" in stored and "again" not in stored


def test_model_keys_are_the_bare_models(tmp_path):
    "No prefix of a wrapper, tied embeddings once, optimizer entries named after parameters, and no pickle."
    t = new(Stop(1)); t.fit()
    save_state(tmp_path / "x", **trainer_state(t))
    from safetensors.torch import load_file
    model, optimizer = (load_file(tmp_path / "x" / f"{n}.safetensors") for n in ("model", "optimizer"))
    names = {n for n, _ in t.task.model.named_parameters()}
    assert set(model) == names and {k.rsplit(".", 1)[0] for k in optimizer} == names
    assert {p.suffix for p in (tmp_path / "x").iterdir()} == {".json", ".safetensors", ""}


def test_what_cannot_be_kept_is_refused(tmp_path):
    for bad, message in ({"f": open}, "cannot be kept"), ({.5: 2}, "neither text"):
        with pytest.raises(TypeError, match=message): save_state(tmp_path / "x", it=bad)
    with pytest.raises(TypeError, match="use a Loader"):
        trainer_state(Trainer(Transformer(Size(9, 8, 2, layers=1)), CLM(), []))
    assert not list(tmp_path.iterdir())
    save_state(tmp_path / "x", it={})
    with pytest.raises(FileExistsError, match="never written over"): save_state(tmp_path / "x", it={})
    with pytest.raises(ValueError, match="at least 1"): Save(tmp_path, every=0)


# ---- checked

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    t = new(Stop(2)); t.fit()
    return save_state(tmp_path_factory.mktemp("c") / "step-00000002", **trainer_state(t))


def test_every_flipped_bit_is_noticed(whole):
    "300 bytes over all files, a random bit of each flipped in turn, the first and last of each file among them."
    verify(whole)
    dice, files = random.Random(0), sorted(whole.iterdir())
    spots = [(p, i) for p in files for i in (0, p.stat().st_size - 1)]
    while len(spots) < 300: p = dice.choice(files); spots.append((p, dice.randrange(p.stat().st_size)))
    for path, i in spots:
        good = path.read_bytes()
        bad = bytearray(good); bad[i] ^= 1 << dice.randrange(8); path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged|missing"): verify(whole)
        path.write_bytes(good)
    verify(whole)


def test_missing_cut_and_extra_files(whole):
    for path in sorted(whole.iterdir()):
        good = path.read_bytes()
        for spoil in (path.unlink, lambda p=path, g=good: p.write_bytes(g[:-1]), lambda p=path: p.write_bytes(b"")):
            spoil()
            with pytest.raises(ValueError, match="damaged|missing|whole"): verify(whole)
            path.write_bytes(good)
    (whole / "more.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="not of this checkpoint: more.bin"): verify(whole)
    (whole / "more.bin").unlink(); verify(whole)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"): verify(whole / "nothing")


def test_sha256sum_agrees(whole):
    "The list is one that the sha256sum program checks."
    done = subprocess.run(["sha256sum", "--check", "--quiet", module.SUMS], cwd=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_one_before_is_used(tmp_path):
    "The newest is damaged: it is named, and the run goes on from the one before to the same end."
    end = new(); end.fit()
    run = new(Save(tmp_path, every=3, keep=3), Stop(9)); run.fit()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009", "step-00000006", "step-00000003"]
    (checkpoints(tmp_path)[0] / "rng.safetensors").unlink()
    said: list[str] = []
    again = new(); assert resume(again, tmp_path, said.append) == 6
    assert "rng.safetensors is missing; looking for the checkpoint before it" in said[0]
    again.fit()
    assert same(weights(end), weights(again))
    assert latest(tmp_path / "nothing") is None and resume(new(), tmp_path / "nothing") == 0


def test_keep(tmp_path):
    run = new(Save(tmp_path, every=2, keep=2)); run.fit()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000012", "step-00000010"]


# ---- atomic

def test_a_disk_that_fills_at_every_write(tmp_path, monkeypatch):
    "The n-th write, sync or rename fails, for every n: nothing is left beside, and the checkpoint before is whole."
    state = {"model": {"w": torch.ones(4)}, "progress": {"done": 1}}
    save_state(tmp_path / "step-1", **state)
    count = limit = 0
    def failing(f):
        def g(*args, **kw):
            nonlocal count
            writes = f is not builtins.open or "w" in str(args[1:] or kw.get("mode", ""))
            count += writes
            if writes and count == limit: raise OSError(errno.ENOSPC, "No space left on device")
            return f(*args, **kw)
        return g
    for owner, name in (module, "save_file"), (os, "replace"), (os, "fsync"), (module.Path, "write_text"), (module.Path, "mkdir"):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    while limit < 40:
        count, limit = 0, limit + 1
        try: save_state(tmp_path / "step-2", **state)
        except OSError as e:
            assert e.errno == errno.ENOSPC
            assert {p.name for p in tmp_path.iterdir()} <= {"step-1", "step-2"}
            verify(tmp_path / "step-1")
            if (tmp_path / "step-2").exists(): verify(tmp_path / "step-2"); module.shutil.rmtree(tmp_path / "step-2")
        else: break
    assert limit > 10  # each of them failed once before it passed
    verify(tmp_path / "step-2")


RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_checkpoint import new, Callback, Save, resume, weights, same, save_state
class Say(Callback):
    def after_step(self, trainer): print("step", flush=True)
t = new(Say(), Save({root!r}, every=1, keep=2), steps=80, window=1)
resume(t, {root!r})
t.fit()
save_state({end!r}, end={{str(i): w for i, w in enumerate(weights(t))}})
"""


def test_killed_again_and_again(tmp_path):
    "SIGKILL at ten random moments, most of them while it writes: the same end, bit for bit."
    torch.set_num_threads(1)
    want = new(steps=80, window=1); want.fit()
    code = RUN.format(tests=os.path.dirname(__file__), root=str(tmp_path / "run"), end=str(tmp_path / "end"))
    dice, kills = random.Random(1), 0
    while not (tmp_path / "end").exists():
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if kills < 10:  # after one to three of 80 steps, somewhere in the writing of the last one
            for _ in range(dice.randint(1, 3)): p.stdout.readline()
            time.sleep(dice.random() * .01); p.send_signal(signal.SIGKILL); kills += 1
        _, err = p.communicate()
        assert p.returncode in (0, -signal.SIGKILL), err
        if checkpoints(tmp_path / "run"): verify(checkpoints(tmp_path / "run")[0])
    assert kills == 10
    end = load_state(tmp_path / "end")["end"]
    assert same(weights(want), [end[str(i)] for i in range(len(end))])


def test_ctrl_c_finishes_the_step(tmp_path):
    "The first Ctrl-C keeps the state of a whole step and then stops; the handler is put back; the run goes on to the same end."
    end = new(); end.fit()
    class Interrupt(Callback):
        def after_step(self, trainer):
            if trainer.done == 5: signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    run = new(Save(tmp_path, every=100), Interrupt())
    with pytest.raises(KeyboardInterrupt): run.fit()
    assert signal.getsignal(signal.SIGINT) is before
    again = new(); assert resume(again, tmp_path, lambda _: None) in (5, 6)
    again.fit()
    assert same(weights(end), weights(again))


# ---- what a state depends on

def test_averages_go_where_their_optimizer_wants_them():
    """Fused AdamW keeps its step beside its parameters, wherever they are; here they are on the meta device, as a GPU
    would be another device than the CPU of the file. Control: moved by dimension alone, the step stays on the CPU."""
    run = new(Stop(2), optimizer=adamw); run.fit()
    state = trainer_state(run)
    other = new(optimizer=adamw)
    other.model.to("meta")
    other.optimizer = torch.optim.AdamW([p for p in other.model.parameters()])
    for g in other.optimizer.param_groups: g["fused"] = run.optimizer.param_groups[0]["fused"]
    assert other.optimizer.param_groups[0]["fused"]
    module.restore_optimizer(other, state["optimizer"])
    found = {(k, v.device.type) for s in other.optimizer.state.values() for k, v in s.items()}
    assert found == {("step", "meta"), ("exp_avg", "meta"), ("exp_avg_sq", "meta")}
    for g in other.optimizer.param_groups: g["fused"] = False          # an unfused one wants it on the CPU
    module.restore_optimizer(other, state["optimizer"])
    assert {v.device.type for s in other.optimizer.state.values() for k, v in s.items() if k == "step"} == {"cpu"}


def test_another_run_is_not_continued(tmp_path):
    "Rows, seed, data, objective, learning rate, window, optimizer: what differs is named, unless it is meant; more steps may."
    from lmtrain.objective import PrefixLM
    run = new(Stop(3)); run.fit()
    state = load_state(save_state(tmp_path / "x", **trainer_state(run)))
    def other(objective=None, items=None, rows_=3, seed=4, **more):
        objective = objective or CLM()
        loader = Loader(items or rows(), objective, rows_, 12, pack=True, seed=seed)
        given = {"lr": 1e-2, "steps": 12, "window": 2, "optimizer": muon} | more
        return Trainer(Dropping(Size(30, 16, 2, layers=2, length=12)), objective, loader, **given)
    for change, name in [({"lr": 1e-3}, "lr was 0.01 and is 0.001"), ({"seed": 5}, "batches.seed"), ({"rows_": 4}, "batches.rows"),
                         ({"items": rows(39)}, "batches.data"), ({"objective": PrefixLM(.5)}, "objective"), ({"window": 1}, "window"),
                         ({"items": [*reversed(rows())]}, "batches.data"), ({"optimizer": adamw}, "optimizer")]:
        with pytest.raises(ValueError, match=name): restore(other(**change), state)
    restore(other(lr=1e-3), state, changed=["lr"])
    longer = other(steps=20); restore(longer, state); longer.fit()
    assert longer.done == 20
    small = Trainer(Dropping(Size(30, 8, 2, layers=2, length=12)), CLM(), other().batches, lr=1e-2, window=2, optimizer=muon)
    with pytest.raises(ValueError, match="another model") as e: restore(small, state)
    assert "\n" not in str(e.value)


def test_records_are_the_same_in_another_process():
    "No address of an object enters a record. Control: the plain repr has one."
    from lmtrain.loader import described
    class Plain: pass
    assert " at 0x" in repr(Plain()) and described(Plain()) == described(Plain())


def test_a_foreign_folder_is_refused(tmp_path):
    "A new run in the folder of one that is ahead: an error before the first step, and nothing of it is lost."
    old = new(Save(tmp_path, every=4, keep=2)); old.fit()
    before = [p.name for p in checkpoints(tmp_path)]
    fresh = new(Save(tmp_path, every=1, keep=1))
    with pytest.raises(ValueError, match="step-00000012 lies ahead of this run, which is at step 0"): fresh.fit()
    assert fresh.done == 0 and [p.name for p in checkpoints(tmp_path)] == before


def test_what_was_just_written_stays(tmp_path):
    "Behind a damaged checkpoint of a later step each new one stays, the newest `keep` of them."
    run = new(Save(tmp_path, every=4, keep=3)); run.fit()
    (tmp_path / "step-00000012" / "rng.safetensors").unlink()
    again = new(Save(tmp_path, every=1, keep=1), Stop(9))
    assert resume(again, tmp_path, lambda _: None) == 8
    again.fit()
    verify(tmp_path / "step-00000009")
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000012", "step-00000009"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizers_of_torch_are_kept(kind, tmp_path):
    "What has a `state_dict` can be kept, whole numbers as keys included, and goes on bit for bit."
    def net(): torch.manual_seed(0); return nn.Linear(3, 2)
    def step(m, o, x): o.zero_grad(); m(x).square().sum().backward(); o.step()
    one, xs = net(), torch.randn(4, 5, 3)
    o = kind(one.parameters(), lr=.1); schedule = torch.optim.lr_scheduler.StepLR(o, 2)
    for x in xs[:2]: step(one, o, x); schedule.step()
    back = load_state(save_state(tmp_path / "x", model=one, optimizer=o, schedule=schedule))
    two = net(); two.load_state_dict(back["model"])
    p = kind(two.parameters(), lr=.1); p.load_state_dict(back["optimizer"])
    again = torch.optim.lr_scheduler.StepLR(p, 2); again.load_state_dict(back["schedule"])
    for x in xs[2:]: step(one, o, x); schedule.step(); step(two, p, x); again.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    "A NaN in a weight: neither a checkpoint nor a model is written, and what was there before stays."
    from lmtrain.model import save
    from lmtrain.text import train_bpe
    tok = train_bpe(["to be"], 270)
    run = new(Save(tmp_path / "c", every=1, keep=3), Stop(2)); run.fit()
    good = Transformer(Size(270, 16, 2, layers=1)); path = save(good, tok, tmp_path / "m")
    before = (path / "model.safetensors").read_bytes()
    for model, f in (run.model, lambda: trainer_state(run)), (good, lambda: save(good, tok, path)):
        with torch.no_grad(): next(model.parameters())[0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match="embed_tokens.weight is not finite"): f()
    assert (path / "model.safetensors").read_bytes() == before and len(checkpoints(tmp_path / "c")) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"c", "m"}
