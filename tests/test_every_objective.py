"""What every objective owes: the same question under any layout, the same gradient however a window is cut, no leak."""
import itertools
from dataclasses import dataclass

import pytest
import torch

from lmtrain.batch import Example, Noise, collate
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM, Objective, PrefixLM, hide
from lmtrain.objectives.diffusion import BlockDiffusion, Diffusion, Uniform, cosine, exact_k, polynomial
from lmtrain.objectives.masked import MLM, RTD, Electra, Spans
from lmtrain.objectives.mixed import Curriculum, Mix, by_gradient, by_sequence
from lmtrain.train import Trainer

V, M, ORDINARY = 40, 3, range(7, 40)
MNTP, SPANS = MLM(M, ORDINARY, shifted=True), Spans(M, ORDINARY)
OBJECTIVES: list[Objective] = [
    CLM(), PrefixLM(.5), MLM(M, ORDINARY), MLM(M, ORDINARY, words=True), MNTP, SPANS, RTD(MLM(M, ORDINARY)),
    Mix((.5, .5), clm=CLM(), mntp=MNTP), Mix((.2, .8), by_sequence, clm=CLM(), mlm=MLM(M, ORDINARY)),
    Mix((.5, .5), by_gradient, clm=CLM(), diffusion=Diffusion(M)), Curriculum([(1, 0), (0, 1)], clm=CLM(), spans=SPANS),
    Diffusion(M), Diffusion(M, cosine), Diffusion(M, polynomial(2.)), Diffusion(M, exact_k), Diffusion(M, shifted=True),
    BlockDiffusion(M, block=4), Uniform(range(4, V))]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:60])


def documents(n=8):
    "Texts of 3 to 30 tokens that begin with an unanswerable bos, with words."
    dice = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 30, (n,), generator=dice).tolist()
    ids = [[1, *torch.randint(7, V, (k - 1,), generator=dice).tolist()] for k in lengths]
    return [Example(i, [False] + [True] * (len(i) - 1), {"word": [-1, *(t // 2 for t in range(len(i) - 1))]}, index=n)
            for n, i in enumerate(ids)]


def model_for(objective):
    torch.manual_seed(0)
    net = lambda dim: Transformer(Size(V, dim, 2, layers=2, length=64))
    return Electra(net(16), net(32)) if isinstance(objective, RTD) else net(32)


def gradient(model, objective, window):
    t = Trainer(model, objective, [], steps=1, bf16=False)
    model.zero_grad(); t.backward(window)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def far(a, b): return ((a - b).norm() / a.norm()).item()


@every
def test_window(objective):
    "However the rows of a step are cut into micro-batches, an empty one among them, the gradient is that of one batch."
    rows, model = documents(), model_for(objective)
    corrupted = lambda some: objective.corrupt(collate(some, T=32), Noise(3))
    want = gradient(model, objective, [corrupted(rows)])
    for sizes in [1] * 8, [4, 4], [2, 6], [8, 0]:
        ends = itertools.pairwise([0, *itertools.accumulate(sizes)])
        window = [corrupted(rows)[i:j] if i == j else corrupted(rows[i:j]) for i, j in ends]
        assert far(want, gradient(model, objective, window)) < 2e-5, sizes


def questions(b):
    "What is read and asked of every token: (example, place, noised or clean half) -> (read, target, weight)."
    real = b.doc > 0                                                                   # (B,T)
    half = torch.arange(b.ids.shape[1]) * 2 // b.ids.shape[1] if "private" in b.extra else torch.zeros(b.ids.shape[1])
    place = b.extra["pos"] if "pos" in b.extra else b.doc_pos                            # (B,T)
    keys = zip(b.index[real].tolist(), place[real].tolist(), half.expand_as(b.ids)[real].tolist(), strict=True)
    asked = b.weights != 0                                                             # (B,T)
    values = zip(b.ids[real].tolist(), b.targets.where(asked, 0)[real].tolist(), b.weights[real].tolist(), strict=True)
    return dict(zip(keys, values, strict=True))


@every
def test_layout(objective):
    "Alone, in any order and padding, and packed, each text is asked the same; a packed mixture has one part a row."
    rows = documents()
    want = questions(objective.corrupt(collate(rows), Noise(3)))
    assert questions(objective.corrupt(collate(rows[::-1], T=40), Noise(3))) == want
    alone: dict = {}
    for e in rows: alone |= questions(objective.corrupt(collate([e]), Noise(3)))
    assert alone == want
    if not isinstance(objective, Mix):
        packed = objective.corrupt(collate(rows, T=64, pack=True), Noise(3))
        assert len(packed) < len(rows) and questions(packed) == want


@dataclass
class Drawn(Objective):
    "Broken on purpose: a mask from a generator."
    def corrupt(self, b, noise):
        u = torch.rand(b.ids.shape, generator=torch.Generator().manual_seed(noise.seed))  # (B,T)
        return hide(b, (u < .5) & b.answer, M)


def test_control_layout():
    with pytest.raises(AssertionError): test_layout(Drawn())


@every
def test_epochs_and_seeds(objective):
    "Another epoch and another seed ask something else; the same two ask the same. A causal model is always asked all."
    b = collate(documents())
    first, again, epoch, seed = (questions(objective.corrupt(b, Noise(*n))) for n in ((3, 0), (3, 0), (3, 1), (4, 0)))
    assert first == again
    if isinstance(objective, CLM): assert first == epoch == seed
    elif isinstance(objective, Curriculum): assert first != epoch and first == seed  # its first epoch is causal
    else: assert first != epoch != seed != first


@every
def test_no_leak_between_documents(objective):
    "A token changed in one document of a packed row moves no hidden state of another; without documents, the control, it does."
    model, b = model_for(objective).eval(), objective.corrupt(collate(documents(), T=64, pack=True), Noise(3))
    row, d = 0, int(b.doc[0].max())
    assert d > 1
    mine = b.doc[row] == d                                                             # (T,)
    with torch.no_grad():
        def moved(b):
            other = torch.where((b.doc == d) & (torch.arange(len(b))[:, None] == row), 4 + (b.ids + 1) % 30, b.ids)  # (B,T)
            return (model(b) - model(b.set(ids=other))).abs().amax(-1)[row] > 1e-6     # (T,)
        real = b.doc[row] > 0                                                          # (T,)
        assert not moved(b)[real & ~mine].any() and moved(b)[mine].any()
        one = b.set(doc=b.doc.clamp(max=1), order=torch.zeros_like(b.order))
        if "private" not in b.extra:
            other = torch.where((b.doc == d) & (torch.arange(len(b))[:, None] == row), 4 + (b.ids + 1) % 30, b.ids)  # (B,T)
            assert (model(one) - model(one.set(ids=other))).abs().amax(-1)[row][real & ~mine].max() > 1e-6


@every
def test_only_answers_are_asked(objective):
    "Nothing but tokens that may be asked about is ever a target: not bos, not padding; weights are never negative."
    for epoch in range(8):
        b = objective.corrupt(collate(documents(), T=40), Noise(3, epoch))
        asked = b.weights != 0                                                         # (B,T)
        assert (b.weights >= 0).all() and (b.targets[asked] >= 7).all() and (b.doc[asked] > 0).all()


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not isinstance(o, PrefixLM)], ids=lambda o: repr(o)[:60])
def test_nothing_to_ask(objective):
    """Texts without an answer cost nothing and count nothing: no NaN in sum or gradient, no share in another's mean.

    (`PrefixLM` refuses them: see test_objective.)
    """
    silent = [Example([1, 9, 9], [False] * 3, {"word": [-1, 0, 1]}, index=50 + n) for n in range(2)]
    model = model_for(objective)
    b = objective.corrupt(collate(silent), Noise(3))
    terms = objective.loss(model, b)
    sum(terms.values()).backward()
    assert all(v.item() == 0 for v in terms.values()) and all(float(v) == 0 for v in objective.count(b).values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    alone = gradient(model, objective, [objective.corrupt(collate(documents(), T=32), Noise(3))])
    both = [objective.corrupt(collate(documents(), T=32), Noise(3)), objective.corrupt(collate(silent, T=32), Noise(3))]
    assert far(alone, gradient(model, objective, both)) < 2e-5
