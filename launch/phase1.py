"""Phase 1: encoder and classifier.

accelerate launch launch/phase1.py [--config demo] [--resume | --restart] [part.field=value …]
"""

from pathlib import Path

from rectvlm.train import main

if __name__ == "__main__":
    main(1, checkout=Path(__file__).resolve().parents[1])
