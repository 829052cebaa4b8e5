// Markdown inside a paragraph. Builds nodes from text: what is no known form stays text, HTML too.
// Source of the algorithm for emphasis: the CommonMark specification, appendix "A parsing strategy".

import { element } from "./dom.js";
import { linkTo } from "./links.js";

const MAX_OPEN = 1000; // delimiters that wait for their end: bounds the depth of the document and the time
const PLAIN = /[^\\`*_~[\]!<&$\nh]+/y;
const ESCAPED = /[!-/:-@[-`{-~]/;
const PLACE = /<([^<>\n]{0,2000})>|((?:[^\s()\\]|\\.|\([^\s()]{0,500}\)){0,2000})/;
const TITLE = /"[^"]{0,500}"|'[^']{0,500}'/;
const TAIL = new RegExp(`\\(\\s{0,9}(?:${PLACE.source})(?:\\s{1,9}(?:${TITLE.source}))?\\s{0,9}\\)`, "y");
const ADDRESS = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const BARE = /https?:\/\/[^\s<>"'`*]{1,2000}/y;
const BREAK = /<br\s*\/?>/iy;
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-zA-Z]{2,8}));/y;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", ndash: "–", mdash: "—" };
const MORE = { le: "≤", ge: "≥", hellip: "…", times: "×", rarr: "→", larr: "←" };
const ENTITIES = new Map(Object.entries({ ...NAMED, ...MORE }));
const WIDE = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": ["del", "del"] };

/** The nodes of a text, in a fragment. */
export function inline(text) {
  return new Inline(text).parse();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.root = document.createDocumentFragment();
    this.plain = "";
    this.delimiters = []; // runs of * _ ~ that may begin or end emphasis
    this.brackets = []; // [ that may begin a link
    this.unclosed = new Set(); // ends that do not come any more
  }

  parse() {
    while (this.at < this.text.length) {
      const plain = this.match(PLAIN);
      if (plain) this.plain += plain[0];
      else if (!this.parseSpecial(this.text[this.at])) this.plain += this.text[this.at++];
    }
    this.flush();
    this.emphasize(0);
    return this.root;
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (found) this.at = pattern.lastIndex;
    return found;
  }

  append(node) {
    this.flush();
    this.root.append(node);
    return node;
  }

  flush() {
    if (this.plain) this.root.append(this.plain);
    this.plain = "";
  }

  parseSpecial(character) {
    switch (character) {
      case "\n":
        return this.parseNewline();
      case "\\":
        return this.parseEscape();
      case "`":
        return this.parseCode();
      case "$":
        return this.parseDollars();
      case "*":
      case "_":
      case "~":
        return this.parseRun(character);
      case "[":
        return this.parseBracket();
      case "!":
        return this.text[this.at + 1] === "[" && this.parseBracket("!");
      case "]":
        return this.parseLinkEnd();
      case "<":
        return this.parseAngle();
      case "&":
        return this.parseEntity();
      default:
        return this.parseBareAddress();
    }
  }

  parseNewline() {
    this.at += 1;
    if (!this.plain.endsWith("  ")) {
      this.plain += "\n";
      return true;
    }
    this.plain = this.plain.trimEnd();
    this.append(element("br"));
    return true;
  }

  parseEscape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "(" && this.parseMath("\\(", "\\)")) return true;
    if (next === "[" && this.parseMath("\\[", "\\]")) return true;
    if (next === "\n") this.append(element("br"));
    else if (ESCAPED.test(next)) this.plain += next;
    else return false;
    this.at += 2;
    return true;
  }

  /** Formulas are shown as they are written: their * and _ are no emphasis. */
  parseMath(open, close) {
    const end = this.find(close, this.at + open.length);
    const formula = this.text.slice(this.at + open.length, Math.max(0, end)).trim();
    if (!formula) return false;
    const isBlock = open === "$$" || open === "\\[";
    this.append(element("code", { class: isBlock ? "math block" : "math", dir: "ltr" }, formula));
    this.at = end + close.length;
    return true;
  }

  parseDollars() {
    if (this.text.startsWith("$$", this.at)) return this.parseMath("$$", "$$");
    const formula = /\$([^\s$](?:[^$\n]{0,200}[^\s$\\])?)\$(?!\d)/y;
    const found = this.match(formula);
    if (found) this.append(element("code", { class: "math", dir: "ltr" }, found[1]));
    return found !== null;
  }

  find(end, from) {
    if (this.unclosed.has(end)) return -1;
    const found = this.text.indexOf(end, from);
    if (found < 0) this.unclosed.add(end);
    return found;
  }

  parseCode() {
    const [ticks] = /`+/y.exec(this.text.slice(this.at));
    let end = this.at + ticks.length;
    while (!this.unclosed.has(ticks)) {
      end = this.find(ticks, end);
      if (end < 0) break;
      if (this.text[end + ticks.length] !== "`") {
        const code = this.text.slice(this.at + ticks.length, end).replace(/\n/g, " ");
        const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
        this.append(element("code", { dir: "ltr" }, isPadded ? code.slice(1, -1) : code));
        this.at = end + ticks.length;
        return true;
      }
      while (this.text[end] === "`") end += 1;
    }
    this.plain += ticks;
    this.at += ticks.length;
    return true;
  }

  parseRun(character) {
    let end = this.at;
    while (this.text[end] === character) end += 1;
    const length = end - this.at;
    const before = characterBefore(this.text, this.at);
    const after = String.fromCodePoint(this.text.codePointAt(end) ?? 10);
    const [canOpen, canClose] = flanks(character, before, after);
    const isMark = (character !== "~" || length === 2) && (canOpen || canClose) && this.delimiters.length < MAX_OPEN;
    const run = this.text.slice(this.at, end);
    this.at = end;
    if (isMark) {
      const node = this.append(document.createTextNode(run));
      this.delimiters.push({ node, character, length, original: length, canOpen, canClose });
    } else this.plain += run;
    return true;
  }

  parseBracket(prefix = "") {
    this.at += prefix.length + 1;
    const node = this.append(document.createTextNode(`${prefix}[`));
    this.brackets.push({ node, delimiters: this.delimiters.length });
    return true;
  }

  parseLinkEnd() {
    const bracket = this.brackets.pop();
    this.at += 1;
    const tail = bracket && this.match(TAIL);
    if (!tail) {
      this.plain += "]";
      return true;
    }
    this.flush();
    this.emphasize(bracket.delimiters);
    const link = linkTo((tail[1] ?? tail[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
    while (bracket.node.nextSibling) link.append(bracket.node.nextSibling);
    if (!link.hasChildNodes()) link.append(link.title || "image");
    bracket.node.replaceWith(link);
    if (!bracket.node.data.startsWith("!")) this.brackets = [];
    return true;
  }

  parseAngle() {
    const address = this.match(ADDRESS);
    if (address) this.append(linkTo(address[1])).append(address[1]);
    else if (this.match(BREAK)) this.append(element("br"));
    else return false;
    return true;
  }

  parseEntity() {
    const found = this.match(ENTITY);
    if (!found) return false;
    const [whole, decimal, hexadecimal, name] = found;
    if (name) this.plain += ENTITIES.get(name) ?? whole;
    else this.plain += characterOf(decimal ? parseInt(decimal, 10) : parseInt(hexadecimal, 16));
    return true;
  }

  parseBareAddress() {
    if (/[\p{L}\p{N}]/u.test(characterBefore(this.text, this.at))) return false;
    const found = this.match(BARE);
    if (!found) return false;
    let address = found[0].replace(/[.,;:!?…]+$/, "");
    while (/[)\]]$/.test(address) && unbalanced(address)) address = address.slice(0, -1).replace(/[.,;:!?]+$/, "");
    this.at -= found[0].length - address.length;
    if (this.brackets.length) this.plain += address;
    else this.append(linkTo(address)).append(address);
    return true;
  }

  /** Turn the delimiters from `bottom` on into emphasis. */
  emphasize(bottom) {
    const runs = this.delimiters.splice(bottom);
    const floors = {}; // below which no opener for this kind of closer exists
    for (let closer = 0; closer < runs.length; closer += 1) {
      const end = runs[closer];
      while (end.canClose && end.length) {
        const kind = `${end.character}${end.canOpen}${end.original % 3}`;
        let opener = closer - 1;
        const floor = floors[kind] ?? 0;
        while (opener >= floor && !fits(runs[opener], end)) opener -= 1;
        if (opener < floor) {
          floors[kind] = closer;
          break;
        }
        for (let between = opener + 1; between < closer; between += 1) runs[between].length = 0;
        wrap(runs[opener], end);
      }
    }
  }
}

function fits(open, end) {
  if (!open.length || !open.canOpen || open.character !== end.character) return false;
  const isAmbiguous = (open.canClose || end.canOpen) && (open.original + end.original) % 3 === 0;
  return !isAmbiguous || (open.original % 3 === 0 && end.original % 3 === 0);
}

function wrap(open, end) {
  const count = open.length >= 2 && end.length >= 2 ? 2 : 1;
  const made = element(TAGS[end.character][count - 1]);
  while (open.node.nextSibling !== end.node) made.append(open.node.nextSibling);
  end.node.before(made);
  for (const run of [open, end]) {
    run.length -= count;
    run.node.data = run.node.data.slice(count);
  }
}

function characterOf(code) {
  const isScalar = code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
  return isScalar ? String.fromCodePoint(code) : "\ufffd";
}

/** Whether a run may open and close. Wide characters have no spaces between them: punctuation there does not decide. */
function flanks(character, before, after) {
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const isLeft = !spaceAfter && (!markAfter || spaceBefore || markBefore || WIDE.test(before));
  const isRight = !spaceBefore && (!markBefore || spaceAfter || markAfter || WIDE.test(after));
  if (character !== "_") return [isLeft, isRight];
  return [isLeft && (!isRight || markBefore), isRight && (!isLeft || markAfter)];
}

function characterBefore(text, at) {
  if (at === 0) return "\n";
  const code = text.charCodeAt(at - 1);
  const isLow = code >= 0xdc00 && code <= 0xdfff && at > 1;
  return text.slice(at - (isLow ? 2 : 1), at);
}

function unbalanced(address) {
  const end = address.at(-1);
  const open = end === ")" ? "(" : "[";
  return address.split(end).length > address.split(open).length;
}
