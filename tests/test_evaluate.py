"""Likelihoods against transformers and enumeration; pairs, choices and matches by their definitions."""
import math
from functools import partial

import numpy as np
import pytest
import torch

from lmtrain.batch import Example, collate
from lmtrain.claims import of_arm, over_seeds, versus
from lmtrain.evaluate import choose, encoded, exact_match, interval, likelihood, minimal_pairs, pseudo_likelihood, wilson
from lmtrain.model import Size, Transformer, to_transformers
from lmtrain.text import examples, train_bpe


@pytest.fixture(scope="module")
def tok(): return train_bpe(["the sea was calm and the ship was old <|eos|> "] * 20, 290)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    m = Transformer(Size(290, dim=32, heads=2, layers=2, length=64)).eval()
    for p in m.parameters(): p.data *= 4
    return m


def test_likelihood_is_transformers(model, tok):
    "The sum over a text equals transformers' own loss times its tokens; batches of any size; answers only."
    items = [Example(encoded(t, tok)) for t in ("the sea was calm", "old", "the ship and the sea")]
    net = to_transformers(model)
    with torch.no_grad():
        want = [-float(net(torch.tensor([e.ids]), labels=torch.tensor([e.ids])).loss) * (len(e) - 1) for e in items]
    for batch in (1, 2, 9): assert np.allclose(likelihood(model, items, batch), want, atol=1e-3)
    whole = items[0]
    cut = [Example(whole.ids, [(t < 4) == part for t in range(len(whole))]) for part in (True, False)]
    assert abs(likelihood(model, cut).sum() - likelihood(model, [whole])[0]) < 1e-3
    assert likelihood(model, []).shape == (0,)


def test_likelihoods_add_up_to_one():
    "Over all 5 x 5 continuations of a token, by enumeration."
    torch.manual_seed(1)
    small = Transformer(Size(5, dim=8, heads=2, layers=1, length=4)).eval()
    for p in small.parameters(): p.data *= 4
    items = [Example([1, a, b]) for a in range(5) for b in range(5)]
    assert abs(np.exp(likelihood(small, items)).sum() - 1) < 1e-5


@pytest.mark.parametrize("early", [0, 1])
def test_pseudo_likelihood_by_hand(model, early):
    "One token hidden at a time, both sides read, one forward each; a shifted model answers one place early."
    e, want = Example([1, 20, 30, 40, 2], [False, True, True, True, False]), 0.
    for t in (1, 2, 3):
        ids = list(e.ids); ids[t] = 3
        b = collate([Example(ids)])
        with torch.no_grad(): q = model.head(model(b.set(order=torch.zeros_like(b.order))))[0, t - early].log_softmax(-1)
        want += float(q[e.ids[t]])
    for batch in (1, 2, 32): assert np.allclose(pseudo_likelihood(model, [e, e], 3, batch, bool(early)), want, atol=1e-4)
    assert abs(pseudo_likelihood(model, [e], 3, shifted=not early)[0] - want) > .01  # negative control: the other place
    assert abs(likelihood(model, [e])[0] - want) > .1  # negative control: it is not the likelihood


def test_special_tokens_in_a_text_are_text(tok):
    assert encoded("<|eos|>", tok).count(tok.eos_token_id) == 1


def test_a_tie_is_not_right(tok):
    "A score that knows nothing gets 0, not a half; the control counts ties and does."
    nothing = lambda items: np.zeros(len(items))
    pairs = [("a", "b"), ("the sea", "the see")] * 5
    assert minimal_pairs(nothing, tok, pairs).sum() == 0
    assert np.mean([s[0] >= s[1] for s in nothing(pairs * 2).reshape(-1, 2)]) == 1
    longer = lambda items: np.array([float(len(e)) for e in items])
    assert minimal_pairs(longer, tok, [("the sea was", "sea"), ("sea", "the sea was")]).tolist() == [1, 0]
    barely = lambda items: -30 + np.arange(len(items), 0, -1) * 1e-6  # rounding: no sign of knowledge
    assert minimal_pairs(barely, tok, pairs).sum() == 0 and choose(barely, tok, "the", [" sea", " was"]) is None


def test_choose(model, tok):
    "The highest sum over the choice alone; per byte; a tie is nobody's; the prompt's own probability plays no part."
    score = partial(likelihood, model)
    options = [" was", " sea", " ship was calm"]
    start = encoded("the", tok)[:-1]
    sums = []
    for o in options:
        ids = start + encoded(o, tok)[1:-1]
        with torch.no_grad(): q = model.head(model(collate([Example(ids)])))[0].log_softmax(-1)  # (T,V)
        sums.append(sum(float(q[t - 1, ids[t]]) for t in range(len(start), len(ids))))
    assert choose(score, tok, "the", options) == int(np.argmax(sums))
    assert choose(score, tok, "the", options, per_byte=True) == int(np.argmax([s / len(o) for s, o in zip(sums, options, strict=True)]))
    assert choose(score, tok, "the", [" sea", " sea"]) is None
    with pytest.raises(ValueError, match="at least a token"): choose(score, tok, "the", ["", "a"])


def test_exact_match():
    said = ["The  Sea!", "a sea", "seas", "12.", ""]
    assert exact_match(said, ["sea", "the sea", "sea", "12", "the"]).tolist() == [1, 1, 0, 1, 1]
    with pytest.raises(ValueError): exact_match(["a"], [])


# ---- over seeds

@pytest.mark.parametrize("n", range(2, 12))
def test_over_seeds_is_students_t(n):
    "Between the bounds lie 95 % of Student's density with n-1 degrees, to 1e-4; a normal's 1.96, the control, holds less."
    x = np.random.default_rng(n).normal(size=n)
    mean, low, high = over_seeds(x)
    def inside(t):
        at, v = np.linspace(-t, t, 200_001), n - 1
        whole = math.sqrt(v * math.pi) * math.gamma(v / 2) / math.gamma((v + 1) / 2)
        return np.trapezoid((1 + at**2 / v) ** (-(v + 1) / 2), at) / whole
    error = x.std(ddof=1) / math.sqrt(n)
    assert abs(mean - x.mean()) < 1e-12 and abs((high - mean) - (mean - low)) < 1e-12
    assert abs(inside((high - mean) / error) - .95) < 1e-4 and inside(1.96) < .925


def test_versus_pairs_by_seed():
    "Arms are paired by seed whatever the order of the rows; two rows of a seed, and none, are refused."
    rows = [{"arm": a, "seed": s, "bits": s + (a == "b") * .5} for s, a in [(2, "a"), (0, "b"), (1, "a"), (2, "b"), (1, "b"), (0, "a")]]
    assert of_arm(rows, "b", "bits") == [.5, 1.5, 2.5] and versus(rows, "b", "a", "bits") == (.5, .5, .5)
    assert over_seeds([3.]) == (3., -np.inf, np.inf)
    for wrong in rows + rows[:1], []:
        with pytest.raises(ValueError, match="one 'bits' a seed"): of_arm(wrong, "a", "bits")


# ---- the unit of an interval

def test_coverage_of_the_interval():
    """400 simulated corpora of 20 documents of unequal lengths that differ in difficulty: the interval over documents
    holds the truth about as often as it says; the one over rows, the control, in far fewer cases."""
    dice = np.random.default_rng(0)
    held = np.zeros(2)
    for k in range(400):
        n = dice.integers(5, 40, 20)
        bits = [2 + .1 * dice.normal() + .1 * dice.normal(size=m) for m in n]
        for i, (x, size) in enumerate(((np.array([b.sum() for b in bits]), n), (np.concatenate(bits), None))):
            _, low, high = interval(x, size, draws=300, seed=k)
            held[i] += low <= 2 <= high
    assert held[0] / 400 > .88 and held[1] / 400 < .65, held


def test_few_documents_are_shown_one_by_one(tok, model, pages):
    "Nine documents have no interval and are listed; ten have one, which is over documents."
    from lmtrain.evaluate import between, bits_interval, document_bits, row_bits
    rows = examples(pages[:10], tok, 64)
    bits, sizes = document_bits(model, rows)
    assert len(bits) == 10 and bits.sum() == pytest.approx(row_bits(model, rows).sum()) and sizes.sum() == pytest.approx(rows.nbytes)
    assert bits_interval(model, rows) == pytest.approx(interval(bits, sizes)) and " to " in between(bits, sizes)
    few = examples(pages[:9], tok, 64)
    mean, low, high = bits_interval(model, few)
    assert math.isnan(low) and math.isnan(high) and mean == pytest.approx(bits[:9].sum() / sizes[:9].sum(), rel=1e-5)
    told = between(bits[:2], sizes[:2])
    assert told == f"2 documents are too few for an interval: {bits[0] / sizes[0]:.3f}, {bits[1] / sizes[1]:.3f}"


@pytest.mark.parametrize("right, n, level", [(0, 10, .95), (10, 10, .95), (3, 7, .9), (512, 1000, .99)])
def test_interval_of_a_share(right, n, level):
    "As scipy has it; a share that is none is refused."
    from scipy.stats import binomtest
    want = binomtest(right, n).proportion_ci(level, method="wilson")
    assert wilson(right, n, level) == pytest.approx((right / n, want.low, want.high), abs=1e-12)
    for wrong in ((3, 2), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="no share"): wilson(*wrong)
