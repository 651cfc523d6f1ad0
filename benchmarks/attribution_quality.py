"""Are the scores right? Retraining, wrong labels and removal on digits, next to exact gradients and plain baselines.

    python benchmarks/attribution_quality.py            # and --quick

Writes benchmarks/results/attribution_quality.json. A small network is trained on digits, a tenth with a wrong label.

* lds: linear datamodeling score over models trained on random halves; scores from sketches of several d, from the exact
  gradients in float64 by the same formula, from pixels alone, and at random. "5 models" adds up five trainings (as
  checkpoints of one index). Peers run where they are installed (pip install --no-deps dattri traker): at λ = 0, their
  default, with half as many numbers as examples, which inverting XᵀX takes; and with 1,024 numbers at several λ.
* pearson: correlation of sketched with exact scores, over all pairs of query and training example.
* mislabelled: AUC of self-influence for the flipped labels, always beside the plain training loss, for several seeds.
* removal: rise of a wrong answer's loss when its 20 strongest proponents go, beyond that of 20 random ones.

Models that learn from the same rows are trained once. Two processes share the parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from record import table, write
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.attribution.scores import KINDS
from gradsketch.demo.digits import digits_net, flipped_digits
from gradsketch.demo.training import train_model
from gradsketch.evaluation import mislabelled_auc, removal_check, retrain_on_subsets
from gradsketch.evaluation.lds import linear_datamodeling_score
from gradsketch.random import Stream

TRAIN, QUERIES, RATE, EPOCHS, BATCH, DAMPING = 600, 50, 3e-3, 15, 50, 1.0
PEER_SETTINGS = ((TRAIN // 2, 0.0), *((1024, 10.0**e) for e in range(-2, 4)))  # (d, λ in a peer's own units)
TASK = gs.Classification()
Scores = Float[Tensor, "q n"]


def trained(examples: list[Any], seed: int = 0) -> nn.Module:
    model = digits_net(seed)
    train_model(model, TASK, examples, rate=RATE, epochs=EPOCHS, batch=BATCH, seed=seed)
    return model.eval()


def sketched(models: list[nn.Module], train: list[Any], queries: list[Any], d: int) -> dict[str, Scores]:
    """Scores of every training example by ``Index.query``; several models are the index's checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        states = [model.state_dict() for model in models]
        index = gs.build_index(folder, models[0], TASK, train, d=d, checkpoints=states, progress=False)
        found = {}
        for kind in KINDS:
            found[kind] = table(index.query(models[0], queries, k=len(train), score=kind, damping=DAMPING))
        return found


def gradients(model: nn.Module, examples: list[Any]) -> Float[Tensor, "n p"]:
    """Exact per-example gradients in float64, by torch.func."""
    wide = digits_net().double()
    wide.load_state_dict(model.state_dict())
    batch = TASK.collate(examples)
    pixels, labels = batch["pixels"].double(), batch["labels"]

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(wide, parameters, (x[None],))
        return nn.functional.cross_entropy(logits, y[None])

    parameters = {name: p.detach() for name, p in wide.named_parameters()}
    parts = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, pixels, labels)
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


def exact(q: Float[Tensor, "m p"], x: Float[Tensor, "n p"]) -> dict[str, Float[Tensor, "m n"]]:
    """The four scores by their formulas, from exact gradients (n < p: by the push-through identity)."""
    scores = {}
    for kind in KINDS.values():
        a, b = (z / z.norm(dim=1, keepdim=True) if kind.unit_length else z for z in (q, x))
        products = a @ b.T
        if kind.preconditioned:
            gram = b @ b.T
            shift = DAMPING * gram.trace() / min(b.shape)
            products = torch.linalg.solve(gram + shift * torch.eye(len(b), dtype=b.dtype), products.T).T
        scores[kind.name] = products
    return scores


def pixel_cosine(train: list[Any], queries: list[Any]) -> Scores:
    """Alike in pixels and of one label counts for, of another label against."""
    x, q = (torch.stack([e["pixels"].flatten() for e in examples]).double() for examples in (train, queries))
    same = torch.tensor([[1.0 if a["label"] == b["label"] else -1.0 for b in train] for a in queries])
    return nn.functional.normalize(q) @ nn.functional.normalize(x).T * same


def peers(models: list[nn.Module], train: list[Any], queries: list[Any]) -> dict[str, tuple[Scores, float]]:
    found: dict[str, tuple[Scores, float]] = {}
    for package, run in (("dattri", dattri_trak), ("trak", traker)):
        if importlib.util.find_spec(package) is not None:
            for d, shift in PEER_SETTINGS:
                start = time.perf_counter()
                scores = run(models, train, queries, d, shift)
                found[f"{run.__name__}, d={d}, λ={shift:g}"] = scores, time.perf_counter() - start
    return found


def dattri_trak(models: list[nn.Module], train: list[Any], queries: list[Any], d: int, shift: float) -> Scores:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    model = digits_net().eval()

    def loss(parameters: Any, pair: Any) -> Tensor:
        logits = torch.func.functional_call(model, parameters, pair[0][None])
        return nn.functional.cross_entropy(logits, pair[1][None])

    def margin(parameters: Any, pair: Any) -> Tensor:
        p = torch.exp(-loss(parameters, pair))
        return torch.log(p / (1 - p))

    def probability(parameters: Any, pair: Any) -> Tensor:
        return torch.exp(-loss(parameters, pair))

    def loader(examples: list[Any]) -> DataLoader[Any]:
        batch = TASK.collate(examples)
        return DataLoader(TensorDataset(batch["pixels"], batch["labels"]), batch_size=50)

    states = [m.state_dict() for m in models]
    task = AttributionTask(loss_func=margin, model=model, checkpoints=states)
    kept = {"proj_dim": d, "device": "cpu"}
    attributor = TRAKAttributor(task, probability, projector_kwargs=kept, regularization=shift)
    attributor.cache(loader(train))
    return attributor.attribute(loader(queries)).T.double().detach()


def traker(models: list[nn.Module], train: list[Any], queries: list[Any], d: int, shift: float) -> Scores:
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in models[0].parameters())

    def projector() -> BasicProjector:
        return BasicProjector(size, d, 0, ProjectionType.rademacher, "cpu", block_size=d)

    with tempfile.TemporaryDirectory() as folder:
        run = TRAKer(
            digits_net().eval(), "image_classification", len(train), folder, device="cpu", projector=projector(),
            proj_dim=d, use_half_precision=False, logging_level=40, lambda_reg=shift,
        )  # fmt: skip
        for number, model in enumerate(models):
            run.load_checkpoint(model.state_dict(), model_id=number)
            run.featurize(traker_batch(train), num_samples=len(train))
        run.finalize_features()
        run.projector = projector()  # its matrix was freed
        for number, model in enumerate(models):
            run.start_scoring_checkpoint("queries", model.state_dict(), number, num_targets=len(queries))
            run.score(traker_batch(queries), num_samples=len(queries))
        return torch.tensor(run.finalize_scores("queries")).T.double()


def traker_batch(examples: list[Any]) -> list[Tensor]:
    batch = TASK.collate(examples)
    return [batch["pixels"], batch["labels"]]


def lds(subsets: int, sizes: tuple[int, ...], ensemble: int) -> dict[str, Any]:
    train, test = flipped_digits()
    train, queries = train[:TRAIN], test[:QUERIES]
    retrainings = retrain_on_subsets(
        lambda rows: trained([train[row] for row in rows]),
        lambda model: TASK.losses(model, TASK.collate(queries)),
        TRAIN,
        subsets=subsets,
    )
    models = [trained(train, seed) for seed in range(ensemble)]
    scores: dict[str, Scores] = {
        "random": Stream(0, "chance").normals(0, QUERIES * TRAIN).view(QUERIES, TRAIN).double(),
        "pixels": pixel_cosine(train, queries),
    }
    pearson: dict[str, float] = {}
    groups = {"1 model": models[:1], f"{ensemble} models": models}
    seconds: dict[str, float] = {}
    for name, group in groups.items():
        parts = [exact(gradients(m, queries), gradients(m, train)) for m in group]
        truth = {kind: sum(part[kind] for part in parts) / len(parts) for kind in KINDS}
        scores |= {f"{kind}, exact, {name}": value for kind, value in truth.items()}
        for d in sizes:
            start = time.perf_counter()
            found = sketched(group, train, queries, d)
            seconds[f"all four, d={d}, {name}"] = time.perf_counter() - start
            scores |= {f"{kind}, d={d}, {name}": value for kind, value in found.items()}
            for kind, value in found.items():
                pair = torch.stack([value.flatten(), truth[kind].flatten()])
                pearson[f"{kind}, d={d}, {name}"] = float(torch.corrcoef(pair)[0, 1])
        for peer, (value, took) in peers(group, train, queries).items():
            scores[f"{peer}, {name}"], seconds[f"{peer}, {name}"] = value, took
    found = {name: linear_datamodeling_score(value, retrainings) for name, value in scores.items()}
    return {
        "train": TRAIN,
        "queries": QUERIES,
        "subsets": subsets,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "retraining_seconds": retrainings.seconds,
        "lds": {name: {"value": s.value, "standard_error": s.standard_error} for name, s in found.items()},
        "pearson": pearson,
        "seconds": seconds,
    }


def mislabelled(seeds: int, d: int) -> list[dict[str, Any]]:
    results = []
    for seed in range(seeds):
        train, _ = flipped_digits(seed=seed)
        wrong = torch.tensor([example["flipped"] for example in train])
        model = trained(train, seed)
        x = gradients(model, train)
        with tempfile.TemporaryDirectory() as folder:
            index = gs.build_index(folder, model, TASK, train, d=d, progress=False)
            for kind in ("dot", "influence", "ridge"):
                own = index.self_influence(kind, damping=DAMPING)
                result = mislabelled_auc(own.values, own.losses, wrong)
                true = mislabelled_auc(exact(x, x)[kind].diagonal(), own.losses, wrong)
                results.append(
                    {
                        "seed": seed,
                        "score": kind,
                        "d": d,
                        "auc": result.suspicion.value,
                        "standard_error": result.suspicion.standard_error,
                        "auc, exact gradients": true.suspicion.value,
                        "auc, plain loss": result.loss.value,
                        "difference": result.difference,
                        "difference_standard_error": result.difference_standard_error,
                    }
                )
    return results


def removal(asked: int, k: int, d: int) -> dict[str, Any]:
    """Remove what is behind the network's own answers to the test images it gets most wrong."""
    train, test = flipped_digits()
    train = train[:TRAIN]
    model = trained(train)
    losses = TASK.losses(model, TASK.collate(test))
    worst = [test[row] for row in losses.argsort(descending=True)[:asked].tolist()]
    said = model(TASK.collate(worst)["pixels"]).argmax(-1).tolist()
    queries = [{**example, "label": label} for example, label in zip(worst, said, strict=True)]
    found = sketched([model], train, queries, d)
    found["pixels"] = pixel_cosine(train, queries)
    once = cache(lambda rows: trained([train[row] for row in rows]))
    results = {}
    for name, scores in found.items():
        check = removal_check(
            lambda rows: once(tuple(rows)),
            lambda model: TASK.losses(model, TASK.collate(queries)),
            len(train),
            scores.topk(k).indices.tolist(),
        )
        results[name] = {
            "rise": check.value,
            "standard_error": check.standard_error,
            "loss_before": float(check.before.mean()),
            "loss_without_found": float(check.after.mean()),
            "loss_without_random": float(check.random.mean()),
            "models": check.models,
        }
    return {"queries": asked, "removed": k, "train": len(train), "d": d, "scores": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few models, written to no file")
    quick = parser.parse_args().quick
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = {
            "lds": pool.submit(lds, *((4, (1024,), 2) if quick else (80, (256, 1024, 4096), 5))),
            "removal": pool.submit(removal, *((2, 20, 1024) if quick else (12, 20, 2048))),
            "mislabelled": pool.submit(mislabelled, *((1, 1024) if quick else (3, 2048))),
        }
        results = {name: part.result() for name, part in parts.items()}
    print(json.dumps(results, indent=1))
    if not quick:
        print(write("attribution_quality", results))


if __name__ == "__main__":
    main()
