import subprocess
import sys

UNUSED_IN_PREDICTION = (
    "sklearn",
    "nltk",
    "sacrebleu",
    "rouge_score",
    "bert_score",
    "matplotlib",
    "deepspeed",
    "SimpleITK",
)


def test_prediction_loads_no_package_that_it_does_not_use() -> None:
    code = (
        "import sys, rectvlm.predict.run; "
        f"print(*sorted(set(sys.modules) & {set(UNUSED_IN_PREDICTION)!r}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
