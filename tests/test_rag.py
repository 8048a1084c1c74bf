"""Answers over documents: against transformers' RAG, torch's divergence and brute force; gradients as the theory has them."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.rag.modeling_rag import RagTokenForGeneration

from lmtrain.retrieval.rag import distilled, knn_logp, mixed_logp, rag_nll

torch.manual_seed(0)
B, N, T, V = 3, 4, 6, 11
SCORES, LOGITS = torch.randn(B, N, dtype=torch.double, requires_grad=True), torch.randn(B * N, T, V, dtype=torch.double)
LABELS, ALL = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
LOGP = LOGITS.view(B, N, T, V).log_softmax(-1).gather(-1, LABELS[:, None, :, None].expand(B, N, T, 1))[..., 0]


def test_by_token_is_transformers():
    "Its `marginalize`, called on logits; the sum over sequences is another number."
    theirs = RagTokenForGeneration.marginalize(SimpleNamespace(config=SimpleNamespace(n_docs=N)), LOGITS, SCORES, N)
    want = -theirs.gather(-1, LABELS[..., None])[..., 0].sum(1)
    assert (rag_nll(LOGP, SCORES, ALL, by_token=True) - want).abs().max() < 1e-12 < (rag_nll(LOGP, SCORES, ALL) - want).abs().min()


def test_the_sum_over_documents_by_enumeration():
    "Each document's prior times the answer's probability behind it, added up as numbers."
    p = (SCORES.softmax(1) * LOGP.sum(2).exp()).sum(1)
    assert torch.allclose(rag_nll(LOGP, SCORES, ALL), -p.log(), atol=1e-12)


def test_gradient_bound_and_certainty():
    "Prior minus posterior; at most the mean over documents (Jensen); a certain document is used alone; what is not in the loss does not count."
    nll = rag_nll(LOGP, SCORES, ALL)
    g, = torch.autograd.grad(nll.sum(), SCORES)
    prior, posterior = SCORES.softmax(1), (SCORES.log_softmax(1) + LOGP.sum(2)).softmax(1)
    assert (g - (prior - posterior)).abs().max() < 1e-12
    assert (nll <= -(prior * LOGP.sum(2)).sum(1) + 1e-12).all()
    one = torch.full((B, N), -1e9, dtype=torch.double); one[:, 2] = 0
    for by_token in (False, True): assert torch.allclose(rag_nll(LOGP, one, ALL, by_token), -LOGP[:, 2].sum(1))
    short = ALL.clone(); short[:, 4:] = False
    for by_token in (False, True):
        assert torch.allclose(rag_nll(LOGP, SCORES, short, by_token), rag_nll(LOGP[..., :4], SCORES, ALL[:, :4], by_token))


def test_distillation():
    "0 with a gradient of 0 where the scores agree; the reader gets none; `batchmean` and not the library's default, which is N times smaller."
    reader = LOGP.sum(2).clone().requires_grad_()
    same = (reader.detach() + 3).requires_grad_()
    assert torch.autograd.grad(distilled(same, reader), same)[0].abs().max() < 1e-12
    found = distilled(SCORES, reader)
    assert found > 0 and torch.autograd.grad(found, reader, allow_unused=True)[0] is None
    of = lambda how: F.kl_div(SCORES.log_softmax(1), reader.softmax(1), reduction=how)
    assert (found - of("batchmean")).abs() < 1e-12 and (of("batchmean") / of("mean") - N).abs() < 1e-9


def test_neighbours():
    "By brute force in numbers; a distribution; shares of 0 and 1 are the two models, and others are refused."
    h, keys, values = torch.randn(5, 8).double(), torch.randn(40, 8).double(), torch.randint(V, (40,))
    got = knn_logp(h, keys, values, V, k=7, temperature=2.)
    for n in range(5):
        d = ((h[n] - keys) ** 2).sum(1)
        near = d.argsort()[:7]
        w = (-d[near] / 2).exp() / (-d[near] / 2).exp().sum()
        want = torch.stack([w[values[near] == t].sum() for t in range(V)])
        assert torch.allclose(got[n].exp(), want)
    lm = torch.randn(5, V).double().log_softmax(1)
    assert torch.allclose(mixed_logp(lm, got, .25).exp(), .75 * lm.exp() + .25 * got.exp())
    assert torch.equal(mixed_logp(lm, got, 0), lm) and torch.equal(mixed_logp(lm, got, 1), got)
    with pytest.raises(ValueError, match="from 0 to 1"): mixed_logp(lm, got, 1.5)
