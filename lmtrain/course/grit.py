"The exercises of the chapter `grit`."
from typing import Any

import torch

from .kit import callable_of, exercise, expect, number, result, tensor


@exercise("grit-1", "What a cache saves", "●", 5,
          "Without a cache every question reads the document again.",
          "With a cache the document is read once; the questions are read in both cases.",
          "With 3 questions of 5 tokens behind 10 tokens, 20 are saved.")
def saved(answer: Any) -> None:
    value = number(answer)
    expect(value != 500 * 40, "the document is read once with a cache, too")
    expect(value != 40 * 520, "that is what is read without a cache; the difference is wanted")
    expect(value != 500 + 40 * 20, "that is what is read with a cache; the difference is wanted")
    expect(value == 500 * 39, "count the tokens of both ways, document and questions")


@exercise("grit-2", "One column, two ways to read", "●", 10,
          "A position may read another if its order is not smaller than the other's.",
          "Equal numbers let all read all; rising numbers let each read what came before.",
          "row_order(3, False) is [0, 1, 2].")
def row_order(answer: Any) -> None:
    f = callable_of(answer, "a function of n and embedded")
    for n in (1, 4, 7):
        both, causal = (result(f(n, way), list) for way in (True, False))
        expect(len(both) == len(causal) == n, f"the list for n = {n} must have {n} numbers")
        expect(n == 1 or both != list(range(n)) or causal != [0] * n, "the two kinds of rows are exchanged")
        expect(both == [0] * n, "a row that is embedded has the same number everywhere: 0")
        expect(causal == list(range(n)), "a row that is written counts its positions from 0")


@exercise("grit-3", "Two means", "●", 5,
          "The mean over rows counts both rows the same.",
          "The mean over tokens counts the first row three times as much as the second.",
          "With 3 and 1 tokens and losses of 1 and 2 the difference is 0.25.")
def larger(answer: Any) -> None:
    value = number(answer)
    expect(abs(value - 3) > 1e-9, "that is the mean over rows; its difference from the mean over tokens is wanted")
    expect(abs(value - 2.5) > 1e-9, "that is the mean over tokens; the difference is wanted")
    expect(abs(value + .5) > 1e-9, "the sign is wrong: the short row costs more, and counts more in the mean over rows")
    expect(abs(value - .5) < 1e-9, "compute both means: over two rows, and over forty tokens")


@exercise("grit-4", "The mask of a prefix", "●●", 15,
          "A causal mask is a lower triangle; what may the first n positions read in addition?",
          "Query i may read key j if j is not later than i, or if both are in the prefix.",
          "For n = 2 and T = 3 the rows are 110, 110, 111.")
def prefix_mask(answer: Any) -> None:
    f = callable_of(answer, "a function of n and T")
    for n, T in ((2, 5), (0, 4), (4, 4), (1, 3)):
        got = tensor(f(n, T), (T, T), "queries and keys").bool()
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]                         # (T,1) (1,T)
        truth = (j <= i) | (i < n) & (j < n)                                           # (T,T)
        if n > 1:
            expect(not torch.equal(got, j <= i), "the prefix is read causally; it is to be read in both directions")
            expect(n == T or not torch.equal(got, (j <= i) | (i < n)), "positions of the prefix read what comes behind it")
            expect(not torch.equal(got, ~truth), "true and false are exchanged: true means that a key is read")
            expect(n == T or not torch.equal(got, truth.T), "rows and columns are exchanged: a row is a query")
        expect(torch.equal(got, truth), f"for n = {n} and T = {T} the mask is another")


@exercise("grit-5", "Groups of rows", "●●", 20,
          "With groups of one row it is the mean over rows, with one group the mean over all tokens.",
          "Go through the rows in steps of sub; put a group's token losses together, take their mean, then the mean of the means.",
          "For [[1, 1], [3], [5]] and sub = 2: the groups have 5/3 and 5, and the result is 10/3.")
def grouped_mean(answer: Any) -> None:
    f = callable_of(answer, "a function of rows and sub")
    rows = [[1., 1.], [3.], [5., 6., 7.], [2.], [9., 2.]]
    flat = [v for r in rows for v in r]
    token, row = sum(flat) / len(flat), sum(sum(r) / len(r) for r in rows) / len(rows)
    for sub in (2, 1, 5, 3):
        groups = [[v for r in rows[i:i + sub] for v in r] for i in range(0, len(rows), sub)]
        truth = sum(sum(g) / len(g) for g in groups) / len(groups)
        got = number(f([list(r) for r in rows], sub))
        if sub in (2, 3):
            expect(abs(got - token) > 1e-9, "that is the mean over all tokens, whatever the groups")
            expect(abs(got - row) > 1e-9, "that is the mean over rows, whatever the groups")
            means = [sum(r) / len(r) for r in rows]
            by_row = sum(sum(g) / len(g) for g in (means[i:i + sub] for i in range(0, len(rows), sub))) / len(groups)
            expect(abs(got - by_row) > 1e-9, "inside a group the mean is over tokens, not over rows")
        expect(abs(got - truth) < 1e-6, f"for sub = {sub} it is another number")


@exercise("grit-6", "How large a cache is", "●●●", 50,
          "What is kept of each token, in each layer?",
          "A key and a value a head, each of head_dim numbers.",
          "One layer, one head of 2, three tokens in 4 bytes: 48.")
def cache_bytes(answer: Any) -> None:
    f = callable_of(answer, "a function of layers, kv_heads, head_dim, tokens and bytes_each")
    for a in ((32, 8, 128, 4000, 4), (1, 1, 2, 3, 4), (2, 3, 5, 7, 1)):
        got, truth = number(f(*a)), 2 * a[0] * a[1] * a[2] * a[3] * a[4]
        expect(got != truth / 2, "keys and values are kept, both")
        expect(a[4] == 1 or got != truth / a[4], "that is the number of numbers; each has several bytes")
        expect(a[0] == 1 or got != truth / a[0], "every layer has keys and values of its own")
        expect(got == truth, "count what is kept of one token in one layer, and multiply")
