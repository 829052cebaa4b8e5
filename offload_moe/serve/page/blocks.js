// Markdown's blocks: lines become paragraphs, lists, tables and so on. Nothing here touches the document.

const MAX_DEPTH = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|[ \t]*)$/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const TASK = /^\[([ xX])\][ \t]+/;

/** All blocks of a text, each with its `source`: the same source is the same block. */
export function parseBlocks(text) {
  return blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  let isAfterBlank = false;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      isAfterBlank = true;
      continue;
    }
    const [block, end] = readBlock(lines, at, depth);
    block.isAfterBlank = isAfterBlank;
    isAfterBlank = false;
    block.source = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: headingText(heading[2]) }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at, depth);
  if (beginsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function readFence(lines, at, [, marks, info]) {
  const indent = indentOf(lines[at]);
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join("\n");
  return [{ type: "code", language: info.trim().split(/\s+/)[0], text }, Math.min(end + 1, lines.length)];
}

function readQuote(lines, at, depth) {
  const inner = [];
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (!isBlank(lines[end]) && !beginsBlock(lines, end)))) {
    inner.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  return [{ type: "quote", blocks: blocksOf(inner, depth + 1) }, end];
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const kind = kindOf(first);
  const list = { type: "list", isOrdered: kind !== "-", start: parseInt(first[2], 10) || 0, isLoose: false, items: [] };
  const outer = indentOf(lines[at]);
  let end = at;
  while (end < lines.length) {
    const marker = ITEM.exec(lines[end]);
    if (!marker || RULE.test(lines[end]) || kindOf(marker) !== kind || marker[1].length > outer + 3) break;
    const [item, next] = readItem(lines, end, marker, depth);
    list.items.push(item);
    list.isLoose ||= item.isLoose;
    let after = next;
    while (after < lines.length && isBlank(lines[after])) after += 1;
    const goesOn = after < lines.length && kindOf(ITEM.exec(lines[after])) === kind && !RULE.test(lines[after]);
    list.isLoose ||= goesOn && after > next;
    end = goesOn ? after : next;
    if (!goesOn) break;
  }
  return [list, end];
}

function readItem(lines, at, [, before, mark, space = " ", rest = ""], depth) {
  const width = before.length + mark.length + (space.length > 4 ? 1 : space.length);
  const task = TASK.exec(rest);
  const inner = [task ? rest.slice(task[0].length) : rest];
  let end = at + 1;
  let lastFull = end;
  let openFence = FENCE.exec(inner[0])?.[1];
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indent = indentOf(line);
    const isNested = indent >= width || (indent >= before.length + 2 && ITEM.test(line));
    const isLazy = lastFull === end && !openFence && !ITEM.test(line) && !beginsBlock(lines, end);
    if (!isBlank(line) && !isNested && !isLazy) break;
    const dedented = dedent(line, isNested ? Math.min(indent, width) : indent);
    inner.push(dedented);
    const fence = FENCE.exec(dedented);
    if (fence && (!openFence || fence[1].startsWith(openFence))) openFence = openFence ? undefined : fence[1];
    if (!isBlank(line)) lastFull = end + 1;
  }
  inner.length = lastFull - at;
  const blocks = blocksOf(inner, depth + 1);
  const isLoose = blocks.some((block, position) => position > 0 && block.isAfterBlank);
  return [{ blocks, isLoose, isDone: task ? task[1] !== " " : null }, lastFull];
}

function readTable(lines, at) {
  const header = cellsOf(lines[at]);
  const align = cellsOf(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return cell.startsWith(":") ? "left" : null;
  });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && !isBlank(lines[end]) && lines[end].includes("|"); end += 1) {
    const cells = cellsOf(lines[end]);
    rows.push(header.map((_, column) => cells[column] ?? ""));
  }
  return [{ type: "table", header, align, rows }, end];
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  for (; end < lines.length && !isBlank(lines[end]); end += 1) {
    const underline = UNDERLINE.exec(lines[end]);
    if (underline) {
      const text = paragraphText(lines.slice(at, end));
      return [{ type: "heading", level: underline[1][0] === "=" ? 1 : 2, text }, end + 1];
    }
    if (depth < MAX_DEPTH && beginsBlock(lines, end)) break;
  }
  return [{ type: "paragraph", text: paragraphText(lines.slice(at, end)) }, end];
}

/** Whether a line ends the paragraph before it. A number does only where it is 1: years and such begin lines too. */
function beginsBlock(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  const beginsList = item && item[4] && (kindOf(item) === "-" || parseInt(item[2], 10) === 1 || indentOf(line) > 0);
  return beginsList || beginsTable(lines, at) || [FENCE, HEADING, RULE, QUOTE].some((pattern) => pattern.test(line));
}

function beginsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !DELIMITERS.test(lines[at + 1])) return false;
  return cellsOf(lines[at]).length === cellsOf(lines[at + 1]).length;
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  const cells = [""];
  for (let at = 0; at < inner.length; at += 1) {
    if (inner[at] === "|") cells.push("");
    else if (inner[at] === "\\" && inner[at + 1] === "|") cells[cells.length - 1] += inner[(at += 1)];
    else cells[cells.length - 1] += inner[at];
  }
  return cells.map((cell) => cell.trim());
}

/** Two spaces at a line's end are a break; spaces at its beginning are none. */
function paragraphText(lines) {
  return lines.map((line) => line.trimStart()).join("\n").trimEnd();
}

/** A heading's text may be followed by more #. */
function headingText(rest = "") {
  const text = rest.trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trimEnd() : text;
}

function kindOf(item) {
  if (!item) return null;
  return item[2].length === 1 ? "-" : item[2].at(-1);
}

function isBlank(line) {
  return line.trim() === "";
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function dedent(line, count) {
  return line.slice(Math.min(count, indentOf(line)));
}
