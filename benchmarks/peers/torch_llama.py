"""The PyTorch peer: `transformers` LlamaForCausalLM of the same shape, trained with torch.optim.AdamW.

In: --shape, --dtype, --steps, --compile; tokens are random. Out: one `completed step` line per step, in the trainer's
format. Parameters are float32 in every case, as in the trainer: bfloat16 means autocast of the matrix products.
Attention is torch's scaled_dot_product_attention. It runs on the first GPU if there is one, otherwise on the CPU.
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 8
SHAPES = {
    "validate_10m": (512, {
        "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "pythonlm_1b": (2048, {
        "vocab_size": 151808, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", choices=SHAPES, default="validate_10m", help="of this config, with standard attention"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the matrix products")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, shape = SHAPES[args.shape]
    config = LlamaConfig(**shape, rms_norm_eps=1e-6, use_cache=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(device)
    forward = torch.compile(model) if args.compile else model
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for step in range(args.steps):
        start = time.perf_counter()
        tokens = torch.randint(0, config.vocab_size, (BATCH, length)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the loss, and synchronize for the update
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        speed = BATCH * length / seconds
        print(
            f"completed step: {step}, seconds: {seconds:.3f}, Tokens/s/device: {speed:.3f}, loss: {value:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
