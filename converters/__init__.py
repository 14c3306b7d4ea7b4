"""Converters: a checkpoint in, a bundle out.

They may import torch and transformers; the runtime never imports them.
"""
