"""The page of a model on the Hub."""

import yaml

from plt_jax.interop.model_card import make_model_card


def test_a_card_says_what_the_model_is_and_how_it_is_loaded():
    card = make_model_card("lab/loop@v2", "iquestpltcoder", "plt, 2 loops", 1234567, 2048)
    _, metadata, text = card.split("---\n")
    assert yaml.safe_load(metadata) == {
        "library_name": "plt_jax",
        "pipeline_tag": "text-generation",
        "tags": ["iquestpltcoder"],
    }
    assert text.startswith("\n# loop\n")
    for part in ("plt, 2 loops", "1,234,567", "2,048 tokens", "import lab/loop@v2 runs/loop"):
        assert part in text
