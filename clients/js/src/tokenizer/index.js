import { BundleError } from "../errors.js";
import { addedWords } from "./added_words.js";
import { model } from "./models.js";
import { normalizer } from "./normalizers.js";
import { preTokenizer } from "./pre_tokenizers.js";

/** @typedef {import("./added_words.js").Stretch} Stretch */
/** @typedef {import("./pre_tokenizers.js").Piece} Piece */

/** Tokens at a text's end that may change if more text follows. */
const MARGIN = 128;

/** Estimates the length of text from its tokens; English has 5, other scripts have fewer. */
const UNITS_A_TOKEN = 8;

/** Text with more distinct characters than this at its end does not repeat itself. */
const VARIED = 32;

/**
 * Text -> token ids, exactly as the Rust library `tokenizers` reads a bundle's tokenizer.json.
 *
 * A bundle's tokenizer reads everything as plain text: no text becomes a special token. Parts that
 * are not known to be exact here are refused.
 */
export class TextTokenizer {
  /**
   * @param {string} json content of tokenizer.json
   * @throws {BundleError} it cannot be read
   * @throws {FamilyError} it has a part that this package does not know
   */
  constructor(json) {
    const config = parsed(json);
    this._normalize = normalizer(config.normalizer);
    this._split = preTokenizer(config.pre_tokenizer);
    this._model = model(config.model, JSON.stringify(config.pre_tokenizer ?? null).includes('"ByteLevel"'));
    const added = config.added_tokens ?? [];
    const raw = added.filter((/** @type {any} */ token) => !token.normalized);
    const normalized = added.filter((/** @type {any} */ token) => token.normalized);
    this._rawWords = addedWords(raw, (content) => content);
    this._words = addedWords(normalized, this._normalize);
    this._margin = Math.max(MARGIN, config.model.max_input_chars_per_word ?? 0);
    this._unigram = config.model.type === "Unigram";
  }

  /**
   * Token ids of a text. Unpaired surrogates become U+FFFD.
   *
   * @param {string} text
   * @param {number} [most] of a text with more tokens, the result may end anywhere beyond this many
   * @returns {number[]}
   */
  ids(text, most) {
    if (most !== undefined) {
      const beginning = cut(text, (most + this._margin) * UNITS_A_TOKEN);
      if (beginning.length < text.length) {
        const ids = this._ids(beginning).slice(0, -this._margin);
        if (ids.length > most && this._sure(beginning)) return ids;
      }
    }
    return this._ids(text);
  }

  /**
   * Where the first tokens of a text end, in UTF-16 units of the text.
   *
   * @param {string} text
   * @param {number} most
   * @returns {(() => number)[]} one for each token, at most `most`
   */
  ends(text, most) {
    const ends = [];
    for (const stretch of this._rawWords(text.toWellFormed())) {
      const normalized = stretch.id === undefined ? this._normalize(stretch.text) : stretch.text;
      for (const end of this._stretchEnds(stretch, normalized)) {
        if (ends.length === most) return ends;
        ends.push(() => stretch.start + this._original(stretch.text, normalized, end));
      }
    }
    return ends;
  }

  /**
   * A beginning of a text with more than `tokens` tokens, or the text if it has no more.
   *
   * @param {string} text
   * @param {number} tokens
   */
  beginning(text, tokens) {
    const beginning = cut(text, (tokens + this._margin) * UNITS_A_TOKEN);
    if (beginning.length === text.length) return text;
    return this._ids(beginning).length - this._margin > tokens && this._sure(beginning) ? beginning : text;
  }

  /** @param {string} text */
  _ids(text) {
    const ids = [];
    for (const stretch of this._rawWords(text.toWellFormed())) {
      if (stretch.id !== undefined) ids.push(stretch.id);
      else {
        for (const part of this._words(this._normalize(stretch.text))) {
          if (part.id !== undefined) ids.push(part.id);
          else for (const piece of this._pieces(part)) for (const id of this._model(piece.text).ids) ids.push(id);
        }
      }
    }
    return ids;
  }

  /**
   * @param {Stretch} part of a normalized text
   * @returns {Piece[]}
   */
  _pieces({ text, start }) {
    return this._split([{ text, start, added: 0 }]);
  }

  /**
   * @param {Stretch} stretch
   * @param {string} normalized
   * @returns {Iterable<number>} where its tokens end in the normalized text
   */
  *_stretchEnds(stretch, normalized) {
    if (stretch.id !== undefined) {
      yield normalized.length;
      return;
    }
    for (const part of this._words(normalized)) {
      if (part.id !== undefined) yield part.start + part.text.length;
      else {
        for (const { text, start, added } of this._pieces(part)) {
          for (const end of this._model(text).ends) yield start + Math.max(end - added, 0);
        }
      }
    }
  }

  /**
   * The shortest beginning of a text that gives the first `end` units of its normalized form.
   *
   * @param {string} text
   * @param {string} normalized
   * @param {number} end
   */
  _original(text, normalized, end) {
    if (text === normalized) return end;
    const wanted = normalized.slice(0, end);
    let [low, high] = [0, text.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this._normalize(text.slice(0, middle).toWellFormed()).startsWith(wanted)) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /**
   * Whether all but the last tokens of a beginning stay the same, whatever text follows.
   *
   * @param {string} beginning
   */
  _sure(beginning) {
    // Unigram's best path through a word that repeats itself may change from its first token on.
    const last = beginning.slice(-this._margin);
    return !this._unigram || last.includes(" ") || new Set(last).size > VARIED;
  }
}

/**
 * A beginning of a text of at least `length` units, longer if combining characters follow:
 * normalization may merge these with the character before.
 *
 * @param {string} text
 * @param {number} length
 */
function cut(text, length) {
  const rest = /^[\udc00-\udfff]?\p{M}*/u.exec(text.slice(length));
  return text.slice(0, length + (rest ? rest[0].length : 0));
}

/** @param {string} json */
function parsed(json) {
  try {
    return JSON.parse(json);
  } catch (error) {
    throw new BundleError(`tokenizer.json cannot be read: ${/** @type {Error} */ (error).message}`, { cause: error });
  }
}
