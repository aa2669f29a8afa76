"""Two processes train the same blocks twice under ZeRO-3: as leaf modules and module by module.

Started with the ranks in the environment, a folder and a DeepSpeed JSON. Blocks in a `ModuleList`
are leaves, those in a `ModuleDict` are not. The first block is frozen, so no input of the second
needs a gradient, and the last one recomputes its activations. Rank 0 writes how much each weight
has changed, and by how much the twins differ.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from rectvlm.models.layers import TransformerBlock, run_layer
from rectvlm.train.budget import StepBatch
from rectvlm.train.engine.engine import Engine

STEPS, ACCUMULATION, BLOCKS, WIDTH = 3, 2, 3, 16


class Twins(nn.Module):
    """The same blocks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = nn.ModuleList(TransformerBlock(WIDTH, 2) for _ in range(BLOCKS))
        self.plain = nn.ModuleDict({str(n): TransformerBlock(WIDTH, 2) for n in range(BLOCKS)})
        for number, leaf in enumerate(self.leaves):
            self.plain[str(number)].load_state_dict(leaf.state_dict())
        for module in (self.leaves[0], self.plain["0"]):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Loss of both."""
        loss = x.new_zeros(())
        for blocks in (list(self.leaves), list(self.plain.values())):
            y = x
            for number, block in enumerate(blocks):
                y = run_layer(block, y, recompute=number == BLOCKS - 1)
            loss = loss + y.square().mean()
        return loss


def train(folder: Path, ds_config: Path) -> None:
    """Train a few steps, and write the changes."""
    torch.manual_seed(0)
    engine = Engine(ds_config, StepBatch(2 * ACCUMULATION, 1, ACCUMULATION), 1e9, folder)
    model = Twins()
    start = {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine.prepare(model, torch.optim.AdamW([{"params": trained}], lr=0.01))
    torch.manual_seed(1 + engine.rank)
    for _ in range(STEPS * ACCUMULATION):
        engine.backward(engine.model(torch.randn(1, 5, WIDTH, dtype=torch.bfloat16)))
        engine.step()

    tensors = engine.gather_tensors(list(start))
    if engine.is_main:
        rows = []
        for name, before in start.items():
            if name.startswith("leaves."):
                twin = tensors[name.replace("leaves.", "plain.")].float()
                leaf = tensors[name].float()
                difference = (leaf - twin).norm().item()
                rows.append([name, (twin - before).norm().item(), difference])
        (folder / "changes.json").write_text(json.dumps(rows))
    engine.close()


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
