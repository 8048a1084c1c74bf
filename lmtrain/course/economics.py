"The exercises of the chapter `economics`."
import math
from statistics import fmean
from typing import Any

import torch

from ..finetuning.economics import break_even
from .kit import Wrong, callable_of, exercise, expect, number


@exercise("economics-1", "The rule of thumb", "●", 5,
          "The rule is three times the tokens trained on, over the tokens saved.",
          "Two trainings cost twice as much as one.",
          "100 tokens trained once, 10 saved: 30 questions.")
def questions_needed(answer: Any) -> None:
    value, truth = number(answer), break_even(6 * 200_000, 2 * 400, 0, 2)
    expect(value != truth / 2, "that is for one training; it must be done twice")
    expect(value != truth / 3, "that leaves out that training makes each product three times")
    expect(abs(value - truth) < .5, "the operations of both were counted just now, and their ratio is another")


@exercise("economics-2", "Pairs that attend", "●", 5,
          "Position i attends to itself and to all positions before it.",
          "Add 1 for position 0, 2 for position 1, and so on up to T.",
          "For T = 2 there are three pairs.")
def attended(answer: Any) -> None:
    f = callable_of(answer, "a function of T")
    for T in (1, 3, 10):
        value, truth = number(f(T)), int(torch.ones(T, T).tril().sum())
        expect(T == 1 or value != T * T, f"T = {T}: that is all pairs, also those to later positions")
        expect(T == 1 or value != T * (T - 1) / 2, f"T = {T}: a position also attends to itself")
        expect(value == truth, f"T = {T}: a causal mask was made just now, and has another number of ones")


@exercise("economics-3", "What a cache saves", "●", 5,
          "Of all tokens of a prompt, which need not be read again?",
          "The examples' tokens over the prompt's tokens.",
          "Half of the prompt are examples: a half.")
def saved(answer: Any) -> None:
    f = callable_of(answer, "a function of two numbers")
    for prompt, examples in ((280, 256), (10, 0), (10, 5)):
        value = number(f(prompt, examples))
        expect(examples in (0, 5) or abs(value - (1 - examples / prompt)) > 1e-6, "that is what still must be read")
        expect(value <= 1, "a share is at most 1")
        expect(abs(value - examples / prompt) < 1e-6, f"prompt {prompt}, examples {examples}: counting tokens gives another share")


@exercise("economics-4", "Break-even by price", "●●", 15,
          "What does one question cost each way? Only reading differs.",
          "With examples: price_read for shots + query; tuned: price_tuned for the query alone.",
          "Training 10 tokens at 1, examples of 5 tokens at 2, no query: 10 over 10, one question.")
def by_price(answer: Any) -> None:
    f = callable_of(answer, "a function of six numbers")
    for case in ((1000, 50, 10, 20., 2., 3.), (500, 8, 4, 5., 1., 1.), (1000, 5, 100, 20., 2., 3.)):
        trained, shots, query, train, read, tuned = case
        try: value = float(f(*case))
        except ZeroDivisionError: raise Wrong(f"{case}: a division by zero; where nothing is saved the result is infinity") from None
        gain = read * (shots + query) - tuned * query
        if gain <= 0:
            expect(value == math.inf, f"{case}: a tuned question costs more than one with examples, so tuning never pays")
            continue
        expect(abs(value - train * trained / (read * shots)) > 1e-6 or tuned == read, f"{case}: a tuned model's own price for the query is missing")
        expect(abs(value - train * trained / gain) < 1e-6 * value, f"{case}: adding up the prices of both ways gives another number")


def same(a: float, b: float) -> bool: return a == b or abs(a - b) < 1e-6 * abs(b)


@exercise("economics-5", "Wrong answers cost, too", "●●", 15,
          "The expected cost of a question is its cost, and w times the probability that it is wrong.",
          "Add w * (1 - right) to each of the two costs before you take their difference.",
          "Both ways cost the same, tuning is right in one more of two: it saves w / 2 a question.")
def with_errors(answer: Any) -> None:
    f = callable_of(answer, "a function of six numbers")
    for case in ((100., 3., 1., .7, .9, 0.), (100., 3., 1., .7, .9, 10.), (100., 1., 1., .5, .9, 5.), (100., 1., 2., .9, .7, 5.)):
        training, prompted, tuned, rp, rt, w = case
        truth = break_even(training, prompted + w * (1 - rp), tuned + w * (1 - rt))
        try: value = float(f(*case))
        except ZeroDivisionError: raise Wrong(f"{case}: a division by zero; the expected costs of being wrong are missing") from None
        bare, flipped = break_even(training, prompted, tuned), break_even(training, prompted + w * rp, tuned + w * rt)
        expect(same(value, truth) or not same(value, bare), f"{case}: the cost of wrong answers is missing")
        expect(same(value, truth) or not same(value, flipped), f"{case}: w is paid for right answers here")
        expect(same(value, truth), f"{case}: the expected costs of both ways, added up by hand, give another number")


@exercise("economics-6", "An interval for the break-even", "●●●", 45,
          "Draw with replacement as many timings as there are, from each list, and compute the break-even of their means; do so a thousand times.",
          "Sort the thousand values; the 25th and the 975th are the ends. The middle is the break-even of the real means.",
          "If all timings are equal, all draws are equal, and the three numbers are the same.")
def bootstrap(answer: Any) -> None:
    f = callable_of(answer, "a function of a number and two lists")
    def three(training: float, a: list[float], b: list[float]) -> tuple[float, float, float]:
        found = f(training, list(a), list(b))
        expect(isinstance(found, tuple | list) and len(found) == 3, "the result must be three numbers: low, middle, high")
        low, middle, high = (float(v) for v in found)
        return low, middle, high
    low, middle, high = three(100., [3.] * 8, [1.] * 8)
    expect(abs(low - 50) < 1e-6 and abs(middle - 50) < 1e-6 and abs(high - 50) < 1e-6, "equal timings have an interval without width, at the break-even")
    dice = torch.Generator().manual_seed(1)
    draw = lambda n, mean: (mean + .5 * torch.randn(n, generator=dice)).tolist()       # noqa: E731
    a, b = draw(40, 3.), draw(40, 1.)
    low, middle, high = three(100., a, b)
    expect(abs(middle - 100 / (fmean(a) - fmean(b))) < 1e-6, "the middle must be the break-even of the means of the lists")
    expect(low < middle < high, "the middle must lie inside the interval")
    spread = 100 / 2 ** 2 * (2 * .25 / 40) ** .5 * 3.92                                # by the delta method
    expect(.6 * spread < high - low < 1.6 * spread, "the interval's width does not fit the spread of these timings: are whole lists drawn anew, with replacement, and 95 % kept?")
    low, middle, high = three(100., draw(6, 1.1), draw(6, 1.))
    expect(high == math.inf or low < 0 or high > 5 * middle, "where the difference is hardly larger than its noise, the interval must reach infinity")
    expect(low >= 0, "a drawn difference that is not positive has an infinite break-even, not a negative one")
