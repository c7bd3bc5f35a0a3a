// Without this script the page only lacks searching, sorting and enlarged pictures.
"use strict";

// Searches and sorts the cards of a section.
for (const tools of document.querySelectorAll(".tools")) {
  const list = tools.nextElementSibling;
  const cards = [...list.children];
  const [search, select, count] = ["input", "select", "output"].map((tag) => tools.querySelector(tag));
  const texts = new Map();
  // The text of a card: its number, words, attributes and the captions of its pictures.
  const textOf = (card) => {
    if (!texts.has(card)) {
      const parts = card.querySelectorAll("h3, .number, .words, .said, .attributes th, .missing, img, .shot");
      const said = [...parts].map((part) => part.alt ?? part.dataset.asked ?? part.textContent);
      texts.set(card, ` ${said.join(" ").toLowerCase().replace(/\s+/g, " ")} `);
    }
    return texts.get(card);
  };
  const holds = (text, term) => text.includes(/^\d+$/.test(term) ? ` ${term} ` : term);
  search.addEventListener("input", () => {
    const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) card.hidden = !terms.every((term) => holds(textOf(card), term));
    const found = cards.filter((card) => !card.hidden).length;
    count.textContent = terms.length ? `${found} of ${cards.length}` : "";
  });
  select.addEventListener("change", () => {
    const { value, dataset } = select.selectedOptions[0];
    const sign = dataset.order === "up" ? 1 : -1;
    list.append(...ordered(cards, (card) => card.dataset[value], sign));
  });
  tools.hidden = false;
}

// A link to a card that a search has hidden ends that search.
function reveal() {
  const card = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!card?.hidden) return;
  const search = card.parentElement.previousElementSibling.querySelector("input");
  search.value = "";
  search.dispatchEvent(new Event("input"));
  card.scrollIntoView();
}
addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => {
  // The same link again changes nothing in the address.
  if (event.target.closest?.(`a[href="${location.hash}"]`)) reveal();
});

// Compares numbers, or texts if there are no numbers; empty cells come last.
function ordered(items, valueOf, sign) {
  const compare = (a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (!x || !y) return !x - !y;
    const [n, m] = [Number(x), Number(y)];
    return sign * (Number.isNaN(n - m) ? x.localeCompare(y) : n - m);
  };
  return [...items].sort(compare);
}

// Clicking a column's name sorts the table, best first; then in reverse; then restores the order.
for (const table of document.querySelectorAll("table.scores")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!column) return;
    const best = head.textContent.trim().endsWith("↓") ? 1 : -1;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    // Numbers as `report.numbers` writes them: 1.2e-04, 12\u202f345.
    const valueOf = (row) =>
      row.cells[column].textContent
        .replace(/(?<=\d)\u202f(?=\d)/g, "")
        .match(/-?\d+(\.\d+)?(e[-+]?\d+)?/)?.[0];
    button.addEventListener("click", () => {
      const turn = { "": best, [best]: -best, [-best]: "" }[head.dataset.sign ?? ""];
      for (const other of heads) {
        delete other.dataset.sign;
        other.removeAttribute("aria-sort");
      }
      table.classList.toggle("sorted", turn !== "");
      if (turn !== "") {
        head.dataset.sign = turn;
        head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
      }
      body.append(...(turn === "" ? rows : ordered(rows, valueOf, turn)));
    });
  });
}

// Enlarges a picture; the arrow keys move to its neighbours.
const dialog = document.querySelector("dialog");
let open = null;
function show(button) {
  open = button;
  const small = button.querySelector("img");
  dialog.querySelector("img").className = small.className;
  dialog.querySelector("img").alt = small.alt;
  dialog.querySelector(".caption").textContent = small.alt;
  const { asked, detail } = button.dataset;
  dialog.querySelector(".detail").textContent = asked ? `${asked} · ${detail}` : detail;
  if (!dialog.open) dialog.showModal();
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.shot");
  if (button) show(button);
  else if (dialog.open) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const buttons = step ? [...open.closest("ol").querySelectorAll("button.shot")] : [];
  const next = buttons[buttons.indexOf(open) + step];
  if (next) show(next);
});
