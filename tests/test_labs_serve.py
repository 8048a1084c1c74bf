"""`lmtrain lab`: pages, copies, command lines; what is refused, and why."""
import json
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
    n = serve.copied(tmp_path)
    assert n > 20 and serve.copied(tmp_path) == 0
    (tmp_path / "masking.ipynb").write_text("mine")
    (tmp_path / "index.ipynb").unlink()
    assert serve.copied(tmp_path) == 1 and (tmp_path / "masking.ipynb").read_text() == "mine"
    for name in serve.CLASSES:
        nb = json.loads(serve.notebook(name))
        assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and len({c["id"] for c in nb["cells"]}) == 2


def test_only_this_machine_and_a_token(tmp_path, monkeypatch):
    "Both servers listen on 127.0.0.1 behind a token."
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    for voila in (False, True):
        line = " ".join(serve.command(tmp_path, "noise", voila, 8899, "secret", False))
        assert "ip=127.0.0.1" in line and "token=secret" in line and "port=8899" in line and "--no-browser" in line


def test_what_is_refused(tmp_path, monkeypatch):
    "Unknown labs, an app without a name, a missing server, a lab without what it needs: one line that says what to do."
    with pytest.raises(ValueError, match="choose from masking, noise, loss"): serve.known("mask")
    with pytest.raises(ValueError, match="an app needs a name"):
        monkeypatch.setattr(serve, "find_spec", lambda name: True)
        serve.command(tmp_path, None, True, 0, "x", False)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"): serve.command(tmp_path, None, False, 0, "x", False)
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
