"""What collectives programs of known make have on eight host devices, as JSON.

`python -m tests.compile.cpu_worker`, in a process of its own: a process's number of devices is
fixed when JAX starts.
"""

import json
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from plt_jax.compile.collectives import axes_between, read_collectives
from plt_jax.compile.hlo import parse_program

P = PartitionSpec
SIZES = {"data": 2, "fsdp": 4}


def main() -> None:
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)

    def found(function: Callable, *arguments: jax.ShapeDtypeStruct) -> list:
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return [
            [one.kind, axes_between(one.group, SIZES), one.count, one.bytes]
            for one in read_collectives(parse_program(text), mesh.size)
        ]

    def array(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    mapped = partial(jax.shard_map, mesh=mesh, check_vma=False)

    def gathered_layers(x, weights):
        def layer(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, weights)[0]

    exchange = mapped(
        lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
        **{"in_specs": P(("data", "fsdp")), "out_specs": P(("data", "fsdp"))},
    )
    summed = mapped(lambda x: jax.lax.psum(x, "data"), in_specs=P("data"), out_specs=P())
    turned = mapped(
        lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        **{"in_specs": P("fsdp"), "out_specs": P("fsdp")},
    )
    cases = {
        "gathers in a loop": found(
            gathered_layers, array((64, 32), P("data")), array((6, 32, 32), P(None, "fsdp"))
        ),
        "all-to-all": found(exchange, array((64, 8), P(("data", "fsdp")))),
        "sum": found(summed, array((16, 8), P("data"))),
        "permutation": found(turned, array((16, 8), P("fsdp"))),
    }
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
