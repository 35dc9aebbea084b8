// The frame: which page is shown, the key, the theme, and whether the server can answer.

import * as adapters from "./adapters.js";
import { call, key, setKey } from "./api.js";
import * as detail from "./detail.js";
import { h, notice, show } from "./dom.js";
import * as live from "./live.js";
import * as playground from "./playground.js";

const PAGES = [
  [/^\/?$/, playground, "Playground"],
  [/^\/adapters\/?$/, adapters, "Adapters"],
  [/^\/adapters\/([^/]+)$/, detail, "Adapter"],
  [/^\/live\/?$/, live, "Live"],
];
const LOOK_MS = 5000;

const main = document.querySelector("#main");
let leave = () => {};

/** Shows the page of the address. A page's `open(place, ...parts)` returns what ends it. */
async function route() {
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  leave();
  leave = () => {};
  document.querySelectorAll("header nav a").forEach((link) => {
    const here = link.hash === "#/" ? path === "/" : path.startsWith(link.hash.slice(1));
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  const [pattern, page, title] = PAGES.find(([each]) => each.test(path)) || [];
  if (!page)
    return show(main, notice("empty", "There is no such page", h("a", { href: "#/" }, "To the playground")));
  const parts = path.match(pattern).slice(1).map(decodeURIComponent);
  document.title = `${parts[0] || title} · Loraplex`;
  scrollTo(0, 0);
  leave = page.open(main, ...parts, new URLSearchParams(query)) || (() => {});
}

async function look() {
  const server = document.querySelector("#server");
  let state = "gone";
  try {
    const ready = await call("/ready");
    server.textContent = ready.base;
    state = "ready";
  } catch (error) {
    server.textContent = error.status === 503 ? "starting…" : "no answer";
    state = error.status === 503 ? "starting" : "gone";
  }
  server.className = `server ${state}`;
  document.querySelector("#key").textContent = key() ? "API key ✓" : "API key";
}

function askKey(why) {
  const dialog = document.querySelector("#ask-key");
  if (dialog.open) return;
  const value = document.querySelector("#ask-key-value");
  if (why) document.querySelector("#ask-key-why").textContent = why;
  value.value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  value.focus();
}

function keyChosen() {
  const dialog = document.querySelector("#ask-key");
  const value = document.querySelector("#ask-key-value").value.trim();
  if (dialog.returnValue === "use" && value) setKey(value, document.querySelector("#ask-key-keep").checked);
  else if (dialog.returnValue === "forget") setKey("");
  else return;
  look();
  route();
}

function theme(value) {
  if (value) document.documentElement.dataset.theme = value;
  else delete document.documentElement.dataset.theme;
}

const chooser = document.querySelector("#theme");
chooser.value = localStorage.getItem("loraplex.theme") || "";
theme(chooser.value);
chooser.addEventListener("change", () => {
  localStorage.setItem("loraplex.theme", chooser.value);
  theme(chooser.value);
});
document.querySelector("#key").addEventListener("click", () => askKey());
document.querySelector("#ask-key").addEventListener("close", keyChosen);
// Enter in the field is "use", not the form's first button.
document.querySelector("#ask-key-value").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  document.querySelector("#ask-key").close("use");
});
addEventListener("unauthorized", () =>
  askKey(
    key()
      ? "The server does not know this key, or it has expired. Enter another."
      : "This server wants an API key. Enter yours.",
  ),
);
addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // or it would be taken for a page
  main.focus();
});
route();
look();
setInterval(() => document.hidden || look(), LOOK_MS);
