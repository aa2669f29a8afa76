import json

import numpy as np
import pytest

from rectvlm.checkpoint import Checkpoint
from rectvlm.data.shards import read_index, read_sample
from rectvlm.data.store import ShardStore
from rectvlm.models import RectVLM
from rectvlm.predict import case_folder
from rectvlm.predict.case import LoadedModel
from rectvlm.predict.shard_case import predict_sample, predict_shard_cases
from rectvlm.types import UserError


def test_the_page_of_a_shards_case_shows_its_truth(tiny_run, phantom_shards, tmp_path):
    store = ShardStore(str(phantom_shards))
    sample = read_sample(store, read_index(store).select_split("valid")[0])
    checkpoint = Checkpoint.open(tiny_run(2))
    loaded = LoadedModel(RectVLM.from_checkpoint(checkpoint, "cpu"), checkpoint)
    case, truth = predict_sample(loaded, sample)
    assert np.array_equal(case.hu, sample.ct) and case.lesion_bits.shape == sample.ct.shape
    folder = case_folder.write_case_folder(loaded, case, tmp_path, truth)
    html = (folder / "index.html").read_text()
    assert folder.name == sample.meta.key and "True lesions" in html and "True report" in html
    assert json.loads((folder / "findings.json").read_text())["shape"] == list(sample.ct.shape)


def test_keys_choose_cases_of_shards(tiny_run, phantom_shards, tmp_path):
    keys = [location.key for location in read_index(phantom_shards).select_split(None)][:2]
    folders = predict_shard_cases(str(phantom_shards), keys, tiny_run(2), tmp_path / "out", "cpu")
    assert [folder.name for folder in folders] == keys
    assert all("True lesions" in (folder / "index.html").read_text() for folder in folders)
    with pytest.raises(UserError, match=f"no case 'nobody'.*such as {keys[0]}"):
        predict_shard_cases(str(phantom_shards), ["nobody"], tiny_run(2), tmp_path / "none", "cpu")
    assert not (tmp_path / "none").exists()
