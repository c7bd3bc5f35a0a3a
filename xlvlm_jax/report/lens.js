// Without this script the page lacks the picture's cells and all but the first words.
"use strict";

const data = JSON.parse(document.querySelector("#data").textContent);
const [layers, positions, count] = data.shape;
const unpack = (text, bytes) => {
  const raw = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return bytes === 1 ? raw : new (bytes === 2 ? Uint16Array : Uint32Array)(raw.buffer);
};
const shares = unpack(data.shares, 1);
const wide = atob(data.index).length / shares.length;
const index = unpack(data.index, wide);
const at = (layer, position) => (layer * positions + position) * count;
const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

// Shows the words of a token in every layer, and what its states resemble.
const detail = document.querySelector(".detail");
function show(position, layer) {
  detail.querySelector("h2").textContent = `${data.kinds[position]} token ${position}: ${data.texts[position]}`;
  const rows = [];
  for (let l = 0; l < layers; l++) {
    const row = document.createElement("tr");
    row.classList.toggle("here", l === layer);
    row.append(element("th", data.layers[l]));
    for (let n = 0; n < count; n++) {
      const cell = element("td", `${data.words[index[at(l, position) + n]]} `);
      cell.append(element("small", `${Math.round(shares[at(l, position) + n] / 2.55)} %`));
      row.append(cell);
    }
    const near = data.neighbours.layers[l];
    if (near) {
      const cell = element("td", "near: ");
      near.rows[position].forEach((number, n) => {
        const [token, text] = data.neighbours.rows[number] ?? [number, ""];
        const word = element("span", `${token} `);
        word.title = text;
        cell.append(word, element("small", `${near.cosines[position][n]} % `));
      });
      row.append(cell);
    }
    rows.push(row);
  }
  detail.querySelector("tbody").replaceChildren(...rows);
  detail.hidden = false;
}

// Paints the cells of a picture with the first words of a layer.
for (const section of document.querySelectorAll(".seen")) {
  const [slider, output] = [section.querySelector("input"), section.querySelector("output")];
  const cells = [...section.querySelectorAll(".grid button")];
  const paint = () => {
    const layer = Number(slider.value);
    output.textContent = data.layers[layer];
    for (const cell of cells) {
      const start = at(layer, Number(cell.dataset.p));
      cell.textContent = data.words[index[start]];
      cell.title = cell.textContent;
      cell.style.setProperty("--share", (shares[start] / 255).toFixed(2));
    }
  };
  slider.addEventListener("input", paint);
  paint();
  section.layer = () => Number(slider.value);
}

function point(target) {
  const cell = target.closest?.("[data-p]");
  if (!cell) return;
  const layer = cell.closest(".seen")?.layer() ?? cell.cellIndex - 1;
  show(Number(cell.dataset.p), layer);
}
document.addEventListener("pointerover", (event) => point(event.target));
document.addEventListener("focusin", (event) => point(event.target));
document.addEventListener("click", (event) => point(event.target));

// The arrow keys move within the table and within a picture; Tab leaves them.
function neighbour(cell, key) {
  if (cell.cellIndex !== undefined) {
    const row = cell.parentElement;
    const body = row.parentElement.rows;
    const step = { ArrowUp: -1, ArrowDown: 1 }[key] ?? 0;
    const to = body[row.sectionRowIndex + step]?.cells[cell.cellIndex + ({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0)];
    return to?.matches("[data-p]") ? to : null;
  }
  // The nearest cell whose middle lies in the direction of the key.
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const middle = (box) => [box.left + box.width / 2, box.top + box.height / 2];
  const [x, y] = middle(cell.getBoundingClientRect());
  let best = null;
  let least = Infinity;
  for (const other of cell.parentElement.querySelectorAll("button")) {
    const [u, v] = middle(other.getBoundingClientRect());
    const ahead = (u - x) * dx + (v - y) * dy;
    const aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
    if (ahead > 1 && ahead + 3 * aside < least) {
      least = ahead + 3 * aside;
      best = other;
    }
  }
  return best;
}
document.addEventListener("keydown", (event) => {
  const cell = event.target.closest?.("[data-p]");
  if (!cell || !event.key.startsWith("Arrow")) return;
  event.preventDefault();
  const to = neighbour(cell, event.key);
  if (!to) return;
  cell.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
});
