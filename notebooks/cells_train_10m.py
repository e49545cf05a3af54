# %% [markdown]
# # A Python code model, from raw text to generated code
#
# Validates a whole training pipeline on a small model before hours are spent on a large one. Made for Kaggle (TPU
# v5e-8) and Colab (TPU v5e-1 or v6e-1): choose the TPU as the accelerator, then run all cells.
#
# Without a TPU the notebook shows itself with an even smaller model, in a few minutes; the outputs below are of such
# a run, on a CPU and without the Hugging Face hub. This file is made by `notebooks/build.py` from `train_10m.py`.

# %%
import os

if {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & os.environ.keys():
    # Before JAX is first imported: what is imported stays as it is until the session is restarted.
    get_ipython().run_line_magic("pip", "install -q jax[tpu] flax optax transformers datasets tqdm")

# %% [markdown]
# The next cell is the whole of `train_10m.py`: configuration, model, training, data, generation. It only defines.

# %% include train_10m.py

# %% [markdown]
# Every part is tried once. A check that fails says what failed, the cause and the cure.

# %%
on_tpu = jax.default_backend() == "tpu"
small = {"hidden_dim": 64, "num_layers": 2, "head_dim": 16, "ffn_dim": 256, "max_seq_len": 128, "warmup_steps": 20}
config = Config() if on_tpu else Config(**small, batch_size_per_device=2)
validate_pipeline(config)

# %% [markdown]
# An untrained model guesses: its loss is ln(49,152) = 10.8. Then it learns which tokens are frequent, and so on.

# %%
state = train(config, num_steps=1000 if on_tpu else 200)

# %%
print(generate(state, tokenizer, "def fibonacci(n):"))

# %% [markdown]
# The checkpoint of the end can be loaded again and generates the same text. It lies in the folder `checkpoint_10m`,
# which on Colab and Kaggle is gone with the session: download it, or copy it to where files are kept.

# %%
loaded_state, loaded_tokenizer = load_checkpoint()
print(generate(loaded_state, loaded_tokenizer, "def fibonacci(n):"))
