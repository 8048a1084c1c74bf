"""How long does a lab take to draw itself anew at 256 tokens? `python -m benchmarks.labs`; needs Chromium and playwright.

From a slider's event to the finished layout, in milliseconds: median and 90th percentile of 60 moves.
"""
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from lmtrain.labs import small
from lmtrain.labs.loss import LossLab
from lmtrain.labs.masking import MaskingLab
from lmtrain.labs.noise import NoiseLab
from lmtrain.labs.shared import Lab, page

TEXT = "The king is not himself, but basely led by flatterers. " * 20
MOVE = """([knob, values]) => values.map((v) => {
  const e = document.querySelector(`[data-knob="${knob}"]`), began = performance.now();
  e.value = v; e.dispatchEvent(new Event("input", {bubbles: true})); e.dispatchEvent(new Event("change", {bubbles: true}));
  document.body.getBoundingClientRect();
  return performance.now() - began; })"""


def at_256(lab: Lab) -> Lab:
    "The lab with a text of 256 tokens."
    words = TEXT.split(" ")
    if isinstance(lab, LossLab):
        dice = np.random.default_rng(0)
        lab.runs = [small.run(f"reader {k}", "", dice.integers(0, lab.size, 256).tolist(), dice.normal(size=(256, lab.size)))
                    for k in range(2)]
        return lab
    while len(lab.tok(" ".join(words))["input_ids"]) > 254: words.pop()
    lab.text = " ".join(words)
    return lab


def main() -> None:
    moves = [("masking, MLM", MaskingLab(), "rate", 1), ("noise, hidden", NoiseLab(), "t", 1), ("loss", LossLab(), "temperature", 2)]
    shaken = NoiseLab()
    shaken.kind = 2
    moves.append(("noise, shaken", shaken, "t", 1))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for name, lab, knob, most in moves:
            Path(folder, "lab.html").write_text(page(at_256(lab), name), encoding="utf-8")
            view = browser.new_page(viewport={"width": 1200, "height": 900})
            view.goto(Path(folder, "lab.html").as_uri())
            view.wait_for_selector(".lm-tokens > *")
            times = view.evaluate(MOVE, [knob, np.linspace(.2, most, 60).round(2).tolist()])
            print(json.dumps({"lab": name, "median": round(float(np.median(times)), 1), "p90": round(float(np.quantile(times, .9)), 1)}))
        browser.close()


if __name__ == "__main__": main()
