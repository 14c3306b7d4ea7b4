"""The machine, its files and processes, and what qrank remembers there."""
