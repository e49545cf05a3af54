"""Text from a trained model: a KV cache, sampling, batches of requests that come and go, and a server."""
