"""Converters: a checkpoint in, a bundle out. They may import torch and transformers; qrank's
runtime never imports them."""
