"""LinkBERT's pairs are what they say, for any number of ranks; its model opens as BertModel without a missing weight."""
from collections import Counter
from itertools import islice

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel

from lmtrain.batch import Example, Noise, collate
from lmtrain.corpora import Links
from lmtrain.loader import Loader
from lmtrain.model import Size, Transformer, with_heads
from lmtrain.objectives.masked import MLM
from lmtrain.retrieval.linkbert import LinkMLM, Pairs, linked_bert, relation_logits, save_bert, weighted_choice, without_sections
from lmtrain.text import regular_ids, train_bpe
from lmtrain.train import Trainer

W = "ant bee cat dog eel fox gnu hen ibis jay koi lion mole newt owl pig".split()
N = 24
TEXTS = [" ".join(f"{W[i % 16]} {W[(i * 3 + k) % 16]} n{i} w{k}" for k in range(12)) for i in range(N)]
GRAPH = Links([f"d{i}" for i in range(N)], TEXTS, sorted({(i, j) for i in range(N) if i % 6 for j in ((i + 1) % N, (i * 5) % N, 0, i)}))
TOK = train_bpe(TEXTS, 300)
PAIRS = Pairs(GRAPH, TOK, half=20)
O = LinkMLM(TOK.mask_token_id, regular_ids(TOK))


def test_pairs_are_what_they_say():
    "Over twenty epochs: B continues A, is a stranger, or is linked from A's document; a third each where all are possible (p > .001)."
    seen = Counter()
    for epoch in range(20):
        for n in range(len(PAIRS.where)):
            r, a, b = PAIRS.draw(n, Noise(0, epoch))
            seen[r, bool(PAIRS.links[a[0]]), a[1] + 1 < len(PAIRS.segments[a[0]])] += 1
            assert b == (a[0], a[1] + 1) if r == 0 else (a[0] != b[0] and ((a[0], b[0]) in GRAPH.edges) == (r == 2))
            e = PAIRS(Example([0], index=n), Noise(0, epoch))
            assert len(e.ids) == len(e.tokens["segment"]) and e.ids[0] == TOK.bos_token_id and {*e.tokens["relation"]} == {r}
    assert chisquare([seen[r, True, True] for r in range(3)]).pvalue > .001
    assert not any(i == j for i, some in enumerate(PAIRS.links) for j in some)          # no document is linked to itself


def test_anew_each_epoch_for_any_ranks_workers_and_resume():
    "The same pairs on one rank or two, with workers, after a resume; other pairs in the next epoch."
    made = lambda **k: Loader(PAIRS.items(), O, rows=8, T=48, change=PAIRS, **k)
    every, per = list(islice(made(), 60)), -(-len(PAIRS.where) // 8)
    rows = lambda bs: {int(b.index[i, 0]): b.clean[i].tolist() for b in bs for i in range(len(b))}
    first, second = rows(every[:per]), rows(every[per:2 * per])
    assert {*first} == {*second} and sum(first[k] == second[k] for k in first) < .5 * len(first)
    two = rows([b for r in (0, 1) for b in islice(made(rank=r, world=2), per // 2)])
    assert all(two[k] == first[k] for k in two)
    loader = made()
    for _ in zip(loader, range(per + 3), strict=False): state = loader.state_dict()
    again = made(); again.load_state_dict(state)
    assert torch.equal(next(iter(again)).ids, every[per + 3].ids) and torch.equal(next(iter(made(workers=1))).ids, every[0].ids)
    packed = next(iter(Loader(PAIRS.items(), O, rows=4, T=130, pack=True, change=PAIRS)))
    assert int(O.count(packed)["relation"]) > len(packed)                              # packed rows keep their relations


def test_much_linked_documents_are_met_less():
    "A hub's share falls from about a half to its fair part; on a complete graph all are met alike (p > .001)."
    star, share = Links(["x"] * 40, ["a b c d"] * 40, [(i, j) for i in range(40) for j in (0, 1 + i % 39)]), {}
    for diverse in (True, False):
        p = Pairs(star, TOK, half=20, shares=(0, 0, 1), diverse=diverse)
        c = Counter(b[0] for e in range(40) for n in range(40) for r, a, b in [p.draw(n, Noise(0, e))] if r == 2)
        share[diverse] = c[0] / sum(c.values())
    assert share[True] < .1 and share[False] > .4
    p = Pairs(Links(["x"] * 10, ["a b"] * 10, [(i, j) for i in range(5) for j in range(5, 10)]), TOK, half=20, shares=(0, 0, 1))
    c = Counter(b[0] for e in range(200) for n in range(5) for r, a, b in [p.draw(n, Noise(0, e))])
    assert chisquare([c[j] for j in range(5, 10)]).pvalue > .001


def test_drawing_by_weights():
    assert [weighted_choice([0., 2., 0., 1.], u) for u in (0., .5, .66, .67, .999)] == [1, 1, 1, 3, 3]


def test_two_documents_are_needed():
    with pytest.raises(ValueError, match="two documents"): Pairs(Links(["a", "b"], ["text", ""], []), TOK)


def test_an_impossible_share_becomes_another():
    "Without links and with a single segment each, all pairs are random, whatever is asked for; `mix` tells."
    p = Pairs(Links(["a", "b", "c"], ["a b", "c d", "e f"], []), TOK, shares=(.5, 0, .5))
    assert p.mix(Noise()) == {"contiguous": 0, "random": 1, "linked": 0}


def test_sections_are_taken_out():
    "What names the links is gone, what stands before and behind stays; a text without one is as it was."
    doc = "Do f.\n\nParameters\n----------\nx : int\n\nSee Also\n--------\ng : other g\n    more words\nh, k\n\nNotes\n-----\nAbout."
    g = without_sections(Links(["f", "g"], [doc, "Do g, see also h."], [(0, 1)]))
    assert "other g" not in g.texts[0] and "h, k" not in g.texts[0] and "About" in g.texts[0] and "x : int" in g.texts[0]
    assert g.texts[1] == "Do g, see also h." and g.edges == [(0, 1)]


def test_words_are_those_of_mlm():
    "The first term is MLM's, and weight 0 leaves the relation out."
    torch.manual_seed(0)
    m = with_heads(Transformer(Size(len(TOK), 32, 2, layers=2, length=64)), relation=3).eval()
    b = next(iter(Loader(PAIRS.items(), O, rows=8, T=48, change=PAIRS)))
    plain = MLM(TOK.mask_token_id, regular_ids(TOK), rate=.15)
    assert torch.allclose(O.loss(m, b)["linkmlm"], plain.loss(m, b)["mlm"], rtol=1e-5)
    alone = LinkMLM(TOK.mask_token_id, regular_ids(TOK), weight=0)
    assert {*alone.loss(m, b)} == {*alone.count(b)} == {"linkmlm"} and int(O.count(b)["relation"]) == len(b)


def test_it_opens_as_bert(tmp_path):
    "No key is missing or unexpected; hidden states and relations are the same through BertModel, and others without segments."
    torch.manual_seed(0)
    m = linked_bert(TOK, dim=32, length=64)
    assert not m.causal
    h = Trainer(m, O, Loader(PAIRS.items(), O, rows=8, T=48, change=PAIRS), lr=3e-3, steps=40, bf16=False).fit()
    assert sum(h["linkmlm"][-5:]) < sum(h["linkmlm"][:5])
    save_bert(m, TOK, tmp_path / "b")
    theirs, info = BertModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    b = next(iter(Loader(PAIRS.items(), O, rows=8, T=48, change=PAIRS)))
    m.eval(); theirs.eval()
    h, mask, real = m(b), (b.doc > 0).long(), b.doc > 0
    out = theirs(b.ids, attention_mask=mask, token_type_ids=b.extra["segment"])
    assert (out[0] - h)[real].abs().max() < 1e-5 and (m.heads["relation"](out.pooler_output) - relation_logits(m, h[:, 0])).abs().max() < 1e-5
    assert (theirs(b.ids, attention_mask=mask)[0] - h)[real].abs().max() > 1e-3
    AutoModel.from_pretrained(tmp_path / "b")


def test_transformers_own_class_would_lose_the_pooler(tmp_path):
    "Negative control: what BertForMaskedLM saves is not all that a BertModel needs."
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)).save_pretrained(tmp_path / "x")
    assert BertModel.from_pretrained(tmp_path / "x", output_loading_info=True)[1]["missing_keys"]


def test_native_model_learns_packed_pairs():
    torch.manual_seed(0)
    m = with_heads(Transformer(Size(len(TOK), 32, 2, layers=2, length=96)), relation=3)
    h = Trainer(m, O, Loader(PAIRS.items(), O, rows=4, T=96, pack=True, change=PAIRS), lr=3e-3, steps=40, bf16=False).fit()
    assert sum(h["linkmlm"][-5:]) < sum(h["linkmlm"][:5])


def test_a_model_without_segments_ignores_the_column():
    m = Transformer(Size(len(TOK), 32, 2, layers=1, length=64))
    b = collate([PAIRS(Example([0], index=3), Noise())])
    assert torch.equal(m(b), m(b.with_extra(segment=torch.zeros_like(b.extra["segment"]))))


def test_the_model_is_run_once():
    "Both terms come from one pass. Control: the two passes that they would take apart are counted as two."
    torch.manual_seed(0)
    m, runs = with_heads(Transformer(Size(len(TOK), 32, 2, layers=1, length=64)), relation=3), []
    m.register_forward_hook(lambda *_: runs.append(1))
    b = next(iter(Loader(PAIRS.items(), O, rows=4, T=48, change=PAIRS)))
    O.loss(m, b)
    assert len(runs) == 1
    MLM(TOK.mask_token_id, regular_ids(TOK), rate=.15).loss(m, b); relation_logits(m, m(b)[O.first(b)])
    assert len(runs) == 3
