"""Mixtures of rows, of losses and of texts: drawn by the example alone, weighed as said, and undone again."""
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import lmtrain.objectives.mixed as mixed
from lmtrain.batch import Example, Noise, collate
from lmtrain.model import Size, Transformer, moved
from lmtrain.objective import CLM, Objective, PrefixLM, logp, shift
from lmtrain.objectives.masked import MLM
from lmtrain.objectives.mixed import (UL2, Curriculum, Denoiser, Mix, Parts, by_gradient, by_sequence, by_token,
                                      fim, infill, merged, ul2)
from lmtrain.loader import Loader
from lmtrain.train import Task, Trainer

V, MASK, ORDINARY = 50, 49, range(5, 49)
WEIGHINGS = [by_token, by_sequence, by_gradient]
MNTP = MLM(MASK, ORDINARY, shifted=True)


def some(n, low=4, high=13):
    "n numbered texts of unequal lengths that begin with an unanswered 1 and end with 2."
    g = torch.Generator().manual_seed(n)
    long = torch.randint(low, high, (n,), generator=g).tolist()
    return [Example([1, *torch.randint(5, 49, (k - 2,), generator=g).tolist(), 2], [False] + [True] * (k - 1), index=i)
            for i, k in enumerate(long)]


def net(cls=Transformer):
    "A tiny model with large embeddings, so that probabilities differ by more than rounding."
    torch.manual_seed(0)
    model = cls(Size(V, dim=32, heads=4, kv_heads=2, layers=2)).eval()
    with torch.no_grad(): model.embed_tokens.weight.mul_(10)
    return model


def halves(weigh=by_token, probs=(.5, .5)): return Mix(probs, weigh, clm=CLM(), mntp=MNTP)


def gradient(model, objective, window):
    "The gradient of a window by the trainer's arithmetic, and its terms."
    model.zero_grad()
    trainer = Trainer(model, objective, [], steps=1)
    means = {n: v for n, v in trainer.backward(window).items() if n not in ("loss", "tokens")}
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]), means  # (n,)


def far(one, two): return ((one - two).norm() / one.norm()).item()


MAIN = ("ids", "clean", "doc", "order", "answer", "targets", "weights", "index", "item", "role")


def same(one, two): return all(torch.equal(getattr(one, c), getattr(two, c)) for c in MAIN)


# ---- which part a row draws

SEED = Noise()


def drawn(b, mix, noise=SEED):
    "Example -> part, for every example in a corrupted batch."
    q = mix.corrupt(b, noise)
    return {int(i): int(k) for row, k in zip(q.index, q.extra["part"], strict=True) for i in row.unique() if i >= 0}


@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("T", [12, 30])
def test_an_example_draws_its_part(batch, T):
    "In any batch, order and padding an example has the same part; another seed or epoch draws anew."
    examples, want = some(40), drawn(collate(some(40)), halves())
    parts = {}
    for k in range(0, 40, batch): parts |= drawn(collate(examples[::-1][k:k + batch], T), halves())
    assert parts == want and {*want.values()} == {0, 1}
    assert drawn(collate(examples), halves(), Noise(1)) != want != drawn(collate(examples), halves(), Noise(0, 1))


def test_control_of_the_draw():
    "Parts drawn from a stream of random numbers, one after another, change with the order of the examples."
    class Stream(Mix):
        def corrupt(self, b, noise):
            dice = torch.Generator().manual_seed(0)
            q = super().corrupt(b, noise)
            return q.with_extra(part=(torch.rand(len(b), generator=dice) < .5).long())
    b = collate(some(40))
    stream = Stream((.5, .5), clm=CLM(), mntp=MNTP)
    assert drawn(b, stream) != drawn(b[torch.arange(39, -1, -1)], stream)


def test_a_packed_row_has_one_part():
    "The part of a packed row is its first example's, and all of its documents are corrupted by it."
    b = collate(some(200), 40, pack=True)
    assert (b.doc.amax(1) > 2).sum() > 30
    q, alone = halves().corrupt(b, Noise()), drawn(collate(some(200)), halves())
    assert q.extra["part"].tolist() == [alone[int(i)] for i in b.index[:, 0]]
    causal = q.extra["part"] == 0                                                      # (B,)
    assert 0 < causal.sum() < len(b) and not q.order[~causal].any()
    assert torch.equal(q.order[causal], b.order[causal]) and torch.equal(q.ids[causal], b.ids[causal])
    for one in (q[[r]] for r in (~causal).nonzero()[:, 0].tolist()):
        assert all((one.weights[one.doc == d] > 0).any() for d in range(1, int(one.doc.max()) + 1))


def tail(n, p, k):
    "The exact chance that a binomial count is as far from n*p as k, or farther, on k's side, twice."
    log = lambda j: (math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * math.log(p)
                     + (n - j) * math.log(1 - p))
    ks = range(k, n + 1) if k > n * p else range(k + 1)
    return min(1., 2 * sum(math.exp(log(j)) for j in ks))


@pytest.mark.parametrize("probs", [(.5, .5), (15 / 16, 1 / 16), (.2, .3, .5)], ids=str)
def test_ratio(probs):
    "The rows of each part are a binomial draw: p above 1e-6 in ten epochs, so a sound mixture fails once in 33,000."
    n, mix = 4000, Mix(probs, **{f"p{k}": CLM() for k in range(len(probs))})
    b = collate([Example([1, 2], index=i) for i in range(n)])
    for e in range(10):
        part = mix.corrupt(b, Noise(0, e)).extra["part"]                               # (B,)
        for k, p in enumerate(probs): assert tail(n, p, int((part == k).sum())) > 1e-6
    assert tail(n, abs(probs[0] - .06), int((part == 0).sum())) < 1e-6  # the control: a share six points lower


@pytest.mark.parametrize("probs, want", [
    ((.5, .5), [0, 0, 1, 1]), ((0, 1), [1] * 4), ((1, 0), [0] * 4), ((0, .5, .5), [1, 1, 2, 2]),
    ((.5, 0, .5), [0, 0, 2, 2]), ((.7, .2, .1, 0), [0, 0, 0, 2])], ids=str)
def test_the_ends_of_the_shares(probs, want):
    "A number on a border belongs above it: no part of share 0 is drawn, not by 0 and not by the number next to 1."
    class Ends(Noise):
        def row(self, b, draw=0): return torch.tensor([0., .5 - 2**-24, .5, 1 - 2**-24])  # (4,)
    parts = {f"p{k}": CLM() for k in range(len(probs))}
    assert Mix(probs, **parts).corrupt(collate(some(4)), Ends()).extra["part"].tolist() == want


def test_a_part_keeps_its_own_draws(monkeypatch):
    """What a part draws for its rows is uniform (Dvoretzky, Kiefer, Wolfowitz: beyond the bound once in a million).

    The control: were the part drawn with the number 0, the first part would see the lower half only.
    """
    @dataclass
    class Level(Objective):
        def corrupt(self, b, noise): return shift(b).with_extra(level=noise.row(b))
    b = collate([Example([1, 2], index=i) for i in range(4000)])
    def gap():
        q = Mix((.5, .5), a=Level(), b=CLM()).corrupt(b, Noise())
        u = q.extra["level"][q.extra["part"] == 0].sort().values                       # (n,)
        bound = math.sqrt(math.log(2 / 1e-6) / 2 / len(u))
        return (u - torch.arange(1, len(u) + 1) / len(u)).abs().max().item() / bound
    assert gap() < 1
    monkeypatch.setattr(mixed, "DRAW", 0)
    assert gap() > 5


# ---- one part alone

@pytest.mark.parametrize("part", [CLM(), PrefixLM(cut=.5), MNTP, MLM(MASK, ORDINARY)], ids=repr)
@pytest.mark.parametrize("weigh", [by_token, by_gradient])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_share_of_one_is_the_part(part, weigh, pack, first):
    "With a share of 1 the columns, the loss and the gradient are the part's own, bit for bit; the other's term is 0."
    class Adds(CLM):
        def corrupt(self, b, noise): return shift(b).with_extra(pos=b.doc_pos, private=b.answer)
    parts = {"it": part, "other": Adds()} if first else {"other": Adds(), "it": part}
    mix = Mix((1., 0.) if first else (0., 1.), weigh, **parts)
    b, model = collate(some(12), 30 if pack else None, pack=pack), net()
    q, want = mix.corrupt(b, Noise(3)), part.corrupt(b, Noise(3))
    assert same(q, want) and {*q.extra} == {"part", "share", "loss_tokens"} and q.is_causal == want.is_causal
    (g, terms), (h, means) = gradient(model, mix, [q]), gradient(model, part, [want])
    assert torch.equal(g, h) and terms == {"it": means[part.name], "other": 0.}
    if part != CLM() and not pack:  # the control: other shares, another gradient
        assert not torch.equal(gradient(model, mix, [halves().corrupt(b, Noise(3))])[0], h)


def test_a_mixture_of_one_objective_with_itself():
    "By token, CLM mixed with CLM is CLM (1e-6); by gradient it is not (a hundredth off), for rows of unequal lengths."
    b, model = collate(some(12)), net()
    want, _ = gradient(model, CLM(), [CLM().corrupt(b, Noise())])
    mix = {w: Mix((.5, .5), w, a=CLM(), b=CLM()) for w in WEIGHINGS}
    off = {w: far(want, gradient(model, m, [m.corrupt(b, Noise())])[0]) for w, m in mix.items()}
    assert off[by_token] < 1e-6 and off[by_gradient] > .01 and off[by_sequence] > .01


# ---- the rows go back to their places

def test_merged():
    "Rows in their places; a column that one batch lacks is 0 in its rows, in its own kind and shape; `pos` is not."
    b = collate(some(5), 14)
    two = b[[3, 1]].with_extra(word=torch.ones(2, 14, dtype=torch.bool), level=torch.tensor([.5, .25]),
                               pos=7 + torch.arange(14).expand(2, 14))
    q = merged([(torch.tensor([3, 1]), two), (torch.tensor([0, 2, 4]), b[[0, 2, 4]])])
    assert same(q, b) and q.extra["level"].tolist() == [0, .25, 0, .5, 0]
    assert q.extra["word"].dtype == torch.bool and q.extra["word"].any(1).tolist() == [False, True, False, True, False]
    assert torch.equal(q.pos[[0, 2, 4]], b.pos[[0, 2, 4]]) and (q.pos[[1, 3], 0] == 7).all()


def test_control_positions():
    "Had the other rows position 0 everywhere, as for any other column, their hidden states would be others."
    model, b = net(), collate(some(6), 14)
    with torch.no_grad(): want, zero = model(b), model(b.with_extra(pos=torch.zeros_like(b.ids)))  # (B,T,D) (B,T,D)
    q = merged([(torch.tensor([0]), b[[0]].with_extra(pos=b[[0]].doc_pos)), (torch.arange(1, 6), b[1:])])
    with torch.no_grad(): torch.testing.assert_close(model(q), want)
    assert (zero - want).abs().max() > .1


def test_one_forward_is_the_parts_apart():
    "Sums and gradients are those of each part on its own rows, in double precision to 1e-9; the model reads once."
    reads = []
    model, mix = net().double(), Mix((.3, .3, .4), clm=CLM(), mntp=MNTP, prefix=PrefixLM(cut=.5))
    model.register_forward_hook(lambda *_: reads.append(1))
    b = collate(some(24))
    q = mix.corrupt(b, Noise(2))
    have = mix.loss(model, q)
    assert len(reads) == 1
    for k, (name, o) in enumerate(mix.parts.items()):
        own = o.corrupt(b[q.extra["part"] == k], Noise(2))
        want = o.loss(model, own)[o.name]
        assert abs(have[name] - want) < 1e-4 * abs(want) and len(own) > 3  # the losses themselves are 32-bit
        grads = [torch.autograd.grad(x, [*model.parameters()], retain_graph=True) for x in (have[name], want)]
        assert far(*(torch.cat([g.flatten() for g in each]) for each in grads)) < 1e-6
        assert int((q.weights[q.extra["part"] == k] != 0).sum()) == int(o.count(own)[o.name])


# ---- what counts the same

def by_hand(weigh, lp, w, part, probs):
    "The loss in plain numbers: lp, w lists of rows; part a list."
    rows = [[-x * y for x, y in zip(a, c, strict=True) if y] for a, c in zip(lp, w, strict=True)]
    mean = lambda values: sum(values) / len(values)
    if weigh is by_token: return mean([x for r in rows for x in r])
    if weigh is by_sequence: return mean([mean(r) for r in rows if r])
    each = [[x for r, k in zip(rows, part, strict=True) if k == j for x in r] for j in range(len(probs))]
    return sum(p * mean(e) for p, e in zip(probs, each, strict=True))


def test_weighings_are_their_formulas():
    "Sum over count, added up, is its own formula in plain numbers to 1e-6, and no other's to 1e-4; gradients differ."
    model, b, probs, grads = net(), collate(some(16)), (.75, .25), []
    for weigh in WEIGHINGS:
        mix = halves(weigh, probs)
        q = mix.corrupt(b, Noise(1))
        want = [by_hand(w, logp(model, q).tolist(), q.weights.tolist(), q.extra["part"].tolist(), probs) for w in WEIGHINGS]
        g, means = gradient(model, mix, [q])
        grads.append(g)
        for other, value in zip(WEIGHINGS, want, strict=True):
            off = abs(sum(means.values()) / value - 1)
            assert off < 1e-6 if other is weigh else off > 1e-4
    assert min(far(g, h) for g, h in itertools.permutations(grads, 2)) > .01


def pull(weigh, n, mine, share):
    "How much of the gradient each part makes: the factors of its losses over its denominator."
    factor, per = weigh(n, mine, share)
    whole = ((factor * n)[:, None] * mine).sum(0) / per.sum(0)                         # (K,)
    return (whole / whole.sum()).tolist()


def test_effective_mixtures():
    "GPT-BERT's rows, 15 to 1: the causal ones pull 127/412 by token, 1/16 by row and by gradient, half if forgotten."
    n, mine = torch.tensor([19] * 15 + [127]), F.one_hot(torch.tensor([0] * 15 + [1]), 2).bool()
    share = mine.float() @ torch.tensor([15 / 16, 1 / 16])
    for weigh, want in zip(WEIGHINGS, (127 / 412, 1 / 16, 1 / 16), strict=True):
        assert pull(weigh, n, mine, share)[1] == pytest.approx(want)
    forgotten = lambda n, mine, share: (torch.ones_like(share), n[:, None] * mine)
    assert pull(forgotten, n, mine, share)[1] == .5
    mine[0], n[0] = torch.tensor([False, True]), 127       # a second causal row: by row it counts, by gradient not
    share = mine.float() @ torch.tensor([15 / 16, 1 / 16])
    assert [pull(w, n, mine, share)[1] for w in WEIGHINGS] == pytest.approx([254 / (254 + 14 * 19), 2 / 16, 1 / 16])


def test_a_part_counts_as_it_says():
    "A part whose count is not its asked tokens keeps it: each row's, by each weighing, and their sum."
    class Answers(MLM):
        def count(self, b): return {self.name: b.answer.sum()}
    b = collate(some(16))
    o = Answers(MASK, ORDINARY)
    for weigh in WEIGHINGS:
        mix = Mix((.5, .5), weigh, clm=CLM(), it=o)
        q = mix.corrupt(b, Noise(1))
        own = q.extra["part"] == 1                                                     # (B,)
        assert torch.equal(q.extra["loss_tokens"][own], b.answer[own].sum(1))
        total, count = int(q.extra["loss_tokens"].sum()), mix.count(q)
        assert count["it"] == {by_token: total, by_sequence: 16, by_gradient: int(b.answer[own].sum())}[weigh]


@pytest.mark.parametrize("weigh", WEIGHINGS)
@pytest.mark.parametrize("cut", [[1] * 4, [2, 2], [3, 1], [0, 4], [1, 0, 3]], ids=str)
def test_window(weigh, cut):
    "Four rows at once, one by one, two by two: one gradient to 1e-5, whatever is weighed; empty pieces change nothing."
    model, mix = net(), halves(weigh)
    q = mix.corrupt(collate(some(4, 4, 30)), Noise(2))
    assert q.extra["part"].unique().tolist() == [0, 1]
    want, means = gradient(model, mix, [q])
    window = [q[i:j] for i, j in itertools.pairwise([0, *itertools.accumulate(cut)])]
    have, again = gradient(model, mix, window)
    assert far(want, have) < 1e-5 and again == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("weigh", WEIGHINGS)
def test_control_window(weigh):
    "The mean of the means of one row and of three is more than a twentieth off."
    model, mix = net(), halves(weigh)
    q = mix.corrupt(collate(some(4, 4, 30)), Noise(2))
    want, _ = gradient(model, mix, [q])
    one, three = (gradient(model, mix, [piece])[0] for piece in (q[:1], q[1:]))
    assert far(want, (one + three) / 2) > .05


def test_the_mean_of_single_rows_is_by_sequence():
    "Micro-batches of one row, averaged as they come, weigh by sequence, whatever was wanted: 1e-6."
    model, mix = net(), halves(by_token)
    q = mix.corrupt(collate(some(4, 4, 30)), Noise(2))
    careless = sum(gradient(model, mix, [q[i:i + 1]])[0] for i in range(4)) / 4        # (n,)
    assert far(gradient(model, halves(by_sequence), [q])[0], careless) < 1e-6
    assert far(gradient(model, mix, [q])[0], careless) > .05


# ---- who sees whom

def test_leaks():
    "In a mixed, packed batch exactly what `sees` says moves: causal rows nothing before, masked rows all, no other text."
    model, b = net(), collate(some(40), 26, pack=True)
    q = halves().corrupt(b, Noise())
    causal = q.extra["part"] == 0                                                      # (B,)
    assert 0 < causal.sum() < len(q) and not q.is_causal
    for j in range(26):
        felt, real, mates = moved(model, q, j), q.doc[:, j] > 0, q.doc == q.doc[:, j:j + 1]  # (B,T) (B,) (B,T)
        after = mates & (torch.arange(26) >= j)                                        # (B,T)
        assert torch.equal(felt[real], torch.where(causal[:, None], after, mates)[real])


def test_control_leaks():
    "If the rows' orders are exchanged, causal rows see their answers."
    model, b = net(), collate(some(40), 26, pack=True)
    q = halves().corrupt(b, Noise())
    causal = q.extra["part"] == 0                                                      # (B,)
    wrong = q.set(order=torch.where(causal[:, None], 0, b.order))
    assert any(moved(model, wrong, j)[causal][:, :j].any() for j in range(1, 26))


def test_mntp_equals_transformers():
    "A mixture's MNTP term is ForCausalLMLoss with the labels of an unshifted MLM, to 1e-6. Unshifted: another number."
    model, b, mlm = net(), collate(some(16)), MLM(MASK, ORDINARY)
    mix = halves(by_gradient)
    q = mix.corrupt(b, Noise(4))
    rows = q.extra["part"] == 1                                                        # (B,)
    plain = mlm.corrupt(b[rows], Noise(4))
    labels = plain.targets.masked_fill(plain.weights == 0, -100)                       # (n,T)
    with torch.no_grad():
        want = ForCausalLMLoss(model.head(model(plain)), labels, V)
        have = mix.loss(model, q)["mntp"] / mix.count(q)["mntp"]
        inplace = mlm.loss(model, plain)["mlm"] / mlm.count(plain)["mlm"]
        torch.testing.assert_close(have, .5 * want, atol=0, rtol=1e-6)                 # .5 is the share
    assert abs(inplace / want - 1) > 1e-3


# ---- what is refused

class Own(Objective):
    def loss(self, model, b): return {"own": logp(model, b).sum()}


class Doubled(Objective):
    def corrupt(self, b, noise):
        return b.each(lambda c: torch.cat([c, c], 1) if c.ndim == 2 else c)


@pytest.mark.parametrize("probs, parts, error, words", [
    ((.5, .5), {"clm": CLM(), "mine": Own()}, TypeError, r"mine \(Own\) has a loss of its own"),
    ((.5, .5), {"clm": CLM(), "inner": halves()}, TypeError, r"inner \(Mix\) has a loss"),
    ((.5, .6), {"a": CLM(), "b": CLM()}, ValueError, "together 1"),
    ((1.5, -.5), {"a": CLM(), "b": CLM()}, ValueError, "from 0 to 1"),
    ((1.,), {"a": CLM(), "b": CLM()}, ValueError, "each of a, b"),
    ({"a": .5, "c": .5}, {"a": CLM(), "b": CLM()}, ValueError, "each of a, b")])
def test_mix_refuses(probs, parts, error, words):
    "Losses of their own, and shares that are none, by name."
    with pytest.raises(error, match=words): Mix(probs, **parts)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_mix_refuses_other_lengths(n):
    "A part that makes longer rows, by its name and both lengths, even in a batch where it has none; at share 0 it is not asked."
    b = collate(some(6), 20)[:n]
    with pytest.raises(ValueError, match=r"long \(Doubled\) makes \d rows of 20 tokens into \d of 40"):
        Mix((.5, .5), clm=CLM(), long=Doubled()).corrupt(b, Noise())
    assert len(Mix((1, 0), clm=CLM(), long=Doubled()).corrupt(b, Noise())) == n


def test_records():
    "The repr says all: shares, parts with their fields, weighing; shares by name or in order are one."
    mix = Mix({"mntp": .25, "clm": .75}, by_gradient, clm=CLM(), mntp=PrefixLM(cut=.5))
    assert repr(mix) == "Mix((0.75, 0.25), clm=CLM(), mntp=PrefixLM(cut=0.5), weigh=by_gradient)"
    assert repr(Curriculum([(1, 0), (.5, .5)], a=CLM(), b=CLM())) == (
        "Curriculum(((1.0, 0.0), (0.5, 0.5)), a=CLM(), b=CLM(), weigh=by_token)")
    assert repr(Parts((1, .5), a=CLM(), own=PlainOwn())) == "Parts((1.0, 0.5), a=CLM(), own=PlainOwn())"


@dataclass
class PlainOwn(Own): pass


# ---- in a loader

def loader(objective, **more): return Loader(some(23), objective, 4, 12, seed=5, **more)


def take(batches, n): return list(itertools.islice(iter(batches), n))


def tokens(batches):
    "(example, place) -> (part, read, asked), of every real token."
    return {(i, p): (k, t, w) for b in batches for i, p, k, t, w in zip(*(c[b.doc > 0].tolist() for c in (
        b.index, b.doc_pos, b.extra["part"][:, None].expand_as(b.ids), b.ids, b.weights)), strict=True)}


ALTERNATE = Curriculum([(1, 0), (0, 1), (.5, .5)], clm=CLM(), mntp=MNTP)


@pytest.mark.parametrize("objective", [halves(), ALTERNATE], ids=lambda o: type(o).__name__)
def test_loader(objective):
    "Three epochs are the same with two workers, on three ranks, and when resumed in the middle of an epoch."
    want = [take(loader(objective), 18)[k:k + 6] for k in (0, 6, 12)]
    epochs = [tokens(w) for w in want]
    assert all(len({i for i, _ in e}) == 23 for e in epochs)
    with_workers = take(loader(objective, workers=2), 18)
    assert all(same(a, b) and torch.equal(a.extra["part"], b.extra["part"])
               for a, b in zip(sum(want, []), with_workers, strict=True))
    ranks = [take(loader(objective, rank=r, world=5), 6) for r in range(5)]  # the last bin's three rows for five ranks
    assert [tokens(b for r in ranks for b in r[k:k + 2]) for k in (0, 2, 4)] == epochs
    assert any(len(b) == 0 and "part" in b.extra for r in ranks for b in r)
    one = loader(objective); it = iter(one)
    for _ in range(8): next(it)
    other = loader(objective); other.load_state_dict(one.state_dict())
    assert all(same(a, b) for a, b in zip(take(other, 10), take(loader(objective), 18)[8:], strict=True))


def test_control_of_the_clock():
    "An objective that counts its own calls changes with workers and forgets where it was when resumed."
    class Clock(Mix):
        calls = 0
        def shares(self, epoch): self.calls += 1; return (1., 0.) if self.calls <= 9 else (0., 1.)
    clock = lambda: Clock((1, 0), clm=CLM(), mntp=MNTP)
    parts = lambda batches: [int(b.extra["part"].max()) for b in batches]
    assert parts(take(loader(clock()), 14)) == [0] * 9 + [1] * 5
    assert parts(take(loader(clock(), workers=2), 14)) == [0] * 14
    resumed = loader(clock()); resumed.load_state_dict({"epoch": 2, "used": 0})
    assert parts(take(resumed, 2)) == [0, 0]


def test_curriculum():
    "An epoch's batch is bit for bit that of its shares, the plan begins again, and a window over two epochs adds up."
    b, model = collate(some(8)), net()
    for e in range(6):
        q = ALTERNATE.corrupt(b, Noise(1, e))
        want = Mix(((1, 0), (0, 1), (.5, .5))[e % 3], clm=CLM(), mntp=MNTP).corrupt(b, Noise(1, e))
        assert same(q, want) and torch.equal(q.extra["part"], want.extra["part"])
    window = [ALTERNATE.corrupt(b, Noise(1, e)) for e in (0, 1)]
    have, means = gradient(model, ALTERNATE, window)
    sums = [sum(o.loss(model, q)[o.name] for o, q in zip((CLM(), MNTP), window, strict=True))]
    count = sum(int(o.count(q)[o.name]) for o, q in zip((CLM(), MNTP), window, strict=True))
    want = torch.autograd.grad(sums[0] / count, [*model.parameters()])
    assert far(torch.cat([g.flatten() for g in want]), have) < 1e-5 and [*means] == ["clm", "mntp"]
    with pytest.raises(ValueError, match="at least one epoch"): Curriculum([], a=CLM())
    with pytest.raises(ValueError, match="together 1"): Curriculum([(1, 0), (1, 1)], a=CLM(), b=CLM())


@torch.no_grad()
def means(model, objective):
    "The mean of each part alone on all texts."
    q = {n: o.corrupt(collate(some(23)), Noise(5)) for n, o in objective.parts.items()}
    return [(o.loss(model, q[n])[o.name] / o.count(q[n])[o.name]).item() for n, o in objective.parts.items()]


@pytest.mark.parametrize("pack", [False, True])
def test_mix_trains(pack):
    "Both questions are answered better after training, packed or not; a rank without rows takes part with 0."
    torch.manual_seed(0)
    model = Transformer(Size(V, dim=32, heads=2, layers=1))
    before = means(model, halves())
    load = Loader(some(23), halves(), 4, 26 if pack else 12, pack=pack)
    Trainer(model, halves(), load, lr=1e-2, steps=60).fit()
    assert all(a < b for a, b in zip(means(model, halves()), before, strict=True))
    empty = [*take(loader(halves(), rank=4, world=5), 2)][1]
    assert len(empty) == 0
    with torch.no_grad(): assert {n: v.item() for n, v in halves().loss(model, empty).items()} == {"clm": 0., "mntp": 0.}


# ---- several losses of the same rows

class Headed(Transformer):
    "A model with a head, which counts its readings."
    def __init__(self, size):
        super().__init__(size)
        self.heads, self.reads = nn.ModuleDict({"score": nn.Linear(size.dim, 2)}), 0
    def forward(self, b, cache=None): self.reads += 1; return super().forward(b, cache)  # (B,T,D)


@dataclass
class Score(Objective):
    "Two terms from a head, and a column of its own."
    uses = ("score",)
    def corrupt(self, b, noise): return b.with_extra(level=noise.row(b, 9))
    def count(self, b): return {"low": torch.tensor(len(b)), "high": torch.tensor(len(b))}
    def loss(self, model, b):
        s = (model.heads["score"](model(b)[:, 0]) - b.extra["level"][:, None]) ** 2    # (B,2)
        return {"low": s[:, 0].sum(), "high": s[:, 1].sum()}


def test_parts():
    "Terms and gradients are the parts' own, scaled; read once, under their keywords; their heads stay trainable."
    both, b, model = Parts({"score": .25, "words": 2.}, words=MNTP, score=Score()), collate(some(9)), net(Headed)
    q = both.corrupt(b, Noise(1))
    assert same(q, MNTP.corrupt(b, Noise(1))) and "level" in q.extra and both.uses == ("score",)
    have, count = Task(model, both)(q), both.count(q)
    assert model.reads == 1 and [*have] == [*count] == ["words", "score.low", "score.high"]
    want = {"words": 2 * MNTP.loss(model, q)["mlm"]} | {f"score.{n}": v / 4 for n, v in Score().loss(model, q).items()}
    for n in have:
        torch.testing.assert_close(have[n], want[n])
        grads = [torch.autograd.grad(t[n], [*model.parameters()], retain_graph=True, allow_unused=True) for t in (have, want)]
        for g, h in zip(*grads, strict=True): assert g is h is None or torch.allclose(g, h, rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for p in model.heads.parameters())
    Task(model, MNTP)
    assert not any(p.requires_grad for p in model.heads.parameters())


def test_parts_around_a_mixture():
    "The first part may be a mixture, whose terms keep their names."
    both, model = Parts((1., 1.), text=halves(), score=Score()), net(Headed)
    q = both.corrupt(collate(some(9)), Noise(1))
    assert [*Task(model, both)(q)] == ["text.clm", "text.mntp", "score.low", "score.high"] and model.reads == 1


def test_parts_refuses():
    "A later part that would score the first one's answers again, or that changes the question; the control: it would."
    with pytest.raises(TypeError, match=r"clm \(CLM\) has no loss of its own"): Parts((1, 1), mntp=MNTP, clm=CLM())
    class Changes(Score):
        def corrupt(self, b, noise): return b.set(order=b.order * 0).with_extra(level=noise.row(b))
    with pytest.raises(ValueError, match=r"second \(Changes\) changes order"):
        Parts((1, 1), clm=CLM(), second=Changes()).corrupt(collate(some(3)), Noise())
    with pytest.raises(ValueError, match="each of a, b"): Parts((1,), a=CLM(), b=Own())
    reads = Parts((1, 1), mntp=MNTP, own=Own())            # without a question of its own, a part reads
    assert same(reads.corrupt(collate(some(3)), Noise()), MNTP.corrupt(collate(some(3)), Noise()))
    q, model = MNTP.corrupt(collate(some(9)), Noise()), net()
    with torch.no_grad(): assert CLM().loss(model, q)["clm"] == MNTP.loss(model, q)["mlm"]


# ---- texts under denoisers

MODES, SENTINELS = (50, 51, 52), range(60, 100)


def page(n, index=0): return Example([1, *(100 + k for k in range(n - 1))], [False] + [True] * (n - 1), index=index)


def filled(e):
    "The text again: behind the mode, each sentinel replaced by what follows it in the answer. Written apart."
    at = e.answer.index(True)
    shown, said = e.ids[1:at], e.ids[at:]
    if said[0] not in SENTINELS: return shown + said
    spans, last = {}, None
    for t in said:
        if t in SENTINELS: last = t; spans[t] = []
        else: spans[last].append(t)
    return [w for t in shown for w in (spans[t] if t in SENTINELS else [t])]


def kind_of(e, n):
    "Which mode a text should have, by looking at it: (R, S, X), or None where a short text leaves it open."
    at = e.answer.index(True)
    said = e.ids[at:]
    if said[0] not in SENTINELS: return 1
    hidden, spans = sum(t not in SENTINELS for t in said), sum(t in SENTINELS for t in said) - 1
    return 2 if hidden / n > .29 or hidden / spans > 11.9 else 0


def fault(made, n):
    "The first text whose mode is not what is done to it."
    return next((e for e in made if e.ids[0] != MODES[kind_of(e, n)]), None)


def test_ul2():
    """Under every denoiser the text can be restored and the mode says what was done; each comes once in seven.

    Rates by exact binomial tails at 1e-6 each, so a sound mixture fails once in 140,000. Control: R and S exchanged.
    """
    n, made = 200, [ul2(page(200, i), Noise(), SENTINELS, MODES) for i in range(700)]
    assert all(filled(e) == page(n).ids and e.index == i for i, e in enumerate(made))
    assert fault(made, n) is None
    kinds = Counter(e.ids[0] for e in made)
    for mode, share in zip(MODES, (2 / 7, 1 / 7, 4 / 7), strict=True): assert tail(700, share, kinds[mode]) > 1e-6
    swapped = [replace(e, ids=[{50: 51, 51: 50, 52: 52}[e.ids[0]], *e.ids[1:]]) for e in made]
    assert fault(swapped, n) is not None
    assert [d.kind for d in UL2] == [0, 0, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="three tokens"): ul2(page(9), Noise(), SENTINELS, (50, 50, 51))
    with pytest.raises(ValueError, match="index"): ul2(replace(page(9), index=None), Noise(), SENTINELS, MODES)
    with pytest.raises(ValueError, match="word"): ul2(replace(page(9), tokens={"word": [0] * 9}), Noise(), SENTINELS, MODES)


def test_ul2_depends_on_the_example_alone():
    "Seed, epoch and index decide; nothing else."
    make = lambda i, noise: ul2(page(60, i), noise, SENTINELS, MODES)
    assert make(3, Noise(1, 2)) == make(3, Noise(1, 2))
    assert len({repr(make(i, noise)) for i in (3, 4) for noise in (Noise(), Noise(1), Noise(0, 1))}) == 6


def test_sequential_denoiser():
    """The end of a text is asked, a quarter of it on average (Hoeffding: off by more than .02 once in 500,000).

    Read by PrefixLM, what is shown sees all that is shown and nothing that is said.
    """
    made = [ul2(page(101, i), Noise(), SENTINELS, MODES, [Denoiser(.25)]) for i in range(4500)]
    share = [sum(e.answer) / 100 for e in made]
    assert abs(sum(share) / len(share) - .25) < .02 and min(share) == .01 and max(share) == .5
    assert all(e.answer == sorted(e.answer) and e.ids == [51, *page(101).ids] for e in made)
    q, model = PrefixLM().corrupt(collate([ul2(page(12), Noise(), SENTINELS, MODES, [Denoiser(.4)])]), Noise()), net()
    q = q.set(ids=q.ids % V)
    at = int(q.answer[0].long().argmax())
    assert moved(model, q, 0).all() and moved(model, q, at - 1).all() and not moved(model, q, at)[0, :at].any()
    assert int(q.weights.sum()) == int(q.answer.sum())


def test_sequential_denoiser_asks_answers_only():
    "Tokens that may not be asked about are not, wherever they stand; a text without any answer is refused."
    e = Example([*range(10)], [False, True, True, False, True, True, False, True, True, False], index=3)
    for i in range(50):
        got = ul2(replace(e, index=i), Noise(), SENTINELS, MODES, [Denoiser(.25)]).answer[1:]
        n = sum(got)
        assert 1 <= n <= 3 and [t for t in range(10) if got[t]] == [1, 2, 4, 5, 7, 8][-n:]
    with pytest.raises(ValueError, match="nothing to mask"):
        ul2(Example([1, 2], [False, False], index=0), Noise(), SENTINELS, MODES, [Denoiser(.25)])


# ---- fill in the middle

MARKS = (90, 91, 92)


def unfim(ids, marks=MARKS):
    "The text of an infilling, by reading the marks: head, prefix, middle, suffix, whichever layout it has."
    p, s, m = (ids.index(k) for k in marks)
    if s == p + 1: return ids[:p], (ids[m + 1:], ids[s + 1:m])     # the first holds prefix and middle
    return ids[:p], (ids[p + 1:s] + ids[m + 1:], ids[s + 1:m])


def restored(ids, end):
    "The whole text, with the `end` that closed the middle back at its end."
    head, (front, suffix) = unfim(ids)
    return head + front[:-1] + suffix + [end] if end is not None and ids[-1] == end else head + front + suffix


@given(n=st.integers(1, 40), head=st.integers(0, 3), index=st.integers(0, 10**6), longer=st.integers(0, 5),
       ended=st.booleans(), spm=st.sampled_from([0., .5, 1.]))
def test_fim_is_undone(n, head, index, longer, ended, spm):
    "Restored, it is the text, but for what the marks displaced at its end; the length is kept; head and end stay."
    body = [*range(100, 100 + n)]
    e = Example([*range(head), *body] + [2] * ended, [False] * head + [True] * (n + ended), index=index)
    f = fim(e, Noise(), MARKS, rate=1., spm=spm, end=2, longer=longer)
    if n + longer <= 3: assert f == e; return
    kept = body[:n + longer - 3]
    assert restored(f.ids, 2) == [*range(head), *kept] + [2] * ended
    assert sorted(f.ids) == sorted([*range(head), *kept, *MARKS] + [2] * ended)
    assert len(f) == len(e) + min(longer, 3) and f.index == e.index
    assert f.answer == [False] * head + [True] * (len(f) - head)
    assert fim(e, Noise(), MARKS, rate=0., end=2) is e


def test_fim_rates():
    "Half are moved, and half of those suffix first (a PSM row without a prefix looks so too): exact tails at 1e-6."
    done = [fim(page(41, i), Noise(), MARKS, longer=3) for i in range(4000)]
    rows = [f.ids for f in done if len(f) == 44]
    assert tail(4000, .5, len(rows)) > 1e-6 and {*map(len, done)} == {41, 44}
    empty = (2 * 41 - 1) / 41**2                           # the chance that the lower of two cuts is 0
    assert tail(len(rows), .5 + .5 * empty, sum(ids[2] == 91 for ids in rows)) > 1e-6


def test_fim_cuts():
    """The cuts are two uniform places, of which the lower comes first (Dvoretzky, Kiefer, Wolfowitz at 1e-6 each).

    With spm=1 all rows have the suffix first, with spm=0 none that has a prefix.
    """
    rows = [fim(page(41, i), Noise(), MARKS, rate=1., spm=0., longer=3).ids for i in range(4000)]
    low = torch.tensor([ids.index(91) - 2 for ids in rows])                            # (4000,) length of the prefix
    high = low + torch.tensor([43 - ids.index(92) for ids in rows])                    # (4000,) and of the middle
    k, bound = torch.arange(41), math.sqrt(math.log(2 / 1e-6) / 8000)                  # (41,)
    share = lambda x: (x[:, None] <= k).double().mean(0)                               # (41,)
    assert (share(high) - ((k + 1) / 41)**2).abs().max() < bound and high.max() == 40
    assert (share(low) - (1 - ((40 - k) / 41)**2)).abs().max() < bound and low.min() == 0
    assert all(fim(page(41, i), Noise(), MARKS, rate=1., spm=1., longer=3).ids[1:3] == [90, 91] for i in range(200))


def test_fim_controls():
    "Layouts with pieces exchanged, or a suffix lost, are not undone; and the two layouts by hand."
    assert infill([1], [2], [3], "psm", False) == ["p", 1, "s", 3, "m", 2]
    assert infill([1], [2], [3], "psm", True) == ["p", "s", 3, "m", 1, 2]
    for wrong in ([90, 5, 91, 6, 92, 7], [90, 91, 6, 92, 5, 7]):
        assert restored(wrong, None) == [5, 7, 6]          # prefix 5, middle 7, suffix 6
    e = page(20)
    f = fim(e, Noise(), MARKS, rate=1., longer=3)
    assert restored(f.ids, None) == e.ids
    for lose in (t for t in range(23) if f.ids[t] not in MARKS):
        assert restored(f.ids[:lose] + f.ids[lose + 1:], None) != e.ids


def test_fim_between_characters(tok, pages):
    "The characters are kept, cuts fall inside tokens too, rows do not grow beyond `longer`; ends give way."
    marks, inside = (500, 501, 502), 0
    for i, text in enumerate(p[300:420] for p in pages[:60]):
        ids = tok(text, add_special_tokens=False)["input_ids"]
        e = Example([tok.bos_token_id, *ids, tok.eos_token_id], [False] + [True] * (len(ids) + 1), index=i)
        f = fim(e, Noise(), marks, rate=1., end=tok.eos_token_id, longer=9, tok=tok)
        head, (front, suffix) = unfim(f.ids, marks)
        assert tok.decode(front[:-1] + suffix) == text and f.ids[-1] == tok.eos_token_id and head == [tok.bos_token_id]
        assert len(f) <= len(e) + 9
        inside += len(f) > len(e) + 3
        short = fim(e, Noise(), marks, rate=1., end=tok.eos_token_id, tok=tok)
        assert len(short) <= len(e)
        if short is not e:
            head, (front, suffix) = unfim(short.ids, marks)
            assert text.startswith(tok.decode(front[:-1] + suffix)) and len(short) > len(e) - 3
    assert inside > 20


def test_fim_between_characters_leaves_half_characters():
    "A row that begins inside a character, whose bytes are no text, stays as it is."
    from lmtrain.text import train_bpe
    tok = train_bpe(["ab"], 263)
    ids = tok("ab\u00e9ab" * 3, add_special_tokens=False)["input_ids"]
    half = Example(ids[3:], index=0)
    assert "\ufffd" in tok.decode(half.ids) and fim(half, Noise(), MARKS, rate=1., longer=9, tok=tok) is half
    assert len(fim(Example(ids, index=0), Noise(), MARKS, rate=1., longer=9, tok=tok)) > len(ids)
    with pytest.raises(ValueError, match="special tokens in its text"):
        fim(Example([*ids, tok.eos_token_id], index=0), Noise(), MARKS, rate=1., tok=tok)


@pytest.mark.parametrize("e, marks, words", [
    (page(9), (90, 90, 91), "three tokens"), (replace(page(9), index=None), MARKS, "index"),
    (replace(page(9), tokens={"word": [0] * 9}), MARKS, "word"),
    (Example([1, 2, 3], [True, False, True], index=0), MARKS, "plain text")])
def test_fim_refuses(e, marks, words):
    "Metrics that are not three, examples without an index, with columns, or with gaps in what is answered."
    with pytest.raises(ValueError, match=words): fim(e, Noise(), marks, rate=1.)

