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
  h,
  head,
  loading,
  notice,
  plural,
  progress,
  show,
  table,
  tier,
  toast,
  trouble,
} from "./dom.js";

const AGAIN_MS = 3000;

export function open(place, name) {
  const path = `/v1/adapters/${encodeURIComponent(name)}`;
  const state = { gone: false, version: null, shown: "" };
  show(place, h("h1", {}, name), loading(2));

  async function load() {
    try {
      const adapter = await call(path);
      const alive = adapter.versions.filter((each) => each.state !== "deleted");
      const number = alive.some((each) => each.version === state.version)
        ? state.version
        : alive.at(-1)?.version;
      const version = number === undefined ? null : await call(`${path}/versions/${number}`);
      // What is drawn anew loses what is open and focused: not while nothing has changed.
      const now = JSON.stringify([adapter, version]);
      if (state.gone || now === state.shown) return;
      state.shown = now;
      draw(adapter, alive, version);
    } catch (error) {
      if (!state.gone)
        show(
          place,
          h("h1", {}, name),
          trouble(error, "This adapter cannot be shown"),
          h("p", {}, h("a", { href: "#/adapters" }, "All adapters")),
        );
    }
  }

  async function act(verb, work, then = load) {
    if (!(await attempt(work))) return;
    toast(verb);
    then();
  }

  const post = (what) => () =>
    call(`/v1/adapters/${encodeURIComponent(`${name}@${state.version}`)}/${what}`, { method: "POST" });

  const leave = () => {
    location.hash = "#/adapters";
  };

  async function remove(what, where, then) {
    if (
      !(await confirmed(
        `Delete ${what}?`,
        "No new request can use it from now on; running ones finish. The bytes are removed and cannot be brought back from here.",
        "Delete",
      ))
    )
      return;
    await act(`${what} is deleted`, () => call(where, { method: "DELETE" }), then);
  }

  function draw(adapter, alive, version) {
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
        place,
        h("h1", {}, name),
        imports,
        imports.length === 0 && notice("empty", "It has no version that can be served"),
      );
    show(
      place,
      h(
        "div",
        { class: "row title" },
        h("h1", {}, name),
        tier(version.residency, version.pinned),
        h("span", { class: "grow" }),
        h("a", { class: "button primary", href: besideBase(version.reference) }, "Compare with the base"),
        version.residency === "disk"
          ? h("button", { type: "button", onclick: () => act("It is loaded", post("load")) }, "Load")
          : h("button", { type: "button", onclick: () => act("It is unloaded", post("unload")) }, "Unload"),
        version.pinned
          ? h(
              "button",
              { type: "button", onclick: () => act("It may be evicted again", post("unpin")) },
              "Unpin",
            )
          : h("button", { type: "button", onclick: () => act("It stays loaded", post("pin")) }, "Pin"),
        h("button", { type: "button", class: "danger", onclick: () => remove(name, path, leave) }, "Delete"),
      ),
      imports,
      version.reason && notice("error", "It is not served", version.reason),
      h("div", { class: "split" }, facts(version), aliases(adapter, alive)),
      pictures(version),
      versions(alive, version),
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

  function aliases(adapter, alive) {
    const alias = h("input", {
      id: "new-alias",
      placeholder: "prod",
      autocomplete: "off",
      spellcheck: "false",
    });
    const ready = alive.filter((each) => each.state === "ready").map((each) => each.version);
    const options = (chosen) =>
      ready.map((each) => h("option", { value: each, selected: each === chosen }, each));
    const number = h("select", { id: "new-alias-version", "aria-label": "Version" }, options(null).reverse());
    const set = (which, to) => () =>
      call(`${path}/aliases/${encodeURIComponent(which)}`, { method: "PUT", json: { version: Number(to) } });
    const rows = Object.entries(adapter.aliases).map(([which, to]) =>
      h(
        "li",
        { class: "row" },
        h("code", {}, `${name}@${which}`),
        which === "latest"
          ? h("span", { class: "hint" }, `→ ${to}, the newest`)
          : [
              h(
                "label",
                {},
                "→ ",
                h(
                  "select",
                  {
                    "aria-label": `Version of ${which}`,
                    onchange: (event) =>
                      act(`${which} points to ${event.target.value}`, set(which, event.target.value)),
                  },
                  options(to),
                ),
              ),
              h(
                "button",
                {
                  type: "button",
                  class: "quiet",
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
        h("button", {}, "Point"),
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

  function versions(alive, shown) {
    const rows = alive.toReversed().map((each) =>
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
              "aria-pressed": each.version === shown.version,
              onclick: () => {
                state.version = each.version;
                load();
              },
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
              onclick: () => remove(each.reference, `${path}/versions/${each.version}`),
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
  const timer = setInterval(() => used() || load(), AGAIN_MS);
  return () => {
    state.gone = true;
    clearInterval(timer);
  };
}
