import * as core from "./core.js";
import * as ui from "./ui.js";

// The masking lab: text or a loader's batches above, what an objective makes of them below.

const KNOBS = {
  rate: ["rate: how much is hidden", 0, 1, 0.01], keep: ["keep: of the hidden, these stay readable", 0, 1, 0.01],
  swap: ["swap: of the hidden, these become another token", 0, 1, 0.01], t: ["t: how much is hidden", 0.01, 1, 0.01],
  cut: ["cut: the longest prefix, a share of the text", 0.05, 1, 0.01], p: ["p: the larger, the shorter the spans", 0.05, 0.95, 0.05],
  longest: ["longest span", 1, 20, 1], mean: ["mean length of a span", 1, 10, 0.5], block: ["tokens in a block", 1, 32, 1],
};
const SWITCHES = { words: "whole words", shifted: "labels one position early", unbiased: "any token may be hidden" };
const HOME = { CLM: "objective", PrefixLM: "objective", MLM: "objectives.masked", Spans: "objectives.masked", Mix: "objectives.mixed",
  Diffusion: "objectives.diffusion", Stopped: "objectives.diffusion", Uniform: "objectives.diffusion",
  BlockDiffusion: "objectives.diffusion", Schedule: "objectives.diffusion", Cosine: "objectives.diffusion",
  Polynomial: "objectives.diffusion", ExactK: "objectives.diffusion", Stepped: "objectives.diffusion" };

const { h } = ui;

/** The objective that is chosen, with what the sliders changed. */
const objectiveOf = (model) => ({ ...model.get("menu")[model.get("chosen")].objective, ...model.get("values") });

/** The row before the objective, and its noise: of the text, or of a batch. */
function before(model, tok) {
  const step = model.get("step"), noise = { seed: model.get("seed"), epoch: model.get("epoch") };
  if (step >= 0) {
    const batch = model.get("batches")[step];
    return { row: batch.rows[Math.min(model.get("row"), batch.rows.length - 1)], noise: { ...noise, epoch: batch.epoch } };
  }
  return { row: core.textRow(tok, model.get("text")), noise };
}

/** Inputs, labels and loss weights: the row after the objective. Throws a sentence if it cannot be. */
function after(model, tok) {
  const o = objectiveOf(model), { row, noise } = before(model, tok);
  if (o.words && !row.extra.word) throw new Error("whole words need a column `word`: make the examples with words_of");
  if (o.kind !== "SpanCorrupt" && o.kind !== "UL2") return core.corrupt(o, row, noise);
  if (Math.max(...row.doc) > 1) throw new Error("this row holds several documents: T5 and UL2 change one at a time, before it is packed");
  const real = row.doc.map(Boolean), of = (c) => c.filter((_, t) => real[t]);
  const e = { ids: of(row.clean), answer: of(row.answer), index: row.index[0], tokens: {} };
  const changed = o.kind === "UL2" ? core.ul2(e, noise, o.sentinels, o.modes) : core.spanCorrupt(e, noise, o.sentinels, o);
  return core.corrupt({ kind: "PrefixLM" }, core.lay([changed], changed.ids.length), noise);
}

/** An objective as Python. */
function code(o) {
  const value = (v) => v === true ? "True" : v === false ? "False" : v === null || v === undefined ? "None" : Array.isArray(v)
    ? `range(${v[0]}, ${v[1]})` : v.ids ? `torch.tensor(${JSON.stringify(v.ids)})` : typeof v === "object" ? code(v) : String(v);
  if (o.kind === "Mix") return `Mix((${o.probs.join(", ")}), ${Object.entries(o.parts).map(([n, p]) => `${n}=${code(p)}`).join(", ")})`;
  return `${o.kind}(${Object.entries(o).filter(([n]) => n !== "kind").map(([n, v]) => `${n}=${value(v)}`).join(", ")})`;
}

/** The lines that make the batch that is painted. */
export function asCode(model) {
  const o = objectiveOf(model), kinds = new Set(JSON.stringify(o).match(/"kind":"(\w+)"/g).map((s) => s.slice(8, -1)));
  const lines = ["import torch", "from lmtrain.batch import Noise, collate"], seed = model.get("seed"), step = model.get("step");
  for (const k of kinds) if (HOME[k]) lines.push(`from lmtrain.${HOME[k]} import ${k}`);
  if (o.kind === "SpanCorrupt") lines.push("from lmtrain.objective import PrefixLM", "from lmtrain.objectives.masked import span_corrupt");
  if (o.kind === "UL2") lines.push("from lmtrain.objective import PrefixLM", "from lmtrain.objectives.mixed import ul2");
  const python = (v) => (v === true ? "True" : v === false ? "False" : v), noise = `Noise(${seed}, ${model.get("epoch")})`;
  if (step >= 0) return [...lines, "from lmtrain.loader import Loader", "",
    `objective = ${code(o)}`, `loader = Loader(rows, objective, ..., seed=${seed})  # the rows and sizes of your loader`,
    `b = loader.make(next(job for k, (_, job) in enumerate(loader.jobs()) if k == ${step}))`].join("\n");
  const text = JSON.stringify(model.get("text")), own = ["from lmtrain.labs.masking import MaskingLab", ""];
  const tok = "tok = MaskingLab().tok  # or the tokenizer that you gave the lab";
  if (HOME[o.kind]) return [...lines, "from lmtrain.objectives.masked import words_of", ...own, tok,
    `b = ${code(o)}.corrupt(collate([words_of(${text}, tok)]), ${noise})`].join("\n");
  const marks = o.kind === "UL2" ? `sentinels, modes = ${JSON.stringify(o.sentinels)}, ${JSON.stringify(o.modes)}` : `sentinels = ${JSON.stringify(o.sentinels)}`;
  const knobs = o.kind === "UL2" ? "modes" : `rate=${o.rate}, mean=${o.mean}, unbiased=${python(o.unbiased)}`;
  return [...lines, "from lmtrain.text import examples", ...own, tok, marks, `e = next(iter(examples([${text}], tok, T=1000)))`,
    `b = PrefixLM().corrupt(collate([${o.kind === "UL2" ? "ul2" : "span_corrupt"}(e, ${noise}, sentinels, ${knobs})]), ${noise})`].join("\n");
}

/** A slider or a switch for each field that has one. */
function controls(model, box) {
  const o = objectiveOf(model), change = (name, value) => { model.set("values", { ...model.get("values"), [name]: value }); model.save_changes(); };
  const parts = [];
  for (const [name, [label, low, high, step]] of Object.entries(KNOBS)) {
    if (typeof o[name] !== "number") continue;
    const out = h("output", {}, String(o[name]));
    const input = h("input", { type: "range", min: low, max: high, step, value: o[name], "aria-label": label, "data-knob": name,
      oninput: (e) => { out.textContent = e.target.value; change(name, Number(e.target.value)); } });
    parts.push(h("label", {}, h("span", {}, label), input, out));
  }
  for (const [name, label] of Object.entries(SWITCHES)) {
    if (typeof o[name] !== "boolean") continue;
    parts.push(h("label", { class: "lm-switch" }, h("input", { type: "checkbox", checked: o[name], "data-knob": name,
      onchange: (e) => change(name, e.target.checked) }), label));
  }
  box.replaceChildren(...parts);
}

const WAYS = { "": "read as it is", mask: "hidden", swap: "replaced by another token", keep: "in the loss, but left as it is" };

/** One token's column: input, label, loss weight. */
function cell(row, t, tok) {
  const inLoss = row.weights[t] !== 0, changed = row.ids[t] !== row.clean[t], w = row.weights[t];
  const way = !changed ? (inLoss && row.order.every((o) => o === 0) && row.targets[t] === row.ids[t] ? "keep" : "") :
    tok.specials["<|mask|>"] === row.ids[t] ? "mask" : "swap";
  const reads = way === "mask" ? "▒▒" : tok.shown(row.ids[t]);
  const tip = `${t}: reads ${tok.shown(row.ids[t])} (${WAYS[way]})${inLoss ? `, label ${tok.shown(row.targets[t])}, weight ${w.toPrecision(3)}` : ", not in the loss"}`;
  const weight = !inLoss ? "·" : w === 1 ? "1" : w >= 100 ? w.toFixed(0) : String(Number(w.toPrecision(2)));
  return h("div", { class: `lm-token lm-${way || "clean"}${inLoss ? " lm-loss" : ""}${row.doc[t] ? "" : " lm-pad"}`, title: tip, "data-t": t,
    "data-id": row.ids[t], "data-target": row.targets[t], "data-weight": w }, h("b", {}, reads), h("i", {}, inLoss ? tok.shown(row.targets[t]) : "\u00a0"),
    h("small", {}, weight));
}

/** The attention mask: a point for each pair, on a canvas. */
function matrix(canvas, row, active) {
  const T = row.ids.length, may = core.sees(row), scale = Math.max(1, Math.floor(320 / T)), c = canvas.getContext("2d");
  canvas.width = canvas.height = T * scale;
  const [on, off, hot] = ["--lm-blue", "--lm-faint", "--lm-orange"].map((n) => getComputedStyle(canvas).getPropertyValue(n));
  let pairs = 0;
  const seen = new Uint8Array(T * T);
  for (let i = 0; i < T; i++) if (row.doc[i]) for (let j = 0; j < T; j++) if (may(i, j)) { seen[i * T + j] = 1; pairs++; }
  c.fillStyle = off; c.fillRect(0, 0, T * scale, T * scale); c.fillStyle = on;
  const edge = scale > 2 ? 1 : 0;
  for (let i = 0; i < T; i++) for (let j = 0, from = 0; j <= T; j++) { // runs of pairs, or one by one where a grid is drawn
    if (j < T && seen[i * T + j] && !edge) continue;
    if (edge && j < T && seen[i * T + j]) c.fillRect(j * scale, i * scale, scale - 1, scale - 1);
    if (!edge && j > from) c.fillRect(from * scale, i * scale, (j - from) * scale, scale);
    from = j + 1;
  }
  if (active >= 0) { c.globalAlpha = 0.45; c.fillStyle = hot; c.fillRect(0, active * scale, T * scale, scale); c.globalAlpha = 1; }
  canvas.setAttribute("aria-label", `Attention mask: ${pairs} of ${T * T} pairs. A row is a token that attends, a column one that is attended to.`);
  return pairs;
}

/** Everything below the controls. */
function paint(model, tok, view) {
  let row;
  try { row = after(model, tok); } catch (e) { view.count.textContent = e.message; view.tokens.replaceChildren(); view.row = null; return; }
  view.row = row;
  const inLoss = row.weights.filter((w) => w !== 0).length, real = row.doc.filter(Boolean).length;
  view.count.textContent = `${inLoss} of ${real} tokens in the loss. A uniform guess costs ln ${tok.size} = ${Math.log(tok.size).toFixed(1)} nats for each.`;
  view.tokens.replaceChildren(...row.ids.map((_, t) => cell(row, t, tok)));
  view.pairs = matrix(view.canvas, row, -1);
}

/** A token is pointed at: show what it sees. */
function point(view, t) {
  if (!view.row || t === view.active) return;
  view.active = t;
  const may = core.sees(view.row);
  for (const e of view.tokens.children) {
    const j = Number(e.dataset.t);
    e.classList.toggle("lm-here", j === t);
    e.classList.toggle("lm-unseen", t >= 0 && !(view.row.doc[t] && may(t, j)));
  }
  matrix(view.canvas, view.row, t);
}

function render({ model, el }) {
  const tok = core.tokenizer(JSON.parse(model.get("tokenizer"))), menu = model.get("menu"), batches = model.get("batches");
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const view = { active: -1, count: h("p", { class: "lm-count", "aria-live": "polite" }), tokens: h("div", { class: "lm-tokens", role: "group", "aria-label": "Tokens: input, label, loss weight" }),
    canvas: h("canvas", { role: "img", class: "lm-matrix" }) };
  const about = h("p", { class: "lm-about" }), knobs = h("div", { class: "lm-knobs" });
  const select = h("select", { "aria-label": "Objective", onchange: (e) => { model.set("values", {}); put("chosen", Number(e.target.value)); } },
    ...menu.map((m, n) => h("option", { value: n, selected: n === model.get("chosen") }, m.name)));
  const text = h("textarea", { rows: 2, "aria-label": "Your text", spellcheck: "false", oninput: (e) => put("text", e.target.value) });
  text.value = model.get("text");
  const number = (name, label) => h("label", {}, label, h("input", { type: "number", min: 0, step: 1, value: model.get(name), "data-knob": name,
    oninput: (e) => put(name, Math.max(0, Math.floor(Number(e.target.value) || 0))) }));
  const source = h("select", { "aria-label": "Text or batch", onchange: (e) => { model.set("row", 0); put("step", Number(e.target.value)); } },
    h("option", { value: -1 }, "my text"), ...batches.map((b, k) => h("option", { value: k, selected: k === model.get("step") }, `batch ${k} of the loader (epoch ${b.epoch})`)));
  const rowOf = number("row", "row ");
  const copied = h("span", { class: "lm-copied", "aria-live": "polite" }), area = h("pre", { class: "lm-code", hidden: true });
  const copy = h("button", { type: "button", onclick: async () => {
    area.textContent = asCode(model); area.hidden = false;
    try { await navigator.clipboard.writeText(area.textContent); copied.textContent = "copied"; } catch { copied.textContent = "select and copy"; }
  } }, "copy as code");
  view.tokens.addEventListener("pointerover", (e) => point(view, Number(e.target.closest(".lm-token")?.dataset.t ?? -1)));
  view.tokens.addEventListener("pointerleave", () => point(view, -1));
  view.canvas.addEventListener("pointermove", (e) => {
    const box = view.canvas.getBoundingClientRect();
    point(view, Math.min(view.row.ids.length - 1, Math.floor((e.clientY - box.top) / box.height * view.row.ids.length)));
  });
  view.canvas.addEventListener("pointerleave", () => point(view, -1));
  el.classList.add("lm-lab");
  el.append(h("div", { class: "lm-bar" }, select, ...(batches.length ? [source, rowOf] : []), number("seed", "seed "), number("epoch", "epoch "), copy, copied),
    text, about, knobs, view.count, h("div", { class: "lm-main" }, h("div", {}, h("p", { class: "lm-legend" },
      h("b", {}, "input"), ", ", h("i", {}, "label"), ", ", h("small", {}, "loss weight"), " — ▒▒ hidden, ",
      h("span", { class: "lm-key lm-swap" }, "replaced"), ", ", h("span", { class: "lm-key lm-keep" }, "left as it is")), view.tokens), view.canvas), area);
  const all = () => {
    about.textContent = menu[model.get("chosen")].about;
    text.hidden = model.get("step") >= 0; rowOf.hidden = model.get("step") < 0;
    area.hidden = true; copied.textContent = ""; view.active = -1;
    paint(model, tok, view);
  };
  model.on("change:chosen", () => { select.value = model.get("chosen"); controls(model, knobs); all(); });
  for (const name of ["values", "text", "seed", "epoch", "step", "row"]) model.on(`change:${name}`, all);
  controls(model, knobs);
  all();
  requestAnimationFrame(() => { if (view.row) matrix(view.canvas, view.row, -1); }); // its colours are known once it is in the page
  return () => el.replaceChildren();
}

export default { render };
