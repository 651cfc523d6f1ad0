"""Sketches of gradients and Hessian-vector products, and the questions they answer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Public name → module that defines it. Resolved on first use, so that `gradsketch --help` never waits for torch.
_HOME = {
    "AFFD": "gradsketch.sketches.affd",
    "AFJL": "gradsketch.sketches.afjl",
    "Accuracy": "gradsketch.dimension.metrics",
    "BlockSum": "gradsketch.sketches.block_sum",
    "CausalLM": "gradsketch.gradients.tasks",
    "Checkpointer": "gradsketch.attribution.checkpointer",
    "Classification": "gradsketch.gradients.tasks",
    "CurvePoint": "gradsketch.dimension.results",
    "Dense": "gradsketch.sketches.dense",
    "Density": "gradsketch.spectra",
    "Diagonal": "gradsketch.spectra",
    "DimensionCurve": "gradsketch.dimension.results",
    "Distortion": "gradsketch.evaluation.distortion",
    "Estimate": "gradsketch.spectra",
    "Evolution": "gradsketch.spectra",
    "ExactMatch": "gradsketch.dimension.metrics",
    "FFD": "gradsketch.sketches.ffd",
    "FJL": "gradsketch.sketches.fjl",
    "Factors": "gradsketch.gradients.factors.factors",
    "FingerprintError": "gradsketch.errors",
    "Function": "gradsketch.gradients.tasks",
    "GradientSketcher": "gradsketch.gradients.per_example",
    "GradsketchError": "gradsketch.errors",
    "GradsketchWarning": "gradsketch.errors",
    "Hits": "gradsketch.attribution.results",
    "Index": "gradsketch.attribution.index",
    "InputError": "gradsketch.errors",
    "IntrinsicDimension": "gradsketch.dimension.results",
    "LinearDatamodelingScore": "gradsketch.evaluation.lds",
    "LinearMap": "gradsketch.linear_map",
    "Loss": "gradsketch.dimension.metrics",
    "MaskedLM": "gradsketch.gradients.tasks",
    "Mislabelled": "gradsketch.evaluation.mislabelled",
    "NonFiniteError": "gradsketch.errors",
    "Parameters": "gradsketch.gradients.parameters",
    "QK": "gradsketch.sketches.qk",
    "Quality": "gradsketch.evaluation.quality",
    "Recommendation": "gradsketch.spectra",
    "Removal": "gradsketch.evaluation.causal",
    "Result": "gradsketch.results",
    "Retrainings": "gradsketch.evaluation.retraining",
    "Rouge": "gradsketch.dimension.metrics",
    "Ray": "gradsketch.attribution.engine",
    "SJLT": "gradsketch.sketches.sjlt",
    "Selection": "gradsketch.attribution.select",
    "SelfInfluence": "gradsketch.attribution.results",
    "Seq2SeqLM": "gradsketch.gradients.tasks",
    "Sketch": "gradsketch.sketches.base",
    "SketchedGradients": "gradsketch.gradients.per_example",
    "Spectrum": "gradsketch.spectra",
    "SketchCallback": "gradsketch.attribution.callback",
    "SpectrumCallback": "gradsketch.spectra.callback",
    "StoreError": "gradsketch.errors",
    "Stream": "gradsketch.random",
    "Subspace": "gradsketch.dimension.subspace",
    "Task": "gradsketch.gradients.tasks",
    "TiledSRHT": "gradsketch.sketches.tiled_srht",
    "adafactor": "gradsketch.gradients.factors.adafactor",
    "build_index": "gradsketch.attribution.build",
    "density": "gradsketch.spectra",
    "diagonal": "gradsketch.spectra",
    "dimension_curve": "gradsketch.dimension.curve",
    "distortion": "gradsketch.evaluation.distortion",
    "eigenvectors": "gradsketch.spectra",
    "ekfac": "gradsketch.gradients.factors.kfac",
    "fine_tune": "gradsketch.dimension.curve",
    "fisher": "gradsketch.gradients.curvature",
    "gauss_newton": "gradsketch.gradients.curvature",
    "gradient_gram": "gradsketch.gradients.gram",
    "hessian": "gradsketch.gradients.curvature",
    "index_sketches": "gradsketch.attribution.ready",
    "intrinsic_dimension": "gradsketch.dimension.search",
    "inverse_fisher": "gradsketch.gradients.factors.inverse",
    "kfac": "gradsketch.gradients.factors.kfac",
    "linear_datamodeling_score": "gradsketch.evaluation.lds",
    "loss_gradient": "gradsketch.gradients.curvature",
    "mapped_rows": "gradsketch.reading.mapped",
    "mislabelled_auc": "gradsketch.evaluation.mislabelled",
    "recommend_d": "gradsketch.spectra",
    "removal_check": "gradsketch.evaluation.causal",
    "retrain_on_subsets": "gradsketch.evaluation.retraining",
    "saved_spectra": "gradsketch.spectra",
    "sketch_gradients": "gradsketch.gradients.per_example",
    "spectrum": "gradsketch.spectra",
    "spectrum_over": "gradsketch.spectra",
    "squared_norm": "gradsketch.spectra",
    "trace": "gradsketch.spectra",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from gradsketch.attribution.build import build_index
    from gradsketch.attribution.callback import SketchCallback
    from gradsketch.attribution.checkpointer import Checkpointer
    from gradsketch.attribution.engine import Ray
    from gradsketch.attribution.index import Index
    from gradsketch.attribution.ready import index_sketches
    from gradsketch.attribution.results import Hits, SelfInfluence
    from gradsketch.attribution.select import Selection
    from gradsketch.dimension.curve import dimension_curve, fine_tune
    from gradsketch.dimension.metrics import Accuracy, ExactMatch, Loss, Rouge
    from gradsketch.dimension.results import CurvePoint, DimensionCurve, IntrinsicDimension
    from gradsketch.dimension.search import intrinsic_dimension
    from gradsketch.dimension.subspace import Subspace
    from gradsketch.errors import (
        FingerprintError,
        GradsketchError,
        GradsketchWarning,
        InputError,
        NonFiniteError,
        StoreError,
    )
    from gradsketch.evaluation.causal import Removal, removal_check
    from gradsketch.evaluation.distortion import Distortion, distortion
    from gradsketch.evaluation.lds import LinearDatamodelingScore, linear_datamodeling_score
    from gradsketch.evaluation.mislabelled import Mislabelled, mislabelled_auc
    from gradsketch.evaluation.quality import Quality
    from gradsketch.evaluation.retraining import Retrainings, retrain_on_subsets
    from gradsketch.gradients.curvature import fisher, gauss_newton, hessian, loss_gradient
    from gradsketch.gradients.factors.adafactor import adafactor
    from gradsketch.gradients.factors.factors import Factors
    from gradsketch.gradients.factors.inverse import inverse_fisher
    from gradsketch.gradients.factors.kfac import ekfac, kfac
    from gradsketch.gradients.gram import gradient_gram
    from gradsketch.gradients.parameters import Parameters
    from gradsketch.gradients.per_example import GradientSketcher, SketchedGradients, sketch_gradients
    from gradsketch.gradients.tasks import CausalLM, Classification, Function, MaskedLM, Seq2SeqLM, Task
    from gradsketch.linear_map import LinearMap
    from gradsketch.random import Stream
    from gradsketch.reading.mapped import mapped_rows
    from gradsketch.results import Result
    from gradsketch.sketches.affd import AFFD
    from gradsketch.sketches.afjl import AFJL
    from gradsketch.sketches.base import Sketch
    from gradsketch.sketches.block_sum import BlockSum
    from gradsketch.sketches.dense import Dense
    from gradsketch.sketches.ffd import FFD
    from gradsketch.sketches.fjl import FJL
    from gradsketch.sketches.qk import QK
    from gradsketch.sketches.sjlt import SJLT
    from gradsketch.sketches.tiled_srht import TiledSRHT
    from gradsketch.spectra import (
        Density,
        Diagonal,
        Estimate,
        Evolution,
        Recommendation,
        Spectrum,
        density,
        diagonal,
        eigenvectors,
        recommend_d,
        saved_spectra,
        spectrum,
        spectrum_over,
        squared_norm,
        trace,
    )
    from gradsketch.spectra.callback import SpectrumCallback


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradsketch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
