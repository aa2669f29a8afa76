"""A phase whose CTs now and then hold a voxel that is not a number.

A faulty device or a broken decoder produces such CTs. Started like `launch/phaseN.py`, with the
phase's number first. Every third micro-batch of rank 1 is spoilt, after the augmentation: shards
hold whole numbers, so nothing before that can be NaN.
"""

import os
import sys
from itertools import count

if __name__ == "__main__":
    from rectvlm.config import AugmentConfig
    from rectvlm.train import main, train_step
    from rectvlm.types import Batch

    augment, taken = train_step.augment_batch, count(1)

    def spoil(batch: Batch, config: AugmentConfig) -> Batch:
        changed = augment(batch, config)
        if os.environ["RANK"] == "1" and next(taken) % 3 == 0:
            changed.ct[0].flatten()[changed.ct[0].numel() // 2] = float("nan")
        return changed

    train_step.augment_batch = spoil
    main(int(sys.argv[1]), sys.argv[2:])
