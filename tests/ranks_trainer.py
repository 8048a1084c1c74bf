"""Run by torchrun on two ranks from test_for_trainer.py: transformers' Trainer with `for_trainer`, and lmtrain's own."""
import sys

import torch
from datasets import Dataset
from test_for_trainer import M, ORDINARY, ROWS, TOK, gradient, net_of
from transformers import Trainer as TheirTrainer
from transformers import TrainingArguments

from lmtrain.batch import Noise, collate
from lmtrain.pretrained import Pretrained
from lmtrain.objective import for_trainer, read_row
from lmtrain.objectives.diffusion import Diffusion
from lmtrain.objectives.masked import MLM
from lmtrain.train import Trainer, fitting_accelerator


def theirs(objective, size: int, accumulate: int, broken: bool = False):
    "The gradient before the step of transformers' Trainer, and the same batches as our own objects."
    net, ours, grads = net_of(), [], []
    parts = for_trainer(objective, TOK, net_of())
    def keep(features):
        torch.manual_seed(seed := 1000 * rank() + len(ours))
        first, epoch = (int(n) for n in torch.randint(2**31, (2,)))
        b = collate([read_row(f, first + n) for n, f in enumerate(features)], pad=TOK.pad_token_id)
        ours.append(objective.corrupt(b, Noise(0, epoch)))
        torch.manual_seed(seed)
        return parts["data_collator"](features)
    args = TrainingArguments(sys.argv[1], per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_steps=1,
                             max_grad_norm=0., report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
                             learning_rate=0., optim="sgd", dataloader_pin_memory=False, average_tokens_across_devices=not broken)
    trainer = TheirTrainer(net, args, train_dataset=Dataset.from_list(ROWS), data_collator=keep,
                           compute_loss_func=parts["compute_loss_func"])
    step = torch.optim.SGD.step
    torch.optim.SGD.step = lambda self, *a, **k: grads.append(gradient(net)) or step(self, *a, **k)
    try: trainer.train()
    finally: torch.optim.SGD.step = step
    return grads[0], ours[:accumulate]


def rank() -> int: return torch.distributed.get_rank()


def own(objective, window):
    "The gradient of lmtrain's Trainer on two ranks for these batches."
    net = net_of()
    trainer = Trainer(Pretrained(net), objective, window, window=len(window), accelerator=fitting_accelerator(), bf16=False)
    trainer.optimizer.zero_grad(); trainer.backward(window)
    return gradient(net)


def far(a, b) -> float: return ((a - b).norm() / b.norm()).item()


for objective in MLM(M, ORDINARY), Diffusion(M):
    for size, accumulate in (4, 1), (1, 4):
        got, window = theirs(objective, size, accumulate)
        want = own(objective, window)
        assert far(got, want) < 1e-4, (objective, accumulate, far(got, want))
        if rank() == 0: print("ok", objective.name, accumulate, flush=True)
wrong, window = theirs(MLM(M, ORDINARY), 1, 4, broken=True)  # negative control: each rank divides by its own count
assert far(wrong, own(MLM(M, ORDINARY), window)) > .01
if rank() == 0: print("ok control", flush=True)
torch.distributed.destroy_process_group()
