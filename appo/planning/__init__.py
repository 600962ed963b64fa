"""Before a run: a recipe, GPUs and their memory -> what each GPU will hold, how long it takes, what would make it fit.

In reading order: `setting` (the recipe as it lies on one GPU), `activations` (what autograd keeps), `memory` (the
moments of a step), `hours`, `plan` (the verdict and its remedy). Arithmetic on sizes alone, free of torch.
"""
