"""Rows for reading documentation: what is shown, asked and answered, by counting and by statistics; nothing gives the answer away."""
import random
import re
from collections import Counter

import pytest
from scipy.stats import binomtest, chisquare

from lmtrain.batch import Example, Noise
from lmtrain.loader import Loader
from lmtrain.objective import CLM
from lmtrain.retrieval.match import match_call, signature_of
from lmtrain.retrieval.raft import Entry, Raft, entries, hidden_name, needed, own_entries, pseudonym, renamed
from lmtrain.text import train_bpe

KNOWN = entries(["json", "math", "random", "itertools", "statistics", "textwrap", "shutil", "functools", "collections"])
TOK = train_bpe([f"{e.summary} {e.name}{e.signature}" for e in KNOWN], 600)


def rows(n: int = 1500, **how):
    r = Raft(KNOWN, TOK, **how)
    return [r.row(random.Random(i)) for i in range(n)]


def test_a_catalogue_does_not_name_its_answers():
    "No summary holds a part of its function's name; sentences are distinct; each call fits its signature and is matched to itself."
    assert len(KNOWN) > 150 and len({e.summary.lower() for e in KNOWN}) == len(KNOWN)
    for e in KNOWN:
        for part in e.name.split(".")[-2:]: assert len(part) < 2 or not re.search(rf"(?i)(?<!\w){re.escape(part)}(?!\w)", e.summary), e
        assert match_call(e.call, e.call, {e.name: signature_of(e.signature)})


def test_hiding_a_name():
    assert hidden_name("json.dumps() and dumps, Dumps but not dumpster", "json.dumps") == "it and it, it but not dumpster"
    assert hidden_name("x is x", "m.x") == "x is x"                                     # one letter is a word of its own


def test_what_must_be_given():
    assert needed("(a, b, c=1, *d, e, f=2, **g)") == ("a", "b") and needed("(a, /, b)") == ("a", "b")
    with pytest.raises(ValueError): needed("(a")


def test_own_functions():
    spec = {"name": "pay.refund", "description": "pay.refund gives money back", "parameters": {"properties": {"note": {}, "order": {}}, "required": ["order"]}}
    e, = own_entries([spec])
    assert e == Entry("pay.refund", "(order, note)", "it gives money back", ("order",)) and e.call == "pay.refund(order)"
    with pytest.raises(ValueError, match="name and parameters"): own_entries([{"name": "x"}])


@pytest.mark.parametrize("golden", [0., .4, 1.])
def test_the_right_document_is_there_as_often_as_asked(golden):
    "k documents, all different; the right one among them with frequency `golden` (exact test, p > .001), and at every place alike."
    there, place, total = 0, Counter(), 0
    for shown, asked in rows(k=3, golden=golden):
        assert len(shown) == 3 == len({(e.summary, e.name) for e in shown})
        for _, e in asked:
            total += 1
            there += e in shown
            if e in shown: place[shown.index(e)] += 1
    assert binomtest(there, total, golden).pvalue > .001 if 0 < golden < 1 else there == golden * total
    assert not golden or chisquare([place[k] for k in range(3)]).pvalue > .001


def test_names_are_made_up_alike_for_right_and_wrong():
    "At the rate `rename`, whether a document is right or not (exact tests): a strange name gives nothing away. Control: renaming only right ones would."
    old, right, wrong = {e.name for e in KNOWN}, [], []
    for shown, asked in rows(k=3, rename=.7, questions=1):
        for e in shown: (right if e == asked[0][1] else wrong).append(e.name not in old)
    for some in (right, wrong): assert binomtest(sum(some), len(some), .7).pvalue > .001
    assert binomtest(sum(right), len(right), sum(wrong) / len(wrong)).pvalue > .001 > binomtest(len(right), len(right), .7).pvalue
    assert all(e.name in old for shown, _ in rows(100, rename=0.) for e in shown)


def test_made_up_names_are_new_every_time():
    names = [pseudonym(random.Random(n)) for n in range(5000)]
    assert len({*names}) > 4950 and not {*names} & {e.name for e in KNOWN} and all(n.isidentifier() for n in names)
    e = renamed(KNOWN[0], names[0])
    assert e.call.startswith(names[0] + "(") and e.summary == KNOWN[0].summary


def test_questions_lose_words_and_keep_one():
    "A share `drop` of the words (exact test), in order; never all."
    r = Raft(KNOWN, TOK, drop=.4)
    kept = total = 0
    for i in range(2000):
        e = KNOWN[i % len(KNOWN)]
        q, words = r.question(e, random.Random(i)).split(), iter(e.summary.split())
        assert q and all(w in words for w in q)                                        # in order
        kept, total = kept + len(q), total + len(e.summary.split())
    assert abs(kept / total - .6) < .01
    assert Raft(KNOWN, TOK, drop=1.).question(KNOWN[0], random.Random(0)) == KNOWN[0].summary.split()[0]


def test_rows_are_text_and_answers_in_the_loss():
    "What is in the loss are the answers and their ends, nothing else; a quoted sentence stands in the documents word for word."
    for how in ({}, {"quote": True}, {"name_first": True}):
        r = Raft(KNOWN, TOK, **how)
        e = r(Example([0], index=3), Noise(1, 2))
        shown, asked = r.row(dice := random.Random("1 2 3"))
        learned = TOK.decode([i for i, a in zip(e.ids, e.answer, strict=True) if a])
        assert learned == "".join(r.answer(x) + TOK.eos_token for _, x in asked)
        text = TOK.decode(e.ids)
        for x in shown: assert text.count(r.document(x)) == 1
        if how.get("quote"): assert all(f'"{x.summary}"' in learned and x.summary in text.replace(learned, "") for _, x in asked)
        first = text.index(shown[0].summary) < text.index(shown[0].name)
        assert first != bool(how.get("name_first")) and dice.random() >= 0


def test_rows_do_not_depend_on_who_makes_them():
    "The same for ranks and workers; others in the next epoch and under another seed."
    r = Raft(KNOWN, TOK)
    made = lambda **k: Loader(r.items(12), CLM(), rows=4, T=900, change=r, **k)
    by = lambda some: {int(b.index[i, 0]): b.clean[i][b.doc[i] > 0].tolist() for b in some for i in range(len(b))}
    one = by([b for b, _ in zip(made(), range(3), strict=False)])
    two = by([b for k in (0, 1) for b, _ in zip(made(rank=k, world=2), range(1), strict=False)])
    assert len(one) == 12 and two and all(one[n] == two[n] for n in two)
    assert by([next(iter(made(workers=1)))]).items() <= one.items()
    e = Example([0], index=5)
    assert r(e, Noise(0, 0)) == r(e, Noise(0, 0)) != r(e, Noise(0, 1)) != r(e, Noise(1, 1))


def test_too_few_functions():
    with pytest.raises(ValueError, match="need 3 entries"): Raft(KNOWN[:2], TOK, k=2)
