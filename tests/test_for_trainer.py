"""Token objectives inside an unchanged transformers.Trainer: the gradient of our own Trainer, at any accumulation."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM, TrainingArguments
from transformers import Trainer as TheirTrainer

from lmtrain.batch import Example, Noise, collate
from lmtrain.model import Size, config_of
from lmtrain.pretrained import Pretrained
from lmtrain.objective import CLM, PrefixLM, for_trainer, packed, unpacked
from lmtrain.objectives.diffusion import BlockDiffusion, Diffusion, Uniform
from lmtrain.objectives.masked import MLM, RTD
from lmtrain.objectives.mixed import Mix, by_gradient, by_sequence
from lmtrain.text import train_bpe
from lmtrain.train import Trainer

HERE = Path(__file__).parent
TOK = train_bpe(["the ship sails at dawn"], 300)
M, ORDINARY = TOK.mask_token_id, range(max(TOK.all_special_ids) + 1, 300)
TOKEN_OBJECTIVES = [CLM(), PrefixLM(.5), MLM(M, ORDINARY), MLM(M, ORDINARY, shifted=True), Diffusion(M),
                    Mix((.5, .5), clm=CLM(), mlm=MLM(M, ORDINARY))]
ROWS = [{"input_ids": [1, *range(20 + i, 26 + i + 3 * (i % 4))]} for i in range(8)]


def net_of():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config_of(Size(300, 32, 2, layers=2, length=64)))


def gradient(net): return torch.cat([p.grad.flatten() for p in net.parameters()])


def theirs(objective, size, accumulate, tmp_path, broken=False):
    "The gradient of one step of transformers' Trainer, and the batches it saw."
    net, seen = net_of(), []
    parts = for_trainer(objective, TOK, net)
    collate_, loss = parts["data_collator"], parts["compute_loss_func"]
    def keep(features):
        torch.manual_seed(1000 + len(seen)); seen.append(None)
        out = collate_(features)
        seen[-1] = {k: v.clone() for k, v in out.items()}
        return out
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_steps=1,
                             max_grad_norm=0., report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=0.,
                             optim="sgd", dataloader_pin_memory=False)
    grads = []
    class Kept(TheirTrainer):
        def _clip(self): pass
    func = (lambda o, y, num_items_in_batch=None: loss(o, y)) if broken else loss
    trainer = Kept(net, args, train_dataset=Dataset.from_list(ROWS), data_collator=keep, compute_loss_func=func)
    handle = [p.register_post_accumulate_grad_hook(lambda p: None) for p in net.parameters()]
    step = torch.optim.SGD.step
    def stepping(self, *a, **k): grads.append(gradient(net)); return step(self, *a, **k)
    torch.optim.SGD.step = stepping
    try: trainer.train()
    finally: torch.optim.SGD.step = step
    for h in handle: h.remove()
    return grads[0], seen[:accumulate]


def plain_reference(objective, seen):
    "Sum over sum, from the columns that the collator made, without Trainer or our loss function."
    net, total, n = net_of(), 0., 0
    for s in seen:
        counted, targets, weights = unpacked(s["labels"])
        logits = net(input_ids=s["input_ids"], attention_mask=s["attention_mask"], position_ids=s["position_ids"], use_cache=False).logits[counted]
        logits[:, list(objective.forbid)] = -torch.inf
        logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]                # (N,)
        total, n = total - (weights * torch.where(weights != 0, logp, 0)).sum(), n + int(counted.sum())
    (total / n).backward()
    return gradient(net)


@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES, ids=lambda o: repr(o)[:40])
def test_gradient_at_any_accumulation(objective, tmp_path):
    "Accumulation 1 and 4 have the gradient of sums over counts; a loss that takes means, the control, is off at 4."
    for size, accumulate in ((8, 1), (2, 4)):
        got, seen = theirs(objective, size, accumulate, tmp_path)
        want = plain_reference(objective, seen)
        assert (got - want).norm() / want.norm() < 1e-4
    wrong, seen = theirs(objective, 2, 4, tmp_path, broken=True)
    assert (wrong - want).norm() / want.norm() > .5


@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES, ids=lambda o: repr(o)[:40])
def test_same_as_our_trainer(objective, tmp_path):
    "The same batch through lmtrain's own Trainer: the same gradient."
    parts = for_trainer(objective, TOK, net_of())
    torch.manual_seed(5)
    first, epoch = (int(n) for n in torch.randint(2**31, (2,)))
    torch.manual_seed(5)
    s = parts["data_collator"](ROWS)
    got = plain_reference(objective, [s])
    net = net_of()
    b = objective.corrupt(collate([Example(r["input_ids"], index=first + n) for n, r in enumerate(ROWS)], pad=TOK.pad_token_id), Noise(0, epoch))
    trainer = Trainer(Pretrained(net), objective, [b], bf16=False)
    trainer.optimizer.zero_grad(); trainer.backward([b])
    want = gradient(net)
    assert (got - want).norm() / want.norm() < 1e-4


def test_labels_carry_weights():
    "Targets and weights come back bit for bit; what is not counted is -100, and a weight of 0 that counts is not."
    b = Diffusion(M).corrupt(collate([Example([1, *range(20, 40)], index=n) for n in range(4)]), Noise())
    counted = Diffusion(M).counted(b)
    c, targets, weights = unpacked(packed(b, counted))
    assert torch.equal(c, counted) and torch.equal(targets, b.targets[counted]) and torch.equal(weights, b.weights[counted])
    assert (weights == 0).any() and (packed(b, counted) != -100).sum() == counted.sum()


@pytest.mark.parametrize("objective", [RTD(MLM(M, ORDINARY)), Uniform(ORDINARY), Mix((.5, .5), by_sequence, a=CLM(), b=CLM()),
                                       Mix((.5, .5), by_gradient, a=CLM(), b=CLM())], ids=lambda o: repr(o)[:30])
def test_others_are_refused(objective):
    "A loss or a count of one's own cannot pass through labels."
    with pytest.raises(ValueError, match="of its own"): for_trainer(objective, TOK, net_of())


def test_rows_of_a_data_set():
    "Padding is cut off, -100 is not asked, an index is kept, facts about tokens become columns."
    row = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, -100], "word": [0, 0, 1, -1], "index": 3}
    s = for_trainer(CLM(), TOK, net_of())["data_collator"]([row])
    assert s["input_ids"].tolist() == [[5, 6, 7]]
    counted, targets, _ = unpacked(s["labels"])
    assert counted.tolist() == [[True, True, False]] and targets.tolist() == [6, 7]


def test_block_diffusion_is_no_plain_row():
    "Rows of twice the length need `private`, which the mask carries: the same gradient there too."
    o = BlockDiffusion(M, block=4)
    s = for_trainer(o, TOK, net_of())["data_collator"](ROWS)
    assert s["input_ids"].shape[1] == 2 * max(len(r["input_ids"]) for r in ROWS)
    assert torch.isfinite(plain_reference(o, [s])).all()


def test_two_processes(tmp_path):
    "Under torchrun with two ranks, at accumulation 1 and 4, the gradient of lmtrain's own Trainer: see ranks_trainer.py."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "ranks_trainer.py"), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert said == ["ok mlm 1", "ok mlm 4", "ok diffusion 1", "ok diffusion 4", "ok control"]


@pytest.mark.parametrize("name", ["roberta", "mistral", "gemma3"])
def test_positions_and_windows_are_the_models(name):
    """What the collator passes gives the model's own logits, where positions begin at 2 or layers look 8 tokens far.
    Control: position 0 and one mask, as for a model without either, do not."""
    import transformers as tf
    S = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    build = {"roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**S, pad_token_id=1)),
             "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**S, num_key_value_heads=2, sliding_window=8)),
             "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**S, num_key_value_heads=2, head_dim=8, sliding_window=8,
                                                                        layer_types=["sliding_attention", "full_attention"]))}
    torch.manual_seed(0)
    net = build[name]().eval()
    for p in net.parameters(): p.data.mul_(3 if p.ndim > 1 else 1)
    objective = MLM(M, ORDINARY) if name == "roberta" else CLM()
    s = for_trainer(objective, TOK, net)["data_collator"]([{"input_ids": [*range(20, 60)]}])
    own, given = ("input_ids",), ("input_ids", "attention_mask", "position_ids")
    plain = {**s, "position_ids": torch.arange(40)[None],
             "attention_mask": torch.zeros(1, 1, 40, 40) if name == "roberta" else torch.full((40, 40), -1e38).triu(1)[None, None]}
    with torch.no_grad(): want, got, wrong = (net(**{k: c[k] for k in names}).logits for c, names in ((s, own), (s, given), (plain, given)))
    assert (got - want).abs().max() < 1e-3 * want.abs().max() < (wrong - want).abs().max()


def test_a_refused_model_is_refused_here_too():
    import transformers as tf
    net = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MambaForCausalLM cannot run"): for_trainer(CLM(), TOK, net)
    collate_ = for_trainer(CLM(), TOK, net_of())["data_collator"]
    with pytest.raises(ValueError, match="a row has 65 tokens, the model reads 64"): collate_([{"input_ids": [5] * 65}])


def test_other_columns_stay_outside():
    "A text, a number, a list of another length and one of texts, as `remove_unused_columns=False` leaves them; facts come in."
    row = {"input_ids": [5, 6, 7], "text": "abc", "id": 4, "spans": [1, 2], "tags": ["a", "b", "c"], "word": [0, 0, 1]}
    assert for_trainer(CLM(), TOK, net_of())["data_collator"]([row, row])["input_ids"].shape == (2, 3)
    from lmtrain.objective import read_row
    assert {*read_row(row, 0).tokens} == {"word"}


def test_a_causal_batch_brings_no_square(tok):
    """For a causal model and objective the mask is (B,T), and the logits of real tokens are those under the whole mask; packed, prefix and two-way batches bring theirs."""
    import transformers
    from lmtrain.batch import Example, Noise, collate
    from lmtrain.objective import CLM, PrefixLM
    from lmtrain.pretrained import Pretrained
    from dataclasses import replace
    for net in (transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16)),
                transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64))):
        model = Pretrained(net.eval())
        b = CLM().corrupt(collate([Example(list(range(1, 1 + n))) for n in (20, 9)]), Noise())
        assert model.inputs.left and model.inputs(b)["attention_mask"].shape == (2, 20)
        whole = replace(model.inputs, left=False)
        with torch.no_grad(): ours, theirs = (net(**i(b)).logits for i in (model.inputs, whole))
        assert torch.allclose(ours[b.doc > 0], theirs[b.doc > 0], atol=1e-4)
        packed = collate([Example([1, 2, 3]), Example([4, 5])], T=8, pack=True)
        for other in (packed, PrefixLM(.5).corrupt(b, Noise()), b.set(order=torch.zeros_like(b.order))): assert model.inputs(other)["attention_mask"].ndim == 4
    bert = Pretrained(transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)).eval())
    assert not bert.inputs.left
