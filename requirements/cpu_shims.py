"""Make a CPU build of torch and the registry's torchvision work together: run once in a fresh environment.

The registry's torchvision wheels are linked against CUDA, so on a CPU build of torch its compiled operators do not
load, and its Python code then fails on two operator schemas that nobody declared. Declaring them is enough: what
transformers and vLLM use of torchvision is plain torch. The declaration must happen in every process (vLLM inspects
models in a new one), hence a `.pth` line that watches for the import. Where the real operators load, it does nothing.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HOOK = '''\
"""Declares torchvision's operators just before torchvision is first imported (see requirements/cpu_shims.py)."""
import sys


class _DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in (
                    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                ):
                    try:
                        library.define(schema)
                    except RuntimeError:  # a matching torchvision has declared it already
                        pass
                _DeclareOperators.library = library  # a Library undoes its work when it is collected
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    (site / "appo_torchvision_on_cpu.py").write_text(HOOK, encoding="utf-8")
    (site / "appo_torchvision_on_cpu.pth").write_text("import appo_torchvision_on_cpu\n", encoding="utf-8")


if __name__ == "__main__":
    main()
