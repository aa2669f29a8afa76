"""An experiment: reports of held-out cases by the model itself and by a vLLM server.

    python docs/lab-notes/vllm_reports.py CHECKPOINT URL [--cases 48] [--float32]

The language model is loaded unpacked, as the server has it. It prints seconds, tokens a second and
how many texts are equal, with the first that is not.
"""

import argparse
import dataclasses
import time

import torch

from rectvlm.checkpoint import Checkpoint
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.loader import BatchLoader
from rectvlm.evaluate.report_server import ReportServer
from rectvlm.models import RectVLM
from rectvlm.models.report_decoding import ReportPrompt


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("url")
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    opened = Checkpoint.open(options.checkpoint)
    generator = opened.config.generator.model_copy(update={"quantization": "none"})
    config = opened.config.model_copy(update={"generator": generator})
    model = RectVLM.from_checkpoint(dataclasses.replace(opened, config=config), "cpu")
    if options.float32:
        model = model.float()
    assert model.generator is not None
    prompts: list[ReportPrompt] = []
    dataset = ShardDataset(config.data, "valid")
    for batch in BatchLoader(dataset, [[case] for case in range(options.cases)]):
        _, batch_prompts = model.predict_and_prompt(batch)
        prompts += batch_prompts or []

    server = ReportServer(options.url, opened)
    ends = model.generator.language_model.generation_config.eos_token_id
    embeds = model.generator.embed_prompts(prompts)
    server.write_reports(embeds[:2], 8, ends)  # warms up
    texts = {}
    for name in ("own", "server", "own again", "server again"):
        start = time.monotonic()
        if name.startswith("own"):
            texts[name] = model.generator.write_reports(prompts)
        else:
            texts[name] = server.write_reports(embeds, generator.max_report_tokens, ends)
        seconds = time.monotonic() - start
        count = sum(len(model.generator.tokenizer.encode(text)) + 1 for text in texts[name])
        print(f"{name}: {seconds:.1f} s, {count / seconds:.0f} tokens a second")  # noqa: T201
    pairs = list(zip(texts["own"], texts["server"], strict=True))
    print(f"equal: {sum(a == b for a, b in pairs)} of {len(pairs)}")  # noqa: T201
    for own, other in pairs:
        if own != other:
            print(f"own:    {own}\nserver: {other}")  # noqa: T201
            break


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
