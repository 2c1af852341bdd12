"""tests/reference.py against the golden cases. Other tests trust it because it passes these."""

import jax
import numpy as np
import pytest

from tests import reference
from tests.golden.huggingface import GOLDEN, read_case
from tests.tiers import slow_but

CASES = (
    "loopcoder_l2",
    "loopcoder_l2_tied",
    "moeplt_l2_hs_nonorm_noshared",
    "moeplt_l2_q_norm",
    "pltcoder_l1_hs_norm",
    "pltcoder_l2_hs_norm",
    "pltcoder_l2_q_norm",
    "pltcoder_l3_hs_nonorm",
)
TOLERANCE = 1e-4  # absolute, float32: cases/README.md


def largest_difference(actual, expected):
    """The largest absolute difference of two arrays of the same shape."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    return np.max(np.abs(actual - expected))


def test_every_case_is_listed():
    assert sorted(path.parent.name for path in GOLDEN.glob("*/config.json")) == sorted(CASES)


OTHERS = "computes another model in NumPy"


@pytest.mark.parametrize("case", slow_but([CASES[0]], CASES, OTHERS))
def test_golden_case(case):
    settings, params, expected = read_case(GOLDEN / case)
    result = reference.forward(settings, params, expected["input_ids"])
    assert result["logits"].dtype == np.float32
    differences = {
        "logits": largest_difference(result["logits"], expected["logits"]),
        "hidden_loops": largest_difference(result["hidden_loops"], expected["hidden_loops"]),
        "raw_loops": largest_difference(result["raw_loops"], expected["hidden_loops_raw"]),
    }
    print(case, differences)
    assert all(difference < TOLERANCE for difference in differences.values()), differences


def shorter_window(settings, params, monkeypatch):
    settings.loop.window -= 1


def longer_window(settings, params, monkeypatch):
    settings.loop.window += 1


def flipped_gate(settings, params, monkeypatch):
    for name in ("gate_weight", "gate_bias"):
        params["layers"][name] = -params["layers"][name]


def missing_shift(settings, params, monkeypatch):
    monkeypatch.setattr(reference, "shift", lambda hidden, document: hidden)


def first_position_not_zero(settings, params, monkeypatch):
    def wrap_around(hidden, document):
        return jax.numpy.roll(hidden, 1, axis=1)

    monkeypatch.setattr(reference, "shift", wrap_around)


def missing_norm_between_loops(settings, params, monkeypatch):
    settings.loop.normalize_between_loops = False


def swapped_scales(settings, params, monkeypatch):
    loop = settings.loop
    loop.embedding_scale, loop.hidden_scale = loop.hidden_scale, loop.embedding_scale


@pytest.mark.parametrize(
    "mistake",
    [
        shorter_window,
        longer_window,
        flipped_gate,
        missing_shift,
        first_position_not_zero,
        missing_norm_between_loops,
        swapped_scales,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_mistake_moves_the_logits(monkeypatch, mistake):
    """Each plausible mistake moves the logits by a thousand times the tolerance of the cases."""
    settings, params, expected = read_case(GOLDEN / "pltcoder_l2_hs_norm")
    mistake(settings, params, monkeypatch)
    logits = reference.forward(settings, params, expected["input_ids"])["logits"]
    difference = largest_difference(logits, expected["logits"])
    print(mistake.__name__, difference)
    assert difference > 0.1


def test_renormalised_softmax_then_topk_is_topk_then_softmax():
    settings, params, expected = read_case(GOLDEN / "moeplt_l2_q_norm")
    settings.moe.routing, settings.moe.renormalize = "softmax_then_topk", True
    logits = reference.forward(settings, params, expected["input_ids"])["logits"]
    assert largest_difference(logits, expected["logits"]) < TOLERANCE


@pytest.mark.slow(reason="computes every scheme in NumPy")
@pytest.mark.parametrize("scheme", reference.SCHEMES)
def test_packed_documents_are_separate_documents(scheme):
    """Documents are runs of equal ids: where the id 7 returns, a third document begins."""
    settings, params, expected = read_case(GOLDEN / "pltcoder_l2_hs_norm")
    settings.loop.scheme = scheme
    settings.loop.count = 1 if scheme == "no_loop" else 2
    settings.loop.window = 4
    tokens = expected["input_ids"][:1, :20]
    segment_ids = np.array([[7] * 9 + [3] * 1 + [7] * 10])
    packed = reference.forward(settings, params, tokens, segment_ids)["logits"]
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        alone = reference.forward(settings, params, tokens[:, start:stop])["logits"]
        assert largest_difference(packed[:, start:stop], np.asarray(alone)) < TOLERANCE


@pytest.mark.parametrize(
    ("blended", "bias", "plain"),
    [
        ("plt", 100.0, "clp_kv_share"),
        ("plt", -100.0, "clp"),
        ("loop_kv_share_window", -100.0, "vanilla_loop"),
    ],
)
def test_saturated_gate_is_the_plain_scheme(blended, bias, plain):
    """No golden case has a plain scheme, but a gated scheme with a saturated gate equals one."""
    settings, params, expected = read_case(GOLDEN / "pltcoder_l3_hs_nonorm")
    tokens = expected["input_ids"][:1, :20]
    settings.loop.window = 20
    params["layers"]["gate_weight"] = 0 * params["layers"]["gate_weight"]
    params["layers"]["gate_bias"] = 0 * params["layers"]["gate_bias"] + bias
    settings.loop.scheme = blended
    logits = np.asarray(reference.forward(settings, params, tokens)["logits"])
    settings.loop.scheme = plain
    assert largest_difference(reference.forward(settings, params, tokens)["logits"], logits) < 1e-5
