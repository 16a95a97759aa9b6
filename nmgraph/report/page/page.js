"use strict";
(() => {
  const table = document.getElementById("layers");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);

  const key = (row, column) => {
    const text = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const number = Number(text);
    return text !== "" && Number.isFinite(number) ? number : text;
  };
  const order = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1;
    return a.localeCompare(b, undefined, { numeric: true });
  };
  table.querySelectorAll("th button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const column = head.cellIndex;
      const sorted = rows.slice().sort((a, b) => (down ? -1 : 1) * order(key(a, column), key(b, column)));
      body.append(...sorted);
    });
  });

  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const narrow = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length} layers`;
  };
  filter.addEventListener("input", narrow);
  narrow();

  const chooser = document.getElementById("chooser");
  if (chooser) {
    const portraits = Array.from(document.querySelectorAll(".portrait"));
    const choose = () => portraits.forEach((p, i) => (p.hidden = i !== chooser.selectedIndex));
    chooser.addEventListener("change", choose);
    table.addEventListener("click", (event) => {
      const link = event.target.closest("a[data-portrait]");
      if (!link) return;
      chooser.selectedIndex = Number(link.dataset.portrait);
      choose();
    });
    choose();
  }
  document.documentElement.classList.add("scripted");
})();
