"""Types of the configuration's fields: numbers that devices can hold, text and paths; and the base
class of its sections."""

from __future__ import annotations

import os
from typing import Annotated, TypeVar

import pydantic
from pydantic import AfterValidator, Field

from plt_jax.buckets.address import refuse_other_schemes

# Devices compute with numbers of 32 bits. Other numbers are refused; they would become 0, infinity,
# or an error in the middle of a run.
LARGE, SMALL, LARGE_INT = 3.4e38, 1.2e-38, 2**31
Number = Annotated[float, Field(ge=-LARGE, le=LARGE)]
PositiveFloat = Annotated[float, Field(ge=SMALL, le=LARGE)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGE)]
PositiveInt = Annotated[int, Field(gt=0, lt=LARGE_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=LARGE_INT)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
AxisSize = Annotated[int, Field(ge=-1, lt=LARGE_INT)]
Value = TypeVar("Value")
MAY_CHANGE = "may change"
MayChange = Annotated[Value, MAY_CHANGE]
"""The type of a field, or of a whole section, that may have another value when a run is resumed, as
in `steps: MayChange[PositiveInt] = 1000`.

No step's result depends on such a field, but for rounding. The exceptions are `training.steps`,
which moves the end of the schedules (to train longer is a fair wish), and fields that
name a file whose contents are compared instead (tokenizer.path, data.sources.path).
"""
LONGEST_NAME = 255
"""Most bytes of a file's or folder's name."""


def _is_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} is not UTF-8; write it in UTF-8, or choose another text"
        ) from error
    return text


def _is_path(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"{path!r} holds a NUL character, which no path may hold; correct it")
    for name in path.split("/"):
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise ValueError(
                f"the name {name[:20]}... in it has more than {LONGEST_NAME} bytes; shorten it"
            )
    return path


def _is_on_a_disk(path: str) -> str:
    if "://" in path:
        raise ValueError(
            f"{path} is not a path of a file system; mount what it names, and give the mounted path"
        )
    return path


def _is_on_a_disk_or_in_a_bucket(path: str) -> str:
    refuse_other_schemes(path)
    return path


Text = Annotated[str, AfterValidator(_is_text)]
_AnyPathText = Annotated[Text, AfterValidator(_is_path)]
PathText = Annotated[_AnyPathText, AfterValidator(_is_on_a_disk)]
BucketOrPathText = Annotated[_AnyPathText, AfterValidator(_is_on_a_disk_or_in_a_bucket)]


class Section(pydantic.BaseModel):
    """Base of all sections: immutable, hashable, and strict about unknown keys."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def divisors(number: int) -> list[int]:
    """The positive divisors of a positive number, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
