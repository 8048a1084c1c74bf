"""Samplers: their laws by exact enumeration over 64 states and by simulation, budgets, caching, prompts, guidance, blocks."""
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.batch import Example, Noise, collate
from lmtrain.generation import confident, distribution, draw, fill, left_to_right, random_order
from lmtrain.model import Size, Transformer
from lmtrain.objectives.diffusion import BlockDiffusion, Schedule, cosine, linear, polynomial
from lmtrain.objectives.samplers import (
    ancestral, budget, neg_entropy, denoise, first_hitting, flips, guided, most_confident, max_prob, rates, token_prob, scorer,
    semi_autoregressive, threshold, unmask)

# ---- a language of 27 texts and a perfect model of it

M = 3
P = np.random.default_rng(0).dirichlet([.5] * 27).reshape(3, 3, 3)
STATES = list(product(range(4), repeat=3))
AT = {z: n for n, z in enumerate(STATES)}
FULL = [AT[x] for x in product(range(3), repeat=3)]


def chances(z):
    "Exact conditionals given what is visible: (3,3)."
    mass = P[tuple(slice(None) if v == M else slice(v, v + 1) for v in z)]
    return np.array([mass.sum(tuple(j for j in range(3) if j != i)).ravel() / mass.sum() if z[i] == M else np.ones(3) / 3
                     for i in range(3)])


Q = np.stack([chances(z) for z in STATES])                                             # (64,3,3)
LOGITS = torch.from_numpy(np.concatenate([np.log(Q), np.full((64, 3, 1), 3.)], 2))     # (64,3,4): it would love to say mask


def perfect(canvas): return LOGITS[(canvas * torch.tensor([16, 4, 1])).sum(1)]         # (B,3,4)


def independent(write, hide=0.):
    "One step in which each place is decided alone: hidden ones written, written ones hidden again. (64,64)"
    K = np.ones((64, 64))
    for (n, z), (m, y) in product(enumerate(STATES), repeat=2):
        for i in range(3):
            if z[i] == M: K[n, m] *= (1 - write) if y[i] == M else write * Q[n, i, y[i]]
            else: K[n, m] *= hide if y[i] == M else (1 - hide) * (y[i] == z[i])
    return K


def picked(pick, sure):
    "One step of the package's own pick, over all proposals, weighted by their chances. (64,64)"
    K = np.zeros((64, 64))
    for n, z in enumerate(STATES):
        todo = [i for i in range(3) if z[i] == M]
        if not todo: K[n, n] = 1; continue
        says = torch.tensor(list(product(range(3), repeat=len(todo))))                 # (N,m)
        q = torch.from_numpy(Q[n][todo])                                               # (m,3)
        hidden = torch.tensor(z).eq(M).expand(len(says), 3)                            # (N,3)
        rank = torch.ones(len(says), 3).double()
        for k, i in enumerate(todo): rank[:, i] = sure(q[k].expand(len(says), 3), says[:, k])
        now, odds = pick(rank, hidden) & hidden, torch.ones(len(says)).double()        # (N,3) (N,)
        for k in range(len(todo)): odds *= q[k][says[:, k]]
        for row, places, chance in zip(says.tolist(), now.tolist(), odds.tolist(), strict=True):
            new = list(z)
            for v, i in zip(row, todo, strict=True):
                if places[i]: new[i] = v
            K[n, AT[tuple(new)]] += chance
    return K


def blindly(z): return [(1 / z.count(M), i) for i in range(3) if z[i] == M]


def one_blindly():
    "One place a step, each with the same chance. (64,64)"
    K = np.zeros((64, 64))
    for n, z in enumerate(STATES):
        for chance, i in blindly(z):
            for v in range(3): K[n, AT[tuple(v if j == i else z[j] for j in range(3))]] += chance * Q[n, i, v]
    for n in FULL: K[n, n] = 1
    return K


def text_probs(kernels):
    now = np.zeros(64); now[AT[M, M, M]] = 1
    for K in kernels: now = now @ K
    assert abs(now[FULL].sum() - 1) < 1e-12
    return now[FULL]


def away(p): return abs(p - P.ravel()).sum() / 2


def test_ancestral_falls_like_one_over_steps():
    "Total variation .254, .132, .068, .035, .017, .004 at 1, 2, 4, 8, 16, 64 steps: as computed independently."
    have = [away(text_probs([independent(*r) for r in rates(T)])) for T in (1, 2, 4, 8, 16, 64)]
    assert np.allclose(have, [.254, .132, .068, .035, .017, .004], atol=6e-4)
    assert all(.45 < b / a < .6 for a, b in zip(have[:4], have[1:5], strict=True))
    for s in cosine, polynomial(2.):
        a, b = (away(text_probs([independent(*r) for r in rates(T, s)])) for T in (16, 32))
        assert .45 < b / a < .6


def test_one_a_step_is_exact():
    "A place drawn blindly, or the surest by what does not depend on the draw: total variation 0, to 1e-12."
    for sure in max_prob, neg_entropy: assert away(text_probs([picked(confident(1), sure)] * 3)) < 1e-12
    assert away(text_probs([picked(left_to_right, token_prob)] * 3)) < 1e-12
    assert away(text_probs([one_blindly()] * 3)) < 1e-12


def test_the_surest_draw_is_biased():
    "By the drawn token's own chance it is .387 from the language, and writes 2.13 nats of its 2.88, with a perfect model."
    p = text_probs([picked(confident(1), token_prob)] * 3)
    assert abs(away(p) - .387) < 5e-4 and abs(-(p * np.log(np.maximum(p, 1e-300))).sum() - 2.13) < .005
    assert abs(-(P * np.log(P)).sum() - 2.8829) < 1e-4
    two = text_probs([picked(f, max_prob) for f in most_confident(3, 2)])  # two at once is wrong, whatever the order
    assert .02 < away(two) < .3


def unlikely(counts, p):
    "Chi-squared of counts against a law, rare cells together; 77 is beyond its 1e-6 quantile at 26 degrees."
    want = np.asarray(p) * counts.sum()
    rare = want < 10
    counts, want = (np.append(c[~rare], c[rare].sum()) for c in (counts, want))
    return ((counts - want)**2 / np.maximum(want, 1)).sum()


SAMPLERS = {
    "ancestral(1)": (lambda: ancestral(1), token_prob, lambda: [independent(*r) for r in rates(1)]),
    "ancestral(4)": (lambda: ancestral(4, seed=3), token_prob, lambda: [independent(*r) for r in rates(4)]),
    "remasking(6)": (lambda: ancestral(6, cosine, .3), token_prob, lambda: [independent(*r) for r in rates(6, cosine, .3)]),
    "first hitting": (lambda: first_hitting(3), token_prob, lambda: [one_blindly()] * 3),
    "surest by token_prob": (lambda: most_confident(3, 3), token_prob, lambda: [picked(confident(1), token_prob)] * 3),
    "surest by max_prob": (lambda: most_confident(3, 3), max_prob, lambda: [picked(confident(1), max_prob)] * 3),
    "surest by neg_entropy": (lambda: most_confident(3, 3), neg_entropy, lambda: [picked(confident(1), neg_entropy)] * 3),
    "two, then one": (lambda: most_confident(3, 2), max_prob, lambda: [picked(confident(2), max_prob), picked(confident(1), max_prob)]),
    "threshold": (lambda: [threshold(.6)] * 3, token_prob, lambda: [picked(threshold(.6), token_prob)] * 3),
    "blocks": (lambda: semi_autoregressive(3, 2, 2), token_prob,
               lambda: [picked(f, token_prob) for f in semi_autoregressive(3, 2, 2)]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_their_laws(name):
    "20,000 texts of `denoise` against the enumerated law, false alarm below 1e-6 each; another law is seen at once."
    steps, sure, kernels = SAMPLERS[name]
    t = denoise(perfect, torch.full((20_000, 3), M), M, steps(), confidence=sure)
    counts = np.bincount((t.ids * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    want = text_probs(kernels())
    assert unlikely(counts, want) < 77
    other = text_probs([one_blindly()] * 3) if away(want) > .01 else text_probs([independent(1.)])
    assert unlikely(counts, other) > 200


def test_rates_keep_the_marginals():
    "After each step as much is visible as the schedule says, with remasking too; the last step writes all, hides none."
    for schedule, again, T in product((linear, cosine, polynomial(3.)), (0., .1, 1.), (1, 2, 7, 50)):
        alpha = schedule.alpha(torch.linspace(1, 0, T + 1, dtype=torch.float64))
        seen = 0.
        for (write, hide), s in zip(rates(T, schedule, again), alpha[1:].tolist(), strict=True):
            assert 0 <= write <= 1 + 1e-12 and 0 <= hide <= again
            seen = seen * (1 - hide) + (1 - seen) * write
            assert abs(seen - s) < 1e-12
        assert hide == 0 and write == 1


def test_remasking_a_perfect_model():
    "With nothing to mend it only adds chances to write two together: further from the language, nearer with more steps."
    at = {(T, a): away(text_probs([independent(*r) for r in rates(T, linear, a)])) for T in (8, 32) for a in (0., .1)}
    assert at[8, .1] > at[8, 0.] + .005 and at[32, .1] > at[32, 0.] + .005 and at[32, .1] < at[8, .1] - .01


def test_flips():
    "Places are picked with the rates given, empty and written ones apart, within 5 standard errors of 40,000."
    todo = torch.rand(200, 200, generator=torch.Generator().manual_seed(1)) < .5
    hit = flips(.3, .05, Noise(0), 3)(torch.ones(200, 200), todo)
    for part, rate in (hit[todo], .3), (hit[~todo], .05):
        assert abs(part.float().mean() - rate) < 5 * (rate * (1 - rate) / len(part))**.5


# ---- budgets

@given(st.integers(1, 60), st.integers(1, 80))
def test_budget(n, steps):
    "As many as there are masks, never negative, as even as can be."
    k = budget(n, steps)
    assert sum(k) == n and len(k) == steps and min(k) >= 0 and max(k) - min(k) <= 1


@pytest.mark.parametrize("n", [1, 2, 5, 7, 12])
def test_no_mask_is_stranded(n):
    "Whatever the number of places, blocks and steps, all are written; a budget rounded down, the control, is refused."
    equal = lambda c: torch.zeros(*c.shape, 6)
    canvas = torch.full((3, n), M)
    for steps in (ancestral(5), ancestral(5, again=.4), first_hitting(n), most_confident(n, 4), most_confident(n, 20),
                  [threshold(.9)] * n, semi_autoregressive(n, 3, 2), semi_autoregressive(n, 5, 9), [random_order(2)] * n):
        t = denoise(equal, canvas, M, steps)
        assert not (t.ids == M).any() and (t.when > 0).all() and t.when.max() <= len(steps)
    if n % 4:
        with pytest.raises(ValueError, match="positions empty"): denoise(equal, canvas, M, [confident(n // 4)] * 4)


def test_blocks_go_from_left_to_right():
    "Each place of a block is written before any of the next, also where the last block is short."
    t = denoise(lambda c: torch.zeros(*c.shape, 6), torch.full((8, 7), M), M, semi_autoregressive(7, 3, 2))
    for a, b in ((slice(0, 3), slice(3, 6)), (slice(3, 6), slice(6, 7))):
        assert (t.when[:, a].amax(1) < t.when[:, b].amin(1)).all()
    short = denoise(lambda c: torch.zeros(*c.shape, 6), torch.full((8, 6), M), M, semi_autoregressive(6, 4, 2))
    assert (short.when.sort(1).values == torch.tensor([1, 1, 2, 2, 3, 4])).all()  # the last block has a budget of its own


def test_threshold():
    "All that are as sure as the level, or else the surest one; written places never."
    p = torch.tensor([[.9, .2, .95, .99], [.1, .3, .2, .9]])
    todo = torch.tensor([[True, True, True, False], [True, True, True, False]])
    assert threshold(.9)(p, todo).tolist() == [[True, False, True, False], [False, True, False, False]]


# ---- the loop

@pytest.mark.parametrize("steps", [ancestral(1000), ancestral(6), first_hitting(3), [threshold(.8)] * 3], ids=len)
def test_asks_only_when_something_changed(steps):
    "As many calls as there are steps that wrote something, at most one more; never the same canvas twice."
    seen = []
    def scores(canvas): seen.append(canvas.clone()); return perfect(canvas)
    t = denoise(scores, torch.full((1, 3), M), M, steps)
    assert len(seen) == len(t.when.unique()) <= 3
    assert len({tuple(c[0].tolist()) for c in seen}) == len(seen)


def test_given_tokens_stay():
    "What a canvas came with is never hidden again, and is marked as given; what was written may be."
    canvas = torch.full((50, 6), M); canvas[:, [1, 4]] = 5
    t = denoise(lambda c: torch.zeros(*c.shape, 6), canvas, M, ancestral(12, again=.8))
    assert (t.ids[:, [1, 4]] == 5).all() and not t.when[:, [1, 4]].any() and (t.when[:, [0, 2, 3, 5]] > 0).all()


def test_sure():
    "Three measures of how sure, on distributions where each is known."
    q = torch.tensor([[.5, .5, 0, 0], [.25] * 4, [.7, .1, .1, .1]]).double()
    new = torch.tensor([1, 2, 3])
    torch.testing.assert_close(token_prob(q, new), torch.tensor([.5, .25, .1]).double())
    torch.testing.assert_close(max_prob(q, new), torch.tensor([.5, .25, .7]).double())
    torch.testing.assert_close(neg_entropy(q, new)[:2], torch.tensor([.5, .25]).double())


class NoMask(torch.nn.Module):
    def __init__(self, head): super().__init__(); self.head = head
    def forward(self, h): return self.head(h).index_fill(-1, torch.tensor(M), -torch.inf)


@pytest.fixture
def net():
    torch.manual_seed(1)
    model = Transformer(Size(20, dim=32, heads=4, kv_heads=2, layers=2, length=64)).eval()
    for p in model.parameters(): p.data *= 5
    return model


PROMPTS = [[5, 6, 7, 8], [9], [4, 5, 6, 7, 8, 9, 10]]


def test_equals_fill(net):
    "One a step without randomness: ids, steps and chances of `fill` with the same pick."
    net.head = NoMask(net.head)
    ids = torch.tensor([[5, 6, 7, *[M] * 6], [8, 9, 10, *[M] * 6]])
    for pick in confident(1), confident(2), left_to_right:
        ours, theirs = unmask(net, ids[:, :3].tolist(), 6, [pick] * 6, M, temperature=0), fill(net, ids, ids == M, M, pick)
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.when, theirs.when)
        torch.testing.assert_close(ours.p, theirs.p, atol=1e-6, rtol=1e-5)


def test_prompts(net):
    "Prompts stay, rows do not care who shares their batch, what lies behind a row's end is told apart."
    t = unmask(net, PROMPTS, 5, most_confident(5, 3), M, temperature=0)
    for n, p in enumerate(PROMPTS):
        end = len(p) + 5
        assert t.ids[n, :len(p)].tolist() == p and not t.when[n, :len(p)].any() and (t.p[n, :len(p)] == 1).all()
        assert (t.when[n, end:] == -1).all() and (t.when[n, len(p):end] > 0).all()
        assert torch.equal(unmask(net, [p], 5, most_confident(5, 3), M, temperature=0).ids[0], t.ids[n, :end])
    assert unmask(net, [[]], 5, most_confident(5, 3), M).ids.shape == (1, 5)


@pytest.mark.parametrize("temperature", [1., .6])
def test_the_record_is_right(net, temperature):
    "Asked again about the canvas of each step, the model gives each written token the chance that was noted."
    t = unmask(net, PROMPTS[:1] * 4, 6, ancestral(4, seed=5), M, temperature=temperature, seed=2)
    for step in range(1, int(t.when.max()) + 1):
        b = collate([Example(r) for r in torch.where(t.when < step, t.ids, M).tolist()])
        logits = net.head(net(b.set(order=torch.zeros_like(b.order)))).detach()
        q = (logits.index_fill(2, torch.tensor([M]), -torch.inf).double() / temperature).softmax(-1)
        now = t.when == step
        torch.testing.assert_close(q.gather(2, t.ids[..., None])[..., 0][now].float(), t.p[now], atol=1e-5, rtol=1e-4)


def test_never_writes_the_mask(net):
    "A model whose favourite token is the mask writes others; its scores do not hide that it would have."
    with torch.no_grad(): net.embed_tokens.weight[M] *= 50
    scores = scorer(net, PROMPTS, 8, M)(torch.full((3, 8), M))
    assert (scores.argmax(-1) == M).any()
    for temperature in 0., 1.: assert not (unmask(net, PROMPTS, 8, ancestral(3), M, temperature=temperature).ids == M).any()


def test_guidance(net):
    "s = 0 is without guidance, s = -1 without the prompt, and the scores are linear in s."
    def write(prompts, s): return unmask(net, prompts, 6, most_confident(6, 6), M, temperature=0, guidance=s).ids[:, -6:]
    blind = [[M] * 4]
    assert torch.equal(write(PROMPTS[:1], -1.), write(blind, 0.)) and not torch.equal(write(PROMPTS[:1], 0.), write(blind, 0.))
    a, b = (scorer(net, p, 6, M) for p in (PROMPTS[:1], blind))
    canvas = torch.full((1, 6), M)
    with torch.no_grad(): at = {s: guided(a, b, s)(canvas) for s in (0., 1., 2.)}
    torch.testing.assert_close(at[0.], a(canvas)); torch.testing.assert_close(at[2.] - at[1.], at[1.] - at[0.], atol=1e-3, rtol=1e-3)


@dataclass(frozen=True)
class Last(Schedule):
    "Hide all of the places from 8 on."
    def masks(self, t, u, may, part): return (hit := torch.arange(u.shape[1]).expand_as(u) >= 8), hit.float()


def test_block_models_read_as_they_were_trained(net):
    "With `block` the scores of a block are those of `BlockDiffusion`'s noised half; without, they are not."
    row = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    q = BlockDiffusion(M, 4, Last()).corrupt(collate([Example(row)]), Noise())
    with torch.no_grad():
        want = net.head(net(q))[0, 8:12]
        canvas = torch.tensor([[*row[4:8], *[M] * 4, *[M] * 4]])                       # block 3 is still to come
        have = scorer(net, [row[:4]], 12, M, block=4)(canvas)[0, 4:8]
        torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
        assert (scorer(net, [row[:4]], 12, M)(canvas)[0, 4:8] - want).abs().max() > .1
    with pytest.raises(ValueError, match="multiple of block=4"): scorer(net, [[5, 6]], 4, M, block=4)


def test_shifted(net):
    "A shifted model is asked at the place before; it cannot write a first token."
    canvas = torch.full((1, 3), M)
    b = collate([Example([5, 6, M, M, M])])
    with torch.no_grad():
        want = net.head(net(b.set(order=torch.zeros_like(b.order))))[:, 1:4]
        torch.testing.assert_close(scorer(net, [[5, 6]], 3, M, shifted=True)(canvas), want)
    with pytest.raises(ValueError, match="needs prompts"): scorer(net, [[5], []], 3, M, shifted=True)


def test_seeds(net):
    "The same seeds write the same, others do not, and the global generator is left alone."
    before = torch.get_rng_state()
    one, same, other = (unmask(net, PROMPTS, 9, ancestral(5, seed=s), M, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, other.ids)
    assert torch.equal(before, torch.get_rng_state())


# ---- 64 bits

@pytest.mark.parametrize("temperature", [.5, 1., 2.])
def test_draws_follow_the_softmax(temperature):
    "Chi-squared of 50,000 draws against softmax(logits / T) in double precision, below the 1e-6 quantile (50) at 7 degrees."
    logits = torch.tensor([2., 1.5, 1., .5, 0., -.5, -1., -2.])
    new, _ = draw(logits.expand(50_000, 8), temperature, 1., torch.rand(50_000, dtype=torch.double, generator=torch.Generator().manual_seed(0)))
    p = (logits.double() / temperature).softmax(0).numpy()
    counts = new.bincount(minlength=8).numpy()
    assert unlikely(counts, p) < 50
    assert unlikely(counts, (logits.double() / temperature / 1.1).softmax(0).numpy()) > 50  # control: another temperature


def test_tails():
    """A token 18 nats behind keeps its 1.5e-8 in `distribution`; of Gumbel noise on the grid of 32-bit uniforms, gone
    through whole, it gets less than a tenth of that; 6 nats behind both are right."""
    grid = torch.arange(1, 2**24, dtype=torch.float64) / 2**24
    for gap, worst in (6., .999), (18., 0.):
        p = float(distribution(torch.tensor([[gap, 0.]]))[0, 1])
        assert p == pytest.approx(1 / (1 + np.exp(gap)), rel=1e-6)
        drawn = float(torch.exp(-torch.exp(-(-torch.log(-torch.log(grid)) - gap))).mean())
        assert worst < drawn / p < (1.001 if worst else .1)


def test_orders_are_all_equally_likely():
    "`first_hitting` goes through all 24 orders of four places alike: chi-squared of 4,800 below the 1e-6 quantile (73)."
    t = denoise(lambda c: torch.zeros(*c.shape, 6), torch.full((4800, 4), M), M, first_hitting(4))
    names = {o: n for n, o in enumerate(permutations((1, 2, 3, 4)))}
    counts = np.bincount([names[tuple(w)] for w in t.when.tolist()], minlength=24)
    assert ((counts - 200)**2 / 200).sum() < 73


def test_picks_used_twice_write_the_same():
    "A list of picks is a plan and not a stream: the same text each time, another for another seed, ancestral and the others."
    torch.manual_seed(0)
    model, prompts = Transformer(Size(50, 16, 2, layers=1, length=32)), [[1, 5], [1, 6, 7]]
    for make in (lambda s: ancestral(6, again=.2, seed=s), lambda s: first_hitting(8, s), lambda s: most_confident(8, 4)):
        picks = make(0)
        one, two, other = (unmask(model, prompts, 8, p, 49, seed=3) for p in (picks, picks, make(1)))
        assert torch.equal(one.ids, two.ids) and torch.equal(one.when, two.when)
        assert make(0) is picks or "confident" in str(picks[0]) or not torch.equal(one.when, other.when)


def test_unmask_reads_without_dropout():
    "A model in training mode writes what it writes in evaluation mode, and is left in its own. Control: with dropout it would not."
    from torch import nn
    class Dropping(Transformer):
        def forward(self, b, cache=None): return nn.functional.dropout(super().forward(b, cache), .5, self.training)
    torch.manual_seed(0)
    model = Dropping(Size(50, 16, 2, layers=1, length=32)).train()
    write = lambda: unmask(model, [[1, 5]], 8, most_confident(8, 8), 49, temperature=0.).ids
    trained = write()
    assert model.training and torch.equal(trained, unmask(model.eval(), [[1, 5]], 8, most_confident(8, 8), 49, temperature=0.).ids)
    b = collate([Example([1, 2, 3])]); model.train()
    assert not torch.equal(model(b), model(b))
