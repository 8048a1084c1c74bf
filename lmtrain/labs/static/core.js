// What lmtrain's objectives do to a row of tokens, a second time: in the page. Every function here has a twin in Python
// and a test that compares them on the same seeds. No DOM, no network; numbers are rounded to 32 bits where Python's are.
//
// A row is one row of a Batch: {ids, clean, doc, order, answer, targets, weights, index, extra}, arrays of T values.
// An objective is what Python's `described` makes of it: {kind: "MLM", mask_id, ordinary: [first, end], rate, ...}.

const f = Math.fround;
const count = (n) => Array.from({ length: n }, (_, t) => t);

// ---- noise: batch.Noise

/** A 32-bit integer hash. */
export function mix(h) {
  h = Math.imul(h ^ (h >>> 16), 0x7feb352d);
  h = Math.imul(h ^ (h >>> 15), 0x846ca68b);
  return (h ^ (h >>> 16)) >>> 0;
}

/** The number in [0,1) of a place in an example; noise is {seed, epoch}. */
export function at(noise, index, place, draw = 0) {
  const h = mix(mix(mix((noise.seed + 0x9e3779b9) | 0) ^ noise.epoch) ^ draw);
  return (mix(mix(index ^ h) ^ Math.imul(place, 0x9e3779b1)) >>> 8) / 2 ** 24;
}

const FIRST = 0xfffffffd, ROW = 0xfffffffe, DOC = 0xffffffff; // places that no token has
export const DRAW = 2 ** 20; // the first draw of mixed objectives

/** One number a token. */
export const tokenNoise = (row, noise, draw = 0) => {
  const place = places(row);
  return row.ids.map((_, t) => at(noise, row.index[t], place[t], draw));
};

// ---- rows: batch.lay, batch.sees

/** Examples {ids, answer, index, tokens} one behind the other, padded to T. */
export function lay(examples, T, pad = 0) {
  const row = { ids: [], doc: [], answer: [], index: [], extra: {} };
  const names = Object.keys(examples[0]?.tokens ?? {});
  for (const n of names) row.extra[n] = [];
  examples.forEach((e, d) => {
    row.ids.push(...e.ids);
    row.doc.push(...e.ids.map(() => d + 1));
    row.answer.push(...(e.answer ?? e.ids.map(() => true)));
    row.index.push(...e.ids.map(() => e.index ?? 0));
    for (const n of names) row.extra[n].push(...e.tokens[n]);
  });
  const fill = (c, v) => c.concat(Array(T - c.length).fill(v));
  for (const n of names) row.extra[n] = fill(row.extra[n], 0);
  const ids = fill(row.ids, pad);
  return { ids, clean: [...ids], doc: fill(row.doc, 0), order: count(T), answer: fill(row.answer, false),
           targets: Array(T).fill(0), weights: Array(T).fill(0), index: fill(row.index, -1), extra: row.extra };
}

/** Where each run of equal values begins. */
export function starts(column) {
  const out = [];
  column.forEach((v, t) => out.push(t && v === column[t - 1] ? out[t - 1] : t));
  return out;
}

/** Position of each token inside its document. */
export const places = (row) => starts(row.doc).map((s, t) => t - s);

/** May token i see token j? */
export function sees(row) {
  const { doc, order, extra } = row, hidden = extra.private ?? [];
  return (i, j) => doc[i] === doc[j] && order[j] <= order[i] && (!hidden[j] || order[j] === order[i]);
}

const left = (c, v) => [...c.slice(1), v];
const set = (row, columns) => ({ ...row, ...columns });

/** Ask each position for the next token of its document: objective.shift. */
export function shift(row) {
  const answer = left(row.answer, false), doc = left(row.doc, 0);
  const weights = row.doc.map((d, t) => Number(answer[t] && doc[t] === d && d > 0));
  return set(row, { targets: left(row.clean, 0), weights });
}

/** Replace tokens by the mask and ask for them: objective.hide. */
export function hide(row, hit, maskId) {
  hit = hit.map((h, t) => h && row.doc[t] > 0);
  return set(row, { ids: row.ids.map((v, t) => (hit[t] ? maskId : v)), targets: [...row.clean], weights: hit.map(Number) });
}

// ---- masked objectives: objectives.masked

const hideable = (o, row) => {
  const place = places(row), special = row.extra.special;
  return row.ids.map((_, t) => row.answer[t] && row.doc[t] > 0 && (!o.shifted || place[t] > 0) &&
    (special ? !special[t] : row.clean[t] >= o.ordinary[0] && row.clean[t] < o.ordinary[1]));
};

/** Candidates below the rate, and of each document the one with the lowest number. */
export function chosen(row, u, ok, rate) {
  const least = {};
  u.forEach((v, t) => { if (ok[t]) least[row.doc[t]] = Math.min(least[row.doc[t]] ?? 2, v); });
  return u.map((v, t) => ok[t] && (v < f(rate) || v === least[row.doc[t]]));
}

const wordStarts = (row) => starts(row.doc.map((d, t) => d * 2 ** 32 + row.extra.word[t]));

/** Lengths from 1 to `longest`, P(k) ~ (1-p)**(k-1), from uniform numbers. */
export function widths(u, p, longest) {
  const most = f(1 - (1 - p) ** longest);
  return u.map((v) => Math.min(longest, Math.trunc(f(1 + f(f(Math.log1p(f(-v * most))) / f(Math.log(1 - p)))))));
}

/** Units laid together into spans: where each token's span begins. */
export function tiles(row, first, width) {
  const T = row.ids.length, start = starts(row.doc);
  let units = -1, sum = 0;
  const unit = first.map((s, t) => (s === t ? ++units : units));
  const before = width.map((w) => (sum += w) - w);
  const owner = Array(T).fill(0), begun = Array(T).fill(false);
  unit.forEach((n, t) => { owner[n] = row.doc[t]; });
  before.forEach((b, t) => {
    const n = b - before[start[t]] + unit[start[t]];
    if (n < T && n <= units && owner[n] === row.doc[t]) begun[n] = true;
  });
  let spans = 0;
  return starts(first.map((s, t) => (s === t && begun[unit[t]] ? ++spans : spans)));
}

const units = (o, row, noise) => {
  const first = o.words ? wordStarts(row) : count(row.ids.length);
  return o.kind === "Spans" ? tiles(row, first, widths(tokenNoise(row, noise, 3), o.p, o.longest)) : first;
};

/** The masked objectives' parts: what becomes of each token. "" is not asked; else keep, swap or mask. */
export function fates(o, row, noise) {
  const first = units(o, row, noise), u = tokenNoise(row, noise), place = places(row);
  const hit = chosen(row, first.map((s) => u[s]), hideable(o, row), o.rate);
  return hit.map((h, t) => {
    if (!h) return "";
    const v = at(noise, row.index[t], place[first[t]], 1);
    return v < f(o.keep) ? "keep" : v < f(o.keep + o.swap) ? "swap" : "mask";
  });
}

function masked(o, row, noise) {
  const fate = fates(o, row, noise), hit = fate.map(Boolean), size = o.ordinary[1] - o.ordinary[0];
  const other = tokenNoise(row, noise, 2).map((v) => o.ordinary[0] + Math.trunc(f(v * size)));
  const reads = { keep: (t) => row.ids[t], swap: (t) => other[t], mask: () => o.mask_id, "": (t) => row.ids[t] };
  let q = hide(row, hit, o.mask_id);
  if (o.shifted) q = set(shift(set(q, { answer: hit })), { answer: row.answer });
  return set(q, { ids: fate.map((w, t) => reads[w](t)), order: row.ids.map(() => 0) });
}

// ---- causal and prefix objectives: objective.CLM, objective.PrefixLM

function prefix(o, row, noise) {
  const place = places(row);
  if (o.cut !== null && o.cut !== undefined) {
    const size = {};
    row.doc.forEach((d) => { size[d] = (size[d] ?? 0) + 1; });
    row = set(row, { answer: row.answer.map((a, t) => a && place[t] >=
      1 + Math.trunc(f(f(at(noise, row.index[t], DOC) * f(o.cut)) * size[row.doc[t]]))) });
  }
  let open = true;
  const before = row.doc.map((d, t) => {
    if (place[t] === 0) open = true;
    open = open && !row.answer[t];
    return open && d > 0;
  });
  if (before.some((b, t) => place[t] === 0 && row.doc[t] > 0 && !b)) throw new Error("a document has no prefix");
  return shift(set(row, { order: before.map((b, t) => (b ? 0 : place[t] + 1)) }));
}

// ---- diffusion: objectives.diffusion

/** Share of hidden tokens at t. */
export function hidden(s, t) {
  if (s.kind === "Polynomial") return f(t ** f(s.power));
  if (s.kind === "Cosine") return f(Math.sin(f(t * f(Math.PI / 2))));
  return t;
}

/** How much a gap counts at t. */
export function weight(s, t) {
  if (s.kind === "Polynomial") return f(f(s.power) / t);
  if (s.kind === "Cosine") return f(f(Math.PI / 2) / f(Math.tan(f(t * f(Math.PI / 2)))));
  return f(1 / t);
}

/** One t in [0,1) a token's document, or part of it. */
export function times(row, noise, part = row.ids.map(() => 0)) {
  const start = at({ seed: noise.seed, epoch: 0 }, -1, FIRST) * 2 ** 32;
  return row.index.map((n, t) => ((Math.imul(n, 0x9e3779b9) + Math.imul(noise.epoch, 0x6a09e667) +
    Math.imul(part[t], 0xbb67ae85) + start) >>> 8 & 0xffffff) / 2 ** 24);
}

/** Which tokens a schedule hides and what they count: {hit, weights}, from each token's t and number u. */
export function masks(s, t, u, may, part) {
  if (s.kind === "At") return masks({ ...s.of, eps: 0 }, t.map(() => f(s.t)), u, may, part);
  if (s.kind === "ExactK") {
    const rank = u.map((v, i) => count(u.length).filter((j) => may[j] && part[j] === part[i] &&
      (u[j] < v || (u[j] === v && j < i))).length);
    const n = u.map((_, i) => count(u.length).filter((j) => may[j] && part[j] === part[i]).length);
    const k = n.map((m, i) => 1 + Math.trunc(m * t[i]));
    const hit = may.map((m, i) => m && rank[i] < k[i]);
    return { hit, weights: hit.map((h, i) => (h ? f(n[i] / k[i]) : 0)) };
  }
  if (s.kind === "Stepped") {
    const tick = t.map((v) => Math.trunc(v * s.steps) + 1);
    const hit = may.map((m, i) => m && u[i] < f(tick[i] / s.steps));
    return { hit, weights: hit.map((h, i) => (h ? f(f(1 / tick[i]) * s.steps) : 0)) };
  }
  const late = t.map((v) => f(f(s.eps) + f(f(1 - s.eps) * v)));
  const hit = may.map((m, i) => m && u[i] < hidden(s, late[i]));
  return { hit, weights: hit.map((h, i) => (h ? weight(s, late[i]) : 0)) };
}

function noised(row, noise, maskId, schedule, part = row.ids.map(() => 0)) {
  const T = row.ids.length, may = row.answer.map((a, t) => a && row.doc[t] > 0);
  const groups = part.map((p, t) => row.doc[t] * T + p);
  const { hit, weights } = masks(schedule, times(row, noise, part), tokenNoise(row, noise), may, groups);
  return set(hide(row, hit, maskId), { weights });
}

function diffusion(o, row, noise) {
  const place = places(row);
  if (o.shifted) row = set(row, { answer: row.answer.map((a, t) => a && place[t] > 0) });
  const q = noised(set(row, { order: row.ids.map(() => 0) }), noise, o.mask_id, o.schedule);
  if (!o.shifted) return q;
  const doc = left(q.doc, 0), w = left(q.weights, 0);
  return set(q, { targets: left(q.targets, 0), weights: w.map((v, t) => (doc[t] === q.doc[t] ? v : 0)) });
}

function uniform(o, row, noise) {
  const [first, end] = o.vocab, K = end - first, s = o.schedule, eps = s.eps;
  const may = row.answer.map((a, t) => a && row.doc[t] > 0);
  const t = times(row, noise).map((v) => f(f(eps) + f(f(1 - 2 * eps) * v)));
  const u = tokenNoise(row, noise), other = tokenNoise(row, noise, 1).map((v) => first + Math.trunc(f(v * K)));
  const alpha = t.map((v) => f(1 - hidden(s, v)));
  const ids = row.ids.map((v, i) => (may[i] && u[i] < f(1 - alpha[i]) ? other[i] : v));
  const rate = t.map((v, i) => f(f(f(weight(s, v) * hidden(s, v)) / alpha[i]) / K));
  return set(row, { ids, targets: [...row.clean], order: row.ids.map(() => 0),
    weights: may.map((m, i) => (m ? rate[i] : 0)), extra: { ...row.extra, alpha } });
}

function blocks(o, row, noise) {
  const part = places(row).map((p) => Math.floor(p / o.block)), q = noised(row, noise, o.mask_id, o.schedule, part);
  const no = row.ids.map(() => false), both = (x, y) => [...x, ...y];
  const extra = Object.fromEntries(Object.entries({ ...q.extra, pos: places(row) }).map(([n, c]) => [n, both(c, c)]));
  return { ids: both(q.ids, q.clean), clean: both(q.clean, q.clean), doc: both(q.doc, q.doc), index: both(q.index, q.index),
    order: both(part.map((p) => 2 * p), part.map((p) => 2 * p + 1)), answer: both(q.answer, no),
    targets: both(q.targets, q.targets), weights: both(q.weights, no.map(() => 0)),
    extra: { ...extra, private: both(no.map(() => true), no) } };
}

// ---- several questions: objectives.mixed

/** Which part of a mixture a row draws: its number. */
export function partOf(o, row, noise) {
  const u = at(noise, row.index[0], ROW, DRAW);
  const last = o.probs.length - 1;
  let sum = 0;
  for (let k = 0; k < last; k++) if (u < (sum += o.probs[k])) return k;
  return last;
}

/** Ask an objective's question of a row: what `Objective.corrupt` does. */
export function corrupt(o, row, noise) {
  switch (o.kind) {
    case "CLM": return shift(row);
    case "PrefixLM": return prefix(o, row, noise);
    case "MLM": case "Spans": return masked(o, row, noise);
    case "Diffusion": return diffusion(o, row, noise);
    case "Stopped": return diffusion({ ...o, schedule: { kind: "At", of: o.schedule, t: Math.max(o.t, 1e-3) } }, row, noise);
    case "Uniform": return uniform(o, row, noise);
    case "BlockDiffusion": return blocks(o, row, noise);
    case "Mix": return corrupt(Object.values(o.parts)[partOf(o, row, noise)], row, noise);
    default: throw new Error(`${o.kind} is not drawn here: use Python`);
  }
}

// ---- what changes an example's length: span_corrupt, ul2, fim

/** Python's round: halves go to the even number. */
export function round(x) {
  const low = Math.floor(x), rest = x - low;
  return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
}

function lengths(u, k) {
  const cuts = count(u.length - 1).sort((a, b) => u[a + 1] - u[b + 1]).slice(0, k - 1).map((c) => c + 1).sort((a, b) => a - b);
  return [...cuts, u.length].map((c, n) => c - (n ? cuts[n - 1] : 0));
}

/** Which of n tokens T5 hides, from n uniform numbers. */
export function spanMask(u, rate = 0.15, mean = 3, unbiased = false) {
  const n = u.length, gone = Math.min(Math.max(round(n * rate), 1), n - 1);
  const spans = Math.min(Math.max(round(gone / mean), 1), gone, n - gone);
  const shown = lengths(u.slice(gone), spans), cut = lengths(u.slice(0, gone), spans);
  const hit = shown.flatMap((w, i) => [...Array(w).fill(false), ...Array(cut[i]).fill(true)]);
  const turn = unbiased ? Math.trunc(f(u[0] * n)) : 0;
  return hit.map((_, t) => hit[(t - turn + n) % n]);
}

/** Spans cut out and put behind the text: the example that T5 learns from. */
export function spanCorrupt(e, noise, sentinels, { rate = 0.15, mean = 3, unbiased = false } = {}) {
  const may = e.answer ?? e.ids.map(() => true), n = may.filter(Boolean).length;
  const some = spanMask(count(n).map((k) => at(noise, e.index, k, 5)), rate, mean, unbiased);
  let seen = 0, spans = 0;
  const hit = may.map((m) => m && some[seen++]), text = [], answer = [];
  e.ids.forEach((v, t) => {
    if (hit[t] && !hit[t - 1]) { text.push(sentinels[spans]); answer.push(sentinels[spans++]); }
    (hit[t] ? answer : text).push(v);
  });
  answer.push(sentinels[spans]);
  return { ...e, ids: [...text, ...answer], answer: [...text.map(() => false), ...answer.map(() => true)] };
}

export const UL2 = [[0.15, 3], [0.15, 8], [0.25, null], [0.5, 3], [0.5, 8], [0.15, 64], [0.5, 64]];

const chance = (noise, e, draw) => at(noise, e.index, 0, draw);

function hideEnd(e, noise, rate) {
  const may = count(e.ids.length).filter((t) => !e.answer || e.answer[t]);
  const n = Math.min(Math.max(1, round(2 * rate * may.length * chance(noise, e, DRAW + 2))), may.length);
  const asked = new Set(may.slice(-n));
  return { ...e, answer: e.ids.map((_, t) => asked.has(t)) };
}

/** A text under one of UL2's denoisers; modes are the tokens of R, S and X. */
export function ul2(e, noise, sentinels, modes) {
  const [rate, mean] = UL2[Math.trunc(chance(noise, e, DRAW + 1) * UL2.length)];
  const kind = mean === null ? 1 : mean >= 12 || rate >= 0.3 ? 2 : 0;
  const q = mean === null ? hideEnd(e, noise, rate) : spanCorrupt(e, noise, sentinels, { rate, mean });
  return { ...q, ids: [modes[kind], ...q.ids], answer: [false, ...q.answer] };
}

// ---- Gaussian noise on vectors of tokens

/** A normal number (Box and Muller, 1958). */
export function normal(noise, index, place, draw) {
  const far = Math.sqrt(-2 * Math.log(1 - at(noise, index, place, 2 * draw)));
  return far * Math.cos(2 * Math.PI * at(noise, index, place, 2 * draw + 1));
}

/** A random direction of length 1 for each of V tokens: one array of V * D numbers. */
export function directions(V, D) {
  const table = new Float64Array(V * D);
  for (let v = 0; v < V; v++) {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += (table[v * D + d] = normal({ seed: 0, epoch: 0 }, v, d, 0)) ** 2;
    for (let d = 0; d < D; d++) table[v * D + d] /= Math.sqrt(sum);
  }
  return table;
}

/** Tokens after noise of share t on their vectors: the token whose vector is nearest to each noisy one. */
export function gaussian(ids, table, D, t, noise, may = ids.map(() => true)) {
  const V = table.length / D, clean = Math.sqrt(1 - t), dirt = Math.sqrt(t / D), x = new Float64Array(D);
  return ids.map((id, place) => {
    if (!may[place]) return id;
    for (let d = 0; d < D; d++) x[d] = clean * table[id * D + d] + dirt * normal(noise, 0, place * D + d, 20);
    let best = 0, most = -Infinity;
    for (let v = 0, k = 0; v < V; v++) {
      let sum = 0;
      for (let d = 0; d < D; d++, k++) sum += x[d] * table[k];
      if (sum > most) { most = sum; best = v; }
    }
    return best;
  });
}

/** Some tokens become others: objectives.diffusion.Uniform with the clock stopped at t. */
export function swapped(row, noise, [first, end], s, t) {
  const gone = f(1 - f(1 - hidden(s, f(t)))), may = row.answer.map((a, i) => a && row.doc[i] > 0);
  const u = tokenNoise(row, noise), other = tokenNoise(row, noise, 1).map((v) => first + Math.trunc(f(v * (end - first))));
  return row.ids.map((v, i) => (may[i] && u[i] < gone ? other[i] : v));
}

// ---- losses

/** Log-probabilities of logits, at a temperature, without the tokens of `forbid`. */
export function logSoftmax(logits, temperature = 1, forbid = []) {
  const z = logits.map((v, i) => (forbid.includes(i) ? -Infinity : v / temperature));
  const top = Math.max(...z), sum = Math.log(z.reduce((s, v) => s + Math.exp(v - top), 0));
  return z.map((v) => v - top - sum);
}

/** Cross-entropy in nats; `smoothing` is the share of the target spread over all tokens (Szegedy et al., 2016). */
export function nll(logits, target, { temperature = 1, smoothing = 0, forbid = [] } = {}) {
  const logp = logSoftmax(logits, temperature, forbid), open = logp.filter((v) => v > -Infinity);
  const mean = open.reduce((s, v) => s + v, 0) / open.length;
  return -(1 - smoothing) * logp[target] - smoothing * mean;
}

/** 16-bit floats in base64 as an array of numbers. */
export function halves(text) {
  const raw = atob(text), out = new Array(raw.length / 2);
  for (let i = 0; i < out.length; i++) {
    const bits = raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8), e = (bits >> 10) & 31, m = bits & 1023;
    const size = e === 31 ? (m ? NaN : Infinity) : e ? (1 + m / 1024) * 2 ** (e - 15) : m * 2 ** -24;
    out[i] = bits & 0x8000 ? -size : size;
  }
  return out;
}

/** The k likeliest tokens: [{id, p, nats}], the likeliest first. */
export function topk(logits, k, options = {}) {
  const logp = logSoftmax(logits, options.temperature, options.forbid);
  return count(logp.length).sort((a, b) => logp[b] - logp[a] || a - b).slice(0, k)
    .map((id) => ({ id, p: Math.exp(logp[id]), nats: nll(logits, id, options) }));
}

// ---- tokenizers: the files that train_bpe and train_chars write

/** A text as a row of one document, from <|bos|> to <|eos|>. */
export function textRow(tok, text) {
  const { ids, words } = tok.encode(text), [bos, eos] = [tok.specials["<|bos|>"], tok.specials["<|eos|>"]];
  const example = { ids: [bos, ...ids, eos], answer: [false, ...ids.map(() => true), true], index: 0,
                    tokens: { word: [-1, ...words, -1] } };
  return lay([example], example.ids.length);
}

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** The printable letter that stands for each byte (GPT-2's table). */
function byteLetters() {
  const plain = [[33, 126], [161, 172], [174, 255]], out = [];
  let extra = 256;
  for (let b = 0; b < 256; b++) out.push(String.fromCharCode(plain.some(([a, z]) => a <= b && b <= z) ? b : extra++));
  return out;
}

/** Join the pair that was learnt first, again and again. */
function merged(parts, ranks) {
  parts = [...parts];
  for (;;) {
    let best = -1, least = Infinity;
    for (let i = 0; i + 1 < parts.length; i++) {
      const r = ranks.get(`${parts[i]} ${parts[i + 1]}`);
      if (r !== undefined && r < least) { least = r; best = i; }
    }
    if (best < 0) return parts;
    const pair = [parts[best], parts[best + 1]], out = [];
    for (let i = 0; i < parts.length; i++) {
      const here = parts[i] === pair[0] && parts[i + 1] === pair[1];
      out.push(here ? parts[i] + parts[++i] : parts[i]);
    }
    parts = out;
  }
}

/** A tokenizer from the JSON of tokenizer.json: {size, specials, encode(text), decode(ids), shown(id)}. */
export function tokenizer(json) {
  const vocab = json.model.vocab, names = [], utf8 = new TextEncoder(), lossy = new TextDecoder();
  for (const [name, id] of Object.entries(vocab)) names[id] = name;
  const specials = Object.fromEntries((json.added_tokens ?? []).filter((t) => t.special).map((t) => [t.content, t.id]));
  for (const [name, id] of Object.entries(specials)) names[id] = name;
  const special = new Set(Object.values(specials));
  const ranks = new Map(json.model.merges.map((m, i) => [Array.isArray(m) ? m.join(" ") : m, i]));
  const letters = byteLetters(), byteOf = new Map(letters.map((c, b) => [c, b]));
  const byBytes = json.model.byte_fallback === true;
  const piece = (text) => merged([...utf8.encode(text)].map((b) => letters[b]), ranks).map((p) => vocab[p]);
  const hex = (b) => vocab[`<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`];
  const letter = (c) => (vocab[c] === undefined ? [...utf8.encode(c)].map(hex) : [vocab[c]]);
  const encode = (text) => {
    const parts = byBytes ? [[...text].flatMap(letter)] : [...text.matchAll(WORDS)].map((m) => piece(m[0]));
    return { ids: parts.flat(), words: parts.flatMap((p, n) => p.map(() => n)) };
  };
  const bytes = (id) => {
    if (special.has(id)) return [...utf8.encode(names[id])];
    if (!byBytes) return [...names[id]].map((c) => byteOf.get(c));
    const raw = /^<0x([0-9A-F]{2})>$/.exec(names[id]);
    return raw ? [parseInt(raw[1], 16)] : [...utf8.encode(names[id])];
  };
  const decode = (ids) => lossy.decode(new Uint8Array(ids.flatMap(bytes)));
  const shown = (id) => {
    if (special.has(id)) return names[id];
    const text = decode([id]);
    return text.includes("\ufffd") ? names[id] : text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  };
  return { size: names.length, specials, encode, decode, shown };
}
