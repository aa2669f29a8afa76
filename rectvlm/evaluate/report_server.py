"""Reports that a vLLM server writes, from prompts of embeddings.

The server holds the language model with the checkpoint's adapter and decodes hundreds of reports at
once, on as many GPUs as it is given. It runs in an environment, and on a machine, of its own.
"""

import base64
import contextlib
import io
import json
import logging
import shlex
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectvlm.checkpoint import Checkpoint
from rectvlm.checkpoint.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS_FILE,
)
from rectvlm.files import file_sha256, read_json_object
from rectvlm.pretrained import resolve_model
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)

MAX_REQUESTS = 128
"""Reports that are asked for at once; the server batches them as its memory allows."""
TIMEOUT_SECONDS = 3600
"""Time after which a report counts as lost; it waits for others where memory is short."""
MAX_MESSAGE_LENGTH = 500
"""Characters of a server's error that are told."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM may be told to make room for."""
FUSED_LAYERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""Layers that vLLM computes as one, by their names in Transformers."""


def write_start_command(checkpoint: Checkpoint) -> str:
    """The command that starts a server for a checkpoint.

    It names the layers of the adapter. By default vLLM wraps the word embeddings too, and fails
    where a batch holds prompts of embeddings beside tokens (0.32, on a CPU).
    """
    adapter = read_json_object(
        checkpoint.folder / ADAPTER_CONFIG_FILE, "fetch or export the model again"
    )
    names = [name.rpartition(".")[2] for name in adapter["target_modules"]]
    layers = sorted({FUSED_LAYERS.get(name, name) for name in names})
    rank = next((rank for rank in LORA_RANKS if rank >= adapter["r"]), adapter["r"])
    model = resolve_model(checkpoint.config.generator.model, checkpoint.folder)
    return (
        f"vllm serve {shlex.quote(str(model))} --enable-prompt-embeds --enable-lora "
        f"--max-lora-rank {rank} --lora-target-modules {' '.join(layers)} "
        f"--lora-modules {shlex.quote(f'reports={checkpoint.folder / ADAPTER_FOLDER}')}"
    )


class ReportServer:
    """A vLLM server with a checkpoint's language model and adapter."""

    def __init__(self, url: str, checkpoint: Checkpoint) -> None:
        """Ask the server what it serves.

        Args:
            url: address of the server, such as `http://127.0.0.1:8000`.
            checkpoint: whose adapter it serves.

        Raises:
            UserError: it does not answer, or serves no adapter, several, or that of another
                checkpoint.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--report-server expects http://HOST:PORT, not {url}.")
        self._start_command = write_start_command(checkpoint)
        served = self._request("models")["data"]
        adapters = [model for model in served if model.get("parent")]
        if len(adapters) != 1:
            raise UserError(
                f"The server {self.url} serves {len(adapters)} adapters, but one was expected, "
                f"that of the checkpoint: start it with `{self._start_command}`."
            )
        self.adapter: str = adapters[0]["id"]
        self._compare_adapter(Path(adapters[0]["root"]), checkpoint)

    def write_reports(
        self, prompts: Sequence[Tensor], max_tokens: int, end_tokens: Sequence[int]
    ) -> list[str]:
        """Write a report for each prompt, by greedy decoding.

        Args:
            prompts: (T, E) each, embeddings of a whole prompt.
            max_tokens: length at which a report is cut.
            end_tokens: tokens that end a report.

        Raises:
            UserError: the server refuses a prompt, or stops.
        """
        settings = {
            "model": self.adapter,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            # The model's own file of settings may have others.
            "repetition_penalty": 1.0,
            "stop_token_ids": list(end_tokens),
        }

        def write_report(prompt: Tensor) -> str:
            answer = self._request("completions", settings | {"prompt_embeds": _encode(prompt)})
            text: str = answer["choices"][0]["text"]
            return text.strip()

        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            return list(pool.map(write_report, prompts))

    def _compare_adapter(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Compare the weights of the served adapter, where this machine has its folder."""
        own = checkpoint.folder / ADAPTER_WEIGHTS_FILE
        served = folder / own.name
        if not served.is_file():
            log.warning("The server's adapter %s is not on this machine: not compared", folder)
        elif file_sha256(served) != file_sha256(own):
            raise UserError(
                f"The server {self.url} serves the adapter in {folder}, which is not that of "
                f"{checkpoint.folder}: start it with `{self._start_command}`."
            )

    def _request(self, path: str, body: JsonObject | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = f"{error.code}: {_read_message(error.read())}"
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error))
        raise UserError(
            f"The report server gave no answer to {request.full_url} ({reason}): start it with "
            f"`{self._start_command}`, or correct --report-server."
        )


def _read_message(answer: bytes) -> str:
    """What a server says of an error, on one line."""
    text = answer.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:MAX_MESSAGE_LENGTH]


def _encode(tensor: Tensor) -> str:
    """A tensor as vLLM takes it, base64 of a file of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()
