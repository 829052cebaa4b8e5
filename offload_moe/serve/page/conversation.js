// A conversation: a tree of messages, of which one path is shown. Editing and retrying add branches; nothing is lost.
//
// A message: {id, parent, role, content, reasoning, at, state, error, finish, usage, timings}. States: "done",
// "writing", "stopped", "failed". `chosen` has the child that is shown, by its parent's id; the first one's is "".

const TITLE_LENGTH = 60;

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation() {
  return { id: newId(), title: "", isNamed: false, updated: Date.now(), messages: {}, chosen: {} };
}

/** Add a message below a parent and show it. */
export function add(conversation, parent, role, fields = {}) {
  const message = { id: newId(), parent, role, content: "", reasoning: "", at: Date.now(), state: "done", ...fields };
  conversation.messages[message.id] = message;
  conversation.chosen[parent] = message.id;
  if (parent === "" && role === "user" && !conversation.isNamed) conversation.title = titleOf(message.content);
  return message;
}

/** The messages that are shown, each with its siblings: [{message, siblings}]. */
export function pathOf(conversation) {
  const children = childrenOf(conversation);
  const path = [];
  for (let id = conversation.chosen[""]; id; id = conversation.chosen[id]) {
    const message = conversation.messages[id];
    path.push({ message, siblings: children.get(message.parent) });
  }
  return path;
}

/** The messages above and with one, oldest first, as the server takes them. */
export function requestMessages(conversation, last, systemPrompt) {
  const messages = [];
  for (let message = last; message; message = conversation.messages[message.parent]) {
    messages.unshift({ role: message.role, content: message.content });
  }
  return systemPrompt ? [{ role: "system", content: systemPrompt }, ...messages] : messages;
}

/** Show the sibling `step` places from a message. */
export function chooseSibling(conversation, message, step) {
  const siblings = Object.values(conversation.messages).filter((other) => other.parent === message.parent);
  const chosen = siblings[siblings.indexOf(message) + step];
  if (chosen) conversation.chosen[message.parent] = chosen.id;
}

/** A page that was closed while an answer was being written has left it so. */
export function settle(conversation) {
  const left = { state: "failed", error: "The page was closed before the answer ended." };
  for (const message of Object.values(conversation.messages)) {
    if (message.state === "writing") Object.assign(message, left);
  }
  return conversation;
}

/** Messages by their parent's id. */
function childrenOf(conversation) {
  const children = new Map();
  for (const message of Object.values(conversation.messages)) {
    if (!children.has(message.parent)) children.set(message.parent, []);
    children.get(message.parent).push(message);
  }
  return children;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  const characters = Array.from(line);
  return characters.length > TITLE_LENGTH ? `${characters.slice(0, TITLE_LENGTH).join("").trimEnd()}…` : line;
}
