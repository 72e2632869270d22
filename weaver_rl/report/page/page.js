// Puts the page together: tabs, and each part when it is first looked at.
const data = JSON.parse(document.getElementById("data").textContent);
const tabs = [...document.querySelectorAll('[role="tab"]')];
const parts = {
  curves: () => new Curves(data, document.getElementById("curve-controls"), document.getElementById("charts")),
  time: () => { stageCharts(document.getElementById("stages")); new Ledger(data, document.getElementById("ledger")); },
  rollouts: () => new Browser(data, document.getElementById("browser")),
  configuration: () => {},
};
const built = new Set();

function stageCharts(host) {
  const [phase] = data.phases;
  const figure = phase.figures.find((one) => one.title === STAGES);
  if (!figure) return;
  const grid = el("div", { class: "charts" });
  host.append(el("h2", {}, "Stages of a step", el("small", {}, "what the run was doing, whoever did it")), grid);
  data.runs.forEach((run, number) => {
    const curves = phase.curves[number];
    const lines = figure.lines.filter((line) => curves.series[line.names[0]]);
    const spent = (place) => lines.reduce((sum, line) => sum + (curves.series[line.names[0]].y[place] || 0), 0);
    const timed = curves.step.map((_, place) => place).filter((place) => spent(place) > 0);
    if (!timed.length) return;
    const whole = timed.map(spent);
    const series = lines.map((line) => ({ label: line.label, color: `c${line.color}`, x: timed.map((place) => curves.step[place]),
      y: timed.map((place) => curves.series[line.names[0]].y[place]) }));
    const all = total(whole);
    for (const one of series) one.figure = percent(total(one.y) / all);
    const name = data.runs.length > 1 ? run.name + ": " : "";
    const spec = { kind: "stack", toggle: true, x: AXES.step };
    new Chart(grid, { ...spec, title: name + STAGES, subtitle: "seconds by stage", unit: "s", series });
    new Chart(grid, { ...spec, title: name + "Share of a step", subtitle: "% by stage", unit: "%",
      series: series.map((one) => ({ ...one, y: one.y.map((value, place) => (100 * (value || 0)) / whole[place]) })) });
  });
}

function open(name) {
  for (const tab of tabs) {
    const chosen = tab.id === "tab-" + name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (!built.has(name)) { built.add(name); parts[name](); }
}
function openHash() {
  const name = location.hash.slice(1);
  open(name in parts ? name : "curves");
}
for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => { history.replaceState(null, "", "#" + tab.id.slice(4)); open(tab.id.slice(4)); });
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const next = tabs[(place + move + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}
window.addEventListener("hashchange", openHash);
openHash();
