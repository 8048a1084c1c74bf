"""Run by torchrun on two ranks from test_run.py: each check ends in one line on rank 0, or in an exception."""
import sys
from itertools import islice
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lmtrain.batch import Example
from lmtrain.checkpoint import Save, checkpoints, load_state, restore, trainer_state
from lmtrain.model import Size, Transformer
from lmtrain.pretrained import Pretrained
from lmtrain.objective import CLM
from lmtrain.loader import Loader
from lmtrain.train import Callback, Trainer, fitting_accelerator

accelerator, folder = fitting_accelerator(), Path(sys.argv[1])
rank, items = accelerator.process_index, [Example([1, *range(5 + i, 15 + i)]) for i in range(16)]


def dropping(steps: int = 6) -> Trainer:
    torch.manual_seed(rank)  # as after a while of training: the ranks' generators differ
    net = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1,
                                     eos_token_id=2, resid_pdrop=.5))
    return Trainer(Pretrained(net), CLM(), Loader(items, CLM(), rows=2, T=11), steps=steps, accelerator=accelerator)


def weights(trainer: Trainer) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class StopOne(Callback):
    "The second rank alone asks for the end after step 3."
    def after_step(self, trainer): trainer.stop = trainer.stop or rank == 1 and trainer.done == 3


def loaders_know_their_rank():
    first = next(iter(Loader(items, CLM(), rows=2, T=11)))
    both = accelerator.gather(first.index[:, 0])                                       # (4,)
    alone = torch.cat([b.index[:, 0] for b in islice(Loader(items, CLM(), 2, 11, rank=0, world=1), 2)])  # (4,)
    assert torch.equal(both, alone)


def dropout_resumes_on_each_rank():
    whole = dropping(); whole.fit()
    part = dropping(); part.steps = 3
    part.schedule = lambda step, steps: whole.schedule(step, 6)
    part.fit()
    state = trainer_state(part)
    assert state["rng"]["cpu"].shape[0] == 2
    ends = []
    for wrong in (False, True):
        again = dropping()
        if wrong: state["rng"]["cpu"] = state["rng"]["cpu"][[0, 0]]  # negative control: the first rank's dice for both
        restore(again, state, changed=["schedule"]); again.fit()
        ends.append(torch.equal(weights(again), weights(whole)))
    assert ends == [True, False], ends


def one_rank_stops_all():
    model = Transformer(Size(40, 16, 2, layers=1, length=16))
    trainer = Trainer(model, CLM(), Loader(items, CLM(), 2, 11), steps=50, accelerator=accelerator,
                      callbacks=[StopOne(), Save(folder / "stop", every=1000)])
    trainer.fit()
    assert trainer.done == 3 and [p.name for p in checkpoints(folder / "stop")] == ["step-00000003"]
    assert load_state(checkpoints(folder / "stop")[0])["progress"]["done"] == 3


for check in loaders_know_their_rank, dropout_resumes_on_each_rank, one_rank_stops_all:
    check()
    if rank == 0: print("ok", check.__name__, flush=True)
    accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
