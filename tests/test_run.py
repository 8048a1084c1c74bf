"""`lmtrain train`: what it reads, what it does on one process and on two, what it refuses."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lmtrain.model import Size, Transformer, load
from lmtrain.objective import CLM, PrefixLM
from lmtrain.objectives.masked import MLM
from lmtrain.run import Job, longer, opened, read, train
from lmtrain.text import train_bpe
from lmtrain.train import Trainer

HERE = Path(__file__).parent
WORDS = "the ship sails at dawn and sea is calm when wind was low over a long quiet bay of stones".split()
DICE = random.Random(0)
TEXT = [" ".join(DICE.choices(WORDS, k=60)) for _ in range(60)]
SMALL = ["--rows", "2", "--length", "32", "--steps", "12", "--model", "Size(dim=16,heads=2,layers=1)"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXT))
    return str(path)


def call(words, cwd, launcher=(), code=0):
    "`lmtrain train` with these words in a process of its own, or in those of a launcher."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    first = [sys.executable, *launcher] if launcher else [sys.executable]
    done = subprocess.run([*first, "-m", "lmtrain", "train", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
with socket.socket() as s: s.bind(("localhost", 0)); PORT = str(s.getsockname()[1])
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", PORT]


# ---- what it reads

def test_reading_objectives():
    "repr and back; fields of the tokenizer are filled in; what is no objective, or more than plain values, is refused."
    tok = train_bpe(TEXT[:3], vocab_size=300)
    for o in (CLM(), PrefixLM(.5), PrefixLM()): assert read(repr(o), tok) == o
    assert read("objectives_of_tests.Halves", tok).mask_id == tok.mask_token_id
    got = read("objectives_of_tests.Halves(share=.25)", tok)
    assert (got.share, got.regular_ids) == (.25, range(max(tok.all_special_ids) + 1, len(tok)))
    assert read("Uniform", tok).vocab == range(len(tok)) and read("MLM(rate=.2)", tok) == MLM(tok.mask_token_id, got.regular_ids, .2)
    for wrong, says in {"Noise(seed=1)": "not an objective", "Nothing": "no Nothing", "PrefixLM(cat=.5)": "cat", "CLM(": "cannot be read",
                        "PrefixLM(cut=1+1)": "plain", "os.system('ls')": "not an objective", "(lambda: CLM())()": "no ", "3": None,
                        "PrefixLM(cut=open('x'))": "no open", "objectives_of_tests.Halves(1, 2, 3, 4)": "takes"}.items():
        if says is None: assert read(wrong) == 3; continue
        with pytest.raises(ValueError, match=says): read(wrong, tok)


@pytest.fixture(autouse=True)
def module_of_ones_own(tmp_path, monkeypatch):
    "An objective in a file of the user's."
    (tmp_path / "objectives_of_tests.py").write_text(
        "from dataclasses import dataclass\nfrom lmtrain.objective import Objective, hide\n\n\n@dataclass\nclass Halves(Objective):\n"
        "    mask_id: int\n    regular_ids: range\n    share: float = .5\n\n    def corrupt(self, b, noise):\n"
        "        b = b.set(order=b.order * 0)\n        return hide(b, (noise(b) < self.share) & (b.doc > 0), self.mask_id)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("objectives_of_tests", None)


def test_jobs():
    "Settings fill the gaps; numbers that make no sense are named; a folder has one job."
    assert Job().rows == 16 and Job(rows=3).rows == 3
    for name in ("steps", "rows", "lr", "window", "length"):
        with pytest.raises(ValueError, match=name): Job(**{name: -1})


# ---- one process

def test_train_and_go_on(text, tmp_path):
    "A model that transformers opens; the same job goes on, another is refused; from its own model it trains further."
    lines = []
    job = Job(data=text, model="Size(dim=16, heads=2, layers=1)", steps=8, rows=2, length=32)
    h = train(job, tmp_path / "run", lines.append)
    assert len(h) == 8 and json.loads((tmp_path / "run" / "job.json").read_text()) == asdict(job)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.num_hidden_layers == 1
    assert any("held-out" in line for line in lines)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    train(job, tmp_path / "run", lines.append)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="another rows"): train(Job(**{**asdict(job), "rows": 4}), tmp_path / "run")
    assert train(Job(**{**asdict(job), "steps": 9}), tmp_path / "run", lines.append)["step"] == [*range(1, 10)]
    on = Job(data=text, model=str(tmp_path / "run" / "model"), steps=2, rows=2, length=32, lr=1e-3)
    assert train(on, tmp_path / "on", lines.append)["loss"][0] < h["loss"][0]
    with pytest.raises(ValueError, match="--length 32"):
        train(Job(**{**asdict(on), "length": 64}), tmp_path / "long")


def test_an_objective_of_ones_own_looks_both_ways(text, tmp_path):
    "A masked objective from the user's module: the saved model says that it may not write from left to right."
    train(Job("objectives_of_tests.Halves", "Size(dim=16, heads=2, layers=1)", text, steps=3, rows=2, length=32), tmp_path / "run", print)
    model, _ = load(tmp_path / "run" / "model")
    assert not model.causal
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.is_causal is False


def test_models_of_others(text, tmp_path):
    "A GPT-2 directory trains and stays one; a tokenizer that was given specials makes its table longer."
    tok = train_bpe(TEXT[:3], vocab_size=300)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tok) - 2, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1,
                               eos_token_id=2)).save_pretrained(tmp_path / "gpt2")
    tok.save_pretrained(tmp_path / "gpt2")
    model, _ = opened(str(tmp_path / "gpt2"), 32)
    assert model.net.get_input_embeddings().weight.shape[0] == len(tok)
    train(Job(model=str(tmp_path / "gpt2"), data=text, steps=2, rows=2, length=32, lr=1e-3), tmp_path / "run", print)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.model_type == "gpt2"


def test_longer_keeps_what_was_there():
    "The native table grows; old logits stay, and head and table stay one tensor."
    model = Transformer(Size(20, 16, 2, layers=1))
    h, old = torch.randn(3, 16), model.embed_tokens.weight.clone()                     # (3,D) (20,D)
    says = model.head(h)                                                               # (3,20)
    longer(model, 25)
    assert model.head(h).shape == (3, 25) and torch.equal(model.head(h)[:, :20], says)
    assert model.head.weight is model.embed_tokens.weight and torch.equal(model.embed_tokens.weight[:20], old)


def test_a_lonely_accelerator_is_refused(monkeypatch):
    "WORLD_SIZE says two, the accelerator knows of one: every rank would train on its own."
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        Trainer(Transformer(Size(20, 16, 2, layers=1)), CLM(), [], accelerator=accelerator)


# ---- the command, on one process and on two

def test_two_ranks_are_one_with_two_batches(text, tmp_path):
    "torchrun, accelerate launch and one process with --window 2 end in the same weights; a window of one, the control, does not."
    call([*SMALL, "--data", text, "--window", "2", "--out", "one"], tmp_path)
    call([*SMALL, "--data", text, "--out", "torchrun"], tmp_path, TORCHRUN)
    call([*SMALL, "--data", text, "--out", "accelerate"], tmp_path, ACCELERATE)
    call([*SMALL, "--data", text, "--out", "half"], tmp_path)
    ends = {n: (tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("one", "torchrun", "accelerate", "half")}
    assert ends["one"] == ends["torchrun"] == ends["accelerate"] != ends["half"]
    assert len((tmp_path / "torchrun" / "history.jsonl").read_text().splitlines()) == 12


def test_two_ranks():
    "What only two ranks can show: see ranks.py."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, *TORCHRUN, str(HERE / "ranks.py"), folder], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.count("ok ") == 3, done.stdout + done.stderr[-3000:]


def test_killed_and_started_again(text, tmp_path):
    "Killed in the middle and started again ends where the uninterrupted run does; Ctrl-C says how to go on."
    words = [*SMALL[:5], "400", *SMALL[6:], "--data", text]
    call([*words, "--out", "whole"], tmp_path)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        run = subprocess.Popen([sys.executable, "-m", "lmtrain", "train", *words, "--out", number.name], cwd=tmp_path, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        path = tmp_path / number.name / "checkpoints"
        while not list(path.glob("step-*")) and run.poll() is None: time.sleep(.01)
        run.send_signal(number)
        said = run.communicate()[0]
        if run.returncode == 0: pytest.fail("it had ended already: the test says nothing")
        assert run.returncode == code and ("goes on from there" in said) == (number == signal.SIGINT)
        assert "Going on from step" in call([*words, "--out", number.name], tmp_path)
        assert (tmp_path / number.name / "model" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()


def test_faults_are_one_line(text, tmp_path):
    "Each fault of the command line is one line that names it."
    for words, says in ((["--objective", "Nothing"], "there is no Nothing"), (["--objective", "PrefixLM(cut=2)"], "cut=2"),
                        (["--model", "nowhere"], "nowhere"), (["--model", "Size(dim=15)"], "dim=15"), (["--steps", "0"], "steps"),
                        (["--data", "nothing-such"], "nothing-such"), (["--seed", "-1"], "seed must be from 0"),
                        (["--model", "dir/typo"], "'dir/typo' is no folder here"), (["--model", "./typo"], "no model at './typo'"),
                        (["--objective", "MLM(words=True)"], "needs a column `word`")):
        data = [] if "--data" in words else ["--data", text]
        out = call([*SMALL[:4], "--steps", "2", *data, *words, "--out", "x"], tmp_path, code=1)
        named = [line for line in out.splitlines() if "lmtrain: " in line]
        assert len(named) == 1 and says in named[0] and "Traceback" not in out, out
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


# ---- nothing is lost, nothing is kept too early

def test_a_typo_leaves_nothing_behind(text, tmp_path):
    "A job that was not possible is not kept, nor is its tokenizer used: corrected, it runs, with a tokenizer of its own text."
    out, small = tmp_path / "run", "Size(dim=16, heads=2, layers=1)"
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"{n} zebras gallop quizzically {n * n}"}) + "\n" for n in range(40)))
    for wrong in ({"objective": "Nothing"}, {"objective": "PrefixLM(cut=2)"}, {"model": "nowhere"}):
        with pytest.raises((ValueError, OSError)):
            train(Job(**{"model": small, "data": str(tmp_path / "other.jsonl"), "steps": 2, "rows": 2, "length": 32} | wrong), out, print)
        assert not (out / "job.json").exists() and not (out / "checkpoints").exists()
    train(Job(model=small, data=text, steps=2, rows=2, length=32), out, print)
    assert "zebras" not in (out / "tokenizer" / "tokenizer.json").read_text()
    assert (out / "model" / "tokenizer.json").read_text() == (out / "tokenizer" / "tokenizer.json").read_text()


def test_a_job_is_whole_whenever_it_is_read(tmp_path):
    "Kept again and again while another thread reads it: never half of it. A damaged one is one line."
    import threading
    job, seen, stop = Job(steps=7), [], threading.Event()
    job.keep(tmp_path)
    def reading():
        while not stop.is_set(): job.check(tmp_path); seen.append(json.loads((tmp_path / "job.json").read_text()) == asdict(job))
    reader = threading.Thread(target=reading); reader.start()
    for _ in range(300): job.keep(tmp_path)
    stop.set(); reader.join()
    assert len(seen) > 20 and all(seen)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ValueError, match="job.json is damaged"): job.check(tmp_path)


def test_the_end_is_rehearsed_before_the_first_step(text, tmp_path, monkeypatch):
    "A model that cannot be saved is found out before it is trained, and nothing stays in the folder but its tokenizer."
    import lmtrain.run
    def full(*_): raise OSError("no room for a model")
    monkeypatch.setattr(lmtrain.run, "save", full)
    with pytest.raises(OSError, match="no room"): train(Job(data=text, model="Size(dim=16, heads=2, layers=1)", steps=3, rows=2, length=32), tmp_path / "run", print)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "tokenizer"}


def test_a_model_that_ends_in_nan_is_not_saved(text, tmp_path, monkeypatch):
    "Neither weights nor a held-out loss that are not finite end in a model, and the one before stays."
    import lmtrain.run
    job = Job(data=text, model="Size(dim=16, heads=2, layers=1)", steps=3, rows=2, length=32)
    train(job, tmp_path / "run", lambda _: None)
    path = tmp_path / "run" / "model" / "model.safetensors"
    before = path.read_bytes()
    fine = lmtrain.run.held_loss
    monkeypatch.setattr(lmtrain.run, "held_loss", lambda *a: fine(*a) if len(a[2]) == 1 else {"clm": float("nan")})
    with pytest.raises(FloatingPointError, match="held-out loss is nan"): train(Job(**{**asdict(job), "steps": 4}), tmp_path / "run", lambda _: None)
    monkeypatch.setattr(lmtrain.run, "held_loss", fine)
    def spoilt(trainer, *_, **__):
        with torch.no_grad(): next(trainer.model.parameters())[0, 0] = float("nan")
    monkeypatch.setattr(lmtrain.run, "go_on", spoilt)
    with pytest.raises(FloatingPointError, match="embed_tokens.weight is not finite"): train(Job(**{**asdict(job), "steps": 5}), tmp_path / "run", lambda _: None)
    assert path.read_bytes() == before


def test_knobs_of_sampling_that_are_not_used(text, tmp_path):
    "A hub model with a temperature and do_sample=false trains and is saved; transformers itself, the control, refuses to."
    tok = train_bpe(TEXT[:3], vocab_size=300)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2))
    net.save_pretrained(tmp_path / "gpt2"); tok.save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": .6, "top_p": .9}))
    knobs = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").generation_config
    knobs.pad_token_id = tok.pad_token_id
    with pytest.raises(ValueError, match="do_sample"): knobs.save_pretrained(tmp_path / "theirs")
    train(Job(model=str(tmp_path / "gpt2"), data=text, steps=1, rows=2, length=32, lr=1e-3), tmp_path / "run", print)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").save_pretrained(tmp_path / "again")


def test_two_models_are_saved_one_by_one(tmp_path):
    from lmtrain.model import save
    from lmtrain.objectives.masked import Electra
    pair = Electra(*(Transformer(Size(300, 16, 2, layers=1)) for _ in range(2)))
    with pytest.raises(TypeError, match="an? Electra has no directory of its own: save the model inside it"): save(pair, train_bpe(TEXT[:3], 300), tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_room_of_a_model_is_said(text, tmp_path):
    "RoBERTa's 64 positions have room for 62 tokens: --length 64 is one line with the right number, and 62 trains."
    from transformers import RobertaConfig, RobertaForMaskedLM
    tok = train_bpe(TEXT[:3], vocab_size=300)
    net = RobertaForMaskedLM(RobertaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                           max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2))
    net.save_pretrained(tmp_path / "roberta"); tok.save_pretrained(tmp_path / "roberta")
    job = {"objective": "MLM()", "model": str(tmp_path / "roberta"), "data": text, "steps": 1, "rows": 2, "lr": 1e-3}
    with pytest.raises(ValueError, match="this model reads 62: give --length 62"): train(Job(**job, length=64), tmp_path / "run", print)
    assert len(train(Job(**job, length=62), tmp_path / "run", print)) == 1


def test_a_name_that_is_not_here_offline(tmp_path):
    "With HF_HUB_OFFLINE=1, which we advise, the one line tells of the name and not of a connection."
    done = subprocess.run([sys.executable, "-m", "lmtrain", "generate", "dir/typo"], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert "'dir/typo' is no folder here" in done.stderr and "connect" not in done.stderr
