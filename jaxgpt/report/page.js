"use strict";
// Draws the charts and shows details of the token that a reader points at. The page holds all data.
const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const percent = (p) => (p < 0.0005 ? "< 0.1%" : (100 * p).toFixed(p < 0.0995 ? 1 : 0) + "%");
const shown = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

function make(name, text, parent) {
  const node = document.createElement(name);
  node.textContent = text; // never markup, whatever a text holds
  parent?.append(node);
  return node;
}

// Charts.
for (const [name, spec] of Object.entries(read("charts") ?? {})) {
  const node = document.getElementById("chart-" + name);
  const actions = { export: true, source: false, compiled: false, editor: false };
  // ast: expressions are interpreted, so the page needs no eval, which its Content-Security-Policy forbids.
  if (node) window.vegaEmbed(node, spec, { renderer: "svg", actions, tooltip: { theme: "custom" }, ast: true });
}

// Printing shows only open details, so open all of them.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("section > details:not([open])")];
  for (const each of closed) each.open = true;
});
addEventListener("afterprint", () => { for (const each of closed) each.open = false; });

// A text of tokens: `show(i)` is called for the one under the pointer, a finger or the keyboard focus.
function choose(holder, show) {
  const spans = [...holder.querySelectorAll("[data-i]")];
  const pick = (i, focus) => {
    spans.forEach((span, j) => { span.tabIndex = i === j ? 0 : -1; span.classList.toggle("chosen", i === j); });
    if (focus) spans[i].focus();
    show(i, spans);
  };
  const at = (event) => spans.indexOf(event.target.closest("[data-i]"));
  for (const kind of ["pointerover", "click", "focusin"])
    holder.addEventListener(kind, (event) => { if (at(event) >= 0) pick(at(event), kind === "click"); });
  holder.addEventListener("keydown", (event) => {
    const ends = { Home: 0, End: spans.length - 1 };
    const to = ends[event.key] ?? at(event) + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0);
    if (to === at(event) || to < 0 || to >= spans.length) return;
    event.preventDefault();
    pick(to, true);
  });
  if (spans.length) spans[0].tabIndex = 0;
  return { pick, spans };
}

// Loss by token.
const passage = read("passage-data");
if (passage) {
  const answer = document.getElementById("passage-answer");
  choose(document.getElementById("passage"), (i) => {
    const loss = passage.losses[i];
    answer.replaceChildren();
    make("b", shown(passage.tokens[i]), answer);
    make("span", ` has probability ${percent(Math.exp(-loss))}, a loss of ${loss.toFixed(2)} nats. Most likely here:`, answer);
    const list = make("ol", "", answer);
    for (const [token, p] of passage.likely[i]) {
      const item = make("li", "", list);
      make("b", shown(token), item);
      make("span", " " + percent(p), item);
    }
  });
}

// Attention by layer and head: a byte for each weight, row by row up to the diagonal.
const attention = read("attention-data");
if (attention) {
  const { layers: L, heads: H, size: T } = attention;
  const bytes = Uint8Array.from(atob(attention.weights), (c) => c.charCodeAt(0));
  const weight = (l, h, t, s) => (s > t ? 0 : bytes[(l * H + h) * ((T * (T + 1)) / 2) + (t * (t + 1)) / 2 + s]);
  const buttons = [...document.querySelectorAll("#heads button")];
  let layer = 0, head = 0, token = T - 1;
  const map = document.getElementById("map");
  const most = (l, h, t) => Math.max(...Array.from({ length: t + 1 }, (_, s) => weight(l, h, t, s)));

  function accent() {
    const probe = make("i", "", document.body);
    probe.style.color = "var(--accent)";
    const rgb = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
    probe.remove();
    return rgb;
  }

  function paint(canvas, l, h, row) {
    const [r, g, b] = accent(), image = new ImageData(T, T);
    for (let t = 0; t < T; t++)
      for (let s = 0; s < T; s++) image.data.set([r, g, b, Math.max(weight(l, h, t, s), t === row ? 40 : 0)], 4 * (t * T + s));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  const answer = document.getElementById("attention-answer");
  const text = choose(document.getElementById("attention"), (i, spans) => {
    token = i;
    const weights = spans.map((_, s) => weight(layer, head, token, s) / 255);
    spans.forEach((span, s) => span.style.setProperty("--w", weights[s] / Math.max(...weights)));
    paint(map, layer, head, token);
    answer.replaceChildren();
    make("b", shown(attention.tokens[i]), answer);
    make("span", `, token ${i + 1}, in layer ${layer + 1}, head ${head + 1}, attends most to:`, answer);
    const list = make("ol", "", answer);
    const order = weights.map((w, s) => [w, s]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    for (const [w, s] of order.filter(([w]) => w > 0)) {
      const item = make("li", "", list);
      make("b", shown(attention.tokens[s]), item);
      make("span", ` (${s + 1}) ${percent(w)}`, item);
    }
  });

  function press(button) {
    [layer, head] = [Number(button.dataset.layer), Number(button.dataset.head)];
    for (const each of buttons) each.setAttribute("aria-pressed", each === button);
    text.pick(token, false);
  }

  function draw() {
    for (const each of buttons) paint(each.firstElementChild, Number(each.dataset.layer), Number(each.dataset.head), -1);
    paint(map, layer, head, token);
  }

  for (const button of buttons) button.addEventListener("click", () => press(button));
  map.addEventListener("click", (event) =>
    text.pick(Math.min(T - 1, Math.floor((event.offsetY / map.clientHeight) * T)), false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
  const sharp = (button) => most(Number(button.dataset.layer), Number(button.dataset.head), token);
  press(buttons.reduce((a, b) => (sharp(b) > sharp(a) ? b : a)));
}
