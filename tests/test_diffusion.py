"""Diffusion: bounds against enumeration, weights against the published formulas, masks that depend on nothing but the text."""
import math
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
import pytest
import torch

from lmtrain.batch import Example, Noise, collate
from lmtrain.model import LM, Size, Transformer, moved
from lmtrain.objective import CLM, hide
from lmtrain.objectives.diffusion import (
    At, BlockDiffusion, Diffusion, Polynomial, Schedule, Stepped, Stopped, Uniform, cosine, ended, exact_k, jumps, leftward, linear, nelbo,
    nelbo_bits, polynomial, ranked, times)
from lmtrain.text import examples, train_chars

# ---- a language of 27 texts

M, L, V = 3, 3, 3
TEXTS = list(product(range(V), repeat=L))
P = np.random.default_rng(0).dirichlet([.5] * 27).reshape(3, 3, 3)                     # the language, of entropy 2.882912
ENTROPY = -(P * np.log(P)).sum()


def view(x, S): return tuple(M if i in S else int(x[i]) for i in range(L))


def true_table():
    "Log of the exact conditionals: (4,4,4,3,3)."
    out = np.full((4, 4, 4, L, V), -np.log(V))
    for z in product(range(4), repeat=L):
        mass = P[tuple(slice(None) if v == M else slice(v, v + 1) for v in z)]
        for i in range(L):
            if z[i] == M: out[z][i] = np.log(mass.sum(tuple(j for j in range(L) if j != i)) / mass.sum())
    return torch.from_numpy(out)


def any_table(seed=0): return torch.randn(4, 4, 4, L, V, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)


class Table(LM):
    """Logits from a table of conditionals, under the batch's columns: a token that is not seen counts as masked.

    Its mask logit is 5, so that a loss which allows the mask as an answer is caught.
    """
    def __init__(self, table):
        super().__init__()
        self.table, self.head, self.calls = table, torch.nn.Identity(), 0

    def forward(self, b, cache=None):
        self.calls += 1
        B, T = b.ids.shape
        context = torch.full((B, T, L), M)                                             # (B,T,L)
        for j in range(T):
            if not (b.doc[:, j] > 0).all(): continue
            told = b.sees[:, :, j] & (b.ids[:, j, None] != M)                          # (B,T)
            at = torch.nn.functional.one_hot(b.pos[:, j], L)[:, None].bool()           # (B,1,L)
            context = torch.where(told[..., None] & at, b.ids[:, j, None, None], context)
        z, i = context.flatten(0, 1).T, b.pos.flatten()
        logits = self.table[z[0], z[1], z[2], i]                                       # (B*T,V)
        return torch.cat([logits, torch.full((B * T, 1), 5.)], 1).view(B, T, V + 1)    # (B,T,V+1)


def in_order(f, x, order): return -sum(float(f[view(x, order[n:])][i, x[i]]) for n, i in enumerate(order))


def any_order(f, x): return np.mean([in_order(f, x, o) for o in permutations(range(L))])


def price(f, x, S): return -sum(float(f[view(x, S)][i, x[i]]) for i in S)


SETS = [tuple(i for i in range(L) if h[i]) for h in product([0, 1], repeat=L)]
TABLES = {"exact": true_table(), "arbitrary": any_table()}
SCHEDULES = {"linear": linear, "cosine": cosine, "t^2": polynomial(2.), "t^3": Polynomial(3.)}


def rule(n=40):
    "Gauss-Legendre nodes and weights on [0,1]."
    t, w = np.polynomial.legendre.leggauss(n)
    return (t + 1) / 2, w / 2


def batch(texts=TEXTS): return collate([Example(list(x), index=n) for n, x in enumerate(texts)])


@dataclass(frozen=True)
class Scripted(Schedule):
    "A schedule at a chosen t, with chosen hidden places: what the enumeration hands to the package's `corrupt`."
    of: Schedule
    at: float
    S: tuple

    def masks(self, t, u, may, part):
        inside = torch.zeros_like(may); inside[:, list(self.S)] = True
        u = torch.where(inside, 0., 1.)                                                # (B,T)
        return replace(self.of, eps=0.).masks(torch.full_like(t, self.at), u, may, part)


def by_enumeration(f, schedule, nodes=40):
    "The expected loss of `Diffusion` for every text, over all masks and a rule in t, by the package's own classes: (27,)."
    model, out, b = Table(f), torch.zeros(27, dtype=torch.float64), batch()
    cache = {}                                             # a set's prices, which t does not change
    for t, w in zip(*rule(nodes), strict=True):
        share = float(schedule.hidden(torch.tensor(t)))
        for S in SETS[1:]:
            q = Diffusion(M, Scripted(schedule, t, S)).corrupt(b, Noise())
            assert torch.equal(q.ids == M, q.weights > 0)
            if S not in cache: cache[S] = Diffusion(M).terms(model, q.set(weights=(q.ids == M).float())).double()
            row = q.loss_positions[:27 * len(S)] // L
            terms = torch.zeros(27, dtype=torch.float64).index_add(0, row, cache[S][:len(row)])
            out += w * share**len(S) * (1 - share)**(L - len(S)) * q.weights.amax(1).double() * terms
    return out


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_stopped_clock(schedule):
    "At the t that `Diffusion` has drawn it is Diffusion; at other times it hides a smaller or larger set of the same order."
    b = collate([Example(list(range(4, 40)), index=7)])
    drawn = max(.001, float(times(b, Noise(3))[0, 0]))
    q, at = Diffusion(M, schedule).corrupt(b, Noise(3)), lambda t: Stopped(M, t, schedule).corrupt(b, Noise(3))
    assert torch.equal(at(drawn).ids, q.ids) and torch.allclose(at(drawn).weights, q.weights, rtol=1e-5)
    hidden = [at(t).ids == M for t in (.1, .3, .5, .7, .9, 1.)]
    assert all((a <= z).all() for a, z in zip(hidden[:-1], hidden[1:], strict=True)) and hidden[-1].all()
    assert 0 < hidden[1].sum() < 36 and not torch.equal(at(.5).ids, q.ids) or abs(drawn - .5) < .1
    assert At(schedule, .5).hidden(torch.tensor(.2)) == Schedule().hidden(torch.tensor(.2))


# ---- O1, O2, O3: the bound

@pytest.mark.parametrize("f", TABLES.values(), ids=TABLES)
def test_bound_is_any_order(f):
    "The Beta-weighted sum over masks is the mean over orders, to 1e-12, for each text; exact conditionals give -log p."
    for x in TEXTS:
        beta = sum(math.factorial(len(S) - 1) * math.factorial(L - len(S)) / 6 * price(f, x, S) for S in SETS[1:])
        assert abs(beta - any_order(f, x)) < 1e-12
        mixture = -math.log(np.mean([math.exp(-in_order(f, x, o)) for o in permutations(range(L))]))
        assert beta >= mixture - 1e-12
        if f is TABLES["exact"]: assert abs(beta + math.log(P[x])) < 1e-12
        else: assert beta - mixture > 1e-4  # strictly above
    if f is TABLES["exact"]: assert abs(sum(P[x] * any_order(f, x) for x in TEXTS) - 2.882912) < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_weights_of_a_schedule(schedule):
    "weight = -alpha'/(1-alpha), by autograd; and its integral against k hidden of n is (k-1)!(n-k)!/n!, to 1e-12."
    t = torch.linspace(.01, .99, 99, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / schedule.hidden(t), atol=1e-12, rtol=1e-12)
    at, w = (torch.from_numpy(a) for a in rule())
    for n in 1, 3, 8:
        for k in range(1, n + 1):
            h = schedule.hidden(at)
            have = (w * schedule.weight(at) * h**k * (1 - h)**(n - k)).sum().item()
            assert abs(have - math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)) < 1e-12
    assert schedule.hidden(torch.tensor([0., 1.])).tolist() == [0, 1]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("f", TABLES.values(), ids=TABLES)
def test_loss_is_the_bound(f, schedule):
    "The class's own masks, weights and losses, over all masks and t, are the any-order price of each text, to 32 bits."
    want = torch.tensor([any_order(f, x) for x in TEXTS])
    torch.testing.assert_close(by_enumeration(f, schedule), want, atol=0, rtol=2e-6)


def test_control_allowing_the_mask():
    "With the mask as a possible answer the loss is another, by nats: p(mask) = 0 is part of the formula."
    class Allows(Diffusion):
        forbid = ()
    q = Diffusion(M, Stepped(1)).corrupt(batch(), Noise())
    a, b = (o(M).loss(Table(any_table()), q) for o in (Diffusion, Allows))
    assert b["allows"] - a["diffusion"] > 27


def average(g):
    "The expectation over texts, t and masks of g(text, hidden places)."
    t, w = rule()
    share = {k: float((w * t**k * (1 - t)**(L - k)).sum()) for k in range(L + 1)}
    return sum(P[x] * share[len(S)] * g(x, S) for x in TEXTS for S in SETS)


def test_wrong_denominators():
    """A mean over each text's hidden tokens is L/(L+1) of the bound, exactly, and so below the entropy. The pooled mean
    is another number, and no bound: a model that is bad at the last gap costs more than it says, in any order."""
    for f in TABLES.values():
        want = sum(P[x] * any_order(f, x) for x in TEXTS)
        per_text = average(lambda x, S, f=f: L * price(f, x, S) / max(1, len(S)))
        pooled = L * average(lambda x, S, f=f: price(f, x, S)) / average(lambda x, S: len(S))
        assert abs(per_text - want * L / (L + 1)) < 1e-12 and abs(pooled - want) > .01
        if f is TABLES["exact"]: assert per_text < ENTROPY - .5
    bad = true_table()
    for x in TEXTS:
        for i in range(L): bad[view(x, (i,))] = (-4 * bad[view(x, (i,))].clamp(-5)).log_softmax(-1)
    pooled = L * average(lambda x, S: price(bad, x, S)) / average(lambda x, S: len(S))
    orders = list(permutations(range(L)))
    truly = -sum(P[x] * math.log(np.mean([math.exp(-in_order(bad, x, o)) for o in orders])) for x in TEXTS)
    assert pooled < truly - .1 and sum(P[x] * any_order(bad, x) for x in TEXTS) > truly


# ---- O4: how many are hidden

def test_number_of_hidden_is_uniform():
    "Over seeds, |S| is uniform on 0..L: chi-squared of 4,000 draws for L=5 below its 1e-6 quantile (35.9 at 5 degrees)."
    b = collate([Example([10] * 5, index=n) for n in range(4)])
    k = torch.cat([(Diffusion(M).corrupt(b, Noise(seed)).ids == M).sum(1)[:1] for seed in range(4000)])
    n = k.bincount(minlength=6)
    assert ((n - 4000 / 6)**2 / (4000 / 6)).sum() < 35.9
    fixed = (torch.rand(4000, 5, generator=torch.Generator().manual_seed(0)) < .15).sum(1).bincount(minlength=6)  # MLM
    assert ((fixed - 4000 / 6)**2 / (4000 / 6)).sum() > 1000


# ---- O5: discrete time

def test_discrete_time():
    """`Stepped(T)`, over all ticks and masks: T=1 is the sum of the marginals' prices; with exact conditionals the bound
    falls to the entropy, through the values of an independent computation; with others it need not fall."""
    def expected(f, T):
        out, b = 0., batch()
        prices = {S: [price(f, x, S) for x in TEXTS] for S in SETS}
        for tick in range(1, T + 1):
            for S in SETS[1:]:
                u = torch.ones(27, L); u[:, list(S)] = 0.                              # (27,3)
                hit, w = Stepped(T).masks(torch.full((27, L), (tick - .5) / T), u, b.answer, b.doc)
                assert torch.equal(hit, u == 0)
                share = (tick / T)**len(S) * (1 - tick / T)**(L - len(S)) / T
                out += share * float(w.amax()) * float(np.dot(P.flatten(), prices[S]))
        return out
    have = [expected(TABLES["exact"], T) for T in (1, 2, 4, 8, 32, 128)]
    assert np.allclose(have, [3.1247, 3.0186, 2.9545, 2.9196, 2.8923, 2.8853], atol=6e-5)
    marginals = sum(-(m * np.log(m)).sum() for m in (P.sum((1, 2)), P.sum((0, 2)), P.sum((0, 1))))
    assert abs(have[0] - marginals) < 1e-6
    rough = true_table(); rough[M, M, M] = torch.from_numpy(
        np.log(np.stack([P.sum((1, 2)), P.sum((0, 2)), P.sum((0, 1))])))
    bad = any_table(1); bad[M, M, M] = rough[M, M, M]
    assert expected(bad, 1) < expected(bad, 8) - .1  # not monotone: each T is a bound for another model


# ---- against the published formulas

@pytest.fixture
def net():
    model = Transformer(Size(20, dim=32, heads=4, kv_heads=2, layers=2)).eval()
    for p in model.parameters(): p.data *= 5
    return model


DOCS = [Example(torch.randint(4, 20, (n,), generator=torch.Generator().manual_seed(n)).tolist(), index=7 * n)
        for n in (1, 4, 9, 14, 15, 23)]
ASKED = [replace(e, answer=[n >= len(e) // 3 for n in range(len(e))]) for e in DOCS]


def subs(model, x0, real, t, moved_, mask):
    "Sahoo et al. (2024), from the formula: SUBS parameterisation, sigma = -log(1 - t), weight sigma'/expm1(sigma)."
    xt = torch.where(moved_, mask, x0)
    c = collate([Example(r[k].tolist()) for r, k in zip(xt, real, strict=True)], T=x0.shape[1])
    logits = model.head(model(c.set(order=torch.zeros_like(c.order)))).double()        # (B,T,V)
    logits[:, :, mask] = -1e6
    logp = logits - logits.logsumexp(-1, keepdim=True)
    assert torch.allclose(logp.exp().sum(-1), torch.ones(1).double())
    logp = torch.where((xt != mask)[..., None], torch.nn.functional.one_hot(xt, 20).double().log().clamp(-1e6), logp)
    sigma, slope = -torch.log1p(-t), 1 / (1 - t)                                       # (B,T)
    each = -logp.gather(2, x0[..., None])[..., 0] * slope / torch.expm1(sigma) * real
    return each.sum() / real.sum()


def test_equals_mdlm(net):
    "Loss over count is the published one, in double precision, at the same t and masks; with LLaDA's 1/p_mask too."
    b = collate(DOCS)
    for seed in range(5):
        q, t = Diffusion(M).corrupt(b, Noise(seed)), times(b, Noise(seed)).clamp(min=1e-3).double()
        with torch.no_grad():
            want = subs(net, b.clean, b.doc > 0, t, q.ids != q.clean, M)
            have = Diffusion(M).loss(net, q)["diffusion"] / Diffusion(M).count(q)["diffusion"]
            other = Diffusion(M).loss(net, q)["diffusion"] / (q.weights > 0).sum()  # per hidden token: not the same
        assert have == pytest.approx(float(want), rel=1e-5) and other != pytest.approx(float(want), rel=.02)


def test_shifted(net):
    "Asked one place early: the same masks and prices as logits moved right; no document's first token is hidden."
    for b in collate(ASKED), collate(ASKED, 40, pack=True):
        for seed in range(4):
            a, c = Diffusion(M, shifted=True).corrupt(b, Noise(seed)), Diffusion(M).corrupt(b, Noise(seed))
            inner = b.doc_pos > 0
            assert torch.equal(a.ids[inner], c.ids[inner]) and torch.equal(a.ids[~inner], b.ids[~inner])
            logits = net.head(net(a)).index_fill(2, torch.tensor([M]), -torch.inf).roll(1, 1).log_softmax(-1)
            want = -(torch.where(inner, c.weights, 0.) * logits.gather(2, b.clean[..., None])[..., 0]).sum()
            loss = Diffusion(M, shifted=True).loss(net, a)["diffusion"]
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
            assert Diffusion(M).count(a)["diffusion"] == (b.answer & inner).sum()


def test_leftward():
    "Each question moves to the token before it; a document's first token has none in its own document, and is dropped."
    b = hide(collate([Example([5, 6]), Example([7, 8, 9])], 6, pack=True), torch.ones(1, 6).bool(), M)
    b = b.set(weights=b.weights * (b.doc > 0))
    assert leftward(b).targets.tolist() == [[6, 7, 8, 9, 0, 0]] and leftward(b).weights.tolist() == [[1, 0, 1, 1, 0, 0]]


# ---- t, and what is hidden

def gap(t):
    "Largest distance between neighbours on the circle, times how many there are: 1 if even, about log n if random."
    t = t.double().sort().values
    return (torch.cat([t[1:] - t[:-1], t[:1] + 1 - t[-1:]]).max() * len(t)).item()


def test_times_are_spread():
    "Any run of examples, epochs or parts leaves no gap above 3 of n's even ones; independent draws do."
    one = collate([Example([5], index=n) for n in range(3000)])
    for seed in range(5):
        by_example = times(one, Noise(seed, 3))[:, 0]
        by_epoch = torch.stack([times(one[:1], Noise(seed, e))[0, 0] for e in range(300)])
        by_part = times(collate([Example([5] * 300)]), Noise(seed), torch.arange(300))[0]
        for n in 8, 16, 50, 256:
            for start in 0, 17, 40: assert max(gap(s[start:start + n]) for s in (by_example, by_epoch, by_part)) < 3
    assert gap(torch.rand(256, generator=torch.Generator().manual_seed(0))) > 3  # control


def test_times_are_uniform():
    "Over seeds a single t is uniform: chi-squared on 16 cells of 4,000 below the 1e-6 quantile (56.5); always below 1."
    b = collate([Example([5], index=n) for n in (0, 1, 12345)])
    t = torch.stack([times(b, Noise(seed, 2))[:, 0] for seed in range(4000)])          # (4000,3)
    for c in t.T: assert ((torch.histc(c, 16, 0, 1) - 250)**2 / 250).sum() < 56.5
    assert t.max() < 1 and t.min() >= 0


OBJECTIVES = [Diffusion(M), Diffusion(M, exact_k), Diffusion(M, cosine, shifted=True), Diffusion(M, Stepped(4)),
              Uniform(range(4, 20)), BlockDiffusion(M, 4), BlockDiffusion(M, 3, exact_k)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_layout_changes_nothing(net, objective):
    "Loss and count are those of separate documents, packed, padded, backwards or alone, to 1e-5."
    def total(batches):
        parts = [objective.corrupt(b, Noise(1, 2)) for b in batches]
        with torch.no_grad(): return (sum(objective.loss(net, q)[objective.name].double() for q in parts).item(),
                                      sum(objective.count(q)[objective.name].item() for q in parts))
    want = total([collate([e]) for e in ASKED])
    assert want[0] > 1
    for other in ([collate(ASKED)], [collate(ASKED, 44, pack=True)], [collate(ASKED[::-1], 30, pad=9)],
                  [collate(ASKED[:2]), collate(ASKED[2:])]):
        loss, n = total(other)
        assert n == want[1] and loss == pytest.approx(want[0], rel=1e-5)
    moved_ = [replace(e, index=e.index + 1) for e in ASKED]  # control: other numbers, another draw
    assert total([collate(moved_)])[0] != pytest.approx(want[0], rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_prompt_stays_clean(objective):
    "Over 200 draws no prompt and no padding is changed or asked; every answer is changed at some draw."
    b = collate(ASKED, 30)
    T = b.ids.shape[1]
    ever = torch.zeros_like(b.answer)
    for seed in range(200):
        q = objective.corrupt(b, Noise(seed))
        ever |= q.ids[:, :T] != b.ids
        asked = torch.zeros(q.ids.numel() + 1).index_fill(0, q.loss_positions, 1)[:-1].view(q.ids.shape) > 0  # (B,T or 2T)
        says = asked[:, :T] if not getattr(objective, "shifted", False) else asked[:, :T].roll(1, 1)
        assert not (says & ~b.answer).any() and torch.equal(q.clean[:, :T], b.clean)
    first = b.doc_pos == 0 if getattr(objective, "shifted", False) else torch.zeros_like(ever)
    assert torch.equal(ever, b.answer & ~first)
    no_answers = objective.corrupt(collate([Example([5, 6], [False, False])]), Noise())
    assert not no_answers.weights.any() and objective.count(no_answers)[objective.name] == 0


def test_more_time_hides_more():
    "At a later t the hidden are the hidden of before and more, for all schedules."
    b = collate([Example([5] * 200)])
    for s in linear, cosine, polynomial(2.), exact_k, Stepped(50):
        hits = [s.masks(torch.full((1, 200), t), Noise()(b), b.answer, b.doc)[0] for t in (.1, .4, .6, .95)]
        for a, c in zip(hits, hits[1:], strict=False): assert (a <= c).all() and c.sum() > a.sum()


def test_exact_k():
    "Always k, uniform in 1..n, weight n/k, in each document and part on its own, also where random numbers are equal."
    b = collate([Example([5] * n, index=n) for n in (5, 5, 7)], 20, pack=True)
    for seed in range(50):
        q = Diffusion(M, exact_k).corrupt(b, Noise(seed))
        for d in 1, 2, 3:
            k, n = ((q.ids == M) & (b.doc == d)).sum(), (b.doc == d).sum()
            assert 1 <= k <= n and torch.equal(q.weights[(q.weights > 0) & (b.doc == d)].unique(), (n / k).float()[None])
    t = torch.full((1, 20), 1 - 2**-24)                                                # the largest there is
    assert exact_k.masks(t, torch.zeros(1, 20), b.answer, b.doc)[1].unique().tolist() == [0, 1]
    rank, n = ranked(torch.full((1, 20), .5), b.answer, b.doc)
    for d in 1, 2, 3: assert rank[b.doc == d].tolist() == [*range(n[b.doc == d][0])]


# ---- nelbo

@pytest.mark.parametrize("f", TABLES.values(), ids=TABLES)
def test_exact_k_is_unbiased(f):
    "Over all k and all orders of u, the package's weighted sum is the any-order price, to 32 bits."
    model, b, total = Table(f), batch(), torch.zeros(27, dtype=torch.float64)
    for k in range(1, L + 1):
        for u in permutations((.1, .5, .9)):
            hit, w = exact_k.masks(torch.full((27, L), (k - .5) / L), torch.tensor([u]).expand(27, L), b.answer, b.doc)
            q = hide(b.set(order=torch.zeros_like(b.order)), hit, M).set(weights=w)
            terms = Diffusion(M).terms(model, q)[:27 * k].double()
            total += torch.zeros(27, dtype=torch.float64).index_add(0, q.loss_positions[:27 * k] // L, terms) / 18
    torch.testing.assert_close(total, torch.tensor([any_order(f, x) for x in TEXTS]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("objective", [Diffusion(M, exact_k), Diffusion(M, replace(linear, eps=0.)),
                                       BlockDiffusion(M, 2, exact_k)], ids=repr)
def test_nelbo(objective):
    """The mean of 40 seeds of 16 draws is the enumerated bound within 5 standard errors for each of 27 texts (false
    alarm below 2e-5), and the reported error is not too small."""
    f = any_table()
    orders = [(0, 1, 2), (1, 0, 2)] if isinstance(objective, BlockDiffusion) else list(permutations(range(L)))
    want = torch.tensor([np.mean([in_order(f, x, o) for o in orders]) for x in TEXTS])
    runs = [nelbo(Table(f), batch(), objective, draws=16, noise=Noise(seed)) for seed in range(40)]
    nats = torch.stack([r.nats for r in runs])                                         # (40,27)
    off = (nats.mean(0) - want) / (nats.std(0) / 40**.5)
    assert off.abs().max() < 5
    error = torch.stack([r.error for r in runs]).pow(2).mean().sqrt()
    assert error > .8 * (nats - want).pow(2).mean().sqrt()


def test_exact_k_is_quieter():
    "On the toy the error of exactly k is below half of that of Bernoulli masks."
    bound = torch.tensor([any_order(any_table(), x) for x in TEXTS])
    off = lambda s: torch.stack([nelbo(Table(any_table()), batch(), Diffusion(M, s), 16, Noise(n)).nats - bound for n in range(10)]).std()
    assert off(exact_k) < .5 * off(linear)


def test_nelbo_leaves_the_model_alone(net):
    "The mode is given back, nothing is learnt, a single draw has no error."
    net.train()
    out = nelbo(net, collate(ASKED), Diffusion(M), draws=1)
    assert net.training and not out.nats.requires_grad and out.nats.dtype == torch.float64 and out.error.isnan().all()
    again = nelbo(net, collate(ASKED, 40), Diffusion(M), draws=1).nats
    torch.testing.assert_close(out.nats, again, rtol=1e-5, atol=1e-5)


def test_nelbo_bits():
    "An untrained model with equal logits pays log2(V-1) bits for each asked token, whatever is drawn."
    texts = ["so it goes, and so it went"] * 3
    tok = train_chars(texts)
    rows = examples(texts, tok, T=16)
    model = Transformer(Size(len(tok), 16, 2, layers=1))
    with torch.no_grad(): model.embed_tokens.weight.zero_()
    bits = nelbo_bits(model, rows, Diffusion(tok.mask_token_id, exact_k), draws=2, batch=2)
    want = [sum(e.answer) * math.log2(len(tok) - 1) for e in rows]
    np.testing.assert_allclose(bits, want, rtol=1e-5)


# ---- blocks

def published(L, block):
    "Which pairs see each other, by Arriola et al. (2025): within a noised block, noised to earlier clean, clean causal."
    part, clean = torch.arange(L).repeat(2) // block, torch.arange(2 * L) >= L
    q, k, qc, kc = part[:, None], part[None], clean[:, None], clean[None]
    return (q == k) & ~qc & ~kc | (q > k) & ~qc & kc | (q >= k) & qc & kc              # (2L,2L)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 12])
def test_block_mask(net, block):
    "The columns say the published mask, in padded rows too; and who feels a change is exactly who may."
    q = BlockDiffusion(M, block).corrupt(collate([DOCS[2], DOCS[0]]), Noise(3))
    assert torch.equal(q.sees[0], published(9, block)) and not q.is_causal
    alone = torch.zeros(18, 18, dtype=torch.bool)
    alone[0, 0] = alone[9, 9] = True
    real = (q.doc[1] > 0)[:, None] & (q.doc[1] > 0)[None]
    assert torch.equal(q.sees[1] & real, alone)
    felt = torch.stack([moved(net, q, j)[0] for j in range(18)], 1)                    # (18,18)
    assert torch.equal(felt, published(9, block)) and q.pos[0].tolist() == [*range(9)] * 2


def test_control_block_leak(net):
    "Without `private`, or with order k for both halves, a noised place feels its own clean token."
    q = BlockDiffusion(M, 3).corrupt(collate([DOCS[2]]), Noise(3))
    for bad in q.set(order=q.order // 2), q.set(order=q.order // 2).with_extra(private=torch.zeros_like(q.answer)):
        felt = torch.stack([moved(net, bad, j)[0] for j in range(9, 18)], 1)           # (18,9)
        assert felt[:9].diagonal().all()


@pytest.mark.parametrize("schedule", [linear, exact_k, cosine], ids=repr)
def test_one_block_is_diffusion(net, schedule):
    "A block as long as the text: loss and gradient of `Diffusion`, at the same noise, to 1e-5."
    b = collate(ASKED)
    out = []
    for objective in BlockDiffusion(M, 40, schedule), Diffusion(M, schedule):
        net.zero_grad()
        q = objective.corrupt(b, Noise(2))
        loss = objective.loss(net, q)[objective.name]; loss.backward()
        out.append((loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()]), objective.count(q)[objective.name]))
    torch.testing.assert_close(out[0][0], out[1][0], rtol=1e-5, atol=0)
    assert (out[0][1] - out[1][1]).norm() < 1e-5 * out[1][1].norm() and out[0][2] == out[1][2]


def test_blocks_of_one_are_left_to_right(net):
    "The loss is the causal price of each token given those before it and a mask in its place, whatever the noise."
    b = collate(ASKED)
    with torch.no_grad():
        losses = [BlockDiffusion(M, 1, exact_k).loss(net, BlockDiffusion(M, 1, exact_k).corrupt(b, Noise(s)))["blockdiffusion"]
                  for s in (0, 1)]
        want = 0.
        for e in ASKED:
            for n in range(len(e)):
                if not e.answer[n]: continue
                c = collate([Example([*e.ids[:n], M])])
                assert c.is_causal
                logits = net.head(net(c))[0, -1].index_fill(0, torch.tensor([M]), -torch.inf)
                want -= logits.log_softmax(0)[e.ids[n]]
        causal = CLM().loss(net, CLM().corrupt(b, Noise()))["clm"]
    assert losses[0] == losses[1] == pytest.approx(float(want), rel=1e-5)
    assert losses[0] != pytest.approx(float(causal), rel=.01)  # control: it is not the same question as CLM's


@pytest.mark.parametrize("schedule", [linear, cosine], ids=repr)
@pytest.mark.parametrize("block, orders", [(1, [(0, 1, 2)]), (2, [(0, 1, 2), (1, 0, 2)]), (3, list(permutations(range(3))))])
def test_blocks_are_orders(block, orders, schedule):
    "Over all t and masks: the mean price over the orders that go from block to block, for each text, to 32 bits."
    f, b, total = any_table(), batch(), torch.zeros(27, dtype=torch.float64)
    for t, w in zip(*rule(20 if schedule is linear else 40), strict=True):
        share = float(schedule.hidden(torch.tensor(t)))
        for S in SETS[1:]:
            objective = BlockDiffusion(M, block, Scripted(schedule, t, S))
            q = objective.corrupt(b, Noise())
            terms = objective.terms(Table(f), q).double()[:27 * len(S)]
            each = torch.zeros(27, dtype=torch.float64).index_add(0, q.loss_positions[:27 * len(S)] // (2 * L), terms)
            total += w * share**len(S) * (1 - share)**(L - len(S)) * each
    want = torch.tensor([np.mean([in_order(f, x, o) for o in orders]) for x in TEXTS])
    torch.testing.assert_close(total, want, rtol=3e-6, atol=0)


def test_block_columns():
    "Other columns come along twice, row facts once, and the clean half is neither asked nor counted."
    e = [replace(e, tokens={"word": [*range(len(e))]}, facts={"reward": 1.}) for e in ASKED]
    b = collate(e)
    q = BlockDiffusion(M, 4).corrupt(b, Noise())
    assert torch.equal(q.extra["word"], b.extra["word"].repeat(1, 2)) and q.extra["reward"].shape == (6,)
    T = b.ids.shape[1]
    assert not q.weights[:, T:].any() and not q.answer[:, T:].any() and torch.equal(q.ids[:, T:], b.clean)


# ---- uniform noise

SIGHT = torch.eye(3, dtype=torch.float64)


def uniform_price(f, x, t):
    "The rate of the bound at t, over all 27 noisy texts: scalar; and each noisy text's chance."
    K, alpha, out = 3, 1 - t, 0.
    for z in TEXTS:
        q = math.prod(alpha * (a == c) + (1 - alpha) / K for a, c in zip(x, z, strict=True))
        out += q * float(jumps(f[z], torch.tensor(x), torch.tensor(z), torch.full((3,), alpha, dtype=torch.float64)).sum())
    return out / alpha / K


def uniform_bound(f, x, nodes=24):
    s, w = rule(nodes)
    return sum(3 * a**2 * c * uniform_price(f, x, a**3) for a, c in zip(s, w, strict=True))


def reverse_law(f, ticks=600):
    "What the model's reverse process ends with, from uniform noise: (27,), by the matrix exponential over small ticks."
    at, law = {z: n for n, z in enumerate(TEXTS)}, torch.full((27,), 1 / 27, dtype=torch.float64)
    grid = np.linspace(1, 0, ticks + 1)**2
    for t1, t0 in zip(grid, grid[1:], strict=False):
        alpha = 1 - (t1 + t0) / 2
        R = torch.zeros(27, 27, dtype=torch.float64)
        for z in TEXTS:
            said = alpha * f[z].exp() + (1 - alpha) / 3                                # (3,3) place, token
            for i in range(3):
                for y in set(range(3)) - {z[i]}:
                    R[at[z], at[(*z[:i], y, *z[i + 1:])]] = said[i, y] / said[i, z[i]] / alpha / 3
        R -= torch.diag(R.sum(1))
        law = law @ torch.matrix_exp((t1 - t0) * R)
    return law


def test_uniform_bounds_its_own_process():
    """For an arbitrary model the integral is above -log of the chance with which its own reverse process ends in a
    text, for each of 27 texts. Control: cross-entropy of changed tokens over t is below it for most."""
    f = {z: (.7 * torch.randn(3, 3, generator=torch.Generator().manual_seed(n)).double()).log_softmax(-1)
         for n, z in enumerate(TEXTS)}
    law = reverse_law(f)
    assert abs(law.sum() - 1) < 1e-9
    s, w = rule(24)
    below = 0
    for n, x in enumerate(TEXTS):
        assert uniform_bound(f, x) > -math.log(law[n]) + 1e-3
        naive = sum(3 * a**2 * c * sum(
            math.prod((1 - a**3) * (u == v) + a**3 / 3 for u, v in zip(x, z, strict=True))
            * -sum(float(f[z][i, x[i]]) for i in range(3) if z[i] != x[i]) / a**3 for z in TEXTS)
            for a, c in zip(s, w, strict=True))
        below += naive < -math.log(law[n])
    assert below > 13


def test_uniform_is_tight():
    "With the true conditionals at each t the bound averages to the entropy, to 1e-4, and any other model pays more."
    def conditionals(t):
        Q = (1 - t) * SIGHT + t / 3 * torch.ones(3, 3).double()
        p = torch.from_numpy(P)
        out = {z: torch.zeros(3, 3).double() for z in TEXTS}
        for i in range(3):
            mats = [SIGHT if j == i else Q for j in range(3)]
            joint = torch.einsum("abc,ax,by,cz->xyz", p, *mats)                        # x_i, and the others' noisy z
            for z in TEXTS:
                row = joint[tuple(slice(None) if j == i else z[j] for j in range(3))]  # (3,)
                out[z][i] = (row / row.sum()).log()
        return out
    s, w = rule(24)
    total = other = 0.
    for a, c in zip(s, w, strict=True):
        f = conditionals(a**3)
        g = {z: (.8 * v).log_softmax(-1) for z, v in f.items()}
        for x in TEXTS:
            total += P[x] * 3 * a**2 * c * uniform_price(f, x, a**3)
            other += P[x] * 3 * a**2 * c * uniform_price(g, x, a**3)
    assert abs(total - ENTROPY) < 1e-4 and other > ENTROPY + .01


class Free(LM):
    "Logits from a table of noisy texts."
    def __init__(self, f):
        super().__init__()
        self.table, self.head = torch.stack([f[z] for z in TEXTS]).float(), torch.nn.Identity()

    def forward(self, b, cache=None): return self.table[(b.ids * torch.tensor([9, 3, 1])).sum(1)]  # (B,3,3)


def test_uniform_class():
    "The class's mean over 4,000 draws is the integral over the t it draws, within 4.5 standard errors (1e-5)."
    f = {z: torch.randn(3, 3, generator=torch.Generator().manual_seed(n)).double().log_softmax(-1) for n, z in enumerate(TEXTS)}
    objective, x = Uniform(range(3)), (0, 2, 1)
    losses = []
    for seed in range(8):
        b = collate([Example(list(x), index=n) for n in range(500)])
        q = objective.corrupt(b, Noise(seed))
        terms, row = objective.terms(Free(f), q).double(), q.loss_positions.clamp(min=0) // 3
        losses.append(torch.zeros(500, dtype=torch.float64).index_add(0, row, terms))
        assert terms[q.loss_positions < 0].abs().sum() == 0
    losses = torch.cat(losses)
    t, w = rule(60)
    lo, hi = 1e-3**(1 / 3), (1 - 1e-3)**(1 / 3)
    s = lo + (hi - lo) * t
    want = sum(3 * a**2 * c * (hi - lo) * uniform_price(f, x, a**3) for a, c in zip(s, w, strict=True)) / (1 - 2e-3)
    assert abs(losses.mean() - want) < 4.5 * losses.std() / len(losses)**.5
    changed = (q.ids != q.clean).float().mean()
    assert abs(changed - 1 / 3) < .06  # half of the tokens are redrawn, a third of those to themselves


def test_uniform_noise_is_uniform():
    "What replaces a token does not depend on t: chi-squared over the 15 others, little noise and much apart, below 56."
    b = collate([Example([9] * 64, index=n) for n in range(1500)])
    q = Uniform(range(4, 20)).corrupt(b, Noise(3))
    for part in q.extra["alpha"] > .8, q.extra["alpha"] < .2:
        new = q.ids[part & (q.ids != 9)]
        n = new.bincount(minlength=20)[[*range(4, 9), *range(10, 20)]]
        assert n.sum() == len(new) > 1000 and ((n - len(new) / 15)**2 / (len(new) / 15)).sum() < 56  # 1e-6 at 14 degrees


def test_uniform_refuses():
    "An answer that no noise could reach is refused; as part of a prompt it is read."
    with pytest.raises(ValueError, match="outside range"): Uniform(range(4, 20)).corrupt(collate([Example([5, 2])]), Noise())
    q = Uniform(range(4, 20)).corrupt(collate([Example([2, 5], [False, True])]), Noise())
    assert q.ids[0, 0] == 2 and q.ids[0, 1] >= 4


# ---- the house

def test_ended():
    "Filled with answered ends; columns come along; too long is refused; what was given stays as it was."
    e = Example([5, 6], [False, True], {"word": [0, 1]}, index=3)
    out = ended(e, 5, 2)
    assert out.ids == [5, 6, 2, 2, 2] and out.answer == [False, True, True, True, True] and out.tokens == {"word": [0, 1, 1, 1, 1]}
    assert e.ids == [5, 6] and ended(Example([5]), 2, 2).answer == [True, True] and ended(e, 2, 2) == e
    with pytest.raises(ValueError, match="longer than T=1"): ended(e, 1, 2)


def test_records():
    "The repr is the record, and the name is the class's."
    assert repr(Diffusion(3)) == "Diffusion(mask_id=3, schedule=Schedule(eps=0.001), shifted=False)"
    assert repr(BlockDiffusion(3, 8, polynomial(2.))) == "BlockDiffusion(mask_id=3, block=8, schedule=Polynomial(eps=0.001, power=2.0))"
    assert [o.name for o in OBJECTIVES[-3:]] == ["uniform", "blockdiffusion", "blockdiffusion"]
    import pickle
    for o in OBJECTIVES: assert repr(pickle.loads(pickle.dumps(o))) == repr(o)  # workers get them so


# ---- a bound is a bound

class Flat(LM):
    "A model that predicts uniformly: its cost a token is log(V - 1), the mask excluded, or log K."
    dim = 1
    def __init__(self, V):
        super().__init__()
        self.head = torch.nn.Linear(1, V, bias=False); torch.nn.init.zeros_(self.head.weight)
    def forward(self, b, cache=None): return torch.zeros(*b.ids.shape, 1)              # (B,T,1)


@pytest.mark.parametrize("schedule", [linear, cosine, polynomial(.25), polynomial(.5), polynomial(2.), replace(linear, eps=.1),
                                      replace(polynomial(.5), eps=.1), exact_k], ids=repr)
@pytest.mark.parametrize("make", [lambda s: Diffusion(V - 1, s), lambda s: BlockDiffusion(V - 1, 4, s)], ids=["whole", "blocks"])
def test_the_bound_of_a_flat_model_is_its_likelihood(schedule, make):
    """Where the model says the same everywhere the bound is tight: nelbo / log(V - 1) is 1, within five standard errors
    of 20,000 draws; without the last term, the control, it is .82 under polynomial(.25)."""
    V_ = 30
    rows = collate([Example(torch.randint(V_ - 1, (8,)).tolist(), index=n) for n in range(2000)])
    bound = nelbo(Flat(V_), rows, replace(make(schedule), mask_id=V_ - 1), draws=10)
    ratio = bound.nats / (8 * math.log(V_ - 1))                                        # (2000,)
    error = float(ratio.std() / 2000 ** .5)
    assert abs(float(ratio.mean()) - 1) < max(5 * error, 1e-6) and error < .05
    cut = float(ratio.mean()) * (1 - float(schedule.hidden(torch.tensor(schedule.eps)))) if schedule.eps else 1.
    assert cut < .85 or schedule != polynomial(.25)


@pytest.mark.parametrize("K", [2, 5, 50])
@pytest.mark.parametrize("schedule", [linear, replace(linear, eps=.05), cosine], ids=repr)
def test_uniform_noise_is_bounded_with_its_tails(K, schedule):
    "For a flat model the bound is log K and a little more, never less, within five standard errors; without tails, less."
    from lmtrain.objectives.diffusion import tails
    rows = collate([Example(torch.randint(K, (8,)).tolist(), index=n) for n in range(2000)])
    ratio = nelbo(Flat(K), rows, Uniform(range(K), schedule), draws=8).nats / (8 * math.log(K))
    mean, error = float(ratio.mean()), float(ratio.std() / 2000 ** .5)
    ends = tuple(schedule.alpha(torch.tensor([schedule.eps, 1 - schedule.eps]).double()).tolist())
    lost = tails(ends, K) / math.log(K)
    assert 1 - 5 * error < mean < 1 + lost + 5 * error and mean - lost < 1 + 5 * error
    if schedule.eps == .05: assert mean - lost < 1 - 5 * error


def test_tails_by_enumeration():
    "The two ends as expectations over all tokens: of the decoder that knows the noise, and of the divergence from uniform."
    from lmtrain.objectives.diffusion import tails
    for K, alpha in (2, (.999, .001)), (7, (.9, .2)):
        q = torch.full((K,), (1 - alpha[0]) / K).double(); q[0] += alpha[0]            # (K,) seen, if 0 is true
        late = torch.full((K,), (1 - alpha[1]) / K).double(); late[0] += alpha[1]
        want = -(q * q.log()).sum() + (late * (late * K).log()).sum()
        assert tails(alpha, K) == pytest.approx(float(want), rel=1e-5)
    assert tails((1., 0.), 5) == pytest.approx(0)


def test_an_answer_that_is_the_mask_is_refused():
    "Its loss would be infinite: the mask is never predicted. Unanswered, it may stand there."
    for o in Diffusion(V - 1), BlockDiffusion(V - 1, 4), Diffusion(V - 1, exact_k):
        with pytest.raises(ValueError, match=f"holds the mask token {V - 1} as an answer"): o.corrupt(collate([Example([1, V - 1, 3])]), Noise())
        o.corrupt(collate([Example([1, V - 1, 3], [True, False, True])]), Noise())
