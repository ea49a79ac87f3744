"""Transformers: modules that own parameters, their training, their decoding."""
