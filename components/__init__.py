"""KFP components, one file each: at most 40 lines, deciding nothing; they call `appo.steps`."""

from components.assemble import assemble
from components.base_model import base_model
from components.close import close
from components.compare import compare
from components.evaluate import evaluate
from components.features import features
from components.retrain import evaluate_challenger, gate, promote
from components.train import train
from components.train_on_nodes import train_on_nodes
from components.validate import plan_trainings, validate

__all__ = [
    "assemble",
    "base_model",
    "close",
    "compare",
    "evaluate",
    "evaluate_challenger",
    "features",
    "gate",
    "plan_trainings",
    "promote",
    "train",
    "train_on_nodes",
    "validate",
]
