"The exercises of the chapter `instruct`."
from typing import Any

import torch

from ..batch import Example, Noise, collate
from ..model import Size, Transformer
from ..objective import CLM, logp
from .kit import Wrong, callable_of, exercise, expect, number, result

TURNS = [False] * 8 + [True] * 4 + [False] * 6 + [True] * 3


@exercise("instruct-1", "How many labels are learned?", "●", 5,
          "Which tokens does the assistant write? The markers and the begin token are written by the template.",
          "For each answer: its own tokens, and one more that ends it.",
          "A conversation with one answer of 10 tokens has 11.")
def learned_labels(answer: Any) -> None:
    value = number(answer)
    e = Example(list(range(21)), TURNS)
    truth = int(CLM().count(CLM().corrupt(collate([e]), Noise()))["clm"])
    expect(value != truth - 2, "that leaves out the ends of the answers, so the model would never stop")
    expect(value != truth + 2, "that counts the markers of the assistant's turns; the template writes those")
    expect(value != 15, "that counts the user's tokens too; they are read and not learned")
    expect(value == truth, "CLM().count was run on this conversation just now, and gives another number")


@exercise("instruct-2", "Another shape of data", "●", 5,
          "A message is a dict with a role and a content; the answers are a list.",
          "Return a list of two dicts, the roles are user and assistant.",
          "A greeting would be [{'role': 'user', 'content': 'Hello'}].")
def as_messages(answer: Any) -> None:
    f = callable_of(answer, "a function of a row")
    for row in ({"question": "2 + 3?", "answers": ["5", "five"]}, {"question": "Who?", "answers": ["I"]}):
        found = f(dict(row))
        expect(isinstance(found, list) and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in found),
               "the result must be a list of dicts, each with a role and a content")
        expect([m["role"] for m in found] == ["user", "assistant"], f"the roles must be user and assistant, one each, and they are {[m['role'] for m in found]}")
        expect(isinstance(found[1]["content"], str), "the assistant's content must be a text; the row holds a list of answers")
        expect(found[0]["content"] == row["question"], "the user's content must be the question")
        expect(found[1]["content"] == row["answers"][0], "the assistant's content must be the first answer")


@exercise("instruct-3", "Only the first answer", "●", 5,
          "The answer column is a list of truth values; where does its first run of True end?",
          "Find the first True, then the first False after it; everything from there on becomes False.",
          "[False, True, False, True] becomes [False, True, False, False].")
def first_turn_only(answer: Any) -> None:
    f = callable_of(answer, "a function of an Example")
    for turns in (TURNS, TURNS[:12], [True, True, False, True], [False] * 3):
        e = result(f(Example(list(range(len(turns))), list(turns))), Example)
        got = [bool(a) for a in (e.answer if e.answer is not None else [True] * len(turns))]
        expect(list(e.ids) == list(range(len(turns))), "the ids must stay as they are")
        first = turns.index(True) if any(turns) else 0
        end = next((i for i in range(first, len(turns)) if not turns[i]), len(turns))
        told = f"for the answer column {[int(t) for t in turns]}"
        expect(got != turns or turns == [i in range(first, end) for i in range(len(turns))], f"{told} nothing changed")
        expect(not any(got[end:]), f"{told} a later answer is still in the loss")
        expect(got[first:end] == turns[first:end], f"{told} the first answer is not wholly in the loss")
        expect(got == [first <= i < end and turns[i] for i in range(len(turns))], f"{told} a token of the prompt is in the loss")


@exercise("instruct-4", "Cut the prompt, not the answer", "●●", 15,
          "How many tokens are too many? They come off the left end of the prompt.",
          "Slice ids and answer alike: the last T of each, provided that the answer has no more than T tokens.",
          "A prompt of 5 and an answer of 3 in 6 tokens keep the last 3 of the prompt.")
def cut(answer: Any) -> None:
    f = callable_of(answer, "a function of an Example and T")
    for p, a, T in ((5, 3, 6), (5, 3, 8), (5, 3, 20), (5, 3, 3), (2, 9, 5)):
        e = Example(list(range(10, 10 + p + a)), [False] * p + [True] * a)
        told = f"a prompt of {p} and an answer of {a} tokens in T = {T}"
        found = f(e, T)
        if a > T:
            expect(found is None, f"{told}: the answer does not fit, so the result must be None")
            continue
        expect(found is not None, f"{told}: the answer fits, and the result is None")
        got = result(found, Example)
        ids, mask = list(got.ids), [bool(v) for v in (got.answer if got.answer is not None else [True] * len(got))]
        expect(len(ids) <= T, f"{told}: the result has {len(ids)} tokens")
        expect(len(mask) == len(ids), f"{told}: ids and answer have different lengths")
        expect(ids[len(ids) - a:] == list(e.ids)[p:] and mask[len(ids) - a:] == [True] * a, f"{told}: the answer is not whole")
        expect(len(ids) == min(T, p + a), f"{told}: more of the prompt would fit")
        expect(ids == list(e.ids)[-len(ids):], f"{told}: the prompt must lose its left end, and it lost another part")
        expect(sum(mask) == a, f"{told}: tokens of the prompt are in the loss")


@exercise("instruct-5", "Best-fit packing", "●●", 15,
          "Sort the item numbers by their lengths, and keep for each row how much room it has.",
          "Among the rows with enough room choose the one with the least; if there is none, begin a row.",
          "Lengths 5, 4, 3, 2 with T = 7: 5 opens a row, 4 opens another, 3 fits the second exactly, 2 the first.")
def best_fit(answer: Any) -> None:
    f = callable_of(answer, "a function of lengths and T")
    many = [int(n) for n in torch.randint(1, 40, (60,))]
    for lengths, T in (([3], 5), ([5, 4, 3, 2], 7), ([4, 4, 4], 4), ([6, 5, 3, 2, 2], 9), (many, 50)):
        found = f(list(lengths), T)
        try: rows = [[int(i) for i in row] for row in found]
        except (TypeError, ValueError): raise Wrong("the result must be a list of rows, each a list of item numbers") from None
        told = f"lengths {lengths[:8]}{'...' if len(lengths) > 8 else ''}, T = {T}"
        expect(sorted(i for row in rows for i in row) == list(range(len(lengths))), f"{told}: each item must be in exactly one row, by its number")
        expect(all(sum(lengths[i] for i in row) <= T for row in rows), f"{told}: a row is longer than T")
        room: list[int] = []                               # the rule, by its definition
        for n in sorted(lengths, reverse=True):
            fits = [k for k, r in enumerate(room) if r >= n]
            if fits: room[min(fits, key=lambda k: room[k])] -= n
            else: room.append(T - n)
        expect(len(rows) <= len(room), f"{told}: {len(rows)} rows, and the rule needs fewer")
        used = sorted(sum(lengths[i] for i in row) for row in rows)
        expect(used == sorted(T - r for r in room), f"{told}: the rows are filled otherwise than by the rule: longest first, into the fullest row with room")


@exercise("instruct-6", "Weighted by belief", "●●●", 45,
          "Begin with `nll(model, b)`, which is -log p of each label; what is p itself, and how is a tensor treated as a constant?",
          "Sum of weight times cost times exp(-cost), the last factor detached. The gradient of -p log p with p constant is -grad p.",
          "A weight that is learned from, without detach, would have the gradient of p log p: at small p it even points the other way.")
def by_belief(answer: Any) -> None:
    o = answer() if isinstance(answer, type) else answer
    expect(isinstance(o, CLM), f"a subclass of CLM is wanted here, and this is {type(o).__name__}")
    torch.manual_seed(0)
    model = Transformer(Size(vocab=20, dim=16, heads=2, layers=1, length=16))
    q = o.corrupt(collate([Example([1, 5, 6, 7, 2], [False, False, True, True, True]), Example([1, 8, 2])]), Noise())
    p = logp(model, q).exp()                                                           # (B,T)
    total, plain = (torch.stack([*each.loss(model, q).values()]).sum() for each in (o, CLM()))
    expect(not torch.allclose(total, plain, rtol=1e-3), "the loss is the plain one: the probabilities are missing")
    expect(total > 0, "the loss is negative: p is not detached from a sum of -p, or a sign is lost")
    want = (-(p.log()) * p * q.weights).sum()
    expect(torch.allclose(total, want, rtol=1e-4), "the value must be the sum of -p log p over the labels in the loss, not divided by anything")
    own = torch.autograd.grad(total, model.embed_tokens.weight)[0]
    minus = torch.autograd.grad(-(p * q.weights).sum(), model.embed_tokens.weight)[0]
    expect(torch.allclose(own, minus, atol=1e-5), "the value is right and the gradient is not: the probability must be a constant")
