import { unsupported } from "./unsupported.js";
import { PUNCTUATION } from "./unicode.js";

/**
 * A part of a normalized text that is tokenized by itself.
 *
 * @typedef {object} Piece
 * @property {string} text as the model sees it
 * @property {number} start where it starts in the normalized text, in UTF-16 units
 * @property {number} added units at its start that are not in the normalized text
 */

/** @typedef {(pieces: Piece[]) => Piece[]} PreTokenizer */

/** GPT-2's, with `\s` as Unicode's white space. */
const WORDS =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/**
 * @param {any} config of tokenizer.json; null: none
 * @returns {PreTokenizer} bytes are left to the model
 */
export function preTokenizer(config) {
  if (config === null || config === undefined) return (pieces) => pieces;
  switch (config.type) {
    case "Sequence": {
      const steps = config.pretokenizers.map(preTokenizer);
      return (pieces) =>
        steps.reduce((/** @type {Piece[]} */ found, /** @type {PreTokenizer} */ step) => step(found), pieces);
    }
    case "BertPreTokenizer": {
      const words = new RegExp(`${PUNCTUATION.source}|(?:(?!${PUNCTUATION.source})\\P{White_Space})+`, "gu");
      return (pieces) => pieces.flatMap((piece) => matches(piece, words));
    }
    case "WhitespaceSplit":
      return (pieces) => pieces.flatMap((piece) => matches(piece, /\P{White_Space}+/gu));
    case "Metaspace":
      return metaspace(config);
    case "ByteLevel":
      return (pieces) =>
        pieces.flatMap((piece) => {
          if (config.add_prefix_space) piece = prepended(piece, " ");
          return config.use_regex === false ? [piece] : matches(piece, WORDS);
        });
    default:
      throw unsupported("pre-tokenizer", config.type);
  }
}

/**
 * @param {any} config
 * @returns {PreTokenizer}
 */
function metaspace({ replacement, prepend_scheme: scheme, split }) {
  // `first` depends on where in the original text the normalized one begins.
  if (!["always", "never"].includes(scheme)) throw unsupported("pre-tokenizer", `Metaspace ${scheme}`);
  const words = new RegExp(`^[^${replacement}]+|${replacement}[^${replacement}]*`, "gu");
  return (pieces) =>
    pieces.flatMap((piece) => {
      piece = { ...piece, text: piece.text.replaceAll(" ", replacement) };
      if (scheme === "always") piece = prepended(piece, replacement);
      return split === false ? [piece] : matches(piece, words);
    });
}

/**
 * @param {Piece} piece
 * @param {string} character
 * @returns {Piece}
 */
function prepended(piece, character) {
  if (!piece.text || piece.text.startsWith(character)) return piece;
  return { text: character + piece.text, start: piece.start, added: piece.added + character.length };
}

/**
 * @param {Piece} piece
 * @param {RegExp} pattern
 * @returns {Piece[]} the pattern's matches
 */
function matches({ text, start, added }, pattern) {
  return Array.from(text.matchAll(pattern), (found) => ({
    text: found[0],
    start: start + Math.max(found.index - added, 0),
    added: Math.max(added - found.index, 0),
  }));
}
