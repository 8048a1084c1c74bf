// What the labs' pages have in common: elements, sliders, lines of a plot.

/** A new element: h("p", {class: "x", onclick: f}, child, ...). */
export function h(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "rect"].includes(tag);
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) e.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) e.setAttribute(name, value === true ? "" : value);
  }
  e.append(...children);
  return e;
}

/** A slider with its label and number; `set` hears the number. */
export function slider(label, name, low, high, step, value, set) {
  const out = h("output", {}, String(value));
  const input = h("input", { type: "range", min: low, max: high, step, value, "aria-label": label, "data-knob": name,
    oninput: (e) => { out.textContent = e.target.value; set(Number(e.target.value)); } });
  const box = h("label", {}, h("span", {}, label), input, out);
  box.show = (v, most = high) => { input.max = most; input.value = v; out.textContent = String(Number(v.toFixed(3))); };
  return box;
}

/** A menu of names; `set` hears the number of the one that is chosen. */
export function menu(label, name, names, value, set) {
  return h("select", { "aria-label": label, "data-knob": name, onchange: (e) => set(Number(e.target.value)) },
    ...names.map((n, k) => h("option", { value: k, selected: k === value }, n)));
}

/** A button that plays: calls `tick(seconds since the last)` until that says false, or it is pressed again. */
export function player(label, tick) {
  let last = 0, running = false;
  const button = h("button", { type: "button", "data-knob": label, "aria-pressed": "false", onclick: () => turn(!running) }, `▶ ${label}`);
  const turn = (on) => {
    running = on; last = 0;
    button.textContent = on ? "⏸ pause" : `▶ ${label}`;
    button.setAttribute("aria-pressed", String(on));
    if (on) requestAnimationFrame(frame);
  };
  const frame = (now) => {
    if (!running || !button.isConnected) return;
    const more = tick(last ? Math.min(0.1, (now - last) / 1000) : 0);
    last = now;
    if (more) requestAnimationFrame(frame); else turn(false);
  };
  return button;
}

/** A plot: lines [{points: [[x, y]], name, dash}], within x and y ranges; `marks` are dots, `at` a cursor. */
export function plot({ lines, x, y, width = 340, height = 190, title, xlabel = "", ylabel = "", at, levels = [] }) {
  const [l, r, t, b] = [44, 10, 24, 34], X = (v) => l + (v - x[0]) / (x[1] - x[0] || 1) * (width - l - r);
  const Y = (v) => height - b - (v - y[0]) / (y[1] - y[0] || 1) * (height - t - b);
  const colors = ["var(--lm-blue)", "var(--lm-orange)", "var(--lm-green)", "var(--lm-yellow)"];
  const path = (points) => points.map(([a, c], k) => `${k ? "L" : "M"}${X(a).toFixed(1)} ${Y(Math.min(y[1], c)).toFixed(1)}`).join("");
  const number = (v) => String(Number(v.toPrecision(3)));
  const word = (px, py, text, anchor = "middle") => h("text", { x: px, y: py, "text-anchor": anchor, class: "lm-tick" }, text);
  const name = (s, k) => word(width - r - 4, t + 12 + 15 * k, `${s.dash ? "╌" : "─"} ${s.name}`, "end");
  return h("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title, class: "lm-plot" },
    h("path", { d: `M${l} ${t}V${height - b}H${width - r}`, class: "lm-axis" }),
    ...[0, 0.5, 1].flatMap((q) => [word(X(x[0] + q * (x[1] - x[0])), height - b + 14, number(x[0] + q * (x[1] - x[0]))),
      word(l - 5, Y(y[0] + q * (y[1] - y[0])) + 4, number(y[0] + q * (y[1] - y[0])), "end")]),
    word((l + width - r) / 2, height - 4, xlabel), word(4, 10, ylabel, "start"),
    ...levels.map((v) => h("g", {}, h("line", { x1: l, x2: width - r, y1: Y(v.y), y2: Y(v.y), class: "lm-level" }), word(l + 4, Y(v.y) - 4, v.name, "start"))),
    ...lines.map((s, k) => h("path", { d: path(s.points), fill: "none", stroke: colors[k % 4], "stroke-width": 2, "stroke-dasharray": s.dash ?? "none" })),
    ...lines.map((s, k) => { const e = name(s, k); e.style.fill = colors[k % 4]; return e; }),
    ...(at === undefined ? [] : [h("line", { x1: X(at), x2: X(at), y1: t, y2: height - b, class: "lm-cursor" })]));
}
