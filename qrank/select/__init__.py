"""Which target runs on this machine, and whether it still ranks like the original."""
