// Elements, and the few patterns that all pages use.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** h("a", {href: "…", onclick: f}, "text", child…): an element. Text is text, never markup. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function show(place, ...children) {
  place.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

/** Shows them by changing only what differs: what is focused, selected or pointed at stays so. Not for
 * children that listen to anything. */
export function morph(place, ...children) {
  const wanted = children.flat(Infinity).filter(Boolean);
  wanted.forEach((child, index) => {
    const old = place.childNodes[index];
    if (!old) place.append(child);
    else if (old.nodeName !== child.nodeName) old.replaceWith(child);
    else if (!old.isEqualNode(child)) mend(old, child);
  });
  while (place.childNodes.length > wanted.length) place.lastChild.remove();
}

function mend(old, wanted) {
  if (old.nodeType === Node.TEXT_NODE) {
    const kept = wanted.data.startsWith(old.data) ? old.length : 0; // what is marked in it stays so
    old.replaceData(kept, old.length, wanted.data.slice(kept));
    return;
  }
  const had = [...old.attributes].filter(({ name }) => !wanted.hasAttribute(name));
  for (const { name } of had) if (name !== "open") old.removeAttribute(name); // its reader has opened it
  for (const { name, value } of wanted.attributes) {
    if (name === "style")
      old.style.cssText = wanted.style.cssText; // as an attribute the policy forbids it
    else if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morph(old, [...wanted.childNodes]);
}

/** Draws anew and leaves the focus where it was: on what has the same id then, or else on the page. */
export function redraw(draw) {
  const { id } = document.activeElement;
  draw();
  if (!id) return;
  const wanted = document.getElementById(id) || document.querySelector("#main");
  if (wanted !== document.activeElement) wanted.focus();
}

/** A line for names and the like, which no browser fills in or marks as misspelt. */
export function field(attributes) {
  return h("input", { autocomplete: "off", spellcheck: "false", ...attributes });
}

/** What shows that something is on its way. */
export function loading(rows) {
  return h(
    "div",
    { class: "skeleton", role: "status", "aria-label": "Loading" },
    Array.from({ length: rows }, () => h("div")),
  );
}

/** Something that may be too wide: it scrolls by itself, by keyboard too. */
export function wide(label, ...children) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, children);
}

/** A table in one; `heads` are the cells of its head. */
export function table(label, heads, body, kind) {
  return wide(label, h("table", { class: kind }, h("thead", {}, h("tr", {}, heads)), body));
}

export const head = (content, kind) => h("th", { scope: "col", class: kind }, content);

/** Where a version is: disk, loading, host, slot; or quarantined. */
export const tier = (where, pinned) => h("span", { class: `tier ${where}` }, where, pinned && " 📌");

/** Addresses: an adapter's page, and the playground with a reference beside the base. */
export const pageOf = (name, version) =>
  `#/adapters/${encodeURIComponent(name)}${version ? `?version=${version}` : ""}`;
export const besideBase = (reference) => `#/?adapters=base,${encodeURIComponent(reference)}`;

/** What is shown instead of a page or part that has nothing to show. */
export function notice(kind, title, ...text) {
  return h(
    "div",
    { class: `notice ${kind}`, role: kind === "error" ? "alert" : "status" },
    h("strong", {}, title),
    ...text.map((each) => h("p", {}, each)),
  );
}

const ADVICE = {
  0: "Start it, or look at its terminal.",
  401: "Enter a key with the button at the top.",
  403: "Enter another key with the button at the top, or ask whoever made this one for more.",
  429: "Wait a moment, and try again.",
  503: "Its engine is starting, or is busy: try again in a moment.",
};

/** An error of the API with everything it says: every problem with where, what and what to do. */
export function trouble(error, title = "That did not work") {
  const problems = (error.problems || []).map((problem) =>
    h(
      "li",
      {},
      h("code", {}, problem.code),
      problem.where && h("span", { class: "where" }, problem.where),
      h("p", {}, problem.message),
      h("p", { class: "fix" }, problem.fix),
    ),
  );
  return h(
    "div",
    { class: "notice error", role: "alert" },
    h("strong", {}, title),
    !problems.length && h("p", {}, error.message), // or it would say the first of them twice
    problems.length > 0 && h("ol", { class: "problems" }, problems),
    !problems.length && ADVICE[error.status] && h("p", { class: "fix" }, ADVICE[error.status]),
  );
}

export function toast(text, kind = "") {
  const line = h("p", { class: `toast ${kind}` }, text);
  document.querySelector("#toasts").append(line);
  setTimeout(() => line.remove(), 6000);
}

/** Runs `work`, and returns whether it went well; an error of the API is told in a toast. */
export async function attempt(work) {
  try {
    await work();
    return true;
  } catch (error) {
    toast(error.message, "error");
    return false;
  }
}

/** Asks before what cannot be undone. */
export function confirmed(title, text, verb) {
  const dialog = document.querySelector("#confirm");
  document.querySelector("#confirm-title").textContent = title;
  document.querySelector("#confirm-text").textContent = text;
  document.querySelector("#confirm-yes").textContent = verb;
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
  );
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`Copied: ${what}`);
  } catch {
    // Without HTTPS a browser may have no clipboard: the text can be taken by hand.
    const dialog = h(
      "dialog",
      { "aria-label": what },
      h("pre", { class: "code", tabindex: "0" }, text),
      h("form", { method: "dialog" }, h("button", {}, "Close")),
    );
    document.body.append(dialog);
    dialog.addEventListener("close", () => dialog.remove());
    dialog.showModal();
  }
}

export const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
export const bytes = (n) =>
  n >= 1e9
    ? `${(n / 1e9).toFixed(2)} GB`
    : n >= 1e6
      ? `${(n / 1e6).toFixed(1)} MB`
      : `${Math.ceil(n / 1e3)} kB`;
export const count = (n) =>
  n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : n >= 1e4 ? `${Math.round(n / 1e3)} k` : `${n}`;
export const time = (s) =>
  s === null || s === undefined
    ? "–"
    : s < 0.9995
      ? `${Math.round(s * 1000)} ms`
      : s < 99.5
        ? `${s.toFixed(s < 9.95 ? 2 : 1)} s`
        : s < 5970
          ? `${Math.round(s / 60)} min`
          : s < 48 * 3600
            ? `${Math.round(s / 3600)} h`
            : `${Math.round(s / 86400)} days`;
export const date = (epoch) =>
  epoch ? new Date(epoch * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "–";
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** How far an import has come. */
export const progress = (one) =>
  `${one.state}: ${bytes(one.bytes)}${one.bytes_total ? ` of ${bytes(one.bytes_total)}` : ""}`;
