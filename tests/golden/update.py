"""Goldens: losses of the first 20 CPU steps, parameter counts and shardings. `python -m tests.golden.update` rewrites
them.

It prints the difference it makes; a change that should not alter numerics must print none. The test only compares.
"""

import difflib
import os
import pathlib
import re

GOLDEN = pathlib.Path(__file__).resolve().parent
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def losses() -> str:
    """Twenty steps of a small model on packed rows, float32, one device."""
    from tests import support

    config = support.small_config(learning_rate=3e-3)
    trainer = support.Trainer(config, support.mesh_of())
    lines = []
    for step in range(20):
        metrics = trainer(support.packed_batch(config, rows=8, seed=step))
        lines.append(
            f"{step + 1} loss {metrics['learning/loss']:.5f} grad_norm {metrics['learning/raw_grad_norm']:.4f}\n"
        )
    return "".join(lines)


def shardings() -> str:
    """Every config's parameters: counts, shapes, and where each lies on each mesh."""
    import jax

    from MaxText import flops, models, sharding
    from tests import support

    lines = []
    for path in sorted((support.ROOT / "configs").glob("*.yml")):
        config = support.shipped_config(path)
        model = models.abstract(config)
        lines.append(f"{path.stem}: {flops.count_parameters(model.params)}")
        for mesh in MESHES:
            lines.append(f"  mesh {mesh}")
            try:
                placed = sharding.named_sharding(support.mesh_of(*mesh), model.logical_axes, model.params)
            except ValueError as error:
                lines.append(f"    refused: {error}")
                continue
            for name, leaf, where in zip(
                models.parameter_paths(model.params),
                jax.tree.leaves(model.params),
                jax.tree.leaves(placed),
                strict=True,
            ):
                lines.append(f"    {name} {leaf.shape} {where.spec}")
    return "\n".join(lines) + "\n"


GOLDENS = {"losses.txt": losses, "shardings.txt": shardings}


def difference(name: str, tolerance: float) -> str:
    """What the program says now against what the file says; empty where they agree.

    Args:
        tolerance: decimal numbers this close are the same: processors of different makes round differently.
    """
    path = GOLDEN / name
    old = path.read_text().splitlines(keepends=True) if path.exists() else []
    new = GOLDENS[name]().splitlines(keepends=True)
    if len(old) == len(new) and all(_close(*lines, tolerance) for lines in zip(old, new, strict=True)):
        return ""
    return "".join(difflib.unified_diff(old, new, f"golden {name}", "now"))


def _close(old: str, new: str, tolerance: float) -> bool:
    decimal = re.compile(r"\d+\.\d+")
    numbers = zip(decimal.findall(old), decimal.findall(new), strict=False)
    return decimal.sub("", old) == decimal.sub("", new) and all(
        abs(float(a) - float(b)) <= tolerance for a, b in numbers
    )


def main() -> None:
    """Rewrites every golden and prints the differences."""
    for name, make in GOLDENS.items():
        print(difference(name, tolerance=0) or f"{name}: no difference")
        (GOLDEN / name).write_text(make())


if __name__ == "__main__":
    os.environ.update({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"})
    main()
