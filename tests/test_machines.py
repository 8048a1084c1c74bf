"""Machines that a class brings: containers without a home, shared folders, little memory, terminals that are gone."""
import errno
import io
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lmtrain import Size, Transformer, cli, doctor, load, save, settings
from lmtrain import corpus as open_corpus
from lmtrain.checkpoint import load_state, locked, save_state
from lmtrain.run import Job, train
from lmtrain.settings import check_readable
from lmtrain.tour import tour
from lmtrain.train import Progress, Trainer, idle_gpus, say


def written(folder: Path, n: int = 30, word: str = "naïve") -> Path:
    dice, words = random.Random(0), f"the sea was calm and the sailors sang of old ships {word}".split()
    folder.mkdir()
    for i in range(n): (folder / f"{i:02}.txt").write_text(" ".join(dice.choices(words, k=90)) + f" day {i}", encoding="utf-8")
    return folder


@contextmanager
def another_user():
    "Inside, this process is user 65534, who owns nothing; who is not root is no other user, and may not read mode 0 either."
    if os.geteuid(): yield; return
    groups = os.getgroups()
    os.setgroups([]); os.setresgid(65534, 65534, 0); os.setresuid(65534, 65534, 0)
    try: yield
    finally: os.setresuid(0, 0, 0); os.setresgid(0, 0, 0); os.setgroups(groups)


# ---- no home

@pytest.fixture
def homeless(monkeypatch, tmp_path):
    "No HOME, a user whom nobody knows, and a folder for temporary files."
    import pwd
    for name in ("HOME", "LMTRAIN_CACHE", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"): monkeypatch.delenv(name, raising=False)
    def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(settings.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError): Path.home()          # the control: this is what everything died of
    return tmp_path / f"lmtrain-{os.geteuid()}"


def test_without_a_home(homeless, monkeypatch, capsys):
    "The cache is a private folder; `doctor`, `data list` and `data get` work, and libraries below get a place there as well."
    monkeypatch.setattr("lmtrain.corpora.harvest", lambda root, name="": iter([(f"{name}.{i}", f"Number {i}. " * 40) for i in range(9)]))
    assert settings.cache_dir() == homeless and homeless.stat().st_mode & 0o777 == 0o700
    for words in (["doctor"], ["data", "list"], ["data", "get", "python-docs"]):
        monkeypatch.setattr(sys, "argv", ["lmtrain", *words])
        with pytest.raises(SystemExit) as e: cli.main()
        out, err = capsys.readouterr()
        assert e.value.code == 0 and err == "" and (words[0] != "doctor" or f"{homeless}, " in out)
    assert [*homeless.glob("docs-*.jsonl")] and os.environ["HF_HOME"] == str(homeless / "huggingface") and os.environ["MPLCONFIGDIR"].startswith(str(homeless))


def test_a_private_folder_that_is_not_ours(homeless, tmp_path):
    "A link, a folder of another user, one that others may write to: refused in a line that says what to do."
    homeless.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="belongs to somebody else: set LMTRAIN_CACHE"): settings.cache_dir()
    homeless.unlink(); homeless.mkdir(); homeless.chmod(0o777)
    with pytest.raises(PermissionError, match="LMTRAIN_CACHE"): settings.cache_dir()
    homeless.chmod(0o700)
    assert settings.cache_dir() == homeless
    if os.geteuid() == 0:
        os.chown(homeless, 65534, 65534)
        with pytest.raises(PermissionError, match="somebody else"): settings.cache_dir()


def test_a_home_that_is_closed(tmp_path, monkeypatch):
    "A home that may not be written to, or not even entered, is none; one that may is used, and what is set goes first."
    for name in ("LMTRAIN_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings.tempfile, "gettempdir", lambda: str(tmp_path))
    for folder in [tmp_path, *tmp_path.parents][:3]: folder.chmod(0o777)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for mode, ours in ((0o700, False), (0o000, False), (0o555, False), (0o777, True)):
        (tmp_path / "home").mkdir(exist_ok=True); (tmp_path / "home").chmod(mode)
        with another_user(): got = settings.cache_dir()
        assert got == (tmp_path / "home" / ".cache" / "lmtrain" if ours else tmp_path / "lmtrain-65534") or os.geteuid()
    monkeypatch.setenv("LMTRAIN_CACHE", "/x"); assert settings.cache_dir() == Path("/x")
    monkeypatch.delenv("LMTRAIN_CACHE"); monkeypatch.setenv("XDG_CACHE_HOME", "/y"); assert settings.cache_dir() == Path("/y/lmtrain")


# ---- memory and cores

def groups(monkeypatch, root: Path, lines: str, files: dict[str, str]) -> None:
    "Control groups as a container shows them."
    root.mkdir(parents=True)
    (root / "cgroup").write_text(lines)
    for name, text in files.items(): (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True); (root / "fs" / name).write_text(text)
    monkeypatch.setattr(doctor, "OWN_GROUPS", root / "cgroup"); monkeypatch.setattr(doctor, "GROUPS", root / "fs")


@pytest.mark.parametrize("lines, files, gib", [
    ("0::/\n", {"memory.max": "1073741824\n"}, 1), ("0::/\n", {"memory.max": "max\n"}, None), ("0::/a/b\n", {"a/memory.max": "536870912", "a/b/memory.max": "max"}, .5),
    ("0::/not/seen\n", {"memory.max": "1073741824"}, 1), ("5:memory:/docker/1\n", {"memory/memory.limit_in_bytes": "2147483648"}, 2),
    ("5:cpu,memory:/x\n", {"memory/x/memory.limit_in_bytes": "2147483648"}, 2), ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None), ("", {}, None)])
def test_memory_is_the_containers(tmp_path, monkeypatch, lines, files, gib):
    "Both versions of control groups, limits of a parent, no limit at all: then it is the machine's."
    import psutil
    groups(monkeypatch, tmp_path / "g", lines, files)
    assert doctor.memory() == pytest.approx(gib or psutil.virtual_memory().total / 2**30)


def test_cores_are_the_containers(tmp_path, monkeypatch):
    "A share of the time counts as so many cores, rounded up; no share is all of them."
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for i, (files, lines, n) in enumerate([({"cpu.max": "150000 100000"}, "0::/", 2), ({"cpu.max": "max 100000"}, "0::/", 64), ({"cpu.max": "1000 100000"}, "0::/", 1),
                                           ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 4),
                                           ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/", 64)]):
        groups(monkeypatch, tmp_path / str(i), lines, files)
        assert doctor.cores() == n


def test_too_little_memory_is_said_before(tmp_path, monkeypatch, capsys):
    "The tour warns in one line, with what was measured and what to do; where there is enough, the control, it is silent."
    for gib, scale, says in ((.5, "laptop", "allow more"), (1.2, "laptop", "or --scale classroom"), (1.2, "classroom", ""), (4, "laptop", "")):
        monkeypatch.setattr(doctor, "memory", lambda gib=gib: gib)
        told = doctor.too_little(scale)
        assert says in told and bool(says) == bool(told) and f"{gib:.1f} GiB" in (told or f"{gib:.1f} GiB")
        monkeypatch.setattr(sys, "argv", ["lmtrain", "tour", "--data", "nothing", "--scale", scale])
        with pytest.raises(SystemExit): cli.main()
        assert ("GiB of memory are allowed" in capsys.readouterr().err) == bool(says)


def test_doctor_knows_other_machines(monkeypatch):
    "Apple's GPU is one; several GPUs are told how they are used; without psutil the memory is no fault of doctor's. Control: here there is none."
    here = lambda: dict((what, (found, fine)) for what, found, fine in doctor.machine())
    if not torch.cuda.is_available(): assert here()["GPU"] == ("none: everything runs on the CPU", True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "Apple's" in here()["GPU"][0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2); monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert "torchrun" in here()["GPU"][0]
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "psutil" else find(name))
    monkeypatch.setattr(doctor, "OWN_GROUPS", Path("/nothing"))
    assert here()["memory"][1]


def test_an_extra_that_is_too_old_is_no_fault(monkeypatch):
    "setuptools below what the extra `dev` asks for is said and does not count; a run-time package below its bound, the control, does."
    real = doctor.version
    for name, fine in (("setuptools", True), ("pytest", True), ("numpy", False)):
        monkeypatch.setattr(doctor, "version", lambda n, name=name: "0.1" if n == name else real(n))
        line = next(line for line in doctor.packages() if line[0] == name)
        assert line[2] == fine and ("optional" in line[1]) == fine


# ---- shared folders

def modes(folder: Path) -> dict[str, int]: return {p.relative_to(folder).as_posix(): p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path, monkeypatch, tok, umask):
    "Models and checkpoints have the mode of any new file, even where a library writes for its owner alone (the control)."
    import lmtrain.checkpoint
    import lmtrain.model
    def private(*args, **kwargs): safetensors.torch.save_file(*args, **kwargs); os.chmod(args[1], 0o600)
    for module in (lmtrain.model, lmtrain.checkpoint): monkeypatch.setattr(module, "save_file", private)
    private({"x": torch.ones(1)}, tmp_path / "control")
    assert (tmp_path / "control").stat().st_mode & 0o777 == 0o600
    before = os.umask(umask)
    try:
        save(Transformer(Size(len(tok), 16, 2, layers=1, length=32)), tok, tmp_path / "m")
        save_state(tmp_path / "s", a={"t": torch.ones(2)})
    finally: os.umask(before)
    for folder in "ms": assert {*modes(tmp_path / folder).values()} == {0o666 & ~umask} and (tmp_path / folder).stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_may_not_be_read_is_named(tmp_path, tok, monkeypatch, capsys):
    "A model, a checkpoint, a file and a folder of text that are another's: named, and never 'No such file'."
    for folder in [tmp_path, *tmp_path.parents][:3]: folder.chmod(0o755)
    save(Transformer(Size(len(tok), 16, 2, layers=1, length=32)), tok, tmp_path / "m")
    save_state(tmp_path / "s", a={"t": torch.ones(2)})
    written(tmp_path / "t")
    closed = {"m/model.safetensors": lambda: load(tmp_path / "m"), "s/a.safetensors": lambda: load_state(tmp_path / "s"), "t/03.txt": lambda: open_corpus(tmp_path / "t"),
              "t": lambda: open_corpus(tmp_path / "t"), "m": lambda: load(tmp_path / "m")}
    for name, read in closed.items():
        path = tmp_path / name
        mode = path.stat().st_mode & 0o777
        path.chmod(0)
        with another_user(), pytest.raises(PermissionError) as e: read()
        assert e.value.errno == errno.EACCES and str(path) in str(e.value.filename)
        monkeypatch.setattr(sys, "argv", ["lmtrain", "generate", str(tmp_path / "m")])
        if name.startswith("m"):
            with another_user(), pytest.raises(SystemExit): cli.main()
            err = capsys.readouterr().err
            assert f"{path} may not be read by this user" in err and err.count("\n") == 1
        path.chmod(mode)
    with another_user(): assert check_readable(tmp_path / "m") is None and load(tmp_path / "m")


HOLD = "import sys, time; from pathlib import Path; from lmtrain.checkpoint import locked\nwith locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_one_run_in_a_folder(tmp_path, monkeypatch, capsys):
    "While another process writes there, tour and train are refused in one line; after `kill -9` the folder is free."
    (tmp_path / "out").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        for words in (["tour", "--data", str(written(tmp_path / "t")), "--steps", "1"], ["train", "--data", str(tmp_path / "t"), "--steps", "1"]):
            monkeypatch.setattr(sys, "argv", ["lmtrain", *words, "--out", str(tmp_path / "out")])
            with pytest.raises(SystemExit) as e: cli.main()
            err = capsys.readouterr().err
            assert e.value.code == 1 and "another run writes to" in err and err.count("\n") == 1
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    finally: other.send_signal(signal.SIGKILL); other.wait()
    with locked(tmp_path / "out"): pass
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError):
        with locked(tmp_path / "out"): pass


# ---- what is printed

class Gone(io.StringIO):
    "A stream that is no more: what it raises is up to `fault`."
    def __init__(self, fault): super().__init__(); self.fault = fault
    def write(self, text): raise self.fault
    def flush(self): raise self.fault


@pytest.mark.parametrize("fault", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left"),
                                   ValueError("I/O operation on closed file")], ids=["pipe", "terminal", "disk", "closed"])
def test_nothing_printed_ends_a_run(monkeypatch, tok, pages, fault):
    "`say` and the progress bar over streams that are gone: the run goes on to its end. Control: `print` fails there."
    from lmtrain import CLM, Loader, examples
    monkeypatch.setattr(sys, "stdout", Gone(fault)); monkeypatch.setattr(sys, "stderr", Gone(fault))
    with pytest.raises(type(fault)): print("x")
    say("x")
    net = Transformer(Size(len(tok), 16, 2, layers=1, length=32))
    trainer = Trainer(net, CLM(), Loader(examples(pages[:3], tok, 32), CLM(), 4, 32), steps=3, callbacks=[Progress(2.)])
    assert len(trainer.fit()) == 3
    monkeypatch.setattr(sys, "stderr", None); monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    say("x")
    assert len(Trainer(net, CLM(), Loader(examples(pages[:3], tok, 32), CLM(), 4, 32), steps=3, callbacks=[Progress(2.)]).fit()) == 3


def test_letters_that_are_not_there(monkeypatch):
    "In cp1252 Greek is question marks, and what it has is there."
    out = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(UnicodeEncodeError): print("Όμηρος", flush=True)
    say("Όμηρος naïve")
    assert "?????? naïve".encode("cp1252") in out.buffer.getvalue()


TOUR = "import sys; from lmtrain.tour import tour; tour(sys.argv[1], steps=2, out=sys.argv[2], sizes=__import__('lmtrain.settings').settings.scale('classroom'))"


def test_a_tour_on_greek_in_a_small_terminal(tmp_path):
    "From a script, without the command's care, over text that cp1252 has not: it ends well, and the model is there."
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", TOUR, str(written(tmp_path / "t", 20, "Όμηρος μῆνιν ἄειδε")), str(tmp_path / "out")], env=env, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"?" in done.stdout and load(tmp_path / "out" / "model")
    assert "Όμηρος" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_pipe_that_is_closed(tmp_path):
    "`lmtrain tour | head -1`: the tour takes all its steps, and the model is there."
    command = [sys.executable, "-m", "lmtrain", "tour", "--data", str(written(tmp_path / "t", 20)), "--steps", "3", "--scale", "classroom", "--out", str(tmp_path / "out")]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.readline().startswith(b"Starting"); p.stdout.close()
    err = p.stderr.read().decode()
    p.wait(200)
    assert "Traceback" not in err and "BrokenPipe" not in err
    assert load(tmp_path / "out" / "model") and len((tmp_path / "out" / "history.jsonl").read_text().splitlines()) == 3 and (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("stage", ["scoring", "writing", "comparing", "keeping"])
def test_the_model_is_saved_before_it_is_shown(tmp_path, monkeypatch, stage):
    "Whatever goes wrong after training, the model is there, and the same command goes on without training again."
    module = sys.modules["lmtrain.tour"]
    stages, calm = module.STAGES, settings.scale("classroom")
    def fails(s): raise RuntimeError("on purpose")
    at = [f.__name__ for f in stages].index(stage)
    monkeypatch.setattr(module, "STAGES", (*stages[:3], fails))
    data = str(written(tmp_path / "t", 20))
    with pytest.raises(RuntimeError, match="on purpose"): tour(data, steps=3, out=tmp_path / "out", sizes=calm, say=lambda text: None)
    model, _ = load(tmp_path / "out" / "model")
    monkeypatch.setattr(module, "STAGES", stages[:at + 1])
    said = []
    tour(data, steps=3, out=tmp_path / "out", sizes=calm, say=said.append)
    assert "Going on from step 3 of 3." in said
    for a, b in zip(model.parameters(), load(tmp_path / "out" / "model")[0].parameters(), strict=True): assert torch.equal(a, b)


# ---- several GPUs

def test_gpus_that_are_left_alone_are_named(tmp_path, monkeypatch):
    "Several GPUs and no launcher: one sentence with the command that uses all. One GPU, or a launcher: none."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "4 GPUs are here, one is used" in idle_gpus() and "torchrun --nproc-per-node 4 -m lmtrain train" in idle_gpus()
    said = []
    train(Job(data=str(written(tmp_path / "t")), steps=1, rows=2, length=32, model="Size(dim=16, heads=2, layers=1)"), tmp_path / "run", said.append)
    assert idle_gpus() in said
    monkeypatch.setenv("WORLD_SIZE", "1"); assert idle_gpus() == ""
    monkeypatch.delenv("WORLD_SIZE"); monkeypatch.setattr(torch.cuda, "device_count", lambda: 1); assert idle_gpus() == ""


def test_no_number_is_taken_for_the_default(tmp_path):
    "A learning rate, rows or a length of 0 are refused, and not taken for those of the scale."
    for words, says in ((["--lr", "0"], "lr must be more than 0"), (["--lr", "-1"], "lr must be more"), (["--rows", "0"], "rows"), (["--length", "0"], "length")):
        done = subprocess.run([sys.executable, "-m", "lmtrain", "train", "--data", "x", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode in (1, 2) and says in done.stderr and "Traceback" not in done.stderr
