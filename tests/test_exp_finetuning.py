"""The experiments on fine-tuning: `lora`, `adapt`, `finetune-or-prompt`, `symbol-tuning`; verdicts on made-up rows, one seed shows nothing."""
import random

import pytest
import torch

from lmtrain.claims import of_arm
from lmtrain.experiments import adapt, finetune_or_prompt, lora, symbol_tuning
from lmtrain.finetuning import models
from lmtrain.pretrained import Pretrained


@pytest.mark.parametrize("module, size", [(lora, .02), (adapt, .02), (finetune_or_prompt, .05), (symbol_tuning, .05)])
def test_run(module, size):
    "A smoke run: exact laws hold, a single seed shows nothing, the plot is drawn."
    rows = [{"seed": 0, **r} for r in module.run(0, size)]
    v = module.verdict(rows)
    laws = v.checks if module is not adapt else {}                                     # a few steps need not help
    assert all(laws.values()) and not v.shown and module.plot(rows).axes


def lora_rows(right: float, forgot: float):
    "Three seeds; rank 8 at its best rate is right in `right` and forgets `forgot`, all weights 0.8 and 2."
    out = []
    for s in range(3):
        out.append({"seed": s, "arm": "untuned", "rate": 0., "trained": 0, "forgot": 0., "choose": 0., "report": 0.})
        for arm, (_, rates) in lora.ARMS.items():
            for k, rate in enumerate(rates):
                good = k == 1                                                          # the middle rate is the best
                a, f = (right, forgot) if arm == "rank 8" else (.8, 2.)
                out.append({"seed": s, "arm": arm, "rate": rate, "trained": 5, "merged": 0., "kept": 0., "forgot": (f if good else 9.) + .01 * s,
                            "choose": .5 + .3 * good, "report": (a if good else .99) + .001 * s})
    return out


def test_lora_chooses_on_other_questions():
    "The rate is that of the questions that choose; control: the rate that is best on the reported ones is another."
    rows = lora_rows(.8, 1.)
    assert {r["rate"] for r in lora.chosen(rows) if r["arm"] == "rank 8"} == {lora.ARMS["rank 8"][1][1]}
    best = max((r for r in rows if r["arm"] == "rank 8"), key=lambda r: r["report"])
    assert best["rate"] != lora.ARMS["rank 8"][1][1]


def test_lora_verdict_needs_both_halves():
    assert lora.verdict(lora_rows(.8, 1.)).shown
    assert not lora.verdict(lora_rows(.7, 1.)).shown                                   # learns less
    assert not lora.verdict(lora_rows(.8, 2.5)).shown                                  # forgets more
    broken = lora_rows(.8, 1.)
    broken[-1]["merged"] = .1
    assert not all(lora.verdict(broken).checks.values())


def adapt_rows(gain: float):
    out = []
    for s in range(3):
        for n in ("causal", "masked", "diffusion"):
            for arm in ("plays", "more plays", *adapt.SHARES):
                out.append({"seed": s, "arm": f"{n}, {arm}", "plays": 2. + .01 * s, "documentation": 3. - (arm in adapt.SHARES)})
                for how in ("probe", "adapter", "all weights"):
                    out.append({"seed": s, "arm": f"{n}, {arm}, {how}", "right": .5 + gain * (arm == "none") + .001 * s})
    return out


def test_adapt_verdict():
    "The control is more steps on the old text, not the pretrained model."
    assert adapt.verdict(adapt_rows(.1)).shown and not adapt.verdict(adapt_rows(0.)).shown
    rows = adapt_rows(.1)
    for r in rows:
        if "more plays" in r["arm"] and "right" in r: r["right"] += .1                 # any further training helps as much
    assert not adapt.verdict(rows).shown


def test_adapt_sees_no_names():
    "The label does not stand in the text."
    texts, kinds, aside = adapt.docstrings(200)
    assert not any(name in t.split() for t in texts for name in adapt.NAMES) and len(texts) == len(kinds) == len(aside)


def test_prompts_share_what_they_share():
    "A prefix read once gives what the whole prompt gives, for texts of several lengths; control: another prefix does not."
    texts = ["a b c d", "some text that is longer than the others", "x y z", "a numpy pandas networkx torch"] * 6
    model, tok = models.smollm2(texts * 10)
    torch.manual_seed(1)
    for p in model.net.parameters(): torch.nn.init.normal_(p, std=.3)                  # so that answers depend on the prompt
    first = [models.ids_of(f" {name}", tok)[0] for name in finetune_or_prompt.LABELS]
    assert len({*first}) == len(first)
    def whole(before: str) -> list[int]:
        ids = [torch.tensor([models.ids_of(before, tok) + models.ids_of(finetune_or_prompt.asked(t), tok)]) for t in texts]
        return [int(model.net(input_ids=i).logits[0, -1, first].argmax()) for i in ids]
    some = ["", "Text: one two\nPackage: numpy\n\n", "zz zz zz zz zz zz"]
    for before in some: assert finetune_or_prompt.likeliest(model, before, texts, tok) == whole(before)
    assert len({tuple(whole(b)) for b in some}) > 1


def test_prompts_do_not_choose_their_end():
    "16 examples against the last number of steps, whatever the others have."
    rows = [{"seed": s, "arm": f"{k} shots", "right": .4 + (.5 if k == 4 else 0) + .001 * s, "tokens": 10 * k, "own": 10, "seconds": 1. + k,
             "cached": 1., "flops": 10. + k, "flops_cached": 11.} for s in range(3) for k in finetune_or_prompt.SHOTS]
    rows += [{"seed": s, "arm": f"{k} steps", "right": .6 + .001 * s, "forgot": 0., "tokens": 9. * k, "flops": 100. * k, "seconds": 3. * k}
             for s in range(3) for k in finetune_or_prompt.STEPS]
    v = finetune_or_prompt.verdict(rows)
    assert v.shown and "4 steps are the first as good" in v.found and "after 25 questions" in v.found   # 400 / (26 - 10)


def test_episodes():
    "Two of each class and one more; the same texts whatever the labels are; exchanged labels exchange the answer."
    task = symbol_tuning.Task("t", (tuple("abcdef"), tuple("uvwxyz")), ("no", "yes"))
    for k in range(40):
        found = {n: symbol_tuning.episode(task, f, random.Random(k)) for n, f in symbol_tuning.WAYS.items()}
        texts = {n: [line.split(" =")[0] for line in p.splitlines()] for n, (p, _, _) in found.items()}
        assert texts["natural"] == texts["exchanged"] == texts["symbols"] and len({*texts["natural"]}) == 5
        assert sum(t in "abcdef" for t in texts["natural"][:4]) == 2
        assert found["natural"][1:] == found["exchanged"][:0:-1]
        for p, right, wrong in found.values(): assert p.count(f"={right}\n") == 2 == p.count(f"={wrong}\n") and right != wrong
    assert not {*symbol_tuning.SEEN} & {*symbol_tuning.NEW}


def test_symbols_verdict():
    "What counts is exchanged labels, against the untuned model."
    def rows(follow: float):
        return [{"seed": s, "arm": f"{a}, {w}", "right": .5 + .001 * s + (follow if (a, w) == ("symbols", "exchanged") else 0.)}
                for s in range(3) for a in ("untuned", *symbol_tuning.TUNED) for w in symbol_tuning.WAYS] + [
                {"seed": 0, "arm": "tasks", "tuned on": 3, "held out": 1}]
    assert symbol_tuning.verdict(rows(.2)).shown and not symbol_tuning.verdict(rows(0.)).shown
    assert len(of_arm(rows(0.), "untuned, natural", "right")) == 3


def test_a_stand_in_is_of_the_same_kind():
    model, tok = models.smollm2(["a b"] * 20)
    assert isinstance(model, Pretrained) and model.causal and type(model.net).__name__ == "LlamaForCausalLM" and len(tok) <= 400
