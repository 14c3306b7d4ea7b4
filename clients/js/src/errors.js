/**
 * Every error that qrank raises on purpose. The message says what was found, what was expected, and
 * what to do.
 */

/** Catch this to catch them all. */
export class QrankError extends Error {
  /**
   * @param {string} message
   * @param {ErrorOptions} [options]
   */
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** The caller's texts or arguments cannot be used. */
export class InputError extends QrankError {}

/** A runtime is not installed; the message has the npm line. */
export class MissingPackageError extends QrankError {}

/** There is no bundle at that place. */
export class ModelNotFoundError extends QrankError {}

/** A bundle is damaged, incomplete, or of another schema version. */
export class BundleError extends QrankError {}

/** The model is of a kind that this package cannot run; the Python package can. */
export class FamilyError extends QrankError {}

/** The bundle has no such variant, or the runtime fails or computes wrongly here. */
export class TargetError extends QrankError {}
