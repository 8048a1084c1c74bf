import * as core from "./core.js";
import * as ui from "./ui.js";

// The loss lab: what each token of a text costs a model, what else the model expected, and a model that learns.

const { h } = ui;
const TOP = 8; // alternatives that are listed

/** A run with its logits as rows of numbers: {name, about, ids, rows}. */
export function opened(run) {
  const flat = core.halves(run.logits), V = flat.length / run.ids.length;
  return { ...run, V, rows: run.ids.map((_, t) => flat.subarray(t * V, (t + 1) * V)) };
}

/** What each token costs in nats; nothing for the first. */
export function costs(run, options) {
  return run.ids.map((id, t) => (t ? core.nll(run.rows[t], id, options) : 0));
}

const mean = (c) => c.slice(1).reduce((s, v) => s + v, 0) / Math.max(1, c.length - 1);

/** Buttons with what each token costs; made once for a run, then only changed. */
function tokens(box, run, cost, tok, chosen, pick) {
  const most = Math.log(run.V);
  if (box.shown !== run) {
    box.shown = run;
    box.replaceChildren(...run.ids.map((id, t) => h("button", { type: "button", class: "lm-token lm-cost", "data-t": t, disabled: t === 0, onclick: () => pick(t) },
      h("b", {}, tok.shown(id)), h("small", {}, "\u00a0"))));
  }
  [...box.children].forEach((e, t) => {
    e.dataset.cost = cost[t];
    e.classList.toggle("lm-here", t === chosen);
    e.ariaPressed = String(t === chosen);
    if (!t) { e.title = "given"; return; }
    e.title = `costs ${cost[t].toFixed(3)} nats, ${(cost[t] / Math.LN2).toFixed(2)} bits; probability ${Math.exp(-cost[t]).toPrecision(3)}`;
    e.lastChild.firstChild.data = cost[t].toFixed(2);
    e.style.setProperty("--lm-heat", `${Math.round(Math.min(100, 60 * cost[t] / most))}%`);
  });
}

/** The likeliest tokens at a place, and what the loss would be if each were true. */
function table(run, t, tok, options) {
  const best = core.topk(run.rows[t], TOP, options), own = run.ids[t];
  if (!best.some((r) => r.id === own)) best.push({ id: own, p: Math.exp(core.logSoftmax(run.rows[t], options.temperature)[own]), nats: core.nll(run.rows[t], own, options) });
  const line = (r) => h("tr", { class: r.id === own ? "lm-own" : "" }, h("td", {}, `${tok.shown(r.id)}${r.id === own ? " ← the text" : ""}`),
    h("td", { class: "lm-bar-cell" }, h("div", { class: "lm-share lm-share-1", style: `width:${(100 * r.p).toFixed(2)}%` })),
    h("td", { class: "lm-number", "data-p": r.p }, `${(100 * r.p).toFixed(1)} %`), h("td", { class: "lm-number", "data-nats": r.nats }, r.nats.toFixed(2)));
  return h("table", { class: "lm-habits" }, h("caption", {}, `${run.name}: what it expects at place ${t}`),
    h("thead", {}, h("tr", {}, ...["token", "", "probability", "loss if true"].map((w) => h("th", { scope: "col" }, w)))), h("tbody", {}, ...best.map(line)));
}

function bars(both, tok) {
  const most = Math.max(Math.log(both[0].run.V) + 1, ...both.flatMap((b) => b.cost)), n = Math.max(...both.map((b) => b.cost.length));
  return ui.plot({ x: [0, n - 1], y: [0, Math.ceil(most)], width: 560, xlabel: "token", ylabel: "nats", title: `Loss of each token: ${both.map((b) => `${b.run.name} ${mean(b.cost).toFixed(3)} on average`).join(", ")}`,
    levels: [{ y: Math.log(both[0].run.V), name: `ln ${both[0].run.V} = ${Math.log(both[0].run.V).toFixed(1)}: a blind guess` }],
    lines: both.map((b, k) => ({ name: b.run.name, dash: k ? "5 4" : undefined, points: b.cost.map((c, t) => [t, c]).slice(1) })) });
}

function render({ model, el }) {
  const tok = core.tokenizer(JSON.parse(model.get("tokenizer")));
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  let runs = [], known = null;
  const read = () => { if (model.get("runs") !== known) { known = model.get("runs"); runs = known.map(opened); } return runs; };
  const options = () => ({ temperature: model.get("temperature"), smoothing: model.get("smoothing") });
  const panels = [0, 1].map((n) => ({ n, box: h("div", { class: "lm-tokens", role: "group", "aria-label": `Reader ${n + 1}: tokens and what they cost` }),
    count: h("p", { class: "lm-count", "aria-live": "polite" }), about: h("p", { class: "lm-about" }), list: h("div"),
    choose: ui.menu(`Reader ${n + 1}`, n ? "right" : "left", read().map((r) => r.name), model.get("pair")[n],
      (v) => put("pair", n ? [model.get("pair")[0], v] : [v, model.get("pair")[1]])) }));
  const curve = h("div");
  const all = () => {
    const some = read(), o = options();
    const both = panels.map((p) => {
      const run = some[Math.min(model.get("pair")[p.n], some.length - 1)], cost = costs(run, o), chosen = Math.min(model.get("chosen"), run.ids.length - 1);
      p.choose.value = some.indexOf(run);
      p.about.textContent = run.about;
      p.count.textContent = `${mean(cost).toFixed(3)} nats a token: as unsure as among ${Math.exp(mean(cost)).toFixed(1)} tokens`;
      tokens(p.box, run, cost, tok, chosen, (t) => put("chosen", t));
      p.list.replaceChildren(table(run, chosen, tok, o));
      return { run, cost };
    });
    curve.replaceChildren(bars(both, tok));
  };
  const heat = ui.slider("temperature", "temperature", 0.2, 3, 0.05, model.get("temperature"), (v) => put("temperature", v));
  const smooth = ui.slider("label smoothing: share of the answer spread over all tokens", "smoothing", 0, 0.5, 0.01, model.get("smoothing"), (v) => put("smoothing", v));
  const text = h("textarea", { rows: 2, "aria-label": "The text that is read", spellcheck: "false", disabled: !model.get("live"), onchange: (e) => put("text", e.target.value) });
  text.value = model.get("text");
  el.classList.add("lm-lab");
  el.append(text, h("p", { class: "lm-legend" }, model.get("live") ? "Change the text and leave the field: the models read it again." :
    "The text is fixed on this page; with a kernel you can write your own.", " Darker is dearer; the number is the loss in nats. Click a token, or use Tab and Enter."),
  h("div", { class: "lm-knobs" }, heat, smooth),
  h("div", { class: "lm-sides" }, ...panels.map((p) => h("div", {}, p.choose, p.about, p.count, p.box, p.list))), curve, ...learning(model, put));
  for (const n of ["runs", "pair", "chosen", "temperature", "smoothing"]) model.on(`change:${n}`, all);
  model.on("change:text", () => { text.value = model.get("text"); });
  all();
  return () => el.replaceChildren();
}

/** A model that learns in the kernel: play, step, reset, and its curves. */
function learning(model, put) {
  if (!model.get("trains")) return [];
  const play = h("button", { type: "button", "data-knob": "play", onclick: () => put("command", model.get("command") === "play" ? "pause" : "play") });
  const press = (name) => h("button", { type: "button", "data-knob": name, onclick: () => put("command", name) }, name);
  const count = h("p", { class: "lm-count", "aria-live": "polite" }), curve = h("div");
  const show = () => {
    const [train, held] = [model.get("train"), model.get("held")], V = model.get("size"), last = (c) => (c.length ? c[c.length - 1][1].toFixed(3) : "–");
    play.textContent = model.get("command") === "play" ? "⏸ pause" : "▶ play";
    count.textContent = `${train.length ? train[train.length - 1][0] : 0} steps: loss ${last(train)} on its batches, ${last(held)} on texts that it does not learn from`;
    curve.replaceChildren(ui.plot({ x: [0, Math.max(20, ...train.map((p) => p[0]))], y: [0, Math.ceil(Math.log(V) + 1)], width: 560, xlabel: "step", ylabel: "nats a token",
      title: count.textContent, lines: [{ name: "its batches", points: train }, { name: "held out", dash: "5 4", points: held }], levels: [{ y: Math.log(V), name: `ln ${V}` }] }));
  };
  for (const n of ["train", "held", "command"]) model.on(`change:${n}`, show);
  show();
  return [h("h3", {}, "Watch it learn"), h("div", { class: "lm-bar" }, play, press("step"), press("reset")), count, curve];
}

export default { render };
