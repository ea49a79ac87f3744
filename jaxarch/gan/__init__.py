"""Generative adversarial networks: games of two networks, trained in one compiled step and judged honestly."""
