// The playground: a chat over /v1/chat/completions.

import { $, call, element, serverSentEvents } from "./api.js";
import { milliseconds, poll } from "./live.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let messages = []; // the conversation as the API takes it, without the system prompt
let model = null; // its name, once the server has told it
let running = null; // AbortController of the open stream
let chat = 0; // counts "New chat", so that a stream that ends late leaves the next chat alone

// What the settings say, as fields of a request. Throws when they are wrong.
function settings() {
  const fields = {
    thinking: { type: $("thinking").checked ? "enabled" : "disabled" },
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) {
    const input = $(name);
    if (!input.checkValidity()) throw new Error(`${input.labels[0].textContent}: ${input.validationMessage}`);
    if (input.value !== "") fields[name] = Number(input.value);
  }
  if ($("tools").value.trim()) {
    try {
      fields.tools = JSON.parse($("tools").value);
    } catch (error) {
      throw new Error(`Tools: not JSON: ${error.message}`);
    }
  }
  return fields;
}

// ---------- the conversation

function addTurn(role, text = "") {
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", { user: "You", assistant: "Model", tool: "Tool result" }[role]);
  const content = element("div", "text", text);
  turn.append(content);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return { turn, content };
}

// One answer while it streams: the message for the API, and what shows it.
class Answer {
  constructor() {
    this.message = { role: "assistant", content: "" };
    this.calls = [];
    this.usage = this.finish = null;
    this.started = performance.now();
    this.first = this.last = null; // times of the first and the last piece
    Object.assign(this, addTurn("assistant"));
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    this.usage = chunk.usage ?? this.usage;
    const [choice] = chunk.choices;
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    const { reasoning_content: reasoning, content, tool_calls: calls } = choice.delta;
    if (!reasoning && !content && !calls) return;
    this.last = performance.now();
    this.first ??= this.last;
    const log = $("log");
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (reasoning) this.think(reasoning);
    if (content) {
      this.endThinking();
      this.message.content += content;
      this.content.append(content);
    }
    for (const delta of calls ?? []) this.takeCall(delta);
    if (follow) log.scrollTop = log.scrollHeight;
  }

  think(text) {
    if (!this.fold) {
      this.message.reasoning_content = "";
      this.fold = element("details", "reasoning");
      this.fold.open = true;
      this.summary = element("summary", "", "Thinking");
      this.thought = element("div", "text");
      this.fold.append(this.summary, this.thought);
      this.turn.prepend(this.fold);
    }
    this.message.reasoning_content += text;
    this.thought.append(text);
  }

  endThinking(open = false) {
    if (!this.fold || this.thoughtEnded) return;
    this.thoughtEnded = true;
    this.summary.textContent = `Thought for ${((this.last - this.started) / 1000).toFixed(1)} s`;
    this.fold.open = open;
  }

  takeCall(delta) {
    this.endThinking();
    let entry = this.calls[delta.index];
    if (!entry) {
      const box = element("section", "call");
      entry = { id: delta.id, name: delta.function.name, arguments: "", box, shown: element("pre") };
      box.append(element("strong", "", `calls ${entry.name}`), entry.shown);
      this.turn.append(box);
      this.calls[delta.index] = entry;
    }
    entry.arguments += delta.function.arguments ?? "";
    entry.shown.textContent = entry.arguments;
  }

  // What came is kept; calls only when they are whole.
  end() {
    this.last ??= performance.now();
    this.endThinking(true); // only thoughts came: there is nothing else to see
    const whole = this.finish === "tool_calls";
    if (whole) {
      this.message.tool_calls = this.calls.map((entry) => ({
        id: entry.id, type: "function", function: { name: entry.name, arguments: entry.arguments },
      }));
      this.askResults();
    }
    this.turn.append(element("p", "facts", this.facts()));
    if (whole || this.message.content || this.message.reasoning_content) messages.push(this.message);
  }

  facts() {
    const facts = [this.finish ?? "stopped"];
    if (this.first !== null) {
      facts.push(`first token ${milliseconds((this.first - this.started) / 1000)}`);
      const tokens = this.usage?.completion_tokens;
      const seconds = (this.last - this.first) / 1000;
      if (tokens) facts.push(`${tokens} tokens`);
      if (tokens > 1 && seconds > 0) facts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
      const cached = this.usage?.prompt_tokens_details?.cached_tokens;
      if (this.usage) facts.push(`prompt ${this.usage.prompt_tokens}, ${cached ?? 0} cached`);
    }
    return facts.join(" · ");
  }

  askResults() {
    for (const entry of this.calls) {
      const label = element("label", "", `Result of ${entry.name}`);
      entry.result = element("textarea", "result");
      entry.result.rows = 2;
      label.append(entry.result);
      entry.box.append(label);
    }
    const button = element("button", "send-results", this.calls.length > 1 ? "Send results" : "Send result");
    button.type = "button";
    button.addEventListener("click", () => this.sendResults(button));
    this.turn.append(button);
  }

  sendResults(button) {
    const fields = ready();
    if (!fields) return;
    button.remove();
    for (const entry of this.calls) {
      const content = entry.result.value;
      entry.result.parentElement.remove();
      messages.push({ role: "tool", tool_call_id: entry.id, content });
      addTurn("tool", content);
    }
    answer(fields);
  }
}

// The settings, unless a stream is open or they are wrong.
function ready() {
  if (running) return null;
  say("");
  try {
    return settings();
  } catch (error) {
    say(error.message);
    return null;
  }
}

async function answer(fields) {
  const mine = chat;
  const system = $("system").value.trim();
  const history = system ? [{ role: "system", content: system }, ...messages] : messages;
  const body = JSON.stringify({ model, messages: history, ...fields });
  running = new AbortController();
  setBusy(true);
  const reply = new Answer();
  try {
    const signal = running.signal;
    const headers = { "Content-Type": "application/json" };
    const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
    for await (const chunk of serverSentEvents(response)) reply.take(chunk);
  } catch (error) {
    if (error.name !== "AbortError" && mine === chat) say(error.message);
  }
  if (mine !== chat) return; // another chat has begun
  running = null;
  setBusy(false);
  if (reply.first === null && !reply.finish) reply.turn.remove();
  else reply.end();
  $("status").textContent = reply.message.content ? `Model: ${reply.message.content}` : "The answer has ended.";
}

function say(problem) {
  $("alert").textContent = problem;
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").disabled = !busy;
  $("log").setAttribute("aria-busy", busy);
  if (busy) $("status").textContent = "The model answers.";
}

function send() {
  const text = $("prompt").value;
  if (!text.trim()) return;
  if (document.querySelector(".send-results")) {
    say("The model waits for the results of its tool calls.");
    document.querySelector(".result").focus();
    return;
  }
  const fields = ready();
  if (!fields) return;
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  $("prompt").value = "";
  answer(fields);
}

function clear() {
  chat += 1;
  running?.abort();
  running = null;
  messages = [];
  $("log").replaceChildren();
  setBusy(false);
  say("");
  $("status").textContent = "";
  $("prompt").focus();
}

async function showModel() {
  try {
    const { data } = await (await call("v1/models")).json();
    $("model").textContent = model = data[0].id;
    say("");
  } catch (error) {
    say(error.message);
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("key").addEventListener("change", showModel);
$("settings").open = $("live").open = matchMedia("(min-width: 55rem)").matches;
showModel();
poll();
