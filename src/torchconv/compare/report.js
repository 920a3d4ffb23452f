"use strict";
(() => {
  const table = document.getElementById("candidates");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Sorting moves one <tbody> per candidate, so that details stay with their row. What is missing stays last.
  const sortBy = (head) => {
    const heads = [...head.parentElement.children];
    const other = { ascending: "descending", descending: "ascending" };
    const order = head.hasAttribute("aria-sort") ? other[head.getAttribute("aria-sort")] : head.dataset.first;
    const sign = order === "ascending" ? 1 : -1;
    const value = (body) => body.rows[0].cells[heads.indexOf(head)].dataset.v ?? "";
    const words = head.dataset.key === "label";
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (words ? x.localeCompare(y, undefined, { numeric: true }) : Number(x) - Number(y));
    };
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    table.append(...[...table.tBodies].sort(compare));
    document.getElementById("sorted").textContent = `Sorted by ${head.innerText.trim()}, ${order}`;
  };

  if (table) {
    all("thead .sort", table).forEach((button) => button.addEventListener("click", () => sortBy(button.closest("th"))));
    all(".open", table).forEach((button) => button.addEventListener("click", () => {
      const more = document.getElementById(button.getAttribute("aria-controls"));
      more.hidden = !more.hidden;
      button.setAttribute("aria-expanded", String(!more.hidden));
    }));
  }

  // Pointing at a candidate anywhere dims the others in every figure.
  const marks = all("svg [data-c]");
  const focusOn = (target) => {
    const at = target instanceof Element ? target.closest("[data-c]") : null;
    marks.forEach((mark) => mark.classList.toggle("dim", at !== null && mark.dataset.c !== at.dataset.c));
  };
  document.addEventListener("pointerover", (event) => focusOn(event.target));
  document.addEventListener("focusin", (event) => focusOn(event.target));

  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(document.getElementById("command").textContent);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Select and copy";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 2000);
    });
  }
})();
