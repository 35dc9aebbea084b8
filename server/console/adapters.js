// All adapters in a table, and the way in for new ones.

import { ApiError, bring, pages, upload } from "./api.js";
import { MODULES } from "./charts.js";
import {
  besideBase,
  bytes,
  count,
  date,
  field,
  h,
  head,
  loading,
  notice,
  pageOf,
  percent,
  plural,
  progress,
  show,
  table,
  tier,
  toast,
  trouble,
} from "./dom.js";

const ROWS = 100; // on one page of the table
const WAIT_MS = 120; // after a key, until the table is searched
const ARCHIVE = /\.(zip|tar|tgz|tar\.\w+)$/i;
const PART = /^adapter_(config\.json|model\..+)$/; // of a folder; a checkpoint has more, and large

const COLUMNS = [
  {
    title: "Name",
    of: (each) => each.name,
    cell: (each) => h("a", { href: pageOf(each.name) }, each.name),
    class: "name",
  },
  { title: "Version", of: (each) => each.number, cell: (each) => each.number ?? "–", class: "number" },
  {
    title: "Aliases",
    of: (each) => each.aliases,
    cell: (each) => each.aliases || "–",
    class: "aliases",
  },
  { title: "Rank", of: (each) => each.rank, cell: (each) => each.rank ?? "–", class: "number" },
  { title: "α", of: (each) => each.alpha, cell: (each) => each.alpha ?? "–", class: "number" },
  { title: "Modules", of: (each) => each.modules, cell: (each) => each.modules },
  { title: "Size", of: (each) => each.bytes, cell: (each) => bytes(each.bytes), class: "number" },
  {
    title: "Parameters",
    of: (each) => each.parameters,
    cell: (each) => count(each.parameters),
    class: "number",
  },
  {
    title: "Where",
    of: (each) => each.where,
    cell: (each) => tier(each.where, each.pinned),
  },
  { title: "Created", of: (each) => each.created, cell: (each) => date(each.created), class: "when" },
];

/** What a row shows, of an adapter's newest version that can be served. */
function row(adapter) {
  const { versions } = adapter;
  const newest = versions.at(-1) || {};
  const tiers = new Set(versions.map((each) => each.residency));
  const state = versions.some((each) => each.state === "quarantined") ? "quarantined" : null;
  return {
    name: adapter.name,
    text: `${adapter.name} ${Object.keys(adapter.aliases).join(" ")}`.toLowerCase(),
    number: newest.version,
    aliases: Object.entries(adapter.aliases)
      .filter(([alias]) => alias !== "latest")
      .map(([alias, version]) => `${alias} → ${version}`)
      .join(", "),
    rank: newest.rank,
    alpha: newest.alpha,
    modules: modules(newest.target_modules),
    bytes: newest.bytes || 0,
    parameters: newest.parameters || 0,
    where: state || ["slot", "host", "loading"].find((tier) => tiers.has(tier)) || "disk",
    pinned: versions.some((each) => each.pinned),
    created: adapter.created,
  };
}

function modules(names) {
  if (!names) return "–";
  if (typeof names === "string") return names;
  if (MODULES.every((each) => names.includes(each))) return "all seven";
  return names.map((each) => each.replace("_proj", "")).join(" ");
}

export function open(place, query) {
  const sorted = COLUMNS.findIndex((column) => column.title.toLowerCase() === query.get("sort"));
  const state = {
    rows: [],
    seen: [],
    sort: Math.max(0, sorted),
    up: !query.has("down"),
    page: Math.max(0, Number(query.get("page")) - 1 || 0),
    whole: false,
    error: null,
    turn: 0,
  };
  const search = field({
    id: "search",
    type: "search",
    value: query.get("q") || "",
    placeholder: "name or alias",
  });
  const told = h("p", { class: "hint", role: "status" });
  const body = h("tbody");
  const heads = COLUMNS.map((column, index) =>
    head(h("button", { type: "button", onclick: () => sortBy(index) }, column.title), column.class),
  );
  const back = h("button", { type: "button", onclick: () => turn(-1) }, "‹ Back");
  const on = h("button", { type: "button", onclick: () => turn(1) }, "Next ›");
  const where = h("span", { class: "hint" });
  const rows = table("Adapters", heads, body, "adapters");
  const pager = h("div", { class: "row pager" }, back, on, where);
  const list = h("div");

  function sortBy(index) {
    state.up = state.sort === index ? !state.up : true;
    state.sort = index;
    fromTheFirst();
  }

  function turn(by) {
    state.page += by;
    draw();
    note();
  }

  function fromTheFirst() {
    state.page = 0;
    arrange();
    note();
  }

  /** Into the address, so that it is there again for who comes back. */
  function note() {
    const { title } = COLUMNS[state.sort];
    const parts = {
      ...(search.value.trim() && { q: search.value.trim() }),
      ...(state.sort && { sort: title.toLowerCase() }),
      ...(!state.up && { down: 1 }),
      ...(state.page && { page: state.page + 1 }),
    };
    const text = `${new URLSearchParams(parts)}`;
    history.replaceState(null, "", `#/adapters${text && `?${text}`}`);
  }

  /** What is searched for, sorted. */
  function arrange() {
    const wanted = search.value.trim().toLowerCase();
    const { of } = COLUMNS[state.sort];
    const found = wanted ? state.rows.filter((each) => each.text.includes(wanted)) : state.rows.slice();
    const sign = state.up ? 1 : -1;
    found.sort((one, other) => sign * order(of(one), of(other)) || order(one.name, other.name));
    state.seen = found;
    draw();
  }

  function draw() {
    const last = Math.max(0, Math.ceil(state.seen.length / ROWS) - 1);
    if (state.whole) state.page = Math.min(state.page, last);
    const page = Math.min(state.page, last); // until those that come have come
    const shown = state.seen.slice(page * ROWS, (page + 1) * ROWS);
    show(
      body,
      shown.map((each) =>
        h(
          "tr",
          {},
          COLUMNS.map((column) => h("td", { class: column.class }, column.cell(each))),
        ),
      ),
    );
    heads.forEach((cell, index) => {
      if (index === state.sort) cell.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
    back.disabled = page === 0;
    on.disabled = page === last;
    pager.hidden = last === 0;
    where.textContent = last ? `page ${page + 1} of ${last + 1}` : "";
    const all = state.rows.length;
    const some = state.seen.length === all ? "" : `${state.seen.length.toLocaleString()} of `;
    const coming = state.whole || state.error ? "" : ", loading…";
    told.textContent = `${some}${all.toLocaleString()} adapter${all === 1 ? "" : "s"}${coming}`;
    if (state.error) show(list, trouble(state.error, "The adapters cannot be listed"));
    else if (!all && !state.whole) show(list, loading(3));
    else if (!all)
      show(
        list,
        notice(
          "empty",
          "There are no adapters yet",
          "Drop the folder that PEFT's save_pretrained wrote on the field above, and ask it in the playground.",
        ),
      );
    else if (!shown.length)
      show(
        list,
        notice(
          "empty",
          "No adapter is called that",
          h(
            "button",
            {
              type: "button",
              onclick: () => {
                search.value = "";
                fromTheFirst();
              },
            },
            "Show all",
          ),
        ),
      );
    else if (rows.parentNode !== list) show(list, rows, pager);
  }

  /** Looks again; what is there is shown until as many have come. Of two at once, the last one counts. */
  async function load() {
    const turn = ++state.turn;
    let came = [];
    Object.assign(state, { whole: false, error: null });
    draw();
    try {
      for await (const page of pages("/v1/adapters")) {
        if (turn !== state.turn) return;
        came = came.concat(page.map(row));
        if (came.length < state.rows.length) continue;
        state.rows = came;
        arrange();
      }
      Object.assign(state, { rows: came, whole: true });
    } catch (error) {
      state.error = error;
    }
    if (turn === state.turn) arrange();
  }

  let timer;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(fromTheFirst, WAIT_MS);
  });
  const way = entrance(load, (name) => state.rows.find((each) => each.name === name));
  show(
    place,
    h("h1", {}, "Adapters"),
    way.element,
    h(
      "section",
      { class: "card" },
      h(
        "div",
        { class: "row" },
        h("label", { for: "search" }, "Search"),
        search,
        h("span", { class: "grow" }),
        told,
        h("button", { type: "button", class: "quiet", onclick: load }, "Reload"),
      ),
      list,
    ),
  );
  load();
  return () => {
    clearTimeout(timer);
    state.turn += 1;
    way.leave();
  };
}

function order(one, other) {
  if (one === other) return 0;
  if (one === undefined || one === null) return 1;
  if (other === undefined || other === null) return -1;
  if (typeof one === "string") return one < other ? -1 : 1;
  return one - other;
}

/** Upload and import: a place to drop files on, a name, and what came of it. `changed()` is called when
 * there is another version; `find(name)` is the row of an adapter that is there. */
function entrance(changed, find) {
  let files = [];
  let suggested = "";
  let sending = null; // what cancels it
  let left = false;
  const name = field({ id: "name", required: true, placeholder: "mine", oninput: warn });
  const alias = field({ id: "alias", placeholder: "none", oninput: warn });
  const source = field({ id: "source", placeholder: "hf://org/name@main, s3://bucket/folder" });
  const picked = h("p", { class: "picked" }, "Drop an adapter here: its folder, its files, or an archive.");
  const known = h("p", { class: "hint", role: "status" });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Progress" });
  const stage = h("p", { class: "hint", role: "status" });
  const outcome = h("div");
  const folder = h("input", {
    type: "file",
    webkitdirectory: true,
    hidden: true,
    id: "folder",
    "aria-label": "The adapter's folder",
  });
  const loose = h("input", {
    type: "file",
    multiple: true,
    hidden: true,
    id: "files",
    "aria-label": "The adapter's files",
  });
  const buttons = ["Check only", "Upload"].map((text, index) =>
    h("button", { type: "submit", value: index ? "upload" : "check", class: index ? "primary" : "" }, text),
  );
  const cancel = h("button", { type: "button", hidden: true, onclick: () => sending.abort() }, "Cancel");

  /** `folderName`, if they are a folder's: of that, only what an adapter is made of. */
  function take(chosen, folderName) {
    files = folderName ? chosen.filter((file) => PART.test(file.name)) : chosen;
    const size = files.reduce((sum, file) => sum + file.size, 0);
    const others = chosen.length - files.length;
    const without = others ? `, without ${plural(others, "other file")}` : "";
    picked.textContent = files.length
      ? `${files.map((file) => file.name).join(", ")} (${bytes(size)})${without}`
      : "No adapter was in there. Drop another folder, its files, or an archive.";
    const called = folderName || (isArchive(files) ? files[0].name.replace(ARCHIVE, "") : "");
    if (called && (!name.value || name.value === suggested)) {
      suggested = called.toLowerCase().replace(/[^a-z0-9._-]+/g, "-");
      name.value = suggested;
    }
    // Or the same could not be chosen again, when it has been mended.
    folder.value = "";
    loose.value = "";
    show(outcome);
    warn();
    if (!name.value) name.focus();
  }

  /** Says what it would become where the name is taken: what clients ask for then answers otherwise. */
  function warn() {
    const there = find(name.value.trim());
    const moved = alias.value.trim() ? `, and ${alias.value.trim()} moves to it` : "";
    known.textContent = there
      ? `${there.name} is there already: other bytes become another version of it, its newest${moved}.`
      : "";
  }

  function form(checked) {
    const data = new FormData();
    if (!checked) data.append("name", name.value.trim());
    if (!checked && alias.value.trim()) data.append("alias", alias.value.trim());
    for (const file of files) data.append(isArchive(files) ? "archive" : "files", file, file.name);
    return data;
  }

  function sent(share) {
    bar.value = share;
    stage.textContent =
      share < 1 ? `sending: ${percent(share, 0)}` : "sent; it is checked, and tried out in the engine…";
    if (share === 1) bar.removeAttribute("value");
  }

  function fetched(one) {
    if (one.bytes_total) bar.value = one.bytes / one.bytes_total;
    else bar.removeAttribute("value");
    stage.textContent = progress(one);
  }

  async function send(path, data) {
    await unchanged(files);
    sending = new AbortController();
    cancel.hidden = false;
    return upload(path, data, sent, sending.signal);
  }

  async function work(title, ask, then) {
    const during = files;
    for (const each of buttons) each.disabled = true;
    bar.hidden = false;
    show(outcome);
    addEventListener("beforeunload", hold);
    try {
      const came = await ask();
      if (left) toast(came.reference ? `${came.reference} is there` : "The check has ended");
      show(outcome, then(came, during));
    } catch (error) {
      if (left) toast(`${title}: ${error.message}`, "error");
      show(outcome, error.name === "AbortError" ? notice("", "Cancelled") : trouble(error, title));
    } finally {
      removeEventListener("beforeunload", hold);
      for (const each of buttons) each.disabled = false;
      bar.hidden = true;
      bar.value = 0;
      cancel.hidden = true;
      stage.textContent = "";
    }
  }

  const refuse = (title, text) => show(outcome, notice("error", title, text));

  function submit(event) {
    event.preventDefault();
    const checking = event.submitter?.value === "check";
    const from = source.value.trim();
    if (!files.length && !from)
      return refuse("Nothing to upload", "Drop an adapter on the field, choose its files, or name a source.");
    if (!files.length && checking)
      return refuse("Only files can be checked", "What is imported is checked as it comes in.");
    if (checking) return work("It would be refused", () => send("/v1/adapters:check", form(true)), checked);
    if (!name.value.trim()) return name.focus();
    if (files.length) return work("It was not taken", () => send("/v1/adapters", form(false)), taken);
    const body = { name: name.value.trim(), source: from, alias: alias.value.trim() || null };
    return work("It was not imported", () => bring(body, fetched), taken);
  }

  /** Makes room for the next one, whose name is another. */
  function taken(version, sentFiles) {
    if (files === sentFiles) {
      files = [];
      picked.textContent = "Drop the next one here.";
      for (const each of [name, alias, source]) each.value = "";
      warn();
    }
    if (!left) changed();
    return notice(
      "good",
      `${version.reference} is there`,
      h(
        "span",
        {},
        h("a", { href: pageOf(version.adapter) }, "Look at it"),
        " or ",
        h("a", { href: besideBase(version.reference) }, "ask it beside the base"),
        ".",
      ),
      ...remarks(version.checks),
    );
  }

  const drop = h(
    "div",
    { class: "drop" },
    picked,
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", onclick: () => folder.click() }, "Choose a folder"),
      h("button", { type: "button", onclick: () => loose.click() }, "Choose files"),
    ),
    folder,
    loose,
  );
  // What is dropped beside the field is meant for it: else the browser would show the file instead.
  const over = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  const out = () => drop.classList.remove("over");
  const dropped = async (event) => {
    event.preventDefault();
    out();
    const found = await contents(event.dataTransfer);
    take(found.files, found.folder);
  };
  const listeners = { dragover: over, dragleave: out, drop: dropped };
  for (const [what, listener] of Object.entries(listeners)) addEventListener(what, listener);
  folder.addEventListener("change", () =>
    take([...folder.files].filter(isTop), folder.files[0]?.webkitRelativePath.split("/")[0]),
  );
  loose.addEventListener("change", () => take([...loose.files]));

  const element = h(
    "form",
    { class: "card entrance", onsubmit: submit, novalidate: true },
    h("h2", {}, "Add one"),
    drop,
    h(
      "div",
      { class: "row" },
      h("span", { class: "pair" }, h("label", { for: "name" }, "Name"), name),
      h("span", { class: "pair" }, h("label", { for: "alias" }, "Alias"), alias),
      h("span", { class: "pair wide" }, h("label", { for: "source" }, "or from"), source),
      h("span", { class: "grow" }),
      cancel,
      buttons,
    ),
    known,
    bar,
    stage,
    outcome,
  );
  const leave = () => {
    left = true;
    for (const [what, listener] of Object.entries(listeners)) removeEventListener(what, listener);
  };
  return { element, leave };
}

/** Has the browser ask before it leaves while something is sent. */
const hold = (event) => event.preventDefault();

/** Raises ApiError if a file is not as it was when it was chosen: a browser sends no other. */
async function unchanged(files) {
  try {
    await Promise.all(files.map((file) => file.slice(0, 1).arrayBuffer()));
  } catch {
    throw new ApiError(null, { message: "The files have changed since you chose them. Choose them again." });
  }
}

function checked(seen) {
  if (!seen.ok)
    return trouble(
      { message: "An upload would be refused:", problems: seen.checks.problems },
      "It would be refused",
    );
  return notice(
    "good",
    "It can be served",
    `Rank ${seen.rank}, ${count(seen.parameters)} parameters, ${percent(seen.algebra.bytes_share, 2)} of the base's bytes, ${bytes(seen.bytes)}.`,
    ...remarks(seen.checks),
  );
}

/** Warnings and advice of the checks, as paragraphs. */
export function remarks(checks) {
  return [...(checks?.warnings || []), ...(checks?.advice || [])].map((each) =>
    h("span", {}, each.message, " ", each.fix),
  );
}

const isArchive = (files) => files.length === 1 && ARCHIVE.test(files[0].name);
const isTop = (file) => file.webkitRelativePath.split("/").length === 2;

/** The files of what was dropped: of one folder, those in it; or the files themselves. */
async function contents(transfer) {
  const [entry, another] = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entry?.isDirectory || another) return { files: [...transfer.files] };
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return { files, folder: entry.name };
    for (const each of some.filter((one) => one.isFile))
      files.push(await new Promise((resolve, reject) => each.file(resolve, reject)));
  }
}
