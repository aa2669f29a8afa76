"""Phase 2: the localizer joins.

accelerate launch launch/phase2.py [--config demo] [--resume | --restart] [part.field=value …]
"""

from pathlib import Path

from rectvlm.train import main

if __name__ == "__main__":
    main(2, checkout=Path(__file__).resolve().parents[1])
