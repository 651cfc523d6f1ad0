"""Which library's scores find what a language model learnt its answers from, at equal bytes a row? By retraining.

    make peers     # the other libraries, in an environment of their own
    .venv-peers/bin/python benchmarks/lm_attribution_peers.py --kept FOLDER     # lm_attribution.py's, or a new one

The model of facts_lm.py and its random halves. Each library makes rows of 4,096 numbers of all training rows and
questions: 8,192 bytes a row and checkpoint in half precision. Of its rows every score is tried that any of the
libraries makes of them: products, cosines, products over the damped covariance of the whole row (TRAK, dattri) or of
each layer alone (LogIX, LoGra of dattri), and Bergson's TrackStar, which puts a root of that covariance in both and
compares unit vectors. So a library is judged at its best: the score and its λ are chosen on one half of the retrained
models and judged on the other, and the other way round. gradsketch's rows are scored by ``Index.query``.

Intervals are 95 %, by a bootstrap over halves and questions; ``less_than_ours`` is that of the difference from K-FAC
sketches of 16,384 numbers of four bits, of as many bytes. Kronfluence keeps no rows. It forms exact EK-FAC scores from
all gradients again, which are those of gradsketch (factors_kronfluence.json, lm_attribution.json).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import facts_lm
import gradient_peers
import torch
from gradient_workloads import Workload
from jaxtyping import Float
from lm_attribution import EVERY_EPOCH, RATES, Found, Judge, about_the_task, interval, once, sketched
from record import write
from torch import Tensor

D = 4096
WEIGHTS = ("1, the last", "1, epoch 8", "4")
State = dict[str, Tensor]
Rows = Float[Tensor, "n d"]


def workload(state: State) -> Workload:
    """Return training rows and then questions, padded on the right, where nothing counts."""
    model = facts_lm.untrained().eval()
    model.load_state_dict(state)
    rows, questions, _ = facts_lm.facts()
    batch = facts_lm.TASK.collate([*rows, *questions])
    return Workload("facts", model, batch["input_ids"], facts_lm.TASK, batch["labels"])


def trak(work: Workload, d: int) -> Callable[[], Rows]:
    """Project the gradients of TRAK's output, the margin, by dattri; training rows times 1 − p, as TRAK scores."""
    from dattri.func.projection import random_project

    work.model.set_attn_implementation("eager")
    tensors = {name: p.detach() for name, p in work.model.named_parameters()}
    (batch,) = work.batches(len(work.ids))

    def margin(values: State, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.func.functional_call(work.model, values, (ids[None],), {"use_cache": False}).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], reduction="none")
        p = torch.exp(-losses.sum() / (labels[1:] != -100).sum())
        return torch.log(p / (1 - p)), p

    each = torch.func.vmap(torch.func.grad(margin, has_aux=True), in_dims=(None, 0, 0), chunk_size=42)

    def rows() -> Rows:
        parts, p = each(tensors, batch["input_ids"], batch["labels"])
        gradients = torch.cat([part.flatten(1) for part in parts.values()], dim=1).nan_to_num()
        projected = random_project(gradients, len(gradients), d, gradient_peers.BATCH, device="cpu")(gradients)
        kept = 1 - p.detach()
        kept[len(facts_lm.facts()[0]) :] = 1
        return projected * kept[:, None]

    return rows


# Name → (package, what makes its rows).
PEERS: dict[str, tuple[str, Callable[[Workload, int], Callable[[], Rows]]]] = {
    "bergson, per layer, with biases": ("bergson", gradient_peers.bergson),
    "dattri-llm, LoGra, own seeds": ("dattri-llm", gradient_peers.dattri_llm),
    "logix, LoGra": ("logix-ai", gradient_peers.logix),
    "dattri, TRAK": ("dattri", trak),
}


def peer_scores(name: str, state: State) -> Found:
    """Return every score of a library's rows at one checkpoint."""
    of = workload(state)
    layers = 1 if name == "dattri, TRAK" else len(gradient_peers.block_layers(of.model))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # logix leaves a folder behind
        rows = PEERS[name][1](of, D)().detach()
    return dict(every_score(rows, layers))


def added(parts: list[Found]) -> Found:
    """Return the scores of several checkpoints, added up."""
    return {kind: torch.stack([part[kind] for part in parts]).sum(0) for kind in parts[0]}


def every_score(rows: Rows, layers: int) -> Iterator[tuple[str, Float[Tensor, "q n"]]]:
    """Yield the scores of the training rows for the questions, which come after them."""
    training, rows = len(facts_lm.facts()[0]), rows.double()
    blocks = rows.chunk(layers, dim=1)

    def split(x: Rows) -> tuple[Rows, Rows]:
        return x[:training], x[training:]

    def product(x: Rows) -> Float[Tensor, "q n"]:
        train, asked = split(x)
        return asked @ train.T

    yield "product", product(rows)
    yield "cosine", product(torch.nn.functional.normalize(rows))
    for rate in RATES:
        for name, parts in {"whole": (rows,), "each layer": blocks}.items():
            if name == "whole" or layers > 1:
                yield f"{name}, λ={rate:g}", sum(product(damped(part, training, rate)) for part in parts)  # type: ignore[misc]
        roots = torch.cat([damped(part, training, rate) for part in blocks], dim=1)
        yield f"TrackStar, λ={rate:g}", product(torch.nn.functional.normalize(roots))


def damped(x: Rows, training: int, rate: float) -> Rows:
    """Return (G + λ)^(−1/2) x, G being the mean of x xᵀ over training rows and λ ``rate`` times its mean eigenvalue."""
    _, singular, directions = torch.linalg.svd(x[:training], full_matrices=False)
    values = singular**2 / training
    shift = rate * values.sum() / x.shape[1]
    scales = (values + shift) ** -0.5 - shift**-0.5
    return x @ directions.T * scales @ directions + shift**-0.5 * x


def measured(kept: Path) -> dict[str, Any]:
    retrained = facts_lm.retrained(60, kept / "halves.json")
    model, states = facts_lm.trained(list(range(len(facts_lm.facts()[0]))))
    versions = {package: version_of(package) for package, _ in PEERS.values()}
    judge, entries = Judge(retrained), []
    for weights in WEIGHTS:
        epochs = EVERY_EPOCH[weights]
        judged = {name: judge.drawn(found) for name, found in _ours(model, states, epochs, kept)}
        best = judged["gradsketch, kfac, 16,384 of int4"][1]
        for name in (name for name, (package, _) in PEERS.items() if versions[package]):
            file = f"peers-{name.replace(' ', '_').replace(',', '')}"
            each = [once(kept / f"{file}-{e}.pt", lambda n=name, e=e: peer_scores(n, states[e])) for e in epochs]
            judged[name] = judge.drawn(added(each))
        for name, (entry, drawn) in judged.items():
            less = {} if name.startswith("gradsketch") else {"less_than_ours": interval(best - drawn)}
            entries.append({"scores": name, "weights": weights, "bytes_a_row": 2 * D * len(epochs)} | entry | less)
            print(json.dumps(entries[-1]), flush=True)
    return about_the_task(facts_lm.FACTS, model, retrained) | {"versions": versions, "table": entries}


def _ours(
    model: torch.nn.Module, states: list[State], epochs: tuple[int, ...], kept: Path
) -> Iterator[tuple[str, Found]]:
    for metric, d, store in ((None, D, "float16"), ("kfac", D, "float16"), ("kfac", 4 * D, "int4")):
        name, checkpoints = f"{metric or 'plain'}, {d:,} of {store}", [states[epoch] for epoch in epochs]
        file = kept / f"ours-{metric}-{d}-{'-'.join(map(str, epochs))}.pt"
        got = once(file, lambda c=checkpoints, m=metric, d=d, s=store: sketched(facts_lm.FACTS, model, c, m, d, s))
        yield f"gradsketch, {name}", got["sketches"]


def version_of(package: str) -> str | None:
    """Return the version of a library, or None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, help="folder in which finished halves and scores are kept")
    kept = parser.parse_args().kept or Path(tempfile.mkdtemp())
    kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(write("lm_attribution_peers", measured(kept)))


if __name__ == "__main__":
    main()
