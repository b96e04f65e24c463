// The playground: streams text from the server, colours each token by its surprisal, and shows details of the chosen one.

const $ = (selector, within = document) => within.querySelector(selector);
const make = (name, has = {}, ...inside) => {
  const element = Object.assign(document.createElement(name), has);
  element.append(...inside);
  return element;
};
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "tokens", "seed"];
const SYMBOLS = { " ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "": "\u2205" };
const NAMES = { " ": "space", "\n": "newline", "\t": "tab", "\r": "carriage return", "": "part of a character" };
const seen = (text) => [...text].map((each) => SYMBOLS[each] ?? each).join("") || SYMBOLS[""];
const said = (text) => (text.trim() ? text : [...text].map((each) => NAMES[each] ?? each).join(" ") || NAMES[""]);
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "<0.1%");
const bits = (p) => -Math.log2(Math.max(p, 1e-45));

let runs = {};
let token = sessionStorage.getItem("token") ?? "";
// Not URLSearchParams, which reads + as a space.
const given = plain(location.hash.match(/^#token=(.*)/)?.[1] ?? "");
if (given) {
  sessionStorage.setItem("token", (token = given));
  history.replaceState(null, "", location.pathname);
}
addEventListener("hashchange", () => location.reload()); // a token given to the open page

function plain(given) {
  try {
    return decodeURIComponent(given);
  } catch {
    return given; // a literal %
  }
}

async function ask(path, tree, signal) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  if (tree) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method: tree ? "POST" : "GET", headers, body: tree && JSON.stringify(tree), signal });
  if (answer.status === 401) {
    await admitted();
    return ask(path, tree, signal);
  }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `the server answered ${answer.status}`);
  return answer;
}

function admitted() {
  const door = $("#door");
  $(".fault", door).hidden = !token;
  if (!door.open) door.showModal();
  return new Promise((done) => door.addEventListener("close", () => {
    sessionStorage.setItem("token", (token = $("#token").value));
    done();
  }, { once: true }));
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (held + value).split("\n\n");
    held = whole.pop();
    for (const each of whole) {
      const [, name, data] = each.match(/^event: (.*)\ndata: (.*)$/);
      yield [name, JSON.parse(data)];
    }
  }
}

// The next frame, so that the page stays responsive; or a moment later in a hidden tab.
const painted = () => new Promise((done) => (requestAnimationFrame(() => setTimeout(done)), setTimeout(done, 250)));

class Pane {
  constructor(run) {
    this.root = $("#pane").content.cloneNode(true).firstElementChild;
    for (const name of ["fault", "text", "heard", "sum", "on", "inside", "likely", "none", "looked", "most", "heads", "key"])
      this[name] = $(`.${name}`, this.root);
    this.text.addEventListener("click", (event) => this.choose(this.spans.indexOf(event.target)));
    this.text.addEventListener("keydown", (event) => this.press(event));
    this.on.onclick = () => this.write(this.tokens.map((each) => each.id), this.tokens);
    $(".shut", this.root).onclick = () => (this.shut(), this.text.focus());
    this.use(run);
  }

  use(run) {
    this.stop();
    this.leaving = null;
    this.run = runs[run];
    $("h2", this.root).textContent = run;
    const { layers, heads, parameters, block_size, vocabulary, problem } = this.run;
    const shape = layers ? `${count(layers, "layer")} of ${count(heads, "head")}` : "a bigram table";
    $(".facts", this.root).textContent = problem ? "" :
      `${count(parameters, "parameter")}, ${shape}, context ${block_size}, vocabulary ${vocabulary.toLocaleString("en")}`;
    this.text.setAttribute("aria-label", `Tokens of ${run}. Arrow keys move, Enter shows details.`);
    this.show([]);
    this.fail(problem ?? "");
  }

  fail(fault) {
    this.fault.textContent = fault;
    this.fault.hidden = !fault;
  }

  show(tokens) {
    this.shut();
    this.tokens = [];
    this.spans = [];
    this.priced = this.bits = 0;
    this.text.replaceChildren();
    this.add(tokens);
    this.sum.textContent = this.heard.textContent = this.done = "";
    this.on.hidden = true;
    this.key.hidden = !tokens.length;
  }

  add(tokens) {
    const low = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    const all = document.createDocumentFragment();
    for (const each of tokens) {
      const span = make("span", { role: "option", textContent: each.text, id: `t${Pane.ids++}` });
      span.setAttribute("aria-selected", false);
      span.setAttribute("aria-label", said(each.text) + (each.p === undefined ? "" : `, ${percent(each.p)}`));
      span.classList.toggle("mine", each.p === undefined);
      span.classList.toggle("chosen", !!each.chosen);
      span.classList.toggle("feed", each.text === "\n");
      if (each.p !== undefined) {
        span.style.setProperty("--s", Math.min(1, bits(each.p) / 8));
        this.priced += 1;
        this.bits += bits(each.p);
      }
      this.spans.push(span);
      this.tokens.push(each);
      all.append(span);
    }
    this.text.append(all);
    this.key.hidden = false;
    if (low) this.text.scrollTop = this.text.scrollHeight;
  }

  // Continues a prompt, a text or ids; `kept` are the tokens of it that are shown already.
  async write(prompt, kept = []) {
    this.stop();
    this.fail("");
    this.show(kept);
    const leaving = (this.leaving = new AbortController());
    const settings = Object.fromEntries(NUMBERS.map((name) => [name, Number($(`#${name}`).value)]));
    let began = 0, written = 0, timed = 0, failed = false; // timed from the second piece on: the first may wait for compilation
    busy();
    try {
      for await (const [name, data] of events(await ask("api/write", { run: this.run.name, prompt, ...settings }, leaving.signal))) {
        if (leaving.signal.aborted) break; 
        if (name === "start") this.show(data.prompt.map(([id, text], i) => ({ id, ...kept[i], text })));
        else if (name === "tokens") {
          this.add(data.tokens.map((each) => ({ ...each, from: data.from })));
          if (began) timed += data.tokens.length;
          else if (written) began = performance.now();
          written += data.tokens.length;
        } else if (data.text) this.text.append(data.text); // an incomplete character at the end
        if (data.error) this.fail(data.error), (failed = true);
        this.account(timed, performance.now() - began);
        await painted();
      }
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error.message), (failed = true);
    }
    if (this.leaving !== leaving) return;
    this.leaving = null;
    this.heard.textContent = this.text.textContent;
    this.on.hidden = !this.spans.length;
    this.done = failed ? "" : `Sampled ${count(written, "token")} from ${this.run.name}.`;
    busy();
  }

  account(timed, spent) {
    const speed = timed && spent > 50 ? `, ${Math.round((1000 * timed) / spent).toLocaleString("en")} tokens/s` : "";
    if (this.priced) this.sum.textContent = `${count(this.priced, "token")}${speed}, ${(this.bits / this.priced).toFixed(2)} bits/token`;
  }

  stop() {
    this.leaving?.abort();
  }

  press(event) {
    const last = this.spans.length - 1, at = this.here ?? last;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, ArrowUp: this.line(at, -1), ArrowDown: this.line(at, 1) }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (to !== undefined) this.move(Math.max(0, Math.min(last, to)), !this.inside.hidden);
    else if (event.key === "Enter" || event.key === " ") this.choose(at, true);
    else if (event.key === "Escape" && !this.inside.hidden) this.shut();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // The nearest token on the line above or below token `at`.
  line(at, way) {
    const { offsetTop: top, offsetLeft: left } = this.spans[at] ?? {};
    let best = at, line;
    for (let i = at + way; this.spans[i]; i += way) {
      const { offsetTop, offsetLeft } = this.spans[i];
      if (offsetTop === top) continue;
      line ??= offsetTop;
      if (offsetTop !== line) break;
      if (best === at || Math.abs(offsetLeft - left) < Math.abs(this.spans[best].offsetLeft - left)) best = i;
    }
    return best;
  }

  move(i, look) {
    this.spans[this.here]?.classList.remove("here");
    this.here = i;
    const span = this.spans[i];
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    this.text.setAttribute("aria-activedescendant", span.id);
    clearTimeout(this.soon);
    if (look) this.soon = setTimeout(() => this.choose(i), 120);
  }

  shut() {
    clearTimeout(this.soon);
    this.looking?.abort();
    this.inside.hidden = true;
    this.root.classList.remove("attention", "open");
    this.spans?.[this.chosen]?.setAttribute("aria-selected", false);
    this.spans?.[this.here]?.classList.remove("here");
    this.chosen = this.here = undefined;
    this.text.removeAttribute("aria-activedescendant");
  }

  async choose(i, focus = false) {
    const token = this.tokens[i];
    if (!token) return;
    this.looking?.abort();
    const { signal } = (this.looking = new AbortController());
    this.spans[this.chosen]?.setAttribute("aria-selected", false);
    this.chosen = i;
    this.move(i);
    this.spans[i].setAttribute("aria-selected", true);
    const from = Math.max(token.from ?? 0, i - this.run.block_size);
    const context = this.tokens.slice(from, i);
    $("h3", this.inside).replaceChildren(make("code", { textContent: seen(token.text || token.shown || "") }),
      token.p === undefined ? " in the prompt" : ` has probability ${percent(token.p)}, ${bits(token.p).toFixed(1)} bits`);
    this.likely.replaceChildren();
    this.none.hidden = i > 0;
    this.none.textContent = "The first token: the model did not predict it.";
    this.looked.hidden = true;
    if (token.likely) this.list(i, token.likely);
    this.inside.hidden = false;
    this.root.classList.add("open");
    if (focus) $("h3", this.inside).focus();
    if (!i) return this.root.classList.remove("attention");
    try {
      const looked = await (await ask("api/look", { run: this.run.name, ids: context.map((each) => each.id) }, signal)).json();
      if (signal.aborted) return;
      this.fail("");
      if (!token.likely) this.list(i, looked.likely);
      this.draw(looked.attention, from, i);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.fail(error.message);
      this.root.classList.remove("attention"); // of another token
    }
  }

  list(i, likely) {
    const token = this.tokens[i];
    const all = likely.some((each) => each.id === token.id) || token.p === undefined ? likely : [...likely, token];
    this.likely.replaceChildren(...all.map((each) => {
      const same = each.id === token.id;
      const button = make("button", { type: "button", disabled: same }, make("code", { textContent: each.shown ?? seen(each.text) }), percent(each.p));
      button.style.setProperty("--p", each.p);
      button.setAttribute("aria-label", `${each.shown ?? said(each.text)}, ${percent(each.p)}: ${same ? "the current token" : "continue with this token"}`);
      button.title = same ? "The current token" : "Continue with this token";
      button.onclick = () => {
        const kept = [...this.tokens.slice(0, i), { ...each, likely, from: token.from, chosen: true }];
        this.write(kept.map(({ id }) => id), kept);
        this.text.focus();
      };
      return make("li", {}, button);
    }));
  }

  // Attention (L, H, T) to the tokens from position `from` on: a strip for each head, and the chosen one on the text.
  draw(weights, from, i) {
    const L = weights.length, H = weights[0]?.length ?? 0;
    this.looked.hidden = !L;
    if (!L) return this.root.classList.remove("attention");
    const T = weights[0][0].length, cells = weights.flat();
    const mean = Array.from({ length: T }, (_, t) => cells.reduce((sum, each) => sum + each[t], 0) / cells.length);
    const cell = (row, name, which, checked) => {
      const most = row.indexOf(Math.max(...row));
      const radio = make("input", { type: "radio", name: `head-${this.text.firstChild.id}`, checked, onchange: () => this.over(row, from, which) });
      radio.setAttribute("aria-label", `${which}, most at ${said(this.tokens[from + most].text)}, ${percent(row[most])}`);
      const label = make("label", { className: name, title: which }, radio);
      label.style.backgroundImage = strip(row);
      return label;
    };
    this.heads.style.setProperty("--n", H);
    this.heads.setAttribute("aria-label", "Head whose attention is shown on the text");
    this.heads.replaceChildren(make("span", { textContent: "mean" }), cell(mean, "mean", "the mean of all heads", true),
      ...weights.flatMap((heads, l) => [make("span", { textContent: l + 1 }), ...heads.map((row, h) => cell(row, "", `layer ${l + 1}, head ${h + 1}`, false))]));
    this.over(mean, from, "the mean of all heads");
  }

  over(row, from, which) {
    const most = Math.max(...row);
    this.spans.forEach((span, i) => {
      span.classList.toggle("past", i < this.chosen);
      span.style.setProperty("--a", Math.sqrt((row[i - from] ?? 0) / most));
    });
    const best = row.map((w, t) => [w, t]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    this.most.replaceChildren(`${which[0].toUpperCase()}${which.slice(1)}: `,
      ...best.flatMap(([w, t], n) => [n ? ", " : "", make("code", { textContent: seen(this.tokens[from + t].text) }), ` ${percent(w)}`]));
    this.root.classList.add("attention");
  }
}
Pane.ids = 0;

// A row of weights as a gradient, the oldest token on the left; of several in one stop, the largest.
function strip(row) {
  const n = Math.min(row.length, 64), most = Math.max(...row);
  const stops = Array.from({ length: n }, (_, k) => {
    const part = row.slice(Math.floor((k * row.length) / n), Math.floor(((k + 1) * row.length) / n));
    const share = Math.round(100 * Math.sqrt(Math.max(...part) / most));
    return `color-mix(in srgb, var(--look) ${share}%, transparent) ${(100 * k) / n}% ${(100 * (k + 1)) / n}%`;
  });
  return `linear-gradient(to right, ${stops.join(",")})`;
}

let panes = [];
function busy() {
  const writing = panes.filter((pane) => pane.leaving).map((pane) => pane.run.name);
  $("#stop").disabled = !writing.length;
  $("#status").textContent = writing.length ? `Sampling from ${writing.join(" and ")}\u2026` : panes.map((pane) => pane.done).join(" ");
}

function arrange() {
  const chosen = [$("#run").value, $("#beside").value].filter(Boolean);
  panes.slice(chosen.length).forEach((pane) => (pane.stop(), pane.root.remove()));
  panes = chosen.map((run, i) => {
    if (!panes[i]) return $("#panes").appendChild((panes[i] = new Pane(run)).root), panes[i];
    if (panes[i].run.name !== run) panes[i].use(run);
    return panes[i];
  });
  busy();
}

async function begin() {
  const data = await (await ask("api/runs")).json();
  runs = Object.fromEntries(data.runs.map((run) => [run.name, run]));
  $("#run").append(...data.runs.map(({ name }) => new Option(name)));
  $("#beside").append(new Option("no other run", ""), ...data.runs.map(({ name }) => new Option(name)));
  const first = data.runs.find(({ problem }) => !problem);
  if (first) $("#run").value = first.name;
  for (const name of NUMBERS) {
    const input = $(`#${name}`), output = $(`output[for=${name}]`);
    const off = { top_k: 0, top_p: 1, min_p: 0 }[name];
    input.value = data.defaults[name];
    const showValue = () => output && (output.value = Number(input.value) === off ? "off" : name === "temperature" && input.value === "0" ? "greedy" : input.value);
    input.oninput = showValue;
    showValue();
  }
  $("#tokens").max = data.limits.max_tokens;
  const wide = matchMedia("(min-width: 50rem)");
  $("#settings").open = wide.matches;
  $("#settings").addEventListener("invalid", () => ($("#settings").open = true), true); // or nothing would be shown
  wide.onchange = () => ($("#settings").open ||= wide.matches); // the wide layout has no toggle
  $("#run").onchange = $("#beside").onchange = arrange;
  $("#roll").onclick = () => ($("#seed").value = crypto.getRandomValues(new Uint32Array(1))[0]);
  $("#stop").onclick = () => panes.forEach((pane) => pane.stop());
  $("#ask").onsubmit = (event) => {
    event.preventDefault();
    panes.forEach((pane) => pane.write($("#prompt").value || pane.run.start));
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") panes.forEach((pane) => pane.stop());
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#ask")) $("#ask").requestSubmit();
  });
  arrange();
  $("#write").disabled = false; // until now, a click would have sent the form and loaded the page anew
}

begin().catch((error) => ($("#status").textContent = error.message));
