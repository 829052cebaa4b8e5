// What the user has set: how tokens are chosen, and what stands before every conversation. Empty: the server's default.

const NAME = "offload-moe settings";

/** min, max and step as in HTML. `default` names the field of the server's defaults. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 5, step: 0.05, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, hint: "share of probability" },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, hint: "tokens to choose from" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "least relative probability" },
  { name: "repetition_penalty", label: "Repetition", min: 0.5, max: 2, step: 0.01, hint: "above 1 penalizes repeats" },
  { name: "max_tokens", label: "Answer length", min: 1, max: 1000000, step: 1, hint: "tokens at most" },
  { name: "seed", label: "Seed", min: 0, max: 4294967295, step: 1, hint: "same seed, same answer" },
];
export const EFFORTS = ["low", "medium", "high"];

export function loadSettings() {
  try {
    return { system: "", effort: "", ...JSON.parse(localStorage.getItem(NAME) ?? "{}") };
  } catch {
    return { system: "", effort: "" };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(NAME, JSON.stringify(settings));
  } catch {
    // storage is full or not permitted: the settings last as long as the page
  }
}

/** The part of a request that the settings decide. */
export function samplingOf(settings) {
  const chosen = FIELDS.map(({ name }) => [name, settings[name]]).filter(([, value]) => typeof value === "number");
  return { ...Object.fromEntries(chosen), ...(settings.effort ? { reasoning_effort: settings.effort } : {}) };
}
