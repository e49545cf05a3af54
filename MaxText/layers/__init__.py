"""Flax NNX modules; each takes the few values it uses, never the whole config."""
