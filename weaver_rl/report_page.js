// Values under the pointer, in every chart at the same step.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const charts = [...document.querySelectorAll("figure[data-chart]")].map((figure) => {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg");
  return { figure, data, svg, hover: svg.querySelector(".hover"), tip: null };
});
const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};
const scale = ([low, high, from, to], value, log) => {
  const f = log ? (v) => Math.log10(Math.max(v, low)) : (v) => v;
  return from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
};
const nearest = (points, step) => {
  let best = null;
  for (const point of points) if (!best || Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
  return best;
};
function add(parent, name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
}
function clear(chart) {
  chart.hover.replaceChildren();
  if (chart.tip) { chart.tip.remove(); chart.tip = null; }
}
function show(chart, step, own) {
  clear(chart);
  const { data, hover } = chart;
  if (step < data.x[0] || step > data.x[1]) return;
  const anchor = nearest(data.series[0].points, step);
  const x = scale(data.x, data.stacked ? anchor[0] : step, false);
  add(hover, "line", { class: "cross", x1: x, x2: x, y1: data.y[3], y2: data.y[2] });
  const rows = [];
  let sum = 0;
  for (const series of data.series) {
    const point = nearest(series.points, step);
    if (!point) continue;
    sum += point[1];
    if (!data.stacked) {
      add(hover, "circle", { class: "dot c" + series.color, cx: scale(data.x, point[0], false),
        cy: scale(data.y, point[1], data.log), r: 4 });
    }
    rows.push([series.label, point[1]]);
  }
  if (!own) return;
  if (data.stacked) rows.push(["sum", sum]);
  const tip = document.createElement("div");
  tip.className = "tip";
  const head = document.createElement("b");
  head.textContent = "step " + anchor[0];
  tip.append(head);
  for (const [label, value] of rows) {
    const row = document.createElement("div");
    const [name, figure] = [document.createElement("span"), document.createElement("span")];
    name.textContent = label;
    figure.textContent = short(value) + (data.unit ? " " + data.unit : "");
    row.append(name, figure);
    tip.append(row);
  }
  chart.figure.append(tip);
  chart.tip = tip;
  const box = chart.svg.getBoundingClientRect();
  const card = chart.figure.getBoundingClientRect();
  const at = box.left - card.left + (x * box.width) / chart.svg.viewBox.baseVal.width;
  tip.style.top = box.top - card.top + 8 + "px";
  tip.style.left = (at + 14 + tip.offsetWidth > card.width ? at - 14 - tip.offsetWidth : at + 14) + "px";
}
for (const chart of charts) {
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.svg.viewBox.baseVal.width;
    const [low, high, from, to] = chart.data.x;
    const raw = low + ((x - from) / (to - from)) * (high - low);
    const anchor = nearest(chart.data.series[0].points, Math.min(high, Math.max(low, raw)));
    for (const other of charts) show(other, anchor[0], other === chart);
  });
  chart.svg.addEventListener("pointerleave", () => charts.forEach(clear));
}
