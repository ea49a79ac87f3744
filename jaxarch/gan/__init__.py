"""Generative adversarial networks: networks, losses, regularisers, augmentation, metrics, editing."""
