import { CharsMap } from "./charsmap.js";
import { unsupported } from "./unsupported.js";
import { CONTROL, IDEOGRAPH, MARK, lowerCase, normalForm } from "./unicode.js";

/** @typedef {(text: string) => string} Normalizer */

/** Regular expressions that `Replace` has in known tokenizers; they mean the same in JavaScript. */
const KNOWN_PATTERNS = [" {2,}"];

/**
 * @param {any} config of tokenizer.json; null: none
 * @returns {Normalizer}
 */
export function normalizer(config) {
  if (config === null || config === undefined) return (text) => text;
  switch (config.type) {
    case "Sequence": {
      const steps = config.normalizers.map(normalizer);
      return (text) => steps.reduce((/** @type {string} */ t, /** @type {Normalizer} */ step) => step(t), text);
    }
    case "BertNormalizer":
      return bert(config);
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD":
      return (text) => normalForm(text, config.type);
    case "Lowercase":
      return lowerCase;
    case "Precompiled": {
      const map = new CharsMap(config.precompiled_charsmap);
      return (text) => map.normalize(text);
    }
    case "Prepend":
      return (text) => text && config.prepend + text;
    case "Replace":
      return replace(config);
    case "Strip":
      return (text) => {
        if (config.strip_left) text = text.replace(/^\p{White_Space}+/u, "");
        return config.strip_right ? text.replace(/(?<!\p{White_Space})\p{White_Space}+$/u, "") : text;
      };
    default:
      throw unsupported("normalizer", config.type);
  }
}

/**
 * @param {any} config
 * @returns {Normalizer}
 */
function bert(config) {
  const stripped = config.strip_accents ?? config.lowercase;
  return (text) => {
    if (config.clean_text) text = text.replace(CONTROL, "").replace(/\p{White_Space}/gu, " ");
    if (config.handle_chinese_chars) text = text.replace(IDEOGRAPH, " $& ");
    if (stripped) text = normalForm(text, "NFD").replace(MARK, "");
    return config.lowercase ? lowerCase(text) : text;
  };
}

/**
 * @param {any} config
 * @returns {Normalizer}
 */
function replace(config) {
  const { String: literal, Regex: regex } = config.pattern;
  if (literal !== undefined) return (text) => text.replaceAll(literal, () => config.content);
  if (!KNOWN_PATTERNS.includes(regex)) throw unsupported("normalizer", `Replace of ${regex}`);
  const pattern = new RegExp(regex, "gu");
  return (text) => text.replace(pattern, () => config.content);
}
