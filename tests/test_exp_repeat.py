"""The experiment `repeat`: hidden inputs and untouched questions, what counts as overtaking, verdicts on made-up curves."""
import math

import pytest
import torch

from lmtrain.batch import Example, Noise, collate
from lmtrain.experiments.repeat import REPEATED, GappedCLM, arms, best, crossing, plot, run, verdict
from lmtrain.objective import CLM


@pytest.fixture(scope="module")
def rows(): return [{"seed": 0, **r} for r in run(0, 0.01)]


def test_run(rows):
    "Five curves; laws hold; one seed shows nothing; the plot is drawn."
    assert {r["arm"] for r in rows} == {*arms(3)}
    v = verdict(rows)
    assert all(v.checks.values()) and not v.shown and len(plot(rows).axes) == 1


def test_hidden_inputs():
    "The questions are those of CLM, a third of the inputs is hidden but no first one; rate 0 is CLM, bit for bit."
    b = collate([Example(list(range(7, 57)), index=n) for n in range(200)])
    plain, q = CLM().corrupt(b, Noise(1)), GappedCLM(3).corrupt(b, Noise(1))
    assert torch.equal(q.targets, plain.targets) and torch.equal(q.weights, plain.weights) and torch.equal(q.order, plain.order)
    hit = q.ids == 3
    assert torch.equal(q.ids[~hit], b.ids[~hit]) and not hit[:, 0].any()
    n = 200 * 49
    assert abs(hit.sum() - .3 * n) < 5 * (n * .21) ** .5
    assert torch.equal(GappedCLM(3, 0.).corrupt(b, Noise(1)).ids, plain.ids)
    assert not torch.equal(q.ids, GappedCLM(3).corrupt(b, Noise(2)).ids)


def test_best_does_not_look_at_its_own_play():
    "The epoch is the other play's; control: the smallest number of the reported play is another."
    row = {"choose": [5, 3, 2, 4], "report": [5, 1, 3, 4]}
    assert best(row) == 3 != min(row["report"])


def test_crossing():
    "Against the curve at the same epoch, and its last value behind its end; never is infinite."
    causal = {"epoch": [0, 1, 2, 4], "report": [5, 3, 4, 6]}
    at = lambda *y: crossing(causal, {"epoch": [0, 1, 2, 4, 8], "report": list(y)})
    assert at(5, 4, 4.5, 5.9, 5) == 4 and at(5, 4, 4.5, 6.1, 5.9) == 8 and at(5, 4, 4.5, 7, 7) == math.inf
    assert at(1, 4, 4.5, 7, 7) == math.inf                                             # untrained does not count


def made_up(diffusion):
    "Three seeds: causal arms fall to 3 and rise; diffusion ends at a number."
    curves = {a: [5, 3, 4, 6] for a in (*REPEATED, "causal, fresh text")} | {"diffusion": [5, 4.5, 4, diffusion]}
    return [{"seed": s, "arm": a, "epoch": [0, 1, 2, 4], "choose": [v + .01 * s for v in c], "report": [v + .01 * s for v in c]}
            for s in range(3) for a, c in curves.items()]


def test_verdict():
    "Below every causal minimum: shown. Below the curve but not its minimum: not shown, and the crossing is told."
    assert verdict(made_up(2.5)).shown
    late = verdict(made_up(3.5))
    assert not late.shown and "in 3 of 3 runs, at epoch 4 to 4" in late.found
    assert "in 0 of 3 runs" in verdict(made_up(9)).found
    better = [{**r, "report": [1.0] * 4} if r["arm"] == "causal, inputs hidden" else r for r in made_up(2.5)]
    assert not verdict(better).shown                                                   # one arm is enough
    law = "causal arms begin with the same weights"
    assert verdict(made_up(2.5)).checks[law] and not verdict(better).checks[law]           # and its other start is seen
