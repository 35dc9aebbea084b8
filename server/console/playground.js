// One prompt, the base and up to three adapters side by side.

import { call, chat } from "./api.js";
import { copy, h, show, time, trouble } from "./dom.js";

const MOST = 4; // that answer side by side
const KEPT = 50; // prompts of the history
const HISTORY = "loraplex.history";
const SHOWN = 100; // names that are offered
const ADD = "add an adapter: sql, sql@2, sql@prod";
const SHORT_S = 0.05; // no speed is told of a shorter stream

export function open(place, query) {
  const last = history()[0];
  const state = {
    models: (query.get("adapters") || last?.models?.join(",") || "base")
      .split(",")
      .filter(Boolean)
      .slice(0, MOST),
    stop: null,
  };

  const prompt = h(
    "textarea",
    { id: "prompt", rows: 5, placeholder: "Write a poem about the river.", spellcheck: "false" },
    last?.prompt || "",
  );
  const system = h("input", { id: "system", placeholder: "none", autocomplete: "off" });
  const most = h("input", { id: "most", type: "number", min: 1, max: 8192, value: 200 });
  const heat = h("input", { id: "heat", type: "number", min: 0, max: 2, step: 0.1, value: 0 });
  const go = h("button", { type: "submit", class: "primary" }, "Ask");
  const chosen = h("ul", { class: "chips", "aria-label": "Who answers" });
  const names = h("datalist", { id: "names" });
  const adding = h("input", {
    id: "adding",
    list: "names",
    placeholder: ADD,
    autocomplete: "off",
    spellcheck: "false",
  });
  const columns = h("div", { class: "columns", "aria-label": "Answers" });
  const past = h("ol", { class: "history" });

  function choose(models) {
    state.models = [...new Set(models)].slice(0, MOST);
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
              onclick: () => choose(state.models.filter((each) => each !== model)),
            },
            "×",
          ),
        ),
      ),
    );
    adding.disabled = state.models.length >= MOST;
    adding.placeholder = adding.disabled ? `no more than ${MOST}` : ADD;
    if (!state.stop)
      show(
        columns,
        state.models.map((model) => column(model).element),
      );
  }

  function add() {
    const model = adding.value.trim();
    if (!model) return;
    adding.value = "";
    choose([...state.models, model]);
  }

  async function offer() {
    const typed = adding.value.trim().split("@")[0];
    try {
      const page = await call(`/v1/adapters?limit=${SHOWN}&prefix=${encodeURIComponent(typed)}`);
      show(
        names,
        h("option", { value: "base" }),
        page.data.map((each) => h("option", { value: each.name })),
      );
    } catch {
      // A key that may only infer can still type a name.
    }
  }

  function body(model) {
    const messages = [{ role: "user", content: prompt.value }];
    if (system.value.trim()) messages.unshift({ role: "system", content: system.value.trim() });
    return { model, messages, max_tokens: Number(most.value), temperature: Number(heat.value) };
  }

  async function ask(event) {
    event?.preventDefault();
    if (state.stop) return state.stop.abort();
    add(); // what was typed and not entered is meant
    if (!prompt.value.trim()) return prompt.focus();
    if (!state.models.length) choose(["base"]);
    state.stop = new AbortController();
    go.textContent = "Stop";
    remember({ prompt: prompt.value, models: state.models, at: Date.now() / 1000 });
    tell();
    const answers = state.models.map((model) => column(model, body(model)));
    show(
      columns,
      answers.map((each) => each.element),
    );
    await Promise.all(answers.map((each) => each.run(state.stop.signal)));
    state.stop = null;
    go.textContent = "Ask";
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
    forget.hidden = !entries.length;
    nothing.hidden = entries.length > 0;
  }

  const nothing = h("p", { class: "hint" }, "What you ask is kept here, in this browser.");
  const forget = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () => {
        localStorage.removeItem(HISTORY);
        tell();
      },
    },
    "Forget all",
  );

  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
  });
  adding.addEventListener("input", offer);
  adding.addEventListener("change", add);
  adding.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    add();
  });

  show(
    place,
    h("h1", {}, "Playground"),
    h(
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
    ),
    columns,
    h(
      "section",
      { class: "card" },
      h("div", { class: "row" }, h("h2", {}, "History"), h("span", { class: "grow" }), forget),
      nothing,
      past,
    ),
  );
  choose(state.models);
  tell();
  offer();
  return () => state.stop?.abort();
}

/** One who answers: its element, and `run`, which asks. */
function column(model, body) {
  const text = h("div", { class: "answer", tabindex: "0", "aria-label": `Answer of ${model}` });
  const facts = h("dl", { class: "facts" });
  const version = h("span", { class: "version" });
  const tools = h("div", { class: "row tools" });
  const element = h(
    "article",
    { class: "card column", "aria-label": model },
    h("header", {}, h("h2", {}, model), version),
    text,
    facts,
    tools,
  );
  if (!body) show(text, h("p", { class: "hint" }, "The answer comes here."));

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

  async function run(signal) {
    const wait = h("p", { class: "hint" }, "waiting…");
    show(text, wait);
    const kinds = [
      ["Copy", () => copy(text.textContent, `the answer of ${model}`)],
      ["curl", () => copy(asCurl(body), "the request as curl")],
      ["Python", () => copy(asPython(body), "the request as Python")],
    ];
    show(
      tools,
      kinds.map(([name, onclick]) => h("button", { type: "button", class: "quiet", onclick }, name)),
    );
    text.setAttribute("aria-busy", "true");
    try {
      const outcome = await chat(
        body,
        (piece) => {
          wait.remove();
          text.append(piece);
        },
        signal,
      );
      wait.remove();
      if (!text.textContent) show(text, h("p", { class: "hint" }, "It answered nothing."));
      tell(outcome);
    } catch (error) {
      wait.remove();
      if (error.name === "AbortError") text.append(h("p", { class: "hint" }, "stopped"));
      else text.append(trouble(error, `${model} did not answer`));
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
    `    max_tokens=${body.max_tokens},`,
    `    temperature=${body.temperature},`,
    ")",
    "print(reply.choices[0].message.content)",
    "",
  ].join("\n");
}

function history() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) || [];
  } catch {
    return [];
  }
}

function remember(entry) {
  const others = history().filter(
    (each) => each.prompt !== entry.prompt || each.models.join() !== entry.models.join(),
  );
  localStorage.setItem(HISTORY, JSON.stringify([entry, ...others].slice(0, KEPT)));
}
