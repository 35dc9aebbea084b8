// What the browser keeps for the console; where it keeps nothing, or has no room, this page does.

const here = new Map();

const place = (name, session) => `${session} ${name}`;
// A browser that blocks storage throws when it is only looked at.
const store = (session) => (session ? sessionStorage : localStorage);

export function read(name, session = false) {
  let kept = null;
  try {
    kept = store(session).getItem(name);
  } catch {
    // What it would not keep is here.
  }
  return kept ?? here.get(place(name, session)) ?? "";
}

/** `session`: only until this tab is closed. */
export function keep(name, value, session = false) {
  try {
    store(session).setItem(name, value);
  } catch {
    here.set(place(name, session), value);
  }
}

/** Wherever it is. */
export function forget(name) {
  for (const session of [true, false]) {
    here.delete(place(name, session));
    try {
      store(session).removeItem(name);
    } catch {
      // There was nothing to forget.
    }
  }
}
