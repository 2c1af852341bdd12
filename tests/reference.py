"""A plain reference implementation of the Parallel Loop Transformer family: the full forward pass.

It was written from the mathematics in docs/design.md alone, and shares no code with the package, so
that the two can disagree. It is meant for tiny shapes: it loops over loops and layers in Python,
uses explicit [T, T] masks, and runs every expert on every token.

Letters in shapes: B batch, T sequence, D width, N query heads, K key/value heads, H head width,
F feed-forward width, X experts, V vocabulary, L loops, J layers.
"""

import math

import jax
import jax.numpy as jnp

SHIFTED_SCHEMES = ("clp", "clp_kv_share", "plt")  # loops > 1 start from a E[i] + b H[i-1]
WINDOWED_SCHEMES = ("plt", "loop_kv_share_window")  # loops > 1 blend loop 1's K/V with a window
SCHEMES = ("no_loop", "vanilla_loop", "clp", "clp_kv_share", "plt", "loop_kv_share_window")


def forward(settings, params, tokens, segment_ids=None, positions=None, exits=None):
    """Tokens [B, T] -> logits [B, T, V] and what every loop produced.

    Args:
      settings: any object with the model's attributes (layers, heads, ..., loop.*, moe.*).
      params: nested dict of arrays; each entry of params["layers"] has a leading layer axis J. The
        leading dense layers of a mixture of experts are in params["dense_layers"] instead. Layers
        before and behind the loops are in "prelude" and "coda", or "dense_prelude", "dense_coda".
      tokens: integers [B, T].
      segment_ids: integers [B, T], or None if each row is one document. Documents are runs of equal
        consecutive ids; where an id returns later, another document begins.
      positions: integers [B, T], which only RoPE reads; None: they restart at 0 in each document.
      exits: integers [B, T], the last loop of each position, from 1; None: all run all loops. In
        later loops, others read there the keys and values of its last one. The logits are those
        behind each position's last loop; what is returned of later ones means nothing.

    Returns:
      dict: "logits" [B, T, V]; "hidden_loops", a list of L arrays [B, T, D], what reads each loop
      (of the last loop the head); "raw_loops", a list of L arrays [B, T, D], the last looped
      layer's output before any norm; "readouts", a list of L arrays [B, T, D], what the head reads
      if the model stops behind that loop; "gate_means", a list with one entry for each loop and
      looped layer, the mean gate [B] over positions and heads, or None where there is no gate.
    """
    loop = settings.loop
    if loop.scheme not in SCHEMES or (loop.scheme == "no_loop" and loop.count != 1):
        raise ValueError(f"no such model: scheme {loop.scheme!r} with {loop.count} loops")
    with jax.default_matmul_precision("highest"):
        params = jax.tree.map(jnp.asarray, params)
        tokens = jnp.asarray(tokens)
        document = document_numbers(tokens, segment_ids)
        if positions is None:
            positions = positions_in_document(document)
        causal, windowed = masks(document, loop.window)
        rotation = rope_rotation(settings, jnp.asarray(positions))

        def once(x, layers):
            """The layers outside of the loops, each once."""
            for j in layers:
                layer = layer_arrays(params, j)
                if "router_bias" in layer:
                    layer["router_bias"] = layer["router_bias"][0]
                x, _, _ = decoder_layer(settings, layer, x, None, causal, windowed, rotation)
            return x

        last = settings.layers - 1 if loop.last_layer is None else loop.last_layer
        looped = range(loop.first_layer, last + 1)
        coda = range(last + 1, settings.layers)
        between = params.get("loop_norm") if len(coda) else params["final_norm"]
        # Loop 1 reads the embedding, unscaled, or what the prelude makes of it.
        embedded = once(params["embedding"][tokens], range(loop.first_layer))
        x = embedded
        first_kv = [None] * settings.layers  # per layer, (k, v) of loop 1
        hidden_loops, raw_loops, readouts, gate_means = [], [], [], []
        last_kv = {}  # per layer, (k, v) of the loop before
        for index in range(loop.count):
            if index > 0 and loop.scheme in SHIFTED_SCHEMES:
                carried = shift(hidden_loops[index - 1], document)
                scale = params.get("hidden_scale", loop.hidden_scale)  # a number, or [D]
                x = loop.embedding_scale * embedded + scale * carried
            elif index > 0:
                x = hidden_loops[index - 1]
            for j in looped:
                layer = layer_arrays(params, j)
                if "router_bias" in layer:
                    layer["router_bias"] = layer["router_bias"][index]
                ended = None
                if exits is not None and index > 0:
                    ended = (jnp.asarray(exits)[:, :, None, None] <= index, last_kv[j])
                x, own_kv, gates = decoder_layer(
                    settings, layer, x, first_kv[j], causal, windowed, rotation, ended
                )
                last_kv[j] = own_kv
                gate_means.append(None if gates is None else jnp.mean(gates, axis=(1, 2)))
                if index == 0:
                    first_kv[j] = own_kv
            raw_loops.append(x)
            readouts.append(rms_norm(once(x, coda), params["final_norm"], settings.norm_epsilon))
            if loop.normalize_between_loops and index < loop.count - 1:
                x = rms_norm(x, between, settings.norm_epsilon)
            hidden_loops.append(x)
        hidden_loops[-1] = readouts[-1]
        if exits is not None:
            last = jnp.asarray(exits)[None, :, :, None] - 1
            ended = jnp.take_along_axis(jnp.stack(raw_loops), last, axis=0)[0]
            read = once(ended, coda)
            hidden_loops[-1] = rms_norm(read, params["final_norm"], settings.norm_epsilon)

        head = params["embedding"].T if settings.tied_embeddings else params["head"]
        logits = hidden_loops[-1] @ head
    return {
        "logits": logits,
        "hidden_loops": hidden_loops,
        "raw_loops": raw_loops,
        "readouts": readouts,
        "gate_means": gate_means,
    }


def layer_arrays(params, j):
    """The arrays of layer j: the stacks, those that there are, one behind the other."""
    for part in ("prelude", "layers", "coda"):
        for name in ("dense_" + part, part):
            stack = params.get(name, {"q": ()})
            if j < len(stack["q"]):
                return {key: array[j] for key, array in stack.items()}
            j -= len(stack["q"])
    raise IndexError(j)


# ---- documents: numbering, positions, masks, shift ----


def document_numbers(tokens, segment_ids):
    """The number [B, T] of each position's document: 0, 1, 2, ... along a row."""
    if segment_ids is None:
        return jnp.zeros(tokens.shape, jnp.int32)
    segment_ids = jnp.asarray(segment_ids)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(starts, ((0, 0), (1, 0))), axis=1)


def positions_in_document(document):
    """The position [B, T] of each token in its document, from 0."""
    return jnp.sum(masks(document, 1)[0], axis=-1) - 1


def masks(document, window):
    """Two masks [B, T, T] of the keys [.., .., s] that a query [.., t, ..] sees.

    The first mask is causal inside a document. The second also keeps only the last `window` keys,
    the query's own included. `document` holds the document numbers [B, T].
    """
    t = jnp.arange(document.shape[1])
    distance = t[:, None] - t[None, :]  # [T, T], how far the key lies behind the query
    causal = jnp.stack([(row[:, None] == row[None, :]) & (distance >= 0) for row in document])
    return causal, causal & (distance < window)


def shift(hidden, document):
    """[B, T, D] -> [B, T, D]: position i gets the state of i - 1; a document's first gets zeros."""
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    continues = jnp.pad(document[:, 1:] == document[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(continues[:, :, None], before, 0.0)


# ---- one decoder layer ----


def decoder_layer(settings, layer, x, first_kv, causal, windowed, rotation, ended=None):
    """Layer input [B, T, D] -> output [B, T, D], own (k, v), each [B, T, K, H], and gates
    [B, T, N], or None if there are none.

    first_kv is None in loop 1, and this layer's (k, v) of loop 1 in later loops. ended is None, or
    bool [B, T, 1, 1] of the positions whose loops have ended, and the (k, v) that they keep.
    """
    epsilon, scheme = settings.norm_epsilon, settings.loop.scheme

    normed = rms_norm(x, layer["attention_norm"], epsilon) if settings.input_norms else x
    q = jnp.einsum("btd,dnh->btnh", normed, layer["q"])
    k = jnp.einsum("btd,dkh->btkh", normed, layer["k"])
    v = jnp.einsum("btd,dkh->btkh", normed, layer["v"])
    if settings.qkv_bias:
        q, k, v = q + layer["q_bias"], k + layer["k_bias"], v + layer["v_bias"]
    if settings.qk_norm and settings.qk_norm_over == "all_heads":
        q, k = (
            rms_norm(a.reshape(*a.shape[:2], -1), layer[name].reshape(-1), epsilon).reshape(a.shape)
            for a, name in ((q, "q_norm"), (k, "k_norm"))
        )
    elif settings.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], epsilon), rms_norm(k, layer["k_norm"], epsilon)
    q, k = apply_rope(q, rotation), apply_rope(k, rotation)
    if ended is not None:
        over, (kept_k, kept_v) = ended
        k, v = jnp.where(over, kept_k, k), jnp.where(over, kept_v, v)

    g = None
    if first_kv is None or scheme in ("vanilla_loop", "clp"):
        attended = attention(q, k, v, causal)
    elif scheme == "clp_kv_share":
        attended = attention(q, *first_kv, causal)
    else:  # WINDOWED_SCHEMES
        g = gate(settings, layer, q, x)
        near, far = attention(q, k, v, windowed), attention(q, *first_kv, causal)
        attended = g[..., None] * far + (1 - g[..., None]) * near
    update = jnp.einsum("btnh,nhd->btd", attended, layer["o"])
    if settings.output_bias:
        update = update + layer["o_bias"]
    if settings.attention_output_norm:
        update = rms_norm(update, layer["attention_output_norm"], epsilon)
    x = x + settings.residual_scale * update

    normed = rms_norm(x, layer["ffn_norm"], epsilon) if settings.input_norms else x
    if "router" in layer:
        update = mixture_of_experts(settings.moe, layer, normed)
    else:
        update = swiglu(normed, layer["ffn_gate"], layer["ffn_up"], layer["ffn_down"])
    if settings.ffn_output_norm:
        update = rms_norm(update, layer["ffn_output_norm"], epsilon)
    return x + settings.residual_scale * update, (k, v), g


def attention(q, k, v, mask):
    """Queries [B, T, N, H], keys and values [B, T, K, H], mask [B, T, T] -> [B, T, N, H]."""
    queries_per_key = q.shape[2] // k.shape[2]  # query head n reads key/value head n // that
    k, v = jnp.repeat(k, queries_per_key, axis=2), jnp.repeat(v, queries_per_key, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def gate(settings, layer, q, x):
    """The global branch's weight [B, T, N], from the rotated q [B, T, N, H] or layer input x."""
    if settings.loop.gate_input == "query":
        score = jnp.einsum("btnh,nh->btn", q, layer["gate_weight"])
    else:
        normed = rms_norm(x, layer["gate_norm"], settings.norm_epsilon)
        score = jnp.einsum("btd,dn->btn", normed, layer["gate_weight"])
    return jax.nn.sigmoid(score + layer["gate_bias"])


def mixture_of_experts(moe, layer, x):
    """[B, T, D] -> [B, T, D]: the chosen experts' weighted sum, plus the shared expert if any."""
    scores = x @ layer["router"]  # [B, T, X]
    _, chosen = jax.lax.top_k(scores + layer.get("router_bias", 0.0), moe.experts_per_token)
    if moe.routing == "softmax_then_topk":
        weights = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), chosen, axis=-1)
        if moe.renormalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    elif moe.routing == "topk_then_softmax":
        weights = jax.nn.softmax(jnp.take_along_axis(scores, chosen, axis=-1), axis=-1)
    else:
        raise ValueError(f"no such routing: {moe.routing!r}")

    output = jnp.zeros_like(x)
    for e in range(moe.experts):
        weight = jnp.sum(jnp.where(chosen == e, weights, 0.0), axis=-1, keepdims=True)  # [B, T, 1]
        expert = (layer[name][e] for name in ("expert_gate", "expert_up", "expert_down"))
        output = output + weight * swiglu(x, *expert)
    if moe.shared_width:
        shared = swiglu(x, layer["shared_gate_proj"], layer["shared_up"], layer["shared_down"])
        if moe.shared_gate:
            shared = jax.nn.sigmoid(x @ layer["shared_router"]) * shared
        output = output + shared
    return output


# ---- small parts ----


def swiglu(x, gate_DF, up_DF, down_FD):
    """[B, T, D] -> [B, T, D]."""
    return (jax.nn.silu(x @ gate_DF) * (x @ up_DF)) @ down_FD


def rms_norm(x, scale, epsilon):
    """Normalizes the last axis to root mean square 1, then multiplies it by scale [last axis]."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def rope_rotation(settings, positions):
    """(cos, sin), each float32 [B, T, 1, H], for the rotate-half convention."""
    head_width, theta = settings.head_width, settings.rope_theta
    exponents = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    frequencies = 1.0 / jnp.float32(theta) ** exponents  # [H/2]
    scaling = settings.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        frequencies = jnp.array([llama3_frequency(scaling, float(f)) for f in frequencies])
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def llama3_frequency(scaling, frequency):
    """One frequency after Llama 3.1's RoPE scaling, case by case."""
    wavelength = 2 * math.pi / frequency
    longest_kept = scaling.original_length / scaling.high_frequency_factor
    shortest_divided = scaling.original_length / scaling.low_frequency_factor
    if wavelength < longest_kept:
        return frequency
    if wavelength > shortest_divided:
        return frequency / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def apply_rope(x, rotation):
    """Rotates [B, T, N or K, H]; feature h is paired with feature h + H/2."""
    cos, sin = (part.astype(x.dtype) for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
