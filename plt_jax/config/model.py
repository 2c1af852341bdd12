"""The sections of the model: the looping scheme, the network's shape, mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
from pydantic import Field

from plt_jax.config.types import (
    LARGE,
    MayChange,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
    divisors,
)

SchemeName = Literal[
    "no_loop", "vanilla_loop", "clp", "clp_kv_share", "plt", "loop_kv_share_window"
]


class Scheme(NamedTuple):
    """The properties of a looping scheme (a row of Table 2 in the PLT paper)."""

    shifted: bool
    """Whether loops > 1 read a·E[i] + b·H[i-1] (cross-loop parallelism) instead of H[i]."""
    later_attention: Literal["own", "shared", "gated"]
    """What loops > 1 attend to: their own K/V, loop 1's K/V, or G-SWA over both."""


SCHEMES: dict[str, Scheme] = {
    "no_loop": Scheme(shifted=False, later_attention="own"),
    "vanilla_loop": Scheme(shifted=False, later_attention="own"),
    "clp": Scheme(shifted=True, later_attention="own"),
    "clp_kv_share": Scheme(shifted=True, later_attention="shared"),
    "plt": Scheme(shifted=True, later_attention="gated"),
    "loop_kv_share_window": Scheme(shifted=False, later_attention="gated"),
}


class LoopConfig(Section):
    """The looping scheme: how the layer stack is applied several times."""

    scheme: SchemeName = "plt"
    """Looping scheme, a row of the README's table."""
    count: PositiveInt = 2
    """Number of loops L; the default is 2, and 1 for no_loop."""
    window: PositiveInt = 64
    """Number of keys in the window of G-SWA, the current token included (plt,
    loop_kv_share_window)."""
    gate_input: Literal["query", "hidden"] = "query"
    """Input of the G-SWA gate: the rotated query (PLT, Algorithm 3) or the RMS-normed layer input
    (LoopCoder-v2)."""
    embedding_scale: Number = 1.0
    """Scale a of the embeddings in the input of loops > 1 (shifted schemes)."""
    hidden_scale: Number = 1.0
    """Scale b of the previous loop's shifted output in the input of loops > 1 (shifted schemes)."""
    learned_hidden_scale: bool = False
    """Make b a parameter, one number for each channel, which starts at hidden_scale."""
    gate_bias: Number = 0.0
    """Initial bias of G-SWA's gates: at 0 loop 1's keys and the window begin with equal weight, at
    4 the window with 2 %."""
    normalize_between_loops: bool = True
    """Apply a norm to each loop's output before the next loop reads it: the final norm, or, if
    layers follow the loops (last_layer), one of its own."""
    first_layer: NonNegativeInt = 0
    """The first layer that loops, counted from 0. The layers before it run once (the prelude), and
    later loops read their output where they would read the embeddings."""
    last_layer: NonNegativeInt | None = None
    """The last layer that loops, counted from 0; null for the model's last. The layers behind it
    run once (the coda), on the last loop's output."""
    exit_gate: bool = False
    """A linear unit on each loop's output, whose sigmoid is the probability that a token needs no
    further loop (Ouro). All loops run in any case; evaluation can end them by the gate."""
    exit_threshold: MayChange[Annotated[float, Field(gt=0.0, le=1.0)]] = 1.0
    """The probability to have exited at which evaluation by the gate ends a token's loops; at 1 all
    of them run, but where the gate is certain."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_count(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("scheme") == "no_loop":
            return {"count": 1, **values}
        return values

    @pydantic.model_validator(mode="after")
    def _check(self) -> LoopConfig:
        if self.scheme == "no_loop" and self.count != 1:
            raise ValueError(
                f"loop.count is {self.count}, but the scheme no_loop runs the stack once; "
                "set count to 1 or choose a looped scheme"
            )
        if self.scheme == "no_loop" and (self.first_layer or self.last_layer is not None):
            raise ValueError(
                "loop.first_layer and loop.last_layer choose the layers that loop, but the scheme "
                "no_loop has no loops; leave them out or choose a looped scheme"
            )
        if self.scheme == "no_loop" and self.exit_gate:
            raise ValueError(
                "loop.exit_gate ends loops, but the scheme no_loop has none; set it to false"
            )
        if self.last_layer is not None and self.last_layer < self.first_layer:
            raise ValueError(
                f"loop.last_layer {self.last_layer} is before loop.first_layer {self.first_layer}, "
                "so no layer loops; both count from 0"
            )
        return self

    @property
    def shifted(self) -> bool:
        """Whether loops > 1 read the shifted previous loop, so that decoding takes one pass."""
        return SCHEMES[self.scheme].shifted

    @property
    def later_attention(self) -> Literal["own", "shared", "gated"]:
        """What loops > 1 attend to."""
        return SCHEMES[self.scheme].later_attention


class RopeScalingConfig(Section):
    """RoPE scaling: stretches RoPE's frequencies for contexts longer than those of an earlier
    training."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """none: no scaling; linear: all frequencies are divided by `factor`; llama3, as in Llama 3.1:
    only frequencies whose wavelength is long relative to `original_length` are."""
    factor: Annotated[float, Field(ge=1.0, le=LARGE)] = 1.0
    """Divisor of the scaled frequencies."""
    low_frequency_factor: PositiveFloat = 1.0
    """Frequencies with wavelengths above original_length / low_frequency_factor are divided by
    `factor` (llama3)."""
    high_frequency_factor: PositiveFloat = 4.0
    """Frequencies with wavelengths below original_length / high_frequency_factor are not scaled;
    those between the two limits are interpolated (llama3)."""
    original_length: PositiveInt = 8192
    """Context of the earlier training, in tokens (llama3)."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> RopeScalingConfig:
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor {self.low_frequency_factor} must be below "
                f"high_frequency_factor {self.high_frequency_factor}"
            )
        return self


class MoEConfig(Section):
    """Mixture-of-experts feed-forward layers."""

    experts: NonNegativeInt = 0
    """Number of experts X; 0 for dense layers."""
    dense_layers: NonNegativeInt = 0
    """Number of leading layers that are dense, with hidden width model.ffn_width."""
    experts_per_token: PositiveInt = 2
    """Number of experts k that each token is routed to."""
    expert_width: PositiveInt = 512
    """Hidden width of one expert."""
    routing: Literal["softmax_then_topk", "topk_then_softmax"] = "softmax_then_topk"
    """Whether the experts' weights are a softmax over all experts (softmax_then_topk) or over the
    chosen ones (topk_then_softmax)."""
    renormalize: bool = True
    """Divide the chosen weights by their sum (softmax_then_topk)."""
    shared_width: NonNegativeInt = 0
    """Hidden width of a shared expert, which every token is routed to as well; 0 for none."""
    shared_gate: bool = False
    """Scale the shared expert's output by a sigmoid gate per token."""
    load_balance_loss: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss."""
    router_z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-normaliser of the router's softmax."""
    bias_update_rate: NonNegativeFloat | None = None
    """Step size of loss-free load balancing. A bias per loop and expert is added to the router's
    logits when experts are chosen, but not when they are weighted. After every step the bias of an
    expert grows by this amount if its load is below an even load, and shrinks by it if its load is
    above. Null: there are no biases."""
    grouped_product: MayChange[Literal["auto", "ragged_dot", "blocks", "megablox", "tokamax"]] = (
        "auto"
    )
    """Kernel of the experts' matrix products: XLA's ragged_dot, a loop over blocks of rows, JAX's
    Pallas kernel for TPUs (megablox), or that of tokamax (an optional package) for GPUs. auto is
    the last of these that the devices can run."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is above experts {self.experts}; "
                "lower the one or raise the other"
            )
        if self.shared_gate and not self.shared_width:
            raise ValueError("shared_gate needs a shared expert; set shared_width, or drop it")
        for name in ("dense_layers", "bias_update_rate"):
            if getattr(self, name) not in (0, None) and not self.experts:
                raise ValueError(f"{name} is {getattr(self, name)} in a model without experts")
        return self


Remat = Literal["none", "dots_and_attention", "dots", "attention", "full"]


Part = Literal["prelude", "core", "coda"]
"""The layers before the loops, those that loop, and those behind the loops."""
PARTS: tuple[Part, ...] = get_args(Part)


class ModelConfig(Section):
    """Shape and arithmetic of the network."""

    vocab_size: PositiveInt = 32768
    """Vocabulary size V; also the vocabulary size that a new tokenizer is trained to."""
    max_length: PositiveInt = 2048
    """Longest context in tokens: the length of a training example, unless data.sequence_length is
    less, and the longest prompt with its continuation in generation."""
    width: PositiveInt = 768
    """Model width D."""
    layers: PositiveInt = 12
    """Number of decoder layers J; each loop runs all of them, or those that loop.first_layer and
    loop.last_layer choose."""
    heads: PositiveInt = 12
    """Number of query heads N."""
    kv_heads: PositiveInt = 4
    """Number of key/value heads K; it must divide heads."""
    head_width: PositiveInt = 64
    """Width H of one head, an even number; default: width / heads."""
    ffn_width: PositiveInt = 2048
    """Hidden width F of the SwiGLU feed-forward layer, when dense."""
    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary position embedding's frequencies."""
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    """Scaling of those frequencies."""
    norm_epsilon: Annotated[float, Field(ge=1e-12, le=LARGE)] = 1e-5
    """Added to the mean square in every RMSNorm. (Below its lower limit, gradients at hidden states
    of zero are not finite.)"""
    tied_embeddings: bool = False
    """Use the transposed embedding as the output head."""
    input_norms: bool = True
    """RMSNorm on the inputs of attention and of the feed-forward layer (pre-norm)."""
    attention_output_norm: bool = False
    """RMSNorm on attention's output before the residual sum."""
    ffn_output_norm: bool = False
    """RMSNorm on the feed-forward output before the residual sum. With both of the output norms a
    layer is a sandwich, and without input norms it is post-norm, as in OLMo 2."""
    qk_norm: bool = False
    """RMSNorm over queries and keys before RoPE."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """What qk_norm's root mean square is taken over: each head alone, or all heads of a position
    together, as in OLMo 2."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """A bias on attention's output projection."""
    residual_scale: PositiveFloat = 1.0
    """Factor of attention's and the feed-forward layer's outputs in the residual sums. With 1 over
    the layers times the square root of the loops, good learning rates are the same for any number
    of loops (arXiv 2606.18524)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, norms, softmax and logits stay float32."""
    attention: MayChange[Literal["auto", "xla", "cudnn", "splash"]] = "auto"
    """Kernel of attention over whole sequences: plain XLA, cuDNN on NVIDIA GPUs, or splash on TPUs.
    auto is the fastest that the devices, the dtype and the head width allow."""
    decode_attention: MayChange[Literal["auto", "xla", "mosaic"]] = "auto"
    """Kernel of attention in the decode step: XLA's, or one Mosaic GPU kernel of this package for
    Hopper GPUs (needs jax 0.12, bfloat16, and loops in one pass). auto is xla until a card has been
    measured."""
    remat: MayChange[Remat] = "none"
    """What the backward pass recomputes, to save memory: nothing; all of a layer but its products
    with weights and attention (dots_and_attention), its products with weights (dots) or its
    attention (attention); or all of a layer (full). Products of experts are always recomputed but
    with none. `python -m plt_jax.compile --compare_remat` prints the memory of each."""
    layer_unroll: MayChange[PositiveInt] = 1
    """Number of layers unrolled per step of the scan over layers; the number of layers unrolls the
    whole scan. Unrolled layers can lose most of the memory that remat saves."""
    loop: LoopConfig = LoopConfig()
    """The looping scheme."""
    moe: MoEConfig = MoEConfig()
    """Mixture of experts instead of dense feed-forward layers."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_head_width(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("head_width") is not None:
            return values
        width = values.get("width", cls.model_fields["width"].default)
        heads = values.get("heads", cls.model_fields["heads"].default)
        try:
            width, heads = int(width), int(heads)
        except (TypeError, ValueError, OverflowError):
            return values  # the field's own type error says it better
        if width > 0 and heads > 0 and width % heads:
            raise ValueError(
                f"width {width} is not divisible by heads {heads}; change one, or set head_width"
            )
        return {**values, "head_width": width // max(heads, 1)}

    @pydantic.model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}; "
                f"kv_heads must be one of {divisors(self.heads)}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width {self.head_width} is odd; RoPE needs an even number (by default "
                "it is width / heads)"
            )
        if self.moe.dense_layers >= self.layers:
            raise ValueError(
                f"moe.dense_layers {self.moe.dense_layers} leaves none of the {self.layers} layers "
                "to the experts; lower it"
            )
        if not self.input_norms and not (self.attention_output_norm and self.ffn_output_norm):
            raise ValueError(
                "input_norms is false, so attention_output_norm and ffn_output_norm must both be "
                "true; else the layers would add states that no norm has seen"
            )
        loop = self.loop
        if loop.learned_hidden_scale and not loop.shifted:
            raise ValueError(
                f"loop.learned_hidden_scale is true, but the scheme {loop.scheme} has no "
                "hidden_scale; set it to false"
            )
        if max(loop.first_layer, loop.last_layer or 0) >= self.layers:
            raise ValueError(
                f"loop.first_layer {loop.first_layer} and loop.last_layer {loop.last_layer} must "
                f"be layers of the model, 0 to {self.layers - 1}"
            )
        if self.attention == "cudnn" and self.cudnn_obstacle is not None:
            raise ValueError(f"attention is cudnn, but {self.cudnn_obstacle}, or attention to auto")
        return self

    @property
    def looped_layers(self) -> range:
        """The layers that loop, counted from 0; all in a model without loops."""
        last = self.loop.last_layer
        return range(self.loop.first_layer, self.layers if last is None else last + 1)

    def layers_in(self, part: Part) -> range:
        """The layers of a part, counted from 0; none if the model has no such part."""
        looped = self.looped_layers
        prelude, coda = range(looped.start), range(looped.stop, self.layers)
        return {"prelude": prelude, "core": looped, "coda": coda}[part]

    @property
    def has_coda(self) -> bool:
        """Whether layers follow the loops."""
        return bool(self.layers_in("coda"))

    def of_part(self, part: Part) -> ModelConfig:
        """The model as the layers of a part see it: those outside of the loops do not loop."""
        if part == "core":
            return self
        return self.model_copy(update={"loop": LoopConfig(scheme="no_loop")})

    @property
    def first_routed_layer(self) -> int:
        """The first looped layer with experts, counted from 0, if any has experts."""
        return max(self.looped_layers.start, self.moe.dense_layers)

    @property
    def cudnn_obstacle(self) -> str | None:
        """What keeps cuDNN's attention from taking such a model, and the fix; None if it takes it.

        The conditions are those of `jax.nn.dot_product_attention`, with the head width that every
        GPU's kernels reach: up to 256 they depend on its generation.
        """
        if self.dtype != "bfloat16":
            return f"dtype is {self.dtype}; set dtype to bfloat16"
        if self.head_width % 8 or self.head_width > 128:
            return f"head_width is {self.head_width}; set head_width to a multiple of 8 up to 128"
        return None
