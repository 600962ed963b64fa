"""Numbers of a running training -> MLflow, by way of a file that nothing can take away.

The one seam between appo and MLflow's tracking API. `Tracker` writes every event to a journal on disk first;
a thread sends it on. Importing this package imports neither mlflow nor torch.
"""

from appo.tracking.outputs import log_training
from appo.tracking.provenance import comparison_digest, parameters, provenance_tags
from appo.tracking.runlog import Tracker
from appo.tracking.tracker import open_tracker, start_training, tracking_uri

__all__ = [
    "Tracker",
    "comparison_digest",
    "log_training",
    "open_tracker",
    "parameters",
    "provenance_tags",
    "start_training",
    "tracking_uri",
]
