import { InputError } from "./errors.js";
import { TextTokenizer } from "./tokenizer/index.js";

/** @typedef {import("./bundle.js").Family} Family */

/**
 * A model's input.
 *
 * @typedef {object} Input
 * @property {number[]} ids token ids, special tokens included
 * @property {number[] | null} segments token types alongside `ids`; null: the family has none
 * @property {boolean} truncated whether the document was cut
 */

/**
 * A query in the family's template.
 *
 * @typedef {object} Prompt
 * @property {(number[] | null)[]} items token ids; null marks the document's position
 * @property {number} capacity most tokens of a document, with the text before it in its item
 */

/** Puts queries and documents into the family's template; special tokens come only from there. */
export class PairTokenizer {
  /**
   * @param {string} json content of the bundle's tokenizer.json
   * @param {Family} family
   * @param {object} options
   * @param {number} [options.maxLength] most tokens of a pair, the template's included
   * @param {(message: string) => void} options.warn
   * @throws {InputError} maxLength exceeds the model's limit, or leaves no room for text
   */
  constructor(json, family, { maxLength = family.max_length, warn }) {
    this._text = new TextTokenizer(json);
    this._family = family;
    this._warn = warn;
    const item = family.template.find((each) => typeof each === "string" && each.includes("{document}"));
    this._leadIn = fill(/** @type {string} */ (item), { instruction: family.instruction, document: "" });
    this._around = length(this._fill(""));
    this._leading = this._text.ids(this._leadIn).length;
    const least = this._around + this._leading + 2;
    if (!(Number.isInteger(maxLength) && maxLength >= least && maxLength <= family.max_length)) {
      throw new InputError(
        `maxLength is ${maxLength}; this model reads ${least} to ${family.max_length} tokens`,
      );
    }
    this._limit = maxLength;
  }

  /**
   * Encode (query, document) pairs.
   *
   * @param {[string, string][]} pairs
   * @returns {Input[]} in order
   */
  inputs(pairs) {
    /** @type {Map<string, Prompt>} */
    const prompts = new Map();
    for (const [query] of pairs) if (!prompts.has(query)) prompts.set(query, this._prompt(query));
    const most = Math.max(0, ...Array.from(prompts.values(), (prompt) => prompt.capacity));
    /** @type {Map<string, number[]>} */
    const documents = new Map();
    for (const [, document] of pairs) {
      if (!documents.has(document)) documents.set(document, this._text.ids(this._leadIn + document, most));
    }
    return pairs.map(([query, document]) => {
      const { items, capacity } = /** @type {Prompt} */ (prompts.get(query));
      const ids = /** @type {number[]} */ (documents.get(document));
      const filled = items.map((item) => item ?? ids.slice(0, capacity));
      const types = this._family.segments;
      return {
        ids: filled.flat(),
        segments: types && filled.flatMap((item, place) => item.map(() => types[place])),
        truncated: ids.length > capacity,
      };
    });
  }

  /**
   * A query that fills the limit by itself is cut, with a warning, to three quarters of the room
   * that the template leaves; without a quarter for the document, all would score the same.
   *
   * @param {string} query
   * @returns {Prompt}
   */
  _prompt(query) {
    const room = this._limit - this._around - this._leading;
    const shown = this._text.beginning(query, 2 * this._limit);
    let items = this._fill(shown);
    const found = length(items) - this._around;
    if (found >= room) {
      const kept = Math.max(Math.floor((room * 3) / 4), 1);
      this._warn(
        `the query has ${shown === query ? "" : "more than "}${found} tokens, and query and document ` +
          `together may have ${room}: only its first ${kept} are read`,
      );
      items = this._fillCut(shown, kept);
    }
    return { items, capacity: this._limit - length(items) };
  }

  /**
   * @param {string} query
   * @param {number} kept most tokens of it
   */
  _fillCut(query, kept) {
    const ends = this._text.ends(query, kept);
    const most = length(this._fill("")) + kept;
    // Text cut after some of its tokens may have more tokens than these.
    for (const end of ends.reverse()) {
      const items = this._fill(query.slice(0, end()));
      if (length(items) <= most) return items;
    }
    return this._fill("");
  }

  /**
   * The template's items as token ids; null for the document's.
   *
   * @param {string} query
   * @returns {(number[] | null)[]}
   */
  _fill(query) {
    const { template, instruction } = this._family;
    return template.map((item) => {
      if (typeof item === "number") return [item];
      if (item.includes("{document}")) return null;
      return this._text.ids(fill(item, { query, instruction }));
    });
  }
}

/**
 * @param {string} item of a template
 * @param {Record<string, string>} texts for its slots; slots within them are left alone
 */
function fill(item, texts) {
  return item.replace(/\{([a-z_]+)\}/g, (slot, name) => texts[name] ?? slot);
}

/** @param {(number[] | null)[]} items */
function length(items) {
  return items.reduce((sum, item) => sum + (item?.length ?? 0), 0);
}
