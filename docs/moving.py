"Makes docs/labs.gif, the README's moving picture, from the masking lab in Chromium: `python docs/moving.py`."
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from lmtrain.labs.masking import MaskingLab
from lmtrain.labs.shared import page

TEXT = "Full fathom five thy father lies; of his bones are coral made; those are pearls that were his eyes."
SCENES = [(1, "rate", [k / 20 for k in range(1, 20)]), (5, "cut", [k / 10 for k in range(1, 11)]), (9, "block", [1, 2, 4, 8, 16])]


def main() -> None:
    "A few sliders, moved through their values."
    frames = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        Path(folder, "lab.html").write_text(page(MaskingLab(text=TEXT), "lab"), encoding="utf-8")
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1000, "height": 640})
        view.goto(Path(folder, "lab.html").as_uri())
        for question, knob, values in SCENES:
            view.select_option("select >> nth=0", str(question))
            for v in values:
                view.evaluate("""([k, v]) => { const e = document.querySelector(`[data-knob="${k}"]`);
                  e.value = v; e.dispatchEvent(new Event("input")); }""", [knob, v])
                frames.append(Image.open(io.BytesIO(view.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE, colors=48))
        browser.close()
    frames[0].save(Path(__file__).parent / "labs.gif", save_all=True, append_images=frames[1:], duration=220, loop=0, optimize=True)


if __name__ == "__main__": main()
