"""The main job: a tour of a few steps does all that a long one does."""
import json
import math
from difflib import SequenceMatcher
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtrain import run as running
from lmtrain import tour as module
from lmtrain.batch import Example, Noise, collate
from lmtrain.checkpoint import Save, checkpoints
from lmtrain.corpora import corpus
from lmtrain.evaluate import bits_per_byte, interval, ngram_bits, row_bits
from lmtrain.generation import distribution, generate
from lmtrain.finetuning.questions import verifiable
from lmtrain.model import Size, Transformer, load
from lmtrain.objective import CLM, hide, logp, shift
from lmtrain.settings import Scale
from lmtrain.text import examples, train_bpe
from lmtrain.tour import known_words, longest_copy, tour
from lmtrain.views import paint, paint_loss, paint_sees, paint_trace

TINY = Scale(vocab=300, dim=32, heads=2, layers=1, length=64, rows=4, lr=.01, minutes=1, seed=0, seeds=1)


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("papers")
    words = "the sea was calm and the sailors sang while <b>ships</b> & birds went home again".split()
    dice = np.random.default_rng(0)
    for i in range(30): (folder / f"{i:02}.txt").write_text(" ".join(dice.choice(words, 90)) + f" day {i}.\n")
    return folder


@pytest.fixture(scope="module")
def story(papers, tmp_path_factory):
    said: list[str] = []
    return tour(str(papers), steps=12, out=tmp_path_factory.mktemp("out"), sizes=TINY, say=said.append), said


class Page(HTMLParser):
    "Every address that a page asks for."
    def __init__(self): super().__init__(); self.links, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]


def test_report_needs_nothing_else(story):
    "No script, no address but embedded pictures, no url() in its styles; what the text says is escaped."
    html = (story[0].out / "report.html").read_text()
    page = Page(); page.feed(html)
    assert page.links and all(v.startswith("data:image/png;base64,") for v in page.links)
    assert not page.scripts and "url(" not in html and "@import" not in html
    assert "&lt;b" in html and "ships</b>" not in html
    for title, _ in story[0].sections: assert title in html


def test_everything_is_written(story):
    s, said = story
    assert {p.name for p in s.out.iterdir()} == {".lock", "facts.json", "history.jsonl", "held.jsonl", "model",
                                                 "plan.json", "report.html", "samples.txt"}
    facts, history = json.loads((s.out / "facts.json").read_text()), (s.out / "history.jsonl").read_text().splitlines()
    assert facts["steps"] == len(history) == 12 and facts["scale"]["dim"] == 32
    assert {"bits_per_byte", "xz", "five_gram", "known_words", "longest_copy", "tokens_per_second"} <= facts.keys()
    assert any("bits per byte" in line for line in said) and any("report" in line for line in said)


def test_the_saved_model_scores_the_same_in_transformers(story):
    "Bits per byte of the directory opened by transformers, summed by hand over every held-out byte, equal the facts'."
    s, _ = story
    model, tok = AutoModelForCausalLM.from_pretrained(s.out / "model"), AutoTokenizer.from_pretrained(s.out / "model")
    bits = nbytes = 0.
    with torch.no_grad():
        for text in s.validation:
            ids = torch.tensor([[tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"], tok.eos_token_id]])
            nbytes += len(text.encode())
            T, start = TINY.length, 0
            while start < ids.shape[1] - 1:                                            # rows overlap by one token
                row = ids[:, start:start + T]                                          # (1,T)
                p = model(row).logits[:, :-1].double().log_softmax(-1)                 # (1,T-1,V)
                bits -= p.gather(2, row[:, 1:, None]).sum().item() / math.log(2); start += T - 1
    assert abs(bits / nbytes - s.facts["bits_per_byte"]) < 1e-3


def test_the_same_steps_give_the_same_model(papers, tmp_path, story):
    "A tour is repeated bit for bit by its number of steps."
    again = tour(str(papers), steps=12, out=tmp_path, sizes=TINY, say=lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(story[0].model.parameters(), again.model.parameters(), strict=True))
    assert (tmp_path / "samples.txt").read_text() == (story[0].out / "samples.txt").read_text()


def test_the_plan_is_written_before_step_0(papers, tmp_path, monkeypatch):
    "Minutes become steps before training begins: after a crash at step 0 the plan is there, and no step is."
    def crash(s): raise KeyboardInterrupt
    monkeypatch.setattr(module, "STAGES", (module.reading, module.planning, crash))
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: 1.5)
    with pytest.raises(KeyboardInterrupt): tour(str(papers), minutes=2, out=tmp_path, sizes=TINY, say=lambda _: None)
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == 80


class Power(Exception): "The power goes."


@pytest.mark.parametrize("fault", [KeyboardInterrupt, Power])
def test_an_interrupted_tour_goes_on(papers, tmp_path, monkeypatch, story, fault):
    "Stopped after step 7 of 12 and started again: the plan is kept, and model, history and samples are those of the whole."
    def stop(self, trainer):
        if trainer.done == 7: raise fault
    request = {"data": str(papers), "steps": 12, "out": tmp_path, "sizes": TINY}
    with monkeypatch.context() as m:
        m.setattr(running.Evaluate, "after_step", stop)
        m.setattr(running, "Save", lambda root, every: Save(root, every=5))
        with pytest.raises(fault): tour(**request, say=lambda _: None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    said: list[str] = []
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: pytest.fail("the plan was there"))
    again = tour(**request, say=said.append)
    assert any("Going on from step 5 of 12" in line for line in said)
    assert all(torch.equal(a, b) for a, b in zip(story[0].model.parameters(), again.model.parameters(), strict=True))
    loss = lambda out: module.History.read(out / "history.jsonl")["loss"]
    assert loss(tmp_path) == loss(story[0].out)
    assert (tmp_path / "samples.txt").read_text() == (story[0].out / "samples.txt").read_text()
    assert not (tmp_path / "checkpoints").exists()


def test_another_request_starts_anew(papers, tmp_path, monkeypatch):
    "Checkpoints of another plan are not continued."
    def stop(self, trainer): raise Power
    with monkeypatch.context() as m:
        m.setattr(running.Evaluate, "look", lambda *_: None); m.setattr(running.Evaluate, "after_step", stop)
        m.setattr(running, "Save", lambda root, every: Save(root, every=1))
        m.setattr(running.Progress, "after_step", lambda self, trainer: trainer.callbacks[2].after_step(trainer))
        with pytest.raises(Power): tour(str(papers), steps=12, out=tmp_path, sizes=TINY, say=lambda _: None)
    assert checkpoints(tmp_path / "checkpoints")
    said: list[str] = []
    tour(str(papers), steps=3, out=tmp_path, sizes=TINY, say=said.append)
    assert not any("Going on" in line for line in said)
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == 3


def test_measuring_does_not_train(papers):
    "The measured copy is thrown away: the model is untouched, and so is the loader."
    tok = train_bpe(["the sea " * 50], 300)
    rows = examples(["the sea " * 500], tok, 16)
    model = Transformer(Size(len(tok), 16, 2, layers=1))
    before = [p.clone() for p in model.parameters()]
    assert module.seconds_per_step(model, module.Loader(rows, CLM(), 2, 16), .1, module.fitting_optimizer(model, 32)) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_longest_copy_is_difflibs():
    "The same length as difflib finds, on random strings of two letters; the empty text copies nothing."
    dice = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(dice.choice(list("ab"), 30)) for _ in range(2))
        found = longest_copy(a, [b])
        assert found in a and found in b
        assert len(found) == SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
    assert longest_copy("", ["x"]) == "" and longest_copy("abc", ["xyz"]) == ""


def test_known_words():
    assert known_words("the sea, the zea!", ["the sea"]) == 3 / 4 and known_words("12 34", ["x"]) == 0


# ---- generate

def model_of(vocab=12):
    torch.manual_seed(0)
    model = Transformer(Size(vocab, dim=16, heads=2, layers=2, length=24)).eval()
    for p in model.parameters(): p.data *= 8                                           # far from uniform
    return model


def test_distribution():
    "Temperature 1 is the softmax, 0 the likeliest, top-p the smallest set of at least p: by enumeration."
    logits = torch.tensor([[2., 1., 0., -1.], [0., 0., 3., 0.]])                       # (2,4)
    assert torch.allclose(distribution(logits), logits.double().softmax(1))
    assert distribution(logits, 0).argmax(1).tolist() == [0, 2] and distribution(logits, 0).sum() == 2
    for top in (.1, .5, .7, .9, .95, .999):
        for p, left in zip(logits.double().softmax(1), distribution(logits, 1, top), strict=True):
            n = next(n for n in range(1, 5) if p.sort(descending=True).values[:n].sum() >= top)
            assert int((left > 0).sum()) == n and torch.allclose(left[left > 0], p[left > 0] / p[left > 0].sum())


def test_samples_follow_the_model():
    "4,000 draws of the next token against its probabilities: chi-square below its 1 - 1e-6 quantile (11 freedoms)."
    torch.manual_seed(0)
    model = Transformer(Size(12, dim=16, heads=2, layers=1, length=24)).eval()
    for p in model.parameters(): p.data *= 3
    p = distribution(model.head(model(collate([Example([1, 5])])))[:, -1])[0].detach() # (12,)
    ids = generate(model, [[1, 5]] * 4000, 1, seed=3).ids[:, -1]                       # (4000,)
    chi = lambda q: float(((torch.bincount(ids, minlength=12) - 4000 * q) ** 2 / (4000 * q)).sum())
    assert p.min() > .005 and chi(p) < 48
    assert chi(p.roll(1)) > 48  # negative control: another distribution


def test_trace_is_what_the_model_says():
    "The recorded probabilities are the model's own, for rows of unequal length; greedy rows do not see each other."
    model, prompts = model_of(), [[1, 5, 6], [1], [1, 2, 3, 4, 5]]
    t = generate(model, prompts, 8, seed=1)
    for r, prompt in enumerate(prompts):
        row = t.ids[r][t.when[r] >= 0]
        assert row[:len(prompt)].tolist() == prompt and len(row) == len(prompt) + 8
        said = logp(model, shift(collate([Example(row.tolist())])))[0, :-1].exp()      # (T-1,)
        assert torch.allclose(said[len(prompt) - 1:], t.p[r][len(prompt):len(row)], atol=1e-5)
        alone = generate(model, [prompt], 8, temperature=0).ids[0]
        assert torch.equal(alone[:len(row)], generate(model, prompts, 8, temperature=0).ids[r][:len(row)])


def test_eos_ends_a_row():
    "After eos nothing is written; faults at the door."
    model = model_of()
    t = generate(model, [[1]] * 50, 12, eos=3)
    for ids, when in zip(t.ids, t.when, strict=True):
        row = ids[when >= 0].tolist()
        assert 3 not in row[1:-1] and (row[-1] == 3 or len(row) == 13)
    with pytest.raises(ValueError, match="bos"): generate(model, [[]], 3)
    with pytest.raises(ValueError, match="made for 24"): generate(model, [[1]], 24)


# ---- evaluate

def test_every_byte_is_scored_once(papers):
    "Bits per byte do not depend on the batch size; a uniform model pays log2(V) for each token but bos, exactly."
    data = corpus(papers)
    tok = train_bpe(data["train"]["text"], 300)
    texts = data["validation"]["text"][:]
    rows = examples(texts, tok, 64)
    model = Transformer(Size(len(tok), 16, 2, layers=1))
    assert abs(bits_per_byte(model, rows, 1) - bits_per_byte(model, rows, 7)) < 1e-5
    for p in model.parameters(): p.data.zero_()
    tokens = sum(len(tok(t, add_special_tokens=False)["input_ids"]) + 1 for t in texts)
    want = tokens * math.log2(len(tok)) / sum(len(t.encode()) for t in texts)
    assert abs(bits_per_byte(model, rows) - want) < 1e-5
    lost = type(rows)(rows.tokens, rows.cuts[:-1], rows.sizes[:-1] * rows.nbytes / rows.sizes[:-1].sum(), rows.docs[:-1])
    assert abs(bits_per_byte(model, lost) - want) > 1e-3  # negative control: a row left out is noticed
    assert len(row_bits(model, rows)) == len(rows)


def slow_ngram(train: str, text: str, n: int) -> float:
    "Witten and Bell with dictionaries, straight from the formula, in bytes."
    before, rest, bits = train.encode(), text.encode(), 0.
    whole = before + rest
    for at in range(len(before), len(whole)):
        p = 1 / 256
        for k in range(n):
            context = whole[at - k:at]
            follow = [before[i + k] for i in range(len(before) - k) if before[i:i + k] == context]
            if follow: p = (follow.count(whole[at]) + len(set(follow)) * p) / (len(follow) + len(set(follow)))
        bits -= math.log2(p)
    return bits / len(rest)


def test_ngram_is_the_formula():
    "Equal to a slow one written with lists, for several orders and texts with bytes never seen."
    text = "the cat sat on the mat; the rat ate the cat. " * 2
    for n in (1, 2, 3, 5):
        for ask in ("the cat ate the rat", "ünseen", "zzz"): assert abs(ngram_bits([text], [ask], n) - slow_ngram(text, ask, n)) < 1e-9


def test_interval_covers():
    "Of 400 intervals at 90 % around the mean of 60 skewed values, 82 % to 96 % hold it (five standard errors of 1.5 %)."
    dice = np.random.default_rng(0)
    hits = sum(low <= 1 <= high for _, low, high in
               (interval(dice.exponential(1, 60), level=.9, draws=400, seed=i) for i in range(400)))
    assert .82 <= hits / 400 <= .96
    with pytest.raises(ValueError): interval([])


def test_interval_of_a_ratio():
    "A cost of 2 a token in rows of any length has no spread; without the lengths, the negative control, it seems to."
    sizes = np.random.default_rng(0).integers(1, 300, 40)
    assert interval(2. * sizes, sizes) == (2, 2, 2)
    _, low, high = interval(2. * sizes)
    assert high - low > .3 * 2 * sizes.mean()


# ---- views

def test_pictures_say_what_is_asked():
    "One bar for each asked position, one orange ground for each hidden token, costs that add up, text escaped."
    tok = train_bpe(["a <b> & c " * 20], 300)
    b = collate([Example(tok("a <b> & c a <b>")["input_ids"])])
    masked = hide(b, (Noise(seed=2)(b) < .5) & (b.doc > 0), tok.mask_token_id)
    html, n = paint(masked, tok), int((masked.weights != 0).sum())
    assert 0 < n < b.ids.numel() and html.count("border-bottom") == html.count("230,120,0") == html.count("label: ") == n
    assert "<b>" not in html.replace("<b>1:</b>", "") and "&lt;" in html
    assert paint(b, tok).count("not in the loss") == b.ids.numel()
    model = Transformer(Size(len(tok), 16, 2, layers=1))
    grid = paint_sees(b.set(order=(b.order - 2).clamp(min=0)), tok)
    sees = b.set(order=(b.order - 2).clamp(min=0)).sees                                # (1,T,T)
    assert grid.count("<circle") == int(sees.sum()) and grid.count("<rect") == sees.numel()
    with pytest.raises(ValueError, match="at most 64"): paint_sees(collate([Example([7] * 65)]), tok)
    t = generate(model, [[1, 5]], 3)
    assert [f">{k}</sub>" in paint_trace(t, tok) for k in (1, 2, 3, 4)] == [True] * 3 + [False]
    asked = shift(b)
    cost = -logp(model, asked)[0].detach() / math.log(2)                               # (T,)
    said = [float(x) for x in module.re.findall(r"title='([\d.]+) bits", paint_loss(model, asked, tok))]
    assert np.allclose(said, cost[asked.weights[0] > 0], atol=.006)


def test_a_pace_that_was_wrong_is_said(papers, tmp_path, monkeypatch):
    "A machine that was busy while it was measured: the number of steps is kept, and the report of the time says so. Control: a right pace is silent."
    for pace, wrong in ((1.5, True), (None, False)):
        said: list[str] = []
        with monkeypatch.context() as m:
            if pace: m.setattr(module, "seconds_per_step", lambda *_, pace=pace: pace)
            else: m.setattr(module, "go_on", exact(module.go_on))
            s = tour(str(papers), minutes=.2 if pace else None, steps=None if pace else 4, out=tmp_path / str(pace), sizes=TINY, say=said.append)
        assert s.total == (8 if pace else 4)
        assert any("where 0.2 were planned" in line for line in said) == wrong
        assert any("the number of steps is kept" in line for line in said)


def exact(go_on):
    "A run whose every step took what was planned."
    def planned(trainer, out, *a, **k):
        seen = go_on(trainer, out, *a, **k)
        pace = json.loads((out / "plan.json").read_text())["seconds_per_step"]
        for row in trainer.history.rows: row["seconds"] = pace
        return seen
    return planned


def test_answers(story):
    "The tuned copy is scored on questions whose words and numbers no training question has; the model that was saved is not the tuned one."
    s = story[0]
    found = s.facts["answers"]
    assert found["questions"] > 300 and 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1 and 0 < found["most_frequent"] < .5
    asked = [*verifiable(400, TINY.seed, module.KINDS)]
    assert found["questions"] == sum(q.held for q in asked) and not {q.prompt for q in asked if q.held} & {q.prompt for q in asked if not q.held}
    assert "Answering questions" in [title for title, _ in s.sections]
    saved = load(s.out / "model")[0].state_dict()
    assert all(torch.equal(p, saved[n]) for n, p in s.model.cpu().state_dict().items())
