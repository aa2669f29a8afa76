"""Reports that a server writes: the texts that the model itself would write."""

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import phantom_sample
from vllm_server import running_vllm

from rectvlm import pretrained
from rectvlm.checkpoint import Checkpoint, TrainingState
from rectvlm.cli import main
from rectvlm.config import MODEL_PARTS, Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.evaluate.case_evaluation import CaseEvaluator
from rectvlm.evaluate.case_groups import CaseGroup
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.report_server import ReportServer, write_start_command
from rectvlm.models import RectVLM
from rectvlm.models.language_model import load_language_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.report_decoding import ReportPrompt
from rectvlm.types import Batch, UserError

GROUP = CaseGroup("evaluate", [[0, 1, 2]])
ADAPTER = {"id": "reports", "parent": "tiny", "root": "/no/such/adapter"}


def save_model(folder: Path, *options: str) -> Checkpoint:
    """A model whose adapter has effect, with an unpacked language model."""
    config = load_config("tiny", ["generator.quantization=none", *options])
    torch.manual_seed(0)
    prompts = PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(config.text.model), config.text.max_tokens
    )
    language = load_language_model(
        config.generator, pretrained.resolve_model(config.generator.model)
    )
    model = RectVLM(config, MODEL_PARTS, prompts, language)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, training=TrainingState(3, 0, 0, 1))
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, models_folder: None, phantom_shards: Path
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    options = (f"data.shards={phantom_shards}", "generator.max_report_tokens=12")
    return save_model(folder, *options)


@pytest.fixture(scope="module")
def batch(tiny: Config) -> Batch:
    samples = [phantom_sample(seed, tiny, "valid") for seed in range(3)]
    for sample, indication in zip(samples, (None, "Cough", "Fever and weight loss"), strict=True):
        sample.meta = replace(sample.meta, indication=indication, technique=None)
    return collate_samples(samples)


@contextmanager
def serving(models: list[dict[str, Any]], checkpoint: Checkpoint | None = None) -> Iterator[str]:
    """A server with vLLM's interface, one prompt a call; yields its address."""
    model = None if checkpoint is None else RectVLM.from_checkpoint(checkpoint, "cpu")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": models})

        def do_POST(self) -> None:
            assert model is not None and model.generator is not None
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["model"], body["temperature"]) == ("reports", 0.0)
            assert body["repetition_penalty"] == 1.0
            file = io.BytesIO(base64.b64decode(body["prompt_embeds"]))
            embeds = torch.load(file, weights_only=True)[None]
            if embeds.shape[1] > 400:
                message = "This model's maximum context length is 400 tokens."
                self.answer({"error": {"message": message, "code": 400}}, status=400)
                return
            tokens = model.generator.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                eos_token_id=body["stop_token_ids"],
                do_sample=False,
            )
            text = model.generator.tokenizer.decode(tokens[0], skip_special_tokens=True)
            self.answer({"choices": [{"text": text}]})

        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def evaluate(checkpoint: Checkpoint, out: Path, *options: str) -> list[dict[str, Any]]:
    """Reports of two cases, as `rectvlm evaluate` writes them."""
    command = ["evaluate", "--checkpoint", str(checkpoint.folder), "--out", str(out / "m.json")]
    command += ["--device", "cpu", "--limit", "2", "--fit-limit", "2", "--bootstrap", "0"]
    assert main([*command, "--no-plots", *options]) == 0
    return [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]


def test_a_server_writes_what_the_model_would(checkpoint: Checkpoint, tmp_path: Path) -> None:
    own = evaluate(checkpoint, tmp_path / "own")
    adapter = ADAPTER | {"root": str(checkpoint.folder / "adapter")}
    with serving([{"id": "tiny", "parent": None}, adapter], checkpoint) as url:
        served = evaluate(checkpoint, tmp_path / "served", "--report-server", f"{url}/v1/")
    assert served == own
    assert len(own) == 2 and all(report["generated"] for report in own)


def test_beside_a_server_word_embeddings_are_all_that_is_loaded(checkpoint: Checkpoint) -> None:
    model = RectVLM.from_checkpoint(checkpoint, "cpu", word_embeddings_only=True)
    names = {name for name, _ in model.named_parameters() if "language_model" in name}
    assert names == {"generator.language_model.embedding.weight"}
    whole = RectVLM.from_checkpoint(checkpoint, "cpu")
    assert model.generator is not None and whole.generator is not None
    prompts = [
        ReportPrompt(torch.randn(8, 64), cues) for cues in ("nodule", "effusion on the left")
    ]
    for light, full in zip(
        model.generator.embed_prompts(prompts), whole.generator.embed_prompts(prompts), strict=True
    ):
        assert torch.equal(light, full)


@pytest.mark.slow
def test_vllm_writes_what_the_model_would(tmp_path: Path, batch: Batch) -> None:
    """In float32 on the CPU: in bf16 two engines round otherwise, and texts of a model that has not
    learned part where two words are almost equally likely."""
    options = ("generator.model=bundled:smollm2-135m-instruct", "generator.max_report_tokens=48")
    checkpoint = save_model(tmp_path / "model", *options)
    model = RectVLM.from_checkpoint(checkpoint, "cpu").float()
    evaluation = EvaluationOptions(surface_tolerance=5.0)
    own = CaseEvaluator(model, evaluation).evaluate_group(GROUP, iter([batch]))
    with running_vllm(tmp_path / "server", write_start_command(checkpoint)) as url:
        server = ReportServer(url, checkpoint)
        served = CaseEvaluator(model, evaluation, server).evaluate_group(GROUP, iter([batch]))
    for own_record, record in zip(own, served, strict=True):
        assert record.generated == own_record.generated
        assert record.without_image == own_record.without_image
    assert len({record.generated for record in own}) > 1


@pytest.mark.parametrize("adapters", [[], [ADAPTER, ADAPTER]])
def test_a_server_without_one_adapter_is_refused(
    checkpoint: Checkpoint, adapters: list[dict[str, Any]]
) -> None:
    count = f"serves {len(adapters)} adapters, but one"
    models = [{"id": "tiny", "parent": None}, *adapters]
    with serving(models) as url, pytest.raises(UserError, match=count):
        ReportServer(url, checkpoint)


def test_the_adapter_of_another_checkpoint_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = bytearray((checkpoint.folder / "adapter/adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    adapter = ADAPTER | {"root": str(tmp_path)}
    with serving([adapter]) as url, pytest.raises(UserError, match="is not that of"):
        ReportServer(url, checkpoint)
    with serving([ADAPTER]) as url:
        ReportServer(url, checkpoint)
    assert "not on this machine: not compared" in caplog.text


def test_what_a_server_answers_to_a_bad_prompt_is_told(checkpoint: Checkpoint) -> None:
    with serving([ADAPTER], checkpoint) as url:
        server = ReportServer(url, checkpoint)
        with pytest.raises(
            UserError, match="400: This model's maximum context length is 400 tokens"
        ):
            server.write_reports([torch.zeros(401, 64)], 4, [0])


def test_a_server_that_is_not_there_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"refused.*--max-lora-rank 8 .* qkv_proj.*--report-server"):
        ReportServer("http://127.0.0.1:9", checkpoint)
    with pytest.raises(UserError, match=r"expects http://HOST:PORT, not file"):
        ReportServer("file:///etc/passwd", checkpoint)
