"""The labs' JavaScript against Python: noise, rows, questions, schedules, losses and tokenizers, on the same seeds, in node."""
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmtrain.batch import Example, Noise, collate
from lmtrain.labs.loss import costs
from lmtrain.labs.masking import MaskingLab, as_batch, columns, menu
from lmtrain.labs.noise import DIM, SCHEDULES as DRAWN, directions, gaussian, swapped
from lmtrain.labs.shared import STATIC, built, described, esm
from lmtrain.labs.small import run
from lmtrain.objective import CLM, PrefixLM
from lmtrain.objectives.diffusion import (
    At, BlockDiffusion, Cosine, Diffusion, ExactK, Polynomial, Schedule, Stepped, Stopped, Uniform, times)
from lmtrain.objectives.masked import MLM, Anneal, Spans, span_corrupt, words_of
from lmtrain.objectives.mixed import Mix, ul2
from lmtrain.text import train_bpe, train_chars

NODE = shutil.which("node")
HARNESS = f"""
import * as core from "{(STATIC / 'core.js').as_uri()}";
const chunks = [];
for await (const c of process.stdin) chunks.push(c);
const tools = {{
  ...core,
  halves: (text) => [...core.halves(text)],
  table: (V, D) => [...core.directions(V, D)],
  shaken: (ids, V, D, t, noise, may) => core.gaussian(ids, core.directions(V, D), D, t, noise, may),
  cost: (r, o) => {{ const flat = core.halves(r.logits), V = flat.length / r.ids.length;
    return r.ids.map((id, t) => (t ? core.nll(flat.subarray(t * V, (t + 1) * V), id, o) : 0)); }},
  see: (row) => row.ids.map((_, i) => row.ids.map((_, j) => core.sees(row)(i, j))),
  wrong: (o, row, noise) => {{ try {{ core.corrupt(o, row, noise); return null; }} catch (e) {{ return e.message; }} }},
  read: (json, texts) => {{ const t = core.tokenizer(json);
    return texts.map((s) => {{ const e = t.encode(s); return [e.ids, e.words, t.decode(e.ids), e.ids.map(t.shown)]; }}); }},
}};
const out = JSON.parse(Buffer.concat(chunks)).map(([name, args]) => tools[name](...args));
process.stdout.write(JSON.stringify(out, (k, v) => (v === Infinity ? "inf" : v === -Infinity ? "-inf" : v)));
"""


def js(calls: list) -> list:
    "What core.js answers to calls (name, arguments)."
    done = subprocess.run([NODE, "--input-type=module", "-e", HARNESS], input=json.dumps(calls), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_node_is_here():
    "The comparison needs node, which is on every machine that builds JavaScript; it is not skipped."
    assert NODE, "install node 18 or later: these tests run the labs' JavaScript in it"


M, V = 3, 64
PLAIN = [i for i in range(V) if i != M]  # texts do not hold the mask
SCHEDULES = [Schedule(), Schedule(eps=.1), Polynomial(2.), Polynomial(.5), Cosine(), ExactK(eps=0.), Stepped(8), At(Schedule(), .37)]


def objective(dice: random.Random):
    "One of all objectives that the labs draw, with its fields at random."
    share = lambda: round(dice.random(), 2)
    some = dice.choice([range(dice.choice([4, 7]), V), torch.tensor(sorted(dice.sample(PLAIN, 40)))])
    mlm = lambda kind=MLM, **k: kind(M, some, dice.choice([share(), Anneal(.5, .1, 3)]) if kind is MLM else share(), *dice.choice(
        [(.1, .1), (0., 0.), (.5, .5), (.25, .3)]), shifted=dice.random() < .5, words=dice.random() < .5, **k)
    return dice.choice([
        CLM, lambda: PrefixLM(max(.01, share())), mlm, lambda: mlm(Spans, p=dice.choice([.2, .5, .9]), longest=dice.randint(1, 12)),
        lambda: Diffusion(M, dice.choice(SCHEDULES), dice.random() < .5), lambda: Stopped(M, share(), dice.choice(SCHEDULES[:5])),
        lambda: Uniform(range(V), dice.choice(SCHEDULES[:5])), lambda: BlockDiffusion(M, dice.randint(1, 9), dice.choice(SCHEDULES)),
        lambda: Mix((.25, .5, .25), a=CLM(), b=MLM(M, some, shifted=True), c=Diffusion(M))])()


def rows(dice: random.Random):
    "A packed row of up to three documents with words, prompts that are not answers, and padding."
    def one():
        n = dice.randint(2, 14)
        answer = [t >= dice.choice([1, 1, 3]) for t in range(n)]
        words, w = [-1], 0
        for _ in range(n - 1): words.append(w); w += dice.random() < .6
        return Example([1, *(dice.choice(PLAIN) for _ in range(n - 1))], answer, {"word": words}, index=dice.randrange(10**6))
    return collate([one() for _ in range(dice.randint(1, 3))], T=48, pack=True)[:1]


def agree(b, q, told):
    for name in ("ids", "targets", "order", "doc", "index", "clean"):
        assert getattr(q, name)[0].tolist() == told[name], (name, b)
    assert (q.answer[0].tolist(), len(q)) == ([bool(a) for a in told["answer"]], 1)
    near = 1e-4 if "alpha" in q.extra else 1e-6  # 1 - sin(...) in 32 bits loses digits near t = 1, and is divided by
    np.testing.assert_allclose(told["weights"], q.weights[0].tolist(), rtol=near)
    for name in {"private", "pos", "alpha"} & {*q.extra}:
        np.testing.assert_allclose(np.array(told["extra"][name], float), q.extra[name][0].double(), rtol=1e-6, atol=1e-7)


def test_questions_agree():
    "400 random objectives on random packed rows: inputs, targets and orders equal, weights to 1e-6; the noise as control."
    dice = random.Random(0)
    cases = [(objective(dice), rows(dice), Noise(dice.randrange(2**31), dice.randrange(6))) for _ in range(400)]
    kinds = {type(o).__name__ for o, *_ in cases}
    assert len(kinds) == 9
    def call(o, b, n, seed=None):
        flat = {**described(o)} if not callable(getattr(o, "rate", None)) else {**described(o), "rate": o.rate(n.epoch)}
        return ["corrupt", [flat, columns(b, 0), {"seed": n.seed if seed is None else seed, "epoch": n.epoch}]]
    told, other = js([call(*c) for c in cases]), js([call(*c, seed=c[2].seed ^ 1) for c in cases])
    for (o, b, n), row in zip(cases, told, strict=True): agree(o, o.corrupt(b, n), row)
    asked = [o for o, *_ in cases if not isinstance(o, CLM)]
    assert sum(a["ids"] != z["ids"] or a["weights"] != z["weights"] for a, z in zip(told, other, strict=True)) > .7 * len(asked)


def test_who_sees_whom():
    "`sees` of 60 rows, private blocks among them, pair by pair."
    dice = random.Random(1)
    cases = [objective(dice).corrupt(rows(dice), Noise(5)) for _ in range(60)]
    for b, told in zip(cases, js([["see", [columns(b, 0)]] for b in cases]), strict=True): assert b.sees[0].tolist() == told


def test_columns_and_back():
    "A row as JSON and back is the row; described and built is the objective."
    dice = random.Random(2)
    for _ in range(50):
        o, b = objective(dice), rows(dice)
        again = as_batch(json.loads(json.dumps(columns(b, 0))))
        for name in ("ids", "doc", "order", "answer", "weights", "index"):
            x, y = getattr(again, name), getattr(b, name)
            assert torch.equal(x, y) and x.dtype == y.dtype, name
        if not callable(getattr(o, "rate", None)):
            new = built(json.loads(json.dumps(described(o))))
            assert torch.equal(new.corrupt(b, Noise(1)).weights, o.corrupt(b, Noise(1)).weights) and described(new) == described(o)
    with pytest.raises(ValueError, match="Nothing"): built({"kind": "Nothing"})


def test_changed_texts_agree():
    "300 random T5 and UL2 examples: tokens and answers equal."
    dice, marks = random.Random(3), list(range(100, 140))
    cases, calls = [], []
    for _ in range(300):
        n, noise = dice.randint(3, 60), Noise(dice.randrange(2**31), dice.randrange(4))
        e = Example([1, *(dice.randrange(V) for _ in range(n))], [False] + [True] * n, index=dice.randrange(10**6))
        flat = {"ids": e.ids, "answer": e.answer, "index": e.index, "tokens": {}}
        plain = {"seed": noise.seed, "epoch": noise.epoch}
        if dice.random() < .5:
            knobs = {"rate": round(dice.uniform(.01, .9), 2), "mean": dice.choice([1., 3., 8.]), "unbiased": dice.random() < .5}
            cases.append(span_corrupt(e, noise, marks, **knobs)); calls.append(["spanCorrupt", [flat, plain, marks, knobs]])
        else: cases.append(ul2(e, noise, marks, (7, 8, 9))); calls.append(["ul2", [flat, plain, marks, [7, 8, 9]]])
    for e, told in zip(cases, js(calls), strict=True): assert (e.ids, e.answer) == (told["ids"], told["answer"])


def test_numbers_agree():
    "Noise bit for bit at 3,000 places; clocks; schedules to 1e-6; a hash with one constant wrong, the control, is not equal."
    dice = random.Random(4)
    at = [(Noise(dice.randrange(2**32), dice.randrange(50)), dice.randrange(-1, 2 ** dice.choice([31, 33, 53])), dice.randrange(2**32), dice.choice([0, 1, 5, 2**20]))
          for _ in range(3000)]
    told = js([["at", [{"seed": n.seed, "epoch": n.epoch}, i, p, d]] for n, i, p, d in at])
    assert told == [float(n.at(torch.tensor(i), p, d)) for n, i, p, d in at]
    broken = [float(replace(n, seed=n.seed ^ 1).at(torch.tensor(i), p, d)) for n, i, p, d in at]
    assert told != broken
    some = [rows(dice) for _ in range(40)]
    for b, told in zip(some, js([["times", [columns(b, 0), {"seed": 9, "epoch": 3}]] for b in some]), strict=True):
        assert told == times(b, Noise(9, 3))[0].tolist()
    ts = [dice.uniform(.01, 1) for _ in range(50)]
    for s in SCHEDULES[:5]:
        x = torch.tensor(ts)
        for name, want in (("hidden", s.hidden(x)), ("weight", s.weight(x))):
            np.testing.assert_allclose(js([[name, [described(s), float(v)]] for v in x]), want, rtol=2e-6)


def test_losses_agree():
    "200 random logits, temperatures, smoothings and forbidden tokens against PyTorch's cross-entropy, to 1e-6 of it."
    dice = random.Random(5)
    calls, want, tops = [], [], []
    for _ in range(200):
        z = torch.tensor([dice.gauss(0, 3) for _ in range(40)], dtype=torch.float64)
        heat, smooth, y, ban = dice.uniform(.2, 3), dice.choice([0., .1, .3]), dice.randrange(1, 40), dice.choice([[], [0]])
        keep = [i for i in range(40) if i not in ban]
        loss = torch.nn.functional.cross_entropy(z[keep] / heat, torch.tensor(keep.index(y)), label_smoothing=smooth)
        calls.append(["nll", [z.tolist(), y, {"temperature": heat, "smoothing": smooth, "forbid": ban}]]); want.append(float(loss))
        p, i = (z / heat).softmax(0).topk(5)
        tops.append((["topk", [z.tolist(), 5, {"temperature": heat}]], p.tolist(), i.tolist()))
    np.testing.assert_allclose(js(calls), want, rtol=1e-6)
    for told, (_, p, i) in zip(js([t[0] for t in tops]), tops, strict=True):
        assert [r["id"] for r in told] == i
        np.testing.assert_allclose([r["p"] for r in told], p, rtol=1e-6)


def strings(n: int) -> list[str]:
    "Texts of many kinds: words, code, spaces, contractions, accents, emoji of several code points, other scripts, lone pieces."
    dice = random.Random(6)
    words = ["the", "don't", "I'll", "we've", " ", "  ", "\n", "\t", "x=1", "naïve", "Ünï", "日本語", "привет", "👩‍👩‍👧", "e\u0301", "...", "№12",
             "<|mask|>", "<|bos|>", "'s", "\u00a0", "\u2003", "ﬁ", "😀", "0123", "a_b", "\r\n", "\u200d", "ª", "Ⅷ", "½", "\x00", "\x7f"]
    letters = "abc XYZ 019 .,;'\"-\n\té漢Ж🙂"
    return ["".join(dice.choice(words if dice.random() < .5 else letters) for _ in range(dice.randint(0, 30))) for _ in range(n)]


@pytest.mark.parametrize("train", [lambda t: train_bpe(t, 600), train_chars], ids=["bpe", "chars"])
def test_tokenizers_agree(train):
    "10,000 strings: the same tokens, the same words, the same text back; every token is shown alike."
    from lmtrain.views import shown
    texts = strings(10000)
    tok = train(texts[:300] + ["the quick brown fox, he said, didn't jump over the lazy dog"] * 3)
    core = tok.backend_tokenizer
    told = js([["read", [json.loads(core.to_str()), texts]]])[0]
    known = {}
    for text, (ids, words, back, names) in zip(texts, told, strict=True):
        out = tok(text, add_special_tokens=False, split_special_tokens=True)
        assert out["input_ids"] == ids, repr(text)
        if train is not train_chars: assert out.word_ids() == words, repr(text)
        assert tok.decode(ids) == back, repr(text)
        known |= dict(zip(ids, names, strict=True))
    assert all(shown(i, tok) == name for i, name in known.items()) and len(known) > 60
    assert words_of("to be", train_bpe(["to be"] * 9, 300)).tokens["word"][0] == -1


def test_noise_on_vectors_agrees():
    "Directions to 1e-12; 60 shaken texts token for token, with the noise of another seed as control."
    dice = random.Random(7)
    np.testing.assert_allclose(np.array(js([["table", [300, DIM]]])[0]).reshape(300, DIM), directions(300), rtol=0, atol=1e-12)
    table, cases = directions(300), []
    for _ in range(60):
        ids, t = [dice.randrange(300) for _ in range(20)], round(dice.random(), 2)
        cases.append((ids, t, dice.randrange(2**31), [dice.random() < .9 for _ in ids]))
    call = lambda k: [["shaken", [ids, 300, DIM, t, {"seed": seed + k, "epoch": 0}, may]] for ids, t, seed, may in cases]
    mine = [gaussian(ids, table, t, Noise(seed), may) for ids, t, seed, may in cases]
    assert js(call(0)) == mine != js(call(1))
    assert gaussian([5] * 9, table, 0., Noise(1), [True] * 9) == [5] * 9
    lost = gaussian(list(range(300)), table, 1., Noise(1), [True] * 300)
    assert sum(a == b for a, b in zip(lost, range(300), strict=True)) < 12  # 300 draws of 1/300: more than 11 once in 1e8


def test_a_stopped_clock_is_training_noise():
    "Swapped tokens at a row's own t are those of `Uniform`, and the page's those of Python, under four schedules."
    dice, calls, want = random.Random(8), [], []
    for s in map(lambda d: built(d["schedule"]), DRAWN):
        for _ in range(20):
            b, n, t = rows(dice), Noise(dice.randrange(2**31)), round(dice.uniform(.02, .98), 2)
            one = collate([Example([1, *(dice.choice(PLAIN) for _ in range(20))], [False] + [True] * 20, index=dice.randrange(9999))])
            own = float(s.eps + (1 - 2 * s.eps) * times(one, n)[0, 0])
            assert torch.equal(swapped(one, n, range(V), s, own), Uniform(range(V), s).corrupt(one, n).ids)
            calls.append(["swapped", [columns(b, 0), {"seed": n.seed, "epoch": 0}, [0, V], described(s), t]])
            want.append(swapped(b, n, range(V), s, t)[0].tolist())
    assert js(calls) == want


def test_losses_of_a_run_agree():
    "Costs of 40 runs with logits in 16 bits, to 1e-9, at any temperature and smoothing; special numbers are read right."
    dice, calls, want = random.Random(9), [], []
    for _ in range(40):
        z = torch.tensor([[dice.gauss(0, 3) for _ in range(30)] for _ in range(6)])
        r = run("x", "", [dice.randrange(30) for _ in range(6)], z)
        o = {"temperature": dice.uniform(.2, 3), "smoothing": dice.choice([0., .1, .4])}
        calls.append(["cost", [r, o]]); want.append(costs(r, **o))
    np.testing.assert_allclose(js(calls), want, rtol=1e-9, atol=1e-12)
    odd = np.array([0., 6e-8, -6e-5, 65504., -1e4, 1., np.inf], "<f2")
    import base64
    told = js([["halves", [base64.b64encode(odd.tobytes()).decode()]]])[0]
    assert [float(str(v).replace("inf", "inf")) for v in told] == odd.astype(float).tolist()


def test_menu_is_what_the_classes_are():
    "Each question of the menu can be built, and names each field of its class."
    for m in menu(M, [7, V], list(range(100, 140))):
        if m["objective"]["kind"] not in ("SpanCorrupt", "UL2"): assert described(built(m["objective"])) == m["objective"], m["name"]


def test_painted_is_the_loaders_batch():
    "Batch by batch, row by row: what the lab paints is what the loader trains on. Another seed, the control, is not."
    from lmtrain.text import examples
    from lmtrain.loader import Loader
    tok = train_bpe(["the quick brown fox didn't jump over the lazy dog, he said"] * 30, 300)
    items = examples(["the quick brown fox " * n for n in range(1, 30)], tok, 32)
    for o in (MLM(tok.mask_token_id, range(7, len(tok))), CLM(), Diffusion(tok.mask_token_id)):
        lab = MaskingLab(tok, loader=Loader(items, o, 4, 32, pack=True, seed=3), steps=3)
        for step, b in zip(range(3), Loader(items, o, 4, 32, pack=True, seed=3), strict=False):
            for r in range(len(b)):
                lab.step, lab.row = step, r
                q = lab.painted
                for name in ("ids", "targets", "weights", "order", "doc"): assert torch.equal(getattr(q, name)[0], getattr(b, name)[r]), name
                told = js([["corrupt", [lab.menu[0]["objective"], lab.batches[step]["rows"][r], {"seed": lab.seed, "epoch": 0}]]])[0]
                assert told["ids"] == b.ids[r].tolist() and told["targets"] == b.targets[r].tolist()
        other = MaskingLab(tok, loader=Loader(items, o, 4, 32, pack=True, seed=4), steps=1).painted
        assert not torch.equal(other.ids[0], next(iter(Loader(items, o, 4, 32, pack=True, seed=3))).ids[0]) or isinstance(o, CLM)


def test_labs_need_no_torch():
    "Masking, noise and loss labs are made and written as pages without torch, transformers or the network."
    code = ("import sys\nfrom lmtrain.labs import loss, masking, noise\nfrom lmtrain.labs.shared import page\n"
            "for lab in masking.MaskingLab(), noise.NoiseLab(), loss.LossLab(): assert '://' not in page(lab, 'x').replace('http://www.w3.org', '')\n"
            "assert not {'torch', 'transformers'} & {*sys.modules}")
    import sys
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["masking", "noise", "loss"])
def test_module_is_whole(name, tmp_path):
    "A lab's JavaScript is one module that imports nothing and exports `render`."
    (tmp_path / "lab.mjs").write_text(esm(name))
    code = f"import lab from '{(tmp_path / 'lab.mjs').as_uri()}'; process.stdout.write(typeof lab.render)"
    done = subprocess.run([NODE, "--input-type=module", "-e", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "function" and not re.search("^ *import ", esm(name), re.M), done.stderr


def test_shares_of_which_there_are_too_many_are_refused():
    "keep .5 and swap .7 make no batch: JavaScript says so as Python does, instead of drawing one."
    told = js([["wrong", [{"kind": "MLM", "mask_id": M, "regular_ids": [4, V], "rate": .3, "keep": .5, "swap": .7, "shifted": False, "words": False},
                          columns(rows(random.Random(0)), 0), {"seed": 0, "epoch": 0}]]])[0]
    assert "keep + swap = 1.2" in told
    with pytest.raises(ValueError, match=r"keep \+ swap=1.2"): MLM(M, range(4, V), .3, .5, .7)


def test_bytes_that_are_no_letter_are_numbers(tok):
    "A token that is half a letter is shown as its bytes, by Python and by JavaScript, and not as letters of another alphabet."
    from lmtrain.views import shown
    text = "naïve 日本"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    told = js([["read", [json.loads(tok.backend_tokenizer.to_str()), [text]]]])[0][0][3]
    assert told == [shown(i, tok) for i in ids] and "<C3>" in told and not any("Ã" in s for s in told)
