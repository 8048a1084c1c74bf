"The exercises of the chapter `start`."
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kit import callable_of, exercise, expect, number, tensor

TEXT = "the cat sat on the mat and the dog sat on the log. a cat and a dog ran to the mat, and the log ran on. "


def ids_of(text: str) -> tuple[Tensor, int]:
    "A text as numbers of its characters, and how many different ones it has."
    chars = sorted(set(text))
    return torch.tensor([chars.index(c) for c in text]), len(chars)                    # (T,)


@exercise("start-1", "The loss of a model that knows nothing", "●", 5,
          "A model that gives every character the same probability: look at the formula of the loss, with that one number in it.",
          "Each of V characters has probability 1/V. The loss is the mean of -log p, and here all terms are equal.",
          "For two characters, a fair coin, it is log 2, whatever the text.")
def uniform(answer: Any) -> None:
    value = number(answer)
    logits = torch.zeros(50, 27)                                                       # (50,27)
    truth = F.cross_entropy(logits, torch.randint(27, (50,))).item()                   # the run behind the number
    expect(abs(value - truth / math.log(2)) > .01, "that is the number in bits; the question is in nats, with the natural logarithm")
    expect(abs(value - math.exp(truth)) > .01, "that is how many characters there are: the perplexity. The loss is its logarithm")
    expect(abs(value + truth) > .01, "the size is right and the sign is not: a loss is the negative logarithm of a probability")
    expect(abs(value - truth) < .01, "a model with 27 equally likely characters was scored just now, and its loss is another number")


@exercise("start-2", "The negative log-likelihood of a text", "●", 5,
          "The chapter scores a whole text with a table of pairs; here the table is P, and the text is ids.",
          "P[a, b] is the probability of b after a. Take ids[:-1] for the a's and ids[1:] for the b's.",
          "With a table in which all four entries are 1/2, any text of zeros and ones costs log 2 a character.")
def pair_nll(answer: Any) -> None:
    f = callable_of(answer, "a function of P and ids")
    P = torch.tensor([[.5, .5], [.25, .75]])                                           # (2,2)
    for ids in ([0, 1], [1, 0], [0, 1, 1, 0], [1, 1, 1, 0, 0]):
        pairs = list(zip(ids, ids[1:], strict=False))
        truth = -sum(math.log(P[a, b].item()) for a, b in pairs) / len(pairs)
        value = number(f(P, torch.tensor(ids)))
        told = f"for P = {P.tolist()} and ids = {ids}"
        expect(abs(value + truth) > 1e-4, f"{told} the result is negative; a loss is the negative logarithm")
        expect(len(pairs) == 1 or abs(value - truth * len(pairs)) > 1e-4, f"{told} that is the sum over the pairs; the loss is their mean")
        swapped = -sum(math.log(P[b, a].item()) for a, b in pairs) / len(pairs)
        expect(abs(value - truth) < 1e-4 or abs(value - swapped) > 1e-4, f"{told} it is the probability of the first after the second")
        expect(abs(value - truth) < 1e-4, f"{told} summing by hand over the {len(pairs)} pairs gives another number")


@exercise("start-3", "Perplexity", "●", 5,
          "Perplexity is defined beside the loss of the uniform model.",
          "The perplexity of a loss L in nats is exp(L); turn that round for the question.",
          "A model that hesitates between two characters has a loss of log 2, and one that hesitates between 4 has twice as much.")
def perplexity(answer: Any) -> None:
    f = callable_of(answer, "a function of a loss in nats")
    for n in (2, 10, 81, 1):
        value, loss = number(f(math.log(n))), math.log(n)
        expect(n == 1 or abs(value - 2 ** loss) > 1e-3, f"for a loss of log {n} that is 2 to the power of the loss, which is for bits")
        expect(n == 1 or abs(value - loss) > 1e-3, f"for a loss of log {n} the result is the loss itself")
        expect(abs(value - n) < 1e-3, f"a model that chooses among {n} equally likely characters has a loss of log {n}; "
                                      f"the perplexity of that loss is another number than your function's")


@exercise("start-4", "Sampling at a temperature", "●●", 15,
          "A temperature divides the logits before the softmax.",
          "Write softmax(logits / temperature). Then think of a temperature of exactly 0: which character has all the probability?",
          "With logits 0 and 1 and a temperature of 1/2, the probabilities are those of logits 0 and 2.")
def sharpen(answer: Any) -> None:
    f = callable_of(answer, "a function of logits and a temperature")
    z = torch.randn(5, 9)                                                              # (5,9)
    for temperature in (1., .5, 2.):
        p = tensor(f(z.clone(), temperature), (5, 9), "the probabilities")
        expect((p >= 0).all() and torch.allclose(p.sum(-1), torch.ones(5), atol=1e-5), f"at temperature {temperature} the probabilities of each row must sum to 1")
        expect((p.argmax(-1) == z.argmax(-1)).all(), f"at temperature {temperature} the likeliest character must stay the likeliest")
        odds = p.log() - p.log()[:, :1]
        expect(temperature == 1 or not torch.allclose(odds, z - z[:, :1], atol=1e-3), f"at temperature {temperature} nothing changed")
        expect(temperature == 1 or not torch.allclose(odds, (z - z[:, :1]) * temperature, atol=1e-3), f"at temperature {temperature} it works the wrong way round: a lower temperature is surer of itself")
        expect(torch.allclose(odds, (z - z[:, :1]) / temperature, atol=1e-3), f"at temperature {temperature} the log-odds of two characters must be their difference of logits, over the temperature")
    cold = tensor(f(z.clone(), 0.), (5, 9), "the probabilities at temperature 0")
    expect(torch.isfinite(cold).all(), "at temperature 0 there is a division by zero; that temperature means: always the likeliest character")
    expect((cold.amax(-1) > .999).all() and (cold.argmax(-1) == z.argmax(-1)).all(), "at temperature 0 all the probability belongs to the likeliest character")


@exercise("start-5", "Three characters, with back-off", "●●", 15,
          "Contexts of two characters that never occurred have no counts: a row of zeros cannot be divided by its sum.",
          "Count with bincount over (x[:-2] * V + x[1:-1]) * V + x[2:], view as (V, V, V), and put the pair table's row where a context's sum is 0.",
          "In the text 'abab' the context 'ba' was followed by b once, so P('b' after 'ba') = 1; 'bb' never occurred, so its row is that of 'b'.")
def trigram(answer: Any) -> None:
    f = callable_of(answer, "a function of x and V")
    x, V = ids_of(TEXT)
    P = tensor(f(x, V), (V, V, V), "the table")
    expect(torch.isfinite(P).all(), "some entries are not finite: a context that never occurred was divided by 0")
    counts, pairs = torch.zeros(V, V, V), torch.zeros(V, V)                            # (V,V,V) (V,V)
    for a, b, c in zip(x[:-2], x[1:-1], x[2:], strict=True): counts[a, b, c] += 1
    for b, c in zip(x[:-1], x[1:], strict=True): pairs[b, c] += 1
    seen = counts.sum(-1) > 0                                                          # (V,V)
    sums = P.sum(-1)                                                                   # (V,V)
    expect((sums[~seen] > .5).all(), "the row of a context that never occurred is empty: back off to the pair table there")
    expect(torch.allclose(sums, torch.ones(V, V), atol=1e-4), "each row P[a, b] must sum to 1")
    want = counts[seen] / counts[seen].sum(-1, keepdim=True)                           # (n,V)
    crossed = counts.transpose(0, 1)[seen] / counts.transpose(0, 1)[seen].sum(-1, keepdim=True)
    expect(torch.allclose(P[seen], want, atol=1e-4) or not torch.allclose(P[seen], crossed, atol=1e-4, equal_nan=True), "P[a, b, c] has a and b exchanged")
    expect(torch.allclose(P[seen], want, atol=1e-4), "for a context that did occur, P[a, b, c] is not the share of c among what followed; did a pair that occurs twice count once?")
    back = (pairs / pairs.sum(-1, keepdim=True))[None].expand(V, V, V)[~seen]          # (m,V)
    expect(torch.allclose(P[~seen], back, atol=1e-4), "for a context 'ab' that never occurred, the row must be the pair table's row of b, the last character")


class Looks(nn.Module):
    "A row of numbers in which position i reads the positions that `mask` (T,T) allows, and nothing else."
    def __init__(self, mask: Tensor, V: int = 11):
        super().__init__()
        self.mask, self.table = mask.float(), nn.Embedding(V, V)

    def forward(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        return self.mask[:T, :T] @ self.table(ids)                                     # (B,T,V)


@exercise("start-6", "Find the leak", "●●●", 45,
          "A model that may look at the next character predicts it for nothing: the loss falls to almost 0, and a text that it writes, where the next character is not there yet, is nonsense. Test for it by changing characters.",
          "Run the model on ids, change one character at position j, run it again, and compare the logits at positions before j.",
          "A model that reads only the current character never changes before j. The reverse, one that reads the whole row, changes at position 0 when the last character does.")
def leaks(answer: Any) -> None:
    f = callable_of(answer, "a function of a model and ids")
    T = 12
    ids, one = torch.randint(11, (1, T)), torch.ones(T, T)                             # (1,12) (12,12)
    far = one.tril(); far[2, 9] = 1                                                    # (12,12)
    cases = {"reads everything": (one, True), "is causal": (one.tril(), False), "reads one character ahead": (one.tril(1), True),
             "reads only the current character": (torch.eye(T), False), "is causal, but position 2 reads position 9": (far, True)}
    for name, (mask, leak) in cases.items():
        found = f(Looks(mask), ids.clone())
        expect(isinstance(found, bool | torch.Tensor), f"the result must be True or False, and it is {type(found).__name__}")
        expect(bool(found) == leak, f"a model that {name}: your function {'misses the leak' if leak else 'sees a leak where there is none'}")
