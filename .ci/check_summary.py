"""Whether a summary of the demo is whole: `python .ci/check_summary.py runs/demo/summary.json`."""

import json
import sys
from pathlib import Path

ENGINE = {
    "distributed_type": "DEEPSPEED",
    "zero_stage": 3,
    "world_size": 2,
    "llm_quantization": "nf4",
}


def faults(summary: dict) -> list[str]:
    """What is missing or wrong."""
    found = []
    if summary.get("engine") != ENGINE:
        found.append(f"engine is {summary.get('engine')}, expected {ENGINE}")
    phases = summary.get("phases", [])
    if [row.get("phase") for row in phases] != [1, 2, 3]:
        found.append(f"phases are {[row.get('phase') for row in phases]}, expected 1, 2, 3")
    for row in phases:
        missing = {"steps", "loss_first", "loss_last", "seconds"} - row.keys()
        if missing:
            found.append(f"phase {row.get('phase')} has no {', '.join(sorted(missing))}")
        elif not row["loss_last"] < row["loss_first"]:
            change = f"from {row['loss_first']} to {row['loss_last']}"
            found.append(f"the loss of phase {row['phase']} went {change}")
    if not summary.get("evaluation"):
        found.append("no evaluation")
    for target in summary.get("targets", []):
        # How long it takes is the machine's.
        if target["name"] != "minutes" and not _nearly_meets(target):
            found.append(f"{target['name']} is {target['found']}, wanted {target['wanted']}")
    real_cts = summary.get("real_cts", [])
    if len(real_cts) != 2:
        found.append(f"{len(real_cts)} of 2 real CTs were predicted")
    pages = [Path(page) for page in summary.get("pages", [])]
    if not pages:
        found.append("no pages")
    return found + [f"{page} is not there" for page in pages if not page.is_file()]


def _nearly_meets(target: dict) -> bool:
    """Whether a target is missed by a tenth at most: trained weights differ between processors."""
    figure, wanted = target["found"], target["wanted"]
    if figure is None:
        return False
    return figure <= 1.1 * wanted if target["at_most"] else figure >= 0.9 * wanted


if __name__ == "__main__":
    faulty = faults(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit("\n".join(faulty) if faulty else 0)
