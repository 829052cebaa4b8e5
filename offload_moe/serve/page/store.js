// Conversations in the browser's own database. Titles lie apart, so that the list does not read every message.

const NAME = "offload-moe";
const CHANNEL = "offload-moe conversations";

/** Opens the database; where the browser permits none, a store that lasts as long as the page. */
export async function openStore() {
  try {
    return new Store(await openDatabase());
  } catch {
    return new Passing();
  }
}

class Store extends EventTarget {
  isKept = true;

  /** Event "change", with the conversation's id as `detail`, when another page has changed one. */
  constructor(database) {
    super();
    this.database = database;
    this.channel = new BroadcastChannel(CHANNEL);
    this.channel.onmessage = ({ data }) => this.dispatchEvent(new CustomEvent("change", { detail: data }));
  }

  /** [{id, title, updated}], newest first. */
  async titles() {
    const titles = await finished(this.database.transaction("titles").objectStore("titles").getAll());
    return titles.sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return finished(this.database.transaction("conversations").objectStore("conversations").get(id));
  }

  async put(conversation) {
    const { id, title, updated } = conversation;
    await this.change((titles, conversations) => {
      titles.put({ id, title, updated });
      conversations.put(conversation);
    });
    this.channel.postMessage(id);
  }

  async remove(id) {
    await this.change((titles, conversations) => {
      titles.delete(id);
      conversations.delete(id);
    });
    this.channel.postMessage(id);
  }

  change(apply) {
    const transaction = this.database.transaction(["titles", "conversations"], "readwrite");
    apply(transaction.objectStore("titles"), transaction.objectStore("conversations"));
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  }
}

class Passing extends EventTarget {
  isKept = false;
  conversations = new Map();

  async titles() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.conversations.get(id);
  }

  async put(conversation) {
    this.conversations.set(conversation.id, conversation);
  }

  async remove(id) {
    this.conversations.delete(id);
  }
}

function openDatabase() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("titles", { keyPath: "id" });
    request.result.createObjectStore("conversations", { keyPath: "id" });
  };
  return finished(request);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
}
