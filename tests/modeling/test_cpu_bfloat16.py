"""bfloat16 products on a CPU without instructions for them: float32's, rounded once; everything else is torch's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: what is replaced stays replaced. `needed` is answered here, so that the replacement is seen on
# every CPU.
CODE = """
import json
import torch
import torch.nn.functional as F
from appo.modeling import cpu_bfloat16
cpu_bfloat16.needed = lambda: True

torch.manual_seed(0)
def results(dtype):
    make = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    a, b, bias = make(30, 64), make(64, 20), make(20)
    x, y, z = make(3, 30, 64), make(3, 64, 20), make(3, 30, 20)
    q, k, v = (make(1, 2, 30, 16) for _ in range(3))
    products = [a @ b, torch.addmm(bias, a, b, beta=0.5, alpha=2.0), x @ y, torch.baddbmm(z, x, y),
                F.linear(x, b.T, bias), a[:1] @ b, F.scaled_dot_product_attention(q, k, v, is_causal=True)]
    sum(product.float().square().sum() for product in products).backward()
    return products, [t.grad for t in (a, b, bias, x, y, z, q, k, v)]

def worst(found, expected):
    pairs = [(f.detach().float(), e.detach()) for f, e in zip(found, expected)]
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in pairs)

native, exact = results(torch.bfloat16), results(torch.float32)
assert not cpu_bfloat16.install("float32")
assert cpu_bfloat16.install("bfloat16") and cpu_bfloat16.install("bfloat16")
replaced, again = results(torch.bfloat16), results(torch.float32)
a = torch.randn(30, 64).bfloat16()
b = torch.randn(64, 20).bfloat16()
print(json.dumps({
    "native": [worst(n, e) for n, e in zip(native, exact)],
    "replaced": [worst(r, e) for r, e in zip(replaced, exact)],
    "float32": [worst(r, e) for r, e in zip(again, exact)],
    "types": sorted({str(t.dtype) for part in replaced for t in part}),
    "once": bool(torch.equal(a @ b, (a.float() @ b.float()).bfloat16())),
}))
"""


@pytest.mark.filterwarnings("ignore")
def test_products_are_those_of_float32_rounded_once():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UserWarning" not in done.stderr
    found = json.loads(done.stdout)
    assert found["once"]
    assert found["types"] == ["torch.bfloat16"]
    assert found["float32"] == [0.0, 0.0]
    for native, replaced in zip(found["native"], found["replaced"], strict=True):
        assert replaced <= max(native * 1.5, 1e-2)
