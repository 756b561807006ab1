"use strict";
// Draws what attribution_page.py embeds. Text of the model is only ever set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = data.nodes, n = nodes.layer.length, COMPARE = data.sets.length;
const rowOfLayer = [];
data.rows.forEach((row, at) => row.layers.forEach((layer) => { rowOfLayer[layer] = at; }));
const find = (id) => document.getElementById(id);
const view = find("view"), canvas = find("canvas"), room = find("room"), tip = find("tip"), pen = canvas.getContext("2d");
const slider = find("threshold"), zoom = find("zoom"), choice = find("set");
const GUTTER = Math.min(230, 20 + 7 * Math.max(...data.rows.map((row) => row.label.length)));
const BELOW = 86, ABOVE = 110, ROW = 30, BEND = 12, NEAR = 7;
const COLOURS = { positive: "#0072B2", negative: "#D55E00", all: "#000000", some: "#A0A0A0" };
const OF_SETS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#8A6D00", "#7F3C8D"];

let edges = [], pinned = null, hovered = null, hidden = new Set(), touched = new Uint8Array(n), waiting = false;

const number = (value) => String(Number(value.toPrecision(3)));
// A little less than where the slider stands, so that the edge whose size that is counts in spite of rounding.
const threshold = () => data.sizes.least * Math.pow(data.sizes.most / data.sizes.least, slider.value) * (1 - 1e-9);
const isComparison = () => Number(choice.value) === COMPARE;
const key = (source, target) => source * n + target;

// How many of a set's edges, which are sorted, have at least this size.
function countOf(values, least) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (Math.abs(values[middle]) >= least) low = middle + 1; else high = middle;
  }
  return low;
}

// The edges of one set that reach the threshold, strongest first.
function edgesOfSet(at, least) {
  const set = data.sets[at], k = countOf(set.value, least), found = [];
  for (let e = 0; e < k; e++) {
    const value = set.value[e];
    found.push({ source: set.source[e], target: set.target[e], size: Math.abs(value), values: [[at, value]],
      colour: value > 0 ? COLOURS.positive : COLOURS.negative });
  }
  return found;
}

// The edges that reach the threshold in some set; their kind says in which.
function comparedEdges(least) {
  const union = new Map();
  data.sets.forEach((set, at) => {
    for (const edge of edgesOfSet(at, least)) {
      const there = union.get(key(edge.source, edge.target));
      if (there === undefined) { union.set(key(edge.source, edge.target), edge); continue; }
      there.values.push(edge.values[0]);
      there.size = Math.max(there.size, edge.size);
    }
  });
  const found = [...union.values()];
  for (const edge of found) {
    edge.kind = edge.values.length === data.sets.length ? "all" : edge.values.length === 1 ? edge.values[0][0] : "some";
    edge.colour = edge.kind === "all" ? COLOURS.all : edge.kind === "some" ? COLOURS.some : OF_SETS[edge.kind % OF_SETS.length];
  }
  return found.sort((a, b) => b.size - a.size);
}

function update() {
  const least = threshold();
  let text;
  if (isComparison()) {
    const all = comparedEdges(least), counts = new Map();
    for (const edge of all) counts.set(edge.kind, (counts.get(edge.kind) || 0) + 1);
    edges = all.filter((edge) => !hidden.has(String(edge.kind)));
    text = `|attribution| ≥ ${number(least)}: ${all.length.toLocaleString("en")} edges in some set`;
    legendOfComparison(counts, all.length);
  } else {
    const set = data.sets[choice.value];
    edges = edgesOfSet(Number(choice.value), least);
    text = `|attribution| ≥ ${number(least)}: ${edges.length.toLocaleString("en")} of ${set.n_edges.toLocaleString("en")} edges`;
    legendOfSet(set);
  }
  find("shown").textContent = text;
  touched.fill(0);
  for (const edge of edges) { touched[edge.source] = 1; touched[edge.target] = 1; }
  hovered = null;
  if (pinned?.edge) pinned = null;  // edges are made anew
  draw();
}

function entry(colour, text) {
  const line = document.createElement("span"), swatch = document.createElement("i");
  swatch.style.background = colour;
  line.append(swatch, text);
  return line;
}

function legendOfSet(set) {
  find("legend").replaceChildren(
    entry(COLOURS.positive, "positive"), entry(COLOURS.negative, "negative"),
    `○ ghost: alive in the model itself, not in this set (${set.ghost.length.toLocaleString("en")})`);
  if (set.fault) find("legend").append(document.createElement("br"), `Note: ${set.fault}`);
}

function legendOfComparison(counts, total) {
  const kinds = [["all", `in all ${data.sets.length} sets`, COLOURS.all]];
  data.sets.forEach((set, at) => kinds.push([at, `only in ${set.name}`, OF_SETS[at % OF_SETS.length]]));
  if (data.sets.length > 2) kinds.push(["some", "in some", COLOURS.some]);
  find("legend").replaceChildren(...kinds.map(([kind, what, colour]) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.checked = !hidden.has(String(kind));
    box.addEventListener("change", () => { box.checked ? hidden.delete(String(kind)) : hidden.add(String(kind)); update(); });
    const count = (counts.get(kind) || 0).toLocaleString("en");
    label.append(box, entry(colour, `${what}: ${count} of ${total.toLocaleString("en")}`));
    return label;
  }));
}

// Places on the canvas, of which the part that is scrolled to is seen. Measured once a picture: asking the browser is slow.
const frame = { left: 0, bottom: 0, row: ROW, slot: 1, width: 0, height: 0 };
function measure() {
  frame.slot = Number(zoom.value);
  frame.width = view.clientWidth;
  frame.height = view.clientHeight;
  frame.row = Math.max(ROW, (frame.height - BELOW - ABOVE) / Math.max(1, data.rows.length - 1));
  frame.left = GUTTER - view.scrollLeft;
  frame.bottom = ABOVE + frame.row * (data.rows.length - 1) - view.scrollTop;
}
const yOfRow = (row) => frame.bottom - row * frame.row;
const xOf = (slots) => frame.left + slots * frame.slot;
const x = (node) => xOf(nodes.x[node]), y = (node) => yOfRow(rowOfLayer[nodes.layer[node]]);

function curve(edge) {
  const x0 = x(edge.source), y0 = y(edge.source), x1 = x(edge.target), y1 = y(edge.target);
  const bend = (y1 - y0) / 2;
  return [x0, y0, x0, y0 + bend, x1, y1 - bend, x1, y1];
}

function stroke(edge, opacity, width) {
  const [x0, y0, a, b, c, d, x1, y1] = curve(edge);
  if (Math.max(x0, x1) < 0 || Math.min(x0, x1) > frame.width) return;
  pen.globalAlpha = opacity;
  pen.lineWidth = width;
  pen.strokeStyle = edge.colour;
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.bezierCurveTo(a, b, c, d, x1, y1);
  pen.stroke();
}

const focus = () => pinned ?? hovered;
const isAt = (edge, end) => end.edge === edge || edge.source === end.node || edge.target === end.node;

function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawNow(); });
}

function drawNow() {
  measure();
  const scale = window.devicePixelRatio || 1, width = frame.width, tall = frame.height;
  room.style.width = `${Math.max(width, GUTTER + data.borders[data.borders.length - 1] * frame.slot + 20)}px`;
  room.style.height = `${Math.max(tall, ABOVE + BELOW + frame.row * (data.rows.length - 1))}px`;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(tall * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(tall * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${tall}px`;
  }
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.globalAlpha = 1;
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, tall);
  drawColumns(tall);
  const largest = edges.length ? edges[0].size : 1, at = focus();
  for (let e = edges.length - 1; e >= 0; e--) {
    const edge = edges[e], strength = Math.sqrt(edge.size / largest);  // else a single large one would leave all others faint
    if (!at) stroke(edge, 0.1 + 0.9 * strength, 0.5 + 2.5 * strength);
    else if (!isAt(edge, at)) stroke(edge, 0.04, 0.5);
  }
  if (at) for (const edge of edges) if (isAt(edge, at)) stroke(edge, 0.9, 1 + 2.5 * Math.sqrt(edge.size / largest));
  drawNodes(at);
  drawOutputs();
  drawLabels(tall);
}

function drawColumns(tall) {
  for (let p = 0; p < data.tokens.length; p += 2) {
    pen.fillStyle = "#f6f6f6";
    pen.fillRect(xOf(data.borders[p]), 0, (data.borders[p + 1] - data.borders[p]) * frame.slot, tall);
  }
}

const alive = () => isComparison() ? data.any_alive : data.sets[choice.value].alive;
const ghosts = () => isComparison() ? [] : data.sets[choice.value].ghost;

function drawNodes(at) {
  pen.globalAlpha = 1;
  pen.strokeStyle = "#999";
  pen.lineWidth = 1;
  for (const node of ghosts()) dot(node, 2.5, null);
  for (const node of alive()) dot(node, touched[node] ? 3 : 1.6, touched[node] ? "#222" : "#aaa");
  if (at && at.node !== undefined) { pen.strokeStyle = "#000"; pen.lineWidth = 2; dot(at.node, 6, null); }
}

function dot(node, radius, fill) {
  const left = x(node);
  if (left < 0 || left > frame.width) return;
  pen.beginPath();
  pen.arc(left, y(node), Math.min(radius, Math.max(1, frame.slot / 2)), 0, 2 * Math.PI);
  if (fill === null) pen.stroke(); else { pen.fillStyle = fill; pen.fill(); }
}

function turned(text, left, top, angle, align) {
  pen.save();
  pen.translate(left, top);
  pen.rotate(angle);
  pen.textAlign = align;
  pen.fillText(text, 0, 0);
  pen.restore();
}

function drawOutputs() {
  pen.fillStyle = "#000";
  pen.font = "11px system-ui, sans-serif";
  for (const node of alive()) {
    if (nodes.layer[node] !== data.output) continue;
    const p = isComparison() ? "" : ` ${Math.round(100 * probability(node))}%`;
    turned(shorten(data.output_tokens[nodes.component[node]]) + p, x(node) + 4, y(node) - 8, -Math.PI / 2, "left");
  }
}

function probability(node) { return data.sets[choice.value].probability[node]; }
const shorten = (text) => text.length > 14 ? `${text.slice(0, 13)}…` : text;

function drawLabels(tall) {
  pen.globalAlpha = 1;
  pen.font = "12px system-ui, sans-serif";
  const bottom = Math.min(yOfRow(0) + 10, tall - BELOW + 10);  // in sight also where the lowest row is not
  pen.fillStyle = "rgba(255,255,255,0.92)";
  pen.fillRect(0, bottom, frame.width, tall);
  pen.fillStyle = "#000";
  data.tokens.forEach((token, p) => {
    const middle = (data.borders[p] + data.borders[p + 1]) / 2;
    turned(shorten(token), xOf(middle) + 4, bottom + 12, -Math.PI / 4, "right");
  });
  pen.fillStyle = "rgba(255,255,255,0.92)";
  pen.fillRect(0, 0, GUTTER, tall);
  pen.fillStyle = "#000";
  pen.textAlign = "right";
  data.rows.forEach((row, at) => pen.fillText(row.label, GUTTER - 8, yOfRow(at) + 4));
}

// What is under the pointer: the nearest node, or else the nearest edge.
function under(left, top) {
  if (left < GUTTER) return null;
  measure();
  let best = null, least = NEAR;
  for (const node of [...alive(), ...ghosts()]) {
    const distance = Math.hypot(x(node) - left, y(node) - top);
    if (distance < least) { least = distance; best = { node }; }
  }
  if (best) return best;
  least = NEAR;
  for (const edge of edges) {
    const x0 = x(edge.source), y0 = y(edge.source), x1 = x(edge.target), y1 = y(edge.target), bent = (y0 + y1) / 2;
    if (left < Math.min(x0, x1) - NEAR || left > Math.max(x0, x1) + NEAR || top < Math.min(y0, y1) || top > Math.max(y0, y1)) continue;
    for (let step = 0; step <= BEND; step++) {
      const t = step / BEND, u = 1 - t, rise = 3 * u * u * t, fall = 3 * u * t * t, first = u * u * u, last = t * t * t;
      const across = (first + rise) * x0 + (fall + last) * x1, up = first * y0 + (rise + fall) * bent + last * y1;
      const distance = Math.hypot(across - left, up - top);
      if (distance < least) { least = distance; best = { edge }; }
    }
  }
  return best;
}

function nameOf(node) {
  const layer = data.layers[nodes.layer[node]], position = nodes.position[node];
  const where = `at ${position} “${data.tokens[position]}”`;
  if (nodes.layer[node] === data.output) return `output “${data.output_tokens[nodes.component[node]]}” ${where}`;
  return nodes.layer[node] === 0 ? `${layer} ${where}` : `${layer} #${nodes.component[node]} ${where}`;
}

const valuesOf = (edge) => isComparison()
  ? edge.values.map(([at, value]) => `${data.sets[at].name}: ${number(value)}`).join(", ") : number(edge.values[0][1]);

function lines(found) {
  if (found.edge) return [`from ${nameOf(found.edge.source)}`, `to ${nameOf(found.edge.target)}`, valuesOf(found.edge)];
  const node = found.node, out = [nameOf(node)];
  if (isComparison()) out.push(`alive in ${data.sets.filter((set) => set.is_alive[node]).map((set) => set.name).join(", ")}`);
  else if (!data.sets[choice.value].is_alive[node]) out.push("ghost: alive in the model itself, not in this set");
  else if (nodes.layer[node] === data.output) out.push(`probability ${number(probability(node))}`);
  for (const [end, other, what] of [["target", "source", "from"], ["source", "target", "to"]]) {
    const there = edges.filter((edge) => edge[end] === node);
    if (there.length) out.push(`${there.length.toLocaleString("en")} shown ${what === "from" ? "into" : "out of"} it:`);
    for (const edge of there.slice(0, 6)) out.push(`  ${valuesOf(edge)} ${what} ${nameOf(edge[other])}`);
    if (there.length > 6) out.push(`  and ${there.length - 6} weaker`);
  }
  return out;
}

function show(found, left, top) {
  tip.hidden = !found;
  view.style.cursor = found ? "pointer" : "default";
  if (!found) return;
  tip.textContent = lines(found).join("\n");
  tip.style.left = `${Math.max(4, Math.min(left + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(top + 14, window.innerHeight - tip.offsetHeight - 8))}px`;
}

const same = (a, b) => (a?.node === b?.node) && (a?.edge === b?.edge);

function pointed(event) {
  const box = view.getBoundingClientRect();
  return under(event.clientX - box.left, event.clientY - box.top);
}

view.addEventListener("mousemove", (event) => {
  const found = pointed(event);
  show(found, event.clientX, event.clientY);
  if (!same(found, hovered)) { hovered = found; if (!pinned) draw(); }
});
view.addEventListener("mouseleave", () => { show(null); if (hovered) { hovered = null; draw(); } });
view.addEventListener("click", (event) => {
  const found = pointed(event);
  pinned = found && !same(found, pinned) ? found : null;
  draw();
});
view.addEventListener("scroll", draw);
window.addEventListener("resize", draw);
slider.addEventListener("input", update);
choice.addEventListener("change", update);
zoom.addEventListener("input", draw);

data.sets.forEach((set) => {
  set.is_alive = new Uint8Array(n);
  for (const node of set.alive) set.is_alive[node] = 1;
});
data.any_alive = [...Array(n).keys()].filter((node) => data.sets.some((set) => set.is_alive[node]));
data.sets.forEach((set, at) => choice.add(new Option(set.name, at)));
if (data.sets.length > 1) choice.add(new Option(`compare all ${data.sets.length} sets`, COMPARE));
const { least, most, first } = data.sizes;
slider.value = first > least ? Math.log(first / least) / Math.log(most / least) : 0;
zoom.value = Math.min(zoom.max, Math.max(zoom.min, (view.clientWidth - GUTTER - 30) / data.borders[data.borders.length - 1]));
update();
