"""Shared fixtures: comparison with float64, and compilation for sm_90 of every kernel that a call launches, without a GPU."""

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch

import eagle_kernels

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
TYPES[torch.float8_e4m3fn] = "fp8e4nv"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """|out - expected| / |expected|, in float64. NaN in `out` gives NaN, which fails every comparison."""

    def error(out: torch.Tensor, expected: torch.Tensor) -> float:
        out, expected = out.double(), expected.double()
        norm = expected.norm().item()
        difference = (out - expected).norm().item()
        return difference / norm if norm > 0 else difference

    return error


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every kernel that the test launches is compiled for sm_90 instead of run. The value is the list of compiled kernels."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kernels: list = []
    seen = set()

    def compile_instead(self: JITFunction, *args, grid, warmup: bool, **kwargs):
        names = [parameter.name for parameter in self.params]
        constant = {parameter.name for parameter in self.params if parameter.is_constexpr}
        values = dict(itertools.chain(zip(names, args), ((key, value) for key, value in kwargs.items() if key in names)))
        options = {key: value for key, value in kwargs.items() if key not in names}
        signature, constexprs, attributes = {}, {}, {}
        for position, name in enumerate(names):
            value = values[name]
            if name in constant:
                signature[name], constexprs[(position,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        key = (self.fn.__module__, self.fn.__name__, str(signature), str(constexprs), str(attributes), str(options))
        if key not in seen:
            seen.add(key)
            source = ASTSource(fn=self, signature=signature, constexprs=constexprs, attrs=attributes)
            kernels.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))

    monkeypatch.setattr(JITFunction, "run", compile_instead)
    return kernels


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run: "cpu" in Triton's interpreter (a process with TRITON_INTERPRET=1, see test_interpreter.py) or "cuda"."""
    if request.param == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("runs inside test_interpreter.py")
        with eagle_kernels.use_implementation("triton"):
            yield "cpu"
    else:
        yield "cuda"


@pytest.fixture
def assert_as_exact_as_torch(relative_error) -> Callable[..., None]:
    """The error of every value and gradient against float64 is at most twice that of plain torch at the same precision."""

    def run(
        function: Callable, inputs: dict, differentiate: tuple[str, ...], dtype: torch.dtype, implementation: str
    ) -> list[torch.Tensor]:
        tensors = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and name in differentiate:
                # A cast keeps the strides, so a non-contiguous input stays non-contiguous.
                value = value.detach().to(dtype).requires_grad_()
            tensors[name] = value
        with eagle_kernels.use_implementation(implementation):
            out = function(**tensors)
            out = out if isinstance(out, tuple) else (out,)
            generator = torch.Generator().manual_seed(1)
            gradients = [torch.randn(part.shape, generator=generator).to(part) for part in out]
            torch.autograd.backward(out, gradients)
        return [part.detach() for part in out] + [tensors[name].grad for name in differentiate]

    def check(function: Callable, inputs: dict, differentiate: tuple[str, ...], dtype: torch.dtype) -> None:
        # The inputs are rounded first, so that the error is the operator's and not that of rounding its inputs.
        inputs = {name: value.to(dtype) if name in differentiate else value for name, value in inputs.items()}
        exact = run(function, inputs, differentiate, torch.float64, "torch")
        plain = run(function, inputs, differentiate, dtype, "torch")
        fused = run(function, inputs, differentiate, dtype, "triton")
        floor = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 4
        for position, (value, other, expected) in enumerate(zip(fused, plain, exact)):
            assert value.shape == expected.shape
            assert value.dtype == other.dtype
            if value.numel() < 64:
                # With so few elements a single rounding step decides: allow for one in each direction.
                floor = max(floor, 1.25 * torch.finfo(dtype).eps)
            error, allowed = relative_error(value, expected), max(2 * relative_error(other, expected), floor)
            assert error <= allowed, f"result {position}: error {error:.2e}, allowed {allowed:.2e} (twice the error of torch)"

    return check


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and `torch.empty_like` return NaN, so that an element that is not written is visible in the result."""

    def poison(create: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            out = create(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.requires_grad else out

        return wrapped

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
