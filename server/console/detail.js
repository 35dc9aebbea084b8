// One adapter: what it is, what it changed, where it is, what it is used for; and what can be done.

import { call } from "./api.js";
import { remarks } from "./adapters.js";
import { bars, curve, heat, share } from "./charts.js";
import {
  attempt,
  besideBase,
  bytes,
  confirmed,
  count,
  date,
  field,
  h,
  head,
  loading,
  morph,
  notice,
  pageOf,
  plural,
  progress,
  redraw,
  show,
  table,
  tier,
  toast,
  trouble,
} from "./dom.js";

const AGAIN_MS = 3000;

export function open(place, name, query) {
  const path = `/v1/adapters/${encodeURIComponent(name)}`;
  const state = { turn: 0, version: Number(query.get("version")) || null, shown: "" };
  const wrong = h("div");
  const page = h("div", {}, h("h1", {}, name), loading(2));
  show(place, wrong, page);

  /** Looks again. `background`: nobody waits for it. Of two at once, the one that began last is shown. */
  async function load(background = false) {
    const turn = ++state.turn;
    try {
      const adapter = await call(path, { background });
      const number = adapter.versions.some((each) => each.version === state.version)
        ? state.version
        : adapter.versions.at(-1)?.version;
      const version = number === undefined ? null : await call(`${path}/versions/${number}`, { background });
      if (turn !== state.turn) return;
      show(wrong);
      // What is drawn anew loses what is open: not while nothing has changed.
      const now = JSON.stringify([adapter, version]);
      if (now === state.shown) return;
      state.shown = now;
      redraw(() => draw(adapter, version));
    } catch (error) {
      if (turn !== state.turn) return;
      morph(wrong, trouble(error, "This adapter cannot be shown"));
      if (error.status === 404 || !state.shown) {
        state.shown = "";
        show(page, h("h1", {}, name), h("p", {}, h("a", { href: "#/adapters" }, "All adapters")));
      }
    }
  }

  async function act(verb, work, then = load) {
    if (await attempt(work)) {
      toast(verb);
      return then();
    }
    state.shown = ""; // what was chosen is not so
    return load();
  }

  const post = (what) => () =>
    call(`/v1/adapters/${encodeURIComponent(`${name}@${state.version}`)}/${what}`, { method: "POST" });

  const leave = () => {
    location.hash = "#/adapters";
  };

  async function remove(what, where, lost, then) {
    const text = `No new request can use it from now on; running ones finish. ${lost} The bytes are removed and cannot be brought back from here.`;
    if (await confirmed(`Delete ${what}?`, text, "Delete"))
      await act(`${what} is deleted`, () => call(where, { method: "DELETE" }), then);
  }

  /** The head of the page, with what can be done to all of it. */
  function title(adapter, ...more) {
    const aliases = Object.keys(adapter.aliases).filter((each) => each !== "latest");
    const lost = `It has ${plural(adapter.versions.length, "version")}${aliases.length ? ` and the aliases ${aliases.join(", ")}: all of them go` : ""}.`;
    return h(
      "div",
      { class: "row title" },
      h("h1", {}, name),
      more,
      h(
        "button",
        { type: "button", class: "danger", onclick: () => remove(name, path, lost, leave) },
        "Delete",
      ),
    );
  }

  function showVersion(number) {
    state.version = number;
    history.replaceState(null, "", pageOf(name, number));
    load();
  }

  function draw(adapter, version) {
    state.version = version?.version ?? null;
    const imports = (adapter.imports || [])
      .filter((each) => !("version" in each))
      .map((each) =>
        each.error
          ? trouble(each.error, `The import from ${each.source} failed`)
          : notice("", `Importing from ${each.source}`, progress(each)),
      );
    if (!version)
      return show(
        page,
        title(adapter, h("span", { class: "grow" })),
        imports,
        imports.length === 0 &&
          notice(
            "empty",
            "It has no version that can be served",
            h("a", { href: "#/adapters" }, "All adapters"),
          ),
      );
    const button = (id, text, verb) =>
      h("button", { type: "button", id, onclick: () => act(verb, post(text.toLowerCase())) }, text);
    show(
      page,
      title(
        adapter,
        tier(version.residency, version.pinned),
        h("span", { class: "grow" }),
        h("a", { class: "button primary", href: besideBase(version.reference) }, "Compare with the base"),
        version.residency === "disk"
          ? button("load", "Load", "It is loaded")
          : button("load", "Unload", "It is unloaded"),
        version.pinned
          ? button("pin", "Unpin", "It may be evicted again")
          : button("pin", "Pin", "It stays loaded"),
      ),
      imports,
      version.reason && notice("error", "It is not served", version.reason),
      h("div", { class: "split" }, facts(version), aliases(adapter)),
      pictures(version),
      versions(adapter, version),
      usage(adapter.usage || []),
      said(version),
      h(
        "details",
        { class: "card" },
        h("summary", {}, "adapter_config.json"),
        h("pre", { class: "code", tabindex: "0" }, JSON.stringify(version.config, null, 2)),
      ),
    );
  }

  function facts(version) {
    const { algebra } = version;
    const rows = [
      ["Version", `${version.version}, of ${date(version.created)}`],
      ["Rank, α", `${version.rank}, ${version.alpha}${version.rslora ? " (rsLoRA)" : ""}`],
      ["Modules", [version.target_modules].flat().join(", ")],
      ["Numbers", version.dtype],
      ["Base", version.base_model || "not said"],
      ["From", version.source],
      ["‖ΔW‖", algebra ? algebra.norm.toPrecision(4) : "–"],
      ["Digest", h("code", { class: "digest" }, version.digest)],
    ];
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "What it is"),
      h(
        "dl",
        { class: "list" },
        rows.map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, value))),
      ),
    );
  }

  function aliases(adapter) {
    const alias = field({ id: "new-alias", placeholder: "prod" });
    const ready = adapter.versions.filter((each) => each.state === "ready").map((each) => each.version);
    const options = (chosen) =>
      ready.map((each) => h("option", { value: each, selected: each === chosen }, each));
    const number = h("select", { id: "new-alias-version", "aria-label": "Version" }, options(null).reverse());
    const set = (which, to) => () =>
      call(`${path}/aliases/${encodeURIComponent(which)}`, { method: "PUT", json: { version: Number(to) } });
    // Not at once when another is chosen: with the arrow keys one passes those between.
    const mover = (which, to) => {
      const move = h(
        "button",
        {
          type: "button",
          id: `move-${which}`,
          "aria-label": `Move ${which}`,
          disabled: true,
          onclick: () => act(`${which} points to ${chosen.value}`, set(which, chosen.value)),
        },
        "Move",
      );
      const chosen = h(
        "select",
        {
          id: `alias-${which}`,
          "aria-label": `Version of ${which}`,
          onchange: () => {
            move.disabled = Number(chosen.value) === to;
          },
        },
        options(to),
      );
      return [h("span", { "aria-hidden": "true" }, "→"), chosen, move];
    };
    const rows = Object.entries(adapter.aliases).map(([which, to]) =>
      h(
        "li",
        { class: "row" },
        h("code", {}, `${name}@${which}`),
        which === "latest"
          ? h("span", { class: "hint" }, `→ ${to}, the newest`)
          : [
              mover(which, to),
              h(
                "button",
                {
                  type: "button",
                  class: "quiet",
                  id: `remove-${which}`,
                  "aria-label": `Remove ${which}`,
                  onclick: () =>
                    act(`${which} is removed`, () =>
                      call(`${path}/aliases/${encodeURIComponent(which)}`, { method: "DELETE" }),
                    ),
                },
                "×",
              ),
            ],
      ),
    );
    const add = (event) => {
      event.preventDefault();
      if (alias.value.trim())
        act(`${alias.value.trim()} points to ${number.value}`, set(alias.value.trim(), number.value));
    };
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Aliases"),
      rows.length
        ? h("ul", { class: "plain" }, rows)
        : h(
            "p",
            { class: "hint" },
            "None. Clients that ask for an alias get another version when you move it.",
          ),
      h(
        "form",
        { class: "row", onsubmit: add },
        h("label", { for: "new-alias" }, "New"),
        alias,
        h("span", { "aria-hidden": "true" }, "→"),
        number,
        h("button", { id: "point" }, "Point"),
      ),
    );
  }

  function pictures({ algebra }) {
    if (!algebra) return null;
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "What it changed"),
      h(
        "p",
        { class: "hint" },
        "ΔW = (α/r)·B·A is what the adapter adds to a layer's weights; ‖ΔW‖ is how much that is.",
      ),
      heat(algebra.layers),
      h("div", { class: "split" }, curve(algebra.energy, algebra.rank_99), share(algebra)),
    );
  }

  function versions(adapter, shown) {
    const rows = adapter.versions.toReversed().map((each) =>
      h(
        "tr",
        { class: each.version === shown.version ? "here" : null },
        h(
          "td",
          {},
          h(
            "button",
            {
              type: "button",
              class: "link",
              id: `version-${each.version}`,
              "aria-pressed": `${each.version === shown.version}`,
              onclick: () => showVersion(each.version),
            },
            `${each.version}`,
          ),
        ),
        h("td", {}, each.state),
        h("td", {}, `${each.rank}`),
        h("td", { class: "number" }, bytes(each.bytes)),
        h("td", {}, tier(each.residency)),
        h("td", {}, date(each.created)),
        h("td", {}, each.source),
        h(
          "td",
          {},
          h(
            "button",
            {
              type: "button",
              class: "quiet",
              "aria-label": `Delete version ${each.version}`,
              onclick: () =>
                remove(
                  each.reference,
                  `${path}/versions/${each.version}`,
                  adapter.versions.length > 1 ? "The other versions stay." : "It is the only version.",
                ),
            },
            "Delete",
          ),
        ),
      ),
    );
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Versions"),
      table(
        "Versions",
        ["Version", "State", "Rank", "Size", "Where", "Created", "From", ""].map((each) =>
          head(each || h("span", { class: "hidden" }, "Actions"), each === "Size" && "number"),
        ),
        h("tbody", {}, rows),
      ),
    );
  }

  function usage(hours) {
    const sum = (field) => hours.reduce((total, each) => total + each[field], 0);
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Used in the last day"),
      hours.length
        ? [
            h(
              "p",
              {},
              `${plural(sum("requests"), "request")}, ${count(sum("prompt_tokens"))} tokens asked, ${count(sum("output_tokens"))} answered.`,
            ),
            bars(hours),
          ]
        : h("p", { class: "hint" }, "Not at all."),
    );
  }

  function said({ checks }) {
    const lines = remarks(checks);
    return (
      lines.length > 0 &&
      h(
        "section",
        { class: "card" },
        h("h2", {}, "What the checks say"),
        h(
          "ul",
          {},
          lines.map((each) => h("li", {}, each)),
        ),
      )
    );
  }

  load();
  const used = () =>
    document.hidden ||
    document.querySelector("dialog[open], main details[open]") ||
    place.contains(document.activeElement?.closest("input, select"));
  const timer = setInterval(() => used() || load(true), AGAIN_MS);
  return () => {
    state.turn += 1;
    clearInterval(timer);
  };
}
