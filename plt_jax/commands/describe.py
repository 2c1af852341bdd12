"""Prints a model's costs: python -m plt_jax.describe CONFIG [--section.field value ...]."""

from plt_jax.commands.config_options import parse_run_config
from plt_jax.commands.parser import CommandParser
from plt_jax.config import RunConfig


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.describe",
        description="Print a model's total and active parameters, the bytes of keys and "
        "values, and the FLOPs of each loop.",
    )
    print(description(parse_run_config(parser)))


def description(config: RunConfig) -> str:
    """The model's shape and costs, as lines of text."""
    from plt_jax.model.costs import cache_bytes, count_parameters, describe_loops, flops_by_loop

    model, moe = config.model, config.model.moe
    count, cache = count_parameters(model), cache_bytes(model)
    kind = f"{moe.experts_per_token} of {moe.experts} experts" if moe.experts else "dense"
    if moe.dense_layers:
        kind += f" after {moe.dense_layers} dense layers"
    flops = flops_by_loop(model, config.sequence_length)
    lines = [
        f"{describe_loops(model)} of width {model.width}, {kind}",
        "",
        f"parameters             {count.total:>18,}",
        f"  active per token     {count.active:>18,}",
        f"  embeddings of these  {count.embeddings:>18,}",
        f"keys and values, {model.dtype}",
        f"  bytes per token      {cache.per_token:>18,}",
        f"  bytes of windows     {cache.windows:>18,}  per sequence",
        "",
        f"forward FLOPs per token, sequences of {config.sequence_length}; training takes 3 times",
        f"{'loop':>6}{'layers':>18}{'attention':>18}{'head':>18}{'total':>18}",
    ]
    rows = [(str(index + 1), *costs, costs.total) for index, costs in enumerate(flops)]
    rows.append(("all", *map(sum, zip(*flops, strict=True)), sum(one.total for one in flops)))
    lines += [f"{name:>6}" + "".join(f"{value:>18,}" for value in row) for name, *row in rows]
    return "\n".join(lines)
