"""Reinforcement learning: environments and whole algorithms on the device, from tables to deep actor-critics."""
