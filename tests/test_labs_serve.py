"""`lmtrain lab`: pages, copies, command lines; what is refused, and why."""
import json
import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lmtrain.cli import app
from lmtrain.labs import serve
from lmtrain.labs.loss import Learner, LossLab, costs
from lmtrain.labs.noise import NoiseLab


def test_page_is_written(tmp_path):
    "One file a lab, which asks no network; folders are made."
    for name in serve.CLASSES:
        done = CliRunner().invoke(app, ["lab", name, "--html", str(tmp_path / "deep" / f"{name}.html")])
        text = (tmp_path / "deep" / f"{name}.html").read_text(encoding="utf-8")
        assert done.exit_code == 0 and "default-src 'none'" in text and 'src="' not in text and len(text) < 400_000


def test_copies_keep_what_is_there(tmp_path):
    "Chapters and labs are copied once; a reader's changes stay. The control: a file that was deleted comes back."
    files = lambda: {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.ipynb")}
    serve.copied(tmp_path)
    n = files()
    assert len(n) > 20 and serve.copied(tmp_path)[0].startswith("0 notebooks") and files() == n
    (tmp_path / "masking.ipynb").write_text("mine")
    (tmp_path / "index.ipynb").unlink()
    assert serve.copied(tmp_path)[0].startswith("1 notebooks") and (tmp_path / "masking.ipynb").read_text() == "mine" and files() == n
    for name in serve.CLASSES:
        nb = json.loads(serve.notebook(name))
        assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and len({c["id"] for c in nb["cells"]}) == 2


@pytest.mark.parametrize("record", ["whole", "missing", "damaged"])
def test_after_an_upgrade(tmp_path, monkeypatch, record):
    "The newer text of a chapter lies beside the reader's own, once; chapters that are no more are named, and kept."
    old = {"1/a.ipynb": "a of old", "1/b.ipynb": "b", "1/gone.ipynb": "gone"}
    monkeypatch.setattr(serve, "shipped", lambda: old)
    serve.copied(tmp_path)
    (tmp_path / "1" / "a.ipynb").write_text("a of old, with my notes")
    if record == "missing": (tmp_path / serve.RECORD).unlink()
    if record == "damaged": (tmp_path / serve.RECORD).write_text("{")
    monkeypatch.setattr(serve, "shipped", lambda: {"1/a.ipynb": "a of new", "1/b.ipynb": "b", "1/c.ipynb": "c"})
    said = serve.copied(tmp_path)
    laid = next(p for p in (tmp_path / "1").glob("a-*.ipynb"))
    assert laid.read_text() == "a of new" and (tmp_path / "1" / "a.ipynb").read_text() == "a of old, with my notes"
    assert f"laid beside yours: 1/{laid.name}" in said[1] and said[0].startswith("2 notebooks")
    assert ("of an earlier lmtrain, kept: 1/gone.ipynb" in said) == (record == "whole") and (tmp_path / "1" / "gone.ipynb").exists()
    assert serve.copied(tmp_path)[0].startswith("0 notebooks") and len([*tmp_path.rglob("*.ipynb")]) == 5
    laid.unlink()
    assert serve.copied(tmp_path)[0].startswith("0 notebooks"), "what a reader threw away stays away"


def test_only_this_machine_and_no_token_in_arguments(tmp_path):
    "Both servers listen on 127.0.0.1 alone; what leads in is readable by its owner alone, under any umask."
    for voila in (False, True):
        line = " ".join(serve.arguments(tmp_path, "noise", voila, 8899))
        assert "ip=127.0.0.1" in line and "token" not in line and "port=8899" in line
        assert "--no-browser" in line and "port_retries=0" in line
    before = os.umask(0)
    try: page = serve.door("http://127.0.0.1:1/", "secret", tmp_path)
    finally: os.umask(before)
    assert page.stat().st_mode & 0o777 == 0o600 and "token=secret" in page.read_text()
    with pytest.raises(FileExistsError): serve.door("http://127.0.0.1:1/", "secret", tmp_path)  # not into another's file


def test_a_port_that_is_taken():
    "A taken port is one line, before anything is copied; 0 is a free one."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        with pytest.raises(OSError, match="give another --port"): serve.free_port(s.getsockname()[1])
    assert 1024 < serve.free_port(0) < 2**16


def test_what_is_refused(tmp_path, monkeypatch):
    "Unknown labs, an app without a name, a missing server, a lab without what it needs: one line that says what to do."
    with pytest.raises(ValueError, match="choose from masking, noise, loss"): serve.known("mask")
    with pytest.raises(ValueError, match="an app needs a name"):
        serve.arguments(tmp_path, None, True, 1)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"): serve.application(False)
    with pytest.raises(ValueError, match="no models"): NoiseLab().write("x")
    with pytest.raises(ValueError, match="trains nothing"): LossLab().forward()
    with pytest.raises(ValueError, match="held-out rows"): LossLab(trainer=object())
    done = subprocess.run([sys.executable, "-m", "lmtrain", "lab", "mask", "--html", str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "choose from" in done.stderr


def test_learner_begins_again(tok, pages, model):
    "Steps lower the loss; after reset the same steps give the same losses, bit for bit. Another seed's loader, the control, does not."
    from lmtrain import CLM, Loader, Trainer, examples
    from lmtrain.model import Size, Transformer
    rows = examples(pages[:12], tok, 32)
    def learner(seed):
        import torch
        torch.manual_seed(0)
        net = Transformer(Size(len(tok), dim=16, heads=2, layers=1, length=32))
        return Learner(Trainer(net, CLM(), Loader(rows[8:], CLM(), 4, 32, seed=seed), lr=1e-2, steps=1000), rows[:8])
    one, other = learner(0), learner(1)
    before, first = one.score(), [one.step() for _ in range(12)]
    after = one.score()
    one.reset()
    assert (one.score(), [one.step() for _ in range(12)]) == (before, first) and after[1] < before[1]
    assert [other.step() for _ in range(12)] != first
    lab = LossLab(trainer=other.trainer, held=rows[:8], tok=tok, text="Return the number.")
    lab.forward(); lab.command = "step"
    assert [p[0] for p in lab.train] == [13, 14] and lab.command == "pause" and lab.runs[0]["name"] == "the learner"
    assert "nats a token" in lab.picture() and costs(lab.runs[0])[0] == 0
    lab.command = "reset"
    assert lab.train == [] and len(lab.held) == 1


def test_what_comes_with_the_labs():
    "The file of writings and readers is whole: probabilities, steps and tokens fit, and the bias of the surest draw shows."
    from lmtrain.labs.small import stored
    k = stored()
    for w in k["writings"]: assert len(w["ids"]) == len(w["when"]) == len(w["p"]) and 0 <= min(w["p"]) and max(w["p"]) <= 1
    share = {w["name"]: w["pairs"] for w in k["writings"]}
    assert share["surest draw first"] < .7 * share["blind order"] and abs(share["left to right"] - k["varied"]) < .1
    assert [costs(r)[1:].mean() for r in k["runs"]][0] < costs(k["runs"][1])[1:].mean()
    assert json.dumps(k)
