"""Every kernel, launched by its operator at the shapes of an 8B model, compiles for sm_90 without a GPU and spills no register."""

import re

import pytest
import torch

import eagle_kernels

pytestmark = pytest.mark.skipif(not eagle_kernels.dispatch.HAS_TRITON, reason="triton isn't installed")


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype).requires_grad_()


def launch_everything(dtype: torch.dtype) -> None:
    eagle_kernels.rms_norm(leaf(2, 3584, dtype=dtype), leaf(3584, dtype=dtype)).sum().backward()
    eagle_kernels.add_rms_norm(leaf(2, 1153, dtype=dtype), leaf(2, 1153, dtype=dtype), leaf(1153, dtype=dtype))[0].sum().backward()
    eagle_kernels.rms_norm(leaf(64, 128, dtype=dtype), leaf(128, dtype=dtype)).sum().backward()
    eagle_kernels.rms_norm(leaf(2, 18944, dtype=dtype), leaf(18944, dtype=dtype)).sum().backward()
    q, k = leaf(8, 28, 128, dtype=dtype), leaf(8, 4, 128, dtype=dtype)
    eagle_kernels.rope(q, k, torch.arange(8), torch.ones(64))[0].sum().backward()
    eagle_kernels.rope(leaf(8, 2, 72, dtype=dtype), leaf(8, 2, 72, dtype=dtype), torch.arange(8, dtype=torch.int32), torch.ones(36))
    eagle_kernels.swiglu(leaf(2, 18944, dtype=dtype), leaf(2, 18944, dtype=dtype)).sum().backward()
    mlp = (leaf(4, 16, dtype=dtype), leaf(24, 16, dtype=dtype), leaf(24, 16, dtype=dtype), leaf(16, 24, dtype=dtype))
    eagle_kernels.swiglu_mlp(*mlp, rows=2).sum().backward()
    if dtype == torch.bfloat16:
        wide = (leaf(20, 32, dtype=dtype), leaf(64, 32, dtype=dtype), leaf(64, 32, dtype=dtype), leaf(32, 64, dtype=dtype))
        eagle_kernels.float8_mlp(*wide).sum().backward()
    hidden, weight = leaf(4, 8, dtype=dtype), leaf(152_064, 8, dtype=dtype)
    for options in (
        {"num_kept": 4},
        {"token_weights": torch.ones(4), "denominator": torch.tensor(2.0), "label_smoothing": 0.1, "z_loss": 1e-4},
    ):
        eagle_kernels.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3]), **options).backward(retain_graph=True)
    eagle_kernels.linear_cross_entropy(hidden, leaf(31, 8, dtype=dtype), torch.tensor([0, -100, 2, 3])).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_compiles_without_spills(dtype, compiled):
    with eagle_kernels.use_implementation("triton"):
        launch_everything(dtype)
    names = {kernel.metadata.name for kernel in compiled}
    assert names >= {"forward_kernel", "backward_kernel", "reduce_kernel", "rope_kernel", "loss_kernel", "rows_kernel", "scale_kernel"}
    if dtype == torch.bfloat16:
        assert names >= {"round_rows_kernel", "largest_kernel", "round_columns_kernel", "swiglu_rows_kernel"}
        assert "swiglu_backward_rows_kernel" in names
    for kernel in compiled:
        # PTX declares a local depot if arrays or spilled values are in local memory before ptxas runs.
        assert not re.search(r"\.local\s+\.align", kernel.asm["ptx"]), f"{kernel.metadata.name} keeps values in local memory"
        assert kernel.asm["cubin"], kernel.metadata.name


def test_wide_accesses_where_the_shapes_allow_them(compiled):
    with eagle_kernels.use_implementation("triton"):
        eagle_kernels.rms_norm(leaf(2, 3584, dtype=torch.bfloat16), leaf(3584, dtype=torch.bfloat16)).sum().backward()
        eagle_kernels.swiglu(leaf(2, 18944, dtype=torch.bfloat16), leaf(2, 18944, dtype=torch.bfloat16)).sum().backward()
        q, k = leaf(8, 28, 128, dtype=torch.bfloat16), leaf(8, 4, 128, dtype=torch.bfloat16)
        eagle_kernels.rope(q, k, torch.arange(8), torch.ones(64))
    for kernel in compiled:
        if kernel.metadata.name != "reduce_kernel":
            loads = ("ld.global.v4.b32", "ld.global.v2.b32", "cp.async.cg.shared.global")  # the last of them in pipelined loops
            assert any(load in kernel.asm["ptx"] for load in loads), kernel.metadata.name
            assert any(store in kernel.asm["ptx"] for store in ("st.global.v4.b32", "st.global.v2.b32")), kernel.metadata.name
