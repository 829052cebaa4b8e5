// Requests to the server that this page came from: relative addresses, the key, and errors in one form.

const KEY = "offload-moe key";

/** An answer with a status that is an error, with the server's own words. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The JSON document of a route. Raises ServerError, or TypeError where no server answers. */
export async function getJson(route, timeoutMs = 8000) {
  const signal = AbortSignal.timeout(timeoutMs);
  const response = await fetch(route, { headers: headers(), signal, cache: "no-store" });
  if (!response.ok && !(route === "health" && response.status === 503)) throw await errorOf(response);
  return response.json();
}

/** Send a JSON document; the answer's body is a stream. */
export async function postJson(route, document, signal) {
  const response = await fetch(route, {
    method: "POST",
    headers: { ...headers(), "Content-Type": "application/json" },
    body: JSON.stringify(document),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  return response;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function errorOf(response) {
  const document = await response.json().catch(() => null);
  const message = document?.error?.message ?? `The server answered with status ${response.status}.`;
  return new ServerError(response.status, message);
}
