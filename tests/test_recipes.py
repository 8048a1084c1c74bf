"""Four ways of asking: the same start, the same rows, the same hidden tokens, each asked where its model answers."""
from itertools import islice

import pytest
import torch

from lmtrain.batch import Noise, collate
from lmtrain.model import Size, Transformer, moved
from lmtrain.objective import CLM
from lmtrain.objectives.diffusion import leftward
from lmtrain.objectives.masked import MLM
from lmtrain.objectives.recipes import continues, evaluated, gaps, guessed, trained, recipes
from lmtrain.text import examples, regular_ids, train_bpe
from lmtrain.loader import Loader

TEXTS = [f"the {a} ship and the {b} sea, said the sailor {n} times." for n, (a, b) in enumerate(zip("abcdefgh", "stuvwxyz", strict=True))] * 4


@pytest.fixture(scope="module")
def tok(): return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def rows(tok): return examples(TEXTS, tok, T=24)


@pytest.fixture(scope="module")
def net(tok):
    torch.manual_seed(0)
    return Transformer(Size(len(tok), 32, 2, layers=2, length=24)).eval()


def test_ordinary(tok):
    "All tokens that are not special; with a special one added at the end it ends before it."
    assert [*regular_ids(tok)] == [i for i in range(len(tok)) if i not in tok.all_special_ids]
    more = train_bpe(TEXTS, 300); more.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    assert regular_ids(more).stop == len(more) - 1


def test_the_same_tokens_for_all(tok, rows):
    "Each way is asked for the same tokens, a causal model one place early; none reads the answer, the causal one nothing later."
    b = collate(rows[:8])
    asked = {n: gaps(b, w, tok, Noise(3)) for n, w in recipes(tok).items()}
    def questions(q, early):
        r, t = (q.weights != 0).nonzero(as_tuple=True)
        return {(i, p + early, v) for i, p, v in zip(r.tolist(), t.tolist(), q.targets[r, t].tolist(), strict=True)}
    want = questions(asked["diffusion"], 0)
    assert len(want) > 8 and all(v == b.clean[r, t] for r, t, v in want)
    for n, w in recipes(tok).items(): assert questions(asked[n], int(w.early)) == want, n
    for n in "masked", "mixed", "diffusion": assert all(asked[n].ids[r, t] == tok.mask_token_id for r, t, _ in want)
    assert torch.equal(asked["causal"].ids, b.ids) and torch.equal(asked["causal"].order, b.order)


def test_what_a_model_sees(tok, rows, net):
    "Asked causally, no place moves with a later token; with gaps, the control, places before it do."
    b = collate(rows[:2])
    for n, later in ("causal", False), ("mixed", True):
        q = gaps(b, recipes(tok)[n], tok, Noise(3))
        change = moved(net, q, 12)                                                     # (B,T)
        assert bool(change[:, :12].any()) == later, n


def test_guessed_equals_a_loop(tok, rows, net):
    "The share that is right, for each way, from whole logits and by hand."
    b = collate(rows[:8])
    for w in recipes(tok).values():
        q = gaps(b, w, tok, Noise(3))
        with torch.no_grad(): likeliest = net.head(net(q)).argmax(-1)                  # (B,T)
        r, t = (q.weights != 0).nonzero(as_tuple=True)
        want = [float(likeliest[i, j] == q.targets[i, j]) for i, j in zip(r, t, strict=True)]
        assert guessed(net, q).tolist() == want
    plain = MLM(tok.mask_token_id, regular_ids(tok), .15, keep=0., swap=0., shifted=True).corrupt(b, Noise(3))
    again = leftward(plain.set(weights=plain.weights.roll(1, 1), targets=b.clean))
    assert torch.equal(again.weights, plain.weights) and torch.equal(again.targets[plain.weights > 0], plain.targets[plain.weights > 0])


def test_one_budget(tok, rows):
    "All ways begin with the same weights and read the same rows in the same order."
    starts = [trained(w, Size(len(tok), 16, 2, layers=1, length=24), rows, 4, 1, 0., 5).state_dict() for w in recipes(tok).values()]
    for s in starts[1:]: assert all(torch.equal(v, s[k]) for k, v in starts[0].items())
    order = [[b.index[:, 0].tolist() for b in islice(Loader(rows, w.objective, 4, 24, pack=True, seed=5), 9)] for w in recipes(tok).values()]
    assert all(o == order[0] for o in order)


def test_examined(tok, rows):
    "Each model takes the examinations it has learnt for; training lowers what it pays; each writes after its prompt."
    size, few = Size(len(tok), 32, 2, layers=1, length=24), examples(TEXTS[:8], tok, T=24)
    for n, w in recipes(tok).items():
        new, old = (evaluated(trained(w, size, rows, 8, steps, 1e-2), w, few, tok) for steps in (1, 60))
        assert (new.left_to_right is None) == (n in ("masked", "diffusion")) and (new.any_order is None) == (n == "causal")
        for a, z in (new.left_to_right, old.left_to_right), (new.any_order, old.any_order):
            if a is not None: assert z < .8 * a, n
        model = trained(w, size, rows, 8, 2, 1e-2)
        t = continues(model, w, [tok.bos_token_id, 40], 6, tok)
        assert t.ids[0, :2].tolist() == [tok.bos_token_id, 40] and (t.when[0, 2:] > 0).all()
        assert sorted(t.when[0, 2:].tolist()) == [1, 2, 3, 4, 5, 6]
    assert CLM().corrupt(collate(few[:1]), Noise()).predicts_next
