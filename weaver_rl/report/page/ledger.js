// The idle ledger: seconds of every actor by what it did, averaged over chosen steps and by step. It adds up, no more.
const SMALL = 0.005; // Of an actor's time: a state below it in every row has no column of its own.

class Ledger {
  constructor(data, host) {
    this.host = host;
    this.runs = data.runs.map((run, number) => ({ ...run, ledger: data.ledgers[number] })).filter((run) => run.ledger);
    if (!this.runs.length) return;
    this.choose(0);
  }
  choose(number) {
    this.run = this.runs[number];
    this.ledger = this.run.ledger;
    this.first = this.ledger.from[0];
    this.last = this.ledger.to[this.ledger.to.length - 1];
    this.from = this.ledger.training ?? this.first; // Samplers have nothing to do in a warm start.
    this.to = this.last;
    this.who = "role:" + this.ledger.actors[0].role;
    this.build();
  }
  build() {
    const bound = (key, label) => el("label", {}, label + " ", el("input", { type: "number", id: "ledger-" + key, min: this.first,
      max: this.last, value: this[key], onchange: (event) => {
        this[key] = Math.min(this.last, Math.max(this.first, Number(event.target.value) || this[key === "from" ? "first" : "last"]));
        this.fill();
      } }));
    const runs = this.runs.length < 2 ? [] : [el("label", {}, "Run ", el("select", { onchange: (event) => this.choose(Number(event.target.value)) },
      this.runs.map((run, number) => el("option", { value: number, selected: run === this.run }, run.name))))];
    this.bars = el("div", { class: "card" });
    this.table = el("div", { class: "scroll" });
    this.steps = el("div", {});
    this.host.replaceChildren(el("div", { class: "controls" }, runs, el("fieldset", {}, el("legend", {}, "Steps"), bound("from", "from"), bound("to", "to"))),
      this.bars, this.table, this.steps);
    this.fill();
  }
  // Seconds by state of some actors over the chosen buckets of steps.
  spent(actors, buckets) {
    return this.ledger.states.map((_, state) => {
      let sum = 0;
      for (const actor of actors) for (const bucket of buckets) sum += this.ledger.seconds[actor][state][bucket];
      return sum;
    });
  }
  get chosen() {
    return this.ledger.from.map((_, bucket) => bucket).filter((bucket) => this.ledger.to[bucket] >= this.from && this.ledger.from[bucket] <= this.to);
  }
  rows() {
    const roles = new Map();
    this.ledger.actors.forEach((actor, index) => roles.set(actor.role, [...(roles.get(actor.role) || []), index]));
    const rows = [];
    for (const [role, actors] of roles) {
      if (actors.length > 1) rows.push({ key: "role:" + role, label: `${role}, all ${actors.length}`, actors, whole: true });
      for (const index of actors) rows.push({ key: actors.length > 1 ? "actor:" + index : "role:" + role, label: this.ledger.actors[index].name, actors: [index] });
    }
    return rows;
  }
  color(state) {
    if (state.busy) return "c" + state.color;
    return `w${this.ledger.states.filter((other) => !other.busy).indexOf(state) % 8} wait`;
  }
  fill() {
    const buckets = this.chosen, { states } = this.ledger;
    const rows = this.rows().map((row) => {
      const seconds = this.spent(row.actors, buckets);
      const all = total(seconds);
      return { ...row, all, shares: seconds.map((spent) => (all ? spent / all : 0)) };
    });
    const covered = buckets.length ? `steps ${this.ledger.from[buckets[0]]} to ${this.ledger.to[buckets[buckets.length - 1]]}` : "no steps";
    this.bars.replaceChildren(el("div", { class: "legend" }, states.map((state) => el("span", { class: "swatch " + this.color(state) }, state.name))),
      el("h3", {}, `Average over ${covered}`),
      el("div", { class: "bars" }, rows.flatMap((row) => [el("span", {}, row.label), this.bar(row), el("span", {}, this.idle(row) + " idle")])));
    // States that are small in every row share a column: the row still adds up, and fits.
    const large = states.map((_, index) => index).filter((index) => rows.some((row) => row.shares[index] >= SMALL));
    const small = states.map((_, index) => index).filter((index) => !large.includes(index));
    const cells = (row) => [...large.map((index) => row.shares[index]), ...(small.length ? [total(small.map((index) => row.shares[index]))] : [])];
    const rest = small.length ? el("th", { scope: "col", title: small.map((index) => states[index].name).join(", ") }, `${small.length} smaller`) : null;
    const head = el("tr", {}, el("th", { scope: "col" }, "actor"), large.map((index) => el("th", { scope: "col" }, states[index].name)), rest,
      ["idle", "sum", "seconds"].map((name) => el("th", { scope: "col" }, name)));
    const body = rows.map((row) => el("tr", { class: row.whole && "whole" }, el("th", { scope: "row" }, row.label),
      cells(row).map((share) => el("td", { class: share < 0.0005 && "zero" }, percent(share))),
      el("td", {}, this.idle(row)), el("td", {}, percent(total(row.shares))), el("td", {}, short(row.all))));
    this.table.replaceChildren(el("table", { class: "numbers", id: "ledger-table" }, el("caption", { hidden: true }, "Share of the time of each actor by state"),
      el("thead", {}, head), el("tbody", {}, body)));
    this.byStep(rows);
  }
  bar(row) {
    const parts = row.shares.map((share, index) => {
      const part = el("span", { class: this.color(this.ledger.states[index]), title: `${this.ledger.states[index].name} ${percent(share)}` });
      part.style.width = 100 * share + "%";
      return part;
    });
    return el("div", { class: "bar", role: "img", "aria-label": `${row.label}: ` + row.shares.map((share, index) =>
      `${this.ledger.states[index].name} ${percent(share)}`).join(", ") }, parts);
  }
  idle(row) { return percent(total(row.shares.filter((_, index) => !this.ledger.states[index].busy))); }

  byStep(rows) {
    const options = rows.map((row) => el("option", { value: row.key, selected: row.key === this.who }, row.label));
    const grid = el("div", { class: "charts" });
    this.steps.replaceChildren(el("div", { class: "controls" }, el("label", {}, "By step, of ",
      el("select", { id: "ledger-who", onchange: (event) => { this.who = event.target.value; this.drawSteps(grid, rows); } }, options))), grid);
    this.drawSteps(grid, rows);
  }
  drawSteps(grid, rows) {
    for (const chart of this.charts || []) chart.remove();
    const row = rows.find((one) => one.key === this.who) || rows[0];
    const buckets = this.chosen;
    if (!buckets.length) return;
    const per = (bucket) => Math.max(1, this.ledger.to[bucket] - this.ledger.from[bucket] + 1) * row.actors.length;
    const series = this.ledger.states.map((state, index) => ({ label: state.name, color: this.color(state), figure: percent(row.shares[index]),
      x: buckets.map((bucket) => this.ledger.to[bucket]), y: buckets.map((bucket) => this.spent(row.actors, [bucket])[index] / per(bucket)) }))
      .filter((one) => one.y.some((value) => value > 0));
    const whole = buckets.map((_, place) => series.reduce((sum, one) => sum + one.y[place], 0) || 1);
    const spec = { title: row.label, kind: "stack", toggle: true, x: AXES.step };
    this.charts = [
      new Chart(grid, { ...spec, subtitle: "seconds of a step", unit: "s", series }),
      new Chart(grid, { ...spec, subtitle: "share of a step", unit: "%", high: 100,
        series: series.map((one) => ({ ...one, y: one.y.map((value, place) => (100 * value) / whole[place]) })) }),
    ];
  }
}
const percent = (share) => (100 * share).toFixed(1) + "%";
