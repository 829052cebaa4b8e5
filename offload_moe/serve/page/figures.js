// What happened between two snapshots of the server. Nothing here touches the document.

/** Null where the server has been started again between the two, or where they are one. */
export function between(before, after) {
  if (!before || before.started_s !== after.started_s || after.at_s <= before.at_s) return null;
  const seconds = after.at_s - before.at_s;
  const generated = after.tokens.generated - before.tokens.generated;
  const tokens = generated + after.tokens.prompt - before.tokens.prompt;
  const experts = (name) => after.experts[name] - before.experts[name];
  const [hits, delayed, misses] = ["hits", "delayed", "misses"].map(experts);
  const perToken = (value) => (tokens > 0 ? value / tokens : NaN);
  return {
    seconds,
    tokens,
    tokensPerS: generated / seconds,
    hitRate: hits + delayed + misses > 0 ? hits / (hits + delayed + misses) : NaN,
    hits: perToken(hits),
    delayed: perToken(delayed),
    misses: perToken(misses),
    stallMs: perToken((after.stall_s - before.stall_s) * 1000),
    diskPerS: (after.bytes.disk - before.bytes.disk) / seconds,
    h2dPerS: (after.bytes.h2d - before.bytes.h2d) / seconds,
  };
}

/** How much each expert was used between two snapshots: 0 to 1, 1 the most used. */
export function activity(before, after) {
  const used = (uses, earlier = uses) => Math.max(0, uses - earlier);
  const grown = after.uses.map((row, layer) => row.map((uses, expert) => used(uses, before?.uses[layer]?.[expert])));
  const most = Math.max(1e-9, ...grown.map((row) => Math.max(0, ...row)));
  return grown.map((row) => row.map((uses) => uses / most));
}

/** How many experts each tier holds: {"0": 12, ...}. */
export function tiersOf(residency) {
  const counts = {};
  for (const row of residency) for (const tier of row) counts[tier] = (counts[tier] ?? 0) + 1;
  return counts;
}
