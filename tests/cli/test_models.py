"""Models as people have them: adapters, device maps, quantised weights, no padding token; and names with a slip."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from gradsketch.cli import finding, main
from gradsketch.cli.loading import ModelOptions, load
from gradsketch.errors import InputError
from gradsketch.reading import connection, read_examples

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
constants = pytest.importorskip("huggingface_hub.constants")

WORDS = ["[UNK]", "[PAD]", *"abcdefghijklmnopqrstuvwxyz"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def words(folder, **special):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)
    fast.save_pretrained(folder)
    return folder


def llama(folder, kind="LlamaForCausalLM", **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **SMALL, **more)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return str(words(folder))


def lora(model, folder, task, kind="AutoModelForCausalLM"):
    peft = pytest.importorskip("peft")
    whole = getattr(transformers, kind).from_pretrained(model)
    adapted = peft.get_peft_model(whole, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path):
    return llama(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    texts = ["a b c", "x y z q r", "a y q", "k l"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)))
    return str(path)


def _without(monkeypatch, *packages):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in packages else real(name))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_what_takes_part(tmp_path, base, data, capsys):
    adapter = lora(base, tmp_path / "lora", "CAUSAL_LM")
    model, _ = load(ModelOptions(base, adapter=adapter))
    assert trainable(model)
    assert all("lora_" in name for name in trainable(model))
    assert not model.training
    command = ["check", "--model", base, "--data", data, "--d", "64", "--adapter", adapter]
    assert main(command) == 0
    assert "agree with autograd" in capsys.readouterr().out
    plain, adapted = (
        [p.detach() for p in load(ModelOptions(base, adapter=a))[0].parameters()] for a in (None, adapter)
    )
    assert len(adapted) > len(plain)
    with pytest.raises(InputError, match=f"a PEFT adapter without the model.*--model {base} --adapter {adapter}"):
        load(ModelOptions(adapter))
    with pytest.raises(InputError, match=r"without adapter_config\.json"):
        load(ModelOptions(base, adapter=base))
    assert ModelOptions(base).at(tmp_path / "lora") == ModelOptions(base, adapter=adapter)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_of_another_model_or_task_is_refused(tmp_path, base):
    classifier = llama(tmp_path / "classifier", "LlamaForSequenceClassification")
    for_classes = lora(classifier, tmp_path / "for-classes", "SEQ_CLS", "AutoModelForSequenceClassification")
    load(ModelOptions(classifier, adapter=for_classes))
    with pytest.raises(InputError, match=r"score\.weight, which this model does not have"):
        load(ModelOptions(base, adapter=for_classes))
    # The head that a base model lacks comes with the adapter.
    load(ModelOptions(base, adapter=for_classes, task="classification"))
    with pytest.raises(InputError, match=r"without weights for score\.weight"):
        load(ModelOptions(base, task="classification"))
    adapter = tmp_path / "lora"
    lora(base, adapter, "CAUSAL_LM")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(InputError, match=r"without base_model.*v_proj"):
        load(ModelOptions(base, adapter=str(adapter)))


def test_a_device_map(base, data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    assert (
        main(["index", str(tmp_path / "i"), "--model", base, "--data", data, "--d", "64", "--device-map", "auto"]) == 0
    )
    with pytest.raises(InputError, match="Leave --device out"):
        load(ModelOptions(base, device_map="auto", device="cpu"))
    _without(monkeypatch, "accelerate")
    with pytest.raises(InputError, match="pip install accelerate"):
        load(ModelOptions(base, device_map="auto"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_8_bits(tmp_path, base, data):
    if not any(map(importlib.util.find_spec, ("torchao", "bitsandbytes"))):
        pytest.skip("neither torchao nor bitsandbytes is installed")
    adapter = lora(base, tmp_path / "lora", "CAUSAL_LM")
    model, _ = load(ModelOptions(base, adapter=adapter, load_in="8bit"))
    assert all("lora_" in name for name in trainable(model))
    assert main(["check", "--model", base, "--data", data, "--adapter", adapter, "--load-in", "8bit", "--d", "64"]) == 0


def test_what_quantising_needs(base, monkeypatch):
    with pytest.raises(InputError, match=r"let no gradient through.*--load-in 8bit"):
        load(ModelOptions(base, load_in="4bit", device="cpu"))
    _without(monkeypatch, "bitsandbytes", "torchao")
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        load(ModelOptions(base, load_in="8bit"))


@pytest.mark.parametrize("place", ["model.gguf", "owner/model-GGUF", "folder"])
def test_gguf_is_refused_with_the_reason(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder/a.gguf", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"GGUF, which are rounded for inference and have no gradient"):
        load(ModelOptions(place))


@pytest.mark.parametrize(
    ("special", "config"),
    [({}, {}), ({"pad_token": "[PAD]"}, {}), ({}, {"pad_token_id": 1}), ({"eos_token": "z"}, {})],
)
def test_classifiers_without_a_padding_token(tmp_path, data, special, config):
    """A causal classifier reads off the last token that is no padding: alone and in a batch it must be the same."""
    folder = llama(tmp_path / "causal", "LlamaForSequenceClassification", **{"pad_token_id": None, **config})
    words(folder, **special)
    model, task = load(ModelOptions(folder))
    rows = list(read_examples(data))
    with torch.no_grad():
        together = task.losses(model, task.collate(rows))
        alone = torch.cat([task.losses(model, task.collate([row])) for row in rows])
    torch.testing.assert_close(together, alone)
    wanted = {"pad_token": 1, "eos_token": WORDS.index("z")}.get(next(iter(special), ""), config.get("pad_token_id", 0))
    assert model.config.pad_token_id == task.processor.pad_token_id == wanted


def test_a_tokenizer_without_bos(base, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": " b"}\n{"text": "a b c"}\n')
    command = ["index", str(tmp_path / "i"), "--model", base, "--data", str(tmp_path / "rows.jsonl"), "--d", "64"]
    assert main(command) == 0


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that says whether a model is there."""

    def do_GET(self):
        name, _, revision = self.path.removeprefix("/api/models/").partition("/revision/")
        wrong = "RepoNotFound" if name != "owner/there" else "RevisionNotFound" if revision == "v9" else None
        self.send_response(404 if wrong else 200)
        if wrong:
            self.send_header("X-Error-Code", wrong)
        self.end_headers()
        self.wfile.write(b'{"id": "owner/there", "modelId": "owner/there"}')

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
    finding.found.cache_clear()
    yield
    finding.found.cache_clear()
    server.shutdown()


def test_names_are_asked_for_before_anything_is_loaded(hub, monkeypatch):
    assert finding.found("owner/there", None) == ()
    assert finding.found("owner/there", "main") == (("revision", "main"),)
    with pytest.raises(InputError, match="no model that you may see on the hub"):
        finding.found("owner/thier", None)
    with pytest.raises(InputError, match="without a revision 'v9'"):
        finding.found("owner/there", "v9")
    with pytest.raises(InputError, match="no name that the hub allows"):
        finding.found("owner/th ere", None)
    with pytest.raises(InputError, match="no folder"):
        finding.found("a/b/c", None)
    for wrong in ({"tokenizer": "owner/thier"}, {"adapter": "owner/thier"}):
        with pytest.raises(InputError, match=r"'owner/thier'"):
            ModelOptions("owner/there", **wrong).find_early()
    finding.found.cache_clear()
    monkeypatch.setattr(connection, "hub_reached", lambda: False)
    with pytest.raises(InputError, match="not on this disk, and the hub is out of reach"):
        finding.found("owner/there", None)


def test_a_copy_on_this_disk_is_taken_without_a_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--there" / "snapshots" / "abc"
    llama(snapshot)
    (tmp_path / "models--owner--there" / "refs").mkdir()
    (tmp_path / "models--owner--there" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    finding.found.cache_clear()
    began = time.perf_counter()
    model, _ = load(ModelOptions("owner/there"))
    assert time.perf_counter() - began < 15  # where its own library tries for 25 seconds before it looks here
    assert type(model).__name__ == "LlamaForCausalLM"
    finding.found.cache_clear()
    with pytest.raises(InputError, match="--revision v1 of the folder"):
        load(ModelOptions(str(snapshot), revision="v1"))


def test_a_slip_in_a_name_costs_two_seconds_without_a_network(data):
    """Of which most is Python's own start; the hub's library alone would try for 25."""
    command = [sys.executable, "-m", "gradsketch", "index", "i", "--model", "owner/thier", "--data", data]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the hub is out of reach" in line
    assert time.perf_counter() - began < 8  # of a busy machine; 1 s of an idle one
