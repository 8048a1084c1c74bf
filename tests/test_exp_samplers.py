"""The experiment `samplers`: matrices against simulation with the package's own sampler, verdicts on made-up rows, controls."""
import numpy as np
import pytest
import torch

from lmtrain.experiments.samplers import (
    CANVASES, GAP, RANKS, TEXTS, chains, checks, conditionals, moves, picks, plot, run, text_probs, toys,
    verdict)
from lmtrain.generation import confident
from lmtrain.objectives.samplers import ancestral, denoise, first_hitting, most_confident, max_prob, token_prob


@pytest.fixture(scope="module")
def rows(): return [{"seed": 0, **r} for r in run(0, 0.01)]


@pytest.fixture(scope="module")
def q(): return conditionals(np.random.default_rng(3).dirichlet([.5] * 27).reshape(3, 3, 3))


def test_run_and_laws(rows):
    "At a hundredth of the size every sampler and the unseen text are there, the laws hold, the plot is drawn."
    arms = {r["arm"] for r in rows}
    assert {*picks(4, 0), "unseen text", "ancestral 1"} <= arms
    assert all(checks(rows).values()) and not verdict(rows).shown and len(plot(rows).axes) == 2


def test_forwards(rows):
    "A step that writes is one question to the model; ancestral steps that write nothing ask nothing."
    asked = {r["arm"]: r["asked"] for r in rows if "asked" in r}
    assert asked["blind"] == asked["surest draw"] == asked["blocks of 16"] == 16 and asked["four draws a step"] == 4
    assert asked["ancestral 16"] <= 16 and asked["ancestral 64"] <= 32 and asked["threshold .9"] <= 16


@pytest.mark.parametrize("name, steps, sure", [("blind", first_hitting(3), token_prob), ("surest draw", most_confident(3, 3), token_prob),
                                               ("surest place", most_confident(3, 3), max_prob), ("ancestral 2", ancestral(2), token_prob)])
def test_matrices_are_what_the_sampler_does(q, name, steps, sure):
    "60,000 texts by `denoise` against the matrices: chi-square below its 1e-6 quantile (83 for 26 degrees of freedom)."
    logits = torch.cat([q.log(), torch.zeros(64, 3, 1)], 2)                            # (64,3,4)
    perfect = lambda canvas: logits[(canvas * torch.tensor([16, 4, 1])).sum(1)]
    n = 60000
    ids = denoise(perfect, torch.full((n, 3), GAP), GAP, steps, confidence=sure, seed=5).ids
    seen = torch.bincount((ids * torch.tensor([9, 3, 1])).sum(1), minlength=27)        # (27,)
    chi = lambda p: float(((seen - n * p) ** 2 / (n * p).clamp(min=1e-9))[n * p > 5].sum())
    assert chi(text_probs(chains(q)[name])) < 83
    other = "surest draw" if name != "surest draw" else "blind"
    assert chi(text_probs(chains(q)[other])) > 1000                                           # control: another sampler's law


def test_moves(q):
    "Each row is a distribution; whole texts stay; a pick of one place fills one gap."
    K = moves(q, confident(1), token_prob)
    assert torch.allclose(K.sum(1), torch.ones(64).double()) and (K[TEXTS, TEXTS] == 1).all()
    gaps = torch.tensor([z.count(GAP) for z in CANVASES])
    assert all(gaps[m] == max(0, gaps[n] - 1) for n, m in K.nonzero().tolist())


def test_seeds():
    assert toys(0, 1) == toys(0, 1) != toys(1, 1)


def made_up(rows, off, distinct):
    change = {"surest draw": {"tv": off, "distinct": distinct}, "blind": {"distinct": 0.9}}
    return [{**r, **{k: v + .01 * s for k, v in change.get(r["arm"], {}).items()}, "seed": s} for s in range(3) for r in rows]


def test_verdict(rows):
    "Shown if the surest draw is off and repeats itself; not if it is as varied, or exact, or if a law is broken."
    assert verdict(made_up(rows, .4, .5)).shown
    assert not verdict(made_up(rows, .4, .9)).shown and not verdict(made_up(rows, .01, .5)).shown
    broken = [{**r, "worst": 1e-6} if r["arm"] == "blind" else r for r in made_up(rows, .4, .5)]
    assert not verdict(broken).shown


def test_each_law_sees_its_mistake(q):
    "Negative controls: the biased order called exact; ancestral steps with the wrong rate; a walk that stops too early."
    good = toys(0, 1)
    as_rows = lambda t: [{"arm": a, "seed": 0, **v} for a, v in t.items()]
    biased = {**good, "blind": good["surest draw"]}
    slow = {**good, "ancestral 64": good["ancestral 16"]}
    short = {**good, "blind": {**good["blind"], "mass": float(text_probs(chains(q)["blind"][:2]).sum())}}
    assert all(checks(as_rows(good)).values()) and {*RANKS} <= {*good}
    for wrong in (biased, slow, short): assert not all(checks(as_rows(wrong)).values())
