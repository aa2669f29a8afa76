"""Outputs are tried before the work of a command, and names are bytes."""

import json
import os
from pathlib import Path

import pytest

from data_pipeline import preprocess
from data_pipeline.make_shards.shard_plan import SHARD_RECORD_ADAPTER, RejectedCase, ShardRecord
from rectvlm.cli import main
from rectvlm.data.store import ShardStore
from rectvlm.files import encode_json_text
from rectvlm.types import UserError
from tests.small_cases import small_case


@pytest.mark.parametrize("command", ["evaluate", "export", "pull"])
def test_an_output_that_cannot_be_written_is_one_sentence(tiny_run, tmp_path, capsys, command):
    (tmp_path / "taken").write_text("mine")
    out = f"--out={tmp_path / 'taken' / 'deep' / 'out'}"
    arguments = {
        "evaluate": ["evaluate", "--checkpoint", str(tiny_run(1)), "--device=cpu"],
        "export": ["export", "--checkpoint", str(tiny_run(1))],
        "pull": ["weights", "pull", "someone/model", "--from", "http://127.0.0.1:9"],
    }[command]
    assert main([*arguments, out]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'taken'} is no folder" in error and "Traceback" not in error


def test_preprocessing_tries_its_folder_first(tmp_path, caplog):
    (tmp_path / "taken").write_text("mine")
    assert preprocess.main(["--out", str(tmp_path / "taken" / "shards"), "--no-samples"]) == 2
    assert f"{tmp_path / 'taken'} is no folder" in caplog.text


def test_a_tilde_in_the_place_of_shards_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardStore("~/shards").local_folder == tmp_path / "shards"
    assert str(ShardStore("~/shards")) == str(tmp_path / "shards")


def test_a_rejected_case_may_have_a_name_that_is_no_utf8():
    name = os.fsdecode(b"J\xf6rg.nii")
    rejected = RejectedCase.from_error(small_case(1), UserError(f"{name} is no CT"))
    line = SHARD_RECORD_ADAPTER.dump_json(ShardRecord("", None, [rejected]))
    assert rb"J\\xf6rg.nii" in line
    assert SHARD_RECORD_ADAPTER.validate_json(line).rejected == [rejected]


def test_json_gives_the_bytes_of_a_name_back():
    name = os.fsdecode(b"J\xf6rg.nii")
    text = encode_json_text(json.dumps({"file": name}, ensure_ascii=False))
    assert Path(json.loads(text)["file"]) == Path(name)
