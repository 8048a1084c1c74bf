"""Losses as sums over counts: the same under packing and padding; equal to transformers, to enumeration."""
import math

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lmtrain.batch import Example, Noise, collate
from lmtrain.model import Size, Transformer
from lmtrain.objective import CLM, Objective, PrefixLM, annotated, before_answer, hide, logp, nll, shift

V = 50
ANSWERED = [Example(torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)).tolist(),
                    [False] * (1 + n // 3) + [True] * (n - 1 - n // 3), index=n) for n in (3, 5, 7, 8, 9, 12)]


class Holey(Transformer):
    "A model with dropout, which differs in train mode."
    def forward(self, b): return nn.functional.dropout(super().forward(b), .5, self.training)  # (B,T,D)


@pytest.fixture
def net(): return spread(Transformer(Size(V, dim=32, heads=4, kv_heads=2, layers=2)).eval())


def spread(net):
    "Larger embeddings, so that probabilities differ by more than rounding."
    with torch.no_grad(): net.embed_tokens.weight.mul_(10)
    return net


def random_rows(): return CLM().corrupt(collate(ANSWERED), Noise())


# ---- corrupt

def test_shift_by_hand():
    "Each position is asked for the next token of its own document, if that token is answered."
    b = shift(collate([Example([1, 2, 3], [True, False, True]), Example([4, 5])], 7, pack=True))
    assert b.targets.tolist() == [[2, 3, 4, 5, 0, 0, 0]]
    assert b.weights.tolist() == [[0, 1, 0, 1, 0, 0, 0]]


def test_shift_asks_clean():
    "The target is the token before corruption, and the first token of a document is never asked."
    b = collate(ANSWERED, 20, pack=True)
    read = shift(b.set(ids=torch.zeros_like(b.ids)))
    asked = sum(sum(e.answer[1:]) for e in ANSWERED)
    assert torch.equal(read.targets[:, :-1], b.clean[:, 1:]) and int(read.weights.sum()) == asked
    assert not read.weights[:, :-1][b.doc_pos[:, 1:] == 0].any()


def test_hide():
    "Hidden tokens read the mask and are asked for what they were; the others stay and are not asked."
    b = collate(ANSWERED)
    assert not hide(b, b.doc == 0, 49).weights.any()  # padding is never asked
    hit = (Noise()(b) < .3) & (b.doc > 0)                                              # (B,T)
    h = hide(b, hit, 49)
    assert torch.equal(h.ids, torch.where(hit, 49, b.ids)) and torch.equal(h.weights, hit.float())
    assert torch.equal(h.targets, b.clean) and torch.equal(h.clean, b.clean) and hit.any()


# ---- packing and padding

def both(net, objective, b):
    "The loss as a sum over double precision terms, and its gradient."
    net.zero_grad()
    b = objective.corrupt(b, Noise(1))
    objective.loss(net, b)[objective.name].backward()
    terms = b.weights.flatten()[b.loss_positions] * nll(net, b)                                 # (N,)
    return terms.double().sum().item(), [p.grad.clone() for p in net.parameters()]


def difference(one, two):
    "The relative difference of two losses and of two gradients."
    far = math.sqrt(sum(((a - b)**2).sum() for a, b in zip(one[1], two[1], strict=True)))
    return abs(one[0] - two[0]) / abs(one[0]), far / math.sqrt(sum((a**2).sum() for a in one[1]))


@pytest.mark.parametrize("objective", [CLM(), PrefixLM(), PrefixLM(cut=.5)], ids=repr)
@pytest.mark.parametrize("layout", ["packed", "two to a row", "padded", "one by one", "backwards"])
def test_layout_changes_nothing(net, objective, layout):
    "Loss and gradient are those of separate rows within 1e-9, in double precision."
    net.double()
    other = {"packed": collate(ANSWERED, 44, pack=True), "two to a row": collate(ANSWERED, 17, pack=True),
             "padded": collate(ANSWERED, 40, pad=7), "backwards": collate(ANSWERED[::-1])}
    want = both(net, objective, collate(ANSWERED))
    if layout in other: have = both(net, objective, other[layout])
    else:
        parts = [both(net, objective, collate([e])) for e in ANSWERED]
        have = sum(p[0] for p in parts), [sum(g) for g in zip(*(p[1] for p in parts), strict=True)]
    assert max(difference(want, have)) < 1e-9


@pytest.mark.parametrize("objective", [CLM(), PrefixLM()], ids=repr)
def test_control_layout(net, objective):
    "Without document boundaries, or at other positions, they differ: the gradient by a hundredth or more."
    class OneDocument(type(objective)):
        def corrupt(self, b, noise):
            new = super().corrupt(b, noise)
            return new.set(doc=(b.doc > 0).long(), order=b.order).with_extra(pos=b.doc_pos)

    class Stretched(type(objective)):  # a constant shift would change nothing: rotary positions are relative
        def corrupt(self, b, noise): return super().corrupt(b, noise).with_extra(pos=2 * b.doc_pos)
    net.double()
    want, packed = both(net, objective, collate(ANSWERED)), collate(ANSWERED, 44, pack=True)
    for broken in OneDocument(), Stretched():
        loss, grad = difference(want, both(net, broken, packed))
        assert loss > 1e-6 and grad > .01


# ---- the value of a loss

def test_equals_transformers(net):
    "CLM's sum over its count is ForCausalLMLoss on the same logits, labels -100 where not answered."
    b = random_rows()
    labels = b.clean.masked_fill(~b.answer | (b.doc == 0), -100)                       # (B,T)
    with torch.no_grad():
        want = ForCausalLMLoss(net.head(net(b)), labels, V)
        have = CLM().loss(net, b)["clm"] / CLM().count(b)["clm"]
        torch.testing.assert_close(have, want, atol=0, rtol=1e-6)
        everything = ForCausalLMLoss(net.head(net(b)), b.clean.masked_fill(b.doc == 0, -100), V)
    assert abs(everything - want) > .01


def full(net, b, temperature=1.):
    "Log-probabilities of all tokens at all places, the long way: (B,T,V)."
    return (net.head(net(b)) / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1., .7, 2.])
def test_nll(net, temperature):
    "Where something is asked, the long way's number; exactly 0 at the filling. `logp` puts it at its place."
    b = random_rows()
    want = full(net, b, temperature).gather(2, b.targets[..., None])[..., 0]           # (B,T)
    have = nll(net, b, temperature=temperature)                                        # (N,)
    real = b.loss_positions >= 0                                                                # (N,)
    assert len(have) == 128 and not have[~real].any() and int(real.sum()) == int(b.weights.sum())
    torch.testing.assert_close(have[real], -want.flatten()[b.loss_positions[real]], atol=1e-5, rtol=1e-5)
    want = torch.where(b.weights > 0, want, 0.)                                        # (B,T)
    torch.testing.assert_close(logp(net, b, temperature), want, atol=1e-5, rtol=1e-5)
    if temperature != 1: assert (have - nll(net, b))[real].abs().max() > .1


def test_nll_builds_few_logits(net):
    "Logits are made at the asked places only, in a multiple of 128: the head never sees the other rows."
    sizes = []
    net.head.register_forward_hook(lambda _, x, y: sizes.append(tuple(y.shape)))
    b = collate([Example([1] * 32)] * 32)
    nll(net, shift(b)); nll(net, b.set(weights=torch.eye(32))); nll(net, b)
    assert sizes == [(1024, V), (128, V), (0, V)]


def everything(net, b, place, forbid=()):
    "The probability of each token of the vocabulary at one place, by asking for each."
    w = torch.zeros(b.ids.shape).index_fill(1, torch.tensor([place]), 1.)              # (B,T)
    asks = [b.set(targets=torch.full_like(b.ids, v), weights=w) for v in range(V)]
    return torch.stack([-nll(net, a, forbid)[0] for a in asks]).exp()                  # (V,)


def test_forbid(net):
    "Forbidden tokens, here the likeliest, get probability 0; the others keep their proportions and sum to one."
    b = collate([Example([1, 2, 3, 4])])
    p = everything(net, b, 2)                                                          # (V,)
    first = p.topk(3).indices.tolist()
    q, others = everything(net, b, 2, tuple(first)), [v for v in range(V) if v not in first]
    assert abs(p.sum() - 1) < 1e-5 and abs(q.sum() - 1) < 1e-5 and not q[first].any()
    torch.testing.assert_close(q[others], p[others] / p[others].sum(), atol=1e-6, rtol=1e-4)
    assert p[others].sum() < .5


def test_weights(net):
    "The loss is linear in the weights, the count is how many are not 0, and the gradient follows."
    b = random_rows()
    w = b.weights * torch.randn(b.ids.shape)                                           # (B,T)
    one = CLM().loss(net, b.set(weights=w))["clm"]
    torch.testing.assert_close(one, -(w * logp(net, b)).sum(), atol=1e-4, rtol=1e-5)
    assert CLM().count(b.set(weights=w))["clm"] == int((w != 0).sum()) == int(b.weights.sum())
    torch.testing.assert_close(CLM().loss(net, b.set(weights=2 * w))["clm"], 2 * one, atol=1e-4, rtol=1e-5)


def test_nothing_asked(net):
    "Where nothing is asked the loss is 0, and its gradient 0, not missing and not NaN."
    for b in collate(ANSWERED), random_rows()[:0]:
        net.zero_grad()
        loss = CLM().loss(net, b)["clm"]; loss.backward()
        assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_names():
    "Terms of loss and count carry the same name, the class's; the repr is the record."
    class Mine(Objective): pass
    b = random_rows()
    assert Mine().name == "mine" and [*CLM().count(b)] == ["clm"] and [*PrefixLM().count(b)] == ["prefixlm"]
    assert repr(PrefixLM(cut=.5)) == "PrefixLM(cut=0.5)" and repr(CLM()) == "CLM()"


# ---- PrefixLM

def test_prefix_by_hand():
    "What comes before the first answer is read both ways; later turns are causal; each document has its own."
    b = collate([Example([1, 2, 3, 4, 5, 6], [False, False, True, False, False, True]),
                 Example([7, 8], [False, True])], 9, pack=True)
    assert before_answer(b).int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 0, 0]]
    p = PrefixLM().corrupt(b, Noise())
    assert p.order[0, :8].tolist() == [0, 0, 3, 4, 5, 6, 0, 2]
    assert p.weights.tolist() == [[0, 1, 0, 0, 1, 0, 1, 0, 0]]


def test_prefix_refuses():
    "Without an unanswered start a document is refused, in any place of any row; padding and `cut` are not."
    good, bad = Example([1, 2], [False, True]), Example([1, 2])
    for b in collate([bad]), collate([good, bad]), collate([good, bad], 6, pack=True):
        with pytest.raises(ValueError, match="no prefix before its first"): PrefixLM().corrupt(b, Noise())
        assert PrefixLM(cut=.5).corrupt(b, Noise()).weights.any()
    assert PrefixLM().corrupt(collate([good], 5), Noise()).weights.sum() == 1


def test_prefix_cut():
    "Drawn prefixes have every length from 1 to the share, the same at any layout, and the rest is asked."
    examples = [Example([1] * 20, index=n) for n in range(400)]
    b = PrefixLM(cut=.5).corrupt(collate(examples), Noise(4))
    length = (b.order == 0).sum(1)                                                     # (B,)
    assert {*length.tolist()} == {*range(1, 11)} and torch.equal(b.weights.sum(1).long(), 20 - length)
    packed = PrefixLM(cut=.5).corrupt(collate(examples, 60, pack=True), Noise(4))
    inside = packed.index[(packed.order == 0) & (packed.doc > 0)]                      # (n,)
    assert torch.equal(inside.bincount(minlength=400), length)


@pytest.mark.parametrize("cut", [-.5, 1.5, 8])
def test_prefix_refuses_shares(cut):
    "A number that is no share is refused by its value: with 8 most documents would ask nothing."
    b = collate([Example([1] * 20, index=n) for n in range(40)])
    with pytest.raises(ValueError, match=f"cut={cut}"): PrefixLM(cut=cut).corrupt(b, Noise())


# ---- annotated

class Position(list):
    "Batches with a position."
    def state_dict(self): return {"at": 3}
    def load_state_dict(self, state): self.state = state


def test_annotated(net):
    "One more column, the model's `logp`; length and state are those of the batches; all else is kept."
    batches = Position([random_rows(), random_rows()[:2]])
    with_ref = annotated(batches, ref=net, old=net)
    assert len(with_ref) == 2 and with_ref.state_dict() == {"at": 3}
    with_ref.load_state_dict({"at": 1})
    assert batches.state == {"at": 1}
    for _ in range(2):
        for b, r in zip(batches, with_ref, strict=True):
            assert r.ids is b.ids and {*r.extra} == {"ref", "old"}
            torch.testing.assert_close(r.extra["ref"], logp(net, b))


def test_annotated_is_still():
    "No gradient, evaluation mode, the mode given back after an error too; in train mode the model differs."
    net, b = spread(Holey(Size(V, dim=32, layers=2))).train(), random_rows()
    (r,) = annotated([b], ref=net)
    assert net.training and not r.extra["ref"].requires_grad
    moving = logp(net, b)                                                              # (B,T)
    torch.testing.assert_close(r.extra["ref"], logp(net.eval(), b))
    on = b.weights > 0                                                                 # (B,T)
    assert moving.requires_grad and (moving - r.extra["ref"])[on].abs().mean() > .1
    (r,) = annotated([b], ref=net)
    assert not net.training
    net.train()
    with pytest.raises(IndexError): list(annotated([b.set(ids=b.ids + V)], ref=net))
    assert net.training


def test_a_frozen_part_stays_frozen():
    "Modules come back as they were, each one: a layer in evaluation mode inside a model in training mode."
    from torch import nn
    from lmtrain.model import evaluating
    model = nn.Sequential(nn.Dropout(.5), nn.Sequential(nn.Dropout(.5), nn.Linear(2, 2)))
    model[1].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model): assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before and before.count(False) == 3


@pytest.mark.parametrize("temperature, forbid", [(1., ()), (.7, (3, 5))])
def test_chunks_of_logits_change_nothing(monkeypatch, temperature, forbid):
    """Loss and gradient in chunks of 128 positions are those in one piece, to 1e-6 of it; what is held at once does not grow with the positions.
    Control: in one piece it does."""
    import lmtrain.objective as module
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            self.most = max([self.most, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out
    torch.manual_seed(0)
    V = 5000
    model = Transformer(Size(V, 16, 2, layers=1, length=256)).double()                 # sums over positions are then no rounding of 1e-6
    for p in model.parameters(): p.data *= 4
    def run(rows: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        b = shift(collate([Example(torch.randint(V, (256,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(rows)]))
        model.zero_grad()
        with Largest() as mode:
            loss = nll(model, b, forbid, temperature); (loss * torch.linspace(.5, 1.5, len(loss))).sum().backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()], mode.most
    whole = run(4)
    monkeypatch.setattr(module, "CHUNK", 128 * V)
    parts, more = run(4), run(8)
    assert torch.allclose(whole[0], parts[0], atol=1e-5) and all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(whole[1], parts[1], strict=True))
    assert parts[2] == more[2] == 128 * V < whole[2] / 7
