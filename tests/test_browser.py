"""The labs in a real browser: as a page of their own, in JupyterLab and in Voila. `make browser` runs these.

What the page shows is compared with what Python computes; pictures go to the folder $LMTRAIN_PICTURES, if it is set.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, Request, build_opener, urlopen

import numpy as np
import pytest

from lmtrain import CLM, Loader, examples, train_bpe
from lmtrain.labs.loss import LossLab, costs
from lmtrain.labs.masking import MaskingLab
from lmtrain.labs.noise import NoiseLab
from lmtrain.labs.shared import page as page_of
from lmtrain.objectives.masked import MLM

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
LONG = "The king is not himself, but basely led by flatterers. " * 16  # more than 256 tokens


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright
    assert CHROMIUM, "install Chromium (Debian: apt install chromium): these tests need a browser"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def view(chromium):
    "A function that opens an address; it keeps what went wrong and who was asked."
    pages = []
    def open_(address: str, width=1200, dark=False):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        page.wrong, page.asked = [], []
        page.on("pageerror", lambda e: page.wrong.append(str(e)))
        page.on("request", lambda r: page.asked.append(r.url))
        page.goto(address)
        pages.append(page)
        return page
    yield open_
    for p in pages: p.close()


def keep(page, name: str) -> None:
    if folder := os.environ.get("LMTRAIN_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def numbers(page, attribute: str, inside: str = ".lm-tokens") -> list[float]:
    "An attribute of each token, in order."
    return page.evaluate("([n, s]) => [...document.querySelector(s).children].map((e) => Number(e.dataset[n]))", [attribute, inside])


def put(page, knob: str, value) -> None:
    "Give a slider or a field a value, as a hand would: with its event."
    page.evaluate("""([k, v]) => { const e = document.querySelector(`.lm-lab [data-knob="${k}"]`);
      if (e.type === "checkbox") e.click(); else { e.value = v; e.dispatchEvent(new Event("input", {bubbles: true}));
      e.dispatchEvent(new Event("change", {bubbles: true})); } }""", [knob, value])


OVERLAPS = """() => {
  const out = [], all = [...document.querySelectorAll(".lm-lab .lm-token, .lm-lab select, .lm-lab button, .lm-lab input, .lm-lab canvas, .lm-lab svg.lm-plot, .lm-lab table")];
  const boxes = all.filter((e) => e.checkVisibility()).map((e) => [e, e.getBoundingClientRect()]);
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [[a, x], [b, y]] = [boxes[i], boxes[j]];
    if (a.contains(b) || b.contains(a) || a.closest(".lm-tokens") !== b.closest(".lm-tokens") && (a.closest(".lm-tokens") || b.closest(".lm-tokens"))) continue;
    if (Math.min(x.right, y.right) - Math.max(x.left, y.left) > 1 && Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 1) out.push(a.outerHTML.slice(0, 80) + " / " + b.outerHTML.slice(0, 80));
  }
  if (document.documentElement.scrollWidth > innerWidth) out.push(`wider than the window: ${document.documentElement.scrollWidth}`);
  for (const [e, x] of boxes) if (x.right > innerWidth + 1 || x.left < -1) out.push("outside: " + e.outerHTML.slice(0, 80));
  return out;
}"""


def file_of(lab, folder: Path) -> str:
    path = folder / "lab.html"
    path.write_text(page_of(lab, "a lab"), encoding="utf-8")
    return path.as_uri()


LABS = {"masking": MaskingLab, "noise": NoiseLab, "loss": LossLab}


@pytest.mark.parametrize("name", LABS)
@pytest.mark.parametrize("width", [700, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_of_its_own(name, width, dark, view, tmp_path):
    "Nothing overlaps or sticks out, nothing goes wrong, nobody is asked; every control has a name and can be reached."
    page = view(file_of(LABS[name](), tmp_path), width, dark)
    page.wait_for_selector(".lm-tokens > *")
    assert not page.wrong and [u for u in page.asked if not u.startswith(("file:", "data:"))] == []
    assert page.evaluate(OVERLAPS) == []
    unnamed = page.evaluate("""() => [...document.querySelectorAll(".lm-lab input, .lm-lab select, .lm-lab textarea, .lm-lab canvas, .lm-lab svg")]
      .filter((e) => !e.ariaLabel && !e.labels?.length).map((e) => e.outerHTML.slice(0, 90))""")
    assert unnamed == []
    keep(page, f"{name}-{width}-{'dark' if dark else 'light'}")


def test_overlap_is_noticed(view, tmp_path):
    "The control of the test above: a token that is moved over its neighbour, and one that leaves the window."
    page = view(file_of(MaskingLab(), tmp_path))
    page.wait_for_selector(".lm-token")
    page.evaluate("() => { document.querySelectorAll('.lm-token')[1].style.marginLeft = '-20px'; }")
    assert page.evaluate(OVERLAPS)
    page.evaluate("() => { document.querySelectorAll('.lm-token')[1].style.cssText = 'margin-left: 4000px'; }")
    assert page.evaluate(OVERLAPS)


def test_masking_page_is_pythons(view, tmp_path):
    "Each question of the menu, each of its controls moved: tokens, answers and weights are those that Python computes."
    lab = MaskingLab(text="Now is the winter of our discontent\nmade glorious summer by this sun of York.")
    page = view(file_of(lab, tmp_path))
    moved = 0
    for k, entry in enumerate(lab.menu):
        page.select_option(".lm-lab select >> nth=0", str(k))
        lab.chosen, lab.values = k, {}
        knobs = page.evaluate("() => [...document.querySelectorAll('.lm-knobs [data-knob]')].map((e) => [e.dataset.knob, e.type, Number(e.min), Number(e.max)])")
        for knob, kind, low, high in [("seed", "number", 0, 14), *knobs]:
            value = (not entry["objective"][knob]) if kind == "checkbox" else round(low + .5 * (high - low), 1) if high <= 1 else int((low + high) / 2)
            put(page, knob, value)
            if knob == "seed": lab.seed = value
            else: lab.values = {**lab.values, knob: value}
            try: b = lab.painted
            except ValueError: assert page.inner_text(".lm-count"); continue
            assert numbers(page, "id") == b.ids[0].tolist(), (entry["name"], knob)
            np.testing.assert_allclose(numbers(page, "weight"), b.weights[0].tolist(), rtol=1e-4)
            asked = (b.weights[0] != 0).tolist()
            assert [v for v, a in zip(numbers(page, "target"), asked, strict=True) if a] == b.targets[0][b.weights[0] != 0].tolist()
            moved += 1
    assert moved > 30 and not page.wrong


def test_rate_only_grows(view, tmp_path):
    "With the slider to the right the hidden tokens only become more; at another seed they are others."
    page = view(file_of(MaskingLab(text=LONG[:200]), tmp_path))
    page.select_option(".lm-lab select >> nth=0", "1")
    hidden = []
    for rate in (.1, .3, .5, .8):
        put(page, "rate", rate)
        hidden.append({t for t, w in enumerate(numbers(page, "weight")) if w})
    assert hidden[0] < hidden[1] < hidden[2] < hidden[3]
    put(page, "rate", .3); put(page, "seed", 1)
    assert {t for t, w in enumerate(numbers(page, "weight")) if w} != hidden[1]


def test_hovering_links(view, tmp_path):
    "Pointing at a token dims exactly what it does not see."
    lab = MaskingLab()
    page = view(file_of(lab, tmp_path))
    page.hover(".lm-token >> nth=5")
    dim = page.evaluate("() => [...document.querySelectorAll('.lm-token')].map((e) => e.classList.contains('lm-unseen'))")
    assert dim == (~lab.painted.sees[0, 5]).tolist()


def test_code_makes_the_batch(view, tmp_path):
    "What `copy as code` gives, pasted and run as it is, is the row that is shown, under every objective of the menu."
    lab = MaskingLab()
    page = view(file_of(lab, tmp_path))
    for k in range(len(lab.menu)):
        page.select_option(".lm-lab select >> nth=0", str(k))
        page.click("text=copy as code")
        code = page.inner_text(".lm-code")
        space: dict = {}
        exec(code, space)  # our own text
        assert space["b"].ids[0].tolist() == numbers(page, "id"), code


@pytest.mark.parametrize("text", ["<!-- <script src=x>", "</script><b>", "a <!-- b --> c", "]]> &amp; \u2028 naïve \U0001f642"])
def test_any_text_in_a_page(view, tmp_path, text):
    "Neither a tag nor a comment in the text makes the page blank, and the row is the text's. Control: unescaped, it would."
    lab = MaskingLab(text=text)
    path = tmp_path / "page.html"
    path.write_text(page_of(lab, f"lab <!-- <script> {text}"), encoding="utf-8")
    page = view(path.as_uri())
    assert numbers(page, "id") == lab.painted.ids[0].tolist() and not page.wrong
    if text.startswith("<!--"):
        raw = path.read_text(encoding="utf-8").replace("\\u003c", "<")
        path.write_text(raw, encoding="utf-8")
        assert view(path.as_uri()).query_selector(".lm-token") is None


def test_what_noise_is_told(view, tmp_path):
    "The share that is expected is right for swapped tokens, not claimed for shaken ones, and only a gap has a gap's weight."
    lab = NoiseLab(text=" ".join(f"word {i}" for i in range(200)))
    page = view(file_of(lab, tmp_path))
    for kind, t in ((0, .4), (1, .4), (2, .2)):
        put(page, "kind", kind); put(page, "t", t)
        said = page.inner_text(".lm-count >> nth=0")
        lab.kind, lab.t = kind, t
        gone = sum(a != b for a, b in zip(lab.noised["ids"], numbers(page, "id"), strict=True))
        assert gone == 0 and ("weight" in said) == (kind == 0) == (lab.noised["weight"] is not None) and ("expected" in said) == (kind < 2)
        if kind < 2:
            changed, may = int(said.split()[0]), int(re.search(r"% of (\d+) expected", said)[1])
            assert abs(changed - may * lab.noised["share"]) < 5 * (may * .25) ** .5


def test_noise_page_is_pythons(view, tmp_path):
    "Three kinds, four schedules, several t and seeds: what is read is what Python computes; the writings can be stepped through."
    lab = NoiseLab()
    page = view(file_of(lab, tmp_path))
    for kind in range(3):
        for schedule in range(4):
            for t, seed in ((0, 1), (.37, 5), (.9, 5)):
                put(page, "kind", kind); put(page, "schedule", schedule); put(page, "t", t); put(page, "seed", seed)
                lab.kind, lab.schedule, lab.t, lab.seed = kind, schedule, float(t), seed
                assert numbers(page, "id") == lab.noised["ids"], (kind, schedule, t)
    w = lab.writings[3]
    put(page, "right", 3)
    for step in (0, 7, max(w["when"])):
        put(page, "step", step)
        shown = numbers(page, "id", ".lm-sides > div:nth-child(2) .lm-tokens")
        assert shown == [i if when <= step else -1 for i, when in zip(w["ids"], w["when"], strict=True)]
    assert not page.wrong


def test_noise_plays(view, tmp_path):
    "The play buttons move t and the step by themselves, and stop when pressed again."
    page = view(file_of(NoiseLab(), tmp_path))
    page.click("text=play noise")
    page.wait_for_function("() => Number(document.querySelector('[data-knob=t]').value) > .5")
    page.click("text=pause")
    page.click("text=play writing")
    page.wait_for_function("() => Number(document.querySelector('[data-knob=step]').value) > 3")
    assert not page.wrong


def test_loss_page_is_pythons(view, tmp_path):
    "Each reader, several temperatures and smoothings: each token's cost is PyTorch's; a click lists what was expected."
    lab = LossLab()
    page = view(file_of(lab, tmp_path))
    for k, run in enumerate(lab.runs):
        put(page, "left", k)
        for heat, smooth in ((1, 0), (.5, .1), (2, .3)):
            put(page, "temperature", heat); put(page, "smoothing", smooth)
            np.testing.assert_allclose(numbers(page, "cost"), costs(run, heat, smooth), rtol=1e-6, atol=1e-9)
    page.click(".lm-cost >> nth=6")
    ps = page.evaluate("() => [...document.querySelector('.lm-habits').querySelectorAll('[data-p]')].map((e) => Number(e.dataset.p))")
    assert 8 <= len(ps) <= 9 and ps[:8] == sorted(ps[:8], reverse=True) and sum(ps) <= 1
    page.keyboard.press("Tab"); page.keyboard.press("Enter")
    assert page.evaluate("() => document.querySelector('.lm-cost.lm-here').dataset.t") == "7"


BOOK = """
import json
import ipywidgets as w
from lmtrain import Loader, examples, train_bpe
from lmtrain.labs.masking import MaskingLab
from lmtrain.objectives.masked import MLM
from pydoc_data.topics import topics
tok = train_bpe(list(topics.values()), 400)
loader = Loader(examples(list(topics.values())[:40], tok, 48), MLM(tok.mask_token_id, range(7, 400)), 4, 48, seed=3)
lab = MaskingLab(tok, loader=loader, steps=3)
echo = w.HTML()
def tell(_=None): echo.value = f"<code class='echo'>{json.dumps([lab.step, lab.seed, lab.values, lab.painted.ids[0].tolist()])}</code>"
lab.observe(tell); tell()
truth = w.HTML("<code class='truth'>" + json.dumps([b.ids[0].tolist() for _, b in zip(range(3), loader)]) + "</code>")
w.VBox([lab, echo, truth])
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "A notebook whose cell shows the masking lab over a loader, and says what Python knows."
    from lmtrain.labs.serve import notebook
    nb = json.loads(notebook("masking"))
    nb["cells"][1]["source"] = BOOK
    path = tmp_path_factory.mktemp("book") / "book.ipynb"
    path.write_text(json.dumps(nb))
    return path


def free() -> int:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


def told(page) -> list: return json.loads(page.inner_text(".echo"))


def check_host(page, host: str) -> None:
    "Every batch of the loader, then a slider: what is seen is what Python computed, in a host with a kernel."
    page.wait_for_selector(".lm-token", timeout=120_000)
    truth = json.loads(page.inner_text(".truth"))
    for step in range(3):
        page.select_option(".lm-lab select >> nth=1", str(step))
        page.wait_for_function("(s) => JSON.parse(document.querySelector('.echo').innerText)[0] === s", arg=step)
        assert numbers(page, "id") == truth[step] == told(page)[3]
    put(page, "rate", .8)
    page.wait_for_function("() => JSON.parse(document.querySelector('.echo').innerText)[2].rate === .8")
    assert numbers(page, "id") == told(page)[3] != truth[2]
    page.select_option(".lm-lab select >> nth=1", "-1")
    page.fill(".lm-lab textarea", "A text of my own")
    page.wait_for_function("() => JSON.parse(document.querySelector('.echo').innerText)[0] === -1")
    page.wait_for_timeout(500)
    assert numbers(page, "id") == told(page)[3]
    keep(page, f"masking-{host}")


def test_static_page_over_a_loader(view, tmp_path):
    "The page without a kernel paints the loader's batches, token for token."
    from pydoc_data.topics import topics
    tok = train_bpe(list(topics.values()), 400)
    items = examples(list(topics.values())[:40], tok, 48)
    for o in (MLM(tok.mask_token_id, range(7, 400)), CLM()):
        page = view(file_of(MaskingLab(tok, loader=Loader(items, o, 4, 48, seed=3), steps=3), tmp_path))
        for step, b in zip(range(3), Loader(items, o, 4, 48, seed=3), strict=False):
            page.select_option(".lm-lab select >> nth=1", str(step))
            for r in range(len(b)):
                put(page, "row", r)
                assert numbers(page, "id") == b.ids[r].tolist()
                np.testing.assert_allclose(numbers(page, "weight"), b.weights[r])


def run_all(page) -> None:
    "Run All Cells; again if the kernel was not listening yet."
    for _ in range(5):
        page.click('div.lm-MenuBar-itemLabel:has-text("Run")')
        page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        try: return page.wait_for_selector(".lm-token", timeout=20_000) and None
        except Exception: page.keyboard.press("Escape")
    raise AssertionError("the notebook did not run")


def opened(words: list[str], folder: Path, **env: str) -> tuple[subprocess.Popen, str, str]:
    "A process of `lmtrain lab`, the address of its server, and its token, as their owner reads them."
    port = free()
    log = folder / "log"
    line = [sys.executable, "-m", "lmtrain", "lab", *words, "--no-browser", f"--port={port}"]
    with log.open("w") as out: server = subprocess.Popen(line, stdout=out, stderr=out, start_new_session=True, cwd=folder,
                                                            env={**os.environ, **env})
    for _ in range(300):
        try: urlopen(f"http://127.0.0.1:{port}/api", timeout=2).read(1); break
        except OSError as e:
            if getattr(e, "code", 0) in (302, 401, 403, 404, 405): break
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(.2)
    page = Path(re.search(r"Open (\S+) in a browser", log.read_text())[1])
    return server, f"http://127.0.0.1:{port}", re.search(r"token=([\w-]+)", page.read_text())[1]


def ended(server: subprocess.Popen) -> None:
    server.terminate()
    try: server.wait(20)
    finally: server.kill()


def test_voila(book, view, tmp_path):
    "Voila: the loader's batches, a slider, a text; nobody is asked but the host, and by the host for its icons."
    (tmp_path / "lmtrain-notebooks").mkdir(); shutil.copy(book, tmp_path / "lmtrain-notebooks" / "masking.ipynb")
    server, address, token = opened(["masking", "--voila"], tmp_path)
    try:
        page = view(f"{address}/?token={token}")
        check_host(page, "voila")
        others = [u for u in page.asked if "127.0.0.1" not in u and not u.startswith(("data:", "blob:"))]
        assert all("fontawesome" in u for u in others), others  # Voila's own theme asks for it; the lab asks nobody
    finally: ended(server)


def test_jupyterlab(book, view, tmp_path):
    "JupyterLab: the same, after Run All."
    (tmp_path / "lmtrain-notebooks").mkdir(); shutil.copy(book, tmp_path / "lmtrain-notebooks" / "masking.ipynb")
    server, address, token = opened(["masking"], tmp_path)
    try:
        page = view(f"{address}/lab/tree/masking.ipynb?token={token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached", timeout=60_000)
        run_all(page)
        check_host(page, "jupyterlab")
        assert [u for u in page.asked if "127.0.0.1" not in u and not u.startswith(("data:", "blob:"))] == []
    finally: ended(server)


def as_another_user(*words) -> str:
    "What a command says when user 65534 runs it."
    return subprocess.run([*map(str, words)], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/").stdout


def asked(address: str, method: str = "GET", **headers: str) -> int:
    "The status of an answer; headers are given with _ for -."
    request = Request(address, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try: return urlopen(request, timeout=20).status
    except HTTPError as e: return e.code


@pytest.mark.parametrize("words", [["masking"], ["masking", "--voila"]], ids=["jupyterlab", "voila"])
def test_another_user_finds_no_token(words, tmp_path):
    """Arguments, environment and files, as a second user of the machine sees them, hold no token, and the log holds none;
    without one the server gives no kernel. Control: the same search, as the owner, finds it, and with it there is one."""
    assert os.geteuid() == 0, "a second user can be tried by root only"
    for folder in [tmp_path, *tmp_path.parents][:3]: folder.chmod(0o755)
    (tmp_path / "runtime").mkdir(mode=0o755)
    server, address, token = opened(words, tmp_path, JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"))
    try:
        home = re.search(r"Open (\S+)/open.html", (tmp_path / "log").read_text())[1]
        seen = as_another_user("sh", "-c", f"cat /proc/{server.pid}/cmdline /proc/{server.pid}/environ; cat {home}/*; cat {tmp_path}/runtime/*; "
                               f"cat {tmp_path}/log")
        assert "lmtrain" in seen and token not in seen and token not in (tmp_path / "log").read_text()
        assert token in subprocess.run(["sh", "-c", f"cat {home}/*"], capture_output=True, text=True).stdout
        if "--voila" in words:
            assert "/login" in urlopen(f"{address}/", timeout=20).url and asked(f"{address}/api/kernels/{'0' * 8}-0000-0000-0000-{'0' * 12}/channels") == 403
            assert "/login" not in urlopen(f"{address}/?token={token}", timeout=60).url
            return
        assert asked(f"{address}/api/kernels", "POST") == 403
        assert asked(f"{address}/api/kernels", "POST", Authorization=f"token {token}") == 201
    finally: ended(server)


@pytest.mark.parametrize("words", [["masking"], ["masking", "--voila"]], ids=["jupyterlab", "voila"])
def test_no_configuration_opens_the_door(words, tmp_path):
    "A configuration that wants no token, and one of another server in the environment: the token is ours all the same."
    (tmp_path / "jupyter_server_config.py").write_text("c.IdentityProvider.token = ''\nc.ServerApp.token = ''\nc.Voila.token = ''\nc.ServerApp.ip = '0.0.0.0'\n")
    (tmp_path / "jupyter_config.py").write_text("c.IdentityProvider.token = ''\nc.Voila.token = ''\nc.Voila.ip = '0.0.0.0'\n")
    server, address, token = opened(words, tmp_path, JUPYTER_CONFIG_DIR=str(tmp_path), JUPYTER_TOKEN="known")
    try:
        assert f"00000000:{int(address.rpartition(':')[2]):04X}" not in Path("/proc/net/tcp").read_text()
        if "--voila" in words:
            for more in ("", "?token=known"): assert "/login" in urlopen(f"{address}/{more}", timeout=60).url
            assert "/login" not in urlopen(f"{address}/?token={token}", timeout=60).url
            return
        for key, status in (("", 403), ("known", 403), (token, 201)): assert asked(f"{address}/api/kernels", "POST", Authorization=f"token {key}") == status
    finally: ended(server)


def test_other_machines_and_other_pages_are_refused(tmp_path):
    "The server listens on this machine alone; a page from elsewhere that has the reader's cookie gets nothing. Control: a page of its own does."
    server, address, token = opened([], tmp_path)
    try:
        port = int(address.rpartition(":")[2])
        listening = {line.split()[1] for f in ("tcp", "tcp6") for line in Path(f"/proc/net/{f}").read_text().splitlines()[1:] if line.split()[3] == "0A"}
        assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening and f"{'0' * 32}:{port:04X}" not in listening
        jar = CookieJar()
        browser = build_opener(HTTPCookieProcessor(jar))
        browser.open(f"{address}/lab?token={token}", timeout=20).read()
        cookies, xsrf = "; ".join(f"{c.name}={c.value}" for c in jar), next(c.value for c in jar if c.name == "_xsrf")
        ask = lambda origin: asked(f"{address}/api/kernels", "POST", Cookie=cookies, X_XSRFToken=xsrf, Origin=origin, Host=f"127.0.0.1:{port}")
        assert ask("http://elsewhere.example") in (403, 404) and ask(address) == 201
    finally: ended(server)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_the_server_ends_with_its_command(name, tmp_path):
    "Server and kernels are gone soon after the command is; what held the token as well, but for SIGKILL, which nobody sees."
    server, address, token = opened([], tmp_path)
    assert asked(f"{address}/api/kernels", "POST", Authorization=f"token {token}") == 201
    kernels = lambda: [p for p in Path("/proc").glob("[0-9]*") if f"PPid:\t{server.pid}\n" in status(p) and "ipykernel" in command_line(p)]
    def status(p): return p.joinpath("status").read_text() if p.exists() else ""
    def command_line(p): return p.joinpath("cmdline").read_text() if p.exists() else ""
    for _ in range(100):
        if found := kernels(): break
        time.sleep(.1)
    assert found
    time.sleep(2)  # a kernel that is still starting does not watch its parent yet
    server.send_signal(getattr(signal, name)); server.wait(20)
    for _ in range(150):
        if not any("ipykernel" in command_line(p) for p in found): break
        time.sleep(.1)
    assert not any("ipykernel" in command_line(p) for p in found)
    with pytest.raises(OSError): urlopen(f"{address}/api", timeout=2)
    home = Path(re.search(r"Open (\S+)/open.html", (tmp_path / "log").read_text())[1])
    assert home.exists() == (name == "SIGKILL")
    shutil.rmtree(home, ignore_errors=True)


def test_learning_in_a_kernel(view, tmp_path):
    "The loss lab in Voila: play, pause, step and reset; the curve grows, falls and begins again."
    from lmtrain.labs.serve import notebook
    nb = json.loads(notebook("loss"))
    nb["cells"][1]["source"] = """
import torch
from lmtrain import CLM, Loader, Size, Trainer, Transformer, examples, train_bpe
from lmtrain.labs.loss import LossLab
from pydoc_data.topics import topics
torch.manual_seed(0); torch.set_num_threads(1)
tok = train_bpe(list(topics.values()), 400)
rows = examples(list(topics.values())[:60], tok, 48)
model = Transformer(Size(vocab=len(tok), dim=32, heads=2, layers=1, length=48))
LossLab(trainer=Trainer(model, CLM(), Loader(rows[20:], CLM(), 8, 48), lr=3e-3, steps=10**4), held=rows[:20], tok=tok)
"""
    (tmp_path / "lmtrain-notebooks").mkdir()
    (tmp_path / "lmtrain-notebooks" / "loss.ipynb").write_text(json.dumps(nb))
    server, address, token = opened(["loss", "--voila"], tmp_path)
    try:
        page = view(f"{address}/?token={token}")
        page.wait_for_selector("[data-knob=play]", timeout=120_000)
        steps = "() => Number(document.querySelector('[data-knob=play]').closest('.lm-lab').innerText.match(/(\\d+) steps: loss/)[1])"
        page.click("[data-knob=play]")
        page.wait_for_function(f"() => ({steps})() > 30", timeout=60_000)
        page.click("[data-knob=play]")
        page.wait_for_timeout(1000)
        now = page.evaluate(steps)
        page.click("[data-knob=step]")
        page.wait_for_function(f"(n) => ({steps})() === n + 1", arg=now)
        losses = [float(v) for v in page.inner_text(".lm-lab").split(" steps: loss ")[1].replace(",", " ").split()[:1]]
        assert losses[0] < np.log(len(train_bpe(["a"], 400)) + 400)
        keep(page, "loss-voila")
        page.click("[data-knob=reset]")
        page.wait_for_function(f"() => ({steps})() === 0")
    finally: ended(server)
