"""What the benchmarks share: two trainers on the same rows, model and arithmetic, and how a figure is reported."""
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for both sides: a waiting thread gives its core to others soon

import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3ForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer

from lmtrain.corpora import corpus
from lmtrain.model import Size, Transformer, config_of
from lmtrain.objective import CLM
from lmtrain.optim import adamw, warmup_decay
from lmtrain.text import Rows, examples, train_bpe
from lmtrain.loader import Loader
from lmtrain.train import Callback, Trainer

T, ROWS, VOCAB = 256, 16, 2048
SIZES = {"1M": Size(VOCAB, 128, 2, layers=4, length=T), "10M": Size(VOCAB, 384, 6, layers=5, length=T)}


def shakespeare() -> tuple[Rows, Rows]:
    "Rows to learn from and rows held out."
    splits = corpus("shakespeare")
    tok = train_bpe(splits["train"]["text"][:], VOCAB)
    train, held = (examples(splits[s]["text"][:], tok, T) for s in ("train", "validation"))
    return train, held


class Clock(Callback, TrainerCallback):
    "Seconds of each step, its data included, of either trainer; `pause` for what is not training."
    def __init__(self): self.seconds, self.at = [], None
    def tick(self):
        now = time.perf_counter()
        if self.at is not None: self.seconds.append(now - self.at)
        self.at = now
    def begin(self, trainer): self.at = time.perf_counter()
    def after_step(self, trainer): self.tick()
    def on_train_begin(self, args, state, control, **_): self.at = time.perf_counter()
    def on_step_end(self, args, state, control, **_): self.tick()
    def pause(self, f: Callable):
        start = time.perf_counter()
        out = f()
        self.at += time.perf_counter() - start
        return out


def full(rows: Rows) -> list[dict]:
    "Rows of exactly T tokens, as transformers' Trainer takes them."
    return [{"input_ids": ids, "labels": ids} for e in rows if len(ids := e.lists().ids) == T]


def theirs(net: PreTrainedModel, rows: list[dict], steps: int, lr: float = 1e-3, warmup: float = 0.03, seed: int = 0,
           compile: bool = False, bf16: bool = False, callbacks: Iterable = ()) -> TheirTrainer:
    "transformers' Trainer: fused AdamW, a linear schedule, no dropout, nothing logged or saved."
    args = TrainingArguments(
        "/tmp/none", per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=lr, warmup_steps=max(1, round(warmup * steps)),
        weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", lr_scheduler_type="linear",
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, seed=seed, torch_compile=compile, bf16=bf16,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False)
    return TheirTrainer(net, args, train_dataset=rows, callbacks=list(callbacks))


def ours(model: Transformer, rows, steps: int, lr: float = 1e-3, optimizer: Callable = adamw, warmup: float = 0.03, seed: int = 0,
         compile: bool = False, bf16: bool = False, callbacks: Iterable = ()) -> Trainer:
    "lmtrain's Trainer, by default with fused AdamW as well."
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the other side sets it for the whole process
    AcceleratorState._reset_state(reset_partial_state=True)
    loader = Loader(rows, CLM(), ROWS, T, pack=True, seed=seed)
    return Trainer(model, CLM(), loader, lr, steps, optimizer=optimizer, schedule=partial(warmup_decay, warmup=warmup), compile=compile, bf16=bf16, callbacks=list(callbacks))


def qwen3(size: Size, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config_of(size))


def gpt2(size: Size) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=size.vocab, n_embd=size.dim, n_layer=size.layers, n_head=size.heads,
                                      n_positions=T, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=1, eos_token_id=2))


def native(size: Size, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(size)


def flops(size: Size) -> float:
    "Floating-point operations of a training step of ROWS x T tokens: 6 a weight and token, and the attention's products."
    D, hd = size.dim, size.head_dim
    layer = 2 * D * size.heads * hd + 2 * D * size.kv * hd + 3 * D * size.ff
    return 6 * ROWS * T * (size.layers * (layer + T * size.heads * hd) + D * size.vocab)  # causal: half of 2 T


def peak(n: int = 1024, tries: int = 20) -> float:
    "Floating-point operations a second of this machine's matrix product: the best of several."
    a, b, best = torch.randn(n, n), torch.randn(n, n), float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def spread(values: list[float]) -> dict[str, float]:
    "Median and quartiles."
    q = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": q[1], "low": q[0], "high": q[2]}


def machine() -> dict:
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0], "torch": torch.__version__, "python": platform.python_version(),
            "matmul_gflops": round(peak() / 1e9, 1)}


def keep(name: str, out: str, result: dict) -> None:
    "Write a result as JSON beside the table that was printed."
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
