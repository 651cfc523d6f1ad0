"""gradsketch beside other libraries: the same workload, the same run, in the environment that `make peers` sets up.

Without that environment the libraries that are absent are named, and ours stands alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.paper.numbers import shown, table
from benchmarks.paper.table import Results, Size, Table, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-peers/bin/python"
PACKAGES = (
    "bergson",
    "dattri",
    "dattri-llm",
    "traker",
    "logix-ai",
    "kronfluence",
    "captum",
    "curvlinops-for-pytorch",
    "pyhessian",
    "hessian-eigenthings",
    "scikit-learn",
    "opacus",
)
NOT_MEASURED = {
    "captum": "keeps no sketches: TracInCP forms the gradients again for every set of queries",
    "kronfluence": "keeps no sketches: it forms the training gradients again for every batch of queries",
}
LEGACY = "pyhessian calls torch.eig, which torch no longer has"
K = 10


def run(size: Size) -> Results:
    if size == "tiny":
        return measured(size)
    python = str(ENVIRONMENT) if ENVIRONMENT.exists() else sys.executable
    command = [python, "-W", "ignore", "-m", "benchmarks.paper.peers", size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    found: Results = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(size: Size) -> Results:
    """Measure in this process's environment."""
    parts: dict[str, Callable[[Size], Any]] = {"density": densities}
    if size != "tiny":
        parts |= {"gradients": gradients, "products": products, "eigenvalues": eigenvalues, "projections": projections}
        parts["lds"] = datamodeling
    results: Results = {"versions": versions()}
    for name, part in parts.items():
        print(f"peers: {name}", file=sys.stderr, flush=True)
        results[name] = part(size)
    return results


def versions() -> dict[str, str | None]:
    """Return the version of each package, None where it is absent."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def tried(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a library gives, or how it fails."""
    try:
        return job()
    except Exception as error:  # another library may raise anything
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def gradients(size: Size) -> list[dict[str, Any]]:
    """Per-example gradient sketches: benchmarks/gradient_peers.py."""
    import gradient_peers

    rows, _ = gradient_peers.compared(gradient_peers.w1(size == "quick"), list(gradient_peers.PEERS), size == "quick")
    return rows


def products(size: Size) -> dict[str, Any]:
    """Hessian-vector products: benchmarks/hvp_cost.py."""
    import hvp_cost

    found = hvp_cost.measure(*hvp_cost.gpt2(size == "quick"), pick(size, 1, 3, 9), exact=True)
    chosen = (
        "hessian, grad-of-grad, one batch",
        "hessian, grad-of-grad, streamed",
        "hessian, central-difference, one batch",
    )
    rows = {
        name: row for name, row in found["products"].items() if name in chosen or name.startswith(("curv", "hessian-"))
    }
    return {"n": found["n"], "rows": rows}


def eigenvalues(size: Size) -> dict[str, Any]:
    """Time and products to the top ten eigenvalues: benchmarks/spectrum.py."""
    import spectrum

    import gradsketch as gs

    model, batch = spectrum.gpt2(pick(size, 8, 32, 128))
    operator = gs.hessian(model, spectrum.losses, batch)

    def ours(**options: Any) -> dict[str, Any]:
        found = gs.spectrum(operator, K, progress=False, **options)
        return spectrum.record(operator, found)

    with torch.random.fork_rng():
        rows = {
            "gradsketch, full": tried(lambda: ours(method="full", steps=200)),
            "gradsketch, sketched basis": tried(lambda: ours(method="sketched-basis", steps=200)),
        }
        rows |= {peer.__name__: tried(lambda peer=peer: peer(operator, model, batch)) for peer in spectrum.PEERS}
    return {"n": operator.n, "rows": rows}


def densities(size: Size) -> dict[str, Any]:
    """Spectral densities against all exact eigenvalues: the first Wasserstein distance, over that of one point."""
    from scipy.stats import wasserstein_distance
    from spectrum_dimension import losses, trained

    import gradsketch as gs

    model, batch, _ = trained(pick(size, 1, 100, 400), pick(size, 4, 8, 16), 1)
    selection = gs.Parameters(model, ["transformer.h.*"])
    operator = gs.hessian(model, losses, batch, selection)
    dense = torch.cat([operator(rows) for rows in torch.eye(operator.n).split(64)]).detach()
    dense = (dense + dense.T) / 2
    exact = torch.linalg.eigvalsh(dense.double()).numpy()
    scale = wasserstein_distance(exact, [exact.mean()])
    runs, steps = pick(size, 2, 10, 10), pick(size, 10, 60, 60)
    rows = {}
    for name, make in DENSITIES.items():

        def one(make: Any = make) -> dict[str, Any]:
            start = time.perf_counter()
            places, weights, count = make(dense, operator, (model, batch), runs, steps)
            seconds = time.perf_counter() - start
            distance = wasserstein_distance(exact, places, v_weights=weights) / scale
            return {"distance": float(distance), "products": count, "seconds": seconds}

        rows[name] = tried(one)
    return {"n": operator.n, "runs": runs, "steps": steps, "rows": rows}


def own_density(dense: torch.Tensor, operator: Any, _: Any, runs: int, steps: int) -> tuple[Any, Any, int]:
    import gradsketch as gs

    found = gs.density(operator, probes=runs, steps=steps, progress=False)
    places = [x for nodes in found.nodes for x in nodes]
    weights = [w for each in found.weights for w in each]
    return places, weights, found.hvps


def eigenthings_density(dense: torch.Tensor, _: Any, __: Any, runs: int, steps: int) -> tuple[Any, Any, int]:
    from hessian_eigenthings import LambdaOperator, spectral_density

    operator = LambdaOperator(lambda v: dense @ v, len(dense))
    found = spectral_density(operator, num_runs=runs, lanczos_steps=steps, seed=0)
    return found.raw_eigenvalues.flatten().numpy(), found.raw_weights.flatten().numpy(), runs * steps


def curvlinops_density(_: Any, operator: Any, pair: Any, runs: int, steps: int) -> tuple[Any, Any, int]:
    from curvlinops import HessianLinearOperator, lanczos_approximate_spectrum
    from spectrum import Logits

    model, batch = pair
    torch.manual_seed(0)
    chosen = [p for name, p in model.named_parameters() if name.startswith("transformer.h.")]
    data = [(batch, batch["input_ids"][:, 1:].flatten())]
    size = len(batch["input_ids"])
    peer = HessianLinearOperator(Logits(model), torch.nn.CrossEntropyLoss(), chosen, data, batch_size_fn=lambda _: size)
    grid, density = lanczos_approximate_spectrum(peer, steps, num_repeats=runs)
    return grid.numpy(), density.clamp(min=0).numpy(), runs * steps


def pyhessian_density(_: Any, __: Any, pair: Any, runs: int, steps: int) -> tuple[Any, Any, int]:
    import pyhessian
    from spectrum import Logits, Movable

    model, batch = pair
    others = [p for name, p in model.named_parameters() if not name.startswith("transformer.h.")]
    for parameter in others:  # it takes all that has a gradient
        parameter.requires_grad_(False)
    try:
        torch.manual_seed(0)
        data = (Movable(batch), batch["input_ids"][:, 1:].flatten())
        peer = pyhessian.hessian(Logits(model), torch.nn.CrossEntropyLoss(), data=data, cuda=False)
        places, weights = peer.density(iter=steps, n_v=runs)
    except RuntimeError as error:
        if "linalg.eig" not in str(error):
            raise
        raise RuntimeError(LEGACY) from error
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
    return [x for row in places for x in row], [w for row in weights for w in row], runs * steps


DENSITIES: dict[str, Callable[..., tuple[Any, Any, int]]] = {
    "gradsketch": own_density,
    "hessian-eigenthings": eigenthings_density,
    "curvlinops": curvlinops_density,
    "pyhessian": pyhessian_density,
}


def projections(size: Size) -> dict[str, Any]:
    """Random projections of one vector: benchmarks/sketch_speed.py."""
    import contextlib

    import sketch_speed

    with contextlib.redirect_stdout(sys.stderr):
        return sketch_speed.peers(pick(size, 10, 16, 20), 256)


def datamodeling(_: Size) -> dict[str, Any]:
    """Return the linear datamodeling scores of benchmarks/attribution_quality.py, from its own JSON."""
    file = ROOT / "benchmarks/results/attribution_quality.json"
    found = json.loads(file.read_text(encoding="utf-8"))["results"]["lds"]["lds"]
    kept = {name: row for name, row in found.items() if name.endswith("1 model") or name in ("random", "pixels")}
    return {"file": file.name, "rows": kept}


def show(results: Results) -> str:
    parts = [_versions(results["versions"])]
    shows = {"gradients": _gradients, "products": _products, "eigenvalues": _eigenvalues, "density": _density,
             "projections": _projections, "lds": _lds}  # fmt: skip
    return "\n\n".join([*parts, *(show(results[name]) for name, show in shows.items() if name in results)])


def _versions(found: dict[str, str | None]) -> str:
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    absent = ", ".join(name for name, version in found.items() if not version)
    notes = "; ".join(f"{name} {why}" for name, why in NOT_MEASURED.items())
    return f"Here: {there or 'none'}." + (f" Not installed: {absent}." if absent else "") + f" Not measured: {notes}."


def _gradients(rows: list[dict[str, Any]]) -> str:
    header = [
        "sketches of per-example gradients",
        "d",
        "throughput over a plain pass",
        "peak, MB",
        "bytes a row",
        "Pearson r",
    ]
    body = []
    for row in rows:
        if "failed" in row:
            body.append(
                [f"{row['peer']} {row['version']}", row["asked"], row["failed"].replace("|", "/"), "–", "–", "–"]
            )
            continue
        low, high = row["pearson_interval"]
        r = shown({"value": row["pearson"], "low": low, "high": high}, ".3f")
        name = "**gradsketch**" if row["peer"] == "gradsketch" else f"{row['peer']} {row['version']}"
        body.append(
            [
                name,
                f"{row['d']:,}",
                f"{row['throughput']:.2f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['bytes']:,}",
                r,
            ]
        )
    return f"{table(header, body)}\n\n{_gradient_verdict([row for row in rows if 'failed' not in row])}"


def _gradient_verdict(rows: list[dict[str, Any]]) -> str:
    lines = []
    for ours in (row for row in rows if row["peer"] == "gradsketch"):
        others = [r for r in rows if r["peer"] != "gradsketch" and abs(r["d"] / ours["d"] - 1) < 0.05]
        faster = [r["peer"] for r in others if r["throughput"] > ours["throughput"]]
        better = [r["peer"] for r in others if r["pearson"] > ours["pearson"]]
        lines.append(
            f"At d = {ours['d']:,}, faster than gradsketch: {'; '.join(faster) or 'none'}. With a larger r: "
            f"{'; '.join(better) or 'none'}."
        )
    return " ".join(lines)


def _products(found: dict[str, Any]) -> str:
    header = [f"Hessian-vector product, n = {found['n']:,}", "time, gradients", "peak, n-vectors", "relative error"]
    rows = [
        [name, f"{row['gradients (median)']:.2f}", f"{row['peak n-vectors']:.1f}", f"{row['relative error']:.1e}"]
        for name, row in found["rows"].items()
    ]
    return table(header, rows)


def _eigenvalues(found: dict[str, Any]) -> str:
    header = [
        f"top ten eigenvalues, n = {found['n']:,}",
        "products",
        "seconds",
        "n-vectors held",
        "median residual",
        "largest",
    ]
    rows = [
        [name, row["failed"].replace("|", "/"), *["–"] * 4]
        if "failed" in row
        else [name, row["hvps"], f"{row['seconds']:.1f}", row["vectors_held"], f"{row['residual_median']:.1e}",
              f"{row['residual_max']:.1e}"]
        for name, row in found["rows"].items()
    ]  # fmt: skip
    return table(header, rows)


def _density(found: dict[str, Any]) -> str:
    header = [f"spectral density, n = {found['n']:,}", "distance from the exact one", "products", "seconds"]
    rows = [
        [name, row["failed"].replace("|", "/"), "–", "–"]
        if "failed" in row
        else [name, f"{row['distance']:.2%}", row["products"], f"{row['seconds']:.2f}"]
        for name, row in found["rows"].items()
    ]
    return (
        f"{table(header, rows)}\n\nThe distance is Wasserstein's first, over that of the exact spectrum from a "
        "single point; "
        f"{found['runs']} probes of {found['steps']} steps. hessian-eigenthings works on the stored matrix here, "
        "the others on "
        "products with the model, so its seconds do not compare."
    )


def _projections(found: dict[str, Any]) -> str:
    header = [f"one vector of 2^{found['log2_n']} numbers to d = {found['d']}", "ms"]
    absent = f"\n\nAbsent: {', '.join(found['absent'])}." if found["absent"] else ""
    return table(header, [[name, shown(1e3 * s)] for name, s in found["seconds"].items()]) + absent


def _lds(found: dict[str, Any]) -> str:
    rows = [[name, f"{row['value']:.3f} ± {row['standard_error']:.3f}"] for name, row in best(found["rows"]).items()]
    return table([f"linear datamodeling score on digits, one model (`{found['file']}`)", ""], rows)


def best(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return ours at d = 1,024, the references, and each peer at its best setting."""
    chosen = {
        name: row for name, row in rows.items() if "d=1024, 1 model" in name or "exact" in name or "," not in name
    }
    for peer in ("dattri_trak", "traker"):
        settings = {name: row for name, row in rows.items() if name.startswith(peer)}
        if settings:
            top = max(settings, key=lambda name: settings[name]["value"])
            chosen[top] = settings[top]
    return dict(sorted(chosen.items(), key=lambda item: -item[1]["value"]))


def short(results: Results) -> tuple[str, str]:
    rows = [row for row in results.get("gradients", []) if "failed" not in row]
    size = min((row["d"] for row in rows if row["peer"] == "gradsketch"), default=0)
    near = [row for row in rows if size and abs(row["d"] / size - 1) < 0.05]
    here = "; ".join(f"{row['peer'].split(',')[0]} {row['pearson']:.2f} at {row['throughput']:.2f} ×" for row in near)
    return "–", f"r of per-example sketches at d = {size:,}, and throughput: {here}"


def draw(results: Results) -> Figure:
    from benchmarks.paper import style

    rows = [row for row in results.get("gradients", []) if "failed" not in row]
    figure, (axes,) = style.new()
    for name, look in style.styles(list(dict.fromkeys(row["peer"] for row in rows))).items():
        for row in (row for row in rows if row["peer"] == name):
            low, high = row["pearson_interval"]
            number = {"value": row["pearson"], "low": low, "high": high}
            style.series(
                axes, [row["throughput"]], [number], look | {"linestyle": "none", "markersize": 4 + row["d"] / 8192}
            )
            look.pop("label", None)
    axes.set(
        xlabel="throughput over a plain forward and backward pass",
        ylabel="Pearson r; larger marks: larger d",
        ylim=(0, 1.05),
    )
    return style.finished(figure, legend=axes)


TABLE = Table(
    "peers",
    "Beside other libraries",
    "[P] compares with none of them.",
    17,
    run,
    show,
    short,
    draw,
)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(measured(sys.argv[1])))  # type: ignore[arg-type]
