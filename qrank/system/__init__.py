"""The machine, its files and processes, and qrank's cache."""
