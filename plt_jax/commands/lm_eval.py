"""The lm-evaluation-harness's own command, which knows this package's models as plt_jax:

python -m plt_jax.lm_eval run --model plt_jax --model_args path=RUN --tasks TASK,TASK
"""

from plt_jax.errors import InputError


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise InputError("lm_eval is not installed: pip install 'plt_jax[lm_eval]'") from error
    # Registers the models. The harness has no entry points by which it could find them itself.
    import plt_jax.evaluation.harness  # noqa: F401

    cli_evaluate()
