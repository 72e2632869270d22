// Elements, numbers and one chart: lines or stacked bars over an axis, with values under the pointer. Knows no run.
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560, HEIGHT = 220, LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 28;

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
// Text goes in as text: nothing in this page is ever parsed as markup.
const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const svgEl = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

function short(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0) return "\u2212" + short(-value);
  if (value >= 1e9) return Number((value / 1e9).toPrecision(4)) + "G";
  if (value >= 1e6) return Number((value / 1e6).toPrecision(4)) + "M";
  if (value >= 1e4) return Number((value / 1e3).toPrecision(4)) + "k";
  if (value > 0 && value < 1e-3) return String(Number(value.toPrecision(3)).toExponential());
  return String(Number(value.toPrecision(4)));
}
const signed = (value) => (value === null || value === undefined ? "–" : value > 0 ? "+" + short(value) : short(value));
function duration(seconds) {
  if (seconds < 90) return short(seconds) + " s";
  if (seconds < 5400) return short(seconds / 60) + " min";
  return short(seconds / 3600) + " h";
}

function roundTicks(low, high, about = 5) {
  const span = high - low;
  if (!(span > 0) || !Number.isFinite(span)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / about));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => span / (power * factor) <= about) || 10);
  const ticks = [];
  const last = Math.ceil(high / step - 1e-9);
  for (let index = Math.floor(low / step + 1e-9); index <= last; index++) ticks.push(Number((index * step).toPrecision(12)));
  return ticks;
}
function powersOfTen(low, high) {
  const first = Math.floor(Math.log10(low));
  const last = Math.max(Math.ceil(Math.log10(high)), first + 1);
  const stride = Math.max(1, Math.ceil((last - first) / 5));
  const ticks = [];
  for (let exponent = first; exponent < last + stride; exponent += stride) ticks.push(10 ** exponent);
  return ticks;
}
function widened(low, high) {
  if (low === high) { const margin = Math.abs(low) * 0.5 || 1; return [low - margin, high + margin]; }
  return low > 0 && low < 0.35 * high ? [0, high] : [low, high];
}
function smoothed(values, reach) {
  // Centred, over the values that are there; fewer at the ends, so that the first and last stay as they are.
  const there = values.map((value, index) => [value, index]).filter(([value]) => value !== null);
  const sums = [0];
  for (const [value] of there) sums.push(sums[sums.length - 1] + value);
  const smooth = values.map(() => null);
  there.forEach(([, index], place) => {
    const near = Math.min(reach, place, there.length - 1 - place);
    smooth[index] = (sums[place + near + 1] - sums[place - near]) / (2 * near + 1);
  });
  return smooth;
}

// spec: {title, subtitle, unit, kind, low, high, log, series, smoothing, x: {name, format}, legend}
// series: [{label, color, dash, x, y, lo, hi}], one colour class and one value of x for each y.
class Chart {
  static all = new Set();

  constructor(host, spec) {
    this.spec = spec;
    this.series = spec.series.filter((one) => one.y.some((value) => value !== null));
    this.figure = el("figure", { "data-title": spec.title });
    host.append(this.figure);
    Chart.all.add(this);
    this.draw();
  }
  remove() { this.figure.remove(); Chart.all.delete(this); }

  draw() {
    const { spec } = this;
    const caption = el("figcaption", {}, el("b", {}, spec.title), el("i", {}, spec.subtitle || ""), this.legend());
    this.scales();
    const label = spec.title + ": " + this.series.map((one) => one.label + " " + short(lastOf(one.y))).join(", ");
    this.hover = svgEl("g", { class: "hover" });
    this.svg = svgEl("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, tabindex: 0 },
      this.axes(), spec.kind === "stack" ? this.bars() : this.lines(), this.hover);
    this.svg.addEventListener("pointermove", (event) => this.pointed(event));
    this.svg.addEventListener("pointerleave", clearAll);
    this.svg.addEventListener("blur", clearAll);
    this.svg.addEventListener("keydown", (event) => this.pressed(event));
    this.figure.replaceChildren(caption, this.svg);
  }
  legend() {
    const entries = this.series.map((one) => {
      const text = [one.label, el("em", {}, one.figure || short(lastOf(one.y)))];
      if (!this.spec.toggle) return el("span", { class: `swatch ${one.color}` }, text);
      return el("button", { type: "button", class: `swatch ${one.color}`, "aria-pressed": String(!one.off),
        onclick: () => { one.off = !one.off; this.draw(); } }, text);
    });
    return el("div", { class: "legend" }, entries);
  }
  // A few points, such as those of evaluations, are not smoothed into each other.
  reach(one) { return Math.min(this.spec.smoothing || 0, Math.floor(one.y.filter((value) => value !== null).length / 10)); }
  get drawn() { return this.series.filter((one) => !one.off); }

  scales() {
    const { spec } = this;
    const xs = this.series.flatMap((one) => one.x.filter((_, index) => one.y[index] !== null));
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    if (!(right > left)) { left -= 1; right += 1; }
    this.xRange = [left, right];
    if (spec.kind === "stack") { const half = (right - left) / Math.max(1, this.series[0].x.length - 1) / 2; this.xRange = [left - half, right + half]; }
    const values = spec.kind === "stack"
      ? this.series[0].x.map((_, index) => this.drawn.reduce((sum, one) => sum + (one.y[index] || 0), 0))
      : this.drawn.flatMap((one) => [...one.y, ...(one.lo || []), ...(one.hi || [])]).filter((value) => value !== null);
    const positive = values.filter((value) => value > 0);
    this.log = Boolean(spec.log && positive.length);
    if (this.log) this.ticks = powersOfTen(least(positive), most(positive));
    else if (spec.kind === "stack") this.ticks = roundTicks(0, most(values) || 1);
    else {
      const [low, high] = widened(values.length ? least(values) : 0, values.length ? most(values) : 1);
      this.ticks = roundTicks(spec.low ?? low, spec.high ?? (high > (spec.low ?? low) ? high : (spec.low ?? low) + 1));
    }
    this.yRange = [this.ticks[0], this.ticks[this.ticks.length - 1]];
  }
  x(value) { const [low, high] = this.xRange; return LEFT + ((value - low) / (high - low)) * (WIDTH - RIGHT - LEFT); }
  y(value) {
    let [low, high] = this.yRange;
    if (this.log) [low, high, value] = [Math.log10(low), Math.log10(high), Math.log10(Math.max(value, low))];
    return HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
  }
  axes() {
    const parts = [];
    this.ticks.forEach((tick, index) => {
      const y = this.y(tick).toFixed(1);
      parts.push(svgEl("line", { class: index ? "grid" : "base", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
      parts.push(svgEl("text", { x: LEFT - 8, y: Number(y) + 4, "text-anchor": "end" }, short(tick)));
    });
    const [low, high] = this.xRange;
    for (const tick of roundTicks(low, high, 6)) {
      if (tick < low || tick > high || (this.spec.x.whole && tick !== Math.round(tick))) continue;
      parts.push(svgEl("text", { x: this.x(tick), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, this.spec.x.tick(tick)));
    }
    return parts;
  }
  lines() {
    const parts = [];
    for (const one of [...this.drawn].reverse()) {
      const reach = this.reach(one);
      if (one.lo) parts.push(svgEl("path", { class: `band ${one.color}`, d: this.band(one) }));
      const classes = `line ${one.color} dash${one.dash || 0}`;
      if (reach) parts.push(svgEl("path", { class: classes + " pale", d: this.path(one.x, one.y) }));
      const y = reach ? smoothed(one.y, reach) : one.y;
      parts.push(svgEl("path", { class: classes, d: this.path(one.x, y) }));
      if (y.filter((value) => value !== null).length <= 25) {
        y.forEach((value, index) => { if (value !== null) parts.push(this.dot(one, one.x[index], value, 3)); });
      }
    }
    return parts;
  }
  path(xs, ys) {
    let moves = "";
    ys.forEach((value, index) => {
      if (value !== null) moves += `${moves ? "L" : "M"}${this.x(xs[index]).toFixed(1)} ${this.y(value).toFixed(1)} `;
    });
    return moves;
  }
  band(one) {
    const at = one.y.map((_, index) => index).filter((index) => one.lo[index] !== null);
    const up = at.map((index) => `${this.x(one.x[index]).toFixed(1)} ${this.y(one.hi[index]).toFixed(1)}`);
    const down = at.reverse().map((index) => `${this.x(one.x[index]).toFixed(1)} ${this.y(one.lo[index]).toFixed(1)}`);
    return "M" + [...up, ...down].join("L") + "Z";
  }
  dot(one, x, value, r) {
    return svgEl("circle", { class: `dot ${one.color}`, cx: this.x(x).toFixed(1), cy: this.y(value).toFixed(1), r });
  }
  bars() {
    const parts = [], xs = this.series[0].x, base = xs.map(() => 0);
    // The last bucket may be shorter than the others: no bar is wider than the way to its neighbour.
    const room = (WIDTH - RIGHT - LEFT) / Math.max(1, xs.length);
    const widths = xs.map((x, index) => Math.min(room, index ? this.x(x) - this.x(xs[index - 1]) : room));
    for (const one of this.drawn) {
      one.y.forEach((value, index) => {
        if (!value) return;
        const [top, bottom] = [this.y(base[index] + value), this.y(base[index])];
        base[index] += value;
        if (bottom - top < 0.05) return;
        const width = widths[index], gap = Math.min(1.5, width * 0.15);
        parts.push(svgEl("rect", { class: one.color, x: (this.x(xs[index]) - width / 2).toFixed(1), y: top.toFixed(1),
          width: Math.max(0.5, width - gap).toFixed(1), height: (bottom - top).toFixed(1) }));
      });
    }
    return parts;
  }
  pointed(event) {
    const box = this.svg.getBoundingClientRect();
    const raw = ((event.clientX - box.left) / box.width) * WIDTH;
    const [low, high] = this.xRange;
    showAll(this, Math.min(high, Math.max(low, low + ((raw - LEFT) / (WIDTH - RIGHT - LEFT)) * (high - low))));
  }
  pressed(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || !this.drawn.length) return;
    event.preventDefault();
    const xs = this.drawn[0].x;
    const at = this.at === undefined ? (move > 0 ? -1 : xs.length) : nearest(xs, this.at);
    showAll(this, xs[Math.min(xs.length - 1, Math.max(0, at + move))]);
  }
  clear() { this.hover.replaceChildren(); this.tip?.remove(); this.tip = null; this.at = undefined; }
  show(x, own) {
    this.clear();
    this.at = x;
    const rows = [];
    let anchor = null, sum = 0;
    for (const one of this.drawn) {
      const there = one.x.map((_, index) => index).filter((index) => one.y[index] !== null);
      if (!there.length) continue;
      const index = there[nearest(there.map((place) => one.x[place]), x)];
      const reach = this.spec.kind === "stack" ? 0 : this.reach(one);
      const value = reach ? smoothed(one.y, reach)[index] : one.y[index];
      anchor ??= one.x[index];
      sum += value;
      if (this.spec.kind !== "stack") this.hover.append(this.dot(one, one.x[index], value, 4));
      rows.push([one.label, value]);
    }
    if (anchor === null || anchor < this.xRange[0] || anchor > this.xRange[1]) return;
    const at = this.x(anchor);
    this.hover.prepend(svgEl("line", { class: "cross", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }));
    if (!own) return;
    if (this.spec.kind === "stack" && rows.length > 1) rows.push(["sum", sum]);
    const unit = this.spec.unit ? " " + this.spec.unit : "";
    this.tip = el("div", { class: "tip", role: "status" }, el("b", {}, this.spec.x.say(anchor)),
      rows.map(([label, value]) => el("div", {}, el("span", {}, label), el("span", {}, short(value) + unit))));
    this.figure.append(this.tip);
    const box = this.svg.getBoundingClientRect(), card = this.figure.getBoundingClientRect();
    const left = box.left - card.left + (at * box.width) / WIDTH;
    this.tip.style.top = box.top - card.top + 8 + "px";
    this.tip.style.left = (left + 14 + this.tip.offsetWidth > card.width ? left - 14 - this.tip.offsetWidth : left + 14) + "px";
  }
}
const least = (values) => values.reduce((a, b) => Math.min(a, b));
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
function lastOf(values) { for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i]; return null; }
function nearest(xs, x) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
}
function clearAll() { for (const chart of Chart.all) chart.clear(); }
function showAll(own, x) { for (const chart of Chart.all) if (chart.spec.x.name === own.spec.x.name) chart.show(x, chart === own); }

function segments(name, label, options, chosen, onchange) {
  const inputs = options.map(([value, text]) => el("label", {}, el("input", { type: "radio", name, value,
    checked: value === chosen, onchange: () => onchange(value) }), text));
  return el("fieldset", {}, el("legend", {}, label), el("div", { class: "segments" }, inputs));
}
