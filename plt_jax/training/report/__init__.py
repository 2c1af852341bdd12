"""One page on a training run: `python -m plt_jax.training.report RUN`."""
