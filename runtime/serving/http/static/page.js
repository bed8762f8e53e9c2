// The page of ditf serve: two images, points in the first, their matches and a heat map in the second.
// Everything comes from the plain routes that curl uses; positions are pixels, (x, y), centres at integers.

const $ = (id) => document.getElementById(id);
const sides = { source: makeSide("source"), target: makeSide("target") };
let bundles = [];
let points = []; // {number, point: [x, y], match: [x, y] or null, score, row, marks: [source, target]}
let chosen = null;
let nextNumber = 1;
let generation = 0; // answers to what was asked before images or options changed are dropped
let heatRequest = null;
let pending = 0; // requests for matches
let cursor = null;
const problems = {}; // by what they are of: the key, a file, an answer

start();

async function start() {
  listen();
  await readBundles();
  $("sample").value = "same";
  await loadSample("same");
}

async function readBundles() {
  const answer = await ask("bundles", {});
  if (!answer) return;
  fail("key", "");
  bundles = (await answer.json()).bundles;
  $("bundle").max = bundles.length - 1;
  $("bundle-option").hidden = bundles.length < 2;
  chooseBundle();
}

function makeSide(id) {
  const section = $(id);
  return {
    id,
    section,
    picture: section.querySelector(".picture"),
    image: section.querySelector(".picture img"),
    input: section.querySelector("input[type=file]"),
    blob: null,
    address: null,
    loading: 0,
  };
}

function listen() {
  for (const side of Object.values(sides)) {
    side.input.addEventListener("change", () => {
      if (side.input.files.length) own(side, side.input.files[0]);
    });
    side.section.addEventListener("dragover", (event) => {
      event.preventDefault();
      side.section.classList.add("over");
    });
    side.section.addEventListener("dragleave", () => side.section.classList.remove("over"));
    side.section.addEventListener("drop", (event) => {
      event.preventDefault();
      side.section.classList.remove("over");
      const file = event.dataTransfer.files[0];
      if (file) own(side, file);
    });
  }
  const { picture, image } = sides.source;
  picture.addEventListener("click", (event) => {
    if (!ready() || event.detail > 1) return; // the second of a double click is no other point
    const box = image.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * image.naturalWidth);
    const y = Math.floor(((event.clientY - box.top) / box.height) * image.naturalHeight);
    addPoint(inside([x, y]));
  });
  picture.addEventListener("keydown", steer);
  picture.addEventListener("blur", () => showCursor(null));
  $("by-number").addEventListener("submit", (event) => {
    event.preventDefault();
    const point = [Number($("x").value), Number($("y").value)];
    const [x, y] = inside(point);
    const outside = x !== point[0] || y !== point[1];
    fail("answer", outside ? `The first image is ${size(image)} pixels: ${point.join(", ")} is outside` : "");
    if (!outside && ready()) addPoint(point);
  });
  $("clear").addEventListener("click", clear);
  $("options").addEventListener("submit", (event) => event.preventDefault());
  $("sample").addEventListener("change", (event) => event.target.value && loadSample(event.target.value));
  $("bundle").addEventListener("input", chooseBundle);
  $("bundle").addEventListener("change", matchAgain);
  $("method").addEventListener("change", matchAgain);
  $("prompt").addEventListener("change", matchAgain);
  $("key").addEventListener("change", async () => {
    await readBundles();
    matchAgain();
  });
  $("opacity").addEventListener("input", showHeat);
}

// Images

async function loadSample(name) {
  const mine = ++generation;
  let blobs;
  try {
    blobs = await Promise.all(["left", "right"].map(async (which) => {
      const answer = await fetch(`samples/${name}-${which}.jpg`);
      return answer.blob();
    }));
  } catch {
    $("sample").value = "";
    return fail("answer", "The server does not answer");
  }
  if (mine !== generation) return;
  sides.source.input.value = sides.target.input.value = "";
  await Promise.all([show(sides.source, blobs[0]), show(sides.target, blobs[1])]);
}

async function own(side, file) {
  $("sample").value = "";
  await show(side, file);
}

async function show(side, blob) {
  const mine = (side.loading += 1);
  const address = URL.createObjectURL(blob);
  const probe = new Image();
  probe.src = address;
  try {
    await probe.decode();
  } catch {
    URL.revokeObjectURL(address);
    if (mine === side.loading) fail("file", `${blob.name || "That file"} is not an image this browser can show`);
    return;
  }
  if (mine !== side.loading) return URL.revokeObjectURL(address);
  generation += 1;
  if (side.address) URL.revokeObjectURL(side.address);
  side.blob = blob;
  side.address = address;
  side.image.src = address;
  side.image.alt = blob.name || `Sample, ${side.id === "source" ? "first" : "second"} image`;
  side.image.hidden = false;
  const ratio = probe.naturalWidth / probe.naturalHeight;
  side.picture.style.width = `max(3rem, min(100%, calc(75vh * ${ratio})))`; // all of it in the window
  side.picture.style.aspectRatio = ratio;
  fail("file", "");
  fail("answer", "");
  if (side.id === "source") {
    $("x").max = side.image.naturalWidth - 1;
    $("y").max = side.image.naturalHeight - 1;
    clear();
  } else matchAgain();
}

const ready = () => Boolean(sides.source.blob && sides.target.blob && bundles.length);
const size = (image) => `${image.naturalWidth} x ${image.naturalHeight}`;

function inside([x, y]) {
  const { naturalWidth, naturalHeight } = sides.source.image;
  return [Math.min(Math.max(x, 0), naturalWidth - 1), Math.min(Math.max(y, 0), naturalHeight - 1)];
}

// The cross that the arrow keys move

function steer(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const { image } = sides.source;
  if (image.hidden) return;
  const here = cursor || [Math.floor(image.naturalWidth / 2), Math.floor(image.naturalHeight / 2)];
  if (event.key in steps) {
    // A press is about a hundredth of the image, at least a pixel; with Alt exactly one.
    const unit = event.altKey ? 1 : Math.max(1, Math.round(image.naturalWidth / 200)) * (event.shiftKey ? 10 : 1);
    const [dx, dy] = steps[event.key];
    showCursor(inside([here[0] + dx * unit, here[1] + dy * unit]));
  } else if ((event.key === "Enter" || event.key === " ") && ready()) {
    showCursor(here);
    addPoint(here);
  } else if (event.key === "Escape") showCursor(null);
  else return;
  event.preventDefault();
}

function showCursor(point) {
  cursor = point;
  const element = sides.source.picture.querySelector(".cursor");
  element.hidden = !point;
  if (point) {
    place(element, point, sides.source.image);
    say(`Cross at ${text(point)}`);
  }
}

// Points

function addPoint(point) {
  fail("file", "");
  const entry = { number: nextNumber++, point, match: null, score: null };
  entry.row = addRow(entry);
  entry.marks = [addMark(sides.source, entry), addMark(sides.target, entry)];
  points.push(entry);
  place(entry.marks[0], point, sides.source.image);
  entry.marks[0].hidden = false;
  listChanged();
  choose(entry);
  match([entry]);
}

function removePoint(entry) {
  entry.row.remove();
  entry.marks.forEach((mark) => mark.remove());
  points = points.filter((other) => other !== entry);
  listChanged();
  if (chosen === entry) choose(points.at(-1) || null);
}

function clear() {
  generation += 1;
  for (const entry of points) {
    entry.row.remove();
    entry.marks.forEach((mark) => mark.remove());
  }
  points = [];
  nextNumber = 1;
  listChanged();
  choose(null);
  say("");
}

function listChanged() {
  $("points").hidden = !points.length;
  $("clear").disabled = !points.length;
}

function addMark(side, entry) {
  const mark = document.createElement("span");
  mark.className = "mark";
  mark.hidden = true;
  const label = document.createElement("b");
  label.textContent = entry.number;
  mark.append(label);
  side.picture.append(mark);
  return mark;
}

function addRow(entry) {
  const row = $("points").tBodies[0].insertRow();
  const pick = document.createElement("button");
  pick.textContent = entry.number;
  pick.setAttribute("aria-label", `Heat map of point ${entry.number}`);
  pick.addEventListener("click", () => choose(entry));
  row.insertCell().append(pick);
  row.insertCell().textContent = text(entry.point);
  row.insertCell().textContent = "...";
  row.insertCell();
  const remove = document.createElement("button");
  remove.textContent = "Remove";
  remove.setAttribute("aria-label", `Remove point ${entry.number}`);
  remove.addEventListener("click", () => removePoint(entry));
  row.insertCell().append(remove);
  return row;
}

function choose(entry) {
  chosen = entry;
  for (const other of points) {
    const here = other === entry;
    other.row.classList.toggle("chosen", here);
    other.row.querySelector("button").setAttribute("aria-pressed", here);
    other.marks.forEach((mark) => mark.classList.toggle("chosen", here));
  }
  heat();
}

function place(element, [x, y], image) {
  const across = (x + 0.5) / image.naturalWidth;
  element.style.left = `${100 * across}%`;
  element.style.top = `${(100 * (y + 0.5)) / image.naturalHeight}%`;
  element.classList.toggle("left", across > 0.8);
}

// Asking

function matchAgain() {
  generation += 1;
  for (const entry of points) {
    entry.row.cells[2].textContent = "...";
    entry.row.cells[3].textContent = "";
    entry.marks[1].hidden = true;
  }
  say("");
  if (points.length && ready()) match([...points]);
  heat();
}

async function match(entries) {
  const mine = generation;
  const list = entries.map((entry) => entry.point.join(","));
  busy(+1);
  const answer = await ask("match", { points: list.join(" "), method: $("method").value });
  const found = answer && (await answer.json());
  busy(-1);
  if (mine !== generation) return;
  if (!found) return entries.forEach((entry) => (entry.row.cells[2].textContent = "failed"));
  entries.forEach((entry, index) => {
    entry.match = found.matches[index];
    entry.score = found.scores[index];
    entry.row.cells[2].textContent = text(entry.match);
    entry.row.cells[3].textContent = entry.score.toFixed(4);
    entry.marks[1].querySelector("b").textContent = `${entry.number}: ${entry.score.toFixed(3)}`;
    place(entry.marks[1], entry.match, sides.target.image);
    entry.marks[1].hidden = false;
  });
  const last = entries.filter((entry) => points.includes(entry)).at(-1);
  if (last) say(`Point ${last.number} at ${text(last.point)} matches ${text(last.match)}, cosine ${last.score.toFixed(4)}`);
}

async function heat() {
  heatRequest?.abort();
  const picture = sides.target.picture.querySelector(".heat");
  picture.hidden = $("scale").hidden = true; // it is of another point, or of another image
  if (!chosen || !ready()) return;
  const entry = chosen;
  const mine = generation;
  heatRequest = new AbortController();
  const options = { point: entry.point.join(",") };
  const answer = await ask("heat-map?view=target", options, heatRequest.signal);
  const blob = answer && (await answer.blob());
  if (!blob || chosen !== entry || mine !== generation) return;
  const address = URL.createObjectURL(blob);
  picture.onload = () => URL.revokeObjectURL(address);
  picture.src = address;
  picture.hidden = $("scale").hidden = false;
  $("scale-point").textContent = entry.number;
  $("scale-low").textContent = Number(answer.headers.get("X-Cosine-Low")).toFixed(3);
  $("scale-high").textContent = Number(answer.headers.get("X-Cosine-High")).toFixed(3);
  showHeat();
}

function showHeat() {
  sides.target.picture.querySelector(".heat").style.opacity = $("opacity").value / 100;
}

// An answer of a route, or null after telling what went wrong.
async function ask(route, fields, signal) {
  const mine = generation;
  const key = $("key").value;
  if (/[^\x21-\x7e]/.test(key)) {
    fail("key", "That is no API key: it has characters that no header takes");
    return null;
  }
  const options = { headers: key ? { "X-Api-Key": key } : {}, signal };
  if (Object.keys(fields).length) {
    options.method = "POST";
    options.body = new FormData();
    options.body.set("source", sides.source.blob);
    options.body.set("target", sides.target.blob);
    if (bundles.length) options.body.set("bundle", bundle().name);
    if (!$("prompt-option").hidden) options.body.set("prompt", $("prompt").value);
    for (const [name, value] of Object.entries(fields)) options.body.set(name, value);
  }
  let problem = "";
  try {
    const answer = await fetch(route, options);
    if (answer.ok) {
      if (mine === generation) fail("answer", "");
      return answer;
    }
    if (answer.status === 401) {
      $("key-option").hidden = false;
      $("key").focus();
      fail("key", key ? "That is not this server's API key" : "This server asks for an API key: type it above");
      return null;
    }
    problem = await answer.json().then((found) => found.error, () => `The server answered ${answer.status}`);
  } catch (error) {
    if (error.name === "AbortError") return null;
    problem = "The server does not answer";
  }
  // What was wrong with images that are no longer there is of no use.
  if (mine === generation) fail("answer", problem.replace(/\bsource: /, "First image: ").replace(/\btarget: /, "Second image: "));
  return null;
}

// What is served

const bundle = () => bundles[Number($("bundle").value)];

function chooseBundle() {
  if (!bundles.length) return;
  const one = bundle();
  const about = `${one.model || one.name}, ${one.layer}, ${one.precision}, ${one.size.join(" x ")} px`;
  $("served").textContent = `${one.name}: ${about}; ${one.grid.join(" x ")} cells of ${one.channels} channels`;
  $("bundle-name").textContent = `${Number($("bundle").value) + 1} of ${bundles.length}: ${one.name}`;
  $("bundle").setAttribute("aria-valuetext", `${one.name}, ${about}`);
  fill($("method"), one.methods);
  fill($("prompt"), one.conditions);
  $("prompt-option").hidden = one.conditions.length < 2;
}

function fill(select, names) {
  const kept = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(kept)) select.value = kept;
}

// What people are told

function text([x, y]) {
  const short = (value) => String(Math.round(100 * value) / 100);
  return `${short(x)}, ${short(y)}`;
}

function say(words) {
  $("said").textContent = words;
}

function fail(kind, words) {
  problems[kind] = words;
  const told = Object.values(problems).filter(Boolean);
  $("problem").textContent = told.join(". ");
  $("problem").hidden = !told.length;
}

function busy(more) {
  pending += more;
  sides.target.picture.setAttribute("aria-busy", pending > 0);
  sides.target.picture.classList.toggle("busy", pending > 0);
}
