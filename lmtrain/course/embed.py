"The exercises of the chapter `embed`."
import math
from typing import Any

import torch
import torch.nn.functional as F

from .kit import callable_of, exercise, expect, number, tensor


def units(*shape: int) -> torch.Tensor: return F.normalize(torch.randn(*shape), dim=-1)


@exercise("embed-1", "How many are compared?", "●", 5,
          "Whose documents are in the batch: only a query's own, or those of all pairs?",
          "Each pair brings one right document and two wrong ones, and all of them are compared with each query.",
          "With 2 pairs and one hard negative each, there are 4.")
def compared(answer: Any) -> None:
    value = number(answer)
    expect(value != 3, "that counts a query's own documents; those of the other pairs are compared as well")
    expect(value != 32, "that leaves out the hard negatives")
    expect(value != 65, "that takes only the query's own hard negatives; those of the other pairs are compared as well")
    expect(value != 95, "that leaves out the right document")
    expect(value != 128, "that counts the queries too; they are compared with documents and not with each other")
    expect(value == 32 * 3, "count all rows of the batch that are documents")


@exercise("embed-2", "The mean of a text", "●", 10,
          "Rows have different numbers of tokens to keep.",
          "Multiply by the mask, sum over positions, divide by how many are kept in each row.",
          "With h = [[[1.], [3.], [9.]]] and keep = [[True, True, False]] the result is [[2.]].")
def mean_of(answer: Any) -> None:
    f = callable_of(answer, "a function of h and keep")
    h = torch.randn(4, 6, 3)                                                           # (B,T,D)
    keep = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1]]).bool()  # (B,T)
    got = tensor(f(h.clone(), keep.clone()), (4, 3), "four texts of width 3")
    truth = torch.stack([row[k].mean(0) for row, k in zip(h, keep, strict=True)])      # (B,D)
    expect(not torch.allclose(got, h.mean(1)), "that is the mean over all positions, also those that are not kept")
    expect(not torch.allclose(got, (h * keep[..., None]).mean(1)), "the sum is divided by the length of the row, not by how many positions are kept")
    expect(not torch.allclose(got, (h * keep[..., None]).sum(1)), "that is the sum; it must be divided by how many positions are kept")
    expect(not torch.allclose(got, F.normalize(truth, dim=-1)), "the vectors have unit length; this is to be the mean alone")
    expect(torch.allclose(got, truth, atol=1e-5), "a row's vector is not the mean of its kept positions")


@exercise("embed-3", "When nothing is known", "●", 5,
          "What does the softmax of 64 equal numbers look like, whatever they are divided by?",
          "Each document has the same probability; the loss is the negative logarithm of it.",
          "With 2 pairs it is 0.69.")
def level(answer: Any) -> None:
    value = number(answer)
    expect(abs(value - math.log2(64)) > 1e-6, "that is in bits; the loss is in nats")
    expect(abs(value - math.log(63)) > 1e-4, "the right document is one of those compared")
    expect(abs(value - math.log(64) / .02) > 1e-2, "equal scores stay equal when they are divided by τ")
    expect(abs(value - math.log(64) * .02) > 1e-3, "equal scores stay equal when they are divided by τ")
    expect(abs(value - math.log(64)) < 5e-3, "equal scores give each document the same probability")


@exercise("embed-4", "The contrastive loss", "●●", 15,
          "The scores of all queries with all documents are one matrix product.",
          "Divide by τ, take the log-softmax over documents, and from row n the entry n.",
          "For a single pair the loss is 0.")
def contrast(answer: Any) -> None:
    f = callable_of(answer, "a function of q, d and tau")
    for n, tau in ((1, .1), (5, .1), (7, 1.)):
        q, d = units(n, 4), units(n, 4)                                                # (Q,D) each
        s, at = q @ d.T / tau, torch.arange(n)                                         # (Q,Q) (Q,)
        got = tensor(f(q.clone(), d.clone(), tau), (), "the mean loss")
        truth = F.cross_entropy(s, at)
        if n > 1:
            expect(not torch.allclose(got, F.cross_entropy(s.T, at)), "the softmax is over queries; a query chooses among documents")
            expect(not torch.allclose(got, F.cross_entropy(s, at, reduction="sum")), "that is the sum over queries; the mean is wanted")
            expect(not torch.allclose(got, F.cross_entropy(q @ d.T * tau, at)) or tau == 1, "the scores are multiplied by τ; they are divided by it")
            expect(not torch.allclose(got, F.cross_entropy(q @ d.T, at)) or tau == 1, "the temperature is not used")
        expect(torch.allclose(got, truth, atol=1e-5), f"for {n} pairs and τ = {tau} the loss is another")


@exercise("embed-5", "Recall", "●●", 20,
          "How many documents have a higher score than the right one?",
          "Take the numbers of the k best in each row, and see whether the right number is among them.",
          "If every right document comes second, recall at 1 is 0 and recall at 2 is 1.")
def recall_at(answer: Any) -> None:
    f = callable_of(answer, "a function of scores, right and k")
    for Q, N, k in ((40, 30, 5), (40, 30, 1), (7, 3, 3)):
        s, right = torch.rand(Q, N), torch.randint(N, (Q,))                            # (Q,N) (Q,)
        s[torch.arange(Q), right] += 0.5                                               # often among the best
        rank = (s > s.gather(1, right[:, None])).sum(1)                                # (Q,)
        got = number(f(s.clone(), right.clone(), k))
        truth = (rank < k).float().mean().item()
        low = ((s < s.gather(1, right[:, None])).sum(1) < k).float().mean().item()
        if k == 5:
            expect(abs(got - (rank < 1).float().mean().item()) > 1e-6, "k is not used: that is recall at 1")
            expect(abs(got - (rank <= k).float().mean().item()) > 1e-6, "one document too many is taken")
            expect(abs(got - low) > 1e-6, "the smallest scores are taken; the largest are wanted")
            expect(abs(got - truth * Q) > 1e-6, "that is the number of queries; the share is wanted")
        expect(abs(got - truth) < 1e-5, f"for {Q} queries, {N} documents and k = {k} it is another number")


@exercise("embed-6", "No false negatives", "●●●", 50,
          "Compare each document's text with that of the right one of each query.",
          "Make a square table of equal texts, take out its diagonal, and fill the scores with minus infinity there.",
          "For the texts a, b, a the first row loses its third entry, and the third row its first.")
def without_twins(answer: Any) -> None:
    f = callable_of(answer, "a function of scores and texts")
    for docs in (["a", "b", "a", "c"], ["x", "y"], ["p", "p", "p"]):
        n = len(docs)
        s = torch.randn(n, n)                                                          # (Q,Q)
        got = tensor(f(s.clone(), list(docs)), (n, n), "the scores")
        twin = torch.tensor([[a == b for b in docs] for a in docs])                    # (Q,Q)
        diagonal = torch.eye(n).bool()                                                 # (Q,Q)
        expect(bool(got.diagonal().isfinite().all()), "the right documents are lost too; they stay")
        expect(torch.equal(got[~twin], s[~twin]), "a document with another text has changed")
        expect(bool((got[twin & ~diagonal] == -math.inf).all()), f"for the texts {docs} a twin still counts as a negative")
        expect(torch.equal(got.diagonal(), s.diagonal()), "the scores of the right documents have changed")
