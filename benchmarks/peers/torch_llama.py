"""The PyTorch peer: `transformers` LlamaForCausalLM of the same shape, trained with torch.optim.AdamW on the CPU.

In: --dtype, --steps, --compile; tokens are random. Out: one `completed step` line per step, in the trainer's format.
Parameters are float32 in every case, as in the trainer: bfloat16 means autocast of the matrix products.
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH = 8, 512


def build_model():
    """The 18.3M-parameter model of configs/validate_10m.yml."""
    config = LlamaConfig(
    vocab_size=49152, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=1, head_dim=64, tie_word_embeddings=True, rms_norm_eps=1e-6, use_cache=False,
  )  # fmt: skip
    return LlamaForCausalLM(config)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the matrix products")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = build_model()
    forward = torch.compile(model) if args.compile else model
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for step in range(args.steps):
        start = time.perf_counter()
        tokens = torch.randint(0, 49152, (BATCH, LENGTH))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        speed = BATCH * LENGTH / seconds
        print(
            f"completed step: {step}, seconds: {seconds:.3f}, Tokens/s/device: {speed:.3f}, loss: {loss.item():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
