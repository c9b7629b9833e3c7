// Of every page: a turn grows by a click, Enter or the arrow keys; a table is sorted by a click on a column's head; a
// text finds cards.
"use strict";

function grow(turn, on) {
  for (const other of turn.parentElement.children) other.classList.toggle("on", on && other === turn);
}

/** Goes on by so many turns in every strip of the card that is looked at, or of the first one. Where it is now. */
function step(by, to = null) {
  const card = (document.querySelector(".turn.on") || document.querySelector(".card:not([hidden]) .turn"))?.closest(".card");
  if (!card) return null;
  const place = (strip) => [...strip.children].findIndex((turn) => turn.classList.contains("on"));
  const strips = [...card.querySelectorAll(".strip")];
  const longest = Math.max(...strips.map((strip) => strip.children.length));
  const at = Math.max(0, Math.min(to ?? Math.max(...strips.map(place)) + by, longest - 1));
  for (const strip of strips) grow(strip.children[Math.min(at, strip.children.length - 1)], true);
  card.querySelector(".turn.on").scrollIntoView({ block: "nearest" });
  return at;
}

function sortBy(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, down = head.ariaSort === "ascending";
  const value = (row) => row.cells[column]?.textContent.trim() ?? "";
  const compare = (a, b) => {
    const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
    return Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
  };
  for (const other of head.parentElement.cells) other.ariaSort = null;
  head.ariaSort = down ? "descending" : "ascending";
  body.append(...[...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b))));
}

document.getElementById("find")?.addEventListener("input", (event) => {
  const text = event.target.value.toLowerCase();
  for (const card of document.querySelectorAll(".card")) card.hidden = !card.textContent.toLowerCase().includes(text);
  for (const turn of document.querySelectorAll(".card[hidden] .turn.on")) turn.classList.remove("on");
});
document.addEventListener("click", (event) => {
  const picture = event.target.closest(".layers"), head = event.target.closest("th[tabindex]");
  if (picture) grow(picture.closest(".turn"), !picture.closest(".turn").classList.contains("on"));
  if (head) sortBy(head);
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Enter" && event.target.matches(".layers, th[tabindex]")) event.target.click();
  if (event.key === "Escape") for (const turn of document.querySelectorAll(".turn.on")) turn.classList.remove("on");
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by && document.querySelector(".turn")) {
    step(by);
    event.preventDefault();
  }
});
