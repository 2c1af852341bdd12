"""Values that commands offer for decoding. Nothing here imports JAX, so that parsing is quick."""

DTYPES = ("float32", "bfloat16", "int8")
"""The dtypes in which a cache can hold keys and values."""

WEIGHTS = ("int8",)
"""The dtypes, beside the compute dtype, in which decoding can read weights."""
