// Calls to the gateway that served this page. The key is held here, in memory, and nowhere else.
//
//   useKey("hst_…"); const { data } = await getJson("/v1/catalogue");

let key = "";

export const useKey = (value) => { key = value; };
export const hasKey = () => key !== "";

export class GatewayError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function getJson(path) {
  return (await call(path)).json();
}

export async function postJson(path, values) {
  return (await call(path, { method: "POST", body: JSON.stringify(values) })).json();
}

// Calls onEvent with each server-sent event's values; returns at [DONE].
export async function stream(path, values, { signal, onOpen, onEvent }) {
  const answer = await call(path, { method: "POST", body: JSON.stringify(values), signal });
  onOpen(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new GatewayError(0, "the answer was cut off");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const read = JSON.parse(data);
      if (read.error) throw new GatewayError(answer.status, messageOf(read));
      onEvent(read);
    }
  }
}

async function call(path, options = {}) {
  const headers = { authorization: `Bearer ${key}` };
  if (options.body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      ...options, headers, cache: "no-store", credentials: "omit", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GatewayError(0, "the gateway cannot be reached");
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

async function errorOf(answer) {
  let message = `the gateway answered ${answer.status}`;
  try {
    message = messageOf(await answer.json());
  } catch { /* not ours, a proxy's */ }
  const wait = answer.headers.get("retry-after");
  return new GatewayError(answer.status, wait ? `${message} (try again in ${wait} s)` : message);
}

const messageOf = ({ error }) => (typeof error === "string" ? error : error.message);
