"""The columns of a batch against their definitions: collate, Batch, sees, check, Noise."""
import itertools
import math
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, strategies as st

from lmtrain.batch import Batch, Columns, Example, Noise, collate, first_fit, lay, mix, sees

COLUMNS = [f.name for f in fields(Columns) if f.name != "extra" and not f.name.startswith("_")]
PAD = 99


@st.composite
def example(draw, longest=7):
    n = draw(st.integers(1, longest))
    ids = draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))
    answer = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    return Example(ids, answer, {"word": draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))})


@st.composite
def batch(draw):
    "Any columns at all: documents in runs, any order, any weights, sometimes private tokens."
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    def column(values): return torch.tensor(draw(st.lists(
        st.lists(values, min_size=T, max_size=T), min_size=B, max_size=B)))  # (B,T)
    long = st.integers(0, 5)
    b = Batch(column(long), column(long), column(st.integers(0, 2)), column(long), column(st.booleans()),
              column(long), column(st.sampled_from([0., 0., 1., -2., .5])), column(long),
              torch.arange(B), torch.arange(B), {"word": column(long), "reward": torch.rand(B)})
    return b.with_extra(private=column(st.booleans())) if draw(st.booleans()) else b


# ---- collate

def facts(b):
    "What the batch says of each real token, counted: (example, place, token, clean, answer, word)."
    real = b.doc > 0                                                                   # (B,T)
    columns = b.index, b.doc_pos, b.ids, b.clean, b.answer, b.extra["word"]
    return Counter(zip(*(c[real].tolist() for c in columns), strict=True))


def wanted(examples):
    "The same of the examples themselves."
    return Counter((i, p, t, t, e.answer[p] if e.answer else True, e.tokens["word"][p])
                   for i, e in enumerate(examples) for p, t in enumerate(e.ids))


@given(st.lists(example(), min_size=1, max_size=8), st.booleans(), st.integers(0, 3))
def test_every_token_once(examples, pack, room):
    "Each token of each example lies in the batch exactly once, with its facts."
    b = collate(examples, max(map(len, examples)) + room, pack, PAD)
    assert facts(b) == wanted(examples)


@pytest.mark.parametrize("column", ["ids", "clean", "doc", "answer", "index", "word"])
def test_control_every_token_once(column):
    "The test above notices any one column moved by one place."
    examples = [Example([1, 2, 3], [False, True, True], {"word": [1, 2, 3]}),
                Example([4, 5], None, {"word": [4, 5]})]
    b = collate(examples, 6, pack=True)
    c = b.extra["word"] if column == "word" else getattr(b, column)
    moved = c.roll(1, 1)                                                               # (B,T)
    assert facts(b) == wanted(examples)
    broken = b.with_extra(word=moved) if column == "word" else b.set(**{column: moved})
    assert facts(broken) != wanted(examples)


@given(st.lists(example(), min_size=1, max_size=8), st.booleans(), st.integers(0, 3))
def test_layout(examples, pack, room):
    "Documents are numbered 1, 2, .. side by side; padding is last, has doc 0, index -1, and is not asked."
    T = max(map(len, examples)) + room
    b = collate(examples, T, pack, PAD)
    for doc in b.doc.tolist():
        runs = [d for d, _ in itertools.groupby(doc)]
        assert [d for d in runs if d] == list(range(1, max(doc) + 1)) and 0 not in runs[:-1]
        assert pack or max(doc) == 1
    padding = b.doc == 0                                                               # (B,T)
    assert ((b.index == -1) == padding).all()
    assert (b.ids[padding] == PAD).all() and not b.answer[padding].any()
    assert not b.weights.any() and not b.targets.any() and b.ids.shape[1] == T
    assert (b.order == torch.arange(T)).all()


@given(st.lists(st.lists(example(), min_size=1, max_size=3), min_size=1, max_size=5), st.booleans())
def test_items_and_roles(items, named):
    "Rows of an item share its number; roles count them, or are what `facts` says."
    if named:
        items = [[replace(e, facts={"role": 7 - k, "reward": .5}) for k, e in enumerate(i)] for i in items]
    b = collate(items)
    assert b.item.tolist() == [n for n, i in enumerate(items) for _ in i]
    assert b.role.tolist() == [7 - k if named else k for i in items for k in range(len(i))]
    assert facts(b) == wanted([e for i in items for e in i])
    assert "role" not in b.extra and ("reward" in b.extra) == named


def test_empty():
    "No examples make a batch of no rows."
    b = collate([])
    assert len(b) == 0 and b.loss_positions.numel() == 0 and b.is_causal


@pytest.mark.parametrize("values", [[1, .5], [.5, 1], [0, 1], [True, False]])
def test_fact_values(values):
    "A row fact has the value that was given, also where the first is an int and a later one a float."
    b = collate([Example([1], facts={"reward": v}) for v in values])
    assert b.extra["reward"].tolist() == values


# ---- packing

def fewest(lengths, T):
    "The fewest rows of T that hold the lengths, by trying every way."
    def place(rest, rooms):
        if not rest: return len(rooms)
        ways = [place(rest[1:], rooms[:k] + [r - rest[0]] + rooms[k + 1:])
                for k, r in enumerate(rooms) if r >= rest[0] and r not in rooms[:k]]
        return min([*ways, place(rest[1:], [*rooms, T - rest[0]])])
    return place(sorted(lengths, reverse=True), [])


def next_fit(lengths, T):
    "Broken on purpose: only ever looks at the newest row."
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not rows or sum(lengths[j] for j in rows[-1]) + lengths[i] > T: rows.append([])
        rows[-1].append(i)
    return rows


def tight(rows, lengths):
    "No two rows would fit into one: what first fit guarantees."
    total = [sum(lengths[i] for i in r) for r in rows]
    return all(a + b > 10 for a, b in itertools.combinations(total, 2))


@given(st.lists(st.integers(1, 10), max_size=7))
def test_first_fit(lengths):
    "Each once, within T, no two rows could be one, at most 1.7 times the fewest rows. Dosa and Sgall (2014)."
    rows = first_fit(lengths, 10)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert all(r and sum(lengths[i] for i in r) <= 10 for r in rows)
    assert tight(rows, lengths) and len(rows) <= 1.7 * fewest(lengths, 10)


def test_control_first_fit():
    "A packer that looks at the newest row only leaves two rows that would fit into one."
    lengths = [6, 6, 4, 4]
    assert tight(first_fit(lengths, 10), lengths) and len(first_fit(lengths, 10)) == 2 == fewest(lengths, 10)
    assert not tight(next_fit(lengths, 10), lengths)


# ---- Batch

def columns(b): return {n: getattr(b, n) for n in COLUMNS} | b.extra


@given(batch(), st.data())
def test_rows(b, data):
    "Choosing rows commutes with reading a column, and what is derived follows the rows."
    rows = data.draw(st.just(slice(1, None)) | st.lists(st.integers(0, len(b) - 1), max_size=4))
    b.loss_positions, b.is_causal  # noqa: B018  found first, so that a stale copy would show
    some = b[rows]
    assert columns(some).keys() == columns(b).keys()
    assert all(torch.equal(c, columns(b)[n][rows]) for n, c in columns(some).items())
    assert torch.equal(some.sees, b.sees[rows]) and torch.equal(some.doc_pos, b.doc_pos[rows])
    assert torch.equal(some.loss_positions, asked(some.weights)) and some.is_causal == causal(some)


@pytest.mark.parametrize("name", COLUMNS)
@given(b=batch())
def test_set(name, b):
    "`set` replaces one column and keeps every other object; what is derived is found again."
    b.loss_positions, b.is_causal  # noqa: B018
    c = columns(b)[name].flip(0).roll(1, -1)
    new = b.set(**{name: c})
    assert columns(new)[name] is c and all(columns(new)[n] is columns(b)[n] for n in columns(b) if n != name)
    assert torch.equal(new.loss_positions, asked(new.weights)) and new.is_causal == causal(new)


def test_control_set():
    "Replacing a column behind `set`'s back leaves a stale `asked` and `is_causal`: the tests above see that."
    b = collate([Example([1, 2, 3])]); b.loss_positions, b.is_causal  # noqa: B018
    stale = replace(b, weights=torch.ones(1, 3), order=torch.zeros(1, 3, dtype=torch.long))
    assert not torch.equal(stale.loss_positions, asked(stale.weights)) and stale.is_causal != causal(stale)


@pytest.mark.parametrize("name", ["attention_mask", "sees", "pos", "word", "_loss_positions", "extra"])
def test_set_refuses(name):
    "`set` takes nothing but the name of a column."
    b = collate([Example([1])])
    with pytest.raises(TypeError, match=f"{name}: not a column"): b.set(**{name: torch.zeros(1, 1)})


def test_with_extra():
    "`with_extra` adds, keeps what was there, refuses a main column; `pos` and `private` take effect at once."
    b = collate([Example([1, 2, 3], tokens={"word": [0, 0, 1]})]); b.is_causal  # noqa: B018
    pos = torch.tensor([[5, 6, 7]])                                                    # (B,T)
    new = b.with_extra(pos=pos, private=torch.tensor([[True, False, False]]))
    assert torch.equal(new.pos, pos) and torch.equal(new.doc_pos, b.pos)
    assert new.extra["word"] is b.extra["word"] and b.is_causal and not new.is_causal
    assert new.sees[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    with pytest.raises(TypeError, match="order"): b.with_extra(order=pos)


@given(batch())
def test_to_keeps_what_it_found(b):
    "On a device `asked` and `is_causal` are carried, not computed: shown on one that holds no values."
    there = b.to("cpu")
    assert torch.equal(there.loss_positions, asked(b.weights)) and there.is_causal == causal(b)
    assert all(torch.equal(c, columns(b)[n]) for n, c in columns(there).items())
    blind = b.to("meta")
    assert blind.is_causal == causal(b) and blind.loss_positions.shape == b.loss_positions.shape and blind.loss_positions.is_meta


def test_control_to_keeps():
    "Columns that only move must ask the device, and fail on one without values."
    with pytest.raises((RuntimeError, NotImplementedError)):
        collate([Example([1, 2])]).each(lambda c: c.to("meta")).is_causal  # noqa: B018


# ---- asked, is_causal, sees

def asked(weights):
    "The definition: flat places with weight, then -1 up to a multiple of 128."
    flat = [k for k, w in enumerate(weights.flatten().tolist()) if w != 0]
    return torch.tensor(flat + [-1] * (-len(flat) % 128), dtype=torch.long)            # (N,)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 256])
def test_asked(n):
    "Exactly the places with weight, negative ones too, filled to a multiple of 128 and no further."
    w = torch.zeros(4 * 80).index_fill(0, torch.randperm(320)[:n], -.5).view(4, 80)    # (B,T)
    b = collate([Example([1] * 80)] * 4).set(weights=w)
    assert torch.equal(b.loss_positions, asked(w)) and len(b.loss_positions) == {0: 0, 129: 256, 256: 256}.get(n, 128)


def causal(b):
    "The definition: no private tokens, padding last, one document, and real tokens see a lower triangle."
    if "private" in b.extra: return False
    def row(doc, seen):
        n = int((doc > 0).sum())
        triangle = torch.ones(n, n).tril().bool()
        return bool((doc[:n] > 0).all() and (doc[:n] == doc[:1]).all() and (seen[:n, :n] == triangle).all())
    return all(row(d, s) for d, s in zip(b.doc, b.sees, strict=True))


def every_pattern(T=3):
    "Every batch of one row with documents and orders among 0, 1, 2."
    row = collate([Example([1] * T)])
    for doc in itertools.product(range(3), repeat=T):
        for order in itertools.product(range(3), repeat=T):
            yield row.set(doc=torch.tensor([doc]), order=torch.tensor([order]))


def test_is_causal():
    "All 729 patterns of three tokens agree with the definition; so do two rows together."
    all_of_them = list(every_pattern())
    assert [b.is_causal for b in all_of_them] == [causal(b) for b in all_of_them]
    assert {b.is_causal for b in all_of_them} == {True, False}
    yes, no = (next(b for b in all_of_them if b.is_causal == v) for v in (True, False))
    both = yes.each(lambda c: c.expand(2, *c.shape[1:]).clone())
    assert both.is_causal
    for n in 0, 1:
        doc, order = both.doc.clone(), both.order.clone()
        doc[n], order[n] = no.doc[0], no.order[0]
        assert not both.set(doc=doc, order=order).is_causal


def test_control_is_causal():
    "Without the rule that padding is last, left-padded rows would take the fast path: the enumeration tells."
    def careless(b):
        one = (b.doc == b.doc.amax(1, True)) | (b.doc == 0)                            # (B,T)
        return bool(one.all() and (b.order.diff() > 0).all())
    wrong = [b for b in every_pattern() if careless(b) and not causal(b)]
    assert [0, 1, 1] in [b.doc[0].tolist() for b in wrong]


def loop(b, le=lambda i, j: i <= j):
    "The definition of `sees`, one pair at a time."
    B, T = b.ids.shape
    private = b.extra.get("private", torch.zeros(B, T, dtype=torch.bool))              # (B,T)
    def may(n, i, j):
        here, there = b.order[n, i].item(), b.order[n, j].item()
        return b.doc[n, i] == b.doc[n, j] and le(there, here) and (not private[n, j] or there == here)
    return torch.tensor([[[bool(may(n, i, j)) for j in range(T)] for i in range(T)] for n in range(B)])


@given(batch())
def test_sees(b):
    "Equal to the definition for any documents, orders and private tokens, also when asked of some queries."
    assert torch.equal(b.sees, loop(b))
    late = b.each(lambda c: c[:, -1:] if c.ndim > 1 else c)
    assert torch.equal(sees(late, b), loop(b)[:, -1:])


@given(batch())
def test_control_sees(b):
    "A strict order, which hides a token from itself, is never taken for the definition."
    assert not torch.equal(b.sees, loop(b, lambda i, j: i < j))


def test_control_private():
    "Forgetting the private column is seen."
    b = collate([Example([1, 2, 3])]).with_extra(private=torch.tensor([[True, False, True]]))
    plain = replace(b, extra={})
    assert torch.equal(b.sees, loop(b)) and not torch.equal(plain.sees, loop(b))


# ---- check

FAULTS = {
    "example 1 has no tokens: leave it out": [[Example([1]), Example([])], {}],
    "example 0 has 3 tokens, rows have 2: cut it": [[Example([1, 2, 3])], {"T": 2}],
    "example 40 has 3 tokens": [[Example([1, 2, 3], index=40)], {"T": 2}],
    "answer has 1 values for 2 tokens": [[Example([1, 2], [True])], {}],
    "word has 3 values for 2 tokens": [[Example([1, 2], tokens={"word": [1, 2, 3]})], {}],
    r"\['order'\] is the name of another column": [[Example([1], tokens={"order": [1]})], {}],
    r"\['index'\] is the name of another column": [[Example([1], facts={"index": 1})], {}],
    r"\['a'\] is the name of another column": [[Example([1], tokens={"a": [1]}, facts={"a": 1})], {}],
    r"has tokens \[\], the first \['word'\]": [[Example([1], tokens={"word": [1]}), Example([1])], {}],
    r"has facts \['label'\], the first \[\]": [[Example([1]), Example([1], facts={"label": 1})], {}],
    "row facts .label.: pack=True would lose them": [[Example([1], facts={"label": 1})], {"pack": True}],
    "several examples cannot share rows": [[[Example([1]), Example([2])]], {"pack": True}],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    "Each fault is refused by name, with the remedy."
    items, options = FAULTS[fault]
    with pytest.raises(ValueError, match=fault): collate(items, **options)


def test_empty_answer():
    "An answer of no values is a fault like any other wrong length, not a wish to be asked about everything."
    with pytest.raises(ValueError, match="answer has 0 values for 2 tokens"): collate([Example([1, 2], [])])


def test_control_faults():
    "Without `check` such batches are built, and wrong: the missing word is read from the next example."
    b = lay([[Example([1, 2], [True]), Example([3], [False, True])]], 3)
    assert b.answer.tolist() == [[True, False, True]]


# ---- Noise

def by_token(u, b):
    "The numbers of the real tokens, by example and place."
    real = b.doc > 0                                                                   # (B,T)
    keys = zip(b.index[real].tolist(), b.doc_pos[real].tolist(), strict=True)
    return dict(zip(keys, u[real].tolist(), strict=True))


def layouts(examples):
    "The same examples under several sizes of batch, orders, packings and paddings: lists of batches."
    backwards = examples[::-1]
    yield [collate(examples)]
    yield [collate([e]) for e in examples]
    yield [collate(backwards[:3], 9), collate(backwards[3:], 13, pad=7)]
    yield [collate(examples, 12, pack=True)]
    yield [collate(backwards, 30, pack=True)]


def drawn(f, examples):
    "What `f(b)` gives each token under each layout."
    return [{k: v for b in bs for k, v in by_token(f(b), b).items()} for bs in layouts(examples)]


NOISES = {"token": lambda n: n, "document": lambda n: n.doc}
SOME = [Example(list(range(1, 2 + n % 8)), index=10 * n + 3) for n in range(12)]


@pytest.mark.parametrize("kind", NOISES)
def test_noise_ignores_layout(kind):
    "A token's number is the same under any batch size, packing, padding and order of rows."
    first, *others = drawn(lambda b: NOISES[kind](Noise(3, 2))(b, draw=1), SOME)
    assert len(first) == sum(map(len, SOME)) and all(o == first for o in others)
    assert len({*first.values()}) == (len(first) if kind == "token" else len(SOME))


def test_control_noise_ignores_layout():
    "Numbers from a generator change with every layout."
    def generated(b): return torch.rand(b.ids.shape, generator=torch.Generator().manual_seed(0))  # (B,T)
    first, *others = drawn(generated, SOME)
    assert all(sum(o[k] == first[k] for k in first) < len(first) / 2 for o in others)


def test_row_noise():
    "A row's number follows the example that begins it, not the row's place."
    one, two = collate(SOME, 20), collate(SOME[::-1], 9)
    u = Noise(1).row(one)                                                              # (B,)
    assert torch.equal(u, Noise(1).row(two).flip(0)) and len(u.unique()) == len(SOME)


def whole(n=256, T=512):
    "n full rows of T tokens."
    b = collate([Example([0])] * n)
    return b.each(lambda c: c.expand(n, T) if c.ndim > 1 else c).set(doc=torch.ones(n, T, dtype=torch.long))


def gap(u):
    "Kolmogorov and Smirnov: the largest distance from the uniform distribution."
    u = u.flatten().double().sort().values; n = len(u)
    k = torch.arange(1, n + 1)
    return max((k / n - u).max(), (u - (k - 1) / n).max()).item()


def bound(n, error=1e-9):
    "What the distance of n uniform numbers exceeds with probability `error`. Massart (1990)."
    return math.sqrt(math.log(2 / error) / (2 * n))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs().item()


@pytest.mark.parametrize("seed", [0, 1, -7])
def test_noise_is_uniform(seed):
    "Within Massart's bound (error 1e-9 a line) over tokens, documents, rows; no number reaches 1."
    b = whole()
    many = whole(20000, 1)
    u = Noise(seed, 3)(b)                                                              # (B,T)
    assert gap(u) < bound(u.numel()) and 0 <= u.min() and u.max() < 1
    assert gap(Noise(seed).doc(many)) < bound(20000) and gap(Noise(seed).row(many)) < bound(20000)
    first = torch.stack([Noise(seed, e)(b[:1], d)[0, 0] for e in range(40) for d in range(40)])  # (1600,)
    assert gap(first) < bound(1600)


def test_control_uniform():
    "The bound notices numbers raised to the power 31/30: at most .012 off."
    b = whole()
    assert bound(b.ids.numel()) < gap(Noise()(b) ** (31 / 30)) < .03


def test_noise_is_uncorrelated():
    "Neighbours in place, example, draw, epoch and seed: below six standard errors, 2e-9 each."
    b = whole()
    u, limit = Noise(5, 1)(b), 6 / math.sqrt(b.ids.numel() * .98)
    for lag in 1, 2, 3, 8:
        assert correlation(u[:, lag:], u[:, :-lag]) < limit and correlation(u[lag:], u[:-lag]) < limit
    for other in Noise(5, 1)(b, 1), Noise(5, 1)(b, 2), Noise(5, 2)(b), Noise(6, 1)(b), Noise(1, 5)(b):
        assert correlation(u, other) < limit


def test_control_uncorrelated():
    "A congruence instead of the hash is caught."
    b = whole()
    weak = ((b.index * 7919 + b.doc_pos * 104729) % 2**24) / 2**24                       # (B,T)
    assert correlation(weak[:, 1:], weak[:, :-1]) > .9


def test_noise_nests():
    "What is hidden at a lower rate is hidden at every higher one; the share is the rate (six errors)."
    b = whole(64)
    hidden = [Noise(2)(b) < rate for rate in (.1, .15, .5, .9)]                        # (B,T) each
    assert all((low <= high).all() for low, high in itertools.pairwise(hidden))
    for h, rate in zip(hidden, (.1, .15, .5, .9), strict=True):
        assert abs(h.float().mean() - rate) < 6 * math.sqrt(rate * (1 - rate) / h.numel())


def test_control_nests():
    "A generator that draws anew for each rate does not nest."
    low, high = torch.rand(64, 512) < .1, torch.rand(64, 512) < .5                     # (B,T)
    assert not (low <= high).all()


def imul(a, b):
    "JavaScript's Math.imul, by its definition: low halves and one cross product."
    low, cross = (a & 0xFFFF) * (b & 0xFFFF), (a >> 16) * (b & 0xFFFF) + (a & 0xFFFF) * (b >> 16)
    return (low + ((cross & 0xFFFF) << 16)) & 0xFFFFFFFF


def mix_js(h):
    h = imul(h ^ h >> 16, 0x7FEB352D)
    h = imul(h ^ h >> 15, 0x846CA68B)
    return h ^ h >> 16


@given(st.integers(0, 2**32 - 1))
def test_mix(h):
    "The hash is the same for a number, for a tensor, and in JavaScript's arithmetic."
    assert mix(h) == mix(torch.tensor([h]))[0] == mix_js(h)


@given(st.integers(-2**31, 2**31), st.integers(0, 9), st.integers(0, 2**32 - 1), st.integers(0, 600),
       st.integers(0, 9))
def test_noise_in_javascript(seed, epoch, index, place, draw):
    "A token's number can be drawn again from five integers, outside PyTorch."
    h = mix_js(mix_js(mix_js(seed + 0x9E3779B9 & 0xFFFFFFFF) ^ epoch) ^ draw)
    want = (mix_js(mix_js(index ^ h) ^ imul(place, 0x9E3779B1)) >> 8) / 2**24
    assert Noise(seed, epoch).at(torch.tensor([index]), torch.tensor([place]), draw).item() == want


def test_mix_is_one_to_one():
    "No two of a million neighbouring numbers collide; with a factor of 2**16 they would."
    h = torch.arange(2**20)                                                            # (N,)
    assert len(mix(h).unique()) == len(h)
    assert len(((h * 0x7FEB0000) & 0xFFFFFFFF).unique()) < len(h)
