"""`rectvlm doctor`: each line says what was found, and what to do where something lacks."""

import socket
from pathlib import Path

import pytest

from rectvlm.cli import main
from rectvlm.doctor import checks
from rectvlm.doctor.checks import find_package_faults, try_all_reduce

NAMES = ["packages", "extras", "memory", "GPU", "NCCL", "disk", "shared memory"]


def test_every_line_has_a_state_and_a_remedy_where_something_lacks(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    listed = checks.run_checks()
    assert [check.name for check in listed] == [*NAMES, "network", "Hub token", "W&B"]
    for check in listed:
        assert check.finding and (check.state == "ok") == (check.remedy == "")
        assert "secret" not in check.finding + check.remedy


def test_the_command_prints_a_table_and_ends_with_1_only_for_what_is_needed(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        main(["doctor"])
    except SystemExit as end:
        code = int(str(end.code))
    table = capsys.readouterr().out
    assert code == int("failed" in table) and "what to do" in table
    for name in NAMES:
        assert name in table


def test_packages_that_are_missing_or_too_old_are_named():
    faults = find_package_faults(
        [
            *("numpy>=1", "numpy>=99", "no-such-package>=1"),
            *('also-none; extra == "ray"', 'scipy>=99; extra == "train"'),
        ]
    )
    assert len(faults) == 3 and faults[2].startswith("scipy ")
    assert faults[0].startswith("numpy ") and faults[0].endswith("expected >=99")
    assert faults[1] == "no-such-package is not installed"


def test_a_small_shared_memory_and_a_full_disk_are_faults(monkeypatch):
    monkeypatch.setattr(checks, "_MIN_SHARED_GB", 1e9)
    monkeypatch.setattr(checks, "_MIN_FREE_GB", 1e9)
    assert "--shm-size" in checks.check_shared_memory().remedy
    assert checks.check_disk().state == "missing"


def test_the_network_is_asked_for_the_hub_of_the_environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert checks.check_network().state == "ok"
    refused = checks.check_network()
    assert refused.state == "missing" and "HF_ENDPOINT" in refused.remedy


def test_keys_are_found_and_not_shown(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "wandb login" in checks.check_wandb().remedy
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    found = checks.check_wandb()
    assert found.state == "ok" and "secret" not in found.finding


@pytest.mark.slow
def test_processes_add_up_a_tensor_and_a_hung_one_is_ended():
    assert try_all_reduce("gloo", 2, 240) is None
    assert "no answer within" in str(try_all_reduce("gloo", 2, 0.01))
