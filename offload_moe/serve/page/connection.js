// Whether a server is there and what it serves, polled in intervals: the page notices an end and a new beginning.

import { getJson, ServerError } from "./transport.js";

const CALM_MS = 5000;
const EAGER_MS = 1000;

/**
 * Events: "state" when `state` has changed, "props" when `props` has, "live" with each snapshot, "key" when the server
 * needs one.
 * States: "connecting", "ok", "loading", "unloaded", "draining", "lost".
 */
export class Connection extends EventTarget {
  constructor() {
    super();
    this.state = "connecting";
    this.props = null;
    this.live = null;
    this.isWatched = false;
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.check());
    addEventListener("online", () => this.check());
  }

  /** Whether snapshots are fetched, not only the state. */
  watch(isWatched) {
    this.isWatched = isWatched;
    this.check();
  }

  /** Poll now, and from then on in intervals. Nothing is sent while the page is not seen. */
  async check() {
    clearTimeout(this.timer);
    if (document.hidden || this.isChecking) return;
    this.isChecking = true;
    try {
      await this.poll();
    } finally {
      this.isChecking = false;
    }
    const isEager = this.isWatched || ["connecting", "loading", "lost"].includes(this.state);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.check(), isEager ? EAGER_MS : CALM_MS);
  }

  async poll() {
    const before = this.state;
    try {
      const health = await getJson("health");
      const isBack = before === "lost" || before === "connecting" || this.props === null || before !== health.status;
      if (isBack) await this.fetchProps();
      this.become(health.status);
      if (this.isWatched) await this.fetchLive();
    } catch (error) {
      if (!(error instanceof ServerError)) this.become("lost");
      else if (error.status === 401) this.dispatchEvent(new Event("key"));
    }
  }

  async fetchProps() {
    this.props = await getJson("props");
    this.dispatchEvent(new Event("props"));
  }

  async fetchLive() {
    this.live = await getJson("live");
    this.dispatchEvent(new Event("live"));
  }

  become(state) {
    if (state === this.state) return;
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}
