"""Phase 2: the localizer joins.

accelerate launch launch/phase2.py [--config demo] [--stage localize] [--from PATH]
    [--resume [auto] | --restart] [part.field=value …]
"""

from pathlib import Path

if __name__ == "__main__":
    from rectvlm.train import main  # here, so that loader processes do not import the engine

    main(2, checkout=Path(__file__).resolve().parents[1])
