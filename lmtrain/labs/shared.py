"What the labs share: one JavaScript module from two files, objectives as plain JSON, and a page that needs no kernel."
import json
import re
from dataclasses import fields, is_dataclass
from functools import cache
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import anywidget

STATIC = Path(__file__).parent / "static"


@cache
def source(name: str) -> str:
    "A file of `static/`."
    return (STATIC / name).read_text(encoding="utf-8")


@cache
def esm(name: str) -> str:
    """A lab's JavaScript as one ES module, with core.js and ui.js inside it as the objects `core` and `ui`.

    One text, because a page that is opened from a disk may not import another file, and a widget is sent as one.
    """
    return inner("core") + inner("ui") + re.sub(r"^import .*\n", "", source(f"{name}.js"), flags=re.M)


def inner(name: str) -> str:
    "A module of functions as an object."
    text = source(f"{name}.js")
    names = re.findall(r"^export (?:const|function) (\w+)", text, re.M)
    inside = re.sub(r"^export ", "", text, flags=re.M)
    return f"const {name} = (() => {{\n{inside}\nreturn {{ {', '.join(names)} }};\n}})();\n\n"


def plain(value: Any) -> Any:
    "A field of an objective as JSON; a rate that changes with the epochs as that of epoch 0."
    if isinstance(value, range): return [value.start, value.stop]
    if hasattr(value, "tolist"): return {"ids": value.tolist()}  # token numbers that are no range
    if is_dataclass(value) and not callable(value): return described(value)
    return value(0) if callable(value) else value


def described(objective: Any) -> dict:
    "An objective, or a schedule, as `core.js` reads it."
    kind = {"kind": type(objective).__name__}
    if hasattr(objective, "parts"):
        return kind | {"probs": list(objective.probs), "parts": {n: described(o) for n, o in objective.parts.items()}}
    return kind | {f.name: plain(getattr(objective, f.name)) for f in fields(objective)}


def _value(d: dict) -> Any:
    if "ids" not in d: return built(d)
    import torch
    return torch.tensor(d["ids"])


HOMES = "objective", "objectives.masked", "objectives.mixed", "objectives.diffusion"


def built(d: dict) -> Any:
    "The objective, or schedule, that was described. Raises ValueError for a kind that is none."
    found = (getattr(import_module(f"lmtrain.{home}"), d["kind"], None) for home in HOMES)
    kind = next((k for k in found if k), None)
    if kind is None: raise ValueError(f"{d['kind']!r} is no objective that a lab knows")
    if "parts" in d: return kind(d["probs"], **{n: built(o) for n, o in d["parts"].items()})
    value = lambda v: _value(v) if isinstance(v, dict) else range(*v) if isinstance(v, list) else v
    return kind(**{n: value(v) for n, v in d.items() if n != "kind"})


class Lab(anywidget.AnyWidget):
    "A widget whose state is JSON, so that a page without a kernel can show it too."
    name = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls): cls._esm, cls._css = esm(cls.name), source("lab.css")  # not in classes made by traitlets

    @property
    def state(self) -> dict:
        "What the JavaScript is given."
        not_ours = {"layout", "tabbable", "tooltip", "comm"}
        own = [n for n in self.trait_names(sync=True) if not n.startswith("_") and n not in not_ours]
        return {n: getattr(self, n) for n in own}

    @property
    def tok(self) -> Any:
        "The lab's tokenizer as Python knows it."
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
        from lmtrain.text import SPECIALS
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(self.tokenizer), **SPECIALS)

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        data, *rest = bundle if isinstance(bundle, tuple) else (bundle,)
        data = {**(data or {}), "text/html": self.picture()}
        return (data, *rest) if rest else data

    def picture(self) -> str:
        "What a saved notebook shows where the widget was."
        raise NotImplementedError


SHIM = """
const state = STATE, heard = {};
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; for (const f of heard["change:" + name] ?? []) f(); },
  save_changes: () => {}, on: (event, f) => { (heard[event] ??= []).push(f); }, off: () => {}, send: () => {},
  live: false,
};
lab.render({ model, el: document.getElementById("lab") });
"""


def page(lab: Lab, title: str) -> str:
    "A lab as one HTML page: no kernel, no network, no other file."
    state = json.dumps(lab.state).replace("<", "\\u003c")  # neither a tag nor a comment can begin inside the script
    code = esm(lab.name).replace("export default", "const lab =").replace("</script", "<\\/script")
    return (f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
            "<meta name='viewport' content='width=device-width'>"
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'; "
            "style-src 'unsafe-inline'; img-src data:\">"
            f"<style>body{{margin:1rem auto;max-width:100rem;padding:0 1rem}}\n{source('lab.css')}</style>"
            f"<div id='lab'></div><script type='module'>\n{code}\n{SHIM.replace('STATE', state)}</script></html>\n")
