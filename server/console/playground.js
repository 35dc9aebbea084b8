// One prompt, the base and up to three adapters side by side.

import { call, chat, forSession } from "./api.js";
import { copy, field, h, morph, show, time, trouble } from "./dom.js";
import { forget as forgetKept, keep, read } from "./storage.js";

const MOST = 4; // that answer side by side
const KEPT = 50; // prompts of the history
const KEPT_LENGTH = 500_000; // characters of it
const HISTORY = "loraplex.history";
const SHOWN = 100; // names that are offered
const ADD = "add an adapter: sql, sql@2, sql@prod";
const FENCED = /^```[^\n]*\n([\s\S]*?)(?:^```[ \t]*(?:\n|$)|$(?![\s\S]))/m;
const QUOTED = /`([^`\n]+)`/;
const SHORT_S = 0.05; // no speed is told of a shorter stream

// Made once: who looks at another page finds answers and prompt again, and what streams goes on.
let desk = null;

export function open(place, query) {
  desk ??= build();
  desk.choose(query.get("adapters")?.split(",").filter(Boolean));
  show(place, desk.elements);
  desk.offer();
}

/** Answers, prompt and history: they are of whoever had the key. */
export function forget() {
  desk?.stop();
  desk = null;
  forgetKept(HISTORY);
}

function build() {
  const last = history()[0];
  const state = { models: [], columns: new Map(), stop: null, offered: 0 };

  const prompt = h(
    "textarea",
    { id: "prompt", rows: 5, placeholder: "Write a poem about the river.", spellcheck: "false" },
    last?.prompt || "",
  );
  const system = h("input", { id: "system", placeholder: "none", autocomplete: "off" });
  const most = h("input", { id: "most", type: "number", min: 1, value: 200 });
  const heat = h("input", { id: "heat", type: "number", min: 0, max: 2, step: "any", value: 0 });
  const go = h("button", { type: "submit", class: "primary" }, "Ask");
  const chosen = h("ul", { class: "chips", "aria-label": "Who answers" });
  const names = h("datalist", { id: "names" });
  const adding = field({ id: "adding", list: "names", placeholder: ADD });
  const columns = h("div", { class: "columns", role: "group", "aria-label": "Answers" });
  const aloud = h("p", { class: "hidden", role: "status" });
  const past = h("ol", { class: "history" });

  function choose(models = state.models) {
    state.models = [...new Set(models)].slice(0, MOST);
    const kept = state.columns;
    state.columns = new Map(state.models.map((model) => [model, kept.get(model) || column(model)]));
    show(
      chosen,
      state.models.map((model) =>
        h(
          "li",
          { class: "chip" },
          model,
          h(
            "button",
            {
              type: "button",
              "aria-label": `Remove ${model}`,
              onclick: () => {
                choose(state.models.filter((each) => each !== model));
                adding.focus();
              },
            },
            "×",
          ),
        ),
      ),
    );
    adding.disabled = state.models.length >= MOST;
    adding.placeholder = adding.disabled ? `no more than ${MOST}` : ADD;
    show(
      columns,
      [...state.columns.values()].map((each) => each.element),
    );
    const who = state.models.map(encodeURIComponent).join(",");
    window.history.replaceState(null, "", `#/?adapters=${who}`);
  }

  function add() {
    const model = adding.value.trim();
    if (!model) return;
    adding.value = "";
    choose([...state.models, model]);
    offer();
  }

  /** Names that begin with what is typed; with an @ in it, that adapter's versions and aliases. */
  async function offer() {
    const turn = ++state.offered;
    const [typed, rest] = adding.value.trim().split("@");
    try {
      const { data } = await call(`/v1/adapters?limit=${SHOWN}&prefix=${encodeURIComponent(typed)}`, {
        background: true,
      });
      if (turn !== state.offered) return;
      const found = rest === undefined ? ["base", ...data.map((each) => each.name)] : references(data, typed);
      show(
        names,
        found.map((value) => h("option", { value })),
      );
    } catch {
      // A key that may only infer can still type a name.
    }
  }

  function body(model) {
    const messages = [{ role: "user", content: prompt.value }];
    if (system.value.trim()) messages.unshift({ role: "system", content: system.value.trim() });
    const asked = { model, messages, temperature: Number(heat.value) };
    return most.value ? { ...asked, max_tokens: Number(most.value) } : asked;
  }

  async function ask(event) {
    event.preventDefault();
    if (state.stop) return state.stop.abort();
    add(); // what was typed and not entered is meant
    if (!prompt.value.trim()) return prompt.focus();
    if (!state.models.length) choose(["base"]);
    state.stop = new AbortController();
    go.textContent = "Stop";
    try {
      remember({ prompt: prompt.value, models: state.models });
      tell();
      const asked = [...state.columns].map(([model, each]) => each.run(body(model), state.stop.signal));
      aloud.textContent = (await Promise.all(asked)).join("; ");
    } finally {
      state.stop = null;
      go.textContent = "Ask";
    }
  }

  function tell() {
    const entries = history();
    show(
      past,
      entries.map((entry) =>
        h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              class: "quiet",
              onclick: () => {
                prompt.value = entry.prompt;
                choose(entry.models);
                prompt.focus();
              },
            },
            h("span", { class: "said" }, entry.prompt),
            h("span", { class: "who" }, entry.models.join(", ")),
          ),
        ),
      ),
    );
    clear.hidden = !entries.length;
  }

  const clear = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () => {
        forgetKept(HISTORY);
        tell();
      },
    },
    "Forget all",
  );
  const form = h(
    "form",
    { class: "card", onsubmit: ask },
    h("label", { for: "prompt" }, "Prompt"),
    prompt,
    h(
      "div",
      { class: "who-answers" },
      h("span", { class: "label" }, "Who answers"),
      chosen,
      h("label", { class: "hidden", for: "adding" }, "Add an adapter"),
      adding,
      names,
    ),
    h(
      "div",
      { class: "row" },
      h("span", { class: "pair wide" }, h("label", { for: "system" }, "System"), system),
      h("span", { class: "pair" }, h("label", { for: "most" }, "Most tokens"), most),
      h("span", { class: "pair" }, h("label", { for: "heat" }, "Temperature"), heat),
      h("span", { class: "grow" }),
      h("span", { class: "hint keys" }, "Ctrl + Enter"),
      go,
    ),
  );

  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (!event.repeat && !state.stop) form.requestSubmit();
  });
  adding.addEventListener("input", offer);
  adding.addEventListener("change", () => {
    const offered = [...names.children].map((each) => each.value);
    if (offered.includes(adding.value.trim())) add();
  });
  adding.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    add();
  });

  state.models = last?.models || ["base"];
  tell();
  const elements = [
    h("h1", {}, "Playground"),
    form,
    columns,
    aloud,
    h(
      "section",
      { class: "card" },
      h("div", { class: "row" }, h("h2", {}, "History"), h("span", { class: "grow" }), clear),
      h("p", { class: "hint" }, "What you ask is kept in this browser, until you forget it or the key."),
      past,
    ),
  ];
  return { elements, choose, offer, stop: () => state.stop?.abort() };
}

function references(adapters, name) {
  const adapter = adapters.find((each) => each.name === name);
  if (!adapter) return [];
  const all = [...Object.keys(adapter.aliases), ...adapter.versions.map((each) => each.version)];
  return all.map((each) => `${name}@${each}`);
}

/** A reply as nodes to morph: what it fences or quotes as code, and text. */
function formatted(reply) {
  const text = (part) =>
    part
      .split(QUOTED)
      .map((each, odd) => (odd % 2 ? h("code", {}, each) : each && document.createTextNode(each)));
  return reply
    .split(FENCED)
    .flatMap((part, odd) => (odd % 2 ? h("code", { class: "block" }, part.trimEnd()) : text(part)));
}

/** One who answers: its element, and `run`, which asks and returns how it went, in words. */
function column(model) {
  let said = "";
  const text = h("div", {
    class: "answer",
    role: "group",
    tabindex: "0",
    "aria-label": `Answer of ${model}`,
  });
  const note = h("div", { class: "note" }, h("p", { class: "hint" }, "The answer comes here."));
  const facts = h("dl", { class: "facts" });
  const version = h("span", { class: "version" });
  const tools = h("div", { class: "row tools" });
  const element = h(
    "article",
    { class: "card column", "aria-label": model },
    h("header", {}, h("h2", {}, model), version),
    text,
    note,
    facts,
    tools,
  );

  function tell(outcome) {
    const span = (outcome.last - outcome.first) / 1000;
    const speed =
      outcome.tokens > 1 && span > SHORT_S ? `${((outcome.tokens - 1) / span).toFixed(1)} /s` : "–";
    const rows = [
      ["First token", time(outcome.first === null ? null : outcome.first / 1000)],
      ["Tokens", `${outcome.tokens}${outcome.finish === "length" ? ", cut" : ""}`],
      ["Speed", speed],
    ];
    if (outcome.queue > 50) rows.push(["Waited", time(outcome.queue / 1000)]);
    if (outcome.load) rows.push(["Loaded in", time(outcome.load / 1000)]);
    show(
      facts,
      rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    );
    version.textContent = outcome.adapter ? `${outcome.adapter}@${outcome.version}` : "the base";
  }

  function say(piece) {
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 20;
    said += piece;
    morph(text, formatted(said));
    if (atEnd) text.scrollTop = text.scrollHeight;
  }

  async function run(body, signal) {
    said = "";
    show(text);
    show(note, h("p", { class: "hint" }, "waiting…"));
    show(facts);
    version.textContent = "";
    const kinds = [
      ["Copy", () => copy(said, `the answer of ${model}`)],
      ["curl", () => copy(asCurl(body), "the request as curl")],
      ["Python", () => copy(asPython(body), "the request as Python")],
    ];
    show(
      tools,
      kinds.map(([name, onclick]) => h("button", { type: "button", class: "quiet", onclick }, name)),
    );
    text.setAttribute("aria-busy", "true");
    try {
      await chat(
        body,
        (piece, outcome) => {
          if (piece) show(note);
          say(piece);
          tell(outcome);
        },
        signal,
      );
      if (!said) show(note, h("p", { class: "hint" }, "It answered nothing."));
      return `${model} has answered`;
    } catch (error) {
      if (error.name === "AbortError") {
        show(note, h("p", { class: "hint" }, "stopped"));
        return `${model} was stopped`;
      }
      const title = said ? `${model} did not finish` : `${model} did not answer`;
      show(note, trouble(error, title));
      return title;
    } finally {
      text.removeAttribute("aria-busy");
    }
  }
  return { element, run };
}

function asCurl(body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/chat/completions \\\n  -H "Authorization: Bearer $LORAPLEX_API_KEY" \\\n  -H 'content-type: application/json' \\\n  -d '${json}'\n`;
}

function asPython(body) {
  const messages = body.messages.map(
    (each) => `        {"role": ${JSON.stringify(each.role)}, "content": ${JSON.stringify(each.content)}},`,
  );
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("LORAPLEX_API_KEY", "none"))`,
    "reply = client.chat.completions.create(",
    `    model=${JSON.stringify(body.model)},`,
    "    messages=[",
    ...messages,
    "    ],",
    ...(body.max_tokens ? [`    max_tokens=${body.max_tokens},`] : []),
    `    temperature=${body.temperature},`,
    ")",
    "print(reply.choices[0].message.content)",
    "",
  ].join("\n");
}

function history() {
  try {
    return JSON.parse(read(HISTORY, forSession())) || [];
  } catch {
    return [];
  }
}

/** Kept as long as the key is; the oldest go where there are too many, or too long ones. */
function remember(entry) {
  const others = history().filter(
    (each) => each.prompt !== entry.prompt || each.models.join() !== entry.models.join(),
  );
  let [kept, room] = [[], KEPT_LENGTH];
  for (const each of [entry, ...others].slice(0, KEPT)) {
    room -= each.prompt.length;
    if (room < 0) break;
    kept.push(each);
  }
  keep(HISTORY, JSON.stringify(kept), forSession());
}
