"""The page of a model on the Hugging Face Hub."""

from __future__ import annotations

_CARD = """\
---
library_name: plt_jax
pipeline_tag: text-generation
tags:
- {model_type}
---

# {title}

* Model type: `{model_type}`
* Loops: {loops}
* Parameters: {parameters:,}
* Longest context: {max_length:,} tokens

plt_jax has written this page. To generate text with plt_jax:

```
python -m plt_jax.convert import {name} runs/{title}
python -m plt_jax.generate runs/{title} --prompt "Once"
```
"""


def make_model_card(
    name: str, model_type: str, loops: str, parameters: int, max_length: int
) -> str:
    """A model card in Markdown, with the metadata that the Hub reads.

    Args:
      name: what imports the model, ORG/NAME or ORG/NAME@REVISION.
      model_type: the checkpoint's.
      loops: its looping scheme, in one line.
      parameters: their number.
      max_length: the longest context in tokens.
    """
    title = name.split("@")[0].split("/")[1]
    return _CARD.format(
        name=name,
        title=title,
        model_type=model_type,
        loops=loops,
        parameters=parameters,
        max_length=max_length,
    )
