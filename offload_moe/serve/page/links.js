// Links out of text that is not trusted: only kinds of addresses that a browser merely opens, and only on a click.

import { element } from "./dom.js";

const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

/** A link without content, or a span where the address is of another kind. */
export function linkTo(address) {
  const url = parse(address);
  if (!url) return element("span", { class: "no-link", title: address });
  return element("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** An address that says its protocol itself. */
function parse(address) {
  try {
    const url = new URL(address);
    return PROTOCOLS.has(url.protocol) ? url : null;
  } catch {
    return null;
  }
}
