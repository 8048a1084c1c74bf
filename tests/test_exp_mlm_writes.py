"""The experiment `mlm-writes`: what is hidden and kept, a judge that cannot be mistaken, verdicts on made-up rows, controls."""
import numpy as np
import pytest
import torch

from lmtrain.experiments.mlm_writes import GAPS, RATES, TASKS, T, arms, cost, hidden, marks, plot, run, verdict, windows, written
from lmtrain.model import Size, Transformer


@pytest.fixture(scope="module")
def rows(): return [{"seed": 0, **r} for r in run(0, 0.01)]


def model(causal, seed=0):
    torch.manual_seed(seed)
    m = Transformer(Size(40, 16, heads=2, layers=1, length=80)).eval()
    m.causal = causal
    return m


def test_run(rows):
    "Six writers, two tasks; laws hold; one seed shows nothing; the plot is drawn."
    assert {r["arm"] for r in rows} == {f"{a}: {t}" for a in arms(3, range(7, 40)) for t in TASKS}
    v = verdict(rows)
    assert all(v.checks.values()) and not v.shown and len(plot(rows).axes) == 2


def test_hidden():
    "Half of each window in both tasks, never its first token; the gaps of `fill` differ by row and seed."
    both = hidden(50, 3)
    for todo in both.values(): assert (todo.sum(1) == GAPS).all() and not todo[:, 0].any()
    assert both["go on"][:, T - GAPS:].all() and (both["fill"][0] != both["fill"][1]).any()
    assert torch.equal(both["fill"], hidden(50, 3)["fill"]) and not torch.equal(both["fill"], hidden(50, 4)["fill"])
    share = both["fill"][:, 1:].double().mean(0)                                       # (T-1,) each place alike: 50.8 %
    assert abs(share - GAPS / (T - 1)).max() < 5 * (.25 / 50) ** .5


@pytest.mark.parametrize("causal", [True, False])
def test_written(causal):
    "What is visible stays, what is hidden cannot matter, the seed decides; the mask is never an answer of both-sided models."
    ids, m = windows(np.random.default_rng(0).integers(7, 40, size=500), 6, 0), model(causal)
    for todo in hidden(6, 1).values():
        new = written(m, ids, todo, 3, 5)
        assert torch.equal(new[~todo], ids[~todo]) and torch.equal(new, written(m, ids, todo, 3, 5))
        other = torch.where(todo, (ids + 1) % 40, ids)
        assert torch.equal(new, written(m, other, todo, 3, 5))                        # control: it never peeked
        assert not torch.equal(new, written(m, ids, todo, 3, 6))
        if not causal: assert (new[todo] != 3).all()


def test_marks():
    "The real text has no excess and is right; repeated text is less different; a peek at what is visible is seen."
    ids, judge = windows(np.random.default_rng(0).integers(7, 40, size=500), 6, 0), model(True)
    todo = hidden(6, 1)["fill"]
    same = marks(ids, ids, todo, judge, 1)
    assert same["excess"] == 0 and same["right"] == 1 and same["kept"]
    dull = marks(torch.where(todo, 9, ids), ids, todo, judge, 1)
    assert dull["different"] < same["different"] and dull["right"] < .2 and dull["kept"]
    assert not marks(torch.full_like(ids, 9), ids, todo, judge, 1)["kept"]
    first = ids.clone(); first[:, 0] = 9
    last = ids.clone(); last[:, -1] = 9
    assert cost(judge, first, 1) != cost(judge, ids, 1) != cost(judge, last, 1)


def test_longer_is_as_many_answers():
    "The control's steps times its share of the tokens are the causal model's."
    objective, times = arms(3, range(7, 40))["masked .3, longer"]
    assert objective.rate * times == pytest.approx(1) and {t for n, (_, t) in arms(3, range(7, 40)).items() if "longer" not in n} == {1}


def made_up(rows, fill, go):
    "Rows of three seeds where one rate is this much above the causal model."
    extra = {"masked .3: fill": fill, "masked .3: go on": go}
    return [{**r, "excess": 1 + extra.get(r["arm"], .5 * ("masked" in r["arm"])) + .01 * s, "seed": s} for s in range(3) for r in rows]


def test_verdict(rows):
    "Shown only if one rate is ahead in both tasks."
    assert len(RATES) == 3 and verdict(made_up(rows, -.2, -.2)).shown
    assert not verdict(made_up(rows, -.2, .2)).shown and not verdict(made_up(rows, .2, -.2)).shown
    cheated = [{**r, "kept": False} if r["arm"] == "masked .3: fill" else r for r in made_up(rows, -.2, -.2)]
    uneven = [{**r, "gaps": 33} if r["arm"] == "masked .3: fill" else r for r in made_up(rows, -.2, -.2)]
    for wrong in (cheated, uneven): assert not verdict(wrong).shown and not all(verdict(wrong).checks.values())
