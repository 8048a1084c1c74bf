"""What the core promises beside training: heads, who may write, stops, looks, pictures, and doors that are shut."""
import importlib
import math
import signal
import types

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lmtrain
from lmtrain.batch import Example, Noise, Trace, collate
from lmtrain.checkpoint import Save, restore, trainer_state
from lmtrain.evaluate import Evaluate, bits_interval, held_loss, likelihood, row_bits
from lmtrain.generation import fill, generate, left_to_right, until
from lmtrain.model import LM, Cache, Size, Transformer, evaluating, load, save, to_transformers, with_heads
from lmtrain.pretrained import Pretrained
from lmtrain.objective import CLM, Objective, PrefixLM, hide, shift
from lmtrain.optim import adamw, matrices, muon
from lmtrain.text import examples, train_bpe, train_chars
from lmtrain.loader import Loader
from lmtrain.train import Callback, History, Task, Trainer
from lmtrain.views import Explore, Watch, compare, explore, paint, paint_trace, replay

TEXT = ["the ship sails at dawn. ", "the sea is calm and low. "] * 8
TOK = train_bpe(TEXT, 300)
ROWS = examples(TEXT, TOK, T=16)


def model_of():
    torch.manual_seed(0)
    return Transformer(Size(len(TOK), 32, 2, layers=2, length=40))


class Hidden(Objective):
    "Both sides in view."
    def __init__(self, rate=.4): self.rate = rate
    def __repr__(self): return f"Hidden({self.rate})"
    def __eq__(self, other): return isinstance(other, Hidden)
    def corrupt(self, b, noise): return hide(b.set(order=torch.zeros_like(b.order)), noise(b) < self.rate, TOK.mask_token_id)


# ---- names

def test_public_names_are_what_they_say():
    "Each name of the package is the object, asked twice, after its module was imported, and never a module."
    for _ in range(2):
        for name in lmtrain.__all__:
            if name == "__version__": continue
            scope: dict = {}
            exec(f"from lmtrain import {name} as it", scope)
            module = importlib.import_module(f"lmtrain.{lmtrain._where[name]}")
            assert scope["it"] is getattr(module, name) and not isinstance(scope["it"], types.ModuleType)


def test_editors_see_signatures(tmp_path):
    "Jedi, which JupyterLab asks, knows each public name and its signature without running anything. Control: without the stub it does not."
    import shutil
    from pathlib import Path

    import jedi
    def signatures(root: Path, code: str) -> list[str]:
        project = jedi.Project(root, smart_sys_path=False, sys_path=[str(root), *__import__("sys").path[1:]])
        return [s.to_string() for s in jedi.Script(code, path=root / "x.py", project=project).get_signatures(1, len(code))]
    root = Path(lmtrain.__file__).parent.parent
    assert signatures(root, "from lmtrain import Trainer; Trainer(")[0].startswith("Trainer(model: LM, objective: Objective, batches: Iterable[Batch]")
    assert signatures(root, "import lmtrain; lmtrain.generate(")[0].startswith("generate(model: LM, prompts: Sequence[Sequence[int]]")
    names = {c.name for c in jedi.Script("import lmtrain; lmtrain.", path=root / "x.py").complete(1, len("import lmtrain; lmtrain."))}
    assert {*lmtrain.__all__} <= names
    shutil.copytree(root / "lmtrain", tmp_path / "lmtrain", ignore=shutil.ignore_patterns("*.pyi", "__pycache__"))
    assert signatures(tmp_path, "from lmtrain import Trainer; Trainer(") == []


# ---- noise

def test_no_two_examples_share_their_numbers():
    "Of 60,000 examples the sorted numbers of 64 places differ; with places not spread, the negative control, many agree."
    index, place = torch.arange(60_000)[:, None], torch.arange(64)                     # (N,1) (T,)
    alike = lambda u: len(u) - len(torch.unique(u.sort(1).values, dim=0))
    assert alike(Noise().at(index, place)) == 0
    from lmtrain.batch import mix
    h = mix(index ^ mix(mix(mix(7) ^ 0) ^ 0))                                          # (N,1)
    assert alike((mix(h ^ place) >> 8).float()) > 5  # 27 are expected: pairs whose upper 26 bits agree


def test_seed_0_begins_like_any_other():
    "The first number of the first seeds: none is 0, and their mean is near a half (five standard errors)."
    first = torch.tensor([float(Noise(s).at(torch.tensor([0]), 0)) for s in range(400)])  # (400,)
    assert first.min() > 0 and abs(float(first.mean()) - .5) < 5 * math.sqrt(1 / 12 / 400)


# ---- heads

def test_heads():
    "A view with shared weights; unused heads are frozen; saved beside the model, which transformers opens without them."
    class Value(CLM): uses = ("value",)
    model = model_of()
    bare = set(model.state_dict())
    head = with_heads(with_heads(model, value=1), relation=3)
    assert set(model.state_dict()) == bare and head.layers[0] is model.layers[0]
    Task(head, Value())
    assert [p.requires_grad for h in ("value", "relation") for p in head.heads[h].parameters()] == [True, True, False, False]
    inner, rest = matrices(Task(head, Value()))
    assert not {id(p) for p in inner} & {id(p) for p in (*head.heads.parameters(), head.head.weight)}  # Muon is for layers
    assert len(rest) == len(list(Task(head, Value()).parameters())) - len(inner) - 2  # the frozen head is in neither


def test_heads_are_saved(tmp_path):
    "Heads come back, logits too; a directory without them has none; transformers is not disturbed."
    head, b = with_heads(model_of(), value=1), collate([Example([1, 5, 6])])
    again, _ = load(save(head, TOK, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(again.heads["value"](again(b)), head.heads["value"](head(b)))
        assert torch.allclose(to_transformers(head)(b.ids).logits, head.head(head(b)), atol=1e-5)
    assert not hasattr(load(save(model_of(), TOK, tmp_path / "n"))[0], "heads")


def test_dropped_to_a_few_steps_in_evaluation():
    "Inside `evaluating` dropout is off and nothing keeps gradients; afterwards each model is as it was, after an error too."
    a, b = model_of(), model_of()
    b.eval()
    with pytest.raises(KeyError):
        with evaluating(a, b):
            assert not a.training and not torch.is_grad_enabled()
            raise KeyError
    assert a.training and not b.training and torch.is_grad_enabled()


def test_likelihood_without_dropout():
    "A model left in training mode is scored the same twice; with its dropout on, the negative control, it is not."
    net = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16, resid_pdrop=.5))
    model = Pretrained(net); model.train()
    items = [Example([1, 5, 6, 7, 8, 9])]
    assert likelihood(model, items)[0] == likelihood(model, items)[0]
    b = collate(items)
    assert not torch.equal(model(b), model(b))


# ---- who may write

def test_what_was_asked_decides(tmp_path):
    "CLM and PrefixLM make a writer, a masked objective does not; its directory says so and `generate` and bits refuse."
    for objective, writes in ((CLM(), True), (PrefixLM(.5), True), (Hidden(), False)):
        model = model_of()
        Trainer(model, objective, Loader(ROWS, objective, 4, 16), steps=1).fit()
        again, _ = load(save(model, TOK, tmp_path / type(objective).__name__))
        assert model.causal == again.causal == writes
        if writes: generate(again, [[1]], 2); row_bits(again, ROWS[:2] and ROWS)
        else:
            with pytest.raises(ValueError, match="both sides"): generate(again, [[1]], 2)
            with pytest.raises(ValueError, match="both sides"): row_bits(again, ROWS)
            with pytest.raises(ValueError, match="both sides"): likelihood(again, [Example([1, 2])])
            fill(again, torch.tensor([[1, 0, 0]]), torch.tensor([[False, True, True]]), 3, left_to_right)


def test_asks_ahead():
    "Only an asked token that does not see the next one, and must say it, counts; blocks that say themselves do not."
    b = collate([Example([1, 5, 6, 7])])
    assert shift(b).predicts_next and not b.predicts_next
    assert not shift(b).set(order=torch.zeros_like(b.order)).predicts_next
    blocks = b.set(order=b.order // 2)
    assert not hide(blocks, b.order >= 0, 3).predicts_next and shift(blocks).predicts_next


# ---- writing

def test_rows_do_not_depend_on_the_batch():
    "Drawn texts are the same for any number of rows at a time; other seeds, the negative control, give others."
    model = model_of(); model.data = [p.data.mul_(4) for p in model.parameters()]
    prompts = [[1] * n for n in (1, 5, 2, 7, 1, 3)]
    one, two, all_ = (generate(model, prompts, 8, rows=n) for n in (1, 2, 64))
    assert torch.equal(one.ids, all_.ids) and torch.equal(two.ids, all_.ids) and torch.equal(one.when, all_.when)
    assert torch.allclose(one.p, all_.p, atol=1e-5)
    assert not torch.equal(generate(model, prompts, 8, seed=1).ids, all_.ids)
    assert not torch.equal(all_.ids[0, :9], all_.ids[4, :9])  # equal prompts, other numbers, other texts


def test_canvas_draws_what_the_fast_path_draws():
    "At any temperature, for two rows of the same length."
    model = model_of(); model.data = [p.data.mul_(4) for p in model.parameters()]
    ids = torch.tensor([[1, 5, 6, 0, 0, 0, 0], [1, 7, 8, 0, 0, 0, 0]])                 # (2,7)
    for t in (0., .7, 1.):
        slow = fill(model, ids, ids == 0, 3, left_to_right, t, shifted=True)
        assert torch.equal(slow.ids, generate(model, [[1, 5, 6], [1, 7, 8]], 4, t).ids)


def test_stops():
    "A row ends with the first of its stops; each stop looks at the row's own text only."
    model = model_of(); model.data = [p.data.mul_(4) for p in model.parameters()]
    free = generate(model, [[1], [1, 5]], 30, seed=2)
    written = [TOK.decode(free.ids[r][free.when[r] > 0]) for r in range(2)]
    stop = written[0][6:8]
    t = generate(model, [[1], [1, 5]], 30, seed=2, stop=until(TOK, stop))
    for r in range(2):
        text = TOK.decode(t.ids[r][t.when[r] > 0])
        assert written[r].startswith(text) and (stop in text) == (stop in written[r])
        assert stop not in TOK.decode(t.ids[r][t.when[r] > 0][:-1])


@pytest.mark.parametrize("call, says", [
    (lambda m: generate(m, [[1]], 2, top_p=0.), "top_p"), (lambda m: generate(m, [[1]], 2, temperature=-1.), "temperature"),
    (lambda m: generate(m, ["hello"], 2), "encode"), (lambda m: examples("the sea", TOK, 8), "list of texts"),
    (lambda m: train_bpe("the sea"), "list of texts"), (lambda m: train_chars("the sea"), "list of texts"),
    (lambda m: Trainer(m, CLM(), [collate(ROWS[:2])], steps=1).fit(), "nothing in the loss"),
    (lambda m: Trainer(m, CLM(), Loader(ROWS, PrefixLM(.5), 4, 16)), "give both the same"),
    (lambda m: next(iter(Loader([], CLM(), 4, 16))), "empty"),
    (lambda m: [b for b, _ in zip(Loader(iter(ROWS[:4]), CLM(), 4, 16), range(3), strict=False)], "only once"),
])
def test_doors(call, says):
    "What cannot be meant is refused at the door, by name."
    with pytest.raises(ValueError, match=says): call(model_of())


def test_other_models_are_told_how():
    "`generate` on a class of one's own names the way."
    class Own(LM): causal = True
    with pytest.raises(TypeError, match="left_to_right"): generate(Own(), [[1]], 2)


def test_a_cache_that_cannot_be_right():
    "If what was read may see what comes, reading in parts is wrong, and is refused."
    model, b = model_of(), collate([Example([1, 5, 6, 7])])
    b = b.set(order=torch.zeros_like(b.order)).with_extra(pos=b.pos)
    part = lambda s: b.each(lambda c: c[:, s] if c.ndim > 1 else c)
    cache = Cache(); model(part(slice(0, 2)), cache)
    with pytest.raises(ValueError, match="both at once"): model(part(slice(2, 4)), cache)


# ---- looks while training

def test_evaluate_and_watch():
    "Looks before the first step, every so many, and after the last; the pictures are of the model as it then was."
    model, looks = model_of(), Evaluate(lambda m: held_loss(m, CLM(), ROWS), every=3)
    watch = Watch(shift(collate(ROWS[:1])), TOK, every=4)
    Trainer(model, CLM(), Loader(ROWS, CLM(), 8, 16), lr=3e-3, steps=8, callbacks=[looks, watch]).fit()
    assert looks.seen["step"] == [0, 3, 6, 8] and looks.seen["clm"][-1] < looks.seen["clm"][0]
    assert [s for s, _ in watch.pictures] == [0, 4, 8] and len({p for _, p in watch.pictures}) == 3
    with pytest.raises(ValueError): Evaluate(print, 0)


def test_held_loss_is_the_trainers_mean():
    "Cut into batches or not: the loss of the whole window, by its sums and counts."
    model, b = model_of(), CLM().corrupt(collate(ROWS[:6]), Noise())
    with torch.no_grad(): want = float(CLM().loss(model, b)["clm"] / CLM().count(b)["clm"])
    for n in (1, 4, 6): assert abs(held_loss(model, CLM(), ROWS[:6], batch=n)["clm"] - want) < 1e-5


def test_bits_interval():
    "The middle is bits per byte; a model that knows nothing has an interval around its own number only."
    model = model_of()
    mean, low, high = bits_interval(model, ROWS)
    assert low <= mean <= high and abs(mean - row_bits(model, ROWS).sum() / ROWS.nbytes) < 1e-9


# ---- pictures with sliders

def test_replay_shows_what_was_written_by_a_step():
    "After k steps k tokens are readable and the rest are gaps; the last step, and a page without a kernel, show all."
    trace = Trace(torch.tensor([[1, 10, 11, 12, 13, 0]]), torch.tensor([[0, 3, 1, 4, 2, -1]]), torch.ones(1, 6))
    box = replay(trace, TOK)
    whole = str(paint_trace(trace, TOK, 1))
    assert box.slider.max == box.play.max == 4 and box.view.value == whole == box._repr_mimebundle_()["text/html"]
    for step in range(5):
        box.slider.value = step
        assert box.view.value == str(paint_trace(trace, TOK, 1, step)) and box.view.value.count("░░") == 4 - step
        assert all((f">{k}</sub>" in box.view.value) == (k <= step) for k in (1, 2, 3, 4))
        assert f"{step} tokens were written" in box.view.value
    assert str(paint_trace(trace, TOK, 1, 2)) != whole                                 # control: a step is not the whole


def test_explore_shows_the_loaders_batch():
    "For a seed, an epoch and a place in the run, what `explore` paints is what the loader gives; another seed, the control, is not."
    for epoch, ahead in ((0, 0), (0, 2), (1, 1)):
        loader = Loader(ROWS, PrefixLM(.5), 4, 16, seed=3)
        loader.load_state_dict({"epoch": epoch, "used": 0})
        base, noise = loader.peek(ahead)
        b = [b for b, _ in zip(loader, range(ahead + 1), strict=False)][-1]
        box = explore(loader.objective, base, TOK, noise, rows=4)
        assert str(paint(b, TOK, 4)) in box.picture == box.view.value
        box.noise[0].value = 4
        assert str(paint(b, TOK, 4)) not in box.picture == box.view.value


def test_sliders_are_the_fields():
    "Each number of the dataclass has a control, which changes what is painted; a value that is refused is said, not raised."
    box = explore(PrefixLM(.5), collate(ROWS[:2]), TOK)
    assert isinstance(box, Explore) and list(box.controls) == ["cut"]
    before = box.view.value
    box.controls["cut"].value = 1.
    assert box.view.value != before and "PrefixLM(cut=1.0)" in box.view.value
    box.controls["cut"].value = 0
    assert "cut=None" in box.view.value
    empty = explore(PrefixLM(), collate([Example([5, 6], [True, True])]), TOK)
    assert "has no prefix" in empty.view.value
    assert "text/html" in box._repr_mimebundle_() and box._repr_mimebundle_()["text/html"] == box.view.value
    assert explore(Hidden(), collate(ROWS[:2]), TOK).controls == {}


def test_compare():
    "Each objective is named and counted, and the same noise hides more of the same."
    base = collate(ROWS[:1])
    html = compare([CLM(), Hidden(.2), Hidden(.6)], base, TOK)
    some, more = (Hidden(r).corrupt(base, Noise()).weights for r in (.2, .6))          # (1,T) each
    assert all(repr(o) in html for o in (CLM(), Hidden(.2), Hidden(.6))) and (more >= some).all()
    for w in (some, more): assert f"{int(w.sum())} of {int((base.doc > 0).sum())} tokens in the loss" in html


# ---- checkpoints and faults

def test_another_optimizer_is_refused():
    "A state kept with AdamW does not go into Muon in silence."
    make = lambda o: Trainer(model_of(), CLM(), Loader(ROWS, CLM(), 4, 16), steps=2, optimizer=o)
    state = trainer_state(make(adamw))
    with pytest.raises(ValueError, match="optimizer was adamw and is muon"): restore(make(muon), state)


def test_ctrl_c_is_given_back(tmp_path):
    "When a later callback fails at the start, Ctrl-C is Python's again."
    class Broken(Callback):
        def begin(self, trainer): raise KeyError
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError):
        Trainer(model_of(), CLM(), Loader(ROWS, CLM(), 4, 16), callbacks=[Save(tmp_path), Broken()]).fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_history_is_json(tmp_path):
    "A number that is not finite is null in the file, and not a number again when it is read."
    import json
    h = History(tmp_path / "h.jsonl")
    h.add({"step": 1, "loss": math.inf})
    assert json.loads((tmp_path / "h.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(History.read(tmp_path / "h.jsonl")["loss"][0])


def test_one_row_by_number():
    "b[0] is a batch of one row."
    b = collate(ROWS[:3])
    assert len(b[1]) == 1 and torch.equal(b[1].ids, b.ids[1:2])


def test_a_step_and_a_text_need_no_data_sets():
    "What a GPU's benchmark imports brings neither datasets nor widgets, and its lines run at the size of a toy."
    import subprocess
    import sys
    code = "import sys; sys.argv = ['gpu', '--toy']; from benchmarks.gpu import main; main(); print({'datasets', 'ipywidgets', 'anywidget'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=__file__.rpartition("tests")[0], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "set()", done.stderr[-1500:]
    for kind in ("CLM ", "MLM", "diffusion", "block diffusion", "CLM, packed"):
        for how in ("eager", "compiled"): assert any(kind in s and how in s for s in lines)
    assert sum("writing" in s for s in lines) == 2 and sum("x transformers" in s for s in lines) == 2
