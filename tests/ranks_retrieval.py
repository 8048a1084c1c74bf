"""Run by torchrun on two ranks from test_retrieval.py: the gradient of InfoNCE on gathered documents is that of one process."""
from dataclasses import fields, replace

import torch
from test_retrieval import InfoNCE, far, gradient, items, tiny

from lmtrain.batch import Batch
from lmtrain.loader import Loader
from lmtrain.retrieval import search
from lmtrain.train import Trainer, fitting_accelerator

accelerator = fitting_accelerator()
W, rank = accelerator.num_processes, accelerator.process_index
COLUMNS = "ids clean doc order answer targets weights index item role".split()


class Own(search.Gathered):
    "A fault: the gradient of a row comes only from its own rank's queries."
    @staticmethod
    def backward(ctx, g): return g[rank * len(g) // W:][:len(g) // W]


for hard, n, chunk in ((0, 16, None), (1, 16, 3), (1, 13, 4), (0, 3, 2)):
    o, rows, data = InfoNCE(chunk=chunk), 4 * (2 + hard), items(n, hard)
    both = [next(iter(Loader(data, o, rows, 48, rank=k, world=W))) for k in range(W)]
    trainer = Trainer(tiny().double(), o, Loader(data, o, rows, 48, rank=rank, world=W), accelerator=accelerator, steps=3, bf16=False)
    union = {c: torch.cat([getattr(b, c) + (1000 * k if c == "item" else 0) for k, b in enumerate(both)]) for c in COLUMNS}
    whole, ref = Batch(**union), tiny().double()
    (replace(o, gather=False).loss(ref, whole)["infonce"] / o.count(whole)["infonce"]).backward()
    trainer.backward([both[rank]])
    assert far(gradient(trainer.model), gradient(ref)) < 1e-12, (hard, n, chunk)
    trainer.optimizer.zero_grad()
    right, search.Gathered = search.Gathered, Own
    trainer.backward([both[rank]])
    search.Gathered = right
    assert far(gradient(trainer.model), gradient(ref)) > .1                            # the fault is seen
    if rank == 0: print("equal", hard, n, chunk, [len(b) for b in both], flush=True)
assert {f.name for f in fields(Batch)} >= {*COLUMNS}
torch.distributed.destroy_process_group()
