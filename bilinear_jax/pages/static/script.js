/* Feature pages: theme, sorting and search, contexts of pairs, values under the pointer, keys. */
"use strict";

const THEME = "bilinear-jax-theme";

function remembered() {
  try {
    return localStorage.getItem(THEME);
  } catch {
    return null; // where the browser lets files remember nothing
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

if (["light", "dark"].includes(remembered())) setTheme(remembered());

document.addEventListener("DOMContentLoaded", () => {
  themeButton(document.getElementById("theme"));
  document.querySelectorAll("table.sortable").forEach(sortable);
  const search = document.getElementById("search");
  if (search) searchable(search, document.querySelector("table.index"), document.getElementById("found"));
  document.addEventListener("click", toggleDetail);
  tips();
  document.addEventListener("keydown", (event) => keys(event, search));
});

function themeButton(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", dark());
  button.addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    setTheme(theme);
    try {
      localStorage.setItem(THEME, theme);
    } catch {
      // it holds for this page alone
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}

/* Tables */

function valueOf(row, column) {
  const text = row.cells[column].firstChild?.textContent ?? "";
  const number = parseFloat(text.replaceAll("−", "-"));
  return Number.isNaN(number) ? null : number;
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const first = column === 0 ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const size = head.textContent.startsWith("|") ? Math.abs : (value) => value;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // what has no number comes last
        return sign * (size(a) - size(b));
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

function searchable(input, table, found) {
  const rows = [...table.tBodies[0].rows];
  const texts = new Map(
    rows.map((row) => [row, `${row.cells[0].textContent}\n${row.cells[1].textContent}`.toLowerCase()]),
  );
  const none = document.getElementById("none");
  const filter = () => {
    const wanted = input.value.toLowerCase().replaceAll(" ", "␣");
    let count = 0;
    for (const row of rows) {
      row.hidden = !texts.get(row).includes(wanted);
      if (!row.hidden) count += 1;
    }
    found.textContent = wanted ? `${count} of ${rows.length}` : `${rows.length}`;
    none.hidden = count > 0 || !wanted;
  };
  input.addEventListener("input", filter);
  input.form.addEventListener("submit", (event) => {
    event.preventDefault();
    const first = [...table.tBodies[0].rows].find((row) => !row.hidden);
    if (first) location.href = first.querySelector("a").href;
  });
  if (input.value) filter(); // what the browser kept from before
  if (location.hash === "#search") input.focus();
}

function toggleDetail(event) {
  const button = event.target.closest("button.more");
  if (!button) return;
  const detail = document.getElementById(button.getAttribute("aria-controls"));
  detail.hidden = !detail.hidden;
  button.setAttribute("aria-expanded", !detail.hidden);
}

/* Values under the pointer, at the focus, or under a finger */

function tokenTip(token) {
  const context = token.parentElement;
  let position = Number(context.dataset.at) - 1;
  for (const one of context.children) {
    position += 1 + Number(one.dataset.n ?? 0);
    if (one === token) break;
  }
  const names = (context.dataset.names ?? "").split(",");
  const values = [token.dataset.v ?? "0"];
  if (names.length === 2) values.push(token.dataset.w ?? "0");
  const shown = values.map((value, k) => (names[k] ? `${names[k]}: ${value}` : value)).join(" · ");
  return `“${token.textContent.replaceAll(" ", "␣")}”  ${shown}\nposition ${position} of row ${context.dataset.row}`;
}

function cellTip(cell) {
  const table = cell.closest("table");
  const name = (head) => head.textContent.trim();
  return `${name(cell.parentElement.cells[0])} × ${name(table.tHead.rows[0].cells[cell.cellIndex])}: ${cell.dataset.v}`;
}

function tipOf(target) {
  const token = target.closest(".ctx > *");
  if (token) return [token, tokenTip(token)];
  const cell = target.closest(".heat td[data-v]");
  if (cell) return [cell, cellTip(cell)];
  const other = target.closest("[data-tip]");
  return other ? [other, other.dataset.tip] : null;
}

let showTip = () => {};

function tips() {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);
  showTip = (found) => {
    tip.hidden = !found;
    if (!found) return;
    tip.textContent = found[1];
    const box = found[0].getClientRects()[0] ?? found[0].getBoundingClientRect();
    const left = Math.min(Math.max(box.left, 6), innerWidth - tip.offsetWidth - 6);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(left, 6)}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  };
  const show = (event) => showTip(tipOf(event.target));
  document.addEventListener("mouseover", show);
  document.addEventListener("click", show);
  const scrolled = () => {
    const focused = document.activeElement;
    if (focused?.matches(".ctx:focus-visible")) step(focused, 0); // the focus scrolls to where it goes
    else showTip(null);
  };
  document.addEventListener("scroll", scrolled, { passive: true, capture: true });
  document.addEventListener("focusin", (event) => {
    if (event.target.matches(".ctx:focus-visible")) step(event.target, 0);
  });
  document.addEventListener("focusout", (event) => {
    event.target.querySelector?.(".here")?.classList.remove("here");
    showTip(null);
  });
}

/* Move to a neighbouring token of a context that has the focus. */
function step(context, by) {
  const tokens = [...context.children];
  const here = context.querySelector(".here") ?? context.querySelector("b") ?? tokens[0];
  const next = tokens[Math.min(Math.max(tokens.indexOf(here) + by, 0), tokens.length - 1)];
  here.classList.remove("here");
  next.classList.add("here");
  showTip([next, tokenTip(next)]);
}

/* Keys: left and right between features, or between the tokens of a context; / to the search. */
function keys(event, search) {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.key === "Escape") {
    showTip(null);
    if (target !== document.body) target.blur();
    return;
  }
  if (target.matches("input, select, textarea")) return;
  if (event.key === "/") {
    event.preventDefault();
    if (search) search.select();
    else location.href = `${document.body.dataset.root}index.html#search`;
    return;
  }
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  if (target.matches(".ctx:focus-visible")) {
    event.preventDefault();
    step(target, by);
    return;
  }
  const box = target.closest(".scroll");
  if (box && box.scrollWidth > box.clientWidth) return; // these keys scroll it
  const link = document.querySelector(by < 0 ? "a[rel=prev]" : "a[rel=next]");
  if (link) location.href = link.href;
}
