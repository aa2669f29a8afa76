"""Figures of RadEval: what is missing is said, its values are averaged, and ours equal its own.

RadEval is no part of `dev`: `radeval_vectors.json` holds what its version 2.2.1 computes, the tests
of our side run on a package of its form, and those of the real one where it is installed.
"""

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rectvlm.evaluate.radeval_tables import make_radeval_table, render_radeval
from rectvlm.labels import FINDINGS
from rectvlm.metrics.bootstrap import draw_patient_weights
from rectvlm.metrics.clinical_efficacy import count_confusions, score_clinical_efficacy
from rectvlm.metrics.radeval_scores import (
    PROMPTS_FOLDER,
    RADEVAL_METRICS,
    RadEvalOptions,
    average_cases,
    require_radeval,
    score_by_radeval,
)
from rectvlm.metrics.vlm3d_report_protocol import corpus_bleu
from rectvlm.types import JsonObject, UserError

VECTORS: JsonObject = json.loads(
    Path(__file__).with_name("radeval_vectors.json").read_text(encoding="utf-8")
)
HAS_RADEVAL = importlib.util.find_spec("radeval") is not None
PACKAGE = '''
class RadEval:
    """Scores by length; `green` has no value for an empty text, `ratescore` has no weights."""

    def __init__(self, metrics, per_sample, show_progress):
        (self.key,), self.per_sample = metrics, per_sample
        if self.key == "ratescore":
            raise OSError("no weights on this machine.\\nMore lines follow.")

    def __call__(self, refs, hyps):
        values = [len(text) / 10 if text else float("nan") for text in hyps]
        if self.per_sample:
            return {self.key: values}
        return {f"f1radbert_ct_{mean}_f1": 0.25 for mean in ("micro", "macro", "weighted")}
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of RadEval's form, before any that is installed."""
    folder = tmp_path / "site" / "radeval"
    metadata = tmp_path / "site" / "radeval-9.9.dist-info"
    for path in (folder, metadata):
        path.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: radeval\nVersion: 9.9\n")
    monkeypatch.delitem(sys.modules, "radeval", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield folder
    sys.modules.pop("radeval", None)


class _Endpoint(BaseHTTPRequestHandler):
    """Speaks OpenAI's protocol: phrases are sentences, entailed if the other report has them."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "local"}]}, 200 if self.path == "/v1/models" else 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query = body["messages"][-1]["content"]
        system = body["messages"][0]["content"]
        reply = _split_phrases(query) if "sentence_list" in system else _compare_phrase(query)
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._answer(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
            },
            200,
        )

    def _answer(self, value: JsonObject, status: int) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _split_phrases(report: str) -> str:
    phrases = [phrase.strip() for phrase in report.split(".") if phrase.strip()]
    return json.dumps({"sentence_list": [{"orig": report, "new": phrases}]})


def _compare_phrase(query: str) -> str:
    import yaml

    asked = yaml.safe_load(query)
    is_there = asked["hypothesis"] in asked["reference"]
    status = "entailment" if is_there else "not_entailment"
    return yaml.safe_dump({"phrase": asked["hypothesis"], "status": status, "evidence": []})


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_checked_where_nothing_is_asked() -> None:
    require_radeval(RadEvalOptions())


@pytest.mark.skipif(HAS_RADEVAL, reason="RadEval is installed")
def test_the_missing_package_is_named_before_any_work() -> None:
    with pytest.raises(UserError, match=r"not installed: pip install 'rectvlm\[radeval\]'"):
        require_radeval(RadEvalOptions(("green",)))


def test_radfact_needs_prompts_and_an_endpoint_that_answers(package: Path, endpoint: str) -> None:
    def check(**settings: str) -> None:
        require_radeval(RadEvalOptions(("green", "radfact_ct"), **settings))

    with pytest.raises(UserError, match=r"prompts in .*which the archive of RadEval 9\.9"):
        check(radfact_endpoint=endpoint, radfact_model="local")
    (package / PROMPTS_FOLDER).mkdir(parents=True)
    with pytest.raises(UserError, match="expected --radfact-endpoint URL and --radfact-model NAME"):
        check(radfact_endpoint=endpoint)
    with pytest.raises(UserError, match=r"does not answer: http.*/v2/models .*404"):
        check(radfact_endpoint=endpoint.replace("v1", "v2"), radfact_model="local")
    with pytest.raises(UserError, match="does not answer: nonsense/models"):
        check(radfact_endpoint="nonsense", radfact_model="local")
    check(radfact_endpoint=endpoint + "/", radfact_model="local")


def test_cases_without_a_reference_or_a_value_take_no_part(package: Path) -> None:
    texts = {"image": ["aaaa", "bb", "", "cccccccc"], "table": ["a"] * 4}
    options = RadEvalOptions(("green", "ratescore", "f1radbert_ct"))
    weights = draw_patient_weights(list("wxyz"), 200)
    radeval = score_by_radeval(options, texts, ["r", "r", "r", None], weights)
    assert radeval["version"] == "9.9" and radeval["n"] == 3
    image = radeval["reports"]["image"]
    assert image["scores"]["green"] == pytest.approx(0.3)
    assert image["ci95"]["green"] == [pytest.approx(0.2), pytest.approx(0.4)]
    assert image["scores"]["f1radbert_ct_macro_f1"] == 0.25  # of the whole set: no interval
    assert set(image["ci95"]) == {"green"}
    assert radeval["reports"]["table"]["scores"]["green"] == pytest.approx(0.1)
    assert radeval["left_out"] == {"ratescore": "stopped: no weights on this machine"}
    json.dumps(radeval, allow_nan=False)

    page = render_radeval(radeval)
    assert "|  | language model | classifier and table |" in page
    assert "| GREEN (chest X-rays) | 0.300 [0.200, 0.400] | 0.100 [0.100, 0.100] |" in page
    assert "| RadBERT-CT, macro F1 | 0.250 | 0.250 |" in page
    assert "RaTEScore is left out: it stopped: no weights on this machine." in page
    assert make_radeval_table(radeval).row_count == 4
    nothing = score_by_radeval(options, {"image": ["a"]}, [None], None)
    assert nothing["n"] == 0 and nothing["reports"]["image"]["scores"] == {}


def test_f1_of_radfact_is_that_of_the_means() -> None:
    columns = {
        "radfact_ct_precision": np.array([1.0, 0.5, np.nan]),
        "radfact_ct_recall": np.array([0.5, 0.0, np.nan]),
        "radfact_ct_f1": np.array([2 / 3, 0.0, np.nan]),
    }
    weights = np.array([[1.0, 1, 1], [0, 0, 1], [0, 1, 0]])
    means = average_cases(columns, weights)
    assert means["radfact_ct_f1"] == pytest.approx([0.375, np.nan, 0.0], nan_ok=True)


def test_bleu_is_radevals() -> None:
    for row in VECTORS["words"]:
        ours = corpus_bleu(row["generated"], row["references"])
        assert ours == pytest.approx(row["bleu"], rel=1e-9, abs=1e-15)


def test_f1_of_each_finding_is_radevals() -> None:
    for row in VECTORS["findings"]:
        called, stated = (np.array(row[name], bool) for name in ("generated", "references"))
        counts = count_confusions(called, stated, np.ones(called.shape, bool))
        per_finding = score_clinical_efficacy(counts)["per_finding"]
        for finding in FINDINGS:
            f1 = per_finding[finding]["f1"]
            assert (f1 or 0.0) == pytest.approx(row["f1"][finding]), finding


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RADEVAL, reason="needs RadEval (the extra `radeval`)")
def test_the_real_package_scores_facts_by_a_local_endpoint(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radeval.metrics.radfact_ct import radfact_ct

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if not radfact_ct._PROMPTS_DIR.is_dir():  # as in its archive on PyPI
        for name in ("report_to_phrases", "negative_filtering", "nli"):
            (tmp_path / f"{name}_system.txt").write_text("Instructions.")
            (tmp_path / f"{name}_examples.json").write_text("[]")
        monkeypatch.setattr(radfact_ct, "_PROMPTS_DIR", tmp_path)
    references = ["Effusion. Nodule. No mass.", "Clear lungs."]
    texts = {"image": ["Effusion. Mass.", "Clear lungs."], "table": ["Mass.", "Mass."]}
    options = RadEvalOptions(("radfact_ct", "ratescore"), endpoint, "local")
    radeval = score_by_radeval(options, texts, references, None)
    image = radeval["reports"]["image"]["scores"]
    assert image["radfact_ct_precision"] == pytest.approx((1 / 2 + 1) / 2)
    assert image["radfact_ct_recall"] == pytest.approx((1 / 3 + 1) / 2)
    assert radeval["reports"]["table"]["scores"]["radfact_ct_f1"] == 0
    assert radeval["left_out"]["ratescore"].startswith("stopped: ")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RADEVAL, reason="needs RadEval (the extra `radeval`)")
def test_the_real_package_has_all_metrics_and_figures() -> None:
    from radeval.metrics._registry import get_metric_class

    for key, metric in RADEVAL_METRICS.items():
        adapter = get_metric_class(key)
        keys = adapter.metric_keys(adapter.__new__(adapter))
        assert set(metric.figures) <= set(keys)
