"""How good are the answers?"""

from gradsketch.evaluation.causal import Removal, removal_check
from gradsketch.evaluation.lds import LinearDatamodelingScore, linear_datamodeling_score
from gradsketch.evaluation.mislabelled import AreaUnderCurve, Mislabelled, mislabelled_auc
from gradsketch.evaluation.retraining import Retrainings, retrain_on_subsets

__all__ = [
    "AreaUnderCurve",
    "LinearDatamodelingScore",
    "Mislabelled",
    "Removal",
    "Retrainings",
    "linear_datamodeling_score",
    "mislabelled_auc",
    "removal_check",
    "retrain_on_subsets",
]
