"use strict";

// A column is sorted by data-value where it has numbers, else by its text. Empty cells come last.
function compare(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return direction * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true}));
}

function keyOf(row, column, numeric) {
  const cell = row.cells[column];
  if (!numeric) return cell.textContent.trim();
  return cell.dataset.value === "" ? "" : Number(cell.dataset.value);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const numeric = header.classList.contains("number");
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const body = table.tBodies[0];
      const keyed = [...body.rows].map(row => [keyOf(row, column, numeric), row]);
      keyed.sort((one, other) => compare(one[0], other[0], direction));
      body.append(...keyed.map(pair => pair[1]));
    });
  });
}

const form = document.getElementById("filter");
const rows = [...document.getElementById("experiments").tBodies[0].rows];

function filter() {
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const {task, kind} = form.elements;
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !(words.every(word => text.includes(word))
      && (!task.value || row.dataset.task === task.value)
      && (!kind.value || row.dataset.kind === kind.value));
    shown += !row.hidden;
  }
  form.querySelector("output").value = `${shown} of ${rows.length} experiments`;
}

form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("change", filter);  // for tools that choose an option without typing
form.addEventListener("submit", event => event.preventDefault());
filter();
