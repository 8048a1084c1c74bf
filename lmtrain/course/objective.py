"The exercises of the chapter `objective`."
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, Example, Noise, collate
from ..model import Size, Transformer, moved
from ..objective import CLM, Objective, nll, shift
from .kit import Wrong, callable_of, exercise, expect, number, result, tensor

DOCS = [[1, 10, 11, 12, 2], [1, 20, 2], [1, 30, 31, 32, 33, 34, 2]]


def rows(pack: bool = True) -> Batch:
    "Three documents of 5, 3 and 7 tokens: in one row of 18 positions, or a row each."
    return collate([Example(d) for d in DOCS], T=18 if pack else 8, pack=pack)


def small() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Size(vocab=64, dim=32, heads=2, layers=2, length=32)).eval()


def instance(answer: Any) -> Objective:
    "An objective, or the class of one."
    o = answer() if isinstance(answer, type) else answer
    expect(isinstance(o, Objective), f"an objective is wanted here, a subclass of Objective, and this is {type(o).__name__}")
    return o


def at(b: Batch, wrong: Tensor) -> str:
    "The first position of a row at which something is wrong."
    r, i = (int(n) for n in wrong.nonzero()[0])
    return f"in the row {b.ids[r].tolist()}, at position {i} (token {int(b.ids[r, i])})"


@exercise("objective-1", "The loss before training", "●", 5,
          "The by-hand part prints this number for a vocabulary of 64.",
          "An untrained model gives each of the V tokens about the same probability, 1/V.",
          "For V = 2 it would be log 2.")
def untrained(answer: Any) -> None:
    value, V = number(answer), 1000
    model = Transformer(Size(vocab=V, dim=32, heads=2, layers=1, length=32))
    q = shift(rows())
    truth = (nll(model, q).sum() / (q.weights > 0).sum()).item()                       # the run behind the number
    expect(abs(value - math.log2(V)) > .05, "that is in bits: lmtrain's losses are in nats, with the natural logarithm")
    expect(abs(value - V) > 1, "that is the perplexity, the number of equally likely tokens; the loss is its logarithm")
    expect(abs(value - truth) < .15, "an untrained model with this vocabulary was scored just now, and its loss is another number")


@exercise("objective-2", "Every second token", "●●", 15,
          "Begin with `shift(b)`. Which column says how much each position counts?",
          "The column `b.doc_pos` counts positions within their document. A weight may be multiplied by a condition.",
          "To keep only the first half of each row of 8 columns, it would be q.set(weights=q.weights * (torch.arange(8) < 4)).")
def every_second(answer: Any) -> None:
    f = callable_of(answer, "a function of a batch")
    for pack in (False, True):
        b = rows(pack)
        got, all_of_them = result(f(b), Batch), shift(b)
        expect((got.targets == all_of_them.targets)[all_of_them.weights > 0].all(), "the labels changed: keep those of `shift`")
        weights = tensor(got.weights, tuple(b.ids.shape), "weights").float()
        even = b.doc_pos % 2 == 0                                                      # (B,T)
        expect(not torch.equal(weights, all_of_them.weights), "every position is still in the loss")
        odd_ones = (weights > 0) & (all_of_them.weights == 0)
        expect(not odd_ones.any(), "a position without a label has weight (the last of a document, or padding)"
               + (": " + at(b, odd_ones) if odd_ones.any() else ""))
        wrong = weights != all_of_them.weights * even
        column = all_of_them.weights * (torch.arange(b.ids.shape[1]) % 2 == 0)
        expect(not wrong.any() or not torch.equal(weights, column),
               "you count columns of the row; the second document of a packed row begins anew with 0"
               + (": look " + at(b, wrong) if wrong.any() else ""))
        expect(not wrong.any(), "the positions 0, 2, 4, ... of each document must count, and no others"
               + (": look " + at(b, wrong) if wrong.any() else ""))


@exercise("objective-3", "How many tokens are in the loss?", "●", 5,
          "Which token of a document has no label?",
          "A document of n tokens has n - 1 pairs (token, next token). Padding has none.",
          "Two documents of 4 tokens in one row of 10 have 6.")
def how_many(answer: Any) -> None:
    value, b = number(answer), rows()
    truth = int(CLM().count(CLM().corrupt(b, Noise()))["clm"])
    expect(value != b.ids.numel(), "that is every position of the row, padding too")
    expect(value != int((b.doc > 0).sum()), "that is every token; the last one of a document has no label")
    expect(value != int((b.doc > 0).sum()) - 1, "that treats the row as one document; no label crosses from one document to the next")
    expect(value == truth, "CLM().count was run on the row just now, and gives another number")


@exercise("objective-4", "Only the answer counts", "●", 5,
          "An Example has a second field that says which tokens may be in the loss.",
          "Join the two lists for the ids, and make a list of as many truth values: one for each token of the prompt, one for each of the reply.",
          "To learn a text but its first token: Example(ids, answer=[False] + [True] * (len(ids) - 1)).")
def reply_only(answer: Any) -> None:
    f = callable_of(answer, "a function of a prompt and a reply, two lists of token ids")
    for prompt, reply in (([1, 10, 11], [20, 21, 2]), ([1], [20, 2]), ([1, 10, 11, 12, 13], [2])):
        e = result(f(list(prompt), list(reply)), Example)
        ids = [int(i) for i in e.ids]
        expect(ids == prompt + reply, f"for the prompt {prompt} and the reply {reply} the ids are {ids}")
        q = CLM().corrupt(collate([e]), Noise())
        learnt = q.targets[q.weights > 0].tolist()
        expect(learnt != ids[1:] or learnt == reply, f"for the prompt {prompt} the prompt's own tokens are in the loss too")
        expect(learnt == reply, f"for the reply {reply} the labels in the loss are {learnt}")


@exercise("objective-5", "A loss from pieces", "●", 5,
          "Two pieces with 2 and with 14 tokens: what does each token weigh in your formula?",
          "Add up all sums, add up all counts, and divide once.",
          "The mean age of two school classes is all years over all children, not the mean of the two means.")
def from_pieces(answer: Any) -> None:
    f = callable_of(answer, "a function of sums and counts, two lists of numbers")
    for sums, counts in (([4.0], [2]), ([6.0, 14.0], [2, 14]), ([3.0, 0.0, 5.0], [1, 0, 4])):
        try: value = number(f(list(sums), list(counts)))
        except ZeroDivisionError: raise Wrong(f"for counts {counts}: a piece may have no token in the loss at all") from None
        truth = sum(sums) / sum(counts)
        means = [s / n for s, n in zip(sums, counts, strict=True) if n]
        expect(abs(value - truth) < 1e-6 or abs(value - sum(means) / len(means)) > 1e-6, f"for sums {sums} and counts {counts} that is the mean of the pieces' means")
        expect(abs(value - sum(sums)) > 1e-6, f"for sums {sums} and counts {counts} that is the sum, not yet divided")
        expect(abs(value - truth) < 1e-6, f"for sums {sums} and counts {counts} the loss of the uncut batch is another number")


@exercise("objective-6", "Predict the token before", "●●", 15,
          "Three columns change: the labels, the weights, and the order in which tokens attend.",
          "The label of position i is token i - 1 of the same document. To attend to later tokens only, `order` must fall along the row: `-b.doc_pos` does.",
          "`shift` is the mirror image: F.pad(c[:, 1:], (0, 1)) brings the next column here, and F.pad(c[:, :-1], (1, 0)) the one before.")
def backward(answer: Any) -> None:
    o, model = instance(answer), small()
    for pack in (False, True):
        b = rows(pack)
        q = result(o.corrupt(b, Noise()), Batch)
        want = (b.doc_pos > 0) & (b.doc > 0)                                           # (B,T)
        before = F.pad(b.clean[:, :-1], (1, 0))                                        # (B,T)
        got = q.weights > 0
        first = got & (b.doc_pos == 0)
        expect(not first.any(), "the first token of a document has none before it, and is in the loss" + (": " + at(b, first) if first.any() else ""))
        expect(not (got & (b.doc == 0)).any(), "padding is in the loss")
        expect(not torch.equal(q.targets[want], shift(b).targets[want]), "the labels are the next tokens; here they are those before")
        wrong = want & (q.targets != before)
        expect(not wrong.any(), "a label is not the token before" + (": " + at(b, wrong) if wrong.any() else ""))
        expect(torch.equal(got, want), "every token but a document's first must be in the loss")
        for j in range(b.ids.shape[1] - 1):
            leak = moved(model, q, j) & got & (torch.arange(b.ids.shape[1]) > j)       # (B,T)
            expect(not leak.any(), "it attends to its own label: the loss would fall to 0" + (": look " + at(b, leak) if leak.any() else ""))
        i = 1
        expect((moved(model, q, 2) & got)[0, i], "position 1 does not attend to position 2: to predict backwards it must read what comes after")


@exercise("objective-7", "Label smoothing", "●●", 15,
          "With label smoothing (Szegedy et al., 2016) the target is a distribution: 1 - eps on the label, and eps spread evenly over all V tokens.",
          "The loss is (1 - eps) times the negative log-likelihood of the label plus eps times the mean of -log p over the whole vocabulary.",
          "With eps = 1 the label does not matter: the loss is the mean of -log p over the vocabulary.")
def smoothed(answer: Any) -> None:
    f = callable_of(answer, "a function of logits, targets and eps")
    logits, targets = torch.randn(6, 10) * 3, torch.randint(10, (6,))                  # (6,10) (6,)
    for eps in (0., 1., .1):
        got = tensor(f(logits.clone(), targets.clone(), eps), (6,), "the losses, one a position,").float()
        want = F.cross_entropy(logits, targets, reduction="none", label_smoothing=eps)  # (6,)
        plain = F.cross_entropy(logits, targets, reduction="none")
        expect(eps == 0 or not torch.allclose(got, plain, atol=1e-4), f"at eps = {eps} it is the plain cross-entropy")
        rest = (1 - eps) * plain - eps * logits.log_softmax(-1).sum(-1)
        expect(eps == 0 or not torch.allclose(got, rest, atol=1e-4), f"at eps = {eps} every token gets eps; all V of them share it")
        expect(torch.allclose(got, want, atol=1e-4), f"at eps = {eps} the losses differ from PyTorch's by up to {(got - want).abs().max():.2g}")


@exercise("objective-8", "Every document counts the same", "●●●", 45,
          "A document of 100 tokens weighs 50 times as much as one of 2. For equal documents, what must a token's weight be, and what the count?",
          "In `corrupt`: weights of shift(b), divided by the number of loss tokens of the token's document. In `count`: the number of documents that have any.",
          "For documents with 2 and 4 loss tokens the weights are 1/2, 1/2 and four times 1/4, and the count is 2.")
def by_document(answer: Any) -> None:
    o, model = instance(answer), small()
    def value(pieces: list[Batch]) -> tuple[float, float]:
        qs = [result(o.corrupt(p, Noise()), Batch) for p in pieces]
        sums = [sum(o.loss(model, q).values()) for q in qs]
        counts = [sum(o.count(q).values()) for q in qs]
        return float(torch.as_tensor(sum(sums)).detach()), float(sum(counts))
    each = []
    for d in DOCS:
        q = CLM().corrupt(collate([Example(d)]), Noise())
        each.append((CLM().loss(model, q)["clm"] / CLM().count(q)["clm"]).item())
    want = sum(each) / len(each)
    flat = CLM().corrupt(rows(False), Noise())
    by_token = (CLM().loss(model, flat)["clm"] / CLM().count(flat)["clm"]).item()
    single = [rows(False)[[n]] for n in range(len(DOCS))]
    for name, pieces in {"a row a document": [rows(False)], "all packed into one row": [rows(True)], "a batch a document": single}.items():
        total, n = value(pieces)
        expect(n > 0, f"{name}: the count is 0")
        expect(abs(total / n - by_token) > 1e-4, f"{name}: the loss is the mean over all tokens, so long documents weigh more")
        expect(n < 12, f"{name}: the count is {n:g}; it must be the number of documents, for the weights do the rest")
        expect(abs(total / n - want) < 1e-4, f"{name}: sum over count is not the mean of the {len(DOCS)} documents' own means")
    expect(set(o.count(o.corrupt(rows(), Noise()))) == set(o.loss(model, o.corrupt(rows(), Noise()))), "`count` and `loss` name different terms")
