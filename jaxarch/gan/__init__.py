"""GANs: networks, objectives, regularisers, augmentation, metrics, editing."""
