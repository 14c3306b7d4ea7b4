"""Files of pairs, of any size: scored chunk by chunk, resumed, shared among machines."""
