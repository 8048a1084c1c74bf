"""The experiment `bound`: its laws by another route, what it says of made-up rows, and the mistakes that it would see."""
from itertools import product

import numpy as np
import pytest
import torch

from lmtrain.experiments.bound import ARMS, SETS, TEXTS, expected, checks, orders, perfect, plot, prices, run, toy, verdict
from lmtrain.objectives.diffusion import linear


@pytest.fixture(scope="module")
def rows(): return [{"seed": 0, **r} for r in run(0, 0.01)]


def made_up(rows, bits):
    "The small language's rows of a real run, and plays with these bits per byte, for three seeds."
    small = [r for r in rows if r["arm"] not in ARMS]
    plays = [{"arm": a, "bits": b + 0.01 * s} for s in range(3) for a, b in zip(ARMS, bits, strict=True)]
    return [{**r, "seed": s} for s in range(3) for r in small] + [{**r, "seed": n // 3} for n, r in enumerate(plays)]


def test_run_and_laws(rows):
    "At a hundredth of the size: every arm is there, every law holds, the plot is drawn."
    assert {r["arm"] for r in rows} == {"perfect", "ignorant", *ARMS}
    assert all(checks(rows).values()) and not verdict(rows).shown  # one seed has no interval
    assert len(plot(rows).axes) == 2


def test_verdict(rows):
    "Shown with the order of the claim; not shown if diffusion is as cheap as blocks, or if a law is broken."
    assert verdict(made_up(rows, (2.3, 2.5, 3.0))).shown
    assert not verdict(made_up(rows, (2.3, 2.5, 2.5))).shown and not verdict(made_up(rows, (2.5, 2.3, 3.0))).shown
    broken = made_up(rows, (2.3, 2.5, 3.0))
    broken[0] = {**broken[0], "any_order": [v - 1 for v in broken[0]["any_order"]]}
    assert not verdict(broken).shown


@pytest.mark.parametrize("name, change", [
    ("differ", lambda v: v + 1e-9), ("likelihood", lambda v: [x + 5 for x in v]), ("sampled", lambda v: [x * 4 / 3 for x in v]),
    ("by_row", lambda v: [x * 4 / 3 for x in v]), ("by_batch", lambda v: [x + 9 for x in v])])
def test_each_law_sees_its_mistake(rows, name, change):
    "Negative controls: rows as a wrong loss would write them break a law."
    wrong = [{**r, name: change(r[name])} if name in r else r for r in rows]
    assert not all(checks(wrong).values())


def test_by_another_route():
    "Chances of sets against counting masks; orders against the chain rule of the language itself."
    dice = np.random.default_rng(7)
    p = dice.dirichlet([0.5] * 27).reshape(3, 3, 3)
    assert np.allclose([orders(perfect(p), x) for x in TEXTS], -np.log(p).ravel()[:, None])  # every order is the language
    t = (np.arange(20000) + 0.5) / 20000
    plain = [(t ** (k - 1) * (1 - t) ** (3 - k)).mean() for k in map(sum, SETS)]
    assert np.allclose(expected(linear, lambda t, k: 1 / t), plain, atol=1e-8)
    f = torch.from_numpy(dice.normal(size=(4, 4, 4, 3, 3))).log_softmax(-1)
    x = (2, 0, 1)
    assert np.isclose(prices(f, x)[SETS.index((1, 1, 0))], -float(f[3, 3, 1][0, 2] + f[3, 3, 1][1, 0]))
    assert len({*product((0, 1), repeat=3)} - {*SETS}) == 1


def test_seeds():
    "The same seed gives the same language, another seed another."
    tables = [toy(perfect(np.random.default_rng(s).dirichlet([.5] * 27).reshape(3, 3, 3)), "perfect", 50) for s in (0, 0, 1)]
    assert tables[0] == tables[1] and tables[0] != tables[2]
