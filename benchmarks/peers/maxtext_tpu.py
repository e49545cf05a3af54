"""MaxText's own train_compile, and the program the TPU compiler made of it as text: for `benchmarks/account.py`.

Runs in MaxText's environment: $PEERS/maxtext/bin/python benchmarks/peers/maxtext_tpu.py PROGRAM.hlo its arguments
"""

import pathlib
import runpy
import sys

import jax

_compile = jax.stages.Lowered.compile


def compile_and_write(lowered, *arguments, **keywords):
    """The executable; of the last one that is compiled the file has the program."""
    compiled = _compile(lowered, *arguments, **keywords)
    path.write_text(compiled.as_text())
    print(f"peak: {compiled.memory_analysis().peak_memory_in_bytes} bytes", flush=True)
    return compiled


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1])
    sys.argv[:2] = ["train_compile"]
    jax.stages.Lowered.compile = compile_and_write
    runpy.run_module("maxtext.trainers.pre_train.train_compile", run_name="__main__", alter_sys=True)
