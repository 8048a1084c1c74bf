"""GRIT: two tasks in one batch are what they are apart, and a cache is exact for the mask under which its text was read."""
import copy

import pytest
import torch
import torch.nn.functional as F
from test_retrieval import TOK, gradient, items, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmtrain.batch import Example, Noise, collate
from lmtrain.finetuning.economics import Cost
from lmtrain.loader import Loader
from lmtrain.model import Cache, rotations, to_transformers
from lmtrain.objective import CLM, logp
from lmtrain.retrieval.embed import InfoNCE, both_ways, embed, mean
from lmtrain.retrieval.grit import GRIT, PrefixReader, RagCache, beside, found_rows, prefix_order, written_row
from lmtrain.train import Trainer

V, L, Q = len(TOK), (9, 5, 12, 1), (4, 6, 3, 5)


def written(n: int, T: int = 14) -> list[list[Example]]:
    "Rows of several lengths with a prompt of four tokens, an item each."
    g = torch.Generator().manual_seed(n)
    return [[written_row(Example(torch.randint(10, V, (T - i % 5,), generator=g).tolist(), [False] * 4 + [True] * (T - i % 5 - 4)))] for i in range(n)]


def texts(*lengths: int, seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    return [Example(torch.randint(10, V, (n,), generator=g).tolist()) for n in lengths]


def value(o, m, rows) -> torch.Tensor:
    b = o.corrupt(collate(rows), Noise())
    return o.loss(m, b)["write"] / o.count(b)["write"]


# ---- one batch, two tasks

def test_rows_of_both_kinds_in_one_batch():
    "Embedded rows are read both ways, written ones are not; losses and counts are those of two batches; hidden states are transformers'."
    m, o = tiny().double(), GRIT()
    b = o.corrupt(collate([*items(6), *written(8)]), Noise())
    h, last = m(b), (b.doc > 0).sum(1) - 1
    other = b.ids.clone(); other[torch.arange(len(b)), last] = 9
    moved = (m(b.set(ids=other)) - h).abs().amax(-1)[:, 0]
    assert (moved[b.role >= 0] > 0).all() and (moved[b.role < 0] == 0).all()
    one, two = InfoNCE().corrupt(collate(items(6)), Noise()), CLM().corrupt(collate(written(8)), Noise())
    got = o.loss(m, b)
    assert (got["grit"] - InfoNCE().loss(m, one)["infonce"]).abs() < 1e-10 and (got["write"] - CLM().loss(m, two)["clm"]).abs() < 1e-10
    assert int(o.count(b)["grit"]) == 6 and int(o.count(b)["write"]) == int(CLM().count(two)["clm"])
    mask = torch.zeros(b.sees.shape, dtype=torch.double).masked_fill(~b.sees, torch.finfo(torch.double).min)
    ref = to_transformers(m).double().model(b.ids, attention_mask=mask[:, None], position_ids=b.pos)[0]
    assert (ref - h)[b.doc > 0].abs().max() < 1e-5


def test_means_over_groups():
    "Over tokens, over rows, over groups of four: by hand; groups of all rows and of one are the two extremes; control: they differ."
    m, rows = tiny().double(), written(8)
    b = CLM().corrupt(collate(rows), Noise())
    per = [-logp(m, b)[i][b.weights[i] > 0] for i in range(8)]
    token, row = torch.cat(per).mean(), torch.stack([p.mean() for p in per]).mean()
    four = torch.stack([torch.cat(per[:4]).mean(), torch.cat(per[4:]).mean()]).mean()
    for sub, want in ((None, token), (8, token), (1, row), (4, four)): assert (value(GRIT(sub=sub), m, rows) - want).abs() < 1e-6
    assert (token - row).abs() > 1e-4
    even = [r for r in written(40) if len(r[0]) == 14]
    assert (value(GRIT(), m, even) - value(GRIT(sub=1), m, even)).abs() < 1e-6


def test_each_task_alone_is_the_plain_objective():
    "Gradients bit for bit."
    def run(o, rows):
        m = tiny()
        b = o.corrupt(collate(rows), Noise())
        t, c = o.loss(m, b), o.count(b)
        sum(t[n] / c[n].clamp(min=1) for n in t).backward()
        return gradient(m)
    assert torch.equal(run(GRIT(), written(8)), run(CLM(), written(8)))
    assert torch.equal(run(GRIT(weight=0), items(6)), run(InfoNCE(), items(6)))


def test_training_learns_both():
    o, m = GRIT(chunk=16, sub=4), tiny()
    h = Trainer(m, o, Loader([*items(36, 0), *written(24)], o, rows=24, T=48), lr=3e-3, steps=80, bf16=False).fit()
    assert h["grit"][-1] < .4 * h["grit"][0] and h["write"][-1] < h["write"][0] and m.causal


# ---- caches

def behind(h, first, n) -> torch.Tensor: return torch.cat([h[i, f:f + k] for i, (f, k) in enumerate(zip(first, n, strict=True))])


def whole(m, rows, order=None):
    b = collate(rows)
    b = b.with_extra(pos=b.doc_pos)
    return m(order(b) if order else b)


def far(x, y) -> float: return float((x - y).abs().max())


@pytest.mark.parametrize("batch", [slice(0, 1), slice(0, 2), slice(0, 4), slice(3, 4)])
def test_document_caches(batch):
    "Causal reading for the causal mask, both ways for the prefix mask, in 64 bits; controls: the other mask, positions that begin again."
    m, docs, asked = tiny().double().eval(), texts(*L)[batch], texts(*Q, seed=1)[batch]
    n, k = L[batch], Q[batch]
    both = [Example(d.ids + q.ids) for d, q in zip(docs, asked, strict=True)]
    causal = behind(whole(m, both), n, k)
    prefix = behind(whole(m, both, lambda b: prefix_order(b, torch.tensor(n))), n, k)
    c, _ = RagCache.read(m, docs)
    p, hidden = RagCache.read(m, docs, full=True)
    assert far(behind(m(c.behind(asked), c.reader()), [0] * len(n), k), causal) < 1e-12
    got = behind(m(p.behind(asked), p.reader()), [0] * len(n), k)
    assert far(got, prefix) < 1e-12 and (max(n) == 1 or far(got, causal) > 1e-3)
    wrong = p.behind(asked)
    wrong = wrong.with_extra(pos=wrong.doc_pos)
    assert far(behind(m(wrong, p.reader()), [0] * len(n), k), prefix) > 1e-3
    z = F.normalize(mean(hidden, p.columns.answer & (p.columns.doc > 0)), dim=-1)
    assert far(embed(m, both_ways(collate(docs))), z) < 1e-12                          # the same pass embeds
    which = [len(docs) - 1, 0, 0]
    r = found_rows(p, which)
    again = behind(m(r.behind([asked[i] for i in which]), r.reader()), [0] * 3, [k[i] for i in which])
    assert far(again, torch.cat([prefix.split(list(k))[i] for i in which])) < 1e-12


def test_padding_is_not_read():
    "Rows of unlike lengths; control: a cache whose padding counts as text is wrong in all rows but the longest."
    m, asked = tiny().double().eval(), texts(*Q, seed=1)
    p, _ = RagCache.read(m, texts(*L), full=True)
    b = p.behind(asked)
    ones = RagCache(p.columns.set(doc=torch.ones_like(p.columns.doc)), p.seen)
    moved = (m(b, p.reader()) - m(b, ones.reader())).abs().amax((1, 2))
    assert moved[2] < 1e-12 and (moved[[0, 1, 3]] > 1e-3).all()


@pytest.mark.parametrize("full", [False, True])
def test_two_texts_read_apart(full):
    "Exact for a mask in which neither reads the other, but for the rounding of angles in 32 bits; against a causal pass it is not."
    m, D, U, A = tiny().double().eval(), texts(*L), texts(*Q, seed=1), texts(3, 3, 3, 3, seed=2)
    (d, _), (q, _) = RagCache.read(m, D, full), RagCache.read(m, U, full)
    pair = beside(d, q, m.size.theta)
    got = behind(m(pair.behind(A), pair.reader()), [0] * 4, [3] * 4)
    rows = [Example(x.ids + y.ids + z.ids) for x, y, z in zip(D, U, A, strict=True)]
    b, first = collate(rows), [n + k for n, k in zip(L, Q, strict=True)]
    t, mask = torch.arange(b.ids.shape[1]), torch.zeros(b.sees.shape, dtype=torch.bool)
    for i, (n, k) in enumerate(zip(L, Q, strict=True)):
        part, before = (t >= n).long() + (t >= n + k).long(), t[None] <= t[:, None]
        same, last = part[:, None] == part[None], (part == 2)[:, None]
        mask[i] = (torch.where(last, before, same if full else same & before)) & (b.doc[i] > 0)[None]
    mask |= torch.eye(len(t), dtype=torch.bool)
    rope = tuple(r.double() for r in rotations(b.pos, m.size.head_dim, m.size.theta))
    x = m.embed_tokens(b.ids)
    for layer in m.layers: x = layer(x, rope, mask[:, None], None)
    assert far(got, behind(m.norm(x), first, [3] * 4)) < 5e-7
    assert far(got, behind(whole(m, rows), first, [3] * 4)) > 1e-3


def test_prefix_reader_trains_what_the_cache_gives():
    m, docs, asked = tiny().double(), texts(9, 5), texts(4, 4, seed=1)
    rows = [Example(d.ids + q.ids, [False] * (len(d) + 1) + [True] * 3, {"document": [1] * len(d) + [0] * 4}) for d, q in zip(docs, asked, strict=True)]
    h = m(PrefixReader().corrupt(collate(rows), Noise()))
    p, _ = RagCache.read(m, docs, full=True)
    got = m(p.behind(asked), p.reader())
    assert max(far(got[i, :4], h[i, len(docs[i]):len(docs[i]) + 4]) for i in range(2)) < 1e-12
    causal = m(CLM().corrupt(collate(rows), Noise()))
    assert far(got[0, :4], causal[0, 9:13]) > 1e-3                                     # control: what a causal reader has learned


def test_a_reader_leaves_the_cache_as_it_was():
    m = tiny().double().eval()
    c, _ = RagCache.read(m, texts(5))
    before = {k: (a.clone(), z.clone()) for k, (a, z) in c.seen.items()}
    first = m(c.behind(texts(4, seed=1)), c.reader())
    assert torch.equal(first, m(c.behind(texts(4, seed=1)), c.reader()))
    assert all(torch.equal(c.seen[k][0], a) and torch.equal(c.seen[k][1], z) for k, (a, z) in before.items()) and len(c.columns) == 1


@pytest.mark.parametrize("T, cached", [(16, 0), (16, 48), (8, 200)])
def test_operations_with_a_cache(T, cached):
    "As the chapter counts them, against PyTorch's counter; its CPU kernel for attention is not counted, so another one is used."
    m = copy.deepcopy(tiny()).eval()
    m.size = m.size.__class__(**{**vars(m.size), "length": 512})
    rows = texts(T, seed=3)
    c, _ = RagCache.read(m, texts(max(cached, 1)))
    b = c.behind(rows) if cached else both_ways(collate(rows))
    with FlopCounterMode(display=False) as count, torch.no_grad(), sdpa_kernel(SDPBackend.MATH): m(b, c.reader() if cached else Cache())
    cost = Cost(m.size)
    assert count.get_total_flops() == 2 * cost.inner * T + cost.pairs(T, T + cached)
