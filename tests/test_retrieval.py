"""Retrieval against sentence-transformers, scikit-learn, FAISS and BM25's formula: losses, gradients in chunks and across ranks, search, files."""
import copy
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lmtrain.batch import Example, Noise, collate
from lmtrain.loader import Loader
from lmtrain.model import Size, Transformer
from lmtrain.pretrained import Pretrained
from lmtrain.retrieval import embed as module
from lmtrain.retrieval.embed import POOLS, InfoNCE, both_ways, embed, pair, save_embedder, text_row, vectors_of
from lmtrain.retrieval.search import BM25, Index, Sides, content_key, docstring_pairs, faiss_index, measures
from lmtrain.text import train_bpe
from lmtrain.train import Trainer

HERE = Path(__file__).resolve().parent
TEXTS = [f"the {a} {n} of number {i} runs over a {c}" for i, (a, n, c) in enumerate(
    (a, n, c) for a in "red blue green small".split() for n in "fox dog cat".split() for c in "hill lake road".split())]
TOK = train_bpe(TEXTS, 320)


def tiny() -> Transformer:
    torch.manual_seed(1)
    return Transformer(Size(len(TOK), 32, 4, layers=2, length=64))


def dropping() -> Pretrained:
    torch.manual_seed(1)
    return Pretrained(GPT2LMHeadModel(GPT2Config(vocab_size=len(TOK), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
                                                 eos_token_id=2))).double()


def items(n: int, hard: int = 1) -> list[list[Example]]:
    return [pair(TEXTS[i].split(" runs")[0], TEXTS[i], TOK, 48, [TEXTS[(i + 7 + h) % 36] for h in range(hard)], "find it") for i in range(n)]


def gradient(m) -> torch.Tensor: return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])


def far(a, b) -> float: return float((a - b).norm() / b.norm())


@dataclass
class Plain(InfoNCE):
    "Nothing is hidden: what is right by accident counts as wrong."
    def each(self, model, b):
        old, Sides.hidden = Sides.hidden, lambda s: torch.zeros(len(s.own), len(s.says), dtype=torch.bool)
        try: return super().each(model, b)
        finally: Sides.hidden = old


# ---- the loss

@pytest.mark.parametrize("hard", [0, 1, 2])
def test_equals_cross_entropy_and_sentence_transformers(hard):
    "In 64 bits; documents in blocks or interleaved give the same; control: without hard negatives it is another loss."
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    o, m = Plain(tau=.02), tiny().double()
    b = o.corrupt(collate(items(8, hard)), Noise())
    got = o.loss(m, b)["plain"] / o.count(b)["plain"]
    z, g = embed(m, b), hard + 2
    q, cols = z[0::g], [z[k::g] for k in range(1, g)]
    ref = MultipleNegativesRankingLoss(nn.Identity(), scale=50.).compute_loss_from_embeddings([q, *cols], None)
    interleaved = F.cross_entropy(q @ z.view(8, g, -1)[:, 1:].flatten(0, 1).T / .02, torch.arange(8) * (g - 1))
    assert (got - ref).abs() < 1e-10 and (got - interleaved).abs() < 1e-12
    assert not hard or (got - F.cross_entropy(q @ cols[0].T / .02, torch.arange(8))).abs() > 1e-3


@pytest.mark.parametrize("chunk", [1, 3, 5, 30])
def test_a_chunk_changes_nothing(chunk):
    "Gradients in 64 bits: of the native model as of all rows at once; with dropout as of the same chunks with their graph kept."
    b = InfoNCE().corrupt(collate(items(10)), Noise())
    m, ref = tiny().double(), tiny().double()
    InfoNCE(chunk=chunk).loss(m, b)["infonce"].backward(); InfoNCE().loss(ref, b)["infonce"].backward()
    assert far(gradient(m), gradient(ref)) < 1e-12
    m, ref = dropping().train(), dropping().train()
    torch.manual_seed(5)
    z = torch.cat([embed(ref, b[i:i + chunk]) for i in range(0, len(b), chunk)])

    class Kept(InfoNCE):
        def vectors(self, model, b): return z
    Kept().loss(ref, b)["kept"].backward()
    torch.manual_seed(5)
    InfoNCE(chunk=chunk).loss(m, b)["infonce"].backward()
    assert far(gradient(m), gradient(ref)) < 1e-12


def test_dropout_must_be_replayed(monkeypatch):
    "Negative control: chunks computed again with other dice have another gradient, and nothing tells."
    from torch.utils.checkpoint import checkpoint
    b, found = InfoNCE().corrupt(collate(items(10)), Noise()), []
    for replay in (True, False):
        m = dropping().train()
        monkeypatch.setattr(module, "checkpoint", lambda *a, replay=replay, **k: checkpoint(*a, **k, preserve_rng_state=replay))
        torch.manual_seed(3); InfoNCE(chunk=5).loss(m, b)["infonce"].backward(); found.append(gradient(m))
    assert far(found[1], found[0]) > .05


def test_small_batches_added_up_are_another_loss():
    "What accumulation would do: each part has only its own negatives."
    m, ref = tiny().double(), tiny().double()
    InfoNCE().loss(ref, InfoNCE().corrupt(collate(items(10)), Noise()))["infonce"].backward()
    for k in (0, 5): InfoNCE().loss(m, InfoNCE().corrupt(collate(items(10)[k:k + 5]), Noise()))["infonce"].backward()
    assert far(gradient(m), gradient(ref)) > .1


def test_what_is_right_by_accident_is_no_negative():
    "A pair that stands twice costs what it costs once; an equal query's document is hidden; control: counted, the loss is higher."
    m, o, two = tiny().double(), InfoNCE(), items(4, 0)
    of = lambda rows, o=o: o.each(m, o.corrupt(collate(rows), Noise()))
    twice = of([*two, [replace(e) for e in two[0]]])
    assert torch.allclose(twice[0], of(two)[0]) and torch.allclose(twice[0], twice[4])
    assert of([*two, [replace(e) for e in two[0]]], Plain())[0] > twice[0] + .1
    other = [*two, [two[0][0], two[2][1]]]                                             # an equal query with another document
    z = embed(m, both_ways(collate(other)))
    s = z[0] @ z[1::2].T / o.tau
    s[[2, 4]] = -torch.inf
    assert torch.allclose(of(other)[0], F.cross_entropy(s[None], torch.tensor([0])))


def test_texts_are_known_by_what_they_are():
    "Equal texts have equal keys whatever the instruction, the padding and the row; other texts and orders have others."
    rows = [text_row(t, TOK, 48, i) for t in ("a red fox", "a fox red", "a red fox runs") for i in ("", "find it")]
    key = content_key(collate(rows)).tolist()
    assert key[0] == key[1] and key[2] == key[3] and len({*key}) == 3
    assert content_key(collate(rows[:1], 60)).tolist() == key[:1]
    many = content_key(collate([text_row(t, TOK, 48) for t in TEXTS]))
    assert len({*many.tolist()}) == len(TEXTS) and (many >= 0).all()


def test_a_query_needs_its_document():
    for rows in ([items(1)[0][:1]], [items(1)[0], items(2)[1][:1]]):
        with pytest.raises(ValueError, match="one right document"): InfoNCE().loss(tiny(), collate(rows))
    with pytest.raises(ValueError, match="nothing to embed"): text_row("  ", TOK, 48)
    with pytest.raises(ValueError, match="nothing to embed"): text_row("some text", TOK, 3)


def test_items_may_stand_in_any_order():
    "Rows of a batch in another order have the same losses."
    m, o = tiny().double(), InfoNCE()
    b = o.corrupt(collate(items(6)), Noise())
    shuffled = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(o.each(m, b).sum(), o.each(m, b[shuffled]).sum(), atol=1e-12)


def test_both_directions():
    "The last token moves the first state where rows are read in both directions, padded or not, alone or not; causally it does not."
    m = tiny()
    for rows in ([items(1)[0][0]], [items(1)[0][0], items(2)[1][1]]):
        for T in (None, 60):
            b = collate(rows, T)
            other = b.ids.clone(); other[0, int((b.doc[0] > 0).sum()) - 1] = 9
            moved = [float((m(c)[0, 0] - m(c.set(ids=other))[0, 0]).abs().max()) for c in
                     (InfoNCE().corrupt(b, Noise()), InfoNCE(full=False).corrupt(b, Noise()))]
            assert moved[0] > 0 == moved[1]


def test_training_finds():
    "Through the Trainer, with chunks: each text is found by its beginning; the model may still write."
    m, o = tiny(), InfoNCE(chunk=8)
    h = Trainer(m, o, Loader(items(36, 0), o, rows=24, T=48), lr=3e-3, steps=60, bf16=False).fit()
    q, d = (vectors_of(m, [i[k] for i in items(36, 0)]) for k in (0, 1))
    assert h["loss"][-1] < h["loss"][0] * .5 and measures(Index(d).search(q, 10)[1], [{i} for i in range(36)])["recall@10"] > .9 and m.causal


def test_two_ranks_are_one():
    "Under torchrun, uneven batches and a rank without rows among them; a gather that loses other ranks' gradients is seen: see ranks_retrieval.py."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "ranks_retrieval.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0 and done.stdout.count("equal") == 4, done.stdout[-500:] + done.stderr[-2000:]


# ---- pooling and files

def test_pooling_is_theirs():
    from sentence_transformers.sentence_transformer.modules import Pooling
    h, keep = torch.randn(4, 9, 6), torch.arange(9) < torch.tensor([9, 5, 3, 1])[:, None]
    before = keep.clone()
    for pool, name in POOLS.items():
        ref = Pooling(6, name)({"token_embeddings": h, "attention_mask": keep.long()})["sentence_embedding"]
        assert (pool(h, keep) - ref).abs().max() < 1e-6
    assert torch.equal(keep, before)


@pytest.mark.parametrize("pool", list(POOLS), ids=lambda p: p.__name__)
@pytest.mark.parametrize("full", [True, False])
def test_sentence_transformers_opens_it(tmp_path, pool, full):
    "Equal vectors for queries and documents, alone and in batches, cut ones among them; control: read the other way they differ."
    from sentence_transformers import SentenceTransformer
    m = tiny()
    for p in m.parameters():
        if p.ndim > 1: p.data *= 4
    save_embedder(m, TOK, tmp_path / "m", pool, "find it", full, T=48)
    assert m.causal
    theirs = SentenceTransformer(str(tmp_path / "m"), device="cpu")
    for name, told in (("query", "find it"), ("document", "")):
        for texts in ([TEXTS[0]], [TEXTS[0], TEXTS[1] + " and more and more", "a"], ["long " * 60, "x"]):
            got = torch.from_numpy(theirs.encode(texts, prompt_name=name))
            rows = [text_row(t, TOK, 48, told) for t in texts]
            assert (vectors_of(m, rows, pool, full) - got).abs().max() < 2e-6
            assert len(texts) < 2 or (vectors_of(m, rows, pool, not full) - got).abs().max() > 1e-4


def test_encode_is_the_same_in_any_batch():
    rows = [text_row(t, TOK, 48) for t in [*TEXTS, "a", "long " * 30]]
    m = tiny()
    assert (vectors_of(m, rows, size=4) - vectors_of(m, rows, size=64)).abs().max() < 1e-5 and m.training


# ---- search

def test_index_and_measures():
    "Ties by number, as brute force and FAISS find; nDCG of scikit-learn; recall, rank and nDCG of sentence-transformers."
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sklearn.metrics import ndcg_score
    g = torch.Generator().manual_seed(0)
    d, q = torch.randint(-3, 4, (500, 16), generator=g).double(), torch.randint(-3, 4, (40, 16), generator=g).double()  # whole numbers: exact ties
    d[100:200] = d[:100]
    _, found = Index(d).search(q, 10, rows=7)
    S = (q @ d.T).numpy()
    brute = np.stack([np.lexsort((np.arange(500), -r)) for r in S])
    assert (found.numpy() == brute[:, :10]).all() and Index(d[:3]).search(q, 10)[1].shape == (40, 3)
    dice = np.random.default_rng(0)
    right = [{*dice.integers(0, 500, 3).tolist()} | ({int(found[n, 4])} if n % 2 else set()) for n in range(40)]
    ours = measures(found, right)
    place = np.argsort(brute, 1)
    sk = np.mean([ndcg_score([[float(j in w) for j in range(500)]], [-p.astype(float)], k=10) for p, w in zip(place, right, strict=True)])
    ev = InformationRetrievalEvaluator({str(n): "q" for n in range(40)}, {f"{n:04d}": "d" for n in range(500)},
                                       {str(n): {f"{j:04d}" for j in w} for n, w in enumerate(right)}, mrr_at_k=[10], ndcg_at_k=[10],
                                       precision_recall_at_k=[10])
    ref = ev.compute_metrics([[{"corpus_id": f"{int(j):04d}", "score": -float(r)} for r, j in enumerate(found[n])] for n in range(40)])
    assert abs(ours["ndcg@10"] - sk) < 1e-9 and abs(ours["ndcg@10"] - ref["ndcg@k"][10]) < 1e-12
    assert abs(ours["mrr@10"] - ref["mrr@k"][10]) < 1e-12 and abs(ours["recall@10"] - ref["recall@k"][10]) < 1e-12


def test_faiss_finds_the_same():
    v = F.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (torch.from_numpy(faiss_index(v).search(v[:50].numpy(), 10)[1]) == Index(v).search(v[:50], 10)[1]).all()


def test_bm25_is_the_formula():
    "Lucene's form; a query without a known word has zeros, and ties come by number."
    b = BM25(TEXTS)
    docs = [[w for w in t.lower().split() if len(w) > 1] for t in TEXTS]
    mean, N = np.mean([len(d) for d in docs]), len(docs)

    def score(q: str, d: list[str]) -> float:
        total = 0.
        for w in q.split():
            n, f = sum(w in x for x in docs), d.count(w)
            total += math.log(1 + (N - n + .5) / (n + .5)) * f / (f + 1.5 * (.25 + .75 * len(d) / mean))
        return total
    got = b.scores(["red fox lake", "nothing known zzz"])
    assert np.abs(got[0].numpy() - [score("red fox lake", d) for d in docs]).max() < 1e-5
    assert not got[1].any() and b.search(["zzz"], 3)[1].tolist() == [[0, 1, 2]]


def test_memory_hardly_grows_with_negatives():
    "What autograd keeps of 256 pairs is more than six times what it keeps of 32; in chunks of 32 rows it is less than a tenth of that."
    def held(n: int, chunk: int | None) -> int:
        "Bytes that autograd keeps for the backward pass."
        kept, m, o = {}, tiny(), InfoNCE(chunk=chunk)
        b = o.corrupt(collate([copy.copy(items(36, 0)[k % 36]) for k in range(n)]), Noise())
        def pack(t): kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): o.loss(m, b)
        return sum(kept.values())
    assert held(256, None) > 6 * held(32, None) and held(256, 32) < .1 * held(256, None)


def test_sentences_and_their_documents():
    "A sentence is not in its document, is on one side, and always on the same; about the share is held out (exact test, p > .001)."
    from scipy.stats import binomtest
    train, held = docstring_pairs(packages := ["json", "random", "statistics", "networkx"], .2)
    assert not any(q in " ".join(d.split()) for q, d in train + held) and len({q for q, _ in train + held}) == len(train + held) > 200
    assert binomtest(len(held), len(train + held), .2).pvalue > .001
    more, rest = docstring_pairs(packages, .4)
    assert {q for q, _ in held} < {q for q, _ in rest} and {*more} < {*train}
