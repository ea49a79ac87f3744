"""Generative adversarial networks: networks, objectives, regularisers, their training and their metrics."""
