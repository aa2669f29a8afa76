"""Phase 1: encoder and classifier.

accelerate launch launch/phase1.py [--config demo] [--resume | --restart] [part.field=value …]
"""

from pathlib import Path

if __name__ == "__main__":
    from rectvlm.train import main  # here, so that loader processes do not import the engine

    main(1, checkout=Path(__file__).resolve().parents[1])
