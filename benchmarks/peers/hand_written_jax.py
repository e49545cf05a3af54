"""The peer a competent user writes in an afternoon: the 10M model and its AdamW step in plain JAX, in one file.

In: --dtype, --steps; tokens are random. Out: one `completed step` line per step, in the trainer's format. It imports
nothing of the package on purpose: whatever the trainer's layers cost beyond this file is what the comparison shows.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

V, D, L, N, H, F = 49152, 256, 6, 4, 64, 1024  # vocabulary, width, layers, query heads (one K/V head), head width, mlp
B, T, CHUNKS = 8, 512, 8  # sequences a step, their length, pieces of the sequence for the loss


def init_params(key):
    """Float32 weights; those of the layers have a leading axis L for the scan."""
    shapes = {"wq": (L, D, N, H), "wk": (L, D, H), "wv": (L, D, H), "wo": (L, N, H, D)}
    shapes |= {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)}
    keys = dict(zip([*shapes, "embedding"], jax.random.split(key, len(shapes) + 1), strict=True))
    layers = {name: 0.02 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    norms = {"norm1": jnp.ones((L, D)), "norm2": jnp.ones((L, D))}
    embedding = 0.02 * jax.random.normal(keys["embedding"], (V, D))
    return {"embedding": embedding, "layers": layers | norms, "norm": jnp.ones(D)}


def rms_norm(x, scale):
    """x / rms(x) * scale, computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def rope(x):
    """Rotates x [B, T, heads, H] by its positions (half-split)."""
    angle = jnp.arange(T)[:, None, None] * 10000 ** (-jnp.arange(0, H, 2) / H)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def layer(x, w, dtype):
    """One decoder layer; a scan body."""
    w = {k: v if k.startswith("norm") else v.astype(dtype) for k, v in w.items()}
    h = rms_norm(x, w["norm1"])
    q = rope(jnp.einsum("btd,dnh->btnh", h, w["wq"]))
    k = rope(jnp.einsum("bsd,dh->bsh", h, w["wk"])[:, :, None])[:, :, 0]
    v = jnp.einsum("bsd,dh->bsh", h, w["wv"])
    scores = jnp.einsum("btnh,bsh->bnts", q, k).astype(jnp.float32) * H**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e30)
    context = jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(scores).astype(dtype), v)
    x = x + jnp.einsum("btnh,nhd->btd", context, w["wo"])
    h = rms_norm(x, w["norm2"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None


def loss_fn(params, tokens, dtype):
    """Mean cross-entropy; the logits of one piece of the sequence at a time, recomputed in the backward pass."""
    table = params["embedding"].astype(dtype)
    x, _ = jax.lax.scan(partial(layer, dtype=dtype), table[tokens[:, :-1]], params["layers"])
    x = rms_norm(x, params["norm"])

    @jax.checkpoint
    def piece(total, chunk):
        x, targets = chunk
        logits = jnp.einsum("btd,vd->btv", x, table).astype(jnp.float32)
        return total + optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(), None

    def cut(a):
        return a.reshape(B, CHUNKS, T // CHUNKS, *a.shape[2:]).swapaxes(0, 1)

    return jax.lax.scan(piece, 0.0, (cut(x), cut(tokens[:, 1:])))[0] / (B * T)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the matrix products")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    params = jax.jit(init_params)(jax.random.key(0))
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)  # norms do not decay
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, jnp.dtype(args.dtype))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = jax.jit(optimizer.init)(params)
    tokens = np.random.default_rng(0).integers(0, V, (args.steps, B, T + 1), dtype=np.int32)
    for step in range(args.steps):
        start = time.perf_counter()
        params, opt_state, loss = train_step(params, opt_state, tokens[step])
        loss = float(loss)
        seconds = time.perf_counter() - start
        print(
            f"completed step: {step}, seconds: {seconds:.3f}, Tokens/s/device: {B * T / seconds:.3f}, loss: {loss:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
