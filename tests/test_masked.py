"""Masked objectives: exact against transformers and plain loops, lawful by chi-square, the same under any layout."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from lmtrain.batch import Example, Noise, collate
from lmtrain.model import Size, Transformer, moved
from lmtrain.objective import CLM, PrefixLM, nll
from lmtrain.objectives.masked import (MLM, RTD, Anneal, Electra, Spans, candidates, chosen, collator_masks, bert_corrupt,
                                       drawn, forged, parts, span_corrupt, span_mask, tiles, widths, word_starts,
                                       words_of)
from lmtrain.text import train_chars
from lmtrain.loader import Loader
from lmtrain.train import Task, Trainer

V, M, ORDINARY = 60, 3, range(7, 60)
DICE = torch.Generator().manual_seed(5)


def doc(n, index, bos=True):
    "n tokens, the first of them special and not answered; with word numbers, in words of one to three tokens."
    ids = torch.randint(7, V, (n,), generator=DICE).tolist()
    word = torch.randint(2, (n,), generator=DICE).cumsum(0).tolist()
    facts = {"word": [-1] * bos + word[bos:]}
    return Example([1] + ids[1:] if bos else ids, [not bos] + [True] * (n - 1), facts, index=index)


DOCS = [doc(n, 10 + i) for i, n in enumerate([9, 2, 17, 30, 5, 23, 12, 3, 28, 14, 21, 8])]
LONG = collate([replace(doc(400, i, bos=False), tokens={}) for i in range(300)])
KINDS = [MLM(M, ORDINARY), MLM(M, ORDINARY, shifted=True), MLM(M, ORDINARY, words=True), Spans(M, ORDINARY),
         Spans(M, ORDINARY, words=True, shifted=True), MLM(M, ORDINARY, rate=Anneal(.6, .1, 3)), RTD(MLM(M, ORDINARY))]
NAMES = ["mlm", "mntp", "words", "spans", "word spans", "anneal", "rtd"]


@pytest.fixture
def net(): return lively(32)


def lively(dim, vocab=V):
    "A model whose probabilities differ by more than rounding."
    net = Transformer(Size(vocab, dim=dim, heads=2, layers=2, length=64)).eval()
    with torch.no_grad(): net.embed_tokens.weight.mul_(10)
    return net


def z_of(counts, expected):
    "Chi-square of counts against expectations as a standard normal number, by Wilson and Hilferty (1931)."
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    x, df = ((counts - expected)**2 / expected).sum(), len(counts) - 1
    return ((x / df)**(1 / 3) - 1 + 2 / (9 * df)) / math.sqrt(2 / (9 * df))


# Statistical tests below accept |z| < 4: a lawful draw fails with probability 6e-5. Noise is fixed, so none is flaky.

# ---- who is asked

def test_candidates_by_hand():
    "Not padding, not the given, not specials, by range or by column; shifted, not a document's first."
    b = collate([Example([8, 2, 9, 10], [True, True, False, True]), Example([11, 59, 3])], 8, pack=True)
    assert candidates(b, ORDINARY).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0]]
    assert candidates(b, ORDINARY, shifted=True).int().tolist() == [[0, 0, 0, 1, 0, 1, 0, 0]]
    assert candidates(b, range(8, 59)).int().tolist() == [[1, 0, 0, 1, 1, 0, 0, 0]]
    column = b.with_extra(special=torch.tensor([[True] * 4 + [False] * 4]))
    assert candidates(column, ORDINARY).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]


def fates(objective, b, noise):
    "(hidden, of them masked, kept, swapped) as numbers of tokens."
    q = objective.corrupt(b, noise)
    on = q.weights > 0                                                                 # (B,T)
    mask, keep = (q.ids == M) & on, (q.ids == q.clean) & on                            # (B,T)
    return int(on.sum()), int(mask.sum()), int(keep.sum()), int((on & ~mask & ~keep).sum())


def shares(keep=.1, swap=.1):
    "Expected shares (mask, kept, swapped): a random token is now and then the old one."
    same = swap / len(ORDINARY)
    return np.array([1 - keep - swap, keep + same, swap - same])


@pytest.mark.parametrize("rate", [.15, .3, .6])
def test_rates_and_shares(rate):
    "Hidden: the rate within 4 sigma. Masked, kept, swapped: 80, 10, 10 by chi-square."
    n, (hidden, *three) = LONG.ids.numel(), fates(MLM(M, ORDINARY, rate), LONG, Noise(1))
    assert abs(hidden - n * rate) < 4 * math.sqrt(n * rate * (1 - rate)) and sum(three) == hidden
    assert abs(z_of(three, hidden * shares())) < 4
    _, *other = fates(MLM(M, ORDINARY, rate, keep=.2, swap=.05), LONG, Noise(1))
    assert abs(z_of(other, hidden * shares(.2, .05))) < 4


def test_control_shares():
    "Two independent coins, as in a public lesson, give 81, 10 and 9, which the same chi-square refuses."
    b, noise = LONG, Noise(1)
    hit = b.doc > 0                                                                    # (B,T)
    masked = hit & (noise(b, 1) >= .1) & (noise(b, 2) >= .1)                           # (B,T)
    kept = hit & (noise(b, 1) < .1)                                                    # (B,T)
    three = np.array([int(masked.sum()), int(kept.sum()), int((hit & ~masked & ~kept).sum())])
    assert np.abs(three / three.sum() - [.81, .1, .09]).max() < .005
    assert z_of(three, three.sum() * np.array([.8, .1, .1])) > 4


def test_random_tokens():
    "A swapped token is any regular_ids one, equally often, and no special; the collator's, the control, is one at times."
    q = MLM(M, ORDINARY, .9, keep=0, swap=1).corrupt(LONG, Noise(2))
    on, n = q.weights > 0, len(ORDINARY)                                               # (B,T)
    counts = q.ids[on].bincount(minlength=V)                                           # (V,)
    assert counts[:7].sum() == 0 and abs(z_of(counts[7:], [int(on.sum()) / n] * n)) < 4
    read, labels = collator_masks(LONG.ids, torch.zeros_like(LONG.ids).bool(), M, V, .9, 0., 1., DICE)
    assert (read[labels > 0] < 7).float().mean() > .1
    assert not (read[labels < 0] != LONG.ids[labels < 0]).any()


def test_the_highest_number_is_still_a_token():
    "The largest number that noise can give, 1 - 2**-24, makes the last regular_ids token, for any size of vocabulary."
    class Top(Noise):
        def at(self, index, place, draw=0): return torch.full(index.shape, 1 - 2**-24)  # (n,)
    b = collate([Example([8, 9])])
    every, one = torch.ones(1, 2, dtype=torch.bool), torch.arange(2)[None]             # (1,2) (1,2)
    for n in (3, 53, 1000, 50257, 2**17, 256000):
        assert bert_corrupt(b, every, one, Top(), M, range(7, 7 + n), 0., 1.).ids.tolist() == [[6 + n] * 2]
    assert widths(torch.tensor([0., 1 - 2**-24]), .2, 10).tolist() == [1, 10]


@pytest.mark.parametrize("kind", [MLM, Spans])
def test_a_higher_rate_asks_more_of_the_same(kind):
    "What is hidden at a rate is hidden at each higher one, and read alike. Control: another seed."
    b, before = collate(DOCS), None
    for rate in (0., .05, .15, .3, .6, 1.):
        q = kind(M, ORDINARY, rate).corrupt(b, Noise(3))
        on = q.weights > 0                                                             # (B,T)
        if before is not None:
            was, read = before
            assert not (was & ~on).any() and torch.equal(q.ids[was], read[was])
        before = on, q.ids
    assert torch.equal(on, candidates(b, ORDINARY))
    a, c = (kind(M, ORDINARY, r).corrupt(b, Noise(s)).weights > 0 for r, s in ((.15, 3), (.3, 4)))
    assert (a & ~c).any()


@pytest.mark.parametrize("objective", [k for k in KINDS if isinstance(k, MLM)], ids=NAMES[:-1])
def test_each_document_is_asked(objective):
    "At least once, if it has a candidate; at rate 0 exactly its lowest unit; none where there is none."
    short = [doc(n, i) for i, n in enumerate([2, 3, 2, 4, 2, 3] * 20)]
    special = Example([1, 2, 2], [False, True, True], {"word": [-1, -1, -1]}, index=500)
    b = collate([*short, special], 64, pack=True)
    q = objective.corrupt(b, Noise(6))
    asked = q.index[q.weights > 0]                                                     # (n,)
    assert {*asked.tolist()} == {*range(120)}
    if objective.shifted or objective.words or isinstance(objective, Spans): return
    hit = replace(objective, rate=0.).corrupt(b, Noise(6)).weights > 0                 # (B,T)
    u = Noise(6)(b).masked_fill(~candidates(b, ORDINARY), 2)                           # (B,T)
    for i in range(120): assert u[(b.index == i)].min() == u[hit & (b.index == i)] and (hit & (b.index == i)).sum() == 1


def test_nothing_to_ask(net):
    "Specials only: loss 0, gradient 0, count 0; beside others they change nothing. The control's mean is nan."
    special, o = Example([1, 2, 2], index=7), MLM(M, ORDINARY)
    q = o.corrupt(collate([special]), Noise())
    loss = o.loss(net, q)["mlm"]; loss.backward()
    assert loss == 0 and o.count(q)["mlm"] == 0 and all(not p.grad.any() for p in net.parameters())
    docs = [replace(d, tokens={}) for d in DOCS]
    one, two = (o.corrupt(collate(e), Noise()) for e in (docs, [*docs, special]))
    assert o.count(one)["mlm"] == o.count(two)["mlm"]
    torch.testing.assert_close(o.loss(net, one)["mlm"], o.loss(net, two)["mlm"], rtol=1e-5, atol=0)
    assert ForMaskedLMLoss(net.head(net(q)), torch.full_like(q.ids, -100), V).isnan()


def test_control_short_texts_without_a_question(tok):
    "transformers' collator asks most two-token texts nothing at 15 %, and then a batch's mean is nan."
    collator = DataCollatorForLanguageModeling(tok, seed=0)
    labels = [collator([{"input_ids": [20, 21]}])["labels"] for _ in range(200)]
    empty = sum(bool((x == -100).all()) for x in labels)
    assert 115 < empty < 172                                                           # .85**2 of 200, 4 sigma


def test_an_end_that_looks_like_padding_is_asked(tok):
    "pad == eos: a true end is a candidate and CLM's target, padding is neither. Control: the collator loses the end."
    e = Example([20, 21, 22, tok.eos_token_id], index=0)
    b = collate([e], 7, pad=tok.eos_token_id)
    q = MLM(M, range(4, len(tok)), 1.).corrupt(b.with_extra(special=torch.zeros_like(b.ids).bool()), Noise())
    assert q.weights.tolist() == [[1, 1, 1, 1, 0, 0, 0]]
    c = CLM().corrupt(b, Noise())
    assert c.targets[0, 2] == tok.eos_token_id and c.weights.tolist() == [[1, 1, 1, 0, 0, 0, 0]]
    import copy
    same = copy.deepcopy(tok); same.pad_token = same.eos_token
    theirs = DataCollatorForLanguageModeling(same, mlm=False)([{"input_ids": e.ids}])
    assert theirs["labels"].tolist() == [[20, 21, 22, -100]]


# ---- words

def test_words_of(tok):
    "Ids are those of the tokenizer between bos and eos, word numbers those of word_ids; specials in text are text."
    e = words_of("one two-three <|eos|>", tok)
    out = tok("one two-three <|eos|>", add_special_tokens=False, split_special_tokens=True)
    assert e.ids == [tok.bos_token_id, *out["input_ids"], tok.eos_token_id] and e.ids.count(tok.eos_token_id) == 1
    assert e.tokens["word"] == [-1, *out.word_ids(), -1] and e.answer == [False] + [True] * (len(e) - 1)
    pieces = [tok.decode([i for i, w in zip(e.ids, e.tokens["word"], strict=True) if w == k]) for k in range(4)]
    assert pieces == ["one", " two", "-", "three"]
    with pytest.raises(ValueError, match="one word"): words_of("one two", train_chars(["one two"]))


def test_words_are_hidden_whole():
    "All regular_ids tokens of a word are hidden or none, with one fate; the rate is the words'. Control: words=False."
    docs = [doc(60, i) for i in range(200)]
    b = collate(docs)
    word = b.index * 1000 + b.extra["word"]                                            # (B,T)
    ok = candidates(b, ORDINARY)                                                       # (B,T)

    def mixed(q):
        "Words partly hidden, or masked in part; and the number of words hidden, and of words."
        on, mask = q.weights > 0, q.ids == M                                           # (B,T)
        groups = [(on[g], mask[g]) for g in (ok & (word == w) for w in word[ok].unique())]
        partly = sum(bool(o.any() != o.all() or (k.any() != k.all())) for o, k in groups)
        return partly, sum(bool(o.any()) for o, _ in groups), len(groups)
    partly, hidden, words = mixed(MLM(M, ORDINARY, .3, words=True).corrupt(b, Noise(1)))
    assert partly == 0 and abs(hidden - .3 * words) < 4 * math.sqrt(.21 * words)
    assert mixed(MLM(M, ORDINARY, .3).corrupt(b, Noise(1)))[0] > 100
    q = MLM(M, ORDINARY, 1., 0., 1., words=True).corrupt(b, Noise(1))                  # each token of a word by another
    follows = (word[:, 1:] == word[:, :-1]) & ok[:, 1:]                                # (B,T-1)
    assert (q.ids[:, 1:] == q.ids[:, :-1])[follows].float().mean() < .05
    with pytest.raises(ValueError, match="words_of"): MLM(M, ORDINARY, words=True).corrupt(LONG, Noise())


def test_control_the_collator_takes_a_text_for_one_word(tok, pages):
    "whole_word_mask=True with byte-level BPE hides all of an ASCII text or nothing; ours hides a share of its words."
    texts = [p[:120] for p in pages if p[:120].isascii()][:50]
    collator = DataCollatorForLanguageModeling(tok, whole_word_mask=True, mask_replace_prob=1., random_replace_prob=0.,
                                               mlm_probability=.3, seed=0)
    some = []
    for t in texts:
        out = tok(t, return_offsets_mapping=True, return_special_tokens_mask=True)
        labels = collator([{k: out[k] for k in ("input_ids", "offset_mapping", "special_tokens_mask")}])["labels"]
        some.append(float((labels != -100)[0, 1:].float().mean()))                     # but for bos
    assert {*some} == {0., 1.}
    q = MLM(M, range(7, len(tok)), .3, words=True).corrupt(collate([words_of(t, tok) for t in texts]), Noise())
    mine = (q.weights > 0).sum(1) / (q.doc > 0).sum(1)                                 # (B,)
    assert 0 < mine.min() and mine.max() < 1


# ---- spans

def plain_tiles(unit_of, u, p, longest):
    "The span number of each token of one document, by a loop: `unit_of` is each token's unit, `u` its numbers."
    law = np.cumsum([(1 - p)**(k - 1) for k in range(1, longest + 1)]); law /= law[-1]
    sizes = [1 + int(np.searchsorted(law, float(x), side="right")) for x in u]
    spans = [k for k, n in enumerate(sizes) for _ in range(n)]
    order = {w: i for i, w in enumerate(dict.fromkeys(unit_of))}
    return [spans[order[w]] for w in unit_of]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("layout", [dict(), dict(T=70, pack=True), dict(T=40)], ids=str)
def test_tiles_equal_a_loop(words, layout):
    "Spans begin where a loop over each document, from the same numbers, says. Control: one document a row."
    b, o = collate(DOCS, **layout), Spans(M, ORDINARY, words=words)
    first, numbers, unlike = o.units(b, Noise(8)), Noise(8)(b, 3), 0
    row_wide = b.set(doc=(b.doc > 0).long())
    units = word_starts(b) if words else torch.arange(b.ids.shape[1]).expand_as(b.ids)  # (B,T)
    wrong = tiles(row_wide, units, widths(numbers, .2, 10))
    for e in DOCS:
        at = b.index == e.index                                                        # (B,T)
        spans = plain_tiles(e.tokens["word"] if words else range(len(e)), numbers[at].tolist(), .2, 10)
        want = torch.tensor([spans.index(s) for s in spans])                           # (n,)
        assert torch.equal(b.doc_pos.gather(1, first)[at], want)
        unlike += not torch.equal(first[at], wrong[at])
    assert unlike > 0 or "pack" not in layout


def test_span_lengths():
    "Lengths, of all spans and of hidden ones, are geometric given at most 10, mean 3.797. Control: clipped to 10."
    n = 20000
    b = collate([Example([8] * 40, index=i) for i in range(n)])
    o = Spans(M, ORDINARY)
    first = o.units(b, Noise(9))                                                       # (n,40)
    law = .8 ** np.arange(10); law /= law.sum()
    begin = (first != first.roll(1, 1)).int(); begin[:, 0] = 1                         # (n,40)
    number = begin.cumsum(1)                                                           # (n,40)
    sizes = torch.stack([(number == k).sum(1) for k in (1, 2, 3)])                     # (3,n) whole: 30 tokens at most
    counts = sizes.flatten().bincount(minlength=11)[1:]                                # (10,)
    assert abs(z_of(counts, law * 3 * n)) < 4 and abs(float(sizes.float().mean()) - 3.797) < .03
    hidden = sizes[0][o.corrupt(b, Noise(9)).weights[:, 0] > 0]                        # (m,)
    assert abs(z_of(hidden.bincount(minlength=11)[1:], law * len(hidden))) < 4
    clipped = .8 ** np.arange(10); clipped[:9] *= .2
    assert abs(clipped.sum() - 1) < 1e-12 and z_of(counts, clipped * 3 * n) > 20


def test_span_rate_is_the_same_at_every_place():
    "Each of 48 places is hidden with the rate, the first and the last too: largest |z| of 48 below 5 (error 3e-5)."
    n = 20000
    b = collate([Example([8] * 48, index=i) for i in range(n)])
    for rate in (.15, .4):
        u = Noise(4)(b).gather(1, Spans(M, ORDINARY).units(b, Noise(4)))               # (n,48)
        hits = (u < rate).sum(0)                                                       # (48,)
        assert ((hits - n * rate) / math.sqrt(n * rate * (1 - rate))).abs().max() < 5
        q = Spans(M, ORDINARY, rate).corrupt(b, Noise(4))
        assert ((q.weights > 0) >= (u < rate)).all()
    starts_only = (Noise(4)(b) < .06).float()                                          # (n,48) control: 4 from each on
    runs = F.max_pool1d(F.pad(starts_only, (3, 0))[:, None], 4, 1)[:, 0].sum(0)        # (48,)
    assert runs[0] < .4 * runs[-1]


def test_span_fate():
    "A span is masked, kept or swapped as a whole."
    q = Spans(M, ORDINARY, .5).corrupt(LONG, Noise(5))
    first = Spans(M, ORDINARY).units(LONG, Noise(5))                                   # (B,T)
    masked = ((q.ids == M) & (q.weights > 0))                                          # (B,T)
    assert torch.equal(masked, masked.gather(1, first))
    assert torch.equal(q.weights, q.weights.gather(1, first))


# ---- MNTP

@pytest.mark.parametrize("layout", [dict(), dict(T=40)], ids=str)
def test_shifted_equals_transformers(net, layout):
    "Labels, shifted by transformers, are our targets exactly; the losses agree to 1e-6. Control: unshifted labels."
    o = MLM(M, ORDINARY, shifted=True)
    q, flat = (k.corrupt(collate(DOCS, **layout), Noise(2)) for k in (o, replace(o, shifted=False)))
    labels = flat.clean.masked_fill(flat.weights == 0, -100)                           # (B,T)
    labels[:, 0] = -100
    mine = q.targets.masked_fill(q.weights == 0, -100)                                 # (B,T)
    assert torch.equal(F.pad(labels, (0, 1), value=-100)[:, 1:], mine) and torch.equal(q.ids, flat.ids)
    ours = o.loss(net, q)["mlm"] / o.count(q)["mlm"]
    torch.testing.assert_close(ForCausalLMLoss(net.head(net(q)), labels, V), ours, rtol=1e-6, atol=0)
    assert not q.order.any() and abs(ForCausalLMLoss(net.head(net(q)), mine, V) - ours) > .01


def test_shifted_packed():
    "In packed rows each hidden token is asked one place earlier, of the same document, and a first token never."
    b = collate([doc(n, i, bos=False) for i, n in enumerate([5, 2, 9, 3] * 8)], 30, pack=True)
    q, plain = (MLM(M, ORDINARY, .9, 0., 0., shifted=s).corrupt(b, Noise(1)) for s in (True, False))
    hidden = q.ids == M                                                                # (B,T)
    assert (plain.ids == M)[b.doc_pos == 0].any() and not hidden[(b.doc_pos == 0) & (b.doc > 0)].any()
    assert torch.equal(q.weights[:, :-1] > 0, hidden[:, 1:]) and torch.equal(q.answer, b.answer)
    on = q.weights[:, :-1] > 0                                                         # (B,T-1)
    assert torch.equal(q.targets[:, :-1][on], b.clean[:, 1:][on])
    assert torch.equal(b.doc[:, :-1][on], b.doc[:, 1:][on])


# ---- the collator, bit for bit

@pytest.mark.parametrize("rate, mask, swap", [(.15, .8, .1), (.3, .8, .1), (.5, .5, .5), (.2, 1., 0.), (.4, .6, .0)])
@pytest.mark.parametrize("seed", [None, 11])
def test_collator_bit_for_bit(tok, pages, rate, mask, swap, seed):
    "Three padded ragged batches in a row, from its own generator or the global one: equal ids and labels."
    collator = DataCollatorForLanguageModeling(tok, mlm_probability=rate, mask_replace_prob=mask,
                                               random_replace_prob=swap, seed=seed)
    texts = [p[:n] for n, p in zip((80, 30, 55), pages, strict=False)]
    rows = [[tok.bos_token_id, *tok(t)["input_ids"][1:], tok.eos_token_id] for t in texts]
    theirs, ours, dice = [], [], None if seed is None else torch.Generator().manual_seed(seed)
    torch.manual_seed(3)
    for _ in range(3): theirs.append(collator([{"input_ids": r} for r in rows]))
    torch.manual_seed(3)
    ids = collate([Example(r) for r in rows], pad=tok.pad_token_id).ids                # (3,T)
    special = torch.isin(ids, torch.tensor(tok.all_special_ids))                       # (3,T)
    for _ in range(3): ours.append(collator_masks(ids, special, tok.mask_token_id, len(tok), rate, mask, swap, dice))
    for a, (read, labels) in zip(theirs, ours, strict=True):
        assert torch.equal(a["input_ids"], read) and torch.equal(a["labels"], labels)
    assert not torch.equal(ours[0][1], ours[1][1])


# ---- the same questions wherever an example lies

def questions(batches, epochs=1):
    "For each epoch: example -> (read, target, weight, dice) of its tokens, in order."
    out, seen = [], {}
    for b in batches:
        facts = [b.ids, b.targets * (b.weights > 0), b.weights, b.extra.get("dice", b.weights)]
        for i in b.index.unique().tolist():
            if i >= 0: seen[i] = [tuple(c[b.index == i].tolist()) for c in facts]
        if len(seen) == len(DOCS):
            out.append(seen); seen = {}
            if len(out) == epochs: return out


@pytest.mark.parametrize("objective", KINDS, ids=NAMES)
def test_any_batch(objective):
    "Alone, packed, padded, backwards, in threes: the same question. Control: the collator's depends on the others."
    want = questions([objective.corrupt(collate(DOCS), Noise(1, 1))])
    for batches in ([collate(DOCS, 70, pack=True)], [collate(DOCS, 64, pad=9)], [collate(DOCS[::-1])],
                    [collate(DOCS[i:i + 3]) for i in range(0, 12, 3)], [collate([d]) for d in DOCS]):
        assert questions(objective.corrupt(b, Noise(1, 1)) for b in batches) == want
    ids, never = collate(DOCS).ids, torch.zeros(12, 30, dtype=torch.bool)              # (12,30) (12,30)
    once = collator_masks(ids, never, M, V, generator=torch.Generator().manual_seed(1))[0]
    cut = collator_masks(ids[1:], never[1:], M, V, generator=torch.Generator().manual_seed(1))[0]
    assert not torch.equal(once[1:], cut)


@pytest.mark.parametrize("objective", KINDS, ids=NAMES)
def test_through_the_loader(objective):
    "Two epochs: the same for any batch size, packing, and a restart in mid-epoch; the epochs differ."
    want = questions(Loader(DOCS, objective, rows=4, T=32), 2)
    assert want[0] != want[1] and not any(want[0][i][2] == want[1][i][2] for i in (12, 13, 15, 18, 20))
    for how in (dict(rows=1, T=32), dict(rows=5, T=40), dict(rows=2, T=64, pack=True)):
        assert questions(Loader(DOCS, objective, **how), 2) == want
    first, again = Loader(DOCS, objective, rows=3, T=32), Loader(DOCS, objective, rows=5, T=32)
    begun = list(itertools.islice(first, 2))
    again.load_state_dict(first.state_dict())
    rest = itertools.islice(again, 2)
    assert questions([*begun, *rest]) == want[:1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers(workers):
    "Worker processes change nothing, for all objectives; two ranks together ask what one asks."
    load = lambda o, **how: Loader(DOCS, o, rows=4, T=32, **how)
    for o in KINDS: assert questions(load(o, workers=workers), 2) == questions(load(o), 2)
    halves = zip(*(load(KINDS[0], rank=r, world=2) for r in (0, 1)), strict=True)
    assert questions(b for pair in halves for b in pair if len(b)) == questions(load(KINDS[0]))


def test_control_the_collator_is_static(tok):
    "A seeded collator in a worker asks the same in each epoch, and another thing without workers."
    def labels(workers):
        data = [{"input_ids": list(range(20, 60))}] * 8
        loader = DataLoader(data, 4, collate_fn=DataCollatorForLanguageModeling(tok, seed=1), num_workers=workers)
        return [torch.cat([b["labels"] for b in loader]) for _ in range(2)]            # (8,40) each
    one, none, two = labels(1), labels(0), labels(2)
    assert torch.equal(*one) and not torch.equal(*none) and not torch.equal(one[0], two[0])


@pytest.mark.parametrize("objective", KINDS[:5], ids=NAMES[:5])
def test_no_leak_between_documents(net, objective):
    "In packed rows a token is felt by all tokens of its document and by no other. Control: documents in one."
    q = objective.corrupt(collate(DOCS[:6], 48, pack=True), Noise())
    glued = q.set(doc=(q.doc > 0).long())
    for j in (0, 7, 20, 40):
        felt = moved(net, q, j)                                                        # (B,T)
        assert torch.equal(felt[q.doc > 0], q.sees[:, :, j][q.doc > 0])
        assert not (felt & (q.doc != q.doc[:, j:j + 1]) & (q.doc > 0)).any()
        assert not j or (moved(net, glued, j) & (q.doc != q.doc[:, j:j + 1]) & (q.doc > 0)).any()


# ---- rates that fall

def test_anneal():
    "From first to last in a straight line, then still. Realised rates follow it; repr is the record."
    a = Anneal(.3, .15, 4)
    assert [round(a(e), 10) for e in range(6)] == [.3, .25, .2, .15, .15, .15] and Anneal(.4, .1, 1)(0) == .4
    o, n = MLM(M, ORDINARY, rate=a), LONG.ids.numel()
    assert "Anneal(first=0.3, last=0.15, epochs=4)" in repr(o)
    for e in range(5):
        hidden = fates(o, LONG, Noise(0, e))[0]
        assert abs(hidden - n * a(e)) < 4 * math.sqrt(n * a(e))
        assert hidden == fates(MLM(M, ORDINARY, rate=a(e)), LONG, Noise(0, e))[0]


@pytest.mark.parametrize("make, why", [
    (lambda: MLM(M, ORDINARY, rate=1.5), "rate=1.5"), (lambda: MLM(M, ORDINARY, rate=lambda e: -1.), "rate=-1"),
    (lambda: MLM(M, ORDINARY, keep=.6, swap=.6), "keep \\+ swap"), (lambda: MLM(8, ORDINARY), "mask_id=8"),
    (lambda: MLM(M, range(9, 9)), "regular_ids"), (lambda: Spans(M, ORDINARY, p=0.), "0 < p < 1"),
    (lambda: Spans(M, ORDINARY, longest=0), "longest"), (lambda: RTD(MLM(M, ORDINARY, shifted=True)), "shifted")])
def test_refusals(make, why):
    "Shares that are none, masks that are words, and spans without length are refused by name."
    with pytest.raises(ValueError, match=why): make()


# ---- T5

def reference_mask(n, rate, mean, dice):
    "Our own numpy version of T5's random_spans_noise_mask, by shuffled boundaries."
    noisy = int(np.clip(np.round(n * rate), 1, n - 1))
    spans = max(int(np.round(noisy / mean)), 1)
    def segments(total):
        ends = np.arange(total - 1) < spans - 1
        dice.shuffle(ends)
        return np.bincount(np.concatenate([[0], np.cumsum(ends)]))
    both = np.stack([segments(n - noisy), segments(noisy)], 1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, both)


def runs(hit):
    "How many stretches of True."
    return int((np.diff(np.concatenate([[0], np.asarray(hit, int)])) == 1).sum())


@pytest.mark.parametrize("rate, mean", [(.15, 3.), (.3, 2.), (.5, 3.)])
def test_t5_counts(rate, mean):
    "For 2 to 120 tokens: hidden tokens and spans are T5's, and the reference's."
    dice = np.random.default_rng(0)
    for n in range(2, 121):
        hit, want = span_mask(torch.rand(n), rate, mean).numpy(), reference_mask(n, rate, mean, dice)
        noisy = min(max(round(n * rate), 1), n - 1)
        assert len(hit) == len(want) == n and hit.sum() == want.sum() == noisy
        assert runs(hit) == runs(want) == max(round(noisy / mean), 1) and not hit[0] and hit[-1]


def masks_of(n, rate, mean):
    "All masks T5 can draw, by enumeration of both divisions."
    noisy = min(max(round(n * rate), 1), n - 1)
    spans = max(round(noisy / mean), 1)
    divide = lambda m: [np.diff([0, *cuts, m]) for cuts in itertools.combinations(range(1, m), spans - 1)]
    return {tuple(np.repeat(np.arange(2 * spans) % 2, np.stack([a, b], 1).ravel()))
            for a in divide(n - noisy) for b in divide(noisy)}


def test_t5_law():
    "At 24 tokens, 3 spans of 7: all 1,800 masks and no others, equally often, ours and the reference's."
    n, draws, dice = 24, 30000, np.random.default_rng(1)
    every = sorted(masks_of(n, .3, 2.3))
    assert len(every) == math.comb(16, 2) * math.comb(6, 2) == 1800
    place = {m: i for i, m in enumerate(every)}
    ours = [place[tuple(span_mask(u, .3, 2.3).int().tolist())] for u in torch.rand(draws, n)]
    theirs = [place[tuple(reference_mask(n, .3, 2.3, dice).astype(int))] for _ in range(draws)]
    for got in (ours, theirs): assert abs(z_of(np.bincount(got, minlength=1800), [draws / 1800] * 1800)) < 4
    def uneven(total):  # control: lengths by throwing balls into boxes
        return 1 + np.bincount(dice.integers(3, size=total - 3), minlength=3)
    bad = [place[tuple(np.repeat(np.arange(6) % 2, np.stack([uneven(17), uneven(7)], 1).ravel()))]
           for _ in range(draws)]
    assert z_of(np.bincount(bad, minlength=1800), [draws / 1800] * 1800) > 20


def test_t5_bias():
    "The last token always, the first never, and up to 30 tokens one mask; from 31 on more than one."
    for n in range(2, 40):
        assert (len(masks_of(n, .15, 3.)) == 1) == (n <= 30)
        several = {tuple(span_mask(u).tolist()) for u in torch.rand(40, n)}
        assert (len(several) == 1) == (n <= 30)
    assert float(span_mask(torch.rand(16)).float().mean()) == .125
    assert round(float(span_mask(torch.rand(30)).float().mean()), 3) == .133


@pytest.mark.parametrize("n", [16, 64])
def test_t5_unbiased(n):
    "Turned by each number of places, a mask hides each place equally often, exactly; and so does chance."
    u = torch.rand(n)                                                                  # (n,)
    turned = []
    for k in range(n): u[0] = (k + .5) / n; turned.append(span_mask(u, unbiased=True))
    hidden = round(n * .15)
    assert (torch.stack(turned).sum(0) == hidden).all()
    rate, draws = hidden / n, 5000
    def worst(unbiased):
        share = torch.stack([span_mask(v, unbiased=unbiased) for v in torch.rand(draws, n)]).float().mean(0)  # (n,)
        return float(((share - rate) / math.sqrt(rate * (1 - rate) / draws)).abs().max())
    assert worst(True) < 5 and worst(False) > 50                                       # 64 places: error 4e-5


def restored(e, sentinels):
    "The text that a corrupted example asks about."
    n = e.answer.index(True)
    spans = "".join(f" {t}" for t in e.ids[n:])
    for s in sentinels: spans = spans.replace(f" {s}", f"|{s}")
    said = {int(p.split()[0]): [int(t) for t in p.split()[1:]] for p in spans.split("|") if p}
    return list(itertools.chain.from_iterable(said.get(t, [t]) for t in e.ids[:n]))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("rate, mean", [(.15, 3.), (.5, 2.), (.9, 1.)])
def test_t5_restores(rate, mean, unbiased):
    "Question and answer give the text back; each sentinel once in the text, all and one more, in order, in the answer."
    sentinels = list(range(1000, 1100))
    for i in range(60):
        e = replace(DOCS[i % 12], tokens={}, index=i) if i < 24 else Example(list(range(100, 102 + i)), index=i)
        if len(e) < 3: continue
        c = span_corrupt(e, Noise(1, 2), sentinels, rate, mean, unbiased)
        n = c.answer.index(True)
        text, said = ([t for t in part if t >= 1000] for part in (c.ids[:n], c.ids[n:]))
        assert restored(c, sentinels) == e.ids and c.index == e.index and all(c.answer[n:])
        assert said == sentinels[:len(said)] and text == said[:-1] and c.ids[-1] == said[-1]
        if e.answer: assert c.ids[0] == e.ids[0]                                       # what is given stays
    assert restored(replace(c, ids=[*c.ids[:-2], 5, c.ids[-1]]), sentinels) != e.ids   # control: a token of it changed


def test_t5_is_the_examples_own():
    "The mask goes by (seed, epoch, index) only, and changes with each of them."
    e, s = Example(list(range(100, 180)), index=3), range(1000, 1020)
    want = span_corrupt(e, Noise(1, 1), s)
    assert span_corrupt(replace(e), Noise(1, 1), s) == want
    changed = (e, Noise(2, 1)), (e, Noise(1, 2)), (replace(e, index=4), Noise(1, 1))
    assert all(span_corrupt(*c, s).ids != want.ids for c in changed)


def test_t5_for_a_decoder(net):
    "PrefixLM reads the text in both directions, asks for the answer and no more, and no answer sees a later one."
    e = Example(list(range(10, 50)), index=0)
    q = PrefixLM().corrupt(collate([span_corrupt(e, Noise(), range(50, 60), .3)]), Noise())
    n = int((q.order == 0).sum())
    assert q.weights[0].tolist() == [0.] * (n - 1) + [1.] * (q.ids.shape[1] - n) + [0.]
    assert moved(net, q, n - 1)[0, :n].all() and not moved(net, q, n + 1)[0, :n + 1].any()


@pytest.mark.parametrize("example, sentinels, why", [
    (Example([1] * 9), range(99), "numbered"),
    (Example([1] * 9, None, {"word": [0] * 9}, index=0), range(99), "columns"),
    (Example([1, 2], [False, True], index=0), range(99), "two tokens"),
    (Example([1] * 80, index=0), range(4), "5 sentinels")])
def test_t5_refuses(example, sentinels, why):
    "Examples that it cannot cut, and too few sentinels."
    with pytest.raises(ValueError, match=why): span_corrupt(example, Noise(), sentinels)


def test_parts():
    "All ways to divide 6 into 3, and no others, equally often."
    every = [tuple(parts(u, 3).tolist()) for u in torch.rand(20000, 6)]
    names = sorted({*every})
    assert names == sorted(w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == 6)
    assert abs(z_of([every.count(w) for w in names], [2000] * 10)) < 4
    assert parts(torch.rand(4), 1).tolist() == [4] and parts(torch.rand(4), 4).tolist() == [1] * 4


# ---- ELECTRA

def pair(): return Electra(lively(16), lively(32))


def electra_by_loop(model, b, scale):
    "The two sums, token by token."
    with torch.no_grad():
        probs = model.generator.head(model.generator(b)).softmax(-1)                   # (B,T,V)
    new, terms = b.clean.clone(), [0., 0.]
    for r, t in (b.weights > 0).nonzero().tolist():
        terms[0] -= math.log(probs[r, t, b.clean[r, t]])
        total, u = 0., float(b.extra["dice"][r, t])
        for v in range(V):
            total += float(probs[r, t, v])
            if total > u: break
        new[r, t] = v
    with torch.no_grad():
        score = model.head(model.discriminator(b.set(ids=new)))[..., 0].sigmoid()      # (B,T)
    for r, t in (b.answer & (b.doc > 0)).nonzero().tolist():
        terms[1] -= scale * math.log(score[r, t] if new[r, t] != b.clean[r, t] else 1 - score[r, t])
    return terms, new


@pytest.mark.parametrize("layout", [dict(), dict(T=70, pack=True)], ids=str)
def test_electra_equals_a_loop(layout):
    "Both terms, and the forged text, are those of a loop over tokens; counts are the gaps and the answerable tokens."
    model, o = pair(), RTD(MLM(M, ORDINARY, .3))
    b = o.corrupt(collate(DOCS, **layout), Noise(7))
    (gaps, doubts), new = electra_by_loop(model, b, 50.)
    terms = o.loss(model, b)
    assert abs(terms["generator"] / gaps - 1) < 1e-5 and abs(terms["discriminator"] / doubts - 1) < 1e-4
    count = o.count(b)
    assert count["generator"] == (b.weights > 0).sum() and count["discriminator"] == sum(len(d) - 1 for d in DOCS)
    logits = model.generator.head(model.generator(b).flatten(0, 1)[b.loss_positions])           # (N,V)
    fake = forged(b, drawn(logits, b.extra["dice"].flatten()[b.loss_positions]))
    assert torch.equal(fake.ids, new) and 0 < int((new != b.clean).sum()) < int(count["generator"])
    assert not (new != b.clean)[b.weights == 0].any()


def test_electra_is_asked_for_by_name():
    "A single model gets one line that says what is needed."
    o = RTD(MLM(M, ORDINARY, .3))
    with pytest.raises(TypeError, match="Electra"): o.loss(pair().generator, o.corrupt(collate(DOCS), Noise(7)))


def test_a_forgery_that_is_the_truth():
    "A generator that is always right forges nothing, and then the labels are all 0; all 1s would be another loss."
    model, o = pair(), RTD(MLM(M, ORDINARY, .3, 0., 0.), scale=1.)
    b = o.corrupt(collate(DOCS), Noise(7))
    b = b.set(clean=torch.full_like(b.clean, 20), targets=torch.full_like(b.clean, 20))
    class Sure(torch.nn.Module):
        def forward(self, h): return 100. * F.one_hot(torch.full(h.shape[:-1], 20), V)  # (N,V)
    model.generator.head = Sure()
    with torch.no_grad():
        score = model.head(model(b.set(ids=b.clean)))[..., 0]                          # (B,T)
        on = b.answer & (b.doc > 0)                                                    # (B,T)
        torch.testing.assert_close(o.loss(model, b)["discriminator"], F.softplus(score)[on].sum())
        wrong = F.softplus(score)[on & (b.weights == 0)].sum() + F.softplus(-score)[b.weights > 0].sum()
        assert abs(wrong - F.softplus(score)[on].sum()) > .1


def grads(model, loss):
    model.zero_grad(); loss.backward()
    return {n: p.grad.clone() if p.grad is not None else None for n, p in model.named_parameters()}


def test_no_gradient_through_the_forgery():
    "The discriminator's term gives the generator none, and the generator's gradient is MLM's. Control: soft words."
    model, o = pair(), RTD(MLM(M, ORDINARY, .3))
    b = o.corrupt(collate(DOCS), Noise(7))
    g = grads(model, o.loss(model, b)["discriminator"])
    assert all(v is None for n, v in g.items() if n.startswith("generator"))
    assert all(v is not None and v.any() for n, v in g.items() if not n.startswith("generator"))
    both = grads(model, sum(o.loss(model, b).values()))
    alone = grads(model, nll(model.generator, b).sum())
    for n, v in both.items():
        if n.startswith("generator"): torch.testing.assert_close(v, alone[n], rtol=1e-4, atol=1e-5)
    soft = model.generator.head(model.generator(b)).softmax(-1) @ model.discriminator.embed_tokens.weight  # (B,T,D)
    leak = grads(model, model.head(soft)[b.weights > 0].sum())
    assert all(v is not None for n, v in leak.items() if n.startswith("generator"))


def test_drawn():
    "Over a fine grid of numbers each token is drawn for its share of them, within one step of the grid."
    logits, n = torch.randn(1, 50) * 2, 40000
    u = (torch.arange(n) + .5) / n                                                     # (n,)
    share = drawn(logits.expand(n, 50), u).bincount(minlength=50) / n                  # (50,)
    assert (share - logits[0].softmax(-1)).abs().max() <= 1.5 / n
    logits[0, 0] = -torch.inf
    assert drawn(logits, torch.zeros(1)).item() == 1                                   # never one of probability 0
    logits[0, 0] = 0.
    assert drawn(logits, torch.tensor([1 - 2**-24])).item() == 49 and drawn(logits, torch.zeros(1)).item() == 0


def test_the_dice_know_nothing_of_the_choice():
    "The numbers that wait at hidden places are uniform: ten bins by chi-square. Control: those that chose them."
    q = RTD(MLM(M, ORDINARY, .15)).corrupt(LONG, Noise(1))
    bins = lambda u: (u[q.weights > 0] * 10).long().bincount(minlength=10)             # (10,)
    n = int((q.weights > 0).sum())
    assert abs(z_of(bins(q.extra["dice"]), [n / 10] * 10)) < 4 and z_of(bins(Noise(1)(LONG)), [n / 10] * 10) > 50


def test_forgeries_in_any_batch():
    "The same forged words alone, packed and padded; in another epoch others."
    model, o = pair(), RTD(MLM(M, ORDINARY, .3))
    def words(b):
        h = model.generator(b).flatten(0, 1)[b.loss_positions]                                  # (N,D)
        fake = forged(b, drawn(model.generator.head(h), b.extra["dice"].flatten()[b.loss_positions]))
        return {i: fake.ids[b.index == i].tolist() for i in b.index[b.doc > 0].unique().tolist()}
    want = words(o.corrupt(collate(DOCS), Noise(7)))
    for b in collate(DOCS, 70, pack=True), collate(DOCS[::-1], 50): assert words(o.corrupt(b, Noise(7))) == want
    assert words(o.corrupt(collate(DOCS), Noise(7, 1))) != want


def test_electra_trains():
    "A step moves both models and the head; an untied vocabulary head of the discriminator is frozen, a tied one not."
    model, o = pair(), RTD(MLM(M, ORDINARY))
    before = {n: p.clone() for n, p in model.named_parameters()}
    row = Trainer(model, o, Loader(DOCS, o, rows=12, T=32), steps=1).fit().rows[0]
    assert all((p != before[n]).any() for n, p in model.named_parameters())
    assert len(before) == len([*Task(model, o).parameters()])
    assert abs(row["loss"] - row["generator"] - row["discriminator"]) < 1e-5
    untied = lively(32); untied.head = torch.nn.Linear(32, V)
    frozen = {n for n, p in Electra(lively(16), untied).named_parameters() if not p.requires_grad}
    assert frozen == {"discriminator.head.weight", "discriminator.head.bias"}
    assert all(p.requires_grad for p in pair().parameters())


def test_chosen_by_hand():
    "The lowest is hidden whatever the rate, unless another already is; equal lowest ones together, as a word's are."
    b = collate([Example([8, 9, 10], index=0), Example([11, 12], index=1)], 6, pack=True)
    u, ok = torch.tensor([[.5, .4, .9, .7, .7, .1]]), b.doc > 0                        # (1,6) (1,6)
    assert chosen(b, u, ok, .45).int().tolist() == [[0, 1, 0, 1, 1, 0]]
    assert chosen(b, u, ok & (b.ids != 9), .2).int().tolist() == [[1, 0, 0, 1, 1, 0]]
