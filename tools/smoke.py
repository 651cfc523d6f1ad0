"""What a freshly installed gradsketch must do, without any extra: sketch, index, ask, and take a spectrum."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gradsketch as gs

torch.manual_seed(0)
model, task = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)), gs.Classification()
data = [(torch.randn(20), i % 3) for i in range(48)]
with tempfile.TemporaryDirectory() as folder:
    index = gs.build_index(Path(folder) / "index", model, task, data, d=64, progress=False)
    hits = index.query(model, data[:1], k=1)
    assert hits[0][0].row == 0, hits
    assert hits.to_html(Path(folder) / "why.html").stat().st_size > 10_000
    reranked = index.query(model, data[:1], k=1, rerank=10, data=data)
    assert reranked[0][0].row == 0, reranked
    command = [sys.executable, "-m", "gradsketch", "verify", str(Path(folder) / "index")]
    assert "sound" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
top = gs.spectrum(gs.hessian(model, task, data), k=2, progress=False)
assert len(top.values) == 2
print(f"gradsketch {gs.__version__} with torch {torch.__version__} on Python {sys.version.split()[0]}: works")
