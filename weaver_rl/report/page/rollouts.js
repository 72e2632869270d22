// One page to browse rollouts: filter, sort, go through them, see one beside its group. Texts are decoded when asked for.
const ROWS_SHOWN = 200;
const SORTS = [["order", "order of the run"], ["high", "reward, highest first"], ["low", "reward, lowest first"], ["advantage", "advantage, largest first"],
  ["weight", "importance weight, largest first"], ["long", "longest first"], ["short", "shortest first"]];

class Browser {
  constructor(data, host) {
    this.index = data.rollouts;
    this.runs = data.runs;
    this.count = this.index.id.length;
    this.chunks = new Map();
    this.mode = "logprob";
    this.host = host;
    if (!this.count) { host.append(el("p", { class: "empty" }, "No rollouts are in this page.")); return; }
    this.chunkSize = data.chunkSize;
    this.build();
    // What was trained on first; held-out completions are one choice away.
    if (this.index.phase.includes("train")) document.getElementById("f-phase").value = "train";
    this.apply();
  }
  detail(number) {
    const size = this.chunkSize, chunk = Math.floor(number / size);
    if (!this.chunks.has(chunk)) this.chunks.set(chunk, JSON.parse(document.getElementById("chunk-" + chunk).textContent));
    return this.chunks.get(chunk)[number % size];
  }
  completion(number) {
    const detail = this.detail(number);
    return detail.text ?? detail.texts.join("");
  }

  build() {
    const distinct = (name) => [...new Set(this.index[name])];
    const changed = () => this.apply();
    const select = (id, label, options) => el("label", {}, label, el("select", { id, onchange: changed }, options.map(([value, text]) => el("option", { value }, text))));
    const any = ["", "any"];
    const bound = (id, label) => el("input", { type: "number", id, step: "any", "aria-label": label, placeholder: label, oninput: changed });
    this.list = el("ul", { class: "list", role: "listbox", tabindex: 0, "aria-label": "Rollouts" });
    this.counted = el("div", { class: "count", role: "status" });
    const filters = el("div", { class: "filters" },
      el("label", { class: "wide" }, "Search in prompts and completions", el("input", { type: "search", id: "f-text", placeholder: "press / to search", oninput: changed })),
      this.runs.length > 1 ? select("f-run", "Run", [any, ...this.runs.map((run, number) => [number, run.name])]) : null,
      select("f-step", "Step", [any, ...distinct("step").map((step) => [step, step])]),
      select("f-phase", "Phase", [any, ...distinct("phase").map((phase) => [phase, phase])]),
      select("f-group", "Group", [any, ...distinct("group").filter(Boolean).map((group) => [group, group])]),
      select("f-state", "Which", [any, ["trained", "trained on"], ["dropped", "dropped"], ["missing", "a reward is missing"], ["length", "cut at the length limit"], ["lag", "several versions"]]),
      el("label", {}, "Reward", el("span", { class: "pair" }, bound("f-low", "from"), bound("f-high", "to"))),
      select("f-sort", "Sort", SORTS));
    // In another order people look for its beginning, not for where the rollout of before has gone.
    filters.addEventListener("input", (event) => { if (event.target.id === "f-sort") this.current = undefined; });
    this.view = el("article", { class: "card detail", "aria-live": "polite" });
    this.host.append(el("div", { class: "browser" }, el("div", { class: "card" }, filters, this.counted, this.list), this.view));
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest("li");
      if (row) this.show(Number(row.dataset.place));
    });
    this.list.addEventListener("keydown", (event) => this.pressed(event));
    document.addEventListener("keydown", (event) => { if (!event.defaultPrevented) this.pressed(event); });
  }
  value(id) { return document.getElementById(id)?.value ?? ""; }

  apply() {
    const { index } = this;
    const number = (id) => (this.value(id) === "" ? null : Number(this.value(id)));
    const [run, step, phase, group, state] = ["f-run", "f-step", "f-phase", "f-group", "f-state"].map((id) => this.value(id));
    const [low, high] = [number("f-low"), number("f-high")];
    const words = this.value("f-text").toLowerCase();
    const states = {
      trained: (i) => index.dropped[i] === null && index.phase[i] === "train", dropped: (i) => index.dropped[i] !== null,
      missing: (i) => Boolean(index.missing[i]), length: (i) => index.stop[i] === "length", lag: (i) => Array.isArray(this.detail(i).versions),
    };
    this.found = [];
    for (let i = 0; i < this.count; i++) {
      if (run !== "" && index.run[i] !== Number(run)) continue;
      if (step !== "" && index.step[i] !== Number(step)) continue;
      if (phase !== "" && index.phase[i] !== phase) continue;
      if (group !== "" && index.group[i] !== group) continue;
      if (low !== null && !(index.reward[i] !== null && index.reward[i] >= low)) continue;
      if (high !== null && !(index.reward[i] !== null && index.reward[i] <= high)) continue;
      if (state && !states[state](i)) continue;
      if (words && !(this.detail(i).prompt + "\n" + this.completion(i)).toLowerCase().includes(words)) continue;
      this.found.push(i);
    }
    this.sort();
    const kept = this.found.indexOf(this.current);
    this.counted.textContent = this.found.length === this.count ? `${this.count.toLocaleString("en")} rollouts` : `${this.found.length.toLocaleString("en")} of ${this.count.toLocaleString("en")} rollouts`;
    this.first = null;
    if (this.found.length) this.show(Math.max(0, kept));
    else { this.list.replaceChildren(); this.view.replaceChildren(el("p", { class: "note" }, "No rollout matches.")); this.current = undefined; }
  }
  sort() {
    const { index } = this;
    const keys = { high: [index.reward, -1], low: [index.reward, 1], advantage: [index.advantage, -1], weight: [index.iw, -1], long: [index.length, -1], short: [index.length, 1] };
    const key = keys[this.value("f-sort")];
    if (!key) return;
    const [values, sign] = key;
    // What has no value comes last, whichever way.
    this.found.sort((a, b) => (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
  }
  fillList() {
    const first = Math.floor(this.place / ROWS_SHOWN) * ROWS_SHOWN;
    if (first !== this.first) {
      this.first = first;
      this.list.replaceChildren(...this.found.slice(first, first + ROWS_SHOWN).map((number, offset) => this.row(number, first + offset)));
    }
    for (const row of this.list.children) row.setAttribute("aria-selected", String(Number(row.dataset.place) === this.place));
    const row = document.getElementById("row-" + this.place);
    this.list.setAttribute("aria-activedescendant", row.id);
    // Within the list alone: the page itself must not jump.
    if (row.offsetTop < this.list.scrollTop + this.list.offsetTop) this.list.scrollTop = row.offsetTop - this.list.offsetTop;
    const below = row.offsetTop + row.offsetHeight - this.list.offsetTop - this.list.clientHeight;
    if (below > this.list.scrollTop) this.list.scrollTop = below;
  }
  row(number, place) {
    const { index } = this;
    const lost = index.phase[number] === "eval" ? "held out" : index.dropped[number] !== null ? "dropped" : index.missing[number] ? "missing" : "";
    const prompt = this.detail(number).prompt.replace(/\s+/g, " ").slice(-60);
    return el("li", { role: "option", id: "row-" + place, "data-place": place, "aria-selected": "false" },
      el("span", { class: "reward" }, short(index.reward[number])), el("span", {}, signed(index.advantage[number])),
      el("span", { class: "text" }, `${prompt} → ${this.completion(number).slice(0, 60)}`), el("span", { class: lost === "held out" ? "step" : lost ? "lost" : "step" }, lost || `step ${index.step[number]}`));
  }
  pressed(event) {
    if (this.host.closest("section").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (typing) { if (event.key === "Escape") { event.target.blur(); this.list.focus({ preventScroll: true }); } return; }
    const moves = { j: 1, n: 1, k: -1, p: -1 };
    if (event.target === this.list) Object.assign(moves, { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity });
    if (event.key in moves && this.found.length) {
      event.preventDefault();
      this.show(Math.min(this.found.length - 1, Math.max(0, this.place + moves[event.key])));
    } else if (event.key === "/") {
      event.preventDefault();
      document.getElementById("f-text").focus();
    } else if (event.key >= "1" && event.key <= String(MODES.length)) {
      event.preventDefault();
      document.querySelectorAll('input[name="mode"]')[Number(event.key) - 1].click();
    }
  }
  show(place) {
    this.place = place;
    this.current = this.found[place];
    this.fillList();
    this.fillView(this.current);
  }
  siblings(number) {
    const { index } = this;
    if (!index.group[number] || index.phase[number] === "eval") return [number];
    const found = [];
    for (let i = 0; i < this.count; i++) {
      if (index.group[i] === index.group[number] && index.step[i] === index.step[number] && index.run[i] === index.run[number]) found.push(i);
    }
    return found.sort((a, b) => index.sample[a] - index.sample[b]);
  }
  fillView(number) {
    const { index } = this, detail = this.detail(number), group = this.siblings(number);
    const strongest = Math.max(...group.flatMap((i) => [this.detail(i).weights ?? 0].flat().map(Math.abs)));
    const tokens = new Tokens(detail, this.mode, strongest);
    const facts = [["reward", short(index.reward[number])], ["advantage", signed(index.advantage[number])],
      ["importance weight", signed(index.iw[number])], ["tokens", `${index.length[number]}, ${index.stop[number]}`],
      ["step", index.step[number]], ["phase", index.phase[number]], ["group", index.group[number] || "–"], ["sampler", index.sampler[number]]];
    if (this.runs.length > 1) facts.unshift(["run", this.runs[index.run[number]].name]);
    const modes = segments("mode", "Colour by", MODES, this.mode, (mode) => { this.mode = mode; tokens.color(mode); });
    this.view.replaceChildren(
      el("header", {}, el("h2", {}, index.id[number]), el("span", { class: "keys" }, `${this.place + 1} of ${this.found.length} · j next · k previous · / search · 1–${MODES.length} colours`)),
      el("div", { class: "facts" }, facts.map(([name, value]) => el("span", {}, name + " ", el("b", {}, String(value))))),
      index.dropped[number] === null ? "" : el("p", { class: "missing" }, "Not trained on: " + index.dropped[number]),
      el("h3", {}, "Prompt"), el("div", { class: "prompt", tabindex: 0, role: "group", "aria-label": "Prompt" }, detail.prompt),
      el("h3", {}, "Completion"), el("div", { class: "controls" }, modes), tokens.scale, tokens.box, tokens.info,
      detail.text === undefined ? "" : el("div", {}, el("h3", {}, "Text as stored (the tokens alone do not give it)"), el("div", { class: "prompt" }, detail.text)),
      detail.answer === null ? "" : el("div", {}, el("h3", {}, "Answer"), el("div", { class: "prompt" }, detail.answer)),
      el("h3", {}, "Reward components"), this.components(detail), ...this.beside(number, group));
  }
  components(detail) {
    return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["component", "value", "seconds"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, detail.parts.map(([name, value, missing, seconds]) => el("tr", {}, el("th", { scope: "row" }, name),
        value === null ? el("td", { class: "missing" }, "missing: " + missing) : el("td", {}, short(value)), el("td", {}, short(seconds)))))));
  }
  beside(number, group) {
    if (group.length < 2) return [];
    const { index } = this;
    const cards = group.map((i) => el("button", { type: "button", "aria-current": String(i === number), onclick: () => this.jump(i) },
      el("span", {}, "reward ", el("b", {}, short(index.reward[i])), " advantage ", el("b", {}, signed(index.advantage[i]))),
      el("pre", {}, this.completion(i).slice(0, 200) || " ")));
    return [el("h3", {}, `The group: ${group.length} rollouts of this prompt`), el("div", { class: "siblings" }, cards)];
  }
  jump(number) {
    const place = this.found.indexOf(number);
    if (place >= 0) { this.show(place); return; }
    for (const id of ["f-text", "f-run", "f-step", "f-phase", "f-group", "f-state", "f-low", "f-high"]) {
      const input = document.getElementById(id);
      if (input) input.value = "";
    }
    this.current = number;
    this.apply();
  }
}
