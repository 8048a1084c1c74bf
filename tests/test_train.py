"""The loader's order, the arithmetic of a step, the optimizers, and the loop around them."""
import copy
import itertools
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import lmtrain.loader
from lmtrain.batch import Example, Noise, collate
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM, Objective, hide
from lmtrain.optim import Muon, Together, adamw, fitting_optimizer, matrices, muon, orthogonal, warmup_decay
from lmtrain.loader import Loader, numbered
from lmtrain.train import Callback, History, Progress, Task, Trainer

V, MASK = 50, 49


@dataclass
class Hidden(Objective):
    "A small masked objective: what is hidden depends on the noise alone."
    rate: float = .4
    def corrupt(self, b, noise): return hide(b, (noise(b) < self.rate) & (b.doc > 0), MASK)


def small(layers=1): return Transformer(Size(V, dim=16, heads=2, layers=layers))


def some(n, low=2, high=9):
    "n examples of unequal lengths; the first token of each says which it is."
    g = torch.Generator().manual_seed(n)
    return [Example([k % MASK, *torch.randint(MASK, (int(torch.randint(low, high, (1,), generator=g)) - 1,),
                                              generator=g).tolist()]) for k in range(n)]


def batches(n): return [CLM().corrupt(collate(some(2 * k)[-2:], 9), None) for k in range(1, n + 1)]


def trainer(data=None, steps=3, model=None, **more):
    return Trainer(model or small(), CLM(), batches(3) if data is None else data, steps=steps, **more)


# ---- a window's gradient

UNEQUAL = CLM().corrupt(collate(some(3, 2, 4) + some(3, 30, 40)), None)


def gradient(model, window, step=Trainer.backward):
    "One flat gradient of a window of micro-batches."
    t = Trainer(model, CLM(), [], steps=1)
    step(t, window)
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])           # (n,)


def mean_of_means(t, window):
    "Broken on purpose: each micro-batch divided by its own count."
    for b in window:
        loss = t.task(b)["clm"] / t.objective.count(b)["clm"] / len(window)
        loss.backward()


def far(one, two): return ((one - two).norm() / one.norm()).item()


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 2], [3, 3], [1, 2, 3], [5, 1], [0, 6, 0]], ids=str)
def test_window(sizes):
    "However a window is cut, empty micro-batches among them, its gradient is that of one batch within 1e-5."
    model = small(2)
    window = [UNEQUAL[i:j] for i, j in itertools.pairwise([0, *itertools.accumulate(sizes)])]
    want = gradient(model, [UNEQUAL])
    model.zero_grad()
    assert sum(map(len, window)) == 6 and far(want, gradient(model, window)) < 1e-5


def test_control_window():
    "The mean of the micro-batches' means is more than a hundredth off."
    model = small(2)
    want = gradient(model, [UNEQUAL])
    model.zero_grad()
    assert far(want, gradient(model, [UNEQUAL[:3], UNEQUAL[3:]], mean_of_means)) > .01


def test_window_means():
    "The reported loss is the mean over all asked tokens of the window, not over its micro-batches."
    model = small()
    t = Trainer(model, CLM(), [], steps=1)
    with torch.no_grad(): want = (CLM().loss(model, UNEQUAL)["clm"] / CLM().count(UNEQUAL)["clm"]).item()
    assert t.backward([UNEQUAL[:1], UNEQUAL[1:]]) == pytest.approx({"loss": want, "clm": want, "tokens": int((UNEQUAL.doc > 0).sum())}, rel=1e-5)


@pytest.mark.parametrize("k", [2, 4])
def test_foreign_accumulation(k):
    "An accelerator set to accumulate is refused: it would shrink the gradient, as the control shows."
    accelerator = Accelerator(gradient_accumulation_steps=k)
    with pytest.raises(ValueError, match="use window="): trainer(accelerator=accelerator)
    model = small()
    want = gradient(model, [UNEQUAL])
    model.zero_grad()
    t = Trainer(model, CLM(), [], steps=1)
    t.accelerator.gradient_accumulation_steps = k
    t.backward([UNEQUAL])
    assert far(want, k * torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-5


# ---- Loader

def loader(n=23, rows=4, pack=False, objective=None, **more):
    return Loader(some(n), objective or Hidden(), rows, 16 if pack else 9, pack=pack, seed=5, **more)


def take(batches, n): return list(itertools.islice(iter(batches), n))


COLUMNS = ("ids", "clean", "doc", "order", "answer", "targets", "weights", "index", "item", "role")


def same(one, two):
    "Two lists of batches with equal columns."
    return len(one) == len(two) and all(torch.equal(getattr(a, c), getattr(b, c))
                                        for a, b in zip(one, two, strict=True) for c in COLUMNS)


def apart(batches): return [row.set(item=row.role) for b in batches for row in b]  # a row's number is its batch's affair


def epoch(batches, epochs=1):
    "The batches of whole epochs: as many as hold 23 items an epoch, each known by its first token."
    out, seen = [], 0
    for b in batches:
        out.append(b)
        seen += int(((b.doc_pos == 0) & (b.doc > 0)).sum())
        if seen >= 23 * epochs: return out


def corrupted(batches):
    "What every token of every example became: (example, place) -> (read, asked)."
    return {(i, p): (t, w) for b in batches for i, p, t, w in zip(
        *(c[b.doc > 0].tolist() for c in (b.index, b.doc_pos, b.ids, b.weights)), strict=True)}


@pytest.mark.parametrize("pack", [False, True])
def test_each_item_once(pack):
    "Three epochs hold each item three times, in three orders, with three different masks."
    three = epoch(loader(pack=pack), 3)
    count = Counter(i for b in three for row in b.index for i in row.unique().tolist() if i >= 0)
    assert count == {i: 3 for i in range(23)}
    one = epoch(loader(pack=pack))
    two, three = three[len(one):2 * len(one)], three[2 * len(one):]
    orders = [[r[0].item() for b in bs for r in b.index] for bs in (one, two, three)]
    assert len({*map(tuple, orders)}) == 3 and all(o != sorted(o) for o in orders)
    assert corrupted(one) != corrupted(two) != corrupted(three)


@pytest.mark.parametrize("workers", [0, 2])
def test_corruption_ignores_layout(workers):
    "The same tokens are hidden whatever the rows of a batch, the packing and the workers."
    want = corrupted(epoch(loader()))
    assert len(want) == sum(map(len, some(23))) and 0 < sum(w for _, w in want.values()) < len(want)
    for rows, pack in (1, False), (7, False), (4, True), (2, True):
        assert corrupted(epoch(loader(rows=rows, pack=pack, workers=workers))) == want


def test_control_corruption():
    "A mask drawn from a generator changes with the rows of a batch."
    class Drawn(Hidden):
        def corrupt(self, b, noise):
            g = torch.Generator().manual_seed(noise.seed)
            return hide(b, (torch.rand(b.ids.shape, generator=g) < self.rate) & (b.doc > 0), MASK)
    assert corrupted(epoch(loader(objective=Drawn()))) != corrupted(epoch(loader(rows=7, objective=Drawn())))


@pytest.fixture(params=["one block", "many blocks", "stream"])
def source(request, monkeypatch):
    "Items as a list that fits one block, a list of several blocks, and a stream of several blocks."
    if request.param != "one block": monkeypatch.setattr(lmtrain.loader, "BLOCK", 8)
    class Stream:
        def __iter__(self): return iter(some(23))
    return Stream() if request.param == "stream" else some(23)


def shortened(e, noise):
    "An example cut at a place of its own, another in each epoch."
    n = 1 + int(noise.at(torch.tensor(e.index), 0, 7) * len(e))
    return replace(e, ids=e.ids[:n])


@pytest.mark.parametrize("pack, change", [(False, None), (True, None), (True, shortened)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks(source, pack, world, change):
    "The ranks' rows, put together in turn, are the rows of one; at an epoch's end they are shared out evenly."
    T = 16 if pack else 9
    def made(**more): return iter(Loader(source, Hidden(), 4, T, pack, seed=5, change=change, **more))
    alone = epoch(made(rank=0, world=1))
    ranks = [take(made(rank=r, world=world), -(-len(alone) // world)) for r in range(world)]
    turns = [*zip(*ranks, strict=True)]
    for k, turn in enumerate(turns):
        assert same(apart(turn), apart(alone[k * world:(k + 1) * world]))
    sizes = [len(b) for b in turns[-1]]
    assert max(sizes) - min(sizes) <= (1 if len(alone) % world else 4) and (not pack or all(b.ids.shape[1] == T for b in turns[-1]))


def test_control_ranks():
    "Ranks that shuffle for themselves share items: two different seeds are not the batches of one."
    ranks = [epoch(Loader(some(23), Hidden(), 4, 9, seed=s)) for s in (0, 1)]
    first = [{r[0].item() for b in bs[:3] for r in b.index} for bs in ranks]
    assert first[0] & first[1]


@pytest.mark.parametrize("pack, change", [(False, None), (True, None), (True, shortened)])
@pytest.mark.parametrize("world", [1, 2])
def test_resume(source, pack, world, change):
    "From the state at every step of two epochs the rest is the same, ids and noise."
    T = 16 if pack else 9
    def made(): return Loader(source, Hidden(), 4, T, pack, seed=5, rank=world - 1, world=world, change=change)
    n, l = 12, made()
    states, whole = [l.state_dict()], []
    for b in itertools.islice(l, n): whole.append(b); states.append(l.state_dict())
    assert max(s["epoch"] for s in states) >= 1
    for k, state in enumerate(states[:-1]):
        again = made()
        again.load_state_dict(json.loads(json.dumps(state)))
        assert again.state_dict() == state
        assert same(take(again, n - k), whole[k:]) and again.state_dict() == states[-1]


def test_control_resume():
    "A loader that starts the epoch again, or forgets which epoch it was, differs."
    l = loader()
    whole = take(l, 8)
    state = l.state_dict()
    rest = take(l, 3)
    for wrong in {**state, "used": 0}, {**state, "epoch": 0}:
        again = loader()
        again.load_state_dict(wrong)
        assert state != wrong and not same(take(again, 3), rest)
    assert len(whole) == 8


@pytest.mark.parametrize("pack", [False, True])
def test_workers(pack):
    "Two workers give the batches, and after each the state, of none; they fetch ahead, the state does not."
    alone, helped = loader(pack=pack), loader(pack=pack, workers=2)
    for n, (a, b) in enumerate(zip(alone, helped, strict=False)):
        assert same([a], [b]) and alone.state_dict() == helped.state_dict()
        if n == 9: break
    again = loader(pack=pack, workers=2)
    again.load_state_dict(helped.state_dict())
    assert same(take(again, 3), take(alone, 3))


@pytest.mark.parametrize("pack", [False, True])
def test_change(pack):
    "Each epoch holds what `change` makes of each example under that epoch's noise; a change made beforehand is static."
    two = epoch(loader(pack=pack, change=shortened), 2)
    def read(bs): return sorted(b.clean[r][b.index[r] == i].tolist() for b in bs for r in range(len(b))
                                for i in b.index[r].unique().tolist() if i >= 0)
    def wanted(e): return sorted(shortened(replace(x, index=n), Noise(5, e)).ids for n, x in enumerate(some(23)))
    one = next(n for n in range(1, len(two)) if len(read(two[:n])) == 23)
    assert read(two[:one]) == wanted(0) != wanted(1) == read(two[one:])
    static = [shortened(replace(x, index=n), Noise(5, 0)) for n, x in enumerate(some(23))]
    bs = epoch(Loader(static, Hidden(), 4, 16 if pack else 9, pack, seed=5), 2)
    half = next(n for n in range(1, len(bs)) if len(read(bs[:n])) == 23)
    assert read(bs[:half]) == read(bs[half:])


def pairs(n=11): return [[Example([k, 1, 2]), Example([k, 3])] for k in range(n)]


def test_items_stay_together():
    "The rows of an item are never parted, whatever the rows of a batch, and are numbered for its losses."
    for rows in 2, 3, 5:
        for b in take(Loader(pairs(), CLM(), rows, 4, seed=1), 6):
            assert b.item.tolist() == [n // 2 for n in range(len(b))] and len(b) <= rows
            assert b.role.tolist() == [0, 1] * (len(b) // 2) and (b.ids[::2, 0] == b.ids[1::2, 0]).all()


@pytest.mark.parametrize("groups", [[2, 2, 2], [3, 1, 2], [1, 4, 1, 2]], ids=str)
def test_items_have_own_noise(groups):
    "No two examples get the same number, and with it the same noise, also in items of unequal size."
    items = [[Example([1])] * n for n in groups]
    index = [e.index for n, item in enumerate(items) for e in numbered(item, n)]
    assert len({*index}) == sum(groups)


def test_given_index():
    "An example's own index is kept."
    (b,) = take(Loader([Example([1], index=77)], CLM(), 1, 2), 1)
    assert b.index.tolist() == [[77, -1]]


def test_loader_refuses():
    "Nothing to load, an item larger than a batch, an example longer than a row, items that cannot be packed."
    for empty in [], iter(()):
        with pytest.raises(ValueError, match="the data set is empty"): take(Loader(empty, CLM(), 2, 4), 1)
    with pytest.raises(ValueError, match="an item has 2 rows, rows=1"): take(Loader(pairs(), CLM(), 1, 4), 1)
    with pytest.raises(ValueError, match="has 3 tokens, rows have 2"): take(Loader(pairs(), CLM(), 2, 2), 1)
    with pytest.raises(ValueError, match="use pack=False"): take(Loader(pairs(), CLM(), 2, 9, pack=True), 1)


# ---- schedule and optimizers

def test_warmup_decay():
    "Straight up to 1, straight down towards the floor, never 0; by hand for ten steps with a warm-up of two."
    by_hand = [.5, *(k / 9 for k in range(9, 0, -1))]
    assert [warmup_decay(s, 10, .2) for s in range(10)] == pytest.approx(by_hand)
    for steps, warmup, floor in itertools.product([1, 2, 7, 100], [0, .03, .5, 1], [0, .1, 1]):
        f = [warmup_decay(s, steps, warmup, floor) for s in range(steps)]
        top = max(1, round(warmup * steps))
        assert all(0 < x <= 1 + 1e-12 for x in f) and max(f) > 1 - 1 / top and min(f[top - 1:]) >= floor
        assert f[:top] == sorted(f[:top]) and f[top:] == sorted(f[top:], reverse=True)


def singular(n, r, c, least=.05):
    "Matrices with known singular values and vectors: U, s, V."
    k = min(r, c)
    u, v = (torch.linalg.qr(torch.randn(n, m, k)).Q for m in (r, c))                   # (n,r,k) (n,c,k)
    return u, torch.linspace(least, 1, k).expand(n, k), v


def newton_schulz(s, rounds=5):
    "What the rounds make of a singular value: the same polynomial, of a number."
    for _ in range(rounds): s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_orthogonal(shape):
    "Singular vectors are kept, values are the polynomial's, in [.65, 1.25]; near U V^T of torch.linalg.svd."
    u, s, v = singular(3, *shape)
    g = u @ torch.diag_embed(s) @ v.mT                                                 # (n,r,c)
    out = orthogonal(g)
    inside = u.mT @ out @ v                                                            # (n,k,k)
    values = inside.diagonal(dim1=1, dim2=2)                                           # (n,k)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-4
    torch.testing.assert_close(values, newton_schulz(s / s.norm(dim=1, keepdim=True)), atol=1e-4, rtol=1e-4)
    assert .65 < values.min() and values.max() < 1.25
    torch.testing.assert_close(orthogonal(-7 * g), -out, atol=1e-4, rtol=0)
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    assert (out - U @ Vh).norm() < .35 * (U @ Vh).norm()


def test_control_orthogonal():
    "One round, or only dividing by the norm, leaves the band."
    u, s, v = singular(1, 16, 16)
    g = u @ torch.diag_embed(s) @ v.mT                                                 # (n,r,c)
    for broken in orthogonal(g, 1), g / g.norm():
        assert torch.linalg.svdvals(broken).min() < .65


def test_orthogonal_nothing():
    "A gradient of zeros stays zeros, and one zero matrix does not disturb its neighbours."
    g = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])                            # (n,r,c)
    out = orthogonal(g)
    assert not out[0].any() and torch.allclose(out[1:], orthogonal(g[1:]), atol=1e-6) and out.isfinite().all()


def test_muon_step():
    "Two steps by hand: decay, then momentum looked ahead, made orthogonal, times .2 sqrt(longer side)."
    p, other = (nn.Parameter(torch.randn(6, 10)) for _ in range(2))
    still = nn.Parameter(torch.randn(6, 10))
    was, steps = p.detach().clone(), [torch.randn(6, 10) for _ in range(2)]
    o, m = Muon([p, other, still], lr=.1, momentum=.9, weight_decay=.5), torch.zeros(6, 10)
    for g in steps:
        p.grad, other.grad = g.clone(), torch.zeros(6, 10)
        o.step()
        m = .9 * m + .1 * g                                                            # (6,10)
        was = was * (1 - .1 * .5) - .1 * .2 * math.sqrt(10) * orthogonal((.1 * g + .9 * m)[None])[0]
        torch.testing.assert_close(p.detach(), was, atol=1e-5, rtol=1e-5)
    assert other.isfinite().all() and "momentum" not in o.state[still]


@pytest.mark.parametrize("make", [adamw, muon])
def test_groups(make):
    "Each parameter is in one group; matrices in layers decay, gains and the embedding (tied head) do not."
    task = Task(small(2), CLM())
    groups = make(task, .01).param_groups
    names = {id(p): n for n, p in task.named_parameters()}
    assert Counter(id(p) for g in groups for p in g["params"]) == {id(p): 1 for p in task.parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {n for n in names.values() if "_proj" in n} and len(decayed) == 2 * 7
    task.model.layers[0].requires_grad_(False)
    assert len(matrices(task)[0]) == 7
    assert sum(len(g["params"]) for g in make(task, .01).param_groups) == 7 + 4 + 2


def test_groups_decay():
    "With gradients of zero only the decaying matrices shrink, by exactly 1 - lr * decay."
    for make in adamw, muon:
        model = small()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters(): p.grad = torch.zeros_like(p)
        make(Task(model, CLM()), lr=.1, weight_decay=.5).step()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[n] * (.95 if "_proj" in n else 1.))


def test_fitting_optimizer():
    "Muon where a step has eight times as many tokens as the longest side of a matrix, else AdamW."
    model = small()
    side = max(max(p.shape) for p in matrices(model)[0])
    assert fitting_optimizer(model, 8 * side) is muon and fitting_optimizer(model, 8 * side - 1) is adamw
    assert fitting_optimizer(nn.Embedding(4, 4), 10**6) is adamw


def steps_of(o, model, seeds):
    "Take a step for each seed, on a gradient drawn from it."
    for s in seeds:
        g = torch.Generator().manual_seed(s)
        for p in model.parameters(): p.grad = torch.randn(p.shape, generator=g)
        o.step(); o.zero_grad()


def test_together_resumes():
    "Its state, loaded into another, gives bit-equal further steps; without it they differ."
    first, second, third = small(), small(), small()
    o = muon(Task(first, CLM()), .01)
    steps_of(o, first, range(3))
    for m in second, third: m.load_state_dict(first.state_dict())
    loaded, fresh = muon(Task(second, CLM()), .01), muon(Task(third, CLM()), .01)
    loaded.load_state_dict(copy.deepcopy(o.state_dict()))
    for opt, m in (o, first), (loaded, second), (fresh, third): steps_of(opt, m, [3, 4])
    assert isinstance(o, Together) and equal(first, second) and not equal(first, third)


@pytest.mark.parametrize("make", [adamw, muon])
def test_rate_after_loading(make):
    "After a state is loaded the rate set in `param_groups` still rules: at rate 0 no weight moves."
    model = small()
    o, before = make(Task(model, CLM()), .01), copy.deepcopy(model.state_dict())
    o.load_state_dict(copy.deepcopy(o.state_dict()))
    for g in o.param_groups: g["lr"] = 0.
    steps_of(o, model, [1])
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def equal(one, two): return unchanged(one.parameters(), two.parameters())


def unchanged(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the loop

def test_same_seed():
    "Training twice gives bit-equal weights and losses; another order of batches does not."
    def run(seed):
        torch.manual_seed(0)
        model = small()
        h = Trainer(model, Hidden(), Loader(some(23), Hidden(), 4, 9, seed=seed), steps=8, window=2).fit()
        return model, h["loss"]
    (m1, l1), (m2, l2), (m3, l3) = run(0), run(0), run(1)
    assert equal(m1, m2) and l1 == l2 and not equal(m1, m3) and l1 != l3


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_learns(optimizer):
    "Thirty steps on one batch bring its loss below half of ln V, where a model that knows nothing begins."
    h = trainer(batches(1), 30, lr=.02, optimizer=optimizer).fit()
    assert abs(h["loss"][0] - math.log(V)) < .1 and h["loss"][-1] < math.log(V) / 2


def test_rates_and_rows():
    "Rows hold step, loss, norm, rate (lr times the schedule) and tokens; the loader stands where it should."
    l = loader()
    h = Trainer(small(), Hidden(), l, lr=.5, steps=5, window=2, schedule=lambda s, n: (s + 1) / n).fit()
    assert h["step"] == [1, 2, 3, 4, 5] and h["lr"] == pytest.approx([.1, .2, .3, .4, .5])
    other = loader()
    ten = take(other, 10)
    assert l.state_dict() == other.state_dict()
    assert h["tokens"] == [int((a.doc > 0).sum() + (b.doc > 0).sum()) for a, b in zip(ten[::2], ten[1::2], strict=True)]
    assert h["loss"] == h["hidden"] and all(n > 0 for n in h["norm"]) and not any(h["skipped"])


@pytest.mark.parametrize("clip", [.01, 1e9])
def test_clipping(clip):
    "The gradient used has norm `clip` at most, in the same direction; the norm reported is that before."
    model, used = small(), []
    class Watch(torch.optim.SGD):
        def step(self): used.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    want = gradient(model, batches(1))
    model.zero_grad()
    def watched(task, lr): return Watch(task.parameters(), lr)
    h = trainer(batches(1), 1, model, optimizer=watched, clip=clip).fit()
    assert h["norm"][0] == pytest.approx(want.norm().item(), rel=1e-5)
    torch.testing.assert_close(used[0], want * min(1, clip / want.norm()), atol=1e-6, rtol=1e-4)


@dataclass
class Faulty(CLM):
    "Next-token prediction whose loss is not finite at the given calls."
    at: tuple = ()
    value: float = math.nan
    calls: int = 0
    name = "clm"
    def loss(self, model, b):
        self.calls += 1
        return {"clm": super().loss(model, b)["clm"] * (self.value if self.calls - 1 in self.at else 1.)}


class Keep(Callback):
    "The weights, a copy before training and after each step."
    def begin(self, trainer): self.model, self.kept = trainer.task.model, []; self.after_step(trainer)
    def after_step(self, trainer): self.kept.append([p.detach().clone() for p in self.model.parameters()])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_skips(value, optimizer):
    "Steps whose gradient is not finite are counted and leave the weights bit-equal; the next ones are taken."
    keep = Keep()
    h = Trainer(small(), Faulty((1, 2, 4), value), batches(3), steps=6, optimizer=optimizer,
                callbacks=[keep]).fit()
    assert h["skipped"] == [0, 1, 1, 0, 1, 0]
    assert [unchanged(a, b) for a, b in itertools.pairwise(keep.kept)] == [bool(s) for s in h["skipped"]]
    assert all(p.isfinite().all() for p in keep.kept[-1])


def test_skips_then_stops():
    "More than `skips` in a row stop it, weights intact; as many with a finite one between do not."
    keep = Keep()
    t = Trainer(small(), Faulty((1, 2, 3)), batches(3), steps=9, skips=2, callbacks=[keep])
    with pytest.raises(FloatingPointError, match="not finite 3 times in a row, last at step 4"): t.fit()
    assert t.history["skipped"] == [0, 1, 1, 1] and unchanged(keep.kept[1], [*t.task.model.parameters()])
    h = Trainer(small(), Faulty((0, 1, 3, 4, 6, 7)), batches(3), steps=9, skips=2).fit()
    assert sum(h["skipped"]) == 6 and len(h) == 9


def test_control_skips():
    "An optimizer that steps on such a gradient loses every weight."
    model = small()
    o = adamw(Task(model, CLM()), .01)
    for p in model.parameters(): p.grad = torch.full_like(p, math.nan)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    o.step()
    assert not any(p.isfinite().any() for p in model.parameters())


def test_batches():
    "A finite list starts again, windows reach over its end; no batches, and a source used up, are errors."
    three, seen = batches(3), []
    @dataclass
    class Watch(CLM):
        name = "clm"
        def count(self, b):
            seen.append(next(k for k, x in enumerate(three) if torch.equal(x.ids, b.ids)))
            return super().count(b)
    Trainer(small(), Watch(), three, steps=4, window=2).fit()
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]
    for nothing in [], iter(batches(2)):
        with pytest.raises(ValueError, match="there are no batches"): trainer(nothing, steps=5).fit()


def test_callbacks():
    "Begin, each step, end, in the order given, once each; after an error and a stop the end still comes."
    def run(steps, *more, **options):
        heard = []
        class Say(Callback):
            def __init__(self, name): self.name = name
            def begin(self, t): heard.append(f"{self.name} begin {t.done}")
            def after_step(self, t): heard.append(f"{self.name} {t.history.rows[-1]['step']}")
            def end(self, t): heard.append(f"{self.name} end")
        t = trainer(steps=steps, callbacks=[Say("a"), *more, Say("b")], **options)
        try: t.fit()
        except ZeroDivisionError: heard.append("error")
        return heard
    assert run(2) == ["a begin 0", "b begin 0", "a 1", "b 1", "a 2", "b 2", "a end", "b end"]
    class Fails(Callback):
        def after_step(self, t): 1 / 0  # noqa: B018
    class Stops(Callback):
        def after_step(self, t): t.stop = True
    assert run(3, Fails()) == ["a begin 0", "b begin 0", "a 1", "a end", "b end", "error"]
    assert run(3, Stops()) == ["a begin 0", "b begin 0", "a 1", "b 1", "a end", "b end"]


def test_goes_on():
    "A second `fit` takes the steps that are left, and none when there are none."
    class Stops(Callback):
        def after_step(self, t): t.stop = t.done == 2
    t = trainer(steps=5, callbacks=[Stops()])
    assert t.fit()["step"] == [1, 2]
    t.stop = False
    assert t.fit()["step"] == [1, 2, 3, 4, 5] == t.fit()["step"]


def test_unused_heads():
    "A task freezes the heads that its objective does not use."
    class Uses(CLM): uses = ("value",)
    model = small()
    model.heads = nn.ModuleDict({"value": nn.Linear(16, 1), "relation": nn.Linear(16, 3)})
    Task(model, Uses())
    assert [p.requires_grad for p in model.heads.parameters()] == [True, True, False, False]


# ---- what is written down

def test_history(tmp_path):
    "Rows come back from JSON lines, numbers exact; a last line cut at any byte is left out."
    path = tmp_path / "h.jsonl"
    h = trainer(steps=4, history=History(path)).fit()
    text = path.read_text()
    assert len(h) == 4 and History.read(path).rows == h.rows == [*map(json.loads, text.splitlines())]
    last = text.rindex("\n", 0, -1) + 1
    for end in range(last, len(text)):
        path.write_text(text[:end])
        assert History.read(path).rows == h.rows[:3]


def test_history_goes_on(tmp_path):
    "A file whose last line was cut by a crash can be added to, and read."
    path = tmp_path / "h.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    History(path).add({"step": 2})
    assert History.read(path)["step"] == [1, 2]


def test_tensorboard(tmp_path):
    "One argument, and TensorBoard's files hold the loss of every step."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    h = trainer(steps=3, accelerator=Accelerator(log_with="tensorboard", project_dir=tmp_path)).fit()
    files = [EventAccumulator(str(f)).Reload() for f in tmp_path.rglob("events*")]
    (written,) = [f.Scalars("loss") for f in files if "loss" in f.Tags()["scalars"]]
    assert [e.step for e in written] == [1, 2, 3]
    assert [e.value for e in written] == pytest.approx(h["loss"], rel=1e-6)


def test_plot():
    "The history draws each step and a running mean that begins where it is defined."
    import matplotlib
    matplotlib.use("agg")
    h = History()
    for n in range(40): h.add({"step": n, "loss": float(n)})
    each, mean = h.plot().lines
    assert each.get_ydata().tolist() == h["loss"] and mean.get_xdata().tolist() == [*range(1, 40)]
    assert mean.get_ydata() == pytest.approx([n - .5 for n in range(1, 40)])


def test_progress(capsys):
    "The bar tells loss, bits per byte and tokens a second, and ends at the last step."
    trainer(steps=3, callbacks=[Progress(bytes_per_token=2.)]).fit()
    err = capsys.readouterr().err
    assert "3/3" in err and "bits/byte" in err and "tokens/s" in err


# ---- what a step counts, and in which precision

class WithMetric(CLM):
    "A term of 1,000 that has no gradient, counted once a batch."
    name = "clm"
    def count(self, b): return super().count(b) | {"metric": torch.tensor(1)}
    def loss(self, model, b): return super().loss(model, b) | {"metric": torch.tensor(1000.)}


def test_a_term_without_gradient_is_a_metric():
    "It is reported, and the loss is the other term alone. Control: with a gradient of 0 it is a term, and added."
    row = Trainer(small(), WithMetric(), batches(1), steps=1).fit().rows[0]
    assert row["loss"] == row["clm"] and row["metric"] == 1000
    class Added(WithMetric):
        def loss(self, model, b):
            t = super().loss(model, b)
            return t | {"metric": t["metric"] + 0 * t["clm"]}
    row = Trainer(small(), Added(), batches(1), steps=1).fit().rows[0]
    assert row["loss"] == pytest.approx(row["clm"] + 1000)


def test_terms_need_counts_and_a_gradient():
    class Uncounted(CLM):
        def loss(self, model, b): return super().loss(model, b) | {"more": torch.tensor(1.)}
    with pytest.raises(ValueError, match=r"\['more'\], count knows \['uncounted'\]"): Trainer(small(), Uncounted(), batches(1), steps=1).fit()
    model = small().requires_grad_(False)
    head = torch.nn.Parameter(torch.zeros(1)); model.register_parameter("spare", head)
    with pytest.raises(ValueError, match="no term of the loss has a gradient"): Trainer(model, CLM(), batches(1), steps=1).fit()


def test_seconds_are_those_of_the_clock():
    "A loader that takes 20 ms a batch: the rows' seconds hold it, and add up to the time between the first and the last."
    class Slow:
        def __iter__(self):
            for b in batches(4): time.sleep(.02); yield b
    began = time.perf_counter()
    h = Trainer(small(), CLM(), Slow(), steps=8).fit()
    whole = time.perf_counter() - began
    assert all(s > .019 for s in h["seconds"]) and .16 < sum(h["seconds"]) <= whole


def test_columns_of_other_models_have_the_precision_of_the_step():
    "Under bf16 a policy and its own weights as reference differ by nothing. Control: a reference in float32 does."
    from lmtrain.objective import annotated, logp
    class Ratio(CLM):
        def count(self, b): return {"ratio": super().count(b)["ratio"]}
        def loss(self, model, b):
            far = ((logp(model, b) - b.extra["ref"]) * b.weights).abs()
            return {"ratio": far.sum()}
    torch.manual_seed(0)
    model = small()
    with torch.no_grad(): model.embed_tokens.weight.mul_(10)
    reference = copy.deepcopy(model)
    found = [Trainer(model, Ratio(), b, lr=0., steps=1, bf16=True).fit()["loss"][0] for b in
             (annotated(batches(1), ref=reference), [*annotated(batches(1), ref=reference)])]
    assert found[0] == 0 and found[1] > 1e-3


@pytest.mark.parametrize("kind", ["fp16"])
def test_scaled_precisions_are_refused(kind):
    accelerator = Accelerator()
    accelerator.state._mixed_precision = kind
    try:
        with pytest.raises(ValueError, match="fp16 needs a scaled loss.*bf16"): trainer(accelerator=accelerator)
    finally: accelerator.state._mixed_precision = "no"


def test_trainable_weights_are_in_float32():
    "Half-precision weights are refused where they are trained, by name, and allowed where they are frozen."
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="embed_tokens.weight is trainable and in 16 bits"): Trainer(small().to(dtype), CLM(), [])
    frozen = small().to(torch.bfloat16).requires_grad_(False); frozen.heads = torch.nn.ModuleDict({"value": torch.nn.Linear(4, 1)})
    Trainer(frozen, CLM(), [])


# ---- sets, streams and numbers

def test_any_set_with_numbers_is_shuffled_whole():
    "torch's and datasets' sets have a length and items: the first batch comes from everywhere. Control: a stream's does not."
    from datasets import Dataset as Table
    from torch.utils.data import Dataset as Map, IterableDataset
    items = [Example([1, n % 20 + 3, 5]) for n in range(5000)]
    class Torch(Map):
        def __len__(self): return len(items)
        def __getitem__(self, n): return items[n]
    class Rowed(Torch):
        table = Table.from_dict({"ids": [e.ids for e in items]})
        def __getitem__(self, n): return Example(self.table[n]["ids"])
    class Stream(IterableDataset):
        def __iter__(self): return iter(items)
        def __len__(self): return len(items)
    want = next(iter(Loader(items, CLM(), 64, 3))).index
    for kind in Torch, Rowed: assert torch.equal(next(iter(Loader(kind(), CLM(), 64, 3))).index, want)
    assert want.max() > 4000 and next(iter(Loader(Stream(), CLM(), 64, 3))).index.max() < 1024


def test_numbers_of_rows_and_items_never_meet():
    "Items of 3,000 rows beside single examples: every row has a number, and noise, of its own."
    items = [[Example([1, 2])] * 3000, Example([1, 2]), [Example([1, 2])] * 3000, *[Example([1, 2])] * 5]
    index = torch.tensor([e.index for n, item in enumerate(items) for e in numbered(item, n)])
    assert len(index.unique()) == len(index) == 6006
    u = Noise(3).at(index, 0).double()
    assert abs(u.mean() - .5) < 5 * 12 ** -.5 / 6006 ** .5 and len(u.unique()) > 6000  # 24 bits: a pair or two may meet
    far = torch.tensor([5, 5 + 2**32, 5 + 2**33, 5 + 2**52])
    assert len(Noise().at(far, 0).unique()) == 4 and len((far & 0xFFFFFFFF).unique()) == 1  # control: the low bits are equal


def test_the_last_rows_are_shared_out():
    "Three bins of 4 rows left for 4 ranks: 3 rows each. Control: bin by bin it would be 4, 4, 4 and none."
    items = [Example([1, 2, 3]) for _ in range(12)]
    first = [next(iter(Loader(items, CLM(), 4, 3, rank=r, world=4))) for r in range(4)]
    assert [len(b) for b in first] == [3, 3, 3, 3]
    assert [len(b) for b in take(Loader(items, CLM(), 4, 3, rank=0, world=1), 3)] == [4, 4, 4]


def test_muon_where_everything_is_an_inner_matrix():
    "Adapters: two matrices and nothing else. AdamW gets no empty list; with nothing to train, one line."
    net = nn.Linear(8, 8, bias=False)
    net(torch.randn(16, 8)).square().mean().backward()
    o, before = muon(net, .1), net.weight.detach().clone()
    o.step()
    assert len(o.optimizers) == 1 and not torch.equal(before, net.weight) and fitting_optimizer(net, 64) is muon
    with pytest.raises(ValueError, match="nothing is trainable"): muon(net.requires_grad_(False), .1)


def test_objectives_with_token_numbers_as_tensors_are_compared():
    "Two objectives with equal tensors are one question, alone and in a mixture; with other numbers they are refused."
    from lmtrain.objectives.masked import MLM
    from lmtrain.objectives.mixed import Mix
    ids = lambda *more: torch.tensor([4, 5, 7, *more])
    items = [Example([4, 5, 7, 9])] * 8
    for make in (lambda i: MLM(3, i), lambda i: Mix((.5, .5), a=CLM(), b=MLM(3, i, shifted=True))):
        Trainer(small(), make(ids()), Loader(items, make(ids()), 4, 4))
        with pytest.raises(ValueError, match="give both the same"): Trainer(small(), make(ids(9)), Loader(items, make(ids()), 4, 4))
