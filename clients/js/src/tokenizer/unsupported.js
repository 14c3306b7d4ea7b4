import { FamilyError } from "../errors.js";

/**
 * @param {string} part of a tokenizer
 * @param {string} type
 */
export function unsupported(part, type) {
  return new FamilyError(
    `the tokenizer has the ${part} ${type}, which this package does not know; ` +
      "score with the Python package, or through qrank serve",
  );
}
