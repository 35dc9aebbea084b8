// Pictures, in SVG: each says in words what it shows, and has its numbers beside it for who cannot see it.

import { bytes, count, h, head, percent, s, table, wide } from "./dom.js";

/** The linear layers of a block, in their order. */
export const MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

function figure(caption, picture, ...below) {
  return h("figure", {}, h("figcaption", {}, caption), picture, ...below);
}

/** Columns of numbers for those who cannot see the picture, or want them. */
function numbers(heads, rows) {
  const cells = rows.map((row) =>
    h(
      "tr",
      {},
      row.map((each) => h("td", { class: "number" }, each)),
    ),
  );
  return h(
    "details",
    { class: "numbers" },
    h("summary", {}, "Numbers"),
    table(
      "Numbers",
      heads.map((each) => head(each)),
      h("tbody", {}, cells),
    ),
  );
}

/** ‖ΔW‖ by layer and module; darker is more. */
export function heat(layers) {
  const places = layers.map((layer) => {
    const [, number = "0", module] = layer.module.match(/(?:^|\.)(\d+)\..*?([^.]+)$/) || [
      null,
      "0",
      layer.module,
    ];
    return { ...layer, number: Number(number), kind: module };
  });
  const kinds = [...new Set(places.map((each) => each.kind))].sort(
    (one, other) => MODULES.indexOf(one) - MODULES.indexOf(other),
  );
  const last = Math.max(...places.map((each) => each.number));
  const most = Math.max(...places.map((each) => each.norm)) || 1;
  const [cell, high, left, top] = [24, 22, 84, 20];
  const readout = h("p", { class: "readout" }, "Point at a cell to read it.");
  const tell = (each) => () => {
    readout.textContent = `layer ${each.number}, ${each.kind}: ‖ΔW‖ ${each.norm.toPrecision(3)}, rank ${each.rank}, 99 % of it in ${each.rank_99}`;
  };
  const [width, tall] = [left + (last + 1) * cell, top + kinds.length * high + 4];
  const picture = s(
    "svg",
    {
      viewBox: `0 0 ${width} ${tall}`,
      // Who has many layers scrolls: smaller, no label could be read.
      style: { minWidth: `${width}px`, maxWidth: `${1.4 * width}px` },
      role: "img",
      "aria-label": `‖ΔW‖ of ${places.length} modules in ${last + 1} layers, at most ${most.toPrecision(3)}, in ${largest(places)}`,
    },
    kinds.map((kind, row) =>
      s("text", { x: left - 8, y: top + row * high + 15, "text-anchor": "end" }, kind),
    ),
    Array.from(
      { length: last + 1 },
      (_, layer) =>
        layer % 5 === 0 &&
        s("text", { x: left + layer * cell + cell / 2, y: 14, "text-anchor": "middle" }, `${layer}`),
    ),
    places.map((each) =>
      s("rect", {
        x: left + each.number * cell + 1,
        y: top + kinds.indexOf(each.kind) * high + 1,
        width: cell - 2,
        height: high - 2,
        rx: 3,
        class: "cell",
        style: { fillOpacity: 0.06 + 0.94 * (each.norm / most) },
        onpointerenter: tell(each),
      }),
    ),
  );
  return figure(
    "‖ΔW‖ by layer and module",
    wide("Heat map", picture),
    readout,
    numbers(
      ["module", "‖ΔW‖", "rank", "rank of 99 %"],
      places.map((each) => [each.module, each.norm.toPrecision(3), each.rank, each.rank_99]),
    ),
  );
}

function largest(places) {
  const first = places.reduce((one, other) => (other.norm > one.norm ? other : one));
  return `layer ${first.number}, ${first.kind}`;
}

/** How much of ‖ΔW‖² the largest directions of each layer keep. */
export function curve(energy, rank99) {
  const [width, high, left, bottom] = [340, 180, 44, 30];
  const x = (k) => left + ((width - left - 12) * (k - 1)) / Math.max(1, energy.length - 1);
  const y = (share) => 10 + (high - bottom - 10) * (1 - share);
  const points = energy.map((share, index) => `${x(index + 1)},${y(share)}`).join(" ");
  const ticks = [...new Set([1, rank99, energy.length])];
  return figure(
    `${rank99} of ${energy.length} directions keep 99 % of the change`,
    s(
      "svg",
      {
        viewBox: `0 0 ${width} ${high}`,
        class: "curve",
        role: "img",
        "aria-label": `Share of the change's energy by the number of directions kept: one keeps ${percent(energy[0] || 0)}, ${rank99} keep 99 %`,
      },
      [0, 0.5, 1].map((share) => [
        s("line", { x1: left, x2: width - 12, y1: y(share), y2: y(share), class: "grid" }),
        s("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share, 0)),
      ]),
      s("line", { x1: left, x2: width - 12, y1: y(0.99), y2: y(0.99), class: "mark" }),
      ticks.map((k) => s("text", { x: x(k), y: high - 10, "text-anchor": "middle" }, `${k}`)),
      energy.length > 1 && s("polyline", { points, class: "line" }),
      energy.map((share, index) =>
        s("circle", { cx: x(index + 1), cy: y(share), r: index + 1 === rank99 ? 5 : 2.5, class: "dot" }),
      ),
    ),
    numbers(
      ["directions", "share"],
      energy.map((share, index) => [index + 1, percent(share, 2)]),
    ),
  );
}

/** Parameters and bytes against the base. */
export function share(algebra) {
  const rows = [
    ["parameters of ΔW", algebra.delta_parameters, count],
    ["parameters kept, of A and B", algebra.parameters, count],
    ["bytes of the base", algebra.base_bytes, bytes],
    ["bytes of the adapter", algebra.bytes, bytes],
  ];
  const part = (index) => rows[index][1] / rows[index - (index % 2)][1];
  return figure(
    `${percent(algebra.reduction)} fewer numbers than ΔW has, ${percent(algebra.bytes_share, 2)} of the base's bytes`,
    h(
      "dl",
      { class: "bars" },
      rows.map(([name, value, say], index) =>
        h(
          "div",
          {},
          h("dt", {}, name),
          h(
            "dd",
            {},
            h("span", {
              class: `bar ${index % 2 ? "part" : ""}`,
              style: { width: `${Math.max(0.6, 100 * part(index))}%` },
            }),
            h("span", {}, say(value)),
          ),
        ),
      ),
    ),
  );
}

/** Requests by hour in the last day. */
export function bars(hours) {
  const now = Math.floor(Date.now() / 3600000) * 3600;
  const by = new Map(hours.map((each) => [each.hour, each.requests]));
  const most = Math.max(...by.values());
  const slots = Array.from({ length: 25 }, (_, index) => now - (24 - index) * 3600);
  const label = (hour) =>
    new Date(hour * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return figure(
    `Requests by hour, at most ${count(most)}`,
    h(
      "div",
      { class: "hours", role: "img", "aria-label": `Requests by hour; the most in one hour is ${most}` },
      slots.map((hour) => {
        const requests = by.get(hour) || 0;
        const style = { height: `${(100 * requests) / most}%` };
        return h("span", { title: `${label(hour)}: ${requests}` }, h("span", { class: "bar part", style }));
      }),
    ),
    h(
      "div",
      { class: "row hint", "aria-hidden": "true" },
      h("span", {}, label(slots[0])),
      h("span", { class: "grow" }),
      h("span", {}, label(slots[12])),
      h("span", { class: "grow" }),
      h("span", {}, label(now)),
    ),
    numbers(
      ["hour", "requests", "tokens asked", "tokens answered"],
      hours.map((each) => [label(each.hour), each.requests, each.prompt_tokens, each.output_tokens]),
    ),
  );
}

/** Lines over the last minutes: `series` are {name, colour, values}, null where there is nothing. */
export function lines(title, series, step, say) {
  const [width, high, left, bottom] = [340, 150, 52, 22];
  const length = Math.max(2, ...series.map((each) => each.values.length));
  const known = series.map(({ name, values }) => {
    const some = values.filter((value) => value !== null);
    return { name, last: some.at(-1) ?? null, most: some.length ? Math.max(...some) : null };
  });
  const most = ceiling(Math.max(...known.map((each) => each.most), 0));
  const x = (index) => left + ((width - left - 8) * index) / (length - 1);
  const y = (value) => 8 + (high - bottom - 8) * (1 - value / most);
  const ago = (index) => `${Math.round(((length - 1 - index) * step) / 60)} min`;
  const now = known.map((each) => `${each.name} ${say(each.last)}`).join(", ");
  return figure(
    title,
    s(
      "svg",
      {
        viewBox: `0 0 ${width} ${high}`,
        role: "img",
        "aria-label": `${title} over the last minutes. Last: ${now || "nothing"}`,
      },
      [0, 0.5, 1].map((part) => [
        s("line", { x1: left, x2: width - 8, y1: y(part * most), y2: y(part * most), class: "grid" }),
        s("text", { x: left - 6, y: y(part * most) + 4, "text-anchor": "end" }, say(part * most)),
      ]),
      [0, length - 1].map((index) =>
        s(
          "text",
          { x: x(index), y: high - 6, "text-anchor": index ? "end" : "start" },
          index ? "now" : `${ago(index)} ago`,
        ),
      ),
      series.map((each) =>
        runs(each.values).map((run) =>
          run.length > 1
            ? s("polyline", {
                points: run.map(([index, value]) => `${x(index)},${y(value)}`).join(" "),
                class: "line",
                style: { stroke: each.colour },
              })
            : s("circle", { cx: x(run[0][0]), cy: y(run[0][1]), r: 2.5, style: { fill: each.colour } }),
        ),
      ),
    ),
    numbers(
      ["adapter", "last", "most"],
      known.map((each) => [each.name, say(each.last), say(each.most)]),
    ),
  );
}

/** Stretches without a gap, as [index, value]. */
function runs(values) {
  const found = [[]];
  values.forEach((value, index) => {
    if (value === null) found.push([]);
    else found.at(-1).push([index, value]);
  });
  return found.filter((run) => run.length);
}

/** The next 1, 2 or 5 times a power of ten. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((each) => each * power >= value) * power;
}
