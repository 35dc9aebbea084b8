// The frame: which page is shown, the key, the theme, and whether the server can answer.

import * as adapters from "./adapters.js";
import { askForKeys, call, key, setKey } from "./api.js";
import * as detail from "./detail.js";
import { h, notice, show } from "./dom.js";
import * as live from "./live.js";
import * as playground from "./playground.js";
import { keep, read } from "./storage.js";

const PAGES = [
  [/^\/?$/, playground, "Playground"],
  [/^\/adapters\/?$/, adapters, "Adapters"],
  [/^\/adapters\/([^/]+)$/, detail, "Adapter"],
  [/^\/live\/?$/, live, "Live"],
];
const LOOK_MS = 5000;
const NO_PAGE = "There is no such page";

const main = document.querySelector("#main");
let leave = () => {};

/** Shows the page of the address. A page's `open(place, ...parts, query)` returns what ends it. */
function route() {
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  leave();
  leave = () => {};
  document.querySelectorAll("header nav a").forEach((link) => {
    const here = link.hash === "#/" ? path === "/" : path.startsWith(link.hash.slice(1));
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  const [pattern, page, title] = PAGES.find(([each]) => each.test(path)) || [];
  const parts = page ? decoded(path.match(pattern).slice(1)) : null;
  document.title = `${parts ? parts[0] || title : NO_PAGE} · Loraplex`;
  scrollTo(0, 0);
  if (!parts)
    return show(
      main,
      h("h1", {}, NO_PAGE),
      notice("empty", "The address may be cut off", h("a", { href: "#/" }, "To the playground")),
    );
  leave = page.open(main, ...parts, new URLSearchParams(query)) || (() => {});
}

function decoded(parts) {
  try {
    return parts.map(decodeURIComponent);
  } catch {
    return null;
  }
}

async function look() {
  const server = document.querySelector("#server");
  let [state, said] = ["ready", ""];
  try {
    said = (await call("/ready", { background: true })).base;
  } catch (error) {
    state = error.status === 503 ? "starting" : "gone";
    said = error.status === 503 ? "starting…" : "no answer";
  }
  // What says the same again would be read aloud again.
  if (server.textContent !== said) server.textContent = said;
  server.className = `server ${state}`;
  document.querySelector("#key").textContent = key() ? "API key ✓" : "API key";
}

const dialog = document.querySelector("#ask-key");
const value = document.querySelector("#ask-key-value");
const why = document.querySelector("#ask-key-why");
const usual = why.textContent;
let declined = null; // the key for which nobody wanted to enter another
let answer = null; // whether there is another, once the dialog that is open has been closed

/** Asks for a key; returns whether there is another one now. */
function askKey(reason = usual) {
  if (dialog.open) return answer;
  why.textContent = reason;
  value.value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  value.focus();
  answer = new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(keyChosen()), { once: true }),
  );
  return answer;
}

/** What the dialog came to. */
function keyChosen() {
  const chosen = value.value.trim();
  if (dialog.returnValue === "use" && /[^\x21-\x7e]/.test(chosen))
    return askKey("A key has only plain letters, digits and signs, and this has something else.");
  if (dialog.returnValue === "use" && chosen) setKey(chosen, document.querySelector("#ask-key-keep").checked);
  else if (dialog.returnValue === "forget") {
    setKey("");
    playground.forget();
  } else {
    declined = key();
    return false;
  }
  declined = null;
  look();
  return dialog.returnValue === "use";
}

askForKeys((background) => {
  if (background && (dialog.open || key() === declined)) return false;
  return askKey(
    key()
      ? "The server does not know this key, or it has expired. Enter another."
      : "This server wants an API key. Enter yours.",
  );
});

const chooser = document.querySelector("#theme");
chooser.value = read("loraplex.theme");
chooser.addEventListener("change", () => {
  keep("loraplex.theme", chooser.value);
  document.documentElement.dataset.theme = chooser.value;
});
document.querySelector("#key").addEventListener("click", async () => {
  const before = key();
  await askKey();
  if (key() !== before) route();
});
// Enter in the field is "use", not the form's first button.
value.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  dialog.close("use");
});
addEventListener("hashchange", () => {
  route();
  main.focus();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // or it would be taken for a page
  main.focus();
});
route();
look();
setInterval(() => document.hidden || look(), LOOK_MS);
