"use strict";

const {texts, runs} = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("controls");
const panes = document.getElementById("panes");
const maps = document.getElementById("maps");
const detail = document.getElementById("detail");
const ALL = "all", BOTH = "both", DIFFERENCE = "difference";
const [LABEL, HEIGHT] = [32, 16];  // pixels of a map: left of it, for the layers' numbers; of a row
const two = runs.length === 2;
const layers = runs[0].texts[0].layers.map(found => found.layer);
const state = {text: 0, layer: ALL, run: two ? BOTH : "0", colour: "experts", token: 0};

const element = (name, text, classes) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (classes) made.className = classes;
  return made;
};
const number = (value, digits = 3) => value === null || value === undefined ? "" : Number(value.toPrecision(digits)).toString();
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const tokens = () => texts[state.text].tokens;
const name = run => two ? `${"AB"[run]}: ${runs[run].label}` : runs[run].label;
// A token without text goes on with the character of the one before it.
const GOES_ON = "‿";
const visible = token => token.replaceAll("\n", "⏎") || GOES_ON;

// What each pane shows: a run's number, or the difference of both.
const shown = () => state.run === BOTH ? [0, 1] : [state.run === DIFFERENCE ? DIFFERENCE : Number(state.run)];

const routed = run => runs[run].texts[state.text];
const layerOf = (run, layer) => routed(run).layers[layers.indexOf(layer)];
const expertsOf = (found, token) => found.rows[token].slice(0, found.counts[token]).map(row => row[0]);

// Experts of a token: of one layer, or the mean over all.
function countOf(run, layer, token) {
  if (layer !== ALL) return layerOf(run, layer).counts[token];
  return mean(routed(run).layers.map(found => found.counts[token]));
}

function valueOf(what, layer, token) {
  if (what === DIFFERENCE) {
    const [a, b] = [0, 1].map(run => valueOf(run, layer, token));
    return a === null || b === null ? null : b - a;
  }
  return state.colour === "loss" ? routed(what).loss[token] : countOf(what, layer, token);
}

function differs(token) {
  const chosen = state.layer === ALL ? layers : [state.layer];
  return two && chosen.some(layer => {
    const [a, b] = [0, 1].map(run => expertsOf(layerOf(run, layer), token));
    return a.length !== b.length || a.some(expert => !b.includes(expert));
  });
}

// The value that has the full colour. Losses above 10 nats look like 10, differences above 2 like 2.
function scale() {
  if (state.colour === "loss") return state.run === DIFFERENCE ? 2 : 10;
  const most = Math.max(...runs.map(run => run.max_k));
  return state.run === DIFFERENCE ? Math.max(1, most - 1) : most;
}

function shade(what, value) {
  if (value === null) return [0, "--accent"];
  return [Math.min(1, Math.abs(value) / scale()), what === DIFFERENCE && value > 0 ? "--more" : "--accent"];
}

function unit(value) {
  if (state.colour === "loss") return "nats";
  return value === 1 ? "expert" : "experts";
}

// Build the panes and the maps anew; everything else changes them in place.
function build() {
  panes.replaceChildren(...shown().map(what => {
    const pane = element("div", undefined, "pane");
    if (state.run === BOTH) pane.append(element("h3", name(what)));
    const line = element("p", undefined, "tokens");
    line.dataset.what = what;
    line.setAttribute("role", "group");
    line.setAttribute("aria-label", "Tokens; left and right choose one, up and down a layer");
    tokens().forEach((token, index) => {
      const span = element("span", token.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t") || GOES_ON, "token");
      span.dataset.index = index;
      span.setAttribute("role", "button");
      line.append(span);
    });
    pane.append(line);
    return pane;
  }));
  maps.replaceChildren(...shown().map(what => {
    const box = element("div");
    if (state.run === BOTH) box.append(element("h3", name(what)));
    const map = element("canvas", undefined, "map");
    map.dataset.what = what;
    map.setAttribute("role", "img");
    map.setAttribute("aria-label", `Heat map of ${layers.length} layers and ${tokens().length} tokens; the values are those of the tokens above`);
    box.append(map);
    return box;
  }));
}
const lines = () => [...panes.querySelectorAll(".tokens")];
const whatOf = found => found.dataset.what === DIFFERENCE ? DIFFERENCE : Number(found.dataset.what);

function paint() {
  const different = tokens().map((_, index) => differs(index));
  for (const line of lines()) {
    const what = whatOf(line);
    [...line.children].forEach((span, index) => {
      const value = valueOf(what, state.layer, index);
      const [strength, hue] = shade(what, value);
      span.style.setProperty("--shade", strength.toFixed(3));
      span.style.setProperty("--hue", `var(${hue})`);
      span.classList.toggle("differs", different[index]);
      const amount = value === null ? "no loss" : `${number(value)} ${unit(value)}`;
      span.setAttribute("aria-label", `${visible(tokens()[index])}: ${amount}${different[index] ? ", other experts" : ""}`);
    });
  }
  const difference = state.run === DIFFERENCE;
  const most = number(scale()), loss = state.colour === "loss";
  document.getElementById("least").textContent = difference ? `-${most} ${unit()}` : `0 ${unit()}`;
  document.getElementById("most").textContent = `${difference ? "+" : ""}${most} ${unit()}${loss ? " or more" : ""}`;
  document.querySelector(".legend .scale").classList.toggle("difference", difference);
}

function mark() {
  for (const line of lines()) {
    line.querySelector("[aria-current]")?.removeAttribute("aria-current");
    line.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    line.children[state.token].setAttribute("aria-current", "true");
    line.children[state.token].tabIndex = 0;
  }
}

function summarise() {
  const parts = runs.map((run, index) => {
    const counts = tokens().map((_, token) => countOf(index, state.layer, token));
    const losses = routed(index).loss.filter(loss => loss !== null);
    const loss = losses.length ? `, ${number(mean(losses), 4)} nats per token (perplexity ${number(Math.exp(mean(losses)), 4)})` : "";
    return `${two ? `${"AB"[index]}: ` : ""}${number(mean(counts), 3)} experts per token${loss}.`;
  });
  if (two) parts.push(`${tokens().filter((_, token) => differs(token)).length} of ${tokens().length} tokens have different experts.`);
  else parts.push(`${tokens().length} tokens.`);
  document.getElementById("summary").replaceChildren(...parts.flatMap(part => [part, element("br")]));
}

function row(cells, classes) {
  const made = element("tr", undefined, classes);
  made.append(...cells.map(cell => element("td", cell)));
  return made;
}

function table(names, rows) {
  const [made, head] = [element("table"), element("thead")];
  const titles = element("tr");
  for (const title of names) {
    const cell = element("th", title);
    cell.scope = "col";
    titles.append(cell);
  }
  head.append(titles);
  const body = element("tbody");
  body.append(...rows);
  made.append(head, body);
  return made;
}

function side(run) {
  const box = element("div");
  if (two) box.append(element("h3", name(run)));
  if (state.layer === ALL) {
    const rows = routed(run).layers.map(found =>
      row([found.layer, found.counts[state.token], expertsOf(found, state.token).join(", ")]));
    box.append(table(["layer", "number", "experts"], rows));
    return box;
  }
  const found = layerOf(run, state.layer);
  const other = two ? expertsOf(layerOf(1 - run, state.layer), state.token) : null;
  const of = found.rows[state.token];
  const weighed = of.some(one => one[1] !== null);
  const rows = of.map(([expert, weight, score, limit], rank) => {
    const out = rank >= found.counts[state.token];
    const cells = [out ? `${expert}, left out` : expert];
    if (weighed) cells.push(number(weight));
    if (found.score) cells.push(number(score));
    if (found.limit) cells.push(number(limit));
    return row(cells, out ? "out" : other && !other.includes(expert) ? "only" : "");
  });
  box.append(table(["expert", weighed ? "weight" : null, found.score, found.limit].filter(Boolean), rows));
  return box;
}

function describe() {
  const title = element("h2");
  title.append("Token ", String(state.token), " ", element("code", visible(tokens()[state.token])));
  const id = texts[state.text].ids[state.token];
  const losses = runs.map((_, run) => [routed(run).loss[state.token], "AB"[run]]).filter(pair => pair[0] !== null);
  const told = losses.map(([loss, letter]) => (two ? `${letter} ` : "") + number(loss)).join(", ");
  const where = state.layer === ALL ? "all layers" : `layer ${state.layer}`;
  const facts = [where, id === null ? "" : `token id ${id}`, told ? `loss ${told} nats` : "no loss"];
  const sides = element("div", undefined, "sides");
  sides.append(...runs.map((_, run) => side(run)));
  detail.replaceChildren(title, element("p", facts.filter(Boolean).join(", "), "small"), sides);
}

function cell() {
  const room = maps.clientWidth - LABEL;
  return Math.max(4, Math.min(16, Math.floor(room / tokens().length)));
}

function draw() {
  const size = cell(), length = tokens().length, ratio = window.devicePixelRatio || 1;
  const [width, tall] = [LABEL + size * length, HEIGHT * layers.length];
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  for (const map of maps.querySelectorAll("canvas")) {
    map.width = width * ratio;
    map.height = tall * ratio;
    map.style.width = `${width}px`;
    map.style.height = `${tall}px`;
    const context = map.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    layers.forEach((layer, y) => {
      context.globalAlpha = 1;
      context.fillStyle = colour(layer === state.layer ? "--text" : "--quiet");
      context.fillText((layer === state.layer ? "▸" : "") + layer, 2, HEIGHT * (y + .5));
      for (let token = 0; token < length; token++) {
        const [strength, hue] = shade(whatOf(map), valueOf(whatOf(map), layer, token));
        context.globalAlpha = strength;
        context.fillStyle = colour(hue);
        context.fillRect(LABEL + size * token, HEIGHT * y, size - (size > 6 ? 1 : 0), HEIGHT - 1);
      }
    });
    context.globalAlpha = 1;
    context.strokeStyle = colour("--text");
    context.strokeRect(LABEL + size * state.token - .5, .5, size, tall - 1);
  }
}

function show(anew = false) {
  if (anew) build();
  paint();
  mark();
  summarise();
  describe();
  draw();
}

function choose(token, focus = null) {
  state.token = Math.max(0, Math.min(tokens().length - 1, token));
  mark();
  describe();
  draw();
  if (focus) focus.children[state.token].focus();
}

function chooseLayer(layer) {
  state.layer = layer;
  form.elements.layer.value = String(layer);
  show();
}

const options = [ALL, ...layers];
for (const layer of options) {
  const option = element("option", layer === ALL ? "all layers" : `layer ${layer}`);
  option.value = String(layer);
  form.elements.layer.append(option);
}
form.addEventListener("change", () => {
  const {text, layer, run, colour} = form.elements;
  if (Number(text.value) !== state.text) state.token = 0;
  state.text = Number(text.value);
  state.layer = layer.value === ALL ? ALL : Number(layer.value);
  state.run = run.value;
  state.colour = colour.value;
  show(true);
});
form.addEventListener("submit", event => event.preventDefault());

for (const kind of ["pointerover", "focusin", "click"]) {
  panes.addEventListener(kind, event => {
    if (event.target.dataset.index === undefined) return;
    const index = Number(event.target.dataset.index);
    if (index !== state.token) choose(index, kind === "click" ? event.target.parentElement : null);
  });
}
panes.addEventListener("keydown", event => {
  const line = event.target.closest(".tokens");
  if (!line) return;
  const step = {ArrowRight: 1, ArrowLeft: -1, Home: -tokens().length, End: tokens().length}[event.key];
  const turn = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step) choose(state.token + step, line);
  else if (turn) {
    const place = options.indexOf(state.layer) + turn;
    chooseLayer(options[Math.max(0, Math.min(options.length - 1, place))]);
  } else return;
  event.preventDefault();
});

// The layer and the token of a map under the pointer.
function under(event) {
  const box = event.target.getBoundingClientRect();
  const token = Math.floor((event.clientX - box.left - LABEL) / cell());
  const place = Math.floor((event.clientY - box.top) / HEIGHT);
  const on = event.target.matches("canvas") && token >= 0 && token < tokens().length && place in layers;
  return on ? [layers[place], token] : null;
}
maps.addEventListener("pointermove", event => {
  const found = under(event);
  if (found && found[1] !== state.token) choose(found[1]);
});
maps.addEventListener("click", event => {
  const found = under(event);
  if (!found) return;
  state.token = found[1];
  chooseLayer(found[0]);
});
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
show(true);
