"""From files to batches, with numpy and Grain; only device.py uses JAX. Callers need loader and device."""
