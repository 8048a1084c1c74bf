"""Caches, the canvas and the fast path say the same as one full reading, and as transformers."""
import itertools

import pytest
import torch

from lmtrain.batch import Example, collate
from lmtrain.generation import blocks, confident, fill, generate, left_to_right, random_order
from lmtrain.model import Cache, Size, Transformer, to_transformers


def model_of(vocab=20, kv=1):
    torch.manual_seed(0)
    model = Transformer(Size(vocab, dim=32, heads=2, kv_heads=kv, layers=2, length=32)).eval()
    for p in model.parameters(): p.data *= 6
    return model


def pattern(orders, docs):
    b = collate([Example([(7 * r + 3 * t) % 20 for t in range(8)]) for r in range(len(orders))])
    b = b.set(order=torch.tensor(orders), doc=torch.tensor(docs))
    return b.with_extra(pos=b.pos)


PATTERNS = {  # each may be cut where no earlier token sees a later one
    "causal": (pattern([[*range(8)]] * 2, [[1] * 8] * 2), [1, 3, 5, 7]),
    "prefix": (pattern([[0, 0, 0, 1, 2, 3, 4, 5]], [[1] * 8]), [3, 4, 7]),
    "padded": (pattern([[*range(8)]] * 2, [[1] * 5 + [0] * 3, [0, 0] + [1] * 6]), [1, 2, 4, 6]),
    "two documents": (pattern([[*range(8)]] * 2, [[1] * 3 + [2] * 5, [1] * 6 + [2] * 2]), [2, 4, 6]),
    "blocks": (pattern([[0, 0, 1, 1, 2, 2, 3, 3]], [[1] * 8]), [2, 4, 6]),
    "a document read both ways, then text": (pattern([[0, 0, 0, 0, 1, 2, 3, 4]], [[1] * 8]), [4, 5]),
}


@torch.no_grad()
def in_parts(model, b, cuts):
    "Hidden states of a batch read through a cache in parts."
    cache, ends = Cache(), [0, *cuts, b.ids.shape[1]]
    part = lambda s, e: b.each(lambda c: c[:, s:e] if c.ndim > 1 else c)
    return torch.cat([model(part(s, e), cache) for s, e in itertools.pairwise(ends)], 1)  # (B,T,D)


@pytest.mark.parametrize("name", PATTERNS)
def test_cached_is_full(name):
    "Every way to cut each pattern gives the hidden states of one reading; grouped keys included."
    b, cuts = PATTERNS[name]
    for kv in (1, 2):
        model = model_of(kv=kv)
        with torch.no_grad(): full = model(b)                                          # (B,T,D)
        for n in range(1, len(cuts) + 1):
            for some in itertools.combinations(cuts, n):
                assert (in_parts(model, b, some) - full)[b.doc > 0].abs().max() < 1e-4


def test_a_cache_without_columns_is_caught():
    "Negative control: keys and values alone, every earlier token visible, is wrong for documents and padding."
    class Blind(Cache):
        def mask(self, b):
            super().mask(b.set(doc=torch.ones_like(b.doc)))
            return torch.ones(len(b), 1, b.ids.shape[1], self.columns.ids.shape[1], dtype=torch.bool).tril(
                self.columns.ids.shape[1] - b.ids.shape[1])
    model = model_of()
    for name, right in {"causal": True, "two documents": False, "padded": False}.items():
        b, cuts = PATTERNS[name]
        cache, parts = Blind(), []
        with torch.no_grad():
            for s, e in itertools.pairwise([0, *cuts, 8]):
                parts.append(model(b.each(lambda c, s=s, e=e: c[:, s:e] if c.ndim > 1 else c), cache))
            far = (torch.cat(parts, 1) - model(b))[b.doc > 0].abs().max()
        assert (far < 1e-4) == right, name


def test_a_cache_needs_positions():
    cache, b = Cache(), collate([Example([1, 2])])
    model_of()(b, cache)
    with pytest.raises(ValueError, match="extra..pos"): model_of()(b, cache)


def test_three_ways_write_the_same():
    "Greedy: the canvas from left to right, the cached path, and transformers' own generate, for unequal prompts."
    model = model_of()
    theirs = to_transformers(model)
    for prompt in ([1], [1, 5, 6], [2, 3, 4, 5, 6, 7, 8]):
        ours = generate(model, [prompt, [9, 9]], 12, temperature=0).ids[0, :len(prompt) + 12]
        ids = torch.tensor([prompt + [0] * 12])                                        # (1,T)
        todo = torch.arange(len(prompt) + 12)[None] >= len(prompt)                     # (1,T)
        t = fill(model, ids, todo, 0, left_to_right, shifted=True)
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(ours, t.ids[0]) and torch.equal(ours, want[0])
        fast = generate(model, [prompt, [9, 9]], 12, temperature=0)
        assert t.when[0, len(prompt):].tolist() == list(range(1, 13)) == fast.when[0, len(prompt):len(prompt) + 12].tolist()
        assert torch.equal(t.p > 0, torch.ones_like(todo))


def test_picks_cover_the_canvas():
    "Every pick writes each empty place once and no other; how many steps it takes, by count."
    model = model_of()
    ids = torch.tensor([[1, 0, 5, 0, 0, 0, 0, 7], [1, 2, 3, 4, 0, 0, 6, 7]])           # (2,8)
    todo = ids == 0                                                                    # (2,8)
    steps = {left_to_right: 5, confident(1): 5, confident(2): 3, confident(9): 1, random_order(): 5}
    for pick, n in [*steps.items(), (blocks(4, confident(9)), 2), (blocks(2, left_to_right), 5)]:
        t = fill(model, ids, todo, 19, pick)
        assert torch.equal(t.ids[~todo], ids[~todo]) and (t.when[~todo] == 0).all() and (t.p[~todo] == 1).all()
        assert (t.when[todo] > 0).all() and int(t.when.max()) == n
    order = fill(model, ids, todo, 19, blocks(2, random_order(3))).when[0]
    assert order[1] < order[3] < order[4:6].min() and order[4:6].max() < order[6]


def test_confident_takes_the_surest():
    p, todo = torch.tensor([[.9, .2, .8, .5]]), torch.tensor([[False, True, True, True]])
    assert confident(1)(p, todo).tolist() == [[False, False, True, False]]
    assert confident(2)(p, todo).tolist() == [[False, False, True, True]]


def test_greedy_is_as_sure_as_the_model():
    "At temperature 0 the recorded probability is the model's, so `confident` writes the surest place first: by hand."
    model, ids = model_of(), torch.tensor([[1, 0, 5, 0, 0, 7]])                        # (1,6)
    todo = ids == 0                                                                    # (1,6)
    b = collate([Example([1, 19, 5, 19, 19, 7])])
    with torch.no_grad(): said = model.head(model(b.set(order=torch.zeros_like(ids))))[0]  # (T,V)
    p = said[:, :19].softmax(-1).amax(-1)  # without the mask, which is never written: (T,)
    t = fill(model, ids, todo, 19, confident(1))
    first = int((t.when[0] == 1).nonzero())
    assert first == int(p.masked_fill(~todo[0], -1).argmax()) and abs(float(t.p[0, first] - p[first])) < 1e-5
    assert (generate(model, [[1]], 5, temperature=0).p[0, 1:] < 1).all()


def test_fill_at_the_place_or_before_it():
    "A masked model is asked at the place and reads both sides; a causal one before it. By hand, for one token."
    model, ids = model_of(), torch.tensor([[1, 5, 0, 7]])                              # (1,4)
    todo = ids == 0                                                                    # (1,4)
    b = collate([Example([1, 5, 19, 7])])
    with torch.no_grad():
        masked = model.head(model(b.set(order=torch.zeros_like(ids))))[0, 2].argmax()
        causal = model.head(model(b))[0, 1].argmax()
    assert fill(model, ids, todo, 19, left_to_right).ids[0, 2] == masked
    assert fill(model, ids, todo, 19, left_to_right, shifted=True).ids[0, 2] == causal


def test_faults_of_fill():
    model, ids = model_of(), torch.tensor([[1, 0]])
    with pytest.raises(ValueError, match="first token"): fill(model, ids, torch.tensor([[True, True]]), 0, left_to_right, shifted=True)
    with pytest.raises(ValueError, match="no position"): fill(model, ids, ids == 0, 0, lambda p, todo: todo & False)
