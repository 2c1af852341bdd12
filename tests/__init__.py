"""The tests, and the processes that they start."""

import gc

# Tracing makes so many objects that Python's defaults spend an eighth of the time on collecting
# them; conftest.py collects behind each file.
gc.set_threshold(200_000, 50, 100)
