"""What a model is on disk: manifest, family, files, and where they come from."""
