"""The experiment `mixed`: pairs that differ in one thing, both ways of asking, margins on made-up rows, controls."""
import re
from collections import Counter

import pytest
import torch

from lmtrain.batch import Example
from lmtrain.experiments.mixed import (
    MIXTURES, SHARES, VERBS, above, agreement, arms, damaged, learnt, plot, run, same, verdict)
from lmtrain.objective import CLM


@pytest.fixture(scope="module")
def rows(): return [{"seed": 0, **r} for r in run(0, 0.01)]


def test_run(rows):
    "Seven arms and two laws; one seed shows nothing; the plot is drawn."
    assert {r["arm"] for r in rows} == {*SHARES, "turns", "phases", "law, causal", "law, masked"}
    v = verdict(rows)
    assert all(v.checks.values()) and len(v.checks) == 2 and not v.shown and len(plot(rows).axes) == 3


def test_pairs_differ_in_one_thing():
    "Swapped: the same words in another order. Replaced: one word, about as frequent. Agreement: one verb of the same kind."
    text = "the quick fox and the slow dog went to the old house by the sea and the fox was glad to be there"
    count = Counter(re.findall(r"\b[a-z]+\b", text))
    some = damaged([text, "No Words Here"], count, 0)
    (right, swapped), (same_, replaced) = some["order"][0], some["word"][0]
    assert len(some["order"]) == len(some["word"]) == 1 and right == same_ == text
    assert sorted(swapped.split()) == sorted(text.split()) and sum(a != b for a, b in zip(swapped.split(), text.split(), strict=True)) == 2
    changed = [(a, b) for a, b in zip(text.split(), replaced.split(), strict=True) if a != b]
    rank = [w for w, _ in count.most_common()]
    assert len(changed) == 1 and abs(rank.index(changed[0][0]) - rank.index(changed[0][1])) == 1
    be, have = {v for _, v in VERBS[:6]}, {v for _, v in VERBS[6:]}
    for right, wrong in agreement():
        a, b = right.split(), wrong.split()
        assert a[0] == b[0] and a[2:] == b[2:] and a[1] != b[1] and (a[0], a[1]) in VERBS and (b[0], b[1]) not in VERBS
        assert {a[1], b[1]} <= be or {a[1], b[1]} <= have
    assert len({*agreement()}) == 96


def test_pure_shares_are_pure():
    "Share 1 is CLM bit for bit after three steps; control: share 1/2 is not."
    rows = [Example([1, *range(7 + n % 20, 30 + n % 20)], [False] + [True] * 23, index=n) for n in range(32)]
    objectives = arms(3, range(7, 60))
    pure = learnt(CLM(), rows, 3, 0, 60)
    assert same(pure, learnt(objectives["causal"], rows, 3, 0, 60))
    assert not same(pure, learnt(objectives["1/2"], rows, 3, 0, 60)) and not same(pure, learnt(CLM(), rows, 3, 1, 60))


def test_turns_and_phases():
    "Whole epochs: turns ask C M C M, phases C C M M."
    objectives = arms(3, range(7, 60))
    asked = {n: [objectives[n].shares(e)[0] for e in range(4)] for n in ("turns", "phases", "1/4")}
    assert asked == {"turns": [1, 0, 1, 0], "phases": [1, 1, 0, 0], "1/4": [.25] * 4}


def made_up(rows, left, gaps):
    "Three seeds in which the mixture of halves is these per cents above the pure models, and all others 50 %."
    def one(r, s):
        if "law" in r["arm"]: return {**r, "seed": s}
        more = {"1/2": (left, gaps), "causal": (0, 50), "masked": (50, 0)}.get(r["arm"], (50, 50))
        return {**r, "left_to_right": (2 + .1 * s) * (1 + more[0] / 100 + .001 * s), "gaps": (6 + .1 * s) * (1 + more[1] / 100), "seed": s}
    return [one(r, s) for s in range(3) for r in rows]


def test_verdict(rows):
    "Within 2 % in both: shown. Within one only, or a mean within and an interval beyond, or a broken law: not shown."
    assert "1/2" in MIXTURES and verdict(made_up(rows, .5, -3)).shown
    assert not verdict(made_up(rows, 5, -3)).shown and not verdict(made_up(rows, .5, 5)).shown
    wide = [{**r, "gaps": r["gaps"] * (1 + .03 * (r["seed"] - 1))} if r["arm"] == "1/2" else r for r in made_up(rows, .5, 0)]
    mean, _, high = above(wide, "1/2", "gaps", "masked")
    assert mean < 2 < high and not verdict(wide).shown
    assert not verdict([{**r, "same": False} if r["arm"] == "law, causal" else r for r in made_up(rows, .5, -3)]).shown


def test_seeds():
    "The same seed makes the same model, another seed another."
    rows = [Example([1, *range(7, 20)], [False] + [True] * 13, index=n) for n in range(16)]
    a, b, c = (learnt(arms(3, range(7, 60))["1/4"], rows, 2, s, 60) for s in (0, 0, 1))
    assert same(a, b) and not same(a, c) and all(torch.isfinite(p).all() for p in a.parameters())
