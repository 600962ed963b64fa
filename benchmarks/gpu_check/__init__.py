"""`make gpu-check`: what a GPU alone can show, on any machine that has torch, transformers, accelerate and peft.

In reading order: `needs` (packages, carried ones among them), `rows` (a check, its figures, its verdict), `matrix`,
`kernels`, `sizes` (the checks), `__main__` (the command), `bundle` (what is carried, made elsewhere).
"""
