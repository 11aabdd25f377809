// The numbers of /stats, as text with sparklines and bars.

import { $, call, element } from "./api.js";

const POLL_MS = 1000;
const HISTORY = 60; // points of a sparkline
const SVG = "http://www.w3.org/2000/svg";
const NONE = "–";
const rate = (value) => (value === null ? NONE : `${value.toFixed(value < 10 ? 1 : 0)}/s`);
export const milliseconds = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`;
const latency = (value) => (value ? `${milliseconds(value.p50)}, p95 ${milliseconds(value.p95)}` : NONE);
const share = (value) => (value === null ? NONE : `${(value * 100).toFixed(0)} %`);
const count = (value) => (value === null ? NONE : String(value));
const usage = (value) => {
  if (!value) return NONE;
  return value.cached === undefined ? `${value.used} of ${value.total}`
    : `${value.used} + ${value.cached} cached of ${value.total}`;
};

const drafts = (value) => (value ? `${value.accept_length.toFixed(2)}, ${share(value.accept_rate)} of drafts` : NONE);

// Name, the value's text, either the number of its sparkline or the {used, cached, total} of its bar, and whether the
// tile appears only when there has been a value.
const TILES = [
  ["Generated tokens", (s) => rate(s.generated_tokens_per_s), (s) => s.generated_tokens_per_s],
  ["Prompt tokens", (s) => rate(s.prompt_tokens_per_s), (s) => s.prompt_tokens_per_s],
  ["Time to first token", (s) => latency(s.ttft_s), (s) => s.ttft_s?.p50],
  ["Between tokens", (s) => latency(s.itl_s), (s) => s.itl_s?.p50],
  ["Running", (s) => count(s.running), (s) => s.running],
  ["Queued", (s) => count(s.queued), (s) => s.queued],
  ["Slots", (s) => usage(s.slots), (s) => s.slots],
  ["Pages", (s) => usage(s.pages), (s) => s.pages],
  ["Tails", (s) => usage(s.tails), (s) => s.tails],
  ["Prefix hits", (s) => share(s.prefix_hit_rate), (s) => s.prefix_hit_rate],
  ["Tokens per verify", (s) => drafts(s.acceptance), (s) => s.acceptance?.accept_length, true],
  ["Event loop lag", (s) => latency(s.event_loop_lag_s), (s) => s.event_loop_lag_s?.p95, true],
].map(([name, text, value, appears]) => {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 100 26");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true"); // the text beside it says the same
  const shown = element("dd", "", NONE);
  const tile = element("div", "tile");
  tile.hidden = Boolean(appears);
  const body = element("dd");
  body.append(picture);
  tile.append(element("dt", "", name), shown, body);
  $("tiles").append(tile);
  return { tile, text, value, shown, picture, points: [] };
});

function shape(name, className, attributes) {
  const made = document.createElementNS(SVG, name);
  made.setAttribute("class", className);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function bar({ used, cached = 0, total }) {
  const part = (className, from, size) =>
    shape("rect", className, { x: (100 * from) / total, width: (100 * size) / total, y: 9, height: 8 });
  return [part("track", 0, total), part("used", 0, used), part("cached", used, cached)];
}

function sparkline(points) {
  const highest = Math.max(...points.filter((point) => point !== null), 1e-9);
  const lines = [[]]; // a gap where there was no number
  points.forEach((point, index) => {
    if (point === null) lines.push([]);
    else lines.at(-1).push(`${100 - ((points.length - 1 - index) * 100) / (HISTORY - 1)},${24 - (22 * point) / highest}`);
  });
  return lines.map((line) => shape("polyline", "spark", { points: line.join(" ") }));
}

function showStats(stats) {
  $("live-note").textContent = stats.engine_ready ? "Latencies: p50 of the last minute." : "The engine is not ready.";
  for (const tile of TILES) {
    tile.shown.textContent = tile.text(stats);
    const value = tile.value(stats) ?? null;
    if (value !== null) tile.tile.hidden = false;
    if (value !== null && typeof value === "object") {
      tile.picture.replaceChildren(...bar(value));
    } else {
      tile.points = [...tile.points, value].slice(-HISTORY);
      tile.picture.replaceChildren(...sparkline(tile.points));
    }
  }
}

// Shows the numbers from now on, while the panel is open and the page visible.
export async function poll() {
  if ($("live").open && !document.hidden) {
    try {
      showStats(await (await call("stats")).json());
    } catch (error) {
      $("live-note").textContent = error.message;
    }
  }
  setTimeout(poll, POLL_MS);
}
