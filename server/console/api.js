// The server's public API, and the key that it is asked with.

import { forget, keep, read } from "./storage.js";

const KEY = "loraplex.key";

export class ApiError extends Error {
  /** `status` is 0 where nothing answered, null where it is not the server that says no; `wait` is how many
   * seconds the server says to wait. */
  constructor(status, { message, code, problems } = {}, wait = null) {
    super(message || `The server answered ${status}.`);
    this.status = status;
    this.code = code;
    this.problems = problems || [];
    this.wait = wait;
  }
}

export const key = () => read(KEY, true) || read(KEY);

/** Whether what is kept goes when this tab is closed, as the key does. */
export const forSession = () => read(KEY, true) !== "";

export function setKey(value, stay) {
  forget(KEY);
  if (value) keep(KEY, value, !stay);
}

let another = async () => false;

/** `asker(background)` is called when the key does not do, and says whether there is another now. */
export function askForKeys(asker) {
  another = asker;
}

function headers(more = {}) {
  return key() ? { authorization: `Bearer ${key()}`, ...more } : more;
}

/** `background`: nobody waits for it, so nobody is asked for a key. */
async function ask(path, { method = "GET", json, signal, more, background } = {}) {
  const about = json === undefined ? more : { "content-type": "application/json", ...more };
  const body = json === undefined ? undefined : JSON.stringify(json);
  let reply;
  try {
    reply = await fetch(path, { method, body, headers: headers(about), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server does not answer. Is it running?" });
  }
  if (reply.status === 401 && (await another(background)))
    return ask(path, { method, json, signal, more, background });
  if (!reply.ok) {
    const said = await reply.json().catch(() => null);
    throw new ApiError(reply.status, said?.error, Number(reply.headers.get("retry-after")) || null);
  }
  return reply;
}

/** The JSON that a call answers; raises ApiError. */
export async function call(path, options) {
  return (await ask(path, options)).json();
}

/** A list, one page of items after the other. */
export async function* pages(path, limit = 1000) {
  let after = "";
  do {
    const page = await call(`${path}?limit=${limit}${after && `&after=${encodeURIComponent(after)}`}`);
    yield page.data;
    after = page.has_more ? page.next : "";
  } while (after);
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let got;
    try {
      got = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(null, { message: "The connection broke off." });
    }
    if (got.done) return;
    const parts = (text + got.value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const event = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines
        .filter((line) => line.startsWith("data: "))
        .map((line) => line.slice(6))
        .join("\n");
      if (data && data !== "[DONE]") yield { event, data: JSON.parse(data) };
    }
  }
}

/** Streams a chat: `told(text, outcome)` for each piece; `outcome` is how it went so far, its times in
 * milliseconds. */
export async function chat(body, told, signal) {
  const began = performance.now();
  const counted = { include_usage: true, continuous_usage_stats: true };
  const reply = await ask("/v1/chat/completions", {
    method: "POST",
    json: { ...body, stream: true, stream_options: counted },
    signal,
  });
  const outcome = {
    adapter: reply.headers.get("x-loraplex-adapter"),
    version: reply.headers.get("x-loraplex-version"),
    queue: Number(reply.headers.get("x-loraplex-queue-ms") || 0),
    load: Number(reply.headers.get("x-loraplex-load-ms") || 0),
    first: null,
    last: null,
    tokens: 0,
    finish: null,
  };
  for await (const { data } of events(reply)) {
    if (data.error) throw new ApiError(data.error.code === "engine_not_ready" ? 503 : 500, data.error);
    const choice = data.choices?.[0];
    const said = choice?.delta?.content || "";
    outcome.finish = choice?.finish_reason ?? outcome.finish;
    outcome.tokens = data.usage?.completion_tokens ?? outcome.tokens;
    if (said) {
      outcome.last = performance.now() - began;
      outcome.first ??= outcome.last;
    }
    told(said, outcome);
  }
  if (!outcome.finish) throw new ApiError(null, { message: "The answer broke off before its end." });
}

/** Has the server fetch an adapter; `told(import)` as it goes on. Returns the version. */
export async function bring(body, told) {
  const reply = await ask("/v1/adapters", {
    method: "POST",
    json: body,
    more: { accept: "text/event-stream" },
  });
  for await (const { event, data } of events(reply)) {
    if (event === "ready") return data;
    if (event === "error") throw new ApiError(500, data.error);
    told(data);
  }
  throw new ApiError(null, {
    message: "The import's progress broke off; the adapter's page says how it ended.",
  });
}

/** Uploads a form; `told(share)` of what has been sent. Raises ApiError, or AbortError by `signal`. */
export async function upload(path, form, told, signal) {
  const request = await send(path, form, told, signal);
  if (request.status === 401 && (await another())) return upload(path, form, told, signal);
  if (request.status >= 300) throw new ApiError(request.status, request.response?.error);
  return request.response;
}

/** Not by fetch, which cannot say how far it is. */
function send(path, form, told, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.responseType = "json";
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    request.upload.onload = () => told(1);
    request.onerror = () =>
      reject(new ApiError(null, { message: "The connection broke off. Upload it again." }));
    request.onabort = () => reject(new DOMException("It was cancelled.", "AbortError"));
    request.onload = () => resolve(request);
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
