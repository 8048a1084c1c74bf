"""Batches are made on the CPU; a model may be elsewhere. Here the other place is PyTorch's meta device, which refuses CPU tensors as a GPU does."""
import copy

import pytest
import torch

from lmtrain.batch import Example, Noise, collate
from lmtrain.generation import left_to_right
from lmtrain.model import LM, Cache, Size, Transformer, moved, on
from lmtrain.objective import CLM, PrefixLM, annotated, logp, nll, shift
from lmtrain.objectives.diffusion import BlockDiffusion, Diffusion, Uniform, nelbo
from lmtrain.objectives.masked import MLM, RTD, Electra, Spans
from lmtrain.objectives.mixed import Mix

V, M = 40, 39
IDS = torch.arange(4, 39)
DEVICES = ["meta"] + ["cuda"] * torch.cuda.is_available()
ROWS = [Example([1, *range(5 + n, 15 + n)], index=n) for n in range(4)]


def made() -> Transformer:
    torch.manual_seed(0)
    return Transformer(Size(V, 16, 2, layers=1, length=32))


OBJECTIVES = [CLM(), PrefixLM(.5), MLM(M, IDS), Spans(M, range(4, 39)), Diffusion(M), BlockDiffusion(M, 4), Uniform(range(V)),
              Mix((.5, .5), clm=CLM(), mntp=MLM(M, IDS, shifted=True))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:30])
def test_a_loss_is_where_its_model_is(device, objective):
    "Every objective's loss of a CPU batch; on a GPU it is the CPU's number. Control: the model's own forward refuses the batch."
    b = objective.corrupt(collate(ROWS), Noise())
    model = made()
    want = objective.loss(model, b)
    got = objective.loss(copy.deepcopy(model).to(device), b)
    assert {*got} == {*want} and all(v.device.type == device for v in got.values())
    if device != "meta": assert all(torch.allclose(v.cpu(), want[n], rtol=1e-4) for n, v in got.items())
    with pytest.raises(RuntimeError): copy.deepcopy(model).to(device)(b)


@pytest.mark.parametrize("device", DEVICES)
def test_functions_of_a_model_and_a_batch(device):
    "nll, logp, moved, nelbo put the batch where the model is; a column of another model comes back to where the batch is."
    b, model = shift(collate(ROWS)), made().to(device)
    for f in (lambda: nll(model, b), lambda: logp(model, b), lambda: moved(model, b, 2),
              lambda: nelbo(model, collate(ROWS), Diffusion(M), 2).nats): assert f().device.type == device
    if device != "meta":
        column = next(iter(annotated([b], ref=model))).extra["ref"]
        assert column.device == b.ids.device and torch.allclose(column, logp(made(), b), atol=1e-4)
        pair = Electra(made(), made()).to(device)
        q = RTD(MLM(M, IDS, keep=0., swap=0.)).corrupt(collate(ROWS), Noise())
        assert all(v.device.type == device for v in RTD(MLM(M, IDS, keep=0., swap=0.)).loss(pair, q).values())


def test_on_changes_nothing_where_nothing_is_to_do():
    "The same object if it is there already, or if a model has no parameters; else the found columns come along."
    class Bare(LM): pass
    b = shift(collate(ROWS))
    assert on(made(), b) is b and on(Bare(), b) is b
    there = on(made().to("meta"), b)
    assert there.ids.is_meta and there.loss_positions.is_meta and there.is_causal == b.is_causal


@pytest.mark.parametrize("device", [d for d in DEVICES if d != "meta"] or ["cpu"])
def test_writing_where_the_model_is(device):
    "fill and generate take CPU prompts; greedy text is the CPU's."
    from lmtrain.generation import fill, generate
    model = made().eval()
    there = copy.deepcopy(model).to(device)
    ids = torch.tensor([[1, 5, 6, M, M]])
    one, two = (fill(m, ids, ids == M, M, left_to_right, shifted=True).ids.cpu() for m in (model, there))
    assert torch.equal(one, two)
    assert torch.equal(generate(model, [[1, 5]], 5, temperature=0).ids, generate(there, [[1, 5]], 5, temperature=0).ids.cpu())
    assert Cache is not None


def test_one_graph():
    "Under torch.compile the forward with its loss is one graph: where the model is, costs no break."
    b, model = CLM().corrupt(collate(ROWS), Noise()), made()
    b.loss_positions, b.is_causal  # noqa: B018  found before, as the trainer finds them
    f = torch.compile(lambda b: CLM().loss(model, b)["clm"], backend="eager", fullgraph=True)
    assert torch.allclose(f(b), CLM().loss(model, b)["clm"])
