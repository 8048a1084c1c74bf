import * as core from "./core.js";
import * as ui from "./ui.js";

// The noise lab: above, a text under noise of a kind and a share; below, two ways of writing, token by token.

const { h } = ui;
const D = 16; // numbers of a token's vector

export const KINDS = [
  ["hidden (absorbing)", "Each token is hidden once t passes its number. A model sees the gaps; the labels are what was there."],
  ["swapped (uniform)", "Each token becomes a random one once t passes its number. Nothing tells the model which: it must doubt all."],
  ["shaken (Gaussian)", `Each token is a vector of ${D} numbers that is mixed with noise. What you read is the token whose vector is nearest.`]];

let table; // the vectors of the tokens, made when they are first needed

/** What is read at t: {ids, share, weight}; the share of tokens that is expected to change, and what a gap counts, or null where there is no such number. */
export function noised(state, tok) {
  const row = core.textRow(tok, state.text), noise = { seed: state.seed, epoch: 0 };
  const s = state.schedules[state.schedule].schedule, t = Math.max(state.t, 1e-3), far = Math.fround(t);
  const hidden = core.hidden(s, far), weight = core.weight(s, far), K = state.vocab[1] - state.vocab[0];
  const share = state.kind === 0 ? hidden : state.kind === 1 ? hidden * (1 - 1 / K) : null;
  if (state.kind === 0) return { row, ids: core.corrupt({ kind: "Stopped", mask_id: state.mask, t, schedule: s }, row, noise).ids, share, weight };
  if (state.kind === 1) return { row, ids: core.swapped(row, noise, state.vocab, s, t), share, weight: null };
  table ??= core.directions(state.vocab[1], D);
  return { row, ids: core.gaussian(row.ids, table, D, hidden, noise, row.answer), share, weight: null };
}

function schedulePlot(state) {
  const s = state.schedules[state.schedule].schedule, ts = Array.from({ length: 60 }, (_, k) => Math.fround((k + 1) / 60));
  const far = Math.fround(Math.max(state.t, 1e-3)), share = core.hidden(s, far), gaps = state.kind === 0;
  const what = ["a share of tokens that is hidden", "a share of tokens that is drawn anew", "a share of each vector that is noise"][state.kind];
  return ui.plot({ x: [0, 1], y: [0, gaps ? 4 : 1], at: state.t, xlabel: "t", ylabel: gaps ? "share hidden, and a gap's loss weight" : "share of noise",
    title: `At t = ${state.t}: ${what}, ${share.toFixed(3)}${gaps ? `; a gap has the loss weight ${core.weight(s, far).toFixed(3)}` : ""}.`,
    lines: [{ name: gaps ? "share hidden" : "share of noise", points: ts.map((t) => [t, core.hidden(s, t)]) },
            ...(gaps ? [{ name: "a gap's weight", dash: "5 4", points: ts.map((t) => [t, Math.max(0, core.weight(s, t))]) }] : [])] });
}

function tokens(box, row, ids, tok, mask) {
  box.replaceChildren(...ids.map((id, t) => {
    const same = id === row.ids[t], way = same ? "clean" : id === mask ? "mask" : "swap";
    const words = { clean: "as it was", mask: "hidden", swap: "another token" }[way];
    return h("div", { class: `lm-token lm-${way}`, title: `${t}: was ${tok.shown(row.ids[t])}, is ${way === "mask" ? "hidden" : tok.shown(id)} (${words})`, "data-id": id },
      h("b", {}, way === "mask" ? "▒▒" : tok.shown(id)), h("small", {}, same ? "\u00a0" : tok.shown(row.ids[t])));
  }));
}

/** One way of writing up to a step: each token with when and how surely it was written. */
function written(box, count, w, tok, step) {
  const last = Math.max(...w.when), done = w.when.filter((v) => v > 0 && v <= step).length, all = w.when.filter((v) => v > 0).length;
  box.replaceChildren(...w.ids.map((id, t) => {
    const when = w.when[t], given = when === 0, there = when <= step;
    const e = h("div", { class: `lm-token ${given ? "lm-given" : there ? "lm-written" : "lm-mask"}${!given && when === step ? " lm-here" : ""}`, "data-id": there ? id : -1, "data-when": when,
      title: given ? "given" : there ? `step ${when}, with a probability of ${w.p[t].toFixed(3)}` : "not written yet" },
      h("b", {}, there ? tok.shown(id) : "▒▒"), h("small", {}, given ? "\u00a0" : there ? String(when) : "\u00a0"));
    if (!given && there) { e.style.setProperty("--lm-when", `${Math.round(100 * when / last)}%`); e.style.setProperty("--lm-sure", `${Math.round(100 * w.p[t])}%`); }
    return e;
  }));
  count.textContent = `step ${Math.min(step, last)} of ${last}: ${done} of ${all} tokens`;
}

/** How each way of writing differs from the text it learnt from. */
function habits(list, text) {
  const most = Math.max(text, ...list.map((w) => w.pairs));
  const bar = (name, v, k) => h("tr", {}, h("td", {}, name), h("td", { class: "lm-bar-cell" }, h("div", { class: `lm-share lm-share-${k}`, style: `width:${(100 * v / most).toFixed(1)}%` })),
    h("td", { class: "lm-number" }, `${(100 * v).toFixed(0)} %`));
  return h("table", { class: "lm-habits" }, h("caption", {}, "How varied: of all pairs of neighbouring tokens in many texts, the share that differ"),
    h("tbody", {}, bar("real text", text, 0), ...list.map((w) => bar(w.name, w.pairs, 1))));
}

function render({ model, el }) {
  const tok = core.tokenizer(JSON.parse(model.get("tokenizer"))), schedules = model.get("schedules");
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const names = ["text", "kind", "schedule", "schedules", "t", "seed", "mask", "vocab"];
  const state = () => Object.fromEntries(names.map((n) => [n, model.get(n)]));
  const about = h("p", { class: "lm-about" }), count = h("p", { class: "lm-count", "aria-live": "polite" });
  const box = h("div", { class: "lm-tokens", role: "group", "aria-label": "The text under noise" }), curve = h("div");
  const text = h("textarea", { rows: 2, "aria-label": "Your text", spellcheck: "false", oninput: (e) => put("text", e.target.value) });
  text.value = model.get("text");
  const kind = ui.menu("Kind of noise", "kind", KINDS.map((k) => k[0]), model.get("kind"), (v) => put("kind", v));
  const schedule = ui.menu("Schedule", "schedule", schedules.map((s) => s.name), model.get("schedule"), (v) => put("schedule", v));
  const t = ui.slider("t: from the text (0) to noise (1)", "t", 0, 1, 0.01, model.get("t"), (v) => put("t", v));
  const seed = h("label", {}, "seed ", h("input", { type: "number", min: 0, step: 1, value: model.get("seed"), "data-knob": "seed",
    oninput: (e) => put("seed", Math.max(0, Math.floor(Number(e.target.value) || 0))) }));
  let way = 1;
  const play = ui.player("play noise", (s) => {
    let v = model.get("t") + way * s / 5;
    if (v >= 1) { v = 1; way = -1; } else if (v <= 0) { v = 0; way = 1; put("t", v); return false; }
    put("t", v); return true;
  });
  const above = () => {
    const now = state(), { row, ids, share, weight } = noised(now, tok), gone = ids.filter((v, k) => v !== row.ids[k]).length;
    about.textContent = KINDS[now.kind][1];
    const may = row.answer.filter(Boolean).length, hoped = share === null ? "" : `, ${(100 * share).toFixed(0)} % of ${may} expected`;
    count.textContent = `${gone} of ${ids.length} tokens changed${hoped}. ${[`A gap has the weight ${weight?.toFixed(2)} in the loss.`,
      "Every token is in the loss: which are noise, nobody says.", "A token changes when another's vector is nearer to what is left of its own."][now.kind]}`;
    t.show(now.t); kind.value = now.kind; schedule.value = now.schedule;
    tokens(box, row, ids, tok, now.mask); curve.replaceChildren(schedulePlot(now));
  };
  for (const n of names) model.on(`change:${n}`, above);
  el.classList.add("lm-lab");
  el.append(h("h3", {}, "Noise comes"), h("div", { class: "lm-bar" }, kind, schedule, seed, play), h("div", { class: "lm-knobs" }, t), text, about, count,
    h("div", { class: "lm-main" }, h("div", {}, box), curve), ...writing(model, tok, put));
  above();
  return () => el.replaceChildren();
}

/** The lower half: two ways of writing side by side. */
function writing(model, tok, put) {
  const list = () => model.get("writings"), side = h("div", { class: "lm-sides" });
  const panels = [0, 1].map((n) => {
    const box = h("div", { class: "lm-tokens", role: "group", "aria-label": `Writing ${n + 1}` }), count = h("p", { class: "lm-count" }), about = h("p", { class: "lm-about" });
    const choose = ui.menu(`How to write, ${n ? "right" : "left"}`, n ? "right" : "left", list().map((w) => w.name), model.get("pair")[n],
      (v) => put("pair", n ? [model.get("pair")[0], v] : [v, model.get("pair")[1]]));
    side.append(h("div", {}, choose, about, count, box));
    return { box, count, about, choose };
  });
  const longest = () => Math.max(...model.get("pair").flatMap((k) => list()[k].when));
  const step = ui.slider("step", "step", 0, longest(), 1, model.get("step"), (v) => put("step", v));
  let rest = 0;
  const play = ui.player("play writing", (s) => {
    if (model.get("step") >= longest()) { put("step", 0); rest = 0; return true; }
    rest += s * 6;
    if (rest >= 1) { put("step", Math.min(longest(), model.get("step") + Math.floor(rest))); rest %= 1; }
    return model.get("step") < longest();
  });
  const bars = h("div");
  const below = () => {
    panels.forEach((p, n) => {
      const w = list()[model.get("pair")[n]];
      p.about.textContent = w.about; p.choose.value = model.get("pair")[n];
      written(p.box, p.count, w, tok, model.get("step"));
    });
    step.show(model.get("step"), longest());
  };
  const all = () => { bars.replaceChildren(habits(list(), model.get("varied"))); below(); };
  for (const n of ["step", "pair"]) model.on(`change:${n}`, below);
  model.on("change:writings", all);
  all();
  return [h("h3", {}, "Text comes back"), h("p", { class: "lm-legend" }, "Below each token: the step that wrote it. From ", h("span", { class: "lm-early" }, "early"), " to ",
    h("span", { class: "lm-late" }, "late"), "; the bar is how probable the model found it."), h("div", { class: "lm-knobs" }, step, play), side, bars];
}

export default { render };
