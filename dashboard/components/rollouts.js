// Rollouts token by token: coloured, walked with the arrow keys, each with a strip of its values by position.
// Text of rollouts is only ever set as textContent. The focused token stands in the URL as at=SAMPLE:POSITION.
const NUMBERS = { f4: Float32Array, i4: Int32Array };
const MARKS = { "\n": "⏎\n", "\t": "⇥\t", "\r": "␍" };
const STRIP_HEIGHT = 26; // px

function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => ![null, undefined, false, ""].includes(child)));
  return node;
}

function numbers({ dtype, bdata }) {
  return new NUMBERS[dtype](Uint8Array.from(atob(bdata), (character) => character.charCodeAt(0)).buffer);
}

function visible(text) {
  if (text === "") return "∅";
  if (!text.trim()) text = text.replaceAll(" ", "·");
  return text.replace(/[\n\t\r]/g, (mark) => MARKS[mark]);
}

class Rollouts {
  constructor(root) {
    this.root = root;
    this.told = null; // the place that the server last asked to show
    this.at = null; // {rollout, place}: the token that has the focus
    this.widths = new ResizeObserver((entries) => {
      for (const { target } of entries) this.drawStrip(target.rlvrRollout);
    });
  }

  update(data) {
    const same = this.data?.id === data.id;
    this.data = data;
    if (!same) this.build();
    this.paint();
    if (data.at !== this.told) {
      this.told = data.at;
      this.show(data.at);
    }
  }

  build() {
    this.at = null;
    this.told = null;
    this.widths.disconnect();
    this.values = Object.fromEntries(Object.entries(this.data.values).map(([key, packed]) => [key, numbers(packed)]));
    this.values.surprisal = this.values.logprob?.map((value) => -value);
    let start = 0;
    this.rollouts = this.data.rollouts.map((about, number) => {
      const rollout = { ...about, number, start };
      start += about.kept;
      return rollout;
    });
    this.style = h("style");
    this.legend = h("div", { class: "rlvr-legend" });
    this.panel = h("div", { class: "rlvr-values", role: "status" });
    const cards = this.rollouts.map((rollout) => this.card(rollout));
    this.root.replaceChildren(this.style, this.legend, this.panel, h("div", { class: "rlvr-cards" }, ...cards));
    this.tell(null);
  }

  card(rollout) {
    const { sample, correct, truncated, figures, texts, kept, completion } = rollout;
    const head = h("div", { class: "rlvr-card-head" },
      h("b", {}, `Rollout ${sample}`),
      correct !== null && h("span", { class: correct ? "rlvr-right" : "rlvr-wrong" }, correct ? "✓ correct" : "✗ incorrect"),
      truncated === true && h("span", { class: "rlvr-cut" }, "✂ truncated"),
      h("span", { class: "rlvr-figures" }, figures));
    if (!kept) {
      return h("section", { class: "rlvr-card" }, head,
        h("p", { class: "rlvr-figures" }, "No tokens of this rollout are recorded. This is its text:"),
        h("div", { class: "rlvr-tokens" }, completion));
    }
    rollout.spans = texts.map((text) => h("span", {}, visible(text)));
    rollout.box = h("div", { class: "rlvr-tokens", tabindex: 0, role: "group", "aria-label": `Tokens of rollout ${sample}: the arrow keys walk` }, ...rollout.spans);
    rollout.strip = h("canvas", { class: "rlvr-strip", "aria-hidden": "true" });
    rollout.strip.rlvrRollout = rollout;
    this.widths.observe(rollout.strip);
    const placeOf = (event) => {
      if (event.currentTarget === rollout.strip) {
        return Math.min(kept - 1, Math.floor((event.offsetX / rollout.strip.clientWidth) * kept));
      }
      return rollout.spans.indexOf(event.target.closest(".rlvr-tokens > span"));
    };
    for (const node of [rollout.box, rollout.strip]) {
      node.addEventListener("pointermove", (event) => {
        const place = placeOf(event);
        if (place >= 0) this.tell({ rollout, place });
      });
      node.addEventListener("pointerleave", () => this.tell(this.at));
      node.addEventListener("click", (event) => {
        const place = placeOf(event);
        if (place >= 0 && !String(getSelection())) this.focus(rollout, place);
      });
    }
    rollout.box.addEventListener("keydown", (event) => this.key(rollout, event));
    rollout.box.addEventListener("focus", () => {
      if (this.at?.rollout !== rollout) this.focus(rollout, 0);
    });
    return h("section", { class: "rlvr-card" }, head, rollout.strip, rollout.box);
  }

  // --- colours ---

  paint() {
    const { colours, borders, legend, title, lit, accent, faint } = this.data;
    for (const name of ["mark", "good", "warning"]) this.root.style.setProperty(`--rlvr-${name}`, this.data[name]);
    this.style.textContent = colours.map(([back, front], level) =>
      `.rlvr-tokens .rlvr-t${level} { ${level ? `background: ${back}; ` : ""}color: ${front}; } .rlvr-legend .rlvr-t${level} { background: ${back}; }`).join("\n");
    this.legend.replaceChildren(h("b", {}, title), ...legend.map(([level, text]) =>
      h("span", {}, h("i", { class: `rlvr-t${level}` }), text)));
    const readable = this.rollouts.some((rollout) => rollout.kept);
    for (const node of [this.legend, this.panel]) node.style.display = readable ? "" : "none";
    this.stripColours = { accent, faint };
    const values = this.values[this.data.colour];
    const shown = lit && this.values[lit.key];
    for (const rollout of this.rollouts) {
      if (!rollout.kept) continue;
      rollout.levels = Array.from({ length: rollout.kept }, (_, i) => borders.filter((border) => values?.[rollout.start + i] >= border).length);
      rollout.spans.forEach((span, i) => {
        const value = shown && shown[rollout.start + i];
        const hit = shown && value >= (lit.low ?? -Infinity) && value < (lit.high ?? Infinity);
        span.className = `rlvr-t${rollout.levels[i]}${hit ? " rlvr-lit" : ""}`;
      });
      this.drawStrip(rollout);
    }
    this.mark();
  }

  drawStrip(rollout) {
    const { strip, levels, kept, start } = rollout;
    const width = strip.clientWidth, scale = devicePixelRatio || 1;
    if (!width || !levels) return;
    strip.width = width * scale;
    strip.height = STRIP_HEIGHT * scale;
    const pen = strip.getContext("2d");
    pen.scale(scale, scale);
    const step = width / kept, top = this.data.colours.length - 1;
    for (let i = 0; i < kept; i++) {
      const counts = !this.values.weight || this.values.weight[start + i] > 0; // of a run without weights all do
      pen.fillStyle = counts ? this.stripColours.accent : this.stripColours.faint;
      const height = 2 + (STRIP_HEIGHT - 2) * (levels[i] / top);
      pen.fillRect(i * step, STRIP_HEIGHT - height, Math.max(1, step - (step > 3 ? 1 : 0)), height);
    }
    if (this.at?.rollout === rollout) {
      pen.fillStyle = this.data.mark;
      pen.fillRect(this.at.place * step + step / 2 - 1, 0, 2, STRIP_HEIGHT);
    }
  }

  // --- the focused token ---

  key(rollout, event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    const place = this.at?.rollout === rollout ? this.at.place : 0;
    if (event.key in moves) {
      event.preventDefault();
      this.focus(rollout, Math.min(rollout.kept - 1, Math.max(0, place + moves[event.key])));
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const readable = this.rollouts.filter((other) => other.kept);
      const next = readable[readable.indexOf(rollout) + (event.key === "ArrowDown" ? 1 : -1)];
      if (next) this.focus(next, Math.min(next.kept - 1, place));
    }
  }

  focus(rollout, place) {
    const before = this.at?.rollout;
    this.at = { rollout, place };
    if (document.activeElement !== rollout.box) rollout.box.focus({ preventScroll: true });
    const url = new URLSearchParams(location.search);
    url.set("at", `${rollout.sample}:${this.position(rollout, place)}`);
    this.told = url.get("at");
    history.replaceState(history.state, "", `${location.pathname}?${url}`);
    if (before && before !== rollout) this.drawStrip(before);
    this.mark();
    this.tell(this.at);
    const box = rollout.spans[place].getBoundingClientRect();
    if (box.top < this.panel.getBoundingClientRect().bottom || box.bottom > innerHeight) rollout.spans[place].scrollIntoView({ block: "center" });
  }

  mark() {
    this.marked?.classList.remove("rlvr-at");
    if (!this.at) return;
    this.marked = this.at.rollout.spans[this.at.place];
    this.marked.classList.add("rlvr-at");
    this.drawStrip(this.at.rollout);
  }

  show(text) {
    const [sample, position] = (text || "").split(":").map(Number);
    const rollout = this.rollouts.find((one) => one.kept && one.sample === sample);
    if (!rollout) return;
    for (let place = 0; place < rollout.kept; place++) {
      if (this.position(rollout, place) === position) this.focus(rollout, place);
    }
  }

  position(rollout, place) {
    return this.values.position[rollout.start + place];
  }

  tell(at) {
    if (!at) {
      this.panel.replaceChildren("Point at a token, or click one and walk with the arrow keys.");
      return;
    }
    const { rollout, place } = at;
    // what the run did not record of the token is left out
    const figure = (name, key, text) => {
      const value = this.values[key]?.[rollout.start + place];
      return Number.isFinite(value) && h("span", {}, `${name} `, h("b", {}, text(value)));
    };
    const nats = (digits) => (value) => `${value.toFixed(digits)} nats`;
    const alive = this.values.alive ? `, ${this.values.alive[rollout.start + place]} alive` : "";
    this.panel.replaceChildren(
      h("code", {}, visible(rollout.texts[place])),
      h("span", {}, `position ${this.position(rollout, place)} of rollout ${rollout.sample}`),
      ...[
        figure("p", "logprob", (value) => Math.exp(value).toFixed(4)),
        figure("surprisal", "surprisal", nats(3)),
        figure("entropy", "entropy", nats(4)),
        figure("Rényi-2", "renyi2", (value) => value.toFixed(4)),
        figure("deviation", "deviation", (value) => nats(4)(value) + alive),
        figure("weight", "weight", (value) => String(Number(value.toPrecision(4)))),
      ].filter(Boolean));
  }
}

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".rlvr-rollouts");
  root.rlvrRollouts ??= new Rollouts(root);
  root.rlvrRollouts.update(data);
}
