"""Windows, emulated (tests/windows.py) and read: what opens, renames, syncs and names files there."""
import ast
import errno
import json
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from windows import possible, rules

from lmtrain import Loader, Size, Trainer, Transformer, load, save
from lmtrain.checkpoint import Save, latest, locked, resume, save_state, synced, verify, write
from lmtrain.corpora import cached, corpus
from lmtrain.labs import serve
from lmtrain.objective import CLM
from lmtrain.run import Job, train
from lmtrain.settings import scale
from lmtrain.text import examples
from lmtrain.tour import tour
from lmtrain.train import History

ROOT = Path(__file__).parent.parent
POSIX = {"os": {"fork", "geteuid", "getuid", "sysconf", "sysconf_names", "sched_getaffinity", "O_DIRECTORY", "getpgid", "setsid", "killpg", "statvfs", "uname",
                "WNOHANG", "getloadavg", "mkfifo", "chown", "chroot", "nice", "fchmod", "EX_OK"},
         "signal": {"SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "alarm", "SIGPIPE", "SIGCHLD", "setitimer", "pause", "sigwait"},
         "time": {"tzset"}, "socket": {"AF_UNIX"}}
MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "curses", "readline", "syslog"}


def unguarded(code: str) -> list[str]:
    "Names that Windows lacks in a module's functions, where the same function does not ask for them (`hasattr`, `find_spec`) first."
    tree, out = ast.parse(code), []
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)] + [tree]
    inside = {id(n) for f in scopes[:-1] for n in ast.walk(f)}
    for scope in scopes:
        nodes = [n for n in ast.walk(scope) if scope is not tree or id(n) not in inside]
        asked = {a.value for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in ("hasattr", "find_spec", "importlib.util.find_spec", "getattr")
                 for a in n.args if isinstance(a, ast.Constant)}
        asked |= {"CDLL"} if any(isinstance(n, ast.Compare) and "sys.platform" in ast.unparse(n) for n in nodes) else set()
        for n in nodes:
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.attr in POSIX.get(n.value.id, ()): out += [n.attr] * (n.attr not in asked)
            if isinstance(n, ast.Import): out += [a.name for a in n.names if a.name in MODULES - asked]
            if isinstance(n, ast.ImportFrom) and n.module in MODULES - asked: out.append(str(n.module))
            if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("CDLL") and ast.unparse(n.args[0]) == "None": out += ["CDLL"] * ("CDLL" not in asked)
    return out


def test_what_windows_lacks_is_asked_for_first():
    "No module uses a name that Windows lacks without asking; three that do, the controls, are seen."
    for p in (ROOT / "lmtrain").rglob("*.py"): assert unguarded(p.read_text(encoding="utf-8")) == [], p
    assert unguarded("import os\ndef f():\n    return os.sched_getaffinity(0)") == ["sched_getaffinity"]
    assert unguarded("import signal, fcntl\nsignal.SIGKILL") == ["fcntl", "SIGKILL"] or unguarded("import signal, fcntl\nsignal.SIGKILL") == ["SIGKILL", "fcntl"]
    assert unguarded("import ctypes\ndef f(): ctypes.CDLL(None)") == ["CDLL"]
    assert unguarded("import os\ndef f():\n    if hasattr(os, 'geteuid'): os.geteuid()") == []


def test_text_has_an_encoding():
    "No file of the package, its docs or benchmarks is opened as text without saying how. Control: one that is."
    check = lambda *words: subprocess.run([sys.executable, "-m", "ruff", "check", "--preview", "--isolated", "--select", "PLW1514", *words], capture_output=True,
                                          text=True, input="open('x').read()\n")
    done = check(*(str(ROOT / n) for n in ("lmtrain", "docs", "benchmarks", "setup.py")))
    assert done.returncode == 0, done.stdout[-3000:]
    assert check("-").returncode == 1


def test_names_of_files():
    "No file of the repository has a name that Windows cannot have, and no two differ by case alone."
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py")]
    for n in names: assert all(possible(part) for part in n.split("/")), n
    assert len({n.lower() for n in names}) == len(names)
    assert not possible("a:b") and not possible("nul.txt") and not possible("x ") and possible("step-00000020") and possible(".making-x_1")


def test_the_rules_hold(tmp_path, monkeypatch):
    "The controls: what Windows refuses is refused in the folder, and nowhere else."
    (tmp_path / "f").write_text("x"); (tmp_path / "d").mkdir(); (tmp_path / "e").mkdir()
    with rules(monkeypatch, tmp_path):
        with pytest.raises(PermissionError): os.open(tmp_path / "d", os.O_RDONLY)
        f = os.open(tmp_path / "f", os.O_RDONLY)
        with pytest.raises(OSError, match="Bad file"): os.fsync(f)
        with pytest.raises(PermissionError, match="being used"): os.replace(tmp_path / "f", tmp_path / "g")
        with pytest.raises(PermissionError, match="being used"): (tmp_path / "f").unlink()
        with mmap.mmap(f, 0, prot=mmap.PROT_READ):
            os.close(f)
            with pytest.raises(PermissionError, match="being used"): os.replace(tmp_path / "f", tmp_path / "g")
        with pytest.raises(FileExistsError): os.rename(tmp_path / "f", tmp_path / "d")
        with pytest.raises(PermissionError): os.replace(tmp_path / "d", tmp_path / "e")
        with pytest.raises(OSError, match="syntax"): (tmp_path / "a:b").write_text("x")
        with pytest.raises(UnicodeEncodeError): (tmp_path / "t").write_text("Ω")
        (tmp_path / "t").write_text("a\n")
        assert (tmp_path / "t").read_bytes() == b"a\r\n"
    os.replace(tmp_path / "f", tmp_path / "g")


def test_synced(tmp_path, monkeypatch):
    "Files and folders are synced everywhere; a read-only descriptor, as it was before, is refused there (errno 9)."
    (tmp_path / "f").write_text("x")
    synced(tmp_path / "f"); synced(tmp_path)
    with rules(monkeypatch, tmp_path): synced(tmp_path / "f"); synced(tmp_path)


@pytest.mark.parametrize("busy", [0, 2, 5, 99])
def test_a_scanner_that_looks(tmp_path, monkeypatch, busy):
    "A rename that is refused for a moment is tried again; one that stays refused is an error, and the old file stays."
    monkeypatch.setattr("lmtrain.settings.PAUSES", (0.,) * 5)
    (tmp_path / "w").write_text("old")
    real, tries = os.replace, []
    def scanned(source, target):
        tries.append(1)
        if len(tries) <= busy: raise PermissionError(errno.EACCES, "Access is denied", str(target))
        real(source, target)
    monkeypatch.setattr(os, "replace", scanned)
    if busy == 99:
        with pytest.raises(PermissionError): write(tmp_path / "w", "new")
    else: write(tmp_path / "w", "new")
    assert (tmp_path / "w").read_text() == ("old" if busy == 99 else "new") and len(tries) == min(busy + 1, 6) and [*tmp_path.iterdir()] == [tmp_path / "w"]


def test_whole_runs(tmp_path, monkeypatch):
    "A tour, and a run that is stopped, gone on with and continued from its own model in the same folder: under Windows' rules."
    monkeypatch.setenv("LMTRAIN_SCALE", "classroom"); monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lmtrain.text.SMALL", 1000)        # token folders, mapped and locked
    dice, words = random.Random(0), "the sea was calm and the sailors sang of old ships naïve Ωmega".split()
    with rules(monkeypatch, tmp_path):
        (tmp_path / "t").mkdir()
        for i in range(30): (tmp_path / "t" / f"{i:02}.txt").write_text(" ".join(dice.choices(words, k=90)) + f" day {i}", encoding="utf-8")
        small = scale("classroom")
        said = []
        tour(str(tmp_path / "t"), steps=4, out=tmp_path / "tour", sizes=small, say=said.append)
        tour(str(tmp_path / "t"), steps=4, out=tmp_path / "tour", sizes=small, say=said.append)  # over the first
        assert {p.name for p in (tmp_path / "tour").iterdir()} >= {"model", "report.html", "facts.json", "samples.txt"}
        assert "Ω" in (tmp_path / "tour" / "report.html").read_text(encoding="utf-8")
        job = lambda steps, **more: Job(data=str(tmp_path / "t"), steps=steps, rows=4, length=32, **more)
        train(job(4), tmp_path / "run", said.append)
        assert len(train(job(6), tmp_path / "run", said.append)) == 6
        again = train(job(2, model=str(tmp_path / "run" / "model")), tmp_path / "more", said.append)
        assert len(again) == 2 and any("Going on from step 4" in s for s in said)
        train(job(3, model=str(tmp_path / "run" / "model")), tmp_path / "more", said.append)
        model, tok = load(tmp_path / "more" / "model")
        save(model, tok, tmp_path / "more" / "model")      # over the one that was just read
        assert not [p for p in tmp_path.rglob(".*") if p.name != ".lock"] and [*(tmp_path / "cache" / "tokens").glob("*/rows-*/cuts")]


def test_models_of_others_are_saved_over(tmp_path, monkeypatch):
    "A model of transformers that was read from a folder is written to it again, though its weights could still be mapped from there."
    from transformers import GPT2Config, GPT2LMHeadModel

    from lmtrain import Pretrained, train_bpe
    tok = train_bpe(["the sea was calm"] * 9, 280)
    with rules(monkeypatch, tmp_path):
        GPT2LMHeadModel(GPT2Config(vocab_size=280, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path / "m"); tok.save_pretrained(tmp_path / "m")
        model = Pretrained(str(tmp_path / "m"))
        with torch.no_grad(): next(model.parameters()).add_(1)
        want = next(model.parameters()).detach().clone()
        save(model, tok, tmp_path / "m")
        assert torch.equal(next(Pretrained(str(tmp_path / "m")).parameters()), want)


def test_checkpoints_and_caches(tmp_path, monkeypatch, tok, pages):
    "Checkpoints are written, verified, pruned and resumed from; a history is cut and continued; a cache heals."
    rows = examples(pages[:6], tok, 32)
    def new(*callbacks, steps=6, history=None):
        torch.manual_seed(0)
        return Trainer(Transformer(Size(len(tok), 16, 2, layers=1, length=32)), CLM(), Loader(rows, CLM(), 4, 32), steps=steps, callbacks=callbacks, history=history)
    with rules(monkeypatch, tmp_path):
        new(Save(tmp_path / "c", every=1, keep=2), history=History(tmp_path / "h.jsonl")).fit()
        verify(latest(tmp_path / "c"))
        assert len([*(tmp_path / "c").glob("step-*")]) == 2
        more = new(steps=8)
        assert resume(more, tmp_path / "c", lambda text: None) == 6
        more.fit()
        last = new(Save(tmp_path / "c", every=1, keep=1), steps=9)                     # removes the one it went on from
        assert resume(last, tmp_path / "c", lambda text: None) == 6
        last.fit()
        assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000009"]
        with (tmp_path / "h.jsonl").open("ab") as f: f.write(b'{"step"')
        assert len(History.read(tmp_path / "h.jsonl")) == 6 and len(History(tmp_path / "h.jsonl")) == 0
        save_state(tmp_path / "s", a={"t": torch.ones(2)})
        write(tmp_path / "w", "one\n"); write(tmp_path / "w", "two\n")
        assert (tmp_path / "w").read_bytes() == b"two\n"
        make = lambda p: p.write_text("whole", encoding="utf-8")
        cached(tmp_path / "x", make); (tmp_path / "x").write_bytes(b"")
        with pytest.warns(UserWarning, match="made anew"): assert cached(tmp_path / "x", make).read_bytes() == b"whole"
        with locked(tmp_path): pass
        serve.copied(tmp_path / "books"); serve.write_page("masking", tmp_path / "page.html")
        assert json.loads((tmp_path / "books" / "masking.ipynb").read_text(encoding="utf-8"))
        (tmp_path / "g.jsonl").write_text("".join(json.dumps({"text": f"Όμηρος {i} {i * i}"}) + "\n" for i in range(9)), encoding="utf-8")
        assert corpus(tmp_path / "g.jsonl")["train"]["text"][0].startswith("Όμηρος")
