// Curves of one run, or of several on the same axes. Knows metrics by the figures that the page was given.
const AXES = {
  step: { name: "step", whole: true, tick: short, say: (x) => "step " + x.toLocaleString("en") },
  time: { name: "time", tick: duration, say: (x) => duration(x) },
  tokens: { name: "tokens", tick: short, say: (x) => short(x) + " sampled tokens" },
};

// Drawn beside the ledger instead.
const STAGES = "Time of a step";

class Curves {
  constructor(data, controls, host) {
    Object.assign(this, { data, host });
    this.axis = "step";
    this.hidden = new Set();
    this.charts = [];
    const longest = (phase) => Math.max(...phase.curves.map((curve) => curve.step.length));
    this.smoothing = longest(data.phases[0]) > 150 ? Math.round(longest(data.phases[0]) / 40) : 0;
    if (Math.max(...data.phases.map(longest)) > 0) this.fillControls(controls);
    this.draw();
  }
  get several() { return this.data.runs.length > 1; }

  fillControls(controls) {
    const amount = el("output", {}, String(this.smoothing));
    const slider = el("input", { type: "range", min: 0, max: 50, value: this.smoothing, "aria-label": "Smoothing, steps on either side" });
    slider.addEventListener("input", () => { this.smoothing = Number(slider.value); amount.textContent = slider.value; this.draw(); });
    const runs = !this.several ? [] : [el("fieldset", { id: "run-toggles" }, el("legend", {}, "Runs"), this.data.runs.map((run, number) =>
      el("button", { type: "button", class: `toggle swatch c${run.color}`, "aria-pressed": "true", onclick: (event) => {
        if (!this.hidden.delete(number)) this.hidden.add(number);
        event.currentTarget.setAttribute("aria-pressed", String(!this.hidden.has(number)));
        this.draw();
      } }, run.name)))];
    controls.append(...runs,
      segments("axis", "Over", [["step", "steps"], ["time", "wall time"], ["tokens", "sampled tokens"]], this.axis,
        (axis) => { this.axis = axis; this.draw(); }),
      el("fieldset", {}, el("legend", {}, "Smoothing"), slider, amount));
  }
  draw() {
    for (const chart of this.charts) chart.remove();
    this.charts = [];
    const opened = Boolean(this.host.querySelector("details[open]"));
    this.host.replaceChildren();
    for (const phase of this.data.phases) {
      if (!phase.figures.length) continue;
      const grid = el("div", { class: "charts" });
      this.host.append(el("h2", {}, phase.title), grid);
      for (const figure of phase.figures) if (figure.title !== STAGES) this.drawFigure(grid, phase, figure);
    }
    this.drawOthers(opened);
  }
  drawFigure(grid, phase, figure) {
    const shown = this.data.runs.map((run, number) => ({ ...run, number })).filter((run) => !this.hidden.has(run.number));
    if (figure.kind === "stack" || !this.several) {
      for (const run of shown) {
        const subtitle = [figure.subtitle, this.several ? run.name : ""].filter(Boolean).join(" · ");
        this.add(grid, { ...figure, subtitle, toggle: true,
          series: this.ofRun(phase.curves[run.number], figure, (line) => ({ label: line.label, color: `c${line.color}` })) });
      }
      return;
    }
    const few = figure.lines.slice(0, figure.title === "Reward" ? 1 : 2);
    const dashed = few.length > 1 ? `; ${few[1].label} dashed` : "";
    this.add(grid, { ...figure, subtitle: figure.subtitle + dashed, series: shown.flatMap((run) =>
      this.ofRun(phase.curves[run.number], { ...figure, lines: few }, (line, index) =>
        ({ label: run.name + (index ? " " + line.label : ""), color: `c${run.color}`, dash: index }))) });
  }
  ofRun(curves, figure, look) {
    const xs = curves[this.axis];
    return figure.lines.map((line, index) => {
      const found = line.names.map((name) => curves.series[name]).filter(Boolean);
      const sum = (key) => xs.map((_, place) => {
        const values = found.map((one) => (one[key] || one.y)[place]).filter((value) => value !== null);
        return values.length ? values.reduce((a, b) => a + b, 0) : null;
      });
      const bounds = found.length === 1 && found[0].lo && figure.kind !== "stack" ? { lo: sum("lo"), hi: sum("hi") } : {};
      return { ...look(line, index), x: xs, y: found.length ? sum("y") : xs.map(() => null), ...bounds,
        ...(figure.kind === "stack" && { figure: "" }) };
    });
  }
  add(grid, spec) {
    const series = spec.series.filter((one) => one.y.some((value) => value !== null));
    if (!series.length) return;
    if (spec.kind === "stack") {
      const all = series.reduce((sum, one) => sum + total(one.y), 0) || 1;
      for (const one of series) one.figure = ((100 * total(one.y)) / all).toFixed(1) + "%";
    }
    this.charts.push(new Chart(grid, { ...spec, series, smoothing: this.smoothing, x: AXES[this.axis] }));
  }
  drawOthers(opened) {
    const phase = this.data.phases[0];
    const charted = new Set(phase.figures.flatMap((figure) => figure.lines.flatMap((line) => line.names)));
    const names = [...new Set(phase.curves.flatMap((curves) => Object.keys(curves.series)))].filter((name) => !charted.has(name)).sort();
    if (!names.length) return;
    const grid = el("div", { class: "charts" });
    const box = el("details", { open: opened }, el("summary", {}, `All other metrics (${names.length})`), grid);
    const fillGrid = () => {
      if (!box.open || grid.childElementCount) return;
      for (const name of names) {
        const [meaning, unit] = this.data.metrics[name] || ["", ""];
        this.drawFigure(grid, phase, { title: name, subtitle: meaning, unit: unit === "1" ? "" : unit, kind: "lines", low: null,
          high: null, log: false, lines: [{ label: "", names: [name], color: 0 }] });
      }
    };
    box.addEventListener("toggle", fillGrid);
    this.host.append(box);
    fillGrid();
  }
}
const total = (values) => values.reduce((sum, value) => sum + (value || 0), 0);
