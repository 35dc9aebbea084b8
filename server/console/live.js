// What the server does now: slots and host cache, queues, and the last minutes.

import { call } from "./api.js";
import { lines } from "./charts.js";
import {
  bytes,
  h,
  head,
  loading,
  morph,
  pageOf,
  plural,
  redraw,
  show,
  table,
  tier,
  time,
  trouble,
} from "./dom.js";

const EACH_MS = 1000;
const TROUBLED_S = 5; // until it is asked again after an error
const SPAN_S = 300;
// Those with a line of their own have one of these each.
const COLOURS = [174, 32, 265, 330, 90, 215].map(
  (hue) => `light-dark(hsl(${hue} 65% 36%), hsl(${hue} 60% 66%))`,
);
const OTHER = "var(--muted)"; // the base's, and everybody else's
const TOLD = 100; // events
const FREE = 8; // free places drawn one by one
const HEADS = [
  "Adapter",
  "Where",
  "Running",
  "Waiting",
  "Tokens/s",
  "Requests",
  "Errors",
  "First token p50",
  "p99",
  "Between tokens p50",
  "p99",
];

export function open(place) {
  const state = {
    history: new Map(),
    events: [],
    places: [],
    colours: new Map(),
    order: [],
    since: 0,
    gone: false,
    timer: null,
  };
  const parts = {
    more: h("p", { class: "hint" }),
    tiles: h("div", { class: "tiles" }),
    about: h("p", { class: "hint" }),
    seats: h("ul", { class: "seats" }),
    legend: h("ul", { class: "legend" }),
    charts: h("div", { class: "three" }),
    rows: h("tbody"),
    events: h("ol", { class: "events", tabindex: "0", "aria-label": "Loads and evictions" }),
    error: h("div"),
  };
  const page = [
    h("h1", {}, "Live"),
    parts.error,
    parts.tiles,
    h("section", { class: "card" }, h("h2", {}, "What sits where"), parts.about, parts.seats),
    h("section", { class: "card" }, h("h2", {}, "The last five minutes"), parts.legend, parts.charts),
    h(
      "section",
      { class: "card" },
      h("h2", {}, "By adapter, in the last minute"),
      table(
        "By adapter",
        HEADS.map((each, index) => head(each, index > 1 && "number")),
        parts.rows,
      ),
      parts.more,
    ),
    h("section", { class: "card" }, h("h2", {}, "As it happens"), parts.events),
  ];
  show(place, h("h1", {}, "Live"), parts.error, loading(2));
  let [begun, shown] = [false, false];

  /** Looks, and again in a while; not while nobody can see it. */
  async function look() {
    let wait = EACH_MS;
    try {
      if (!document.hidden) await seen(await call(`/v1/live?since=${state.since}`, { background: begun }));
    } catch (error) {
      if (state.gone) return;
      morph(parts.error, trouble(error, "The server cannot be watched"));
      if (begun) place.classList.add("stale");
      else show(place, h("h1", {}, "Live"), parts.error);
      begun = begun || error.status === 401; // nobody is asked for a key again and again
      wait = 1000 * (error.wait || TROUBLED_S);
    }
    if (!state.gone) state.timer = setTimeout(look, wait);
  }

  function seen(now) {
    if (state.gone) return;
    if (!shown) show(place, page);
    [begun, shown] = [true, true];
    place.classList.remove("stale");
    show(parts.error);
    take(now);
    draw(now);
  }

  function take(now) {
    for (const each of now.history) state.history.set(each.at, each.adapters);
    for (const at of state.history.keys()) if (at < now.now - SPAN_S) state.history.delete(at);
    state.events = [...state.events, ...now.events].slice(-TOLD);
    // The last interval was not over: it is asked for again.
    state.since = now.now;
    state.places = seats(state.places, now.resident, now.places);
    state.colours = colours(state.colours, now);
  }

  function draw(now) {
    const slots = now.resident.filter((each) => each.residency === "slot").length;
    const tiles = [
      ["tokens/s, last minute", now.totals.tokens_per_s.toFixed(1)],
      ["running", now.totals.running],
      ["waiting", now.totals.waiting],
      ["slots", `${slots} / ${now.slots}`],
      ["host cache", `${now.resident.length} / ${now.places}`],
      ["server", `up ${time(now.now - now.started)}`],
    ];
    if (now.restarts || !now.ready)
      tiles.push(["engine", now.ready ? plural(now.restarts, "restart") : "starting"]);
    morph(
      parts.tiles,
      tiles.map(([name, value]) =>
        h(
          "div",
          { class: "tile" },
          h("span", { class: "value" }, `${value}`),
          h("span", { class: "name" }, name),
        ),
      ),
    );
    map(now);
    charts(now);
    byAdapter(now);
    morph(
      parts.events,
      state.events.length
        ? state.events.toReversed().map(event)
        : h("li", { class: "hint" }, "Nothing has been loaded or evicted yet."),
    );
  }

  function map(now) {
    // A large cache is mostly free: that is said, not drawn.
    const last = state.places.findLastIndex((who) => who !== null);
    const drawn = Math.min(now.places, last + 1 + FREE);
    const cells = state.places.slice(0, drawn).map((who) => {
      const each = now.resident.find((one, index) => id(one, index) === who);
      if (!each) return h("li", { class: "seat" }, h("span", { class: "hidden" }, "free"));
      const [name] = (each.reference || "").split("@");
      const called = each.reference || "somebody else's";
      const about = `${each.references.join(", ") || called}: ${each.residency}, ${bytes(each.bytes)}${each.leases ? `, ${each.leases} running` : ""}${each.pinned ? ", pinned" : ""}`;
      return h(
        "li",
        {
          class: `seat ${each.residency}`,
          title: about,
          style: { borderColor: state.colours.get(name) || OTHER },
        },
        name ? h("a", { href: pageOf(name) }, called) : h("span", {}, called),
        h(
          "span",
          { class: "small" },
          `${each.residency}${each.leases ? ` · ${each.leases} running` : ""}${each.pinned ? " · pinned" : ""}`,
        ),
      );
    });
    parts.about.textContent = `The host cache has ${now.places} places; ${now.slots} of what is there can be in slots, which is what a batch can use.`;
    if (drawn < now.places)
      cells.push(h("li", { class: "seat" }, h("span", { class: "small" }, `and ${now.places - drawn} free`)));
    morph(parts.seats, cells);
  }

  function charts(now) {
    const names = [...state.colours.keys()];
    // The interval that is not over yet would look like a fall.
    const newest = Math.floor(now.now / now.interval_s - 1) * now.interval_s;
    const times = Array.from(
      { length: SPAN_S / now.interval_s },
      (_, index) => newest - SPAN_S + (index + 1) * now.interval_s,
    );
    const series = (of, none) =>
      names.map((name) => ({
        name,
        colour: state.colours.get(name),
        values: times.map((at) => {
          const work = state.history.get(at)?.[name];
          return work ? of(work) : none;
        }),
      }));
    morph(
      parts.legend,
      names.map((name) =>
        h("li", {}, h("span", { class: "swatch", style: { background: state.colours.get(name) } }), name),
      ),
    );
    morph(
      parts.charts,
      lines(
        "Tokens per second",
        series((work) => work.tokens / now.interval_s, 0),
        now.interval_s,
        (value) => (value === null ? "–" : `${Number(value.toPrecision(2))}`),
      ),
      lines(
        "Time to the first token, median",
        series((work) => work.first_token_s, null),
        now.interval_s,
        time,
      ),
      lines(
        "Time between tokens, median",
        series((work) => work.token_gap_s, null),
        now.interval_s,
        time,
      ),
    );
  }

  function byAdapter(now) {
    const most = Math.max(1, ...now.adapters.map((each) => each.waiting));
    // The busiest come first; but while somebody is in the table by keyboard, none changes its row.
    if (!parts.rows.contains(document.activeElement)) state.order = now.adapters.map((each) => each.adapter);
    const rank = ({ adapter }) => (state.order.includes(adapter) ? state.order.indexOf(adapter) : Infinity);
    const ordered = now.adapters.toSorted((one, other) => rank(one) - rank(other) || 0);
    const rows = ordered.map((each) =>
      h(
        "tr",
        {},
        h(
          "td",
          { class: "name" },
          each.adapter === now.base
            ? each.adapter
            : h("a", { id: `live-${each.adapter}`, href: pageOf(each.adapter) }, each.adapter),
        ),
        h("td", {}, each.residency ? tier(each.residency) : "the base"),
        h("td", { class: "number" }, each.running),
        h(
          "td",
          { class: "number queue" },
          h("span", { class: "bar", style: { width: `${each.waiting / most}em` } }),
          each.waiting,
        ),
        h("td", { class: "number" }, each.tokens_per_s.toFixed(1)),
        h("td", { class: "number" }, each.requests),
        h("td", { class: `number ${each.errors ? "bad" : ""}` }, each.errors),
        ...[each.first_token_s, each.token_gap_s].flatMap(({ p50, p99 }) => [
          h("td", { class: "number" }, time(p50)),
          h("td", { class: "number" }, time(p99)),
        ]),
      ),
    );
    const others = now.totals.adapters - now.adapters.length;
    parts.more.textContent = others ? `and ${plural(others, "adapter")} with less to do` : "";
    redraw(() =>
      morph(
        parts.rows,
        rows.length
          ? rows
          : h("tr", {}, h("td", { colspan: HEADS.length }, "There is nothing that this key may see.")),
      ),
    );
  }

  look();
  return () => {
    state.gone = true;
    place.classList.remove("stale");
    clearTimeout(state.timer);
  };
}

const WORDS = {
  loaded: "is loaded into the host cache",
  slot: "is put into a slot",
  evicted: "is evicted: another needs its place",
  unloaded: "is unloaded",
  load_failed: "could not be loaded",
};

function event({ at, event: what, references, seconds }) {
  return h(
    "li",
    { class: what },
    h("time", {}, new Date(at * 1000).toLocaleTimeString()),
    " ",
    h("strong", {}, references.join(", ")),
    ` ${WORDS[what] || what}`,
    seconds === null ? "" : `, in ${time(seconds)}`,
  );
}

/** What tells one that is there from another: those that the key may not see have no digest. */
const id = (each, index) => each.digest || `hidden ${index}`;

/** The colours of the busiest, the base beside them: who stays among them keeps theirs. */
function colours(before, now) {
  const drawn = now.adapters.slice(0, COLOURS.length).map((each) => each.adapter);
  const kept = drawn.map((name) => before.get(name));
  const free = COLOURS.filter((each) => !kept.includes(each));
  return new Map(
    drawn.map((name, index) => [name, name === now.base ? OTHER : (kept[index] ?? free.shift())]),
  );
}

/** Who has which place: who stays keeps theirs, so that the map does not jump. */
function seats(before, resident, places) {
  const there = resident.map(id);
  const kept = Array.from({ length: places }, (_, index) =>
    there.includes(before[index]) ? before[index] : null,
  );
  for (const each of there.filter((one) => !kept.includes(one))) kept[kept.indexOf(null)] = each;
  return kept;
}
