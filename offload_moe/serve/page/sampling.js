// The form for sampling and the system prompt. A value outside its limits is marked and not used.

import { element, show } from "./dom.js";
import { EFFORTS, FIELDS, saveSettings } from "./settings.js";

/** Shows `settings` in an element and writes what the user changes into them. */
export class Sampling {
  constructor(container, settings) {
    this.container = container;
    this.settings = settings;
    this.inputs = new Map();
    const placeholder = "Stands before every conversation";
    this.system = element("textarea", { id: "system", rows: "4", dir: "auto", placeholder });
    this.system.addEventListener("input", () => this.set("system", this.system.value.trim()));
    const options = ["", ...EFFORTS].map((effort) => element("option", { value: effort }, effort || "default"));
    this.effort = element("select", { id: "effort" }, ...options);
    this.effort.addEventListener("change", () => this.set("effort", this.effort.value));
    this.effortRow = field("effort", "Reasoning effort", "", this.effort);
    show(
      container,
      element("div", { class: "field wide" }, element("label", { for: "system" }, "System prompt"), this.system),
      ...FIELDS.map((each) => this.numberField(each)),
      this.effortRow,
      element("button", { type: "button", class: "quiet", onclick: () => this.reset() }, "Back to the defaults"),
    );
    this.fill();
  }

  numberField({ name, label, hint, ...limits }) {
    const described = { id: name, "aria-describedby": `${name}-hint` };
    const input = element("input", { type: "number", inputmode: "decimal", ...described, ...limits });
    input.addEventListener("input", () => {
      const isUsable = input.validity.valid;
      input.setAttribute("aria-invalid", `${!isUsable}`);
      this.set(name, isUsable && input.value !== "" ? input.valueAsNumber : undefined);
    });
    this.inputs.set(name, input);
    return field(name, label, hint, input);
  }

  /** The server's defaults stand where the user has set nothing. */
  showDefaults(props) {
    for (const [name, input] of this.inputs) {
      const value = props.sampling?.[name];
      input.placeholder = value === undefined || value === null ? "default" : `${value}`;
    }
    this.effortRow.hidden = props.has_reasoning === false;
  }

  set(name, value) {
    this.settings[name] = value;
    saveSettings(this.settings);
  }

  fill() {
    this.system.value = this.settings.system;
    this.effort.value = this.settings.effort;
    for (const [name, input] of this.inputs) {
      input.value = this.settings[name] ?? "";
      input.setAttribute("aria-invalid", "false");
    }
  }

  reset() {
    for (const { name } of FIELDS) delete this.settings[name];
    Object.assign(this.settings, { system: "", effort: "" });
    saveSettings(this.settings);
    this.fill();
  }
}

function field(id, label, hint, input) {
  const text = element("div", {}, element("label", { for: id }, label), element("small", { id: `${id}-hint` }, hint));
  return element("div", { class: "field" }, text, input);
}
