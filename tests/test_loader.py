"""The loader against a plain one: lists, one rank, one process, every step written out; and what it reads, keeps and leaves behind."""
import gc
import itertools
import pickle
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.batch import Example, Noise, collate, first_fit, lay
from lmtrain.loader import BLOCK, Bins, Loader, ahead
from lmtrain.objective import CLM, Objective, PrefixLM, doc_sizes
from lmtrain.objectives.diffusion import ranked
from lmtrain.objectives.masked import MLM, span_corrupt
from lmtrain.objectives.mixed import fim
from lmtrain.text import Rows, cut

COLUMNS = "ids clean doc order answer targets weights index item role".split()


def text(n: int, seed: int = 0, most: int = 30) -> list[Example]:
    dice = np.random.default_rng(seed)
    return [Example([1, *dice.integers(7, 90, dice.integers(1, most)).tolist(), 2]) for _ in range(n)]


def as_rows(items: list[Example]) -> Rows:
    ids = [i for e in items for i in e.ids]
    ends = np.cumsum([len(e) for e in items])
    cuts = np.stack([np.append(0, ends[:-1]), ends, np.zeros(len(items), int)], 1)
    return Rows(np.array(ids, np.uint16), cuts, np.ones(len(items)), np.arange(len(items)))


def plain(items, objective, rows: int, T: int, pack: bool, seed: int, change, ranks: int, epochs: int):
    "Each step's batches for all ranks, and the position after it, from lists, with nothing shared and nothing remembered."
    for epoch in range(epochs):
        order, noise, bins, at = np.random.default_rng([seed, epoch]).permutation(len(items)).tolist(), Noise(seed, epoch), [[]], [0]
        for b in range(0, len(order), BLOCK):
            made = []
            for n in order[b:b + BLOCK]:
                group = items[n] if isinstance(items[n], list) else [items[n]]
                group = [replace(e, index=n + (k << 40)).lists() for k, e in enumerate(group)]
                made.append([change(e, noise) for e in group] if change else group)
            units = [([[made[k][0] for k in row]], len(row)) for row in first_fit([len(m[0]) for m in made], T)] if pack else [([[e] for e in m], 1) for m in made]
            for unit, used in units:
                if sum(map(len, bins[-1])) + len(unit) > rows: bins.append([]); at.append(at[-1])
                bins[-1].append(unit); at[-1] += used
        for step in range(0, len(bins), ranks):
            some = bins[step:step + ranks]
            if len(some) < ranks:
                units, done, some = [u for b in some for u in b], 0, [[] for _ in range(ranks)]
                for u in units: some[min(ranks - 1, done * ranks // sum(map(len, units)))].append(u); done += len(u)
            out = []
            for share in some:
                flat = [(n, k, r) for n, u in enumerate(share) for k, r in enumerate(u)]
                b = lay([r for _, _, r in flat], T, 0, [n for n, _, _ in flat], [r[0].facts.get("role", k) for _, k, r in flat])
                out.append(objective.corrupt(b, noise))
            yield out, {"epoch": epoch, "used": at[min(step + ranks, len(bins)) - 1]}


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in COLUMNS) and {*a.extra} == {*b.extra} and all(torch.equal(a.extra[n], b.extra[n]) for n in a.extra)


PAIRS = [[Example([1, *range(5 + i % 9, 9 + i % 9 + k)], facts={"reward": float(k)}) for k in range(2)] for i in range(40)]
KINDS = {"unpacked": (text(300), {}), "packed": (text(300), {"pack": True}), "pairs": (PAIRS, {}), "fim": (text(120), {"pack": True, "change": lambda e, n: fim(e, n, (4, 5, 6), end=2)}),
         "spans": (text(120, most=12), {"change": lambda e, n: span_corrupt(e, n, range(90, 120)) if len(e) > 4 else e}),
         "several blocks": (text(2 * BLOCK + 77, most=9), {"pack": True})}


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_loader(kind, ranks):
    """Every column, the states, over two epochs and from the middle of the second, for lists and for arrays; a seed of one's own, the control, differs."""
    items, how = KINDS[kind]
    objective = MLM(3, range(7, 90)) if kind != "spans" else CLM()
    want = list(plain(items, objective, 4, 40, how.get("pack", False), 5, how.get("change"), ranks, 2))
    for kinds in (items, as_rows(items)) if isinstance(items[0], Example) else (items,):
        for rank in {0, ranks - 1}:
            loader = Loader(kinds, objective, 4, 40, rank=rank, world=ranks, seed=5, **how)
            for (batches, state), got in zip(want, loader, strict=False): assert same(batches[rank], got) and loader.state_dict() == state
            middle = len(want) * 2 // 3
            again = Loader(kinds, objective, 4, 40, rank=rank, world=ranks, seed=5, **how)
            again.load_state_dict(want[middle - 1][1])
            for (batches, _), got in zip(want[middle:], again, strict=False): assert same(batches[rank], got)
    other = next(iter(Loader(items, objective, 4, 40, rank=0, world=ranks, seed=6, **how)))
    assert not same(want[0][0][0], other)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(workers):
    "Batches and states from processes are those of the thread, from the middle of an epoch on."
    alone, spread = (Loader(as_rows(text(200)), MLM(3, range(7, 90)), 4, 40, pack=True, workers=w) for w in (0, workers))
    for loader in (alone, spread): loader.load_state_dict({"epoch": 1, "used": 33})
    for a, b in itertools.islice(zip(alone, spread, strict=False), 30): assert same(a, b) and alone.state_dict() == spread.state_dict()


class Counted(torch.utils.data.Dataset):
    "A data set of torch that says what is read."
    def __init__(self, items): self.items, self.read = items, []
    def __len__(self): return len(self.items)
    def __getitem__(self, n): self.read.append(n); return self.items[n]


def test_a_rank_reads_its_own_rows():
    "Of eight ranks each reads an eighth, and what is fetched ahead; packed rows without lengths, the control, are all read."
    for pack, most in ((False, 8 * 4 * 3), (True, None)):
        items = Counted(text(BLOCK, most=9))
        batches = iter(Loader(items, CLM(), 4, 40, rank=3, world=8, pack=pack))
        for _ in range(8): next(batches)
        batches.close()
        if pack: assert len({*items.read}) == BLOCK
        else: assert len(items.read) <= 4 * (8 + 3) + 8 <= most


def test_rows_are_arrays_and_lists_stay_legal():
    "A row's ids are a copy, its answers a view that cannot be written to; lists, arrays and mixtures lay out alike; a change gets lists."
    rows = as_rows(text(20))
    e = rows[3]
    assert e.ids.dtype == np.int32 and not e.answer.flags.writeable and e == e.lists() and e != rows[4] and e != 3
    e.ids[0] = 77
    assert rows[3].ids[0] == 1
    with pytest.raises(ValueError): e.answer[0] = True
    assert same(collate([rows[0], rows[1]]), collate([rows[0].lists(), replace(rows[1].lists(), answer=np.array(rows[1].answer))]))
    seen = []
    next(iter(Loader(rows, CLM(), 4, 40, change=lambda e, n: seen.append((type(e.ids), type(e.answer))) or e)))
    assert {*seen} == {(list, list)}
    with pytest.raises(ValueError, match="Examples or lists of Examples, not both"): list(Loader([Example([1, 2]), [Example([1, 2])] * 2], CLM(), 4, 8).plain((0, Bins([Example([1, 2]), [Example([1, 2])] * 2], 4, 8)(0, 0).__next__()[0])).ids)


@given(st.lists(st.tuples(st.integers(1, 6), st.lists(st.sampled_from([.5, 1., True, False, 3]), min_size=6, max_size=6)), min_size=1, max_size=5))
def test_columns_of_any_kind(rows):
    "Facts of tokens become bool, float or long columns as PyTorch would make of all their values, whatever holds them."
    values = [v[:n] for n, v in rows]
    kind = torch.tensor([x for v in values for x in v]).dtype
    for hold in (list, np.array):
        b = collate([Example(list(range(1, n + 1)), tokens={"x": hold(v)}) for (n, _), v in zip(rows, values, strict=True)], T=6)
        assert b.extra["x"].dtype == (torch.float if kind.is_floating_point else kind if kind == torch.bool else torch.long) or hold is np.array
        for r, v in enumerate(values): assert b.extra["x"][r, :len(v)].tolist() == pytest.approx([float(x) for x in v]) and not b.extra["x"][r, len(v):].any()


def test_one_number_is_the_tensors():
    "`Noise.one` is `at`, bit for bit, for small and large examples, positions and draws."
    dice = np.random.default_rng(0)
    for _ in range(300):
        seed, epoch, index, pos, draw = (int(dice.integers(0, n)) for n in (2**32, 9, 2**53, 2**32, 99))
        index = index if dice.random() < .5 else index % 2**32
        assert Noise(seed, epoch).one(index, pos, draw) == Noise(seed, epoch).at(torch.tensor(index), torch.tensor(pos), draw).item()


# ---- one thread ahead

def test_ahead_is_the_same_and_leaves_nothing():
    "Things in order; an error comes after the things before it; at the end, on a stop or when dropped, no thread is left."
    before = threading.active_count()
    assert list(ahead(iter(range(50)))) == list(range(50)) and list(ahead(iter([]))) == []
    def breaks():
        yield from (1, 2, 3)
        raise RuntimeError("in the thread")
    got = []
    with pytest.raises(RuntimeError, match="in the thread"):
        for x in ahead(breaks()): got.append(x)
    assert got == [1, 2, 3]
    some = ahead(iter(range(9))); next(some); some.close()
    other = ahead(iter(range(9))); next(other); del other; gc.collect()
    assert threading.active_count() <= before


def test_a_bad_item_comes_in_its_turn():
    "A row that is too long is named after the batches before it, which were handed out with their states."
    items = [Example([1, 2, 3]) for _ in range(40)]
    order = np.random.default_rng([0, 0]).permutation(40)
    items[order[17]] = Example([1] * 99)
    loader, got = Loader(items, CLM(), 4, 8), 0
    with pytest.raises(ValueError, match="99 tokens, rows have 8"):
        for _ in loader: got += 1; assert loader.state_dict()["used"] == 4 * got
    assert got == 4


def test_it_works_while_the_step_runs():
    "While the first batch is used the second is made: whoever waits for that, between two batches, does not wait in vain. Control: in line nothing is made then."
    class Tells(Objective):
        def corrupt(self, b, noise): made.append(threading.Event()); made[-1].set(); return super().corrupt(b, noise)
    loader = Loader(text(200), Tells(), 4, 40)
    made: list[threading.Event] = []
    batches = iter(loader)
    next(batches)
    for _ in range(600):
        if len(made) > 1: break
        time.sleep(.05)
    assert len(made) > 1 and made[1].wait(30)
    batches.close()
    made.clear()
    line = loader.made(); next(line); time.sleep(.2)
    assert len(made) == 1


# ---- like lengths together

def test_by_length_pays_for_no_padding():
    "Pairs of very different lengths: nearly all places are real, each item comes once an epoch, whole and beside its partner; resumed anywhere it is the same."
    dice = np.random.default_rng(0)
    items = [[Example([1] * int(n)), Example([1] * max(1, int(n) - 3))] for n in dice.integers(2, 500, 700)]
    def loader(**how): return Loader(items, CLM(), 16, 512, **how)
    def places(batches) -> float:
        got = list(itertools.islice(batches, 80))
        return float(sum((b.doc > 0).sum() for b in got) / sum(b.doc.numel() for b in got))
    assert places(loader(by_length=True)) > .8 > .6 > places(loader())
    seen, states = [], []
    one = loader(by_length=True)
    for b in one:
        if one.epoch: break
        assert b.ids.shape[1] % 64 == 0 and (b.item.bincount() == 2).all() and len(b) <= 16
        seen += b.index[:, 0].tolist(); states.append((one.state_dict(), b))
    assert sorted(i for i in seen if i < 2**40) == list(range(700)) and len(seen) == 1400
    again = loader(by_length=True); again.load_state_dict(states[20][0])
    for (_, want), got in zip(states[21:30], again, strict=False): assert same(want, got)
    with pytest.raises(ValueError, match="packed rows are full"): loader(by_length=True, pack=True)
    lengths = [b.ids.shape[1] for _, b in states]
    assert lengths != sorted(lengths)                      # batches are not in order of length


# ---- no square of the row's length

@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_ranks_and_sizes_by_counting(B, T, seed):
    "`ranked` and `doc_sizes` are what counting over all pairs of tokens gives, ties and empty parts included."
    g = torch.Generator().manual_seed(seed)
    u = torch.randint(0, 6, (B, T), generator=g).float() / 6
    may, part = torch.rand(B, T, generator=g) < .6, torch.randint(0, 4, (B, T), generator=g)
    same_part, place = may[:, None] & (part[:, :, None] == part[:, None]), torch.arange(T)
    tie = (u[:, None] == u[:, :, None]) & (place[None] < place[:, None])
    rank, n = ranked(u, may, part)
    assert torch.equal(rank, (same_part & ((u[:, None] < u[:, :, None]) | tie)).sum(-1)) and torch.equal(n, same_part.sum(-1))
    doc = part.sort(dim=1, descending=True).values
    assert torch.equal(doc_sizes(doc), (doc[:, :, None] == doc[:, None]).sum(-1))


def test_prefixes_of_long_rows_are_cheap():
    "No (B,T,T) is made: the largest tensor in `PrefixLM(cut)` and `ranked` has as many numbers as the batch, times a few."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor): self.most = max(self.most, t.untyped_storage().nbytes())
            return out
    b = collate([Example(list(range(1, 513))) for _ in range(4)])
    for work in (lambda: PrefixLM(cut=.5).corrupt(b, Noise()), lambda: ranked(Noise()(b), b.answer, b.doc)):
        with Largest() as mode: work()
        assert mode.most <= 4 * 520 * 8
    with Largest() as mode: assert b.sees.any()            # the control
    assert mode.most >= 4 * 512 * 512


def test_cut_and_pickle():
    "Rows survive a pickle; `lengths` are those of the cuts."
    rows = as_rows(text(9))
    again = pickle.loads(pickle.dumps(rows))
    assert all(again[i] == rows[i] for i in range(9)) and again.lengths.tolist() == [len(e) for e in rows] and cut(12, 5)[0] == (0, 5, 1)
