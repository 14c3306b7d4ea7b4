"""A model on disk: manifest, family, files, and where they come from."""
