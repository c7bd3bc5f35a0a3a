// The page keeps its own settings; the server keeps pictures, concepts and vectors.
"use strict";

const byId = (id) => document.getElementById(id);
const LIMIT = 4; // ends of a slider
const MOST = 60; // concepts that are listed at once; others are found by searching
const KEPT = `play ${location.pathname}`;
const SHARED = "xlvlm play";

let known = { model: "", fingerprint: null, sites: [], where: {}, items: [] };
let state = { picture: null, question: "", short: true, instruction: "", sliders: {}, map: null };
let committed = JSON.stringify(state);
const past = [];
let last = { label: null, time: 0 }; // of what was committed
const answers = { plain: "", steered: "", instructed: "" };

// Messages.

function tell(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is xlvlm play still running?");
  }
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    const failure = new Error(said.error ?? `the server answers ${response.status}`);
    failure.status = response.status;
    throw failure;
  }
  return response;
}

const post = (path, value, signal) =>
  request(path, { method: "POST", body: value instanceof Blob ? value : JSON.stringify(value), signal });

// Runs something that may fail, and shows why.
async function attempt(action) {
  tell("");
  try {
    return await action();
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
    return undefined;
  }
}

// Settings: what is asked, undone, kept over a reload and shared.

function settings() {
  const sliders = Object.entries(state.sliders).map(([item, slider]) => ({ item, ...slider }));
  const { question, short, instruction } = state;
  return { picture: state.picture?.id ?? "", question, short, instruction, sliders };
}

// What moves a slider again within a moment, such as a held key, is undone as one.
function commit(label = null) {
  const now = JSON.stringify(state);
  if (now !== committed) {
    const goesOn = label !== null && label === last.label && Date.now() - last.time < 1500;
    if (!goesOn) past.push(committed);
    if (past.length > 200) past.shift();
    committed = now;
    last = { label, time: Date.now() };
  }
  sessionStorage.setItem(KEPT, committed);
  byId("undo").disabled = !past.length;
}

function undo() {
  if (!past.length) return;
  committed = past.pop();
  last = { label: null, time: 0 };
  state = JSON.parse(committed);
  sessionStorage.setItem(KEPT, committed);
  byId("undo").disabled = !past.length;
  show();
  ask();
}

// Asking.

let running = null;
let waiting = 0;

function askSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(ask, 60);
}

function stop() {
  clearTimeout(waiting);
  if (running) byId("status").textContent = "";
  running?.abort();
  running = null;
  byId("stop").hidden = true;
  for (const run of Object.keys(answers)) byId(run).classList.remove("busy");
}

async function* lines(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = parts.pop();
    yield* parts.filter(Boolean).map((line) => JSON.parse(line));
  }
}

async function ask() {
  stop();
  const missing = state.picture ? "type a question" : "choose a picture";
  byId("status").textContent = missing;
  if (!state.picture || !state.question.trim()) return;
  const control = new AbortController();
  running = control;
  const asked = settings();
  const isSteered = asked.sliders.some((slider) => slider.strength !== 0);
  byId("told").hidden = !state.instruction.trim();
  byId("stop").hidden = false;
  byId("status").textContent = byId("prepared").hidden ? "working" : "preparing";
  if (!isSteered) {
    say("steered", "");
    byId("words").hidden = true;
  }
  for (const run of isSteered ? ["plain", "steered"] : ["plain"]) byId(run).classList.add("busy");
  await attempt(async () => {
    const response = await post("answers", asked, control.signal);
    for await (const event of lines(response.body)) receive(event);
  });
  if (running !== control) return; // Another began, or this one was stopped.
  running = null;
  stop();
  if (["preparing", "working"].includes(byId("status").textContent)) byId("status").textContent = "";
}

function receive(event) {
  if (event.error) throw new Error(event.error);
  if (event.ahead) byId("status").textContent = `waiting for ${event.ahead} other`;
  if (event.run) {
    say(event.run, event.text);
    byId("status").textContent = "working";
    byId(event.run).classList.toggle("busy", !event.done);
  }
  if (event.words) showWords(event.words);
  if (event.seconds !== undefined) byId("status").textContent = `${event.seconds.toFixed(2)} s`;
}

function say(run, text) {
  answers[run] = text;
  const line = byId(run);
  line.textContent = text;
  line.classList.toggle("changed", run !== "plain" && text !== "" && text !== answers.plain);
}

function showWords(words) {
  const most = Math.max(...words.map(({ before, after }) => Math.abs(after - before)), 1e-9);
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const rows = words.map(({ word, before, after }) => {
    const row = document.createElement("tr");
    const bar = element("i", { className: after > before ? "up" : "down" });
    bar.style.width = `${(100 * Math.abs(after - before)) / most}%`;
    bar.title = percent(after - before);
    const last = element("td");
    last.append(bar);
    row.append(
      element("td", { textContent: word }),
      element("td", { textContent: percent(before) }),
      element("td", { textContent: percent(after) }),
      last,
    );
    return row;
  });
  byId("words").tBodies[0].replaceChildren(...rows);
  byId("words").hidden = !rows.length;
}

// The picture, and the map over it.

function showPicture() {
  const { picture } = state;
  byId("shown").hidden = !picture;
  byId("hint").hidden = Boolean(picture);
  byId("picture").setAttribute("aria-label", picture ? `Picture ${picture.name}; choose another` : "Choose a picture");
  if (picture) {
    const address = `pictures/${encodeURIComponent(picture.id)}`;
    if (byId("shown").getAttribute("src") !== address) byId("shown").src = address;
    byId("shown").alt = picture.name;
  }
  showMap();
}

// A picture that the server has dropped is chosen again.
byId("shown").addEventListener("error", () => {
  tell("the picture is no longer here; choose it again");
  state.picture = null;
  showPicture();
});

async function showMap() {
  const { map: item, picture, question } = state;
  for (const id of ["map", "legend"]) byId(id).hidden = true;
  for (const button of document.querySelectorAll(".mapper")) {
    button.setAttribute("aria-pressed", String(button.closest("li").dataset.id === item));
  }
  if (!item || !picture || !question.trim()) return;
  await attempt(async () => {
    const found = await (await post("maps", { ...settings(), item })).json();
    if (item !== state.map || picture.id !== state.picture?.id) return;
    byId("map").src = found.overlay;
    byId("low").textContent = found.low.toPrecision(3);
    byId("high").textContent = found.high.toPrecision(3);
    byId("unit").textContent = found.unit;
    for (const id of ["map", "legend"]) byId(id).hidden = false;
  });
}

async function usePicture(file) {
  state.picture = await (await post(`pictures?name=${encodeURIComponent(file.name)}`, file)).json();
  commit();
  showPicture();
  ask();
}

async function useConceptPicture(address) {
  state.picture = await (await post(address, {})).json();
  commit();
  showPicture();
  ask();
}

// Files that are dropped, pasted or chosen.

async function take(file) {
  if (!file) return;
  await attempt(async () => {
    // A shared file is read here, and its picture takes 4/3 of the room there.
    if (/\.json$/i.test(file.name)) {
      refuseLarge(file.name, file.size, 2 * known.largest);
      await openShared(file);
      return;
    }
    refuseLarge(file.name, file.size, known.largest);
    if (/\.safetensors$/i.test(file.name)) await useVector(file);
    else await usePicture(file);
  });
}

// Refused here: a browser that sends more than the server reads sees no answer.
function refuseLarge(name, size, largest) {
  if (size > largest) {
    throw new Error(`${name} is larger than ${largest / 2 ** 20} MB; choose a smaller one`);
  }
}

async function useVector(file) {
  const added = await (await post(`vectors?name=${encodeURIComponent(file.name)}`, file)).json();
  known.items.unshift(added);
  byId("search").value = "";
  showItems();
}

async function openShared(file) {
  let shared = null;
  try {
    shared = JSON.parse(await file.text());
  } catch {
    // Said below.
  }
  if (shared?.kind !== SHARED || typeof shared.state !== "object" || !shared.state) {
    throw new Error(`${file.name} is not a file that this page has shared`);
  }
  let content = null;
  try {
    content = shared.picture && Uint8Array.from(atob(shared.picture.content), (c) => c.charCodeAt(0));
  } catch {
    throw new Error(`the picture in ${file.name} is damaged; share it again`);
  }
  if (content) refuseLarge(`the picture in ${file.name}`, content.length, known.largest);
  if (shared.fingerprint !== known.fingerprint) {
    throw new Error(`${file.name} was shared from ${shared.model}, this page has another model: ${known.model}`);
  }
  const { question, short, instruction, sliders } = shared.state;
  const all = Object.entries(sliders ?? {});
  const here = all.filter(([id]) => known.items.some((item) => item.id === id));
  state = { ...state, question: String(question ?? ""), instruction: String(instruction ?? ""), map: null };
  state.short = Boolean(short);
  state.sliders = Object.fromEntries(here);
  if (content) await usePicture(new File([content], shared.picture.name));
  commit();
  show();
  ask();
  if (here.length < all.length) {
    tell(`${all.length - here.length} of its ${all.length} concepts and vectors are not on this page`);
  }
}

async function share() {
  const shared = { kind: SHARED, model: known.model, fingerprint: known.fingerprint, picture: null };
  const { question, short, instruction, sliders, picture } = state;
  Object.assign(shared, { state: { question, short, instruction, sliders }, answers });
  if (picture) {
    // As it was uploaded: as PNG, it may be too large to be opened again.
    const stored = await request(`pictures/${encodeURIComponent(picture.id)}/upload`);
    const content = new Uint8Array(await stored.arrayBuffer());
    let binary = "";
    for (const byte of content) binary += String.fromCharCode(byte);
    shared.picture = { name: picture.name, content: btoa(binary) };
  }
  download("play.json", new Blob([JSON.stringify(shared, null, 1)], { type: "application/json" }));
}

function download(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function python() {
  const { code } = await (await post("python", settings())).json();
  const dialog = byId("code");
  dialog.querySelector("pre").textContent = code;
  const note = dialog.querySelector("output");
  note.textContent = "";
  dialog.showModal();
  try {
    await navigator.clipboard.writeText(code);
    note.textContent = "copied";
  } catch {
    note.textContent = "select and copy it";
  }
}

async function saveVector() {
  const blob = await (await post("vector", settings())).blob();
  download("vector.safetensors", blob);
}

// Concepts and vectors.

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

const sliderOf = (item) => state.sliders[item.id] ?? { strength: 0, where: null, site: null };

function change(item, part) {
  state.sliders[item.id] = { ...sliderOf(item), ...part };
  const { strength, where, site } = state.sliders[item.id];
  if (!strength && where === null && site === null) delete state.sliders[item.id];
}

function choice(label, options, chosen, change) {
  const select = element("select");
  for (const [value, text] of options) select.append(new Option(text, value, false, value === chosen));
  select.addEventListener("change", () => change(select.value));
  const whole = element("label", { textContent: `${label} ` });
  whole.append(select);
  return whole;
}

function row(item) {
  const line = element("li");
  line.dataset.id = item.id;
  const slider = sliderOf(item);
  const called = `${item.name} ${item.words.slice(0, 3).join(" ")}`.trim();
  const end = String(Math.max(LIMIT, Math.abs(slider.strength)));
  const range = element("input", { type: "range", min: `-${end}`, max: end, step: "0.1", value: String(slider.strength) });
  range.setAttribute("aria-label", `Strength of ${called}`);
  const exact = element("input", { type: "number", step: "any", value: String(slider.strength) });
  exact.setAttribute("aria-label", `Strength of ${called}, as a number`);
  const reset = element("button", { type: "button", textContent: "Zero" });
  reset.setAttribute("aria-label", `Set ${called} to zero`);
  const set = (strength) => {
    change(item, { strength });
    if (Math.abs(strength) > Number(range.max)) [range.min, range.max] = [-Math.abs(strength), Math.abs(strength)];
    range.value = exact.value = String(strength);
    askSoon();
  };
  range.addEventListener("input", () => set(range.valueAsNumber));
  exact.addEventListener("change", () => set(Number.isFinite(exact.valueAsNumber) ? exact.valueAsNumber : 0));
  reset.addEventListener("click", () => set(0));
  for (const part of [range, exact]) part.addEventListener("change", () => commit(item.id));
  reset.addEventListener("click", () => commit());
  const control = element("div", { className: "control" });
  control.append(range, exact, reset);
  if (item.is_vector) {
    const mapper = element("button", { type: "button", className: "mapper", textContent: "Map" });
    mapper.setAttribute("aria-label", `Map of ${called}`);
    mapper.setAttribute("aria-pressed", String(state.map === item.id));
    mapper.addEventListener("click", () => {
      state.map = state.map === item.id ? null : item.id;
      commit();
      showMap();
    });
    control.append(mapper);
  }
  const changed = (part) => {
    change(item, part);
    commit();
    ask();
  };
  const choices = element("div", { className: "choices" });
  const where = Object.entries(known.where);
  if (item.where === null) where.unshift(["", "its own positions"]);
  choices.append(
    choice("where", where, slider.where ?? item.where ?? "", (value) => changed({ where: value || null })),
  );
  if (item.is_vector) {
    const sites = known.sites.map((site) => [site, site]);
    choices.append(choice("at", sites, slider.site ?? item.site, (site) => changed({ site })));
  }
  line.append(
    element("h3", { textContent: item.name }),
    " ",
    element("span", { textContent: item.words.slice(0, 6).join(", ") }),
    " ",
    element("small", { textContent: item.group }),
    control,
    choices,
  );
  if (item.pictures) {
    const shots = element("div", { className: "shots" });
    for (let number = 0; number < Math.min(item.pictures, 5); number++) {
      const src = `concepts/${item.id.split("/").map(encodeURIComponent).join("/")}/pictures/${number}`;
      const shot = element("button", { type: "button", className: "example", title: "Ask about this picture" });
      shot.setAttribute("aria-label", `Ask about picture ${number + 1} of ${called}`);
      shot.append(element("img", { alt: "", loading: "lazy", src }));
      shot.firstChild.addEventListener("error", () => shot.remove());
      shot.addEventListener("click", () => attempt(() => useConceptPicture(src)));
      shots.append(shot);
    }
    line.append(shots);
  }
  return line;
}

// Those that steer come first, then those that the search finds.
function showItems() {
  const terms = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (item) => `${item.name} ${item.words.join(" ")} ${item.group}`.toLowerCase();
  const isMoved = (item) => item.id in state.sliders;
  const found = known.items.filter((item) => isMoved(item) || terms.every((term) => text(item).includes(term)));
  found.sort((a, b) => isMoved(b) - isMoved(a));
  byId("items").replaceChildren(...found.slice(0, MOST).map(row));
  const shown = Math.min(found.length, MOST);
  byId("count").textContent = shown < known.items.length ? `${shown} of ${known.items.length}` : "";
  if (!known.items.length) byId("count").textContent = "no concepts or vectors; open a vector";
}

function show() {
  byId("question").value = state.question;
  byId("short").checked = state.short;
  byId("instruction").value = state.instruction;
  showItems();
  showPicture();
}

// Events.

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  commit();
  ask();
  showMap();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
for (const id of ["question", "instruction"]) {
  byId(id).addEventListener("input", () => {
    state[id] = byId(id).value;
  });
}
byId("short").addEventListener("change", () => {
  state.short = byId("short").checked;
  commit();
  ask();
});
byId("undo").addEventListener("click", undo);
byId("stop").addEventListener("click", stop);
byId("share").addEventListener("click", () => attempt(share));
byId("python").addEventListener("click", () => attempt(python));
byId("save").addEventListener("click", () => attempt(saveVector));
byId("search").addEventListener("input", showItems);
byId("zero").addEventListener("click", () => {
  state.sliders = {};
  commit();
  showItems();
  ask();
});
for (const id of ["open", "picture"]) byId(id).addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => {
  take(byId("file").files[0]);
  byId("file").value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, () => document.body.classList.remove("dragging"));
}
document.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) take(file);
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=range]), select, textarea");
  if (event.key === "Escape") stop();
  if (isTyping) return;
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  }
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
    event.preventDefault();
    undo();
  }
});

// Programs are compiled when the server starts; whoever asks before waits for them.
async function waitUntilPrepared() {
  byId("prepared").hidden = false;
  try {
    while (!(await (await request("prepared")).json()).prepared);
  } catch {
    // The server has ended.
  }
  byId("prepared").hidden = true;
}

attempt(async () => {
  known = await (await request("state")).json();
  if (!known.prepared) waitUntilPrepared();
  // Vectors, of which there are few, come before concepts.
  known.items.sort((a, b) => (b.group === "vectors") - (a.group === "vectors"));
  byId("model").textContent = known.model;
  const kept = sessionStorage.getItem(KEPT);
  if (kept) {
    committed = kept;
    state = JSON.parse(kept);
  }
  show();
  ask();
});
