"""Family cards (`*.toml`) and the bundled default model (`mini/bundle/`), read as package data."""
