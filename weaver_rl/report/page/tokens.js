// The tokens of one completion, coloured by a figure of theirs. Knows one rollout, not the list of them.
const MODES = [
  ["logprob", "log-probability"], ["gap", "learner − sampler"], ["weight", "importance weight"], ["version", "version"], ["none", "none"],
];
const LOWEST = -5; // Log-probability from which a token is coloured in full: one in 150.

const at = (values, index) => (Array.isArray(values) ? values[index] : values);

class Tokens {
  // `strongest` is the largest |importance weight| among the rollouts of the group: siblings compare by eye.
  constructor(detail, mode, strongest) {
    Object.assign(this, { detail, mode, strongest });
    this.spans = detail.texts.map((text, index) => this.token(text, index));
    this.box = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "Completion, token by token: left and right arrow move between tokens",
      onkeydown: (event) => this.pressed(event) }, this.spans, detail.cut ? el("span", { class: "chip" }, `… ${detail.cut} more tokens`) : null);
    this.box.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".token");
      if (span) this.point(this.spans.indexOf(span));
    });
    this.info = el("div", { class: "token-info", role: "status" });
    this.scale = el("div", { class: "scale" });
    this.color(mode);
    this.say(null);
  }
  token(text, index) {
    const label = this.detail.labels[index];
    return el("span", { class: "token" }, label === undefined ? text : el("span", { class: "chip" }, label));
  }
  get gaps() { return this.detail.gaps; }

  color(mode) {
    this.mode = mode;
    const { detail } = this;
    const widest = detail.gaps ? Math.max(...detail.gaps.map((gap) => Math.abs(gap ?? 0)), 1e-12) : 0;
    const newest = Math.max(...[detail.versions].flat());
    this.spans.forEach((span, index) => {
      span.className = "token";
      let share = 0;
      const tint = (name, part) => { span.classList.add(name); share = part; };
      if (mode === "logprob") tint("heat", Math.min(1, detail.logprobs[index] / LOWEST));
      if (mode === "gap" && detail.gaps) tint(detail.gaps[index] < 0 ? "minus" : "plus", Math.abs(detail.gaps[index]) / widest);
      if (mode === "weight" && detail.weights !== undefined) tint(at(detail.weights, index) < 0 ? "minus" : "plus", Math.abs(at(detail.weights, index)) / (this.strongest || 1));
      if (mode === "version") tint("v" + ((newest - at(detail.versions, index)) % 6), 0.55);
      span.style.setProperty("--share", Math.round(85 * Math.min(1, share)) + "%");
    });
    this.scale.replaceChildren(...this.legend(mode, widest, newest));
  }
  legend(mode, widest, newest) {
    const { detail } = this;
    const ramp = (kind, low, high) => [el("span", {}, low), el("span", { class: "ramp " + kind }), el("span", {}, high)];
    if (mode === "logprob") return ramp("heat", "0 (certain)", `${short(LOWEST)} nat and below`);
    if (mode === "gap") return detail.gaps ? ramp("both", short(-widest), `+${short(widest)} nat`) : ["The learner’s log-probabilities were not measured: this rollout was not in its batch."];
    if (mode === "weight" && detail.weights !== undefined && !this.strongest) return ["0 in the whole group: every rollout earned the same, so there is nothing to learn."];
    if (mode === "weight") return detail.weights === undefined ? ["No importance weights: this rollout was not trained on."] : ramp("both", short(-this.strongest), `+${short(this.strongest)}`);
    if (mode === "version") return [...new Set([detail.versions].flat())].sort((a, b) => b - a).map((version) =>
      el("span", { class: "swatch v" + ((newest - version) % 6) }, el("span", { class: "token v" + ((newest - version) % 6) }, `v${version}`)));
    return [];
  }
  point(index) {
    this.spans[this.pointed]?.classList.remove("at");
    this.pointed = index;
    this.spans[index].classList.add("at");
    this.say(index);
  }
  say(index) {
    if (index === null) { this.info.replaceChildren("Point at a token, or go through them with the arrow keys, for its numbers."); return; }
    const { detail } = this;
    const facts = [["token", `${index + 1} of ${this.spans.length}`], ["text", JSON.stringify(detail.labels[index] ?? detail.texts[index])],
      ["id", detail.ids[index]], ["sampler", short(detail.logprobs[index]) + " nat"], ["probability", short(Math.exp(detail.logprobs[index]))]];
    if (detail.gaps) {
      facts.push(["learner", short(detail.logprobs[index] + detail.gaps[index]) + " nat"], ["learner − sampler", signed(detail.gaps[index]) + " nat"],
        ["ratio", Math.exp(detail.gaps[index]).toPrecision(6)]);
    }
    if (detail.weights !== undefined) facts.push(["importance weight", signed(at(detail.weights, index))]);
    facts.push(["version", "v" + at(detail.versions, index)]);
    this.info.replaceChildren(...facts.map(([name, value]) => el("span", {}, name + " ", el("b", {}, String(value)))));
  }
  pressed(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || !this.spans.length) return;
    event.preventDefault();
    event.stopPropagation();
    const from = this.pointed ?? (move > 0 ? -1 : this.spans.length);
    this.point(Math.min(this.spans.length - 1, Math.max(0, from + move)));
    this.spans[this.pointed].scrollIntoView({ block: "nearest" });
  }
}
