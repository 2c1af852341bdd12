"""Values that the conversion commands offer. Nothing here imports JAX, so that parsing is quick."""

DTYPES = ("float32", "bfloat16")
"""The dtypes that weights can be converted to."""

SHARD_BYTES = 5 * 10**9
"""The default size limit of one safetensors file, in bytes."""

CLOSED_GATE_BIAS = 20.0
"""The gate bias that excludes the window for good: sigmoid(20) is 1 in float32, so the window's
weight is exactly 0, and the gate gets no gradient."""
