"""The targets of decoding on a GPU, against figures that are known."""

from benchmarks.decode_targets import lines


def test_each_target_is_met_or_missed():
    def row(label, ratio):
        return {"label": label, "ratio_to_no_loop": ratio, "gb_per_second": 70}

    rows = [row("no_loop", 1.0), row("plt-2", 1.04), row("plt-3", 1.05), row("vanilla_loop-2", 2.0)]
    cells = [
        {"batch": batch, "context": context, "rows": rows}
        for batch, context in ((1, 1024), (64, 1024), (16, 8192))
    ]
    assert list(lines({"copy_gb_per_second": 100, "cells": cells})) == [
        "MISSED  no_loop, batch 1, context 1024: 70% of copy, 75% asked",
        "MISSED  plt-2, batch 1, context 1024: 1.040 of 1.03, before 1.118",
        "met     plt-3, batch 1, context 1024: 1.050 of 1.06",
        "met     plt-2, batch 64, context 1024: 1.040 of 1.06",
        "met     plt-3, batch 64, context 1024: 1.050 of 1.06",
        "MISSED  plt-2, batch 16, context 8192: 1.040 of 1.03",
        "met     plt-3, batch 16, context 8192: 1.050 of 1.06",
    ]
