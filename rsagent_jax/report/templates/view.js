// The page of rsagent_jax.view: filter, order and choose rows. Everything that is chosen stands behind the # of the
// address. The server answers, or, where the page is a file of its own, what is embedded. Strings of a model or a data
// set become text, never markup; the markup of a trajectory is made by the templates, which escape them.

const PAGE = 50, LIVE_MS = 3000, WORDS = ["q", "status", "source", "sort", "page", "row", "turn"];
const at = (id) => document.getElementById(id);
const embedded = JSON.parse(at("embedded").textContent), alone = "rows" in embedded;
const asked = new URLSearchParams(location.hash.slice(1));
const narrow = () => matchMedia("(max-width: 60rem)").matches; // what is chosen stands below the rows
let page = null, drawn = null, draws = 0, asking = 0, failed = false;

/** As rows.select_rows does it for the server. */
function select(rows) {
  const ranges = [...asked].filter(([name, text]) => text && !WORDS.includes(name)).map(([name, text]) => {
    const [low, high] = text.split("..");
    return [name, low === "" ? -Infinity : Number(low), high === "" ? Infinity : Number(high)];
  });
  const text = (asked.get("q") ?? "").toLowerCase(), sort = asked.get("sort") ?? "", name = sort.replace(/^-/, "");
  const found = rows.filter((row) =>
    `${row.query}\n${row.sample}`.toLowerCase().includes(text)
    && ["status", "source"].every((key) => !asked.get(key) || asked.get(key) === row[key])
    && ranges.every(([key, low, high]) => low <= row.values[key] && row.values[key] <= high));
  const order = (row) => row.values[name] === undefined ? Infinity : (sort[0] === "-" ? -1 : 1) * row.values[name];
  return name ? found.sort((a, b) => (order(a) === order(b) ? 0 : order(a) - order(b))) : found;
}

async function ask(path, query) {
  const answer = await fetch(`${path}?${query}`);
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return text;
}

async function rows() {
  if (!alone) return JSON.parse(await ask("rows", asked));
  const found = select([...embedded.rows]), start = PAGE * Math.max(0, Number(asked.get("page")));
  return { ...embedded, found: found.length, start, rows: found.slice(start, start + PAGE) };
}

function element(tag, text, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  if (text !== null) made.textContent = text;
  return made;
}

function put(name, value) {
  if (value === "" || value === null) asked.delete(name);
  else asked.set(name, value);
  history.replaceState(null, "", `#${asked}`);
}

/** How the page names an order. */
const says = (name) => name.replace(/^-(.*)/, "$1, highest first").replace(/^iou\b/, "IoU");

/** Options of a select, without a change where they are the same. */
function offer(name, values, first) {
  const select = at("filter").elements[name], wanted = ["", ...values];
  if (wanted.join("\n") !== [...select.options].map((option) => option.value).join("\n"))
    select.replaceChildren(...wanted.map((value) => element("option", value ? (name === "sort" ? says(value) : value) : first, { value })));
  select.value = asked.get(name) ?? "";
}

function drawForm() {
  at("filter").elements.q.value = asked.get("q") ?? "";
  offer("status", page.statuses, "any");
  offer("source", page.sources, "anywhere");
  offer("sort", page.names.flatMap((name) => [name, `-${name}`]), "as played");
  if (at("ranges").childElementCount !== page.names.length)
    at("ranges").replaceChildren(...page.names.map((name) => {
      const label = element("fieldset", null), ends = (asked.get(name) ?? "..").split("..");
      const input = (k) => element("input", null, {
        type: "number", step: "any", value: ends[k], ariaLabel: `${says(name)} ${k ? "to" : "from"}`,
      });
      const [low, high] = [input(0), input(1)];
      label.append(element("legend", says(name)), low, " to ", high);
      label.addEventListener("change", () => {
        put(name, low.value || high.value ? `${low.value}..${high.value}` : "");
      });
      return label;
    }));
}

/** The address of a row: what is chosen now, but this one. */
function linkOf(row) {
  const link = new URLSearchParams(asked);
  link.delete("turn");
  link.set("row", row.key);
  return `#${link}`;
}

function shownValue(row, name) {
  const value = row.values[name];
  if (value === undefined) return "";
  return name === "step" || name === "turns" ? value : value.toFixed(3);
}

function drawRows() {
  const columns = ["step", "turns", "iou", "reward", "IoU of the second", "gain"];
  const shown = columns.filter((name) => page.rows.some((row) => name in row.values));
  const focused = at("rows").contains(document.activeElement) && document.activeElement.title;
  at("head").replaceChildren(...["question", ...shown].map((name) => element("th", says(name))));
  at("head").closest("table").style.minWidth = `${8 + 3.6 * shown.length}rem`;
  at("rows").replaceChildren(...page.rows.map((row) => {
    const line = element("tr", null, { className: row.key === asked.get("row") ? "on" : "" });
    line.append(element("td", null));
    line.append(...shown.map((name) => element("td", shownValue(row, name))));
    const link = element("a", row.query || row.sample, { href: linkOf(row), title: row.key });
    const from = page.sources.length > 1 ? `, ${row.source}` : "";
    line.firstChild.append(link, element("div", row.status + from, { className: "note" }));
    return line;
  }));
  if (focused) [...at("rows").querySelectorAll("a")].find((link) => link.title === focused)?.focus();
  const last = page.start + page.rows.length;
  at("where").textContent = page.found ? `${page.start + 1} to ${last} of ${page.found}` : "none";
  at("previous").disabled = page.start === 0;
  at("next").disabled = last >= page.found;
  const left = page.left_out ? `${page.left_out} more are not in this file` : "";
  const counts = `${page.total} trajectories, ${page.found} chosen`;
  at("state").textContent = [counts, left, ...page.notes].filter(Boolean).join("; ");
}

/** The trajectory that is chosen, at its turn. */
async function drawChosen() {
  const key = asked.get("row");
  if (key !== drawn) {
    drawn = key;
    at("tokens").open = false;
    at("tokens").lastElementChild.replaceChildren();
    if (key) {
      const markup = alone ? embedded.trajectories[key] : await ask("trajectory", new URLSearchParams({ row: key }));
      if (key !== asked.get("row")) return;
      if (markup === undefined) throw new Error(`${key} is not in this file`);
      at("shown").innerHTML = markup;
      if (narrow()) at("shown").scrollIntoView();
    } else at("shown").replaceChildren(element("p", "Choose a trajectory.", { className: "note" }));
  }
  if (key && asked.has("turn")) step(0, Number(asked.get("turn")));
}

async function draw(live = false) {
  if (live && asking) return; // what was chosen comes first
  const mine = ++draws;
  asking++;
  try {
    const now = await rows();
    if (mine !== draws) return; // a later one is under way
    if (live && !failed && JSON.stringify(now) === JSON.stringify(page)) return;
    failed = false;
    page = now;
    if (!live && !asked.has("row") && page.rows.length && !narrow()) put("row", page.rows[0].key);
    drawForm();
    drawRows();
    if (!live) await drawChosen();
  } catch (error) {
    at("state").textContent = error.message;
    [failed, drawn] = [true, null];
  } finally {
    asking--;
  }
}

/** The row so many places further, on another page where need be. */
async function choose(by) {
  if (!page?.rows.length) return;
  let place = page.rows.findIndex((row) => row.key === asked.get("row"));
  place = place < 0 ? (by > 0 ? 0 : page.rows.length - 1) : place + by;
  if (place < 0 || place >= page.rows.length) {
    const start = page.start + (by > 0 ? PAGE : -PAGE);
    if (start < 0 || start >= page.found) return;
    put("page", start / PAGE || "");
    page = await rows();
    place = by > 0 ? 0 : page.rows.length - 1;
  }
  put("turn", "");
  put("row", page.rows[place].key);
  await draw();
  if (!narrow()) document.querySelector("tr.on a")?.focus();
}

at("filter").addEventListener("input", (event) => {
  if (!event.target.name) return;
  put(event.target.name, event.target.value);
  put("page", "");
  draw();
});
at("ranges").addEventListener("change", () => { put("page", ""); draw(); });
at("filter").addEventListener("submit", (event) => event.preventDefault());
at("filter").addEventListener("reset", (event) => {
  event.preventDefault();
  for (const name of [...asked.keys()]) if (!["row", "turn"].includes(name)) put(name, "");
  at("ranges").replaceChildren();
  draw();
});
for (const [id, by] of [["previous", -1], ["next", 1]])
  at(id).addEventListener("click", () => { put("page", page.start / PAGE + by || ""); draw(); });
window.addEventListener("hashchange", () => {
  for (const name of [...asked.keys()]) asked.delete(name);
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) asked.set(name, value);
  at("ranges").replaceChildren();
  draw();
});
at("shown").addEventListener("click", () => put("turn", turnNow()));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "j" || event.key === "k") choose(event.key === "j" ? 1 : -1);
  if (/^(Arrow|Escape)/.test(event.key)) put("turn", turnNow());
});
at("tokens").addEventListener("toggle", async () => {
  const place = at("tokens").lastElementChild;
  if (!at("tokens").open || place.childElementCount || !asked.get("row")) return;
  if (alone) return place.replaceChildren(element("p", "A file has no tokens; the server has.", { className: "note" }));
  place.textContent = "Reading…";
  try {
    place.innerHTML = await ask("tokens", new URLSearchParams({ row: asked.get("row") }));
  } catch (error) {
    place.replaceChildren(element("p", error.message, { className: "fault" }));
  }
});

function turnNow() {
  const turn = at("shown").querySelector(".turn.on");
  return turn ? [...turn.parentElement.children].indexOf(turn) : "";
}

draw();
if (!alone) setInterval(() => { if (!document.hidden) draw(true); }, LIVE_MS);
