"""What only a GPU can show: its kernels against the oracle, the three phases on it, and its own
memory against plans.

python -m pytest -m gpu
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import compute_outputs_and_gradients, make_attention
from launches import CHECKOUT, LAUNCH, TIMEOUT, environment, metrics, settings

from rectvlm.checkpoint import Checkpoint
from rectvlm.models.memory_efficient import NormGelu, upsample_nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_the_dense_oracle(dtype: torch.dtype, compiled: bool) -> None:
    """A grid with more patches than a kernel's tile, in numbers that are not multiples of it.

    In float32 as exact as on a CPU. In bfloat16 it may be off by twice what the dense formula
    itself is off by, and a gradient by 2%: the slice bias's is a sum over queries that were rounded
    one by one, the formula's was not.
    """
    torch.compiler.reset()
    module, inputs, index = make_attention((5, 9, 7), heads=3, width=192)
    module, index = module.to("cuda", dtype), index.to("cuda")
    rounded = {name: value.to("cuda", dtype) for name, value in inputs.items()}
    dense, dense_gradients = compute_outputs_and_gradients(module, rounded, index, folded=False)
    if compiled:
        module.compile()
    folded, folded_gradients = compute_outputs_and_gradients(module, rounded, index, folded=True)
    exact = {name: value.double() for name, value in rounded.items()}
    expected, expected_gradients = compute_outputs_and_gradients(
        module.double(), exact, index, folded=False
    )
    for folded_output, dense_output, truth in zip(folded, dense, expected, strict=True):
        dense_error = float((dense_output - truth).abs().max())
        allowed = 1e-5 if dtype == torch.float32 else 2 * dense_error
        assert (folded_output - truth).abs().max() <= allowed
    for name, truth in expected_gradients.items():
        dense_error = float((dense_gradients[name] - truth).norm() / truth.norm())
        error = float((folded_gradients[name] - truth).norm() / truth.norm())
        allowed = 1e-4 if dtype == torch.float32 else max(0.02, 2 * dense_error)
        assert error <= allowed, (
            f"gradient of {name} is off by {error:.1e} of its norm, "
            f"the formula by {dense_error:.1e}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_efficient_layers_equal_the_plain_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = NormGelu(2, 6).to("cuda", dtype)
    x = (1 + torch.randn(2, 6, 8, 10, 12, device="cuda")).to(dtype).requires_grad_()
    outputs = upsample_nearest(layer(x), (1, 2, 2))
    exact = x.detach().double().requires_grad_()
    normal = F.gelu(F.group_norm(exact, 2, layer.weight.double(), layer.bias.double(), layer.eps))
    expected = F.interpolate(normal, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
    output_gradient = torch.randn_like(outputs)
    (gradient,) = torch.autograd.grad(outputs, x, output_gradient)
    (exact_gradient,) = torch.autograd.grad(expected, exact, output_gradient.double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(outputs.double(), expected, rtol=tolerance, atol=tolerance)
    assert (gradient.double() - exact_gradient).norm() / exact_gradient.norm() < tolerance


def train(phase: int, shards: Path, runs: Path, steps: int, *more: str) -> str:
    command = [
        *LAUNCH,
        "--num_processes",
        "1",
        f"launch/phase{phase}.py",
        *settings(phase, shards, runs, steps),
        *more,
    ]
    return run_on_gpu(command, runs)


def run_on_gpu(command: list[str], folder: Path) -> str:
    """Standard error of a command on the GPU."""
    variables = dict(environment(folder))
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """The three phases at the tiny size, the last resumed once."""
    folder = tmp_path_factory.mktemp("runs")
    for phase in (1, 2, 3):
        train(phase, phantom_shards, folder, 4)
    train(3, phantom_shards, folder, 8, "--resume")
    return folder


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_phases_train_and_go_on(runs: Path, phase: int) -> None:
    folder = runs / "tiny" / f"phase{phase}"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 9 if phase == 3 else 5))
    assert all(math.isfinite(line["loss"]) and line["skipped"] is None for line in lines)
    engine = json.loads((folder / "engine.json").read_text())
    assert engine["distributed_type"] == "DEEPSPEED" and engine["zero_stage"] == phase
    assert (
        engine["ranks"][0]["device"].startswith("cuda")
        and engine["ranks"][0]["peak_memory_bytes"] > 0
    )
    tensors = Checkpoint.open(folder).read_tensors()
    assert all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors.values()
        if tensor.is_floating_point()
    )


def test_the_trained_model_is_evaluated(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    command = [
        sys.executable,
        "-m",
        "rectvlm",
        "evaluate",
        "--checkpoint",
        str(runs / "tiny/phase3"),
        "--no-plots",
    ]
    run_on_gpu([*command, "--out", str(out), "--limit", "2", "--bootstrap", "0"], tmp_path)
    result = json.loads(out.read_text())
    assert result["n_cases"] == 2 and result["machine"]["gpus"]
    assert result["reports"]["image"]["n"] > 0
