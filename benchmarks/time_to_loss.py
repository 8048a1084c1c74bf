"""How soon the loss is reached that transformers' Trainer with AdamW reaches after 2 million tokens.

    python -m benchmarks.time_to_loss

The target is the best validation loss of that trainer over five learning rates and two warm-ups (one seed each): same
tokenizer, rows, batch, model, weight decay and clipping. Then each side runs with three seeds, in turns. Ours has its
own optimizer and number of steps, fixed beforehand on documents taken from the training side. Seconds are those of
training, without looks at the validation text. What is in OUT already is not run again.
"""
import argparse
import itertools
import json
from pathlib import Path

from lmtrain.cli import _quick_on_cpu

_quick_on_cpu()

from transformers import TrainerCallback

from benchmarks.common import ROWS, SIZES, T, Clock, full, keep, machine, native, ours, qwen3, shakespeare, spread, theirs
from lmtrain.evaluate import held_loss
from lmtrain.model import Transformer
from lmtrain.objective import CLM
from lmtrain.optim import adamw, muon
from lmtrain.train import Callback, native_bf16

SIZE, STEPS = SIZES["1M"], 2_000_000 // (ROWS * T)
RATES, WARMUPS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (.02, .1)


def loss_of(model, held) -> float:
    "Nats a token of the held-out text, by one and the same function for both sides, in float32."
    if not isinstance(model, Transformer):
        net, model = model, native(SIZE)
        model.load_state_dict({k.removeprefix("model.").replace("lm_head", "head"): v for k, v in net.state_dict().items()})
    return held_loss(model, CLM(), held, batch=32)["clm"]


class Looks(Callback, TrainerCallback):
    "The held-out loss every so many steps, with the clock stopped: rows of (step, seconds, loss)."
    def __init__(self, held, clock: Clock, every: int): self.held, self.clock, self.every, self.rows = held, clock, every, []
    def look(self, step: int, steps: int, model) -> None:
        if step % self.every == 0 or step == steps:
            loss = self.clock.pause(lambda: loss_of(model, self.held))
            self.rows.append((step, sum(self.clock.seconds), loss))
    def after_step(self, trainer): self.look(trainer.done, trainer.steps, trainer.model)
    def on_step_end(self, args, state, control, model=None, **_): self.look(state.global_step, state.max_steps, model)


def sweep(rows, held, out: Path) -> dict[str, float]:
    "The final loss of each setting of the other trainer; what is in OUT already is not run again."
    path = out / "sweep.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for lr, warmup in itertools.product(RATES, WARMUPS):
        if (name := f"lr {lr:g}, warm-up {warmup:g}") in done: continue
        net = qwen3(SIZE)
        theirs(net, rows, STEPS, lr, warmup, bf16=native_bf16()).train()
        done[name] = loss_of(net, held)
        print(f"{name}: {done[name]:.4f} nats a token", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(done, indent=1) + "\n")
    return done


def run(make, held, every: int) -> list[tuple[int, float, float]]:
    clock = Clock()
    looks = Looks(held, clock, every)
    trainer = make([clock, looks])
    trainer.fit() if hasattr(trainer, "fit") else trainer.train()
    return looks.rows


def reached(rows, target: float) -> tuple[int, float] | None:
    "The first (step, seconds) at or below the target."
    return next(((step, seconds) for step, seconds, loss in rows if loss <= target), None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--out", default="results/benchmarks")
    p.add_argument("--sweep-only", action="store_true")
    a = p.parse_args()
    rows, held = shakespeare()
    plain, out = full(rows), Path(a.out)
    losses = sweep(plain, held, out)
    if a.sweep_only: return
    best = min(losses, key=losses.get)
    lr, warmup = (float(w.split()[-1]) for w in best.split(","))
    half = native_bf16()
    print(f"{machine()}\ntarget {losses[best]:.4f} nats a token: {best}, {STEPS} steps\n")
    sides = {  # the first and the last are compared; those between tell the shares, with one seed
        "transformers, AdamW": lambda seed, calls: theirs(qwen3(SIZE, seed), plain, STEPS, lr, warmup, seed, callbacks=calls),
        **({"transformers, AdamW, bf16": lambda seed, calls: theirs(qwen3(SIZE, seed), plain, STEPS, lr, warmup, seed, bf16=True, callbacks=calls)} if half else {}),
        "lmtrain, AdamW": lambda seed, calls: ours(native(SIZE, seed), rows, STEPS, lr, adamw, warmup, seed, callbacks=calls),
        **({"lmtrain, AdamW, bf16": lambda seed, calls: ours(native(SIZE, seed), rows, STEPS, lr, adamw, warmup, seed, bf16=True, callbacks=calls)} if half else {}),
        "lmtrain, Muon" + ", bf16" * half: lambda seed, calls: ours(native(SIZE, seed), rows, *OURS, seed, bf16=half, callbacks=calls),
    }
    path = out / "time_to_loss.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("target") != losses[best]: result = {"sweep": losses, "target": losses[best], "runs": {}}
    result["machine"] = machine()
    for seed in range(a.seeds):
        for name, make in sides.items():
            if seed and name not in (next(iter(sides)), [*sides][-1]): continue
            runs = result["runs"].setdefault(name, [])
            if any(r["seed"] == seed for r in runs): continue  # from an interrupted run
            rows_ = run(lambda calls, make=make, seed=seed: make(seed, calls), held, 10 if make is [*sides.values()][-1] else STEPS // 8)
            hit = reached(rows_, losses[best])
            runs.append({"seed": seed, "curve": rows_, "reached": hit})
            print(f"seed {seed}  {name:28} ends at {rows_[-1][2]:.4f} after {rows_[-1][0]} steps, {rows_[-1][1]:.0f} s; target reached: {hit}", flush=True)
            keep("time_to_loss", a.out, result)
    report(result)


def report(result: dict) -> None:
    "Seconds and tokens to the target; where a seed of the other side does not reach it, its whole run counts."
    cost = {name: [r["reached"] or r["curve"][-1][:2] for r in runs] for name, runs in result["runs"].items()}
    first = next(iter(cost))
    base = [spread([c[k] for c in cost[first]])["median"] for k in (0, 1)]
    print(f"\n{'':32}{'tokens':>12}{'seconds':>9}{'fewer tokens':>14}{'less time':>11}")
    for name, c in cost.items():
        steps, seconds = (spread([x[k] for x in c])["median"] for k in (0, 1))
        missed = sum(r["reached"] is None for r in result["runs"][name])
        print(f"{name:32}{steps * ROWS * T:12,.0f}{seconds:9.1f}{base[0] / steps:13.2f}x{base[1] / seconds:10.2f}x"
              + f"  ({missed} of {len(c)} seeds did not reach it)" * bool(missed))


OURS = (163, 1e-2, muon, .1)  # steps, learning rate, optimizer and warm-up: tuned on three plays taken from the training side

if __name__ == "__main__":
    main()
