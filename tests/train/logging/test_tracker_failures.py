"""Trackers that cannot start, cannot go on or cannot finish: a warning, and training goes on."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from accelerate import PartialState
from launches import CHECKOUT, LAUNCH, TIMEOUT, environment, metrics, settings

from rectvlm.config import Config
from rectvlm.train.logging import trackers as trackers_module
from rectvlm.train.logging.trackers import ExperimentTrackers

KEY = "0123456789" * 4
"""A key that W&B takes for one until it asks its server."""
NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A user with a home and W&B settings of their own."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    PartialState()
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def track(
    names: list[str], config: Config, folder: Path, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Start trackers, log a step, and close them; the warnings."""
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "rectvlm"):
        trackers = ExperimentTrackers(names, config, folder, 0, "2026-01-01T00:00:00")
        trackers.log_numbers({"loss": 1.0}, 1)
        trackers.close()
    assert time.monotonic() - start < 60
    messages = [record.getMessage() for record in caplog.records if "rectvlm" in record.name]
    assert not any("\n" in message for message in messages)
    return messages


def offline_files(folder: Path) -> list[Path]:
    return list(folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": NO_SERVER}, "does not answer"),
        ({"WANDB_API_KEY": "short", "WANDB_BASE_URL": NO_SERVER}, "WANDB_API_KEY invalid"),
        ({"WANDB_MODE": "online", "WANDB_BASE_URL": NO_SERVER}, "does not answer"),
    ],
    ids=["no network", "bad key", "asked to be online"],
)
def test_wandb_that_cannot_go_online_keeps_its_record_here(
    variables: dict[str, str],
    reason: str,
    user: pytest.MonkeyPatch,
    tiny: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in variables.items():
        user.setenv(name, value)
    (message,) = track(["wandb", "tensorboard"], tiny, tmp_path / "run", caplog)
    assert reason in message and "wandb sync" in message
    assert len(offline_files(tmp_path / "run")) == 1
    assert list((tmp_path / "run/tensorboard").rglob("events.*"))


def test_a_server_that_takes_connections_and_never_answers_holds_nothing_up(
    user: pytest.MonkeyPatch, tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user.setattr(trackers_module, "ANSWER_TIMEOUT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        user.setenv("WANDB_API_KEY", KEY)
        user.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        (message,) = track(["wandb"], tiny, tmp_path / "run", caplog)
    assert "does not answer" in message
    assert offline_files(tmp_path / "run")


def test_a_user_without_an_account_sees_no_warning(
    user: pytest.MonkeyPatch, tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert track(["wandb"], tiny, tmp_path / "run", caplog) == []
    assert offline_files(tmp_path / "run")


def test_an_unknown_mode_leaves_wandb_out_and_tensorboard_in(
    user: pytest.MonkeyPatch, tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user.setenv("WANDB_MODE", "sometimes")
    messages = track(["wandb", "tensorboard"], tiny, tmp_path / "run", caplog)
    assert messages and "wandb" in messages[-1]
    assert list((tmp_path / "run/tensorboard").rglob("events.*"))


def test_a_package_that_is_missing_leaves_its_tracker_out(
    user: pytest.MonkeyPatch, tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user.setitem(sys.modules, "wandb", None)
    (message,) = track(["wandb", "tensorboard"], tiny, tmp_path / "run", caplog)
    assert message.startswith("wandb failed") and "left out" in message


def test_a_folder_that_takes_no_files_leaves_tensorboard_out(
    user: pytest.MonkeyPatch, tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file in the folder's place")
    (message,) = track(["tensorboard", "wandb"], tiny, folder, caplog)
    assert message.startswith("tensorboard failed") and "left out" in message
    assert offline_files(folder)


@pytest.mark.slow
def test_training_goes_on_without_a_network_for_a_user_who_is_logged_in(
    tmp_path: Path, phantom_shards: Path
) -> None:
    variables = {
        "RECTVLM_TRACKERS": "wandb,tensorboard",
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": NO_SERVER,
    }
    done = subprocess.run(
        [
            *LAUNCH,
            *("--num_processes", "1", "launch/phase1.py"),
            *settings(1, phantom_shards, tmp_path, 2),
        ],
        cwd=CHECKOUT,
        env=environment(tmp_path) | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("cannot go online") == 1
    folder = tmp_path / "tiny/phase1"
    assert len(metrics(folder)) == 2
    assert offline_files(folder)
