"The exercises of the chapter `adapt`."
from typing import Any

import torch

from ..batch import Example, Noise, collate
from ..finetuning.adapt import Supervised
from ..model import Size, Transformer, with_heads
from .kit import callable_of, exercise, expect, number, result, tensor


@exercise("adapt-1", "How much to replay", "●", 5,
          "A share of *all* items: the new ones are the rest.",
          "If 900 items are nine tenths of all, how many are one tenth?",
          "For a share of one half there are as many old items as new ones.")
def old_items(answer: Any) -> None:
    from ..finetuning.adapt import Replayed
    value, mixed = number(answer), Replayed(range(900), range(5000), .1)
    truth = len(mixed) - 900
    expect(value != 90, "that is a tenth of the new items; a tenth of all is wanted")
    expect(value != truth + 900, "that is how many items there are in all")
    expect(value == truth, "a mixture was made just now, and its number of old items is another")


@exercise("adapt-2", "The majority baseline", "●", 5,
          "The most frequent label of the *training* set; the test labels may not be used to choose it.",
          "collections.Counter(train).most_common(1) gives it; then count the test labels that are equal to it.",
          "train = [a, a, b], test = [b, b, a, b]: the answer is always a, and one of four is right.")
def majority(answer: Any) -> None:
    f = callable_of(answer, "a function of two lists")
    for train, test in (([0, 0, 1], [1, 1, 0, 1]), ([2, 2, 2], [2]), (list("abba" + "b"), list("bbba")), ([1, 1, 0], [0, 0])):
        value, best = number(f(list(train), list(test))), max({*train}, key=train.count)
        truth, peeked = test.count(best) / len(test), max(test.count(c) for c in {*test}) / len(test)
        told = f"train {train}, test {test}"
        expect(truth == peeked or abs(value - peeked) > 1e-9, f"{told}: the most frequent label of the test set was chosen, which nobody knows beforehand")
        expect(abs(value - test.count(best)) > 1e-9 or truth == test.count(best), f"{told}: that is a number of labels; their share is wanted")
        expect(abs(value - truth) < 1e-9, f"{told}: counting by hand gives another share")


@exercise("adapt-3", "Labels of tokens", "●", 5,
          "`labelled` shows what a position without a label holds.",
          "Replace None by -100, and put the list into the example's tokens under the name kind.",
          "Three tokens of which only the second has the class 4 have the column [-100, 4, -100].")
def token_labels(answer: Any) -> None:
    f = callable_of(answer, "a function of an Example and a list")
    labels = [None, 2, 0, None, 1]
    e = result(f(Example([1, 5, 6, 7, 2], tokens={"word": [0, 1, 2, 3, 4]}), list(labels)), Example)
    expect("kind" in e.tokens, "the column kind is missing")
    expect("word" in e.tokens, "the columns that were there are gone")
    column = list(e.tokens["kind"])
    expect(len(column) == 5, f"the column must have a number for each of the 5 tokens, and has {len(column)}")
    expect(None not in column, "None cannot be put into a tensor: what does a position without a label hold?")
    q = Supervised("kind").corrupt(collate([e]), Noise())
    expect(q.weights[0].tolist() == [float(v is not None) for v in labels], "Supervised puts other positions into the loss than those with a label")
    expect(column == [-100 if v is None else v for v in labels], "a label changed")


@exercise("adapt-4", "The mean hidden state", "●●", 15,
          "Padding must not count, neither in the sum nor in the number.",
          "Make a mask of doc > 0, multiply, sum over positions, divide by the sum of the mask.",
          "For a row of states 2, 4 and one of padding the mean is 3.")
def mean_state(answer: Any) -> None:
    f = callable_of(answer, "a function of h and doc")
    h, doc = torch.randn(3, 6, 4), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])  # (3,6,4) (3,6)
    got = tensor(f(h.clone(), doc.clone()), (3, 4), "the means")
    want = torch.stack([h[r, doc[r] > 0].mean(0) for r in range(3)])                   # (3,4)
    expect(not torch.allclose(got, h.mean(1), atol=1e-4), "padding counts as well")
    expect(not torch.allclose(got, torch.stack([h[r, (doc[r] > 0)].sum(0) / 6 for r in range(3)]), atol=1e-4), "the sum is right; it must be divided by the number of real tokens")
    expect(torch.allclose(got, want, atol=1e-4), "a row's mean over its real tokens is another")
    h[doc == 0] = 1e6
    expect(torch.allclose(f(h, doc), want, atol=1e-3), "what stands at padding changes the result")


@exercise("adapt-5", "A linear probe", "●●", 15,
          "Which parameters belong to the heads? Their names begin with heads.",
          "Go through model.named_parameters() and set requires_grad of each.",
          "To freeze the embedding only: model.embed_tokens.requires_grad_(False).")
def as_probe(answer: Any) -> None:
    f = callable_of(answer, "a function of a model with heads")
    torch.manual_seed(0)
    m = with_heads(Transformer(Size(20, 16, 2, layers=1, length=16)), label=3)
    m.requires_grad_(True)
    found = f(m)
    expect(found is not None, "the result is nothing: is a `return` missing?")
    trained = {n for n, p in found.named_parameters() if p.requires_grad}
    heads = {n for n, _ in found.named_parameters() if n.startswith("heads.")}
    expect(trained, "nothing is trained any more, the head neither")
    expect(not trained - heads, f"still trained, and no head: {', '.join(sorted(trained - heads)[:2])}")
    expect(trained == heads and heads, "a part of a head is frozen")


@exercise("adapt-6", "Elastic weight consolidation", "●●●", 45,
          "For each parameter: how far has it moved, and how much did the old loss depend on it?",
          "Sum over names of fisher times (p - start) squared, all elements; then half of it times the strength.",
          "One parameter 3 that began at 1 with F = 2 and strength 1: the penalty is 4.")
def penalty(answer: Any) -> None:
    f = callable_of(answer, "a function of a model, start, fisher and strength")
    m = torch.nn.Linear(3, 2)
    start = {n: p.detach().clone() for n, p in m.named_parameters()}
    fisher = {n: torch.rand_like(p) for n, p in start.items()}
    expect(abs(number(f(m, start, fisher, 10.0))) < 1e-6, "a model that has not moved must have a penalty of 0")
    with torch.no_grad():
        for p in m.parameters(): p.add_(torch.randn_like(p))
    got = f(m, start, fisher, 10.0)
    expect(isinstance(got, torch.Tensor) and got.ndim == 0 and got.requires_grad, "the penalty must be a scalar tensor with a gradient")
    want = sum(5.0 * (fisher[n] * (p - start[n]) ** 2).sum() for n, p in m.named_parameters())
    expect(not torch.allclose(got, 2 * torch.as_tensor(want), rtol=1e-3), "the half is missing")
    expect(not torch.allclose(got, torch.as_tensor(want) / 10, rtol=1e-3), "the strength is missing")
    plain = sum(5.0 * ((p - start[n]) ** 2).sum() for n, p in m.named_parameters())
    expect(not torch.allclose(got, torch.as_tensor(plain), rtol=1e-3), "all parameters count the same: the Fisher information is missing")
    expect(torch.allclose(got, torch.as_tensor(want), rtol=1e-4), "the value differs from the sum over parameters, element by element")
    own = torch.autograd.grad(got, m.weight)[0]
    expect(torch.allclose(own, 10.0 * fisher["weight"] * (m.weight - start["weight"]), rtol=1e-3, atol=1e-5), "the gradient must be strength times F times the distance")
