// The page: puts its parts together and shows the state of the server.

import { Chats } from "./chats.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { announce, element, icon, show } from "./dom.js";
import { Layout } from "./layout.js";
import { Live } from "./live.js";
import { Sampling } from "./sampling.js";
import { loadSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { Thread } from "./thread.js";
import { keepKey } from "./transport.js";

const STATES = {
  connecting: "connecting",
  ok: "ready",
  loading: "loading",
  unloaded: "unloaded",
  draining: "ending",
  lost: "not reachable",
};
const SHORTCUTS = {
  KeyN: begin,
  KeyK: () => layout.toggle("sidebar"),
  KeyL: () => layout.toggle("live"),
  KeyS: () => layout.toggle("settings"),
};
const at = (id) => document.getElementById(id);

const settings = loadSettings();
const store = await openStore();
const connection = new Connection();
const chats = new Chats(store, connection, settings);
const welcome = element("section", { class: "welcome" });
const live = new Live(at("live"));
const sampling = new Sampling(at("settings"), settings);
let isDeclined = false; // the user has closed the dialog for the key
const layout = new Layout((panel) => connection.watch(panel === "live"));
const thread = new Thread(at("thread"), chats, { welcome, focusLost: () => composer.focus() });
const composer = new Composer(at("composer"), chats);
new Sidebar(at("conversations"), chats, { chosen: enterConversation, toast });

const newButton = { type: "button", class: "new", title: "New conversation (Alt+N)", onclick: begin };
show(at("new"), element("button", newButton, icon("add"), "New conversation"));
at("storage").hidden = store.isKept;

connection.addEventListener("state", showState);
connection.addEventListener("props", showProps);
connection.addEventListener("live", () => live.update(connection.live));
connection.addEventListener("key", showKeyDialog);
chats.addEventListener("path", showPath);
chats.addEventListener("titles", showTitle);
chats.addEventListener("ended", ({ detail }) => {
  announce(detail.state === "done" ? "The answer is complete" : "The answer has ended early");
});
chats.addEventListener("unsaved", () => toast("The browser's storage is full: this conversation is not kept."));
at("composer").addEventListener("editlast", ({ detail }) => thread.views.get(detail.id).edit());
document.querySelector(".skip").addEventListener("click", skip);
document.addEventListener("keydown", pressKey);
addEventListener("hashchange", () => chats.select(location.hash.slice(1)));

showState();
await chats.load(location.hash.slice(1));
composer.focus();
connection.check();

function begin() {
  chats.begin();
  enterConversation();
}

function enterConversation() {
  layout.closeOverlay();
  composer.focus();
}

function showState() {
  const { state } = connection;
  const label = at("state");
  label.className = state;
  label.textContent = STATES[state] ?? state;
  at("live").classList.toggle("stale", state === "lost");
  const banner = at("banner");
  banner.hidden = state !== "lost" && !isDeclined;
  const enter = element("button", { type: "button", class: "quiet", onclick: reconsider }, "Enter it");
  if (state === "lost") show(banner, "The server does not answer. The page tries again every second.");
  else if (isDeclined) show(banner, "The server needs its key. ", enter);
}

function showProps() {
  const { props } = connection;
  at("model").textContent = props.model;
  sampling.showDefaults(props);
  showTitle();
  const notices = [...(props.notices ?? [])];
  if (props.has_chat_template === false) notices.push("The model has no chat template: it continues texts.");
  show(
    welcome,
    element("h2", { dir: "auto" }, props.model),
    props.summary && element("p", {}, props.summary),
    notices.length ? element("ul", {}, ...notices.map((notice) => element("li", {}, notice))) : null,
    element("p", { class: "quiet-text" }, `offload-moe ${props.version}`),
  );
}

function showPath() {
  const isNew = !Object.keys(chats.open.messages).length;
  history.replaceState(null, "", isNew ? location.pathname + location.search : `#${chats.open.id}`);
  showTitle();
}

function showTitle() {
  const title = chats.titles.find(({ id }) => id === chats.open.id)?.title;
  document.title = [title, connection.props?.model ?? "offload-moe"].filter(Boolean).join(" · ");
}

/** Without the link's own effect on the address, which names the conversation. */
function skip(event) {
  event.preventDefault();
  at("message").focus();
}

/** Escape closes what lies above, else stops the answer. */
function pressKey(event) {
  if (event.key === "Escape" && !event.defaultPrevented && !at("key-dialog").open) {
    if (!layout.closeOverlay()) chats.stop();
  }
  if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.target.matches("input, textarea")) {
    at("toast").querySelector("button")?.click();
  }
  const shortcut = event.altKey && !event.ctrlKey && SHORTCUTS[event.code];
  if (!shortcut) return;
  event.preventDefault();
  shortcut();
}

function showKeyDialog() {
  const dialog = at("key-dialog");
  if (dialog.open || isDeclined) return;
  const field = dialog.querySelector("input");
  field.value = "";
  dialog.onclose = () => {
    isDeclined = !field.value.trim();
    if (!isDeclined) keepKey(field.value.trim());
    field.value = "";
    showState();
    connection.check();
  };
  dialog.showModal();
}

function reconsider() {
  isDeclined = false;
  showKeyDialog();
}

/** A few words at the page's end, with something to do about them. */
function toast(words, action, act, durationMs = 5000) {
  const box = at("toast");
  clearTimeout(box.timer);
  const hide = () => {
    box.hidden = true;
    show(box);
  };
  const onclick = () => {
    hide();
    act();
  };
  const button = action ? element("button", { type: "button", class: "quiet", onclick }, action) : null;
  show(box, element("span", { dir: "auto" }, words), button);
  box.hidden = false;
  box.timer = setTimeout(hide, durationMs);
}
