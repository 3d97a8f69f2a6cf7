// Chat and completion, streamed, with what it took.
//
//   const playground = new Playground(); playground.offer(models);

import { leading } from "./catalogue.js";
import { byId, element, fillSelect, showProblem } from "./dom.js";
import { stream } from "./gateway.js";
import { addSnippets, asCurl, asOpenaiPython } from "./snippets.js";
import { Stopwatch } from "./stopwatch.js";

const MAX_TOKENS = 256;

export class Playground {
  constructor() {
    this.form = byId("playground-form");
    this.transcript = byId("transcript");
    this.turns = [];
    this.models = new Map();
    this.aborter = null;
    this.prefersChat = true;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
    byId("text-model").addEventListener("change", () => this.choose());
    for (const mode of this.form.elements.mode) {
      mode.addEventListener("change", () => {
        this.prefersChat = this.isChat;
        this.clear();
      });
    }
    byId("temperature").addEventListener("input", () => {
      byId("temperature-value").value = Number(byId("temperature").value).toFixed(1);
    });
    addSnippets(byId("text-snippets"), {
      curl: () => this.snippet(asCurl),
      Python: () => this.snippet(asOpenaiPython),
    });
    this.clear();
  }

  get isChat() {
    return this.form.elements.mode.value === "chat";
  }

  // Takes the models that generate text.
  offer(models) {
    const text = models.filter((model) => leading(model)?.max_model_len);
    this.models = new Map(text.map((model) => [model.id, leading(model)]));
    byId("playground-none").hidden = text.length > 0;
    this.form.hidden = text.length === 0;
    if (fillSelect(byId("text-model"), [...this.models.keys()])) this.choose();
    if (!text.length) this.clear();
  }

  stop() {
    this.aborter?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.lastRequest = null;
    const hint = this.isChat ? "Say something to the model." : "Write a beginning, the model goes on.";
    this.transcript.replaceChildren(element("p", { class: "empty" }, hint));
    showProblem(byId("playground-problem"), "");
  }

  choose() {
    const model = this.models.get(byId("text-model").value);
    if (!model) return;
    const [chat, completion] = this.form.elements.mode;
    chat.disabled = !model.has_chat_template;
    (model.has_chat_template && this.prefersChat ? chat : completion).checked = true;
    byId("max-tokens").value = Math.min(MAX_TOKENS, Math.floor(model.max_model_len / 2));
    this.clear();
  }

  // The request that `text` would make now.
  request(text) {
    const values = { model: byId("text-model").value };
    if (this.isChat) values.messages = [...this.turns, { role: "user", content: text }];
    else values.prompt = text;
    values.max_tokens = byId("max-tokens").valueAsNumber;
    values.temperature = byId("temperature").valueAsNumber;
    if (byId("seed").value !== "") values.seed = byId("seed").valueAsNumber;
    values.stream = true;
    return [this.isChat ? "/v1/chat/completions" : "/v1/completions", values];
  }

  // What is written, or else what was sent last.
  snippet(write) {
    const text = byId("prompt").value;
    const [path, values] = !text && this.lastRequest || this.request(text || "Hello");
    return write(location.origin + path, values);
  }

  async send() {
    const prompt = byId("prompt");
    const text = prompt.value;
    if (this.aborter || text.trim() === "") return;
    const [path, values] = this.lastRequest = this.request(text);
    const { turns } = this; // another conversation may have begun when this answer ends
    const answer = this.begin(text);
    const aborter = this.aborter = new AbortController();
    const watch = new Stopwatch(showMeasures);
    let [usage, version, finish] = [undefined, "", ""];
    try {
      await stream(path, { ...values, stream_options: { include_usage: true } }, {
        signal: aborter.signal,
        onOpen: ({ headers }) => { version = headers.get("x-model-version") ?? values.model; },
        onEvent: (event) => {
          usage = event.usage ?? usage;
          const choice = event.choices[0];
          finish = choice?.finish_reason ?? finish;
          const piece = choice?.delta?.content ?? choice?.text;
          if (!piece) return;
          watch.piece();
          this.write(answer, piece);
        },
      });
    } catch (error) {
      finish = "stopped";
      if (error.name !== "AbortError") {
        finish = "failed";
        showProblem(byId("playground-problem"), error.message);
        if (!prompt.value) prompt.value = text;
      }
    }
    watch.end(usage);
    byId("answered-by").textContent = [version, finish].filter((part) => part).join(", ") || "–";
    this.end(aborter);
    if (finish !== "failed") {
      turns.push({ role: "user", content: text }, { role: "assistant", content: answer.data });
    }
  }

  // Shows the turn that begins; returns the text node that the answer is written into.
  begin(text) {
    const answer = document.createTextNode("");
    if (this.isChat) {
      if (!this.turns.length) this.transcript.replaceChildren();
      this.transcript.append(
        element("div", { class: "turn user" }, text),
        element("div", { class: "turn model" }, answer),
      );
      byId("prompt").value = "";
    } else {
      this.transcript.replaceChildren(
        element("div", { class: "turn whole" }, element("span", { class: "given" }, text), answer),
      );
    }
    this.transcript.ariaBusy = "true";
    this.transcript.scrollTop = this.transcript.scrollHeight;
    showProblem(byId("playground-problem"), "");
    byId("answered-by").textContent = "–";
    byId("send").hidden = true;
    byId("stop").hidden = false;
    return answer;
  }

  write(answer, piece) {
    const { scrollHeight, scrollTop, clientHeight } = this.transcript;
    answer.appendData(piece);
    // Follows the text, unless the reader has scrolled up.
    if (scrollHeight - scrollTop - clientHeight < 40) {
      this.transcript.scrollTop = this.transcript.scrollHeight;
    }
  }

  end(aborter) {
    if (this.aborter === aborter) this.aborter = null;
    this.transcript.ariaBusy = "false";
    byId("send").hidden = false;
    byId("stop").hidden = true;
  }
}

function showMeasures(measures) {
  const about = measures.isExact ? "" : "≈ ";
  const [speed, prompt] = [measures.tokensPerSecond, measures.promptTokens];
  byId("first-token").textContent = `${measures.firstToken_ms.toFixed(0)} ms`;
  byId("first-token").classList.toggle("waiting", !measures.hasBegun);
  byId("speed").textContent = speed === null ? "–" : about + speed.toFixed(speed < 100 ? 1 : 0);
  byId("tokens").textContent = `${prompt === undefined ? "" : `${prompt} → `}${about}${measures.tokens}`;
  byId("total-time").textContent = `${measures.total_s.toFixed(1)} s`;
}
