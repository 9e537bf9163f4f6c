"""What an installed package must do, beside torch alone: `python tests/installed.py ROOT [--pure]`, for wheels.

Runs README's five lines, and prints a line. With --pure the package is one without the compiled module.
"""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import gear_kernels


def five_lines(readme):
    """README's first block of Python on small tensors; the loss must reach hidden states and head."""
    torch.manual_seed(0)
    names = dict(
        hidden=torch.randn(12, 16, requires_grad=True),
        lm_head_weight=torch.randn(50, 16, requires_grad=True),
        targets=torch.randint(50, (12,)),
        teacher_hidden=torch.randn(12, 16),
        advantages=torch.tensor([1.0, -1.0]),
        cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32),
    )
    exec(re.findall(r"```python\n(.*?)```", readme, re.S)[0], names)
    names["loss"].backward()
    assert names["hidden"].grad.any() and names["lm_head_weight"].grad.any()
    return names["credit"].token_advantages


def main(root, pure):
    folder = Path(gear_kernels.__file__).parent
    assert root not in folder.parents, f"{folder} is the checkout, not what is installed"
    readme = (root / "README.md").read_text()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = five_lines(readme)
        five_lines(readme)
    with gear_kernels.backend("reference"):
        assert torch.allclose(found, five_lines(readme), atol=1e-6)
    reasons = [str(one.message) for one in said if "reference back end" in str(one.message)]
    assert len(reasons) == pure, reasons  # said once, or not at all
    listed = subprocess.run([sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    assert not re.search(r"^(transformers|deepspeed|vllm)", listed, re.M), "torch alone, or the trial says little"
    gear_kernels.show()
    print("passed, in plain torch" if pure else "passed, compiled")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), "--pure" in sys.argv)
