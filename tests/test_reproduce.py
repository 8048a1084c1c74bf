"""The machine that runs experiments, on one made up here: what is kept, what is due, what the page says, what goes wrong."""
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

from lmtrain import experiments
from lmtrain.claims import Claim
from lmtrain.reproduce import due, experiment, measure, names, of_all, page, record_of, reproduce, seeded

TOY = '''
import random
from matplotlib.figure import Figure
from lmtrain.claims import Claim, Verdict, versus
claim = Claim("Heavy coins fall faster.", "Aristotle", "Ten times as fast.", "No difference.")
EFFECT, BREAKS, FAILS = {effect}, {breaks}, {fails}
def run(seed, size=1.0):
    if seed in FAILS: raise ZeroDivisionError("no table")
    dice = random.Random(seed)
    return [{{"arm": a, "speed": size * (9.8 + EFFECT * (a == "heavy")) + dice.gauss(0, .1)}} for a in ("light", "heavy")]
def verdict(rows):
    mean, low, high = versus(rows, "heavy", "light", "speed")
    return Verdict(low > 0, f"{{mean:.2f}} m/s2 faster ({{low:.2f}} to {{high:.2f}}).", {{"falling is down": not BREAKS}})
def plot(rows):
    fig = Figure(figsize=(4, 2)); fig.subplots().plot([r["speed"] for r in rows]); return fig
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "Writes the experiment `two-coins` into a folder that is searched beside the real ones."
    folder = tmp_path / "modules"; folder.mkdir()
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    def write(effect=0.0, breaks=False, fails=()):
        (folder / "two_coins.py").write_text(TOY.format(effect=effect, breaks=breaks, fails=fails))
        sys.modules.pop("lmtrain.experiments.two_coins", None); importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        import linecache; linecache.clearcache()
    before = sys.dont_write_bytecode
    write()
    yield write
    sys.dont_write_bytecode = before
    sys.modules.pop("lmtrain.experiments.two_coins", None)


def quiet(text): pass


@pytest.mark.parametrize("name", names())
def test_every_experiment_has_its_four_names(name):
    "A claim in five sentences, `run`, `verdict`, `plot`."
    e = experiment(name)
    assert isinstance(e.claim, Claim) and all(len(v) > 8 for v in asdict(e.claim).values())
    assert all(callable(getattr(e, f)) for f in ("run", "verdict", "plot"))


def test_unknown(toy):
    assert names() == ["two-coins"]
    with pytest.raises(ValueError, match="no experiment 'three-coins': choose from two-coins"): experiment("three-coins")
    with pytest.raises(ValueError, match="no experiment"): reproduce(["three-coins"], say=quiet)
    for wrong in {"seeds": 0}, {"size": 0}, {"size": float("nan")}:
        with pytest.raises(ValueError, match="more than 0"): reproduce(["two-coins"], say=quiet, **wrong)


@pytest.mark.parametrize("effect, shown", [(0.0, False), (2.0, True)])
def test_page(toy, tmp_path, effect, shown):
    "With an effect the page says shown, without, the control, not shown; all five sentences, the plot and the laws are there."
    toy(effect)
    out = tmp_path / "out"
    verdict = reproduce(["two-coins"], out=out, say=quiet)["two-coins"]
    text = (out / "README.md").read_text()
    assert verdict.shown == shown and f"## two-coins: {'shown' if shown else 'not shown'}" in text
    for part in "Heavy coins", "Aristotle", "Ten times", "No difference.", verdict.found, "holds: falling is down": assert part in text
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text): assert (out / link).exists(), link
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"(?m)^## (.*)", text)}
    assert {*re.findall(r"\]\(#([^)]+)\)", text)} <= anchors
    first = (out / "two-coins.svg").read_bytes(), text
    page(out, out)
    assert ((out / "two-coins.svg").read_bytes(), (out / "README.md").read_text()) == first


def test_what_is_kept_is_not_made_again(toy, tmp_path):
    "A second call makes nothing; more seeds make the new ones; new code, another size, `again` or a torn file make it anew."
    out, made = tmp_path / "out", []
    def go(**more):
        made.clear(); reproduce(["two-coins"], out=out, say=lambda t: made.append(t) if "seed" in t else None, **more)
        return len(made)
    assert (go(seeds=2), go(seeds=2), go(seeds=3), go(seeds=3)) == (2, 0, 1, 0)
    assert go(seeds=3, again=True) == 3 and go(seeds=3, size=.5) == 3
    toy(1.0)
    assert go(seeds=3, size=.5) == 3
    (out / "two-coins" / "seed-1.json").write_text('{"experiment": "two-coins", "se')
    assert record_of(out, "two-coins", 1) is None and go(seeds=3, size=.5) == 1


def test_runs_that_belong_together(toy, tmp_path):
    "An interval never mixes codes or sizes: of two sizes the larger, of two codes today's. Control: the rows differ."
    out = tmp_path / "out"
    for seed, size in (0, 1.0), (1, 1.0), (2, .5): measure("two-coins", seed, size, out)
    assert [r.seed for r in of_all("two-coins", out)] == [0, 1]
    toy(5.0); measure("two-coins", 3, .5, out)
    assert [r.seed for r in of_all("two-coins", out)] == [3]
    assert {r["seed"] for r in seeded(of_all("two-coins", out))} == {3}


def test_the_stalest_first(toy, tmp_path):
    "Missing runs, then those of older code, then the oldest."
    out = tmp_path / "out"
    for seed in 0, 1: measure("two-coins", seed, 1.0, out)
    toy(1.0); measure("two-coins", 2, 1.0, out); measure("two-coins", 3, 1.0, out)
    os.utime(out / "two-coins" / "seed-3.json", (1, 1))
    order = [seed for _, seed in due(["two-coins"], 5, 1.0, out, again=True)]
    assert order[0] == 4 and {*order[1:3]} == {0, 1} and order[3:] == [3, 2]


def test_budget(toy, tmp_path):
    "What took longer last time than is left is not started, and it is said."
    out, said = tmp_path / "out", []
    record = measure("two-coins", 0, 1.0, out)
    path = out / "two-coins" / "seed-0.json"
    path.write_text(json.dumps({**asdict(record), "seconds": 600}))
    reproduce(["two-coins"], seeds=2, out=out, budget=5, say=said.append)
    assert not (out / "two-coins" / "seed-1.json").exists() and any("1 runs did not fit into 5 minutes" in t for t in said)
    reproduce(["two-coins"], seeds=2, out=out, budget=15, say=said.append)
    assert (out / "two-coins" / "seed-1.json").exists()


def test_a_failing_run(toy, tmp_path):
    "It is told, the others are kept, and the next call makes it; a law that is broken is an error and on the page."
    out = tmp_path / "out"
    toy(fails=(1,))
    with pytest.raises(RuntimeError, match=r"two-coins, seed 1 \(no table\)"): reproduce(["two-coins"], out=out, say=quiet)
    assert [r.seed for r in of_all("two-coins", out)] == [0, 2] and (out / "README.md").exists()
    toy(breaks=True)
    with pytest.raises(RuntimeError, match="'falling is down' failed"): reproduce(["two-coins"], out=out, say=quiet)
    assert "**broken**: falling is down" in (out / "README.md").read_text()


def test_not_a_number_is_no_result(toy, tmp_path):
    toy(effect="float('nan')")
    with pytest.raises(RuntimeError, match="JSON compliant"): reproduce(["two-coins"], seeds=1, out=tmp_path / "out", say=quiet)
    assert not [*(tmp_path / "out").rglob("*.json")]


def test_a_full_disk(toy, tmp_path, monkeypatch):
    "It stops at once, and what was kept before stays whole."
    import lmtrain.reproduce as module
    out = tmp_path / "out"
    measure("two-coins", 0, 1.0, out)
    def full(path, text): raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(module, "write", full)
    with pytest.raises(OSError, match="No space"): reproduce(["two-coins"], out=out, say=quiet)
    assert record_of(out, "two-coins", 0) is not None


def test_command_line(tmp_path):
    "--list prints claims, --json one document, and asking for nothing is an error that says what to do."
    def lmtrain(*words):
        return subprocess.run([sys.executable, "-m", "lmtrain", "reproduce", *words], capture_output=True, text=True, cwd=tmp_path)
    done = lmtrain("--list")
    assert done.returncode == 0 and all(n in done.stdout for n in names())
    done = lmtrain()
    assert done.returncode == 1 and "--all" in done.stderr and done.stderr.count("\n") == 1
    done = lmtrain("samplers", "--seeds", "1", "--size", ".02", "--json", "--out", "r")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {*told} == {"samplers"} and all(told["samplers"]["verdict"]["checks"].values()) and told["samplers"]["rows"]
    assert (tmp_path / "r" / "README.md").exists()


def test_what_is_kept_is_of_todays_code_and_drawn():
    "Every experiment has three kept runs of its code as it is; its notebook draws them, and asserts its smoke run and draws nothing of it."
    import json
    from pathlib import Path
    from lmtrain.claims import recorded
    from lmtrain.reproduce import code_of, names
    root = Path(__file__).parent.parent
    for name in names():
        rows, origin = recorded(name)
        assert {r["seed"] for r in rows} == {0, 1, 2} and f"code {code_of(name)}" in origin and "size 1" in origin, name
        cells = {c["id"]: "".join(c["source"]) for c in json.loads((root / "nbs/7_experiments" / f"{name.replace('-', '_')}.ipynb").read_text())["cells"]}
        assert f'recorded("{name}")' in cells["live"] and "plot(rows)" in cells["live"]
        assert "assert all(verdict(smoke).checks.values())" in cells["smoke"] and "plot" not in cells["smoke"]
    with pytest.raises(FileNotFoundError, match="no run of 'nothing' is kept"): recorded("nothing")
