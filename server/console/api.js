// The server's public API, and the key that it is asked with.

const KEY = "loraplex.key";

export class ApiError extends Error {
  constructor(status, { message, code, problems } = {}) {
    super(message || `The server answered ${status}.`);
    this.status = status;
    this.code = code;
    this.problems = problems || [];
  }
}

export function key() {
  return sessionStorage.getItem(KEY) || localStorage.getItem(KEY) || "";
}

export function setKey(value, keep) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (value) (keep ? localStorage : sessionStorage).setItem(KEY, value);
}

function headers(more = {}) {
  return key() ? { authorization: `Bearer ${key()}`, ...more } : more;
}

function refused(status, body) {
  if (status === 401) dispatchEvent(new Event("unauthorized"));
  return new ApiError(status, body?.error);
}

async function ask(path, { method = "GET", json, signal, more } = {}) {
  const about = json === undefined ? more : { "content-type": "application/json", ...more };
  const body = json === undefined ? undefined : JSON.stringify(json);
  let reply;
  try {
    reply = await fetch(path, { method, body, headers: headers(about), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server does not answer. Is it running?" });
  }
  if (!reply.ok) throw refused(reply.status, await reply.json().catch(() => null));
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
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
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

/** Streams a chat: `told(text)` for each piece; returns how it went, times in milliseconds. */
export async function chat(body, told, signal) {
  const began = performance.now();
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const reply = await ask("/v1/chat/completions", { method: "POST", json: asked, signal });
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
    if (choice?.delta?.content) {
      outcome.last = performance.now() - began;
      outcome.first ??= outcome.last;
      told(choice.delta.content);
    }
    outcome.finish = choice?.finish_reason ?? outcome.finish;
    outcome.tokens = data.usage?.completion_tokens ?? outcome.tokens;
  }
  return outcome;
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
  throw new ApiError(0, {
    message: "The import's progress broke off; the adapter's page says how it ended.",
  });
}

/** Uploads a form; `told(share)` of what has been sent. Not by fetch, which cannot say how far it is. */
export function upload(path, form, told) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.responseType = "json";
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    request.upload.onload = () => told(1);
    request.onerror = () =>
      reject(new ApiError(0, { message: "The connection broke off. Upload it again." }));
    request.onload = () =>
      request.status < 300 ? resolve(request.response) : reject(refused(request.status, request.response));
    request.send(form);
  });
}
