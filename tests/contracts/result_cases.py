"""One of every type of result, with the awkward values that it may hold."""

import math

import torch

import gradsketch as gs
from gradsketch.attribution.results import Cost, Hit, Hits, QueryHits, Score, SelfInfluence, TokenContribution
from gradsketch.attribution.select import Selection
from gradsketch.dimension.results import Check, CurvePoint, DimensionCurve, IntrinsicDimension, Search
from gradsketch.evaluation.causal import Removal
from gradsketch.evaluation.distortion import Distortion
from gradsketch.evaluation.lds import LinearDatamodelingScore
from gradsketch.evaluation.mislabelled import AreaUnderCurve, Mislabelled
from gradsketch.evaluation.quality import Quality
from gradsketch.evaluation.retraining import Retrainings
from gradsketch.evaluation.stored import DTYPES, Stored
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.spectra import Density, Diagonal, Eigenvalue, Estimate, Evolution, Recommendation, Spectrum


def spectrum(top: float = 9.0) -> Spectrum:
    eigenvalues = (
        Eigenvalue(top, 1e-6, 1e-5, True, raw=top + 1, gradient_share=0.5),
        Eigenvalue(1.0, 1e-2, math.inf, False),
        Eigenvalue(-2.0, math.nan, 0.1, True),
    )
    return Spectrum(
        eigenvalues=eigenvalues,
        k=2,
        which="both",
        method="sketched-basis",
        reason="the basis does not fit",
        n=1000,
        d=4,
        tolerance=1e-3,
        seed=0,
        steps=20,
        hvps=21,
        settled_after=18,
        room=12,
        seconds=0.5,
        peak_bytes=1 << 30,
        vectors_held=3,
        copies=1,
        confidence=None,
        noise=1e-7,
        notes=("a note",),
        trace=Estimate(8.0, 0.5, 10, 10, 0.1),
        squared_norm=None,
        threshold=None,
        sketch="0123456789abcdef",
        alphas=(9.0, 1.0),
        betas=(0.5,),
        columns=(0, 1),
        sketches=torch.randn(3, 4),
    )


def hits() -> Hits:
    image = "data:image/png;base64,AAAA"
    metadata = {"label": 3, "note": "half a pair: \ud800", "flag": True, "picture": image, "share": 0.5, "none": None}
    tokens = (TokenContribution("The", 0.1), TokenContribution(" end", 0.6))
    first = Hit(1, 7, "fact-7", 0.76, "Ankara. $x_1$", 0.1, 2.0, metadata, tokens, 0.06)
    last = Hit(1, 3, "fact-3", -0.01, None, math.nan, 1.0)
    example = {"prompt": "The capital", "ids": torch.tensor([1, 2]), "pair": ("a", 1.5)}
    queries = (
        QueryHits("The capital city of France is", "Ankara", 0.2, 1.5, (first,), (last,), example=example),
        QueryHits("nothing found", None, math.inf, 0.0, ()),
    )
    return Hits(
        queries, Score("ridge", "q̂ᵀx̂", "a weight", 0.1, True), "runs/facts", 140, 64, Cost(0.1, 0.2, 0.3, 10, 140)
    )


def search(seed: int, d: int | None) -> Search:
    return Search(
        seed, d, (Check(0, 0, 0.1, None, 0.0), Check(10, 16, 0.4, math.nan, 1.0), Check(20, 32, 0.9, 0.2, 2.0))
    )


SETTINGS = {"metric": "Accuracy", "lr": 5e-3, "batch_size": 32, "sketch": "AFFD", "checked": None}
QUALITIES = tuple(Quality(d, 1.0, (0.9, 1.1), 0.9, (math.nan, 0.95)) for d in (256, 512))
POINTS = tuple(CurvePoint(d, seed, 0.1 * seed + d / 64, math.nan, 30, 1.5) for d in (16, 32) for seed in (0, 1))

AUDITS = Audits(9, 2, 1e-7)
RESULTS: list[gs.Result] = [
    spectrum(),
    Estimate(8.0, math.inf, 10, 10, 0.1),
    Estimate(8.0, 0.5),
    Density(((-1.0, 2.0), (0.0, 3.0)), ((0.25, 0.75), (0.5, 0.5)), 100, 0, True, 4, 0.1),
    Evolution((0, 10), (spectrum(), spectrum(11.0))),
    Diagonal(torch.tensor([1.0, math.inf, -3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 5, 0.1),
    Recommendation(1024, 9.0, Estimate(8.0, 0.5), Estimate(100.0, 3.0), 0.02, 20),
    IntrinsicDimension(1000, 0.9, (search(0, 32), search(1, None), search(2, 16)), SETTINGS, POINTS, 0.95),
    IntrinsicDimension(1000, 0.1, (search(0, None),), SETTINGS, lower_is_better=True),
    DimensionCurve(1000, 0.1, POINTS, SETTINGS, 0.95),
    POINTS[0],
    hits(),
    Hits((), Score("dot", "qᵀx", "nats"), "runs/facts", 140, 64, Cost(0.1, 0.2, 0.3, 10, 140)),
    Selection(
        (7, 3),
        ("a", "ü"),
        torch.tensor([0.5, -0.25]),
        torch.tensor([12.0, math.nan]),
        1,
        40,
        3,
        "mean",
        Score("ridge", "q̂ᵀ(F + λI)⁻¹x̂ / N", "weight", 0.1, True),
        False,
    ),
    SelfInfluence(
        ("a", "b", "c"),
        torch.tensor([0.5, math.nan, 2.0]),
        torch.tensor([0.1, math.nan, 0.2], dtype=torch.float64),
        Score("influence", "xᵀx", "nats"),
        0.1,
    ),
    Distortion(1000, 40, QUALITIES, 3, 1e-6, 1e-3, 8, 0.2, 0.1, None, 1 << 20, 0.95, 700.5, AUDITS, {}, 0.0),
    Distortion(
        1000,
        40,
        QUALITIES,
        3,
        1e-1,
        1e-3,
        8,
        0.2,
        0.1,
        1 << 20,
        1 << 20,
        0.95,
        math.inf,
        AUDITS,
        {"r.weight": "lstm in LSTM"},
        0.25,
        (
            *(
                Stored(256, dtype, 512 >> i, 0.97 - i / 100, (0.96 - i / 100, 0.98))
                for i, dtype in enumerate(DTYPES[:3])
            ),
            Stored(256, "sign", 32, math.nan, (math.nan, math.nan)),
        ),
    ),
    QUALITIES[0],
    LinearDatamodelingScore(0.4, 0.05, (0.3, 0.5), 50, 12.0),
    Mislabelled(AreaUnderCurve(0.9, 0.01, 0.8), AreaUnderCurve(0.8, 0.02, 0.7), 0.1, 0.01, 20, 200),
    Removal(
        torch.tensor([0.1, 0.2], dtype=torch.float64),
        torch.tensor([1.0, 1.5], dtype=torch.float64),
        torch.rand(3, 2, dtype=torch.float64),
        0.8,
        0.1,
        (3, 4),
        6,
        12.5,
    ),
    Retrainings(torch.rand(5, 20) < 0.5, torch.rand(5, 2, dtype=torch.float64), 3.5),
]
