"""What a run checks and says before it starts."""

from plt_jax.config import RunConfig
from plt_jax.distributed.mesh import make_mesh
from plt_jax.model import attention
from plt_jax.training import setup


def test_what_would_be_faster_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(setup, "traced_platform", lambda: "gpu")
    monkeypatch.setattr(attention, "available_backend", lambda: "cudnn")
    config = RunConfig(model={"moe": {"experts": 4, "expert_width": 8}})
    assert setup.describe_kernels(config, make_mesh(config.mesh)) == (
        "attention: xla (not cudnn: dtype is float32; set dtype to bfloat16), experts: blocks "
        "(tokamax is made for GPUs: pip install 'plt_jax[tokamax]')"
    )
    fast = {"dtype": "bfloat16", "moe": {"experts": 4, "grouped_product": "ragged_dot"}}
    config = RunConfig(model=fast)
    chosen = setup.describe_kernels(config, make_mesh(config.mesh))
    assert chosen == "attention: cudnn, experts: ragged_dot"
